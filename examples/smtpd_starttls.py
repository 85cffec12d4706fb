"""A mail server that receives, with STARTTLS (RFC 5321, RFC 3207): TLS in the middle of a stream.

    python examples/smtpd_starttls.py CERTIFICATE KEY [PORT]
    swaks --to you@example.org --server localhost:2525 --tls

What a client has sent behind its STARTTLS belongs to TLS, and is never delivered as a command.
"""

import ssl
import sys
from collections.abc import Callable

import muxcore


class Session:
    """What one client has said so far."""

    def __init__(self) -> None:
        self.mail: list[bytes] | None = None  # the lines of a mail, while they come


class Smtp(muxcore.Handler[Session]):
    def __init__(self, context: ssl.SSLContext, deliver: Callable[[bytes], object]) -> None:
        self.context, self.deliver = context, deliver

    def on_open(self, conn: muxcore.Connection[Session]) -> None:
        conn.data = Session()
        conn.send(b"220 muxcore\r")

    def on_message(self, conn: muxcore.Connection[Session], line: bytes) -> None:
        if conn.data.mail is not None:
            self.add_text(conn, conn.data.mail, line)
            return
        verb = line.split(b" ", 1)[0].upper()
        if verb == b"EHLO":
            conn.send(b"250-muxcore\r")
            conn.send(b"250 8BITMIME\r" if conn.tls else b"250 STARTTLS\r")
        elif verb == b"STARTTLS" and conn.tls is None:
            conn.send(b"220 go ahead\r")
            conn.data = Session()  # what was said in plaintext counts no more
            conn.start_tls(self.context)
        elif verb == b"MAIL" and conn.tls is None:
            conn.send(b"530 STARTTLS first\r")
        elif verb == b"DATA":
            conn.data.mail = []
            conn.send(b"354 end with a dot\r")
        elif verb == b"QUIT":
            conn.send(b"221 goodbye\r")
            conn.close()
        else:
            conn.send(b"250 ok\r" if verb in (b"HELO", b"MAIL", b"RCPT", b"RSET", b"NOOP") else b"502 unknown\r")

    def add_text(self, conn: muxcore.Connection[Session], mail: list[bytes], line: bytes) -> None:
        if line != b".":
            mail.append(line.removeprefix(b"."))
            return
        conn.data.mail = None
        self.deliver(b"\n".join(mail) + b"\n")
        conn.send(b"250 delivered\r")


if __name__ == "__main__":
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    port = int(sys.argv[3]) if len(sys.argv) > 3 else 2525
    muxcore.serve(Smtp(context, sys.stdout.buffer.write), ("localhost", port), framer=muxcore.Lines())
