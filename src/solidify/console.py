"""What the person at the keyboard sees: one console for words (stderr), progress bars, and tables."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from solidify.findings import FAILED, NOT_LOOKED_AT, PROVED

words = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)
results = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress(description: str, total: int) -> Iterator[Any]:
    """Shows a bar and yields a function `advance(note)` that moves it by one and replaces the note beside it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=words) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, note=note)

        yield advance


@contextmanager
def bytes_progress(description: str, total: int) -> Iterator[Any]:
    """Shows a bar in bytes, with their rate, and yields a function `advance(count)`; nothing for what takes no time."""
    if total < 2**28:
        yield lambda _count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=words) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.update(task, advance=count)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    numbers: Sequence[int] = (),
    ruled: bool = True,
) -> Table:
    """Makes a table; the columns whose places are in `numbers` are aligned to the right; without rules it is airier."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=box.HEAVY_HEAD if ruled else box.SIMPLE_HEAD
    )
    made.pad_edge = ruled
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def source(text: str, language: str, indent: int = 0) -> Padding | Text:
    """Shows a text in a language: coloured and wrapped in a terminal, else as it is."""
    if not results.is_terminal:
        return Text(textwrap.indent(text.rstrip("\n"), " " * indent))
    coloured = Syntax(text.rstrip("\n"), language, theme="ansi_dark", background_color="default", word_wrap=True)
    return Padding(coloured, (0, 0, 0, indent))


def amount(number: float) -> str:
    """Writes a number in three digits: 1.23 k, 45.6 M, 7.89 G."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:g}"


def size(number: float) -> str:
    """Writes a number of bytes."""
    return f"{amount(number)}B" if abs(number) >= 1e3 else f"{number:g} B"


def share(part: float, whole: float) -> str:
    """Writes a part in percent of the whole; what is there but small is not written as nothing."""
    if not whole or not part:
        return "-" if not part else "?"
    percent = 100 * part / whole
    return f"{percent:.1f} %" if abs(percent) >= 0.05 else f"{percent:.1g} %"


@contextmanager
def silence() -> Iterator[None]:
    """Keeps words for people back while the block lasts."""
    before, words.quiet = words.quiet, True
    try:
        yield
    finally:
        words.quiet = before


def verdict(word: str) -> str:
    """Returns a finding's verdict with its colour."""
    colours = {PROVED: "[green]proved[/green]", FAILED: "[red]FAILED[/red]", NOT_LOOKED_AT: "[dim]not looked at[/dim]"}
    return colours.get(word, word)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Says what is going on: with a spinner while it does, or where nobody can see one turn, by a line at its start."""
    if not words.is_terminal:
        words.print(f"… {title}", markup=False)
    with words.status(escape(title) + " …"):
        yield
    words.print(f"[green]✓[/green] {escape(title)}")
