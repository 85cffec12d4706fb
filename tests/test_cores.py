"""The compiled core against the fallback, which is its oracle: the same streams, the same messages (Promise
fallback)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import FRAMERS, TOKENS, cut, sizes, streams
from support import DEADLINE, until

import muxcore
from muxcore import RespError
from muxcore._impl import BACKENDS

pytestmark = pytest.mark.skipif("epoll" not in BACKENDS, reason="the compiled core is missing")

STYLES = ["message", "batch", "pull"]


def received(backend: str, framer: Any, style: str, pieces: list[bytes]) -> tuple[list[Any], str]:
    """What a connection delivers of a stream that comes in these pieces and ends, read by read, and why it ended."""
    found: list[Any] = []
    handler = None if style == "pull" else muxcore.Handler()
    if style == "message":
        handler.on_message = lambda conn, message: found.append(message)  # type: ignore[method-assign, union-attr]
    elif style == "batch":
        handler.on_messages = lambda conn, messages: found.extend(messages)  # type: ignore[method-assign, union-attr]
    ours, peer = socket.socketpair()
    with muxcore.Mux(backend=backend) as mux, peer:
        conn = mux.attach(ours, handler, framer=framer)
        for piece in pieces:
            peer.sendall(piece)
            finish_the_turn(mux, lambda: (len(found), conn.unread, conn.closing))
            if style == "pull":
                found.append(conn.recv_all())
                mux.poll(0)  # what is wrong behind the last message is reported by now
            found.append((conn.unread, conn.closing))
        peer.shutdown(socket.SHUT_WR)

        def over() -> bool:
            found.extend(conn if style == "pull" else [])
            return conn.closed

        until(mux, over)
        assert mux.stats().handler_errors == 0
        return found, f"{type(conn.error).__name__}: {conn.error}"


def finish_the_turn(mux: muxcore.Mux, state: Callable[[], object]) -> None:
    """On a busy machine the bound of 3 ms splits what one turn does otherwise."""
    before = None
    while before != state():
        before = state()
        mux.poll(0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("framer", [None, *FRAMERS], ids=repr)
@settings(max_examples=30)
@given(data=st.data())
def test_both_cores_read_the_same(framer: Any, style: str, data: st.DataObject) -> None:
    pieces = cut(data.draw(streams(framer)), data.draw(sizes))
    assert received("epoll", framer, style, pieces) == received("select", framer, style, pieces)


def sent(backend: str, framer: Any, messages: list[Any]) -> list[Any]:
    """What becomes of each message: bytes, or an error."""
    result: list[Any] = []
    ours, peer = socket.socketpair()
    peer.settimeout(DEADLINE)
    with muxcore.Mux(backend=backend) as mux, peer:
        conn = mux.attach(ours, print, framer=framer)
        mux.poll(0)  # before that, any thread may send, and each core encodes in Python
        for message in messages:
            try:
                conn.send(message)
            except Exception as error:
                result.append((type(error), str(error)))
            else:
                size = conn.outbox_size
                conn.flush()
                result.append(peer.recv(size) if size else b"")
            assert conn.outbox_size == 0
    return result


values = st.recursive(
    st.one_of(
        st.none(),
        st.integers(),
        st.sampled_from([True, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 1.5, object, bytearray(b"abc")]),
        st.text(max_size=5),
        st.sampled_from(["OK", "a\r", "b\n", "\0", "\ud800"]),
        st.binary(max_size=5),
        st.sampled_from(TOKENS),
        st.text(max_size=5).map(RespError),
        st.sampled_from([bytes(1023), bytes(1024), bytes(5000), "x" * 2000]),
    ),
    lambda children: st.one_of(st.lists(children, max_size=4), st.lists(children, max_size=3).map(tuple)),
    max_leaves=8,
)


@pytest.mark.parametrize("framer", [None, *FRAMERS, muxcore.LengthPrefix(2), muxcore.Lines()], ids=repr)
@settings(max_examples=50)
@given(messages=st.lists(values, max_size=8))
def test_both_cores_send_the_same(framer: Any, messages: list[Any]) -> None:
    assert sent("epoll", framer, messages) == sent("select", framer, messages)
