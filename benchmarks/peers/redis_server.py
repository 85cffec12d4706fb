"""What may live here: redis-server on a free port of 127.0.0.1, in memory only, one thread; this process becomes it."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress

OPTIONS = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no", "--logfile", "/dev/null")


def free_port() -> int:
    """Below the ephemeral ports, which any other client could get before Redis binds it."""
    while True:
        port = random.randrange(20000, 32768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


if __name__ == "__main__":
    port = free_port()
    print("listening", port, flush=True)  # it soon will
    os.execvp("redis-server", ["redis-server", *OPTIONS, "--port", str(port)])
