"""Several documents in one window, without a leak between them: packed by TRL, and the model tried before it trains.

Whether documents stay apart is up to the model: it must read `position_ids`, and keep nothing but what attention sees.
That is measured: a token of the first document is changed, and nothing of the second may move.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from trl import pack_dataset

from solidify.adapter import lookup
from solidify.errors import DataError
from solidify.model import anatomy
from solidify.system import foreign
from solidify.training.collating import Packed

_FIRST, _SECOND = 7, 9  # tokens of the two documents of the trial
_LIMITS = {torch.float32: 1e-4, torch.float64: 1e-8}  # how far outputs may differ, of the largest; else:
_HALF = 5e-2


def pack(examples: Any, max_length: int, *, seed: int | None) -> Any:
    """Puts whole examples into windows of `max_length` tokens (best fit first), shuffled before with a seed.

    `seq_lengths` lists where each ends. No token is lost: none is longer than a window.
    """
    shuffled = examples.shuffle(seed=seed) if seed is not None else examples
    kept = shuffled.select_columns(["input_ids", "labels"])
    return pack_dataset(kept, max_length, "bfd", {"load_from_cache_file": False})


def refuse_unpackable(model: nn.Module) -> None:
    """Raises DataError for a model that takes no positions, and so cannot know where a document begins."""
    plain = lookup.plain_model(model)
    if "position_ids" not in inspect.signature(plain.forward).parameters:
        raise DataError(
            f"packing: {type(plain).__name__} takes no position_ids, by which documents in one window are told apart; "
            "leave packing out"
        )


def refuse_leaking(model: nn.Module) -> None:
    """Raises DataError for a model in which one document of a packed window reaches another; runs it three times.

    Raises:
        DataError: the second document is not what it is by itself, or a change of the first one moves it.
    """
    refuse_unpackable(model)
    plain: Any = lookup.plain_model(model)
    vocabulary = plain.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (_FIRST, _SECOND))
    changed = [*first[:2], (first[2] + 1) % vocabulary, *first[3:]]
    with foreign.calling("packing: the model does not run on a packed window", DataError):
        together, moved, alone = (
            _run(model, documents) for documents in ([first, second], [changed, second], [second])
        )
    limit = _LIMITS.get(together.dtype, _HALF) * float(together.abs().max())
    leaked = float((together - moved)[_FIRST:].abs().max())
    differs = float((together[_FIRST:] - alone).abs().max())
    if not leaked <= limit or not differs <= limit:
        raise DataError(
            f"packing: in {type(plain).__name__} one document of a window reaches the next: when a token of the first "
            f"is changed, outputs of the second move by {leaked:.1e}, and they differ by {differs:.1e} from those of "
            "the second alone (it keeps a state that no mask ends, or does not read position_ids); leave packing out"
        )


def _run(model: nn.Module, documents: list[list[int]]) -> torch.Tensor:
    """Returns the logits (number of tokens, vocab_size) of documents in one row."""
    batch = Packed()([{"input_ids": each, "labels": each} for each in documents])
    device = next(model.parameters()).device
    inputs = {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in batch.items()}
    with torch.no_grad(), anatomy.evaluation(model):
        logits: torch.Tensor = model(**inputs).logits[0]
    return logits
