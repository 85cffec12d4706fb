"""What may live here: the program that checks whether the harness finds each known fault again: it removes one fix at
a time from today's source, and plays the scenarios that have to notice.

python tests/hostile/without.py [NAME ...]: patches of tests/hostile/without; all if none is named

The first lines of a patch, up to the first that begins with "---", say what is missing (`kind:`) and which scenarios
find it (`find:`, one a line, each of them has to; `3.11 find:` where CPython itself must be 3.11). `B` as a backend is
each of the three.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile.run import Report, play_all
from hostile.scenario import Scenario

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "without"
VERSION = ".".join(map(str, sys.version_info[:2]))
BACKENDS = ("epoll", "poll", "select")
TIMES = 5  # that a scenario is played until it finds something: when the collector comes is not all in its name
COMPILED = re.compile(r"^\+\+\+ .*\.(pyx|pxi|pxd)$", re.MULTILINE)


class Patch(NamedTuple):
    path: Path
    kind: str
    names: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Patch:
        kind = ""
        names: list[str] = []
        for line in path.read_text().partition("\n---")[0].splitlines():
            key, _, value = line.partition(": ")
            if key == "kind":
                kind = value
            elif key in ("find", f"{VERSION} find"):
                names += [value.replace("B,", backend + ",", 1) for backend in BACKENDS] if value[0] == "B" else [value]
        return cls(path, kind, tuple(names))


@cache
def built(patch: Patch | None) -> Path:
    """Where a copy of the package is, patched. The extension is compiled again only if its sources have changed."""
    folder = BUILD / (patch.path.stem if patch else "nothing")
    fresh = BUILD / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, fresh)
    setup = fresh / "setup.py"
    setup.write_text(setup.read_text().replace('"-O2"', '"-O0"'))  # compiled in a third of the time
    shutil.copytree(ROOT / "src", fresh / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    package = fresh / "src" / "muxcore"
    if patch:
        run(["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", str(patch.path)], fresh)
    if patch and COMPILED.search(patch.path.read_text()):
        for extension in package.glob("*.so"):
            extension.unlink()
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.glob("*.px*")))).hexdigest()
        mark = folder / "digest"
        if mark.exists() and mark.read_text() == digest:
            for extension in (folder / "src" / "muxcore").glob("*.so"):
                shutil.copy(extension, package)
        else:
            run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], fresh)
        (fresh / "digest").write_text(digest)
    shutil.rmtree(folder, ignore_errors=True)
    return fresh.rename(folder) / "src"


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]} ended with {done.returncode}: {done.stdout.strip()[-500:]}")


def found(name: str, source: Path, times: int = TIMES) -> str:
    """What a scenario finds, in so many runs: the first in a fresh process, the others after one without user code,
    since when the collector comes is a matter of what was there before."""
    report = Report(quiet=True)
    played = Scenario.parse(name)

    def until_found() -> Iterator[Scenario]:
        yield played
        yield played._replace(injections=())
        for _ in range(times - 1):
            if not report.failed:
                yield played

    play_all(until_found(), report, source)
    findings = [symptom[0] for symptom in report.kinds.values()]
    calm = [finding for playing, finding in findings if "|" not in playing]
    return f"{calm[0]} (without user code, too)" if calm else findings[0][1] if findings else ""


def without(patch: Patch) -> list[str]:
    """What is wrong with a patch, or with the harness: nothing if each of its scenarios finds it."""
    try:
        source = built(patch)
    except ValueError as error:
        return [f"NOT BUILT: {error}"]
    if not patch.names and "find:" not in patch.path.read_text():
        return ["it names no scenario"]
    wrong = []
    for name in patch.names:
        finding = found(name, source)
        print(f"    {name}\n        {finding[:150] or 'NOT FOUND'}", flush=True)
        if not finding:
            wrong.append(f"NOT FOUND by {name}")
        quiet = found(name, built(None), 1)
        if quiet:
            wrong.append(f"nothing is missing, and {name} finds {quiet}")
        if finding.endswith("too)"):
            wrong.append(finding)
    return wrong


def main() -> int:
    patches = [Patch.read(path) for path in sorted((HERE / "without").glob("*.patch"))]
    chosen = [patch for patch in patches if not sys.argv[1:] or patch.path.stem in sys.argv[1:]]
    if not chosen:
        raise SystemExit("there is no such patch")
    failed = 0
    for patch in chosen:
        print(f"{patch.path.stem}: {patch.kind}", flush=True)
        wrong = without(patch)
        failed += bool(wrong)
        print(*(f"    FAILED: {line}" for line in wrong), sep="\n", end="\n" * bool(wrong), flush=True)
    print(f"\n{len(chosen)} fixes removed, {failed} not as they should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
