"""A process that has done the imports of fresh processes, and forks one for each job; `forks.py` starts it.

Each line of its standard input is a job (JSON): the script, the directory of the fork, and the files of its three
streams. It is answered by a line with the exit code. The arguments are packages that cannot be imported.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import traceback
from typing import Any


def serve(forbidden: list[str]) -> None:
    """Imports what all scripts need, but for what is forbidden, and forks for each job."""
    for name in forbidden:
        sys.modules[name] = None  # type: ignore[assignment]  # as the scripts do
    import transformers.dynamic_module_utils
    from transformers import PreTrainedModel  # noqa: F401

    if not forbidden:
        import solidify.adapter.storage  # noqa: F401
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        fork = os.fork()
        if fork == 0:
            os._exit(_run_fork(transformers, forbidden, job))
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)


def _run_fork(transformers: Any, forbidden: list[str], job: dict[str, Any]) -> int:
    """Runs the script with a directory, an environment and a code cache of its own."""
    try:
        for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
            os.dup2(os.open(job["streams"][number], flags), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["directory"])
        for holder in (transformers.utils.hub, transformers.utils, transformers.dynamic_module_utils):
            holder.HF_MODULES_CACHE = job["environment"]["HF_MODULES_CACHE"]
        sys.argv = [job["script"], *forbidden]
        runpy.run_path(job["script"], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve(sys.argv[1:])
