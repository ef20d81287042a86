"""Reads two kinds of things for people: the tree of a model, and what differs between two directories."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from solidify.artifact import manifest, tensors
from solidify.errors import ArtifactError
from solidify.model import anatomy


@dataclass(frozen=True)
class Branch:
    """A module of a model, or several equal ones folded: name with `*`, class, how many, parameters of all."""

    name: str
    kind: str
    times: int
    parameters: int
    own: int

    def document(self) -> dict[str, Any]:
        """Returns the branch as plain values."""
        return {"name": self.name, "class": self.kind, "times": self.times, "parameters": self.parameters}


def tree(model: PreTrainedModel) -> list[Branch]:
    """Returns the model's modules in order; modules whose names differ in numbers only, and whose class and size agree,
    are folded into one."""
    folded: dict[tuple[str, str, int], list[nn.Module]] = {}
    for name, module in model.named_modules():
        if name:
            size = anatomy.count(module.parameters())
            key = (anatomy.fold([name])[0], type(module).__name__, size)
            folded.setdefault(key, []).append(module)
    return [
        Branch(
            name,
            kind,
            len(modules),
            size * len(modules),
            sum(anatomy.count(m.parameters(recurse=False)) for m in modules),
        )
        for (name, kind, size), modules in folded.items()
    ]


def diff(a: Path, b: Path) -> dict[str, list[str]]:
    """Returns what differs between two model or adapter directories: configuration, code, modules, tensors.

    Code is compared as text and never run; tensors by digest, read one by one.

    Raises:
        ArtifactError: one of them is no model or adapter directory.
    """
    first, second = _contents(a), _contents(b)
    result: dict[str, list[str]] = {}
    for section in ("configuration", "code", "modules", "tensors"):
        old, new = first[section], second[section]
        lines = [f"- {key}{_shown(old[key])}" for key in sorted(old) if key not in new]
        lines += [f"+ {key}{_shown(new[key])}" for key in sorted(new) if key not in old]
        lines += [
            f"~ {key}: {_change(section, old[key], new[key])}"
            for key in sorted(old)
            if key in new and old[key] != new[key]
        ]
        result[section] = lines
    return result


def _contents(directory: Path) -> dict[str, dict[str, Any]]:
    names = [name for name in ("config.json", "adapter_config.json") if (directory / name).is_file()]
    if not names:
        raise ArtifactError(f"{directory} holds neither config.json nor adapter_config.json")
    values = json.loads((directory / names[0]).read_text(encoding="utf-8"))
    adapter = names[0] != "config.json"
    paths = [directory / "adapter_model.safetensors"] if adapter else tensors.weight_files(directory)
    edits = manifest.read(directory).edits if (directory / manifest.NAME).is_file() else []
    return {
        "configuration": {key: value for key, value in values.items() if key != "surgery"},
        "code": {p.name: tensors.digest_bytes(p.read_bytes()) for p in sorted(directory.glob("*.py"))},
        "modules": {edit["name"]: edit["new_class"] for edit in edits},
        "tensors": tensors.digests_on_disk(paths),
    }


def _shown(value: Any) -> str:
    return f" = {value!r}" if not (isinstance(value, str) and len(value) == 64) else ""


def _change(section: str, old: Any, new: Any) -> str:
    return "its content differs" if section in ("code", "tensors") else f"{old!r} -> {new!r}"
