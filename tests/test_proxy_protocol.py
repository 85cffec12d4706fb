"""The PROXY protocol, received and sent (Promise proxy-protocol)."""

from __future__ import annotations

import random
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import ByLine, Recorder, free_port, until, until_it_listens

import muxcore
from muxcore import proxy_protocol
from muxcore.proxy_protocol import Networks, Proxy, ProxyError, ProxyWire, header

FOUR = ("192.0.2.1", 56324), ("198.51.100.9", 443)
SIX = ("2001:db8::1", 56324, 0, 0), ("2001:db8::9", 443, 0, 0)
SIGNATURE = bytes.fromhex("0D0A0D0A000D0A515549540A")
V1 = b"PROXY TCP4 192.0.2.1 198.51.100.9 56324 443\r\n"
TRUSTED = Networks(["127.0.0.0/8", "unix"])


def parse(data: bytes, peer: Any = ("127.0.0.1", 1)) -> ProxyWire:
    wire = ProxyWire(TRUSTED, peer, None)
    wire.received.append(data)
    wire.advance()
    return wire


# --- headers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "addresses"),
    [(1, FOUR), (1, SIX), (1, (None, None)), (2, FOUR), (2, SIX), (2, (None, None)), (2, ("/run/a", "/run/b"))],
)
def test_a_header_is_read_as_it_was_made(version: int, addresses: tuple[Any, Any]) -> None:
    wire = parse(header(version, *addresses) + b"rest")
    assert wire.proxy == Proxy(version, *addresses)
    assert wire.plain == [b"rest"]
    assert wire.opened


def test_a_header_of_version_1_is_what_the_specification_shows() -> None:
    assert header(1, *FOUR) == V1
    assert header(1, None, None) == b"PROXY UNKNOWN\r\n"


def test_a_header_of_version_2_is_what_the_specification_shows() -> None:
    body = socket.inet_aton("192.0.2.1") + socket.inet_aton("198.51.100.9") + struct.pack("!HH", 56324, 443)
    assert header(2, *FOUR) == SIGNATURE + b"\x21\x11\x00\x0c" + body
    assert header(2, None, None) == SIGNATURE + b"\x20\x00\x00\x00"


def test_the_checksum_is_castagnolis() -> None:
    """The check value of CRC-32C (RFC 3720, B.4, and every catalogue of CRCs)."""
    assert proxy_protocol.crc32c(b"123456789") == 0xE3069283


def test_extensions_and_a_checksum_are_kept() -> None:
    data = header(2, *FOUR, [(0x01, b"h2"), (0x02, b"example.org")], checksum=True)
    proxy = parse(data).proxy
    assert proxy is not None
    assert proxy.tlvs[:2] == ((0x01, b"h2"), (0x02, b"example.org"))
    assert proxy.tlvs[2][0] == 3


def test_each_bit_of_a_header_counts_for_its_checksum() -> None:
    data = header(2, *FOUR, [(0xEA, b"x")], checksum=True)
    for i in range(16, len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[i] ^= 1 << bit
            try:
                proxy = parse(bytes(damaged)).proxy
            except ProxyError:
                continue
            # An extension may end elsewhere, or be of another type: then no checksum is left.
            assert proxy is None or all(kind != 3 for kind, _ in proxy.tlvs)


@pytest.mark.parametrize("data", [V1, header(2, *SIX, [(4, bytes(300))], checksum=True)], ids=["v1", "v2"])
def test_a_header_may_come_torn_at_each_byte(data: bytes) -> None:
    for i in range(len(data)):
        wire = ProxyWire(TRUSTED, ("127.0.0.1", 1), None)
        for piece in (data[:i], data[i:] + b"rest"):
            if piece:
                wire.received.append(piece)
            wire.advance() if wire.received else None
        assert wire.plain == [b"rest"], i


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"PROXY\r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.9 56324\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.9 56324 443 9\r\n",
        b"PROXY TCP4  192.0.2.1 198.51.100.9 56324 443\r\n",
        b"PROXY TCP4 192.0.2.01 198.51.100.9 56324 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.9 056324 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.9 65536 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.9 -1 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.9 +1 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.9 1_0 443\r\n",
        b"PROXY TCP4 2001:db8::1 2001:db8::9 1 2\r\n",
        b"PROXY TCP6 192.0.2.1 198.51.100.9 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 2001:db8::9 1 2\r\n",
        b"PROXY UDP4 192.0.2.1 198.51.100.9 1 2\r\n",
        b"proxy TCP4 192.0.2.1 198.51.100.9 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.9 1 2\n" + b" " * 80,
        b"PROXY UNKNOWN " + b"x" * 100,
        b"PROXY TCP4 \xff\xfe 198.51.100.9 1 2\r\n",
        SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x31\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x22\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x41\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x13\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11),
        SIGNATURE + b"\x21\x21\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x31\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x11\x00\x0e" + bytes(12) + b"\x01\x00",
        SIGNATURE + b"\x21\x11\x00\x10" + bytes(12) + b"\x01\x00\x02x",
        SIGNATURE + b"\x21\x11\x00\x12" + bytes(12) + b"\x03\x00\x03xyz",
        SIGNATURE + b"\x21\x11\x00\x13" + bytes(12) + b"\x03\x00\x04wxyz",
        SIGNATURE[:5] + b"x",
    ],
    ids=lambda data: repr(data[:60]),
)
def test_a_bad_header_is_refused(data: bytes) -> None:
    with pytest.raises(ProxyError):
        parse(data)


def test_a_second_checksum_is_refused() -> None:
    """Nine thousand of them, each correct, took 47 seconds."""
    tlvs = b"\x03\x00\x04wxyz" * 2
    with pytest.raises(ProxyError, match="two checksums"):
        parse(SIGNATURE + b"\x20\x00" + struct.pack("!H", len(tlvs)) + tlvs)


def test_a_large_header_in_single_bytes_costs_no_more_than_others() -> None:
    """Each byte is looked at a bounded number of times, however it arrives."""
    data = header(2, *FOUR, tlvs=[(0xE0, bytes(60_000))])
    wire = ProxyWire(TRUSTED, ("127.0.0.1", 1), None)
    begun = time.process_time()
    for at in range(len(data)):
        wire.received.append(data[at : at + 1])
        wire.advance()
    assert wire.opened
    assert time.process_time() - begun < 1  # 9 seconds, when the pieces were joined for each byte


def test_a_line_without_an_end_is_refused_behind_107_bytes() -> None:
    longest = b"PROXY UNKNOWN ".ljust(105, b"x") + b"\r\n"
    assert parse(longest).opened
    assert not parse(longest[:106]).opened
    with pytest.raises(ProxyError, match="at most 107 bytes"):
        parse(longest[:105] + b"xx")


def test_local_and_unknown_keep_the_real_address() -> None:
    local = SIGNATURE + b"\x20\x11\x00\x0c" + bytes(12)
    for data in (local, b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN 1.2.3.4 5.6.7.8 9 10\r\n", header(2, None, None)):
        proxy = parse(data).proxy
        assert proxy is not None
        assert proxy.source is None


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        (("10.1.2.3", 1), True), (("11.1.2.3", 1), False), (("::ffff:10.1.2.3", 1, 0, 0), True), ("", True),
        (("fe80::1%eth0", 1, 0, 2), True), (("2001:db8::1", 1, 0, 0), False), ("/path", True),
    ],
)
def test_only_the_peers_of_the_networks_are_trusted(peer: Any, trusted: bool) -> None:
    assert Networks(["10.0.0.0/8", "fe80::/10", "unix"]).trusts(peer) == trusted


def test_the_peers_of_a_unix_socket_are_trusted_only_if_that_is_said() -> None:
    assert not Networks(["10.0.0.0/8"]).trusts("")


def test_fuzzed_headers_raise_nothing_else() -> None:
    source = random.Random(1)
    seeds = [V1, header(1, *SIX), header(2, *FOUR, [(1, b"h2")], checksum=True), header(2, "/a", "/b")]
    for _ in range(20_000):
        data = bytearray(source.choice(seeds))
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(data))
            data[at : at + source.randint(0, 2)] = source.randbytes(source.randint(0, 3))
            data = data or bytearray(b"x")
        try:
            parse(bytes(data))
        except ProxyError:
            pass


# --- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ("10.0.0.0/8", TypeError, "proxy_protocol must be a list of networks"),
        (True, TypeError, "proxy_protocol must be a list of networks"),
        ([], ValueError, "proxy_protocol must name the networks"),
        (["10.0.0.1/8"], ValueError, "proxy_protocol: 10.0.0.1/8 has host bits set"),
        ([10], TypeError, "proxy_protocol: a network must be a str such as '10.0.0.0/8', or 'unix', not 10"),
        (["host"], ValueError, "proxy_protocol: 'host' does not appear to be"),
    ],
)
def test_a_bad_argument_of_listen_is_named(mux: muxcore.Mux, value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mux.listen(("127.0.0.1", 0), Recorder(), proxy_protocol=value)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3, *FOUR), ValueError, "version must be 1 or 2"),
        ((1, FOUR[0], None), ValueError, "source and destination must both"),
        ((1, FOUR[0], SIX[0]), ValueError, "of one family"),
        ((1, *FOUR, [(1, b"")]), ValueError, "need version 2"),
        ((2, *FOUR, [(3, b"")]), ValueError, "tlvs: a type"),
        ((2, *FOUR, [(256, b"")]), ValueError, "tlvs: a type"),
        ((2, *FOUR, [(1, bytes(65536))]), ValueError, "tlvs: a value"),
        ((2, *FOUR, [(1, bytes(65535))]), ValueError, "tlvs: they must have"),
        ((2, "x" * 109, "y"), ValueError, "at most 108 bytes"),
        ((1, "/a", "/b"), ValueError, "version 1 has no Unix sockets"),
        ((1, ("192.0.2.1", 70000), FOUR[1]), ValueError, "source: the port"),
        ((1, 5, 6), TypeError, "source must be"),
        ((2, *FOUR, [(float("inf"), b"x")]), TypeError, "tlvs must be pairs"),
        ((2, *FOUR, [(1, 10**12)]), TypeError, "tlvs must be pairs"),
    ],
)
def test_a_bad_argument_of_header_is_named(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        header(*arguments)


# --- connections -----------------------------------------------------------------------------------


@pytest.fixture
def client() -> Iterator[Callable[[Any], socket.socket]]:
    clients: list[socket.socket] = []

    def connect(address: Any) -> socket.socket:
        family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
        sock = socket.socket(family)
        sock.connect(address)
        sock.settimeout(10)
        clients.append(sock)
        return sock

    yield connect
    for sock in clients:
        sock.close()


def test_the_client_is_the_peer(mux: muxcore.Mux, client: Callable[[Any], socket.socket]) -> None:
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines(), proxy_protocol=["127.0.0.0/8"])
    client(listener.address).sendall(header(2, *FOUR, [(2, b"example.org")]) + b"hello\n")
    until(mux, lambda: handler.count("message"))
    [conn] = handler.connections
    assert handler.messages() == [b"hello"]
    assert conn.peer == FOUR[0]
    assert conn.proxy == Proxy(2, *FOUR, ((2, b"example.org"),))
    assert conn.tls is None


def test_a_health_check_keeps_the_real_address(mux: muxcore.Mux, client: Callable[[Any], socket.socket]) -> None:
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, proxy_protocol=["127.0.0.0/8"])
    sock = client(listener.address)
    sock.sendall(header(2, None, None))
    until(mux, lambda: handler.count("open"))
    assert handler.connections[0].peer == sock.getsockname()


def test_nothing_is_processed_or_sent_before_the_header(
    mux: muxcore.Mux, client: Callable[[Any], socket.socket]
) -> None:
    class Greeter(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            super().on_open(conn)
            conn.send(b"welcome")

    handler = Greeter()
    listener = mux.listen(("127.0.0.1", 0), handler, proxy_protocol=["127.0.0.0/8"])
    sock = client(listener.address)
    sock.sendall(V1[:-1])
    until(mux, lambda: mux.stats().bytes_in == len(V1) - 1)
    mux.poll(0)
    assert handler.names() == []
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(10)
    sock.sendall(V1[-1:])
    until(mux, lambda: handler.count("open"))
    sock.setblocking(True)
    mux.poll(0)
    assert sock.recv(10) == b"welcome"


@pytest.mark.parametrize("first", [b"GET / HTTP/1.0\r\n\r\n", V1], ids=["no header", "untrusted"])
def test_a_peer_without_a_good_header_is_refused(
    mux: muxcore.Mux, client: Callable[[Any], socket.socket], first: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Recorder()
    networks = ["10.0.0.0/8"] if first is V1 else ["127.0.0.0/8"]
    listener = mux.listen(("127.0.0.1", 0), handler, proxy_protocol=networks)
    sock = client(listener.address)
    sock.sendall(first)
    until(mux, lambda: handler.count("close") or _at_end(sock))
    sock.close()
    until(mux, lambda: handler.count("close"))
    assert handler.names() == ["close"]
    assert isinstance(handler.reason(), ProxyError)
    assert mux.stats().handshake_failures == 1
    assert not caplog.records


def test_a_users_framer_gets_what_came_with_the_header(
    mux: muxcore.Mux, client: Callable[[Any], socket.socket]
) -> None:
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, framer=ByLine, proxy_protocol=["127.0.0.1"])
    client(listener.address).sendall(V1 + b"one\ntwo\n")
    until(mux, lambda: handler.count("message") == 2)
    assert handler.names() == ["open", "message", "message"]
    assert handler.messages() == [b"one", b"two"]


class Interrupt(BaseException):
    """What a signal handler raises."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one may come as a generator ends
@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("header", [V1, b""])
def test_an_interrupt_at_any_call_changes_no_peer_and_loses_no_message(
    backend: str, client: Callable[[Any], socket.socket], header: bytes, batches: bool
) -> None:
    """At the entry of each function of the package: Python runs signal handlers there."""
    class OfMessages(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            super().on_open(conn)
            peers.append(conn.peer)

    class OfBatches(OfMessages):
        on_message = None  # type: ignore[assignment]

        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            for message in messages:
                Recorder.on_message(self, conn, message)

    def interrupt(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        own = frame.f_code.co_name != "__del__" and "/muxcore/" in frame.f_code.co_filename
        if own and not any(name.startswith("on_") for name in callers(frame)):
            left -= 1
            if left == 0:
                raise Interrupt

    at = left = 0
    while left <= 0:
        at += 1
        peers: list[Any] = []
        handler = OfBatches() if batches else OfMessages()
        with muxcore.Mux(backend=backend) as mux:
            trusted: Any = {"proxy_protocol": ["127.0.0.1"]} if header else {}
            listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines(), **trusted)
            sock = client(listener.address)
            sock.sendall(header + b"one\ntwo\n")
            left = at
            done = partial(lambda handler: handler.count("message") == 2, handler)
            with suppress(Interrupt):
                sys.settrace(interrupt)
                try:
                    until(mux, done)
                finally:
                    sys.settrace(None)
            until(mux, done, 5)
            assert handler.messages() == [b"one", b"two"]
            assert peers == [FOUR[0] if header else sock.getsockname()]


def callers(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


def test_a_header_has_its_own_limit_of_time_and_the_handshake_behind_it_another(
    mux: muxcore.Mux, client: Callable[[Any], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ProxyWire.limit_ns == 5e9
    monkeypatch.setattr(ProxyWire, "limit_ns", 50_000_000)
    handler = Recorder()
    options: Any = {"proxy_protocol": ["127.0.0.1"], "timeouts": muxcore.Timeouts(handshake=0.3)}
    plain = mux.listen(("127.0.0.1", 0), handler, **options)
    secure = mux.listen(("127.0.0.1", 0), handler, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), **options)
    for listener, sent, limit in ((plain, b"PROXY", 0.05), (secure, b"", 0.05), (secure, V1, 0.3)):
        begun, closed = time.monotonic(), handler.count("close")
        client(listener.address).sendall(sent)
        until(mux, lambda closed=closed: handler.count("close") > closed)  # type: ignore[misc]
        assert time.monotonic() - begun >= limit
        error = handler.events[-1][2]
        assert isinstance(error, muxcore.HandshakeTimeout)
        assert error.limit == limit
    assert handler.names() == ["close"] * 3


def _at_end(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(10) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.unix_only("it listens on a path")
def test_a_unix_listener_has_it_too(
    mux: muxcore.Mux, client: Callable[[Any], socket.socket], socket_path: Path
) -> None:
    handler = Recorder(bytes.upper)
    mux.listen(str(socket_path), handler, proxy_protocol=["unix"])
    sock = client(str(socket_path))
    sock.sendall(header(1, *SIX) + b"hello")
    until(mux, lambda: handler.count("message"))
    assert handler.connections[0].peer == SIX[0]
    mux.poll(0)
    assert sock.recv(10) == b"HELLO"


# --- real proxies ----------------------------------------------------------------------------------


HAPROXY = """
global
  maxconn 100
defaults
  mode tcp
  timeout connect 5s
  timeout client 5s
  timeout server 5s
{sections}
"""


Run = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def run() -> Iterator[Run]:
    """Start a program, whose output is the text of a failure."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return processes[-1]

    yield start
    for process in processes:
        process.terminate()
        process.communicate()


@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_behind_haproxy(
    mux: muxcore.Mux, run: Run, peer_program: Callable[[str], str], tmp_path: Path, socket_path: Path,
    send: str, kind: str,
) -> None:  # fmt: skip
    handler = Recorder(bytes.upper)
    if kind == "tcp":
        listener = mux.listen(("127.0.0.1", 0), handler, proxy_protocol=["127.0.0.1"])
        server = f"127.0.0.1:{listener.address[1]}"
    else:
        mux.listen(str(socket_path), handler, proxy_protocol=["unix"])
        server = f"unix@{socket_path}"
    port = free_port()
    unique = "  unique-id-format %{+X}o%ci\n" if "unique" in send else ""
    config = tmp_path / "haproxy.cfg"
    config.write_text(HAPROXY.format(sections=f"listen a\n  bind 127.0.0.1:{port}\n{unique}  server s {server} {send}"))
    process = run(peer_program("haproxy"), "-db", "-f", str(config))
    with until_it_listens(process, port) as sock:
        sock.sendall(b"hello")
        until(mux, lambda: handler.count("message"))
        conn = handler.connections[-1]
        assert conn.peer == sock.getsockname()
        assert conn.proxy is not None
        assert conn.proxy.destination == ("127.0.0.1", port)
        if "crc32c" in send:
            assert {kind for kind, _ in conn.proxy.tlvs} >= {3, 5}
        mux.poll(0)
        assert sock.recv(10) == b"HELLO"


def test_haproxys_health_checks_are_local(
    mux: muxcore.Mux, run: Run, peer_program: Callable[[str], str], tmp_path: Path
) -> None:
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, proxy_protocol=["127.0.0.1"])
    config = tmp_path / "haproxy.cfg"
    server = f"127.0.0.1:{listener.address[1]} check inter 50ms check-send-proxy send-proxy-v2"
    config.write_text(HAPROXY.format(sections=f"listen a\n  bind 127.0.0.1:{free_port()}\n  server s {server}"))
    process = run(peer_program("haproxy"), "-db", "-f", str(config))
    until(mux, lambda: handler.count("open") >= 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    for conn in handler.connections:
        assert conn.proxy == Proxy(2, None, None)
        assert conn.peer[0] == "127.0.0.1"


def test_behind_nginx(
    mux: muxcore.Mux, run: Run, peer_program: Callable[[str], str], tmp_path: Path
) -> None:
    nginx = peer_program("nginx")
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    built_in = b"--with-stream " in subprocess.run([nginx, "-V"], capture_output=True, check=False).stderr + b" "
    if not built_in and not module.exists():
        pytest.skip("this nginx has no stream module")
    handler = Recorder(bytes.upper)
    listener = mux.listen(("127.0.0.1", 0), handler, proxy_protocol=["127.0.0.1"])
    port = free_port()
    load = "" if built_in else f"load_module {module};\n"
    (tmp_path / "nginx.conf").write_text(
        f"{load}daemon off; pid {tmp_path}/pid; error_log {tmp_path}/log;\n"
        f"events {{}}\nstream {{ server {{ listen 127.0.0.1:{port};"
        f" proxy_pass 127.0.0.1:{listener.address[1]}; proxy_protocol on; }} }}\n"
    )
    process = run(nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "log"))
    with until_it_listens(process, port) as sock:
        sock.sendall(b"hello")
        until(mux, lambda: handler.count("message"))
        assert handler.connections[-1].peer == sock.getsockname()
        mux.poll(0)
        assert sock.recv(10) == b"HELLO"


def test_haproxy_reads_our_headers(
    mux: muxcore.Mux, run: Run, peer_program: Callable[[str], str], tmp_path: Path
) -> None:
    """It passes the address on, in a header of its own."""
    handler, sender = Recorder(), Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, proxy_protocol=["127.0.0.1"])
    port = free_port()
    server = f"127.0.0.1:{listener.address[1]} send-proxy-v2"
    sections = f"listen a\n  bind 127.0.0.1:{port} accept-proxy\n  server s {server}"
    config = tmp_path / "haproxy.cfg"
    config.write_text(HAPROXY.format(sections=sections))
    process = run(peer_program("haproxy"), "-db", "-f", str(config))
    until_it_listens(process, port).close()
    for version, addresses in ((1, FOUR), (1, SIX), (2, FOUR), (2, SIX)):
        conn = mux.connect(("127.0.0.1", port), sender)
        conn.write(header(version, *addresses, checksum=version == 2))
        conn.write(b"hello")
        count = handler.count("message")
        until(mux, lambda count=count: handler.count("message") > count)  # type: ignore[misc]
        assert handler.connections[-1].peer == addresses[0]
        conn.abort()


def test_a_late_header_is_named_and_bounded_without_a_limit_of_handshakes(
    mux: muxcore.Mux, client: Callable[[Any], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProxyWire, "limit_ns", 50_000_000)
    handler = Recorder()
    timeouts = muxcore.Timeouts(handshake=None)
    listener = mux.listen(("127.0.0.1", 0), handler, proxy_protocol=["127.0.0.1"], timeouts=timeouts)
    client(listener.address)
    until(mux, lambda: handler.count("close"))
    assert isinstance(handler.reason(), muxcore.HandshakeTimeout)
    assert str(handler.reason()) == "the PROXY header took longer than 0.05 s"
