"""Step 5: edge-triggered epoll, and what it demands. `5_epoll_edge.py [--no-drain] [PORT]`

An edge is reported once. A program that does not read until EAGAIN learns of the rest only when something new happens;
`--no-drain` shows that.
"""

from __future__ import annotations

import argparse
import select
import signal
import socket
from dataclasses import dataclass, field

READ_SIZE = 4096
READS_PER_TURN = 16  # fairness: a client that never stops sending never lets us see EAGAIN


@dataclass(eq=False)
class Client:
    sock: socket.socket
    output: bytearray = field(default_factory=bytearray)
    eof: bool = False


def serve(port: int, drain: bool) -> None:
    clients: dict[int, Client] = {}
    unfinished: dict[int, Client] = {}  # no edge will come for these: we stopped, not the kernel
    with select.epoll() as epoll, socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        epoll.register(listener, select.EPOLLIN)  # level-triggered: one accept per turn is enough
        print("listening", listener.getsockname()[1], flush=True)
        while True:
            due, unfinished = unfinished, {}
            for fd, _ in epoll.poll(0 if due else None):
                if fd != listener.fileno():
                    due[fd] = clients[fd]
                elif (sock := accept(listener)) is not None:
                    clients[sock.fileno()] = Client(sock)
                    # Both directions, once and for all: there is never anything to modify.
                    epoll.register(sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
            for fd, client in due.items():
                try:
                    if turn(client, READS_PER_TURN if drain else 1) and drain:
                        unfinished[fd] = client
                    closed = client.eof and not client.output
                except ConnectionError:
                    closed = True
                if closed:
                    unfinished.pop(fd, None)
                    clients.pop(fd).sock.close()


def accept(listener: socket.socket) -> socket.socket | None:
    try:
        sock, _ = listener.accept()
    except (BlockingIOError, ConnectionError):
        return None  # it left before we came
    sock.setblocking(False)
    return sock


def turn(client: Client, reads: int) -> bool:
    """Write until EAGAIN, read until EAGAIN. True if `reads` were not enough to see it."""
    try:
        while not client.eof:
            while client.output:
                sent = client.sock.send(client.output)
                del client.output[:sent]
            if not reads:
                return True
            reads -= 1
            data = client.sock.recv(READ_SIZE)
            client.output += data
            client.eof = not data
        while client.output:
            sent = client.sock.send(client.output)
            del client.output[:sent]
    except BlockingIOError:
        pass  # EAGAIN: from here on the kernel owes us an edge
    return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int, nargs="?", default=0)
    parser.add_argument("--no-drain", action="store_true", help="read once per event, and stall")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as SIGTERM does: at once, without a traceback
    serve(options.port, drain=not options.no_drain)
