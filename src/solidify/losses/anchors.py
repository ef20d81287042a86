"""Loss terms that hold parameters near the values they had before training.

Where the values before training come from: of a parameter that PEFT or Solidify trains as a copy, its frozen original;
of a LoRA update they are zero, the update itself is the distance; of a parameter trained in place, a copy that is taken
when the term is first called and kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from solidify.adapter import lookup
from solidify.errors import ObjectiveError, refuse
from solidify.losses.precision import wide
from solidify.losses.prediction import targets
from solidify.losses.selection import Patterns, chosen, named
from solidify.model import anatomy
from solidify.system import foreign


@dataclass(frozen=True)
class Update:
    """A LoRA update `s B A` of the parameter called `name`, one for each expert where the parameter is a stack.

    `a` is (experts, r, in), `b` (experts, out, r), both float32.
    """

    name: str
    layer: Any
    adapter: str
    a: torch.Tensor
    b: torch.Tensor

    def squared_norm(self) -> torch.Tensor:
        """Returns `‖s B A‖²_F = s² tr((BᵀB)(A Aᵀ))`, without ever building the update."""
        product: torch.Tensor = ((self.b.mT @ self.b) * (self.a @ self.a.mT)).sum()
        return float(self.layer.scaling[self.adapter]) ** 2 * product

    def dense(self) -> torch.Tensor:
        """Returns the update in the parameter's own shape."""
        delta: torch.Tensor = self.layer.get_delta_weight(self.adapter)
        return wide(delta)


class _Anchored:
    """What both terms share: the values of before, and the differences from them."""

    reduction = "constant"
    _term = ""

    def __init__(self, parameters: Patterns) -> None:
        self.parameters = parameters
        self.before: dict[str, torch.Tensor] = {}

    def _yield_differences(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor | Update]]:
        """Yields every trained parameter's name and its difference from before, or its LoRA update."""
        found = [each for each in chosen(self._term, model, self.parameters) if each.parameter.requires_grad]
        if not found:
            raise ObjectiveError(f"{self._term}: none of the parameters is trained, so none can move")
        originals = {each.name: each.parameter for each in named(model) if each.kind == "base"}
        lora = {each.name for each in found if each.kind == "lora"}
        if lora:
            for update in _find_updates(self._term, model):
                if {update.name, update.name.rpartition(".")[0]} & lora:
                    yield update.name, update
        for each in found:
            if each.kind == "full":
                original = originals[each.name].detach()
            elif each.kind == "base":
                original = self.before.setdefault(each.name, each.parameter.detach().clone())
            else:
                continue
            yield each.name, wide(each.parameter) - wide(original.to(each.parameter.device))


class L2SP(_Anchored):
    """`½ Σ‖θ - θ⁰‖²`: weight decay towards the values before training (L2-SP, arXiv 1802.01483, eq. 2).

    Over the parameters that `parameters` names (default: all that are trained). A LoRA update counts as `½‖s B A‖²_F`,
    computed from its factors. New parameters, whose start means nothing, are better served by `weight_penalty`.
    """

    _term = "l2_sp"

    def __init__(self, parameters: Patterns = None) -> None:
        super().__init__(parameters)

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar in float32."""
        terms = [
            (d.squared_norm() if isinstance(d, Update) else d.square().sum()) for _, d in self._yield_differences(model)
        ]
        return torch.stack(terms).sum() / 2


class EWC(_Anchored):
    """`½ Σ_i F_i (θ_i - θ⁰_i)²`: elastic weight consolidation (arXiv 1612.00796, eq. 3).

    `fisher` is a safetensors file: the Fisher diagonal by parameter name, as `fisher_diagonal` estimates it. Trained
    parameters that it does not name are free; what it names and is not trained stays where it is. A LoRA update is
    built in full for the parameters it names, one at a time.
    """

    _term = "ewc"

    def __init__(self, fisher: str | Path, parameters: Patterns = None) -> None:
        super().__init__(parameters)
        self.fisher = str(fisher)
        self._held = _Held()

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar in float32.

        Raises:
            ObjectiveError: the file names none of the trained parameters, or one that the model does not have, or a
                Fisher has another shape than its parameter.
        """
        weights = self._held.read(self.fisher, model)
        terms = []
        for name, difference in self._yield_differences(model):
            if name not in weights:
                continue
            moved = difference.dense() if isinstance(difference, Update) else difference
            weight = weights[name].to(moved.device)
            if weight.shape != moved.shape:
                raise ObjectiveError(
                    f"ewc: {name} has shape {list(moved.shape)}, and {list(weight.shape)} in the Fisher of "
                    f"{self.fisher}"
                )
            terms.append((weight * moved.square()).sum())
        if not terms:
            raise ObjectiveError(f"ewc: {self.fisher} names none of the parameters that are trained")
        return torch.stack(terms).sum() / 2


class _Held:
    """The Fisher in memory, read once; no part of a checkpoint, for the file has it."""

    def __init__(self) -> None:
        self._values: dict[str, torch.Tensor] | None = None

    def read(self, path: str, model: nn.Module) -> Mapping[str, torch.Tensor]:
        """Returns the Fisher by name; refuses one that is not this model's."""
        if self._values is None:
            devices = {each.name: each.parameter.device for each in named(model)}
            with foreign.calling(f"ewc: {path} cannot be read as safetensors", ObjectiveError):
                found = load_file(path)
            self._values = {n: tensor.float().to(devices.get(n, "cpu")) for n, tensor in found.items()}
            unknown = sorted(set(self._values) - set(devices))
            refuse(ObjectiveError, f"ewc: {path} belongs to another model; this one has no parameter", unknown[:8])
        return self._values


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    parameters: Patterns = None,
    *,
    labels: str = "sampled",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Returns the diagonal of the Fisher information by parameter name, in float32.

    The mean over sequences of the squared gradient of each sequence's own log-likelihood (a sum over its target
    tokens). Never the square of a batch's mean gradient, which is too small by about the batch size (arXiv 2502.11756).

    Args:
        model: in evaluation mode while it runs; afterwards as it was.
        batches: with `labels`, -100 where nothing is predicted; every row is one sample.
        parameters: patterns on names of the plain model; default: all.
        labels: `sampled` draws targets from the model itself (the Fisher), `data` takes the batch's (the empirical
            Fisher, which is something else away from the optimum).
        seed: of the drawing.

    Raises:
        ObjectiveError: `labels` is neither, there is no row with a target, or a pattern names nothing.
    """
    if labels not in ("sampled", "data"):
        raise ObjectiveError(f"fisher_diagonal: labels must be 'sampled' or 'data', but are {labels!r}")
    patterns = parameters if parameters is not None else "**"
    subjects = {each.name: each.parameter for each in chosen("fisher_diagonal", model, patterns) if each.kind != "lora"}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in subjects.items()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    count = 0
    try:
        for p, _ in before:
            p.requires_grad_(any(p is subject for subject in subjects.values()))
        generator = torch.Generator().manual_seed(seed)
        with anatomy.evaluation(model):
            for batch in batches:
                for row in range(len(batch["labels"])):
                    sample = {key: tensor[row : row + 1] for key, tensor in batch.items()}
                    likelihood = _log_likelihood(model, sample, generator if labels == "sampled" else None)
                    if likelihood is None:
                        continue
                    count += 1
                    gradients = torch.autograd.grad(likelihood, list(subjects.values()), allow_unused=True)
                    for sum_, gradient in zip(total.values(), gradients, strict=True):
                        if gradient is not None:
                            sum_ += wide(gradient).square()
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
    if not count:
        raise ObjectiveError("fisher_diagonal: no row of the batches has a target token")
    return {name: sum_ / count for name, sum_ in total.items()}


def _log_likelihood(
    model: nn.Module, sample: Mapping[str, torch.Tensor], generator: torch.Generator | None
) -> torch.Tensor | None:
    given = sample["labels"]
    logits = model(**{key: tensor for key, tensor in sample.items() if key != "labels"}).logits
    where = targets(given, logits.shape[1])
    if not bool(where.any()):
        return None
    log_p = F.log_softmax(wide(logits[:, :-1][where]), dim=-1)
    wanted = given[:, 1:][where]
    if generator is not None:
        wanted = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)[:, 0].to(wanted.device)
    result: torch.Tensor = log_p.gather(-1, wanted[:, None]).sum()
    return result


def _find_updates(term: str, model: nn.Module) -> Iterator[Update]:
    """Yields the LoRA updates that run now.

    Raises:
        ObjectiveError: an update is not `s B A` (DoRA, embeddings, convolutions), or two adapters run on one module.
    """
    faults = []
    updates = []
    for located in lookup.modules(model):
        layer: Any = located.called
        while isinstance(layer, BaseTunerLayer):
            running = [a for a in layer.active_adapters if a in layer.lora_A] if isinstance(layer, LoraLayer) else []
            plain = isinstance(layer, LoraLayer) and not layer.lora_variant and not len(layer.lora_embedding_A)
            if not plain or len(running) > 1 or any(layer.lora_A[a].weight.ndim != 2 for a in running):
                faults.append(f"{located.name} has {type(layer).__name__}")
            elif running and not layer.disable_adapters:
                updates.append(_build_update(located.name, layer, running[0]))
            layer = layer.base_layer
    refuse(ObjectiveError, f"{term} supports one LoRA on linear layers or on experts, and nothing else", faults)
    yield from updates


def _build_update(name: str, layer: Any, adapter: str) -> Update:
    a, b = wide(layer.lora_A[adapter].weight), wide(layer.lora_B[adapter].weight)
    experts = int(vars(layer).get("num_experts", 1))
    # PEFT 0.21 stacks experts with the rank within A's rows and the expert within B's columns (ParamWrapper).
    stacked = b.reshape(len(b), -1, experts).permute(2, 0, 1)
    parameter = vars(layer).get("parameter_name", "weight")
    return Update(f"{name}.{parameter}", layer, adapter, a.reshape(experts, -1, a.shape[-1]), stacked)
