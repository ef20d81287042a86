"""What the person at the keyboard sees: one console for words (stderr), one for results, progress bars, and tables.

Everything that is printed passes through here, and nothing in it steers the terminal: names come from files of
strangers. There is no markup; what is coloured on purpose is a `Text` (see `line`).
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
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
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from solidify.errors import SolidifyError

_HARMLESS = {"Zs", "Co"}  # spaces of every width, and signs of private fonts: printed, though no letters
_PAUSE = 30  # seconds between two lines that say how far something is
_JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji


def printable(text: str, escaped: Any = lambda character: repr(character)[1:-1]) -> str:
    """Returns a text in which everything that could steer a terminal (but newlines and tabs) is an escape."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or _is_shown(c) else escaped(c) for c in text)


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) in _HARMLESS


class _Console(Console):
    """A console without markup, on which a text is shown letter by letter, whatever is in it."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        wide = stream is not None and stream.isatty()
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if wide else 120)

    def render_str(self, text: str, **options: Any) -> Text:
        """Makes a text of a string: of a line, a cell or a title."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the pieces of anything that is printed; those that move the cursor are rich's own."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(printable(piece.text), piece.style)

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError: who read the output has read enough, and nothing failed (rich would end with 1)."""
        raise BrokenPipeError

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints.

        Raises:
            SolidifyError: what it is printed to cannot be written.
        """
        with _wrap_writing("stderr" if self.stderr else "stdout"):
            super().print(*objects, **options)


@contextmanager
def _wrap_writing(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SolidifyError(f"{name} cannot be written to: {error.strerror or error}") from error


words = _Console(stderr=True)
results = _Console()


def write(text: str) -> None:
    """Writes a text to stdout as it is, neither wrapped nor coloured, in printable letters.

    Raises:
        SolidifyError: stdout cannot be written.
    """
    if not results.quiet:
        with _wrap_writing("stdout"):
            _put_text(sys.stdout, f"{printable(text)}\n")


def write_json(document: Any) -> None:
    """Writes values to stdout as JSON; what is not printable stands in it as JSON's own escapes.

    Raises:
        SolidifyError: stdout cannot be written.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False)
    write(printable(text, lambda character: json.dumps(character)[1:-1]))


def message(text: str) -> None:
    """Writes a sentence to stderr in one piece: several processes may share the terminal."""
    _put_text(sys.stderr, f"solidify: {printable(text)}\n")


def _put_text(stream: TextIO | None, text: str) -> None:
    if stream is not None:
        stream.write(text)
        stream.flush()


def line(*parts: str | tuple[str, str]) -> Text:
    """Makes a text of parts, each a string or a pair of string and style."""
    pieces = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((printable(text), style) for text, style in pieces))


def _make_column(format: str) -> TextColumn:
    return TextColumn(format, markup=False)


@contextmanager
def progress(description: str, total: int) -> Iterator[Any]:
    """Shows a bar and yields a function `advance(note)` that moves it by one and replaces the note beside it.

    Where nobody sees it move (a file, a pipe), a line says every half minute how far it is.
    """
    columns = (_make_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, _make_column("{task.fields[note]}"), console=words) as bar:
        task = bar.add_task(description, total=total, note="")
        tell = _make_teller(description, str(total), str)

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, note=note)
            tell(int(bar.tasks[0].completed), note)

        yield advance


@contextmanager
def bytes_progress(description: str, total: int) -> Iterator[Any]:
    """Shows a bar in bytes, with their rate, and yields a function `advance(count)`; nothing for what takes no time."""
    if total < 2**28:
        yield lambda _count: None
        return
    columns = (_make_column("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=words) as bar:
        task = bar.add_task(description, total=total)
        tell = _make_teller(description, size(total), size)

        def advance(count: int) -> None:
            bar.update(task, advance=count)
            tell(int(bar.tasks[0].completed), "")

        yield advance


def _make_teller(description: str, total: str, write: Callable[[int], str]) -> Callable[[int, str], None]:
    """Makes what prints how far something is, at most twice a minute, and in a terminal or a notebook nothing."""
    last, seen = time.monotonic(), words.is_terminal or words.is_jupyter

    def tell(done: int, note: str) -> None:
        """Prints a line, if the last one is long enough ago."""
        nonlocal last
        if not seen and time.monotonic() - last >= _PAUSE:
            last = time.monotonic()
            words.print(f"… {description}: {write(done)} of {total}" + (f", {note}" if note else ""))

    return tell


def print_all(shown: Iterable[Any]) -> None:
    """Prints results, one after the other; text keeps its lines as they are."""
    for each in shown:
        results.print(each, soft_wrap=isinstance(each, (str, Text)))


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    numbers: Sequence[int] = (),
    ruled: bool = True,
) -> Table:
    """Makes a table; the columns whose indices are in `numbers` are aligned to the right; `ruled` draws lines."""
    made = Table(
        title=printable(title),
        title_justify="left",
        title_style="bold",
        box=box.HEAVY_HEAD if ruled else box.SIMPLE_HEAD,
    )
    made.pad_edge = ruled
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(_format_cell, row))
    return made


def _format_cell(content: str | Text) -> str | Text:
    """Makes what a cell shows before its width is measured."""
    if isinstance(content, str) or (shown := printable(content.plain)) == content.plain:
        return content
    return Text(shown, style=content.style)


def source(text: str, language: str, indent: int = 0) -> Padding | Text:
    """Shows a text in a language: coloured and wrapped in a terminal, else as it is."""
    text = printable(text)
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


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Says what is going on: with a spinner while it does, or where nobody can see one turn, by a line at its start."""
    if not words.is_terminal:
        words.print(f"… {title}")
    with words.status(line(f"{title} …")):
        yield
    words.print(line(("✓", "green"), f" {title}"))
