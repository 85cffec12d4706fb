"""Server CPU time over TLS 1.3: per echoed message, and per connection with its handshake; memory per idle connection;
how long an echo takes amid the handshakes of others.

What may live here: these tables, and the client, which is Python's own ssl on blocking sockets.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles

import trustme
from _run import (
    Goal,
    Result,
    Running,
    Server,
    Table,
    by_name,
    chosen,
    columns,
    connection,
    cpu_us,
    disturbed,
    fresh_rounds,
    goals_table,
    number,
    parser,
    pin_to,
    ratio,
    report,
    run,
    spread,
    started,
    times,
    usage,
)

CONNECTIONS, SIZES, SLICES, IDLE, CROWD = 20, (256, 1024, 65536), 3, 500, 200
HANDSHAKES = ("RSA-2048", "P-256", "resumed")
SERVERS = by_name(
    Server("muxcore", "muxcore", "tls_echo.py", ("muxcore",)),
    Server("asyncio", "asyncio", "tls_echo.py", ("asyncio",)),
    Server("uvloop", "uvloop", "tls_echo.py", ("uvloop",), needs="uvloop"),
    Server("aiofastnet", "aiofastnet on uvloop", "tls_echo.py", ("aiofastnet",), needs="uvloop and aiofastnet"),
    Server("nginx", "nginx stream ssl", "nginx_stream.py", needs="nginx"),
    Server("c", "C epoll, OpenSSL", "tls_epoll.c", needs="openssl"),
)
GOAL, HANDSHAKE_GOAL, MEMORY_GOAL, CROWD_GOAL = 0.85, 1.1, 24576, 5.0
Key = tuple[str, str]  # what is measured, server


class Keys:
    """The files of an authority's certificates, and what clients need."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.files = {}
        for kind, name in ((trustme.KeyType.RSA, "RSA-2048"), (trustme.KeyType.ECDSA, "P-256")):
            made = self.ca.issue_cert("localhost", key_type=kind)
            certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
            certificate.write_bytes(b"".join(one.bytes() for one in made.cert_chain_pems))
            made.private_key_pem.write_to_path(str(key))
            self.files[name] = (str(certificate), str(key))

    def context(self) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.ca.configure_trust(made)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        return made


def with_keys(server: Server, keys: Keys, kind: str) -> Server:
    return Server(server.name, server.title, server.file, (*server.arguments, *keys.files[kind]), server.needs)


def connected(running: Running, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
    sock = connection(running.port)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(sock, server_hostname="localhost", session=session)


def echo(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    left = len(data)
    while left:
        left -= len(sock.recv(min(left, 65536)))


def measured(running: Running, seconds: float, step: Callable[[], int]) -> Result:
    """What the server used for what `step` did, again and again; it returns how many."""
    before, start, count = usage(running.pid), time.perf_counter(), 0
    own = usage(os.getpid())
    while time.perf_counter() - start < seconds:
        count += step()
    after = usage(running.pid)
    return {
        "messages": count,
        "seconds": time.perf_counter() - start,
        "server_cpu_s": after.cpu_s - before.cpu_s,
        "server_waited_s": after.waited_s - before.waited_s,
        "load_waited_s": usage(os.getpid()).waited_s - own.waited_s,
    }


def echoes(running: Running, keys: Keys, size: int, seconds: float) -> Result:
    context, data = keys.context(), bytes(size)
    with ExitStack() as stack:
        socks = [stack.enter_context(connected(running, context)) for _ in range(CONNECTIONS)]

        def step() -> int:
            for sock in socks:
                sock.sendall(data)
            for sock in socks:
                left = size
                while left:
                    left -= len(sock.recv(65536))
            return len(socks)

        step()
        return measured(running, seconds, step)


def handshakes(running: Running, keys: Keys, kind: str, seconds: float) -> Result:
    context = keys.context()
    first = connected(running, context)
    echo(first, b"x")  # the ticket is there by then
    session = first.session if kind == "resumed" else None

    def step() -> int:
        with connected(running, context, session) as sock:
            echo(sock, bytes(256))
        return 1

    step()
    found = measured(running, seconds, step)
    first.close()
    return found


def idle_bytes(running: Running, keys: Keys) -> int:
    """Private memory of the server's process, per connection that has had one message echoed."""
    context = keys.context()
    with ExitStack() as stack:
        for _ in range(50):
            echo(stack.enter_context(connected(running, context)), bytes(256))
        before = private_bytes(running.pid)
        for _ in range(IDLE):
            echo(stack.enter_context(connected(running, context)), bytes(256))
        return (private_bytes(running.pid) - before) // IDLE


def idle(server: Server, keys: Keys) -> Result:
    """Of a server of its own: one that has worked has memory left over."""
    with started(server) as running:
        return {"bytes": idle_bytes(running, keys)}


def private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


class Newcomer:
    """A client whose work is done before its bytes leave, so that the server gets those of many at once."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self.sock = connection(port)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        self.bytes = self.outgoing.read()

    def read_on(self) -> None:
        """The server's flight. The reply to it has a message, too."""
        while True:
            self.incoming.write(self.sock.recv(65536))
            with suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
                break
        self.tls.write(b"x")
        self.bytes = self.outgoing.read()


def crowd(running: Running, keys: Keys) -> Result:
    """Echoes of one connection, while CROWD others begin their handshakes at once, and then end them at once."""
    context = keys.context()
    with connected(running, context) as mine:
        alone = [timed_ms(mine) for _ in range(200)]
        found = [one for _ in range(3) for one in amid_a_crowd(running, context, mine)]
    p99 = quantiles(found, n=100)[98]
    return {"alone_ms": median(alone), "p50_ms": median(found), "p99_ms": p99, "echoes": len(found)}


def amid_a_crowd(running: Running, context: ssl.SSLContext, mine: ssl.SSLSocket) -> list[float]:
    with ExitStack() as stack:
        newcomers = [Newcomer(running.port, context) for _ in range(CROWD)]
        for newcomer in newcomers:
            stack.enter_context(newcomer.sock)
        for _ in range(20):
            timed_ms(mine)  # all are accepted by then
        found = amid(mine, newcomers)
        for newcomer in newcomers:
            newcomer.read_on()
        return found + amid(mine, newcomers)


def amid(mine: ssl.SSLSocket, newcomers: Sequence[Newcomer]) -> list[float]:
    """Milliseconds of each echo until all the newcomers have a reply to what they send now."""
    waiting, found = select.epoll(), []
    for newcomer in newcomers:
        newcomer.sock.sendall(newcomer.bytes)
        waiting.register(newcomer.sock, select.EPOLLIN)
    while len(waiting.poll(0, len(newcomers))) < len(newcomers):
        found.append(timed_ms(mine))
    waiting.close()
    return found


def timed_ms(sock: ssl.SSLSocket) -> float:
    start = time.perf_counter()
    echo(sock, bytes(64))
    return (time.perf_counter() - start) * 1000


def kind_of(what: str) -> str:
    if what == "crowd":
        return "RSA-2048"
    return what if what in ("P-256", "RSA-2048") else "P-256"


def measure(running: Running, keys: Keys, what: str, seconds: float) -> Result:
    if what == "crowd":
        return crowd(running, keys)
    if what in HANDSHAKES:
        return handshakes(running, keys, what, seconds)
    return echoes(running, keys, int(what), seconds)


def table(text: str, results: dict[Key, list[Result]], whats: Sequence[str], unit: str) -> Table:
    bases = ("uvloop", "aiofastnet", "nginx", "c")
    ratios = (f"to {base}" for base in ("uvloop", "aiofastnet", "nginx", "C"))
    found = Table(text, ("", "server", f"CPU us/{unit}", "min-max", *ratios, "disturbed"))
    for (what, name), own in results.items():
        if what in whats:
            found.rows.append(
                (
                    f"{int(what):,} B" if what.isdigit() else what,
                    SERVERS[name].title,
                    number(median(map(cpu_us, own))),
                    spread(own),
                    *(times(ratio(own, results.get((what, base)), cpu_us)) for base in bases),
                    disturbed(own),
                )
            )
    return found


def memory_table(results: dict[Key, list[Result]]) -> Table:
    found = Table(f"Bytes per idle connection, OpenSSL's included; {IDLE} connections", ("server", "bytes"))
    for (what, name), own in results.items():
        if what == "idle":
            found.rows.append((SERVERS[name].title, number(median(one["bytes"] for one in own), 0)))
    return found


def crowd_table(results: dict[Key, list[Result]]) -> Table:
    text = f"Milliseconds of an echo of 64 B amid {CROWD} handshakes with RSA-2048 at once"
    found = Table(text, ("server", "alone", "p50", "p99", "p99 min-max", "echoes"))
    for (what, name), own in results.items():
        if what == "crowd":
            columns_of = [[one[key] for one in own] for key in ("alone_ms", "p50_ms", "p99_ms", "echoes")]
            alone, p50, p99, echoes = columns_of
            numbers = [number(median(values)) for values in (alone, p50, p99)]
            most = f"{number(min(p99))}-{number(max(p99))}"
            found.rows.append((SERVERS[name].title, *numbers, most, number(sum(echoes), 0)))
    return found


def goals(results: dict[Key, list[Result]]) -> Table:
    found = []
    for size in map(str, SIZES):
        own, base = results.get((size, "muxcore")), results.get((size, "aiofastnet"))
        found.append(Goal(f"echo of {int(size):,} B, to aiofastnet", ratio(own, base, cpu_us) if own else None, GOAL))
    for kind in HANDSHAKES:
        own, base = results.get((kind, "muxcore")), results.get((kind, "nginx"))
        named = f"connect, {kind}, echo, close, to nginx"
        found.append(Goal(named, ratio(own, base, cpu_us) if own else None, HANDSHAKE_GOAL))
    idle = results.get(("idle", "muxcore"))
    size = median(one["bytes"] for one in idle) / MEMORY_GOAL if idle else None
    found.append(Goal(f"bytes per idle connection, to {MEMORY_GOAL:,}", size, 1))
    crowds = results.get(("crowd", "muxcore"))
    late = median(one["p99_ms"] - one["alone_ms"] for one in crowds) / CROWD_GOAL if crowds else None
    found.append(Goal(f"delay of an echo amid {CROWD} handshakes (p99), to {CROWD_GOAL:g} ms", late, 1))
    return goals_table(found)


@contextmanager
def serving(servers: Sequence[Server], keys: Keys) -> Iterator[dict[Key, Running]]:
    with ExitStack() as stack:
        yield {
            (kind, server.name): stack.enter_context(started(with_keys(server, keys, kind)))
            for kind in keys.files
            for server in servers
        }


def main() -> None:
    options = parser(__doc__, list(SERVERS), 3)
    options.add_argument("--seconds", type=float, default=1.0, help="of each of a round's slices; default: %(default)s")
    args = options.parse_args()
    servers = chosen(args.only, SERVERS)
    pin_to(1)()
    whats = [*map(str, SIZES), *HANDSHAKES, "idle", "crowd"]
    keys_of = [(what, server.name) for what in whats for server in servers]
    with tempfile.TemporaryDirectory() as folder:
        keys = Keys(Path(folder))
        results = fresh_rounds(
            keys_of,
            args.rounds,
            SLICES,
            lambda: serving(servers, keys),
            lambda running, key: measure(running[kind_of(key[0]), key[1]], keys, key[0], args.seconds)
            if key[0] != "idle"
            else idle(with_keys(SERVERS[key[1]], keys, "P-256"), keys),
        )
    text = f"medians of {args.rounds * SLICES} slices of {args.seconds:g} s"
    tables = [
        table(f"Echo, {CONNECTIONS} connections; {text}", results, [*map(str, SIZES)], "message"),
        table(f"Connect, handshake, echo of 256 B, close; one at a time; {text}", results, HANDSHAKES, "connection"),
        memory_table(results),
        crowd_table(results),
        goals(results),
    ]
    raw = {f"{what}, {name}": columns(found) for (what, name), found in results.items()}
    report("tls", "TLS 1.3", tables, raw, args.keep)


if __name__ == "__main__":
    run(main)
