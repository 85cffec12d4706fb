"""User-space memory of a server per idle connection that has exchanged a message.

What may live here: the difference in a server's own memory between two numbers of idle connections. What the kernel
keeps for each socket is the same for all and not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from _run import (
    SERVERS,
    BenchError,
    Result,
    Running,
    Server,
    Table,
    chosen,
    columns,
    loading,
    number,
    parser,
    read_line,
    report,
    rounds,
    run,
    serving,
)

SIZE = 256
FEW, MANY = 1_000, 10_000
PATIENCE = 60.0


def own_bytes(pid: int) -> int:
    """Memory that this process alone has touched."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return 1024 * int(line.split()[1])
    raise BenchError("no Private_Dirty in smaps_rollup")


def held(running: Running, idle: int) -> int:
    """Its memory while that many connections, each of which has exchanged a message, are open and idle."""
    with loading(running, connections=0, idle=idle, size=SIZE, hold=True) as process:
        read_line(process, PATIENCE)
        own = own_bytes(running.pid)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        read_line(process, PATIENCE)
        if process.wait(PATIENCE) != 0:
            raise BenchError("lost bytes")
    return own


def measure(server: Server) -> Result:
    """A fresh server for each number: memory that was freed but not returned must not hide the next's."""
    sizes = {}
    for idle in (FEW, MANY):
        with serving(server) as running:
            sizes[idle] = held(running, idle)
    return {"few": sizes[FEW], "many": sizes[MANY], "each": (sizes[MANY] - sizes[FEW]) / (MANY - FEW)}


def table(results: dict[str, list[Result]], servers: Sequence[Server]) -> Table:
    count = len(results[servers[0].name])
    text = f"Private memory of the server, {MANY:,} against {FEW:,} idle connections; medians of {count}."
    found = Table(text, ("server", "bytes/connection", f"MiB at {FEW:,}", f"MiB at {MANY:,}"))
    for server in servers:
        each, few, many = (median(result[key] for result in results[server.name]) for key in ("each", "few", "many"))
        found.rows.append((server.title, number(each, 0), number(few / 2**20, 1), number(many / 2**20, 1)))
    return found


def main() -> None:
    args = parser(__doc__, ("c", "callback", "pull", "uvloop", "asyncio", "select"), 3).parse_args()
    servers = chosen(args.only)
    results = rounds([server.name for server in servers], args.rounds, lambda name: measure(SERVERS[name]))
    raw = {name: columns(found) for name, found in results.items()}
    report("memory", "Memory per idle connection", [table(results, servers)], raw, args.keep)


if __name__ == "__main__":
    run(main)
