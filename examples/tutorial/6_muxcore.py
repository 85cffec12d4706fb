"""Step 6: muxcore, which replaces all of them. `6_muxcore.py [PORT]`

What comes is echoed; the message `kick` closes all older clients.
"""

from __future__ import annotations

import signal
import sys

import muxcore


def serve(port: int) -> None:
    signals: list[int] = []
    with muxcore.Mux() as mux:
        for number in (signal.SIGINT, signal.SIGTERM):
            mux.add_signal_handler(number, signals.append, number)
        listener = mux.listen(("127.0.0.1", port))
        print("listening", listener.address[1], flush=True)
        while not signals:
            for conn, _ in mux.poll():
                for message in conn:
                    conn.send(kick(mux, conn) if message == b"kick\n" else message)
        mux.drain(5.0)  # what was accepted for sending still goes


def kick(mux: muxcore.Mux, conn: muxcore.Connection) -> bytes:
    older = [other for other in mux.connections if other.id < conn.id]
    for other in older:
        other.abort()
    return b"kicked %d\n" % len(older)


if __name__ == "__main__":
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
