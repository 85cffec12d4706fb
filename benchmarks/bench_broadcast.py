"""Server CPU time per message that a broadcast delivers to one of 10,000 subscribers, 1 in 20 of which reads nothing.

What may live here: tables of that time and of the server's memory. A subscriber that reads must get every byte. For one
that does not, a server may drop lines, but only whole ones: its memory must stay bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from subprocess import Popen

from _run import (
    LOAD_TIMEOUT,
    Goal,
    Result,
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

SUBSCRIBERS, SLOW, SIZE = 10_000, 0.05, 128
BURSTS = {1: "One line after the other", 16: "Bursts of 16 lines"}
SLICES = 4
BASES = {"c": "to C each", "c-block": "to C block", "uvloop": "to uvloop"}
GOALS = {1: (1.15, 1.10)}
Key = tuple[int, str]  # lines per burst, server

SERVERS = by_name(
    Server("muxcore", "muxcore", "muxcore_broadcast.py"),
    Server("c", "C, a send for each line", "broadcast_epoll.c", ("each",)),
    Server("c-block", "C, a send for all lines of a read", "broadcast_epoll.c", ("block",)),
    Server("uvloop", "uvloop", "uvloop_broadcast.py", needs="uvloop"),
    Server("asyncio", "asyncio", "asyncio_broadcast.py"),
)


# --- one server and its subscribers ----------------------------------------------------------------


@dataclass(frozen=True)
class Audience:
    """Subscribers of a server, which publish what this process requests."""

    process: Popen[str]
    memory: dict[str, Result]  # of the server, when all were connected and when the slow ones were full

    def publish(self, seconds: float, burst: int) -> Result:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds} {burst}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> Result:
        """Let the slow ones catch up; what they got, and the server's memory before."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.answer()

    def answer(self) -> Result:
        result: Result = json.loads(read_line(self.process, LOAD_TIMEOUT))
        return result


@contextmanager
def gathered(server: Server, subscribers: int) -> Iterator[Audience]:
    """While inside, the server runs, has all its subscribers, and the slow ones accept no more."""
    slow = int(subscribers * SLOW)
    with (
        started(server) as running,
        loading(running, "subscribers", readers=subscribers - slow, slow=slow, size=SIZE) as process,
    ):
        yield Audience(process, json.loads(read_line(process, LOAD_TIMEOUT)))


@contextmanager
def all_gathered(
    servers: Sequence[Server], subscribers: int, endings: dict[str, list[Result]]
) -> Iterator[dict[str, Audience]]:
    """The same for all of them. At the end, `endings` get what was found out about memory and the slow ones."""
    with ExitStack() as stack:
        found = {server.name: stack.enter_context(gathered(server, subscribers)) for server in servers}
        yield found
        for name, audience in found.items():
            endings[name].append({**audience.memory, **audience.end()})


# --- tables ----------------------------------------------------------------------------------------


def delivered_per_cpu_s(result: Result) -> float:
    return 1e6 / cpu_us(result)


def rate(result: Result) -> float:
    return float(result["messages"]) / float(result["seconds"])


def table(text: str, results: dict[str, list[Result]], servers: Sequence[Server]) -> Table:
    cpu = ("CPU us/delivery", "user", "system", "min-max", *BASES.values(), "deliveries/CPU s")
    result = Table(text, ("server", *cpu, "deliveries/s", "disturbed"))
    for server in servers:
        own = results[server.name]
        user, system = split(own)
        result.rows.append(
            (
                server.title,
                number(median(map(cpu_us, own))),
                number(user),
                number(system),
                spread(own),
                *(times(ratio(own, results.get(base), cpu_us)) for base in BASES),
                number(median(map(delivered_per_cpu_s, own)), 0),
                number(median(map(rate, own)), 0),
                disturbed(own),
            )
        )
    return result


def memory_table(text: str, endings: dict[str, list[Result]], servers: Sequence[Server]) -> Table:
    stages = ("connected", "filled", "ended")
    result = Table(text, ("server", "connected", "slow ones full", "at the end", "resident", "slow ones got"))
    for server in servers:
        own = endings[server.name]
        private = (median(ending[stage]["private_kb"] for ending in own) / 1024 for stage in stages)
        resident = median(ending["ended"]["resident_kb"] for ending in own) / 1024
        got = median(ending["slow_got"] / ending["published"] for ending in own)
        row = (*private, resident)
        result.rows.append((server.title, *(number(value, 1) for value in row), f"{100 * got:.0f}%"))
    return result


def goals(results: dict[int, dict[str, list[Result]]]) -> Table:
    """Of CPU time per delivered message."""
    found = []
    for burst, (bound, stretch) in GOALS.items():
        own = results[burst].get("muxcore")
        seen = ratio(own, results[burst].get("c"), cpu_us) if own else None
        found.append(Goal(f"muxcore to C, {BURSTS[burst].lower()}", seen, bound, stretch))
    return goals_table(found)


def main() -> None:
    options = parser(__doc__, list(SERVERS), 4)
    options.add_argument("--seconds", type=float, default=2.0, help="per server, burst and round; default: %(default)s")
    options.add_argument("--subscribers", type=int, default=SUBSCRIBERS, help="default: %(default)s")
    args = options.parse_args()
    servers = chosen(args.only, SERVERS)
    keys = [(burst, server.name) for burst in BURSTS for server in servers]
    endings: dict[str, list[Result]] = {server.name: [] for server in servers}

    def measure(audiences: dict[str, Audience], key: Key) -> Result:
        burst, name = key
        return undisturbed(lambda: audiences[name].publish(args.seconds / SLICES, burst))

    found = fresh_rounds(keys, args.rounds, SLICES, lambda: all_gathered(servers, args.subscribers, endings), measure)
    results = {burst: {server.name: found[burst, server.name] for server in servers} for burst in BURSTS}
    how = f"{args.rounds} rounds of {args.seconds:g} s in {SLICES} slices, medians of slices"
    who = f"{args.subscribers:,} subscribers, {SLOW:.0%} of whom read nothing; lines of {SIZE} bytes"
    tables = [table(f"{BURSTS[burst]}; {who}; {how}.", results[burst], servers) for burst in BURSTS]
    text = "The server's private memory in MiB; and which part of what was published the slow ones got in the end."
    tables += [goals(results), memory_table(text, endings, servers)]
    raw = {f"{name}, burst of {burst}": columns(of_one) for (burst, name), of_one in found.items()}
    report("broadcast", "Broadcasts", tables, {"slices": raw, "endings": endings}, args.keep)


if __name__ == "__main__":
    run(main)
