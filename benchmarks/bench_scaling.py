"""What one active descriptor costs among many idle ones: select, poll and epoll, the standard library's and muxcore's.

What may live here: that table, how flat epoll is, and the picture of both.
"""

from __future__ import annotations

import multiprocessing
import resource
import select
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median
from typing import Any

from _run import HERE, INK, BenchError, Result, Table, number, parser, pyplot, report, rounds, run, save

import muxcore

FEW, MANY = 10, 15_000
COUNTS = (FEW, 100, 500, 900, 2_000, 5_000, MANY)
SELECT_MOST = 900  # select allows no descriptor >= 1024, and some are needed for other things
SPARE = 64  # low descriptors left free for what is opened later; Mux(backend="select") needs some
TIMEOUT = 10  # seconds; no wait should ever last that long
SLICE_NS = 15_000_000
GOAL = 1.05

Event = Callable[[], object]  # wait for the one readable descriptor, and read it
Sockets = list[socket.socket]
Key = tuple[str, int]


# --- what is compared ------------------------------------------------------------------------------


@contextmanager
def nothing(active: socket.socket, idle: Sockets) -> Iterator[Event]:
    """No wait at all: what writing and reading the byte cost."""
    yield partial(active.recv, 64)


@contextmanager
def with_select(active: socket.socket, idle: Sockets) -> Iterator[Event]:
    wait, recv = select.select, active.recv
    fds = [sock.fileno() for sock in (active, *idle)]

    def event() -> None:
        for _ in wait(fds, [], [], TIMEOUT)[0]:
            recv(64)

    yield event


@contextmanager
def with_poller(make: Callable[[], Any], unit: float, active: socket.socket, idle: Sockets) -> Iterator[Event]:
    """An object with register() and poll(), whose timeout counts in `unit` seconds."""
    poller = make()
    for sock in (active, *idle):
        poller.register(sock.fileno(), select.POLLIN)  # the same number as EPOLLIN
    wait, recv, timeout = poller.poll, active.recv, TIMEOUT / unit

    def event() -> None:
        for _ in wait(timeout):
            recv(64)

    yield event
    if hasattr(poller, "close"):
        poller.close()


@contextmanager
def with_mux(backend: str, active: socket.socket, idle: Sockets) -> Iterator[Event]:
    """Pull style, as the nearest to the others. It owns the sockets for a while; `idle` has them again afterwards."""
    with muxcore.Mux(backend=backend) as mux:
        first = mux.attach(active.dup())
        others = [mux.attach(sock) for sock in idle]
        mux.poll(0)  # each has been reported as opened
        wait = mux.poll

        def event() -> None:
            for conn, _ in wait(TIMEOUT):
                conn.recv()

        yield event
        first.close()
        idle[:] = [conn.detach() for conn in others]


CONTENDERS: dict[str, tuple[str, Callable[[socket.socket, Sockets], AbstractContextManager[Event]]]] = {
    "nothing": ("write and read alone", nothing),
    "select": ("select.select", with_select),
    "mux-select": ('Mux(backend="select")', partial(with_mux, "select")),
    "poll": ("select.poll", partial(with_poller, select.poll, 0.001)),
    "mux-poll": ('Mux(backend="poll")', partial(with_mux, "poll")),
    "epoll": ("select.epoll", partial(with_poller, select.epoll, 1.0)),
    "muxcore.Epoll": ("muxcore.Epoll", partial(with_poller, muxcore.Epoll, 1.0)),
    "mux-epoll": ('Mux(backend="epoll")', partial(with_mux, "epoll")),
}
FLAT = ("epoll", "muxcore.Epoll", "mux-epoll")


# --- idle sockets ----------------------------------------------------------------------------------


def connect_all(path: str, count: int, control: Pipe) -> None:
    """In a process of its own, which holds the other end of each idle socket."""
    peers = []
    for _ in range(count):
        peers.append(socket.socket(socket.AF_UNIX))
        peers[-1].connect(path)
    control.poll(None)


@contextmanager
def idle_sockets(count: int) -> Iterator[Sockets]:
    """So many connected sockets on which nothing ever happens, the first ones with the lowest descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 2 * SPARE:
        raise BenchError(f"{count + 2 * SPARE} descriptors per process are needed, and {hard} allowed; see --most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, count + 2 * SPARE)), hard))
    spare = [socket.socket(socket.AF_UNIX) for _ in range(SPARE)]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(folder, "idle"))
        listener.bind(path)
        listener.listen(1024)
        listener.settimeout(TIMEOUT)
        process = context.Process(target=connect_all, args=(path, count, theirs), daemon=True)
        process.start()
        sockets: Sockets = []
        try:
            sockets += (listener.accept()[0] for _ in range(count))
            for sock in spare:
                sock.close()
            yield sockets
        finally:
            ours.send(None)
            process.join(TIMEOUT)
            for sock in sockets:
                sock.close()


# --- measuring -------------------------------------------------------------------------------------


def cpu_ns(events: int, peer: socket.socket, event: Event) -> float:
    """This thread's CPU time per event: one byte is written, waited for and read."""
    send, repeat = peer.send, range(events)
    before = time.thread_time_ns()
    for _ in repeat:
        send(b"x")
        event()
    return (time.thread_time_ns() - before) / events


def events_per_slice(peer: socket.socket, event: Event) -> int:
    """So many that they take about SLICE_NS; this also warms up what is to be measured."""
    cpu_ns(10, peer, event)
    return int(min(5000, max(10, SLICE_NS / cpu_ns(20, peer, event))))


def measure(key: Key, idle: Sockets) -> Result:
    name, count = key
    active, peer = socket.socketpair()
    some = idle[:count]
    with active, peer, CONTENDERS[name][1](active, some) as event:
        result = {"cpu_ns": cpu_ns(events_per_slice(peer, event), peer, event)}
    idle[:count] = some
    return result


def flatness(name: str, idle: Sockets, slices: int) -> list[Result]:
    """FEW against the rest of `idle`, both open at once, in slices that alternate: what differs is the idle sockets."""
    (few_active, few_peer), (many_active, many_peer) = socket.socketpair(), socket.socketpair()
    watch = CONTENDERS[name][1]
    few, many = idle[-FEW:], idle[:-FEW]
    results = []
    with few_active, few_peer, many_active, many_peer:
        with watch(few_active, few) as few_event, watch(many_active, many) as many_event:
            events = events_per_slice(few_peer, few_event)
            events_per_slice(many_peer, many_event)
            pair = [("few_ns", few_peer, few_event), ("many_ns", many_peer, many_event)]
            for _ in range(slices):
                results.append({label: cpu_ns(events, peer, event) for label, peer, event in pair})
                pair.reverse()
        idle[:] = many + few
    return results


# --- what is shown ---------------------------------------------------------------------------------


def cost_table(medians: dict[Key, float], counts: Sequence[int], round_count: int) -> Table:
    text = (
        "CPU time in microseconds of one event: a byte is written into one socket pair, waited for among so many idle "
        f"sockets, and read. {round_count} interleaved rounds, medians. select takes no descriptor above 1023."
    )
    table = Table(text, ("idle sockets", *(f"{count:,}" for count in counts)))
    for name, (title, _) in CONTENDERS.items():
        cells = (medians.get((name, count)) for count in counts)
        table.rows.append((title, *(number(None if ns is None else ns / 1e3) for ns in cells)))
    return table


def flat_table(flat: dict[str, list[Result]], most: int) -> Table:
    text = (
        f"The same, {most:,} idle sockets against {FEW}: both sets open at once, measured in turn in short slices, and "
        f"the median of the neighbours' ratios. Goal: {GOAL:.2f}x at most."
    )
    table = Table(text, ("", f"us, {FEW} idle", f"us, {most:,} idle", "ratio", "quartiles", "goal"))
    for name, results in flat.items():
        ratios = sorted(result["many_ns"] / result["few_ns"] for result in results)
        few, many = (median(result[key] for result in results) / 1e3 for key in ("few_ns", "many_ns"))
        quartiles = f"{ratios[len(ratios) // 4]:.3f}-{ratios[3 * len(ratios) // 4]:.3f}"
        goal = "held" if median(ratios) <= GOAL else "missed"
        table.rows.append((CONTENDERS[name][0], number(few), number(many), f"{median(ratios):.3f}x", quartiles, goal))
    return table


COLOURS = {"nothing": "#888888", "select": "#d9534f", "poll": "#d08a1e", "epoll": "#2f8fd8", "muxcore.Epoll": "#2aa876"}


def draw(medians: dict[Key, float], path: Path) -> None:
    """Lines over the number of idle sockets, both axes logarithmic; muxcore's are dashed."""
    plt = pyplot(path)
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(8, 4.8))
    for name, (title, _) in CONTENDERS.items():
        points = sorted((count, ns / 1e3) for (key, count), ns in medians.items() if key == name)
        style = {"nothing": ":", "select": "-", "poll": "-", "epoll": "-"}.get(name, "--")
        colour = COLOURS[name if name in COLOURS else name.removeprefix("mux-")]
        axes.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=4, label=title)
    axes.set(xscale="log", yscale="log", xlabel="idle sockets", ylabel="CPU time per event, microseconds")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(True, which="major", color=INK, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10)
    save(figure, path)


def main() -> None:
    options = parser(__doc__, list(CONTENDERS), 9)
    options.add_argument("--most", type=int, default=MANY, help="idle sockets at most; default: %(default)s")
    options.add_argument("--slices", type=int, default=60, help="for the ratio; default: %(default)s")
    args = options.parse_args()
    counts = sorted({min(count, args.most) for count in COUNTS})
    keys = [(name, count) for name in args.only for count in counts if "select" not in name or count <= SELECT_MOST]
    with idle_sockets(args.most + FEW) as idle:
        results = rounds(keys, args.rounds, lambda key: measure(key, idle))
        flat = {name: flatness(name, idle, args.slices) for name in FLAT if name in args.only}
    medians = {key: median(result["cpu_ns"] for result in found) for key, found in results.items()}
    raw: dict[str, Any] = {
        f"{name} + {count} idle": [r["cpu_ns"] for r in found] for (name, count), found in results.items()
    }
    raw["flatness"] = flat
    tables = [cost_table(medians, counts, args.rounds), flat_table(flat, args.most)]
    report("scaling", "The cost of one event among idle sockets", tables, raw, args.keep)
    if not args.keep:
        draw(medians, HERE / "results" / "scaling.svg")


if __name__ == "__main__":
    run(main)
