"""Messages through connections: framing, delivery, files, broadcasts (Promise framer-changes)."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
import tracemalloc
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest
from support import (
    DEADLINE,
    InterruptAt,
    Recorder,
    client,
    memory,
    nonblocking,
    open_fds,
    pattern,
    push,
    receive,
    reset,
    turns,
    until,
)  # fmt: skip

import muxcore
from muxcore import Delimiter, Fixed, LengthPrefix, Lines, Resp, RespError
from muxcore._frame import encode

Listen = Callable[..., muxcore.Listener]
BIG = 5 << 20
PATTERN = pattern(BIG)


class Echo(Recorder):
    """Sends every message back, through the framer."""

    def on_message(self, conn: muxcore.Connection, message: Any) -> None:
        super().on_message(conn, message)
        conn.send(message)


class Batches(Recorder):
    """Keeps what each call of on_messages got."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[Any]] = []

    def on_messages(self, conn: muxcore.Connection, messages: list[Any]) -> None:
        self.batches.append(messages)
        self.events.extend(("message", conn.id, message) for message in messages)


class Late(Recorder):
    """Stays when the peer has finished."""

    def on_eof(self, conn: muxcore.Connection) -> None:
        self.events.append(("eof", conn.id, None))


class Words:
    """A framer of a user: words that end with a space; lazy."""

    def __init__(self) -> None:
        self.buffer = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.buffer += data
        while b" " in self.buffer:
            word, self.buffer = self.buffer.split(b" ", 1)
            if word == b"bad":
                raise muxcore.FrameError("a bad word")
            if word == b"bug":
                raise RuntimeError("a bug in the framer")
            yield word

    def encode(self, message: bytes) -> bytes:
        if b" " in message:
            raise ValueError("two words")
        return message + b" "

    def rest(self) -> bytes:
        return self.buffer


def opened(mux: muxcore.Mux, listen: Listen, handler: Recorder, **options: Any) -> tuple[socket.socket, Any]:
    """A client and the server's connection to it."""
    buffers = {name: options.pop(name) for name in ("rcvbuf", "sndbuf") if name in options}
    sock = client(listen(handler, **options), **buffers)
    until(mux, lambda: handler.connections)
    return sock, handler.connections[-1]


def pulled(mux: muxcore.Mux, listen: Listen, **options: Any) -> tuple[socket.socket, Any]:
    """A client and the server's connection to it, which has no handler."""
    sock = client(listen(**options))
    until(mux, lambda: len(mux.connections))
    [conn] = mux.connections
    return sock, conn


def reported(mux: muxcore.Mux, conn: muxcore.Connection, flag: int) -> int:
    """Turn the Mux until it reports that; everything it reported of the connection."""
    seen, end = 0, time.monotonic() + DEADLINE
    while not seen & flag:
        assert time.monotonic() < end, f"only {seen} was reported"
        seen |= sum(flags for other, flags in mux.poll(0.02) if other is conn)
    return seen


def all_received(conn: muxcore.Connection, how: str) -> list[Any]:
    return conn.recv_all() if how == "recv_all" else list(conn)


def sends(mux: muxcore.Mux) -> int:
    stats = mux.stats()
    return stats.send_calls + stats.sendmsg_calls


CASES: list[tuple[Any, bytes, list[Any]]] = [
    (Lines(), b"one\ntwo\n\n", [b"one", b"two", b""]),
    (Delimiter(b"\r\n"), b"one\r\ntwo\r\n", [b"one", b"two"]),
    (LengthPrefix(1), b"\3one\0\3two", [b"one", b"", b"two"]),
    (LengthPrefix("varint"), b"\xac\2" + bytes(300), [bytes(300)]),
    (Fixed(2), b"onetwo", [b"on", b"et", b"wo"]),
    (Resp(), b"*1\r\n$4\r\nPING\r\n*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", [[b"PING"], [b"GET", b"k"]]),
    (Words, b"one two ", [b"one", b"two"]),
]
every_framer = pytest.mark.parametrize(("framer", "stream", "messages"), CASES, ids=[repr(case[0]) for case in CASES])


# --- delivery --------------------------------------------------------------------------------------


@pytest.mark.parametrize("framer", [None, Lines(), LengthPrefix(2), Fixed(20)])
@pytest.mark.parametrize("batches", [False, True])
def test_a_message_object_that_is_used_again_is_as_good_as_new(
    mux: muxcore.Mux, listen: Listen, framer: Any, batches: bool
) -> None:
    hashes: list[int] = []
    kept: list[bytes] = []

    class Keeps(muxcore.Handler):
        def keep(self, conn: muxcore.Connection, message: bytes) -> None:
            hashes.append(hash(message))  # it is remembered in the object
            if len(hashes) % 3 == 0:
                kept.append(message)
            conn.send(message)

        def keep_all(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            for message in messages:
                self.keep(conn, message)
            messages[0] = bytes(bytearray(b"some other object"))

    setattr(Keeps, "on_messages" if batches else "on_message", Keeps.keep_all if batches else Keeps.keep)
    sent = [bytes([65 + i % 26]) * (20 if framer == Fixed(20) else 1 + i % 20) for i in range(60)]
    with client(listen(Keeps(), framer=framer)) as sock:
        for i in range(0, 60, 2):
            data = encode(framer, sent[i]) + encode(framer, sent[i + 1])
            push(mux, sock, data)
            assert receive(mux, sock, len(data)) == data
    expected = [sent[i] + sent[i + 1] for i in range(0, 60, 2)] if framer is None else sent
    assert hashes == [hash(bytes(bytearray(message))) for message in expected]
    assert kept == expected[2::3]


@every_framer
def test_messages_are_echoed(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes, messages: list[Any]
) -> None:
    sock, conn = opened(mux, listen, recorder := Echo(), framer=framer)
    sock.sendall(stream)
    assert receive(mux, sock, len(stream)) == stream
    assert recorder.messages() == messages
    assert (mux.stats().messages_in, mux.stats().messages_out) == (len(messages), len(messages))
    assert conn.framer is framer
    sock.close()


@every_framer
def test_messages_come_in_whatever_pieces(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes, messages: list[Any]
) -> None:
    sock, _conn = opened(mux, listen, recorder := Recorder(), framer=framer)
    for i in range(len(stream)):
        sock.sendall(stream[i : i + 1])
        mux.poll(1)
    assert recorder.messages() == messages
    sock.close()


@every_framer
def test_a_batch_is_all_messages_of_a_read(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes, messages: list[Any]
) -> None:
    sock, _conn = opened(mux, listen, recorder := Batches(), framer=framer)
    sock.sendall(stream)
    until(mux, lambda: recorder.batches)
    assert recorder.batches == [messages]
    assert mux.stats().messages_in == len(messages)
    sock.close()


@every_framer
@pytest.mark.parametrize("how", ["iterate", "recv", "recv_all"])
def test_messages_are_received_in_pull_style(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes, messages: list[Any], how: str
) -> None:
    sock, conn = pulled(mux, listen, framer=framer)
    sock.sendall(stream)
    reported(mux, conn, muxcore.READABLE)
    assert (all_received(conn, how) if how != "recv" else [conn.recv() for _ in messages]) == messages
    assert (conn.recv("nothing"), conn.recv_all(), list(conn)) == ("nothing", [], [])
    assert mux.stats().messages_in == len(messages)
    sock.close()


def test_pipelined_messages_get_their_replies_in_one_send(mux: muxcore.Mux, listen: Listen) -> None:
    counts: list[int] = []
    while 1 not in counts and len(counts) < 20:  # on a busy machine, the turn's bound of 3 ms may end it amid the lines
        before = sends(mux)
        sock, _conn = opened(mux, listen, Echo(), framer=Lines())
        sock.sendall(b"line\n" * 20)
        assert receive(mux, sock, 100) == b"line\n" * 20
        counts.append(sends(mux) - before)
        sock.close()
    assert counts[-1] == 1


def test_an_unfinished_message_waits_for_its_end(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, recorder := Recorder(), framer=Lines())
    sock.sendall(b"whole\nhalf")
    until(mux, recorder.messages)
    assert (recorder.messages(), conn.unread, conn.inbox_size) == ([b"whole"], b"half", 4)
    sock.sendall(b" line\n")
    until(mux, lambda: recorder.count("message") == 2)
    assert recorder.messages() == [b"whole", b"half line"]
    sock.close()


@every_framer
def test_a_connection_with_nothing_unfinished_has_no_buffer(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes, messages: list[Any]
) -> None:
    sock, conn = opened(mux, listen, recorder := Recorder(), framer=framer)
    assert (conn.inbox_size, conn.unread) == (0, b"")
    sock.sendall(stream)
    until(mux, recorder.messages)
    assert (conn.inbox_size, conn.unread) == (0, b"")
    sock.close()


def test_readable_is_reported_when_a_message_is_complete(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, framer=Lines())
    sock.sendall(b"ha")
    until(mux, lambda: conn.inbox_size == 2)
    sock.sendall(b"lf")
    seen = 0
    while conn.inbox_size < 4:
        seen |= sum(flags for _, flags in mux.poll(1))
    assert seen == 0
    sock.sendall(b"\n")
    assert reported(mux, conn, muxcore.READABLE) == muxcore.READABLE
    assert list(conn) == [b"half"]
    sock.close()


def test_without_a_framer_all_that_has_come_is_one_message(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen)
    for size, piece in ((3, b"one"), (6, b"two")):
        sock.sendall(piece)
        until(mux, lambda size=size: conn.inbox_size == size)
    assert (conn.unread, conn.recv_all(), conn.unread) == (b"onetwo", [b"onetwo"], b"")
    sock.close()


# --- holding back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("framer", [Lines(), Words], ids=repr)
def test_a_pause_amid_a_read_holds_what_is_behind_it(mux: muxcore.Mux, listen: Listen, framer: Any) -> None:
    class Pausing(Late):
        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            super().on_message(conn, message)
            if message in (b"2", b"3"):
                conn.pause_reading()

    sock, conn = opened(mux, listen, recorder := Pausing(), framer=framer)
    stream = b"1 2 3 4 " if framer is Words else b"1\n2\n3\n4\n"
    sock.sendall(stream)
    sock.shutdown(socket.SHUT_WR)
    for held in (b"1 2", b"1 2 3", b"1 2 3 4"):
        until(mux, lambda held=held: recorder.messages() == held.split())
        turns(mux, 0.02)
        assert recorder.messages() == held.split()
        assert conn.unread == stream[len(held) + 1 :]
        conn.resume_reading()
    until(mux, lambda: recorder.count("eof"))
    assert recorder.names()[-2:] == ["message", "eof"]
    sock.close()


def test_a_batch_handler_that_pauses_gets_its_next_batch_after_resume(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, recorder := Batches(), framer=Lines())
    conn.pause_reading()
    turns(mux, 0.01)
    sock.sendall(b"1\n2\n")
    turns(mux, 0.02)
    assert recorder.batches == []
    conn.resume_reading()
    until(mux, lambda: recorder.batches == [[b"1", b"2"]])
    sock.close()


def test_autopause_holds_messages_until_the_drain(mux: muxcore.Mux, listen: Listen) -> None:
    class Big(Recorder):
        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            super().on_message(conn, message)
            conn.send(message * 500_000)

    sock, conn = opened(mux, listen, recorder := Big(), framer=Lines(1 << 20), rcvbuf=4096)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    letters = [bytes([letter]) for letter in b"abcdefghij"]
    sock.sendall(b"\n".join(letters) + b"\n")
    until(mux, recorder.messages)
    turns(mux, 0.02)
    assert recorder.messages() == letters[:1]
    assert conn.unread == b"\n".join(letters[1:]) + b"\n"
    got = receive(mux, sock, 10 * 500_001)
    assert got == b"".join(letter * 500_000 + b"\n" for letter in letters)
    assert recorder.messages() == letters
    sock.close()


def test_autopause_holds_messages_in_pull_style(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, framer=Lines())
    sock.sendall(b"1\n2\n3\n")
    reported(mux, conn, muxcore.READABLE)
    assert conn.recv() == b"1"
    while conn.write(bytes(100_000)):
        pass
    assert (conn.recv(), conn.recv_all(), list(conn)) == (None, [], [])
    seen = 0
    with nonblocking(sock):
        while not (seen := seen | sum(flags for _, flags in mux.poll(0.02))):
            try:
                while sock.recv(1 << 16):
                    pass
            except BlockingIOError:
                pass
    assert seen == muxcore.DRAINED | muxcore.READABLE
    assert list(conn) == [b"2", b"3"]
    reset(sock)


def test_resume_reports_what_was_held_back(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, framer=Lines())
    sock.sendall(b"1\n2\nhalf")
    reported(mux, conn, muxcore.READABLE)
    assert conn.recv() == b"1"
    conn.pause_reading()
    assert (conn.recv(), list(conn)) == (None, [])
    conn.resume_reading()
    assert mux.poll(1) == [(conn, muxcore.READABLE)]
    assert list(conn) == [b"2"]
    conn.pause_reading()
    conn.resume_reading()
    assert mux.poll(0) == [], "half a message is none"
    sock.close()


@pytest.mark.parametrize(("framer", "line"), [(Lines(), b"line\n"), (Words, b"line ")], ids=repr)
def test_a_full_inbox_stops_the_reads(backend: str, framer: Any, line: bytes) -> None:
    """Promise bounded-inbox: complete input above max_inbox is not read on."""
    with muxcore.Mux(backend=backend, read_size=1000) as mux:
        sock = client(mux.listen(("127.0.0.1", 0), framer=framer, limits=muxcore.Limits(max_inbox=5000)))
        until(mux, lambda: len(mux.connections))
        [conn] = mux.connections
        sock.sendall(line * 10_000)
        turns(mux, 0.05)
        assert 5000 < conn.inbox_size <= 7000
        assert not conn.is_reading()
        assert turns(mux, 0.02) == 0, "what is not read is not waited for"
        lines: list[bytes] = []
        until(mux, lambda: (lines.extend(conn), len(lines) == 10_000)[1])
        assert set(lines) == {b"line"}
        sock.close()


def test_a_full_inbox_of_a_framer_of_the_users_own_stops_the_reads(backend: str) -> None:
    with muxcore.Mux(backend=backend, read_size=1000) as mux:
        sock = client(mux.listen(("127.0.0.1", 0), framer=Words, limits=muxcore.Limits(max_inbox=5000)))
        until(mux, lambda: len(mux.connections))
        [conn] = mux.connections
        sock.sendall(b"word " * 10_000)
        turns(mux, 0.05)
        assert 5000 < mux.stats().bytes_in <= 8000
        assert not conn.is_reading()
        words: list[bytes] = []
        until(mux, lambda: (words.extend(conn), len(words) == 10_000)[1])
        sock.close()


def test_an_unfinished_message_may_be_larger_than_max_inbox(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, framer=LengthPrefix(), limits=muxcore.Limits(max_inbox=1000))
    message = pattern(500_000)
    push(mux, sock, len(message).to_bytes(4, "big") + message)
    until(mux, lambda: conn.inbox_size == 500_004)
    assert conn.recv() == message
    sock.close()


@pytest.mark.parametrize("framer", [Lines(), Words], ids=repr)
@pytest.mark.parametrize("style", ["message", "batch"])
@pytest.mark.parametrize("end", ["close", "abort"])
def test_nothing_is_delivered_after_an_end_amid_a_read(
    mux: muxcore.Mux, listen: Listen, end: str, style: str, framer: Any
) -> None:
    class Ending(Recorder if style == "message" else Batches):  # type: ignore[misc]
        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            super().on_message(conn, message)
            getattr(conn, end)()

        def on_batch(self, conn: muxcore.Connection, messages: list[Any]) -> None:
            super().on_messages(conn, messages)
            getattr(conn, end)()

    recorder = Ending()
    if style == "batch":
        recorder.on_messages = recorder.on_batch
    sock, conn = opened(mux, listen, recorder, framer=framer)
    sock.sendall(b"1 2 half" if framer is Words else b"1\n2\nhalf")
    until(mux, recorder.messages)
    assert (conn.unread, conn.inbox_size, conn.is_reading()) == (b"", 0, False)
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.messages() == ([b"1"] if style == "message" else [b"1", b"2"])
    assert recorder.reason() is None


def test_an_interrupt_amid_a_read_loses_no_message(mux: muxcore.Mux, listen: Listen) -> None:
    class Interrupting(Echo):
        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            super().on_message(conn, message)
            if message == b"2":
                raise KeyboardInterrupt

    sock, _conn = opened(mux, listen, recorder := Interrupting(), framer=Lines())
    sock.sendall(b"1\n2\n3\n")
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    assert receive(mux, sock, 6) == b"1\n2\n3\n"
    assert recorder.messages() == [b"1", b"2", b"3"]
    sock.close()


def test_a_handler_that_raises_amid_a_read_gets_no_more(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(Echo):
        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            super().on_message(conn, message)
            raise ZeroDivisionError

    sock, _conn = opened(mux, listen, recorder := Faulty(), framer=Lines())
    sock.sendall(b"1\n2\n")
    assert receive(mux, sock) == b"1\n"
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), ZeroDivisionError)


# --- the framer changes ----------------------------------------------------------------------------


class Upgrading(Recorder):
    """Changes to another framer at a command."""

    def __init__(self, framer: Any) -> None:
        super().__init__()
        self.framer = framer

    def on_message(self, conn: muxcore.Connection, message: Any) -> None:
        super().on_message(conn, message)
        if message == b"upgrade":
            conn.framer = self.framer


UPGRADES: list[tuple[Any, Any, bytes, list[Any]]] = [
    (Lines(), None, b"upgrade\nraw\nbytes", [b"upgrade", b"raw\nbytes"]),
    (Lines(), LengthPrefix(1), b"upgrade\n\3a\nb\1c", [b"upgrade", b"a\nb", b"c"]),
    (Lines(10), LengthPrefix(1), b"upgrade\n\x14" + b"x" * 20, [b"upgrade", b"x" * 20]),  # for Lines it were too large
    (Lines(), Resp(), b"upgrade\n*1\r\n$4\r\nPING\r\n", [b"upgrade", [b"PING"]]),
    (Lines(), Words, b"upgrade\na b c ", [b"upgrade", b"a", b"b", b"c"]),
    (Words, Lines(), b"1 upgrade a b\nc\n", [b"1", b"upgrade", b"a b", b"c"]),
    (Words, Words, b"1 upgrade a b ", [b"1", b"upgrade", b"a", b"b"]),
    (Fixed(7), Fixed(1), b"upgradeabc", [b"upgrade", b"a", b"b", b"c"]),
]
upgrades = pytest.mark.parametrize(("before", "after", "stream", "messages"), UPGRADES)


@upgrades
def test_a_framer_changed_by_a_message_cuts_the_next(
    mux: muxcore.Mux, listen: Listen, before: Any, after: Any, stream: bytes, messages: list[Any]
) -> None:
    sock, conn = opened(mux, listen, recorder := Upgrading(after), framer=before)
    sock.sendall(stream)
    until(mux, lambda: recorder.count("message") == len(messages))
    assert recorder.messages() == messages
    assert conn.framer is after
    assert conn.listener is not None
    sock.close()


@upgrades
def test_a_framer_changed_in_pull_style_cuts_the_next(
    mux: muxcore.Mux, listen: Listen, before: Any, after: Any, stream: bytes, messages: list[Any]
) -> None:
    sock, conn = pulled(mux, listen, framer=before)
    sock.sendall(stream)
    reported(mux, conn, muxcore.READABLE)
    found = []
    for message in conn:
        found.append(message)
        if message == b"upgrade":
            conn.framer = after
    assert found == messages
    sock.close()


def test_a_framer_changed_by_a_batch_cuts_what_comes_after_it(mux: muxcore.Mux, listen: Listen) -> None:
    """Even if the old framer could not have read it."""

    class Changing(Batches):
        def on_messages(self, conn: muxcore.Connection, messages: list[Any]) -> None:
            super().on_messages(conn, messages)
            conn.framer = LengthPrefix(1)

    sock, _conn = opened(mux, listen, recorder := Changing(), framer=Lines(10))
    sock.sendall(b"1\n2\n\x14" + b"x" * 20)
    until(mux, lambda: recorder.count("message") == 3)
    assert recorder.batches == [[b"1", b"2"], [b"x" * 20]]
    sock.close()


@pytest.mark.parametrize("how", ["recv_all", "iterate"])
def test_a_framer_changed_between_polls_cuts_what_comes_next(mux: muxcore.Mux, listen: Listen, how: str) -> None:
    """As with a batch: what the old framer could not have read ends nothing before the next poll."""
    sock, conn = pulled(mux, listen, framer=Lines(10))
    sock.sendall(b"1\n2\n\x14" + b"x" * 20)
    reported(mux, conn, muxcore.READABLE)
    assert all_received(conn, how) == [b"1", b"2"]
    conn.framer = LengthPrefix(1)
    assert all_received(conn, how) == [b"x" * 20]
    sock.close()


def test_a_new_framer_reports_what_is_a_message_now(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, framer=Lines())
    sock.sendall(b"no end of line")
    until(mux, lambda: conn.inbox_size)
    assert mux.poll(0) == []
    conn.framer = Fixed(2)
    assert mux.poll(0) == [(conn, muxcore.READABLE)]
    assert b"".join(conn) == b"no end of line"
    sock.close()


def test_a_new_framer_is_the_one_that_sends(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(recorder := Recorder(), framer=Lines())
    with client(listener) as one, client(listener) as two:
        until(mux, lambda: len(recorder.connections) == 2)
        for i, conn in enumerate(recorder.connections):
            conn.send(b"a")
            conn.framer = [LengthPrefix(1), Lines()][i]
            conn.send(b"b")
        assert receive(mux, one, 4) == b"a\n\1b"
        assert receive(mux, two, 4) == b"a\nb\n"


@pytest.mark.parametrize(
    ("framer", "error", "text"),
    [
        (5, TypeError, "framer must be None, a muxcore framer"),
        (Lines, TypeError, "framer must be an instance, not the class"),
        (lambda: 1 // 0, ZeroDivisionError, "by zero"),
    ],
)
def test_a_bad_new_framer_changes_nothing(
    mux: muxcore.Mux, listen: Listen, framer: Any, error: type[Exception], text: str
) -> None:
    sock, conn = opened(mux, listen, recorder := Recorder(), framer=Lines())
    sock.sendall(b"ha")
    until(mux, lambda: conn.inbox_size)
    with pytest.raises(error, match=text):
        conn.framer = framer
    sock.sendall(b"lf\n")
    until(mux, recorder.messages)
    assert (recorder.messages(), conn.framer) == ([b"half"], Lines())
    sock.close()


# --- what cannot be read ---------------------------------------------------------------------------

BAD: list[tuple[Any, bytes, type[Exception], str]] = [
    (Lines(8), b"x" * 9, muxcore.FrameTooLarge, r"larger than max_size of Lines\(max_size=8\)"),
    (LengthPrefix(8), b"\0\0\0\1\0\0\0\0", muxcore.FrameTooLarge, "larger than max_size"),  # before it is sent
    (Resp(), b"*1\r\n$1073741824\r\n", muxcore.FrameTooLarge, "larger than max_size"),
    (Resp(), b"*1\r\n:1\r\n", muxcore.FrameError, r"byte 4 of a message: expected '\$'"),
    (LengthPrefix(1, header_included=True), b"\0", muxcore.FrameError, "byte 0 of a message: a length that is smaller"),
    (Words, b"bad ", muxcore.FrameError, "a bad word"),
]


def good(framer: Any) -> tuple[bytes, Any]:
    """What the peer sends, and the message that it is."""
    if isinstance(framer, Resp):
        return b"*1\r\n$1\r\na\r\n", [b"a"]
    if framer is Words:
        return b"a ", b"a"
    return (b"a\n" if isinstance(framer, Lines) else (b"\0" * 7 + b"\1a")[-framer.size - 1 :]), b"a"


@pytest.mark.parametrize(("framer", "stream", "error", "text"), BAD)
@pytest.mark.parametrize("style", [Echo, Batches])
def test_malformed_input_ends_its_connection(
    mux: muxcore.Mux,
    listen: Listen,
    caplog: pytest.LogCaptureFixture,
    style: type[Recorder],
    framer: Any,
    stream: bytes,
    error: type[Exception],
    text: str,
) -> None:
    """What was good is delivered and gets its reply; nothing is logged, since it is no mistake of the program."""
    first, message = good(framer) if not getattr(framer, "header_included", False) else (b"\2a", b"a")
    sock, conn = opened(mux, listen, recorder := style(), framer=framer)
    sock.sendall(first + stream)
    assert receive(mux, sock) == (first if style is Echo else b"")
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.messages() == [message]
    reason = recorder.reason()
    assert type(reason) is error
    assert reason.conn is conn  # type: ignore[attr-defined]
    with pytest.raises(error, match=text):
        raise reason
    assert (caplog.records, mux.stats().handler_errors) == ([], 0)
    assert (conn.unread, conn.error) == (b"", reason)


class Apologizes(Echo):
    """Sends a last reply."""

    def on_error(self, conn: muxcore.Connection, exc: muxcore.FrameError) -> None:
        self.events.append(("error", conn.id, exc))
        assert (conn.closing, conn.error) == (False, exc)
        assert exc.conn is conn
        conn.write(b"500 what?\n")


@pytest.mark.parametrize(("framer", "stream", "error", "text"), BAD)
def test_malformed_input_may_be_replied_to(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes, error: type[Exception], text: str
) -> None:
    """Promise frame-errors: behind the replies to what came before, and before the end."""
    first, _ = good(framer) if not getattr(framer, "header_included", False) else (b"\2a", b"a")
    sock, conn = opened(mux, listen, recorder := Apologizes(), framer=framer)
    sock.sendall(first + stream + b"and more")
    assert receive(mux, sock) == first + b"500 what?\n"
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "message", "error", "close"]
    reason = recorder.reason()
    assert (type(reason), conn.error) == (error, reason)
    assert recorder.events[2] == ("error", conn.id, reason)
    assert re.search(text, str(reason))


@pytest.mark.parametrize("at_once", [True, False])
def test_an_unfinished_message_at_the_end_may_be_replied_to(
    mux: muxcore.Mux, listen: Listen, at_once: bool
) -> None:
    sock, conn = opened(mux, listen, recorder := Apologizes(), framer=LengthPrefix(1))
    sock.sendall(b"\5abc")
    if not at_once:
        until(mux, lambda: conn.inbox_size == 4)
    sock.shutdown(socket.SHUT_WR)
    assert receive(mux, sock) == b"500 what?\n"
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "error", "close"]
    sock.close()


@pytest.mark.parametrize("style", ["each", "batch"])
def test_a_frame_error_of_the_handler_may_be_replied_to(mux: muxcore.Mux, listen: Listen, style: str) -> None:
    """The rest of the handler's own check of a message is in one place with the framer's."""

    class Checks(Apologizes):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            if message == b"bad":
                raise muxcore.FrameError("a bad message")

    class ChecksMany(Checks):
        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            for message in messages:
                self.on_message(conn, message)

    recorder = Checks() if style == "each" else ChecksMany()
    sock, _ = opened(mux, listen, recorder, framer=Lines())
    sock.sendall(b"good\nbad\nlost\n")
    assert receive(mux, sock) == b"good\nbad\n500 what?\n"
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "message", "message", "error", "close"]
    sock.close()


@pytest.mark.parametrize("raised", [ValueError("a bug"), muxcore.FrameError("once more")], ids=["a bug", "again"])
def test_an_error_in_the_reply_to_an_error_ends_the_connection(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture, raised: Exception
) -> None:
    class Fails(Apologizes):
        def on_error(self, conn: muxcore.Connection, exc: muxcore.FrameError) -> None:
            super().on_error(conn, exc)
            raise raised

    sock, conn = opened(mux, listen, recorder := Fails(), framer=Lines(3))
    sock.sendall(b"long\n")
    assert receive(mux, sock) == b"500 what?\n"
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "error", "close"]
    assert isinstance(conn.error, muxcore.FrameTooLarge), "the first reason stays"
    assert mux.stats().handler_errors == len(caplog.records) == (type(raised) is ValueError)
    sock.close()


@pytest.mark.parametrize("end", ["close", "abort", "close the mux"])
def test_the_reply_to_an_error_may_end_its_connection(backend: str, end: str) -> None:
    class Ends(Apologizes):
        def on_error(self, conn: muxcore.Connection, exc: muxcore.FrameError) -> None:
            super().on_error(conn, exc)
            {"close": conn.close, "abort": conn.abort, "close the mux": conn.mux.close}[end]()

    with muxcore.Mux(backend=backend) as mux:
        ours, theirs = socket.socketpair()
        mux.attach(ours, recorder := Ends(), framer=Lines(3))
        theirs.sendall(b"long\n")
        mux.poll(1)
        theirs.close()
        while not mux.closed and not recorder.count("close"):
            mux.poll(1)
        assert recorder.names() == ["open", "error", "close"]
        theirs.close()


def test_a_message_that_is_too_large_to_be_sent_is_no_mistake_of_the_peer(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Apologizes()
    recorder.reply = lambda message: bytes(256)
    sock, conn = opened(mux, listen, recorder, framer=LengthPrefix(1))
    sock.sendall(b"\1a")
    assert receive(mux, sock) == b""
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "message", "close"]
    assert type(conn.error) is ValueError
    assert mux.stats().handler_errors == len(caplog.records) == 1


@pytest.mark.parametrize(
    "recv", [lambda conn: conn.recv(), lambda conn: conn.recv_all(), next], ids=["recv", "recv_all", "next"]
)
def test_receiving_a_message_calls_no_on_error(mux: muxcore.Mux, listen: Listen, recv: Callable[[Any], object]) -> None:
    """Promise re-entrancy: on_error comes behind the callback that found no message."""

    class Receives(Apologizes):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            self.events.append(("message", conn.id, message))
            with suppress(StopIteration):
                assert not recv(conn)
            self.events.append(("received", conn.id, None))

    sock, _ = opened(mux, listen, recorder := Receives(), framer=Lines(3))
    sock.sendall(b"ok\nlong\n")
    assert receive(mux, sock) == b"500 what?\n"
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "message", "received", "error", "close"]


@pytest.mark.parametrize("what", ["close", "abort", "pause_reading", "close the mux"])
@pytest.mark.parametrize("many", [False, True], ids=["each", "batch"])
def test_what_is_wrong_behind_a_message_waits_until_it_would_be_delivered(
    backend: str, what: str, many: bool
) -> None:
    class Stops(Apologizes):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            self.events.append(("message", conn.id, message))
            (conn.mux.close if what == "close the mux" else getattr(conn, what))()

    class StopsMany(Stops):
        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            assert messages == [b"ok"]
            self.on_message(conn, messages[0])

    recorder = StopsMany() if many else Stops()
    with muxcore.Mux(backend=backend) as mux:
        ours, theirs = socket.socketpair()
        conn = mux.attach(ours, recorder, framer=Lines(3), timeouts=muxcore.Timeouts(linger=0.01))
        theirs.sendall(b"ok\nlong\n")
        mux.poll(1)
        for _ in range(0 if mux.closed else 3):
            mux.poll(0.05)
        if what == "pause_reading":
            assert recorder.names() == ["open", "message"]
            conn.resume_reading()
            assert receive(mux, theirs) == b"500 what?\n"
            theirs.close()
            until(mux, lambda: recorder.count("close"))
            assert recorder.names() == ["open", "message", "error", "close"]
            assert isinstance(conn.error, muxcore.FrameTooLarge)
        else:
            assert recorder.names() == ["open", "message", "close"]
            assert conn.error is None
        theirs.close()


def test_an_interrupt_in_the_reply_to_an_error_ends_the_connection_all_the_same(
    mux: muxcore.Mux, listen: Listen
) -> None:
    class Interrupted(Apologizes):
        def on_error(self, conn: muxcore.Connection, exc: muxcore.FrameError) -> None:
            super().on_error(conn, exc)
            raise KeyboardInterrupt

    sock, _ = opened(mux, listen, recorder := Interrupted(), framer=Lines(3))
    sock.sendall(b"long\n")
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    assert receive(mux, sock) == b"500 what?\n"
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "error", "close"]
    sock.close()


class BadLines:
    """A framer of its user's: lines, of which "bad" is malformed."""

    def __init__(self, found: Callable[[bytes], object] = bool) -> None:
        self.found = found
        self.data = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.data += data
        while b"\n" in self.data:
            line, self.data = self.data.split(b"\n", 1)
            self.found(line)
            if line == b"bad":
                raise muxcore.FrameError("a bad line")
            yield line

    def encode(self, message: bytes) -> bytes:
        return message + b"\n"

    def rest(self) -> bytes:
        return self.data


@pytest.mark.parametrize("framer", [Lines(), BadLines], ids=["lines", "custom"])
def test_no_message_behind_one_that_was_refused_is_left_for_the_reply_to_it(
    mux: muxcore.Mux, listen: Listen, framer: Any
) -> None:
    left = []

    class Looks(Apologizes):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            raise muxcore.FrameError("a bad message")

        def on_error(self, conn: muxcore.Connection, exc: muxcore.FrameError) -> None:
            left.append((conn.recv(), conn.recv_all(), conn.unread, conn.inbox_size))
            conn.framer = None
            left.append((conn.recv(), conn.recv_all(), conn.unread, conn.inbox_size))
            super().on_error(conn, exc)

    sock, _ = opened(mux, listen, recorder := Looks(), framer=framer)
    sock.sendall(b"one\ntwo\nthree\nfo")
    assert receive(mux, sock) == b"one\n500 what?\n"
    assert left == 2 * [(None, [], b"", 0)]
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "message", "error", "close"]


@pytest.mark.parametrize("framer", [Lines(3), BadLines], ids=["lines", "custom"])
@pytest.mark.parametrize("how", ["recv", "recv_all", "iterate"])
def test_a_handler_that_calls_recv_is_not_called_back_by_its_own_call(
    mux: muxcore.Mux, listen: Listen, framer: Any, how: str
) -> None:
    class Receives(Apologizes):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            while how == "recv" and conn.recv() is not None:
                pass
            if how == "recv_all":
                conn.recv_all()
            if how == "iterate":
                list(conn)
            self.events.append(("received", conn.id, None))

    sock, _ = opened(mux, listen, recorder := Receives(), framer=framer)
    sock.sendall(b"one\ntwo\n" + (b"bad\n" if framer is BadLines else b"long\n"))
    assert receive(mux, sock) == b"one\n500 what?\n"
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "message", "received", "error", "close"]


def test_a_handler_that_closes_the_mux_is_called_for_no_error(backend: str) -> None:
    class Closes(Apologizes):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            conn.mux.close()
            raise muxcore.FrameError("a bad message")

    mux = muxcore.Mux(backend=backend)
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder := Closes(), framer=Lines())
    theirs.sendall(b"one\n")
    while not mux.closed:
        mux.poll(1)
    assert recorder.names() == ["open", "message", "close"]
    assert isinstance(conn.error, muxcore.FrameError)
    theirs.close()


@pytest.mark.parametrize("refused", [True, False], ids=["by the handler", "by the framer"])
def test_an_interrupt_before_an_error_is_reported_does_not_leave_the_connection_open(
    backend: str, refused: bool
) -> None:
    class Refuses(Apologizes):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            if refused:
                raise muxcore.FrameError("a bad message")

    interrupt = InterruptAt("/errors.py", 0)
    at = 0
    while interrupt.left <= 0:
        at += 1
        with muxcore.Mux(backend=backend) as mux:
            ours, theirs = socket.socketpair()
            conn = mux.attach(ours, recorder := Refuses(), framer=Lines(3))
            mux.poll(0)
            theirs.sendall(b"one\nlong\n")
            interrupt = InterruptAt("/errors.py", at)
            for _ in range(3):
                interrupt.during(lambda mux=mux: mux.poll(0))  # type: ignore[misc]
            assert conn.closing, at
            theirs.close()
            until(mux, lambda recorder=recorder: recorder.count("close"))  # type: ignore[misc]
            assert recorder.names() in (["open", "message", "error", "close"], ["open", "message", "close"]), at
            assert isinstance(conn.error, muxcore.FrameError), at


def test_a_list_that_a_pause_keeps_back_comes_before_the_error_behind_it(mux: muxcore.Mux, listen: Listen) -> None:
    def pause(line: bytes) -> None:
        if line == b"bad":
            conn.pause_reading()

    recorder = Batches()
    sock, conn = opened(mux, listen, recorder, framer=lambda: BadLines(pause))
    sock.sendall(b"one\ntwo\nbad\n")
    until(mux, lambda: not conn.is_reading())
    assert recorder.batches == []
    conn.resume_reading()
    until(mux, lambda: conn.closing)
    assert recorder.batches == [[b"one", b"two"]]
    assert isinstance(conn.error, muxcore.FrameError)
    sock.close()


def test_a_framer_whose_error_is_passed_over_is_freed_without_the_collector(
    mux: muxcore.Mux, listen: Listen
) -> None:
    framers = []

    def factory() -> BadLines:
        framers.append(weakref.ref(made := BadLines()))
        return made

    sock, conn = pulled(mux, listen, framer=factory)
    sock.sendall(b"one\nbad\n")
    reported(mux, conn, muxcore.READABLE)
    gc.disable()
    try:
        assert conn.recv_all() == [b"one"]
        conn.framer = None
        assert [framer() for framer in framers] == [None]
    finally:
        gc.enable()
    sock.close()


@pytest.mark.parametrize(("framer", "stream", "error", "text"), BAD)
@pytest.mark.parametrize("how", ["recv", "recv_all"])
def test_malformed_input_ends_its_connection_in_pull_style(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes, error: type[Exception], text: str, how: str
) -> None:
    first, message = good(framer) if not getattr(framer, "header_included", False) else (b"\2a", b"a")
    sock, conn = pulled(mux, listen, framer=framer, timeouts=muxcore.Timeouts(linger=0.05))
    sock.sendall(first + stream)
    assert not reported(mux, conn, muxcore.READABLE) & muxcore.CLOSED
    assert getattr(conn, how)() == (message if how == "recv" else [message])
    reported(mux, conn, muxcore.CLOSED)
    with pytest.raises(error, match=text):
        raise conn.error
    sock.close()


def test_malformed_input_alone_is_not_readable(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, framer=Resp(), timeouts=muxcore.Timeouts(linger=0.05))
    sock.sendall(b"*x\r\n")
    assert reported(mux, conn, muxcore.CLOSED) == muxcore.CLOSED
    assert isinstance(conn.error, muxcore.FrameError)
    assert conn.recv() is None
    sock.close()


def test_too_large_a_message_names_the_limit(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder(), framer=Lines(8))
    sock.sendall(b"x" * 9)
    until(mux, lambda: conn.closing)
    assert conn.error.limit == 8
    sock.close()


def test_too_large_a_message_is_not_buffered(backend: str) -> None:
    with muxcore.Mux(backend=backend, read_size=1000) as mux:
        recorder = Recorder()
        sock = client(mux.listen(("127.0.0.1", 0), recorder, framer=Lines(5000)))
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        push(mux, sock, bytes(5000))
        until(mux, lambda: conn.inbox_size == 5000)
        sock.sendall(bytes(1))
        until(mux, lambda: conn.closing)
        assert (conn.inbox_size, type(conn.error)) == (0, muxcore.FrameTooLarge)
        sock.close()


@pytest.mark.parametrize(
    ("framer", "stream", "text"),
    [
        (LengthPrefix(), b"\0\0\0\4ab", "the stream ended inside a message: have 6 bytes, need 8"),
        (Fixed(3), b"ab", "have 2 bytes, need 3"),
        (Delimiter(b"\r\n"), b"ab\r", r"have 3 bytes, need b'\\r\\n'"),
        (Resp(), b"*1\r\n", "have 4 bytes, need more"),
        (Words, b"ab", "have 2 bytes, need more"),
    ],
)
@pytest.mark.parametrize("style", [Late, Batches, None])
def test_a_stream_that_ends_inside_a_message(
    mux: muxcore.Mux, listen: Listen, style: type[Recorder] | None, framer: Any, stream: bytes, text: str
) -> None:
    if style is None:
        sock, conn = pulled(mux, listen, framer=framer)
    else:
        sock, conn = opened(mux, listen, recorder := style(), framer=framer)
    sock.sendall(stream)
    sock.shutdown(socket.SHUT_WR)
    if style is None:
        assert reported(mux, conn, muxcore.CLOSED) == muxcore.CLOSED
    until(mux, lambda: conn.closed)
    assert style is None or recorder.names() == ["open", "close"]
    with pytest.raises(muxcore.FrameError, match=text):
        raise conn.error
    sock.close()


@pytest.mark.parametrize("last", [b"last", b"last\r"])
def test_what_follows_the_last_end_of_line_is_a_line(mux: muxcore.Mux, listen: Listen, last: bytes) -> None:
    sock, conn = opened(mux, listen, recorder := Late(), framer=Lines())
    sock.sendall(b"first\n" + last)
    sock.shutdown(socket.SHUT_WR)
    until(mux, lambda: recorder.count("eof"))
    assert recorder.messages() == [b"first", b"last"]
    assert recorder.names() == ["open", "message", "message", "eof"]
    conn.close()
    sock.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.reason() is None


def test_the_last_line_in_pull_style(mux: muxcore.Mux, listen: Listen) -> None:
    """EOF is reported after the line was received."""
    sock, conn = pulled(mux, listen, framer=Lines())
    sock.sendall(b"last")
    until(mux, lambda: conn.inbox_size)
    sock.shutdown(socket.SHUT_WR)
    assert reported(mux, conn, muxcore.READABLE) == muxcore.READABLE
    assert list(conn) == [b"last"]
    assert reported(mux, conn, muxcore.EOF) == muxcore.EOF
    assert reported(mux, conn, muxcore.CLOSED) == muxcore.CLOSED
    assert conn.error is None
    sock.close()


# --- framers of the user ---------------------------------------------------------------------------


def test_a_lazy_framer_makes_a_message_when_the_last_was_delivered(mux: muxcore.Mux, listen: Listen) -> None:
    made: list[bytes] = []

    class Watched(Words):
        def feed(self, data: bytes) -> Iterator[bytes]:
            for word in super().feed(data):
                made.append(word)
                yield word

    class Checking(Recorder):
        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            super().on_message(conn, message)
            assert made == self.messages()

    sock, _conn = opened(mux, listen, recorder := Checking(), framer=Watched)
    sock.sendall(b"a b c ")
    until(mux, lambda: recorder.count("message") == 3)
    assert mux.stats().handler_errors == 0
    sock.close()


def test_a_framer_is_fed_what_came_and_nothing_else(mux: muxcore.Mux, listen: Listen) -> None:
    fed: list[bytes] = []

    class Watched(Words):
        def feed(self, data: bytes) -> Iterator[bytes]:
            fed.append(data)
            return super().feed(data)

    sock, _conn = opened(mux, listen, recorder := Recorder(), framer=Watched)
    for count, data in enumerate((b"a ", b"b ", b"c "), 1):
        sock.sendall(data)
        until(mux, lambda count=count: recorder.count("message") == count)
    assert fed == [b"a ", b"b ", b"c "]
    sock.close()


def test_every_connection_has_its_own_framer(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(Echo(), framer=Words)
    with client(listener) as one, client(listener) as two:
        one.sendall(b"o")
        two.sendall(b"t")
        until(mux, lambda: sorted(conn.unread for conn in mux.connections) == [b"o", b"t"])
        one.sendall(b"ne ")
        two.sendall(b"wo ")
        assert (receive(mux, one, 4), receive(mux, two, 4)) == (b"one ", b"two ")


@pytest.mark.parametrize("style", [Echo, Batches, None])
def test_a_framer_with_a_bug_loses_its_connection(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture, style: type[Recorder] | None
) -> None:
    if style is None:
        sock, conn = pulled(mux, listen, framer=Words)
    else:
        sock, conn = opened(mux, listen, recorder := style(), framer=Words)
    sock.sendall(b"fine bug a ")
    if style is None:
        reported(mux, conn, muxcore.READABLE)
        assert list(conn) == [b"fine"]
    assert receive(mux, sock) == (b"fine " if style is Echo else b"")
    sock.close()
    until(mux, lambda: conn.closed)
    assert isinstance(conn.error, RuntimeError)
    assert style is None or recorder.messages() == [b"fine"]
    assert mux.stats().handler_errors == 1
    [record] = caplog.records
    assert (record.name, "a bug in the framer" in (record.exc_text or "")) == ("muxcore", True)


@pytest.mark.parametrize("factory", [lambda: 1 // 0, lambda: object(), dict], ids=["raises", "not a framer", "dict"])
def test_a_factory_that_fails_loses_its_connection(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture, factory: Any
) -> None:
    with client(listen(recorder := Recorder(), framer=factory)) as sock:
        sock.sendall(b"x")
        assert receive(mux, sock) == b""
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "close"]
    assert isinstance(recorder.reason(), ZeroDivisionError | TypeError)
    assert len(caplog.records) == mux.stats().handler_errors == 1


def test_a_factory_that_fails_leaves_an_attached_socket_with_its_caller(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(ZeroDivisionError):
            mux.attach(ours, print, framer=lambda: 1 // 0)
        ours.sendall(b"mine")
        assert theirs.recv(10) == b"mine"
        assert len(mux.connections) == 0


# --- sending ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("framer", "bad", "fine", "sent"),
    [
        (Lines(), b"a\nb", b"c", b"c\n"),
        (Lines(), 5, b"c", b"c\n"),
        (Delimiter(b"--"), b"a-", b"c", b"c--"),
        (Delimiter(b"\r\n"), b"a\r\nb", b"c", b"c\r\n"),
        (LengthPrefix(1), bytes(256), b"c", b"\1c"),
        (Fixed(2), b"abc", b"de", b"de"),
        (Resp(), [1, "a\n"], RespError("ERR"), b"-ERR\r\n"),
        (Resp(), "a\r", "b", b"+b\r\n"),
        (Resp(), [b"a", 1.5], [b"a", 1], b"*2\r\n$1\r\na\r\n:1\r\n"),
        (Words, b"a b", b"c", b"c "),
    ],
    ids=repr,
)
def test_what_cannot_be_encoded_leaves_the_stream_intact(
    mux: muxcore.Mux, listen: Listen, framer: Any, bad: Any, fine: Any, sent: bytes
) -> None:
    sock, conn = opened(mux, listen, Recorder(), framer=framer)
    with pytest.raises((ValueError, TypeError)):
        conn.send(bad)
    assert (conn.outbox_size, mux.stats().messages_out) == (0, 0)
    with pytest.raises((ValueError, TypeError)):
        conn.send_many([fine, bad])
    conn.send(fine)
    assert receive(mux, sock, 2 * len(sent)) == 2 * sent
    sock.close()


def test_write_is_raw(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder(), framer=Lines())
    conn.write(bytearray(b"no "))
    conn.write(b"end")
    conn.writelines([b"\n", b"\n\n"])
    conn.send_many([b"a", b"b"])
    assert receive(mux, sock, 13) == b"no end\n\n\na\nb\n"
    sock.close()


@pytest.mark.parametrize("size", [0, 1, 100, 2000, 5000, 100_000])
@pytest.mark.parametrize(
    ("framer", "around"),
    [
        (Lines(1 << 20), lambda data: data + b"\n"),
        (Delimiter(b"\r\n--\r\n", max_size=1 << 20), lambda data: data + b"\r\n--\r\n"),
        (LengthPrefix(), lambda data: len(data).to_bytes(4, "big") + data),
        (Resp(), lambda data: b"$%d\r\n%b\r\n" % (len(data), data)),
    ],
    ids=["Lines", "Delimiter", "LengthPrefix", "Resp"],
)
def test_messages_of_all_sizes_are_framed(
    mux: muxcore.Mux, listen: Listen, framer: Any, around: Callable[[bytes], bytes], size: int
) -> None:
    sock, conn = opened(mux, listen, Recorder(), framer=framer, limits=muxcore.Limits(high=1 << 20))
    data = b"x" * size
    conn.send_many([data, bytearray(data), data])
    assert receive(mux, sock, 3 * len(around(data))) == 3 * around(data)
    assert sends(mux) == 1
    sock.close()


def test_messages_from_other_threads_are_encoded_there(mux: muxcore.Mux, listen: Listen) -> None:
    threads: set[int] = set()

    class Noting(Words):
        def encode(self, message: bytes) -> bytes:
            threads.add(threading.get_ident())
            return super().encode(message)

    listener = listen(recorder := Recorder(), framer=Lines())
    with client(listener) as sock, client(listen(recorder, framer=Noting)) as custom:
        until(mux, lambda: len(recorder.connections) == 2)
        failures: list[Exception] = []

        def other() -> None:
            for conn in recorder.connections:
                for i in range(100):
                    conn.send(b"%d" % i)
                try:
                    conn.send(b"two\n words")
                except ValueError as error:
                    failures.append(error)
                conn.write(b"raw")

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        numbers = [b"%d" % i for i in range(100)]
        assert receive(mux, sock, 293) == b"\n".join([*numbers, b"raw"])
        assert receive(mux, custom, 293) == b" ".join([*numbers, b"raw"])
        assert len(failures) == 2
        assert threads == {thread.ident}


# --- files -----------------------------------------------------------------------------------------


@pytest.fixture
def big_file() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(PATTERN)
        file.flush()
        yield file


def test_a_file_goes_out_in_order_with_messages(mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]) -> None:
    sock, conn = opened(mux, listen, Recorder(), framer=Lines(), limits=muxcore.Limits(high=1 << 20))
    place = big_file.tell()
    assert conn.send(b"before")
    assert conn.sendfile(big_file, 4, 10)
    assert conn.sendfile(big_file.fileno(), BIG - 6)
    assert conn.send(b"after")
    assert conn.sendfile(big_file, 0, 0)
    assert conn.outbox_size == 7 + 10 + 6 + 6
    data = PATTERN
    assert receive(mux, sock, 29) == b"before\n" + data[4:14] + data[-6:] + b"after\n"
    assert (conn.outbox_size, big_file.tell(), mux.stats().messages_out) == (0, place, 5)
    sock.close()


def test_a_slow_reader_gets_a_large_file(mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]) -> None:
    """The file may be closed at once; it costs no memory, so it does not count against max_outbox."""
    sock, conn = opened(
        mux, listen, recorder := Recorder(), rcvbuf=4096, limits=muxcore.Limits(high=1000, low=0, max_outbox=2000)
    )
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    assert conn.sendfile(big_file) is False
    big_file.close()
    assert conn.outbox_size > BIG - (1 << 20)
    assert conn.send(b"behind it") is False
    assert receive(mux, sock, BIG + 9) == PATTERN + b"behind it"
    until(mux, lambda: recorder.count("drain"))
    assert mux.stats().drops == 0
    sock.close()


def copies(file: IO[bytes]) -> int:
    """How many descriptors of it are open."""
    wanted, found = os.fstat(file.fileno()), 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            found += os.path.samestat(os.fstat(int(name)), wanted)
        except OSError:
            pass  # the listing's own
    return found


def test_close_waits_for_a_file(mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]) -> None:
    sock, conn = opened(mux, listen, recorder := Recorder())
    conn.sendfile(big_file)
    conn.close()
    assert conn.sendfile(big_file) is False
    assert receive(mux, sock) == PATTERN
    sock.close()
    until(mux, lambda: conn.closed)
    assert (recorder.reason(), mux.stats().drops) == (None, 1)


def test_a_file_that_is_shorter_than_promised_resets(mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]) -> None:
    sock, conn = opened(mux, listen, recorder := Recorder())
    conn.sendfile(big_file)
    big_file.truncate(100)
    with pytest.raises(ConnectionResetError):
        receive(mux, sock)
    until(mux, lambda: recorder.count("close"))
    reason = recorder.reason()
    assert type(reason) is OSError
    assert "bytes before the end of the queued part" in str(reason)
    sock.close()


@pytest.mark.parametrize("closing", [False, True])
def test_a_file_that_cannot_be_read_resets(mux: muxcore.Mux, listen: Listen, tmp_path: Path, closing: bool) -> None:
    """After a FIN the peer would believe that it has got the whole."""
    path = tmp_path / "file"
    path.write_bytes(PATTERN)
    sock, conn = opened(mux, listen, recorder := Recorder())
    before = set(open_fds())
    conn.send(b"head")
    with path.open("rb") as file:
        conn.sendfile(file)
    [own] = set(open_fds()) - before
    with path.open("ab") as unreadable:
        os.dup2(unreadable.fileno(), int(own.split()[0]), inheritable=False)
    if closing:
        conn.close()
    until(mux, lambda: conn.closed)
    with pytest.raises(ConnectionResetError):
        while sock.recv(100):
            pass
    reason = recorder.reason()
    assert isinstance(reason, OSError)
    assert reason.errno == errno.EBADF
    sock.close()


@pytest.mark.parametrize("end", ["abort", "reset", "mux"])
def test_a_file_of_which_a_part_is_unsent_is_closed(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes], end: str
) -> None:
    """no_leaked_descriptor sees what stays open."""
    sock, conn = opened(mux, listen, recorder := Recorder(), rcvbuf=4096)
    conn.sendfile(big_file)
    conn.sendfile(big_file)
    mux.poll(0)
    if end == "abort":
        conn.abort()
    elif end == "mux":
        mux.close()
    else:
        reset(sock)
    if end != "mux":
        until(mux, lambda: recorder.count("close"))
    assert conn.outbox_size == 0
    sock.close()


def test_a_file_is_sent_on_the_thread_of_the_mux_only(mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]) -> None:
    sock, conn = opened(mux, listen, Recorder())
    caught: list[Exception] = []

    def other() -> None:
        try:
            conn.sendfile(big_file)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "call_soon_threadsafe" in str(caught[0])
    sock.close()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (lambda file: ("name",), TypeError, "file must be an open file or its descriptor, not str"),
        (lambda file: (io.BytesIO(b"abc"),), TypeError, "file must be an open file or its descriptor, not BytesIO"),
        (lambda file: (Path("/dev/null").open("rb"),), ValueError, "file must be a regular file"),  # noqa: SIM115
        (lambda file: (file, -1), ValueError, "offset must be >= 0"),
        (lambda file: (file, "0"), TypeError, "offset must be an int"),
        (lambda file: (file, BIG + 1), ValueError, f"offset must be <= {BIG}"),
        (lambda file: (file, 0, -1), ValueError, "count must be >= 0"),
        (lambda file: (file, 1, BIG), ValueError, f"count must be <= {BIG - 1}"),
        (lambda file: (1 << 20,), OSError, "Bad file descriptor"),
    ],
)
def test_a_bad_file_is_named(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes], arguments: Any, error: type[Exception], text: str
) -> None:
    sock, conn = opened(mux, listen, Recorder())
    file = arguments(big_file)
    with pytest.raises(error, match=text):
        conn.sendfile(*file)
    assert conn.outbox_size == 0
    if hasattr(file[0], "close"):
        file[0].close()
    sock.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.* is multi-threaded, use of fork:DeprecationWarning")  # uvloop's, of tests before
def test_a_forked_child_closes_its_files(mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]) -> None:
    sock, conn = opened(mux, listen, Recorder(), rcvbuf=4096)
    conn.sendfile(big_file)
    mux.poll(0)
    child = os.fork()
    if child == 0:
        mux.close()
        os._exit(copies(big_file) - 1)
    assert os.waitpid(child, 0)[1] == 0
    assert copies(big_file) == 2
    assert receive(mux, sock, BIG) == PATTERN
    sock.close()


# --- broadcast -------------------------------------------------------------------------------------


def audience(mux: muxcore.Mux, listener: muxcore.Listener, recorder: Recorder, count: int) -> list[socket.socket]:
    socks = [client(listener, rcvbuf=4096) for _ in range(count)]
    until(mux, lambda: listener.connections == count)
    return socks


@pytest.mark.parametrize("size", [5, 5000])
def test_a_broadcast_reaches_every_connection(mux: muxcore.Mux, listen: Listen, size: int) -> None:
    recorder = Recorder()
    socks = audience(mux, listen(recorder, framer=Lines()), recorder, 20)
    message = b"x" * size
    assert mux.broadcast(recorder.connections, message) == 20
    assert mux.broadcast(iter(recorder.connections[:0]), message) == 0
    for sock in socks:
        assert receive(mux, sock, size + 1) == message + b"\n"
        sock.close()
    assert mux.stats().messages_out == 20


def test_a_broadcast_is_encoded_for_every_framer(mux: muxcore.Mux, listen: Listen) -> None:
    made: list[bytes] = []

    class Counting(Words):
        def encode(self, message: bytes) -> bytes:
            made.append(message)
            return super().encode(message)

    recorder, socks = Recorder(), []
    framers = [Lines(), Lines(5), LengthPrefix(1), None, Resp(), Fixed(2), Counting, Counting]
    for framer in framers:
        socks += audience(mux, listen(recorder, framer=framer), recorder, 1)
    assert mux.broadcast(recorder.connections, b"ab") == 8
    wanted = [b"ab\n", b"ab\n", b"\2ab", b"ab", b"$2\r\nab\r\n", b"ab", b"ab ", b"ab "]
    assert [receive(mux, sock, len(wire)) for sock, wire in zip(socks, wanted, strict=True)] == wanted
    assert made == [b"ab", b"ab"]
    for sock in socks:
        sock.close()


def test_a_broadcast_may_be_anything_that_can_be_sent(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    [sock] = audience(mux, listen(recorder, framer=Resp()), recorder, 1)
    assert mux.broadcast(recorder.connections, ["message", 5]) == 1
    assert receive(mux, sock, 18) == b"*2\r\n+message\r\n:5\r\n"
    buffer = bytearray(b"abc")
    assert mux.broadcast(recorder.connections, memoryview(buffer)) == 1
    buffer[:] = b"xyz"
    assert receive(mux, sock, 9) == b"$3\r\nabc\r\n"
    sock.close()


def full(mux: muxcore.Mux, conn: muxcore.Connection) -> None:
    """Fill an outbox to the brim."""
    while conn.outbox_size < conn.limits.max_outbox:
        conn.write(bytes(50_000))


@pytest.mark.parametrize("overflow", ["close", "drop", "raise"])
def test_a_broadcast_handles_a_slow_connection_by_its_policy(
    mux: muxcore.Mux, listen: Listen, overflow: Any
) -> None:
    recorder = Recorder()
    limits = muxcore.Limits(high=1 << 18, max_outbox=1 << 20, overflow=overflow)
    socks = audience(mux, listen(recorder, limits=limits), recorder, 3)
    first, slow, last = recorder.connections
    full(mux, slow)
    if overflow == "raise":
        with pytest.raises(muxcore.OutboxFull) as caught:
            mux.broadcast(recorder.connections, b"news")
        assert caught.value.conn is slow
        assert mux.stats().drops == 0
    else:
        assert mux.broadcast(recorder.connections, b"news") == 2
        assert mux.stats().drops == 1
    assert (slow.closed, isinstance(slow.error, muxcore.OutboxFull)) == (overflow == "close",) * 2
    news = [receive(mux, sock, 4) for sock, conn in zip(socks, recorder.connections, strict=True) if conn is not slow]
    assert news == [b"news", b"news"]
    assert (first.closed, last.closed) == (False, False)
    for sock in socks:
        reset(sock)


def test_of_several_errors_a_broadcast_raises_the_first(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    limits = muxcore.Limits(high=1 << 18, max_outbox=1 << 20, overflow="raise")
    socks = audience(mux, listen(recorder, limits=limits), recorder, 3)
    for conn in recorder.connections[1:]:
        full(mux, conn)
    with pytest.raises(muxcore.OutboxFull) as caught:
        mux.broadcast(recorder.connections, b"news")
    assert caught.value.conn is recorder.connections[1]
    for sock in socks:
        reset(sock)


class Factory:
    """Makes framers; as each class with an __eq__ of its own, it cannot be a key."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Factory)

    def __call__(self) -> Words:
        return Words()


def test_a_broadcast_works_with_an_unhashable_factory_of_framers(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    socks = audience(mux, listen(recorder, framer=Factory()), recorder, 2)
    assert mux.broadcast(recorder.connections, b"news") == 2
    assert [receive(mux, sock, 5) for sock in socks] == [b"news "] * 2
    for sock in socks:
        sock.close()


def test_a_broadcast_counts_connections_above_high_but_no_closed_ones(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    socks = audience(mux, listen(recorder, limits=muxcore.Limits(high=1000, low=0)), recorder, 4)
    above, closing, closed, _fine = recorder.connections
    while above.send(bytes(100_000)):
        pass
    closing.close()
    closed.abort()
    assert mux.broadcast(recorder.connections, b"news") == 2
    assert mux.stats().drops == 2
    for sock in socks:
        reset(sock)
    until(mux, lambda: recorder.count("close") == 4)


def test_a_broadcast_checks_its_arguments_before_anything_is_sent(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    socks = [
        *audience(mux, listen(recorder, framer=Lines()), recorder, 1),
        *audience(mux, listen(recorder, framer=Fixed(3)), recorder, 1),
    ]
    one, two = recorder.connections
    ours, theirs = socket.socketpair()
    with theirs, muxcore.Mux(backend=mux.backend) as other:
        stranger = other.attach(ours, print)
        for connections, error, text in (
            ([one, 5], TypeError, "connections must be an iterable of connections, not of int"),
            ([one, muxcore.Connection], TypeError, "connections must be an iterable of connections, not of type"),
            ([one, stranger], ValueError, "connections must be connections of this Mux"),
            (5, TypeError, "not iterable"),
        ):
            with pytest.raises(error, match=text):
                mux.broadcast(connections, b"abc")
    with pytest.raises(ValueError, match="message must have 3 bytes, not 4"):
        mux.broadcast([one, two], b"abcd")
    with pytest.raises(TypeError, match="message must be bytes-like"):
        mux.broadcast([one, two], "abc")
    assert (one.outbox_size, two.outbox_size) == (0, 0)
    for sock in socks:
        sock.close()


def test_a_framer_that_cannot_encode_a_broadcast_spares_the_others(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    socks = [
        *audience(mux, listen(recorder, framer=Words), recorder, 1),
        *audience(mux, listen(recorder, framer=Lines()), recorder, 1),
    ]
    with pytest.raises(ValueError, match="two words"):
        mux.broadcast(recorder.connections, b"a b")
    assert receive(mux, socks[1], 4) == b"a b\n"
    for sock in socks:
        sock.close()


def test_a_broadcast_from_a_callback_goes_out_in_the_same_turn(mux: muxcore.Mux, listen: Listen) -> None:
    class Room(Recorder):
        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            mux.broadcast(self.connections, message)

    room = Room()
    socks = audience(mux, listen(room, framer=Lines()), room, 3)
    socks[0].sendall(b"hello\nall\n")
    assert [receive(mux, sock, 10) for sock in socks] == [b"hello\nall\n"] * 3
    assert sends(mux) == 3
    for sock in socks:
        sock.close()


def test_a_broadcast_on_a_closed_mux(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)
    mux.close()
    with pytest.raises(RuntimeError, match="closed"):
        mux.broadcast([], b"")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


# --- against mutants that survived (tests/mutants) ------------------------------------------------------


@pytest.mark.parametrize(
    ("framer", "stream", "messages"),
    [
        (Lines(), b"one\r\n\nt\rwo\n", [b"one", b"", b"t\rwo"]),
        (LengthPrefix(4, byteorder="little"), b"\3\0\0\0one", [b"one"]),
        (LengthPrefix("varint"), b"\x80" * 9 + b"\0" + b"\3one", [b"", b"one"]),
        (Resp(max_size=19), b"*1\r\n$9\r\n123456789\r\n", [[b"123456789"]]),
        (Resp(max_size=30), b"*-30\r\n*1\r\n$4\r\nPING\r\n", [[b"PING"]]),
        (Resp(max_size=58), b"*9\r\n" + b"$0\r\n\r\n" * 9, [[b""] * 9]),
        (Resp(max_size=4), b"\nGET\n", [[b"GET"]]),
        (Resp(), b"*2\r\n$12\r\nHELLO-WORLD!\r\n$1\r\nx\r\n", [[b"HELLO-WORLD!", b"x"]]),
        (Resp(), b"*1\r\n$5\r\nSETUS\r\n*1\r\n$3\r\nSET\r\n", [[b"SETUS"], [b"SET"]]),
        (Resp(), b"*1\r\n$3\r\nGET\r\n*1\r\n$3\r\nGOT\r\n*1\r\n$3\r\nGET\r\n", [[b"GET"], [b"GOT"], [b"GET"]]),
        (Resp(), b"\r\nSET k \"abc\"\r\n", [[b"SET", b"k", b"abc"]]),
        (Resp(), b"SET k \"a\\\"b\" 'c\\'d' 'e\\f'\r\n", [[b"SET", b"k", b'a"b', b"c'd", b"e\\f"]]),
        (Resp(), b'PING\r\n"GET" k\r\n', [[b"PING"], [b"GET", b"k"]]),
        (Resp(), b'SET k "a\\\\"\r\n', [[b"SET", b"k", b"a\\"]]),
        (Resp(max_size=8), b"GET key\n", [[b"GET", b"key"]]),
        (Resp(max_size=10), b"*1\r\n$0\r\n\r\n", [[b""]]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "bytes"])
def test_what_is_well_formed_is_read(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes, messages: list[Any], whole: bool
) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder, framer=framer)
    for part in [stream] if whole else [stream[i : i + 1] for i in range(len(stream))]:
        before = mux.stats().bytes_in
        sock.sendall(part)
        until(mux, lambda before=before, part=part: mux.stats().bytes_in == before + len(part))
    until(mux, lambda: recorder.count("message") == len(messages) or conn.closing, 5)
    assert (recorder.messages(), conn.error, conn.unread) == (messages, None, b"")
    sock.close()

@pytest.mark.parametrize(
    ("framer", "stream", "match"),
    [
        (LengthPrefix("varint"), b"\xff" * 9 + b"\2", "more than 64 bits"),
        (LengthPrefix("varint"), b"\x80" * 9 + b"\1", "larger than max_size"),
        (Delimiter(b"\r\n", max_size=5), b"1234567", "larger than max_size"),
        (Resp(max_size=30), b"*31", "larger than max_size"),
        (Resp(max_size=30), b"*5\r\n", "larger than max_size"),
        (Resp(max_size=8), b"*-9\r\n", "larger than max_size"),
        (Resp(max_size=30), b"*1\r\n$28\r\n" + bytes(28) + b"\r\n", "larger than max_size"),
        (LengthPrefix("varint"), b"\x80" * 9 + b"\2", "more than 64 bits"),
        (Delimiter(b"\r\n", max_size=5), b"1234567", "max_size"),
        (Resp(max_size=30), b"*-31\r\n", "max_size"),
        (Resp(max_size=30), b"*1\r\n$40\r\n", "max_size"),
        (Resp(max_size=30), b"*1\r\n$28\r\n", "max_size"),
        (Resp(max_size=30), b"x" * 31, "max_size"),
        (Resp(), b"*1x\n", "byte 2"),
        (Resp(), b"*\r\n", "byte 1"),
        (Resp(), b"*12\n", "byte 3"),
        (Resp(), b"*1\r$", "byte 3"),
        (Resp(), b"*" + b"0" * 19 + b"\r\n", "byte 19"),
        (Resp(), b"*1\r\n$-1\r\n", "byte 5 of a message: a negative length"),
        (Resp(), b"*1\r\n$-0\r\n\r\n", "byte 5 of a message: a negative length"),
        (Resp(), b"*1\r\n$1\r\naX\n", "byte 9"),
        (Resp(), b"GET 'a\n", "unbalanced quotes"),
        (Resp(), b'GET "a\n', "unbalanced quotes"),
        (Resp(), b'GET "a"b\n', "unbalanced quotes"),
        (Resp(), b"GET 'a\\\\'\n", "unbalanced quotes"),
        (Resp(), b"*1\r\n$1\r\naX", "byte 9"),
        (Resp(), b"*1\r\n$1\r\naXX", "byte 9"),
        (Resp(), b"*1\r\n$1\r\na\rX", "byte 10"),
    ],
    ids=repr,
)
def test_what_is_malformed_is_named_as_soon_as_it_is_detected(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes, match: str
) -> None:
    recorder = Recorder()
    sock, conn = opened(mux, listen, recorder, framer=framer)
    sock.sendall(stream)
    until(mux, lambda: conn.closing, 5)
    with pytest.raises(muxcore.FrameError, match=match):
        raise conn.error
    assert recorder.messages() == []
    sock.close()

def test_the_end_of_a_line_is_not_looked_for_in_what_another_connection_has_sent(
    mux: muxcore.Mux, listen: Listen
) -> None:
    recorder = Recorder()
    one, _ = opened(mux, listen, recorder, framer=Lines())
    other, conn = opened(mux, listen, recorder, framer=Lines())
    until(mux, lambda: len(recorder.connections) == 2)
    for part in (b"abc\r", b"\n"):
        before = mux.stats().bytes_in
        one.sendall(part)
        until(mux, lambda before=before: mux.stats().bytes_in > before)
    other.sendall(b"\n")
    until(mux, lambda: recorder.count("message") == 2 or conn.closing)
    assert recorder.messages() == [b"abc", b""]
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("framer", "message", "wire"),
    [
        (LengthPrefix(4, byteorder="little"), b"one", b"\3\0\0\0one"),
        (LengthPrefix("varint"), bytes(127), b"\x7f" + bytes(127)),
        (Delimiter(b"\r\n"), b"a\r", b"a\r\r\n"),
        (Resp(), -5, b":-5\r\n"),
        (Resp(), 2**63, b":9223372036854775808\r\n"),
        (Resp(), None, b"$-1\r\n"),
        (Resp(), "OK", b"+OK\r\n"),
        (Resp(), "y" * 61, b"+%b\r\n" % (b"y" * 61)),
        (Resp(), "y" * 62, b"+%b\r\n" % (b"y" * 62)),
        (Resp(), "y" * 50_000, b"+%b\r\n" % (b"y" * 50_000)),
        (Resp(), "\xe9", "+\xe9\r\n".encode()),
        (Resp(), [1, "two", b"three", None], b"*4\r\n:1\r\n+two\r\n$5\r\nthree\r\n$-1\r\n"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_message_goes_out_as_its_framer_has_it(
    mux: muxcore.Mux, listen: Listen, framer: Any, message: Any, wire: bytes
) -> None:
    sock, conn = opened(mux, listen, Recorder(), framer=framer)
    conn.send(b"x" * 100)  # what is left in memory is not of this one
    conn.flush()
    sock.recv(1 << 16)
    conn.send(message)
    conn.flush()
    assert sock.recv(1 << 16) == wire
    sock.close()


def test_a_reply_that_is_too_deep_is_refused(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder(), framer=Resp())
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(RecursionError):
        conn.send(deep)
    deep.clear()
    conn.send([[1]])
    assert receive(mux, sock, 12) == b"*1\r\n*1\r\n:1\r\n"
    sock.close()


def test_unread_pieces_are_one_message(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, limits=muxcore.Limits(max_inbox=1 << 20))
    for i in range(200):
        sock.sendall(PATTERN[1000 * i : 1000 * (i + 1)])
        until(mux, lambda i=i: mux.stats().bytes_in == 1000 * (i + 1))
    assert conn.recv() == PATTERN[:200_000]
    sock.close()


def test_a_long_inbox_that_is_read_bit_by_bit_goes_on(mux: muxcore.Mux, listen: Listen) -> None:
    """The room of received messages is used for new ones."""
    lines = [b"%0199d" % i for i in range(700)]
    sock, conn = pulled(mux, listen, framer=Lines(), limits=muxcore.Limits(max_inbox=1 << 20))
    got = []
    sock.sendall(b"".join(line + b"\n" for line in lines[:300]))
    until(mux, lambda: mux.stats().bytes_in == 60_000)
    got += [conn.recv() for _ in range(200)]
    for i in (300, 400, 500, 600):
        sock.sendall(b"".join(line + b"\n" for line in lines[i : i + 100]))
        until(mux, lambda i=i: mux.stats().bytes_in == 200 * (i + 100))
        got += [conn.recv() for _ in range(80)]
    got += conn.recv_all()
    assert got == lines
    sock.close()


@pytest.mark.parametrize("style", ["pull", "batches", "pieces"])
def test_messages_that_are_let_go_of_take_no_memory(mux: muxcore.Mux, listen: Listen, style: str) -> None:
    class Forgetful(muxcore.Handler):
        def on_messages(self, conn: muxcore.Connection, messages: list[Any]) -> None:
            pass

    handlers: dict[str, Any] = {"pull": None, "batches": Forgetful(), "pieces": lambda conn, message: None}
    sock = client(listen(handlers[style], framer=Lines() if style == "batches" else None))
    until(mux, lambda: len(mux.connections))
    [conn] = mux.connections
    stream = (b"y" * 400 + b"\n") * 125 if style == "batches" else b"x" * 50_000

    def rounds(count: int) -> None:
        for _ in range(count):
            before = mux.stats().bytes_in
            sock.sendall(stream)
            while mux.stats().bytes_in < before + len(stream):
                mux.poll(1)
                if style == "pull":
                    conn.recv()

    rounds(3)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        rounds(30)
        assert tracemalloc.get_traced_memory()[0] - before < 60_000
    finally:
        tracemalloc.stop()
    sock.close()


class Pieces:
    """A framer of a user: what has come is a message."""

    def feed(self, data: bytes) -> list[bytes]:
        return [data]

    def encode(self, message: bytes) -> bytes:
        return message

    def rest(self) -> bytes:
        return b""


@pytest.mark.parametrize("framer", [Lines(1 << 20), Pieces], ids=repr)
def test_reads_of_a_new_framer_are_as_large_as_any(backend: str, framer: Any) -> None:
    """A large read of a connection that sends much is for those without a framer alone."""
    with muxcore.Mux(backend=backend, read_size=1 << 16, read_budget=1 << 20) as mux:
        recorder = Recorder()

        def to_lines(conn: muxcore.Connection, message: bytes) -> None:
            recorder.events.append(("message", conn.id, message))
            if len(recorder.received()) >= 5 << 16 and conn.framer is None:
                conn.framer = framer

        recorder.on_message = to_lines  # type: ignore[method-assign]
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        mux.attach(ours, recorder)
        mux.poll(0)
        data = pattern(1 << 20).replace(b"\n", b"\0")
        push(mux, theirs, data + b"\n")
        expected = data + b"\n" if framer is Pieces else data
        until(mux, lambda: len(recorder.received()) == len(expected))
        assert recorder.received() == expected
        theirs.close()


def test_on_open_comes_before_messages_though_others_take_long_to_open(mux: muxcore.Mux) -> None:
    recorder = Recorder()

    def busy(conn: muxcore.Connection) -> None:
        recorder.events.append(("open", conn.id, None))
        end = time.monotonic() + 0.004
        while time.monotonic() < end:
            pass

    recorder.on_open = busy  # type: ignore[method-assign]
    pairs = [socket.socketpair() for _ in range(20)]
    for ours, theirs in pairs:
        theirs.sendall(b"x")
        mux.attach(ours, recorder)
    until(mux, lambda: recorder.count("message") == len(pairs))
    seen = [(number, name) for name, number, _ in recorder.events]
    for number, name in seen:
        if name == "message":
            assert seen.index((number, "open")) < seen.index((number, "message"))
    for _, theirs in pairs:
        theirs.close()


@pytest.mark.parametrize("framer", [Lines(), Words], ids=repr)
def test_messages_that_take_long_are_all_delivered(mux: muxcore.Mux, listen: Listen, framer: Any) -> None:
    recorder = Recorder()

    def busy(conn: muxcore.Connection, message: bytes) -> None:
        recorder.events.append(("message", conn.id, message))
        end = time.monotonic() + 0.001
        while time.monotonic() < end:
            pass

    recorder.on_message = busy  # type: ignore[method-assign]
    sock, _ = opened(mux, listen, recorder, framer=framer)
    sock.sendall(b"x \n" * 40 if framer is Words else b"x\n" * 40)
    until(mux, lambda: recorder.count("message") == 40, 5)
    sock.close()


class Slow(Words):
    """Needs a millisecond for each word."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        for word in super().feed(data):
            end = time.monotonic() + 0.001
            while time.monotonic() < end:
                pass
            yield word


def test_a_slow_framer_delivers_its_messages_in_more_than_one_list(mux: muxcore.Mux, listen: Listen) -> None:
    batches = Batches()
    sock, _ = opened(mux, listen, batches, framer=Slow)
    sock.sendall(b"x " * 40)
    until(mux, lambda: batches.count("message") == 40)
    assert len(batches.batches) > 1
    sock.close()


def test_a_list_of_one_piece_is_counted(mux: muxcore.Mux, listen: Listen) -> None:
    batches = Batches()
    sock, _ = opened(mux, listen, batches)
    sock.sendall(b"x")
    until(mux, lambda: batches.batches)
    assert (mux.stats().messages_in, batches.batches) == (1, [[b"x"]])
    sock.close()


def test_a_file_is_counted_as_a_send(mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]) -> None:
    sock, conn = opened(mux, listen, Recorder())
    conn.sendfile(big_file, count=70_000)
    assert receive(mux, sock, 70_000) == PATTERN[:70_000]
    assert mux.stats().send_calls >= 1
    assert mux.stats().bytes_out == 70_000
    sock.close()


@pytest.mark.parametrize("style", ["batches", "pull"])
def test_inline_requests_that_were_split_are_not_lost_to_an_interrupt(
    mux: muxcore.Mux, listen: Listen, style: str
) -> None:
    batches = Batches()
    sock = client(listen(batches if style == "batches" else None, framer=Resp()))
    until(mux, lambda: len(mux.connections))
    [conn] = mux.connections
    calls: list[int] = []

    def interrupt_the_third(frame: types.FrameType, event: str, arg: object) -> None:
        if frame.f_code.co_name == "split_inline":
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

    sock.sendall(b"ONE\r\nTWO\r\nTHREE\r\n")
    tracer = sys.gettrace()
    sys.settrace(interrupt_the_third)
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                mux.poll(0.02)
                if style == "pull" and conn.unread:
                    conn.recv_all()
    finally:
        sys.settrace(tracer)
    assert mux.stats().messages_in == 0
    got: list[Any] = []
    until(mux, lambda: got.extend(conn.recv_all()) or len(got) + batches.count("message") == 3)
    assert (got or batches.messages()) == [[b"ONE"], [b"TWO"], [b"THREE"]]
    assert mux.stats().messages_in == 3
    sock.close()


def test_the_end_of_a_number_is_not_looked_for_in_what_another_connection_has_sent(
    mux: muxcore.Mux, listen: Listen
) -> None:
    one, _ = opened(mux, listen, recorder := Recorder(), framer=Resp())
    other, conn = opened(mux, listen, Recorder(), framer=Resp())
    one.sendall(b"*1\r\n$1\r\na\r\n")
    until(mux, recorder.messages)
    for part in (b"*1\r", b"X"):
        before = mux.stats().bytes_in
        other.sendall(part)
        until(mux, lambda before=before: mux.stats().bytes_in > before)
    until(mux, lambda: conn.closing, 5)
    with pytest.raises(muxcore.FrameError, match="byte 3"):
        raise conn.error
    one.close()
    other.close()


@pytest.mark.parametrize("style", [Recorder, Batches])
def test_calls_do_not_wait_for_all_messages_of_a_connection(
    mux: muxcore.Mux, listen: Listen, style: type[Recorder]
) -> None:
    """A part of a turn ends where it has lasted long enough: two of them at most come without a call in between."""
    seen: list[str] = []

    class Calling(style):  # type: ignore[misc,valid-type]
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            seen.append("m")
            mux.call_soon(seen.append, "c")

        def on_batch(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            seen.extend("m" * len(messages))
            mux.call_soon(seen.append, "c")

    handler = Calling()
    if style is Batches:
        handler.on_messages = handler.on_batch
    sock, _ = opened(mux, listen, handler, framer=Slow)
    sock.sendall(b"x " * 60)
    until(mux, lambda: seen.count("m") == 60)
    assert max(map(len, "".join(seen).split("c"))) <= 40
    sock.close()


def test_a_list_is_cut_where_its_part_of_the_turn_has_lasted_long_enough(mux: muxcore.Mux) -> None:
    def busy(conn: muxcore.Connection, message: bytes) -> None:
        end = time.monotonic() + 0.005
        while time.monotonic() < end:
            pass

    batches = Batches()
    pairs = [socket.socketpair() for _ in range(4)]
    for i, (ours, _) in enumerate(pairs):  # wherever a batch begins, lines come behind a slow one
        mux.attach(ours, batches if i % 2 else busy, framer=Lines() if i % 2 else None)
    mux.poll(0)
    for count in range(1, 10):  # every eighth step looks at the clock, and may end the part before it comes to them
        for i, (_, theirs) in enumerate(pairs):
            theirs.sendall(b"\n" * 1000 if i % 2 else b"x")
        until(mux, lambda count=count: batches.count("message") == 2000 * count)
    assert len(batches.batches) > 18
    for _, theirs in pairs:
        theirs.close()


def test_recv_all_returns_all_though_the_last_turn_was_long_ago(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, framer=Lines())
    sock.sendall(b"x\n" * 100)
    until(mux, lambda: conn.inbox_size == 200)
    end = time.monotonic() + 0.005
    while time.monotonic() < end:
        pass
    assert conn.recv_all() == [b"x"] * 100
    sock.close()


@pytest.mark.parametrize(("framer", "stream"), [(None, b"x"), (Lines(), b"a\nb\n"), (Words, b"a b ")], ids=repr)
def test_input_that_a_handler_has_no_method_for_is_discarded(
    mux: muxcore.Mux, listen: Listen, framer: Any, stream: bytes
) -> None:
    with client(listen(muxcore.Handler(), framer=framer)) as sock:
        until(mux, lambda: len(mux.connections))
        [conn] = mux.connections
        sock.sendall(stream)
        until(mux, lambda: mux.stats().messages_in == (1 if framer is None else 2))
        turns(mux, 0.01)
        assert (conn.closing, conn.unread, mux.stats().handler_errors) == (False, b"", 0)


@pytest.mark.parametrize("style", [Recorder, Batches])
def test_a_poll_that_delivers_what_was_held_back_does_not_wait(
    mux: muxcore.Mux, listen: Listen, style: type[Recorder]
) -> None:
    sock, conn = opened(mux, listen, recorder := style(), framer=Lines())
    sock.sendall(b"1\n")
    until(mux, recorder.messages)
    conn.framer = Delimiter(b"|")
    sock.sendall(b"2\n")
    until(mux, lambda: conn.unread == b"2\n")
    conn.pause_reading()
    conn.framer = Lines()
    turns(mux, 0.01)
    assert recorder.messages() == [b"1"]
    conn.resume_reading()
    start = time.monotonic()
    assert mux.poll(10) == [], "what has a handler is not reported"
    assert time.monotonic() - start < 5
    assert recorder.messages() == [b"1", b"2"]
    sock.close()


@pytest.mark.unix_only("Unix sockets")
def test_the_end_of_a_peer_that_was_found_gone_is_no_eof(mux: muxcore.Mux) -> None:
    recorder = Late()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder)
    mux.poll(0)
    theirs.close()
    conn.send(b"x")
    conn.flush()
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "close"]
    assert (conn.eof, type(recorder.reason())) == (False, BrokenPipeError)


def test_a_connection_that_was_reset_is_not_read_from(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, framer=Lines())
    reset(sock)
    until(mux, lambda: conn.closed)
    assert not conn.is_reading()


def test_a_framer_that_is_set_between_turns_delivers_what_is_a_message_now(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, recorder := Recorder(), framer=Lines())
    sock.sendall(b"no end")
    until(mux, lambda: conn.inbox_size == 6)
    conn.framer = Fixed(2)
    until(mux, lambda: recorder.count("message") == 3, 5)
    assert recorder.messages() == [b"no", b" e", b"nd"]
    sock.close()


@pytest.mark.parametrize("own", [False, True])
def test_a_factory_may_set_the_framer_of_its_connection(mux: muxcore.Mux, listen: Listen, own: bool) -> None:
    """The one that was set last counts, though another was being made."""
    made: list[Any] = []
    fed: list[Any] = []

    class Counting(Words):
        def feed(self, data: bytes) -> Iterator[bytes]:
            fed.append(self)
            return super().feed(data)

    def factory() -> Words:
        made.append(Counting())
        number = len(made)
        if number == 1:
            [conn] = mux.connections
            conn.framer = factory if own else Delimiter(b"|")
        return made[number - 1]

    sock, _ = opened(mux, listen, recorder := Recorder(), framer=factory)
    sock.sendall(b"one two |")
    until(mux, lambda: recorder.count("message"))
    assert recorder.messages() == ([b"one", b"two"] if own else [b"one two "])
    assert fed == made[1:2]
    sock.close()


def test_a_piece_of_input_has_at_most_four_times_read_size(backend: str) -> None:
    with muxcore.Mux(backend=backend, read_size=1000, read_budget=50_000) as mux:
        recorder = Recorder()
        ours, theirs = socket.socketpair()
        mux.attach(ours, recorder)
        mux.poll(0)
        theirs.sendall(PATTERN[:50_000])
        until(mux, lambda: len(recorder.received()) == 50_000)
        assert recorder.received() == PATTERN[:50_000]
        assert max(map(len, recorder.messages())) == (4000 if backend == "epoll" else 1000)
        theirs.close()


def test_large_reads_of_different_sizes_bring_what_was_sent(backend: str) -> None:
    """How large one may be depends on `high`; the memory for it is shared."""
    with muxcore.Mux(backend=backend, read_size=20_000, read_budget=1 << 20) as mux:
        for high, size in ((100, 20_005), (1 << 20, 120_000), (1 << 20, 20_005), (1 << 20, 120_000)):
            recorder = Recorder()
            ours, theirs = socket.socketpair()
            mux.attach(ours, recorder, limits=muxcore.Limits(high=high, low=0))
            mux.poll(0)
            theirs.sendall(PATTERN[:size])
            until(mux, lambda recorder=recorder, size=size: len(recorder.received()) == size)
            assert recorder.received() == PATTERN[:size]
            theirs.close()


def test_messages_that_are_no_bytes_of_the_core_are_not_used_again(mux: muxcore.Mux, listen: Listen) -> None:
    """A request is a list, and what a user's framer finds is its user's."""
    got: list[Any] = []
    socks = []
    for framer in (Resp(), Words, Lines()):
        socks.append(client(listen(lambda conn, message: got.append((type(message), len(message))), framer=framer)))
    for size in range(2, 14):
        for sock, data, kind in zip(socks, (b"x " * size + b"\n", b"w" * size + b" ", b"l" * size + b"\n"),
                                    (list, bytes, bytes), strict=True):
            sock.sendall(data)
            until(mux, lambda: got)
            assert got == [(kind, size)]
            got.clear()
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("read_size", [600, 65536])
def test_pieces_of_every_size_are_as_they_were_sent(backend: str, read_size: int) -> None:
    """Small ones are put into objects that are used again."""
    with muxcore.Mux(backend=backend, read_size=read_size) as mux:
        for name in (b"GET", b"SET"):  # something is remembered beside those objects
            ours, theirs = socket.socketpair()
            mux.attach(ours, muxcore.Handler(), framer=Resp())
            theirs.sendall(b"*1\r\n$3\r\n" + name + b"\r\n")
            mux.poll(0)
            mux.poll(0)
            theirs.close()
        pieces, lines = socket.socketpair(), socket.socketpair()
        mux.attach(pieces[0], lambda conn, message: conn.send(message))
        mux.attach(lines[0], lambda conn, message: conn.send(message), framer=Lines())
        for size in [*range(300, 600, 5), *range(599, 300, -7), *range(480, 512), *range(600, 1200, 16)] * 2:
            data = PATTERN[size : 2 * size]
            pieces[1].sendall(data)
            assert receive(mux, pieces[1], size) == data
            line = b"x" * (size | 15) + b"\n"  # as long as one that has the same room may be
            lines[1].sendall(line)
            assert receive(mux, lines[1], len(line)) == line
        for _, theirs in (pieces, lines):
            theirs.close()


def test_what_is_unfinished_between_two_reads_uses_no_memory_afterwards(mux: muxcore.Mux, listen: Listen) -> None:
    sock = client(listen(muxcore.Handler(), framer=Lines()))

    def rounds(count: int) -> None:
        for _ in range(count):
            for part in (b"x" * 3000, b"\n"):
                before = mux.stats().bytes_in
                sock.sendall(part)
                until(mux, lambda before=before, part=part: mux.stats().bytes_in == before + len(part))

    rounds(20)
    with memory(mux.backend) as grown:
        rounds(1000)
        assert grown() < 1 << 20
    sock.close()


def test_setting_a_framer_again_and_again_uses_no_memory(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = pulled(mux, listen, framer=Words)

    def rounds(count: int) -> None:
        for _ in range(count):
            for part in (b"a ", b"x" * 3000 + b" "):
                before = mux.stats().bytes_in
                sock.sendall(part)
                until(mux, lambda before=before, part=part: mux.stats().bytes_in == before + len(part))
            conn.framer = Words
            assert list(map(len, conn.recv_all())) == [1, 3000]

    rounds(5)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        rounds(200)
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
    finally:
        tracemalloc.stop()
    sock.close()


def test_a_message_that_was_delivered_leaves_its_connection_no_memory(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(muxcore.Handler(), framer=Lines(1 << 20))
    with memory(mux.backend) as grown:
        socks = [client(listener) for _ in range(50)]
        for sock in socks:
            sock.sendall(b"x" * 60_000 + b"\n")
        until(mux, lambda: mux.stats().messages_in == 50)
        assert grown() < 50 * 30_000
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("message", [b"x", 1, None, "OK", [1, b"x"], [bytes(5000)]], ids=lambda value: repr(value)[:20])
def test_a_reply_to_a_connection_that_closes_is_a_drop(mux: muxcore.Mux, listen: Listen, message: Any) -> None:
    sock, conn = opened(mux, listen, Recorder(), framer=Resp())
    conn.close()
    assert conn.send(message) is False
    assert (conn.outbox_size, mux.stats().drops) == (0, 1)
    sock.close()


def test_a_broadcast_that_fails_for_two_raises_the_first_failure(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    limits = muxcore.Limits(high=1, low=0, max_outbox=1, overflow="raise")
    socks = audience(mux, listen(recorder, limits=limits), recorder, 2)
    for conn in recorder.connections:
        conn.send(b"x")
    with pytest.raises(muxcore.OutboxFull) as caught:
        mux.broadcast(recorder.connections, b"x")
    assert caught.value.conn is recorder.connections[0]
    for sock in socks:
        sock.close()
