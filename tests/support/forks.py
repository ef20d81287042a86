"""Has fresh processes (`system/alone.py`) begin as forks of one that has done their imports, so that tests wait less.

What cannot be imported there cannot be imported in its forks. `tests/system/test_alone.py` has a process begin as users
have it, and compares what both find.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from solidify.errors import ArtifactError

NAMES = ("__enter__", "ask", "__exit__")


class Forks:
    """Stands in for the start of a process in `Alone`."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, ...], subprocess.Popen[str]] = {}

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Returns what takes the place of `Alone`'s own."""

        def enter(alone: Any) -> Any:
            alone._scratch = tempfile.TemporaryDirectory(prefix="fork-")
            return alone

        def ask(alone: Any, request: dict[str, Any]) -> dict[str, Any]:
            return self._ask(Path(alone._scratch.name), alone._command[2:], request)

        def leave(alone: Any, *_: object) -> None:
            alone._scratch.cleanup()

        return dict(zip(NAMES, (enter, ask, leave), strict=True))

    def _ask(self, directory: Path, command: list[str], request: dict[str, Any]) -> dict[str, Any]:
        asked, answer, errors = (directory / name for name in ("request", "answer", "errors"))
        asked.write_text(json.dumps(request))
        answer.touch()
        errors.touch()
        (directory / "work").mkdir()
        own = {"HF_MODULES_CACHE": str(directory / "modules"), "HF_HUB_OFFLINE": "1"}
        job = {
            "script": command[0],
            "streams": [str(asked), str(answer), str(errors)],
            "directory": str(directory / "work"),
            "environment": {**os.environ, **own},
        }
        code = self._run(tuple(command[1:]), job)
        if code:
            words = "\n".join(errors.read_text().strip().splitlines()[-6:])
            raise ArtifactError(f"the fresh process ended with code {code}:\n{words}")
        found: dict[str, Any] = json.loads(answer.read_text().strip().splitlines()[-1])
        return found

    def _run(self, arguments: tuple[str, ...], job: dict[str, Any]) -> int:
        server = self._servers.get(arguments)
        if server is None or server.poll() is not None:
            command = [sys.executable, "-P", str(Path(__file__).with_name("forking.py")), *arguments]
            server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._servers[arguments] = server
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def close(self) -> None:
        """Ends the processes that fork."""
        for server in self._servers.values():
            server.communicate()
