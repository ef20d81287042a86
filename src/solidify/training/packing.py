"""Several documents in one window, without a leak between them: packed by TRL, and the model tried before it trains.

Whether documents stay apart is up to the model: it must read `position_ids`, and keep nothing but what attention sees.
That is measured: a token of the first document is changed, and nothing of the second may move, as the model stands and
with noise in what is trained, since a branch whose gate starts at zero leaks nothing before its first step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from trl import pack_dataset

from solidify.adapter import lookup
from solidify.behaviour.values import noise, substitute_values
from solidify.errors import DataError
from solidify.model import anatomy
from solidify.system import foreign
from solidify.training.collating import Packed

_FIRST, _SECOND = 7, 9  # tokens of the two documents of the trial
_LIMITS = {torch.float32: 1e-4, torch.float64: 1e-8}  # how far outputs may differ, of the largest; else:
_HALF = 5e-2
_SCALES = (1.0, 0.1)  # of the noise in what is trained; the second where the first gives infinity

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def pack(examples: Any, max_length: int, *, seed: int | None) -> Any:
    """Puts whole examples into windows of `max_length` tokens (best fit first), shuffled before with a seed.

    `seq_lengths` lists where each ends. No token is lost: none is longer than a window.
    """
    shuffled = examples.shuffle(seed=seed) if seed is not None else examples
    kept = shuffled.select_columns(["input_ids", "labels"])
    return pack_dataset(kept, max_length, "bfd", {"load_from_cache_file": False})


def refuse_unpackable(model: nn.Module, way: str = "packing") -> None:
    """Raises DataError for a model that takes no positions, and so cannot know where a document begins.

    `way` is the field by which documents share a row.
    """
    plain = lookup.plain_model(model)
    if "position_ids" not in inspect.signature(plain.forward).parameters:
        raise DataError(
            f"{way}: {type(plain).__name__} takes no position_ids, by which documents in one window are told apart; "
            f"leave {way.rpartition('.')[2]} out"
        )


def refuse_leaking(model: nn.Module, collate: Collate | None = None, way: str = "packing") -> None:
    """Raises DataError for a model in which one document of a packed window reaches another.

    It is run as it stands, and with noise in its trainable parameters, whose values are put back. `collate` makes the
    batch of a training of examples with `input_ids` and `labels` (one row of them all, as `Packed` does);
    `way` names the field by which they
    share a row.

    Raises:
        DataError: the second document is not what it is by itself, or a change of the first one moves it.
    """
    refuse_unpackable(model, way)
    collate = collate or Packed()
    with foreign.calling(f"{way}: the model does not run on a packed window", DataError):
        found = _try_model(model, collate)
    _refuse_found(model, found, way, "")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    for scale in _SCALES if trained else ():
        values = {n: (p.detach() + scale * (noise(n, p) - p.detach())).to(p.dtype) for n, p in trained.items()}
        with substitute_values(model, values):
            tried = foreign.attempt(_try_model, model, collate).value
        if tried is not None and all(bool(torch.isfinite(each).all()) for each in tried):
            _refuse_found(model, tried, way, " once its trained parameters have moved")
            return


def _refuse_found(
    model: nn.Module, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor], way: str, when: str
) -> None:
    """Raises DataError where outputs of the second document differ; `when` says in which state of the model."""
    together, moved, alone = found
    limit = _LIMITS.get(together.dtype, _HALF) * float(together.abs().max())
    second = slice(_FIRST, _FIRST + _SECOND)
    leaked = float((together - moved)[second].abs().max())
    differs = float((together[second] - alone[:_SECOND]).abs().max())
    if not leaked <= limit or not differs <= limit:
        raise DataError(
            f"{way}: in {type(lookup.plain_model(model)).__name__} one document of a window reaches the next{when}: "
            f"when a token of the first is changed, outputs of the second move by {leaked:.1e}, and they differ by "
            f"{differs:.1e} from those of the second alone (it keeps a state that no mask ends, or does not read "
            f"position_ids); leave {way.rpartition('.')[2]} out"
        )


def _try_model(model: nn.Module, collate: Collate) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the logits of two documents in a row, of both with a token of the first changed, of the second."""
    vocabulary = _count_ids(model)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (_FIRST, _SECOND))
    changed = [*first[:2], (first[2] + 1) % vocabulary, *first[3:]]
    together, moved, alone = (
        _run(model, collate, documents) for documents in ([first, second], [changed, second], [second])
    )
    return together, moved, alone


def _count_ids(model: nn.Module) -> int:
    """Returns how many ids have an embedding, whatever PEFT has put around the module that holds them."""
    plain: Any = lookup.plain_model(model)
    held = lookup.unwrap(plain.get_input_embeddings())
    weight = getattr(held, "weight", None)
    counted = getattr(held, "num_embeddings", None)
    if isinstance(counted, int):
        return counted
    if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return int(weight.shape[0])
    return int(plain.config.get_text_config().vocab_size)


def _run(model: nn.Module, collate: Collate, documents: list[list[int]]) -> torch.Tensor:
    """Returns the logits (number of tokens, vocab_size) of documents in one row."""
    batch = collate([{"input_ids": each, "labels": each} for each in documents])
    device = next(model.parameters()).device
    inputs = {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in batch.items()}
    with torch.no_grad(), anatomy.evaluation(model):
        logits: torch.Tensor = model(**inputs).logits[0]
    return logits
