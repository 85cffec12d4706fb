"""Before: a server that sends every line back in capitals, as one wrote it for asyncore. asyncore_after.py is its port.

Not an example to follow: asyncore left the standard library in Python 3.12 (pyasyncore on PyPI brings it back), and
this program has the mistakes that it invites:

- at the client's FIN it closes at once, and what `out_buffer` still holds for a slow client is lost;
- it reads on from a client that does not read, and `out_buffer` grows without bound, and so does a line without an end;
- `out_buffer` is one bytes object: with many bytes in it, every send copies them all.
"""

from __future__ import annotations

import asyncore
import signal
import socket
import sys


class Capitals(asyncore.dispatcher_with_send):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.line = b""

    def handle_read(self) -> None:
        *lines, self.line = (self.line + self.recv(8192)).split(b"\n")
        self.send(b"".join(line.upper() + b"\n" for line in lines))


class Server(asyncore.dispatcher):
    def __init__(self, port: int) -> None:
        super().__init__()
        self.create_socket(socket.AF_INET, socket.SOCK_STREAM)
        self.set_reuse_addr()
        self.bind(("127.0.0.1", port))
        self.listen(100)
        assert self.socket is not None
        print("listening", self.socket.getsockname()[1], flush=True)

    def handle_accepted(self, sock: socket.socket, address: object) -> None:
        Capitals(sock)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    Server(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    asyncore.loop()
