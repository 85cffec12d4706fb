"""What may live here: the choice of the core, made once.

MUXCORE_NO_EXTENSIONS=1 leaves the compiled module alone; MUXCORE_BACKEND names the backend that "auto" stands for.
"""

from __future__ import annotations

import os
import select
import sys
import warnings

from ._mux import STATE, Mux
from ._timers import TimerHandle
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = [
    "Connection",
    "Datagram",
    "Epoll",
    "Listener",
    "Mux",
    "NativeHandler",
    "TimerHandle",
    "core",
    "why",
]

core = "fallback"
why = ""

if os.environ.get("MUXCORE_NO_EXTENSIONS") == "1":
    why = "MUXCORE_NO_EXTENSIONS=1 is set"
elif not sys.platform.startswith("linux"):
    why = f"the compiled core needs Linux's epoll, and this is {sys.platform}"
else:
    try:
        from ._epoll import CompiledCore
    except ImportError as error:
        why = f"the compiled module does not import: {error}"
        # In a subinterpreter there is no other: the compiled module's classes and caches are one interpreter's objects.
        warnings.warn(
            f"muxcore runs on its pure-Python core, which is many times slower: {error}. "
            + ("" if "nterpreter" in str(error) else "Install a wheel, or a C compiler and build again; ")
            + "MUXCORE_NO_EXTENSIONS=1 silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
    else:
        core, why = "compiled", "the compiled core is installed"

LATE = dict.fromkeys(("CLOSED", "DRAINED", "EOF", "OPENED", "READABLE", "Report"), "_report")
"""Names that are imported when they are first used, and from where: enum alone costs a fifth of the import time."""
LATE.update(HandlerLike="_protocols", DatagramHandlerLike="_protocols")

if core == "compiled":
    from ._epoll import Connection, Datagram, Epoll, Listener, NativeHandler

    class EpollMux(CompiledCore, Mux):
        """The compiled core with its public face."""

        __slots__ = STATE

else:
    from ._fallback.docs import TEXTS
    from ._fallback.pollers import Epoll  # type: ignore[assignment]

    # These import socket, which takes a third of that time.
    LATE.update(Connection="_fallback.connection", Datagram="_fallback.datagram", Listener="_fallback.listener")
    LATE.update(NativeHandler="_fallback.native")


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in LATE:
            raise AttributeError(f"module 'muxcore' has no attribute {name!r}")
        value = globals()[name] = getattr(__import__(f"muxcore.{LATE[name]}", fromlist=[name]), name)
        return value


def _fallback_mux() -> type[Mux]:
    from ._fallback.mux import PythonCore  # imported late: with the compiled core it is seldom needed

    return PythonCore


BACKENDS: dict[str, Callable[[], type[Mux]]] = {"epoll": lambda: EpollMux} if core == "compiled" else {}
"""What there is, best first, and how to get its core."""
BACKENDS.update((name, _fallback_mux) for name in ("kqueue", "poll", "select") if hasattr(select, name))


def resolve_backend(backend: Any) -> tuple[str, type[Mux]]:
    """A backend and its core; ValueError, naming those there are, if it does not exist here."""
    name = backend
    if name == "auto":
        name = os.environ.get("MUXCORE_BACKEND", "auto")
    if name == "auto":
        name = next(iter(BACKENDS))
    if name not in BACKENDS:
        reason = f" ({why})" if core == "fallback" else ""
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, not {name!r}{reason}")
    return name, BACKENDS[name]()


Mux._resolve_backend = staticmethod(resolve_backend)  # type: ignore[method-assign]
for _name in ("backend", "closed", "poll", "stop", "close", "fileno", "stats"):
    _text = getattr(CompiledCore, _name).__doc__ if core == "compiled" else TEXTS["PythonCore"][_name]
    getattr(Mux, _name).__doc__ = _text
