"""Connection.sendfile: which files, how many at once, and what a file object's code may do; test_messages.py has the
rest."""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from support import Recorder, leave_errno, open_fds, pattern, receive, until
from test_messages import opened

import muxcore
import muxcore._file

Listen = Callable[..., muxcore.Listener]
BIG = 5 << 20
PATTERN = pattern(BIG)


@pytest.fixture
def big_file() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(PATTERN)
        file.flush()
        yield file


def test_a_small_part_of_a_file_is_read_at_once(mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]) -> None:
    """So a client that sends many requests and reads nothing uses memory, which is bounded, and no descriptors."""
    sock, conn = opened(mux, listen, Recorder())
    before = open_fds()
    conn.sendfile(big_file, offset=4, count=65536)
    assert open_fds() == before
    big_file.truncate(0)
    assert receive(mux, sock, 65536) == PATTERN[4:65540]
    sock.close()


@pytest.mark.parametrize("overflow", ["close", "drop", "raise"])
def test_a_connection_holds_few_descriptors_of_files(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes], overflow: Any
) -> None:
    limits = muxcore.Limits(high=1 << 40, max_outbox=1 << 41, overflow=overflow)
    sock, conn = opened(mux, listen, recorder := Recorder(), limits=limits, rcvbuf=4096)
    before = len(open_fds())
    for _ in range(32):
        conn.sendfile(big_file, 0, 70_000)
    held = len(open_fds()) - before
    assert held <= 32
    if overflow == "raise":
        with pytest.raises(muxcore.OutboxFull, match="32 parts of files") as caught:
            conn.sendfile(big_file, 0, 70_000)
        assert caught.value.limit == 32
    else:
        assert not conn.sendfile(big_file, 0, 70_000)
    assert len(open_fds()) - before <= held
    if overflow == "close":
        until(mux, lambda: recorder.count("close"))
        assert "32 parts of files" in str(recorder.reason())
        assert len(open_fds()) < before
    else:
        assert mux.stats().drops == (overflow == "drop")
        assert conn.send(b"!")
        conn.close()
        assert receive(mux, sock) == PATTERN[:70_000] * 32 + b"!"
    sock.close()


def test_a_file_that_went_makes_room_for_another(mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]) -> None:
    limits = muxcore.Limits(high=1 << 24, overflow="raise")
    sock, conn = opened(mux, listen, Recorder(), limits=limits)
    for _ in range(40):
        assert conn.sendfile(big_file, 0, 70_000)
        assert receive(mux, sock, 70_000) == PATTERN[:70_000]
    sock.close()


def test_a_file_that_went_leaves_the_bound_where_it_was(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]
) -> None:
    limits = muxcore.Limits(high=1000, low=100, max_outbox=100_000, overflow="raise")
    sock, conn = opened(mux, listen, Recorder(), limits=limits)
    conn.sendfile(big_file)
    receive(mux, sock, len(PATTERN))
    with pytest.raises(muxcore.OutboxFull):
        while True:
            conn.write(bytes(50_000))
    assert conn.outbox_size < 150_000
    sock.close()


@pytest.mark.unix_only("descriptors are limited otherwise elsewhere")
def test_a_file_for_which_no_descriptor_is_left_harms_nothing(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]
) -> None:
    import resource

    sock, conn = opened(mux, listen, Recorder())
    free = os.dup(0)
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            conn.sendfile(big_file)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert conn.outbox_size == 0
    conn.sendfile(big_file)
    assert receive(mux, sock, BIG) == PATTERN
    sock.close()


@pytest.mark.linux_only("/proc, and O_PATH")
@pytest.mark.parametrize("flags", ["O_WRONLY", "O_PATH"])
@pytest.mark.parametrize("size", [10, BIG])
def test_a_file_that_is_not_open_for_reading_is_refused(
    mux: muxcore.Mux, listen: Listen, tmp_path: Path, flags: str, size: int
) -> None:
    sock, conn = opened(mux, listen, Recorder())
    path = tmp_path / "file"
    path.write_bytes(PATTERN[:size])
    file = os.open(path, getattr(os, flags))
    with pytest.raises(ValueError, match="file must be open for reading"):
        conn.sendfile(file)
    os.close(file)
    assert conn.outbox_size == 0
    sock.close()


@pytest.mark.linux_only("/proc")
def test_a_file_that_does_not_say_its_size_is_read_to_its_end(
    mux: muxcore.Mux, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, conn = opened(mux, listen, Recorder())
    with Path("/proc/version").open("rb") as file:
        wanted = Path("/proc/version").read_bytes()
        assert os.fstat(file.fileno()).st_size == 0
        conn.sendfile(file)
        conn.sendfile(file, 2, 3)
        assert receive(mux, sock, len(wanted) + 3) == wanted + wanted[2:5]
        with pytest.raises(ValueError, match=f"count must be <= {len(wanted) - 2}"):
            conn.sendfile(file, 2, len(wanted))
        monkeypatch.setattr(muxcore._file, "UNSIZED", len(wanted))
        conn.sendfile(file)
        assert receive(mux, sock, len(wanted)) == wanted
        monkeypatch.setattr(muxcore._file, "UNSIZED", 10)
        with pytest.raises(ValueError, match="file must report its size, or have at most 10 bytes"):
            conn.sendfile(file)
    sock.close()


@pytest.mark.linux_only("/proc")
def test_a_long_file_that_does_not_say_its_size_is_read_at_once(
    mux: muxcore.Mux, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, conn = opened(mux, listen, Recorder())
    monkeypatch.setattr(muxcore._file, "WHOLE", 10)
    with Path("/proc/version").open("rb") as file:
        before = open_fds()
        conn.sendfile(file)
        assert open_fds() == before
        wanted = file.read()
    assert receive(mux, sock, len(wanted)) == wanted
    sock.close()


@pytest.mark.linux_only("/proc/self/mem, whose first page cannot be read")
def test_a_file_that_the_system_cannot_read_is_not_called_closed(mux: muxcore.Mux, listen: Listen) -> None:
    sock, conn = opened(mux, listen, Recorder())
    with Path("/proc/self/mem").open("rb", buffering=0) as file, pytest.raises(OSError, match="Input/output error"):
        conn.sendfile(file)
    sock.close()


@pytest.mark.unix_only("elsewhere the position is moved")
@pytest.mark.parametrize("size", [10, BIG])
def test_the_position_in_a_file_stays_where_it_was(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes], size: int
) -> None:
    sock, conn = opened(mux, listen, Recorder())
    big_file.seek(7)
    conn.sendfile(big_file, 0, size)
    assert receive(mux, sock, size) == PATTERN[:size]
    assert os.lseek(big_file.fileno(), 0, os.SEEK_CUR) == 7
    sock.close()


@pytest.mark.linux_only("/sys")
def test_a_file_with_less_than_it_says_is_sent_to_its_end(mux: muxcore.Mux, listen: Listen) -> None:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        pytest.skip("this system has no such file")
    sock, conn = opened(mux, listen, Recorder())
    with path.open("rb") as file:
        wanted = path.read_bytes()
        assert len(wanted) < os.fstat(file.fileno()).st_size
        conn.sendfile(file)
        assert conn.outbox_size == len(wanted)
        with pytest.raises(ValueError, match=f"count must be <= {len(wanted)}"):
            conn.sendfile(file, count=len(wanted) + 1)
    assert receive(mux, sock, len(wanted)) == wanted
    sock.close()


@pytest.mark.parametrize("action", ["close", "abort", "detach", "mux"])
@pytest.mark.parametrize("size", [10, BIG])
def test_a_file_whose_fileno_ends_the_connection_is_not_sent(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes], action: str, size: int
) -> None:
    """no_leaked_descriptor sees a descriptor that stays."""
    sock, conn = opened(mux, listen, Recorder())

    class Hostile:
        def fileno(self) -> int:
            if action == "detach":
                conn.detach().close()
            elif action == "mux":
                mux.close()
            else:
                getattr(conn, action)()
            return big_file.fileno()

    assert conn.sendfile(Hostile(), count=size) is False
    assert (conn.closing, conn.outbox_size) == (True, 0)
    sock.close()


@pytest.mark.parametrize("number", [-1, 10**30])
def test_a_number_that_is_no_descriptor_is_named(mux: muxcore.Mux, listen: Listen, number: int) -> None:
    sock, conn = opened(mux, listen, Recorder())
    with pytest.raises(ValueError, match="file must be an open file or its descriptor"):
        conn.sendfile(number)
    sock.close()


@pytest.mark.parametrize("number", ["name", 1.0, None])
def test_a_file_whose_fileno_is_no_int_is_named(mux: muxcore.Mux, listen: Listen, number: Any) -> None:
    class File:
        def fileno(self) -> Any:
            return number

    sock, conn = opened(mux, listen, Recorder())
    with pytest.raises(TypeError, match=r"file must have a fileno\(\) that returns an int"):
        conn.sendfile(File())
    sock.close()


@pytest.mark.unix_only("dup shares the flags of an open file")
def test_a_file_does_not_block_on_a_socket_that_was_made_blocking(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]
) -> None:
    sock, conn = opened(mux, listen, Recorder(), rcvbuf=4096)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    conn.sendfile(big_file)
    shared = os.dup(conn.fileno())
    os.set_blocking(shared, True)
    assert conn.flush() > 0
    os.close(shared)
    assert receive(mux, sock, BIG) == PATTERN
    sock.close()


@pytest.mark.unix_only("signals of a thread")
def test_a_file_leaves_the_signals_of_its_thread_as_they_were(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]
) -> None:
    """While it is sent, SIGPIPE is blocked."""
    sock, conn = opened(mux, listen, Recorder())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    conn.sendfile(big_file)
    assert receive(mux, sock, BIG) == PATTERN
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    sock.close()


@pytest.mark.linux_only("errno of glibc")
def test_what_an_earlier_call_has_left_in_errno_ends_no_file(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]
) -> None:
    sock, conn = opened(mux, listen, Recorder(), limits=muxcore.Limits(high=1 << 24))
    conn.sendfile(big_file)
    shared = os.dup(conn.fileno())
    os.set_blocking(shared, True)
    leave_errno(errno.ENOENT)
    assert 0 < conn.flush() < BIG
    os.close(shared)
    assert receive(mux, sock, BIG) == PATTERN
    sock.close()


@pytest.mark.linux_only("errno of glibc")
def test_a_file_that_has_ended_is_no_error_of_an_earlier_call(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]
) -> None:
    sock, conn = opened(mux, listen, recorder := Recorder(), limits=muxcore.Limits(high=1 << 24))
    conn.sendfile(big_file)
    big_file.truncate(0)
    leave_errno(errno.ENOENT)
    conn.flush()
    until(mux, lambda: recorder.count("close"))
    assert "before the end of the queued part" in str(recorder.reason())
    sock.close()


# --- against mutants that survived (tests/mutants) ------------------------------------------------------


def test_a_small_part_of_a_file_counts_for_the_water_marks(
    mux: muxcore.Mux, listen: Listen, big_file: IO[bytes]
) -> None:
    sock, conn = opened(mux, listen, Recorder(), rcvbuf=4096)
    while conn.send(bytes(50_000)):
        pass
    assert conn.sendfile(big_file, count=10) is False
    sock.close()


@pytest.mark.unix_only("Unix sockets")
def test_what_is_behind_a_file_goes_out_with_it(mux: muxcore.Mux, big_file: IO[bytes]) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder(), limits=muxcore.Limits(high=1 << 20))
    mux.poll(0)
    conn.sendfile(big_file, count=70_000)
    conn.send(b"tail")
    mux.poll(0)
    assert conn.outbox_size == 0
    assert receive(mux, theirs, 70_004) == PATTERN[:70_000] + b"tail"
    theirs.close()


@pytest.mark.unix_only("Unix sockets")
def test_a_file_arrives_whole_though_little_of_it_is_left_at_a_time(mux: muxcore.Mux, big_file: IO[bytes]) -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    conn = mux.attach(ours, Recorder())
    size = (1 << 16) + 1000
    conn.sendfile(big_file, count=size)
    got, left = b"", set()
    while len(got) < size:
        mux.poll(0)
        left.add(conn.outbox_size)
        got += theirs.recv(500)
    assert got == PATTERN[:size]
    assert left & set(range(1, 2000))
    theirs.close()
