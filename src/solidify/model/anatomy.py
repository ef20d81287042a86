"""Reads a network without changing it: names, patterns, counts, inputs to try it with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.errors import SurgeryError


def match(patterns: str | Sequence[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Returns for every pattern the names it matches, in their order.

    In a pattern `*` stands for one dotted part or a piece of one, `**` for any number of parts.
    """
    listed = list(names)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return {pattern: [name for name in listed if _regex(pattern).fullmatch(name)] for pattern in patterns}


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    text = ""
    parts = pattern.split(".")
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if part == "**":
            text += r"(?:[^.]+(?:\.[^.]+)*)?" if last else r"(?:[^.]+\.)*"
        else:
            text += re.escape(part).replace(r"\*", "[^.]*") + ("" if last else r"\.")
    return re.compile(text)


def suggestions(pattern: str, names: Iterable[str]) -> str:
    """Returns a half sentence that names what `pattern` may have meant, for messages about no hit."""
    listed = list(names)
    tail = pattern.rsplit(".", 1)[-1].replace("*", "")
    ends = [name for name in listed if tail and name.rsplit(".", 1)[-1] == tail]
    close = fold(ends)[:4] or get_close_matches(pattern, fold(listed), n=4, cutoff=0.4)
    return f"close to it: {', '.join(close)}" if close else "run `solidify inspect` to see the names"


def fold(names: Iterable[str]) -> list[str]:
    """Replaces numbers in dotted names by `*` and drops repeats: the layers of a model become one line."""
    folded = (".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return list(dict.fromkeys(folded))


def layer_index(name: str) -> int | None:
    """Returns the first number in a dotted module name, which is the layer's index; None without one."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def enclosing_config(model: PreTrainedModel, name: str) -> PreTrainedConfig:
    """Returns the configuration of the innermost `PreTrainedModel` that holds the module `name`."""
    config, module = model.config, model
    for part in name.split(".")[:-1]:
        module = module.get_submodule(part)
        if isinstance(module, PreTrainedModel):
            config = module.config
    return config


def main_dtype(module: nn.Module) -> torch.dtype | None:
    """Returns the floating dtype that most of the module's numbers have; None for a module without any."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def any_tensor(module: nn.Module) -> torch.Tensor | None:
    """Returns some parameter of the module, else some buffer, else None: it tells the device."""
    return next(iter((*module.parameters(), *module.buffers())), None)


def is_meta(module: nn.Module) -> bool:
    """Returns whether any parameter of the module is on the meta device, so that nothing can be computed."""
    return any(parameter.is_meta for parameter in module.parameters())


def count(parameters: Iterable[torch.Tensor]) -> int:
    """Returns the number of elements, each shared tensor once."""
    return sum({id(p): p.numel() for p in parameters}.values())


def probe_inputs(
    model: PreTrainedModel, *, batch_size: int = 2, length: int = 12, padded: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Makes random inputs that the model accepts, on its device: tokens, pixels or audio features by its main input.

    With `padded`, the first row ends in masked positions. Encoder-decoder models get a shorter decoder sequence.

    Raises:
        SurgeryError: the model's main input is of a kind that cannot be made up.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    kind = model.main_input_name
    inputs: dict[str, torch.Tensor] = {}
    if kind == "input_ids":
        high = int(config.vocab_size)
        inputs["input_ids"] = torch.randint(min(3, high - 1), high, (batch_size, length), generator=generator)
        inputs["attention_mask"] = torch.ones(batch_size, length, dtype=torch.long)
        if padded:
            inputs["attention_mask"][0, length - length // 3 :] = 0
    elif kind == "pixel_values":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (batch_size, int(model.config.num_channels), height, width)
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(model.dtype)
    elif kind == "input_features":
        frames = 2 * int(model.config.max_source_positions)
        shape3 = (batch_size, int(model.config.num_mel_bins), frames)
        inputs["input_features"] = torch.randn(shape3, generator=generator).to(model.dtype)
    elif kind == "input_values":
        inputs["input_values"] = torch.randn(batch_size, 4000, generator=generator).to(model.dtype)
    else:
        raise SurgeryError(f"{type(model).__name__} takes {kind!r}, and inputs of that kind cannot be made up yet")
    if model.config.is_encoder_decoder:
        decoder = (batch_size, max(2, length // 2 + 1))
        high = int(config.vocab_size)
        inputs["decoder_input_ids"] = torch.randint(min(3, high - 1), high, decoder, generator=generator)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Runs the model in evaluation mode without a cache and returns its logits (or its last hidden state)."""
    arguments = dict(inputs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    with torch.no_grad(), evaluation(model):
        outputs = model(**arguments)
    logits = outputs.get("logits")
    output = outputs["last_hidden_state"] if logits is None else logits
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"{type(model).__name__} returned no logits and no last hidden state")
    return output


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
