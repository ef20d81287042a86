"""Parameter groups: parts of what is trained, by name, with a learning rate or optimizer settings of their own.

A pattern names parameters or modules as the plain model calls them, whatever PEFT has put around: a low-rank part is
found by its target's name. What no group names stays in the groups that transformers makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from solidify.adapter import lookup
from solidify.errors import ObjectiveError, refuse
from solidify.model import anatomy
from solidify.system import foreign
from solidify.training import data

_OWN_WAY = ("lomo", "layerwise")  # transformers' optimizers that step inside the backward pass and know no groups
_DOORS = {"lr": "learning_rate", "weight_decay": "weight_decay", "params": "parameters"}


@dataclass(frozen=True)
class ParameterGroup:
    """What `parameters` (names or patterns of parameters or modules) names is trained with settings of its own.

    `learning_rate` is what the schedule scales, `weight_decay` holds for everything that the group names (also for
    biases and norms, which transformers by itself never decays), `optimizer` holds the optimizer's own settings, as
    `betas`. What is None or left out is as for the rest.
    """

    parameters: str | Sequence[str]
    learning_rate: float | None = None
    weight_decay: float | None = None
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patterns(self) -> list[str]:
        """The patterns as a list."""
        return [self.parameters] if isinstance(self.parameters, str) else list(self.parameters)

    @property
    def label(self) -> str:
        """What the group is called in messages and logs."""
        return ", ".join(self.patterns)

    @property
    def settings(self) -> dict[str, Any]:
        """What is set, by the names that torch's optimizers have for it."""
        own = {key: tuple(value) if isinstance(value, list) else value for key, value in self.optimizer.items()}
        named = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        return {**own, **{key: value for key, value in named.items() if value is not None}}


def declared(groups: Sequence[ParameterGroup | Mapping[str, Any]]) -> list[ParameterGroup]:
    """Returns groups that may be written as plain mappings as `ParameterGroup`s.

    Raises:
        ObjectiveError: a key is unknown or missing, a group sets nothing, or sets one thing by two names.
    """
    field_names = [f.name for f in fields(ParameterGroup)]
    made: list[ParameterGroup] = []
    faults: list[str] = []
    for number, group in enumerate(groups):
        if isinstance(group, Mapping):
            unknown = [key for key in group if key not in field_names]
            faults += [f"group {number}: {key!r} is unknown; known here: {', '.join(field_names)}" for key in unknown]
            if "parameters" not in group:
                faults.append(f"group {number}: `parameters` must name the parameters of the group")
            if unknown or "parameters" not in group:
                continue
            group = ParameterGroup(**group)
        faults += [f"{group.label}: {key!r} is written {_DOORS[key]}" for key in group.optimizer if key in _DOORS]
        if not group.settings:
            faults.append(f"{group.label}: nothing is set; give learning_rate, weight_decay or optimizer")
        made.append(group)
    refuse(ObjectiveError, "the parameter groups do not fit", faults)
    return made


def resolve(model: nn.Module, groups: Sequence[ParameterGroup]) -> list[dict[str, list[nn.Parameter]]]:
    """Returns for every group what it names of what is trained: plain names (a low-rank target's has several parts).

    Raises:
        ObjectiveError: a pattern names nothing that is trained, or two groups name the same parameter.
    """
    trained = _list_trained(model)
    ends = {".".join(parts[: n + 1]) for parts in (name.split(".") for name in trained) for n in range(len(parts))}
    faults: list[str] = []
    found: list[dict[str, list[nn.Parameter]]] = []
    owner: dict[str, str] = {}
    for group in groups:
        hits: set[str] = set()
        for pattern, matched in anatomy.match(group.patterns, sorted(ends)).items():
            names = {name for name in trained if any(name == m or name.startswith(m + ".") for m in matched)}
            if not names:
                faults.append(f"{pattern!r} names nothing that is trained; {_suggest_instead(pattern, model, trained)}")
            hits |= names
        twice = sorted(name for name in hits if name in owner)
        if twice:
            more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
            faults.append(f"{group.label!r} and {owner[twice[0]]!r} both name {', '.join(twice[:3])}{more}")
        owner |= dict.fromkeys(hits, group.label)
        found.append({name: parts for name, parts in trained.items() if name in hits})
    refuse(ObjectiveError, "the parameter groups do not fit what is trained", faults)
    return found


def _list_trained(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    wrapped = lookup.peft_model(model)
    named = (
        [(name, parameter) for _, name, parameter in lookup.named_parameters(wrapped)]
        if wrapped is not None
        else list(lookup.plain_model(model).named_parameters())
    )
    trained: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            trained.setdefault(name, []).append(parameter)
    return trained


def _suggest_instead(pattern: str, model: nn.Module, trained: Mapping[str, Any]) -> str:
    everything = {located.name for located in lookup.modules(model)} | {
        name for name, _ in lookup.plain_model(model).named_parameters()
    }
    if any(anatomy.match(pattern, everything).values()):
        return f"what it names is frozen; trained are: {', '.join(anatomy.fold(trained)[:6])}"
    return f"trained are: {', '.join(anatomy.fold(trained)[:6])}"


def split(optimizer: torch.optim.Optimizer, model: nn.Module, groups: Sequence[ParameterGroup]) -> list[str | None]:
    """Moves, in place, what groups name out of a fresh optimizer's groups into new ones; returns each one's label.

    A new group starts from the settings that its parameters had, so that transformers' choice of what decays stays
    unless the group says otherwise. The label of a group that transformers made is None.

    Raises:
        ObjectiveError: a name is wrong (as `resolve`), or a setting is one that the optimizer does not know or refuses.
    """
    wanted = resolve(model, groups)
    faults: list[str] = []
    for group in groups:
        faults += _find_unknown(optimizer, group) or _find_refused(optimizer, group)
    refuse(ObjectiveError, f"{type(optimizer).__name__} does not take the parameter groups", faults)
    before = list(optimizer.param_groups)
    labels: list[str | None] = [None] * len(before)
    for group, names in zip(groups, wanted, strict=True):
        moving = {id(parameter) for parts in names.values() for parameter in parts}
        for source in before:
            parameters = [p for p in source["params"] if id(p) in moving]
            if parameters:
                source["params"] = [p for p in source["params"] if id(p) not in moving]
                options = {key: value for key, value in source.items() if key != "params"}
                optimizer.add_param_group({**options, **group.settings, "params": parameters})
                labels.append(group.label)
    return labels


def _find_unknown(optimizer: torch.optim.Optimizer, group: ParameterGroup) -> list[str]:
    """A key that is not among the optimizer's defaults would stand in the group, and nothing would read it."""
    settings = list(optimizer.defaults)
    return [
        f"{group.label}: it has no setting {key!r}; it has: {', '.join(settings)}"
        for key in group.settings
        if key not in settings
    ]


def _find_refused(optimizer: torch.optim.Optimizer, group: ParameterGroup) -> list[str]:
    """Has the optimizer's constructor judge the values: it alone looks at them, `add_param_group` does not."""
    takes = inspect.signature(type(optimizer)).parameters
    values = {**optimizer.defaults, **group.settings}
    given = {key: value for key, value in values.items() if key in takes}
    error = foreign.attempt(type(optimizer), [nn.Parameter(torch.zeros(2, 2))], **given).error
    return [f"{group.label}: {foreign.said(error)}"] if error is not None else []


def uncovered(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Returns in words what is trained but in no group of the optimizer, or in more than one."""
    times: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            times[id(parameter)] = times.get(id(parameter), 0) + 1
    return [
        f"{name} is trained, but in {times.get(id(part), 0) or 'none'} of the optimizer's groups"
        for name, parts in _list_trained(model).items()
        for part in parts
        if times.get(id(part), 0) != 1
    ]


class Groups(TrainerCallback):  # type: ignore[misc]
    """The parameter groups of one trainer, which go into whatever optimizer transformers makes for it.

    The schedule scales each group from its own learning rate. `rates` holds those that the last step had, by what logs
    call them.

    Raises:
        ObjectiveError: the groups do not fit what is trained or the optimizer, the optimizer knows no groups or was
            made elsewhere, or it lacks something that is trained.
    """

    def __init__(self, trainer: Any, groups: Sequence[ParameterGroup | Mapping[str, Any]]) -> None:
        self.declared = declared(groups)
        self.rates: dict[str, float] = {}
        self._labels: list[str | None] = []
        self._steps_itself = any(word in trainer.args.optim for word in _OWN_WAY)
        resolve(trainer.model, self.declared)
        if self.declared and trainer.optimizer is not None:
            raise ObjectiveError(
                "an optimizer was given, which has groups of its own; leave out the optimizer, or parameter_groups"
            )
        if self.declared and self._steps_itself:
            raise ObjectiveError(
                f"optim={trainer.args.optim!s} steps inside the backward pass and knows no parameter groups"
            )

    def split(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Splits the groups of an optimizer that was just made."""
        if self.declared:
            self._labels = split(optimizer, model, self.declared)

    def refuse_uncovered(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Raises ObjectiveError for an optimizer that does not hold all that is trained."""
        if not self._steps_itself:
            refuse(ObjectiveError, "the optimizer does not hold what is trained", data.few(uncovered(optimizer, model)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses to train without the groups: what DeepSpeed's configuration names is made without the trainer."""
        if self.declared and not self._labels:
            raise ObjectiveError(
                "the optimizer was not made by the trainer, so the parameter groups would be ignored; leave "
                "`optimizer` out of DeepSpeed's configuration"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the learning rates that the step will have; when it is logged, the schedule has gone on."""
        if self._labels:
            pairs = zip(self._labels, kwargs["optimizer"].param_groups, strict=True)
            self.rates = {f"learning_rate/{label}": float(group["lr"]) for label, group in pairs if label is not None}
