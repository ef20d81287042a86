"""Runs a model in training mode without chance, so that two passes over the same rows can be compared.

Every operation of torch that draws random numbers is met below autograd, where they all come by, whoever asked for
them: dropout by module, by a number or inside an attention kernel, dropped layers, noise, sampling. What it would draw
is replaced by one value that is the same for every element: the mean of its distribution (dropout then keeps all).
Everything else of training mode stays: a batch norm still uses its batch.

What is drawn elsewhere (numpy, Python's `random`, a kernel that torch does not know of) is still random afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from solidify.behaviour.calling import chance_kept, seed_everything
from solidify.upstream.torch import TorchDispatchMode, is_dropout, schema

Call = Mapping[str, Any]  # an operation's arguments by name


class Chanceless(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, nothing that torch draws is random.

    `unknown` names operations that it left as they are, `replaced` those whose draws became their mean. What then keeps
    all (dropout, which multiplies by Bernoulli draws), and single numbers (by which layers are dropped), are not among
    them: a comparison with a mean may hide what is only there for some draws.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unknown: set[str] = set()
        self.replaced: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, without its chance."""
        kwargs = dict(kwargs or {})
        names = [argument.name for argument in schema(func).arguments]
        if "dropout_p" in names or "dropout" in names:  # attention and recurrent kernels, forwards and backwards
            args, kwargs = _replace_argument(
                names, args, kwargs, "dropout_p" if "dropout_p" in names else "dropout", 0.0
            )
            return func(*args, **kwargs)
        name = schema(func).name.removeprefix("aten::")
        if name not in _MEANS:
            if torch.Tag.nondeterministic_seeded in func.tags:
                self.unknown.add(name)
            return func(*args, **kwargs)
        call = {a.name: a.default_value for a in schema(func).arguments if a.has_default_value()}
        call |= {**dict(zip(names, args, strict=False)), **kwargs}
        made = _MEANS[name](call)
        if not name.startswith(_KEEPING) and isinstance(made, torch.Tensor) and made.numel() > 1:
            self.replaced.add(name)
        if schema(func).name.endswith("_") and isinstance(made, torch.Tensor):
            return call["self"].copy_(made)
        return call["out"].copy_(made) if call.get("out") is not None else made


def _replace_argument(
    names: list[str], args: Any, kwargs: dict[str, Any], name: str, value: Any
) -> tuple[Any, dict[str, Any]]:
    """Returns the arguments of a call with one of them changed, if it was given."""
    index = names.index(name)
    if index < len(args):
        return (*args[:index], value, *args[index + 1 :]), kwargs
    return args, {**kwargs, name: value} if name in kwargs else kwargs


def _fill_like(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, value)


def _make_tensor(value: float, call: Call) -> torch.Tensor:
    """Returns a new tensor of one value, where a factory was asked for one."""
    dtype = call["dtype"] if isinstance(call.get("dtype"), torch.dtype) else None  # a schema's own default is a number
    if isinstance(call.get("self"), torch.Tensor):
        return torch.full_like(call["self"], value, dtype=dtype, device=call.get("device"))
    dtype = dtype or (torch.long if isinstance(value, int) else torch.get_default_dtype())
    return torch.full(tuple(call["size"]), value, dtype=dtype, device=call.get("device"))


def _take_middle(call: Call) -> torch.Tensor:
    low, high = call.get("low", 0) or 0, call["high"]
    return _make_tensor(int((int(low) + int(high) - 1) // 2), call)


def _take_normal_mean(call: Call) -> torch.Tensor:
    mean, std = call.get("mean", 0.0), call.get("std")
    if isinstance(mean, torch.Tensor):
        return mean.clone()
    like = std if isinstance(std, torch.Tensor) else call.get("self")
    return _fill_like(mean, like) if isinstance(like, torch.Tensor) else _make_tensor(float(mean), call)


def _take_random_mean(call: Call) -> torch.Tensor:
    """A whole number; without an upper end, of all that the dtype holds exactly (`Tensor.random_`)."""
    like: torch.Tensor = call["self"]
    low, high = int(call.get("from") or 0), call.get("to")
    if high is None:
        kind = like.dtype
        whole = round(2 / torch.finfo(kind).eps) if kind.is_floating_point else 1 if kind == torch.bool else None
        high = 1 + (torch.iinfo(kind).max if whole is None else whole)
    return torch.full_like(like, (low + int(high) - 1) // 2)


def _take_bernoulli_mean(call: Call) -> torch.Tensor:
    p = call.get("p", call["self"])
    subject: torch.Tensor = call["self"]
    return p.expand_as(subject).clone() if isinstance(p, torch.Tensor) else _fill_like(p, subject)


def _take_multinomial(call: Call) -> torch.Tensor:
    weights: torch.Tensor = call["self"]
    count = int(call["num_samples"])
    if call.get("replacement"):
        return weights.argmax(-1, keepdim=True).expand(*weights.shape[:-1], count).clone()
    return weights.topk(count, dim=-1).indices


def _apply_mean_rrelu(call: Call) -> torch.Tensor:
    subject: torch.Tensor = call["self"]
    slopes = torch.where(call["self"] >= 0, 1.0, (float(call["lower"]) + float(call["upper"])) / 2).to(call["self"])
    call["noise"].copy_(slopes)  # which the backward pass takes for the slopes
    return subject * slopes


# What takes the place of each operation that draws: its mean, or else one value that no draw decides.
_MEANS: dict[str, Callable[[Call], Any]] = {
    "native_dropout": lambda c: (c["input"].clone(), torch.ones_like(c["input"], dtype=torch.bool)),
    "native_dropout_backward": lambda c: c["grad_output"] * c["mask"],
    "_fused_dropout": lambda c: (c["self"].clone(), torch.ones_like(c["self"], dtype=torch.uint8)),
    "_masked_scale": lambda c: c["self"] * c["mask"],
    "dropout": lambda c: c["input"].clone(),
    "alpha_dropout": lambda c: c["input"].clone(),
    "bernoulli": _take_bernoulli_mean,
    "bernoulli_": _take_bernoulli_mean,
    "rand": lambda c: _make_tensor(0.5, c),
    "rand_like": lambda c: _make_tensor(0.5, c),
    "randn": lambda c: _make_tensor(0.0, c),
    "randn_like": lambda c: _make_tensor(0.0, c),
    "randint": _take_middle,
    "randint_like": _take_middle,
    "randperm": lambda c: torch.arange(c["n"], device=c.get("device")),
    "normal": _take_normal_mean,
    "normal_": _take_normal_mean,
    "uniform": lambda c: _fill_like((c["from"] + c["to"]) / 2, c["self"]),
    "uniform_": lambda c: _fill_like((c["from"] + c["to"]) / 2, c["self"]),
    "exponential": lambda c: _fill_like(1 / c["lambd"], c["self"]),
    "exponential_": lambda c: _fill_like(1 / c["lambd"], c["self"]),
    "geometric": lambda c: _fill_like(math.ceil(1 / c["p"]), c["self"]),
    "geometric_": lambda c: _fill_like(math.ceil(1 / c["p"]), c["self"]),
    "cauchy": lambda c: _fill_like(c["median"], c["self"]),
    "cauchy_": lambda c: _fill_like(c["median"], c["self"]),
    "log_normal": lambda c: _fill_like(math.exp(c["mean"]), c["self"]),
    "log_normal_": lambda c: _fill_like(math.exp(c["mean"]), c["self"]),
    "poisson": lambda c: c["self"].clone(),
    "binomial": lambda c: c["count"] * c["prob"],
    "_standard_gamma": lambda c: c["self"].clone(),
    "_sample_dirichlet": lambda c: c["self"] / c["self"].sum(-1, keepdim=True),
    "random": _take_random_mean,
    "random_": _take_random_mean,
    "multinomial": _take_multinomial,
    "rrelu_with_noise": _apply_mean_rrelu,
    "rrelu_with_noise_": _apply_mean_rrelu,
}


_KEEPING = ("bernoulli", "native_dropout", "_fused_dropout", "_masked_scale", "dropout", "alpha_dropout", "rrelu")


@contextmanager
def without(model: nn.Module, *, everywhere: bool = True) -> Iterator[Chanceless]:
    """Takes chance out of a model while the block lasts.

    Not `everywhere`, only dropout modules are set to zero: a compiled model's kernels are not met one by one.
    """
    held: list[tuple[nn.Module, str, float]] = [(m, "p", m.p) for m in model.modules() if is_dropout(m)]
    held += [(m, "dropout", m.dropout) for m in model.modules() if isinstance(m, nn.RNNBase)]
    for module, name, _ in held:
        setattr(module, name, 0.0)
    mode = Chanceless()
    try:
        if everywhere:
            with mode:
                yield mode
        else:
            yield mode
    finally:
        for module, name, value in held:
            setattr(module, name, value)


@contextmanager
def other_numbers(seed: int) -> Iterator[None]:
    """Starts every generator with another state while the block lasts, and puts all of them back."""
    with chance_kept():
        seed_everything(seed)
        yield
