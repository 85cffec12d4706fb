"""import_time.py MODULE MS: fails if importing MODULE takes more than MS ms beyond the start of this interpreter; and,
since there are slower machines, more than 1.5 times as long as that start.

In processor time, and by the cheapest of many starts: what else a machine does is no part of it.
"""

import os
import subprocess
import sys

STARTS = 30


def start(program: str) -> float:
    _, status, usage = os.wait4(subprocess.Popen([sys.executable, "-c", program]).pid, 0)
    assert status == 0
    return (usage.ru_utime + usage.ru_stime) * 1000


module, limit = sys.argv[1], float(sys.argv[2])
bare = importing = float("inf")
for _ in range(STARTS):
    bare, importing = min(bare, start("pass")), min(importing, start(f"import {module}"))
print(f"importing {module}: {importing - bare:.1f} ms beyond the {bare:.1f} ms of the interpreter")
sys.exit(importing - bare > max(limit, 1.5 * bare))
