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

# What leads to files, as Python, the hub's client, torch and we read it.
_PATHS = {"PYTHONPATH", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "TORCH_HOME", "SOLIDIFY_HOME"}


class Alone:
    """A fresh Python process, with a code cache of its own, that runs a script.

    The script gets `arguments`, reads a request (JSON) from its standard input, and writes the answer (JSON) into the
    file that the request names: what the code that it loads prints, at whatever moment, is no part of it.
    """

    def __init__(self, script: Path, arguments: Sequence[str] = ()) -> None:
        self.script, self.arguments = script, tuple(arguments)

    def __enter__(self) -> Alone:
        self._scratch = disk.temporary()
        self.directory = self._scratch.__enter__()
        work = self.directory / "work"
        work.mkdir()
        # Files and no pipes: a process that the script leaves behind would keep those open.
        with open(self.directory / "out", "wb") as out, open(self.directory / "errors", "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *_list_flags(), str(self.script), *self.arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=errors,
                text=True,
                env=environment(self.directory),
                cwd=work,
            )
        return self

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Gives the process its request and waits for its answer.

        Raises:
            ArtifactError: the process ended with an error or without an answer; its last words are in the message.
        """
        answer = self.directory / "answer.json"
        code = self._run_script(json.dumps({**request, "answer": str(answer)}))
        found = _read_answer(answer) if code == 0 else None
        if found is None:
            said = (self.directory / "errors").read_text(encoding="utf-8", errors="replace")
            words = "\n".join(said.strip().splitlines()[-6:]) or "it said nothing"
            ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise ArtifactError(f"the fresh process {ended}{'' if code else ' and no answer'}:\n{words}")
        return found

    def _run_script(self, text: str) -> int:
        """Gives the process its input, waits for its end and returns its code."""
        self._process.communicate(text)
        return self._process.returncode

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._scratch.__exit__(None, None, None)


def _read_answer(path: Path) -> dict[str, Any] | None:
    """Returns what the script wrote; None where that is nothing, or no whole answer."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def environment(scratch: Path) -> dict[str, str]:
    """Returns the environment of such a process, whose code cache is in a directory of its own.

    It runs in another directory, so relative paths in variables are made absolute. To Python, an empty one among
    several is the directory that one is in.
    """
    found = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    for name in _PATHS & found.keys():
        paths = found[name].split(os.pathsep) if found[name] else []
        found[name] = os.pathsep.join(os.path.abspath(path) for path in paths if path or name == "PYTHONPATH")
    return found


def _list_flags() -> list[str]:
    """Returns the flags that isolate the process as this one is, and without its script's directory."""
    asked = {"-I": sys.flags.isolated, "-E": sys.flags.ignore_environment, "-s": sys.flags.no_user_site}
    return ["-P", *(flag for flag, given in asked.items() if given)]
