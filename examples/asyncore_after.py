"""After: asyncore_before.py on muxcore. Every line comes back in capitals, and none is lost, however slow its reader.

What was a dispatcher is a handler, `handle_read` is `on_message`, and the buffers are gone: `Lines` has the unfinished
line, the connection's outbox what waits for the client, and both have a limit. `handle_accepted`, `handle_close`,
`writable` and `asyncore.loop` have nothing left to do.
"""

from __future__ import annotations

import sys

import muxcore


class Capitals(muxcore.Handler):
    def on_message(self, conn: muxcore.Connection, line: bytes) -> None:
        conn.send(line.upper())


if __name__ == "__main__":
    muxcore.serve(
        Capitals(),
        ("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0),
        framer=muxcore.Lines(),
        ready=lambda mux, listener: print("listening", listener.address[1], flush=True),
    )
