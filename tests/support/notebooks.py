"""Runs a notebook as Jupyter would, cell by cell in one namespace, without a kernel.

    python tests/support/notebooks.py docs/tutorial.ipynb                  # runs it in the current directory
    python tests/support/notebooks.py docs/tutorial.ipynb --write FILE...  # and keeps what was printed in these

What a cell prints, and the value of its last line, are its output; progress bars are not. A cell that fails ends it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    notebook: Notebook = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def code_of(path: Path) -> list[str]:
    """Returns the texts of the code cells."""
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def markdown(path: Path) -> str:
    """Returns the cells as Markdown, without what they printed."""
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in read(path)["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts) + "\n"


def outputs_of(path: Path) -> list[str]:
    """Returns what stands in the notebook as the output of each code cell."""
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    return ["".join("".join(output["text"]) for output in cell["outputs"]) for cell in cells]


def run(path: Path) -> list[str]:
    """Runs all code cells in this process, and returns what each printed.

    Raises:
        AssertionError: a cell failed.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    printed = []
    for number, code in enumerate(code_of(path), 1):
        with capture_output() as shown:
            result = shell.run_cell(code, store_history=True)
        assert result.success, f"cell {number} of {path.name}: {result.error_in_exec or result.error_before_exec!r}"
        printed.append(shown.stdout)
    return printed


def write(path: Path, printed: list[str]) -> None:
    """Keeps what was printed in the notebook, as Jupyter writes it."""
    notebook = read(path)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(cells, printed, strict=True), 1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell.update(execution_count=number, outputs=[stream] if text else [])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    source, *more = sys.argv[1:]
    texts = run(Path(source))
    for file in more[1:]:  # after --write
        write(Path(file), texts)
    print(json.dumps(texts))
