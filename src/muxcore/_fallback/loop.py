"""What may live here: the turn: what is pending, the wait, the events, calls and timers; idle and slow connections."""

from __future__ import annotations

import socket
import time

from .._config import check_seconds, to_ns
from .._log import log
from .._report import REPORTS
from .._timers import is_own_step, own_step
from .._typing import TYPE_CHECKING
from .._watch import Watch
from ..errors import from_call
from . import state
from .connection import Connection
from .pollers import EOF
from .syscalls import discard
from .threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .._report import Report
    from .datagram import Datagram
    from .policy import Policy
    from .state import ConnectionState

SWEEP_NS = 1_000_000_000
PART_NS = 3_000_000  # of a turn
HANDSHAKES_NS = 1_000_000
LONGEST_WAIT = 86400  # seconds, then it waits again: poll takes 24 days at most, macOS three years


class Loop(Threads):
    """The part of a Mux that turns."""

    __slots__ = ()

    def _need_sweep(self, policy: Policy) -> None:
        shortest = min(filter(None, (policy.idle_ns, policy.write_ns, policy.silence_ns)), default=0)
        every_ns = max(min(shortest // 4, SWEEP_NS), 1_000_000)
        if shortest and (self._sweep_ns == 0 or every_ns < self._sweep_ns):
            self._sweep_ns = every_ns
            self._sweeping = False  # what is planned comes too late
        self._plan_sweep()

    def _plan_sweep(self) -> None:
        if self._sweep_ns and not self._sweeping:
            self._add_timer(time.monotonic_ns() + self._sweep_ns, self._sweep, (self._sweep_ns,))
            self._sweeping = True

    @own_step
    def _sweep(self, every_ns: int) -> None:
        if every_ns == self._sweep_ns:  # else a shorter one has replaced it
            self._sweeping = False
        self._plan_sweep()
        for conn in self._connections():
            self._check_timeouts(conn, conn._policy)

    def _check_timeouts(self, conn: Connection, policy: Policy) -> None:
        now = self._seen_ns
        if conn.closing or conn._handshake:
            return
        if policy.write_ns and conn._blocked and now - conn._wrote_ns >= policy.write_ns:
            conn._write_timeout(policy.write_ns)
        elif (
            policy.silence_ns and now - max(conn._heard_ns, conn._wrote_ns) >= policy.silence_ns
            and (conn._may_read() or conn._has_output()) and self._is_waiting(conn)
        ):
            conn._silence_timeout()
        elif (
            policy.idle_ns and conn._may_read() and now - conn._received_ns >= policy.idle_ns
            and self._is_waiting(conn)
        ):
            conn._idle_timeout()

    def _has_judged(self, due: int) -> bool:
        """See the compiled core's has_judged()."""
        return due <= self._seen_ns

    def _is_waiting(self, conn: Connection) -> bool:
        """Whether the connection waits for its peer. (A framer that is called here may also have closed it.)"""
        return not conn._has_message(judges=False) and conn not in self._offloaded and not conn.closing

    def _call_plain(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            fn(*args)
        except Exception as error:
            self._call_raised(fn, error)
        self._check_fork()

    def _call_raised(self, fn: Callable[..., object], error: Exception) -> None:
        if self._forks != state.forks:
            raise error
        if is_own_step(fn):
            if not from_call(error):
                raise error  # a signal handler has raised it: it leaves the turn, which goes through everything again
            self._look_again = True
        self._n.handler_errors += 1
        log.error("%r raised", fn, exc_info=error)

    def _add_timer(self, when_ns: int, fn: Callable[..., object], args: tuple[Any, ...]) -> Any:
        return self._timers.add(when_ns, fn, args)

    def _has_work(self) -> bool:
        return bool(
            self._pending
            or self._soon
            or self._foreign
            or self._handshakes
            or self._look_again
            or (self._stopping and self._serving)
            or (self._polling and self._reports)
            or (self._draining and self._n.connections == 0)
        )

    def _wait(self, timeout_ns: int) -> None:
        self._n.waits += 1
        until = -1 if timeout_ns < 0 else self._now_ns + timeout_ns
        while not self._batch:
            with self._lock:
                self._sleeping = True
            timer = self._timers.next_ns()
            deadline = timer if timer >= 0 and (until < 0 or timer < until) else until
            self._asked_ns = now = time.monotonic_ns()
            left = -1 if deadline < 0 else max(deadline - now, 0)
            if self._has_work() or self._close_requested:
                left = 0
            found = self._poller.wait(None if left < 0 else min(left / 1e9, LONGEST_WAIT))
            self._sleeping = False
            if not found:  # all the time; but signal handlers may have run behind that
                self._asked_ns = min(now + max(left, 0), time.monotonic_ns())
            for fd, mask in found:
                if (owner := self._owners.get(fd)) is not None:
                    self._batch.append((owner, mask))
                else:
                    self._poller.unwatch(fd)  # an interrupt came amid _forget()
            if left == 0 or self._has_work() or self._close_requested:
                break
        self._now_ns = time.monotonic_ns()
        self._n.events += len(self._batch)

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

    def _dispatch(self) -> None:
        """Hand the events to their owners. (The compiled core's dispatch() works in groups, for speed.)"""
        batch = self._batch
        while batch and not self._close_requested:
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
                owner._on_ready(mask)
            if self._tick():
                return

    def _look_at_everything(self) -> None:
        """A turn was interrupted, perhaps amid the steps of a connection: go through them all again."""
        for owner in [*self._connections(), *self._datagrams()]:
            owner._starved = False  # its timer may be what was not set
            owner._schedule()
            if isinstance(owner, Connection) and owner._connecting and owner._deadline is not None:
                owner._deadline.notify_again()
        for conn in self._connections():
            conn._report_complete()  # the framer knows that, and its call may be what was interrupted
        self._plan_sweep()
        self._resume_accepts()
        for listener in self._listeners():
            listener._take_coming()
        self._look_again = False

    def _resume_read(self) -> None:
        """If something has come between a read and its connection: no other may get what was read."""
        if self._read and self._reading is not None:
            self._reading._resume_read()

    def _run_all_pending(self) -> None:
        work, self._pending, self._pending_done = self._pending, [], 0
        try:
            self._run_each_pending(work)
        finally:
            if self._pending_done < len(work):
                self._pending = work[self._pending_done :] + self._pending

    def _run_each_pending(self, work: list[ConnectionState | Datagram]) -> None:
        while self._pending_done < len(work) and not self._close_requested:
            work[self._pending_done]._run_pending()
            self._pending_done += 1
            if self._tick():
                return

    def _run_handshakes(self) -> None:
        """The next step of some connections that are not open yet."""
        end = time.monotonic_ns() + HANDSHAKES_NS
        for _ in range(len(self._handshakes)):
            if self._close_requested or not self._handshakes:
                return
            conn = self._handshakes[0]
            conn._handshaking = False
            del self._handshakes[0]
            if not conn._ended:
                conn._run_wire()
            if time.monotonic_ns() > end:
                return

    def _run_soon(self) -> None:
        self._begin_part()
        for _ in range(len(self._soon)):
            if self._close_requested or not self._soon:
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
        while not self._close_requested and (handle := timers.due(now, newest)) is not None:
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
                return  # by a signal handler or a finaliser just before the turn: nothing would end a wait
            self._notified = False
            self._begin_part()
            self._resume_read()
            if self._look_again:
                self._look_at_everything()
            self._run_all_pending()
            if not self._batch and not self._close_requested:
                self._wait(0 if self._notified or self._has_work() else timeout_ns)
            self._begin_part()
            self._dispatch()
            self._resume_read()
            self._reading = None
            if not self._batch:
                self._seen_ns = self._asked_ns
            self._run_handshakes()
            self._run_foreign()
            self._run_soon()
            self._run_timers()
            self._begin_part()
            self._run_all_pending()
        except BaseException:
            self._look_again = True
            raise
        finally:
            self._in_turn = False
            self._in_handler = None
            if self._close_requested and self._forks == state.forks:
                self._shut_down()

    def poll(self, timeout: float | None = None) -> list[tuple[Any, Report]]:
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

    def _take_ready(self) -> list[tuple[Any, Report]]:
        # An interrupt, or what else has run, leaves all as it is until the last lines, which call nothing.
        changes = -1
        while changes != self._report_changes:
            changes = self._report_changes
            conns: list[Any] = list(self._reports)
            result = [(conn, REPORTS[self._reports.get(conn, 0)]) for conn in conns]
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
            self._flush_at_once = not self._closed

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
            self._turn(max(deadline_ns - time.monotonic_ns(), 0))
            if time.monotonic_ns() >= deadline_ns:
                break

    def _running(self) -> bool:
        return self._serving

    def stop(self) -> None:
        """See the compiled core's stop."""
        self._check_fork()
        self._stopping = True
        self._wake()
