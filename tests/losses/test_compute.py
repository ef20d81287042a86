"""The prior against its formula, and the controller's wake-up against every split of a window."""

from __future__ import annotations

import math
from typing import Any

import pico
import pytest
import torch

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.losses.compute import WIDTH
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.objective.objective import Term

MASK = torch.tensor([1] * 15 + [0] * 5)


def margins(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"model.layers.{i}.mlp.trash": torch.randn(20, 2, generator=generator).double() for i in range(3)}


def value(term: Any, trash: dict[str, torch.Tensor]) -> torch.Tensor:
    return term.value(term.statistics(trash, MASK) / 15)


@pytest.mark.parametrize(("target", "concentration", "temperature"), [(0.3, 1.0, 1.0), (0.75, 4.0, 0.5)])
def test_the_prior_is_that_of_a_beta_distribution(target: float, concentration: float, temperature: float) -> None:
    """By a and b, as Beta's density has them, up to what does not depend on the kept share."""
    a, b = (1 - target) * concentration + 1, target * concentration + 1
    lowest = -((a - 1) * math.log(1 - target) + (b - 1) * math.log(target))
    expected = 0.0
    for margin in margins().values():
        kept = (1 / (1 + torch.exp(-margin[:15] / temperature))).mean().item()
        expected += (-((a - 1) * math.log(1 - kept) + (b - 1) * math.log(kept)) - lowest) / 3
    term = losses.beta_prior(target, concentration=concentration, temperature=temperature)
    assert value(term, margins()).item() == pytest.approx(expected, rel=1e-9)
    assert term.value(torch.full((3,), target)).item() == pytest.approx(0.0, abs=1e-6)
    for other in (0.5 * target, 0.5 * (1 + target)):
        assert term.value(torch.full((3,), other)).item() > 0


def test_the_kept_share_is_the_mean_over_slots_tokens_and_layers() -> None:
    expected = torch.stack([torch.sigmoid(m[:15] / 2.0).mean() for m in margins().values()]).mean()
    assert value(losses.kept_share(temperature=2.0), margins()).item() == pytest.approx(expected.item(), rel=1e-12)


def test_its_gradient_pulls_the_kept_share_to_the_target() -> None:
    for target, sign in ((0.1, 1), (0.9, -1)):
        term = losses.beta_prior(target)
        margin = margins()["model.layers.0.mlp.trash"].requires_grad_()
        assert torch.autograd.gradcheck(lambda m, t=term: value(t, {"t": m}), (margin,), fast_mode=True)
        (gradient,) = torch.autograd.grad(value(term, {"t": margin}), margin)
        assert (sign * gradient[:15] > 0).all()
        assert not gradient[15:].any()


def test_all_or_nothing_kept_is_finite_and_targets_are_shares() -> None:
    for margin in (torch.full((20, 2), 1e4), torch.full((20, 2), -1e4)):
        assert torch.isfinite(value(losses.beta_prior(0.5), {"t": margin}))
    with pytest.raises(ObjectiveError, match=r"beta_prior: target \(the share"):
        losses.beta_prior(0.0)
    with pytest.raises(ObjectiveError, match="concentration must be above 0"):
        losses.beta_prior(0.5, concentration=0.0)
    assert Term(losses.beta_prior, arguments={"target": 0.5}).needs_prepass


def asleep(tokens: int = 64) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """Returns a model with trash cans asleep, the margins of a window, and its mask."""
    model = pico.olmoe()
    solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    generator = torch.Generator().manual_seed(1)
    trash = {}
    for i, layer in enumerate(model.model.layers):
        logits = 2 * torch.randn(tokens, 8, generator=generator)
        trash[f"model.layers.{i}.mlp.trash"] = layer.mlp.trash(torch.zeros(tokens, 32), logits, logits.topk(4).indices)
    return model, trash, torch.arange(tokens) % 7 != 0


@pytest.mark.parametrize("start", [0.005, 0.1, 0.5])
def test_the_wake_up_does_not_depend_on_the_split(start: float) -> None:
    thresholds = {}
    for pieces in (1, 2, 8):
        model, trash, mask = asleep()
        controller = losses.trash_controller(0.5, start=start)
        sums = sum(
            controller.statistics({n: m.chunk(pieces)[i] for n, m in trash.items()}, mask.chunk(pieces)[i])
            for i in range(pieces)
        )
        controller.after_step(model, sums / int(mask.sum()), 1, 100)
        thresholds[pieces] = [float(layer.mlp.trash.bias) for layer in model.model.layers]
    assert thresholds[1] == thresholds[2] == thresholds[8]  # bit for bit
    for threshold, margin in zip(thresholds[1], trash.values(), strict=True):
        log_p = (margin.detach()[mask] - 1e4).flatten()
        quantile = float(log_p.sort().values[int(start * log_p.numel())])
        assert threshold <= quantile < threshold + WIDTH
        assert (log_p < threshold).float().mean() <= start


def test_quantiles_of_pieces_averaged_would_depend_on_it() -> None:
    """The fault that counting avoids."""
    _, trash, mask = asleep()
    margin = next(iter(trash.values())).detach()
    whole = torch.quantile(margin[mask].flatten(), 0.005)
    pieces = [torch.quantile(m[k].flatten(), 0.005) for m, k in zip(margin.chunk(8), mask.chunk(8), strict=True)]
    assert abs(torch.stack(pieces).mean() - whole) > 4 * WIDTH


def test_nothing_attended_leaves_a_can_asleep_and_awake_cans_keep_their_count() -> None:
    model, trash, mask = asleep()
    controller = losses.trash_controller(0.5)
    sums = controller.statistics(trash, torch.zeros_like(mask))
    controller.after_step(model, sums, 1, 100)
    assert all(float(layer.mlp.trash.bias) == -1e4 for layer in model.model.layers)
    awake = {name: m.detach() - 1e4 + 3 for name, m in trash.items()}
    sums = controller.statistics(awake, mask)
    assert not sums[:, 2:].any()
    for row, margin in zip(sums, awake.values(), strict=True):
        assert row[:2].tolist() == [int((margin[mask] >= 0).sum()), margin[mask].numel()]
