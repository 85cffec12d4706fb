"""What may live here: clients that all begin a TLS handshake at once: the port, their number, and the authority's file.

It prints "connected", waits for a line, and ends when the last handshake is done.
"""

from __future__ import annotations

import os
import selectors
import socket
import ssl
import sys


def main(port: int, count: int, authority: str) -> None:
    os.nice(19)  # it must not delay the client whose round trips are measured
    context = ssl.create_default_context(cafile=authority)
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    print("connected", flush=True)
    sys.stdin.readline()
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            sock.setblocking(False)
            made = context.wrap_socket(sock, server_hostname="localhost", do_handshake_on_connect=False)
            selector.register(made, selectors.EVENT_READ)
            step(made)
        left = count
        while left:
            for key, _ in selector.select():
                assert isinstance(key.fileobj, ssl.SSLSocket)
                if step(key.fileobj):
                    selector.unregister(key.fileobj)
                    left -= 1


def step(sock: ssl.SSLSocket) -> bool:
    """Whether its handshake is done."""
    try:
        sock.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
