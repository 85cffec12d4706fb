"""Outgoing connections: Mux.connect (Promise connecting)."""

from __future__ import annotations

import errno
import gc
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import (
    DEADLINE,
    LOCALHOST,
    InterruptAt,
    Recorder,
    as_of_muxcore,
    open_fds,
    pattern,
    read_exactly,
    receive,
    reset,
    until,
)

import muxcore
from muxcore import _address, _connect
from muxcore._impl import BACKENDS

Listen = Callable[..., muxcore.Listener]
Resolver = dict[str, Any]

HAS_IPV6 = socket.has_ipv6
NEVER = muxcore.Timeouts(connect=None)
SOON = muxcore.Timeouts(connect=0.05)


# --- what stands at the other end ------------------------------------------------------------------


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    """What our own name server returns for each name: sockaddrs, an exception, or, after an Event, those of `late`."""
    names: Resolver = {"late": socket.gaierror(socket.EAI_NONAME, "too late")}
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host not in names or options.get("flags", 0) & socket.AI_NUMERICHOST:
            return real(host, port, *args, **options)
        result = names[host]
        if isinstance(result, threading.Event):
            result.wait(DEADLINE)
            result = names["late"]
        if isinstance(result, Exception):
            raise result
        return [(family_of(target), socket.SOCK_STREAM, 6, "", target) for target in result]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield names
    for result in names.values():
        if isinstance(result, threading.Event):
            result.set()


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The targets that were tried, in order."""
    targets: list[Any] = []
    begin = _connect.Attempt.begin

    def recording(self: Any, family: Any, target: Any) -> None:
        targets.append(target)
        begin(self, family, target)

    monkeypatch.setattr(_connect.Attempt, "begin", recording)
    return targets


def family_of(address: Any) -> socket.AddressFamily:
    if isinstance(address, tuple):
        return socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    return socket.AF_UNIX


ANY: dict[int, Any] = {socket.AF_INET: LOCALHOST, socket.AF_INET6: ("::1", 0)}


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening socket from which only the test accepts."""
    with socket.create_server(LOCALHOST) as server:
        server.settimeout(DEADLINE)
        yield server


@pytest.fixture
def hole() -> Iterator[Callable[..., Any]]:
    """Makes addresses that do not reply: with a full backlog Linux drops a SYN."""
    if sys.platform != "linux":
        pytest.skip("elsewhere a full backlog refuses")
    with ExitStack() as opened:

        def make(family: int = socket.AF_INET) -> Any:
            listening = opened.enter_context(socket.socket(family))
            opened.enter_context(fill(listening))
            return listening.getsockname()

        yield make


def fill(listening: socket.socket) -> socket.socket:
    """Let it listen with a backlog that is full, of one connection, whose other end this is."""
    listening.bind(ANY[listening.family])
    listening.listen(0)
    first = socket.create_connection(listening.getsockname()[:2], timeout=DEADLINE)
    assert select.select([listening], (), (), DEADLINE)[0]
    return first


def closed_ports(count: int, family: int = socket.AF_INET) -> list[Any]:
    """So many addresses without a listener; a port that is free again could come twice."""
    socks = [socket.socket(family) for _ in range(count)]
    for sock in socks:
        sock.bind(ANY[family])
    addresses = [sock.getsockname() for sock in socks]
    for sock in socks:
        sock.close()
    return addresses


def closed_port(family: int = socket.AF_INET) -> Any:
    return closed_ports(1, family)[0]


def accept(server: socket.socket) -> socket.socket:
    sock = server.accept()[0]
    sock.settimeout(DEADLINE)
    return sock


def failure(mux: muxcore.Mux, address: Any, **options: Any) -> Any:
    """Connect in vain, and see that on_close(exc) is all there was."""
    before = mux.stats().connections
    recorder = Recorder()
    conn = mux.connect(address, recorder, **options)
    until(mux, lambda: recorder.events)
    mux.poll(0)
    assert recorder.names() == ["close"]
    assert conn.error is recorder.reason()
    assert conn.closed
    assert mux.stats().connections == before == len(list(mux.connections))
    reason = recorder.reason()
    if isinstance(reason, muxcore.MuxError):
        assert reason.conn is conn
    return reason


# --- success ---------------------------------------------------------------------------------------


@pytest.fixture(params=["IPv4", "IPv6", "path", "PathLike", "abstract"])
def address(request: pytest.FixtureRequest) -> Any:
    if request.param == "IPv4":
        return LOCALHOST
    if request.param == "IPv6":
        if not HAS_IPV6:
            pytest.skip("no IPv6")
        return ("::1", 0)
    path = request.getfixturevalue("socket_path")
    if request.param == "abstract":
        if sys.platform != "linux":
            pytest.skip("abstract names are Linux'")
        return f"\0{path}"
    return path if request.param == "PathLike" else str(path)


def test_connects_to_every_kind_of_address(mux: muxcore.Mux, address: Any) -> None:
    listener = mux.listen(address, lambda conn, message: conn.send(message.upper()))
    recorder = Recorder()
    conn = mux.connect(address if isinstance(listener.address, (str, bytes)) else listener.address, recorder)
    assert (conn.closed, conn.closing) == (False, False)
    conn.send(b"hello")
    until(mux, lambda: recorder.received() == b"HELLO")
    assert recorder.names()[0] == "open"
    assert recorder.count("open") == 1
    assert conn.peer == listener.address
    assert conn.listener is None
    assert sorted(one.id for one in mux.connections) == [conn.id, conn.id + 1]
    conn.close()
    until(mux, lambda: mux.stats().connections == 0)
    assert recorder.reason() is None


def test_a_name_is_resolved(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    mux.connect(("localhost", listen(lambda conn, message: None).address[1]), recorder)
    until(mux, lambda: recorder.count("open"))


def test_a_name_is_resolved_in_another_thread(
    mux: muxcore.Mux, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    real = socket.getaddrinfo

    def getaddrinfo(*args: Any, flags: int = 0, **options: Any) -> Any:
        if not flags & socket.AI_NUMERICHOST:
            threads.append(threading.get_ident())
        return real(*args, flags=flags, **options)

    listener = listen(lambda conn, message: conn.send(message))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    recorder = Recorder()
    mux.connect(("localhost", listener.address[1]), recorder)
    until(mux, lambda: recorder.count("open"))
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
    mux.connect(listener.address, recorder)
    until(mux, lambda: recorder.count("open") == 2)
    assert len(threads) == 1, "a literal address needs no resolver"


def test_options_are_set_on_the_socket(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    conn = mux.connect(listen(lambda conn, message: None).address, recorder, keepalive=7)
    until(mux, lambda: recorder.count("open"))
    assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert conn.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.linux_only("TCP_USER_TIMEOUT")
def test_user_timeout_is_set_on_the_socket(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder = Recorder()
    conn = mux.connect(server.getsockname(), recorder, user_timeout=1.5)
    until(mux, lambda: recorder.count("open"))
    assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500


def test_a_framer_works_in_both_directions(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(lambda conn, line: conn.send(line[::-1]), framer=muxcore.Lines())
    recorder = Recorder()
    conn = mux.connect(listener.address, recorder, framer=muxcore.Lines())
    conn.send_many([b"one", b"two"])
    until(mux, lambda: len(recorder.messages()) == 2)
    assert recorder.messages() == [b"eno", b"owt"]


def test_a_framer_of_the_users_own_is_made_once_per_connection(mux: muxcore.Mux, listen: Listen) -> None:
    made: list[object] = []

    class Upper:
        def __init__(self) -> None:
            made.append(self)

        def feed(self, data: bytes) -> list[bytes]:
            return [data]

        def encode(self, message: bytes) -> bytes:
            return message.upper()

        def rest(self) -> bytes:
            return b""

    recorder = Recorder()
    conn = mux.connect(listen(lambda conn, message: conn.send(message)).address, recorder, framer=Upper)
    conn.send(b"x")
    until(mux, lambda: recorder.received() == b"X")
    assert len(made) == 1


@pytest.mark.linux_only("elsewhere only 127.0.0.1 is there")
def test_local_address_is_where_it_connects_from(mux: muxcore.Mux, listen: Listen) -> None:
    peers: list[Any] = []
    listener = listen(lambda conn, message: peers.append(conn.peer))
    with socket.socket() as sock:
        sock.bind(("127.0.0.2", 0))
        port = sock.getsockname()[1]
    for local in (("127.0.0.2", 0), ("127.0.0.2", port)):
        conn = mux.connect(listener.address, Recorder(), local_address=local)
        conn.send(b"x")
        until(mux, lambda: peers)
        assert conn.local == peers[0]
        assert peers.pop()[0] == "127.0.0.2"
        shares = conn.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert bool(shares) == bool(local[1]), "a port that the kernel chooses is free"
    assert conn.local == ("127.0.0.2", port)
    other = mux.connect(listen(lambda conn, message: None).address, Recorder(), local_address=local)
    until(mux, lambda: other.local == conn.local)  # a port may serve several connections at once


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6")
def test_local_address_chooses_the_family_of_a_name(mux: muxcore.Mux, listen: Listen, resolver: Resolver) -> None:
    listener = listen(lambda conn, message: None)
    recorder = Recorder()
    resolver["both.test"] = [closed_port(socket.AF_INET6), listener.address]
    conn = mux.connect(("both.test", 1), recorder, local_address=LOCALHOST)
    until(mux, lambda: recorder.events)
    assert conn.peer == listener.address
    error = failure(mux, ("both.test", 1), local_address=("::1", 0))
    assert isinstance(error, ConnectionRefusedError)
    resolver["four.test"] = [listener.address]
    error = failure(mux, ("four.test", 1), local_address=("::1", 0))
    assert error.errno == errno.EADDRNOTAVAIL
    assert "local_address" in str(error)


def test_a_busy_local_address_is_reported_by_on_close(mux: muxcore.Mux, server: socket.socket) -> None:
    error = failure(mux, closed_port(), local_address=server.getsockname())
    assert isinstance(error, OSError)
    assert error.errno == errno.EADDRINUSE


# --- several addresses -----------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6")
def test_ipv6_is_tried_first(mux: muxcore.Mux, listen: Listen, resolver: Resolver) -> None:
    four = listen(lambda conn, message: None)
    six = mux.listen(("::1", 0), lambda conn, message: None)
    resolver["both.test"] = [four.address, six.address]
    recorder = Recorder()
    conn = mux.connect(("both.test", 1), recorder)
    until(mux, lambda: recorder.count("open"))
    assert conn.peer == six.address


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6")
def test_the_families_take_turns(mux: muxcore.Mux, listen: Listen, resolver: Resolver, tried: list[Any]) -> None:
    four, six = closed_ports(3), closed_ports(2, socket.AF_INET6)
    resolver["both.test"] = [*four, *six, four[0]]
    failure(mux, ("both.test", 1))
    assert tried == [six[0], four[0], six[1], four[1], four[2]]


def test_a_refusal_leads_to_the_next_address_at_once(
    mux: muxcore.Mux, listen: Listen, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connect, "STAGGER", DEADLINE)
    listener = listen(lambda conn, message: conn.send(message))
    resolver["many.test"] = [*closed_ports(2), listener.address]
    recorder = Recorder()
    conn = mux.connect(("many.test", 1), recorder)
    conn.send(b"x")
    until(mux, lambda: recorder.received(), DEADLINE / 2)
    assert recorder.count("open") == 1


def test_an_address_that_does_not_respond_does_not_hold_back_the_next(
    mux: muxcore.Mux, listen: Listen, resolver: Resolver, hole: Callable[..., Any], tried: list[Any]
) -> None:
    listener = listen(lambda conn, message: conn.send(message))
    holes = [hole(), hole(socket.AF_INET6) if HAS_IPV6 else hole()]
    resolver["slow.test"] = [*holes, listener.address]
    recorder = Recorder()
    before = len(open_fds())
    conn = mux.connect(("slow.test", 1), recorder)
    until(mux, lambda: recorder.count("open"))
    assert conn.peer == listener.address
    assert len(tried) == 3
    until(mux, lambda: listener.connections == 1)
    assert len(open_fds()) == before + 2, "the sockets of the losers are closed"


def test_the_first_address_may_still_win(
    mux: muxcore.Mux, resolver: Resolver, hole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tried: list[Any]
) -> None:
    """The kernel sends its SYN again after a second, when there is room in the backlog."""
    monkeypatch.setattr(_connect, "STAGGER", 0.01)
    with socket.socket() as first, fill(first):
        resolver["slow.test"] = [first.getsockname(), hole(), closed_port()]
        recorder = Recorder()
        conn = mux.connect(("slow.test", 1), recorder)
        until(mux, lambda: len(tried) == 3)
        first.accept()[0].close()
        until(mux, lambda: recorder.count("open"))
        assert conn.peer == first.getsockname()


def test_each_address_gets_its_time_though_one_before_was_refused(
    mux: muxcore.Mux, resolver: Resolver, hole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, times = _connect.Attempt.begin, list[float]()

    def timed(self: Any, family: Any, target: Any) -> None:
        times.append(mux.time())
        begin(self, family, target)

    monkeypatch.setattr(_connect, "STAGGER", 0.05)
    monkeypatch.setattr(_connect.Attempt, "begin", timed)
    resolver["many.test"] = [closed_port(), hole(), hole(), hole()]
    mux.connect(("many.test", 1), Recorder())
    until(mux, lambda: len(times) == 4)
    assert times[2] - times[1] >= 0.05
    assert times[3] - times[2] >= 0.05


def test_no_address_is_tried_after_one_has_responded(
    mux: muxcore.Mux, server: socket.socket, resolver: Resolver, monkeypatch: pytest.MonkeyPatch, tried: list[Any]
) -> None:
    monkeypatch.setattr(_connect, "STAGGER", 0.05)
    resolver["many.test"] = [server.getsockname(), closed_port()]
    recorder = Recorder()
    mux.connect(("many.test", 1), recorder)
    until(mux, lambda: recorder.count("open"))
    passed: list[int] = []
    mux.call_later(0.06, passed.append, 1)
    until(mux, lambda: passed)
    assert len(tried) == 1


def test_the_error_says_what_was_wrong_with_all_addresses(mux: muxcore.Mux, resolver: Resolver) -> None:
    resolver["bad.test"] = [closed_port(), ("255.255.255.255", 1)]
    error = failure(mux, ("bad.test", 1))
    assert isinstance(error, ConnectionRefusedError)
    assert "bad.test" in str(error)
    assert os.strerror(errno.ECONNREFUSED) in str(error)
    assert len(str(error).split(";")) == 2


# --- failure ---------------------------------------------------------------------------------------


def test_a_refused_connection_is_reported_by_on_close_alone(mux: muxcore.Mux) -> None:
    address = closed_port()
    error = failure(mux, address)
    assert isinstance(error, ConnectionRefusedError)
    assert error.errno == errno.ECONNREFUSED
    assert repr(address) in str(error)


def test_a_socket_file_that_is_missing_or_deserted_is_reported(mux: muxcore.Mux, socket_path: Path) -> None:
    assert isinstance(failure(mux, socket_path), FileNotFoundError)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(socket_path))
    assert isinstance(failure(mux, socket_path), ConnectionRefusedError)


def test_an_unreachable_network_is_reported(mux: muxcore.Mux) -> None:
    error = failure(mux, ("255.255.255.255", 9))
    assert isinstance(error, OSError)
    assert error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EADDRNOTAVAIL)


def test_a_name_that_does_not_exist_is_reported(mux: muxcore.Mux, resolver: Resolver) -> None:
    resolver["missing.test"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    error = failure(mux, ("missing.test", 80))
    assert isinstance(error, socket.gaierror)
    assert error.errno == socket.EAI_NONAME
    assert "missing.test" in str(error)


def test_an_error_of_the_resolver_that_cannot_be_copied_is_reported(mux: muxcore.Mux, resolver: Resolver) -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("one argument")

    resolver["odd.test"] = Odd(1, 2)
    assert failure(mux, ("odd.test", 1)) is resolver["odd.test"]


def test_the_timeout_ends_an_attempt_without_a_response(mux: muxcore.Mux, hole: Callable[..., Any]) -> None:
    error = failure(mux, hole(), timeouts=SOON)
    assert isinstance(error, muxcore.ConnectTimeout)
    assert isinstance(error, TimeoutError)
    assert error.limit == 0.05
    assert mux.stats().timeouts == 1


def test_the_timeout_covers_the_name_server(mux: muxcore.Mux, resolver: Resolver) -> None:
    gate = resolver["silent.test"] = threading.Event()
    assert isinstance(failure(mux, ("silent.test", 1), timeouts=SOON), muxcore.ConnectTimeout)
    gate.set()
    late: list[object] = []
    mux.run_in_executor(None, int, on_done=late.append)
    until(mux, lambda: late)
    assert mux.stats().handler_errors == 0


def test_the_timeout_covers_all_addresses_together(
    mux: muxcore.Mux, resolver: Resolver, hole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tried: list[Any]
) -> None:
    monkeypatch.setattr(_connect, "STAGGER", 0.001)
    resolver["silent.test"] = [hole(), hole(), hole()]
    before = len(open_fds())
    error = failure(mux, ("silent.test", 1), timeouts=muxcore.Timeouts(connect=0.3))
    assert isinstance(error, muxcore.ConnectTimeout)
    assert len(tried) == 3
    assert len(open_fds()) == before


def test_thirty_seconds_are_the_default(mux: muxcore.Mux) -> None:
    assert mux.connect(closed_port(), Recorder()).timeouts.connect == 30.0


def test_an_open_connection_has_no_timer_left(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder = Recorder()
    mux.connect(server.getsockname(), recorder)
    assert mux._timers.next_ns() > 0
    until(mux, lambda: recorder.count("open"))
    assert mux._timers.next_ns() < 0


def test_a_socket_that_cannot_be_watched_is_reported(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(self: object, conn: object, sock: object, peer: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(type(mux), "_connected", as_of_muxcore(out_of_memory))
    error = failure(mux, server.getsockname())
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOMEM
    assert mux.stats().handler_errors == 0


def test_no_more_descriptors_is_reported(mux: muxcore.Mux, server: socket.socket) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        error = failure(mux, server.getsockname())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(error, OSError)
    assert error.errno == errno.EMFILE


@pytest.mark.unix_only("elsewhere descriptors are not small numbers")
def test_a_socket_beyond_selects_limit_is_reported(server: socket.socket) -> None:
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1100:
        pytest.skip("the limit on open files is too low")
    with muxcore.Mux(backend="select") as mux:
        low = [os.dup(0) for _ in range(1024)]
        try:
            error = failure(mux, server.getsockname())
        finally:
            for fd in low:
                os.close(fd)
    assert isinstance(error, ValueError)
    assert "FD_SETSIZE" in str(error)


@pytest.mark.linux_only("a port that Linux connects to itself")
def test_a_port_that_is_connected_to_itself_is_refused(mux: muxcore.Mux) -> None:
    address = closed_port()
    assert isinstance(failure(mux, address, local_address=address), ConnectionRefusedError)


@pytest.mark.linux_only("other systems may drop what was received when the reset comes")
def test_a_reply_before_a_reset_is_delivered(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder = Recorder()
    mux.connect(server.getsockname(), recorder)
    sock = accept(server)
    sock.sendall(b"too many connections")
    reset(sock)
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "message", "close"]
    assert recorder.received() == b"too many connections"
    assert isinstance(recorder.reason(), ConnectionResetError)


def test_a_reset_at_once_is_reported(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder = Recorder()
    mux.connect(server.getsockname(), recorder)
    reset(accept(server))
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), ConnectionResetError)


def test_a_full_backlog_of_a_unix_listener_is_waited_for(mux: muxcore.Mux, socket_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("elsewhere it refuses")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(str(socket_path))
        server.listen(0)
        first.connect(str(socket_path))
        recorder = Recorder()
        mux.connect(socket_path, recorder)
        before = mux.stats().waits
        passed: list[int] = []
        mux.call_later(0.1, passed.append, 1)
        until(mux, lambda: passed)
        assert mux.stats().waits < before + 40, "it spins"
        assert recorder.events == []
        accept(server).close()
        until(mux, lambda: recorder.count("open"))
        accept(server).close()


# --- before it is open -----------------------------------------------------------------------------


def test_what_is_sent_before_it_is_open_arrives_in_order(mux: muxcore.Mux, listen: Listen) -> None:
    sink = Recorder()
    listener = listen(sink)

    class Talker(muxcore.Handler):
        def on_open(self, conn: muxcore.Connection) -> None:
            conn.send(b"|opened")

    conn = mux.connect(listener.address, Talker())
    assert conn.send(b"sent")
    assert conn.write(b"|written")
    conn.writelines([b"|a", b"|b"])
    with tempfile.TemporaryFile() as file:
        file.write(b"|file")
        file.flush()
        conn.sendfile(file)
    assert conn.outbox_size == len(b"sent|written|a|b|file")
    assert conn.flush() == conn.outbox_size
    until(mux, lambda: sink.received().endswith(b"opened"))
    assert sink.received() == b"sent|written|a|b|file|opened"


def test_a_send_between_the_water_marks_is_false_until_the_drain(mux: muxcore.Mux, server: socket.socket) -> None:
    results: list[bool] = []
    recorder = Recorder()
    recorder.on_open = lambda conn: results.append(conn.send(b"x"))  # type: ignore[method-assign]
    conn = mux.connect(server.getsockname(), recorder, limits=muxcore.Limits(high=11 << 20, low=0))
    assert not conn.send(bytes(12 << 20))
    until(mux, lambda: results)
    assert 0 < conn.outbox_size < 11 << 20
    assert results == [False]


def test_megabytes_sent_before_it_is_open_arrive(mux: muxcore.Mux, listen: Listen) -> None:
    sink, recorder = Recorder(), Recorder()
    listener = listen(sink)
    data = pattern(4 << 20)
    conn = mux.connect(listener.address, recorder)
    assert conn.send(data) is False
    until(mux, lambda: len(sink.received()) == len(data))
    assert sink.received() == data
    until(mux, lambda: recorder.count("drain"))
    assert recorder.names() == ["open", "drain"]


def test_max_outbox_holds_before_it_is_open(mux: muxcore.Mux, server: socket.socket) -> None:
    limits = muxcore.Limits(high=10, low=5, max_outbox=20)
    recorder = Recorder()
    conn = mux.connect(server.getsockname(), recorder, limits=limits)
    conn.send(bytes(30))
    assert conn.send(b"x") is False
    until(mux, lambda: recorder.events)
    assert recorder.names() == ["close"]
    assert isinstance(recorder.reason(), muxcore.OutboxFull)


def test_what_a_connection_is_before_it_is_open(mux: muxcore.Mux, server: socket.socket) -> None:
    conn = mux.connect(server.getsockname())
    assert (conn.recv(), conn.recv_all(), list(conn), conn.unread, conn.inbox_size) == (None, [], [], b"", 0)
    assert (conn.closed, conn.closing, conn.eof, conn.error) == (False, False, False, None)
    assert (conn.fileno(), conn.local, conn.peer) == (-1, None, server.getsockname())
    assert conn.is_reading() is False
    assert "connecting" in repr(conn)
    assert list(mux.connections) == [conn]
    assert conn in mux.connections
    assert mux.stats().connections == 1
    with pytest.raises(muxcore.ConnectionClosed, match="not open"):
        conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


@pytest.mark.parametrize(("end", "state"), [("close", "closing"), ("abort", "closed")])
def test_its_repr_says_that_it_was_ended_before_it_was_open(
    mux: muxcore.Mux, server: socket.socket, end: str, state: str
) -> None:
    conn = mux.connect(server.getsockname())
    getattr(conn, end)()
    assert f"{conn.id} {state}, peer" in repr(conn)


def test_detach_is_refused_before_it_is_open(mux: muxcore.Mux, server: socket.socket) -> None:
    conn = mux.connect(server.getsockname())
    with pytest.raises(muxcore.ConnectionClosed, match="detach: the connection is not open"):
        conn.detach()
    conn.send(b"x")
    with pytest.raises(muxcore.ConnectionClosed, match="detach: the connection is not open"):
        conn.detach()
    until(mux, lambda: conn.fileno() >= 0)
    conn.detach().close()


def test_a_pause_before_it_is_open_holds(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder = Recorder()
    conn = mux.connect(server.getsockname(), recorder)
    conn.pause_reading()
    with accept(server) as sock:
        sock.sendall(b"hello")
        until(mux, lambda: recorder.count("open"))
        passed: list[int] = []
        mux.call_later(0.05, passed.append, 1)
        until(mux, lambda: passed)
        assert recorder.names() == ["open"]
        conn.resume_reading()
        until(mux, lambda: recorder.received() == b"hello")


def test_settings_may_change_before_it_is_open(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(lambda conn, message: conn.send(message))
    recorder = Recorder()
    conn = mux.connect(listener.address, recorder)
    conn.framer = muxcore.LengthPrefix(2)
    conn.set_limits(high=1000, low=10)
    conn.set_timeouts(idle=DEADLINE)
    conn.send(b"framed")
    until(mux, lambda: recorder.messages() == [b"framed"])


def test_write_eof_before_it_is_open_comes_after_the_output(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder = Recorder()
    conn = mux.connect(server.getsockname(), recorder)
    conn.send(b"request")
    conn.write_eof()
    assert conn.send(b"refused") is False
    with accept(server) as sock:
        assert receive(mux, sock) == b"request"
        sock.sendall(b"answer")
    until(mux, lambda: recorder.count("close"))
    assert recorder.received() == b"answer"
    assert recorder.reason() is None


def test_close_before_it_is_open_gives_up(mux: muxcore.Mux, hole: Callable[..., Any]) -> None:
    recorder = Recorder()
    address = hole()
    before = len(open_fds())
    conn = mux.connect(address, recorder)
    mux.poll(0)
    conn.close()
    assert conn.closing
    assert conn.send(b"x") is False
    until(mux, lambda: recorder.events)
    assert recorder.names() == ["close"]
    assert recorder.reason() is None
    assert len(open_fds()) == before


def test_close_before_it_is_open_keeps_its_word(mux: muxcore.Mux, server: socket.socket) -> None:
    """Promise close-loses-nothing: what was accepted before close() arrives."""
    recorder = Recorder()
    conn = mux.connect(server.getsockname(), recorder)
    data = pattern(1 << 20)
    conn.send(data)
    conn.close()
    with accept(server) as sock:
        assert receive(mux, sock) == data
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "close"]
    assert recorder.reason() is None


def test_abort_before_it_is_open_ends_it_at_once(mux: muxcore.Mux, hole: Callable[..., Any]) -> None:
    recorder = Recorder()
    address = hole()
    before = len(open_fds())
    conn = mux.connect(address, recorder)
    conn.send(b"lost")
    mux.poll(0)
    conn.abort()
    assert conn.closed
    assert len(open_fds()) == before
    until(mux, lambda: recorder.events)
    assert recorder.names() == ["close"]
    assert recorder.reason() is None


def test_abort_while_the_name_is_resolved(
    mux: muxcore.Mux, server: socket.socket, resolver: Resolver, tried: list[Any]
) -> None:
    gate = resolver["silent.test"] = threading.Event()
    resolver["late"] = [server.getsockname()]
    recorder = Recorder()
    mux.connect(("silent.test", 1), recorder).abort()
    until(mux, lambda: recorder.events)
    gate.set()
    late: list[object] = []
    mux.run_in_executor(None, int, on_done=late.append)
    until(mux, lambda: late)
    assert recorder.names() == ["close"]
    assert tried == []


def test_a_lookup_for_aborted_connections_is_not_begun(
    mux: muxcore.Mux, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = resolver["silent.test"] = threading.Event()
    begun: list[Any] = []
    real = _address.resolve

    def resolve(address: Any, flags: int = 0) -> Any:
        begun.extend([address] if flags == 0 else [])
        return real(address, flags)

    monkeypatch.setattr(_address, "resolve", resolve)
    conns = [mux.connect(("silent.test", 1), Recorder()) for _ in range(40)]  # the pool has 32 threads at most
    for conn in conns:
        conn.abort()
    gate.set()
    late: list[object] = []
    mux.run_in_executor(None, int, on_done=late.append)
    until(mux, lambda: late)
    assert len(begun) <= 32


def test_abort_in_the_batch_that_reports_the_connection(mux: muxcore.Mux, server: socket.socket) -> None:
    """The kernel has connected both when the first callback ends the other."""
    ends = [Recorder(), Recorder()]
    conns: list[muxcore.Connection] = []

    def cross(recorder: Recorder, conn: muxcore.Connection) -> None:
        Recorder.on_open(recorder, conn)
        for other in conns:
            if other is not conn:
                other.abort()

    for recorder in ends:
        recorder.on_open = partial(cross, recorder)  # type: ignore[method-assign]
        conns.append(mux.connect(server.getsockname(), recorder))
    peers = [accept(server), accept(server)]
    until(mux, lambda: sum(recorder.count("close") for recorder in ends) == 1)
    [names] = [recorder.names() for recorder in ends if recorder.count("close")]
    assert names in (["close"], ["open", "close"])
    for sock in peers:
        sock.close()


def test_abort_while_a_socket_is_made_leaves_no_descriptor_and_no_timer(
    mux: muxcore.Mux, resolver: Resolver, hole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a finaliser, or a signal handler."""
    configure = _address.Tcp.configure

    def aborts(tcp: _address.Tcp, sock: socket.socket) -> None:
        configure(tcp, sock)
        conn.abort()

    resolver["slow.test"] = [hole()]
    before = len(open_fds())
    conn = mux.connect(("slow.test", 1), recorder := Recorder())
    monkeypatch.setattr(_address.Tcp, "configure", aborts)
    until(mux, lambda: recorder.count("close"))
    assert len(open_fds()) == before
    assert mux._timers.next_ns() < 0


def test_a_connection_that_ends_as_it_is_connected_keeps_no_socket(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler, or a finaliser, has aborted it just before it got its socket."""
    cancel = _connect.Attempt.cancel

    def cancel_and_abort(attempt: _connect.Attempt) -> None:
        cancel(attempt)
        if not attempt.conn.closing:
            attempt.conn.abort()

    monkeypatch.setattr(_connect.Attempt, "cancel", cancel_and_abort)
    recorder = Recorder()
    conn = mux.connect(server.getsockname(), recorder)
    with accept(server) as theirs:
        until(mux, lambda: recorder.events)
        mux.poll(0)
        assert recorder.names() == ["close"]
        assert (conn.closed, conn.fileno(), len(list(mux.connections))) == (True, -1, 0)
        assert theirs.recv(1) == b""


def test_drain_gives_up_what_is_not_open(mux: muxcore.Mux, hole: Callable[..., Any]) -> None:
    recorder = Recorder()
    mux.connect(hole(), recorder)
    assert mux.drain(DEADLINE) is True
    assert recorder.names() == ["close"]


def test_drain_sends_what_was_accepted_before_it_is_open(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder = Recorder()
    mux.connect(server.getsockname(), recorder).send(b"last words")
    got: list[bytes] = []

    def read() -> None:
        with accept(server) as sock:
            got.append(read_exactly(sock, 1000))

    reader = threading.Thread(target=read)
    reader.start()
    assert mux.drain(DEADLINE) is True
    reader.join()
    assert got == [b"last words"]
    assert recorder.names() == ["open", "close"]


def test_drain_reports_that_output_was_lost(mux: muxcore.Mux, hole: Callable[..., Any]) -> None:
    mux.connect(hole(), Recorder(), timeouts=SOON).send(b"lost")
    assert mux.drain(DEADLINE) is False


@pytest.mark.parametrize("output", [b"", b"unsent"])
def test_close_of_the_mux_ends_what_is_not_open(backend: str, hole: Callable[..., Any], output: bytes) -> None:
    address = hole()
    before = len(open_fds())
    recorder = Recorder()
    with muxcore.Mux(backend=backend) as mux:
        conn = mux.connect(address, recorder)
        conn.send(output)
        mux.poll(0)
    assert recorder.names() == ["close"]
    assert isinstance(recorder.reason(), muxcore.ConnectionClosed if output else type(None))
    assert conn.closed
    assert len(open_fds()) == before


def test_close_of_the_mux_does_not_wait_for_the_name_server(backend: str, resolver: Resolver) -> None:
    resolver["silent.test"] = threading.Event()
    recorder = Recorder()
    with muxcore.Mux(backend=backend) as mux:
        mux.connect(("silent.test", 1), recorder, timeouts=NEVER)
    assert recorder.names() == ["close"]


def test_the_threads_that_look_up_names_end_with_the_mux(backend: str) -> None:
    before = set(threading.enumerate())
    with muxcore.Mux(backend=backend) as mux:
        recorder = Recorder()
        mux.connect(("localhost", closed_port()[1]), recorder)
        until(mux, lambda: recorder.count("close"))
        threads = [thread for thread in set(threading.enumerate()) - before if "muxcore.names" in thread.name]
        assert len(threads) == 1
        mux.close()
        threads[0].join(5)  # without work it would stay for ten seconds
        assert not threads[0].is_alive()


def test_the_mux_may_be_closed_in_a_callback(backend: str, hole: Callable[..., Any]) -> None:
    recorder = Recorder()
    mux = muxcore.Mux(backend=backend)
    conn = mux.connect(hole(), recorder)
    mux.call_soon(mux.close)
    mux.call_soon(conn.close)
    mux.poll(0)
    assert mux.closed
    assert recorder.names() == ["close"]


def test_a_forgotten_mux_warns_and_leaves_nothing(backend: str, hole: Callable[..., Any]) -> None:
    address = hole()
    before = len(open_fds())
    mux = muxcore.Mux(backend=backend)
    mux.connect(address, Recorder())
    mux.poll(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del mux
        gc.collect()
    assert [warning.category for warning in caught] == [ResourceWarning]
    assert "Mux" in str(caught[0].message)
    assert len(open_fds()) == before


FORKED = """
    import os, socket, sys, gc, warnings, muxcore
    warnings.simplefilter("error")
    server = socket.create_server(("127.0.0.1", 0))
    events = []
    class Handler(muxcore.Handler):
        def on_open(self, conn): events.append("open"); conn.send(b"still here")
        def on_close(self, conn, exc): events.append("close")
    mux = muxcore.Mux(backend=sys.argv[1])
    conn = mux.connect(server.getsockname(), Handler())
    pid = os.fork()
    if pid == 0:
        refused = 0
        for call in (conn.close, conn.abort, lambda: conn.send(b"x"), lambda: mux.connect(("127.0.0.1", 1), Handler())):
            try: call()
            except RuntimeError as error: refused += "fork" in str(error)
        HOW
        os._exit(100 + refused)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 104, status
    while not events: mux.poll(1)
    mux.poll(0)
    sock = server.accept()[0]
    print(sock.recv(100), events)
    sock.close(); server.close()
    mux.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("how", ["mux.close()", "del mux, conn; gc.collect()", "pass"])
def test_a_forked_child_does_not_disturb_the_attempt(backend: str, how: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FORKED).replace("HOW", how), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert (done.stdout, done.stderr) == ("b'still here' ['open']\n", "")


# --- which threads may call, and when --------------------------------------------------------------


def test_other_threads_may_send_and_close_but_not_connect(mux: muxcore.Mux, server: socket.socket) -> None:
    mux.poll(0)
    recorder = Recorder()
    conn = mux.connect(server.getsockname(), recorder)
    refused: list[BaseException] = []

    def foreign() -> None:
        conn.send(b"from ")
        conn.write(b"afar")
        conn.close()
        try:
            mux.connect(server.getsockname(), recorder)
        except RuntimeError as error:
            refused.append(error)

    thread = threading.Thread(target=foreign)
    thread.start()
    thread.join()
    assert len(refused) == 1
    assert conn.closing
    with accept(server) as sock:
        assert receive(mux, sock) == b"from afar"
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "close"]


def test_another_thread_may_abort_it(mux: muxcore.Mux, hole: Callable[..., Any]) -> None:
    mux.poll(0)
    recorder = Recorder()
    conn = mux.connect(hole(), recorder)
    thread = threading.Thread(target=conn.abort)
    thread.start()
    thread.join()
    until(mux, lambda: recorder.events)
    assert recorder.names() == ["close"]


@pytest.mark.parametrize("where", ["message", "close", "timer", "soon"])
def test_connect_may_be_called_in_any_callback(mux: muxcore.Mux, listen: Listen, where: str) -> None:
    target = listen(lambda conn, message: conn.send(message))
    recorder = Recorder()

    def go(*_: Any) -> None:
        mux.connect(target.address, recorder).send(b"hello")

    handler = muxcore.Handler()
    if where in ("message", "close"):
        setattr(handler, f"on_{where}", go)
        sock = socket.create_connection(listen(handler).address)
        sock.sendall(b"x")
        if where == "close":
            reset(sock)
    elif where == "timer":
        mux.call_later(0.001, go)
    else:
        mux.call_soon(go)
    until(mux, lambda: recorder.received() == b"hello")
    if where == "message":
        sock.close()


@pytest.mark.unix_only("Windows needs two seconds for a refusal")
def test_a_client_that_connects_again_in_on_close(mux: muxcore.Mux) -> None:
    address = closed_port()
    reasons: list[Any] = []

    class Stubborn(muxcore.Handler):
        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            reasons.append(exc)
            if len(reasons) < 50:
                mux.connect(address, self)

    mux.connect(address, Stubborn())
    until(mux, lambda: len(reasons) == 50)
    assert {type(reason) for reason in reasons} == {ConnectionRefusedError}
    assert mux.stats().connections == 0


@pytest.mark.parametrize("event", ["open", "message", "close"])
def test_a_handler_that_raises_loses_only_its_connection(
    mux: muxcore.Mux, listen: Listen, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Raises(Recorder):
        pass

    def raising(*args: Any) -> None:
        getattr(Recorder, f"on_{event}")(recorder, *args)
        raise ZeroDivisionError

    recorder = Raises()
    setattr(recorder, f"on_{event}", raising)
    conn = mux.connect(listen(lambda conn, message: conn.send(message)).address, recorder)
    conn.send(b"x")
    if event == "close":
        conn.close()
    until(mux, lambda: recorder.count("close"))
    assert recorder.count("close") == 1
    assert isinstance(conn.error, ZeroDivisionError) is (event != "close")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.skipif("epoll" not in BACKENDS, reason="the other backends cannot be driven")
@pytest.mark.parametrize("backend", ["epoll"])
def test_a_mux_that_another_loop_drives_connects(
    mux: muxcore.Mux, server: socket.socket, resolver: Resolver, hole: Callable[..., Any]
) -> None:
    fd = mux.fileno()
    recorder = Recorder()
    resolver["slow.test"] = [hole(), server.getsockname()]
    mux.connect(closed_port(), recorder)
    mux.connect(("slow.test", 1), recorder)
    while len(recorder.events) < 2:
        assert select.select([fd], (), (), DEADLINE)[0]
        mux.poll(0)
    assert sorted(recorder.names()) == ["close", "open"]


# --- pull style ------------------------------------------------------------------------------------


def test_pull_style_reports_opened_and_then_messages(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(lambda conn, message: conn.send(message))
    conn = mux.connect(listener.address)
    conn.send(b"hello")
    seen, got = 0, b""
    while got != b"hello":
        for one, events in mux.poll(DEADLINE):
            assert one is conn
            assert seen or events & muxcore.OPENED
            seen |= events
            got += b"".join(one)
    assert seen == muxcore.OPENED | muxcore.READABLE


def test_pull_style_reports_a_failure_as_closed_alone(mux: muxcore.Mux) -> None:
    conn = mux.connect(closed_port())
    while not (reported := mux.poll(DEADLINE)):
        pass
    assert reported == [(conn, muxcore.CLOSED)]
    assert isinstance(conn.error, ConnectionRefusedError)
    assert mux.poll(0) == []


def test_run_refuses_a_connection_that_only_poll_serves(mux: muxcore.Mux, server: socket.socket) -> None:
    conn = mux.connect(server.getsockname())
    with pytest.raises(RuntimeError, match="poll"):
        mux.run()
    conn.abort()
    mux.poll(0)
    mux.call_soon(mux.stop)
    mux.run()


# --- limits ----------------------------------------------------------------------------------------


def busy(mux: muxcore.Mux, server: socket.socket, **options: Any) -> tuple[Recorder, muxcore.Connection, socket.socket]:
    """A connection above its high-water mark, whose peer then sends something."""
    recorder = Recorder()
    conn = mux.connect(server.getsockname(), recorder, **options)
    until(mux, lambda: recorder.count("open"))
    sock = accept(server)
    conn.send(bytes(8 << 20))
    assert conn.send(b"") is False
    sock.sendall(b"hello")
    return recorder, conn, sock


@pytest.mark.parametrize("change", [False, True])
def test_autopause_is_off_by_default(mux: muxcore.Mux, server: socket.socket, change: bool) -> None:
    """Promise autopause: two ends that both pause could wait for each other."""
    recorder, conn, sock = busy(mux, server)
    if change:
        conn.limits = muxcore.Limits(high=1000, low=100)
        sock.sendall(b"!")
    until(mux, lambda: recorder.received() == (b"hello!" if change else b"hello"))
    assert recorder.count("drain") == 0
    sock.close()


def test_autopause_may_be_turned_on(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder, conn, sock = busy(mux, server, limits=muxcore.Limits(autopause=True))
    passed: list[int] = []
    mux.call_later(0.05, passed.append, 1)
    until(mux, lambda: passed)
    assert recorder.received() == b""
    conn.set_limits(autopause=None)
    until(mux, lambda: recorder.received() == b"hello")
    sock.close()


def test_two_ends_that_flood_each_other_do_not_wait_for_ever(mux: muxcore.Mux, listen: Listen) -> None:
    size = 4 << 20
    ends = [Recorder(), Recorder()]
    ends[0].on_open = lambda conn: conn.send(bytes(size))  # type: ignore[method-assign]
    mux.connect(listen(ends[0]).address, ends[1]).send(bytes(size))
    until(mux, lambda: all(len(end.received()) == size for end in ends))


def test_idle_and_write_timeouts_begin_when_it_is_open(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder = Recorder()
    mux.connect(server.getsockname(), recorder, timeouts=muxcore.Timeouts(idle=0.05, linger=0))
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "close"]
    assert isinstance(recorder.reason(), muxcore.IdleTimeout)


def test_the_idle_timeout_does_not_count_the_time_before_it_is_open(
    mux: muxcore.Mux, server: socket.socket, resolver: Resolver
) -> None:
    gate = resolver["slow.test"] = threading.Event()
    resolver["late"] = [server.getsockname()]
    recorder = Recorder()
    conn = mux.connect(("slow.test", 1), recorder, timeouts=muxcore.Timeouts(idle=0.6, linger=0))
    mux.call_later(0.7, gate.set)
    until(mux, lambda: recorder.count("open"))
    passed: list[int] = []
    mux.call_later(0.3, passed.append, 1)
    until(mux, lambda: passed)
    assert not conn.closing


def test_closing_has_its_timeout_as_on_any_connection(mux: muxcore.Mux, server: socket.socket) -> None:
    recorder = Recorder()
    conn = mux.connect(server.getsockname(), recorder, timeouts=muxcore.Timeouts(write=0.05))
    conn.send(bytes(16 << 20))
    conn.close()
    with accept(server):
        until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.WriteTimeout)


# --- bad arguments ---------------------------------------------------------------------------------

HERE = ("127.0.0.1", 9)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (TypeError, "address", (5,), {}),
        (TypeError, "address host", ((5, 5),), {}),
        (TypeError, "address port", (("127.0.0.1", "80"),), {}),
        (ValueError, "address port", (("127.0.0.1", 65536),), {}),
        (ValueError, "address host", (("", 80),), {}),
        (ValueError, "address host", ((None, 80),), {}),
        (ValueError, "address host", (("a..b", 80),), {}),
        (ValueError, "address path", ("",), {}),
        (ValueError, "address path", ("x" * 200,), {}),
        (TypeError, "local_address", (HERE,), {"local_address": "127.0.0.1"}),
        (TypeError, "local_address port", (HERE,), {"local_address": ("127.0.0.1", None)}),
        (ValueError, "local_address port", (HERE,), {"local_address": ("127.0.0.1", -1)}),
        (ValueError, "local_address host", (HERE,), {"local_address": ("localhost", 0)}),
        (ValueError, "local_address host", (HERE,), {"local_address": (None, 0)}),
        (ValueError, "local_address", (HERE,), {"local_address": ("::1", 0)}),
        (ValueError, "local_address", ("/a/path",), {"local_address": LOCALHOST}),
        (TypeError, "handler", (HERE, Recorder), {}),
        (TypeError, "framer", (HERE,), {"framer": 5}),
        (TypeError, "keepalive", (HERE,), {"keepalive": "yes"}),
        (ValueError, "keepalive", (HERE,), {"keepalive": 40000}),
        (ValueError, "user_timeout", (HERE,), {"user_timeout": 0}),
        (TypeError, "limits", (HERE,), {"limits": 5}),
        (TypeError, "timeouts", (HERE,), {"timeouts": 30}),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(
    mux: muxcore.Mux, error: type[Exception], match: str, args: Any, options: Any
) -> None:
    if isinstance(args[0], str) and not hasattr(socket, "AF_UNIX"):
        pytest.skip("no Unix sockets")
    before = open_fds()
    with pytest.raises(error, match=f"^{match}"):
        mux.connect(*args, **options)
    assert open_fds() == before
    assert mux.stats().connections == 0


def test_a_framer_that_cannot_be_made_raises_at_connect(mux: muxcore.Mux, server: socket.socket) -> None:
    def broken() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mux.connect(server.getsockname(), framer=broken)
    assert mux.stats().connections == 0
    assert list(mux.connections) == []


def raise_memory_error(*args: Any) -> None:
    raise MemoryError


def test_connect_without_memory_for_the_attempt_leaves_no_connection(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connect.Attempt, "__init__", raise_memory_error)
    with pytest.raises(MemoryError):
        mux.connect(server.getsockname(), recorder := Recorder())
    assert mux.stats().connections == 0
    assert list(mux.connections) == []
    mux.poll(0)
    assert recorder.names() == []


def test_connect_without_memory_for_the_first_step_is_reported(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connect.Attempt, "start", as_of_muxcore(raise_memory_error))
    mux.connect(server.getsockname(), recorder := Recorder())
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), MemoryError)
    assert mux.stats().connections == 0


def test_connect_that_is_interrupted_at_its_first_step_ends(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_connect.Attempt, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mux.connect(server.getsockname(), recorder := Recorder(), timeouts=NEVER)
    until(mux, lambda: recorder.count("close"))
    assert mux.stats().connections == 0


def test_abort_without_memory_to_cancel_the_attempt_is_counted_all_the_same(
    mux: muxcore.Mux, hole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    conn = mux.connect(hole(), recorder := Recorder(), timeouts=NEVER)
    cancel = _connect.Attempt.cancel

    def cannot_yet(attempt: Any) -> None:
        monkeypatch.setattr(_connect.Attempt, "cancel", cancel)
        raise MemoryError

    monkeypatch.setattr(_connect.Attempt, "cancel", cannot_yet)
    with pytest.raises(MemoryError):
        conn.abort()
    until(mux, lambda: recorder.count("close"))
    assert mux.stats().connections == 0


@pytest.mark.unix_only("it uses up descriptors")
def test_the_first_connect_without_a_descriptor_left_is_reported(backend: str) -> None:
    code = f"""
        import os, resource, muxcore
        reasons = []
        class Closes(muxcore.Handler):
            def on_close(self, conn, exc): reasons.append(exc)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        mux = muxcore.Mux(backend={backend!r})
        mux.listen(("127.0.0.1", 0), Closes())  # as a proxy does
        used = []
        try:
            while True:
                used.append(os.dup(0))
        except OSError:
            pass
        mux.connect(("127.0.0.1", 1), Closes())
        mux.poll(1)
        print(type(reasons[0]).__name__, reasons[0].errno)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.stdout.split() == ["OSError", str(errno.EMFILE)], done.stderr


def test_a_closed_mux_does_not_connect(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)
    mux.close()
    with pytest.raises(RuntimeError, match="closed"):
        mux.connect(HERE)


# --- many ------------------------------------------------------------------------------------------


def test_many_at_once(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(lambda conn, message: conn.send(message))
    recorder = Recorder()
    conns = [mux.connect(listener.address, recorder) for _ in range(80)]
    for number, conn in enumerate(conns):
        conn.send(b"%d" % number)
    until(mux, lambda: recorder.count("message") == 80)
    for number, conn in enumerate(conns):
        assert recorder.received(conn.id) == b"%d" % number
        conn.close()
    until(mux, lambda: mux.stats().connections == 0)
    assert recorder.count("open") == recorder.count("close") == 80


def test_both_ends_on_one_mux_lose_nothing(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(lambda conn, message: conn.send(message))
    recorder = Recorder()
    data = pattern(8 << 20)
    conn = mux.connect(listener.address, recorder)
    conn.send(data)
    conn.write_eof()
    until(mux, lambda: recorder.count("close"))
    assert recorder.received() == data
    assert recorder.reason() is None


# --- interrupts ------------------------------------------------------------------------------------


def test_a_name_that_was_found_is_left_alone(mux: muxcore.Mux, server: socket.socket, resolver: Resolver) -> None:
    resolver["found.test"] = [server.getsockname()]
    mux.connect(("found.test", 1), recorder := Recorder())
    until(mux, lambda: recorder.count("open"))
    mux.poll(0.01)
    start = mux.time()
    mux.poll(0.05)
    assert mux.time() - start >= 0.05, "no spin"


def test_a_name_that_no_thread_can_look_up_is_reported(
    mux: muxcore.Mux, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolver["found.test"] = []
    monkeypatch.setattr(threading.Thread, "start", as_of_muxcore(fails))
    error = failure(mux, ("found.test", 1))
    assert isinstance(error, RuntimeError)
    assert "can't start new thread" in str(error)
    assert not mux._names.lookups


def test_an_interrupt_in_a_step_leaves_poll_and_ends_the_attempt(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(_connect, "connected_peer", interrupted)
    conn = mux.connect(server.getsockname(), recorder := Recorder())
    with pytest.raises(KeyboardInterrupt) as raised:
        until(mux, lambda: False)
    until(mux, lambda: recorder.count("close"))
    assert isinstance(conn.error, KeyboardInterrupt)
    assert raised.value is not conn.error
    assert conn.error.__traceback__ is None, "what is kept has no frames, and the other one goes on with its own"
    assert "interrupted" in [entry.name for entry in raised.traceback]


@pytest.mark.parametrize("timeouts", [NEVER, muxcore.Timeouts()], ids=["for ever", "30 s"])
def test_an_interrupted_turn_leaves_those_alone_that_wait_for_a_name(
    mux: muxcore.Mux, server: socket.socket, resolver: Resolver, timeouts: muxcore.Timeouts
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    gate = resolver["slow.test"] = threading.Event()
    resolver["late"] = [server.getsockname()]
    mux.connect(("slow.test", 1), recorder := Recorder(), timeouts=timeouts)
    mux.call_soon(interrupted)
    with pytest.raises(KeyboardInterrupt):
        mux.poll(0)
    mux.poll(0.01)
    assert recorder.events == []
    gate.set()
    until(mux, lambda: recorder.count("open"))


def test_an_attempt_that_is_interrupted_twice_is_reported(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel, fail = _connect.Attempt.cancel, _connect.Attempt.fail

    def cancel_and_interrupt(attempt: Any) -> None:
        monkeypatch.setattr(_connect.Attempt, "cancel", cancel)
        cancel(attempt)
        raise KeyboardInterrupt

    def interrupted(attempt: Any, error: BaseException) -> None:
        monkeypatch.setattr(_connect.Attempt, "fail", fail)
        raise KeyboardInterrupt

    monkeypatch.setattr(_connect.Attempt, "cancel", cancel_and_interrupt)
    monkeypatch.setattr(_connect.Attempt, "fail", interrupted)
    mux.connect(server.getsockname(), recorder := Recorder())
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.ConnectionClosed)


def interrupt_a_turn(mux: muxcore.Mux) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    mux.call_soon(interrupted)
    with pytest.raises(KeyboardInterrupt):
        mux.poll(0)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Interrupt the next step of that name before it begins."""
    names: list[str] = []
    step = _connect.Attempt.step

    def interrupted(self: Any, fn: Callable[..., object], *args: Any) -> None:
        if fn.__name__ in names:
            names.remove(fn.__name__)
            raise KeyboardInterrupt
        step(self, fn, *args)

    monkeypatch.setattr(_connect.Attempt, "step", interrupted)
    return names.append


def test_a_timeout_whose_step_was_interrupted_is_reported(
    mux: muxcore.Mux, hole: Callable[..., Any], interrupt: Callable[[str], None]
) -> None:
    interrupt("timed_out")
    mux.connect(hole(), recorder := Recorder(), timeouts=SOON)
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    until(mux, lambda: recorder.count("close"), 5)
    assert isinstance(recorder.reason(), muxcore.ConnectTimeout)


def test_a_name_whose_step_was_interrupted_is_connected_to(
    mux: muxcore.Mux, server: socket.socket, resolver: Resolver, interrupt: Callable[[str], None]
) -> None:
    interrupt("resolved")
    resolver["found.test"] = [server.getsockname()]
    mux.connect(("found.test", 1), recorder := Recorder())
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    until(mux, lambda: recorder.count("open"), 5)


def test_a_next_address_whose_step_was_interrupted_is_tried(
    mux: muxcore.Mux, server: socket.socket, resolver: Resolver, hole: Callable[..., Any],
    interrupt: Callable[[str], None],
) -> None:
    interrupt("try_next")
    resolver["slow.test"] = [hole(), server.getsockname()]
    mux.connect(("slow.test", 1), recorder := Recorder())
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    until(mux, lambda: recorder.count("open"), 5)


def test_a_connect_that_was_interrupted_twice_ends_after_an_interrupted_turn(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_connect.Attempt, "start", interrupted)
        patch.setattr(_connect.Attempt, "fail", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mux.connect(server.getsockname(), recorder := Recorder())
    interrupt_a_turn(mux)
    until(mux, lambda: recorder.count("close"), 5)


def test_an_interrupted_turn_tries_no_address_twice(
    mux: muxcore.Mux, resolver: Resolver, hole: Callable[..., Any], tried: list[Any]
) -> None:
    resolver["slow.test"] = [hole()]
    mux.connect(("slow.test", 1), Recorder())
    until(mux, lambda: tried)
    interrupt_a_turn(mux)
    mux.poll(0)
    assert len(tried) == 1


def test_a_name_that_was_found_twice_is_tried_once(
    mux: muxcore.Mux, hole: Callable[..., Any], tried: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted turn looks for it before the call of the resolver's thread is there."""
    found, late = threading.Event(), list[Callable[[], object]]()

    def look_up(names: _connect.Names, lookup: _connect.Lookup) -> None:
        lookup.targets, lookup.done = [(socket.AF_INET, address)], True
        late.append(partial(names.finish, lookup))
        found.set()

    address = hole()
    monkeypatch.setattr(_connect.Names, "look_up", look_up)
    mux.connect(("found.test", 1), recorder := Recorder())
    assert found.wait(DEADLINE)
    interrupt_a_turn(mux)
    until(mux, lambda: tried)
    mux.call_soon(late[0])
    mux.poll(0)
    mux.poll(0)
    assert (len(tried), recorder.events) == (1, [])


def test_a_connect_whose_end_was_interrupted_keeps_its_reason(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    def interrupted(*args: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(type(mux), "_connected", as_of_muxcore(out_of_memory))
    monkeypatch.setattr(type(mux), "_connect_failed", interrupted)
    mux.connect(server.getsockname(), recorder := Recorder())
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    until(mux, lambda: recorder.count("close"))
    reason = recorder.reason()
    assert isinstance(reason, OSError)
    assert reason.errno == errno.ENOMEM


def test_an_interrupt_before_a_socket_is_let_go_of_closes_it_once(
    mux: muxcore.Mux, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting:
        @staticmethod
        def detach(sock: socket.socket) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

    before = len(open_fds())
    monkeypatch.setattr(_connect, "SocketType", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        mux.connect(server.getsockname(), recorder := Recorder())
    until(mux, lambda: recorder.count("close"))
    assert len(open_fds()) == before


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("file", ["_connect.py", "_pool.py", "_mux.py"])
@pytest.mark.parametrize("to", ["literal", "name", "refused"])
def test_an_interrupt_at_any_line_leaves_no_attempt_undecided_and_no_descriptor(
    backend: str, server: socket.socket, file: str, to: str
) -> None:
    port = server.getsockname()[1]
    address = {"literal": ("127.0.0.1", port), "name": ("localhost", port), "refused": ("127.0.0.1", 1)}[to]
    server.setblocking(False)
    at, undone = 0, False
    while not undone:
        at += 1
        undone = connect_interrupted(backend, address, InterruptAt(file, at))
        with suppress(BlockingIOError):
            server.accept()[0].close()


def connect_interrupted(backend: str, address: Any, interrupt: InterruptAt) -> bool:
    """Connect and end; whether that had no such line."""
    recorder, descriptors = Recorder(), set(open_fds())
    with muxcore.Mux(backend=backend) as mux:
        interrupt.during(lambda: mux.connect(address, recorder))
        while mux.stats().connections and not recorder.events:
            interrupt.during(lambda: mux.poll(0.02))
        for conn in mux.connections:
            conn.abort()
        interrupt.during(lambda: mux.poll(0))
        until(mux, lambda: not mux.stats().connections)
    if set(open_fds()) != descriptors:
        gc.collect()
    assert set(open_fds()) == descriptors
    return interrupt.left > 0
