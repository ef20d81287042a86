"""A recipe to start from: commented, with a model's own module names, and tried before it is written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from solidify.artifact import inspection, loading
from solidify.artifact.inspection import Branch
from solidify.builtin import bases, corpus
from solidify.errors import RecipeError, SolidifyError, SurgeryError, raised_as
from solidify.model import anatomy
from solidify.recipe import dry_run, schema
from solidify.surgery import selection
from solidify.system import console, files, foreign
from solidify.training import formats, numbering, sources

_SUGGESTED = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "intermediate", "attention", "self_attn", "attn")
_LINEAR = ("Linear", "Conv1D")
_SHOWN, _TRIED, _ADAPTED = 16, 4, 2
_OF_TEXT = ("text", "masked")
NONE = "none"  # what `replace` says where nothing is replaced
MODULE = "Gate"
_GATE = '''\
"""A module to start from: what stood there before, times a number that starts at one and is learned."""

import torch
from torch import nn


class Gate(nn.Module):
    """Holds the module that it replaces (`original`), and starts as that, bit for bit."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, *args, **kwargs):
        output = self.original(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] * self.scale.to(output[0].dtype), *output[1:])
        return output * self.scale.to(output.dtype)
'''


@dataclass(frozen=True)
class Asked:
    """What a recipe shall say: the base, what is replaced (None: chosen here) by what (None: a gate), and the data.

    With `replace` as `none` there is no surgery: LoRA on the base as it is, and its head where data has labels. `path`
    is where the recipe will stand. `data` may be a file, relative to the current directory, or a `builtin:` name.
    """

    model: str
    path: Path
    revision: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    replace: str | None = None
    module: str | None = None
    data: str | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing is replaced."""
        return self.replace == NONE

    @property
    def files(self) -> list[Path]:
        """The files that are written: the recipe, and a module where one is needed and none was named."""
        gate = [self.path.with_name("gate.py")] if self.module is None and not self.plain else []
        return [self.path, *gate]


class Drafting:
    """A model on the meta device, and what a recipe may say about it.

    Raises:
        SolidifyError: there is no such model, or its code may not run.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        built_in = bases.directory(asked.model)
        loaded = loading.load_base(
            str(built_in or asked.model),
            revision=asked.revision,
            dtype=asked.dtype,
            device="meta",
            trust_remote_code=asked.trust_remote_code,
        )
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.branches = inspection.tree(self.model)
        self.untaught = ""  # why the data does not go with the model

    def targets(self) -> list[Branch]:
        """Returns what `replace` may name, the likeliest first: what repeats, near the top, by its usual names."""
        found = [branch for branch in self.branches if branch.target]
        repeated = [branch for branch in found if ".*." in branch.name and not branch.name.endswith("*")]
        ranks = {name: rank for rank, name in enumerate(_SUGGESTED)}

        def rank(branch: Branch) -> tuple[int, int, int]:
            return ranks.get(branch.name.rpartition(".")[2], len(ranks)), branch.depth, -branch.flops

        return sorted(repeated, key=rank) or found

    def write(self) -> dict[Path, str]:
        """Returns the files to be written: the recipe, and the module where none was named. `plan` has accepted them.

        Raises:
            SolidifyError: what was asked for does not fit the model, or nothing of it could be suggested.
        """
        asked = self.asked
        if asked.plain:
            return self._write_plain()
        wanted = [asked.replace] if asked.replace is not None else [each.name for each in self.targets()[:_TRIED]]
        if not wanted:
            raise RecipeError(f"{asked.model} has no module that could be replaced")
        trains = [True, False] if asked.data is not None or self._is_taught_text() else [False]
        fault: SolidifyError | None = None
        for target in wanted:
            for with_adapter in trains:
                try:
                    return self._try(target, with_adapter)
                except SolidifyError as error:
                    fault = fault or error
                    if asked.data is not None and with_adapter:
                        if not os.path.exists(asked.data):
                            raise
                        self.untaught = str(error)
        assert fault is not None
        raise fault

    def _write_plain(self) -> dict[Path, str]:
        """Returns a recipe that trains the base as it is.

        Raises:
            SolidifyError: nothing of it can be trained, or what its head learns from was not named or does not fit.
        """
        asked = self.asked
        if asked.module is not None:
            raise RecipeError(
                f"--with says by what modules are replaced, and --replace {NONE} that none is: leave one out"
            )
        learned = formats.learned_by(self.model)
        if asked.data is None and not {*_OF_TEXT} & {*learned}:
            rows = " or ".join(str(formats.FORMATS[name]) for name in learned) or "rows that no format here has"
            raise RecipeError(
                f"{type(self.model).__name__} does not learn from the text that is built in, but from {rows}; name a "
                "file of such rows (--data)"
            )
        lines = [
            *self._write_head(),
            "# Nothing of it is replaced: what is trained stands beside it, and is merged into it at the end.",
            "# A section `surgery` would change it first (docs/surgery.md); solidify inspect shows the tree.",
            "",
            *self._write_training("", commented=False),
            *self._write_output(),
        ]
        written = {asked.path: _join_lines(lines)}
        with console.silence():
            dry_run.plan(schema.judge(files.parse_yaml(written[asked.path]), asked.path))
        return written

    def _is_taught_text(self) -> bool:
        """Returns whether the model learns from plain text: it writes, or fills gaps, and has a tokenizer."""
        learned = {*_OF_TEXT} & {*formats.learned_by(self.model)}
        return isinstance(self.tokenizer, PreTrainedTokenizerBase) and bool(learned)

    def _try(self, target: str, with_adapter: bool) -> dict[Path, str]:
        """Writes the files for a target in a directory that is removed again, and has them planned."""
        with raised_as(RecipeError, of=SurgeryError):
            found = selection.select(self.model, target)
        if len(found.classes) > 1:
            kinds = ", ".join(f"{count} {kind}" for kind, count in found.classes.items())
            raise RecipeError(f"{target} names modules of several classes ({kinds}); name those of one (--replace)")
        module = self.asked.path.with_name("gate.py")
        written = {self.asked.path: self._write_recipe(target, found, with_adapter)}
        if self.asked.module is None:
            written[module] = _GATE
        with tempfile.TemporaryDirectory() as scratch, console.silence():
            document = files.parse_yaml(written[self.asked.path])
            if self.asked.module is None:
                (Path(scratch) / "gate.py").write_text(_GATE, encoding="utf-8")
                document["surgery"][0]["with"] = f"{scratch}/gate.py:{MODULE}"
            dry_run.plan(schema.judge(document, self.asked.path))
        return written

    def _write_recipe(self, target: str, found: Any, with_adapter: bool) -> str:
        kind, count = next(iter(found.classes.items()))
        module = self.asked.module or f"gate.py:{MODULE}"
        lines = [
            *self._write_head(),
            "# What can be replaced here (`*` stands for numbers; solidify inspect shows the whole tree):",
            *self._list_targets(),
            "surgery:",
            f"  - replace: {_quote(target)}",
            f"    expect: {_quote(kind)} # the class that must be found there",
            f"    count: {count} # and how many",
            f"    with: {_quote(module)} # file.py:Name beside this file, or package.module:Name (solidify.modules.…)",
            "    arguments: {} # more arguments of its constructor, by name",
            "",
        ]
        lines += self._write_training(target, commented=not with_adapter)
        return _join_lines([*lines, *self._write_output()])

    def _write_head(self) -> list[str]:
        path = self.asked.path
        return [
            f"# solidify plan {path.name}    what it would do; writes nothing",
            f"# solidify run {path.name}     all of it; results go to `output`",
            "# solidify schema --output recipe.schema.json gives an editor the keys; docs/recipe.md explains them.",
            "",
            f"# {type(self.model).__name__}: {anatomy.count(self.model.parameters()):,} parameters.",
            self._write_base(),
            "",
        ]

    def _write_output(self) -> list[str]:
        return [f"output: {_quote(f'build/{self.asked.path.stem}')}", ""]

    def _write_base(self) -> str:
        asked, name = self.asked, self.asked.model
        if files.is_directory(name) and not os.path.isabs(name):
            name = os.path.relpath(name, asked.path.resolve().parent)
        values: dict[str, Any] = {"model": name, "revision": asked.revision, "dtype": asked.dtype}
        values["trust_remote_code"] = asked.trust_remote_code or None
        text = ", ".join(f"{key}: {_quote(value)}" for key, value in values.items() if value is not None)
        return f"base: {{{text}}}"

    def _list_targets(self) -> Iterator[str]:
        """Yields a comment for each module, or some equal ones, that can be a target."""
        found = [branch for branch in self.branches if branch.target]
        width = max((len(branch.name) for branch in found[:_SHOWN]), default=0)
        for branch in found[:_SHOWN]:
            where = f" ({branch.where})" if branch.where else ""
            yield f"#   {branch.name:<{width}}  {branch.kind} x {branch.times}{where}"
        if len(found) > _SHOWN:
            yield f"#   and {len(found) - _SHOWN} more"

    def _adapted(self, target: str) -> list[str]:
        """Returns linear layers that repeat and are not within the target, those of attention first."""
        inside = f"{anatomy.fold([target])[0]}." if target else "."  # of no target, nothing is within
        names = [branch.name for branch in self.branches if branch.kind in _LINEAR and ".*." in branch.name]
        free = [name for name in names if not f"{name}.".startswith(inside)]
        attention = [name for name in free if "att" in name]
        return attention or free

    def _kinds(self, names: list[str]) -> set[str]:
        return {branch.kind for branch in self.branches if branch.name in names}

    def _write_training(self, target: str, *, commented: bool) -> Iterator[str]:
        layers = self._adapted(target)
        chosen = [name for name in layers if name.rpartition(".")[2] in ("q_proj", "v_proj", "query", "value")]
        chosen = (chosen or layers)[:_ADAPTED]
        full = [] if self.asked.module is not None or self.asked.plain else ["**.scale"]
        full += self._list_heads() if self.asked.data is not None else []
        turned = ", fan_in_fan_out: true" if self._kinds(chosen) == {"Conv1D"} else ""
        named = ", ".join(map(_quote, chosen))
        hint = "" if full else " # names of modules or parameters that are trained in full"
        lora = f"{{r: 8, lora_alpha: 16, target_modules: [{named}]{turned}}}" if chosen else "null"
        lines = [
            "# What is trained: LoRA's own fields, and names of modules or parameters that are trained in full.",
            *([f"# LoRA can go on: {', '.join(layers[:_SHOWN])}"] if layers else []),
            "adapter:",
            f"  lora: {lora}",
            f"  train: [{', '.join(map(_quote, full))}]{hint}",
            "objective:",
            "  - {loss: model} # the model's own loss; docs/losses.md has more terms",
            self._write_data(),
            "training: # fields of TrainingArguments, or of TRL's SFTConfig",
            "  max_steps: 20",
            "  per_device_train_batch_size: 2",
            "  learning_rate: 2.0e-4",
            "  logging_steps: 5",
        ]
        if not commented:
            yield from lines
            return
        yield "# Nothing is trained yet. When `data` fits this model, take the marks away:"
        yield from (f"# ({part})" for part in self.untaught.splitlines())
        yield from (f"# {line}" for line in lines)

    def _list_heads(self) -> list[str]:
        """Returns the modules of a head that learns from labels: what stands beside the model's body. It may be new."""
        labelled = set(formats.learned_by(self.model)) & set(formats.LABELLED)
        if not labelled or self.model.base_model is self.model:
            return []
        beside = [(name, part) for name, part in self.model.named_children() if part is not self.model.base_model]
        return [name for name, part in beside if any(True for _ in part.parameters())]

    def _write_data(self) -> str:
        """Writes where rows are read. What is built in has a part that is held out; an encoder says itself how long its
        rows may be, and pictures have no length."""
        more = ", eval: builtin:pydoc-heldout" if self.asked.data is None else ""
        more += ", max_length: 256" if set(formats.NEXT_TOKEN) & set(formats.learned_by(self.model)) else ""
        names = self._name_classes()
        more += f", labels: [{', '.join(map(_quote, names))}]" if names else ""
        return f"data: {{train: {_quote(self._data_name())}{more}}}"

    def _name_classes(self) -> list[str]:
        """Returns what the rows call their classes, where the base has as many and gives them no names."""
        path, learned = Path(self.asked.data or ""), set(formats.learned_by(self.model)) & set(formats.LABELLED)
        if not learned or not numbering.is_nameless(self.model.config) or not files.is_file(path):
            return []
        rows = foreign.attempt(sources.read_file, path).value  # what is wrong with it is told by the plan
        found = set(rows["label"]) if rows is not None and "label" in sources.columns(rows) else set()
        named = sorted(label for label in found if isinstance(label, str))
        return named if len(named) == len(found) == self.model.config.num_labels else []

    def _data_name(self) -> str:
        name = self.asked.data
        if name is None:
            return next(iter(corpus.NAMES))
        if name.startswith("builtin:") or os.path.isabs(name) or not files.is_file(name):
            return name
        return os.path.relpath(name, self.asked.path.resolve().parent)


def _join_lines(lines: Iterable[str]) -> str:
    return "\n".join(line.rstrip() for line in lines)


def _quote(value: Any) -> str:
    """Writes a value as YAML: a plain word as it is, everything else in quotes."""
    if not isinstance(value, str):
        return json.dumps(value)
    plain = value and all(c.isalnum() or c in "_./-:" for c in value) and value[0].isalpha() and value[-1] != ":"
    try:
        plain = plain and files.parse_yaml(value) == value
    except ValueError:
        plain = False
    return value if plain else json.dumps(value, ensure_ascii=False)
