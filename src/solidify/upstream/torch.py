"""The private names of PyTorch that the package uses, each under a name of ours.

`TESTED` is the minor version that they were read and tried in; `tests/upstream/` compares each with the one installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every operation; not in `utils`

TESTED = "2.13"

# Where a module keeps its children, and all that is registered in it.
CHILDREN = "_modules"
TABLES = ("_parameters", "_buffers", CHILDREN)
# What a hook on gradients leaves behind in a module, once it is taken off.
LEFT_BY_HOOKS = "_is_full_backward_hook"
# Where a tensor keeps its hooks: there is no public list of them, so they could not be put back.
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the table of a module's own parameters, to read or to change.

    The public ways leave out what is None or met before, and to set an attribute calls the module's `__setattr__`.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Returns the table of a module's own buffers, as `own_parameters` does."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns the table of a module's children, as `own_parameters` does."""
    return module._modules


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Returns which of a module's own buffers its state leaves out (`persistent=False`); nothing public says so."""
    return module._non_persistent_buffers_set


def module_hooks(module: nn.Module) -> list[tuple[str, Any, bool]]:
    """Returns a module's forward hooks: the method that registers such, the function, and whether it takes kwargs.

    There is no public list of a module's hooks. Those that see outputs even after an error are left out.
    """
    after, before = module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs
    return [
        *(("register_forward_pre_hook", hook, number in before) for number, hook in module._forward_pre_hooks.items()),
        *(("register_forward_hook", hook, number in after) for number, hook in module._forward_hooks.items()),
    ]


def other_hooks(module: nn.Module) -> int:
    """Returns how many hooks of other kinds a module has: on gradients, and on its state."""
    tables = (module._backward_hooks, module._backward_pre_hooks, module._state_dict_pre_hooks)
    return sum(len(table) for table in tables)


def every_hook(module: nn.Module) -> dict[str, list[Any]]:
    """Returns the functions of all hooks that a module has, by their kind; empty kinds too.

    Left out are torch's own that read older states: `weight_norm` leaves one behind when it is taken off.
    """
    loading = [
        hook
        for hook in module._load_state_dict_pre_hooks.values()
        if not str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")
    ]
    return {
        "before its forward": list(module._forward_pre_hooks.values()),
        "after its forward": list(module._forward_hooks.values()),
        "before its gradient": list(module._backward_pre_hooks.values()),
        "after its gradient": list(module._backward_hooks.values()),
        "before its state is read": list(module._state_dict_pre_hooks.values()),
        "after its state is read": list(module._state_dict_hooks.values()),
        "before its state is loaded": loading,
        "after its state is loaded": list(module._load_state_dict_post_hooks.values()),
    }


def writes(tensor: torch.Tensor) -> int:
    """Returns a number that grows when a tensor is written to in place, which nothing else shows without a copy."""
    return tensor._version


def inside_compiled(model: nn.Module) -> nn.Module | None:
    """Returns what `torch.compile` wrapped; None for what it did not: neither the class nor its content is public."""
    from torch._dynamo import OptimizedModule

    return model._orig_mod if isinstance(model, OptimizedModule) else None


def leave_out_of_broadcast(model: nn.Module, names: Sequence[str]) -> None:
    """Lets DistributedDataParallel neither send nor watch some parameters; FSDP alone has a public argument for it."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]


def schema(operation: Any) -> Any:
    """Returns the name and arguments of an operation, with their defaults, as `__torch_dispatch__` receives it."""
    return operation._schema


def is_dropout(module: nn.Module) -> TypeGuard[nn.modules.dropout._DropoutNd]:
    """Returns whether a module is one of PyTorch's dropouts, whose shared class has no public name."""
    return isinstance(module, nn.modules.dropout._DropoutNd)


# Private names in files that are copied into artifacts or run without solidify, where nothing of this room can be
# imported. `tests/test_house.py` compares the files with this list, `tests/upstream/` the list with PyTorch.
STANDING_ALONE = {
    "_forward_hooks": "transformers' recording hooks are found and moved: there is no public list of a module's hooks",
    "_forward_pre_hooks": "likewise, for the hook that says what a model withholds",
    "_parameters": "what a model's parts hold is put back after a measurement, None and shared ones too",
    "_buffers": "likewise",
    "_non_persistent_buffers_set": "which buffers a state holds: those that a pass moves are put back",
}
