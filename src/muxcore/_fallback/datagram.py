"""What may live here: datagram sockets."""

from __future__ import annotations

import time
from collections import deque

from .. import _address
from .._address import DONTWAIT
from .._frame import as_bytes, datagram_too_large
from .._log import log
from .._own import SocketType
from .._timers import own_step
from .._typing import TYPE_CHECKING, final
from .._watch import INVALID, READ, WRITE
from ..errors import OutboxFull, from_call, without_frames
from .docs import documented
from .outbox import STARVED_NS
from .state import SocketOptions
from .syscalls import SEND_FLAGS, TOO_LARGE, TRY_LATER, discard_error_queue, discard_socket

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from .._config import Limits
    from .._unix import SocketFile
    from ..handler import DatagramCallbacks
    from .mux import PythonCore

BATCH, RECEIVE_ROUNDS = 64, 4
ADDRESSES_KEPT = 1024
ERRORS_KEPT = 64
PACKET_COST = 64


def is_plain(address: Any) -> bool:
    """Whether it is as as_address() makes them: a key that runs no code of the user's."""
    if type(address) is not tuple:
        return type(address) is str
    return all(type(item) is int or type(item) is str for item in address)


@final
@documented
class Datagram(SocketOptions):

    __slots__ = (
        "__weakref__", "_blocked", "_drain_owed", "_errors", "_family", "_file", "_flushing", "_interest",
        "_is_above_high", "_largest_sent", "_max_size", "_on_datagrams", "_on_drain", "_on_error", "_out",
        "_out_bytes", "_pending", "_refused", "_remotes", "_retry_ns", "_sent", "_sock", "_starved", "_targets",
        "_warned",
        "address", "data", "limits", "mux", "remote",
    )

    def __new__(cls, *args: Any) -> Datagram:
        if not args:
            raise TypeError("datagram sockets are made by Mux.datagram")
        return super().__new__(cls)

    def __init__(
        self,
        mux: PythonCore,
        sock: socket.socket,
        file: SocketFile | None,
        remotes: tuple[Any, ...],
        callbacks: DatagramCallbacks,
        limits: Limits,
        max_size: int,
    ) -> None:
        self._sock: socket.socket | None = None  # None until this object owns one
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
        self._targets: dict[Any, Any] = {}  # by address: the argument of sendto
        self._out_bytes = 0
        self._refused: int | None = 0  # the errno of the last send, if that is to be tried once more
        self._retry_ns = 0
        self._interest = READ
        self._pending = self._is_above_high = self._drain_owed = self._blocked = self._starved = self._warned = False
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
                f"data must be at most {self._largest_sent} bytes, the largest datagram, not {len(data)}"
            )
        target = self._target(address)
        packets, cost = ((data, target),), len(data) + PACKET_COST
        if not self.mux._in_turn:
            self._schedule()  # should an interrupt come below
        if self._sock is None or target == _address.NOWHERE:
            self.mux._count_drop()
            return False
        if self._out_bytes >= self.limits.max_outbox:
            return self._overflow()
        self._out_bytes += cost  # up to here from the look at the socket there is no call, which might close it
        self._out += packets
        self.mux._n.messages_out += 1
        if self._out_bytes > self.limits.high or (self.mux._flush_at_once and not self.mux._in_turn):
            return self._send_at_once()
        self._schedule()
        return not self._is_above_high

    def close(self) -> None:
        self.mux._check_thread()
        self._close()

    @own_step
    def _schedule(self) -> None:
        if not self._pending:
            self.mux._pending.append(self)  # twice, after an interrupt here, is harmless
            self._pending = True
            self.mux._wake_driver()

    def _report_error(self, error: Exception, of_close: bool = False) -> None:
        if self._sock is None and not of_close:
            return  # a finaliser or a signal handler has closed it while the error was made
        self.mux._n.datagram_errors += 1
        if len(self._errors) < ERRORS_KEPT:
            self._errors.append(error)
        self._schedule()

    def _notify_error(self) -> None:
        """Report the first error."""
        error = self._errors[0]
        arguments = (self, error)
        if not self._errors or self._errors[0] is not error:
            return  # a finaliser has closed it: no callback comes after that
        del self._errors[0]
        if self._on_error is not None:
            self._notify(self._on_error, arguments)
        elif not self._warned:
            self._warned = True
            log.warning("%r has no on_error, so later errors are only counted: %s", self, error)

    def _notify_drain(self) -> None:
        arguments = (self,)
        if not self._drain_owed:
            return  # a finaliser has closed it: no callback comes after that
        self._drain_owed = False
        if self._on_drain is not None:
            self._notify(self._on_drain, arguments)

    def _notify(self, fn: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.mux._notified = True
        self.mux._call_plain(fn, arguments)

    def _target(self, address: Any) -> Any:
        """The argument of sendto for this destination; None on a connected socket."""
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
            self._schedule()
        enough = self.mux._n.bytes_in + self.mux._read_budget
        for _ in range(RECEIVE_ROUNDS if reported & ~WRITE else 0):
            is_last = self._hand_out_batch()
            if is_last or self._sock is None or self.mux._close_requested or self.mux._n.bytes_in >= enough:
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
            arguments = (self, messages)
            if messages and self._sock is not None:
                n.messages_in += len(messages)
                handed_out = True
                self._notify(self._on_datagrams, arguments)
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
                # shows that it was cut.
                taken.extend(map(sock.recvfrom, (self._max_size + 1,), (DONTWAIT,)))
            except OSError as error:
                if not from_call(error):
                    raise
                if isinstance(error, BlockingIOError):
                    discard_error_queue(sock)
                    return True
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
        self._flush()
        if self._out_bytes > self.limits.high and not self._is_above_high:
            self._is_above_high = True
            self._drain_owed = False
            self.mux._n.high_water_hits += 1
        return not self._is_above_high

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
                self._report_error(error, of_close=True)
        self.mux._count_drop()
        return False

    def _can_flush(self) -> bool:
        return bool(self._out) and not (self._blocked or self._starved)

    # As in Connection._flush: what a send has returned stays in a list until its datagram has left the queue. So a
    # signal handler that sends, closes or raises at any moment here loses and doubles none.

    def _flush(self) -> None:
        if self._flushing:
            self._schedule()
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
                if not from_call(error):
                    raise
                self._send_refused(error, first)
            if self._sent:
                self._forget(first)
        if self._is_above_high and self._out_bytes <= self.limits.low:
            self._is_above_high = False
            self._drain_owed = True
            self._schedule()

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
        """Remove the first datagram of the queue, which was sent or is given up. No call is within the last lines."""
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
            self._schedule()
        elif would_block or error.errno in TRY_LATER:
            self._starve()
        elif error.errno != self._refused:
            self._refused = error.errno
            self._report_error(without_frames(error))
        else:
            self.mux._count_drop()
            self._forget(first)

    def _starve(self) -> None:
        self._schedule()  # if there is no memory for the timer, or an interrupt comes, the next turn tries again
        retry_ns = time.monotonic_ns() + STARVED_NS
        self.mux._timers.add(retry_ns, self._schedule, ())
        self._starved, self._retry_ns = True, retry_ns

    # -- the steps of its life

    def _run_pending(self) -> None:
        self._pending = False
        if self._starved and time.monotonic_ns() >= self._retry_ns:
            self._starved = False
        self._flush()
        for _ in range(len(self._errors)):
            if self._errors:  # a callback may have closed it
                self._notify_error()
            if self.mux._look_at_clock():
                self._schedule()
                break
        if self._drain_owed:
            self._notify_drain()
        self._apply_interest()

    def _apply_interest(self) -> None:
        wanted = READ | (WRITE if self._blocked else 0)
        if self._sock is None or wanted == self._interest:
            return
        try:
            self.mux._poller.watch(self._sock.fileno(), wanted)
        except OSError as error:
            if not from_call(error):
                raise
            if self._blocked:
                self._blocked = False
                self._starve()
        else:
            self._interest = wanted

    def _close(self) -> None:
        if self._sock is None:
            return
        try:
            self._flush()
        finally:
            self._end()

    def _end(self) -> None:
        """Whatever is raised, the descriptor is closed."""
        sock = self._sock
        if sock is None:
            return  # a finaliser has closed it meanwhile
        fd = sock.fileno()
        try:
            self._discard()
            self.mux._forget(fd)
        finally:
            self._sock = None
            self.mux._owners.pop(fd, None)  # without an owner it is unwatched, should an interrupt have come before
            discard_socket(sock, self._file)

    def _discard(self) -> None:
        """Discard the queue and the errors: after close() no callback is called."""
        nothing: deque[tuple[bytes, Any]] = deque()
        none: list[int] = []
        out, sent, self._out, self._sent = self._out, self._sent, nothing, none
        self._out_bytes = 0
        self._is_above_high = self._drain_owed = self._blocked = self._starved = False
        self.mux._n.unsent += len(out) > len(sent)
        self.mux._count_drop(len(out) - len(sent))
        self._errors.clear()
