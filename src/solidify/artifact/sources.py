"""The code of an artifact: the user's module files, made flat, and the generated ones that build the model.

Goes in: a model, and the edits made to it. Comes out: file names with their text, and what config.json must say about
them.
"""

from __future__ import annotations

import builtins
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import transformers
from transformers import PreTrainedModel

from solidify.artifact import autos, descent
from solidify.artifact.autos import Family
from solidify.artifact.descent import Ancestor
from solidify.model import assembling, cache_layers, operations
from solidify.source import closure
from solidify.surgery import catalogue, layer_types
from solidify.surgery.edit_record import Edit
from solidify.weights import hashing

OPERATIONS = "operations.py"
OLDEST = (5, 2)  # the transformers in which artifacts were seen to load; with 4.57 they end in errors of import
OLDEST_WITH_STATE = (5, 23)  # those whose modules keep state in the cache

# Names that the modelling file has of its own or of the files beside it; the others are those of Python.
_GENERATED = (
    "CLASSES",
    "Solid",
    "SolidPart",
    "operate",
    "unchanged",
    "shared_keys",
    "read_marks",
    "set_marks",
    *dir(builtins),
)


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
    """Collects the source that the changed model needs and generates its configuration and modelling files.

    Raises:
        ArtifactError: source that would not travel, or no Auto class that could load the model.
    """
    before = descent.trace(model, edits)
    family = autos.find(before)
    stem = before.config.model_type.replace("-", "_").replace(".", "_")
    configuration, modeling = f"configuration_solid_{stem}", f"modeling_solid_{stem}"
    model_class = next((c for c in before.head.__mro__ if c.__module__.startswith("transformers.models.")), before.head)
    bases = list(dict.fromkeys([before.head, *family.classes, model_class]))
    named = {cls.__name__ for cls in (*bases, *family.others.values(), type(before.config))}
    entries, classes = _make_entries(before, edits, {*named, *(f"Solid{name}" for name in named), *_GENERATED})
    reserved = [f"{configuration}.py", f"{modeling}.py", OPERATIONS]
    functions = [each for each in classes.values() if not isinstance(each, type)]
    kinds = [each for each in classes.values() if isinstance(each, type)]
    carried = closure.collect([*kinds, *bases, type(before.config)], functions=functions, reserved=reserved)
    stateful = any(layer_types.kind_of(cls) is not None for cls in kinds)
    files = {**carried.files, OPERATIONS: _write_operations(entries, stateful)}
    digest = hashing.digest_values([files, entries, before.head.__name__])
    config = type(before.config)
    ties = operations.shared_keys(model)
    shares = any({name, first}.isdisjoint(family.ties) for name, first in ties.items())
    marked = bool(operations.read_marks(model))
    prefix = None if family.backbone is None else family.prefix
    within = prefix is not None and all(name.startswith(prefix) for entry in entries for name in _list_names(entry))
    context = {
        "head": before.head.__name__,
        "family": model_class.__name__,
        "known": before.head is model_class and model_class.__module__.startswith("transformers."),
        "backbone": family.backbone.__name__ if family.backbone not in (None, before.head) else None,
        "unpooled": family.unpooled,
        "others": [cls.__name__ for cls in family.others.values()],
        "head_keys": _head_keys(model, prefix or ""),
        "prefix": json.dumps(prefix) if prefix is not None else "None",
        "outside": prefix is not None and not within,
        "shares": shares,
        "marked": marked,
        "tied_buffers": any(name in ties for name, _ in model.named_buffers(remove_duplicate=False)),
        "config": config.__name__,
        "config_module": _find_home(config, carried.modules),
        "classes": list(classes),
        "imports": _list_imports(
            carried.modules,
            classes,
            [*bases, config],
            {
                f".{configuration}": {f"Solid{config.__name__}"},
                f".{OPERATIONS.removesuffix('.py')}": {
                    "operate",
                    "unchanged",
                    *(["shared_keys"] if shares else []),
                    *(["read_marks", "set_marks"] if marked else []),
                },
            },
        ),
        "made_with": transformers.__version__,
        "model_type": f"solid_{stem}_{digest[:8]}",
        "digest": digest,
    }
    files[f"{configuration}.py"] = render("configuration.py.jinja", stateful=stateful, **context)
    files[f"{modeling}.py"] = render("modeling.py.jinja", **context)
    auto_map = {auto: f"{modeling}.Solid{cls.__name__}" for auto, cls in _map_served(before, family).items()}
    auto_map["AutoConfig"] = f"{configuration}.Solid{config.__name__}"
    heads = [f"Solid{before.head.__name__}"]
    return Sources(files, str(context["model_type"]), auto_map, heads, entries, carried.requirements)


def _write_operations(entries: Sequence[Mapping[str, Any]], stateful: bool) -> str:
    """Returns the code that makes the changes: what every artifact carries, and what its own operations bring.

    Modules that keep state in the cache bring the code that gives them their layers of it.
    """
    text, made = inspect.getsource(operations), dict.fromkeys(catalogue.of(entry) for entry in entries)
    if any(operation.builds for operation in made):
        text += f"\n\n{inspect.getsource(assembling)}"
    for operation in made:
        if (function := operation.carried()) is not None:
            text += f'\n\n{inspect.getsource(function)}\n\nOPERATIONS["{operation.recorded}"] = {function.__name__}\n'
    return text + (f"\n\n{inspect.getsource(cache_layers)}\n\nSETTLING.append(settle)\n" if stateful else "")


def render(template: str, *, stateful: bool = False, **context: Any) -> str:
    """Fills one of the templates beside this file; what is `stateful` needs a later transformers."""
    parts = OLDEST_WITH_STATE if stateful else OLDEST
    oldest = {"oldest": ".".join(map(str, parts)), "oldest_parts": parts}
    return _make_environment().get_template(template).render(**oldest, **context)


@cache
def _make_environment() -> jinja2.Environment:
    """Makes what compiles templates, and keeps those that it compiled."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=jinja2.select_autoescape(["html.jinja", "html"]),
    )


def _map_served(before: Ancestor, family: Family) -> dict[str, type[PreTrainedModel]]:
    """Returns the class that each Auto class leads to."""
    served = dict.fromkeys(family.heads, before.head) | family.others
    if "AutoModelForCausalLM" in served:
        # `transformers serve` (5.23) takes a model whose class is not in transformers through this Auto class alone.
        served["AutoModelForDecision"] = served["AutoModelForCausalLM"]
    return served | ({"AutoModel": family.backbone} if family.backbone else {})


def _head_keys(model: PreTrainedModel, prefix: str) -> list[str]:
    """Returns patterns of the checkpoint's keys that belong to the head, which no other class has a use for."""
    tops = {key.split(".")[0] for key in model.state_dict() if not key.startswith(prefix)}
    return [rf"^{re.escape(top)}(\.|$)" for top in sorted(tops)]


def _make_entries(
    before: Ancestor, edits: Sequence[Edit], taken: set[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the changes as config.json holds them, and the classes that they name.

    All modules that were treated alike, one after the other, are one entry. Classes of one name get different keys.
    """
    entries, classes = list(before.earlier), dict[str, Any](before.classes)
    for number, edit in enumerate(edits):
        entry: dict[str, Any] = {"operation": edit.operation, **edit.settings}
        if edit.module_class is not None:
            key = _make_key(edit.module_class, classes, taken)
            classes[key] = edit.module_class
            entry |= {"class": key, "supplied": list(edit.supplied), "arguments": edit.arguments, "bypass": edit.bypass}
        if edit.further:
            keys = [_make_key(cls, classes, taken) for cls in edit.further]
            classes |= dict(zip(keys, edit.further, strict=True))
            entry["classes"] = keys
        if edit.frozen:
            entry["frozen"] = list(edit.frozen)
        if edit.declares:
            entry["declares"] = dict(edit.declares)
        if edit.records:
            entry["records"] = True
        last = entries[-1] if number else {}
        if catalogue.of(entry).folds and entry == {k: v for k, v in last.items() if k != "modules"}:
            last["modules"].append(edit.name)
        else:
            entries.append({**entry, "modules": [edit.name]})
    return entries, classes


def _make_key(cls: Any, classes: Mapping[str, Any], taken: set[str]) -> str:
    """Returns the name by which config.surgery calls a class: its own, with a number when another has it."""
    number, key = 1, str(cls.__name__)
    while key in taken or classes.get(key, cls) is not cls:
        number += 1
        key = f"{cls.__name__}_{number}"
    return key


def _list_names(entry: dict[str, Any]) -> list[str]:
    reads = entry.get("reads", [])
    return [*entry["modules"], *([reads] if isinstance(reads, str) else reads)]


def _list_imports(
    modules: Mapping[Any, str], classes: Mapping[str, Any], bases: Sequence[type], wanted: dict[str, set[str]]
) -> list[tuple[str, list[str]]]:
    """Returns the import lines of the modelling file: packages first, then files beside it."""
    for base in bases:
        wanted.setdefault(_find_home(base, modules), set()).add(base.__name__)
    for key, cls in classes.items():
        wanted.setdefault(modules[cls], set()).add(cls.__name__ if key == cls.__name__ else f"{cls.__name__} as {key}")
    lines = sorted(wanted.items(), key=lambda line: (line[0].startswith("."), line[0]))
    return [(module, sorted(names)) for module, names in lines]


def _find_home(cls: type, modules: Mapping[Any, str]) -> str:
    """Returns the module to import a class from: transformers itself for what it exports."""
    return "transformers" if getattr(transformers, cls.__name__, None) is cls else modules[cls]
