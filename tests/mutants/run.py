"""What may live here: the program: it builds the mutants, finds out which tests come by each, and runs those; and the
plugin of pytest that does so in its processes. See README.md.

python tests/mutants/run.py [FILE ...] [--seconds N] [--jobs N] [--seed N] [--budget N] [--match TEXT] [--again]
    [--list] [--report]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import pytest
from mutants.mutate import COMPILED_SWITCH, PYTHON_SWITCH, SOURCE, Mutant, Register, mutate_cython, mutate_python

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "mutants"
VERDICTS = HERE / "survivors.txt"
ACTIVATE = """

from ._switch cimport activate

def activate_mutant(int number):
    activate(number)
"""
# A mutant in one of these is one of a program, or of text, or of what only another build does.
LEFT_OUT = ("__init__.py", "__main__.py", "_typing.py", "_cli", "check.pxi", "_switch.pxd", "_mutant.py")
# Tests of other things, and those that look at sources, memory or sizes, or are too slow to be run for each mutant.
NOT_RUN = (
    "bench", "check", "cli", "demo", "docs", "faults", "fuzz", "house", "hostile_code", "package", "peers",
    "readme",
    "mutants", "soak", "tutorial",
)
# Where a mutant of any room may be found.
OF_ALL = ("cores", "model", "soundness", "hostile", "connection", "messages", "timeouts", "mux")
SLOW = 5.0      # seconds: a test of more is not run
PATIENCE = 3.0  # a test that runs so many times as long, and GRACE seconds more, hangs
GRACE = 2.5


# --- what there is ---------------------------------------------------------------------------------


def build() -> list[Mutant]:
    """The mutants, and in build/mutants the package with all of them, made anew if sources or the tool have changed."""
    texts, register = {}, Register()
    for path in sorted(SOURCE.rglob("*.p[yx]*")):
        name = str(path.relative_to(SOURCE))
        if path.suffix not in (".py", ".pyx", ".pxi", ".pxd"):
            continue
        if path.name in LEFT_OUT or path.parent.name in LEFT_OUT:
            texts[name] = path.read_text()
        else:
            texts[name] = (mutate_python if path.suffix == ".py" else mutate_cython)(path, register)
    texts["_switch.pxd"] = COMPILED_SWITCH
    texts["_mutant.py"] = PYTHON_SWITCH
    texts["_epoll.pyx"] += ACTIVATE
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
    mark = BUILD / "digest"
    if not mark.exists() or mark.read_text() != digest:
        shutil.rmtree(BUILD, ignore_errors=True)
        (BUILD / "src").mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, BUILD)
        for name, text in texts.items():
            (BUILD / "src" / "muxcore" / name).parent.mkdir(exist_ok=True)
            (BUILD / "src" / "muxcore" / name).write_text(text)
        if sys.platform == "linux":
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            with (BUILD / "build.log").open("w") as log:
                done = subprocess.run(command, cwd=BUILD, stdout=log, stderr=subprocess.STDOUT)
            if done.returncode:
                raise SystemExit(f"the mutants do not compile: see {BUILD / 'build.log'}")
        mark.write_text(digest)
    return register.mutants


def tests_of(mutants: Iterable[Mutant]) -> list[str]:
    """The test files that may find them, those of their rooms first."""
    from test_house import TESTS, name_of

    names: list[str] = []
    for file in {mutant.file for mutant in mutants}:
        names += TESTS[name_of(SOURCE / file)].split()
    found = dict.fromkeys([*names, *OF_ALL])
    return [f"tests/test_{name}.py" for name in found if name not in NOT_RUN]


class Earlier(NamedTuple):
    """The results of earlier runs. Of a test: the digest of its file, its seconds, and the mutants that it reached."""

    tests: dict[str, dict[str, Any]]
    results: dict[str, dict[str, Any]]


def earlier() -> Earlier:
    def lines(name: str) -> dict[str, dict[str, Any]]:
        path = BUILD / name
        entries = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        return {entry["name"]: entry for entry in entries}

    return Earlier(lines("tests.jsonl"), lines("results.jsonl"))


def verdicts() -> dict[str, str]:
    """By mutant: its verdict in survivors.txt, if it has one."""
    found = {}
    for line in VERDICTS.read_text().splitlines() if VERDICTS.exists() else []:
        if line.strip() and not line.startswith("#"):
            key, _, verdict = line.partition("  -- ")
            if not verdict.startswith("open"):
                found[key.strip()] = verdict.strip()
    return found


def keep(name: str, entry: dict[str, Any]) -> None:
    """One write, so lines of several processes do not mix."""
    fd = os.open(BUILD / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, (json.dumps(entry) + "\n").encode())
    os.close(fd)


# --- in a process of pytest ------------------------------------------------------------------------


class Outcome(NamedTuple):
    failed: str     # the test; empty if all passed
    how: str
    seconds: float


def play(session: pytest.Session, items: list[pytest.Item], number: int, limits: list[float]) -> Outcome:
    """Run tests in a child process, up to the first that fails or exceeds its time limit."""
    came, went = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(came)
        run_items(session, items, number, went)
    os.close(went)
    at, begun, how = 0, time.monotonic(), "hangs"
    started = begun
    while select.select([came], [], [], max(0.0, started + limits[min(at, len(items) - 1)] - time.monotonic()))[0]:
        word = os.read(came, 1)
        if word != b".":
            how = {b"F": "fails", b"P": "", b"": "crashes"}[word]
            break
        at, started = at + 1, time.monotonic()
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(pid, 0)
    os.close(came)
    return Outcome(items[min(at, len(items) - 1)].nodeid if how else "", how, time.monotonic() - begun)


def run_items(session: pytest.Session, items: list[pytest.Item], number: int, out: int) -> None:
    """In the child: one byte per test that has passed, then P, or F."""
    from muxcore import _mutant

    code = b"F"
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        os.close(nothing)
        _mutant.activate(number)
        if "muxcore._epoll" in sys.modules:
            sys.modules["muxcore._epoll"].activate_mutant(number)
        for item in items:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if session.testsfailed:
                break
            os.write(out, b".")
        else:
            code = b"P"
    finally:
        os.write(out, code)
        os._exit(0)


class Plugin:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.mutants = [Mutant(*mutant) for mutant in job["mutants"]]
        self.end = time.monotonic() + job["seconds"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if self.job["measure"]:
            self.measure(session)
        else:
            self.hunt(session)
        return True

    def measure(self, session: pytest.Session) -> None:
        """Each test on its own, without a mutant: its seconds, and the mutants that it reaches."""
        tests, digests = earlier().tests, {path: digest_of(path) for path in {item.path for item in session.items}}
        mine = [item for item in session.items if tests.get(item.nodeid, {}).get("digest") != digests[item.path]]
        with Path(os.environ["MUTANTS_REACHED"]).open("r+b") as file, mmap.mmap(file.fileno(), 0) as reached:
            for item in mine[self.job["part"] :: self.job["parts"]]:
                reached[:] = bytes(len(reached))
                outcome = play(session, [item], 0, [2 * SLOW])
                hit = [match.start() for match in re.finditer(b"\1", reached[:])]
                keep("tests.jsonl", {"name": item.nodeid, "digest": digests[item.path], "reached": hit,
                                     "seconds": round(outcome.seconds, 3), "how": outcome.how})

    def hunt(self, session: pytest.Session) -> None:
        items = {item.nodeid: item for item in session.items}
        tests = {name: test for name, test in earlier().tests.items()
                 if name in items and not test["how"] and test["seconds"] < SLOW}
        by_mutant: dict[int, list[str]] = {}
        for name, test in tests.items():
            for number in test["reached"]:
                by_mutant.setdefault(number, []).append(name)
        for mutant in self.mutants:
            if time.monotonic() > self.end:
                return
            names = self.chosen(by_mutant.get(mutant.number, []), tests, mutant)
            entry: dict[str, Any] = {"name": mutant.key, "line": mutant.line, "tests": len(names)}
            if not names:
                keep("results.jsonl", {**entry, "how": "never run"})
                continue
            limits = [PATIENCE * tests[name]["seconds"] + GRACE for name in names]
            outcome = play(session, [items[name] for name in names], mutant.number, limits)
            keep("results.jsonl", {**entry, "how": outcome.how or "survives", "test": outcome.failed,
                                   "seconds": round(outcome.seconds, 2)})

    def chosen(self, names: list[str], tests: dict[str, dict[str, Any]], mutant: Mutant) -> list[str]:
        """One of each parametrized test first, then quick ones and those of its room, up to the budget; select is what
        poll is."""
        rooms = tests_of([mutant])
        twins = {name for name in names if "select" in name and name.replace("select", "poll") in names}
        times: Counter[str] = Counter()
        cost: dict[str, tuple[int, float]] = {}
        for name in sorted(set(names) - twins, key=lambda name: (tests[name]["seconds"], name)):
            function = name.partition("[")[0]
            times[function] += 1
            far = name.partition("::")[0] not in rooms
            cost[name] = (times[function], tests[name]["seconds"] * (4 if far else 1))
        found, spent = [], 0.0
        for name in sorted(cost, key=cost.__getitem__):
            spent += tests[name]["seconds"]
            if found and spent > self.job["budget"]:
                break
            found.append(name)
        return found


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def pytest_configure(config: pytest.Config) -> None:
    job = json.loads(Path(os.environ["MUTANTS_JOB"]).read_text())
    config.pluginmanager.register(Plugin(job), "mutants")


# --- the parent ------------------------------------------------------------------------------------


def run(mutants: list[Mutant], options: argparse.Namespace, measure: bool, seconds: float, most: int) -> None:
    """Processes of pytest, each with its part; they end with this one."""
    children = []
    for part in range(options.jobs):
        reached = BUILD / f"reached-{part}"
        reached.write_bytes(bytes(most + 1))
        job = {"measure": measure, "part": part, "parts": options.jobs, "seconds": seconds, "budget": options.budget,
               "mutants": mutants[part :: options.jobs]}
        (BUILD / f"job-{part}.json").write_text(json.dumps(job))
        environment = {
            **os.environ, "PYTHONPATH": f"{BUILD / 'src'}:{HERE.parent}", "PYTHONDONTWRITEBYTECODE": "1",
            "MUTANTS_REACHED": str(reached), "MUTANTS_JOB": str(BUILD / f"job-{part}.json"), "MUTANT": "0",
        }
        command = [sys.executable, "-m", "pytest", "-p", "mutants.run", "-p", "no:cacheprovider", "-q", "--capture=sys",
                   "-o", "timeout=0", "-o", f"pythonpath={BUILD / 'src'} {HERE.parent}", *tests_of(mutants)]
        children.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
    codes = [child.wait() for child in children]
    if any(code not in (0, 5) for code in codes):
        raise SystemExit(f"pytest ended with {codes}")


def spread(mutants: list[Mutant], seed: int) -> list[Mutant]:
    """At random, but the files in turn."""
    by_file: dict[str, list[Mutant]] = {}
    shuffled = mutants[:]
    random.Random(seed).shuffle(shuffled)
    for mutant in shuffled:
        by_file.setdefault(mutant.file, []).append(mutant)
    places = {mutant: (i + 0.5) / len(group) for group in by_file.values() for i, mutant in enumerate(group)}
    return sorted(mutants, key=lambda mutant: places[mutant])


def report(mutants: list[Mutant], everything: bool) -> None:
    results, said = earlier().results, verdicts()
    counts: dict[str, Counter[str]] = {}
    open_ones = []
    for mutant in mutants:
        how = results.get(mutant.key, {}).get("how", "not run")
        if how in ("survives", "never run") and mutant.key in said:
            how = "judged"
        elif how in ("survives", "never run"):
            open_ones.append((mutant, how))
        counts.setdefault(mutant.file, Counter())[how] += 1
    columns = ("fails", "crashes", "hangs", "survives", "never run", "judged", "not run")
    print(f"{'':20}" + "".join(f"{column:>10}" for column in columns))
    total: Counter[str] = sum(counts.values(), Counter())
    for file, count in [*sorted(counts.items()), ("all", total)]:
        print(f"{file:20}" + "".join(f"{count[column]:10}" for column in columns))
    for mutant, how in open_ones if everything else []:
        print(f"{mutant.key}  -- {how}, line {mutant.line}")
    gone = said.keys() - {mutant.key for mutant in mutants}
    if gone and everything:
        print("no mutants any more:", *sorted(gone), sep="\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutants of both cores, and the tests that find them.")
    parser.add_argument("files", nargs="*", help="such as _core/outbox.pxi; default: all")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to hunt (600)")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of tests per mutant at most (10)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--seed", type=int, default=1, help="of the order (1)")
    parser.add_argument("--match", default="", help="only mutants with this in their names")
    parser.add_argument("--again", action="store_true", help="survivors once more, and no others")
    parser.add_argument("--list", action="store_true", help="name the mutants, and run nothing")
    parser.add_argument("--report", action="store_true", help="name the survivors, and run nothing")
    options = parser.parse_args()
    everything = build()
    mutants = [mutant for mutant in everything
               if (not options.files or mutant.file in options.files) and options.match in mutant.key]
    if not mutants:
        raise SystemExit("there is no such mutant")
    if options.list:
        print(*(mutant.key for mutant in mutants), sep="\n")
        return
    if not options.report:
        run(mutants, options, True, 0.0, everything[-1].number)
        results, said = earlier().results, verdicts()
        survivors = {key for key, result in results.items() if result["how"] in ("survives", "never run")}
        left = [mutant for mutant in mutants if mutant.key not in said
                and (mutant.key in survivors if options.again else mutant.key not in results)]
        run(spread(left, options.seed), options, False, options.seconds, everything[-1].number)
    report(mutants, True)


if __name__ == "__main__":
    main()
