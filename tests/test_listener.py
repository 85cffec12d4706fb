"""Listener: addresses, accepting, running out of descriptors, max_connections (Promises accepting, max-connections)."""

from __future__ import annotations

import errno
import gc
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import LOCALHOST, InterruptAt, Recorder, client, exchange, open_fds, receive, reset, settle, turns, until

import muxcore
from muxcore._address import KEEPALIVE_IDLE
from muxcore._impl import BACKENDS

Listen = Callable[..., muxcore.Listener]


def echo() -> Recorder:
    return Recorder(reply=lambda message: message)


# --- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "connect_to"),
    [
        (("127.0.0.1", 0), "127.0.0.1"),
        (("localhost", 0), "127.0.0.1"),
        (("::1", 0), "::1"),
        (("::1", 0, 0, 0), "::1"),
        ((None, 0), "127.0.0.1"),
        ((None, 0), "::1"),
        (("", 0), "127.0.0.1"),
    ],
)
def test_listens_at_its_address(mux: muxcore.Mux, address: Any, connect_to: str) -> None:
    listener = mux.listen(address, echo())
    port = listener.address[1]
    assert port > 0
    with socket.create_connection((connect_to, port)) as sock:
        assert exchange(mux, sock, b"hello") == b"hello"
        [conn] = mux.connections
        assert conn.peer[1] == sock.getsockname()[1]
        assert conn.peer[0].removeprefix("::ffff:") == connect_to
        if conn.local[0] == "::1":
            assert conn.peer == sock.getsockname()


def test_listens_on_an_ipv6_name_only_for_ipv6(mux: muxcore.Mux) -> None:
    listener = mux.listen(("::", 0), echo())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.address[1]))


LINK_LOCAL = """
import muxcore, socket, subprocess, sys
for command in ("ip link set lo up", "ip address add fe80::1/64 dev lo nodad"):
    if subprocess.run(command.split()).returncode: sys.exit("no link-local address")
zone = socket.if_nametoindex("lo")
with muxcore.Mux(backend=sys.argv[1]) as mux, socket.socket(socket.AF_INET6) as sock:
    listener = mux.listen(("fe80::1", 0, 0, zone))
    sock.connect(listener.address)
    while not mux.stats().connections: mux.poll(1)
    [conn] = mux.connections
    assert listener.address[3] == zone
    assert conn.peer == sock.getsockname() == ("fe80::1", sock.getsockname()[1], 0, zone), conn.peer
    assert conn.local == listener.address, conn.local
"""


@pytest.mark.linux_only("network namespaces")
def test_the_zone_of_a_link_local_peer_is_in_its_address(backend: str) -> None:
    namespace = ["unshare", "--net", "--map-root-user"]
    if any(shutil.which(name) is None for name in ("unshare", "ip")) or subprocess.call([*namespace, "true"]):
        pytest.skip("no network namespace can be made here")
    command = [*namespace, sys.executable, "-c", LINK_LOCAL, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    if "no link-local address" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def test_listens_on_an_existing_socket(mux: muxcore.Mux) -> None:
    sock = socket.socket()
    sock.bind(LOCALHOST)
    address = sock.getsockname()
    listener = mux.listen(sock, echo())
    assert listener.address == address
    assert sock.fileno() == -1, "the Mux owns it now"
    with client(listener) as other:
        assert exchange(mux, other, b"x") == b"x"


@pytest.mark.unix_only("Windows refuses it with an OSError")
@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_an_unbound_socket_is_refused_and_stays_the_callers(mux: muxcore.Mux, family: str) -> None:
    """The kernel would select a port, on all addresses of the machine."""
    with socket.socket(getattr(socket, family)) as sock:
        with pytest.raises(ValueError, match=r"address must be a bound socket: call its bind\(\) first"):
            mux.listen(sock, echo())
        assert sock.fileno() >= 0
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@pytest.mark.linux_only("abstract names")
def test_listens_on_a_socket_with_an_abstract_name_of_the_kernels_choice(mux: muxcore.Mux) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")
    with client(mux.listen(sock, echo())) as other:
        assert exchange(mux, other, b"x") == b"x"


def test_listens_on_a_path_and_removes_it(mux: muxcore.Mux, socket_path: Path) -> None:
    listener = mux.listen(socket_path, echo())
    with client(listener) as sock:
        assert exchange(mux, sock, b"x") == b"x"
        [conn] = mux.connections
        assert conn.peer == ""
    listener.close()
    assert not socket_path.exists()


class PathOfBytes(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"path"


@pytest.mark.parametrize(
    ("address", "error", "match"),
    [
        (5, TypeError, "address must be"),
        (("127.0.0.1",), TypeError, "address must be"),
        (("127.0.0.1", 0, 0), TypeError, "address must be"),
        ((5, 0), TypeError, "address host must be"),
        (("127.0.0.1", "80"), TypeError, "address port must be an int"),
        (("127.0.0.1", True), TypeError, "address port must be an int"),
        (("127.0.0.1", 65536), ValueError, "address port must be in"),
        (("127.0.0.1", -1), ValueError, "address port must be in"),
        (("::1", 0, -1, 0), ValueError, "address flowinfo"),
        (("::1", 0, 0, 1 << 32), ValueError, "address scope_id"),
        ("", ValueError, "address path must not be empty"),
        ("x" * 200, ValueError, r"at most \d+ bytes"),
        (PathOfBytes(), TypeError, "address path must be str, not bytes"),
        (b"path", TypeError, "address must be"),
        (("no such host.invalid", 0), socket.gaierror, "cannot resolve address host"),
        (("x" * 70, 0), ValueError, "address host"),
        pytest.param(
            "/no/such/directory/socket",
            FileNotFoundError,
            "cannot listen on '/no/such/directory/socket': No such file or directory",
            marks=pytest.mark.unix_only("Unix sockets"),
        ),
    ],
)
def test_a_bad_address_is_named(mux: muxcore.Mux, address: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        mux.listen(address, echo())


def test_what_the_system_does_not_have_is_named(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AF_UNIX", "SO_REUSEPORT"):
        monkeypatch.delattr(socket, name, raising=False)
    with pytest.raises(ValueError, match="no Unix sockets"):
        mux.listen("path", echo())
    with pytest.raises(ValueError, match="no SO_REUSEPORT"):
        mux.listen(LOCALHOST, echo(), reuse_port=True)
    assert mux.listen(LOCALHOST, echo()).address[1] > 0


def test_a_port_in_use_is_named(mux: muxcore.Mux, listen: Listen) -> None:
    used = listen(echo()).address
    with pytest.raises(OSError, match=rf"cannot listen on \('127.0.0.1', {used[1]}\)") as caught:
        mux.listen(used, echo())
    assert caught.value.errno == errno.EADDRINUSE


def test_a_port_is_listened_on_again_while_the_kernel_keeps_its_last_connections(
    mux: muxcore.Mux, listen: Listen
) -> None:
    """The end that closes first is in TIME_WAIT for a minute."""
    recorder = Recorder()
    listener = listen(recorder)
    with client(listener) as sock:
        until(mux, lambda: recorder.connections)
        recorder.connections[0].close()
        assert receive(mux, sock) == b""
    until(mux, lambda: recorder.count("close"))
    listener.close()
    assert mux.listen(listener.address, echo()).address == listener.address


def test_a_datagram_socket_is_refused_and_stays_the_callers(mux: muxcore.Mux) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        with pytest.raises(ValueError, match="address must be a stream socket"):
            mux.listen(sock, echo())
        assert sock.fileno() >= 0


@pytest.mark.unix_only("os.get_blocking")
def test_its_socket_is_nonblocking(mux: muxcore.Mux) -> None:
    given = socket.socket()
    given.bind(LOCALHOST)
    for address in (LOCALHOST, given):
        assert not os.get_blocking(mux.listen(address, echo()).fileno())


@pytest.mark.unix_only("SO_REUSEPORT")
def test_reuse_port_lets_two_listeners_share(mux: muxcore.Mux, listen: Listen) -> None:
    one = listen(echo(), reuse_port=True)
    two = mux.listen(one.address, echo(), reuse_port=True)
    assert one.address == two.address


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"handler": Recorder}, TypeError, r"pass Recorder\(\)"),
        ({"handler": 5}, TypeError, "handler must be"),
        ({"framer": 5}, TypeError, "framer must be"),
        ({"backlog": -1}, ValueError, "backlog must be >= 0"),
        ({"backlog": None}, TypeError, "backlog must be an int"),
        ({"max_connections": 0}, ValueError, "max_connections must be >= 1"),
        ({"keepalive": -1}, ValueError, "keepalive"),
        ({"keepalive": 40_000}, ValueError, "keepalive must be <= 32767"),
        ({"user_timeout": 0}, ValueError, "user_timeout must be > 0"),
        ({"user_timeout": "1"}, TypeError, "user_timeout must be a number of seconds"),
        ({"limits": 65536}, TypeError, "limits must be a muxcore.Limits"),
        ({"timeouts": 5.0}, TypeError, "timeouts must be a muxcore.Timeouts"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_bad_options_are_named(mux: muxcore.Mux, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        mux.listen(LOCALHOST, **options)


def test_a_coroutine_function_is_refused(mux: muxcore.Mux) -> None:
    async def handler(conn: muxcore.Connection, message: bytes) -> None: ...

    with pytest.raises(TypeError, match="not a coroutine function"):
        mux.listen(LOCALHOST, handler)


def test_options_reach_the_accepted_socket(mux: muxcore.Mux, listen: Listen) -> None:
    for nodelay in (True, False):
        recorder = Recorder()
        with client(listen(recorder, nodelay=nodelay, keepalive=77)):
            until(mux, lambda recorder=recorder: recorder.connections)
            [conn] = recorder.connections
            assert bool(conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) == nodelay
            assert conn.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert conn.getsockopt(socket.IPPROTO_TCP, KEEPALIVE_IDLE) == 77
            assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 5
            assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3


def test_the_longest_keepalive_is_accepted(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder, keepalive=32767)):
        until(mux, lambda: recorder.connections)
        assert recorder.connections[0].getsockopt(socket.IPPROTO_TCP, KEEPALIVE_IDLE) == 32767


@pytest.mark.linux_only("EPOLLEXCLUSIVE")
@pytest.mark.parametrize("exclusive", [False, True])
def test_exclusive_is_passed_to_the_kernel(exclusive: bool) -> None:
    if "epoll" not in BACKENDS:
        pytest.skip("the fallback has no counterpart")
    with muxcore.Mux(backend="epoll") as mux:
        listener = mux.listen(LOCALHOST, echo(), exclusive=exclusive)
        with muxcore.Epoll.fromfd(os.dup(mux.fileno())) as same:
            try:
                same.modify(listener, select.EPOLLIN)
            except OSError:  # the kernel lets no program modify an exclusive registration
                refused = True
            else:
                refused = False
    assert refused == exclusive


def test_exclusive_listens_pauses_and_resumes(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(echo(), exclusive=True, max_connections=1)
    with client(listener) as one, client(listener) as two:
        assert exchange(mux, one, b"1") == b"1"
        one.close()
        assert exchange(mux, two, b"2") == b"2"


def test_close_stops_listening_and_connections_live_on(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(echo())
    with client(listener) as sock:
        assert exchange(mux, sock, b"x") == b"x"
        listener.close()
        listener.close()
        assert (listener.closed, listener.fileno(), listener.connections) == (True, -1, 1)
        with pytest.raises(ConnectionRefusedError):
            client(listener)
        assert exchange(mux, sock, b"y") == b"y"


def test_a_listener_may_be_closed_from_its_own_callback(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    recorder.on_open = lambda conn: conn.listener.close()  # type: ignore[method-assign, union-attr]
    listener = listen(recorder)
    socks = [client(listener) for _ in range(3)]
    until(mux, lambda: listener.closed)
    assert (mux.stats().accepts, mux.stats().accept_pauses) == (1, 0)
    for sock in socks:
        sock.close()


def test_accepts_more_than_one_batch(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(echo())
    socks = [client(listener) for _ in range(100)]  # macOS has a backlog of 128 at most
    until(mux, lambda: listener.connections == 100)
    for sock in socks:
        sock.close()
    until(mux, lambda: listener.connections == 0)


@pytest.mark.unix_only("the lowest free descriptor is the next one")
@pytest.mark.parametrize("handler", [echo(), None], ids=["handler", "pull"])
def test_a_descriptor_closed_by_other_code_ends_its_listener(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture, handler: Recorder | None
) -> None:
    listener = listen(handler)
    os.close(listener.fileno())
    ours, theirs = socket.socketpair()  # ours reuses the number
    assert ours.fileno() == listener.fileno()
    mux.attach(ours, echo())
    assert listener.closed
    mux.poll(0)
    assert "closed by other code" in caplog.text
    listener.close()
    assert exchange(mux, theirs, b"mine") == b"mine"
    theirs.close()
    mux.stop()
    mux.run()  # it would refuse a listener that waits for poll()


# --- Promise accepting -----------------------------------------------------------------------------


def test_max_connections_leaves_further_clients_in_the_backlog(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(echo(), max_connections=2)
    socks = [client(listener) for _ in range(4)]
    until(mux, lambda: listener.connections == 2)
    settle(mux)
    assert turns(mux, 0.05) == 0, "no spin while the backlog is not empty"
    for sock in socks:
        assert exchange(mux, sock, b"my turn") == b"my turn"
        assert listener.connections <= 2
        sock.close()
    until(mux, lambda: listener.connections == 0)
    assert mux.stats().accepts == 4


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """Let this process open only `spare` more descriptors."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as probe:
        lowest_free = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.unix_only("resource limits")
def test_out_of_descriptors_the_listener_pauses_and_connections_are_served(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    listener = listen(echo())
    mux.poll(0)
    family = [socket.socket() for _ in range(4)]
    with few_descriptors(2):
        for sock in family:
            sock.connect(listener.address)
        until(mux, lambda: mux.stats().accept_pauses)
        served = [sock for sock in family if sock.getsockname() in {conn.peer for conn in mux.connections}]
        assert len(served) == 2
        before = mux.stats().events
        for _ in range(20):
            for sock in served:
                assert exchange(mux, sock, b"x") == b"x"
        assert mux.stats().events - before <= 2 * 20 + 10, "no spin: 8,400 wakeups in 20 ms were seen without the rest"
        served[0].close()
        waiting = [sock for sock in family if sock not in served]
        started = time.monotonic()
        until(mux, lambda: mux.stats().accepts >= 3)
        assert time.monotonic() - started < 0.9, "it resumes as soon as a connection closes"
    for sock in waiting:
        assert exchange(mux, sock, b"y") == b"y"
    for sock in family:
        sock.close()
    assert len([record for record in caplog.records if "accept failed" in record.message]) == 1, "once per episode"


@pytest.mark.unix_only("resource limits")
def test_the_pause_after_emfile_ends_by_itself(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    listener = listen(echo())
    mux.poll(0)
    with socket.socket() as sock:
        with few_descriptors(0):
            sock.connect(listener.address)
            until(mux, lambda: mux.stats().accept_pauses >= 3)
        assert exchange(mux, sock, b"finally") == b"finally"


def test_clients_that_leave_before_they_are_accepted_do_no_harm(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = echo()
    listener = listen(recorder)
    for i in range(50):
        sock = client(listener)
        reset(sock) if i % 2 else sock.close()
    with client(listener) as sock:
        assert exchange(mux, sock, b"x") == b"x"
    until(mux, lambda: mux.stats().connections == 0)
    assert recorder.count("open") == recorder.count("close") == mux.stats().accepts


def test_a_full_listener_that_is_closed_never_resumes(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    listener = listen(recorder, max_connections=1)
    with client(listener), client(listener):
        until(mux, lambda: mux.stats().accept_pauses)
        listener.close()
        recorder.connections[0].abort()
        turns(mux, 0.05)
        assert mux.stats().accept_pauses == 1
    assert not caplog.records


def test_nothing_is_accepted_once_a_callback_has_closed_the_mux(backend: str) -> None:
    with muxcore.Mux(backend=backend) as mux:

        class Closes(Recorder):
            def on_open(self, conn: muxcore.Connection) -> None:
                super().on_open(conn)
                mux.close()

        recorder = Closes()
        listener = mux.listen(LOCALHOST, recorder)
        socks = [client(listener) for _ in range(3)]
        mux.poll(1)
        assert mux.closed
    assert recorder.names() == ["open", "close"]
    for sock in socks:
        sock.close()


@pytest.mark.unix_only("resource limits")
def test_a_listener_that_was_woken_hears_no_more_of_its_pause(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    listener = listen(recorder)
    with client(listener), socket.socket() as waiting:
        until(mux, lambda: recorder.connections)
        with few_descriptors(0):
            waiting.connect(listener.address)
            until(mux, lambda: mux.stats().accept_pauses)
        recorder.connections[0].abort()
        until(mux, lambda: recorder.count("open") == 2)
        turns(mux, 0.03)
    assert mux.stats().handler_errors == 0
    assert "accept failed, pausing" in caplog.text
    assert "not expected" not in caplog.text


@pytest.mark.linux_only("shutdown and listen of a listening socket")
def test_an_accept_that_fails_for_no_known_reason_is_tried_again(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    listener = listen(echo())
    with listener.dup() as same:
        same.shutdown(socket.SHUT_RD)
        until(mux, lambda: mux.stats().accept_pauses)
        assert "accept(2) does not document this error; muxcore will retry" in caplog.text
        same.listen()  # at another port: the shutdown has given that one up
        with socket.create_connection(same.getsockname()) as sock:
            assert exchange(mux, sock, b"again") == b"again"


def test_a_listener_that_has_rested_is_gone_once_it_is_closed(mux: muxcore.Mux, listen: Listen) -> None:
    listener = listen(echo(), max_connections=1)
    for _ in range(2):
        with client(listener) as one, client(listener) as two:
            assert exchange(mux, one, b"1") == b"1"
            one.close()
            assert exchange(mux, two, b"2") == b"2"
        until(mux, lambda: listener.connections == 0)
    listener.close()
    settle(mux)
    gone = weakref.ref(listener)
    listener = listen(echo())
    gc.collect()
    assert gone() is None


# --- hostile clients -------------------------------------------------------------------------------


def test_hostile_clients_do_not_disturb_a_bystander(mux: muxcore.Mux, listen: Listen) -> None:
    """Garbage, a flood that is never read, byte at a time, RST at any moment, SYN and leave: all at once."""
    listener = listen(echo())
    bystander = client(listener)
    flood, slow = client(listener), client(listener)
    flood.settimeout(0)
    trickle = bytes(range(256))
    for i in range(200):
        try:
            flood.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        slow.send(trickle[i : i + 1])
        visitor = client(listener)
        if i % 4:
            visitor.send(trickle * (i % 7))
        reset(visitor) if i % 2 else visitor.close()
        data = b"%d " % i * 20
        assert exchange(mux, bystander, data) == data
    assert receive(mux, slow, 200) == trickle[:200]
    for sock in (bystander, flood, slow):
        sock.close()
    until(mux, lambda: mux.stats().connections == 0)
    assert mux.stats().handler_errors == 0


# --- against mutants that survived (tests/mutants) ------------------------------------------------------


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_client_that_is_gone_before_it_is_accepted_has_an_address(mux: muxcore.Mux, host: str, family: int) -> None:
    recorder = Recorder()
    listener = mux.listen((host, 0), recorder)
    sock = client(listener)
    address = sock.getsockname()
    reset(sock)
    until(mux, lambda: recorder.count("close"))
    assert recorder.connections[0].peer == address


@pytest.mark.linux_only("elsewhere a client without a name has other addresses")
def test_a_client_with_a_name_behind_one_without_has_its_name(mux: muxcore.Mux, socket_path: Path) -> None:
    recorder = Recorder()
    listener = mux.listen(socket_path, recorder)
    name = f"{socket_path}-client"
    one = client(listener)
    with socket.socket(socket.AF_UNIX) as two:
        two.bind(name)
        two.connect(listener.address)
        until(mux, lambda: len(recorder.connections) == 2)
        assert [conn.peer for conn in recorder.connections] == ["", name]
        one.close()
    os.unlink(name)  # noqa: PTH108


@pytest.mark.unix_only("the lowest free descriptor is the next one")
def test_a_listener_that_loses_its_descriptor_while_it_accepts_does_not_accept_again(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    theirs: list[socket.socket] = []

    def lose(conn: muxcore.Connection) -> None:
        os.close(listener.fileno())
        ours, their = socket.socketpair()
        theirs.append(their)
        mux.attach(ours, Recorder())

    recorder.on_open = lose  # type: ignore[method-assign]
    if mux.backend != "epoll":
        pytest.skip("there a socket object is still at work on it")
    listener = listen(recorder)
    socks = [client(listener) for _ in range(3)]
    until(mux, lambda: theirs)
    mux.poll(0)
    assert listener.closed
    assert [record for record in caplog.records if "accept failed" in record.message] == []
    for sock in socks + theirs:
        sock.close()


def test_an_interrupted_dup_leaves_no_descriptor(mux: muxcore.Mux, listen: Listen) -> None:
    """The fixture counts them."""
    listener = listen(echo())
    InterruptAt("_own.py", 1).during(lambda: listener.dup().close())
    assert not listener.closed


def test_a_listener_is_not_made_by_hand() -> None:
    descriptors = open_fds()
    for make in (muxcore.Listener, lambda: muxcore.Listener.__new__(muxcore.Listener)):
        with pytest.raises(TypeError, match=r"listeners are made by Mux\.listen"):
            make()
    assert open_fds() == descriptors, "what was not made closes none"


@pytest.mark.unix_only("dup2")
def test_a_full_listener_that_loses_its_descriptor_while_it_accepts_does_not_pause(
    mux: muxcore.Mux, listen: Listen
) -> None:
    theirs: list[socket.socket] = []

    def lose(conn: muxcore.Connection) -> None:
        number = listener.fileno()
        ours, their = socket.socketpair()
        theirs.append(their)
        os.dup2(ours.fileno(), number)
        ours.close()
        mux.attach(socket.socket(fileno=number), Recorder())

    recorder = Recorder()
    recorder.on_open = lose  # type: ignore[method-assign]
    listener = listen(recorder, max_connections=1)
    with client(listener):
        until(mux, lambda: theirs)
        assert (listener.closed, mux.stats().accept_pauses) == (True, 0)
    until(mux, lambda: listener.connections == 0)
    assert listener.closed
    theirs[0].close()


def interrupted_at(backend: str, file: str, at: int, phase: str) -> bool:
    """A listener that may have one connection begins to rest, or goes on, with an interrupt at a line of that file;
    whether there were so many."""
    recorder = Recorder()
    with muxcore.Mux(backend=backend) as mux:
        listener = mux.listen(LOCALHOST, recorder, max_connections=1)
        with client(listener) as one, client(listener):
            interrupt = InterruptAt(file, at, lambda: recorder.connections)
            if phase == "begins":
                interrupt.during(lambda: until(mux, lambda: mux.stats().accept_pauses))
            until(mux, lambda: mux.stats().accept_pauses)
            one.close()
            if phase == "ends":
                interrupt.during(lambda: until(mux, lambda: recorder.count("close")))
            until(mux, lambda: recorder.count("open") == 2, 5)
        until(mux, lambda: recorder.count("close") == 2)
        listener.close()
        assert mux._listeners() == []
    return interrupt.left <= 0


@pytest.mark.parametrize("backend", ["select", "poll"])
@pytest.mark.parametrize("phase", ["begins", "ends"])
@pytest.mark.parametrize("file", ["_fallback/listener.py", "_fallback/slots.py", "_fallback/mux.py"])
def test_an_interrupt_while_a_pause_begins_or_ends_leaves_no_listener_paused(
    backend: str, file: str, phase: str
) -> None:
    at = 1
    while interrupted_at(backend, file, at, phase):
        at += 1


@pytest.mark.unix_only("descriptors of sockets are closed as others are")
@pytest.mark.parametrize("name", ["poll", "select"])
def test_a_listener_whose_descriptor_was_closed_is_given_up_where_that_is_reported(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with muxcore.Mux(backend=name) as mux:
        listener = mux.listen(LOCALHOST, echo())
        mux.poll(0)
        number = listener.fileno()
        os.close(number)
        until(mux, lambda: listener.closed)
        mux.poll(0)
        assert f"lost its descriptor: descriptor {number} was closed" in caplog.text
        assert turns(mux, 0.05) == 0
        assert len(caplog.records) == 1


def test_a_signal_handler_that_closes_a_listener_amid_an_accept_is_no_error(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    if mux.backend == "epoll":
        pytest.skip("there no line of Python is between the look at the socket and accept")
    listener = listen(echo())

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == "_on_ready" and "ours" in frame.f_locals and not listener.closed:
            listener.close()  # as a signal handler would, between two lines
        return trace

    with client(listener):
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            until(mux, lambda: listener.closed)
        finally:
            sys.settrace(before)
        assert turns(mux, 0.05) == 0
    assert not caplog.records
    assert mux.stats().accept_pauses == 0


@pytest.mark.unix_only("resource limits")
def test_each_time_without_descriptors_is_logged(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    listener = listen(echo())
    mux.poll(0)
    for count in (1, 2):
        with socket.socket() as sock:
            pauses = mux.stats().accept_pauses
            with few_descriptors(0):
                sock.connect(listener.address)
                until(mux, lambda pauses=pauses: mux.stats().accept_pauses > pauses)
            assert exchange(mux, sock, b"x") == b"x"
        until(mux, lambda: mux.stats().connections == 0)
        settle(mux)
        assert len([record for record in caplog.records if "accept failed" in record.message]) == count


@pytest.mark.unix_only("the mode of a descriptor")
def test_accepted_connections_are_nonblocking(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder()
    with client(listen(recorder)):
        until(mux, lambda: recorder.connections)
        assert not os.get_blocking(recorder.connections[0].fileno())


@pytest.mark.unix_only("resource limits")
def test_a_listener_that_is_closed_while_it_pauses_is_gone_at_once(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    listener = listen(echo())
    mux.poll(0)
    with socket.socket() as sock, few_descriptors(0):
        sock.connect(listener.address)
        until(mux, lambda: mux.stats().accept_pauses)
        listener.close()
        assert mux._listeners() == []
        turns(mux, 0.05)  # the rest is over meanwhile
    assert (mux.stats().accept_pauses, mux.stats().handler_errors) == (1, 0)
    assert len(caplog.records) == 1


def test_a_full_listener_is_not_woken_by_the_end_of_another_ones_connection(
    mux: muxcore.Mux, listen: Listen
) -> None:
    full, other = listen(echo(), max_connections=1), listen(echo())
    with client(full) as one, client(full) as two:
        assert exchange(mux, one, b"1") == b"1"
        until(mux, lambda: mux.stats().accept_pauses)
        with client(other) as sock:
            assert exchange(mux, sock, b"x") == b"x"
        until(mux, lambda: not other.connections)
        turns(mux, 0.02)
        assert mux.stats().accept_pauses == 1
        one.close()
        assert exchange(mux, two, b"2") == b"2"


@pytest.mark.linux_only("abstract names")
def test_a_client_with_an_abstract_name_is_shown_as_listen_accepts_it(mux: muxcore.Mux, socket_path: Path) -> None:
    recorder = Recorder()
    listener = mux.listen(socket_path, recorder)
    name = f"\0{socket_path}-client"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(name)
        sock.connect(listener.address)
        until(mux, lambda: recorder.connections)
        assert recorder.connections[0].peer == name


@pytest.mark.skipif("epoll" not in BACKENDS, reason="the others cannot fail to watch what is closed")
@pytest.mark.parametrize("closes", [False, True])
def test_a_paused_listener_logs_that_its_descriptor_was_closed_and_a_log_handler_may_close_it(
    caplog: pytest.LogCaptureFixture, closes: bool
) -> None:
    class Closes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for listener in listeners:
                listener.close()

    recorder, log_handler = echo(), Closes()
    with muxcore.Mux(backend="epoll") as mux:
        listeners = [mux.listen(LOCALHOST, recorder, max_connections=1) for _ in range(2)]
        clients = [client(listener) for listener in listeners for _ in range(2)]
        until(mux, lambda: mux.stats().accept_pauses == 2)
        for listener in listeners:
            os.close(listener.fileno())
        if closes:
            logging.getLogger("muxcore").addHandler(log_handler)
        try:
            resting = mux._listeners()
            for conn in sorted(recorder.connections, key=lambda conn: -resting.index(conn.listener)):
                conn.abort()  # that of the last first: then the log handler removes the first from the list
            mux.poll(0)
        finally:
            logging.getLogger("muxcore").removeHandler(log_handler)
        failures = [record for record in caplog.records if "accept failed, pausing: Bad file" in record.message]
        assert len(failures) == (1 if closes else 2)
        assert [listener.closed for listener in listeners] == [closes] * 2
        for listener in listeners:
            listener.close()
    for sock in clients:
        sock.close()


@pytest.mark.unix_only("elsewhere descriptors are not small numbers")
def test_a_socket_that_cannot_be_watched_stays_its_owners() -> None:
    import fcntl
    import resource

    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1100:
        pytest.skip("the limit on open files is too low to get a descriptor above 1024")
    with muxcore.Mux(backend="select") as mux, socket.socket() as low:
        low.bind(LOCALHOST)
        with socket.socket(fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD, 1024)) as sock:
            with pytest.raises(ValueError, match="FD_SETSIZE"):
                mux.listen(sock, echo())
            assert sock.getsockname() == low.getsockname()
