"""A soak: `run.py MINUTES [--backend epoll] [--plant MISTAKE] [--plot FILE]`.

A server in a process of its own, every kind of client (load.py) on it, and a new one for each that ends. Each second it
is written down how much memory and how many descriptors the server has. It ends with a verdict, and fails if a byte was
lost, an `on_close` was missing, doubled or had another reason than it should, or if memory or descriptors grew.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from load import KINDS, NOT_STARTED, Soak

HERE = Path(__file__).parent
MAY_GROW = 4.0  # MB of memory over the whole run; what it holds for its clients varies by about one
WARM_UP = 60.0  # seconds; of a short run half its time
INK = "#808488"  # readable on white and on black


class Sample(NamedTuple):
    second: float
    rss: float
    """MB"""
    private: float
    """MB that belong to no other process and to no file as it is on disk."""
    fds: float


class Server:
    """The server's process."""

    def __init__(self, backend: str, mistake: str) -> None:
        command = [sys.executable, str(HERE / "server.py"), backend, mistake]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.addresses: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.proc = Path("/proc", str(self.process.pid))
        self.started = time.monotonic()
        self.fds_at_rest = min(self.fds() for _ in range(50))  # now and then it connects, and is refused

    def fds(self) -> int:
        return len(list((self.proc / "fd").iterdir()))

    def sample(self) -> Sample:
        if self.process.poll() is not None:
            raise SystemExit(f"the server has ended, with {self.process.returncode}")
        rollup = dict(line.split()[:2] for line in (self.proc / "smaps_rollup").read_text().splitlines()[1:])
        private = int(rollup["Private_Clean:"]) + int(rollup["Private_Dirty:"])
        return Sample(time.monotonic() - self.started, int(rollup["Rss:"]) / 1024, private / 1024, self.fds())

    def fds_left(self) -> int:
        """How many descriptors there are more than before the first client, when they have all had time to end."""
        deadline = time.monotonic() + 5
        while (left := self.fds() - self.fds_at_rest) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def report(self) -> dict[str, Any]:
        """End it; the callbacks that its connections got."""
        report: dict[str, Any] = json.loads(self.process.communicate("\n", timeout=30)[0])
        return report


class Trend(NamedTuple):
    """A regression line: y = start + slope * second."""

    start: float
    slope: float
    seconds: float

    @classmethod
    def of(cls, points: list[tuple[float, float]]) -> Trend:
        n = len(points)
        x, y = (math.fsum(column) / n for column in zip(*points, strict=True))
        spread = math.fsum((point[0] - x) ** 2 for point in points)
        slope = math.fsum((point[0] - x) * (point[1] - y) for point in points) / spread if spread else 0.0
        return cls(y - slope * x, slope, points[-1][0] - points[0][0])

    @property
    def growth(self) -> float:
        """From the first point to the last."""
        return self.slope * self.seconds


def seen_by_clients(soak: Soak) -> list[str]:
    """What went wrong on the clients' side; prints what went right."""
    wrong = []
    for crowd in soak.crowds:
        name, result = f"{crowd.kind.listener}: {crowd.kind.make.__name__}", crowd.result
        print(f"{name:22} {crowd.started:>9,} {result.messages:>12,} {result.verified / 1e6:>10,.1f}")
        wrong += [f"{name}: {reason}, {count} times" for reason, count in result.failures.items()]
        if result.lost:
            wrong.append(f"{name}: {result.lost} bytes lost")
    return wrong


def seen_by_server(soak: Soak, report: dict[str, Any]) -> list[str]:
    """What went wrong on the server's side."""
    kinds, wrong, expected = report["kinds"], [], dict.fromkeys(report["kinds"], 0)
    for crowd in soak.crowds:
        expected[crowd.kind.listener] = expected.get(crowd.kind.listener, 0) + crowd.started
    expected["relay, outbound"] = expected["relay"]
    expected["bulk"] += expected["relay"]
    for name, counts in kinds.items():
        if counts["opened"] != expected[name]:
            wrong.append(f"{name}: {counts['opened']} connections opened, not {expected[name]}")
        for what in ("missing", "doubled"):
            if counts[what]:
                wrong.append(f"{name}: {counts[what]} times on_close was {what}")
        allowed = set(NOT_STARTED.get(name, ())).union(*(kind.reasons for kind in KINDS if kind.listener == name))
        wrong += [f"{name}: {n} closed by {why}" for why, n in counts["reasons"].items() if why not in allowed]
    if report["left"] or not report["drained"]:
        wrong.append(f"{report['left']} connections were left when all clients had ended")
    if report["stats"]["handler_errors"]:
        wrong.append(f"{report['stats']['handler_errors']} handlers raised")
    return wrong


def grown(samples: list[Sample], fds_left: int) -> list[str]:
    """What did not stay flat; prints the trends."""
    wrong = []
    units = {"rss": "MB", "private": "MB", "fds": "descriptors"}
    for name, unit in units.items():
        values = [getattr(sample, name) for sample in samples]
        trend = Trend.of([(sample.second, getattr(sample, name)) for sample in samples])
        print(
            f"{name:8} {min(values):.1f} to {max(values):.1f} {unit}, slope {trend.slope * 3600:+.2f} {unit} an hour, "
            f"{trend.growth:+.2f} in {trend.seconds:.0f} s"
        )
        if unit == "MB" and trend.growth > MAY_GROW:
            wrong.append(f"{name} grew by {trend.growth:.1f} MB")
    if fds_left:
        wrong.append(f"{fds_left:+} descriptors when all clients had ended")
    return wrong


def draw(samples: list[Sample], warm: float, path: Path) -> None:
    """Memory and descriptors over time, each with its regression line; what is before `warm` seconds is grey."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name}: left out, matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "muxcore", "font.size": 11, **ink}
    plt.rcParams.update(settings)
    figure, plots = plt.subplots(2, figsize=(8, 5), sharex=True)
    for axes, names, unit in ((plots[0], ("rss", "private"), "MB"), (plots[1], ("fds",), "descriptors")):
        for name, colour in zip(names, ("#2f8fd8", "#2aa876"), strict=False):
            points = [(sample.second, getattr(sample, name)) for sample in samples]
            measured = [point for point in points if point[0] >= warm]
            trend = Trend.of(measured)
            axes.plot(*zip(*(p for p in points if p[0] < warm), strict=True), color=INK, alpha=0.5, linewidth=1)
            label = f"{name}, {trend.slope * 3600:+.2f} an hour"
            axes.plot(*zip(*measured, strict=True), color=colour, alpha=0.5, linewidth=1, label=label)
            axes.plot(*zip(*((x, trend.start + trend.slope * x) for x, _ in measured), strict=True), color=colour)
        axes.set(ylabel=unit, ylim=(0, None))
        axes.grid(True, color=INK, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=10, loc="lower right")
    plots[-1].set(xlabel="seconds")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--plant", default="", help="a mistake: memory, fd, loss, swap, missing, doubled")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    seconds = options.minutes * 60
    server = Server(options.backend, options.plant)
    soak, samples = Soak(server.addresses), list[Sample]()
    try:
        soak.run(seconds, lambda: samples.append(server.sample()))
        soak.run(70, lambda: None, refill=False)
        fds_left = server.fds_left()
        report = server.report()
    finally:
        server.process.kill()
        server.process.wait()
        soak.close()
    warm = min(WARM_UP, seconds / 2)
    print(f"{'kind':22} {'clients':>9} {'messages':>12} {'verified MB':>10}")
    wrong = seen_by_clients(soak) + seen_by_server(soak, report)
    print(f"{report['backend']}, {seconds / 60:g} minutes, of which the first {warm:.0f} s do not count for the lines:")
    wrong += grown([sample for sample in samples if sample.second >= warm], fds_left)
    if options.plot:
        draw(samples, warm, options.plot)
    print("\n".join(wrong) or "nothing lost, every on_close came once, memory and descriptors are flat")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
