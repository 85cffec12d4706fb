"""What may live here: HAProxy's PROXY protocol, versions 1 and 2: the header with which a load balancer says for which
client it connects. As https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt has it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct

from ._typing import TYPE_CHECKING, NamedTuple
from ._wire import Wire
from .errors import MuxError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

__all__ = ["Proxy", "ProxyError", "header"]

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LONGEST_V1 = 107  # bytes, with CRLF
V2_HEAD = 16
LOCAL, PROXY = 0, 1
FAMILIES = {1: (socket.AF_INET, 4), 2: (socket.AF_INET6, 16)}
UNIX, UNIX_SIZE = 3, 108
CRC32C = 3  # the type of the checksum's TLV


class ProxyError(MuxError, ValueError):
    """A connection that must begin with a PROXY header has none, or a bad one; or its peer may not send one."""


class Proxy(NamedTuple):
    """The content of a PROXY header."""

    version: int
    """1 or 2."""
    source: Any
    """The client's address, as `socket.getpeername` gives it; None if no client is behind it (a health check), or
    does not know. It is `Connection.peer`, too, unless it is None."""
    destination: Any
    """The address that the client connected to, or None."""
    tlvs: tuple[tuple[int, bytes], ...] = ()
    """The extensions of version 2: (type, value), such as (0x01, ALPN) or (0x02, the host name of SNI)."""


def header(
    version: int, source: Any, destination: Any, tlvs: Iterable[tuple[int, bytes]] = (), *, checksum: bool = False
) -> bytes:
    """A PROXY header, to be written first on a connection of one's own: before its TLS, too (`Connection.start_tls`).

    version: 1 or 2.
    source, destination: the client's address, and the one that it connected to: (host, port) with numeric hosts of one
        family, or, in version 2, paths of Unix sockets. Both None: no client is behind this connection.
    tlvs: (type, value) for version 2.
    checksum: add a CRC32C (version 2).

    Raises TypeError or ValueError for a bad argument.
    """
    if version not in (1, 2) or isinstance(version, bool):
        raise ValueError(f"version must be 1 or 2, not {version!r}")
    if (source is None) != (destination is None):
        raise ValueError("source and destination must both be addresses, or both be None")
    pairs = []
    for kind, value in tlvs:
        if not isinstance(kind, int) or not isinstance(value, bytes | bytearray | memoryview):
            raise TypeError(f"tlvs must be pairs of an int and bytes, not ({kind!r}, {value!r})")
        pairs.append((kind, bytes(value)))
    if version == 1:
        if pairs or checksum:
            raise ValueError("tlvs and checksum need version 2")
        return header_v1(source, destination)
    return header_v2(source, destination, pairs, checksum)


def header_v1(source: Any, destination: Any) -> bytes:
    if source is None:
        return b"PROXY UNKNOWN\r\n"
    family, first, second = two_addresses(source, destination)
    if family == UNIX:
        raise ValueError("source: version 1 has no Unix sockets")
    hosts = f"{first[0]} {second[0]} {first[1]} {second[1]}"
    return f"PROXY TCP{4 if family == 1 else 6} {hosts}\r\n".encode("ascii")


def header_v2(source: Any, destination: Any, tlvs: list[tuple[int, bytes]], checksum: bool) -> bytes:
    body, kind, command = b"", 0, LOCAL
    if source is not None:
        family, first, second = two_addresses(source, destination)
        kind, command = family << 4 | 1, PROXY
        if family == UNIX:
            body = first.ljust(UNIX_SIZE, b"\0") + second.ljust(UNIX_SIZE, b"\0")
        else:
            body = first[0].packed + second[0].packed + struct.pack("!HH", first[1], second[1])
    for number, value in tlvs:
        if not 0 <= number <= 255 or number == CRC32C:
            raise ValueError(f"tlvs: a type must be 0 to 255 and not {CRC32C} (use checksum), not {number}")
        if len(value) > 65535:
            raise ValueError("tlvs: a value must have at most 65535 bytes")
        body += struct.pack("!BH", number, len(value)) + value
    if checksum:
        body += struct.pack("!BHI", CRC32C, 4, 0)
    if len(body) > 65535:
        raise ValueError("tlvs: they must have at most 65535 bytes together")
    data = SIGNATURE + struct.pack("!BBH", 2 << 4 | command, kind, len(body)) + body
    return data[:-4] + struct.pack("!I", crc32c(data)) if checksum else data


def two_addresses(source: Any, destination: Any) -> tuple[int, Any, Any]:
    """The family's number in version 2, and both addresses."""
    if isinstance(source, str | bytes) and isinstance(destination, str | bytes):
        paths = os.fsencode(source), os.fsencode(destination)
        if max(map(len, paths)) > UNIX_SIZE:
            raise ValueError(f"a path must have at most {UNIX_SIZE} bytes")
        return UNIX, *paths
    pairs = []
    for name, address in (("source", source), ("destination", destination)):
        if not isinstance(address, tuple) or len(address) not in (2, 4):
            raise TypeError(f"{name} must be (host, port), a path or None, not {address!r}")
        host, port = ipaddress.ip_address(address[0].partition("%")[0]), address[1]
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ValueError(f"{name}: the port must be 0 to 65535, not {port!r}")
        pairs.append((host, port))
    if pairs[0][0].version != pairs[1][0].version:
        raise ValueError("source and destination must be of one family")
    return 1 if pairs[0][0].version == 4 else 2, pairs[0], pairs[1]


# --- receiving -------------------------------------------------------------------------------------


class Networks:
    """Which peers may send a header."""

    def __init__(self, value: object) -> None:
        if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
            raise TypeError(f"proxy_protocol must be a list of networks, such as ['10.0.0.0/8'], not {value!r}")
        self.unix: bool = False
        self.networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for one in value:
            if one == "unix":
                self.unix = True
                continue
            if not isinstance(one, str | ipaddress.IPv4Network | ipaddress.IPv6Network):
                raise TypeError(f"proxy_protocol: a network must be a str such as '10.0.0.0/8', or 'unix', not {one!r}")
            try:
                self.networks.append(ipaddress.ip_network(one))
            except ValueError as error:
                raise ValueError(f"proxy_protocol: {error}") from None
        if not self.networks and not self.unix:
            raise ValueError("proxy_protocol must name the networks of the proxies")

    def trusts(self, peer: Any) -> bool:
        if not isinstance(peer, tuple):
            return self.unix
        address = ipaddress.ip_address(peer[0].partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network or address in network for network in self.networks)


class ProxyWire(Wire):
    """Reads the header, and then lets `inner`, or the framer, have what follows it."""

    __slots__ = ("_data", "_peer", "_trusted", "_wanted")

    step = "PROXY header"
    limit_ns = 5_000_000_000
    received: list[bytes]
    plain: list[bytes]
    opened: bool
    over: bool
    proxy: Proxy | None

    def __init__(self, networks: Networks, peer: Any, inner: Wire | None) -> None:
        super().__init__()
        self.successor = inner
        self._peer = peer
        self._trusted = networks.trusts(peer)
        self._data = bytearray()  # the beginning of the header
        self._wanted = 0  # bytes of it, before which it is not complete

    def advance(self) -> None:
        if self.over:
            return
        if not self._trusted:
            raise ProxyError(f"{self._peer!r} is in none of the networks of proxy_protocol")
        while self.received:
            self._data += self.received[0]
            del self.received[0]
        if len(self._data) < self._wanted:
            return
        data = bytes(self._data)
        proxy, size = parsed(data)
        if proxy is None:
            self._wanted = size
            return
        rest, inner = data[size:], self.successor
        pieces = [rest] if rest else []
        self.proxy = proxy
        if inner is None:
            self.plain, self.received, self.opened = pieces, [], True
        else:
            inner.received, self.received = pieces, []
        self.over = True

    def eof(self) -> Exception | None:
        return ProxyError("the peer closed the connection before the end of its PROXY header")


def parsed(data: bytes) -> tuple[Proxy | None, int]:
    """The header at the front of `data`, and its size; None, and a size that it has at least, if more has to come;
    ProxyError if it is none."""
    if data[: len(SIGNATURE)] == SIGNATURE[: len(data)] and data:
        return parsed_v2(data)
    if data[:6] == b"PROXY "[: len(data)]:
        return parsed_v1(data)
    raise ProxyError(f"expected a PROXY header, not {data[:12]!r}")


def parsed_v1(data: bytes) -> tuple[Proxy | None, int]:
    end = data.find(b"\r\n", 0, LONGEST_V1)
    if end < 0:
        if len(data) >= LONGEST_V1:
            raise ProxyError(f"a PROXY header of version 1 has at most {LONGEST_V1} bytes")
        return None, len(data) + 1
    parts = data[:end].split(b" ")
    if len(parts) > 1 and parts[1] == b"UNKNOWN":
        return Proxy(1, None, None), end + 2
    kinds: dict[bytes, Any] = {b"TCP4": ipaddress.IPv4Address, b"TCP6": ipaddress.IPv6Address}
    try:
        _, kind, *hosts, source_port, port = parts
        if b"%" in b"".join(hosts):  # ipaddress has zones
            raise ValueError
        first, second = (kinds[kind](host.decode("ascii")) for host in hosts)
        proxy = Proxy(1, shown(first, port_v1(source_port)), shown(second, port_v1(port)))
    except (ValueError, KeyError):
        raise ProxyError(f"a malformed PROXY header: {data[:end]!r}") from None
    return proxy, end + 2


def port_v1(text: bytes) -> int:
    port = int(text)
    if not text.isdigit() or str(port).encode() != text or port > 65535:
        raise ValueError(text)
    return port


def shown(host: Any, port: int) -> Any:
    return (str(host), port) if host.version == 4 else (str(host), port, 0, 0)


def parsed_v2(data: bytes) -> tuple[Proxy | None, int]:
    if len(data) < V2_HEAD:
        return None, V2_HEAD
    version_command, kind, length = struct.unpack_from("!BBH", data, len(SIGNATURE))
    version, command = version_command >> 4, version_command & 15
    if version != 2 or command not in (LOCAL, PROXY):
        raise ProxyError(f"a PROXY header of version {version} with command {command}")
    family, transport = kind >> 4, kind & 15
    if family > UNIX or transport > 2:
        raise ProxyError(f"a PROXY header of address family {family} and transport {transport}")
    size = V2_HEAD + length
    if len(data) < size:
        return None, size
    body = data[V2_HEAD:size]
    source, destination, used = addresses_v2(family, body)
    tlvs = tuple(tlvs_v2(body[used:]))
    check_sum(data[:size], tlvs, V2_HEAD + used)
    if command == LOCAL or not transport:
        source = destination = None
    return Proxy(2, source, destination, tlvs), size


def addresses_v2(family: int, body: bytes) -> tuple[Any, Any, int]:
    if family == 0:
        return None, None, 0
    if family == UNIX:
        if len(body) < 2 * UNIX_SIZE:
            raise ProxyError("a PROXY header that is too short for its addresses")
        paths = (body[:UNIX_SIZE], body[UNIX_SIZE : 2 * UNIX_SIZE])
        names = [os.fsdecode(path.rstrip(b"\0")) for path in paths]
        return names[0], names[1], 2 * UNIX_SIZE
    _, width = FAMILIES[family]
    used = 2 * width + 4
    if len(body) < used:
        raise ProxyError("a PROXY header that is too short for its addresses")
    ports = struct.unpack_from("!HH", body, 2 * width)
    hosts = [ipaddress.ip_address(body[at : at + width]) for at in (0, width)]
    return shown(hosts[0], ports[0]), shown(hosts[1], ports[1]), used


def tlvs_v2(data: bytes) -> Iterable[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if len(data) - at < 3:
            raise ProxyError("a PROXY header with half an extension")
        kind, size = struct.unpack_from("!BH", data, at)
        if size > len(data) - at - 3:
            raise ProxyError("a PROXY header with an extension that is longer than the header")
        yield kind, data[at + 3 : at + 3 + size]
        at += 3 + size


def check_sum(data: bytes, tlvs: tuple[tuple[int, bytes], ...], at: int) -> None:
    """at: where the TLVs begin."""
    if sum(kind == CRC32C for kind, _ in tlvs) > 1:  # each costs milliseconds
        raise ProxyError("a PROXY header with two checksums")
    for kind, value in tlvs:
        if kind == CRC32C:
            if len(value) != 4:
                raise ProxyError("a PROXY header whose checksum is not 4 bytes")
            zeroed = data[: at + 3] + bytes(4) + data[at + 7 :]
            if struct.pack("!I", crc32c(zeroed)) != value:
                raise ProxyError("a PROXY header with a wrong checksum")
        at += 3 + len(value)


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    """Castagnoli's, as iSCSI has it; Python has no other."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ TABLE[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF
