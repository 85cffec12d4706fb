"""What may live here: user code: handlers, framers and objects that hit points, and the steps that reach them."""

from __future__ import annotations

import signal
import socket
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import muxcore
from muxcore._wire import Wire

from .model import Hostile

if TYPE_CHECKING:
    from .model import Link
    from .world import World

SPECS: dict[str, Any] = {
    "none": None,
    "lines": muxcore.Lines(100),
    "delimiter": muxcore.Delimiter(b"\n", max_size=100),
    "fixed": muxcore.Fixed(8),
    "prefix": muxcore.LengthPrefix(1, max_size=100),
    "resp": muxcore.Resp(),
    "inline": muxcore.Resp(),
}

# What a peer sends that is no message. Without a framer everything is one, and so it is with Fixed until the end.
MALFORMED = {
    "none": b"",
    "fixed": b"",
    "lines": b"." * 200,
    "delimiter": b"." * 200,
    "prefix": b"\xff",
    "resp": b"*1\r\n+1\r\n",
    "inline": b'"1\n',
    "custom": b"?\n",
}


def wire(framing: str, atom: bytes) -> bytes:
    """An atom as the peer sends it."""
    if framing == "prefix":
        return bytes([len(atom)]) + atom
    if framing == "resp":
        return b"*2\r\n$7\r\n%b\r\n$1\r\n1\r\n" % atom
    if framing == "inline":
        return b'%b "1 2" 3\n' % atom
    return atom + b"\n"


# --- a framer --------------------------------------------------------------------------------------


class Message(bytes):
    """A message that notices when it goes."""

    world: World
    link: Link

    def __del__(self) -> None:
        self.world.messages -= 1
        self.world.hit("del_message", self.link)


class Lines:
    """A user's framer, which loses nothing to an exception: a line that was removed and not handed out is put back."""

    def __init__(self, world: World, link: Link) -> None:
        self.world, self.link = world, link
        self.buffer = b""
        world.hit("factory", link)

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.buffer += data
        self.world.hit("feed_before", self.link)
        while b"\n" in self.buffer:
            if self.buffer.startswith(MALFORMED["custom"]):
                raise muxcore.FrameError("a framer")
            line, self.buffer = self.buffer.split(b"\n", 1)
            message = Message(line)
            message.world, message.link = self.world, self.link
            self.world.messages += 1
            try:
                self.world.hit("feed_found", self.link)
            except BaseException:
                self.buffer = line + b"\n" + self.buffer
                raise
            yield message
            del message
            self.world.hit("feed_between", self.link)
        self.world.hit("feed_after", self.link)

    def encode(self, message: bytes) -> bytes:
        self.world.hit("encode", self.link)
        return bytes(message) + b"\n"

    def rest(self) -> bytes:
        rest = self.buffer
        self.world.hit("rest", self.link)  # what it reads now is in `rest`, too: the core has to read `rest` again
        return rest

    def __del__(self) -> None:
        self.world.hit("del_framer", self.link)


# --- a wire ---------------------------------------------------------------------------------------


class PlainWire(Wire):
    """Changes nothing. Bytes leave a list in the line of code in which they are kept, as in every wire."""

    __slots__ = ("link", "world")

    def __init__(self, world: World, link: Link) -> None:
        super().__init__()
        self.world, self.link = world, link

    def hit(self, point: str) -> None:
        try:
            self.world.hit(point, self.link)
        except Exception:
            self.link.begin_end("wire")
            self.link.lossy = "wire"
            self.link.allowed_late = 1 << 30  # what came before is delivered
            raise

    def advance(self) -> None:
        self.hit("wire_advance")
        self.plain += self.received
        self.received = []
        self.opened = True

    def encrypt(self) -> None:
        self.hit("wire_encrypt")
        data = b"" if self.given is None else bytes(self.given)
        self.output += (data,)
        self.given = None

    def finish(self) -> None:
        self.hit("wire_finish")

    def eof(self) -> None:
        self.hit("wire_eof")


# --- handlers --------------------------------------------------------------------------------------


class Base(muxcore.Handler):
    def __init__(self, world: World, link: Link | None = None) -> None:
        self.world, self.link = world, link

    def of(self, conn: Any) -> Link:
        return self.link or self.world.accepted(conn)

    def on_open(self, conn: Any) -> None:
        link = self.of(conn)
        link.on_open(conn)
        with self.world.callback(link):
            self.world.hit("on_open", link)

    def on_drain(self, conn: Any) -> None:
        with self.world.callback(self.of(conn)):
            self.world.hit("on_drain", self.of(conn))

    def on_eof(self, conn: Any) -> None:
        link = self.of(conn)
        link.eofs += 1
        if link.eofs > 1:
            link.complain("on_eof twice")
        with self.world.callback(link):
            self.world.hit("on_eof", link)
            self.world.end(link, "close")

    def on_error(self, conn: Any, exc: BaseException) -> None:
        link = self.of(conn)
        link.on_error(conn, exc)
        with self.world.callback(link):
            self.world.hit("on_error", link)
            self.world.send(link)

    def on_close(self, conn: Any, exc: BaseException | None) -> None:
        link = self.of(conn)
        link.on_close(exc)
        self.world.hit("on_close", link)


class OneByOne(Base):
    def on_message(self, conn: Any, message: Any) -> None:
        link = self.of(conn)
        link.on_message(message)
        with self.world.callback(link):
            self.world.hit("on_message", link)
            self.world.serve(link, message)
            link.refuse()
        self.world.drop_garbage()  # last: the next allocation, which may run the collector, is the core's


class Batches(Base):
    def on_messages(self, conn: Any, messages: list[Any]) -> None:
        link = self.of(conn)
        link.on_messages(messages, link.end or link.held())
        with self.world.callback(link):
            self.world.hit("on_messages", link)
            for message in messages:
                self.world.serve(link, message)
            link.refuse()
        self.world.drop_garbage()


HANDLERS = {"message": OneByOne, "messages": Batches}


# --- objects ---------------------------------------------------------------------------------------


class Finalised:
    """Hits a point when it goes; in a cycle, when the collector runs."""

    def __init__(self, world: World, link: Link, point: str, cycle: bool = False) -> None:
        self.world, self.link, self.point = world, link, point
        self.me = self if cycle else None

    def __del__(self) -> None:
        self.world.hit(self.point, self.link)


class Unraisable:
    def __del__(self) -> None:
        raise Hostile("in __del__")


class Error(muxcore.RespError):
    def __init__(self, world: World, link: Link) -> None:
        super().__init__("1")
        self.world, self.link = world, link

    def __str__(self) -> str:
        self.world.hit("reply_str", self.link)
        return "1 2 3"


class Reply(list[Any]):
    world: World
    link: Link

    def __iter__(self) -> Iterator[Any]:
        self.world.hit("reply_iter", self.link)
        return super().__iter__()

    def __len__(self) -> int:
        self.world.hit("reply_len", self.link)
        return super().__len__()


class Host(str):
    """A part of an address."""

    world: World
    link: Link

    def __hash__(self) -> int:
        self.world.hit("address_hash", self.link)
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        self.world.hit("address_eq", self.link)
        return super().__eq__(other)


class File:
    def __init__(self, world: World, link: Link, fd: int) -> None:
        self.world, self.link, self.fd = world, link, fd

    def fileno(self) -> int:
        self.world.hit("sendfile_fileno", self.link)
        return self.fd


class Buffer:
    """Bytes-like since CPython 3.12."""

    def __init__(self, world: World, link: Link, data: bytes) -> None:
        self.world, self.link, self.data = world, link, data

    def __buffer__(self, flags: int) -> memoryview:
        self.world.hit("buffer", self.link)
        return memoryview(self.data)


# --- what is done for each message -----------------------------------------------------------------

Step = Callable[["World", "Link"], object]
STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


@step
def send_many(world: World, link: Link) -> None:
    world.send_each(link, "send_many", "iterable_send_many")


@step
def writelines(world: World, link: Link) -> None:
    world.send_each(link, "writelines", "iterable_writelines")


@step
def broadcast(world: World, link: Link) -> None:
    world.broadcast(link)


@step
def evil_reply(world: World, link: Link) -> None:
    reply = Reply([b"", Error(world, link)])
    reply.world, reply.link = world, link

    def among_others(framer: Any, payload: Any) -> Any:
        return [*payload, reply, Error(world, link), 4] if isinstance(framer, muxcore.Resp) else payload

    world.send(link, wrap=among_others)


@step
def buffer(world: World, link: Link) -> None:
    world.send(link, "write", wrap=lambda _, atom: Buffer(world, link, atom))


@step
def sendfile(world: World, link: Link) -> None:
    link.conn.sendfile(File(world, link, world.file), 0, 3)


@step
def datagram(world: World, link: Link) -> None:
    host, port = world.datagram.address
    evil = Host(host)
    evil.world, evil.link = world, link
    world.datagram.send(b"d%d" % link.count, (evil, port))


@step
def data(world: World, link: Link) -> None:
    link.conn.data = Finalised(world, link, "del_data")


@step
def weakref_(world: World, link: Link) -> None:
    noticed = Finalised(world, link, "nothing")
    world.kept.append(weakref.ref(noticed, lambda _: world.hit("weakref", link)))
    link.conn.data = noticed


STEPS["weakref"] = STEPS.pop("weakref_")


@step
def cycle(world: World, link: Link) -> None:
    link.conn.data = None
    world.garbage.append(Finalised(world, link, "cycle", cycle=True))


@step
def unraisable(world: World, link: Link) -> None:
    world.subject_of_unraisable = link
    link.conn.data = Unraisable()


@step
def reframe(world: World, link: Link) -> None:
    link.conn.framer = link.factory


@step
def rest(world: World, link: Link) -> None:
    _ = link.conn.unread, link.conn.inbox_size


@step
def burst(world: World, link: Link) -> None:
    if not link.refuses() and link.count == 2:
        link.conn.set_limits(high=4000, low=1000, max_outbox=1 << 20)
        link.conn.write(b"\n" * 400_000)


@step
def half_close(world: World, link: Link) -> None:
    if link.count == 3:
        link.peer.shutdown(socket.SHUT_WR)
        world.mute.add(link)


@step
def malformed(world: World, link: Link) -> None:
    """The peer sends what its framer refuses or, by chance, what the handler does."""
    if link.count != 3:
        return
    if not MALFORMED[link.framing] or world.random.random() < 0.3:
        link.refuses_message = True
    else:
        link.sends_malformed = True  # behind its next messages


@step
def timers(world: World, link: Link) -> None:
    world.timer(0.0, "timer", link)
    world.call_soon("call_soon", link)


@step
def many_timers(world: World, link: Link) -> None:
    """Enough cancelled ones for the heap to be swept, among living ones."""
    if link.count < 4:
        made = [world.timer(0.03, "nothing", None) for _ in range(140)]
        for timer in made[:130]:
            timer.handle.cancel()


@step
def reader(world: World, link: Link) -> None:
    world.watch(link)


@step
def executor(world: World, link: Link) -> None:
    if link.count < 4:
        world.submit("on_done", link)


@step
def mux_signal(world: World, link: Link) -> None:
    if world.stolen:
        return  # the handler that has replaced it stays
    world.mux.add_signal_handler(signal.SIGUSR2, world.hit, "signal_handler", link)
    if not world.gone():  # else it ends the process, as it would without a Mux
        signal.raise_signal(signal.SIGUSR2)


@step
def log(world: World, link: Link) -> None:
    def fail() -> None:
        raise Hostile("in call_soon")

    world.subject_of_log = link
    world.mux.call_soon(fail)


@step
def signal_(world: World, link: Link) -> None:
    world.subject_of_signal = link
    signal.raise_signal(signal.SIGUSR1)


STEPS["signal"] = STEPS.pop("signal_")
