"""The source of `__main__`: a script's file, or the cells of a notebook as they were run."""

from __future__ import annotations

import ast
import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from solidify.source.syntax import SourceFile, parse

# Where IPython, Jupyter's kernel and Python's own prompt keep what was typed.
_CELL_FILES = ("<ipython-input-", "<python-input-", "<timed exec>")
_KERNEL = "ipykernel_"
_TRANSPARENT_MAGICS = ("time", "capture")  # they run their cell in the notebook's own namespace


def script_of(cls: type, main: ModuleType) -> Path | None:
    """Returns the file of a class that is defined in `__main__`, or None for one that was typed."""
    written = [f.__code__.co_filename for f in vars(cls).values() if isinstance(f, FunctionType)]
    for name in (*written, vars(main).get("__file__")):
        if name is not None and Path(name).is_file():
            return Path(name).absolute()
    return None


def notebook(main: ModuleType) -> SourceFile | None:
    """Returns the cells that were run in `__main__`, as one source; None where none are kept."""
    text, cells = "", []
    for label, cell in _list_cells(main):
        code = _convert_python(cell)
        if code is not None:
            cells.append((text.count("\n") + 1, label))
            text += code.rstrip("\n") + "\n\n\n"
    if not cells:
        return None
    return SourceFile("__main__", "", None, text, "the notebook", whole=False, cells=tuple(cells))


def _list_cells(main: ModuleType) -> Iterator[tuple[str, str]]:
    shell = _find_shell()
    typed: Any = shell.history_manager.input_hist_parsed if shell is not None else vars(main).get("In")
    if isinstance(typed, list):
        yield from ((f"In [{index}]", str(cell)) for index, cell in enumerate(typed))
        return
    for name, entry in list(linecache.cache.items()):
        if len(entry) == 4 and (name.startswith(_CELL_FILES) or _KERNEL in name):
            yield name, "".join(entry[2])


def _find_shell() -> Any:
    ipython: Any = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def _convert_python(cell: str) -> str | None:
    """Returns a cell as Python, line by line; None for one that is none (it did not run either)."""
    try:
        tree = parse(cell)
    except SyntaxError:
        cell = re.sub(r"^(\s*(?:\w+\s*=\s*)?)[%!].*$", r"\1get_ipython()", cell, flags=re.MULTILINE)
        try:
            tree = parse(cell)
        except SyntaxError:
            return None
    match tree.body:
        case [ast.Expr(ast.Call(ast.Attribute(attr="run_cell_magic"), [ast.Constant(magic), _, ast.Constant(body)]))]:
            inner = _convert_python(str(body)) if magic in _TRANSPARENT_MAGICS else None
            return None if inner is None else "\n" + inner
    return cell
