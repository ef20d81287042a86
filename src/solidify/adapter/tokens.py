"""Rows of embeddings that are trained alone: PEFT's `trainable_token_indices`, with ids by name and the head beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import lookup, tied
from solidify.artifact import vocabulary
from solidify.model import anatomy
from solidify.system import foreign

FIELD = "trainable_token_indices"
NEW = "new"
_WORDS = f"LoRA: {FIELD}"


def resolve(
    model: nn.Module, lora: Mapping[str, Any] | None, named: Mapping[str, nn.Module], faults: list[str]
) -> dict[str, tuple[int, ...]]:
    """Returns which rows of which modules are trained; what is wrong with the declaration goes into `faults`.

    `new` stands for all tokens that surgery has added, a text for one of these. Without module names, rows of the input
    embeddings are meant, and those of a head of its own.
    """
    asked = lora.get(FIELD) if isinstance(lora, Mapping) else None
    if asked is None or (isinstance(asked, (Sequence, Mapping)) and not asked):
        return {}
    table, head = _name_embeddings(model, named)
    if table is None:
        faults.append(f"{_WORDS}: the model has no embeddings of tokens")
        return {}
    groups = tied.groups(model)
    together = next((group for group in groups if table in group), [table])
    if isinstance(asked, Mapping):
        wanted = _match_names(asked, named, faults)
    else:
        wanted = {table: asked, **({head: asked} if head is not None and head not in together else {})}
    for name in wanted:
        _judge_module(name, named[name], together, table, faults)
    if table in wanted:
        for other in together:
            _judge_bias(other, named, faults)
    return {name: _read_ids(model, name, named[name], ids, faults) for name, ids in wanted.items()}


def with_ids(lora: Mapping[str, Any] | None, added: Mapping[str, int]) -> Mapping[str, Any] | None:
    """Returns a declaration in which added tokens stand as ids: for a model that is not an artifact yet."""
    asked = None if lora is None else lora.get(FIELD)
    if lora is None or asked is None or not added:
        return lora
    named = isinstance(asked, Mapping)
    values = {
        name: sorted(added.values())
        if ids == NEW
        else [added.get(each, each) if isinstance(each, str) else each for each in ids]
        if isinstance(ids, list)
        else ids
        for name, ids in (asked if named else {"": asked}).items()
    }
    return {**lora, FIELD: values if named else values[""]}


def _name_embeddings(model: nn.Module, named: Mapping[str, nn.Module]) -> tuple[str | None, str | None]:
    """Returns the names of the input embeddings and of the head, None for what the model does not have."""
    plain = lookup.plain_model(model)
    if not isinstance(plain, PreTrainedModel):
        return None, None
    found = []
    for ask in (plain.get_input_embeddings, plain.get_output_embeddings):
        module = foreign.attempt(ask).value
        inner = lookup.unwrap(module) if isinstance(module, nn.Module) else None
        found.append(next((name for name, other in named.items() if other is inner and inner is not None), None))
    return found[0], found[1]


def _match_names(asked: Mapping[str, Any], named: Mapping[str, nn.Module], faults: list[str]) -> dict[str, Any]:
    hits = anatomy.match(list(map(str, asked)), named)
    faults += [
        f"{_WORDS}: {pattern!r} hits nothing; {anatomy.suggestions(pattern, named)}"
        for pattern, found in hits.items()
        if not found
    ]
    return {name: asked[pattern] for pattern, found in hits.items() for name in found}


def _judge_module(name: str, module: nn.Module, together: Sequence[str], table: str, faults: list[str]) -> None:
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        faults.append(f"{_WORDS}: {name} is a {type(module).__name__}, which has no rows of tokens")
    elif name != table and name in together:
        faults.append(f"{_WORDS}: {name} is tied to {table} (one weight); name only {table}, and both are trained")
    elif name not in together:
        _judge_bias(name, {name: module}, faults)


def _judge_bias(name: str, named: Mapping[str, nn.Module], faults: list[str]) -> None:
    if getattr(named.get(name), "bias", None) is not None:
        faults.append(
            f"{_WORDS}: {name} has a bias, which PEFT's layer of trained rows leaves out; train the embedding in full "
            "(`train`)"
        )


def _read_ids(model: nn.Module, name: str, module: nn.Module, asked: Any, faults: list[str]) -> tuple[int, ...]:
    """Returns ids of a declaration: of `new`, numbers, or texts of added tokens."""
    plain = lookup.plain_model(model)
    surgery = (vars(plain.config).get("surgery") if isinstance(plain, PreTrainedModel) else None) or []
    added = vocabulary.added_tokens(surgery)
    if asked == NEW:
        if not added:
            faults.append(
                f"{_WORDS}: 'new' stands for tokens that surgery has added (`add_tokens`), and there are none"
            )
        return tuple(sorted(added.values()))
    weight = getattr(module, "weight", None)
    rows = len(weight) if isinstance(weight, torch.Tensor) else 0
    if isinstance(asked, (str, Mapping)) or not isinstance(asked, Sequence):
        faults.append(f"{_WORDS}: give 'new', or a list of ids or of added tokens, not {asked!r}")
        return ()
    found = []
    for each in asked:
        number = added.get(each) if isinstance(each, str) else each
        if type(number) is not int or not 0 <= number < rows:
            known = f"; added are {', '.join(list(added)[:6])}" if added else ""
            faults.append(f"{_WORDS}: {each!r} is no id of {name}, which has {rows} rows, nor an added token{known}")
        elif number in found:
            faults.append(f"{_WORDS}: {each!r} is listed twice")
        else:
            found.append(number)
    return tuple(found)


def faults(model: PeftModel, wanted: Mapping[str, tuple[int, ...]], adapter: str) -> list[str]:
    """Returns where rows that are tied to trained ones do not follow: PEFT goes by the configuration alone."""
    found = []
    for group in tied.groups(model):
        for name in wanted:
            own = lookup.at(model, name)
            for other in group if name in group and own is not None else ():
                located = lookup.at(model, other)
                trained = [_rows_of(each.called, adapter) for each in (own, located) if each is not None]
                if len(trained) < 2 or trained[0] is None or trained[0] is not trained[1]:
                    found.append(
                        f"{_WORDS}: {other} is tied to {name} (one weight), and PEFT would train only one of them"
                    )
    return list(dict.fromkeys(found))


def _rows_of(called: nn.Module, adapter: str) -> nn.Parameter | None:
    if not isinstance(called, TrainableTokensWrapper):
        return None
    held: dict[str, nn.Parameter] = dict(called.token_adapter.trainable_tokens_delta.named_parameters())
    return held.get(adapter)


def trained(model: PeftModel, adapter: str) -> dict[str, list[int]]:
    """Returns the ids that an adapter trains, by the names of the modules that hold their rows; a tied one once."""
    return {
        lookup.canonical(model, path): [int(number) for number in layer.token_indices[adapter]]
        for path, layer in layers(model)
        if layer.tied_adapter is None and adapter in layer.token_indices
    }


def layers(model: nn.Module) -> list[tuple[str, TrainableTokensLayer]]:
    """Returns PEFT's layers of trained rows, with their paths; those of tied modules too."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, TrainableTokensLayer)]
