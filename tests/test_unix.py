"""Unix sockets: their files, permissions and abstract names, and the credentials of peers (Promise addresses)."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import LOCALHOST, Recorder, SignalAt, client, exchange, open_fds, until

import muxcore

Bind = Callable[..., Any]
KINDS = {"listen": socket.SOCK_STREAM, "datagram": socket.SOCK_DGRAM}


def echo() -> Recorder:
    return Recorder(reply=lambda data: data)


def ignore(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None: ...


@pytest.fixture(params=list(KINDS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bind(mux: muxcore.Mux, method: str) -> Bind:
    """Mux.listen or Mux.datagram."""
    handler: Any = Recorder() if method == "listen" else ignore
    return lambda address, **options: getattr(mux, method)(address, handler, **options)


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


def is_socket(path: Path) -> bool:
    return stat.S_ISSOCK(path.lstat().st_mode)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_by", list(KINDS))
def test_a_socket_file_whose_program_is_gone_is_replaced(bind: Bind, socket_path: Path, left_by: str) -> None:
    with socket.socket(socket.AF_UNIX, KINDS[left_by]) as gone:
        gone.bind(str(socket_path))
    bound = bind(socket_path)
    assert bound.address == str(socket_path)
    bound.close()
    assert not socket_path.exists()


def test_what_replaces_a_socket_file_is_reached_by_clients(mux: muxcore.Mux, socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(socket_path))
        gone.listen()
    with client(mux.listen(socket_path, echo())) as sock:
        assert exchange(mux, sock, b"x") == b"x"


def test_a_path_with_a_listening_socket_is_in_use(mux: muxcore.Mux, bind: Bind, socket_path: Path) -> None:
    recorder = echo()
    first = mux.listen(socket_path, recorder)
    with pytest.raises(OSError, match=f"cannot .* on .*{socket_path}.*: Address already in use") as caught:
        bind(socket_path)
    assert caught.value.errno == errno.EADDRINUSE
    with client(first) as sock:
        assert exchange(mux, sock, b"x") == b"x"
    assert recorder.count("open") == 1, "it has not heard of the attempt"


def test_a_path_bound_but_not_yet_listening_is_in_use(bind: Bind, socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as early:
        early.bind(str(socket_path))
        with pytest.raises(OSError, match="Address already in use"):
            bind(socket_path)
        early.listen()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(socket_path))


def test_a_path_with_a_receiving_socket_is_in_use(bind: Bind, socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as used:
        used.bind(str(socket_path))
        with pytest.raises(OSError, match="Address already in use"):
            bind(socket_path)
        assert is_socket(socket_path)


@pytest.mark.linux_only("a full backlog is EAGAIN")
def test_a_path_with_a_full_backlog_is_in_use(bind: Bind, socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(socket_path))
        busy.listen(0)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for sock in clients:
            sock.setblocking(False)
        assert [sock.connect_ex(str(socket_path)) for sock in clients] == [0, errno.EAGAIN]
        with pytest.raises(OSError, match="Address already in use"):
            bind(socket_path)
        assert is_socket(socket_path)
        for sock in clients:
            sock.close()


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "symlink"])
def test_what_is_no_socket_is_never_removed(bind: Bind, socket_path: Path, kind: str) -> None:
    if kind == "file":
        socket_path.write_bytes(b"precious")
    elif kind == "directory":
        socket_path.mkdir()
    elif kind == "fifo":
        os.mkfifo(socket_path)
    else:  # to a socket file without a listener
        target = socket_path.with_name("target")
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(target))
        socket_path.symlink_to(target)
    before = socket_path.lstat()
    with pytest.raises(OSError, match="a file that is not a socket has this path") as caught:
        bind(socket_path)
    assert caught.value.errno == errno.EADDRINUSE
    assert str(socket_path) in str(caught.value)
    assert socket_path.lstat() == before


def test_close_removes_only_its_own_file(bind: Bind, socket_path: Path) -> None:
    bound = bind(socket_path)
    socket_path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(socket_path))
        bound.close()
        assert is_socket(socket_path)


def test_close_removes_the_file_from_any_directory(
    bind: Bind, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(socket_path.parent)
    bound = bind("socket")
    assert bound.address == "socket"
    monkeypatch.chdir("/")
    bound.close()
    assert not socket_path.exists()


def test_the_end_of_the_mux_removes_the_file(backend: str, socket_path: Path) -> None:
    with muxcore.Mux(backend=backend) as mux:
        mux.listen(socket_path, echo())
        mux.datagram(socket_path.with_name("other"), ignore)
    assert list(socket_path.parent.iterdir()) == []


def test_the_file_of_a_socket_that_was_given_stays(bind: Bind, method: str, socket_path: Path) -> None:
    """The process that has bound it, perhaps a supervisor, may hand it to the next process."""
    sock = socket.socket(socket.AF_UNIX, KINDS[method])
    sock.bind(str(socket_path))
    bind(sock).close()
    assert is_socket(socket_path)


def test_what_fails_after_bind_leaves_no_file(mux: muxcore.Mux, socket_path: Path) -> None:
    before = open_fds()
    with pytest.raises(OSError, match=r"cannot join 239\.1\.2\.3"):
        mux.datagram(socket_path, ignore, join="239.1.2.3")
    assert not socket_path.exists()
    assert open_fds() == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the collector closes one socket
@pytest.mark.parametrize("file", ["_unix.py", "_address.py"])
def test_an_interrupt_at_any_step_of_a_bind_leaves_no_file(
    mux: muxcore.Mux, bind: Bind, socket_path: Path, file: str
) -> None:
    for n in itertools.count():
        before, bound = open_fds(), None
        with SignalAt(file, n) as interrupt:
            bound = bind(socket_path, mode=0o600)
        if bound is not None:
            bound.close()
        assert not socket_path.exists(), (n, interrupt.where)
        assert open_fds() == before, (n, interrupt.where)
        if interrupt.left >= 0:
            break
    assert n > 5


def test_an_interrupt_at_any_step_of_a_close_leaves_no_file(bind: Bind, socket_path: Path) -> None:
    for n in itertools.count(1):  # 0: before the first step
        bound = bind(socket_path)
        with SignalAt("_unix.py", n) as interrupt:
            bound.close()
        assert not socket_path.exists(), (n, interrupt.where)
        if interrupt.left >= 0:
            break
    assert n > 3


def test_a_listener_that_cannot_be_watched_leaves_no_file(
    mux: muxcore.Mux, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("no")

    before = open_fds()
    monkeypatch.setattr(type(mux), "_add_listener", fails, raising=False)
    with pytest.raises(OSError, match="no"):
        mux.listen(socket_path, echo())
    assert not socket_path.exists()
    assert open_fds() == before


# --- permissions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777, 0])
def test_mode_is_what_the_file_has(
    bind: Bind, socket_path: Path, umask: Callable[[int], object], mode: int
) -> None:
    umask(0o027)
    bind(socket_path, mode=mode)
    assert permissions(socket_path) == mode


def test_without_mode_the_umask_decides(bind: Bind, socket_path: Path, umask: Callable[[int], object]) -> None:
    umask(0o027)
    bind(socket_path)
    assert permissions(socket_path) == 0o750


@pytest.mark.linux_only("elsewhere a socket has no permissions of its own")
def test_the_file_is_never_open_to_more_than_mode(
    bind: Bind, socket_path: Path, umask: Callable[[int], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernel fact: bind(2) makes the file with the permissions of the socket's own inode."""
    seen: list[int] = []
    chmod = os.chmod

    def recorded(path: str, mode: int) -> None:
        seen.append(permissions(Path(path)))
        chmod(path, mode)

    umask(0)
    monkeypatch.setattr(os, "chmod", recorded)
    bind(socket_path, mode=0o600)
    assert seen == [0o600]


@pytest.mark.parametrize(
    ("address", "mode", "error", "match"),
    [
        ("path", "600", TypeError, "mode must be an int"),
        ("path", True, TypeError, "mode must be an int"),
        ("path", -1, ValueError, "mode must be >= 0"),
        ("path", 0o1000, ValueError, "mode must be <= 511"),
        (LOCALHOST, 0o600, ValueError, "mode must be None: only a path"),
        pytest.param("\0name", 0o600, ValueError, "mode must be None", marks=pytest.mark.linux_only("abstract names")),
    ],
)
@pytest.mark.unix_only("Unix sockets")
def test_a_bad_mode_is_named(bind: Bind, address: Any, mode: Any, error: type[Exception], match: str) -> None:
    before = open_fds()
    with pytest.raises(error, match=match):
        bind(address, mode=mode)
    assert open_fds() == before


def test_a_socket_that_was_given_has_its_mode(bind: Bind, method: str, socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, KINDS[method]) as sock:
        sock.bind(str(socket_path))
        with pytest.raises(ValueError, match="mode must be None"):
            bind(sock, mode=0o600)
        assert sock.fileno() >= 0


def test_a_free_datagram_socket_has_no_mode(mux: muxcore.Mux) -> None:
    with pytest.raises(ValueError, match="mode must be None"):
        mux.datagram(None, ignore, mode=0o600)


# --- abstract names --------------------------------------------------------------------------------


@pytest.mark.linux_only("abstract names")
def test_listens_on_an_abstract_name(mux: muxcore.Mux) -> None:
    name = f"\0muxcore test {os.getpid()}"
    listener = mux.listen(name, echo())
    assert listener.address == name
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(name)
        assert exchange(mux, sock, b"x") == b"x"
    with pytest.raises(OSError, match="Address already in use"):
        mux.listen(name, echo())
    listener.close()
    mux.listen(name, echo()).close()


@pytest.mark.linux_only("abstract names")
def test_an_abstract_name_may_end_with_nul(mux: muxcore.Mux) -> None:
    recorder = echo()
    listener = mux.listen(f"\0muxcore test {os.getpid()}", recorder)
    name = f"{listener.address} client\0\0"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(name)
        sock.connect(listener.address)
        assert exchange(mux, sock, b"x") == b"x"
        assert recorder.connections[0].peer == name


@pytest.mark.unix_only("Unix sockets")
def test_a_nul_inside_a_path_is_refused(bind: Bind, socket_path: Path) -> None:
    """bind(2) would use what is before it."""
    with pytest.raises(ValueError, match="address path must not contain NUL"):
        bind(f"{socket_path}\0.txt")
    assert not socket_path.exists()


@pytest.mark.unix_only("Unix sockets")
def test_abstract_names_elsewhere_are_refused(bind: Bind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(ValueError, match="plan9 has no abstract names"):
        bind("\0name")


# --- credentials -----------------------------------------------------------------------------------

CLIENT = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    sock.recv(1)
"""


@pytest.mark.linux_only("SO_PEERCRED")
def test_peer_credentials_are_those_of_the_connecting_process(mux: muxcore.Mux, socket_path: Path) -> None:
    recorder = Recorder()
    mux.listen(socket_path, recorder)
    with subprocess.Popen([sys.executable, "-c", CLIENT, str(socket_path)]) as process:
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        assert conn.peer_credentials == (process.pid, os.getuid(), os.getgid())
        conn.send(b"x")
        until(mux, lambda: conn.closed)


@pytest.mark.linux_only("SO_PEERCRED")
def test_peer_credentials_of_a_pair(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    found: muxcore.PeerCredentials = conn.peer_credentials
    assert (found.pid, found.uid, found.gid) == (os.getpid(), os.getuid(), os.getgid())
    theirs.close()


def test_peer_credentials_without_a_unix_socket(mux: muxcore.Mux) -> None:
    recorder = Recorder()
    with client(mux.listen(LOCALHOST, recorder)):
        until(mux, lambda: recorder.connections)
        with pytest.raises(ValueError, match="peer_credentials: only Unix sockets have them, not AF_INET"):
            _ = recorder.connections[0].peer_credentials


def test_peer_credentials_where_the_system_has_none(mux: muxcore.Mux, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("this Python has no Unix sockets")
    monkeypatch.delattr(socket, "SO_PEERCRED", raising=False)
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    with pytest.raises(ValueError, match="no SO_PEERCRED on"):
        _ = conn.peer_credentials
    theirs.close()


def test_peer_credentials_after_the_end(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    conn.abort()
    with pytest.raises(muxcore.ConnectionClosed, match="peer_credentials"):
        _ = conn.peer_credentials
    theirs.close()


@pytest.mark.linux_only("SO_PEERCRED")
def test_peer_credentials_are_for_the_muxs_thread(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    mux.poll(0)
    errors: list[str] = []

    def work() -> None:
        try:
            _ = conn.peer_credentials
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert "belongs to the thread" in errors[0]
    theirs.close()
