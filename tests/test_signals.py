"""Signal handlers of several Muxes, of the user and of a forked child: what is restored, and when (Promise
process-state); test_watch.py has the rest."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from support import SignalAt, open_fds, turns, until

import muxcore
import muxcore._signals

pytestmark = pytest.mark.unix_only("it sends itself signals")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What has become of SIGUSR1; "former": it came to the handler that was there before."""
    heard: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("former"))
    yield heard
    signal.signal(signal.SIGUSR1, before)


def listening(backend: str, heard: list[str], name: str) -> muxcore.Mux:
    mux = muxcore.Mux(backend=backend)
    mux.add_signal_handler(signal.SIGUSR1, heard.append, name)
    return mux


def hear(heard: list[str], *muxes: muxcore.Mux) -> str:
    """What hears a signal."""
    heard.clear()
    os.kill(os.getpid(), signal.SIGUSR1)
    for mux in muxes:
        mux.poll(0)
    [name] = heard
    return name


def wakeup_fd() -> int:
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    return fd


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_muxes_that_close_in_any_order_leave_the_others_their_signal(
    backend: str, heard: list[str], order: tuple[str, ...]
) -> None:
    former = signal.getsignal(signal.SIGUSR1)
    muxes = {name: listening(backend, heard, name) for name in "abc"}
    for name in order:
        assert hear(heard, *muxes.values()) == max(muxes)
        muxes.pop(name).close()
    assert hear(heard) == "former"
    assert signal.getsignal(signal.SIGUSR1) is former
    assert wakeup_fd() == -1


def test_a_handler_that_the_user_has_put_in_the_place_stays(backend: str, heard: list[str]) -> None:
    mux = listening(backend, heard, "mux")
    signal.signal(signal.SIGUSR1, lambda *_: heard.append("user"))
    assert mux.remove_signal_handler(signal.SIGUSR1)
    assert hear(heard, mux) == "user"
    mux.add_signal_handler(signal.SIGUSR1, heard.append, "mux")
    assert hear(heard, mux) == "mux"
    mux.close()
    assert hear(heard) == "user"


def test_a_handler_that_is_added_again_replaces_the_users(backend: str, heard: list[str]) -> None:
    with listening(backend, heard, "mux") as mux:
        signal.signal(signal.SIGUSR1, lambda *_: heard.append("user"))
        mux.add_signal_handler(signal.SIGUSR1, heard.append, "again")
        assert hear(heard, mux) == "again"
    assert hear(heard) == "user"


def test_a_handler_of_a_closed_mux_passes_the_signal_on(backend: str, heard: list[str]) -> None:
    """The user had replaced it, and puts back what was there: it must not switch the signal off."""
    mux = listening(backend, heard, "mux")
    ours = signal.signal(signal.SIGUSR1, lambda *_: heard.append("user"))
    mux.close()
    signal.signal(signal.SIGUSR1, ours)
    assert hear(heard) == "former"


def test_a_handler_that_is_replaced_lets_go_of_what_it_would_have_called(backend: str, heard: list[str]) -> None:
    class Thing: ...

    thing = Thing()
    gone = weakref.ref(thing)
    with muxcore.Mux(backend=backend) as mux:
        mux.add_signal_handler(signal.SIGUSR1, print, thing)
        mux.add_signal_handler(signal.SIGUSR1, heard.append, "second")
        del thing
        assert gone() is None
        assert hear(heard, mux) == "second"


@pytest.fixture
def amid(monkeypatch: pytest.MonkeyPatch, heard: list[str]) -> Callable[[], None]:
    """Another signal handler installs a handler of SIGUSR1 behind the next look at the present one."""
    look = signal.getsignal

    def arm() -> None:
        def looked(number: int) -> Any:
            found = look(number)
            monkeypatch.setattr(signal, "getsignal", look)
            signal.signal(signal.SIGUSR1, lambda *_: heard.append("user"))
            return found

        monkeypatch.setattr(signal, "getsignal", looked)

    return arm


def test_a_handler_that_a_signal_handler_installs_amid_the_removal_stays(
    backend: str, heard: list[str], amid: Callable[[], None]
) -> None:
    mux = listening(backend, heard, "mux")
    amid()
    mux.close()
    assert hear(heard) == "user"


def test_a_handler_that_a_signal_handler_installs_amid_the_addition_is_put_back(
    backend: str, heard: list[str], amid: Callable[[], None]
) -> None:
    amid()
    with listening(backend, heard, "mux") as mux:
        assert hear(heard, mux) == "mux"
    assert hear(heard) == "user"


def test_a_handler_that_was_not_installed_from_python_becomes_the_default(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that embeds Python may have one, for which getsignal() returns None."""
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)
        mux.add_signal_handler(signal.SIGUSR1, print)
    assert mux.remove_signal_handler(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_signal_that_is_ignored_by_default_leaves_the_handler_of_a_closed_mux_in_place(backend: str) -> None:
    mux = muxcore.Mux(backend=backend)
    mux.add_signal_handler(signal.SIGURG, print)
    ours = signal.signal(signal.SIGURG, signal.SIG_IGN)
    mux.close()
    signal.signal(signal.SIGURG, ours)
    try:
        signal.raise_signal(signal.SIGURG)
        assert signal.getsignal(signal.SIGURG) is ours
    finally:
        signal.signal(signal.SIGURG, signal.SIG_DFL)


def test_a_closed_mux_is_not_kept_by_a_later_ones_handler(backend: str, heard: list[str]) -> None:
    first = listening(backend, heard, "first")
    with listening(backend, heard, "second"):
        gone = weakref.ref(first)
        first.close()
        del first
        gc.collect()
        assert gone() is None


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="this system has no real-time signals")
def test_real_time_signals_are_signals(mux: muxcore.Mux) -> None:
    called: list[int] = []
    numbers = [signal.SIGRTMIN, signal.SIGRTMIN + 1, signal.SIGRTMAX - 1, signal.SIGRTMAX]
    for number in numbers:
        mux.add_signal_handler(number, called.append, int(number))
    for number in numbers:
        os.kill(os.getpid(), number)
    until(mux, lambda: len(called) == len(numbers))
    assert sorted(called) == numbers
    assert all(mux.remove_signal_handler(number) for number in numbers)


@pytest.mark.parametrize("number", [0, -1, 65, 1 << 40, signal.SIGKILL, signal.SIGSTOP])
def test_what_cannot_be_caught_is_refused_and_changes_nothing(mux: muxcore.Mux, number: int) -> None:
    before = len(open_fds())
    with pytest.raises(ValueError, match="sig must be a signal"):
        mux.add_signal_handler(number, print)
    assert (len(open_fds()), wakeup_fd()) == (before, -1)


def test_a_mux_that_is_closed_while_a_handler_is_added_leaves_none(
    backend: str, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another signal's handler."""
    mux = muxcore.Mux(backend=backend)
    change = signal.signal

    def closes(number: int, handler: Any) -> Any:
        monkeypatch.undo()
        mux.close()
        return change(number, handler)

    monkeypatch.setattr(signal, "signal", closes)
    mux.add_signal_handler(signal.SIGUSR1, heard.append, "mux")
    assert hear(heard) == "former"
    assert wakeup_fd() == -1


def test_a_mux_that_is_closed_while_its_wakeup_is_made_keeps_no_socket(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_fds()
    mux = muxcore.Mux(backend=backend)
    pair = socket.socketpair

    def closes() -> tuple[socket.socket, socket.socket]:
        monkeypatch.undo()
        mux.close()
        return pair()

    monkeypatch.setattr(socket, "socketpair", closes)
    with pytest.raises(RuntimeError, match="the Mux is closed"):
        mux.add_signal_handler(signal.SIGUSR1, print)
    assert open_fds() == before
    assert mux.closed


def test_a_wakeup_that_cannot_be_made_is_named(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socketpair", fails)
    with pytest.raises(OSError, match="Too many open files"):
        mux.add_signal_handler(signal.SIGUSR1, print)


@pytest.mark.parametrize("other", ["none", "removed handler", "another Mux"])
def test_a_signal_that_another_thread_gets_ends_the_wait_of_run(backend: str, other: str) -> None:
    """Whatever else has had the wakeup meanwhile."""
    with muxcore.Mux(backend=backend) as mux, muxcore.Mux(backend=backend) as second:
        before = signal.signal(signal.SIGUSR1, lambda *_: mux.stop())
        if other != "none":
            mux.add_signal_handler(signal.SIGUSR2, print)
        if other == "removed handler":
            mux.call_soon(mux.remove_signal_handler, signal.SIGUSR2)
        if other == "another Mux":
            second.add_signal_handler(signal.SIGWINCH, print)
        mux.call_later(5, mux.stop)
        thread = threading.Timer(0.02, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1))
        start = mux.time()
        thread.start()
        mux.run()
        assert mux.time() - start < 5
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def test_run_restores_the_wakeup_descriptor_when_it_returns(mux: muxcore.Mux) -> None:
    run(mux)
    assert wakeup_fd() == -1


def test_run_that_is_interrupted_before_it_begins_restores_the_wakeup_descriptor(
    mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_wakeup = muxcore._signals._take_wakeup

    def interrupted(ends: Any) -> None:
        monkeypatch.undo()
        take_wakeup(ends)
        raise KeyboardInterrupt

    monkeypatch.setattr(muxcore._signals, "_take_wakeup", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(mux)
    assert wakeup_fd() == -1


def test_a_signal_that_was_heard_does_not_spin(backend: str, heard: list[str]) -> None:
    with listening(backend, heard, "mux") as mux:
        assert hear(heard, mux) == "mux"
        mux.poll(0)
        assert turns(mux, 0.05) == 0


@pytest.mark.parametrize("other", ["none", "earlier", "later"])
def test_more_signals_than_the_wakeup_can_hold_are_no_error(backend: str, heard: list[str], other: str) -> None:
    """Another Mux, which has closed since, does not change that."""
    others = [listening(backend, heard, "other")] if other == "earlier" else []
    with listening(backend, heard, "mux") as mux:
        others += [listening(backend, heard, "other")] if other == "later" else []
        for one in others:
            one.close()
        for _ in range(10_000):
            signal.raise_signal(signal.SIGUSR1)
        until(mux, lambda: len(heard) == 10_000)


def test_a_wakeup_descriptor_that_another_loop_has_set_since_stays(backend: str, heard: list[str]) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        with listening(backend, heard, "mux"):
            signal.set_wakeup_fd(ours.fileno())
        assert signal.set_wakeup_fd(-1) == ours.fileno()


def test_a_mux_that_is_closed_between_any_two_lines_of_adding_a_handler_leaves_nothing(
    backend: str, heard: list[str]
) -> None:
    """Sockets of another are made in place of its own at once: their numbers are the same."""
    tracer = sys.gettrace()
    left = at = 0
    successors: list[socket.socket] = []

    def close_at(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith("_signals.py"):
            return None
        left -= 1
        if left == 0:
            sys.settrace(tracer)
            mux.close()
            for _ in range(3):
                successors.extend(socket.socketpair())
            for sock in successors:
                sock.setblocking(False)
        return close_at

    while left <= 0:  # until the last line is passed
        left = at = at + 1
        mux = muxcore.Mux(backend=backend)
        sys.settrace(close_at)
        try:
            mux.add_signal_handler(signal.SIGUSR1, heard.append, "mux")
        except RuntimeError as error:
            assert str(error) == "the Mux is closed"  # noqa: PT017
        finally:
            sys.settrace(tracer)
        mux.close()
        while successors:
            successors.pop().close()
        assert wakeup_fd() == -1, at
        assert hear(heard) == "former"
    assert at > 20


# --- fork ------------------------------------------------------------------------------------------


def exit_status(child: Callable[[], object]) -> int:
    """That of a forked child: 0 if what it does is true, or a signal, less than 0."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if child() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@needs_fork
def test_a_forked_child_has_the_handler_that_was_there_before_ours(backend: str, heard: list[str]) -> None:
    former = signal.getsignal(signal.SIGUSR1)
    with listening(backend, heard, "a") as first, listening(backend, heard, "b") as second:
        assert exit_status(lambda: signal.getsignal(signal.SIGUSR1) is former and wakeup_fd() == -1) == 0
        assert wakeup_fd() != -1
        assert hear(heard, first, second) == "b"


@needs_fork
def test_a_signal_ends_a_forked_child_and_the_parent_does_not_hear_it(backend: str) -> None:
    called: list[int] = []
    with muxcore.Mux(backend=backend) as mux:
        mux.add_signal_handler(signal.SIGTERM, called.append, 1)
        assert exit_status(lambda: signal.raise_signal(signal.SIGTERM)) == -signal.SIGTERM
        mux.poll(0)
    assert called == []


@needs_fork
def test_a_handler_that_a_forked_child_puts_back_passes_the_signal_on(backend: str, heard: list[str]) -> None:
    with listening(backend, heard, "mux"):
        ours = signal.getsignal(signal.SIGUSR1)
        assert exit_status(lambda: (signal.signal(signal.SIGUSR1, ours), hear(heard) == "former")[1]) == 0


@needs_fork
@pytest.mark.parametrize(("former", "status"), [(signal.SIG_DFL, -signal.SIGUSR1), (signal.SIG_IGN, 0)])
def test_a_handler_that_a_forked_child_puts_back_does_what_the_system_would(
    backend: str, heard: list[str], former: Any, status: int
) -> None:
    signal.signal(signal.SIGUSR1, former)
    with listening(backend, heard, "mux"):
        ours = signal.getsignal(signal.SIGUSR1)
        assert exit_status(lambda: (signal.signal(signal.SIGUSR1, ours), signal.raise_signal(signal.SIGUSR1))) == status


@needs_fork
def test_a_forked_child_may_leave_run_by_an_exception(backend: str) -> None:
    class Left(Exception): ...

    def leave() -> None:
        if os.getpid() != parent:
            raise Left

    def child() -> bool:
        try:
            mux.run()
        except RuntimeError as error:
            return "fork" in str(error)
        return False

    parent = os.getpid()
    with muxcore.Mux(backend=backend) as mux:
        assert exit_status(child) == 0


# --- an exception between any two steps ------------------------------------------------------------

# One between socket.socketpair() and the store of what it returns leaves the sockets to the collector, which warns.
collector_may_close = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Interrupted:
    """A `with` block in which Ctrl-C comes before the n-th bytecode of _signals.py that is executed."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.code = muxcore._signals.__file__

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != self.code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self) -> Interrupted:
        self.before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks at no frame's if this is false when it begins
        sys.settrace(self.trace)
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> bool:
        sys.settrace(self.before)
        return kind is KeyboardInterrupt


def add(mux: muxcore.Mux) -> None:
    mux.add_signal_handler(signal.SIGUSR1, bool)


def add_and_remove(mux: muxcore.Mux) -> None:
    add(mux)
    mux.remove_signal_handler(signal.SIGUSR1)


def run(mux: muxcore.Mux) -> None:
    mux.call_soon(mux.stop)
    mux.run()


def add_and_close(mux: muxcore.Mux) -> None:
    add(mux)
    mux.close()


@collector_may_close
@pytest.mark.parametrize("action", [add, add_and_remove, run, add_and_close])
def test_an_interrupt_at_any_step_leaves_the_process_as_it_was(
    backend: str, heard: list[str], action: Callable[[muxcore.Mux], None]
) -> None:
    for n in itertools.count():
        before = open_fds()
        mux = muxcore.Mux(backend=backend)
        with Interrupted(n) as interrupted:
            action(mux)
        if not mux.closed:
            run(mux)  # it goes on
        mux.close()
        assert wakeup_fd() == -1, n
        assert hear(heard) == "former", n
        assert open_fds() == before, n
        if interrupted.left >= 0:
            break
    assert n > 100


@collector_may_close
@pytest.mark.parametrize("action", [add, add_and_remove, add_and_close])
def test_what_a_signal_handler_raises_at_any_step_leaves_no_handler_behind(
    backend: str, heard: list[str], action: Callable[[muxcore.Mux], None]
) -> None:
    former = signal.getsignal(signal.SIGUSR1)
    places = set()
    for n in itertools.count():
        mux = muxcore.Mux(backend=backend)
        with SignalAt("_signals.py", n) as interrupt:
            action(mux)
        if interrupt.left >= 0:
            assert mux.closed or (action is add) == mux.remove_signal_handler(signal.SIGUSR1)
        mux.close()
        assert signal.getsignal(signal.SIGUSR1) is former, (n, interrupt.where)
        if interrupt.left >= 0:
            break
        places.add(interrupt.where)
    assert "add" in places
    assert action is add or {"put_back", "_replace", "_put_back"} <= places


@collector_may_close
def test_a_removal_that_was_interrupted_can_be_made_again(backend: str, heard: list[str]) -> None:
    former = signal.getsignal(signal.SIGUSR1)
    for n in itertools.count():
        with muxcore.Mux(backend=backend) as mux:
            add(mux)
            with SignalAt("_signals.py", n) as interrupt:
                mux.remove_signal_handler(signal.SIGUSR1)
            mux.remove_signal_handler(signal.SIGUSR1)
            assert signal.getsignal(signal.SIGUSR1) is former, (n, interrupt.where)
            assert hear(heard, mux) == "former"
        if interrupt.left >= 0:
            break
    assert n > 5


@collector_may_close
def test_an_interrupt_at_any_step_leaves_another_muxs_signal_alone(backend: str, heard: list[str]) -> None:
    for n in itertools.count():
        with listening(backend, heard, "mine") as mine:
            mux = muxcore.Mux(backend=backend)
            with Interrupted(n) as interrupted:
                add_and_remove(mux)
            mux.close()
            assert wakeup_fd() != -1, n
            assert hear(heard, mine) == "mine", n
        assert hear(heard) == "former", n
        if interrupted.left >= 0:
            break
    assert n > 100


def test_close_behind_a_run_whose_end_was_interrupted_restores_the_wakeup_descriptor(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    mux = muxcore.Mux(backend=backend)
    monkeypatch.setattr(muxcore._signals.Signals, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(mux)
    mux.close()
    assert wakeup_fd() == -1


def test_a_forgotten_mux_leaves_no_wakeup_descriptor_behind(backend: str) -> None:
    """Its number is soon another socket's, into which Python would write."""
    muxes = [muxcore.Mux(backend=backend)]
    muxes[0].add_signal_handler(signal.SIGUSR1, print)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which replaces the Mux's
    with pytest.warns(ResourceWarning, match="unclosed <muxcore.Mux"):
        gc.collect(muxes.clear() or 2)  # type: ignore[func-returns-value]
    try:
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_mux_that_another_thread_forgets_does_so_in_silence(backend: str) -> None:
    """Only the main thread may set the wakeup descriptor: it stays open, or its number would be another file's."""
    source = f"""
        import gc, signal, socket, threading, muxcore
        muxes = [muxcore.Mux(backend={backend!r})]
        muxes[0].add_signal_handler(signal.SIGUSR1, print)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # else that is what keeps it
        def forget():
            muxes.clear()
            gc.collect()
        thread = threading.Thread(target=forget)
        thread.start()
        thread.join()
        pairs = [socket.socketpair() for _ in range(4)]
        signal.signal(signal.SIGUSR2, lambda *_: None)
        signal.raise_signal(signal.SIGUSR2)
        for end in sum(pairs, ()):
            end.setblocking(False)
            try: print("written into another socket", end.recv(1))
            except BlockingIOError: pass
        with muxcore.Mux(backend={backend!r}) as mux:
            mux.add_signal_handler(signal.SIGUSR1, mux.stop)
            mux.call_soon(signal.raise_signal, signal.SIGUSR1)
            mux.run()
        print("ok")
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("ok\n", "")


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Call something, and raise KeyboardInterrupt as so many functions of Python begin, where CPython runs signal
    handlers; whether it called so many."""
    left = at

    def trace(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        left -= frame.f_code.co_name != "__del__"  # of which it would not come out
        if left == 0:
            raise KeyboardInterrupt  # and nothing is traced any more

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


def test_an_interrupt_of_close_leaves_no_signal_handler(backend: str, heard: list[str]) -> None:
    former = signal.getsignal(signal.SIGUSR1)
    for at in itertools.count(1):
        mux = listening(backend, heard, "mux")
        gc.collect()  # not amid close(), where it would call functions
        reached = interrupted(mux.close, at)
        mux.close()
        assert (at, signal.getsignal(signal.SIGUSR1), wakeup_fd()) == (at, former, -1)
        if not reached:
            break
    assert at > 5
