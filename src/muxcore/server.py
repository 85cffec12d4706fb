"""What may live here: serve(), which is run, signals and drain around one listener."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ._config import check_seconds
from ._impl import Listener, Mux

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    handler: Any,
    address: Any,
    *,
    framer: Any = None,
    ready: Callable[[Mux, Listener], object] | None = None,
    drain_timeout: float = 10.0,
    **listen_options: Any,
) -> None:
    """Serve `handler` on `address` until SIGINT or SIGTERM; then stop accepting, drain, and return.

    handler, address, framer, listen_options: as for `Mux.listen`.
    ready: called as ready(mux, listener) once it listens; `listener.address` then has the real port.
    drain_timeout: seconds that open connections get to take their output; a second signal ends that at once.

    Outside the main thread no signal handler is installed: end it with `mux.stop()`.
    """
    if handler is None:
        raise TypeError("handler must not be None: serve() has no poll loop for connections without one")
    check_seconds("drain_timeout", drain_timeout)
    with Mux() as mux:
        listener = mux.listen(address, handler, framer=framer, **listen_options)
        with _signals_stop(mux):
            if ready is not None:
                ready(mux, listener)
            mux.run()
            if not mux.closed:
                mux.drain(drain_timeout)


@contextmanager
def _signals_stop(mux: Mux) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM stop `mux`; afterwards the handlers are what they were."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: mux.stop()) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: the handler was not installed from Python, and cannot be put back from there.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
