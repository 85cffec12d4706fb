"""What may live here: a pool of daemonic threads for what may block for long.

A ThreadPoolExecutor keeps the interpreter from its exit until all its jobs are done. A name server that never responds
would keep it for ever, and so these threads are daemonic. With `waits`, the exit waits for them all the same: a user's
job may be about to write a file.

A finaliser or a signal handler may submit and cancel at any moment, amid a submit of the same thread, too, and an
interrupt may end either at any point. So there is no lock that could be held twice, and no count that could be left
wrong: each step is one atomic operation of a container, and how many threads there are is counted anew.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from weakref import WeakSet

from ._lock import Lock
from ._log import log
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._mux import Mux

KEPT = 10.0  # seconds that a thread without work is kept


class Pool(Executor):
    """At most `size` threads, each made when there is work for it.

    spare: how many more there may be in place of threads with a job that was cancelled while it ran, of which nothing
        is expected any more.
    waits: the exit of the interpreter waits for its jobs.
    """

    def __init__(self, size: int, name: str, spare: int = 0, waits: bool = False) -> None:
        self._size, self._name, self._spare = size, name, spare
        self._made = 0
        self._closed = False
        self._begin()
        if waits:
            _waited_for.add(self)

    def _begin(self) -> None:
        self._process = os.getpid()
        # Those that wait; one that is cancelled leaves at once. (No OrderedDict: without a GIL, CPython 3.13's crashes
        # if two threads change it, gh-125996.)
        self._jobs: deque[Job] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()  # ends the wait of a thread
        self._threads: set[Worker] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call fn(*args, **kwargs) in a thread. RuntimeError after `shutdown`, or if there can be no thread."""
        if self._process != os.getpid():
            self._begin()  # a forked child has none of the threads
        if self._closed:
            raise RuntimeError("the pool is shut down")
        job = Job(self, fn, args, kwargs)
        self._jobs.append(job)
        try:
            self._attend()
        except BaseException:
            self._remove(job)
            raise
        return job

    def _remove(self, job: Job) -> None:
        while True:
            try:
                self._jobs.remove(job)
            except IndexError:  # without a GIL: another thread has changed them meanwhile
                continue
            except ValueError:
                pass  # a thread has it already
            return

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end once nothing waits. It does not wait for what runs."""
        self._closed = True
        if cancel_futures:
            self._cancel_each()
        for _ in self._living():
            self._bell.put(None)

    def _cancel_each(self) -> None:
        while self._jobs:
            try:
                job = self._jobs[0]
            except IndexError:
                return
            job.cancel()
            self._remove(job)

    def _finish(self) -> None:
        """Wait until nothing runs and nothing waits."""
        if self._process == os.getpid():  # a forked child has none of the threads
            self.shutdown()
            for thread in self._living():
                thread.join()

    def _living(self) -> list[Worker]:
        threads = list(self._threads)
        self._threads.difference_update([thread for thread in threads if thread.gone])
        return [thread for thread in threads if not thread.gone]

    def _too_many(self, threads: list[Worker], size: int) -> bool:
        """Whether more than `size` of them count: one whose job was cancelled while it ran does not."""
        return sum(not thread.given_up for thread in threads) > size

    def _attend(self) -> None:
        """Have the waiting jobs run: wake a thread, or make one."""
        threads = self._living()
        if self._bell.qsize() < len(threads):  # more would be in vain: each thread looks at all waiting jobs
            self._bell.put(None)
        resting = sum(thread.resting for thread in threads)
        if (
            resting < len(self._jobs)
            and len(threads) < self._size + self._spare
            and not self._too_many(threads, self._size - 1)
        ):
            self._add_thread()

    def _add_thread(self) -> None:
        self._made += 1
        worker = Worker(self, f"{self._name}_{self._made}")
        self._threads.add(worker)
        try:
            worker.gone = False
            worker.start()
        except BaseException as error:
            worker.gone = not worker.is_alive()  # an interrupt may come when it lives already
            if not isinstance(error, RuntimeError | MemoryError) or not self._living():
                raise
            # else there can be no more threads: those that live do it


_waited_for: WeakSet[Pool] = WeakSet()


def _finish_all() -> None:
    for pool in list(_waited_for):
        pool._finish()


atexit.register(_finish_all)


class Guard(Lock):  # type: ignore[misc]  # CPython's RLock may be a base
    """The lock of a job, in place of a Future's Condition, which is entered by Python code: an interrupt there, behind
    the acquire, would leave it locked for ever, and block each thread that has this job."""

    def __init__(self) -> None:
        self._waited: threading.Condition | None = None

    def wait(self, timeout: float | None = None) -> bool:
        if self._waited is None:
            self._waited = threading.Condition(self)
        return self._waited.wait(timeout)

    def notify_all(self) -> None:
        if self._waited is not None:
            self._waited.notify_all()


class Job(Future["Any"]):
    """What was submitted."""

    def __init__(self, pool: Pool, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self._condition: Any = Guard()
        self._pool = pool
        self._call = fn, args, kwargs
        self.given_up = False

    def cancel(self) -> bool:
        """As `Future.cancel`. A job that runs goes on, but its thread is not counted any more."""
        if super().cancel():
            self._pool._remove(self)
            return True
        if not self.done():
            self.given_up = True
            self._pool._attend()
        return False

    def run(self) -> None:
        if not self.set_running_or_notify_cancel():
            return
        fn, args, kwargs = self._call
        del self._call
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            self.set_exception(error)
            del self  # the error's traceback has this frame, and so would keep us until a collection
        else:
            self.set_result(result)


class Worker(threading.Thread):
    """A thread of a pool."""

    def __init__(self, pool: Pool, name: str) -> None:
        try:
            super().__init__(name=name, daemon=True)
            self._kept = KEPT
        except RuntimeError:  # a subinterpreter without daemonic threads: its end waits for jobs, not for idle threads
            super().__init__(name=name, daemon=False)
            self._kept = 0.0
        self._pool: Pool | None = pool
        self._job: Job | None = None
        self.resting = False
        self.gone = True  # until it is begun

    @property
    def given_up(self) -> bool:
        job = self._job
        return job is not None and job.given_up

    def run(self) -> None:
        pool, self._pool = self._pool, None
        assert pool is not None
        pool._threads.add(self)
        self.gone = False
        try:
            self._work_on(pool)
        finally:
            self.gone = True
            if pool._jobs and not pool._closed:
                pool._attend()  # a job may have come while this thread was still counted

    def _work_on(self, pool: Pool) -> None:
        while self._work_safely(pool):
            pass

    def _work_safely(self, pool: Pool) -> bool:
        try:
            return self._work(pool)
        except BaseException as error:  # of a callback of a Future; the next job is another's
            self._job = None
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, self)))
            return True

    def _work(self, pool: Pool) -> bool:
        """Run the queued jobs, and wait for more. Returns whether the thread should continue."""
        while True:
            try:
                job = pool._jobs.popleft()
            except IndexError:
                break
            self._job = job
            job.run()
            self._job = job = None  # type: ignore[assignment]  # it must not be kept alive while this thread waits
        if pool._closed or pool._too_many(pool._living(), pool._size):
            return False
        self.resting = True
        if pool._jobs:  # a submit before this line did not count this thread as idle
            self.resting = False
            return True
        try:
            pool._bell.get(timeout=self._kept)
            return True
        except Empty:
            return False
        finally:
            self.resting = False


def executed(
    mux: Mux, fn: Callable[..., Any], on_done: Callable[[Future[Any]], object] | None, future: Future[Any]
) -> None:
    """A job of `Mux.run_in_executor` is done."""
    if on_done is not None:
        try:
            mux.call_soon_threadsafe(on_done, future)
        except RuntimeError:
            pass  # the Mux was closed meanwhile
    elif not future.cancelled() and (error := future.exception()) is not None:
        log.error("%r raised in an executor", fn, exc_info=error)
