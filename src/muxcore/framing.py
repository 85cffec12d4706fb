"""What may live here: framers as the user sees them: specifications of where a message ends, checked when made.

They are immutable, hold nothing of a connection and are shared by all. How bytes are cut is in _core/frame.pxd for the
compiled core, and in _frame.py for the fallback.
"""

from __future__ import annotations

from ._config import check_int, plain_str
from ._frozen import Frozen
from ._typing import TYPE_CHECKING, Protocol, final

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Literal

__all__ = ["Delimiter", "Fixed", "Framer", "LengthPrefix", "Lines", "Resp", "RespError"]

MAX_SIZE = 1 << 40  # of a message: so no sum of sizes overflows


@final
class Lines(Frozen):
    r"""A message is a line, without its b"\n" or b"\r\n". `send` appends b"\n".

    At the end of the stream, the bytes after the last b"\n" are a line, too.

    max_size: bytes of the longest line that is received; a longer one ends its connection with FrameTooLarge.
    """

    __slots__ = ("max_size",)

    max_size: int

    def __init__(self, max_size: int = 65536) -> None:
        self._set(max_size=check_int("max_size", max_size, 1, MAX_SIZE))


@final
class Delimiter(Frozen):
    r"""A message ends with `delimiter`, 1 to 255 bytes, which is not part of it. `send` appends it.

    max_size: bytes of the longest message that is received; a longer one ends its connection with FrameTooLarge.
    """

    __slots__ = ("delimiter", "max_size")

    delimiter: bytes
    max_size: int

    def __init__(self, delimiter: bytes, *, max_size: int = 65536) -> None:
        if type(delimiter) is not bytes:
            raise TypeError(f"delimiter must be bytes, not {type(delimiter).__name__}")
        if not 1 <= len(delimiter) <= 255:
            raise ValueError(f"delimiter must have 1 to 255 bytes, not {len(delimiter)}")
        self._set(delimiter=delimiter, max_size=check_int("max_size", max_size, 1, MAX_SIZE))


@final
class LengthPrefix(Frozen):
    """A message follows its length: an unsigned integer of 1, 2, 4 or 8 bytes, or a varint. `send` adds the length.

    size: bytes of the length, or "varint": seven bits per byte, lowest first, as in Protocol Buffers.
    byteorder: "big" (network order) or "little".
    header_included: the length counts its own bytes, too.
    max_size: bytes of the longest message that is received, without the length. A longer one ends its connection with
        FrameTooLarge, before it is read.
    """

    __slots__ = ("size", "byteorder", "header_included", "max_size")  # noqa: RUF023 -- as in repr

    size: int | Literal["varint"]
    byteorder: Literal["big", "little"]
    header_included: bool
    max_size: int

    def __init__(
        self,
        size: int | Literal["varint"] = 4,
        *,
        byteorder: Literal["big", "little"] = "big",
        header_included: bool = False,
        max_size: int = 1048576,
    ) -> None:
        if isinstance(size, int) and not isinstance(size, bool):
            size = int.__index__(size)
        size, byteorder = plain_str(size), plain_str(byteorder)
        if type(size) not in (int, str) or size not in (1, 2, 4, 8, "varint"):
            raise ValueError(f"size must be 1, 2, 4, 8 or 'varint', not {size!r}")
        if type(byteorder) is not str or byteorder not in ("big", "little"):
            raise ValueError(f"byteorder must be 'big' or 'little', not {byteorder!r}")
        if not isinstance(header_included, bool):
            raise TypeError(f"header_included must be a bool, not {type(header_included).__name__}")
        if header_included and size == "varint":
            raise ValueError("header_included must be False for a varint, whose own length depends on it")
        max_size = check_int("max_size", max_size, 1, MAX_SIZE)
        self._set(size=size, byteorder=byteorder, header_included=header_included, max_size=max_size)


@final
class Fixed(Frozen):
    """Every message has `size` bytes, received and sent."""

    __slots__ = ("size",)

    size: int

    def __init__(self, size: int) -> None:
        self._set(size=check_int("size", size, 1, MAX_SIZE))


@final
class Resp(Frozen):
    """The server's side of RESP2, the protocol of Redis.

    A message is one request, as a list of bytes. An inline command ("GET key", as typed into a terminal) is split at
    white space; quotes work as in Redis. Empty requests are skipped. `send` accepts bytes (a bulk string), str (a
    simple string, such as "OK"), int, None (nil), RespError, and lists or tuples of those (an array).

    max_size: bytes of the longest request on the wire. A longer one ends its connection with FrameTooLarge, before it
        is read.
    """

    __slots__ = ("max_size",)

    max_size: int

    def __init__(self, max_size: int = 1048576) -> None:
        self._set(max_size=check_int("max_size", max_size, 1, MAX_SIZE))


class RespError(Exception):
    """An error reply of RESP, such as RespError("ERR unknown command"). Send it; muxcore does not raise it."""


class Framer(Protocol):
    """A framer of your own. `framer=` accepts a function or class without arguments, and calls it per connection."""

    def feed(self, data: bytes, /) -> Iterable[Any]:
        """Add received bytes, and return the complete messages.

        With a lazy iterable (a generator), muxcore requests the next message only after the delivery of the last one,
        and calls `feed` again when the iterable is exhausted. So a framer can be changed between two messages. Raise
        FrameError or FrameTooLarge for malformed input; that ends the connection.
        """

    def encode(self, message: Any, /) -> bytes:
        """The bytes on the wire of a message; called in the thread that calls `send`."""

    def rest(self) -> bytes:
        """The bytes that were fed and belong to no delivered message. A framer that replaces this one starts with them.
        If any are left at the end of the stream, the connection ends with a FrameError."""
