"""What may live here: accepting, and the pause when there are no descriptors."""

from __future__ import annotations

import errno
import os
from operator import itemgetter
from socket import close

from .. import _address
from .._log import log
from .._own import SocketType, adopted
from .._timers import own_step
from .._typing import TYPE_CHECKING
from .._watch import INVALID, READ
from .._wiring import change_context
from ..errors import ConnectionClosed, from_call
from .docs import documented
from .syscalls import CLIENT_GONE, NO_RESOURCES, discard_socket, ensure_nonblocking

if TYPE_CHECKING:
    import socket
    from typing import Any, Self

    from .._unix import SocketFile
    from .mux import PythonCore
    from .policy import Policy

ACCEPT_BUDGET = 64
FIRST_PAUSE_NS = 10_000_000
LONGEST_PAUSE_NS = 1_000_000_000


@documented
class Listener:

    __slots__ = (
        "__weakref__", "_accept_paused", "_coming", "_file", "_listening", "_max_accepted", "_pause_ns",
        "_paused_until_ns", "_policy", "_sock", "address", "connections", "mux",
    )

    def __new__(cls, *args: Any) -> Self:
        if not args:
            raise TypeError("listeners are made by Mux.listen")
        return super().__new__(cls)

    def __init__(
        self,
        mux: PythonCore,
        sock: socket.socket,
        file: SocketFile | None,
        policy: Policy,
        max_connections: int | None,
    ) -> None:
        self._sock: socket.socket | None = None  # None until this object owns one
        self.mux = mux
        self.address: Any = _address.shown(SocketType.getsockname(sock))
        self.connections = 0
        self._file = file
        self._policy = policy
        self._max_accepted = max_connections
        self._pause_ns = self._paused_until_ns = 0
        self._coming: list[tuple[int, Any]] = []  # descriptors that were accepted and belong to no connection yet
        self._listening = self._accept_paused = False

    def __repr__(self) -> str:
        return f"<muxcore.Listener {'closed' if self.closed else 'open'}, address={self.address!r}>"

    @property
    def closed(self) -> bool:
        return self._sock is None

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else -1

    def dup(self) -> socket.socket:
        self.mux._check_thread()
        if self._sock is None:
            raise ConnectionClosed(f"dup: {self!r} is closed")
        fd = os.dup(self._sock.fileno())
        try:
            sock: socket.socket = adopted(fd)
        except BaseException:
            os.close(fd)
            raise
        return sock

    @property
    def tls(self) -> Any:
        return None if self._policy.wiring is None else self._policy.wiring.tls

    @tls.setter
    def tls(self, context: Any) -> None:
        self.mux._check_thread()
        change_context(self._policy.wiring, context)

    def close(self) -> None:
        self.mux._check_thread()
        sock = self._sock
        if sock is None:
            return
        self._stop_listening()
        self._rest_is_over()
        self.mux._pull_count -= self._policy.pull
        self._sock = None
        try:
            self._discard_coming()
        finally:
            discard_socket(sock, self._file)

    def _discard_coming(self) -> None:
        while self._coming:  # in C from end to end: an interrupt would leak one, or close it twice
            any(map(close, map(itemgetter(0), map(self._coming.pop, (0,)))))

    def _start_listening(self) -> None:
        try:
            self._listening = True
            self.mux._register(self, self.fileno(), READ)
        except BaseException:
            self._stop_listening()
            raise

    def _stop_listening(self) -> None:
        if self._listening:
            self.mux._forget(self.fileno())
            self._listening = False

    def _on_ready(self, reported: int) -> None:
        if reported & INVALID:
            self.mux._evict(self)
            return
        ensure_nonblocking(self._sock)
        for _ in range(ACCEPT_BUDGET):
            if not self._listening or self.mux._close_requested:
                return
            if self._full():
                self._pause_accept(0)
                return
            ours = self._sock
            if ours is None:
                return
            try:
                if not self._coming:
                    # In one call: one of socket.accept in Python would lose the descriptor to an interrupt.
                    self._coming.extend(map(SocketType._accept, (ours,)))  # type: ignore[attr-defined]
            except OSError as error:
                if not from_call(error):
                    raise
                if isinstance(error, BlockingIOError):
                    self._pause_ns = 0
                    return
                if error.errno in CLIENT_GONE:
                    continue
                if self._sock is ours:  # else a signal handler has closed it
                    self._accept_failed(error)
                return
            self._take_coming()
            if self.mux._look_at_clock():  # each on_open may have taken long
                return

    def _take_coming(self) -> None:
        """Serve what was accepted: one, unless an interrupt came before."""
        while self._coming:
            if (conn := self.mux._accepted(self, self._coming[0])) is not None:
                self.mux._open_accepted(conn)

    def _full(self) -> bool:
        return self._max_accepted is not None and self.connections >= self._max_accepted

    def _accept_failed(self, error: OSError) -> None:
        is_first = self._pause_ns == 0
        self._pause_ns = FIRST_PAUSE_NS if is_first else min(2 * self._pause_ns, LONGEST_PAUSE_NS)
        self._pause_accept(self._pause_ns)
        if is_first:
            log.error("%r: accept failed, pausing: %s", self, error.strerror)
            if error.errno not in NO_RESOURCES:
                log.error("%r: accept(2) does not document this error; muxcore will retry", self)

    def _pause_accept(self, ns: int) -> None:
        self.mux._n.accept_pauses += 1
        self._accept_paused = True  # and on the list before it listens no more: an interrupt may come between
        if self not in self.mux._accept_paused:
            self.mux._accept_paused.append(self)
        self._stop_listening()
        self._paused_until_ns = until_ns = self.mux._now_ns + ns if ns else 0
        if ns:
            self.mux._add_timer(until_ns, self._pause_over, (until_ns,))

    @own_step
    def _pause_over(self, until_ns: int) -> None:
        """Only the timer of the last pause resumes it: see the compiled core's."""
        if self._paused_until_ns == until_ns:
            self._resume_accept()

    def _rest_is_over(self) -> None:
        self._accept_paused = False
        if self in self.mux._accept_paused:
            self.mux._accept_paused.remove(self)

    def _resume_accept(self) -> None:
        if not self._accept_paused:
            return
        failed = None
        try:
            self._stop_listening()  # where an interrupt came amid a pause's beginning, or amid this
            self._start_listening()
        except (OSError, ValueError) as error:
            if not from_call(error):
                raise
            # A ValueError: select on Windows, and other sockets have filled its table meanwhile.
            failed = error if isinstance(error, OSError) else OSError(errno.EMFILE, str(error))
        self._rest_is_over()
        if failed is not None and self._sock is not None:  # else a signal handler has closed it
            self._accept_failed(failed)
