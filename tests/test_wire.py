"""What stands between a connection's socket and its framer, by a wire that only the tests have (Promise wire)."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wires
from support import Recorder, until

import muxcore
from muxcore import _wiring
from muxcore._wire import Wire

GREETING, PARTING = b"hello-wire\n", b"bye-wire\n"
ROT = bytes(i ^ 0x55 for i in range(256))


class Xor(Wire):
    """Both ends greet each other; then each byte is changed; a parting marks the end. It may delay, split and fail."""

    __slots__ = ("calls", "fails", "held", "hook", "pending", "piece")

    def __init__(self, piece: int = 1 << 20, fails: str = "", hook: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.piece, self.fails, self.hook = piece, fails, hook
        self.held = b""
        self.calls: list[str] = []
        self.pending = [GREETING]

    def called(self, name: str) -> None:
        self.calls.append(name)
        if self.hook is not None:
            self.hook(name)
        if name == self.fails:
            raise OSError(f"{name} failed")

    def advance(self) -> None:
        self.output += self.pending
        self.pending = []
        self.called("advance")
        data, self.received = self.held + b"".join(self.received), []
        if not self.opened:
            if not GREETING.startswith(data[: len(GREETING)]):
                self.output.append(b"go away")
                raise ValueError("no greeting")
            if len(data) < len(GREETING):
                self.held = data
                return
            data, self.opened = data[len(GREETING) :], True
        data, end, _ = data.partition(PARTING)
        self.held = b""
        if not end and (size := max(n for n in range(len(PARTING)) if data.endswith(PARTING[:n]))):
            data, self.held = data[:-size], data[-size:]
        if data:
            self.plain += [data[i : i + self.piece].translate(ROT) for i in range(0, len(data), self.piece)]
        self.ended = self.ended or bool(end)

    def encrypt(self) -> None:
        self.called("encrypt")
        given = self.given
        if given is not None:
            self.output.append(bytes(given).translate(ROT))
            self.given = None

    def finish(self) -> None:
        self.called("finish")
        self.output.append(PARTING)

    def eof(self) -> Exception | None:
        self.called("eof")
        return None if self.ended else EOFError("no parting")


class Wired:
    """A Mux whose listeners give each connection a wire."""

    def __init__(self, mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mux = mux
        self.wires: list[Xor] = []
        self.options: dict[str, Any] = {}
        self.patch = monkeypatch
        self.clients: list[socket.socket] = []

    def make(self, peer: Any) -> Wire:
        wire = Xor(**self.options)
        self.wires.append(wire)
        return wire

    def listen(self, handler: Any, **options: Any) -> muxcore.Listener:
        with self.patch.context() as patch:
            patch.setattr(_wiring, "listening", lambda *_: self)
            return self.mux.listen(("127.0.0.1", 0), handler, **options)

    def connect(self, address: Any, handler: Any, **options: Any) -> muxcore.Connection:
        with self.patch.context() as patch:
            patch.setattr(_wiring, "connecting", lambda *_: self)
            return self.mux.connect(address, handler, **options)

    def client(self, listener: muxcore.Listener, greets: bool = True) -> socket.socket:
        client = socket.create_connection(listener.address)
        client.settimeout(10)
        self.clients.append(client)
        if greets:
            client.sendall(GREETING)
        return client

    def read(self, client: socket.socket, size: int) -> bytes:
        """So many bytes behind the greeting, in plaintext."""
        raw = self.read_raw(client, len(GREETING) + size)
        assert raw.startswith(GREETING)
        return raw[len(GREETING) :].translate(ROT)

    def read_raw(self, client: socket.socket, size: int) -> bytes:
        got = bytearray()
        client.setblocking(False)

        def complete() -> bool:
            try:
                while len(got) < size and (data := client.recv(65536)):
                    got.extend(data)
            except BlockingIOError:
                pass
            return len(got) >= size

        until(self.mux, complete)
        return bytes(got)

    def read_to_end(self, client: socket.socket) -> bytes:
        got = bytearray()
        client.setblocking(False)

        def at_end() -> bool:
            try:
                while data := client.recv(65536):
                    got.extend(data)
            except BlockingIOError:
                return False
            return True

        until(self.mux, at_end)
        return bytes(got)


@pytest.fixture
def wired(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wired]:
    wired = Wired(mux, monkeypatch)
    yield wired
    for client in wired.clients:
        client.close()


def xor(data: bytes) -> bytes:
    return data.translate(ROT)


FRAMERS = [
    pytest.param(None, b"%s", id="none"),
    pytest.param(muxcore.Lines(max_size=1 << 22), b"%s\n", id="lines"),
    pytest.param(muxcore.Delimiter(b"||", max_size=1 << 22), b"%s||", id="delimiter"),
]


@pytest.mark.parametrize(("framer", "wire_form"), FRAMERS)
@pytest.mark.parametrize("size", [1, 4096, 65536, 300_000])
def test_a_message_passes_both_ways(wired: Wired, framer: Any, wire_form: bytes, size: int) -> None:
    handler = Recorder(bytes.upper)
    client = wired.client(wired.listen(handler, framer=framer))
    client.sendall(xor(wire_form % (b"x" * size)))
    assert wired.read(client, len(wire_form % (b"x" * size))) == wire_form % (b"X" * size)
    assert handler.received() == b"x" * size


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_messages_come_together_however_the_wire_cuts_the_stream(wired: Wired, piece: int) -> None:
    wired.options["piece"] = piece
    handler = Recorder()
    client = wired.client(wired.listen(handler, framer=muxcore.Lines()))
    lines = [b"line %d" % i for i in range(300)]
    client.sendall(xor(b"".join(line + b"\n" for line in lines)))
    until(wired.mux, lambda: handler.count("message") == len(lines))
    assert handler.messages() == lines


def test_on_open_comes_when_the_wire_is_open(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler), greets=False)
    assert wired.read_raw(client, len(GREETING)) == GREETING
    assert handler.names() == []
    client.sendall(GREETING + xor(b"first"))
    until(wired.mux, lambda: handler.count("message"))
    assert handler.names() == ["open", "message"]


def test_a_greeting_that_comes_byte_by_byte_is_enough(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler), greets=False)
    for i in range(len(GREETING)):
        client.sendall(GREETING[i : i + 1])
        count = wired.mux.stats().bytes_in
        until(wired.mux, lambda count=count: wired.mux.stats().bytes_in > count or handler.count("open"))  # type: ignore[misc]
    until(wired.mux, lambda: handler.count("open"))


def test_a_failed_beginning_ends_the_connection_without_on_open(wired: Wired, caplog: pytest.LogCaptureFixture) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler), greets=False)
    client.sendall(b"GET / HTTP/1.0\r\n\r\n")
    assert wired.read_to_end(client) == GREETING + b"go away"
    client.close()
    until(wired.mux, lambda: handler.count("close"))
    assert handler.names() == ["close"]
    assert str(handler.reason()) == "no greeting"
    assert wired.mux.stats().handshake_failures == 1
    assert not caplog.records


def test_a_peer_that_leaves_before_the_wire_is_open_is_reported_at_once(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler), greets=False)
    client.shutdown(socket.SHUT_WR)
    until(wired.mux, lambda: handler.count("close"))
    assert handler.names() == ["close"]
    assert isinstance(handler.reason(), EOFError)


def test_a_wire_that_does_not_open_in_time_ends_the_connection(wired: Wired) -> None:
    handler = Recorder()
    wired.client(wired.listen(handler, timeouts=muxcore.Timeouts(handshake=0.05)), greets=False)
    until(wired.mux, lambda: handler.count("close"))
    reason = handler.reason()
    assert isinstance(reason, muxcore.HandshakeTimeout)
    assert reason.limit == 0.05
    assert wired.mux.stats().timeouts == wired.mux.stats().handshake_failures == 1


def test_the_timeout_of_the_beginning_ends_with_it(wired: Wired) -> None:
    handler = Recorder(bytes.upper)
    client = wired.client(wired.listen(handler, timeouts=muxcore.Timeouts(handshake=0.05)))
    until(wired.mux, lambda: handler.count("open"))
    later: list[bool] = []
    wired.mux.call_later(0.1, later.append, True)
    until(wired.mux, lambda: later)
    client.sendall(xor(b"still here"))
    assert wired.read(client, 10) == b"STILL HERE"


def test_output_before_the_wire_is_open_waits_for_it(wired: Wired) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    handler = Recorder()
    conn = wired.connect(listening.getsockname(), handler)
    conn.send(b"early ")
    server, _ = listening.accept()
    wired.clients += [listening, server]
    assert wired.read_raw(server, len(GREETING)) == GREETING
    conn.send(b"bird")
    server.sendall(GREETING)
    assert wired.read_raw(server, 10) == xor(b"early bird")
    assert handler.names() == ["open"]


def test_close_before_the_wire_is_open_still_sends_what_was_queued(wired: Wired) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    conn = wired.connect(listening.getsockname(), Recorder())
    conn.send(b"last words")
    conn.close()
    server, _ = listening.accept()
    wired.clients += [listening, server]
    assert wired.read_raw(server, len(GREETING)) == GREETING
    server.sendall(GREETING)
    assert wired.read_to_end(server) == xor(b"last words") + PARTING


def test_close_sends_all_and_then_what_the_wire_ends_with(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler))
    until(wired.mux, lambda: handler.count("open"))
    [conn] = handler.connections
    conn.send(b"x" * 3_000_000)
    conn.close()
    assert wired.read_to_end(client) == GREETING + xor(b"x" * 3_000_000) + PARTING
    client.close()
    until(wired.mux, lambda: handler.count("close"))
    assert handler.reason() is None


def test_write_eof_ends_the_wire_and_input_goes_on(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler, half_open=True))
    until(wired.mux, lambda: handler.count("open"))
    [conn] = handler.connections
    conn.send(b"out")
    conn.write_eof()
    assert wired.read_to_end(client) == GREETING + xor(b"out") + PARTING
    client.setblocking(True)
    client.sendall(xor(b"in"))
    until(wired.mux, lambda: handler.received() == b"in")


def test_the_end_of_the_wire_is_an_eof_before_the_sockets(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler))
    client.sendall(xor(b"all") + PARTING + b"ignored")
    assert wired.read_to_end(client) == GREETING + PARTING
    client.close()
    until(wired.mux, lambda: handler.count("close"))
    assert handler.received() == b"all"
    assert handler.reason() is None


def test_data_behind_the_end_of_the_wire_does_not_reset_the_last_output(wired: Wired) -> None:
    """Unread input makes close(2) send a RST, which can destroy output on its way (Promise close-loses-nothing)."""

    class Last(Recorder):
        def on_eof(self, conn: muxcore.Connection) -> None:
            conn.send(b"x" * 500_000)
            conn.close()

    client = wired.client(wired.listen(Last()))
    client.sendall(PARTING + b"ignored" * 1000)
    assert wired.read_to_end(client) == GREETING + xor(b"x" * 500_000) + PARTING


def test_a_reset_behind_the_end_of_the_wire_is_an_orderly_end(wired: Wired) -> None:
    """A peer that has sent its parting, and closes without reading ours."""
    handler = Recorder()
    client = wired.client(wired.listen(handler))
    client.sendall(xor(b"all") + PARTING)
    assert wired.read_to_end(client) == GREETING + PARTING
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    until(wired.mux, lambda: handler.count("close"))
    assert handler.reason() is None


def test_a_fin_without_the_end_of_the_wire_is_an_error_behind_the_input(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler, framer=muxcore.Lines()))
    client.sendall(xor(b"one\ntwo\n"))
    client.shutdown(socket.SHUT_WR)
    until(wired.mux, lambda: handler.count("close"))
    assert handler.messages() == [b"one", b"two"]
    assert isinstance(handler.reason(), EOFError)


@pytest.mark.parametrize("step", ["advance", "encrypt", "finish", "eof"])
def test_a_step_that_fails_ends_its_connection_alone(wired: Wired, step: str) -> None:
    handler = Recorder(bytes.upper)
    listener = wired.listen(handler)
    healthy = wired.client(listener)
    until(wired.mux, lambda: handler.count("open"))
    wired.options["fails"] = step
    client = wired.client(listener)
    until(wired.mux, lambda: len(wired.wires) == 2)
    client.sendall(xor(b"x"))
    client.shutdown(socket.SHUT_WR)
    until(wired.mux, lambda: handler.count("close"))
    assert isinstance(handler.reason(), OSError if step != "finish" else EOFError)
    healthy.sendall(xor(b"fine"))
    assert wired.read(healthy, 4) == b"FINE"


def test_what_is_sent_while_the_wire_works_comes_behind(wired: Wired) -> None:
    handler = Recorder(bytes.upper)
    client = wired.client(wired.listen(handler))
    until(wired.mux, lambda: handler.count("open"))
    [conn] = handler.connections
    left = ["b", "c"]
    wired.wires[0].hook = lambda name: conn.send(left.pop().encode()) and None if name == "encrypt" and left else None
    conn.send(b"a")
    assert wired.read(client, 3) == b"acb"


@pytest.mark.parametrize("action", ["abort", "close", "flush", "pause_reading"])
@pytest.mark.parametrize("step", ["advance", "encrypt", "finish"])
def test_a_step_may_do_anything_to_its_connection(wired: Wired, action: str, step: str) -> None:
    handler = Recorder(bytes.upper)
    client = wired.client(wired.listen(handler))
    until(wired.mux, lambda: handler.count("open"))
    [conn] = handler.connections
    wired.wires[0].hook = lambda name: getattr(conn, action)() if name == step else None
    client.sendall(xor(b"some input"))
    count = wired.mux.stats().bytes_in
    until(wired.mux, lambda: wired.mux.stats().bytes_in > count or conn.closed)
    conn.send(b"output")
    conn.close()
    client.close()
    until(wired.mux, lambda: conn.closed)
    assert handler.count("close") == 1


@pytest.mark.parametrize("step", ["advance", "encrypt"])
def test_an_interrupt_in_a_step_loses_and_doubles_nothing(wired: Wired, step: str) -> None:
    handler = Recorder(bytes.upper)
    client = wired.client(wired.listen(handler, framer=muxcore.Lines()))
    until(wired.mux, lambda: handler.count("open"))
    armed = [step]

    def interrupt(name: str) -> None:
        if armed == [name]:
            armed.clear()
            raise KeyboardInterrupt

    wired.wires[0].hook = interrupt
    client.sendall(xor(b"one\ntwo\n"))
    with pytest.raises(KeyboardInterrupt):
        until(wired.mux, lambda: not armed)
    assert wired.read(client, 8) == b"ONE\nTWO\n"
    assert handler.messages() == [b"one", b"two"]


def test_pull_style_has_opened_readable_and_closed(wired: Wired) -> None:
    client = wired.client(wired.listen(None, framer=muxcore.Lines()))
    client.sendall(xor(b"one\ntwo\n") + PARTING)
    seen = muxcore.Report(0)
    messages: list[bytes] = []
    client.settimeout(5)

    def ended() -> bool:
        nonlocal seen
        for conn, report in wired.mux.poll(0.01):
            seen |= report
            messages.extend(conn.recv_all())
            if report & muxcore.EOF:
                conn.close()
                client.close()
        return bool(seen & muxcore.CLOSED)

    for _ in range(1000):
        if ended():
            break
    assert seen == muxcore.OPENED | muxcore.READABLE | muxcore.EOF | muxcore.CLOSED
    assert messages == [b"one", b"two"]


def test_a_paused_connection_is_not_read(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler, framer=muxcore.Lines()))
    until(wired.mux, lambda: handler.count("open"))
    [conn] = handler.connections
    conn.pause_reading()
    wired.mux.poll(0)
    client.sendall(xor(b"one\n"))
    for _ in range(20):
        wired.mux.poll(0.001)
    assert handler.messages() == []
    conn.resume_reading()
    until(wired.mux, lambda: handler.messages() == [b"one"])


def test_a_file_passes_the_wire(wired: Wired, tmp_path: Any) -> None:
    path = tmp_path / "file"
    data = bytes(range(256)) * 4000
    path.write_bytes(data)
    handler = Recorder()
    client = wired.client(wired.listen(handler))
    until(wired.mux, lambda: handler.count("open"))
    [conn] = handler.connections
    with path.open("rb") as file:
        conn.send(b"before ")
        conn.sendfile(file)
        conn.send(b" after")
    assert wired.read(client, len(data) + 13) == b"before " + data + b" after"


def test_a_slow_peer_meets_the_water_marks(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler))
    until(wired.mux, lambda: handler.count("open"))
    [conn] = handler.connections
    sent = 0
    while conn.send(b"x" * 50_000):
        sent += 50_000
    sent += 50_000
    assert conn.outbox_size > conn.limits.high
    assert wired.read(client, sent) == b"x" * sent
    until(wired.mux, lambda: handler.count("drain"))
    assert conn.outbox_size == 0


def test_a_wired_connection_cannot_be_detached(wired: Wired) -> None:
    handler = Recorder()
    wired.client(wired.listen(handler))
    until(wired.mux, lambda: handler.count("open"))
    with pytest.raises(RuntimeError, match="detach: a connection with TLS cannot be detached"):
        handler.connections[0].detach()


def test_the_mux_closes_with_the_end_of_the_wire(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with muxcore.Mux(backend=backend) as mux:
        wired = Wired(mux, monkeypatch)
        handler = Recorder()
        client = wired.client(wired.listen(handler))
        until(mux, lambda: handler.count("open"))
        handler.connections[0].send(b"last")
    client.setblocking(True)
    got = b""
    while data := client.recv(100):
        got += data
    client.close()
    assert got == GREETING + xor(b"last") + PARTING


# --- what an attack has found ----------------------------------------------------------------------


@pytest.mark.parametrize("autopause", [True, False])
def test_what_a_wire_sends_for_itself_counts_for_the_bounds(wired: Wired, autopause: bool) -> None:
    """As replies to changes of keys do: a peer that causes them and reads nothing uses no more memory than another."""
    limits = muxcore.Limits(high=10_000, low=1000, max_outbox=100_000, autopause=autopause)
    handler = Recorder()
    client = wired.client(wired.listen(handler, limits=limits))
    until(wired.mux, lambda: handler.count("open"))
    [wire], [conn] = wired.wires, handler.connections
    wire.hook = lambda name: wire.output.append(bytes(500_000)) if name == "advance" else None
    client.setblocking(False)
    for _ in range(200):
        try:
            client.send(b"x")
        except OSError:
            break
        wired.mux.poll(0.001)
    if autopause:
        assert not conn.is_reading()
        assert len(wire.calls) < 20
    else:
        until(wired.mux, lambda: handler.count("close"))
        assert isinstance(handler.reason(), muxcore.OutboxFull)


def test_output_before_start_tls_is_plaintext_also_before_on_open(wired: Wired) -> None:
    ours, theirs = socket.socketpair()
    wired.clients.append(theirs)
    conn = wired.mux.attach(ours, Recorder())
    conn.send(b"STARTTLS ")
    wires.begin(conn, Xor())
    conn.send(b"secret")
    theirs.sendall(GREETING)
    expected = b"STARTTLS " + GREETING + xor(b"secret")
    assert wired.read_raw(theirs, len(expected)) == expected


class Held:
    """A framer that keeps what it has not handed out."""

    def __init__(self) -> None:
        self.buffer = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.buffer += data
        while b"|" in self.buffer:
            message, self.buffer = self.buffer.split(b"|", 1)
            yield message

    def encode(self, message: bytes) -> bytes:
        return message

    def rest(self) -> bytes:
        return self.buffer


def test_what_a_users_framer_holds_back_is_the_wires(wired: Wired) -> None:
    class Starter(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            if message == b"start":
                wires.begin(conn, Xor())

    handler = Starter()
    listener = wired.mux.listen(("127.0.0.1", 0), handler, framer=Held)
    client = wired.client(listener, greets=False)
    client.sendall(b"start|" + GREETING + xor(b"first|second|"))
    until(wired.mux, lambda: handler.count("message") == 3)
    assert handler.messages() == [b"start", b"first", b"second"]


def test_write_eof_before_the_wire_is_open_waits_for_it(wired: Wired) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    conn = wired.connect(listening.getsockname(), Recorder(), half_open=True)
    conn.write_eof()
    server, _ = listening.accept()
    wired.clients += [listening, server]
    assert wired.read_raw(server, len(GREETING)) == GREETING
    server.sendall(GREETING)
    assert wired.read_to_end(server) == PARTING


@pytest.mark.parametrize("ends", [True, False])
def test_close_amid_the_beginning_ends_with_the_peer_or_in_time(wired: Wired, ends: bool) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    handler = Recorder()
    conn = wired.connect(listening.getsockname(), handler, timeouts=muxcore.Timeouts(handshake=0.2 if not ends else 60))
    conn.send(b"queued")
    conn.close()
    server, _ = listening.accept()
    wired.clients += [listening, server]
    assert wired.read_raw(server, len(GREETING)) == GREETING
    if ends:
        server.shutdown(socket.SHUT_WR)
    until(wired.mux, lambda: handler.count("close"))
    assert isinstance(handler.reason(), EOFError if ends else muxcore.HandshakeTimeout)
    assert wired.mux.stats().handshake_failures == 1


def test_a_reset_amid_the_beginning_is_counted(wired: Wired) -> None:
    handler = Recorder()
    client = wired.client(wired.listen(handler), greets=False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(wired.mux, lambda: wired.wires)
    client.close()
    until(wired.mux, lambda: handler.count("close"))
    assert wired.mux.stats().handshake_failures == 1


def test_an_idle_timeout_does_not_count_before_the_wire_is_open(wired: Wired) -> None:
    handler = Recorder()
    wired.client(wired.listen(handler, timeouts=muxcore.Timeouts(idle=0.05, handshake=0.3)), greets=False)
    until(wired.mux, lambda: handler.count("close"))
    assert isinstance(handler.reason(), muxcore.HandshakeTimeout)


@pytest.mark.parametrize("style", ["fast", "slow", "pull"])
def test_messages_in_front_of_a_failure_are_all_delivered(wired: Wired, style: str) -> None:
    class Slow(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            time.sleep(0.001 if style == "slow" else 0)  # longer than a part of a turn, all together

    handler = Slow()
    client = wired.client(wired.listen(None if style == "pull" else handler, framer=muxcore.Lines()))
    lines = [b"line %d" % i for i in range(50)]
    messages: list[bytes] = []
    opened: list[muxcore.Connection] = []

    def turned(condition: Callable[[], object]) -> None:
        for _ in range(1000):
            for conn, report in wired.mux.poll(0.01):
                opened.extend([conn] * bool(report & muxcore.OPENED))
                messages.extend(conn.recv_all())
            if condition():
                return
        raise AssertionError("the condition never came true")

    turned(lambda: opened or handler.connections)
    [conn] = opened or handler.connections
    [wire] = wired.wires

    def fail_behind_messages(name: str) -> None:
        wire.plain.append(b"".join(line + b"\n" for line in lines))
        raise ValueError("broken")

    wire.hook = fail_behind_messages
    client.sendall(b"anything")
    turned(lambda: conn.closing)
    assert messages + handler.messages() == lines
    assert str(conn.error) == "broken"


def test_an_interrupt_in_a_handler_does_not_lose_the_end_behind_its_message(wired: Wired) -> None:
    class Interrupted(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            raise KeyboardInterrupt

    handler = Interrupted()
    client = wired.client(wired.listen(handler, framer=muxcore.Lines()))
    client.sendall(xor(b"one\n") + PARTING)
    with pytest.raises(KeyboardInterrupt):
        until(wired.mux, lambda: False)
    client.close()
    until(wired.mux, lambda: handler.count("close"))
    assert handler.messages() == [b"one"]


def test_what_a_wire_replies_after_the_end_of_our_side_is_dropped(wired: Wired) -> None:
    """As OpenSSL does to a change of keys: the socket would break, and what the peer sends next be lost."""

    class Ending(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            conn.write_eof()

    handler = Ending()
    options = {"half_open": True, "timeouts": muxcore.Timeouts(linger=0.05)}
    client = wired.client(wired.listen(handler, framer=muxcore.Lines(), **options))
    client.sendall(xor(b"one\n"))
    assert wired.read_to_end(client) == GREETING + PARTING
    [wire] = wired.wires
    for count in (2, 3):
        wire.pending = [b"a reply"]
        client.sendall(xor(b"more\n"))
        until(wired.mux, lambda count=count: handler.count("message") == count)  # type: ignore[misc]
    handler.connections[0].close()
    until(wired.mux, lambda: handler.count("close"))
    assert handler.reason() is None
