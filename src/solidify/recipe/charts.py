"""Curves of a training as SVG that stands in a page by itself: its text and grid take the colour of the page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 210, 84, 8, 10, 26
COLOURS = ("#3b82f6", "#ef4444", "#10b981", "#a855f7", "#f59e0b", "#06b6d4", "#ec4899", "#84cc16")


def curves(title: str, steps: Sequence[float], series: Mapping[str, Sequence[float | None]]) -> str:
    """Draws each series over the steps, with a legend that says its first and last value; "" where there is nothing."""
    kept = {name: line for name, line in series.items() if any(_is_finite(value) for value in line)}
    values = [value for line in kept.values() for value in line if value is not None and math.isfinite(value)]
    if len(steps) < 2 or not values:
        return ""
    low, high = min(values), max(values)
    high = high if high > low else low + (abs(low) or 1.0)
    pieces = [_draw_grid(low, high, steps)]
    legend = []
    for number, (name, line) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{_place_step(step, steps):.1f},{_place_value(value, low, high):.1f}"
            for step, value in zip(steps, line, strict=True)
            if value is not None and math.isfinite(value)
        )
        pieces.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        first, last = (next(value for value in values if value is not None) for values in (line, line[::-1]))
        legend.append(
            f'<li><i style="background:{colour}"></i>{html.escape(name)} <b>{first:.4g}</b> → <b>{last:.4g}</b></li>'
        )
    words = html.escape(title)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{words}" '
        f'font-size="14" fill="currentColor">{"".join(pieces)}</svg>'
    )
    return f"<figure><figcaption>{words}</figcaption>{svg}<ul class='legend'>{''.join(legend)}</ul></figure>"


def of_history(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns the curves of a training's history: the objective and its terms, kept shares, weights, learning rates."""
    if not history:
        return []
    steps = [float(logs.get("step", number + 1)) for number, logs in enumerate(history)]
    keys = list(dict.fromkeys(key for logs in history for key in logs))

    def pick(prefix: str) -> dict[str, list[float | None]]:
        return {k.removeprefix(prefix): [logs.get(k) for logs in history] for k in keys if k.startswith(prefix)}

    total: dict[str, list[float | None]] = {"total": [logs.get("loss") for logs in history]}
    terms, weighted = pick("term/"), pick("weighted/")
    rates = pick("learning_rate")
    made = [
        curves("The objective: its total, and each term as it is weighted", steps, total | weighted),
        *(curves(f"The term {name}, as it is", steps, {name: line}) for name, line in terms.items() if len(terms) > 1),
        curves("Kept shares", steps, pick("kept/")),
        curves("Weights that move", steps, pick("weight/")),
        curves("Learning rate", steps, {name.lstrip("/") or "learning rate": line for name, line in rates.items()}),
        curves("Gradient norm", steps, {"gradient norm": [logs.get("grad_norm") for logs in history]}),
    ]
    return [each for each in made if each]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _place_step(step: float, steps: Sequence[float]) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - steps[0]) / max(steps[-1] - steps[0], 1e-9)


def _place_value(value: float, low: float, high: float) -> float:
    return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _draw_grid(low: float, high: float, steps: Sequence[float]) -> str:
    """Draws lines at some values, with those, and writes the first and the last step."""
    rows = []
    for part in range(5):
        value = low + (high - low) * part / 4
        y = _place_value(value, low, high)
        rows.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
            f'stroke-opacity=".15"/><text x="{_LEFT - 6}" y="{y + 5:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    ends = ((steps[0], _LEFT, "start"), (steps[-1], _WIDTH - _RIGHT, "end"))
    rows += [f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}">step {step:g}</text>' for step, x, anchor in ends]
    return "".join(rows)
