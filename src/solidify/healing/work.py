"""A piece of alignment: which units learn what, from which data; and the loop in which they do."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.artifact import tensors
from solidify.errors import HealingError, refuse
from solidify.healing import ledger, matching
from solidify.healing.learning import Alignment, Learner
from solidify.healing.ledger import Aligned, Kept, Result
from solidify.healing.matching import Call, Unit
from solidify.healing.sources import Batch, order_of_calls
from solidify.model import anatomy
from solidify.surgery import catalogue
from solidify.system import console, foreign

_LOOKED_AT = 4  # batches that the errors before and after are taken from, where none are held out


class Source(Protocol):
    """What gives the calls of the base."""

    def calls(self, index: int, units: Sequence[Unit]) -> dict[str, Call]:
        """Returns the calls of units for one batch, by their names."""


@dataclass
class Work:
    """What is to be done: models, units with the names that learn in each, data, settings.

    `batches` are those that are used, and `order` says which of them is seen at each step.
    """

    model: PreTrainedModel
    base: PreTrainedModel
    batches: Sequence[Batch]
    held_out: Sequence[Batch]
    settings: Alignment
    units: list[Unit] = field(default_factory=list)
    trained: dict[str, list[str]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def learner(self, unit: Unit) -> Learner:
        """Makes the learner of a unit, as the model is now."""
        return Learner(unit, self.model.get_submodule(unit.name), self.trained[unit.name], self.settings)

    def in_own_dtype(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns values by full names in the dtypes and on the devices that the model has them in."""
        return {name: value.to(self.own[name].device, self.own[name].dtype) for name, value in values.items()}

    @property
    def own(self) -> dict[str, torch.Tensor]:
        """The model's own parameters and buffers, by every name that they have."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {**parameters, **dict(self.model.named_buffers(remove_duplicate=False))}

    def mask(self, index: int) -> torch.Tensor | None:
        """Returns which positions of a batch are tokens."""
        return matching.attended(self.batches[index])

    def key(self) -> str:
        """Returns a digest of everything that a result depends on but the unit itself."""
        settings = {key: value for key, value in asdict(self.settings).items() if key not in ("stream", "share")}
        modules = [self.model.get_submodule(name) for unit in self.units for name in unit.members]
        code = [[str(type(m)), _read_source(type(m)), repr(m)] for module in modules for m in module.modules()]
        plain = [{k: repr(v) for k, v in vars(m).items() if isinstance(v, (bool, int, float, str))} for m in modules]
        configs = [part.config.to_json_string(use_diff=False) for part in (self.model, self.base)]
        more = {"settings": settings, "code": code, "values": plain, "configs": configs}
        return ledger.digest_work(self.model, self.base, [*self.batches, *self.held_out], more)


def prepare(
    model: PreTrainedModel,
    base: PreTrainedModel,
    batches: Sequence[Batch],
    records: Sequence[Mapping[str, Any]],
    settings: Alignment,
    held_out: Sequence[Batch],
) -> Work:
    """Finds what is to be done, and all that is wrong with it."""
    earlier = [*unlike_base(model, base, records), *batch_faults(batches), *batch_faults(held_out, "held_out")]
    if not batches:
        earlier.append("there are no batches to learn from")
    units, trained = find_units(model, records, settings, earlier)
    called = order_of_calls(base, batches[0], [unit.name for unit in units])
    if settings.inputs == "healed":
        units.sort(key=lambda unit: called.index(unit.name))
    order = _draw_order(len(batches), settings)
    used = sorted(set(order))
    seen, looked_at = [batches[index] for index in used], held_out or batches[:_LOOKED_AT]
    return Work(model, base, seen, looked_at, settings, units, trained, [used.index(index) for index in order])


def _read_source(kind: type) -> str:
    """Returns the text of a class, and nothing where it has none."""
    return foreign.attempt(inspect.getsource, kind).value or ""


def _draw_order(count: int, settings: Alignment) -> list[int]:
    """Returns which batch is seen at each step: every pass over the data in an order of its own."""
    generator = torch.Generator().manual_seed(settings.seed)
    found: list[int] = []
    while len(found) < settings.max_steps:
        found += torch.randperm(count, generator=generator).tolist()
    return found[: settings.max_steps]


def find_units(
    model: PreTrainedModel, records: Sequence[Mapping[str, Any]], settings: Alignment, earlier: Sequence[str] = ()
) -> tuple[list[Unit], dict[str, list[str]]]:
    """Returns the units of what was replaced, in the order of the model, and the parameters that learn in each.

    `earlier` are faults that were found before, which are raised with those found here.

    Raises:
        HealingError: the settings are wrong, nothing learns, or a module stands at several names.
    """
    faults = [*settings.faults(), *earlier]
    replaced = {record["name"]: record for record in records if catalogue.of(record).matched}
    faults += [
        f"{name} is one module that stands at several names (share), which cannot learn from each of them by itself; "
        "leave it to distillation"
        for name, record in replaced.items()
        if catalogue.of(record).spread
    ][:3]
    if not replaced:
        faults.append("no module of the base was replaced, so nothing can be aligned")
    refuse(HealingError, "the model cannot be aligned as asked", faults)
    names = [name for name, _ in model.named_modules() if name in replaced]
    if settings.match == "heads":
        faults = [words for name in names if (words := matching.projection_fault(model.get_submodule(name), name))]
        refuse(HealingError, "the heads cannot be matched", faults[:4])
    units = matching.units(model, names, settings.match)
    trained = {unit.name: _find_trained(model, unit, records, settings.train) for unit in units}
    faults = [
        f"{name}: nothing in it learns: {settings.train or 'surgery made nothing new'}"
        for name, found in trained.items()
        if not found
    ]
    faults += _find_overlaps(model, units, trained)
    everything = [name for found in trained.values() for name in found]
    own = [("parameter_groups", pattern) for group in settings.parameter_groups for pattern in group.patterns]
    for what, pattern in [*(("train", pattern) for pattern in settings.train), *own]:
        if not anatomy.match_within(pattern, everything):
            faults.append(f"{what}: {pattern!r} names nothing that learns")
    refuse(HealingError, "the model cannot be aligned as asked", faults[:6])
    return units, trained


def _find_overlaps(model: nn.Module, units: Sequence[Unit], trained: Mapping[str, Sequence[str]]) -> list[str]:
    """Says which units cannot learn by themselves: one stands within another, or two share a parameter that learns."""
    names = {unit.name for unit in units}
    faults = [
        f"{name} stands within {outer}, and both learn; leave one of them to distillation"
        for name in sorted(names)
        for outer in sorted(names)
        if name.startswith(f"{outer}.")
    ]
    parameters, owner = dict(model.named_parameters(remove_duplicate=False)), dict[int, str]()
    for unit, learning in trained.items():
        for name in learning:
            other = owner.setdefault(id(parameters[name]), unit)
            if other != unit:
                faults.append(f"{name} is also a parameter of {other}, and both learn; leave it to distillation")
    return faults[:4]


def batch_faults(batches: Any, what: str = "batches") -> list[str]:
    """Says what of batches is not a dictionary of tensors with `input_ids` (batch_size, sequence_length)."""
    if not isinstance(batches, Sequence) or isinstance(batches, (str, bytes)):
        return [f"{what} is a list of batches, but is of type {type(batches).__name__}; write list(...) around it"]
    for number, batch in enumerate(batches):
        where = f"{what}: number {number}"
        if not isinstance(batch, Mapping):
            return [f"{where} is of type {type(batch).__name__}; each is a dictionary of tensors, with input_ids"]
        wrong = [key for key, value in batch.items() if not isinstance(value, torch.Tensor)]
        if wrong:
            return [f"{where} has {', '.join(map(str, wrong[:3]))}, which must be a tensor (torch.tensor(...))"]
        ids = batch.get("input_ids")
        if ids is None or ids.ndim != 2 or ids.is_floating_point():
            found = f"{list(ids.shape)} of {ids.dtype}" if ids is not None else "none"
            return [f"{where} needs input_ids, whole numbers (batch_size, sequence_length), but has {found}"]
        mask = matching.attended(batch)
        if not ids.numel() or (mask is not None and not mask.any()):
            return [f"{where} has no token: it is empty, or its attention_mask is 0 everywhere; leave it out"]
    return []


def unlike_base(model: nn.Module, base: nn.Module, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says why one model cannot be what the other was before its changes."""
    if getattr(base.config, "is_encoder_decoder", False):
        return ["the base has an encoder and a decoder, and which tokens of which count is not settled here yet"]
    if base is model:
        return ["the base is the changed model itself; give the model before the change (copy it, or load it again)"]
    modules, faults, seen = dict(base.named_modules(remove_duplicate=False)), [], set[str]()
    for record in records:
        name, wanted = record["name"], record["old_class"]
        if not catalogue.of(record).matched or name in seen:
            continue
        seen.add(name)
        found = type(modules[name]).__name__ if name in modules else None
        if found is None:
            faults.append(f"the base has no {name}, which was replaced in the model; is it another base?")
        elif found != wanted:
            faults.append(
                f"{name} is of class {found} in the base, where a {wanted} was replaced; are the two swapped?"
            )
    return faults[:4] or _differing(model, base, records)


def _differing(model: nn.Module, base: nn.Module, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compares samples of tensors that no change touched; most of those of the right base are equal."""
    touched = tuple(f"{record['name']}." for record in records)
    ours, theirs = model.state_dict(keep_vars=True), base.state_dict(keep_vars=True)
    common = [n for n, t in ours.items() if n in theirs and not n.startswith(touched) and t.shape == theirs[n].shape]
    equal = sum(tensors.sample(ours[name]) == tensors.sample(theirs[name]) for name in common)
    if 2 * equal >= len(common):
        return []
    return [f"of {len(common)} tensors that no change touched, {len(common) - equal} differ: this is another base"]


def _find_trained(
    model: nn.Module, unit: Unit, records: Sequence[Mapping[str, Any]], patterns: Sequence[str]
) -> list[str]:
    """Returns the parameters of a unit's members that learn: those named, or those that surgery made, or all."""
    parameters = [
        f"{name}.{key}"
        for name in unit.members
        for key, tensor in model.get_submodule(name).named_parameters(remove_duplicate=False)
        if tensor.is_floating_point()
    ]
    if patterns:
        return [name for pattern in patterns for name in anatomy.match_within(pattern, parameters)]
    made = {name for record in records for name in record["new"]}
    return [name for name in parameters if name in made]


def align_units(work: Work, mine: Sequence[Unit], source: Source, looking: Source, kept: Kept) -> list[Result]:
    """Aligns units together, a step each for every call of `source`, and keeps what became of them.

    The errors before and after are those over the calls of `looking`.
    """
    found = {unit.name: kept.find(unit.name) for unit in mine}
    learners = [work.learner(unit) for unit in mine if found[unit.name] is None]
    started = time.perf_counter()
    before = _measure(learners, looking, work.held_out)
    _teach(learners, source, work)
    for learner in learners:
        learner.round_values(work.own)
    after = _measure(learners, looking, work.held_out)
    seconds = (time.perf_counter() - started) / max(1, len(learners))
    for learner in learners:
        name = learner.unit.name
        found[name] = kept.keep(_make_result(learner, work, before[name], after[name], seconds))
    return [result for result in found.values() if result is not None]


def _title(learners: Sequence[Learner]) -> str:
    """Returns what a bar says of who learns."""
    return f"Aligning {len(learners)} modules" if len(learners) != 1 else f"Aligning {learners[0].unit.name}"


def _teach(learners: Sequence[Learner], source: Source, work: Work) -> None:
    """Lets units learn, a step each on every batch, until each has ended.

    Raises:
        HealingError: an error became infinite, or nothing that learns moves what is matched.
    """
    if not learners:
        return
    with console.progress(_title(learners), work.settings.max_steps) as advance:
        for index in work.order:
            learning = [learner for learner in learners if not learner.finished]
            if not learning:
                break
            calls = source.calls(index, [learner.unit for learner in learning])
            for learner in learning:
                learner.step(calls[learner.unit.name], work.mask(index))
            lately = [learner.errors[-1] for learner in learning if learner.errors]
            advance(f"error {sum(lately) / max(1, len(lately)):.3g}")
    refuse(HealingError, "alignment stopped", [learner.fault for learner in learners if learner.fault][:4])


def _measure(learners: Sequence[Learner], source: Source, batches: Sequence[Batch]) -> dict[str, float]:
    """Returns every unit's relative error over batches."""
    calls: dict[str, list[Any]] = {learner.unit.name: [] for learner in learners}
    units = [learner.unit for learner in learners]
    for index, batch in enumerate(batches if learners else ()):
        for name, call in source.calls(index, units).items():
            calls[name].append((call, matching.attended(batch)))
    return {learner.unit.name: learner.error(calls[learner.unit.name]) for learner in learners}


def _make_result(learner: Learner, work: Work, before: float, after: float, seconds: float) -> Result:
    """Writes down what became of a unit."""
    tokens = sum(_count_tokens(work.batches[index]) for index in work.order[: len(learner.errors)])
    aligned = Aligned(
        learner.unit.name, learner.unit.members, before, after, len(learner.errors), tokens, seconds, learner.errors
    )
    return Result(aligned, work.in_own_dtype(learner.changed(work.own)))


def _count_tokens(batch: Batch) -> int:
    mask = matching.attended(batch)
    return int(mask.sum()) if mask is not None else int(next(iter(batch.values())).numel())


def put_values(model: nn.Module, results: Sequence[Result]) -> None:
    """Gives a model what its units learned, in place."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for result in results:
        for name, value in result.values.items():
            own[name].data = value  # mapped, where it stands in a file
