"""A TCP proxy: its clients talk to the server behind it. `proxy.py [--port PORT] HOST SERVER-PORT`

However fast one end sends and however slowly the other reads, memory stays bounded: while an end has more output queued
than `Limits.high`, its other end is not read from, and the sender has to wait. A FIN is passed on and leaves the other
direction open; so is a reset. A server that cannot be reached resets its client.
"""

from __future__ import annotations

import argparse
import logging

import muxcore

log = logging.getLogger("proxy")

# What autopause does for an echo, which reads from the same end that it writes to, is done below for two.
LIMITS = muxcore.Limits(autopause=False)


class End(muxcore.Handler):
    """One end; the other one is its `data`."""

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        if not conn.data.send(message):
            conn.pause_reading()

    def on_drain(self, conn: muxcore.Connection) -> None:
        conn.data.resume_reading()

    def on_eof(self, conn: muxcore.Connection) -> None:  # that this is here keeps the connection open
        conn.data.write_eof()  # behind what is queued; with a FIN in both directions the connections end by themselves

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        other, conn.data = conn.data, None
        if exc is None:
            other.close()  # it still gets what was queued
        else:
            log.warning("%s: %s", conn.peer, exc)
            other.abort()


class Client(End):
    """The end that a client connects to; it makes the other one, which accepts output at once."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.server = server

    def on_open(self, conn: muxcore.Connection) -> None:
        conn.data = conn.mux.connect(self.server, End(), limits=LIMITS)
        conn.data.data = conn


def main() -> None:
    parser = argparse.ArgumentParser(description="a TCP proxy")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("host")
    parser.add_argument("server_port", type=int)
    options = parser.parse_args()
    muxcore.serve(
        Client((options.host, options.server_port)),
        ("127.0.0.1", options.port),
        limits=LIMITS,
        ready=lambda mux, listener: print("listening", listener.address[1], flush=True),
    )


if __name__ == "__main__":
    main()
