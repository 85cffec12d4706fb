"""HTTP plain text under wrk: requests per second of server CPU, muxcore and uvloop, both with httptools.

What may live here: that one table.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
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
    fresh_rounds,
    goals_table,
    middle,
    number,
    parser,
    pin_to,
    ratio,
    report,
    run,
    spread,
    started,
    times,
    undisturbed,
    usage,
)

CLIENTS, DEPTHS, SLICES = 50, (1, 16), 3
BODY = b"Hello, World!"
LUA = """
init = function(args)
  local depth = tonumber(args[1])
  local requests = string.rep(wrk.format("GET", "/"), depth)
  if depth > 1 then request = function() return requests end end -- without it wrk itself takes less
end
done = function(summary, latency, requests)
  local wrong = summary.errors
  local errors = wrong.connect + wrong.read + wrong.write + wrong.status + wrong.timeout
  local seconds, middle = summary.duration / 1e6, latency:percentile(50) / 1e3
  io.write(string.format("found %d %f %f %d\\n", summary.requests, seconds, middle, errors))
end
"""
UVLOOP = "uvloop and httptools"
SERVERS = by_name(
    Server("muxcore", "muxcore, examples/httpd.py", "muxcore_http.py", needs="httptools"),
    Server("uvloop", "uvloop, the same Exchange", "uvloop_http.py", needs=UVLOOP),
    Server("uvloop-direct", "the same, a write per reply", "uvloop_http.py", ("direct",), needs=UVLOOP),
    Server("muxcore-bare", "muxcore, bare", "muxcore_http.py", ("bare",), needs="httptools"),
    Server("uvloop-bare", "uvloop, bare", "uvloop_http.py", ("bare",), needs=UVLOOP),
    Server("uvloop-bare-direct", "bare, a write per reply", "uvloop_http.py", ("bare", "direct"), needs=UVLOOP),
    Server("nginx", "nginx, return", "nginx_http.py", needs="nginx"),
)
GOALS = {1: 1.05, 16: 1.1}
Key = tuple[int, str]  # depth, server


def check(server: Server, port: int) -> None:
    """Three requests in two pieces must get three replies with this body."""
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    with connection(port) as sock:
        sock.sendall(request * 2 + request[:9])
        sock.sendall(request[9:])
        got = b""
        while got.count(BODY) < 3:
            data = sock.recv(65536)
            got += data
            if not data:
                raise BenchError(f"{server.title} replied {got!r}")
    if got.count(b"HTTP/1.1 200 OK\r\n") != 3 or got.count(b"Content-Length: 13\r\n") != 3:
        raise BenchError(f"{server.title} replied {got!r}")


@contextmanager
def all_started(servers: Sequence[Server]) -> Iterator[dict[str, Running]]:
    with ExitStack() as stack:
        found = {}
        for server in servers:
            found[server.name] = stack.enter_context(started(server))
            check(server, found[server.name].port)
        yield found


def wrk(running: Running, depth: int, seconds: int, script: str) -> Result:
    """Run wrk on the second core: what it reports, and what the server used meanwhile."""
    url = f"http://127.0.0.1:{running.port}/"
    command = ["wrk", "-t1", f"-c{CLIENTS}", f"-d{seconds}s", "-s", script, url, "--", str(depth)]
    before = usage(running.pid)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=pin_to(1)) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        own = usage(process.pid)
        output = process.communicate(timeout=LOAD_TIMEOUT)[0]
    after = usage(running.pid)
    found = re.search(r"found (\d+) ([\d.]+) ([\d.]+) (\d+)", output)
    if found is None or found[4] != "0":
        raise BenchError(f"wrk was not content: {output}")
    return {
        "messages": int(found[1]),
        "seconds": float(found[2]),
        "requests_per_s": int(found[1]) / float(found[2]),
        "p50_ms": float(found[3]),
        "server_cpu_s": after.cpu_s - before.cpu_s,
        "server_waited_s": after.waited_s - before.waited_s,
        "load_waited_s": own.waited_s,
    }


def per_cpu_s(result: Result) -> float:
    return 1e6 / cpu_us(result)


def base_of(results: dict[Key, list[Result]], key: Key) -> list[Result] | None:
    """The better of uvloop's two doing the same; nginx does what the bare ones do."""
    depth, name = key
    peer = "uvloop-bare" if name == "nginx" or "bare" in name else "uvloop"
    found = [results[depth, other] for other in (peer, f"{peer}-direct") if (depth, other) in results]
    return max(found, key=lambda own: median(map(per_cpu_s, own)), default=None)


def table(text: str, results: dict[Key, list[Result]]) -> Table:
    cpu = ("CPU us/request", "min-max", "requests/CPU s", "to uvloop")
    result = Table(text, ("", "server", *cpu, "requests/s", "p50 ms", "disturbed"))
    for key, own in results.items():
        depth, name = key
        result.rows.append(
            (
                f"{depth} deep",
                SERVERS[name].title,
                number(median(map(cpu_us, own))),
                spread(own),
                number(median(map(per_cpu_s, own)), 0),
                times(ratio(own, base_of(results, key), per_cpu_s)),
                number(middle(own, "requests_per_s"), 0),
                number(middle(own, "p50_ms")),
                disturbed(own),
            )
        )
    return result


def goals(results: dict[Key, list[Result]]) -> Table:
    """Of requests per CPU second, for servers that do the same."""
    found = []
    for depth, bound in GOALS.items():
        for name, title in (("muxcore", "plain text"), ("muxcore-bare", "bare")):
            own = results.get((depth, name))
            seen = ratio(own, base_of(results, (depth, name)), per_cpu_s) if own else None
            found.append(Goal(f"{title}, {depth} deep, to uvloop", seen, bound, at_least=True))
    return goals_table(found)


def measured(servers: Sequence[Server], count: int, slices: int, seconds: int) -> dict[Key, list[Result]]:
    keys = [(depth, server.name) for depth in DEPTHS for server in servers]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "pipeline.lua"
        script.write_text(LUA)

        def measure(running: dict[str, Running], key: Key) -> Result:
            return undisturbed(lambda: wrk(running[key[1]], key[0], seconds, str(script)))

        return fresh_rounds(keys, count, slices, lambda: all_started(servers), measure)


def main() -> None:
    options = parser(__doc__, list(SERVERS), 3)
    options.add_argument("--seconds", type=int, default=1, help="of each of a round's slices; default: %(default)s")
    options.add_argument("--name", default="http", help="of the files in results/; default: %(default)s")
    args = options.parse_args()
    if not shutil.which("wrk"):
        raise BenchError("wrk is needed")
    results = measured(chosen(args.only, SERVERS), args.rounds, SLICES, args.seconds)
    text = f"{CLIENTS} connections of wrk; medians of {args.rounds * SLICES} runs."
    raw = {f"{depth} deep, {name}": columns(found) for (depth, name), found in results.items()}
    report(args.name, "HTTP plain text", [table(text, results), goals(results)], raw, args.keep)


if __name__ == "__main__":
    run(main)
