"""What may live here: what a connection and a Mux have, and what the chapters below call of those above."""

from __future__ import annotations

import os
import socket
import time
from collections import deque

from .. import _address
from .._lock import Lock
from .._mux import STATE, Mux
from .._own import OwnSocket, moved
from .._owner import what_lives_as_long_as_this_thread
from .._stats import Stats
from .._timers import Timers
from .._typing import TYPE_CHECKING
from .._watch import READ
from ..errors import ConnectionClosed, from_call, without_frames
from .pollers import POLLERS
from .syscalls import RESET_ON_CLOSE

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self, TypeAlias

    from .._custom import CustomReader, Found
    from .._frame import Reader
    from .._watch import Watch
    from .._wire import Wire
    from ..proxy_protocol import Proxy
    from .connection import Connection
    from .datagram import Datagram
    from .listener import Listener
    from .mux import PythonCore
    from .outbox import FilePart
    from .policy import Policy

forks = 0


def _count_fork() -> None:
    global forks
    forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


if TYPE_CHECKING:
    Owner: TypeAlias = Connection | Listener | Datagram | Watch | socket.socket  # the last: what ends our own wait


class Counters:
    """What Stats shows."""

    def __init__(self) -> None:
        vars(self).update(dict.fromkeys(Stats._fields, 0))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> int: ...
        def __setattr__(self, name: str, value: int) -> None: ...


class SocketOptions:
    """The socket options and the descriptor of a Connection or a Datagram."""

    __slots__ = ()
    mux: PythonCore
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


class ConnectionState(SocketOptions):
    """What a connection has."""

    __slots__ = (
        "__weakref__", "_blocked", "_busy", "_close_asked", "_closing", "_connecting", "_custom", "_deadline",
        "_drain_owed", "_due", "_ended", "_failed", "_file_bytes", "_files", "_fin_unread", "_flushing",
        "_foreign_bytes", "_foreign_entries", "_fruitful", "_given", "_handshake", "_handshaking", "_heard_ns",
        "_interest", "_is_above_high", "_offered", "_on_hold", "_out", "_out_bytes", "_paused", "_peer_gone",
        "_pending", "_plain", "_policy", "_proxy", "_reader", "_received_ns", "_reported", "_sent", "_sock", "_starved",
        "_timed_out", "_wire", "_wire_failure", "_wire_shut", "_write_eof", "_write_shut", "_wrote_ns",
        "closed", "data", "eof", "error", "id", "mux", "peer",
    )

    def __new__(cls, *args: Any) -> Self:
        if not args:
            raise TypeError("connections are made by Mux.listen, Mux.connect and Mux.attach")
        return super().__new__(cls)

    def __init__(self, mux: PythonCore, sock: socket.socket | None, peer: Any, policy: Policy) -> None:
        mux._last_id += 1
        self.id = mux._last_id
        self.mux = mux
        self.peer = peer
        self.data: Any = None
        self.error: BaseException | None = None
        self._failed: Exception | None = None  # what its handler has raised, until it is closed for that
        self.closed = self.eof = False
        self._sock: socket.socket | None = sock
        self._policy = policy
        self._reader: Reader | CustomReader | Found | None = None  # what was received and not delivered
        self._custom: CustomReader | None = None  # that of a user's framer, from the beginning
        self._out: deque[bytes | bytearray | memoryview | FilePart] = deque()
        self._plain: deque[Any] | None = None  # what is for the wire first
        self._out_bytes = 0  # in both
        self._file_bytes = 0  # of these, in files, where they cost no memory
        self._sent: list[int] = []  # what a send has returned, until it is consumed: see _flush
        self._offered = 0  # and how many bytes that send was given
        self._files = 0  # how many
        self._foreign_bytes = self._foreign_entries = self._interest = 0
        self._received_ns = self._heard_ns = mux._now_ns if mux._in_turn else time.monotonic_ns()
        self._wrote_ns = 0
        self._deadline: Any = None  # has cancel(): the Attempt to connect or, while closing, a timer
        self._connecting = self._on_hold = False
        self._pending = self._paused = self._is_above_high = self._drain_owed = self._blocked = False
        self._starved = self._write_eof = self._closing = self._write_shut = self._peer_gone = False
        self._ended = self._close_asked = self._flushing = self._timed_out = False
        self._wire: Wire | None = None
        self._wire_failure: Exception | None = None  # why it cannot go on, until that is dealt with
        self._proxy: Proxy | None = None
        self._handshake = policy.wiring is not None  # it is not open before the wire is
        self._handshaking = False  # on the Mux's list of handshakes
        self._given = 0  # bytes of the plaintext that the wire has
        self._fruitful = False  # the last read was plaintext for the most part
        self._due = self._busy = False  # the wire has something to work on, or is at work
        self._fin_unread = False  # the wire's end was read, and the peer's FIN was not yet
        self._wire_shut = False  # the wire has ended our side of the stream
        self._reported = 0  # OPENED, EOF, CLOSED: which of them the user was notified of

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else -1

    def _schedule(self) -> None:
        """Put this connection on the pending list, which is run before the next wait. Call this before a change, not
        after it: outside of a turn, after an interrupt between the two no turn would look at the change."""
        if not self._pending:
            self._pending = True
            self.mux._pending.append(self)
            self.mux._wake_driver()

    def _end(self, error: BaseException | None) -> None:
        self._schedule()
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

    def _report_flag(self, flag: int) -> None:
        mux = self.mux
        mux._reports[self] = mux._reports.get(self, 0) | flag
        mux._report_changes += 1

    def _reset_on_close(self) -> None:
        if self._sock is not None:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            except OSError as error:  # a socket that has no such option is closed all the same
                if not from_call(error):
                    raise

    if TYPE_CHECKING:  # what the outbox and the inbox call of the connection

        def _abort(self, error: BaseException | None = None) -> None: ...
        def _close(self) -> None: ...
        def _run_in_handler(self, step: Callable[..., object], *args: Any) -> None: ...
        def _handler_raised(self, error: Exception) -> None: ...
        def _resume_read(self) -> None: ...
        def _run_pending(self) -> None: ...
        def _report_complete(self) -> None: ...
        def _flush_wire(self) -> None: ...
        def _give_wire(self, wire: Wire) -> None: ...
        def _wire_eof(self, wire: Wire) -> None: ...
        def _advance_close(self) -> None: ...
        def _apply_interest(self) -> None: ...
        def _drop_deadline(self) -> None: ...
        def _finish(self) -> None: ...
        def _read_what_is_left(self) -> None: ...
        def _peer_failed(self, error: BaseException) -> None: ...
        def _user_failed(self, who: str, error: BaseException) -> None: ...


class MuxState(Mux):
    """What a Mux of this core has."""

    __slots__ = (
        *STATE, "__weakref__", "_accept_paused", "_asked_ns", "_backend", "_batch", "_close_requested", "_closed",
        "_connecting", "_draining", "_finished", "_flush_at_once", "_foreign", "_forks",
        "_handshakes", "_in_handler", "_in_turn", "_last_id", "_lock", "_look_again", "_n", "_notified", "_now_ns",
        "_offloaded", "_owner_thread",
        "_owners", "_pending", "_pending_done", "_poller", "_polling", "_pull_count", "_read", "_read_budget",
        "_read_size", "_reading", "_report_changes", "_reports", "_seen_ns", "_serving", "_sleeping", "_soon",
        "_stopping", "_sweep_ns", "_sweeping", "_thread", "_ticks", "_timers", "_turn_ends_ns", "_turn_over", "_waker",
    )

    def __new__(cls, *args: Any, backend: str = "auto", **options: Any) -> Self:
        mux = object.__new__(cls)
        mux._begin_closed(cls._resolve_backend(backend)[0])
        return mux

    def _begin_closed(self, backend: str) -> None:
        """As it stays if a subclass does not call __init__()."""
        self._backend = backend
        self._closed = True
        self._owners: dict[int, Owner] = {}
        self._connecting: set[Connection] = set()
        self._handshakes: deque[Any] = deque()  # connections whose wire has to work before they are open
        self._pending: list[ConnectionState | Datagram] = []
        self._reports: dict[ConnectionState, int] = {}  # what poll() is to say ...
        self._report_changes = 0  # ... and how often that has changed
        self._finished: list[ConnectionState] = []
        self._accept_paused: list[Listener] = []
        self._offloaded: dict[Any, Any] = {}
        self._batch: deque[tuple[Owner, int]] = deque()
        self._soon: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._foreign: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        # For what other threads look at or change, too. Reentrant: a finalizer may come in between and send.
        self._lock = Lock()
        self._timers = Timers(self._check_thread, self._wake_driver)
        self._n = Counters()
        self._now_ns = self._asked_ns = self._seen_ns = time.monotonic_ns()
        self._last_id = self._pull_count = self._sweep_ns = self._thread = 0
        self._turn_ends_ns = self._ticks = self._pending_done = 0
        self._forks = forks
        self._read: list[bytes] = []  # what was read from _reading, and was not delivered nor put into its inbox yet
        self._reading: ConnectionState | None = None
        self._owner_thread: Callable[[], object] = what_lives_as_long_as_this_thread()
        self._turn_over = self._sweeping = False
        self._in_handler: Connection | None = None
        self._flush_at_once = self._draining = self._in_turn = self._polling = False
        self._serving = self._sleeping = False
        self._look_again = False  # a turn was interrupted: the next one begins with _look_at_everything()
        self._stopping = self._notified = self._close_requested = False

    def _set_up(
        self, backend: str, max_events: int, read_size: int, read_budget: int, busy_poll_ns: int
    ) -> None:
        self._backend, self._read_size, self._read_budget = backend, read_size, read_budget
        self._poller = POLLERS[self._backend]()
        self._waker, wakee = (moved(end, OwnSocket) for end in socket.socketpair())
        self._closed = False
        self._register(wakee, wakee.fileno(), READ)

    if TYPE_CHECKING:  # what slots, threads and the loop call of what is above them

        def _begin_part(self) -> None: ...
        def _call_raised(self, fn: Callable[..., object], error: Exception) -> None: ...
        def _call_plain(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None: ...
        def _check_thread(self) -> None: ...
        def _connections(self) -> list[Any]: ...
        def _datagrams(self) -> list[Any]: ...
        def _listeners(self) -> list[Any]: ...
        def _register(self, owner: Owner, fd: int, wanted: int) -> None: ...
        def _shut_down(self) -> None: ...
        def _tick(self) -> bool: ...
        def _resume_read(self) -> None: ...
        def _resume_accepts(self) -> None: ...
