"""Server CPU time per echoed message that must be found in a stream: 64-byte lines, and 64 bytes after their length.

What may live here: those two tables. Each connection has 16 messages under way, and sends the next 16 when all of them
have come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from _run import (
    Goal,
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
    goals_table,
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

CONNECTIONS, DEPTH = 100, 16
SLICES = 10
SIZES = {"lines": 64, "length": 4 + 64}  # on the wire
LOADS: dict[str, dict[str, Option]] = {
    frame: {"connections": CONNECTIONS, "size": size, "depth": DEPTH, "burst": True} for frame, size in SIZES.items()
}
TEXTS = {"lines": "63 bytes and a newline", "length": "64 bytes after four of length"}
BASES = {
    "uvloop-each": "to uvloop each", "uvloop-joined": "to uvloop joined", "uvloop-streams": "to uvloop streams",
    "unframed": "to C unframed",
}  # fmt: skip
Rounds = dict[str, list[Result]]


def servers_for(frame: str) -> dict[str, Server]:
    """By name, all that find such messages; and one that does not look for them."""

    def server(name: str, title: str, file: str, *styles: str, needs: str | None = None) -> Server:
        return Server(name, title, file, (frame, *styles), needs, frame)

    return by_name(
        server("each", "muxcore, each message", "muxcore_framing.py", "each"),
        server("batch", "muxcore, a list per read", "muxcore_framing.py", "batch"),
        server("pull", "muxcore, pull style", "muxcore_framing.py", "pull"),
        server("coroutines", "muxcore, coroutines on uvloop", "muxcore_coroutines.py", needs="uvloop"),
        server("uvloop-each", "uvloop, each message", "uvloop_framing.py", "each", needs="uvloop"),
        server("uvloop-joined", "uvloop, split and joined", "uvloop_framing.py", "joined", needs="uvloop"),
        server("asyncio-each", "asyncio, each message", "asyncio_framing.py", "each"),
        server("asyncio-joined", "asyncio, split and joined", "asyncio_framing.py", "joined"),
        server("streams", "asyncio streams", "asyncio_streams.py"),
        server("uvloop-streams", "uvloop streams", "uvloop_streams.py", needs="uvloop"),
        server(
            "aiofastnet", "aiofastnet, each message", "aiofastnet_protocol.py", "each", needs="aiofastnet and uvloop"
        ),
        server("c", "C, each message", "framing_epoll.c"),
        Server("unframed", "C unframed", "echo_epoll.c", frame=frame),
    )


def table(text: str, results: Rounds, servers: Sequence[Server]) -> Table:
    cpu = ("CPU us/message", "user", "system", "min-max", *BASES.values())
    result = Table(text, ("server", *cpu, "messages/s", "disturbed"))
    for server in servers:
        own = results[server.name]
        user, system = split(own)
        result.rows.append(
            (
                server.title,
                number(median(map(cpu_us, own)), 3),
                number(user, 3),
                number(system, 3),
                spread(own),
                *(times(ratio(own, results.get(base), cpu_us)) for base in BASES),
                number(middle(own, "messages_per_s"), 0),
                disturbed(own),
            )
        )
    return result


def goals(results: Rounds) -> Table:
    """Of CPU time per message; 0.85x the messages of C per CPU second is 1.18x its time."""

    def goal(own: str, base: str, bound: float, stretch: float | None = None) -> Goal:
        found = results.get(own)
        seen = ratio(found, results.get(base), cpu_us) if found else None
        return Goal(f"{own} {BASES[base]}", seen, bound, stretch)

    return goals_table(
        (
            goal("each", "uvloop-each", 0.10, 0.077),
            goal("each", "uvloop-joined", 0.95),
            goal("batch", "uvloop-joined", 0.80, 0.72),
            goal("batch", "unframed", 1.30, 1.18),
            goal("coroutines", "uvloop-streams", 0.20),
        )
    )


def main() -> None:
    options = parser(__doc__, list(servers_for("lines")), 7)
    options.add_argument("--seconds", type=float, default=2.0, help="per server and round; default: %(default)s")
    options.add_argument("--connections", type=int, default=CONNECTIONS, help="default: %(default)s")
    options.add_argument("--frame", choices=SIZES, help="only this table")
    args = options.parse_args()
    tables, raw = [], {}
    for frame in [args.frame] if args.frame else SIZES:
        servers = chosen(args.only, servers_for(frame))
        load = LOADS[frame] | {"connections": args.connections}
        results = echo_rounds(servers, args.rounds, SLICES, seconds=args.seconds, **load)
        how = f"{args.connections} connections; {args.rounds} rounds of {args.seconds:g} s in {SLICES} slices, medians"
        tables += [table(f"{TEXTS[frame]}, {DEPTH} deep, {how}.", results, servers), goals(results)]
        raw[frame] = {name: columns(found) for name, found in results.items()}
    report("framing", "Messages found in a stream", tables, raw, args.keep)


if __name__ == "__main__":
    run(main)
