"""What may live here: what a scenario is, its name, and the lists of them: every one, or those of a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple, Self

from .actions import ACTIONS, WRAPPERS
from .points import FRAMINGS, HANDLERS, POINTS, STYLES, point_of


class Injection(NamedTuple):
    point: str
    nth: int  # the call of the point at which it happens
    action: str

    def __str__(self) -> str:
        return f"{self.point}@{self.nth}={self.action}"


class Scenario(NamedTuple):
    """Its name contains all of it, and replays it exactly (with `signals`, up to when they arrive)."""

    backend: str
    style: str  # of the connection that matters
    framing: str
    injections: tuple[Injection, ...]
    gc: int = 0  # the collector's threshold; 0 leaves it alone
    signals: bool = False  # a storm of SIGALRM
    anywhere: bool = False  # any connection's points count, not only the one's that matters
    loop: str = "poll"
    salt: int = 0

    @property
    def name(self) -> str:
        flags = f"gc{self.gc}," * bool(self.gc) + "signals," * self.signals + "anywhere," * self.anywhere
        head = f"{self.backend},{self.style},{self.framing},{flags}{self.loop},{self.salt}"
        return "|".join([head, *map(str, self.injections)])

    @classmethod
    def parse(cls, name: str) -> Self:
        head, *rest = name.split("|")
        backend, style, framing, *flags, loop, salt = head.split(",")
        threshold = next((int(flag[2:]) for flag in flags if flag.startswith("gc")), 0)
        injections = []
        for part in rest:
            point, _, action = part.partition("=")
            point, _, nth = point.partition("@")
            injections.append(Injection(point, int(nth), action))
        signals, anywhere = "signals" in flags, "anywhere" in flags
        return cls(backend, style, framing, tuple(injections), threshold, signals, anywhere, loop, int(salt))

    def steps(self) -> list[str]:
        """What connections must do for each message so that the points are reached."""
        return sorted({step for injection in self.injections for step in point_of(injection.point).steps})


STRIDE = 2_654_435_761  # a prime: scenarios next to each other are at calls far from each other

# With these inside, a wrapper is tried everywhere; with all others at random.
INNER = ("close_here", "abort_here", "send_other", "framer_here", "recv_here", "raise_exception", "timers_200")


def actions() -> Iterator[str]:
    for name in ACTIONS:
        if name in WRAPPERS:
            yield from (f"{name}>{inner}" for inner in INNER)
        else:
            yield name


def exhaustive(
    backends: list[str], gc: int = 0, signals: bool = False, every_framing: bool = False
) -> Iterator[Scenario]:
    """Every point x every action x every core x every style, with one framing each, or with all."""
    number = 0
    for point, about in POINTS.items():
        for action, style in product(actions(), about.styles):
            number += 1
            injection = Injection(point, 1 + number * STRIDE % about.calls, action)
            threshold = gc or (1 + number % 5) * ("cycle" in str(injection))
            chosen = about.framings if every_framing else (about.framings[number % len(about.framings)],)
            for framing, backend in product(chosen, backends):
                yield Scenario(backend, style, framing, (injection,), threshold, signals)


def at_random(seed: int, backends: list[str], gc: bool = False, signals: bool = False) -> Scenario:
    """The program of a seed."""
    chance = random.Random(seed)
    names = list(actions())
    loop = "run" if chance.random() < 0.15 else "poll"
    style = chance.choice(STYLES if loop == "poll" else HANDLERS)
    framing = chance.choice([*FRAMINGS, "custom", "inline"])
    injections = []
    for _ in range(chance.randint(1, 6)):
        point = "signal" if signals and chance.random() < 0.5 else chance.choice(list(POINTS))
        nth = chance.choice([1, 1, 2, 3, 5, 9]) if POINTS[point].calls < 9 else chance.randint(1, 20_000)
        injections.append(Injection(point, nth, chance.choice(names)))
    threshold = chance.choice([1, 2, 3, 5, 9]) if gc else 0
    backend = backends[seed % len(backends)]
    return Scenario(backend, style, framing, tuple(injections), threshold, signals, True, loop, seed)
