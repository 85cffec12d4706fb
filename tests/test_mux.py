"""Mux: pull style, timers, threads, fork, ending and garbage collection."""

from __future__ import annotations

import errno
import functools
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support import (
    LOCALHOST,
    InterruptAt,
    Recorder,
    alarms,
    client,
    exchange,
    memory,
    open_fds,
    pattern,
    push,
    receive,
    reset,
    stuff,
    turns,
    until,
)

import muxcore
from muxcore import CLOSED, DRAINED, EOF, OPENED, READABLE
from muxcore._impl import BACKENDS
from muxcore._timers import Timers

Listen = Callable[..., muxcore.Listener]


class Pull:
    """Collects what poll() reports, and echoes."""

    def __init__(self, mux: muxcore.Mux, echo: bool = True) -> None:
        self.mux, self.echo = mux, echo
        self.flags: list[int] = []
        self.conns: list[muxcore.Connection] = []
        self.messages: list[bytes] = []

    def step(self, timeout: float = 0.02) -> None:
        for conn, flags in self.mux.poll(timeout):
            self.flags.append(flags)
            self.conns.append(conn)
            if self.echo:
                for message in conn:
                    self.messages.append(message)
                    conn.send(message)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, f"the condition never came true; reported: {self.flags}"
            self.step()

    def seen(self, flag: int) -> int:
        return sum(bool(flags & flag) for flags in self.flags)


def script(source: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=40, check=False, **options)


# --- Promise pull-style ----------------------------------------------------------------------------


def test_pull_reports_each_step_of_a_connection_once(mux: muxcore.Mux, listen: Listen) -> None:
    pull = Pull(mux)
    with client(listen()) as sock:
        pull.until(lambda: pull.flags == [OPENED])
        sock.sendall(b"hello")
        pull.until(lambda: pull.flags == [OPENED, READABLE])
        pull.step()
        assert sock.recv(10) == b"hello"
        sock.shutdown(socket.SHUT_WR)
        pull.until(lambda: pull.flags == [OPENED, READABLE, EOF, CLOSED])
        assert sock.recv(10) == b""
    assert (pull.conns[-1].closed, pull.conns[-1].error) == (True, None)


def test_pull_echo_of_megabytes_with_half_close_loses_nothing_and_stays_bounded(
    mux: muxcore.Mux, listen: Listen
) -> None:
    """The three-line loop of the guide to the faces."""
    data = pattern(12 << 20)
    got, largest, view = bytearray(), 0, memoryview(data)
    with client(listen()) as sock:
        sock.settimeout(0)
        while True:
            try:
                if view:
                    view = view[sock.send(view) :]
                    if not view:
                        sock.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                pass
            for conn, _events in mux.poll(0):
                for message in conn:
                    conn.send(message)
                largest = max(largest, conn.outbox_size + conn.inbox_size)
            try:
                piece = sock.recv(50_000)
            except BlockingIOError:
                continue
            if not piece:
                break
            got += piece
        assert got == data
    assert largest <= 65536 + 2 * 65536


def test_pull_reports_readable_again_after_the_drain(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise pull-style: autopause ends the iteration; what is left comes after DRAINED."""
    pull = Pull(mux, echo=False)
    sock = client(listen())
    pull.until(lambda: pull.seen(OPENED))
    [conn] = pull.conns
    sock.sendall(b"kept back")
    pull.until(lambda: pull.seen(READABLE))
    while conn.send(bytes(50_000)):
        pass
    assert conn.recv() is None
    assert list(conn) == []
    queued = mux.stats().bytes_out + conn.outbox_size
    pull.flags.clear()
    receive(mux, sock, queued)
    pull.until(lambda: True)
    assert conn.recv() == b"kept back"
    sock.close()


def test_pull_inbox_is_bounded(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise bounded-inbox: no message is received, so reading stops at max_inbox."""
    pull = Pull(mux, echo=False)
    sock = client(listen(limits=muxcore.Limits(max_inbox=100_000)))
    sent = stuff(mux, sock)
    pull.until(lambda: True)
    [conn] = mux.connections
    assert 100_000 < conn.inbox_size <= 100_000 + 65536
    assert turns(mux, 0.05) <= 1, "a full inbox does not spin"
    got = 0
    while got < sent:
        got += sum(map(len, conn.recv_all()))
        mux.poll(1)
    assert got == sent
    sock.close()


def test_pull_eof_comes_after_the_messages(mux: muxcore.Mux, listen: Listen) -> None:
    pull = Pull(mux, echo=False)
    with client(listen()) as sock:
        sock.sendall(b"one last")
        sock.shutdown(socket.SHUT_WR)
        pull.until(lambda: pull.seen(READABLE))
        for _ in range(3):
            pull.step(0)
        assert not pull.seen(EOF), "there is still a message to receive"
        [conn] = mux.connections
        assert (conn.unread, conn.recv(), conn.recv("none")) == (b"one last", b"one last", "none")
        pull.until(lambda: pull.seen(EOF))
        conn.send(b"a reply to the EOF")
        pull.until(lambda: pull.seen(CLOSED))
        assert receive(mux, sock) == b"a reply to the EOF"


def test_pull_half_open_stays_open_after_eof(mux: muxcore.Mux, listen: Listen) -> None:
    pull = Pull(mux)
    with client(listen(half_open=True)) as sock:
        sock.shutdown(socket.SHUT_WR)
        pull.until(lambda: pull.seen(EOF))
        turns(mux, 0.05)
        [conn] = mux.connections
        conn.send(b"later")
        conn.close()
        assert receive(mux, sock) == b"later"


class Halves:
    """A framer of a user: two bytes are a message."""

    def __init__(self) -> None:
        self.data = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.data += data
        while len(self.data) > 1:
            message, self.data = self.data[:2], self.data[2:]
            yield message

    def encode(self, message: bytes) -> bytes:
        return message

    def rest(self) -> bytes:
        return self.data


@pytest.mark.parametrize("framer", [None, muxcore.Fixed(2), Halves], ids=["none", "fixed", "custom"])
def test_pull_receives_what_came_before_a_reset(mux: muxcore.Mux, listen: Listen, framer: Any) -> None:
    pull = Pull(mux, echo=False)
    sock = client(listen(framer=framer))
    pull.until(lambda: pull.seen(OPENED))
    sock.sendall(b"before")
    reset(sock)
    pull.until(lambda: pull.seen(CLOSED))
    conn = pull.conns[-1]
    assert isinstance(conn.error, ConnectionResetError)
    assert list(conn) == ([b"before"] if framer is None else [b"be", b"fo", b"re"])
    assert conn.closing


@pytest.mark.parametrize("after", [None, muxcore.Fixed(2), Halves], ids=["none", "fixed", "custom"])
@pytest.mark.parametrize("before", [None, muxcore.Fixed(3), Halves], ids=["of none", "of fixed", "of custom"])
def test_pull_receives_what_came_before_a_reset_by_another_framer(
    mux: muxcore.Mux, listen: Listen, before: Any, after: Any
) -> None:
    pull = Pull(mux, echo=False)
    sock = client(listen(framer=before))
    pull.until(lambda: pull.seen(OPENED))
    sock.sendall(b"before")
    reset(sock)
    pull.until(lambda: pull.seen(CLOSED))
    conn = pull.conns[-1]
    conn.framer = after
    mux.poll(0)
    assert conn.recv_all() == ([b"before"] if after is None else [b"be", b"fo", b"re"])
    mux.poll(0)


def test_pull_drained_is_reported(mux: muxcore.Mux, listen: Listen) -> None:
    pull = Pull(mux, echo=False)
    sock = client(listen())
    pull.until(lambda: pull.seen(OPENED))
    [conn] = pull.conns
    while conn.send(bytes(50_000)):
        pass
    total = mux.stats().bytes_out + conn.outbox_size
    got = 0
    while not pull.seen(DRAINED):
        got += len(sock.recv(1 << 20))
        pull.step()
    assert pull.seen(DRAINED) == 1
    assert got <= total
    sock.close()


def test_a_connection_with_a_handler_never_appears_in_poll(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder(reply=lambda message: message)
    sock = client(listen(recorder))
    sock.sendall(b"x")
    for _ in range(10):
        assert mux.poll(0.02) == []
    assert recorder.names() == ["open", "message"]
    sock.close()
    while not recorder.count("close"):
        assert mux.poll(0.02) == []


def test_poll_returns_when_its_time_is_up(mux: muxcore.Mux) -> None:
    start = time.monotonic()
    assert mux.poll(0.05) == []
    assert time.monotonic() - start >= 0.05
    assert mux.poll(0) == []


def test_connections_is_a_live_view(mux: muxcore.Mux, listen: Listen) -> None:
    view = mux.connections
    assert (len(view), list(view)) == (0, [])
    with client(listen(Recorder())):
        until(mux, lambda: len(view))
        [conn] = view
        assert conn in view
        assert 5 not in view
    until(mux, lambda: not len(view))
    assert conn not in view


# --- attach ----------------------------------------------------------------------------------------


def test_attach_serves_a_connected_socket(mux: muxcore.Mux) -> None:
    recorder = Recorder(reply=bytes.upper)
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder)
    assert ours.fileno() == -1, "the Mux owns it now"
    assert recorder.names() == [], "no method calls a callback"
    theirs.sendall(b"loud")
    assert receive(mux, theirs, 4) == b"LOUD"
    assert conn.listener is None
    theirs.close()
    until(mux, lambda: recorder.count("close"))


def test_attach_refuses_and_leaves_the_socket_alone(mux: muxcore.Mux) -> None:
    with socket.socket() as unconnected, pytest.raises(OSError, match="sock must be connected: use") as caught:
        mux.attach(unconnected, Recorder())
    assert caught.value.errno == errno.ENOTCONN
    unconnected.close()
    with pytest.raises(OSError) as caught:
        mux.attach(unconnected, Recorder())
    assert caught.value.errno == errno.EBADF
    with socket.socket(type=socket.SOCK_DGRAM) as datagram, pytest.raises(ValueError, match="stream socket"):
        mux.attach(datagram, Recorder())
    with pytest.raises(TypeError, match=r"sock must be a socket\.socket"):
        mux.attach(3, Recorder())
    ours, theirs = socket.socketpair()
    with pytest.raises(TypeError, match="handler"):
        mux.attach(ours, Recorder)
    assert ours.fileno() >= 0
    ours.close()
    theirs.close()


def test_attach_refuses_a_socket_that_encrypts(mux: muxcore.Mux) -> None:
    ssl = pytest.importorskip("ssl")
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with theirs, context.wrap_socket(ours, do_handshake_on_connect=False) as sock:
        with pytest.raises(TypeError, match="sock must be a plain socket"):
            mux.attach(sock, Recorder())
        assert sock.fileno() >= 0


class Deceiving(socket.socket):
    """A socket whose own methods are of no use to a Mux."""

    def fileno(self) -> int:
        return 0

    def detach(self) -> int:
        raise RuntimeError("kept")

    def setblocking(self, flag: bool) -> None:
        pass

    def setsockopt(self, *args: Any) -> None:
        pass

    def getsockname(self) -> Any:
        return "elsewhere"


def test_attach_accepts_a_socket_whatever_its_class_does(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    fd = ours.fileno()
    sock = Deceiving(fileno=ours.detach())
    conn = mux.attach(sock, lambda conn, message: conn.send(message))
    assert (conn.fileno(), socket.socket.fileno(sock)) == (fd, -1)
    assert not os.get_blocking(fd)
    assert exchange(mux, theirs, b"x") == b"x"
    theirs.close()


def test_listen_accepts_a_socket_whatever_its_class_does(mux: muxcore.Mux) -> None:
    sock = Deceiving()
    sock.bind(LOCALHOST)
    listener = mux.listen(sock, lambda conn, message: conn.send(message))
    assert socket.socket.fileno(sock) == -1
    assert listener.address[0] == "127.0.0.1"
    with client(listener) as theirs:
        assert exchange(mux, theirs, b"x") == b"x"


def test_an_attached_connection_that_is_aborted_at_once_still_opens_and_closes(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    mux.attach(ours, recorder).abort()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "close"]
    theirs.close()


# --- Promise re-entrancy ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["poll", "run", "drain"])
def test_the_loop_inside_a_callback_is_refused(mux: muxcore.Mux, method: str) -> None:
    raised: list[BaseException] = []

    def inside() -> None:
        try:
            getattr(mux, method)(*([0.1] if method != "run" else []))
        except RuntimeError as error:
            raised.append(error)

    mux.call_soon(inside)
    until(mux, lambda: raised)
    assert str(raised[0]) == f"{method}() was called inside a callback of the same Mux"


def test_the_mux_may_be_closed_from_a_callback(backend: str) -> None:
    recorder = Recorder()
    recorder.on_message = lambda conn, message: (  # type: ignore[method-assign]
        [other.send(b"bye") for other in recorder.connections],
        mux.close(),
    )
    mux = muxcore.Mux(backend=backend)
    listener = mux.listen(LOCALHOST, recorder)
    one, two = client(listener), client(listener)
    until(mux, lambda: len(recorder.connections) == 2)
    one.sendall(b"x")
    mux.run()
    assert mux.closed
    assert recorder.count("close") == 2
    assert receive(mux, one) == receive(mux, two) == b"bye"
    one.close()
    two.close()


def test_callbacks_during_close_may_call_anything(backend: str) -> None:
    errors: list[str] = []

    class Clinging(Recorder):
        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            super().on_close(conn, exc)
            assert not conn.send(b"x")
            conn.close()
            conn.abort()
            mux.close()
            for call in (lambda: mux.poll(0), lambda: mux.listen(LOCALHOST, self), lambda: mux.call_soon(print)):
                try:
                    call()
                except RuntimeError as error:
                    errors.append(str(error))

    clinging = Clinging()
    mux = muxcore.Mux(backend=backend)
    sock = client(mux.listen(LOCALHOST, clinging))
    until(mux, lambda: clinging.connections)
    mux.close()
    assert clinging.names() == ["open", "close"]
    assert errors == ["the Mux is closed"] * 3
    sock.close()


# --- Promise timers --------------------------------------------------------------------------------


def test_timers_are_never_early_and_in_order(mux: muxcore.Mux) -> None:
    fired: list[tuple[str, float]] = []
    start = mux.time()
    for name, delay in (("c", 0.03), ("a", 0.01), ("b1", 0.02), ("b2", 0.02)):
        mux.call_at(start + delay, lambda name=name, due=start + delay: fired.append((name, mux.time() - due)))
    until(mux, lambda: len(fired) == 4)
    assert [name for name, _ in fired] == ["a", "b1", "b2", "c"]
    assert all(late >= 0 for _, late in fired)


def test_a_timer_wakes_a_wait_without_end(mux: muxcore.Mux) -> None:
    fired: list[int] = []
    mux.call_later(0.01, fired.append, 1)
    while not fired:
        mux.poll(None)
    assert fired == [1]


def test_a_timer_in_a_year_leaves_the_wait_alone(mux: muxcore.Mux) -> None:
    """It is more milliseconds than poll accepts."""
    mux.call_later(365 * 86400, print)
    woken: list[str] = []
    threading.Timer(0.05, mux.call_soon_threadsafe, (woken.append, "by a thread")).start()
    while not woken:
        mux.poll()


def test_a_cancelled_timer_is_not_called_and_lets_go_of_its_arguments(mux: muxcore.Mux) -> None:
    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    handle = mux.call_later(0.01, print, thing)
    assert not handle.cancelled
    handle.cancel()
    handle.cancel()
    assert handle.cancelled
    del thing
    assert gone() is None
    turns(mux, 0.03)


def test_a_timer_says_when_it_is_due_and_what_it_does(mux: muxcore.Mux) -> None:
    due = mux.time() + 0.01
    handles = [mux.call_at(due, int), mux.call_at(due + 100, int), mux.call_at(due + 100, int)]
    handles[1].cancel()
    mux.poll(10)
    assert [handle.when for handle in handles] == pytest.approx([due, due + 100, due + 100], abs=1e-6)
    states = ["called", "cancelled", "calls <class 'int'>"]
    assert [repr(handle) for handle in handles] == [
        f"<muxcore.TimerHandle {state}, when={handle.when:.6f}>"
        for state, handle in zip(states, handles, strict=True)
    ]


def test_a_timer_that_is_set_in_a_round_is_not_of_it() -> None:
    """Nor if the clock has not moved since."""
    timers = Timers(int, int)
    first = timers.add(5, print, ())
    newest = timers.order
    assert timers.due(5, newest) is first
    timers.take(first)
    later = timers.add(5, print, ())
    assert timers.due(5, newest) is None
    assert timers.due(5, timers.order) is later


def test_cancelled_timers_cost_no_memory_for_long(mux: muxcore.Mux) -> None:
    for _ in range(100_000):
        mux.call_later(1000, print).cancel()
    assert sum(isinstance(thing, muxcore.TimerHandle) for thing in gc.get_objects()) < 1000


@pytest.mark.parametrize(("living", "cancelled", "most"), [(0, 100, 2), (1000, 10_000, 20)])
def test_a_cancel_seldom_sweeps(living: int, cancelled: int, most: int) -> None:
    class Counting(Timers):
        sweeps = 0

        def _sweep(self) -> None:
            self.sweeps += 1
            super()._sweep()

    timers = Counting(int, int)
    for number in range(living):
        timers.add(number, print, ())
    for number in range(cancelled):
        timers.add(number, print, ()).cancel()
    assert 0 < timers.sweeps <= most


def test_timers_that_were_called_leave_no_room_for_cancelled_ones() -> None:
    timers = Timers(int, int)
    for _ in range(1000):
        timers.add(1, print, ())
    while (handle := timers.due(1, timers.order)) is not None:
        timers.take(handle)
    for _ in range(1000):
        timers.add(2, print, ()).cancel()
    assert len(timers.heap) < 200


def test_timers_keep_their_order_when_cancelled_ones_are_swept() -> None:
    timers = Timers(int, int)
    for number, handle in enumerate([timers.add(number * 7919 % 1000, print, ()) for number in range(1000)]):
        if number % 4:
            handle.cancel()
    due: list[int] = []
    while (next_one := timers.due(1000, timers.order)) is not None:
        due.append(next_one._when_ns)
        timers.take(next_one)
    assert due == sorted(number * 7919 % 1000 for number in range(0, 1000, 4))


def test_a_cancelled_timer_does_not_shorten_a_poll(mux: muxcore.Mux) -> None:
    mux.call_later(0.02, print).cancel()
    start = mux.time()
    mux.poll(0.1)
    assert mux.time() - start >= 0.1


def test_a_timer_that_was_called_cannot_be_cancelled(mux: muxcore.Mux) -> None:
    called: list[int] = []
    handle = mux.call_later(0, called.append, 1)
    until(mux, lambda: called)
    handle.cancel()
    assert not handle.cancelled


def test_a_timer_set_by_a_timer_waits_for_the_next_turn(mux: muxcore.Mux) -> None:
    """Otherwise call_later(0) in a circle would hold the loop for ever."""
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        mux.call_later(0, again)

    mux.call_later(0, again)
    for turn in range(1, 6):
        mux.poll(0)
        assert count <= turn
    until(mux, lambda: count > 10)


def test_call_soon_runs_in_order_and_an_error_is_logged(
    mux: muxcore.Mux, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[int] = []
    mux.call_soon(ran.append, 1)
    mux.call_soon(lambda: 1 / 0)
    mux.call_soon(ran.append, 2)
    mux.poll(0)
    assert ran == [1, 2]
    assert "ZeroDivisionError" in caplog.text
    assert mux.stats().handler_errors == 1


# --- Promise threads -------------------------------------------------------------------------------


def test_call_soon_threadsafe_ends_a_wait(mux: muxcore.Mux) -> None:
    ran: list[int] = []
    mux.poll(0)
    thread = threading.Thread(target=mux.call_soon_threadsafe, args=(ran.append, 1))
    thread.start()
    while not ran:
        mux.poll(None)
    thread.join()
    assert ran == [1]


def test_wakeups_are_never_lost(mux: muxcore.Mux) -> None:
    """Two threads play ping-pong with a loop that always waits without end."""
    rounds = 3000
    seen = threading.Semaphore(0)
    count = 0

    def received() -> None:
        nonlocal count
        count += 1
        seen.release()

    def sender() -> None:
        for _ in range(rounds):
            mux.call_soon_threadsafe(received)
            assert seen.acquire(timeout=10)

    thread = threading.Thread(target=sender)
    mux.poll(0)
    thread.start()
    while count < rounds:
        mux.poll(None)
    thread.join()


def test_sends_of_other_threads_arrive_whole_and_in_order(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock = client(listen(recorder, limits=muxcore.Limits(max_outbox=1 << 30)))
    until(mux, lambda: recorder.connections)
    [conn] = recorder.connections
    count, threads = 2000, 4

    def sender(number: int) -> None:
        for i in range(count):
            conn.send(b"%d:%06d;" % (number, i))

    workers = [threading.Thread(target=sender, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    lines = receive(mux, sock, threads * count * 9).split(b";")[:-1]
    for worker in workers:
        worker.join()
    assert conn.outbox_size == 0
    for number in range(threads):
        mine = [int(line[2:]) for line in lines if line[:1] == b"%d" % number]
        assert mine == list(range(count))
    sock.close()


def test_a_foreign_send_counts_against_the_outbox_at_once_and_gets_its_drain(
    mux: muxcore.Mux, listen: Listen
) -> None:
    recorder = Recorder()
    sock = client(listen(recorder))
    until(mux, lambda: recorder.connections)
    [conn] = recorder.connections
    results: list[bool] = []

    def sender() -> None:
        results.append(conn.send(bytes(60_000)))
        results.append(conn.send(bytes(60_000)))

    thread = threading.Thread(target=sender)
    thread.start()
    thread.join()
    assert results == [True, False]
    assert conn.outbox_size == 120_000
    receive(mux, sock, 120_000)
    until(mux, lambda: recorder.count("drain") == 1)
    sock.close()


@pytest.mark.parametrize("overflow", ["close", "drop", "raise"])
def test_a_foreign_send_beyond_max_outbox_follows_the_policy(
    mux: muxcore.Mux, listen: Listen, overflow: Any
) -> None:
    recorder = Recorder()
    sock = client(listen(recorder, limits=muxcore.Limits(high=10, low=0, max_outbox=100, overflow=overflow)))
    until(mux, lambda: recorder.connections)
    [conn] = recorder.connections
    outcome: list[Any] = []

    def sender() -> None:
        conn.send(bytes(100))
        try:
            outcome.append(conn.send(b"x"))
        except muxcore.OutboxFull as error:
            outcome.append(error)

    thread = threading.Thread(target=sender)
    thread.start()
    thread.join()
    if overflow == "raise":
        assert isinstance(outcome[0], muxcore.OutboxFull)
    else:
        assert outcome == [False]
    if overflow == "close":
        until(mux, lambda: recorder.count("close"))
        assert isinstance(recorder.reason(), muxcore.OutboxFull)
    else:
        assert receive(mux, sock, 100) == bytes(100)
    sock.close()


def test_what_another_thread_sent_before_a_close_arrives(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock = client(listen(recorder))
    until(mux, lambda: recorder.connections)
    [conn] = recorder.connections
    thread = threading.Thread(target=conn.send, args=(b"accepted",))
    thread.start()
    thread.join()
    conn.close()
    assert receive(mux, sock) == b"accepted"
    sock.close()


def test_close_and_abort_work_from_another_thread(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    listener = listen(recorder)
    one, two = client(listener), client(listener)
    until(mux, lambda: len(recorder.connections) == 2)

    def end() -> None:
        recorder.connections[0].send(b"bye")
        recorder.connections[0].close()
        recorder.connections[1].abort()

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    until(mux, lambda: recorder.connections[1].closed)
    by_id = {recorder.connections[0].id: one, recorder.connections[1].id: two}
    closed = by_id[recorder.connections[0].id]
    assert receive(mux, closed) == b"bye"
    one.close()
    two.close()
    until(mux, lambda: recorder.count("close") == 2)


def test_a_small_send_of_another_thread_brings_no_drain(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder)) as sock:
        until(mux, lambda: recorder.connections)
        thread = threading.Thread(target=recorder.connections[0].send, args=(b"x",))
        thread.start()
        thread.join()
        assert receive(mux, sock, 1) == b"x"
        turns(mux, 0.02)
        assert recorder.names() == ["open"]


def test_what_another_thread_sent_to_a_connection_that_has_ended_is_a_drop(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder)):
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        thread = threading.Thread(target=conn.send, args=(b"x",))
        thread.start()
        thread.join()
        conn.abort()
        until(mux, lambda: recorder.count("close"))
        assert mux.stats().drops == 1


def test_anything_else_from_another_thread_is_refused(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    listener = listen(recorder)
    sock = client(listener)
    until(mux, lambda: recorder.connections)
    [conn] = recorder.connections
    handle = mux.call_later(100, print)
    calls: list[Callable[[], object]] = [
        lambda: mux.poll(0),
        mux.run,
        lambda: mux.drain(0),
        mux.close,
        lambda: mux.listen(LOCALHOST),
        lambda: mux.call_soon(print),
        lambda: mux.call_later(0, print),
        lambda: mux.connections,
        lambda: mux.call_at(0, print),
        listener.close,
        listener.dup,
        handle.cancel,
        conn.flush,
        conn.recv,
        conn.recv_all,
        lambda: next(conn),
        conn.pause_reading,
        conn.resume_reading,
        conn.write_eof,
        conn.detach,
        lambda: conn.set_limits(high=1, low=0),
        lambda: conn.set_timeouts(idle=1),
        lambda: conn.unread,
        lambda: conn.inbox_size,
        lambda: conn.is_reading(),
        lambda: setattr(conn, "framer", None),
        lambda: conn.local,
        lambda: conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
        lambda: conn.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    messages: list[str] = []

    def other() -> None:
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                messages.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(messages) == len(calls)
    assert set(messages) == {
        "this Mux belongs to the thread that first ran it: from another, use call_soon_threadsafe"
    }
    sock.close()

def test_a_wakeup_is_heard_once(mux: muxcore.Mux) -> None:
    called: list[int] = []
    thread = threading.Timer(0.05, mux.call_soon_threadsafe, (called.append, 1))
    thread.start()
    while not called:
        mux.poll()
    thread.join()
    mux.poll(0)
    assert turns(mux, 0.05) == 0


def test_stop_from_another_thread_ends_run(backend: str) -> None:
    with muxcore.Mux(backend=backend) as mux:
        mux.call_soon(lambda: threading.Thread(target=mux.stop).start())
        mux.run()
        mux.stop()  # a stop that came too early ends the next run
        mux.run()


@pytest.mark.timeout(20)
def test_other_threads_live_under_load(mux: muxcore.Mux) -> None:
    """Promise bounded-turns: the interpreter is let go of every few ms, also when there is always something to do, and
    all of it is done in C. Bytecode lets go of the interpreter anyway; so this load has none, and nor has
    run()."""
    pairs = [socket.socketpair() for _ in range(2)]  # with one, the loop waits at once, and lets go for that
    for ours, theirs in pairs:
        theirs.send(b"x")
        mux.add_reader(ours, int)  # which never reads it

    def other() -> None:
        rounds = 0
        while rounds < 20 or mux.stats().events < 100:  # so neither of the two has starved
            time.sleep(0)
            rounds += 1
        mux.stop()

    thread = threading.Thread(target=other)
    mux.call_soon(thread.start)
    mux.run()
    thread.join()
    for ours, theirs in pairs:
        mux.remove_reader(ours)
        ours.close()
        theirs.close()


def test_run_refuses_connections_without_a_handler(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen()
    with pytest.raises(RuntimeError, match=r"need poll\(\)"):
        mux.run()
    listener.close()
    mux.stop()
    mux.run()


# --- signals ---------------------------------------------------------------------------------------


@pytest.mark.unix_only("it sends itself a signal")
def test_a_signal_ends_run_and_the_old_wakeup_fd_comes_back(backend: str) -> None:
    before = signal.set_wakeup_fd(-1)
    old = signal.signal(signal.SIGUSR1, lambda *_: mux.stop())
    try:
        with muxcore.Mux(backend=backend) as mux:
            mux.call_later(0.01, os.kill, os.getpid(), signal.SIGUSR1)
            mux.run()
        assert signal.set_wakeup_fd(before) == -1
    finally:
        signal.signal(signal.SIGUSR1, old)


@pytest.mark.unix_only("SIGALRM")
def test_a_signal_does_not_shorten_a_poll(mux: muxcore.Mux) -> None:
    with alarms() as caught:
        start = time.monotonic()
        mux.poll(0.15)
        assert time.monotonic() - start >= 0.15
        assert len(caught) >= 3


# --- Promise fork ----------------------------------------------------------------------------------

FORKED = """
    import os, socket, sys, gc, muxcore
    mux = muxcore.Mux(backend=sys.argv[1])
    opened = []
    class Echo(muxcore.Handler):
        def on_open(self, conn): opened.append(conn)
        def on_message(self, conn, message): conn.send(message)
    listener = mux.listen(("127.0.0.1", 0), Echo())
    sock = socket.create_connection(listener.address)
    while not opened: mux.poll(1)
    [conn] = opened
    pid = os.fork()
    if pid == 0:
        refused = 0
        for call in (lambda: mux.poll(0), mux.run, mux.stop, lambda: conn.send(b"x"), conn.close, conn.abort,
                     listener.close, lambda: mux.listen(("127.0.0.1", 0)), lambda: mux.call_soon_threadsafe(print),
                     lambda: conn.write(b"x"), lambda: conn.send_many([]), lambda: conn.writelines([])):
            try: call()
            except RuntimeError as error: refused += "fork" in str(error)
        HOW
        os._exit(100 + refused) if "EXIT" == "hard" else sys.exit(100 + refused)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 112, status
    sock.sendall(b"still served")
    got = b""
    while len(got) < 12:
        mux.poll(1)
        try: got += sock.recv(100, socket.MSG_DONTWAIT)
        except BlockingIOError: pass
    assert got == b"still served", got
    sock.close()
    mux.close()
    print("ok")
"""
@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("how", ["mux.close()", "del mux, conn, listener, opened[:]; gc.collect()", "pass"])
@pytest.mark.parametrize("leave", ["hard", "soft"])
@pytest.mark.parametrize("core", ["auto", "poll"])
def test_a_forked_child_can_do_the_parent_no_harm(core: str, how: str, leave: str) -> None:
    done = script(FORKED.replace("HOW", how).replace("EXIT", leave), core)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


FORKED_IN_A_CALLBACK = """
    import os, socket, muxcore, logging
    logging.disable(50)
    parent = os.getpid()
    mux = muxcore.Mux()
    class Forking(muxcore.Handler):
        def on_message(self, conn, message):
            if message == b"fork":
                child = os.fork()
                if child == 0:
                    IN_CHILD
                else:
                    os.waitpid(child, 0)
            conn.send(message)
    listener = mux.listen(("127.0.0.1", 0), Forking())
    sock = socket.create_connection(listener.address)
    other = socket.create_connection(listener.address)
    def talk():
        sock.sendall(b"fork")
        other.sendall(b"hello")
    mux.call_soon(talk)
    mux.call_later(0.1, mux.stop)
    try:
        mux.run()
    finally:
        if os.getpid() != parent:
            os._exit(0)
    sock.settimeout(5)
    other.settimeout(5)
    print(sock.recv(100), other.recv(100))
    sock.close(); other.close()
    mux.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("in_child", ["pass", "raise ValueError", "mux.close()", "raise SystemExit"])
def test_a_child_forked_in_a_callback_does_not_serve_the_parents_connections(in_child: str) -> None:
    done = script(FORKED_IN_A_CALLBACK.replace("IN_CHILD", in_child))
    assert (done.stdout, done.returncode) == ("b'fork' b'hello'\n", 0), done.stderr


FORKED_ANYWHERE = """
    import os, socket, sys, muxcore
    where, backend = sys.argv[1:]
    parent, forked, called = os.getpid(), [], []
    mux = muxcore.Mux(backend=backend)

    def fork(place):
        if place == where and forked == [0]:
            child = os.fork()
            forked.append(child)
            if child:
                forked[0] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def fork_for(place, conn, message):
        if message == b"fork.":
            fork(place)
        if os.getpid() == parent:
            conn.send(message)

    class Framer:
        def __init__(self):
            fork("framer")
            fork("factory")
            if where == "factory" and os.getpid() != parent: raise ValueError
        def feed(self, data): return [data]
        def encode(self, message): return message
        def rest(self): return b""

    class One(muxcore.Handler):
        def on_open(self, conn):
            called.append(os.getpid())
            fork("on_open")
        def on_message(self, conn, message): fork_for("on_message", conn, message)

    class Many(muxcore.Handler):
        def on_messages(self, conn, messages):
            for message in messages: fork_for("on_messages", conn, message)

    class Raised(Exception): pass

    def fork_and_raise():
        fork("raises")
        if os.getpid() != parent: raise Raised

    def reads():
        mux.remove_reader(near)
        fork("reader")

    def writes():
        called.append(os.getpid())
        mux.remove_writer(near)

    makers = {"framer": Framer, "factory": Framer, "on_message": muxcore.Fixed(5), "on_messages": muxcore.Fixed(5)}
    framers = [makers.get(where)] if where.startswith("f") else [None, makers.get(where)]
    for framer in framers:
        del forked[:]
        listener = mux.listen(("127.0.0.1", 0), Many() if where == "on_messages" else One(), framer=framer)
        first, second = (socket.create_connection(listener.address) for _ in range(2))
        while listener.connections < 2: mux.poll(1)
        mux.poll(0)
        forked.append(0)
        third = socket.create_connection(listener.address)
        first.sendall(b"fork.")
        second.sendall(b"hello")
        mux.call_soon(fork, "call_soon")
        mux.call_soon(fork_and_raise)
        mux.call_soon(lambda: called.append(os.getpid()))
        mux.call_at(0, fork, "timer")
        mux.call_at(0, lambda: called.append(os.getpid()))
        near, far = socket.socketpair()
        mux.add_reader(near, reads)
        mux.add_writer(near, writes)
        far.sendall(b"x")
        mux.call_later(0.2, mux.stop)
        try:
            mux.run()
        except (RuntimeError, Raised) as error:
            assert os.getpid() != parent
            if isinstance(error, Raised) != (where == "raises"): called.append(os.getpid())
        if os.getpid() != parent:
            mux.close()
            os._exit(0 if mux.closed and os.getpid() not in called else 1)
        for sock in (first, second, third): sock.settimeout(5)
        print(forked[0], len(forked), first.recv(100), second.recv(100))
        for sock in (first, second, third, near, far): sock.close()
        listener.close()
    mux.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize(
    "where",
    ["on_open", "on_message", "on_messages", "framer", "factory", "call_soon", "raises", "timer", "reader"],
)
@pytest.mark.parametrize("core", ["auto", "poll"])
def test_a_child_that_returns_from_a_callback_reads_nothing_of_the_parents(core: str, where: str) -> None:
    done = script(FORKED_ANYWHERE, where, core)
    line = "0 2 b'fork.' b'hello'\n"
    assert (done.stdout, done.returncode) == (line * (1 if where.startswith("f") else 2), 0), done.stderr


FORKED_AMID_INPUT = """
    import os, socket, sys, muxcore
    where, style, backend = sys.argv[1:]
    parent, forked, seen, called = os.getpid(), [], [], []
    mux = muxcore.Mux(backend=backend)

    def fork():
        if not forked:
            forked.append(os.fork())
            if forked[0]: os.waitpid(forked[0], 0)

    class Forks:
        def __del__(self): fork()

    class Framer:
        def feed(self, data):
            for word in data.split():
                if word == b"fork" and where != "paused":
                    fork()
                    if where == "raise" and os.getpid() != parent: raise ValueError
                yield word
        def encode(self, message): return message
        def rest(self): return b""

    def handle(conn, message):
        seen.append(os.getpid())
        if where == "finaliser" and message == [b"more"]: message.append(Forks())
        if where == "paused":
            conn.pause_reading()
            fork()
            if os.getpid() != parent: return
            conn.resume_reading()
        conn.send("OK" if where in ("split", "finaliser") else b"+OK")

    class Many:
        def on_messages(self, conn, messages):
            for message in messages: handle(conn, message)

    def trace(frame, event, arg):
        if frame.f_code.co_name == "split_inline": fork()

    if where == "split": sys.settrace(trace)
    ours, theirs = socket.socketpair()
    framer = muxcore.Resp() if where in ("split", "finaliser") else Framer
    conn = mux.attach(ours, {"message": handle, "messages": Many(), "recv": None, "poll": None}[style], framer=framer)
    others = socket.socketpair()
    mux.attach(others[0], lambda conn, message: called.append(os.getpid()))
    mux.poll(0)
    theirs.sendall(b"one\\nfork\\nmore\\n")
    others[1].sendall(b"x")
    refused = False
    try:
        while len(seen) < 3 or not called:
            mux.poll(0.02)
            if style == "recv":
                for message in conn.recv_all(): handle(conn, message)
            elif style == "poll" and (message := conn.recv()) is not None:  # the next is found in the next turn
                handle(conn, message)
    except RuntimeError as error:
        refused = "fork" in str(error)
    if os.getpid() != parent:
        os.write(1, b"child: %d %d\\n" % (refused, os.getpid() in seen + called))
        os._exit(0)
    mux.poll(0)
    others[1].close()
    theirs.settimeout(5)
    print("parent:", len(seen), theirs.recv(100), conn.closing, flush=True)
    theirs.close()
    mux.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize(
    ("style", "where"),
    [
        *product(("message", "messages", "recv", "poll"), ("feed", "raise", "split")),
        ("message", "finaliser"), ("message", "paused"),
    ],
)
@pytest.mark.parametrize("core", ["auto", "poll"])
def test_a_child_forked_amid_input_does_nothing_further(core: str, style: str, where: str) -> None:
    done = script(FORKED_AMID_INPUT, where, style, core)
    reply = 3 * (b"+OK\r\n" if where in ("split", "finaliser") else b"+OK")
    wanted = {"child: 1 0", f"parent: 3 {reply!r} False"}
    assert (set(done.stdout.splitlines()), done.returncode) == (wanted, 0), done.stderr


FORKED_AMID_A_GROUP = """
    import gc, os, socket, sys, weakref, muxcore
    mux = muxcore.Mux(backend=sys.argv[1])
    handled, children = [], []
    class Forking(muxcore.Handler):
        def on_message(self, conn, message):
            conn.send(message)
            handled.append(weakref.ref(conn))
            if len(handled) == 2:
                children.append(os.fork())
    listener = mux.listen(("127.0.0.1", 0), Forking())
    clients = [socket.create_connection(listener.address) for _ in range(3)]
    while mux.stats().connections < 3: mux.poll(1)
    for sock in clients: sock.sendall(b"x")
    try:
        mux.poll(1)
    except RuntimeError:
        assert children == [0]
    if children == [0]:
        for sock in clients: sock.close()
        del mux, listener
        gc.collect()
        os._exit(any(conn() is not None for conn in handled))
    assert os.waitpid(children[0], 0)[1] == 0, "the child keeps a connection"
    assert len(handled) == 3
    mux.close()
    print(*(sock.makefile("rb").read() for sock in clients))
    for sock in clients: sock.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("core", ["auto", "poll"])
def test_replies_of_a_group_in_which_a_handler_forks_are_sent_by_the_parent_alone(core: str) -> None:
    done = script(FORKED_AMID_A_GROUP, core)
    assert (done.stdout, done.returncode) == ("b'x' b'x' b'x'\n", 0), done.stderr


FORKED_BEHIND_A_SEND = """
    import os, socket, sys, muxcore
    where, backend = sys.argv[1:]
    mux = muxcore.Mux(backend=backend)
    children = []
    def fork(conn):
        conn.write(b"x")
        children.append(os.fork())
    class Forking(muxcore.Handler):
        def on_message(self, conn, message): pass
    setattr(Forking, where, lambda self, conn, *_: fork(conn))
    ours, theirs = socket.socketpair()
    mux.attach(ours, Forking(), framer=muxcore.Lines(3))
    theirs.sendall(b"long\\n" if where == "on_error" else b"ab\\n")
    theirs.shutdown(socket.SHUT_WR)
    try:
        while not children: mux.poll(1)
    except RuntimeError:
        os._exit(7 if children == [0] else 8)
    if children == [0]: os._exit(9)
    status = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    mux.poll(0)
    mux.close()
    print(status, theirs.makefile("rb").read())
    theirs.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("where", ["on_open", "on_message", "on_eof", "on_error"])
@pytest.mark.parametrize("core", ["auto", "poll"])
def test_what_a_callback_has_sent_before_it_forks_is_sent_by_the_parent_alone(core: str, where: str) -> None:
    done = script(FORKED_BEHIND_A_SEND, where, core)
    assert (done.stdout, done.returncode) == ("7 b'x'\n", 0), done.stderr


RAISED_IN_A_CHILD = """
    import os, socket, sys, muxcore
    mux = muxcore.Mux(backend=sys.argv[1])
    children = []
    def handler(conn, message):
        children.append(os.fork())
        if children == [0]: raise LookupError
        conn.send(message)
    ours, theirs = socket.socketpair()
    mux.attach(ours, handler)
    theirs.sendall(b"x")
    try:
        while not children: mux.poll(1)
    except LookupError:
        os._exit(7 if children == [0] else 8)
    mux.poll(0)
    print(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]), theirs.recv(10))
    mux.close()
    theirs.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("core", ["auto", "poll"])
def test_what_a_child_forked_in_a_callback_raises_leaves_poll(core: str) -> None:
    """It is no failure of a handler, to be logged: the child has no part in the Mux."""
    done = script(RAISED_IN_A_CHILD, core)
    assert (done.stdout, done.stderr, done.returncode) == ("7 b'x'\n", "", 0)


FORKED_IN_A_GENERATOR = """
    import os, socket, sys, muxcore
    mux = muxcore.Mux(backend=sys.argv[1])
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, lambda conn, message: None)
    mux.poll(0)
    children = []
    def messages():
        yield b"one"
        children.append(os.fork())
        yield b"two"
    try:
        conn.send_many(messages())
    except RuntimeError as error:
        os._exit(7 if children == [0] and "fork" in str(error) else 8)
    if children == [0]: os._exit(9)
    mux.poll(0)
    print(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]), theirs.recv(10))
    mux.close()
    theirs.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("core", ["auto", "poll"])
def test_a_child_forked_amid_send_many_sends_nothing(core: str) -> None:
    done = script(FORKED_IN_A_GENERATOR, core)
    assert (done.stdout, done.returncode) == ("7 b'onetwo'\n", 0), done.stderr


FORKED_AMID_THE_END = """
    import os, socket, sys, muxcore
    mux = muxcore.Mux(backend=sys.argv[1])
    closed, children = [], []
    class Closing(muxcore.Handler):
        def on_message(self, conn, message):
            conn.send(b"bye")
            mux.close()
            children.append(os.fork())
        def on_close(self, conn, exc): closed.append(os.getpid())
    ours, theirs = socket.socketpair()
    mux.attach(ours, Closing())
    theirs.sendall(b"x")
    try:
        mux.run()
    except RuntimeError:
        assert children == [0]
    if children == [0]:
        os._exit(len(closed))
    assert os.waitpid(children[0], 0)[1] == 0, "the child has ended the parent's connection"
    print(theirs.recv(100), theirs.recv(100), len(closed))
    theirs.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("core", ["auto", "poll"])
def test_a_mux_that_a_handler_closes_before_it_forks_is_closed_by_the_parent_alone(core: str) -> None:
    done = script(FORKED_AMID_THE_END, core)
    assert (done.stdout, done.returncode) == ("b'bye' b'' 1\n", 0), done.stderr


FORKED_IN_A_LOG = """
    import logging, os, socket, sys, muxcore
    mux = muxcore.Mux(backend=sys.argv[1])
    closed, children = [], []
    class Forks(logging.Handler):
        def emit(self, record):
            if not children: children.append(os.fork())
    logging.getLogger("muxcore").addHandler(Forks())
    class Raises(muxcore.Handler):
        def on_close(self, conn, exc):
            closed.append(conn)
            raise ValueError
    pairs = [socket.socketpair() for _ in range(3)]
    conns = [mux.attach(ours, Raises()) for ours, _ in pairs]
    mux.poll(0)
    for conn in conns: conn.abort()
    try:
        mux.poll(0)
    except RuntimeError:
        assert children == [0]
    if children == [0]:
        os._exit(len(closed) - 1)
    assert os.waitpid(children[0], 0)[1] == 0, "the child has called another handler"
    print(len(closed))
    for _, theirs in pairs: theirs.close()
    mux.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("core", ["auto", "poll"])
def test_a_child_that_a_log_handler_forks_calls_no_handler(core: str) -> None:
    done = script(FORKED_IN_A_LOG, core)
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr


# --- Promise ending --------------------------------------------------------------------------------


def test_drain_sends_everything_and_refuses_newcomers(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    listener = listen(recorder)
    sock = client(listener)
    until(mux, lambda: recorder.connections)
    recorder.connections[0].send(pattern(3 << 20))
    got = bytearray()

    def read() -> None:
        while data := sock.recv(1 << 16):
            got.extend(data)
        sock.close()

    reader = threading.Thread(target=read)
    reader.start()
    assert mux.drain(10) is True
    reader.join()
    assert got == pattern(3 << 20)
    assert listener.closed
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.address)


def test_drain_gives_up_after_its_timeout(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock = client(listen(recorder))
    until(mux, lambda: recorder.connections)
    recorder.connections[0].send(bytes(12 << 20))
    start = time.monotonic()
    assert mux.drain(0.05) is False
    assert time.monotonic() - start >= 0.05
    sock.close()


def test_close_flushes_once_and_aborts_the_others(backend: str) -> None:
    recorder = Recorder()
    mux = muxcore.Mux(backend=backend)
    listener = mux.listen(LOCALHOST, recorder)
    quick, slow = client(listener), client(listener)
    until(mux, lambda: len(recorder.connections) == 2)
    by_peer = {conn.peer: conn for conn in recorder.connections}
    by_peer[quick.getsockname()].send(b"goodbye")
    by_peer[slow.getsockname()].send(bytes(14 << 20))
    mux.close()
    mux.close()
    assert quick.recv(100) == b"goodbye"
    reasons = {number: reason for name, number, reason in recorder.events if name == "close"}
    assert reasons[by_peer[quick.getsockname()].id] is None
    assert isinstance(reasons[by_peer[slow.getsockname()].id], muxcore.ConnectionClosed)
    quick.close()
    slow.close()


def test_an_interrupt_during_close_does_not_keep_the_others_from_being_notified(backend: str) -> None:
    class Interrupted(Recorder):
        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            super().on_close(conn, exc)
            raise KeyboardInterrupt

    handler = Interrupted()
    mux = muxcore.Mux(backend=backend)
    listener = mux.listen(LOCALHOST, handler)
    socks = [client(listener) for _ in range(3)]
    until(mux, lambda: len(handler.connections) == 3)
    with pytest.raises(KeyboardInterrupt):
        mux.close()
    assert handler.count("close") == 3
    for sock in socks:
        sock.close()


def test_a_closed_mux_refuses_everything(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)
    mux.close()
    assert mux.closed
    calls: list[Callable[[], object]] = [
        lambda: mux.poll(0),
        mux.run,
        mux.__enter__,
        lambda: mux.listen(LOCALHOST),
        lambda: mux.call_soon(print),
        lambda: mux.call_soon_threadsafe(print),
        lambda: mux.call_at(0, print),
        lambda: mux.call_later(0, print),
        lambda: mux.add_signal_handler(signal.SIGINT, print),
        lambda: mux.remove_signal_handler(signal.SIGINT),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="the Mux is closed"):
            call()
    mux.stop()
    assert mux.stats().connections == 0


def test_a_closed_mux_does_not_look_at_an_address(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)
    mux.close()
    with socket.create_server(LOCALHOST) as used, pytest.raises(RuntimeError, match="the Mux is closed"):
        mux.listen(used.getsockname())


def test_a_mux_that_was_never_initialised_is_closed(backend: str) -> None:
    class Never(muxcore.Mux):
        def __init__(self, backend: str) -> None:
            pass

    mux = Never(backend=backend)
    mux.close()
    assert (mux.closed, mux.backend, mux.stats().waits) == (True, backend, 0)
    assert repr(mux) == f"<muxcore.Mux {backend} closed, 0 connections>"
    for call in (lambda: mux.poll(0), lambda: mux.listen(LOCALHOST, print), lambda: mux.call_soon(print)):
        with pytest.raises(RuntimeError, match="the Mux is closed"):
            call()


def abandon_a_mux(backend: str) -> tuple[socket.socket, weakref.ref[Any], weakref.ref[Any]]:
    """Leave a Mux behind that only cycles hold: through its connection, a timer, and its handler."""
    mux = muxcore.Mux(backend=backend)
    recorder = Recorder()
    sock = client(mux.listen(LOCALHOST, recorder))
    until(mux, lambda: recorder.connections)
    recorder.mux = mux  # type: ignore[attr-defined]
    mux.call_later(100, recorder.on_drain, mux)
    return sock, weakref.ref(mux), weakref.ref(recorder.connections[0])


def test_an_unclosed_mux_is_collected_with_a_warning_and_its_descriptors(backend: str) -> None:
    sock, mux, conn = abandon_a_mux(backend)
    with pytest.warns(ResourceWarning, match=r"unclosed <muxcore.Mux"):
        gc.collect()
    gc.collect()  # the warning, which pytest has let go of, had the Mux as its source
    assert (mux(), conn()) == (None, None)
    assert sock.recv(1) == b""
    sock.close()


def test_a_forgotten_mux_is_all_that_warns(backend: str) -> None:
    """No socket of it does, though the collector comes to the sockets before the Mux, as it does here."""
    gc.collect()
    mux, recorder = muxcore.Mux.__new__(muxcore.Mux, backend=backend), Recorder()
    gc.freeze()
    try:
        mux.__init__(backend=backend)  # type: ignore[misc]
        theirs, ours = socket.socketpair()
        mux.attach(ours, recorder)
        mux.datagram(LOCALHOST, print)
        listener = mux.listen(LOCALHOST, recorder)
        sock = client(listener)
        for _ in range(3):
            mux.poll(0.1)
        assert recorder.count("open") == 2
        mux.connect(listener.address, recorder)
        gc.collect()
    finally:
        gc.unfreeze()
    del mux, recorder, listener, ours
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    assert [str(warning.message).split(",")[0] for warning in caught] == [f"unclosed <muxcore.Mux {backend} open"]
    sock.close()
    theirs.close()


def test_no_socket_of_a_mux_waits_for_the_default_timeout(backend: str) -> None:
    socket.setdefaulttimeout(20)
    try:
        with muxcore.Mux(backend=backend) as mux:
            recorder, received = Recorder(), []
            listener = mux.listen(LOCALHOST, recorder)
            datagram = mux.datagram(LOCALHOST, lambda datagram, messages: received.extend(messages))
            datagram.send(b"x", datagram.address)
            conn = mux.connect(listener.address, recorder)
            conn.send(b"x")
            theirs, ours = socket.socketpair()
            mux.attach(ours, recorder)
            mux.call_soon_threadsafe(theirs.send, b"x")
            start = time.monotonic()
            until(mux, lambda: recorder.count("message") == 2 and received)
            assert time.monotonic() - start < 10
            with conn.detach(), theirs:
                pass
    finally:
        socket.setdefaulttimeout(None)


def test_the_interpreter_exits_cleanly_with_live_connections() -> None:
    done = script("""
        import socket, warnings, muxcore
        warnings.simplefilter("default")
        mux = muxcore.Mux()
        pairs = [socket.socketpair() for _ in range(10)]
        conns = [mux.attach(ours, lambda conn, message: conn.send(message)) for ours, _ in pairs]
        for _, theirs in pairs: theirs.send(b"x")
        conns[0].send(bytes(1 << 20))
        mux.call_later(1, print)
        mux.poll(0)
        print("end")
    """)
    assert (done.stdout, done.returncode) == ("end\n", 0)
    assert all("ResourceWarning: unclosed" in line for line in done.stderr.splitlines() if "muxcore" in line)


def test_close_calls_every_on_close_even_if_a_step_raises(backend: str) -> None:
    """What another thread had queued, or a socket file, must not leave connections open behind a closed Mux."""
    recorder = Recorder()
    mux = muxcore.Mux(backend=backend)
    sock = client(mux.listen(LOCALHOST, recorder))
    until(mux, lambda: recorder.connections)
    mux.call_soon_threadsafe(sys.exit, 3)
    mux.close()
    assert recorder.names() == ["open", "close"]
    recorder.connections[0].abort()
    sock.close()


def test_a_socket_file_that_cannot_be_removed_is_only_logged(
    mux: muxcore.Mux, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = socket_path.parent / "folder"
    folder.mkdir()
    listener = mux.listen(folder / "socket", Recorder())
    folder.rename(socket_path.parent / "moved")
    folder.touch()
    listener.close()
    assert listener.closed
    assert "cannot be removed" in caplog.text


def test_poll_waits_after_a_stop(mux: muxcore.Mux) -> None:
    """stop() is for run(); a poll loop does not spin because of it."""
    mux.stop()
    mux.poll(0)
    start = time.monotonic()
    mux.poll(0.05)
    assert time.monotonic() - start >= 0.05


def test_a_mux_says_what_it_does(backend: str) -> None:
    seen: list[str] = []
    with muxcore.Mux(backend=backend) as mux:
        mux.call_soon(lambda: seen.append(repr(mux)))
        mux.call_soon(mux.stop)
        mux.run()
        seen.append(repr(mux))
    seen.append(repr(mux))
    assert [text.split()[2].rstrip(",") for text in seen] == ["running", "open", "closed"]


def test_only_inside_run_a_handler_is_needed(mux: muxcore.Mux) -> None:
    refused: list[ValueError] = []

    def listens() -> None:
        try:
            mux.listen(LOCALHOST)
        except ValueError as error:
            refused.append(error)
        mux.stop()

    mux.call_soon(listens)
    mux.run()
    assert "inside run()" in str(refused[0])
    mux.listen(LOCALHOST)


def test_what_is_sent_after_run_goes_out_at_once(mux: muxcore.Mux, listen: Listen) -> None:
    """There may be no more turn."""
    recorder = Recorder()
    with client(listen(recorder)) as sock:
        until(mux, lambda: recorder.connections)
        mux.call_soon(mux.stop)
        mux.run()
        recorder.connections[0].send(b"bye")
        assert sock.recv(10) == b"bye"


def test_poll_waits_after_run(mux: muxcore.Mux) -> None:
    mux.call_soon(mux.stop)
    mux.run()
    start = time.monotonic()
    mux.poll(0.05)
    assert time.monotonic() - start >= 0.05


def test_a_timer_ends_a_wait_that_would_be_longer(mux: muxcore.Mux) -> None:
    start = time.monotonic()
    called: list[int] = []
    mux.call_later(0.01, called.append, 1)
    mux.poll(10)
    assert called
    assert time.monotonic() - start < 5


def test_what_a_call_sends_goes_out_in_its_turn(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder)) as sock:
        until(mux, lambda: recorder.connections)
        mux.call_soon(recorder.connections[0].send, b"at once")
        mux.poll(0)
        sock.settimeout(0)
        assert sock.recv(100) == b"at once"


def test_a_send_does_not_shorten_the_next_wait(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder)):
        until(mux, lambda: recorder.connections)
        turns(mux, 0.02)
        recorder.connections[0].send(b"x")
        start = time.monotonic()
        mux.poll(0.05)
        assert time.monotonic() - start >= 0.05


def test_a_report_that_is_there_already_is_not_waited_for(mux: muxcore.Mux, listen: Listen) -> None:
    pull = Pull(mux, echo=False)
    with client(listen(framer=muxcore.Fixed(1))) as sock:
        pull.until(lambda: pull.conns)
        conn = pull.conns[0]
        conn.pause_reading()
        turns(mux, 0.02)
        conn.resume_reading()
        sock.sendall(b"ab")
        pull.until(lambda: pull.seen(READABLE))
        conn.pause_reading()
        mux.poll(0)
        conn.resume_reading()
        start = time.monotonic()
        assert mux.poll(5) == [(conn, READABLE)]
        assert time.monotonic() - start < 4


def test_an_eof_behind_a_message_reports_the_message_once_more(mux: muxcore.Mux, listen: Listen) -> None:
    """Both cores: with the end, what is there may be another message than it was."""
    pull = Pull(mux, echo=False)
    with client(listen(framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"a")
        pull.until(lambda: pull.seen(READABLE))
        sock.shutdown(socket.SHUT_WR)
        pull.flags.clear()
        pull.until(lambda: pull.conns[0].eof)
        for _ in range(3):
            pull.step()
        assert pull.flags == [READABLE]
        assert pull.conns[0].recv() == b"a"
        pull.until(lambda: pull.seen(EOF))


def test_a_pull_connection_with_a_framer_of_the_users_own_is_closed_after_its_eof(
    mux: muxcore.Mux, listen: Listen
) -> None:
    pull = Pull(mux)
    with client(listen(framer=Halves)) as sock:
        sock.sendall(b"abcd")
        sock.shutdown(socket.SHUT_WR)
        pull.until(lambda: pull.seen(CLOSED))
        assert receive(mux, sock) == b"abcd"
    assert (pull.messages, pull.seen(EOF)) == ([b"ab", b"cd"], 1)


def test_a_closed_mux_keeps_no_connection(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)
    ours, theirs = socket.socketpair()
    conn = weakref.ref(mux.attach(ours))
    mux.close()
    gc.collect()
    assert conn() is None
    theirs.close()


def test_a_closed_mux_may_be_closed_by_any_thread(backend: str) -> None:
    errors: list[BaseException] = []

    def closes() -> None:
        try:
            mux.close()
        except BaseException as error:
            errors.append(error)

    with muxcore.Mux(backend=backend) as mux:
        mux.poll(0)
    thread = threading.Thread(target=closes)
    thread.start()
    thread.join()
    assert not errors


def test_an_interrupt_of_what_close_does_last_is_raised_and_skips_nothing(backend: str) -> None:
    calls: list[str] = []

    def interrupted(name: str) -> None:
        calls.append(name)
        if calls.count(name) == 1:
            raise KeyboardInterrupt

    mux: Any = muxcore.Mux(backend=backend)
    mux._at_close += [functools.partial(interrupted, "second"), functools.partial(interrupted, "first")]
    with pytest.raises(KeyboardInterrupt):
        mux.close()
    assert mux.closed
    assert sorted(calls) == ["first", "first", "second", "second"]


def test_a_mux_that_an_argument_closes_makes_no_listener(backend: str) -> None:
    class Closes:
        def __bool__(self) -> bool:
            mux.close()
            return True

    mux = muxcore.Mux(backend=backend)
    options: dict[str, Any] = {"exclusive": Closes()}
    with pytest.raises(RuntimeError, match="closed"):
        mux.listen(LOCALHOST, Recorder(), **options)


def test_a_mux_that_a_framer_closes_does_not_connect(backend: str) -> None:
    def closes() -> Halves:
        mux.close()
        return Halves()

    mux = muxcore.Mux(backend=backend)
    with socket.create_server(LOCALHOST) as server, pytest.raises(RuntimeError, match="closed"):
        mux.connect(server.getsockname(), Recorder(), framer=closes)
    assert mux.stats().connections == 0


def test_a_mux_that_a_framer_closes_leaves_a_socket_to_its_owner(backend: str) -> None:
    def closes() -> Halves:
        mux.close()
        return Halves()

    mux = muxcore.Mux(backend=backend)
    ours, theirs = socket.socketpair()
    with pytest.raises(RuntimeError, match="closed"):
        mux.attach(ours, Recorder(), framer=closes)
    ours.sendall(b"mine")
    assert theirs.recv(10) == b"mine"
    ours.close()
    theirs.close()


def test_a_socket_that_its_framer_closes_is_not_attached(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()

    def closes() -> Halves:
        ours.close()
        return Halves()

    with pytest.raises((OSError, ValueError)):
        mux.attach(ours, Recorder(), framer=closes)
    assert mux.stats().connections == 0
    assert turns(mux, 0.02) == 0
    theirs.close()


def test_remove_reader_is_refused_where_the_mux_is_not_to_be_used(backend: str) -> None:
    ours, theirs = socket.socketpair()
    refused: list[RuntimeError] = []

    def removes() -> None:
        try:
            mux.remove_reader(ours)
        except RuntimeError as error:
            refused.append(error)

    with muxcore.Mux(backend=backend) as mux:
        mux.poll(0)
        thread = threading.Thread(target=removes)
        thread.start()
        thread.join()
    removes()
    assert [("thread" in str(error), "closed" in str(error)) for error in refused] == [(True, False), (False, True)]
    ours.close()
    theirs.close()


def test_a_timer_for_the_past_does_not_starve_those_that_are_due(mux: muxcore.Mux) -> None:
    fired: list[int] = []

    def again() -> None:
        mux.call_at(0, again)

    again()
    mux.call_later(0.01, fired.append, 1)
    until(mux, lambda: fired)


def test_calls_of_other_threads_are_not_made_after_close(backend: str) -> None:
    ran: list[int] = []
    mux = muxcore.Mux(backend=backend)
    mux.call_soon_threadsafe(mux.close)
    mux.call_soon_threadsafe(ran.append, 1)
    mux.run()
    assert mux.closed
    assert ran == []


def test_calls_of_other_threads_are_not_made_after_a_handler_has_closed_the_mux(backend: str) -> None:
    ran: list[int] = []
    ours, theirs = socket.socketpair()

    def closes(conn: muxcore.Connection, message: bytes) -> None:
        mux.call_soon_threadsafe(ran.append, 1)
        mux.close()

    with muxcore.Mux(backend=backend) as mux:
        mux.attach(ours, closes)
        theirs.sendall(b"x")
        mux.run()
    assert ran == []
    theirs.close()


def test_a_mux_that_is_about_to_close_refuses_everything(backend: str) -> None:
    """Inside a callback close() comes into effect when that returns."""
    errors: list[str] = []

    def closes() -> None:
        mux.close()
        assert not mux.closed
        for call in (lambda: mux.call_soon(print), lambda: mux.listen(LOCALHOST), lambda: mux.poll(0)):
            with pytest.raises(RuntimeError) as caught:
                call()
            errors.append(str(caught.value))

    mux = muxcore.Mux(backend=backend)
    mux.call_soon(closes)
    mux.run()
    assert (mux.closed, errors) == (True, ["the Mux is closed"] * 3)


def test_what_another_thread_sent_before_the_mux_is_closed_arrives(backend: str) -> None:
    ours, theirs = socket.socketpair()
    with muxcore.Mux(backend=backend) as mux:
        conn = mux.attach(ours, Recorder())
        mux.poll(0)
        thread = threading.Thread(target=conn.send, args=(b"accepted",))
        thread.start()
        thread.join()
    theirs.settimeout(5)
    assert theirs.recv(10) == b"accepted"
    assert conn.error is None
    theirs.close()


def test_what_other_threads_send_is_counted(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    mux.poll(0)
    thread = threading.Thread(target=conn.send_many, args=([b"a", b"b"],))
    thread.start()
    thread.join()
    mux.poll(0)
    assert mux.stats().messages_out == 2
    theirs.close()


def test_a_call_from_a_handler_does_not_end_the_wait_of_the_next_poll(mux: muxcore.Mux) -> None:
    """Promise no-spin: it is made in the same turn, so there is nothing to wake the loop for."""
    called: list[int] = []
    ours, theirs = socket.socketpair()

    def calls(conn: muxcore.Connection, message: bytes) -> None:
        for i in range(2):
            mux.call_soon_threadsafe(called.append, i)

    mux.attach(ours, calls)
    theirs.sendall(b"x")
    until(mux, lambda: called == [0, 1])
    start = time.monotonic()
    assert mux.poll(0.05) == []
    assert time.monotonic() - start >= 0.05
    theirs.close()


def test_a_connection_attached_after_a_pause_is_not_idle_yet(mux: muxcore.Mux) -> None:
    mux.poll(0)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass  # the Mux has not looked at its clock meanwhile
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    attached = time.monotonic()
    mux.attach(ours, recorder, timeouts=muxcore.Timeouts(idle=0.25))
    until(mux, lambda: recorder.count("close"))
    assert time.monotonic() - attached >= 0.25
    theirs.close()


def test_drain_does_not_wait_for_what_has_ended_already(mux: muxcore.Mux, listen: Listen) -> None:
    pull = Pull(mux)
    with client(listen()) as sock:
        sock.shutdown(socket.SHUT_WR)
        pull.until(lambda: pull.seen(EOF))
        start = time.monotonic()
        assert mux.drain(10) is True
        assert time.monotonic() - start < 5


def test_drain_reports_what_has_ended_just_before(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder)):
        until(mux, lambda: recorder.connections)
        recorder.connections[0].abort()
        assert mux.drain(10)
    assert recorder.count("close") == 1


def test_drain_reports_all_that_have_ended_even_if_on_close_is_slow(mux: muxcore.Mux) -> None:
    class Slow(Recorder):
        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            super().on_close(conn, exc)
            spin(0.001)

    recorder = Slow()
    pairs = [socket.socketpair() for _ in range(40)]
    conns = [mux.attach(ours, recorder) for ours, _ in pairs]
    mux.poll(0)
    for conn in conns:
        conn.abort()
    assert mux.drain(10)
    assert recorder.count("close") == 40
    for _, theirs in pairs:
        theirs.close()


def test_a_stop_that_has_ended_a_drain_does_not_end_the_next_run(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    called: list[int] = []
    with client(listen(recorder)):
        until(mux, lambda: recorder.connections)
        mux.call_soon(mux.stop)
        assert not mux.drain(10)
        mux.call_soon(called.append, 1)
        mux.call_soon(mux.stop)
        mux.run()
    assert called == [1]


def test_drain_sleeps_while_it_waits(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder)):
        until(mux, lambda: recorder.connections)
        before = mux.stats().waits
        assert not mux.drain(0.1)
        assert mux.stats().waits - before < 10


def test_a_mux_that_has_drained_serves_again(mux: muxcore.Mux, listen: Listen) -> None:
    assert mux.drain(1)
    with client(listen(Recorder(reply=lambda message: message))) as sock:
        assert exchange(mux, sock, b"again") == b"again"
        turns(mux, 0.02)
        assert len(mux.connections) == 1


def test_drain_closes_newcomers_too(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    late, far = socket.socketpair()

    class Late(Recorder):
        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            super().on_close(conn, exc)
            if late.fileno() >= 0:
                mux.attach(late, self, timeouts=muxcore.Timeouts(linger=0))

    handler = Late()
    mux.attach(ours, handler)
    theirs.close()
    assert mux.drain(3) is True
    assert handler.count("close") == 2
    far.close()


def test_poll_names_what_it_reports(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours)
    theirs.sendall(b"x")
    [(found, flags)] = mux.poll(5)
    assert found is conn
    assert repr(flags) == "<Report.OPENED|READABLE: 3>"
    assert flags == OPENED | READABLE
    assert flags & READABLE
    assert not flags & EOF
    assert READABLE in flags
    theirs.close()


# --- busy_poll -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("busy_poll", "spins"), [(0.0, False), (0.5, True)])
def test_busy_poll_uses_the_processor_before_it_sleeps(backend: str, busy_poll: float, spins: bool) -> None:
    """The fallback blocks at once: it is for systems without the compiled core, not for microseconds."""
    with muxcore.Mux(backend=backend, busy_poll=busy_poll) as mux:
        before = time.thread_time()
        mux.poll(0.5)
        assert (time.thread_time() - before > 0.005) == (spins and backend == "epoll")


def test_busy_poll_ends(backend: str) -> None:
    with muxcore.Mux(backend=backend, busy_poll=0.01) as mux:
        before = time.thread_time()
        mux.poll(0.5)
        assert time.thread_time() - before < 0.1


def test_busy_poll_waits_for_the_whole_timeout(backend: str) -> None:
    with muxcore.Mux(backend=backend, busy_poll=0.02) as mux:
        start = time.monotonic()
        assert mux.poll(0.05) == []
        assert time.monotonic() - start >= 0.05


def test_busy_poll_serves(backend: str) -> None:
    with muxcore.Mux(backend=backend, busy_poll=60) as mux:
        listener = mux.listen(LOCALHOST, lambda conn, message: conn.send(message))
        with client(listener) as sock:
            assert exchange(mux, sock, b"x") == b"x"


def test_busy_poll_does_not_make_a_timer_late_or_early(backend: str) -> None:
    with muxcore.Mux(backend=backend, busy_poll=60) as mux:
        due = mux.time() + 0.05
        mux.call_at(due, mux.stop)
        mux.run()
        assert mux.time() >= due


def test_another_thread_is_heard_while_busy_poll_spins(backend: str) -> None:
    """Promise threads: it gets the interpreter, and its wakeup ends the wait."""
    with muxcore.Mux(backend=backend, busy_poll=60) as mux:
        thread = threading.Thread(target=mux.call_soon_threadsafe, args=(mux.stop,))
        mux.call_soon(thread.start)
        mux.run()
        thread.join()


@pytest.mark.unix_only("it sends itself a signal")
@pytest.mark.parametrize("method", ["run", "poll"])
def test_a_signal_ends_busy_poll(backend: str, method: str) -> None:
    if backend != "epoll":
        pytest.skip("the fallback blocks at once, and a blocked process uses up no SIGPROF timer")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGPROF, interrupt)  # SIGALRM is the test's own timeout
    try:
        with muxcore.Mux(backend=backend, busy_poll=60) as mux:
            signal.setitimer(signal.ITIMER_PROF, 0.05)
            with pytest.raises(KeyboardInterrupt):
                getattr(mux, method)()
    finally:
        signal.signal(signal.SIGPROF, old)


# --- Promise bad-arguments -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"backend": "iocp"}, ValueError, "backend must be"),
        ({"max_events": 0}, ValueError, "max_events must be >= 1"),
        ({"max_events": "many"}, TypeError, "max_events must be an int"),
        ({"read_size": 0}, ValueError, "read_size must be >= 1"),
        ({"read_budget": 1.5}, TypeError, "read_budget must be an int"),
        ({"busy_poll": -1}, ValueError, "busy_poll must be a finite number of seconds >= 0"),
        ({"busy_poll": "yes"}, TypeError, "busy_poll must be a number of seconds"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_bad_mux_arguments_are_named(
    backend: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        muxcore.Mux(**{"backend": backend, **options})


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda mux: mux.poll("soon"), TypeError, "timeout must be a number of seconds"),
        (lambda mux: mux.poll(-1), ValueError, "timeout must be a finite number of seconds >= 0"),
        (lambda mux: mux.poll(float("nan")), ValueError, "timeout"),
        (lambda mux: mux.drain(None), TypeError, "timeout"),
        (lambda mux: mux.call_soon(5), TypeError, "fn must be callable"),
        (lambda mux: mux.call_soon_threadsafe(None), TypeError, "fn must be callable"),
        (lambda mux: mux.call_later(-0.1, print), ValueError, "delay"),
        (lambda mux: mux.call_later(float("inf"), print), ValueError, "delay"),
        (lambda mux: mux.call_later(0, 5), TypeError, "fn must be callable"),
        (lambda mux: mux.call_at("noon", print), TypeError, "when"),
        (lambda mux: mux.call_at(0, 5), TypeError, "fn must be callable"),
        (lambda mux: mux.__init__(), RuntimeError, "called only once"),
    ],
)
def test_bad_arguments_are_named(
    mux: muxcore.Mux, call: Callable[[muxcore.Mux], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call(mux)


# --- Promise stats ---------------------------------------------------------------------------------


def test_stats_count_what_happened(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder(reply=lambda message: message)
    with client(listen(recorder)) as sock:
        assert exchange(mux, sock, b"12345") == b"12345"
        stats = mux.stats()
        assert (stats.bytes_in, stats.bytes_out, stats.messages_in, stats.messages_out) == (5, 5, 1, 1)
        assert (stats.accepts, stats.connections, stats.peak_connections) == (1, 1, 1)
        assert (stats.recv_calls, stats.send_calls) == (1, 1)
        assert stats.waits >= 2
        assert stats.events == 2
        with client(listen(recorder)):
            until(mux, lambda: mux.stats().connections == 2)
        until(mux, lambda: mux.stats().connections == 1)
    until(mux, lambda: mux.stats().connections == 0)
    with client(listen(recorder)):
        until(mux, lambda: mux.stats().connections == 1)
    assert mux.stats().peak_connections == 2


def test_messages_are_counted_however_they_are_received(mux: muxcore.Mux, listen: Listen) -> None:
    class Batches(muxcore.Handler):
        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            assert messages == [b"12345"]

    pulling = listen()
    listeners = [
        listen(Batches()),
        listen(Batches(), framer=muxcore.Fixed(5)),
        listen(Recorder(), framer=muxcore.Fixed(5)),
        pulling,
    ]
    socks = [client(listener) for listener in listeners]
    until(mux, lambda: len(mux.connections) == 4)
    for sock in socks:
        sock.sendall(b"12345")
    until(mux, lambda: mux.stats().bytes_in == 20)
    assert mux.stats().messages_in == 3
    [pulled] = [conn for conn in mux.connections if conn.listener is pulling]
    assert pulled.recv_all() == [b"12345"]
    assert mux.stats().messages_in == 4
    for sock in socks:
        sock.close()


def test_a_message_costs_one_recv_one_send_and_no_epoll_ctl(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder(reply=lambda message: message)
    with client(listen(recorder)) as sock:
        exchange(mux, sock, b"x")
        before = mux.stats()
        for _ in range(10):
            exchange(mux, sock, b"x")
        after = mux.stats()
        assert after.recv_calls - before.recv_calls == 10
        assert after.send_calls - before.send_calls == 10
        assert after.events - before.events == 10


def test_pushing_while_polling_is_fair(mux: muxcore.Mux, listen: Listen) -> None:
    """A thousand messages on one connection do not keep another waiting for more than one batch."""
    recorder = Recorder(reply=lambda message: message)
    listener = listen(recorder)
    with client(listener) as busy, client(listener) as quiet:
        push(mux, busy, bytes(100_000))
        assert exchange(mux, quiet, b"me too") == b"me too"


# --- against mutants that survived (tests/mutants) ------------------------------------------------------


def spin(seconds: float) -> None:
    """Let time pass in the thread of the Mux."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_pull_drained_alone_is_not_readable(mux: muxcore.Mux, listen: Listen) -> None:
    pull = Pull(mux, echo=False)
    sock = client(listen())
    pull.until(lambda: pull.seen(OPENED))
    [conn] = pull.conns
    while conn.send(bytes(50_000)):
        pass
    while not pull.seen(DRAINED):
        sock.recv(1 << 20)
        pull.step()
    assert not pull.seen(READABLE)
    sock.close()


def test_poll_returns_at_once_what_was_reported_before_it(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours)
    start = time.monotonic()
    assert mux.poll(5) == [(conn, OPENED)]
    assert time.monotonic() - start < 4
    theirs.close()


def test_poll_waits_from_now_whatever_ran_before(mux: muxcore.Mux) -> None:
    mux.poll(0)
    spin(0.03)
    start = time.monotonic()
    mux.poll(0.05)
    assert time.monotonic() - start >= 0.05


def test_run_refuses_a_listener_without_a_handler_though_others_have_come_and_gone(
    mux: muxcore.Mux, listen: Listen
) -> None:
    listen()
    other = listen(Recorder())
    sock = client(other)
    until(mux, lambda: other.connections)
    sock.close()
    until(mux, lambda: not other.connections)
    other.close()
    with pytest.raises(RuntimeError, match=r"need poll\(\)"):
        mux.run()


def test_run_refuses_a_listener_without_a_handler_though_its_connections_have_come_and_gone(
    mux: muxcore.Mux, listen: Listen
) -> None:
    pull = Pull(mux)
    listener = listen()
    with client(listener):
        pull.until(lambda: listener.connections)
    pull.until(lambda: not listener.connections)
    with pytest.raises(RuntimeError, match=r"need poll\(\)"):
        mux.run()


def test_a_turn_behind_a_long_one_is_a_turn_as_any_other(mux: muxcore.Mux) -> None:
    called: list[int] = []
    in_one_turn = 0
    for _ in range(20):  # on a busy machine 3 ms may be over before the 50 calls are
        for _ in range(8):
            mux.call_soon(spin, 0.001)
        until(mux, lambda: not mux._soon)
        del called[:]
        for i in range(50):
            mux.call_soon(called.append, i)
        mux.poll(0)
        in_one_turn += called == [*range(50)]
        until(mux, lambda: called == [*range(50)])
    assert in_one_turn > 1


@pytest.mark.parametrize("what", ["calls", "foreign calls", "timers"])
def test_slow_calls_and_timers_leave_the_others_to_the_next_turn(mux: muxcore.Mux, what: str) -> None:
    called: list[int] = []

    def slow(i: int) -> None:
        called.append(i)
        spin(0.001)

    calls: dict[str, Callable[[int], object]] = {
        "calls": lambda i: mux.call_soon(slow, i),
        "foreign calls": lambda i: mux.call_soon_threadsafe(slow, i),
        "timers": lambda i: mux.call_later(0, slow, i),
    }
    for i in range(40):
        calls[what](i)
    spin(0.001)
    mux.poll(0)
    assert 7 <= len(called) < 40
    until(mux, lambda: len(called) == 40)
    assert called == [*range(40)]


def test_an_end_that_the_kernel_reports_once_is_not_lost_to_a_long_turn(mux: muxcore.Mux, listen: Listen) -> None:
    """The kernel reports the peer's reset to a paused connection once; the turn ended before it reached that event."""
    if mux.backend != "epoll":
        pytest.skip("the others report it again")
    recorder = Recorder()
    recorder.on_message = lambda conn, message: spin(0.001)  # type: ignore[method-assign]
    listener = listen(recorder)
    socks = [client(listener) for _ in range(9)]
    until(mux, lambda: len(recorder.connections) == 9)
    [paused] = [conn for conn in recorder.connections if conn.peer == socks[8].getsockname()]
    paused.pause_reading()
    mux.poll(0)
    for sock in socks[:8]:
        sock.sendall(b"x")
    reset(socks[8])
    until(mux, lambda: paused.closed, 5)
    assert isinstance(paused.error, ConnectionResetError)
    for sock in socks[:8]:
        sock.close()


def interrupted() -> None:
    raise KeyboardInterrupt


def driven(mux: muxcore.Mux) -> int:
    if mux.backend != "epoll":
        pytest.skip("only epoll has a descriptor that reports the readiness of all")
    return mux.fileno()


def test_a_driven_mux_with_nothing_to_do_is_not_readable(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder(reply=lambda message: message)
    with client(listen(recorder)) as sock:
        driven(mux)
        assert exchange(mux, sock, b"x") == b"x"
        for _ in range(3):
            mux.poll(0)
        assert select.select([mux.fileno()], [], [], 0)[0] == []


def test_a_driven_mux_is_not_readable_for_a_timer_that_was_cancelled(mux: muxcore.Mux) -> None:
    fd = driven(mux)
    handle = mux.call_later(0.05, print)
    mux.poll(0)
    handle.cancel()
    mux.poll(0)
    assert select.select([fd], [], [], 0.1)[0] == []


def test_a_driven_mux_is_not_readable_for_a_timer_that_is_not_the_next(mux: muxcore.Mux) -> None:
    fd = driven(mux)
    mux.call_later(100, print)
    mux.poll(0)
    mux.call_later(200, print)
    assert select.select([fd], [], [], 0)[0] == []


def test_a_driven_mux_is_readable_for_timers_due_together_that_a_turn_has_left(mux: muxcore.Mux) -> None:
    fd = driven(mux)
    called: list[int] = []

    def slow(i: int) -> None:
        called.append(i)
        spin(0.001)

    when = time.monotonic() + 0.01
    for i in range(24):
        mux.call_at(when, slow, i)
    while len(called) < 24:
        assert select.select([fd], [], [], 5)[0]
        mux.poll(0)


def test_a_closed_mux_that_was_driven_closes_no_descriptor_of_others() -> None:
    mux = muxcore.Mux()
    if mux.backend == "epoll":
        mux.fileno()
    mux.close()
    pairs = [socket.socketpair() for _ in range(4)]
    del mux
    gc.collect()
    for one, other in pairs:
        one.sendall(b"x")
        assert other.recv(1) == b"x"
        one.close()
        other.close()


@pytest.mark.parametrize("how", ["timer", "call", "call of a thread"])
def test_a_closed_mux_lets_go_of_what_it_was_given(backend: str, how: str) -> None:
    class Thing:
        pass

    mux = muxcore.Mux(backend=backend)
    thing = Thing()
    if how == "timer":
        mux.call_later(60, print, thing)
    else:
        (mux.call_soon if how == "call" else mux.call_soon_threadsafe)(print, thing)
    gone = weakref.ref(thing)
    del thing
    mux.close()
    gc.collect()
    assert gone() is None


def test_close_discards_what_was_not_received(backend: str) -> None:
    with muxcore.Mux(backend=backend) as mux:
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours)
        theirs.sendall(b"x")
        until(mux, lambda: mux.stats().bytes_in)
    assert (conn.inbox_size, conn.unread, conn.recv()) == (0, b"", None)
    theirs.close()


def test_after_a_drain_that_gave_up_newcomers_are_served(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(Recorder(reply=lambda message: message))
    with client(listener) as sock:
        assert exchange(mux, sock, b"x") == b"x"
        mux.drain(0)
    ours, theirs = socket.socketpair()
    mux.attach(ours, Recorder(reply=lambda message: message))
    assert exchange(mux, theirs, b"y") == b"y"
    theirs.close()


def test_busy_poll_ends_though_nothing_ends_the_wait(backend: str) -> None:
    with muxcore.Mux(backend=backend, busy_poll=0.01) as mux:
        mux.poll(0)
        other = threading.Timer(0.3, mux.call_soon_threadsafe, [bool])
        other.start()
        before = time.process_time()
        mux.poll()
        assert time.process_time() - before < 0.06
        other.join()


@pytest.mark.unix_only("the lowest free descriptor is the next one")
def test_a_stale_event_of_a_descriptor_that_other_code_closed_is_not_its_successors(
    mux: muxcore.Mux, listen: Listen
) -> None:
    if mux.backend != "epoll":
        pytest.skip("the others number no registrations")
    recorder = Recorder()
    theirs: list[socket.socket] = []

    def swap(conn: muxcore.Connection, message: bytes) -> None:
        if not theirs:
            [other] = [other for other in recorder.connections if other is not conn]
            os.close(other.fileno())
            ours, their = socket.socketpair()
            theirs.append(their)
            mux.attach(ours, Recorder())

    recorder.on_message = swap  # type: ignore[method-assign]
    listener = listen(recorder)
    with client(listener) as one, client(listener) as two:
        until(mux, lambda: len(recorder.connections) == 2)
        one.sendall(b"x")
        two.sendall(b"x")
        mux.poll(1)
        assert mux.stats().stale_events == 1
        until(mux, lambda: recorder.count("close"))
    theirs[0].close()


def test_a_full_socket_that_is_watched_for_writing_alone_does_not_spin_for_its_input(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16))
    theirs.sendall(b"input")
    mux.add_writer(ours, print)
    turns(mux, 0.02)
    assert turns(mux, 0.05) == 0
    mux.remove_writer(ours)
    ours.close()
    theirs.close()


# A daemon has closed standard input, and what it opens gets the number; `hold` has it while other descriptors are made.
DAEMON = """
import ctypes, errno, os, socket, sys, gc, tempfile, warnings, muxcore
warnings.simplefilter("ignore")
os.close(0)

def leave_errno(code):
    if sys.platform == "linux":
        place = ctypes.CDLL(None).__errno_location
        place.restype = ctypes.c_void_p
        ctypes.c_int.from_address(place()).value = code

def mux_beside_0():
    hold = os.open(os.devnull, os.O_RDONLY)
    assert hold == 0
    mux = muxcore.Mux(backend=sys.argv[1])
    os.close(0)
    return mux
"""


def as_a_daemon(backend: str, program: str) -> None:
    done = script(DAEMON + textwrap.dedent(program) + "print('ok')\n", backend)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


@pytest.mark.skipif("epoll" not in BACKENDS, reason="only the compiled core has an epoll set")
def test_descriptor_0_may_be_an_epoll_set() -> None:
    as_a_daemon("epoll", """
        leave_errno(errno.ENOENT)
        ep = muxcore.Epoll()
        assert (ep.fileno(), ep.closed) == (0, False)
        ep.close()
        try: os.fstat(0)
        except OSError: pass
        else: raise AssertionError("it is still open")
        ep = muxcore.Epoll()
        other = muxcore.Epoll.fromfd(os.dup(0))
        ep.close()
        os.dup2(other.fileno(), 0)
        with muxcore.Epoll.fromfd(0) as ep:
            assert ep.fileno() == 0 and not ep.closed
        other.close()
        ep = muxcore.Epoll()
        assert ep.fileno() == 0
        del ep
        gc.collect()
        try: os.fstat(0)
        except OSError: pass
        else: raise AssertionError("it is still open")
    """)

@pytest.mark.skipif("epoll" not in BACKENDS, reason="only a Mux on epoll that is driven has a timer descriptor")
def test_descriptor_0_may_be_the_timer_of_a_driven_mux() -> None:
    as_a_daemon("epoll", """
        mux, called = mux_beside_0(), []
        leave_errno(errno.ENOENT)
        assert mux.fileno() > 0  # its timer has 0 now
        assert mux.fileno() > 0
        mux.call_later(0, called.append, 1)
        while not called: mux.poll(0)
        mux.close()
        try: os.fstat(0)
        except OSError: pass
        else: raise AssertionError("it is still open")
    """)

@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_the_wakeup_of_signals(backend: str) -> None:
    as_a_daemon(backend, """
        import signal
        mux = mux_beside_0()
        mux.add_signal_handler(signal.SIGUSR1, mux.stop)
        os.fstat(0)  # a socket of the wakeup has 0 now
        before = len(os.listdir("/dev/fd"))
        mux.add_signal_handler(signal.SIGUSR2, mux.stop)
        mux.call_soon(signal.raise_signal, signal.SIGUSR1)
        mux.run()
        assert len(os.listdir("/dev/fd")) == before
        mux.close()
    """)


@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_a_connection(backend: str) -> None:
    as_a_daemon(backend, """
        mux = mux_beside_0()
        ours, theirs = socket.socketpair()
        assert ours.fileno() == 0
        conn = mux.attach(ours, lambda conn, message: conn.send(message))
        theirs.sendall(b"x")
        theirs.settimeout(0)
        data = b""
        while not data:
            mux.poll(0.02)
            try: data = theirs.recv(1)
            except BlockingIOError: pass
        assert data == b"x"
        assert conn.local is not None
        assert conn.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
        conn.abort()
        assert list(mux.connections) == []
        mux.close()
    """)


@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_a_connection_that_is_accepted(backend: str) -> None:
    as_a_daemon(backend, """
        mux = mux_beside_0()
        hold = os.open(os.devnull, os.O_RDONLY)
        listener = mux.listen(("127.0.0.1", 0), lambda conn, message: conn.send(message))
        sock = socket.create_connection(listener.address)
        sock.sendall(b"x")
        sock.settimeout(0)
        os.close(hold)
        leave_errno(errno.EAGAIN)
        mux.poll()
        [conn] = mux.connections
        assert (hold, conn.fileno()) == (0, 0)
        data = b""
        while not data:
            mux.poll(0.02)
            try: data = sock.recv(1)
            except BlockingIOError: pass
        mux.close()
    """)


@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_a_file_that_is_sent(backend: str) -> None:
    as_a_daemon(backend, """
        mux = mux_beside_0()
        hold = os.open(os.devnull, os.O_RDONLY)
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours)
        mux.poll(0)
        with tempfile.TemporaryFile() as file:
            file.truncate(1 << 20)
            os.close(hold)
            leave_errno(errno.ENOENT)
            conn.sendfile(file)
        os.fstat(0)
        theirs.settimeout(0)
        left = 1 << 20
        while left:
            mux.poll(0.02)
            try: left -= len(theirs.recv(left))
            except BlockingIOError: pass
        mux.close()
        try: os.fstat(0)
        except OSError: pass
        else: raise AssertionError("it is still open")
    """)


@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_a_datagram_socket_that_is_closed(backend: str) -> None:
    as_a_daemon(backend, """
        mux, errors = mux_beside_0(), []
        class Handler:
            def on_datagrams(self, datagram, messages): pass
            def on_error(self, datagram, error): errors.append(error)
        datagram = mux.datagram(("127.0.0.1", 0), Handler(), max_size=1)
        assert (datagram.fileno(), datagram.closed) == (0, False)
        datagram.send(b"too large", datagram.address)
        while not errors: mux.poll(0.02)
        datagram.close()
        assert datagram.closed
        try: os.fstat(0)
        except OSError: pass
        else: raise AssertionError("it is still open")
        mux.close()
    """)


@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_a_listener(backend: str) -> None:
    as_a_daemon(backend, """
        mux = mux_beside_0()
        sock = socket.socket()
        assert sock.fileno() == 0
        sock.bind(("127.0.0.1", 0))
        listener = mux.listen(sock, lambda conn, message: conn.send(message))
        assert (listener.fileno(), listener.closed) == (0, False)
        listener.dup().close()
        with socket.create_connection(listener.address) as client:
            client.sendall(b"x")
            while not mux.stats().bytes_out: mux.poll(0.02)
            assert client.recv(1) == b"x"
        listener.close()
        assert listener.closed
        try: os.fstat(0)
        except OSError: pass
        else: raise AssertionError("it is still open")
    """)


@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_a_listener_of_an_address(backend: str) -> None:
    as_a_daemon(backend, """
        mux, opened = mux_beside_0(), []
        listener = mux.listen(("127.0.0.1", 0), lambda conn, message: opened.append(message))
        assert (listener.fileno(), listener.closed) == (0, False)
        assert "open" in repr(listener)
        with socket.create_connection(listener.address) as sock:
            sock.sendall(b"x")
            while not opened: mux.poll(0.02)
        listener.dup().close()
        listener.close()
        assert listener.closed
        mux.close()
    """)


@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_an_accepted_connection(backend: str) -> None:
    as_a_daemon(backend, """
        hold = os.open(os.devnull, os.O_RDONLY)
        mux = muxcore.Mux(backend=sys.argv[1])
        listener = mux.listen(("127.0.0.1", 0), lambda conn, message: conn.send(message))
        with socket.create_connection(listener.address) as client:
            os.close(hold)
            client.sendall(b"x")
            while not mux.stats().bytes_out: mux.poll(0.02)
            assert [conn.fileno() for conn in mux.connections] == [0]
            assert client.recv(1) == b"x"
        mux.close()
    """)


@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_a_datagram_socket(backend: str) -> None:
    as_a_daemon(backend, """
        mux = mux_beside_0()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        assert ours.fileno() == 0
        ours.setblocking(False)
        try:
            while True: ours.send(b"stuffing")
        except BlockingIOError: pass
        got = []
        d = mux.datagram(ours, lambda d, messages: got.extend(messages))
        theirs.send(b"in")
        while not got: mux.poll(0.02)
        d.send(b"last")
        mux.poll(0)
        theirs.settimeout(0)
        data = b""
        for _ in range(500):
            try: data = theirs.recv(100)
            except BlockingIOError: mux.poll(0.02)
            if data == b"last": break
        assert data == b"last"
        assert d.fileno() == 0
        del d, mux
        gc.collect()
        try: os.fstat(0)
        except OSError: pass
        else: raise AssertionError("it is still open")
    """)


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_a_child_that_closes_its_parents_mux_finds_everything_closed_and_closes_nothing_twice(backend: str) -> None:
    done = script(
        """
        import gc, os, socket, sys, muxcore
        mux = muxcore.Mux(backend=sys.argv[1])
        listener = mux.listen(("127.0.0.1", 0), lambda conn, message: None)
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours, lambda conn, message: None)
        closing, open_end = socket.socketpair()
        ends = mux.attach(closing, lambda conn, message: None)
        ends.close()
        mux.poll(0)
        assert ends.closing and not ends.closed
        pid = os.fork()
        if pid == 0:
            mux.close()
            assert (mux.closed, conn.closed, conn.closing, conn.fileno()) == (True, True, True, -1)
            assert (listener.closed, listener.fileno(), ends.closed) == (True, -1, True)
            files = [os.open(os.devnull, os.O_RDONLY) for _ in range(6)]
            del conn, ends, listener, mux
            gc.collect()
            for file in files: os.fstat(file)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        mux.close()
        print("ok")
        """,
        backend,
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_poll_reports_a_connection_once_with_all_that_happened_to_it(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b"x")
    conn = mux.attach(ours)
    assert mux.poll(1) == [(conn, OPENED | READABLE)]
    assert mux.poll(0) == []
    theirs.close()


def test_poll_does_not_wait_when_a_callback_ran_before_its_wait(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    mux.attach(ours, recorder)
    start = time.monotonic()
    assert mux.poll(5) == []
    assert time.monotonic() - start < 4
    assert recorder.names() == ["open"]
    theirs.close()


def test_what_another_thread_sends_by_send_many_is_left_to_the_thread_of_the_mux(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    mux.poll(0)
    thread = threading.Thread(target=conn.send_many, args=([b"a", b"b"],))
    thread.start()
    thread.join()
    assert (mux.stats().messages_out, conn.outbox_size) == (0, 2)
    assert receive(mux, theirs, 2) == b"ab"
    theirs.close()


def test_a_closed_mux_cannot_be_driven(backend: str) -> None:
    with muxcore.Mux(backend=backend) as mux:
        driven(mux)
    with pytest.raises(RuntimeError, match="the Mux is closed"):
        mux.fileno()


def test_pull_what_comes_behind_a_long_inbox_that_was_read_in_part_is_whole(
    mux: muxcore.Mux, listen: Listen
) -> None:
    data = pattern(120_000)
    with client(listen(framer=muxcore.Fixed(1000))) as sock:
        for begin, count in ((0, 45), (60_000, 75)):
            sock.sendall(data[begin : begin + 60_000])
            until(mux, lambda begin=begin: mux.stats().bytes_in == begin + 60_000)
            [conn] = mux.connections
            for i in range(count):
                at = (begin * 3 // 4) + 1000 * i
                assert conn.recv() == data[at : at + 1000]
        assert conn.inbox_size == 0


@pytest.mark.linux_only("it is glibc that fills what malloc returns")
@pytest.mark.parametrize("framer", ["None", "muxcore.Lines()"])
def test_reused_memory_shows_no_byte_of_its_former_use(framer: str) -> None:
    done = script(
        """
        import socket, sys, muxcore
        mux = muxcore.Mux()
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours, framer=eval(sys.argv[1]))
        conn.set_limits(high=1 << 20)
        sent = []
        for size in (10, 3000, 6000, 50, 20_000):
            sent.append(b"x" * size + b"\\n")
            theirs.sendall(sent[-1])
            while conn.inbox_size < sum(map(len, sent)): mux.poll(1)
        got = b"".join(message + (b"\\n" if sys.argv[1] != "None" else b"") for message in conn)
        assert got == b"".join(sent)
        for size in (10, 3000, 50, 6000, 100): conn.send(bytes(size))
        while conn.outbox_size: mux.poll(1)
        mux.close()
        print("ok")
        """,
        framer,
        env={**os.environ, "MALLOC_PERTURB_": "165"},
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def use_a_high_slot(mux: muxcore.Mux) -> None:
    import fcntl

    ours, theirs = socket.socketpair()
    high = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 900)
    mux.add_reader(high, print)
    mux.remove_reader(high)
    os.close(high)
    ours.close()
    theirs.close()


def use_the_text_of_a_reply(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, lambda conn, message: None, framer=muxcore.Resp())
    mux.poll(0)
    conn.send([b"x" * 20_000])
    assert len(receive(mux, theirs, 20_000)) >= 20_000
    theirs.close()


def use_messages_of_each_size(mux: muxcore.Mux) -> None:
    class Batches(muxcore.Handler):
        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            pass

    ours, theirs = socket.socketpair()
    mux.attach(ours, Batches(), framer=muxcore.Lines())
    for size in range(8, 500, 16):
        theirs.sendall((b"x" * size + b"\n") * 16)
        mux.poll(0)
    theirs.close()


def use_blocks(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, lambda conn, message: None)
    for _ in range(300):
        conn.send(b"x" * 1000)
    assert len(receive(mux, theirs, 300_000)) == 300_000
    theirs.close()


@pytest.mark.linux_only("it reads the memory of a process from /proc")
@pytest.mark.parametrize(
    ("use", "count"),
    [(use_a_high_slot, 300), (use_the_text_of_a_reply, 100), (use_messages_of_each_size, 80), (use_blocks, 40)],
)
def test_a_mux_that_is_closed_frees_its_memory(
    backend: str, use: Callable[[muxcore.Mux], None], count: int
) -> None:
    with memory(backend) as grown:
        for done in range(count + 20):
            if done == 20:
                gc.collect()
                before = grown()
            with muxcore.Mux(backend=backend) as mux:
                use(mux)
            del mux
            if done % 20 == 19:  # not each time: pytest's many objects make it slow
                gc.collect()
        gc.collect()
        assert grown() - before < 1 << 20


@pytest.mark.linux_only("it reads the memory of a process from /proc")
def test_a_mux_that_is_closed_frees_its_batch(backend: str) -> None:
    def addresses() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4096  # a batch is not resident until it is used

    before = addresses()
    for _ in range(20):
        muxcore.Mux(backend=backend, max_events=1_000_000).close()
        gc.collect()
    assert addresses() - before < 100_000_000


def test_an_option_is_not_read_from_a_socket_that_has_got_the_number_meanwhile() -> None:
    """An audit hook may run when a socket object is made, and close the connection."""
    done = script(
        """
        import os, socket, sys, muxcore
        mux = muxcore.Mux()
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours, lambda conn, message: None)
        mux.poll(0)
        numbers = []
        def hook(event, args):
            if event == "socket.__new__" and armed:
                armed.clear()
                numbers.append(conn.fileno())
                conn.abort()
                os.dup2(theirs.fileno(), numbers[0])
        armed = []
        sys.addaudithook(hook)
        armed.append(1)
        try:
            conn.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        except muxcore.ConnectionClosed:
            os.fstat(numbers[0])
            print("ok")
        mux.close()
        """
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_slow_messages_leave_the_others_of_the_batch_to_the_next_turn(mux: muxcore.Mux) -> None:
    handled: list[bytes] = []

    def slow(conn: muxcore.Connection, message: bytes) -> None:
        handled.append(message)
        spin(0.001)

    pairs = [socket.socketpair() for _ in range(40)]
    for ours, _ in pairs:
        mux.attach(ours, slow)
    mux.poll(0)
    for _, theirs in pairs:
        theirs.sendall(b"x")
    mux.poll(1)
    assert 1 <= len(handled) < 40
    until(mux, lambda: len(handled) == 40)
    for _, theirs in pairs:
        theirs.close()


def test_slow_opens_leave_the_others_to_the_next_turn(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    recorder.on_open = lambda conn: (recorder.connections.append(conn), spin(0.004))  # type: ignore[method-assign]
    listener = listen(recorder)
    socks = [client(listener) for _ in range(20)]
    mux.poll(1)
    assert 1 <= len(recorder.connections) < 20
    until(mux, lambda: len(recorder.connections) == 20)
    for sock in socks:
        sock.close()


def test_what_can_be_read_is_reported_once(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours)
    mux.poll(0)
    theirs.sendall(b"x")
    assert mux.poll(1) == [(conn, READABLE)]
    assert mux.poll(0.02) == []
    theirs.close()


class SlowEnds(Recorder):
    """The first three ends bring others with them."""

    def __init__(self, others: list[muxcore.Connection]) -> None:
        super().__init__()
        self.others = others

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        super().on_close(conn, exc)
        spin(0.001)
        for _ in range(min(8, len(self.others))):
            self.others.pop().abort()


def test_slow_ends_leave_the_others_to_the_next_turn_and_none_is_lost(mux: muxcore.Mux) -> None:
    handler = SlowEnds(others := [])
    pairs = [socket.socketpair() for _ in range(48)]
    conns = [mux.attach(ours, handler) for ours, _ in pairs]
    until(mux, lambda: handler.count("open") == 48)
    others.extend(conns[24:])
    for conn in conns[:24]:
        conn.abort()
    seen: list[int] = []
    mux.call_later(0, lambda: seen.append(handler.count("close")))
    until(mux, lambda: handler.count("close") == 48)
    assert 1 <= seen[0] < 24
    for _, theirs in pairs:
        theirs.close()


def test_a_driven_mux_is_readable_for_ends_that_a_turn_has_left(mux: muxcore.Mux) -> None:
    fd = driven(mux)
    handler = SlowEnds([])
    pairs = [socket.socketpair() for _ in range(40)]
    conns = [mux.attach(ours, handler) for ours, _ in pairs]
    until(mux, lambda: handler.count("open") == 40)
    for conn in conns:
        conn.abort()
    while handler.count("close") < 40:
        assert select.select([fd], [], [], 5)[0]
        mux.poll(0)
    for _, theirs in pairs:
        theirs.close()


def test_a_driven_mux_is_readable_for_what_an_interrupt_has_left(mux: muxcore.Mux) -> None:
    fd = driven(mux)
    mux.call_soon(interrupted)
    with pytest.raises(KeyboardInterrupt):
        mux.poll(0)
    assert select.select([fd], [], [], 0)[0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_driven_mux_is_readable_for_a_connection_that_ends_behind_its_eof(mux: muxcore.Mux, when: str) -> None:
    """Also if it comes to be driven behind the poll that has reported the EOF."""
    if when == "before" or mux.backend != "epoll":
        driven(mux)
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours)
    theirs.shutdown(socket.SHUT_WR)
    reported = 0
    while not reported & EOF:
        for _, flags in mux.poll(1):
            reported |= flags
    while not conn.closed:
        assert select.select([driven(mux)], [], [], 5)[0]
        mux.poll(0)
    theirs.close()


def test_a_driven_mux_is_readable_for_an_end_that_a_long_turn_has_left(mux: muxcore.Mux, listen: Listen) -> None:
    """The kernel reports the reset of a paused connection once, and nothing else is left of the batch."""
    fd = driven(mux)
    recorder = Recorder()
    recorder.on_message = lambda conn, message: spin(0.001)  # type: ignore[method-assign]
    listener = listen(recorder)
    socks = [client(listener) for _ in range(9)]
    until(mux, lambda: len(recorder.connections) == 9)
    [paused] = [conn for conn in recorder.connections if conn.peer == socks[8].getsockname()]
    paused.pause_reading()
    mux.poll(0)
    for sock in socks[:8]:
        sock.sendall(b"x")
    reset(socks[8])
    while not paused.closed:
        assert select.select([fd], [], [], 5)[0]
        mux.poll(0)
    for sock in socks[:8]:
        sock.close()


def test_poll_waits_after_a_turn_that_was_interrupted(mux: muxcore.Mux) -> None:
    mux.call_soon(interrupted)
    with pytest.raises(KeyboardInterrupt):
        mux.poll(0)
    mux.poll(0)
    start = time.monotonic()
    mux.poll(0.05)
    assert time.monotonic() - start >= 0.05


def test_what_an_interrupt_has_left_is_delivered_though_nothing_more_comes(mux: muxcore.Mux) -> None:
    got: list[bytes] = []

    def handle(conn: muxcore.Connection, message: bytes) -> None:
        got.append(message)
        if message == b"one":
            raise KeyboardInterrupt

    ours, theirs = socket.socketpair()
    mux.attach(ours, handle, framer=muxcore.Lines())
    theirs.sendall(b"one\ntwo\n")
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: len(got) == 2)
    until(mux, lambda: got == [b"one", b"two"])
    theirs.close()


def test_poll_waits_after_a_callback(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    mux.attach(ours, Recorder(reply=lambda message: message))
    assert exchange(mux, theirs, b"x") == b"x"
    turns(mux, 0.02)
    start = time.monotonic()
    mux.poll(0.05)
    assert time.monotonic() - start >= 0.05
    theirs.close()


def test_poll_waits_after_run_though_something_was_queued_since(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    mux.call_soon(mux.stop)
    mux.run()
    mux.poll(0)
    conn.pause_reading()
    start = time.monotonic()
    mux.poll(0.05)
    assert time.monotonic() - start >= 0.05
    theirs.close()


def test_poll_without_a_time_waits_until_there_is_something(mux: muxcore.Mux) -> None:
    called: list[int] = []
    mux.poll(0)
    for i in range(10):  # on a busy machine the call may come before the wait, and wakes nothing
        other = threading.Timer(0.05, mux.call_soon_threadsafe, [called.append, i])
        other.start()
        mux.poll()
        other.join()
        assert called == [*range(i + 1)]
        if mux.stats().wakeups:
            break
    assert mux.stats().wakeups == 1


def test_once_a_handler_has_closed_the_mux_no_other_is_called(backend: str) -> None:
    called: list[str] = []
    pairs = [socket.socketpair() for _ in range(3)]
    with muxcore.Mux(backend=backend) as mux:

        def ends(conn: muxcore.Connection, message: bytes) -> None:
            called.append("message")
            mux.call_soon(called.append, "call")
            mux.call_later(0, called.append, "timer")
            mux.close()

        for ours, theirs in pairs:
            mux.attach(ours, ends)
            theirs.sendall(b"x")
        until(mux, lambda: mux.closed)
    assert called == ["message"]
    for _, theirs in pairs:
        theirs.close()


def test_a_timer_that_raises_is_logged_and_the_next_is_called(
    mux: muxcore.Mux, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[int] = []
    mux.call_later(0, lambda: 1 / 0)
    mux.call_later(0, called.append, 1)
    until(mux, lambda: called)
    assert "ZeroDivisionError" in caplog.text
    assert mux.stats().handler_errors == 1


def test_after_run_a_send_goes_out_at_once(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    mux.call_soon(mux.stop)
    mux.run()
    conn.send(b"x")
    theirs.setblocking(False)
    assert theirs.recv(1) == b"x"
    theirs.close()


def test_a_linger_begins_with_the_close_however_long_its_callback_lasts(mux: muxcore.Mux) -> None:
    ended: list[float] = []

    def ends(conn: muxcore.Connection, message: bytes) -> None:
        conn.close()
        spin(0.2)
        ended.append(time.monotonic())

    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, ends, timeouts=muxcore.Timeouts(linger=0.2))
    theirs.sendall(b"x")
    until(mux, lambda: conn.closed)
    assert time.monotonic() - ended[0] >= 0.2
    theirs.close()


def test_what_another_thread_has_sent_goes_out_when_the_mux_is_closed(backend: str) -> None:
    ours, theirs = socket.socketpair()
    with muxcore.Mux(backend=backend) as mux:
        conn = mux.attach(ours, Recorder())
        mux.poll(0)
        thread = threading.Thread(target=conn.send, args=(b"accepted",))
        thread.start()
        thread.join()
    assert theirs.recv(100) == b"accepted"
    theirs.close()


def test_what_was_not_delivered_is_gone_when_the_end_is_reported(backend: str) -> None:
    left: list[tuple[int, bytes]] = []

    class Ends(muxcore.Handler):
        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            left.append((conn.inbox_size, conn.unread))

    ours, theirs = socket.socketpair()
    with muxcore.Mux(backend=backend) as mux:
        conn = mux.attach(ours, Ends(), framer=muxcore.Lines())
        theirs.sendall(b"unfinished")
        until(mux, lambda: conn.inbox_size)
    assert left == [(0, b"")]
    theirs.close()


def test_a_poll_ends_once_it_has_read_its_budget() -> None:
    """The compiled core: what its user gets is in the processor's cache yet."""
    with muxcore.Mux(read_budget=1) as mux:
        if mux.backend != "epoll":
            pytest.skip("the others end a poll with the batch")
        pairs = [socket.socketpair() for _ in range(5)]
        for ours, _ in pairs:
            mux.attach(ours)
        mux.poll(0)
        for _, theirs in pairs:
            theirs.sendall(b"x")
        assert [len(mux.poll(1)) for _ in pairs] == [1] * 5
        for _, theirs in pairs:
            theirs.close()


def test_an_event_of_a_connection_that_its_batch_has_ended_reads_nothing_from_the_next_file(mux: muxcore.Mux) -> None:
    """By then the number belongs to a file of the user's that is not registered in the Mux."""
    conns: list[muxcore.Connection] = []
    files: list[int] = []
    read_end, write_end = os.pipe()

    def ends(conn: muxcore.Connection, message: bytes) -> None:
        if not files:
            [other] = [other for other in conns if other is not conn]
            files.append(other.fileno())
            other.abort()
            os.dup2(read_end, files[0])

    pairs = [socket.socketpair() for _ in range(2)]
    conns += [mux.attach(ours, ends) for ours, _ in pairs]
    mux.poll(0)
    os.write(write_end, b"private")
    for _, theirs in pairs:
        theirs.sendall(b"x")
    until(mux, lambda: mux.stats().stale_events)
    assert os.read(files[0], 100) == b"private"
    for fd in (read_end, write_end, *files):
        os.close(fd)
    for _, theirs in pairs:
        theirs.close()


def interrupted_close(mux: muxcore.Mux, file: str) -> None:
    """Close it, with a KeyboardInterrupt at the first line of that file which runs."""
    before = sys.gettrace()
    sys.settrace(InterruptAt(file, 1))
    try:
        with pytest.raises(KeyboardInterrupt):
            mux.close()
    finally:
        sys.settrace(before)


def test_an_interrupt_while_close_makes_an_error_leaves_no_connection_open(backend: str) -> None:
    ours, theirs = socket.socketpair()
    recorder = Recorder()
    mux = muxcore.Mux(backend=backend)
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    conn.send(bytes(8 << 20))
    interrupted_close(mux, "errors.py")
    assert (conn.closed, conn.fileno(), recorder.names()) == (True, -1, ["open", "close"])
    theirs.close()


@pytest.mark.parametrize("kind", ["listener", "datagram"])
def test_an_interrupt_while_close_removes_a_socket_file_is_raised_at_its_end(
    backend: str, socket_path: Path, kind: str
) -> None:
    mux = muxcore.Mux(backend=backend)
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    owner: Any = mux.listen(socket_path, Recorder()) if kind == "listener" else mux.datagram(socket_path, print)
    interrupted_close(mux, "_unix.py")
    assert (mux.closed, conn.closed, owner.closed) == (True, True, True)
    theirs.close()


@pytest.mark.parametrize("name", ["_closing_steps", "_listeners", "_close_now", "_release"])
@pytest.mark.parametrize("backend", ["select", "poll"])
def test_an_interrupt_as_a_step_of_close_begins_leaves_nothing_open(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = [KeyboardInterrupt()]

    def interrupted(*args: object) -> Any:
        if interrupts:
            raise interrupts.pop()
        return function(*args)

    before = open_fds()
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    mux = muxcore.Mux(backend=backend)
    function = getattr(type(mux), name)
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    monkeypatch.setattr(type(mux), name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        mux.close()
    theirs.close()
    assert (mux.closed, conn.closed, recorder.names()) == (True, True, ["open", "close"])
    assert open_fds() == before


def test_interrupts_while_close_closes_listeners_do_no_harm_to_connections(
    backend: str, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: object) -> None:
        raise KeyboardInterrupt

    mux = muxcore.Mux(backend=backend)
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder := Recorder())
    mux.poll(0)
    conn.send(b"bye")
    listeners = [mux.listen(socket_path.with_name(str(number)), Recorder()) for number in range(20)]
    monkeypatch.setattr("muxcore._unix.SocketFile.remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mux.close()
    assert all(listener.closed for listener in listeners)
    assert (recorder.names(), recorder.reason(), mux.stats().connections) == (["open", "close"], None, 0)
    assert theirs.makefile("rb").read() == b"bye"
    theirs.close()


def test_what_another_framer_finds_behind_the_eof_may_still_be_received(mux: muxcore.Mux, listen: Listen) -> None:
    class Forgetful(Halves):
        quiet = True

        def rest(self) -> bytes:
            return b"" if self.quiet else self.data

    framer = Forgetful()
    pull = Pull(mux, echo=False)
    with client(listen(framer=lambda: framer)) as sock:
        sock.sendall(b"x")
        sock.shutdown(socket.SHUT_WR)
        pull.until(lambda: pull.seen(EOF))
        framer.quiet = False
        pull.conns[0].framer = None
        mux.poll(0)
        assert list(pull.conns[0]) == [b"x"]
        pull.conns[0].close()


@pytest.mark.unix_only("it closes standard input")
@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_descriptor_0_may_be_a_file(backend: str) -> None:
    as_a_daemon(backend, """
        import tempfile
        mux = mux_beside_0()
        hold = os.open(os.devnull, os.O_RDONLY)
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours, lambda conn, message: None, limits=muxcore.Limits(high=1 << 20))
        file = tempfile.TemporaryFile()
        file.truncate(100_000)
        os.close(hold)
        conn.sendfile(file)
        assert os.fstat(0).st_size == 100_000
        got = 0
        while got < 100_000:
            mux.poll(0.02)
            got += len(theirs.recv(1 << 16))
        mux.poll(0)
        try: os.fstat(0)
        except OSError: pass
        else: raise AssertionError("it is still open")
        theirs.close()
        mux.close()
    """)


@pytest.mark.skipif("epoll" not in BACKENDS, reason="in the fallback the child may be the one that accepts")
def test_a_child_that_a_finalizer_forks_amid_an_accept_leaves_the_connection_to_the_parent() -> None:
    done = script(
        """
        import gc, os, socket, muxcore

        class Forks:
            def __init__(self): self.me = self
            def __del__(self):
                pids.append(os.fork())
                if pids[-1]: assert os.waitpid(pids[-1], 0)[1] == 0

        for allocations in range(40):
            pids = []
            with muxcore.Mux(backend="epoll") as mux:
                def linger(conn, message): conn.send(conn.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
                listener = mux.listen(("127.0.0.1", 0), linger)
                with socket.create_connection(listener.address, timeout=10) as client:
                    gc.collect()
                    gc.disable()
                    Forks()
                    gc.set_threshold(gc.get_count()[0] + 1 + allocations, 10, 10)
                    gc.enable()
                    try:
                        mux.poll(1)
                        gc.collect()
                    except RuntimeError:
                        assert pids == [0]
                    if pids[-1] == 0:
                        os._exit(0)
                    gc.set_threshold(700, 10, 10)
                    client.sendall(b"x")
                    while not mux.stats().bytes_out: mux.poll(0.02)
                    assert client.recv(10) == bytes(8), "the child does not turn its close into a reset, either"
        print("ok")
        """
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
