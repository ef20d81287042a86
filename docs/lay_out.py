"""Lays out the pages of the documentation site: `python docs/lay_out.py build/pages` (`make docs` does).

`--requirements` instead of a directory prints what the site's own environment needs: the extra `docs` by itself.

The site begins with the README. Each notebook becomes a page: its cells, and under each what it printed. A link to a
file of the repository that is no page keeps its words alone.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OF_THE_ROOT = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")
CALLED = {"README.md": "index.md", "README.zh-CN.md": "index.zh-CN.md", "docs/index.md": "all_pages.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def names() -> dict[str, str]:
    """Returns the files that the site consists of: their path in the repository, and their name on the site."""
    docs = [path for kind in ("md", "ipynb", "svg") for path in (ROOT / "docs").glob(f"*.{kind}")]
    paths = [*OF_THE_ROOT, *sorted(f"docs/{path.name}" for path in docs)]
    return {path: CALLED.get(path, path.removeprefix("docs/").replace(".ipynb", ".md")) for path in paths}


def pages() -> dict[str, str]:
    """Returns every page of the site: its name and its Markdown, links of the repository pointed at pages."""
    there = names()
    return {
        name: with_links_among(_markdown(ROOT / path), posixpath.dirname(path), there)
        for path, name in there.items()
        if name.endswith(".md")
    }


def with_links_among(text: str, folder: str, there: Mapping[str, str]) -> str:
    """Returns a page of a folder whose links lead to what is on the site, or are words; code is left as it is."""

    def lead(link: re.Match[str]) -> str:
        name = there.get(posixpath.normpath(posixpath.join(folder, link[2])))
        return f"[{link[1]}]({name}{link[3] or ''})" if name is not None else link[1]

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in parts)


def _markdown(path: Path) -> str:
    return of_notebook(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


def of_notebook(path: Path) -> str:
    """Returns a notebook as Markdown."""
    parts: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts += [_shown(output) for output in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    """Returns what a cell left behind, as text."""
    text = "".join(output.get("text") or output["data"]["text/plain"])
    return f"```text\n{text.rstrip()}\n```"


def requirements() -> list[str]:
    """Returns what the extra `docs` names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"]["docs"])


def write(directory: Path) -> None:
    """Writes the pages into a directory, in the place of what was there, and the pictures beside them."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")
    for picture in (ROOT / "docs").glob("*.svg"):
        shutil.copy2(picture, directory)


if __name__ == "__main__":
    if sys.argv[1] == "--requirements":
        print("\n".join(requirements()))
    else:
        write(Path(sys.argv[1]))
