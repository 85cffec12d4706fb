"""What may live here: the command line as the user types it: arguments, help, and which file does the work.

Exit codes: 0, it worked; 1, it failed, and one line on stderr says why; 2, the command line makes no sense.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _echo, _info

EXAMPLES = """\
examples:
  python -m muxcore echo --port 8888    in one terminal: a server; Ctrl-C ends it
  nc 127.0.0.1 8888                     in another: type a line, and it comes back
  python -m muxcore info                which core runs here, and the limits of this machine
  python -m muxcore demo                muxcore and asyncio under the same load, side by side
  python -m muxcore bench               CPU time per message of whatever servers are installed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, except that argparse itself exits after --help and usage errors."""
    args = _parser().parse_args(argv)
    if args.command == "echo":
        return _echo.run(args.host, args.port)
    if args.command == "info":
        return _info.run()
    if args.command == "demo":
        return _run_with_extra("demo")
    return _run_with_extra("bench", file=args.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m muxcore",
        description="Serve tens of thousands of sockets from one Python thread. Try it here without writing a line.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"muxcore {_info.version()}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    text = "send everything that a client sends back to it, until Ctrl-C"
    echo = commands.add_parser(
        "echo",
        help=text,
        description=f"A TCP server: {text}.",
        epilog="example: python -m muxcore echo --port 8888; in another terminal: nc 127.0.0.1 8888",
    )
    echo.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, which is this machine only)"
    )
    echo.add_argument(
        "--port", default=8888, type=_port, help="port to listen on; 0 is a free port (default: %(default)s)"
    )

    text = "show the version, the core that runs and why, and the limits of this machine"
    commands.add_parser("info", help=text, description=f"{text.capitalize()}.")

    text = "put 1,000 connections on an echo server, check every byte, and compare with asyncio"
    commands.add_parser(
        "demo",
        help=text,
        description=f"{text.capitalize()}. Takes less than a minute, uses 127.0.0.1 only, and leaves nothing behind.",
    )

    text = "measure the CPU time of servers per message: muxcore, asyncio, uvloop, redis-server"
    bench = commands.add_parser(
        "bench",
        help=text,
        description=f"{text.capitalize()}, if they are installed. Takes a minute, and uses 127.0.0.1 only.",
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement to it")
    return parser


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= port <= 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a number from 0 to 65535")
    return port


def _run_with_extra(command: str, **options: Any) -> int:
    """Run a command that needs more than the standard library."""
    try:
        module = importlib.import_module(f"._{command}", __package__)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("psutil", "rich"):
            raise
        print(f"muxcore {command}: it needs {missing}: pip install 'muxcore[demo]'", file=sys.stderr)
        return 1
    return int(module.run(**options))
