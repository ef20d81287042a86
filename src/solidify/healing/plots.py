"""Plots of what healing measured, as SVG that stands in a page by itself: lines over steps, and bars."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 260, 64, 28, 34
_LETTER = 6  # the width of a letter, about
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")


def of(measured: Mapping[str, Any]) -> list[str]:
    """Returns the plots of a run's measurements: scores and curve of `place`, errors of `align`, what stages left."""
    made = []
    placed, healed = measured.get("place"), measured.get("heal")
    if placed:
        scores = dict(zip(_shorten(list(placed["scores"])), placed["scores"].values(), strict=True))
        made.append(bars("Divergence of the base with one module changed", scores))
        made.append(lines("Smallest sum of scores by number of changed modules", {"sum": placed["curve"]}, log=False))
    if healed and healed.get("layers"):
        short = _shorten([each["name"] for each in healed["layers"]])
        errors = {name: each["errors"] for name, each in zip(short, healed["layers"], strict=True)}
        made.append(lines("Alignment: relative error of each module over its steps", errors))
        changes = {
            f"{name} {when}": each[when]
            for name, each in zip(short, healed["layers"], strict=True)
            for when in ("before", "after")
        }
        made.append(bars("Relative error before and after alignment", changes))
    if healed and healed.get("stages"):
        made.append(bars("KL from the base after each stage", _list_stages(healed)))
    history = measured.get("distill_history") or []
    if history:
        made.append(lines("Distillation: loss over its steps", {"loss": [each["loss"] for each in history]}))
    return made


def _shorten(names: Sequence[str]) -> list[str]:
    """Leaves out what the names of modules have in common at both ends: of layers, the numbers are left."""
    parts = [name.split(".") for name in names]
    most = min(map(len, parts), default=1) - 1
    first = next((n for n in range(most) if len({part[n] for part in parts}) > 1), most)
    last = next((n for n in range(most - first) if len({part[-1 - n] for part in parts}) > 1), most - first)
    return [".".join(part[first : len(part) - last]) for part in parts]


def _list_stages(healed: Mapping[str, Any]) -> dict[str, float]:
    found = {each["stage"]: each["kl"] for each in healed["stages"]}
    if "ablated" in healed:
        found["new branches off"] = healed["ablated"]["kl"]
    return found


def lines(title: str, series: Mapping[str, Sequence[float]], *, log: bool = True) -> str:
    """Draws each series over its index; with `log`, its values on a logarithmic scale."""
    values = [value for line in series.values() for value in line if math.isfinite(value)]
    if not values:
        return ""
    scale = _Scale(values, log=log and min(values) > 0)
    longest = max(len(line) for line in series.values())
    body = []
    for number, (name, line) in enumerate(series.items()):
        points = " ".join(
            f"{_LEFT + (_WIDTH - _LEFT - 8) * index / max(1, longest - 1):.1f},{scale.height(value):.1f}"
            for index, value in enumerate(line)
            if math.isfinite(value)
        )
        colour = _COLOURS[number % len(_COLOURS)]
        label = html.escape(name)
        body.append(f'<polyline fill="none" stroke="{colour}" points="{points}"><title>{label}</title></polyline>')
    body += _draw_legend(list(series))
    return _frame(title, scale, body)


def _draw_legend(names: Sequence[str]) -> list[str]:
    """Draws each name in its colour below the picture, where they are several and there is room."""
    widths = [len(name) * _LETTER + 24 for name in names]
    if len(names) < 2 or sum(widths) > _WIDTH - _LEFT:
        return []
    made, left = [], _LEFT
    for number, (name, width) in enumerate(zip(names, widths, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        made.append(f'<rect x="{left}" y="{_HEIGHT - 24}" width="10" height="10" fill="{colour}"/>')
        made.append(f'<text x="{left + 14}" y="{_HEIGHT - 15}">{html.escape(name)}</text>')
        left += width
    return made


def bars(title: str, values: Mapping[str, float]) -> str:
    """Draws a bar for each value, its name and number in a tooltip and, where there is room, below it."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if not finite:
        return ""
    scale = _Scale([0.0, *finite.values()], log=False)
    step = (_WIDTH - _LEFT - 8) / len(finite)
    body = []
    for number, (name, value) in enumerate(finite.items()):
        left, top = _LEFT + number * step, scale.height(value)
        label = html.escape(name)
        body.append(
            f'<rect x="{left + step * 0.1:.1f}" y="{top:.1f}" width="{step * 0.8:.1f}" '
            f'height="{max(0.0, _HEIGHT - _BOTTOM - top):.1f}" fill="{_COLOURS[0]}">'
            f"<title>{label}: {value:.4g}</title></rect>"
        )
        if step > len(name) * _LETTER:
            middle = left + step / 2
            body.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{label}</text>')
            body.append(
                f'<text x="{middle:.1f}" y="{max(top - 4, _TOP + 10):.1f}" text-anchor="middle">{value:.3g}</text>'
            )
    return _frame(title, scale, body)


class _Scale:
    """Maps values to heights in the picture."""

    def __init__(self, values: Sequence[float], *, log: bool) -> None:
        self.log = log
        low, high = (self._of(value) for value in (min(values), max(values)))
        self.low, self.high = low, high if high > low else low + 1.0

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def height(self, value: float) -> float:
        """Returns the y of a value."""
        share = (self._of(value) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[tuple[float, float]]:
        """Returns some heights, and the values there."""
        marks = [self.low + (self.high - self.low) * part / 4 for part in range(5)]
        values = [10**mark if self.log else mark for mark in marks]
        return [(self.height(value), value) for value in values]


def _frame(title: str, scale: _Scale, body: Sequence[str]) -> str:
    marks = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for y, value in scale.ticks()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11"><title>{html.escape(title)}</title>'
        f'<text x="{_LEFT}" y="16" font-size="13">{html.escape(title)}</text>{marks}{"".join(body)}</svg>'
    )
