"""What may live here: asyncio streams that echo messages one by one, `lines|length` on the command line, or `chunks` as
they come. `main` also serves uvloop."""

from __future__ import annotations

import asyncio
import signal
import sys

RECV_SIZE = 65536


async def echo_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(RECV_SIZE):
        writer.write(data)
        await writer.drain()
    writer.close()


async def echo_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()


async def echo_lengths(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            header = await reader.readexactly(4)
            writer.write(header + await reader.readexactly(int.from_bytes(header)))
            await writer.drain()
    except asyncio.IncompleteReadError:
        writer.close()


async def main() -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    echo = {"chunks": echo_chunks, "lines": echo_lines, "length": echo_lengths}[sys.argv[1]]
    server = await asyncio.start_server(echo, "127.0.0.1", 0, backlog=4096)
    print("listening", server.sockets[0].getsockname()[1], flush=True)
    await stopped.wait()


if __name__ == "__main__":
    asyncio.run(main())
