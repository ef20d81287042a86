"""Divergence, loss and ablation are what an independent computation in float64 says; distillation lowers the first."""

from __future__ import annotations

import copy

import pico
import pytest
import torch
from torch import nn

import solidify
from solidify.errors import HealingError
from solidify.healing import measuring
from solidify.healing.distilling import distill


class Beside(nn.Module):
    """A feed-forward with a branch beside it that can be switched off."""

    def __init__(self, original: nn.Module, config) -> None:
        super().__init__()
        self.inner = original
        self.more = nn.Linear(config.hidden_size, config.hidden_size)
        self.ablate = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found = self.inner(hidden_states)
        return found if self.ablate else found + self.more(hidden_states)


def pair() -> tuple[torch.nn.Module, torch.nn.Module, list]:
    base = pico.llama()
    with torch.no_grad():
        base.lm_head.weight.mul_(20)
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    return base, model, solidify.replace(model, "model.layers.*.mlp", Beside)


def rows(count: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = [{"input_ids": torch.randint(3, 60, (2, 9), generator=generator)} for _ in range(count)]
    made[0]["attention_mask"] = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return made


def by_hand(model: nn.Module, base: nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[float, float, int]:
    kl, loss, count = 0.0, 0.0, 0
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        with torch.no_grad():
            p, q = (m(**batch).logits.double().log_softmax(-1) for m in (base, model))
        for row in range(2):
            for position in range(8):
                if mask[row, position + 1]:
                    kl += float((p[row, position].exp() * (p[row, position] - q[row, position])).sum())
                    loss -= float(q[row, position, batch["input_ids"][row, position + 1]])
                    count += 1
    return kl / count, loss / count, count


def test_distance_is_what_a_computation_by_hand_says() -> None:
    base, model, _ = pair()
    found = measuring.distance(model, base, rows())
    kl, loss, count = by_hand(model, base, rows())
    assert found.tokens == count
    assert found.kl == pytest.approx(kl, rel=1e-4) and found.loss == pytest.approx(loss, rel=1e-5)
    assert found.base_loss == pytest.approx(by_hand(base, base, rows())[1], rel=1e-5)
    same = measuring.distance(base, base, rows())
    assert same.kl == pytest.approx(0, abs=1e-9) and same.recovered(found) == pytest.approx(1.0)


def test_new_branches_are_switched_off_and_on_again() -> None:
    base, model, edits = pair()
    assert measuring.ablating(model) == [edit.name for edit in edits] and measuring.ablating(base) == []
    with pytest.raises(RuntimeError), measuring.ablated(model):
        assert measuring.distance(model, base, rows()).kl == pytest.approx(0, abs=1e-9)
        raise RuntimeError
    assert measuring.distance(model, base, rows()).kl > 1e-4


def test_nothing_to_measure_is_said() -> None:
    base, model, _ = pair()
    with pytest.raises(HealingError, match="no token that follows"):
        measuring.distance(model, base, [{"input_ids": torch.tensor([[5]])}])
    other = pico.llama(vocab_size=64)
    with pytest.raises(HealingError, match="cannot be compared"):
        measuring.distance(other, base, [{"input_ids": torch.tensor([[5, 6]])}])


def test_distillation_trains_what_it_is_told_and_nears_the_base() -> None:
    base, model, edits = pair()
    before, far = copy.deepcopy(model.state_dict()), measuring.distance(model, base, rows()).kl
    history = distill(model, base, rows(), train=edits, max_steps=6, learning_rate=3e-2, logging_steps=1)
    assert len(history) == 6 and history[-1]["loss"] < history[0]["loss"]
    assert measuring.distance(model, base, rows()).kl < far
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{edit.name}.more.{key}" for edit in edits for key in ("weight", "bias")}
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(HealingError, match=r"'\*\*.nothing' names nothing"):
        distill(model, base, rows(), train="**.nothing", max_steps=1)
    with pytest.raises(HealingError, match="say what learns"):
        distill(model, base, rows())
    with pytest.raises(HealingError, match="the changed model itself"):
        distill(model, model, rows(), train="**")
    with pytest.raises(HealingError, match="no batches"):
        distill(model, base, [], train=edits)
