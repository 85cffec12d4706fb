"""What may live here: the program: scenarios in child processes, and what was found, with the name that replays it.

python tests/hostile/run.py --exhaustive | --random SECONDS [--seed N] | --replay NAME
    [--backend epoll|poll|select|all] [--gc] [--signals] [--framings] [--match TEXT]
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.scenario import Scenario, at_random, exhaustive

WATCHDOG = float(os.environ.get("HOSTILE_WATCHDOG", "20"))  # seconds: no scenario needs so many
MOST_SHOWN = 3  # of each symptom


# --- the child -------------------------------------------------------------------------------------


def child() -> None:
    """Play the scenarios whose names come in; say what is being played before, and what was found behind."""
    import gc

    from hostile.driver import play

    faulthandler.enable()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        name = line.strip()
        out.write(name + "\n")
        out.flush()
        faulthandler.dump_traceback_later(WATCHDOG, exit=True)
        findings, world = play(Scenario.parse(name))
        faulthandler.cancel_dump_traceback_later()
        out.write(json.dumps([findings, world.trace, world.performed, dict(world.reached)]) + "\n")
        out.flush()


# --- the parent ------------------------------------------------------------------------------------


class Child:
    """A process that plays one scenario after the other, until it dies of one. source: where muxcore is, or None."""

    def __init__(self, source: Path | None = None) -> None:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [sys.executable, __file__, "--child"]
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": str(source)} if source else None
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment
        )

    def play(self, name: str) -> tuple[list[str], list[str], int, dict[str, int]]:
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            while process.stdout.readline().strip() not in (name, ""):
                pass
            result = process.stdout.readline()
            if result:
                findings, trace, performed, reached = json.loads(result)
                return findings, trace, performed, reached
        except BrokenPipeError:
            pass
        process.wait()
        self.errors.seek(0)
        said = self.errors.read()
        return [f"the process ended with {process.returncode}: {summary(said)}"], said.splitlines()[-60:], 1, {}

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


def summary(said: str) -> str:
    """What a sanitizer or the interpreter says of a crash, in a line."""
    for mark in ("ERROR: AddressSanitizer", "runtime error:", "Fatal Python error", "Timeout"):
        for line in said.splitlines():
            if mark in line:
                behind = said.partition(line)[2]  # in front of it is what was printed of other scenarios
                where = re.findall(r"File \"[^\"]*/(\w+\.\w+)\", line (\d+)", behind)[:5]
                frames = re.findall(r"#\d+ \S+ in (\w+) [^\n]*_epoll", behind)[:3]
                return f"{line.strip()[:120]} {frames or where}"
    return said.strip()[-200:]


def kind(finding: str) -> str:
    """A finding without what differs from one scenario to the next."""
    finding = re.sub(r"^[A-Z] \([^)]*\): ", "", finding)
    if finding.startswith("the process ended"):
        return re.sub(r"0x\w+", "#", finding)[:200]
    return re.sub(r"\d[\d,. ]*", "# ", re.sub(r"\[.*|0x\w+|,\.\.\..*", "#", finding))[:100]


class Report:
    def __init__(self, verbose: bool = False, quiet: bool = False) -> None:
        self.verbose, self.quiet = verbose, quiet
        self.played = self.performed = self.failed = 0
        self.kinds: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
        self.reached: collections.Counter[str] = collections.Counter()
        self.missed: collections.Counter[str] = collections.Counter()

    def add(self, name: str, findings: list[str], trace: list[str], performed: int, reached: dict[str, int]) -> None:
        self.played += 1
        self.performed += performed > 0
        self.reached.update(reached)
        if not performed:
            self.missed[name.partition("|")[2].partition("@")[0]] += 1
        if not findings:
            return
        self.failed += 1
        for finding in findings:
            self.kinds[kind(finding)].append((name, finding))
            if not self.quiet and (len(self.kinds[kind(finding)]) <= MOST_SHOWN or self.verbose):
                print(f"FOUND {finding}\n      --replay '{name}'", flush=True)
        if self.verbose:
            print(*trace, sep="\n      ")

    def show(self) -> int:
        print(f"\n{self.played} scenarios, {self.performed} with their injection, {self.failed} with findings")
        for symptom, found in sorted(self.kinds.items(), key=lambda item: -len(item[1])):
            names = collections.Counter(re.sub(r"@\d+", "", name.partition("|")[2]) for name, _ in found)
            backends = sorted({name.partition(",")[0] for name, _ in found})
            print(f"{len(found):6} {symptom}  [{' '.join(backends)}]")
            if all("|" not in name for name in names):
                print("       " + ", ".join(f"{name}" for name, _ in names.most_common(6)))
        if self.missed:
            print("not reached: " + ", ".join(f"{point} {count}" for point, count in self.missed.most_common()))
        return 1 if self.failed else 0


def scenarios(options: Any, backends: list[str]) -> Iterator[Scenario]:
    if options.replay:
        yield Scenario.parse(options.replay)
    elif options.exhaustive:
        yield from exhaustive(backends, options.gc, options.signals, options.framings)
    elif options.seed is not None and options.random is None:
        yield at_random(options.seed, backends, bool(options.gc), options.signals)
    else:
        end = time.monotonic() + options.random
        seed = options.seed or 0
        while time.monotonic() < end:
            yield at_random(seed, backends, bool(options.gc), options.signals)
            seed += 1


def play_all(chosen: Iterable[Scenario], report: Report, source: Path | None = None) -> None:
    """Play them, in as many child processes as they end."""
    player = Child(source)
    try:
        for scenario in chosen:
            if not player.alive():
                player.end()
                player = Child(source)
            report.add(scenario.name, *player.play(scenario.name))
    finally:
        player.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--exhaustive", action="store_true", help="every point x action x core x style")
    parser.add_argument("--random", type=float, metavar="SECONDS", help="programs of several injections")
    parser.add_argument("--seed", type=int, help="the one of this number; with --random, the first")
    parser.add_argument("--replay", metavar="NAME", help="a scenario by its name")
    parser.add_argument("--backend", default="all", help="epoll, poll, select or all")
    parser.add_argument("--gc", type=int, nargs="?", const=1, default=0, help="the collector's threshold")
    parser.add_argument("--signals", action="store_true", help="in a storm of SIGALRM")
    parser.add_argument("--framings", action="store_true", help="every framing, too")
    parser.add_argument("--match", default="", help="only names with this text (a regular expression)")
    parser.add_argument("--every", type=int, default=1, help="every n-th only")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.child:
        child()
        return 0
    if not (options.exhaustive or options.replay or options.random is not None or options.seed is not None):
        parser.error("say --exhaustive, --random SECONDS, --seed N or --replay NAME")
    from muxcore._impl import BACKENDS

    backends = [name for name in BACKENDS if options.backend in ("all", name)]
    report = Report(options.verbose or bool(options.replay))
    chosen = (
        scenario
        for number, scenario in enumerate(scenarios(options, backends))
        if number // len(backends) % options.every == 0 and re.search(options.match, scenario.name)
    )
    try:
        play_all(chosen, report)
    except KeyboardInterrupt:
        pass
    return report.show()


if __name__ == "__main__":
    sys.exit(main())
