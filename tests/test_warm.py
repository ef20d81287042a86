"""What stands in for a fresh process is one: nothing of ours is in it, and it ends as one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
known = ("transformers", "huggingface_hub", "peft", "trl", "accelerate", "tokenizers", "datasets", "solidify", "pico")
there = [name for name in known if name in sys.modules]
print(__name__, sys.argv[1:], sys.stdin.read(), os.getcwd(), os.environ.get("TOLD"), there)
print("heard", file=sys.stderr)
"""


def run(python: list[str], directory: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = directory / "script.py"
    path.write_text(script)
    words = [*python, str(path), "one", "two words"]
    variables = {**os.environ, **environment}
    return subprocess.run(words, input="asked", capture_output=True, text=True, env=variables, cwd=directory)


def test_it_is_as_a_process_that_starts_anew(python: list[str], tmp_path: Path) -> None:
    found = [run(words, tmp_path, SCRIPT, TOLD="so") for words in (python, [sys.executable, "-P"])]
    assert found[0].stdout == f"__main__ ['one', 'two words'] asked {tmp_path} so []\n"
    assert found[0].stderr == "heard\n"
    assert (found[0].stdout, found[0].stderr) == (found[1].stdout, found[1].stderr)


@pytest.mark.parametrize("ending", ["sys.exit(3)", "sys.exit('words')", "raise ValueError", "os.kill(os.getpid(), 9)"])
def test_it_ends_as_a_process_that_starts_anew(python: list[str], tmp_path: Path, ending: str) -> None:
    script = f"import os, sys\n{ending}\n"
    found = [run(words, tmp_path, script) for words in (python, [sys.executable, "-P"])]
    assert found[0].returncode == found[1].returncode in (3, 1, -signal.SIGKILL)
    assert found[0].stderr.splitlines()[-1:] == found[1].stderr.splitlines()[-1:]


def test_another_path_of_modules_is_obeyed(python: list[str], tmp_path: Path) -> None:
    (tmp_path / "of_mine.py").write_text("name = 'found'")
    done = run(python, tmp_path, "import of_mine; print(of_mine.name)", PYTHONPATH=str(tmp_path))
    assert done.stdout == "found\n"
