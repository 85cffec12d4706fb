"""What may live here: the echo server a careful programmer writes by hand over select.epoll, and nothing else.

Level-triggered, one recv per event. It keeps what a send did not accept, and reads no more from that peer until it is
gone; so it loses nothing and stays bounded. The recv size is 64 KiB: with 128 KiB and more, each small message would
cost an mmap and a munmap.
"""

from __future__ import annotations

import select
import signal
import socket
import sys
from typing import NoReturn

RECV_SIZE = 65536


def stop(*_: object) -> NoReturn:
    sys.exit(0)


class Server:
    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # Linux: inherited by what it accepts
        self.epoll = select.epoll()
        self.epoll.register(self.listener, select.EPOLLIN)
        self.sockets: dict[int, socket.socket] = {}
        self.pending: dict[int, bytes] = {}

    def accept_all(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            sock.setblocking(False)
            self.sockets[sock.fileno()] = sock
            self.epoll.register(sock, select.EPOLLIN)

    def end(self, fd: int) -> None:
        self.pending.pop(fd, None)
        self.epoll.unregister(fd)
        self.sockets.pop(fd).close()

    def flush(self, fd: int) -> None:
        data = self.pending[fd]
        try:
            rest = data[self.sockets[fd].send(data) :]
        except BlockingIOError:
            return
        except OSError:
            self.end(fd)
            return
        if rest:
            self.pending[fd] = rest
        else:
            del self.pending[fd]
            self.epoll.modify(fd, select.EPOLLIN)

    def echo(self, fd: int) -> None:
        sock = self.sockets[fd]
        try:
            data = sock.recv(RECV_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end(fd)
            return
        try:
            sent = sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.end(fd)
            return
        if sent < len(data):
            self.pending[fd] = data[sent:]
            self.epoll.modify(fd, select.EPOLLOUT)

    def serve(self) -> None:
        listener_fd, pending, echo = self.listener.fileno(), self.pending, self.echo
        while True:
            for fd, _ in self.epoll.poll():
                if fd in pending:
                    self.flush(fd)
                elif fd != listener_fd:
                    echo(fd)
                else:
                    self.accept_all()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    server = Server()
    print("listening", server.listener.getsockname()[1], flush=True)
    server.serve()
