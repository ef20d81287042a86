"""The window of one optimizer step: all its micro-batches, on all ranks, counted before the first backward pass.

Derivation of the contract. Let micro-batch b hold n_b target tokens, and let L be the term over the whole window.

- A sum over tokens, L = (1/N) Σ_b S_b with N = Σ_b n_b: micro-batch b contributes S_b / N.
- A mean over tokens (sequences), M_b: it contributes M_b n_b / N.
- A function of means, L = F(m) with m = (1/N) Σ_b s_b: the gradient is Σ_b F'(m) ∂s_b / N, so micro-batch b contributes
  the gradient of F(m + (s_b - stop(s_b)) / N), which needs m, but no other micro-batch's graph.
- What depends on no data contributes 1/G in each of G micro-batches.

Data-parallel training averages gradients over R ranks, so every share is taken R times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from solidify.errors import ObjectiveError

Batch = TypeVar("Batch")

# What the decoder of an encoder-decoder reads, or is read from, position by position.
DECODED = ("labels", "decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")

# Where a batch's rows and tokens are counted, in this order.
_INPUTS = ("input_ids", "inputs_embeds", "input_values", "input_features", "pixel_values")


@dataclass(frozen=True)
class Counts:
    """What one micro-batch holds. `sequences` counts pairs where the rows of a batch are pairs.

    `decoder_tokens` are those that the decoder of an encoder-decoder attends to.
    """

    target_tokens: float
    attended_tokens: float
    sequences: float
    decoder_tokens: float = 0.0


@dataclass(frozen=True)
class Window:
    """The same counts over one optimizer step: all micro-batches, all ranks. `means` holds statistics by term name."""

    micro_batches: int
    target_tokens: float
    attended_tokens: float
    sequences: float
    ranks: int = 1
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    decoder_tokens: float = 0.0


def count(batch: Mapping[str, Any], *, shifts: bool) -> Counts:
    """Counts a micro-batch: labels other than -100 (all but the first where they are shifted), attended tokens, rows.
    Where nothing but images goes in, each is one.

    Raises:
        ObjectiveError: it holds no inputs that could be counted.
    """
    labels = batch.get("labels")
    name = next((key for key in _INPUTS if batch.get(key) is not None), "labels")
    main = batch.get(name)
    if main is None:
        raise ObjectiveError(f"the batch holds no inputs that could be counted, only: {', '.join(batch)}")
    targets = labels[..., 1:] if labels is not None and labels.ndim > 1 and shifts else labels
    mask = batch.get("attention_mask")
    tokens = main.shape[0] * (main.shape[1] if main.ndim > 1 and name != "pixel_values" else 1)
    return Counts(
        float((targets != -100).sum()) if targets is not None else float(tokens),
        float(mask.sum()) if mask is not None and mask.ndim == 2 else float(tokens),
        float(main.shape[0]),
        float(decoded.sum()) if (decoded := decoder_mask(batch)) is not None else 0.0,
    )


def decoder_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns which positions of an encoder-decoder's decoder count (batch_size, target_length), boolean.

    Those of `decoder_attention_mask`, else those that have a label, else all that it reads; None where nothing says.
    """
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if mask is not None and mask.ndim == 2:
        return torch.as_tensor(mask).bool()
    if labels is not None and labels.ndim == 2:
        return torch.as_tensor(labels != -100)
    read = next((batch[key] for key in DECODED[1:3] if batch.get(key) is not None), None)
    return torch.ones(read.shape[:2], dtype=torch.bool, device=read.device) if read is not None else None


def measure(counts: Sequence[Counts], device: torch.device) -> Window:
    """Adds up the counts of a window's micro-batches, over all ranks."""
    local = torch.tensor(
        [[c.target_tokens, c.attended_tokens, c.sequences, c.decoder_tokens] for c in counts],
        dtype=torch.float64 if device.type != "mps" else torch.float32,
        device=device,
    ).sum(0)
    target, attended, sequences, decoded = over_ranks(local).tolist()
    return Window(len(counts), target, attended, sequences, ranks(), decoder_tokens=decoded)


def of_one(counts: Counts) -> Window:
    """Returns the window that is one micro-batch."""
    return Window(
        1, counts.target_tokens, counts.attended_tokens, counts.sequences, decoder_tokens=counts.decoder_tokens
    )


def ranks() -> int:
    """Returns over how many processes gradients are averaged."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a tensor over all processes."""
    if ranks() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def windows(loader: Iterable[Batch], micro_batches: int) -> Iterator[list[Batch]]:
    """Yields the micro-batches of a loader in lists, one list per optimizer step; the last one may be shorter."""
    iterator = iter(loader)
    while window := list(islice(iterator, micro_batches)):
        yield window
