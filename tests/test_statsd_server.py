"""examples/statsd_server.py: the client of the statsd package."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from support import DEADLINE, about_examples, example

statsd = pytest.importorskip("statsd")
pytestmark = about_examples


def report(port: int) -> Any:
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock, sock.makefile() as reply:
        return json.load(reply)


def test_what_the_client_counts_is_collected(backend: str) -> None:
    with example("statsd_server.py", backend=backend) as port:
        client = statsd.StatsClient("127.0.0.1", port)
        for number in range(100):
            client.incr("visits")
            client.timing("time", number)
        client.decr("visits", 10)
        client.gauge("load", 5)
        client.gauge("load", -2, delta=True)
        for user in ("ann", "bob", "ann"):
            client.set("users", user)
        bad = (b"what?", b"sampled:x|c", b"sampled:1|c|@0", b"sampled:1|c|@1e-320", b"load:nan|g", b"load:1e400|g",
               b"new:x|c", b"new:x|g", b"new:x|ms", b"new:1|what")  # fmt: skip
        client._sock.sendto(b"sampled:1|c|@0.1\n" + b"\n".join(bad), ("127.0.0.1", port))
        with client.pipeline() as pipeline:  # several in one datagram
            pipeline.incr("last", 2)
            pipeline.incr("last", 3)
        client.close()
        while (found := report(port))["counters"].get("last") != 5:
            pass  # the test's own time limit bounds this
        assert found == {
            "counters": {"visits": 90, "sampled": 10, "last": 5},
            "gauges": {"load": 3},
            "timings": {"time": {"count": 100, "median": 49.5}},
            "sets": {"users": 2},
            "bad": len(bad),
        }
