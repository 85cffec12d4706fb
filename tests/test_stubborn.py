"""Arguments, errors and signals with a mind of their own, and slow callbacks: each once broke something."""

from __future__ import annotations

import os
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
from support import DEADLINE, LOCALHOST, Recorder, client, receive, until
from test_soundness import Batches, Listen, Words, attached

import muxcore
from muxcore import Delimiter, LengthPrefix, Lines, Resp

# --- arguments with a mind of their own ---------------------------------------------------------------------


class Liar(int):
    """An int that equals anything at the first comparison, and is never below or above anything."""

    compared = False

    def __eq__(self, other: object) -> bool:
        result, self.compared = not self.compared, True
        return result

    def __lt__(self, other: object) -> bool:
        return False

    __gt__ = __lt__

    def __hash__(self) -> int:
        return 0


class LateLiar(float):
    def __lt__(self, other: object) -> bool:
        return True

    __le__ = __gt__ = __ge__ = __lt__


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LengthPrefix(Liar(2000)), "size"),  # type: ignore[arg-type]
        (lambda: LengthPrefix(max_size=Liar(-1)), "max_size"),
        (lambda: muxcore.Fixed(Liar(0)), "size"),
        (lambda: Lines(Liar(1 << 64)), "max_size"),
        (lambda: Delimiter(b"x", max_size=Liar(0)), "max_size"),
        (lambda: Resp(Liar(1 << 64)), "max_size"),
        (lambda: muxcore.Limits(max_outbox=Liar(-1)), "max_outbox"),
        (lambda: muxcore.Limits(max_inbox=Liar(-1)), "max_inbox"),
        (lambda: muxcore.Timeouts(idle=LateLiar(-1)), "idle"),
        (lambda: muxcore.Timeouts(linger=LateLiar("nan")), "linger"),
        (lambda: muxcore.Mux(max_events=Liar(-1)), "max_events"),
        (lambda: muxcore.Mux(read_size=Liar(0)), "read_size"),
        (lambda: muxcore.Threaded(print, queue=Liar(-1)), "queue"),
    ],
)
def test_a_number_is_what_it_is_and_not_what_it_compares_as(make: Callable[[], object], name: str) -> None:
    """A length of 2,000 bytes overflowed the stack."""
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make()


def test_what_is_made_of_a_subclass_is_plain() -> None:
    class Size(int):
        pass

    class Name(str):
        __slots__ = ()

    framer = LengthPrefix(Size(4), byteorder=Name("little"), max_size=Size(10))  # type: ignore[arg-type]
    limits = muxcore.Limits(high=Size(20), low=Size(10), overflow=Name("drop"))  # type: ignore[arg-type]
    found = [framer.size, framer.byteorder, framer.max_size, limits.high, limits.low, limits.overflow]
    assert found == [4, "little", 10, 20, 10, "drop"]
    assert {type(value) for value in found} == {int, str}


def test_a_framer_that_is_initialised_again_stays_as_it_is(mux: muxcore.Mux) -> None:
    """The core read the first delimiter when that was gone."""
    recorder = Recorder()
    framer = Delimiter(os.urandom(100) + b"|")
    end = bytes(bytearray(framer.delimiter))
    _, theirs = attached(mux, recorder, framer=framer)
    with pytest.raises(AttributeError, match="is immutable"):
        framer.__init__(b"x")  # type: ignore[misc]
    theirs.sendall(b"oneX" + end + b"twoX" + end)
    until(mux, lambda: recorder.count("message") == 2)
    assert recorder.messages() == [b"oneX", b"twoX"]
    theirs.close()


@pytest.mark.parametrize(
    ("framer", "field", "value"),
    [(Delimiter(b"\n"), "delimiter", ""), (Delimiter(b"\n"), "delimiter", bytes(5000)), (LengthPrefix(), "size", 2000)],
)
def test_a_framer_that_was_changed_by_force_is_refused(framer: Any, field: str, value: object) -> None:
    object.__setattr__(framer, field, value)
    with muxcore.Mux() as mux:
        if mux.backend != "epoll":
            pytest.skip("only the compiled core's memory depends on it")
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(ValueError, match="framer was changed"):
            mux.attach(ours, Recorder(), framer=framer)


@pytest.mark.parametrize("how", ["send", "broadcast", "thread"])
def test_a_reply_that_changes_while_it_is_encoded_is_one_reply(mux: muxcore.Mux, how: str) -> None:
    class Growing(muxcore.RespError):
        def __str__(self) -> str:
            reply.append(b"more")
            return "ERR"

    reply: list[Any] = [Growing(), 1]
    conn, theirs = attached(mux, Recorder(), framer=Resp())
    if how == "send":
        conn.send(reply)
    elif how == "broadcast":
        mux.broadcast([conn], reply)
    else:
        thread = threading.Thread(target=conn.send, args=(reply,))
        thread.start()
        thread.join()
    assert receive(mux, theirs, 14) == b"*2\r\n-ERR\r\n:1\r\n"
    theirs.close()


# --- errors with a mind of their own ------------------------------------------------------------------------


class Touchy(muxcore.FrameError):
    """Its `conn` cannot be set."""

    def __init__(self) -> None:
        pass

    @property
    def conn(self) -> Any:
        return None

    @conn.setter
    def conn(self, value: Any) -> None:
        raise ZeroDivisionError


class Classless(Exception):
    @property
    def __class__(self) -> Any:
        raise ZeroDivisionError


def poll_until(mux: muxcore.Mux, condition: Callable[[], object]) -> int:
    """How often poll raised what such an error does; pytest could not show it."""
    raised, end = 0, time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"poll raised {raised} times"
        try:
            mux.poll(0.02)
        except ZeroDivisionError:
            raised += 1
    return raised


@pytest.mark.parametrize("error", [Touchy, Classless])
@pytest.mark.parametrize("style", [Recorder, Batches])
def test_an_error_of_a_framer_of_any_class_ends_its_connection_alone(
    mux: muxcore.Mux, style: Any, error: type[Exception]
) -> None:
    class Bad(Words):
        def feed(self, data: bytes) -> Iterator[bytes]:
            raise error

    recorder = style()
    _, theirs = attached(mux, recorder, framer=Bad)
    theirs.sendall(b"x")
    theirs.close()
    assert poll_until(mux, lambda: recorder.count("close")) == 0
    assert type(recorder.reason()) is error


# --- a signal handler amid a send ---------------------------------------------------------------------------


@pytest.mark.unix_only("it sends itself signals")
@pytest.mark.parametrize("kind", ["stream", "datagram"])
def test_what_a_signal_handler_sends_amid_a_send_is_sent_once(mux: muxcore.Mux, kind: str) -> None:
    """The water mark is 0, so that each of them is sent at once. The fallback lost some, and sent others twice."""
    theirs, ours = socket.socketpair(type=socket.SOCK_STREAM if kind == "stream" else socket.SOCK_DGRAM)
    theirs.setblocking(False)
    limits = muxcore.Limits(high=0, low=0, overflow="drop")
    out: Any
    if kind == "stream":
        out = mux.attach(ours, muxcore.Handler(), limits=limits)
    else:
        out = mux.datagram(ours, lambda datagram, messages: None, limits=limits)
    sent, got = 0, bytearray()

    def send(*_: object) -> None:
        nonlocal sent
        sent += 1
        out.send(b"%d\n" % sent)

    before = signal.signal(signal.SIGALRM, send)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            for _ in range(3):
                send()
            mux.poll(0)
            with suppress(BlockingIOError):
                while True:
                    got += theirs.recv(1 << 16)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for _ in range(5):
        mux.poll(0.01)
        with suppress(BlockingIOError):
            while True:
                got += theirs.recv(1 << 16)
    assert sorted(map(int, got.split())) == list(range(1, sent + 1))
    theirs.close()


# --- a Mux that is initialised again ------------------------------------------------------------------------


@pytest.mark.unix_only("it catches a signal")
def test_a_mux_that_is_initialised_again_still_restores_signal_handlers(backend: str) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with muxcore.Mux(backend=backend) as mux:
        mux.add_signal_handler(signal.SIGUSR1, print)
        with pytest.raises(RuntimeError, match="called only once"):
            mux.__init__(backend=backend)  # type: ignore[misc]
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.set_wakeup_fd(-1) == -1


# --- parts of a turn ----------------------------------------------------------------------------------------


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_a_timer_does_not_wait_for_every_on_open(mux: muxcore.Mux, listen: Listen) -> None:
    class Slow(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            busy(0.004)
            super().on_open(conn)

    recorder = Slow()
    listener = listen(recorder)
    clients = [client(listener) for _ in range(30)]
    seen: list[int] = []
    mux.call_later(0, lambda: seen.append(recorder.count("open")))
    until(mux, lambda: recorder.count("open") == 30)
    assert seen[0] < 20
    for one in clients:
        one.close()


def test_a_timer_does_not_wait_for_many_small_reads(backend: str) -> None:
    with muxcore.Mux(backend=backend, read_size=1) as mux:
        _, theirs = attached(mux, muxcore.Handler())
        theirs.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                theirs.send(bytes(1 << 16))
        seen: list[int] = []
        mux.call_later(0, lambda: seen.append(mux.stats().recv_calls))
        until(mux, lambda: seen)
        assert seen[0] < 20_000
        theirs.close()


def test_a_timer_does_not_wait_for_all_errors_of_a_datagram_socket(mux: muxcore.Mux) -> None:
    class Slow:
        errors = 0

        def on_datagrams(self, datagram: muxcore.Datagram, messages: list[Any]) -> None:
            pass

        def on_error(self, datagram: muxcore.Datagram, error: Exception) -> None:
            busy(0.004)
            self.errors += 1

    handler = Slow()
    datagram = mux.datagram(LOCALHOST, handler, max_size=1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as theirs:
        for _ in range(60):
            theirs.sendto(b"too large", datagram.address)
        seen: list[int] = []
        mux.call_later(0.001, lambda: seen.append(handler.errors))
        until(mux, lambda: handler.errors == 60)
    assert seen[0] < 20


def test_a_timer_does_not_wait_for_all_that_connect_to_one_name(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    from muxcore import _connect

    begun = 0
    begin = _connect.Attempt.begin

    def slow(self: Any, family: int, target: Any) -> None:
        nonlocal begun
        begun += 1
        busy(0.004)
        begin(self, family, target)

    def resolve(address: Any, flags: int = 0) -> list[Any]:
        if flags:
            raise socket.gaierror  # it is no literal address
        return [(socket.AF_INET, server.getsockname())]

    monkeypatch.setattr(_connect.Attempt, "begin", slow)
    with socket.create_server(LOCALHOST) as server:
        monkeypatch.setattr(_connect._address, "resolve", resolve)
        conns = [mux.connect(("a.name", server.getsockname()[1]), muxcore.Handler()) for _ in range(30)]
        until(mux, lambda: begun)
        seen: list[int] = []
        mux.call_soon(lambda: seen.append(begun))
        until(mux, lambda: begun == 30 and seen)
        assert seen[0] < 20
        for conn in conns:
            conn.abort()


# --- a signal handler at every moment -----------------------------------------------------------------------


def at_each_moment(program: Callable[[], object], act: Callable[[], object], again: Callable[[], object]) -> None:
    """Call `act` at the first call or return in muxcore, as CPython would a signal handler; then, after `again`, at the
    second, and so on."""
    moment = count = 0

    def profile(frame: Any, event: str, argument: object) -> None:
        nonlocal count
        if event == "c_call" or "/muxcore/" not in frame.f_code.co_filename or frame.f_code.co_name == "mutant":
            return
        count += 1
        if count == moment:
            sys.setprofile(None)
            act()

    while moment <= count:
        moment, count = moment + 1, 0
        again()
        sys.setprofile(profile)
        try:
            program()
        finally:
            sys.setprofile(None)


@pytest.mark.parametrize("what", ["close", "abort"])
def test_a_connection_may_end_at_any_moment_of_a_send(backend: str, what: str) -> None:
    muxes: list[muxcore.Mux] = []
    conns: list[muxcore.Connection] = []
    with tempfile.TemporaryFile() as file:
        file.write(bytes(100_000))
        file.flush()

        def again() -> None:
            if muxes:
                check()
            muxes.append(muxcore.Mux(backend=backend))
            ours, theirs = socket.socketpair()
            limits = muxcore.Limits(high=0, low=0)
            conns.append(muxes[-1].attach(ours, muxcore.Handler(), limits=limits, framer=Lines()))
            muxes[-1].poll(0)
            theirs.close()

        def program() -> None:
            conns[-1].send(b"hello")
            conns[-1].sendfile(file, 0, 100_000)
            muxes[-1].poll(0)
            muxes[-1].poll(0)

        def check() -> None:
            with muxes.pop() as mux:
                conn = conns.pop()
                until(mux, lambda: conn.closed)
                assert conn.outbox_size == 0

        at_each_moment(program, lambda: getattr(conns[-1], what)(), again)
        check()


@pytest.mark.parametrize("framer", [None, Lines(), Words], ids=repr)
def test_a_connection_may_be_aborted_at_any_moment_of_a_read(backend: str, framer: Any) -> None:
    """That is no error, though there is no socket to read from then."""
    ends: list[Callable[[], None]] = []
    conns: list[muxcore.Connection] = []
    muxes: list[muxcore.Mux] = []

    def again() -> None:
        check()
        muxes.append(muxcore.Mux(backend=backend))
        ours, theirs = socket.socketpair()
        ends.append(theirs.close)
        conns.append(muxes[0].attach(ours, muxcore.Handler(), framer=framer))
        muxes[0].poll(0)
        theirs.sendall(b"hello\n")

    def check() -> None:
        while muxes:
            with muxes.pop() as mux:
                conn = conns.pop()
                conn.abort()
                until(mux, lambda conn=conn: conn.closed)
                assert conn.error is None
            ends.pop()()

    at_each_moment(lambda: muxes[0].poll(0), lambda: conns[0].abort(), again)
    check()


def test_a_datagram_socket_may_be_closed_at_any_moment_of_a_send(backend: str) -> None:
    """The fallback raised AssertionError."""
    with muxcore.Mux(backend=backend) as mux:
        datagrams: list[muxcore.Datagram] = []

        def again() -> None:
            if datagrams:
                datagrams.pop().close()
            limits = muxcore.Limits(high=0, low=0)
            datagrams.append(mux.datagram(LOCALHOST, lambda datagram, messages: None, limits=limits))

        def program() -> None:
            datagrams[-1].send(b"hello", datagrams[-1].address)
            mux.poll(0)

        at_each_moment(program, lambda: datagrams[-1].close(), again)
        datagrams.pop().close()


@pytest.mark.parametrize("how", ["attach", "connect", "listen", "datagram"])
def test_a_mux_that_is_closed_while_a_socket_is_made_keeps_none(backend: str, how: str) -> None:
    """The fallback left it open."""
    muxes: list[muxcore.Mux] = []
    made: list[Any] = []
    pairs: list[tuple[socket.socket, socket.socket]] = []

    def again() -> None:
        check()
        muxes.append(muxcore.Mux(backend=backend))
        pairs.append(socket.socketpair())

    def make() -> Any:
        if how == "attach":
            return muxes[0].attach(pairs[0][0], muxcore.Handler())
        if how == "connect":
            return muxes[0].connect(server.getsockname(), muxcore.Handler())
        if how == "listen":
            return muxes[0].listen(LOCALHOST, muxcore.Handler())
        return muxes[0].datagram(LOCALHOST, lambda datagram, messages: None)

    def program() -> None:
        with suppress(RuntimeError):  # the Mux is closed
            made.append(make())

    def check() -> None:
        while muxes:
            muxes.pop().close()
            for one in pairs.pop():
                one.close()
        assert [one for one in made if not one.closed] == []
        made.clear()

    with socket.create_server(LOCALHOST) as server:
        at_each_moment(program, lambda: muxes[0].close(), again)
        check()
