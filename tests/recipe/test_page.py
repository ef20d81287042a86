"""The page of a run: curves, trees of modules, and samples, from what was measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from solidify.findings import Finding, Report
from solidify.healing import plots
from solidify.losses.compute import TrashBudget, TrashController
from solidify.recipe import charts, page
from solidify.recipe.schema import Recipe

RECIPE = Recipe.model_validate({"base": {"model": "m"}, "surgery": [{"remove": "a", "expect": "C"}]})
HISTORY: list[dict[str, float]] = [
    {"loss": 3.0, "learning_rate": 1e-3, "term/model": 2.0, "weighted/model": 2.0, "kept/budget": 1.0, "step": 5},
    {"loss": 2.0, "learning_rate": 0.0, "term/model": 1.5, "weighted/model": 1.5, "kept/budget": 0.7, "step": 10},
]


class Balanced(HTMLParser):
    """Raises where a tag is not closed in its turn."""

    ALONE = ("meta", "br", "line", "polyline", "rect", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.ALONE or self.open.pop() == tag, tag


def well_formed(text: str) -> None:
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []


def test_every_kind_of_curve_is_drawn_over_the_steps() -> None:
    made = charts.of_history(HISTORY)
    titles = [re.findall("<figcaption>(.*?)</figcaption>", each)[0] for each in made]
    assert titles == ["The objective: its total, and each term as it is weighted", "Kept shares", "Learning rate"]
    assert "step 5<" in made[0] and "step 10<" in made[0] and "<b>3</b> → <b>2</b>" in made[0]
    for each in made:
        well_formed(each)


@pytest.mark.parametrize("values", [[], [1.0], [float("nan"), float("inf")], [None, None]])
def test_what_cannot_be_drawn_is_left_out(values: list[float | None]) -> None:
    assert charts.curves("t", list(range(len(values))), {"a": values}) == ""


def test_names_of_strangers_are_text() -> None:
    well_formed(made := charts.curves("<script>", [0, 1], {"<b>": [1.0, 1.0]}))
    assert "<script>" not in made and "&lt;b&gt;" in made


def test_a_tree_shows_what_went_came_and_grew() -> None:
    before = [["model", "M", "1", 10], ["model.mlp", "MLP", "4", 8], ["head", "Linear", "1", 2]]
    after = [
        ["model", "M", "1", 14],
        ["model.mlp", "Gate", "4", 12],
        ["model.mlp.scale", "parameter", "4", 4],
        before[2],
    ]
    rows = page._compare_trees({"trees": {"before": before, "after": after}})
    assert [(row["full"], row["kind"], row["change"], row["parameters"]) for row in rows] == [
        ("model", "M", "", "10 → 14"),
        ("model.mlp", "MLP", "gone", "8"),
        ("model.mlp", "Gate", "new", "12"),
        ("model.mlp.scale", "parameter", "new", "4"),
        ("head", "Linear", "", "2"),
    ]


def test_layers_that_a_change_regroups_are_neither_gone_nor_new() -> None:
    before = [["layers.*", "Layer", "4", 40], ["layers.*.attn", "Attention", "4", 16], ["layers.*.mlp", "MLP", "4", 24]]
    after = [
        ["layers.*", "Layer", "3 (0-2)", 30],
        ["layers.*.attn", "Attention", "3 (0-2)", 12],
        ["layers.*.mlp", "MLP", "3 (0-2)", 18],
        ["layers.*", "Layer", "1 (3)", 11],
        ["layers.*.attn", "Linear", "1 (3)", 5],
        ["layers.*.mlp", "MLP", "1 (3)", 6],
    ]
    rows = page._compare_trees({"trees": {"before": before, "after": after}})
    assert [(row["kind"], row["times"], row["change"]) for row in rows] == [
        ("Layer", "3 (0-2)", ""),
        ("Attention", "4 → 3 (0-2)", ""),
        ("MLP", "3 (0-2)", ""),
        ("Layer", "1 (3)", "new"),
        ("Linear", "1 (3)", "new"),
        ("MLP", "1 (3)", ""),
    ]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.6.self_attn", "model.layers.12.self_attn"], ["6", "12"]),
        (["layers.0.attn", "layers.0.mlp"], ["attn", "mlp"]),
        (["a.b.c"], ["c"]),
        (["x", "y.z"], ["x", "y.z"]),
        ([], []),
    ],
)
def test_plots_name_modules_by_what_tells_them_apart(names: list[str], short: list[str]) -> None:
    assert plots._shorten(names) == short


@pytest.mark.parametrize(
    "measured", [{}, {"history": HISTORY, "samples": [{"prompt": "<i>", "before": "a", "after": "b"}]}]
)
def test_a_page_is_whole_and_needs_nothing_beside_it(measured: dict[str, Any], tmp_path: Path) -> None:
    found = [Finding("good", True, "x"), Finding("bad", False, "<u>"), Finding.unseen("far", "y")]
    made = page.write(RECIPE, tmp_path, Report("run", {"build": found}, dict(measured)))
    well_formed(made)
    assert "<i>" not in made and "<u>" not in made
    assert not re.findall(r"(?:src|href)=|@import|url\(", made)
    failed, after = made.index('<h2 class="no">failed</h2>'), made.index("<h2>not proved</h2>")
    listed = [made[failed : made.index("</section>", failed)], made[after : made.index("<details")]]
    assert [[word in part for word in ("bad", "far", "good")] for part in listed] == [
        [True, False, False],
        [False, True, False],
    ]
    assert failed < (made.index("<h2>samples</h2>") if measured else after) <= after
    assert 'name="viewport"' in made and "prefers-color-scheme: dark" in made
    assert ("<h2>samples</h2>" in made) == bool(measured)


def test_samples_are_of_a_model_that_writes_and_change_nothing() -> None:
    model = pico.make("BertForMaskedLM", **pico.SIZES, intermediate_size=32).train()
    assert page.take_samples(RECIPE, None, model) == [] and model.training


def test_terms_on_a_trash_can_show_the_kept_share() -> None:
    assert TrashBudget(0.75).shown(torch.tensor([0.5, 0.7])) == {"kept": pytest.approx(0.6)}
    counts = torch.tensor([[3.0, 4.0, 9.0], [1.0, 4.0, 9.0]])
    assert TrashController(0.75).shown(counts) == {"kept": 0.5}
