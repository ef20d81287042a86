"""How a model behaves: properties that a change must keep, and the probes that measure them.

Each probe runs the whole model and returns a distance: 0 where the property holds exactly. What a distance means is
told by the control, the same probe of the unchanged model. The file depends on torch and transformers alone: a process
that has no solidify runs it by its path.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel

# What a change must keep unless it declares otherwise (`{name: false}`), and what is meant by it.
PROPERTIES = {
    "causal": "no position sees a later one",
    "cache": "with a cache it computes what it computes without: prefill, pieces, single steps, left padding, "
    "reordered rows",
    "crop": "positions can be taken back from the cache, as assisted generation does",
    "padding": "padding changes nothing that is not padding",
    "rows": "a row does not depend on the other rows of its batch",
    "stateless": "a call does not depend on earlier calls",
    "deterministic": "no chance in evaluation",
    "gradient": "a gradient reaches what the module is given",
    "half_precision": "in half precision it returns what it is given: the same dtype, finite",
    "inputs": "what the module is given is not written to",
    "hidden_states": "output_hidden_states returns as many as before, of the same shapes",
    "attentions": "output_attentions returns as many as before, of the same shapes",
    "router_logits": "output_router_logits returns as many as before, of the same shapes",
}
RECORDS = ("hidden_states", "attentions", "router_logits")
OUTPUTS = ("logits", "last_hidden_state")  # what is looked at, the first that has a value for every position
FAILED = float("inf")  # the distance of what does not run

_FLOOR = {torch.float64: 1e-8, torch.float32: 1e-4}  # another order of summation, through all layers, relative
_FLOOR_HALF = 5e-2
_AGAIN = {torch.float64: 1e-12, torch.float32: 1e-5}  # the same call once more
_AGAIN_HALF = 2e-2
_TEXT = ("input_ids", "attention_mask", "decoder_input_ids")
_CACHES = ("past_key_values", "cache_params", "state")
# Ways to use a cache, from the fullest on: the second piece, the single step, and which positions the mask speaks of.
_WAYS = [
    (piece, step, mask)
    for mask in ("all", "own")
    for piece, step in (("reordered", "crop"), ("reordered", "steps"), ("pieces", "steps"), ("singles", "steps"))
]


def allowed(name: str, control: float, dtype: torch.dtype) -> float:
    """Returns how large the distance of a probe may be: rounding, and some times what the control shows."""
    if name in ("stateless", "deterministic"):
        return max(4 * control, _AGAIN.get(dtype, _AGAIN_HALF))
    return max(4 * control, _FLOOR.get(dtype, _FLOOR_HALF))


Parts = dict[str, torch.Tensor]  # what is watched, (batch_size, sequence_length, ...) each: the model's output under ""


@dataclass
class Reading:
    """What the probes measured: `distances` by name (`cache/steps` is a part of `cache`; what cannot be measured is
    missing), the shapes that were `recorded` by output, the result `plain`, and the `errors` of probes that failed."""

    distances: dict[str, float] = field(default_factory=dict)
    recorded: dict[str, list[Any]] = field(default_factory=dict)
    plain: Parts = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    packed: bool = False
    padded: bool = False
    dtype: torch.dtype = torch.float32
    way: tuple[str, str, str] = ("reordered", "crop", "all")
    draws: bool = False


@dataclass(frozen=True)
class Fault:
    """A property that does not hold: by which probe, how far it is off, and how far it might be."""

    name: str
    distance: float
    allowed: float
    words: str

    @property
    def property(self) -> str:
        """The property's name."""
        return property_of(self.name)


def property_of(name: str) -> str:
    """Returns the property that a probe tries: its name, or the part before the stroke; a crop is one by itself."""
    return "crop" if name == "cache/crop" else name.partition("/")[0]


def faults(control: Reading, found: Reading) -> list[Fault]:
    """Compares two readings; what the control cannot show is not asked for."""
    result = []
    for name, before in control.distances.items():
        after, most = found.distances.get(name, FAILED), allowed(name, before, control.dtype)
        if name == "causal" and before > allowed(name, 0.0, control.dtype):
            continue  # a model in which positions see later ones may let them see more of them
        if before < FAILED and not after <= most:
            what = found.errors.get(name) or f"off by {after:.2g} of the output's size, where {most:.2g} is rounding"
            result.append(Fault(name, after, most, f"{_WORDS.get(name, name)}: {what}"))
    is_reported = "deterministic" not in control.distances or any(fault.name == "deterministic" for fault in result)
    if found.draws and not control.draws and not is_reported:
        result.append(Fault("deterministic", FAILED, 0.0, "it draws random numbers in evaluation, and did not before"))
    for key, entries in control.recorded.items():
        now = found.recorded.get(key, [])
        if now != entries:
            what = found.errors.get(key) or f"{len(now)} of them, where there were {len(entries)}"
            if len(now) == len(entries):
                what = "their shapes are others"
            result.append(Fault(key, FAILED, 0.0, f"output_{key}=True: {what}"))
    return result


_WORDS = {
    "causal": "a change of the last position moves earlier ones",
    "padding": "padding before or after a row changes it",
    "rows": "a row alone gives something else than within a batch",
    "stateless": "the same call, repeated after others, gives something else",
    "deterministic": "the same call gives something else with other random numbers",
    "cache/prefill": "a first piece that fills the cache gives something else than the whole",
    "cache/pieces": "a second piece over the cache gives something else than the whole",
    "cache/reordered": "a second piece over the cache, its rows reordered as by beams, gives something else",
    "cache/singles": "a single step over the cache gives something else than the whole",
    "cache/steps": "single steps over the cache give something else than the whole",
    "cache/later": "a later single step, of one row alone, gives something else than the whole",
    "cache/crop": "a single step after the cache was cropped gives something else than the whole",
}


class Watched:
    """A model, inputs that it takes (among them a stream of tokens (batch_size, sequence_length), if it has one), and
    where it is watched: at its outputs and at some modules (`at`); with `leave`, at these alone, after the last of
    which the rest is not run.

    `values` stand in the place of parameters of these names. In half precision rounding hides much; with `wide` the
    model is run with all its floating tensors in float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, torch.Tensor],
        *,
        values: Mapping[str, torch.Tensor] | None = None,
        at: Sequence[str] = (),
        leave: bool = False,
        wide: bool = False,
    ) -> None:
        self.model, self.inputs, self.at, self.leave = model, dict(inputs), list(at), leave
        self.values = dict(values or {})
        self.dtype = torch.float32 if wide else model.dtype
        if wide:
            own = {**dict(model.named_parameters()), **dict(model.named_buffers()), **self.values}
            self.values = {name: t.detach().float() if t.is_floating_point() else t for name, t in own.items()}
            self.inputs = {key: t.float() if t.is_floating_point() else t for key, t in self.inputs.items()}
        self.takes = takes(model)
        configs = [v for m in model.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]
        self.configs = list({id(config): config for config in configs}.values())
        self.stream = next((k for k in ("decoder_input_ids", "input_ids") if k in inputs), None)
        tokens = inputs[self.stream] if self.stream is not None else next(iter(inputs.values()))
        self.rows = int(tokens.shape[0])
        self.positions = int(tokens.shape[1]) if self.stream is not None else 0
        self.decoder = self.stream is not None and not model.config.is_encoder_decoder

    def read(self, control: Reading | None = None, *, whole: bool = True) -> Reading:
        """Runs all probes; with `control`, in the way in which they worked there. Without `whole`, one run only.

        What the model keeps in buffers, and random numbers, are afterwards what they were.

        Raises:
            Exception: the model does not run at all.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with evaluation(self.model), _chance_kept(), _substitute_values(self.model, self.values), torch.no_grad():
            try:
                return self._read_model(control, whole)
            finally:
                for buffer, value in buffers:
                    if buffer.shape != value.shape or not torch.equal(buffer, value):
                        buffer.data = value

    def judged(self, control: Reading) -> tuple[Reading, list[Fault]]:
        """Runs all probes and compares them with the control; what is too far off must be so for other tokens too.

        Where a model chooses (experts, keys) and two candidates are equal but for rounding, it may choose otherwise
        from run to run, and is far off there once in a while; what a change breaks is broken for all tokens.
        """
        reading = self.read(control)
        found = faults(control, reading)
        for seed in (1, 2):
            if not any(fault.distance < FAILED for fault in found) or set(self.inputs) - {*_TEXT}:
                break
            try:
                other = faults(control, self._with_other_tokens(seed).read(control))
            except Exception:  # what does not run at all is no reason to take a fault back
                break
            still = {fault.name for fault in other}
            found = [fault for fault in found if fault.name in still or not fault.distance < FAILED]
        return reading, found

    def _with_other_tokens(self, seed: int) -> Watched:
        """Watches the same model with the same tokens in another order."""
        assert self.stream is not None
        tokens = self.inputs[self.stream]
        order = torch.randperm(tokens.numel(), generator=torch.Generator().manual_seed(seed)).to(tokens.device)
        inputs = {**self.inputs, self.stream: tokens.flatten()[order].view(tokens.shape)}
        other = Watched(self.model, inputs, values=self.values, at=self.at, leave=self.leave)
        other.dtype = self.dtype
        return other

    def _read_model(self, control: Reading | None, whole: bool) -> Reading:
        reading = Reading(dtype=self.dtype)
        packs = [(control.packed, control.padded)] if control is not None else self._list_packs()
        for packed, padded in packs:
            batch = self._make_batch(packed, padded)
            _set_seed(0)
            try:
                plain = self._call_model(batch)
            except Exception:
                if (packed, padded) == packs[-1]:
                    raise
                continue
            reading.packed, reading.padded, reading.plain = packed, padded, plain.parts
            drawn = reading.draws = _get_state() != _get_seeded_state(0)
            self._look_ahead(reading, batch, plain.parts)
            # Padding on the left says something of models alone in which no position sees a later one.
            if (
                control is not None
                or not padded
                or reading.distances.get("causal", 0.0) <= allowed("causal", 0.0, self.dtype)
            ):
                break
        if not whole or not plain.parts:
            reading.distances.clear()
            return reading
        self._measure_padding(reading, batch, plain.parts)
        self._measure_cache(reading, batch, plain.parts, control)
        self._run_alone(reading, batch, plain.parts)
        if control is not None or drawn:
            self._repeat_reading(reading, batch, plain.parts, drawn)
        else:  # without chance, the unchanged model is taken to be the same again
            reading.distances |= {"stateless": 0.0, "deterministic": 0.0}
        return reading

    def _list_packs(self) -> list[tuple[bool, bool]]:
        """Returns in which ways the probes may be rows of one batch: with changed rows, and with a padded one."""
        if self.stream is None or any(t.shape[:1] != (self.rows,) for t in self.inputs.values()):
            return [(False, False)]
        text = set(self.inputs) <= {"input_ids", "attention_mask"} and self.decoder
        return [*([(True, True)] if text and "attention_mask" in self.takes else []), (True, False), (False, False)]

    def _make_batch(self, packed: bool, padded: bool) -> dict[str, torch.Tensor]:
        """Makes the batch: rows as given; packed, also the first with another last token, and padded on the left."""
        if not packed or self.stream is None:
            return dict(self.inputs)
        order = [*range(self.rows), 0, *([0] if padded else [])]
        batch = {key: tensor[order].clone() for key, tensor in self.inputs.items()}
        tokens = batch[self.stream]
        tokens[self.rows, -1] = _change_tokens(tokens[self.rows, -1])
        if padded:
            batch["attention_mask"] = torch.ones_like(tokens)
            batch["attention_mask"][-1, : self.pad] = 0
            tokens[-1, self.pad :] = self.inputs[self.stream][0, : self.positions - self.pad]
            if "position_ids" in self.takes:
                batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        elif "attention_mask" in batch and self.decoder:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        return batch

    @property
    def pad(self) -> int:
        """The number of positions that are padding in the padded row."""
        return max(1, self.positions // 4)

    def _look_ahead(self, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts) -> None:
        if self.stream is None:
            return
        if reading.packed:
            changed, before = _cut_parts(plain, slice(self.rows, self.rows + 1)), _cut_parts(plain, slice(0, 1))
        else:
            tokens = batch[self.stream].clone()
            tokens[:, -1] = _change_tokens(tokens[:, -1])
            found = self._try_call(reading, "causal", {**batch, self.stream: tokens})
            if found is None:
                return
            changed, before = found.parts, plain
        every = slice(None)
        reading.distances["causal"] = apart(_cut_parts(changed, every, slice(-1)), _cut_parts(before, every, slice(-1)))

    def _measure_padding(self, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts) -> None:
        if reading.padded:
            whole = _cut_parts(plain, slice(0, 1), slice(0, self.positions - self.pad))
            if reading.distances.get("causal", 0.0) > allowed("causal", 0.0, self.dtype):  # its end shows in the rest
                cut = {key: t[:1, : self.positions - self.pad] for key, t in batch.items() if t.ndim == 2}
                alone = self._try_call(reading, "padding", cut, rows=1)
                if alone is None:
                    return
                whole = alone.parts
            reading.distances["padding"] = apart(_cut_parts(plain, slice(-1, None), slice(self.pad, None)), whole)
        elif (self.stream == "input_ids" and set(self.inputs) <= {"input_ids", "attention_mask", "token_type_ids"}) or (
            "attention_mask" in self.inputs and self.model.config.is_encoder_decoder
        ):
            self._padding_after(reading)

    def _padding_after(self, reading: Reading) -> None:
        """Pads the first row of what is attended to on the right, and compares it with the row that is not padded."""
        if "attention_mask" not in self.takes or "input_ids" not in self.inputs:
            return
        first = {key: tensor[:1].clone() for key, tensor in self.inputs.items()}
        length = first["input_ids"].shape[1]
        kept = length - max(1, length // 4)
        cut = {k: t[:, :kept] if k != self.stream or self.decoder else t for k, t in first.items()}
        cut["attention_mask"] = torch.ones_like(cut["input_ids"])
        mask = torch.ones_like(first["input_ids"])
        mask[:, kept:] = 0
        short = self._try_call(reading, "padding", cut, rows=1)
        long = self._try_call(reading, "padding", {**first, "attention_mask": mask}, rows=1)
        if short is None or long is None:
            return
        size = slice(kept if self.stream == "input_ids" else None)
        found = {name: part[:, size] if part.ndim > 2 else part for name, part in long.parts.items()}
        names = [n for n, part in short.parts.items() if n in found and found[n].shape == part.shape]
        reading.distances["padding"] = apart({n: found[n] for n in names}, {n: short.parts[n] for n in names})

    def _measure_cache(
        self, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts, control: Reading | None
    ) -> None:
        """Feeds the batch in pieces, in the way in which the control worked: the first in which all is rounding.

        Some caches can be neither reordered nor cropped, and some models want the mask of the new positions alone.
        """
        name = next((key for key in _CACHES if key in self.takes), None)
        if name is None or self.stream is None or self.positions < 4:
            return
        best: dict[str, float] | None = None
        for way in _WAYS if control is None else [control.way]:
            trial = Reading(dtype=self.dtype, padded=reading.padded, way=way)
            self._run_pieces(trial, batch, plain, name, later=1 if control is None else 2)
            whole = _WAYS[-1] == way or {key.partition("/")[2] for key in trial.distances} >= {
                "prefill",
                way[0],
                way[1],
            }
            if control is not None or (whole and _is_rounding(trial)) or best is None:
                best, reading.way = trial.distances, way
            if control is not None or (whole and _is_rounding(trial)):
                reading.errors |= trial.errors
                break
        reading.distances |= best or {}

    def _run_pieces(
        self, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts, name: str, *, later: int
    ) -> None:
        """Runs a prefill, a second piece (over reordered rows), and single steps (after a crop).

        The `later` ones are of one row alone, where the cache can be cut to it: one token is all that the model is
        given. The control makes one of them: whether the cache can be cut shows there.
        """
        assert self.stream is not None
        ends = [self.positions - 5 if self.positions > 7 else 1, max(2, self.positions - 3)]
        cache = self._run_piece(reading, "cache/prefill", batch, plain, (0, ends[0]), name, self._fresh_cache(name))
        if cache is None:
            return
        if self.leave:
            _drop_unused(cache)
        if hasattr(cache, "activate_past_recording"):  # layers that forget what is out of their window could not crop
            with suppress(Exception):
                cache.activate_past_recording()
        rows = len(batch[self.stream])
        order = [1, 0, *range(2, rows)] if rows > 1 and reading.way[0] == "reordered" else list(range(rows))
        turned = {k: t[order] if t.shape[:1] == (rows,) else t for k, t in batch.items()}
        if reading.way[0] == "singles":  # some take one position at a time, once there is a cache
            ends[1] = ends[0] + 1
        wanted, back = _cut_parts(plain, order), ends[1]
        try:
            if reading.way[0] == "reordered":
                cache.reorder_cache(torch.tensor(order, device=batch[self.stream].device))
            if (
                self._run_piece(reading, f"cache/{reading.way[0]}", turned, wanted, (ends[0], ends[1]), name, cache)
                is None
            ):
                return
            if reading.way[1] == "crop" and not getattr(cache, "is_croppable", True):
                reading.errors["cache/crop"] = "its cache says that no position can be taken back from it"
            elif reading.way[1] == "crop":
                back = ends[1] - 2
                cache.crop(back - ends[1])  # the number of positions to take away, negative
        except Exception as error:
            reading.errors["cache/" + reading.way[0 if back == ends[1] else 1]] = f"{type(error).__name__}: {error}"
            return
        step = "cache/later" if "cache/crop" in reading.errors else f"cache/{reading.way[1]}"
        cache = self._run_piece(reading, step, turned, wanted, (back, back + 1), name, cache)
        if cache is None:
            return
        if _first_row_of(cache):
            turned = {k: t[:1] if t.shape[:1] == (rows,) else t for k, t in turned.items()}
            wanted = _cut_parts(wanted, slice(0, 1))
        for at in range(back + 1, min(back + 1 + later, self.positions)):
            if self._run_piece(reading, "cache/later", turned, wanted, (at, at + 1), name, cache) is None:
                return

    def _fresh_cache(self, name: str) -> Any:
        """Returns a cache of our own where the model may be left before it returns its own; else None."""
        if not self.leave or name != "past_key_values":
            return None
        if self.model.config.is_encoder_decoder:
            return EncoderDecoderCache(DynamicCache(), DynamicCache())
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def _run_piece(
        self,
        reading: Reading,
        label: str,
        batch: Mapping[str, torch.Tensor],
        plain: Parts,
        part: tuple[int, int],
        name: str,
        cache: Any,
    ) -> Any:
        """Runs positions `part` over a cache, notes how far they are from the plain run, and returns the cache."""
        begin, end = part
        assert self.stream is not None
        inputs = dict(batch)
        inputs[self.stream] = batch[self.stream][:, begin:end]
        if self.decoder and "attention_mask" in batch:
            inputs["attention_mask"] = batch["attention_mask"][:, 0 if reading.way[2] == "all" else begin : end]
        for key in ("position_ids", "token_type_ids", "mm_token_type_ids"):
            if key in batch:
                inputs[key] = batch[key][:, begin:end]
        if begin and self.decoder:  # images and the like are among the first tokens
            inputs = {k: t for k, t in inputs.items() if k in (self.stream, "attention_mask") or k.endswith("_ids")}
        options: dict[str, Any] = {"use_cache": True, **({name: cache} if cache is not None else {})}
        found = self._try_call(reading, label, inputs, positions=end - begin, **options)
        if found is None or not found.parts:
            return None
        cache = found.cache.get(name) or cache
        if cache is None:
            return None
        wanted, got = _cut_parts(plain, slice(None), slice(begin, end)), found.parts
        if reading.padded:
            kept = batch["attention_mask"][:, begin:end].bool()
            far = apart({n: part[kept] for n, part in got.items()}, {n: part[kept] for n, part in wanted.items()})
        else:
            far = apart(got, wanted)
        reading.distances[label] = max(far, reading.distances.get(label, 0.0))
        return cache

    def _run_alone(self, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts) -> None:
        """Runs the first row alone, and asks for what the model can record."""
        rows = len(next(iter(plain.values())))
        alone = rows > 1 and all(len(tensor) == rows for tensor in batch.values())
        row = 1 if alone else 0  # rows stand before it and, in a packed batch, after it
        inputs = {key: tensor[row : row + 1] for key, tensor in batch.items()} if alone else dict(batch)
        flags = [key for key in RECORDS if self._can_record(key)]
        found = None
        if not self.leave:
            for asked in dict.fromkeys((tuple(flags), ("hidden_states",), ("router_logits",))):
                wanted = {f"output_{key}": True for key in asked if key in flags}
                found = self._try_call(reading, asked[0] if asked else "", inputs, rows=1 if alone else None, **wanted)
                if found is not None:
                    reading.recorded |= {k: v for k, v in found.recorded.items() if k in asked}
                    break
            error = reading.errors.pop("hidden_states", "")  # of all that were asked for at once
            reading.errors |= {key: error for key in flags if error and key not in reading.recorded}
        if found is None:
            found = self._try_call(reading, "rows", inputs, rows=1 if alone else None)
        if alone and found is not None:
            reading.distances["rows"] = apart(found.parts, _cut_parts(plain, slice(row, row + 1)))

    def _can_record(self, key: str) -> bool:
        if key == "hidden_states":
            return True
        if key == "attentions":  # kernels that never build the weights cannot return them
            return bool(self.model.config._attn_implementation == "eager")
        text = self.model.config.get_text_config()
        return hasattr(self.model.config, "output_router_logits") or hasattr(text, "output_router_logits")

    def _repeat_reading(self, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts, drawn: bool) -> None:
        """Repeats the first call with its rows the other way round and other random numbers.

        The shapes are the same and the contents are not, so that what was kept of an earlier call is found, and what
        depends on where a row is among the others. What differs is told apart by the call as it was.
        """
        rows = len(next(iter(plain.values())))
        turn = list(reversed(range(rows))) if all(len(t) == rows for t in batch.values()) else list(range(rows))
        _set_seed(1)
        found = self._try_call(reading, "stateless", {k: t[turn] if len(t) == rows else t for k, t in batch.items()})
        if found is None:
            return
        far = apart(found.parts, _cut_parts(plain, turn))
        reading.distances |= {"stateless": 0.0, "deterministic": 0.0}
        if far <= allowed("stateless", 0.0, self.dtype) and not (drawn and far > 0):
            return
        _set_seed(1)
        other = self._try_call(reading, "stateless", batch)
        _set_seed(0)
        same = self._try_call(reading, "stateless", batch)
        if other is None or same is None:
            return
        chance, state = apart(other.parts, same.parts), apart(same.parts, plain)
        if chance > 4 * state:
            reading.distances["deterministic"] = FAILED if drawn else chance
        reading.distances["stateless"] = state
        if max(chance, state) <= allowed("stateless", 0.0, self.dtype):  # the order of the rows alone makes it differ
            reading.distances["rows"] = max(reading.distances.get("rows", 0.0), far)

    def _try_call(self, reading: Reading, label: str, inputs: Mapping[str, Any], **options: Any) -> _Seen | None:
        """Calls the model; an error is noted under the probe's name, which then has no distance."""
        try:
            return self._call_model(inputs, **options)
        except Exception as error:
            reading.errors[label] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            reading.distances.pop(label, None)
            return None

    def _call_model(
        self, inputs: Mapping[str, Any], *, rows: int | None = None, positions: int | None = None, **options: Any
    ) -> _Seen:
        """Runs the model and returns what is watched of it, (batch_size, sequence_length, ...) where it has that."""
        caching = bool(options.get("use_cache"))
        if "use_cache" in self.takes:
            options.setdefault("use_cache", False)
        shape = (rows or len(next(iter(inputs.values()))), positions or self._count_positions(inputs))
        inner: list[Any] = []
        got: dict[str, torch.Tensor] = {}
        handles = [self.model.base_model.register_forward_hook(lambda _m, _a, output: inner.append(output))]
        handles += [
            self.model.get_submodule(name).register_forward_hook(self._make_hook(name, got)) for name in self.at
        ]
        outputs: Any = {}
        with caches_off(() if caching else self.configs):
            try:
                arguments = {**inputs, **options}
                outputs = self.model(**arguments)
            except _LeftError:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        views = {name: self._view_rows(tensor, shape) for name, tensor in got.items()}
        parts = {name: view for name, view in views.items() if view is not None}
        if not self.leave:
            tensors = [outputs.get(key) for key in OUTPUTS] if hasattr(outputs, "get") else []
            tensors += [t for value in (*inner[-1:], outputs) for t in _collect_tensors(value)]
            output = next((t for t in tensors if self._fits_stream(t, shape)), None)
            parts |= {"": output} if output is not None else {}
        seen = _Seen(parts, {key: outputs.get(key) for key in _CACHES if hasattr(outputs, "get")}, {})
        for key in RECORDS:
            if options.get(f"output_{key}"):
                seen.recorded |= _collect_shapes(outputs, key)
        return seen

    def _make_hook(self, name: str, got: dict[str, torch.Tensor]) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            """Keeps what the module returns first, and ends the pass after the last."""
            found = next((t for t in _collect_tensors(output) if t.is_floating_point()), None)
            if found is not None and name not in got:
                got[name] = found.clone()
            if self.leave and len(got) == len(self.at):
                raise _LeftError

        return hook

    def _view_rows(self, tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
        """Views a tensor as (batch_size, sequence_length, ...), also when both are flattened into one; else None."""
        if self.stream is None:
            return tensor if tensor.shape[:1] == shape[:1] else None
        if tensor.ndim >= 2 and tuple(tensor.shape[:2]) == shape:
            return tensor if tensor.ndim > 2 else tensor[..., None]
        if tensor.ndim >= 2 and tensor.shape[0] == shape[0] * shape[1]:
            return tensor.reshape(*shape, -1)
        return None

    def _count_positions(self, inputs: Mapping[str, Any]) -> int:
        return int(inputs[self.stream].shape[1]) if self.stream is not None else 0

    def _fits_stream(self, tensor: Any, shape: tuple[int, int]) -> bool:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
            return False
        return tensor.shape[0] == shape[0] if self.stream is None else tuple(tensor.shape[:2]) == shape


def _drop_unused(cache: Any) -> None:
    """Takes the last layers from a cache that a model, left before it reached them, did not fill."""
    layers = getattr(cache, "layers", [])
    while layers and not getattr(layers[-1], "is_initialized", True) and not _has_state(layers[-1]):
        layers.pop()


def _has_state(layer: Any) -> bool:
    """Returns whether a recurrent layer of a cache holds something."""
    known = getattr(layer, "has_previous_state", False)
    return any(known.values()) if isinstance(known, dict) else bool(known)


def _first_row_of(cache: Any) -> bool:
    """Cuts a cache to its first row, if all its layers can be; returns whether it did."""
    both = isinstance(cache, EncoderDecoderCache)
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if both else [cache]
    layers = [layer for part in parts for layer in getattr(part, "layers", ())]
    if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return False
    cache.batch_select_indices(torch.tensor([0]))
    return True


def takes(model: nn.Module) -> set[str]:
    """Names what a model's `forward` takes, also where a subclass hands on what it does not name (`**kwargs`).

    In transformers' own classes, `**kwargs` are options of kernels, and no sign that another class takes them.
    """
    found: set[str] = set()
    for kind in type(model).__mro__:
        if "forward" not in vars(kind) or kind is nn.Module:
            continue
        parameters = inspect.signature(vars(kind)["forward"]).parameters
        found |= set(parameters) - {"self"}
        hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        if kind.__module__.startswith("transformers.") or not hands_on:
            break
    if "forward" in vars(model):  # put on the instance, by a wrapper that may hide what it takes
        found |= set(inspect.signature(model.forward).parameters)
    return found


class _LeftError(Exception):
    """Ends a forward pass of which the rest is of no interest."""


@dataclass
class _Seen:
    parts: Parts
    cache: dict[str, Any]
    recorded: dict[str, list[Any]]


def apart(found: Parts, wanted: Parts) -> float:
    """Returns the largest distance of any part; of what is missing, that of what does not run."""
    return max((distance(found[n], part) if n in found else FAILED for n, part in wanted.items()), default=0.0)


def _cut_parts(parts: Parts, rows: Any, positions: Any = slice(None)) -> Parts:
    """Returns some rows and positions of every part (a part without positions as it is)."""
    return {n: part[rows][:, positions] if part.ndim > 2 else part[rows] for n, part in parts.items()}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the largest root mean square of a difference at one position, relative to that of all of `wanted`.

    The last axis holds features; before it are (batch_size, sequence_length), or positions alone.
    """
    if found.shape != wanted.shape:
        return FAILED
    if not wanted.numel():
        return 0.0
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (found, wanted))
    size = torch.linalg.vector_norm(b)
    if not bool(torch.isfinite(size)):  # what is not finite, or is too large to be squared in float32
        kept = torch.isfinite(b)
        a, b = a.double().where(kept, 0.0), b.double().where(kept, 0.0)
        size = torch.linalg.vector_norm(b)
    off = (a - b).flatten(2) if a.ndim > 2 else a - b
    rows = torch.linalg.vector_norm(off, dim=-1) / off.shape[-1] ** 0.5
    far = float(rows.max() / (size / b.numel() ** 0.5).clamp(min=1e-30))
    return FAILED if far != far else far


@contextmanager
def _substitute_values(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replaces the parameters and buffers of these names by values, under every name that each of them has.

    (`torch.func.functional_call` leaves a value behind in a module that has two names.)
    """
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    wanted = {id(own[name]): value for name, value in values.items()}
    tables: list[dict[str, Any]] = [table for m in model.modules() for table in (m._parameters, m._buffers)]
    before = [(table, key, tensor) for table in tables for key, tensor in table.items()]
    for table, key, tensor in before:
        table[key] = wanted.get(id(tensor), tensor)
    try:
        yield
    finally:
        for table, key, tensor in before:
            table[key] = tensor


def _is_rounding(reading: Reading) -> bool:
    """Returns whether all that was measured is rounding."""
    return all(far <= allowed(name, 0.0, reading.dtype) for name, far in reading.distances.items())


def noise(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Returns other values for a new parameter or buffer: a branch that starts at zero hides what it computes.

    A buffer grows (some, such as variances, may not be negative), a parameter may do either.
    A buffer of zeros and ones is a mask, and stays. The noise depends on the name alone, so that it is the same in
    every process.
    """
    if not isinstance(parameter, nn.Parameter) and parameter.numel() > 1:
        found = set(parameter.detach().flatten()[:4096].tolist()) if parameter.numel() <= 2**24 else set()
        if found == {0.0, 1.0} and bool(((parameter == 0) | (parameter == 1)).all()):
            return parameter.detach().clone()
    generator = torch.Generator().manual_seed(sum(position * byte for position, byte in enumerate(name.encode(), 1)))
    fan = parameter.shape[-1] if parameter.ndim > 1 else 1
    drawn = torch.randn(parameter.shape, generator=generator) * 0.5 / max(fan, 1) ** 0.5
    drawn = drawn if isinstance(parameter, nn.Parameter) else drawn.abs()
    noisy: torch.Tensor = (parameter.detach() + drawn.to(parameter)).to(parameter.dtype)
    return noisy


def _change_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Returns other tokens."""
    return torch.where(tokens > 3, tokens - 1, tokens + 1)


def _collect_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [t for item in value for t in _collect_tensors(item)] if isinstance(value, (tuple, list)) else []


def _collect_shapes(outputs: Any, key: str) -> dict[str, list[Any]]:
    """Returns the shapes that outputs of a kind have, those of an encoder and a decoder too."""
    names = [name for name in outputs if name == key or name.endswith(f"_{key}")] if hasattr(outputs, "get") else []
    found: list[Any] = []
    for name in names:
        value = outputs[name]
        entries = value if isinstance(value, (tuple, list)) else [] if value is None else [value]
        found += [[list(t.shape) for t in _collect_tensors(entry)] for entry in entries]
    return {key: found}


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode and gives each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def caches_off(configs: Iterable[PreTrainedConfig]) -> Iterator[None]:
    """Keeps every part of the model from caching by itself, whatever its own configuration says."""
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def _chance_kept() -> Iterator[None]:
    """Gives random numbers back as they were."""
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(before)


def _set_seed(number: int) -> None:
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # without one, `torch.manual_seed` writes the stack down for each kind of accelerator
        torch.default_generator.manual_seed(number)
    random.seed(number)


def _get_state() -> tuple[Any, Any]:
    return torch.random.get_rng_state().numpy().tobytes(), random.getstate()


def _get_seeded_state(number: int) -> tuple[Any, Any]:
    """Returns the state of random numbers right after they were seeded."""
    now = torch.random.get_rng_state(), random.getstate()
    _set_seed(number)
    found = _get_state()
    torch.random.set_rng_state(now[0])
    random.setstate(now[1])
    return found
