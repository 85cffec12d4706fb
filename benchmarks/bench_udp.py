"""Server CPU time per received datagram, and how many are lost, beside a recvmmsg loop in C.

What may live here: a load at a given rate, which does not wait for the server, and tables of that time. What a server
has not received by the end, when its counts are requested, is lost: its receive buffer, of the default size for all,
was full.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median

from _run import (
    LOAD_TIMEOUT,
    STOP_TIMEOUT,
    WARMUP,
    BenchError,
    Goal,
    Option,
    Result,
    Running,
    Server,
    Table,
    by_name,
    chosen,
    columns,
    cpu_us,
    disturbed,
    fresh_rounds,
    goals_table,
    loading,
    number,
    parser,
    ratio,
    read_line,
    report,
    run,
    split,
    spread,
    started,
    times,
    undisturbed,
)

SIZE, SOCKETS, SLICES = 64, 100, 5
LOADS: dict[str, dict[str, Option]] = {
    "100,000/s, each from another client than the last": {"rate": 100_000, "burst": 1},
    "200,000/s, in bursts of 16 from one client": {"rate": 200_000, "burst": 16},
    "As many as the load generator can send, in bursts of 64 from one client": {"rate": 0, "burst": 64},
}
BASES = {"c": "to C", "recvfrom": "to recvfrom", "uvloop": "to uvloop"}
GOAL, STRETCH = 1.20, 1.15
Key = tuple[str, str]  # load, server

SERVERS = by_name(
    Server("muxcore", "muxcore", "muxcore_datagrams.py"),
    Server("c", "C, recvmmsg", "recvmmsg.c"),
    Server("recvfrom", "recvfrom loop", "recvfrom_loop.py"),
    Server("uvloop", "uvloop", "uvloop_datagrams.py", needs="uvloop"),
    Server("asyncio", "asyncio", "asyncio_datagrams.py"),
)


def blast(server: Server, running: Running, **options: Option) -> Result:
    """Send for a while: what was sent and received. BenchError if the server says that something else came."""
    with loading(running, "datagrams", size=SIZE, sockets=SOCKETS, **options) as process:
        result: Result = json.loads(read_line(process, LOAD_TIMEOUT))
        if process.wait(STOP_TIMEOUT) != 0:
            raise BenchError(f"{server.title}: counted wrongly: {result}")
    return result


@contextmanager
def all_started(servers: Sequence[Server]) -> Iterator[dict[str, Running]]:
    """While inside, all of them run, and have had some datagrams; one without load sleeps."""
    with ExitStack() as stack:
        found = {server.name: stack.enter_context(started(server)) for server in servers}
        for server in servers:
            blast(server, found[server.name], seconds=WARMUP, rate=100_000)
        yield found


def lost(results: Sequence[Result]) -> float:
    """The part of all that was sent."""
    return float(1 - sum(result["messages"] for result in results) / sum(result["sent"] for result in results))


def table(text: str, results: dict[str, list[Result]], servers: Sequence[Server]) -> Table:
    cpu = ("CPU us/datagram", "user", "system", "min-max", *BASES.values())
    found = Table(text, ("server", *cpu, "received/s", "lost", "disturbed"))
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
                *(times(ratio(own, results.get(base), cpu_us)) for base in BASES),
                number(median(result["messages"] / result["seconds"] for result in own), 0),
                f"{100 * lost(own):.1f}%",
                disturbed(own),
            )
        )
    return found


def main() -> None:
    options = parser(__doc__, list(SERVERS), 3)
    options.add_argument("--seconds", type=float, default=1.0, help="per server, load and round; default: %(default)s")
    args = options.parse_args()
    servers = chosen(args.only, SERVERS)
    keys = [(load, server.name) for load in LOADS for server in servers]

    def measure(running: dict[str, Running], key: Key) -> Result:
        load, name = key
        return undisturbed(lambda: blast(SERVERS[name], running[name], seconds=args.seconds / SLICES, **LOADS[load]))

    found = fresh_rounds(keys, args.rounds, SLICES, lambda: all_started(servers), measure)
    results = {load: {server.name: found[load, server.name] for server in servers} for load in LOADS}
    how = f"{SIZE} bytes; {args.rounds} rounds of {args.seconds:g} s in {SLICES} slices, medians of slices"
    tables = [table(f"{load}; {how}.", results[load], servers) for load in LOADS]
    seen = {load: ratio(of["muxcore"], of.get("c"), cpu_us) for load, of in results.items() if "muxcore" in of}
    tables.append(goals_table([Goal(f"muxcore to C: {load}", value, GOAL, STRETCH) for load, value in seen.items()]))
    raw = {f"{name}: {load}": columns(of_one) for (load, name), of_one in found.items()}
    report("udp", "Datagrams", tables, raw, args.keep)


if __name__ == "__main__":
    run(main)
