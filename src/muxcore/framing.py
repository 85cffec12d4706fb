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
    r"""Lines: a message is what stands before a b"\n", without the b"\r" that may precede it. `send` adds b"\n".

    At the end of the stream, what follows the last b"\n" is a line, too.

    max_size: bytes of the longest line that is received; a longer one ends its connection with FrameTooLarge.
    """

    __slots__ = ("max_size",)

    max_size: int

    def __init__(self, max_size: int = 65536) -> None:
        self._set(max_size=check_int("max_size", max_size, 1, MAX_SIZE))


@final
class Delimiter(Frozen):
    r"""A message is what stands before `delimiter`, one byte or more; `send` adds it.

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
    """Every message is preceded by its length: an unsigned integer of 1, 2, 4 or 8 bytes, or a varint.

    size: bytes of the length, or "varint": seven bits a byte, lowest first, as Protocol Buffers has it.
    byteorder: "big" (the network's) or "little".
    header_included: the length counts its own bytes, too.
    max_size: bytes of the longest message that is received, the length not included. A longer one ends its connection
        with FrameTooLarge, before it is read.
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
    """Every message has `size` bytes."""

    __slots__ = ("size",)

    size: int

    def __init__(self, size: int) -> None:
        self._set(size=check_int("size", size, 1, MAX_SIZE))


@final
class Resp(Frozen):
    """The server's side of RESP2, the protocol of Redis.

    A message is one request, as a list of bytes; an inline command ("GET key", as typed into a terminal) is split at
    white space, and quotes mean what they mean to Redis. Empty requests are skipped. `send` takes bytes (a bulk
    string), str (a simple string, such as "OK"), int, None (nil), RespError, and lists or tuples of those (an array).

    max_size: bytes of the longest request, as they are on the wire; a longer one ends its connection with
        FrameTooLarge, before it is read.
    """

    __slots__ = ("max_size",)

    max_size: int

    def __init__(self, max_size: int = 1048576) -> None:
        self._set(max_size=check_int("max_size", max_size, 1, MAX_SIZE))


class RespError(Exception):
    """An error reply of RESP, such as RespError("ERR unknown command"). To be sent; muxcore raises none."""


class Framer(Protocol):
    """A framer of your own. `framer=` takes a function (or class) without arguments that makes one per connection."""

    def feed(self, data: bytes, /) -> Iterable[Any]:
        """Take what was received, and return the messages that are complete.

        A lazy iterable (a generator) is asked for its next message only when the last one was delivered, and `feed` is
        called again when it is exhausted: so a framer can be changed in the middle. Raise FrameError (or FrameTooLarge)
        for what is malformed; that ends the connection.
        """

    def encode(self, message: Any, /) -> bytes:
        """The bytes of a message that is being sent; called by the thread that calls `send`."""

    def rest(self) -> bytes:
        """What was fed and is in none of the messages delivered so far. A framer that replaces this one starts there;
        if it is not empty at the end of the stream, that is a FrameError."""
