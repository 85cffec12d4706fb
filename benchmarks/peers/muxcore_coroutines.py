"""What may live here: a server of coroutines over muxcore's streams, in uvloop's loop."""

from __future__ import annotations

import asyncio
import sys

import uvloop

import muxcore
import muxcore.aio

FRAMERS = {"lines": muxcore.Lines(), "length": muxcore.LengthPrefix(4)}


async def echo(stream: muxcore.aio.Stream) -> None:
    async for message in stream:
        await stream.send(message)


async def main(framer: object) -> None:
    server = await muxcore.aio.serve(echo, ("127.0.0.1", 0), framer=framer)
    print("listening", server.listener.address[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(FRAMERS[sys.argv[1]]))
