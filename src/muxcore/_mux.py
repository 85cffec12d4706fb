"""What may live here: the Mux as its user sees it: what is not hot, in plain Python, once for all cores.

A core is a subclass (see _impl.py) that adds the turn of the loop. What this file needs of it is listed in the class.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial

from . import _wiring
from ._config import Limits, Timeouts, as_limits, as_timeouts, check_callable, check_int, check_seconds, to_ns
from ._connections import Connections
from ._frame import check_framer
from ._timers import TimerHandle, Timers
from ._typing import TYPE_CHECKING, Protocol
from ._watch import READ, WRITE, Watch, as_descriptor
from .errors import from_call
from .handler import Callbacks, DatagramCallbacks, observed, resolve, resolve_datagram

if TYPE_CHECKING:
    import socket
    import ssl
    from collections import deque
    from collections.abc import Callable, Collection, Iterable
    from concurrent.futures import Executor, Future
    from types import TracebackType
    from typing import Any, Self

    from ._address import Address
    from ._connect import Attempt, Names
    from ._epoll import Connection, Datagram, Listener
    from ._protocols import DatagramHandlerLike, HandlerLike
    from ._report import Report
    from ._signals import Signals
    from ._stats import Stats
    from ._unix import SocketFile
    from ._watch import Calls
    from ._wiring import Wiring
    from .aio import Attachment

FAR = 9e9  # seconds; in nanoseconds it still fits into 64 bits
SLOW_HANDLER = 0.1  # seconds, in development mode
STATE = ("_at_close", "_attachment", "_executor", "_names", "_signals", "_slow_handler")  # slots of a core


class _NoSubclass:
    """The first base of a class that _over() makes: the __init_subclass__ of the user's class is not called for it."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        pass


def _over(core: type[Mux], cls: type[Mux]) -> type[Mux]:
    """A user's subclass, with that core."""
    made: dict[type[Mux], type[Mux]] = vars(cls).get("_with_core") or {}
    if core not in made:
        names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        try:
            made[core] = type(cls.__name__, (_NoSubclass, cls, core), names)
        except TypeError:
            raise TypeError(f"{cls.__name__} cannot be a Mux: it has __slots__, or another base in C") from None
        cls._with_core = made  # type: ignore[attr-defined]
    return made[core]


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Mux:
    """Serves many sockets in one thread: the thread of its first `poll` or `run`.

    backend: "auto" (the value of MUXCORE_BACKEND, or the best that is available), "epoll", "poll", "select" or
        "kqueue".
    max_events: the most events of one wait.
    read_size: bytes of one recv(2); one buffer serves all connections. Without a framer, if a peer fills the buffer and
        accepts the replies, the next recv of the turn is larger by `Limits.high`, at most four times as large
        (compiled core).
    read_budget: bytes read from one connection before other connections are served.
    busy_poll: seconds to poll the kernel before a wait sleeps. It uses a processor core, and saves the microseconds of
        the wakeup (compiled core; the fallback sleeps at once).
    slow_handler: seconds. A callback that blocks the loop for longer is logged as a warning on the logger `muxcore`.
        None: 0.1 in Python's development mode (`python -X dev`), otherwise off. That mode also warns of a callback that
        returns a value, such as a reply that it should have sent.

    Any thread may call `call_soon_threadsafe`, `stop`, `stats` and some methods of Connection. Other methods raise
    RuntimeError in another thread, and all methods raise it in a forked child. Raises ValueError for a backend that the
    system does not have.
    """

    if not TYPE_CHECKING:
        __slots__ = ()

    @staticmethod
    def _resolve_backend(backend: str) -> tuple[str, type[Mux]]:
        """A backend and its core; _impl.py, which knows what there is, puts its own function here."""
        raise NotImplementedError

    if TYPE_CHECKING:  # what a core adds: the seam
        _at_close: list[Callable[[], object]]  # what close() does last, from the end; each may be called again
        _attachment: Attachment | None  # to the loop that drives it
        _executor: Executor | None
        _names: Names  # that are being looked up
        _slow_handler: float | None
        _signals: Signals
        _offloaded: dict[Connection, Any]
        """Connections whose messages are worked on in other threads: they get no on_eof, and drain() closes the
        value in their place, which closes the connection after that work."""

        _timers: Timers
        _soon: deque[tuple[Callable[..., object], tuple[Any, ...]]]

        def _set_up(
            self, backend: str, max_events: int, read_size: int, read_budget: int, busy_poll_ns: int
        ) -> None: ...
        def _check(self) -> None:
            """Raise RuntimeError unless this thread may use the Mux and it is open."""

        def _policy(
            self,
            handler: object,
            callbacks: Callbacks,
            limits: Limits,
            timeouts: Timeouts,
            half_open: bool,
            framer: Any,
            outbound: bool,
            wiring: Wiring | None,
        ) -> Any: ...
        def _add_listener(
            self,
            sock: socket.socket,
            file: SocketFile | None,
            policy: Any,
            max_connections: int | None,
            exclusive: bool,
        ) -> Listener:
            """Serve a listening socket. OSError if it cannot be watched; then it still belongs to the caller."""

        def _add_connection(self, sock: socket.socket, peer: Any, policy: Any) -> Connection: ...
        def _new_connection(self, address: Any, policy: Any) -> Connection:
            """A connection without a socket, which is in no table yet."""

        def _attempting(self, conn: Connection, attempt: Attempt) -> None:
            """Count the connection as open; a call of _connected or _connect_failed follows. If `conn` ends before it,
            the core cancels the attempt."""

        def _connected(self, conn: Connection, sock: socket.socket, peer: Any) -> None:
            """Give it its socket. OSError if that cannot be watched; then it still belongs to the caller."""

        def _connect_failed(self, conn: Connection, error: BaseException) -> None: ...

        def _add_datagram(
            self,
            sock: socket.socket,
            file: SocketFile | None,
            remotes: tuple[Any, ...],
            callbacks: DatagramCallbacks,
            limits: Limits,
            max_size: int,
        ) -> Datagram: ...
        def _begin(self, method: str) -> None:
            """Bind the thread; RuntimeError if the Mux is closed or `method` was called inside a callback."""

        def _serve(self) -> None: ...
        def _serve_until_empty(self, deadline_ns: int) -> bool:
            """Run until the last connection has ended. Returns whether that was before the deadline and `stop`."""

        def _take_back(self, conn: Connection) -> None:
            """The work that was offloaded is done."""

        def _hold(self, conn: Connection, on: bool) -> None:
            """Pause (True) or resume (False) reading and delivery, independently of pause_reading."""

        def _fail(self, conn: Connection, error: Exception) -> None:
            """A handler has raised: log it, and close its connection."""

        def _without_handler(self) -> int:
            """The number of listeners and connections without a handler, which only poll() can serve."""

        def _has_judged(self, due: int, /) -> bool: ...
        def _running(self) -> bool: ...
        def _listeners(self) -> list[Listener]: ...
        def _connections(self) -> list[Connection]: ...
        def _datagrams(self) -> list[Datagram]: ...
        def _broadcast(self, connections: list[Connection], message: Any) -> int: ...
        def _bind(self) -> None:
            """Bind the Mux to this thread."""

        def _owner(self, fd: int) -> object:
            """The object of this Mux that has the descriptor; None if there is none."""

        def _watch(self, watch: Watch, wanted: int, calls: Calls) -> None:
            """Make these calls at the wanted events; 0 removes the watch. OSError if it cannot be watched."""

        def _batch_output(self) -> None: ...
        def _call_foreign(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None: ...
        def _wake_driver(self) -> None:
            """Something was queued outside of a turn: wake the loop that drives this Mux."""

    def __new__(cls, *args: Any, backend: str = "auto", **options: Any) -> Self:
        # As pathlib.Path does: the class is chosen here, and __init__ runs on an instance of what was chosen.
        if hasattr(cls, "_set_up"):  # it has a core
            return object.__new__(cls)
        core = cls._resolve_backend(backend)[1]
        return core.__new__(core if cls is Mux else _over(core, cls), backend=backend)  # type: ignore[return-value]

    def __init__(
        self,
        *,
        backend: str = "auto",
        max_events: int = 1024,
        read_size: int = 65536,
        read_budget: int = 262144,
        busy_poll: float = 0.0,
        slow_handler: float | None = None,
    ) -> None:
        max_events = check_int("max_events", max_events, 1, 1 << 20)
        read_size = check_int("read_size", read_size, 1, 1 << 30)
        read_budget = check_int("read_budget", read_budget, 1)
        busy_poll_ns = to_ns(check_seconds("busy_poll", busy_poll))
        if slow_handler is not None:
            slow_handler = check_seconds("slow_handler", slow_handler)
        elif sys.flags.dev_mode:
            slow_handler = SLOW_HANDLER
        if hasattr(self, "_at_close"):  # before what it refers to is forgotten
            raise RuntimeError("Mux.__init__() must be called only once")
        name, core = self._resolve_backend(backend)
        if not isinstance(self, core):
            raise TypeError(f"backend must also be an argument of {type(self).__name__}(): it selects the class")
        # Imported by the first Mux, not by `import muxcore`: they take longer to import than the whole package. All of
        # them now, since a process without a descriptor left could not import logging to report it.
        import concurrent.futures.thread  # noqa: F401
        import inspect  # noqa: F401
        import logging  # noqa: F401
        import traceback

        from . import _address, _connect  # noqa: F401 -- the cores use the former
        from ._signals import Signals

        traceback.format_exception(ValueError())  # since 3.15 the first one that is formatted imports more for it
        self._slow_handler = slow_handler
        self._at_close = [self._detach]
        self._attachment = None
        self._executor = None
        self._names = _connect.Names(self)
        self._at_close.append(self._names.close)
        self._signals = Signals(self)
        self._at_close.append(self._signals.close)
        self._set_up(name, max_events, read_size, read_budget, busy_poll_ns)

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "running" if self._running() else "open"
        return f"<muxcore.Mux {self.backend} {state}, {self.stats().connections} connections>"

    @property
    def connections(self) -> Collection[Connection]:
        """A live view of the connections, those in a handshake included, for iteration, `len()` and `in`."""
        self._check()
        return Connections(self)

    def time(self) -> float:
        """Seconds of the monotonic clock, which the timers use."""
        return time.monotonic()

    # -- what the core does; _impl.py gives these the texts of its methods

    @property
    def backend(self) -> str:
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        raise NotImplementedError

    def poll(self, timeout: float | None = None) -> list[tuple[Connection, Report]]:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def fileno(self) -> int:
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError

    # -- sockets

    def listen(
        self,
        address: Address | socket.socket,
        handler: HandlerLike | None = None,
        *,
        framer: Any = None,
        backlog: int = 4096,
        reuse_port: bool = False,
        exclusive: bool = False,
        mode: int | None = None,
        half_open: bool = False,
        max_connections: int | None = None,
        nodelay: bool = True,
        keepalive: float | None = None,
        user_timeout: float | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        tls: ssl.SSLContext | None = None,
        proxy_protocol: Iterable[str] | None = None,
    ) -> Listener:
        """Listen on an address, or on a bound stream socket (which then belongs to the Mux), and return the Listener.

        address: (host, port), (host, port, flowinfo, scope_id) or a path. With port 0 the system selects a free port;
            `listener.address` has the actual one. Host None is every address of IPv4 and IPv6, or of IPv4 where the
            system has no IPv6. A host may have a zone ("fe80::1%eth0") or be IPv4-mapped. A path is a Unix socket;
            `close` removes its file, and a stale socket file is replaced. A path that begins with a NUL is an abstract
            name, without a file (Linux): a str as `os.fsdecode` makes it, or, as an argument, bytes.
        handler: see Handler. None: pull style, `poll` returns the connections.
        framer: finds the end of a message: Lines, Delimiter, LengthPrefix, Fixed, Resp, or a function that makes a
            Framer of your own. None: a message is the bytes of one read.
        backlog: connections that may wait to be accepted; the kernel may reduce it (net.core.somaxconn).
        reuse_port: several processes listen on the port, each with its own backlog (SO_REUSEPORT).
        exclusive: wake only one of the processes that watch the same socket (EPOLLEXCLUSIVE).
        mode: permission bits of a path's file, such as 0o660 (clients need write permission). None: the umask decides.
        half_open: do not close at the peer's FIN; the connection can send until you close it.
        max_connections: the most connections that are open at once; further clients wait in the backlog.
        nodelay: set TCP_NODELAY, so that small output leaves at once.
        keepalive: seconds without traffic before TCP probes the peer; None is the system's default.
        user_timeout: seconds until TCP gives up on a peer that acknowledges or accepts no output (TCP_USER_TIMEOUT).
        tls: a context for servers. `on_open` is called after the handshake; if that fails, only `on_close` is.
        proxy_protocol: networks of load balancers, whose connections begin with a PROXY header: ["10.0.0.0/8", "unix"].

        Raises TypeError or ValueError for a bad argument, socket.gaierror for an unknown name, OSError if the address
        cannot be bound. Nothing is changed then.
        """
        from . import _address  # late, as in __init__
        wiring = _wiring.listening(tls, proxy_protocol)
        policy = self._checked_policy(handler, framer, half_open, limits, timeouts, wiring=wiring)
        tcp = _address.Tcp(nodelay, keepalive, user_timeout)
        backlog = min(check_int("backlog", backlog, 0), 0x7FFFFFFF)
        if max_connections is not None:
            max_connections = check_int("max_connections", max_connections, 1)
        sock, file = _address.listening_socket(address, backlog=backlog, reuse_port=reuse_port, mode=mode, tcp=tcp)
        try:
            return self._add_listener(sock, file, policy, max_connections, bool(exclusive))
        except BaseException:
            if sock is not address:
                _address.discard(sock, file)
            raise

    def connect(
        self,
        address: Address,
        handler: HandlerLike | None = None,
        *,
        framer: Any = None,
        local_address: tuple[str, int] | None = None,
        half_open: bool = False,
        nodelay: bool = True,
        keepalive: float | None = None,
        user_timeout: float | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        tls: ssl.SSLContext | bool | None = None,
        server_hostname: str | None = None,
    ) -> Connection:
        """Start to connect, and return the Connection, which accepts output at once.

        On success `on_open` is called. On failure only `on_close(conn, exc)` is called, with an OSError,
        socket.gaierror, or ConnectTimeout after `Timeouts.connect` seconds, the lookup of the name included. A TLS
        handshake has a time of its own, `Timeouts.handshake`.

        address: as for `listen`. A pool of threads resolves names; the interpreter's exit does not wait for it. The
            addresses of a name are tried as RFC 8305 says: IPv6 first, then one more every quarter of a second, until
            one connects.
        local_address: (host, port) to connect from; the host is a literal address, port 0 is any port.
        tls: a context for clients, or True for `ssl.create_default_context()`. `on_open` is called after the handshake.
        server_hostname: the name that the server's certificate must have, and that SNI sends; None: the address's host.

        Other arguments as for `listen`. `Limits.autopause` is off by default, since two ends that both pause could wait
        for each other. Raises TypeError or ValueError for a bad argument.
        """
        from . import _address, _connect

        address, targets = _connect.check_target(address)
        local = None if local_address is None else _connect.check_local(local_address, targets)
        wiring = _wiring.connecting(tls, server_hostname, address)
        policy = self._checked_policy(handler, framer, half_open, limits, timeouts, outbound=True, wiring=wiring)
        tcp = _address.Tcp(nodelay, keepalive, user_timeout)
        conn = self._new_connection(address, policy)
        attempt = _connect.Attempt(self, conn, address, local, tcp)
        try:
            self._attempting(conn, attempt)
            attempt.start(targets)
        except BaseException as error:  # there may be no more threads, or no memory; or it is interrupted
            if self.closed or conn not in self._connections():
                raise
            failed = isinstance(error, Exception) and from_call(error)
            attempt.fail(error)
            if not failed:
                raise
        return conn

    def attach(
        self,
        sock: socket.socket,
        handler: HandlerLike | None = None,
        *,
        framer: Any = None,
        half_open: bool = False,
        nodelay: bool = True,
        keepalive: float | None = None,
        user_timeout: float | None = None,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
    ) -> Connection:
        """Serve a connected stream socket, which then belongs to the Mux, and return its Connection.

        Arguments as for `listen`; for TLS, call `start_tls` at once. SO_LINGER is turned off; use `Timeouts.linger`.
        Raises TypeError or ValueError for a bad argument, OSError if the socket is not connected or cannot be watched.
        After an error the socket still belongs to the caller.
        """
        from . import _address

        policy = self._checked_policy(handler, framer, half_open, limits, timeouts)
        tcp = _address.Tcp(nodelay, keepalive, user_timeout)
        return self._add_connection(sock, _address.connected_socket(sock, tcp), policy)

    def datagram(
        self,
        address: Address | socket.socket | None = None,
        handler: DatagramHandlerLike | None = None,
        *,
        remote: Address | None = None,
        limits: Limits | None = None,
        max_size: int = 65536,
        reuse_port: bool = False,
        mode: int | None = None,
        broadcast: bool = False,
        join: Iterable[str | tuple[str, str]] = (),
    ) -> Datagram:
        """Make a datagram socket, UDP or Unix, or serve a given one, and return its Datagram.

        address: the local address, as for `listen`; None is a free port (or, for a Unix remote, no name). Or a datagram
            socket, which then belongs to the Mux.
        handler: an object with `on_datagrams(datagram, messages)`, or a function with these arguments. `messages` is a
            list of (data, address): the datagrams that arrived together. The address of an unbound Unix sender is None.
            Optional methods: `on_error(datagram, exc)` (an ICMP error or an error of the kernel, such as
            ConnectionRefusedError; without it the first one is logged) and `on_drain(datagram)`. A callback that raises
            is logged, and the socket stays open.
        remote: connect the socket to this address: it sends there, receives from there only, and gets ICMP errors,
            which are not reported otherwise.
        limits: `high`, `low`, `max_outbox` and `overflow` of the output queue, where each datagram counts 64 bytes more
            than its data. None is Limits(overflow="drop"). "close" ends the socket, and on_error gets OutboxFull.
        max_size: bytes of the largest datagram received; a larger one is dropped, and on_error gets FrameTooLarge.
            The default is enough for UDP.
        reuse_port, mode: as for `listen`.
        broadcast: allow broadcasts.
        join: multicast groups, each "224.0.0.251" or, with the name of an interface, ("ff02::fb", "eth0").

        Raises as `listen` does; names are resolved before it returns.
        """
        from . import _address

        self._check()
        if handler is None:
            raise ValueError("handler is required: poll() does not report datagrams")
        callbacks = observed(resolve_datagram(handler), self._slow_handler)
        limits = Limits(overflow="drop") if limits is None else as_limits(limits)
        max_size = check_int("max_size", max_size, 1, 1 << 20)
        sock, file, remotes = _address.datagram_socket(
            address, remote, reuse_port=reuse_port, mode=mode, broadcast=broadcast, join=join
        )
        try:
            return self._add_datagram(sock, file, remotes, callbacks, limits, max_size)
        except BaseException:
            if sock is not address:
                _address.discard(sock, file)
            raise

    def _checked_policy(
        self,
        handler: Any,
        framer: Any,
        half_open: bool,
        limits: object,
        timeouts: object,
        outbound: bool = False,
        wiring: Wiring | None = None,
    ) -> Any:
        self._check()
        check_framer(framer)
        if handler is None and self._running():
            raise ValueError("handler must not be None inside run(): only poll() serves connections without one")
        callbacks = Callbacks() if handler is None else observed(resolve(handler), self._slow_handler)
        return self._policy(
            handler, callbacks, as_limits(limits), as_timeouts(timeouts), bool(half_open), framer, outbound, wiring
        )

    def broadcast(self, connections: Iterable[Connection], message: Any) -> int:
        """Send one message to many connections of this Mux, and return how many accepted it.

        It is encoded once for all connections with the same framer. A connection above `high` still accepts it; at
        `max_outbox`, `Limits.overflow` decides. With "raise", OutboxFull is raised after all others were served. An
        accepted connection is skipped until its handshake is done.

        Raises TypeError or ValueError, before anything is sent, for an object that is not a connection of this Mux, or
        if one of the framers cannot encode the message. An exception of a framer of your own is raised after all others
        were served.
        """
        self._check()
        return self._broadcast(list(connections), message)

    # -- the loop

    def run(self) -> None:
        """Run the loop until `stop` or `close`.

        In the main thread a signal interrupts its wait at once. Raises RuntimeError if a connection or listener has no
        handler: only `poll` can serve those.
        """
        self._begin("run")
        if self._without_handler():
            raise RuntimeError("run() serves handlers only: listeners and connections without one need poll()")
        with self._signals:
            self._serve()

    def drain(self, timeout: float) -> bool:
        """Stop listening and receiving datagrams, close each connection as `Connection.close` does, and run until all
        have ended.

        A connection with messages in the threads of a `Threaded` is closed when they are handled. Returns True if all
        output was sent; False if connections are left after `timeout` seconds or `stop`, or output was lost.
        """
        deadline_ns = time.monotonic_ns() + to_ns(check_seconds("timeout", timeout))
        self._begin("drain")
        unsent = self.stats().unsent
        for listener in self._listeners():
            listener.close()
        for datagram in self._datagrams():
            datagram.close()
        for conn in self._connections():
            self._offloaded.get(conn, conn).close()
        with self._signals:
            return self._serve_until_empty(deadline_ns) and self.stats().unsent == unsent

    # -- descriptors and signals

    def add_reader(self, fd: int | HasFileno, fn: Callable[..., object], /, *args: Any) -> None:
        """Call fn(*args) whenever the descriptor is readable, or reports an error or a hang-up.

        fd: any descriptor that can be polled, or an object with `fileno()`. It stays yours: call `remove_reader` before
            you close it. A second call for the same descriptor replaces the first.

        An exception of `fn` is logged. Raises TypeError or ValueError for a bad argument or the descriptor of a
        connection, PermissionError for a descriptor that cannot be polled (a regular file), OSError for one that is not
        open.
        """
        self._add_watch(fd, READ, fn, args)

    def add_writer(self, fd: int | HasFileno, fn: Callable[..., object], /, *args: Any) -> None:
        """Call fn(*args) whenever the descriptor is writable; otherwise as `add_reader`. A descriptor may have both."""
        self._add_watch(fd, WRITE, fn, args)

    def remove_reader(self, fd: int | HasFileno, /) -> bool:
        """Undo `add_reader`. Returns whether the descriptor had a reader."""
        return self._remove_watch(fd, READ)

    def remove_writer(self, fd: int | HasFileno, /) -> bool:
        """Undo `add_writer`. Returns whether the descriptor had a writer."""
        return self._remove_watch(fd, WRITE)

    def _add_watch(
        self, fd: int | HasFileno, direction: int, fn: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        check_callable(fn)
        number = as_descriptor(fd)  # which may run code of the user's
        self._check()
        watch = self._owner(number) or Watch(number)
        if not isinstance(watch, Watch):
            raise ValueError(f"fd {number} belongs to {watch!r}")
        self._set_calls(watch, {**watch.calls, direction: (fn, args)})

    def _remove_watch(self, fd: int | HasFileno, direction: int) -> bool:
        self._check()
        watch = self._owner(as_descriptor(fd))
        if not isinstance(watch, Watch) or direction not in watch.calls:
            return False
        calls = watch.calls.copy()
        del calls[direction]
        self._set_calls(watch, calls)
        return True

    def _set_calls(self, watch: Watch, calls: Calls) -> None:
        # The core sets the calls together with what the kernel reports: with only half of that done, because of an
        # interrupt or for want of memory, the kernel would report for ever what calls nothing.
        self._watch(watch, sum(calls), calls)

    def add_signal_handler(self, sig: int, fn: Callable[..., object], /, *args: Any) -> None:
        """Call fn(*args) from the loop when the signal arrives. The signal interrupts the wait of `poll` and `run`.

        sig: any signal that can be caught, real-time signals included.

        It replaces the signal's handler. `remove_signal_handler` and `close` restore the former one, unless other code
        has replaced the handler meanwhile. A forked child has the former handler. The Mux is bound to the main thread.
        Raises RuntimeError in another thread, TypeError or ValueError for a number that is no signal or cannot be
        caught.
        """
        self._check()
        check_callable(fn)
        self._signals.add(sig, fn, args)
        self._bind()

    def remove_signal_handler(self, sig: int, /) -> bool:
        """Restore the signal's former handler, unless other code has replaced ours. Returns whether there was one."""
        self._check()
        return self._signals.remove(sig)

    # -- calls

    def call_soon(self, fn: Callable[..., object], /, *args: Any) -> None:
        """Call fn(*args) in the next turn of the loop."""
        self._check()
        check_callable(fn)
        self._soon.append((fn, args))
        self._wake_driver()

    def call_soon_threadsafe(self, fn: Callable[..., object], /, *args: Any) -> None:
        """As `call_soon`, from any thread."""
        check_callable(fn)
        self._call_foreign(fn, args)

    def run_in_executor(
        self,
        executor: Executor | None,
        fn: Callable[..., Any],
        /,
        *args: Any,
        on_done: Callable[[Future[Any]], object] | None = None,
    ) -> Future[Any]:
        """Call fn(*args), which may block, in another thread or process, and return its Future.

        executor: None is a pool of this Mux, with up to 32 threads. `close` shuts it down and does not wait for running
            calls; the interpreter's exit waits.
        on_done: called as on_done(future) in the Mux's thread. Without it, an exception of `fn` is logged.
        """
        self._check()
        check_callable(fn)
        if on_done is not None and not callable(on_done):
            raise TypeError(f"on_done must be callable or None, not {type(on_done).__name__}")
        from concurrent.futures import Executor  # which Mux() has imported

        from ._pool import Pool, executed  # not a ThreadPoolExecutor, whose lock stops a signal handler amid a submit

        if executor is None:
            if self._executor is None:
                self._executor = Pool(min(32, (os.cpu_count() or 1) + 4), "muxcore", waits=True)
                self._at_close.append(partial(self._executor.shutdown, cancel_futures=True))
            executor = self._executor
        elif not isinstance(executor, Executor):
            raise TypeError(f"executor must be a concurrent.futures.Executor or None, not {type(executor).__name__}")
        future = executor.submit(fn, *args)
        future.add_done_callback(partial(executed, self, fn, on_done))
        return future

    def call_later(self, delay: float, fn: Callable[..., object], /, *args: Any) -> TimerHandle:
        """Call fn(*args) after `delay` seconds, never earlier. Timers with equal times fire in creation order."""
        self._check()
        check_callable(fn)
        return self._timers.add(time.monotonic_ns() + to_ns(check_seconds("delay", delay)), fn, args)

    def call_at(self, when: float, fn: Callable[..., object], /, *args: Any) -> TimerHandle:
        """Call fn(*args) when `time()` has reached `when`; in the next turn if it has passed."""
        self._check()
        check_callable(fn)
        # Not before now: a timer that sets itself for the past would always come before those that are due.
        when_ns = int(min(check_seconds("when", when), FAR) * 1e9)
        return self._timers.add(max(when_ns, time.monotonic_ns()), fn, args)
