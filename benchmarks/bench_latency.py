"""How long a ping-pong takes: servers that sleep between messages, and servers that spin.

What may live here: that one comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

from _run import (
    SERVERS,
    Goal,
    Result,
    Server,
    Table,
    by_name,
    chosen,
    columns,
    disturbed,
    goals_table,
    load,
    middle,
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

SIZE = 256
OURS = by_name(
    Server("c", "C epoll, sleeps", "echo_epoll.c"),
    Server("c_spin", "C epoll, spins", "echo_epoll.c", ("--spin",)),
    Server("callback", "muxcore, sleeps", "muxcore_callback.py"),
    Server("busy_poll", "muxcore, busy_poll", "muxcore_busy_poll.py"),
    SERVERS["uvloop"],
    SERVERS["select"],
)
CLIENTS = {"sleeping": False, "spinning": True}
Key = tuple[str, str]


def measure(key: Key, seconds: float) -> Result:
    name, client = key

    def once() -> Result:
        with serving(OURS[name]) as running:
            return load(OURS[name], running, size=SIZE, seconds=seconds, warmup=0.1, spin=CLIENTS[client])

    return undisturbed(once)


def p50(result: Result) -> float:
    return float(result["p50_us"])


def table(client: str, servers: Sequence[Server], results: dict[Key, list[Result]]) -> Table:
    text = f"One connection x {SIZE} bytes, to and fro; the client is {client} while it waits."
    header = ("server", "p50 us", "p99 us", "p50 to C that sleeps", "p50 to C that spins", "messages/s", "disturbed")
    found = Table(text, header)
    for server in servers:
        own = results[server.name, client]
        sleeps, spins = results.get(("c", client)), results.get(("c_spin", client))
        found.rows.append(
            (
                server.title,
                number(middle(own, "p50_us")),
                number(middle(own, "p99_us")),
                times(ratio(own, sleeps, p50)),
                times(ratio(own, spins, p50)),
                number(middle(own, "messages_per_s"), 0),
                disturbed(own),
            )
        )
    return found


def main() -> None:
    options = parser(__doc__, list(OURS), 7)
    options.add_argument("--seconds", type=float, default=1.0, help="per run; default: %(default)s")
    args = options.parse_args()
    servers = chosen(args.only, OURS)
    keys = [(server.name, client) for client in CLIENTS for server in servers]
    results = rounds(keys, args.rounds, lambda key: measure(key, args.seconds))
    tables = [table(client, servers, results) for client in CLIENTS]
    if {"busy_poll", "c_spin"} <= {server.name for server in servers}:
        goals = []
        for client in CLIENTS:
            seen = ratio(results["busy_poll", client], results["c_spin", client], p50)
            goals.append(Goal(f"p50, busy_poll to C that spins, {client} client", seen, 1.08))
        tables.append(goals_table(goals))
    raw = {f"{name}, {client} client": columns(found) for (name, client), found in results.items()}
    report("latency", "Latency of one ping-pong", tables, raw, args.keep)


if __name__ == "__main__":
    run(main)
