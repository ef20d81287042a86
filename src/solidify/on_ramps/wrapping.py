"""`solidify.wrap`: a module of plain torch (or timm, or torchvision) becomes a model of transformers.

What its class is made with is read off the module, or given, and tried: the module is built again, and must be the same
in its parts and in what it returns. The artifact builds it so too; it carries the classes' source.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import ModelError, refuse
from solidify.model import anatomy
from solidify.modules import wrapped_module
from solidify.surgery.describing import WRAPPING, Classes, assemble, describe, part_faults
from solidify.surgery.edit_record import Edit
from solidify.system import foreign

NAME = "module"  # where it stands in the model
_KINDS: dict[str, type[wrapped_module.Wrapped]] = {
    "pixel_values": wrapped_module.WrappedForImageClassification,
    "input_ids": wrapped_module.WrappedForSequenceClassification,
    "inputs": wrapped_module.WrappedModel,
}
_AUTOS = {
    "pixel_values": "AutoModelForImageClassification",
    "input_ids": "AutoModelForSequenceClassification",
    "inputs": "AutoModel",
}


def wrap(
    module: nn.Module,
    example_inputs: torch.Tensor | Mapping[str, torch.Tensor],
    *,
    arguments: Mapping[str, Any] | None = None,
    problem_type: str | None = None,
) -> PreTrainedModel:
    """Puts a module into a model of transformers, in evaluation mode, and returns that; the module itself is used.

    `example_inputs` is one batch of what the module takes: (batch_size, channels, height, width) floats are images
    (`pixel_values`), (batch_size, sequence_length) integers are tokens (`input_ids`), all else is `inputs`; a mapping
    of one name says which. `arguments` are those of the module's constructor where they cannot be read off its
    attributes; classes among them are allowed, and for a `nn.Sequential` they are given by the child's name.
    `problem_type` says which loss labels have, as transformers' classifiers do (left out, it follows from the labels).

    `solidify.build(model, edits, directory)` writes it, with or without edits. Surgery names what is inside `module.`.

    Raises:
        ModelError: the module takes several inputs or returns no tensor, what its constructor was given is not known,
            or, built again, it is not the same. All reasons together.
    """
    if isinstance(module, PreTrainedModel):
        raise ModelError(f"{type(module).__name__} is a model of transformers already; use it as it is")
    name, given = _read_example(example_inputs)
    classes = Classes()
    tree = describe(NAME, module, arguments, classes)
    refuse(ModelError, f"{type(module).__name__} cannot be wrapped", classes.faults)
    before = _call(module, given)
    _refuse_unlike(module, tree, classes, given, before)
    config = wrapped_module.WrappedConfig(
        example_inputs=_describe_input(name, given),
        num_labels=before.shape[-1] if before.ndim == 2 else 1,
        problem_type=problem_type,
        dtype=next((p.dtype for p in module.parameters()), torch.float32),
    )
    kind = _KINDS[name]
    config.auto_map = {auto: f"wrapped_module.{kind.__name__}" for auto in dict.fromkeys(("AutoModel", _AUTOS[name]))}
    model: Any = kind(config)
    model.module = module
    vars(model)[WRAPPING] = _record(module, tree, classes)
    found: PreTrainedModel = model.eval()
    return found


def _read_example(example: torch.Tensor | Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    if isinstance(example, Mapping):
        if len(example) != 1 or next(iter(example)) not in _KINDS:
            raise ModelError(
                f"example_inputs names {', '.join(map(str, example)) or 'nothing'}; wrap takes one of "
                f"{', '.join(_KINDS)} (a module of several inputs goes into one of your own that takes one)"
            )
        ((name, tensor),) = example.items()
    else:
        name, tensor = "", example
    if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2:
        raise ModelError("example_inputs is a tensor with the batch as its first axis, as the module takes it")
    if not name:
        images = tensor.is_floating_point() and tensor.ndim == 4
        name = "pixel_values" if images else "input_ids" if _is_tokens(tensor) else "inputs"
    return name, tensor


def _is_tokens(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.ndim == 2


def _describe_input(name: str, given: torch.Tensor) -> dict[str, Any]:
    whole = not given.is_floating_point()
    return {
        "name": name,
        "shape": list(given.shape[1:]),
        "dtype": str(given.dtype).removeprefix("torch."),
        "below": int(given.max()) + 1 if whole and given.numel() else None,
    }


def _call(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Returns what the module makes of the example, in evaluation mode."""
    with torch.no_grad(), anatomy.evaluation(module):
        outcome = foreign.attempt(module, given)
    if outcome.error is not None:
        raise ModelError(f"the module does not run on example_inputs: {foreign.said(outcome.error)}")
    if not isinstance(outcome.value, torch.Tensor):
        raise ModelError(
            f"{type(module).__name__} returns {type(outcome.value).__name__}; a module that is wrapped returns one "
            "tensor: put it into one of your own that does"
        )
    return outcome.value


def _refuse_unlike(
    module: nn.Module, tree: dict[str, Any], classes: Classes, given: torch.Tensor, before: torch.Tensor
) -> None:
    """Builds the module once more, and compares parts, state, and what it returns."""
    title = f"{type(module).__name__} cannot be wrapped: built again by its class, it is not the same"
    with torch.random.fork_rng([]):
        holder = nn.Module()
        holder.add_module(NAME, nn.Identity())
        entry = {"classes": [str(n) for n in range(len(classes.found))], "arguments": tree}
        kinds = {str(number): cls for number, cls in enumerate(classes.found)}
        built = foreign.attempt(assemble, holder, [NAME], entry, kinds)
    remedy = "; say with arguments={...} what its constructor was given, or put the change into the class"
    if built.error is not None:
        raise ModelError(f"{title}: {foreign.said(built.error)}{remedy}")
    again = holder.get_submodule(NAME)
    faults = list(part_faults(module, again, NAME))
    if not faults:
        again.to(next((p.dtype for p in module.parameters()), torch.float32))
        again.load_state_dict(copy.deepcopy(module.state_dict()))
        after = _call(again, given)
        if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-4, atol=1e-5, equal_nan=True):
            faults.append("with the same weights, it returns something else on example_inputs")
    refuse(ModelError, title + remedy, faults[:8])


def _record(module: nn.Module, tree: dict[str, Any], classes: Classes) -> Edit:
    names = [f"{NAME}.{key}" for key in module.state_dict()]
    count = anatomy.count(module.parameters())
    return Edit(
        name=NAME,
        old_class="Identity",
        module_class=type(module),
        arguments=tree,
        supplied=(),
        tensors={name: name for name in names},
        dropped=(),
        frozen=(),
        parameters_before=count,
        parameters_after=count,
        probed=True,
        identical=True,
        bypass=False,
        operation="wrap",
        further=tuple(classes.found),
    )
