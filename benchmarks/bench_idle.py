"""What 15,000 idle connections cost the active ones: server CPU time per message with and without them.

What may live here: that one comparison.
"""

from __future__ import annotations

from statistics import median

from _run import (
    SERVERS,
    Result,
    Server,
    Table,
    by_name,
    chosen,
    columns,
    cpu_us,
    load,
    number,
    parser,
    ratio,
    report,
    rounds,
    run,
    serving,
    times,
    undisturbed,
)

ACTIVE, SIZE = 10, 256
WARMUP = 0.3
OURS = by_name(
    SERVERS["c"],
    SERVERS["callback"],
    Server("timeouts", "muxcore callback, idle and write timeouts", "muxcore_timeouts.py"),
    SERVERS["pull"],
)
Key = tuple[str, int]


def measure(key: Key, seconds: float) -> Result:
    name, idle = key
    server = OURS[name]

    def once() -> Result:
        with serving(server) as running:
            return load(server, running, connections=ACTIVE, idle=idle, size=SIZE, seconds=seconds, warmup=WARMUP)

    return undisturbed(once)


def main() -> None:
    options = parser(__doc__, list(OURS), 7)
    options.add_argument("--idle", type=int, default=15_000, help="default: %(default)s")
    options.add_argument("--seconds", type=float, default=2.0, help="per run; default: %(default)s")
    args = options.parse_args()
    servers = chosen(args.only, OURS)
    keys = [(server.name, idle) for server in servers for idle in (0, args.idle)]
    results = rounds(keys, args.rounds, lambda key: measure(key, args.seconds))
    text = f"{ACTIVE} active connections x {SIZE} bytes, {args.rounds} rounds of {args.seconds:g} s, medians."
    many_idle = f"{args.idle:,} idle"
    table = Table(text, ("server", "CPU us/message, 0 idle", many_idle, "ratio", "messages/s, 0 idle", many_idle))
    for server in servers:
        none, many = results[server.name, 0], results[server.name, args.idle]
        cpu = (number(median(map(cpu_us, runs))) for runs in (none, many))
        rates = (number(median(result["messages_per_s"] for result in runs), 0) for runs in (none, many))
        table.rows.append((server.title, *cpu, times(ratio(many, none, cpu_us)), *rates))
    raw = {f"{name} + {idle} idle": columns(found) for (name, idle), found in results.items()}
    report("idle", "The cost of idle connections", [table], raw, args.keep)


if __name__ == "__main__":
    run(main)
