r"""What may live here: the framers of the fallback core, and what both cores share of them because it is not hot:
errors, inline commands, and `encode` for what is not sent from the Mux's own thread.

The readers do what _core/frame.pxd does, and are what the tests compare it with. Positions in errors are bytes of the
message, so that they do not depend on how the stream was cut into reads.
"""

from __future__ import annotations

import sys

from ._typing import TYPE_CHECKING
from .errors import FrameError, FrameTooLarge
from .framing import Delimiter, Fixed, LengthPrefix, Lines, Resp, RespError

if TYPE_CHECKING:
    import re
    from collections.abc import Callable
    from typing import Any

    Scanned = tuple[int, Any]

NOTHING: Any = object()  # what next() returns when no message is complete


def check_framer(framer: Any) -> None:
    """Raise TypeError, saying what to pass instead, for what is not a framer."""
    if id(type(framer)) in SCANS:
        return
    if isinstance(framer, type) and id(framer) in SCANS:
        raise TypeError(f"framer must be an instance, not the class: pass {framer.__name__}(...)")
    if hasattr(framer, "feed") and not isinstance(framer, type):
        raise TypeError("framer must be a function that makes one for each connection, not the framer itself")
    if not callable(framer):
        raise TypeError(f"framer must be None, a muxcore framer or a function that makes one, not {framer!r}")


# --- what can be wrong -----------------------------------------------------------------------------

# _core/frame.pxd has the same numbers.
TOO_LARGE, UNFINISHED, BAD_VARINT, SHORT_LENGTH = range(1, 5)
NOT_A_NUMBER, NEGATIVE_LENGTH, NO_DOLLAR, NO_CRLF, BAD_QUOTES = range(5, 10)

WRONG = {
    BAD_VARINT: "a varint of more than 64 bits",
    SHORT_LENGTH: "a length that is smaller than the header it includes",
    NOT_A_NUMBER: "expected a decimal number and CRLF",
    NEGATIVE_LENGTH: "a negative length",
    NO_DOLLAR: "expected '$'",
    NO_CRLF: "expected CRLF",
    BAD_QUOTES: "unbalanced quotes",
}


def frame_error(framer: Any, code: int, at: int, have: int = 0, need: int = 0) -> FrameError:
    """`at`: the byte of the message that is wrong. `have` and `need`: bytes of an unfinished message; 0 is unknown."""
    if code == TOO_LARGE:
        return FrameTooLarge(f"a message is larger than max_size of {framer!r}", limit=framer.max_size)
    if code == UNFINISHED:
        wanted = f"{need}" if need else repr(framer.delimiter) if isinstance(framer, Delimiter) else "more"
        return FrameError(f"the stream ended inside a message: have {have} bytes, need {wanted} ({framer!r})")
    return FrameError(f"byte {at} of a message: {WRONG[code]} ({framer!r})")


# --- messages out ----------------------------------------------------------------------------------


def as_bytes(data: Any) -> bytes:
    """`data` itself if it is bytes, else a copy; TypeError if it is not bytes-like."""
    if type(data) is bytes:
        return data
    try:
        return memoryview(data).tobytes()
    except TypeError:
        raise TypeError(f"message must be bytes-like, not {type(data).__name__}") from None


def encode(framer: Any, message: Any) -> bytes:
    """A message as it goes onto the wire; for all framers but a user's own.

    Raises TypeError for what the framer cannot send, ValueError for what its peer could not read as one message.
    """
    if isinstance(framer, Resp):
        return encode_reply(message)
    data = as_bytes(message)
    if framer is None:
        return data
    if isinstance(framer, Fixed):
        if len(data) != framer.size:
            raise ValueError(f"message must have {framer.size} bytes, not {len(data)}")
        return data
    if len(data) > largest(framer):
        raise message_too_large(framer, len(data))
    if isinstance(framer, LengthPrefix):
        return length_header(framer, len(data)) + data
    end = b"\n" if isinstance(framer, Lines) else framer.delimiter
    whole = data + end
    if whole.find(end) != len(data):
        raise delimiter_inside(end)
    return whole


def message_too_large(framer: Any, size: int) -> ValueError:
    # No FrameTooLarge: a handler that lets a FrameError out blames the peer.
    return ValueError(f"message must have at most {largest(framer)} bytes, not {size} ({framer!r})")


def datagram_too_large(sender: Any, limit: int) -> FrameTooLarge:
    return FrameTooLarge(f"a datagram from {sender!r} has more than max_size={limit} bytes", limit=limit)


def delimiter_inside(delimiter: bytes) -> ValueError:
    return ValueError(f"message must not contain {delimiter!r}, which the framer appends: the peer would read two")


def largest(framer: Any) -> int:
    """The size of the largest message that can be sent: a length of fixed size has a maximum."""
    if isinstance(framer, LengthPrefix) and framer.size != "varint":
        return min((1 << 8 * framer.size) - 1 - framer.size * framer.header_included, sys.maxsize)
    return sys.maxsize


def length_header(framer: LengthPrefix, length: int) -> bytes:
    if framer.size != "varint":
        return (length + framer.size * framer.header_included).to_bytes(framer.size, framer.byteorder)
    header = bytearray()
    while length > 127:
        header.append(length & 127 | 128)
        length >>= 7
    header.append(length)
    return bytes(header)


def encode_reply(value: Any) -> bytes:
    """A value as a reply of RESP2."""
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, str):
        return b"+%b\r\n" % one_line(value)
    if isinstance(value, RespError):
        return b"-%b\r\n" % one_line(str(value))
    if isinstance(value, list | tuple):
        items = tuple(value)  # of its own: nothing that is called on the way, and no other thread, can change it
        return b"*%d\r\n%b" % (len(items), b"".join(map(encode_reply, items)))
    try:
        data = as_bytes(value)
    except TypeError:
        raise TypeError(
            f"message must be bytes-like, str, int, None, RespError or a list of those, not {type(value).__name__}"
        ) from None
    return b"$%d\r\n%b\r\n" % (len(data), data)


def one_line(text: str) -> bytes:
    if "\r" in text or "\n" in text:
        raise ValueError(f"message must not contain a line break: {text!r}; send bytes instead")
    return text.encode()


# --- inline commands of RESP -----------------------------------------------------------------------

# One word: plain characters, then perhaps a quoted part, which ends it. The quantifiers are possessive, since Redis
# does not backtrack either: a quote that is escaped never ends the word.
WORD = rb"""(?s)\s*+([^\s"']*+)(?:"((?:\\.|[^"\\])*+)"(?=\s|\Z)|'((?:\\'|[^'])*+)'(?=\s|\Z))?"""
ESCAPE = rb"(?s)\\(x[0-9a-fA-F]{2}|.)"
ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}



def split_inline(line: bytes) -> list[bytes] | None:
    """The words of an inline command; None if quotes are unbalanced."""
    if b'"' not in line and b"'" not in line:
        return line.split()
    import re  # few ever send a quote: importing muxcore does without, and re remembers what it has compiled

    pattern = re.compile(WORD)
    words, at, line = [], 0, line.rstrip()
    while at < len(line):
        word = pattern.match(line, at)
        if word is None or word.end() == at:  # a quote that ends no word, or begins none
            return None
        plain, double, single = word.groups()
        words.append(plain + re.sub(ESCAPE, _unescape, double or b"") + (single or b"").replace(b"\\'", b"'"))
        at = word.end()
    return words


def _unescape(match: re.Match[bytes]) -> bytes:
    what: bytes = match[1]
    return bytes([int(what[1:], 16)]) if len(what) == 3 else ESCAPED.get(what, what)


# --- messages in -----------------------------------------------------------------------------------


class Reader:
    """What one connection has received and not delivered, and how to cut it into messages."""

    __slots__ = ("ahead", "ahead_size", "changes", "data", "framer", "resume", "scan", "scanning", "start")

    left = feeding = False  # as CustomReader's
    behind = None

    def __init__(self, framer: Any) -> None:
        self.framer = framer
        self.changes = 0  # how often it has got or given something
        self.scanning = False
        self.scan = SCANS[id(type(framer))]
        self.data = bytearray()
        self.start = 0  # where the first message begins in `data`
        self.resume: Any = 0  # how far it was scanned, from there
        self.ahead = NOTHING  # that message, if it is complete ...
        self.ahead_size = 0  # ... and its bytes, with all that is around it

    @property
    def size(self) -> int:
        """Bytes that are not delivered."""
        return len(self.data) - self.start

    def feed(self, data: bytes, conn: Any = None, first: Any = None) -> bool:
        """False, and nothing done, if `first` is not the first reader of `conn` any more: a signal handler that ran as
        this began may have set another framer or ended the connection. No call is behind that, and so no handler."""
        if conn is not None and conn._reader is not first:
            return False
        self.changes += 1
        del self.data[: self.start]
        self.start = 0
        self.data += data
        if self.framer is None:
            self.ahead = NOTHING  # what has arrived is one chunk
        return True

    def peek(self, eof: bool) -> Any:
        """The next message, which stays, or NOTHING; NOTHING, too, for code that runs during a peek(). FrameError if
        there is none and will never be one."""
        if self.scanning:
            return NOTHING
        self.scanning = True
        try:
            return self._peek(eof)
        finally:
            self.scanning = False

    def _peek(self, eof: bool) -> Any:
        while self.ahead is NOTHING and self.size:
            self.ahead_size, self.ahead = self.scan(self)
            if not self.ahead_size:
                if eof:
                    self.finish()
                break
            if self.ahead is NOTHING:  # an empty request
                self.skip()
        return self.ahead

    def is_complete(self) -> bool:
        """Whether peek() has found a message."""
        return self.ahead is not NOTHING

    def encode(self, message: Any) -> bytes:
        return encode(self.framer, message)

    # Between these lines CPython runs no other code, and so none behind them until the caller has the message.
    def take(self) -> Any:
        """The message that peek() has returned; NOTHING if it is gone."""
        message = self.ahead
        if message is not NOTHING:
            self.changes += 1
            self.ahead = NOTHING
            self.start += self.ahead_size
            self.resume = 0
        return message

    def forget(self) -> None:
        """As CustomReader.forget: there is nothing to forget."""

    def put_back(self, messages: list[Any], start: int) -> None:
        """Undo each take() since `start` was that; nothing may have been fed since."""
        self.changes += 1
        self.ahead, self.start, self.resume = NOTHING, start, 0

    def skip(self) -> None:
        self.start += self.ahead_size
        self.resume = 0

    def finish(self) -> None:
        """The stream has ended behind a message that is not complete."""
        if not isinstance(self.framer, Lines):
            raise frame_error(self.framer, UNFINISHED, 0, self.size, needed(self))
        line = self.part(0, self.size)
        self.ahead_size, self.ahead = self.size, line.removesuffix(b"\r")

    def rest(self) -> bytes:
        """What is not delivered."""
        return self.part(0, self.size)

    def part(self, start: int, end: int) -> bytes:
        return bytes(self.data[self.start + start : self.start + end])

    def find(self, what: bytes, start: int) -> int:
        """Where that is, from the beginning of the message, or -1."""
        at = self.data.find(what, self.start + start)
        return at if at < 0 else at - self.start


# A scan looks at the first message: (its bytes with all that is around it, the message), or UNCOMPLETED. A message that
# is NOTHING is skipped.
UNCOMPLETED: Scanned = (0, NOTHING)


def scan_chunk(reader: Reader) -> Scanned:
    return reader.size, reader.rest()


def scan_line(reader: Reader) -> Scanned:
    end = reader.find(b"\n", reader.resume)
    size = reader.size if end < 0 else end
    if size and reader.data[reader.start + size - 1] == 13:
        size -= 1
    if size > reader.framer.max_size:
        raise frame_error(reader.framer, TOO_LARGE, 0)
    if end >= 0:
        return end + 1, reader.part(0, size)
    reader.resume = reader.size
    return UNCOMPLETED


def scan_delimited(reader: Reader) -> Scanned:
    delimiter, max_size = reader.framer.delimiter, reader.framer.max_size
    end = reader.find(delimiter, reader.resume)
    # Of what is there, all but the last bytes, which may begin the delimiter, surely belong to the message.
    size = max(reader.size - len(delimiter) + 1, 0) if end < 0 else end
    if size > max_size:
        raise frame_error(reader.framer, TOO_LARGE, 0)
    if end >= 0:
        return end + len(delimiter), reader.part(0, end)
    reader.resume = size
    return UNCOMPLETED


def scan_fixed(reader: Reader) -> Scanned:
    size = reader.framer.size
    return (size, reader.part(0, size)) if reader.size >= size else UNCOMPLETED


def scan_prefixed(reader: Reader) -> Scanned:
    header, length = read_length(reader)
    if header == 0:
        return UNCOMPLETED
    if length > reader.framer.max_size:
        raise frame_error(reader.framer, TOO_LARGE, 0)
    end = header + length
    return (end, reader.part(header, end)) if reader.size >= end else UNCOMPLETED


def read_length(reader: Reader) -> tuple[int, int]:
    """The size of the header, 0 if it is not complete, and the length in it."""
    framer = reader.framer
    if framer.size == "varint":
        return read_varint(reader)
    if reader.size < framer.size:
        return 0, 0
    length = int.from_bytes(reader.part(0, framer.size), framer.byteorder)
    if framer.header_included:
        length -= framer.size
        if length < 0:
            raise frame_error(framer, SHORT_LENGTH, 0)
    return framer.size, length


def read_varint(reader: Reader) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(reader.part(0, 10)):
        value |= (byte & 127) << 7 * i
        if value >= 1 << 64:
            raise frame_error(reader.framer, BAD_VARINT, i)
        if byte < 128:
            return i + 1, value
        if i == 9:
            raise frame_error(reader.framer, BAD_VARINT, i)
    return 0, 0


def scan_request(reader: Reader) -> Scanned:
    """A request of RESP. `resume` is (where to go on, how many bulk strings are to come, those that are there)."""
    if not reader.resume and reader.part(0, 2).startswith(MAY_BE_EMPTY) and (end := empty_requests(reader)):
        return end, NOTHING
    if reader.data[reader.start] != ord("*"):
        return scan_inline(reader)
    at, left, parts = reader.resume or (0, -1, [])
    if left < 0:
        found = read_number(reader, 1)
        if found is None:
            return UNCOMPLETED
        at, left = found
        if left <= 0:
            return at, NOTHING
        if at + left * len("$0\r\n\r\n") > reader.framer.max_size:
            raise frame_error(reader.framer, TOO_LARGE, 0)
    while left and (end := scan_bulk(reader, at, parts)):
        at, left = end, left - 1
    if left == 0:
        return at, parts
    reader.resume = at, left, parts
    return UNCOMPLETED


MAY_BE_EMPTY = (b"\t", b"\n", b"\v", b"\f", b"\r", b" ", b"*0", b"*-")
EMPTY = rb"(?:[\t-\r ]*\n|\*(?:-\d|0)\r\n)+"


def empty_requests(reader: Reader) -> int:
    """Where those at the front end, for a peer may send nothing else; 0 if there is none that is quick to find."""
    import re  # as in split_inline

    most = reader.framer.max_size
    found = re.compile(EMPTY).match(reader.data, reader.start)
    if found is None or most < 9:  # a number above max_size is wrong
        return 0
    lines = found[0].split(b"\n")
    return found.end() - reader.start if max(map(len, lines)) < most else 0


def scan_bulk(reader: Reader, at: int, parts: list[bytes]) -> int:
    """Append the bulk string that begins at `at`; where it ends, or 0 if it is not complete."""
    framer, size = reader.framer, reader.size
    if at == size:
        return 0
    if reader.part(at, at + 1) != b"$":
        raise frame_error(framer, NO_DOLLAR, at)
    found = read_number(reader, at + 1)
    if found is None:
        return 0
    start, length = found
    if reader.part(at + 1, at + 2) == b"-":  # -0, too
        raise frame_error(framer, NEGATIVE_LENGTH, at + 1)
    end = start + length + 2
    if end > framer.max_size:
        raise frame_error(framer, TOO_LARGE, 0)
    for i, expected in ((end - 2, b"\r"), (end - 1, b"\n")):
        if i < size and reader.part(i, i + 1) != expected:
            raise frame_error(framer, NO_CRLF, i)
    if size < end:
        return 0
    parts.append(reader.part(start, end - 2))
    return end


MAX_DIGITS = 18


def read_number(reader: Reader, at: int) -> tuple[int, int] | None:
    """A number and CRLF: where they end, and the number; None if they are not complete."""
    framer = reader.framer
    sign, digits, value = 1, 0, 0
    for i, byte in enumerate(reader.part(at, at + MAX_DIGITS + 3), at):
        if byte == ord("-") and i == at:
            sign = -1
        elif ord("0") <= byte <= ord("9") and digits < MAX_DIGITS:
            digits += 1
            value = 10 * value + byte - ord("0")
            if value > framer.max_size:
                raise frame_error(framer, TOO_LARGE, 0)
        elif byte == ord("\r") and digits:
            if reader.part(i + 1, i + 2) in (b"", b"\n"):
                return (i + 2, sign * value) if reader.size > i + 1 else None
            raise frame_error(framer, NOT_A_NUMBER, i + 1)
        else:
            raise frame_error(framer, NOT_A_NUMBER, i)
    return None


def scan_inline(reader: Reader) -> Scanned:
    end = reader.find(b"\n", reader.resume or 0)
    if (reader.size if end < 0 else end + 1) > reader.framer.max_size:
        raise frame_error(reader.framer, TOO_LARGE, 0)
    if end < 0:
        reader.resume = reader.size
        return UNCOMPLETED
    words = split_inline(reader.part(0, end))
    if words is None:
        raise frame_error(reader.framer, BAD_QUOTES, 0)
    return end + 1, words or NOTHING


def needed(reader: Reader) -> int:
    """The bytes that the unfinished first message must have, as far as that is known; else 0."""
    framer = reader.framer
    if isinstance(framer, Fixed):
        return framer.size
    if isinstance(framer, LengthPrefix):
        header, length = read_length(reader)
        return header + length if header else 0 if framer.size == "varint" else framer.size
    return 0


# By the id of the framer's class: the metaclass of a user's class may have a __hash__ of its own.
SCANS: dict[int, Callable[[Reader], Scanned]] = {
    id(type(None)): scan_chunk,
    id(Lines): scan_line,
    id(Delimiter): scan_delimited,
    id(LengthPrefix): scan_prefixed,
    id(Fixed): scan_fixed,
    id(Resp): scan_request,
}
