"""Framers: what they refuse, what they send, and how they read a stream, however it is cut (Promise frame-errors)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import FRAMERS, cut, messages, request, sizes, streams

import muxcore
from muxcore import Delimiter, Fixed, LengthPrefix, Lines, Resp, RespError
from muxcore._frame import NOTHING, Reader, encode, split_inline


def read(framer: Any, pieces: Iterable[bytes]) -> tuple[list[Any], str | None]:
    """The messages of a stream that comes in these pieces and ends, and what is wrong with it."""
    reader, found = Reader(framer), []
    try:
        for piece in pieces:
            reader.feed(piece)
            while reader.peek(False) is not NOTHING:
                found.append(reader.take())
        while reader.peek(True) is not NOTHING:
            found.append(reader.take())
    except muxcore.FrameError as error:
        return found, f"{type(error).__name__}: {error}"
    assert reader.rest() == b""
    return found, None


# --- specifications --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Lines(0), ValueError, "max_size must be >= 1"),
        (lambda: Lines("big"), TypeError, "max_size must be an int"),
        (lambda: Lines(True), TypeError, "max_size must be an int"),
        (lambda: Delimiter(), TypeError, "delimiter"),
        (lambda: Delimiter("\n"), TypeError, "delimiter must be bytes, not str"),
        (lambda: Delimiter(bytearray(b"\n")), TypeError, "delimiter must be bytes, not bytearray"),
        (lambda: Delimiter(b""), ValueError, "delimiter must have 1 to 255 bytes, not 0"),
        (lambda: Delimiter(bytes(256)), ValueError, "delimiter must have 1 to 255 bytes, not 256"),
        (lambda: Delimiter(b"\n", max_size=-1), ValueError, "max_size must be >= 1"),
        (lambda: Delimiter(b"\n", 5), TypeError, "positional"),
        (lambda: LengthPrefix(3), ValueError, "size must be 1, 2, 4, 8 or 'varint', not 3"),
        (lambda: LengthPrefix(True), ValueError, "size must be"),
        (lambda: LengthPrefix(4.0), ValueError, "size must be"),
        (lambda: LengthPrefix("int"), ValueError, "size must be"),
        (lambda: LengthPrefix(byteorder="network"), ValueError, "byteorder must be 'big' or 'little', not 'network'"),
        (lambda: LengthPrefix(header_included=1), TypeError, "header_included must be a bool, not int"),
        (lambda: LengthPrefix("varint", header_included=True), ValueError, "header_included must be False"),
        (lambda: LengthPrefix(max_size=0), ValueError, "max_size must be >= 1"),
        (lambda: Fixed(0), ValueError, "size must be >= 1"),
        (lambda: Fixed(None), TypeError, "size must be an int"),
        (lambda: Resp(0), ValueError, "max_size must be >= 1"),
    ],
)
def test_a_bad_specification_is_named(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("framer", FRAMERS, ids=repr)
def test_a_specification_is_immutable_and_can_be_compared(framer: Any) -> None:
    same = framer.__replace__()
    assert (same, hash(same)) == (framer, hash(framer))
    with pytest.raises(AttributeError, match="is immutable"):
        setattr(framer, framer.__slots__[0], 5)


class Half:
    feed = encode = None


@pytest.mark.parametrize(
    ("framer", "text"),
    [
        (Lines, r"framer must be an instance, not the class: pass Lines\(\.\.\.\)"),
        (5, "framer must be None, a muxcore framer or a function that makes one, not 5"),
        ([], "framer must be None, a muxcore framer or a function that makes one"),
        (b"\n", "framer must be None, a muxcore framer or a function that makes one"),
        (Half(), "framer must be a function that makes one for each connection, not the framer itself"),
    ],
)
def test_what_is_not_a_framer_is_named(mux: muxcore.Mux, framer: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        mux.listen(("127.0.0.1", 0), print, framer=framer)


# --- sending ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("framer", "message", "sent"),
    [
        (None, b"raw", b"raw"),
        (None, memoryview(b"abcd")[::2], b"ac"),
        (Lines(), b"line", b"line\n"),
        (Lines(), b"", b"\n"),
        (Lines(4), bytearray(b"four"), b"four\n"),
        (Lines(4), b"longer than what is received", b"longer than what is received\n"),
        (Delimiter(b"|", max_size=1), b"ab", b"ab|"),
        (LengthPrefix(1, max_size=3), b"four", b"\4four"),
        (LengthPrefix("varint", max_size=3), b"four", b"\4four"),
        (Delimiter(b"\r\n"), b"a\nb\r", b"a\nb\r\r\n"),
        (Delimiter(b"aab"), b"x", b"xaab"),
        (LengthPrefix(), b"four", b"\0\0\0\4four"),
        (LengthPrefix(1), b"", b"\0"),
        (LengthPrefix(1), bytes(255), b"\xff" + bytes(255)),
        (LengthPrefix(2, byteorder="little"), b"abc", b"\3\0abc"),
        (LengthPrefix(2, header_included=True), b"abc", b"\0\5abc"),
        (LengthPrefix(8), b"x", b"\0\0\0\0\0\0\0\1x"),
        (LengthPrefix("varint"), b"x", b"\1x"),
        (LengthPrefix("varint"), bytes(127), b"\x7f" + bytes(127)),
        (LengthPrefix("varint"), bytes(128), b"\x80\1" + bytes(128)),
        (LengthPrefix("varint"), bytes(300), b"\xac\2" + bytes(300)),
        (Fixed(3), b"abc", b"abc"),
        (Resp(), b"bulk", b"$4\r\nbulk\r\n"),
        (Resp(), bytearray(b"\r\n"), b"$2\r\n\r\n\r\n"),
        (Resp(), b"", b"$0\r\n\r\n"),
        (Resp(), "OK", b"+OK\r\n"),
        (Resp(), "\u00e4", b"+\xc3\xa4\r\n"),
        (Resp(), 42, b":42\r\n"),
        (Resp(), -(10**30), b":-1" + b"0" * 30 + b"\r\n"),
        (Resp(), True, b":1\r\n"),
        (Resp(), None, b"$-1\r\n"),
        (Resp(), RespError("ERR no such key"), b"-ERR no such key\r\n"),
        (Resp(), [], b"*0\r\n"),
        (Resp(), [b"a", (1, None), "x"], b"*3\r\n$1\r\na\r\n*2\r\n:1\r\n$-1\r\n+x\r\n"),
    ],
)
def test_messages_are_framed(framer: Any, message: Any, sent: bytes) -> None:
    assert encode(framer, message) == sent


def test_bytes_to_which_nothing_is_added_are_not_copied() -> None:
    message = bytes(1000)
    assert encode(None, message) is message
    assert encode(Fixed(1000), message) is message


@pytest.mark.parametrize(
    ("framer", "message", "error", "text"),
    [
        (Lines(), "text", TypeError, "message must be bytes-like, not str"),
        (Lines(), b"two\nlines", ValueError, r"message must not contain b'\\n', .*: the peer would read two"),
        (Delimiter(b"\r\n"), b"a\r\nb", ValueError, r"must not contain b'\\r\\n'"),
        (Delimiter(b"aba"), b"ab", ValueError, "must not contain b'aba'"),  # ababa: the peer sees it too early
        (LengthPrefix(1), bytes(256), ValueError, "at most 255 bytes, not 256"),
        (LengthPrefix(1, header_included=True), bytes(255), ValueError, "at most 254 bytes"),
        (Fixed(3), b"four", ValueError, "message must have 3 bytes, not 4"),
        (Fixed(3), b"", ValueError, "message must have 3 bytes, not 0"),
        (Resp(), 1.5, TypeError, "message must be bytes-like, str, int, None, RespError or a list of those, not float"),
        (Resp(), [b"a", {}], TypeError, "or a list of those, not dict"),
        (Resp(), "two\r\nlines", ValueError, "message must not contain a line break"),
        (Resp(), "two\rlines", ValueError, "message must not contain a line break"),
        (Resp(), RespError("two\nlines"), ValueError, "message must not contain a line break"),
    ],
)
def test_a_message_that_cannot_be_framed_is_refused(
    framer: Any, message: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        encode(framer, message)
    assert not isinstance(caught.value, muxcore.FrameError), "the peer is not to blame"


# --- reading ---------------------------------------------------------------------------------------

LINES, CRLF, BLOB = Lines(5), Delimiter(b"\r\n", max_size=5), LengthPrefix(1, max_size=5)
COUNTED, VARINT, RESP = LengthPrefix(2, header_included=True), LengthPrefix("varint", max_size=300), Resp(max_size=60)


SHORT = Resp(max_size=8)


def too_large(framer: Any) -> str:
    return f"FrameTooLarge: a message is larger than max_size of {framer!r}"


def unfinished(framer: Any, have: int, need: Any) -> str:
    return f"FrameError: the stream ended inside a message: have {have} bytes, need {need} ({framer!r})"


def wrong(framer: Any, at: int, what: str) -> str:
    return f"FrameError: byte {at} of a message: {what} ({framer!r})"


READS: list[tuple[Any, bytes, list[Any], str | None]] = [
    (None, b"", [], None),
    (LINES, b"", [], None),
    (LINES, b"a\nb\r\n\n\r\nc\r\r\n", [b"a", b"b", b"", b"", b"c\r"], None),
    (LINES, b"a\nlast", [b"a", b"last"], None),
    (LINES, b"a\nlast\r", [b"a", b"last"], None),
    (LINES, b"12345\n12345\r\n12345", [b"12345", b"12345", b"12345"], None),
    (LINES, b"a\n123456\nb\n", [b"a"], too_large(LINES)),
    (LINES, b"a\n12345\r\r\nb\n", [b"a"], too_large(LINES)),
    (LINES, b"123456", [], too_large(LINES)),
    (LINES, b"\na\r", [b"", b"a"], None),
    (CRLF, b"a\r\nb\n\r\n\r\n", [b"a", b"b\n", b""], None),
    (CRLF, b"12345\r\n", [b"12345"], None),
    (CRLF, b"123456\r\n", [], too_large(CRLF)),
    (CRLF, b"1234567", [], too_large(CRLF)),  # the last byte may begin the delimiter, the six before it cannot
    (CRLF, b"a\r\nb", [b"a"], unfinished(CRLF, 1, b"\r\n")),
    (CRLF, b"a\r\nb\r", [b"a"], unfinished(CRLF, 2, b"\r\n")),
    (Delimiter(b"aab"), b"aaabxaab", [b"a", b"x"], None),
    (BLOB, b"\1a\0\5hello", [b"a", b"", b"hello"], None),
    (BLOB, b"\1a\6", [b"a"], too_large(BLOB)),
    (BLOB, b"\1a\5hell", [b"a"], unfinished(BLOB, 5, 6)),
    (COUNTED, b"\0\2\0\3a", [b"", b"a"], None),
    (COUNTED, b"\0\3a\0\1", [b"a"], wrong(COUNTED, 0, "a length that is smaller than the header it includes")),
    (COUNTED, b"\0", [], unfinished(COUNTED, 1, 2)),
    (LengthPrefix(8), b"\xff" * 8, [], too_large(LengthPrefix(8))),
    (LengthPrefix(4, byteorder="little"), b"\1\0\0\0a", [b"a"], None),
    (VARINT, b"\1a\0" + b"\xac\2" + bytes(300), [b"a", b"", bytes(300)], None),
    (VARINT, b"\x81\x00a", [b"a"], None),  # more bytes than it needs
    (VARINT, b"\1a\xad\2", [b"a"], too_large(VARINT)),
    (VARINT, b"\xff" * 9 + b"\2", [], wrong(VARINT, 9, "a varint of more than 64 bits")),
    (VARINT, b"\x80" * 9 + b"\2", [], wrong(VARINT, 9, "a varint of more than 64 bits")),
    (VARINT, b"\x80" * 10, [], wrong(VARINT, 9, "a varint of more than 64 bits")),
    (VARINT, b"\x80", [], unfinished(VARINT, 1, "more")),
    (VARINT, b"\2a", [], unfinished(VARINT, 2, 3)),
    (Fixed(3), b"abcdef", [b"abc", b"def"], None),
    (Fixed(3), b"abcd", [b"abc"], unfinished(Fixed(3), 1, 3)),
    (RESP, b"*1\r\n$4\r\nPING\r\n*2\r\n$3\r\nGET\r\n$0\r\n\r\n", [[b"PING"], [b"GET", b""]], None),
    (RESP, b"PING\r\n\r\n\n  \r\nGET  key \n", [[b"PING"], [b"GET", b"key"]], None),
    (RESP, b"\n" + b"GET key\n" * 10, [[b"GET", b"key"]] * 10, None),  # the first line is empty, the rest too large
    (RESP, b"*0\r\n*-1\r\n*1\r\n$1\r\na\r\n", [[b"a"]], None),
    (SHORT, b"*0\r\n*-8\r\n*-9\r\n", [], too_large(SHORT)),
    (RESP, b"*1\r\n$2\r\n\r\n\r\n", [[b"\r\n"]], None),
    (RESP, b'SET "a b" \'c\'\n', [[b"SET", b"a b", b"c"]], None),
    (RESP, b"PING\n*x\r\n", [[b"PING"]], wrong(RESP, 1, "expected a decimal number and CRLF")),
    (RESP, b"*\r\n", [], wrong(RESP, 1, "expected a decimal number and CRLF")),
    (RESP, b"*1\n", [], wrong(RESP, 2, "expected a decimal number and CRLF")),
    (RESP, b"*1\r$", [], wrong(RESP, 3, "expected a decimal number and CRLF")),
    (RESP, b"*1-\r\n", [], wrong(RESP, 2, "expected a decimal number and CRLF")),
    (RESP, b"*" + b"0" * 21 + b"\r\n", [], wrong(RESP, 19, "expected a decimal number and CRLF")),
    (RESP, b"*1\r\n:1\r\n", [], wrong(RESP, 4, "expected '$'")),
    (RESP, b"*1\r\n$-1\r\n", [], wrong(RESP, 5, "a negative length")),
    (RESP, b"*1\r\n$-0\r\n\r\n", [], wrong(RESP, 5, "a negative length")),
    (RESP, b"*1\r\n$1\r\nab\r\n", [], wrong(RESP, 9, "expected CRLF")),
    (RESP, b"*1\r\n$1\r\na\rb", [], wrong(RESP, 10, "expected CRLF")),
    (RESP, b"GET 'a\n", [], wrong(RESP, 0, "unbalanced quotes")),
    (RESP, b"*1\r\n$50\r\n", [], too_large(RESP)),
    (RESP, b"*1\r\n$49\r\n", [], unfinished(RESP, 9, "more")),
    (RESP, b"*10\r\n", [], too_large(RESP)),  # ten strings have 60 bytes at least
    (RESP, b"*9\r\n", [], unfinished(RESP, 4, "more")),
    (RESP, b"*61\r\n", [], too_large(RESP)),
    (RESP, b"*60", [], unfinished(RESP, 3, "more")),
    (RESP, b"*-60\r\n*1\r\n$1\r\na\r\n", [[b"a"]], None),
    (RESP, b"*-61\r\n", [], too_large(RESP)),
    (RESP, b"\n" + b" " * 60 + b"\n", [], too_large(RESP)),
    (Resp(max_size=4), b"\nGET\n", [[b"GET"]], None),
    (Resp(max_size=58), b"*9\r\n" + b"$0\r\n\r\n" * 9, [[b""] * 9], None),
    (RESP, b"x" * 61, [], too_large(RESP)),
    (RESP, b"x" * 60 + b"\n", [], too_large(RESP)),
    (RESP, b"*1\r\n$3\r\nGE", [], unfinished(RESP, 10, "more")),
]
IDS = [f"{framer!r}-{stream[:20]!r}" for framer, stream, _, _ in READS]


@pytest.mark.parametrize(("framer", "stream", "found", "error"), READS, ids=IDS)
def test_a_stream_is_cut_into_messages(framer: Any, stream: bytes, found: list[Any], error: str | None) -> None:
    assert read(framer, [stream]) == (found, error)


@pytest.mark.parametrize(("framer", "stream", "found", "error"), READS, ids=IDS)
def test_how_it_arrives_makes_no_difference(framer: Any, stream: bytes, found: list[Any], error: str | None) -> None:
    assert read(framer, [stream[i : i + 1] for i in range(len(stream))]) == (found, error)
    for i in range(len(stream)):
        assert read(framer, [stream[:i], stream[i:]]) == (found, error)


@pytest.mark.parametrize(
    ("framer", "stream"),
    [
        (Lines(1 << 20), b"x" * (1 << 20)),
        (Delimiter(b"\r\n", max_size=1 << 20), b"x" * (1 << 20)),
        (Resp(), b"x" * (1 << 20)),
        (Resp(), request([b"x" * 5] * 50_000)[:-1]),
    ],
    ids=["lines", "delimiter", "inline", "request"],
)
def test_an_unfinished_message_is_not_scanned_again_with_every_read(framer: Any, stream: bytes) -> None:
    class Counting(Reader):
        looked = 0

        def part(self, start: int, end: int) -> bytes:
            self.looked += end - start
            return super().part(start, end)

        def find(self, what: bytes, start: int) -> int:
            self.looked += self.size - start
            return super().find(what, start)

    reader = Counting(framer)
    for i in range(0, len(stream), 1000):
        reader.feed(stream[i : i + 1000])
        assert reader.peek(False) is NOTHING
    assert reader.looked < 8 * len(stream)


@pytest.mark.parametrize("framer", FRAMERS, ids=repr)
@settings(max_examples=60)
@given(data=st.data())
def test_what_one_end_sends_the_other_reads(framer: Any, data: st.DataObject) -> None:
    if isinstance(framer, Resp):
        sent: list[Any] = data.draw(st.lists(st.lists(st.binary(max_size=6), min_size=1, max_size=3)))
    else:
        sent = data.draw(st.lists(messages(framer)))
        sent = [message for message in sent if len(message) <= getattr(framer, "max_size", 99)]
        if isinstance(framer, Lines):
            sent = [message for message in sent if not message.endswith(b"\r")]
    stream = b"".join(encode(framer, message) for message in sent)
    assert read(framer, cut(stream, data.draw(sizes))) == (sent, None)


@pytest.mark.parametrize("framer", FRAMERS, ids=repr)
@settings(max_examples=150)
@given(data=st.data())
def test_any_split_of_any_stream_gives_the_same(framer: Any, data: st.DataObject) -> None:
    stream = data.draw(streams(framer))
    assert read(framer, cut(stream, data.draw(sizes))) == read(framer, [stream])


@settings(max_examples=200)
@given(data=st.data())
def test_a_framer_changed_anywhere_goes_on_with_the_next_byte(data: st.DataObject) -> None:
    """What is delivered and what is not are the stream, whole."""
    first, stream = Delimiter(b"|", max_size=12), data.draw(streams(Delimiter(b"|", max_size=12)))
    found, _ = read(first, [stream])
    count = data.draw(st.integers(0, len(found)))
    reader = Reader(first)
    reader.feed(stream)
    received = [(reader.peek(False), reader.take())[1] for _ in range(count)]
    assert received == found[:count]
    assert b"".join(encode(first, message) for message in received) + reader.rest() == stream


# --- inline commands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", []),
        (b" \t\r", []),
        (b"GET key", [b"GET", b"key"]),
        (b"  GET\tkey  \r", [b"GET", b"key"]),
        (b'SET k "a b"', [b"SET", b"k", b"a b"]),
        (b'SET k ""', [b"SET", b"k", b""]),
        (b"SET k ''", [b"SET", b"k", b""]),
        (rb'"\x41\n\r\t\b\a\"\\\q"', [b"A\n\r\t\b\a\"\\q"]),
        (rb'"\xzz"', [b"xzz"]),
        (rb"'it\'s \n'", [rb"it's \n"]),
        (b'pre"fix"', [b"prefix"]),
        (b"pre'fix' next", [b"prefix", b"next"]),
        (b"\"it's\" 'a \"b\"'", [b"it's", b'a "b"']),
        (b'"abc', None),
        (b"'abc", None),
        (b'"abc\\"', None),
        (b"'abc\\'", None),
        (b'"a"b', None),
        (b"'a'b", None),
        (b'"a""b"', None),
        (b'a"', None),
        (b'GET "', None),
    ],
)
def test_inline_commands_are_split_as_redis_does(line: bytes, words: list[bytes] | None) -> None:
    assert split_inline(line) == words


def split_as_sds_c(line: bytes) -> list[bytes] | None:
    """sdssplitargs of Redis, character by character."""
    space, escapes = b" \n\r\t\x0b\x0c", {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}
    words, i = [], 0
    while True:
        while line[i : i + 1] and line[i] in space:
            i += 1
        if i >= len(line):
            return words
        word, quote = b"", b""
        while True:
            c = line[i : i + 1]
            if quote:
                if not c:
                    return None
                if quote == b'"' and c == b"\\" and line[i + 1 : i + 2]:
                    digits = line[i + 2 : i + 4]
                    if line[i + 1 : i + 2] == b"x" and re.fullmatch(b"[0-9a-fA-F]{2}", digits):
                        word += bytes([int(digits, 16)])
                        i += 3
                    else:
                        word += escapes.get(line[i + 1 : i + 2], line[i + 1 : i + 2])
                        i += 1
                elif quote == b"'" and line[i : i + 2] == b"\\'":
                    word += b"'"
                    i += 1
                elif c == quote:
                    if line[i + 1 : i + 2] and line[i + 1] not in space:
                        return None
                    i += 1
                    break
                else:
                    word += c
            elif not c or c in space:
                break
            elif c in b"\"'":
                quote = c
            else:
                word += c
            i += 1
        words.append(word)


@settings(max_examples=400)
@given(line=st.lists(st.sampled_from([bytes([byte]) for byte in b" \t\x0b\x1c\x85a4nx'\"\\"])).map(b"".join))
def test_inline_commands_are_split_as_the_original_would(line: bytes) -> None:
    assert split_inline(line) == split_as_sds_c(line)
