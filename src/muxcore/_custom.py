"""What may live here: a user's framer, which is a Python object, as both cores call it, and the messages that a framer
has found when another was set.
"""

from __future__ import annotations

from ._frame import NOTHING, UNFINISHED, as_bytes, frame_error
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from ._frame import Reader

FRONT = slice(0, 0)
LIST_ITERATORS: tuple[type, ...] = (type(iter([])), type(iter(())))


class CustomReader:
    """As Reader, for a framer that is a Python object of its user's, made for this connection. Both cores use it.

    A call of the framer may do anything, also to this connection: read from it, set its framer, close it. A framer
    that is replaced amid a call of its own may hold input that its rest() does not know yet, in a generator's frame. So
    it stays in front of the next one (`left`) until that call has returned, and then hands on what it has.
    """

    __slots__ = (
        "_fed", "_messages", "_over", "_restart", "behind", "changes", "custom", "data", "error", "feeding", "found",
        "framer", "left",
    )

    start = 0  # as Reader's; here it means nothing

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.framer = factory
        self.custom = factory()
        for name in ("feed", "encode", "rest"):
            if not callable(getattr(self.custom, name, None)):
                raise TypeError(f"framer must make an object with {name}(), not {self.custom!r}")
        self.changes = 0
        self.data = b""  # not fed yet
        self.found: list[Any] = []  # messages that are complete and not delivered: one, or more that were put back
        self.error: Exception | None = None  # what it has raised; it does so again, as Reader.peek would
        self.feeding = False  # in a call of the framer
        self.left = False  # another framer was set amid such a call ...
        self.behind: Any = None  # ... and this reads what comes behind; as Found.behind
        self._fed: Any = None  # what feed() has returned ...
        self._messages: Iterator[Any] | None = None  # ... and its iterator, while that may have more
        self._restart = False  # an interrupt may have ended that before it was exhausted
        self._over = False  # see forget()

    def feed(self, data: bytes, conn: Any = None, first: Any = None) -> bool:
        """As Reader.feed."""
        if conn is not None and conn._reader is not first:
            return False
        self.changes += 1
        self.data += data
        return True

    def peek(self, eof: bool) -> Any:
        """As Reader.peek; whatever the framer raises comes out, too."""
        if self.error is not None and not self.found:  # else messages in front of it were put back
            raise self.error
        while not (self.found or self.feeding or self.left or self._over):
            self.feeding = True
            try:
                self._find(eof)
            except Exception as error:
                if not self._over:
                    self.error = error
                raise
            except BaseException:
                self._restart = True
                raise
            finally:
                self.feeding = False
            if self._messages is None and not self.data:
                break  # else what was found has been received meanwhile
        return self.found[0] if self.found else NOTHING

    @property
    def size(self) -> int:
        """Bytes that were not fed yet."""
        return len(self.data)

    def is_complete(self) -> bool:
        return bool(self.found)

    # A line here that removes something also stores it, with no call in between: an interrupt there would lose it.
    def _find(self, eof: bool) -> None:
        while not self.found and (
            self._messages is not None or self._fed is not None or (not self.left and (self.data or self._restart))
        ):
            if self._messages is None:
                if self._fed is None:
                    data, self.data, self._restart = self.data, b"", False
                    self._fed = self.custom.feed(data)
                self._messages = iter(self._fed)
                self._fed = None
            for message in self._messages:
                self.found += (message,)
                return
            self._messages = None
        if eof and not self.found and (rest := self.custom.rest()) and not self.left:
            raise frame_error(self.framer, UNFINISHED, 0, len(rest))

    def take(self) -> Any:
        """As Reader.take."""
        return take_first(self)

    def put_back(self, messages: list[Any], start: int) -> None:
        """Return messages that were removed, in front of those that are there."""
        self.changes += 1
        self.found[FRONT] = messages

    def encode(self, message: Any) -> bytes:
        return as_bytes(self.custom.encode(message))

    def rest(self) -> bytes:
        """As Reader.rest. A message that was found is not in its framer's rest() any more."""
        self._take_list()
        return rest_of(self, as_bytes(self.custom.rest()) + self.data)

    def last_rest(self) -> bytes:
        """What the next framer gets of one that was left: all but the messages that were found."""
        self._take_list()
        self.feeding = True  # rest() may read from the connection, too
        try:
            return as_bytes(self.custom.rest()) + self.data
        finally:
            self.feeding = False

    def _take_list(self) -> None:
        """feed() has found all messages of a list that it has returned, but those of a generator one by one."""
        if self._messages is not None and isinstance(self._messages, LIST_ITERATORS):
            self.found += self._messages

    def forget(self) -> None:
        """It is not used any more. An error that it still keeps has frames, which hold messages and this object."""
        self._over = True
        self.error = None
        if self.behind is not None:
            self.behind.forget()


class Found:
    """As Reader: messages that one framer has found, when another was set before they could be delivered. `behind`
    reads what comes after them; None: the connection's own framer does."""

    __slots__ = ("behind", "changes", "encode", "found")

    start = size = 0
    framer = NOTHING  # of several, perhaps
    left = True
    feeding = False

    def __init__(self, messages: list[Any], encode: Callable[[Any], bytes], behind: Any) -> None:
        self.found = messages
        self.encode = encode
        self.behind = behind
        self.changes = 0

    def peek(self, eof: bool) -> Any:
        return self.found[0] if self.found else NOTHING

    def is_complete(self) -> bool:
        return bool(self.found)

    def take(self) -> Any:
        return take_first(self)

    def put_back(self, messages: list[Any], start: int) -> None:
        self.changes += 1
        self.found[FRONT] = messages

    def rest(self) -> bytes:
        return rest_of(self, b"")

    def forget(self) -> None:
        if self.behind is not None:
            self.behind.forget()


def rest_of(reader: CustomReader | Found, unread: bytes) -> bytes:
    """What was found, `unread` behind it, and what comes behind that."""
    found = b"".join(map(reader.encode, reader.found.copy()))
    return found + unread + (b"" if reader.behind is None else reader.behind.rest())


def rest_for_next(reader: Reader | CustomReader | Found) -> bytes:
    """What a framer gets that is set while `reader` is first: all, or what is behind a framer that is in a call."""
    if not reader.feeding:
        return reader.rest()
    return b"" if reader.behind is None else reader.behind.rest()


def take_first(reader: CustomReader | Found) -> Any:
    if not reader.found:
        return NOTHING
    message = reader.found[0]
    del reader.found[0]
    reader.changes += 1
    return message
