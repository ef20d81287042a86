"""The control of a change: how the model behaves before a new module is built, and the judgement afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.behaviour import probes
from solidify.behaviour.properties import PROPERTIES, RECORDS, Fault, Reading
from solidify.behaviour.values import noise
from solidify.behaviour.watching import Watched
from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy, probing, quantized
from solidify.model.extent import Extent
from solidify.surgery import contract
from solidify.system import foreign

_SCALES = (1.0, 0.1)  # of the noise in new parameters; the second where the first gives infinity

_NAMED = 6  # at most, in a message

_NOISY = ", once its own parameters are not at their start"

_TITLES = {
    "causal": "the model is causal, but {what} looks ahead",
    "cache": "the model keeps a cache, but with {what} it computes something else over it",
    "crop": "positions could be taken back from the model's cache, but with {what} they cannot",
    "padding": "padding reaches what is not padding through {what}",
    "rows": "through {what} a row depends on the other rows of its batch",
    "stateless": "with {what} a call depends on earlier calls",
    "deterministic": "{what} draws random numbers in evaluation",
    "hidden_states": "with {what} hidden states are not recorded as before",
    "attentions": "with {what} attentions are not recorded as before",
    "router_logits": "with {what} router logits are not recorded as before",
}
# What makes other properties seem broken, from what nothing here explains on.
_CAUSES: tuple[set[str], ...] = ({"stateless", "deterministic"}, {"causal"}, {"rows"})
_REMEDIES = {
    "causal": "mask or shift what it mixes",
    "cache": "keep what earlier positions leave behind in past_key_values, under its layer_idx",
    "crop": "have its layer of the cache forget them in `crop`",
    "padding": "obey attention_mask and position_ids",
    "rows": "compute every row by itself",
    "stateless": "keep nothing from call to call in evaluation",
    "deterministic": "draw only while self.training",
    "hidden_states": "return the hidden states first, as the original does",
    "attentions": "return the attention weights second, as the original does",
    "router_logits": "let its router be the family's own class, or a subclass",
}


@dataclass(frozen=True)
class Control:
    """What the unchanged model showed: single `calls` of the modules that will be replaced (of a bounded model, of the
    first of each kind), and a `reading` of its behaviour (None where it cannot be run). `output` is the whole model's,
    where that was asked for. `wide` is the reading in float32 of a small model in half precision.
    """

    inputs: dict[str, torch.Tensor] | None
    calls: dict[str, contract.Call]
    reading: Reading | None
    wide: Reading | None = None
    probed: tuple[str, ...] = ()
    alone: bool = False
    output: torch.Tensor | None = None

    @property
    def distances(self) -> dict[str, float]:
        """What the probes measured: how far each property was from holding exactly."""
        sharp = self.wide or self.reading
        return dict(sharp.distances) if sharp is not None else {}

    @property
    def watched(self) -> dict[str, Any]:
        """Where the model is watched: at its outputs and the modules, or at these `alone`."""
        return {"at": self.probed, "leave": self.alone}


@dataclass(frozen=True)
class Judgement:
    """What a changed model does not keep: `faults` in sentences, and properties `lost` that nobody will miss."""

    faults: list[str] = field(default_factory=list)
    lost: frozenset[str] = frozenset()


def take(model: PreTrainedModel, names: Sequence[str], extent: Extent) -> Control:
    """Runs the model as it is, before a change of the named modules. Nothing is run on the meta device.

    Raises:
        SurgeryError: no inputs can be made up that the model accepts, or it is quantised.
    """
    quantized.refuse(model)
    kinds = first_of_each_kind(model, names)
    probed, alone = extent.sample(names, list(kinds)), not extent.whole
    if anatomy.is_meta(model):
        return Control(None, {}, None, None, probed, alone)
    inputs = extent.inputs(model)
    before = Control(inputs, {}, None, None, tuple(kinds), alone)
    calls, reading = _calls_and_reading(model, before, probed)
    _refuse_spoilt(model, reading)
    called = tuple(name for name in kinds if name in calls)
    for name in called:
        calls[name] = contract.with_habits(model.get_submodule(name), calls[name])
    before = dataclasses.replace(before, calls=calls, probed=called)
    wide = _read_model(model, before, wide=True) if is_half(model) and extent.whole else None
    return dataclasses.replace(before, reading=reading, wide=wide)


def _calls_and_reading(
    model: PreTrainedModel, before: Control, names: Sequence[str]
) -> tuple[dict[str, contract.Call], Reading | None]:
    """Returns the first call of each module, and the reading; a small model's first pass serves both."""
    if not before.alone:
        with contract.recording(model, names) as calls:
            reading = _read_model(model, before)
        if reading is not None:
            return calls, reading
    calls = contract.record(model, names, before.inputs or {}, partly=before.alone)
    watched = dataclasses.replace(before, probed=tuple(name for name in before.probed if name in calls))
    return calls, _read_model(model, watched) if watched.probed else None


def is_half(model: PreTrainedModel) -> bool:
    """Returns whether a model is in half precision, where rounding hides much."""
    return model.dtype in (torch.bfloat16, torch.float16)


def _read_model(model: PreTrainedModel, before: Control, *, wide: bool = False) -> Reading | None:
    with anatomy.sparing(model):
        return foreign.attempt(probes.read, Watched(model, before.inputs or {}, wide=wide, **before.watched)).value


def take_whole(model: PreTrainedModel, extent: Extent) -> Control:
    """Runs the whole model as it is, however large, before layers or experts are rearranged.

    Raises:
        SurgeryError: no inputs can be made up that the model accepts, or it is quantised.
    """
    quantized.refuse(model)
    if anatomy.is_meta(model):
        return Control(None, {}, None)
    inputs = extent.inputs(model)
    before = Control(inputs, {}, None)
    reading = _read_model(model, before)
    _refuse_spoilt(model, reading)
    with anatomy.sparing(model):
        output = anatomy.run(model, inputs)
    return dataclasses.replace(before, reading=reading, output=output)


def judge_whole(
    model: PreTrainedModel, before: Control, what: str, *, unrecorded: Collection[str] = (), advice: str = ""
) -> bool:
    """Returns whether the model computes what it did before; refuses what no rearrangement may bring about.

    How many outputs are recorded may change; that none are, of the `unrecorded` kinds alone. `advice` says what to do
    where the model does not run.

    Raises:
        SurgeryError: it does not run, or does not behave as before.
    """
    if before.inputs is None:
        return False
    with anatomy.sparing(model):
        output = foreign.attempt(anatomy.run, model, before.inputs)
    if output.error is not None:
        raise SurgeryError(f"with {what} the model does not run: {foreign.said(output.error)}{advice}")
    assert output.value is not None
    old = before.output
    if old is not None and output.value.shape != old.shape:
        raise SurgeryError(f"with {what} the output has shape {list(output.value.shape)}, not {list(old.shape)}")
    if before.reading is not None:
        with foreign.calling(f"with {what} the model does not run"), anatomy.sparing(model):
            after, found = probes.judge(Watched(model, before.inputs), before.reading)
        allowed = {*after.recorded, *unrecorded} & set(RECORDS)
        lost = [fault for fault in found if fault.property not in allowed]
        refuse(SurgeryError, f"with {what} the model does not behave as before", sentences(lost, what, {}))
    return old is not None and torch.equal(output.value, old)


def take_at(model: PreTrainedModel, names: Sequence[str], extent: Extent) -> Control:
    """Runs the model as it is, before something is added that reads what some modules return: they are watched alone.

    Raises:
        SurgeryError: no inputs can be made up that the model accepts, or it is quantised.
    """
    quantized.refuse(model)
    if anatomy.is_meta(model):
        return Control(None, {}, None)
    before = Control(probing.probe_inputs(model), {}, None, None, tuple(names), alone=True)
    reading = _read_model(model, before)
    _refuse_spoilt(model, reading)
    wide = _read_model(model, before, wide=True) if is_half(model) and extent.whole else None
    return dataclasses.replace(before, reading=reading, wide=wide, output=anatomy.run(model, before.inputs or {}))


def judge_at(
    model: PreTrainedModel, before: Control, name: str, *, what: str, fresh: Iterable[str], declared: Mapping[str, bool]
) -> Judgement:
    """Judges whether what a new module returns behaves as what it reads; a return without positions is not looked at.

    Raises:
        SurgeryError: with the new module, the model does not run.
    """
    control = dataclasses.replace(before, probed=(name,))
    if control.inputs is None or control.reading is None or not control.reading.plain:
        return Judgement()
    with foreign.calling(f"with {what} in place the model does not run", SurgeryError), anatomy.sparing(model):
        found = probes.read(Watched(model, control.inputs, **control.watched), whole=False)
    if name not in found.plain:
        return Judgement()
    return judge(model, control, what=what, fresh=fresh, declared=declared, identical=True)


def first_of_each_kind(model: PreTrainedModel, names: Sequence[str]) -> dict[str, object]:
    """Returns the first name of each kind: modules of one class whose tensors have the same names and shapes."""
    kinds: dict[object, str] = {}
    for name in names:
        kinds.setdefault(kind_of(model.get_submodule(name)), name)
    return {name: kind for kind, name in kinds.items()}


def kind_of(module: nn.Module) -> object:
    """Returns what modules have in common that are treated alike: class, and names, shapes and dtypes of tensors."""
    return type(module), tuple((key, tuple(t.shape), t.dtype) for key, t in module.state_dict(keep_vars=True).items())


def judge(
    model: PreTrainedModel,
    control: Control,
    *,
    what: str,
    fresh: Iterable[str],
    declared: Mapping[str, bool],
    identical: bool,
) -> Judgement:
    """Judges whether the changed model keeps the contract; what is `declared` is not asked for.

    It is run as it stands (once only, if all new modules were found `identical`), and once more with noise in its new
    parameters (`fresh`): a new branch that starts at zero hides what it mixes.

    Raises:
        SurgeryError: with the change in place, the model does not run.
    """
    if control.inputs is None:
        return Judgement()
    remedy = "it may read an attribute of the module that it replaced (as `.weight`): give the new module one"
    values = _new_parameters(model, anatomy.names_within(fresh, control.probed) if control.alone else fresh)
    sharp = control.wide or control.reading
    if identical and values and sharp is not None:  # what is found with noise is found as it stands too
        noisy = _find_faults(model, control, sharp, values, wide=sharp is control.wide)
        if noisy is not None:
            return _make_judgement(model, noisy, what, declared, _NOISY)
    called = foreign.calling(f"with {what} in place the model does not run", SurgeryError, remedy=remedy)
    with called, anatomy.sparing(model):
        watched = Watched(model, control.inputs, **control.watched)
        if control.reading is None:
            reading, found = probes.read(watched, whole=False), list[Fault]()
        else:
            reading, found = probes.judge(watched, control.reading)
    if control.reading is None:
        return Judgement()
    if _is_finite(control.reading) and not _is_finite(reading):
        return Judgement([f"with {what} in place the model returns NaN or infinity"])
    if control.wide is not None:
        found += _find_faults(model, control, control.wide, {}, wide=True) or []
    judgement = _make_judgement(model, found, what, declared)
    if judgement.faults or not values or sharp is None:
        return judgement
    later = _find_faults(model, control, sharp, values, wide=sharp is control.wide) or []
    shaken = _make_judgement(model, later, what, declared, _NOISY)
    return Judgement(shaken.faults, judgement.lost | shaken.lost)


def _find_faults(
    model: PreTrainedModel, control: Control, before: Reading, fresh: Mapping[str, torch.Tensor], *, wide: bool
) -> list[Fault] | None:
    """Reads the model, with noise in `fresh` parameters; None for what does not run, or gives no finite outputs."""
    for scale in _SCALES if fresh else (0.0,):
        values = {n: (p + scale * (noise(n, p) - p)).detach() for n, p in fresh.items()}
        watched = Watched(model, control.inputs or {}, values=values, wide=wide, **control.watched)
        with anatomy.sparing(model):
            outcome = foreign.attempt(probes.judge, watched, before).value
        if outcome is not None and _is_finite(outcome[0]):
            return outcome[1]
    return None


def _make_judgement(
    model: PreTrainedModel, found: Sequence[Fault], what: str, declared: Mapping[str, bool], when: str = ""
) -> Judgement:
    """Tells what need not be kept from what must be: router logits may go where nobody asks for them by default."""
    by_default = any(vars(c).get("output_router_logits") for c in (model.config, model.config.get_text_config()))
    gone = any(fault.name == "router_logits" for fault in found) and not by_default
    lost = frozenset({"router_logits"} if gone and "router_logits" not in declared else ())
    return Judgement(sentences(found, what, {**declared, **dict.fromkeys(lost, False)}, when), lost)


def _new_parameters(model: PreTrainedModel, fresh: Iterable[str]) -> dict[str, torch.Tensor]:
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    parameters |= dict(model.named_buffers(remove_duplicate=False))
    return {n: p for n in fresh if (p := parameters.get(n)) is not None and p.is_floating_point() and not p.is_meta}


def _refuse_spoilt(model: PreTrainedModel, reading: Reading | None) -> None:
    """Refuses a model that is broken before anything is changed: NaN hides whatever a change does."""
    if reading is None or not reading.plain or _is_finite(reading):
        return
    tensors = (*model.named_parameters(), *model.named_buffers())
    spoilt = [name for name, tensor in tensors if tensor.is_floating_point() and bool(torch.isnan(tensor).any())]
    if spoilt:
        raise SurgeryError(
            f"the model returns NaN before anything is changed: {', '.join(spoilt[:_NAMED])} "
            f"{'holds' if len(spoilt) == 1 else 'hold'} NaN; repair the base, or load it again"
        )


def _is_finite(reading: Reading) -> bool:
    rows = slice(1 if reading.packed else None)
    return all(bool(torch.isfinite(part[rows]).all()) for part in reading.plain.values())


def sentences(faults: Sequence[Fault], what: str, declared: Mapping[str, bool], when: str = "") -> list[str]:
    """Says each property that is not kept, by its first fault; what may come of another stands behind it."""
    first: dict[str, Fault] = {}
    for fault in faults:
        first.setdefault(fault.property, fault)
    broken = {key: fault for key, fault in first.items() if declared.get(key) is not False}
    if "cache" in first or declared.get("cache") is False:
        broken.pop("crop", None)  # a cache that is wrong, or declared not to be kept, is not asked to be cut
    causes = next((kinds & set(broken) for kinds in _CAUSES if kinds & set(broken)), set())
    roots = [key for key in PROPERTIES if key in broken and (not causes or key in causes or key in RECORDS)]
    said = [
        f"{_TITLES[key].format(what=what)}{when}: {broken[key].words}; {_REMEDIES[key]}, or, if it is meant, declare "
        f"{{{key}: false}} ({PROPERTIES[key]})"
        for key in roots
    ]
    mend = " and ".join(key for key in PROPERTIES if key in causes)
    return said + [
        f"{_TITLES[key].format(what=what)}{when}: {broken[key].words}; mend {mend} first: this may come of it"
        for key in PROPERTIES
        if key in broken and key not in roots
    ]
