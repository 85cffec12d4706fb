"""What may live here: a descriptor of the user's that a Mux watches, for both cores."""

from __future__ import annotations

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Calls = dict[int, tuple[Callable[..., object], tuple[Any, ...]]]  # by READ and WRITE

READ, WRITE = 1, 2  # what is wanted of a descriptor, and what is reported of it
ERROR, HANGUP, INVALID = 4, 8, 16  # the fallback: reported beside them, wanted or not, where its backend can


class Watch:
    """Made by `Mux.add_reader` and `Mux.add_writer`; the core makes the calls."""

    __slots__ = ("calls", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.calls: Calls = {}  # not altered but replaced

    def __repr__(self) -> str:
        return f"<muxcore watch on descriptor {self.fd}>"


def as_descriptor(fd: Any) -> int:
    """A descriptor, or that of an object with `fileno()`; TypeError or ValueError for what is none."""
    number = fd
    if not isinstance(fd, int):
        if not hasattr(fd, "fileno"):
            raise TypeError(f"fd must be a descriptor or an object with fileno(), not {type(fd).__name__}")
        number = fd.fileno()
    if not isinstance(number, int):
        raise TypeError(f"fd must have a fileno() that returns an int, not {type(number).__name__}")
    number = int.__index__(number)  # a key, and so none of a class of the user's
    if not 0 <= number <= 0x7FFFFFFF:
        raise ValueError(f"fd must be an open descriptor, not {number}")
    return number
