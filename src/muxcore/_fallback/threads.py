"""What may live here: the check of the calling thread; calls from other threads; the wakeup."""

from __future__ import annotations

import time
from _thread import get_ident

from .._owner import what_lives_as_long_as_this_thread
from .._typing import TYPE_CHECKING
from ..errors import from_call
from . import state
from .slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def call_user(*_: object) -> None:
    """Marks a call of the user's among those of other threads."""


class Threads(Slots):
    """The part of a Mux that other threads call."""

    __slots__ = ()

    def _on_other_thread(self) -> bool:
        return self._thread not in (0, get_ident())

    def _check_fork(self) -> None:
        if self._forks != state.forks:
            raise RuntimeError("this Mux was made before fork(): a child has to make its own")

    def _check_thread(self) -> None:
        self._check_fork()
        if self._on_other_thread():
            raise RuntimeError(
                "this Mux belongs to the thread that first ran it: from another, use call_soon_threadsafe"
            )

    def _check(self) -> None:
        if not self._closed:
            self._check_thread()
        if self._closed or self._close_requested:
            raise RuntimeError("the Mux is closed")

    def _begin(self, method: str) -> None:
        self._check()
        self._bind()
        if self._in_turn or self._polling:  # the latter: by a finalizer, while poll() makes its list
            raise RuntimeError(f"{method}() was called inside a callback of the same Mux")
        self._flush_at_once = False
        self._now_ns = time.monotonic_ns()

    def _bind(self) -> None:
        with self._lock:  # waits for calls that other threads began before the Mux had one
            self._check_thread()  # another thread may have been faster
            self._owner_thread = what_lives_as_long_as_this_thread()
            self._thread = get_ident()

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
        self._from_foreign(call_user, (fn, args))

    def _wake(self) -> None:
        # The loop sets `sleeping` before it looks for work for the last time: it sees what was queued, or we the flag.
        with self._lock:
            wanted, self._sleeping = self._sleeping, False
            if wanted:
                self._signal_waker()  # not after _release, when its number may be of another socket

    def _signal_waker(self) -> None:
        try:
            self._waker.send(b"\0")
        except OSError as error:  # full: it is readable already; closed: no wait is left
            if not from_call(error):
                raise

    def _wake_driver(self) -> None:
        # A signal handler, behind which select(2) and its like go on with their wait (PEP 475).
        if self._sleeping:
            self._signal_waker()

    def _run_foreign(self) -> None:
        self._begin_part()
        for _ in range(len(self._foreign)):
            if self._close_requested or self._tick():
                return
            self._run_first_foreign()

    def _run_first_foreign(self) -> None:
        """A user's call leaves the queue in the line before it is made; what is muxcore's own is done a second time, if
        an interrupt has come amid it, or leaves the queue itself, in the line in which it is done."""
        entry = fn, args = self._foreign[0]
        if fn is not call_user:
            fn(*args)
            if self._foreign and self._foreign[0] is entry:
                del self._foreign[0]
            return
        fn, args = args
        closed = self._closed
        del self._foreign[0]
        if closed:
            return
        try:
            fn(*args)
        except Exception as error:
            self._call_raised(fn, error)
        self._check_fork()

    def _run_all_foreign(self) -> None:
        while self._foreign:
            self._run_foreign()
