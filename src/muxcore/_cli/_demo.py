"""What may live here: `python -m muxcore demo`: two servers, one after the other under the same load, and the table."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ._demo_load import Address, Mix, Result, idle_connections, run_load

IDLE = 1000
MIX = Mix(chatty=850, messages=240, bulk=50, bulk_mib=2, slow=50, slow_mib=1, reset=50)
WARM = 100  # connections before the memory of further ones is measured: what a server allocates once is not theirs
DESCRIPTORS = 2048  # what each of the processes may need
BUDGET = 56.0  # seconds for everything, half of them for each server at most
STOP_TIMEOUT = 2.0
SERVERS = {
    "muxcore": [sys.executable, "-m", "muxcore", "echo", "--port", "0"],
    "asyncio": [sys.executable, str(Path(__file__).with_name("_demo_asyncio.py"))],
}


class DemoFailed(Exception):
    """The demo cannot go on; the text is the one line for the user."""


@dataclass(frozen=True, slots=True)
class Column:
    """What was measured on one server."""

    idle_bytes: float
    """Memory per idle connection."""
    load: Result
    user: float
    """CPU seconds of the server process itself, under the load."""
    system: float
    """CPU seconds of the kernel on its behalf."""

    def user_us(self) -> float:
        return 1e6 * self.user / max(1, self.load.messages)

    def cpu_us(self) -> float:
        return 1e6 * (self.user + self.system) / max(1, self.load.messages)


def run(mix: Mix = MIX, idle: int = IDLE) -> int:
    """Measure both servers, print the table; returns the exit code: 1 if muxcore lost a byte or left one waiting."""
    started = time.monotonic()
    console = Console()
    columns: dict[str, Column] = {}
    try:
        _allow_descriptors()
        with _signals_interrupt(), Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress:
            for share, (name, command) in enumerate(SERVERS.items(), 1):
                deadline = started + BUDGET * share / len(SERVERS) - STOP_TIMEOUT
                columns[name] = measure(name, command, mix, idle, deadline, progress)
    except DemoFailed as error:
        print(f"muxcore demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("muxcore demo: interrupted; both servers are stopped", file=sys.stderr)
        return 1
    console.print(_table(columns, mix, idle))
    console.print(_words(columns["muxcore"], columns["asyncio"], mix), highlight=False)
    console.print(f"The whole demo took {time.monotonic() - started:.0f} seconds.")
    return _verdict(columns)


def measure(name: str, command: Sequence[str], mix: Mix, idle: int, deadline: float, progress: Progress) -> Column:
    """Start a server, measure its memory with idle connections, put the load on it, and check that it ends well."""
    with _server(name, command, deadline) as (process, address):
        task = _announce(progress, f"{name}: {idle:,} idle connections")
        idle_bytes = _idle_bytes(process, address, idle, deadline)
        progress.update(task, completed=100)
        task = _announce(progress, f"{name}: {mix.connections:,} busy connections")
        before = process.cpu_times()
        load = run_load(address, mix, deadline, lambda done: progress.update(task, completed=100 * done))
        after = process.cpu_times()
        progress.update(task, completed=100)
    return Column(idle_bytes, load, after.user - before.user, after.system - before.system)


def _announce(progress: Progress, text: str) -> TaskID:
    if progress.disable:
        progress.console.print(f"{text} ...", highlight=False)
    return progress.add_task(text, total=100)


def _idle_bytes(process: psutil.Process, address: Address, count: int, deadline: float) -> float:
    # The unique set size is exact; RSS counters lag behind by up to some hundred KiB on recent kernels.
    with idle_connections(address, WARM, deadline):
        before = process.memory_full_info().uss
        with idle_connections(address, count, deadline):
            return float(process.memory_full_info().uss - before) / count


# --- processes -------------------------------------------------------------------------------------


def _allow_descriptors() -> None:
    """Raise the soft limit on open files where needed; the servers inherit it."""
    try:
        import resource
    except ImportError:
        raise DemoFailed("it needs a Unix system") from None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
        if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
            raise DemoFailed(f"it needs {DESCRIPTORS} open files, and the hard limit is {hard}: see ulimit -Hn")
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """While inside, SIGTERM is like Ctrl-C, so that the servers are stopped on this way out too."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _server(name: str, command: Sequence[str], deadline: float) -> Iterator[tuple[psutil.Process, Address]]:
    """A server process that listens; it is gone afterwards, whatever happens. DemoFailed if it failed in any way."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, bufsize=0) as child,
    ):
        problem: Exception | None = None
        try:
            try:
                yield psutil.Process(child.pid), _address(child, deadline)
            except (OSError, psutil.Error) as error:
                problem = error
            child.terminate()  # no effect on one that has ended already, whose exit code says why
            code = child.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the {name} server did not end within {STOP_TIMEOUT:.0f} seconds of SIGTERM") from problem
        finally:
            child.kill()
        if code or problem:
            reason = f"ended with code {code}" if code else f"failed: {problem}"
            raise DemoFailed(f"the {name} server {reason}{_last_line(errors)}") from problem


def _address(child: subprocess.Popen[bytes], deadline: float) -> Address:
    """Where the server says that it listens."""
    assert child.stdout is not None
    poll = select.poll()
    poll.register(child.stdout)
    line = b""
    if poll.poll(1000 * max(0.0, deadline - time.monotonic())):
        line = child.stdout.readline()
    if not line.startswith(b"listening on "):
        raise ConnectionError("it did not say where it listens")
    host, _, port = line.split()[-1].decode().rpartition(":")
    return host, int(port)


def _last_line(errors: IO[bytes]) -> str:
    """What a server said last on its stderr, to be put behind a message."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    return next((f": {line}" for line in reversed(lines) if line.strip()), "")


# --- what is shown ---------------------------------------------------------------------------------


def _table(columns: dict[str, Column], mix: Mix, idle: int) -> Table:
    table = Table(title="Two echo servers, one thread each, under the same load")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")

    def row(label: str, shown: Callable[[Column], str]) -> None:
        table.add_row(label, *map(shown, columns.values()))

    row("connections at once", lambda _: f"{mix.connections:,}")
    row("  of them reset in mid-flight", lambda column: f"{column.load.resets:,}")
    row("messages", lambda column: f"{column.load.messages:,}")
    row("MB sent, echoed and verified", lambda column: f"{column.load.verified / 1e6:,.0f}")
    row("seconds", lambda column: f"{column.load.seconds:.1f}")
    row("messages/s", lambda column: f"{column.load.messages / column.load.seconds:,.0f}")
    for share in (50, 99, 99.9):
        row(f"latency p{share}, ms", partial(_latency, share))
    row("server CPU per message, \u00b5s", lambda column: f"{column.cpu_us():.1f}")
    row("  of that in user space", lambda column: f"{column.user_us():.1f}")
    row(f"memory per idle connection ({idle:,}), bytes", lambda column: f"{column.idle_bytes:,.0f}")
    row("bytes lost", lambda column: f"{column.load.lost:,}")
    return table


def _latency(percent: float, column: Column) -> str:
    latencies = column.load.latencies_ns
    return f"{latencies[int(percent / 100 * len(latencies))] / 1e6:.1f}" if latencies else "-"


def _words(ours: Column, theirs: Column, mix: Mix) -> str:
    return (
        f"Server CPU per message is the processor time that the server used under the load, its own (user space) and "
        f"the kernel's for it, divided by the messages; a message is one of 64 to 1024 bytes, or one MiB of a bulk "
        f"sender or slow reader. It is what a core pays: {ours.cpu_us():.1f} \u00b5s with muxcore, "
        f"{theirs.cpu_us():.1f} with asyncio. The kernel's part is the price of the sockets; the part in user space is "
        f"what a library can save. Messages/s and latency say less: the clients are one Python process too, and "
        f"{mix.chatty:,} of them wait for each reply."
    )


def _verdict(columns: dict[str, Column]) -> int:
    """Say what went wrong, if anything did; returns the exit code, for which only muxcore counts."""
    for name, column in columns.items():
        for reason, count in column.load.failures.items():
            print(f"muxcore demo: {name}: {count} connections failed: {reason}", file=sys.stderr)
        if column.load.lost:
            print(f"muxcore demo: {name} lost {column.load.lost:,} bytes", file=sys.stderr)
        if column.load.late:
            late = f"{column.load.late:,} bytes were still on their way"
            print(f"muxcore demo: {name}: {late}: is this machine busy with other work?", file=sys.stderr)
    return 1 if columns["muxcore"].load.failures else 0
