"""User-space instructions per echoed message or line, counted by callgrind: nearly the same number on every machine.

What may live here: two run lengths under valgrind, their difference, and the functions that make it up. The kernel's
share is not in it. With one connection, a message pays for a whole turn of the loop; with more, they share it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from _run import (
    SERVERS,
    BenchError,
    Option,
    Result,
    Server,
    Table,
    chosen,
    load,
    number,
    parser,
    report,
    rounds,
    run,
    serving,
)
from bench_framing import servers_for

PROFILE_LINES = 25
Profile = dict[str, int]  # instructions by function
Key = tuple[str, int]  # server, number of connections
Results = dict[Key, list[Result]]


@dataclass(frozen=True)
class Work:
    """What is echoed, by which servers, and how often in the two runs of which the difference counts."""

    text: str
    servers: dict[str, Server]
    options: dict[str, Option]
    short: int
    long: int


LINE_SERVERS = {
    name: servers_for("lines")[name] for name in ("c", "each", "batch", "pull", "uvloop-each", "uvloop-joined")
}
WORKS = {
    "messages": Work("256-byte message", SERVERS, {"size": 256}, 2_000, 12_000),
    "lines": Work("64-byte line, 16 deep", LINE_SERVERS, {"size": 64, "depth": 16, "burst": True}, 16_000, 96_000),
}


def counted(server: Server, out: Path, **options: Option) -> None:
    """Echo that many messages under callgrind, which writes `out`."""
    prefix = ("valgrind", "--quiet", "--tool=callgrind", "--trace-children=no", f"--callgrind-out-file={out}")
    with serving(server, prefix) as running:
        load(server, running, patience=60, **options)
    if not out.exists():
        raise BenchError(f"{server.title}: callgrind left no {out.name}")


def annotated(out: Path) -> Profile:
    """Instructions by function, and their sum as "total"."""
    command = ["callgrind_annotate", "--auto=no", "--show-percs=no", "--threshold=100", str(out)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    profile: Profile = {}
    for line in text.splitlines():
        count, _, rest = line.strip().partition("  ")
        if not count.replace(",", "").isdigit():
            continue
        name = "total" if rest.startswith("PROGRAM TOTALS") else function_name(rest)
        profile[name] = profile.get(name, 0) + int(count.replace(",", ""))
    if "total" not in profile:
        raise BenchError("callgrind_annotate printed no total")
    return profile


def function_name(text: str) -> str:
    """Of `file:function'2 [object]`, where '2 means that it had called itself, the function."""
    return text.partition(" [")[0].rpartition(":")[2].partition("'")[0]


def difference(work: Work, key: Key) -> Result:
    """Instructions per message, in all and by function."""
    name, connections = key
    with tempfile.TemporaryDirectory() as folder:
        profiles = []
        for messages in (work.short, work.long):
            out = Path(folder) / f"callgrind.{messages}"
            counted(work.servers[name], out, connections=connections, messages=messages, **work.options)
            profiles.append(annotated(out))
    short, long = profiles
    per_message = {key: (count - short.get(key, 0)) / (work.long - work.short) for key, count in long.items()}
    return {"total": per_message.pop("total"), "functions": per_message}


def titles(connections: Sequence[int]) -> list[str]:
    return [f"{n} connection{'s' * (n > 1)}" for n in connections]


def totals_table(work: Work, servers: Sequence[Server], connections: Sequence[int], results: Results) -> Table:
    text = f"User-space instructions per echoed {work.text}: runs of {work.long:,} minus {work.short:,} messages."
    table = Table(text, ("server", *titles(connections)))
    for server in servers:
        totals = (median(result["total"] for result in results[server.name, n]) for n in connections)
        table.rows.append((server.title, *(number(total, 0) for total in totals)))
    return table


def profile_table(server: Server, connections: Sequence[int], results: Results) -> Table:
    """The functions that cost most with the most connections."""
    table = Table(f"{server.title}: the functions behind it, per message.", ("function", *titles(connections)))
    profiles = [results[server.name, n][0]["functions"] for n in connections]
    for name in sorted(profiles[-1], key=lambda name: -profiles[-1][name])[:PROFILE_LINES]:
        table.rows.append((name, *(number(profile.get(name, 0), 1) for profile in profiles)))
    return table


def main() -> None:
    names = list(dict.fromkeys(name for work in WORKS.values() for name in work.servers))
    options = parser(__doc__, names, 1)
    options.add_argument("--connections", type=int, nargs="+", default=[1, 10, 100], help="default: 1 10 100")
    options.add_argument("--profile", nargs="*", default=[], metavar="NAME", help="their top functions, too")
    options.add_argument("--table", choices=WORKS, help="only this one")
    options.add_argument("--most", type=float, help="fail if any of the totals is above")
    args = options.parse_args()
    if not shutil.which("valgrind"):
        raise BenchError("valgrind is needed")
    tables, raw = [], {}
    for title in [args.table] if args.table else WORKS:
        work = WORKS[title]
        servers = chosen([name for name in work.servers if name in args.only], work.servers)
        keys = [(server.name, connections) for server in servers for connections in args.connections]
        results = rounds(keys, args.rounds, partial(difference, work), title)
        tables.append(totals_table(work, servers, args.connections, results))
        tables += [
            profile_table(server, args.connections, results) for server in servers if server.name in args.profile
        ]
        raw[title] = {f"{name} x {n}": [result["total"] for result in found] for (name, n), found in results.items()}
    report("instructions", "Instructions", tables, raw, args.keep)
    most = max(total for found in raw.values() for totals in found.values() for total in totals)
    if args.most is not None and most > args.most:
        raise BenchError(f"{most:,.0f} instructions, and {args.most:,.0f} are allowed")


if __name__ == "__main__":
    run(main)
