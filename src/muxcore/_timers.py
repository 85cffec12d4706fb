"""What may live here: timers, for both cores: a heap of calls by the monotonic clock, in nanoseconds."""

from __future__ import annotations

import heapq

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Call = tuple[Callable[..., object], tuple[Any, ...]]


class TimerHandle:
    """A call that is due at a time; made by `Mux.call_later` and `Mux.call_at`.

    cancelled: whether `cancel` came before the call.
    """

    __slots__ = ("_args", "_fn", "_timers", "_when_ns", "cancelled")

    def __init__(self, timers: Timers, when_ns: int, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._timers = timers
        self._when_ns = when_ns
        self._fn: Callable[..., object] | None = fn
        self._args = args
        self.cancelled = False

    @property
    def when(self) -> float:
        """The time it is due, in seconds of `Mux.time()`."""
        return self._when_ns / 1e9

    def cancel(self) -> None:
        """Do not call it; no effect if it was called or cancelled. What it would have called is released at once.

        Raises RuntimeError in a thread that the Mux is not bound to.
        """
        self._timers.cancel(self)

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled else "called" if self._fn is None else f"calls {self._fn!r}"
        return f"<muxcore.TimerHandle {state}, when={self.when:.6f}>"


class Timers:
    """The timers of one Mux. Equal times are due in the order in which they were added."""

    __slots__ = ("_cancelled", "_check_thread", "_wake_driver", "heap", "order")

    def __init__(self, check_thread: Callable[[], object], wake_driver: Callable[[], object]) -> None:
        self._check_thread = check_thread
        self._wake_driver = wake_driver
        self._cancelled = 0
        self.order = 0
        self.heap: list[tuple[int, int, TimerHandle]] = []

    def add(self, when_ns: int, fn: Callable[..., object], args: tuple[Any, ...]) -> TimerHandle:
        handle = TimerHandle(self, when_ns, fn, args)
        self.order += 1
        heapq.heappush(self.heap, (when_ns, self.order, handle))
        if self.heap[0][2] is handle:
            self._wake_driver()  # whoever waits in our place would do so for too long
        return handle

    def cancel(self, handle: TimerHandle) -> None:
        self._check_thread()
        if handle._fn is None:
            return
        handle.cancelled = True
        handle._fn, handle._args = None, ()
        self._cancelled += 1
        # A cancelled timer stays in the heap until it is due. Once they are the majority they are swept out, so their
        # memory is bounded by that of the living ones, at a constant cost each.
        if self._cancelled > 64 and 2 * self._cancelled > len(self.heap):
            self.heap[:] = [entry for entry in self.heap if not entry[2].cancelled]
            heapq.heapify(self.heap)
            self._cancelled = 0

    def next_ns(self) -> int:
        """When the next timer is due; -1 if there is none."""
        while self.heap:
            when_ns, _, handle = self.heap[0]
            if not handle.cancelled:
                return when_ns
            heapq.heappop(self.heap)
            self._cancelled -= 1
        return -1

    def pop_due(self, now_ns: int, newest: int) -> Call | None:
        """Take a call that is due. `newest`: the `order` when the round began; later ones wait for the next round, or
        a callback that sets a timer with delay 0 would keep the loop here."""
        when_ns = self.next_ns()
        if when_ns < 0 or when_ns > now_ns or self.heap[0][1] > newest:
            return None
        handle = self.heap[0][2]
        fn, args = handle._fn, handle._args
        assert fn is not None  # a cancelled one is never at the top here
        call = fn, args  # should there be no memory for it, the timer is still there
        heapq.heappop(self.heap)
        handle._fn, handle._args = None, ()
        return call

    def clear(self) -> None:
        self.heap.clear()
        self._cancelled = 0
