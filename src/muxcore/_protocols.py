"""What may live here: the types of what may be a handler, for type checkers and for annotations that are evaluated.

A handler has at least one of the methods. Python has no type for "any of them", so there is a protocol for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .handler import Handler

if TYPE_CHECKING:
    from ._epoll import Connection, Datagram


class HasOnOpen(Protocol):
    def on_open(self, conn: Connection[Any], /) -> object: ...


class HasOnMessage(Protocol):
    def on_message(self, conn: Connection[Any], message: Any, /) -> object: ...


class HasOnMessages(Protocol):
    def on_messages(self, conn: Connection[Any], messages: list[Any], /) -> object: ...


class HasOnDrain(Protocol):
    def on_drain(self, conn: Connection[Any], /) -> object: ...


class HasOnEof(Protocol):
    def on_eof(self, conn: Connection[Any], /) -> object: ...


class HasOnClose(Protocol):
    def on_close(self, conn: Connection[Any], exc: BaseException | None, /) -> object: ...


class HasOnDatagrams(Protocol):
    def on_datagrams(self, datagram: Datagram, messages: list[tuple[bytes, Any]], /) -> object: ...


HandlerLike: TypeAlias = (
    Handler[Any] | HasOnOpen | HasOnMessage | HasOnMessages | HasOnDrain | HasOnEof | HasOnClose
    | Callable[["Connection[Any]", Any], object]
)
"""The handler that `listen`, `connect`, `attach`, `serve` and `Threaded` accept: an object with some of Handler's
methods, or a function `(conn, message)`."""

DatagramHandlerLike: TypeAlias = HasOnDatagrams | Callable[["Datagram", list[tuple[bytes, Any]]], object]
"""The handler that `datagram` accepts: an object with `on_datagrams`, or a function `(datagram, messages)`."""
