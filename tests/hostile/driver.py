"""What may live here: the driver: turns the Mux of a world, survives, and checks the model at the end."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import Any

import muxcore

from .model import Link
from .scenario import Scenario
from .workload import MALFORMED, wire
from .world import ALARM, World

PATIENCE = 2.0  # seconds for what must happen; much more than it needs


class Driver(World):
    def turn_core(self, timeout: float, returned: list[Any]) -> None:
        """`returned` gets what poll() returns, in C: else an interrupt could lose that."""
        if self.scenario.loop == "run":
            self.mux.call_later(timeout, self.mux.stop)
            self.call_traced(self.mux.run)
        else:
            self.call_traced(returned.extend, map(self.mux.poll, (timeout,)))

    def call_traced(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self.traces:
            sys.settrace(self.traced)
        if self.collects:
            gc.collect()  # the interpreter has no objects left to use again
            gc.set_threshold(1)
        try:
            function(*arguments)
        finally:
            self.in_poll = False  # first: in what follows a finaliser may run, which may poll
            if self.traces:
                sys.settrace(None)
                self.last = (None, "")  # a frame holds its messages
            if self.collects:
                gc.set_threshold(self.scenario.gc or 700)

    def poll(self, timeout: float = 0.0) -> None:
        """One turn, and what the links in pull style are owed after it."""
        if self.gone():
            return
        self.in_poll = True
        returned: list[Any] = []
        try:
            self.turn_core(timeout, returned)
        except KeyboardInterrupt:
            self.keyboard = True
        except RuntimeError as error:
            if not self.gone():
                self.complain(f"poll raised {error!r}")
        except Exception as error:
            self.complain(f"poll raised {error!r}")
        finally:
            self.in_poll = False
        for conn, events in chain.from_iterable(returned):
            self.reported(conn, events)
        for link in self.links:
            if link.style == "pull" and link.conn is not None and not self.gone():
                if link is self.subject:
                    self.guard(lambda link=link: self.call_traced(self.receive_all, link))  # type: ignore[misc]
                else:
                    self.guard(lambda link=link: self.receive_all(link))  # type: ignore[misc]

    def reported(self, conn: Any, events: int) -> None:
        link = next((link for link in self.links if link.conn is conn), None)
        if link is None:
            link = self.addresses.get(conn.peer)
            if link is None:
                return
        if events & muxcore.OPENED:
            link.on_open(conn)
        if events & muxcore.EOF:
            link.eofs += 1
        if events & muxcore.CLOSED:
            link.on_close(conn.error)

    def receive_all(self, link: Link) -> None:
        conn = link.conn
        self.hit("pull_between", link)
        how = self.random.choice(("recv", "recv_all", "iterate"))
        if how == "recv_all":
            ended = link.end or link.held()  # what is removed by then may be in the list
            self.received(link, conn.recv_all(), ended)
        else:
            message: Any = link
            while message is not None:
                message = None  # its finaliser runs now, not between the next message and the look at `end`
                message = conn.recv() if how == "recv" else next(conn, None)
                if message is not None:
                    self.received(link, [message], link.end or link.held())
        if link.eofs and not link.end:
            link.begin_end("eof")

    def received(self, link: Link, messages: list[Any], ended: str) -> None:
        link.on_messages(messages, ended)
        for message in messages:
            self.hit("pull_iterating", link)
            self.serve(link, message)
        self.drop_garbage()

    def say(self, count: int) -> None:
        """Each peer sends so many messages, in one piece."""
        for link in self.links:
            if link in self.mute or link.end or link.peer is None or link.peer_done or link.over():
                continue
            atoms = [b"%s%06d" % (link.tag.encode(), link.sent + i) for i in range(count)]
            data = b"".join(wire(link.framing, atom) for atom in atoms)
            try:
                link.peer.sendall(data + MALFORMED[link.framing] * link.sends_malformed)
            except OSError:
                continue
            link.sent += count
            if link.sends_malformed:
                link.malformed = "input"
                self.mute.add(link)

    def peers_read(self) -> None:
        for link in self.links:
            while link.peer is not None and link.reads and not link.peer_done:
                try:
                    data = link.peer.recv(1 << 16)
                except BlockingIOError:
                    break
                except OSError:
                    data = b""
                link.arrived += data
                if not data:
                    link.peer_done = True
                    link.peer.close()

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.poll()
            self.peers_read()

    def until(self, condition: Callable[[], bool], what: Callable[[], str]) -> None:
        end = time.monotonic() + PATIENCE
        wait, rounds = 0.0, 0
        while not condition():
            rounds += 1
            if time.monotonic() > end and rounds > 100:  # a busy machine needs more
                self.complain(what())
                return
            self.poll(wait)
            self.peers_read()
            wait = min(wait + 0.0005, 0.01)

    # -- one run

    def run(self) -> list[str]:
        try:
            if self.scenario.signals:
                signal.signal(signal.SIGALRM, self.on_alarm)
                self.is_storming = True
                signal.setitimer(signal.ITIMER_REAL, ALARM * self.random.random() + 1e-6)
            for count in (4, 3, 5, 2):
                self.say(count)
                self.turns(2)
            for link in self.links:
                link.reads = link.peer is not None
            self.turns(2)
        finally:
            self.is_storming = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.finish()
        return self.findings

    def finish(self) -> None:
        """No more injections but those of the end: everything that is owed comes, and then all ends."""
        self.traces, self.collects = "", False
        for entry in self.armed:
            late = entry.injection.point in ("on_close", "cycle", "del_data", "on_drain", "timer")
            if not late or "pause" in entry.injection.action:
                entry.left = 0
        if not self.gone():
            for link in self.links:
                if link.conn is not None and not link.conn.closed:
                    link.paused = False
                    self.guard(link.conn.resume_reading)
            for count in (0, 3):  # first without more input, which would wake up a connection that was forgotten
                self.say(count)
                self.until(lambda: self.gone() or all(link.complete() for link in self.links), self.incomplete)
            self.check_alive()
        for link in self.links:
            if link.errors and not link.over() and not self.gone():
                link.complain("open after on_error")
            link.check_input(finished=not link.end and not link.over() and not self.gone())
        for link in self.links:
            if link.detached is not None and link.peer is None:
                link.detached.close()  # at its other end is a connection of this Mux, which would linger for a FIN
        self.close_all()
        self.check_end()

    def incomplete(self) -> str:
        late = [link for link in self.links if not link.complete()]
        return "input does not come: " + ", ".join(f"{link.tag} ({link.style}, {link.framing})" for link in late)

    def check_alive(self) -> None:
        if self.gone():
            return
        for link in self.with_connection():
            self.guard(lambda link=link: self.send(link))  # type: ignore[misc]
        self.guard(lambda: self.broadcast(None))
        self.until(
            lambda: self.gone() or all(timer.fired or timer.cancelled for timer in self.timers),
            lambda: "timers do not fire",
        )
        echoed = bytes(self.control.arrived).count(b"#")
        if not self.gone() and (echoed != self.control.sent or self.control.conn.closed):
            self.complain(f"the control connection has {echoed} of {self.control.sent} replies")

    def close_all(self) -> None:
        """Those, too, that on_close makes."""

        def all_closed() -> bool:
            for link in [] if self.gone() else self.links:
                if link.conn is not None and not link.conn.closing:
                    self.guard(lambda link=link: self.end(link, "close"))  # type: ignore[misc]
            return self.gone() or all(link.conn is None or link.conn.closed for link in self.links)

        self.until(all_closed, lambda: "connections do not close")
        self.turns(1)

    def check_end(self) -> None:
        reports = not self.gone() and not self.interrupted
        if not self.gone() and self.mux.stats().connections:
            self.complain(f"stats() counts {self.mux.stats().connections} connections when all are closed")
        self.guard(self.mux.close)
        self.peers_read()
        if self.messages:
            self.complain(f"{self.messages} messages are kept by connections that have ended")
        for link in self.links:
            link.check_callbacks(reports, self.keyboard)
            link.check_output()
        if any(timer.fired > 1 for timer in self.timers):
            self.complain("a timer fired twice")
        if any(timer.fired and timer.cancelled for timer in self.timers):
            self.complain("a cancelled timer fired")

    def clean_up(self) -> None:
        """Release the objects of the harness: the rest belongs to the core."""
        self.is_storming = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.scenario.signals:  # the last may be on its way, in another thread
            signal.signal(signal.SIGALRM, lambda *_: None)
        self.active = False
        self.guard(self.mux.close)
        getLogger("muxcore").removeHandler(self.tap)
        for number, handler in self.stolen.items():
            if signal.getsignal(number) is not handler:
                self.complain(f"the handler of signal {number} was replaced when it was not the Mux's any more")
            signal.signal(number, self.saved[1])
        if signal.getsignal(signal.SIGUSR2) != self.saved[1]:
            self.complain("SIGUSR2 has another handler than before")
            signal.signal(signal.SIGUSR2, self.saved[1])
        signal.signal(signal.SIGUSR1, self.saved[0])
        if (wakeup := signal.set_wakeup_fd(-1)) != -1:
            self.complain(f"the wakeup descriptor is {wakeup}")
        sys.unraisablehook = self.saved[2]
        os.close(self.file)
        for sock in self.sockets:
            sock.close()
        for link in self.links:
            if link.peer is not None:
                link.peer.close()


def descriptors() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}


def play(scenario: Scenario) -> tuple[list[str], World]:
    """Run one scenario in this process; what was wrong."""
    before = descriptors()
    thresholds = gc.get_threshold()
    world = Driver(scenario)
    callbacks = [world.on_collection] * world.collects  # else none: what one allocates moves the next collection
    gc.callbacks.extend(callbacks)
    try:
        if scenario.gc:
            gc.set_threshold(scenario.gc)
        world.run()
    except Exception as error:
        world.complain(f"the driver met {error!r}: {traceback.format_exc(limit=-4)}")
    finally:
        gc.set_threshold(*thresholds)
        for callback in callbacks:
            gc.callbacks.remove(callback)
        world.clean_up()
    findings = world.findings
    for name in list(vars(world)):
        if name not in ("scenario", "findings", "trace", "performed", "reached"):
            delattr(world, name)
    gc.collect()
    left = descriptors() - before
    if left:
        findings.append(f"{len(left)} descriptors are left open")
        for fd in left:
            try:
                os.close(fd)
            except OSError:
                pass
    return findings, world
