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
from transformers import AutoTokenizer, GenerationMixin

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


def hook(*_: Any) -> None:
    """Does nothing."""


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def exchange(model: Any) -> None:
    layers = vars(model.model.layers)["_modules"]
    layers["0"] = layers.pop("0")


def identity(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x


ALTERED: dict[str, tuple[Callable[[Any], object], str]] = {
    "an attribute": (lambda m: setattr(m.model.norm, "variance_epsilon", 1.0), "model.norm.variance_epsilon"),
    "a new attribute": (lambda m: setattr(m.model.norm, "extra", 1), "model.norm.extra"),
    "an attribute that is gone": (
        lambda m: vars(m.model.norm).pop("variance_epsilon", 0),
        "model.norm.variance_epsilon",
    ),
    "a mode": (lambda m: m.model.norm.train(not m.training), "model.norm.training"),
    "a hook": (lambda m: m.model.norm.register_forward_hook(hook), "model.norm._forward_hooks"),
    "a hook before": (lambda m: m.register_forward_pre_hook(hook), "_forward_pre_hooks"),
    "a hook of a tensor": (lambda m: m.model.norm.weight.register_hook(hook), "model.norm.weight"),
    "a flag": (lambda m: m.lm_head.requires_grad_(False), "lm_head.weight"),
    "a tensor": (lambda m: m.lm_head.register_parameter("bias", nn.Parameter(torch.zeros(64))), "lm_head.bias"),
    "a buffer": (lambda m: m.model.norm.register_buffer("extra", torch.zeros(2)), "model.norm.extra"),
    "an unsaved buffer": (lambda m: m.model.rotary_emb.inv_freq.mul_(2), "model.rotary_emb.inv_freq"),
    "a child": (lambda m: setattr(m.model, "norm", nn.Identity()), "model.norm"),
    "a new child": (lambda m: m.model.norm.add_module("extra", nn.Identity()), "model.norm.extra"),
    "a class": (lambda m: setattr(m.model.norm, "__class__", nn.RMSNorm), "model.norm.__class__"),
    "a forward": (lambda m: setattr(m.model.norm, "forward", identity.__get__(m.model.norm)), "model.norm.forward"),
    "a forward of the class": (lambda m: setattr(type(m.model.norm), "forward", identity), "LlamaRMSNorm.forward"),
    "a configuration": (lambda m: setattr(m.config, "hidden_act", "relu"), "config.hidden_act"),
    "a key of a configuration": (lambda m: setattr(m.config, "extra", 1), "config.extra"),
    "inside a configuration": (lambda m: m.config.rope_parameters.update(rope_theta=3.0), "config.rope_parameters"),
    "a generation": (lambda m: setattr(m.generation_config, "top_k", 3), "generation_config.top_k"),
    "the order of layers": (exchange, "model.layers (the order of its modules)"),
    "a constructor of a class": (lambda m: setattr(type(m.model.norm), "__init__", identity), "LlamaRMSNorm.__init__"),
    "a mixin": (lambda m: setattr(GenerationMixin, "generate", identity), "GenerationMixin.generate"),
    "a tie": (untie, "lm_head.weight"),
}


@pytest.mark.parametrize("module", [reaching.InConstructor, reaching.InAdopt])
@pytest.mark.parametrize("what", ALTERED)
def test_what_a_constructor_or_adopt_alters_elsewhere_is_refused_by_name(what: str, module: type) -> None:
    alter, name = ALTERED[what]
    model = pico.llama(tie_word_embeddings=what == "a tie")
    layers, generate = [*model.model.layers], GenerationMixin.generate
    kinds = {type(part): (type(part).forward, type(part).__init__) for part in model.modules()}
    attributes, config = dict(vars(model.model.norm)), model.config.to_dict()
    said = refusal(model, lambda: alter(model), lambda: solidify.replace(model, MLP, module))
    assert name in said and "outside what is changed" in said
    assert model.config.to_dict() == config and vars(model.model.norm) == attributes
    assert all((kind.forward, kind.__init__) == before for kind, before in kinds.items())
    assert [*model.model.layers] == layers and GenerationMixin.generate is generate and torch.is_grad_enabled()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (what == "a tie")


def test_gradients_that_a_constructor_switches_off_are_told() -> None:
    model = pico.llama()
    change = lambda: solidify.replace(model, MLP, reaching.InConstructor)  # noqa: E731
    assert "whether torch records gradients" in refusal(model, lambda: torch.set_grad_enabled(False), change)
    assert torch.is_grad_enabled()


def test_a_hook_that_a_head_puts_on_what_it_reads_is_refused() -> None:
    model = pico.llama()
    read = model.model.layers[1]
    change = lambda: solidify.add(model, "head", reaching.Head, reads="model.layers.1")  # noqa: E731
    assert "model.layers.1._forward_hooks" in refusal(model, lambda: read.register_forward_hook(hook), change)


def test_a_head_that_joins_alters_the_model_alone() -> None:
    alter, name = ALTERED["an attribute"]
    model = pico.llama()
    change = lambda: solidify.add(model, "head", reaching.Joining, reads="model.norm")  # noqa: E731
    assert name in refusal(model, lambda: alter(model), change)
    reaching.REACHED["write"] = lambda: None
    assert solidify.add(model, "head", reaching.Joining, reads="model.norm")
    reaching.REACHED.clear()
    assert model.joined == "head"


def test_a_hook_on_gradients_that_was_taken_off_is_none() -> None:
    model = pico.llama()
    reaching.REACHED["write"] = lambda: model.model.norm.register_full_backward_hook(hook).remove()
    assert solidify.replace(model, MLP, reaching.InAdopt)
    reaching.REACHED.clear()


@pytest.mark.parametrize("what", ["a hook", "an attribute", "a configuration", "a new child", "a tensor", "a tie"])
def test_a_head_alters_nothing_elsewhere(what: str) -> None:
    alter, name = ALTERED[what]
    model = pico.llama(tie_word_embeddings=what == "a tie")
    said = refusal(
        model, lambda: alter(model), lambda: solidify.add(model, "head", reaching.Head, reads="model.layers.1")
    )
    assert name in said


def test_a_forward_makes_no_tensors_elsewhere() -> None:
    alter, name = ALTERED["a tensor"]
    model = pico.llama()
    assert name in refusal(model, lambda: alter(model), lambda: solidify.replace(model, MLP, reaching.InForward))


def test_what_is_put_back_or_equal_is_not_altered() -> None:
    model = pico.llama()
    reaching.REACHED["model"] = model
    edits = solidify.replace(model, MLP, reaching.Calibrated)
    reaching.REACHED.clear()
    assert [model.get_submodule(edit.name).seen for edit in edits] == [5, 5]


def test_what_a_forward_that_is_tried_alone_alters_is_refused() -> None:
    alter, name = ALTERED["a hook"]
    model = pico.llama()
    assert name in refusal(model, lambda: alter(model), lambda: solidify.replace(model, MLP, reaching.InForward))


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("verb", [solidify.replace, solidify.share, solidify.add])
def test_what_no_weight_file_holds_is_refused_by_its_name(verb: Any, buffer: bool) -> None:
    model = pico.llama()
    at: dict[str, Any] = {"reads": "model.norm"} if verb is solidify.add else {}
    with pytest.raises(SurgeryError, match=r"\.kept is a sparse tensor .* keep its values and its indices"):
        verb(model, "head" if at else MLP, reaching.Sparse, arguments={"buffer": buffer}, **at)


@pytest.mark.parametrize("verb", [solidify.replace, solidify.add])
def test_a_tensor_without_values_is_refused_by_its_name(verb: Any) -> None:
    model = pico.llama()
    at: dict[str, Any] = {"reads": "model.norm"} if verb is solidify.add else {}
    with pytest.raises(SurgeryError, match=r"\.kept is a tensor without values"):
        verb(model, "head" if at else MLP, reaching.Sparse, arguments={"device": "meta"}, **at)


def test_a_class_may_keep_something_in_itself() -> None:
    model = pico.llama()
    for name in ("model.layers.0.mlp", "model.layers.1.mlp"):  # the second time, the model holds one
        solidify.replace(model, name, reaching.Numbered)
    assert reaching.Numbered.made >= 2


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


def test_a_write_past_the_sample_is_seen_in_a_page_that_was_written_to_before(tmp_path: Path) -> None:
    """A value of a mapped tensor was written and written back: its page is the process's own since."""
    model = bounded(tmp_path, mapped=True)
    weight = model.lm_head.weight
    before = float(weight.detach()[5, 5])
    for value in (1.0, before):
        weight.data[5, 5] = value
    reaching.REACHED["write"] = lambda: weight.data[5, 6].add_(1)
    with pytest.raises(SurgeryError, match=r"lm_head\.weight"):
        solidify.replace(model, MLP, reaching.InAdopt, extent=Extent(whole=False))
    reaching.REACHED.clear()


@pytest.mark.parametrize("mapped", [False, True])
def test_of_a_small_tensor_every_value_is_compared(tmp_path: Path, mapped: bool) -> None:
    """A mapped one lies in a page with others; once one of these was written to, the system says nothing of it."""
    model = bounded(tmp_path, mapped=mapped)
    weight = model.model.layers[1].self_attn.k_proj.weight
    model.model.layers[1].self_attn.q_proj.weight.data[-1, -1] = 1.0
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = 1.0
    reaching.REACHED["write"] = lambda: weight.data[5, 6].add_(1)
    with pytest.raises(SurgeryError, match=r"k_proj\.weight"):
        solidify.replace(model, "model.layers.*.mlp", reaching.InAdopt, extent=Extent(whole=False))
    reaching.REACHED.clear()


def test_the_same_memory_read_otherwise_is_another_tensor(tmp_path: Path) -> None:
    model = bounded(tmp_path, mapped=True)
    weight = model.lm_head.weight

    def turn() -> None:
        weight.data = weight.data.view(weight.shape[::-1]).t()

    reaching.REACHED["write"] = turn
    with pytest.raises(SurgeryError, match=r"lm_head\.weight"):
        solidify.replace(model, MLP, reaching.InAdopt, extent=Extent(whole=False))
    reaching.REACHED.clear()


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (127,), (40, 30), (3, 5, 7, 11)])
def test_a_sample_has_the_same_few_values_however_a_tensor_lies(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    turned = tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    assert outside.take_sample(tensor).numel() <= 64
    assert torch.equal(outside.take_sample(tensor), outside.take_sample(turned))
