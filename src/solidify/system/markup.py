"""Tables in HTML, for what a notebook shows: text of strangers is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_COLORS = {"proved": "#2a7", "failed": "#c33", "measured": "#a70"}


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Returns a table; a verdict has its colour."""
    head = "".join(f"<th style='text-align:left'>{escape(word)}</th>" for word in header)
    body = "".join("<tr>" + "".join(map(_format_cell, row)) + "</tr>" for row in rows)
    below = f"<p>{escape(note)}</p>" if note else ""
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"
    )


def _format_cell(value: object) -> str:
    color = _COLORS.get(str(value))
    style = "text-align:left" + (f";color:{color}" if color else "")
    return f"<td style='{style}'>{escape(str(value))}</td>"
