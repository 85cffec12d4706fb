"""Server CPU time per echoed message of muxcore's pure-Python core, against loops written by hand over `selectors`.

What may live here: that table, for a busy server and for one that waits for every message.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from _run import (
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
    parser,
    ratio,
    report,
    run,
    spread,
    times,
)

CONNECTIONS, SIZE = (100, 1), 256  # with one connection, each message pays for a whole turn of the loop
SLICES = 5
GOAL = 2.0
Rounds = dict[str, list[Result]]


BASES = by_name(
    Server("default", "DefaultSelector loop", "selectors_loop.py", ("DefaultSelector",)),
    Server("poll-loop", "PollSelector loop", "selectors_loop.py", ("PollSelector",)),
    Server("select-loop", "SelectSelector loop", "selectors_loop.py", ("SelectSelector",)),
)
FALLBACKS = by_name(
    Server("poll", 'Mux(backend="poll")', "fallback_callback.py", ("poll",)),
    Server("select", 'Mux(backend="select")', "fallback_callback.py", ("select",)),
)
SERVERS = {**BASES, **FALLBACKS}


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
        ratios = [ratio(own, results.get(base), cpu_us) for base in BASES]
        result.rows.append(
            (
                server.title,
                number(median(map(cpu_us, own))),
                spread(own),
                *map(times, ratios),
                verdict(server.name, ratios),
                number(middle(own, "messages_per_s"), 0),
                disturbed(own),
            )
        )
    return result


def main() -> None:
    options = parser(__doc__, list(SERVERS), 5)
    options.add_argument("--seconds", type=float, default=1.5, help="per server and round; default: %(default)s")
    options.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS, help="one table each")
    args = options.parse_args()
    servers = chosen(args.only, SERVERS)
    how = f"{args.rounds} rounds of {args.seconds:g} s in {SLICES} slices, medians of slices"
    tables, raw = [], {}
    for connections in args.connections:
        results = echo_rounds(servers, args.rounds, SLICES, seconds=args.seconds, connections=connections, size=SIZE)
        tables.append(table(f"Connections: {connections}; {SIZE} bytes; {how}.", results, servers))
        raw[f"{connections} connections"] = {name: columns(found) for name, found in results.items()}
    report("fallback", "The pure-Python core", tables, raw, args.keep)


if __name__ == "__main__":
    run(main)
