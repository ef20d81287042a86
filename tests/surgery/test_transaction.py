"""Whatever leaves a transaction, the model is as it was."""

from __future__ import annotations

import pico
import pytest
import torch
from torch import nn

from solidify.errors import SurgeryError
from solidify.model.extent import Extent
from solidify.surgery.transaction import transaction


def snapshot(model: nn.Module) -> dict[str, object]:
    """Returns what must be the same afterwards, as plain values."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "config": model.config.to_dict(),
        "state": {name: tensor.tolist() for name, tensor in state.items()},
    }


def swap(model: nn.Module) -> None:
    model.model.layers[0].mlp = nn.Identity()


def rename(model: nn.Module) -> None:
    del model.model.layers[1].self_attn.q_proj


def hook(model: nn.Module) -> None:
    model.model.norm.register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)


def configure(model: nn.Module) -> None:
    model.config.rms_norm_eps = 1.0
    model.config.rope_parameters["rope_theta"] = 1.0
    model.generation_config.max_length = 3


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False).train()


def write(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.lm_head.weight.data.add_(1)
    model.model.embed_tokens.weight.data = torch.zeros_like(model.model.embed_tokens.weight)


def buffers(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq.zero_()
    model.model.register_buffer("more", torch.ones(2))


def attributes(model: nn.Module) -> None:
    model.model.layers[0].self_attn.is_causal = False
    model.model.layers[0].self_attn.__class__ = type("Other", (type(model.model.layers[0].self_attn),), {})
    model.model.layers[0].extra = [1]


def trace(model: nn.Module) -> None:
    weight = model.lm_head.weight
    weight.register_hook(lambda gradient: gradient * 0)
    weight.register_post_accumulate_grad_hook(lambda _: None)
    weight.marker = 1
    torch.set_grad_enabled(False)
    type(model.model.norm).forward = lambda self, x: x


class OwnError(BaseException):
    pass


@pytest.mark.parametrize("change", [swap, rename, hook, configure, freeze, write, buffers, attributes, trace])
@pytest.mark.parametrize("kind", [ValueError, AssertionError, KeyboardInterrupt, OwnError])
def test_everything_is_put_back(change: object, kind: type[BaseException]) -> None:
    model = pico.llama()
    before, eps = snapshot(model), model.config.rms_norm_eps
    with pytest.raises(kind), transaction(model, Extent.of(model)):
        change(model)
        raise kind
    assert snapshot(model) == before
    assert model.config.rms_norm_eps == eps
    assert torch.is_grad_enabled()
    assert not hasattr(model.lm_head.weight, "marker")
    loss = model(pico.tokens(), labels=pico.tokens()).loss
    loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0 or not model.lm_head.weight.requires_grad
    assert model.model.norm(torch.full((1, 32), 3.0)).abs().max() < 2


def test_what_ends_well_stays() -> None:
    model = pico.llama()
    with transaction(model, Extent.of(model)):
        swap(model)
    assert isinstance(model.model.layers[0].mlp, nn.Identity)


def test_lists_and_dictionaries_keep_their_identity() -> None:
    model = pico.llama()
    model.model.seen, inner = {"a": [1]}, [1, 2]
    model.model.seen["b"] = inner
    with pytest.raises(ValueError, match="stop"), transaction(model, Extent.of(model)):
        model.model.seen.clear()
        inner.append(3)
        raise ValueError("stop")
    assert model.model.seen == {"a": [1], "b": [1, 2]}
    assert model.model.seen["b"] is inner


def test_a_model_with_gradients_gets_its_dtype_back() -> None:
    model = pico.llama()
    model(pico.tokens(), labels=pico.tokens()).loss.backward()
    before = {name: (p.clone(), p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="stop"), transaction(model, Extent.of(model)):
        model.half()
        raise ValueError("stop")
    for name, parameter in model.named_parameters():
        value, gradient, numbers = before[name]
        assert torch.equal(parameter, value) and parameter.grad is gradient and torch.equal(gradient, numbers)


def test_memory_that_was_freed_is_filled_again() -> None:
    model = pico.llama()
    model.model.norm.register_buffer("more", torch.ones(2, requires_grad=True))
    before = snapshot(model)
    with pytest.raises(ValueError, match="stop"), transaction(model, Extent.of(model), changes=[]):
        model.lm_head.weight.untyped_storage().resize_(0)
        model.model.norm.more.requires_grad_(False).untyped_storage().resize_(0)
        raise ValueError("stop")
    assert snapshot(model) == before and model.model.norm.more.requires_grad
    with pytest.raises(SurgeryError, match=r"lm_head\.weight"), transaction(model, Extent.of(model), changes=[]):
        model.lm_head.weight.untyped_storage().resize_(0)
    assert snapshot(model) == before
    with pytest.raises(SurgeryError, match="outside what is changed"), transaction(model, Extent.of(model), changes=[]):
        model.to("meta")
    assert snapshot(model) == before
