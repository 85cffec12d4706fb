"""What may live here: the echo server a careful programmer writes by hand over `selectors`, and nothing else.

The command line names the class: DefaultSelector, PollSelector, SelectSelector. As select_epoll.py does, it keeps what
a send did not accept, and reads no more from that peer until it is gone.
"""

from __future__ import annotations

import selectors
import signal
import socket
import sys
from typing import NoReturn

RECV_SIZE = 65536


def stop(*_: object) -> NoReturn:
    sys.exit(0)


class Client:
    """A connection, and what is still to be sent to it."""

    def __init__(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        self.selector = selector
        self.sock = sock
        self.pending = b""
        selector.register(sock, selectors.EVENT_READ, self.on_ready)

    def end(self) -> None:
        self.selector.unregister(self.sock)
        self.sock.close()

    def on_ready(self) -> None:
        try:
            if self.pending:
                self.flush()
            else:
                self.echo()
        except BlockingIOError:
            pass
        except OSError:
            self.end()

    def echo(self) -> None:
        data = self.sock.recv(RECV_SIZE)
        if not data:
            self.end()
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.pending = data[sent:]
            self.selector.modify(self.sock, selectors.EVENT_WRITE, self.on_ready)

    def flush(self) -> None:
        self.pending = self.pending[self.sock.send(self.pending) :]
        if not self.pending:
            self.selector.modify(self.sock, selectors.EVENT_READ, self.on_ready)


class Server:
    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.selector = selector
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # Linux: inherited by what it accepts
        selector.register(self.listener, selectors.EVENT_READ, self.accept_all)

    def accept_all(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            sock.setblocking(False)
            Client(self.selector, sock)

    def serve(self) -> None:
        select = self.selector.select
        while True:
            for key, _ in select():
                key.data()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    server = Server(getattr(selectors, sys.argv[1])())
    print("listening", server.listener.getsockname()[1], flush=True)
    server.serve()
