"""Pictures are well-formed, show what was measured, and let no name out of its place."""

from __future__ import annotations

from xml.etree import ElementTree

from solidify.healing import plots

NAME = 'a<script>"&'


def parse(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def test_a_line_falls_as_its_values_do() -> None:
    root = parse(plots.lines("errors", {NAME: [1.0, 0.1, 0.01, float("nan")], "other": [1.0]}))
    lines = root.findall("{*}polyline")
    heights = [float(point.split(",")[1]) for point in lines[0].attrib["points"].split()]
    assert heights == sorted(heights) and len(heights) == 3
    assert heights[1] - heights[0] == heights[2] - heights[1]  # a logarithmic scale
    assert lines[0][0].text == NAME


def test_bars_are_as_high_as_their_values() -> None:
    root = parse(plots.bars("KL", {NAME: 2.0, "b": 1.0, "c": 0.0, "d": float("inf")}))
    heights = [float(bar.attrib["height"]) for bar in root.findall("{*}rect")]
    assert len(heights) == 3 and abs(heights[0] - 2 * heights[1]) < 0.2 and heights[2] == 0
    assert "2" in (root.findall("{*}rect")[0][0].text or "")


def test_every_measurement_has_its_picture() -> None:
    unit = {"name": "m", "before": 1.0, "after": 0.5, "errors": [1.0, 0.5]}
    stages = [{"stage": "surgery", "kl": 1.0}, {"stage": "align", "kl": 0.5}]
    found = plots.of(
        {
            "place": {"scores": {"m": 0.1}, "curve": [0.0, 0.1]},
            "heal": {"layers": [unit], "stages": stages, "ablated": {"kl": 0.9}},
            "distill_history": [{"loss": 1.0}, {"loss": 0.5}],
        }
    )
    titles = [parse(picture)[0].text for picture in found]
    assert len(found) == len(set(titles)) == 6
    assert plots.of({}) == []
