"""A collector of statistics in the protocol of StatsD, over UDP. `statsd_server.py [--port PORT]`

    statsd.StatsClient("127.0.0.1", PORT).incr("visits")          nc 127.0.0.1 PORT

Counters, gauges, timings and sets come as datagrams, up to 64 of which are one system call; a TCP connection to the
same port gets a report as JSON. What is not StatsD is counted and ignored.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict, deque
from statistics import median
from typing import Any

import muxcore

MAX_NAMES = 10_000  # any client may send new ones
LATEST = 1000  # timings of a name


class Statistics:
    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.gauges: dict[str, float] = {}
        self.timings: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=LATEST))
        self.sets: dict[str, dict[str, None]] = defaultdict(dict)
        self.names: set[str] = set()
        self.bad = 0

    def on_datagrams(self, datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        for data, _ in messages:
            for line in data.splitlines():
                try:
                    self.add(line.decode())
                except (ValueError, ZeroDivisionError):
                    self.bad += 1

    def add(self, line: str) -> None:
        """name:value|kind, and for a counter perhaps |@rate: only that share of all events was sent."""
        name, _, rest = line.partition(":")
        if name not in self.names and len(self.names) >= MAX_NAMES:
            raise ValueError(f"too many names: {name}")
        match rest.split("|"):
            case [value, "c"]:
                self.counters[name] = self.counters.get(name, 0.0) + number(value)
            case [value, "c", rate] if rate.startswith("@"):
                self.counters[name] = self.counters.get(name, 0.0) + number(float(value) / float(rate[1:]))
            case [value, "g"]:
                self.gauges[name] = number(value) + (self.gauges.get(name, 0.0) if value[:1] in ("+", "-") else 0.0)
            case [value, "ms"]:
                took = number(value)  # before there is a list of them
                self.timings[name].append(took)
            case [value, "s"] if len(self.sets.get(name, ())) < MAX_NAMES:
                self.sets[name][value] = None
            case _:
                raise ValueError(f"not StatsD: {line}")
        self.names.add(name)

    def on_open(self, conn: muxcore.Connection) -> None:
        conn.send(self.report())
        conn.close()

    def report(self) -> bytes:
        found = {
            "counters": self.counters,
            "gauges": self.gauges,
            "timings": {name: {"count": len(last), "median": median(last)} for name, last in self.timings.items()},
            "sets": {name: len(values) for name, values in self.sets.items()},
            "bad": self.bad,
        }
        return json.dumps(found).encode() + b"\n"


def number(text: str | float) -> float:
    value = float(text)
    if not -1e15 < value < 1e15:  # true of NaN, too, which would stay in every sum as infinity would
        raise ValueError(f"not a number that can be counted with: {text}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description="a collector of statistics in the protocol of StatsD")
    parser.add_argument("--port", type=int, default=0)
    statistics = Statistics()

    def ready(mux: muxcore.Mux, listener: muxcore.Listener) -> None:
        mux.datagram(listener.address, statistics)
        print("listening", listener.address[1], flush=True)

    muxcore.serve(statistics, ("127.0.0.1", parser.parse_args().port), ready=ready)


if __name__ == "__main__":
    main()
