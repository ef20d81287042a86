"""Has fresh processes (`system/alone.py`) begin as forks of one that has done their imports, so that tests wait less.

What cannot be imported there cannot be imported in its forks. `tests/system/test_alone.py` has a process begin as users
have it, and compares what both find.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from solidify.system.alone import environment

NAMES = ("__enter__", "_run_script", "__exit__")


class Forks:
    """Stands in for the start of a process in `Alone`."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, ...], subprocess.Popen[str]] = {}

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Returns what takes the place of `Alone`'s own."""

        def enter(alone: Any) -> Any:
            alone._scratch = tempfile.TemporaryDirectory(prefix="fork-")
            alone.directory = Path(alone._scratch.name)
            return alone

        def leave(alone: Any, *_: object) -> None:
            alone._scratch.cleanup()

        return dict(zip(NAMES, (enter, lambda alone, text: self._run_script(alone, text), leave), strict=True))

    def _run_script(self, alone: Any, text: str) -> int:
        given, out, errors = (alone.directory / name for name in ("request", "out", "errors"))
        given.write_text(text)
        out.touch()
        errors.touch()
        (alone.directory / "work").mkdir()
        job = {
            "script": str(alone.script),
            "streams": [str(given), str(out), str(errors)],
            "directory": str(alone.directory / "work"),
            "environment": environment(alone.directory),
        }
        return self._run(alone.arguments, job)

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
