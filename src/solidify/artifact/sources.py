"""The code of an artifact: the user's module files, made flat, and the two generated ones that build the model.

Goes in: a model, and the edits made to it. Comes out: file names with their text, and what config.json must say about
them. Source that could not travel is refused with the line at fault.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from solidify.artifact import tensors
from solidify.errors import ArtifactError, refuse
from solidify.model.surgery import Edit

_ALWAYS_THERE = {"torch", "transformers", "__future__"}


@dataclass(frozen=True)
class Sources:
    """The code of one artifact: `files` by name, the Auto classes it serves, what else it needs installed."""

    files: dict[str, str]
    model_type: str
    auto_map: dict[str, str]
    architectures: list[str]
    surgery: list[dict[str, Any]]
    requirements: dict[str, str]


def compile_sources(model: PreTrainedModel, edits: Sequence[Edit]) -> Sources:
    """Collects the edits' source files and generates the configuration and modelling files.

    Raises:
        ArtifactError: a class has no source file, a file imports what would not travel, two different files or
            classes share a name, or the model's own class is not one of transformers'.
    """
    head = type(model)
    if not head.__module__.startswith("transformers.models."):
        raise ArtifactError(
            f"{head.__name__} is not a class of transformers (it comes from {head.__module__}); "
            "a base that is itself remote code or a subclass of your own cannot be solidified yet"
        )
    classes = {edit.new_class: edit.module_class for edit in edits}
    faults = [
        f"two different classes are called {edit.new_class}; rename one"
        for edit in edits
        if classes[edit.new_class] is not edit.module_class
    ]
    user_files, requirements, found = _closure(list(classes.values()))
    refuse(ArtifactError, "the modules' source cannot travel with the artifact", faults + found)
    surgery = _surgery(edits)
    backbone, unpooled = _backbone(model, edits)
    stem = model.config.model_type.replace("-", "_")
    head_digest = tensors.digest_values([user_files, surgery, head.__name__])
    context = {
        "head": head.__name__,
        "backbone": backbone,
        "unpooled": unpooled,
        "prefix": head.base_model_prefix,
        "head_keys": _head_keys(model),
        "config": type(model.config).__name__,
        "stem": stem,
        "model_type": f"solid_{stem}_{head_digest[:8]}",
        "digest": head_digest,
        "classes": [
            {
                "name": name,
                "file": _stem(cls),
                "supplied": next(e.supplied for e in edits if e.new_class == name),
            }
            for name, cls in classes.items()
        ],
    }
    files = dict(user_files)
    for kind in ("configuration", "modeling"):
        files[f"{kind}_solid_{stem}.py"] = render(f"{kind}.py.jinja", **context)
    auto_map = {"AutoConfig": f"configuration_solid_{stem}.Solid{context['config']}"}
    for auto in auto_classes(model):
        auto_map[auto] = f"modeling_solid_{stem}.Solid{head.__name__}"
    if context["backbone"]:
        auto_map["AutoModel"] = f"modeling_solid_{stem}.Solid{context['backbone']}"
    return Sources(files, str(context["model_type"]), auto_map, [f"Solid{head.__name__}"], surgery, requirements)


def render(template: str, **context: Any) -> str:
    """Fills one of the templates beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=jinja2.select_autoescape(["html.jinja", "html"]),
    )
    return environment.get_template(template).render(**context)


def auto_classes(model: PreTrainedModel) -> list[str]:
    """Returns the names of the Auto classes that map the model's configuration to the model's own class.

    Reads the private `_model_mapping` of transformers 5.23's Auto classes: there is no public way to ask.
    """
    names = []
    for name, auto in vars(modeling_auto).items():
        if not (isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass)):
            continue
        mapping: Any = auto._model_mapping  # type: ignore[attr-defined]
        if mapping is None or type(model.config) not in mapping:
            continue
        mapped = mapping[type(model.config)]
        if type(model) in (mapped if isinstance(mapped, tuple) else (mapped,)):
            names.append(name)
    if not names:
        raise ArtifactError(f"no Auto class of transformers maps to {type(model).__name__}")
    return sorted(names)


def _backbone(model: PreTrainedModel, edits: Sequence[Edit]) -> tuple[str | None, bool]:
    """Returns the class name of the model without its head, and whether it must be built without a pooling layer.

    None where AutoModel would build another class, or the same with tensors that the model with its head does not have.
    """
    inner: Any = model.base_model
    mapping: Any = modeling_auto.AutoModel._model_mapping
    if inner is model or type(model.config) not in mapping:
        return None, False
    mapped = mapping[type(model.config)]
    if type(inner) not in (mapped if isinstance(mapped, tuple) else (mapped,)):
        return None, False
    prefix = model.base_model_prefix + "."
    wanted = {key.removeprefix(prefix) for key in _keys_before(model, edits) if key.startswith(prefix)}
    poolable = "add_pooling_layer" in inspect.signature(type(inner).__init__).parameters
    for options in ({}, {"add_pooling_layer": False}) if poolable else ({},):
        with torch.device("meta"):
            alone = type(inner)(inner.config, **options)
        if set(alone.state_dict()) == wanted:
            return type(inner).__name__, bool(options)
    return None, False


def _keys_before(model: PreTrainedModel, edits: Sequence[Edit]) -> set[str]:
    """Returns the tensor names that the model had before the edits were made."""
    keys = set(model.state_dict())
    for edit in reversed(edits):
        keys -= set(edit.tensors)
        keys |= {origin for origin in edit.tensors.values() if origin is not None} | set(edit.dropped)
    return keys


def _head_keys(model: PreTrainedModel) -> list[str]:
    """Returns patterns of the checkpoint's keys that belong to the head, which the backbone alone has no use for."""
    prefix = model.base_model_prefix + "."
    tops = {key.split(".")[0] for key in model.state_dict() if not key.startswith(prefix)}
    return [rf"^{re.escape(top)}(\.|$)" for top in sorted(tops)]


def _surgery(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Writes the edits as config.json holds them: one entry for all places that got the same class and arguments."""
    entries: list[dict[str, Any]] = []
    for edit in edits:
        last = entries[-1] if entries else None
        entry: dict[str, Any] = {"class": edit.new_class, "arguments": edit.arguments, "bypass": edit.bypass}
        if edit.frozen:
            entry["frozen"] = list(edit.frozen)
        if last is not None and entry == {key: value for key, value in last.items() if key != "modules"}:
            last["modules"].append(edit.name)
        else:
            entries.append({**entry, "modules": [edit.name]})
    return entries


def _stem(cls: type[nn.Module]) -> str:
    return Path(inspect.getsourcefile(cls) or "").stem


def _closure(classes: Sequence[type[nn.Module]]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Reads the files that define `classes` and, recursively, the files beside them that they import."""
    faults: list[str] = []
    queue: list[Path] = []
    for cls in classes:
        path = _source_file(cls, faults)
        if path is not None:
            queue.append(path)
    files: dict[str, str] = {}
    origins: dict[str, Path] = {}
    requirements: dict[str, str] = {}
    while queue:
        path = queue.pop()
        if path.name in origins:
            if origins[path.name] != path:
                faults.append(f"{path} and {origins[path.name]} share a name; rename one")
            continue
        origins[path.name] = path
        files[path.name] = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(files[path.name])):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                queue += _follow(node, path, requirements, faults)
    return dict(sorted(files.items())), dict(sorted(requirements.items())), faults


def _source_file(cls: type[nn.Module], faults: list[str]) -> Path | None:
    if cls.__module__ == "__main__":
        faults.append(f"{cls.__name__} is defined in __main__; move it to a .py file of its own and import it")
        return None
    if "<locals>" in cls.__qualname__:
        faults.append(f"{cls.__name__} is defined inside a function ({cls.__qualname__}); move it to module level")
        return None
    try:
        path = inspect.getsourcefile(cls)
    except (TypeError, OSError):
        path = None
    if path is None or not Path(path).is_file():
        faults.append(f"{cls.__name__} has no source file (module {cls.__module__}); define it in a .py file")
        return None
    return Path(path).resolve()


def _follow(
    node: ast.Import | ast.ImportFrom, path: Path, requirements: dict[str, str], faults: list[str]
) -> list[Path]:
    """Judges one import statement: a file to carry along, a package to record, or a fault."""
    where = f"{path.name}, line {node.lineno}"
    if isinstance(node, ast.ImportFrom) and node.level:
        beside = path.parent / f"{node.module}.py"
        if node.level == 1 and node.module and "." not in node.module and beside.is_file():
            return [beside]
        shown = f"from {'.' * node.level}{node.module or ''} import {', '.join(a.name for a in node.names)}"
        faults.append(f"{where}: `{shown}` cannot be carried; only `from .file import name` beside it can")
        return []
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    for name in names:
        top = name.split(".")[0]
        if top == "solidify":
            faults.append(f"{where}: it imports solidify, without which the artifact must load; copy what it needs")
        elif top not in sys.stdlib_module_names and top not in _ALWAYS_THERE:
            _require(top, where, path, requirements, faults)
    return []


def _require(top: str, where: str, path: Path, requirements: dict[str, str], faults: list[str]) -> None:
    distributions = packages_distributions().get(top)
    if distributions:
        requirements[distributions[0]] = version(distributions[0])
    elif (path.parent / f"{top}.py").is_file():
        faults.append(f"{where}: `{top}` stands beside it; import it relatively (`from .{top} import ...`)")
    elif importlib.util.find_spec(top) is not None:
        faults.append(f"{where}: `{top}` is your own code and would not travel; put what is needed beside the module")
    else:
        faults.append(f"{where}: `{top}` is not installed")
