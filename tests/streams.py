"""What may live here: hypothesis strategies of framers, of the streams they read, and of how these are cut."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from muxcore import Delimiter, Fixed, LengthPrefix, Lines, Resp
from muxcore._frame import encode

FRAMERS: list[Any] = [
    Lines(max_size=12),
    Delimiter(b"\r\n", max_size=12),
    Delimiter(b"aab", max_size=12),
    Delimiter(b"|", max_size=12),
    LengthPrefix(1, max_size=12),
    LengthPrefix(1, header_included=True),
    LengthPrefix(2, byteorder="little", max_size=300),
    LengthPrefix(4, max_size=300),
    LengthPrefix(8, byteorder="little", header_included=True, max_size=300),
    LengthPrefix("varint", max_size=300),
    Fixed(1),
    Fixed(3),
    Resp(max_size=60),
]

# Bytes that mean something to a framer, so that garbage is nearly right.
TOKENS = [
    b"\n", b"\r", b"\r\n", b"a", b"aa", b"aab", b"|", b"\0", b"\1", b"\2", b"\3", b"\0\0\0", b"\xff", b"\x80", b"\x81",
    b"*", b"*0\r\n", b"*1\r\n", b"*2\r\n", b"*-1\r\n", b"$", b"$0\r\n\r\n", b"$3\r\nGET\r\n", b"$-1\r\n", b"-", b"0",
    b"1", b"9", b"PING\r\n", b'SET a "b c"\n', b"'", b'"', b" ", b"\\", b"00000000000000000000", b"$-0\r\n\r\n",
]  # fmt: skip


def messages(framer: Any) -> st.SearchStrategy[bytes]:
    """Messages that `framer` can send."""
    if isinstance(framer, Fixed):
        return st.binary(min_size=framer.size, max_size=framer.size)
    anything = st.one_of(st.binary(max_size=12), st.sampled_from(TOKENS))
    return anything.filter(lambda message: sendable(framer, message))


def sendable(framer: Any, message: bytes) -> bool:
    try:
        encode(framer, message)
    except ValueError:
        return False
    return True


def request(parts: list[bytes]) -> bytes:
    """A request, as a client of RESP sends it."""
    return encode(Resp(), parts)


def streams(framer: Any) -> st.SearchStrategy[bytes]:
    """What a peer may send: messages, garbage, and both."""
    valid = (
        st.lists(st.binary(max_size=5), max_size=4).map(request)
        if isinstance(framer, Resp)
        else messages(framer).map(lambda message: encode(framer, message))
    )
    return st.lists(st.one_of(valid, valid, valid, st.sampled_from(TOKENS), st.binary(max_size=4)), max_size=12).map(
        b"".join
    )


def cut(stream: bytes, sizes: list[int]) -> list[bytes]:
    """The stream in reads of these sizes, and the rest in one."""
    pieces = []
    for size in sizes:
        pieces.append(stream[:size])
        stream = stream[size:]
    return [piece for piece in [*pieces, stream] if piece]


sizes = st.lists(st.integers(1, 9), max_size=30)


def from_fuzzer(data: bytes) -> tuple[Any, list[bytes]]:
    """The framer and the pieces of an input of the fuzzer, as tests/fuzz/README.md has it; none of what is no input."""
    if len(data) < 4 or not 1 <= data[0] & 7 <= 5:
        return None, []
    kind, max_size, option, count = data[0] & 7, data[1] or 1 << 40, data[2], data[3] & 15
    sizes, stream = [byte & 15 for byte in data[4 : 4 + count]], data[4 + count :]
    if kind == 2:
        delimiter, stream = stream[: 1 + (option & 7)], stream[1 + (option & 7) :]
        return (Delimiter(delimiter, max_size=max_size), cut(stream, sizes)) if delimiter else (None, [])
    if kind == 3:
        size: Any = "varint" if option & 4 else 1 << (option & 3)
        order: Any = "little" if option & 8 else "big"
        included = option & 16 != 0 and size != "varint"
        return LengthPrefix(size, byteorder=order, header_included=included, max_size=max_size), cut(stream, sizes)
    framer: Any = Lines(max_size) if kind == 1 else Fixed(1 + (option & 15)) if kind == 4 else Resp(max_size)
    return framer, cut(stream, sizes)
