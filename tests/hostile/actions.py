"""What may live here: the actions: what user code does at a point. `link` is the connection whose point it is.

An action may raise what a method raises for a good reason (world.attempt lists it); anything else is a finding.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
from collections.abc import Callable
from logging import Handler as LogHandler
from logging import LogRecord, getLogger
from typing import TYPE_CHECKING, Any

import muxcore

from .model import Hostile, Link
from .workload import SPECS, Base, Finalised

if TYPE_CHECKING:
    from .world import World

Action = Callable[..., object]
ACTIONS: dict[str, Action] = {}
RAISING = ("raise_exception", "raise_interrupt")
WRAPPERS = ("signal", "cycle", "log")  # which do another action, named behind ">"
STREAM = ("none", "lines", "delimiter", "fixed", "inline")  # framings that read each other's bytes


def action(function: Action) -> Action:
    ACTIONS[function.__name__] = function
    return function


def everywhere(name: str, do: Callable[[World, Link], object], elsewhere: bool = True, on_all: bool = False) -> None:
    """The same action on the connection of the point, on another one, on all."""
    ACTIONS[f"{name}_here"] = do
    if elsewhere:
        ACTIONS[f"{name}_other"] = lambda world, link: do(world, world.other(link))
    if on_all:
        ACTIONS[f"{name}_all"] = lambda world, link: [do(world, one) for one in world.with_connection()]


# --- the end of connections ------------------------------------------------------------------------


def detach(world: World, link: Link) -> None:
    if link.conn is None:
        return
    sock = link.conn.detach()
    link.begin_end("detach")
    world.sockets.append(sock)
    link.detached = sock


def write_eof(world: World, link: Link) -> None:
    if link.conn is not None:
        link.conn.write_eof()
        link.shut = True


everywhere("close", lambda world, link: world.end(link, "close"), on_all=True)
everywhere("abort", lambda world, link: world.end(link, "abort"), on_all=True)
everywhere("detach", detach, on_all=True)
everywhere("write_eof", write_eof)


@action
def close_listeners(world: World, link: Link) -> None:
    for listener in world.listeners:
        listener.close()
    subject = world.subject
    if subject is not None and subject.to_accept:  # its framer's factory, too, may close them
        subject.begin_end("unaccepted")  # unless its client was accepted just now, and on_open follows


@action
def close_datagram(world: World, link: Link) -> None:
    world.datagram.close()


@action
def close_mux(world: World, link: Link) -> None:
    world.mux.close()
    world.mux_closed = True
    for one in world.links:
        one.begin_end("mux")


@action
def stop(world: World, link: Link) -> None:
    world.mux.stop()


# --- output ----------------------------------------------------------------------------------------


def sendfile(world: World, link: Link) -> None:
    if link.conn is not None:
        link.conn.sendfile(world.file, 0, 7)


def send_long(world: World, link: Link) -> None:
    """Enough to be kept by reference, and to be above the high-water mark."""
    if link.conn is not None:
        link.conn.write(b"\n" * 100_000)


def flush(world: World, link: Link) -> None:
    if link.conn is not None:
        link.conn.flush()


everywhere("send", lambda world, link: world.send(link), on_all=True)
everywhere("write", lambda world, link: world.send(link, "write"))
everywhere("send_many", lambda world, link: world.send_each(link, "send_many", "nothing"))
everywhere("writelines", lambda world, link: world.send_each(link, "writelines", "nothing"))
everywhere("sendfile", sendfile, elsewhere=False)
everywhere("send_long", send_long)
everywhere("flush", flush)


@action
def send_reply(world: World, link: Link) -> None:
    """On another connection that speaks RESP, whose replies are put together elsewhere than bytes."""
    for one in world.links:
        if one is not link and one.conn is not None and isinstance(world.framer_of(one), muxcore.Resp):
            world.send(one)
            return


@action
def broadcast(world: World, link: Link) -> None:
    world.broadcast(None)


# --- settings --------------------------------------------------------------------------------------


def framer(world: World, link: Link) -> None:
    """One that can read the same bytes."""
    if link.conn is None or link.framing in ("prefix", "resp"):
        return
    link.reframed = True
    link.conn.framer = SPECS[world.random.choice(STREAM)]


def own_framer(world: World, link: Link) -> None:
    if link.conn is not None and link.framing not in ("prefix", "resp"):
        link.reframed = True
        link.conn.framer = link.factory


def same_framer(world: World, link: Link) -> None:
    if link.conn is not None:
        link.conn.framer = link.conn.framer


def limits(world: World, link: Link) -> None:
    if link.conn is not None:
        link.bounded = True
        overflow: Any = world.random.choice(["close", "drop", "raise"])
        link.conn.limits = muxcore.Limits(high=50, low=10, max_outbox=300, max_inbox=20, overflow=overflow)


def timeouts(world: World, link: Link) -> None:
    if link.conn is not None:
        link.conn.set_timeouts(idle=5.0, write=3.0, linger=0.5)


everywhere("framer", framer)
everywhere("own_framer", own_framer)
everywhere("same_framer", same_framer, elsewhere=False)
everywhere("limits", limits)
everywhere("timeouts", timeouts)


# --- input -----------------------------------------------------------------------------------------


def pause(world: World, link: Link) -> None:
    if link.conn is not None:
        link.conn.pause_reading()
        link.paused, link.late = True, 0


def resume(world: World, link: Link) -> None:
    if link.conn is not None:
        link.paused = False
        link.conn.resume_reading()


def pause_resume(world: World, link: Link) -> None:
    pause(world, link)
    resume(world, link)


def recv(world: World, link: Link) -> None:
    if link.conn is not None:
        link.reentrant = link.reentrant or world.in_the_middle()
        message = link.conn.recv()
        if message is not None:
            link.on_message(message)


def recv_all(world: World, link: Link) -> None:
    if link.conn is not None:
        link.reentrant = link.reentrant or world.in_the_middle()
        ended = link.end or link.held()
        link.on_messages(link.conn.recv_all(), ended)


def unread(world: World, link: Link) -> None:
    if link.conn is not None:
        _ = link.conn.unread, link.conn.inbox_size, link.conn.outbox_size, link.conn.is_reading(), repr(link.conn)


everywhere("pause", pause, on_all=True)
everywhere("resume", resume, on_all=True)
everywhere("pause_resume", pause_resume, elsewhere=False)
everywhere("recv", recv)
everywhere("recv_all", recv_all)
everywhere("unread", unread)


# --- sockets and calls -----------------------------------------------------------------------------


@action
def sockets(world: World, link: Link) -> None:
    """They get the numbers of descriptors that were just closed."""
    world.sockets += [socket.socket() for _ in range(20)]


@action
def abort_and_replace(world: World, link: Link) -> None:
    """Another connection gets the number of this one's descriptor, perhaps in the same batch of events."""
    world.end(link, "abort")
    attach(world, link)


@action
def attach(world: World, link: Link) -> None:
    if len(world.links) < 20:
        world.new_link(world.random.choice(["message", "messages"]), world.random.choice(["none", "custom", "inline"]))


@action
def listen(world: World, link: Link) -> None:
    world.listeners.append(world.mux.listen(("127.0.0.1", 0), Base(world)))


@action
def connect(world: World, link: Link) -> None:
    if len(world.links) < 20 and not world.listeners[0].closed:
        one = world.bare_link("message")
        one.outbound = True
        one.conn = world.mux.connect(world.listeners[0].address, Base(world, one))


@action
def datagram(world: World, link: Link) -> None:
    """The buffers of recvmmsg grow."""
    sock = world.mux.datagram(("127.0.0.1", 0), lambda *_: None, max_size=1 << 20)
    sock.send(b"x", sock.address)
    if world.random.random() < 0.5:
        sock.close()


@action
def datagram_send(world: World, link: Link) -> None:
    world.datagram.send(b"y", world.datagram.address)


@action
def timers_200(world: World, link: Link) -> None:
    """Enough cancelled ones for the heap to be swept, among living ones."""
    made = [world.timer(0.0005 * (i % 2), "nothing", None) for i in range(200)]
    for timer in made[:190]:
        timer.handle.cancel()


@action
def timer(world: World, link: Link) -> None:
    world.timer(0.0, "nothing", None)


@action
def call_soon(world: World, link: Link) -> None:
    world.call_soon("nothing", link)
    world.mux.call_soon_threadsafe(world.hit, "nothing", link)


@action
def watch(world: World, link: Link) -> None:
    world.watch(link)


@action
def executor(world: World, link: Link) -> None:
    world.submit("nothing", link)


@action
def replace_data(world: World, link: Link) -> None:
    if link.conn is not None:
        link.conn.data = None


@action
def look_around(world: World, link: Link) -> None:
    _ = list(world.mux.connections), world.mux.stats(), repr(world.mux), [repr(one.conn) for one in world.links]


# --- the interpreter and the process ---------------------------------------------------------------


@action
def collect(world: World, link: Link) -> None:
    gc.collect(1)


@action
def fork(world: World, link: Link) -> None:
    """The child may not use the Mux, and whatever it does, the parent notices nothing."""
    if world.forking:
        return  # in a callback of os.fork(): logging's own lock is held
    world.forking = True
    try:
        child = os.fork()
    finally:
        world.forking = False
    if child == 0:
        code = 1
        try:
            world.mux.call_soon(print)
        except RuntimeError:
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        world.complain(f"in a forked child the Mux could be used: status {status}")


@action
def raise_exception(world: World, link: Link) -> None:
    raise Hostile("an action")


@action
def raise_interrupt(world: World, link: Link) -> None:
    raise KeyboardInterrupt("an action")


@action
def poll(world: World, link: Link) -> None:
    """Inside a callback it must be refused."""
    if not world.in_poll or world.in_alarm or "collection" in world.contexts:
        return  # a signal, or a collection, may come before poll() has begun
    try:
        world.mux.poll(0)
    except RuntimeError:
        return
    world.complain("poll() inside poll() went on")


@action
def steal_signal(world: World, link: Link) -> None:
    """The user replaces the Mux's signal handler, and the Mux must not restore the one before it."""
    handler = world.stolen[signal.SIGUSR2] = lambda *_: None
    signal.signal(signal.SIGUSR2, handler)


def in_a_thread(world: World, function: Callable[[], object]) -> None:
    if world.starting or world.submitting:
        return  # in a signal handler amid Thread.start() or join(): threading's own lock is held
    thread = threading.Thread(target=lambda: world.guard(function))
    # A signal handler or a collection may have come amid a step for which the fallback holds its lock: to wait there
    # for a thread that needs it would be the program's own deadlock.
    collected = not {"collection", "cycle"}.isdisjoint(world.contexts)
    amid = world.in_alarm or (collected and world.scenario.backend != "epoll")
    world.starting = True
    try:
        thread.start()
        thread.join(5 if not amid else 0)
        if thread.is_alive() and not amid:
            world.complain("another thread waits for the Mux's")
    finally:
        world.starting = False


everywhere("thread_send", lambda world, link: in_a_thread(world, lambda: world.send(link)))


def thread_end(world: World, link: Link, how: str) -> None:
    """It takes effect in the Mux's turn: what is being delivered may still come."""
    if link.conn is not None:
        link.allowed_late, link.ended_elsewhere = 1 << 30, True
        in_a_thread(world, getattr(link.conn, how))
        link.begin_end(how)


everywhere("thread_close", lambda world, link: thread_end(world, link, "close"))
everywhere("thread_abort", lambda world, link: thread_end(world, link, "abort"))


@action
def thread_call(world: World, link: Link) -> None:
    in_a_thread(world, lambda: world.mux.call_soon_threadsafe(world.hit, "nothing", link))


# --- actions that do another one -------------------------------------------------------------------


def do_inner(world: World, link: Link, inner: str) -> None:
    world.attempt(inner, ACTIONS[inner], world, link)


@action
def signal_(world: World, link: Link, inner: str) -> None:
    """In a signal handler, which runs between two lines of Python."""
    before = signal.signal(signal.SIGUSR1, lambda *_: do_inner(world, link, inner))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


ACTIONS["signal"] = ACTIONS.pop("signal_")


@action
def cycle(world: World, link: Link, inner: str) -> None:
    """In the finaliser of a cycle, which the collector runs at some later allocation."""

    class Late(Finalised):
        def __del__(self) -> None:
            if self.world.active:
                self.world.contexts.append("cycle")
                try:
                    do_inner(self.world, self.link, inner)
                finally:
                    self.world.contexts.pop()

    late = Late(world, link, "", cycle=True)
    if world.random.random() < 0.5:
        world.garbage.append(late)  # to be dropped behind the handler


@action
def log(world: World, link: Link, inner: str) -> None:
    """In a handler of the logger."""

    class Tap(LogHandler):
        def emit(self, record: LogRecord) -> None:
            logger.removeHandler(self)
            do_inner(world, link, inner)

    logger = getLogger("muxcore")
    logger.addHandler(Tap())
    try:
        logger.error("an action")
    except (Hostile, KeyboardInterrupt):
        pass


# --- mistakes that a test plants, to see that they are found ---------------------------------------

PLANTED: dict[str, Action] = {
    "plant_crash": lambda world, link: os.abort(),
    "plant_hang": lambda world, link: threading.Event().wait(),
    "plant_loss": lambda world, link: link.conn.recv_all(),
    "plant_double": lambda world, link: link.on_message(b"%s000000" % link.tag.encode()),
    "plant_foreign": lambda world, link: world.other(link).conn.write(b"%s000000" % link.tag.lower().encode()),
    "plant_descriptor": lambda world, link: os.open(os.devnull, os.O_RDONLY),
    "plant_wakeup": lambda world, link: signal.set_wakeup_fd(world.datagram.fileno()),
}
