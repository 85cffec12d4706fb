"""User code may run anywhere and do anything: what must be true then, a kind of fault at a time.

tests/hostile has the program that tries every action at every such place; here is what it, and users, have found.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from support import LOCALHOST, Recorder, client, exchange, memory, nonblocking, receive, reset, settle, turns, until

import muxcore
from muxcore import Delimiter, LengthPrefix, Lines, Resp, _own
from muxcore._timers import Timers

Listen = Callable[..., muxcore.Listener]
PACKAGE = str(Path(muxcore.__file__).parent)


class Words:
    """A framer of a user, whose lines may be commands to the test."""

    do: ClassVar[dict[bytes, Callable[[], object]]] = {}

    def __init__(self) -> None:
        self.buffer = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.buffer += data
        while b"\n" in self.buffer:
            line, self.buffer = self.buffer.split(b"\n", 1)
            self.do.get(line, int)()
            yield line

    def encode(self, message: bytes) -> bytes:
        return message + b"\n"

    def rest(self) -> bytes:
        return self.buffer


class Batches(Recorder):
    """As Recorder, by lists."""

    def on_messages(self, conn: muxcore.Connection, messages: list[Any]) -> None:
        for message in messages:
            self.on_message(conn, message)


@pytest.fixture
def words() -> Iterator[dict[bytes, Callable[[], object]]]:
    Words.do = {}
    yield Words.do
    Words.do = {}


def attached(mux: muxcore.Mux, handler: Any, **options: Any) -> tuple[muxcore.Connection, socket.socket]:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, handler, **options)
    mux.poll(0)
    return conn, theirs


styles = pytest.mark.parametrize("style", [Recorder, Batches])


# --- a framer that changes its connection while it finds a message ------------------------------------


@styles
def test_a_framer_that_sets_another_while_it_finds_a_message_loses_nothing(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], style: type[Recorder]
) -> None:
    recorder = style()
    conn, theirs = attached(mux, recorder, framer=Words)
    words[b"up"] = lambda: setattr(conn, "framer", Lines())
    theirs.sendall(b"one\nup\ntwo\r\nthree\r\nhalf")
    until(mux, lambda: recorder.count("message") == 4)
    assert recorder.messages() == [b"one", b"up", b"two", b"three"]
    assert conn.unread == b"half"
    theirs.close()


@styles
@pytest.mark.parametrize("framer", [Lines(), Words], ids=["builtin", "own"])
@pytest.mark.parametrize("half", [b"", b"ha"], ids=["nothing", "half a message"])
def test_a_framer_that_is_replaced_amid_a_call_hands_on_what_that_call_has(
    mux: muxcore.Mux, framer: Any, half: bytes, style: type[Recorder]
) -> None:
    """As a signal handler or a finalizer may do, at any call. A generator has its argument before it has run."""
    fired = True
    moment = 0
    while fired:
        moment += 1
        fired = False
        countdown = moment
        recorder = style()
        conn, theirs = attached(mux, recorder, framer=Words)
        if half:
            theirs.sendall(half)
            until(mux, lambda conn=conn: conn.unread)

        def replace(frame: Any, event: str, argument: object, conn: muxcore.Connection = conn) -> None:
            nonlocal countdown, fired
            countdown -= frame.f_code.co_filename == __file__
            if not countdown and not fired:
                fired = True
                conn.framer = framer

        theirs.sendall(b"one\ntwo\nthree\n")
        sys.setprofile(replace)
        try:
            mux.poll(0)
        finally:
            sys.setprofile(None)
        theirs.sendall(b"four\n")
        until(mux, lambda recorder=recorder: recorder.count("message") == 4)
        assert recorder.messages() == [half + b"one", b"two", b"three", b"four"], moment
        theirs.close()
    assert moment > 5


@pytest.mark.parametrize("as_list", [list, tuple])
def test_the_next_framer_gets_the_rest_of_a_list_of_messages(mux: muxcore.Mux, as_list: type) -> None:
    """feed() has found them all at once, so its rest() does not have them."""

    class AtOnce(Words):
        def feed(self, data: bytes) -> Any:
            return as_list(super().feed(data))

    conn, theirs = attached(mux, None, framer=AtOnce)
    theirs.sendall(b"one\nup\ntwo|three\n|half")
    until(mux, lambda: conn.unread == b"one\nup\ntwo|three\n|half")
    assert [conn.recv(), conn.recv()] == [b"one", b"up"]
    conn.framer = Delimiter(b"|")
    assert (conn.recv_all(), conn.unread) == ([b"two", b"three\n"], b"half")
    theirs.close()


@styles
@pytest.mark.parametrize("look", ["unread", "inbox_size", "eof"])
def test_a_rest_that_sets_another_framer_counts_once(mux: muxcore.Mux, look: str, style: type[Recorder]) -> None:
    class Switching(Words):
        def rest(self) -> bytes:
            if self.buffer and not switched:
                switched.append(True)
                conn.framer = Words
            return super().rest()

    switched: list[bool] = []
    recorder = style()
    conn, theirs = attached(mux, recorder, framer=Switching)
    theirs.sendall(b"half")
    until(mux, lambda: mux.stats().bytes_in == 4)
    if look == "eof":
        theirs.close()
        until(mux, lambda: recorder.count("close"))
        assert isinstance(recorder.reason(), muxcore.FrameError)
    else:
        assert getattr(conn, look) == (b"half" if look == "unread" else 4)
        theirs.close()


@pytest.mark.parametrize("how", ["recv", "recv_all", "iterate"])
def test_a_framer_that_sets_another_loses_nothing_in_pull_style(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], how: str
) -> None:
    conn, theirs = attached(mux, None, framer=Words)
    words[b"up"] = lambda: setattr(conn, "framer", Delimiter(b"|"))
    theirs.sendall(b"one\nup\ntwo|three|half")
    got: list[bytes] = []

    def receive_some() -> bool:
        mux.poll(0.02)
        if how == "recv":
            got.extend(filter(None, [conn.recv()]))
        else:
            got.extend(conn.recv_all() if how == "recv_all" else conn)
        return len(got) == 4

    until(mux, receive_some)
    assert got == [b"one", b"up", b"two", b"three"]
    assert conn.unread == b"half"
    theirs.close()


def test_what_comes_behind_a_message_of_a_former_framer_is_read_by_the_new_one(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]]
) -> None:
    """The message was found while another framer was set, and was not received yet."""
    conn, theirs = attached(mux, None, framer=Words)
    words[b"up"] = lambda: setattr(conn, "framer", Delimiter(b"|"))
    theirs.sendall(b"up\ntwo|")
    until(mux, lambda: mux.stats().bytes_in == 7)
    assert conn.unread == b"up\ntwo|"
    theirs.sendall(b"three|")
    until(mux, lambda: mux.stats().bytes_in == 13)
    assert conn.unread == b"up\ntwo|three|"
    assert conn.recv_all() == [b"up", b"two", b"three"]
    theirs.close()


@styles
def test_a_message_that_its_framers_rest_still_holds_comes_once(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], style: type[Recorder]
) -> None:
    class Keeping(Words):
        def feed(self, data: bytes) -> Iterator[bytes]:
            self.buffer += data
            while b"\n" in self.buffer:
                line = self.buffer.split(b"\n", 1)[0]
                self.do.get(line, int)()
                self.buffer = self.buffer[len(line) + 1 :]
                yield line

    recorder = style()
    conn, theirs = attached(mux, recorder, framer=Keeping)
    words[b"up"] = lambda: setattr(conn, "framer", Lines())
    theirs.sendall(b"one\nup\ntwo\nend\n")
    until(mux, lambda: b"end" in recorder.messages())
    assert recorder.messages() == [b"one", b"up", b"two", b"end"]
    theirs.close()


@styles
def test_a_framer_that_closes_the_mux_is_not_called_again(
    backend: str, words: Any, style: type[Recorder]
) -> None:
    recorder = style()
    with muxcore.Mux(backend=backend) as mux:
        _, theirs = attached(mux, recorder, framer=Words)
        words[b"end"] = mux.close
        theirs.sendall(b"one\nend\nmore\n")
        mux.poll(1)
        assert mux.closed
    assert recorder.names() == (["open", "message", "close"] if style is Recorder else ["open", "close"])
    theirs.close()


@styles
@pytest.mark.parametrize("end", ["close", "abort", "detach"])
def test_nothing_is_delivered_once_a_framer_has_ended_its_connection(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], style: type[Recorder], end: str
) -> None:
    recorder = style()
    conn, theirs = attached(mux, recorder, framer=Words)
    kept: list[object] = []
    words[b"end"] = lambda: kept.append(getattr(conn, end)())
    theirs.sendall(b"one\nend\ntwo\n")
    until(mux, lambda: conn.closing)
    for _ in range(3):
        mux.poll(0)
    assert recorder.messages() == ([b"one"] if style is Recorder else [])
    assert mux.stats().messages_in == len(recorder.messages()), "what was found and not delivered does not count"
    assert (conn.unread, conn.inbox_size) == (b"", 0)
    theirs.close()
    until(mux, lambda: recorder.count("close"))
    for sock in kept:
        if isinstance(sock, socket.socket):
            sock.close()


@styles
def test_what_a_framer_found_while_it_paused_waits_for_resume(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], style: type[Recorder]
) -> None:
    recorder = style()
    conn, theirs = attached(mux, recorder, framer=Words)
    words[b"pause"] = lambda: conn.pause_reading()
    theirs.sendall(b"one\npause\ntwo\n")
    until(mux, lambda: not conn.is_reading())
    mux.poll(0)
    assert recorder.messages() == ([b"one"] if style is Recorder else [])
    conn.resume_reading()
    until(mux, lambda: recorder.count("message") == 3)
    assert recorder.messages() == [b"one", b"pause", b"two"]
    theirs.close()


def test_a_framer_that_reads_its_own_connection_gets_nothing_twice(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]]
) -> None:
    conn, theirs = attached(mux, None, framer=Words)
    nested: list[bytes] = []
    words[b"two"] = lambda: nested.extend(conn.recv_all())
    theirs.sendall(b"one\ntwo\nthree\n")
    got: list[bytes] = []
    until(mux, lambda: got.extend(conn.recv_all()) or len(got) + len(nested) == 3)
    assert sorted(got + nested) == [b"one", b"three", b"two"]
    theirs.close()


def test_a_connection_whose_framer_could_not_be_made_refuses_what_is_sent_to_it(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[int] = []

    def factory() -> Words:
        made.append(0)
        if len(made) == 1:
            raise RuntimeError("no framer for this one")
        return Words()

    results: list[object] = []

    class SendsToAll(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            results.append(self.connections[0].send(message))
            results.append(mux.broadcast(self.connections[:], message))

    listener = listen(recorder := SendsToAll(), framer=factory)
    first, second = client(listener), client(listener)
    second.sendall(b"hi\n")
    until(mux, lambda: len(results) == 2)
    assert results == [False, 1]
    assert mux.stats().drops == 2
    assert isinstance(recorder.connections[0].error, RuntimeError)
    first.close()
    second.close()


# --- what runs while a message is parsed or made --------------------------------------------------------


class Closes:
    """In a cycle, so that its finalizer runs whenever the collector does."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.end, self.me = end, self

    def __del__(self) -> None:
        self.end()


@pytest.mark.parametrize("request_", [b'login "a b" c\r\n', b"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n"])
@styles
def test_a_finalizer_may_close_the_connection_whose_request_is_being_made(
    mux: muxcore.Mux, request_: bytes, style: type[Recorder]
) -> None:
    late: list[object] = []

    class Logins(style):  # type: ignore[misc,valid-type]
        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            late.extend([message] if conn.closing else [])
            message.append(Closes(conn.close))
            conn.send("OK")

    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(20):
            conn, theirs = attached(mux, Logins(), framer=Resp())
            theirs.sendall(request_ * 50)
            until(mux, lambda conn=conn: gc.collect() >= 0 and conn.closing)
            theirs.close()
            until(mux, lambda conn=conn: conn.closed)
    finally:
        gc.set_threshold(*threshold)
    if style is Recorder:
        assert late == []


def test_a_reply_whose_parts_send_elsewhere_is_whole(mux: muxcore.Mux) -> None:
    class Audited(muxcore.RespError):
        def __str__(self) -> str:
            other.send(["audit", "secret"])
            return "ERR no"

    class Items(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            other.send([b"more"])
            return super().__iter__()

    conn, theirs = attached(mux, Recorder(), framer=Resp())
    other, operator = attached(mux, Recorder(), framer=Resp())
    conn.send([b"first", Audited(), Items([1]), b"last"])
    mux.poll(0)
    assert theirs.recv(1000) == b"*4\r\n$5\r\nfirst\r\n-ERR no\r\n*1\r\n:1\r\n$4\r\nlast\r\n"
    assert b"first" not in operator.recv(1000)
    theirs.close()
    operator.close()


@pytest.mark.linux_only("it reads the memory of a process from /proc")
def test_the_memory_of_a_large_reply_is_freed(mux: muxcore.Mux) -> None:
    conn, theirs = attached(mux, Recorder(), framer=Resp(), limits=muxcore.Limits(max_outbox=1 << 30))
    with memory(mux.backend) as grown:
        conn.send([bytes(1 << 20)] * 64)
        conn.abort()
        mux.poll(0)
        gc.collect()
        assert grown() < 16 << 20
    theirs.close()


@pytest.mark.parametrize("what", ["poll", "close"])
def test_a_finalizer_may_poll_or_close_the_mux_while_poll_makes_its_list(backend: str, what: str) -> None:
    threshold = gc.get_threshold()
    for allocations in range(0, 60, 2):
        mux = muxcore.Mux(backend=backend)
        peers = [socket.socketpair() for _ in range(20)]
        conns = [mux.attach(ours) for ours, _ in peers]
        again: list[tuple[muxcore.Connection, int]] = []

        def act(mux: muxcore.Mux = mux, again: list[Any] = again) -> None:
            with suppress(RuntimeError):  # in a callback, or once it is closed
                again.extend(mux.poll(0)) if what == "poll" else mux.close()

        gc.collect()
        gc.disable()
        Closes(act)
        gc.set_threshold(gc.get_count()[0] + 1 + allocations, *threshold[1:])
        gc.enable()
        try:
            again += mux.poll(0)
        except RuntimeError as error:
            assert str(error) == "the Mux is closed"  # noqa: PT017
        finally:
            gc.set_threshold(*threshold)
        if what == "poll":
            again += settle(mux)
            assert sorted(conn.id for conn, _ in again) == [conn.id for conn in conns]
        mux.close()
        gc.collect()
        for _, theirs in peers:
            theirs.close()


def test_what_a_finalizer_resumes_while_poll_makes_its_list_is_reported(backend: str) -> None:
    threshold = gc.get_threshold()
    for allocations in range(0, 60, 2):
        with muxcore.Mux(backend=backend) as mux:
            held, sender = attached(mux, None)
            sender.send(b"x")
            until(mux, lambda held=held: held.inbox_size)
            held.pause_reading()
            mux.poll(0)
            peers = [socket.socketpair() for _ in range(20)]
            for ours, _ in peers:
                mux.attach(ours)
            gc.collect()
            gc.disable()
            Closes(held.resume_reading)
            gc.set_threshold(gc.get_count()[0] + 1 + allocations, *threshold[1:])
            gc.enable()
            try:
                reported = mux.poll(0)
            finally:
                gc.set_threshold(*threshold)
            gc.collect()
            reported += mux.poll(0)
            assert [flags for conn, flags in reported if conn is held] == [muxcore.READABLE]
        for theirs in (sender, *(theirs for _, theirs in peers)):
            theirs.close()


def test_what_a_finalizer_adds_to_a_report_that_poll_has_just_made_comes_with_the_next(backend: str) -> None:
    threshold = gc.get_threshold()
    for allocations in range(0, 60, 2):
        with muxcore.Mux(backend=backend) as mux:
            peers = [socket.socketpair() for _ in range(20)]
            conns = [mux.attach(ours) for ours, _ in peers]
            for _, theirs in peers:
                theirs.send(b"message")
            reported: set[muxcore.Connection] = set()
            while len(reported) < 20:
                reported.update(conn for conn, flags in mux.poll(1) if flags & muxcore.READABLE)
            for conn, (_, theirs) in zip(conns, peers, strict=True):
                conn.pause_reading()
                theirs.close()
                conn.send(b"in vain")  # so it ends, and what it has received stays

            def resume(conns: list[muxcore.Connection] = conns) -> None:
                for conn in conns:
                    conn.resume_reading()  # which reports the message again

            gc.collect()
            gc.disable()
            Closes(resume)
            gc.set_threshold(gc.get_count()[0] + 1 + allocations, *threshold[1:])
            gc.enable()
            try:
                reports = mux.poll(0)
            finally:
                gc.set_threshold(*threshold)
            gc.collect()
            reports += mux.poll(0)
            for flag in (muxcore.CLOSED, muxcore.READABLE):
                assert sorted(conn.id for conn, flags in reports if flags & flag) == [conn.id for conn in conns]
            assert mux.poll(0) == []


# --- what is kept ---------------------------------------------------------------------------------------


class Message:
    """One that can be watched."""


class Objects(Words):
    def feed(self, data: bytes) -> Iterator[Any]:
        yield Message()


@styles
def test_a_message_that_makes_its_handler_raise_is_gone_with_its_connection(
    mux: muxcore.Mux, style: type[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[weakref.ref[Any]] = []

    class Refuses(style):  # type: ignore[misc,valid-type]
        on_open = muxcore.Handler.on_open  # so that it keeps no connection

        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            pass

        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            seen.append(weakref.ref(message))
            try:
                raise KeyError("the cause")
            except KeyError:
                raise ValueError("what the client sent is wrong") from None

    logging.getLogger("muxcore").disabled = True  # caplog keeps records, and they the exception
    gc.disable()
    try:
        conn, theirs = attached(mux, Refuses(), framer=Objects)
        theirs.sendall(b"x")
        until(mux, lambda conn=conn: conn.closing)
        assert isinstance(conn.error, ValueError)
        theirs.close()
        until(mux, lambda conn=conn: conn.closed)
        mux.poll(0)
        connection = weakref.ref(conn)
        del conn
        assert (seen[0](), connection()) == (None, None)
    finally:
        gc.enable()
        logging.getLogger("muxcore").disabled = False


class Fails(Words):
    """It raises behind its messages."""

    def feed(self, data: bytes) -> Iterator[Any]:
        made = Message()
        yield made
        self.do.get(b"fail", int)()
        raise ValueError("what comes next is wrong")


@pytest.mark.parametrize("when", ["handler", "framer", "recv_all"])
@pytest.mark.parametrize("how", ["abort", "close", "reframe"])
def test_a_framer_that_raises_behind_a_message_keeps_nothing_when_it_is_not_called_again(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], when: str, how: str
) -> None:
    seen: list[weakref.ref[Any]] = []

    def end(conn: muxcore.Connection) -> None:
        if how == "reframe":
            conn.framer = None
        else:
            getattr(conn, how)()

    class Ends(muxcore.Handler):
        def on_messages(self, conn: muxcore.Connection, messages: list[Any]) -> None:
            seen.extend(map(weakref.ref, messages))
            if when == "handler":
                end(conn)

    logging.getLogger("muxcore").disabled = True  # else records keep the exception
    gc.disable()
    try:
        conn, theirs = attached(mux, None if when == "recv_all" else Ends(), framer=Fails)
        if when == "framer":
            words[b"fail"] = lambda conn=conn: end(conn)
        theirs.sendall(b"x")
        turns(mux, 0.01)
        if when == "recv_all":
            seen.extend(map(weakref.ref, conn.recv_all()))
            end(conn)
        theirs.close()
        until(mux, lambda conn=conn: conn.closed)
        turns(mux, 0.01)
        words.clear()
        gone = weakref.ref(conn)
        del conn
        assert (gone(), [message() for message in seen if message()]) == (None, [])
    finally:
        gc.enable()
        logging.getLogger("muxcore").disabled = False


def test_a_connection_that_ended_for_malformed_input_is_gone_without_the_collector(mux: muxcore.Mux) -> None:
    gc.disable()
    try:
        for framer in (Lines(4), lambda: Grumpy()):
            conn, theirs = attached(mux, muxcore.Handler(), framer=framer)
            theirs.sendall(b"too long")
            until(mux, lambda conn=conn: conn.closing)
            assert isinstance(conn.error, muxcore.FrameTooLarge)
            assert conn.error.conn is conn
            theirs.close()
            until(mux, lambda conn=conn: conn.closed)
            mux.poll(0)
            gone = weakref.ref(conn)
            del conn
            assert gone() is None
    finally:
        gc.enable()


def test_an_attempt_that_was_refused_is_gone_without_the_collector(mux: muxcore.Mux) -> None:
    with socket.create_server(LOCALHOST) as server:
        address = server.getsockname()
    gc.disable()
    try:
        conn = mux.connect(address, muxcore.Handler())
        until(mux, lambda conn=conn: conn.closed)
        assert isinstance(conn.error, ConnectionRefusedError)
        mux.poll(0)
        gone = weakref.ref(conn)
        del conn
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["send", "broadcast"])
def test_an_overflow_that_raises_keeps_nothing_alive(mux: muxcore.Mux, how: str) -> None:
    limits = muxcore.Limits(high=1, low=0, max_outbox=1, overflow="raise")

    def fill(conn: muxcore.Connection) -> None:
        send = conn.send if how == "send" else lambda message: mux.broadcast([conn], message)
        for _ in range(100):
            send(bytes(1 << 20))

    gc.disable()
    try:
        conn, theirs = attached(mux, muxcore.Handler(), limits=limits)
        with pytest.raises(muxcore.OutboxFull) as caught:
            fill(conn)
        del caught
        conn.abort()
        mux.poll(0)
        gone = weakref.ref(conn)
        del conn
        assert gone() is None
        theirs.close()
    finally:
        gc.enable()


class Grumpy(Words):
    def feed(self, data: bytes) -> Iterator[bytes]:
        raise muxcore.FrameTooLarge("too large")


@pytest.mark.linux_only("it reads the memory of a process from /proc")
@pytest.mark.parametrize("framer", [Lines(), LengthPrefix(4), Delimiter(b"\r\n"), Resp(), None], ids=repr)
@pytest.mark.parametrize("size", [10, 1024])
def test_a_full_outbox_uses_little_more_memory_than_it_counts(mux: muxcore.Mux, framer: Any, size: int) -> None:
    limits = muxcore.Limits(max_outbox=4 << 20, overflow="drop")
    conn, theirs = attached(mux, Recorder(), framer=framer, limits=limits)
    assert memory_when_full(mux, conn, lambda: conn.send(bytes(size))) < 8 << 20
    theirs.close()


@pytest.mark.linux_only("it reads the memory of a process from /proc")
@pytest.mark.parametrize("how", ["reply", "broadcast"])
def test_small_replies_and_broadcasts_take_little_more_memory_than_they_count(mux: muxcore.Mux, how: str) -> None:
    limits = muxcore.Limits(max_outbox=1 << 18, overflow="drop")
    conn, theirs = attached(mux, Recorder(), framer=Resp() if how == "reply" else None, limits=limits)
    sends: dict[str, Callable[[], object]] = {
        "reply": lambda: conn.send([1]),
        "broadcast": lambda: mux.broadcast([conn], bytes(10)),
    }
    assert memory_when_full(mux, conn, sends[how]) < 1 << 20
    theirs.close()


def memory_when_full(mux: muxcore.Mux, conn: muxcore.Connection, send: Callable[[], object]) -> int:
    """How many bytes of memory a full outbox uses that drops what is beyond its limit."""
    drops = mux.stats().drops
    with memory(mux.backend) as grown:
        while mux.stats().drops == drops:
            send()
        used = grown()
    conn.abort()
    return used


@pytest.mark.linux_only("it reads the memory of a process from /proc")
def test_the_memory_of_a_large_outbox_is_freed(mux: muxcore.Mux) -> None:
    conn, theirs = attached(mux, Recorder(), limits=muxcore.Limits(high=1 << 29, max_outbox=1 << 30))
    with memory(mux.backend) as grown:
        for _ in range(32_000):
            conn.send(bytes(1000))
        conn.abort()
        mux.poll(0)
        assert grown() < 16 << 20
    theirs.close()


@pytest.mark.linux_only("it reads the memory of a process from /proc")
def test_replies_that_are_dropped_leave_no_memory_behind(mux: muxcore.Mux) -> None:
    limits = muxcore.Limits(max_outbox=1 << 16, overflow="drop")
    conn, theirs = attached(mux, Recorder(), framer=Resp(), limits=limits)
    while not mux.stats().drops:
        conn.send(bytes(50_000))
    with memory(mux.backend) as grown:
        for _ in range(10_000):
            assert not conn.send([bytes(1000)])
        assert grown() < 4 << 20
    theirs.close()


# --- other threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x"])
def test_sends_of_other_threads_are_bounded_in_number_too(mux: muxcore.Mux, data: bytes) -> None:
    conn, theirs = attached(mux, Recorder(), limits=muxcore.Limits(max_outbox=100_000, overflow="drop"))
    accepted = in_a_thread(lambda: [conn.send(data) for _ in range(10_000)].count(True))
    assert 0 < accepted < 2_000
    until(mux, lambda: in_a_thread(lambda: conn.send(data)))
    theirs.close()


def test_an_overflow_in_another_thread_ends_the_connection_once(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    conn, theirs = attached(mux, recorder, limits=muxcore.Limits(high=1000, low=0, max_outbox=1000))
    conn.pause_reading()
    drops = mux.stats().drops
    results = in_a_thread(lambda: [conn.send(bytes(1000)) for _ in range(100)])
    assert results.count(True) == 1
    assert mux.stats().drops == drops + 99
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.OutboxFull)
    theirs.close()


def test_an_outbox_that_is_just_full_is_full_for_other_threads_too(mux: muxcore.Mux) -> None:
    limits = muxcore.Limits(high=1000, low=0, max_outbox=1000, overflow="drop")
    conn, theirs = attached(mux, Recorder(), limits=limits)
    assert conn.send(bytes(1000))
    assert in_a_thread(lambda: conn.send(b"x")) is False
    assert (conn.outbox_size, mux.stats().drops) == (1000, 1)
    theirs.close()


def in_a_thread(fn: Callable[[], Any]) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(fn()))
    thread.start()
    thread.join()
    return result[0]


def test_a_mux_whose_thread_has_ended_can_be_closed_by_another(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)
    listener = mux.listen(LOCALHOST, Recorder())
    thread = threading.Thread(target=lambda: mux.poll(0))
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="belongs to the thread"):
        mux.poll(0)
    mux.close()
    assert listener.closed


def test_a_mux_whose_thread_lives_is_not_closed_by_another(backend: str) -> None:
    go = threading.Event()
    bound = threading.Event()

    def work() -> None:
        with muxcore.Mux(backend=backend) as mux:
            muxes.append(mux)
            mux.poll(0)
            bound.set()
            go.wait()

    muxes: list[muxcore.Mux] = []
    thread = threading.Thread(target=work)
    thread.start()
    bound.wait()
    with pytest.raises(RuntimeError, match="belongs to the thread"):
        muxes[0].close()
    go.set()
    thread.join()


# --- logs, timers, signals --------------------------------------------------------------------------------


@pytest.fixture
def log_handler() -> Iterator[Callable[[Callable[[logging.LogRecord], object]], None]]:
    logger = logging.getLogger("muxcore")
    added: list[logging.Handler] = []

    class Calls(logging.Handler):
        def __init__(self, fn: Callable[[logging.LogRecord], object]) -> None:
            super().__init__()
            self.fn = fn

        def emit(self, record: logging.LogRecord) -> None:
            self.fn(record)

    def add(fn: Callable[[logging.LogRecord], object]) -> None:
        added.append(Calls(fn))
        logger.addHandler(added[-1])

    yield add
    for handler in added:
        logger.removeHandler(handler)


def fail(*_: object) -> None:
    raise RuntimeError("no log today")


def test_a_log_handler_that_raises_harms_no_other_connection(
    mux: muxcore.Mux, log_handler: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    log_handler(fail)
    recorder = Recorder(reply=lambda message: message if message != b"bad" else b"%d" % (1 // 0))
    bad, theirs = attached(mux, recorder)
    _, other = attached(mux, recorder)
    theirs.sendall(b"bad")
    until(mux, lambda: bad.closing)
    mux.call_soon(fail)
    mux.poll(0)
    assert exchange(mux, other, b"still here") == b"still here"
    assert "no log today" in capsys.readouterr().err
    theirs.close()
    other.close()


class Contextless(Exception):
    """Whose class does what it wants with the names that every exception has."""

    def fail(self) -> Any:
        raise RuntimeError("do not look")

    __context__ = __cause__ = property(fail)  # type: ignore[assignment]
    __bool__ = fail


def test_a_handler_that_raises_an_error_with_a_mind_of_its_own_harms_no_other(mux: muxcore.Mux) -> None:
    def handle(conn: muxcore.Connection, message: bytes) -> None:
        if message == b"bad":
            raise Contextless
        conn.send(message)

    bad, theirs = attached(mux, handle)
    _, other = attached(mux, handle)
    theirs.sendall(b"bad")
    until(mux, lambda: bad.closing)
    assert isinstance(bad.error, Contextless)
    assert exchange(mux, other, b"still here") == b"still here"
    theirs.close()
    other.close()


def test_a_daemon_that_has_closed_stderr_goes_on(
    mux: muxcore.Mux, log_handler: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    closed = (tmp_path / "stderr").open("w")
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    log_handler(fail)
    bad, theirs = attached(mux, lambda conn, message: 1 // 0)
    theirs.sendall(b"x")
    until(mux, lambda: bad.closing)
    theirs.close()


def test_a_log_handler_may_close_everything(mux: muxcore.Mux, listen: Listen, log_handler: Any) -> None:
    recorder = Recorder(reply=lambda message: b"%d" % (1 // 0))
    listener = listen(recorder)
    sock = client(listener)

    def close_all(record: logging.LogRecord) -> None:
        listener.close()
        for conn in mux.connections:
            conn.abort()

    log_handler(close_all)
    sock.sendall(b"x")
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "message", "close"]
    sock.close()


def test_no_timer_is_lost_to_what_runs_between_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalizer or a signal handler may run between any two lines of Timers: here a tracer does, once at each."""
    lines: set[tuple[str, int]] = set()
    while True:
        called: list[object] = []
        made: list[Any] = []
        timers = Timers(lambda: None, lambda: None)

        def add(when: int, name: object, timers: Timers = timers, called: list[object] = called) -> Any:
            return timers.add(when, called.append, (name,))

        def trace(frame: Any, event: str, _: object, made: list[Any] = made, add: Any = add, lines: Any = lines) -> Any:
            if frame.f_code.co_filename.endswith("_timers.py") and not made:
                place = frame.f_code.co_name, frame.f_lineno
                if event == "line" and place not in lines:
                    lines.add(place)
                    sys.settrace(None)
                    made.extend(add(-1, name) for name in ("a", "b"))  # before all that are there
                    made[1].cancel()
                return trace
            return None

        handles = [add(when, when) for when in range(200)]
        sys.settrace(trace)
        try:
            for handle in handles[50:]:
                handle.cancel()
            while (handle := timers.due(1000, timers.order)) is not None:
                fn, args = timers.take(handle)  # type: ignore[misc]
                fn(*args)
        finally:
            sys.settrace(None)
        while (handle := timers.due(1000, timers.order)) is not None:
            fn, args = timers.take(handle)  # type: ignore[misc]
            fn(*args)
        assert sorted(called, key=str) == sorted([*range(50), *(["a"] if made else [])], key=str)
        if not made:
            break
    assert {"_sweep", "_drop", "due", "take", "cancel", "add"} <= {name for name, _ in lines} | {"add"}


@pytest.mark.unix_only("it sends itself a signal")
@pytest.mark.parametrize("what", ["timer", "call", "send", "datagram", "close"])
def test_what_a_signal_handler_does_amid_a_wait_is_seen_at_once(mux: muxcore.Mux, what: str) -> None:
    recorder = Recorder()
    conn, theirs = attached(mux, recorder)
    there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    there.bind(LOCALHOST)
    datagram = mux.datagram(LOCALHOST, print)
    done: list[bool] = []
    steps: dict[str, Callable[[], object]] = {
        "datagram": lambda: datagram.send(b"from a signal handler", there.getsockname()),
        "timer": lambda: mux.call_later(0.01, done.append, True),
        "call": lambda: mux.call_soon(done.append, True),
        "send": lambda: conn.send(b"from a signal handler"),
        "close": mux.close,
    }
    before = signal.signal(signal.SIGALRM, lambda *_: steps[what]())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        began = time.monotonic()
        mux.poll(30)
        if what == "timer":
            until(mux, lambda: done)
        elif what == "send":
            mux.poll(0)
            assert theirs.recv(100) == b"from a signal handler"
        elif what == "datagram":
            mux.poll(0)
            assert there.recv(100) == b"from a signal handler"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 10
    assert done == ([True] if what in ("timer", "call") else [])
    theirs.close()
    there.close()


def at_call(number: int, fn: Callable[[], object], step: Callable[[], object], file: str = "") -> bool:
    """Do the step, and `fn` when it calls the number-th function of muxcore (or of one file) in Python, where a signal
    handler may run; whether there were so many."""
    calls = 0

    def trace(frame: Any, event: str, _: object) -> None:
        nonlocal calls
        path, is_mutant = frame.f_code.co_filename, frame.f_code.co_name == "mutant"  # see tests/mutants
        if path.startswith(PACKAGE) and path.endswith(file) and not is_mutant:
            calls += 1
            if calls == number:
                sys.settrace(None)
                fn()

    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(None)
    return calls >= number

@pytest.mark.parametrize("method", ["run", "poll", "drain"])
def test_a_signal_handler_may_close_the_mux_at_any_moment(backend: str, method: str) -> None:
    steps: dict[str, Callable[[muxcore.Mux], object]] = {
        "run": muxcore.Mux.run,
        "poll": lambda mux: mux.poll(None),
        "drain": lambda mux: mux.drain(10),
    }
    number, more = 0, True
    while more:
        number += 1
        mux = muxcore.Mux(backend=backend)
        conn, theirs = attached(muxcore.Mux.__enter__(mux), Recorder(reply=bytes))
        if method != "poll":
            mux.call_later(0.01, mux.stop)
        theirs.sendall(b"x")
        try:
            more = at_call(number, mux.close, lambda mux=mux: steps[method](mux))
        except RuntimeError as error:
            assert str(error) == "the Mux is closed"  # noqa: PT017
        assert mux.closed == more
        mux.close()
        assert conn.closed
        theirs.close()


def test_a_mux_that_is_closed_while_it_is_bound_to_its_thread_does_not_turn(backend: str) -> None:
    def trace(frame: Any, event: str, _: object) -> None:
        if frame.f_code.co_name == "what_lives_as_long_as_this_thread":
            sys.settrace(None)
            mux.close()

    mux = muxcore.Mux(backend=backend)
    sys.settrace(trace)
    try:
        with suppress(RuntimeError):
            assert mux.poll() == []
    finally:
        sys.settrace(None)
    assert mux.closed


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one may come in a finalizer
@pytest.mark.parametrize("method", ["close", "abort", "write_eof", "pause_reading", "resume_reading", "send"])
def test_an_interrupted_method_may_be_called_again(mux: muxcore.Mux, method: str) -> None:
    number, more = 0, True
    while more:
        number += 1
        recorder = Recorder()
        conn, theirs = attached(mux, recorder)
        if method == "resume_reading":
            conn.pause_reading()
            mux.poll(0)
        arguments = [b"hello"] if method == "send" else []
        call = getattr(conn, method)
        try:
            more = at_call(number, interrupt, lambda call=call, arguments=arguments: call(*arguments))
        except KeyboardInterrupt:
            if method != "send":
                call()
            elif not conn.outbox_size:
                call(b"hello")
        theirs.settimeout(0)
        if method not in ("abort", "send"):  # whose event would send what was not scheduled
            theirs.send(b"x")
        for _ in range(3):
            mux.poll(0)
        if method == "pause_reading":
            assert recorder.count("message") == 0
            before = mux.stats().events
            mux.poll(0)
            assert mux.stats().events == before
        elif method == "resume_reading":
            assert recorder.count("message") == 1
        elif method == "abort":
            assert recorder.count("close") == 1
        else:
            assert theirs.recv(10) == (b"hello" if method == "send" else b"")
        conn.abort()
        theirs.close()
        mux.poll(0)


NAMES = ("family", "type", "proto", "fileno", "detach", "setblocking")
METHODS = {name: getattr(socket.SocketType, name) for name in NAMES}


def test_a_socket_whose_attach_is_interrupted_is_its_owners(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is open, and nothing else has it."""

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    if mux.backend == "epoll":
        pytest.skip("it makes no other object of it")
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(_own, "SocketType", SimpleNamespace(**METHODS | {"setblocking": interrupted}))
    with pytest.raises(KeyboardInterrupt):
        mux.attach(ours, Recorder())
    gc.collect()
    mux.add_writer(ours, print)
    mux.remove_writer(ours)
    ours.send(b"x")
    assert theirs.recv(1) == b"x"
    ours.close()
    theirs.close()


def test_an_interrupt_behind_the_move_of_a_socket_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def detach(sock: socket.socket) -> None:
        sock.detach()
        monkeypatch.undo()
        raise KeyboardInterrupt

    ours, theirs = socket.socketpair()
    monkeypatch.setattr(_own, "SocketType", SimpleNamespace(**METHODS | {"detach": detach}))
    with pytest.raises(KeyboardInterrupt):
        _own.moved(ours, _own.OwnSocket)
    gc.collect()
    assert ours.fileno() == -1
    theirs.settimeout(5)
    assert theirs.recv(1) == b""
    theirs.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one may come in a finalizer
@pytest.mark.unix_only("it sends itself a signal")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one may come in a finalizer
def test_interrupts_at_any_moment_lose_and_double_no_report(mux: muxcore.Mux) -> None:
    reports: list[list[tuple[muxcore.Connection, int]]] = []
    before = signal.signal(signal.SIGALRM, interrupt)

    def poll(seconds: float) -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                reports.extend(map(mux.poll, (0,)))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            pass

    try:
        for number in range(30):
            pairs = [socket.socketpair() for _ in range(100)]
            conns = [mux.attach(ours) for ours, _ in pairs]
            for i in range(10):
                poll(0.00002 + 0.0001 * ((7 * number + i) % 15))
            for _, theirs in pairs:
                theirs.close()
            for i in range(10):
                poll(0.00002 + 0.0001 * ((7 * number + i) % 15))
            reports.append(settle(mux))
            seen = [(conn, flag) for found in reports for conn, flags in found for flag in (1, 8, 16) if flags & flag]
            seen.sort(key=lambda one: (one[0].id, one[1]))
            assert seen == [(conn, flag) for conn in conns for flag in (1, 8, 16)]
            reports.clear()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one may come in a finalizer
@pytest.mark.unix_only("it sends itself a signal")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one may come in a finalizer
def test_an_interrupt_amid_an_accept_leaves_no_unserved_connection(mux: muxcore.Mux, listen: Listen) -> None:
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(15):
            listener = listen(Recorder())
            clients = [client(listener) for _ in range(40)]
            for i in range(15):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.00002 + 0.00006 * ((7 * number + i) % 15))
                    try:
                        mux.poll(0)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    pass
            settle(mux)
            alive = sum(is_alive(sock) for sock in clients)  # the others were reset
            assert (listener.connections, mux.stats().connections, len(list(mux.connections))) == (alive, alive, alive)
            listener.close()
            for sock in clients:
                sock.close()
            until(mux, lambda: mux.stats().connections == 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def is_alive(sock: socket.socket) -> bool:
    with nonblocking(sock):
        try:
            return len(sock.recv(1)) > 0
        except BlockingIOError:
            return True
        except OSError:
            return False


class Interrupted(Words):
    """The third line is followed by Ctrl-C."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        for i, line in enumerate(super().feed(data)):
            yield line
            if i == 2 and line == b"2":
                raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["recv_all", Recorder, Batches])
def test_an_interrupt_loses_no_message_that_the_framer_gave(mux: muxcore.Mux, how: Any) -> None:
    recorder = None if how == "recv_all" else how()
    conn, theirs = attached(mux, recorder, framer=Interrupted)
    theirs.sendall(b"0\n1\n2\n3\n4\n")
    got: list[bytes] = []
    interrupts = 0
    for _ in range(10):
        try:
            mux.poll(0.02)
            if recorder is None:
                got += conn.recv_all()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    assert (got if recorder is None else recorder.messages()) == [b"0", b"1", b"2", b"3", b"4"]
    theirs.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one may come in a finalizer
@pytest.mark.unix_only("it sends itself a signal")
@pytest.mark.parametrize("framer", [None, Lines(), LengthPrefix(2)], ids=repr)
def test_interrupts_at_any_moment_lose_and_double_nothing(mux: muxcore.Mux, framer: Any) -> None:
    """A timer of the system interrupts the loop again and again, wherever it is."""
    from muxcore._frame import encode

    conn, theirs = attached(mux, None, framer=framer)
    sent = b"".join(encode(framer, b"%06d" % i) for i in range(3000))
    got, view, interrupts = bytearray(), memoryview(sent), 0
    lists: list[list[bytes]] = []  # what recv_all returns is in here before a signal handler can come
    replied = 0

    before = signal.signal(signal.SIGALRM, interrupt)
    end = time.monotonic() + 20
    with nonblocking(theirs):
        while len(got) < len(sent) and time.monotonic() < end:
            try:
                view = view[theirs.send(view[:997]) :] if view else view
            except BlockingIOError:
                pass
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00002 + 0.00001 * (interrupts % 3000))
                try:
                    mux.poll(0)
                    lists.extend(map(type(conn).recv_all, (conn,)))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            for messages in lists[replied:]:
                conn.send_many(messages)
            replied = len(lists)
            try:
                got += theirs.recv(1 << 16)
            except BlockingIOError:
                pass
    signal.signal(signal.SIGALRM, before)
    assert bytes(got) == sent
    assert interrupts > 0
    theirs.close()


# --- the loop never sleeps in a socket call, and a turn ends --------------------------------------------------


def test_a_shared_listening_socket_that_was_made_blocking_does_not_stop_the_loop(mux: muxcore.Mux) -> None:
    """Promise never-blocks."""
    with socket.create_server(LOCALHOST) as shared:
        mux.listen(shared.dup(), Recorder(reply=bytes))
        shared.setblocking(True)
        for _ in range(3):
            with socket.create_connection(shared.getsockname()) as sock:
                assert exchange(mux, sock, b"hello") == b"hello"
            shared.setblocking(True)


def test_a_shared_connection_that_was_made_blocking_does_not_stop_the_loop(mux: muxcore.Mux) -> None:
    """Promise never-blocks."""
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours.dup(), Recorder())
    ours.setblocking(True)
    conn.send(bytes(10_000_000))
    mux.poll(0)
    assert conn.outbox_size > 0
    ours.setblocking(True)
    receive(mux, theirs, 10_000_000)
    mux.poll(0)
    ours.close()
    theirs.close()


def test_a_shared_datagram_socket_that_was_made_blocking_does_not_stop_the_loop(mux: muxcore.Mux) -> None:
    """Promise never-blocks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    received: list[bytes] = []
    datagram = mux.datagram(ours.dup(), lambda _, messages: received.extend(data for data, _ in messages))
    ours.setblocking(True)
    theirs.send(b"x")
    until(mux, lambda: received)
    ours.setblocking(True)
    for _ in range(1000):
        datagram.send(bytes(1000))
    mux.poll(0)
    ours.close()
    theirs.close()


@pytest.mark.linux_only("a lower limit of descriptors keeps the others open there")
def test_a_listener_that_is_woken_amid_a_pause_does_not_pause_more_often(mux: muxcore.Mux, listen: Listen) -> None:
    import resource

    listener = listen(recorder := Recorder())
    clients = []
    for _ in range(20):
        clients.append(socket.socket())
        clients[-1].setblocking(False)
        clients[-1].connect_ex(listener.address)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as last:
        lowest = last.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, before[1]))
    try:
        for _ in range(10):
            until(mux, lambda: mux.stats().accept_pauses)
            accepted = recorder.count("open")
            recorder.connections[-1].abort()
            until(mux, lambda accepted=accepted: recorder.count("open") > accepted)
        pauses = mux.stats().accept_pauses
        turns(mux, 1.5)
        assert mux.stats().accept_pauses - pauses < 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for sock in clients:
            sock.close()


def test_a_listener_hands_out_its_socket_without_making_it_blocking(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(Recorder())
    with listener.dup() as other:
        assert other.getsockname() == listener.address
        assert not os.get_blocking(listener.fileno())
        assert other.gettimeout() == 0
        listener.close()
        with pytest.raises(muxcore.ConnectionClosed, match="closed"):
            listener.dup()
        with socket.create_connection(other.getsockname()):
            other.setblocking(True)
            other.accept()[0].close()


def test_timers_and_calls_do_not_wait_for_all_messages_of_full_connections(mux: muxcore.Mux) -> None:
    pairs = [attached(mux, muxcore.Handler(), framer=Lines()) for _ in range(30)]
    for _, theirs in pairs:
        theirs.setblocking(False)
        theirs.send(b"\n" * 150_000)
    seen: list[int] = []
    mux.call_later(0, lambda: seen.append(mux.stats().messages_in))
    until(mux, lambda: seen)
    assert seen[0] < 1_000_000
    for _, theirs in pairs:
        theirs.close()


@pytest.mark.parametrize("late", [False, True])
def test_a_timer_that_is_due_in_each_turn_starves_nothing(mux: muxcore.Mux, late: bool) -> None:
    _, theirs = attached(mux, recorder := Recorder())
    received: list[Any] = []
    datagram = mux.datagram(LOCALHOST, lambda _, messages: received.append(messages[0][0]))
    ours, watched = socket.socketpair()
    mux.add_reader(ours, lambda: received.append(ours.recv(9)))
    when = mux.time()

    def beat() -> None:
        nonlocal when
        when += 0.0001
        if late:
            time.sleep(0.001)
        mux.call_at(when, beat) if late else mux.call_later(0, beat)

    beat()
    mux.poll(1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"datagram", datagram.address)
    watched.send(b"watched")
    theirs.send(b"message")
    for _ in range(10):
        mux.poll(1)
    assert (recorder.messages(), sorted(received)) == ([b"message"], [b"datagram", b"watched"])
    for sock in (theirs, ours, watched):
        sock.close()


# --- time ---------------------------------------------------------------------------------------------------


def test_an_idle_peer_is_reported_when_its_time_is_up_and_not_a_linger_later(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    _, theirs = attached(mux, recorder, timeouts=muxcore.Timeouts(idle=0.05, linger=1000))
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.IdleTimeout)
    assert theirs.recv(1) == b""
    theirs.close()


def test_what_an_idle_connection_owes_is_still_sent(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    conn, theirs = attached(
        mux, recorder, timeouts=muxcore.Timeouts(idle=0.05, linger=1000), limits=muxcore.Limits(high=1 << 24)
    )
    conn.send(bytes(4_000_000))
    until(mux, lambda: conn.closing)
    assert len(receive(mux, theirs)) == 4_000_000
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.IdleTimeout)
    theirs.close()


def test_a_peer_that_reads_is_not_silent(mux: muxcore.Mux) -> None:
    conn, theirs = attached(mux, Recorder(), timeouts=muxcore.Timeouts(silence=0.7))
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        conn.send(b"x")
        mux.poll(0.02)
    assert not conn.closing
    until(mux, lambda: conn.closed)
    assert isinstance(conn.error, muxcore.IdleTimeout)
    assert conn.error.limit == 0.7
    assert mux.stats().timeouts == 1
    theirs.close()


def test_pieces_of_a_message_are_not_silence(mux: muxcore.Mux) -> None:
    conn, theirs = attached(mux, Recorder(), framer=Lines(1 << 30), timeouts=muxcore.Timeouts(silence=0.7))
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        theirs.sendall(b"x")
        mux.poll(0.02)
    assert not conn.closing
    theirs.close()


def test_a_silent_peer_that_reads_nothing_is_reset(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    conn, theirs = attached(
        mux, recorder, timeouts=muxcore.Timeouts(silence=0.1), limits=muxcore.Limits(high=1 << 24)
    )
    conn.send(bytes(4_000_000))
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.IdleTimeout)
    theirs.close()


# --- against mutants that survived (tests/mutants) ------------------------------------------------------


@styles
def test_what_a_framer_found_while_it_set_another_and_paused_waits_for_resume(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], style: type[Recorder]
) -> None:
    recorder = style()
    conn, theirs = attached(mux, recorder, framer=Words)

    def switch() -> None:
        conn.framer = Lines()
        conn.pause_reading()

    words[b"switch"] = switch
    theirs.sendall(b"one\nswitch\ntwo\nthree\n")
    until(mux, lambda: not conn.is_reading())
    mux.poll(0)
    assert recorder.messages() == ([b"one"] if style is Recorder else [])
    assert conn.unread == (b"" if style is Recorder else b"one\n") + b"switch\ntwo\nthree\n"
    conn.resume_reading()
    until(mux, lambda: recorder.count("message") == 4)
    assert recorder.messages() == [b"one", b"switch", b"two", b"three"]
    theirs.close()


@styles
def test_a_framer_that_finds_nothing_and_sets_another_and_pauses_leaves_all_for_resume(
    mux: muxcore.Mux, style: type[Recorder]
) -> None:
    class Switching(Words):
        def feed(self, data: bytes) -> Iterator[bytes]:
            self.buffer += data
            conn.framer = Lines()
            conn.pause_reading()
            return iter(())

    recorder = style()
    conn, theirs = attached(mux, recorder, framer=Switching)
    theirs.sendall(b"one\ntwo\n")
    until(mux, lambda: not conn.is_reading())
    mux.poll(0)
    assert recorder.messages() == []
    conn.resume_reading()
    until(mux, lambda: recorder.count("message") == 2)
    assert recorder.messages() == [b"one", b"two"]
    theirs.close()


@pytest.mark.parametrize("framer", [Lines(), Words], ids=repr)
def test_a_rest_that_reads_its_own_connection_gives_nothing_twice(mux: muxcore.Mux, framer: Any) -> None:
    got: list[Any] = []

    class Reading(Words):
        def rest(self) -> bytes:
            if not got:
                got.append(conn.recv())
            return super().rest()

    conn, theirs = attached(mux, None, framer=Reading)
    theirs.sendall(b"one\ntwo\nthree\n")
    until(mux, lambda: mux.stats().bytes_in)
    conn.framer = framer
    until(mux, lambda: got.extend(conn.recv_all()) or len(got) >= 3)
    mux.poll(0)
    assert got + conn.recv_all() == [b"one", b"two", b"three"]
    theirs.close()


def test_a_rest_that_polls_leaves_nothing_out(mux: muxcore.Mux) -> None:
    polled: list[int] = []

    class Polling(Words):
        def rest(self) -> bytes:
            left = self.buffer
            if not polled:
                polled.append(1)
                theirs.sendall(b" more\n")
                until(mux, lambda: mux.stats().bytes_in == 10)
            return left

    conn, theirs = attached(mux, None, framer=Polling)
    theirs.sendall(b"half")
    until(mux, lambda: mux.stats().bytes_in == 4)
    conn.framer = Lines()
    assert conn.recv_all() == [b"half more"]
    theirs.close()


def test_an_interrupt_before_the_first_message_of_a_read_loses_none(mux: muxcore.Mux) -> None:
    class Found:
        interrupted = False

        def __init__(self, messages: Iterator[bytes]) -> None:
            self.messages = messages

        def __iter__(self) -> Iterator[bytes]:
            if not Found.interrupted:
                Found.interrupted = True
                raise KeyboardInterrupt
            return self.messages

    class Late(Words):
        def feed(self, data: bytes) -> Any:
            return Found(super().feed(data))

    recorder = Recorder()
    _, theirs = attached(mux, recorder, framer=Late)
    theirs.sendall(b"one\ntwo\n")
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    until(mux, lambda: recorder.count("message") == 2)
    assert recorder.messages() == [b"one", b"two"]
    theirs.close()


def test_an_interrupt_leaves_a_message_of_a_former_framer_in_its_place(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]]
) -> None:
    number, more = 0, True
    while more:
        number += 1
        conn, theirs = attached(mux, None, framer=Words)
        words[b"up"] = lambda conn=conn: setattr(conn, "framer", Delimiter(b"|"))
        theirs.sendall(b"up\ntwo|")
        until(mux, lambda number=number: mux.stats().bytes_in == 7 * number)
        got: list[Any] = []
        with suppress(KeyboardInterrupt):
            more = at_call(
                number, interrupt, lambda conn=conn, got=got: got.extend(conn.recv_all()), "_frame.py"
            )
        got.extend(conn.recv_all())
        assert got == [b"up", b"two"]
        conn.abort()
        theirs.close()


@contextmanager
def during_the_first_split(what: Callable[[], object]) -> Iterator[None]:
    """As a signal handler or a finaliser may do it, amid the splitting of an inline request."""
    done: list[int] = []

    def trace(frame: Any, event: str, arg: object) -> None:
        if frame.f_code.co_name == "split_inline" and not done:
            done.append(1)
            what()

    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(tracer)
    assert done


@pytest.mark.parametrize("looks", [False, True], ids=["", "looks"])
@pytest.mark.parametrize("stream", [b"PING\n", b"PING\nPIN\n", b"PING\nPING\n", b"PING\nPONG\n"])
@pytest.mark.parametrize("style", [None, Recorder, Batches])
def test_an_inline_request_that_recv_gets_while_it_is_split_is_not_delivered_twice(
    mux: muxcore.Mux, style: type[Recorder] | None, stream: bytes, looks: bool
) -> None:
    recorder = None if style is None else style()
    conn, theirs = attached(mux, recorder, framer=Resp())
    nested: list[Any] = []
    got: list[Any] = []

    def receive_one() -> None:
        nested.append(conn.recv())
        if looks:
            conn.set_limits()  # for the next message

    theirs.sendall(stream)
    with during_the_first_split(receive_one):
        if recorder is None:
            until(mux, lambda: mux.stats().bytes_in)
            got += conn.recv_all()
        else:
            until(mux, recorder.messages if stream != b"PING\n" else lambda: nested)
    settle(mux)
    got += [] if recorder is None else recorder.messages()
    assert [message for message in nested + got if message is not None] == [[line] for line in stream.split()]
    theirs.close()


@pytest.mark.parametrize("style", [None, Recorder, Batches])
@pytest.mark.parametrize("what", ["pause", "close", "framer"])
def test_an_inline_request_is_split_for_a_connection_as_it_is_then(
    mux: muxcore.Mux, style: type[Recorder] | None, what: str
) -> None:
    recorder = None if style is None else style()
    conn, theirs = attached(mux, recorder, framer=Resp())
    theirs.sendall(b"PING\n")
    calls: dict[str, Callable[[], object]] = {
        "pause": conn.pause_reading, "close": conn.close, "framer": lambda: setattr(conn, "framer", Lines()),
    }
    got: list[Any] = []

    def receive_all() -> list[Any]:
        mux.poll(0)
        got.extend([] if recorder is None else recorder.messages()[len(got) :])
        got.extend(conn.recv_all() if recorder is None else [])
        return got

    with during_the_first_split(calls[what]):
        until(mux, lambda: mux.stats().bytes_in and (receive_all() or not conn.is_reading()))
    assert got == ([b"PING"] if what == "framer" else [])
    conn.resume_reading()
    mux.poll(0)
    assert receive_all() == ([b"PING"] if what == "framer" else [[b"PING"]] if what == "pause" else [])
    theirs.close()


def test_an_overflow_in_another_thread_leaves_the_end_to_the_thread_of_the_mux(mux: muxcore.Mux) -> None:
    conn, theirs = attached(mux, None, limits=muxcore.Limits(max_outbox=1000, high=1000, low=0))
    closed: list[bool] = []

    def send() -> None:
        conn.send(bytes(808))  # with the size of an entry of the queue, all that fits
        conn.send(b"x")
        closed.append(conn.closed)

    other = threading.Thread(target=send)
    other.start()
    other.join()
    assert (closed, mux.stats().drops, conn.closing) == ([False], 1, True)
    until(mux, lambda: conn.closed)
    assert isinstance(conn.error, muxcore.OutboxFull)
    theirs.close()


def test_sendfile_to_a_peer_that_is_gone_does_not_end_a_process_that_has_not_ignored_sigpipe() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent("""
            import signal, socket, tempfile, muxcore
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            with muxcore.Mux() as mux, tempfile.TemporaryFile() as file:
                file.truncate(1 << 20)
                ours, theirs = socket.socketpair()
                conn = mux.attach(ours)
                mux.poll(0)
                conn.sendfile(file)
                theirs.close()
                while not conn.closed: mux.poll(0.02)
                print(type(conn.error).__name__)
            """)],
        capture_output=True, text=True, timeout=40, check=False,
    )
    assert (done.stdout, done.returncode) == ("BrokenPipeError\n", 0), done.stderr


def test_a_report_that_was_interrupted_comes_with_the_next_poll(mux: muxcore.Mux) -> None:
    calls: list[int] = []

    class Interrupted(Words):
        def feed(self, data: bytes) -> Iterator[bytes]:
            calls.append(1)
            self.buffer += data
            if len(calls) == 1:
                raise KeyboardInterrupt
            return super().feed(b"")

    conn, theirs = attached(mux, None, framer=Interrupted)
    theirs.sendall(b"one\n")
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    reported: list[object] = []
    until(mux, lambda: reported.extend(mux.poll(0.02)) or reported, 5)
    assert reported == [(conn, muxcore.READABLE)]
    assert conn.recv() == b"one"
    theirs.close()


def test_what_a_finalizer_brings_about_while_poll_makes_its_list_is_reported(backend: str) -> None:
    """Here: one that resumes a connection whose drain is in the list."""
    threshold = gc.get_threshold()
    for allocations in range(0, 60, 2):
        with muxcore.Mux(backend=backend) as mux:
            others = [attached(mux, None)[1] for _ in range(20)]
            conn, theirs = attached(mux, None, limits=muxcore.Limits(high=1000, low=100))
            theirs.sendall(b"held back")
            while not conn.inbox_size:
                mux.poll(1)
            conn.pause_reading()
            while conn.outbox_size <= 1000:
                conn.send(bytes(5000))
                conn.flush()
            mux.poll(0)
            with suppress(BlockingIOError):
                theirs.setblocking(False)
                while theirs.recv(1 << 20):
                    pass
            for other in others:
                other.close()  # their EOFs come behind the drain in the list
            gc.collect()
            gc.disable()
            Closes(conn.resume_reading)
            gc.set_threshold(gc.get_count()[0] + 1 + allocations, *threshold[1:])
            gc.enable()
            try:
                reported = mux.poll(1)
            finally:
                gc.set_threshold(*threshold)
            gc.collect()  # the finalizer runs now, if it has not
            reported += settle(mux)
            flags = [what for one, what in reported if one is conn]
            assert flags in ([muxcore.DRAINED, muxcore.READABLE], [muxcore.DRAINED | muxcore.READABLE])
            theirs.close()


@pytest.mark.parametrize("nth", [1, 2])
def test_eof_waits_for_resume_when_the_framer_has_paused_the_connection(mux: muxcore.Mux, nth: int) -> None:
    """`rest` is read before the EOF is reported, and more than once."""
    conns: list[muxcore.Connection] = []

    class Pausing(Words):
        calls = 0

        def rest(self) -> bytes:
            for conn in conns:
                self.calls += 1
                if self.calls == nth:
                    conn.pause_reading()
            return b""

    class Late(Recorder):
        def on_eof(self, conn: muxcore.Connection) -> None:
            self.events.append(("eof", conn.id, None))

    recorder = Late()
    conn, theirs = attached(mux, recorder, framer=Pausing)
    theirs.sendall(b"word\n")
    until(mux, lambda: recorder.count("message"))
    conns.append(conn)
    theirs.shutdown(socket.SHUT_WR)
    until(mux, lambda: conn.eof)
    mux.poll(0)
    assert recorder.names() == ["open", "message"]
    conns.clear()
    conn.resume_reading()
    mux.poll(0)
    assert recorder.names() == ["open", "message", "eof"]
    conn.close()
    theirs.close()


def test_what_a_signal_handler_receives_amid_a_look_for_messages_keeps_none_behind_it(mux: muxcore.Mux) -> None:
    """It stood behind the first message until more input came."""
    recorder = Recorder()
    conn, theirs = attached(mux, recorder, framer=Words)
    received: list[Any] = []

    def receive_first(frame: Any, event: str, arg: object) -> None:
        if event == "return" and frame.f_code.co_name == "_find" and frame.f_locals["self"].found and not received:
            received.append(conn.recv())

    theirs.sendall(b"one\ntwo\nthree\n")
    sys.setprofile(receive_first)
    try:
        until(mux, lambda: received)
    finally:
        sys.setprofile(None)
    until(mux, lambda: recorder.messages() == [b"two", b"three"])
    assert received == [b"one"]
    theirs.close()


# --- a framer that changes its connection at odd moments ------------------------------------------------


@pytest.mark.parametrize("how", ["recv", "recv_all", Recorder, Batches])
def test_a_framer_that_sets_another_at_the_end_of_its_input_leaves_it_what_comes_next(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], how: Any
) -> None:
    recorder = None if isinstance(how, str) else how()
    conn, theirs = attached(mux, recorder, framer=Words)
    words[b"up"] = lambda: setattr(conn, "framer", Delimiter(b"|"))
    theirs.sendall(b"up\n")
    until(mux, lambda: mux.stats().bytes_in == 3)
    mux.poll(0)
    theirs.sendall(b"two|")
    until(mux, lambda: mux.stats().bytes_in == 7)
    mux.poll(0)
    if recorder is None:
        got = conn.recv_all() if how == "recv_all" else [conn.recv(), conn.recv()]
    else:
        got = recorder.messages()
    assert got == [b"up", b"two"]
    theirs.close()


def test_a_framer_that_sets_another_before_a_message_leaves_its_rest_delivers_it_once(mux: muxcore.Mux) -> None:
    class Early(Words):
        def feed(self, data: bytes) -> Iterator[bytes]:
            self.buffer += data
            conn.framer = Lines()
            line, self.buffer = self.buffer.split(b"\n", 1)
            yield line

    recorder = Recorder()
    conn, theirs = attached(mux, recorder, framer=Early)
    theirs.sendall(b"one\ntwo\n")
    until(mux, lambda: recorder.count("message") >= 2)
    mux.poll(0)
    assert recorder.messages() == [b"one", b"two"]
    theirs.close()


class Late(Words):
    """Its action runs after the message was received, when the next one is requested."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.buffer += data
        while b"\n" in self.buffer:
            line, self.buffer = self.buffer.split(b"\n", 1)
            yield line
            self.do.get(line, int)()


@pytest.mark.parametrize("reads", [False, True], ids=["", "reads"])
def test_a_framer_that_sets_another_after_recv_leaves_it_what_comes_next(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], reads: bool
) -> None:
    """What has come since was not fed yet; or it was, since the framer has called recv() of its own connection."""
    conn, theirs = attached(mux, None, framer=Late)
    nested: list[object] = []

    def switch() -> None:
        if reads:
            nested.append(conn.recv())
        conn.framer = Lines()

    words[b"up"] = switch
    for data in (b"up\n", b"two\nthree\n"):
        before = mux.stats().bytes_in
        theirs.sendall(data)
        until(mux, lambda before=before: mux.stats().bytes_in > before)
    assert conn.recv() == b"up"
    assert conn.recv_all() == [b"two", b"three"]
    assert nested == [None] * reads
    theirs.close()


def test_a_framer_that_sets_another_at_the_end_of_the_stream_reports_no_end_of_its_own(mux: muxcore.Mux) -> None:
    class Switching(Words):
        def feed(self, data: bytes) -> Iterator[bytes]:
            if b"two" not in data:
                return super().feed(data)
            self.buffer += data
            conn.framer = Lines()
            return iter(())

    conn, theirs = attached(mux, None, framer=Switching)
    for data in (b"one\n", b"two\n"):
        before = mux.stats().bytes_in
        theirs.sendall(data)
        until(mux, lambda before=before: mux.stats().bytes_in > before)
    theirs.shutdown(socket.SHUT_WR)
    until(mux, lambda: conn.eof)
    assert conn.recv() == b"one"
    mux.poll(0)
    assert (conn.recv(), conn.error) == (b"two", None)
    theirs.close()


def test_a_rest_that_reads_behind_a_message_of_a_former_framer_loses_nothing(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]]
) -> None:
    got: list[Any] = []

    class Reading(Words):
        def rest(self) -> bytes:
            before = super().rest()
            if got == [b"up"]:
                got.append(conn.recv())
            return before

    conn, theirs = attached(mux, None, framer=Words)
    words[b"up"] = lambda: setattr(conn, "framer", Reading)
    theirs.sendall(b"up\none\ntwo\n")
    until(mux, lambda: mux.stats().bytes_in)
    got.append(conn.recv())
    conn.framer = Lines()
    assert got + conn.recv_all() == [b"up", b"one", b"two"]
    theirs.close()


def test_a_rest_that_sets_the_limits_of_its_connection_has_set_them(mux: muxcore.Mux) -> None:
    class Limiting(Words):
        def rest(self) -> bytes:
            if conn.limits.max_inbox != 12345:
                conn.set_limits(max_inbox=12345)
            return super().rest()

    conn, theirs = attached(mux, None, framer=Limiting)
    theirs.sendall(b"half")
    until(mux, lambda: mux.stats().bytes_in)
    conn.framer = Lines()
    assert (conn.limits.max_inbox, conn.framer, conn.unread) == (12345, Lines(), b"half")
    theirs.close()


# --- a finaliser that runs while messages are handed out --------------------------------------------------


class AtItsEnd:
    """Without a cycle: it runs as soon as the last reference is gone."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do

    def __del__(self) -> None:
        self.do()


def test_a_finaliser_of_a_message_that_closes_the_connection_keeps_it_from_the_next(mux: muxcore.Mux) -> None:
    got: list[Any] = []

    def on_message(conn: muxcore.Connection, message: Any) -> None:
        got.append(message[0])
        message.append(AtItsEnd(conn.close))

    _, theirs = attached(mux, on_message, framer=Resp())
    theirs.sendall(b"ONE\r\nTWO\r\n")
    until(mux, lambda: got)
    mux.poll(0)
    assert got == [b"ONE"]
    theirs.close()


# --- interrupts that restore what was removed -------------------------------------------------------------


@contextmanager
def interrupted_at(name: str, count: int) -> Iterator[None]:
    """Ctrl-C at the n-th call of a function of muxcore's Python."""
    calls: list[int] = []

    def trace(frame: Any, event: str, arg: object) -> None:
        if frame.f_code.co_name == name and "muxcore" in frame.f_code.co_filename:
            calls.append(1)
            if len(calls) == count:
                raise KeyboardInterrupt

    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        sys.settrace(tracer)


class Stopped(Words):
    """The first line \"stop\" is followed by Ctrl-C."""

    stopped: ClassVar[list[int]] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        for line in super().feed(data):
            yield line
            if line == b"stop" and not self.stopped:
                self.stopped.append(1)
                raise KeyboardInterrupt


@pytest.fixture
def stopped() -> Iterator[type[Stopped]]:
    Stopped.stopped.clear()
    yield Stopped
    Stopped.stopped.clear()


@pytest.mark.parametrize("anew", [False, True], ids=["", "anew"])
def test_an_interrupt_restores_exactly_the_messages_that_were_removed(
    mux: muxcore.Mux, stopped: type[Stopped], anew: bool
) -> None:
    """Also for another framer, which gets the bytes of the restored messages."""
    conn, theirs = attached(mux, None, framer=stopped)
    theirs.sendall(b"one\ntwo\nstop\nthree\n")
    until(mux, lambda: mux.stats().bytes_in)
    assert conn.recv() == b"one"
    with pytest.raises(KeyboardInterrupt):
        conn.recv_all()
    assert mux.stats().messages_in == 1
    assert conn.unread == b"two\nstop\nthree\n"
    if anew:
        conn.framer = Lines()
    assert conn.recv_all() == [b"two", b"stop", b"three"]
    theirs.close()


@pytest.mark.parametrize("anew", [False, True], ids=["", "anew"])
def test_an_interrupt_restores_exactly_the_requests_that_were_removed(
    mux: muxcore.Mux, anew: bool
) -> None:
    conn, theirs = attached(mux, None, framer=Resp())
    theirs.sendall(b"ONE\r\nTWO\r\nTHREE\r\n")
    until(mux, lambda: mux.stats().bytes_in)
    assert conn.recv() == [b"ONE"]
    with interrupted_at("split_inline", 2):
        conn.recv_all()
    if anew:
        conn.framer = Resp(1 << 10)
    assert conn.recv_all() == [[b"TWO"], [b"THREE"]]
    theirs.close()


def test_an_interrupt_restores_messages_of_a_former_framer(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]], stopped: type[Stopped]
) -> None:
    conn, theirs = attached(mux, None, framer=Words)
    words[b"up"] = lambda: setattr(conn, "framer", stopped)
    theirs.sendall(b"up\nstop\nthree\n")
    until(mux, lambda: mux.stats().bytes_in)
    with pytest.raises(KeyboardInterrupt):
        conn.recv_all()
    assert conn.unread == b"up\nstop\nthree\n"
    assert conn.recv_all() == [b"up", b"stop", b"three"]
    theirs.close()


def test_an_interrupt_restores_messages_of_a_peer_that_was_reset(
    mux: muxcore.Mux, listen: Listen, stopped: type[Stopped]
) -> None:
    sock = client(listen(framer=stopped))
    until(mux, lambda: len(mux.connections))
    [conn] = mux.connections
    sock.sendall(b"one\nstop\nthree\n")
    until(mux, lambda: mux.stats().bytes_in)
    reset(sock)
    until(mux, lambda: conn.closed)
    with pytest.raises(KeyboardInterrupt):
        conn.recv_all()
    assert conn.recv_all() == [b"one", b"stop", b"three"]
    assert mux.stats().messages_in == 3


def test_what_is_sent_is_for_the_new_framer_though_messages_of_the_former_are_left(
    mux: muxcore.Mux, words: dict[bytes, Callable[[], object]]
) -> None:
    class Shouting(Words):
        def encode(self, message: bytes) -> bytes:
            return message.upper() + b"!"

    conn, theirs = attached(mux, Recorder(), framer=Words)

    def switch() -> None:
        conn.framer = Shouting
        conn.pause_reading()

    words[b"switch"] = switch
    theirs.sendall(b"switch\n")
    until(mux, lambda: not conn.is_reading())
    conn.send(b"x")
    conn.flush()
    assert theirs.recv(10) == b"X!"
    theirs.close()


# --- a forgotten Mux ----------------------------------------------------------------------------------------

# Everything that its objects have, called while the collector clears it. (Then even `mux.run` returns at once.)
CLEARED = """
import gc, socket, sys, warnings
import muxcore
warnings.simplefilter("ignore")
gc.disable()

class Exporter(tuple):
    def __buffer__(self, flags):
        return memoryview(b"abc")

    def __release_buffer__(self, view):
        called = 0
        for owner in self[0]:
            for name in dir(owner):
                if name[:1] != "_" or name in ("_connections", "_listeners", "_datagrams", "_owner", "__repr__"):
                    for args in ((), (b"x",), ([b"x"],), (0,)):
                        try:
                            getattr(owner, name)(*args)
                        except Exception:
                            pass
                        called += 1
        print("called", called > 100, flush=True)

class Holder:
    pass

def forget(kind):
    mux = muxcore.Mux(backend=sys.argv[1])
    ours, theirs = socket.socketpair()
    listener = mux.listen(("127.0.0.1", 0), lambda conn, message: None, timeouts=muxcore.Timeouts(idle=9))
    conn = mux.attach(ours, None if kind == "pull" else lambda conn, message: None)
    datagram = mux.datagram(("127.0.0.1", 0), print)
    connecting = mux.connect(listener.address, print)
    theirs.send(b"input")
    mux.poll(0)
    mux.poll(0)
    if kind == "closed":
        mux.close()
    holder = Holder()
    owners = (conn, listener, datagram, connecting, mux)
    holder.all, holder.peer, holder.view = owners, theirs, memoryview(Exporter((owners, holder)))
    conn.data = datagram.data = holder

for kind in ("push", "pull", "closed"):
    forget(kind)
    gc.collect()
"""


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no class in Python exports a buffer")
def test_what_runs_while_the_collector_clears_a_forgotten_mux_may_call_anything_of_it(backend: str) -> None:
    program = [sys.executable, "-c", CLEARED, backend]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "called True\n" * 3, "")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("end", [True, False])
def test_what_leads_back_to_its_owner_through_tuples_alone_is_collected(backend: str, end: bool) -> None:
    """The collector cannot clear a tuple: something else in the cycle has to let go."""
    mux = muxcore.Mux(backend=backend)
    handler = Recorder()
    listener = mux.listen(LOCALHOST, handler)
    sock = client(listener)
    while not handler.connections:
        mux.poll(1)
    [conn] = handler.connections
    connecting = mux.connect(listener.address, Recorder(), framer=Words)
    datagram = mux.datagram(LOCALHOST, print)
    conn.data, datagram.data, connecting.data = ((conn,),), (datagram,), (connecting, conn)
    conn.framer = SimpleNamespace(conn=conn, framer=Words).framer
    if end:
        mux.close()
    forgotten = [weakref.ref(each) for each in (mux, listener, conn, connecting, datagram)]
    del mux, listener, conn, connecting, datagram, handler
    gc.collect()
    gc.collect()
    assert [each() for each in forgotten] == [None] * 5
    sock.close()


# --- SIGPIPE ----------------------------------------------------------------------------------------------


SIGPIPE = """
import signal, socket, sys, tempfile, muxcore

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
file = tempfile.TemporaryFile()
file.write(bytes(5_000_000))
file.flush()
closed = []

class Handler:
    def on_message(self, conn, message):
        conn.sendfile(file) if sys.argv[2] == "sendfile" else conn.send(bytes(5_000_000))

    def on_close(self, conn, error):
        closed.append(error)

with muxcore.Mux(backend=sys.argv[1]) as mux:
    for _ in range(3):
        ours, theirs = socket.socketpair()
        mux.attach(ours, Handler())
        theirs.send(b"get")
        mux.poll(0)
        theirs.close()
        mux.poll(0.1)
    while len(closed) < 3:
        mux.poll(1)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert not signal.sigpending()
print("alive")
"""


@pytest.mark.unix_only("it has SIGPIPE")
@pytest.mark.parametrize("what", ["send", "sendfile"])
def test_a_peer_that_goes_ends_no_process_that_sigpipe_would_end(backend: str, what: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SIGPIPE, backend, what], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr


def test_the_class_of_a_framers_factory_is_not_hashed(mux: muxcore.Mux, listen: Listen) -> None:
    class Meta(type):
        def __hash__(cls) -> int:
            if served:
                raise ZeroDivisionError
            return type.__hash__(cls)

    class Factory(metaclass=Meta):
        def __call__(self) -> Words:
            return Words()

    served: list[bool] = []
    recorder = Recorder(reply=bytes)
    listener = listen(recorder, framer=Factory())
    served.append(True)
    sock = client(listener)
    assert exchange(mux, sock, b"one\n") == b"one\n"
    assert recorder.messages() == [b"one"]
    assert mux.stats().handler_errors == 0
    served.clear()
    sock.close()


def test_a_mux_cannot_be_copied(backend: str) -> None:
    with muxcore.Mux(backend=backend) as mux:
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                way(mux)  # type: ignore[operator]
        mux.poll(0)


@pytest.mark.parametrize(
    "way",
    [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_of_an_error_leaves_its_connection_behind(mux: muxcore.Mux, way: Callable[[Any], Any]) -> None:
    """So that a pool of processes, or a logger's queue, can pass it on."""
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder(), limits=muxcore.Limits(low=0, high=1, max_outbox=1, overflow="raise"))
    with pytest.raises(muxcore.OutboxFull) as caught:
        while True:
            conn.send(bytes(1 << 16))
    error = caught.value
    error.add_note("a note")
    same = way(error)
    assert (type(same), str(same), same.limit, same.__notes__) == (type(error), str(error), 1, ["a note"])
    assert (error.conn, same.conn) == (conn, None)
    theirs.close()


@pytest.mark.parametrize("action", ["abort", "close", "detach", "close the Mux"])
def test_whatever_a_signal_handler_does_amid_a_detach_it_returns_a_socket_or_says_why(
    backend: str, action: str
) -> None:
    package, at, last = str(Path(muxcore.__file__).parent), 0, False
    while not last:
        at += 1
        left = [at]
        with muxcore.Mux(backend=backend) as mux:
            ours, theirs = socket.socketpair()
            conn = mux.attach(ours, Recorder())
            mux.poll(0)
            others: list[socket.socket] = []

            actions: dict[str, Callable[[], object]] = {
                "abort": conn.abort,
                "close": conn.close,
                "detach": lambda conn=conn, others=others: others.append(conn.detach()),
                "close the Mux": mux.close,
            }

            def trace(frame: Any, event: str, arg: Any, left: list[int] = left, act: Any = actions[action]) -> Any:
                if not frame.f_code.co_filename.startswith(package):
                    return None
                left[0] -= 1
                if left[0] == 0:
                    sys.settrace(None)
                    with suppress(muxcore.ConnectionClosed):
                        act()
                return trace

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                others.append(conn.detach())
            except (muxcore.ConnectionClosed, RuntimeError):
                pass
            finally:
                sys.settrace(before)
            last = left[0] > 0
        assert len(others) <= 1
        for sock in others:
            theirs.sendall(b"x")
            assert sock.recv(1) == b"x"
            sock.close()
        theirs.close()
