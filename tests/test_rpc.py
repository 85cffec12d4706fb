"""examples/rpc.py: Python's own multiprocessing.connection, whose messages have the same length in front, and msgspec.
(The clients for MessagePack-RPC on PyPI are not kept up.)"""

from __future__ import annotations

from multiprocessing.connection import Client
from operator import truediv
from typing import Any

import pytest
from support import DEADLINE, about_examples, example

msgpack = pytest.importorskip("msgspec").msgpack
pytestmark = about_examples


def reply(client: Any) -> Any:
    assert client.poll(DEADLINE)
    return msgpack.decode(client.recv_bytes())


def test_calls_get_replies_in_order_and_mistakes_are_named(backend: str) -> None:
    with pytest.raises(ZeroDivisionError) as divided:
        truediv(1.0, 0.0)
    calls = [
        ([1, "add", [2, 3]], [1, None, 5]),
        ([2, "reverse", ["añb"]], [2, None, "bña"]),
        ([3, "add", [2, "3"]], [3, "ValidationError: Expected `int`, got `str` - at `$[1]`", None]),
        ([4, "add", [2]], [4, "ValidationError: Expected `array` of length 2, got 1", None]),
        ([5, "divide", [1, 0]], [5, f"ZeroDivisionError: {divided.value}", None]),
        ([5, "add", [2**63 - 1, 2**64 - 1]], [5, "OverflowError: can't serialize ints < -2**63 or > 2**64 - 1", None]),
        ([6, "__init__", []], [6, "there is no method '__init__'", None]),
        ("what?", [None, "Expected `array`, got `str`", None]),
        ([7, "divide", [1, 4]], [7, None, 0.25]),
    ]
    with example("rpc.py", backend=backend) as port, Client(("127.0.0.1", port)) as client:
        for request, _ in calls:
            client.send_bytes(msgpack.encode(request))
        assert [reply(client) for _ in calls] == [wanted for _, wanted in calls]


def test_a_thousand_calls_are_under_way() -> None:
    with example("rpc.py") as port, Client(("127.0.0.1", port)) as client:
        for i in range(1000):
            client.send_bytes(msgpack.encode([i, "add", [i, i]]))
        assert [reply(client) for _ in range(1000)] == [[i, None, 2 * i] for i in range(1000)]
