"""What may live here: the kernel facts that the promises rest on, each observed on the bare system calls."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.linux_only("facts of Linux's epoll")

IN, OUT, ERR, HUP, RDHUP, ET = (
    getattr(select, "EPOLL" + name, 0) for name in ("IN", "OUT", "ERR", "HUP", "RDHUP", "ET")
)
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def tcp() -> Iterator[Pair]:
    """(ours, theirs), connected and nonblocking."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    for sock in (ours, theirs):
        sock.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def ep() -> Iterator[select.epoll]:
    with select.epoll() as ep:
        yield ep


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def wakeups(ep: select.epoll, seconds: float = 0.02) -> int:
    end, count = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 0:
        count += bool(ep.poll(left))
    return count


def test_a_batch_can_carry_an_event_for_a_reused_descriptor(ep: select.epoll) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    for ours, theirs in pairs:
        ep.register(ours, IN)
        theirs.send(b"x")
    batch = ep.poll(1)
    assert len(batch) == 2
    pairs[1][0].close()
    unrelated, other_end = socket.socketpair()
    assert unrelated.fileno() in dict(batch), "the event now seems to be about an unrelated socket"
    for sock in (pairs[0][0], pairs[0][1], pairs[1][1], unrelated, other_end):
        sock.close()


def test_a_dup_keeps_a_closed_descriptor_registered(ep: select.epoll) -> None:
    ours, theirs = socket.socketpair()
    copy = ours.dup()
    number = ours.fileno()
    ep.register(number, IN)
    ours.close()
    theirs.send(b"x")
    assert ep.poll(1) == [(number, IN)], "a ghost event"
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        ep.unregister(number)
    assert caught.value.errno == errno.EBADF
    copy.close()
    theirs.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_del_in_a_child_removes_the_parents_registration(ep: select.epoll) -> None:
    ours, theirs = socket.socketpair()
    ep.register(ours, IN)
    pid = os.fork()
    if pid == 0:
        ep.unregister(ours)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    theirs.send(b"x")
    assert ep.poll(0.02) == []
    ours.close()
    theirs.close()


def test_mask_0_spins_on_a_reset_and_bare_edge_triggered_reports_it_once(ep: select.epoll, tcp: Pair) -> None:
    ours, theirs = tcp
    ep.register(ours, 0)
    reset(theirs)
    assert wakeups(ep) > 100
    ep.modify(ours, ET)
    assert wakeups(ep) == 1


def test_flags_of_fin_reset_and_both_fins(ep: select.epoll, tcp: Pair) -> None:
    ours, theirs = tcp
    ep.register(ours, IN | OUT | RDHUP)
    theirs.shutdown(socket.SHUT_WR)
    assert ep.poll(1) == [(ours.fileno(), IN | OUT | RDHUP)]
    ours.shutdown(socket.SHUT_WR)
    assert ep.poll(1) == [(ours.fileno(), IN | OUT | HUP | RDHUP)]


def test_flags_of_a_reset(ep: select.epoll, tcp: Pair) -> None:
    ours, theirs = tcp
    ep.register(ours, IN | OUT | RDHUP)
    reset(theirs)
    assert ep.poll(1) == [(ours.fileno(), IN | OUT | ERR | HUP | RDHUP)]


def test_data_is_still_there_behind_a_reset(tcp: Pair) -> None:
    ours, theirs = tcp
    theirs.send(b"read before you believe HUP")
    reset(theirs)
    assert ours.recv(100) == b"read before you believe HUP"
    with pytest.raises(ConnectionResetError):
        ours.recv(100)


def test_reading_so_error_makes_a_reset_look_like_an_orderly_end(tcp: Pair) -> None:
    ours, theirs = tcp
    reset(theirs)
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
    assert ours.recv(100) == b""


def test_close_with_unread_input_destroys_output_in_flight(tcp: Pair) -> None:
    ours, theirs = tcp
    theirs.send(b"unread")
    sent = 0
    try:
        while True:
            sent += ours.send(bytes(1 << 16))
    except BlockingIOError:
        ours.close()
    got = 0
    theirs.setblocking(True)
    try:
        while data := theirs.recv(1 << 16):
            got += len(data)
    except ConnectionResetError:
        pass
    assert got < sent


def test_after_a_reset_the_first_send_succeeds_and_the_next_is_epipe(tcp: Pair) -> None:
    ours, theirs = tcp
    theirs.close()
    assert ours.send(b"x") == 1
    select.select([ours], [], [], 1)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        ours.send(b"y", socket.MSG_NOSIGNAL)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_without_msg_nosignal_the_process_dies_of_sigpipe() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            ours.send(b"x")
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGPIPE
    with pytest.raises(BrokenPipeError):
        ours.send(b"x", socket.MSG_NOSIGNAL)
    ours.close()


def test_a_connection_reset_before_accept_is_accepted_and_has_no_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reset(socket.create_connection(server.getsockname()))
        ours, _ = server.accept()
        with pytest.raises(OSError, match="not connected") as caught:
            ours.getpeername()
        assert caught.value.errno == errno.ENOTCONN
        ours.close()


def test_one_connection_wakes_every_set_that_watches_the_listener(ep: select.epoll) -> None:
    with select.epoll() as other, socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        ep.register(server, IN)
        other.register(server, IN)
        sock = socket.create_connection(server.getsockname())
        assert len(ep.poll(1)) == len(other.poll(1)) == 1
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()
        sock.close()


def test_a_regular_file_is_refused(ep: select.epoll) -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(PermissionError):
        ep.register(file, IN)


def test_after_a_partial_read_edge_triggered_stays_silent_until_new_data_or_mod(ep: select.epoll, tcp: Pair) -> None:
    ours, theirs = tcp
    ep.register(ours, IN | ET)
    theirs.send(b"12345678")
    assert ep.poll(1) == [(ours.fileno(), IN)]
    ours.recv(4)
    assert ep.poll(0.02) == []
    ep.modify(ours, IN | ET)
    assert ep.poll(1) == [(ours.fileno(), IN)]
    theirs.send(b"9")
    assert ep.poll(1) == [(ours.fileno(), IN)]


def test_writable_does_not_mean_that_all_fits(ep: select.epoll, tcp: Pair) -> None:
    ours, _ = tcp
    ep.register(ours, OUT)
    total = 0
    while ep.poll(0.05):
        size = ours.send(bytes(1 << 22))
        total += size
        if size < 1 << 22:
            return
    raise AssertionError("every send was accepted whole")


def test_emfile_in_accept_spins_a_level_triggered_listener(ep: select.epoll) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ep.register(server, IN)
        with socket.create_connection(server.getsockname()):
            assert wakeups(ep) > 100  # a process that cannot accept it is woken again and again


RAW_WAIT = """
import ctypes, errno, select, signal
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, False)  # SA_RESTART
signal.setitimer(signal.ITIMER_REAL, 0.05)
events = ctypes.create_string_buffer(12)
with select.epoll() as ep:
    r = libc.epoll_wait(ep.fileno(), events, 1, 5000)
print(r, errno.errorcode[ctypes.get_errno()])
"""


def test_a_raw_wait_is_interrupted_even_with_sa_restart() -> None:
    done = subprocess.run([sys.executable, "-c", RAW_WAIT], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "-1 EINTR\n"
