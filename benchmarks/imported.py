"""Runs `-m MODULE` or a script after some imports, and tells `processes.py` how long those took from the very start.

python benchmarks/imported.py transformers,peft -m solidify diff A B
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import time
from pathlib import Path

_, modules, target, *given = sys.argv
for module in modules.split(","):
    importlib.import_module(module)
Path(os.environ.pop("BENCHMARK_IMPORTS")).write_text(str(time.time() - float(os.environ.pop("BENCHMARK_START"))))
if target == "-m":
    target, *given = given
    sys.argv = [target, *given]
    runpy.run_module(target, run_name="__main__", alter_sys=True)
else:
    sys.path[0] = str(Path(target).parent)
    sys.argv = [target, *given]
    runpy.run_path(target, run_name="__main__")
