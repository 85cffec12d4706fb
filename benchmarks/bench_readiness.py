"""muxcore.Epoll against select.epoll: CPU time per reported event, and of register, modify and unregister.

What may live here: that one table.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from _run import Result, Table, number, parser, report, run

import muxcore

BATCHES = (1, 16, 256)
TIMEOUTS: dict[str, float | None] = {"no timeout": None, "timeout 0": 0, "timeout 10 s": 10}
CHANGED = 256  # descriptors that are registered, modified and unregistered
SLICE_NS = 4_000_000
IN = select.EPOLLIN

Work = Callable[[], object]
Pair = tuple[Work, Work]  # the same done with select.epoll, and with muxcore.Epoll


@contextmanager
def ready(count: int) -> Iterator[list[int]]:
    """So many descriptors that stay readable, as nothing reads them."""
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


class Number:
    """The cheapest object with a fileno()."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd


# --- what is compared ------------------------------------------------------------------------------


def watching(make: Callable[[], Any], fds: Sequence[int]) -> Any:
    epoll = make()
    for fd in fds:
        epoll.register(fd, IN)
    assert len(epoll.poll(0, len(fds))) == len(fds)
    return epoll


def waiting(fds: Sequence[int], timeout: float | None) -> Pair:
    """poll() alone, with its list thrown away."""

    def one(make: Callable[[], Any]) -> Work:
        poll = watching(make, fds).poll
        return lambda: poll(timeout)

    return one(select.epoll), one(muxcore.Epoll)


def looking_up(fds: Sequence[int]) -> Pair:
    """poll() and, for each event, the object that belongs to it: by a dict, or by register(data=)."""
    objects = {fd: Number(fd) for fd in fds}
    theirs, ours = watching(select.epoll, fds), muxcore.Epoll()
    for fd in fds:
        ours.register(fd, IN, objects[fd])

    def with_dict() -> None:
        for fd, _ in theirs.poll():
            objects[fd]

    def with_data() -> None:
        for _, _ in ours.poll():
            pass

    return with_dict, with_data


def adding(targets: Sequence[Any]) -> Pair:
    """register() and unregister() of each."""

    def one(epoll: Any) -> Work:
        register, unregister = epoll.register, epoll.unregister

        def work() -> None:
            for target in targets:
                register(target, IN)
            for target in targets:
                unregister(target)

        return work

    return one(select.epoll()), one(muxcore.Epoll())


def modifying(fds: Sequence[int]) -> Pair:
    def one(epoll: Any) -> Work:
        modify = epoll.modify

        def work() -> None:
            for fd in fds:
                modify(fd, IN)

        return work

    return one(watching(select.epoll, fds)), one(watching(muxcore.Epoll, fds))


def cases(fds: Sequence[int]) -> dict[str, tuple[int, Pair]]:
    """By what is done: how many events or calls one piece of work is, and the two to compare."""
    found: dict[str, tuple[int, Pair]] = {}
    for batch in BATCHES:
        for title, timeout in TIMEOUTS.items():
            found[f"poll, {batch} ready, {title}: per event"] = batch, waiting(fds[:batch], timeout)
    for batch in BATCHES:
        found[f"poll and find the object, {batch} ready: per event"] = batch, looking_up(fds[:batch])
    few = fds[:CHANGED]
    found["register and unregister a number: per pair"] = CHANGED, adding(few)
    found["register and unregister an object: per pair"] = CHANGED, adding([Number(fd) for fd in few])
    found["modify: per call"] = CHANGED, modifying(few)
    return found


# --- measuring -------------------------------------------------------------------------------------


def cpu_ns(work: Work, count: int) -> float:
    """This thread's CPU time per piece of work."""
    repeat = range(count)
    before = time.thread_time_ns()
    for _ in repeat:
        work()
    return (time.thread_time_ns() - before) / count


def compare(units: int, pair: Pair, order: int) -> Result:
    """Both in neighbouring slices; `order` says which comes first."""
    count = max(3, int(SLICE_NS / cpu_ns(pair[0], 20)))
    cpu_ns(pair[1], 20)
    sides = [("select_ns", pair[0]), ("muxcore_ns", pair[1])]
    if order % 2:
        sides.reverse()
    return {name: cpu_ns(work, count) / units for name, work in sides}


def table(text: str, results: dict[str, list[Result]]) -> Table:
    result = Table(text, ("", "select.epoll, ns", "muxcore.Epoll, ns", "muxcore to select", "quartiles"))
    for title, found in results.items():
        theirs, ours = (median(one[key] for one in found) for key in ("select_ns", "muxcore_ns"))
        ratios = sorted(one["muxcore_ns"] / one["select_ns"] for one in found)
        quartiles = f"{ratios[len(ratios) // 4]:.2f}-{ratios[3 * len(ratios) // 4]:.2f}"
        result.rows.append((title, number(theirs, 0), number(ours, 0), f"{median(ratios):.2f}x", quartiles))
    return result


def main() -> None:
    options = parser(__doc__, (), 61)
    args = options.parse_args()
    with ready(max(*BATCHES, CHANGED)) as fds:
        compared = cases(fds)
        results: dict[str, list[Result]] = {title: [] for title in compared}
        for i in range(args.rounds):
            for title, (units, pair) in compared.items():
                results[title].append(compare(units, pair, i))
    text = f"CPU time, {args.rounds} interleaved rounds, medians; ratios are taken between neighbouring slices."
    report("readiness", "muxcore.Epoll and select.epoll", [table(text, results)], results, args.keep)


if __name__ == "__main__":
    run(main)
