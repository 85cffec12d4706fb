"""examples/pubsub.py: redis-py and redis-cli subscribe and publish, beside ten thousand others."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support import DEADLINE, about_examples, example, read_exactly

redis = pytest.importorskip("redis")
pytestmark = about_examples
CROWD = 10_000


def messages(subscriber: Any, count: int) -> list[tuple[str, bytes, Any]]:
    got: Iterator[Any] = (subscriber.get_message(timeout=DEADLINE) for _ in range(count))
    return [(message["type"], message["channel"], message["data"]) for message in got]


def test_redis_py_subscribes_and_unsubscribes(backend: str) -> None:
    with (
        example("pubsub.py", backend=backend) as port,
        redis.Redis(port=port, protocol=2) as client,
        client.pubsub() as one,
        client.pubsub() as other,
    ):
        assert client.publish("news", "no subscriber") == 0
        one.subscribe("news", "weather")
        assert messages(one, 2) == [("subscribe", b"news", 1), ("subscribe", b"weather", 2)]
        other.subscribe("news")
        assert messages(other, 1) == [("subscribe", b"news", 1)]
        assert client.publish("news", b"a\r\n\0b") == 2
        assert client.publish("weather", "rain") == 1
        assert messages(one, 2) == [("message", b"news", b"a\r\n\0b"), ("message", b"weather", b"rain")]
        assert messages(other, 1) == [("message", b"news", b"a\r\n\0b")]
        one.unsubscribe("news")
        assert messages(one, 1) == [("unsubscribe", b"news", 1)]
        other.close()
        while client.publish("news", "subscribers left?"):
            pass  # the server has not seen the end of `other` yet; the test's own time limit bounds this


def test_redis_cli_subscribes(peer_program: Callable[[str], str]) -> None:
    with example("pubsub.py") as port:
        command = [peer_program("redis-cli"), "-p", str(port)]
        with subprocess.Popen([*command, "subscribe", "news"], stdout=subprocess.PIPE) as listening:
            try:
                assert listening.stdout is not None
                assert [listening.stdout.readline() for _ in range(3)] == [b"subscribe\n", b"news\n", b"1\n"]
                publish = [*command, "publish", "news", "hello"]
                done = subprocess.run(publish, capture_output=True, check=True, timeout=20)
                assert done.stdout == b"1\n"
                assert [listening.stdout.readline() for _ in range(3)] == [b"message\n", b"news\n", b"hello\n"]
            finally:
                listening.kill()


def test_what_a_web_page_posts_is_not_published() -> None:
    with example("pubsub.py") as port, redis.Redis(port=port, protocol=2) as client, client.pubsub() as subscriber:
        subscriber.subscribe("news")
        assert messages(subscriber, 1) == [("subscribe", b"news", 1)]
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nPUBLISH news evil\r\n")
            assert sock.recv(100) == b""
        client.publish("news", "good")
        assert messages(subscriber, 1) == [("message", b"news", b"good")]


@pytest.mark.linux_only("elsewhere so many sockets need a change of the system")
def test_ten_thousand_subscribers_get_every_message() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CROWD + 1000:
        pytest.skip(f"only {hard} descriptors are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CROWD + 1000), hard))
    try:
        with example("pubsub.py") as port, redis.Redis(port=port, protocol=2) as client, ExitStack() as stack:
            crowd = []
            for _ in range(CROWD):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=DEADLINE))
                sock.sendall(b"SUBSCRIBE news\r\n")
                crowd.append(sock)
            subscriber = stack.enter_context(client.pubsub())
            subscriber.subscribe("news")
            assert messages(subscriber, 1) == [("subscribe", b"news", 1)]
            welcome = b"*3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n"
            assert all(read_exactly(sock, len(welcome)) == welcome for sock in crowd)
            wanted = b""
            for number in range(5):
                assert client.publish("news", f"number {number}") == CROWD + 1
                wanted += b"*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$8\r\nnumber %d\r\n" % number
            assert all(read_exactly(sock, len(wanted)) == wanted for sock in crowd)
            assert [data for _, _, data in messages(subscriber, 5)] == [b"number %d" % number for number in range(5)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


