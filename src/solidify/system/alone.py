"""A fresh Python process that runs one script: what is proved there does not rest on what this process holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solidify.errors import ArtifactError
from solidify.system import disk


class Alone:
    """A fresh Python process, with a code cache of its own, that runs a script.

    The script gets `arguments`, reads a request (JSON) from its standard input, and prints the answer (JSON) last.
    """

    def __init__(self, script: Path, arguments: Sequence[str] = ()) -> None:
        self._command = [sys.executable, "-P", str(script), *arguments]

    def __enter__(self) -> Alone:
        self._scratch = disk.temporary()
        scratch = self._scratch.__enter__()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "HF_MODULES_CACHE": str(scratch / "modules"),
                "HF_HUB_OFFLINE": "1",
            },
            cwd=scratch,
        )
        return self

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Gives the process its request and waits for its answer.

        Raises:
            ArtifactError: the process ended with an error; its last words are in the message.
        """
        out, err = self._process.communicate(json.dumps(request))
        if self._process.returncode:
            words = "\n".join(err.strip().splitlines()[-6:])
            raise ArtifactError(f"the fresh process ended with code {self._process.returncode}:\n{words}")
        answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return answer

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._scratch.__exit__(None, None, None)
