"""TLS, against Python's own ssl on blocking sockets in threads (Promise tls); test_tls_peers.py has foreign clients."""

from __future__ import annotations

import _ssl
import gc
import os
import shutil
import socket
import ssl
import struct
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import DEADLINE, ByLine, Recorder, memory, pattern, until

import muxcore
from muxcore import proxy_protocol
from muxcore.tls import TLSWire

try:
    from trustme import CA
except ImportError:
    from openssl_ca import CA
    if shutil.which("openssl") is None:
        pytest.skip("there are no certificates without trustme, or the program openssl", allow_module_level=True)
NAME = "server.example"


class Keys:
    """Certificates of an authority, and contexts that trust it. through_ssl: the compiled core does not call OpenSSL
    itself, as where it cannot."""

    def __init__(self, through_ssl: bool = False) -> None:
        self.through_ssl = through_ssl
        self.ca = CA()
        self.other_ca = CA()
        self.server_cert = self.ca.issue_cert(NAME, "localhost", "127.0.0.1")
        self.client_cert = self.ca.issue_cert("client@example.org")

    def server(self, cert: Any = None, mutual: bool = False) -> ssl.SSLContext:
        context = self.context(ssl.PROTOCOL_TLS_SERVER)
        (cert or self.server_cert).configure_cert(context)
        if mutual:
            context.verify_mode = ssl.CERT_REQUIRED
            self.ca.configure_trust(context)
        return context

    def client(self, cert: Any = None) -> ssl.SSLContext:
        context = self.context(ssl.PROTOCOL_TLS_CLIENT)
        self.ca.configure_trust(context)
        if cert is not None:
            cert.configure_cert(context)
        return context

    def context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        if self.through_ssl:
            context._msg_callback = lambda *message: None  # type: ignore[attr-defined]
        return context


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys()


class Peers:
    """Blocking peers in threads, while the Mux turns."""

    def __init__(self, mux: muxcore.Mux) -> None:
        self.mux = mux
        self.pool = ThreadPoolExecutor(8)
        self.sockets: list[socket.socket] = []

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """What fn returns, in a thread."""
        future: Future[Any] = self.pool.submit(fn, *args)
        until(self.mux, future.done)
        return future.result()

    def raw(self, address: Any) -> socket.socket:
        sock = socket.create_connection(address, 10)
        self.sockets.append(sock)
        return sock

    def client(self, address: Any, context: ssl.SSLContext, name: str | None = NAME, **options: Any) -> ssl.SSLSocket:
        """Connected, when the handshake is done."""
        sock: ssl.SSLSocket = self.run(lambda: context.wrap_socket(self.raw(address), server_hostname=name, **options))
        self.sockets.append(sock)
        settle(self.mux)  # the end of the handshake at our side
        return sock

    def read(self, sock: socket.socket, size: int) -> bytes:
        return bytes(self.run(read_exactly, sock, size))

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.pool.shutdown()


def settle(mux: muxcore.Mux) -> None:
    """Handle what has arrived."""
    for _ in range(4):
        mux.poll(0)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size and (data := sock.recv(min(65536, size - len(got)))):
        got += data
    return bytes(got)


def read_to_end(sock: socket.socket) -> bytes:
    got = bytearray()
    while data := sock.recv(65536):
        got += data
    return bytes(got)


@pytest.fixture
def peers(mux: muxcore.Mux) -> Iterator[Peers]:
    peers = Peers(mux)
    yield peers
    peers.close()


def echo(mux: muxcore.Mux, keys: Keys, **options: Any) -> tuple[muxcore.Listener, Recorder]:
    handler = Recorder(bytes)
    return mux.listen(("127.0.0.1", 0), handler, **{"tls": keys.server(), **options}), handler


# --- what a new user met --------------------------------------------------------------------------


def test_a_failed_handshake_does_not_linger_for_a_peer_that_stays(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """Promise wire: the peer has half a second for the alert, not Timeouts.linger."""
    listener, handler = echo(mux, keys, timeouts=muxcore.Timeouts(linger=60))
    sock = peers.raw(listener.address)
    sock.sendall(b"plaintext, and nothing else\r\n")
    until(mux, lambda: handler.count("close"))
    assert handler.reason().reason == "WRONG_VERSION_NUMBER"
    assert mux.stats().handshake_failures == 1
    assert sock.recv(100) == b""


def test_a_client_at_a_server_without_tls_learns_it_soon(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """Promise wire."""
    server = socket.create_server(("127.0.0.1", 0))
    peers.sockets.append(server)
    handler = Recorder()
    timeouts = muxcore.Timeouts(linger=60)
    mux.connect(server.getsockname(), handler, tls=keys.client(), server_hostname=NAME, timeouts=timeouts)
    sock = peers.run(server.accept)[0]
    peers.sockets.append(sock)
    sock.sendall(b"220 mail.example.org ESMTP\r\n")
    until(mux, lambda: handler.count("close"))
    assert handler.reason().reason == "WRONG_VERSION_NUMBER"


def test_a_broadcast_is_not_for_those_before_their_on_open(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys)
    client = peers.client(listener.address, keys.client())
    peers.raw(listener.address)
    until(mux, lambda: len(mux.connections) == 2)
    assert mux.broadcast(mux.connections, b"to all") == 1
    assert peers.read(client, 6) == b"to all"
    assert [conn.outbox_size for conn in mux.connections] == [0, 0]
    server = socket.create_server(("127.0.0.1", 0))
    peers.sockets.append(server)
    conn = mux.connect(server.getsockname(), handler, tls=keys.client(), server_hostname=NAME)
    assert mux.broadcast([conn], b"early") == 1, "as send() does"


@pytest.mark.parametrize("opened", [True, False])
def test_an_end_without_close_notify_has_a_reason_as_openssls_errors_have(
    mux: muxcore.Mux, keys: Keys, peers: Peers, opened: bool
) -> None:
    listener, handler = echo(mux, keys)
    if opened:
        peers.client(listener.address, keys.client()).shutdown(socket.SHUT_WR)
    else:
        peers.raw(listener.address).shutdown(socket.SHUT_WR)
    until(mux, lambda: handler.count("close"))
    assert (handler.reason().reason, handler.reason().library) == ("UNEXPECTED_EOF_WHILE_READING", "SSL")
    assert handler.reason().errno == ssl.SSL_ERROR_EOF


def test_a_listening_socket_that_is_wrapped_is_refused(mux: muxcore.Mux, keys: Keys) -> None:
    """It would serve plaintext."""
    sock = keys.server().wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
    with sock, pytest.raises(TypeError, match="address must be a plain socket, not an SSLSocket"):
        mux.listen(sock, Recorder())


# --- what passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 255, 16_383, 16_384, 16_385, 65_536, 1_000_000])
@pytest.mark.parametrize("framer", [None, muxcore.Lines(max_size=1 << 21), muxcore.LengthPrefix(4)])
def test_messages_of_each_size_pass_both_ways(
    mux: muxcore.Mux, keys: Keys, peers: Peers, size: int, framer: Any
) -> None:
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, framer=framer, tls=keys.server())
    client = peers.client(listener.address, keys.client())
    body = b"x" * size
    data = {type(None): body, muxcore.Lines: body + b"\n"}.get(type(framer), struct.pack("!I", size) + body)
    peers.run(client.sendall, data)
    until(mux, lambda: handler.received() == body)
    handler.connections[0].send(body)
    assert peers.read(client, len(data)) == data


def test_what_is_sent_behind_run_goes_out_at_once(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """As on a plain connection."""
    listener, handler = echo(mux, keys)
    client = peers.client(listener.address, keys.client())
    mux.call_soon(mux.stop)
    mux.run()
    conn = handler.connections[0]
    assert conn.send(b"now")
    assert conn.outbox_size == 0
    assert client.recv(10) == b"now"


LONG = [b"x" * (150_000 if i == 50 else 20_000) if i % 25 == 0 else b"%d" % i for i in range(100)]
TWO_RECORDS = [b"x" * 6000, *(b"x" * 10 for i in range(1000))]


@pytest.mark.parametrize(("read_size", "lines"), [(4096, LONG), (65536, TWO_RECORDS), (1 << 20, LONG)])
def test_what_arrived_behind_a_handler_that_ends_the_loop_is_delivered(
    backend: str, keys: Keys, read_size: int, lines: list[bytes]
) -> None:
    """Promise any-user-code. The kernel will not report it again, nor does OpenSSL, which may have a part of it."""

    class Ends(Recorder):
        def on_message(self, conn: muxcore.Connection, message: Any) -> None:
            super().on_message(conn, message)
            if len(message) > 10 or message.endswith(b"3"):
                raise SystemExit

    handler = Ends()
    with muxcore.Mux(backend=backend, read_size=read_size) as mux, closing(Peers(mux)) as peers:
        listener = mux.listen(("127.0.0.1", 0), handler, tls=keys.server(), framer=muxcore.Lines(max_size=1 << 20))
        client = peers.client(listener.address, keys.client())
        data = b"".join(line + b"\n" for line in lines)
        client.sendall(data[:5000])  # the beginning of a message
        settle(mux)
        sent = peers.pool.submit(client.sendall, data[5000:])
        end = time.monotonic() + DEADLINE
        while len(handler.messages()) < len(lines) and time.monotonic() < end:
            with suppress(SystemExit):
                mux.poll(0.01)
        assert handler.messages() == lines
        sent.result()


def test_a_client_that_writes_and_closes_is_no_failure(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """Promise tls: session tickets wait for output, also at its close_notify."""
    for _ in range(5):
        handler = Recorder()
        listener = mux.listen(("127.0.0.1", 0), handler, tls=keys.server())
        sock = peers.client(listener.address, keys.client())
        sock.sendall(b"x" * 1000)
        sock.setblocking(False)
        with suppress(ssl.SSLWantReadError):
            sock.unwrap()
        sock.close()
        until(mux, lambda handler=handler: handler.count("close"))  # type: ignore[misc]
        assert (handler.reason(), len(handler.received())) == (None, 1000)
    assert mux.stats().unsent == 0


def test_a_flush_amid_the_first_look_at_openssls_pointers_corrupts_nothing(
    mux: muxcore.Mux, keys: Keys, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise any-user-code: a signal handler may do it."""
    handler = Recorder()
    data, original, left = pattern(3_000_000), TLSWire.parts, [1]

    def parts(self: TLSWire) -> Any:
        found = original(self)
        if found is not None and left:
            left.clear()
            handler.connections[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            handler.connections[0].send(data)
            handler.connections[0].flush()
        return found

    monkeypatch.setattr(TLSWire, "parts", parts)
    listener = mux.listen(("127.0.0.1", 0), handler, tls=keys.server())
    client = peers.client(listener.address, keys.client())
    if left:  # Python's ssl goes on, and needs no pointers
        handler.connections[0].send(data)
    assert peers.read(client, len(data)) == data


@pytest.mark.parametrize("act", ["flush", "send"])
def test_a_finalizer_amid_an_encryption_corrupts_nothing(mux: muxcore.Mux, keys: Keys, peers: Peers, act: str) -> None:
    """Promise any-user-code: what Python's ssl gets is gathered before, which may start the collector."""
    handler = Recorder()
    context = keys.server()
    context._msg_callback = lambda *message: None  # type: ignore[attr-defined]
    listener = mux.listen(("127.0.0.1", 0), handler, tls=context)
    client = peers.client(listener.address, keys.client())
    [conn] = handler.connections
    data = pattern(500_000)

    class Late:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            conn.flush() if act == "flush" else conn.send(b"late")

    threshold = gc.get_threshold()
    for _ in range(200):
        Late()
    gc.set_threshold(1)
    try:
        conn.send(data)
        conn.flush()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    conn.send(b"end")
    late = b"late" * 200 if act == "send" else b""
    got = peers.read(client, len(data) + len(late) + 3)
    at = got.find(data)
    assert at >= 0
    assert (got[:at] + got[at + len(data) :]).replace(b"late", b"") == b"end"


def test_a_context_that_wraps_with_another_is_known_by_that(keys: Keys) -> None:
    """Promise any-user-code: a callback for each record runs Python, amid OpenSSL."""
    other = keys.server()
    other._msg_callback = lambda *message: None  # type: ignore[attr-defined]

    class Chooses(ssl.SSLContext):
        def wrap_bio(self, *args: Any, **options: Any) -> Any:
            return other.wrap_bio(*args, **options)

    chooses = Chooses(ssl.PROTOCOL_TLS_SERVER)
    found = []
    for context in (keys.server(), chooses):
        server, client = TLSWire(context, True, None), TLSWire(keys.client(), False, NAME)
        while not (server.opened and client.opened):
            for wire, far in ((client, server), (server, client)):
                wire.advance()
                far.received += wire.output
                wire.output.clear()
        server.advance()
        server.output.clear()
        found.append(server.parts() is not None)
    through_ssl = keys.through_ssl
    assert found == [not through_ssl, False]


def test_records_without_plaintext_get_small_reads(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """Promise bounded-turns: changes of keys, say, cost much for each byte."""
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, tls=keys.server())
    client = peers.client(listener.address, keys.client())
    before = mux.stats()
    for _ in range(4000):
        client.sendall(b"x")
    until(mux, lambda: len(handler.received()) == 4000)
    after = mux.stats()
    assert after.recv_calls - before.recv_calls >= (after.bytes_in - before.bytes_in) / 4096


def test_on_open_comes_behind_the_handshake(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    versions = []

    class Handler(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            super().on_open(conn)
            assert conn.tls is not None
            versions.append(conn.tls.version())

    handler = Handler()
    listener = mux.listen(("127.0.0.1", 0), handler, tls=keys.server())
    raw = peers.raw(listener.address)
    until(mux, lambda: mux.stats().accepts)
    mux.poll(0)
    assert handler.names() == []
    peers.run(lambda: keys.client().wrap_socket(raw, server_hostname=NAME)).close()
    until(mux, lambda: handler.count("close"))
    assert versions == ["TLSv1.3"]


def test_a_client_of_ours_talks_to_a_server_of_pythons(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    peers.sockets.append(server)
    handler = Recorder()
    conn = mux.connect(server.getsockname(), handler, framer=muxcore.Lines(), tls=keys.client(), server_hostname=NAME)
    conn.send(b"early")

    def serve() -> bytes:
        sock, _ = server.accept()
        with keys.server().wrap_socket(sock, server_side=True) as tls:
            first = read_exactly(tls, 6)
            tls.sendall(b"reply\n")
            return first + read_to_end(tls)

    future = peers.pool.submit(serve)
    until(mux, lambda: handler.count("message"))
    assert handler.names() == ["open", "message"]
    assert conn.tls is not None
    assert conn.tls.server_hostname == NAME
    conn.send(b"late")
    conn.close()
    until(mux, lambda: future.done() and handler.count("close"))
    assert future.result() == b"early\nlate\n"
    assert handler.reason() is None


def test_both_ends_may_be_of_one_mux(mux: muxcore.Mux, keys: Keys) -> None:
    listener, _ = echo(mux, keys)
    handler = Recorder()
    conn = mux.connect(listener.address, handler, tls=keys.client(), server_hostname=NAME)
    conn.send(b"x" * 200_000)
    until(mux, lambda: len(handler.received()) == 200_000)


def test_tls_1_2_passes_too(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys)
    context = keys.client()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = peers.client(listener.address, context)
    client.sendall(b"hello")
    assert peers.read(client, 5) == b"hello"
    assert handler.connections[0].tls.version() == "TLSv1.2"  # type: ignore[union-attr]


def test_a_thousand_sends_in_a_handler_are_one_record(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    class Handler(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            for _ in range(1000 if message == b"go" else 1):
                conn.send(b"0123456789")

    listener = mux.listen(("127.0.0.1", 0), Handler(), tls=keys.server())
    client = peers.client(listener.address, keys.client())
    client.sendall(b"first")
    peers.read(client, 10)  # with the tickets
    before = mux.stats()
    client.sendall(b"go")
    assert peers.read(client, 10_000) == b"0123456789" * 1000
    assert mux.stats().send_calls - before.send_calls == 1
    assert mux.stats().bytes_out - before.bytes_out < 10_000 + 50


def test_forty_megabytes_in_one_send_take_linear_time(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys, limits=muxcore.Limits(max_outbox=1 << 30))
    client = peers.client(listener.address, keys.client())
    [conn] = handler.connections
    seconds = []
    for size in (10_000_000, 40_000_000):
        start = time.process_time()
        conn.send(bytes(size))
        assert len(peers.read(client, size)) == size
        seconds.append(time.process_time() - start)
    assert seconds[1] < 12 * seconds[0]


def test_a_file_is_encrypted_bit_by_bit(mux: muxcore.Mux, keys: Keys, peers: Peers, tmp_path: Path) -> None:
    data = bytes(range(256)) * 80_000
    (tmp_path / "file").write_bytes(data)
    listener, handler = echo(mux, keys)
    client = peers.client(listener.address, keys.client())
    [conn] = handler.connections
    with (tmp_path / "file").open("rb") as file:
        conn.sendfile(file)
        conn.sendfile(file, 100, 100_000)
    mux.poll(0)
    assert conn.outbox_size > 10_000_000  # most of it is still in the file
    assert peers.read(client, len(data) + 100_000) == data + data[100:100_100]


def test_a_broadcast_reaches_plain_and_encrypted_connections(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    handler = Recorder()
    listeners = [mux.listen(("127.0.0.1", 0), handler, tls=tls) for tls in (None, keys.server())]
    plain = peers.raw(listeners[0].address)
    encrypted = peers.client(listeners[1].address, keys.client())
    until(mux, lambda: handler.count("open") == 2)
    assert mux.broadcast(mux.connections, b"to all") == 2
    assert [peers.read(sock, 6) for sock in (plain, encrypted)] == [b"to all"] * 2


def test_threads_may_send_while_the_loop_reads(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys, framer=muxcore.Lines())
    client = peers.client(listener.address, keys.client())
    [conn] = handler.connections
    senders = [peers.pool.submit(lambda i=i: [conn.send(b"t%d-%d" % (i, n)) for n in range(500)]) for i in range(3)]
    client.sendall(b"".join(b"e-%d\n" % n for n in range(500)))
    lines = peers.read(client, sum(len(b"t0-%d\n" % n) * 3 + len(b"e-%d\n" % n) for n in range(500))).split()
    until(mux, lambda: all(one.done() for one in senders))
    for tag in (b"t0-", b"t1-", b"t2-", b"e-"):
        assert [line for line in lines if line.startswith(tag)] == [tag + b"%d" % n for n in range(500)]


def test_a_threaded_handler_serves_it(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    handler = muxcore.Threaded(lambda conn, message: conn.send(message.upper()))
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines(), tls=keys.server())
    client = peers.client(listener.address, keys.client())
    client.sendall(b"one\ntwo\n")
    assert peers.read(client, 8) == b"ONE\nTWO\n"


def test_pull_style_serves_it(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener = mux.listen(("127.0.0.1", 0), None, framer=muxcore.Lines(), tls=keys.server())

    def talk() -> bytes:
        with keys.client().wrap_socket(peers.raw(listener.address), server_hostname=NAME) as sock:
            sock.sendall(b"one\ntwo\n")
            return read_exactly(sock, 8)

    future = peers.pool.submit(talk)
    end = time.monotonic() + 20
    while not future.done() and time.monotonic() < end:
        for conn, _ in mux.poll(0.05):
            for message in conn:
                conn.send(message.upper())
    assert future.result(0) == b"ONE\nTWO\n"


# --- contexts --------------------------------------------------------------------------------------


def test_a_client_certificate_is_required_and_known(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys, tls=keys.server(mutual=True))
    peers.client(listener.address, keys.client(keys.client_cert))
    until(mux, lambda: handler.count("open"))
    certificate: Any = handler.connections[0].tls.getpeercert()  # type: ignore[union-attr]
    assert ("email", "client@example.org") in certificate["subjectAltName"]


def test_the_refusal_of_a_client_certificate_names_the_alert(mux: muxcore.Mux, keys: Keys) -> None:
    """In TLS 1.3 it arrives after the client's on_open."""
    listener, server = echo(mux, keys, tls=keys.server(mutual=True))
    handler = Recorder()
    mux.connect(listener.address, handler, tls=keys.client(), server_hostname=NAME)
    until(mux, lambda: handler.count("close") and server.count("close"))
    assert isinstance(handler.reason(), ssl.SSLError)
    assert "ALERT" in str(handler.reason()).upper()
    assert server.names() == ["close"]
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in str(server.reason())


@pytest.mark.parametrize(
    ("name", "text"), [("wrong.example", "Hostname mismatch"), (NAME, "unable to get local issuer certificate")]
)
def test_a_server_that_is_another_is_refused(mux: muxcore.Mux, keys: Keys, name: str, text: str) -> None:
    listener, _ = echo(mux, keys)
    context = keys.client()
    if name == NAME:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        keys.other_ca.configure_trust(context)
    handler = Recorder()
    conn = mux.connect(listener.address, handler, tls=context, server_hostname=name)
    conn.send(b"secret")
    until(mux, lambda: handler.count("close"))
    assert handler.names() == ["close"]
    assert text in str(handler.reason())


def test_alpn_and_sni_choose(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    other = keys.server(keys.ca.issue_cert("other.example"))
    first = keys.server()
    first.set_alpn_protocols(["h2", "http/1.1"])
    names = []

    def choose(tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        names.append(name)
        if name == "other.example":
            tls.context = other

    first.sni_callback = choose  # type: ignore[assignment]
    listener, handler = echo(mux, keys, tls=first)
    context = keys.client()
    context.set_alpn_protocols(["http/1.1"])
    client = peers.client(listener.address, context)
    assert client.selected_alpn_protocol() == "http/1.1"
    certificate: Any = peers.client(listener.address, keys.client(), "other.example").getpeercert()
    assert ("DNS", "other.example") in certificate["subjectAltName"]
    assert names == [NAME, "other.example"]
    assert handler.connections[0].tls.selected_alpn_protocol() == "http/1.1"  # type: ignore[union-attr]


def test_a_session_is_resumed(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys)
    context = keys.client()
    client = peers.client(listener.address, context)
    client.sendall(b"x")
    peers.read(client, 1)  # the tickets came before it
    again = peers.client(listener.address, context, session=client.session)
    again.sendall(b"y")
    assert peers.read(again, 1) == b"y"
    assert again.session_reused
    assert handler.connections[1].tls.session_reused  # type: ignore[union-attr]


def test_certificates_rotate_without_a_restart(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, _ = echo(mux, keys)
    old = peers.client(listener.address, keys.client())
    renewed = keys.ca.issue_cert("renewed.example")
    listener.tls = keys.server(renewed)
    assert listener.tls is not None
    peers.client(listener.address, keys.client(), "renewed.example")
    old.sendall(b"still")
    assert peers.read(old, 5) == b"still"


def test_a_keylog_is_written(mux: muxcore.Mux, keys: Keys, peers: Peers, tmp_path: Path) -> None:
    context = keys.server()
    context.keylog_filename = str(tmp_path / "keys")
    listener, handler = echo(mux, keys, tls=context)
    peers.client(listener.address, keys.client())
    listener.tls = keys.server()  # the context has the file open
    del context
    assert "SERVER_TRAFFIC_SECRET_0" in (tmp_path / "keys").read_text()
    handler.connections[0].abort()
    handler.connections.clear()
    settle(mux)
    gc.collect()


@pytest.mark.parametrize("action", ["abort", "close", "collect", "raise"])
def test_a_callback_of_the_context_may_do_anything(
    mux: muxcore.Mux, keys: Keys, peers: Peers, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handshake's SNI callback finds its connection as the only one of the Mux."""
    context = keys.server()

    def callback(*_: object) -> None:
        [conn] = mux.connections
        if action == "collect":
            gc.collect()
        elif action == "raise":
            raise ValueError(action)
        else:
            getattr(conn, action)()

    context.sni_callback = callback  # type: ignore[assignment]
    listener, handler = echo(mux, keys, tls=context, timeouts=muxcore.Timeouts(linger=0.1))

    def connect() -> str:
        try:
            sock = keys.client().wrap_socket(peers.raw(listener.address), server_hostname=NAME)
            peers.sockets.append(sock)
        except OSError as error:
            return type(error).__name__
        return "connected"

    if action == "raise":
        unraisable: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
        result = peers.run(connect)
        assert [str(one.exc_value) for one in unraisable] == ["raise"]
    else:
        result = peers.run(connect)
    assert (result == "connected") == (action in ("collect", "close"))  # the server had sent its part of it by then
    if action != "collect":
        until(mux, lambda: handler.count("close"))
        assert handler.names() == ["close"]


# --- STARTTLS --------------------------------------------------------------------------------------


class Mail(Recorder):
    """A line server that begins TLS at STARTTLS."""

    def __init__(self, context: ssl.SSLContext, early: bytes = b"220 go ahead") -> None:
        super().__init__()
        self.context, self.early = context, early

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        super().on_message(conn, message)
        if message == b"STARTTLS":
            conn.send(self.early)
            conn.start_tls(self.context)
        else:
            conn.send(b"250 " + message)


def test_starttls_in_the_middle_of_the_stream(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    handler = Mail(keys.server())
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines())
    raw = peers.raw(listener.address)

    def talk() -> bytes:
        raw.sendall(b"EHLO\r\n")
        first = read_exactly(raw, 9)
        raw.sendall(b"STARTTLS\r\n")
        second = read_exactly(raw, 13)
        with keys.client().wrap_socket(raw, server_hostname=NAME) as sock:
            sock.sendall(b"EHLO again\r\n")
            return first + second + read_exactly(sock, 15)

    assert peers.run(talk) == b"250 EHLO\n220 go ahead\n250 EHLO again\n"
    assert handler.count("open") == 1


def test_a_client_of_ours_starts_tls(mux: muxcore.Mux, keys: Keys) -> None:
    listener = mux.listen(("127.0.0.1", 0), Mail(keys.server()), framer=muxcore.Lines())

    class Client(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            conn.send(b"STARTTLS")

        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            if message == b"220 go ahead":
                conn.start_tls(keys.client(), server_hostname=NAME)
                conn.send(b"secret")

    handler = Client()
    conn = mux.connect(listener.address, handler, framer=muxcore.Lines())
    until(mux, lambda: handler.count("message") == 2)
    assert handler.messages() == [b"220 go ahead", b"250 secret"]
    assert conn.tls is not None


def test_commands_that_come_behind_starttls_never_run(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """CVE-2011-0411: plaintext that an attacker puts behind STARTTLS must not count as said over TLS."""
    handler = Mail(keys.server())
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines())
    raw = peers.raw(listener.address)
    raw.sendall(b"STARTTLS\r\nDELETE everything\r\n")
    peers.run(read_to_end, raw)
    raw.close()
    until(mux, lambda: handler.count("close"))
    assert handler.messages() == [b"STARTTLS"]
    assert isinstance(handler.reason(), ssl.SSLError)


def test_a_client_hello_right_behind_starttls_is_tls(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    handler = Mail(keys.server())
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = keys.client().wrap_bio(incoming, outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    raw = peers.raw(listener.address)
    raw.sendall(b"STARTTLS\r\n" + outgoing.read())
    assert peers.read(raw, 13) == b"220 go ahead\n"
    for _ in range(100):
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            incoming.write(peers.run(raw.recv, 65536))
    raw.sendall(outgoing.read())
    client.write(b"hello\r\n")
    raw.sendall(outgoing.read())
    until(mux, lambda: handler.messages() == [b"STARTTLS", b"hello"])


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("behind", [b"DELETE everything\n", b"DELETE", None])
def test_a_users_framer_keeps_nothing_of_what_came_behind_starttls(
    mux: muxcore.Mux, keys: Keys, peers: Peers, pull: bool, behind: bytes | None
) -> None:
    """CVE-2011-0411. And the beginning of a ClientHello (None) belongs to TLS."""
    got: list[tuple[bool, bytes]] = []

    def handle(conn: muxcore.Connection, message: bytes) -> None:
        got.append((conn.tls is not None, message))
        if message == b"STARTTLS":
            conn.write(b"go\n")
            conn.start_tls(keys.server())

    def turn() -> None:
        for conn, _ in mux.poll(0.01):
            for message in conn:
                handle(conn, message)

    listener = mux.listen(("127.0.0.1", 0), None if pull else handle, framer=ByLine)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = keys.client().wrap_bio(incoming, outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello, raw = outgoing.read(), peers.raw(listener.address)
    raw.sendall(b"STARTTLS\n" + (hello[:7] if behind is None else behind))
    while not got:
        turn()
    raw.sendall(hello[7:] if behind is None else hello)

    def talk() -> bytes:
        while (data := raw.recv(65536)) == b"go\n":
            pass
        while data:
            incoming.write(data.removeprefix(b"go\n"))
            with suppress(ssl.SSLWantReadError):
                client.do_handshake()
                client.write(b"hello\n")
                raw.sendall(outgoing.read())
                break
            data = raw.recv(65536)
        return data

    future = peers.pool.submit(talk)
    end = time.monotonic() + 20
    while len(got) < 2 and not (future.done() and behind is not None) and time.monotonic() < end:
        turn()
    with suppress(ssl.SSLError):
        future.result(20)
    assert got == [(False, b"STARTTLS")] + ([(True, b"hello")] if behind is None else [])


def test_starttls_while_output_waits_for_a_slow_peer(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    handler = Mail(keys.server(), early=b"x" * 12_000_000)
    limits = muxcore.Limits(autopause=False)
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines(), limits=limits)
    raw = peers.raw(listener.address)
    raw.sendall(b"STARTTLS\r\n")
    until(mux, lambda: handler.count("message"))
    [conn] = handler.connections
    assert conn.outbox_size > 100_000
    conn.send(b"encrypted")

    def talk() -> bytes:
        assert read_exactly(raw, 12_000_001) == b"x" * 12_000_000 + b"\n"
        with keys.client().wrap_socket(raw, server_hostname=NAME) as sock:
            return read_exactly(sock, 10)

    assert peers.run(talk) == b"encrypted\n"


def test_tls_in_tls_and_on_what_is_not_open_is_refused(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys)
    peers.client(listener.address, keys.client())
    [conn] = handler.connections
    with pytest.raises(RuntimeError, match="has TLS already"):
        conn.start_tls(keys.server())
    with pytest.raises(RuntimeError, match="has TLS already"):
        conn.start_tls(keys.client(), server_side=False)
    conn.close()
    with pytest.raises(muxcore.ConnectionClosed, match="start_tls"):
        conn.start_tls(keys.server())


def test_an_attached_connection_says_which_side_it_is(mux: muxcore.Mux, keys: Keys) -> None:
    handlers = Recorder(), Recorder()
    ends = [mux.attach(sock, handler) for sock, handler in zip(socket.socketpair(), handlers, strict=True)]
    with pytest.raises(ValueError, match="server_side is required"):
        ends[0].start_tls(keys.server())
    ends[0].start_tls(keys.server(), server_side=True)
    ends[1].start_tls(keys.client(), server_side=False, server_hostname=NAME)
    ends[1].send(b"hello")
    until(mux, lambda: handlers[0].received() == b"hello")


def test_a_proxy_header_then_plaintext_then_tls_in_one_segment(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    handler = Mail(keys.server())
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines(), proxy_protocol=["127.0.0.1"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = keys.client().wrap_bio(incoming, outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    head = proxy_protocol.header(1, ("192.0.2.1", 5), ("192.0.2.2", 6))
    raw = peers.raw(listener.address)
    raw.sendall(head + b"STARTTLS\r\n" + outgoing.read())
    assert peers.read(raw, 13) == b"220 go ahead\n"
    assert peers.run(raw.recv, 5)[:1] == b"\x16"  # a record of the handshake
    assert handler.connections[0].peer == ("192.0.2.1", 5)


@pytest.mark.parametrize("together", [True, False])
def test_a_proxy_header_in_front_of_tls(mux: muxcore.Mux, keys: Keys, peers: Peers, together: bool) -> None:
    listener, handler = echo(mux, keys, proxy_protocol=["127.0.0.1"])
    head = proxy_protocol.header(2, ("192.0.2.1", 5), ("192.0.2.2", 6), checksum=True)
    raw = peers.raw(listener.address)
    raw.sendall(head)
    if not together:
        until(mux, lambda: mux.stats().bytes_in)
    sock = peers.run(lambda: keys.client().wrap_socket(raw, server_hostname=NAME))
    peers.sockets.append(sock)
    sock.sendall(b"hello")
    assert peers.read(sock, 5) == b"hello"
    [conn] = handler.connections
    assert conn.peer == ("192.0.2.1", 5)
    assert conn.proxy is not None
    assert conn.tls is not None


# --- records ---------------------------------------------------------------------------------------


class Pair:
    """A client over memory, whose bytes the test sends as it likes."""

    def __init__(self, keys: Keys, peers: Peers, address: Any) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = keys.client().wrap_bio(self.incoming, self.outgoing, server_hostname=NAME)
        self.raw = peers.raw(address)
        self.peers = peers
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.raw.sendall(self.outgoing.read())
                self.incoming.write(peers.run(self.raw.recv, 65536))
        self.raw.sendall(self.outgoing.read())
        settle(peers.mux)

    def encrypted(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self.outgoing.read()


def test_a_record_may_be_torn_at_each_byte(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys)
    pair = Pair(keys, peers, listener.address)
    record = pair.encrypted(b"hello")
    expected = 0
    for i in range(1, len(record)):
        count = mux.stats().bytes_in
        pair.raw.sendall(record[:i])
        until(mux, lambda count=count, i=i: mux.stats().bytes_in == count + i)  # type: ignore[misc]
        pair.raw.sendall(record[i:])
        expected += 5
        until(mux, lambda expected=expected: len(handler.received()) == expected)  # type: ignore[misc]
        record = pair.encrypted(b"hello")
    assert handler.received() == b"hello" * (expected // 5)


def test_many_records_of_one_read_are_delivered(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys, framer=muxcore.Lines())
    pair = Pair(keys, peers, listener.address)
    pair.raw.sendall(b"".join(pair.encrypted(b"line %d\n" % i) for i in range(500)))
    until(mux, lambda: handler.count("message") == 500)


def test_a_damaged_record_ends_the_connection_behind_the_messages_before_it(
    mux: muxcore.Mux, keys: Keys, peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    listener, handler = echo(mux, keys, framer=muxcore.Lines())
    pair = Pair(keys, peers, listener.address)
    good, bad = pair.encrypted(b"good\n"), bytearray(pair.encrypted(b"bad\n"))
    bad[-1] ^= 1
    pair.raw.sendall(good + bad)
    until(mux, lambda: handler.count("close") or _readable_end(pair.raw))
    pair.raw.close()
    until(mux, lambda: handler.count("close"))
    assert handler.messages() == [b"good"]
    assert isinstance(handler.reason(), ssl.SSLError)
    assert not caplog.records


def _readable_end(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        while sock.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_pause_holds_back_records_that_were_read_and_a_resume_delivers_them(
    mux: muxcore.Mux, keys: Keys, peers: Peers
) -> None:
    """With nothing more on the wire: no readiness would come for what OpenSSL has."""

    class Pauser(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            conn.pause_reading()

    handler = Pauser()
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines(), tls=keys.server())
    pair = Pair(keys, peers, listener.address)
    pair.raw.sendall(b"".join(pair.encrypted(b"line\n") for i in range(10)))
    for count in range(1, 11):
        until(mux, lambda count=count: handler.count("message") == count)  # type: ignore[misc]
        mux.poll(0)
        assert handler.count("message") == count
        handler.connections[0].resume_reading()


# --- the end ---------------------------------------------------------------------------------------


def test_close_sends_close_notify_behind_all_output(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys)
    client = peers.client(listener.address, keys.client(), suppress_ragged_eofs=False)
    [conn] = handler.connections
    conn.send(b"x" * 1_000_000)
    conn.close()
    assert len(peers.run(read_to_end, client)) == 1_000_000  # without close_notify this raises SSLEOFError
    client.close()
    until(mux, lambda: handler.count("close"))
    assert handler.reason() is None


def test_write_eof_ends_our_side_and_then_the_peer_its_own(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, half_open=True, tls=keys.server())
    pair = Pair(keys, peers, listener.address)
    [conn] = handler.connections
    conn.send(b"last")
    conn.write_eof()
    pair.incoming.write(peers.run(read_to_end, pair.raw))
    assert pair.tls.read(100) == b"last"
    assert pair.tls.read(100) == b""
    pair.raw.sendall(pair.encrypted(b"mine"))
    with suppress(ssl.SSLError):
        pair.tls.unwrap()
    pair.raw.sendall(pair.outgoing.read())
    until(mux, lambda: conn.eof)
    conn.close()
    pair.raw.close()
    until(mux, lambda: handler.count("close"))
    assert handler.received() == b"mine"
    assert handler.reason() is None


def test_the_peers_close_notify_is_not_waited_for(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys)
    client = peers.client(listener.address, keys.client())
    handler.connections[0].close()
    assert peers.run(client.recv, 10) == b""
    start = time.monotonic()
    socket.socket.close(socket.socket(fileno=client.detach()))  # FIN, and no close_notify
    until(mux, lambda: handler.count("close"))
    assert time.monotonic() - start < 2
    assert handler.reason() is None


def test_a_fin_without_close_notify_is_a_truncation(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys)
    client = peers.client(listener.address, keys.client())
    client.sendall(b"all?")
    assert peers.read(client, 4) == b"all?"
    socket.socket.close(socket.socket(fileno=client.detach()))
    until(mux, lambda: handler.count("close"))
    assert isinstance(handler.reason(), ssl.SSLEOFError)
    assert handler.received() == b"all?"


def test_close_notify_is_an_eof(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    ended = []

    class Handler(Recorder):
        def on_eof(self, conn: muxcore.Connection) -> None:
            ended.append(conn.eof)
            conn.send(b"goodbye")
            conn.close()

    handler = Handler()
    listener = mux.listen(("127.0.0.1", 0), handler, tls=keys.server())
    pair = Pair(keys, peers, listener.address)
    with pytest.raises(ssl.SSLError):
        pair.tls.unwrap()  # it sends close_notify, and wants the peer's
    pair.raw.sendall(pair.outgoing.read() + b"\x17\x03\x03\x00\x02..")  # data behind it is ignored
    pair.incoming.write(peers.run(read_to_end, pair.raw))
    assert pair.tls.read(100) == b"goodbye"
    pair.raw.close()
    until(mux, lambda: handler.count("close"))
    assert ended == [True]
    assert handler.reason() is None


def test_a_client_that_writes_and_closes_loses_nothing_to_tickets(
    mux: muxcore.Mux, keys: Keys, peers: Peers
) -> None:
    """The server's tickets come to a closed socket: the RST must not destroy what the client has sent."""
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, tls=keys.server())

    def talk() -> None:
        sock = keys.client().wrap_socket(peers.raw(listener.address), server_hostname=NAME)
        sock.sendall(b"x" * 100_000)
        sock.close()

    for _ in range(10):
        peers.run(talk)
    until(mux, lambda: handler.count("close") == 10)
    assert len(handler.received()) == 1_000_000


def test_plaintext_and_close_before_the_handshake_is_not_delivered(
    mux: muxcore.Mux, keys: Keys, peers: Peers
) -> None:
    listener, handler = echo(mux, keys)
    raw = peers.raw(listener.address)
    raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
    raw.close()
    until(mux, lambda: handler.count("close"))
    assert handler.names() == ["close"]


def test_a_peer_that_closes_amid_the_handshake_is_reported_at_once(
    mux: muxcore.Mux, keys: Keys, peers: Peers
) -> None:
    listener, handler = echo(mux, keys)
    peers.raw(listener.address).close()
    until(mux, lambda: handler.count("close"))
    assert isinstance(handler.reason(), ssl.SSLEOFError)


def test_resets_of_scanners_are_counted_and_not_logged(
    mux: muxcore.Mux, keys: Keys, peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    listener, handler = echo(mux, keys)
    for _ in range(20):
        raw = peers.raw(listener.address)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.sendall(b"\x16\x03\x01")
        raw.close()
    until(mux, lambda: handler.count("close") == 20)
    assert not caplog.records
    assert set(handler.names()) == {"close"}


def test_a_peer_that_never_reads_delays_close_only_to_its_timeout(
    mux: muxcore.Mux, keys: Keys, peers: Peers
) -> None:
    listener, handler = echo(mux, keys, timeouts=muxcore.Timeouts(write=0.2))
    peers.client(listener.address, keys.client())
    [conn] = handler.connections
    conn.send(bytes(10_000_000))
    conn.close()
    until(mux, lambda: handler.count("close"))
    assert isinstance(handler.reason(), muxcore.WriteTimeout)


def test_close_ends_though_the_peer_keeps_sending(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys, timeouts=muxcore.Timeouts(linger=0.2))
    client = peers.client(listener.address, keys.client())
    stop = threading.Event()

    def keep_sending() -> None:
        try:
            while not stop.is_set():
                client.sendall(bytes(10_000))
        except OSError:
            pass

    future = peers.pool.submit(keep_sending)
    handler.connections[0].close()
    until(mux, lambda: handler.count("close"))
    stop.set()
    until(mux, future.done)


def test_a_handshake_that_stands_still_is_given_up(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys, timeouts=muxcore.Timeouts(handshake=0.1))
    peers.raw(listener.address).sendall(b"\x16\x03\x01\x02\x00\x01\x00")
    until(mux, lambda: handler.count("close"))
    assert isinstance(handler.reason(), muxcore.HandshakeTimeout)


def test_a_server_that_speaks_first_does_not_spin_before_the_client_hello(
    mux: muxcore.Mux, keys: Keys, peers: Peers
) -> None:
    class Greeter(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            conn.send(b"welcome")

    listener = mux.listen(("127.0.0.1", 0), Greeter(), tls=keys.server())
    raw = peers.raw(listener.address)
    until(mux, lambda: mux.stats().accepts)
    for _ in range(5):
        mux.poll(0)
    before = mux.stats().waits
    mux.poll(0.2)
    assert mux.stats().waits == before + 1
    sock = peers.run(lambda: keys.client().wrap_socket(raw, server_hostname=NAME))
    peers.sockets.append(sock)
    assert peers.read(sock, 7) == b"welcome"


# --- faults ----------------------------------------------------------------------------------------


class Faulty:
    """The inner object of an SSLObject, one of whose calls fails once the handshake is done, or before."""

    def __init__(self, inner: Any, step: str, error: BaseException) -> None:
        self._inner, self._step, self._error = inner, step, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def do_handshake(self) -> None:
        self.fail("do_handshake")
        self._inner.do_handshake()

    def read(self, *args: Any) -> Any:
        self.fail("read")
        return self._inner.read(*args)

    def write(self, data: Any) -> int:
        self.fail("write")
        return int(self._inner.write(data))

    def shutdown(self) -> Any:
        self.fail("shutdown")
        return self._inner.shutdown()

    def fail(self, step: str) -> None:
        if step == self._step:
            raise self._error


ERRORS: list[Callable[[], BaseException]] = [
    *(
        lambda kind=kind, number=number: kind(number, "injected")  # type: ignore[misc]
        for kind, number in (
            (ssl.SSLError, ssl.SSL_ERROR_SSL), (ssl.SSLSyscallError, ssl.SSL_ERROR_SYSCALL),
            (ssl.SSLEOFError, ssl.SSL_ERROR_EOF), (ssl.SSLWantWriteError, ssl.SSL_ERROR_WANT_WRITE),
            (ssl.SSLError, ssl.SSL_ERROR_WANT_X509_LOOKUP), (ssl.SSLCertVerificationError, ssl.SSL_ERROR_SSL),
            (ssl.SSLError, ssl.SSL_ERROR_INVALID_ERROR_CODE), (OSError, 5),
        )
    ),
    MemoryError,
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
@pytest.mark.parametrize("step", ["do_handshake", "read", "write", "shutdown"])
def test_whatever_a_call_of_openssl_returns_ends_its_connection_alone(
    mux: muxcore.Mux, keys: Keys, peers: Peers, step: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    error = ERRORS[number]()

    class Broken(ssl.SSLObject):
        @classmethod
        def _create(cls, *args: Any, **options: Any) -> Any:
            made = super()._create(*args, **options)  # type: ignore[misc]
            made._sslobj = Faulty(made._sslobj, step, error)
            return made

    listener, handler = echo(mux, keys, timeouts=muxcore.Timeouts(linger=0.1))
    healthy = peers.client(listener.address, keys.client())
    broken = keys.server()
    broken.sslobject_class = Broken
    listener.tls = broken
    raw = peers.raw(listener.address)

    def talk() -> None:
        try:
            with keys.client().wrap_socket(raw, server_hostname=NAME) as sock:
                sock.sendall(b"x")
                sock.recv(10)
        except OSError:
            pass

    peers.run(talk)
    until(mux, lambda: handler.count("close"))
    assert handler.reason() is error or step == "shutdown"
    healthy.sendall(b"fine")
    assert peers.read(healthy, 4) == b"fine"
    assert not caplog.records


@pytest.mark.parametrize("step", ["read", "write"])
def test_a_signal_handler_that_raises_amid_a_call_of_openssl_corrupts_nothing(
    mux: muxcore.Mux, keys: Keys, peers: Peers, step: str
) -> None:
    """Python's ssl runs signal handlers between OpenSSL's part and its result."""
    armed = [step]

    class Interrupted(Faulty):
        def read(self, *args: Any) -> Any:
            result = self._inner.read(*args)
            self.interrupt("read", bool(result))
            return result

        def write(self, data: Any) -> int:
            result = int(self._inner.write(data))
            self.interrupt("write", True)
            return result

        def interrupt(self, name: str, now: bool) -> None:
            if armed == [name] and now:
                armed.clear()
                raise KeyboardInterrupt

    class Broken(ssl.SSLObject):
        @classmethod
        def _create(cls, *args: Any, **options: Any) -> Any:
            made = super()._create(*args, **options)  # type: ignore[misc]
            made._sslobj = Interrupted(made._sslobj, "", ValueError())
            return made

    context = keys.server()
    context.sslobject_class = Broken
    listener, handler = echo(mux, keys, tls=context, timeouts=muxcore.Timeouts(linger=0.1))
    armed.clear()
    client = peers.client(listener.address, keys.client())
    armed.append(step)
    data = bytes(range(256)) * 400
    future = peers.pool.submit(client.sendall, data)
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: False)
    until(mux, future.done)  # before 3.13, threads that send and read on one ssl.SSLSocket corrupt its OpenSSL object
    if step == "write":
        assert peers.read(client, len(data)) == data
    else:
        until(mux, lambda: handler.count("close"))
        assert "a signal handler raised during a read" in str(handler.reason())
        assert data.startswith(handler.received())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_signal_handler_that_raises_as_a_call_of_the_wire_begins_or_returns_loses_nothing(
    mux: muxcore.Mux, peers: Peers, error: type[BaseException]
) -> None:
    """Python's functions run signal handlers there. What these raise leaves poll(), and the connection goes on."""
    keys = Keys(through_ssl=True)
    listener, handler = echo(mux, keys)
    client = peers.client(listener.address, keys.client())
    at = left = 0

    def interrupt(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        if frame.f_code.co_filename.endswith("muxcore/tls.py") and event in ("call", "c_return"):
            left -= 1
            if left == 0:
                raise error

    while left <= 0:
        at += 1
        left = at
        client.sendall(b"%04d" % at)
        with suppress(error):
            sys.setprofile(interrupt)
            try:
                until(mux, lambda end=4 * at: len(handler.received()) >= end)  # type: ignore[misc]
            finally:
                sys.setprofile(None)
        assert peers.read(client, 4) == b"%04d" % at
    assert at > 5
    assert handler.count("close") == 0


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")) or not hasattr(_ssl, "__file__"),
    reason="OpenSSL is called through Python's ssl there",
)
@pytest.mark.parametrize(
    ("through_ssl", "version", "options"),
    [
        (False, ssl.TLSVersion.TLSv1_3, 0),
        (True, ssl.TLSVersion.TLSv1_3, 0),
        (True, ssl.TLSVersion.TLSv1_2, 0),  # another handshake might call an sni_callback, or one for PSK
        (False, ssl.TLSVersion.TLSv1_2, ssl.OP_NO_RENEGOTIATION),
    ],
    ids=["1.3", "1.3 with a callback", "1.2", "1.2 without renegotiation"],
)
def test_the_compiled_core_calls_openssl_itself_unless_that_might_call_python(
    through_ssl: bool, version: ssl.TLSVersion, options: int
) -> None:
    """Promise tls. The first handshake is Python's in any case."""
    keys = Keys(through_ssl and version is ssl.TLSVersion.TLSv1_3)
    with muxcore.Mux(backend="epoll") as mux:
        peers = Peers(mux)
        handler = Recorder(bytes)
        context = keys.server()
        context.options |= options
        listener = mux.listen(("127.0.0.1", 0), handler, tls=context)
        client_context = keys.client()
        client_context.maximum_version = version
        client = peers.client(listener.address, client_context)
        calls: list[str] = []
        client.sendall(b"first")
        assert peers.read(client, 5) == b"first"
        sys.setprofile(lambda frame, event, arg: calls.append(frame.f_code.co_filename))
        try:
            for at in range(10):
                client.sendall(b"%04d" % at)
                until(mux, lambda at=at: len(handler.received()) == 9 + 4 * at)  # type: ignore[misc]
        finally:
            sys.setprofile(None)
        assert peers.read(client, 40) == handler.received()[5:]
        assert any(name.endswith("muxcore/tls.py") for name in calls) == through_ssl
        peers.close()


def test_a_signal_handler_may_send_much_amid_a_flush(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """Promise any-user-code. The fallback tried to flush for ever what the flush in progress had not finished."""
    if mux.backend == "epoll":
        pytest.skip("the compiled core runs no signal handler there")
    listener, handler = echo(mux, keys)
    client = peers.client(listener.address, keys.client())
    [conn] = handler.connections
    later = bytes(200_000)
    left = [later]

    def send_more(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_name == "_consume" and left:
            conn.send(left.pop())

    conn.send(b"first")
    sys.setprofile(send_more)
    try:
        conn.flush()
    finally:
        sys.setprofile(None)
    assert peers.read(client, 5 + len(later)) == b"first" + later


def test_an_ssl_object_of_the_users_class_is_served(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """No property of it is asked for the fast way."""

    class Own(ssl.SSLObject):
        @property
        def context(self) -> Any:
            raise ValueError("not for muxcore")

    context = keys.server()
    context.sslobject_class = Own
    listener = mux.listen(("127.0.0.1", 0), Recorder(bytes), tls=context)
    client = peers.client(listener.address, keys.client())
    client.sendall(b"hello")
    assert peers.read(client, 5) == b"hello"


def bad_record(size: int = 32) -> bytes:
    return b"\x17\x03\x03" + size.to_bytes(2, "big") + bytes(size)


def test_replies_to_earlier_reads_are_sent_before_a_bad_record_ends_the_stream(
    backend: str, keys: Keys
) -> None:
    with muxcore.Mux(backend=backend, read_size=4096) as mux:
        peers = Peers(mux)
        listener, handler = echo(mux, keys)
        client = peers.client(listener.address, keys.client())
        for _ in range(10):
            client.sendall(bytes(4000))
        socket.socket.sendall(client, bad_record())
        assert peers.read(client, 32_000) == bytes(32_000)
        until(mux, lambda: handler.count("close"))
        assert type(handler.reason()) is ssl.SSLError  # no SSLEOFError: of the record
        peers.close()


def test_a_flush_before_a_bad_record_keeps_the_reason(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """The message and the bad record come in one read; the stream has failed when the handler runs."""

    class Flushing(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            super().on_message(conn, message)
            conn.send(b"reply")
            conn.flush()

    handler = Flushing()
    listener = mux.listen(("127.0.0.1", 0), handler, tls=keys.server())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = keys.client().wrap_bio(incoming, outgoing, server_hostname=NAME)
    raw = peers.raw(listener.address)

    def shake_hands() -> None:
        while True:
            try:
                client.do_handshake()
                return
            except ssl.SSLWantReadError:
                raw.sendall(outgoing.read())
                incoming.write(raw.recv(65536))

    peers.run(shake_hands)
    client.write(b"hello")
    raw.sendall(outgoing.read() + bad_record())
    until(mux, lambda: handler.count("close"))
    assert handler.messages() == [b"hello"]
    assert type(handler.reason()) is ssl.SSLError  # no SSLEOFError: of the record


def test_a_signal_handler_that_flushes_amid_a_flush_sends_nothing_twice(
    mux: muxcore.Mux, keys: Keys, peers: Peers
) -> None:
    """Promise any-user-code. It may run at each call of the fallback's Python."""
    listener, handler = echo(mux, keys)
    client = peers.client(listener.address, keys.client())
    [conn] = handler.connections
    flushed = True
    at = 0
    while flushed:
        at += 1
        flushed = False
        left = at

        def flush(frame: FrameType, event: str, arg: object) -> None:
            nonlocal flushed, left
            left -= "muxcore" in frame.f_code.co_filename
            if left == 0:
                flushed = True
                sys.setprofile(None)
                conn.flush()

        conn.send(b"%04d" % at)
        sys.setprofile(flush)
        try:
            conn.flush()
        finally:
            sys.setprofile(None)
        assert peers.read(client, 4) == b"%04d" % at
    assert at > 20 or mux.backend == "epoll"


def test_a_first_message_does_not_wait_for_a_delayed_ack(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """The tickets are held back, so that nothing but an ACK goes to the client behind its Finished."""
    listener, _ = echo(mux, keys)
    seconds = []
    for _ in range(5):
        client = peers.client(listener.address, keys.client())
        start = time.monotonic()
        client.sendall(b"x")
        peers.read(client, 1)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.035  # until() looks at the thread every 20 ms; the ACK would cost 40 more


@pytest.mark.parametrize("act", ["start_tls", "detach"])
def test_behind_a_proxy_header_on_open_may_do_anything(mux: muxcore.Mux, keys: Keys, peers: Peers, act: str) -> None:
    detached: list[socket.socket] = []

    class Handler(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            super().on_open(conn)
            if act == "start_tls":
                conn.start_tls(keys.server())
            else:
                detached.append(conn.detach())

    handler = Handler(bytes)
    listener = mux.listen(("127.0.0.1", 0), handler, proxy_protocol=["127.0.0.1"])
    raw = peers.raw(listener.address)
    raw.sendall(proxy_protocol.header(1, ("192.0.2.1", 5), ("192.0.2.2", 6)))
    if act == "start_tls":
        sock = peers.run(lambda: keys.client().wrap_socket(raw, server_hostname=NAME))
        peers.sockets.append(sock)
        sock.sendall(b"hello")
        assert peers.read(sock, 5) == b"hello"
    else:
        until(mux, lambda: detached)
        detached[0].close()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="ssl has no callbacks for PSK")
def test_a_pre_shared_key_replaces_a_certificate(mux: muxcore.Mux) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    for context in (server, client):
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("PSK")
    server.set_psk_server_callback(lambda identity: b"secret" if identity == "me" else b"")  # type: ignore[attr-defined, unused-ignore]
    client.set_psk_client_callback(lambda hint: ("me", b"secret"))  # type: ignore[attr-defined, unused-ignore]
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), Recorder(bytes.upper), tls=server)
    conn = mux.connect(listener.address, handler, tls=client)
    conn.send(b"hello")
    until(mux, lambda: handler.received() == b"HELLO")


# --- arguments -------------------------------------------------------------------------------------


def test_a_bad_argument_is_named_before_anything_changes(mux: muxcore.Mux, keys: Keys) -> None:
    server, client = keys.server(), keys.client()
    address = ("127.0.0.1", 0)
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: mux.listen(address, Recorder(), tls=True), TypeError, "tls must be an ssl.SSLContext, not bool"),  # type: ignore[arg-type]
        (lambda: mux.listen(address, Recorder(), tls=client), ValueError, "tls is a context for a client"),
        (lambda: mux.connect(("127.0.0.1", 1), tls=server), ValueError, "tls is a context for a server"),
        (lambda: mux.connect(("127.0.0.1", 1), tls="yes"), TypeError, "tls must be an ssl.SSLContext or True"),  # type: ignore[arg-type]
        (lambda: mux.connect("/path", tls=client), ValueError, "server_hostname is required"),
        (lambda: mux.connect(("127.0.0.1", 1), server_hostname=NAME), ValueError, "server_hostname needs tls="),
        (lambda: mux.connect(("127.0.0.1", 1), tls=client, server_hostname="x" * 64), ValueError, "host name"),
        (lambda: mux.connect(("127.0.0.1", 1), tls=client, server_hostname=5), TypeError, "server_hostname must be"),  # type: ignore[arg-type]
        (lambda: mux.connect(("127.0.0.1", 1), tls=client, server_hostname="a\0b"), ValueError, "server_hostname"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
    assert mux.stats().connections == 0


def test_the_context_of_a_listener_without_tls_cannot_be_set(mux: muxcore.Mux, keys: Keys) -> None:
    listener = mux.listen(("127.0.0.1", 0), Recorder())
    assert listener.tls is None
    with pytest.raises(ValueError, match="tls: the listener was made without TLS"):
        listener.tls = keys.server()
    other = mux.listen(("127.0.0.1", 0), Recorder(), tls=keys.server())
    with pytest.raises(TypeError, match="tls must be"):
        other.tls = None
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, Recorder())
    theirs.close()
    with pytest.raises(TypeError, match=r"context must be an ssl\.SSLContext, not bool"):
        conn.start_tls(True, server_side=False, server_hostname=NAME)  # type: ignore[arg-type]


def test_detach_is_refused(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    listener, handler = echo(mux, keys)
    peers.client(listener.address, keys.client())
    with pytest.raises(RuntimeError, match="detach: a connection with TLS cannot be detached"):
        handler.connections[0].detach()


# --- cost ------------------------------------------------------------------------------------------


def test_handshakes_leave_open_connections_their_turn(mux: muxcore.Mux, keys: Keys, peers: Peers) -> None:
    """Sixty handshakes begin at once; an established connection's echo does not wait for all of them."""
    listener, _ = echo(mux, keys)
    plain = mux.listen(("127.0.0.1", 0), Recorder(bytes))
    client = peers.raw(plain.address)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        keys.client().wrap_bio(incoming, outgoing, server_hostname=NAME).do_handshake()
    hello = outgoing.read()
    raws = [peers.raw(listener.address) for _ in range(60)]
    until(mux, lambda: mux.stats().accepts == 61)
    for raw in raws:
        raw.sendall(hello)
    client.sendall(b"ping")
    client.setblocking(False)
    begun = mux.stats().bytes_out
    turns = 0
    while not _received(client):
        mux.poll(0)
        turns += 1
        assert turns < 100
    per_handshake = 700  # bytes of a server's first flight, at least
    assert (mux.stats().bytes_out - begun) < 20 * per_handshake * 2


def _received(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(10))
    except BlockingIOError:
        return False


def test_connections_that_come_and_go_leave_no_memory(
    mux: muxcore.Mux, backend: str, keys: Keys, peers: Peers
) -> None:
    listener, handler = echo(mux, keys)
    context = keys.client()

    def talk(count: int) -> None:
        for _ in range(count):
            with context.wrap_socket(peers.raw(listener.address), server_hostname=NAME) as sock:
                sock.sendall(b"x" * 1000)
                read_exactly(sock, 1000)
            peers.sockets.clear()

    def rounds(count: int) -> None:
        before = handler.count("close")
        peers.run(talk, count)
        until(mux, lambda: handler.count("close") == before + count)
        handler.events.clear()
        handler.connections.clear()
        gc.collect()

    rounds(20)
    with memory(backend) as grown:
        rounds(60)
        assert grown() < 60 * 500


@pytest.mark.linux_only("resident memory")
def test_resident_memory_is_flat_over_many_connections(mux: muxcore.Mux, keys: Keys) -> None:
    """Promise tls. MUXCORE_TLS_CONNECTIONS=100000: as many as the record in docs/trust.md says."""
    count = int(os.environ.get("MUXCORE_TLS_CONNECTIONS", "600"))
    server, client = keys.server(), keys.client()
    closed: list[BaseException | None] = []

    class Client(muxcore.Handler):
        def on_open(self, conn: muxcore.Connection) -> None:
            conn.send(b"x" * 256)

        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            conn.close()

        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            closed.append(exc)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    listener = mux.listen(("127.0.0.1", 0), lambda conn, message: conn.send(message), tls=server)

    def serve(number: int) -> None:
        for _ in range(number // 20):
            closed.clear()
            for _ in range(20):
                mux.connect(listener.address, Client(), tls=client, server_hostname=NAME)
            until(mux, lambda: len(closed) == 20, 60)
            assert closed == [None] * 20
        until(mux, lambda: not mux.stats().connections)

    serve(400)
    before = resident()
    serve(count)
    assert resident() - before < 1 << 20
