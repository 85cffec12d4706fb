"""examples/httpd.py: curl, wrk and requests, and what a client can do wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE, EXAMPLES, about_examples, example, free_port, pattern, receive, until_it_listens

import muxcore

requests = pytest.importorskip("requests")
pytest.importorskip("httptools")
pytestmark = about_examples
Find = Callable[[str], str]
CHUNKED = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
WRK = """
init = function(args) requests = string.rep(wrk.format("GET", "/"), 16) end
request = function() return requests end
response = function(status, headers, body)
  if status ~= 200 or body ~= "Hello, World!" then wrk.thread:stop() error("wrong reply") end
end
"""


@pytest.fixture
def port() -> Iterator[int]:
    with example("httpd.py") as port:
        yield port


def replies_to(port: int, request: bytes) -> bytes:
    """All that comes up to the server's FIN."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
        sock.sendall(request)
        with sock.makefile("rb") as replies:
            return replies.read()


def statuses(replies: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", replies)]


def test_requests_gets_text_and_json_over_one_connection(backend: str) -> None:
    with example("httpd.py", backend=backend) as port, requests.Session() as session:
        url = f"http://127.0.0.1:{port}"
        for _ in range(3):
            reply = session.get(url)
            assert (reply.status_code, reply.text) == (200, "Hello, World!")
            assert reply.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert session.get(f"{url}/json?query").json() == {"message": "Hello, World!"}
        pools = session.get_adapter(url).poolmanager.pools
        [pool] = [pools[key] for key in pools.keys()]  # noqa: SIM118 -- it is no mapping
        assert (pool.num_connections, pool.num_requests) == (1, 6)
        pool.close()  # we hold the last reference to it, and the server waits until it is closed


def test_requests_posts_with_a_length_and_in_chunks(port: int) -> None:
    data, url = pattern(1 << 20), f"http://127.0.0.1:{port}/echo"
    with requests.Session() as session:
        assert session.post(url, data).content == data
        pieces = (data[at : at + 10_000] for at in range(0, len(data), 10_000))
        assert session.post(url, pieces).content == data
        assert session.post(url).content == b""


def test_what_is_not_there_or_not_allowed(port: int) -> None:
    with requests.Session() as session:
        assert session.get(f"http://127.0.0.1:{port}/no").status_code == 404
        reply = session.post(f"http://127.0.0.1:{port}/json", b"{}")
        assert (reply.status_code, reply.headers["Allow"]) == (405, "GET, HEAD")
        reply = session.head(f"http://127.0.0.1:{port}/")
        assert (reply.status_code, reply.headers["Content-Length"], reply.content) == (200, "13", b"")
        assert session.get(f"http://127.0.0.1:{port}/").text == "Hello, World!", "the connection is still in step"


def test_curl_waits_for_100_continue(port: int, peer_program: Find, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(pattern(1 << 20))
    command = [peer_program("curl"), "-sS", "-v", "-H", "Expect: 100-continue", "--expect100-timeout", "30"]
    command += ["--data-binary", f"@{body}", f"http://127.0.0.1:{port}/echo"]
    done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    assert done.stdout == body.read_bytes()
    assert b"HTTP/1.1 100 Continue" in done.stderr


def test_expect_100_continue_behind_another_request_gets_100(port: int) -> None:
    post = b"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock, sock.makefile("rb") as replies:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + post)
        while not replies.readline().endswith(b"HTTP/1.1 100 Continue\r\n"):  # the body before it has no line end
            pass
        sock.sendall(b"hi")
        sock.shutdown(socket.SHUT_WR)
        assert replies.read().endswith(b"\r\n\r\nhi")


def test_curl_is_refused_a_large_body_before_it_sends_it(port: int, peer_program: Find, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(bytes((1 << 20) + 1))
    command = [peer_program("curl"), "-sS", "-w", "%{http_code} %{size_upload}", "--expect100-timeout", "30"]
    command += ["-H", "Expect: 100-continue", "-T", str(body), f"http://127.0.0.1:{port}/echo"]
    done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    assert done.stdout.splitlines()[-1] == b"413 0"


def test_curl_requests_http_2_and_gets_1(port: int, peer_program: Find) -> None:
    command = [peer_program("curl"), "-sS", "--http2", "-w", " %{http_version}", f"http://127.0.0.1:{port}/"]
    assert subprocess.run(command, capture_output=True, timeout=20, check=True).stdout == b"Hello, World! 1.1"


@pytest.mark.parametrize("depth", [1, 16])
def test_wrk_gets_only_right_replies(port: int, peer_program: Find, tmp_path: Path, depth: int) -> None:
    script = tmp_path / "check.lua"
    script.write_text(WRK.replace("16", str(depth)))
    command = [peer_program("wrk"), "-t1", "-c20", "-d1s", "-s", str(script), f"http://127.0.0.1:{port}/"]
    done = subprocess.run(command, capture_output=True, timeout=30, check=True, text=True)
    assert "wrong reply" not in done.stderr
    assert "Socket errors" not in done.stdout
    assert "Non-2xx" not in done.stdout
    found = re.search(r"(\d+) requests in", done.stdout)
    assert found is not None
    assert int(found[1]) > 100


def test_requests_before_connection_close_get_replies_and_none_behind_it(port: int) -> None:
    one, last = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /json HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    replies = replies_to(port, one * 1000 + last + one)
    assert statuses(replies) == [200] * 1001
    assert json.loads(replies.rpartition(b"\r\n\r\n")[2]) == {"message": "Hello, World!"}


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        (b"\x16\x03\x01 this is TLS\r\n\r\n", [400]),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\nwhat?\r\n\r\n", [200, 400]),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", [400]),
        (b"GET / HTTP/1.1\r\nCookie: " + b"x" * 200_000, [431]),
        (b"GET /" + b"x" * 200_000, [431]),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000, [431]),
        (b"\r\n" * 100_000, [431]),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n", [413]),
        (CHUNKED + b"100001\r\n" + bytes(0x100001) + b"\r\n", [413]),
        (b"GET / HTTP/1.0\r\n\r\n", [200]),
        (b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", [200]),  # or ab would wait for us to say so, too
    ],
    ids=lambda value: repr(value[:40]) + "..." if isinstance(value, bytes) else "",
)
def test_a_bad_request_gets_an_error_and_ends_the_connection(port: int, request_: bytes, wanted: list[int]) -> None:
    assert statuses(replies_to(port, request_)) == wanted


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        (b"GET http://a/json?query HTTP/1.1\r\nHost: a\r\n\r\n", [200]),
        (b"GET HTTP://a HTTP/1.1\r\nHost: a\r\n\r\n", [200]),
        (b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", [404]),
        (b"GET / HTTP/1.1\r\n\r\n", [400]),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", [400]),
        (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", [400]),
        (b"POST /echo HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi", [200]),
    ],
    ids=lambda value: repr(value[:40]) + "..." if isinstance(value, bytes) else "",
)
def test_requests_get_the_replies_that_rfc_9112_requires(port: int, request_: bytes, wanted: list[int]) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
        sock.sendall(request_)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as replies:
            assert statuses(replies.read()) == wanted


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
        b"GET /json HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
    ],
)
def test_a_reply_says_so_if_it_is_the_last(port: int, head: bytes) -> None:
    """A proxy that keeps connections would send another request, into a connection that closes."""
    reply, _, body = replies_to(port, head).partition(b"\r\n\r\n")
    assert reply.split(b"\r\n")[:2] == [b"HTTP/1.1 200 OK", b"Connection: close"]
    assert b"Hello, World!" in body


def test_a_refused_client_that_goes_on_sending_is_cut_off(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
        sock.sendall(b"what?\r\n\r\n")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                sock.sendall(bytes(1 << 16))


@pytest.mark.parametrize("start", [b"0\r\nX: ", b"3;x="], ids=["trailer", "extension of a chunk"])
def test_an_endless_trailer_is_refused(port: int, start: bytes) -> None:
    assert statuses(replies_to(port, CHUNKED + b"3\r\nabc\r\n" + start + b"x" * 200_000)) == [431]


def test_ab_is_served_behind_haproxy(port: int, peer_program: Find, tmp_path: Path) -> None:
    """HAProxy keeps connections to the server that the client, whose requests are HTTP/1.0, wants kept."""
    front, config = free_port(), tmp_path / "haproxy.cfg"
    config.write_text(
        "global\n  maxconn 100\n"
        "defaults\n  mode http\n  timeout connect 5s\n  timeout client 20s\n  timeout server 20s\n"
        f"frontend front\n  bind 127.0.0.1:{front}\n  default_backend back\n"
        f"backend back\n  server one 127.0.0.1:{port}\n"
    )
    request = b"GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n"

    def statuses_of_replies(sock: socket.socket) -> Iterator[bytes]:
        with sock.makefile("rb") as lines:
            for _ in range(100):
                sock.sendall(request)
                status, *head = iter(lines.readline, b"\r\n")
                [length] = [int(line.split()[1]) for line in head if line.lower().startswith(b"content-length:")]
                assert lines.read(length) == b"Hello, World!"
                yield status.split()[1]

    process = subprocess.Popen([peer_program("haproxy"), "-f", config], stderr=subprocess.PIPE)
    try:
        until_it_listens(process, front).close()
        with socket.create_connection(("127.0.0.1", front), timeout=DEADLINE) as sock:
            assert list(statuses_of_replies(sock)) == [b"200"] * 100
    finally:
        process.kill()
        process.communicate()


def module() -> Any:
    spec = importlib.util.spec_from_file_location("httpd", EXAMPLES / "httpd.py")
    assert spec is not None
    assert spec.loader is not None
    httpd = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(httpd)
    return httpd


def test_a_client_that_sends_a_byte_now_and_then_gets_a_timeout_reply(mux: muxcore.Mux) -> None:
    """Slowloris; each byte keeps the connection from being idle, none gets the request more time."""
    httpd = module()
    httpd.REQUEST_TIMEOUT = 0.3
    listener = mux.listen(("127.0.0.1", 0), httpd.Server(httpd.Site()))
    with socket.create_connection(listener.address) as sock:

        def drip() -> None:
            try:
                sock.send(b"\n")  # empty lines before a request are none of it, too
            except OSError:
                return  # it is over
            mux.call_later(0.02, drip)

        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\r")
        drip()
        assert statuses(receive(mux, sock)) == [200, 408]
