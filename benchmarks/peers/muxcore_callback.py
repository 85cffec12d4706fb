"""What may live here: an echo server in muxcore's callback style, and nothing else."""

from __future__ import annotations

import muxcore


class Echo(muxcore.Handler):
    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        conn.send(message)


def ready(mux: muxcore.Mux, listener: muxcore.Listener) -> None:
    print("listening", listener.address[1], flush=True)


if __name__ == "__main__":
    muxcore.serve(Echo(), ("127.0.0.1", 0), ready=ready)
