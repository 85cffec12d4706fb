"""The pool of daemonic threads, and the names that are looked up in one (Promise connecting)."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from support import DEADLINE, Recorder, until

import muxcore
from muxcore import _connect, _lock
from muxcore._lock import Lock
from muxcore._pool import KEPT, Job, Pool, Worker

SOON = muxcore.Timeouts(connect=0.05)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def wait_until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    """For what other threads do."""
    done = threading.Event()
    for _ in range(int(seconds / 0.002)):
        if condition():
            return
        done.wait(0.002)
    raise AssertionError("the condition never came true")


# --- the pool --------------------------------------------------------------------------------------


def test_jobs_are_done_by_daemons() -> None:
    pool = Pool(2, "pool")
    thread = pool.submit(threading.current_thread).result(DEADLINE)
    assert thread.daemon
    assert thread.name.startswith("pool")
    pool.shutdown()
    thread.join(DEADLINE)
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(print)


def test_what_a_job_raises_is_in_its_future() -> None:
    pool = Pool(1, "pool")
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 1, 0).result(DEADLINE)
    assert pool.submit(max, 1, 2).result(DEADLINE) == 2
    pool.shutdown()


def test_there_are_never_more_threads_than_its_size(gate: threading.Event) -> None:
    pool = Pool(3, "pool")
    jobs = [pool.submit(gate.wait) for _ in range(20)]
    assert len(pool._living()) == 3
    assert len({thread.name for thread in pool._living()}) == 3
    gate.set()
    assert all(job.result(DEADLINE) for job in jobs)
    pool.shutdown()


def test_an_idle_thread_is_used_again() -> None:
    pool = Pool(3, "pool")
    seen = set()
    for _ in range(10):
        seen.add(pool.submit(threading.get_ident).result(DEADLINE))
        wait_until(lambda: all(thread.resting for thread in pool._living()))
    assert len(seen) == 1
    pool.shutdown()


def test_a_thread_without_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muxcore._pool.KEPT", 0.01)
    pool = Pool(1, "pool")
    thread = pool.submit(threading.current_thread).result(DEADLINE)
    thread.join(DEADLINE)
    assert pool.submit(max, 1, 2).result(DEADLINE) == 2


def test_jobs_are_begun_in_their_order(gate: threading.Event) -> None:
    pool, begun = Pool(1, "pool"), list[int]()
    pool.submit(gate.wait)
    jobs = [pool.submit(begun.append, number) for number in range(10)]
    gate.set()
    jobs[-1].result(DEADLINE)
    assert begun == list(range(10))
    pool.shutdown()


def test_busy_threads_are_woken_once_each_however_many_jobs_come(gate: threading.Event) -> None:
    pool = Pool(1, "pool")
    for _ in range(100):
        pool.submit(gate.wait)
    assert pool._bell.qsize() <= 1
    gate.set()
    pool.shutdown()


def test_a_job_that_is_done_keeps_nothing_of_its_call() -> None:
    class Thing: ...

    pool, thing = Pool(1, "pool"), Thing()
    gone = weakref.ref(thing)
    job = pool.submit(type, thing)
    del thing
    assert job.result(DEADLINE) is Thing
    wait_until(lambda: gone() is None)
    pool.shutdown()


def test_a_job_that_is_cancelled_while_a_thread_has_it_already_is_not_done(gate: threading.Event) -> None:
    pool, done = Pool(1, "pool"), list[int]()
    pool.submit(gate.wait)
    job = pool.submit(done.append, 1)
    Future.cancel(job)  # and it is among those that wait, still
    gate.set()
    assert pool.submit(max, 1, 2).result(DEADLINE) == 2
    assert done == []
    pool.shutdown()


@pytest.mark.parametrize("cancel", [False, True])
def test_shutdown_cancels_what_waits_only_with_cancel_futures(gate: threading.Event, cancel: bool) -> None:
    pool = Pool(1, "pool")
    wait_until(pool.submit(gate.wait).running)
    waiting = pool.submit(max, 1, 2)
    pool.shutdown(cancel_futures=cancel)
    gate.set()
    assert waiting.cancelled() if cancel else waiting.result(DEADLINE) == 2


def test_a_cancelled_job_does_not_stay_queued(gate: threading.Event) -> None:
    pool = Pool(1, "pool")
    pool.submit(gate.wait)
    jobs = [pool.submit(print) for _ in range(100)]
    assert all(job.cancel() for job in jobs)
    assert not pool._jobs
    pool.shutdown()


def test_a_running_job_that_is_given_up_makes_room_for_another(gate: threading.Event) -> None:
    pool = Pool(1, "pool", spare=1)
    stuck = pool.submit(gate.wait)
    wait_until(stuck.running)
    waiting = pool.submit(max, 1, 2)
    assert not waiting.done()
    assert not stuck.cancel()
    assert waiting.result(DEADLINE) == 2
    also_stuck = pool.submit(gate.wait)
    wait_until(also_stuck.running)
    also_stuck.cancel()
    assert not pool.submit(max, 1, 2).done(), "no more than one is spare"
    assert len(pool._living()) == 2
    gate.set()
    pool.shutdown()


@pytest.mark.unix_only("fork")
def test_a_pool_without_a_thread_that_can_have_none_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = Pool(1, "pool")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        with pytest.raises(RuntimeError, match="can't start"):
            pool.submit(print)
    assert not pool._jobs
    assert pool.submit(max, 1, 2).result(DEADLINE) == 2
    pool.shutdown()


@pytest.mark.unix_only("fork")
def test_a_pool_that_can_have_no_more_threads_uses_those_that_it_has(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = Pool(2, "pool")
    wait_until(pool.submit(gate.wait).running)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        job = pool.submit(max, 1, 2)
    gate.set()
    assert job.result(DEADLINE) == 2
    pool.shutdown()


@pytest.mark.parametrize("step", ["_attend", "_living"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_a_signal_handler_raises_amid_a_submit_is_not_mistaken_for_a_lack_of_threads(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    def interrupted(pool: Pool) -> None:
        raise error("a signal handler")

    pool = Pool(2, "pool")
    wait_until(pool.submit(gate.wait).running)
    with monkeypatch.context() as patch:
        patch.setattr(Pool, step, interrupted)
        with pytest.raises(error):
            pool.submit(max, 1, 2)
    assert not pool._jobs
    assert pool.submit(max, 3, 4).result(DEADLINE) == 4
    gate.set()
    pool.shutdown()


def test_a_callback_of_a_future_ends_no_thread_that_has_more_to_do(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def leave(future: Any) -> None:
        raise SystemExit("a callback")

    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(str(args.exc_value)))
    pool = Pool(1, "pool")
    pool.submit(gate.wait).add_done_callback(leave)
    pool.submit(int, "no number").add_done_callback(leave)
    jobs = [pool.submit(max, number, 0) for number in range(3)]
    gate.set()
    assert [job.result(DEADLINE) for job in jobs] == [0, 1, 2]
    assert seen == ["a callback", "a callback"]
    pool.shutdown()


def test_a_thread_that_may_not_be_a_daemon_ends_once_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some subinterpreters allow no daemons, and their end waits for the thread."""
    init = threading.Thread.__init__

    def refuses(thread: threading.Thread, *args: Any, daemon: bool | None = None, **options: Any) -> None:
        if daemon:
            raise RuntimeError("daemon threads are disabled in this interpreter")
        init(thread, *args, daemon=daemon, **options)

    monkeypatch.setattr(threading.Thread, "__init__", refuses)
    thread = Pool(1, "pool").submit(threading.current_thread).result(DEADLINE)
    assert not thread.daemon
    thread.join(KEPT / 2)
    assert not thread.is_alive()


def test_a_thread_that_has_not_begun_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    waiting: list[threading.Thread] = []
    pool = Pool(1, "pool")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: waiting.append(thread))
        jobs = [pool.submit(max, 1, 2) for _ in range(3)]
    assert len(waiting) == 1
    start(waiting[0])
    assert [job.result(DEADLINE) for job in jobs] == [2, 2, 2]
    pool.shutdown()


def test_a_thread_that_has_ended_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muxcore._pool.KEPT", 0.01)
    pool = Pool(1, "pool")
    thread = pool.submit(threading.current_thread).result(DEADLINE)
    thread.join(DEADLINE)
    pool._living()
    assert thread not in pool._threads


def test_a_job_that_raised_is_gone_without_the_collector() -> None:
    pool = Pool(1, "pool")
    gc.collect()
    gc.disable()
    try:
        job = pool.submit(divmod, 1, 0)
        gone = weakref.ref(job)
        wait_until(job.done)
        wait_until(lambda: all(thread.resting for thread in pool._living()))
        del job
        assert gone() is None
    finally:
        gc.enable()
    pool.shutdown()


def test_a_job_that_comes_while_the_last_thread_ends_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """That thread is still counted then, so that no other was made."""
    late: list[Any] = []
    work_on = Worker._work_on

    def ends(worker: Worker, pool: Pool) -> None:
        work_on(worker, pool)
        if not late:
            late.append(pool.submit(max, 1, 2))

    monkeypatch.setattr("muxcore._pool.KEPT", 0.01)
    monkeypatch.setattr(Worker, "_work_on", ends)
    pool = Pool(1, "pool")
    pool.submit(print)
    wait_until(lambda: late)
    assert late[0].result(DEADLINE) == 2
    pool.shutdown()


def test_a_thread_beyond_the_size_ends(gate: threading.Event) -> None:
    """That of a job that was given up, once it is done, beside the thread that replaced it."""
    pool, second = Pool(1, "pool", spare=1), threading.Event()
    stuck = pool.submit(second.wait)
    wait_until(stuck.running)
    [thread] = pool._living()
    stuck.cancel()
    wait_until(pool.submit(gate.wait).running)
    second.set()
    thread.join(KEPT / 2)
    assert not thread.is_alive()
    gate.set()
    pool.shutdown()


@pytest.mark.parametrize("when", ["woken", "at once"])
def test_a_thread_that_works_again_does_not_count_as_resting(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    pool = Pool(2, "pool")
    jobs: list[Any] = []
    too_many = Pool._too_many

    def comes_now(pool: Pool, threads: list[Worker], size: int) -> bool:
        monkeypatch.setattr(Pool, "_too_many", too_many)
        jobs.append(Job(pool, gate.wait, (), {}))
        pool._jobs.append(jobs[0])
        return too_many(pool, threads, size)

    pool.submit(print)
    wait_until(lambda: [thread.resting for thread in pool._living()] == [True])
    if when == "woken":
        jobs.append(pool.submit(gate.wait))
    else:  # just before it rests
        done = pool.submit(monkeypatch.setattr, Pool, "_too_many", comes_now)
        wait_until(done.done)
    wait_until(lambda: jobs and jobs[0].running(), KEPT / 2)
    jobs.append(pool.submit(gate.wait))
    wait_until(jobs[1].running)
    gate.set()
    pool.shutdown()


def test_a_pool_works_in_a_forked_child() -> None:
    code = """
        import os
        from muxcore._pool import Pool
        pool = Pool(1, "pool")
        assert pool.submit(max, 1, 2).result() == 2
        child = os.fork()
        if child == 0:
            os._exit(pool.submit(max, 1, 7).result(10))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_an_interrupt_amid_a_submit_stops_no_thread(mux: muxcore.Mux) -> None:
    """Promise any-user-code: that of a signal handler, behind each call of the standard library's.

    CPython looks for signals behind a function in C, but not where one in Python returns, as that of _lock.py does."""
    done: list[object] = []
    interrupts = 0

    def interrupt(frame: Any, event: str, arg: Any) -> Any:
        nonlocal interrupts
        entered = event == "return" and frame.f_code.co_name == "__enter__"
        if entered and frame.f_globals is not vars(_lock) and "futures" in frame.f_back.f_code.co_filename:
            interrupts += 1
            raise KeyboardInterrupt
        return interrupt

    before = sys.gettrace()
    for _ in range(100):  # more than there are threads
        sys.settrace(interrupt)
        try:
            mux.run_in_executor(None, int, on_done=bool)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
    mux.run_in_executor(None, int, on_done=done.append)
    until(mux, lambda: done)
    assert interrupts == 0


def test_a_job_can_be_waited_for(gate: threading.Event) -> None:
    pool = Pool(1, "pool")
    job = pool.submit(gate.wait)
    with pytest.raises(TimeoutError):
        job.result(0.01)
    with pytest.raises(TimeoutError):
        job.exception(-1)
    got: list[object] = []
    waiting = [threading.Thread(target=lambda: got.append(job.result(DEADLINE))) for _ in range(3)]
    for thread in waiting:
        thread.start()
    gate.set()
    for thread in waiting:
        thread.join(DEADLINE)
    assert got == [True] * 3
    pool.shutdown()


# --- names -----------------------------------------------------------------------------------------


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> list[str]:
    """Names of ".stuck" get no response before the gate opens; the names that were looked up."""
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if options.get("flags", 0) & socket.AI_NUMERICHOST or not host.endswith(".stuck"):
            return real(host, port, *args, **options)
        looked_up.append(host)
        gate.wait(DEADLINE)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return looked_up


def connect_by_name(mux: muxcore.Mux) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        conn = mux.connect(("localhost", server.getsockname()[1]), recorder := Recorder())
        until(mux, lambda: recorder.events)
        assert recorder.names() == ["open"]
        conn.abort()


def test_names_do_not_wait_for_the_users_jobs(mux: muxcore.Mux, gate: threading.Event) -> None:
    for _ in range(40):
        mux.run_in_executor(None, gate.wait)
    connect_by_name(mux)


def test_a_stuck_name_has_one_thread_however_many_connect_to_it(mux: muxcore.Mux, stuck: list[str]) -> None:
    recorder = Recorder()
    for _ in range(1000):
        mux.connect(("a.stuck", 1), recorder)
    connect_by_name(mux)
    assert stuck == ["a.stuck"]
    assert len(mux._names.pool._living()) <= _connect.RESOLVERS


def test_connections_to_one_name_share_its_response(
    mux: muxcore.Mux, stuck: list[str], gate: threading.Event
) -> None:
    recorder = Recorder()
    for _ in range(20):
        mux.connect(("a.stuck", 1), recorder)
    gate.set()
    until(mux, lambda: recorder.count("close") == 20)
    reasons = [arg for name, _, arg in recorder.events if name == "close"]
    assert {type(reason) for reason in reasons} == {socket.gaierror}
    assert len(set(map(id, reasons))) == 20, "each has an error of its own"
    ids = [number for _, number, _ in recorder.events]
    assert ids == sorted(ids), "in the order of connect()"
    assert not mux._names.lookups


def occupy_the_resolvers(mux: muxcore.Mux) -> None:
    """The next name that is to be looked up has to wait."""
    for number in range(_connect.RESOLVERS):
        mux.connect((f"{number}.stuck", 1), Recorder())


def test_a_name_that_was_given_up_before_its_lookup_began_is_looked_up_anew(
    mux: muxcore.Mux, stuck: list[str], gate: threading.Event
) -> None:
    occupy_the_resolvers(mux)
    mux.connect(("a.stuck", 1), Recorder()).abort()
    assert len(mux._names.lookups) == _connect.RESOLVERS
    mux.connect(("a.stuck", 1), recorder := Recorder())
    gate.set()
    until(mux, lambda: recorder.count("close"))
    assert stuck.count("a.stuck") == 1


def test_a_name_that_one_connection_gives_up_is_looked_up_for_the_others(
    mux: muxcore.Mux, stuck: list[str], gate: threading.Event
) -> None:
    occupy_the_resolvers(mux)
    recorder = Recorder()
    conns = [mux.connect(("a.stuck", 1), recorder) for _ in range(2)]
    conns[0].abort()
    gate.set()
    until(mux, lambda: recorder.count("close") == 2)
    assert isinstance(conns[1].error, socket.gaierror)


def test_a_lookup_that_was_given_up_while_it_runs_serves_the_next_connection(
    mux: muxcore.Mux, stuck: list[str], gate: threading.Event
) -> None:
    conn = mux.connect(("a.stuck", 1), Recorder())
    wait_until(lambda: stuck)
    conn.abort()
    mux.connect(("a.stuck", 1), recorder := Recorder())
    gate.set()
    until(mux, lambda: recorder.count("close"))
    assert stuck == ["a.stuck"]


def test_a_closed_mux_keeps_no_thread_for_names(backend: str) -> None:
    before = set(threading.enumerate())
    with muxcore.Mux(backend=backend) as mux:
        connect_by_name(mux)
        threads = set(threading.enumerate()) - before
    assert threads
    for thread in threads:
        thread.join(KEPT / 2)
        assert not thread.is_alive()


def test_names_that_are_given_up_do_not_block_others(mux: muxcore.Mux, stuck: list[str]) -> None:
    recorder = Recorder()
    for number in range(3 * _connect.RESOLVERS):
        mux.connect((f"{number}.stuck", 1), recorder, timeouts=SOON)
    until(mux, lambda: recorder.count("close") == 3 * _connect.RESOLVERS)
    connect_by_name(mux)


def test_the_threads_of_stuck_names_are_bounded(mux: muxcore.Mux, stuck: list[str], gate: threading.Event) -> None:
    recorder = Recorder()
    for number in range(100):
        mux.connect((f"{number}.stuck", 1), recorder)
    for _ in range(50):  # each round gives up those that run
        for conn in list(mux.connections)[:4]:
            conn.abort()
        mux.poll(0)
    assert len(mux._names.pool._living()) <= _connect.RESOLVERS + _connect.SPARE_RESOLVERS
    assert not mux._names.pool._jobs or len(mux._names.lookups) < 100


def test_the_exit_does_not_wait_for_a_name_or_a_handler() -> None:
    code = """
        import os, socket, sys, threading, muxcore
        for_ever = threading.Event()
        real = socket.getaddrinfo
        def stuck(host, *args, **options):
            if host == "a.stuck" and not options.get("flags", 0) & socket.AI_NUMERICHOST: for_ever.wait()
            return real(host, *args, **options)
        socket.getaddrinfo = stuck
        begun = []
        def handler(conn, message):
            begun.append(1)
            for_ever.wait()
        with muxcore.Mux() as mux:
            ours, theirs = socket.socketpair()
            mux.attach(ours, muxcore.Threaded(handler))
            theirs.send(b"x")
            mux.connect(("a.stuck", 1), muxcore.Handler())
            while not begun: mux.poll(0.01)
        theirs.close()
        print("closed", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=os.environ | {"PYTHONWARNINGS": ""})
    assert (done.stdout, done.stderr, done.returncode) == ("closed\n", "", 0)


@pytest.mark.unix_only("setitimer")
def test_an_interrupt_as_a_lock_is_acquired_leaves_it_free() -> None:
    """CPython 3.14 looks for signals there, between the acquire and the block."""

    class Interrupt(BaseException):
        pass

    def handler(*_: object) -> None:
        raise Interrupt

    lock = Lock()
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(2000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00002)
                while True:
                    with lock:
                        pass
            except Interrupt:
                assert lock._recursion_count() == 0
    finally:
        signal.signal(signal.SIGALRM, before)


MANY_SUBMITTERS = """
import threading, time
from muxcore._pool import Pool

pool, end = Pool(8, "test"), time.monotonic() + 2

def submit_and_cancel():
    while time.monotonic() < end:
        jobs = [pool.submit(max, 1, 2) for _ in range(20)]
        for job in jobs[::3]:
            job.cancel()
        assert all(job.cancelled() or job.result(20) == 2 for job in jobs)

threads = [threading.Thread(target=submit_and_cancel) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done")
"""


def test_threads_may_submit_and_cancel_while_others_work() -> None:
    """Without a GIL they do so at the same time."""
    program = [sys.executable, "-c", MANY_SUBMITTERS]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
