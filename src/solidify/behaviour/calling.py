"""What a model's `forward` takes, and what stays as it was around a call: mode, caches, buffers, random numbers."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

_COPIED = 1 << 24  # numbers of the largest buffer that is copied for each call


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


def training_modes(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """Returns each module and whether it is in training mode."""
    return [(module, module.training) for module in modules]


def put_training_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Gives each module its mode, and those that have it already nothing."""
    for module, training in modes:
        if module.training != training:
            module.training = training


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode and gives each its own mode back."""
    modes = training_modes(model.modules())
    model.eval()
    try:
        yield
    finally:
        put_training_modes(modes)


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


@dataclass(frozen=True)
class RandomStates:
    """The states of random numbers: of PyTorch on the CPU and on each accelerator in use, of Python, and of NumPy.

    `numpy` is None where that had drawn none, for nothing had imported its random numbers.
    """

    cpu: torch.Tensor
    accelerators: tuple[torch.Tensor, ...]
    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | None


def random_states() -> RandomStates:
    """Returns the states of the random numbers; no accelerator, and no library, is begun for it."""
    module, numpy = _accelerator_in_use(), find_numpy()
    return RandomStates(
        torch.random.get_rng_state(),
        () if module is None else tuple(map(module.get_rng_state, range(module.device_count()))),
        random.getstate(),
        None if numpy is None else numpy.get_state(),
    )


def put_random_states(states: RandomStates) -> None:
    """Makes the random states what they were."""
    torch.random.set_rng_state(states.cpu)
    for number, state in enumerate(states.accelerators):
        _accelerator_in_use().set_rng_state(state, number)
    random.setstate(states.python)
    if states.numpy is not None:
        sys.modules["numpy.random"].set_state(states.numpy)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Gives the buffers that a state holds back as they were: a module may count its calls in one.

    Left out are those of more than 2**24 numbers, of which no copy is made, and those that no state holds: a model may
    compute them as it runs.
    """
    kept = [
        (module._buffers, key, tensor, tensor.clone())
        for module in model.modules()
        for key, tensor in module._buffers.items()
        if tensor is not None and key not in module._non_persistent_buffers_set and tensor.numel() <= _COPIED
    ]
    try:
        yield
    finally:
        for table, key, tensor, before in kept:
            if not tensor.is_meta and (tensor.shape != before.shape or not torch.equal(tensor, before)):
                tensor.data = before
            table[key] = tensor


def copy_tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns inputs with copies of the tensors among them: a module may write into what it is given."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


@contextmanager
def chance_kept() -> Iterator[None]:
    """Gives random numbers back as they were."""
    before = random_states()
    try:
        yield
    finally:
        put_random_states(before)


@contextmanager
def chance_kept_at_failure() -> Iterator[None]:
    """Gives random numbers back as they were if the block raises."""
    before = random_states()
    try:
        yield
    except BaseException:
        put_random_states(before)
        raise


def _accelerator_in_use() -> Any:
    """Returns the module of torch of an accelerator on which something has been done (`torch.cuda`); None for none."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module: Any = torch.get_device_module(device)
    return module if getattr(module, "is_initialized", module.is_available)() else None


def find_numpy() -> Any:
    """Returns NumPy's module of random numbers; None where nothing has imported it."""
    return sys.modules.get("numpy.random")


def set_seed(number: int) -> None:
    """Seeds the random numbers of torch, on accelerators that are in use too, of Python, and of NumPy where in use."""
    if _accelerator_in_use() is not None:
        torch.manual_seed(number)
    else:  # otherwise `torch.manual_seed` writes the stack down for each kind of accelerator
        torch.default_generator.manual_seed(number)
    random.seed(number)
    numpy = find_numpy()
    if numpy is not None:
        numpy.seed(number)


def seed_everything(number: int) -> None:
    """Seeds the random numbers of torch on every device, of Python and of NumPy, as `transformers.set_seed` does.

    That one imports transformers' trainer, which imports PEFT.
    """
    from numpy import random as numpy_random  # a fresh process that draws none of its numbers begins without it

    torch.manual_seed(number)
    random.seed(number)
    numpy_random.seed(number)


def get_state(numpy: Any = None) -> tuple[Any, ...]:
    """Returns the state of random numbers, in a form that can be compared; `numpy`, its next, to read which is slow."""
    drawn = None if numpy is None else numpy.random_sample()
    return torch.random.get_rng_state().numpy().tobytes(), random.getstate(), drawn


def get_seeded_state(number: int, numpy: Any = None) -> tuple[Any, ...]:
    """Returns the state of random numbers right after they were seeded, as `get_state` does."""
    now = torch.random.get_rng_state(), random.getstate()
    set_seed(number)
    found = get_state(numpy)
    torch.random.set_rng_state(now[0])
    random.setstate(now[1])
    return found
