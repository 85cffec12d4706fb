"""What may live here: Threaded, which hands the messages of a handler to threads."""

from __future__ import annotations

from collections import deque
from functools import partial

from ._config import check_int
from ._typing import TYPE_CHECKING
from .handler import resolve

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future
    from typing import Any

    from ._epoll import Connection


class Threaded:
    """A handler whose messages are handled in a pool of threads, where they may block: on a database, say.

    Messages of one connection are handled one after the other, in order; those of several in parallel. `on_open`,
    `on_drain`, `on_eof` and `on_close` are called in the Mux's thread: `on_eof` after the last message is handled;
    `on_close` at once, so that a message may still be in its thread then, but none follows. `Mux.drain` waits for the
    messages that have come. One that raises closes its connection, as elsewhere.

    handler: as for `Mux.listen`. In `on_message` (or `on_messages`) it may use what is for any thread: `conn.send`,
        `conn.write`, `conn.close`, `conn.abort`, and `mux.call_soon_threadsafe` for everything else.
    threads: how many messages may be in work at once.
    queue: a connection with more messages waiting than that is not read from.

    Raises TypeError or ValueError for a bad argument.
    """

    def __init__(self, handler: Any, *, threads: int = 8, queue: int = 64) -> None:
        from concurrent.futures import ThreadPoolExecutor  # it imports logging

        callbacks = resolve(handler)
        if callbacks.on_message is None and callbacks.on_messages is None:
            raise TypeError("handler must have on_message or on_messages: there is nothing to do in threads")
        check_int("threads", threads, 1)
        check_int("queue", queue, 1)
        self._callbacks = callbacks
        self._queue = queue
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="muxcore.Threaded")
        # What is None here is not there: a Mux makes a difference of that.
        self.on_messages = None if callbacks.on_messages is None else self._offload
        self.on_open, self.on_drain, self.on_eof = callbacks.on_open, callbacks.on_drain, callbacks.on_eof

    def on_message(self, conn: Connection, message: Any) -> None:
        self._offload(conn, (message,))

    def on_close(self, conn: Connection, exc: BaseException | None) -> None:
        conn.mux._offloaded.pop(conn, None)
        if self._callbacks.on_close is not None:
            self._callbacks.on_close(conn, exc)

    def _offload(self, conn: Connection, messages: Iterable[Any]) -> None:
        work = conn.mux._offloaded.get(conn)
        if work is None:
            work = conn.mux._offloaded[conn] = Work(conn)
        work.waiting.extend(messages)
        if not work.started:
            self._start(work)
        if len(work.waiting) > self._queue:
            work.paused = True
            conn.pause_reading()

    # One job at a time is in the pool for a connection: what waits when it starts. Only the Mux's thread starts the
    # next, so nothing here needs a lock, and a connection that keeps sending keeps no thread from the others.

    def _start(self, work: Work) -> None:
        work.started = True
        work.conn.mux.run_in_executor(self._pool, self._run, work, on_done=partial(self._done, work))

    def _run(self, work: Work) -> None:
        on_message, on_messages = self._callbacks.on_message, self._callbacks.on_messages
        conn, waiting = work.conn, work.waiting
        count = len(waiting)
        while count and not conn.closing:
            if on_messages is not None:
                on_messages(conn, [waiting.popleft() for _ in range(count)])
                return
            assert on_message is not None
            on_message(conn, waiting.popleft())
            count -= 1

    def _done(self, work: Work, future: Future[None]) -> None:
        conn, error = work.conn, future.exception()
        if isinstance(error, Exception):
            conn.mux._fail(conn, error)
        if work.waiting and not conn.closing:
            self._start(work)
        else:
            work.finish()
        if error is not None and not isinstance(error, Exception):
            raise error  # SystemExit and the like end the loop, as from any callback


class Work:
    """What one connection has in the pool; it lives while there is something."""

    __slots__ = ("closing", "conn", "paused", "started", "waiting")

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self.waiting: deque[Any] = deque()
        self.started = self.paused = self.closing = False

    def close(self) -> None:
        """Close the connection after the last message that has come; see Mux.drain."""
        self.closing = True
        self.conn.pause_reading()

    def finish(self) -> None:
        self.conn.mux._take_back(self.conn)
        if self.closing:
            self.conn.close()
        elif self.paused:
            self.conn.resume_reading()
