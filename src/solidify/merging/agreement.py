"""Is a merged model the attached one? In every output, and as closely as roundings of the same tensors allow.

How close that is depends on the model (a router sends a token elsewhere at a near tie) and is measured on it: in the
base, the changed tensors become what they must be, moved by one unit in the last place in random directions, as is what
their modules return, and it is run. What two such draws differ by is the measure; neither the attached nor the merged
model has a part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from solidify.findings import Finding
from solidify.merging import rounding, sums
from solidify.merging.sums import Weight
from solidify.model.answers import Output, collect, distance
from solidify.upstream.torch import own_buffers, own_parameters

# Draws with which every judgement begins, and at most. Base + adapter and the merged model differ like two draws of
# smaller noise: a weight, and a sum that is computed in another order, is rounded to nearest, off by a unit over √12,
# and a draw by a unit times √(2/3). What befalls them, and none of n pairs of draws, has for any probability p of a
# pair at most the chance p(1 - p)ⁿ < 1 / (e n), 1 in 350.
_DRAWS, _MOST = 8, 128

NAME = "merged equals attached"


def merged_equals_attached(
    attached: Output,
    merged: nn.Module,
    base: nn.Module,
    inputs: Mapping[str, Mapping[str, torch.Tensor]],
    weights: Mapping[str, Callable[[], Weight]],
) -> Finding:
    """Compares all outputs of base and adapter with those of the merged model.

    `weights` are what the changed tensors must be, by name (`sums.effective`), and `base` is the base without adapter,
    which is left as it was. The finding fails when some output of the two is further apart than that of any two draws.
    """
    found = collect(merged, inputs)
    missing = sorted(attached.tensors.keys() ^ found.tensors.keys())
    if missing or not attached.tensors:
        both = f"one returns {', '.join(missing[:4])} and the other does not" if missing else "no tensor is returned"
        return Finding(NAME, False, both)
    off = {key: distance(tensor, found.tensors[key]) for key, tensor in attached.tensors.items()}
    reach, drawn, last = dict.fromkeys(off, 0.0), 0, dict[str, torch.Tensor]()
    while drawn <= _MOST and (drawn <= _DRAWS or any(off[key] > reach[key] for key in off)):
        with moved(base, weights, seed=drawn):
            noisy = collect(base, inputs).tensors
        pairs = {key: (last[key], noisy[key]) for key in off if key in last and key in noisy}
        reach |= {key: max(reach[key], distance(*pair)) for key, pair in pairs.items()}
        drawn, last = drawn + 1, noisy
    faults = [
        f"{key} differs by {off[key]:.1e}; moved by one unit in the last place, the changed tensors make at most "
        f"{reach[key]:.1e} of it ({drawn} draws)"
        for key in off
        if not off[key] <= reach[key]
    ]
    worst = max(off, key=lambda key: off[key])
    evidence = (
        f"{_name_outputs(off)}: {worst} differs most, by {off[worst]:.1e}; moved by one unit in the last place, the "
        f"changed tensors make up to {reach[worst]:.1e} of it"
    )
    if attached.no_tensors:
        evidence += f"; not looked at: {', '.join(f'{k} ({v})' for k, v in attached.no_tensors.items())}"
    return Finding(NAME, not faults, "; ".join(faults[:4]) or evidence)


def _name_outputs(keys: Iterable[str]) -> str:
    """Names outputs, the cases left out."""
    paths = list(dict.fromkeys(key.partition("/")[2] or key for key in keys))
    return ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")


@contextmanager
def moved(model: nn.Module, weights: Mapping[str, Callable[[], Weight]], *, seed: int) -> Iterator[None]:
    """While the block lasts, the named tensors are what they must be, moved by -1, 0 or 1 unit in the last place.

    What their modules return is moved so too. Tensors that are one in the model and must differ are two meanwhile.
    """
    generator = torch.Generator().manual_seed(seed)

    def steps(like: torch.Tensor) -> torch.Tensor:
        return torch.randint(-1, 2, like.shape, generator=generator, dtype=torch.int8).to(like.device)

    def rounded(output: Any, terms: int) -> Any:
        """Moves the tensors in an output by a rounding each."""
        if isinstance(output, tuple):
            return tuple(rounded(part, terms) for part in output)
        if not isinstance(output, torch.Tensor) or not output.is_floating_point() or not output.numel():
            return output
        return output + (steps(output) * rounding.ulp(output, terms)).to(output.dtype)

    before: list[tuple[dict[str, Any], str, Any]] = []
    owners = {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    hooks = [
        owner.register_forward_hook(
            partial(lambda terms, module, given, output: rounded(output, terms), rounding.terms(owner))
        )
        for owner in owners.values()
    ]
    try:
        for name, weight in weights.items():
            owner, _, key = name.rpartition(".")
            module = owners[owner]
            held: dict[str, Any] = own_parameters(module) if key in own_parameters(module) else own_buffers(module)
            before.append((held, key, held[key]))
            expected, dtype = weight(), held[key].dtype
            value = expected.wanted
            if dtype.is_floating_point:
                value = value + steps(value) * sums.ulp(expected, dtype)
            value = value.to(dtype)
            held[key] = nn.Parameter(value, requires_grad=False) if held is own_parameters(module) else value
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for held, key, value in reversed(before):
            held[key] = value


def not_looked_at(why: str) -> Finding:
    """Says that outputs were not compared, and why."""
    return Finding.unseen(NAME, why)


def chosen(weights: Mapping[str, Callable[[], Weight]], changed: Sequence[str]) -> dict[str, Callable[[], Weight]]:
    """Returns what the changed tensors must be."""
    return {name: weights[name] for name in changed if name in weights}
