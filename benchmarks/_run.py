"""What may live here: what every benchmark needs, once: compile the C programs, start a server on one core and the load
on another, run rounds interleaved, and write tables. Nothing about what a particular benchmark measures.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent
START_TIMEOUT = 60.0  # seconds; Python under valgrind takes several to start
STOP_TIMEOUT = 60.0
LOAD_TIMEOUT = 120.0
TRIES = 4
QUIET = 0.03  # of the time
WARMUP = 0.1
CFLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra")

Result = dict[str, Any]
Option = float | bool | str
Key = TypeVar("Key")
State = TypeVar("State")


class BenchError(Exception):
    """A benchmark cannot go on; the message is for the user."""


# --- programs --------------------------------------------------------------------------------------


def pkg_config(library: str, *what: str) -> str | None:
    """What pkg-config says of it; None if it, or the library, is not installed."""
    try:
        return subprocess.run(["pkg-config", *what, library], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def compiled(name: str, library: str | None = None) -> Path:
    """The path of a program made from c/NAME.c, compiled if it is older than its source, or any header."""
    source, target = HERE / "c" / f"{name}.c", HERE / "bin" / name
    newest = max(path.stat().st_mtime for path in (source, *source.parent.glob("*.h")))
    if not target.exists() or target.stat().st_mtime < newest:
        target.parent.mkdir(exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        linked = (pkg_config(library, "--cflags", "--libs") or "").split() if library else []
        try:
            subprocess.run([compiler, *CFLAGS, "-o", target, source, *linked], check=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            raise BenchError(f"a C compiler is needed: {error}") from None
    return target


@dataclass(frozen=True)
class Server:
    """A server to compare: its name on command lines and in tables, and a Python file in peers/ or a C file in c/."""

    name: str
    title: str
    file: str
    arguments: tuple[str, ...] = ()
    needs: str | None = None  # packages or programs that may be absent, "x and y"; of a C file, a library
    frame: str | None = None  # what it echoes: chunks as they come, or "lines", or messages with their "length"

    def command(self) -> list[str]:
        if self.file.endswith(".c"):
            return [str(compiled(self.file.removesuffix(".c"), self.needs)), *self.arguments]
        if self.file == "muxcore_native.py":  # compiled before it is measured
            subprocess.run([sys.executable, str(HERE / "peers" / self.file), "--build"], check=True, timeout=120)
        return [sys.executable, str(HERE / "peers" / self.file), *self.arguments]

    def available(self) -> bool:
        if self.needs is None:
            return True
        if self.file.endswith(".c"):
            return pkg_config(self.needs, "--exists") is not None
        return all(importlib.util.find_spec(name) or shutil.which(name) for name in self.needs.split(" and "))


def by_name(*servers: Server) -> dict[str, Server]:
    return {server.name: server for server in servers}


SERVERS = by_name(
    Server("c", "C epoll", "echo_epoll.c"),
    Server("callback", "muxcore callback", "muxcore_callback.py"),
    Server("native", "muxcore native", "muxcore_native.py", needs="Cython"),
    Server("pull", "muxcore pull", "muxcore_pull.py"),
    Server("uvloop", "uvloop Protocol", "uvloop_protocol.py", needs="uvloop"),
    Server("asyncio", "asyncio Protocol", "asyncio_protocol.py"),
    Server("select", "select.epoll loop", "select_epoll.py"),
)


# --- processes -------------------------------------------------------------------------------------


def pin_to(index: int) -> Callable[[], None]:
    """For preexec_fn: move to the index-th core that we may use; with too few cores, go anywhere."""
    cores = sorted(os.sched_getaffinity(0))
    chosen = {cores[index]} if len(cores) > index else set(cores)
    return lambda: os.sched_setaffinity(0, chosen)


def read_line(process: subprocess.Popen[str], timeout: float) -> str:
    """The next line of its stdout; BenchError if it ends or takes too long."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], timeout)[0]:
        raise BenchError(f"no output in {timeout:.0f} s from {process.args!r}")
    line = process.stdout.readline()
    if not line.endswith("\n"):
        raise BenchError(f"ended early with {process.wait(STOP_TIMEOUT)}: {process.args!r}")
    return line.strip()


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """While inside it runs; afterwards it is gone, by SIGTERM if that is enough."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    pid: int
    port: int


@contextmanager
def started(server: Server, prefix: Sequence[str] = ()) -> Iterator[Running]:
    """While inside, `server` runs on the first core; `prefix` goes before its command."""
    process = subprocess.Popen(
        [*prefix, *server.command()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        preexec_fn=pin_to(0),
    )
    with ended(process):
        word, port = read_line(process, START_TIMEOUT).split()
        assert word == "listening"
        yield Running(process.pid, int(port))


def connection(port: int) -> socket.socket:
    """To a server that may not listen yet."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=START_TIMEOUT)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise BenchError(f"no server listens on port {port}") from None
            time.sleep(0.01)


@contextmanager
def serving(server: Server, prefix: Sequence[str] = ()) -> Iterator[Running]:
    """While inside, an echo server runs that has seen connections come and go.

    That matters: as long as none has ended, each recv(256 KiB) of asyncio's is an mmap, page faults and a munmap, and a
    message costs four times what it costs afterwards. The first recv that meets an end of file frees its buffer whole;
    glibc takes that as a hint, and keeps such buffers on the heap from then on.
    """
    with started(server, prefix) as running:
        load(server, running, connections=10, messages=100, patience=START_TIMEOUT)
        yield running


@contextmanager
def loading(running: Running, program: str = "load", /, **options: Option) -> Iterator[subprocess.Popen[str]]:
    """While inside, a load generator runs against it on the second core, with these command line options."""
    command = [str(compiled(program)), "127.0.0.1", str(running.port), f"--watch={running.pid}"]
    given = {name: value for name, value in options.items() if value is not False}
    command += [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    pipe = subprocess.PIPE
    with ended(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, preexec_fn=pin_to(1))) as process:
        yield process


@contextmanager
def all_serving(servers: Sequence[Server]) -> Iterator[dict[str, Running]]:
    """While inside, all of them run; one without load sleeps."""
    with ExitStack() as stack:
        yield {server.name: stack.enter_context(serving(server)) for server in servers}


def load(server: Server, running: Running, program: str = "load", /, **options: Option) -> Result:
    """Run the load to its end: what it reports. BenchError if a byte was lost or wrong."""
    if server.frame is not None:
        options["frame"] = server.frame
    with loading(running, program, **options) as process:
        result: Result = json.loads(read_line(process, LOAD_TIMEOUT))
        if process.wait(STOP_TIMEOUT) != 0:
            raise BenchError(f"{server.title}: lost {result['lost_bytes']} bytes, {result['errors']} errors: {result}")
    return result


@dataclass(frozen=True)
class Usage:
    """What all threads of a process have used of a core; and how long they were ready to run, but had to wait."""

    cpu_s: float
    waited_s: float


def usage(pid: int) -> Usage:
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    threads = [[int(word) / 1e9 for word in file.read_text().split()] for file in files]
    return Usage(sum(thread[0] for thread in threads), sum(thread[1] for thread in threads))


# --- rounds ----------------------------------------------------------------------------------------


def disturbance(result: Result) -> float:
    """The share of the time in which server or load was ready to run but another process had its core."""
    return float(max(result["server_waited_s"], result["load_waited_s"])) / float(result["seconds"])


def undisturbed(measure: Callable[[], Result]) -> Result:
    """Measure; again, a few times, if other processes used the cores meanwhile. The least disturbed result.

    That chooses by what others did, not by the figure itself, so it favours no server.
    """
    results = []
    for _ in range(TRIES):
        results.append(measure())
        if disturbance(results[-1]) < QUIET:
            break
    return min(results, key=disturbance)


_shown: list[Progress] = []  # none, or the one on the terminal


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on the terminal, if it is one: those that are shown already, or new ones while inside."""
    if _shown:
        yield _shown[0]
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bars:
        _shown.append(bars)
        try:
            yield bars
        finally:
            _shown.clear()


def rounds(
    keys: Sequence[Key], count: int, measure: Callable[[Key], Result], label: str = "round"
) -> dict[Key, list[Result]]:
    """Measure every key once per round, `count` times; each round starts with another one (A B C, B C A, ...)."""
    results: dict[Key, list[Result]] = {key: [] for key in keys}
    with progress() as bars:
        task = bars.add_task("", total=count * len(keys))
        for i in range(count):
            first = i % len(keys)
            for key in (*keys[first:], *keys[:first]):
                bars.update(task, description=f"{label} {i + 1} of {count}: {key}")
                results[key].append(measure(key))
                bars.advance(task)
        bars.remove_task(task)
    return results


def fresh_rounds(
    keys: Sequence[Key],
    count: int,
    slices: int,
    start: Callable[[], AbstractContextManager[State]],
    measure: Callable[[State, Key], Result],
) -> dict[Key, list[Result]]:
    """In each of `count` rounds, start everything afresh, and measure every key in `slices` short slices, in turn: how
    fast the machine is changes within seconds, so what is to be compared must be measured within a second or two."""
    results: dict[Key, list[Result]] = {key: [] for key in keys}
    for i in range(count):
        with start() as state:
            found = rounds(keys, slices, partial(measure, state), f"round {i + 1} of {count}, slice")
        for key in keys:
            results[key] += found[key]
    return results


def echo_rounds(
    servers: Sequence[Server], count: int, slices: int, program: str = "load", /, **options: Option
) -> dict[str, list[Result]]:
    """Fresh servers in each of `count` rounds get this load in turn; `seconds` is for all slices of a round."""
    servers_by_name = by_name(*servers)
    options |= {"seconds": float(options["seconds"]) / slices, "warmup": WARMUP}

    def measure(running: dict[str, Running], name: str) -> Result:
        return undisturbed(lambda: load(servers_by_name[name], running[name], program, **options))

    return fresh_rounds(list(servers_by_name), count, slices, lambda: all_serving(servers), measure)


def cpu_us(result: Result) -> float:
    """Server CPU time per message, in microseconds."""
    return 1e6 * float(result["server_cpu_s"]) / int(result["messages"])


def split(results: Sequence[Result]) -> tuple[float, float]:
    """The server's CPU time per message in user and in system mode, in microseconds. The kernel samples the two by
    ticks, so all rounds are added up before they are set in proportion."""
    user = sum(result["server_user_s"] for result in results)
    system = sum(result["server_system_s"] for result in results)
    share = user / (user + system) if user + system else 0.0
    total = median(map(cpu_us, results))
    return total * share, total * (1 - share)


def ratio(results: Sequence[Result], base: Sequence[Result] | None, value: Callable[[Result], float]) -> float | None:
    """The median over rounds of value(result) / value(base of the same round); None without a base."""
    if not base:
        return None
    return median(value(a) / value(b) for a, b in zip(results, base, strict=True))


def middle(results: Sequence[Result], key: str) -> float:
    return median(float(result[key]) for result in results)


def spread(results: Sequence[Result]) -> str:
    values = [cpu_us(result) for result in results]
    return f"{min(values):.2f}-{max(values):.2f}"


def disturbed(results: Sequence[Result]) -> str:
    return f"{100 * median(map(disturbance, results)):.0f}%"


# --- tables ----------------------------------------------------------------------------------------


@dataclass
class Table:
    """A markdown table with a paragraph above it."""

    text: str
    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        lines = [self._line(row, widths) for row in (self.header, rule, *self.rows)]
        return "\n".join([self.text, "", *lines])

    @staticmethod
    def _line(row: Sequence[str], widths: Sequence[int]) -> str:
        cells = (f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row))
        return f"| {' | '.join(cells)} |"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


@dataclass(frozen=True)
class Goal:
    """A bound for a ratio, and one that would be better still: at most, or with `at_least` at least."""

    text: str
    seen: float | None
    bound: float | None
    stretch: float | None = None
    at_least: bool = False

    def verdict(self, bound: float | None) -> tuple[str, str]:
        """The bound, and whether it held."""
        if bound is None:
            return "-", "-"
        text = f"{'>=' if self.at_least else '<='} {bound:g}x"
        if self.seen is None:
            return text, "-"
        held = self.seen >= bound if self.at_least else self.seen <= bound
        return text, "yes" if held else "no"


def goals_table(goals: Sequence[Goal]) -> Table:
    table = Table("Goals:", ("", "seen", "goal", "reached", "stretch goal", "reached"))
    for goal in goals:
        table.rows.append((goal.text, times(goal.seen), *goal.verdict(goal.bound), *goal.verdict(goal.stretch)))
    return table


def environment() -> dict[str, str]:
    """What a number means little without."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "uvloop": package_version("uvloop"),
        "muxcore": package_version("muxcore"),
    }


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def columns(results: Sequence[Result]) -> dict[str, list[Any]]:
    """The same by key, which is smaller as JSON: {"seconds": [1.0, 1.1], ...}."""
    return {key: [result[key] for result in results] for key in results[0]} if results else {}


def report(
    name: str, title: str, tables: Sequence[Table], raw: object, keep: bool, versions: dict[str, str] | None = None
) -> None:
    """Print the tables; unless `keep`, write them to results/NAME.md, and every single result to results/NAME.json."""
    about = environment() | (versions or {})
    line = "; ".join(f"{key} {value}" for key, value in about.items())
    body = "\n\n".join(table.markdown() for table in tables)
    text = f"# {title}\n\n{line}\n\n{body}\n"
    print(text, end="")
    if keep:
        return
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps({"environment": about, "results": raw}) + "\n")


# --- pictures --------------------------------------------------------------------------------------

INK = "#808488"  # readable on white and on black


def pyplot(path: Path) -> Any:
    """matplotlib.pyplot for an SVG in that ink; None if it is not installed, and that is said."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name}: left out, matplotlib is not installed", file=sys.stderr)
        return None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "muxcore", "font.size": 11, **ink}
    plt.rcParams.update(settings)
    return plt


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


# --- command lines ---------------------------------------------------------------------------------


def parser(description: str | None, servers: Sequence[str], round_count: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = f"of: {', '.join(servers)}"
    result.add_argument("--only", nargs="+", choices=servers, default=list(servers), metavar="NAME", help=which)
    result.add_argument("--rounds", type=int, default=round_count, help="default: %(default)s")
    result.add_argument("--keep", action="store_true", help="print the tables, but leave results/ as it is")
    return result


def chosen(names: Sequence[str], servers_by_name: dict[str, Server] = SERVERS) -> list[Server]:
    """The servers of these names; one whose package is absent is left out, and that is said."""
    servers = [servers_by_name[name] for name in names]
    for server in servers:
        if not server.available():
            print(f"{server.title}: left out, {server.needs} is not installed", file=sys.stderr)
    return [server for server in servers if server.available()]


def run(main: Callable[[], None]) -> NoReturn:
    """main() as a program: a BenchError is one line on stderr and exit code 1."""
    try:
        main()
    except BenchError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    sys.exit(0)
