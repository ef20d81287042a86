"""Reads a network without changing it: names, patterns, counts, inputs to try it with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.behaviour import calling
from solidify.upstream.torch import writes
from solidify.weights import mapped

OUTPUTS = ("logits", "logits_per_image", "last_hidden_state")  # what stands for a model's output, the first there is

evaluation = calling.evaluation
LARGE = 2**29  # bytes of parameters; what is larger is neither run nor read as a whole where that can be avoided


def match(patterns: str | Sequence[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Returns for every pattern the names it matches, in their order.

    In a pattern `*` stands for one dotted part or a piece of one, `**` for any number of parts.
    """
    listed = list(names)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return {pattern: [name for name in listed if _compile_regex(pattern).fullmatch(name)] for pattern in patterns}


def match_within(pattern: str, names: Sequence[str]) -> list[str]:
    """Returns the parameters that a pattern names, and those that stand in a module that it names."""
    ends = {".".join(parts[: n + 1]) for parts in (name.split(".") for name in names) for n in range(len(parts))}
    matched = match(pattern, sorted(ends))[pattern]
    return [name for name in names if any(name == hit or name.startswith(f"{hit}.") for hit in matched)]


@lru_cache(maxsize=1024)
def _compile_regex(pattern: str) -> re.Pattern[str]:
    text = ""
    parts = pattern.split(".")
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
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


def names_within(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    """Returns which names of tensors stand in some modules, by the modules' names."""
    starts = tuple(f"{name}." for name in modules)
    return {name for name in names if name.startswith(starts)}


def is_meta(module: nn.Module) -> bool:
    """Returns whether any parameter of the module is on the meta device, so that nothing can be computed."""
    return any(parameter.is_meta for parameter in module.parameters())


def size(module: nn.Module) -> int:
    """Returns the number of bytes of the parameters, each shared tensor once."""
    return sum({id(p): p.nbytes for p in module.parameters()}.values())


def sparing(model: nn.Module) -> AbstractContextManager[None]:
    """While the block lasts, gives the memory of each module of a large, mapped model back once the module has run."""
    return mapped.released(model) if size(model) >= LARGE else nullcontext()


def count(parameters: Iterable[torch.Tensor]) -> int:
    """Returns the number of elements, each shared tensor once."""
    return sum({id(p): p.numel() for p in parameters}.values())


def run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Runs the model in evaluation mode without a cache and returns its logits (or its last hidden state)."""
    outputs = answer(model, inputs)
    output: torch.Tensor | None = next(
        (outputs[key] for key in OUTPUTS if isinstance(outputs.get(key), torch.Tensor)), None
    )
    if output is None:
        raise ValueError(f"{type(model).__name__} returned none of {', '.join(OUTPUTS)}")
    return output


def answer(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """Runs the model in evaluation mode without a cache and returns all that it returns.

    What it writes into its inputs, or into buffers that its state holds, is not there afterwards.
    """
    arguments = calling.copy_tensors(inputs)
    if "use_cache" in calling.takes(model):
        arguments["use_cache"] = False
    with torch.no_grad(), evaluation(model), caches_off(model), calling.buffers_kept(model), sparing(model):
        return model(**arguments)


def caches_off(model: nn.Module) -> AbstractContextManager[None]:
    """Keeps every part of the model from caching, whatever its own configuration says."""
    configs = [v for m in model.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]
    return calling.caches_off({id(config): config for config in configs}.values())


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """When the block ends, the model has forgotten its calls: attributes and unsaved buffers are as they were before.

    A rotary embedding that grows (`dynamic`, `longrope`) computes otherwise once it has seen a longer text. Where a
    parameter was written to in place, attributes stay: one may tell of that (RWKV halves weights as it evaluates).
    """
    parameters = [(parameter, writes(parameter)) for parameter in model.parameters() if not parameter.is_inference()]
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    before = []
    for module in model.modules():
        plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        unsaved = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if id(buffer) not in saved]
        before.append((module, plain, [(name, buffer, buffer.clone()) for name, buffer in unsaved]))
    try:
        yield
    finally:
        is_written = any(writes(parameter) != count for parameter, count in parameters)
        for module, plain, buffers in before:
            _put_back(module, vars(module) if is_written else plain, buffers)


@torch.no_grad()
def _put_back(
    module: nn.Module, plain: Mapping[str, Any], buffers: Sequence[tuple[str, torch.Tensor, torch.Tensor]]
) -> None:
    own = vars(module)
    for key in [key for key in own if not key.startswith("_") and key not in plain]:
        del own[key]
    own.update(plain)
    for name, buffer, value in buffers:
        if not torch.equal(buffer, value):
            buffer.copy_(value)
        setattr(module, name, buffer)


def path_in_config(config: PreTrainedConfig, inner: PreTrainedConfig) -> str | None:
    """Returns the dotted way from a configuration to one within it, with a dot at the end; empty for itself."""
    if inner is config:
        return ""
    for key in config.sub_configs:
        part = getattr(config, key, None)
        below = path_in_config(part, inner) if isinstance(part, PreTrainedConfig) else None
        if below is not None:
            return f"{key}.{below}"
    return None
