"""Connection: sending, receiving, half-close, the end."""

from __future__ import annotations

import copy
import errno
import gc
import logging
import os
import select
import socket
import struct
import sys
import sysconfig
import threading
import time
import tracemalloc
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    DEADLINE,
    LOCALHOST,
    Recorder,
    client,
    exchange,
    leave_errno,
    nonblocking,
    open_fds,
    pattern,
    push,
    receive,
    reset,
    settle,
    stuff,
    turns,
    until,
)

import muxcore
from muxcore._impl import BACKENDS

Listen = Callable[..., muxcore.Listener]
BIG = 3 << 20


def echo() -> Recorder:
    return Recorder(reply=lambda message: message)


def opened(mux: muxcore.Mux, listen: Listen, handler: Recorder, **options: Any) -> tuple[socket.socket, Any]:
    """A client and the server's connection to it."""
    sock = client(listen(handler, **options))
    until(mux, lambda: handler.connections)
    return sock, handler.connections[-1]


@pytest.fixture
def testcapi(mux: muxcore.Mux) -> Any:
    """What makes allocations fail."""
    if mux.backend != "epoll":
        pytest.skip("the core in Python may run out of memory between any two of its lines")
    return pytest.importorskip("_testcapi", reason="this Python has no _testcapi to make allocations fail with")


# --- Promise sends-together ------------------------------------------------------------------------


def test_messages_come_back_unchanged_and_in_order(mux: muxcore.Mux, listen: Listen) -> None:
    with client(listen(echo())) as sock:
        for size in (1, 255, 1023, 1024, 4096, 65535, 65536, 65537, 300_000):
            data = pattern(size)
            push(mux, sock, data)
            assert receive(mux, sock, size) == data


def test_what_a_handler_sends_goes_out_in_one_call(mux: muxcore.Mux, listen: Listen) -> None:
    def handler(conn: muxcore.Connection, message: bytes) -> None:
        for i in range(100):
            conn.send(b"%03d" % i)

    with client(listen(handler)) as sock:
        sock.sendall(b"go")
        assert receive(mux, sock, 300) == b"".join(b"%03d" % i for i in range(100))
    stats = mux.stats()
    assert stats.send_calls + stats.sendmsg_calls == 1


def test_small_and_large_pieces_are_gathered_into_one_call(mux: muxcore.Mux, listen: Listen) -> None:
    pieces = [b"a" * 10, b"b" * 5000, b"c" * 20, b"d" * 2000, b"", b"e"]

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        conn.send_many(pieces)

    with client(listen(handler)) as sock:
        sock.sendall(b"go")
        assert receive(mux, sock, 7031) == b"".join(pieces)
    stats = mux.stats()
    assert stats.send_calls + stats.sendmsg_calls == 1


def test_more_pieces_than_one_sendmsg_allows_arrive_in_order(mux: muxcore.Mux, listen: Listen) -> None:
    pieces = [bytes([i % 256]) * 1500 for i in range(500)]

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        conn.writelines(pieces)

    limits = muxcore.Limits(high=1 << 20)
    with client(listen(handler, limits=limits)) as sock:
        sock.sendall(b"go")
        assert receive(mux, sock, 750_000) == b"".join(pieces)


def test_output_to_another_connection_goes_out_in_the_same_turn(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()

    def forward(conn: muxcore.Connection, message: bytes) -> None:
        for other in recorder.connections:
            other.send(message)
            assert other.outbox_size > 0, "kept until the end of the batch"

    recorder.on_message = forward  # type: ignore[method-assign]
    listener = listen(recorder)
    with client(listener) as one, client(listener) as two:
        until(mux, lambda: len(recorder.connections) == 2)
        one.sendall(b"to all")
        assert receive(mux, one, 6) == receive(mux, two, 6) == b"to all"


def ready_together(mux: muxcore.Mux, listener: muxcore.Listener, handler: Recorder, count: int) -> list[socket.socket]:
    """Clients whose requests wait for the next turn."""
    socks = [client(listener) for _ in range(count)]
    until(mux, lambda: len(handler.connections) == count)
    for sock in socks:
        sock.sendall(b"request")
    return socks


def served_in_one_turn(
    mux: muxcore.Mux, listener: muxcore.Listener, handler: Recorder, count: int, served: list[Any]
) -> list[socket.socket]:
    """Clients whose requests are handled in one turn: on a busy machine, the turn's bound of 3 ms may end it amid them,
    and others are tried. `served` has an item for each."""
    for _ in range(20):
        del served[:], handler.connections[:]
        socks = ready_together(mux, listener, handler, count)
        mux.poll(0)
        if len(served) == count:
            return socks
        until(mux, lambda: len(served) == count)
        replies(socks)
    raise AssertionError("not one turn was long enough")


def replies(socks: list[socket.socket]) -> list[bytes]:
    """What has arrived at each, without another turn; they are closed."""
    found = []
    for sock in socks:
        sock.settimeout(DEADLINE)
        found.append(sock.recv(100))
        sock.close()
    return found


def test_replies_go_out_when_the_handlers_of_a_group_are_done(mux: muxcore.Mux, listen: Listen) -> None:
    """Sixteen that are ready together are a group: a client that waits for several of them is woken once (more than
    what one would expect; docs/ARCHITECTURE.md has the reason). The fallback has no groups."""
    backlog: list[int] = []  # what is not sent yet, at each call of the handler

    def reply(message: bytes) -> bytes:
        backlog.append(done + len(backlog) - mux.stats().send_calls)
        return message

    size = 16 if mux.backend == "epoll" else 1
    groups = [i % size for i in range(40)]
    for _ in range(20):  # on a busy machine, the turn's bound of 3 ms may end it amid a group
        del backlog[:]
        done = mux.stats().send_calls
        handler = Recorder(reply=reply)
        socks = ready_together(mux, listen(handler), handler, 40)
        mux.poll(0)
        in_one_turn = len(backlog) == 40
        until(mux, lambda: len(backlog) == 40)
        assert replies(socks) == [b"request"] * 40
        assert max(backlog) == size - 1
        if in_one_turn:
            break
    assert backlog == groups


@pytest.mark.parametrize("busy", [0, 3])
def test_a_greeting_goes_out_though_the_client_says_nothing(mux: muxcore.Mux, listen: Listen, busy: int) -> None:
    """The listener's event may be in a group of others; an accepted connection is in none."""

    class Greeter(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            super().on_open(conn)
            conn.send(b"220 hello")

    handler = Greeter(reply=lambda message: message)
    listener = listen(handler)
    socks = [client(listener) for _ in range(busy)]
    for sock in socks:
        assert receive(mux, sock, 9) == b"220 hello"
        sock.sendall(b"request")
    socks += [client(listener) for _ in range(3)]
    until(mux, lambda: len(handler.connections) == len(socks))
    assert replies(socks) == [b"request"] * busy + [b"220 hello"] * 3


def test_a_reply_does_not_wait_because_others_send_to_its_client_too(mux: muxcore.Mux, listen: Listen) -> None:
    """What others send goes out at the end of the batch; what is there when its group is done goes with the reply."""
    first: list[muxcore.Connection] = []
    unsent: list[int] = []

    def to_the_first(conn: muxcore.Connection, message: bytes) -> None:
        if not unsent:
            first[:] = [conn]
        conn.send(b"answer")
        first[0].send(b"more")
        unsent.append(first[0].outbox_size)

    handler = Recorder()
    handler.on_message = to_the_first  # type: ignore[method-assign]
    socks = served_in_one_turn(mux, listen(handler), handler, 20, unsent)
    behind = [*range(10, 74, 4), 4, 8, 12, 16] if mux.backend == "epoll" else [10, *range(4, 80, 4)]
    assert unsent == behind
    assert {reply[:6] for reply in replies(socks)} == {b"answer"}


def test_replies_to_full_reads_do_not_wait_for_the_group(backend: str) -> None:
    """Before the next read, the replies to the last one are sent, and may have paused or ended the connection."""
    calls = []
    with muxcore.Mux(backend=backend, read_size=1024) as mux:
        handler = Recorder()

        def acknowledge(conn: muxcore.Connection, message: bytes) -> None:
            calls.append(mux.stats().send_calls)
            conn.write(b"ok")

        handler.on_message = acknowledge  # type: ignore[method-assign]
        listener = mux.listen(LOCALHOST, handler, framer=muxcore.Fixed(1024))
        sock, _ = opened(mux, lambda handler: listener, handler)
        sock.sendall(bytes(3 * 1024))
        assert receive(mux, sock, 6) == b"ok" * 3
        sock.close()
    assert calls == [0, 1, 2]


def test_what_is_watched_is_part_of_a_group(mux: muxcore.Mux, listen: Listen) -> None:
    """A reply does not wait for many callbacks of other descriptors, either."""
    order: list[object] = []

    def reply(conn: muxcore.Connection, message: bytes) -> None:
        order.append(message)
        conn.send(message)

    handler = Recorder()
    handler.on_message = reply  # type: ignore[method-assign]
    socks = ready_together(mux, listen(handler), handler, 1)
    pairs = [socket.socketpair() for _ in range(40)]
    for one, other in pairs:
        mux.add_reader(one, lambda one: order.append((one.recv(1), mux.stats().send_calls)), one)
        other.sendall(b"x")
    while len(order) < 41:
        mux.poll(1)
    assert order.index(b"request") < 16 or mux.backend != "epoll", "the first that was ready"
    assert order[order.index(b"request") :].count((b"x", 0)) < 16
    assert replies(socks) == [b"request"]
    for one, other in pairs:
        mux.remove_reader(one)
        one.close()
        other.close()


def test_flush_in_a_handler_does_not_wait_for_the_group(mux: muxcore.Mux, listen: Listen) -> None:
    calls = []

    def flush(conn: muxcore.Connection, message: bytes) -> None:
        conn.send(message)
        assert (conn.flush(), conn.outbox_size) == (0, 0)
        calls.append(mux.stats().send_calls)

    handler = Recorder()
    handler.on_message = flush  # type: ignore[method-assign]
    socks = ready_together(mux, listen(handler), handler, 3)
    until(mux, lambda: len(calls) == 3)
    assert calls == [1, 2, 3]
    assert replies(socks) == [b"request"] * 3


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_does_not_keep_the_replies_of_a_group(
    mux: muxcore.Mux, listen: Listen, exception: type[BaseException]
) -> None:
    """The replies of the handlers before it go out; those of the handlers behind it follow."""
    calls = 0

    def interrupted(conn: muxcore.Connection, message: bytes) -> None:
        nonlocal calls
        calls += 1
        conn.send(b"%d" % calls)
        if calls == 3:
            raise exception

    handler = Recorder()
    handler.on_message = interrupted  # type: ignore[method-assign]
    socks = ready_together(mux, listen(handler), handler, 4)
    with pytest.raises(exception):
        settle(mux)
    assert mux.stats().send_calls >= 2
    settle(mux)
    assert sorted(replies(socks)) == [b"1", b"2", b"3", b"4"]


def test_an_interrupt_while_a_reply_is_sent_keeps_none(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise handler-raises: Ctrl-C may come between any two lines of the fallback."""
    if mux.backend == "epoll":
        pytest.skip("the compiled core runs no signal handler there")
    handler = Recorder(reply=lambda message: message)
    socks = ready_together(mux, listen(handler), handler, 4)
    sends = 0

    def interrupt_the_second(frame: types.FrameType, event: str, arg: object) -> None:
        nonlocal sends
        sends += frame.f_code.co_name == "_send_out"
        if sends == 2:
            sys.settrace(None)
            raise KeyboardInterrupt

    tracer = sys.gettrace()
    sys.settrace(interrupt_the_second)
    try:
        with pytest.raises(KeyboardInterrupt):
            settle(mux)
    finally:
        sys.settrace(tracer)
    settle(mux)
    assert replies(socks) == [b"request"] * 4


def test_a_connection_that_ended_in_its_group_is_left_alone(mux: muxcore.Mux, listen: Listen) -> None:
    """Its descriptor may be another's by then."""
    calls: list[muxcore.Connection] = []
    ours, theirs = socket.socketpair()

    def abort_the_first(conn: muxcore.Connection, message: bytes) -> None:
        conn.send(message)
        calls.append(conn)
        if len(calls) == 2:
            number = calls[0].fileno()
            calls[0].abort()
            assert mux.attach(ours.dup(), Recorder()).fileno() == number or mux.backend != "epoll"

    handler = Recorder()
    handler.on_message = abort_the_first  # type: ignore[method-assign]
    socks = ready_together(mux, listen(handler), handler, 3)
    settle(mux)
    by_peer = {sock.getsockname(): sock for sock in socks}
    gone = by_peer.pop(calls[0].peer)
    if mux.backend != "epoll":  # it has no groups
        assert gone.recv(100) == b"request"
    with pytest.raises(ConnectionResetError):
        gone.recv(100)
    gone.close()
    assert replies(list(by_peer.values())) == [b"request"] * 2
    with pytest.raises(BlockingIOError):
        theirs.recv(100, socket.MSG_DONTWAIT)
    ours.close()
    theirs.close()


def test_a_mutable_buffer_is_copied_before_send_returns(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise buffers."""
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    buffer = bytearray(b"x" * 5000)
    conn.send(buffer)
    buffer[:] = b"y" * 5000
    conn.send(memoryview(b"z"))
    assert receive(mux, sock, 5001) == b"x" * 5000 + b"z"
    sock.close()


def test_output_queued_outside_callbacks_goes_out_with_the_next_poll(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    assert conn.send(b"hello")
    assert (conn.outbox_size, mux.stats().send_calls) == (5, 0)
    mux.poll(0)
    assert (conn.outbox_size, mux.stats().send_calls) == (0, 1)
    assert sock.recv(10) == b"hello"
    sock.close()


def test_flush_sends_now(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    conn.send(b"now")
    assert conn.flush() == 0
    assert sock.recv(10) == b"now"
    sock.close()


def test_a_driven_mux_keeps_nothing_back(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    if not can_be_driven(mux):
        sock.close()
        return
    conn.send(b"now")
    assert sock.recv(10) == b"now"
    sock.close()


def can_be_driven(mux: muxcore.Mux) -> bool:
    """Only epoll has a descriptor that reports the readiness of all."""
    if mux.backend == "epoll":
        return mux.fileno() >= 0
    with pytest.raises(ValueError, match=f"the {mux.backend} backend has no descriptor"):
        mux.fileno()
    return False


def test_a_driven_mux_is_readable_while_there_is_work_left(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise driven-from-outside: its descriptor is readable whenever poll(0) would do something."""
    one, conn = opened(mux, listen, Recorder())
    if not can_be_driven(mux):
        one.close()
        return
    ran: list[int] = []
    mux.call_soon(lambda: mux.call_soon(ran.append, 1))
    while not ran:
        assert select.select([mux.fileno()], [], [], 5)[0]
        mux.poll(0)
    conn.close()
    one.close()
    while not conn.closed:
        assert select.select([mux.fileno()], [], [], 5)[0]
        mux.poll(0)


def test_a_subclass_of_bytes_is_copied(mux: muxcore.Mux, listen: Listen) -> None:
    """Its finalizer could otherwise run in the middle of taking it off the outbox, and flush again."""
    sock, conn = opened(mux, listen, Recorder())

    class Meddling(bytes):
        def __del__(self) -> None:
            conn.flush()

    mux.call_soon(lambda: (conn.send(Meddling(b"a" * 2000)), conn.send(b"b" * 2000)))
    assert receive(mux, sock, 4000) == b"a" * 2000 + b"b" * 2000
    turns(mux, 0.02)
    assert conn.outbox_size == 0
    sock.close()


# --- Promises water-marks, max-outbox, autopause ---------------------------------------------------


def test_send_returns_false_above_high_and_drain_comes_once(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder, half_open=True)
    sent = 0
    while conn.send(bytes(50_000)):
        sent += 50_000
    sent += 50_000
    assert conn.outbox_size > conn.limits.high
    assert recorder.count("drain") == 0
    receive(mux, sock, sent)
    until(mux, lambda: recorder.count("drain"))
    assert conn.outbox_size <= conn.limits.low
    turns(mux, 0.05)
    sock.shutdown(socket.SHUT_WR)  # something else happens to it
    until(mux, lambda: conn.eof)
    turns(mux, 0.05)
    assert recorder.count("drain") == 1
    assert mux.stats().high_water_hits == 1
    sock.close()


def test_autopause_stops_reading_from_a_peer_that_does_not_read(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise autopause: memory stays bounded however much a peer sends that never reads."""
    recorder = echo()
    sock, conn = opened(mux, listen, recorder)
    sent = stuff(mux, sock)
    assert not conn.is_reading()
    assert conn.outbox_size <= conn.limits.high + 65536
    assert receive(mux, sock, sent) == bytes(sent)
    assert conn.is_reading()
    sock.close()


def test_without_autopause_reading_goes_on(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = echo()
    sock, conn = opened(mux, listen, recorder, limits=muxcore.Limits(autopause=False, max_outbox=1 << 30))
    push(mux, sock, bytes(20 << 20))
    until(mux, lambda: len(recorder.received()) == 20 << 20)
    assert conn.outbox_size > conn.limits.high
    reset(sock)
    until(mux, lambda: recorder.count("close"))


@pytest.mark.parametrize("overflow", ["close", "drop", "raise"])
def test_max_outbox_closes_drops_or_raises_as_overflow_says(mux: muxcore.Mux, listen: Listen, overflow: Any) -> None:
    recorder = Recorder()
    limits = muxcore.Limits(max_outbox=1 << 20, high=1 << 19, overflow=overflow)
    sock, conn = opened(mux, listen, recorder, limits=limits)
    while conn.outbox_size < 1 << 20:
        conn.send(bytes(100_000))
    queued = conn.outbox_size
    if overflow == "raise":
        with pytest.raises(muxcore.OutboxFull, match="max_outbox is 1048576") as caught:
            conn.send(b"x")
        assert (caught.value.conn, caught.value.limit) == (conn, 1 << 20)
    else:
        assert conn.send(b"x") is False
        assert mux.stats().drops == 1
    assert conn.closed == (overflow == "close")
    if overflow == "close":
        until(mux, lambda: recorder.count("close"))
        assert isinstance(recorder.reason(), muxcore.OutboxFull)
    else:
        assert conn.outbox_size == queued
    sock.close()


def test_sending_on_a_closed_connection_is_false_and_counted(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise send-never-raises."""
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.close()
    assert conn.send(b"late") is False
    sock.close()
    until(mux, lambda: conn.closed)
    assert conn.send(b"later") is False
    assert mux.stats().drops == 2


def test_limits_can_be_changed_for_one_connection(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    listener = listen(recorder)
    with client(listener), client(listener):
        until(mux, lambda: len(recorder.connections) == 2)
        one, two = recorder.connections
        one.set_limits(high=10, low=0)
        assert (one.limits.high, two.limits.high) == (10, 65536)
        with pytest.raises(ValueError, match="low must be <= high"):
            one.set_limits(low=11)
        assert one.limits.low == 0
        with pytest.raises(TypeError, match=r"limits must be a muxcore\.Limits"):
            one.limits = 5


# --- Promise bounded-inbox -------------------------------------------------------------------------


def test_paused_connection_gets_no_message_until_resumed(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise pause."""
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.pause_reading()
    sock.sendall(b"wait")
    turns(mux, 0.05)
    assert recorder.received() == b""
    conn.resume_reading()
    until(mux, lambda: recorder.received() == b"wait")
    sock.close()


def test_pause_inside_a_handler_stops_the_reads_of_the_same_turn(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    recorder.on_message = lambda conn, message: (  # type: ignore[method-assign]
        recorder.events.append(("message", conn.id, message)),
        conn.pause_reading(),
    )
    sock, _conn = opened(mux, listen, recorder)
    push(mux, sock, bytes(200_000))
    turns(mux, 0.05)
    assert recorder.count("message") == 1
    sock.close()


def test_a_flood_does_not_exceed_its_read_budget(backend: str) -> None:
    """Promises fair-reads, level-triggered: one batch reads at most read_budget bytes of one connection; the rest is
    reported again."""
    recorder = Recorder()
    with muxcore.Mux(backend=backend, read_size=4096, read_budget=16384) as mux:
        sock = client(mux.listen(("127.0.0.1", 0), recorder))
        until(mux, lambda: recorder.connections)
        sock.sendall(bytes(100_000))
        while len(recorder.received()) < 100_000:
            before = len(recorder.received())
            mux.poll(1)
            assert len(recorder.received()) - before <= 16384
        sock.close()


@pytest.mark.parametrize(("high", "sizes"), [(6000, [4096, 10_096]), (1000, [4096, 5096, 5000])])
def test_a_full_read_is_followed_by_another_in_the_same_turn(high: int, sizes: list[int]) -> None:
    """Promise fair-reads: but not for so much that an echo of it went further above the high-water mark than by
    read_size."""
    if "epoll" not in BACKENDS:
        pytest.skip("the compiled core is missing")
    recorder = Recorder()
    with muxcore.Mux(backend="epoll", read_size=4096, read_budget=16384) as mux:
        sock = client(mux.listen(LOCALHOST, recorder, limits=muxcore.Limits(high=high, low=500)))
        until(mux, lambda: recorder.connections)
        sock.sendall(bytes(14_192))
        mux.poll(1)
        assert [len(message) for message in recorder.messages()] == sizes
        sock.close()


# --- Promise close-loses-nothing -------------------------------------------------------------------


def test_close_delivers_everything_accepted_before_it(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    data = pattern(BIG)
    conn.send(data)
    conn.close()
    assert (conn.closing, conn.closed) == (True, False)
    assert receive(mux, sock) == data
    sock.close()
    until(mux, lambda: conn.closed)
    assert recorder.reason() is None


def test_close_while_input_is_still_arriving_loses_nothing(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise close-loses-nothing: close(2) with unread input would send RST and destroy the output."""
    data = pattern(BIG)

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        conn.send(data)
        conn.close()

    with client(listen(handler)) as sock:
        stop = threading.Event()

        def keep_sending() -> None:
            try:
                while not stop.is_set():
                    sock.sendall(bytes(10_000))
            except OSError:
                pass

        sender = threading.Thread(target=keep_sending)
        sender.start()
        got = bytearray()
        reader = threading.Thread(target=lambda: got.extend(read_slowly(sock, len(data))))
        reader.start()
        until(mux, lambda: not reader.is_alive())
        stop.set()
        until(mux, lambda: not sender.is_alive())
    assert got == data


def read_slowly(sock: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size and (data := sock.recv(4096)):
        got += data
    return bytes(got)


def test_no_message_after_close(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    recorder.on_message = lambda conn, message: (  # type: ignore[method-assign]
        recorder.events.append(("message", conn.id, message)),
        conn.close(),
    )
    sock, conn = opened(mux, listen, recorder)
    push(mux, sock, bytes(300_000))
    sock.close()
    until(mux, lambda: conn.closed)
    assert recorder.count("message") == 1


def test_linger_ends_with_a_peer_that_never_closes(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder, timeouts=muxcore.Timeouts(linger=0.05))
    conn.close()
    until(mux, lambda: conn.closed)
    assert recorder.reason() is None
    assert sock.recv(1) == b""
    sock.close()


def test_a_closing_connection_whose_peer_reads_nothing_times_out(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder, timeouts=muxcore.Timeouts(write=0.1))
    conn.send(bytes(12 << 20))
    conn.close()
    until(mux, lambda: conn.closed)
    assert isinstance(recorder.reason(), muxcore.WriteTimeout)
    assert mux.stats().unsent == 1
    sock.close()


@pytest.mark.linux_only("elsewhere no call returns what a socket has not sent yet")
def test_linger_goes_on_while_the_peer_reads_what_the_kernel_holds(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise close-loses-nothing: the output is in the kernel's send buffer long before a slow peer has it, and its
    input keeps coming."""
    data = pattern(1 << 20)
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder, timeouts=muxcore.Timeouts(linger=1.0))
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    conn.send(data)
    conn.close()
    got = bytearray()
    with nonblocking(sock):
        while len(got) < len(data):
            sock.send(b"more input")
            try:
                got += sock.recv(16 << 10)
            except BlockingIOError:
                pass
            turns(mux, 0.02)
    assert got == data
    until(mux, lambda: conn.closed)  # the peer has everything, and does not close
    sock.close()


def test_the_error_of_a_send_is_the_reason(mux: muxcore.Mux, listen: Listen) -> None:
    """The system reports a reset once: recv, afterwards, reports an end only."""
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.pause_reading()
    turns(mux, 0.02)
    reset(sock)
    conn.send(b"x")
    conn.flush()
    conn.resume_reading()
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), ConnectionError)


def test_what_abort_drops_is_not_held_any_more(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.send(bytes(16 << 20))
    with Path(__file__).open("rb") as file:
        conn.sendfile(file)
    assert conn.outbox_size > 0
    conn.abort()
    until(mux, lambda: recorder.count("close"))
    assert conn.outbox_size == 0
    assert mux.stats().unsent == 1
    sock.close()


def test_abort_resets(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise abort."""
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.abort()
    assert conn.closed
    assert recorder.count("close") == 0, "no method calls a callback"
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    until(mux, lambda: recorder.count("close"))
    assert recorder.reason() is None
    sock.close()


def test_the_twelve_megabyte_test(mux: muxcore.Mux, listen: Listen) -> None:
    """A peer that reads slowly while it sends, and half-closes when it has sent, gets every byte back; the server's
    memory is bounded by its high-water mark all the time."""
    recorder = Recorder(reply=lambda message: message)
    recorder.events = type("Forgetful", (list,), {"append": lambda self, item: None})()
    listener = listen(recorder)
    data = pattern(12 << 20)
    largest = 0
    with client(listener, rcvbuf=4096) as sock, nonblocking(sock):
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        view, got = memoryview(data), bytearray()
        while True:
            if view:
                try:
                    view = view[sock.send(view[:100_000]) :]
                except BlockingIOError:
                    pass
                if not view:
                    sock.shutdown(socket.SHUT_WR)
            mux.poll(0)
            largest = max(largest, conn.outbox_size + conn.inbox_size)
            try:
                piece = sock.recv(20_000)
            except BlockingIOError:
                continue
            if not piece:
                break
            got += piece
    assert got == data
    assert largest <= 65536 + 65536


@pytest.mark.parametrize("thread", [False, True])
def test_close_passes_its_reason_to_on_close(mux: muxcore.Mux, listen: Listen, thread: bool) -> None:
    sock, conn = opened(mux, listen, recorder := Recorder())
    reason = LookupError("no such user")
    conn.send(b"goodbye")
    if thread:
        other = threading.Thread(target=conn.close, args=(reason,))
        other.start()
        other.join()
    else:
        conn.close(reason)
    assert receive(mux, sock) == b"goodbye"
    conn.close(ValueError("too late"))
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.reason() is conn.error is reason


@pytest.mark.parametrize("reason", ["text", ValueError, 0])
def test_a_reason_that_is_no_exception_is_refused(mux: muxcore.Mux, listen: Listen, reason: Any) -> None:
    sock, conn = opened(mux, listen, Recorder())
    with pytest.raises(TypeError, match="reason must be an exception or None, not"):
        conn.close(reason)
    assert not conn.closing
    sock.close()


def test_a_reason_keeps_its_traceback(mux: muxcore.Mux, listen: Listen) -> None:
    """The code that closes may be about to log it, or to raise it again."""
    sock, conn = opened(mux, listen, Recorder())
    with pytest.raises(LookupError) as caught:
        raise LookupError("no such user")
    conn.close(caught.value)
    assert caught.value.__traceback__ is not None
    caught.value.__traceback__ = None
    sock.close()


def test_a_reason_keeps_the_handlers_frames_until_on_close_has_returned(mux: muxcore.Mux, listen: Listen) -> None:
    class Large(bytearray):
        pass

    class Closes(muxcore.Handler):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            of_handler = Large(message)
            kept.extend((weakref.ref(of_handler), weakref.ref(conn)))
            try:
                int("x")
            except ValueError as error:
                conn.close(error)

        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            assert exc is not None
            tracebacks.append(exc.__traceback__ is not None)
            reasons.append(exc)

    kept: list[weakref.ref[Any]] = []
    tracebacks: list[bool] = []
    reasons: list[BaseException] = []
    sock = client(listen(Closes()))
    gc.collect()
    gc.disable()
    try:
        sock.sendall(b"x")
        until(mux, lambda: kept)
        sock.close()
        until(mux, lambda: tracebacks)
        settle(mux)
        assert tracebacks == [True]
        assert [each() for each in kept] == [None, None]
        assert reasons[0].__traceback__ is None
    finally:
        gc.enable()


def test_a_connection_that_is_closed_for_the_timeout_of_another_loses_nothing(
    mux: muxcore.Mux, listen: Listen
) -> None:
    """Promise close-loses-nothing: only its own timeout ends it without a linger."""
    timeout = muxcore.IdleTimeout("no message received for 60 s")
    sock, conn = opened(mux, listen, recorder := Recorder(), timeouts=muxcore.Timeouts(linger=0.3))
    conn.send(b"goodbye")
    conn.close(timeout)
    assert receive(mux, sock) == b"goodbye"
    turns(mux, 0.1)
    assert not conn.closed
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.reason() is timeout


# --- Promise half-close ----------------------------------------------------------------------------


def test_eof_closes_after_the_flush_by_default(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = echo()
    sock, conn = opened(mux, listen, recorder)
    sock.sendall(b"last words")
    sock.shutdown(socket.SHUT_WR)
    assert receive(mux, sock) == b"last words"
    until(mux, lambda: conn.closed)
    assert conn.eof
    assert recorder.names() == ["open", "message", "close"]
    assert recorder.reason() is None
    sock.close()


class Late(Recorder):
    """Replies only once the peer has finished."""

    def on_eof(self, conn: muxcore.Connection) -> None:
        self.events.append(("eof", conn.id, None))
        conn.send(b"reply to " + self.received())


def test_a_handler_with_on_eof_may_go_on_sending(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Late()
    sock, conn = opened(mux, listen, recorder)
    sock.sendall(b"request")
    sock.shutdown(socket.SHUT_WR)
    assert receive(mux, sock, 16) == b"reply to request"
    assert turns(mux, 0.05) == 0, "a half-open connection does not spin"
    assert not conn.closing
    conn.close()
    assert receive(mux, sock) == b""
    until(mux, lambda: conn.closed)
    assert recorder.names() == ["open", "message", "eof", "close"]
    sock.close()


def test_half_open_keeps_the_connection_of_a_plain_handler(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder, half_open=True)
    sock.shutdown(socket.SHUT_WR)
    until(mux, lambda: conn.eof)
    conn.send(b"still here")
    assert receive(mux, sock, 10) == b"still here"
    conn.close()
    until(mux, lambda: conn.closed)
    sock.close()


def test_write_eof_sends_a_fin_after_the_output_and_input_goes_on(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.send(pattern(BIG))
    conn.write_eof()
    assert conn.send(b"refused") is False
    assert receive(mux, sock) == pattern(BIG)
    sock.sendall(b"answer")
    until(mux, lambda: recorder.received() == b"answer")
    assert not conn.closing
    sock.close()
    until(mux, lambda: conn.closed)
    assert recorder.reason() is None


def test_input_sent_before_the_peers_reset_is_still_delivered(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise peer-gone: a failed send does not throw away what was received."""
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.pause_reading()
    turns(mux, 0.01)
    sock.sendall(b"goodbye")
    sock.close()
    until(mux, lambda: True)
    conn.send(b"x")  # the peer's kernel replies with RST
    conn.flush()
    conn.send(b"y")
    conn.resume_reading()
    until(mux, lambda: conn.closed)
    assert recorder.received() == b"goodbye"


# --- Promises exactly-once, handler-raises ---------------------------------------------------------


@pytest.mark.parametrize("end", ["fin", "reset", "close", "abort", "raise", "mux", "detach"])
def test_open_and_close_come_exactly_once(backend: str, end: str, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    caplog.set_level(logging.CRITICAL)
    with muxcore.Mux(backend=backend) as mux:
        sock = client(mux.listen(("127.0.0.1", 0), recorder))
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        if end == "fin":
            sock.close()
        elif end == "reset":
            reset(sock)
        elif end == "raise":
            recorder.reply = lambda message: b"" * (1 // 0)
            sock.sendall(b"x")
            sock.close()
        elif end == "mux":
            mux.close()
        else:
            returned = getattr(conn, end)()
            if end == "detach":
                returned.close()
            sock.close()
        if end != "mux":
            until(mux, lambda: recorder.count("close"))
        sock.close()
    assert [name for name in recorder.names() if name != "message"] == ["open", "close"]
    reason = recorder.reason()
    assert isinstance(reason, {"reset": ConnectionResetError, "raise": ZeroDivisionError}.get(end, type(None)))
    assert conn.error is reason
    assert conn.peer[0] == "127.0.0.1"


def test_a_reset_after_data_delivers_the_data_first(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    sock.sendall(b"data")
    reset(sock)
    until(mux, lambda: conn.closed)
    assert recorder.names() == ["open", "message", "close"]
    assert isinstance(recorder.reason(), ConnectionResetError)


@pytest.mark.parametrize("method", ["on_open", "on_message", "on_drain", "on_eof", "on_close"])
def test_a_handler_that_raises_loses_its_connection_only(
    mux: muxcore.Mux, listen: Listen, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(Recorder):
        def on_eof(self, conn: muxcore.Connection) -> None:
            conn.close()

    faulty = Faulty(reply=lambda message: message)
    setattr(faulty, method, lambda *args: 1 / 0)
    bystander, other = client(listen(echo())), client(listen(faulty))
    assert exchange(mux, bystander, b"before") == b"before"
    if method == "on_drain":
        sent = stuff(mux, other)
        receive(mux, other, sent)
    elif method != "on_open":
        other.sendall(b"x")
        other.shutdown(socket.SHUT_WR)
    until(mux, lambda: mux.stats().handler_errors)
    assert exchange(mux, bystander, b"after") == b"after"
    other.close()
    until(mux, lambda: mux.stats().connections == 1)
    assert mux.stats().handler_errors == 1
    [record] = [record for record in caplog.records if record.name == "muxcore"]
    assert "ZeroDivisionError" in (record.exc_text or "")
    if method != "on_close":
        assert isinstance(faulty.reason(), ZeroDivisionError)
    bystander.close()


def test_what_a_handler_sent_before_it_raised_arrives(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(conn: muxcore.Connection, message: bytes) -> None:
        conn.send(pattern(BIG))
        raise ValueError("my mistake")

    with client(listen(handler)) as sock:
        sock.sendall(b"x")
        assert receive(mux, sock) == pattern(BIG)


def test_keyboard_interrupt_leaves_poll_and_the_mux_goes_on(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise handler-raises: nothing that was queued or reported is lost on the way out."""
    recorder = echo()
    messages: list[bytes] = []

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        messages.append(message)
        conn.send(message)
        if message == b"interrupt":
            raise KeyboardInterrupt

    sock, bystander = client(listen(handler)), client(listen(recorder))
    until(mux, lambda: mux.stats().connections == 2)
    sock.sendall(b"interrupt")
    bystander.sendall(b"hello")
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    assert receive(mux, sock, 9) == b"interrupt"
    assert receive(mux, bystander, 5) == b"hello"
    assert exchange(mux, sock, b"again") == b"again"
    assert messages == [b"interrupt", b"again"]
    sock.close()
    bystander.close()


def test_a_handler_blames_the_peer_with_a_frame_error(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise handler-raises: what a peer sends is no fault of the server's, which logs none."""

    class Strict(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            conn.send(b"what was that?")
            raise muxcore.FrameError("no such command")

    sock, _conn = opened(mux, listen, recorder := Strict())
    sock.sendall(b"x")
    assert receive(mux, sock) == b"what was that?"
    sock.close()
    until(mux, lambda: recorder.count("close"))
    reason = recorder.reason()
    assert isinstance(reason, muxcore.FrameError)
    assert reason.__traceback__ is None
    assert mux.stats().handler_errors == 0
    assert caplog.records == []


# --- Promise re-entrancy ---------------------------------------------------------------------------


def test_any_connection_may_be_ended_from_any_callback(mux: muxcore.Mux, listen: Listen) -> None:
    """Twenty connections become readable in one batch; the first to be served ends all others."""
    ended: list[int] = []

    class Killer(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            for i, other in enumerate(self.connections):
                if other is not conn:
                    ended.append(other.id)
                    other.abort() if i % 2 else other.close()

    killer = Killer()
    listener = listen(killer)
    socks = [client(listener) for _ in range(20)]
    until(mux, lambda: len(killer.connections) == 20)
    for sock in socks:
        sock.sendall(b"x")
    mux.poll(1)
    for sock in socks:
        sock.close()
    until(mux, lambda: killer.count("close") == 20)
    assert killer.count("message") == 1
    assert len(ended) == 19


@pytest.mark.unix_only("the lowest free descriptor is the next one")
def test_a_stale_event_never_reaches_the_socket_that_reuses_the_descriptor(
    mux: muxcore.Mux, listen: Listen
) -> None:
    """Promise stale-events: a callback closes a descriptor that has an event further on in the batch; a new socket
    gets its number."""
    ours, theirs = socket.socketpair()
    newcomer = Recorder()
    reused: list[int] = []

    class Swap(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            if self.count("message") == 1:
                [victim] = [other for other in self.connections if other is not conn]
                number = victim.fileno()
                victim.abort()
                fresh = ours.dup()  # gets the lowest free number: the victim's
                assert fresh.fileno() == number
                reused.append(mux.attach(fresh, newcomer).fileno())

    swap = Swap()
    listener = listen(swap)
    socks = [client(listener) for _ in range(2)]
    until(mux, lambda: len(swap.connections) == 2)
    for sock in socks:
        sock.sendall(b"event")
    until(mux, lambda: reused)
    turns(mux, 0.05)
    assert mux.stats().stale_events == 1
    assert swap.count("message") == 1
    assert newcomer.names() == ["open"]
    theirs.sendall(b"mine")
    until(mux, lambda: newcomer.received() == b"mine")
    for sock in [*socks, ours, theirs]:
        sock.close()
    until(mux, lambda: newcomer.count("close"))


# --- Promise no-spin -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["fin", "reset"])
def test_a_paused_connection_whose_peer_ends_does_not_spin(mux: muxcore.Mux, listen: Listen, ending: str) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.pause_reading()
    turns(mux, 0.01)
    sock.sendall(b"unread")
    if ending == "fin":
        sock.close()
    else:
        reset(sock)
    assert turns(mux, 0.1) <= 2
    if ending == "reset" and mux.backend != "select":  # an error ends it even while paused; select reports none
        assert isinstance(recorder.reason(), ConnectionResetError)
    else:
        conn.resume_reading()
        until(mux, lambda: conn.closed)
        assert recorder.received() == b"unread"
        assert isinstance(recorder.reason(), ConnectionResetError) == (ending == "reset")


def test_a_connection_that_another_one_pauses_in_its_batch_hears_of_a_reset(
    mux: muxcore.Mux, listen: Listen
) -> None:
    if mux.backend == "select":
        pytest.skip("select reports no error of a socket that is not read from")
    recorder = Recorder()

    def pause_the_other(conn: muxcore.Connection, message: bytes) -> None:
        for other in recorder.connections:
            if other is not conn:
                other.pause_reading()

    recorder.on_message = pause_the_other  # type: ignore[method-assign]
    listener = listen(recorder)
    socks = [client(listener) for _ in range(2)]
    until(mux, lambda: len(recorder.connections) == 2)
    for sock in socks:
        sock.sendall(b"x")
    until(mux, lambda: not all(conn.is_reading() for conn in recorder.connections))
    [paused] = [conn for conn in recorder.connections if not conn.is_reading()]
    reset(next(sock for sock in socks if sock.getsockname() == paused.peer))
    until(mux, lambda: paused.closed)
    assert isinstance(recorder.reason(), ConnectionResetError)
    for sock in socks:
        sock.close()


def test_a_connection_that_is_paused_and_resumed_in_one_turn_hears_of_its_end(mux: muxcore.Mux) -> None:
    first, second = Recorder(), Recorder()
    ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)

    def pause_the_second(conn: muxcore.Connection, message: bytes) -> None:
        second.connections[0].pause_reading()
        mux.call_soon(second.connections[0].resume_reading)

    first.on_message = pause_the_second  # type: ignore[method-assign]
    for sock, recorder in zip(ours, (first, second), strict=True):
        mux.attach(sock, recorder)
    until(mux, lambda: second.connections)
    theirs[0].sendall(b"x")
    theirs[1].sendall(b"last words")
    theirs[1].close()
    until(mux, lambda: second.count("close"))
    assert second.received() == b"last words"
    theirs[0].close()


def test_a_blocked_writer_does_not_spin(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    conn.send(bytes(12 << 20))
    turns(mux, 0.05)
    assert turns(mux, 0.1) <= 2
    assert conn.outbox_size > 0
    sock.close()


# --- the rest of the object ------------------------------------------------------------------------


def test_detach_gives_the_socket_away(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    with conn.detach() as mine:
        assert conn.closed
        mine.setblocking(True)
        sock.sendall(b"direct")
        assert mine.recv(10) == b"direct"
        until(mux, lambda: recorder.count("close"))
        assert recorder.reason() is None
        with pytest.raises(muxcore.ConnectionClosed, match="detach"):
            conn.detach()
    sock.close()


def test_detach_is_refused_while_output_is_unsent(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    conn.send(b"unsent")
    with pytest.raises(RuntimeError, match="6 bytes are unsent"):
        conn.detach()
    assert receive(mux, sock, 6) == b"unsent"
    sock.close()


def test_addresses_options_and_identity(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    assert conn.peer == sock.getsockname()
    assert conn.local == sock.getpeername()
    assert (conn.mux, conn.listener) == (mux, conn.listener)
    assert conn.listener is not None
    assert conn.listener.address == conn.local
    assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
    assert f"peer={conn.peer!r}" in repr(conn)
    conn.data = "mine"
    sock.close()
    until(mux, lambda: conn.closed)
    assert (conn.data, conn.local, conn.fileno()) == ("mine", None, -1)
    with pytest.raises(muxcore.ConnectionClosed):
        conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def test_connection_is_weakly_referenceable_final_and_not_made_by_hand(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    assert weakref.ref(conn)() is conn
    descriptors = open_fds()
    for cls in (muxcore.Connection, type(conn)):  # the fallback has its own
        for make in (cls, lambda cls=cls: cls.__new__(cls), lambda: copy.copy(conn)):
            with pytest.raises(TypeError):
                make()
    assert open_fds() == descriptors, "what was not made closes none"
    with pytest.raises(TypeError):
        type("Sub", (muxcore.Connection,), {})
    sock.close()


@pytest.mark.parametrize("message", ["text", 5, None, object()])
def test_a_message_that_is_not_bytes_like_is_refused(mux: muxcore.Mux, listen: Listen, message: Any) -> None:
    sock, conn = opened(mux, listen, Recorder())
    with pytest.raises(TypeError, match="message must be bytes-like"):
        conn.send(message)
    assert conn.outbox_size == 0
    sock.close()


@pytest.mark.unix_only("the lowest free descriptor is the next one")
def test_a_descriptor_closed_by_other_code_ends_its_connection(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, newcomer = Recorder(), Recorder()
    sock, conn = opened(mux, listen, recorder)
    os.close(conn.fileno())
    ours, theirs = socket.socketpair()  # ours reuses the number
    assert ours.fileno() == conn.fileno()
    mux.attach(ours, newcomer)
    until(mux, lambda: recorder.count("close"))
    assert "closed by other code" in str(recorder.reason())
    theirs.sendall(b"mine")
    until(mux, lambda: newcomer.received() == b"mine")
    sock.close()
    theirs.close()
    until(mux, lambda: newcomer.count("close"))


def test_errors_carry_their_errno(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, _conn = opened(mux, listen, recorder)
    reset(sock)
    until(mux, lambda: recorder.count("close"))
    reason = recorder.reason()
    assert isinstance(reason, OSError)
    assert reason.errno == errno.ECONNRESET


# --- what a review found ---------------------------------------------------------------------------


@pytest.mark.linux_only("a socket's error queue")
def test_a_time_stamp_is_not_an_error_and_does_not_spin(mux: muxcore.Mux, listen: Listen) -> None:
    """EPOLLERR also reports the socket's error queue, at every wait until that is read."""
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    so_timestamping, software = 37, 2 | 8 | 16
    conn.setsockopt(socket.SOL_SOCKET, so_timestamping, software)
    conn.send(b"x")
    assert turns(mux, 0.05) <= 3
    conn.pause_reading()
    conn.send(b"y")
    assert turns(mux, 0.05) <= 3
    assert recorder.names() == ["open"]
    sock.close()


@pytest.mark.parametrize("end", ["write_eof", "close"])
def test_an_end_after_an_unnoticed_reset_has_it_as_the_reason(mux: muxcore.Mux, listen: Listen, end: str) -> None:
    """shutdown fails with ENOTCONN then: what the peer sent before, and why it is over, only recv reports."""
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    sock.sendall(b"last words")
    reset(sock)
    getattr(conn, end)()
    until(mux, lambda: conn.closed)
    assert recorder.received() == (b"last words" if end == "write_eof" else b"")
    assert isinstance(recorder.reason(), ConnectionResetError)


@pytest.mark.parametrize("handler", ["push", "pull"])
@pytest.mark.unix_only("a Unix peer may end one direction alone")
def test_a_peer_that_reads_no_more_ends_the_connection_after_its_last_words(
    mux: muxcore.Mux, handler: str
) -> None:
    """No later event would report an end: the peer is neither gone nor has it sent a FIN."""
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder if handler == "push" else None)
    turns(mux, 0.02)
    theirs.sendall(b"last words")
    theirs.shutdown(socket.SHUT_RD)
    conn.send(b"x")
    conn.flush()
    assert not conn.send(b"y"), "it would be lost"
    assert mux.stats().drops == 1
    until(mux, lambda: conn.closed)
    assert isinstance(conn.error, BrokenPipeError)
    assert (recorder.received() if handler == "push" else conn.recv()) == b"last words"
    theirs.close()


@pytest.mark.parametrize("what", ["send", "write_eof"])
def test_a_paused_connection_whose_output_failed_ends(mux: muxcore.Mux, listen: Listen, what: str) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.pause_reading()
    turns(mux, 0.02)
    sock.sendall(b"unread")
    reset(sock)
    if what == "send":
        conn.send(b"x")
        conn.flush()
    else:
        conn.write_eof()
    until(mux, lambda: recorder.count("close"))
    assert recorder.received() == b""
    if what == "send":
        assert isinstance(recorder.reason(), ConnectionError)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_paused_connection_that_is_shut_on_both_sides_does_not_spin(
    mux: muxcore.Mux, listen: Listen, kind: str
) -> None:
    """poll reports the hang-up, whatever events it waits for."""
    recorder = Recorder()
    if kind == "tcp":
        sock, conn = opened(mux, listen, recorder)
        conn.write_eof()
    else:
        ours, sock = socket.socketpair()
        conn = mux.attach(ours, recorder)
    conn.pause_reading()
    turns(mux, 0.02)
    sock.close()
    assert turns(mux, 0.1) <= 2
    conn.resume_reading()
    until(mux, lambda: recorder.count("close"))


def test_in_on_close_the_connection_is_closing(mux: muxcore.Mux, listen: Listen) -> None:
    seen: list[tuple[bool, bool]] = []
    recorder = Recorder()
    recorder.on_close = lambda conn, exc: seen.append((conn.closing, conn.closed))  # type: ignore[method-assign]
    sock, _ = opened(mux, listen, recorder)
    reset(sock)
    until(mux, lambda: seen)
    assert seen == [(True, True)]


def test_a_connection_says_how_it_is(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    seen = [repr(conn)]
    conn.send(bytes(12 << 20))
    conn.close()
    seen.append(repr(conn))
    conn.abort()
    seen.append(repr(conn))
    assert [text.split()[2].rstrip(",") for text in seen] == ["open", "closing", "closed"]
    sock.close()


@pytest.mark.parametrize("method", ["send_many", "writelines"])
def test_send_many_says_whether_it_is_below_high(mux: muxcore.Mux, listen: Listen, method: str) -> None:
    sock, conn = opened(mux, listen, Recorder())
    send_many = getattr(conn, method)
    assert send_many([b"a", b"b"]) is True
    assert send_many([b"a", bytes(12 << 20)]) is False
    assert send_many([]) is False
    sock.close()


def test_a_pause_is_counted_once(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    assert not conn.send(bytes(12 << 20))
    for _ in range(2):
        assert not conn.send(b"x")
    assert mux.stats().high_water_hits == 1
    sock.close()


def test_what_does_not_fit_behind_a_foreign_close_costs_nothing_before_it(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    size = 12 << 20
    sock, conn = opened(mux, listen, recorder, limits=muxcore.Limits(max_outbox=size // 2))
    conn.send(bytes(size))
    thread = threading.Thread(target=conn.close)
    thread.start()
    thread.join()
    assert not conn.send(b"too much")
    assert receive(mux, sock) == bytes(size)
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.reason() is None


def test_an_overflow_in_another_thread_leaves_the_end_to_the_mux(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder, limits=muxcore.Limits(max_outbox=1 << 20))
    conn.send(bytes(12 << 20))
    seen: list[tuple[bool, bool, bool]] = []
    thread = threading.Thread(target=lambda: seen.append((conn.send(b"x"), conn.closing, conn.closed)))
    thread.start()
    thread.join()
    assert seen == [(False, True, False)]
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.OutboxFull)
    sock.close()


def test_a_handler_without_on_message_discards_messages_without_error(mux: muxcore.Mux, listen: Listen) -> None:
    class Deaf(muxcore.Handler):
        on_message = on_messages = None  # type: ignore[assignment]

    for framer in (None, muxcore.Lines()):
        before = mux.stats().bytes_in
        with client(listen(Deaf(), framer=framer)) as sock:
            sock.sendall(b"one\ntwo\n")
            until(mux, lambda before=before: mux.stats().bytes_in == before + 8)
            turns(mux, 0.02)
            assert len(mux.connections) == 1
        until(mux, lambda: not mux.stats().connections)
    assert mux.stats().handler_errors == 0


def test_on_open_comes_first_however_long_the_turn_lasts(mux: muxcore.Mux) -> None:
    """A long turn ends early, and the next turn handles the rest first."""

    class Slow(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            super().on_open(conn)
            end = time.monotonic() + 0.001
            while time.monotonic() < end:
                pass

    recorder, theirs = Slow(), []
    for _ in range(40):
        ours, their = socket.socketpair()
        theirs.append(their)
        their.sendall(b"x")
        mux.attach(ours, recorder)
    until(mux, lambda: recorder.count("message") == 40)
    for number in {number for _, number, _ in recorder.events}:
        assert [name for name, of, _ in recorder.events if of == number] == ["open", "message"]
    for their in theirs:
        their.close()


def test_a_foreign_close_is_closing_at_once(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise close-loses-nothing: and nothing is accepted after it."""
    sock, conn = opened(mux, listen, Recorder())
    seen: list[bool] = []

    def other() -> None:
        conn.close()
        seen.extend((conn.closing, conn.send(b"late")))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [True, False]
    assert receive(mux, sock) == b""
    sock.close()


def test_drain_does_not_come_when_the_outbox_is_above_high_again(mux: muxcore.Mux, listen: Listen) -> None:
    """Two are drained in one turn, and the first fills the other before that one's drain has come."""
    sizes: list[int] = []

    class Refill(Recorder):
        def on_drain(self, conn: muxcore.Connection) -> None:
            sizes.append(conn.outbox_size)
            if len(sizes) == 1:
                [other] = [other for other in mux.connections if other is not conn]
                assert not other.send(bytes(16 << 20))

    listener = listen(Refill(), limits=muxcore.Limits(high=1000, low=100))
    socks = [client(listener), client(listener)]
    until(mux, lambda: len(mux.connections) == 2)
    for conn in mux.connections:
        while conn.send(bytes(50_000)):
            pass
    for sock in socks:
        with nonblocking(sock), pytest.raises(BlockingIOError):
            while True:
                sock.recv(1 << 20)
    until(mux, lambda: sizes)
    assert max(conn.outbox_size for conn in mux.connections) > 1000
    while len(sizes) < 2:
        for sock in socks:
            with nonblocking(sock), pytest.raises(BlockingIOError):
                while True:
                    sock.recv(1 << 20)
        mux.poll(0.02)
    assert max(sizes) <= 100
    for sock in socks:
        sock.close()


def test_write_eof_behind_a_foreign_send_sends_its_fin(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    thread = threading.Thread(target=conn.send, args=(bytes(5000),))
    thread.start()
    thread.join()
    conn.set_limits(high=1000, low=100)
    conn.write_eof()
    assert receive(mux, sock) == bytes(5000)
    sock.close()


def test_lifting_autopause_reports_what_was_held_back(mux: muxcore.Mux, listen: Listen) -> None:
    sock = client(listen())
    until(mux, lambda: len(mux.connections))
    [conn] = mux.connections
    sock.sendall(b"held back")
    until(mux, lambda: conn.inbox_size)
    while conn.send(bytes(100_000)):
        pass
    assert conn.recv() is None
    conn.set_limits(autopause=False)
    assert (conn, muxcore.READABLE) in mux.poll(1)
    assert conn.recv() == b"held back"
    sock.close()


def test_a_failing_log_does_not_keep_the_connection_open(mux: muxcore.Mux, listen: Listen) -> None:
    class Failing(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("no log today")

    recorder = Recorder(reply=lambda message: b"" * (1 // 0))
    sock, conn = opened(mux, listen, recorder)
    logger, failing = logging.getLogger("muxcore"), Failing()
    logger.addFilter(failing)
    try:
        sock.sendall(b"x")
        until(mux, lambda: conn.closing)
    finally:
        logger.removeFilter(failing)
    sock.close()
    until(mux, lambda: conn.closed)
    assert isinstance(recorder.reason(), ZeroDivisionError)


def test_the_first_reason_stays(mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture) -> None:
    """A handler fails, and its connection then does not get rid of its output: the handler is the reason."""
    recorder = Recorder(reply=lambda message: b"" * (1 // 0))
    sock, conn = opened(mux, listen, recorder, timeouts=muxcore.Timeouts(write=0.05))
    conn.send(bytes(12 << 20))
    sock.sendall(b"x")
    conn.set_limits(autopause=False)
    until(mux, lambda: conn.closed)
    assert isinstance(recorder.reason(), ZeroDivisionError)
    sock.close()


def test_a_detached_socket_has_a_timeout_of_zero(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    with conn.detach() as mine:
        assert mine.gettimeout() == 0
    sock.close()


def test_a_timer_that_could_not_be_cancelled_does_not_keep_a_closing_connection(
    mux: muxcore.Mux, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer for a peer that reads nothing is replaced by the one for a peer that sends no FIN."""
    limits, timeouts = muxcore.Limits(max_outbox=1 << 26), muxcore.Timeouts(linger=0.05)
    sock, conn = opened(mux, listen, recorder := Recorder(), limits=limits, timeouts=timeouts)
    conn.send(bytes(1 << 25))
    conn.close()
    turns(mux, 0.02)
    assert conn.outbox_size
    cancel = muxcore.TimerHandle.cancel

    def cannot_yet(timer: muxcore.TimerHandle) -> None:
        cancel(timer)
        monkeypatch.setattr(muxcore.TimerHandle, "cancel", cancel)
        raise MemoryError

    monkeypatch.setattr(muxcore.TimerHandle, "cancel", cannot_yet)
    sock.setblocking(False)
    deadline = time.monotonic() + DEADLINE
    while not recorder.count("close") and time.monotonic() < deadline:
        try:
            mux.poll(0.01)
            sock.recv(1 << 20)
        except (MemoryError, BlockingIOError):
            pass
    assert muxcore.TimerHandle.cancel is cancel, "it was called"
    assert recorder.reason() is None
    sock.close()


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="see test_faults.py: CPython's gh-152125"
)
def test_a_detach_without_memory_is_reported_or_raises(mux: muxcore.Mux, listen: Listen, testcapi: Any) -> None:
    for nth in range(1, 8):
        sock, conn = opened(mux, listen, recorder := Recorder())
        turns(mux, 0.001)
        mine = None
        testcapi.set_nomemory(nth, nth + 1)
        try:
            mine = conn.detach()
        except MemoryError:
            pass
        finally:
            testcapi.remove_mem_hooks()
        if mine is None:
            conn.close()
            sock.shutdown(socket.SHUT_WR)
        until(mux, lambda: recorder.count("close"))
        if mine is not None:
            mine.close()
        sock.close()


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="see test_faults.py: CPython's gh-152125"
)
def test_a_connection_that_lost_its_descriptor_gets_on_close_without_memory(mux: muxcore.Mux, testcapi: Any) -> None:
    raised = 0
    for nth in range(1, 80):
        before, peer = socket.socketpair()
        conn = mux.attach(before, recorder := Recorder())
        turns(mux, 0.001)
        fd = conn.fileno()
        os.close(fd)  # behind its back
        after, other_peer = socket.socketpair()
        assert after.fileno() == fd
        testcapi.set_nomemory(nth, nth + 1)
        try:
            mux.attach(after, other := Recorder())
        except MemoryError:
            testcapi.remove_mem_hooks()
            raised += 1
            mux.attach(after, other := Recorder())
        finally:
            testcapi.remove_mem_hooks()
        peer.close()
        other_peer.close()
        until(mux, lambda: recorder.count("close") and other.count("close"))
    assert raised
    assert mux.stats().connections == 0


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="see test_faults.py: CPython's gh-152125"
)
@pytest.mark.parametrize("pull", [False, True])
def test_a_large_read_without_memory_for_it_ends_its_connection(mux: muxcore.Mux, testcapi: Any, pull: bool) -> None:
    """The buffer is cut to the size of what was read, which may fail: the exception is not lost."""
    reasons = set()
    for nth in range(1, 12):
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours, None if pull else Recorder())
        turns(mux, 0.001)
        theirs.sendall(bytes(40_000))
        testcapi.set_nomemory(nth, nth + 1)
        try:
            mux.poll(0)
        except MemoryError:
            pass
        finally:
            testcapi.remove_mem_hooks()
        theirs.close()
        until(mux, lambda conn=conn: conn.closed or conn.eof)
        reasons.add(type(conn.error))
        conn.abort()
    assert MemoryError in reasons or mux.backend != "epoll"


def test_interrupts_of_many_do_not_add_up(mux: muxcore.Mux, listen: Listen) -> None:
    """After each, the loop looks at every connection; it must not list each of them once more each time."""

    class Interrupted(muxcore.Handler):
        def on_eof(self, conn: muxcore.Connection) -> None:
            raise SystemExit

    listener = listen(Interrupted())
    socks = [socket.create_connection(listener.address) for _ in range(200)]
    until(mux, lambda: mux.stats().connections == len(socks))
    for sock in socks:
        sock.shutdown(socket.SHUT_WR)
    raised = 0
    tracemalloc.start()
    try:
        while raised < len(socks):
            try:
                mux.poll(0)
            except SystemExit:
                raised += 1
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
    for sock in socks:
        sock.close()


def test_input_that_there_was_no_memory_for_ends_the_connection(
    mux: muxcore.Mux, listen: Listen, testcapi: Any
) -> None:
    """A stream with a hole in it must not go on."""
    sock, conn = opened(mux, listen, recorder := Recorder())
    sock.sendall(bytes(3000))
    for nth in range(1, 30):
        testcapi.set_nomemory(nth, nth + 1)
        try:
            mux.poll(0)
        except MemoryError:
            pass
        finally:
            testcapi.remove_mem_hooks()
        if recorder.count("message") or conn.closing or conn.closed:
            break
    turns(mux, 0.02)
    assert len(recorder.received()) == 3000 or isinstance(conn.error, MemoryError)
    sock.close()


@pytest.mark.parametrize(
    "limits",
    [
        {"high": 0, "low": 0},
        {"high": 0, "low": 0, "max_outbox": 1, "autopause": True},
        {"max_inbox": 1},
    ],
)
@pytest.mark.parametrize("options", [{"read_size": 1}, {"read_size": 3, "read_budget": 1}, {"max_events": 1}])
def test_smallest_settings_lose_nothing(backend: str, limits: dict[str, Any], options: dict[str, Any]) -> None:
    data = pattern(3000)
    with muxcore.Mux(backend=backend, **options) as mux:
        sock = client(mux.listen(("127.0.0.1", 0), echo(), limits=muxcore.Limits(**limits)))
        push(mux, sock, data)
        sock.shutdown(socket.SHUT_WR)
        assert receive(mux, sock) == data
        sock.close()


# --- against mutants that survived (tests/mutants) ------------------------------------------------------


def test_a_connection_that_was_reset_is_not_read_from(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    reset(sock)
    until(mux, lambda: conn.closed)
    assert not conn.is_reading()


def test_a_send_between_polls_does_not_end_the_wait_of_the_next(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    conn.send(b"x")
    start = time.monotonic()
    assert mux.poll(0.05) == []
    assert time.monotonic() - start >= 0.05
    assert sock.recv(10) == b"x"
    sock.close()


@pytest.mark.parametrize("method", ["on_eof", "on_drain"])
def test_what_on_eof_or_on_drain_sends_goes_out_in_the_same_turn(
    mux: muxcore.Mux, listen: Listen, method: str
) -> None:
    recorder = Recorder()
    unsent: list[int] = []
    setattr(recorder, method, lambda conn: unsent.append(conn.send(b"answer") - 1))
    sock, conn = opened(mux, listen, recorder, half_open=True)
    if method == "on_eof":
        sock.shutdown(socket.SHUT_WR)
    else:
        while conn.send(bytes(50_000)):
            pass
    with nonblocking(sock):
        while not unsent:
            mux.poll(0.02)
            try:
                while sock.recv(1 << 16):
                    pass
            except BlockingIOError:
                pass
    assert conn.outbox_size == 0
    sock.close()


@pytest.mark.parametrize("framer", [None, muxcore.Lines()], ids=repr)
@pytest.mark.parametrize("method", ["on_open", "on_message"])
def test_a_call_behind_a_handler_may_send_to_its_connection(
    mux: muxcore.Mux, listen: Listen, method: str, framer: Any
) -> None:
    recorder = Recorder()

    def soon(conn: muxcore.Connection, message: bytes = b"") -> None:
        recorder.connections.append(conn)
        mux.call_soon(conn.write, b"later")

    setattr(recorder, method, soon)
    sock = client(listen(recorder, framer=framer))
    sock.sendall(b"x\n")
    assert receive(mux, sock, 5) == b"later"
    sock.close()


def test_a_connection_whose_handler_was_interrupted_sends_between_polls_as_before(
    mux: muxcore.Mux, listen: Listen
) -> None:
    recorder = Recorder()

    def interrupt(conn: muxcore.Connection, message: bytes) -> None:
        raise KeyboardInterrupt

    recorder.on_message = interrupt  # type: ignore[method-assign]
    sock, conn = opened(mux, listen, recorder)
    sock.sendall(b"x")
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    mux.poll(0)
    conn.send(b"y")
    mux.poll(0)
    assert conn.outbox_size == 0
    sock.close()


def test_an_on_close_that_raises_is_no_reason_for_the_end(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    recorder.on_close = lambda conn, exc: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    sock, conn = opened(mux, listen, recorder)
    sock.close()
    until(mux, lambda: mux.stats().handler_errors)
    assert conn.error is None


def test_a_drain_of_a_connection_with_a_handler_never_appears_in_poll(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    while conn.send(bytes(50_000)):
        pass
    reported: list[Any] = []
    with nonblocking(sock):
        while not recorder.count("drain"):
            reported += mux.poll(0.02)
            try:
                sock.recv(1 << 20)
            except BlockingIOError:
                pass
    assert reported == []
    sock.close()


def test_on_eof_comes_once_whatever_happens_after_it(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Late()
    sock, conn = opened(mux, listen, recorder)
    sock.shutdown(socket.SHUT_WR)
    assert receive(mux, sock, 9) == b"reply to "
    conn.send(b"more")
    assert receive(mux, sock, 4) == b"more"
    assert recorder.count("eof") == 1
    sock.close()


@pytest.mark.parametrize("before", [None, "custom"])
@pytest.mark.parametrize("framer", ["Resp", "Fixed", "custom"])
def test_input_of_a_connection_that_is_over_stays_for_a_new_framer(
    mux: muxcore.Mux, listen: Listen, before: Any, framer: str
) -> None:
    """Promise pull-style: what came before the end can still be received."""
    sock = client(listen(framer=before and Halving))
    sock.sendall(b"*bad!")
    until(mux, lambda: mux.stats().bytes_in)
    [conn] = mux.connections
    reset(sock)
    until(mux, lambda: conn.closed)
    conn.framer = {"Resp": muxcore.Resp(), "Fixed": muxcore.Fixed(2), "custom": Halving}[framer]
    mux.poll(0)
    assert conn.unread == b"*bad!"
    assert list(conn) == ([] if framer == "Resp" else [b"*b", b"ad"])


@pytest.mark.parametrize("style", ["accepted", "attached"])
def test_a_factory_of_framers_is_called_once_for_each_connection(
    mux: muxcore.Mux, listen: Listen, style: str
) -> None:
    made: list[Halving] = []

    def factory() -> Halving:
        made.append(Halving())
        return made[-1]

    recorder = Recorder(reply=lambda message: message)
    if style == "accepted":
        sock = client(listen(recorder, framer=factory))
    else:
        ours, sock = socket.socketpair()
        mux.attach(ours, recorder, framer=factory)
    assert exchange(mux, sock, b"ab") == b"ab"
    assert len(made) == 1
    sock.close()


class Halving:
    """A framer of a user: two bytes are a message."""

    def __init__(self) -> None:
        self.data = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.data += data
        while len(self.data) > 1:
            found, self.data = self.data[:2], self.data[2:]
            yield found

    def encode(self, message: bytes) -> bytes:
        return message

    def rest(self) -> bytes:
        return self.data


def test_a_connection_whose_factory_was_interrupted_gets_its_framer_all_the_same(
    mux: muxcore.Mux, listen: Listen
) -> None:
    calls: list[int] = []

    def factory() -> Halving:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return Halving()

    recorder = Recorder(reply=lambda message: message)
    sock = client(listen(recorder, framer=factory))
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    assert exchange(mux, sock, b"abcd") == b"abcd"
    assert recorder.messages() == [b"ab", b"cd"]
    sock.close()


def test_a_paused_connection_of_which_both_halves_are_shut_does_not_spin(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    conn.pause_reading()
    conn.write_eof()
    assert receive(mux, sock) == b""
    sock.close()
    turns(mux, 0.02)
    assert turns(mux, 0.05) == 0
    conn.resume_reading()
    until(mux, lambda: conn.closed)


def test_what_is_done_to_a_closing_connection_does_not_begin_its_linger_anew(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder, timeouts=muxcore.Timeouts(linger=0.2))
    conn.close()
    until(mux, lambda: conn.set_limits() or conn.closed, 5)
    sock.close()


def test_close_waits_for_the_peers_fin(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = echo()
    sock, conn = opened(mux, listen, recorder)
    assert exchange(mux, sock, b"x") == b"x"
    conn.close()
    assert receive(mux, sock) == b""
    turns(mux, 0.05)
    assert (conn.closing, conn.closed) == (True, False)
    assert not conn.is_reading(), "what comes is discarded"
    sock.close()
    until(mux, lambda: conn.closed)


def test_its_repr_says_whether_it_is_open(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    assert f"{conn.id} open" in repr(conn)
    conn.close()
    assert f"{conn.id} closing" in repr(conn)
    sock.close()
    until(mux, lambda: conn.closed)
    assert f"{conn.id} closed" in repr(conn)


@pytest.mark.parametrize("end", ["close", "close with output", "reset"])
def test_detach_of_what_is_not_open_is_refused(mux: muxcore.Mux, listen: Listen, end: str) -> None:
    sock, conn = opened(mux, listen, Recorder())
    if end == "close with output":
        conn.send(b"x")
    if end != "reset":
        conn.close()
    else:
        reset(sock)
        until(mux, lambda: conn.closed)
    with pytest.raises(muxcore.ConnectionClosed, match="detach: the connection is not open"):
        conn.detach()
    sock.close()
    until(mux, lambda: conn.closed)


@pytest.mark.unix_only("Unix sockets")
def test_a_peer_that_reads_no_more_ends_its_connection_though_it_may_still_send(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    theirs.shutdown(socket.SHUT_RD)
    conn.send(b"x")
    until(mux, lambda: recorder.count("close"), 5)
    assert isinstance(recorder.reason(), BrokenPipeError)
    theirs.close()


@pytest.mark.unix_only("Unix sockets")
def test_what_a_peer_sent_last_is_delivered_though_it_read_nothing(mux: muxcore.Mux) -> None:
    """Promise peer-gone: it was held back by autopause; the outbox that held it is gone with the peer."""
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    while conn.send(bytes(50_000)):
        pass
    theirs.sendall(b"goodbye")
    mux.poll(0)
    assert not conn.is_reading()
    theirs.close()
    until(mux, lambda: conn.closed)
    assert recorder.received() == b"goodbye"


def test_nothing_is_sent_for_nothing(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    assert conn.send(b"")
    assert mux.broadcast([conn], b"") == 1
    thread = threading.Thread(target=conn.send, args=(b"",))
    thread.start()
    thread.join()
    mux.poll(0)
    stats = mux.stats()
    assert (stats.send_calls + stats.sendmsg_calls, conn.outbox_size) == (0, 0)
    sock.close()


@pytest.mark.unix_only("Unix sockets")
def test_send_is_false_until_the_drain(mux: muxcore.Mux) -> None:
    """Also between low and high, where the outbox was above high."""
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder, limits=muxcore.Limits(low=0, high=1 << 20))
    mux.poll(0)
    while conn.send(bytes(10_000)):
        pass
    while conn.outbox_size > 1 << 20:
        theirs.recv(50_000)
        mux.poll(0)
    assert conn.outbox_size > 0
    assert conn.send(b"x") is False
    assert recorder.count("drain") == 0
    theirs.close()


def test_a_closing_connection_has_its_time_from_when_its_peer_last_read(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder, timeouts=muxcore.Timeouts(write=0.4))
    conn.send(bytes(12 << 20))
    conn.close()
    turns(mux, 0.2)
    before = mux.stats().bytes_out
    while mux.stats().bytes_out == before:
        theirs.recv(1 << 16)
        last_read = time.monotonic()
        mux.poll(0)
    until(mux, lambda: recorder.count("close"))
    assert time.monotonic() - last_read >= 0.4
    assert isinstance(recorder.reason(), muxcore.WriteTimeout)
    theirs.close()


def test_what_is_done_to_a_closing_connection_does_not_put_off_its_write_timeout(
    mux: muxcore.Mux, listen: Listen
) -> None:
    sock, conn = opened(mux, listen, Recorder(), timeouts=muxcore.Timeouts(write=0.2))
    conn.send(bytes(12 << 20))
    conn.close()
    until(mux, lambda: conn.set_limits() or conn.closed, 5)
    assert isinstance(conn.error, muxcore.WriteTimeout)
    sock.close()


def test_a_connection_that_was_closed_has_no_timer_left(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    conn.close()
    for _ in range(3):
        mux.poll(0)
        conn.set_limits()
    assert mux._timers.next_ns() > 0
    theirs.close()
    until(mux, lambda: conn.closed)
    assert mux._timers.next_ns() < 0


def test_write_eof_sets_no_timer(mux: muxcore.Mux) -> None:
    """Before close() no time is up, neither for the output nor for the peer's FIN."""
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    conn.send(bytes(12 << 20))
    conn.write_eof()
    mux.poll(0)
    assert conn.outbox_size
    assert mux._timers.next_ns() < 0
    assert len(receive(mux, theirs)) == 12 << 20
    mux.poll(0)
    assert mux._timers.next_ns() < 0
    assert not conn.closing
    theirs.close()


def test_a_connection_that_both_ends_have_shut_ends_when_its_user_has_heard_of_it(
    mux: muxcore.Mux, listen: Listen
) -> None:
    reported: list[int] = []

    def turn_until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline
            reported.extend(flags for _, flags in mux.poll(0.02))

    sock = client(listen(half_open=True))
    turn_until(lambda: mux.connections)
    [conn] = mux.connections
    conn.write_eof()
    sock.sendall(b"last words")
    sock.shutdown(socket.SHUT_WR)
    turn_until(lambda: conn.eof)
    assert mux.poll(0) == []
    assert not conn.closed
    assert conn.recv() == b"last words"
    turn_until(lambda: conn.closed)
    assert [flag for flag in reported if flag & (muxcore.EOF | muxcore.CLOSED)] == [muxcore.EOF | muxcore.CLOSED]
    assert conn.error is None
    sock.close()


def test_write_eof_ends_a_paused_connection_whose_error_its_user_has_read(mux: muxcore.Mux, listen: Listen) -> None:
    """The system reports a reset once; after that only shutdown fails, since the peer is gone."""
    sock, conn = opened(mux, listen, Recorder())
    conn.pause_reading()
    turns(mux, 0.02)
    reset(sock)
    while not conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        pass
    turns(mux, 0.02)
    assert not conn.closed
    conn.write_eof()
    until(mux, lambda: conn.closed, 5)


@pytest.mark.parametrize("what", ["abort", "close", "pause_reading"])
def test_what_came_before_the_end_stays_whatever_is_done_to_the_connection(
    mux: muxcore.Mux, listen: Listen, what: str
) -> None:
    """In pull style; no method has an effect on what is over."""
    sock = client(listen())
    sock.sendall(b"last words")
    until(mux, lambda: mux.stats().bytes_in)
    [conn] = mux.connections
    reset(sock)
    until(mux, lambda: conn.closed)
    getattr(conn, what)()
    mux.poll(0)
    assert conn.recv() == b"last words"
    assert mux.stats().connections == 0


@pytest.mark.parametrize("framer", ["None", "Lines", "custom"])
@pytest.mark.parametrize("end", ["abort", "close"])
def test_what_was_not_received_is_gone_with_the_connection(
    mux: muxcore.Mux, listen: Listen, end: str, framer: str
) -> None:
    sock = client(listen(framer={"None": None, "Lines": muxcore.Lines(), "custom": Halving}[framer]))
    sock.sendall(b"abc")
    until(mux, lambda: mux.stats().bytes_in)
    [conn] = mux.connections
    assert conn.unread == b"abc"
    getattr(conn, end)()
    assert framer == "custom" or conn.unread == b""
    sock.close()
    until(mux, lambda: conn.closed)
    mux.poll(0)
    assert (conn.unread, conn.inbox_size, conn.recv()) == (b"", 0, None)


@pytest.mark.parametrize("framer", ["Fixed", "custom"])
def test_a_connection_with_a_handler_keeps_no_input_once_it_is_over(
    mux: muxcore.Mux, listen: Listen, framer: str
) -> None:
    recorder, unread = Recorder(), list[bytes]()
    recorder.on_close = lambda conn, exc: unread.append(conn.unread)  # type: ignore[method-assign]
    sock, conn = opened(mux, listen, recorder, framer={"Fixed": muxcore.Fixed(2), "custom": Halving}[framer])
    sock.sendall(b"abc")
    until(mux, lambda: recorder.count("message"))
    assert conn.unread == b"c"
    reset(sock)
    until(mux, lambda: unread)
    assert unread == [b"c"], "on_close may look at it"
    assert (conn.unread, conn.inbox_size) == (b"", 0)


@pytest.mark.parametrize("framer", [None, muxcore.Lines()], ids=repr)
def test_what_a_handler_returns_is_let_go(mux: muxcore.Mux, listen: Listen, framer: Any) -> None:
    class Result: ...

    results: list[weakref.ref[Result]] = []

    def handler(conn: muxcore.Connection, message: bytes) -> Any:
        result = Result()
        results.append(weakref.ref(result))
        return result

    with client(listen(handler, framer=framer)) as sock:
        sock.sendall(b"x\n")
        until(mux, lambda: results)
    gc.collect()
    assert results[0]() is None


@pytest.mark.linux_only("a socket's error queue")
def test_a_time_stamp_of_a_paused_connection_that_waits_for_room_does_not_spin(
    mux: muxcore.Mux, listen: Listen
) -> None:
    sock, conn = opened(mux, listen, Recorder())
    so_timestamping, software = 37, 2 | 8 | 16
    conn.setsockopt(socket.SOL_SOCKET, so_timestamping, software)
    conn.pause_reading()
    turns(mux, 0.02)
    conn.send(b"x")
    conn.flush()
    conn.send(bytes(12 << 20))
    assert turns(mux, 0.1) <= 3
    sock.close()


def test_a_message_that_was_held_back_from_a_handler_never_appears_in_poll(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    record = recorder.on_message

    def pause(conn: muxcore.Connection, message: bytes) -> None:
        record(conn, message)
        conn.pause_reading()

    recorder.on_message = pause  # type: ignore[method-assign]
    sock, conn = opened(mux, listen, recorder, framer=muxcore.Lines())
    sock.sendall(b"one\ntwo\n")
    until(mux, lambda: recorder.count("message"))
    conn.resume_reading()
    assert mux.poll(0) == mux.poll(0) == []
    assert recorder.messages() == [b"one", b"two"]
    sock.close()


def test_no_drain_comes_after_close(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    while conn.send(bytes(50_000)):
        pass
    conn.close()
    receive(mux, sock)
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "close"]


@pytest.mark.unix_only("Unix sockets")
def test_on_eof_does_not_come_when_the_connection_has_ended_in_the_same_turn(mux: muxcore.Mux) -> None:
    recorder = Late()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    theirs.close()
    mux.call_soon(lambda: (conn.send(b"x"), conn.flush()))
    until(mux, lambda: recorder.count("close"))
    assert conn.eof
    assert recorder.names() == ["open", "close"]
    assert isinstance(recorder.reason(), BrokenPipeError)


def test_input_is_not_judged_while_the_connection_is_paused(mux: muxcore.Mux, listen: Listen) -> None:
    """Its user may be about to set the framer that can read it."""
    sock = client(listen())
    sock.sendall(b"*bad\r\n")
    until(mux, lambda: mux.stats().bytes_in)
    [conn] = mux.connections
    conn.pause_reading()
    conn.framer = muxcore.Resp()
    mux.poll(0)
    assert not conn.closing
    conn.framer = None
    conn.resume_reading()
    assert conn.recv() == b"*bad\r\n"
    sock.close()


def test_a_framer_that_is_none_is_refused_by_an_open_connection(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    with pytest.raises(TypeError, match="framer must be an instance, not the class: pass Lines"):
        conn.framer = muxcore.Lines
    assert conn.framer is None
    sock.close()


def test_a_handler_that_gives_a_reason_and_then_raises_has_given_the_reason(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    reason = LookupError("no such user")

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        conn.close(reason)
        raise ZeroDivisionError

    recorder = Recorder()
    recorder.on_message = handler  # type: ignore[method-assign]
    sock, _ = opened(mux, listen, recorder)
    sock.sendall(b"x")
    assert receive(mux, sock) == b""
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.reason() is reason
    assert mux.stats().handler_errors == 1


@pytest.mark.linux_only("errno of glibc")
def test_the_end_of_a_peer_is_no_error_of_an_earlier_call(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, _ = opened(mux, listen, recorder)
    sock.close()
    leave_errno(errno.ECONNRESET)
    mux.poll()
    until(mux, lambda: recorder.count("close"))
    assert recorder.reason() is None


@pytest.mark.linux_only("errno of glibc")
def test_a_close_is_no_error_of_an_earlier_call(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)

    def close() -> None:
        conn.close()
        leave_errno(errno.ENOTCONN)

    mux.call_soon(close)
    mux.poll(0)
    assert sock.recv(1) == b""
    turns(mux, 0.02)
    assert not conn.closed, "it waits for the peer's FIN"
    sock.close()
    until(mux, lambda: conn.closed)
    assert recorder.reason() is None


def test_what_came_before_a_reset_is_delivered_though_a_send_meets_the_reset_first(
    mux: muxcore.Mux, listen: Listen
) -> None:
    """Promise peer-gone."""
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder)
    sock.sendall(b"last words")
    reset(sock)
    conn.send(b"x")
    until(mux, lambda: recorder.count("close"))
    assert recorder.received() == b"last words"
    assert isinstance(recorder.reason(), ConnectionResetError)


def test_data_is_none_until_it_is_set(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    assert conn.data is None
    sock.close()


@pytest.mark.unix_only("Unix sockets")
def test_a_connection_that_comes_above_high_in_a_turn_is_not_read_from(mux: muxcore.Mux) -> None:
    """Promise autopause: nor does the loop spin for its input."""
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder(), limits=muxcore.Limits(high=1 << 20))
    while not conn.outbox_size:
        conn.send(bytes(1 << 16))
        conn.flush()
    mux.poll(0)
    mux.call_soon(conn.send, bytes(2 << 20))
    mux.poll(0)
    theirs.sendall(b"x")
    assert turns(mux, 0.05) <= 2
    theirs.close()


@pytest.mark.unix_only("Unix sockets")
def test_what_waits_for_a_full_socket_arrives_once(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stuffing = 0
    with pytest.raises(BlockingIOError):
        while True:
            stuffing += ours.send(bytes(1000))
    conn = mux.attach(ours, Recorder())
    conn.send(b"the last")
    mux.poll(0)
    assert (conn.outbox_size, mux.stats().would_blocks) == (8, 1)
    assert receive(mux, theirs, stuffing + 8) == bytes(stuffing) + b"the last"
    turns(mux, 0.02)
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    theirs.close()


@pytest.mark.unix_only("a Unix peer may end one direction alone")
def test_a_peer_that_reads_no_more_ends_the_connection_that_replies_to_it(mux: muxcore.Mux) -> None:
    recorder = echo()
    ours, theirs = socket.socketpair()
    mux.attach(ours, recorder)
    mux.poll(0)
    theirs.sendall(b"x")
    theirs.shutdown(socket.SHUT_RD)
    until(mux, lambda: recorder.count("close"), 5)
    assert isinstance(recorder.reason(), BrokenPipeError)
    theirs.close()


@pytest.mark.unix_only("a Unix peer may end one direction alone")
def test_what_another_thread_sent_before_the_peer_was_gone_is_a_drop(backend: str) -> None:
    """The connection has not ended yet: there is more to read."""
    ours, theirs = socket.socketpair()
    with muxcore.Mux(backend=backend, read_size=1000) as mux:
        conn = mux.attach(ours)
        mux.poll(0)
        theirs.sendall(bytes(10_000))
        theirs.shutdown(socket.SHUT_RD)
        thread = threading.Thread(target=conn.send, args=(b"late",))
        thread.start()
        thread.join()
        conn.send(b"x")
        conn.flush()
        mux.poll(0)
        assert (conn.closing, mux.stats().drops) == (False, 1)
    theirs.close()


def test_what_is_sent_behind_run_goes_out_at_once(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    mux.call_soon(mux.stop)
    mux.run()
    assert conn.send(b"now")
    assert conn.outbox_size == 0
    assert sock.recv(10) == b"now"
    conn.pause_reading()
    conn.resume_reading()  # so something else waits for the next turn
    assert conn.send(b"still")
    assert conn.outbox_size == 0
    assert sock.recv(10) == b"still"
    mux.poll(0)
    conn.send(b"later")
    assert conn.outbox_size == 5, "it goes out with the next poll, as before"
    sock.close()


@pytest.mark.unix_only("Unix sockets")
@pytest.mark.parametrize("paused", [True, False])
def test_input_of_a_unix_socket_is_not_lost_to_a_look_at_its_error_queue(mux: muxcore.Mux, paused: bool) -> None:
    """Promise close-loses-nothing: it has no such queue, and ignores MSG_ERRQUEUE."""
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(bytes(1000))
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    if paused:
        conn.pause_reading()
        mux.poll(0)
    theirs.sendall(b"input")
    for _ in range(3):
        conn.send(b"x")
        conn.flush()
        mux.poll(0)
    conn.resume_reading()
    until(mux, lambda: recorder.received() == b"input")
    theirs.close()


@pytest.mark.unix_only("a Unix peer may end one direction alone")
def test_messages_that_came_go_before_what_a_peer_that_reads_no_more_has_sent(mux: muxcore.Mux) -> None:
    seen = []

    def pause(conn: muxcore.Connection, message: bytes) -> None:
        seen.append((message, mux.stats().bytes_in))
        if len(seen) == 1:
            conn.pause_reading()

    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, pause, framer=muxcore.Lines())
    theirs.sendall(b"1\n2\n")
    until(mux, lambda: seen)
    theirs.sendall(b"3\n")
    theirs.shutdown(socket.SHUT_RD)
    conn.send(b"x")
    conn.flush()
    conn.resume_reading()
    until(mux, lambda: conn.closed)
    assert seen == [(b"1", 4), (b"2", 4), (b"3", 6)]
    theirs.close()


def test_what_is_sent_behind_run_to_a_connection_that_is_not_open_waits_for_that(
    mux: muxcore.Mux, listen: Listen
) -> None:
    recorder = Recorder()
    listener = listen(recorder)
    mux.call_soon(mux.stop)
    mux.run()
    conn = mux.connect(listener.address, Recorder())
    assert conn.send(b"early")
    until(mux, lambda: recorder.received() == b"early")
    conn.abort()


def test_a_driven_mux_sends_together_what_a_call_sends(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise sends-together."""
    sock, conn = opened(mux, listen, Recorder())
    can_be_driven(mux)
    mux.call_soon(conn.send_many, [b"a", b"b", b"c"])
    assert receive(mux, sock, 3) == b"abc"
    assert mux.stats().send_calls == 1
    sock.close()


def test_a_connection_that_has_no_framer_yet_refuses_what_is_sent_to_it(mux: muxcore.Mux, listen: Listen) -> None:
    """An interrupt came while its framer was made; the next turn makes it."""
    calls: list[int] = []

    def factory() -> Halving:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return Halving()

    sock = client(listen(echo(), framer=factory))
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    [conn] = mux.connections
    results = [conn.send(b"ab"), mux.broadcast([conn], b"ab")]
    thread = threading.Thread(target=lambda: results.append(conn.send(b"ab")))
    thread.start()
    thread.join()
    assert (results, mux.stats().drops) == ([False, 0, False], 3)
    assert exchange(mux, sock, b"cd") == b"cd"
    sock.close()


@pytest.mark.parametrize("ends", ["close", "reset", "end and reset"])
def test_messages_that_a_long_turn_has_left_are_delivered_before_the_peers_end(
    mux: muxcore.Mux, listen: Listen, ends: str
) -> None:
    """Promise peer-gone. The handler sends, which finds out that the peer is gone; and its turn is over before its
    messages are."""
    lines = [b"%d" % i for i in range(2000)]
    got = []

    class Slow(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            got.append(message)
            if len(got) % 500 == 1:
                conn.send(b"x")
                conn.flush()
                begun = time.monotonic()
                while time.monotonic() - begun < 0.005:
                    pass

    recorder = Slow()
    listener = listen(recorder, framer=muxcore.Lines())
    sock = client(listener)
    until(mux, lambda: recorder.count("open"))
    sock.sendall(b"".join(line + b"\n" for line in lines))
    if ends != "close":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if ends == "end and reset":
        sock.shutdown(socket.SHUT_WR)
        until(mux, lambda: got)
    elif ends == "reset":
        until(mux, lambda: got)
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert got == lines
