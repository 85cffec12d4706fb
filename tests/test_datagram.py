"""Datagram: addresses, batches, errors, the bounded queue, closing (Promise datagrams)."""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE, LOCALHOST, memory, open_fds, turns, until

import muxcore


class Mailbox:
    """A handler that keeps what its callbacks get; it sends what `reply` makes of a datagram."""

    def __init__(self, reply: Callable[[bytes], bytes] | None = None) -> None:
        self.batches: list[list[tuple[bytes, Any]]] = []
        self.errors: list[BaseException] = []
        self.drains = 0
        self.reply = reply

    def on_datagrams(self, datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        self.batches.append(messages)
        if self.reply is not None:
            for data, address in messages:
                datagram.send(self.reply(data), address)

    def on_error(self, datagram: muxcore.Datagram, exc: BaseException) -> None:
        self.errors.append(exc)

    def on_drain(self, datagram: muxcore.Datagram) -> None:
        self.drains += 1

    def messages(self) -> list[tuple[bytes, Any]]:
        return [message for batch in self.batches for message in batch]

    def data(self) -> list[bytes]:
        return [data for data, _ in self.messages()]


def echo() -> Mailbox:
    return Mailbox(reply=lambda data: data)


def nothing(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None: ...


@contextmanager
def udp(address: Any = LOCALHOST, family: int = socket.AF_INET) -> Iterator[socket.socket]:
    """A peer."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE)
        sock.bind(address)
        yield sock


def closed_port() -> tuple[str, int]:
    """An address on which no socket receives."""
    with udp() as sock:
        address: tuple[str, int] = sock.getsockname()
        return address


def exchange(mux: muxcore.Mux, box: Mailbox, sock: socket.socket, data: bytes, address: Any) -> bytes:
    """Send to an echo on `mux`, and receive from it."""
    count = len(box.batches)
    sock.sendto(data, address)
    until(mux, lambda: len(box.batches) > count)
    mux.poll(0)
    return sock.recv(1 << 17)


def sends(mux: muxcore.Mux) -> int:
    """How many system calls have sent something, of one datagram or of many."""
    stats = mux.stats()
    return stats.send_calls + stats.sendmsg_calls


@pytest.fixture
def full(mux: muxcore.Mux) -> Iterator[Callable[..., tuple[muxcore.Datagram, Mailbox, socket.socket]]]:
    """Make a connected Unix socket whose receiver's queue is full, so that what is sent stays queued. (What UDP sends
    on loopback is dropped, never refused.)"""
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("this Python has no Unix sockets")
    theirs: list[socket.socket] = []

    def make(handler: Any = None, **limits: Any) -> tuple[muxcore.Datagram, Mailbox, socket.socket]:
        ours, their = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        theirs.append(their)
        their.settimeout(DEADLINE)
        ours.setblocking(False)
        with pytest.raises(OSError):  # EAGAIN on Linux, ENOBUFS on macOS
            while True:
                ours.send(b"stuffing")
        box = Mailbox()
        limit = muxcore.Limits(**limits) if limits else None
        return mux.datagram(ours, handler or box, limits=limit), box, their

    yield make
    for their in theirs:
        their.close()


def received(mux: muxcore.Mux, sock: socket.socket, last: bytes) -> list[bytes]:
    """Receive up to a datagram, while the Mux turns."""
    got: list[bytes] = []
    sock.settimeout(0)

    def has_last() -> bool:
        try:
            while True:
                got.append(sock.recv(1 << 17))
        except BlockingIOError:
            return last in got

    until(mux, has_last)
    return [data for data in got if data != b"stuffing"]


# --- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "family", "peer"),
    [
        (("127.0.0.1", 0), socket.AF_INET, "127.0.0.1"),
        (("localhost", 0), socket.AF_INET, "127.0.0.1"),
        (("::1", 0), socket.AF_INET6, "::1"),
        (("::1", 0, 0, 0), socket.AF_INET6, "::1"),
        ((None, 0), socket.AF_INET, "127.0.0.1"),
        ((None, 0), socket.AF_INET6, "::1"),
        (None, socket.AF_INET, "127.0.0.1"),
    ],
)
def test_receives_and_replies_at_its_address(mux: muxcore.Mux, address: Any, family: int, peer: str) -> None:
    box = echo()
    datagram = mux.datagram(address, box)
    with udp((peer, 0), family) as sock:
        for data in (b"hello", b"again"):  # the second address comes from the cache
            assert exchange(mux, box, sock, data, (peer, datagram.address[1])) == data
        [sender, again] = [sender for _, sender in box.messages()]
        assert sender[1] == sock.getsockname()[1]
        assert sender[0].removeprefix("::ffff:") == peer
        assert again == sender
        assert len(sender) == len(datagram.address)


def test_sends_to_ipv4_from_a_socket_of_both_families(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(None, nothing)
    with udp() as sock:
        assert datagram.send(b"mapped", sock.getsockname())
        mux.poll(0)
        assert sock.recv(100) == b"mapped"
        assert datagram.send(b"with a scope", (*sock.getsockname(), 0, 0))
        mux.poll(0)
        assert sock.recv(100) == b"with a scope"


def test_unix_datagrams_by_path(mux: muxcore.Mux, socket_path: Path) -> None:
    box = echo()
    datagram = mux.datagram(socket_path, box)
    theirs = str(socket_path) + ".theirs"
    with udp(theirs, socket.AF_UNIX) as sock:
        assert exchange(mux, box, sock, b"by path", datagram.address) == b"by path"
    assert box.messages() == [(b"by path", theirs)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unnamed:
        unnamed.sendto(b"no address", datagram.address)
    box.reply = None
    until(mux, lambda: len(box.messages()) == 2)
    assert box.messages()[1] == (b"no address", None)
    datagram.close()
    assert not socket_path.exists()


@pytest.mark.linux_only("abstract names")
def test_unix_datagrams_by_abstract_name(mux: muxcore.Mux) -> None:
    box = echo()
    datagram = mux.datagram(f"\0muxcore-{os.getpid()}", box)
    with udp(f"\0muxcore-{os.getpid()}-peer", socket.AF_UNIX) as sock:
        assert exchange(mux, box, sock, b"abstract", datagram.address) == b"abstract"
        assert datagram.send(b"as it was received", sock.getsockname())
        mux.poll(0)
        assert sock.recv(100) == b"as it was received"


def test_a_remote_is_the_only_peer(mux: muxcore.Mux) -> None:
    box = Mailbox()
    with udp() as sock, udp() as stranger:
        datagram = mux.datagram(None, box, remote=sock.getsockname())
        assert datagram.remote == sock.getsockname()
        assert datagram.send(b"question")
        mux.poll(0)
        data, address = sock.recvfrom(100)
        assert (data, address) == (b"question", datagram.address)
        stranger.sendto(b"noise", address)
        sock.sendto(b"answer", address)
        until(mux, lambda: box.batches)
        assert box.messages() == [(b"answer", sock.getsockname())]
        assert datagram.send(b"thanks", box.messages()[0][1]), "the remote's address may be named"
        with pytest.raises(ValueError, match="address must be None or the remote"):
            datagram.send(b"?", stranger.getsockname())


@pytest.mark.parametrize("address", [LOCALHOST, None], ids=["bound", "free"])
def test_a_remote_may_be_a_name(mux: muxcore.Mux, address: Any) -> None:
    with udp() as sock:
        datagram = mux.datagram(address, nothing, remote=("localhost", sock.getsockname()[1]))
        datagram.send(b"x")
        mux.poll(0)
        assert sock.recvfrom(10) == (b"x", datagram.address)


def test_a_socket_of_both_families_may_have_a_remote_of_ipv4(mux: muxcore.Mux) -> None:
    with udp() as sock:
        datagram = mux.datagram((None, 0), nothing, remote=sock.getsockname())
        datagram.send(b"x")
        mux.poll(0)
        assert sock.recv(10) == b"x"


def test_a_socket_that_is_there_already_may_get_a_remote(mux: muxcore.Mux) -> None:
    given = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with udp() as sock:
        datagram = mux.datagram(given, nothing, remote=("localhost", sock.getsockname()[1]))
        assert datagram.remote == sock.getsockname()
        datagram.send(b"x")
        mux.poll(0)
        assert sock.recv(10) == b"x"


def test_a_socket_that_is_there_already(mux: muxcore.Mux) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(LOCALHOST)
    address, box = sock.getsockname(), echo()
    datagram = mux.datagram(sock, box)
    assert (datagram.address, datagram.remote, sock.fileno()) == (address, None, -1)
    with udp() as peer:
        assert exchange(mux, box, peer, b"x", address) == b"x"


@pytest.mark.parametrize(
    ("address", "error", "match"),
    [
        (None, ValueError, "address is required: this socket has no remote"),
        (5, TypeError, "address must be"),
        (["127.0.0.1", 5], TypeError, "address must be"),
        (("127.0.0.1", "5"), TypeError, "address port must be an int"),
        ((None, 5), ValueError, "must have a host and a port"),
        (("localhost", 5), ValueError, "must be a numeric address of the socket's family, not 'localhost'"),
        (("::1", 5), ValueError, "must be a numeric address of the socket's family"),
        (("127.0.0.1", 5, 0, 0), ValueError, r"must be \(host, port\) on a socket of IPv4"),
        ("path", ValueError, "address must be one of the socket's family"),
        ("", ValueError, "address path must not be empty"),
    ],
)
def test_a_bad_destination_is_named(mux: muxcore.Mux, address: Any, error: type[Exception], match: str) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    with pytest.raises(error, match=match):
        datagram.send(b"x", address)
    assert mux.stats().messages_out == 0


@pytest.mark.parametrize(
    ("address", "error", "match"),
    [
        ((), TypeError, "address must be"),
        (b"", TypeError, "address must be"),
        (("127.0.0.1", 5), ValueError, "address must be one of the socket's family"),
    ],
)
def test_a_bad_destination_of_a_unix_socket_is_named(
    mux: muxcore.Mux, socket_path: Path, address: Any, error: type[Exception], match: str
) -> None:
    datagram = mux.datagram(socket_path, nothing)
    with pytest.raises(error, match=match):
        datagram.send(b"x", address)
    assert mux.stats().drops == 0


@pytest.mark.parametrize(
    ("address", "options", "error", "match"),
    [
        (LOCALHOST, {"handler": None}, ValueError, "handler is required"),
        (LOCALHOST, {"handler": Mailbox}, TypeError, r"pass Mailbox\(\)"),
        (LOCALHOST, {"handler": muxcore.Handler()}, TypeError, "have on_datagrams, not Handler"),
        (5, {}, TypeError, "address must be"),
        (("no such host.invalid", 0), {}, socket.gaierror, "cannot resolve address host"),
        (LOCALHOST, {"remote": 5}, TypeError, "address must be"),
        (LOCALHOST, {"remote": ("127.0.0.1", 0)}, ValueError, "must have a host and a port"),
        (LOCALHOST, {"remote": "path"}, ValueError, "remote must be an address of the socket's family"),
        (LOCALHOST, {"max_size": 0}, ValueError, "max_size must be >= 1"),
        (LOCALHOST, {"limits": 5}, TypeError, "limits must be a muxcore.Limits"),
        (LOCALHOST, {"join": [5]}, TypeError, "join must be groups"),
        (LOCALHOST, {"join": [("224.0.0.251", 5)]}, TypeError, "join must be groups"),
        (LOCALHOST, {"join": [("224.0.0.251", "lo", 5)]}, TypeError, "join must be groups"),
        (LOCALHOST, {"join": ["127.0.0.1"]}, ValueError, "join must be addresses of multicast groups"),
        (LOCALHOST, {"join": [("224.0.0.251", "no such")]}, OSError, "cannot join 224.0.0.251 on no such"),
        (LOCALHOST, {"colour": 1}, TypeError, "colour"),
    ],
)
def test_bad_arguments_are_named(
    mux: muxcore.Mux, address: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        mux.datagram(address, **{"handler": nothing, **options})


def test_a_stream_socket_is_refused_and_stays_the_callers(mux: muxcore.Mux) -> None:
    with socket.socket() as sock:
        with pytest.raises(ValueError, match="must be a datagram socket"):
            mux.datagram(sock, nothing)
        assert sock.fileno() >= 0


def test_a_given_socket_that_cannot_have_that_remote_stays_the_callers(mux: muxcore.Mux) -> None:
    with udp() as sock:
        with pytest.raises(ValueError, match="remote must be an address of the socket's family"):
            mux.datagram(sock, nothing, remote="path")
        assert sock.fileno() >= 0


def test_reuse_port_is_refused_where_it_does_not_exist(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SO_REUSEPORT", raising=False)
    with pytest.raises(ValueError, match="no SO_REUSEPORT"):
        mux.datagram(LOCALHOST, nothing, reuse_port=True)


def test_a_port_in_use_is_named_unless_shared(mux: muxcore.Mux) -> None:
    used = mux.datagram(LOCALHOST, nothing).address
    with pytest.raises(OSError, match=rf"cannot receive on \('127.0.0.1', {used[1]}\)"):
        mux.datagram(used, nothing)
    if hasattr(socket, "SO_REUSEPORT"):
        shared = mux.datagram(LOCALHOST, nothing, reuse_port=True).address
        assert mux.datagram(shared, nothing, reuse_port=True).address == shared


@pytest.mark.unix_only("os.get_blocking")
def test_its_socket_is_nonblocking(mux: muxcore.Mux) -> None:
    given = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    given.bind(LOCALHOST)
    for address in (LOCALHOST, given):
        assert not os.get_blocking(mux.datagram(address, nothing).fileno())


def test_options_of_the_socket(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(LOCALHOST, nothing, broadcast=True)
    assert datagram.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
    datagram.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 0)
    assert not datagram.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
    datagram.close()
    with pytest.raises(muxcore.ConnectionClosed, match=r"getsockopt: .* is not open"):
        datagram.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)


def multicast_interface(group: str) -> str:
    """An interface by which datagrams to a group leave, and come back to ourselves."""
    family = socket.AF_INET6 if ":" in group else socket.AF_INET
    for index, name in socket.if_nameindex():
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                direct(sock, index)
                sock.sendto(b"", (group, 9))
            except OSError:
                continue
            return name
    pytest.skip(f"no interface has a route to {group}")


def direct(sock: socket.socket, index: int) -> None:
    """Let what it sends to groups leave by an interface."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
    else:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(8) + struct.pack("=I", index))


@pytest.mark.linux_only("struct ip_mreqn")
@pytest.mark.parametrize("group", ["239.1.2.3", "ff02::123"])
def test_joined_groups_are_heard(mux: muxcore.Mux, group: str) -> None:
    name = multicast_interface(group)
    boxes = [Mailbox(), Mailbox()]
    first = mux.datagram((None, 0), boxes[0], join=[(group, name)])
    port = first.address[1]
    mux.datagram((None, port), boxes[1], join=[(group, name)])  # as another program on the same port would
    with socket.socket(socket.AF_INET6 if ":" in group else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        direct(sock, socket.if_nametoindex(name))
        sock.sendto(b"to the group", (group, port))
    until(mux, lambda: all(box.batches for box in boxes))
    assert [box.data() for box in boxes] == [[b"to the group"]] * 2


# --- receiving -------------------------------------------------------------------------------------


def test_what_came_together_is_handed_out_together(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    sent = [b"%d" % i for i in range(150)]
    with udp() as one, udp() as two:
        for i, data in enumerate(sent):
            (two if i % 3 else one).sendto(data, datagram.address)
        until(mux, lambda: len(box.messages()) == len(sent))
        addresses = [one.getsockname(), two.getsockname()]
    assert box.messages() == [(data, addresses[bool(i % 3)]) for i, data in enumerate(sent)]
    assert [len(batch) for batch in box.batches] == [64, 64, 22]
    assert mux.stats().messages_in == 150
    assert mux.stats().bytes_in == sum(map(len, sent))


def test_what_goes_out_is_counted(mux: muxcore.Mux) -> None:
    with udp() as sock, udp() as other:
        datagram = mux.datagram(None, echo(), remote=sock.getsockname())
        assert datagram.send(b"12345")
        mux.poll(0)
        assert sends(mux) == 1
        datagram.close()
        datagram = mux.datagram(LOCALHOST, echo())
        assert datagram.send(b"678", other.getsockname())
        mux.poll(0)
    stats = mux.stats()
    assert (stats.messages_out, stats.bytes_out) == (2, 8)


@pytest.mark.linux_only("recvmmsg and sendmmsg")
def test_a_batch_is_two_system_calls(backend: str, mux: muxcore.Mux) -> None:
    if backend != "epoll":
        pytest.skip("one call per datagram: a row of the table in docs/ARCHITECTURE.md")
    box = echo()
    datagram = mux.datagram(LOCALHOST, box)
    with udp() as sock:
        for _ in range(50):
            sock.sendto(b"x", datagram.address)
        until(mux, lambda: len(box.messages()) == 50)
        mux.poll(0)
    stats = mux.stats()
    assert (stats.recv_calls, stats.sendmsg_calls, stats.messages_out, stats.bytes_out) == (1, 1, 50, 50)


def test_bursts_of_several_senders_keep_their_addresses(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    with udp() as one, udp() as two, udp() as three:
        order = [one, one, two, one, three, three, two, one]
        for sock in order * 20:
            sock.sendto(b"x", datagram.address)
        until(mux, lambda: len(box.messages()) == 160)
        assert [address for _, address in box.messages()] == [sock.getsockname() for sock in order] * 20


def test_more_senders_than_addresses_are_kept(mux: muxcore.Mux) -> None:
    box = echo()
    datagram = mux.datagram(("::1", 0), box)
    with udp(("::1", 0), socket.AF_INET6) as sock:
        for i in range(3000):
            datagram.send(b"x", ("::1", 9, i, 0))
            if i % 500 == 0:
                mux.poll(0)
        assert exchange(mux, box, sock, b"still right", datagram.address) == b"still right"


@pytest.mark.parametrize("size", [0, 1, 1472, 9000, 65507])
def test_every_size_of_udp_comes_and_goes_whole(mux: muxcore.Mux, size: int) -> None:
    box = echo()
    datagram = mux.datagram(LOCALHOST, box)
    data = os.urandom(size)
    with udp() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        assert exchange(mux, box, sock, data, datagram.address) == data
    assert (box.errors, mux.stats().drops) == ([], 0)


def test_a_datagram_above_max_size_is_reported_and_the_others_are_whole(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box, max_size=10)
    with udp() as sock:
        for data in (b"ten bytes.", b"eleven bytes", b"whole"):
            sock.sendto(data, datagram.address)
        until(mux, lambda: len(box.messages()) == 2 and box.errors)
        sender = sock.getsockname()
    assert box.data() == [b"ten bytes.", b"whole"]
    [error] = box.errors
    assert isinstance(error, muxcore.FrameTooLarge)
    assert error.limit == 10
    assert str(error) == f"a datagram from {sender!r} has more than max_size=10 bytes"
    assert mux.stats().drops == 1


def test_two_sockets_with_different_max_size(mux: muxcore.Mux) -> None:
    small, large = Mailbox(), Mailbox()
    one, two = mux.datagram(LOCALHOST, small, max_size=8), mux.datagram(LOCALHOST, large, max_size=1 << 17)
    with udp() as sock:
        for datagram in (one, two):
            sock.sendto(bytes(9), datagram.address)
    until(mux, lambda: small.errors and large.batches)
    assert (small.batches, large.data()) == ([], [bytes(9)])


def test_a_flood_does_not_starve_the_others(mux: muxcore.Mux) -> None:
    order: list[str] = []
    flooded = mux.datagram(LOCALHOST, lambda *_: order.append("flood"), max_size=2048)
    flooded.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    other = mux.datagram(LOCALHOST, lambda *_: order.append("other"))
    with udp() as sock:
        for _ in range(500):
            sock.sendto(b"x", flooded.address)
        sock.sendto(b"x", other.address)
    while "other" not in order:
        mux.poll(1)
        assert len(order) <= 5, "four batches, then it is the other's turn"
    until(mux, lambda: mux.stats().messages_in >= 100)


# --- errors ----------------------------------------------------------------------------------------


def test_a_refused_datagram_is_reported_on_a_connected_socket(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(None, box, remote=closed_port())
    datagram.send(b"anybody there?")
    until(mux, lambda: box.errors)
    assert isinstance(box.errors[0], ConnectionRefusedError)
    assert mux.stats().datagram_errors == len(box.errors)
    assert not datagram.closed


def test_an_error_that_is_not_its_own_costs_no_datagram(mux: muxcore.Mux) -> None:
    box, address = Mailbox(), closed_port()
    datagram = mux.datagram(None, box, remote=address)
    datagram.send(b"refused")
    mux.poll(0)  # goes out; the error is pending now
    with udp(address) as sock:
        datagram.send(b"must arrive")
        mux.poll(0)
        assert sock.recv(100) == b"must arrive"
    until(mux, lambda: box.errors)
    assert mux.stats().drops == 0


def test_without_on_error_the_first_is_logged(mux: muxcore.Mux, caplog: pytest.LogCaptureFixture) -> None:
    datagram = mux.datagram(None, nothing, remote=closed_port())
    for count in (1, 2):
        datagram.send(b"x")
        until(mux, lambda count=count: mux.stats().datagram_errors >= count)
    mux.poll(0)
    assert caplog.text.count("has no on_error") == 1
    assert "Connection refused" in caplog.text


@pytest.mark.unix_only("Unix sockets")
def test_a_datagram_that_cannot_be_sent_is_dropped_and_those_behind_it_go_out(
    mux: muxcore.Mux, socket_path: Path
) -> None:
    box = Mailbox()
    datagram = mux.datagram(str(socket_path) + ".ours", box)
    with udp(str(socket_path), socket.AF_UNIX) as sock:
        datagram.send(b"lost", str(socket_path) + ".missing")
        datagram.send(b"found", str(socket_path))
        until(mux, lambda: box.errors)
        assert sock.recv(100) == b"found"
    assert [type(error) for error in box.errors] == [FileNotFoundError]
    assert mux.stats().drops == 1


@pytest.mark.linux_only("the route of a broadcast")
def test_a_broadcast_without_permission_is_an_error(mux: muxcore.Mux) -> None:
    box = Mailbox()
    mux.datagram(LOCALHOST, box).send(b"x", ("255.255.255.255", 9))
    until(mux, lambda: box.errors)
    assert isinstance(box.errors[0], PermissionError)


def test_data_that_no_datagram_can_hold_is_the_callers_error(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    with pytest.raises(ValueError, match="data must be at most 65507 bytes, the largest datagram, not 65508"):
        datagram.send(bytes(65508), ("127.0.0.1", 9))
    with pytest.raises(TypeError):
        datagram.send("text", ("127.0.0.1", 9))  # type: ignore[arg-type]
    assert mux.stats().messages_out == 0


@pytest.mark.unix_only("Unix sockets")
def test_what_the_kernel_finds_too_large_is_an_error(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    box = Mailbox()
    mux.datagram(ours, box).send(bytes(1 << 22))
    until(mux, lambda: box.errors)
    assert isinstance(box.errors[0], OSError)
    assert box.errors[0].errno == errno.EMSGSIZE
    theirs.close()


def test_a_handler_that_raises_is_logged_and_the_socket_goes_on(
    mux: muxcore.Mux, caplog: pytest.LogCaptureFixture
) -> None:
    box = Mailbox()

    class Clumsy:
        def on_datagrams(self, datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
            box.on_datagrams(datagram, messages)
            raise ZeroDivisionError

        def on_error(self, datagram: muxcore.Datagram, exc: BaseException) -> None:
            box.on_error(datagram, exc)
            raise ZeroDivisionError

    datagram = mux.datagram(LOCALHOST, Clumsy(), max_size=4)
    with udp() as sock:
        for data in (b"1", b"too large", b"2"):
            count = mux.stats().handler_errors
            sock.sendto(data, datagram.address)
            until(mux, lambda count=count: mux.stats().handler_errors > count)
    assert (box.data(), len(box.errors)) == ([b"1", b"2"], 1)
    assert "ZeroDivisionError" in caplog.text


def test_keyboard_interrupt_leaves_the_mux_usable(mux: muxcore.Mux) -> None:
    def interrupt(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        raise KeyboardInterrupt

    box = Mailbox()
    one, two = mux.datagram(LOCALHOST, interrupt), mux.datagram(LOCALHOST, box)
    with udp() as sock:
        for datagram in (one, two):
            sock.sendto(b"x", datagram.address)
        with pytest.raises(KeyboardInterrupt):
            until(mux, lambda: False)
    until(mux, lambda: box.batches)
    assert mux.stats().handler_errors == 0


# --- the queue -------------------------------------------------------------------------------------

Full = Callable[..., tuple[muxcore.Datagram, Mailbox, socket.socket]]


def test_what_the_kernel_does_not_accept_waits_in_order(mux: muxcore.Mux, full: Full) -> None:
    datagram, box, theirs = full()
    sent = [b"%d" % i for i in range(300)]
    for data in sent:
        assert datagram.send(data)
    mux.poll(0)
    assert turns(mux, 0.05) == 0, "no spin"
    assert received(mux, theirs, sent[-1]) == sent
    assert (box.errors, mux.stats().drops) == ([], 0)


def test_send_is_false_above_high_and_on_drain_comes_at_low(mux: muxcore.Mux, full: Full) -> None:
    datagram, box, theirs = full(high=1000, low=500)
    results = [datagram.send(bytes(100)) for _ in range(8)]
    assert results == [True] * 6 + [False] * 2, "164 bytes each"
    mux.poll(0)
    assert (box.drains, mux.stats().high_water_hits) == (0, 1)
    assert received(mux, theirs, bytes(100))
    until(mux, lambda: box.drains)
    assert datagram.send(b"x")
    assert received(mux, theirs, b"x")
    assert box.drains == 1
    assert turns(mux, 0.05) == 0, "it waits for no room any more"


def test_a_blocked_socket_that_is_closed_hears_no_more(mux: muxcore.Mux, full: Full) -> None:
    datagram, box, _ = full()
    datagram.send(b"blocked")
    mux.poll(0)
    datagram.send(b"to be settled")
    datagram.close()
    turns(mux, 0.02)
    assert (box.drains, box.errors) == (0, [])


@pytest.mark.linux_only("the kernel reports when a peer of a Unix socket has room")
def test_a_full_peer_is_waited_for_without_further_attempts(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, theirs = full()
    datagram.send(b"last")
    mux.poll(0)
    assert mux.stats().would_blocks == 1
    before = sends(mux)
    turns(mux, 0.1)
    assert sends(mux) == before
    assert received(mux, theirs, b"last") == [b"last"]


def test_an_error_that_was_reported_ends_the_wait(mux: muxcore.Mux, full: Full) -> None:
    """Else what a callback has changed would wait for the next event."""
    datagram, box, _ = full(high=100, low=0, max_outbox=100, overflow="close")
    while datagram.send(b"x"):
        pass
    while not datagram.closed:
        datagram.send(b"x")
    started = time.monotonic()
    mux.poll(DEADLINE / 2)
    assert time.monotonic() - started < DEADLINE / 4
    assert len(box.errors) == 1


def test_a_full_queue_drops(mux: muxcore.Mux, full: Full) -> None:
    datagram, box, theirs = full(high=200, low=0, max_outbox=200, overflow="drop")
    results = [datagram.send(data) for data in (b"one", b"two", b"three", b"four", b"five")]
    assert results == [True, True, False, False, False], "67 bytes each, accepted while there are less than 200"
    assert mux.stats().drops == 2
    assert received(mux, theirs, b"three") == [b"one", b"two", b"three"]
    assert (datagram.closed, box.errors) == (False, [])


def test_the_default_is_to_drop(mux: muxcore.Mux) -> None:
    assert mux.datagram(LOCALHOST, nothing).limits == muxcore.Limits(overflow="drop")


def test_a_full_queue_raises(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, _ = full(high=100, low=0, max_outbox=100, overflow="raise")
    with pytest.raises(muxcore.OutboxFull, match="max_outbox is 100") as caught:
        for _ in range(3):
            datagram.send(b"x")
    assert caught.value.conn is datagram
    assert not datagram.closed


def test_a_full_queue_closes(mux: muxcore.Mux, full: Full) -> None:
    datagram, box, _ = full(high=100, low=0, max_outbox=100, overflow="close")
    assert [datagram.send(b"x") for _ in range(3)] == [True, False, False]
    assert datagram.closed
    assert box.errors == [], "no method calls a callback"
    until(mux, lambda: box.errors)
    assert isinstance(box.errors[0], muxcore.OutboxFull)


@pytest.mark.unix_only("Unix sockets")
def test_empty_datagrams_do_not_fill_memory(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, _ = full(high=1000, low=0, max_outbox=1000, overflow="drop")
    for _ in range(100):
        datagram.send(b"")
    assert mux.stats().messages_out == 16


@pytest.mark.unix_only("Unix sockets")
def test_a_full_receiver_of_an_unconnected_socket_is_tried_again_without_spinning(
    mux: muxcore.Mux, socket_path: Path
) -> None:
    datagram = mux.datagram(str(socket_path) + ".ours", nothing)
    sent = [b"%d" % i for i in range(600)]
    with udp(str(socket_path), socket.AF_UNIX) as sock:
        for data in sent:
            datagram.send(data, str(socket_path))
        mux.poll(0)
        before = sends(mux)
        assert turns(mux, 0.05) == 0, "no spin: such a socket is writable all the time"
        assert sends(mux) - before <= 10, "and it is not tried each turn"
        assert received(mux, sock, sent[-1]) == sent


def test_a_buffer_is_copied(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    with udp() as sock:
        data = bytearray(b"before")
        datagram.send(data, sock.getsockname())
        data[:] = b"after!"
        mux.poll(0)
        assert sock.recv(100) == b"before"


@pytest.mark.linux_only("epoll")
def test_a_driven_mux_keeps_nothing_back(backend: str, mux: muxcore.Mux) -> None:
    if backend != "epoll":
        pytest.skip("this backend cannot be driven")
    datagram = mux.datagram(LOCALHOST, nothing)
    mux.fileno()
    with udp() as sock:
        datagram.send(b"at once", sock.getsockname())
        assert sock.recv(100) == b"at once"


# --- closing ---------------------------------------------------------------------------------------


def test_close_sends_what_is_queued_and_nothing_comes_after_it(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    with udp() as sock:
        sock.sendto(b"unread", datagram.address)
        datagram.send(b"goodbye", sock.getsockname())
        datagram.close()
        datagram.close()
        assert sock.recv(100) == b"goodbye"
        assert (datagram.closed, datagram.fileno()) == (True, -1)
        assert datagram.send(b"too late", sock.getsockname()) is False
        mux.poll(0)
    assert (box.batches, box.errors, mux.stats().drops) == ([], [], 1)


def test_close_inside_the_handler_ends_the_batch(mux: muxcore.Mux) -> None:
    batches: list[int] = []

    def once(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        batches.append(len(messages))
        datagram.close()

    datagram = mux.datagram(LOCALHOST, once)
    with udp() as sock:
        for _ in range(100):
            sock.sendto(b"x", datagram.address)
        until(mux, lambda: datagram.closed)
        mux.poll(0)
    assert batches == [64]
    assert mux.stats().datagram_errors == 0, "no system call uses a descriptor that is gone"


def test_one_handler_may_close_another_socket_of_the_batch(mux: muxcore.Mux) -> None:
    called: list[muxcore.Datagram] = []

    def close_both(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        called.append(datagram)
        for each in pair:
            each.close()

    pair = [mux.datagram(LOCALHOST, close_both) for _ in range(2)]
    with udp() as sock:
        for datagram in pair:
            sock.sendto(b"x", datagram.address)
    until(mux, lambda: called)
    mux.poll(0)
    assert len(called) == 1


def test_close_in_on_error_is_the_end_of_errors(mux: muxcore.Mux) -> None:
    errors: list[BaseException] = []

    class Closer(Mailbox):
        def on_error(self, datagram: muxcore.Datagram, exc: BaseException) -> None:
            errors.append(exc)
            datagram.close()

    datagram = mux.datagram(LOCALHOST, Closer(), max_size=1)
    with udp() as sock:
        for _ in range(3):
            sock.sendto(b"too large", datagram.address)
    until(mux, lambda: datagram.closed)
    mux.poll(0)
    assert len(errors) == 1


def test_a_new_socket_in_the_handler_does_not_disturb_the_batch(mux: muxcore.Mux) -> None:
    data, box = bytes(range(200)), Mailbox()

    def more(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        mux.datagram(LOCALHOST, nothing, max_size=1 << 18)
        box.on_datagrams(datagram, messages)

    datagram = mux.datagram(LOCALHOST, more)
    with udp() as sock:
        for _ in range(100):
            sock.sendto(data, datagram.address)
    until(mux, lambda: len(box.messages()) == 100)
    assert set(box.data()) == {data}


def test_poll_inside_a_handler_is_refused(mux: muxcore.Mux) -> None:
    errors: list[str] = []

    def greedy(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        try:
            mux.poll(0)
        except RuntimeError as error:
            errors.append(str(error))

    datagram = mux.datagram(LOCALHOST, greedy)
    with udp() as sock:
        sock.sendto(b"x", datagram.address)
    until(mux, lambda: errors)
    assert errors == ["poll() was called inside a callback of the same Mux"]


def test_run_with_nothing_but_datagrams(mux: muxcore.Mux) -> None:
    box = Mailbox()

    class Stopper(Mailbox):
        def on_datagrams(self, datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
            box.batches.append(messages)
            mux.stop()

    datagram = mux.datagram(LOCALHOST, Stopper())
    with udp() as sock:
        sock.sendto(b"stop", datagram.address)
        mux.run()
    assert box.data() == [b"stop"]


@pytest.mark.parametrize("how", ["close", "drain"])
def test_the_mux_closes_its_datagrams(mux: muxcore.Mux, how: str) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    with udp() as sock:
        datagram.send(b"the last", sock.getsockname())
        assert mux.close() is None if how == "close" else mux.drain(5)
        assert datagram.closed
        assert sock.recv(100) == b"the last"


def test_drain_says_when_datagrams_were_not_sent(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, _ = full()
    datagram.send(b"stuck")
    assert mux.drain(5) is False
    assert (mux.stats().unsent, mux.stats().drops) == (1, 1)


def test_on_close_of_a_connection_may_send_while_the_mux_closes(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    with udp() as sock:

        class Obituary(muxcore.Handler):
            def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
                datagram.send(b"it was short", sock.getsockname())

        ours, theirs = socket.socketpair()
        mux.attach(ours, Obituary())
        mux.poll(0)
        mux.close()
        assert sock.recv(100) == b"it was short"
        theirs.close()


@pytest.mark.unix_only("the lowest free descriptor is the next one")
def test_a_descriptor_closed_by_other_code_ends_its_socket(mux: muxcore.Mux, caplog: pytest.LogCaptureFixture) -> None:
    box = echo()
    datagram = mux.datagram(LOCALHOST, nothing)
    os.close(datagram.fileno())
    other = mux.datagram(LOCALHOST, box)  # reuses the number
    assert datagram.closed
    mux.poll(0)
    assert "closed by other code" in caplog.text
    datagram.close()
    with udp() as sock:
        assert exchange(mux, box, sock, b"mine", other.address) == b"mine"


def test_only_the_muxs_thread_may_use_it(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    mux.poll(0)
    errors: list[str] = []

    def work() -> None:
        calls = [
            lambda: datagram.send(b"x", ("127.0.0.1", 9)),
            lambda: datagram.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST),
            lambda: datagram.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1),
            datagram.close,
        ]
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(errors) == 4
    assert all("belongs to the thread" in error for error in errors)


def test_datagrams_are_made_by_the_mux_alone(mux: muxcore.Mux) -> None:
    kind: Any = type(mux.datagram(LOCALHOST, nothing))
    before = open_fds()
    with pytest.raises(TypeError, match=r"made by Mux\.datagram"):
        kind()
    assert open_fds() == before, "none is closed either"


def test_a_failed_datagram_leaves_no_descriptor(mux: muxcore.Mux) -> None:
    before = open_fds()
    for options in ({"remote": "path"}, {"join": [("224.0.0.1", "no such")]}, {"max_size": 1 << 30}):
        with pytest.raises((ValueError, OSError)):
            mux.datagram(LOCALHOST, nothing, **options)  # type: ignore[arg-type]
    assert open_fds() == before


FORK = """
import os, socket, sys, muxcore
mux = muxcore.Mux(backend=sys.argv[1])
got = []
datagram = mux.datagram(("127.0.0.1", 0), lambda d, messages: got.extend(messages))
child = os.fork()
if child == 0:
    try:
        datagram.send(b"x", datagram.address)
    except RuntimeError as error:
        assert "fork" in str(error)
        mux.close() if sys.argv[2] == "close" else None
        os._exit(7 if sys.argv[2] == "exit" or datagram.closed else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
datagram.send(b"still mine", datagram.address)
while not got:
    mux.poll(1)
assert got == [(b"still mine", datagram.address)], got
mux.close()
"""


@pytest.mark.unix_only("fork")
@pytest.mark.parametrize("leave", ["close", "exit"])
def test_a_forked_child_can_do_the_parent_no_harm(backend: str, leave: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, backend, leave], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unclosed_mux_closes_them_when_it_is_collected(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)
    number = mux.datagram(LOCALHOST, nothing).fileno()
    del mux
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    with pytest.raises(OSError):
        os.fstat(number)


@pytest.mark.linux_only("an ICMP error is there when send returns")
def test_the_mux_closes_a_datagram_that_always_has_an_error_to_report(mux: muxcore.Mux) -> None:
    class Insistent(Mailbox):
        def on_error(self, datagram: muxcore.Datagram, exc: BaseException) -> None:
            super().on_error(datagram, exc)
            if len(self.errors) < 100:
                for _ in range(2):  # the second is refused because of the first
                    datagram.send(b"refused again")
            mux.close()

    box = Insistent()
    limits = muxcore.Limits(low=0, high=0, overflow="drop")  # each goes out at once
    datagram = mux.datagram(None, box, remote=closed_port(), limits=limits)
    datagram.send(b"refused")
    until(mux, lambda: mux.closed)
    assert datagram.closed
    assert 0 < len(box.errors) < 10


# --- peers without an address, and user code at any moment -----------------------------------------


def test_what_is_sent_to_port_0_is_counted_and_harms_nothing(mux: muxcore.Mux) -> None:
    """Anybody can send a datagram from port 0."""
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    with udp() as sock:
        assert not datagram.send(b"x", ("127.0.0.1", 0))
        assert datagram.send(b"y", sock.getsockname())
        mux.poll(0)
        assert sock.recv(10) == b"y"
    assert (mux.stats().drops, box.errors) == (1, [])


@pytest.mark.linux_only("abstract names, and the size of sun_path")
def test_a_name_of_all_of_sun_path_is_sent_to_if_it_is_abstract(mux: muxcore.Mux) -> None:
    """The kernel hands out a path of that many bytes, without its NUL; Python's sockets refuse it."""
    name = f"\0{os.getpid()}".ljust(108, "x")
    datagram = mux.datagram(f"\0{os.getpid()}", nothing)
    with udp(name, socket.AF_UNIX) as sock:
        assert datagram.send(b"abstract", name)
        mux.poll(0)
        assert sock.recv(100) == b"abstract"
    assert not datagram.send(b"path", "/" + "x" * 107)
    assert mux.stats().drops == 1


@pytest.mark.unix_only("Unix sockets")
def test_a_sender_without_a_name_gets_no_reply_and_the_others_do(mux: muxcore.Mux, socket_path: Path) -> None:
    box = echo()
    datagram = mux.datagram(socket_path, box)
    unnamed = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with udp(f"{socket_path}.peer", socket.AF_UNIX) as sock, unnamed:
        unnamed.sendto(b"no address", datagram.address)
        assert exchange(mux, box, sock, b"x", datagram.address) == b"x"
        assert not datagram.send(b"y", unnamed.getsockname())
    assert (mux.stats().drops, mux.stats().handler_errors) == (2, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "::1", "::ffff:127.0.0.1", "::"])
def test_the_remote_may_be_named_as_it_was_given(mux: muxcore.Mux, host: str) -> None:
    class Place(tuple[Any, ...]):
        pass

    datagram = mux.datagram(None, nothing, remote=(host, 9))
    for address in ((host, 9), Place((host, 9)), datagram.remote, None):
        assert datagram.send(b"x", address)
    with pytest.raises(ValueError, match="address must be None or the remote"):
        datagram.send(b"x", (host, 10))


def test_the_remote_may_be_named_in_another_form(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(None, nothing, remote=("::1", 9))
    assert datagram.send(b"x", ("0:0::1", 9))
    assert datagram.send(b"x", ("::1", 9, 0, 0))


def test_no_code_of_an_address_is_run_while_it_is_looked_up(mux: muxcore.Mux) -> None:
    class Address(tuple[Any, ...]):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("it was compared")

        def __hash__(self) -> int:
            raise AssertionError("it was hashed")

    class Host(str):
        __slots__ = ()
        __eq__ = Address.__eq__
        __hash__ = Address.__hash__

    with udp() as sock:
        host, port = sock.getsockname()
        datagram = mux.datagram(LOCALHOST, nothing)
        connected = mux.datagram(None, nothing, remote=Address((Host(host), port)))
        for address in (Address((host, port)), (Host(host), port)):
            assert datagram.send(b"x", address)
            assert connected.send(b"x", address)
        mux.poll(0)
        assert [sock.recv(10) for _ in range(4)] == [b"x"] * 4


class Cyclic:
    """Calls something when the collector finds it."""

    def __init__(self, fn: Callable[[], object]) -> None:
        self.fn, self.me = fn, self

    def __del__(self) -> None:
        self.fn()


@contextmanager
def collecting(fn: Callable[[], object], number: int = 1) -> Iterator[None]:
    """Calls something at the number-th allocation that the collector counts, or soon after, wherever it is."""
    gc.collect()
    thresholds = gc.get_threshold()
    Cyclic(fn)
    gc.set_threshold(number)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.collect()


def test_a_finaliser_may_make_a_datagram_socket_while_a_batch_is_received(mux: muxcore.Mux) -> None:
    """It needs larger buffers than those that are being read."""
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box, max_size=1000)
    others: list[muxcore.Datagram] = []
    with udp() as sock:
        sent = [b"%d" % number * 100 for number in range(60)]
        for data in sent:
            sock.sendto(data, datagram.address)
        with collecting(lambda: others.append(mux.datagram(LOCALHOST, nothing, max_size=1 << 20))):
            until(mux, lambda: len(box.messages()) == 60)
    assert box.data() == sent
    assert len(others) == 1


def test_a_finaliser_may_close_the_socket_while_a_batch_is_received(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    with udp() as sock:
        for _ in range(10):
            sock.sendto(b"x", datagram.address)
        with collecting(datagram.close):
            until(mux, lambda: datagram.closed)
    assert mux.stats().drops + len(box.messages()) <= 10
    assert len(box.messages()) == mux.stats().messages_in


@pytest.mark.unix_only("Unix sockets")
def test_close_that_is_interrupted_closes_all_the_same(
    mux: muxcore.Mux, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: object) -> None:
        raise KeyboardInterrupt

    datagram = mux.datagram(socket_path, nothing)
    number = datagram.fileno()
    monkeypatch.setattr("muxcore._unix.SocketFile.remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datagram.close()
    assert datagram.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.linux_only("a full receiver that is not connected is tried again after a while")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_socket_whose_timer_could_not_be_set_is_not_forgotten(
    mux: muxcore.Mux, socket_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    from muxcore._timers import Timers

    add = Timers.add

    def fails(self: Any, *args: Any) -> Any:
        monkeypatch.setattr(Timers, "add", add)
        raise error

    with udp(str(socket_path), socket.AF_UNIX) as theirs:
        datagram = mux.datagram(f"{socket_path}.ours", nothing)
        count = 600  # more than a receiver's queue holds
        monkeypatch.setattr(Timers, "add", fails)
        for number in range(count):
            datagram.send(b"%d" % number, str(socket_path))
        with pytest.raises(error):
            mux.poll(0)
        assert received(mux, theirs, b"%d" % (count - 1)) == [b"%d" % number for number in range(count)]


def test_an_interrupt_while_a_batch_is_received_loses_nothing_uncounted(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    from muxcore import _frame

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box, max_size=10)
    module = "muxcore._fallback.datagram" if mux.backend != "epoll" else "muxcore._epoll"
    monkeypatch.setattr(f"{module}.datagram_too_large", interrupted)
    with udp() as sock:
        for data in (b"1", b"2", bytes(20), b"3"):
            sock.sendto(data, datagram.address)
        with pytest.raises(KeyboardInterrupt):
            until(mux, lambda: False)
        monkeypatch.setattr(f"{module}.datagram_too_large", _frame.datagram_too_large)
        sock.sendto(b"after", datagram.address)
        until(mux, lambda: b"after" in box.data())
    assert mux.stats().drops + len(box.data()) == 5


def test_a_mux_that_an_argument_closes_gets_no_socket(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)

    def groups() -> Iterator[str]:
        mux.close()
        yield "224.0.0.251"

    with pytest.raises((RuntimeError, OSError)):
        mux.datagram(LOCALHOST, nothing, join=groups())


@pytest.mark.linux_only("multicast on the loopback interface")
def test_a_group_that_cannot_be_joined_is_named(mux: muxcore.Mux) -> None:
    name = multicast_interface("239.1.2.3")
    with pytest.raises(OSError, match=rf"cannot join 239\.1\.2\.3 on {name}: Address already in use"):
        mux.datagram((None, 0), nothing, join=[("239.1.2.3", name)] * 2)
    with pytest.raises(OSError, match=r"cannot join 239\.1\.2\.3: "):
        mux.datagram((None, 0), nothing, join=["239.1.2.3"] * 2)


def test_a_socket_that_is_refused_stays_the_callers(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)

    def groups() -> Iterator[str]:
        mux.close()
        yield from ()

    with udp() as sock:
        with pytest.raises(RuntimeError, match="closed"):
            mux.datagram(sock, nothing, join=groups())
        assert sock.fileno() >= 0


def test_a_closed_mux_leaves_a_given_socket_as_it_is(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)
    mux.close()
    with udp() as sock, udp() as other:
        with pytest.raises(RuntimeError, match="closed"):
            mux.datagram(sock, nothing, remote=other.getsockname())
        with pytest.raises(OSError):
            sock.getpeername()


def test_addresses_that_are_remembered_are_bounded() -> None:
    with muxcore.Mux(backend="select") as mux:
        datagram: Any = mux.datagram(LOCALHOST, nothing)
        for port in range(1, 3001):
            datagram.send(b"", ("127.0.0.1", port))
        assert len(datagram._targets) <= 1024


def test_a_socket_is_accepted_whatever_its_class_does(mux: muxcore.Mux) -> None:
    class Deceiving(socket.socket):
        def fileno(self) -> int:
            return 0

        def detach(self) -> int:
            raise RuntimeError("kept")

        def setblocking(self, flag: bool) -> None:
            pass

    sock = Deceiving(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(LOCALHOST)
    box = echo()
    datagram = mux.datagram(sock, box)
    assert socket.socket.fileno(sock) == -1
    with udp() as peer:
        assert exchange(mux, box, peer, b"x", datagram.address) == b"x"


@pytest.mark.linux_only("it needs AF_NETLINK")
def test_a_socket_of_another_family_is_refused(mux: muxcore.Mux) -> None:
    """The compiled core read its addresses as those of IPv6."""
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM) as other,
        pytest.raises(ValueError, match="address must be a socket of UDP or Unix, not of the family 16"),
    ):
        mux.datagram(other, lambda datagram, messages: None)


# --- against mutants that survived (tests/mutants) ------------------------------------------------------


def test_without_on_error_only_the_first_is_logged(mux: muxcore.Mux, caplog: pytest.LogCaptureFixture) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    for _ in range(3):
        datagram.send(b"x", ("255.255.255.255", 9))
    until(mux, lambda: mux.stats().datagram_errors == 3)
    mux.poll(0)
    assert len(caplog.records) == 1


def test_an_error_ends_the_wait_for_other_things(mux: muxcore.Mux) -> None:
    """As any callback does."""
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    datagram.send(b"x", ("255.255.255.255", 9))
    start = time.monotonic()
    mux.poll(5)
    assert box.errors
    assert time.monotonic() - start < 4


@pytest.mark.linux_only("abstract names")
def test_senders_are_distinct_where_one_name_begins_with_the_other(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(f"\0muxcore-{os.getpid()}-receiver", box)
    long = f"\0muxcore-{os.getpid()}-sender"
    for name in (long, long[:-2], long):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(name)
            sock.sendto(b"x", datagram.address)
    until(mux, lambda: len(box.messages()) == 3)
    assert [address for _, address in box.messages()] == [long, long[:-2], long]


def test_a_flood_from_many_addresses_does_not_fill_memory(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)

    def flood(count: int) -> None:
        for i in range(count):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((f"127.0.{1 + i // 250}.{1 + i % 250}", 0))
                sock.sendto(b"x", datagram.address)
            if i % 32 == 0:
                mux.poll(0)

    flood(2500)
    tracemalloc.start()
    try:
        flood(4000)
        assert tracemalloc.get_traced_memory()[0] < 600_000
    finally:
        tracemalloc.stop()


@pytest.mark.linux_only("SO_TIMESTAMPING")
def test_a_time_stamp_is_not_an_error_and_does_not_spin(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    datagram.setsockopt(socket.SOL_SOCKET, 37, 1 << 1 | 1 << 4)  # SO_TIMESTAMPING: of what is sent, by software
    with udp() as sock:
        datagram.send(b"x", sock.getsockname())
        mux.poll(0)
        assert sock.recv(10) == b"x"
    turns(mux, 0.02)
    assert turns(mux, 0.05) == 0
    assert box.errors == []


def driven(mux: muxcore.Mux) -> None:
    if mux.backend != "epoll":
        pytest.skip("only epoll has a descriptor that reports the readiness of all")
    mux.fileno()


def test_a_driven_mux_sends_what_a_handler_sends_together_and_is_not_woken_for_it(mux: muxcore.Mux) -> None:
    driven(mux)
    box = Mailbox()
    box.on_datagrams = lambda datagram, messages: [  # type: ignore[method-assign, assignment, return-value]
        datagram.send(b"%d" % i, messages[0][1]) for i in range(3)
    ]
    datagram = mux.datagram(LOCALHOST, box)
    with udp() as sock:
        sock.sendto(b"x", datagram.address)
        while mux.stats().messages_out < 3:
            mux.poll(0.02)
        assert [sock.recv(10) for _ in range(3)] == [b"0", b"1", b"2"]
    assert (mux.stats().sendmsg_calls, mux.stats().wakeups) == (1, 0)
    assert select.select([mux.fileno()], [], [], 0)[0] == []


def test_a_driven_mux_is_readable_when_the_queue_is_below_high(mux: muxcore.Mux) -> None:
    driven(mux)
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    with udp() as sock:
        assert datagram.send(b"x", sock.getsockname())
    mux.poll(0)
    assert box.drains == 0


def test_a_socket_that_is_full_counts_what_its_end_drops(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, _ = full(max_outbox=300, high=300, low=0, overflow="close")
    while not datagram.closed:
        datagram.send(b"x" * 36)
    assert mux.stats().drops == mux.stats().messages_out + 1


def test_on_drain_comes_once_and_only_after_the_queue_was_above_high(mux: muxcore.Mux, full: Full) -> None:
    datagram, box, their = full(high=100, low=0)
    while datagram.send(b"one"):
        pass
    datagram.send(b"last")
    received(mux, their, b"last")
    until(mux, lambda: box.drains)
    datagram.send(b"more")
    assert received(mux, their, b"more") == [b"more"]
    mux.poll(0)
    assert box.drains == 1


@pytest.mark.linux_only("elsewhere a full queue is reported as a lack of memory, and tried again")
def test_a_full_queue_is_waited_for(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, their = full()
    datagram.send(b"x")
    mux.poll(0)
    before = mux.stats().sendmsg_calls
    assert turns(mux, 0.05) == 0
    assert (mux.stats().sendmsg_calls, mux.stats().would_blocks) == (before, 1)
    assert received(mux, their, b"x") == [b"x"]
    turns(mux, 0.02)
    assert turns(mux, 0.05) == 0, "and when it has gone, it is not waited for"


def test_no_drain_comes_after_close(mux: muxcore.Mux, full: Full) -> None:
    datagram, box, their = full(high=100, low=0)
    while datagram.send(b"one"):
        pass
    mux.poll(0)
    their.settimeout(0)
    with suppress(BlockingIOError):
        while their.recv(100):
            pass
    mux.call_soon(datagram.close)
    for _ in range(3):
        mux.poll(0)
    assert (datagram.closed, box.drains) == (True, 0)


def test_a_socket_for_large_datagrams_behind_one_for_small_ones(mux: muxcore.Mux) -> None:
    mux.datagram(LOCALHOST, Mailbox(), max_size=10)
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    sent = [bytes([i]) * 5000 for i in range(5)]
    with udp() as sock:
        for data in sent:
            sock.sendto(data, datagram.address)
        until(mux, lambda: len(box.messages()) == 5)
    assert box.data() == sent


@pytest.mark.unix_only("the lowest free descriptor is the next one")
def test_what_waits_in_a_socket_that_other_code_closed_is_dropped(
    mux: muxcore.Mux, full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    datagram, box, _ = full()
    datagram.send(b"x")
    mux.poll(0)
    number = datagram.fileno()
    os.close(number)
    ours, theirs = socket.socketpair()
    mux.attach(ours, lambda conn, message: None)
    assert (datagram.closed, mux.stats().drops, mux.stats().unsent) == (True, 1, 1)
    datagram.send(b"y")
    for _ in range(3):
        mux.poll(0)
    assert box.errors == []
    theirs.close()


def test_an_interrupt_leaves_the_sockets_as_they_are(mux: muxcore.Mux) -> None:
    box = echo()
    datagram = mux.datagram(LOCALHOST, box)
    datagram.data = b"\xff" * 4096

    def interrupt() -> None:
        raise KeyboardInterrupt

    mux.call_soon(interrupt)
    with pytest.raises(KeyboardInterrupt):
        mux.poll(0)
    with udp() as sock:
        assert exchange(mux, box, sock, b"x", datagram.address) == b"x"
    assert datagram.data == b"\xff" * 4096


def interrupt() -> None:
    raise KeyboardInterrupt


def empty(sock: socket.socket) -> None:
    """Receive what is there."""
    sock.settimeout(0)
    with suppress(BlockingIOError):
        while True:
            sock.recv(1 << 17)


def test_data_is_none_at_first(mux: muxcore.Mux) -> None:
    assert mux.datagram(LOCALHOST, nothing).data is None


def test_what_comes_in_is_counted(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    with udp() as sock:
        sock.sendto(b"123", datagram.address)
        until(mux, lambda: box.batches)
    stats = mux.stats()
    assert (stats.messages_in, stats.bytes_in) == (1, 3)
    assert 1 <= stats.recv_calls <= 2, "of which one may have found nothing more"


def test_what_is_sent_between_two_turns_wakes_nothing(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    with udp() as sock:
        datagram.send(b"x", sock.getsockname())
        mux.poll(0)
        mux.poll(0)
        assert sock.recv(10) == b"x"
    assert (mux.stats().wakeups, mux.stats().events) == (0, 0)


# What a raw socket sends has the headers that it is given.


@pytest.fixture
def raw() -> Iterator[socket.socket]:
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    except PermissionError:
        pytest.skip("this user may not make a raw socket")
    with sock:
        yield sock


def send_from_port_0(raw: socket.socket, host: str, address: tuple[str, int]) -> None:
    content = struct.pack("!HHHH", 0, address[1], 8 + 1, 0) + b"x"
    ends = socket.inet_aton(host) + socket.inet_aton(address[0])
    raw.sendto(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(content), 0, 0, 64, 17, 0) + ends + content, (address[0], 0))


@pytest.mark.linux_only("the headers that a raw socket is given")
def test_a_sender_from_port_0_gets_no_reply_and_the_others_do(mux: muxcore.Mux, raw: socket.socket) -> None:
    box = echo()
    datagram = mux.datagram(LOCALHOST, box)
    send_from_port_0(raw, "127.0.0.1", datagram.address)
    until(mux, lambda: box.batches)
    with udp() as sock:
        assert exchange(mux, box, sock, b"y", datagram.address) == b"y"
    assert box.messages()[0] == (b"x", ("127.0.0.1", 0))
    assert (mux.stats().drops, box.errors) == (1, [])


@pytest.mark.linux_only("the headers that a raw socket is given")
def test_a_flood_from_port_0_does_not_fill_memory(mux: muxcore.Mux, raw: socket.socket) -> None:
    """The compiled core kept the address of each."""
    datagram = mux.datagram(LOCALHOST, nothing)

    def flood(count: int) -> None:
        for i in range(count):
            send_from_port_0(raw, f"127.1.{i // 250}.{1 + i % 250}", datagram.address)
            if i % 32 == 0:
                mux.poll(0)

    flood(100)
    tracemalloc.start()
    try:
        flood(4000)
        assert mux.stats().messages_in > 3000
        assert tracemalloc.get_traced_memory()[0] < 300_000
    finally:
        tracemalloc.stop()


def test_an_address_with_a_zone_is_looked_up_each_time(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a zone may change."""
    datagram = mux.datagram(LOCALHOST, nothing)
    with udp() as one, udp() as two:
        places = [two.getsockname(), one.getsockname()]
        monkeypatch.setattr("muxcore._address.destination", lambda family, address: places.pop())
        for sock in (one, two):
            assert datagram.send(b"x", ("fe80::1%lo", 9))
            mux.poll(0)
            assert sock.recv(10) == b"x"


def test_receiving_uses_the_same_memory_again(backend: str, mux: muxcore.Mux) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    with udp() as sock:

        def receive(count: int) -> None:
            for _ in range(count):
                sock.sendto(b"x", datagram.address)
                mux.poll(1)

        receive(50)
        with memory(backend) as used:
            receive(500)
            assert used() < 2_000_000
    assert mux.stats().messages_in == 550


def test_a_smaller_buffer_is_freed_for_a_larger_one(backend: str, mux: muxcore.Mux) -> None:
    with memory(backend) as used:
        for size in range(1000, 1400):
            mux.datagram(LOCALHOST, nothing, max_size=size).close()
        assert used() < 2_000_000


def test_what_was_sent_is_let_go(mux: muxcore.Mux) -> None:
    datagram = mux.datagram(LOCALHOST, nothing)
    data = os.urandom(100)
    before = sys.getrefcount(data)
    with udp() as sock:
        for _ in range(3):
            datagram.send(data, sock.getsockname())
            mux.poll(0)
    assert sys.getrefcount(data) == before


@pytest.mark.linux_only("an ICMP error is there when send returns")
def test_an_error_that_comes_again_later_costs_no_datagram_either(mux: muxcore.Mux) -> None:
    box, address = Mailbox(), closed_port()
    datagram = mux.datagram(None, box, remote=address)
    for count in (1, 2):
        datagram.send(b"refused")
        mux.poll(0)
        with udp(address) as sock:
            datagram.send(b"must arrive")
            mux.poll(0)
            assert sock.recv(100) == b"must arrive"
        until(mux, lambda count=count: len(box.errors) == count)
    assert mux.stats().drops == 0


def test_more_errors_than_a_turn_reports_are_only_counted(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box, max_size=1)
    with udp() as sock:
        for _ in range(100):
            sock.sendto(b"too large", datagram.address)
        until(mux, lambda: mux.stats().datagram_errors == 100)
        until(mux, lambda: len(box.errors) >= 64)
    mux.poll(0)
    assert (len(box.errors), mux.stats().drops) == (64, 100)


def test_a_batch_of_exactly_so_many_ends_without_an_error(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    with udp() as sock:
        for _ in range(64):
            sock.sendto(b"x", datagram.address)
        until(mux, lambda: box.batches)
        mux.poll(0)
    assert ([len(batch) for batch in box.batches], box.errors) == ([64], [])


def test_one_that_is_too_large_and_comes_alone_is_counted_once(mux: muxcore.Mux) -> None:
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box, max_size=1)
    with udp() as sock:
        sock.sendto(b"too large", datagram.address)
        until(mux, lambda: box.errors)
    assert (mux.stats().drops, box.batches) == (1, [])


def test_read_budget_bounds_what_one_socket_reads_in_a_turn(backend: str) -> None:
    with muxcore.Mux(backend=backend, read_budget=1000) as mux, udp() as sock:
        box = Mailbox()
        datagram = mux.datagram(LOCALHOST, box)
        for _ in range(150):
            sock.sendto(bytes(100), datagram.address)
        for count in (1, 2, 3):
            mux.poll(1)
            assert len(box.batches) == count


def test_close_of_the_mux_inside_the_handler_ends_the_batch(mux: muxcore.Mux) -> None:
    batches: list[int] = []

    def once(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        batches.append(len(messages))
        mux.close()

    datagram = mux.datagram(LOCALHOST, once)
    with udp() as sock:
        for _ in range(100):
            sock.sendto(b"x", datagram.address)
        until(mux, lambda: mux.closed)
    assert (batches, datagram.closed) == ([64], True)


def test_a_handler_without_on_drain_is_not_called_for_a_drain(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, their = full(nothing, high=100, low=0)
    while datagram.send(b"one"):
        pass
    datagram.send(b"last")
    received(mux, their, b"last")
    mux.poll(0)
    assert datagram.send(b"x")
    assert mux.stats().handler_errors == 0


def crowded(mux: muxcore.Mux, their: socket.socket, **limits: int) -> tuple[muxcore.Datagram, Mailbox]:
    """A socket with eight datagrams of 164 bytes for a receiver that is full: they go out one by one as it receives."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stuffer, suppress(OSError):
        stuffer.setblocking(False)
        while True:
            stuffer.sendto(b"stuffing", their.getsockname())
    box = Mailbox()
    datagram = mux.datagram(f"{their.getsockname()}.ours", box, limits=muxcore.Limits(overflow="drop", **limits))
    for _ in range(8):
        datagram.send(bytes(100), their.getsockname())
    return datagram, box


def received_one(mux: muxcore.Mux, their: socket.socket) -> int:
    """Receive one; how many of eight are left behind those that then found room."""
    before = mux.stats().bytes_out
    their.recv(200)
    until(mux, lambda: mux.stats().bytes_out > before)
    mux.poll(0)
    return 8 - mux.stats().bytes_out // 100


@pytest.mark.linux_only("how many datagrams a receiver has room for")
def test_on_drain_comes_with_the_datagram_that_brings_the_queue_to_low(mux: muxcore.Mux, socket_path: Path) -> None:
    with udp(str(socket_path), socket.AF_UNIX) as their:
        _, box = crowded(mux, their, high=1000, low=3 * 164)
        left = 8
        while left:
            left = received_one(mux, their)
            assert box.drains == (left <= 3)


@pytest.mark.linux_only("how many datagrams a receiver has room for")
def test_send_is_false_until_the_queue_is_at_low(mux: muxcore.Mux, socket_path: Path) -> None:
    with udp(str(socket_path), socket.AF_UNIX) as their:
        datagram, box = crowded(mux, their, high=1000, low=0)
        left = 8
        while left > 4:
            left = received_one(mux, their)
        assert datagram.send(b"x", str(socket_path)) is bool(box.drains), "though it is below high again"


def test_a_queue_of_exactly_max_outbox_is_full(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, _ = full(high=200, low=0, max_outbox=200, overflow="drop")
    assert [datagram.send(bytes(36)) for _ in range(3)] == [True, True, False], "100 bytes each"
    assert (mux.stats().messages_out, mux.stats().drops) == (2, 1)


def test_what_is_sent_behind_run_goes_out_at_once(mux: muxcore.Mux) -> None:
    """There may be no other turn."""
    datagram = mux.datagram(LOCALHOST, nothing)
    mux.call_soon(mux.stop)
    mux.run()
    with udp() as sock:
        assert datagram.send(b"x", sock.getsockname())
        assert sock.recv(10) == b"x"


def test_send_behind_run_is_true_up_to_high(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, _ = full(high=200, low=0)
    mux.call_soon(mux.stop)
    mux.run()
    assert [datagram.send(bytes(36)) for _ in range(3)] == [True, True, False], "100 bytes each"
    assert mux.stats().high_water_hits == 1


def test_what_a_callback_sends_above_high_is_waited_for(mux: muxcore.Mux, full: Full) -> None:
    datagram, _, their = full(high=0, low=0)
    mux.call_soon(datagram.send, b"x")
    mux.poll(0)
    assert received(mux, their, b"x") == [b"x"]


def test_a_drain_that_is_owed_is_none_if_the_queue_is_above_high_again(mux: muxcore.Mux, full: Full) -> None:
    datagram, box, their = full(high=100, low=0)

    def fill() -> None:
        while datagram.send(b"x"):
            pass

    fill()
    mux.poll(0)
    empty(their)
    mux.call_soon(fill)  # behind the event, and in front of the report
    mux.poll(0)
    assert box.drains == 0
    datagram.send(b"last")
    received(mux, their, b"last")
    until(mux, lambda: box.drains)
    assert box.drains == 1


def test_a_drain_that_an_interrupt_has_held_up_ends_the_wait(mux: muxcore.Mux, full: Full) -> None:
    datagram, box, their = full(high=100, low=0)
    while datagram.send(b"x"):
        pass
    mux.poll(0)
    empty(their)
    mux.call_soon(datagram.send, b"x")  # behind the event: all goes out, and the drain is owed
    mux.call_soon(interrupt)
    with pytest.raises(KeyboardInterrupt):
        mux.poll(0)
    assert box.drains == 0
    start = time.monotonic()
    mux.poll(DEADLINE / 2)
    assert box.drains == 1
    assert time.monotonic() - start < DEADLINE / 4


def test_a_driven_mux_is_woken_for_an_error_of_a_send(mux: muxcore.Mux) -> None:
    driven(mux)
    box = Mailbox()
    datagram = mux.datagram(LOCALHOST, box)
    mux.poll(0)
    number = mux.fileno()  # each look makes it readable if there is something to do
    assert select.select([number], [], [], 0)[0] == []
    datagram.send(b"x", ("255.255.255.255", 9))
    assert select.select([number], [], [], 0)[0]
    mux.poll(0)
    assert [type(error) for error in box.errors] == [PermissionError]


def test_a_socket_that_cannot_be_watched_for_room_is_tried_again_after_a_while(mux: muxcore.Mux, full: Full) -> None:
    driven(mux)
    datagram, _, their = full()
    with select.epoll.fromfd(os.dup(mux.fileno())) as other:
        other.unregister(datagram.fileno())  # so that the Mux cannot change the events that it waits for
    mux.call_soon(datagram.send, b"x")
    mux.poll(0)
    before = sends(mux)
    turns(mux, 0.05)
    assert 0 < sends(mux) - before <= 10
    assert received(mux, their, b"x") == [b"x"]


@pytest.mark.linux_only("a full receiver that is not connected is tried again after a while")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_socket_whose_timer_could_not_be_set_outside_of_a_turn_is_not_forgotten(
    mux: muxcore.Mux, socket_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    from muxcore._timers import Timers

    add = Timers.add

    def fails(self: Any, *args: Any) -> Any:
        monkeypatch.setattr(Timers, "add", add)
        raise error

    with udp(str(socket_path), socket.AF_UNIX) as theirs:
        datagram = mux.datagram(f"{socket_path}.ours", nothing)
        mux.call_soon(mux.stop)
        mux.run()  # from now on it is sent at once
        monkeypatch.setattr(Timers, "add", fails)
        sent: list[bytes] = []
        with pytest.raises(error):
            while True:
                sent.append(b"%d" % len(sent))
                datagram.send(sent[-1], str(socket_path))
        assert received(mux, theirs, sent[-1]) == sent


class Late:
    """A handler that notes whether it is called for a socket that is closed already: not by a collection that CPython
    3.12 and newer may run at the beginning of the callback itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.received = 0
        self.began = False

    def close(self, datagram: muxcore.Datagram) -> None:
        frame: Any = sys._getframe()
        while frame is not None:
            self.began = self.began or (frame.f_code.co_name.startswith("on_") and frame.f_locals.get("self") is self)
            frame = frame.f_back
        datagram.close()

    def note(self, callback: str, datagram: muxcore.Datagram) -> None:
        self.calls.append((callback, datagram.closed and not self.began))

    def on_datagrams(self, datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        self.note("datagrams", datagram)
        self.received += len(messages)

    def on_error(self, datagram: muxcore.Datagram, exc: BaseException) -> None:
        self.note("error", datagram)

    def on_drain(self, datagram: muxcore.Datagram) -> None:
        self.note("drain", datagram)


@pytest.mark.parametrize(("data", "callback"), [(b"x", "datagrams"), (b"too large", "error")])
def test_no_callback_comes_after_a_finaliser_has_closed_the_socket_at_any_allocation(
    mux: muxcore.Mux, data: bytes, callback: str
) -> None:
    calls: set[tuple[str, bool]] = set()
    for number in range(1, 60):
        late = Late()
        before = mux.stats()
        with udp() as sock:
            datagram = mux.datagram(LOCALHOST, late, max_size=1)
            for _ in range(3):
                sock.sendto(data, datagram.address)
            with collecting(partial(late.close, datagram), number):
                mux.poll(0)
        calls.update(late.calls)
        if data == b"x":
            after = mux.stats()
            assert after.drops - before.drops + late.received == after.bytes_in - before.bytes_in
            assert after.datagram_errors == before.datagram_errors
    assert calls == {(callback, False)}


def test_no_drain_comes_after_a_finaliser_has_closed_the_socket_at_any_allocation(
    mux: muxcore.Mux, full: Full
) -> None:
    calls: set[tuple[str, bool]] = set()
    for number in range(1, 30):
        late = Late()
        datagram, _, their = full(late, high=100, low=0)
        while datagram.send(b"x"):
            pass
        mux.poll(0)
        empty(their)
        with collecting(partial(late.close, datagram), number):
            mux.poll(0)
        calls.update(late.calls)
        datagram.close()
    assert calls == {("drain", False)}
