"""What became of each unit, kept on disk: an alignment goes on after an interruption, and shares are put together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from solidify.artifact import tensors
from solidify.errors import HealingError, SolidifyError
from solidify.system import disk, files
from solidify.weights import hashing


@dataclass(frozen=True)
class Aligned:
    """What became of one unit: its relative error `before` and `after`, on held-out batches, and at every step.

    `seconds` are its share of the time that all took that learned beside it.
    """

    name: str
    modules: tuple[str, ...]
    before: float
    after: float
    steps: int
    tokens: int
    seconds: float
    errors: Sequence[float] = field(repr=False)


@dataclass(frozen=True)
class Result:
    """What became of a unit, and the `values` that it learned, by full names, in the model's dtypes."""

    aligned: Aligned
    values: Mapping[str, torch.Tensor]


class Kept:
    """The results in a directory that belong to one piece of work (`key`); without a directory, nothing is kept."""

    def __init__(self, directory: Path | None, key: str) -> None:
        self.directory, self.key = directory, key
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def find(self, name: str) -> Result | None:
        """Returns a unit's result, where a whole one of this work stands here."""
        if self.directory is None:
            return None
        path = self._path(name)
        try:
            entry = files.document(path.with_suffix(".json"))
            if entry["key"] != self.key:
                return None
            values = _map_values(path)
            if tensors.digests(values.items()) != entry["tensors"]:
                return None
            if hashing.digest_values(entry["aligned"]) != entry["figures"]:
                return None
            return Result(Aligned(**{**entry["aligned"], "modules": tuple(entry["aligned"]["modules"])}), values)
        except (OSError, SolidifyError, ValueError, KeyError, TypeError):
            return None

    def keep(self, result: Result) -> Result:
        """Writes a unit's result: its tensors first, and then the entry that says that they are whole."""
        if self.directory is None:
            return result
        path = self._path(result.aligned.name)
        self._refuse_others(path)
        values = {name: tensor.contiguous() for name, tensor in result.values.items()}
        disk.write(path, safetensors.torch.save(values))
        aligned = json.loads(json.dumps(asdict(result.aligned)))
        entry = {"key": self.key, "aligned": aligned, "figures": hashing.digest_values(aligned)}
        entry["tensors"] = tensors.digests(values.items())
        disk.write(path.with_suffix(".json"), json.dumps(entry, indent=1) + "\n")
        return Result(result.aligned, _map_values(path))

    def _refuse_others(self, path: Path) -> None:
        """Raises HealingError when what would be replaced was not written by an alignment."""
        entry = path.with_suffix(".json")
        try:
            ours = {"key", "aligned", "tensors"} <= set(files.document(entry))
        except (OSError, SolidifyError, ValueError):
            ours = not entry.exists()
        if not ours or (path.exists() and not entry.exists()):
            raise HealingError(
                f"{entry.name} or {path.name} in {path.parent} is not of an alignment; name another directory"
            )

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.safetensors"


def _map_values(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file, mapped."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the file is no mapping


def digest_work(
    model: nn.Module, base: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], settings: Mapping[str, Any]
) -> str:
    """Returns a digest of models, data and settings; of both models, of every tensor."""
    data = [{key: tensors.digest(tensor.contiguous()) for key, tensor in batch.items()} for batch in batches]
    states = [tensors.digests_where_they_stand(part.state_dict(keep_vars=True)) for part in (model, base)]
    return hashing.digest_values([states, data, json.loads(json.dumps(settings, default=list))])
