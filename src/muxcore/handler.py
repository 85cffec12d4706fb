"""What may live here: Handler as the user sees it, and what counts as one. Resolved once per listener."""

from __future__ import annotations

import sys
import time
import warnings
from _weakrefset import WeakSet
from types import GenericAlias

from ._log import log
from ._typing import TYPE_CHECKING, Generic, NamedTuple, T

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from ._epoll import Connection
    from .errors import FrameError

    C = TypeVar("C", "Callbacks", "DatagramCallbacks")

class Handler(Generic[T]):
    """The callbacks of a connection. Override those that you need; any object with some of these methods works, too.

    One handler serves all connections of its listener. The state of one connection belongs on `conn.data`. The loop
    calls callbacks one at a time. A callback may call any method of any connection, listener or Mux, except `poll` and
    `run`. A callback that raises closes its own connection only. A return value is ignored: reply with `conn.send`.
    Arguments are positional, so an override may choose their names.

    A handler has `on_message(conn, message)`, called for each message, or `on_messages(conn, messages)`, called with
    the list of all complete messages of one read. If it has both, only `on_messages` is called. With neither, input is
    discarded.

    For type checkers, `class Chat(muxcore.Handler[User])` and `conn: muxcore.Connection[User]` declare `conn.data`.
    """

    if not TYPE_CHECKING:
        __class_getitem__ = classmethod(GenericAlias)

    if TYPE_CHECKING:
        # Declared for type checkers only: a Handler without a message method must not look as if it had one.
        def on_message(self, conn: Connection[T], message: Any, /) -> object: ...
        def on_messages(self, conn: Connection[T], messages: list[Any], /) -> object: ...

    def on_open(self, conn: Connection[T], /) -> object:
        """Called once, before the first message."""

    def on_drain(self, conn: Connection[T], /) -> object:
        """Called when the outbox has exceeded its high-water mark and has fallen to the low-water mark."""

    def on_eof(self, conn: Connection[T], /) -> object:
        """Called once at the peer's FIN (half-close), after its last message.

        Without an override the connection closes after its flush. With one it stays half-open: it can send until you
        close it.
        """

    def on_error(self, conn: Connection[T], exc: FrameError, /) -> object:
        """Called once for malformed input. `exc` is the framer's error, or a FrameError that a callback raised.

        It may send a last reply ("line too long"). Then the connection closes as with `conn.close(exc)`.
        """

    def on_close(self, conn: Connection[T], exc: BaseException | None, /) -> object:
        """Called once, last. `exc`: the reason, or None (orderly).

        If `connect`, a TLS handshake or a PROXY header failed, it is the only callback: `on_open` has set nothing."""


class Callbacks(NamedTuple):
    """A handler's methods, bound; None where it has none of its own."""

    on_open: Callable[..., object] | None = None
    on_message: Callable[..., object] | None = None
    on_messages: Callable[..., object] | None = None
    on_drain: Callable[..., object] | None = None
    on_eof: Callable[..., object] | None = None
    on_error: Callable[..., object] | None = None
    on_close: Callable[..., object] | None = None


class DatagramCallbacks(NamedTuple):
    """The same of a datagram socket's handler."""

    on_datagrams: Callable[..., object]
    on_error: Callable[..., object] | None = None
    on_drain: Callable[..., object] | None = None


CALLBACKS = {*Callbacks._fields, *DatagramCallbacks._fields}
ELSEWHERE = {  # names of other libraries
    "on_connect": "on_open", "on_connected": "on_open", "on_data": "on_message", "on_disconnect": "on_close",
    "on_disconnected": "on_close", "on_read": "on_message", "on_receive": "on_message", "on_recv": "on_message",
    "on_write": "on_drain",
}
SPELLINGS = {name.replace("_", ""): name for name in CALLBACKS}
NO_BODY = "a call would not run its body"


def resolve(handler: object) -> Callbacks:
    """The callbacks of a Handler, of any object with its methods, or of a plain function `(conn, message)`.

    Raises TypeError for anything else, such as a class, a coroutine function or a generator function. Warns of a method
    whose name resembles a callback (`on_mesage`, `onMessage`); in development mode, of any `on_...` method that is no
    callback.
    """
    methods = _own_methods(handler, Callbacks._fields, "(conn, message)")
    native: dict[str, Callable[..., object]] = getattr(handler, "_native_callbacks", dict)()  # of a NativeHandler
    methods = {name: method or native.get(name) for name, method in methods.items()}
    if not any(methods.values()) and not isinstance(handler, Handler):
        if hasattr(handler, "_native_callbacks"):
            raise TypeError(f"handler: {type(handler).__name__} overrides no callback of NativeHandler")
        if not callable(handler):
            raise TypeError(
                f"handler must be a function (conn, message), a Handler or an object with its methods, "
                f"not {type(handler).__name__}"
            )
        methods["on_message"] = handler
    return Callbacks(**methods)


def resolve_datagram(handler: object) -> DatagramCallbacks:
    """The callbacks of an object with `on_datagrams`, or of a plain function `(datagram, messages)`; else TypeError."""
    methods = _own_methods(handler, DatagramCallbacks._fields, "(datagram, messages)")
    on_datagrams: Any = methods.pop("on_datagrams") or handler
    if not callable(on_datagrams):
        raise TypeError(
            f"handler must be a function (datagram, messages) or have on_datagrams, not {type(handler).__name__}"
        )
    return DatagramCallbacks(on_datagrams, **methods)


def _own_methods(handler: object, names: tuple[str, ...], arguments: str) -> dict[str, Callable[..., object] | None]:
    if isinstance(handler, type):
        raise TypeError(f"handler must be an instance, not the class: pass {handler.__name__}({_required(handler)})")
    _check_runs("handler", handler, arguments)
    if type(handler) not in _looked_at:  # dir() costs as much as all other steps of attach()
        for name in dir(handler):
            if _is_mistaken(handler, name) and callable(getattr(handler, name, None)):
                _warn_of(name)
        _looked_at.add(type(handler))
    return {name: _own_method(handler, name) for name in names}


def _required(cls: type) -> str:
    """The arguments without which there is no instance."""
    import inspect  # which Mux() has imported

    try:
        parameters = inspect.signature(cls).parameters.values()
    except Exception:  # it is written in C, or (since 3.14) its annotations cannot be evaluated
        return "..."
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [one for one in parameters if one.default is one.empty and one.kind not in optional]
    return ", ".join(f"{one.name}=..." if one.kind is one.KEYWORD_ONLY else one.name for one in needed)


_looked_at: WeakSet[type] = WeakSet()


def _spelt(name: str) -> str | None:
    """The callback that onMessage or onmessage stands for."""
    return SPELLINGS.get(name.replace("_", "").lower()) if name[:1] != "_" else None


def _is_mistaken(handler: object, name: str) -> bool:
    """Whether it may be meant as a callback. onMessage beside on_message is meant for another library."""
    if name.startswith("on_"):
        return name not in CALLBACKS
    meant = _spelt(name)
    return meant is not None and _own_method(handler, meant) is None


def _warn_of(name: str) -> None:
    import difflib

    text = f"handler.{name} is never called: muxcore has no such callback"
    near = ELSEWHERE.get(name) or _spelt(name) or "".join(difflib.get_close_matches(name, CALLBACKS, 1))
    if near:
        warnings.warn(f"{text}; did you mean {near}?", RuntimeWarning, stacklevel=users_level())
    elif sys.flags.dev_mode:  # else it may be a method of the user's own
        warnings.warn(text, RuntimeWarning, stacklevel=users_level())


def users_level() -> int:
    """The stacklevel of the first frame outside muxcore, for a warning from the caller of this function."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "muxcore":
        level, frame = level + 1, frame.f_back
    return level


def _own_method(handler: object, name: str) -> Callable[..., object] | None:
    method: Callable[..., object] | None = getattr(handler, name, None)
    if method is None or getattr(method, "__func__", None) is getattr(Handler, name, method):
        return None  # absent, or Handler's own, which does nothing: not worth a call
    if not callable(method):
        raise TypeError(f"handler.{name} must be callable, not {type(method).__name__}")
    if kind := _never_runs(method):
        raise TypeError(f"handler.{name} must be a plain method, not a {kind} function: {NO_BODY}")
    return method


def check_plain(name: str, function: object, arguments: str) -> None:
    """Raise TypeError for what is no function, or one of which a call runs nothing."""
    if not callable(function):
        raise TypeError(f"{name} must be a function {arguments}, not {type(function).__name__}")
    _check_runs(name, function, arguments)


def _check_runs(name: str, function: object, arguments: str) -> None:
    for one in (function, getattr(function, "__call__", None)):  # noqa: B004
        if kind := _never_runs(one):
            raise TypeError(f"{name} must be a plain function {arguments}, not a {kind} function: {NO_BODY}")


def _never_runs(function: object) -> str:
    """The kind of a function whose body a call does not run; else empty."""
    import inspect  # which Mux() has imported

    if inspect.iscoroutinefunction(function):
        return "coroutine"
    return "generator" if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function) else ""


def observed(callbacks: C, slow: float | None) -> C:
    """The callbacks, wrapped. A call of more than `slow` seconds, or one that returns a value, is logged."""
    if slow is None and not sys.flags.dev_mode:
        return callbacks
    found = {name: one and _observed(name, one, slow) for name, one in callbacks._asdict().items()}
    return callbacks._replace(**found)


def _observed(name: str, callback: Callable[..., object], slow: float | None) -> Callable[..., object]:
    def call(*args: object) -> None:
        begun = time.perf_counter()
        try:
            result = callback(*args)
        finally:
            took = time.perf_counter() - begun
            if slow is not None and took > slow:
                log.warning("%s %r blocked the loop for %.3f s (slow_handler=%g)", name, callback, took, slow)
        if sys.flags.dev_mode and not isinstance(result, int | None):  # send() returns a bool, and a lambda that
            log.warning("%s %r returned %r, which is ignored: use conn.send", name, callback, result)

    return call
