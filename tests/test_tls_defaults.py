"""What a server refuses whose context is a default one, ssl.SSLContext(PROTOCOL_TLS_SERVER), with certificates.

It stands for what scanners such as testssl.sh and sslyze look for: old protocols, weak suites, compression,
renegotiation. Two TLS libraries offer what they still know, and bytes written here offer what they have forgotten. It
looks for no faults of OpenSSL.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from programs import Files, Find, Start, ended, gnutls_cli, shown, starter, tell
from support import Recorder, client, receive, until

import muxcore

pytestmark = pytest.mark.unix_only("it runs programs")
Server = tuple[muxcore.Listener, Recorder]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start:
        yield start


@pytest.fixture
def default(mux: muxcore.Mux, files: Files) -> Server:
    """With a key of RSA as well as one of elliptic curves: no suite is refused for want of a key."""
    context = files.server()
    context.load_cert_chain(files.rsa_cert, files.rsa_key)
    handler = Recorder()
    return mux.listen(("127.0.0.1", 0), handler, tls=context), handler


def refused(mux: muxcore.Mux, handler: Recorder) -> str:
    """Why the only handshake failed."""
    until(mux, lambda: handler.count("close"))
    assert handler.names() == ["close"]
    assert mux.stats().handshake_failures == 1
    return str(handler.reason())


@pytest.mark.parametrize(
    ("version", "ciphers", "alert", "reason"),
    [
        pytest.param("-tls1", "ALL", 70, "UNSUPPORTED_PROTOCOL", id="TLS 1.0"),
        pytest.param("-tls1_1", "ALL", 70, "UNSUPPORTED_PROTOCOL", id="TLS 1.1"),
        pytest.param("-tls1_2", "aNULL", 40, "NO_SHARED_CIPHER", id="anonymous"),
        pytest.param("-tls1_2", "eNULL", 40, "NO_SHARED_CIPHER", id="NULL"),
    ],
)
def test_openssl_s_client_is_refused_what_is_weak(
    mux: muxcore.Mux, default: Server, start: Start, peer_program: Find,
    version: str, ciphers: str, alert: int, reason: str,
) -> None:  # fmt: skip
    listener, handler = default
    address = f"127.0.0.1:{listener.address[1]}"
    offer = [version, "-cipher", f"{ciphers}:@SECLEVEL=0"]
    output = ended(mux, start(peer_program("openssl"), "s_client", "-connect", address, *offer))
    assert b"SSL alert number %d" % alert in output
    assert reason in refused(mux, handler)


EXCHANGES = "NONE:+VERS-TLS1.2:+MAC-ALL:+COMP-NULL:+SIGN-ALL:+GROUP-ALL:+CTYPE-X509"
SIGNED = f"{EXCHANGES}:+ECDHE-RSA:+ECDHE-ECDSA:+DHE-RSA:+RSA"


def test_gnutls_cli_gets_a_strong_suite(
    mux: muxcore.Mux, files: Files, default: Server, start: Start, peer_program: Find
) -> None:
    """The offers of the next test are refused for their weak part alone."""
    listener, handler = default
    process = start(*gnutls_cli(peer_program, files, listener, f"{SIGNED}:+AES-256-GCM"))
    shown(mux, process, b"- Handshake was completed")
    until(mux, lambda: handler.count("open"))
    assert handler.connections[0].tls.cipher()[0].endswith("AES256-GCM-SHA384")


@pytest.mark.parametrize(
    ("offer", "alert", "reason"),
    [
        pytest.param("NORMAL:-VERS-ALL:+VERS-TLS1.0", 70, "UNSUPPORTED_PROTOCOL", id="TLS 1.0"),
        pytest.param("NORMAL:-VERS-ALL:+VERS-TLS1.1", 70, "UNSUPPORTED_PROTOCOL", id="TLS 1.1"),
        pytest.param(f"{SIGNED}:+NULL", 40, "NO_SHARED_CIPHER", id="NULL"),
        pytest.param(f"{SIGNED}:+ARCFOUR-128", 40, "NO_SHARED_CIPHER", id="RC4"),
        pytest.param(f"{SIGNED}:+3DES-CBC", 40, "NO_SHARED_CIPHER", id="3DES"),
        pytest.param(f"{EXCHANGES}:+ANON-ECDH:+ANON-DH:+CIPHER-ALL", 40, "NO_SHARED_CIPHER", id="anonymous"),
    ],
)
def test_gnutls_cli_is_refused_what_is_weak(
    mux: muxcore.Mux, files: Files, default: Server, start: Start, peer_program: Find,
    offer: str, alert: int, reason: str,
) -> None:  # fmt: skip
    listener, handler = default
    assert b"*** Received alert [%d]" % alert in ended(mux, start(*gnutls_cli(peer_program, files, listener, offer)))
    assert reason in refused(mux, handler)


ECDHE_RSA_AES_128_GCM = 0xC02F
EXPORT = [3, 6, 8, 0x0B, 0x0E, 0x11, 0x14, 0x17, 0x19, 0x62, 0x63, 0x64, 0x65]
DES = [9, 0x0C, 0x0F, 0x12, 0x15, 0x1A]
RC4 = [4, 5, 0x18, 0xC002, 0xC007, 0xC00C, 0xC011, 0xC016]


def client_hello(version: int, suites: list[int], compressions: bytes = b"\0") -> bytes:
    """The record in which a client offers them, with curves and signatures that any server takes."""
    body = struct.pack(">H32xBH", version, 0, 2 * len(suites)) + struct.pack(f">{len(suites)}H", *suites)
    body += struct.pack(">B", len(compressions)) + compressions
    extensions = (10, b"\0\x1d\0\x17"), (13, b"\4\3\4\1\x08\4")
    packed = b"".join(struct.pack(">HHH", kind, len(data) + 2, len(data)) + data for kind, data in extensions)
    body += struct.pack(">H", len(packed)) + packed
    return struct.pack(">BHHBxH", 22, min(version, 0x301), len(body) + 4, 1, len(body)) + body


SSLV2 = struct.pack(">HBHHHH3s16s", 0x8000 | 28, 1, 2, 3, 0, 16, b"\7\0\xc0", bytes(16))  # with 3DES


@pytest.mark.parametrize(
    ("hello", "alert", "reason"),
    [
        pytest.param(SSLV2, 70, "UNKNOWN_PROTOCOL", id="SSLv2"),
        pytest.param(client_hello(0x300, [ECDHE_RSA_AES_128_GCM, 0x0A, 0x2F, 0x35]), 40, "VERSION_TOO_LOW", id="SSLv3"),
        pytest.param(client_hello(0x303, EXPORT), 40, "NO_SHARED_CIPHER", id="EXPORT"),
        pytest.param(client_hello(0x303, DES), 40, "NO_SHARED_CIPHER", id="DES"),
        pytest.param(client_hello(0x303, RC4), 40, "NO_SHARED_CIPHER", id="RC4"),
        pytest.param(client_hello(0x303, [ECDHE_RSA_AES_128_GCM], b"\1"), 50, "NO_COMPRESSION", id="only compressed"),
    ],
)
def test_a_hello_with_what_libraries_have_forgotten_is_refused(
    mux: muxcore.Mux, default: Server, hello: bytes, alert: int, reason: str
) -> None:
    listener, handler = default
    with client(listener) as sock:
        sock.sendall(hello)
        answer = receive(mux, sock)
    assert (len(answer), answer[0], answer[5:]) == (7, 21, bytes([2, alert]))  # one record, a fatal alert
    assert reason in refused(mux, handler)


def test_compression_is_not_selected(mux: muxcore.Mux, default: Server) -> None:
    """CRIME needs it. The suite shows that the hellos of the test above are refused for what they offer."""
    listener, _ = default
    with client(listener) as sock:
        sock.sendall(client_hello(0x303, [ECDHE_RSA_AES_128_GCM], b"\1\0"))
        answer = receive(mux, sock, 100)
    assert (answer[0], answer[5]) == (22, 2)  # a ServerHello: version, random, session, suite, compression
    session = answer[43]
    assert struct.unpack_from(">HB", answer, 44 + session) == (ECDHE_RSA_AES_128_GCM, 0)


def test_openssl_s_client_renegotiates_in_vain(
    mux: muxcore.Mux, default: Server, start: Start, peer_program: Find
) -> None:
    """Renegotiation of TLS 1.2 costs a server more than its client."""
    listener, handler = default
    process = start(peer_program("openssl"), "s_client", "-connect", f"127.0.0.1:{listener.address[1]}", "-tls1_2")
    until(mux, lambda: handler.count("open"))
    tell(process, b"R\n")
    shown(mux, process, b"no renegotiation")
    until(mux, lambda: handler.count("close"))
    assert handler.messages() == []


def test_gnutls_cli_renegotiates_in_vain(
    mux: muxcore.Mux, files: Files, default: Server, start: Start, peer_program: Find
) -> None:
    listener, handler = default
    process = start(*gnutls_cli(peer_program, files, listener, "NORMAL:-VERS-TLS1.3"), "--rehandshake")
    assert b"No renegotiation is allowed" in ended(mux, process)
    assert process.returncode != 0
    until(mux, lambda: handler.count("close"))
    assert handler.names() == ["open", "close"]
