"""Calls that fail as their man pages allow, made to by a preloaded library (Promise any-user-code).

FAULTS_STRIDE=1 (`make faults`) puts a fault into every call of each load; else it is each of the core's calls on epoll
and each third one of the fallback's.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import pattern, read_exactly

import muxcore
from muxcore._impl import BACKENDS

pytest.importorskip("trustme")
from faults import FAULTS, FAULTS_OF_FALLBACK, FAULTS_OF_OPENSSL, FAULTS_OF_SOCKETS

pytestmark = [
    pytest.mark.linux_only("LD_PRELOAD, and the names of Linux' calls"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the faults with"),
]
compiled_only = pytest.mark.skipif("epoll" not in BACKENDS, reason="the compiled core is missing")

TESTS = Path(__file__).parent
SYS = Path(muxcore.__file__).parent / "_core" / "syscalls.pxd"
OTHER_NAMES = {"epoll_ctl": {"epoll_add", "epoll_mod", "epoll_del"}}
# These need no errno: their arguments are constants, or their result is ignored.
CANNOT_FAIL = {"clock_gettime", "sigemptyset", "sigaddset", "pthread_sigmask", "sigtimedwait", "ntohs", "ntohl",
               "inet_ntop"}
# Those of OpenSSL that only look something up, or whose result cannot be an error.
LOOK_UPS = {
    "SSL_get_error", "SSL_get_SSL_CTX", "SSL_get_rbio", "SSL_get_wbio", "BIO_read", "BIO_ctrl", "ERR_clear_error",
}  # fmt: skip
NOT_SYSTEM_CALLS = {"malloc", "realloc"}
# What Python's sockets call on behalf of the fallback core. (Not ioctl, which is their setblocking.)
OF_SOCKETS = ["accept4", "recv", "send", "sendmsg", "recvmsg", "sendfile", "shutdown", "setsockopt", "getsockopt"]
OF_SOCKETS += ["close", "recvfrom", "sendto"]


def libc_functions() -> set[str]:
    """What _core/syscalls.pxd declares of libc, and what it looks up at run time."""
    text = SYS.read_text()
    blocks = re.findall(r'^cdef extern from "<[^\n]*:\n((?:    .*\n|\n)*)', text, re.M)
    declared = re.findall(r'^    [\w ]+?\*? ?(\w+) ?(?:"(\w+)")?\([^\n]*', "".join(blocks), re.M)
    return {other or name for name, other in declared} | set(re.findall(r'dlsym\(\w+, "(\w+)"\)', text))


@pytest.mark.skipif(not SYS.exists(), reason="the sources are not here")
def test_every_call_of_the_core_is_made_to_fail() -> None:
    functions = libc_functions()
    assert {"epoll_ctl", "recv", "sendmsg", "epoll_pwait2", "clock_gettime"} < functions, "they are found"
    wanted = set().union(*(OTHER_NAMES.get(name, {name}) for name in functions - CANNOT_FAIL))
    assert wanted == FAULTS.keys() - NOT_SYSTEM_CALLS
    assert functions > CANNOT_FAIL, "and what cannot fail is called"


@pytest.mark.skipif(not SYS.exists(), reason="the sources are not here")
def test_every_call_of_openssl_is_made_to_fail() -> None:
    functions = set(re.findall(r'dlsym\(\w+, "(\w+)"\)', SYS.with_name("openssl.pxd").read_text()))
    assert functions == FAULTS_OF_OPENSSL.keys() | LOOK_UPS


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, TESTS / "faults.c", "-ldl"], check=True)
    return library


def preloaded(shim: Path) -> dict[str, str]:
    return os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}


def injections(shim: Path, backend: str, names: list[str], stride: int, span: int = 1) -> dict[str, Any]:
    stride = int(os.environ.get("FAULTS_STRIDE", stride))
    command = [sys.executable, "-X", "faulthandler", TESTS / "faults.py", backend, str(stride), str(span), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=preloaded(shim), timeout=600)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    print(f"{backend}: {result['runs']} loads with {result['faults']} faults in {', '.join(names)}")
    assert result["wrong"] == [], "\n".join(result["wrong"])
    return result


@compiled_only
@pytest.mark.timeout(600)
@pytest.mark.parametrize("span", [1, 4])
def test_whatever_call_fails_nothing_is_lost_that_is_not_reported(shim: Path, span: int) -> None:
    """Of every call, the first, the second, ... in turn; every errno and short count; alone, and four in a row."""
    result = injections(shim, "epoll", list(FAULTS), 1 if span == 1 else 3, span)
    for name in FAULTS:
        assert result["calls"][name], f"{name} is in the load"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", sorted({"select", "poll"} & set(BACKENDS)))
def test_whatever_call_fails_the_fallback_does_the_same(shim: Path, backend: str) -> None:
    result = injections(shim, backend, [*OF_SOCKETS, *FAULTS_OF_FALLBACK.keys() & {backend}], 3)
    assert result["faults"] > 300


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", sorted({"epoll", "select"} & set(BACKENDS)))
def test_whatever_fails_in_making_a_socket_or_connecting_is_reported(shim: Path, backend: str) -> None:
    result = injections(shim, backend, list(FAULTS_OF_SOCKETS), 1)
    for name in FAULTS_OF_SOCKETS:
        assert result["calls"][name], f"{name} is in the load"


@compiled_only
@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="without a GIL, a PyList_New that has no memory frees items twice; see docs/trust.md (CPython's gh-152125)",
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("span", [1, 2, 5, 13])
def test_whichever_allocation_of_python_fails_nothing_is_lost_that_is_not_reported(shim: Path, span: int) -> None:
    """As _testcapi.set_nomemory has it, but counted over the whole load, and in every build of Python; alone, and with
    those that follow it: then not even the traceback of the MemoryError can be made."""
    assert injections(shim, "epoll", ["python"], 1, span)["faults"] > 100


@compiled_only
@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")) or getattr(sys.modules.get("_ssl"), "__file__", None) is None,
    reason="the core calls OpenSSL through Python's ssl there",
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("span", [1, 3])
def test_whatever_a_call_of_openssl_returns_ends_its_connection_alone(shim: Path, span: int) -> None:
    """Promise tls."""
    result = injections(shim, "epoll", list(FAULTS_OF_OPENSSL), 1, span)
    for name in FAULTS_OF_OPENSSL:
        assert result["calls"][name], f"{name} is in the load"


# --- what few systems say --------------------------------------------------------------------------

ACCEPT4 = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <sys/socket.h>

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags)
{
    int (*next)(int, struct sockaddr *, socklen_t *, int) = dlsym(RTLD_NEXT, "accept4");
    int got = next(fd, address, size, flags);
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)address;
    if (got >= 0) {
        DO
    }
    return got;
}
"""
# Datagrams, with memory that is full of something: a call that wants no ancillary data must say so.
RECVMMSG = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/socket.h>

int recvmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags, struct timespec *timeout)
{
    int (*next)(int, struct mmsghdr *, unsigned int, int, struct timespec *) = dlsym(RTLD_NEXT, "recvmmsg");
    for (unsigned int i = 0; i < count; i++)
        if (messages[i].msg_hdr.msg_control != NULL || messages[i].msg_hdr.msg_controllen != 0)
            abort();
    return next(fd, messages, count, flags, timeout);
}
"""
ACCEPT = """
import muxcore, socket
with muxcore.Mux(backend="epoll") as mux:
    listener = mux.listen(("127.0.0.1", 0))
    with socket.create_connection(listener.address) as client:
        while not len(mux.connections):
            mux.poll(1)
        [conn] = mux.connections
        assert conn.peer == client.getsockname(), conn.peer
        assert repr(conn.peer) in repr(conn)
"""
ACCEPT_AND_LEAVE = """
import muxcore, socket, struct
with muxcore.Mux(backend="epoll") as mux:
    listener = mux.listen(("127.0.0.1", 0))
    with socket.create_connection(listener.address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    [(conn, _)] = mux.poll(1)
    assert conn.peer == "", conn.peer
"""
ACCEPT_IPV6 = """
import muxcore, socket
with muxcore.Mux(backend="epoll") as mux:
    listener = mux.listen(("::1", 0))
    with socket.create_connection(listener.address[:2]) as client:
        while not len(mux.connections):
            mux.poll(1)
        [conn] = mux.connections
        assert conn.peer == ("::1", client.getsockname()[1], 7, 9), conn.peer
"""
RECEIVE = """
import muxcore, socket
got = []
with muxcore.Mux(backend="epoll") as mux, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    mux.datagram(("127.0.0.1", 0), lambda datagram, messages: None).close()
    datagram = mux.datagram(("127.0.0.1", 0), lambda datagram, messages: got.extend(messages), max_size=10)
    sock.sendto(b"hello", datagram.address)
    while not got:
        mux.poll(1)
    assert got[0][0] == b"hello", got
"""


def beside(tmp_path: Path, library: str, program: str, **environment: str) -> None:
    """Run a program with a library of ours before libc."""
    (tmp_path / "library.c").write_text(library)
    path = tmp_path / "library.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, tmp_path / "library.c", "-ldl"], check=True)
    subprocess.run([sys.executable, "-c", program], env=preloaded(path) | environment, timeout=30, check=True)


@compiled_only
@pytest.mark.parametrize("program", [ACCEPT, ACCEPT_AND_LEAVE], ids=["there", "gone"])
def test_a_peer_of_an_unknown_family_is_looked_up_by_python(tmp_path: Path, program: str) -> None:
    """The address from accept4 says AF_VSOCK, of which few systems have a loopback; getpeername returns the real
    family, or fails because the peer is gone."""
    beside(tmp_path, ACCEPT4.replace("DO", "(void)six; address->sa_family = AF_VSOCK;"), program)


@compiled_only
@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_the_flow_and_the_zone_of_a_peer_are_in_its_address(tmp_path: Path) -> None:
    beside(tmp_path, ACCEPT4.replace("DO", "six->sin6_flowinfo = htonl(7); six->sin6_scope_id = 9;"), ACCEPT_IPV6)


@compiled_only
def test_no_ancillary_data_of_datagrams_is_requested_whatever_was_in_memory(tmp_path: Path) -> None:
    beside(tmp_path, RECVMMSG, RECEIVE, MALLOC_PERTURB_="77")  # glibc fills what it gives away


# --- a server in a process of its own --------------------------------------------------------------

SERVER = """
import faults, logging, muxcore, sys
logging.basicConfig(level=logging.ERROR)
class Echo(muxcore.Handler):
    def on_message(self, conn, message): conn.send(message)
    def on_close(self, conn, exc): print("closed", repr(exc), flush=True)
    def on_open(self, conn): print("opened", flush=True)
muxes = []
def ready(mux, listener):
    muxes.append(mux)
    faults.arm(sys.argv[1])
    print("listening", listener.address[1], flush=True)
muxcore.serve(Echo(), ("127.0.0.1", 0), ready=ready)
print(muxes[0].stats(), flush=True)
"""

DATAGRAMS = """
import faults, signal, muxcore, sys
class Echo:
    def on_datagrams(self, datagram, messages):
        for data, address in messages: datagram.send(data, address)
    def on_error(self, datagram, exc): print("error", repr(exc), flush=True)
with muxcore.Mux() as mux:
    mux.add_signal_handler(signal.SIGTERM, mux.stop)
    datagram = mux.datagram(("127.0.0.1", 0), Echo())
    faults.arm(sys.argv[1])
    print("listening", datagram.address[1], flush=True)
    mux.run()
    print(mux.stats(), flush=True)
"""


@contextmanager
def server(
    shim: Path, fault: str, program: str = SERVER, backend: str = "auto"
) -> Iterator[tuple[int, list[str]]]:
    """An echo server with a fault: its port; and, once it has ended, what it printed."""
    command = [sys.executable, "-c", program, fault]
    environment = preloaded(shim) | {"MUXCORE_BACKEND": backend}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        yield int(process.stdout.readline().split()[1]), lines
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=20)
        lines.extend(out.splitlines())
    assert process.returncode == 0, lines


def echoed(port: int, data: bytes = pattern(3000)) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        return read_exactly(sock, len(data) + 1) == data


def counted(lines: list[str], name: str) -> int:
    match = re.search(rf"\b{name}=(\d+)", lines[-1])
    assert match is not None
    return int(match[1])


@compiled_only
@pytest.mark.parametrize(
    "fault",
    [
        f"send:{errno.ENOBUFS}:1:3",
        f"send:{errno.ENOMEM}:1:3",
        f"send:{errno.EINTR}:1:9",
        f"send:{errno.EAGAIN}:1:1",
        f"recv:{errno.EINTR}:1:9",
        f"recv:{errno.EAGAIN}:1:3",
        f"accept4:{errno.EINTR}:1:9",
        f"accept4:{errno.ECONNABORTED}:1:9",
        f"accept4:{errno.EMFILE}:1:2",
        f"accept4:{errno.EAGAIN}:1:1",
    ],
)
def test_a_passing_fault_loses_nothing(shim: Path, fault: str) -> None:
    with server(shim, fault) as (port, lines):
        assert echoed(port)
    assert counted(lines, "waits") < 200, "it does not spin either"
    assert lines.count("closed None") == 1


ACCEPTS = """
import faults, logging, muxcore, socket, sys
class Unexpected(logging.Handler):
    count = 0
    def emit(self, record): self.count += "does not document" in record.getMessage()
unexpected = Unexpected()
logging.getLogger("muxcore").addHandler(unexpected)
shim = faults.Shim("epoll")
with muxcore.Mux(backend="epoll") as mux:
    listener = mux.listen(("127.0.0.1", 0), lambda conn, message: None)
    shim.on.value = 1
    for code in map(int, sys.argv[1:]):
        shim.arm("accept4", 1, 2, code)
        before, unexpected.count = mux.stats(), 0
        with socket.create_connection(listener.address):
            while mux.stats().accepts == before.accepts: mux.poll(1)
        print(code, mux.stats().accept_pauses - before.accept_pauses, unexpected.count)
"""


def accept_with(shim: Path, codes: list[int]) -> set[tuple[int, int]]:
    """Let each errno come of the first two calls of an accept: how often the listener rested, and was surprised."""
    command = [sys.executable, "-c", ACCEPTS, *map(str, codes)]
    done = subprocess.run(command, capture_output=True, text=True, env=preloaded(shim), timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [code for code, _, _ in lines] == codes
    return {(pauses, surprises) for _, pauses, surprises in lines}


@compiled_only
def test_a_client_that_is_gone_before_it_is_accepted_does_not_pause_the_listener(shim: Path) -> None:
    gone = [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENOPROTOOPT,
            errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH]  # fmt: skip
    assert accept_with(shim, [*gone, errno.EINTR]) == {(0, 0)}


@compiled_only
def test_a_listener_pauses_while_the_system_is_out_of_resources(shim: Path) -> None:
    assert accept_with(shim, [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]) == {(2, 0)}


@compiled_only
def test_a_listener_pauses_after_an_unexpected_error_and_logs_it(shim: Path) -> None:
    assert accept_with(shim, [errno.EINVAL, errno.EIO]) == {(2, 1)}


WAIT = """
import faults, muxcore, sys, time
faults.arm(sys.argv[1])
with muxcore.Epoll() as ep:
    start = time.monotonic()
    assert ep.poll(0.02) == []
    assert time.monotonic() - start >= 0.02
"""


@compiled_only
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_or_a_sandbox_without_epoll_pwait2_is_waited_in_all_the_same(shim: Path, code: int) -> None:
    command = [sys.executable, "-c", WAIT, f"epoll_pwait2:{code}:1:1000"]
    subprocess.run(command, env=preloaded(shim), timeout=30, check=True)


@compiled_only
def test_clients_that_are_gone_are_no_reason_for_a_listener_to_pause(shim: Path, backend: str) -> None:
    with server(shim, f"accept4:{errno.ECONNABORTED}:1:9", backend=backend) as (port, lines):
        assert echoed(port)
    assert counted(lines, "accept_pauses") == 0
    assert lines.count("closed None") == 1


LISTEN = """
import errno, faults, muxcore, socket, sys
with muxcore.Mux() as mux, socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    address = sock.getsockname()
    faults.arm(sys.argv[1])
    try:
        mux.listen(sock, lambda conn, message: conn.send(message))
    except OSError as error:
        print(errno.errorcode[error.errno], sock.getsockname() == address)
    listener = mux.listen(sock, lambda conn, message: conn.send(message))
    with socket.create_connection(address) as client:
        client.sendall(b"x")
        while not mux.stats().bytes_out:
            mux.poll(1)
        print(client.recv(1))
"""


@compiled_only
def test_a_listening_socket_that_cannot_be_watched_stays_its_owners(shim: Path) -> None:
    command = [sys.executable, "-c", LISTEN, f"epoll_add:{errno.ENOSPC}:1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False, env=preloaded(shim))
    assert (done.stdout, done.returncode) == ("ENOSPC True\nb'x'\n", 0), done.stderr


@compiled_only
@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
def test_a_connection_that_cannot_be_watched_is_closed_and_its_handler_notified(shim: Path, code: int) -> None:
    """Promise accepting."""
    with server(shim, f"epoll_add:{code}:1:1") as (port, lines):
        with (
            pytest.raises(ConnectionResetError),
            socket.create_connection(("127.0.0.1", port), timeout=20) as sock,
        ):
            sock.recv(1)
        assert echoed(port), "the next one is served"
    callbacks = [line for line in lines if line.startswith(("opened", "closed"))]
    assert callbacks == ["opened", f"closed {OSError(code, os.strerror(code))!r}", "opened", "closed None"]


@compiled_only
def test_a_connection_whose_interest_cannot_be_changed_ends_with_the_reason(shim: Path) -> None:
    with server(shim, f"epoll_mod:{errno.ENOMEM}:1:1") as (port, lines):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.settimeout(20)
            with pytest.raises(OSError, match=r"reset by peer|Broken pipe"):
                while True:
                    sock.sendall(bytes(1 << 16))
        assert echoed(port)
    assert any("Cannot allocate memory" in line for line in lines if line.startswith("closed"))


def replies(port: int, count: int) -> list[bytes]:
    """Send b"0", b"1", ... to an echo of datagrams; the first `count` that come back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.connect(("127.0.0.1", port))
        for i in range(3):
            sock.send(b"%d" % i)
        return [sock.recv(100) for _ in range(count)]


@compiled_only
@pytest.mark.parametrize(
    ("fault", "errors"),
    [
        (f"recvmmsg:{errno.EINTR}:1:9", 0),
        (f"recvmmsg:{errno.EAGAIN}:1:3", 0),
        (f"recvmmsg:{errno.ENOMEM}:1:2", 2),
        (f"sendmmsg:{errno.EINTR}:1:9", 0),
        (f"sendmmsg:{errno.EAGAIN}:1:1", 0),
        (f"sendmmsg:{errno.ENOBUFS}:1:3", 0),
        (f"sendmmsg:{errno.ECONNREFUSED}:1:1", 1),
    ],
)
def test_a_passing_fault_loses_no_datagram(shim: Path, fault: str, errors: int) -> None:
    with server(shim, fault, DATAGRAMS) as (port, lines):
        assert replies(port, 3) == [b"0", b"1", b"2"]
    assert counted(lines, "waits") < 50, "it does not spin either"
    assert (len(lines), counted(lines, "datagram_errors"), counted(lines, "drops")) == (errors + 1, errors, 0)


@compiled_only
def test_a_datagram_that_is_refused_again_is_given_up(shim: Path) -> None:
    with server(shim, f"sendmmsg:{errno.EPERM}:1:2", DATAGRAMS) as (port, lines):
        assert replies(port, 2) == [b"1", b"2"]
    assert lines[0] == f"error {OSError(errno.EPERM, os.strerror(errno.EPERM))!r}"
    assert (len(lines), counted(lines, "drops")) == (2, 1)


@compiled_only
def test_a_udp_socket_without_room_waits_for_it(shim: Path) -> None:
    with server(shim, f"sendmmsg:{errno.EAGAIN}:1:1", DATAGRAMS) as (port, lines):
        assert replies(port, 3) == [b"0", b"1", b"2"]
    assert counted(lines, "would_blocks") == 1
