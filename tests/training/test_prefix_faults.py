"""What would make a training with `cache_prefix` another than the plain one is refused, or computed anew."""

from __future__ import annotations

import importlib
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frozen import Act, Around, both, nothing, put, small, train
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import solidify
from solidify.errors import ObjectiveError
from solidify.training.prefix.cached import CachedPrefix


def test_whole_files_are_read(tmp_path: Path) -> None:
    plain, found, cached = both(tmp_path / "kept")
    assert found == plain
    assert (cached.computed, cached.read) == (2, 4)


def test_a_file_for_a_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("x")
    with (
        pytest.raises(ObjectiveError, match=r"no directory can be made at .*a_file \(it is a file\)"),
        solidify.cache_prefix(small(), tmp_path / "a_file"),
    ):
        pass


class Average(Around):
    """Replaces a buffer in each pass."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found = super().forward(hidden_states)
        self.mean: torch.Tensor = 0.9 * self.mean + 0.1 * found.detach().mean()
        return found * (1 + self.mean)


class Ramp(Around):
    """Counts its passes, in a number, a list and a tensor, and depends on each."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found = super().forward(hidden_states) * (1 + self.calls // 2 + self.list[0] // 2 + self.loose)
        self.calls, self.list[0] = self.calls + 1, self.list[0] + 1
        self.loose += 1
        return found


class OfPython(Around):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * random.random()


class OfNumPy(Around):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * float(np.random.random())


class OfPyTorch(Around):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * torch.rand(())


class Endless(Around):
    """Counts in what nothing can be put back of."""

    class Count:
        def __init__(self) -> None:
            self.number = 0

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.count = Endless.Count()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.count.number += 1
        return super().forward(hidden_states)


@pytest.mark.parametrize("kind", [Around, Average, Ramp, OfPython, OfNumPy, OfPyTorch])
def test_what_moves_behind_the_prefix_moves_once(kind: type[Around], tmp_path: Path) -> None:
    plain, found, cached = both(tmp_path / "kept", put(kind, 3))
    assert found == plain
    assert (cached.computed, cached.read) == (2, 4)


def test_what_cannot_be_put_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"cannot be put back before the second one: model\.layers\.3\.mlp\.count"):
        both(tmp_path / "kept", put(Endless, 3))


@pytest.mark.parametrize("kind", [OfPython, OfNumPy, OfPyTorch])
def test_random_numbers_of_any_kind_in_the_prefix_are_refused(kind: type[Around], tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=f"draws random numbers of {kind.__name__.removeprefix('Of')}"):
        both(tmp_path / "kept", put(kind, 0))


def gemma3(kind: str) -> Any:
    """A model whose second layer has rotary positions of a kind: dynamic ones remember longer batches."""
    torch.manual_seed(0)
    full = {"rope_type": kind, "rope_theta": 1e4, **({"factor": 4.0} if kind != "default" else {})}
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_cache=False,
        max_position_embeddings=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": full,
        },
    )
    model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.model.layers[3].self_attn.parameters():
        parameter.requires_grad_(True)
    return model.train()


def losses_of(model: Any) -> list[float]:
    torch.manual_seed(5)
    batches = [torch.randint(3, 128, (2, length)) for length in (16, 48)]
    return [float(model(input_ids=batches[n % 2], labels=batches[n % 2]).loss.detach()) for n in range(5)]


def test_positions_that_remember_longer_batches_are_refused(tmp_path: Path) -> None:
    model = gemma3("dynamic")
    with (
        pytest.raises(ObjectiveError, match=r"model\.layers\.1 is given other arguments"),
        solidify.cache_prefix(model, tmp_path / "kept"),
    ):
        losses_of(model)


def test_positions_that_remember_nothing_are_read(tmp_path: Path) -> None:
    plain, model = losses_of(gemma3("linear")), gemma3("linear")
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        assert losses_of(model) == plain
    assert (cached.computed, cached.read) == (2, 3)


def triple(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states * 3


class Odd(Around):
    """Depends on attributes of many kinds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.list = [1]
        self.mapping = {"by": [1.0]}
        self.pair: tuple[Any, ...] = (1.0, torch.ones(1))
        self.loose = torch.ones(1)
        self.function: Any = torch.tanh
        self.held = [nn.Linear(1, 1, bias=False).requires_grad_(False)]
        nn.init.ones_(self.held[0].weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found = self.function(super().forward(hidden_states)) * self.list[0] * self.mapping["by"][0]
        return found * self.pair[0] * self.pair[1] * self.loose * self.held[0].weight[0]  # type: ignore[no-any-return]


class Double(Odd):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * 2


def patch_forward(module: Any) -> None:
    own = module.forward
    module.forward = lambda hidden_states: own(hidden_states) * 3


CHANGES: dict[str, Act] = {
    "a list": lambda odd: odd.list.__setitem__(0, 3),
    "a mapping in depth": lambda odd: odd.mapping["by"].__setitem__(0, 3.0),
    "a tuple": lambda odd: setattr(odd, "pair", (3.0, torch.ones(1))),
    "a tensor in a tuple": lambda odd: odd.pair[1].mul_(3),
    "a loose tensor": lambda odd: odd.loose.mul_(3),
    "data of a loose tensor": lambda odd: odd.loose.data.mul_(3),
    "a module in a list": lambda odd: odd.held[0].weight.mul_(3),
    "a function": lambda odd: setattr(odd, "function", torch.sin),
    "a function of a file": lambda odd: setattr(odd, "function", triple),
    "a forward of its own": patch_forward,
    "a forward of a module inside": lambda odd: patch_forward(odd.inner.down_proj),
    "its class": lambda odd: setattr(odd, "__class__", Double),
    "a module inside": lambda odd: setattr(odd.inner, "act_fn", nn.GELU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_attribute_is_computed_anew(change: str, tmp_path: Path) -> None:
    plain, found, cached = both(
        tmp_path / "kept", put(Odd, 0), lambda model: CHANGES[change](model.model.layers[0].mlp)
    )
    unchanged = train(small(put(Odd, 0)))
    assert found == plain != unchanged
    assert (cached.computed, cached.read) == (4, 2)


def test_unchanged_attributes_are_read(tmp_path: Path) -> None:
    plain, found, cached = both(tmp_path / "kept", put(Odd, 0))
    assert found == plain
    assert (cached.computed, cached.read) == (2, 4)
    with solidify.cache_prefix(small(put(Odd, 0)), tmp_path / "other", keep=True) as first:
        train(first.model)
    with solidify.cache_prefix(small(put(Odd, 0)), tmp_path / "other") as second:
        assert train(second.model) == plain
    assert (second.computed, second.read) == (1, 5)


def test_a_class_whose_forward_is_exchanged_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, exchanged = Odd.forward, lambda odd, hidden_states: Double.forward(odd, hidden_states)
    monkeypatch.setattr(Double, "forward", lambda odd, hidden_states: own(odd, hidden_states) * 2)
    act: Act = lambda _: monkeypatch.setattr(Odd, "forward", exchanged)  # noqa: E731
    plain = train(small(put(Odd, 0)), act)
    monkeypatch.setattr(Odd, "forward", own)
    model = small(put(Odd, 0))
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        assert train(model, act) == plain
    assert (cached.computed, cached.read) == (4, 2)


def test_a_hook_that_comes_later_is_refused(tmp_path: Path) -> None:
    def hook(model: Any) -> None:
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 3)

    with pytest.raises(ObjectiveError, match=r"model\.layers\.1 has a hook that looks inside"):
        both(tmp_path / "kept", between=hook)


def test_a_loose_tensor_that_learns_is_refused(tmp_path: Path) -> None:
    def prepare(model: Any) -> None:
        put(Odd, 0)(model)
        model.model.layers[0].mlp.loose.requires_grad_(True)

    with pytest.raises(ObjectiveError, match=r"0\.mlp\.loose of the frozen layers holds a tensor that learns"):
        both(tmp_path / "kept", prepare)


def large(model: Any) -> None:
    """Gives a layer a buffer of many pages, of which one number counts."""
    put(Large, 0)(model)


class Large(Around):
    place = 10_000  # between the pages that are looked at in every pass

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("table", torch.ones(100_000), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        table: torch.Tensor = self.table  # type: ignore[assignment]
        return super().forward(hidden_states) * table[self.place]


def write_data(model: Any) -> None:
    model.model.layers[0].mlp.table.data.mul_(3)


def write_one_number(model: Any) -> None:
    model.model.layers[0].mlp.table.data[Large.place] = 3


def write_in_place(model: Any) -> None:
    model.model.layers[0].mlp.table[Large.place] = 3


@pytest.mark.parametrize("act", [write_data, write_in_place])
def test_written_tensors_are_computed_anew(act: Act, tmp_path: Path) -> None:
    plain, found, cached = both(tmp_path / "kept", large, act)
    assert found == plain != train(small(large))
    assert (cached.computed, cached.read) == (4, 2)


def test_a_number_written_unnoticed_is_refused_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"model\.layers\.0\.mlp\.table was written to through `\.data`"):
        both(tmp_path / "kept", large, write_one_number)
    assert not (tmp_path / "kept").exists()
    plain, found, _ = both(tmp_path / "kept", large)
    assert found == plain


def test_a_number_written_unnoticed_is_refused_after_some_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("solidify.training.prefix.stack._WHOLE", 2)
    model, steps = small(large), list[Any]()
    model.register_forward_hook(lambda *_: steps.append(1))
    with (
        pytest.raises(ObjectiveError, match="was written to through"),
        solidify.cache_prefix(model, tmp_path / "kept"),
    ):
        train(model, write_one_number)
    assert len(steps) < 6


def test_what_is_kept_of_an_interrupted_training_is_true(tmp_path: Path) -> None:
    def stop(model: Any) -> None:
        write_one_number(model)
        raise KeyboardInterrupt

    for act in (stop, interrupt):
        model = small(large)
        with (
            pytest.raises(KeyboardInterrupt),
            solidify.cache_prefix(model, tmp_path / "kept"),
        ):
            train(model, act)
        assert (tmp_path / "kept").exists() == (act is interrupt)


def interrupt(_: Any) -> None:
    raise KeyboardInterrupt


SOURCE = """
from torch import nn

BY = 1.0


class Scale(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states):
        return self.inner(hidden_states) * BY * 1.0
"""


@pytest.mark.parametrize(
    ("old", "new", "read"), [("* 1.0", "* 3.0", 4), ("BY = 1.0", "BY = 3.0", 4), ("* 1.0", "* 1.0", 5)]
)
def test_code_that_changes_between_two_runs(
    old: str, new: str, read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "scaling_by_code.py"

    def run(content: str, act: Act = nothing) -> tuple[list[float], CachedPrefix]:
        path.write_text(content)
        sys.modules.pop("scaling_by_code", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        scale = importlib.import_module("scaling_by_code").Scale
        model = small(put(scale, 0))
        with solidify.cache_prefix(model, tmp_path / "kept", keep=True) as cached:
            return train(model, act), cached

    with pytest.raises(KeyboardInterrupt):  # both batches are kept
        run(SOURCE, interrupt)
    found, cached = run(SOURCE.replace(old, new))
    assert cached.read == read
    shutil.rmtree(tmp_path / "kept")
    assert found == run(SOURCE.replace(old, new))[0]
