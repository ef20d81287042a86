"""Makes up inputs that a model accepts: tokens, pixels, audio features, or images among tokens.

What a family takes is read from its main input, its configuration and the signature of its forward; of several shapes
that are in use for one kind of input, the first with which the model runs is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.behaviour import calling
from solidify.errors import SurgeryError
from solidify.model import anatomy
from solidify.system import foreign

Inputs = dict[str, torch.Tensor]


def probe_inputs(
    model: PreTrainedModel,
    *,
    batch_size: int = 2,
    length: int = 12,
    padded: bool = False,
    seed: int = 0,
    run: Callable[[PreTrainedModel, Inputs], Any] = anatomy.run,
) -> Inputs:
    """Makes random inputs that the model accepts, on its device; of a family with images, images and tokens.

    With `padded`, the first row ends in masked positions. Encoder-decoder models get a shorter decoder sequence. `run`
    is what must not fail with them: `anatomy.answer`, where the model need not return logits.

    Raises:
        SurgeryError: the model's main input is of a kind that cannot be made up, or it runs with none that was tried.
    """
    tried = []
    for inputs in _make_candidates(model, batch_size, length, padded, seed):
        placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        if anatomy.is_meta(model) or _takes_plain_tokens(model):
            return placed
        error = foreign.attempt(run, model, placed).error
        if error is None:
            return placed
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in placed.items())
        tried.append(f"{shapes}: {foreign.said(error)}")
    raise SurgeryError(
        f"{type(model).__name__} takes {model.main_input_name!r}, and no inputs could be made up that it accepts"
        + "".join(f"\n  - {line}" for line in tried)
    )


def only_known(inputs: Inputs, ids: Collection[int]) -> Inputs:
    """Returns inputs in which the first known id stands in the place of each that is not among the known `ids`.

    A token that surgery adds may get an id for which the base has a row already, which then is another one.
    """
    if not ids:
        return inputs
    known = torch.tensor(sorted(ids))
    return {
        key: t.masked_fill(~torch.isin(t, known.to(t.device)), int(known[0])) if key.endswith("input_ids") else t
        for key, t in inputs.items()
    }


def few_inputs(model: PreTrainedModel) -> Inputs:
    """Makes inputs for a model of which as little as possible is to be read: one row, of four tokens if it takes them.

    Raises:
        SurgeryError: as `probe_inputs`.
    """
    try:
        return probe_inputs(model, batch_size=1, length=4)
    except SurgeryError:
        return probe_inputs(model)  # a family may need more tokens, or more rows


def _takes_plain_tokens(model: PreTrainedModel) -> bool:
    """Returns whether there is nothing to try: a language model takes tokens."""
    images = "pixel_values" in calling.takes(model)
    books = getattr(model.config, "num_codebooks", None)
    return model.main_input_name == "input_ids" and model.can_generate() and not images and not books


def _make_candidates(model: PreTrainedModel, batch_size: int, length: int, padded: bool, seed: int) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(seed)
    if described := vars(model.config).get("example_inputs"):
        yield _make_described(model, described, batch_size, generator)
        return
    takes = calling.takes(model)
    kind = model.main_input_name
    worded = "input_ids" in takes or kind in ("input_ids", "inputs")
    tokens = _make_tokens(model, batch_size, length, padded, generator) if worded else {}
    decoder = _make_decoder_inputs(model, batch_size, length, generator)
    if kind == "input_ids":
        if "pixel_values" in takes:
            yield from ({**mixed, **decoder} for mixed in _images_among(model, tokens, takes, generator))
            for pixels in _make_pixels(model.config, batch_size, generator):
                yield {**tokens, "pixel_values": pixels.to(model.dtype)}
        yield {**tokens, **decoder}
        yield _ending_alike(model, tokens)
        books = int(getattr(model.config, "num_codebooks", None) or 1)  # a row of tokens for each
        yield {**tokens, "input_ids": tokens["input_ids"].repeat(books, 1)}
        yield {key: tensor[:1] for key, tensor in {**tokens, **decoder}.items()}
    elif kind == "pixel_values":
        for pixels in _make_pixels(model.config, batch_size, generator):
            yield {"pixel_values": pixels.to(model.dtype), **decoder}
            if tokens:
                yield {"pixel_values": pixels.to(model.dtype), **tokens}
    elif kind in ("input_features", "input_values", "inputs"):
        for sound in _make_sounds(model, batch_size, generator):
            yield {kind: sound.to(model.dtype), **decoder}
        if kind == "inputs":
            yield {"inputs": tokens["input_ids"]}


def _make_described(
    model: PreTrainedModel, described: dict[str, Any], batch_size: int, generator: torch.Generator
) -> Inputs:
    """Makes what a configuration says that the model takes: the name, the shape without the batch, and the dtype."""
    shape = (batch_size, *described["shape"])
    if described["below"] is not None:
        whole = torch.randint(0, described["below"], shape, generator=generator)
        return {described["name"]: whole.to(getattr(torch, described["dtype"]))}
    same = str(model.dtype).removeprefix("torch.") == described.get("weights")
    dtype = getattr(torch, described["dtype"]) if same else model.dtype
    return {described["name"]: torch.randn(shape, generator=generator).to(dtype)}


def _make_tokens(
    model: PreTrainedModel, batch_size: int, length: int, padded: bool, generator: torch.Generator
) -> Inputs:
    high = int(model.config.get_text_config().vocab_size)
    inputs = {"input_ids": torch.randint(min(3, high - 1), high, (batch_size, length), generator=generator)}
    inputs["attention_mask"] = torch.ones(batch_size, length, dtype=torch.long)
    if padded:
        inputs["attention_mask"][0, length - length // 3 :] = 0
    return inputs


def _make_decoder_inputs(model: PreTrainedModel, batch_size: int, length: int, generator: torch.Generator) -> Inputs:
    if not model.config.is_encoder_decoder:
        return {}
    high = int(model.config.get_text_config().vocab_size)
    shape = (batch_size, max(2, length // 2 + 1))
    return {"decoder_input_ids": torch.randint(min(3, high - 1), high, shape, generator=generator)}


def _ending_alike(model: PreTrainedModel, tokens: Inputs) -> Inputs:
    """Ends every row in the end token, by which encoder-decoders with a classification head find what to read."""
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    ids = torch.where(tokens["input_ids"] == (end or 0), 3, tokens["input_ids"])
    ids[:, -1] = end or 0
    return {**tokens, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _find_entry(config: PreTrainedConfig, *keys: str) -> Any:
    """Returns the first of some entries that a configuration, or else one of its parts, has."""
    parts = [part for name in config.sub_configs if isinstance(part := getattr(config, name, None), PreTrainedConfig)]
    for part in (config, *parts):
        for key in keys:
            if getattr(part, key, None) is not None:
                return getattr(part, key)
    return next((found for part in parts for found in [_find_entry(part, *keys)] if found is not None), None)


def _find_vision(config: PreTrainedConfig) -> Any:
    """Returns the configuration of what looks at images: a part of the model's, or its own."""
    return getattr(config, "vision_config", None) or config


def _make_pixels(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    vision = _find_vision(config)
    size = _find_entry(vision, "image_size") or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = int(_find_entry(vision, "num_channels", "in_channels") or 3)
    yield torch.randn((batch_size, channels, height, width), generator=generator)
    yield torch.randn((batch_size, 1, channels, height, width), generator=generator)


def _make_sounds(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields features (batch_size, bands, frames), the other way round, and plain samples (batch_size, samples)."""
    config = model.config
    bands = int(_find_entry(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim") or 80)
    frames = 2 * int(_find_entry(config, "max_source_positions", "max_length") or 32)
    if model.main_input_name == "input_features":
        yield torch.randn((batch_size, bands, frames), generator=generator)
        yield torch.randn((batch_size, frames, bands), generator=generator)
    else:
        yield torch.randn((batch_size, 4000), generator=generator)
        yield torch.randn((batch_size, frames // 2, bands), generator=generator)


def _images_among(
    model: PreTrainedModel, tokens: Inputs, takes: set[str], generator: torch.Generator
) -> Iterator[Inputs]:
    """Yields an image and its positions among the tokens of every row, as families of vision and language take them.

    How many tokens an image stands for is asked of the model's own `get_image_features`.
    """
    config: Any = model.config
    image_token = next(
        (n for k in ("image_token_id", "image_token_index") if (n := getattr(config, k, None)) is not None), None
    )
    features: Any = getattr(model, "get_image_features", None)
    if image_token is None or features is None or anatomy.is_meta(model):
        return
    batch_size = len(tokens["input_ids"])
    for image in (*_make_grids(config, batch_size, generator), *_plain_images(config, batch_size, generator)):
        image = {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in image.items()}
        with torch.no_grad(), anatomy.evaluation(model):
            rows = _count_rows(foreign.attempt(features, **image).value)
        if rows == 0 or rows % batch_size:
            continue
        marks = torch.full((batch_size, rows // batch_size), int(image_token))
        text = torch.where(tokens["input_ids"] == int(image_token), 0, tokens["input_ids"])
        mixed = {"input_ids": torch.cat([marks, text], dim=1)}
        mixed["attention_mask"] = torch.cat([torch.ones_like(marks), tokens["attention_mask"]], dim=1)
        if "mm_token_type_ids" in takes:
            mixed["mm_token_type_ids"] = (mixed["input_ids"] == int(image_token)).long()
        yield {**mixed, **image}


def _plain_images(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> Iterator[Inputs]:
    for pixels in _make_pixels(config, batch_size, generator):
        yield {"pixel_values": pixels}


def _make_grids(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> Iterator[Inputs]:
    """Yields images as rows of patches with the grid that they form: one frame, two merged patches high and wide."""
    vision = _find_vision(config)
    patch, merge = getattr(vision, "patch_size", None), getattr(vision, "spatial_merge_size", None)
    if not isinstance(patch, int) or not isinstance(merge, int):
        return
    channels = int(_find_entry(vision, "in_channels", "num_channels") or 3)
    width = channels * int(getattr(vision, "temporal_patch_size", None) or 1) * patch * patch
    side = 2 * merge
    pixels = torch.randn((batch_size * side * side, width), generator=generator)
    yield {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]] * batch_size)}


def _count_rows(features: Any) -> int:
    """Counts the vectors in what a model makes of images, whatever they are nested in."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, torch.Tensor):
        return features.numel() // features.shape[-1]
    return sum(_count_rows(part) for part in features) if isinstance(features, (tuple, list)) else 0
