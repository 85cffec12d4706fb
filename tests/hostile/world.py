"""What may live here: one scenario's world: a Mux, its links, the driver that turns it, and where injections happen."""

from __future__ import annotations

import dis
import gc
import os
import random
import re
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import Handler as LogHandler
from logging import LogRecord, getLogger
from pathlib import Path
from types import FrameType
from typing import Any

import wires

import muxcore

from .actions import ACTIONS, PLANTED, RAISING
from .model import BROADCAST, GENERATOR, Hostile, Link, Out
from .points import POINTS, Point, point_of
from .scenario import Injection, Scenario
from .workload import HANDLERS, SPECS, STEPS, Base, Lines, PlainWire

INSTRUCTIONS = {"instruction": "/muxcore/", "instruction_timers": "/muxcore/_timers.py"}  # of which files
# Behind these instructions CPython looks for no signal, and releases and allocates nothing that could run a finaliser.
QUIET = (
    "LOAD_FAST", "LOAD_CONST", "LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "PUSH_NULL", "IS_OP", "COMPARE_OP",
    "BINARY_SUBSCR", "POP_JUMP", "JUMP_FORWARD", "NOT_TAKEN", "LOAD_SMALL_INT", "PRECALL", "KW_NAMES", "SWAP", "COPY",
    "NOP",
)
ALARM = 0.0002  # seconds to the next one, in a storm of signals
NEVER = Point()  # what is none: "nothing"
BEFORE_ACCEPTING = ("encode", "reply_str", "reply_iter", "reply_len", "buffer")  # which a send calls, and looks behind
CHECKED = ("CALL", "JUMP_BACKWARD", "RESUME")  # behind these CPython runs signal handlers, which may raise
PACKAGE = str(Path(muxcore.__file__).parent)
REFUSED = re.compile("unsent|TLS")  # what detach() says of a connection that it leaves alone
SMALL = muxcore.Limits(high=600, low=100, max_outbox=1200, overflow="drop")


class Timer:
    """A call that is to come once: of a timer or, without a handle, of call_soon()."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.fired = 0

    @property
    def cancelled(self) -> bool:
        return self.handle is not None and bool(self.handle.cancelled)


class Armed:
    """An injection, and how many calls of its point there are up to it."""

    def __init__(self, injection: Injection, left: int) -> None:
        self.injection, self.left = injection, left


class LogTap(LogHandler):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def emit(self, record: LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        expected = isinstance(error, Hostile | muxcore.MuxError | OSError) or GENERATOR in str(error)
        if error is not None and not expected:
            self.world.complain(f"logged: {error!r}: {record.getMessage()}")
        self.world.hit("log", self.world.subject_of_log)


def payload_for(framer: Any, atom: bytes) -> Any:
    """The atom as a message that the framer can send."""
    if isinstance(framer, muxcore.Resp):
        return [atom]
    return atom + b"." if isinstance(framer, muxcore.Fixed) else atom


class World:
    active = False  # behind the end of the run; also when the collector has cleared what a finaliser refers to

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = random.Random(scenario.name)
        self.findings: list[str] = []
        self.trace: list[str] = []
        self.thread = threading.get_ident()
        self.active = True
        self.alarms = 0  # that are being handled, one during another
        self.is_storming = False
        self.in_poll = self.in_alarm = self.interrupted = self.mux_closed = self.forking = False
        self.submitting = self.starting = False  # a thread, perhaps
        self.depth = 0
        self.callbacks = 0  # of handlers, that run at the moment
        self.keyboard = False  # a KeyboardInterrupt has left poll()
        self.armed = [Armed(injection, injection.nth) for injection in scenario.injections]
        self.reached: Counter[str] = Counter()
        self.performed = 0
        self.steps = scenario.steps()
        self.links: list[Link] = []
        self.addresses: dict[Any, Link] = {}
        self.mute: set[Link] = set()  # their peers say nothing more
        self.timers: list[Timer] = []
        self.futures: list[Any] = []
        self.sockets: list[socket.socket] = []
        self.listeners: list[Any] = []
        self.kept: list[Any] = []
        self.garbage: list[Any] = []
        self.sends = 0
        self.messages = 0  # that are alive
        self.broadcasts = 0
        self.contexts: list[str] = []
        self.has_wires = any(one.point.startswith("wire_") for one in scenario.injections)
        self.stolen: dict[int, Any] = {}
        traces = next((one.point for one in scenario.injections if one.point.startswith("instruction")), "")
        self.traces, _, self.traced_function = traces.partition(":")
        self.refused: Link | None = None  # it refused output when user code that a send has called returned
        self.collects = any(one.point == "collection" for one in scenario.injections)
        self.subject_of_log: Link | None = None
        self.subject_of_signal: Link | None = None
        self.subject_of_unraisable: Link | None = None
        self.frame: FrameType | None = None
        self.last: tuple[FrameType | None, str] = (None, "")  # the instruction traced last
        self.saved = (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGUSR2), sys.unraisablehook)
        self.mux: Any = muxcore.Mux(backend=scenario.backend)
        self.file = os.memfd_create("muxcore")
        os.write(self.file, b"\n" * 100)
        self.tap = LogTap(self)
        self.datagram: Any = None
        self.subject: Any = None  # the connection that matters
        self.control: Any = None  # one that nothing is done to
        self.make()

    # -- what there is

    def make(self) -> None:
        logger = getLogger("muxcore")
        logger.propagate = False
        logger.addHandler(self.tap)
        signal.signal(signal.SIGUSR1, self.on_signal)
        sys.unraisablehook = self.on_unraisable
        self.listeners.append(self.mux.listen(("127.0.0.1", 0), Base(self)))
        self.datagram = self.mux.datagram(("127.0.0.1", 0), lambda *_: self.hit("on_datagrams", self.subject))
        self.control = self.new_link("message", "lines")
        pull = "pull" if self.scenario.loop == "poll" else "message"
        for style, framing in (("message", "resp"), ("messages", "custom"), (pull, "inline"), (pull, "custom")):
            self.new_link(style, framing)
        overflow: Any = self.random.choice(["drop", "raise", "close"])
        slow = self.new_link("message", "lines", limits=SMALL.__replace__(overflow=overflow))
        slow.bounded, slow.reads = True, False
        self.new_link("messages", "prefix").victim = True
        fails = any(one.injection.point == "factory" and one.left == 1 for one in self.armed)
        accepted = "burst" not in self.steps and not self.has_wires and self.random.random() < (0.6 if fails else 0.3)
        self.subject = self.new_link(self.scenario.style, self.scenario.framing, accepted, matters=True)

    def new_link(self, style: str, framing: str, accepted: bool = False, matters: bool = False, **options: Any) -> Link:
        link, scenario = Link(chr(ord("A") + len(self.links)), style, framing, self.complain), self.scenario
        # What ends it may run between the core's last look and the first line of the handler.
        collects = self.collects and scenario.backend != "epoll"
        link.allowed_late = 1 if scenario.signals or scenario.gc or self.traces or collects else 0
        link.factory = lambda: Lines(self, link)
        self.links.append(link)
        if matters:
            self.subject = link  # its factory already may hit
        handler = None if style == "pull" else HANDLERS[style](self, link)
        framer = link.factory if framing == "custom" else SPECS[framing]
        if accepted and not self.mux.closed:
            link.to_accept = True
            listener = self.mux.listen(("127.0.0.1", 0), handler, framer=framer, **options)
            self.listeners.append(listener)
            link.peer = socket.create_connection(listener.address)
            self.addresses[link.peer.getsockname()] = link
        else:
            ours, link.peer = socket.socketpair()
            self.guard(lambda: self.attach(link, ours, handler, framer, options))
            if link.conn is None:
                ours.close()
                link.end = "never"
        link.peer.setblocking(False)
        return link

    def attach(self, link: Link, sock: socket.socket, handler: Any, framer: Any, options: dict[str, Any]) -> None:
        link.conn = self.mux.attach(sock, handler, framer=framer, **options)
        if self.has_wires and link is not self.control:
            link.outbound = True
            wires.begin(link.conn, PlainWire(self, link))

    def accepted(self, conn: Any) -> Link:
        """The link of a connection that a listener has accepted; a client of an action's has none yet."""
        for link in self.links:
            if link.conn is conn:
                return link
        found = self.addresses.get(conn.peer)
        return found if found is not None and found.conn is None else self.bare_link("message")

    def bare_link(self, style: str) -> Link:
        """For a connection whose peer is a connection, too."""
        link = Link(chr(ord("A") + len(self.links)), style, "none", self.complain)
        link.factory = lambda: Lines(self, link)
        self.links.append(link)
        link.reads = False
        self.mute.add(link)
        if self.mux_closed:  # by a signal handler, while it was accepted: on_open and on_close follow
            link.begin_end("mux")
        return link

    def framer_of(self, link: Link) -> Any:
        return link.conn.framer

    def other(self, link: Link | None) -> Link:
        """Another connection, that is not the control's."""
        others = [one for one in self.links if one not in (link, self.control) and one.conn is not None and not one.end]
        return self.random.choice(others) if others else self.subject

    def with_connection(self) -> list[Link]:
        return [link for link in self.links if link is not self.control and link.conn is not None]

    # -- what is found

    def complain(self, what: str) -> None:
        if len(self.findings) < 20 and what not in self.findings:
            self.findings.append(what)

    def gone(self) -> bool:
        return self.mux_closed or bool(self.mux.closed)

    def attempt(self, what: str, function: Callable[..., object], *arguments: Any) -> None:
        """Do what may fail for a good reason."""
        try:
            function(*arguments)
        except (muxcore.MuxError, OSError):
            pass
        except Hostile:
            raise
        except Exception as error:
            elsewhere = threading.get_ident() != self.thread  # a finaliser may run in any
            if isinstance(error, RuntimeError) and (elsewhere or self.gone() or REFUSED.search(str(error))):
                return
            if GENERATOR not in str(error):
                self.complain(f"{what} raised {error!r}")

    def guard(self, function: Callable[[], object]) -> None:
        """What a program does that survives its own exceptions."""
        try:
            function()
        except (Hostile, KeyboardInterrupt, muxcore.MuxError, OSError):
            pass
        except Exception as error:
            elsewhere = threading.get_ident() != self.thread  # a finaliser may run in any
            if not (isinstance(error, RuntimeError) and (elsewhere or self.gone())):
                self.complain(f"{function.__qualname__} raised {error!r}")

    @contextmanager
    def callback(self, link: Link) -> Iterator[None]:
        if self.callbacks:
            self.complain("a callback inside a callback")
        self.callbacks += 1
        try:
            yield
        except muxcore.FrameError:
            raise  # and on_error comes
        except Exception:
            link.begin_end("raise")
            raise
        finally:
            self.callbacks -= 1

    def turn_core(self, timeout: float) -> Any:
        """Let the core do one turn; what poll() reports."""
        raise NotImplementedError

    # -- injections

    def hit(self, point: str, link: Link | None = None) -> None:
        """User code runs here: do what the scenario says."""
        if not self.active or threading.get_ident() != self.thread:
            return
        link = link or self.subject
        if link is None or link is self.control:  # None: the log, say, while links are made before the subject
            return
        if not self.scenario.anywhere and link is not self.subject:
            return
        self.reached[point] += 1
        if POINTS.get(point, NEVER).never:
            self.complain(f"{point} was called")
        for entry in self.armed:
            if entry.injection.point == point and entry.left > 0:
                entry.left -= 1
                if entry.left == 0:
                    self.perform(entry.injection.action, link, point)
        if point in BEFORE_ACCEPTING and link.refuses() and not link.ended_elsewhere:
            self.refused = link

    def perform(self, action: str, link: Link, point: str) -> None:
        name, _, inner = action.partition(">")
        if self.in_alarm and (inner or name) in RAISING and not self.may_raise(inner or name):
            return
        if self.depth > 4:
            return
        self.depth += 1
        self.contexts.append(point)
        self.performed += 1
        self.trace.append(f"{point}({link.tag}): {action}")
        try:
            self.attempt(action, ACTIONS.get(name) or PLANTED[name], self, link, *([inner] if inner else []))
        finally:
            self.depth -= 1
            self.contexts.pop()

    def may_raise(self, name: str) -> bool:
        """A signal may interrupt the program's own lines as well, whose bookkeeping would then be wrong: so only where
        it finds the driver in a call of the core."""
        frame = self.frame
        while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        while frame is not None and frame.f_code.co_name == "call_traced":
            frame = frame.f_back
        return name == "raise_interrupt" and frame is not None and frame.f_code is type(self).turn_core.__code__

    def in_the_middle(self) -> bool:
        """Whether a message may be half removed from the inbox at this moment."""
        return any(point_of(point).asynchronous or "feed" in point or point == "rest" for point in self.contexts)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.hit("signal", self.subject_of_signal or self.subject)

    def on_alarm(self, number: int, frame: FrameType | None) -> None:
        """The next alarm comes during this one, or some time behind it: what is interrupted goes on in between, however
        slow the machine is."""
        before, alarms = (self.in_alarm, self.frame), self.alarms
        self.in_alarm, self.frame, self.alarms = True, None if self.in_alarm else frame, alarms + 1
        try:
            if not alarms:
                self.set_alarm()
            self.on_signal(number, frame)
        except KeyboardInterrupt:
            self.interrupted = True
            raise
        finally:
            if not alarms:
                self.set_alarm()
            (self.in_alarm, self.frame), self.alarms = before, alarms

    def set_alarm(self) -> None:
        if self.is_storming:
            signal.setitimer(signal.ITIMER_REAL, ALARM)

    def on_unraisable(self, what: Any) -> None:
        if not isinstance(what.exc_value, Hostile | KeyboardInterrupt):
            self.complain(f"unraisable: {what.exc_value!r} in {what.object!r}")
        self.hit("unraisable", self.subject_of_unraisable)

    def on_collection(self, phase: str, about: dict[str, int]) -> None:
        """As gc.callbacks has it. A finaliser might run anywhere; here each start in the core is a point."""
        frame = sys._getframe(1)
        in_core = frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name == "call_traced"
        if phase == "start" and self.collects and in_core:
            self.hit("collection", self.subject)

    def traced(self, frame: FrameType, event: str, argument: object) -> Any:
        """As sys.settrace calls it: where muxcore's own Python is run, look at each instruction."""
        if event == "opcode":
            last, self.last = self.last, (frame, dis.opname[frame.f_code.co_code[frame.f_lasti]])
            if last[0] is frame and last[1].startswith(QUIET):
                return self.traced
            before = self.in_alarm, self.frame
            self.in_alarm = True
            self.frame = frame if last[0] is frame and last[1].startswith(CHECKED) else None
            try:
                self.hit(self.traces, self.subject)
                if frame.f_code.co_qualname == self.traced_function:
                    self.hit(f"{self.traces}:{self.traced_function}", self.subject)
            finally:
                self.in_alarm, self.frame = before
        elif INSTRUCTIONS[self.traces] in frame.f_code.co_filename:
            frame.f_trace_opcodes = True
        else:
            return None
        return self.traced

    # -- what connections do

    def serve(self, link: Link, message: Any) -> None:
        """Reply to a message, and do the steps that reach the scenario's points."""
        link.count += 1
        if isinstance(message, list):
            self.kept.append(message)  # so that the interpreter has no lists left to use again
        if link.victim and link.count == 2:
            raise Hostile("a handler")
        if link is self.control:
            link.conn.send(b"#")
            return
        self.send(link)
        if self.scenario.anywhere or link is self.subject:
            for name in self.steps:
                if link.conn is not None and (link.framing == "custom" or name not in ("reframe",)):
                    self.attempt(name, STEPS[name], self, link)

    def drop_garbage(self) -> None:
        """Forget a cycle, at a moment when the very next object that the collector tracks makes it run."""
        if self.collects:
            self.kept += [[] for _ in range(80)]  # the interpreter would make the core's of those that it keeps
        if self.garbage:
            for _ in range(1000 if self.scenario.gc else 0):
                if gc.get_count()[0] >= gc.get_threshold()[0]:
                    break
                self.kept.append([])
            self.garbage.pop()

    def new_out(self, link: Link) -> Out:
        out = Out(b"%s%06d" % (link.tag.lower().encode(), next(link.numbers)))
        link.outs.append(out)
        return out

    def send(self, link: Link, method: str = "send", wrap: Callable[[Any, bytes], Any] | None = None) -> None:
        if link.conn is None:
            return
        self.sends += 1
        number = self.sends
        out = self.new_out(link)
        framer = self.framer_of(link)
        payload = out.atom if method == "write" else payload_for(framer, out.atom)
        if wrap is not None:
            payload = wrap(framer, payload)
        refused = link.refuses()
        elsewhere = threading.get_ident() != self.thread
        self.refused = None
        try:
            getattr(link.conn, method)(payload)
        except (muxcore.OutboxFull, OSError):
            return
        except (TypeError, ValueError) as error:
            if type(self.framer_of(link)) is type(framer):
                self.complain(f"{method} raised {error!r}")
            return
        finally:
            out.loose = elsewhere or self.sends != number
        if refused or (self.refused is link and not out.loose):
            out.certain = None if link.ended_elsewhere else False
        elif not link.refuses():
            out.certain = None if elsewhere else True

    def send_each(self, link: Link, method: str, point: str) -> None:
        """send_many or writelines of an iterable that hits a point before and after each."""
        if link.conn is None:
            return
        self.sends += 1
        outs: list[Out] = []

        def atoms() -> Iterator[Any]:
            for _ in range(2):
                self.hit(point, link)
                out = self.new_out(link)
                outs.append(out)
                if link.refuses() and not link.ended_elsewhere:
                    out.certain = False
                yield out.atom if method == "writelines" else payload_for(self.framer_of(link), out.atom)
            self.hit(point, link)

        framer = self.framer_of(link)
        try:
            getattr(link.conn, method)(atoms())
        except (TypeError, ValueError) as error:
            if type(self.framer_of(link)) is type(framer):
                self.complain(f"{method} raised {error!r}")
            return
        if not link.refuses():
            for out in outs:
                out.certain = True

    def broadcast(self, link: Link | None) -> None:
        self.broadcasts += 1
        plain = [one for one in self.links if one.conn is not None]
        plain = [one for one in plain if not isinstance(self.framer_of(one), muxcore.Resp | muxcore.Fixed)]

        def connections() -> Iterator[Any]:
            for one in plain:
                self.hit("iterable_broadcast", link)
                yield one.conn

        try:
            self.mux.broadcast(connections(), b"%s%06d" % (BROADCAST.encode(), self.broadcasts))
        except (TypeError, ValueError) as error:
            if not any(isinstance(self.framer_of(one), muxcore.Resp | muxcore.Fixed) for one in plain):
                self.complain(f"broadcast raised {error!r}")

    def timer(self, delay: float, point: str, link: Link | None) -> Timer:
        timer = Timer()

        def fired() -> None:
            timer.fired += 1
            self.hit(point, link)

        timer.handle = self.mux.call_later(delay, fired)
        self.timers.append(timer)
        return timer

    def call_soon(self, point: str, link: Link | None) -> None:
        call = Timer()

        def called() -> None:
            call.fired += 1
            self.hit(point, link)

        self.mux.call_soon(called)
        self.timers.append(call)

    def submit(self, point: str, link: Link) -> None:
        """The executor of the standard library has a lock that a signal handler must not meet."""
        if self.submitting or self.starting:
            return
        self.submitting = True
        try:
            self.futures.append(self.mux.run_in_executor(None, int, on_done=lambda _: self.hit(point, link)))
        finally:
            self.submitting = False

    def watch(self, link: Link) -> None:
        ours, theirs = socket.socketpair()
        self.sockets += [ours, theirs]
        mux = self.mux

        def readable() -> None:
            try:
                mux.remove_reader(ours)
            except RuntimeError:
                if not mux.closed:  # by a signal handler amid this
                    raise
            self.hit("reader", link)

        mux.add_reader(ours, readable)
        theirs.send(b"x")

    def end(self, link: Link, how: str) -> None:
        """close() or abort(), noted in the model."""
        if link.conn is None:
            return
        if threading.get_ident() != self.thread:  # a finaliser may run in any
            link.allowed_late, link.ended_elsewhere = 1 << 30, True
        getattr(link.conn, how)()
        link.begin_end(how)
