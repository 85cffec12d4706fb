"""What may live here: the end of a Mux."""

from __future__ import annotations

import socket
import warnings
from _thread import get_ident
from functools import partial

from .._own import close_socket
from .._typing import TYPE_CHECKING
from .._watch import Watch
from ..errors import ConnectionClosed
from . import state
from .connection import Connection
from .listener import Listener
from .loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable

class End(Loop):
    """The part of a Mux that ends it."""

    __slots__ = ()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):  # it was set up, and not closed
            try:
                if self._forks == state.forks:
                    warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=1, source=self)
            finally:
                try:
                    self._signals.close()  # Python would write into a descriptor that has another owner
                finally:
                    self._close_descriptors()

    def close(self) -> None:
        """See the compiled core's close."""
        if self._closed:
            return
        if self._forks != state.forks:
            self._close_descriptors()
            return
        if self._on_other_thread() and self._owner_thread() is None:
            self._thread = get_ident()  # the thread that it was bound to has ended
        self._check_thread()
        if self._in_turn:
            self._close_requested = self._turn_over = True
            self._wake_driver()
        else:
            self._shut_down()

    def _shut_down(self) -> None:
        interrupt: BaseException | None = None
        self._closed = True
        try:
            steps = self._closing_steps()
        except BaseException as error:
            interrupt, steps = error, self._closing_steps()
        self._close_requested = False
        again: Callable[[], object] | None = None
        while steps:
            try:
                _run_all(steps)
            except BaseException as error:
                interrupt = error
                if isinstance(error, Exception) or again is steps[0]:
                    del steps[0]
                else:
                    again = steps[0]  # once more: an interrupt may have come as it began
        if interrupt is not None:
            raise interrupt

    def _closing_steps(self) -> list[Callable[[], object]]:
        steps: list[Callable[[], object]] = [listener.close for listener in self._listeners()]
        steps.append(self._refuse_output)
        steps.append(self._run_all_foreign)
        steps.extend(partial(self._close_now, conn) for conn in self._connections())
        owed = [owner._run_pending for owner in (*self._pending, *self._connections())]
        steps += 2 * owed  # twice, since on_close is owed even after an on_open that raised
        steps.extend(datagram.close for datagram in self._datagrams())  # the last, since on_close may send something
        return [*steps, *reversed(self._at_close), self._release]

    def _refuse_output(self) -> None:
        with self._lock:  # as in Connection._advance_close
            self._refuse_each()

    def _refuse_each(self) -> None:
        for conn in self._connections():
            conn._closing = True

    def _close_now(self, conn: Connection) -> None:
        try:
            conn._send_out()
            if conn._wire is not None and not (conn._handshake or conn._wire_shut or conn._has_output()):
                conn._shut_wire(conn._wire)
                conn._send_out()
            if conn.outbox_size:
                conn._abort(ConnectionClosed(f"the Mux was closed with {conn.outbox_size} bytes unsent", conn=conn))
            else:
                conn._reader = None
                conn._end(None)
        except BaseException:
            conn._abort()
            raise

    def _release(self) -> None:
        self._closed = True
        for owner in list(self._owners.values()):
            if isinstance(owner, socket.socket):
                close_socket(owner)
        with self._lock:
            close_socket(self._waker)
        self._poller.close()
        for queue in (
            self._owners, self._connecting, self._pending, self._reports, self._finished, self._accept_paused,
            self._batch, self._offloaded,
        ):
            queue.clear()
        self._soon.clear()
        self._foreign.clear()
        self._handshakes.clear()
        self._timers.clear()

    def _close_descriptors(self) -> None:
        """In a forked child, or for a Mux that was never closed: close(2) and nothing else."""
        for owner in [*self._owners.values(), *self._accept_paused, *self._connecting]:
            if isinstance(owner, (socket.socket, Watch)):
                continue
            if isinstance(owner, Connection):
                owner._closing = owner._ended = owner.closed = True
                owner._discard_outbox()
                if owner._connecting and owner._deadline is not None:
                    owner._deadline.abandon()
            elif isinstance(owner, Listener):
                owner._listening = owner._accept_paused = False
            sock, owner._sock = owner._sock, None
            if sock is not None:
                close_socket(sock)
        self._release()


def _run_all(steps: list[Callable[[], object]]) -> None:
    """The first that raises is left in front."""
    while steps:
        steps[0]()
        del steps[0]
