"""Several Muxes, each in a thread of its own: CPU per message, and how many run at once.

What may live here: one process with 1, 2, 4 ... threads, in each a Mux and its clients, which play ping-pong over
socketpairs, all driven by that one thread. So no thread waits for a load generator: all are busy all the time, and
on a free-threaded CPython the messages per second grow with the threads, up to the processors; with a GIL they do not.
Run it with the interpreter to be measured; PYTHON_GIL=0 keeps a free-threaded one so.
"""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import threading
import time

from _run import Result, Table, number, parser, report, rounds, run

import muxcore

CONNECTIONS = 50
SIZE = 256


class Worker:
    """A Mux with both ends of its connections: what one sends the other sends back, until the time is up."""

    def __init__(self, start: threading.Barrier, seconds: float) -> None:
        self.start, self.seconds = start, seconds
        self.messages = 0
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self) -> None:
        with muxcore.Mux() as mux:
            for _ in range(CONNECTIONS):
                for end in socket.socketpair():
                    conn = mux.attach(end, lambda conn, message: conn.send(message))
                conn.send(bytes(SIZE))
            mux.call_later(self.seconds, mux.stop)
            self.start.wait()
            mux.run()
            self.messages = mux.stats().messages_in


def measure(seconds: float, threads: int) -> Result:
    """Messages per second of all threads together, and CPU time per message."""
    start = threading.Barrier(threads + 1)
    workers = [Worker(start, seconds) for _ in range(threads)]
    start.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.thread.join()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    messages = sum(worker.messages for worker in workers)
    return {"rate": messages / wall, "cpu_us": cpu / messages * 1e6, "busy": cpu / wall}


def main() -> None:
    options = parser(__doc__, [], 5)
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    options.add_argument("--seconds", type=float, default=2.0, help="of each run; default: 2")
    args = options.parse_args()
    results = rounds(args.threads, args.rounds, lambda threads: measure(args.seconds, threads), "threads")
    gil = "with a GIL" if getattr(sys, "_is_gil_enabled", lambda: True)() else "without a GIL"
    title = f"{CONNECTIONS} ping-pongs of {SIZE} bytes per thread, {gil}, {len(os.sched_getaffinity(0))} processors."
    table = Table(title, ("threads", "messages/s", "to one thread", "CPU per message, µs", "processors busy"))
    medians = {
        threads: {key: sorted(result[key] for result in found)[len(found) // 2] for key in found[0]}
        for threads, found in results.items()
    }
    first = medians[args.threads[0]]["rate"]
    for threads, found in medians.items():
        table.rows.append((
            str(threads), number(found["rate"], 0), f"{found['rate'] / first:.2f}x",
            number(found["cpu_us"], 2), number(found["busy"], 2),
        ))
    name = "threads-free" if sysconfig.get_config_var("Py_GIL_DISABLED") else "threads"
    report(name, "Threads", [table], {str(threads): found for threads, found in results.items()}, args.keep)


if __name__ == "__main__":
    run(main)
