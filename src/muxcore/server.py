"""What may live here: serve(), which is run, signals and drain around one listener."""

from __future__ import annotations

import sys
import time

from ._config import check_seconds
from ._impl import Mux
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from ._address import Address
    from ._config import Limits, Timeouts
    from ._epoll import Listener
    from ._protocols import HandlerLike

SAME_REQUEST = 1.0  # seconds


class Requests:
    """The signals that ask serve() to end.

    One request may come as several signals: Ctrl-C reaches each process of a terminal's group, and the parent of some
    forwards what it got to the others; systemd does the like. So a signal ends the drain only if that kind has come
    before, and longer ago than a parent takes to forward it.
    """

    def __init__(self, mux: Mux) -> None:
        self.mux = mux
        self.since: float | None = None
        self.seen: set[int] = set()

    def begin(self) -> None:
        if self.since is None:
            self.since = time.monotonic()

    def __call__(self, number: int) -> None:
        if self.since is None or (number in self.seen and time.monotonic() - self.since > SAME_REQUEST):
            self.mux.stop()
        self.begin()
        self.seen.add(number)


def serve(
    handler: HandlerLike,
    address: Address | socket.socket,
    *,
    framer: Any = None,
    ready: Callable[[Mux, Listener], object] | None = None,
    drain_timeout: float = 10.0,
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
) -> None:
    """Serve `handler` on `address` until SIGINT or SIGTERM; then stop accepting, drain, and return.

    ready: called as ready(mux, listener) once it listens; `listener.address` then has the real port.
    drain_timeout: seconds that open connections get to take their output. Everything else: as for `Mux.listen`.

    One request to end may come as several signals: Ctrl-C reaches a process directly, and its parent may forward
    another one. So a signal during the drain ends it at once only if the same signal (SIGINT or SIGTERM) has come
    before, and more than a second has passed since the first.

    Outside the main thread no signal handler is installed: end it with `mux.stop()`.
    """
    from signal import SIGINT, SIGTERM  # here, as in Mux.__init__: to import it takes time

    from ._signals import in_main_thread

    if handler is None:
        raise TypeError("handler must not be None: serve() has no poll loop for connections without one")
    drain_timeout = check_seconds("drain_timeout", drain_timeout)
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        raise RuntimeError("serve() would block the running asyncio loop: use muxcore.aio.attach, or another thread")
    with Mux() as mux:
        listener = mux.listen(
            address, handler, framer=framer, backlog=backlog, reuse_port=reuse_port, exclusive=exclusive, mode=mode,
            half_open=half_open, max_connections=max_connections, nodelay=nodelay, keepalive=keepalive,
            user_timeout=user_timeout, limits=limits, timeouts=timeouts,
        )
        requests = Requests(mux)
        if in_main_thread():
            mux.add_signal_handler(SIGINT, requests, SIGINT)
            mux.add_signal_handler(SIGTERM, requests, SIGTERM)
        if ready is not None:
            ready(mux, listener)
        mux.run()
        if not mux.closed:
            requests.begin()
            mux.drain(drain_timeout)
