"""What a hostile client can make us spend, and where that ends; docs/threat-model.md is the table of it.

Bytes and calls are counted, not time.
"""

from __future__ import annotations

import array
import gc
import re
import socket
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import LOCALHOST, Recorder, client, memory, nonblocking, open_fds, push, reset, stuff, turns, until

import muxcore
from muxcore import Delimiter, Fixed, LengthPrefix, Lines, Resp

Listen = Callable[..., muxcore.Listener]

KIB, MIB = 1 << 10, 1 << 20
READ = 65536  # Mux(read_size=...)


def crowd(mux: muxcore.Mux, listener: muxcore.Listener, size: int) -> list[socket.socket]:
    """So many clients, accepted."""
    socks = [client(listener) for _ in range(size)]
    until(mux, lambda: listener.connections == size)
    return socks


def all_leave(mux: muxcore.Mux, socks: list[socket.socket]) -> None:
    for sock in socks:
        reset(sock)
    until(mux, lambda: mux.stats().connections == 0)


MODEL = Path(__file__).parent.parent / "docs" / "threat-model.md"


@pytest.mark.skipif(not MODEL.exists(), reason="the documents are not beside the tests")
def test_the_threat_model_names_tests_that_there_are() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", MODEL.read_text(encoding="utf-8")))
    assert len(named) > 30
    assert {name for name in named if f"def {name}(" not in tests} == set()


# --- memory ----------------------------------------------------------------------------------------


def test_everything_that_is_kept_has_a_limit_by_default() -> None:
    limits = muxcore.Limits()
    assert limits.high == 64 * KIB
    assert limits.max_outbox == 16 * MIB
    assert limits.max_inbox == MIB
    assert limits.overflow == "close"
    assert Lines().max_size == Delimiter(b"\0").max_size == 64 * KIB
    assert LengthPrefix().max_size == Resp().max_size == MIB


@pytest.mark.parametrize(
    ("framer", "beginning"),
    [(LengthPrefix(), (MIB).to_bytes(4, "big")), (LengthPrefix("varint"), b"\x80\x80\x40"), (Fixed(MIB), b"x"),
     (Resp(), b"*1\r\n$%d\r\n" % (MIB - 20)), (Resp(), b"*170000\r\n"), (Lines(MIB), b"x")],
    ids=["length", "varint", "fixed", "bulk string", "array", "line"],
)
def test_a_promise_costs_nothing_until_it_is_kept(
    mux: muxcore.Mux, listen: Listen, framer: Any, beginning: bytes
) -> None:
    """A length of a mebibyte that is announced, and does not come."""
    socks = crowd(mux, listen(Recorder(), framer=framer), 200)
    with memory(mux.backend) as grown:
        for sock in socks:
            sock.sendall(beginning)
        until(mux, lambda: all(conn.inbox_size == len(beginning) for conn in mux.connections))
        assert grown() < 200 * 8 * KIB
    all_leave(mux, socks)


@pytest.mark.parametrize(
    ("framer", "message"),
    [(LengthPrefix(), MIB.to_bytes(4, "big") + bytes(MIB - 1)), (Lines(MIB), bytes(MIB)),
     (Delimiter(b"\r\n", max_size=MIB), bytes(MIB)), (Resp(), b"*1\r\n$%d\r\n" % (MIB - 20) + bytes(MIB - 30))],
    ids=["length", "line", "delimiter", "request"],
)
def test_an_unfinished_message_costs_three_times_max_size_at_most(
    mux: muxcore.Mux, listen: Listen, framer: Any, message: bytes
) -> None:
    """Its memory grows by doubling, and malloc has its losses."""
    listener = listen(muxcore.Handler(), framer=framer)
    with memory(mux.backend) as grown:
        for _ in range(3):  # what is freed may stay malloc's, but then it is used again
            socks = crowd(mux, listener, 20)
            for sock in socks:
                push(mux, sock, message)
            until(mux, lambda: all(conn.inbox_size == len(message) for conn in mux.connections))
            assert grown() < 20 * 3 * MIB
            all_leave(mux, socks)


def test_long_commands_are_not_remembered(mux: muxcore.Mux, listen: Listen) -> None:
    """The Mux keeps the names of commands that came lately, those of a usual length."""
    sock = client(listen(muxcore.Handler(), framer=Resp()))
    with memory(mux.backend) as grown:
        for i in range(64):
            sock.sendall(b"*1\r\n$%d\r\n" % (100_000 + i) + bytes([64 + i]) * (100_000 + i) + b"\r\n")
            until(mux, lambda i=i: mux.stats().messages_in == i + 1)
        assert grown() < 2 * MIB
    sock.close()


class Amplifier(muxcore.Handler):
    """Replies to an empty line with 100,000 bytes."""

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        conn.write(bytes(100_000))


def test_small_requests_with_large_replies_stop_at_high(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise autopause: the replies to 50,000 requests of one byte would be 5 GB; one more than `high` is made."""
    sock = client(listen(Amplifier(), framer=Lines()), rcvbuf=4096)
    until(mux, lambda: mux.stats().connections)
    [conn] = mux.connections
    push(mux, sock, b"\n" * 50_000)
    turns(mux, 0.05)
    assert conn.limits.high < conn.outbox_size <= conn.limits.high + 100_000
    assert mux.stats().messages_in < 200, "no other request was even looked at"
    reset(sock)
    until(mux, lambda: conn.closed)


def test_a_batch_of_small_requests_with_large_replies_stops_at_max_outbox(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise max-outbox: on_messages has all messages of a read in its hands, so only max_outbox stops it."""
    largest = []

    class Batch(Recorder):
        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            for _ in messages:
                if conn.write(bytes(100_000)) or not conn.closing:
                    largest.append(conn.outbox_size)

    handler = Batch()
    sock = client(listen(handler, framer=Lines()), rcvbuf=4096)
    sock.sendall(b"\n" * 50_000)
    until(mux, lambda: handler.count("close"))
    assert isinstance(handler.reason(), muxcore.OutboxFull)
    assert max(largest) <= 16 * MIB + 100_000
    reset(sock)


def test_one_read_brings_as_many_messages_as_it_has_bytes_at_most(mux: muxcore.Mux, listen: Listen) -> None:
    batches: list[int] = []

    class Batch(muxcore.Handler):
        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            batches.append(len(messages))

    sock = client(listen(Batch(), framer=Lines()))
    push(mux, sock, b"\n" * (4 * READ))
    until(mux, lambda: sum(batches) == 4 * READ)
    assert max(batches) <= READ
    reset(sock)


def test_a_request_of_many_strings_is_ten_times_its_size_at_most(mux: muxcore.Mux, listen: Listen) -> None:
    """Each of eight bytes on the wire becomes an object of about 40, and a place in a list."""
    recorder = Recorder()
    sock = client(listen(recorder, framer=Resp()))
    stream = b"*130000\r\n" + b"$2\r\nab\r\n" * 130_000
    push(mux, sock, stream)
    until(mux, lambda: recorder.count("message"))
    [request] = recorder.messages()
    assert sys.getsizeof(request) + sum(map(sys.getsizeof, request)) < 10 * len(stream)
    reset(sock)
    until(mux, lambda: recorder.count("close"))


def test_clients_that_come_and_go_leave_nothing_behind(mux: muxcore.Mux, listen: Listen) -> None:
    """Half a message, then a reset or a FIN, from 200 clients at a time."""
    listener = listen(muxcore.Handler(), framer=Lines(MIB))

    def visit() -> None:
        socks = crowd(mux, listener, 200)
        for sock in socks:
            sock.sendall(bytes(20_000))
        until(mux, lambda: all(conn.inbox_size == 20_000 for conn in mux.connections))
        all_leave(mux, socks)

    visit()
    with memory(mux.backend) as grown:
        for _ in range(4):
            visit()
        assert grown() < 2 * MIB, "one byte in eight of what they sent would be 2 MiB"


def test_a_connection_that_was_reset_is_freed_without_a_collection(mux: muxcore.Mux, listen: Listen) -> None:
    """Between two collections of all generations a server may lose very many connections, each with its inbox."""
    sock = client(listen(muxcore.Handler(), framer=LengthPrefix()))
    until(mux, lambda: mux.stats().connections)
    [gone] = map(weakref.ref, mux.connections)
    push(mux, sock, MIB.to_bytes(4, "big") + bytes(100_000))
    gc.disable()
    try:
        reset(sock)
        until(mux, lambda: mux.stats().connections == 0)
        mux.poll(0)
        assert gone() is None
    finally:
        gc.enable()


# --- processor -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("framer", "stream"),
    [(Lines(MIB), bytes(MIB)), (Resp(), b"*100000\r\n" + b"$4\r\nabcd\r\n" * 99_999)],
    ids=["line", "request"],
)
def test_a_message_in_single_bytes_is_scanned_once(framer: Any, stream: bytes) -> None:
    """Promise bounded-inbox: a mebibyte in reads of one byte. To scan, or to move, it all with every read would need
    half a terabyte of memory traffic, which no time limit of a test would allow. (For the fallback Reader counts what
    it looks at: test_an_unfinished_message_is_not_scanned_again_with_every_read.)"""
    with muxcore.Mux(read_size=1) as mux:
        sock = client(mux.listen(LOCALHOST, muxcore.Handler(), framer=framer))
        push(mux, sock, stream)
        until(mux, lambda: mux.stats().bytes_in == len(stream), deadline=50)
        [conn] = mux.connections
        assert conn.inbox_size == len(stream)
        assert mux.stats().recv_calls <= len(stream) + 100
        all_leave(mux, [sock])


def test_a_long_inbox_read_bit_by_bit_is_not_moved_with_every_read(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise bounded-inbox: the peer keeps the inbox full, the user receives a line a turn. If every such line
    made room for a read, by moving all that is behind it, a line would cost as much as the inbox is long."""
    line = b"x" * 4999 + b"\n"
    for limit in range(1_020_000, 1_050_000, 4000):  # just below a power of two the memory is exactly full
        sock = client(listen(framer=Lines(), limits=muxcore.Limits(max_inbox=limit)))
        until(mux, lambda: mux.stats().connections)
        [conn] = mux.connections
        sent = stuff(mux, sock, line)
        before, lines = mux.stats(), 0
        while lines < 200:
            mux.poll(0)
            lines += conn.recv() is not None
        after = mux.stats()
        assert after.recv_calls - before.recv_calls <= 5 + (after.bytes_in - before.bytes_in) / 16384, (limit, sent)
        conn.abort()  # select does not report a peer that leaves while reading is paused
        until(mux, lambda: mux.stats().connections == 0)
        sock.close()


@pytest.mark.parametrize("nothing", [b"*0\r\n", b"*-1\r\n", b"\r\n", b"  \r\n"])
def test_empty_requests_are_skipped_a_read_at_a_time(mux: muxcore.Mux, listen: Listen, nothing: bytes) -> None:
    recorder = Recorder()
    sock = client(listen(recorder, framer=Resp()))
    stream = nothing * 100_000
    push(mux, sock, stream + b"PING\r\n")
    until(mux, lambda: recorder.count("message"))
    assert recorder.messages() == [[b"PING"]]
    assert mux.stats().recv_calls <= len(stream) / 4096 + 100
    reset(sock)
    until(mux, lambda: recorder.count("close"))


# --- descriptors -----------------------------------------------------------------------------------


def test_descriptors_in_a_message_are_not_received(mux: muxcore.Mux, socket_path: Path) -> None:
    """A peer on a Unix socket can pass descriptors along. recv, without room for them, lets the kernel close them; the
    fixture that counts descriptors would see them."""
    recorder = Recorder()
    mux.listen(str(socket_path), recorder)
    with socket.socket(socket.AF_UNIX) as sock, socket.socket() as passed:
        sock.connect(str(socket_path))
        before = len(open_fds())
        until(mux, lambda: recorder.connections)
        rights = array.array("i", [passed.fileno()] * 50)
        for _ in range(20):
            sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        until(mux, lambda: recorder.received() == b"x" * 20)
        assert len(open_fds()) == before + 1, "the accepted connection's, and no other"
    until(mux, lambda: recorder.count("close"))


def test_a_closing_connection_counts_for_max_connections(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise max-connections: otherwise a client that makes us close, and does not reply to our FIN, would
    hold any number of connections."""

    class Goodbye(muxcore.Handler):
        def on_open(self, conn: muxcore.Connection) -> None:
            conn.close()

    listener = listen(Goodbye(), max_connections=3, timeouts=muxcore.Timeouts(linger=60.0))
    socks = [client(listener) for _ in range(6)]
    until(mux, lambda: mux.stats().accept_pauses)
    turns(mux, 0.05)
    assert (listener.connections, mux.stats().accepts) == (3, 3)
    all_leave(mux, socks[:3])
    until(mux, lambda: mux.stats().accepts == 6)
    all_leave(mux, socks[3:])


# --- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "malformed"])
def test_flooding_a_closing_connection_does_not_prolong_it(mux: muxcore.Mux, listen: Listen, how: str) -> None:
    """Promise close-loses-nothing: what comes during the linger is read and discarded, and does not prolong it."""
    recorder = Recorder()
    sock = client(listen(recorder, framer=Lines(10_000), timeouts=muxcore.Timeouts(linger=0.3)))
    until(mux, lambda: recorder.connections)
    [conn] = recorder.connections
    flood = bytes(READ)
    if how == "close":
        conn.close()

    def flooded() -> int:
        with nonblocking(sock):
            try:
                sock.send(flood)
            except (BlockingIOError, ConnectionError):
                pass
        assert conn.inbox_size <= 10_000
        return recorder.count("close")

    until(mux, flooded)
    assert recorder.count("message") == 0
    assert isinstance(recorder.reason(), muxcore.FrameTooLarge if how == "malformed" else type(None))
    sock.close()


@pytest.mark.parametrize("nothing", [b"\n", b" \r\n", b"*0\r\n", b"*-1\r\n"])
def test_floods_of_empty_requests_delay_no_timer(mux: muxcore.Mux, listen: Listen, nothing: bytes) -> None:
    """Promise bounded-turns: each costs its sender a byte or some, and is skipped without a step of the loop."""
    listener = listen(Recorder(), framer=Resp())
    socks = [client(listener) for _ in range(8)]
    until(mux, lambda: mux.stats().connections == 8)
    late: list[float] = []
    for _ in range(5):
        for sock in socks:
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.send(nothing * (200_000 // len(nothing)))
        due = mux.time() + 0.001
        done: list[float] = []
        mux.call_at(due, lambda done=done: done.append(mux.time()))  # type: ignore[misc]
        until(mux, lambda done=done: done)  # type: ignore[misc]
        late.append(done[0] - due)
    assert min(late) < 0.05
    for sock in socks:
        sock.close()
