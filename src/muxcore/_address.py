"""What may live here: addresses as the user writes them, and sockets made or configured from them.

Shared by every core; nothing here is hot.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  getaddrinfo asks for it, and without a descriptor left it could not be read then
import os
import socket
import struct
import sys

from ._config import check_int, check_seconds
from ._typing import TYPE_CHECKING
from ._unix import SocketFile, bind_path

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    Target = tuple[int, Any]
    """A family, and an address that `socket.connect` takes without resolving."""

Address = tuple[str | None, int] | tuple[str, int, int, int] | str | os.PathLike[str]

NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # elsewhere Python ignores SIGPIPE
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)  # on Windows nobody else can make a socket blocking
INTERNET = (socket.AF_INET, socket.AF_INET6)
LONGEST_KEEPALIVE = 32767  # what TCP_KEEPIDLE takes
# Seconds between keepalive probes, and how many may go unanswered, once `keepalive` seconds were idle.
KEEPALIVE_INTERVAL = 5
KEEPALIVE_COUNT = 3
KEEPALIVE_IDLE = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)  # macOS: the latter

# Bytes of data, with 65,535 for the whole packet: less the headers of IPv4 and UDP; less that of UDP.
LARGEST_DATAGRAM = {socket.AF_INET: 65507, socket.AF_INET6: 65527}

LONGEST_PATH = 107 if sys.platform == "linux" else 103  # of sun_path, without its NUL


def check_address(address: object) -> None:
    """Raise TypeError or ValueError that says what is wrong with an address; None if it is well formed."""
    if isinstance(address, str | os.PathLike):
        path = os.fspath(address)
        if not isinstance(path, str):
            raise TypeError("address path must be str, not bytes")
        if not path:
            raise ValueError("address path must not be empty")
        if path[0] == "\0":
            if sys.platform != "linux":
                raise ValueError(f"address path must not begin with NUL: {sys.platform} has no abstract names")
        elif "\0" in path:  # bind(2) would take what is before it
            raise ValueError("address path must not contain NUL, but at the beginning of an abstract name")
        if (size := len(os.fsencode(path))) > LONGEST_PATH:
            raise ValueError(f"address path must be at most {LONGEST_PATH} bytes (sun_path), not {size}")
        if not hasattr(socket, "AF_UNIX"):
            raise ValueError(f"address must be (host, port): Python has no Unix sockets on {sys.platform}")
        return
    if not isinstance(address, tuple) or len(address) not in (2, 4):
        raise TypeError(
            f"address must be (host, port), (host, port, flowinfo, scope_id) or a path, not {address!r}"
        )
    host, port, *rest = address
    if host is not None and not isinstance(host, str):
        raise TypeError(f"address host must be a str or None, not {type(host).__name__}")
    tops = {"port": 0xFFFF, "flowinfo": 0xFFFFF, "scope_id": 0xFFFFFFFF}
    for (name, top), value in zip(tops.items(), (port, *rest), strict=False):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"address {name} must be an int, not {type(value).__name__}")
        if not 0 <= value <= top:
            raise ValueError(f"address {name} must be in 0..{top}, not {value}")


class Tcp:
    """Options of TCP sockets. TypeError or ValueError for bad ones; sockets of other families have none."""

    __slots__ = ("keepalive", "nodelay", "user_timeout")

    def __init__(self, nodelay: bool, keepalive: float | None, user_timeout: float | None) -> None:
        if keepalive is not None and check_seconds("keepalive", keepalive) > LONGEST_KEEPALIVE:
            raise ValueError(f"keepalive must be <= {LONGEST_KEEPALIVE} seconds, not {keepalive}")
        if user_timeout is not None:
            if check_seconds("user_timeout", user_timeout) == 0:
                raise ValueError("user_timeout must be > 0 or None, not 0")
            if not hasattr(socket, "TCP_USER_TIMEOUT"):
                raise ValueError(f"user_timeout must be None: {sys.platform} has no TCP_USER_TIMEOUT")
        self.nodelay = nodelay
        self.keepalive = keepalive
        self.user_timeout = user_timeout

    def configure(self, sock: socket.socket) -> None:
        if sock.family not in INTERNET:
            return
        if self.nodelay:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.user_timeout is not None:
            ms = min(-int(-self.user_timeout * 1000 // 1), 0x7FFFFFFF)  # rounded up
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ms)
        if self.keepalive is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if KEEPALIVE_IDLE:
                sock.setsockopt(socket.IPPROTO_TCP, KEEPALIVE_IDLE, max(1, round(self.keepalive)))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


def resolve(
    address: Any, flags: int = 0, kind: socket.SocketKind = socket.SOCK_STREAM, family: int = 0
) -> list[Target]:
    """The addresses of (host, port, ...), in the resolver's order; blocks if the host is a name.

    Raises socket.gaierror for an unknown name, ValueError for what can be none.
    """
    host, port, *rest = address
    try:
        found = socket.getaddrinfo(host, port, family, kind, flags=flags)
    except (UnicodeError, ValueError):
        raise ValueError(f"address host is not a valid name: {host!r}") from None
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"cannot resolve address host {host!r}: {error.strerror}") from None
    targets = ((family, (*target[:2], *rest) if len(target) == 4 and rest else target)
               for family, _, _, _, target in found)
    return list(dict.fromkeys(targets))


def literal(address: Any) -> list[Target] | None:
    """The address of (host, port, ...) as it stands, or None if the host is a name."""
    try:
        return resolve(address, socket.AI_NUMERICHOST)
    except socket.gaierror:
        return None


def _is_path(address: object) -> bool:
    return isinstance(address, str | os.PathLike) and os.fspath(address)[:1] != "\0"


def _check_mode(mode: int | None, address: object) -> None:
    if mode is not None:
        check_int("mode", mode, 0, 0o777)
        if not _is_path(address):
            raise ValueError(f"mode must be None: only a path has permissions, not {address!r}")


def listening_socket(
    address: Any, *, backlog: int, reuse_port: bool, mode: int | None, tcp: Tcp
) -> tuple[socket.socket, SocketFile | None]:
    """Make a nonblocking listening socket for an address, or prepare the bound stream socket that is given; and the
    file that it made.

    Raises TypeError/ValueError for a malformed address, socket.gaierror for a name that does not resolve, OSError
    (with the address in its message) when it cannot be bound. Nothing is left after an error.
    """
    if not isinstance(address, socket.socket):
        check_address(address)
    _check_mode(mode, address)
    if isinstance(address, socket.socket):
        return _start(address, backlog, tcp), None
    _check_reuse_port(reuse_port)
    sock, target = _unbound(address, socket.SOCK_STREAM)
    file = None
    try:
        if sock.family in INTERNET and os.name == "posix":  # on Windows it would share a port that is in use
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        file = _bind(sock, target, mode, f"cannot listen on {address!r}")
        return _start(sock, backlog, tcp), file
    except BaseException:
        discard(sock, file)
        raise


def discard(sock: socket.socket, file: SocketFile | None) -> None:
    """Undo what made them."""
    if file is not None:
        file.remove()
    sock.close()


def _check_reuse_port(reuse_port: bool) -> None:
    if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError(f"reuse_port must be False: {sys.platform} has no SO_REUSEPORT")


def _bind(sock: socket.socket, target: Any, mode: int | None, failure: str) -> SocketFile | None:
    try:
        if _is_path(target):
            return bind_path(sock, target, mode)
        sock.bind(target)
        return None
    except OSError as error:
        raise type(error)(error.errno, f"{failure}: {error.strerror or error}") from None


def _unbound(address: Any, kind: socket.SocketKind) -> tuple[socket.socket, Any]:
    """A new socket of the address's family, and the address as bind and connect take it."""
    if isinstance(address, str | os.PathLike):
        return socket.socket(socket.AF_UNIX, kind), os.fspath(address)
    host, port, *rest = address
    if not host:  # every address of both families through one socket
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        return sock, ("::", port)
    family, target = (socket.AF_INET6, address) if rest else _resolved(host, port, kind)
    sock = socket.socket(family, kind)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return sock, target


def _resolved(host: str, port: int, kind: socket.SocketKind, family: int = 0) -> Target:
    found = resolve((host, port), socket.AI_PASSIVE | socket.AI_V4MAPPED, kind, family)  # mapped: for both families
    # A name with addresses of both families listens on IPv4: that is where a client that tries one first arrives.
    return min(found, key=lambda item: item[0] != socket.AF_INET)


def _start(sock: socket.socket, backlog: int, tcp: Tcp) -> socket.socket:
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"address must be a stream socket, not {sock.type!r}")
    # Linux hands these on to every accepted socket, which saves a system call each.
    tcp.configure(sock)
    sock.listen(backlog)
    sock.setblocking(False)
    return sock


def connected_socket(sock: Any, tcp: Tcp) -> Any:
    """Prepare the connected stream socket that is given, and return its peer's address.

    Raises TypeError or ValueError for anything else, OSError if it is not connected.
    """
    if not isinstance(sock, socket.socket):
        raise TypeError(f"sock must be a socket.socket, not {type(sock).__name__}")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"sock must be a stream socket, not {sock.type!r}")
    if hasattr(sock, "do_handshake"):
        raise TypeError("sock must be a plain socket, not an SSLSocket, whose encryption would be bypassed")
    peer = sock.getpeername()
    tcp.configure(sock)
    sock.setblocking(False)
    return peer


# --- datagrams -------------------------------------------------------------------------------------


def datagram_socket(
    address: Any, remote: Any, *, reuse_port: bool, mode: int | None, broadcast: bool, join: Iterable[Any]
) -> tuple[socket.socket, SocketFile | None, Any]:
    """A nonblocking datagram socket for an address and a remote, each of which may be None, or the one that is given;
    the file that it made; and the address that it is connected to, or None.

    Raises as `listening_socket` does. Nothing is left after an error.
    """
    sock: socket.socket
    file = None
    target: Any
    given = isinstance(address, socket.socket)
    if given and address.type != socket.SOCK_DGRAM:
        raise ValueError(f"address must be a datagram socket, not {address.type!r}")
    if address is not None and not given:
        check_address(address)
    if remote is not None:
        check_remote(remote)
    _check_mode(mode, address)
    _check_reuse_port(reuse_port)
    groups = [_as_group(group) for group in ([join] if isinstance(join, str) else join)]
    first = address or remote or (None, 0)
    sock, target = (address, None) if given else _unbound(first, socket.SOCK_DGRAM)
    try:
        if groups:  # every program of this system may have a socket for the group's port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if broadcast:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if first is not remote and not given:
            file = _bind(sock, target, mode, f"cannot receive on {first!r}")
        for group, interface in groups:
            _join(sock, group, interface)
        if remote is not None:
            sock.connect(target if first is remote else _of_family(sock.family, remote))
        sock.setblocking(False)
        return sock, file, _peer_of(sock)
    except BaseException:
        if not given:
            discard(sock, file)
        raise


def check_remote(remote: object) -> None:
    """As check_address, for where to send to."""
    check_address(remote)
    if isinstance(remote, tuple) and not (remote[0] and remote[1]):
        raise ValueError(f"address to send to must have a host and a port, not {remote!r}")


def _of_family(family: int, remote: Any) -> Any:
    """What connect takes on a socket that is there already."""
    if isinstance(remote, tuple) != (family in INTERNET):
        raise ValueError(f"remote must be an address of the socket's family, not {remote!r}")
    if isinstance(remote, tuple):
        return remote if len(remote) == 4 else _resolved(remote[0], remote[1], socket.SOCK_DGRAM, family)[1]
    return os.fspath(remote)


def _peer_of(sock: socket.socket) -> Any:
    try:
        return sock.getpeername()
    except OSError:
        return None  # it is not connected


def _as_group(group: Any) -> tuple[str, str | None]:
    host, interface = group if isinstance(group, tuple) and len(group) == 2 else (group, None)
    if not isinstance(host, str) or not isinstance(interface, str | None):
        raise TypeError(f"join must be groups, each an address or (address, interface), not {group!r}")
    import ipaddress  # here, since few have use for it

    try:
        if ipaddress.ip_address(host).is_multicast:
            return host, interface
    except ValueError:
        pass
    raise ValueError(f"join must be addresses of multicast groups, not {host!r}")


def _join(sock: socket.socket, group: str, interface: str | None) -> None:
    try:
        index = socket.if_nametoindex(interface) if interface else 0
        if ":" in group:
            request = socket.inet_pton(socket.AF_INET6, group) + struct.pack("=I", index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
        else:  # struct ip_mreqn, or without an interface ip_mreq
            request = socket.inet_pton(socket.AF_INET, group) + bytes(4) + (struct.pack("=I", index) if index else b"")
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    except OSError as error:
        where = f" on {interface}" if interface else ""
        raise type(error)(error.errno, f"cannot join {group}{where}: {error.strerror or error}") from None


def destination(family: int, address: Any) -> Any:
    """Where to send to, as sendto takes it on a socket of this family. To look a name up would block: ValueError."""
    if isinstance(address, bytes) and address[:1] == b"\0":  # the abstract name of a Unix socket, as it is received
        return address
    if address is None:
        raise ValueError("address is needed: this socket has no remote")
    check_remote(address)
    if isinstance(address, tuple) != (family in INTERNET):
        raise ValueError(f"address must be one of the socket's family, not {address!r}")
    if not isinstance(address, tuple):
        return os.fspath(address)
    host, port, *rest = address
    if family == socket.AF_INET6 and ":" not in host:
        host = f"::ffff:{host}"
    try:
        socket.inet_pton(family, host)
    except OSError:
        raise ValueError(f"address host must be a numeric address of the socket's family, not {host!r}") from None
    if family == socket.AF_INET:
        if rest:
            raise ValueError(f"address must be (host, port) on a socket of IPv4, not {address!r}")
        return host, port
    return (host, port, *(rest or (0, 0)))


def sockaddr(family: int, target: Any) -> bytes:
    """A destination as the kernel of Linux takes it."""
    head = struct.pack("=H", family)
    if isinstance(target, tuple):
        host, port, *rest = target
        if family == socket.AF_INET:
            return head + struct.pack("!H4s8x", port, socket.inet_pton(family, host))
        flowinfo, scope = rest
        return head + struct.pack("!HI16s", port, flowinfo, socket.inet_pton(family, host)) + struct.pack("=I", scope)
    path = os.fsencode(target)
    return head + path + (b"" if path[0] == 0 else b"\0")
