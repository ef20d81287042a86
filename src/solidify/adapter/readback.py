"""Whether an adapter that was just written comes back: on a fresh base, bit for bit, in its tensors and outputs.

Both models run in the same state (evaluation, nothing asks for gradients, matrices aligned alike), because PyTorch
chooses its kernels by these too; then equal models give equal bits, and no tolerance is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from solidify.adapter import expert_factors, lookup
from solidify.adapter.base_state import Base
from solidify.artifact import certificate, quantizing, stock, tensors
from solidify.behaviour import calling
from solidify.directory import trust
from solidify.errors import AdapterError, SurgeryError, refuse
from solidify.model import anatomy, probing, quantized
from solidify.model.extent import Extent
from solidify.system import console, files, foreign
from solidify.upstream.peft import switch_layers
from solidify.upstream.torch import own_buffers, unsaved_buffers
from solidify.upstream.transformers import chosen_implementation
from solidify.weights.format import same_bits

Load = Callable[[nn.Module, Path], PeftModel]
Held = Callable[[PeftModel], Mapping[str, torch.Tensor]]
_NAMED = 6  # names in one sentence


def refuse_lossy(model: PeftModel, name: str, directory: Path, base: Base, load: Load, held: Held) -> None:
    """Loads an adapter from where it was written on a fresh base and compares it with the model that it is from.

    `load` puts it on a model, `held` returns its tensors in a model by their keys on disk. A large model, one on
    several devices and one for which no inputs can be made up is not run: its tensors are compared.

    Raises:
        AdapterError: something did not come back; all that differs is named.
    """
    plain: Any = lookup.plain_model(model)
    with torch.random.fork_rng(), console.silence():
        with trust.permitting(trust.fingerprint(base.record)):  # the model in memory is made of it
            fresh = stock.load(base.directory, trust_remote_code=bool(base.record.code), **_choose_options(plain, base))
        again = load(fresh, directory)
    mine, theirs = held(model), held(again)
    faults = [f"{key} is missing" for key in mine if key not in theirs]
    faults += [f"{key} has other values" for key in theirs if key in mine and not _is_unchanged(mine[key], theirs[key])]
    refuse(AdapterError, "the adapter is not saved: read back from its file, it differs", faults)
    if not Extent.of(plain).whole or len({p.device for p in plain.parameters()}) != 1:
        return
    fresh = lookup.plain_model(again.to(plain.device))
    with active_alone(model, name), alike(plain), alike(fresh), _as_stored(mine, theirs):
        _align_matrices(plain, fresh)
        faults = _output_faults(plain, fresh)
    if faults:
        hints = _state_faults(plain, fresh)
        words = "; it also holds: " + "; ".join(hints) if hints else ""
        refuse(AdapterError, f"the adapter is not saved: loaded again, it computes something else{words}", faults)


def _choose_options(plain: Any, base: Base) -> dict[str, Any]:
    """Returns how a base has to be loaded to compute as this one: its dtype, and the kernels that it uses."""
    config = files.document(base.directory / "config.json")
    options = quantizing.as_loaded(plain) if quantized.is_quantized(plain) else {}
    if str(plain.dtype).removeprefix("torch.") != config.get("dtype"):
        options["dtype"] = plain.dtype
    for kind in ("attn", "experts"):
        parts = {"": plain.config, **{n: getattr(plain.config, n, None) for n in plain.config.sub_configs}}
        found = {n: chosen_implementation(part, kind) for n, part in parts.items() if part is not None}
        words = {n: word for n, word in found.items() if word is not None}
        if words:
            options[f"{kind}_implementation"] = words if len(set(words.values())) > 1 else next(iter(words.values()))
    return options


def _is_unchanged(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Returns whether a tensor came back, in the dtype that it is stored in."""
    return torch.equal(mine.detach().to(theirs.dtype).cpu(), theirs.detach().cpu())


@contextmanager
def alike(model: nn.Module) -> Iterator[None]:
    """While the block lasts, a model is in the state in which models are compared; it gets its own back.

    Evaluation mode, no parameter that asks for gradients (which PyTorch folds matrices by), and buffers that come
    back as they were, though a module may move them. Experts that run by their factors run as PEFT runs them, as those
    of a model that was just loaded do.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with buffers_kept(model):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            with expert_factors.built(), anatomy.evaluation(model), torch.no_grad():
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """When the block ends, every buffer is the very tensor that it was, with the numbers that it held."""
    buffers = [
        (module, key, buffer, buffer if buffer is None else buffer.clone())
        for module in model.modules()
        for key, buffer in own_buffers(module).items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, key, buffer, before in buffers:
                own_buffers(module)[key] = buffer
                if buffer is not None and before is not None and not _is_unchanged(buffer, before):
                    buffer.copy_(before)


@contextmanager
def active_alone(model: PeftModel, name: str) -> Iterator[None]:
    """While the block lasts, one adapter alone is active; before and after it is as it was."""
    tuner: Any = model.base_model
    before, off = list(model.active_adapters), _is_off(model)
    if before == [name] and not off:
        yield
        return
    switch_layers(tuner, True)
    tuner.set_adapter(name)
    try:
        yield
    finally:
        tuner.set_adapter(before if len(before) != 1 else before[0])
        if off:
            switch_layers(tuner, False)


def _is_off(model: PeftModel) -> bool:
    return any(m.disable_adapters for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)))


@contextmanager
def _as_stored(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Gives trained tensors that are kept in more digits than they are stored in, for a while, the stored values."""
    wider = [(tensor, tensor.data, theirs[key]) for key, tensor in mine.items() if tensor.dtype != theirs[key].dtype]
    try:
        for tensor, _, stored in wider:
            tensor.data = stored.data.to(tensor.device)
        yield
    finally:
        for tensor, data, _ in wider:
            tensor.data = data


def _align_matrices(plain: nn.Module, fresh: nn.Module) -> None:
    """Aligns the matrices of a fresh model as those of another of the same parts."""
    parts = zip(plain.parameters(), fresh.parameters(), strict=False)
    for mine, theirs in parts:
        if mine.shape == theirs.shape and mine.device.type == "cpu":
            tensors.align_to(theirs, mine.data_ptr())


def _output_faults(plain: Any, fresh: Any) -> list[str]:
    """Runs both models on the same inputs and names the outputs that differ in any bit."""
    faults = []
    for case, settings in certificate.CASES.items():
        try:
            batch = probing.probe_inputs(plain, **settings)
        except SurgeryError:
            continue  # no inputs can be made up for it
        expected, found = _run_model(plain, batch), _run_model(fresh, batch)
        if expected.failed and found.failed:
            continue  # it does not run on these at all
        if expected.failed or found.failed:
            said = foreign.said(expected.error or found.error or RuntimeError())
            faults.append(f"case {case!r}: the model as it stands or the one loaded again fails with {said}")
            continue
        mine, theirs = expected.value or {}, found.value or {}
        if not set(mine) & set(theirs):  # what a setting asks for besides may be missing in one of them
            faults.append(
                f"case {case!r}: {', '.join(mine) or 'nothing'} is what the model returns, and loaded again it "
                "returns none of that"
            )
        faults += [
            f"case {case!r}: {key} differs by up to {_measure_distance(mine[key], theirs[key]):.2g}"
            for key in mine
            if key in theirs and not same_bits(mine[key], theirs[key])
        ]
    return faults


def _run_model(model: Any, batch: Mapping[str, torch.Tensor]) -> foreign.Outcome[dict[str, torch.Tensor]]:
    arguments: dict[str, Any] = dict(batch)
    if "use_cache" in calling.takes(model):
        arguments["use_cache"] = False

    def call() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return dict(_yield_tensors("", model(**arguments)))

    with torch.random.fork_rng(), anatomy.sparing(model):
        return foreign.attempt(call)


def _yield_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor in what a model returns, with its name."""
    if isinstance(value, torch.Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _yield_tensors(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _yield_tensors(f"{name}[{index}]", part)


def _measure_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.shape == b.shape and a.numel() else float("nan")


def _state_faults(plain: nn.Module, fresh: nn.Module) -> list[str]:
    """Names state that no adapter holds and that differs: buffers that are not saved, and plain numbers of modules."""
    others = {located.name: located.inner for located in lookup.modules(fresh)}
    faults = []
    for located in lookup.modules(plain):
        other = others.get(located.name)
        if other is None:
            continue
        for key, buffer in own_buffers(located.inner).items():
            twin = own_buffers(other).get(key)
            if buffer is not None and twin is not None and not same_bits(buffer, twin):
                unsaved = key in unsaved_buffers(located.inner)
                kept = " (not persistent: register it with persistent=True)" if unsaved else ""
                faults.append(f"the buffer {located.name}.{key}{kept}")
        for key, value in vars(located.inner).items():
            if isinstance(value, torch.Tensor) and not isinstance(vars(other).get(key), torch.Tensor):
                faults.append(f"the tensor {located.name}.{key}, which is not a buffer (keep it in a persistent one)")
            plain_value = isinstance(value, (bool, int, float, str)) and not key.startswith("_") and key != "training"
            if plain_value and vars(other).get(key) != value:
                faults.append(f"{located.name}.{key} = {value!r}, where a fresh one has {vars(other).get(key)!r}")
    return [*faults[:_NAMED], *(["..."] if len(faults) > _NAMED else [])]
