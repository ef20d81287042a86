"""What a new module took over is told by descent, so that plan and a build say the same."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch
from torch import nn

import solidify
from solidify.model import anatomy
from solidify.surgery import ledger, provenance


class Norm(nn.Module):
    """A norm of its own that takes the weight over: ones, in a model that was never trained."""

    def __init__(self, original: nn.Module, fresh: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.shift = nn.Parameter(torch.zeros(32))
        self.fresh = fresh

    def adopt(self, original: nn.Module) -> None:
        if not self.fresh:
            self.weight.copy_(original.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * scaled + self.shift).to(x.dtype)


class Split(nn.Module):
    """An MLP that adopts two matrices, copies one in its constructor and makes one of two of them anew."""

    def __init__(self, original: nn.Module, scale: float = 2.0) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48, bias=False)
        self.second = nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32, bias=False)
        self.scale = scale
        with torch.no_grad():
            self.down.weight.copy_(original.down_proj.weight)

    def adopt(self, original: nn.Module) -> None:
        self.first.weight.copy_(original.gate_proj.weight)
        self.second.weight.copy_(original.up_proj.weight * self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.first(x)) * self.second(x))


def edited(module: Any, target: str, *, meta: bool, **arguments: Any) -> tuple[Any, list[Any], list[str]]:
    model = pico.llama()
    if meta:
        model = model.to("meta")
    names = list(model.state_dict())
    edits = solidify.replace(model, target, module, arguments=arguments)
    return model, edits, names


CASES: list[tuple[Any, str, dict[str, Any], dict[str, int]]] = [
    (Norm, "model.layers.*.input_layernorm", {}, {"kept": 21, "new": 2, "dropped": 0}),
    (Norm, "model.layers.*.input_layernorm", {"fresh": True}, {"kept": 19, "new": 4, "dropped": 2}),
    (Split, "model.layers.*.mlp", {}, {"kept": 19, "new": 2, "dropped": 2}),
    (Split, "model.layers.*.mlp", {"scale": 1.0}, {"kept": 21, "new": 0, "dropped": 0}),
    (pico.wrappers.Scaled, "model.layers.*.mlp", {}, {"kept": 21, "new": 2, "dropped": 0}),
]


@pytest.mark.parametrize(("module", "target", "arguments", "wanted"), CASES)
def test_plan_and_build_count_the_same(
    module: Any, target: str, arguments: dict[str, Any], wanted: dict[str, int]
) -> None:
    found = []
    for meta in (True, False):
        model, edits, names = edited(module, target, meta=meta, **arguments)
        records = [edit.document() for edit in edits]
        assert not any(edit.unknown for edit in edits)
        found.append(ledger.counts(model.state_dict(), records))
        origins, _ = ledger.origins(names, records)
        kept = {origin for origin in origins.values() if origin is not None}
        assert found[-1]["kept"] == len(kept) and found[-1]["dropped"] == len(set(names) - kept)
    assert found[0] == found[1] == wanted


def test_random_numbers_and_the_original_are_as_they_were() -> None:
    model = pico.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original = model.model.layers[0].mlp
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    assert provenance.trace(original, Split) == {"down.weight": "down_proj.weight"}
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_told_before_a_build_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance.anatomy, "LARGE", 1)
    assert provenance.trace(pico.llama().model.layers[0].mlp, Split) is None
    _, edits, _ = edited(Split, "model.layers.0.mlp", meta=True)
    assert set(edits[0].unknown) == {f"model.layers.0.mlp.{key}.weight" for key in ("first", "second", "down")}
    monkeypatch.undo()
    assert anatomy.LARGE > 1
    _, edits, _ = edited(Split, "model.layers.0.mlp", meta=True)
    assert not edits[0].unknown


def test_one_that_cannot_be_built_twice_is_unknown_too() -> None:
    class Once(Split):
        built: list[int] = []  # noqa: RUF012

        def __init__(self, original: nn.Module) -> None:
            assert not self.built
            self.built.append(1)
            super().__init__(original)

    _, edits, _ = edited(Once, "model.layers.0.mlp", meta=True)
    assert len(edits[0].unknown) == 3


class WritesElsewhere(nn.Module):
    """Keeps the module that it replaces; the first that is built changes what stands at the place after it."""

    other: nn.Parameter | None = None

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.up_proj, self.down_proj = original.up_proj, original.down_proj
        if WritesElsewhere.other is not None:
            WritesElsewhere.other.data.mul_(2)
            WritesElsewhere.other = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x))


def test_values_that_another_place_s_constructor_wrote_are_not_those_of_the_base() -> None:
    model = pico.llama()
    WritesElsewhere.other = model.model.layers[1].mlp.up_proj.weight
    first, second = solidify.replace(model, "model.layers.*.mlp", WritesElsewhere)
    assert first.tensors["model.layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    assert second.tensors["model.layers.1.mlp.up_proj.weight"] is None
    assert second.tensors["model.layers.1.mlp.down_proj.weight"] == "model.layers.1.mlp.down_proj.weight"


class Sums(nn.Module):
    """An MLP that takes a buffer over, and once writes into another place's."""

    other: Any = None

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.up_proj, self.down_proj = original.up_proj, original.down_proj
        self.register_buffer("scale", original.scale)
        if Sums.other is not None:
            Sums.other.mul_(2)
            Sums.other = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x)) * self.scale.mean()


def test_a_buffer_that_another_place_s_constructor_wrote_is_not_that_of_the_base() -> None:
    model = pico.llama()
    for layer in model.model.layers:
        layer.mlp.register_buffer("scale", torch.rand(4))
    Sums.other = model.model.layers[1].mlp.scale
    first, second = solidify.replace(model, "model.layers.*.mlp", Sums)
    assert first.tensors["model.layers.0.mlp.scale"] == "model.layers.0.mlp.scale"
    assert second.tensors["model.layers.1.mlp.scale"] is None
