"""What may live here: programs that are peers over TLS: their certificates, their starts, what they write."""

from __future__ import annotations

import os
import select
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import until

import muxcore

trustme = pytest.importorskip("trustme")
NAME = "localhost"
Start = Callable[..., subprocess.Popen[bytes]]
Find = Callable[[str], str]


class Files:
    """Certificates as files, which programs read."""

    def __init__(self, folder: Path) -> None:
        ca = trustme.CA()
        self.ca = folder / "ca.pem"
        ca.cert_pem.write_to_path(str(self.ca))
        self.cert, self.key = self.issue(ca, folder, trustme.KeyType.ECDSA)
        self.rsa_cert, self.rsa_key = self.issue(ca, folder, trustme.KeyType.RSA)

    def issue(self, ca: Any, folder: Path, kind: Any) -> tuple[Path, Path]:
        issued = ca.issue_cert(NAME, "127.0.0.1", key_type=kind)
        cert, key = folder / f"{kind.name}.pem", folder / f"{kind.name}-key.pem"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        return context

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))

    def options(self) -> tuple[str, ...]:
        """Those of the examples."""
        return "--cert", str(self.cert), "--key", str(self.key)


@contextmanager
def starter() -> Iterator[Start]:
    """Starts programs, and ends those that are left."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(*command: str, **options: object) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
        processes.append(process)
        return process  # type: ignore[no-any-return]

    yield run
    for process in processes:
        process.terminate()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def ended(mux: muxcore.Mux, process: subprocess.Popen[bytes]) -> bytes:
    """What a program has written, when it is done."""
    until(mux, lambda: process.poll() is not None)
    output, _ = process.communicate()
    return output


def with_feature(program: str, option: str, sign: bytes) -> str:
    """The program, if what it says of itself has the sign of a feature; as the fixture peer_program does."""
    done = subprocess.run([program, option], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if sign not in done.stdout:
        missing = pytest.fail if os.environ.get("MUXCORE_REQUIRE_PEERS") == "1" else pytest.skip
        missing(f"{program} {option} does not show {sign.decode()}")
    return program


def tell(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


def shown(mux: muxcore.Mux, process: subprocess.Popen[bytes], wanted: bytes) -> None:
    """Wait until a program writes it."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    output = b""
    while wanted not in output:
        until(mux, lambda: select.select([process.stdout], [], [], 0)[0])
        data = process.stdout.read()
        assert data, output
        output += data
    os.set_blocking(process.stdout.fileno(), True)


def gnutls_cli(
    peer_program: Find, files: Files, listener: muxcore.Listener, offer: str = "NORMAL", name: str = NAME,
    ca: Path | None = None,
) -> list[str]:  # fmt: skip
    """The command line of gnutls-cli, with an offer (a priority string)."""
    about = ["--x509cafile", str(ca or files.ca), "--sni-hostname", NAME, "--verify-hostname", name]
    return [peer_program("gnutls-cli"), *about, "--priority", offer, "-p", str(listener.address[1]), "127.0.0.1"]
