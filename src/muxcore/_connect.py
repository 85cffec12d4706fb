"""What may live here: how an outgoing connection comes about: resolving, trying one address after the other, giving up.

Plain Python over what any user of the Mux has (`add_writer`, `call_later`, `run_in_executor`), and so here once for
all cores.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from functools import partial
from itertools import chain, zip_longest

from . import _address
from ._typing import TYPE_CHECKING
from .errors import ConnectTimeout

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from typing import Any

    from ._address import Target
    from ._epoll import Connection
    from ._mux import Mux
    from ._timers import TimerHandle

STAGGER = 0.25  # seconds before the next address is tried beside the last one: RFC 8305, section 5
BACKLOG_FULL = 0.01  # seconds before a Unix listener whose backlog is full is tried again

IN_PROGRESS = {0, errno.EINPROGRESS, getattr(errno, "WSAEWOULDBLOCK", 0)}


class Attempt:
    """The attempt to connect `conn`: its addresses as RFC 8305 says (IPv6 first, staggered), one timeout for all."""

    def __init__(
        self, mux: Mux, conn: Connection, address: Any, local: Target | None, tcp: _address.Tcp
    ) -> None:
        self.mux, self.conn, self.address, self.local, self.tcp = mux, conn, address, local, tcp
        self.targets: deque[Target] = deque()  # those that are still to be tried
        self.tried: list[int] = []  # descriptors that are connecting; a socket would warn when a Mux is forgotten
        self.errors: list[OSError | ValueError] = []
        self.lookup: Future[list[Target]] | None = None
        self.stagger: TimerHandle | None = None
        self.error: BaseException | None = None  # what fail() has not told yet
        self.deadline: TimerHandle | None = None
        self.over = False

    def start(self, targets: list[Target] | None) -> None:
        """Begin; None: the address has a name that is to be resolved first."""
        timeout = self.conn.timeouts.connect
        if timeout is not None:
            self.deadline = self.mux.call_later(timeout, self.timed_out, timeout)
        if targets is None:
            self.resolve()
        else:
            self.try_all(targets)

    def step(self, fn: Callable[..., object], *args: Any) -> None:
        """A step of the loop, where nobody hears of what is raised: it is the end of the attempt."""
        try:
            fn(*args)
        except Exception as error:
            self.fail(error)

    def resolve(self) -> None:
        on_done = partial(self.step, self.resolved)
        self.lookup = self.mux.run_in_executor(None, _address.resolve, self.address, on_done=on_done)

    def resolved(self, lookup: Future[list[Target]]) -> None:
        if self.over:
            return
        error = lookup.exception()
        if error is not None:
            self.fail(error)
            return
        targets = lookup.result()
        if self.local is not None:
            targets = [target for target in targets if target[0] == self.local[0]]
        if not targets:
            self.errors.append(OSError(errno.EADDRNOTAVAIL, "the name has no address of local_address's family"))
        self.try_all(targets)

    def try_all(self, targets: list[Target]) -> None:
        six = [target for target in targets if target[0] == socket.AF_INET6]
        others = [target for target in targets if target[0] != socket.AF_INET6]
        self.targets.extend(target for target in chain(*zip_longest(six, others)) if target)
        self.try_next()

    def try_next(self) -> None:
        """Begin with the next address; those begun before may still succeed."""
        if self.stagger is not None:
            self.stagger.cancel()
        while self.targets:
            try:
                self.begin(*self.targets[0])
            except BlockingIOError:  # the backlog of a Unix listener is full, and nothing will tell when it is not
                self.stagger = self.mux.call_later(BACKLOG_FULL, self.step, self.try_next)
                return
            except (OSError, ValueError) as error:  # the latter: select's limit
                self.errors.append(error)
                self.targets.popleft()
            else:
                self.targets.popleft()
                self.stagger = self.mux.call_later(STAGGER, self.step, self.try_next)
                return
        if not self.tried:
            self.fail(self.failure())

    def begin(self, family: int, target: Any) -> None:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            self.tcp.configure(sock)
            if self.local is not None:
                if os.name == "posix" and self.local[1][1]:  # a port may serve several addresses, and again soon after
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(self.local[1])
            number = sock.connect_ex(target)
            if number not in IN_PROGRESS:
                raise OSError(number, os.strerror(number))
            self.mux.add_writer(sock, self.step, self.decided, sock.fileno(), target)
        except BaseException:
            sock.close()
            raise
        self.tried.append(sock.detach())

    def decided(self, fd: int, target: Any) -> None:
        """The kernel knows whether this one is connected."""
        self.mux.remove_writer(fd)
        sock = socket.socket(fileno=fd)
        self.tried.remove(fd)
        try:
            sock.setblocking(False)
            peer = connected_peer(sock, target)
            self.cancel()
            self.mux._connected(self.conn, sock, peer)
        except BaseException as error:
            sock.close()
            if self.over or not isinstance(error, OSError):
                raise
            self.errors.append(error)
            self.try_next()

    def failure(self) -> Exception:
        """What the errors of all addresses amount to."""
        first = self.errors[0]
        if not isinstance(first, OSError):
            return first
        texts = dict.fromkeys(getattr(error, "strerror", None) or str(error) for error in self.errors)
        return OSError(first.errno, f"cannot connect to {self.address!r}: {'; '.join(texts)}")

    def timed_out(self, timeout: float) -> None:
        text = f"no connection to {self.address!r} within {timeout:g} s"
        self.fail(ConnectTimeout(text, conn=self.conn, limit=timeout))

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.cancel()
        self.mux._connect_failed(self.conn, error)
        self.error = None

    def tell_again(self) -> None:
        """Memory was out in the turn before: perhaps in the middle of fail()."""
        if self.error is not None:
            self.fail(self.error)

    def cancel(self) -> None:
        """Leave nothing behind. The core calls this, too, when the connection ends before it is open."""
        self.over = True
        for timer in (self.deadline, self.stagger):
            if timer is not None:
                timer.cancel()
        if self.lookup is not None:
            self.lookup.cancel()
        for fd in self.tried:
            try:
                self.mux.remove_writer(fd)
            except RuntimeError:
                pass  # the Mux is being closed, and its set with it
        self.abandon()

    def abandon(self) -> None:
        """In a forked child, or for a Mux that was never closed: close(2) and nothing else."""
        self.over = True
        while self.tried:
            socket.close(self.tried.pop())


def connected_peer(sock: socket.socket, target: Any) -> Any:
    """The address of the peer; OSError if there is none.

    Reading comes before SO_ERROR: a peer may have answered and reset the connection meanwhile. Then this one is
    connected, to be read and to be told of the reset, which SO_ERROR would make the kernel forget.
    """
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        pass
    except OSError as error:
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or error.errno  # Windows' recv says ENOTCONN
        raise OSError(number, os.strerror(number or 0)) from None
    try:
        peer = sock.getpeername()
    except OSError:
        return target  # it was reset
    if sock.family in _address.INTERNET and peer == sock.getsockname():
        # TCP knows a simultaneous open: a port of ours on which nobody listens can be connected to itself.
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return peer


def check_target(address: Any) -> list[Target] | None:
    """What to connect to, or None for a name that is to be resolved; TypeError or ValueError for what is neither."""
    _address.check_address(address)
    if not isinstance(address, tuple):
        return [(socket.AF_UNIX, os.fspath(address))]
    if not address[0]:
        raise ValueError("address host must not be empty: it is to be connected to")
    return _address.literal(address)


def check_local(address: Any, targets: list[Target] | None) -> Target:
    """What to connect from; TypeError or ValueError if that is not (host, port) of the targets' family."""
    if not isinstance(address, tuple):
        raise TypeError(f"local_address must be (host, port), not {address!r}")
    try:
        _address.check_address(address)
        found = _address.literal(address) if address[0] else None
    except (TypeError, ValueError) as error:
        raise type(error)(f"local_{error}") from None
    if not found:
        raise ValueError(f"local_address host must be a literal address, not {address[0]!r}")
    if targets and targets[0][0] != found[0][0]:
        raise ValueError(f"local_address must be of address's family, not {address!r}")
    return found[0]
