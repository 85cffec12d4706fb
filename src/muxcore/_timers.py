"""What may live here: timers, for both cores: a heap of calls by the monotonic clock, in nanoseconds."""

from __future__ import annotations

import heapq
from types import FunctionType, MethodType

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., object])
    Call = tuple[Callable[..., object], tuple[Any, ...]]


STEPS: set[object] = set()


def own_step(method: F) -> F:
    """Decorates what muxcore itself has called by a timer, `call_soon` or a watch. What it raises is no exception of a
    user's function."""
    STEPS.add(method)
    return method


def is_own_step(fn: object) -> bool:
    if type(fn) is not MethodType:
        return False
    method = fn.__func__
    return type(method) is FunctionType and method in STEPS


EVERYTHING = slice(None)  # made once: on CPython 3.11 to make one may start the collector


class TimerHandle:
    """A scheduled call, made by `Mux.call_later` and `Mux.call_at`.

    cancelled: whether it was cancelled before the call.
    """

    __slots__ = ("_call", "_timers", "_when_ns", "cancelled")

    def __init__(self, timers: Timers, when_ns: int, call: Call) -> None:
        self._timers: Timers = timers
        self._when_ns: int = when_ns
        self._call: Call | None = call  # None once it was taken or cancelled
        self.cancelled: bool = False

    @property
    def when(self) -> float:
        """The time of the call, in seconds of `Mux.time()`."""
        return self._when_ns / 1e9

    def cancel(self) -> None:
        """Cancel the call, and release its function and arguments. No effect after the call or an earlier cancel.

        Raises RuntimeError in a thread that the Mux is not bound to.
        """
        self._timers.cancel(self)

    def __repr__(self) -> str:
        call = self._call
        state = "cancelled" if self.cancelled else "called" if call is None else f"calls {call[0]!r}"
        return f"<muxcore.TimerHandle {state}, when={self.when:.6f}>"


class Timers:
    """The timers of one Mux. Equal times are due in the order in which they were added.

    A signal handler or a finalizer may come between any two lines here and add or cancel timers, or raise. So an entry
    leaves the heap only when its call was taken or cancelled, and what was read in one line is not used in the next.
    Two things that belong together are in one line, without a call in between: there CPython runs nothing else.
    """

    __slots__ = ("_check_thread", "_done", "_wake_driver", "heap", "order")

    def __init__(self, check_thread: Callable[[], object], wake_driver: Callable[[], object]) -> None:
        self._check_thread: Callable[[], object] = check_thread
        self._wake_driver: Callable[[], object] = wake_driver
        self._done: int = 0  # about how many in the heap were taken or cancelled
        self.order: int = 0
        self.heap: list[tuple[int, int, TimerHandle]] = []

    def add(self, when_ns: int, fn: Callable[..., object], args: tuple[Any, ...]) -> TimerHandle:
        handle = TimerHandle(self, when_ns, (fn, args))
        self.order = order = self.order + 1
        heapq.heappush(self.heap, (when_ns, order, handle))
        if self.heap and self.heap[0][2] is handle:
            self._wake_driver()  # a wait that began before would last too long
        return handle

    def cancel(self, handle: TimerHandle) -> None:
        self._check_thread()
        call = handle._call
        if call is None:
            return
        handle.cancelled = True
        handle._call = None
        self._done += 1
        # A cancelled timer stays in the heap until it is due. Once they are the majority they are swept out, so their
        # memory is bounded by that of the living ones, at a constant cost each.
        if self._done > 64 and 2 * self._done > len(self.heap):
            self._sweep()

    def _sweep(self) -> None:
        order = self.order
        living = [entry for entry in self.heap.copy() if entry[2]._call is not None]
        heapq.heapify(living)
        # If a timer was added meanwhile, all stays as it is: the next cancel() tries again.
        self.heap[EVERYTHING] = living if self.order == order else self.heap
        self._done = 0 if self.order == order else self._done

    def next_ns(self) -> int:
        """When the next timer is due; -1 if there is none."""
        while self.heap:
            entry = self.heap[0]
            if entry[2]._call is not None:
                return entry[0]
            self._drop(entry)
        return -1

    def _drop(self, entry: tuple[int, int, TimerHandle]) -> None:
        """Remove an entry that is done from the top, if it is still there."""
        top = heapq.heappop(self.heap) if self.heap and self.heap[0] is entry else None
        if top is entry:
            self._done -= 1
        elif top is not None:
            heapq.heappush(self.heap, top)

    def take(self, handle: TimerHandle) -> Call | None:
        """The call of a handle of due(), None if it was cancelled since."""
        self._done += 1
        call, handle._call = handle._call, None
        return call

    def due(self, now_ns: int, newest: int) -> TimerHandle | None:
        """The next handle that is due. `newest`: the `order` when the round began; later ones wait for the next round,
        or a callback that sets a timer with delay 0 would keep the loop here."""
        while self.heap:
            when_ns, order, handle = entry = self.heap[0]
            if handle._call is not None:
                return handle if when_ns <= now_ns and order <= newest else None
            self._drop(entry)
        return None

    def clear(self) -> None:
        self.heap.clear()
        self._done = 0
