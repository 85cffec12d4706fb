"""What may live here: nginx on a free port of 127.0.0.1 that replies to every request itself, in one process; this
process becomes it."""

from __future__ import annotations

import os
from pathlib import Path

from redis_server import free_port

CONFIGURATION = """
daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{
    access_log off; keepalive_requests 1000000000;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp; scgi_temp_path temp;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{ default_type "text/plain; charset=utf-8"; return 200 "Hello, World!"; }}
    }}
}}
"""

FOLDER = Path(__file__).parents[1] / "bin" / "nginx"

if __name__ == "__main__":
    port = free_port()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "nginx.conf").write_text(CONFIGURATION.format(port=port))
    print("listening", port, flush=True)  # it soon will
    os.execvp("nginx", ["nginx", "-p", str(FOLDER), "-c", "nginx.conf"])
