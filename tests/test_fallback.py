"""The fallback core where it differs from the compiled one: FD_SETSIZE, Windows' habits, no sendfile (Promise
fallback)."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from support import (
    LOCALHOST,
    InterruptAt,
    RaiseBehindCall,
    Recorder,
    as_of_muxcore,
    client,
    exchange,
    pattern,
    receive,
    turns,
    until,
)

import muxcore
from muxcore import Lines
from muxcore._fallback import policy, pollers
from muxcore._fallback.connection import Connection
from muxcore._fallback.mux import PythonCore
from muxcore._fallback.outbox import FilePart
from muxcore._fallback.pollers import READ, WRITE, SelectPoller
from muxcore._frame import Reader
from muxcore._own import OwnSocket

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
        fds = []
        while not fds or fds[-1] < FD_SETSIZE - 1:
            fds.append(os.dup(0))
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
            for fd in fds:
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
    assert "before the end of the queued part" in str(recorder.reason())


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


def test_on_windows_a_listener_without_a_free_place_pauses_until_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    with muxcore.Mux(backend="select") as mux:
        listener = mux.listen(LOCALHOST, recorder, max_connections=1)
        first, second = (socket.create_connection(listener.address) for _ in range(2))
        until(mux, lambda: mux.stats().accept_pauses == 1)  # it rests, since it is full
        attached = mux.attach(ours, Recorder())
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(SelectPoller, "FD_SETSIZE", 2)  # the Mux's own socket, and the one attached
        first.close()
        until(mux, lambda: mux.stats().accept_pauses == 2)
        attached.abort()
        until(mux, lambda: recorder.count("open") == 2)
    for sock in (second, theirs):
        sock.close()


def test_on_windows_a_connect_that_failed_is_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    """select reports it in its third set there."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(select, "select", lambda readers, writers, failing, timeout: ([], [], list(failing)))
    poller = SelectPoller()
    poller.watch(5001, READ)
    poller.watch(5002, READ | WRITE)
    assert poller.wait(1) == [(5002, WRITE)]


def test_select_raises_when_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(select, "select", as_of_muxcore(fails))
    with pytest.raises(OSError, match="memory"):
        SelectPoller().wait(0)


@pytest.mark.unix_only("what select and poll report of a descriptor that is closed")
@pytest.mark.parametrize("backend", ["select", "poll"])
@pytest.mark.parametrize("kind", ["connection", "listener", "datagram", "watch"])
def test_a_descriptor_that_was_closed_is_given_up(
    mux: muxcore.Mux, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    owners: dict[str, Callable[[], Any]] = {
        "connection": lambda: mux.attach(ours, recorder),
        "listener": lambda: mux.listen(LOCALHOST, recorder),
        "datagram": lambda: mux.datagram(LOCALHOST, print),
        "watch": lambda: mux.add_reader(ours.detach(), print),
    }
    number = ours.fileno()
    owner = owners[kind]()
    turns(mux, 0.01)
    os.close(number if owner is None else owner.fileno())
    assert turns(mux, 0.05) <= 1
    if kind == "connection":
        assert "closed by other code" in str(recorder.reason())
    else:
        assert "closed by other code" in caplog.text
    assert owner is None or owner.closed
    ours.close()
    theirs.close()


def without_memory(monkeypatch: pytest.MonkeyPatch, name: str, times: int, code: int = errno.ENOBUFS) -> None:
    """Let a method of the Mux's sockets fail so many times, and then work."""
    left = [0] * times

    def fails(sock: Any, *args: Any) -> Any:
        if left:
            left.pop()
            raise OSError(code, os.strerror(code))
        return getattr(socket.socket, name)(sock, *args)

    monkeypatch.setattr(OwnSocket, name, as_of_muxcore(fails), raising=False)


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_what_there_was_no_memory_to_send_is_sent_later(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    without_memory(monkeypatch, "send", 2)
    before = mux.stats().send_calls
    conn.send(b"later")
    assert receive(mux, theirs, 5) == b"later"
    assert mux.stats().send_calls - before == 3
    theirs.close()


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_a_datagram_there_was_no_memory_for_is_sent_later(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[BaseException] = []

    class Handler:
        def on_datagrams(self, datagram: object, messages: object) -> None: ...

        def on_error(self, datagram: object, exc: BaseException) -> None:
            errors.append(exc)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(LOCALHOST)
        datagram = mux.datagram(LOCALHOST, Handler())
        without_memory(monkeypatch, "sendto", 3)
        datagram.send(b"later", sock.getsockname())
        assert receive(mux, sock, 5) == b"later"
    assert errors == []


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_an_interrupt_before_the_timer_of_a_failed_send_keeps_nothing_back(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    mux.poll(0)
    conn.send(b"later")
    without_memory(monkeypatch, "send", 1)
    monkeypatch.setattr(type(mux), "_add_timer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mux.poll(0)
    assert receive(mux, theirs, 5) == b"later"
    theirs.close()


@pytest.mark.skipif(not hasattr(os, "sendfile"), reason="this system has no sendfile")
@pytest.mark.parametrize("backend", ["select", "poll"])
def test_an_interrupt_behind_a_sendfile_loses_and_doubles_nothing(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = FilePart.send

    def interrupted(part: Any, *args: Any) -> None:
        monkeypatch.undo()
        send(part, *args)
        raise KeyboardInterrupt

    data = pattern(1 << 20)
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    mux.poll(0)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        monkeypatch.setattr(FilePart, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            conn.sendfile(file)
        assert receive(mux, theirs, len(data)) == data
        until(mux, lambda: conn.outbox_size == 0)
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
    theirs.close()


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_half_a_close_is_not_given_up_with_a_whole_one(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    """write_eof() waits for the peer without a limit; only a connection that is closing has half a minute."""
    monkeypatch.setattr(policy, "CLOSING_STALL_NS", 20_000_000)
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder)
    conn.send(bytes(12 << 20))
    conn.write_eof()
    turns(mux, 0.1)
    assert recorder.names() == ["open"]
    conn.close()
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.WriteTimeout)
    theirs.close()


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_a_call_of_another_thread_just_before_a_wait_is_not_slept_through(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    wait = PythonCore._wait

    def late(mux: Any, timeout_ns: int) -> None:
        monkeypatch.undo()
        mux.call_soon_threadsafe(called.append, 1)
        wait(mux, timeout_ns)

    monkeypatch.setattr(PythonCore, "_wait", late)
    start = time.monotonic()
    mux.poll(10)
    assert called
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_what_another_thread_sends_amid_a_close_is_refused(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message for which send returned True would be lost."""
    results: list[bool] = []
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    mux.poll(0)
    run_all = PythonCore._run_all_foreign

    def run_all_and_send(mux: Any) -> None:
        run_all(mux)
        thread = threading.Thread(target=lambda: results.append(conn.send(b"late")))
        thread.start()
        thread.join()

    monkeypatch.setattr(PythonCore, "_run_all_foreign", run_all_and_send)
    mux.close()
    assert results == [False]
    theirs.close()


@pytest.mark.linux_only("a socket's error queue")
def test_a_file_that_ends_while_a_time_stamp_waits_ends_its_connection() -> None:
    """poll reports both at once: if the one has ended the connection, the other is ignored."""
    recorder = Recorder()
    so_timestamping, software = 37, 2 | 8 | 16
    with muxcore.Mux(backend="poll") as mux, tempfile.TemporaryFile() as file:
        file.truncate(1 << 20)
        with client(mux.listen(LOCALHOST, recorder)) as sock:
            until(mux, lambda: recorder.connections)
            [conn] = recorder.connections
            conn.setsockopt(socket.SOL_SOCKET, so_timestamping, software)
            while not conn.outbox_size:
                conn.send(bytes(1 << 16))
                conn.flush()
            conn.sendfile(file)
            file.truncate(0)
            sock.settimeout(0)
            with suppress(BlockingIOError):
                while True:
                    sock.recv(1 << 20)
            until(mux, lambda: recorder.count("close"))
    assert "before the end of the queued part" in str(recorder.reason())


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_a_connection_whose_interest_cannot_be_changed_ends_with_the_reason(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def fails(self: Any, fd: int, wanted: int) -> None:
        raise error

    poller: Any = mux._poller  # type: ignore[attr-defined]
    monkeypatch.setattr(type(poller), "watch", as_of_muxcore(fails))
    conn.pause_reading()
    until(mux, lambda: recorder.count("close"))
    assert recorder.reason() is error
    theirs.close()


# --- against mutants that survived (tests/mutants) ------------------------------------------------------


def test_a_system_without_epoll_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pollers, "system_epoll", None)
    with pytest.raises(OSError, match="no epoll"):
        pollers.Epoll()


def looks(mux: Any, seconds: float) -> int:
    """The number of waits in a poll in which nothing comes: a spin is no event that would be counted."""
    count, wait = 0, mux._poller.wait

    def counted(timeout: float | None) -> Any:
        nonlocal count
        count += 1
        return wait(timeout)

    mux._poller.wait = counted
    assert mux.poll(seconds) == []
    return count


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_what_an_interrupt_has_left_watched_is_forgotten(mux: muxcore.Mux) -> None:
    """It came between the two lines of _forget()."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b"x")
    mux.add_reader(ours, print)
    del mux._owners[ours.fileno()]  # type: ignore[attr-defined]
    assert looks(mux, 0.1) <= 3
    ours.close()
    theirs.close()


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_a_connection_that_was_blocked_is_watched_no_more_when_it_has_ended(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    conn.send(bytes(4 << 20))
    mux.poll(0)
    conn.abort()
    mux.poll(0)
    assert looks(mux, 0.1) <= 3
    theirs.close()


@pytest.mark.unix_only("dup2")
@pytest.mark.parametrize("backend", ["select", "poll"])
def test_a_connection_may_reuse_the_number_of_the_socket_that_ends_a_wait(
    mux: muxcore.Mux, caplog: pytest.LogCaptureFixture
) -> None:
    """Other code has closed what is ours."""
    [number] = mux._owners  # type: ignore[attr-defined]
    ours, theirs = socket.socketpair()
    os.dup2(ours.fileno(), number)
    ours.close()
    mux.attach(socket.socket(fileno=number), Recorder(reply=lambda message: message))
    assert exchange(mux, theirs, b"x") == b"x"
    assert "closed by other code" in caplog.text
    theirs.close()


@pytest.mark.parametrize("backend", ["select", "poll"])
@pytest.mark.parametrize("kind", ["connection", "datagram"])
def test_an_interrupt_amid_the_end_of_a_socket_keeps_no_other_from_being_served(backend: str, kind: str) -> None:
    """A descriptor that is closed and still watched would be all that is reported."""
    at, left = 0, 0
    while left <= 0:
        at += 1
        with muxcore.Mux(backend=backend) as mux:
            ours, theirs = socket.socketpair()
            mux.attach(ours, Recorder(reply=lambda message: message))
            gone, far = socket.socketpair()
            owner: Any = mux.attach(gone, Recorder()) if kind == "connection" else mux.datagram(LOCALHOST, print)
            mux.poll(0)
            interrupt = InterruptAt("_fallback/slots.py" if kind == "connection" else "_fallback/datagram.py", at)
            interrupt.during(owner.abort if kind == "connection" else owner.close)
            left = interrupt.left
            assert exchange(mux, theirs, b"x") == b"x"
            for sock in (gone, far, theirs):
                sock.close()


# --- an interrupt behind recv(2) ---------------------------------------------------------------------


def interrupting(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ctrl-C at the next call of this method of a connection."""

    def interrupted(*args: Any) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, name, interrupted)


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_what_was_read_before_an_interrupt_waits_for_the_end_of_a_pause(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    theirs.sendall(b"x")
    interrupting(monkeypatch, "_receive")
    with pytest.raises(KeyboardInterrupt):
        mux.poll(1)
    conn.pause_reading()
    turns(mux, 0.02)
    assert (recorder.messages(), conn.unread) == ([], b"x")
    conn.resume_reading()
    until(mux, recorder.messages)
    assert recorder.messages() == [b"x"]
    theirs.close()


@pytest.fixture
def pulled(mux: muxcore.Mux) -> Iterator[tuple[muxcore.Connection, socket.socket]]:
    """A connection in pull style that is about to read the line b"1"."""
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, framer=Lines())
    mux.poll(0)
    theirs.sendall(b"1\n")
    yield conn, theirs
    theirs.close()


def before_call(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, handle: Callable[[], None]) -> None:
    """As a signal handler that runs when this function is called: the interpreter looks for signals there."""
    function = getattr(where, name)

    def called(*args: Any) -> Any:
        monkeypatch.setattr(where, name, function)
        handle()
        return function(*args)

    monkeypatch.setattr(where, name, called)


@pytest.mark.parametrize("backend", ["select", "poll"])
@pytest.mark.parametrize(("where", "name"), [(Connection, "_new_reader"), (Reader, "feed")])
def test_a_signal_handler_may_end_a_connection_whose_input_was_just_read(
    mux: muxcore.Mux, pulled: tuple[muxcore.Connection, socket.socket], monkeypatch: pytest.MonkeyPatch,
    where: Any, name: str,
) -> None:  # fmt: skip
    conn, _ = pulled
    before_call(monkeypatch, where, name, conn.abort)
    until(mux, lambda: conn.closed)
    assert (conn.inbox_size, conn.recv_all()) == (0, [])


@pytest.mark.parametrize("backend", ["select", "poll"])
@pytest.mark.parametrize(
    ("where", "name", "kept"), [(Connection, "_new_reader", b""), (Reader, "feed", b""), (Reader, "feed", b"0")]
)
def test_a_signal_handler_may_set_a_framer_for_input_that_was_just_read(
    mux: muxcore.Mux, pulled: tuple[muxcore.Connection, socket.socket], monkeypatch: pytest.MonkeyPatch,
    where: Any, name: str, kept: bytes,
) -> None:  # fmt: skip
    conn, theirs = pulled
    until(mux, lambda: conn.inbox_size)
    assert conn.recv_all() == [b"1"]
    if kept:
        theirs.sendall(kept)
        until(mux, lambda: conn.inbox_size)
    before_call(monkeypatch, where, name, lambda: setattr(conn, "framer", muxcore.Delimiter(b"2")))
    theirs.sendall(b"1\n2")
    until(mux, lambda: conn.inbox_size > len(kept))
    assert (conn.recv_all(), conn.unread) == ([kept + b"1\n"], b"")


@pytest.mark.parametrize("backend", ["select", "poll"])
@pytest.mark.parametrize("framer", [Lines(), muxcore.Delimiter(b"\n"), None])
def test_a_signal_handler_may_set_a_framer_as_the_reader_gives_a_message(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch, framer: Any
) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder, framer=Lines())
    mux.poll(0)
    before_call(monkeypatch, Reader, "take", lambda: setattr(conn, "framer", framer))
    theirs.sendall(b"1\n2\n")
    until(mux, lambda: b"2" in b"".join(recorder.messages()))
    assert recorder.messages() == ([b"1\n2\n"] if framer is None else [b"1", b"2"])
    theirs.close()


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_a_signal_handler_may_set_a_framer_and_interrupt_recv_all(
    mux: muxcore.Mux, pulled: tuple[muxcore.Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    conn, theirs = pulled
    until(mux, lambda: conn.inbox_size)

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        conn.framer = muxcore.Delimiter(b"3")
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "_schedule", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conn.recv_all()
    theirs.sendall(b"4\n3")
    until(mux, lambda: conn.inbox_size > 2)
    assert conn.recv_all() == [b"1", b"4\n"]


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_an_eof_that_was_read_before_an_interrupt_is_an_eof(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    mux.attach(ours, recorder)
    mux.poll(0)
    theirs.close()
    interrupting(monkeypatch, "_read_eof")
    with pytest.raises(KeyboardInterrupt):
        mux.poll(1)
    calls = mux.stats().recv_calls
    until(mux, lambda: recorder.count("close"))
    assert (recorder.names(), recorder.reason()) == (["open", "close"], None)
    assert mux.stats().recv_calls == calls, "it was not read again"


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_an_interrupt_behind_the_last_message_of_recv_all_loses_none(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, framer=Lines())
    theirs.sendall(b"1\n2\n")
    until(mux, lambda: conn.inbox_size)
    interrupting(monkeypatch, "_schedule")
    with pytest.raises(KeyboardInterrupt):
        conn.recv_all()
    assert conn.recv_all() == [b"1", b"2"]
    theirs.close()


@pytest.fixture
def there() -> Iterator[socket.socket]:
    """To which a datagram is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(LOCALHOST)
        sock.setblocking(False)
        yield sock


def arrived(sock: socket.socket) -> list[bytes]:
    """What is there already."""
    found = []
    with suppress(BlockingIOError):
        while True:
            found.append(sock.recv(100))
    return found


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_a_udp_socket_without_room_waits_for_it(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch, there: socket.socket
) -> None:
    datagram = mux.datagram(LOCALHOST, print)
    without_memory(monkeypatch, "sendto", 1, errno.EAGAIN)
    datagram.send(b"later", there.getsockname())
    assert receive(mux, there, 5) == b"later"
    assert mux.stats().would_blocks == 1


@pytest.mark.parametrize("backend", ["select", "poll"])
def test_a_udp_socket_that_cannot_be_watched_for_room_is_tried_again_after_a_while(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch, there: socket.socket
) -> None:
    poller: Any = type(mux)._poller.__get__(mux)  # type: ignore[attr-defined]
    watch = type(poller).watch

    def fails(self: Any, fd: int, wanted: int) -> None:
        if wanted & WRITE:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        watch(self, fd, wanted)

    monkeypatch.setattr(type(poller), "watch", as_of_muxcore(fails))
    datagram = mux.datagram(LOCALHOST, print)
    without_memory(monkeypatch, "sendto", 5, errno.EAGAIN)
    datagram.send(b"later", there.getsockname())
    start = time.monotonic()
    assert receive(mux, there, 5) == b"later"
    assert time.monotonic() - start > 0.04, "10 ms each"


def at_call(number: int, fn: Callable[[], object], step: Callable[[], object]) -> bool:
    """Do the step, and `fn` at the number-th call that datagrams make or are, where a signal handler may run; whether
    there were so many."""
    left = number

    def profile(frame: Any, event: str, _: object) -> None:
        nonlocal left
        if frame.f_code.co_filename.endswith("_fallback/datagram.py") and event in ("call", "c_return"):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                fn()

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return left <= 0


def test_a_signal_handler_may_close_a_datagram_socket_at_any_call_of_its_close(there: socket.socket) -> None:
    number, more = 0, True
    with muxcore.Mux(backend="select") as mux:
        while more:
            number += 1
            before = mux.stats().drops
            datagram = mux.datagram(LOCALHOST, print)
            datagram.send(b"x", there.getsockname())
            more = at_call(number, datagram.close, datagram.close)
            assert datagram.closed
            mux.poll(0)
            assert len(arrived(there)) + mux.stats().drops - before == 1
        assert mux.stats().datagram_errors == 0
        assert number > 10


def test_an_interrupt_at_any_line_of_a_send_leaves_nothing_unsent(there: socket.socket) -> None:
    """What is counted as accepted goes out with the next turn."""
    with muxcore.Mux(backend="select") as mux:
        datagram = mux.datagram(LOCALHOST, print)
        for number in range(1, 60):
            before = mux.stats().messages_out
            InterruptAt("_fallback/datagram.py", number).during(lambda: datagram.send(b"x", there.getsockname()))
            mux.poll(0)
            assert len(arrived(there)) >= mux.stats().messages_out - before
        assert mux.stats().datagram_errors == mux.stats().drops == 0


# --- exceptions of signal handlers --------------------------------------------------------------------


errors = pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError, BlockingIOError])


@errors
@pytest.mark.parametrize("backend", ["poll"])
@pytest.mark.parametrize("framer", [None, Lines()], ids=["chunks", "lines"])
def test_an_error_of_a_signal_handler_is_none_of_the_socket(
    backend: str, kind: type[BaseException], framer: Any
) -> None:
    """It leaves poll(). Nothing is lost, nothing comes twice, and no other connection gets what was read."""
    number, came = 0, True
    while came:
        number += 1
        first, second = Recorder(), Recorder()
        with muxcore.Mux(backend=backend) as mux:
            (ours, theirs), (other, others) = socket.socketpair(), socket.socketpair()
            conn = mux.attach(ours, first, framer=framer)
            mux.attach(other, second, framer=framer)
            mux.poll(0)
            conn.write(b"reply")
            theirs.sendall(b"first\n")
            tracer = RaiseBehindCall(number, kind("of a signal handler"))
            raised = tracer.during(lambda mux=mux: mux.poll(0))
            came = tracer.came
            assert raised == came
            others.sendall(b"second\n")
            until(mux, lambda first=first, second=second: first.messages() and second.messages())
            assert (first.received().strip(), second.received().strip()) == (b"first", b"second")
            assert first.names() == second.names() == ["open", "message"]
            assert receive(mux, theirs, 5) == b"reply"
            theirs.close()
            others.close()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("step", ["idle", "linger", "retry", "accept"])
def test_an_error_of_a_signal_handler_amid_a_timer_of_muxcore_leaves_poll(
    kind: type[BaseException], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its step is not lost."""
    number, came = 0, True
    while came:
        number += 1
        recorder = Recorder()
        with muxcore.Mux(backend="poll") as mux:
            ours, theirs = socket.socketpair()
            conn = mux.attach(ours, recorder, timeouts=muxcore.Timeouts(idle=0.02, linger=0.01))
            mux.poll(0)
            if step == "retry":
                with monkeypatch.context() as patch:
                    without_memory(patch, "send", 1)
                    conn.send(b"late")
                    mux.poll(0)
            elif step == "linger":
                conn.close()
                mux.poll(0)
            elif step == "accept":
                listener: Any = mux.listen(LOCALHOST, recorder)
                listener._accept_failed(OSError(errno.EMFILE, "none left"))
            time.sleep(0.015)
            tracer = RaiseBehindCall(number, kind("of a signal handler"))
            raised = tracer.during(lambda mux=mux: mux.poll(0))
            came = tracer.came
            assert raised == came
            if step == "accept":
                until(mux, lambda listener=listener: not listener._accept_paused)
            elif step == "retry":
                assert receive(mux, theirs, 4) == b"late"
            else:
                until(mux, lambda recorder=recorder: recorder.count("close"))
            assert mux.stats().handler_errors == 0
            theirs.close()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("size", [5, 5000])
def test_an_interrupt_loses_and_doubles_nothing_of_other_threads(kind: type[BaseException], size: int) -> None:
    number, came = 0, True
    while came:
        number += 1
        recorder, called = Recorder(), []
        with muxcore.Mux(backend="poll") as mux:
            ours, theirs = socket.socketpair()
            conn = mux.attach(ours, recorder)
            mux.poll(0)

            def other(conn: Any = conn, mux: muxcore.Mux = mux, called: list[int] = called) -> None:
                mux.call_soon_threadsafe(lambda: called.append(1))
                conn.send(b"x" * size)
                conn.send(b"yz")
                mux.call_soon_threadsafe(lambda: called.append(2))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            tracer = RaiseBehindCall(number, kind("of a signal handler"))
            raised = tracer.during(lambda mux=mux: mux.poll(0))
            came = tracer.came
            assert raised == came
            until(mux, lambda called=called: len(called) == 2)
            assert receive(mux, theirs, size + 2) == b"x" * size + b"yz"
            assert called == [1, 2]
            until(mux, lambda conn=conn: conn.outbox_size == 0)
            conn.close()
            theirs.close()
            until(mux, lambda recorder=recorder: recorder.count("close"))


@pytest.mark.skipif(not hasattr(os, "sendfile"), reason="this system has no sendfile")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
def test_an_interrupt_amid_a_sendfile_leaves_sigpipe_as_it_was(kind: type[BaseException]) -> None:
    number, came = 0, True
    while came:
        number += 1
        with muxcore.Mux(backend="poll") as mux, tempfile.TemporaryFile() as file:
            file.write(b"a file")
            file.flush()
            ours, theirs = socket.socketpair()
            conn = mux.attach(ours, Recorder())
            mux.poll(0)
            conn.sendfile(file)
            tracer = RaiseBehindCall(number, kind("of a signal handler"))
            raised = tracer.during(lambda mux=mux: mux.poll(0))
            came = tracer.came
            assert raised == came
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
            assert receive(mux, theirs, 6) == b"a file"
            until(mux, lambda conn=conn: conn.outbox_size == 0)
            theirs.close()


def interrupted_everywhere(kind: type[BaseException], prepare: Callable[[Any], tuple[Any, Any]]) -> None:
    """`prepare` makes a step, and a check that is run after the step was interrupted: once behind each of its calls."""
    number, came = 0, True
    while came:
        number += 1
        with muxcore.Mux(backend="poll") as mux:
            mux.poll(0)
            step, check = prepare(mux)
            tracer = RaiseBehindCall(number, kind("of a signal handler"))
            raised = tracer.during(step)
            came = tracer.came
            assert raised == came
            check(raised)
            assert turns(mux, 0.01) <= 3, "it spins"
            assert mux.drain(1)
            assert mux.stats().connections == 0
    assert number > 10


interrupts = pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])


@interrupts
def test_an_interrupt_loses_no_client_that_was_accepted(kind: type[BaseException]) -> None:
    def prepare(mux: muxcore.Mux) -> tuple[Any, Any]:
        recorder = Recorder(reply=lambda message: message)
        listener = mux.listen(LOCALHOST, recorder)
        sock = client(listener)
        sock.sendall(b"x")

        def check(raised: bool) -> None:
            assert receive(mux, sock, 1) == b"x"
            assert (listener.connections, mux.stats().connections, mux.stats().accepts) == (1, 1, 1)
            sock.close()
            until(mux, lambda: recorder.count("close"))
            assert recorder.names() == ["open", "message", "close"]
            assert recorder.reason() is None
            assert listener.connections == 0

        return lambda: mux.poll(0.5), check

    interrupted_everywhere(kind, prepare)


@interrupts
@pytest.mark.parametrize("style", ["attach", "listen"])
def test_an_interrupted_attach_leaves_the_socket_or_serves_it(kind: type[BaseException], style: str) -> None:
    def prepare(mux: muxcore.Mux) -> tuple[Any, Any]:
        recorder = Recorder(reply=lambda message: message)
        if style == "attach":
            ours, theirs = socket.socketpair()
            address = None
        else:
            ours = socket.create_server(LOCALHOST)
            address = ours.getsockname()
            theirs = socket.create_connection(address)
        theirs.sendall(b"x")

        def check(raised: bool) -> None:
            if ours.fileno() >= 0:
                mux.poll(0)
                assert recorder.names() == []
                ours.close()
                theirs.close()
                return
            assert receive(mux, theirs, 1) == b"x"
            assert mux.stats().connections == 1
            theirs.close()
            until(mux, lambda: recorder.count("close"))
            assert recorder.names() == ["open", "message", "close"]

        return (lambda: mux.attach(ours, recorder) and None) if address is None else (
            lambda: mux.listen(ours, recorder) and None
        ), check

    interrupted_everywhere(kind, prepare)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the socket that was lost
@interrupts
def test_an_interrupted_detach_ends_the_connection_or_leaves_it(kind: type[BaseException]) -> None:
    def prepare(mux: muxcore.Mux) -> tuple[Any, Any]:
        recorder = Recorder()
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours, recorder)
        mux.poll(0)
        kept: list[socket.socket] = []

        def check(raised: bool) -> None:
            mux.poll(0)
            mux.poll(0)
            if not conn.closed:
                assert recorder.names() == ["open"]
                theirs.close()
            until(mux, lambda: recorder.count("close"))
            for sock in kept:
                sock.close()
            theirs.close()

        return lambda: kept.extend(map(type(conn).detach, (conn,))), check

    interrupted_everywhere(kind, prepare)


@interrupts
@pytest.mark.parametrize("end", ["write_eof", "close"])
def test_an_interrupt_at_the_end_of_the_stream_keeps_no_fin_back(kind: type[BaseException], end: str) -> None:
    def prepare(mux: muxcore.Mux) -> tuple[Any, Any]:
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours, Recorder())
        mux.poll(0)
        conn.send(b"last")
        getattr(conn, end)()

        def check(raised: bool) -> None:
            assert receive(mux, theirs) == b"last"
            theirs.close()

        return lambda: mux.poll(0), check

    interrupted_everywhere(kind, prepare)
