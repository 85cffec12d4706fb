"""Step 4: level-triggered epoll by hand. `4_epoll_level.py [PORT]`

Lines are echoed; the line `kick` closes all older clients.
"""

from __future__ import annotations

import select
import signal
import socket
import sys
from itertools import takewhile

connections: dict[int, socket.socket] = {}
requests: dict[int, bytes] = {}  # the beginning of a line whose end has not come yet
responses: dict[int, bytearray] = {}
at_eof: set[int] = set()


def serve(port: int) -> None:
    with select.epoll() as epoll, socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        epoll.register(listener, select.EPOLLIN)
        print("listening", listener.getsockname()[1], flush=True)
        while True:
            for fd, events in epoll.poll():
                if fd == listener.fileno():
                    accept(epoll, listener)
                # THE FAULT: an event of this batch may be older than what now has its number. A client is closed, the
                # next one is accepted and gets the lowest free number, which is the same, and then the event of the
                # first one arrives here. This check does not help: it looks up the number, and the number is in use.
                elif fd in connections:
                    turn(epoll, fd, events)


def accept(epoll: select.epoll, listener: socket.socket) -> None:
    try:
        sock, _ = listener.accept()
    except (BlockingIOError, ConnectionError):
        return  # it left before we came
    sock.setblocking(False)
    fd = sock.fileno()
    connections[fd], requests[fd], responses[fd] = sock, b"", bytearray()
    epoll.register(fd, select.EPOLLIN)


def turn(epoll: select.epoll, fd: int, events: int) -> None:
    if events & (select.EPOLLHUP | select.EPOLLERR):
        close(fd)
        return
    try:
        if events & select.EPOLLIN:
            read(fd)
        else:
            sent = connections[fd].send(responses[fd])
            del responses[fd][:sent]
    except BlockingIOError:
        pass  # readiness was a hint: there is nothing to be done after all
    except ConnectionError:
        close(fd)
        return
    if responses[fd]:
        epoll.modify(fd, select.EPOLLOUT)  # its reply first, then its next request
    elif fd in at_eof:
        close(fd)
    else:
        epoll.modify(fd, select.EPOLLIN)


def read(fd: int) -> None:
    data = connections[fd].recv(65536)
    if not data:
        at_eof.add(fd)
        responses[fd] += requests[fd]
        return
    lines, newline, requests[fd] = (requests[fd] + data).rpartition(b"\n")
    if lines == b"kick":
        older = list(takewhile(lambda other: other != fd, connections))  # a dict keeps the order of insertion
        for other in older:
            close(other)
        lines = b"kicked %d" % len(older)
    responses[fd] += lines + newline


def close(fd: int) -> None:
    at_eof.discard(fd)
    del requests[fd], responses[fd]
    connections.pop(fd).close()  # which removes it from the epoll set, too


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as SIGTERM does: at once, without a traceback
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
