"""Adds tokens to a model and its tokenizer: embeddings, head and configuration get rows for them.

The whole operation: its type, its function and the code that artifacts carry. `rows.py` finds the tensors with a row
for each token, `tokens.py` the tokens, their ids, and where each starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from solidify.errors import SurgeryError, refuse
from solidify.surgery.operation import Context, Operation, Record

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from solidify.model.extent import Extent
    from solidify.surgery.control import Control
    from solidify.surgery.edit_record import Edit
    from solidify.surgery.rows import Rows
    from solidify.surgery.tokens import Additions, Start

_CHUNK = 2**14  # rows that a mean reads at a time
_WHAT = "these tokens"


class AddTokens(Operation):
    """One step of surgery: model and tokenizer get the tokens that `add_tokens` lists, or a file beside the recipe has.

    An item is a token, or a mapping of `token` and its own `start`: `mean` of all embeddings, `text` (of the pieces of
    the token's text), `{text: ...}` (of another text), or `{copy: ...}` of a token.
    """

    asked = recorded = "add_tokens"
    shapes = speaks = True
    folds = False

    add_tokens: Annotated[str, Field(min_length=1)] | Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    special: bool = False
    start: str | dict[str, str] = "mean"
    pad_to_multiple_of: int | None = Field(default=None, ge=1)

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Adds the tokens, to the base's tokenizer too."""
        named = self.add_tokens
        return add_tokens(
            model,
            context.tokenizer,
            context.file(named) if isinstance(named, str) else named,
            special=self.special,
            start=self.start,
            pad_to_multiple_of=self.pad_to_multiple_of,
            extent=context.extent,
        )

    def files(self) -> list[str]:
        """Returns the file of tokens."""
        return [self.add_tokens] if isinstance(self.add_tokens, str) else []

    @classmethod
    def inspect(cls, module: nn.Module, edit: Record) -> tuple[str, list[str]]:
        """Measures the tensors that have one row per token."""
        settings = edit["settings"]
        found = {key: getattr(module, key).shape[dim] for key, dim in settings["tensors"].items()}
        wrong = [
            f"{key} has {rows} rows, not {settings['rows']}" for key, rows in found.items() if rows != settings["rows"]
        ]
        return f"has rows for {settings['rows']} tokens", wrong

    @classmethod
    def carried(cls) -> Callable[..., list[str] | None]:
        """Returns what an artifact does when its constructor has built the tensors as they were."""
        return take_rows


def take_rows(model: Any, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Gives tensors another number of rows: the first stay, further ones are zero until they are filled or loaded."""
    import torch
    from torch import nn

    for name in names:
        module = model.get_submodule(name)
        for key, dim in edit["tensors"].items():
            old = getattr(module, key)
            shape = list(old.shape)
            shape[dim] = edit["rows"] - shape[dim]
            if shape[dim] <= 0:
                continue
            rows = torch.cat([old.detach(), old.detach().new_zeros(shape)], dim)
            setattr(module, key, nn.Parameter(rows, old.requires_grad) if isinstance(old, nn.Parameter) else rows)
    prefix = edit.get("prefix", "")
    for path in edit.get("numbers", ()) if names else ():
        if path.startswith(prefix):  # a model without the head has none of the head's
            owner, _, key = path.removeprefix(prefix).rpartition(".")
            setattr(model.get_submodule(owner), key, edit["rows"])


def add_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str | Mapping[str, Any]] | Path,
    *,
    special: bool = False,
    start: Start = "mean",
    pad_to_multiple_of: int | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Adds tokens to a model and its tokenizer, both in place, and returns the edits: one a module with rows of tokens.

    `tokens` lists texts, or mappings of `token` and its own `start`; a Path names a file: one a line, or JSON.
    A `special` token is left out of decoded text. `start` is `mean` (of all embeddings that the tokenizer uses), `text`
    (the mean over the pieces into which the tokenizer split the token until now), `{"text": ...}` (over those of
    another text) or `{"copy": token}`; input embeddings, head and its bias each start from their own rows.

    Rows for new ids are added, up to a multiple of `pad_to_multiple_of`; where the model has spare rows, these are used
    first. The configuration says the new number. It is shown that all other tokens compute what they did, and that a
    new one computes what an old one does once it has its rows. On the meta device nothing is run.

    Raises:
        SurgeryError: a token is known, or is not read as one id; a start is unknown; the family does not build its
            embeddings by its configuration, an earlier step has replaced them, or it reads these ids otherwise than as
            text; a special id of a configuration has no row. Model and tokenizer are then as they were.
    """
    from solidify.model import anatomy
    from solidify.model.extent import Extent
    from solidify.surgery import control
    from solidify.surgery import rows as finding
    from solidify.surgery import tokens as listing
    from solidify.surgery.transaction import transaction

    extent = Extent.given(extent, model)
    plan = finding.find(model)
    additions = listing.plan(tokenizer, listing.read(tokens, start), plan.rows, special=special)
    rows = _count_rows(plan.rows, additions, pad_to_multiple_of)
    refuse(SurgeryError, listing.TITLE, _find_strays(model, rows))
    before = _only_known(control.take_whole(model, extent), model, additions)
    grown = [f"{name}.{key}" if name else key for name, keys in plan.tensors.items() for key in keys]
    with transaction(model, extent, changes=grown):
        edits = _grow(model, plan, additions, rows, extent)
        identical = False
        if not anatomy.is_meta(model):
            identical = _judge_old(model, before, additions, plan.rows)
            _judge_new(model, before, plan, additions)
    additions.add_to(tokenizer)
    probed = before.inputs is not None
    return [dataclasses.replace(edit, identical=identical, probed=probed, control=before.distances) for edit in edits]


def _count_rows(rows: int, additions: Additions, multiple: int | None) -> int:
    """Returns how many rows there must be: for every id, no fewer than before, a multiple of a number."""
    step = multiple or 1
    return -(-max(rows, *(number + 1 for number in additions.ids.values())) // step) * step


def _find_strays(model: PreTrainedModel, rows: int) -> list[str]:
    """Names special ids of the configurations for which there would be no row."""
    sources = {"config": model.config.get_text_config(decoder=True)}
    if model.can_generate():
        sources["generation_config"] = model.generation_config
    faults = []
    for where, source in sources.items():
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(source, key, None)
            listed = value if isinstance(value, (list, tuple)) else [value]
            faults += [
                f"{where}.{key} of the model is {number}, and the model would have {rows} rows; set it to one that is "
                "there, or to None"
                for number in listed
                if type(number) is int and number >= rows
            ]
    return faults


def _only_known(before: Control, model: PreTrainedModel, additions: Additions) -> Control:
    """Runs the model on tokens that the tokenizer knows, where others are about to get other rows."""
    import torch

    from solidify.model import anatomy

    rewritten = set(additions.ids.values())
    ids = None if before.inputs is None else before.inputs.get("input_ids")
    if before.inputs is None or ids is None or rewritten.isdisjoint(ids.flatten().tolist()):
        return before
    taken = torch.tensor(sorted(rewritten), device=ids.device)
    inputs = {
        key: t.masked_fill(torch.isin(t, taken), additions.known[0]) if key.endswith("input_ids") else t
        for key, t in before.inputs.items()
    }
    return dataclasses.replace(before, inputs=inputs, output=anatomy.run(model, inputs))


def _grow(model: PreTrainedModel, plan: Rows, additions: Additions, rows: int, extent: Extent) -> list[Edit]:
    """Gives every tensor its rows and their values, keeps ties, and writes the records."""
    from solidify.model import anatomy, operations
    from solidify.weights import spilling

    old = {name: dict(_held(model, name, keys)) for name, keys in plan.tensors.items()}
    counts = {name: anatomy.count(model.get_submodule(name).parameters(recurse=False)) for name in plan.tensors}
    kept = [*model.parameters(), *model.buffers()]
    made: dict[int, torch.Tensor] = {}
    for name, keys in plan.tensors.items():
        module = model.get_submodule(name)
        for key, axis in keys.items():
            before = old[name][key]
            if id(before) not in made:
                take_rows(model, [name], {"tensors": {key: axis}, "rows": rows}, {})
                if getattr(module, key) is before:  # spare rows suffice; a mapped file is not written to
                    setattr(module, key, _copied(before))
                made[id(before)] = getattr(module, key)
                if not before.is_meta:
                    _fill(made[id(before)].data, axis, additions, before.shape[axis])
            setattr(module, key, made[id(before)])
        if not extent.whole:
            spilling.spill(name, module, kept, extent.spill)
    after = dict.fromkeys(plan.settings, rows)
    numbers = [name for name in plan.attributes if _has_number(model, name)]
    operations.assign(model.config, after)
    operations.set_attributes(model, dict.fromkeys(numbers, rows))
    shared = {"before": plan.settings, "after": after, "numbers": numbers, "tokens": additions.ids}
    return [
        _record(model, name, keys, rows, counts[name], shared if index == 0 else {}, plan.rows)
        for index, (name, keys) in enumerate(plan.tensors.items())
    ]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    from torch import nn

    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _held(model: PreTrainedModel, name: str, keys: Mapping[str, int]) -> list[tuple[str, torch.Tensor]]:
    module = model.get_submodule(name)
    return [(key, getattr(module, key)) for key in keys]


def _has_number(model: PreTrainedModel, path: str) -> bool:
    owner, _, key = path.rpartition(".")
    modules = dict(model.named_modules(remove_duplicate=False))
    return owner in modules and key in vars(modules[owner])


def _fill(tensor: torch.Tensor, axis: int, additions: Additions, rows: int) -> None:
    """Fills the rows of new ids from their sources, and those that no id has with the mean of all known rows.

    The tensor had `rows` rows; one beside the embeddings may have had fewer than these.
    """
    import torch

    mean = _mean_rows(tensor, axis, [number for number in additions.known if number < rows])
    spare: dict[int, list[int]] = {number: [] for number in range(rows, tensor.shape[axis])}
    for number, sources in {**spare, **additions.sources}.items():
        if any(source >= rows for source in sources):
            value = mean
        elif len(sources) == 1:
            value = tensor.select(axis, sources[0]).clone()
        elif sources:
            value = tensor.index_select(axis, torch.tensor(sources, device=tensor.device)).double().mean(axis)
        else:
            value = mean
        tensor.select(axis, number).copy_(value)


def _mean_rows(tensor: torch.Tensor, axis: int, known: Sequence[int]) -> torch.Tensor:
    """Returns the mean of some rows, in float64, some thousand rows at a time."""
    import torch

    index = torch.tensor(known, device=tensor.device)
    parts = [tensor.index_select(axis, part).double().sum(axis) for part in torch.split(index, _CHUNK)]
    return torch.stack(parts).sum(0) / len(known)


def _record(
    model: PreTrainedModel, name: str, keys: dict[str, int], rows: int, count: int, more: Mapping[str, Any], was: int
) -> Edit:
    """Writes the record of one module: its tensors with rows of tokens are new, all others stay."""
    from solidify.model import anatomy
    from solidify.surgery.edit_record import Edit

    module = model.get_submodule(name)
    own = [key for key in module.state_dict() if "." not in key]
    tensors = {f"{name}.{key}".lstrip("."): None if key in keys else f"{name}.{key}".lstrip(".") for key in own}
    return Edit(
        name=name,
        old_class=type(module).__name__,
        module_class=None,
        arguments={"rows": [was, rows], **({"tokens": list(more["tokens"])} if more else {})},
        supplied=(),
        tensors=tensors,
        dropped=tuple(name for name, origin in tensors.items() if origin is None),
        frozen=(),
        parameters_before=count,
        parameters_after=anatomy.count(module.parameters(recurse=False)),
        probed=False,
        identical=False,
        bypass=False,
        operation=AddTokens.recorded,
        settings={"tensors": keys, "rows": rows, **more},
    )


def _judge_old(model: PreTrainedModel, before: Control, additions: Additions, rows: int) -> bool:
    """Returns whether all that was there computes the same bits; what is more than rounding is refused."""
    import torch

    from solidify.model import anatomy
    from solidify.system import foreign

    if before.inputs is None or before.output is None:
        return False
    with foreign.calling(f"with {_WHAT} the model does not run", SurgeryError):
        output = anatomy.run(model, before.inputs)
    old, width = before.output, before.output.shape[-1]
    columns = [c for c in range(width) if c not in additions.sources] if width == rows else list(range(width))
    index = torch.tensor(columns, device=output.device)
    old, new = old.index_select(-1, index), output.index_select(-1, index)
    far = float((new.double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-30))
    if not far <= _allowed(old):
        raise SurgeryError(
            f"with {_WHAT} the old ones compute something else: outputs differ by {far:.1e} of the largest"
        )
    return torch.equal(new, old)


def _judge_new(model: PreTrainedModel, before: Control, plan: Rows, additions: Additions) -> None:
    """Gives a new token the rows of an old one for a moment: in its place it must then compute the same.

    Raises:
        SurgeryError: it does not: the family reads ids of this size as something else (images, sound).
    """
    from solidify.model import anatomy
    from solidify.system import foreign

    ids = None if before.inputs is None else before.inputs.get("input_ids")
    number = max(additions.ids.values())
    if before.inputs is None or ids is None:
        return
    old = int(ids[0, 0])
    held = {id(t): (t.data, keys[k]) for n, keys in plan.tensors.items() for k, t in _held(model, n, keys)}
    saved = [(data.select(axis, number).clone(), data, axis) for data, axis in held.values()]
    other = {k: t.masked_fill(t == old, number) if k.endswith("input_ids") else t for k, t in before.inputs.items()}
    try:
        for _, data, axis in saved:
            data.select(axis, number).copy_(data.select(axis, old))
        expected = anatomy.run(model, before.inputs)
        outcome = foreign.attempt(anatomy.run, model, other)
    finally:
        for row, data, axis in saved:
            data.select(axis, number).copy_(row)
    why = f"this family does not read the id {number} as text"
    if outcome.error is not None or outcome.value is None:
        raise SurgeryError(
            f"tokens cannot be added to this model: {why} ({foreign.said(outcome.error or ValueError())})"
        )
    far = float(
        (outcome.value.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    )
    if not far <= _allowed(expected):
        raise SurgeryError(
            f"tokens cannot be added to this model: {why}: with the rows of the token {old} it computes "
            f"something else (by {far:.1e} of the largest output)"
        )


def _allowed(output: torch.Tensor) -> float:
    """Returns how far rounding may move outputs, of the largest: products of another width sum in another order."""
    import torch

    return 5e-2 if output.dtype in (torch.float16, torch.bfloat16) else 1e-4
