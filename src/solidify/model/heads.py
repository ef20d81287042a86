"""Adds a module that was not there: a head that reads what some module returns and speaks in the model's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy, contract, initial, operations, probing, surgery
from solidify.model.surgery import Edit


def add(
    model: PreTrainedModel,
    name: str,
    module: type[nn.Module],
    *,
    reads: str,
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
) -> list[Edit]:
    """Adds a new module called `name` in place; it is called with what the module `reads` returns.

    `reads` returns a tensor, or a tuple of which the first is taken, such as the final norm's (batch_size,
    sequence_length, hidden_size). What the new module returns stands in the model's outputs under `name`; the outputs
    that were there before are untouched. Constructor parameters `config` and `layer_idx` are supplied, all others come
    from `arguments`; `weights` is loaded once here.

    Raises:
        SurgeryError: the name is taken or its parent or `reads` does not exist, the constructor's arguments or the
            weights do not fit, or the module fails on what it reads. The model is then as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise SurgeryError(f"surgery is done on a transformers model, but this is a {type(model).__name__}")
    arguments = dict(arguments or {})
    names = {n for n, _ in model.named_modules()}
    parent, _, child = name.rpartition(".")
    faults = [] if reads in names and reads else [f"{reads!r} is no module; {anatomy.suggestions(reads, names)}"]
    if parent not in names:
        faults.append(f"{name!r} cannot be added: there is no {parent!r}")
    elif name in names or hasattr(model.get_submodule(parent), child):
        faults.append(f"{name!r} is there already; replace it, or choose another name")
    faults += surgery.constructor_faults(module, arguments, without=("original",))
    refuse(SurgeryError, f"{getattr(module, '__name__', module)} cannot be added as asked", faults)
    before = _outputs(model)
    supplied = surgery.supplied_to(module)
    settings = {"reads": reads, "prefix": "", "class": "it", "supplied": supplied, "arguments": arguments}
    hooks = _hooks(model, reads)
    try:
        with torch.device("meta" if before is None else "cpu"):
            operations.add(model, [name], settings, {"it": module})
        head = model.get_submodule(name)
        head.to(device=model.device, dtype=model.dtype).train(model.training)
        if weights is not None:
            state = initial.read(weights)
            refuse(SurgeryError, "the weights do not fit", initial.load(name, head, nn.Module(), state, [name]))
        _try(model, name, before)
    except (SurgeryError, *contract.CALL_ERRORS) as error:
        _undo(model, parent, child, reads, hooks)
        if isinstance(error, SurgeryError):
            raise
        raise SurgeryError(
            f"{module.__name__} fails on what {reads} returns: {type(error).__name__}: {error}"
        ) from error
    return [_record(model, name, head, arguments, supplied, reads, probed=before is not None)]


def _outputs(model: PreTrainedModel) -> torch.Tensor | None:
    return None if anatomy.is_meta(model) else anatomy.run(model, probing.probe_inputs(model))


def _hooks(model: PreTrainedModel, reads: str) -> list[tuple[Any, set[int]]]:
    """Notes which hooks there are where a head will place its own."""
    tables = (model._forward_pre_hooks, model._forward_hooks, model.get_submodule(reads)._forward_hooks)
    return [(table, set(table)) for table in tables]


def _undo(model: PreTrainedModel, parent: str, child: str, reads: str, hooks: Sequence[tuple[Any, set[int]]]) -> None:
    for table, kept in hooks:
        for key in [key for key in table if key not in kept]:
            del table[key]
    model.get_submodule(parent)._modules.pop(child, None)


def _try(model: PreTrainedModel, name: str, before: torch.Tensor | None) -> None:
    """Runs the model once with the new module: its answer must be there, and nothing else may have moved."""
    if before is None:
        return
    inputs = probing.probe_inputs(model)
    with torch.no_grad(), anatomy.evaluation(model):
        outputs = model(**inputs)
    if not _is_answer(outputs.get(name)):
        raise SurgeryError(f"{name} must return a tensor or a tuple of tensors, not {type(outputs.get(name)).__name__}")
    if not torch.equal(anatomy.run(model, inputs), before):
        raise SurgeryError(f"{name} changes what it reads in place, so the model's own outputs move")


def _is_answer(answer: Any) -> bool:
    if isinstance(answer, (tuple, list)):
        return bool(answer) and all(isinstance(part, torch.Tensor) for part in answer)
    return isinstance(answer, torch.Tensor)


def _record(
    model: PreTrainedModel,
    name: str,
    head: nn.Module,
    arguments: dict[str, Any],
    supplied: Sequence[str],
    reads: str,
    *,
    probed: bool,
) -> Edit:
    return Edit(
        name=name,
        old_class="nothing",
        module_class=type(head),
        arguments=arguments,
        supplied=tuple(supplied),
        tensors=dict.fromkeys((f"{name}.{key}" for key in head.state_dict()), None),
        dropped=(),
        frozen=surgery.frozen(head),
        parameters_before=0,
        parameters_after=anatomy.count(head.parameters()),
        probed=probed,
        identical=probed,
        bypass=True,  # the model's own outputs are the base's, whatever the head says
        operation="add",
        settings={"reads": reads},
    )
