"""What may live here: a muxcore server that sends every line it gets to all members, and nothing else.

A member that is too slow loses whole lines: memory stays bounded.
"""

from __future__ import annotations

import socket

from muxcore_callback import ready

import muxcore

SEND_BUFFER = 65536
LIMITS = muxcore.Limits(max_outbox=65536, overflow="drop")


class Room(muxcore.Handler):
    def __init__(self) -> None:
        self.members: dict[muxcore.Connection, None] = {}  # in order: see docs/guides/backpressure.md

    def on_open(self, conn: muxcore.Connection) -> None:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.members[conn] = None
        conn.send(b"hello")

    def on_message(self, conn: muxcore.Connection, line: bytes) -> None:
        conn.mux.broadcast(self.members, line)

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        self.members.pop(conn, None)


if __name__ == "__main__":
    muxcore.serve(Room(), ("127.0.0.1", 0), framer=muxcore.Lines(), limits=LIMITS, ready=ready)
