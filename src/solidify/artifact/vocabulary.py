"""Does a tokenizer fit a model: has every id an embedding, and does the model stop where the tokenizer ends?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from solidify.errors import ArtifactError, SolidifyError
from solidify.findings import Finding
from solidify.surgery.vocabulary import AddTokens
from solidify.system import foreign

FITS, ENDS = "tokenizer: every id has an embedding", "tokenizer: the model stops at its end token"
ADDED, SPECIAL = "tokenizer: added tokens have their ids", "special ids of the configurations have an embedding"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SHOWN = 4
_ROLES = frozenset(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)  # what every tokenizer has: bos, eos, pad, ...


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer that a processor holds, or that it is; None where there is none."""
    found = processor if isinstance(processor, PreTrainedTokenizerBase) else getattr(processor, "tokenizer", None)
    return found if isinstance(found, PreTrainedTokenizerBase) else None


def refuse_unfit(
    model: PreTrainedModel,
    processor: Any,
    kind: type[SolidifyError] = ArtifactError,
    edits: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Raises `kind` when text can become an id for which the model has no embedding; it may be on the meta device.

    So it does when the tokenizer lacks a token that one of the `edits` (their records) added.
    """
    for finding in findings(model, processor, edits):
        if finding.passed is False:
            raise kind(f"the tokenizer does not fit the model: {finding.evidence}")


def added_tokens(edits: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the tokens that were added to a model by its edits (their records, or entries of config.surgery)."""
    return {
        token: int(number)
        for edit in edits
        for token, number in {**edit, **edit.get("settings", {})}.get("tokens", {}).items()
        if edit["operation"] == AddTokens.recorded
    }


def findings(model: PreTrainedModel, processor: Any, edits: Sequence[Mapping[str, Any]] = ()) -> list[Finding]:
    """Compares a tokenizer (or the one in a processor) with the embeddings and configurations of a model.

    Ids without an embedding fail, and so does a tokenizer without the tokens that the `edits` (records) added. More
    embeddings than ids are usual, and fit. End, padding and first tokens that differ from the configurations are named,
    and what to set; a model that was trained so is no failure. One for which there is no embedding is, once a change
    has touched the vocabulary.
    """
    tokenizer, added = tokenizer_of(processor), added_tokens(edits)
    if tokenizer is None:
        lost = f"{len(added)} tokens were added, and no tokenizer goes with the model; give the one that they went into"
        return [Finding(ADDED, False, lost)] if added else []
    found = _compare_embeddings(model, tokenizer) + (_compare_added(tokenizer, added) if added else [])
    found += _compare_special(model, touched=bool(added))
    return found + (_compare_stops(model, tokenizer) if model.can_generate() else [])


def _compare_added(tokenizer: PreTrainedTokenizerBase, added: Mapping[str, int]) -> list[Finding]:
    """Compares the ids of added tokens with those that the model has rows for."""
    vocabulary = tokenizer.get_vocab()
    wrong = [
        f"{token!r} is {'no token' if token not in vocabulary else f'id {vocabulary[token]}'} of it, and was added as "
        f"id {number}"
        for token, number in added.items()
        if vocabulary.get(token) != number
    ]
    remedy = "; take the tokenizer that the tokens were added to (tokenizer=)"
    evidence = f"{len(added)} tokens, ids {min(added.values())} to {max(added.values())}"
    return [Finding(ADDED, not wrong, "; ".join(wrong[:_SHOWN]) + remedy if wrong else evidence)]


def _compare_special(model: PreTrainedModel, *, touched: bool) -> list[Finding]:
    """Compares end, padding and first ids of the configurations with the number of embeddings."""
    table = foreign.attempt(model.get_input_embeddings).value
    if not isinstance(table, nn.Embedding):
        return []
    sources = {"config": model.config.get_text_config(decoder=True)}
    if model.can_generate():
        sources["generation_config"] = model.generation_config
    wrong = [
        f"{where}.{key} is {number}"
        for where, source in sources.items()
        for key in SPECIAL_IDS
        for number in _list_ids(source, key)
        if number >= table.num_embeddings
    ]
    if not wrong:
        return [Finding(SPECIAL, True, f"all are below {table.num_embeddings}")] if touched else []
    words = (
        f"{', '.join(wrong)}, and there are {table.num_embeddings} embeddings; set it to an id that is there, or None"
    )
    return [Finding(SPECIAL, False if touched else None, words)]


def _compare_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Compares ids and rows, where it is a plain table that turns ids into vectors."""
    table = foreign.attempt(model.get_input_embeddings).value
    if isinstance(table, nn.Embedding):
        return [_check_rows(tokenizer, table.num_embeddings)]
    if table is None or model.main_input_name != "input_ids":
        return []
    return [Finding.unseen(FITS, f"a {type(table).__name__} takes the ids")]


def _check_rows(tokenizer: PreTrainedTokenizerBase, rows: int) -> Finding:
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
    if not beyond:
        return Finding(FITS, True, f"{len(vocabulary)} ids, the embeddings have {rows} rows")
    placeholders = {t for role, t in tokenizer.special_tokens_map.items() if role not in _ROLES and isinstance(t, str)}
    listed = _list_names([f"{token!r} (id {number})" for number, token in beyond])
    if all(token in placeholders for _, token in beyond):
        # A family's tokenizer names the tokens of images and sound, also beside a model that takes text alone.
        return Finding(
            FITS, None, f"{listed} stands for an input that this model does not accept; text that contains it fails"
        )
    return Finding(
        FITS,
        False,
        f"{listed} has no embedding, there are {rows} rows; add these tokens (`add_tokens`), before the surgery call "
        f"model.resize_token_embeddings({beyond[-1][0] + 1}) (for a recipe: then save model and tokenizer, and name "
        "that directory as base), or take the tokenizer that the model was trained with",
    )


def _compare_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Compares end, padding and first token with what generation and other programs read."""
    words = model.config.get_text_config(decoder=True)
    sources = {"generation_config": model.generation_config, "config": words}
    faults = []
    if tokenizer.eos_token_id is not None:
        faults = [fault for where, source in sources.items() for fault in _against_end(where, source, tokenizer)]
    for role in ("pad_token", "bos_token"):
        own = getattr(tokenizer, f"{role}_id")
        for where, source in sources.items():
            other = _list_ids(source, f"{role}_id")
            if own is not None and other and own not in other:
                faults.append(f"{role} is id {own} of the tokenizer and {_format_ids(other)} in {where}")
    if tokenizer.eos_token_id is None and not faults:
        return []
    remedy = "; set these on the model (or the tokenizer) before the build"
    return [
        Finding(ENDS, None, "; ".join(faults) + remedy) if faults else Finding(ENDS, True, _describe_end(tokenizer))
    ]


def _against_end(where: str, source: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    own, ends = tokenizer.eos_token_id, _list_ids(source, "eos_token_id")
    if own in ends or (where == "config" and not ends):
        return []
    return [
        f"the tokenizer ends with {tokenizer.eos_token!r} (id {own}), and {where}.eos_token_id is {_format_ids(ends)}: "
        f"{where}.eos_token_id = {_format_ids([*ends, own])} stops there too"
    ]


def _describe_end(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{tokenizer.eos_token!r} (id {tokenizer.eos_token_id}) ends generation"


def _list_ids(source: Any, key: str) -> list[int]:
    """Returns the ids that a configuration gives for a role: none, one or several."""
    value = source.to_dict().get(key) if isinstance(source, PreTrainedConfig) else getattr(source, key, None)
    try:
        return (
            [] if value is None else [index(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
        )
    except TypeError as error:
        where = "config" if isinstance(source, PreTrainedConfig) else "generation_config"
        raise ArtifactError(
            f"{key} in {where} of the model is {value!r}, which is not a token id; correct it"
        ) from error


def _format_ids(ids: Sequence[int]) -> str:
    return "None" if not ids else str(ids[0]) if len(ids) == 1 else str(list(ids))


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
