"""What may live here: signals, for both cores: handlers that the loop calls, and what ends a wait when one arrives."""

from __future__ import annotations

import os
import signal
import socket
import threading

from ._own import OwnSocket, moved
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._mux import Mux

# Socket pairs; a Mux has passed the second of each to signal.set_wakeup_fd, and one of these is in force. To collect a
# Mux closes none of them: in another thread, where set_wakeup_fd cannot be called, the number would stay in force, and
# soon be that of another file.
_ours: list[tuple[socket.socket, ...]] = []
_caught_ever: set[int] = set()  # signals


class Signals:
    """The signals of one Mux.

    One that arrives between the last look for signals and the wait would not end the wait. So while there is a handler,
    or run() is in the main thread (a `with` block), Python writes into a socket of the set when a signal arrives. (Not
    an eventfd: it refuses Python's one byte.)

    An exception of a signal handler may come between any two steps here. So each step can be made again, and a handler
    that is not in `caught` any more, or not yet, passes its signal on.
    """

    __slots__ = ("_ends", "_in_loop", "_pid", "_watched", "caught", "mux")

    def __init__(self, mux: Mux) -> None:
        self.mux = mux
        self.caught: dict[int, Caught] = {}  # by signal
        self._ends: tuple[socket.socket, ...] = ()
        self._watched: tuple[socket.socket, ...] = ()
        self._pid = os.getpid()
        self._in_loop = False

    def add(self, sig: int, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        number = _checked(sig)
        self._wake_by_signals()
        before: Any = signal.getsignal(number)
        if isinstance(before, Caught) and before is self.caught.get(number):
            before.call = fn, args
            return
        _caught_ever.add(number)
        handler = Caught(self, number, former(before), fn, args)
        self.caught[number] = handler  # first: what is in force, close() has to put back
        try:
            found = signal.signal(number, handler)
            if found is not before:  # a signal handler has come meanwhile, and has put its own there
                handler.before = former(found)
        except OSError:
            self._put_back(handler)
            raise ValueError(f"sig must be a signal that can be caught, not {number}") from None
        finally:
            if self.mux.closed:  # by a signal handler, meanwhile
                self.close()
            self._update()

    def remove(self, sig: int) -> bool:
        number = _checked(sig)
        handler = self.caught.get(number)
        if handler is not None:
            self._put_back(handler)
        self._update()
        return handler is not None

    def close(self) -> None:
        self._in_loop = False
        while self.caught:
            for handler in list(self.caught.values()):
                self._put_back(handler)
        self._update()

    def _put_back(self, handler: Caught) -> None:
        """Only then it leaves `caught`: an interrupt in between leaves it where it is found again."""
        handler.put_back()
        if self.caught.get(handler.number) is handler:
            del self.caught[handler.number]

    def __enter__(self) -> None:
        if in_main_thread():
            self._in_loop = True
            try:
                self._wake_by_signals()
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *exc_info: object) -> None:
        self._in_loop = False
        self._update()

    def _wake_by_signals(self) -> None:
        try:
            self._take_place()
        except Exception:
            if not self.mux.closed:
                raise
            self._update()  # a signal handler has closed it meanwhile, and the sockets with it
            raise RuntimeError("the Mux is closed") from None

    def _take_place(self) -> None:
        while True:
            ends = self._ends
            if not ends or ends[0].fileno() < 0:
                ends = self._ends = tuple(moved(end, OwnSocket) for end in socket.socketpair())
            if self._watched is not ends:
                self.mux.add_reader(ends[0], _discard, ends[0])
                self._watched = ends
            _take_wakeup(ends)  # each time: the place may be another Mux's by now
            if self._ends is ends:
                return
            _give_wakeup_back(ends)  # a signal handler has closed the Mux or removed its last handler meanwhile

    def _update(self) -> None:
        """Undo that unless it is needed."""
        ends = self._ends
        if self.caught or self._in_loop or not ends or not in_main_thread():
            return
        _give_wakeup_back(ends)
        try:
            if self._pid == os.getpid():  # a forked child may only close its copies
                self.mux.remove_reader(ends[0])
        except (RuntimeError, ValueError):
            pass  # the Mux is closed, or has been here in a signal handler
        for end in ends:
            end.close()
        if self._ends is ends:
            self._ends = ()


class Caught:
    """A signal handler of a Mux, in force or below a later one."""

    __slots__ = ("_pid", "_signals", "before", "call", "number")

    def __init__(
        self, signals: Signals, number: int, before: Any, fn: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        self._signals = signals
        self._pid = os.getpid()
        self.number = number
        self.before = before  # the handler that it replaces
        self.call = fn, args

    def __call__(self, number: int, frame: Any) -> None:
        if self.is_live():
            if not self._signals.mux.closed:  # close() puts the former handler back, but last
                fn, args = self.call
                self._signals.mux.call_soon_threadsafe(fn, *args)
            return
        before = former(self.before)
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            now = signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            _replace(number, signal.SIG_DFL, now)  # reached only if the default action does not end the process

    def is_live(self) -> bool:
        return self._signals.caught.get(self.number) is self and self._pid == os.getpid()

    def put_back(self) -> None:
        """Restore the former handler, if this one is still in force or below a later one."""
        if not in_main_thread():
            return  # it passes its signals on
        now: Any = signal.getsignal(self.number)
        if now is self:
            now = _replace(self.number, self, former(self.before))
        while isinstance(now, Caught):
            if now.before is self:
                now.before = self.before
            now = now.before


def _replace(number: int, expected: Any, handler: Any) -> Any:
    """Put a handler in the place of `expected`, unless a signal handler that comes amid this has put its own there.
    Returns what was there."""
    first = found = signal.signal(number, handler)
    while found is not expected and found is not None:
        expected, handler = handler, found
        found = signal.signal(number, handler)
    return first


def former(handler: Any) -> Any:
    """A handler that may be put back: not that of a Mux that has removed it, or of a parent process."""
    while isinstance(handler, Caught) and not handler.is_live():
        handler = handler.before
    # None: that handler was not installed from Python, and cannot be put back from there.
    return signal.SIG_DFL if handler is None else handler


def _after_fork_in_child() -> None:
    """The child ends by the signals that end it without us, and does not write into the parent's socket."""
    for number in _caught_ever:
        now = signal.getsignal(number)
        if isinstance(now, Caught):
            signal.signal(number, former(now))
    for ends in list(_ours):
        _give_wakeup_back(ends)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _checked(sig: int) -> int:
    if not in_main_thread():
        raise RuntimeError("signals are handled in the main thread only, and this is another")
    if not isinstance(sig, int):
        raise TypeError(f"sig must be a signal number, not {type(sig).__name__}")
    number = int(sig)
    if number not in signal.valid_signals():
        raise ValueError(f"sig must be a signal of this system, not {number}")
    return number


def _take_wakeup(ends: tuple[socket.socket, ...]) -> None:
    if (fd := ends[1].fileno()) < 0:
        return
    if ends not in _ours:
        _ours.append(ends)
    try:
        before = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    except ValueError:
        _forget(ends)  # a subinterpreter: signals are the main one's
        return
    # Some other loop's, which handles signals by it, and may drive us; or a signal handler has closed us meanwhile.
    if before not in (-1, *(end.fileno() for _, end in _ours)) or ends not in _ours or ends[1].fileno() != fd:
        signal.set_wakeup_fd(before)
        _forget(ends)


def _give_wakeup_back(ends: tuple[socket.socket, ...]) -> None:
    if ends not in _ours:
        return
    others = [end.fileno() for _, end in _ours if end is not ends[1]]
    now = signal.set_wakeup_fd(others[-1] if others else -1, warn_on_full_buffer=False)
    if now != ends[1].fileno():
        signal.set_wakeup_fd(now, warn_on_full_buffer=False)  # another Mux's, or another loop's
    _forget(ends)


def _forget(ends: tuple[socket.socket, ...]) -> None:
    if ends in _ours:  # else a signal handler has done the same
        _ours.remove(ends)


def _discard(sock: socket.socket) -> None:
    try:
        sock.recv(4096)
    except BlockingIOError:
        pass
