"""Runs a whole model and measures the properties that a change must keep (`properties.py`), one probe each."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .cache_probe import measure_cache
from .calling import chance_kept, evaluation, find_numpy, get_seeded_state, get_state, set_seed
from .properties import FAILED, RECORDS, Fault, Parts, Reading, allowed, apart, cut_parts, faults
from .values import substitute_values
from .watching import Watched, change_tokens

_SEEDS = (1_741_392_587, 903_146_621)  # that no module sets itself: after one of its own, it seemed to draw nothing
_TEXT = ("input_ids", "attention_mask", "decoder_input_ids")


def read(watched: Watched, control: Reading | None = None, *, whole: bool = True) -> Reading:
    """Runs all probes; with `control`, in the way in which they worked there. Without `whole`, one run only.

    What the model keeps in buffers, and random numbers, are afterwards what they were.

    Raises:
        Exception: the model does not run at all.
    """
    buffers = [(buffer, buffer.clone()) for buffer in watched.model.buffers()]
    with evaluation(watched.model), chance_kept(), substitute_values(watched.model, watched.values), torch.no_grad():
        try:
            return _read_model(watched, control, whole)
        finally:
            for buffer, value in buffers:
                if buffer.shape != value.shape or not torch.equal(buffer, value):
                    buffer.data = value


def judge(watched: Watched, control: Reading) -> tuple[Reading, list[Fault]]:
    """Runs all probes and compares them with the control; what is too far off must be so for other tokens too.

    Where a model chooses (experts, keys) and two candidates are equal but for rounding, it may choose otherwise
    from run to run, and is far off there once in a while; what a change breaks is broken for all tokens.
    """
    reading = read(watched, control)
    found = faults(control, reading)
    for seed in (1, 2):
        if not any(fault.distance < FAILED for fault in found) or set(watched.inputs) - {*_TEXT}:
            break
        try:
            other = faults(control, read(watched.with_other_tokens(seed), control))
        except Exception:  # what does not run at all is no reason to take a fault back
            break
        still = {fault.name for fault in other}
        found = [fault for fault in found if fault.name in still or not fault.distance < FAILED]
    return reading, found


def _read_model(watched: Watched, control: Reading | None, whole: bool) -> Reading:
    reading = Reading(dtype=watched.dtype)
    packs = [(control.packed, control.padded)] if control is not None else watched.list_packs()
    for packed, padded in packs:
        batch = watched.make_batch(packed, padded)
        numpy = find_numpy()  # what a forward imports was not seeded
        set_seed(_SEEDS[0])
        try:
            plain = watched.call(batch)
        except Exception:
            if (packed, padded) == packs[-1]:
                raise
            continue
        reading.packed, reading.padded, reading.plain = packed, padded, plain.parts
        drawn = reading.draws = get_state(numpy) != get_seeded_state(_SEEDS[0], numpy)
        _look_ahead(watched, reading, batch, plain.parts)
        # Padding on the left says something of models alone in which no position sees a later one.
        if (
            control is not None
            or not padded
            or reading.distances.get("causal", 0.0) <= allowed("causal", 0.0, watched.dtype)
        ):
            break
    if not whole or not plain.parts:
        reading.distances.clear()
        return reading
    _measure_padding(watched, reading, batch, plain.parts)
    measure_cache(watched, reading, batch, plain.parts, control)
    _run_alone(watched, reading, batch, plain.parts)
    if control is not None or drawn:
        _repeat_reading(watched, reading, batch, plain.parts, drawn)
    else:  # without chance, the unchanged model is taken to be the same again
        reading.distances |= {"stateless": 0.0, "deterministic": 0.0}
    if control is not None and not control.distances.get("rows", 0.0) > allowed("rows", 0.0, watched.dtype):
        _look_ahead_alone(watched, reading, batch, plain.parts)
    return reading


def _look_ahead(watched: Watched, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts) -> None:
    if watched.stream is None:
        return
    if reading.packed:
        changed, before = cut_parts(plain, slice(watched.rows, watched.rows + 1)), cut_parts(plain, slice(0, 1))
    else:
        tokens = batch[watched.stream].clone()
        tokens[:, -1] = change_tokens(tokens[:, -1])
        found = watched.try_call(reading, "causal", {**batch, watched.stream: tokens})
        if found is None:
            return
        changed, before, reading.unmasked = found.parts, plain, found.unmasked
    every = slice(None)
    reading.distances["causal"] = apart(cut_parts(changed, every, slice(-1)), cut_parts(before, every, slice(-1)))


def _look_ahead_alone(watched: Watched, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts) -> None:
    """Looks ahead in a row alone, where that is not what it is within the batch, nor by chance or from earlier calls.

    Of a row that is not padded transformers gives no mask: what takes that for all positions sees ahead here alone.
    """
    stream, off = watched.stream, {n for n, far in reading.distances.items() if far > allowed(n, 0.0, watched.dtype)}
    if stream is None or "rows" not in off or off & {"stateless", "deterministic"} or reading.draws:
        return
    inputs = _take_row(batch, len(next(iter(plain.values()))))
    tokens = inputs[stream].clone()
    tokens[:, -1] = change_tokens(tokens[:, -1])
    before = watched.try_call(reading, "causal", inputs, rows=1)
    after = watched.try_call(reading, "causal", {**inputs, stream: tokens}, rows=1)
    if before is None or after is None:
        return
    far = apart(*(cut_parts(found.parts, slice(None), slice(-1)) for found in (after, before)))
    if far > reading.distances.get("causal", 0.0):
        reading.distances["causal"], reading.unmasked = far, after.unmasked


def _take_row(batch: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """Returns the second row alone: rows stand before it and, in a packed batch, after it."""
    alone = rows > 1 and all(len(tensor) == rows for tensor in batch.values())
    return {key: tensor[1:2] for key, tensor in batch.items()} if alone else dict(batch)


def _measure_padding(watched: Watched, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts) -> None:
    if reading.padded:
        whole = cut_parts(plain, slice(0, 1), slice(0, watched.positions - watched.pad))
        if reading.distances.get("causal", 0.0) > allowed("causal", 0.0, watched.dtype):  # its end shows in the rest
            cut = {key: t[:1, : watched.positions - watched.pad] for key, t in batch.items() if t.ndim == 2}
            alone = watched.try_call(reading, "padding", cut, rows=1)
            if alone is None:
                return
            whole = alone.parts
        reading.distances["padding"] = apart(cut_parts(plain, slice(-1, None), slice(watched.pad, None)), whole)
    elif (
        watched.stream == "input_ids" and set(watched.inputs) <= {"input_ids", "attention_mask", "token_type_ids"}
    ) or ("attention_mask" in watched.inputs and watched.model.config.is_encoder_decoder):
        _pad_after(watched, reading)


def _pad_after(watched: Watched, reading: Reading) -> None:
    """Pads the first row of what is attended to on the right, and compares it with the row that is not padded."""
    if "attention_mask" not in watched.takes or "input_ids" not in watched.inputs:
        return
    first = {key: tensor[:1].clone() for key, tensor in watched.inputs.items()}
    length = first["input_ids"].shape[1]
    kept = length - max(1, length // 4)
    cut = {k: t[:, :kept] if k != watched.stream or watched.decoder else t for k, t in first.items()}
    cut["attention_mask"] = torch.ones_like(cut["input_ids"])
    mask = torch.ones_like(first["input_ids"])
    mask[:, kept:] = 0
    short = watched.try_call(reading, "padding", cut, rows=1)
    long = watched.try_call(reading, "padding", {**first, "attention_mask": mask}, rows=1)
    if short is None or long is None:
        return
    size = slice(kept if watched.stream == "input_ids" else None)
    found = {name: part[:, size] if part.ndim > 2 else part for name, part in long.parts.items()}
    names = [n for n, part in short.parts.items() if n in found and found[n].shape == part.shape]
    reading.distances["padding"] = apart({n: found[n] for n in names}, {n: short.parts[n] for n in names})


def _run_alone(watched: Watched, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts) -> None:
    """Runs the first row alone, and asks for what the model can record."""
    rows = len(next(iter(plain.values())))
    alone = rows > 1 and all(len(tensor) == rows for tensor in batch.values())
    inputs = _take_row(batch, rows)
    flags = [key for key in RECORDS if _can_record(watched, key)]
    found = None
    if not watched.leave:
        for asked in (flags, *([key] for key in flags)):  # all at once; if that fails, it says nothing of each
            wanted = {f"output_{key}": True for key in asked}
            each = watched.try_call(reading, asked[0], inputs, rows=1 if alone else None, **wanted)
            if each is not None:
                reading.recorded |= {k: v for k, v in each.recorded.items() if k in asked}
                found = found or each
            if asked is flags:
                if each is not None:
                    break
                reading.errors.pop(asked[0], None)
    if found is None:
        found = watched.try_call(reading, "rows", inputs, rows=1 if alone else None)
    if alone and found is not None:
        reading.distances["rows"] = apart(found.parts, cut_parts(plain, slice(1, 2)))


def _can_record(watched: Watched, key: str) -> bool:
    if key == "hidden_states":
        return True
    if key == "attentions":  # kernels that never build the weights cannot return them
        return bool(watched.model.config._attn_implementation == "eager")
    text = watched.model.config.get_text_config()
    return hasattr(watched.model.config, "output_router_logits") or hasattr(text, "output_router_logits")


def _repeat_reading(
    watched: Watched, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts, drawn: bool
) -> None:
    """Repeats the first call with its rows the other way round and other random numbers.

    The shapes are the same and the contents are not, so that what was kept of an earlier call is found, and what
    depends on where a row is among the others. What differs is told apart by the call as it was.
    """
    rows = len(next(iter(plain.values())))
    turn = list(reversed(range(rows))) if all(len(t) == rows for t in batch.values()) else list(range(rows))
    set_seed(_SEEDS[1])
    found = watched.try_call(reading, "stateless", {k: t[turn] if len(t) == rows else t for k, t in batch.items()})
    if found is None:
        return
    far = apart(found.parts, cut_parts(plain, turn))
    reading.distances |= {"stateless": 0.0, "deterministic": 0.0}
    if far <= allowed("stateless", 0.0, watched.dtype) and not (drawn and far > 0):
        return
    set_seed(_SEEDS[1])
    other = watched.try_call(reading, "stateless", batch)
    set_seed(_SEEDS[0])
    same = watched.try_call(reading, "stateless", batch)
    if other is None or same is None:
        return
    chance, state = apart(other.parts, same.parts), apart(same.parts, plain)
    if chance > 4 * state:
        reading.distances["deterministic"] = FAILED if drawn else chance
    reading.distances["stateless"] = state
    if max(chance, state) <= allowed("stateless", 0.0, watched.dtype):  # the order of the rows alone makes it differ
        reading.distances["rows"] = max(reading.distances.get("rows", 0.0), far)
