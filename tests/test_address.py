"""Addresses: each function accepts every address that muxcore returns, and all accept the same ones (Promise
addresses)."""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE, LOCALHOST, Recorder, client, exchange, reset, until

import muxcore
from muxcore import _address

Use = Callable[[muxcore.Mux, Any], Any]

linux_only = pytest.mark.linux_only("abstract names")


def ignore(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None: ...


USES: dict[str, Use] = {
    "listen": lambda mux, address: mux.listen(address, Recorder()),
    "connect": lambda mux, address: mux.connect(address, Recorder()),
    "datagram": lambda mux, address: mux.datagram(address, ignore),
    "datagram(remote=)": lambda mux, address: mux.datagram(None, ignore, remote=address),
    "datagram.send": lambda mux, address: (
        mux.datagram(LOCALHOST if isinstance(address, tuple | list) else f"\0{os.getpid()}", ignore).send(b"x", address)
    ),
    "local_address": lambda mux, address: mux.connect(("127.0.0.1", 9), Recorder(), local_address=address),
}


@pytest.fixture(params=list(USES))
def use(request: pytest.FixtureRequest) -> Use:
    return USES[request.param]


# --- names of hosts --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1\0.partner.example", "localhost\0.partner.example"])
def test_a_nul_in_a_host_is_refused_everywhere(mux: muxcore.Mux, use: Use, host: str) -> None:
    """The resolver would use what is before it, so that a list of allowed names sees another name."""
    with pytest.raises(ValueError, match="address host must not contain NUL"):
        use(mux, (host, 9))


def test_an_ipv4_mapped_literal_is_one_of_ipv4(mux: muxcore.Mux) -> None:
    listener = mux.listen(("::ffff:127.0.0.1", 0), Recorder())
    assert listener.address[0] == "127.0.0.1"
    mux.connect(("::ffff:127.0.0.1", listener.address[1]), recorder := Recorder())
    until(mux, lambda: recorder.count("open"))
    assert mux.datagram(("::ffff:127.0.0.1", 0), ignore).address[0] == "127.0.0.1"
    assert mux.datagram(None, ignore, remote=("::ffff:127.0.0.1", 9)).remote == ("127.0.0.1", 9)


@pytest.mark.parametrize("address", [LOCALHOST, None], ids=["IPv4", "both"])
def test_an_ipv4_mapped_literal_can_be_sent_to(mux: muxcore.Mux, address: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(LOCALHOST)
        sock.settimeout(5)
        datagram = mux.datagram(address, ignore)
        datagram.send(b"short", ("::ffff:127.0.0.1", sock.getsockname()[1]))
        datagram.send(b"long", ("::ffff:127.0.0.1", sock.getsockname()[1], 0, 0))
        mux.poll(0)
        assert [sock.recv(10), sock.recv(10)] == [b"short", b"long"]


@pytest.mark.skipif(sys.platform != "linux", reason="numbers of zones on addresses that need none")
def test_a_zone_is_accepted_everywhere(mux: muxcore.Mux) -> None:
    listener = mux.listen(("::1%1", 0), Recorder())
    mux.connect(("::1%1", listener.address[1]), recorder := Recorder())
    until(mux, lambda: recorder.count("open"))
    received: list[Any] = []
    datagram = mux.datagram(("::1%1", 0), lambda datagram, messages: received.extend(messages))
    mux.datagram(None, ignore).send(b"sent", ("::1%1", datagram.address[1]))
    mux.datagram(None, ignore, remote=("::1%1", datagram.address[1])).send(b"connected")
    until(mux, lambda: len(received) == 2)


def test_a_zone_is_kept_beside_flowinfo_and_scope() -> None:
    from muxcore import _address

    name = socket.if_indextoname(1) if hasattr(socket, "if_indextoname") else "lo"
    [(_, target)] = _address.literal((f"fe80::1%{name}", 5, 0, 0)) or [(0, None)]
    assert target == ("fe80::1", 5, 0, 1)


def test_flowinfo_and_scope_are_part_of_an_address() -> None:
    [(_, target)] = _address.literal(("fe80::1", 5, 7, 1)) or [(0, None)]
    assert target == ("fe80::1", 5, 7, 1)


def refuse_ipv6(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the kernel make no socket of IPv6, for that reason."""
    real = socket.socket

    class NoIPv6(real):  # type: ignore[valid-type, misc]
        def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
            if family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            super().__init__(family, type, proto, fileno)

    monkeypatch.setattr(socket, "socket", NoIPv6)


@pytest.fixture
def no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was started with ipv6.disable=1."""
    refuse_ipv6(monkeypatch, errno.EAFNOSUPPORT)


@pytest.mark.parametrize("host", [None, "", "localhost"])
def test_without_ipv6_it_is_ipv4(no_ipv6: None, mux: muxcore.Mux, host: str | None) -> None:
    listener = mux.listen((host, 0), lambda conn, message: conn.send(message))
    with client(listener) as sock:
        assert exchange(mux, sock, b"x") == b"x"
    assert len(mux.datagram((host, 0), ignore).address) == 2
    assert len(mux.datagram(None, ignore).address) == 2


@pytest.mark.parametrize("method", ["listen", "datagram"])
def test_without_ipv6_an_address_of_ipv6_is_refused(no_ipv6: None, mux: muxcore.Mux, method: str) -> None:
    with pytest.raises(OSError) as caught:
        getattr(mux, method)(("::1", 0), ignore)
    assert caught.value.errno == errno.EAFNOSUPPORT


def test_an_error_other_than_the_lack_of_ipv6_is_raised(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such an error is no reason to listen on IPv4 alone."""
    refuse_ipv6(monkeypatch, errno.EACCES)
    with pytest.raises(PermissionError):
        mux.listen((None, 0), Recorder())


# --- names of Unix sockets -------------------------------------------------------------------------


@pytest.fixture
def abstract() -> str:
    return f"\0muxcore test_address {os.getpid()}"


@linux_only
def test_an_abstract_name_that_was_handed_out_is_accepted_everywhere(mux: muxcore.Mux, abstract: str) -> None:
    listener = mux.listen(abstract, lambda conn, message: conn.send(message))
    assert listener.address == abstract
    conn = mux.connect(listener.address, recorder := Recorder())
    until(mux, lambda: recorder.count("open"))
    assert conn.peer == abstract
    [accepted] = [one for one in mux.connections if one.listener is listener]
    assert accepted.local == abstract
    received: list[Any] = []
    datagram = mux.datagram(abstract, lambda datagram, messages: received.extend(messages))
    sender = mux.datagram(abstract + " 2", ignore, remote=datagram.address)
    assert (sender.remote, sender.address) == (abstract, abstract + " 2")
    sender.send(b"connected", datagram.address)
    mux.datagram(abstract + " 3", ignore).send(b"named", datagram.address)
    until(mux, lambda: len(received) == 2)
    assert received == [(b"connected", abstract + " 2"), (b"named", abstract + " 3")]


@linux_only
def test_the_name_of_a_client_is_handed_out_as_that_of_a_listener(mux: muxcore.Mux, abstract: str) -> None:
    listener = mux.listen(abstract, recorder := Recorder())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(abstract + " client")
        sock.connect(abstract)
        until(mux, lambda: recorder.connections)
        assert recorder.connections[0].peer == abstract + " client"
        assert listener.connections == 1


@linux_only
@pytest.mark.parametrize("name", ["padded", "full"])
def test_an_abstract_name_may_have_all_bytes_of_sun_path(mux: muxcore.Mux, abstract: str, name: str) -> None:
    name = abstract.ljust(108, "\0" if name == "padded" else "x")
    listener = mux.listen(name, Recorder())
    assert listener.address == name
    mux.connect(name, recorder := Recorder())
    until(mux, lambda: recorder.count("open"))
    with pytest.raises(ValueError, match="address path must be at most 108 bytes"):
        mux.listen(name + "x", Recorder())


@linux_only
def test_an_abstract_name_may_be_bytes_that_are_no_text(mux: muxcore.Mux, abstract: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(abstract.encode() + b"\xff\xfe")
        server.listen()
        conn = mux.connect(server.getsockname(), recorder := Recorder())
        until(mux, lambda: recorder.count("open"))
        assert conn.peer == abstract + "\udcff\udcfe"
        mux.connect(conn.peer, recorder)
        until(mux, lambda: recorder.count("open") == 2)


def test_an_address_of_subclasses_becomes_one_of_plain_types() -> None:
    """To compare it runs no code of the user's."""

    class Text(str):
        __slots__ = ()

    class Number(int):
        pass

    found = [_address.as_address(Text("./path")), *_address.as_address((Text("::1"), Number(1), Number(2), Number(3)))]
    assert found == ["./path", "::1", 1, 2, 3]
    assert {type(part) for part in found} == {str, int}


@pytest.mark.unix_only("Unix sockets")
def test_a_path_may_have_all_bytes_of_sun_path_but_one(mux: muxcore.Mux, socket_path: Path) -> None:
    path = str(socket_path).ljust(_address.SUN_PATH - 1, "x")
    listener = mux.listen(path, lambda conn, message: conn.send(message))
    with client(listener) as sock:
        assert exchange(mux, sock, b"x") == b"x"
    with pytest.raises(ValueError, match="address path must be at most"):
        mux.listen(path + "x", Recorder())


@pytest.mark.unix_only("Unix sockets")
def test_a_path_may_have_one_character(mux: muxcore.Mux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("x")
        mux.datagram(None, ignore, remote="x").send(b"y")
        mux.poll(0)
        assert sock.recv(10) == b"y"


@pytest.mark.unix_only("Unix sockets")
def test_fspath_of_a_path_is_called_once(mux: muxcore.Mux, socket_path: Path) -> None:
    class Changing:
        def __init__(self) -> None:
            self.calls = 0

        def __fspath__(self) -> str:
            self.calls += 1
            return str(socket_path) if self.calls == 1 else f"{socket_path}\0"

    path: Any = Changing()
    assert mux.listen(path, Recorder()).address == str(socket_path)


@pytest.mark.parametrize(("rest", "host"), [((), "127.0.0.1"), ((0, 0), "::1")], ids=["two", "four"])
def test_a_name_of_both_families_is_of_the_family_that_the_address_has(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch, rest: Any, host: str
) -> None:
    """With a flowinfo and a scope it is meant to be of IPv6."""
    real = socket.getaddrinfo

    def getaddrinfo(name: Any, *args: Any, **options: Any) -> Any:
        if name != "both.test":
            return real(name, *args, **options)
        return [found for name in ("::1", "127.0.0.1") for found in real(name, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert mux.listen(("both.test", 0, *rest), Recorder()).address[0] == host


# --- sockets that are given ------------------------------------------------------------------------

LINGER = struct.pack("HH" if sys.platform == "win32" else "ii", 1, 60)


def lingers(conn: muxcore.Connection) -> bool:
    value = conn.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(LINGER))
    assert isinstance(value, bytes)
    return any(value[: len(value) // 2])


@pytest.mark.parametrize("how", ["attach", "listen"])
def test_a_socket_that_lingers_is_cured_of_it(mux: muxcore.Mux, how: str) -> None:
    """close(2) of a nonblocking socket would sleep, and the loop with it."""
    sock = socket.socket()
    sock.bind(LOCALHOST)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
    if how == "listen":
        listener = mux.listen(sock, recorder := Recorder())
        with client(listener):
            until(mux, lambda: recorder.connections)
            assert not lingers(recorder.connections[0])
    else:
        with socket.create_server(LOCALHOST) as server:
            sock.connect(server.getsockname())
            conn = mux.attach(sock, Recorder())
            assert not lingers(conn)


def test_a_connection_cannot_be_made_to_linger(mux: muxcore.Mux) -> None:
    mux.listen(LOCALHOST, recorder := Recorder())
    with client(mux._listeners()[0]) as sock:
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        with pytest.raises(ValueError, match=r"must have no time, .*: set Timeouts\.linger"):
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytearray(LINGER))
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset(sock)


def test_what_cannot_make_it_linger_is_the_kernels_to_judge(mux: muxcore.Mux) -> None:
    with socket.create_server(LOCALHOST) as server:
        conn = mux.attach(socket.create_connection(server.getsockname()), Recorder())
        for value in (1, bytes(3), bytes(1)):
            with pytest.raises(OSError):
                conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 60))  # off, whatever the time
        assert not lingers(conn)


def test_what_looks_like_a_time_to_linger_may_be_the_value_of_another_option(mux: muxcore.Mux) -> None:
    with socket.create_server(LOCALHOST) as server:
        conn = mux.attach(socket.create_connection(server.getsockname()), Recorder())
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, struct.pack("HH", 1, 1))
        with pytest.raises(OSError):
            conn.setsockopt(socket.SOL_SOCKET, 1 << 20, LINGER)  # which no system has


@pytest.mark.linux_only("elsewhere there may be a struct linger of four bytes")
def test_half_a_struct_linger_is_the_kernels_to_judge(mux: muxcore.Mux) -> None:
    with socket.create_server(LOCALHOST) as server:
        conn = mux.attach(socket.create_connection(server.getsockname()), Recorder())
        with pytest.raises(OSError):
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(4))


@pytest.mark.parametrize("name", ["getsockopt", "setsockopt"])
def test_an_argument_that_closes_the_connection_reaches_no_other_descriptor(mux: muxcore.Mux, name: str) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, recorder := Recorder())
    until(mux, lambda: recorder.connections)
    number, others = conn.fileno(), []

    class Closes:
        def __index__(self) -> int:
            conn.detach().close()
            others.append(socket.socket())
            return int(socket.SO_KEEPALIVE)

    with pytest.raises(muxcore.ConnectionClosed, match=name):
        getattr(conn, name)(socket.SOL_SOCKET, Closes(), *([1] if name == "setsockopt" else []))
    assert others[0].fileno() == number
    assert not others[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    others[0].close()
    theirs.close()


@pytest.mark.parametrize(
    ("mistaken", "meant"),
    [
        ("127.0.0.1:8888", "('127.0.0.1', 8888)"), (":80", "(None, 80)"), ("[::1]:80", "('::1', 80)"),
        ("a.b:1", "('a.b', 1)"),
    ],
)
def test_a_host_and_a_port_in_one_string_are_no_path(mistaken: str, meant: str) -> None:
    """Promise bad-arguments: it would listen on a Unix socket of that name, in silence."""
    with pytest.raises(ValueError, match=re.escape(f"address must be {meant} for TCP or UDP, or './{mistaken}'")):
        _address.as_address(mistaken)


@pytest.mark.parametrize(
    ("mistaken", "host"),
    [
        ("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "::"), ("fe80::1%eth0", "fe80::1%eth0"), ("[::1]", "::1"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
def test_a_host_without_a_port_is_no_path(mistaken: str, host: str) -> None:
    """Promise bad-arguments."""
    text = f"address must be ({host!r}, port) for TCP or UDP, or './{mistaken}' for a Unix socket, not {mistaken!r}"
    with pytest.raises(ValueError, match=re.escape(text)):
        _address.as_address(mistaken)


def test_localhost_as_a_path_is_named_in_development_mode_alone() -> None:
    program = """
        import muxcore
        with muxcore.Mux() as mux:
            mux.connect("localhost", print)
    """
    for options, warned in ([], False), (["-X", "dev"], True):
        command = [sys.executable, *options, "-c", textwrap.dedent(program)]
        err = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True).stderr
        assert ("<string>:4: RuntimeWarning: address 'localhost' is the path of a Unix socket: pass" in err) == warned


@pytest.mark.parametrize("method", ["listen", "connect", "datagram", "remote", "send"])
@pytest.mark.parametrize("mistaken", ["127.0.0.1", "127.0.0.1:1"])
def test_a_host_in_a_str_is_refused_everywhere(mux: muxcore.Mux, method: str, mistaken: str) -> None:
    datagram = mux.datagram(LOCALHOST, ignore)
    calls: dict[str, Callable[[Any], object]] = {
        "listen": mux.listen, "connect": mux.connect, "datagram": lambda address: mux.datagram(address, ignore),
        "remote": lambda address: mux.datagram(None, ignore, remote=address),
        "send": lambda address: datagram.send(b"x", address),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"address must be \('127.0.0.1', (port|1)\) for TCP or UDP, or"):
        calls[method](mistaken)


@pytest.mark.parametrize("address", [["127.0.0.1", 9], ["::1", 9, 0, 0]])
def test_a_list_is_refused_with_the_tuple_to_pass(mux: muxcore.Mux, use: Use, address: Any) -> None:
    """Promise bad-arguments: an address from JSON is a list."""
    with pytest.raises(TypeError, match=re.escape(f"address must be a tuple, not a list: pass {tuple(address)!r}")):
        use(mux, address)


@pytest.mark.parametrize(
    "path",
    [
        "./127.0.0.1:8888", "/run/a:1", "name:x", "name", "./127.0.0.1", "./::1", "127.0.0", "1", "::g", "127.0.0.1%x",
        "/::1", "\udcff", pytest.param("\0name:1", marks=linux_only), pytest.param("\0::1", marks=linux_only),
    ],
    ids=ascii,
)
def test_a_path_that_resembles_a_host_is_one(path: str) -> None:
    assert _address.as_address(path) == path


@pytest.mark.unix_only("Unix sockets")
@pytest.mark.parametrize("name", ["127.0.0.1", "name:1"])
def test_a_unix_sender_whose_path_resembles_a_host_is_replied_to(
    mux: muxcore.Mux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Promise addresses: a client chooses its path, and should raise nothing in the server."""
    monkeypatch.chdir(tmp_path)
    received: list[Any] = []

    def reply(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        received.extend(messages)
        datagram.send(b"reply", messages[0][1])

    mux.datagram("server", reply)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        sock.sendto(b"x", "server")
        until(mux, lambda: received)
        mux.poll(0)
        sock.settimeout(5)
        assert sock.recv(10) == b"reply"
