"""What may live here: a trio echo server."""

from __future__ import annotations

import signal

import trio


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:  # reads of up to 64 KiB; the stream has set TCP_NODELAY
        await stream.send_all(data)


async def main() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=4096)
        print("listening", listeners[0].socket.getsockname()[1], flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, echo, listeners)
            await anext(signals)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
