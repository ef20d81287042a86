"""How one unit learns: a copy of it in float32, its own optimizer, its own random numbers, its own end.

Nothing of it depends on other units, so that a layer's result is the same whichever others learn beside it, in one
process or in several.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, get_scheduler

from solidify.behaviour import calling
from solidify.errors import HealingError, ObjectiveError, raised_as
from solidify.healing import matching
from solidify.healing.matching import Call, Unit
from solidify.model import anatomy
from solidify.surgery import contract
from solidify.system import foreign, processes
from solidify.training import groups
from solidify.training.groups import ParameterGroup

_LOOK = 10  # steps between two looks at whether the error still falls
_FALLS = 1e-2  # an error that has fallen by less than this share stands still


@dataclass(frozen=True)
class Alignment:
    """How units learn.

    Args:
        max_steps: batches that each unit sees at most.
        match: what is matched, one of `matching.AT`.
        distance: how, one of `matching.DISTANCES`.
        train: patterns of the parameters or modules that learn; empty, what surgery made new.
        optim: a class of `torch.optim`; `optim_args` are its own arguments.
        lr_scheduler_type: a schedule of transformers, with `warmup_steps`.
        patience: a unit ends when its error did not fall by 1 % for so many looks, ten steps apart; None, never.
        inputs: `base`, what the module was given in the unmodified base; `healed`, what it is given behind modules
            that have learned already (one unit after the other, in the order of the layers).
        parameter_groups: names with a learning rate, a weight decay or optimizer settings of their own.
        seed: of the order of the batches, and of all random numbers that a module draws.
        stream: one layer in memory at a time; None, the free memory decides. The bits are the same in float32.
        share: this process's number and how many there are: it trains every so many-th unit and leaves the rest. A call
            with the directory that has all results, and without a share, puts them together.
    """

    max_steps: int = 200
    match: str = "output"
    distance: str = "mse"
    train: tuple[str, ...] = ()
    optim: str = "AdamW"
    learning_rate: float = 1e-3
    optim_args: Mapping[str, Any] = field(default_factory=dict)
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    patience: int | None = None
    inputs: str = "base"
    parameter_groups: tuple[ParameterGroup, ...] = ()
    seed: int = 42
    stream: bool | None = None
    share: tuple[int, int] = (0, 1)

    def streams(self, base: nn.Module) -> bool:
        """Returns whether one layer is in memory at a time: as asked, or where three times the base (itself, the
        changed model, what learns) is more than is free."""
        return self.stream if self.stream is not None else 3 * anatomy.size(base) > processes.free_memory()

    def faults(self) -> list[str]:
        """Says what cannot be."""
        found = []
        for key, value, known in (
            ("match", self.match, matching.AT),
            ("distance", self.distance, matching.DISTANCES),
            ("inputs", self.inputs, ("base", "healed")),
        ):
            if value not in known:
                found.append(f"{key} is one of {', '.join(known)}, but {value!r} was given")
        number, count = self.share
        if not 0 <= number < count:
            found.append(f"share is this process's number, from 0, and how many there are, but {self.share} was given")
        if not isinstance(self.learning_rate, (int, float)) or not self.learning_rate > 0:
            found.append(f"learning_rate is a number above 0, but {self.learning_rate!r} was given")
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            found.append(f"max_steps is a whole number of at least 1, but {self.max_steps} was given")
        if self.warmup_steps < 0:
            found.append(f"warmup_steps is at least 0, but {self.warmup_steps} was given")
        if "lr" in self.optim_args:
            found.append("optim_args has lr, which is written learning_rate")
        if self.patience is not None and self.patience < 1:
            found.append(f"patience is at least 1, but {self.patience} was given")
        if isinstance(self.train, str):
            found.append(f"train is a tuple of patterns: ({self.train!r},)")
        kind = getattr(torch.optim, self.optim, None)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            found.append(f"optim is a class of torch.optim, as AdamW, but {self.optim!r} was given")
        elif not found:
            error = foreign.attempt(self._try_optimizer, kind).error
            words = f"{self.optim} with the schedule {self.lr_scheduler_type} cannot be used like that"
            found += [f"{words}: {foreign.said(error)}"] if error else []
        return found

    def arguments(self, kind: Any) -> dict[str, Any]:
        """Returns what an optimizer's class is given: Adam's fused step makes no copies of what learns."""
        ways = ("fused", "foreach", "differentiable", "capturable")
        fused = kind in (torch.optim.Adam, torch.optim.AdamW) and not any(way in self.optim_args for way in ways)
        return {**({"fused": True} if fused else {}), **self.optim_args}

    def _try_optimizer(self, kind: Any) -> None:
        """Makes one step of a parameter of nobody's, with the optimizer and the schedule."""
        parameter = nn.Parameter(torch.zeros(2, 2))
        optimizer = kind([parameter], lr=self.learning_rate, **self.arguments(kind))
        schedule = get_scheduler(self.lr_scheduler_type, optimizer, self.warmup_steps, self.max_steps)
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
        schedule.step()


class Learner:
    """One unit that learns. The model's own modules are not touched: a copy in float32 is."""

    def __init__(self, unit: Unit, module: nn.Module, trained: Sequence[str], settings: Alignment) -> None:
        """Copies the unit's `module`; `trained` are the full names of the parameters that learn."""
        self.unit, self.settings = unit, settings
        self.copy = copy_module(module)
        self.rooted = _root(unit.name, self.copy)
        wanted = set(trained)
        named = list(self.rooted.named_parameters(remove_duplicate=False))
        learning = {id(parameter) for name, parameter in named if name in wanted}  # one may have several names
        for _, parameter in named:
            parameter.requires_grad_(id(parameter) in learning)
        self._unsaved = {name: buffer.clone() for name, buffer in self._list_unsaved().items()}
        self.optimizer, self.schedule = self._make_optimizer()
        self.errors: list[float] = []
        self.finished = False
        self.fault: str | None = None
        self._best, self._waited = float("inf"), 0

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        settings = self.settings
        parameters = [p for p in self.rooted.parameters() if p.requires_grad]
        kind: Any = getattr(torch.optim, settings.optim)
        with foreign.calling(f"{self.unit.name} cannot learn by {settings.optim}", HealingError):
            optimizer = kind(parameters, lr=settings.learning_rate, **settings.arguments(kind))
        own = _groups_within(self.rooted, settings.parameter_groups)
        if own:
            with raised_as(HealingError, of=ObjectiveError):
                groups.split(optimizer, self.rooted, own)
        schedule = get_scheduler(settings.lr_scheduler_type, optimizer, settings.warmup_steps, settings.max_steps)
        return optimizer, schedule

    def step(self, call: Call, mask: torch.Tensor | None) -> None:
        """Makes one step on one call of the base."""
        number = len(self.errors)
        with calling.chance_kept():
            calling.set_seed(zlib.crc32(f"{self.settings.seed}/{self.unit.name}/{number}".encode()))
            far, size = self._compare(call, mask, train=True)
            loss = far / size.clamp(min=1e-30)
            if not loss.requires_grad:
                self._end(f"{self.unit.name}: nothing that learns moves what is matched ({self.settings.match})")
                return
            loss.backward()  # type: ignore[no-untyped-call]
        self.errors.append(float(loss.detach()))
        if not torch.isfinite(loss):
            found = f"the error is {self.errors[-1]:g} at step {number + 1}"
            self._end(f"{self.unit.name}: {found}; lower the learning rate")
            return
        with foreign.calling(f"{self.unit.name} cannot learn by {self.settings.optim}", HealingError):
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        before = self._unsaved
        moved = [
            name
            for name, buffer in self._list_unsaved().items()
            if name not in before or not torch.equal(buffer, before[name])
        ]
        if moved:
            self._end(f"{self.unit.name}: {moved[0]} moves in training and is not saved (persistent=False); save it")
            return
        self.finished = len(self.errors) >= self.settings.max_steps or self._stands_still()

    def _end(self, fault: str) -> None:
        self.fault, self.finished = fault, True

    def _stands_still(self) -> bool:
        if self.settings.patience is None or len(self.errors) % _LOOK:
            return False
        lately = sum(self.errors[-_LOOK:]) / _LOOK
        if lately < (1 - _FALLS) * self._best:
            self._best, self._waited = lately, 0
        else:
            self._waited += 1
        return self._waited >= self.settings.patience

    def _compare(self, call: Call, mask: torch.Tensor | None, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        at = self.settings.match
        self.copy.eval()
        for name in self.unit.members:
            self.rooted.get_submodule(name).train(train)
        args, kwargs = contract.widened(call.args), contract.widened(call.kwargs)
        called = foreign.calling(f"{self.unit.name} fails on what the base gives it", HealingError)
        with matching.watching(self.copy, self.unit.name, at) as watch, called:
            self.copy(*args, **kwargs)
        found = matching.require(watch, self.unit.name, at, "new module")
        return matching.measure(found, call, mask, self.settings.distance)

    def error(self, calls: Sequence[tuple[Call, torch.Tensor | None]]) -> float:
        """Returns the relative error over some calls, as the unit is now."""
        far, size = 0.0, 0.0
        with torch.no_grad(), calling.chance_kept():
            calling.set_seed(self.settings.seed)
            for call, mask in calls:
                one, whole = self._compare(call, mask, train=False)
                far, size = far + float(one), size + float(whole)
        return far / max(size, 1e-30)

    def round_values(self, own: Mapping[str, torch.Tensor]) -> None:
        """Rounds what learned to the dtypes that the model has it in: errors are then those of the model."""
        with torch.no_grad():
            for key, tensor in self._list_movable().items():
                tensor.copy_(tensor.to(own[f"{self.unit.name}.{key}"].dtype))

    def _list_unsaved(self) -> dict[str, torch.Tensor]:
        saved = self.copy.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.copy.named_buffers() if name not in saved}

    def changed(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns what learning changed of the model's `own` values, by full names, in float32.

        They are those that it began with: no copy of these stands beside it while it learns.
        """
        moved = {f"{self.unit.name}.{key}": tensor.detach() for key, tensor in self._list_movable().items()}
        return {name: tensor for name, tensor in moved.items() if not torch.equal(tensor, own[name].to(tensor.dtype))}

    def _list_movable(self) -> dict[str, torch.Tensor]:
        """Returns what learning can change: parameters that learn, and saved buffers."""
        state = self.copy.state_dict(keep_vars=True)
        return {k: t for k, t in state.items() if t.requires_grad or not isinstance(t, nn.Parameter)}


def copy_module(module: nn.Module) -> nn.Module:
    """Copies a module in float32, but not the configuration that it shares with the whole model."""
    known: dict[int, Any] = {}
    for inner in module.modules():
        known |= {id(v): v for v in vars(inner).values() if isinstance(v, PreTrainedConfig)}
    for parameter in module.parameters():  # made wide at once: no copy in half precision beside it
        if parameter.is_floating_point():
            known[id(parameter)] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
    copied: nn.Module = deepcopy(module, known)
    return copied.float()


def _root(name: str, module: nn.Module) -> nn.Module:
    """Returns an empty tree that holds a module under its full name, so that patterns mean what they mean elsewhere."""
    for part in reversed(name.split(".")):
        holder = nn.Module()
        holder.add_module(part, module)
        module = holder
    return module


def _groups_within(rooted: nn.Module, declared: Sequence[ParameterGroup]) -> list[ParameterGroup]:
    """Returns the groups, each with those of its patterns that name something here."""
    trained = [name for name, parameter in rooted.named_parameters() if parameter.requires_grad]
    found = []
    for group in declared:
        patterns = [pattern for pattern in group.patterns if anatomy.match_within(pattern, trained)]
        if patterns:
            found.append(dataclasses.replace(group, parameters=tuple(patterns)))
    return found
