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
    """What happens to connections: override what you need. Any other object that has some of these methods does, too.

    One handler serves all connections of its listener; a connection's own state belongs on `conn.data`. Callbacks come
    from the loop, one at a time; each may call any method of any connection, listener or of the Mux (but not `poll`).
    A callback that raises loses its own connection only. Callbacks are called with positional arguments, so
    an override may name them as it likes.

    A handler has `on_message(conn, message)`, called for each message, or `on_messages(conn, messages)`, called with
    the list of all complete messages of one read; if it has both, `on_messages` wins. With neither, input is discarded.

    For type checkers, `class Chat(muxcore.Handler[User])` and `conn: muxcore.Connection[User]` say what `conn.data` is.
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
        """Called when the outbox, having been above its high-water mark, is down to the low one."""

    def on_eof(self, conn: Connection[T], /) -> object:
        """Called once when the peer has sent its FIN, after its last message.

        Without an override the connection closes as soon as its output is flushed; with one, it stays half-open and
        you may go on sending until you close it.
        """

    def on_error(self, conn: Connection[T], exc: FrameError, /) -> object:
        """Called once when the peer has sent something wrong: the framer's error, or a FrameError of a callback.

        It may send a last reply ("line too long"). Then the connection closes, as by `conn.close(exc)`.
        """

    def on_close(self, conn: Connection[T], exc: BaseException | None, /) -> object:
        """Called once, last, or alone if `connect` failed. `exc` is None after an orderly end, else the reason."""


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


def resolve(handler: object) -> Callbacks:
    """Take apart a Handler, any object with its methods, or a plain function `(conn, message)`.

    Raises TypeError, saying what to pass instead, for a class, a coroutine or generator function, and anything else.
    Warns of an `on_...` method that is almost a callback; in development mode, of any that is none.
    """
    methods = _own_methods(handler, Callbacks._fields, "(conn, message)")
    if not any(methods.values()) and not isinstance(handler, Handler):
        if not callable(handler):
            raise TypeError(
                f"handler must be a function (conn, message), a Handler or an object with its methods, "
                f"not {type(handler).__name__}"
            )
        methods["on_message"] = handler
    return Callbacks(**methods)


def resolve_datagram(handler: object) -> DatagramCallbacks:
    """Take apart any object with `on_datagrams`, or a plain function `(datagram, messages)`; TypeError as above."""
    methods = _own_methods(handler, DatagramCallbacks._fields, "(datagram, messages)")
    on_datagrams: Any = methods.pop("on_datagrams") or handler
    if not callable(on_datagrams):
        raise TypeError(
            f"handler must be a function (datagram, messages) or have on_datagrams, not {type(handler).__name__}"
        )
    return DatagramCallbacks(on_datagrams, **methods)


def _own_methods(handler: object, names: tuple[str, ...], arguments: str) -> dict[str, Callable[..., object] | None]:
    if isinstance(handler, type):
        raise TypeError(f"handler must be an instance, not the class: pass {handler.__name__}()")
    for function in (handler, getattr(handler, "__call__", None)):  # noqa: B004
        if kind := _never_runs(function):
            raise TypeError(f"handler must be a plain function {arguments}, not a {kind} function: muxcore runs none")
    if type(handler) not in _looked_at:  # to look takes as long as all the rest of attach()
        for name in dir(handler):
            if name.startswith("on_") and name not in CALLBACKS and callable(getattr(handler, name, None)):
                _warn_of(name)
        _looked_at.add(type(handler))
    return {name: _own_method(handler, name) for name in names}


_looked_at: WeakSet[type] = WeakSet()


def _warn_of(name: str) -> None:
    import difflib

    text = f"handler.{name} is never called: muxcore has no such callback"
    if meant := difflib.get_close_matches(name, CALLBACKS, 1):
        warnings.warn(f"{text}; did you mean {meant[0]}?", RuntimeWarning, stacklevel=6)
    elif sys.flags.dev_mode:  # else it may well be a method of the user's own
        warnings.warn(text, RuntimeWarning, stacklevel=6)


def _own_method(handler: object, name: str) -> Callable[..., object] | None:
    method: Callable[..., object] | None = getattr(handler, name, None)
    if method is None or getattr(method, "__func__", None) is getattr(Handler, name, method):
        return None  # absent, or Handler's own, which does nothing: not worth a call
    if not callable(method):
        raise TypeError(f"handler.{name} must be callable, not {type(method).__name__}")
    if kind := _never_runs(method):
        raise TypeError(f"handler.{name} must be a plain method, not a {kind} function: muxcore runs none")
    return method


def _never_runs(function: object) -> str:
    """What kind of function it is if to call it runs none of its body; else empty."""
    import inspect  # which Mux() has imported

    if inspect.iscoroutinefunction(function):
        return "coroutine"
    return "generator" if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function) else ""


def observed(callbacks: C, slow: float | None) -> C:
    """The callbacks with a look at each call: which takes more than `slow` seconds, or returns what is ignored."""
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
                log.warning("%s %r held the loop for %.3f s (slow_handler=%g)", name, callback, took, slow)
        if sys.flags.dev_mode and not isinstance(result, int | None):  # send() returns a bool, and a lambda that
            log.warning("%s %r returned %r, which is ignored: use conn.send", name, callback, result)

    return call
