"""Two threads write one output: `make sanitize-thread` runs this first, to see that races are found.

Exits with 0 when the child process that races ends with the sanitizer's status, and its report names pared.
"""

from __future__ import annotations

import subprocess
import sys

RACE = """
import threading
import numpy as np
from pared import _core, ops

w = ops.CSR.from_dense(np.ones((64, 64), np.float32)).packed
x = np.ones((300, 64), np.float32)
out = np.empty((300, 64), np.float32)
def run():
    for _ in range(20):
        _core.linear(x, w, None, None, out)

threads = [threading.Thread(target=run) for _ in range(2)]
for t in threads: t.start()
for t in threads: t.join()
"""

run = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, check=False)
if run.returncode != 66 or "data race" not in run.stderr or "pared::" not in run.stderr:
    sys.exit(f"a planted race was not reported; status {run.returncode}, {run.stderr!r}")
