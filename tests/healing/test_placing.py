"""Which layers to change: the choice equals brute force over the scores, and says how far their sum was off."""

from __future__ import annotations

import copy
import itertools
import random
from functools import cache

import healing_modules
import pico
import pytest
import torch

import solidify
from solidify.errors import HealingError
from solidify.healing.learning import Alignment
from solidify.healing.placing import Budget, Choice, choose, place

SETTINGS = Alignment(max_steps=3, learning_rate=1e-2)


@cache
def _six() -> tuple[torch.nn.Module, torch.nn.Module, list]:
    base = pico.llama(num_hidden_layers=6)
    with torch.no_grad():
        for number, layer in enumerate(base.model.layers):
            layer.mlp.down_proj.weight.mul_(30 + 20 * (number * 5 % 6))
        base.lm_head.weight.mul_(20)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    return base, model, solidify.replace(model, "model.layers.*.mlp", healing_modules.Narrow)


def six() -> tuple[torch.nn.Module, torch.nn.Module, list]:
    base, model, edits = _six()
    return base, copy.deepcopy(model), edits


def test_a_divergence_that_is_no_number_is_no_score() -> None:
    base, model, edits = six()
    with torch.no_grad():
        model.model.layers[2].mlp.down.weight.fill_(torch.nan)
    choice = Choice(model, base, [edit.name for edit in edits], rows())
    assert choice.divergence(["model.layers.1.mlp"]) > 0
    with pytest.raises(HealingError, match=r"with model\.layers\.2\.mlp changed is nan, so no layers can be chosen"):
        choice.divergence(["model.layers.2.mlp"])


def rows(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 60, (1, 8), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_choice_equals_brute_force_over_all_sets(count: int) -> None:
    base, model, edits = six()
    found = place(model, base, rows(), Budget(layers=count), edits=edits, settings=SETTINGS, held_out=rows())
    sums = {names: sum(found.scores[n] for n in names) for names in itertools.combinations(found.scores, count)}
    assert set(found.chosen) == set(min(sums, key=sums.__getitem__))
    assert found.predicted == pytest.approx(min(sums.values()), rel=1e-9) == found.curve[count]
    again = Choice(model, base, list(found.scores), rows())
    assert found.measured == again.divergence(found.chosen)
    assert found.off == (found.measured - found.predicted) / found.measured


def test_greedy_takes_the_cheapest_at_every_step() -> None:
    base, model, edits = six()
    budget = Budget(layers=2, method="greedy")
    found = place(model, base, rows(), budget, edits=edits, settings=SETTINGS, held_out=rows())
    choice = Choice(model, base, list(found.scores), rows())
    first = min(found.scores, key=found.scores.__getitem__)
    pairs = {name: choice.divergence([first, name]) for name in found.scores if name != first}
    assert set(found.chosen) == {first, min(pairs, key=pairs.__getitem__)}


def test_any_budget_is_met_as_brute_force_meets_it() -> None:
    draw = random.Random(3)
    for _ in range(200):
        names = [f"n{number}" for number in range(6)]
        scores = {name: draw.choice([draw.random(), 0.0, 0.5]) for name in names}
        savings = {name: draw.choice([0.0, 1.0, draw.random() * 3, -0.5]) for name in names}
        needed = draw.random() * sum(max(value, 0) for value in savings.values())
        sets = [s for size in range(7) for s in itertools.combinations(names, size)]
        best = min(sum(scores[n] for n in s) for s in sets if sum(savings[n] for n in s) >= needed)
        chosen = choose(scores, savings, needed)
        assert sum(savings[n] for n in chosen) >= needed
        assert sum(scores[n] for n in chosen) == pytest.approx(best, abs=1e-12)


def test_flops_and_cache_are_what_is_saved() -> None:
    base, model, edits = six()
    from solidify.model.cost import flops

    total = sum(flops(base).values())
    budget = Budget(flops=total - 1)
    found = place(model, base, rows(), budget, edits=edits, settings=SETTINGS, held_out=rows())
    assert len(found.chosen) == 1
    with pytest.raises(HealingError, match=r"asks for .* bytes of the cache to save .*, but all .* give 0"):
        place(model, base, rows(), Budget(cache_bytes=0, length=8), edits=edits, settings=SETTINGS)


def test_what_is_wrong_is_said_before_anything_runs() -> None:
    base, model, edits = six()
    with pytest.raises(HealingError, match="a budget is one of layers, cache_bytes, flops") as caught:
        place(model, base, rows(), Budget(method="best"), edits=edits)
    assert len(caught.value.faults) == 2
    with pytest.raises(HealingError, match="asks for 7 modules to change"):
        place(model, base, rows(), Budget(layers=7), edits=edits)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with pytest.raises(HealingError, match="something else was changed too"):
        place(model, base, rows(), Budget(layers=1), edits=edits, settings=SETTINGS)
