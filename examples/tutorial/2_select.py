"""Step 2: many clients in one thread with select(), and a queue of messages for each. `2_select.py [PORT]`"""

from __future__ import annotations

import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable

message_queues: dict[socket.socket, deque[bytes]] = {}  # what each client has still to get
inputs: set[socket.socket] = set()  # clients that may still send us something


def serve(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        print("listening", listener.getsockname()[1], flush=True)
        while True:
            outputs = [sock for sock, queue in message_queues.items() if queue]
            readable, writable, _ = select.select([listener, *inputs], outputs, [])
            for sock in readable:
                if sock is listener:
                    accept(listener)
                else:
                    attempt(read, sock)
            for sock in writable:
                if sock in message_queues:  # reading may just have closed it
                    attempt(write, sock)


def accept(listener: socket.socket) -> None:
    try:
        sock, _ = listener.accept()
    except (BlockingIOError, ConnectionError):
        return  # it left before we came
    sock.setblocking(False)
    message_queues[sock] = deque()
    inputs.add(sock)


def read(sock: socket.socket) -> None:
    if data := sock.recv(65536):
        message_queues[sock].append(data)
        return
    inputs.remove(sock)  # end of file: it would be "readable" for ever
    if not message_queues[sock]:
        close(sock)


def write(sock: socket.socket) -> None:
    queue = message_queues[sock]
    # THE FAULT: send() returns how many bytes fitted, and we ignore it. The rest is lost.
    sock.send(b"".join(queue))
    queue.clear()
    if sock not in inputs:
        close(sock)


def attempt(step: Callable[[socket.socket], None], sock: socket.socket) -> None:
    """read() or write(), after which a broken connection is gone."""
    try:
        step(sock)
    except BlockingIOError:
        pass  # readiness was a hint: there is nothing to be done after all
    except ConnectionError:
        close(sock)


def close(sock: socket.socket) -> None:
    inputs.discard(sock)
    del message_queues[sock]
    sock.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as SIGTERM does: at once, without a traceback
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
