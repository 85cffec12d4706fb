"""What may live here: the Mux of the fallback: how it, and each object that it has, is made."""

from __future__ import annotations

import time

from .. import _address
from .._custom import CustomReader
from .._frame import SCANS, encode
from .._own import OwnSocket, SocketType, adopted, close_socket, shared
from .._stats import Stats
from .._typing import TYPE_CHECKING
from .._watch import READ
from ..errors import ConnectTimeout, from_call
from .connection import Connection
from .datagram import Datagram
from .docs import documented
from .end import End
from .listener import Listener
from .policy import Policy
from .pollers import CLOSED, EOF, OPENED

if TYPE_CHECKING:
    import socket
    from typing import Any

    from .._config import Limits
    from .._unix import SocketFile
    from ..handler import DatagramCallbacks

@documented
class PythonCore(End):
    """A Mux over one of POLLERS."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        raise TypeError("a Mux can be neither copied nor pickled")

    @property
    def backend(self) -> str:
        return self._backend

    @property
    def closed(self) -> bool:
        return self._closed

    def _policy(self, *settings: Any) -> Policy:
        policy = Policy(*settings)
        with self._lock:
            self._need_sweep(policy)
        return policy

    def _add_listener(
        self,
        sock: socket.socket,
        file: SocketFile | None,
        policy: Policy,
        max_connections: int | None,
        exclusive: bool,
    ) -> Any:
        # `exclusive` has no counterpart here: the processes that share a socket are all woken, and all but one of them
        # find nothing to accept.
        with self._lock:
            self._check()  # here and below: the arguments may have run code of the user's
            listener = Listener(self, sock, file, policy, max_connections)
            listener._listening = True
            policy.listener = listener
            self._pull_count += policy.pull
            try:
                self._take_over(listener, sock)
            except BaseException:
                if listener._sock is None and listener._listening:
                    listener._listening = False
                    self._pull_count -= policy.pull
                raise
        return listener

    def _add_connection(self, sock: socket.socket, peer: Any, policy: Policy) -> Any:
        custom = None if id(type(policy.framer)) in SCANS else CustomReader(policy.framer)
        with self._lock:
            self._check()
            conn = Connection(self, None, peer, policy)
            conn._custom = custom
            conn._interest = READ
            counted = False
            try:
                conn._schedule()
                self._n.connections += 1
                self._pull_count += policy.pull
                counted = True
                self._take_over(conn, sock)
            except BaseException:
                self._uncount(conn, counted)
                raise
            self._look_at_newcomer(conn)
        return conn

    def _uncount(self, conn: Connection, counted: bool) -> None:
        """It has got no socket, and is nothing."""
        if conn._sock is None and not conn.closed:
            conn.closed = conn._ended = True
            conn._reported = OPENED | EOF | CLOSED
            self._n.connections -= counted
            self._pull_count -= counted and conn._policy.pull

    def _take_over(self, owner: Connection | Datagram | Listener, sock: socket.socket) -> None:
        """The socket is the owner's from now on, unless this raises; and even then, should an interrupt come once the
        caller has it no more."""
        fd = SocketType.fileno(sock)
        try:
            self._register(owner, fd, READ)
            owner._sock = shared(sock, OwnSocket)
            SocketType.detach(sock)
        except BaseException:
            if SocketType.fileno(sock) >= 0 or owner._sock is None:  # the second: the owner had none
                own, owner._sock = owner._sock, None
                if own is not None:
                    SocketType.detach(own)
                if self._owners.get(fd) is owner:
                    self._forget(fd)
            raise
        if self._closed and owner._sock is not None:  # a signal handler closed the Mux before it had this socket
            close_socket(owner._sock)
            owner._sock = None
            self._forget(fd)
            raise RuntimeError("the Mux is closed")

    def _new_connection(self, address: Any, policy: Policy) -> Any:
        custom = None if id(type(policy.framer)) in SCANS else CustomReader(policy.framer)
        with self._lock:
            conn = Connection(self, None, address, policy)
            conn._custom = custom
            conn._connecting = True
        return conn

    def _attempting(self, conn: Any, attempt: Any) -> None:
        with self._lock:
            self._check()  # and the first turn, in another thread, may have been faster
            self._connecting.add(conn)
            conn._deadline = attempt
            self._count_connection(conn)

    def _connected(self, conn: Any, sock: socket.socket, peer: Any) -> None:
        if conn._ended:  # by what has run since its attempt came to an end
            sock.close()
            return
        self._take_over(conn, sock)
        conn._interest = READ
        conn._deadline = None
        conn.peer = peer
        conn._connecting = False
        conn._received_ns = conn._heard_ns = self._now_ns
        self._connecting.discard(conn)
        conn._schedule()
        if conn._handshake:
            conn._make_wire()

    def _connect_failed(self, conn: Any, error: BaseException) -> None:
        self._n.timeouts += isinstance(error, ConnectTimeout)
        conn._end(error)

    def _accepted(self, listener: Listener, entry: tuple[int, Any]) -> Connection | None:
        """A connection for what was accepted. An interrupt finds it in the listener's list or here, not in between."""
        coming, policy, n = listener._coming, listener._policy, self._n
        fd, peer = entry
        conn = Connection(self, None, _address.shown(peer), policy)
        if fd in self._owners:
            self._evict(self._owners[fd])  # other code has closed it
        sock = adopted(fd, OwnSocket)
        if not coming or coming[0] is not entry:  # a signal handler has closed the listener, and this with it
            SocketType.detach(sock)
            return None
        conn._sock = sock  # from here on there is no call
        self._owners[fd] = conn
        del coming[0]
        n.accepts += 1
        listener.connections += 1
        n.connections += 1
        self._pull_count += policy.pull
        return conn

    def _open_accepted(self, conn: Connection) -> None:
        listener: Any = conn.listener
        self._look_at_newcomer(conn)
        try:
            self._poller.watch(conn.fileno(), READ)
        except (OSError, ValueError) as error:  # select: a descriptor beyond its limit
            if not from_call(error):
                raise
            conn._end(error)
            return
        conn._interest = READ
        if conn._handshake:
            conn._make_wire()
            return
        if id(type(listener._policy.framer)) not in SCANS:
            conn._schedule()  # should it be interrupted
            conn._make_custom()
        conn._notify(listener._policy.on_open, OPENED)

    def _count_connection(self, conn: Connection) -> None:
        self._n.connections += 1
        self._pull_count += conn._policy.pull
        self._look_at_newcomer(conn)

    def _look_at_newcomer(self, conn: Connection) -> None:
        self._n.peak_connections = max(self._n.connections, self._n.peak_connections)
        if self._draining:
            conn._close()

    def _add_datagram(
        self,
        sock: socket.socket,
        file: SocketFile | None,
        remotes: tuple[Any, ...],
        callbacks: DatagramCallbacks,
        limits: Limits,
        max_size: int,
    ) -> Any:
        datagram = Datagram(self, sock, file, remotes, callbacks, limits, max_size)
        with self._lock:
            self._check()
            self._take_over(datagram, sock)
        return datagram

    def _datagrams(self) -> list[Any]:
        return [owner for owner in list(self._owners.values()) if isinstance(owner, Datagram)]

    def _connections(self) -> list[Any]:
        owners = [*self._owners.values(), *self._connecting]
        return [owner for owner in owners if isinstance(owner, Connection)]

    def _broadcast(self, connections: list[Any], message: Any) -> int:
        for conn in connections:
            if type(conn) is not Connection:
                raise TypeError(f"connections must be an iterable of connections, not of {type(conn).__name__}")
            if conn.mux is not self:
                raise ValueError(f"connections must be connections of this Mux, not {conn!r}")
        before, failed = self._n.messages_out, None
        framers = {conn._policy.framer for conn in connections if id(type(conn._policy.framer)) in SCANS}
        encoded = {framer: encode(framer, message) for framer in framers}
        for conn in connections:
            if conn._is_newcomer():
                continue
            try:
                framer = conn._policy.framer
                data = encoded.get(framer) if id(type(framer)) in SCANS else None
                conn._enqueue(conn._encoded(message) if data is None else data)
            except Exception as error:
                failed = error if failed is None else failed
        try:
            if failed is not None:
                raise failed
        finally:
            failed = None  # its frames hold this one
        return self._n.messages_out - before

    def _listeners(self) -> list[Any]:
        owners = [*self._owners.values(), *self._accept_paused]
        return [owner for owner in owners if isinstance(owner, Listener)]

    def _without_handler(self) -> int:
        return self._pull_count

    def _take_back(self, conn: Any) -> None:
        self._offloaded.pop(conn, None)
        conn._received_ns = self._now_ns
        conn._schedule()

    def _hold(self, conn: Any, on: bool) -> None:
        if conn._on_hold == on:
            return
        conn._on_hold = on
        if not on:
            conn._received_ns = time.monotonic_ns()
        conn._schedule()

    def _fail(self, conn: Any, error: Exception) -> None:
        conn._handler_raised(error)

    def _resume_accepts(self) -> None:
        for listener in list(self._accept_paused):
            if not listener._full():
                listener._resume_accept()

    def stats(self) -> Stats:
        """See the compiled core's stats."""
        return Stats(**vars(self._n))

    def fileno(self) -> int:
        raise ValueError(f"fileno: the {self._backend} backend has no descriptor for another loop to watch")
