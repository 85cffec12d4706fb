"""As trustme, by the program openssl: trustme needs cryptography, which free-threaded CPython 3.13 cannot install."""

from __future__ import annotations

import atexit
import shutil
import ssl
import subprocess
from ipaddress import ip_address
from pathlib import Path
from tempfile import mkdtemp

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


def new_folder() -> Path:
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Certificate:
    def __init__(self, folder: Path) -> None:
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"

    def configure_cert(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self.cert, self.key)


class CA(Certificate):
    def __init__(self) -> None:
        super().__init__(new_folder())
        openssl("req", "-x509", *KEY, "-keyout", self.key, "-out", self.cert, "-subj", "/CN=An authority of the tests")

    def configure_trust(self, context: ssl.SSLContext) -> None:
        context.load_verify_locations(self.cert)

    def issue_cert(self, *names: str) -> Certificate:
        made = Certificate(new_folder())
        authority = "-CA", self.cert, "-CAkey", self.key
        extension = "subjectAltName=" + ",".join(f"{sort(name)}:{name}" for name in names)
        openssl("req", "-x509", *KEY, *authority, "-keyout", made.key, "-out", made.cert, "-subj", "/CN=A test",
                "-addext", extension, "-addext", "basicConstraints=critical,CA:false")
        return made


def sort(name: str) -> str:
    if "@" in name:
        return "email"
    try:
        return "IP" if ip_address(name) else ""
    except ValueError:
        return "DNS"
