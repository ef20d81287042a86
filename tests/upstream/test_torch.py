"""The private names of PyTorch are there, and mean what the package takes them for."""

from __future__ import annotations

from typing import Any

import installed
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from solidify.upstream import torch as seams


def test_it_is_the_version_that_was_read() -> None:
    installed.same_minor("torch", seams.TESTED)


def test_a_module_keeps_what_is_registered_in_these_tables() -> None:
    module = nn.BatchNorm1d(2)
    module.add_module("child", nn.ReLU())
    held = {key: set(installed.attribute(module, key)) for key in seams.TABLES}
    children = {name for name, _ in module.named_children()}
    parameters, buffers = ({n for n, _ in named} for named in (module.named_parameters(), module.named_buffers()))
    assert held == {"_parameters": parameters, "_buffers": buffers, "_modules": children}


def test_parameters_are_left_out_of_the_broadcast() -> None:
    installed.same_parameters(
        DistributedDataParallel,
        "_set_params_and_buffers_to_ignore_for_model",
        ("module", "params_and_buffers_to_ignore"),
    )
    model = nn.Linear(2, 2)
    seams.leave_out_of_broadcast(model, ["weight"])
    assert installed.attribute(model, "_ddp_params_and_buffers_to_ignore") == ["weight"]


def test_the_tables_of_a_module_are_its_own() -> None:
    module = nn.BatchNorm1d(2, affine=False)
    module.register_buffer("lost", torch.zeros(1), persistent=False)
    assert seams.own_parameters(module) == {"weight": None, "bias": None}
    assert set(seams.own_buffers(module)) == {"running_mean", "running_var", "num_batches_tracked", "lost"}
    assert seams.unsaved_buffers(module) == {"lost"}
    child = nn.ReLU()
    seams.own_modules(module)["child"] = child
    seams.own_buffers(module)["lost"] = new = torch.ones(1)
    assert module.child is child
    assert module.lost is new


def test_the_hooks_of_a_module_are_listed() -> None:
    module = nn.Linear(2, 2)
    assert seams.module_hooks(module) == []
    module.register_forward_pre_hook(print)
    module.register_forward_hook(repr)
    assert [hook for _, hook, _ in seams.module_hooks(module)] == [print, repr]


def test_writes_are_counted_where_they_happen_in_place() -> None:
    tensor = nn.Parameter(torch.zeros(2))
    before = seams.writes(tensor)
    tensor.data = torch.ones(2)
    assert seams.writes(tensor) == before
    with torch.no_grad():
        tensor.add_(1)
    assert seams.writes(tensor) > before


def test_a_tensors_hooks_stand_in_these_attributes() -> None:
    tensor = nn.Parameter(torch.zeros(2))
    tensor.register_hook(lambda gradient: gradient)
    tensor.register_post_accumulate_grad_hook(lambda parameter: None)
    assert [len(installed.attribute(tensor, key)) for key in seams.TENSOR_HOOKS] == [1, 1]


def test_what_is_compiled_is_found_inside() -> None:
    module = nn.Linear(2, 2)
    assert seams.inside_compiled(torch.compile(module, backend="eager")) is module
    assert seams.inside_compiled(module) is None


def test_an_operation_says_its_name_and_arguments() -> None:
    found = seams.schema(torch.ops.aten.dropout.default)
    assert (found.name, [a.name for a in found.arguments]) == ("aten::dropout", ["input", "p", "train"])
    assert seams.schema(torch.ops.aten.dropout_.default).name.endswith("_")

    class Seen(seams.TorchDispatchMode):
        names: tuple[str, ...] = ()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names += (seams.schema(func).name,)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        torch.ones(2) + 1
    assert "aten::add" in seen.names


def test_dropouts_are_told_from_other_modules() -> None:
    assert all(map(seams.is_dropout, (nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout())))
    assert not seams.is_dropout(nn.Linear(1, 1))


@pytest.mark.parametrize("name", sorted(seams.STANDING_ALONE))
def test_what_stands_alone_is_there(name: str) -> None:
    installed.attribute(nn.Linear(1, 1), name)
    assert seams.STANDING_ALONE[name]


def test_hooks_are_held_by_number() -> None:
    module = nn.Linear(1, 1)
    handle = module.register_forward_hook(hook := lambda *_: None)
    before = module.register_forward_pre_hook(hook)
    assert dict(module._forward_hooks) == {handle.id: hook}
    assert dict(module._forward_pre_hooks) == {before.id: hook}


def test_a_hook_on_gradients_leaves_a_word_behind() -> None:
    module = nn.Linear(2, 2)
    assert vars(module)[seams.LEFT_BY_HOOKS] is None
    module.register_full_backward_hook(lambda *_: None).remove()
    assert vars(module)[seams.LEFT_BY_HOOKS] is True
