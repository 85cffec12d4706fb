"""What may live here: serve(), which is run, signals and drain around one listener."""

from __future__ import annotations

import sys
import time

from ._config import check_seconds
from ._impl import Mux
from ._typing import TYPE_CHECKING
from .handler import check_plain

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Iterable
    from typing import Any

    from ._address import Address
    from ._config import Limits, Timeouts
    from ._epoll import Listener
    from ._protocols import HandlerLike

SAME_REQUEST = 1.0  # seconds


class Requests:
    """The signals that end serve().

    One request may arrive as several signals: Ctrl-C signals each process of a terminal's group, and a parent may
    forward its signal to its children; systemd does the same. So a signal ends the drain only if the same signal
    arrived before, and if more than SAME_REQUEST seconds have passed since the first.
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
    tls: ssl.SSLContext | None = None,
    proxy_protocol: Iterable[str] | None = None,
) -> None:
    """Serve `handler` on `address` until SIGINT or SIGTERM; then stop accepting, drain, and return.

    ready: called as ready(mux, listener) when the socket listens; `listener.address` has the actual port.
    drain_timeout: seconds for the drain, in which queued output is sent. Other arguments as for `Mux.listen`.

    A signal during the drain ends it only if the same signal (SIGINT or SIGTERM) arrived before, more than a second
    after the first: one request may arrive as two signals, from Ctrl-C and from a parent that forwards it.

    Outside the main thread no signal handler is installed: end it with `mux.stop()`.
    """
    from signal import SIGINT, SIGTERM  # here, as in Mux.__init__: to import it takes time

    from ._signals import in_main_thread

    if handler is None:
        raise TypeError("handler must not be None: without one, create a Mux and call poll()")
    if ready is not None:
        check_plain("ready", ready, "(mux, listener)")
    drain_timeout = check_seconds("drain_timeout", drain_timeout)
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        raise RuntimeError("serve() would block the running asyncio loop: use muxcore.aio.attach, or another thread")
    with Mux() as mux:
        listener = mux.listen(
            address, handler, framer=framer, backlog=backlog, reuse_port=reuse_port, exclusive=exclusive, mode=mode,
            half_open=half_open, max_connections=max_connections, nodelay=nodelay, keepalive=keepalive,
            user_timeout=user_timeout, limits=limits, timeouts=timeouts, tls=tls, proxy_protocol=proxy_protocol,
        )
        requests = Requests(mux)
        if in_main_thread():
            mux.add_signal_handler(SIGINT, requests, SIGINT)
            mux.add_signal_handler(SIGTERM, requests, SIGTERM)
        if ready is not None:
            ready(mux, listener)
        if not mux.closed:
            mux.run()
        if not mux.closed:
            requests.begin()
            mux.drain(drain_timeout)
