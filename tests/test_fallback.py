"""The fallback core where it differs from the compiled one: select's limit (DESIGN 4.17)."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
from collections.abc import Iterator

import pytest
from support import LOCALHOST, Recorder, exchange, until

import muxcore

FD_SETSIZE = 1024
HIGH = 3000


@pytest.fixture
def clients() -> Iterator[list[socket.socket]]:
    """Clients whose descriptors are out of the way, so that those of the server are the low ones."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < HIGH + 1200:
        pytest.skip("the limit on open files is too low for a thousand clients")
    opened: list[socket.socket] = []
    yield opened
    for sock in opened:
        sock.close()


def connect(listener: muxcore.Listener) -> socket.socket:
    low = socket.create_connection(listener.address)
    high = socket.socket(fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD_CLOEXEC, HIGH))
    low.close()
    return high


def test_select_serves_a_thousand_connections(clients: list[socket.socket]) -> None:
    recorder = Recorder(reply=lambda message: message)
    with muxcore.Mux(backend="select") as mux:
        listener = mux.listen(LOCALHOST, recorder)
        for count in range(1, 1001):
            clients.append(connect(listener))
            until(mux, lambda count=count: listener.connections == count)
        for number, sock in enumerate(clients):
            message = b"client %d" % number
            assert exchange(mux, sock, message) == message


def test_select_refuses_what_is_beyond_its_limit_and_serves_the_others(clients: list[socket.socket]) -> None:
    recorder = Recorder(reply=lambda message: message)
    with muxcore.Mux(backend="select") as mux:
        listener = mux.listen(LOCALHOST, recorder)
        clients.append(connect(listener))
        until(mux, lambda: recorder.count("open") == 1)
        taken = []
        while not taken or taken[-1] < FD_SETSIZE - 1:
            taken.append(os.dup(0))
        try:
            clients.append(connect(listener))
            until(mux, lambda: recorder.count("close") == 1)
            reason = recorder.reason()
            assert isinstance(reason, ValueError)
            assert "FD_SETSIZE, is 1024" in str(reason)
            assert clients[1].recv(1) == b""
            assert exchange(mux, clients[0], b"still served") == b"still served"
        finally:
            for fd in taken:
                os.close(fd)
        clients.append(connect(listener))
        assert exchange(mux, clients[2], b"room again") == b"room again"
