"""How far a changed model is from its base, in figures: divergence, loss, and what its new branches add to that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from solidify.behaviour import calling
from solidify.errors import HealingError
from solidify.healing.matching import attended
from solidify.healing.sources import Batch
from solidify.losses.distillation import ForwardKL
from solidify.losses.prediction import targets
from solidify.model import anatomy
from solidify.system import processes
from solidify.weights import mapped

_IGNORED = -100  # a label that asks for nothing


@dataclass(frozen=True)
class Distance:
    """How far a model is from its base over `tokens` target tokens, in nats a token: `kl` is the mean of
    `KL(base ‖ model)`, `loss` the model's cross entropy on the text itself, `base_loss` the base's."""

    kl: float
    loss: float
    base_loss: float
    tokens: int

    def recovered(self, before: Distance) -> float:
        """Returns which share of an earlier divergence is gone: `(KL0 - KL) / KL0`."""
        return (before.kl - self.kl) / before.kl if before.kl > 0 else 0.0


def distance(model: PreTrainedModel, base: PreTrainedModel, batches: Sequence[Batch]) -> Distance:
    """Measures a model against its base, a row at a time, in evaluation mode.

    Raises:
        HealingError: the batches have no target token, or the two models speak different vocabularies.
    """
    return next(iter(distances({"": model}, base, batches).values()))


def distances(
    models: Mapping[str, PreTrainedModel], base: PreTrainedModel, batches: Sequence[Batch]
) -> dict[str, Distance]:
    """Measures several models against one base, which runs once a row."""
    if getattr(base.config, "is_encoder_decoder", False):
        raise HealingError("a model with an encoder and a decoder is not measured here yet: which tokens count differs")
    sums = {name: [0.0, 0.0] for name in models}
    base_loss, tokens = 0.0, 0
    for row in _list_rows(batches):
        labels = make_labels(row)
        theirs = _run(base, row)
        count = int(targets(labels, labels.shape[1]).sum())
        base_loss, tokens = base_loss + _sum_loss(theirs, labels), tokens + count
        for name, model in models.items():
            ours = _run(model, row)
            if ours.shape != theirs.shape:
                raise HealingError(
                    f"the model's logits are {list(ours.shape)} and the base's {list(theirs.shape)}; the two "
                    "cannot be compared"
                )
            sums[name][0] += float(ForwardKL()(ours, theirs, labels))
            sums[name][1] += _sum_loss(ours, labels)
    if not tokens:
        raise HealingError("the batches have no token that follows another, so nothing can be measured on them")
    return {n: Distance(kl / tokens, loss / tokens, base_loss / tokens, tokens) for n, (kl, loss) in sums.items()}


def _run(model: PreTrainedModel, row: Batch) -> torch.Tensor:
    """Returns a model's logits. Of a mapped model that is as large as the free memory, each module is let go once it
    has run; of any other, its pages are read once and stay."""
    arguments = {**row, "use_cache": False} if "use_cache" in calling.takes(model) else dict(row)
    tight = 2 * anatomy.size(model) > processes.free_memory()
    released = mapped.released(model) if tight else nullcontext()
    with torch.no_grad(), anatomy.forgetting(model), anatomy.evaluation(model), released:
        logits: torch.Tensor = model(**arguments).logits
    return logits


def _list_rows(batches: Sequence[Batch]) -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches:
        for number in range(len(batch["input_ids"])):
            yield {key: tensor[number : number + 1] for key, tensor in batch.items() if key != "labels"}


def make_labels(batch: Batch) -> torch.Tensor:
    """Returns what a batch's tokens are to predict (batch_size, sequence_length): themselves, where attended."""
    mask = attended(batch)
    return batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, _IGNORED)


def _sum_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    where = targets(labels, logits.shape[1])
    return float(F.cross_entropy(logits[:, :-1][where].float(), labels[:, 1:][where], reduction="sum"))


def ablating(model: nn.Module) -> list[str]:
    """Names the modules whose new branch can be switched off: those with an attribute `ablate`."""
    return [name for name, module in model.named_modules() if isinstance(getattr(module, "ablate", None), bool)]


@contextmanager
def ablated(model: nn.Module) -> Iterator[None]:
    """While the block lasts, every new branch gives nothing. A hybrid that bypasses its new branch does as well so."""
    modules: list[Any] = [model.get_submodule(name) for name in ablating(model)]
    before = [module.ablate for module in modules]
    for module in modules:
        module.ablate = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.ablate = value
