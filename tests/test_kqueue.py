"""The fallback over kqueue.

Where there is no kqueue, a stand-in made of two epoll sets replaces it: it runs our code, and it has those properties
of a kqueue that our code relies on, as the manual pages describe them. It is no proof of the real one, which only CI's
macOS jobs run: this file, and with it every test that has a `backend`.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from support import Recorder, as_of_muxcore, client, exchange, pattern, push, receive, reset, stuff, turns, until

import muxcore
from muxcore._fallback.mux import PythonCore
from muxcore._fallback.pollers import ERROR, POLLERS, READ, WRITE, KqueuePoller
from muxcore._impl import BACKENDS

Listen = Callable[..., muxcore.Listener]

# As in sys/event.h.
READ_FILTER, WRITE_FILTER = -1, -2
ADD, DELETE, CLEAR, EV_EOF = 0x1, 0x2, 0x20, 0x8000
LOWAT = 0x1
CONSTANTS = {
    "KQ_FILTER_READ": READ_FILTER,
    "KQ_FILTER_WRITE": WRITE_FILTER,
    "KQ_EV_ADD": ADD,
    "KQ_EV_DELETE": DELETE,
    "KQ_EV_CLEAR": CLEAR,
    "KQ_EV_EOF": EV_EOF,
    "KQ_NOTE_LOWAT": LOWAT,
}


class Kevent(NamedTuple):
    ident: int
    filter: int = READ_FILTER
    flags: int = ADD
    fflags: int = 0
    data: int = 0


class Kqueue:
    """One epoll set per filter. As the filters of a kqueue, its entries go when their descriptor is closed, and to
    delete one that is not there is ENOENT, or EBADF if the descriptor is closed."""

    def __init__(self) -> None:
        self.sets = {READ_FILTER: select.epoll(), WRITE_FILTER: select.epoll()}

    def control(
        self, changes: Sequence[Kevent] | None, max_events: int, timeout: float | None = None
    ) -> list[Kevent]:
        for change in changes or ():
            self.change(change)
        if max_events == 0:
            return []
        select.select(list(self.sets.values()), [], [], timeout)
        found = [
            event(kind, fd, mask) for kind, entries in self.sets.items() for fd, mask in entries.poll(0, max_events)
        ]
        return found[:max_events]

    def change(self, change: Kevent) -> None:
        entries = self.sets[change.filter]
        if change.flags & DELETE:
            entries.unregister(change.ident)
            return
        mask = select.EPOLLET if change.flags & CLEAR else 0
        if not change.fflags & LOWAT:  # the mark is out of reach
            mask |= select.EPOLLIN | select.EPOLLRDHUP if change.filter == READ_FILTER else select.EPOLLOUT
        try:
            entries.register(change.ident, mask)
        except FileExistsError:  # the flags of a filter that is there stay what they were; its mark is a new one
            if change.fflags & LOWAT:
                entries.modify(change.ident, 0)

    def close(self) -> None:
        for entries in self.sets.values():
            entries.close()


def event(kind: int, fd: int, mask: int) -> Kevent:
    end = select.EPOLLHUP | select.EPOLLERR | (select.EPOLLRDHUP if kind == READ_FILTER else 0)
    error = errno.ECONNRESET if mask & select.EPOLLERR else 0
    return Kevent(fd, kind, EV_EOF if mask & end else 0, error)


Kqueue.control = as_of_muxcore(Kqueue.control)  # type: ignore[method-assign]
Kqueue.change = as_of_muxcore(Kqueue.change)  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def kqueue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's kqueue, or the stand-in."""
    if hasattr(select, "kqueue"):
        return
    if not hasattr(select, "epoll"):
        pytest.skip("this system has no kqueue, nor what the stand-in is made of")
    for name, value in {"kqueue": Kqueue, "kevent": Kevent, **CONSTANTS}.items():
        monkeypatch.setattr(select, name, value, raising=False)
    monkeypatch.setitem(POLLERS, "kqueue", KqueuePoller)
    monkeypatch.setitem(BACKENDS, "kqueue", lambda: PythonCore)


@pytest.fixture
def backend() -> str:
    return "kqueue"


@pytest.fixture
def poller(kqueue: None) -> Iterator[KqueuePoller]:
    poller = KqueuePoller()
    yield poller
    poller.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def echo() -> Recorder:
    return Recorder(reply=lambda message: message)


def opened(mux: muxcore.Mux, listen: Listen, handler: Recorder) -> tuple[socket.socket, Any]:
    sock = client(listen(handler))
    until(mux, lambda: handler.connections)
    return sock, handler.connections[-1]


def test_everything_comes_back_and_a_half_close_gets_a_fin(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = echo()
    data = pattern(1 << 20)
    with client(listen(recorder)) as sock:
        assert exchange(mux, sock, b"hello") == b"hello"
        push(mux, sock, data)
        sock.shutdown(socket.SHUT_WR)
        assert receive(mux, sock) == data
    until(mux, lambda: recorder.count("close"))
    assert recorder.reason() is None


def test_a_slow_reader_holds_its_connection_up_without_a_spin(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, echo())
    sent = stuff(mux, sock)
    assert turns(mux, 0.1) <= 2
    assert conn.outbox_size > 0
    sock.shutdown(socket.SHUT_WR)
    assert len(receive(mux, sock)) == sent
    sock.close()


def test_a_pause_holds_input_back_until_it_is_resumed(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = echo()
    sock, conn = opened(mux, listen, recorder)
    conn.pause_reading()
    sock.sendall(b"later")
    assert turns(mux, 0.05) <= 2
    assert recorder.names() == ["open"]
    conn.resume_reading()
    assert receive(mux, sock, 5) == b"later"
    sock.close()


def test_a_paused_connection_does_not_end_with_a_fin(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.pause_reading()
    sock.sendall(b"unread")
    sock.close()
    assert turns(mux, 0.1) <= 2
    conn.resume_reading()
    until(mux, lambda: conn.closed)
    assert recorder.received() == b"unread"
    assert recorder.reason() is None


def test_a_reset_ends_a_paused_connection_at_once(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.pause_reading()
    turns(mux, 0.01)
    reset(sock)
    until(mux, lambda: conn.closed)
    assert isinstance(recorder.reason(), ConnectionResetError)


def test_a_reset_after_a_fin_ends_a_half_open_connection(mux: muxcore.Mux, listen: Listen) -> None:
    """The FIN must not be treated as the end of everything."""
    recorder = Recorder()
    listener = listen(recorder, half_open=True)
    sock = client(listener)
    sock.shutdown(socket.SHUT_WR)
    until(mux, lambda: recorder.connections and recorder.connections[0].eof)
    assert turns(mux, 0.05) <= 2
    reset(sock)
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), ConnectionError)  # Linux says EPIPE here


def test_a_descriptor_closed_by_other_code_ends_its_connection(mux: muxcore.Mux, listen: Listen) -> None:
    recorder, newcomer = Recorder(), echo()
    sock, conn = opened(mux, listen, recorder)
    os.close(conn.fileno())
    ours, theirs = socket.socketpair()  # ours reuses the number
    assert ours.fileno() == conn.fileno()
    mux.attach(ours, newcomer)
    assert exchange(mux, theirs, b"mine") == b"mine"
    assert "closed by other code" in str(recorder.reason())
    sock.close()
    theirs.close()
    until(mux, lambda: newcomer.count("close"))


def test_unwatch_removes_the_one_filter_when_the_other_has_gone(
    poller: KqueuePoller, pair: tuple[socket.socket, socket.socket]
) -> None:
    fd = pair[0].fileno()
    poller.watch(fd, READ | WRITE)
    poller._change(fd, poller.select.KQ_FILTER_READ, poller.select.KQ_EV_DELETE)
    assert poller.wait(1) == [(fd, WRITE)]
    poller.unwatch(fd)
    assert poller.wait(0) == []


def test_a_watch_that_fails_halfway_watches_nothing(
    poller: KqueuePoller, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FreeBSD refuses a WRITE filter on a pipe without a reader, for one."""
    ours, theirs = pair
    change = poller._change

    def refuse(fd: int, kind: int, flags: int, *rest: int) -> None:
        if (kind, flags) == (poller.select.KQ_FILTER_WRITE, poller.select.KQ_EV_ADD):
            raise BrokenPipeError
        change(fd, kind, flags, *rest)

    monkeypatch.setattr(poller, "_change", as_of_muxcore(refuse))
    theirs.send(b"x")
    with pytest.raises(BrokenPipeError):
        poller.watch(ours.fileno(), READ | WRITE)
    assert poller.wait(0) == []


def test_only_an_end_that_has_an_error_is_an_error() -> None:
    """A FIN has none, and nothing else in the field is an error."""
    found = [
        Kevent(5, READ_FILTER, EV_EOF, 0),
        Kevent(6, WRITE_FILTER, EV_EOF, errno.ECONNRESET),
        Kevent(7, READ_FILTER, 0, LOWAT),
    ]
    poller: Any = KqueuePoller.__new__(KqueuePoller)
    poller.select = SimpleNamespace(KQ_FILTER_READ=READ_FILTER, KQ_EV_EOF=EV_EOF)
    poller.kqueue = SimpleNamespace(control=lambda *args: found)
    poller.watched = set()
    assert poller.wait(0) == [(5, READ), (6, WRITE | ERROR), (7, READ)]


def test_a_wait_returns_all_that_is_ready(poller: KqueuePoller) -> None:
    """selectors promises no such thing, but its tests require it."""
    pairs = [socket.socketpair() for _ in range(50)]
    for ours, theirs in pairs:
        poller.watch(ours.fileno(), READ | WRITE)
        theirs.send(b"x")
    assert sorted(poller.wait(1)) == [(ours.fileno(), READ | WRITE) for ours, _ in pairs]
    for ours, theirs in pairs:
        ours.close()
        theirs.close()
