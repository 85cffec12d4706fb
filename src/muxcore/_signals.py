"""What may live here: signals, for both cores: handlers that the loop calls, and what ends a wait when one arrives."""

from __future__ import annotations

import signal
import socket
import threading

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._mux import Mux

_ours: list[int] = []  # what Muxes have passed to signal.set_wakeup_fd; the last one is in force


class Signals:
    """The signals of one Mux.

    One that arrives between the last look for signals and the wait would be slept through. So while there is a handler,
    or run() is in the main thread (a `with` block), Python writes into a socket of the set when a signal arrives. (Not
    an eventfd: it refuses Python's one byte.)
    """

    __slots__ = ("_before", "_ends", "_mux", "_users")

    def __init__(self, mux: Mux) -> None:
        self._mux = mux
        self._before: dict[int, Any] = {}  # by signal: the handler that ours has taken the place of
        self._ends: tuple[socket.socket, ...] = ()
        self._users = 0

    def add(self, sig: int, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        mux = self._mux
        number = _checked(sig)
        before = signal.getsignal(number)

        def caught(*_: object) -> None:
            if not mux.closed:  # close() puts the former handler back, but last
                mux.call_soon_threadsafe(fn, *args)

        try:
            signal.signal(number, caught)
        except OSError:
            raise ValueError(f"sig must be a signal that can be caught, not {number!r}") from None
        if number not in self._before:
            self._before[number] = before
            self.__enter__()

    def remove(self, sig: int) -> bool:
        number = _checked(sig)
        if number not in self._before:
            return False
        before = self._before[number]
        # None: that handler was not installed from Python, and cannot be put back from there.
        signal.signal(number, signal.SIG_DFL if before is None else before)
        del self._before[number]
        self.__exit__()
        return True

    def close(self) -> None:
        for number in list(self._before):
            self.remove(number)

    def __enter__(self) -> None:
        if not in_main_thread():
            return
        if not self._users:
            self._ends = socket.socketpair()
            for end in self._ends:
                end.setblocking(False)
            self._mux.add_reader(self._ends[0], _discard, self._ends[0])
            _take_wakeup(self._ends[1].fileno())
        self._users += 1

    def __exit__(self, *exc_info: object) -> None:
        if not in_main_thread():
            return
        self._users -= 1
        if self._users:
            return
        _give_wakeup_back(self._ends[1].fileno())
        try:
            if not self._mux.closed:
                self._mux.remove_reader(self._ends[0])  # refused in a forked child
        finally:
            for end in self._ends:
                end.close()


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _checked(sig: int) -> signal.Signals:
    if not in_main_thread():
        raise RuntimeError("signals are handled in the main thread only, and this is another")
    if not isinstance(sig, int):
        raise TypeError(f"sig must be a signal number, not {type(sig).__name__}")
    try:
        return signal.Signals(sig)
    except ValueError:
        raise ValueError(f"sig must be a signal of this system, not {sig}") from None


def _take_wakeup(fd: int) -> None:
    try:
        before = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    except ValueError:
        return  # a subinterpreter: signals are the main one's
    if before in (-1, *_ours):
        _ours.append(fd)
    else:
        signal.set_wakeup_fd(before)  # some other loop's, which handles signals by it, and drives us if anybody does


def _give_wakeup_back(fd: int) -> None:
    if fd not in _ours:
        return
    now = signal.set_wakeup_fd(-1)
    if now != fd:
        signal.set_wakeup_fd(now, warn_on_full_buffer=False)  # a later one's
    _ours.remove(fd)
    if now == fd and _ours:
        signal.set_wakeup_fd(_ours[-1], warn_on_full_buffer=False)


def _discard(sock: socket.socket) -> None:
    try:
        sock.recv(4096)
    except BlockingIOError:
        pass
