"""What may live here: timeouts of connections (Promise timeouts): idle, write stall, and TCP's own. Linger is with
close(), in test_connection.py."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from support import LOCALHOST, Recorder, client, exchange, receive, settle, stuff, turns, until

import muxcore
from muxcore import Delimiter, Fixed, LengthPrefix, Lines, Resp, Timeouts

Listen = Callable[..., muxcore.Listener]
IDLE = 0.2
MUCH = 1 << 20  # bytes; more than a dripping peer gets to send


class Words:
    """A framer of a user: words that end with a space."""

    def __init__(self) -> None:
        self.left = b""

    def feed(self, data: bytes) -> Iterable[bytes]:
        *words, self.left = (self.left + data).split(b" ")
        return words

    def encode(self, message: bytes) -> bytes:
        return message + b" "

    def rest(self) -> bytes:
        return self.left


def drip(sock: socket.socket, byte: bytes) -> bool:
    """Send one byte; False once the connection is gone."""
    try:
        sock.sendall(byte)
    except OSError:
        return False
    return True


# --- idle ------------------------------------------------------------------------------------------


def test_an_idle_connection_ends_with_idle_timeout(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder, timeouts=Timeouts(idle=0.1))) as sock:
        assert receive(mux, sock) == b""
    until(mux, lambda: recorder.count("close"))
    reason = recorder.reason()
    assert isinstance(reason, muxcore.IdleTimeout)
    assert reason.limit == 0.1
    assert mux.stats().timeouts == 1


def test_an_idle_timeout_is_never_early(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder, timeouts=Timeouts(idle=IDLE))) as sock:
        until(mux, lambda: recorder.connections)
        sent = time.monotonic()
        sock.sendall(b"x")
        until(mux, lambda: recorder.connections[0].closing)
        assert time.monotonic() - sent >= IDLE


def test_messages_keep_a_connection_however_they_are_received(mux: muxcore.Mux, listen: Listen) -> None:
    """One by one, in lists, and in pull style by each of its three ways; with a framer and without."""

    class Batches(muxcore.Handler):
        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            pass

    receives: list[Callable[[Any], object]] = [lambda conn: conn.recv(), lambda conn: conn.recv_all(), list]
    listeners = [
        listen(handler, framer=framer, timeouts=Timeouts(idle=0.6))
        for framer in (None, Lines()) for handler in (Recorder(), Batches(), None, None, None)
    ]
    socks = [client(listener) for listener in listeners]
    until(mux, lambda: len(mux.connections) == len(socks))
    pulled = [
        (conn, recv)
        for listener, recv in zip(listeners, (None, None, *receives) * 2, strict=True) if recv is not None
        for conn in mux.connections if conn.listener is listener
    ]
    assert len(pulled) == 6
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        for sock in socks:
            sock.sendall(b"x\n")
        turns(mux, 0.02)
        for conn, recv in pulled:
            recv(conn)
        turns(mux, 0.02)  # a look at the timeouts while there is no message: then the time of the last counts
    assert [conn.error for conn in mux.connections] == [None] * 10
    assert mux.stats().timeouts == 0
    for sock in socks:
        sock.close()


def test_messages_keep_a_connection(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder(reply=lambda message: message)
    with client(listen(recorder, timeouts=Timeouts(idle=1.0))) as sock:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert exchange(mux, sock, b"x") == b"x"
            turns(mux, 0.02)
        assert recorder.count("close") == 0


@pytest.mark.parametrize(
    ("framer", "style", "begin"),
    [
        (Lines(MUCH), "message", b"x"),
        (Lines(MUCH), "batch", b"x"),
        (Lines(MUCH), "pull", b"x"),
        (Delimiter(b";;", max_size=MUCH), "message", b"x"),
        (LengthPrefix(4), "message", b"\x00\x0f\xff\xff"),
        (LengthPrefix("varint"), "message", b"\xff\xff\x3f"),
        (Fixed(MUCH), "message", b"x"),
        (Resp(), "message", b"*1\r\n$1000000\r\n"),
        (Words, "message", b"x"),
        (Words, "pull", b"x"),
    ],
    ids=repr,
)
def test_a_slowloris_ends_with_idle_timeout(
    mux: muxcore.Mux, listen: Listen, framer: Any, style: str, begin: bytes
) -> None:
    """The pieces of an unfinished message do not keep its connection."""
    recorder = Recorder()
    if style == "batch":
        recorder.on_messages = lambda conn, messages: None  # type: ignore[attr-defined]
    handler = None if style == "pull" else recorder
    listener = listen(handler, framer=framer, timeouts=Timeouts(idle=IDLE, linger=0))
    with client(listener) as sock:
        sock.sendall(begin)
        ended: list[BaseException | None] = []
        deadline = time.monotonic() + 20
        while not ended:
            assert time.monotonic() < deadline, "it could stay"
            drip(sock, b"x")
            ended += [conn.error for conn, flags in mux.poll(0.01) if flags & muxcore.CLOSED]
            ended += [reason for name, _, reason in recorder.events if name == "close"]
    assert isinstance(ended[0], muxcore.IdleTimeout)


def test_a_connection_that_is_paused_is_not_idle_and_gets_its_time_again(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder, timeouts=Timeouts(idle=IDLE))):
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        conn.pause_reading()
        turns(mux, 2 * IDLE)
        assert not conn.closing
        resumed = time.monotonic()
        conn.resume_reading()
        until(mux, lambda: conn.closing)
        assert time.monotonic() - resumed >= IDLE


def test_a_connection_held_back_by_its_own_output_is_not_idle(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder(reply=lambda message: message)
    with client(listen(recorder, timeouts=Timeouts(idle=IDLE))) as sock:
        sent = stuff(mux, sock)
        turns(mux, 2 * IDLE)
        assert recorder.count("close") == 0
        assert len(receive(mux, sock, sent)) == sent


def test_a_connection_whose_output_has_drained_gets_its_time_again(mux: muxcore.Mux, listen: Listen) -> None:
    """Until then it was not listened to."""
    drained: list[float] = []
    recorder = Recorder()
    recorder.on_drain = lambda conn: drained.append(time.monotonic())  # type: ignore[method-assign]
    with client(listen(recorder, timeouts=Timeouts(idle=IDLE, linger=0))) as sock:
        until(mux, lambda: recorder.connections)
        recorder.connections[0].send(bytes(8 << 20))
        turns(mux, 2 * IDLE)
        receive(mux, sock, 8 << 20)
        until(mux, lambda: recorder.count("close"))
    assert time.monotonic() - drained[0] >= IDLE / 2  # the clock that counts is that of the turn


@pytest.mark.parametrize("framer", [None, Lines(), Words], ids=repr)
def test_a_connection_with_unread_messages_is_not_idle(mux: muxcore.Mux, listen: Listen, framer: Any) -> None:
    """Promise timeouts: our user is slow, not the peer."""
    with client(listen(framer=framer, timeouts=Timeouts(idle=IDLE))) as sock:
        sock.sendall(b"word \n")
        until(mux, lambda: list(mux.connections))
        [conn] = mux.connections
        until(mux, lambda: conn.inbox_size)
        turns(mux, 2 * IDLE)
        assert not conn.closing
        assert list(conn) != []
        until(mux, lambda: conn.closing)


@pytest.mark.parametrize("recv", ["recv", "recv_all"])
def test_a_peer_whose_message_is_read_late_has_its_time_from_then(mux: muxcore.Mux, listen: Listen, recv: str) -> None:
    """However long the Mux has not turned before that."""
    with client(listen(timeouts=Timeouts(idle=IDLE))) as sock:
        sock.sendall(b"x")
        until(mux, lambda: mux.stats().bytes_in)
        [conn] = mux.connections
        end = time.monotonic() + 2 * IDLE
        while time.monotonic() < end:
            pass
        received = time.monotonic()
        assert getattr(conn, recv)() in (b"x", [b"x"])
        until(mux, lambda: conn.closing)
        assert time.monotonic() - received >= IDLE


def test_what_was_accepted_goes_out_before_an_idle_timeout_ends_it(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise timeouts: it closes as close() does."""
    recorder = Recorder(reply=lambda message: bytes(1 << 20))
    limits = muxcore.Limits(autopause=False)
    with client(listen(recorder, limits=limits, timeouts=Timeouts(idle=0.05, linger=0)), rcvbuf=4096) as sock:
        sock.sendall(b"x")
        until(mux, lambda: recorder.connections and recorder.connections[0].closing)
        assert len(receive(mux, sock)) == 1 << 20
        until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.IdleTimeout)


def test_timeouts_of_one_connection_can_be_changed(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    listener = listen(recorder, timeouts=Timeouts(idle=IDLE))
    with client(listener) as kept, client(listener) as ended:
        until(mux, lambda: len(recorder.connections) == 2)
        [one] = [conn for conn in recorder.connections if conn.peer == kept.getsockname()]
        one.set_timeouts(idle=None)
        assert receive(mux, ended) == b""
        turns(mux, 2 * IDLE)
        assert not one.closing
        one.timeouts = Timeouts(idle=0.05)
        assert receive(mux, kept) == b""


def test_each_listener_has_its_own_timeouts(mux: muxcore.Mux, listen: Listen) -> None:
    patient, hasty = Recorder(), Recorder()
    with client(listen(patient)), client(listen(hasty, timeouts=Timeouts(idle=0.05, linger=0))):
        until(mux, lambda: hasty.count("close"))
        assert patient.names() == ["open"]


def test_a_long_timeout_does_not_make_a_short_one_late(mux: muxcore.Mux, listen: Listen) -> None:
    hasty, later = Recorder(), []
    with client(listen(hasty, timeouts=Timeouts(idle=0.05, linger=0))):
        until(mux, lambda: hasty.connections)
        listen(Recorder(), timeouts=Timeouts(idle=1000))
        turns(mux, 0.03)
        mux.call_later(0.6, later.append, 1)
        until(mux, lambda: hasty.count("close"))
    assert later == []


def test_no_connection_needs_a_timer_of_its_own(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    listener = listen(recorder, timeouts=Timeouts(idle=60, write=60))
    clients = [client(listener) for _ in range(50)]
    until(mux, lambda: len(recorder.connections) == 50)
    for sock in clients:
        sock.sendall(b"x")
    until(mux, lambda: recorder.count("message") == 50)
    for conn in recorder.connections:
        conn.set_timeouts(idle=50)
    assert len(mux._timers.heap) == 1
    for sock in clients:
        sock.close()


# --- write -----------------------------------------------------------------------------------------


def test_a_peer_that_reads_nothing_ends_with_write_timeout(mux: muxcore.Mux, listen: Listen) -> None:
    """Its window is zero: TCP alone would probe it for ever."""
    recorder = Recorder(reply=lambda message: message)
    sock = client(listen(recorder))
    stuff(mux, sock)
    recorder.connections[0].set_timeouts(write=0.1)  # not before: on a busy machine that would be over meanwhile
    until(mux, lambda: recorder.count("close"))
    reason = recorder.reason()
    assert isinstance(reason, muxcore.WriteTimeout)
    assert reason.limit == 0.1
    assert mux.stats().timeouts == 1
    sock.close()


def test_a_stall_begins_with_its_send_however_long_ago_the_last_turn_was(mux: muxcore.Mux) -> None:
    """What is above `high` goes out at once, also between two polls."""
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder, timeouts=Timeouts(write=0.2))
    mux.poll(0)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    start = time.monotonic()
    conn.send(bytes(4 << 20))
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.WriteTimeout)
    assert time.monotonic() - start >= 0.2
    theirs.close()


def test_a_peer_that_reads_a_little_now_and_then_is_no_write_stall(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder, timeouts=Timeouts(write=1.0)), rcvbuf=8192) as sock:
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # or the kernel would accept too much at once
        total = 4 << 20
        conn.write(bytes(total))
        got, end = 0, time.monotonic() + 2.0
        while time.monotonic() < end:
            turns(mux, 0.02)
            got += len(sock.recv(1 << 14))
        assert conn.outbox_size > 0
        assert not conn.closing
        got += len(receive(mux, sock, total - got))
        assert got == total


def test_a_closing_connection_that_stalls_ends_with_write_timeout(mux: muxcore.Mux, listen: Listen) -> None:
    """Promise close-loses-nothing: the flush of close() is bounded by the same timeout."""
    recorder = Recorder()
    with client(listen(recorder, timeouts=Timeouts(write=0.1)), rcvbuf=4096):
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        conn.send(bytes(8 << 20))
        conn.close()
        until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.WriteTimeout)


# --- TCP's own -------------------------------------------------------------------------------------


@pytest.fixture
def accepted(mux: muxcore.Mux, listen: Listen) -> Iterator[Callable[..., muxcore.Connection]]:
    """Accept a connection of a listener with these options."""
    clients = []

    def accept(**options: Any) -> muxcore.Connection:
        recorder = Recorder()
        clients.append(client(listen(recorder, **options)))
        until(mux, lambda: recorder.connections)
        return recorder.connections[0]

    yield accept
    for sock in clients:
        sock.close()


@pytest.mark.linux_only("TCP_USER_TIMEOUT")
def test_user_timeout_reaches_accepted_sockets(accepted: Callable[..., muxcore.Connection]) -> None:
    conn = accepted(user_timeout=1.5)
    assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500


@pytest.mark.linux_only("TCP_USER_TIMEOUT")
def test_user_timeout_reaches_attached_sockets(mux: muxcore.Mux) -> None:
    with socket.create_server(LOCALHOST) as server, socket.create_connection(server.getsockname()) as sock:
        conn = mux.attach(server.accept()[0], Recorder(), user_timeout=0.0001)
        assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1  # rounded up: 0 would be none
        sock.close()


@pytest.mark.unix_only("Unix sockets")
def test_tcp_options_leave_unix_sockets_alone(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        mux.attach(ours, lambda conn, message: conn.send(message), keepalive=5)
        assert exchange(mux, theirs, b"x") == b"x"


@pytest.mark.linux_only("TCP_USER_TIMEOUT")
def test_user_timeout_ends_a_peer_that_reads_nothing(mux: muxcore.Mux, listen: Listen) -> None:
    """The kernel reports ETIMEDOUT, which needs no timeout of ours."""
    recorder = Recorder()
    with client(listen(recorder, user_timeout=0.3), rcvbuf=4096):
        until(mux, lambda: recorder.connections)
        recorder.connections[0].send(bytes(8 << 20))
        until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), TimeoutError)
    assert not isinstance(recorder.reason(), muxcore.MuxError)


def test_user_timeout_is_refused_where_it_does_not_exist(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    with pytest.raises(ValueError, match="user_timeout must be None"):
        listen(Recorder(), user_timeout=1)


# --- silence ---------------------------------------------------------------------------------------


def test_a_silent_connection_that_owes_nothing_is_not_reset(mux: muxcore.Mux, listen: Listen) -> None:
    with client(listen(Recorder(), timeouts=Timeouts(silence=0.1))) as sock:
        assert receive(mux, sock) == b""
    assert mux.stats().timeouts == 1


# --- silence ---------------------------------------------------------------------------------------


def test_a_paused_connection_is_not_silent(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder, timeouts=Timeouts(silence=0.1))):
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        conn.pause_reading()
        turns(mux, 0.3)
        assert not conn.closing


def test_the_shortest_timeout_is_looked_at_as_often_as_it_needs(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    mux.attach(ours, Recorder(), timeouts=Timeouts(idle=0.4, write=60, silence=60))
    assert mux._timers.next_ns() - time.monotonic_ns() <= 100_000_000
    theirs.close()


def test_a_connection_that_has_come_about_late_is_not_idle_yet(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    with socket.create_server(LOCALHOST) as server:
        conn = mux.connect(server.getsockname(), recorder, timeouts=Timeouts(idle=IDLE))
        end = time.monotonic() + 2 * IDLE
        while time.monotonic() < end:
            pass
        until(mux, lambda: recorder.connections)
        opened = time.monotonic()
        until(mux, lambda: conn.closing)
        assert time.monotonic() - opened > IDLE / 2
        server.accept()[0].close()


# --- against mutants that survived (tests/mutants) ------------------------------------------------------


def test_a_write_timeout_is_for_what_waits_to_be_sent(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder(reply=lambda message: message)
    with client(listen(recorder, timeouts=Timeouts(write=0.05))) as sock:
        assert exchange(mux, sock, b"x") == b"x"
        turns(mux, 0.2)
        assert not recorder.connections[0].closing


def test_a_silent_peer_that_reads_nothing_is_reset_though_reading_is_paused(mux: muxcore.Mux) -> None:
    """Above `high` it is not."""
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder, timeouts=Timeouts(silence=0.1))
    mux.poll(0)
    conn.send(bytes(8 << 20))
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.IdleTimeout)
    theirs.close()


def test_a_connection_with_unread_messages_is_not_silent(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, timeouts=Timeouts(silence=0.1))
    theirs.sendall(b"x")
    turns(mux, 0.3)
    assert (conn.closing, conn.recv()) == (False, b"x")
    until(mux, lambda: conn.closing)
    theirs.close()


def test_a_short_timeout_behind_a_long_one_is_looked_at_in_time(mux: muxcore.Mux, listen: Listen) -> None:
    listen(Recorder(), timeouts=Timeouts(idle=1000))
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder(), timeouts=Timeouts(idle=0.4))
    assert mux._timers.next_ns() - time.monotonic_ns() <= 100_000_000
    conn.set_timeouts(idle=0.2)
    assert mux._timers.next_ns() - time.monotonic_ns() <= 50_000_000
    theirs.close()


def test_a_sweep_that_a_shorter_one_has_replaced_is_not_repeated(mux: muxcore.Mux, listen: Listen) -> None:
    for idle in (0.08, 0.04, 0.02):
        listen(Recorder(), timeouts=Timeouts(idle=idle))
    turns(mux, 0.05)
    assert len(mux._timers.heap) == 1


def test_a_connection_is_not_idle_for_the_wait_that_it_has_ended(mux: muxcore.Mux, listen: Listen) -> None:
    began: list[float] = []
    recorder = Recorder()
    listener = listen(recorder, timeouts=Timeouts(idle=0.8, linger=0))
    socks: list[socket.socket] = []

    def connects() -> None:
        began.append(time.monotonic())
        socks.append(client(listener))

    mux.poll(0)
    late = threading.Timer(0.15, connects)  # the sweeps, each 0.2 s, end a wait, too
    late.start()
    while not recorder.count("close"):
        mux.poll(5)
    assert time.monotonic() - began[0] >= 0.8
    late.join()
    socks[0].close()


@pytest.mark.unix_only("Unix sockets")
@pytest.mark.parametrize("what", ["send", "flush", "sendfile"])
def test_a_write_timeout_is_never_early(mux: muxcore.Mux, what: str) -> None:
    """Its time begins when the outbox has to wait, and not with the last send before that, or the last turn."""
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    if what != "sendfile":
        with pytest.raises(BlockingIOError):
            while True:
                ours.send(bytes(1000))
    conn = mux.attach(ours, recorder, timeouts=Timeouts(write=IDLE))
    mux.poll(0)
    time.sleep(IDLE)
    began = time.monotonic()
    if what == "sendfile":
        with tempfile.TemporaryFile() as file:
            file.truncate(1 << 20)
            conn.sendfile(file)
    else:
        conn.send(b"x")
    if what == "flush":
        conn.flush()
    until(mux, lambda: recorder.count("close"))
    assert time.monotonic() - began >= IDLE
    assert isinstance(recorder.reason(), muxcore.WriteTimeout)
    theirs.close()


def test_a_write_timeout_begins_with_the_flush(mux: muxcore.Mux, listen: Listen) -> None:
    """It begins with flush(), however long the Mux has not turned before that."""
    recorder = Recorder()
    sock = client(listen(recorder, timeouts=Timeouts(write=IDLE)))
    until(mux, lambda: recorder.connections)
    [conn] = recorder.connections
    end = time.monotonic() + 2 * IDLE
    while time.monotonic() < end:
        pass
    conn.send(bytes(12 << 20))
    before = time.monotonic()
    conn.flush()
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.WriteTimeout)
    assert time.monotonic() - before >= IDLE
    sock.close()


def test_input_does_not_put_off_a_write_timeout(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder, timeouts=Timeouts(write=IDLE), limits=muxcore.Limits(autopause=False))
    conn.send(bytes(12 << 20))
    deadline = time.monotonic() + 5
    while not recorder.count("close"):
        assert time.monotonic() < deadline
        drip(theirs, b"x")
        mux.poll(0.02)
    assert isinstance(recorder.reason(), muxcore.WriteTimeout)
    theirs.close()


@pytest.mark.parametrize("which", ["write", "linger"])
def test_a_shorter_timeout_is_for_a_connection_that_closes_already_too(mux: muxcore.Mux, which: str) -> None:
    recorder = Recorder()
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder, timeouts=Timeouts(write=25.0, linger=25.0))
    conn.send(bytes(12 << 20) if which == "write" else b"goodbye")
    conn.close()
    turns(mux, 0.05)
    assert (conn.closing, conn.closed) == (True, False)
    conn.set_timeouts(**{which: IDLE})
    until(mux, lambda: recorder.count("close"), 10)
    assert (type(recorder.reason()) is muxcore.WriteTimeout) == (which == "write")
    theirs.close()


# --- a loop that was held up -------------------------------------------------------------------------


def held_up(mux: muxcore.Mux, meanwhile: Callable[[], object], seconds: float = 0.3) -> None:
    """Turn the Mux, with a slow call, during which something happens. When it returns, timers are due."""

    def call() -> None:
        meanwhile()
        time.sleep(seconds)

    mux.call_soon(call)
    for _ in range(8):
        mux.poll(0.002)


@pytest.mark.parametrize("which", ["idle", "silence"])
def test_a_peer_whose_message_has_come_while_the_loop_was_held_up_is_not_idle(mux: muxcore.Mux, which: str) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder := Recorder(), timeouts=Timeouts(**{which: 0.1}))
    mux.poll(0)
    held_up(mux, lambda: theirs.send(b"here"))
    assert recorder.names() == ["open", "message"]
    until(mux, lambda: conn.closed)
    assert isinstance(recorder.reason(), muxcore.IdleTimeout)
    theirs.close()


def test_a_peer_whose_message_was_not_handled_yet_is_not_idle(mux: muxcore.Mux) -> None:
    """The kernel has reported it, and the handlers of others were slow."""
    recorder = Recorder(reply=lambda message: time.sleep(0.02) or message)
    pairs = [socket.socketpair() for _ in range(20)]
    for ours, _ in pairs:
        mux.attach(ours, recorder, timeouts=Timeouts(idle=0.1))
    settle(mux)
    for _, theirs in pairs:
        theirs.send(b"x")
    until(mux, lambda: recorder.count("close"))
    assert recorder.names()[:40] == ["open"] * 20 + ["message"] * 20
    for _, theirs in pairs:
        theirs.close()


@pytest.mark.parametrize("closing", [False, True])
def test_a_peer_that_has_read_while_the_loop_was_held_up_is_no_write_stall(mux: muxcore.Mux, closing: bool) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder := Recorder(), timeouts=Timeouts(write=0.2))
    mux.poll(0)
    conn.send(bytes(4 << 20))
    if closing:
        conn.close()
    mux.poll(0)
    theirs.setblocking(False)
    got = 0

    def read() -> None:
        nonlocal got
        try:
            while True:
                got += len(theirs.recv(1 << 16))
        except BlockingIOError:
            pass

    held_up(mux, read)
    assert recorder.count("close") == 0
    theirs.setblocking(True)
    assert got + len(receive(mux, theirs, (4 << 20) - got)) == 4 << 20
    theirs.close()


@pytest.mark.parametrize("between_polls", [False, True])
def test_a_connect_that_has_come_about_while_the_loop_was_held_up_is_no_timeout(
    mux: muxcore.Mux, between_polls: bool
) -> None:
    recorder = Recorder()
    mux.poll(0)
    with socket.create_server(LOCALHOST) as server:

        def connect() -> None:
            mux.connect(server.getsockname(), recorder, timeouts=Timeouts(connect=0.2))

        if between_polls:
            connect()
            time.sleep(0.3)
        else:
            held_up(mux, connect)
        until(mux, lambda: recorder.events)
        assert recorder.names() == ["open"]


def test_a_handshake_that_has_come_about_while_the_loop_was_held_up_is_no_timeout(
    mux: muxcore.Mux, listen: Listen
) -> None:
    listener = listen(recorder := Recorder(), proxy_protocol=["127.0.0.0/8"], timeouts=Timeouts(handshake=0.2))
    with client(listener) as sock:
        until(mux, lambda: mux.stats().accepts)
        held_up(mux, lambda: sock.sendall(b"PROXY UNKNOWN\r\n"))
        assert recorder.names() == ["open"]
    with client(listener) as sock:
        until(mux, lambda: mux.stats().handshake_failures)
        assert recorder.count("open") == 1
