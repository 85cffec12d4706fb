"""What may live here: the core in plain Python, over select, poll or kqueue: everywhere, and the oracle of the tests.

It does what _epoll.pyx and its chapters do, step by step and under the same names; the essays are there. It has no
generations: a batch holds owners, not descriptors, so an event is stale if its owner has lost the descriptor meanwhile.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time
import warnings
from _thread import RLock, get_ident  # threading's, which takes as long to import as this file
from collections import deque
from functools import partial
from itertools import islice, takewhile

from ._config import Limits, Timeouts, as_limits, as_timeouts, check_seconds, to_ns
from ._file import FILES_KEPT, file_part, read_at
from ._frame import NOTHING, SCANS, CustomReader, Found, Reader, as_bytes, check_framer, datagram_too_large, encode
from ._log import log
from ._mux import STATE, Mux, what_lives_as_long_as_this_thread
from ._stats import Stats
from ._timers import Timers
from ._typing import TYPE_CHECKING, final
from ._unix import PeerCredentials, SocketFile, peer_credentials
from ._watch import ERROR, HANGUP, INVALID, READ, WRITE, Watch
from .errors import (
    ConnectionClosed,
    ConnectTimeout,
    FrameError,
    IdleTimeout,
    OutboxFull,
    WriteTimeout,
    about,
    without_frames,
)
from .handler import Callbacks, DatagramCallbacks

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable
    from typing import Any

    from . import _address
    from ._address import DONTWAIT
    from ._own import OwnSocket, SocketType, adopted, close_socket, moved
    from ._watch import Calls

try:
    import fcntl
    import termios
except ImportError:  # not Unix: nobody tells what is unsent
    pass

SEND_FLAGS = 0  # and the names above: by the first Mux

OPENED, READABLE, DRAINED, EOF, CLOSED = 1, 2, 4, 8, 16

MAX_PARTS = 64
SMALL_PIECE, BLOCK_SIZE = 1024, 4096
JOIN_BELOW = 65536  # pieces up to this size together are joined: one copy costs less than many iovecs
FILE_BURST = 1 << 20  # bytes of a file for one connection before the others have their turn
ACCEPT_BUDGET = 64
GROUP = 16
STARVED_NS = 10_000_000
CLOSING_STALL_NS = 30_000_000_000
FIRST_REST_NS = 10_000_000
LONGEST_REST_NS = 1_000_000_000
SWEEP_NS = 1_000_000_000
PART_NS = 3_000_000  # of a turn
FOREIGN_COST = 192
BATCH, RECEIVE_ROUNDS = 64, 4
ADDRESSES_KEPT = 1024
ERRORS_KEPT = 64
PACKET_COST = 64
LONGEST_WAIT = 86400  # seconds, then it waits again: poll takes 24 days at most, macOS three years

RESET_ON_CLOSE = (1).to_bytes(4, sys.byteorder) + bytes(4)  # SO_LINGER {on, 0}

# What send answers when the peer is gone. ECONNABORTED: Windows; EPROTOTYPE: macOS, while the socket is torn down.
PEER_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.EPROTOTYPE}
TRY_LATER = {errno.ENOBUFS, errno.ENOMEM}
NO_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
CLIENT_GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENOPROTOOPT}
CLIENT_GONE |= {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, getattr(errno, "ENONET", 0)}

TOO_LARGE = getattr(errno, "WSAEMSGSIZE", 0)  # what Windows answers in place of a datagram that does not fit

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


# --- readiness -------------------------------------------------------------------------------------

UNWATCHED = -1  # a Connection's interest once its HUP was reported: poll would go on reporting it


class SelectPoller:
    """select.select: everywhere; descriptors below FD_SETSIZE only. It does not tell errors of what nobody wants."""

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
            if error.errno not in (errno.EBADF, errno.ENOTSOCK):  # the latter is Windows' word for it
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
        except KeyError:
            pass  # after a HUP, see Mux._on_ready

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
    """select.kqueue: BSD and macOS; any descriptor. As with poll, the end of what nobody wants is reported, too."""

    # More room than any socket has: such a filter only ever reports the end. With EV_CLEAR it does so once, also on
    # macOS, which takes a larger mark than the buffer for the buffer's size.
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
            except OSError:
                pass  # it was not there, or went with a descriptor that somebody closed

    def _change(self, *event: int) -> None:
        # One at a time: the kernel stops at the first change that fails.
        self.kqueue.control([self.select.kevent(*event)], 0)

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        found: dict[int, int] = {}
        for event in self.kqueue.control(None, 2 * len(self.watched) or 1, timeout):  # two filters each
            reported = READ if event.filter == self.select.KQ_FILTER_READ else WRITE
            if event.flags & self.select.KQ_EV_EOF and event.fflags:  # the socket's error; else recv tells of the end
                reported |= ERROR
            found[event.ident] = found.get(event.ident, 0) | reported
        return list(found.items())

    def close(self) -> None:
        self.kqueue.close()


POLLERS: dict[str, Callable[[], Any]] = {"kqueue": KqueuePoller, "poll": PollPoller, "select": SelectPoller}


def is_open(fd: int) -> bool:
    try:
        select.select([fd], (), (), 0)  # fstat knows no sockets on Windows
    except OSError:
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
        self._epoll = system_epoll.fromfd(fd)
        self._data = {}
        return self

    @property
    def closed(self) -> bool:
        return self._epoll.closed  # type: ignore[no-any-return]

    def fileno(self) -> int:
        return self._epoll.fileno()  # type: ignore[no-any-return]

    def close(self) -> None:
        try:
            self._epoll.close()
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
        except OSError:
            if not self._epoll.closed:
                raise
        if self._epoll.closed:
            return []  # a signal handler or another thread has closed it, and the data is gone
        return [(self._data.get(fd, fd), events) for fd, events in found]


def _number(fd: Any) -> Any:
    """The descriptor of an object, looked up once; what is none is for select.epoll to refuse."""
    return fd.fileno() if not isinstance(fd, int) and hasattr(fd, "fileno") else fd


# --- policies --------------------------------------------------------------------------------------


class Policy:
    """A handler and its settings."""

    __slots__ = (*Callbacks._fields, "autopause", "callbacks", "framer", "half_open", "handler", "idle_ns", "limits",
                 "linger_ns", "listener", "outbound", "pull", "silence_ns", "timeouts", "write_ns")

    def __init__(
        self,
        handler: object,
        callbacks: Callbacks,
        limits: Limits,
        timeouts: Timeouts,
        half_open: bool,
        framer: Any,
        outbound: bool,
    ) -> None:
        self.on_open, self.on_message, self.on_messages, self.on_drain, self.on_eof, self.on_close = callbacks
        self.handler, self.callbacks = handler, callbacks
        self.pull = handler is None
        self.half_open = half_open
        self.outbound = outbound
        self.listener: Listener | None = None
        self.limits = limits
        self.timeouts = timeouts
        self.framer = framer
        self.autopause = not self.outbound if limits.autopause is None else limits.autopause
        self.linger_ns = to_ns(timeouts.linger)
        self.idle_ns = to_ns(timeouts.idle or 0)
        self.write_ns = to_ns(timeouts.write or 0)
        self.silence_ns = to_ns(timeouts.silence or 0)

    def changed(self, limits: Limits, timeouts: Timeouts, framer: Any) -> Policy:
        """The same policy with other settings, for one connection alone."""
        other = Policy(self.handler, self.callbacks, limits, timeouts, self.half_open, framer, self.outbound)
        other.listener = self.listener
        return other

    @property
    def closing_stall_ns(self) -> int:
        return min(self.write_ns or CLOSING_STALL_NS, CLOSING_STALL_NS)


# --- connections -----------------------------------------------------------------------------------


class FilePart:
    """A part of a file in an outbox, and a descriptor of our own for it."""

    __slots__ = ("_own", "left", "offset")

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self.offset = offset
        self.left = size
        self._own: list[int] = []
        self._own.extend(map(os.dup, (fd,)))  # in one step: an exception of a signal handler finds it here, or not made

    def __len__(self) -> int:
        return self.left

    def __del__(self) -> None:
        for fd in getattr(self, "_own", ()):  # an interrupt may have come before it had one
            try:
                os.close(fd)
            except OSError:
                pass  # the descriptor is gone all the same

    def send(self, sock: socket.socket, size: int, sent: list[int]) -> None:
        """Send that many bytes from its front, and append to `sent` how many went, 0 if the file has ended."""
        [fd] = self._own
        if hasattr(os, "sendfile"):
            if os.get_blocking(sock.fileno()):  # another holder, by dup or fork, has cleared O_NONBLOCK
                os.set_blocking(sock.fileno(), False)
            sent.extend(map(os.sendfile, (sock.fileno(),), (fd,), (self.offset,), (size,)))
            return
        data = read_at(fd, self.offset, min(size, JOIN_BELOW))
        sent.extend(map(sock.send, (data,), (SEND_FLAGS,)) if data else (0,))


class SocketOptions:
    """What is asked of the socket that a Connection or a Datagram has."""

    __slots__ = ()
    mux: FallbackMux
    _sock: socket.socket | None

    def getsockopt(self, level: int, name: int, size: int = 0, /) -> int | bytes:
        self.mux._check_thread()
        args = _address.as_option(level, name, *([size] if size else []))
        return self._borrowed("getsockopt").getsockopt(*args)

    def setsockopt(self, level: int, name: int, value: int | bytes, /) -> None:
        self.mux._check_thread()
        value = _address.as_option_value(value)
        level, name = _address.as_option(level, name)
        self._check_option(level, name, value)
        self._borrowed("setsockopt").setsockopt(level, name, value)

    def _check_option(self, level: int, name: int, value: int | bytes) -> None:
        pass

    def _borrowed(self, method: str) -> socket.socket:
        self.mux._check_thread()
        if self._sock is None:
            raise ConnectionClosed(f"{method}: {self!r} is not open", conn=self)
        return self._sock


@final
class Connection(SocketOptions):
    """One connected stream socket; see the compiled core's Connection."""

    __slots__ = (
        "__weakref__", "_above", "_blocked", "_broken", "_close_asked", "_closing", "_connecting",
        "_custom", "_deadline", "_drain_owed", "_ended", "_file_bytes", "_files", "_flushing",
        "_foreign_bytes", "_foreign_entries", "_heard_ns", "_interest", "_offered", "_on_hold", "_out",
        "_out_bytes", "_paused", "_pending", "_policy", "_reader", "_received_ns", "_said", "_sent", "_shut", "_sock",
        "_starved", "_write_eof", "_wrote_ns",
        "closed", "data", "eof", "error", "id", "mux", "peer",
    )

    def __new__(cls, *args: Any) -> Connection:
        if not args:
            raise TypeError("connections are made by Mux.listen, Mux.connect and Mux.attach")
        return super().__new__(cls)

    def __init__(self, mux: FallbackMux, sock: socket.socket | None, peer: Any, policy: Policy) -> None:
        mux._last_id += 1
        self.id = mux._last_id
        self.mux = mux
        self.peer = peer
        self.data: Any = None
        self.error: BaseException | None = None
        self.closed = self.eof = False
        self._sock: socket.socket | None = sock
        self._policy = policy
        self._reader: Reader | CustomReader | Found | None = None  # what was received and not delivered
        self._custom: CustomReader | None = None  # that of a user's framer, from the beginning
        self._out: deque[bytes | bytearray | memoryview | FilePart] = deque()
        self._out_bytes = 0  # in the deque
        self._file_bytes = 0  # of these, in files, where they cost no memory
        self._sent: list[int] = []  # what a send has returned, until it is consumed: see _flush
        self._offered = 0  # and how many bytes that send was given
        self._files = 0  # how many
        self._foreign_bytes = self._foreign_entries = self._interest = 0
        self._received_ns = self._heard_ns = mux._now_ns if mux._in_turn else time.monotonic_ns()
        self._wrote_ns = 0
        self._deadline: Any = None  # has cancel(): the Attempt to connect or, while closing, a timer
        self._connecting = self._on_hold = False
        self._pending = self._paused = self._above = self._drain_owed = self._blocked = False
        self._starved = self._write_eof = self._closing = self._shut = self._broken = False
        self._ended = self._close_asked = self._flushing = False
        self._said = 0  # OPENED, EOF, CLOSED: which of them the user was told

    def __init_subclass__(cls) -> None:
        raise TypeError("Connection is not subclassed: put your state on .data")

    def __reduce__(self) -> Any:
        raise TypeError("a Connection can be neither copied nor pickled")

    def __repr__(self) -> str:
        state = "closed" if self.closed else "closing" if self.closing else "open"
        if self._connecting and state == "open":
            state = "connecting"
        return f"<muxcore.Connection {self.id} {state}, peer={self.peer!r}>"

    def _check_option(self, level: int, name: int, value: int | bytes) -> None:
        _address.check_no_linger(level, name, value)

    # -- who it is

    @property
    def listener(self) -> Listener | None:
        return self._policy.listener

    @property
    def local(self) -> Any:
        self.mux._check_thread()
        return _address.shown(self._sock.getsockname()) if self._sock is not None else None

    @property
    def peer_credentials(self) -> PeerCredentials:
        return peer_credentials(self._borrowed("peer_credentials"))

    @property
    def closing(self) -> bool:
        return self._close_asked or self._closing or self._ended

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else -1

    # -- messages out

    def send(self, message: Any, /) -> bool:
        self.mux._check_fork()
        return self._enqueue(self._encoded(message))

    def send_many(self, messages: Iterable[Any], /) -> bool:
        return self._each(self.send, messages)

    def write(self, data: Any, /) -> bool:
        self.mux._check_fork()
        return self._enqueue(as_bytes(data))

    def writelines(self, parts: Iterable[Any], /) -> bool:
        return self._each(self.write, parts)

    def _each(self, send: Callable[[Any], bool], messages: Iterable[Any]) -> bool:
        below = not (self._above or self._refuses_output())
        for message in messages:
            below = send(message)
        return below

    def sendfile(self, file: Any, /, offset: int = 0, count: int | None = None) -> bool:
        self.mux._check_thread()
        fd, size, data = file_part(file, offset, count)
        if data is not None:
            return self._may_queue() and self._accept_message(data)
        if not self._may_queue():
            return False
        if self._files >= FILES_KEPT:
            return self._overflow(of_files=True)
        part = FilePart(fd, offset, size)
        if not self.mux._in_turn:
            self._mark()
        self._files += 1
        self._out_bytes += size
        self._file_bytes += size
        self._out += (part,)
        return self._queued()

    def write_eof(self) -> None:
        self.mux._check_thread()
        if not self._refuses_output():
            self._mark()
            self._write_eof = True

    def flush(self) -> int:
        self.mux._check_thread()
        if self._can_flush():
            self.mux._now_ns = time.monotonic_ns()
            self._flush()
        return self._out_bytes

    @property
    def outbox_size(self) -> int:
        return self._out_bytes + self._foreign_bytes

    # -- messages in

    def recv(self, default: Any = None) -> Any:
        self.mux._check_thread()
        message = self._take()
        return default if message is NOTHING else message

    def recv_all(self) -> list[Any]:
        self.mux._check_thread()
        messages, _ = self._take_all()
        return messages

    def __iter__(self) -> Connection:
        return self

    def __next__(self) -> Any:
        self.mux._check_thread()
        message = self._take()
        if message is NOTHING:
            raise StopIteration
        return message

    @property
    def inbox_size(self) -> int:
        self.mux._check_thread()
        reader = self._reader
        if isinstance(reader, Reader):
            return reader.size
        return len(reader.rest()) if reader is not None else 0

    @property
    def unread(self) -> bytes:
        self.mux._check_thread()
        return self._reader.rest() if self._reader is not None else b""

    def pause_reading(self) -> None:
        self.mux._check_thread()
        if not (self._paused or self._closing or self._ended):
            self._mark()
            self._paused = True

    def resume_reading(self) -> None:
        self.mux._check_thread()
        if self._paused:
            self._mark()
            self._received_ns = self._heard_ns = time.monotonic_ns()
            self._paused = False
            self._report_complete()

    def is_reading(self) -> bool:
        self.mux._check_thread()
        return self._receives() and not self._closing

    # -- the end

    def close(self) -> None:
        self._end_by(self._close)

    def abort(self) -> None:
        self._end_by(self._abort)

    def _end_by(self, end: Callable[[], None]) -> None:
        mux = self.mux
        mux._check_fork()
        with mux._lock:  # see FallbackMux._bind
            if not mux._is_foreign():
                end()
                return
            self._close_asked = True
        if not self.closed:
            mux._from_foreign(end, ())

    def detach(self) -> socket.socket:
        self.mux._check_thread()
        if self._closing or self._ended or self._sock is None:
            raise ConnectionClosed("detach: the connection is not open", conn=self)
        with self.mux._lock:  # as in _advance_close
            if self.outbox_size:
                raise RuntimeError(f"detach: {self.outbox_size} bytes are unsent")
            sock = self._sock
            if self._closing or self._ended or sock is None:  # by what has run since, a signal handler, say
                raise ConnectionClosed("detach: the connection is not open", conn=self)
            self._closing = self._ended = True
        self._drop_socket(close=False)
        self._mark()
        plain: socket.socket = moved(sock, socket.socket)
        return plain

    # -- settings

    @property
    def limits(self) -> Limits:
        return self._policy.limits

    @limits.setter
    def limits(self, value: Limits) -> None:
        self._set_policy(limits=as_limits(value))

    def set_limits(self, **changes: Any) -> None:
        self.limits = self.limits.__replace__(**changes)

    @property
    def timeouts(self) -> Timeouts:
        return self._policy.timeouts

    @timeouts.setter
    def timeouts(self, value: Timeouts) -> None:
        self._set_policy(timeouts=as_timeouts(value))

    def set_timeouts(self, **changes: Any) -> None:
        self.timeouts = self.timeouts.__replace__(**changes)

    @property
    def framer(self) -> Any:
        return self._policy.framer

    @framer.setter
    def framer(self, value: Any) -> None:
        self.mux._check_thread()
        check_framer(value)
        custom = None if type(value) in SCANS else CustomReader(value)
        nothing: list[Any] = []
        while True:  # each of these calls may run anything, which may read, or set a framer, too
            before, old = self._policy, self._reader
            changes = 0 if old is None else old.changes
            policy = before.changed(before.limits, before.timeouts, value)
            rest = b"" if old is None else old.rest()
            reader = (custom or Reader(value)) if rest else None
            if reader is not None:
                reader.feed(rest)
            if self._policy is before and self._reader is old and (old is None or old.changes == changes):
                break
            if custom is not None:
                custom.data = b""
        if self._closing or (self._ended and not policy.pull):  # else it stays until it is taken, as in _finish()
            reader = None
        # A thread that sends meanwhile finds no policy whose encoder is not there.
        self._custom, self._policy, self._reader, self._custom = custom or self._custom, policy, reader, custom
        if isinstance(old, CustomReader | Found):
            old.data = b""  # it may be in the middle of finding a message, and would go on
            old.found, nothing = nothing, old.found
        self._report_complete()
        self._mark()

    def _set_policy(self, limits: Limits | None = None, timeouts: Timeouts | None = None) -> None:
        self.mux._check_thread()
        policy = before = None
        while self._policy is not before:
            before = self._policy
            policy = before.changed(limits or before.limits, timeouts or before.timeouts, before.framer)
        assert policy is not None
        self._policy = policy
        self.mux._need_sweep(policy)
        self._report_complete()
        self._mark()

    # -- what is possible now

    def _delivers(self) -> bool:
        return not (self._paused or self._on_hold or self._closing or (self._above and self._policy.autopause))

    def _receives(self) -> bool:
        if self.eof or self._ended or self._connecting:
            return False
        if self._closing:
            return True
        return self._delivers() and not self._is_full()

    def _is_full(self) -> bool:
        reader = self._reader
        return reader is not None and reader.is_complete() and reader.size > self._policy.limits.max_inbox

    def _refuses_output(self) -> bool:
        return self._closing or self._ended or self._broken or self._write_eof

    def _can_flush(self) -> bool:
        return bool(self._out or self._sent) and not (
            self._blocked or self._starved or self._ended or self._broken or self._connecting
        )

    def _mark(self) -> None:
        """See to this connection before the next wait. It comes before the change that it is for: outside of a turn, an
        interrupt in between would leave that unseen."""
        if not self._pending:
            self._pending = True
            self.mux._pending.append(self)
            self.mux._wake_driver()

    def _end(self, error: BaseException | None) -> None:
        self._mark()
        if error is not None and not self._ended:
            self._reset_on_close()
        self._set_ended(error)

    def _set_ended(self, error: BaseException | None) -> None:
        if not self._ended:
            self._ended = True
            self._keep_error(error)

    def _keep_error(self, error: BaseException | None) -> None:
        if self.error is None:
            self.error = None if error is None else without_frames(error)

    # -- the outbox

    def _encoded(self, message: Any) -> bytes | None:
        """A message as it goes onto the wire, or None if its framer is not there: it could not be made, or the
        connection has ended."""
        policy = None
        while policy is not self._policy:  # another thread may send while the framer is set
            policy, custom = self._policy, self._custom
            if type(policy.framer) in SCANS:
                return encode(policy.framer, message)
            if custom is not None:
                return custom.encode(message)
        return None

    def _enqueue(self, data: bytes | None) -> bool:
        mux = self.mux
        if data is None:
            mux._count_drop()
            return False
        if mux._thread == get_ident():
            return self._may_queue() and self._accept_message(data)
        with mux._lock:  # see FallbackMux._bind
            if not mux._is_foreign():
                return self._may_queue() and self._accept_message(data)
        return self._enqueue_foreign(data)

    def _may_queue(self) -> bool:
        """Whether one more message is accepted; if not, that is dealt with."""
        if self._refuses_output():
            self.mux._count_drop()
            return False
        return self._held() < self._policy.limits.max_outbox or self._overflow()

    def _held(self) -> int:
        """Bytes of memory that the outbox takes."""
        return self._out_bytes - self._file_bytes + self._foreign_bytes + self._foreign_entries * FOREIGN_COST

    def _accept_message(self, data: bytes) -> bool:
        size = len(data)
        if not self.mux._in_turn:
            self._mark()
        if size >= SMALL_PIECE:
            self._out_bytes += size
            self._out += (data,)
        elif size:
            self._accept_piece(data, size)
        return self._queued()

    def _accept_piece(self, data: bytes, size: int) -> None:
        """Small pieces stand in one block: an object for each would take more memory than the outbox counts."""
        last = self._out[-1] if self._out else None
        is_open = type(last) is bytearray and len(last) < BLOCK_SIZE
        # A signal handler may send amid a flush, when nothing may be added to what was offered to the kernel; or flush
        # in the line above, and then the block is gone.
        if is_open and not self._flushing and self._out and self._out[-1] is last:
            last += data  # type: ignore[operator]
            self._out_bytes += size
            return
        self._out_bytes += size
        self._out += (bytearray(data),)

    def _queued(self) -> bool:
        """See to it that what was put into the outbox goes out; whether that is below the high-water mark."""
        mux = self.mux
        if self._ended:  # by a signal handler amid this
            self._discard_outbox()
            mux._count_drop()
            return False
        mux._n.messages_out += 1
        if self._out_bytes > self._policy.limits.high:
            return self._above_high()
        if mux._corked is not self and self._out and not self._blocked:
            if mux._direct and not mux._in_turn and self._can_flush():
                self._flush()
            else:
                self._mark()
        return not self._above

    def _above_high(self) -> bool:
        self._send_out()
        if self._out_bytes <= self._policy.limits.high:
            return not self._above
        if not self._above:
            self._mark()
            self._above = True
            self._drain_owed = False
            self.mux._n.pauses += 1
        return False

    def _overflow(self, of_files: bool = False) -> bool:
        limit, mux = self._policy.limits.max_outbox, self.mux
        if self._policy.limits.overflow != "drop" and not self._close_asked:
            text = f"outbox holds {self._held()} bytes, max_outbox is {limit}"
            if of_files:
                limit = FILES_KEPT
                text = f"outbox holds {limit} parts of files, the most it may"
            if self._policy.limits.overflow == "raise":
                raise OutboxFull(text, conn=self, limit=limit)  # with a name it would hold its own frame, and us
            error = OutboxFull(text, conn=self, limit=limit)
            if mux._is_foreign():
                mux._from_foreign(self._abort, (error,))
                self._close_asked = True
            else:
                self._abort(error)
        mux._count_drop()
        return False

    def _enqueue_foreign(self, data: bytes) -> bool:
        with self.mux._lock:  # as in _advance_close
            refused = self._close_asked or self._refuses_output()
            full = self._held() >= self._policy.limits.max_outbox
            if not refused and not full:
                self._foreign_bytes += len(data)
                self._foreign_entries += 1
            below = self.outbox_size <= self._policy.limits.high
        if refused:
            self.mux._count_drop()
            return False
        if full:
            return self._overflow()
        self.mux._from_foreign(self._apply_foreign_send, (data, below))
        return below

    def _apply_foreign_send(self, data: bytes, was_below: bool) -> None:
        with self.mux._lock:
            self._foreign_bytes -= len(data)
            self._foreign_entries -= 1
        if self._ended or self._broken or self._shut:
            self.mux._count_drop()
            return
        self._accept_message(data)
        if not was_below and not self._above:
            self._drain_owed = True
        self._mark()

    # CPython runs signal handlers behind each call, and they may raise. So that no byte is sent twice then, what a send
    # has returned is put into a list by the same call, and stays there until it is consumed.

    def _flush(self) -> None:
        if self._flushing:
            return  # a signal handler sends amid a flush, which goes on with that
        self._flushing = True
        try:
            self._flush_each()
        finally:
            self._flushing = False

    def _flush_each(self) -> None:
        while self._out or self._sent:
            try:
                if not self._sent:
                    self._offer()
            except OSError as error:
                self._send_failed(error)
                return
            if self._ended or not self._sent:
                return
            sent, offered = self._sent[0], self._offered
            self._wrote_ns = self.mux._now_ns
            self._consume()
            if sent < offered:
                self._wait_writable()
                break
        if self._above and self._out_bytes <= self._policy.limits.low:
            self._above = False
            self._received_ns = self.mux._now_ns  # until now we may not have listened
            self._drain_owed = True
            self._mark()

    def _offer(self) -> None:
        """Give the kernel what stands before the next file, or some of it, or of the file."""
        out, sock, n = self._out, self._sock, self.mux._n
        first = out[0] if out else None
        if sock is None or first is None:
            return  # a signal handler has closed it
        if isinstance(first, FilePart):
            self._send_file(first, sock)
            return
        if len(out) > 1 and self._out_bytes <= JOIN_BELOW and not self._file_bytes:
            parts = [b"".join(out.copy())]  # type: ignore[arg-type]
        else:
            parts = list(takewhile(lambda part: not isinstance(part, FilePart), islice(out.copy(), MAX_PARTS)))  # type: ignore[arg-type]
        if self._sent or not parts:
            return  # a signal handler has sent it
        if len(parts) == 1 or not hasattr(sock, "sendmsg"):
            n.send_calls += 1
            self._offered = len(parts[0])
            self._sent.extend(map(sock.send, (parts[0],), (SEND_FLAGS,)))
        else:
            n.sendmsg_calls += 1
            self._offered = sum(map(len, parts))
            self._sent.extend(map(sock.sendmsg, (parts,), ((),), (SEND_FLAGS,)))

    def _send_file(self, part: FilePart, sock: socket.socket) -> None:
        """As _offer. A short send of a file ends its turn, too."""
        self.mux._n.send_calls += 1
        self._offered = part.left
        part.send(sock, min(part.left, FILE_BURST), self._sent)
        if self._sent == [0]:
            self._abort(OSError(f"sendfile: the file ended {part.left} bytes before its promised end"))

    def _consume(self) -> None:
        """Drop from the front of the outbox what the kernel has taken. Each step is whole without a call."""
        out, sent, n = self._out, self._sent, self.mux._n
        while sent:
            size, first = sent[0], out[0] if out else b""
            length = len(first)
            part = first if isinstance(first, FilePart) else None
            rest = memoryview(first)[size:] if part is None and size < length else None  # type: ignore[arg-type]
            taken = min(size, length)
            if not sent or not out or out[0] is not first:
                continue  # a signal handler has closed it
            if part is not None:
                part.offset += taken
                part.left -= taken
                self._file_bytes -= taken
            if rest is not None:
                out[0] = rest
            elif size >= length:
                del out[0]
                self._files -= part is not None
            self._out_bytes -= taken
            n.bytes_out += taken
            if size > taken:
                sent[0] = size - taken
            else:
                del sent[0]

    def _wait_writable(self) -> None:
        self.mux._n.would_blocks += 1
        self._blocked = True
        self._mark()

    def _send_failed(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            self._wrote_ns = self.mux._now_ns
            self._wait_writable()
        elif error.errno in TRY_LATER:
            self._starved = True
            self.mux._add_timer(time.monotonic_ns() + STARVED_NS, self._retry_send, ())
        elif not self._ended:
            self._discard_outbox()
            if error.errno not in PEER_GONE or self._closing:
                self._end(error)
            else:
                self._broken = True
                self._keep_error(error)
                self._reset_on_close()
                self._mark()

    def _retry_send(self) -> None:
        self._starved = False
        self._mark()

    def _discard_outbox(self) -> None:
        self.mux._n.unsent += bool(self._out)
        self._out.clear()
        self._sent.clear()
        self._out_bytes = self._file_bytes = self._files = 0
        self._above = self._drain_owed = self._blocked = self._starved = False

    # -- input

    def _read_turn(self, reported: int) -> None:
        mux, sock = self.mux, self._sock
        n, budget = mux._n, 0 if self._policy.pull else mux._read_budget
        while sock is not None and not self._waits_for_settle():
            n.recv_calls += 1
            mux._reading = self
            try:
                mux._read.extend(map(sock.recv, (mux._read_size,), (DONTWAIT,)))  # as in _flush
            except OSError as error:
                self._read_failed(error)
                return
            size = len(mux._read[0])
            if not size:
                self._read_eof()
                return
            n.bytes_in += size
            self._heard_ns = mux._now_ns
            self._receive()
            budget -= size
            more = budget > 0 and (size == mux._read_size or reported & (ERROR | HANGUP))
            if more:
                self._send_out()  # which may pause or end it
            if not self._receives() or mux._unwinding:
                self._mark()
                return
            if not more or mux._tick():
                return

    def _waits_for_settle(self) -> bool:
        """Whether a turn that lasted too long has left messages, or on_open, which go first."""
        return self._pending and (not self._said & OPENED or (self._reader is not None and not self._policy.pull))

    def _make_custom(self) -> None:
        """What an accepted connection needs if its framer is a user's own. An interrupt leaves it to _settle()."""
        framer = self._policy.framer
        try:
            custom = CustomReader(framer)
        except Exception as error:
            self.mux._check_fork()
            self._user_failed("framer", error)
            return
        self.mux._check_fork()
        if self._policy.framer is framer and self._custom is None and not self._ended:
            self._custom = custom

    def _new_reader(self) -> Reader | CustomReader:
        return self._custom or Reader(self._policy.framer)

    def _resume_read(self) -> None:
        """Go on with a read that an interrupt has ended before what it brought was anywhere."""
        if self.mux._read[0]:
            self._receive()
        else:
            self._read_eof()
        self._mark()

    def _receive(self) -> None:
        """Deliver what was read, or keep it. It is the Mux's until then: an interrupt leaves it there."""
        mux, policy = self.mux, self._policy
        if self._closing or self._ended:
            mux._read.clear()
        elif policy.framer is None and self._reader is None and not policy.pull and self._delivers():
            self._cork(self._deliver_chunk)
        else:
            self._feed()
            if policy.pull:
                self._report_complete()
            else:
                self._cork(self._deliver)

    def _feed(self) -> None:
        read = self.mux._read
        if self._reader is None:
            self._reader = self._new_reader()
        reader = self._reader
        while isinstance(reader, Found):
            if reader.behind is None:
                reader.behind = self._new_reader()
            reader = reader.behind
        reader.feed(read[0])
        del read[0]

    def _deliver_chunk(self) -> None:
        """Without a framer, what a read has brought is one message."""
        mux, policy = self.mux, self._policy
        mux._n.messages_in += 1
        mux._told = True
        self._received_ns = mux._now_ns
        [data] = mux._read
        try:
            if policy.on_messages is not None:
                messages = [data]
                del mux._read[0]
                policy.on_messages(self, messages)
            else:
                del mux._read[0]
                if policy.on_message is not None:
                    policy.on_message(self, data)
        except Exception as error:
            self._handler_raised(error)
        mux._check_fork()

    def _deliver(self) -> None:
        """Hand complete messages to the handler while it may have them; it may change everything on the way."""
        mux, policy = self.mux, self._policy
        while not (self._ended or mux._unwinding):
            if policy.on_messages is not None:
                if not self._deliver_list(policy.on_messages):
                    return
            else:
                if (message := self._take()) is NOTHING:
                    return
                mux._told = True
                try:
                    if policy.on_message is not None:
                        policy.on_message(self, message)
                except Exception as error:
                    self._handler_raised(error)
                del message  # its finalizer runs here
                mux._check_fork()
            if mux._tick():
                self._mark()
                return

    def _deliver_list(self, on_messages: Callable[..., object]) -> bool:
        """Hand out all complete messages in one list, if there are any."""
        messages, taken_from = self._take_all()
        if not messages:
            return False
        if not self._delivers() or self.mux._unwinding:  # what has found them has closed or paused the connection
            self._give_back(messages, *taken_from)
            return False
        self.mux._told = True
        try:
            on_messages(self, messages)
        except Exception as error:
            self._handler_raised(error)
        self.mux._check_fork()
        return True

    def _has_message(self, judges: bool) -> bool:
        """Whether there is a complete message that may be delivered. What is wrong with the input closes the connection
        if that is to be judged, else it is found again later: the user may be about to change the framer."""
        while (reader := self._reader) is not None and self._delivers():
            try:
                found = reader.peek(self.eof) is not NOTHING
            except Exception as error:
                self.mux._check_fork()
                if judges:
                    self._input_failed(error)
                else:
                    self._mark()
                return False
            self.mux._check_fork()
            if self._closing or (self._ended and not self._policy.pull) or self.mux._unwinding:
                return False
            if self._reader is reader:
                if found:
                    return self._delivers()
                if not isinstance(reader, Found):
                    self._drop_empty_reader()
                    return False
                self._reader = reader.behind
            elif found and isinstance(reader, CustomReader) and not reader.has_moved():
                # It has set the framer while it found this message, which the next framer must not lose.
                self._put_in_front([reader.take()], reader)
        return False

    def _take(self) -> Any:
        """The next message, or NOTHING. Behind take() there is no call, and so no interrupt."""
        mux = self.mux
        while self._has_message(judges=not self._policy.pull):
            if self._policy.pull:
                self._mark()  # there may be room to read again, an EOF to tell, or something wrong
            reader = self._reader
            message = NOTHING if reader is None else reader.take()
            if message is not NOTHING:
                mux._n.messages_in += 1
                self._received_ns = mux._now_ns
                return message
        return NOTHING

    def _take_all(self) -> tuple[list[Any], tuple[Any, int]]:
        """All complete messages, and what _give_back needs. What is wrong behind them is found again when somebody asks
        for more."""
        messages: list[Any] = []
        first = self._reader
        taken_from = first, 0 if first is None else first.start
        try:
            self._collect(messages)
            if self._policy.pull:
                self._mark()
        except BaseException:
            self._give_back(messages, *taken_from)
            raise
        return messages, taken_from

    def _collect(self, messages: list[Any]) -> None:
        mux = self.mux
        while self._has_message(judges=not (messages or self._policy.pull)):
            reader = self._reader
            message = NOTHING if reader is None else reader.take()
            if message is not NOTHING:
                messages.append(message)
                mux._n.messages_in += 1
                self._received_ns = mux._now_ns
            if not self._policy.pull and mux._tick():
                return

    def _give_back(self, messages: list[Any], reader: Any, start: int) -> None:
        """An interrupt, or what has run meanwhile, keeps these from the one for whom `reader` has found them."""
        if not messages or self._closing or self._ended:
            return
        self.mux._n.messages_in -= len(messages)
        self._mark()
        if self._reader is None or self._reader is reader:
            reader.put_back(messages, start)
            self._reader = reader
        else:
            self._put_in_front(messages, reader)

    def _put_in_front(self, messages: list[Any], reader: Any) -> None:
        """Messages that were taken, or found by a reader that is not the connection's any more."""
        self._reader = Found(messages, reader.encode, self._reader)

    def _input_failed(self, error: Exception) -> None:
        if not issubclass(type(error), FrameError):  # isinstance() would ask for its __class__
            self._user_failed("framer", error)
            return
        self._keep_error(error)
        self._close()
        about(error, self)  # the last step: a class of the user's may do anything

    def _drop_empty_reader(self) -> None:
        """An idle connection has no buffer."""
        if isinstance(self._reader, Reader) and not self._reader.size:
            self._reader = None

    def _report_complete(self) -> None:
        """Pull style: there is a message to be taken."""
        if self._policy.pull and self._has_message(judges=False):
            self._report_flag(READABLE)

    def _read_failed(self, error: OSError) -> None:
        if not isinstance(error, BlockingIOError):
            self._end(error)
        elif self._broken:
            self._end(None)
        elif self._sock is not None:
            discard_error_queue(self._sock)  # perhaps that is why it seemed readable: select cannot tell

    def _read_eof(self) -> None:
        self.mux._read.clear()
        if self._broken:
            self._end(None)
            return
        self.eof = True
        if self._reader is not None:
            self._report_complete()  # what is left may be a message now
        self._mark()

    # -- telling the user

    def _cork(self, step: Callable[..., object], *args: Any) -> None:
        """Take a step that calls the handler; what that sends to this connection goes out together afterwards."""
        mux = self.mux
        mux._corked = self
        try:
            step(*args)
        except BaseException:
            self._mark()
            raise
        finally:
            mux._corked = None
        if mux._answering is not self and not self._pending:
            self._send_out()

    def _send_out(self) -> None:
        if self._can_flush():
            self._flush()

    def _invoke(self, fn: Callable[..., object], flag: int, *args: Any) -> None:
        self.mux._told = True
        try:
            self._said |= flag
            self._drain_owed = self._drain_owed and flag != DRAINED
            fn(self, *args)
        except Exception as error:
            self._handler_raised(error)
        self.mux._check_fork()

    def _handler_raised(self, error: Exception) -> None:
        if self.mux._forks != _forks:
            raise error
        self._user_failed("handler", error)

    def _user_failed(self, who: str, error: BaseException) -> None:
        """A handler or a user's framer raised: it loses its connection."""
        self.mux._n.handler_errors += 1
        if not self._said & CLOSED:
            if self.error is None:
                self.error = error
            self._close()
        try:
            log.error("%s of %r raised", who, self, exc_info=error)  # the last step: a log handler may do anything
        finally:
            without_frames(error)

    def _report_flag(self, flag: int) -> None:
        mux = self.mux
        mux._reports[self] = mux._reports.get(self, 0) | flag
        mux._report_changes += 1

    # It is noted in the line before it is said, without a call in between: an interrupt loses and doubles nothing.
    def _tell(self, fn: Callable[..., object] | None, flag: int, *args: Any) -> None:
        if self._policy.pull:
            self._report_flag(flag)
        elif fn is not None:
            self._cork(self._invoke, fn, flag, *args)
            return
        self._said |= flag
        self._drain_owed = self._drain_owed and flag != DRAINED

    # -- the steps of its life

    def _on_ready(self, reported: int) -> None:
        if reported & WRITE and self._blocked:
            self._blocked = False
            self._flush()
            if not self._blocked:
                self._mark()
        sock = self._sock
        if sock is None:
            return
        if reported & INVALID:
            self.mux._evict(self)
        elif reported & ~WRITE:
            if self._receives():
                self._read_turn(reported)
            elif reported & ERROR:
                self._take_error(sock)
            elif reported & HANGUP and not self._blocked and self._sock is sock:
                self.mux._poller.unwatch(sock.fileno())  # poll would report it for ever
                self._interest = UNWATCHED

    def _take_error(self, sock: socket.socket) -> None:
        """It is paused: no read would report recv's error."""
        try:
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError:
            return  # a signal handler has closed it
        if number:
            self._end(OSError(number, os.strerror(number)))
        else:
            discard_error_queue(sock)

    def _settle(self) -> None:
        self._pending = False
        policy = self._policy
        if self._connecting:
            self._settle_connecting()
            return
        if not self._said & OPENED:
            if type(policy.framer) not in SCANS and self._custom is None and not self._closing:
                self._make_custom()
            self._tell(policy.on_open, OPENED)
        self._send_out()
        if self._drain_owed and not (self._closing or self._ended):
            self._tell(policy.on_drain, DRAINED)
            self._report_complete()
        if self._reader is not None and not policy.pull and self._delivers():
            self._cork(self._deliver)
        if self._broken and not self._ended:
            self._read_what_is_left()
        if not self._ended:
            complete = self._has_message(judges=True)
            if self.eof and not (self._said & EOF or complete) and self._delivers() and self not in self.mux._offloaded:
                self._tell_eof()
        if not self._ended:
            self._advance_close()
        if self._ended:
            self._finish()
        else:
            self._apply_interest()

    def _settle_connecting(self) -> None:
        with self.mux._lock:  # as in _advance_close
            owed = bool(self._out or self._foreign_entries)
        if self._closing and not owed:
            self._set_ended(None)
        if self._ended:
            self._finish()

    def _tell_eof(self) -> None:
        policy = self._policy
        if not policy.pull and policy.on_eof is None and not policy.half_open:
            self._close()
        self._tell(policy.on_eof, EOF)

    def _read_what_is_left(self) -> None:
        if not self._receives():
            self._set_ended(None)
            return
        self._read_turn(HANGUP)
        if not self._ended:
            self._mark()

    def _apply_interest(self) -> None:
        wanted = (READ if self._receives() else 0) | (WRITE if self._blocked else 0)
        sock = self._sock
        if sock is None or wanted == self._interest or (wanted == 0 and self._interest == UNWATCHED):
            return
        try:
            self.mux._poller.watch(sock.fileno(), wanted)
        except (OSError, ValueError) as error:
            self._end(error)
        else:
            self._interest = wanted

    def _close(self) -> None:
        if not (self._closing or self._ended):
            self._mark()
            self._closing = True
            self._paused = self._drain_owed = False
            self._reader = None

    def _advance_close(self) -> None:
        if not (self._closing or self._write_eof):
            return
        mux, policy = self.mux, self._policy
        # Another thread that has looked at the flags and not counted its bytes yet holds the lock, too. So what it was
        # told is accepted is waited for, and from then on everything is refused.
        with mux._lock:
            owed = bool(self._out or self._foreign_entries)
        if owed:
            if self._closing and self._deadline is None:
                self._wrote_ns = mux._now_ns
                due = mux._now_ns + policy.closing_stall_ns
                self._deadline = mux._add_timer(due, self._closing_due, (0,))
            return
        if self.eof and (self._closing or self._said & EOF):
            self._set_ended(None)
            return
        if not self._shut:
            self._drop_deadline()
            self._shut = True
            try:
                self._borrowed("shutdown").shutdown(socket.SHUT_WR)
            except OSError:
                self._broken = True
                self._mark()
        if self._closing and self._deadline is None:
            if policy.linger_ns == 0 or type(self.error) is IdleTimeout:
                self._set_ended(None)
                return
            due = mux._now_ns + policy.linger_ns
            self._deadline = mux._add_timer(due, self._closing_due, (self._unsent(),))

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _unsent(self) -> int:
        """Bytes that the peer's kernel has not acknowledged, where the system tells."""
        try:
            return int.from_bytes(fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError, NameError):  # the second: a signal handler has closed it
            return 0

    def _closing_due(self, unsent: int) -> None:
        mux, policy = self.mux, self._policy
        self._deadline = None
        if self._ended:
            return
        if self._out or self._foreign_entries:
            due = self._wrote_ns + policy.closing_stall_ns
            if due > mux._now_ns:
                self._deadline = mux._add_timer(due, self._closing_due, (0,))
            else:
                self._write_timeout(policy.closing_stall_ns)
        elif 0 < (left := self._unsent()) < unsent:
            due = mux._now_ns + policy.linger_ns
            self._deadline = mux._add_timer(due, self._closing_due, (left,))
        else:
            self._end(None)

    def _write_timeout(self, limit_ns: int) -> None:
        limit = limit_ns / 1e9
        self.mux._n.timeouts += 1
        self._abort(
            WriteTimeout(f"the peer took nothing of {self._out_bytes} bytes for {limit:g} s", conn=self, limit=limit)
        )

    def _idle_timeout(self) -> None:
        limit = self._policy.idle_ns / 1e9
        self.mux._n.timeouts += 1
        self._keep_error(IdleTimeout(f"no message received for {limit:g} s", conn=self, limit=limit))
        self._close()

    def _silence_timeout(self) -> None:
        limit = self._policy.silence_ns / 1e9
        error = IdleTimeout(f"no byte in either direction for {limit:g} s", conn=self, limit=limit)
        self.mux._n.timeouts += 1
        if self._out:  # the peer takes nothing
            self._abort(error)
        else:
            self._keep_error(error)
            self._close()

    def _abort(self, error: BaseException | None = None) -> None:
        if self.closed:
            return
        self._mark()
        self._keep_error(error)
        self._closing = self._ended = True
        self._reader = None
        self._reset_on_close()
        self._drop_socket()

    def _reset_on_close(self) -> None:
        if self._sock is not None:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            except OSError:
                pass  # a socket that has no such option is closed all the same

    def _finish(self) -> None:
        self._drop_deadline()
        if not self.closed:
            self._drop_socket()
        if not self._said & CLOSED:
            self._tell(self._policy.on_close, CLOSED, self.error)
        if self._closing or not self._policy.pull:  # else it may have messages yet
            self._reader = self._custom = None

    def _drop_socket(self, close: bool = True) -> None:
        mux, policy, sock = self.mux, self._policy, self._sock
        if self.closed:
            return
        self.closed = True  # and it is counted no more, before anything is called
        mux._n.connections -= 1
        mux._pull_count -= policy.pull
        if policy.listener is not None:
            policy.listener.connections -= 1
        if self._connecting:
            self._drop_deadline()
            mux._connecting.discard(self)
        if sock is not None:
            self._sock = None
            mux._forget(sock.fileno())
            if close:
                close_socket(sock)
        self._discard_outbox()
        mux._wake_resting()


def discard_error_queue(sock: socket.socket) -> None:
    """Forget time stamps and the like, which poll reports as an error until they are read."""
    try:
        while hasattr(socket, "MSG_ERRQUEUE"):
            sock.recvmsg(256, 0, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
    except OSError:
        pass  # it is empty


def ensure_nonblocking(sock: socket.socket | None) -> None:
    """For accept, which takes no MSG_DONTWAIT: O_NONBLOCK belongs to the open file description, which other descriptors
    share, and Python's socket.dup() makes a listening one blocking."""
    if sock is not None and os.name == "posix":
        try:
            os.set_blocking(sock.fileno(), False)
        except OSError:
            pass  # accept tells what is wrong


def discard_socket(sock: socket.socket, file: SocketFile | None) -> None:
    try:
        if file is not None:
            file.remove()
    finally:
        close_socket(sock)


# --- listeners -------------------------------------------------------------------------------------


class Listener:
    """A listening socket; see the compiled core's Listener."""

    __slots__ = (
        "__weakref__", "_coming", "_file", "_listening", "_max_accepted", "_policy", "_rest_ns", "_resting",
        "_rests_until_ns", "_sock", "address", "connections", "mux",
    )

    def __init__(
        self,
        mux: FallbackMux,
        sock: socket.socket,
        file: SocketFile | None,
        policy: Policy,
        max_connections: int | None,
    ) -> None:
        self._sock: socket.socket | None = None  # until it is taken over
        self.mux = mux
        self.address: Any = _address.shown(SocketType.getsockname(sock))
        self.connections = 0
        self._file = file
        self._policy = policy
        self._max_accepted = max_connections
        self._rest_ns = self._rests_until_ns = 0
        self._coming: list[tuple[int, Any]] = []  # descriptors that were accepted and belong to no connection yet
        self._listening = self._resting = False

    def __repr__(self) -> str:
        return f"<muxcore.Listener {'closed' if self.closed else 'open'}, address={self.address!r}>"

    @property
    def closed(self) -> bool:
        return self._sock is None

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else -1

    def dup(self) -> socket.socket:
        self.mux._check_thread()
        if self._sock is None:
            raise ConnectionClosed(f"dup: {self!r} is closed")
        fd = os.dup(self._sock.fileno())
        try:
            sock: socket.socket = adopted(fd)
        except BaseException:
            os.close(fd)
            raise
        sock.setblocking(False)
        return sock

    def close(self) -> None:
        self.mux._check_thread()
        sock = self._sock
        if sock is None:
            return
        self._stop_listening()
        if self._resting:
            self.mux._resting.remove(self)
            self._resting = False
        self.mux._pull_count -= self._policy.pull
        self._sock = None
        discard_socket(sock, self._file)

    def _start_listening(self) -> None:
        self.mux._register(self, self.fileno(), READ)
        self._listening = True

    def _stop_listening(self) -> None:
        if self._listening:
            self.mux._forget(self.fileno())
            self._listening = False

    def _on_ready(self, reported: int) -> None:
        if reported & INVALID:
            self.mux._evict(self)
            return
        ensure_nonblocking(self._sock)
        for _ in range(ACCEPT_BUDGET):
            if not self._listening or self.mux._unwinding:
                return
            if self._full():
                self._rest(0)
                return
            ours = self._sock
            if ours is None:
                return
            try:
                if not self._coming:
                    # In one call: one of socket.accept in Python would lose the descriptor to an interrupt.
                    self._coming.extend(map(SocketType._accept, (ours,)))  # type: ignore[attr-defined]
            except BlockingIOError:
                self._rest_ns = 0
                return
            except OSError as error:
                if error.errno in CLIENT_GONE:
                    continue
                if self._sock is ours:  # else a signal handler has closed it
                    self._accept_failed(error)
                return
            self._take_coming()
            if self.mux._look_at_clock():  # each on_open may have taken long
                return

    def _take_coming(self) -> None:
        """Serve what was accepted: one, unless an interrupt came before."""
        while self._coming:
            fd, peer = self._coming[0]
            sock = adopted(fd, OwnSocket)
            del self._coming[0]
            SocketType.setblocking(sock, False)
            self.mux._accepted(self, sock, _address.shown(peer))

    def _full(self) -> bool:
        return self._max_accepted is not None and self.connections >= self._max_accepted

    def _accept_failed(self, error: OSError) -> None:
        is_first = self._rest_ns == 0
        self._rest_ns = FIRST_REST_NS if is_first else min(2 * self._rest_ns, LONGEST_REST_NS)
        self._rest(self._rest_ns)
        if is_first:
            log.error("%r: accept failed, resting: %s", self, error.strerror)
            if error.errno not in NO_RESOURCES:
                log.error("%r: this error is not expected of accept; it will be tried again", self)

    def _rest(self, ns: int) -> None:
        self.mux._n.accept_pauses += 1
        self._stop_listening()
        self.mux._resting.append(self)
        self._resting = True
        self._rests_until_ns = until_ns = self.mux._now_ns + ns if ns else 0
        if ns:
            self.mux._add_timer(until_ns, self._rest_over, (until_ns,))

    def _rest_over(self, until_ns: int) -> None:
        """Only the timer of the last rest wakes it: see the compiled core's."""
        if self._rests_until_ns == until_ns:
            self._rested()

    def _rested(self) -> None:
        if not self._resting:
            return
        self.mux._resting.remove(self)
        self._resting = False
        try:
            self._start_listening()
        except OSError as error:
            self._accept_failed(error)
        except ValueError as error:  # select on Windows: others took its place meanwhile
            self._accept_failed(OSError(errno.EMFILE, str(error)))


# --- datagram sockets ------------------------------------------------------------------------------


def is_plain(address: Any) -> bool:
    """Whether it is as as_address() makes them: a key that runs no code of the user's."""
    if type(address) is not tuple:
        return type(address) is str
    return all(type(item) is int or type(item) is str for item in address)


@final
class Datagram(SocketOptions):
    """A datagram socket; see the compiled core's Datagram. One system call per datagram."""

    __slots__ = (
        "__weakref__", "_above", "_blocked", "_drain_owed", "_errors", "_family", "_file", "_flushing", "_interest",
        "_largest_sent", "_max_size", "_on_datagrams", "_on_drain", "_on_error", "_out", "_out_bytes", "_pending",
        "_refused", "_remotes", "_retry_ns", "_sent", "_sock", "_starved", "_targets", "_warned",
        "address", "data", "limits", "mux", "remote",
    )

    def __new__(cls, *args: Any) -> Datagram:
        if not args:
            raise TypeError("datagram sockets are made by Mux.datagram")
        return super().__new__(cls)

    def __init__(
        self,
        mux: FallbackMux,
        sock: socket.socket,
        file: SocketFile | None,
        remotes: tuple[Any, ...],
        callbacks: DatagramCallbacks,
        limits: Limits,
        max_size: int,
    ) -> None:
        self._sock: socket.socket | None = None  # until it is taken over
        self.mux = mux
        self.data: Any = None
        self.address: Any = _address.shown(SocketType.getsockname(sock))
        self.remote = remotes[0] if remotes else None
        self._remotes = remotes
        self.limits = limits
        self._file = file
        self._on_datagrams, self._on_error, self._on_drain = callbacks
        self._max_size = max_size
        self._family = _address.family_of(sock)
        self._largest_sent = _address.LARGEST_DATAGRAM.get(self._family)
        self._out: deque[tuple[bytes, Any]] = deque()
        self._sent: list[int] = []  # as a Connection's: of the first of these
        self._errors: list[Exception] = []
        self._targets: dict[Any, Any] = {}  # by address: what sendto takes
        self._out_bytes = 0
        self._refused: int | None = 0  # the errno of the last send, if that is to be tried once more
        self._retry_ns = 0
        self._interest = READ
        self._pending = self._above = self._drain_owed = self._blocked = self._starved = self._warned = False
        self._flushing = False

    def __init_subclass__(cls) -> None:
        raise TypeError("Datagram is not subclassed: put your state on .data")

    def __reduce__(self) -> Any:
        raise TypeError("a Datagram can be neither copied nor pickled")

    def __repr__(self) -> str:
        return f"<muxcore.Datagram {'closed' if self.closed else 'open'}, address={self.address!r}>"

    @property
    def closed(self) -> bool:
        return self._sock is None

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else -1

    def send(self, data: Any, address: Any = None) -> bool:
        self.mux._check_thread()
        data = as_bytes(data)
        if self._largest_sent is not None and len(data) > self._largest_sent:
            raise ValueError(
                f"data must be at most {self._largest_sent} bytes, which fit into a datagram, not {len(data)}"
            )
        target = self._target(address)
        packets, cost = ((data, target),), len(data) + PACKET_COST
        if not self.mux._in_turn:
            self._mark()  # should an interrupt come below
        if self._sock is None or target == _address.NOWHERE:
            self.mux._count_drop()
            return False
        if self._out_bytes >= self.limits.max_outbox:
            return self._overflow()
        self._out_bytes += cost  # up to here from the look at the socket there is no call, which might close it
        self._out += packets
        self.mux._n.messages_out += 1
        if self._out_bytes > self.limits.high or (self.mux._direct and not self.mux._in_turn):
            return self._send_at_once()
        self._mark()
        return not self._above

    def close(self) -> None:
        self.mux._check_thread()
        self._close()

    def _mark(self) -> None:
        if not self._pending:
            self.mux._pending.append(self)  # twice, if an interrupt comes here, is no harm; never would be
            self._pending = True
            self.mux._wake_driver()

    def _report_error(self, error: Exception) -> None:
        self.mux._n.datagram_errors += 1
        if len(self._errors) < ERRORS_KEPT:
            self._errors.append(error)
        self._mark()

    def _tell_error(self, error: Exception) -> None:
        if self._on_error is not None:
            self._tell(self._on_error, error)
        elif not self._warned:
            self._warned = True
            log.warning("%r has no on_error for this, nor for what may follow: %s", self, error)

    def _tell(self, fn: Callable[..., object], *args: Any) -> None:
        self.mux._told = True
        self.mux._call_plain(fn, (self, *args))

    def _target(self, address: Any) -> Any:
        """Where to send to, as sendto takes it; None on a connected socket."""
        plain = is_plain(address)
        if self._remotes:
            if address is not None and not (plain and address in self._remotes):
                _address.check_is_remote(self._family, address, self._remotes)
            return None
        if plain and address in self._targets:
            return self._targets[address]
        target = _address.destination(self._family, address)
        if plain and target != _address.NOWHERE and "%" not in address[0]:  # the number of a zone may change
            if len(self._targets) >= ADDRESSES_KEPT:
                self._targets.clear()
            self._targets[address] = target
        return target

    # -- receiving

    def _on_ready(self, reported: int) -> None:
        if reported & INVALID:
            self.mux._evict(self)
            return
        if reported & WRITE and self._blocked:
            self._blocked = False
            self._mark()
        enough = self.mux._n.bytes_in + self.mux._read_budget
        for _ in range(RECEIVE_ROUNDS if reported & ~WRITE else 0):
            is_last = self._hand_out_batch()
            if is_last or self._sock is None or self.mux._unwinding or self.mux._n.bytes_in >= enough:
                return

    def _hand_out_batch(self) -> bool:
        """Hand what has come to the handler, or count it, should an interrupt come; whether that is all."""
        n = self.mux._n
        taken: list[tuple[bytes, Any]] = []
        messages: list[tuple[bytes, Any]] = []
        cut: list[Any] = []
        handed_out = False
        try:
            is_last = self._receive(taken)
            self._sort(taken, messages, cut)
            if messages and self._sock is not None:
                n.messages_in += len(messages)
                handed_out = True
                self._tell(self._on_datagrams, messages)
            return is_last
        finally:
            if not handed_out:  # or a finaliser has closed it: no callback comes after that
                self.mux._count_drop(len(taken) - len(cut))

    def _sort(self, taken: list[tuple[bytes, Any]], messages: list[tuple[bytes, Any]], cut: list[Any]) -> None:
        """Those that are whole, and the senders of those that were cut."""
        for data, address in taken:
            sender = _address.shown(address)
            if len(data) > self._max_size:
                self._cut(sender)
                cut.append(sender)
            else:
                self.mux._n.bytes_in += len(data)
                messages.append((data, sender))

    def _receive(self, taken: list[tuple[bytes, Any]]) -> bool:
        sock = self._sock
        while sock is not None and len(taken) < BATCH:
            self.mux._n.recv_calls += 1
            try:
                # In C from end to end: an interrupt between the two would lose what was received. The one byte more
                # tells that it was cut.
                taken.extend(map(sock.recvfrom, (self._max_size + 1,), (DONTWAIT,)))
            except BlockingIOError:
                discard_error_queue(sock)
                return True
            except OSError as error:
                if error.errno != TOO_LARGE:
                    self._report_error(without_frames(error))
                    return True
                taken.append((bytes(self._max_size + 1), None))
            sock = self._sock
        return sock is None

    def _cut(self, sender: Any) -> None:
        self._report_error(datagram_too_large(sender, self._max_size))
        self.mux._count_drop()

    # -- sending

    def _send_at_once(self) -> bool:
        if self._can_flush():
            self._flush()
        if self._out_bytes > self.limits.high and not self._above:
            self._above = True
            self._drain_owed = False
            self.mux._n.pauses += 1
        return not self._above

    def _overflow(self) -> bool:
        limit = self.limits.max_outbox
        if self.limits.overflow != "drop":
            text = f"{self._out_bytes} bytes are queued, max_outbox is {limit}"
            if self.limits.overflow == "raise":
                raise OutboxFull(text, conn=self, limit=limit)  # without a name, as in Connection._overflow
            error = OutboxFull(text, conn=self, limit=limit)
            try:
                self._close()
            finally:
                self._report_error(error)
        self.mux._count_drop()
        return False

    def _can_flush(self) -> bool:
        return bool(self._out) and not (self._blocked or self._starved)

    # As in Connection._flush: what a send has returned stays in a list until its datagram has left the queue. So a
    # signal handler that sends, closes or raises at any moment here loses and doubles none.

    def _flush(self) -> None:
        if self._flushing:
            self._mark()
            return
        self._flushing = True
        try:
            self._flush_each()
        finally:
            self._flushing = False

    def _flush_each(self) -> None:
        while self._can_flush():
            first = self._out[0] if self._out else None
            if first is None or self._sock is None:
                break
            try:
                self._offer(first)
            except OSError as error:
                self._send_refused(error, first)
            if self._sent:
                self._forget(first)
        if self._above and self._out_bytes <= self.limits.low:
            self._above = False
            self._drain_owed = True
            self._mark()

    def _offer(self, first: tuple[bytes, Any]) -> None:
        """Give the kernel the first of the queue, unless that is done, or a signal handler has closed it."""
        sock = self._sock
        data, target = first
        if sock is None or self._sent:
            return
        self.mux._n.send_calls += 1
        if target is None:
            self._sent.extend(map(sock.send, (data,), (SEND_FLAGS,)))
        else:
            self._sent.extend(map(sock.sendto, (data,), (SEND_FLAGS,), (target,)))

    def _forget(self, first: tuple[bytes, Any]) -> None:
        """Take the first off the queue, which was sent or is given up. The last lines are whole without a call."""
        cost = len(first[0]) + PACKET_COST
        if self._out and self._out[0] is first:
            self._refused = 0
            self._out_bytes -= cost
            del self._out[0]
            if self._sent:
                self.mux._n.bytes_out += self._sent[0]
                del self._sent[0]

    def _send_refused(self, error: OSError, first: tuple[bytes, Any]) -> None:
        would_block = isinstance(error, BlockingIOError)
        if would_block and (self.remote is not None or self._family in _address.INTERNET):
            self.mux._n.would_blocks += 1
            self._blocked = True
            self._mark()
        elif would_block or error.errno in TRY_LATER:
            self._starve()
        elif error.errno != self._refused:
            self._refused = error.errno
            self._report_error(without_frames(error))
        else:
            self.mux._count_drop()
            self._forget(first)

    def _starve(self) -> None:
        self._mark()  # if there is no memory for the timer, or an interrupt comes, the next turn tries again
        retry_ns = time.monotonic_ns() + STARVED_NS
        self.mux._timers.add(retry_ns, self._mark, ())
        self._starved, self._retry_ns = True, retry_ns

    # -- the steps of its life

    def _settle(self) -> None:
        self._pending = False
        if self._starved and time.monotonic_ns() >= self._retry_ns:
            self._starved = False
        if self._can_flush():
            self._flush()
        for _ in range(len(self._errors)):
            if self._errors:  # a callback may have closed it
                self._tell_error(self._errors.pop(0))
            if self.mux._look_at_clock():
                self._mark()
                break
        if self._drain_owed:
            self._drain_owed = False
            if self._on_drain is not None:
                self._tell(self._on_drain)
        self._apply_interest()

    def _apply_interest(self) -> None:
        wanted = READ | (WRITE if self._blocked else 0)
        if self._sock is None or wanted == self._interest:
            return
        try:
            self.mux._poller.watch(self._sock.fileno(), wanted)
        except OSError:
            if self._blocked:
                self._blocked = False
                self._starve()
        else:
            self._interest = wanted

    def _close(self) -> None:
        if self._sock is None:
            return
        try:
            if self._can_flush():
                self._flush()
        finally:
            self._end()

    def _end(self) -> None:
        """Whatever is raised, the descriptor is closed."""
        sock = self._sock
        if sock is None:
            return  # a finaliser has closed it meanwhile
        try:
            self._discard()
            self.mux._forget(sock.fileno())
        finally:
            self._sock = None
            discard_socket(sock, self._file)

    def _discard(self) -> None:
        """Its user hears no more of a socket that is gone."""
        nothing: deque[tuple[bytes, Any]] = deque()
        none: list[int] = []
        out, sent, self._out, self._sent = self._out, self._sent, nothing, none
        self._out_bytes = 0
        self._above = self._drain_owed = self._blocked = self._starved = False
        self.mux._n.unsent += len(out) > len(sent)
        self.mux._count_drop(len(out) - len(sent))
        self._errors.clear()


# --- the Mux ---------------------------------------------------------------------------------------

if TYPE_CHECKING:
    Owner = Connection | Listener | Datagram | Watch | socket.socket  # the last: what ends our own wait


class FallbackMux(Mux):
    """A Mux over one of POLLERS."""

    __slots__ = (
        *STATE, "__weakref__", "_answering", "_backend", "_batch", "_busy_poll_ns", "_closed", "_connecting", "_corked",
        "_direct", "_draining", "_finished", "_foreign", "_forks", "_group", "_in_turn", "_last_id", "_lock", "_n",
        "_now_ns", "_offloaded", "_owner_thread", "_owners", "_pending", "_poller", "_polling", "_pull_count", "_read",
        "_read_budget", "_read_size", "_reading", "_report_changes", "_reports", "_resting", "_serving", "_settled",
        "_sleeping",
        "_soon", "_stopping", "_sweep_ns", "_sweeping", "_thread", "_ticks", "_timers", "_told", "_turn_ends_ns",
        "_turn_over", "_unwinding", "_waker",
    )

    def _set_up(
        self, backend: str, max_events: int, read_size: int, read_budget: int, busy_poll_ns: int
    ) -> None:
        global socket, _address, DONTWAIT, SEND_FLAGS, OwnSocket, SocketType, adopted, close_socket, moved
        if hasattr(self, "_backend"):
            raise RuntimeError("a Mux is initialised once")
        import socket  # no sooner: see Mux.__init__

        from . import _address
        from ._address import DONTWAIT, NOSIGNAL
        from ._own import OwnSocket, SocketType, adopted, close_socket, moved

        SEND_FLAGS = NOSIGNAL | DONTWAIT

        self._backend = backend
        self._read_size, self._read_budget, self._busy_poll_ns = read_size, read_budget, busy_poll_ns
        self._owners: dict[int, Owner] = {}
        self._connecting: set[Connection] = set()
        self._pending: list[Connection | Datagram] = []
        self._reports: dict[Connection, int] = {}  # what poll() is to say ...
        self._report_changes = 0  # ... and how often that has changed
        self._finished: list[Connection] = []
        self._resting: list[Listener] = []
        self._offloaded: dict[Any, Any] = {}
        self._batch: deque[tuple[Owner, int]] = deque()
        self._soon: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._foreign: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        # What other threads look at or change together with the Mux's own. A finalizer may come in between and send.
        self._lock = RLock()
        self._timers = Timers(self._check_thread, self._wake_driver)
        self._n = Counters()
        self._now_ns = time.monotonic_ns()
        self._last_id = self._pull_count = self._sweep_ns = self._thread = 0
        self._turn_ends_ns = self._ticks = self._settled = 0
        self._forks = _forks
        self._read: list[bytes] = []  # what was read from _reading, and was not delivered nor put into its inbox yet
        self._reading: Connection | None = None
        self._owner_thread: Callable[[], object] = what_lives_as_long_as_this_thread()
        self._turn_over = self._sweeping = False
        self._corked: Connection | None = None
        self._answering: Connection | None = None
        self._group: deque[Connection] = deque()
        self._direct = self._draining = self._in_turn = self._polling = False
        self._serving = self._sleeping = False
        self._stopping = self._told = self._unwinding = False
        self._poller = POLLERS[self._backend]()
        self._waker, wakee = (moved(end, OwnSocket) for end in socket.socketpair())
        self._closed = False
        self._register(wakee, wakee.fileno(), READ)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):  # it was set up, and not closed
            try:
                if self._forks == _forks:
                    warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=1, source=self)
            finally:
                try:
                    self._signals.close()  # Python would write into a descriptor that has another owner
                finally:
                    self._close_descriptors()

    @property
    def backend(self) -> str:
        return self._backend

    @property
    def closed(self) -> bool:
        return getattr(self, "_closed", True)

    # -- who may call

    def _is_foreign(self) -> bool:
        return self._thread not in (0, get_ident())

    def _check_fork(self) -> None:
        if self._forks != _forks:
            raise RuntimeError("this Mux was made before fork(): a child has to make its own")

    def _check_thread(self) -> None:
        self._check_fork()
        if self._is_foreign():
            raise RuntimeError(
                "this Mux belongs to the thread that first ran it: use call_soon_threadsafe from another"
            )

    def _check(self) -> None:
        if not self._closed:
            self._check_thread()
        if self._closed or self._unwinding:
            raise RuntimeError("the Mux is closed")

    def _begin(self, method: str) -> None:
        self._check()
        if self._in_turn or self._polling:  # the latter: by a finalizer, while poll() makes its list
            raise RuntimeError(f"{method}() was called inside a callback of the same Mux")
        self._bind()
        self._direct = False
        self._now_ns = time.monotonic_ns()

    # -- which descriptor is whose

    def _register(self, owner: Owner, fd: int, wanted: int) -> None:
        if fd in self._owners:
            self._evict(self._owners[fd])
        self._owners[fd] = owner  # first: what is watched and nobody's would be reported for ever
        try:
            self._poller.watch(fd, wanted)
        except BaseException:
            if self._owners.get(fd) is owner:
                self._forget(fd)
            raise

    def _forget(self, fd: int) -> None:
        self._owners.pop(fd, None)
        self._poller.unwatch(fd)

    def _evict(self, owner: Owner) -> None:
        """Somebody closed this descriptor behind our back; its number may be a new socket's by now."""
        if isinstance(owner, Watch):
            fd = owner.fd
        elif isinstance(owner, socket.socket) or owner._sock is None:
            return
        else:
            fd, owner._sock = owner._sock.detach(), None
        self._forget(fd)
        error = OSError(f"descriptor {fd} was closed by somebody else")
        if isinstance(owner, Connection):
            owner._end(error)
            return
        if isinstance(owner, Listener):
            owner._listening = False
            self._pull_count -= owner._policy.pull
        elif isinstance(owner, Datagram):
            owner._discard()
        self._soon.append((log_eviction, (owner, error)))  # a log handler may do anything, which is too early now

    def _bind(self) -> None:
        with self._lock:  # what other threads do before there is a thread to leave it to is over then
            self._check_thread()  # another one may have been faster
            self._owner_thread = what_lives_as_long_as_this_thread()
            self._thread = get_ident()

    def _owner(self, fd: int) -> object:
        return self._owners.get(fd)

    def _watch(self, watch: Watch, wanted: int, calls: Calls) -> None:
        with self._lock:
            self._check()
            before = watch.calls
            watch.calls = {**before, **calls}  # meanwhile: nothing may be reported that calls nothing
            try:
                self._set_wanted(watch, wanted)
            except Exception:
                watch.calls = before
                raise
            watch.calls = calls

    def _set_wanted(self, watch: Watch, wanted: int) -> None:
        if wanted == 0:
            self._forget(watch.fd)
            return
        check_pollable(watch.fd)
        if self._owners.get(watch.fd) is watch:
            self._poller.watch(watch.fd, wanted)
        else:
            self._register(watch, watch.fd, wanted)

    def _on_watched(self, watch: Watch, reported: int) -> None:
        if reported & INVALID:
            self._evict(watch)
            return
        for direction, other in ((READ, WRITE), (WRITE, READ)):
            call = watch.calls.get(direction)
            if call is None or not reported & ~other or self._unwinding or self._owners.get(watch.fd) is not watch:
                continue
            self._call_plain(*call)

    # -- listeners and connections; with the lock, since other threads may do the like before the first turn: see _bind

    def _policy(self, *settings: Any) -> Policy:
        policy = Policy(*settings)
        with self._lock:
            self._need_sweep(policy)
        return policy

    # To the type checker the compiled classes are the types of both cores.

    def _add_listener(
        self,
        sock: socket.socket,
        file: SocketFile | None,
        policy: Policy,
        max_connections: int | None,
        exclusive: bool,
    ) -> Any:
        # `exclusive` has no counterpart here: the processes that share a socket are all woken, and all but one of them
        # find nothing to accept.
        with self._lock:
            self._check()  # here and below: the arguments may have run code of the user's
            listener = Listener(self, sock, file, policy, max_connections)
            self._take_over(listener, sock)
            listener._listening = True
            policy.listener = listener
            self._pull_count += policy.pull
        return listener

    def _add_connection(self, sock: socket.socket, peer: Any, policy: Policy) -> Any:
        custom = None if type(policy.framer) in SCANS else CustomReader(policy.framer)
        with self._lock:
            self._check()
            conn = Connection(self, None, peer, policy)
            conn._custom = custom
            self._take_over(conn, sock)
            conn._interest = READ
            self._count_connection(conn)
            conn._mark()
        return conn

    def _take_over(self, owner: Connection | Datagram | Listener, sock: socket.socket) -> None:
        """The socket is the owner's from now on, unless this raises."""
        fd = SocketType.fileno(sock)
        try:
            self._register(owner, fd, READ)
            owner._sock = moved(sock, OwnSocket)
        except BaseException:
            if self._owners.get(fd) is owner:
                self._forget(fd)
            raise
        if self._closed and owner._sock is not None:  # by a signal handler, for which it came too late
            close_socket(owner._sock)
            owner._sock = None
            self._forget(fd)
            raise RuntimeError("the Mux is closed")

    def _new_connection(self, address: Any, policy: Policy) -> Any:
        custom = None if type(policy.framer) in SCANS else CustomReader(policy.framer)
        with self._lock:
            conn = Connection(self, None, address, policy)
            conn._custom = custom
            conn._connecting = True
        return conn

    def _attempting(self, conn: Any, attempt: Any) -> None:
        with self._lock:
            self._check()  # and the first turn, in another thread, may have been faster
            self._connecting.add(conn)
            conn._deadline = attempt
            self._count_connection(conn)

    def _connected(self, conn: Any, sock: socket.socket, peer: Any) -> None:
        if conn._ended:  # by what has run since its attempt came to an end
            sock.close()
            return
        self._take_over(conn, sock)
        conn._interest = READ
        conn._deadline = None
        conn.peer = peer
        conn._connecting = False
        conn._received_ns = conn._heard_ns = self._now_ns
        self._connecting.discard(conn)
        conn._mark()

    def _connect_failed(self, conn: Any, error: BaseException) -> None:
        self._n.timeouts += isinstance(error, ConnectTimeout)
        conn._end(error)

    def _accepted(self, listener: Listener, sock: socket.socket, peer: Any) -> None:
        conn = Connection(self, sock, peer, listener._policy)
        failed = None
        try:
            self._register(conn, sock.fileno(), READ)
        except (OSError, ValueError) as error:  # select: a descriptor beyond its limit
            failed = without_frames(error)
        self._n.accepts += 1  # at once: no call, and so no interrupt, comes between
        listener.connections += 1
        self._n.connections += 1
        self._pull_count += conn._policy.pull
        self._look_at_newcomer(conn)
        if failed is not None:
            conn._end(failed)
            return
        conn._interest = READ
        if type(listener._policy.framer) not in SCANS:
            conn._mark()  # should it be interrupted
            conn._make_custom()
        conn._tell(listener._policy.on_open, OPENED)

    def _count_connection(self, conn: Connection) -> None:
        self._n.connections += 1
        self._pull_count += conn._policy.pull
        self._look_at_newcomer(conn)

    def _look_at_newcomer(self, conn: Connection) -> None:
        self._n.peak_connections = max(self._n.connections, self._n.peak_connections)
        if self._draining:
            conn._close()

    def _add_datagram(
        self,
        sock: socket.socket,
        file: SocketFile | None,
        remotes: tuple[Any, ...],
        callbacks: DatagramCallbacks,
        limits: Limits,
        max_size: int,
    ) -> Any:
        datagram = Datagram(self, sock, file, remotes, callbacks, limits, max_size)
        with self._lock:
            self._check()
            self._take_over(datagram, sock)
        return datagram

    def _datagrams(self) -> list[Any]:
        return [owner for owner in list(self._owners.values()) if isinstance(owner, Datagram)]

    def _connections(self) -> list[Any]:
        owners = [*self._owners.values(), *self._connecting]
        return [owner for owner in owners if isinstance(owner, Connection)]

    def _broadcast(self, connections: list[Any], message: Any) -> int:
        for conn in connections:
            if type(conn) is not Connection:
                raise TypeError(f"connections must be connections, not {type(conn).__name__}")
            if conn.mux is not self:
                raise ValueError(f"connections must be connections of this Mux, not {conn!r}")
        before, failed = self._n.messages_out, None
        framers = {conn._policy.framer for conn in connections if type(conn._policy.framer) in SCANS}
        encoded = {framer: encode(framer, message) for framer in framers}
        for conn in connections:
            try:
                framer = conn._policy.framer
                data = encoded.get(framer) if type(framer) in SCANS else None
                conn._enqueue(conn._encoded(message) if data is None else data)
            except Exception as error:
                failed = error if failed is None else failed
        try:
            if failed is not None:
                raise failed
        finally:
            failed = None  # its frames hold this one
        return self._n.messages_out - before

    def _listeners(self) -> list[Any]:
        owners = [*self._owners.values(), *self._resting]
        return [owner for owner in owners if isinstance(owner, Listener)]

    def _without_handler(self) -> int:
        return self._pull_count

    def _take_back(self, conn: Any) -> None:
        self._offloaded.pop(conn, None)
        conn._received_ns = self._now_ns
        conn._mark()

    def _hold(self, conn: Any, on: bool) -> None:
        if conn._on_hold == on:
            return
        conn._on_hold = on
        if not on:
            conn._received_ns = time.monotonic_ns()
        conn._mark()

    def _fail(self, conn: Any, error: Exception) -> None:
        conn._user_failed("handler", error)

    def _wake_resting(self) -> None:
        for listener in list(self._resting):
            if not listener._full():
                listener._rested()

    def _need_sweep(self, policy: Policy) -> None:
        shortest = min(filter(None, (policy.idle_ns, policy.write_ns, policy.silence_ns)), default=0)
        if shortest and (self._sweep_ns == 0 or shortest // 4 < self._sweep_ns):
            self._sweep_ns = max(min(shortest // 4, SWEEP_NS), 1_000_000)
        self._plan_sweep()

    def _plan_sweep(self) -> None:
        if self._sweep_ns and not self._sweeping:
            self._add_timer(time.monotonic_ns() + self._sweep_ns, self._sweep, ())
            self._sweeping = True

    def _sweep(self) -> None:
        self._sweeping = False
        self._plan_sweep()
        for conn in self._connections():
            self._end_if_slow(conn, conn._policy)

    def _end_if_slow(self, conn: Connection, policy: Policy) -> None:
        now = self._now_ns
        if conn.closing:
            return
        if policy.write_ns and conn._blocked and now - conn._wrote_ns >= policy.write_ns:
            conn._write_timeout(policy.write_ns)
        elif (
            policy.silence_ns and now - max(conn._heard_ns, conn._wrote_ns) >= policy.silence_ns
            and (conn._receives() or conn._out) and self._is_waiting(conn)
        ):
            conn._silence_timeout()
        elif (
            policy.idle_ns and conn._receives() and now - conn._received_ns >= policy.idle_ns
            and self._is_waiting(conn)
        ):
            conn._idle_timeout()

    def _is_waiting(self, conn: Connection) -> bool:
        """Whether the peer is slow, and not we; a framer that is asked may also have closed the connection."""
        return not conn._has_message(judges=False) and conn not in self._offloaded and not conn.closing

    # -- other threads

    def _from_foreign(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._foreign.append((fn, args))
        self._wake()

    def _count_drop(self, count: int = 1) -> None:
        with self._lock:
            self._n.drops += count

    def _call_foreign(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        if not self._closed:
            self._check_fork()
        if self._closed:
            raise RuntimeError("the Mux is closed")
        self._from_foreign(self._call_from_foreign, (fn, args))

    def _call_from_foreign(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        if not self._closed:
            self._call_plain(fn, args)

    def _wake(self) -> None:
        # The loop sets `sleeping` before it looks for work for the last time: it sees what was queued, or we the flag.
        with self._lock:
            wanted, self._sleeping = self._sleeping or self._direct, False
            if wanted:
                self._signal_waker()  # not after _release, when its descriptor may be somebody else's

    def _signal_waker(self) -> None:
        try:
            self._waker.send(b"\0")
        except OSError:
            pass  # full: it is readable already; closed: nobody waits

    def _wake_driver(self) -> None:
        # While it sleeps: a signal handler, behind which select(2) and its like go on with their wait (PEP 475).
        if self._sleeping or (self._direct and not self._in_turn):
            self._signal_waker()

    def _call_plain(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            fn(*args)
        except Exception as error:
            self._call_raised(fn, error)
        self._check_fork()

    def _call_raised(self, fn: Callable[..., object], error: Exception) -> None:
        if self._forks != _forks:
            raise error
        self._n.handler_errors += 1
        log.error("%r raised", fn, exc_info=error)

    def _add_timer(self, when_ns: int, fn: Callable[..., object], args: tuple[Any, ...]) -> Any:
        return self._timers.add(when_ns, fn, args)

    # -- the turn of the loop

    def _has_work(self) -> bool:
        return bool(
            self._pending
            or self._soon
            or self._foreign
            or (self._stopping and self._serving)
            or (self._polling and self._reports)
            or (self._draining and self._n.connections == 0)
        )

    def _wait(self, timeout_ns: int) -> None:
        self._n.waits += 1
        until = -1 if timeout_ns < 0 else self._now_ns + timeout_ns
        spin_end = time.monotonic_ns() + self._busy_poll_ns if self._busy_poll_ns else 0
        while not self._batch:
            with self._lock:
                self._sleeping = True
            timer = self._timers.next_ns()
            deadline = timer if timer >= 0 and (until < 0 or timer < until) else until
            left = -1 if deadline < 0 else max(deadline - time.monotonic_ns(), 0)
            if self._has_work() or self._unwinding:
                left = 0
            if spin_end and time.monotonic_ns() < spin_end:
                found = self._poller.wait(0)
            else:
                found = self._poller.wait(None if left < 0 else min(left / 1e9, LONGEST_WAIT))
            self._sleeping = False
            for fd, mask in found:
                if (owner := self._owners.get(fd)) is not None:
                    self._batch.append((owner, mask))
                else:
                    self._poller.unwatch(fd)  # an interrupt came amid _forget()
            if left == 0 or self._has_work() or self._unwinding:
                break
        self._now_ns = time.monotonic_ns()
        self._n.events += len(self._batch)

    def _dispatch(self) -> None:
        """See the compiled core's dispatch()."""
        while self._batch and not self._unwinding:
            try:
                self._dispatch_group()
            finally:
                self._send_group()
            if self._turn_over:
                return

    def _tick(self) -> bool:
        """See the compiled core's tick()."""
        self._ticks += 1
        return self._turn_over if self._ticks % 8 else self._look_at_clock()

    def _look_at_clock(self) -> bool:
        if time.monotonic_ns() > self._turn_ends_ns:
            self._turn_over = True
        return self._turn_over

    def _begin_part(self) -> None:
        self._now_ns = time.monotonic_ns()
        self._turn_ends_ns = self._now_ns + PART_NS
        self._turn_over = False

    def _send_group(self) -> None:
        """Whom an exception keeps from being sent to is still there in the next turn."""
        self._answering = None
        if self._forks != _forks:
            self._group.clear()
        while self._group:
            self._group[0]._send_out()
            self._group.popleft()

    def _dispatch_group(self) -> None:
        batch = self._batch
        for _ in range(min(len(batch), GROUP)):
            if self._unwinding:
                return
            owner, mask = batch.popleft()
            if isinstance(owner, socket.socket):
                self._n.wakeups += 1
                discard(owner)
            elif isinstance(owner, Watch):
                if self._owners.get(owner.fd) is owner:
                    self._on_watched(owner, mask)
                else:
                    self._n.stale_events += 1  # removed earlier in this batch
            elif owner._sock is None:
                self._n.stale_events += 1  # closed earlier in this batch
            else:
                if isinstance(owner, Connection):
                    self._answering = owner
                    self._group.append(owner)
                owner._on_ready(mask)
            if self._tick():
                return

    def _look_at_everything(self) -> None:
        """A turn was interrupted, perhaps amid the steps of a connection: go through them all again."""
        for owner in [*self._connections(), *self._datagrams()]:
            owner._starved = False  # its timer may be what was not set
            owner._mark()
            if isinstance(owner, Connection) and owner._connecting and owner._deadline is not None:
                owner._deadline.tell_again()
        for conn in self._connections():
            conn._report_complete()  # to find that out is the framer's, and may be what was interrupted
        self._plan_sweep()
        self._wake_resting()
        for listener in self._listeners():
            listener._take_coming()

    def _settle_all(self) -> None:
        work, self._pending, self._settled = self._pending, [], 0
        try:
            self._settle_each(work)
        finally:
            if self._settled < len(work):
                self._pending = work[self._settled :] + self._pending

    def _settle_each(self, work: list[Connection | Datagram]) -> None:
        while self._settled < len(work) and not self._unwinding:
            work[self._settled]._settle()
            self._settled += 1
            if self._tick():
                return

    # What is taken from a queue is called in the next line: where there is no call in between, no interrupt can come.

    def _run_foreign(self) -> None:
        self._begin_part()
        for _ in range(len(self._foreign)):
            if self._unwinding or self._tick():
                return
            fn, args = self._foreign[0]
            del self._foreign[0]
            fn(*args)

    def _run_soon(self) -> None:
        self._begin_part()
        for _ in range(len(self._soon)):
            if self._unwinding or not self._soon:
                return
            fn, args = self._soon[0]
            del self._soon[0]
            try:
                fn(*args)
            except Exception as error:
                self._call_raised(fn, error)
            self._check_fork()
            if self._tick():
                return

    def _run_timers(self) -> None:
        timers = self._timers
        if not timers.heap:
            return
        self._begin_part()
        now, newest = time.monotonic_ns(), timers.order
        while not self._unwinding and (handle := timers.due(now, newest)) is not None:
            call = timers.take(handle)
            if call is None:
                continue
            fn, args = call
            try:
                fn(*args)
            except Exception as error:
                self._call_raised(fn, error)
            self._check_fork()
            if self._tick():
                return

    def _turn(self, timeout_ns: int) -> None:
        self._in_turn = True
        try:
            if self._closed:
                return  # by a signal handler or a finaliser, just before it was a turn: nothing would end a wait
            self._told = False
            self._begin_part()
            if self._read and self._reading is not None:  # an interrupt came between
                self._reading._resume_read()
            self._send_group()
            self._settle_all()
            if not self._batch and not self._unwinding:
                self._wait(0 if self._told or self._has_work() else timeout_ns)
            self._begin_part()
            self._dispatch()
            self._reading = None
            self._run_foreign()
            self._run_soon()
            self._run_timers()
            self._begin_part()
            self._settle_all()
        except BaseException:
            self._soon.appendleft((self._look_at_everything, ()))
            raise
        finally:
            self._in_turn = False
            self._corked = None
            if self._unwinding and self._forks == _forks:
                self._shut_down()

    def poll(self, timeout: float | None = None) -> list[tuple[Any, int]]:
        """See the compiled core's poll."""
        timeout_ns = -1 if timeout is None else to_ns(check_seconds("timeout", timeout))
        self._begin("poll")
        while self._finished:
            conn = self._finished[-1]
            if conn._reader is None or not conn._reader.is_complete():
                conn._close()
            if self._finished and self._finished[-1] is conn:  # only now: an interrupt may have come before
                del self._finished[-1]
        self._polling = True
        try:
            self._turn(timeout_ns)
            return self._take_ready()
        finally:
            self._polling = False

    def _take_ready(self) -> list[tuple[Any, int]]:
        # An interrupt, or what else has run, leaves all as it is until the last lines, which call nothing.
        changes = -1
        while changes != self._report_changes:
            changes = self._report_changes
            result = [(conn, self._reports.get(conn, 0)) for conn in list(self._reports)]
            finished = [conn for conn, flags in result if flags & EOF and not conn._policy.half_open]
        self._reports = {}
        self._report_changes += 1
        self._finished += finished
        return result

    def _serve(self) -> None:
        self._serving = True
        try:
            self._serve_until_stopped()
        finally:
            self._serving = self._stopping = False
            self._direct = not self._closed

    def _serve_until_stopped(self) -> None:
        while not self._stopping and not self._closed:
            self._turn(-1)

    def _serve_until_empty(self, deadline_ns: int) -> bool:
        self._serving = self._draining = True
        try:
            self._serve_until(deadline_ns)
        finally:
            self._serving = self._draining = self._stopping = False
        return self._n.connections == 0

    def _serve_until(self, deadline_ns: int) -> None:
        n = self._n
        while (n.connections or self._pending) and not self._stopping and not self._closed:
            self._turn(max(deadline_ns - time.monotonic_ns(), 0) if n.connections else 0)
            if time.monotonic_ns() >= deadline_ns:
                break

    def _running(self) -> bool:
        return self._serving

    def stop(self) -> None:
        """See the compiled core's stop."""
        self._check_fork()
        self._stopping = True
        self._wake()

    def stats(self) -> Stats:
        """See the compiled core's stats."""
        return Stats(**vars(self._n))

    def fileno(self) -> int:
        raise ValueError(f"fileno: the {self._backend} backend has no descriptor that tells of its readiness")

    # -- the end

    def close(self) -> None:
        """See the compiled core's close."""
        if self._closed:
            return
        if self._forks != _forks:
            self._close_descriptors()
            return
        if self._is_foreign() and self._owner_thread() is None:
            self._thread = get_ident()  # of the thread that it was bound to there is nothing left
        self._check_thread()
        if self._in_turn:
            self._unwinding = self._turn_over = True
            self._wake_driver()
        else:
            self._shut_down()

    def _shut_down(self) -> None:
        interrupt: BaseException | None = None
        self._unwinding = False
        self._closed = True
        self._in_turn = True
        steps: list[Callable[[], object]] = [listener.close for listener in self._listeners()]
        steps.append(self._refuse_output)
        steps.append(self._run_all_foreign)
        steps.extend(partial(self._close_now, conn) for conn in self._connections())
        unsettled = [owner._settle for owner in (*self._pending, *self._connections())]
        steps += 2 * unsettled  # twice, since on_close is owed even after an on_open that raised
        steps.extend(datagram.close for datagram in self._datagrams())  # the last, since on_close may send something
        for step in steps:
            try:
                step()
            except BaseException as error:
                interrupt = error
        self._in_turn = False
        try:
            self._at_close.close()
        except BaseException as error:
            interrupt = error
        self._release()
        if interrupt is not None:
            raise interrupt

    def _run_all_foreign(self) -> None:
        while self._foreign:
            self._run_foreign()

    def _refuse_output(self) -> None:
        with self._lock:  # as in Connection._advance_close
            self._refuse_each()

    def _refuse_each(self) -> None:
        for conn in self._connections():
            conn._closing = True

    def _close_now(self, conn: Connection) -> None:
        conn._send_out()
        if conn.outbox_size:
            conn._abort(ConnectionClosed(f"the Mux was closed with {conn.outbox_size} bytes unsent", conn=conn))
        else:
            conn._reader = None
            conn._end(None)

    def _release(self) -> None:
        self._closed = True
        for owner in list(self._owners.values()):
            if isinstance(owner, socket.socket):
                close_socket(owner)
        with self._lock:
            close_socket(self._waker)
        self._poller.close()
        for queue in (
            self._owners, self._connecting, self._pending, self._reports, self._finished, self._resting,
            self._batch, self._offloaded, self._group,
        ):
            queue.clear()
        self._soon.clear()
        self._foreign.clear()
        self._timers.clear()

    def _close_descriptors(self) -> None:
        """In a forked child, or for a Mux that was never closed: close(2) and nothing else."""
        for owner in [*self._owners.values(), *self._resting, *self._connecting]:
            if isinstance(owner, (socket.socket, Watch)):
                continue
            if isinstance(owner, Connection):
                owner._closing = owner._ended = owner.closed = True
                owner._said |= CLOSED
                owner._out.clear()
                if owner._connecting and owner._deadline is not None:
                    owner._deadline.abandon()
            elif isinstance(owner, Listener):
                owner._listening = owner._resting = False
            sock, owner._sock = owner._sock, None
            if sock is not None:
                close_socket(sock)
        self._release()


def log_eviction(owner: object, error: OSError) -> None:
    log.error("%r lost its descriptor: %s", owner, error)


class Counters:
    """What Stats shows."""

    def __init__(self) -> None:
        vars(self).update(dict.fromkeys(Stats._fields, 0))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> int: ...
        def __setattr__(self, name: str, value: int) -> None: ...


def discard(sock: socket.socket) -> None:
    """Read and forget what woke us up."""
    try:
        sock.recv(256)
    except BlockingIOError:
        pass
