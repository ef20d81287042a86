"""The documents as tests read them: fenced blocks, in order, and the marks that stand right above them.

A block is run as it stands, unless a comment above it says otherwise:

    <!-- not run: needs a download -->                      one of REASONS
    <!-- run with: builtin:tiny-olmoe for owner/model -->   one text in place of another
    <!-- run: where solidify cannot be imported -->         Python in a fresh process
    <!-- needs: bitsandbytes -->                            a package without which it is left out, where it is missing
    <!-- file: rows.jsonl -->                               a file to write; so is a block whose first line is `# NAME`
    <!-- quick -->                                          `make test` runs it, and none of the page behind it

Notebooks are documents too: their cells of text, and of code as blocks. A translation has the blocks of the original.
"""

from __future__ import annotations

import ast
import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import notebooks
import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")])
TRANSLATIONS = {"README.zh-CN.md": "README.md", "tutorial.zh-CN.ipynb": "tutorial.ipynb"}
REASONS = ("needs a download", "needs an accelerator", "needs several machines", "needs a server", "takes minutes")
LANGUAGES = ("json", "python", "sh", "text", "yaml")  # text is shown, not run: what a program prints, a tree
STRANGERS = "run: where solidify cannot be imported"
AFTER_README = "# in the directory of the README's blocks"
QUICK = "quick"
MARKS = ("file:", "needs:", "not run:", "run with:", QUICK, STRANGERS)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it opens (a line's number), its language, what it says, and the marks above it."""

    document: str
    line: int
    language: str
    text: str
    marks: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def case(self) -> str:
        """Returns what its test is called; by that `slow.py` chooses."""
        return f"{self.document}:{QUICK}:{self.line}" if QUICK in self.marks else self.place

    @property
    def not_run(self) -> str | None:
        """The reason for which it is not run."""
        return self._marked("not run:")

    @property
    def needs(self) -> str | None:
        """The package that it needs."""
        return self._marked("needs:")

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        named = re.match(r"# ([\w.-]+\.(?:py|yaml|jsonl))\n", self.text)
        return named[1] if named else self._marked("file:")

    def as_run(self) -> str:
        """Returns the text with what stands in for what cannot be had here."""
        text = self.text
        for pair in filter(None, (self._marked("run with:") or "").split(", ")):
            there, here = pair.split(" for ")
            assert here in text, f"{self.place}: nothing to put {there!r} in the place of, {here!r} is not in the block"
            text = text.replace(here, there)
        return text

    def _marked(self, kind: str) -> str | None:
        return next((mark.removeprefix(kind).strip() for mark in self.marks if mark.startswith(kind)), None)


def blocks(text: str, document: str) -> list[Block]:
    """Reads all fenced blocks of a document."""
    found: list[Block] = []
    lines = text.splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        fence = re.match(r"\s*(```+|~~~+)\s*(.*)", line)
        if not fence:
            continue
        if opened is None:
            opened, language = number, fence[2].strip()
            continue
        content = "".join(f"{each}\n" for each in lines[opened + 1 : number])
        found.append(Block(document, opened + 1, language, content, _marks_above(lines, opened)))
        opened = None
    assert opened is None, f"{document}: the block of line {opened} is not closed"
    return found


def _marks_above(lines: list[str], number: int) -> tuple[str, ...]:
    """Returns the comments right above a line that say how a block is run."""
    marks: list[str] = []
    while number and (comment := re.fullmatch(r"\s*<!--\s*(.*?)\s*-->\s*", lines[number - 1])):
        marks.insert(0, comment[1])
        number -= 1
    return tuple(marks)


def faults(block: Block) -> list[str]:
    """Returns what is wrong with a block's language and marks; nothing if it is run, or says why not."""
    wrong = []
    if block.language not in LANGUAGES:
        wrong.append(f"{block.place}: the language is {block.language!r}; known: {', '.join(LANGUAGES)}")
    if block.not_run is not None and block.not_run not in REASONS:
        wrong.append(f"{block.place}: {block.not_run!r} is no reason not to be run; known: {', '.join(REASONS)}")
    wrong += [f"{block.place}: unknown mark {mark!r}" for mark in block.marks if not mark.startswith(MARKS)]
    if block.language == "json" and block.file is None and block.not_run is None:
        wrong.append(f"{block.place}: JSON is not run; say which file it is, or mark it as text")
    if block.language == "text" and _is_code(block.text):
        wrong.append(f"{block.place}: this text is code; name its language, so that it is run")
    return wrong


def _is_code(text: str) -> bool:
    """Says whether a text would run: a command, a recipe's section, or a statement of Python that is no bare value."""
    if re.search(r"^\s*(?:\$ )?(?:solidify|python\d?|make|pip|torchrun|accelerate|vllm) ", text, re.MULTILINE):
        return True
    with contextlib.suppress(SyntaxError):
        return any(not isinstance(each, ast.Expr) or isinstance(each.value, ast.Call) for each in ast.parse(text).body)
    with contextlib.suppress(yaml.YAMLError):
        return isinstance(yaml.safe_load(text), dict)
    return False


def text_of(path: Path) -> str:
    """Returns a document as Markdown; of a notebook its cells, without what they printed."""
    return notebooks.markdown(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


def runs_by_itself(document: str) -> bool:
    """Says whether another test runs a document's blocks: those of a notebook, or those that it translates."""
    return document.endswith(".ipynb") or document in TRANSLATIONS


ALL = {path.name: blocks(text_of(path), path.name) for path in DOCUMENTS}
