"""What a model keeps of the data that it is trained on: what its classes are called, which kind of problem they are,
and how conversations are written. Put into a loaded model, or into the files of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from solidify.artifact import vocabulary
from solidify.errors import ArtifactError
from solidify.system import files

TEMPLATE, LEGACY, OTHERS = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
_CONFIGURED = ("tokenizer_config.json", "processor_config.json")  # may hold templates too, of an older layout
_DEFAULT = "default"  # the template that is used where none is named


@dataclass(frozen=True)
class DataFacts:
    """What is said of classes (`names` in their order), of the `problem` (as `config.problem_type` says it), and of
    conversations (a chat `template`); nothing, where it is left out."""

    names: tuple[str, ...] = ()
    problem: str | None = None
    template: str | None = None

    def settings(self) -> dict[str, Any]:
        """Returns what the configuration gets, as `config.json` holds it."""
        numbers = {name: number for number, name in enumerate(self.names)}
        named = {"id2label": {str(n): name for name, n in numbers.items()}, "label2id": numbers} if numbers else {}
        return {**named, **({"problem_type": self.problem} if self.problem is not None else {})}

    def put(self, model: PreTrainedModel, preparing: Any) -> None:
        """Gives them to a loaded model, and to the tokenizer or processor that prepares its inputs."""
        if self.names:
            model.config.id2label = dict(enumerate(self.names))
            model.config.label2id = {name: number for number, name in enumerate(self.names)}
        if self.problem is not None:
            model.config.problem_type = self.problem
        if self.template is not None:
            for holder in _find_holders(preparing):
                holder.chat_template = _replace_default(holder.chat_template, self.template)

    def write(self, directory: Path, preparing: Any) -> None:
        """Puts them into the files of a model; `preparing` is the tokenizer or processor that was read from them.

        Raises:
            ArtifactError: another template has a name that no file can have.
        """
        if settings := self.settings():
            path = directory / "config.json"
            _write_json(path, {**files.document(path), **settings})
        if self.template is None:
            return
        for name, template in _find_others(preparing).items():
            if Path(name).name != name:
                raise ArtifactError(
                    f"the chat template {name!r} of the base has a name that no file can have; rename it"
                )
            (directory / OTHERS).mkdir(exist_ok=True)
            (directory / OTHERS / f"{name}.jinja").write_text(template, encoding="utf-8")
        (directory / TEMPLATE).write_text(self.template, encoding="utf-8")
        (directory / LEGACY).unlink(missing_ok=True)  # transformers would read it first
        for name in _CONFIGURED:
            path = directory / name
            if files.is_file(path) and "chat_template" in (held := files.document(path)):
                _write_json(path, {key: value for key, value in held.items() if key != "chat_template"})


def _find_holders(preparing: Any) -> list[Any]:
    """Returns what holds chat templates: a tokenizer, and the processor around it."""
    tokenizer = vocabulary.tokenizer_of(preparing)
    held = [preparing] if isinstance(preparing, ProcessorMixin) else []
    return [*held, *([tokenizer] if tokenizer is not None else [])]


def _replace_default(held: Any, template: str) -> Any:
    return {**held, _DEFAULT: template} if isinstance(held, Mapping) else template


def _find_others(preparing: Any) -> dict[str, str]:
    """Returns the templates that have a name, so that they are used where they are named."""
    held = [holder.chat_template for holder in _find_holders(preparing)]
    found = {name: text for each in held if isinstance(each, Mapping) for name, text in each.items()}
    return {name: str(text) for name, text in found.items() if name != _DEFAULT}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
