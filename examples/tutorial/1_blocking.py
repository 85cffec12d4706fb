"""Step 1: a blocking echo server: a second client waits until the first leaves. `1_blocking.py [PORT]`"""

from __future__ import annotations

import signal
import socket
import sys


def serve(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener:
        print("listening", listener.getsockname()[1], flush=True)
        while True:
            sock, _ = listener.accept()
            with sock:
                echo(sock)  # THE FAULT: no other client is served before this returns


def echo(sock: socket.socket) -> None:
    try:
        while data := sock.recv(65536):
            sock.sendall(data)
    except ConnectionError:
        pass  # this client is gone; the next one is waiting


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as SIGTERM does: at once, without a traceback
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
