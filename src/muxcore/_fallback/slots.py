"""What may live here: which descriptor is whose, and the descriptors of the user's that are watched."""

from __future__ import annotations

import socket

from .._log import log
from .._typing import TYPE_CHECKING
from .._watch import INVALID, READ, WRITE, Watch
from .connection import Connection
from .datagram import Datagram
from .listener import Listener
from .pollers import check_pollable
from .state import MuxState

if TYPE_CHECKING:
    from .._watch import Calls
    from .state import Owner

def log_eviction(owner: object, error: OSError) -> None:
    log.error("%r lost its descriptor: %s", owner, error)


class Slots(MuxState):
    """The part of a Mux that knows whose a descriptor is."""

    __slots__ = ()

    def _register(self, owner: Owner, fd: int, wanted: int) -> None:
        if fd in self._owners:
            self._evict(self._owners[fd])
        self._owners[fd] = owner  # first: what is watched and has no owner would be reported for ever
        try:
            self._poller.watch(fd, wanted)
        except BaseException:
            if self._owners.get(fd) is owner:
                self._forget(fd)
            raise

    def _forget(self, fd: int) -> None:
        self._owners.pop(fd, None)
        self._poller.unwatch(fd)

    def _evict(self, owner: Owner) -> None:
        """Other code closed this descriptor; its number may be a new socket's by now."""
        if isinstance(owner, Watch):
            fd = owner.fd
        elif isinstance(owner, socket.socket):
            fd = owner.detach()  # forgotten, it would close a descriptor that is not its own any more
        elif owner._sock is None:
            return
        else:
            fd, owner._sock = owner._sock.detach(), None
        self._forget(fd)
        error = OSError(f"descriptor {fd} was closed by other code")
        if isinstance(owner, Connection):
            owner._end(error)
            return
        if isinstance(owner, Listener):
            owner._listening = False
            self._pull_count -= owner._policy.pull
        elif isinstance(owner, Datagram):
            owner._discard()
        self._soon.append((log_eviction, (owner, error)))  # a log handler may do anything, which is too early now

    def _owner(self, fd: int) -> object:
        return self._owners.get(fd)

    def _watch(self, watch: Watch, wanted: int, calls: Calls) -> None:
        with self._lock:
            self._check()
            before = watch.calls
            watch.calls = {**before, **calls}  # meanwhile: nothing may be reported that calls nothing
            try:
                self._set_wanted(watch, wanted)
            except Exception:
                watch.calls = before
                raise
            watch.calls = calls

    def _set_wanted(self, watch: Watch, wanted: int) -> None:
        if wanted == 0:
            self._forget(watch.fd)
            return
        check_pollable(watch.fd)
        if self._owners.get(watch.fd) is watch:
            self._poller.watch(watch.fd, wanted)
        else:
            self._register(watch, watch.fd, wanted)

    def _on_watched(self, watch: Watch, reported: int) -> None:
        if reported & INVALID:
            self._evict(watch)
            return
        for direction, other in ((READ, WRITE), (WRITE, READ)):
            call = watch.calls.get(direction)
            is_watched = not self._close_requested and self._owners.get(watch.fd) is watch
            if is_watched and call is not None and reported & ~other:
                self._call_plain(*call)
