"""The probe of a cache: prefill, pieces, single steps, reordered rows, positions taken back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from .properties import Parts, Reading, apart, cut_parts, is_rounding
from .watching import CACHES, Watched

# Ways to use a cache, from the fullest on: the second piece, the single step, and which positions the mask speaks of.
_WAYS = [
    (piece, step, mask)
    for mask in ("all", "own")
    for piece, step in (("reordered", "crop"), ("reordered", "steps"), ("pieces", "steps"), ("singles", "steps"))
]


def measure_cache(
    watched: Watched, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts, control: Reading | None
) -> None:
    """Feeds the batch in pieces, in the way in which the control worked: the first in which all is rounding.

    Some caches can be neither reordered nor cropped, and some models want the mask of the new positions alone.
    """
    name = next((key for key in CACHES if key in watched.takes), None)
    if name is None or watched.stream is None or watched.positions < 4:
        return
    best: dict[str, float] | None = None
    for way in _WAYS if control is None else [control.way]:
        trial = Reading(dtype=watched.dtype, padded=reading.padded, way=way)
        _run_pieces(watched, trial, batch, plain, name, later=1 if control is None else 2)
        whole = _WAYS[-1] == way or {key.partition("/")[2] for key in trial.distances} >= {
            "prefill",
            way[0],
            way[1],
        }
        if control is not None or (whole and is_rounding(trial)) or best is None:
            best, reading.way = trial.distances, way
        if control is not None or (whole and is_rounding(trial)):
            reading.errors |= trial.errors
            break
    reading.distances |= best or {}


def _run_pieces(
    watched: Watched, reading: Reading, batch: Mapping[str, torch.Tensor], plain: Parts, name: str, *, later: int
) -> None:
    """Runs a prefill, a second piece (over reordered rows), and single steps (after a crop).

    The `later` ones are of one row alone, where the cache can be cut to it: one token is all that the model is
    given. The control makes one of them: whether the cache can be cut shows there.
    """
    assert watched.stream is not None
    ends = [watched.positions - 5 if watched.positions > 7 else 1, max(2, watched.positions - 3)]
    cache = _run_piece(watched, reading, "cache/prefill", batch, plain, (0, ends[0]), name, _fresh_cache(watched, name))
    if cache is None:
        return
    if watched.leave:
        _drop_unused(cache)
    if hasattr(cache, "activate_past_recording"):  # layers that forget what is out of their window could not crop
        with suppress(Exception):
            cache.activate_past_recording()
    rows = len(batch[watched.stream])
    order = [1, 0, *range(2, rows)] if rows > 1 and reading.way[0] == "reordered" else list(range(rows))
    turned = {k: t[order] if t.shape[:1] == (rows,) else t for k, t in batch.items()}
    if reading.way[0] == "singles":  # some take one position at a time, once there is a cache
        ends[1] = ends[0] + 1
    wanted, back = cut_parts(plain, order), ends[1]
    try:
        if reading.way[0] == "reordered":
            cache.reorder_cache(torch.tensor(order, device=batch[watched.stream].device))
        if (
            _run_piece(watched, reading, f"cache/{reading.way[0]}", turned, wanted, (ends[0], ends[1]), name, cache)
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
    cache = _run_piece(watched, reading, step, turned, wanted, (back, back + 1), name, cache)
    if cache is None:
        return
    if _first_row_of(cache):
        turned = {k: t[:1] if t.shape[:1] == (rows,) else t for k, t in turned.items()}
        wanted = cut_parts(wanted, slice(0, 1))
    for at in range(back + 1, min(back + 1 + later, watched.positions)):
        if _run_piece(watched, reading, "cache/later", turned, wanted, (at, at + 1), name, cache) is None:
            return


def _run_piece(
    watched: Watched,
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
    assert watched.stream is not None
    inputs = dict(batch)
    inputs[watched.stream] = batch[watched.stream][:, begin:end]
    if watched.decoder and "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"][:, 0 if reading.way[2] == "all" else begin : end]
    for key in ("position_ids", "token_type_ids", "mm_token_type_ids"):
        if key in batch:
            inputs[key] = batch[key][:, begin:end]
    if begin and watched.decoder:  # images and the like are among the first tokens
        inputs = {k: t for k, t in inputs.items() if k in (watched.stream, "attention_mask") or k.endswith("_ids")}
    options: dict[str, Any] = {"use_cache": True, **({name: cache} if cache is not None else {})}
    found = watched.try_call(reading, label, inputs, positions=end - begin, **options)
    if found is None or not found.parts:
        return None
    cache = found.cache.get(name) or cache
    if cache is None:
        return None
    wanted, got = cut_parts(plain, slice(None), slice(begin, end)), found.parts
    kept = batch["attention_mask"][:, begin:end].bool() if reading.padded else None
    if kept is not None and not bool(kept.all()):
        far = apart({n: part[kept] for n, part in got.items()}, {n: part[kept] for n, part in wanted.items()})
    else:
        far = apart(got, wanted)
    reading.distances[label] = max(far, reading.distances.get(label, 0.0))
    return cache


def _fresh_cache(watched: Watched, name: str) -> Any:
    """Returns a cache of our own where the model may be left before it returns its own; else None."""
    if not watched.leave or name != "past_key_values":
        return None
    if watched.model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=watched.model.config.get_text_config(decoder=True))


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
