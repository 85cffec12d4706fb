"""What may live here: an echo server in muxcore's callback style, on the backend that the command line names."""

from __future__ import annotations

import signal
import sys

import muxcore


class Echo(muxcore.Handler):
    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        conn.send(message)


if __name__ == "__main__":
    with muxcore.Mux(backend=sys.argv[1]) as mux:
        signal.signal(signal.SIGTERM, lambda *_: mux.stop())
        listener = mux.listen(("127.0.0.1", 0), Echo())
        print("listening", listener.address[1], flush=True)
        mux.run()
