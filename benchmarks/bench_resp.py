"""A small Redis in Python on muxcore against redis-server, under redis-benchmark: requests per second of server CPU.

What may live here: that one table. Both keep everything in memory only, and serve with one thread.
"""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median

from _run import (
    LOAD_TIMEOUT,
    BenchError,
    Goal,
    Result,
    Running,
    Server,
    Table,
    by_name,
    chosen,
    columns,
    connection,
    cpu_us,
    disturbed,
    ended,
    fresh_rounds,
    goals_table,
    middle,
    number,
    parser,
    pin_to,
    ratio,
    read_line,
    report,
    run,
    started,
    times,
    undisturbed,
    usage,
)

CLIENTS, KEYS = 50, 100_000
REQUESTS = {1: 120_000, 16: 1_000_000, 64: 1_500_000}  # by depth: a second or two
FILLING = 700_000  # random keys: all but one in a thousand exist then
TESTS = ("SET", "GET", "INCR")
SLICES = 2
GOALS: dict[tuple[int, str], tuple[float | None, float | None]] = {
    (1, "SET"): (1.0, None),
    (1, "GET"): (1.0, None),
    (16, "SET"): (0.9, 1.0),
    (16, "GET"): (0.9, 1.0),
    (16, "INCR"): (None, 0.8),
}
EXCHANGE = (
    (b"*1\r\n$4\r\nPING\r\n", b"+PONG\r\n"),
    (b"*3\r\n$3\r\nSET\r\n$5\r\ncheck\r\n$7\r\n1\r\n2\0\xff3\r\n", b"+OK\r\n"),
    (b"*2\r\n$3\r\nGET\r\n$5\r\ncheck\r\n", b"$7\r\n1\r\n2\0\xff3\r\n"),
    (b"*2\r\n$3\r\nget\r\n$7\r\nmissing\r\n", b"$-1\r\n"),
    (b"*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n", b":1\r\n"),
    (b"*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n", b":2\r\n"),
    (b"*2\r\n$3\r\nGET\r\n$7\r\ncounter\r\n", b"$1\r\n2\r\n"),
)
Key = tuple[int, str, str]  # depth, test, server

SERVERS = by_name(
    Server("redis", "redis-server", "redis_server.py"),
    Server("each", "muxcore, each request", "muxcore_resp.py"),
    Server("batch", "muxcore, a list per read", "muxcore_resp.py", ("batch",)),
)


# --- the servers -----------------------------------------------------------------------------------


def check(title: str, port: int) -> None:
    """It must reply to these requests with exactly these bytes, in whatever pieces they come."""
    requests, wanted = (b"".join(column) for column in zip(*EXCHANGE, strict=True))
    for cut in (len(requests), 1, 50, 97):
        with connection(port) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(b"*3\r\n$3\r\nSET\r\n$7\r\ncounter\r\n$1\r\n0\r\n")
            expect(title, sock, b"+OK\r\n")
            sock.sendall(requests[:cut])
            time.sleep(0.01)
            sock.sendall(requests[cut:])
            expect(title, sock, wanted)


def expect(title: str, sock: socket.socket, wanted: bytes) -> None:
    got = b""
    while len(got) < len(wanted):
        data = sock.recv(65536)
        got += data
        if not data or not wanted.startswith(got):
            raise BenchError(f"{title} replied {got!r} instead of {wanted!r}")


@contextmanager
def all_started(servers: Sequence[Server], keys: int) -> Iterator[dict[str, Running]]:
    """While inside, they run, have been checked, and hold all keys."""
    with ExitStack() as stack:
        found = {}
        for server in servers:
            running = stack.enter_context(started(server))
            check(server.title, running.port)
            benchmark(running, 64, "SET", FILLING, keys)
            found[server.name] = running
        yield found


# --- the load --------------------------------------------------------------------------------------


def benchmark(running: Running, depth: int, test: str, requests: int, keys: int) -> Result:
    """Run redis-benchmark on the second core: what it reports, and what the server used meanwhile."""
    options = {"-p": running.port, "-c": CLIENTS, "-n": requests, "-P": depth, "-t": test.lower(), "-r": keys}
    command = ["redis-benchmark", "--csv", *(str(word) for option in options.items() for word in option)]
    before = usage(running.pid)
    pipe = subprocess.PIPE
    with ended(subprocess.Popen(command, stdout=pipe, text=True, preexec_fn=pin_to(1))) as process:
        found = dict(
            zip(*csv.reader([read_line(process, LOAD_TIMEOUT), read_line(process, LOAD_TIMEOUT)]), strict=True)
        )
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        own = usage(process.pid)
    after = usage(running.pid)
    rate = float(found["rps"])
    return {
        "messages": requests,
        "seconds": requests / rate,
        "requests_per_s": rate,
        "p50_ms": float(found["p50_latency_ms"]),
        "server_cpu_s": after.cpu_s - before.cpu_s,
        "server_waited_s": after.waited_s - before.waited_s,
        "load_waited_s": own.waited_s,
    }


def measured(
    servers: Sequence[Server],
    depths: Sequence[int],
    tests: Sequence[str],
    count: int,
    slices: int,
    share: float = 1.0,
    keys: int = KEYS,
) -> dict[Key, list[Result]]:
    """With that share of REQUESTS in each run."""
    runs = [(depth, test, server.name) for depth in depths for test in tests for server in servers]

    def measure(running: dict[str, Running], key: Key) -> Result:
        depth, test, name = key
        return undisturbed(lambda: benchmark(running[name], depth, test, round(share * REQUESTS[depth]), keys))

    return fresh_rounds(runs, count, slices, lambda: all_started(servers, keys), measure)


# --- tables ----------------------------------------------------------------------------------------


def per_cpu_s(result: Result) -> float:
    return 1e6 / cpu_us(result)


def rate(result: Result) -> float:
    return float(result["requests_per_s"])


def table(text: str, results: dict[Key, list[Result]]) -> Table:
    cpu = ("CPU us/request", "requests/CPU s", "to redis-server")
    result = Table(text, ("", "server", *cpu, "requests/s", "to redis-server", "p50 ms", "disturbed"))
    for (depth, test, name), own in results.items():
        base = results.get((depth, test, "redis"))
        result.rows.append(
            (
                f"{test}, {depth} deep",
                SERVERS[name].title,
                number(median(map(cpu_us, own))),
                number(median(map(per_cpu_s, own)), 0),
                times(ratio(own, base, per_cpu_s)),
                number(middle(own, "requests_per_s"), 0),
                times(ratio(own, base, rate)),
                number(middle(own, "p50_ms")),
                disturbed(own),
            )
        )
    return result


def goals(results: dict[Key, list[Result]]) -> Table:
    """Of requests per CPU second, with one reply per request."""
    found = []
    for (depth, test), (bound, stretch) in GOALS.items():
        own, base = (results.get((depth, test, name)) for name in ("each", "redis"))
        seen = ratio(own, base, per_cpu_s) if own else None
        found.append(Goal(f"{test}, {depth} deep", seen, bound, stretch, at_least=True))
    return goals_table(found)


def main() -> None:
    options = parser(__doc__, list(SERVERS), 4)
    options.add_argument("--depths", type=int, nargs="+", choices=REQUESTS, default=list(REQUESTS), metavar="N")
    options.add_argument("--tests", nargs="+", choices=TESTS, default=TESTS, metavar="TEST")
    options.add_argument("--keys", type=int, default=KEYS, help="that there are; default: %(default)s")
    options.add_argument("--name", default="resp", help="of the files in results/; default: %(default)s")
    args = options.parse_args()
    if not (shutil.which("redis-server") and shutil.which("redis-benchmark")):
        raise BenchError("redis-server and redis-benchmark are needed")
    results = measured(chosen(args.only, SERVERS), args.depths, args.tests, args.rounds, SLICES, keys=args.keys)
    text = f"{CLIENTS} clients, {args.keys:,} keys, values of 3 bytes; medians of {args.rounds * SLICES} runs."
    raw = {f"{test}, {depth} deep, {name}": columns(found) for (depth, test, name), found in results.items()}
    report(args.name, "A small Redis in Python", [table(text, results), goals(results)], raw, args.keep)


if __name__ == "__main__":
    run(main)
