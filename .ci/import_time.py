"""import_time.py MODULE MS: fails if importing MODULE takes more than MS ms beyond the start of this interpreter.

By the shortest of many starts: whatever else a machine does makes them longer.
"""

import subprocess
import sys
import time

STARTS = 40


def start(program: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return (time.perf_counter() - began) * 1000


module, limit = sys.argv[1], float(sys.argv[2])
pairs = [(start("pass"), start(f"import {module}")) for _ in range(STARTS)]
bare, importing = (min(times) for times in zip(*pairs, strict=True))
print(f"importing {module}: {importing - bare:.1f} ms beyond the {bare:.1f} ms of the interpreter")
sys.exit(importing - bare > limit)
