"""Attention, experts and torch.compile: what can be chosen and compiled on the base can be on the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import training
from clients import strangers

KINDS = {
    "attn_implementation": ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys(), "nonsense"],
    "experts_implementation": ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys(), "nonsense"],
}
CHOICES = [(kind, name) for kind, names in KINDS.items() for name in names]
WORKING = [
    ("attn_implementation", "eager"),
    ("attn_implementation", "sdpa"),
    ("experts_implementation", "eager"),
    ("experts_implementation", "batched_mm"),
    ("experts_implementation", "grouped_mm"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico OLMoE as it was before surgery."""
    directory = tmp_path_factory.mktemp("base")
    pico.olmoe().save_pretrained(directory)
    return directory


def choose(stranger: Callable[..., PreTrainedModel], directory: Path, how: str, kind: str, name: str) -> Any:
    """Loads a model with an implementation, or sets it afterwards; returns the model or the error's class."""
    try:
        if how == "at load":
            return strangers.aligned(stranger(directory, **{kind: name}))
        model = strangers.aligned(stranger(directory))
        getattr(model, f"set_{kind}")(name)
    except (ValueError, ImportError) as error:
        return type(error)
    return model


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=pico.tokens(), labels=pico.tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["at load", "afterwards"])
@pytest.mark.parametrize(("kind", "name"), CHOICES)
def test_an_implementation_is_taken_or_refused_as_on_the_base(
    trash_artifact: Path, base: Path, stranger: Callable[..., PreTrainedModel], how: str, kind: str, name: str
) -> None:
    wanted, found = (choose(stranger, directory, how, kind, name) for directory in (base, trash_artifact))
    if isinstance(wanted, type):
        assert (kind, name) not in WORKING
        assert found is wanted
    else:
        assert getattr(found.config, f"_{kind}") == getattr(wanted.config, f"_{kind}") == name


@pytest.mark.parametrize("how", ["at load", "afterwards"])
@pytest.mark.parametrize(("kind", "name"), WORKING)
def test_each_implementation_computes_what_it_computes_on_the_base(
    trash_artifact: Path, base: Path, stranger: Callable[..., PreTrainedModel], how: str, kind: str, name: str
) -> None:
    """The trash cans are asleep, so outputs and gradients of what both have are the base's, bit for bit.

    Only batched_mm adds up gradients in an order that differs from run to run, on the base too: there they are equal
    but for float32 rounding.
    """
    wanted, found = (choose(stranger, directory, how, kind, name) for directory in (base, trash_artifact))
    options = {"output_hidden_states": True, "output_router_logits": True, "output_attentions": name == "eager"}
    with torch.no_grad():
        expected, outputs = (model(input_ids=pico.tokens(), **options) for model in (wanted, found))
    assert torch.equal(outputs.logits, expected.logits)
    for field in ("hidden_states", "router_logits", "attentions"):
        assert len(outputs.get(field) or ()) == len(expected.get(field) or ())
        for a, b in zip(outputs.get(field) or (), expected.get(field) or (), strict=True):
            assert torch.equal(a, b)
    of_base, of_artifact = gradients(wanted), gradients(found)
    assert of_base and set(of_base) <= set(of_artifact)
    assert training.distance(of_base, of_artifact) <= (1e-6 if name == "batched_mm" else 0.0)


@pytest.mark.parametrize(("kind", "name"), WORKING)
def test_what_was_changed_computes_the_same_under_every_implementation(
    moe: Path, stranger: Callable[..., PreTrainedModel], kind: str, name: str
) -> None:
    """The tolerance is rounding: implementations sum in float32 in orders of their own."""
    with torch.no_grad():
        wanted = stranger(moe)(input_ids=pico.tokens()).logits
        found = stranger(moe, **{kind: name})(input_ids=pico.tokens()).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_attention_that_is_wrapped_is_reached_by_the_choice(
    dense: Path, stranger: Callable[..., PreTrainedModel]
) -> None:
    """The tolerance is rounding, as above; only eager attention has weights to show."""
    model = stranger(dense)
    with torch.no_grad():
        wanted = model(input_ids=pico.tokens()).logits
        model.set_attn_implementation("eager")
        outputs = model(input_ids=pico.tokens(), output_attentions=True)
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, 12, 12)] * 2
    torch.testing.assert_close(outputs.logits, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_artifact_compiles_into_one_graph(artifact: Path, stranger: Callable[..., PreTrainedModel]) -> None:
    """The tolerance is rounding: compiled, a trash can computes skipped slots too and weighs them with zero."""
    torch._dynamo.reset()
    model = stranger(artifact)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pico.tokens()).logits, model(pico.tokens()).logits, rtol=1e-5, atol=1e-6)


def breaks(module: torch.nn.Module) -> set[tuple[str, int]]:
    """Returns the source lines at which a block's graph breaks."""
    torch._dynamo.reset()
    with torch.no_grad():
        explained = torch._dynamo.explain(module)(torch.randn(2, 12, 32))
    lines = {(reason.user_stack[-1].filename, reason.user_stack[-1].lineno) for reason in explained.break_reasons}
    assert bool(lines) == bool(explained.graph_break_count)
    return lines


def test_where_the_base_breaks_the_graph_a_replaced_block_breaks_it_at_the_same_lines(
    moe: Path, base: Path, stranger: Callable[..., PreTrainedModel]
) -> None:
    """With eager experts the loop over experts cannot be traced; nothing else may break."""
    of_base, of_artifact = (stranger(d, experts_implementation="eager").model.layers[0].mlp for d in (base, moe))
    wanted = breaks(of_base)
    assert wanted
    assert breaks(of_artifact) == wanted
