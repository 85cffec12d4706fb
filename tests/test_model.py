"""A connection against a model of it: whatever is done in whatever order, no byte is lost or moved (Promise
close-loses-nothing)."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from streams import sendable
from support import pattern

import muxcore
from muxcore import Delimiter, Fixed, LengthPrefix
from muxcore._custom import CustomReader
from muxcore._frame import NOTHING, Reader, encode

FILE = pattern(200_000)  # more than one sendfile gets rid of


class Fives:
    """A framer of a user: five bytes are a message."""

    def __init__(self) -> None:
        self.buffer = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.buffer += data
        while len(self.buffer) >= 5:
            message, self.buffer = self.buffer[:5], self.buffer[5:]
            yield message

    def encode(self, message: bytes) -> bytes:
        return message

    def rest(self) -> bytes:
        return self.buffer


# None of them can find anything malformed, and each message determines the bytes that it was made of.
FRAMERS = [None, Delimiter(b"|", max_size=1 << 30), LengthPrefix(1), Fixed(3), Fives]

framers = st.sampled_from(FRAMERS)
sizes = st.sampled_from([0, 1, 3, 5, 10, 100, 255, 3000, 9000])
tricks = st.lists(st.one_of(st.sampled_from(["pause", "reply", "nothing"]), framers), max_size=4)


class Conversation(RuleBasedStateMachine):
    """One connection over small socket buffers, and its peer, which reads and writes in steps."""

    def __init__(self, backend: str, style: str) -> None:
        super().__init__()
        self.style = style
        self.mux = muxcore.Mux(backend=backend, read_size=1000, read_budget=2000)
        ours, self.peer = socket.socketpair()
        for sock in (ours, self.peer):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.peer.setblocking(False)
        limits = muxcore.Limits(high=2000, low=500, max_outbox=20_000, max_inbox=1000, overflow="drop")
        self.conn = self.mux.attach(ours, self.handler(), limits=limits)
        self.numbers = 0
        self.tricks: list[Any] = []
        self.accepted, self.arrived = bytearray(), bytearray()  # by the connection, and at its peer
        self.sent, self.delivered = bytearray(), bytearray()  # what the peer has sent, and what was delivered of it
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.file.write(FILE)
        self.file.flush()

    def handler(self) -> Any:
        if self.style == "pull":
            return None
        handler = muxcore.Handler()
        if self.style == "batch":
            handler.on_messages = lambda conn, messages: self.receive(*messages)  # type: ignore[method-assign]
        else:
            handler.on_message = lambda conn, message: self.receive(message)  # type: ignore[method-assign]
        return handler

    def receive(self, *messages: bytes) -> None:
        """Messages were delivered; do what was planned for that moment."""
        for message in messages:
            self.delivered += wire(self.conn.framer, message)
        assert self.sent.startswith(self.delivered)
        trick = self.tricks.pop() if self.tricks else "nothing"
        if trick == "pause":
            self.conn.pause_reading()
        elif trick == "reply":
            self.accept(messages[0], lambda: self.conn.write(messages[0]))
        elif trick != "nothing":
            self.conn.framer = trick

    def accept(self, data: bytes, send: Callable[[], object]) -> None:
        before = self.mux.stats().messages_out
        send()
        if self.mux.stats().messages_out > before:
            self.accepted += data

    def body(self, size: int) -> bytes:
        """Bytes that are not those of any other body."""
        self.numbers += 1
        return (b"%d." % self.numbers * size)[:size]

    # -- what the program does

    @rule(size=sizes)
    def send(self, size: int) -> None:
        message = self.body(size)
        if fits(self.conn.framer, message):
            self.accept(wire(self.conn.framer, message), lambda: self.conn.send(message))

    @rule(sizes=st.lists(sizes, max_size=4))
    def send_many(self, sizes: list[int]) -> None:
        messages = [message for message in map(self.body, sizes) if fits(self.conn.framer, message)]

        def one_by_one() -> Iterator[bytes]:
            for message in messages:
                before = self.mux.stats().messages_out
                yield message
                if self.mux.stats().messages_out > before:
                    self.accepted.extend(wire(self.conn.framer, message))

        self.conn.send_many(one_by_one())

    @rule(size=sizes)
    def write(self, size: int) -> None:
        data = self.body(size)
        self.accept(data, lambda: self.conn.write(data))

    @rule(offset=sizes, count=st.sampled_from([0, 1, 100, 70_000, None]))
    def sendfile(self, offset: int, count: int | None) -> None:
        part = FILE[offset:] if count is None else FILE[offset : offset + count]
        self.accept(part, lambda: self.conn.sendfile(self.file, offset, count))

    @rule()
    def flush(self) -> None:
        self.conn.flush()

    @rule()
    def pause(self) -> None:
        self.conn.pause_reading()

    @rule()
    def resume(self) -> None:
        self.conn.resume_reading()

    @rule(framer=framers)
    def change_framer(self, framer: Any) -> None:
        self.conn.framer = framer

    @rule(tricks=tricks)
    def do_when_delivered(self, tricks: list[Any]) -> None:
        self.tricks = tricks

    @precondition(lambda self: self.style == "pull")
    @rule(how=st.sampled_from(["recv", "recv_all", "iterate"]))
    def receive_some(self, how: str) -> None:
        if how == "recv":
            message = self.conn.recv()
            if message is not None:
                self.receive(message)
        elif how == "recv_all":
            messages = self.conn.recv_all()
            if messages:
                self.receive(*messages)
        else:
            for message in self.conn:
                self.receive(message)

    @rule()
    def turn(self) -> None:
        self.mux.poll(0)

    # -- what the peer does

    @rule(size=sizes, framer=framers)
    def peer_sends(self, size: int, framer: Any) -> None:
        body = self.body(size)
        data = wire(framer, body) if fits(framer, body) else body
        try:
            self.sent += data[: self.peer.send(data)]
        except BlockingIOError:
            pass

    @rule(size=st.sampled_from([1, 500, 5000, 100_000]))
    def peer_reads(self, size: int) -> None:
        try:
            self.arrived += self.peer.recv(size)
        except BlockingIOError:
            pass
        assert self.accepted.startswith(self.arrived)

    # -- the end

    def teardown(self) -> None:
        try:
            self.tricks = []
            self.conn.resume_reading()
            self.settle()
            self.nothing_is_held_back()
            self.write(3000)
            self.conn.close()
            self.settle()
            assert self.arrived == self.accepted
            self.peer.close()
            self.mux.poll(0)
            self.mux.poll(0)
            assert (self.conn.closed, self.conn.error) == (True, None)
            assert self.mux.stats().handler_errors == 0
        finally:
            self.peer.close()
            self.file.close()
            self.mux.close()

    def settle(self) -> None:
        """Let both ends go on until nothing happens any more."""
        moved = -1
        while moved != self.moved():
            moved = self.moved()
            for _ in range(3):
                self.mux.poll(0)
                if self.style == "pull":
                    self.receive_some("iterate")
                self.peer_reads(100_000)

    def moved(self) -> int:
        stats = self.mux.stats()
        return stats.bytes_in + stats.bytes_out + stats.messages_in + len(self.arrived)

    def nothing_is_held_back(self) -> None:
        rest = bytes(self.sent[len(self.delivered) :])
        framer = self.conn.framer
        reader = CustomReader(framer) if framer is Fives else Reader(framer)
        reader.feed(rest)
        assert reader.peek(False) is NOTHING
        assert self.conn.unread == rest
        assert self.conn.outbox_size == 0


def wire(framer: Any, message: bytes) -> bytes:
    return message if framer is Fives else encode(framer, message)


def fits(framer: Any, message: bytes) -> bool:
    return len(message) == 5 if framer is Fives else sendable(framer, message)


@pytest.mark.parametrize("style", ["message", "batch", "pull"])
def test_no_byte_is_lost_or_moved(backend: str, style: str) -> None:
    run_state_machine_as_test(
        lambda: Conversation(backend, style), settings=settings(max_examples=100, stateful_step_count=50)
    )
