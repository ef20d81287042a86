"""What the person at the keyboard sees: one console for words (stderr), progress bars, and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

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


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> Table:
    """Makes a table; the columns whose places are in `numbers` are aligned to the right."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def verdict(passed: bool | None) -> str:
    """Returns a word with its colour: proved, failed, or measured."""
    return {True: "[green]proved[/green]", False: "[red]FAILED[/red]", None: "measured"}[passed]


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Says what is going on, with a spinner while it does."""
    with words.status(title + " …"):
        yield
    words.print(f"[green]✓[/green] {title}")
