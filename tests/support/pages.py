"""Runs the blocks of a document as a reader would: in a fresh directory, in their order, one namespace a page.

Python is executed; a recipe is written and planned, a part of one takes its place in the page's recipe first; a command
is given to the program. What a block says it is (`# side_path.py`) becomes that file.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import yaml
from documents import AFTER_README, STRANGERS, Block

from solidify.__main__ import main
from solidify.recipe import dry_run, schema

BINARIES = Path(sys.executable).parent
BLOCKED = "import sys; sys.modules.update(solidify=None, peft=None); exec(compile(open('{0}').read(), '{0}', 'exec'))"


class Page:
    """A document that is being followed: its directory, what its Python has defined, and the recipe so far."""

    def __init__(self, blocks: list[Block], directory: Path) -> None:
        self.blocks = blocks
        self.directory = directory
        self.module = ModuleType("page")
        self.recipe = "recipe.yaml"
        self.failures: dict[int, BaseException] = {}
        self._next = 0

    def follow(self, line: int) -> None:
        """Runs the blocks down to the one that opens at `line`, each once; raises what that one raised."""
        with self._inside():
            while self._next < len(self.blocks) and self.blocks[self._next].line <= line:
                block = self.blocks[self._next]
                self._next += 1
                try:
                    self._run(block)
                except (Exception, SystemExit) as error:
                    self.failures[block.line] = error
        if line in self.failures:
            raise self.failures[line]

    def _run(self, block: Block) -> None:
        if block.not_run is not None or block.language == "text":
            return
        text = block.as_run()
        if block.file is not None:
            (self.directory / block.file).write_text(text, encoding="utf-8")
        if block.language == "yaml":
            self._plan(text, block.file)
        elif block.language == "sh":
            _follow_commands(text, self.directory)
        elif block.language == "python" and block.file is None:
            self._execute(text, f"block_{block.line}.py", fresh=STRANGERS in block.marks)

    def _execute(self, text: str, name: str, *, fresh: bool) -> None:
        """Runs Python, from a file, so that a traceback shows it."""
        file = self.directory / name
        file.write_text(text, encoding="utf-8")
        if fresh:
            done = subprocess.run([sys.executable, "-c", BLOCKED.format(file)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            exec(compile(text, str(file), "exec"), self.module.__dict__)

    def _plan(self, text: str, file: str | None) -> None:
        """Plans the page's recipe: a whole one, or the one before with the sections that the block holds."""
        document = yaml.safe_load(text)
        assert isinstance(document, dict), "a recipe, or a part of one, is a mapping of sections"
        if file is not None:
            self.recipe = file
        elif not {"base", "surgery"} <= set(document):
            document = {**yaml.safe_load((self.directory / self.recipe).read_text()), **document}
        path = self.directory / self.recipe
        if file is None:
            path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        dry_run.plan(schema.load(path))

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Stands in the page's directory, its modules importable, and leaves no trace of them in this process."""
        before, path, argv = Path.cwd(), list(sys.path), sys.argv
        modules = set(sys.modules)
        os.chdir(self.directory)
        sys.path.insert(0, str(self.directory))
        sys.modules["page"] = self.module
        try:
            yield
        finally:
            os.chdir(before)
            sys.path[:], sys.argv = path, argv
            for name in set(sys.modules) - modules:
                if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(self.directory)):
                    del sys.modules[name]
            sys.modules.pop("page", None)


def _follow_commands(text: str, directory: Path) -> None:
    """Gives every line of a block to its program; ours runs in this process, by the function that is the command.

    Raises:
        AssertionError: commands that did not end in 0, all together.
    """
    wrong = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "solidify":
            code = _ours(words)
        else:
            path = {**os.environ, "PATH": f"{BINARIES}:{os.environ['PATH']}"}
            code = subprocess.run(line, shell=True, cwd=directory, env=path, capture_output=True).returncode
        if code:
            wrong.append(f"`{line.strip()}` ended in {code}")
    assert not wrong, "; ".join(wrong)


def _ours(words: list[str]) -> int:
    sys.argv = words
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def goes_on(blocks: list[Block]) -> bool:
    """Says whether a page goes on where the README's blocks end."""
    return any(AFTER_README in block.text for block in blocks)


def linked(source: Path, directory: Path) -> None:
    """Copies a directory; weights, which nobody writes into, become links."""

    def copy(file: str, target: str) -> None:
        (os.link if file.endswith(".safetensors") else shutil.copy2)(file, target)

    shutil.copytree(source, directory, copy_function=copy, ignore=shutil.ignore_patterns("__pycache__", "training"))
