"""The fallback core where it differs from the compiled one: FD_SETSIZE, Windows' habits, no sendfile (Promise
fallback)."""

from __future__ import annotations

import os
import select
import socket
import sys
import tempfile
from collections.abc import Iterator

import pytest
from support import LOCALHOST, Recorder, client, exchange, pattern, receive, until

import muxcore
from muxcore._fallback import READ, WRITE, SelectPoller

FD_SETSIZE = 1024
HIGH = 3000


@pytest.fixture
def clients() -> Iterator[list[socket.socket]]:
    """Clients whose descriptors are out of the way, so that those of the server are the low ones."""
    import resource

    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < HIGH + 1200:
        pytest.skip("the limit on open files is too low for a thousand clients")
    opened: list[socket.socket] = []
    yield opened
    for sock in opened:
        sock.close()


def connect(listener: muxcore.Listener) -> socket.socket:
    import fcntl

    low = socket.create_connection(listener.address)
    high = socket.socket(fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD_CLOEXEC, HIGH))
    low.close()
    return high


@pytest.mark.unix_only("elsewhere descriptors are not small numbers")
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


@pytest.mark.unix_only("elsewhere descriptors are not small numbers")
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
            with pytest.raises(ConnectionResetError):
                clients[1].recv(1)
            assert exchange(mux, clients[0], b"still served") == b"still served"
        finally:
            for fd in taken:
                os.close(fd)
        clients.append(connect(listener))
        assert exchange(mux, clients[2], b"room again") == b"room again"


@pytest.mark.parametrize("missing", [["sendfile"], ["sendfile", "pread"]])
def test_a_file_is_read_where_the_system_does_not_send_it(monkeypatch: pytest.MonkeyPatch, missing: list[str]) -> None:
    data = pattern(1 << 20)
    for name in missing:
        monkeypatch.delattr(os, name)
    recorder = Recorder()
    with muxcore.Mux(backend="select") as mux, tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        with client(mux.listen(LOCALHOST, recorder), rcvbuf=4096) as sock:
            until(mux, lambda: recorder.connections)
            [conn] = recorder.connections
            conn.send(b"before")
            conn.sendfile(file, 10)
            conn.send(b"after")
            assert receive(mux, sock, len(data) + 1) == b"before" + data[10:] + b"after"
            conn.sendfile(file)
            conn.sendfile(file)
            file.truncate(0)
            with pytest.raises(ConnectionResetError):
                receive(mux, sock)
    assert "before its promised end" in str(recorder.reason())


def test_on_windows_it_is_the_sockets_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(SelectPoller, "FD_SETSIZE", 2)
    poller = SelectPoller()
    poller.watch(5001, READ)
    poller.watch(5002, READ)
    poller.watch(5001, READ | WRITE)  # it has its place
    with pytest.raises(ValueError, match="FD_SETSIZE, is 2"):
        poller.watch(5003, WRITE)
    poller.unwatch(5002)
    poller.watch(5003, WRITE)


def test_on_windows_a_listener_whose_place_was_taken_rests_until_one_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    with muxcore.Mux(backend="select") as mux:
        listener = mux.listen(LOCALHOST, recorder, max_connections=1)
        first, second = (socket.create_connection(listener.address) for _ in range(2))
        until(mux, lambda: mux.stats().accept_pauses == 1)  # it rests, since it is full
        taken = mux.attach(ours, Recorder())
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(SelectPoller, "FD_SETSIZE", 2)  # the Mux's own socket, and the one attached
        first.close()
        until(mux, lambda: mux.stats().accept_pauses == 2)
        taken.abort()
        until(mux, lambda: recorder.count("open") == 2)
    for sock in (second, theirs):
        sock.close()


def test_on_windows_a_connect_that_failed_is_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    """select tells of it in its third set there."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(select, "select", lambda readers, writers, failing, timeout: ([], [], list(failing)))
    poller = SelectPoller()
    poller.watch(5001, READ)
    poller.watch(5002, READ | WRITE)
    assert poller.wait(1) == [(5002, WRITE)]
