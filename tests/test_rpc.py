"""examples/rpc.py: a client of a socket and msgspec. (The clients for MessagePack-RPC on PyPI are not kept up.)"""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from support import DEADLINE, about_examples, example, read_exactly

msgpack = pytest.importorskip("msgspec").msgpack
pytestmark = about_examples


def message(value: Any) -> bytes:
    data = msgpack.encode(value)
    return struct.pack(">I", len(data)) + data


def reply(sock: socket.socket) -> Any:
    [size] = struct.unpack(">I", read_exactly(sock, 4))
    return msgpack.decode(read_exactly(sock, size))


def test_calls_are_answered_in_order_and_mistakes_are_named(backend: str) -> None:
    calls = [
        ([1, "add", [2, 3]], [1, None, 5]),
        ([2, "reverse", ["añb"]], [2, None, "bña"]),
        ([3, "add", [2, "3"]], [3, "ValidationError: Expected `int`, got `str` - at `$[1]`", None]),
        ([4, "add", [2]], [4, "ValidationError: Expected `array` of length 2, got 1", None]),
        ([5, "divide", [1, 0]], [5, "ZeroDivisionError: float division by zero", None]),
        ([5, "add", [2**63 - 1, 2**64 - 1]], [5, "OverflowError: can't serialize ints < -2**63 or > 2**64 - 1", None]),
        ([6, "__init__", []], [6, "there is no method '__init__'", None]),
        ("what?", [None, "Expected `array`, got `str`", None]),
        ([7, "divide", [1, 4]], [7, None, 0.25]),
    ]
    with (
        example("rpc.py", backend=backend) as port,
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock,
    ):
        sock.sendall(b"".join(message(request) for request, _ in calls))
        assert [reply(sock) for _ in calls] == [wanted for _, wanted in calls]


def test_a_thousand_calls_are_under_way() -> None:
    with example("rpc.py") as port, socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
        sock.sendall(b"".join(message([i, "add", [i, i]]) for i in range(1000)))
        assert [reply(sock) for _ in range(1000)] == [[i, None, 2 * i] for i in range(1000)]
