"""Reads two kinds of things for people: the tree of a model, and what differs between two directories."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.directory import manifest
from solidify.errors import ArtifactError
from solidify.model import cost
from solidify.surgery import catalogue, ledger
from solidify.system import console, files
from solidify.upstream.torch import own_modules, own_parameters
from solidify.weights import checkpoint, digest_cache, format, hashing
from solidify.weights.format import Entry

CHUNK = 2**22  # numbers; what is compared at a time is widened to float64
_SIMPLE = {"weight", "bias"}
_FILES_TOLD_ELSEWHERE = {"config.json", manifest.ADAPTER_CONFIG, manifest.NAME, "README.md"}


@dataclass(frozen=True)
class Branch:
    """A module of a model, or several equal ones folded: `*` in the name stands for their numbers.

    `where` says which numbers the innermost `*` stands for, when others differ. `parameters`, `bytes` and `flops` (per
    token) are of all of them together, with what they hold. `shape` is of the module's own weight. A row of kind
    `parameter` is a tensor that no ordinary layer holds. `target` tells whether `replace` may name it, `tied` the
    tensor that it shares.
    """

    name: str
    where: str
    kind: str
    depth: int
    times: int
    parameters: int
    bytes: int
    flops: int
    dtype: str
    shape: tuple[int, ...]
    target: bool
    tied: str

    def document(self) -> dict[str, Any]:
        """Returns the branch as plain values."""
        values = asdict(self)
        return {"name": values.pop("name"), "class": values.pop("kind"), **values, "shape": list(self.shape)}


def tree(model: PreTrainedModel) -> list[Branch]:
    """Returns the model's modules in order, as a tree whose equal members of a list are folded into one."""
    return list(_grow_branches(_Reading(model), [("", model)], "", "", 0))[1:]


class _Reading:
    """What the whole tree asks of the model: FLOPs with what is inside, first owners, occurrences, structures."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.flops: dict[str, int] = {}
        for name, own in cost.flops(model).items():
            parts = name.split(".") if name else []
            for count in range(len(parts) + 1):
                outer = ".".join(parts[:count])
                self.flops[outer] = self.flops.get(outer, 0) + own
        self.owner: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.owner.setdefault(id(parameter), name)
        self.occurrences: dict[int, int] = {}
        for _, module in model.named_modules(remove_duplicate=False):
            self.occurrences[id(module)] = self.occurrences.get(id(module), 0) + 1
        self._structures: dict[int, Any] = {}

    def structure(self, module: nn.Module) -> Any:
        """Returns a value that two modules share when class, own tensors and all that they hold agree."""
        if id(module) not in self._structures:
            own = tuple((k, tuple(p.shape), p.dtype) for k, p in own_parameters(module).items() if p is not None)
            held = tuple((k, self.structure(m)) for k, m in own_modules(module).items() if m is not None)
            self._structures[id(module)] = hash((type(module), own, held))
        return self._structures[id(module)]


def _grow_branches(
    reading: _Reading, members: Sequence[tuple[str, nn.Module]], name: str, where: str, depth: int
) -> Iterator[Branch]:
    """Yields the branch of some equal modules, then those of their parameters and children."""
    first = members[0][1]
    yield _make_branch(reading, members, name, where, depth)
    own = {key: p for key, p in own_parameters(first).items() if p is not None}
    if name and (own_modules(first) or not set(own) <= _SIMPLE):
        for key in own:
            yield _make_parameter(reading, members, key, (name, where, depth + 1))
    children = {key: child for key, child in own_modules(first).items() if child is not None}
    groups: dict[Any, list[str]] = {}
    for key, child in children.items():
        folds = isinstance(first, (nn.ModuleList, nn.Sequential)) and key.isdigit()
        groups.setdefault(reading.structure(child) if folds else key, []).append(key)
    for keys in groups.values():
        inner = [(_join_names(full, key), module.get_submodule(key)) for full, module in members for key in keys]
        part = "*" if len(keys) > 1 else keys[0]
        numbers = ranges(keys) if 1 < len(keys) < len(children) else "" if len(keys) > 1 else where
        yield from _grow_branches(reading, inner, _join_names(name, part), numbers, depth + 1)


def _join_names(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _make_branch(
    reading: _Reading, members: Sequence[tuple[str, nn.Module]], name: str, where: str, depth: int
) -> Branch:
    full, first = members[0]
    own = list(first.parameters(recurse=False))
    ties = [reading.owner[id(p)] for p in own if not reading.owner[id(p)].startswith(f"{full}.")]
    numbers = {id(p): p for _, module in members for p in module.parameters()}.values()
    matrices = [tuple(p.shape) for p in own if p.ndim >= 2]
    return Branch(
        name=name,
        where=where,
        kind=type(first).__name__,
        depth=depth,
        times=len(members),
        parameters=sum(p.numel() for p in numbers),
        bytes=sum(p.nbytes for p in numbers),
        flops=sum(reading.flops.get(n, 0) for n, _ in members),
        dtype=_list_dtypes(first),
        shape=matrices[0] if len(matrices) == 1 and not own_modules(first) else (),
        target=type(first).forward is not nn.Module.forward
        and all(reading.occurrences[id(m)] == 1 for _, m in members),
        tied=ties[0] if ties else "",
    )


def _make_parameter(
    reading: _Reading, members: Sequence[tuple[str, nn.Module]], key: str, position: tuple[str, str, int]
) -> Branch:
    parameter = members[0][1].get_parameter(key)
    owner = reading.owner[id(parameter)]
    return Branch(
        name=_join_names(position[0], key),
        where=position[1],
        kind="parameter",
        depth=position[2],
        times=len(members),
        parameters=parameter.numel() * len(members),
        bytes=parameter.nbytes * len(members),
        flops=0,
        dtype=str(parameter.dtype).removeprefix("torch."),
        shape=tuple(parameter.shape),
        target=False,
        tied=owner if owner != _join_names(members[0][0], key) else "",
    )


def _list_dtypes(module: nn.Module) -> str:
    return " ".join(sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()}))


def ranges(numbers: Sequence[str]) -> str:
    """Writes numbers as ranges: 0, 1, 2 and 5 become `0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


SECTIONS = ("configuration", "code", "modules", "tensors", "figures", "files")


def diff(a: Path, b: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns what differs between two model or adapter directories, by section.

    Every entry has `change` (`removed`, `added` or `changed`) and `name`. Configuration entries have `old` and `new`;
    code entries `text`, a unified diff; figures (`tensors kept`, `flops_per_token`) are those that were written down
    when an artifact was built; tensor entries dtypes and shapes and, where those allow, how far the values
    lie apart: `max_abs` and `relative` (norm of the difference by the norm in `a`), None where that is no number. Code
    is compared as text and never run; tensors are read one pair at a time.

    Raises:
        ArtifactError: one of them is no model or adapter directory.
    """
    first, second = _read_contents(a), _read_contents(b)
    result: dict[str, list[dict[str, Any]]] = {}
    for section in SECTIONS[:3]:
        result[section] = [
            {**_name_change(old, new), "name": name, **_describe_change(section, name, old, new)}
            for name, old, new in _pair_values(first[section], second[section])
        ]
    result["tensors"] = _tensor_changes(first["weights"], second["weights"])
    result["figures"] = [
        {**_name_change(old, new), "name": name, "old": old, "new": new}
        for name, old, new in _pair_values(first["figures"], second["figures"])
    ]
    result["files"] = [
        {**_name_change(old, new), "name": name} for name, old, new in _pair_values(first["files"], second["files"])
    ]
    return result


def _pair_values(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns what differs, with None for what is not there."""
    return [(name, a.get(name), b.get(name)) for name in sorted({**a, **b}) if a.get(name) != b.get(name)]


def _name_change(old: Any, new: Any) -> dict[str, str]:
    return {"change": "added" if old is None else "removed" if new is None else "changed"}


def _describe_change(section: str, name: str, old: Any, new: Any) -> dict[str, Any]:
    if section != "code":
        return {"old": old and old[0], "new": new and new[0]}
    lines = difflib.unified_diff(
        (old or "").splitlines(), (new or "").splitlines(), f"a/{name}", f"b/{name}", lineterm=""
    )
    return {"text": "\n".join(lines)}


def _read_contents(directory: Path) -> dict[str, Any]:
    """Reads what a directory holds; values of the configuration and modules stand in lists, so that None is a value."""
    if not files.is_directory(directory):
        raise ArtifactError(f"the directory {directory} does not exist; give two, or built-in bases as builtin:NAME")
    manifest.refuse_run(directory)
    edits = manifest.read(directory).edits if files.is_file(directory / manifest.NAME) else []
    names = [name for name in ("config.json", manifest.ADAPTER_CONFIG) if files.is_file(directory / name)]
    if not names:
        raise ArtifactError(f"{directory} holds neither config.json nor {manifest.ADAPTER_CONFIG}")
    values = files.document(directory / names[0])
    adapter = names[0] != "config.json"
    weights = [directory / manifest.ADAPTER_WEIGHTS] if adapter else checkpoint.weight_files(directory)
    code = sorted(directory.rglob("*.py"))
    listed_elsewhere = {
        *code,
        *weights,
        directory / checkpoint.INDEX,
        *(directory / name for name in _FILES_TOLD_ELSEWHERE),
    }
    others = sorted(path for path in directory.rglob("*") if path.is_file() and path not in listed_elsewhere)
    return {
        "configuration": {k: [v] for k, v in files.flatten(values).items() if k.split(".")[0] != "surgery"},
        "code": {str(path.relative_to(directory)): files.text(path) for path in code},
        "modules": _list_modules(edits),
        "figures": _read_figures(directory),
        "weights": weights,
        "files": {str(path.relative_to(directory)): hashing.digest_file(path) for path in others},
    }


def _read_figures(directory: Path) -> dict[str, int]:
    """Returns the numbers that were written down when an artifact was built: of the last surgery, and of the whole."""
    if not (directory / manifest.NAME).is_file():
        return {}
    steps = [step for step in manifest.read(directory).lineage if step.get("tensors") and step.get("cost")]
    if not steps:
        return {}
    counted = {f"tensors {key}": value for key, value in steps[-1]["tensors"].items()}
    return {**counted, **{key: value for key, value in steps[-1]["cost"].items() if isinstance(value, int)}}


def _list_modules(edits: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Returns what stands at each name that was changed, and how lists of layers were rearranged."""
    found = {name: [edit["new_class"]] for name, edit in ledger.new_modules(edits).items()}
    for edit in edits:
        if catalogue.of(edit).shapes:
            found.setdefault(edit["name"], [""])[0] += f" {edit['arguments']}"
    return found


def _tensor_changes(a: Sequence[Path], b: Sequence[Path]) -> list[dict[str, Any]]:
    """Compares tensor by tensor: by digests, which see every byte, and what differs then by its values, in pieces.

    Raises:
        ArtifactError: a file is truncated or not safetensors.
    """
    digests = [digest_cache.digests(paths, title=f"Digesting {paths[0].parent}") for paths in (a, b)]
    first, second = ({n: e for path in paths for n, e in format.read_header(path).items()} for paths in (a, b))
    differing = [n for n in sorted({**first, **second}) if digests[0].get(n) != digests[1].get(n)]
    total = sum(entry.shape.nbytes for name in differing if (entry := first.get(name)) is not None)
    with console.bytes_progress("Comparing values", total) as advance:
        changes = []
        for name in differing:
            old, new = first.get(name), second.get(name)
            changes.append({**_name_change(old, new), "name": name, **_describe_tensors(old, new)})
            advance(old.shape.nbytes if old is not None else 0)
        return changes


def _describe_tensors(old: Entry | None, new: Entry | None) -> dict[str, Any]:
    described = {
        f"{side}_{what}": value
        for side, entry in (("old", old), ("new", new))
        if entry is not None
        for what, value in (
            ("dtype", str(entry.shape.dtype).removeprefix("torch.")),
            ("shape", list(entry.shape.sizes)),
        )
    }
    if old is None or new is None or old.shape.sizes != new.shape.sizes or not old.shape.nbytes:
        return described
    largest, apart, norm = 0.0, 0.0, 0.0
    for x, y in zip(old.values(CHUNK), new.values(CHUNK), strict=True):
        x, difference = x.double(), y.double() - x.double()
        largest = max(largest, float(difference.abs().nan_to_num(torch.inf).max()))
        apart += float((difference * difference).sum())
        norm += float((x * x).sum())
    relative = (apart / norm) ** 0.5 if norm else math.inf
    figures = {"max_abs": largest, "relative": relative}
    return {**described, **{key: value if math.isfinite(value) else None for key, value in figures.items()}}
