"""What may live here: addresses as the user writes them, and sockets made or configured from them.

Shared by every core; nothing here is hot.
"""

from __future__ import annotations

import math
import os
import socket
import sys

from ._config import check_seconds
from ._log import log
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

Address = tuple[str | None, int] | tuple[str, int, int, int] | str | os.PathLike[str]

INTERNET = (socket.AF_INET, socket.AF_INET6)

LONGEST_KEEPALIVE = 32767  # what TCP_KEEPIDLE takes
# Seconds between keepalive probes, and how many may go unanswered, once `keepalive` seconds were idle.
KEEPALIVE_INTERVAL = 5
KEEPALIVE_COUNT = 3
KEEPALIVE_IDLE = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)  # macOS: the latter

LONGEST_PATH = 107 if sys.platform == "linux" else 103  # of sun_path, without its NUL


def check_address(address: object) -> None:
    """Raise TypeError or ValueError that says what is wrong with an address; None if it is well formed."""
    if isinstance(address, str | os.PathLike):
        path = os.fspath(address)
        if not isinstance(path, str):
            raise TypeError("address path must be str, not bytes")
        if not path:
            raise ValueError("address path must not be empty")
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
            ms = min(math.ceil(self.user_timeout * 1000), 0x7FFFFFFF)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ms)
        if self.keepalive is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if KEEPALIVE_IDLE:
                sock.setsockopt(socket.IPPROTO_TCP, KEEPALIVE_IDLE, max(1, round(self.keepalive)))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


def listening_socket(address: Any, *, backlog: int, reuse_port: bool, tcp: Tcp) -> socket.socket:
    """Make a nonblocking listening socket for an address, or prepare the bound stream socket that is given.

    Raises TypeError/ValueError for a malformed address, socket.gaierror for a name that does not resolve, OSError
    (with the address in its message) when it cannot be bound. Nothing stays open after an error.
    """
    if isinstance(address, socket.socket):
        return _start(address, backlog, tcp)
    check_address(address)
    if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError(f"reuse_port must be False: {sys.platform} has no SO_REUSEPORT")
    sock, target = _unbound(address)
    try:
        if sock.family in INTERNET and os.name == "posix":  # on Windows it would share a port that is in use
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            sock.bind(target)
        except OSError as error:
            raise type(error)(error.errno, f"cannot listen on {address!r}: {error.strerror or error}") from None
        return _start(sock, backlog, tcp)
    except BaseException:
        sock.close()
        raise


def _unbound(address: Any) -> tuple[socket.socket, Any]:
    if isinstance(address, str | os.PathLike):
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), os.fspath(address)
    host, port, *rest = address
    if not host:  # every address of both families through one socket
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        return sock, ("::", port)
    if rest:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        return sock, address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:
        raise ValueError(f"address host is not a valid name: {host!r}") from None
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"cannot resolve address host {host!r}: {error.strerror}") from None
    # A name with addresses of both families listens on IPv4: that is where a client that tries one first arrives.
    family, kind, proto, _, target = min(found, key=lambda item: item[0] != socket.AF_INET)
    sock = socket.socket(family, kind, proto)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return sock, target


def _start(sock: socket.socket, backlog: int, tcp: Tcp) -> socket.socket:
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"address must be a stream socket, not {sock.type!r}")
    # Linux hands these on to every accepted socket, which saves a system call each.
    tcp.configure(sock)
    sock.listen(backlog)
    sock.setblocking(False)
    return sock


def remove_socket_file(address: Any) -> None:
    """Unlink the file of a Unix listener that is gone, if it can be."""
    if isinstance(address, str) and address:
        try:
            os.unlink(address)  # noqa: PTH108 -- pathlib takes longer to import than this file
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("the socket file %r cannot be removed: %s", address, error)
