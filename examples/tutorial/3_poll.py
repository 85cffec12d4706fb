"""Step 3: the same on poll(), and what send() did not accept is kept for later. `3_poll.py [PORT]`"""

from __future__ import annotations

import select
import signal
import socket
import sys

clients: dict[int, socket.socket] = {}  # poll() speaks of descriptors
outputs: dict[int, bytearray] = {}  # bytes that a client has still to get
at_eof: set[int] = set()  # clients that will send nothing more


def serve(port: int) -> None:
    poller = select.poll()
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        poller.register(listener, select.POLLIN)
        print("listening", listener.getsockname()[1], flush=True)
        while True:
            for fd, events in poller.poll():
                if fd == listener.fileno():
                    accept(poller, listener)
                else:
                    turn(poller, fd, events)


def accept(poller: select.poll, listener: socket.socket) -> None:
    try:
        sock, _ = listener.accept()
    except (BlockingIOError, ConnectionError):
        return  # it left before we came
    sock.setblocking(False)
    clients[sock.fileno()] = sock
    outputs[sock.fileno()] = bytearray()
    poller.register(sock, select.POLLIN)


def turn(poller: select.poll, fd: int, events: int) -> None:
    try:
        if fd not in at_eof and events & ~select.POLLOUT:  # POLLERR and POLLHUP, too: recv() raises the error
            read(fd)
        if events & ~select.POLLIN:
            write(fd)
    except BlockingIOError:
        pass  # readiness was a hint: there is nothing to be done after all
    except ConnectionError:
        close(poller, fd)
        return
    if fd in at_eof and not outputs[fd]:  # closed only after the last byte went
        close(poller, fd)
        return
    reading = 0 if fd in at_eof else select.POLLIN
    writing = select.POLLOUT if outputs[fd] else 0
    poller.modify(fd, reading | writing)


def read(fd: int) -> None:
    if data := clients[fd].recv(65536):
        outputs[fd] += data
    else:
        at_eof.add(fd)


def write(fd: int) -> None:
    sent = clients[fd].send(outputs[fd])
    del outputs[fd][:sent]  # the rest waits for the next POLLOUT


def close(poller: select.poll, fd: int) -> None:
    poller.unregister(fd)
    at_eof.discard(fd)
    del outputs[fd]
    clients.pop(fd).close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as SIGTERM does: at once, without a traceback
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
