"""What may live here: `python -m muxcore info`: what is installed, what runs, and what this machine allows."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

from .._config import Limits, Timeouts
from .._impl import Connection, Mux, core, why

try:
    import resource
except ImportError:  # not Unix: such a limit is unknown there
    pass

SYSCTL = Path("/proc/sys/net")


def run() -> int:
    """Print one `name: value` line each; returns the exit code."""
    with Mux() as mux:
        backend = mux.backend
    lines = {
        "muxcore": version(),
        "core": core,
        "why": why,
        "file": sys.modules[Connection.__module__].__file__ or "",
        "backend": backend,
        "python": f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "open files": _open_files(),
        "somaxconn": f"{_sysctl('core/somaxconn')} (the longest backlog that the kernel grants)",
        "local ports": f"{_sysctl('ipv4/ip_local_port_range')} (for connections going out)",
        "Limits": _defaults(Limits()),
        "Timeouts": _defaults(Timeouts()),
    }
    for name, value in lines.items():
        print(f"{name + ':':<12} {value}")
    return 0


def version(distribution: str = "muxcore") -> str:
    """The version that is installed; the one source of ours is pyproject.toml."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _open_files() -> str:
    try:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    except NameError:
        return "unknown"
    soft, hard = ("unlimited" if limit == resource.RLIM_INFINITY else f"{limit}" for limit in limits)
    return f"{soft}, can be raised to {hard} (RLIMIT_NOFILE; one per connection)"


def _sysctl(name: str) -> str:
    try:
        return "-".join((SYSCTL / name).read_text().split())
    except OSError:
        return "unknown"


def _defaults(settings: Limits | Timeouts) -> str:
    return repr(settings).partition("(")[2].removesuffix(")")
