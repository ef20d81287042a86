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
        self.script, self.arguments = script, tuple(arguments)

    def __enter__(self) -> Alone:
        self._scratch = disk.temporary()
        scratch = self._scratch.__enter__()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(self.script), *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(scratch),
            cwd=scratch,
        )
        return self

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Gives the process its request and waits for its answer.

        Raises:
            ArtifactError: the process ended with an error; its last words are in the message.
        """
        code, out, err = self._exchange_text(json.dumps(request))
        if code:
            words = "\n".join(err.strip().splitlines()[-6:])
            raise ArtifactError(f"the fresh process ended with code {code}:\n{words}")
        answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return answer

    def _exchange_text(self, text: str) -> tuple[int, str, str]:
        """Gives the process its input and waits for its end; returns its code and what it wrote and said."""
        out, err = self._process.communicate(text)
        return self._process.returncode, out, err

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._scratch.__exit__(None, None, None)


def environment(scratch: Path) -> dict[str, str]:
    """Returns the environment of such a process, whose code cache is in a directory of its own."""
    return {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
