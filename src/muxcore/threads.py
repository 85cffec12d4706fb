"""What may live here: Threaded, which hands the messages of a handler to threads."""

from __future__ import annotations

import os
from _thread import allocate_lock
from collections import deque
from functools import partial
from itertools import chain

from ._config import check_int
from ._typing import TYPE_CHECKING
from .handler import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from threading import Lock
    from typing import Any

    from ._epoll import Connection
    from ._mux import Mux
    from ._pool import Pool
    from ._protocols import HandlerLike
    from .handler import Callbacks

    Callback = Callable[..., object] | None


class Threaded:
    """A handler whose messages are handled in a pool of threads, where it may block (on a database, for example).

    Messages of one connection are handled in order, one at a time; messages of different connections in parallel.
    `on_open`, `on_drain`, `on_eof`, `on_error` and `on_close` are called in the Mux's thread: `on_eof` after the last
    message is handled, `on_close` at once. So one message may still be in a thread at `on_close`, but none starts after
    it. `Mux.drain` waits for messages in threads; the interpreter's exit does not. A handler that raises closes its
    connection.

    handler: as for `Mux.listen`. In `on_message` or `on_messages` it may use `conn.send`, `conn.send_many`,
        `conn.write`, `conn.writelines`, `conn.close` and `conn.abort`, and `mux.call_soon_threadsafe` for everything
        else.
    threads: the number of threads, and so of messages that are handled at once.
    queue: a connection with more waiting messages is not read. That pause is separate from `pause_reading`: neither
        ends the other.

    Raises TypeError or ValueError for a bad argument.
    """

    def __init__(self, handler: HandlerLike, *, threads: int = 8, queue: int = 64) -> None:
        from ._pool import Pool as Threads  # it imports concurrent.futures

        callbacks = resolve(handler)
        if callbacks.on_message is None and callbacks.on_messages is None:
            raise TypeError("handler must have on_message or on_messages: there is nothing to do in threads")
        threads = check_int("threads", threads, 1)
        self._callbacks: Callbacks = callbacks
        self._queue: int = check_int("queue", queue, 1)
        self._pool: Pool = Threads(threads, "muxcore.Threaded")
        self._came: dict[Connection, list[Any]] = {}  # messages that are in no Work yet
        # None where the handler has no such method: a Mux treats a missing callback differently.
        self.on_messages: Callback = None if callbacks.on_messages is None else self._on_messages
        self.on_open: Callback = callbacks.on_open
        self.on_drain: Callback = callbacks.on_drain
        self.on_eof: Callback = callbacks.on_eof
        self.on_error: Callback = callbacks.on_error

    # An interrupt comes behind a call, or at the entry of a function. So each message is in a table before the first
    # call here.

    def on_message(self, conn: Connection, message: Any) -> None:
        if conn in self._came:
            self._came[conn] += (message,)
        else:
            self._came[conn] = [message]
        try:
            self._offload(conn)
        except BaseException:
            conn.mux._soon.append((self._offload, (conn,)))  # at once: there may be another interrupt
            self._offload_later(conn)
            raise

    def _on_messages(self, conn: Connection, messages: list[Any]) -> None:
        if conn in self._came:
            self._came[conn] += messages
        else:
            self._came[conn] = [*messages]
        try:
            self._offload(conn)
        except BaseException:
            conn.mux._soon.append((self._offload, (conn,)))  # at once: there may be another interrupt
            self._offload_later(conn)
            raise

    def on_close(self, conn: Connection, exc: BaseException | None) -> None:
        self._came.pop(conn, None)
        conn.mux._offloaded.pop(conn, None)
        if self._callbacks.on_close is not None:
            self._callbacks.on_close(conn, exc)

    def _offload(self, conn: Connection) -> None:
        work = self._take(conn)
        if work is not None:
            self._start(work)
            if len(work.waiting) > self._queue:
                conn.mux._hold(conn, True)

    def _offload_later(self, conn: Connection) -> None:
        conn.mux._soon.append((surely(conn.mux, self._offload, conn), ()))
        self._take(conn)  # now: else the connection has no work in threads, and may be at its EOF

    def _take(self, conn: Connection) -> Work | None:
        """What there is to do for this connection, with all that came; None if that is nothing, or it has ended."""
        work: Work | None = conn.mux._offloaded.get(conn)
        if work is None and conn in self._came:
            work = conn.mux._offloaded[conn] = Work(conn, self._go_on)
        if work is not None:  # in one call, which an interrupt cannot divide
            work.waiting.extend(chain.from_iterable(map(self._came.pop, (conn,), ((),))))
        return work

    # A connection has one job at a time, which handles the messages that wait when it begins. Only the Mux's thread
    # starts the next job, so a connection that keeps sending keeps no thread from the others. An interrupt may come at
    # any point there, so that a job is begun twice, or ends twice: the lock lets only one of them work, and each step
    # looks at what there is to do.

    def _start(self, work: Work) -> None:
        if work.job is None or work.job.done():
            work.job = self._pool.submit(self._run, work)

    def _run(self, work: Work) -> None:
        """In a thread of the pool."""
        if not work.busy.acquire(blocking=False):
            return
        try:
            if work.error is None:  # else its connection is about to end
                self._handle(work)
        except BaseException as error:
            work.error = error
        runs = work.runs = work.runs + 1
        work.busy.release()
        self._notify(work, runs)

    def _notify(self, work: Work, runs: int) -> None:
        """Have the Mux's thread call _ended(), after it has handled what this thread sent."""
        try:
            mux = work.conn.mux
            mux.call_soon_threadsafe(surely(mux, self._ended, work, runs))
        except RuntimeError:
            pass  # the Mux was closed meanwhile

    def _handle(self, work: Work) -> None:
        on_message, on_messages = self._callbacks.on_message, self._callbacks.on_messages
        conn, waiting = work.conn, work.waiting
        count, process = len(waiting), os.getpid()
        while count and not conn.closing and os.getpid() == process:  # else it is a child that the handler has forked
            if on_messages is not None:
                on_messages(conn, [waiting.popleft() for _ in range(count)])
                return
            assert on_message is not None
            on_message(conn, waiting.popleft())
            count -= 1

    # In the Mux's thread again:

    def _ended(self, work: Work, runs: int) -> None:
        work.job = None
        if runs > work.seen:  # else this is called again, after an interrupt
            work.seen = runs
        self._go_on(work)

    def _go_on(self, work: Work) -> None:
        """Do what is next for this connection."""
        conn = work.conn
        if work.busy.locked():
            return
        if work.seen != (runs := work.runs):  # the last run's sends are still queued: continue after them
            self._notify(work, runs)
            return
        error = work.error
        if error is not None:  # and so nothing else is handled until it is None
            if isinstance(error, Exception):
                conn.mux._fail(conn, error)
            work.error = None
        if conn.mux._offloaded.get(conn) is work:
            if work.waiting and not conn.closing:
                self._start(work)
            else:
                work.finish()
        if error is not None and not isinstance(error, Exception):
            raise error  # SystemExit and the like end the loop, as from any callback


class Work:
    """What one connection has in the pool; it lives while there is something."""

    __slots__ = ("busy", "closing", "conn", "error", "go_on", "job", "runs", "seen", "waiting")

    def __init__(self, conn: Connection, go_on: Callable[[Work], None]) -> None:
        self.conn: Connection = conn
        self.go_on: Callable[[Work], None] = go_on
        self.waiting: deque[Any] = deque()
        self.busy: Lock = allocate_lock()  # held by the thread that handles its messages
        self.job: Future[None] | None = None
        self.error: BaseException | None = None  # what the handler raised there
        self.closing: bool = False
        self.runs: int = 0  # how often a thread has handled messages
        self.seen: int = 0  # how many of these runs the Mux's thread has been notified of

    def close(self) -> None:
        """Close the connection after the last message that has come; see Mux.drain."""
        self.closing = True
        self.conn.mux._hold(self.conn, True)
        # In case nothing is in a thread any more:
        self.conn.mux._soon.append((surely(self.conn.mux, self.go_on, self), ()))

    def finish(self) -> None:
        if self.closing:
            self.conn.close()
        self.conn.mux._hold(self.conn, False)
        self.conn.mux._take_back(self.conn)


def surely(mux: Mux, fn: Callable[..., None], *args: Any) -> Callable[[], None]:
    """The call fn(*args), for the Mux's queues. An interrupt, or whatever else ends it, makes the Mux call it again.

    That includes an interrupt at its beginning. At the entry of a function nothing can catch one, and what was taken
    from a queue would be lost. But where a generator goes on, its `try` has begun already.
    """
    calls = _calls(mux, fn, args)
    next(calls)
    return partial(next, calls, None)


def _calls(mux: Mux, fn: Callable[..., None], args: tuple[Any, ...]) -> Iterator[None]:
    try:
        yield
        fn(*args)
    except GeneratorExit:  # it is forgotten
        raise
    except BaseException:
        again: Any = (fn, args)
        try:
            again = (surely(mux, fn, *args), ())
        finally:
            mux._soon.append(again)
        raise
