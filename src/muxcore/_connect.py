"""What may live here: how an outgoing connection comes about: resolving, trying one address after the other, giving up.

Plain Python over what any user of the Mux has (`add_writer`, `call_later`, `run_in_executor`), and so once for all cores.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from . import _address
from .errors import ConnectTimeout

if TYPE_CHECKING:
    from ._epoll import Connection
    from ._mux import Mux
    from ._timers import TimerHandle

STAGGER = 0.25  # seconds before the next address is tried beside the last one: RFC 8305, section 5
BACKLOG_FULL = 0.01  # seconds before a Unix listener whose backlog is full is tried again

Target = tuple[socket.AddressFamily, Any]


class Attempt:
    """The attempt to connect `conn`: several addresses as RFC 8305 says (IPv6 first, staggered), one timeout for all."""

    def __init__(
        self, mux: Mux, conn: Connection, address: Any, local: Any, nodelay: bool, keepalive: float | None
    ) -> None:
        self.mux, self.conn, self.address, self.local = mux, conn, address, local
        self.options = {"nodelay": nodelay, "keepalive": keepalive}
        self.targets: deque[Target] = deque()
        self.tried: list[socket.socket] = []  # sockets that are connecting
        self.errors: list[OSError] = []
        self.stagger: TimerHandle | None = None
        self.lookup: Future[Any] | None = None
        self.over = False
        timeout = conn.timeouts.connect
        self.deadline = None if timeout is None else mux.call_later(timeout, self.timed_out, timeout)

    def start(self) -> None:
        targets = literal(self.address)
        if targets is not None:
            self.try_all(targets)
            return
        host, port = self.address[:2]
        self.lookup = self.mux.run_in_executor(None, resolve, host, port, on_done=self.resolved)

    def resolved(self, lookup: Future[list[Target]]) -> None:
        if self.over:
            return
        error = lookup.exception()
        if error is None:
            self.try_all(lookup.result())
        else:
            self.fail(error)

    def try_all(self, targets: list[Target]) -> None:
        if self.local is not None:
            [(family, _)] = literal(self.local) or [(None, None)]
            targets = [target for target in targets if target[0] == family]
        six, four = ([target for target in targets if (target[0] == socket.AF_INET6) is wanted] for wanted in (True, False))
        self.targets.extend(target for target in chain(*zip_longest(six, four)) if target)
        if not self.targets:
            self.errors.append(OSError(errno.EADDRNOTAVAIL, "it has no address of local_address's family"))
        self.try_next()

    def try_next(self) -> None:
        """Begin with the next address; those begun before may still succeed."""
        if self.stagger is not None:
            self.stagger.cancel()
        while not self.over and self.targets:
            if self.begin(*self.targets.popleft()):
                self.stagger = self.mux.call_later(STAGGER, self.try_next)
                return
        if not self.over and not self.tried and (self.stagger is None or self.stagger.cancelled):
            self.fail(self.failure())

    def begin(self, family: socket.AddressFamily, target: Any) -> bool:
        """Whether this address is being tried now."""
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            _address.configure(sock, **self.options)
            if self.local is not None:
                sock.bind(self.local)
            number = sock.connect_ex(target)
            if number == errno.EAGAIN:  # only a Unix listener says so
                self.targets.appendleft((family, target))
                self.stagger = self.mux.call_later(BACKLOG_FULL, self.try_next)
                sock.close()
                return False
            if number not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
                raise OSError(number, os.strerror(number))
            self.tried.append(sock)
            self.mux.add_writer(sock, self.decided, sock)
        except OSError as error:
            self.errors.append(error)
            if sock is not None:
                sock.close()
            return False
        return True

    def decided(self, sock: socket.socket) -> None:
        """The kernel knows whether this one is connected."""
        self.mux.remove_writer(sock)
        self.tried.remove(sock)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number == 0 and sock.getsockname() == sock.getpeername():
            number = errno.ECONNREFUSED  # a port of ours that nobody listens on has been connected to itself
        if number == 0:
            self.cancel()
            self.mux._connected(self.conn, sock)
            return
        self.errors.append(OSError(number, os.strerror(number)))
        sock.close()
        self.try_next()

    def failure(self) -> OSError:
        """What the errors of all addresses amount to."""
        texts = dict.fromkeys(error.strerror or str(error) for error in self.errors)
        return OSError(self.errors[0].errno, f"cannot connect to {self.address!r}: {'; '.join(texts)}")

    def timed_out(self, timeout: float) -> None:
        text = f"no connection to {self.address!r} within {timeout:g} s"
        self.fail(ConnectTimeout(text, conn=self.conn, limit=timeout))

    def fail(self, error: BaseException) -> None:
        self.cancel()
        self.mux._connect_failed(self.conn, error)

    def cancel(self) -> None:
        """Leave nothing behind. The core calls this, too, when the connection is closed first."""
        self.over = True
        for timer in (self.deadline, self.stagger):
            if timer is not None:
                timer.cancel()
        if self.lookup is not None:
            self.lookup.cancel()
        for sock in self.tried:
            with suppress(OSError, RuntimeError):
                self.mux.remove_writer(sock)
            sock.close()
        self.tried.clear()


def check_local(address: Any) -> None:
    """TypeError or ValueError if that is not (host, port) with a literal host."""
    if not isinstance(address, tuple):
        raise TypeError(f"local_address must be (host, port), not {address!r}")
    try:
        _address.check_address(address)
    except (TypeError, ValueError) as error:
        raise type(error)(f"local_{error}") from None
    if not address[0] or literal(address) is None:
        raise ValueError(f"local_address host must be a literal address, not {address[0]!r}")


def literal(address: Any) -> list[Target] | None:
    """The target of an address that needs no resolving; None for a name."""
    if isinstance(address, str | os.PathLike):
        return [(socket.AF_UNIX, os.fspath(address))]
    host = address[0]
    for family in _address.INTERNET:
        with suppress(OSError, ValueError):
            socket.inet_pton(family, host)
            return [(family, address)]
    return None


def resolve(host: str, port: int) -> list[Target]:
    """The addresses of a name; runs in a thread."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise ValueError(f"address host is not a valid name: {host!r}") from None
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"cannot resolve address host {host!r}: {error.strerror}") from None
    return list(dict.fromkeys((family, target) for family, _, _, _, target in found))
