"""What may live here: serve(), which is run, signals and drain around one listener."""

from __future__ import annotations

from ._config import check_seconds
from ._impl import Listener, Mux
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


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
    from signal import SIGINT, SIGTERM  # here, as in Mux.__init__: to import it takes time

    from ._signals import in_main_thread

    if handler is None:
        raise TypeError("handler must not be None: serve() has no poll loop for connections without one")
    check_seconds("drain_timeout", drain_timeout)
    with Mux() as mux:
        listener = mux.listen(address, handler, framer=framer, **listen_options)
        for number in (SIGINT, SIGTERM) if in_main_thread() else ():
            mux.add_signal_handler(number, mux.stop)
        if ready is not None:
            ready(mux, listener)
        mux.run()
        if not mux.closed:
            mux.drain(drain_timeout)
