"""The chunked loss is the ordinary one: its value, the gradient of the rows, and of whatever trains in the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from solidify import losses
from solidify.adapter import lookup
from solidify.errors import ObjectiveError
from solidify.losses.chunking import chunked, trainable
from solidify.objective.objective import Objective, Term

ROWS, WIDTH, WORDS = 23, 8, 31


def data(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return rows.requires_grad_(), torch.randint(0, WORDS, (ROWS,), generator=generator)


def linear(dtype: torch.dtype = torch.float32, *, trained: bool = True) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(WIDTH, WORDS).to(dtype).requires_grad_(trained)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def soft_capped(head: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: 3 * torch.tanh(head(rows) * 0.7 / 3)


def gradients(loss: torch.Tensor, rows: torch.Tensor, head: nn.Module) -> list[torch.Tensor]:
    trained = [p for p in head.parameters() if p.requires_grad]
    return list(torch.autograd.grad(0.3 * loss + loss.square(), [rows, *trained]))  # not 1: it is scaled


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("size", [1, 5, 23, 100])
def test_it_is_the_ordinary_loss_in_float64(size: int, trained: bool) -> None:
    rows, labels = data(torch.float64)
    head = linear(torch.float64, trained=trained)
    for called in (head, soft_capped(head)):
        ordinary = cross_entropy(called(rows), labels)
        ours = chunked(rows, called, cross_entropy, [labels], size=size)
        assert ours.item() == pytest.approx(ordinary.item(), rel=1e-13)
        for a, b in zip(gradients(ours, rows, head), gradients(ordinary, rows, head), strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_its_gradient_is_that_of_finite_differences() -> None:
    head = linear(torch.float64)
    rows, labels = data(torch.float64)

    def loss(some: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return chunked(some, lambda r: r @ weight.T, cross_entropy, [labels[:6]], size=4)

    assert torch.autograd.gradcheck(loss, (rows[:6].detach().requires_grad_(), head.weight), fast_mode=True)


def test_a_second_backward_pass_sees_the_same_gradients() -> None:
    rows, labels = data()
    head = linear()
    loss = chunked(rows, head, cross_entropy, [labels], size=4)
    first = torch.autograd.grad(2 * loss, [rows, head.weight], retain_graph=True)
    second = torch.autograd.grad(loss, [rows, head.weight])
    assert all(torch.equal(a, 2 * b) for a, b in zip(first, second, strict=True))


def test_no_more_rows_than_a_chunk_ever_meet_the_head() -> None:
    rows, labels = data()
    head = linear()
    seen = []

    def watched(some: torch.Tensor) -> torch.Tensor:
        seen.append(len(some))
        return head(some)

    chunked(rows, watched, cross_entropy, [labels], size=6).backward()
    assert seen == [1, 6, 6, 6, 5]  # the first finds out what trains; the backward pass computes nothing
    assert head.weight.grad is not None


def test_the_whole_logits_are_in_no_graph() -> None:
    rows, labels = data()
    head = linear()
    kept: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = chunked(rows, head, cross_entropy, [labels], size=6)
    assert torch.Size([ROWS, WORDS]) not in kept
    loss.backward()


def test_nothing_to_predict_is_zero_with_a_graph() -> None:
    rows, labels = data()
    head = linear()
    loss = chunked(rows[:0], head, cross_entropy, [labels[:0]])
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_without_gradients_it_is_a_number() -> None:
    rows, labels = data()
    head = linear()
    with torch.no_grad():
        loss = chunked(rows, head, cross_entropy, [labels], size=4)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(cross_entropy(head(rows), labels).item(), rel=1e-6)
    frozen = chunked(rows.detach(), linear(trained=False), cross_entropy, [labels], size=4)
    assert not frozen.requires_grad


def test_rows_that_do_not_train_leave_the_head_its_gradient() -> None:
    rows, labels = data()
    head = linear()
    chunked(rows.detach(), head, cross_entropy, [labels], size=4).backward()
    ours = head.weight.grad.clone()
    head.weight.grad = None
    cross_entropy(head(rows.detach()), labels).backward()
    assert torch.allclose(ours, head.weight.grad, rtol=1e-5, atol=1e-6)


def test_half_precision_rows_meet_a_softmax_in_float32() -> None:
    rows, labels = data(torch.bfloat16)
    head = linear(torch.bfloat16)
    ours = chunked(rows, head, cross_entropy, [labels], size=5)
    ordinary = cross_entropy(head(rows).float(), labels)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(ordinary.item(), rel=1e-6)
    ours.backward()
    of_rows, of_head = rows.grad.clone(), head.weight.grad.clone()
    rows.grad = head.weight.grad = None
    ordinary.backward()
    assert torch.equal(of_rows, rows.grad)
    # Over chunks the head's gradient is added up in float32, so it is the nearer one: compare with float64.
    wide, wide_rows = linear(torch.bfloat16).double(), rows.detach().double()
    cross_entropy(wide(wide_rows), labels).backward()
    error = (of_head.double() - wide.weight.grad).norm() / wide.weight.grad.norm()
    assert error < 1e-2
    assert error <= 1.5 * (head.weight.grad.double() - wide.weight.grad).norm() / wide.weight.grad.norm()  # type: ignore[attr-defined]


def test_under_autocast_no_gradient_is_lost() -> None:
    rows, labels = data()
    head = linear()
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked(rows, head, cross_entropy, [labels], size=5)
        ordinary = cross_entropy(head(rows).float(), labels)
    found = gradients(ours, rows, head)
    for a, b in zip(found, gradients(ordinary, rows, head), strict=True):
        assert a.abs().sum() > 0
        assert torch.allclose(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_a_chunk_of_nothing_is_refused() -> None:
    rows, labels = data()
    with pytest.raises(ObjectiveError, match="at least one row"):
        chunked(rows, linear(), cross_entropy, [labels], size=0)


def with_lora() -> Any:
    model = get_peft_model(pico.llama(), LoraConfig(r=3, target_modules=["lm_head", "q_proj"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "frozen head": lambda: get_peft_model(pico.llama(), LoraConfig(r=3, target_modules=["q_proj"])),
    "head in full": pico.llama,
    "tied head": lambda: pico.llama(tie_word_embeddings=True),
    "LoRA on the head": with_lora,
    "experts": pico.olmoe,
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_term_is_the_models_own_loss(kind: str) -> None:
    """On ragged rows with masked labels, in every tensor that is trained, through the head or not."""
    batch = pico.collate(pico.ragged(6))
    count = int((batch["labels"][:, 1:] != -100).sum())

    def grads(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = MODELS[kind]()
    own = model(**batch).loss * count
    theirs = grads(model, own)
    model = MODELS[kind]()
    output = lookup.plain_model(model).base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    head = lookup.plain_model(model).lm_head
    loss = losses.next_token(chunk=7)(output.last_hidden_state, head, batch["labels"])
    ours = grads(model, loss)
    assert loss.item() == pytest.approx(own.item(), rel=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name
    if kind == "LoRA on the head":
        assert len(trainable(head, output.last_hidden_state[0])) == 2


def test_smoothed_labels_are_transformers_own() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    rows, labels = data()
    head = linear()
    hidden, wanted = rows[None].detach(), labels[None].clone()
    wanted[0, 3] = -100
    ours = losses.next_token(chunk=4, label_smoothing=0.2)(hidden, head, wanted)
    theirs = LabelSmoother(0.2)({"logits": head(hidden)}, wanted.clone(), shift_labels=True)
    assert ours.item() == pytest.approx(theirs.item() * (ROWS - 2), rel=1e-5)


def test_other_lengths_are_refused() -> None:
    rows, labels = data()
    with pytest.raises(ObjectiveError, match="one for one"):
        losses.next_token()(rows[None], linear(), labels[None, :-2])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "jensen_shannon_continuous"])
def test_distillation_in_chunks_is_distillation(divergence: str) -> None:
    rows, labels = data(torch.float64)
    head, teacher = linear(torch.float64), nn.Linear(12, WORDS).double()
    theirs = torch.randn(1, ROWS, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    wanted = labels[None].clone()
    wanted[0, 4:7] = -100
    ours = losses.chunked_distillation(divergence, temperature=1.7, beta=0.3, chunk=6)(
        rows[None], head, theirs, teacher, wanted
    )
    more = {"beta": 0.3} if divergence.startswith("jensen") else {}
    plain = getattr(losses, divergence)(temperature=1.7, **more)(head(rows[None]), teacher(theirs).detach(), wanted)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
    for a, b in zip(gradients(ours, rows, head), gradients(plain, rows, head), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert teacher.weight.grad is None
    with pytest.raises(ObjectiveError, match="divergence must be one of"):
        losses.chunked_distillation("total_variation")


def test_terms_that_need_hidden_states_say_so() -> None:
    term = Term(losses.next_token)
    assert term.asks == {"hidden_states", "head", "labels"}
    assert term.reduction == "token_sum"
    assert not Objective([term]).asks_for("logits", "outputs")
    assert Term(losses.chunked_distillation).asks_reference
