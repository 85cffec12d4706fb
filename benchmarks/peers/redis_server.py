"""What may live here: redis-server on a free port of 127.0.0.1, in memory only, one thread; this process becomes it."""

from __future__ import annotations

import os
import socket

OPTIONS = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no", "--logfile", "/dev/null")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    port = free_port()
    print("listening", port, flush=True)  # it soon will
    os.execvp("redis-server", ["redis-server", *OPTIONS, "--port", str(port)])
