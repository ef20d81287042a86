"""Every term against a reference in float64, and its invariants."""

from __future__ import annotations

import math
from pathlib import Path

import pico
import pytest
import torch

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from training import awake


def means(term: object, count: float, **supply: object) -> torch.Tensor:
    return term.value(term.statistics(**supply) / count)  # type: ignore[attr-defined]


def margins(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"model.layers.{i}.mlp.trash": torch.randn(20, 2, generator=generator) for i in range(3)}


def routing(seed: int = 0, experts: int = 8) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for i in range(3):
        logits = torch.randn(20, experts, generator=generator)
        result[f"model.layers.{i}.mlp.gate"] = (logits, *logits.softmax(-1).topk(2))
    return result


MASK = torch.tensor([1] * 15 + [0] * 5)


def test_the_budget_is_the_squared_distance_of_the_soft_kept_share() -> None:
    expected = 0.0
    for margin in margins().values():
        soft = 1 / (1 + torch.exp(-margin[:15].double()))
        expected += (float(soft.mean()) - 0.3) ** 2 / 3
    found = means(losses.trash_budget(0.3), 15, trash=margins(), mask=MASK)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_load_balance_is_per_layer_and_leaves_trashed_slots_out() -> None:
    expected = 0.0
    for (logits, _, index), margin in zip(routing().values(), margins().values(), strict=True):
        counts = torch.zeros(8, dtype=torch.float64)
        for token in range(15):
            for place in range(2):
                if margin[token, place] >= 0:
                    counts[index[token, place]] += 1
        probabilities = logits[:15].double().softmax(-1).mean(0)
        expected += float(8 * (counts / counts.sum() * probabilities).sum()) / 3
    found = means(losses.load_balance(), 15, router=routing(), trash=margins(), mask=MASK)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_without_a_trash_can_it_is_the_switch_loss() -> None:
    found = means(losses.load_balance(), 15, router=routing(), trash={}, mask=MASK)
    expected = 0.0
    for logits, _, index in routing().values():
        shares = torch.bincount(index[:15].flatten(), minlength=8).double() / 15
        expected += float(8 / 2 * (shares * logits[:15].double().softmax(-1).mean(0)).sum()) / 3
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_perfect_balance_is_one_and_collapse_is_seen_in_every_layer() -> None:
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    def layer(experts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.full((16, 8), -20.0)
        logits[:, experts] = 0.0
        return logits, *logits.softmax(-1).topk(2)

    uniform = torch.stack([torch.tensor([2 * (t % 4), 2 * (t % 4) + 1]) for t in range(16)])
    even = {"a.gate": (torch.zeros(16, 8), torch.full((16, 2), 0.125), uniform)}
    mask = torch.ones(16)
    assert float(means(losses.load_balance(), 16, router=even, trash={}, mask=mask)) == pytest.approx(1.0)
    collapsed = {f"{i}.gate": layer([2 * i, 2 * i + 1]) for i in range(4)}
    ours = float(means(losses.load_balance(), 16, router=collapsed, trash={}, mask=mask))
    pooled = float(load_balancing_loss_func(tuple(o[0] for o in collapsed.values()), 8, 2))
    assert ours == pytest.approx(4.0, rel=1e-3)  # as bad as it gets: 8 experts, 2 used
    assert pooled == pytest.approx(2.0, rel=1e-3)  # what transformers calls perfect for top-2


def test_the_z_loss_is_the_squared_log_partition() -> None:
    expected = sum(float(o[0][:15].double().logsumexp(-1).square().mean()) / 3 for o in routing().values())
    found = means(losses.router_z(), 15, router=routing(), mask=MASK)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_summed_over_target_tokens(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, base = (torch.randn(2, 6, 11, generator=generator) for _ in range(2))
    labels = torch.tensor([[1, 2, 3, -100, 5, 6], [-100, -100, 3, 4, 5, -100]])
    expected = 0.0
    for row in range(2):
        for place in range(5):
            if labels[row, place + 1] != -100:
                p = (base[row, place].double() / temperature).softmax(-1)
                q = (ours[row, place].double() / temperature).softmax(-1)
                expected += temperature**2 * float((p * (p / q).log()).sum())
    term = losses.forward_kl(temperature)
    assert float(term(ours, base, labels)) == pytest.approx(expected, rel=1e-5)
    assert abs(float(term(base, base, labels))) < 1e-5


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_penalty_is_over_what_is_trained_once(trash_artifact: Path, norm: str) -> None:
    model = awake(trash_artifact)
    trained = [p.detach().double() for p in model.parameters() if p.requires_grad]
    expected = sum(float((p.square().sum() / 2) if norm == "l2" else p.abs().sum()) for p in trained)
    assert losses.weight_penalty(norm=norm)(model).item() == pytest.approx(expected, rel=1e-5)


def test_the_penalty_reads_names_of_the_plain_model_and_skips_frozen_twins(trash_artifact: Path) -> None:
    model = awake(trash_artifact)
    term = losses.weight_penalty(parameters="model.layers.*.mlp.trash.weight")
    copies = [p for n, p in model.named_parameters() if "trash.modules_to_save" in n]
    assert len(copies) == 2
    assert term(model).item() == pytest.approx(sum((p**2).sum().item() / 2 for p in copies), rel=1e-5)
    term(model).backward()
    assert all(torch.allclose(p.grad, p) for p in copies)
    plain = solidify.load(trash_artifact)
    assert losses.weight_penalty(parameters="model.norm.weight")(plain).item() == pytest.approx(16.0)


def test_penalties_of_nothing_are_refused(trash_artifact: Path) -> None:
    with pytest.raises(ObjectiveError, match="names no parameter"):
        losses.weight_penalty(parameters="no.such")(solidify.load(trash_artifact))
    with pytest.raises(ObjectiveError, match="must be l1 or l2"):
        losses.weight_penalty(norm="l3")
    frozen = solidify.load(trash_artifact).requires_grad_(False)
    with pytest.raises(ObjectiveError, match="nothing to penalise"):
        losses.weight_penalty()(frozen)


@pytest.mark.parametrize("target", [0.25, 0.5, 0.9])
def test_the_controller_converges_on_synthetic_logits(target: float) -> None:
    """Fresh random routing in every step; the kept share must end within a hundredth of the target."""
    from solidify.modules.trashcan_moe import TrashCanMoE

    model = pico.olmoe()
    solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    controller = losses.trash_controller(target)
    cans = {f"model.layers.{i}.mlp.trash": layer.mlp.trash for i, layer in enumerate(model.model.layers)}
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(512)
    kept = []
    for step in range(1, 301):
        trash = {}
        for name, can in cans.items():
            logits = 2 * torch.randn(512, 8, generator=generator)
            trash[name] = can(torch.zeros(512, 32), logits, logits.topk(4).indices)
        controller.after_step(model, controller.statistics(trash, mask) / 512, step, 300)
        kept.append(sum(float((m >= 0).float().mean()) for m in trash.values()) / 2)
    assert kept[0] == 1.0
    assert sum(kept[-50:]) / 50 == pytest.approx(target, abs=0.01)
    assert all(math.isfinite(float(can.bias)) for can in cans.values())
