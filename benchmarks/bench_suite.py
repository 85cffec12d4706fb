"""Everything that can be compared within ten minutes: many workloads, against all peers that are installed.

What may live here: which workloads and peers, one report of it all, its picture. What another benchmark measures too
is measured by it, with fewer rounds.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import bench_churn
import bench_framing
import bench_http
import bench_memory
import bench_resp
from _run import (
    HERE,
    INK,
    SERVERS,
    BenchError,
    Option,
    Result,
    Server,
    Table,
    by_name,
    chosen,
    columns,
    cpu_us,
    disturbed,
    echo_rounds,
    middle,
    number,
    package_version,
    parser,
    pkg_config,
    progress,
    pyplot,
    ratio,
    report,
    rounds,
    run,
    save,
    spread,
    times,
)

SLICES = 2
PEERS = by_name(
    SERVERS["c"],
    Server("libuv", "libuv in C", "echo_uv.c", needs="libuv"),
    SERVERS["callback"],
    SERVERS["pull"],
    SERVERS["select"],
    SERVERS["uvloop"],
    Server("uvloop-streams", "uvloop streams", "uvloop_streams.py", ("chunks",), needs="uvloop"),
    Server("aiofastnet", "aiofastnet on uvloop", "aiofastnet_protocol.py", needs="aiofastnet and uvloop"),
    SERVERS["asyncio"],
    Server("asyncio-streams", "asyncio streams", "asyncio_streams.py", ("chunks",)),
    Server("gevent", "gevent", "gevent_echo.py", ("chunks",), needs="gevent"),
    Server("trio", "trio", "trio_echo.py", needs="trio"),
)
Rounds = dict[str, list[Result]]


@dataclass
class Found:
    """What a workload gave: tables, what they are made of, and what the picture shows of it."""

    tables: list[Table]
    results: Rounds
    values: dict[str, list[float]] = field(default_factory=dict)  # by what to call them


# --- workloads -------------------------------------------------------------------------------------


def echo_table(text: str, results: Rounds, servers: Sequence[Server]) -> Table:
    cpu = ("CPU us/message", "min-max", "CPU ns/byte", "to C", "to uvloop")
    table = Table(text, ("server", *cpu, "messages/s", "MB/s", "p50 us", "p99 us", "disturbed"))
    for server in servers:
        own = results[server.name]
        table.rows.append(
            (
                server.title,
                number(median(map(cpu_us, own))),
                spread(own),
                number(median(1e9 * r["server_cpu_s"] / r["bytes"] for r in own), 3),
                times(ratio(own, results.get("c"), cpu_us)),
                times(ratio(own, results.get("uvloop"), cpu_us)),
                number(middle(own, "messages_per_s"), 0),
                number(median(r["bytes"] / r["seconds"] / 1e6 for r in own), 1),
                number(middle(own, "p50_us"), 1),
                number(middle(own, "p99_us"), 1),
                disturbed(own),
            )
        )
    return table


def how(args: argparse.Namespace) -> str:
    return f"{args.rounds} rounds of {args.seconds:g} s in {SLICES} slices, medians of slices"


def cpu_of(results: Rounds, servers: Sequence[Server]) -> dict[str, list[float]]:
    return {server.title: list(map(cpu_us, results[server.name])) for server in servers}


def echo(args: argparse.Namespace, servers: Sequence[Server], connections: int, size: int) -> Found:
    load: dict[str, Option] = {"connections": connections, "size": size}
    results = echo_rounds(servers, args.rounds, SLICES, seconds=args.seconds, **load)
    text = f"Echo, {connections} x {size:,} bytes; {how(args)}."
    return Found([echo_table(text, results, servers)], results, cpu_of(results, servers))


def latency(args: argparse.Namespace, servers: Sequence[Server]) -> Found:
    found = echo(args, servers, 1, 256)
    found.values = {server.title: [r["p50_us"] for r in found.results[server.name]] for server in servers}
    return found


def lines(args: argparse.Namespace, _: Sequence[Server]) -> Found:
    servers = chosen(list(LINES), LINES)
    load = bench_framing.LOADS["lines"]
    results = echo_rounds(servers, args.rounds, SLICES, seconds=args.seconds, **load)
    text = "Lines, {connections} x {size} bytes, {depth} deep; ".format(**load) + how(args) + "."
    return Found([bench_framing.table(text, results, servers)], results, cpu_of(results, servers))


LINES = bench_framing.servers_for("lines")
LINES |= by_name(Server("gevent", "gevent, makefile", "gevent_echo.py", ("lines",), "gevent", "lines"))


def churn(args: argparse.Namespace, servers: Sequence[Server]) -> Found:
    results = echo_rounds(servers, args.rounds, SLICES, "churn", seconds=args.seconds, **bench_churn.LOAD)
    tables = [bench_churn.table(f"{bench_churn.TEXT}; {how(args)}.", results, servers), bench_churn.goals(results)]
    return Found(tables, results, cpu_of(results, servers))


def memory(_: argparse.Namespace, servers: Sequence[Server]) -> Found:
    """Once: it is almost the same each time."""
    results = rounds([server.name for server in servers], 1, lambda name: bench_memory.measure(PEERS[name]))
    values = {server.title: [r["each"] for r in results[server.name]] for server in servers}
    return Found([bench_memory.table(results, servers)], results, values)


def resp(args: argparse.Namespace, _: Sequence[Server]) -> Found:
    need("redis-server", "redis-benchmark")
    servers = list(bench_resp.SERVERS.values())
    found = bench_resp.measured(servers, (1, 16), ("SET", "GET"), args.rounds, 1, args.seconds)
    text = f"RESP, {bench_resp.CLIENTS} clients of redis-benchmark, {args.rounds} rounds, medians."
    results = {
        f"{test}, {depth} deep, {bench_resp.SERVERS[name].title}": of for (depth, test, name), of in found.items()
    }
    return Found([bench_resp.table(text, found)], results, {key: list(map(cpu_us, of)) for key, of in results.items()})


def http(args: argparse.Namespace, _: Sequence[Server]) -> Found:
    need("wrk")
    servers = chosen(list(bench_http.SERVERS), bench_http.SERVERS)
    found = bench_http.measured(servers, args.rounds, 1, max(1, round(args.seconds)))
    text = f"HTTP plain text, {bench_http.CLIENTS} connections of wrk, {args.rounds} rounds, medians."
    results = {f"{depth} deep, {bench_http.SERVERS[name].title}": of for (depth, name), of in found.items()}
    return Found([bench_http.table(text, found)], results, {key: list(map(cpu_us, of)) for key, of in results.items()})


def need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise BenchError(f"{' and '.join(missing)} not installed")


@dataclass(frozen=True)
class Workload:
    title: str  # of its part of the picture, in which the smaller figure is the better one
    measure: Callable[[argparse.Namespace, Sequence[Server]], Found]


WORKLOADS = {
    "echo": Workload("Echo, 256 bytes: CPU \u00b5s/message", partial(echo, connections=100, size=256)),
    "echo-64k": Workload("Echo, 64 KiB: CPU \u00b5s/message", partial(echo, connections=16, size=1 << 16)),
    "echo-1m": Workload("Echo, 1 MiB: CPU \u00b5s/message", partial(echo, connections=4, size=1 << 20)),
    "latency": Workload("One ping-pong: \u00b5s, p50", latency),
    "lines": Workload("Lines, 64 bytes, 16 deep: CPU \u00b5s/message", lines),
    "churn": Workload("Connect, echo, close: CPU \u00b5s/connection", churn),
    "memory": Workload("Memory: bytes/idle connection", memory),
    "resp": Workload("redis-benchmark: CPU \u00b5s/request", resp),
    "http": Workload("wrk: CPU \u00b5s/request", http),
}


# --- what is shown ---------------------------------------------------------------------------------

GLANCE = ("echo", "lines")  # what README begins with
OURS, THEIRS, NATIVE = "#2aa876", "#2f8fd8", "#888888"


def colour(title: str) -> str:
    if "muxcore" in title:
        return OURS
    return NATIVE if re.search(r"\bC\b|redis-server|nginx", title) else THEIRS


def draw(found: dict[str, Found], path: Path) -> None:
    """A bar chart for each workload: medians, and the quartiles as whiskers."""
    plt = pyplot(path)
    if plt is None:
        return
    rows = (len(found) + 1) // 2
    figure, plots = plt.subplots(rows, 2, figsize=(13, 3.4 * rows), squeeze=False)
    for axes in plots.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (name, of) in zip(plots.flat, found.items(), strict=False):
        titles = list(of.values)
        middles = [median(values) for values in of.values.values()]
        low, high = zip(*map(quartiles, of.values.values()), strict=True)
        whiskers = [
            [m - q for m, q in zip(middles, low, strict=True)],
            [q - m for m, q in zip(middles, high, strict=True)],
        ]
        axes.barh(titles, middles, xerr=whiskers, color=list(map(colour, titles)), ecolor=INK, height=0.7)
        for i, value in enumerate(middles):
            digits = 0 if value >= 100 else 1 if value >= 10 else 2
            axes.text(high[i] + 0.01 * max(high), i, f"{value:,.{digits}f}", va="center", fontsize=9)
        axes.set(xlim=(0, 1.15 * max(high)))
        axes.set_title(WORKLOADS[name].title, fontsize=11)
        axes.invert_yaxis()
        axes.tick_params(labelsize=9)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, method="inclusive")
    return first, third


def versions() -> dict[str, str]:
    """Of what is compared, beside uvloop and muxcore."""
    found = {"libuv": pkg_config("libuv", "--modversion") or "absent"}
    found |= {name: package_version(name) for name in ("aiofastnet", "gevent", "trio", "httptools")}
    commands = {"redis-server": "--version", "nginx": "-v", "cc": "--version"}
    return found | {program: program_version(program, option) for program, option in commands.items()}


def program_version(program: str, option: str) -> str:
    try:
        done = subprocess.run([program, option], capture_output=True, text=True, timeout=10)
    except OSError:
        return "absent"
    match = re.search(r"\d+\.\d[\d.]*", done.stdout + done.stderr)
    return match[0] if match else "unknown"


def measured(args: argparse.Namespace, servers: Sequence[Server]) -> Iterator[tuple[str, Found | BenchError]]:
    """By workload; one that cannot be measured does not stop the others."""
    with progress() as bars:
        task = bars.add_task("", total=len(args.only))
        for i, name in enumerate(args.only, 1):
            bars.update(task, description=f"workload {name}")
            bars.console.print(f"{i} of {len(args.only)}: {WORKLOADS[name].title}", highlight=False)
            try:
                yield name, WORKLOADS[name].measure(args, servers)
            except BenchError as error:
                yield name, error
            bars.advance(task)


def main() -> None:
    options = parser(__doc__, list(WORKLOADS), 3)
    options.add_argument(
        "--seconds", type=float, default=0.6, help="per server, workload and round; default: %(default)s"
    )
    args = options.parse_args()
    found: dict[str, Found] = {}
    failed = []
    for name, of in measured(args, chosen(list(PEERS), PEERS)):
        if isinstance(of, BenchError):
            failed.append(f"{name}: {of}")
        else:
            found[name] = of
    if found:
        tables = [table for of in found.values() for table in of.tables]
        raw: dict[str, Any] = {
            name: {key: columns(results) for key, results in of.results.items()} for name, of in found.items()
        }
        report("suite", "The suite", tables, raw, args.keep, versions())
    if found and not args.keep:
        draw(found, HERE / "results" / "suite.svg")
        draw({name: of for name, of in found.items() if name in GLANCE}, HERE / "results" / "glance.svg")
    if failed:
        raise BenchError("not measured: " + "; ".join(failed))


if __name__ == "__main__":
    run(main)
