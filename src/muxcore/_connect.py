"""What may live here: how an outgoing connection comes about: resolving, trying one address after the other, giving up.

Plain Python over what any user of the Mux has (`add_writer`, `call_later`, `call_soon_threadsafe`), and so here once
for all cores.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import OrderedDict, deque
from itertools import chain, zip_longest

from . import _address
from ._config import to_ns
from ._own import SocketType, adopted
from ._pool import Pool
from ._timers import own_step
from ._typing import TYPE_CHECKING
from .errors import ConnectionClosed, ConnectTimeout, from_call, without_frames

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
AT_ONCE = 0.003  # seconds of a turn for those that have waited for a name
RESOLVERS = 4  # names of one Mux that are looked up at once ...
SPARE_RESOLVERS = 28  # ... beside those that are given up and still have no response

IN_PROGRESS = {0, errno.EINPROGRESS, getattr(errno, "WSAEWOULDBLOCK", 0)}


class Names:
    """The names that one Mux looks up, in threads of its own: they wait for no other work, and nothing waits for them.

    Connections to the same address share one lookup, so that a name without a response blocks one thread and not all.
    """

    def __init__(self, mux: Mux) -> None:
        self.mux = mux
        self.pool = Pool(RESOLVERS, "muxcore.names", SPARE_RESOLVERS)
        self.lookups: dict[Any, Lookup] = {}

    def join(self, attempt: Attempt) -> None:
        """Look up the name of its address, or wait for that with others; `attempt.resolved` is called."""
        address = attempt.address
        lookup = self.lookups.get(address)
        if lookup is not None and not lookup.done:
            attempt.lookup = lookup
            lookup.attempts[attempt] = None
            return
        attempt.lookup = lookup = Lookup(address)
        lookup.attempts[attempt] = None
        try:
            self.lookups[address] = lookup
            lookup.job = self.pool.submit(self.look_up, lookup)
        except BaseException as error:  # there may be no more threads, or no memory; or it is interrupted
            lookup.done, lookup.error = True, error
            self.finish(lookup)
            raise

    def leave(self, lookup: Lookup, attempt: Attempt) -> None:
        """`attempt` waits no longer. A lookup that runs cannot be stopped; it may still serve later attempts."""
        lookup.attempts.pop(attempt, None)
        if not lookup.attempts and lookup.job is not None and lookup.job.cancel():
            lookup.done = True
            self.forget(lookup)

    def look_up(self, lookup: Lookup) -> None:
        """In a thread of the pool."""
        try:
            lookup.targets = _address.resolve(lookup.address)
        except BaseException as error:
            lookup.error = without_frames(error)
        lookup.done = True
        try:
            self.mux.call_soon_threadsafe(self.finish, lookup)
        except RuntimeError:
            pass  # the Mux was closed meanwhile

    @own_step
    def finish(self, lookup: Lookup) -> None:
        """Let all that wait for it go on."""
        self.forget(lookup)
        try:
            self._step_each(lookup)
        finally:
            if lookup.attempts:  # the next turn goes on, after an interrupt, too
                self.mux._soon.append((self.finish, (lookup,)))

    def _step_each(self, lookup: Lookup) -> None:
        """Step as many as there is time for: thousands may wait for one name, and should not hold up the timers."""
        until = self.mux.time() + AT_ONCE
        while lookup.attempts:
            attempt, _ = lookup.attempts.popitem(last=False)
            attempt.step(attempt.resolved)
            if self.mux.time() > until:
                break

    def forget(self, lookup: Lookup) -> None:
        if self.lookups.get(lookup.address) is lookup:
            del self.lookups[lookup.address]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


class Lookup:
    """One name that is looked up."""

    __slots__ = ("address", "attempts", "done", "error", "job", "targets")

    def __init__(self, address: Any) -> None:
        self.address = address
        self.attempts: OrderedDict[Attempt, None] = OrderedDict()  # that wait for it
        self.job: Future[None] | None = None
        self.targets: list[Target] = []
        self.error: BaseException | None = None
        self.done = False


class Attempt:
    """The attempt to connect `conn`: its addresses as RFC 8305 says (IPv6 first, staggered), one timeout for all.

    An interrupt may come at any point, and a finaliser or a signal handler may end the connection at any point: a
    descriptor is in `tried` or in a socket object, never in both when one of them may close it; a step that fails ends
    the attempt; and `notify_again` goes on with one that was interrupted before its step could begin.
    """

    def __init__(
        self, mux: Mux, conn: Connection, address: Any, local: Target | None, tcp: _address.Tcp
    ) -> None:
        self.mux, self.conn, self.address, self.local, self.tcp = mux, conn, address, local, tcp
        self.targets: deque[Target] = deque()  # those that are still to be tried
        self.tried: list[int] = []  # descriptors that are connecting; a socket would warn when a Mux is forgotten
        self.errors: list[OSError | ValueError] = []
        self.lookup: Lookup | None = None
        self.stagger: TimerHandle | None = None
        self.deadline: TimerHandle | None = None
        self.timeout = conn.timeouts.connect
        self.expires = 0  # in nanoseconds of the clock
        self.error: BaseException | None = None  # what fail() has not reported yet
        self.over = False

    def start(self, targets: list[Target] | None) -> None:
        """Begin; None: the address has a name that is to be resolved first."""
        if self.timeout is not None:
            self.expires = time.monotonic_ns() + to_ns(self.timeout)
            self.set_deadline()
        if targets is None:
            self.mux._names.join(self)
        else:
            self.try_all(targets)

    @own_step
    def step(self, fn: Callable[..., object], *args: Any) -> None:
        """A step of the loop, where an exception would be lost: it is the end of the attempt."""
        try:
            fn(*args)
        except BaseException as error:
            failed = isinstance(error, Exception) and from_call(error)
            self.fail(error)
            if not failed:  # but interrupted
                raise

    def resolved(self) -> None:
        lookup = self.lookup
        if self.over or lookup is None:
            return
        if lookup.error is not None:
            self.fail(copied(lookup.error))
            return
        targets = lookup.targets
        if self.local is not None:
            targets = [target for target in targets if target[0] == self.local[0]]
        if not targets:
            self.errors.append(OSError(errno.EADDRNOTAVAIL, "the name has no address of local_address's family"))
        self.try_all(targets)

    def try_all(self, targets: list[Target]) -> None:
        six = [target for target in targets if target[0] == socket.AF_INET6]
        others = [target for target in targets if target[0] != socket.AF_INET6]
        self.targets.extend(target for target in chain(*zip_longest(six, others)) if target)
        self.lookup = None
        self.try_next()

    def try_next(self) -> None:
        """Begin with the next address; those begun before may still succeed."""
        if self.stagger is not None:
            self.stagger.cancel()
        while self.targets:
            family, target = self.targets[0]
            try:
                self.begin(family, target)
            except (OSError, ValueError) as error:  # the latter: select's limit
                if not from_call(error):
                    raise
                if isinstance(error, BlockingIOError):
                    # The backlog of a Unix listener is full, and no event reports when it has room.
                    self.again_in(BACKLOG_FULL)
                    return
                self.errors.append(without_frames(error))  # which would keep us until a collection
                if self.targets:
                    self.targets.popleft()
            else:
                if self.targets:
                    self.targets.popleft()
                self.again_in(STAGGER)
                return
        if not self.tried and not self.over:
            self.fail(self.failure())

    def again_in(self, seconds: float) -> None:
        if not self.over:
            self.stagger = self.mux.call_later(seconds, self.step, self.try_next)

    def begin(self, family: int, target: Any) -> None:
        sock = socket.socket(family, socket.SOCK_STREAM)
        fd = sock.fileno()
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
            if self.over:  # user code ran, and has ended the connection
                sock.close()
                return
            self.tried.append(fd)
            SocketType.detach(sock)
            if fd in self.tried:
                self.mux.add_writer(fd, self.step, self.decided, fd, target)
        except BaseException:
            if fd in self.tried:
                SocketType.detach(sock)
                self.drop(fd)
            else:
                sock.close()
            raise

    def decided(self, fd: int, target: Any) -> None:
        """The kernel knows whether this one is connected."""
        if fd not in self.tried:
            return
        sock = adopted(fd)
        try:
            sock.setblocking(False)
            peer = connected_peer(sock, target)
            self.mux.remove_writer(fd)
            self.tried.remove(fd)
            self.cancel()
            self.mux._connected(self.conn, sock, peer)
        except BaseException as error:
            if fd in self.tried:
                SocketType.detach(sock)
                self.drop(fd)
            else:
                sock.close()  # which is nothing, if the connection has it
            if self.over or not (isinstance(error, OSError) and from_call(error)):
                raise
            self.errors.append(without_frames(error))
            self.try_next()

    def drop(self, fd: int) -> None:
        """Forget one that was tried."""
        try:
            self.mux.remove_writer(fd)
        except RuntimeError:
            pass  # the Mux is being closed, and its set with it
        if fd in self.tried:
            close_taken(self.tried, [self.tried.index(fd)])

    def failure(self) -> Exception:
        """What the errors of all addresses amount to."""
        first = self.errors[0]
        if not isinstance(first, OSError):
            return first
        texts = dict.fromkeys(getattr(error, "strerror", None) or str(error) for error in self.errors)
        what = "" if isinstance(self.address, tuple) else "the Unix socket "
        return OSError(first.errno, f"cannot connect to {what}{self.address!r}: {'; '.join(texts)}")

    def set_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        if not self.over:
            self.deadline = self.mux._timers.add(self.expires, self.step, (self.timed_out,))

    def timed_out(self) -> None:
        assert self.timeout is not None
        if not self.mux._has_judged(self.expires):  # the loop was held up: the kernel may know more
            self.set_deadline()
            return
        text = f"no connection to {self.address!r} within {self.timeout:g} s"
        self.fail(ConnectTimeout(text, conn=self.conn, limit=self.timeout))

    def fail(self, error: BaseException) -> None:
        self.error = error  # first: memory may be out below, and then notify_again() goes on
        # What is kept has no frames, which hold sockets; and an interrupt gets new ones as it goes on its way.
        failed = isinstance(error, Exception) and from_call(error)
        self.error = error = without_frames(error) if failed else copied(error)
        self.cancel()
        self.mux._connect_failed(self.conn, error)
        self.error = None

    def notify_again(self) -> None:
        """The turn before was interrupted, or memory was out: perhaps amid fail(), or before a step began."""
        if self.error is not None:
            self.fail(self.error)
        elif self.over:  # and yet not connected
            self.fail(ConnectionClosed("the attempt to connect was interrupted, or memory was out"))
        elif self.timeout is not None and time.monotonic_ns() >= self.expires:
            self.step(self.timed_out)
        elif self.lookup is None:
            self.step(self.try_next)
        elif self.lookup.done:
            self.step(self.resolved)

    def cancel(self) -> None:
        """Leave nothing behind. The core calls this, too, when the connection ends before it is open."""
        self.over = True
        self.targets.clear()
        for timer in (self.deadline, self.stagger):
            if timer is not None:
                timer.cancel()
        if self.lookup is not None:
            self.mux._names.leave(self.lookup, self)
            self.lookup = None
        for fd in list(self.tried):
            self.drop(fd)

    def abandon(self) -> None:
        """In a forked child, or for a Mux that was never closed: close(2) and nothing else."""
        self.over = True
        while self.tried:
            close_taken(self.tried, [-1] * len(self.tried))


def close_taken(descriptors: list[int], places: list[int]) -> None:
    """Remove these from the list and close them, in C from end to end: an interrupt between the two would leak one, or
    close it a second time, when its number may belong to another socket."""
    try:
        any(map(socket.close, map(descriptors.pop, places)))
    except OSError as error:  # other code has closed it
        if not from_call(error):
            raise


def copied(error: BaseException) -> BaseException:
    """An error for each of those that get it."""
    alike = (OSError, ValueError, KeyboardInterrupt, SystemExit)
    try:
        return type(error)(*error.args) if isinstance(error, alike) else error
    except Exception:
        return error  # a class of a user's may want other arguments


def connected_peer(sock: socket.socket, target: Any) -> Any:
    """The address of the peer; OSError if there is none.

    Reading comes before SO_ERROR: a peer may have replied and reset the connection meanwhile. Then this one is
    connected, to be read and to get the reset, which SO_ERROR would make the kernel forget.
    """
    try:
        sock.recv(1, socket.MSG_PEEK)
    except OSError as error:
        if not from_call(error):
            raise
        if not isinstance(error, BlockingIOError):
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or error.errno  # Windows' recv says ENOTCONN
            raise OSError(number, os.strerror(number or 0)) from None
    try:
        peer = sock.getpeername()
    except OSError as error:  # it was reset
        if not from_call(error):
            raise
        return target
    if sock.family in _address.INTERNET and peer == sock.getsockname():
        # TCP knows a simultaneous open: a port of ours that is not listened on can be connected to itself.
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return _address.shown(peer)


def check_target(address: Any) -> tuple[Any, list[Target] | None]:
    """The address, and what to connect to: None for a name that is to be resolved. TypeError or ValueError for what is
    neither."""
    address = _address.as_address(address)
    if not isinstance(address, tuple):
        return address, [(socket.AF_UNIX, address)]
    if not address[0]:
        raise ValueError("address host must not be empty or None: connect needs one host")
    return address, _address.literal(address)


def check_local(address: Any, targets: list[Target] | None) -> Target:
    """What to connect from; TypeError or ValueError if that is not (host, port) of the targets' family."""
    if not isinstance(address, tuple | list):
        raise TypeError(f"local_address must be (host, port), not {address!r}")
    try:
        address = _address.as_address(address)
        found = _address.literal(address) if address[0] else None
    except (TypeError, ValueError) as error:
        raise type(error)(f"local_{error}") from None
    if not found:
        raise ValueError(f"local_address host must be a literal address, not {address[0]!r}")
    if targets and targets[0][0] != found[0][0]:
        raise ValueError(f"local_address must be of address's family, not {address!r}")
    return found[0]
