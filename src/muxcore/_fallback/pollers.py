"""What may live here: readiness: select, poll and kqueue behind one face; Epoll without the compiled core."""

from __future__ import annotations

import errno
import operator
import os
import select
import stat
import sys

from .._typing import TYPE_CHECKING, final
from .._watch import ERROR, HANGUP, INVALID, READ, WRITE
from ..errors import from_call

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

OPENED, READABLE, DRAINED, EOF, CLOSED = 1, 2, 4, 8, 16  # as the flags of Report, which are slower to combine


UNWATCHED = -1  # a Connection's interest once its HUP was reported: poll would go on reporting it


class SelectPoller:
    """select.select: everywhere; descriptors below FD_SETSIZE only. Without interest it reports no error."""

    # A number compiled into Python: the bits of an fd_set; on Windows, where it is a list, how many sockets it holds.
    FD_SETSIZE = 512 if sys.platform == "win32" else 1024

    def __init__(self) -> None:
        self.readers: set[int] = set()
        self.writers: set[int] = set()

    def watch(self, fd: int, wanted: int) -> None:
        place = len((self.readers | self.writers) - {fd}) if sys.platform == "win32" else fd
        if wanted and place >= self.FD_SETSIZE:
            raise ValueError(
                f"select cannot watch descriptor {fd}: its limit, FD_SETSIZE, is {self.FD_SETSIZE}; "
                f"the backends 'poll' and 'epoll' have none"
            )
        (self.readers.add if wanted & READ else self.readers.discard)(fd)
        (self.writers.add if wanted & WRITE else self.writers.discard)(fd)

    def unwatch(self, fd: int) -> None:
        self.readers.discard(fd)
        self.writers.discard(fd)

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        try:
            # On Windows a connect that failed is neither readable nor writable.
            failing = self.writers if sys.platform == "win32" else ()
            # Copies: select makes its own, too, but may start the collector halfway, and with it anything.
            readable, writable, failed = select.select(list(self.readers), list(self.writers), failing, timeout)
        except OSError as error:
            if not from_call(error) or error.errno not in (errno.EBADF, errno.ENOTSOCK):  # Windows reports the latter
                raise
            return [(fd, INVALID) for fd in self.readers | self.writers if not is_open(fd)]
        found = dict.fromkeys(readable, READ)
        for fd in {*writable, *failed}:
            found[fd] = found.get(fd, 0) | WRITE
        return list(found.items())

    def close(self) -> None:
        pass


class PollPoller:
    """select.poll: any Unix, any descriptor."""

    def __init__(self) -> None:
        self.poll = select.poll()

    def watch(self, fd: int, wanted: int) -> None:
        # With mask 0, ERR and HUP are still reported.
        self.poll.register(fd, (select.POLLIN if wanted & READ else 0) | (select.POLLOUT if wanted & WRITE else 0))

    def unwatch(self, fd: int) -> None:
        try:
            self.poll.unregister(fd)
        except KeyError as error:  # after a HUP, see Mux._on_ready
            if not from_call(error):
                raise

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        # Rounded up, since a timer is never early.
        found = self.poll.poll(None if timeout is None else -int(-1000 * timeout // 1))
        return [(fd, POLL_FLAGS[mask]) for fd, mask in found]

    def close(self) -> None:
        pass


def _poll_flags(mask: int) -> int:
    pairs = (("POLLIN", READ), ("POLLOUT", WRITE), ("POLLERR", ERROR), ("POLLHUP", HANGUP), ("POLLNVAL", INVALID))
    return sum(flag for name, flag in pairs if mask & getattr(select, name))


POLL_FLAGS = [_poll_flags(mask) for mask in range(64)] if hasattr(select, "poll") else []


class KqueuePoller:
    """select.kqueue: BSD and macOS; any descriptor. As with poll, the end of one without interest is reported."""

    # More room than any socket has: such a filter only ever reports the end. With EV_CLEAR it does so once, also on
    # macOS, which reduces a mark above the buffer's size to that size.
    ROOM = 0x7FFFFFFF

    def __init__(self) -> None:
        self.select: Any = select  # type checkers see only the names of the system they run on
        self.kqueue = self.select.kqueue()
        self.watched: set[int] = set()

    def watch(self, fd: int, wanted: int) -> None:
        kq = self.select
        self.unwatch(fd)  # EV_ADD leaves the EV_CLEAR of a filter that is there as it was
        try:
            if wanted & READ:
                self._change(fd, kq.KQ_FILTER_READ, kq.KQ_EV_ADD)
            if wanted & WRITE:
                self._change(fd, kq.KQ_FILTER_WRITE, kq.KQ_EV_ADD)
            if not wanted:
                # Of WRITE, since READ's end is a FIN, which may have come long ago.
                self._change(fd, kq.KQ_FILTER_WRITE, kq.KQ_EV_ADD | kq.KQ_EV_CLEAR, kq.KQ_NOTE_LOWAT, self.ROOM)
        except OSError:
            self.unwatch(fd)
            raise
        self.watched.add(fd)

    def unwatch(self, fd: int) -> None:
        self.watched.discard(fd)
        for kind in (self.select.KQ_FILTER_READ, self.select.KQ_FILTER_WRITE):
            try:
                self._change(fd, kind, self.select.KQ_EV_DELETE)
            except OSError as error:  # it was not there, or went with a descriptor that was closed
                if not from_call(error):
                    raise

    def _change(self, *event: int) -> None:
        # One at a time: the kernel stops at the first change that fails.
        self.kqueue.control([self.select.kevent(*event)], 0)

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        found: dict[int, int] = {}
        for event in self.kqueue.control(None, 2 * len(self.watched) or 1, timeout):  # two filters each
            reported = READ if event.filter == self.select.KQ_FILTER_READ else WRITE
            if event.flags & self.select.KQ_EV_EOF and event.fflags:  # the socket's error; else recv returns the end
                reported |= ERROR
            found[event.ident] = found.get(event.ident, 0) | reported
        return list(found.items())

    def close(self) -> None:
        self.kqueue.close()


POLLERS: dict[str, Callable[[], Any]] = {"kqueue": KqueuePoller, "poll": PollPoller, "select": SelectPoller}


def is_open(fd: int) -> bool:
    try:
        select.select([fd], (), (), 0)  # fstat knows no sockets on Windows
    except OSError as error:
        if not from_call(error):
            raise
        return False
    return True


def check_pollable(fd: int) -> None:
    """Raise what epoll would for a descriptor that is not open, or one that select and poll call ready for ever."""
    if os.name != "posix":
        select.select([fd], (), (), 0)  # there it is a socket or nothing
    elif stat.S_ISREG(mode := os.fstat(fd).st_mode) or stat.S_ISDIR(mode):
        raise PermissionError(errno.EPERM, f"descriptor {fd} is a file, and always ready")


system_epoll: Any = getattr(select, "epoll", None)  # now: our Epoll may come to stand in its place


@final
class Epoll:
    """Where the compiled core is missing: select.epoll with `data=`; timeouts are in whole milliseconds.

    Raises OSError where the system has no epoll.
    """

    __slots__ = ("__weakref__", "_data", "_epoll")

    def __init__(self, sizehint: int = -1, flags: int = 0) -> None:
        if system_epoll is None:
            raise OSError("this system has no epoll")
        self._epoll = system_epoll(sizehint, flags)
        self._data: dict[int, Any] = {}

    @classmethod
    def fromfd(cls, fd: int) -> Epoll:
        self = cls.__new__(cls)
        if (number := operator.index(fd)) < -1:
            raise OSError("invalid descriptor")  # select.epoll raises one with an errno of some earlier call
        self._epoll = system_epoll.fromfd(number)
        self._data = {}
        return self

    @property
    def closed(self) -> bool:
        return self._epoll.closed  # type: ignore[no-any-return]

    def fileno(self) -> int:
        return self._epoll.fileno()  # type: ignore[no-any-return]

    def close(self) -> None:
        epoll = self._epoll
        try:
            os.fstat(epoll.fileno())  # EBADF, which epoll.close() does not report before 3.15
        except ValueError:
            pass  # it is closed already
        finally:
            try:
                epoll.close()
            finally:
                self._data.clear()  # last: it runs the finalisers of what was registered as data

    def __enter__(self) -> Epoll:
        self._epoll.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def register(self, fd: Any, eventmask: int = 7, data: Any = None) -> None:
        number = _number(fd)
        self._epoll.register(number, eventmask)
        self._data.pop(number, None)
        if data is not None:
            self._data[number] = data

    def modify(self, fd: Any, eventmask: int, data: Any = None) -> None:
        number = _number(fd)
        self._epoll.modify(number, eventmask)
        if data is not None:
            self._data[number] = data

    def unregister(self, fd: Any) -> None:
        number = _number(fd)
        _held = self._data.pop(number, None)  # its finaliser may register the same number again
        self._epoll.unregister(number)

    def poll(self, timeout: float | None = None, maxevents: int = -1) -> list[tuple[Any, int]]:
        try:
            found = self._epoll.poll(timeout, maxevents)
        except OSError as error:
            if not (self._epoll.closed and from_call(error)):
                raise
        if self._epoll.closed:
            return []  # a signal handler or another thread has closed it, and the data is gone
        return [(self._data.get(fd, fd), events) for fd, events in found]


def _number(fd: Any) -> Any:
    """The descriptor of an object, looked up once; what is none is for select.epoll to refuse."""
    return fd.fileno() if not isinstance(fd, int) and hasattr(fd, "fileno") else fd
