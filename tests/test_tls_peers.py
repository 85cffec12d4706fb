"""TLS with clients and servers that are not Python's (Promise tls)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import NAME, Files, Find, Start, ended, gnutls_cli, shown, starter, tell, with_feature
from support import EXAMPLES, Recorder, about_examples, example, free_port, pattern, until, until_it_listens

import muxcore

trustme = pytest.importorskip("trustme")
pytestmark = pytest.mark.unix_only("it runs programs")
beside_the_examples = about_examples[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start:
        yield start


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_s_client(mux: muxcore.Mux, files: Files, start: Start, peer_program: Find, version: str) -> None:
    class Echo(Recorder):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            conn.send(message.upper())
            conn.close()

    listener = mux.listen(("127.0.0.1", 0), Echo(), framer=muxcore.Lines(), tls=files.server())
    address = f"127.0.0.1:{listener.address[1]}"
    process = start(
        peer_program("openssl"), "s_client", "-connect", address, version, "-quiet", "-CAfile", str(files.ca),
        "-verify_return_error", "-servername", NAME,
    )
    assert process.stdin is not None
    process.stdin.write(b"hello there\n")
    process.stdin.flush()
    assert b"HELLO THERE" in ended(mux, process)


def test_openssl_s_client_updates_its_keys(mux: muxcore.Mux, files: Files, start: Start, peer_program: Find) -> None:
    """"K" of s_client: its keys change, and it wants ours to change."""
    handler = Recorder(bytes.upper)
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines(), tls=files.server())
    address = f"127.0.0.1:{listener.address[1]}"
    process = start(peer_program("openssl"), "s_client", "-connect", address, "-tls1_3", "-CAfile", str(files.ca))
    assert process.stdin is not None
    until(mux, lambda: handler.count("open"))
    for count, command in ((1, b"one\n"), (1, b"K\n"), (2, b"two\n")):
        before = mux.stats().recv_calls
        process.stdin.write(command)
        process.stdin.flush()
        until(mux, lambda before=before: mux.stats().recv_calls > before)  # type: ignore[misc]
        until(mux, lambda count=count: handler.count("message") >= count)  # type: ignore[misc]
    assert handler.messages() == [b"one", b"two"]
    handler.connections[0].close()
    assert b"TWO" in ended(mux, process)


@pytest.mark.parametrize("version", ["TLS1.2", "TLS1.3"])
def test_gnutls_cli_gets_replies_and_ends_first(
    mux: muxcore.Mux, files: Files, start: Start, peer_program: Find, version: str
) -> None:
    """With close_notify: on_close would get an error of a FIN alone."""
    handler = Recorder(bytes.upper)
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines(), tls=files.server())
    process = start(*gnutls_cli(peer_program, files, listener, f"NORMAL:-VERS-ALL:+VERS-{version}"))
    shown(mux, process, b"- Status: The certificate is trusted.")
    for line in (b"one", b"two"):
        tell(process, line + b"\n")
        shown(mux, process, line.upper())
    assert handler.connections[0].tls.version() == version.replace("TLS", "TLSv")
    assert process.stdin is not None
    process.stdin.close()
    shown(mux, process, b"- Peer has closed the GnuTLS connection")
    until(mux, lambda: process.poll() is not None)
    assert process.returncode == 0
    until(mux, lambda: handler.count("close"))
    assert handler.reason() is None
    assert handler.messages() == [b"one", b"two"]


@pytest.mark.parametrize("version", ["TLS1.2", "TLS1.3"])
def test_gnutls_cli_gets_our_close_notify_behind_the_last_message(
    mux: muxcore.Mux, files: Files, start: Start, peer_program: Find, version: str
) -> None:
    class Goodbye(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            conn.send(b"goodbye\n")
            conn.close()

    handler = Goodbye()
    listener = mux.listen(("127.0.0.1", 0), handler, tls=files.server())
    process = start(*gnutls_cli(peer_program, files, listener, f"NORMAL:-VERS-ALL:+VERS-{version}"))
    output = ended(mux, process)
    assert b"goodbye\n- Peer has closed the GnuTLS connection" in output
    assert process.returncode == 0
    until(mux, lambda: handler.count("close"))
    assert handler.reason() is None


@pytest.mark.parametrize(
    ("name", "ca", "complaint"),
    [
        ("example.org", "ca", b"The name in the certificate does not match the expected."),
        (NAME, "other", b"The certificate issuer is unknown."),
    ],
)
def test_gnutls_cli_verifies_our_certificate(
    mux: muxcore.Mux, files: Files, start: Start, peer_program: Find, tmp_path: Path,
    name: str, ca: str, complaint: bytes,
) -> None:  # fmt: skip
    """Its alert is the reason that on_close gets, without an on_open."""
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, tls=files.server())
    process = start(*gnutls_cli(peer_program, files, listener, name=name, ca=files.ca if ca == "ca" else other))
    assert complaint in ended(mux, process)
    assert process.returncode != 0
    until(mux, lambda: handler.count("close"))
    assert handler.names() == ["close"]
    assert "BAD_CERTIFICATE" in str(handler.reason())
    assert mux.stats().handshake_failures == 1


def test_openssl_s_server(mux: muxcore.Mux, files: Files, start: Start, peer_program: Find) -> None:
    port = free_port()
    process = start(
        peer_program("openssl"), "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(files.cert),
        "-key", str(files.key), "-rev", "-quiet",
    )
    until_it_listens(process, port).close()
    handler = Recorder()
    conn = mux.connect(("127.0.0.1", port), handler, framer=muxcore.Lines(), tls=files.client())
    conn.send(b"desserts")
    until(mux, lambda: handler.count("message"))
    assert handler.messages() == [b"stressed"]


class Http(muxcore.Handler[None]):
    """A response to each request of HTTP/1.1, without a look at it."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.body) + self.body)


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_curl(mux: muxcore.Mux, files: Files, start: Start, peer_program: Find, size: int) -> None:
    listener = mux.listen(
        ("127.0.0.1", 0), Http(b"x" * size), framer=muxcore.Delimiter(b"\r\n\r\n"), tls=files.server()
    )
    url = f"https://localhost:{listener.address[1]}/"
    process = start(peer_program("curl"), "-sS", "-4", "--cacert", str(files.ca), url, url, "-o", "-")
    out: list[bytes] = []
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)

    def complete() -> bool:
        assert process.stdout is not None
        out.append(process.stdout.read() or b"")
        return process.poll() is not None

    until(mux, complete)
    out.append(process.stdout.read() or b"")
    assert b"".join(out) == b"x" * 2 * size


def test_plain_http_of_curl_at_the_port_of_tls(
    mux: muxcore.Mux, files: Files, start: Start, peer_program: Find
) -> None:
    handler = Recorder()
    listener = mux.listen(("127.0.0.1", 0), handler, tls=files.server())
    process = start(peer_program("curl"), "-sS", "-m", "10", f"http://127.0.0.1:{listener.address[1]}/")
    ended(mux, process)
    assert process.returncode != 0
    until(mux, lambda: handler.count("close"))
    assert "HTTP_REQUEST" in str(handler.reason())


# --- clients of the examples -----------------------------------------------------------------------


@pytest.fixture(params=["http", "https"])
def site(request: pytest.FixtureRequest, files: Files, backend: str) -> Iterator[str]:
    """The address of examples/httpd.py, for clients that know the authority."""
    pytest.importorskip("httptools")
    options = files.options() if request.param == "https" else ()
    with example("httpd.py", *options, backend=backend) as port:
        yield f"{request.param}://localhost:{port}"


@beside_the_examples
def test_curl_gets_pages_of_httpd_over_one_connection(site: str, files: Files, peer_program: Find) -> None:
    command = [peer_program("curl"), "-sS", "-4", "--cacert", str(files.ca), "-w", " %{http_code} %{num_connects}\n"]
    done = subprocess.run([*command, f"{site}/", f"{site}/json"], capture_output=True, timeout=20, check=True)
    assert done.stdout == b'Hello, World! 200 1\n{"message": "Hello, World!"} 200 0\n'


@beside_the_examples
def test_curl_posts_to_httpd(site: str, files: Files, peer_program: Find, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(pattern(1 << 20))
    command = [peer_program("curl"), "-sS", "-4", "--cacert", str(files.ca), "--data-binary", f"@{body}"]
    done = subprocess.run([*command, f"{site}/echo"], capture_output=True, timeout=20, check=True)
    assert done.stdout == body.read_bytes()


WRK = """
response = function(status, headers, body)
  if status ~= 200 or body ~= "Hello, World!" then wrk.thread:stop() error("wrong reply") end
end
done = function(summary)
  local lost = summary.errors
  print(string.format("replies %d lost %d", summary.requests, lost.connect + lost.read + lost.write + lost.timeout))
end
"""


@beside_the_examples
@pytest.mark.parametrize("site", ["https"], indirect=True)
def test_wrk_loses_no_reply_of_httpd(site: str, peer_program: Find, tmp_path: Path) -> None:
    script = tmp_path / "check.lua"
    script.write_text(WRK)
    command = [peer_program("wrk"), "-t1", "-c20", "-d1s", "-s", str(script), f"{site}/"]
    done = subprocess.run(command, capture_output=True, timeout=30, check=True, text=True)
    found = re.search(r"^replies (\d+) lost 0$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    assert int(found[1]) > 100
    assert "Non-2xx" not in done.stdout
    assert "wrong reply" not in done.stderr


@pytest.fixture
def store(files: Files, backend: str) -> Iterator[str]:
    """The port of examples/resp_store.py, with TLS."""
    with example("resp_store.py", *files.options(), backend=backend) as port:
        yield str(port)


@pytest.fixture
def redis_cli(files: Files, store: str, peer_program: Find) -> list[str]:
    program = with_feature(peer_program("redis-cli"), "--help", b"--tls")
    return [program, "-p", store, "--tls", "--cacert", str(files.ca), "--sni", NAME]


@beside_the_examples
def test_redis_cli_over_tls(redis_cli: list[str]) -> None:
    commands = b"set a 'one and two'\nget a\nincr n\nget missing\n"
    done = subprocess.run(redis_cli, input=commands, capture_output=True, timeout=20, check=True)
    assert done.stdout.splitlines() == [b"OK", b"one and two", b"1", b""]


@beside_the_examples
def test_redis_cli_inserts_in_bulk_over_tls(redis_cli: list[str]) -> None:
    data = b"".join(b"*3\r\n$3\r\nSET\r\n$4\r\n%04d\r\n$100\r\n%0100d\r\n" % (key, key) for key in range(1000))
    done = subprocess.run([*redis_cli, "--pipe"], input=data, capture_output=True, timeout=20, check=True)
    assert done.stdout.splitlines()[-1] == b"errors: 0, replies: 1000"
    done = subprocess.run([*redis_cli, "get", "0999"], capture_output=True, timeout=20, check=True)
    assert done.stdout == b"%0100d\n" % 999


@beside_the_examples
def test_redis_benchmark_over_tls(files: Files, store: str, redis_cli: list[str], peer_program: Find) -> None:
    program = with_feature(peer_program("redis-benchmark"), "--help", b"--tls")
    command = [program, "-p", store, "--tls", "--cacert", str(files.ca), "--sni", NAME, "-t", "set,get,incr"]
    done = subprocess.run([*command, "-n", "4800", "-P", "16", "--csv"], capture_output=True, timeout=40, check=True)
    tests = [line.split(b",")[0].strip(b'"') for line in done.stdout.splitlines()]
    assert tests == [b"test", b"SET", b"GET", b"INCR"]
    done = subprocess.run([*redis_cli, "get", "counter:__rand_int__"], capture_output=True, timeout=20, check=True)
    assert done.stdout == b"4800\n"


# --- nginx -----------------------------------------------------------------------------------------


def test_nginx_in_front_and_behind(
    mux: muxcore.Mux, files: Files, start: Start, peer_program: Find, tmp_path: Path
) -> None:
    """nginx ends our client's TLS, and speaks TLS to our server."""
    listener = mux.listen(("127.0.0.1", 0), Http(b"body"), framer=muxcore.Delimiter(b"\r\n\r\n"), tls=files.server())
    port = free_port()
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/log;\nevents {{}}\nhttp {{ access_log off;"
        f" client_body_temp_path {tmp_path}/a; proxy_temp_path {tmp_path}/b; fastcgi_temp_path {tmp_path}/c;"
        f" uwsgi_temp_path {tmp_path}/d; scgi_temp_path {tmp_path}/e;\n"
        f" server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {files.cert}; ssl_certificate_key {files.key};\n"
        f"  location / {{ proxy_pass https://127.0.0.1:{listener.address[1]}; proxy_ssl_verify on;"
        f" proxy_ssl_trusted_certificate {files.ca}; proxy_ssl_name {NAME}; proxy_ssl_server_name on;"
        f" proxy_http_version 1.1; proxy_ssl_protocols TLSv1.2 TLSv1.3; }} }} }}\n"
    )
    options = "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "log")
    process = start(peer_program("nginx"), *options)
    until_it_listens(process, port).close()
    handler = Recorder()
    conn = mux.connect(("127.0.0.1", port), handler, tls=files.client())
    conn.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    until(mux, lambda: handler.count("close"))
    assert handler.received().endswith(b"body")
    assert handler.reason() is None


@pytest.fixture
def streams(mux: muxcore.Mux, start: Start, peer_program: Find, tmp_path: Path) -> Callable[[str], int]:
    """Start nginx with a server of its stream module; its port."""

    def run(server: str) -> int:
        nginx, module = peer_program("nginx"), Path("/usr/lib/nginx/modules/ngx_stream_module.so")
        load = f"load_module {module};" if module.exists() else ""
        if not load:
            with_feature(nginx, "-V", b"--with-stream ")
        port, pid = free_port(), tmp_path / "pid"
        (tmp_path / "nginx.conf").write_text(
            f"{load} daemon off; pid {pid}; error_log {tmp_path}/log;\nevents {{}}\n"
            f"stream {{ server {{ listen 127.0.0.1:{port}{server} }} }}\n"
        )
        process = start(nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "log"))
        until(mux, lambda: pid.exists() or process.poll() is not None)  # it listens before it writes its number
        assert process.poll() is None, ended(mux, process)
        return port

    return run


def test_nginx_is_a_client_of_our_tls(mux: muxcore.Mux, files: Files, streams: Callable[[str], int]) -> None:
    """When its own client ends, we get its close_notify."""
    server, client = Recorder(bytes.swapcase), Recorder()
    listener = mux.listen(("127.0.0.1", 0), server, tls=files.server())
    port = streams(
        f"; proxy_pass 127.0.0.1:{listener.address[1]}; proxy_ssl on; proxy_ssl_verify on; proxy_ssl_name {NAME};"
        f" proxy_ssl_server_name on; proxy_ssl_trusted_certificate {files.ca}; proxy_ssl_protocols TLSv1.2 TLSv1.3;"
    )
    conn = mux.connect(("127.0.0.1", port), client)
    data = pattern(1 << 20)
    conn.send(data)
    until(mux, lambda: len(client.received()) == len(data))
    assert client.received() == data.swapcase()
    assert server.connections[0].tls is not None
    conn.close()
    until(mux, lambda: server.count("close") and client.count("close"))
    assert (server.reason(), client.reason()) == (None, None)


def test_nginx_ends_the_tls_of_our_client(mux: muxcore.Mux, files: Files, streams: Callable[[str], int]) -> None:
    """When our server behind it, which speaks no TLS, ends, our client gets nginx's close_notify."""
    server, client = Recorder(bytes.swapcase), Recorder()
    listener = mux.listen(("127.0.0.1", 0), server)
    port = streams(
        f" ssl; ssl_certificate {files.cert}; ssl_certificate_key {files.key};"
        f" proxy_pass 127.0.0.1:{listener.address[1]};"
    )
    conn = mux.connect(("127.0.0.1", port), client, tls=files.client())
    data = pattern(1 << 20)
    conn.send(data)
    until(mux, lambda: len(client.received()) == len(data))
    assert client.received() == data.swapcase()
    assert server.connections[0].tls is None
    server.connections[0].close()
    until(mux, lambda: server.count("close") and client.count("close"))
    assert (server.reason(), client.reason()) == (None, None)


# --- STARTTLS --------------------------------------------------------------------------------------


SMTP = '''
import smtplib, ssl, sys
with smtplib.SMTP("localhost", int(sys.argv[1]), timeout=10) as smtp:
    smtp.starttls(context=ssl.create_default_context(cafile=sys.argv[2]))
    print(smtp.sendmail("a@example.org", ["b@example.org"], "Subject: hello\\r\\n\\r\\nbody"))
'''


@pytest.fixture
def mails(files: Files, mux: muxcore.Mux) -> tuple[str, list[bytes]]:
    """The port of the mail server of examples/smtpd_starttls.py, and what it delivers."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import smtpd_starttls
    finally:
        sys.path.remove(str(EXAMPLES))
    delivered: list[bytes] = []
    handler = smtpd_starttls.Smtp(files.server(), delivered.append)
    listener = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines())
    return str(listener.address[1]), delivered


@beside_the_examples
def test_smtplib_and_the_example_of_starttls(
    mux: muxcore.Mux, files: Files, start: Start, mails: tuple[str, list[bytes]]
) -> None:
    port, delivered = mails
    process = start(sys.executable, "-c", SMTP, port, str(files.ca))
    assert ended(mux, process).strip() == b"{}"
    [mail] = delivered
    assert mail.endswith(b"\nbody\n")


def swaks(peer_program: Find, port: str, *options: str) -> list[str]:
    program = with_feature(peer_program("swaks"), "--support", b"TLS supported")
    return [program, "--server", f"127.0.0.1:{port}", "--from", "a@example.org", "--to", "b@example.org", *options]


@beside_the_examples
def test_swaks_delivers_behind_starttls(
    mux: muxcore.Mux, files: Files, start: Start, peer_program: Find, mails: tuple[str, list[bytes]]
) -> None:
    port, delivered = mails
    options = ["--tls", "--tls-verify", "--tls-ca-path", str(files.ca), "--body", "hello\n.dot"]
    process = start(*swaks(peer_program, port, *options))
    output = ended(mux, process)
    assert process.returncode == 0, output
    assert b"=== TLS started with cipher TLSv1.3" in output
    assert b"<~  250 delivered" in output  # a tilde: it came encrypted
    [mail] = delivered
    assert b"\n\nhello\n.dot\n" in mail


@beside_the_examples
def test_swaks_delivers_nothing_in_plaintext(
    mux: muxcore.Mux, start: Start, peer_program: Find, mails: tuple[str, list[bytes]]
) -> None:
    port, delivered = mails
    process = start(*swaks(peer_program, port))
    assert b"<** 530 STARTTLS first" in ended(mux, process)
    assert process.returncode != 0
    assert delivered == []


@beside_the_examples
def test_swaks_delivers_nothing_if_it_does_not_know_the_authority(
    mux: muxcore.Mux, start: Start, peer_program: Find, mails: tuple[str, list[bytes]]
) -> None:
    port, delivered = mails
    process = start(*swaks(peer_program, port, "--tls", "--tls-verify"))
    assert b"certificate verify failed" in ended(mux, process)
    assert process.returncode != 0
    assert delivered == []
    until(mux, lambda: mux.stats().handshake_failures == 1)


# --- the guide -------------------------------------------------------------------------------------


GUIDE = EXAMPLES.parent / "docs" / "guides" / "tls.md"


@pytest.mark.skipif(not GUIDE.exists(), reason="the guides are not beside the tests")
def test_the_programs_of_the_guide(files: Files, start: Start, tmp_path: Path) -> None:
    programs = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    server, client, *others = programs
    for name, file in (("server.pem", files.cert), ("server.key", files.key), ("client.pem", files.ca)):
        (tmp_path / name).write_bytes(file.read_bytes())
    port = free_port()
    process = start(sys.executable, "-c", server.replace("8443", str(port)), cwd=tmp_path)
    until_it_listens(process, port).close()
    process = start(sys.executable, "-c", client.replace("8443", str(port)), cwd=tmp_path)
    assert process.communicate(timeout=20)[0] == b"hello TLSv1.3\nclosed: None\n"
    for program in others:
        compile(program, "guide", "exec")
