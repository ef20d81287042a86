"""What `solidify data` shows: rows token by token, those that count for the loss in colour, or between brackets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from solidify.system import console

_COUNTS, _REST = "bold green", "dim"
_OPEN, _CLOSE = "⟦", "⟧"  # around what counts, where nobody sees colours


def tell(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Shows rows, from the plain values of `showing.show`."""
    about = [document["format"], *(document[key] for key in ("loss",) if key in document)]
    about += [f"at most {document['max_length']:,} tokens"] if "max_length" in document else []
    about += [f"packed into {document['windows']:,} windows"] if "windows" in document else []
    yield console.line("; ".join(about))
    for part, counted in document["counted"].items():
        yield console.line(f"{part}: {counted['words']}")
    for row in document["rows"]:
        yield ""
        cut = f", {row['cut']:,} tokens cut off" if row["cut"] else ""
        label = f", label: {row['label']}" if "label" in row else ""
        yield console.line((f"row {row['row']}{cut}{label}", "bold"))
        if "image" in row:
            yield console.line(row["image"])
        for name, tokens in row["parts"].items():
            counted = sum(token["counts"] for token in tokens)
            yield console.line((f"{name}: {len(tokens):,} tokens, {counted:,} count", "cyan"))
            yield _write_tokens(tokens)
    if any(row["parts"] for row in document["rows"]):
        yield ""
        marked = ("coloured", _COUNTS) if console.results.is_terminal else f"{_OPEN}between brackets{_CLOSE}"
        yield console.line(marked, " counts for the loss; the rest is only read")


def _write_tokens(tokens: Sequence[Mapping[str, Any]]) -> Text:
    """Writes tokens one after the other; words and their labels, where tokens have some, side by side."""
    text, before, plain = Text(), False, not console.results.is_terminal
    for token in tokens:
        counts = bool(token["counts"])
        if plain and counts != before:
            text.append(_OPEN if counts else _CLOSE)
        text.append(console.printable(token["text"]), style=_COUNTS if counts else _REST)
        if token.get("label") is not None:
            text.append(console.printable(f"/{token['label']} "), style="yellow")
        before = counts
    if plain and before:
        text.append(_CLOSE)
    return text
