"""What may live here: framers as the user sees them: specifications of where a message ends, checked when made.

They are immutable, hold nothing of a connection and are shared by all. How bytes are cut is in _frame.pxd for the
compiled core, and in _frame.py for the fallback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final

from ._config import check_int

__all__ = ["Delimiter", "Fixed", "Framer", "LengthPrefix", "Lines", "Resp", "RespError"]

MAX_SIZE = 1 << 40  # of a message: so no sum of sizes overflows


@final
@dataclass(frozen=True, slots=True)
class Lines:
    r"""Lines: a message is what stands before a b"\n", without the b"\r" that may precede it. `send` adds b"\n".

    At the end of the stream, what follows the last b"\n" is a line, too.

    max_size: bytes of the longest line; a longer one ends its connection with FrameTooLarge.
    """

    max_size: int = 65536

    def __post_init__(self) -> None:
        check_int("max_size", self.max_size, 1, MAX_SIZE)


@final
@dataclass(frozen=True, slots=True)
class Delimiter:
    r"""A message is what stands before `delimiter`, one byte or more; `send` adds it.

    max_size: bytes of the longest message; a longer one ends its connection with FrameTooLarge.
    """

    delimiter: bytes
    max_size: int = field(default=65536, kw_only=True)

    def __post_init__(self) -> None:
        if type(self.delimiter) is not bytes:
            raise TypeError(f"delimiter must be bytes, not {type(self.delimiter).__name__}")
        if not 1 <= len(self.delimiter) <= 255:
            raise ValueError(f"delimiter must have 1 to 255 bytes, not {len(self.delimiter)}")
        check_int("max_size", self.max_size, 1, MAX_SIZE)


@final
@dataclass(frozen=True, slots=True)
class LengthPrefix:
    """Every message is preceded by its length: an unsigned integer of 1, 2, 4 or 8 bytes, or a varint.

    size: bytes of the length, or "varint": seven bits a byte, lowest first, as Protocol Buffers has it.
    byteorder: "big" (the network's) or "little".
    header_included: the length counts its own bytes, too.
    max_size: bytes of the longest message, the length not included. A longer one ends its connection with
        FrameTooLarge, before it is read.
    """

    size: int | Literal["varint"] = 4
    byteorder: Literal["big", "little"] = field(default="big", kw_only=True)
    header_included: bool = field(default=False, kw_only=True)
    max_size: int = field(default=1024 * 1024, kw_only=True)

    def __post_init__(self) -> None:
        if self.size not in (1, 2, 4, 8, "varint") or isinstance(self.size, bool | float):
            raise ValueError(f"size must be 1, 2, 4, 8 or 'varint', not {self.size!r}")
        if self.byteorder not in ("big", "little"):
            raise ValueError(f"byteorder must be 'big' or 'little', not {self.byteorder!r}")
        if not isinstance(self.header_included, bool):
            raise TypeError(f"header_included must be a bool, not {type(self.header_included).__name__}")
        if self.header_included and self.size == "varint":
            raise ValueError("header_included must be False for a varint, whose own length depends on it")
        check_int("max_size", self.max_size, 1, MAX_SIZE)


@final
@dataclass(frozen=True, slots=True)
class Fixed:
    """Every message has `size` bytes."""

    size: int

    def __post_init__(self) -> None:
        check_int("size", self.size, 1, MAX_SIZE)


@final
@dataclass(frozen=True, slots=True)
class Resp:
    """The server's side of RESP2, the protocol of Redis.

    A message is one request, as a list of bytes; an inline command ("GET key", as typed into a terminal) is split at
    white space, and quotes mean what they mean to Redis. Empty requests are skipped. `send` takes bytes (a bulk
    string), str (a simple string, such as "OK"), int, None (nil), RespError, and lists or tuples of those (an array).

    max_size: bytes of the longest request, as they are on the wire; a longer one ends its connection with
        FrameTooLarge, before it is read.
    """

    max_size: int = 1024 * 1024

    def __post_init__(self) -> None:
        check_int("max_size", self.max_size, 1, MAX_SIZE)


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
