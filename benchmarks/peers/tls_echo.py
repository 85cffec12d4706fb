"""What may live here: an echo server over TLS, of the loop that the command line names: muxcore, asyncio, uvloop,
aiofastnet (on uvloop). Then: the file of a certificate, and of its key.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
from functools import partial

from asyncio_protocol import Echo
from muxcore_callback import Echo as MuxEcho
from muxcore_callback import ready

import muxcore


def context(certificate: str, key: str) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(certificate, key)
    return made


def main(kind: str, tls: ssl.SSLContext) -> None:
    if kind == "muxcore":
        muxcore.serve(MuxEcho(), ("127.0.0.1", 0), ready=ready, tls=tls)
        return
    loop: asyncio.AbstractEventLoop
    if kind == "asyncio":
        loop = asyncio.new_event_loop()
        create = loop.create_server
    else:
        import uvloop

        loop = uvloop.new_event_loop()
        create = loop.create_server
        if kind == "aiofastnet":
            import aiofastnet

            create = partial(aiofastnet.create_server, loop)
    loop.add_signal_handler(signal.SIGTERM, loop.stop)
    server = loop.run_until_complete(create(Echo, "127.0.0.1", 0, backlog=4096, ssl=tls))
    print("listening", server.sockets[0].getsockname()[1], flush=True)
    loop.run_forever()


if __name__ == "__main__":
    main(sys.argv[1], context(*sys.argv[2:4]))
