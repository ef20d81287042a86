"""Terms on weights against their formulas in float64, under PEFT and without."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.objective import Term
from training import awake


class Bag(nn.Module):
    """A few tensors to penalise."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.tall, self.flat, self.experts, self.vector = random(5, 3), random(2, 4), random(3, 2, 4), random(4)


def matrices(model: Bag, *names: str) -> list[torch.Tensor]:
    """Every matrix of the named parameters, experts one by one."""
    found = []
    for name in names or ("tall", "flat", "experts"):
        p = model.get_parameter(name).detach()
        found += list(p) if p.ndim == 3 else [p]
    return found


def check(term: Any, model: Bag, expected: float) -> None:
    """The value is what was expected, and the gradient is not zero and that of finite differences."""
    loss = term(model)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    tensors = list(model.parameters())
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0.01
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).double()
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor.add_(sign * 1e-6 * direction)
                    sides.append(term(model).item())
                    tensor.sub_(sign * 1e-6 * direction)
            slope = (sides[0] - sides[1]) / 2e-6
            assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("groups", ["rows", "columns", "experts", "tensors"])
def test_group_lasso_is_its_formula(groups: str) -> None:
    model = Bag()
    names = {"experts": ["experts"]}.get(groups, ["tall", "flat", "experts"])
    found: list[list[float]] = []
    for name in names:
        for matrix in [model.get_parameter(name).detach()] if groups == "tensors" else matrices(model, name):
            if groups == "rows":
                found += matrix.tolist()
            elif groups == "columns":
                found += matrix.T.tolist()
            else:
                found.append(matrix.flatten().tolist())
    expected = sum(math.sqrt(len(group) * sum(x * x for x in group)) for group in found)
    check(losses.group_lasso(groups, parameters=names), model, expected)


def test_a_group_at_zero_has_a_finite_gradient_and_minimising_empties_groups() -> None:
    model = Bag()
    with torch.no_grad():
        model.tall[1] = 0
    term = losses.group_lasso("rows", parameters="tall")
    term(model).backward()
    assert torch.isfinite(model.tall.grad).all()
    assert not model.tall.grad[1].any()
    optimizer = torch.optim.SGD([model.tall], lr=0.02)
    target = model.tall.detach() * torch.tensor([1.0, 1.0, 0.05, 1.0, 0.05]).double()[:, None]
    for _ in range(400):
        optimizer.zero_grad()
        ((model.tall - target).square().sum() + 0.3 * term(model)).backward()
        optimizer.step()
    norms = model.tall.detach().norm(dim=1)
    assert (norms[[1, 2, 4]] < 0.02).all()
    assert (norms[[0, 3]] > 0.3).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_orthogonality_is_its_formula(normalize: bool) -> None:
    model = Bag()
    expected = 0.0
    for matrix in matrices(model):
        w = F.normalize(matrix, dim=1) if normalize else matrix if len(matrix) <= len(matrix.T) else matrix.T
        products = w @ w.T
        expected += sum(
            (float(products[i, j]) - (i == j)) ** 2 for i in range(len(products)) for j in range(len(products))
        )
    check(losses.orthogonality(parameters=["tall", "flat", "experts"], normalize=normalize), model, expected)


def test_orthogonal_rows_cost_nothing() -> None:
    model = Bag()
    with torch.no_grad():
        nn.init.orthogonal_(model.tall)
    term = losses.orthogonality(parameters="tall")
    assert term(model).item() == pytest.approx(0.0, abs=1e-12)
    with torch.no_grad():
        model.flat.copy_(torch.eye(2, 4) * 7.0)
    assert losses.orthogonality(parameters="flat", normalize=True)(model).item() == pytest.approx(0.0, abs=1e-12)


def test_spectral_is_the_square_of_the_largest_singular_value() -> None:
    model = Bag()
    expected = sum(float(torch.linalg.svdvals(matrix)[0]) ** 2 for matrix in matrices(model))
    check(losses.spectral(parameters=["tall", "flat", "experts"], start=300), model, expected)


def test_power_iteration_goes_on_once_a_step_and_is_remembered() -> None:
    model = Bag()
    term = losses.spectral(parameters="tall", start=1)
    first = term(model).item()
    assert term(model).item() == first  # the same for all micro-batches of a step
    exact = float(torch.linalg.svdvals(model.tall.detach())[0]) ** 2
    found = [first]
    for _ in range(60):
        with torch.no_grad():
            model.tall.mul_(1 + 1e-9)  # an optimizer's step
        found.append(term(model).item())
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(found))
    assert found[0] < 0.999 * exact
    assert found[-1] == pytest.approx(exact, rel=1e-6)


def test_a_resumed_training_goes_on_where_it_stopped() -> None:
    model = Bag()
    terms = [Term(losses.spectral, arguments={"parameters": "tall", "start": 1}) for _ in range(2)]
    terms[0].subject(model)
    terms[1].load_state_dict(terms[0].state_dict())
    with torch.no_grad():
        model.tall[0] += 1.0
    values = [term.subject(model).item() for term in terms]
    assert values[0] == values[1]
    assert values[0] != Term(losses.spectral, arguments={"parameters": "tall", "start": 1}).subject(model).item()


def test_an_optimizers_step_is_noticed(trash_artifact: Path) -> None:
    model = awake(trash_artifact)
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds = ((torch.optim.SGD, {}), (torch.optim.AdamW, {"foreach": True}), (torch.optim.AdamW, {"fused": True}))
    for kind, more in kinds:
        term = losses.spectral(start=1)
        optimizer = kind(trained, lr=1e-6, **more)
        term(model).backward()
        before = {name: v.clone() for name, v in term.left.items()}
        term(model)
        assert all(torch.equal(before[name], v) for name, v in term.left.items())
        optimizer.step()
        term(model)
        assert any(not torch.equal(before[name], v) for name, v in term.left.items())
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["group_lasso", "orthogonality", "spectral"])
def test_under_peft_parts_of_an_update_are_matrices_of_their_own(trash_artifact: Path, name: str) -> None:
    model = awake(trash_artifact)
    parts = [p.detach().double() for n, p in model.named_parameters() if "lora_" in n]
    assert len(parts) == 4
    formula = {
        "group_lasso": lambda w: math.sqrt(w.shape[1]) * float(w.norm(dim=1).sum()),
        "orthogonality": lambda w: float(
            ((w @ w.T if len(w) <= len(w.T) else w.T @ w) - torch.eye(min(w.shape))).square().sum()
        ),
        "spectral": lambda w: float(torch.linalg.svdvals(w)[0]) ** 2,
    }[name]
    more = {"start": 300} if name == "spectral" else {}
    term = getattr(losses, name)(parameters="**.q_proj", **more)
    assert term(model).item() == pytest.approx(sum(map(formula, parts)), rel=1e-4)
    everything = getattr(losses, name)(**more)(model)  # vectors (the cans') are no matrices
    assert everything.item() == pytest.approx(sum(map(formula, parts)), rel=1e-4)
    everything.backward()
    for path, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == ("lora_" in path)


def test_what_has_no_such_groups_is_refused(trash_artifact: Path) -> None:
    model = Bag()
    for term, words in (
        (losses.group_lasso("rows", parameters="vector"), "is about matrices: vector is a vector"),
        (losses.orthogonality(parameters="vector"), "is about matrices"),
        (losses.spectral(parameters="vector"), "is about matrices"),
        (losses.group_lasso("experts", parameters=["tall", "experts"]), "tall has no dimension of experts"),
        (losses.spectral(parameters="nothing"), "names no parameter"),
    ):
        with pytest.raises(ObjectiveError, match=words):
            term(model)
    with pytest.raises(ObjectiveError, match="groups must be one of"):
        losses.group_lasso("heads")
    with pytest.raises(ObjectiveError, match="only vectors are trained"):
        losses.spectral()(awake(trash_artifact, train=["**.mlp.trash"]))


def test_half_precision_weights_are_penalised_in_float32() -> None:
    model = pico.llama(dtype=torch.bfloat16)
    for term in (losses.group_lasso(), losses.orthogonality(), losses.spectral(), losses.weight_penalty()):
        found = term(model)
        assert found.dtype == torch.float32
    exact = sum(float(p.detach().double().square().sum()) / 2 for p in model.parameters())
    assert found.item() == pytest.approx(exact, rel=1e-5)
