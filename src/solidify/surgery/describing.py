"""How a module is built again: its class, and what its constructor is given, read off the module itself or told.

A description is plain values for a configuration: classes are numbers in a list beside it, and `supplied` is what the
model gives (its configuration, the layer's index, the module that stood there). Artifacts build modules by it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from solidify.model.assembling import Maker
from solidify.model.operations import enclosing_config, layer_index, put_module
from solidify.surgery import encoding
from solidify.surgery.constructing import SUPPLIED
from solidify.surgery.edit_record import Edit
from solidify.surgery.encoding import Classes
from solidify.upstream.torch import own_buffers, own_modules, own_parameters

WRAPPING = "_wrapping"  # attribute of a wrapped model: its record


def made_by(model: nn.Module) -> list[Edit]:
    """Returns the record that stands before all edits of a wrapped model; none for any other."""
    record = vars(model).get(WRAPPING)
    return [record] if record is not None else []


def assemble(model: Any, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> list[str]:
    """Builds modules as `arguments` describes them, and puts them at their names. Returns the names."""
    kinds = [classes[key] for key in edit.get("classes", [])]
    sources = {"original": type(model).get_submodule, "config": enclosing_config, "layer_idx": layer_index}
    for name in names:
        supplied = {key: partial(source, model, name) for key, source in sources.items()}
        put_module(model, name, Maker(kinds, supplied).build(edit["arguments"]))
    return names


def describe(
    name: str, module: nn.Module, given: Mapping[str, Any] | None, classes: Classes, original: nn.Module | None = None
) -> dict[str, Any]:
    """Says how a module is built: its class, and what its constructor is given; of a container, what it holds.

    With an `original`, which stood at the name, that, the configuration and the layer's index are supplied.
    """
    if type(module) is nn.Sequential:
        return _describe_sequence(name, "", module, given, classes, {})
    number = classes.number(type(module))
    if given is None:
        found = _infer_arguments(name, module, classes, original)
    else:
        found = _supply(module, original, given)
        found |= {key: encode(f"{name}: {key}", value, classes) for key, value in given.items()}
    return {"class": number, "arguments": found}


def _describe_sequence(
    name: str, place: str, module: nn.Module, given: Mapping[str, Any] | None, classes: Classes, met: dict[int, str]
) -> dict[str, Any]:
    """Describes children one by one; of one that stands there twice, also in another sequence inside, says where."""
    children: list[list[Any]] = []  # no mapping, whose keys transformers sorts in a configuration ("10" before "2")
    for key, child in own_modules(module).items():
        inside, where = f"{place}.{key}".lstrip("."), f"{name}.{key}"
        told = (given or {}).get(key)
        if child is None:
            children.append([key, None])
        elif (first := met.setdefault(id(child), inside)) != inside:
            children.append([key, {"at": first}])
        elif type(child) is nn.Sequential:
            children.append([key, _describe_sequence(where, inside, child, told, classes, met)])
        else:
            children.append([key, describe(where, child, told, classes)])
    return {"class": classes.number(type(module)), "children": children}


def _infer_arguments(name: str, module: nn.Module, classes: Classes, original: nn.Module | None) -> dict[str, Any]:
    """Reads the constructor's arguments off the attributes that have their names."""
    found = _supply(module, original, {})
    for key, parameter in _read_parameters(type(module)).items():
        if key in ("device", "dtype", *found) or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        value = _look_up(module, key, parameter.default)
        if value is parameter.empty:
            if required:
                classes.faults.append(
                    f"{name}: its class {type(module).__name__} was made with {key!r}, which it does not keep as an "
                    f"attribute; say it: arguments={classes.ask(name, key)}"
                )
        elif required or value is not parameter.default:
            found[key] = encode(f"{name}: {key}", value, classes)
    return found


def _read_parameters(kind: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Returns what a constructor takes, without `self`; torch's recurrent layers hand theirs on to a common one."""
    constructor = kind.__init__
    recurrent = kind in (nn.RNN, nn.LSTM, nn.GRU)
    found = dict(inspect.signature(nn.RNNBase.__init__ if recurrent else constructor).parameters)
    if recurrent:
        mode = found.pop("mode")
        found |= {"nonlinearity": mode.replace(name="nonlinearity", default="tanh")} if kind is nn.RNN else {}
    return dict(list(found.items())[1:])


def _supply(module: nn.Module, original: nn.Module | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that the model gives: by their names, or because the module keeps the original so."""
    if original is None:
        return {}
    found: dict[str, Any] = {}
    children = own_modules(module)
    for key in list(inspect.signature(type(module).__init__).parameters)[1:]:
        child = children.get(key)
        if key in given:
            continue
        if key in SUPPLIED and (child is None or not describes_another(child, original)):
            found[key] = {"supplied": key}
        elif child is not None and not describes_another(child, original):
            found[key] = {"supplied": "original"}
        elif isinstance(vars(module).get(key), PreTrainedConfig):
            found[key] = {"supplied": "config"}
    return found


def describes_another(module: nn.Module, original: nn.Module) -> bool:
    """Returns whether a module is of another class, or made otherwise, than the one that stood at the name."""
    if type(module) is not type(original) or module.extra_repr() != original.extra_repr():
        return True
    mine, theirs = (each.named_modules(remove_duplicate=False) for each in (module, original))
    return [(name, type(part)) for name, part in mine] != [(name, type(part)) for name, part in theirs]


def _look_up(module: nn.Module, key: str, default: Any) -> Any:
    """Returns the value of an attribute; whether it is there, where that was asked; empty where nothing tells."""
    filled = any(table.get(key) is not None for table in (own_parameters(module), own_buffers(module)))
    if isinstance(default, bool) and (filled or getattr(module, key, False) is None):
        return filled
    for word in (key, f"_{key}"):
        if word in vars(module):
            return vars(module)[word]
    child = own_modules(module).get(key)
    return inspect.Parameter.empty if child is None else child


def encode(where: str, value: Any, classes: Classes) -> Any:
    """Writes a value for a configuration; modules as their constructors make them."""
    return encoding.encode(where, value, classes, lambda name, module: describe(name, module, None, classes))
