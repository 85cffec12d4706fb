"""What may live here: gevent servers that echo: `chunks` as they come, or `lines`, on the command line."""

from __future__ import annotations

import signal
import socket
import sys

import gevent
from gevent.server import StreamServer

RECV_SIZE = 65536


def echo_chunks(sock: socket.socket, address: object) -> None:
    while data := sock.recv(RECV_SIZE):
        sock.sendall(data)


def echo_lines(sock: socket.socket, address: object) -> None:
    with sock.makefile("rb") as lines:
        for line in lines:
            sock.sendall(line)


if __name__ == "__main__":
    echo = {"chunks": echo_chunks, "lines": echo_lines}[sys.argv[1]]
    server = StreamServer(("127.0.0.1", 0), echo, backlog=4096)
    server.start()
    server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # Linux: inherited by what it accepts
    gevent.signal_handler(signal.SIGTERM, server.stop)
    print("listening", server.server_port, flush=True)
    server.serve_forever()
