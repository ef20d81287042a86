"""What a change was not asked to change has the values that it had, or the change is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import reaching
import torch
from torch import nn
from transformers import AutoTokenizer

import solidify
from solidify.builtin import tiny_olmoe
from solidify.errors import SurgeryError
from solidify.model.extent import Extent
from solidify.surgery import outside

MLP = "model.layers.*.mlp"


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def refusal(model: Any, write: Callable[[], None], change: Callable[[], object]) -> str:
    """Makes the change with a module that calls `write`; the model is afterwards as it was."""
    before, tensors = state_of(model), {name: id(p) for name, p in model.named_parameters()}
    reaching.REACHED["write"] = write
    try:
        with pytest.raises(SurgeryError) as caught:
            change()
    finally:
        reaching.REACHED.clear()
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return str(caught.value)


@pytest.mark.parametrize("module", [reaching.InConstructor, reaching.InAdopt, reaching.InForward])
@pytest.mark.parametrize("how", [reaching.scale, reaching.scale_in_place])
@pytest.mark.parametrize("verb", [solidify.replace, solidify.share])
def test_a_module_that_writes_elsewhere_is_refused_by_the_tensors_name(verb: Any, how: Any, module: type) -> None:
    model = pico.llama()
    said = refusal(model, lambda: how(model.lm_head.weight), lambda: verb(model, MLP, module))
    assert "lm_head.weight" in said and "embed_tokens" not in said


def test_a_tensor_put_in_anothers_place_is_seen() -> None:
    model = pico.llama()

    def write() -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)

    assert "lm_head.weight" in refusal(model, write, lambda: solidify.replace(model, MLP, reaching.InAdopt))

    def move() -> None:
        model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.detach() * 2

    assert "embed_tokens.weight" in refusal(model, move, lambda: solidify.replace(model, MLP, reaching.InAdopt))

    def drop() -> None:
        if hasattr(model.model, "norm"):
            del model.model.norm.weight

    assert "model.norm.weight" in refusal(model, drop, lambda: solidify.replace(model, MLP, reaching.InAdopt))


def test_a_buffer_of_another_module_is_a_tensor_too() -> None:
    model = pico.llama()
    model.model.norm.register_buffer("taper", torch.ones(1))

    def write() -> None:
        model.model.norm.taper.mul_(2)

    assert "model.norm.taper" in refusal(model, write, lambda: solidify.replace(model, MLP, reaching.InConstructor))


def test_a_buffer_that_a_forward_moves_is_none() -> None:
    model = pico.llama()
    model.model.norm.register_buffer("seen", torch.zeros(1))
    reaching.REACHED["counter"] = model.model.norm
    solidify.replace(model, MLP, reaching.Counting)
    reaching.REACHED.clear()
    assert float(model.model.norm.seen) == 0


def test_a_tied_tensor_belongs_to_both() -> None:
    """The head's weight is that of the embeddings, which are not replaced."""
    tied = pico.llama(tie_word_embeddings=True)
    change = lambda: solidify.replace(tied, "lm_head", reaching.OwnScaled)  # noqa: E731
    assert "model.embed_tokens.weight" in refusal(tied, lambda: None, change)


def test_what_a_module_takes_over_it_may_change() -> None:
    model = pico.llama()
    (edit,) = solidify.replace(model, "lm_head", reaching.OwnScaled)
    assert edit.tensors == {"lm_head.weight": None}


def test_what_is_taken_over_is_not_written_to_once_it_is_recorded() -> None:
    model = pico.llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    change = lambda: solidify.replace(model, "model.layers.0.mlp", reaching.LateInForward)  # noqa: E731
    assert "model.layers.0.mlp.up_proj.weight" in refusal(model, lambda: reaching.scale(weight), change)


def test_a_head_writes_nowhere() -> None:
    model = pico.llama()
    change = lambda: solidify.add(model, "head", reaching.Head, reads="model.norm")  # noqa: E731
    assert "lm_head.weight" in refusal(model, lambda: reaching.scale(model.lm_head.weight), change)


@pytest.mark.parametrize("verb", ["insert", "remove", "mask", "rearrange_experts", "add_tokens"])
def test_other_operations_write_nowhere_else(verb: str) -> None:
    """A hook writes to a tensor that the model's outputs do not show, while the change is tried."""
    model = pico.olmoe(vocab_size=512)
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe.directory())
    changes: dict[str, Callable[[], object]] = {
        "insert": lambda: solidify.insert(model, "model.layers.0"),
        "remove": lambda: solidify.remove(model, "model.layers.0"),
        "mask": lambda: solidify.mask(model, "window", window=3),
        "rearrange_experts": lambda: solidify.rearrange_experts(model, MLP, [1, 0, 2, 3, 4, 5, 6, 7]),
        "add_tokens": lambda: solidify.add_tokens(model, tokenizer, ["<new>"]),
    }
    model.model.norm.unseen = nn.Parameter(torch.ones(3))
    model.model.register_forward_hook(lambda *_: reaching.scale(model.model.norm.unseen))
    with pytest.raises(SurgeryError, match=r"model\.norm\.unseen"):
        changes[verb]()


def bounded(tmp_path: Path, *, mapped: bool) -> Any:
    """A model of which no copies of values are kept: in memory, or mapped from its file."""
    model = pico.llama(vocab_size=2048)
    model.save_pretrained(tmp_path)
    return type(model).from_pretrained(tmp_path) if mapped else model


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("how", [reaching.scale, reaching.scale_in_place])
def test_of_a_large_model_it_is_seen_too(tmp_path: Path, how: Any, mapped: bool) -> None:
    model = bounded(tmp_path, mapped=mapped)
    extent = Extent(whole=False)
    assert solidify.replace(bounded(tmp_path, mapped=mapped), MLP, pico.wrappers.Scaled, extent=extent)
    reaching.REACHED["write"] = lambda: how(model.lm_head.weight)
    with pytest.raises(SurgeryError, match=r"lm_head\.weight") as caught:
        solidify.replace(model, MLP, reaching.InAdopt, extent=extent)
    reaching.REACHED.clear()
    assert "must be loaded again: lm_head.weight" in " ".join(caught.value.__notes__)
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (127,), (40, 30), (3, 5, 7, 11)])
def test_a_sample_has_the_same_few_values_however_a_tensor_lies(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    turned = tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    assert outside.take_sample(tensor).numel() <= 64
    assert torch.equal(outside.take_sample(tensor), outside.take_sample(turned))
