"""What a change must keep, what was measured of it, and how far off is a fault.

A probe (`probes.py`) returns a distance: 0 where the property holds exactly. What a distance means is told by the
control, the same probe of the unchanged model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

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
FAILED = float("inf")  # the distance of what does not run

_FLOOR = {torch.float64: 1e-8, torch.float32: 1e-4}  # another order of summation, through all layers, relative
_FLOOR_HALF = 5e-2
_AGAIN = {torch.float64: 1e-12, torch.float32: 1e-5}  # the same call once more
_AGAIN_HALF = 2e-2


def allowed(name: str, control: float, dtype: torch.dtype) -> float:
    """Returns how large the distance of a probe may be: rounding, and some times what the control shows."""
    if name in ("stateless", "deterministic"):
        return max(4 * control, _AGAIN.get(dtype, _AGAIN_HALF))
    return max(4 * control, _FLOOR.get(dtype, _FLOOR_HALF))


def asks(name: str, control: float, dtype: torch.dtype) -> bool:
    """Returns whether a probe is asked for: a model in which positions see later ones may let them see more of them."""
    return name != "causal" or control <= allowed(name, 0.0, dtype)


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
    unmasked: bool = False  # where a position saw a later one, a watched module was given no mask


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
        if not asks(name, before, control.dtype):
            continue
        if before < FAILED and not after <= most:
            what = found.errors.get(name) or f"off by {after:.2g} of the output's size, where {most:.2g} is rounding"
            if name == "causal" and found.unmasked:
                what += "; its attention_mask was None there, and no mask means causal"
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


def is_rounding(reading: Reading) -> bool:
    """Returns whether all that was measured is rounding."""
    return all(far <= allowed(name, 0.0, reading.dtype) for name, far in reading.distances.items())


def apart(found: Parts, wanted: Parts) -> float:
    """Returns the largest distance of any part; of what is missing, that of what does not run."""
    return max((distance(found[n], part) if n in found else FAILED for n, part in wanted.items()), default=0.0)


def cut_parts(parts: Parts, rows: Any, positions: Any = slice(None)) -> Parts:
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
    size = float(torch.linalg.vector_norm(b))
    if not math.isfinite(size):  # what is not finite, or is too large to be squared in float32
        kept = torch.isfinite(b)
        a, b = a.double().where(kept, 0.0), b.double().where(kept, 0.0)
        size = float(torch.linalg.vector_norm(b))
    off = (a - b).flatten(2) if a.ndim > 2 else a - b
    most = float(torch.linalg.vector_norm(off, dim=-1).max())
    far = most / off.shape[-1] ** 0.5 / max(size / b.numel() ** 0.5, 1e-30)
    return FAILED if far != far else far
