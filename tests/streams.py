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
    b"1", b"9", b"PING\r\n", b'SET a "b c"\n', b"'", b'"', b" ", b"\\", b"00000000000000000000",
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
