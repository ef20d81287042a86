"""Terms on what modules return, against their formulas in float64."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.capture import capture
from solidify.objective.objective import Term

MASK = torch.tensor([1] * 9 + [0] * 3)


def layers(seed: int, width: int = 5, count: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}": torch.randn(2, 6, width, generator=generator, dtype=torch.float64).to(dtype)
        for i in range(count)
    }


def value(term: Any, **supply: Any) -> torch.Tensor:
    return term.value(term.statistics(**supply) / 9)


@pytest.mark.parametrize("cosine", [0.0, 0.7])
def test_the_distance_is_relative_per_token(cosine: float) -> None:
    ours, theirs = layers(0), layers(1)
    expected = 0.0
    for name in ours:
        for place in range(9):
            a, b = ours[name].reshape(12, 5)[place], theirs[name].reshape(12, 5)[place]
            expected += float(((a - b) ** 2).sum() / ((b**2).sum() + 1e-6)) / 18
            expected += cosine * (1 - float(a @ b / (a.norm() * b.norm()))) / 18
    term = losses.hidden_match("model.layers.*", cosine=cosine)
    found = value(term, hidden=ours, reference_hidden=theirs, mask=MASK)
    assert found.item() == pytest.approx(expected, rel=1e-10)
    assert value(term, hidden=theirs, reference_hidden=theirs, mask=MASK).item() == pytest.approx(0.0, abs=1e-12)


def test_it_is_the_same_at_every_scale_and_blind_to_padding() -> None:
    term = losses.hidden_match("model.layers.*", cosine=0.5, epsilon=0.0)
    ours, theirs = layers(0), layers(1)
    first = value(term, hidden=ours, reference_hidden=theirs, mask=MASK)
    for tensor in (*ours.values(), *theirs.values()):
        tensor.mul_(1000.0).view(12, 5)[9:] = float("nan")
    assert value(term, hidden=ours, reference_hidden=theirs, mask=MASK).item() == pytest.approx(first.item(), rel=1e-10)


def test_its_gradient_goes_to_the_model_alone() -> None:
    ours, theirs = layers(0, count=1), layers(1, count=1)
    term = losses.hidden_match("model.layers.*", cosine=0.5)
    (leaf,), (other,) = ours.values(), theirs.values()
    leaf.requires_grad_(), other.requires_grad_()

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return value(term, hidden={"model.layers.0": tensor}, reference_hidden=theirs, mask=MASK)

    assert torch.autograd.gradcheck(of, (leaf,), fast_mode=True)
    of(leaf).backward()
    assert leaf.grad.abs().sum() > 0.1
    assert other.grad is None


def test_layers_are_paired_in_order_or_by_name_and_never_by_guessing() -> None:
    ours, theirs = layers(0), layers(1, count=4)
    with pytest.raises(ObjectiveError, match="2 layers of the model, 4 of the reference; say in `pairs`"):
        value(losses.hidden_match("model.layers.*"), hidden=ours, reference_hidden=theirs, mask=MASK)
    pairs = {"model.layers.0": "model.layers.1", "model.layers.1": "model.layers.3"}
    found = value(losses.hidden_match("m", pairs=pairs), hidden=ours, reference_hidden=theirs, mask=MASK)
    picked = {"model.layers.1": theirs["model.layers.1"], "model.layers.3": theirs["model.layers.3"]}
    again = value(losses.hidden_match("m"), hidden=ours, reference_hidden=picked, mask=MASK)
    assert found.item() == again.item()
    for wrong in ({"model.layers.0": "model.layers.1"}, {**pairs, "model.layers.1": "model.layers.9"}):
        with pytest.raises(ObjectiveError, match=r"do not agree on model\.layers"):
            value(losses.hidden_match("m", pairs=wrong), hidden=ours, reference_hidden=theirs, mask=MASK)


def test_other_widths_are_refused_with_what_to_do() -> None:
    with pytest.raises(ObjectiveError, match=r"is 5 wide and the reference's model\.layers\.0 7; add a projection"):
        value(losses.hidden_match("m"), hidden=layers(0), reference_hidden=layers(1, width=7), mask=MASK)


class Projection(torch.nn.Module):
    """Maps a layer's output to a teacher's width."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(config.hidden_size, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states)


def test_a_projection_in_the_model_bridges_widths_and_is_trained() -> None:
    student, teacher = pico.llama(), pico.llama(hidden_size=48, num_hidden_layers=3, seed=2)
    solidify.add(student, "projection", Projection, reads="model.layers.0", arguments={"width": 48})
    term = losses.hidden_match("projection", reference_layers="model.layers.1")
    batch = {"input_ids": pico.tokens(2, 6)}
    with capture(student, term.captures) as ours, torch.no_grad(), capture(teacher, term.reference_captures) as theirs:
        teacher(**batch)
        with torch.enable_grad():
            student(**batch)
    found = value(term, **ours, **theirs, mask=torch.ones(12))
    found.backward()
    assert student.projection.linear.weight.grad.abs().sum() > 0
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["l1", "hoyer", "zeros"])
def test_sparsity_is_its_formula(kind: str) -> None:
    activations = layers(3)
    for tensor in activations.values():
        tensor[tensor.abs() < 0.3] = 0
    expected = 0.0
    for tensor in activations.values():
        for row in tensor.reshape(12, 5)[:9].tolist():
            size, squares = sum(map(abs, row)), sum(x * x for x in row)
            one = {"l1": size / 5, "hoyer": size**2 / squares / 5, "zeros": sum(x == 0 for x in row) / 5}
            expected += one[kind] / 18
    term = losses.activation_sparsity("model.layers.*", kind=kind)
    assert value(term, activations=activations, mask=MASK).item() == pytest.approx(expected, rel=1e-6)


def test_hoyer_is_between_one_and_its_width_and_no_scale_changes_it() -> None:
    term = losses.activation_sparsity("a", kind="hoyer")
    mask = torch.ones(1)
    alone, even = torch.zeros(1, 1, 8), torch.full((1, 1, 8), -3.0)
    alone[..., 2] = 5.0
    assert term.value(term.statistics({"a": alone}, mask)).item() == pytest.approx(1 / 8)
    assert term.value(term.statistics({"a": even}, mask)).item() == pytest.approx(1.0)
    assert term.value(term.statistics({"a": torch.zeros(1, 1, 8)}, mask)).item() == 0


@pytest.mark.parametrize("kind", ["l1", "hoyer"])
def test_minimising_it_makes_activations_sparser(kind: str) -> None:
    term = losses.activation_sparsity("a", kind=kind)
    activations = layers(4, width=16, count=1)["model.layers.0"].requires_grad_()

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return value(term, activations={"a": tensor}, mask=MASK)

    assert torch.autograd.gradcheck(of, (activations,), fast_mode=True)
    (gradient,) = torch.autograd.grad(of(activations), activations)
    assert gradient.abs().sum() > 0
    assert of(activations - 0.1 * gradient) < of(activations)


def test_what_is_not_one_row_a_token_is_refused() -> None:
    term = losses.activation_sparsity("a")
    with pytest.raises(ObjectiveError, match="not one row for each of the batch's 12 positions"):
        term.statistics({"a": torch.randn(5, 4)}, MASK)
    with pytest.raises(ObjectiveError, match="returned tuple, not a tensor"):
        term.statistics({"a": (torch.randn(12, 4),)}, MASK)
    with pytest.raises(ObjectiveError, match="kind must be one of l1, hoyer, zeros"):
        losses.activation_sparsity("a", kind="l0")


def test_both_are_linear_statistics() -> None:
    match = Term(losses.hidden_match, arguments={"layers": "model.layers.*"})
    assert (match.reduction, match.needs_prepass, match.asks_reference) == ("statistic", False, True)
    sparse = Term(losses.activation_sparsity, arguments={"modules": "**.act_fn"})
    assert (sparse.reduction, sparse.needs_prepass) == ("statistic", False)
