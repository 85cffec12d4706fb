"""What may live here: nginx on a free port of 127.0.0.1 that ends TLS, in one process, which this one becomes.
Behind it is an echo server in a process of its own, whose work does not count. Arguments: the files of a certificate
and of its key."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from redis_server import free_port

CONFIGURATION = """
{modules}
daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log stderr crit;
events {{ worker_connections 4096; }}
stream {{
    server {{
        listen 127.0.0.1:{port} ssl backlog=4096;
        ssl_certificate {certificate}; ssl_certificate_key {key}; ssl_protocols TLSv1.3;
        proxy_pass 127.0.0.1:{behind};
    }}
}}
"""

FOLDER = Path(__file__).parents[1] / "bin" / "nginx"
MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")  # Debian's


def with_parent() -> None:
    """End when the process that starts this one does (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    port = free_port()
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("muxcore_callback.py"))]
    echo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=with_parent)
    assert echo.stdout is not None
    modules = f"load_module {MODULE};" if MODULE.exists() else ""
    names = {"certificate": sys.argv[1], "key": sys.argv[2], "behind": echo.stdout.readline().split()[1]}
    (FOLDER / f"stream-{port}.conf").write_text(CONFIGURATION.format(modules=modules, port=port, **names))
    print("listening", port, flush=True)  # it soon will
    os.execvp("nginx", ["nginx", "-p", str(FOLDER), "-c", f"stream-{port}.conf"])
