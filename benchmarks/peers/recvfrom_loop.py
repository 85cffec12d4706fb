"""What may live here: the program of recvmmsg.c as Python can write it by hand: a blocking recvfrom per datagram."""

from __future__ import annotations

import socket
import struct

COUNTS = struct.Struct("=QQ")
SIZE = 2048


def main() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    print("listening", sock.getsockname()[1], flush=True)
    messages = size = 0
    recvfrom = sock.recvfrom
    while True:
        data, address = recvfrom(SIZE)
        if len(data) == 1:
            sock.sendto(COUNTS.pack(messages, size), address)
        else:
            messages += 1
            size += len(data)


if __name__ == "__main__":
    main()
