"""What may live here: addresses as the user writes them, and sockets made or configured from them.

Shared by every core; nothing here is hot.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  getaddrinfo imports it, which would fail without a descriptor left
import errno
import operator
import os
import socket
import struct
import sys
import warnings

from ._config import check_int, check_seconds
from ._own import SocketType
from ._typing import TYPE_CHECKING
from ._unix import SocketFile, bind_path, bound_file
from .handler import users_level

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    Target = tuple[int, Any]
    """A family, and an address that `socket.connect` accepts without a lookup."""

Address = tuple[str | None, int] | tuple[str, int, int, int] | str | os.PathLike[str]

NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # elsewhere Python ignores SIGPIPE
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)  # on Windows no other process can make a socket blocking
INTERNET = (socket.AF_INET, socket.AF_INET6)
MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96
LONGEST_KEEPALIVE = 32767  # the maximum of TCP_KEEPIDLE
# Seconds between keepalive probes, and how many may go unanswered, once `keepalive` seconds were idle.
KEEPALIVE_INTERVAL = 5
KEEPALIVE_COUNT = 3
KEEPALIVE_IDLE = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)  # macOS: the latter

# Bytes of data, with 65,535 for the whole packet: less the headers of IPv4 and UDP; less that of UDP.
LARGEST_DATAGRAM: dict[int, int] = {socket.AF_INET: 65507, socket.AF_INET6: 65527}

SUN_PATH = 108 if sys.platform == "linux" else 104  # bytes


def as_address(address: object) -> Any:
    """An address in the form that all of this package uses: (host, port), (host, port, flowinfo, scope_id) or a path,
    of str and int themselves, not of their subclasses, so that a comparison runs no code of the user's. TypeError or
    ValueError, which says what is wrong with it."""
    if isinstance(address, bytes) and address[:1] == b"\0":
        address = shown(address)  # an abstract name as Python's sockets have it
    if isinstance(address, str | os.PathLike):
        path = _plain_path(address)
        _check_is_no_host(path)
        return _checked_path(path)
    if isinstance(address, list) and len(address) in (2, 4):
        raise TypeError(f"address must be a tuple, not a list: pass {tuple(address)!r}")
    if not isinstance(address, tuple) or len(address) not in (2, 4):
        raise TypeError(
            f"address must be (host, port), (host, port, flowinfo, scope_id) or a path, not {address!r}"
        )
    host, *numbers = tuple.__iter__(address)
    if host is not None:
        if not isinstance(host, str):
            raise TypeError(f"address host must be a str or None, not {type(host).__name__}")
        host = str.__str__(host)
        if "\0" in host:  # the resolver would stop at it
            raise ValueError(f"address host must not contain NUL, as {host!r} does")
    tops = {"port": 0xFFFF, "flowinfo": 0xFFFFF, "scope_id": 0xFFFFFFFF}
    for (name, top), value in zip(tops.items(), numbers, strict=False):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"address {name} must be an int, not {type(value).__name__}")
        if not 0 <= int.__index__(value) <= top:
            raise ValueError(f"address {name} must be in 0..{top}, not {value}")
    return (host, *map(int.__index__, numbers))


def _plain_path(address: str | os.PathLike[str]) -> str:
    path = os.fspath(address)
    if not isinstance(path, str):
        raise TypeError("address path must be str, not bytes")
    return str.__str__(path)


def _check_is_no_host(path: str) -> None:
    """ValueError for what is not meant as a path: it would be a Unix socket of that name, in silence."""
    if path[:1] == "\0" or os.sep in path:
        return
    if path == "localhost" and sys.flags.dev_mode:  # else it may be meant
        text = f"address {path!r} is the path of a Unix socket: pass ({path!r}, port) for TCP or UDP, or './{path}'"
        warnings.warn(text, RuntimeWarning, stacklevel=users_level())
    host, colon, port = path.rpartition(":")
    if _is_ip(name := path.strip("[]")):
        meant = f"({name!r}, port)"
    elif colon and port.isdecimal():
        meant = repr((host.strip("[]") or None, int(port)))
    else:
        return
    raise ValueError(f"address must be {meant} for TCP or UDP, or './{path}' for a Unix socket, not {path!r}")


def _is_ip(host: str) -> bool:
    """Whether it is a literal address of IPv4 or IPv6, perhaps with a zone."""
    number, zone, _ = host.partition("%")
    for family in (socket.AF_INET6,) if zone else INTERNET:
        try:
            socket.inet_pton(family, number)
            return True
        except (OSError, ValueError):  # ValueError: a NUL or a surrogate
            pass
    return False


def _checked_path(path: str) -> str:
    longest = SUN_PATH - 1  # and a NUL
    if not path:
        raise ValueError("address path must not be empty")
    if path[0] == "\0":
        if sys.platform != "linux":
            raise ValueError(f"address path must not begin with NUL: {sys.platform} has no abstract names")
        longest = SUN_PATH
    elif "\0" in path:  # bind(2) would stop at it
        raise ValueError("address path must not contain NUL, but at the beginning of an abstract name")
    if (size := len(os.fsencode(path))) > longest:
        raise ValueError(f"address path must be at most {longest} bytes (sun_path), not {size}")
    if not hasattr(socket, "AF_UNIX"):
        raise ValueError(f"address must be (host, port): Python has no Unix sockets on {sys.platform}")
    return path


def shown(name: Any) -> Any:
    """The address of a socket, as muxcore hands it out: Python has bytes for abstract names, and here they are str."""
    return os.fsdecode(name) if isinstance(name, bytes) else name


class Tcp:
    """Options of TCP sockets. TypeError or ValueError for bad ones; sockets of other families have none."""

    __slots__ = ("keepalive", "nodelay", "user_timeout")

    def __init__(self, nodelay: bool, keepalive: float | None, user_timeout: float | None) -> None:
        if keepalive is not None:
            keepalive = check_seconds("keepalive", keepalive)
            if keepalive > LONGEST_KEEPALIVE:
                raise ValueError(f"keepalive must be <= {LONGEST_KEEPALIVE} seconds, not {keepalive}")
        if user_timeout is not None:
            user_timeout = check_seconds("user_timeout", user_timeout)
            if user_timeout == 0:
                raise ValueError("user_timeout must be > 0 or None, not 0")
            if not hasattr(socket, "TCP_USER_TIMEOUT"):
                raise ValueError(f"user_timeout must be None: {sys.platform} has no TCP_USER_TIMEOUT")
        self.nodelay = nodelay
        self.keepalive = keepalive
        self.user_timeout = user_timeout

    def configure(self, sock: socket.socket) -> None:
        if family_of(sock) not in INTERNET:
            return
        if self.nodelay:
            SocketType.setsockopt(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.user_timeout is not None:
            ms = min(-int(-self.user_timeout * 1000 // 1), 0x7FFFFFFF)  # rounded up
            SocketType.setsockopt(sock, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ms)
        if self.keepalive is not None:
            SocketType.setsockopt(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if KEEPALIVE_IDLE:
                SocketType.setsockopt(sock, socket.IPPROTO_TCP, KEEPALIVE_IDLE, max(1, round(self.keepalive)))
                SocketType.setsockopt(sock, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
                SocketType.setsockopt(sock, socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


# --- sockets of a caller's -------------------------------------------------------------------------


def family_of(sock: socket.socket) -> int:
    return int(SocketType.family.__get__(sock))


def _type_of(sock: socket.socket) -> socket.SocketKind:
    return socket.SocketKind(SocketType.type.__get__(sock))


def _give_up_linger(sock: socket.socket) -> None:
    """Kernel fact: with SO_LINGER and a time, close(2) sleeps even on a nonblocking socket (tcp_close); what is
    accepted has it from its listener."""
    off = struct.pack("HH" if sys.platform == "win32" else "ii", 0, 0)
    SocketType.setsockopt(sock, socket.SOL_SOCKET, socket.SO_LINGER, off)


def as_option(*numbers: Any) -> tuple[int, ...]:
    """Arguments of getsockopt and setsockopt, after which no code of the user's runs before the system call."""
    return tuple(int.__index__(operator.index(number)) for number in numbers)


def as_option_value(value: Any) -> int | bytes:
    return as_option(value)[0] if hasattr(value, "__index__") else bytes(memoryview(value))


def check_no_linger(level: int, name: int, value: int | bytes) -> None:
    """close(2) would sleep, and with it the loop; see _give_up_linger."""
    if (level, name) != (socket.SOL_SOCKET, socket.SO_LINGER) or not isinstance(value, bytes):
        return
    if len(value) in (4, 8):
        on, seconds = struct.unpack("HH" if len(value) == 4 else "ii", value)
        if on and seconds:
            raise ValueError("value of SO_LINGER must have no time, since close(2) would block: set Timeouts.linger")


def resolve(
    address: Any, flags: int = 0, kind: socket.SocketKind = socket.SOCK_STREAM, family: int = 0
) -> list[Target]:
    """The addresses of (host, port, ...), in the resolver's order; blocks if the host is a name.

    Raises socket.gaierror for an unknown name, ValueError for a malformed one.
    """
    host, port, *rest = address
    try:
        found = socket.getaddrinfo(host and _unmapped(host), port, family, kind, flags=flags)
    except (UnicodeError, ValueError):
        raise ValueError(f"address host is not a valid name: {host!r}") from None
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"cannot resolve address host {host!r}: {error.strerror}") from None
    targets = ((family, _with_scope(target, *rest)) for family, _, _, _, target in found)
    return list(dict.fromkeys(targets))


def _with_scope(target: Any, flowinfo: int = 0, scope_id: int = 0) -> Any:
    """`target` with what the address says beside host and port; a zone in its host ("fe80::1%eth0") stays."""
    if len(target) != 4:
        return target
    return (*target[:2], flowinfo or target[2], scope_id or target[3])


def _unmapped(host: str) -> str:
    """An IPv4-mapped address is one of IPv4: a socket that is for IPv6 alone cannot be bound to it (EINVAL)."""
    if ":" in host:
        try:
            packed = socket.inet_pton(socket.AF_INET6, host)
        except OSError:
            return host  # it has a zone, or is none
        if packed.startswith(MAPPED):
            return socket.inet_ntop(socket.AF_INET, packed[len(MAPPED) :])
    return host


def literal(address: Any) -> list[Target] | None:
    """The address of (host, port, ...) as it stands, or None if the host is a name."""
    try:
        return resolve(address, socket.AI_NUMERICHOST)
    except socket.gaierror:
        return None


def _is_path(address: object) -> bool:
    return isinstance(address, str) and address[:1] != "\0"


def _check_is_bound(sock: socket.socket) -> None:
    """Kernel fact: listen(2) on an unbound socket of IPv4 or IPv6 takes a free port of all this machine's addresses."""
    name = SocketType.getsockname(sock)
    if name == "" or (family_of(sock) in INTERNET and name[1] == 0):
        raise ValueError("address must be a bound socket: call its bind() first, or pass the address to listen on")


def _check_mode(mode: int | None, address: object) -> int | None:
    if mode is not None:
        mode = check_int("mode", mode, 0, 0o777)
        if not _is_path(address):
            raise ValueError(f"mode must be None: only a path has permissions, not {address!r}")
    return mode


def listening_socket(
    address: Any, *, backlog: int, reuse_port: bool, mode: int | None, tcp: Tcp
) -> tuple[socket.socket, SocketFile | None]:
    """Make a nonblocking listening socket for an address, or prepare the bound stream socket that is given; and the
    file that it made.

    Raises TypeError/ValueError for a malformed address, socket.gaierror for a name that does not resolve, OSError
    (with the address in its message) when it cannot be bound. Nothing is left after an error.
    """
    given = isinstance(address, socket.socket)
    if not given:
        address = as_address(address)
    mode = _check_mode(mode, address)
    if given:
        if _type_of(address) != socket.SOCK_STREAM:
            raise ValueError(f"address must be a stream socket, not {_type_of(address)!r}")
        _check_is_plain("address", address)
        _check_is_bound(address)
        _give_up_linger(address)
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
    """Close a socket of ours, and remove the file that it was bound to, whether or not that is known yet."""
    try:
        file = bound_file(sock) if file is None else file
        if file is not None:
            file.remove()
    finally:
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
    """A new socket of the address's family, and the address in the form of bind and connect."""
    if not isinstance(address, tuple):
        return socket.socket(socket.AF_UNIX, kind), address
    host, port, *_ = address
    found = _resolved(address, kind) if host else [(socket.AF_INET6, ("::", port)), (socket.AF_INET, ("0.0.0.0", port))]
    while True:
        family, target = found.pop(0)
        try:
            sock = socket.socket(family, kind)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT or not found:
                raise
            continue  # this system has no IPv6
        if family == socket.AF_INET6:  # without a host: every address of both families through one socket
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(host))
        return sock, target


def _resolved(address: Any, kind: socket.SocketKind, family: int = 0) -> list[Target]:
    """The candidates for bind and connect, the best first."""
    found = resolve(address, socket.AI_PASSIVE | socket.AI_V4MAPPED, kind, family)  # mapped: for both families
    # A name with addresses of both families listens on IPv4: that is where a client that tries one first arrives. With
    # a flowinfo and a scope it is meant to be of IPv6.
    best = socket.AF_INET if len(address) == 2 else socket.AF_INET6
    return sorted(found, key=lambda item: item[0] != best)


def _start(sock: socket.socket, backlog: int, tcp: Tcp) -> socket.socket:
    # Linux hands these on to every accepted socket, which saves a system call each.
    tcp.configure(sock)
    SocketType.listen(sock, backlog)
    SocketType.setblocking(sock, False)
    return sock


def _check_is_plain(name: str, sock: Any) -> None:
    if hasattr(sock, "do_handshake"):
        raise TypeError(f"{name} must be a plain socket, not an SSLSocket, whose encryption would be bypassed")


def connected_socket(sock: Any, tcp: Tcp) -> Any:
    """Prepare the connected stream socket that is given, and return its peer's address.

    Raises TypeError or ValueError for anything else, OSError if it is not connected.
    """
    if not isinstance(sock, socket.socket):
        raise TypeError(f"sock must be a socket.socket, not {type(sock).__name__}")
    if _type_of(sock) != socket.SOCK_STREAM:
        raise ValueError(f"sock must be a stream socket, not {_type_of(sock)!r}")
    _check_is_plain("sock", sock)
    peer = _peer_of(sock)
    tcp.configure(sock)
    _give_up_linger(sock)
    SocketType.setblocking(sock, False)
    return shown(peer)


def _peer_of(sock: socket.socket) -> Any:
    try:
        return SocketType.getpeername(sock)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        advice = "use mux.connect() for an address, or mux.listen() for a bound socket"
        raise type(error)(error.errno, f"sock must be connected: {advice}") from None


# --- datagrams -------------------------------------------------------------------------------------


def datagram_socket(
    address: Any, remote: Any, *, reuse_port: bool, mode: int | None, broadcast: bool, join: Iterable[Any]
) -> tuple[socket.socket, SocketFile | None, tuple[Any, ...]]:
    """A nonblocking datagram socket for an address and a remote, each of which may be None, or the one that is given;
    the file that it made; and the address that it is connected to, as it is and as it was given, or ().

    Raises as `listening_socket` does. Nothing is left after an error.
    """
    given = isinstance(address, socket.socket)
    if given and _type_of(address) != socket.SOCK_DGRAM:
        raise ValueError(f"address must be a datagram socket, not {_type_of(address)!r}")
    if given and family_of(address) not in (*INTERNET, getattr(socket, "AF_UNIX", None)):
        raise ValueError(f"address must be a socket of UDP or Unix, not of the family {family_of(address)}")
    if address is not None and not given:
        address = as_address(address)
    if remote is not None:
        remote = as_remote(remote)
    mode = _check_mode(mode, address)
    _check_reuse_port(reuse_port)
    groups = [_as_group(group) for group in ([join] if isinstance(join, str) else join)]
    target: Any = None
    sock, target = (address, None) if given else _unbound(address or remote or (None, 0), socket.SOCK_DGRAM)
    file = None
    try:
        if groups:  # every program of this system may have a socket for the group's port
            SocketType.setsockopt(sock, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            SocketType.setsockopt(sock, socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if broadcast:
            SocketType.setsockopt(sock, socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if not given and (address is not None or remote is None):
            file = _bind(sock, target, mode, f"cannot receive on {address or (None, 0)!r}")
        _join_all(sock, groups)
        if remote is not None:
            SocketType.connect(sock, _of_family(family_of(sock), remote) if address is not None else target)
        SocketType.setblocking(sock, False)
        return sock, file, _remotes(sock, remote)
    except BaseException:
        if not given:
            discard(sock, file)
        raise


def as_remote(remote: object) -> Any:
    """As as_address, for where to send to."""
    address = as_address(remote)
    if isinstance(address, tuple) and not (address[0] and address[1]):
        raise ValueError(f"address to send to must have a host and a port, not {address!r}")
    return address


def _of_family(family: int, remote: Any) -> Any:
    """The addresses for the connect of an existing socket."""
    if isinstance(remote, tuple) != (family in INTERNET):
        raise ValueError(f"remote must be an address of the socket's family, not {remote!r}")
    return _resolved(remote, socket.SOCK_DGRAM, family)[0][1] if isinstance(remote, tuple) else remote


def _remotes(sock: socket.socket, given: Any) -> tuple[Any, ...]:
    try:
        peer = shown(SocketType.getpeername(sock))
    except OSError:
        return ()  # it is not connected
    return (peer,) if given is None else (peer, given)


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


def _join_all(sock: socket.socket, groups: list[tuple[str, str | None]]) -> None:
    for group, interface in groups:
        _join(sock, group, interface)


def _join(sock: socket.socket, group: str, interface: str | None) -> None:
    try:
        index = socket.if_nametoindex(interface) if interface else 0
        if ":" in group:
            request = socket.inet_pton(socket.AF_INET6, group) + struct.pack("=I", index)
            SocketType.setsockopt(sock, socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
        else:  # struct ip_mreqn, or without an interface ip_mreq
            request = socket.inet_pton(socket.AF_INET, group) + bytes(4) + (struct.pack("=I", index) if index else b"")
            SocketType.setsockopt(sock, socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    except OSError as error:
        where = f" on {interface}" if interface else ""
        raise type(error)(error.errno, f"cannot join {group}{where}: {error.strerror or error}") from None


NOWHERE = b""  # the destination of a datagram that cannot be sent: it is counted as a drop


def destination(family: int, address: Any) -> Any:
    """A destination in the form of sendto on a socket of this family. A name is a ValueError: a lookup would block.

    NOWHERE for a sender that can be sent nothing, though it has sent something: one of port 0, a Unix socket without a
    name, or with one of all of sun_path's bytes, which Python's sockets do not accept.
    """
    if family not in INTERNET and not address and (address is None or isinstance(address, str)):
        return NOWHERE
    if address is None:
        raise ValueError("address is required: this socket has no remote")
    if family not in INTERNET and type(address) is str:  # a client chooses its path, which may resemble a host
        is_full = address[0] != "\0" and len(os.fsencode(address)) == SUN_PATH
        return NOWHERE if is_full else _checked_path(address)
    address = as_address(address)
    if isinstance(address, tuple) != (family in INTERNET):
        raise ValueError(f"address must be one of the socket's family, not {address!r}")
    if not isinstance(address, tuple):
        return address
    host, port, *rest = address
    if not host:
        raise ValueError(f"address to send to must have a host and a port, not {address!r}")
    if rest and family == socket.AF_INET and ":" not in host:
        raise ValueError(f"address must be (host, port) on a socket of IPv4, not {address!r}")
    found, target = (literal(address) or [(0, None)])[0]
    if found == socket.AF_INET and family == socket.AF_INET6:
        target = (f"::ffff:{target[0]}", port, 0, 0)
    elif found != family:
        raise ValueError(f"address host must be a numeric address of the socket's family, not {host!r}")
    return target if port else NOWHERE


def check_is_remote(family: int, address: Any, remotes: tuple[Any, ...]) -> None:
    """ValueError unless it is what a socket is connected to, however it is written; `remotes`: see datagram_socket."""
    remote = remotes[0]
    try:
        plain = as_address(address)
        if plain in remotes or destination(family, plain) == destination(family, remote):
            return
    except ValueError:
        pass
    raise ValueError(f"address must be None or the remote {remote!r} of this socket, not {address!r}")


def sockaddr(family: int, target: Any) -> bytes:
    """A destination as a sockaddr of Linux."""
    head = struct.pack("=H", family)
    if isinstance(target, tuple):
        host, port, *rest = target
        if family == socket.AF_INET:
            return head + struct.pack("!H4s8x", port, socket.inet_pton(family, host))
        flowinfo, scope = rest
        return head + struct.pack("!HI16s", port, flowinfo, socket.inet_pton(family, host)) + struct.pack("=I", scope)
    path = os.fsencode(target)
    return head + path + (b"" if path[0] == 0 else b"\0")
