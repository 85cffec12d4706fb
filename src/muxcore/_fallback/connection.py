"""What may live here: the connection: its face, its steps from opening to the end, what it reports."""

from __future__ import annotations

import os
import socket
from types import GenericAlias

from .. import _address
from .._config import as_limits, as_timeouts
from .._log import log
from .._own import close_socket, moved
from .._timers import own_step
from .._typing import TYPE_CHECKING, final
from .._unix import peer_credentials
from .._watch import ERROR, HANGUP, INVALID, READ, WRITE
from ..errors import (
    ConnectionClosed,
    FrameError,
    IdleTimeout,
    WriteTimeout,
    about,
    check_reason,
    from_call,
    without_frames,
)
from . import state
from .docs import documented
from .policy import FAILED_LINGER_NS
from .pollers import CLOSED, DRAINED, EOF, OPENED, UNWATCHED
from .syscalls import discard_error_queue
from .wire import Wires

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .._config import Limits, Timeouts
    from .._unix import PeerCredentials
    from .listener import Listener

@final
@documented
class Connection(Wires):

    __slots__ = ()
    if not TYPE_CHECKING:
        __class_getitem__ = classmethod(GenericAlias)

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

    def close(self, reason: BaseException | None = None, /) -> None:
        check_reason(reason)
        self._end_by(self._close_for, reason)

    def abort(self) -> None:
        self._end_by(self._abort)

    def _end_by(self, end: Callable[..., None], *args: Any) -> None:
        mux = self.mux
        mux._check_fork()
        with mux._lock:  # see PythonCore._bind
            if not mux._on_other_thread():
                end(*args)
                return
            self._close_asked = True
        if not self.closed:
            mux._from_foreign(end, args)

    def detach(self) -> socket.socket:
        self.mux._check_thread()
        if self._closing or self._ended or self._sock is None:
            raise ConnectionClosed("detach: the connection is not open", conn=self)
        if self._wire is not None:
            raise RuntimeError("detach: a connection with TLS cannot be detached")
        with self.mux._lock:  # as in _advance_close
            if self.outbox_size:
                raise RuntimeError(f"detach: {self.outbox_size} bytes are unsent")
            self._schedule()
            sock = self._sock
            if self._closing or self._ended or sock is None:  # by what has run since, a signal handler, say
                raise ConnectionClosed("detach: the connection is not open", conn=self)
            self._closing = self._ended = True
        self._drop_socket(close=False)
        if sock.fileno() < 0:  # a signal handler has closed the Mux amid that
            raise ConnectionClosed("detach: the connection is not open", conn=self)
        plain: socket.socket = moved(sock, socket.socket)
        return plain

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
        before = self._policy
        self._set_policy(timeouts=as_timeouts(value))
        now = self._policy
        shorter = now.closing_stall_ns < before.closing_stall_ns or now.linger_ns < before.linger_ns
        if shorter and self._closing and not self._connecting:
            self._drop_deadline()  # _advance_close() sets another

    def set_timeouts(self, **changes: Any) -> None:
        self.timeouts = self.timeouts.__replace__(**changes)

    def _set_policy(self, limits: Limits | None = None, timeouts: Timeouts | None = None) -> None:
        self.mux._check_thread()
        policy = before = None
        while self._policy is not before:
            before = self._policy
            policy = before.changed(limits or before.limits, timeouts or before.timeouts, before.framer)
        assert policy is not None
        self._schedule()
        self._policy = policy
        self.mux._need_sweep(policy)
        self._report_complete()

    def _run_in_handler(self, step: Callable[..., object], *args: Any) -> None:
        """Run a step that calls the handler. Its output to this connection leaves together afterwards."""
        mux = self.mux
        mux._in_handler = self
        try:
            step(*args)
        finally:
            mux._in_handler = None
        if not self._pending:
            self._send_out()

    def _invoke(self, fn: Callable[..., object], flag: int, *args: Any) -> None:
        self.mux._notified = True
        try:
            self._reported |= flag
            self._drain_owed = self._drain_owed and flag != DRAINED
            fn(self, *args)
        except Exception as error:
            self._failed = error
            self._handler_raised(error)
        self.mux._check_fork()

    def _handler_raised(self, error: Exception) -> None:
        """Behind `_failed = error`: should an interrupt come in between, _run_pending() goes on with it."""
        if self.mux._forks != state.forks:
            raise error
        if issubclass(type(error), FrameError):  # isinstance() would look up its __class__
            self._peer_failed(error)
        else:
            self._user_failed("handler", error)

    def _peer_failed(self, error: BaseException) -> None:
        """The peer has sent malformed input. The handler may send a last reply, then the connection closes."""
        if self._reported & CLOSED:
            self._failed = None
            without_frames(error)
            return
        first = self.error is None and not (self._closing or self._ended)
        if self.error is None:
            self.error = error
        try:
            self._reader = None
            without_frames(error)
            about(error, self)  # a class of the user's may do anything
            on_error = self._policy.on_error
            if first and on_error is not None and self._may_still_fail():
                self._run_in_handler(self._invoke, on_error, 0, error)
        except BaseException:
            without_frames(error)  # an interrupt may have come before they were gone
            raise
        finally:
            self._close()

    def _may_still_fail(self) -> bool:
        """Whether on_error may be called: the connection is not closed, and neither is its Mux."""
        return not (self._closing or self._ended or self.mux._close_requested)

    def _user_failed(self, who: str, error: BaseException) -> None:
        """A handler or a user's framer raised: it loses its connection."""
        self.mux._n.handler_errors += 1
        if not self._reported & CLOSED:
            if self.error is None:
                self.error = error
            self._close()
        self._failed = None
        try:
            log.error("%s of %r raised", who, self, exc_info=error)  # the last step: a log handler may do anything
        finally:
            without_frames(error)

    # It is noted in the line before it is said, without a call in between: an interrupt loses and doubles nothing.
    def _notify(self, fn: Callable[..., object] | None, flag: int, *args: Any) -> None:
        if self._policy.pull:
            self._report_flag(flag)
        elif fn is not None:
            self._run_in_handler(self._invoke, fn, flag, *args)
            return
        self._reported |= flag
        self._drain_owed = self._drain_owed and flag != DRAINED

    def _on_ready(self, reported: int) -> None:
        if reported & WRITE and self._blocked:
            self._blocked = False
            self._flush()
            if not self._blocked:
                self._schedule()
        sock = self._sock
        if sock is None:
            return
        if reported & INVALID:
            self.mux._evict(self)
        elif reported & ~WRITE:
            if self._may_read():
                self._read_turn(reported)
            elif reported & ERROR:
                self._take_error(sock)
            elif reported & HANGUP and not self._blocked and self._sock is sock:
                self.mux._poller.unwatch(sock.fileno())  # poll would report it for ever
                self._interest = UNWATCHED

    def _take_error(self, sock: socket.socket) -> None:
        """It is paused: no read would report recv's error."""
        taken: list[int] = []  # the kernel says it once
        try:
            taken.extend(map(sock.getsockopt, (socket.SOL_SOCKET,), (socket.SO_ERROR,)))
        except OSError as error:  # a signal handler has closed it
            if not from_call(error):
                raise
        finally:
            for number in filter(None, taken):
                self._end_behind_messages(OSError(number, os.strerror(number)))
        if taken == [0]:
            discard_error_queue(sock)

    def _end_behind_messages(self, error: OSError) -> None:
        if not self._waits_for_run_pending():
            self._end(error)
            return
        self._keep_error(error)
        self._peer_gone = True
        self._reset_on_close()

    def _run_pending(self) -> None:
        self._pending = False
        policy = self._policy
        if self._connecting:
            self._run_pending_connect()
            return
        if self._handshake:
            self._run_pending_handshake()
            return
        if self._failed is not None:
            self._handler_raised(self._failed)
        if not self._reported & OPENED:
            self._make_custom()
            self._notify(policy.on_open, OPENED)
        if self._handshake:
            self._run_pending_handshake()  # on_open has begun it
            return
        self._run_wire()  # an interrupt may have come amid its work
        self._send_out()
        if self._drain_owed and not (self._closing or self._ended or self._peer_gone):
            self._notify(policy.on_drain, DRAINED)
            self._report_complete()
        if self._reader is not None and not policy.pull and self._may_deliver():
            self._run_in_handler(self._deliver)
        if self._peer_gone and not self._ended:
            self._read_what_is_left()
        if not self._ended:
            complete = self._has_message(judges=True)
            owed = self.eof and not (self._reported & EOF or complete)
            if owed and self._may_deliver() and self not in self.mux._offloaded:
                self._notify_eof()
        if not self._ended:
            self._advance_close()
        if self._ended:
            self._finish()
        else:
            self._apply_interest()

    def _run_pending_connect(self) -> None:
        with self.mux._lock:  # as in _advance_close
            owed = self._has_output() or self._foreign_entries
        if self._closing and not owed:
            self._set_ended(None)
        if self._ended:
            self._finish()

    def _notify_eof(self) -> None:
        policy = self._policy
        if self._wire is not None and self.error is not None:
            self._close()  # that was no orderly end
            return
        if not policy.pull and policy.on_eof is None and not policy.half_open:
            self._close()
        self._notify(policy.on_eof, EOF)

    def _read_what_is_left(self) -> None:
        if self._waits_for_run_pending():
            return
        if not self._may_read():
            self._set_ended(None)
            return
        self._read_turn(HANGUP)
        if not self._ended:
            self._schedule()

    def _apply_interest(self) -> None:
        wanted = (READ if self._may_read() else 0) | (WRITE if self._blocked else 0)
        sock = self._sock
        if sock is None or wanted == self._interest or (wanted == 0 and self._interest == UNWATCHED):
            return
        try:
            self.mux._poller.watch(sock.fileno(), wanted)
        except (OSError, ValueError) as error:
            if not from_call(error):
                raise
            self._end(error)
        else:
            self._interest = wanted

    def _close_for(self, reason: BaseException | None) -> None:
        if self.error is None and not (self._closing or self._ended):
            self.error = reason  # as it is until on_close was called: its user may be about to log it
        self._close()

    def _close(self) -> None:
        if not (self._closing or self._ended):
            self._schedule()
            self._closing = True
            self._paused = self._drain_owed = False
            self._reader = None
        self._failed = None

    def _advance_close(self) -> None:
        if not (self._closing or self._write_eof) or (self._handshake and not self._closing):
            return  # the second: write_eof() waits for the handshake
        mux, policy = self.mux, self._policy
        # Another thread that has looked at the flags and not counted its bytes yet holds the lock, too. So what was
        # accepted from it is waited for, and from then on everything is refused.
        with mux._lock:
            owed = self._has_output() or self._foreign_entries
        if owed:
            if self._closing and self._deadline is None:
                self._set_closing_due(mux._now_ns + policy.closing_stall_ns, 0)
            return
        if self._wire is not None and not (self._handshake or self._wire_shut or self._write_shut):
            self._shut_wire(self._wire)
            return
        if self.eof and (self._closing or self._reported & EOF) and not self._fin_unread:
            self._set_ended(None)
            return
        if not self._write_shut:
            self._drop_deadline()
            try:
                self._borrowed("shutdown").shutdown(socket.SHUT_WR)
            except OSError as error:
                if not from_call(error):
                    raise
                self._peer_gone = True
                self._schedule()
            self._write_shut = True  # not before: after an interrupt it is done again, which is harmless
        if self._closing and self._deadline is None:
            if policy.linger_ns == 0 or self._timed_out:
                self._set_ended(None)
                return
            self._set_closing_due(mux._now_ns + self._linger_ns(), self._unsent())

    def _linger_ns(self) -> int:
        linger_ns = self._policy.linger_ns
        return min(linger_ns, FAILED_LINGER_NS) if self._handshake else linger_ns

    def _set_closing_due(self, due: int, unsent: int) -> None:
        self._deadline = self.mux._add_timer(due, self._closing_due, (unsent, due))

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    @own_step
    def _closing_due(self, unsent: int, due: int) -> None:
        mux, policy = self.mux, self._policy
        self._deadline = None
        if self._ended:
            return
        if self._has_output() or self._foreign_entries:
            due = self._wrote_ns + policy.closing_stall_ns
            if mux._has_judged(due):
                self._write_timeout(policy.closing_stall_ns)
            else:
                self._set_closing_due(due, 0)
        elif not mux._has_judged(due):
            self._set_closing_due(due, unsent)
        elif 0 < (left := self._unsent()) < unsent:
            self._set_closing_due(mux._now_ns + self._linger_ns(), left)
        else:
            self._end(None)

    def _write_timeout(self, limit_ns: int) -> None:
        limit = limit_ns / 1e9
        self.mux._n.timeouts += 1
        self._abort(
            WriteTimeout(f"the peer accepted none of {self._out_bytes} bytes for {limit:g} s", conn=self, limit=limit)
        )

    def _idle_timeout(self) -> None:
        limit = self._policy.idle_ns / 1e9
        self.mux._n.timeouts += 1
        self._keep_error(IdleTimeout(f"no message received for {limit:g} s", conn=self, limit=limit))
        self._timed_out = True
        self._close()

    def _silence_timeout(self) -> None:
        limit = self._policy.silence_ns / 1e9
        error = IdleTimeout(f"no byte in either direction for {limit:g} s", conn=self, limit=limit)
        self.mux._n.timeouts += 1
        if self._has_output():  # the peer accepts no output
            self._abort(error)
        else:
            self._keep_error(error)
            self._timed_out = True
            self._close()

    def _abort(self, error: BaseException | None = None) -> None:
        if self.closed:
            return
        self._schedule()
        self._keep_error(error)
        self._closing = self._ended = True
        self._reader = None
        self._reset_on_close()
        self._drop_socket()

    def _finish(self) -> None:
        self._drop_deadline()
        if self._handshake and not (self._connecting or self._reported & CLOSED or self.error is None):
            self.mux._n.handshake_failures += 1
        if not self.closed:
            self._drop_socket()
        if not self._reported & CLOSED:
            self._notify(self._policy.on_close, CLOSED, self.error)
        if self.error is not None:
            without_frames(self.error)  # see _close_for
        if self._closing or not self._policy.pull:  # else it may have messages yet
            reader, custom, self._reader, self._custom = self._reader, self._custom, None, None
            for former in (reader, custom):
                if former is not None:
                    former.forget()
        self._forget_wire()

    def _drop_socket(self, close: bool = True) -> None:
        mux, policy, sock = self.mux, self._policy, self._sock
        fd = -1 if sock is None else sock.fileno()
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
            mux._owners.pop(fd, None)  # without an owner it is unwatched, should an interrupt come behind this
            mux._poller.unwatch(fd)
            if close:
                close_socket(sock)
        self._discard_outbox()
        mux._resume_accepts()
