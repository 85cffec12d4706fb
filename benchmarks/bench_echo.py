"""Server CPU time per echoed message, throughput and latency: C, muxcore, uvloop, asyncio, a select.epoll loop.

What may live here: the two echo tables (many small messages, and 64 KiB ones).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from _run import (
    SERVERS,
    Result,
    Server,
    Table,
    chosen,
    columns,
    cpu_us,
    disturbed,
    echo_rounds,
    middle,
    number,
    parser,
    ratio,
    report,
    run,
    split,
    spread,
    times,
)

SLICES = 10
Rounds = dict[str, list[Result]]


def small_table(text: str, results: Rounds, servers: Sequence[Server]) -> Table:
    cpu = ("CPU us/message", "user", "system", "min-max", "to C", "to uvloop")
    table = Table(text, ("server", *cpu, "messages/s", "p50 us", "p99 us", "disturbed"))
    for server in servers:
        own = results[server.name]
        user, system = split(own)
        table.rows.append(
            (
                server.title,
                number(median(map(cpu_us, own))),
                number(user),
                number(system),
                spread(own),
                times(ratio(own, results.get("c"), cpu_us)),
                times(ratio(own, results.get("uvloop"), cpu_us)),
                number(middle(own, "messages_per_s"), 0),
                number(middle(own, "p50_us"), 0),
                number(middle(own, "p99_us"), 0),
                disturbed(own),
            )
        )
    return table


def rate(result: Result) -> float:
    return float(result["bytes"]) / float(result["seconds"])


def large_table(text: str, results: Rounds, servers: Sequence[Server]) -> Table:
    cpu = ("CPU us/message", "min-max", "CPU to C", "CPU to uvloop")
    table = Table(text, ("server", "MB/s", "to C", "to uvloop", *cpu, "disturbed"))
    for server in servers:
        own = results[server.name]
        table.rows.append(
            (
                server.title,
                number(median(map(rate, own)) / 1e6, 0),
                times(ratio(own, results.get("c"), rate)),
                times(ratio(own, results.get("uvloop"), rate)),
                number(median(map(cpu_us, own))),
                spread(own),
                times(ratio(own, results.get("c"), cpu_us)),
                times(ratio(own, results.get("uvloop"), cpu_us)),
                disturbed(own),
            )
        )
    return table


TABLES: dict[str, tuple[int, int, Callable[[str, Rounds, Sequence[Server]], Table]]] = {
    "small": (100, 256, small_table),
    "large": (16, 65536, large_table),
}


def main() -> None:
    options = parser(__doc__, list(SERVERS), 7)
    options.add_argument("--seconds", type=float, default=3.0, help="per server and round; default: %(default)s")
    options.add_argument("--table", choices=TABLES, help="only this one")
    args = options.parse_args()
    servers = chosen(args.only)
    tables, raw = [], {}
    for title in [args.table] if args.table else TABLES:
        connections, size, table = TABLES[title]
        results = echo_rounds(servers, args.rounds, SLICES, seconds=args.seconds, connections=connections, size=size)
        how = f"{args.rounds} rounds of {args.seconds:g} s in {SLICES} slices, medians of slices"
        tables.append(table(f"{connections} connections x {size:,} bytes; {how}.", results, servers))
        raw[title] = {name: columns(found) for name, found in results.items()}
    report("echo", "Echo", tables, raw, args.keep)


if __name__ == "__main__":
    run(main)
