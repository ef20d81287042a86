"""Which positions a change of one position moves: measured at single modules and of a whole model.

A batch holds the same text once for each position; in row j the input changes at position j. It is compared with the
same batch unchanged, in the same shape, so that what is not reached is equal to the last bit, or nearly so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.behaviour import calling
from solidify.errors import SurgeryError
from solidify.model import anatomy
from solidify.surgery import contract
from solidify.surgery.contract import Call
from solidify.system import foreign

LENGTH = 20
PADDED = (0, 5)  # positions of padding on the left
_SEEDS = (0, 1)  # what any of them moves is reached
_FLOOR = {torch.float64: 1e-9, torch.float32: 1e-6}  # of the output's size: less is rounding
_FLOOR_HALF = 1e-4
_FLOOR_WHOLE = 1e-5  # experts are computed together with other tokens, and rounded otherwise


@dataclass
class Reach:
    """Of each padding the positions that are `real`, and who reaches whom: at [i, j], whether j moves i.

    `alone` are single modules, `whole` is the model's last hidden state (empty where it was not run). `biased` names
    modules whose masks hold more than what is seen.
    """

    real: list[torch.Tensor] = field(default_factory=list)
    alone: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    whole: list[torch.Tensor] = field(default_factory=list)
    biased: list[str] = field(default_factory=list)


def measure(model: PreTrainedModel, names: Sequence[str], *, whole: bool) -> Reach:
    """Measures the reach at the named modules, and, if asked for, of the whole model.

    Raises:
        SurgeryError: the model does not run, or a module is not called, or not with one vector a position.
    """
    found = Reach(alone={name: [] for name in names})
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.no_grad(), widened(model, whole), anatomy.evaluation(model), anatomy.caches_off(model):
        for padding in PADDED:
            inputs = _make_inputs(model, padding)
            found.real.append(torch.arange(LENGTH) >= padding)
            with foreign.calling("the model cannot be tried, with and without padding on the left", SurgeryError):
                calls, plain = _run_plainly(model, names, inputs, whole)
                for name in names:
                    found.alone[name].append(_measure_module(model, name, calls))
                if plain is not None:
                    found.whole.append(_measure_model(model, inputs, plain))
            found.biased += [name for name in names if name not in found.biased and _is_biased(calls[name])]
    for buffer, value in buffers:
        if buffer.shape != value.shape or not torch.equal(buffer, value):
            buffer.data = value
    return found


def compose(layers: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what layers, one after the other, reach together: in any number of steps, and in two at most.

    Beside what it reaches in a layer, a position keeps what it is. Longer ways fade, down to rounding.
    """
    here = torch.eye(LENGTH, dtype=torch.bool)
    every, one, two = here, here, here
    for layer in layers:
        every = every | _follow(layer, every)
        two = two | _follow(layer, one)
        one = one | _follow(layer, here)
    return every, one | two


def _follow(layer: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return (layer.float() @ before.float()) > 0


def _run_plainly(
    model: PreTrainedModel, names: Sequence[str], inputs: Mapping[str, torch.Tensor], whole: bool
) -> tuple[dict[str, Call], torch.Tensor | None]:
    if not whole:
        return contract.record(model, names, inputs, partly=True), None
    with contract.recording(model, names) as calls:
        plain = anatomy.run(model.base_model, inputs)
    return calls, plain


def _make_inputs(model: PreTrainedModel, padding: int) -> dict[str, torch.Tensor]:
    takes = calling.takes(model)
    if "input_ids" not in takes:
        raise SurgeryError(f"{type(model).__name__} takes no tokens, so it cannot be tried which of them move which")
    high = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(min(3, high - 1), high, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids.repeat(LENGTH, 1)}
    if padding:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][:, :padding] = 0
        if "position_ids" in takes:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {key: tensor.to(model.device) for key, tensor in inputs.items()}


def _measure_model(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], plain: torch.Tensor) -> torch.Tensor:
    """Changes what the embeddings return, a position in each row."""
    moved = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for seed in _SEEDS:
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out, s=seed: _change(out, s))
        try:
            moved |= _differ(anatomy.run(model.base_model, inputs), plain, _FLOOR_WHOLE)
        finally:
            handle.remove()
    return moved


def _measure_module(model: PreTrainedModel, name: str, calls: Mapping[str, Call]) -> torch.Tensor:
    """Changes what a module is given, a position in each row."""
    module = model.get_submodule(name)
    if name not in calls:
        raise SurgeryError(f"{name} ({type(module).__name__}) is not called by the model")
    call = calls[name]
    if _find_states(call.args, call.kwargs) is None:
        raise SurgeryError(f"{name} ({type(module).__name__}) is not given one vector a position")
    plain = _call_module(module, call, None)
    floor = _FLOOR.get(plain.dtype, _FLOOR_HALF)
    moved = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for seed in _SEEDS:
        moved |= _differ(_call_module(module, call, seed), plain, floor)
    return moved


def _call_module(module: nn.Module, call: Call, seed: int | None) -> torch.Tensor:
    args, kwargs = contract.copied(call.args), contract.copied(call.kwargs)
    if seed is not None:
        states = _find_states(args, kwargs)
        assert states is not None
        states.copy_(_change(states, seed))
    output = contract.tensors_in(module(*args, **kwargs))[0]
    return output.reshape(LENGTH, LENGTH, -1)


def _find_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns the hidden states among what a module is given."""
    values = [kwargs.get("hidden_states"), *args, *kwargs.values()]
    shaped = (v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim == 3)
    return next((value for value in shaped if tuple(value.shape[:2]) == (LENGTH, LENGTH)), None)


def _is_biased(call: Call) -> bool:
    """Returns whether the mask that a module is given adds something to what is seen, as by distances."""
    mask = call.kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or not mask.is_floating_point():
        return False
    return bool((mask[mask > torch.finfo(mask.dtype).min / 2] != 0).any())


def _change(states: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns states (rows, positions, features) with another vector at position j of row j."""
    place = torch.arange(LENGTH, device=states.device)
    noise = torch.randn(LENGTH, states.shape[-1], generator=torch.Generator().manual_seed(seed)).to(states)
    changed = states.clone()
    changed[place, place] += 2 * states.float().std().to(states) * noise
    return changed


def _differ(found: torch.Tensor, plain: torch.Tensor, floor: float) -> torch.Tensor:
    """Returns at [i, j] whether position i of row j differs."""
    size = plain.float().square().mean().sqrt().clamp(min=1e-30)
    far = (found.float() - plain.float()).abs().amax(-1) / size
    if not bool(torch.isfinite(far).all()):
        raise SurgeryError("the model returns NaN or infinity for a text (without padding, or padded on the left)")
    return (far > floor).T.cpu()


@contextmanager
def widened(model: nn.Module, asked: bool) -> Iterator[None]:
    """Runs a model in half precision in float32, where rounding hides less."""
    tensors = [*model.parameters(), *model.buffers()] if asked else []
    half = [(t, t.data) for t in tensors if t.dtype in (torch.float16, torch.bfloat16)]
    for tensor, data in half:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in half:
            tensor.data = data
