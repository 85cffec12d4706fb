"""A WebSocket echo: wsproto parses the bytes that muxcore receives. `websocket_echo.py [--port PORT]`

Text and binary messages, whole or in fragments, go back as they came; a ping gets its pong, a close its close, and a
message of more than a megabyte ends the connection with code 1009. There is no compression: how large a message is
would show only once it is in memory.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Event, Message, Ping, RejectConnection, Request
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import RemoteProtocolError

import muxcore

MAX_MESSAGE = 1024 * 1024


@dataclass(slots=True)
class Peer:
    socket: WSConnection = field(default_factory=lambda: WSConnection(ConnectionType.SERVER))
    size: int = 0  # of the message that is coming


class Echo(muxcore.Handler):
    def on_open(self, conn: muxcore.Connection) -> None:
        conn.data = Peer()

    def on_message(self, conn: muxcore.Connection, data: bytes) -> None:
        peer: Peer = conn.data
        try:
            peer.socket.receive_data(data)
            for event in peer.socket.events():
                conn.send(b"".join(map(peer.socket.send, self.answers(peer, event))))
                if isinstance(event, CloseConnection) or peer.size > MAX_MESSAGE:
                    conn.close()  # after what was sent
                    break
        except (RemoteProtocolError, UnicodeError) as error:  # the latter: a header that is not ASCII
            hint = getattr(error, "event_hint", RejectConnection())
            if hint is not None:
                conn.send(peer.socket.send(hint))
            conn.close()

    def answers(self, peer: Peer, event: Event) -> list[Event]:
        match event:
            case Request():
                return [AcceptConnection()]
            case Message():  # or a part of one
                peer.size += len(event.data)
                if peer.size > MAX_MESSAGE:
                    return [CloseConnection(code=CloseReason.MESSAGE_TOO_BIG)]
                if event.message_finished:
                    peer.size = 0
                return [type(event)(data=event.data, message_finished=event.message_finished)]
            case Ping() | CloseConnection():
                return [event.response()]
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description="a WebSocket echo")
    parser.add_argument("--port", type=int, default=0)
    muxcore.serve(
        Echo(),
        ("127.0.0.1", parser.parse_args().port),
        timeouts=muxcore.Timeouts(idle=120.0, write=30.0),  # clients send a ping from time to time
        ready=lambda mux, listener: print("listening", listener.address[1], flush=True),
    )


if __name__ == "__main__":
    main()
