"""Adds a module that was not there: a head that reads what some module returns and speaks in the model's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.behaviour import calling
from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy, operations
from solidify.model.extent import Extent
from solidify.surgery import constructing, control, declaring, initial
from solidify.surgery.control import Control
from solidify.surgery.edit_record import Edit
from solidify.surgery.transaction import transaction
from solidify.system import foreign
from solidify.weights import storable


def add(
    model: PreTrainedModel,
    name: str,
    module: type[nn.Module],
    *,
    reads: str | Sequence[str],
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    declares: Mapping[str, bool] | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Adds a new module called `name` in place; it is called with what the module `reads` returns.

    `reads` returns a tensor, or a tuple of which the first is taken, such as the final norm's (batch_size,
    sequence_length, hidden_size). A list of names (layers, the final norm, the embeddings) gives the module as many
    arguments, in that order, once all have run. What the new module returns stands in the model's outputs under
    `name`; the outputs that were there before are untouched. Constructor parameters `config` and `layer_idx` are
    supplied, all others come from `arguments`; `weights` is loaded once here.

    Raises:
        SurgeryError: the name is taken or its parent or one of `reads` does not exist (or comes twice), the
            constructor's arguments or the weights do not fit, or the module fails on what it reads. The model is then
            as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise SurgeryError(f"surgery is done on a transformers model, and not on {type(model).__name__}")
    arguments = dict(arguments or {})
    names = {n for n, _ in model.named_modules()}
    parent, _, child = name.rpartition(".")
    sources = [reads] if isinstance(reads, str) else list(reads)
    faults = _find_unreadable(sources, names)
    if parent not in names:
        faults.append(f"{name!r} cannot be added: there is no {parent!r}")
    elif name in names or hasattr(model.get_submodule(parent), child):
        faults.append(f"{name!r} is there already; replace it, or choose another name")
    faults += constructing.faults(module, arguments, without=("original",))
    refuse(SurgeryError, f"{getattr(module, '__name__', module)} cannot be added as asked", faults)
    extent = Extent.given(extent, model)
    before = control.take_at(model, sources, extent)
    supplied = constructing.supplied_to(module)
    given = reads if isinstance(reads, str) else sources
    settings = {"reads": given, "prefix": "", "class": "it", "supplied": supplied, "arguments": arguments}
    declared = declaring.declared(module, declares)
    called = foreign.calling(f"{module.__name__} cannot be built or fails on what {_list_words(sources)}")
    with transaction(model, extent, changes=[name]) as started, called:
        with constructing.under(model.dtype), torch.device("meta" if before.inputs is None else "cpu"):
            operations.add(model, [name], settings, {"it": module})
        head = model.get_submodule(name)
        if unstorable := storable.say_first_unstorable(name, head, filled=before.inputs is not None):
            raise SurgeryError(f"{module.__name__} cannot be added: {unstorable}")
        apart = [""] if hasattr(head, "join") else []  # by it, a head tells the model what transformers must know of it
        started.refuse_altered(module, hooks=(operations.Listener,), apart=apart)
        head.to(device=model.device).train(model.training)
        if weights is not None:
            state = initial.read(weights)
            refuse(SurgeryError, "the weights do not fit", initial.load(name, head, nn.Module(), state, [name]))
        if before.inputs is not None:
            _try_head(model, name, before)
        what, fresh = type(head).__name__, [f"{name}.{key}" for key in head.state_dict()]
        judged = control.judge_at(model, before, name, what=what, fresh=fresh, declared=declared)
        refuse(SurgeryError, f"{what} cannot be added as asked", judged.faults)
    return [_make_record(model, name, head, arguments, supplied, given, declared, probed=before.inputs is not None)]


def _find_unreadable(reads: Sequence[str], names: set[str]) -> list[str]:
    """Returns what is wrong with what is to be read."""
    faults = [] if reads else ["`reads` is empty: name the modules that it is to be called with"]
    unknown = [read for read in reads if read not in names - {""}]
    faults += [f"{read!r} is not a module; {anatomy.suggestions(read, names)}" for read in unknown]
    return faults + [f"{read!r} is read twice" for read in dict.fromkeys(reads) if list(reads).count(read) > 1]


def _list_words(reads: Sequence[str]) -> str:
    return f"{reads[0]} returns" if len(reads) == 1 else f"{', '.join(reads[:-1])} and {reads[-1]} return"


def _try_head(model: PreTrainedModel, name: str, before: Control) -> None:
    """Runs the model once with the new module: its answer must be there, and nothing else may have moved."""
    assert before.inputs is not None and before.output is not None
    with torch.no_grad(), anatomy.evaluation(model), calling.buffers_kept(model):
        outputs = model(**before.inputs)
    if not _is_answer(outputs.get(name)):
        raise SurgeryError(f"{name} must return a tensor or a tuple of tensors, not {type(outputs.get(name)).__name__}")
    if not torch.equal(anatomy.run(model, before.inputs), before.output):
        raise SurgeryError(
            f"{name} changes what it reads in place, which changes the model's own outputs; work on a copy"
        )


def _is_answer(answer: Any) -> bool:
    if isinstance(answer, (tuple, list)):
        return bool(answer) and all(isinstance(part, torch.Tensor) for part in answer)
    return isinstance(answer, torch.Tensor)


def _make_record(
    model: PreTrainedModel,
    name: str,
    head: nn.Module,
    arguments: dict[str, Any],
    supplied: Sequence[str],
    reads: str | list[str],
    declares: dict[str, bool],
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
        frozen=constructing.frozen(head),
        parameters_before=0,
        parameters_after=anatomy.count(head.parameters()),
        probed=probed,
        identical=probed,
        bypass=True,  # the model's own outputs are the base's, whatever the head says
        operation="add",
        settings={"reads": reads},
        declares=declares,
    )
