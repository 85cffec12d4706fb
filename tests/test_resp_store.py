"""examples/resp_store.py: the clients of Redis are its clients."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable

import pytest
from support import DEADLINE, about_examples, example

redis = pytest.importorskip("redis")
pytestmark = about_examples


def test_redis_py_reads_and_writes(backend: str) -> None:
    with example("resp_store.py", backend=backend) as port, redis.Redis(port=port, protocol=2) as client:
        assert client.ping()
        assert client.get("a") is None
        assert client.set("a", b"1\r\n2\0\xff")
        assert client.get("a") == b"1\r\n2\0\xff"
        assert client.exists("a", "a", "b") == 2
        assert [client.incr("n"), client.incrby("n", 41), client.get("n")] == [1, 42, b"42"]
        with pytest.raises(redis.ResponseError, match="value is not an integer"):
            client.incr("a")
        with pytest.raises(redis.ResponseError, match="unknown command"):
            client.lpush("list", 1)
        assert client.dbsize() == 2
        assert client.delete("a", "b") == 1
        assert client.info()["db0"] == {"keys": 1, "expires": 0}


def test_redis_py_gets_two_thousand_pipelined_replies_in_order() -> None:
    with example("resp_store.py") as port, redis.Redis(port=port, protocol=2) as client:
        pipeline = client.pipeline(transaction=False)
        for i in range(1000):
            pipeline.set(f"key{i}", "x" * i)
            pipeline.get(f"key{i}")
        assert pipeline.execute() == [reply for i in range(1000) for reply in (True, b"x" * i)]


def test_a_number_is_one_of_64_bits_as_in_redis() -> None:
    largest, smallest = (1 << 63) - 1, -(1 << 63)
    with example("resp_store.py") as port, redis.Redis(port=port, protocol=2) as client:
        assert client.set("n", largest - 1)
        assert client.incr("n") == largest
        with pytest.raises(redis.ResponseError, match="increment or decrement would overflow"):
            client.incr("n")
        assert client.get("n") == b"%d" % largest
        assert client.incrby("m", smallest) == smallest
        with pytest.raises(redis.ResponseError, match="value is not an integer or out of range"):
            client.incrby("m", largest + 1)


def test_keys_expire() -> None:
    with example("resp_store.py") as port, redis.Redis(port=port, protocol=2) as client:
        client.set("short", 1, px=50)
        client.set("long", 1, ex=1000)
        client.set("kept", 1, px=50)
        assert client.persist("kept")
        client.set("again", 1, px=50)
        client.set("again", 2)
        assert client.ttl("long") == 1000
        assert [client.ttl("kept"), client.ttl("missing")] == [-1, -2]
        assert not client.expire("missing", 1)
        while client.exists("short"):
            pass  # the test's own time limit bounds this
        client.set("last", 1, px=50)  # behind the timers that were cancelled
        while client.exists("last"):
            pass
        assert client.get("kept") == b"1"
        assert client.get("again") == b"2"
        assert client.expire("long", 0)
        assert client.get("long") is None


def test_redis_cli_is_a_client(peer_program: Callable[[str], str]) -> None:
    with example("resp_store.py") as port:
        commands = b"set a 'one and two'\nget a\nincr n\nincr a\nget missing\n"
        command = [peer_program("redis-cli"), "-p", str(port)]
        done = subprocess.run(command, input=commands, capture_output=True, timeout=20, check=True)
    assert done.stdout.splitlines() == [
        b"OK", b"one and two", b"1", b"ERR value is not an integer or out of range", b"", b"",
    ]  # fmt: skip


def test_redis_cli_inserts_in_bulk(peer_program: Callable[[str], str]) -> None:
    """With --pipe it waits for the reply to an ECHO, 30 seconds."""
    with example("resp_store.py") as port:
        data = b"".join(b"*3\r\n$3\r\nSET\r\n$4\r\n%04d\r\n$1\r\nx\r\n" % number for number in range(1000))
        command = [peer_program("redis-cli"), "-p", str(port), "--pipe"]
        done = subprocess.run(command, input=data, capture_output=True, timeout=20, check=True)
        assert done.stdout.splitlines()[-1] == b"errors: 0, replies: 1000"
        with redis.Redis(port=port, protocol=2) as client:
            assert client.dbsize() == 1000


@pytest.mark.parametrize("head", [b"POST / HTTP/1.1\r\n", b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_what_a_web_page_posts_is_not_executed(head: bytes) -> None:
    with example("resp_store.py") as port:
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
            sock.sendall(head + b"Content-Length: 14\r\n\r\nSET evil here\r\n")
            sock.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as replies:
                assert b"+OK" not in replies.read()
        with redis.Redis(port=port, protocol=2) as client:
            assert client.get("evil") is None


def test_redis_benchmark_gets_a_reply_to_its_last_request(peer_program: Callable[[str], str]) -> None:
    with example("resp_store.py") as port:
        command = [peer_program("redis-benchmark"), "-p", str(port), "-t", "ping,set,get,incr", "-n", "4800"]
        done = subprocess.run([*command, "-P", "16", "--csv"], capture_output=True, timeout=40, check=True, text=True)
        tests = [line.split(",")[0].strip('"') for line in done.stdout.splitlines()]
        with redis.Redis(port=port, protocol=2) as client:
            assert int(client.get("counter:__rand_int__")) == 4800
    assert tests == ["test", "PING_INLINE", "PING_MBULK", "SET", "GET", "INCR"]
