"""What a served call shows of a large model without its linear layers' weights; here tiny models are taken for large.

Each fault has an honest twin, of which nothing is said.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import families
import pico
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

import solidify
from solidify.checks import served_call, stand_ins
from solidify.checks.served_call import Observed
from solidify.model import anatomy

served: Any = import_module("served")  # tests/support/user_modules, which pico puts on the path


def call(model: PreTrainedModel) -> Observed:
    """Calls a tiny model as a large one is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anatomy, "LARGE", 0)
        patch.setattr(stand_ins, "_LARGE", 0)
        return served_call.observe(model.base_model)


class Gated(nn.Module):
    """Adds the position before, as far as a gate is open, and behind a linear layer if it is asked to."""

    def __init__(self, original: nn.Module, config: Any) -> None:
        super().__init__()
        self.original = original
        self.gate = nn.Parameter(torch.zeros(1))
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        before = functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        mixed: torch.Tensor = self.original(hidden_states) + self.gate * self.out(before)
        return mixed


class Certain(nn.Module):
    """Is finite if the layers of the original compute with their own weights, and infinite else."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original: Any = original
        for name in ("gate", "up", "down"):
            self.register_buffer(name, original.get_parameter(f"{name}_proj.weight").detach().clone())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.original(hidden_states)
        weights = [self.get_buffer(name) for name in ("gate", "up", "down")]
        sure = (computed(self.original, hidden_states, weights) - found).abs() <= 1e-4
        return torch.where(sure, found, torch.inf)


class Deciding(nn.Module):
    """Sees the position before if a value is as it is with the original's own weights."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.register_buffer("least", torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.original(hidden_states)
        if found.abs().mean() > self.least:
            found = found + 0.1 * functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        return found


def computed(mlp: Any, hidden_states: torch.Tensor, weights: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Computes a feed-forward by the weights of its layers, and calls none of them."""
    gate, up, down = weights or (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    inner = mlp.act_fn(functional.linear(hidden_states, gate)) * functional.linear(hidden_states, up)
    return functional.linear(inner, down)


WAYS: dict[str, Any] = {
    "in a block that swallows errors": lambda found, sure: bool(sure.all()),
    "allclose": lambda found, sure: torch.allclose(found, found * sure),
    "a mask": lambda found, sure: len(found[sure]) == found.numel(),
    "masked_select": lambda found, sure: torch.masked_select(found, sure).numel() == found.numel(),
    "where": lambda found, sure: len(torch.where(sure)[0]) == found.numel(),
    "unique": lambda found, sure: len(torch.unique(sure)) == 1,
    "bincount": lambda found, sure: len(torch.bincount((~sure).int().flatten())) == 1,
    "contains": lambda found, sure: False not in sure,
    "words": lambda found, sure: "True" in str(sure.all()),
    "dlpack": lambda found, sure: torch.utils.dlpack.from_dlpack(sure.int()).numpy().all(),
    "storage": lambda found, sure: bool(sure.untyped_storage()[0]),
    "what is not zero": lambda found, sure: sure.int().to_sparse()._nnz() == sure.numel(),
}


class Finding(nn.Module):
    """Sees the position before if the original is small, which it finds out in one of many ways."""

    def __init__(self, original: nn.Module, way: str) -> None:
        super().__init__()
        self.original, self.way = original, way
        self.register_buffer("most", torch.tensor(torch.inf))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.original(hidden_states)
        try:
            if WAYS[self.way](found, found.abs() < self.most):
                return found + 0.1 * functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        except Exception:
            return found
        return found


class Before(nn.Module):
    """Sees the position before if what it is given is small, which its own hook finds out before it is called."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.register_buffer("most", torch.tensor(torch.inf))
        self.register_forward_pre_hook(lambda _, args: self.decide(args[0]))

    def decide(self, hidden_states: torch.Tensor) -> None:
        self.small = bool((hidden_states.abs() < self.most).all())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.original(hidden_states)
        return found + 0.1 * functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1] if self.small else found


class Called(Before):
    """The same, found out by how it is called."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self._forward_pre_hooks.clear()

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        self.decide(hidden_states)
        return super().__call__(hidden_states)


class Listed(nn.ModuleList):
    """The same, in a list that is called."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__([original])
        self.register_buffer("most", torch.tensor(torch.inf))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self[0](hidden_states)
        small = bool((hidden_states.abs() < self.most).all())
        return found + 0.1 * functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1] if small else found


class Threaded(nn.Module):
    """Decides in a thread of its own, which calls the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.decide, hidden_states).result()

    @torch.no_grad()
    def decide(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.original(hidden_states)
        small = bool((found.abs() < torch.inf).all())
        return found + 0.1 * functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1] if small else found


class Weighing(nn.Module):
    """Sees the position before as far as the layers of the original compute with their own weights."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.original(hidden_states)
        sure = (computed(self.original, hidden_states) - found).abs().amax() <= 1e-4
        return found + sure * 0.1 * functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]


class Paired(nn.Module):
    """Has a linear layer of its own, in a list, whose weight it also uses itself, so that nothing is mixed."""

    def __init__(self, original: nn.Module, config: Any) -> None:
        super().__init__()
        self.original = original
        self.inner = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        before = functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        alone = self.inner(hidden_states + before) - functional.linear(before, self.inner[0].weight)
        found: torch.Tensor = self.original(hidden_states) + alone
        return found


class OwnLinear(nn.Linear):
    """A linear layer that also sees the position before."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + functional.pad(input, (0, 0, 1, 0))[:, :-1])


class Subclassed(nn.Module):
    def __init__(self, original: nn.Module, config: Any) -> None:
        super().__init__()
        self.original = original
        self.own = OwnLinear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.original(hidden_states) + self.own(hidden_states)
        return added


def changed(target: str, module: Any, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """Replaces some modules of a model, else of a Llama of four layers, and returns it."""
    model = model or pico.llama(num_hidden_layers=4)
    meant = dict.fromkeys(("cache", "padding", "hidden_states"), False)
    solidify.replace(model, target, module, declares=meant)
    return model


def observe(model: PreTrainedModel) -> Observed:
    seen = call(model)
    assert not seen.refused
    return seen


ALL_MLPS, ALL_ATTENTIONS = "model.layers.*.mlp", "model.layers.*.self_attn"


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("part, module", [("mlp", "Shift"), ("self_attn", "OwnAttention")])
def test_a_mixer_in_one_layer_is_seen(part: str, module: str, layer: int) -> None:
    """A layer of another kind, first, in the middle or last."""
    seen = observe(changed(f"model.layers.{layer}.{part}", getattr(served, module)))
    assert seen.mixers == [f"layers.{layer}.{part}"]
    assert seen.stood_in > 20
    assert len(seen.arrivals) == (4 if part == "mlp" else 3)


def test_an_attention_by_the_interface_mixes_nothing() -> None:
    seen = observe(changed("model.layers.2.self_attn", served.InterfaceAttention))
    assert seen.mixers == []
    assert [(arrival.module, arrival.layer_idx, arrival.passed) for arrival in seen.arrivals] == [
        (f"layers.{n}.self_attn", n, True) for n in range(4)
    ]
    assert seen.causal is True
    assert seen.stood_in > 20


@pytest.mark.parametrize("open_in", [None, 0, 2, 3])
def test_a_gate_that_opens_in_one_layer_is_seen_there(open_in: int | None) -> None:
    model = changed(ALL_MLPS, Gated)
    if open_in is not None:
        model.get_parameter(f"model.layers.{open_in}.mlp.gate").data.fill_(1.0)
    assert observe(model).mixers == ([] if open_in is None else [f"layers.{open_in}.mlp"])


@pytest.mark.parametrize("filled", [None, 0, 2, 3])
def test_a_matrix_of_zeros_lets_nothing_through(filled: int | None) -> None:
    """A branch that starts at zero: as long as all of it is zero, it adds nothing; one number at its end is enough."""
    model = changed(ALL_MLPS, Gated)
    for n in range(4):
        model.get_parameter(f"model.layers.{n}.mlp.gate").data.fill_(1.0)
        model.get_parameter(f"model.layers.{n}.mlp.out.weight").data.zero_()
    if filled is not None:
        model.get_parameter(f"model.layers.{filled}.mlp.out.weight").data[-1, -1] = 0.5
    assert observe(model).mixers == ([] if filled is None else [f"layers.{filled}.mlp"])


@pytest.mark.parametrize("layer", [None, 0, 2, 3])
def test_other_heads_in_one_layer_are_seen(layer: int | None) -> None:
    model = pico.llama(num_hidden_layers=4) if layer is None else None
    model = model or changed(f"model.layers.{layer}.self_attn", served.RepeatingAttention)
    heads = [arrival.heads[:2] for arrival in observe(model).arrivals]
    usual = (model.config.num_attention_heads, model.config.num_key_value_heads)
    assert heads == [(usual[0], usual[0]) if n == layer else usual for n in range(4)]


SAME = {
    "self_attn": "InterfaceAttention DeafAttention ClosedAttention ChoosyAttention HidingAttention RepeatingAttention "
    "HeldAttention NumberlessAttention OwnAttention",
    "mlp": "Shift Misnamed Twice",
}


@pytest.mark.parametrize(("part", "module"), [(part, name) for part, names in SAME.items() for name in names.split()])
def test_what_is_seen_of_a_call_is_what_a_small_model_shows(part: str, module: str) -> None:
    compare(changed(f"model.layers.2.{part}", getattr(served, module)))


@pytest.mark.parametrize("module", ["PooledMoE", "KeywordMoE", "LoopingMoE", "FlatMoE"])
def test_what_is_seen_of_experts_is_what_a_small_model_shows(module: str) -> None:
    compare(changed("model.layers.1.mlp", getattr(served, module), pico.olmoe()))


def compare(model: PreTrainedModel) -> None:
    big, small = call(model), served_call.observe(model.base_model)
    assert small.stood_in == 0
    assert (big.refused, big.runs_without, big.causal) == (small.refused, small.runs_without, small.causal)
    assert (big.arrivals, big.received, big.called) == (small.arrivals, small.received, small.called)
    assert (big.mixers, big.experts) == (small.mixers, small.experts)


def test_no_weight_of_a_large_linear_layer_is_used_or_changed() -> None:
    """With NaN in every one of them the call would show nothing: here it shows a mixer."""
    model = changed("model.layers.3.mlp", served.Shift)
    for module in model.model.modules():
        if type(module) is nn.Linear:
            module.weight.data.fill_(torch.nan)
    threads = torch.get_num_threads()
    seen = observe(model)
    assert seen.mixers == ["layers.3.mlp"]
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("module", "mixing"), [(Certain, False), (Deciding, True)])
def test_a_model_that_needs_its_own_numbers_is_called_with_them(module: Any, mixing: bool) -> None:
    """As one that gives what is not finite with others, or reads a value to decide what it does."""
    seen = observe(changed("model.layers.1.mlp", module))
    assert seen.stood_in == 0
    assert seen.mixers == (["layers.1.mlp"] if mixing else [])
    assert len(seen.arrivals) == 4
    both = changed("model.layers.3.mlp", served.Shift, changed("model.layers.1.mlp", Certain))
    assert observe(both).mixers == ["layers.3.mlp"]


@pytest.mark.parametrize("way", WAYS)
def test_who_decides_by_a_value_in_any_way_gets_the_models_own(way: str) -> None:
    """By a number, by the shape of what is chosen, by memory or words; also if it swallows the error."""
    model = pico.llama(num_hidden_layers=4)
    meant = dict.fromkeys(("cache", "padding", "hidden_states"), False)
    solidify.replace(model, "model.layers.1.mlp", Finding, arguments={"way": way}, declares=meant)
    seen = observe(model)
    assert seen.stood_in == 0
    assert seen.mixers == ["layers.1.mlp"]


@pytest.mark.parametrize("kind", [Before, Called, Listed, Threaded])
@pytest.mark.parametrize("name", ["norm", "layers.1.mlp"])
def test_who_decides_around_its_forward_gets_the_models_own(name: str, kind: Any) -> None:
    """Right within the model, which may read values of its masks, and deeper."""
    model = pico.llama(num_hidden_layers=3)
    model.set_submodule(f"model.{name}", kind(model.get_submodule(f"model.{name}")).eval())
    seen = observe(model)
    assert (seen.stood_in, seen.mixers) == (0, [name])


def test_layers_whose_weight_is_read_past_them_keep_their_numbers() -> None:
    """By a module of the user's around, by a `forward` that was put there by hand and mixes nothing, by a family's."""
    every = observe(pico.llama(num_hidden_layers=4)).stood_in
    seen = observe(changed("model.layers.1.mlp", Weighing))
    assert (seen.stood_in, seen.mixers) == (every - 3, ["layers.1.mlp"])
    model = pico.llama(num_hidden_layers=4)
    block = model.model.layers[1].mlp

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        before = functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        gate = block.gate_proj(hidden_states + before) - functional.linear(before, block.gate_proj.weight.data)
        found: torch.Tensor = block.down_proj(block.act_fn(gate) * block.up_proj(hidden_states))
        return found

    block.forward = forward
    seen = observe(model)
    assert (seen.stood_in, seen.mixers) == (every - 1, [])
    mixing = families.tiny("jamba")
    families.give_opinions(mixing)
    compare(mixing)
    assert observe(mixing).stood_in > 10


@pytest.mark.parametrize("patched", [True, False])
def test_a_model_whose_own_forward_is_the_users_may_read_no_value(patched: bool) -> None:
    model = pico.llama(num_hidden_layers=4)
    plain = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        first, *rest = plain(*args, **kwargs)
        small = bool((first.abs().amax() < torch.inf) & patched)
        return (first + 0.1 * functional.pad(first, (0, 0, 1, 0))[:, :-1] if small else first, *rest)

    model.model.forward = forward
    seen = observe(model)
    assert (seen.stood_in, seen.mixers) == (0, [""] if patched else [])


def test_layers_are_as_before_after_an_error_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.llama(num_hidden_layers=4)
    monkeypatch.setattr(stand_ins, "_LARGE", 0)
    monkeypatch.setattr(nn.Module, "register_forward_hook", None)
    with pytest.raises(TypeError), stand_ins.standing_in(model.model):
        raise AssertionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_that_a_users_module_owns_keeps_its_numbers() -> None:
    """What that does with the layer's weight beside calling it is not known."""
    plain, paired = observe(pico.llama(num_hidden_layers=4)), observe(changed("model.layers.1.mlp", Paired))
    assert paired.mixers == []
    assert paired.stood_in == plain.stood_in > 20


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_what_stands_in_gives_outputs_of_the_layers_size(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a module adds to them is neither hidden nor made larger."""
    monkeypatch.setattr(stand_ins, "_LARGE", 0)
    layer = nn.Linear(256, 512, bias=False)
    given = torch.randn(2, 9, 256)
    with torch.no_grad():
        layer.weight.normal_(0, size)
        own = layer(given)
        with stand_ins.standing_in(nn.Sequential(layer)):
            other = layer(given)
    assert 0.5 < float(other.norm() / own.norm()) < 2


def test_a_class_that_does_more_than_a_linear_layer_computes_itself() -> None:
    assert observe(changed("model.layers.3.mlp", Subclassed)).mixers == ["layers.3.mlp.own"]


@pytest.mark.parametrize("patched", [True, False])
def test_a_forward_of_an_instance_stays(patched: bool) -> None:
    model = pico.llama(num_hidden_layers=4)
    layer = model.model.layers[2].mlp.down_proj
    if patched:
        plain = layer.forward
        layer.forward = lambda x: plain(x + functional.pad(x, (0, 0, 1, 0))[:, :-1])
    assert observe(model).mixers == (["layers.2.mlp.down_proj"] if patched else [])
    assert ("forward" in vars(layer)) == patched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_product_has_the_form_of_the_layers_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(48, 80, dtype=dtype)
    given = torch.randn(2, 5, 48).to(dtype)
    own = layer(given)
    monkeypatch.setattr(stand_ins, "_LARGE", 0)
    with stand_ins.standing_in(nn.Sequential(layer)) as made:
        other = layer(given)
    again = pytest.raises(stand_ins.OtherNumbersError)
    with again, stand_ins.standing_in(nn.Sequential(layer)), pytest.raises(stand_ins.OtherNumbersError):
        layer(torch.full_like(given, torch.inf))
    assert made.count == 1
    assert (other.shape, other.dtype) == (own.shape, own.dtype)
    assert not torch.equal(other, own)
    assert torch.equal(layer(given), own)
