"""What is said of a healing follows from what was measured: a rise fails, a fall is a figure."""

from __future__ import annotations

from typing import Any

import pytest

from solidify.healing import outcome
from solidify.healing.measuring import Distance


def measured(last: float, **more: Any) -> dict[str, Any]:
    stages = {"surgery": Distance(0.4, 3.0, 2.5, 100), "align": Distance(last, 2.8, 2.5, 100)}
    return {"stages": outcome.describe_stages(stages), **more}


@pytest.mark.parametrize(
    ("last", "verdict"), [(0.1, "measured"), (0.4, "measured"), (0.5, "failed"), (float("nan"), "failed")]
)
def test_a_model_that_is_farther_from_its_base_fails(last: float, verdict: str) -> None:
    found = {each.name: each for each in outcome.judge(measured(last))}
    assert found["nearer to the base"].verdict == verdict
    assert "new branches are used" not in found, "no new module has a branch that can be switched off"


def test_the_recovered_share_is_of_the_first_stage() -> None:
    found = measured(0.1)
    assert [stage["recovered"] for stage in found["stages"]] == pytest.approx([0.0, 0.75])
    later = outcome.add_stage(found, "distill", Distance(0.05, 2.6, 2.5, 100))
    assert later[-1]["recovered"] == pytest.approx(0.875) and len(later) == 3 and len(found["stages"]) == 2


def test_what_branches_add_and_longer_rows_are_told() -> None:
    more = {"ablated": {"kl": 0.9}, "longer": {"length": 64, "kl": 0.2, "loss": 2.9, "base_loss": 2.6}}
    found = {each.name: each for each in outcome.judge(measured(0.1, **more))}
    assert "with the new branches off KL is 0.9, with them 0.1" in found["new branches are used"].evidence
    assert "rows of 64 tokens: KL 0.2" in found["lengths beyond training"].evidence
