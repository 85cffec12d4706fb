"""Server CPU time per connection that comes, has one message echoed, and goes.

What may live here: that one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from _run import (
    SERVERS,
    Goal,
    Option,
    Result,
    Server,
    Table,
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

LOAD: dict[str, Option] = {"connections": 50, "size": 256}
TEXT = "{connections} clients at a time: connect, {size} bytes to and fro, a FIN each way".format(**LOAD)
SLICES = 10
GOAL, STRETCH = 1.08, 1.06
Rounds = dict[str, list[Result]]


def table(text: str, results: Rounds, servers: Sequence[Server]) -> Table:
    cpu = ("CPU us/connection", "user", "system", "min-max", "to C", "to uvloop")
    found = Table(text, ("server", *cpu, "connections/s", "disturbed"))
    for server in servers:
        own = results[server.name]
        user, system = split(own)
        found.rows.append(
            (
                server.title,
                number(median(map(cpu_us, own))),
                number(user),
                number(system),
                spread(own),
                times(ratio(own, results.get("c"), cpu_us)),
                times(ratio(own, results.get("uvloop"), cpu_us)),
                number(middle(own, "messages_per_s"), 0),
                disturbed(own),
            )
        )
    return found


def goals(results: Rounds) -> Table:
    return goals_table(
        [
            Goal(f"{name} to C", ratio(results[name], results.get("c"), cpu_us), GOAL, STRETCH)
            for name in ("callback", "pull")
            if name in results
        ]
    )


def main() -> None:
    options = parser(__doc__, list(SERVERS), 5)
    options.add_argument("--seconds", type=float, default=3.0, help="per server and round; default: %(default)s")
    args = options.parse_args()
    servers = chosen(args.only)
    results = echo_rounds(servers, args.rounds, SLICES, "churn", seconds=args.seconds, **LOAD)
    text = f"{TEXT}; {args.rounds} rounds of {args.seconds:g} s in {SLICES} slices, medians of slices."
    raw = {name: columns(found) for name, found in results.items()}
    report("churn", "Connections that come and go", [table(text, results, servers), goals(results)], raw, args.keep)


if __name__ == "__main__":
    run(main)
