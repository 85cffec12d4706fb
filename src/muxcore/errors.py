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
    "HandshakeTimeout",
    "IdleTimeout",
    "MuxError",
    "OutboxFull",
    "WriteTimeout",
]


class MuxError(Exception):
    """Base class of the errors that muxcore creates.

    `limit` is the bound that was crossed (bytes, seconds or a number of files), or None. `conn` is the connection that
    the error is about, or None. The reference is weak: a stored error does not keep its connection alive. When nothing
    else refers to the connection (a traceback may), `conn` is None. A copied or pickled error has none.
    """

    def __init__(
        self, message: str = "", /, *, conn: Any = None, limit: float | None = None
    ) -> None:
        super().__init__(message)
        self.conn = conn
        self.limit = limit

    @property
    def conn(self) -> Any:
        """The connection that the error is about; None if there is none, or if it no longer exists."""
        return self._conn()

    @conn.setter
    def conn(self, value: Any) -> None:
        # A connection keeps its error. With a reference back, both would stay until the next collection.
        self._conn: Callable[[], Any] = ref(value) if value is not None else _no_connection

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the connection: it cannot be pickled."""
        made: Any = super().__reduce__()
        return *made[:2], {**self.__dict__, "_conn": _no_connection}


def _no_connection() -> None:
    return None


# These attributes as BaseException defines them. A subclass of the user's may override them.
_cause: Any = vars(BaseException)["__cause__"].__get__
_context: Any = vars(BaseException)["__context__"].__get__
_exceptions: Any = vars(BaseExceptionGroup)["exceptions"].__get__


# The same for an attribute of MuxError.
_set_conn: Any = vars(MuxError)["conn"].__set__


def about(error: BaseException, conn: Any) -> None:
    """Set the connection of a framer's error, if the error's class has that attribute."""
    try:
        _set_conn(error, conn)
    except Exception:
        pass


def check_reason(reason: object) -> None:
    """Of `Connection.close`."""
    if reason is not None and not issubclass(type(reason), BaseException):
        raise TypeError(f"reason must be an exception or None, not {type(reason).__name__}")


OURS = {"muxcore", "socket", "ssl", "threading"}  # modules whose functions may stand between muxcore and the call


def from_call(error: BaseException) -> bool:
    """Whether a call that muxcore made has failed with this. Else a signal handler has raised it as the call returned
    (CPython runs them there), and its frame is in the traceback: the call may well have succeeded."""
    entry = error.__traceback__
    while entry is not None:
        name = entry.tb_frame.f_globals.get("__name__")
        if type(name) is not str or name.partition(".")[0] not in OURS:
            return False
        entry = entry.tb_next
    return True


def without_frames(error: E) -> E:
    """The exception and its causes without tracebacks, to be stored. The frames of a handler refer to the message that
    it refused, and to the connection."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        one = chain.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        BaseException.with_traceback(one, None)
        chain += _cause(one), _context(one)
        if issubclass(type(one), BaseExceptionGroup):  # isinstance() would look up its __class__
            chain += _exceptions(one)
    return error


class ConnectionClosed(MuxError, ConnectionError):
    """The connection is not open, or it ended before the operation was complete, and the peer is not the cause."""


class FrameError(MuxError, ValueError):
    """The peer sent bytes that are malformed for the framer; or a handler rejects a message."""


class FrameTooLarge(FrameError):
    """One message is larger than the framer's max_size."""


class OutboxFull(MuxError, BufferError):
    """The outbox of a slow peer holds `Limits.max_outbox` bytes, or 32 parts of files (see `Connection.sendfile`)."""


class IdleTimeout(MuxError, TimeoutError):
    """No message arrived for `Timeouts.idle` seconds, or no byte moved in either direction for `Timeouts.silence`.

    `limit` has the seconds of the timeout that expired; the error's text names it.
    """


class WriteTimeout(MuxError, TimeoutError):
    """The peer accepted no output for `Timeouts.write` seconds, or for 30 s while closing."""


class ConnectTimeout(MuxError, TimeoutError):
    """No address accepted a connection within `Timeouts.connect` seconds."""


class HandshakeTimeout(MuxError, TimeoutError):
    """A TLS handshake, or a PROXY header, was not complete within `limit` seconds: `Timeouts.handshake`, and at most 5
    for a header."""
