"""examples/websocket_echo.py: the client of the websockets package."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support import DEADLINE, about_examples, example, pattern

client = pytest.importorskip("websockets.sync.client")
exceptions = pytest.importorskip("websockets.exceptions")
pytest.importorskip("wsproto")
pytestmark = about_examples


@pytest.fixture
def websocket(backend: str) -> Iterator[Any]:
    with (
        example("websocket_echo.py", backend=backend) as port,
        client.connect(f"ws://127.0.0.1:{port}/", max_size=None) as websocket,
    ):
        yield websocket


def test_messages_come_back_as_they_were(websocket: Any) -> None:
    for message in ("añb", b"\0\xff", "", pattern(100_000), pattern(1 << 20)):
        websocket.send(message)
        assert websocket.recv(DEADLINE) == message


def test_fragments_and_pings_in_between(websocket: Any) -> None:
    def pieces() -> Iterator[str]:
        for number in range(10):
            yield f"piece {number};"
            assert websocket.ping().wait(DEADLINE)

    websocket.send(pieces())
    assert websocket.recv(DEADLINE) == "".join(f"piece {number};" for number in range(10))


def test_a_close_frame_gets_a_close_frame_back(websocket: Any) -> None:
    websocket.close(4321, "enough")
    assert (websocket.protocol.close_rcvd.code, websocket.protocol.close_rcvd.reason) == (4321, "enough")


def test_too_large_a_message_ends_with_1009(websocket: Any) -> None:
    with pytest.raises(exceptions.ConnectionClosed) as caught:
        websocket.send(bytes((1 << 20) + 1))
        while True:  # what came of it before it was too large
            websocket.recv(DEADLINE)
    assert caught.value.rcvd.code == 1009


@pytest.mark.parametrize("head", [b"Host: a\r\n", b"Host: \xff\r\nUpgrade: websocket\r\n", b"\x16\x03\x01\r\n"])
def test_a_client_that_does_not_speak_websocket_is_refused(head: bytes) -> None:
    with (
        example("websocket_echo.py") as port,
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock,
        sock.makefile("rb") as reply,
    ):
        sock.sendall(b"GET / HTTP/1.1\r\n" + head + b"\r\n")
        assert reply.read().startswith(b"HTTP/1.1 400 ")
