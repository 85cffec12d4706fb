"""What may live here: `python -m muxcore bench`: what is measured, on which servers, and the table."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .._impl import core
from . import _demo, _info
from ._demo import DemoFailed
from ._demo_load import POOL, Address, Client, Load, run_load

ROUNDS = 5
CLIENTS = 50
TIMEOUT = 60.0  # seconds for one measurement; it takes about one
LINE = POOL.translate(bytes.maketrans(b"\r\n", b"  "))[:63] + b"\n"
DEPTH = 16
SET = b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$5\r\nvalue\r\n"
GET = b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"


@dataclass(frozen=True, slots=True)
class Work:
    """Every client sends `request`, waits for the whole of `reply`, and so on."""

    name: str
    title: str
    servers: tuple[str, ...]
    request: bytes
    reply: bytes
    messages: int
    """In one request."""
    blocks: int
    """Requests of each client."""

    def clients(self, load: Load) -> Iterator[Client]:
        return (Asker(load, number, self) for number in range(CLIENTS))

    @property
    def total(self) -> int:
        return CLIENTS * self.blocks * self.messages


WORKS = (
    Work("echo", "echo, 256 bytes", ("muxcore", "asyncio", "uvloop"), POOL[:256], POOL[:256], 1, 800),
    Work("lines", f"lines, {DEPTH} deep", ("muxcore", "asyncio", "uvloop"), LINE * DEPTH, LINE * DEPTH, DEPTH, 600),
    Work(
        "resp",
        f"RESP SET and GET, {DEPTH} deep",
        ("muxcore", "redis-server"),
        (SET + GET) * (DEPTH // 2),
        b"+OK\r\n$5\r\nvalue\r\n" * (DEPTH // 2),
        DEPTH,
        600,
    ),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one server."""

    work: str
    server: str
    messages: int
    seconds: float
    cpu_us: float
    """Of the server, per message."""
    p50_ms: float
    """From a request to the last byte of its reply."""
    p99_ms: float


class Asker(Client):
    """Its `sent` counts requests' bytes, `received` and `total` replies'."""

    __slots__ = ("sent_at", "work")

    def __init__(self, load: Load, number: int, work: Work) -> None:
        super().__init__(load, number, work.blocks * len(work.reply))
        self.work = work
        self.goal = len(work.request)
        self.sent_at = 0

    def push(self) -> None:
        done = self.sent % len(self.work.request)
        if not done:
            self.sent_at = time.perf_counter_ns()
        try:
            self.sent += self.sock.send(self.work.request[done:])
        except BlockingIOError:
            pass
        self.watch(self.wanted())

    def pull(self, limit: int) -> None:
        done, size = self.received % len(self.work.reply), len(self.work.reply)
        data = self.sock.recv(size - done + 1)  # one more than there should be
        if not data:
            self.ended()
        elif data != self.work.reply[done : done + len(data)]:
            self.fail("it sent something else than the right reply", len(data))
        else:
            self.received += len(data)
            if done + len(data) == size:
                self.answered()

    def answered(self) -> None:
        self.load.result.latencies_ns.append(time.perf_counter_ns() - self.sent_at)
        if self.received < self.total:
            self.goal += len(self.work.request)
            self.push()
        else:
            self.sock.shutdown(socket.SHUT_WR)

    def message_count(self) -> int:
        return 0  # `latencies_ns` has them


# --- measuring -------------------------------------------------------------------------------------


def run(rounds: int = ROUNDS, works: Sequence[Work] = WORKS, file: Path | None = None) -> int:
    """Measure, print the table, write `file`; returns the exit code: 1 if a server failed, or sent a wrong byte."""
    console = Console()
    found: list[Measured] = []
    try:
        runs = list(_runs(rounds, works))
        with _demo._signals_interrupt(), _pinned() as cores, _progress(console) as progress:
            task = progress.add_task("", total=len(runs))
            for work, name in runs:
                progress.update(task, description=f"{work.title}: {name}")
                found.append(measure(work, name, cores))
                progress.advance(task)
    except DemoFailed as error:
        print(f"muxcore bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("muxcore bench: interrupted; the server is stopped", file=sys.stderr)
        return 1
    about = environment()
    console.print(*(_table(found, work) for work in works))
    console.print("; ".join(f"{key} {value}" for key, value in about.items()), WORDS, sep="\n", highlight=False)
    if file is not None:
        file.write_text(json.dumps({"environment": about, "results": list(map(asdict, found))}, indent=1) + "\n")
    return 0


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)


def _runs(rounds: int, works: Sequence[Work]) -> Iterator[tuple[Work, str]]:
    """Interleaved, and each round starts with another server. What is not installed is named and left out."""
    names = {name for work in works for name in work.servers}
    missing = sorted(name for name in names if not (importlib.util.find_spec(name) or shutil.which(name)))
    if missing:
        print(f"left out, not installed: {', '.join(missing)}", file=sys.stderr)
    for i in range(rounds):
        for work in works:
            there = [name for name in work.servers if name not in missing]
            first = i % len(there)
            yield from ((work, name) for name in there[first:] + there[:first])


def command(work: Work, name: str) -> list[str]:
    return [sys.executable, "-m", "muxcore._cli._bench_server", name, work.name]


def measure(work: Work, name: str, cores: list[int]) -> Measured:
    """A fresh server; a tenth of the load before it counts."""
    deadline = time.monotonic() + TIMEOUT
    with _demo._server(name, command(work, name), deadline) as (process, address):
        if cores:
            process.cpu_affinity(cores)
        _wait(address, deadline)
        for blocks in (max(1, work.blocks // 10), work.blocks):
            before = process.cpu_times()
            load = run_load(address, replace(work, blocks=blocks), deadline, lambda _: None)
            after = process.cpu_times()
            if load.failures:
                raise DemoFailed(f"{name}, {work.title}: {next(iter(load.failures))}")
    cpu = after.user - before.user + after.system - before.system
    p50, p99 = (load.latencies_ns[int(share * len(load.latencies_ns))] / 1e6 for share in (0.5, 0.99))
    return Measured(work.name, name, work.total, load.seconds, 1e6 * cpu / work.total, p50, p99)


def _wait(address: Address, deadline: float) -> None:
    """Until the port is listened on: redis-server says so before it is true."""
    while True:
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def _pinned() -> Iterator[list[int]]:
    """While inside, this process keeps to the last of its cores, if it has two or more and can; yields the first."""
    if not hasattr(os, "sched_setaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        yield []
        return
    os.sched_setaffinity(0, cores[-1:])
    try:
        yield cores[:1]
    finally:
        os.sched_setaffinity(0, cores)


# --- what is shown ---------------------------------------------------------------------------------

WORDS = (
    "CPU is the processor time that the server used, its own and the kernel's for it, divided by the messages: what a "
    "core pays. Medians; ratio is to muxcore's. Messages/s and latency say less: the clients are one Python process "
    "too, often the slower one. uvloop and asyncio run a Protocol that finds lines with bytes.split, and writes once "
    "per read."
)


def environment() -> dict[str, str]:
    about = ["redis-server", "--version"]  # Redis server v=7.0.15 sha=...
    redis = subprocess.check_output(about, text=True).split()[2] if shutil.which(about[0]) else "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "muxcore": f"{_info.version()}, {core} core",
        "uvloop": _info.version("uvloop"),
        "redis-server": redis.removeprefix("v="),
    }


def _table(found: Sequence[Measured], work: Work) -> Table:
    table = Table("server", title=f"{work.title}, {CLIENTS} clients")
    for name in ("CPU \u00b5s", "min-max", "ratio", "messages/s", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    base = _middle(found, work, "muxcore", "cpu_us")
    for name in dict.fromkeys(one.server for one in found if one.work == work.name):
        cpus = [one.cpu_us for one in found if (one.work, one.server) == (work.name, name)]
        table.add_row(
            name,
            f"{median(cpus):.2f}",
            f"{min(cpus):.2f}-{max(cpus):.2f}",
            f"{median(cpus) / base:.2f}x" if base else "-",
            f"{work.total / _middle(found, work, name, 'seconds'):,.0f}",
            *(f"{_middle(found, work, name, key):.2f}" for key in ("p50_ms", "p99_ms")),
        )
    return table


def _middle(found: Sequence[Measured], work: Work, server: str, key: str) -> float:
    return float(median(getattr(one, key) for one in found if (one.work, one.server) == (work.name, server)))
