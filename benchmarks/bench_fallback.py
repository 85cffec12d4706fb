"""Server CPU time per echoed message of muxcore's pure-Python core, against loops written by hand over `selectors`.

What may live here: that table, for a busy server and for one that waits for every message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from _run import (
    Result,
    Running,
    Server,
    Table,
    all_serving,
    columns,
    cpu_us,
    disturbance,
    load,
    number,
    parser,
    ratio,
    report,
    rounds,
    run,
    times,
    undisturbed,
)

CONNECTIONS, SIZE = (100, 1), 256  # with one connection, each message pays for a whole turn of the loop
WARMUP = 0.1
SLICES = 5
GOAL = 2.0
Rounds = dict[str, list[Result]]


@dataclass(frozen=True)
class WithArgument(Server):
    """A server in peers/ whose command line says what it waits with."""

    argument: str = ""

    def command(self) -> list[str]:
        return [*super().command(), self.argument]


BASES = {
    server.name: server
    for server in (
        WithArgument("default", "DefaultSelector loop", "selectors_loop.py", argument="DefaultSelector"),
        WithArgument("poll-loop", "PollSelector loop", "selectors_loop.py", argument="PollSelector"),
        WithArgument("select-loop", "SelectSelector loop", "selectors_loop.py", argument="SelectSelector"),
    )
}
FALLBACKS = {
    server.name: server
    for server in (
        WithArgument("poll", 'Mux(backend="poll")', "fallback_callback.py", argument="poll"),
        WithArgument("select", 'Mux(backend="select")', "fallback_callback.py", argument="select"),
    )
}
SERVERS = {**BASES, **FALLBACKS}


def measure(servers: Sequence[Server], connections: int, count: int, seconds: float) -> Rounds:
    """Fresh servers in each round, the load in turn in short slices: see bench_echo.py."""
    names = [server.name for server in servers]
    results: Rounds = {name: [] for name in names}
    options = {"connections": connections, "size": SIZE, "seconds": seconds / SLICES, "warmup": WARMUP}
    for i in range(count):
        with all_serving(servers) as running:

            def once(name: str, running: dict[str, Running] = running) -> Result:
                return undisturbed(lambda: load(SERVERS[name], running[name], **options))

            found = rounds(names, SLICES, once, f"round {i + 1} of {count}, slice")
        for name in names:
            results[name] += found[name]
    return results


def verdict(name: str, ratios: Sequence[float | None]) -> str:
    known = [value for value in ratios if value is not None]
    if name in BASES or not known:
        return "-"
    return "held" if max(known) <= GOAL else "missed"


def table(text: str, results: Rounds, servers: Sequence[Server]) -> Table:
    header = ("server", "CPU us/message", "min-max", *(f"to {base.title}" for base in BASES.values()))
    result = Table(text, (*header, f"within {GOAL:g}x of all", "messages/s", "disturbed"))
    for server in servers:
        own = results[server.name]
        cpu = [cpu_us(one) for one in own]
        ratios = [ratio(own, results.get(base), cpu_us) for base in BASES]
        result.rows.append(
            (
                server.title,
                number(median(cpu)),
                f"{min(cpu):.2f}-{max(cpu):.2f}",
                *map(times, ratios),
                verdict(server.name, ratios),
                number(median(float(one["messages_per_s"]) for one in own), 0),
                f"{100 * median(map(disturbance, own)):.0f}%",
            )
        )
    return result


def main() -> None:
    options = parser(__doc__, list(SERVERS), 5)
    options.add_argument("--seconds", type=float, default=1.5, help="per server and round; default: %(default)s")
    options.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS, help="one table each")
    args = options.parse_args()
    servers = [SERVERS[name] for name in args.only]
    how = f"{args.rounds} rounds of {args.seconds:g} s in {SLICES} slices, medians of slices"
    tables, raw = [], {}
    for connections in args.connections:
        results = measure(servers, connections, args.rounds, args.seconds)
        tables.append(table(f"Connections: {connections}; {SIZE} bytes; {how}.", results, servers))
        raw[f"{connections} connections"] = {name: columns(found) for name, found in results.items()}
    report("fallback", "The pure-Python core", tables, raw, args.keep)


if __name__ == "__main__":
    run(main)
