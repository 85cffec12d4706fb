"""What may live here: MuxError and its children. Each also derives from the built-in that a caller would catch anyway.

Nothing in this file imports anything else of the package but types.
"""

from __future__ import annotations

from _weakref import ref

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    E = TypeVar("E", bound=BaseException)

__all__ = [
    "ConnectTimeout",
    "ConnectionClosed",
    "FrameError",
    "FrameTooLarge",
    "IdleTimeout",
    "MuxError",
    "OutboxFull",
    "WriteTimeout",
]


class MuxError(Exception):
    """Base of the errors that muxcore itself makes.

    `limit` is the bound that was crossed (bytes, seconds or a number of files), or None. `conn` is the connection that
    the error is about, or None. The reference is weak: an error that you keep does not keep its connection, and once
    nothing else refers to the connection (a traceback may), `conn` is None.
    """

    def __init__(
        self, message: str = "", /, *, conn: Any = None, limit: float | None = None
    ) -> None:
        super().__init__(message)
        self.conn = conn
        self.limit = limit

    @property
    def conn(self) -> Any:
        """The connection that the error is about; None if there is none, or nothing else refers to it any more."""
        return self._conn()

    @conn.setter
    def conn(self, value: Any) -> None:
        # A connection keeps its error. With a reference back, both would stay until the next collection.
        self._conn: Callable[[], Any] = ref(value) if value is not None else _no_connection


def _no_connection() -> None:
    return None


# What these names are in BaseException, and not what a class of the user's makes of them.
_cause: Any = vars(BaseException)["__cause__"].__get__
_context: Any = vars(BaseException)["__context__"].__get__
_exceptions: Any = vars(BaseExceptionGroup)["exceptions"].__get__


# The same of ours.
_set_conn: Any = vars(MuxError)["conn"].__set__


def about(error: BaseException, conn: Any) -> None:
    """Say which connection an error of a framer is about, unless it is of a class that does not take that."""
    try:
        _set_conn(error, conn)
    except Exception:
        pass


def check_reason(reason: object) -> None:
    """Of `Connection.close`."""
    if reason is not None and not issubclass(type(reason), BaseException):
        raise TypeError(f"reason must be an exception or None, not {type(reason).__name__}")


def without_frames(error: E) -> E:
    """The exception, and those that led to it, without tracebacks, for one that is kept: the frames of a handler hold
    the message that it refused, and the connection."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        one = chain.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        BaseException.with_traceback(one, None)
        chain += _cause(one), _context(one)
        if issubclass(type(one), BaseExceptionGroup):  # isinstance() would ask for its __class__
            chain += _exceptions(one)
    return error


class ConnectionClosed(MuxError, ConnectionError):
    """The connection is not open, or ended before what was asked could be done, and the peer is not to blame."""


class FrameError(MuxError, ValueError):
    """The peer's bytes are not what the framer reads."""


class FrameTooLarge(FrameError):
    """One message is larger than the framer's max_size."""


class OutboxFull(MuxError, BufferError):
    """A slow peer let `Limits.max_outbox` bytes pile up, or 32 parts of files (see `Connection.sendfile`)."""


class IdleTimeout(MuxError, TimeoutError):
    """No message came for `Timeouts.idle` seconds, or no byte went either way for `Timeouts.silence` seconds.

    `limit` is the one that has passed; the error's text says which.
    """


class WriteTimeout(MuxError, TimeoutError):
    """The peer took nothing of the outbox for `Timeouts.write` seconds, or for 30 s while closing."""


class ConnectTimeout(MuxError, TimeoutError):
    """No address answered within `Timeouts.connect` seconds."""
