"""A module of plain torch (or timm, or torchvision) becomes a model of transformers that surgery and adapters know.

What its class is made with is read off the module, or given, and tried: the module is built again, and must be the same
in its parts and in what it returns. The artifact builds it so too; it carries the classes' source.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import ModelError, refuse
from solidify.model import anatomy
from solidify.modules import wrapped_module
from solidify.surgery.replacing import Edit
from solidify.system import foreign

NAME = "module"  # where it stands in the model
_WRAPPING = "_wrapping"  # attribute of a wrapped model: the record
_PLAIN = (bool, int, float, str, type(None))
_KINDS: dict[str, type[wrapped_module.Wrapped]] = {
    "pixel_values": wrapped_module.WrappedForImageClassification,
    "input_ids": wrapped_module.WrappedForSequenceClassification,
    "inputs": wrapped_module.WrappedModel,
}
_AUTOS = {
    "pixel_values": "AutoModelForImageClassification",
    "input_ids": "AutoModelForSequenceClassification",
    "inputs": "AutoModel",
}


def wrap(
    module: nn.Module,
    example_inputs: torch.Tensor | Mapping[str, torch.Tensor],
    *,
    arguments: Mapping[str, Any] | None = None,
    problem_type: str | None = None,
) -> PreTrainedModel:
    """Puts a module into a model of transformers, in evaluation mode, and returns that; the module itself is used.

    `example_inputs` is one batch of what the module takes: (batch_size, channels, height, width) floats are images
    (`pixel_values`), (batch_size, sequence_length) integers are tokens (`input_ids`), all else is `inputs`; a mapping
    of one name says which. `arguments` are those of the module's constructor where they cannot be read off its
    attributes; classes among them are allowed, and for a `nn.Sequential` they are given by the child's name.
    `problem_type` says which loss labels have, as transformers' classifiers do (left out, it follows from the labels).

    `solidify.build(model, edits, directory)` writes it, with or without edits. Surgery names what is inside `module.`.

    Raises:
        ModelError: the module takes several inputs or returns no tensor, what its constructor was given is not known,
            or, built again, it is not the same. All reasons together.
    """
    if isinstance(module, PreTrainedModel):
        raise ModelError(f"{type(module).__name__} is a model of transformers already; use it as it is")
    name, given = _read_example(example_inputs)
    classes = _Classes()
    tree = _describe(NAME, module, arguments, classes)
    refuse(ModelError, f"{type(module).__name__} cannot be wrapped", classes.faults)
    before = _call(module, given)
    _refuse_unlike(module, tree, classes, given, before)
    config = wrapped_module.WrappedConfig(
        example_inputs=_describe_input(name, given),
        num_labels=before.shape[-1] if before.ndim == 2 else 1,
        problem_type=problem_type,
        dtype=next((p.dtype for p in module.parameters()), torch.float32),
    )
    kind = _KINDS[name]
    config.auto_map = {auto: f"wrapped_module.{kind.__name__}" for auto in dict.fromkeys(("AutoModel", _AUTOS[name]))}
    model: Any = kind(config)
    model.module = module
    vars(model)[_WRAPPING] = _record(module, tree, classes)
    found: PreTrainedModel = model.eval()
    return found


def made_by(model: nn.Module) -> list[Edit]:
    """Returns the record that stands before all edits of a wrapped model; none for any other."""
    record = vars(model).get(_WRAPPING)
    return [record] if record is not None else []


def assemble(model: Any, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> list[str]:
    """Builds the modules that were put into a model of transformers, as `arguments` says. Returns their names."""
    kinds = [classes[key] for key in edit["classes"]]

    def make(value: Any) -> Any:
        """Makes what a value stands for: a module, a class, or itself."""
        if isinstance(value, list):
            return [make(each) for each in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"class"}:
            return kinds[value["class"]]
        if "class" not in value:
            return {key: make(each) for key, each in value["mapping"].items()}
        made = kinds[value["class"]](**{key: make(each) for key, each in value.get("arguments", {}).items()})
        for key, child in value.get("children", {}).items():
            made.add_module(key, make(child))
        return made

    for name in names:
        model.set_submodule(name, make(edit["arguments"]), strict=True)
    return names


@dataclass
class _Classes:
    """The classes that a description speaks of by number, and what could not be described."""

    found: list[type] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def number(self, cls: type) -> int:
        """Returns the number of a class."""
        if cls not in self.found:
            self.found.append(cls)
        return self.found.index(cls)


def _read_example(example: torch.Tensor | Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    if isinstance(example, Mapping):
        if len(example) != 1 or next(iter(example)) not in _KINDS:
            raise ModelError(
                f"example_inputs names {', '.join(map(str, example)) or 'nothing'}; wrap takes one of "
                f"{', '.join(_KINDS)} (a module of several inputs goes into one of your own that takes one)"
            )
        ((name, tensor),) = example.items()
    else:
        name, tensor = "", example
    if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2:
        raise ModelError("example_inputs is a tensor with the batch as its first axis, as the module takes it")
    if not name:
        images = tensor.is_floating_point() and tensor.ndim == 4
        name = "pixel_values" if images else "input_ids" if _is_tokens(tensor) else "inputs"
    return name, tensor


def _is_tokens(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.ndim == 2


def _describe_input(name: str, given: torch.Tensor) -> dict[str, Any]:
    whole = not given.is_floating_point()
    return {
        "name": name,
        "shape": list(given.shape[1:]),
        "dtype": str(given.dtype).removeprefix("torch."),
        "below": int(given.max()) + 1 if whole and given.numel() else None,
    }


def _describe(name: str, module: nn.Module, given: Mapping[str, Any] | None, classes: _Classes) -> dict[str, Any]:
    """Says how a module is built: its class, and what its constructor is given; of a container, what it holds."""
    number = classes.number(type(module))
    if type(module) is nn.Sequential:
        children = {
            key: _describe(f"{name}.{key}", child, (given or {}).get(key), classes)
            for key, child in module.named_children()
        }
        return {"class": number, "children": children}
    if given is None:
        found = _infer_arguments(name, module, classes)
    else:
        found = {key: _encode(f"{name}: {key}", value, classes) for key, value in given.items()}
    return {"class": number, "arguments": found}


def _infer_arguments(name: str, module: nn.Module, classes: _Classes) -> dict[str, Any]:
    """Reads the constructor's arguments off the attributes that have their names."""
    found: dict[str, Any] = {}
    for key, parameter in list(inspect.signature(type(module).__init__).parameters.items())[1:]:
        if key in ("device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        value = _look_up(module, key, parameter.default)
        if value is parameter.empty:
            if required:
                classes.faults.append(
                    f"{name}: its class {type(module).__name__} was made with {key!r}, which it does not keep as an "
                    f"attribute; say it: arguments={{{key!r}: ...}}"
                )
        elif required or value is not parameter.default:
            found[key] = _encode(f"{name}: {key}", value, classes)
    return found


def _look_up(module: nn.Module, key: str, default: Any) -> Any:
    """Returns the value of an attribute; whether it is there, where that was asked; empty where nothing tells."""
    held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if isinstance(default, bool) and (key in held or getattr(module, key, False) is None):
        return key in held
    for word in (key, f"_{key}"):
        if word in vars(module):
            return vars(module)[word]
    children = dict(module.named_children())
    return children.get(key, inspect.Parameter.empty)


def _encode(where: str, value: Any, classes: _Classes) -> Any:
    """Writes a value for a configuration: plain ones, lists and mappings of them, modules, classes."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [_encode(where, each, classes) for each in value]
    if isinstance(value, nn.Module):
        return _describe(where, value, None, classes)
    if isinstance(value, type):
        return {"class": classes.number(value)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: _encode(where, each, classes) for key, each in value.items()}}
    classes.faults.append(
        f"{where} is {type(value).__name__}, which config.json cannot hold: only numbers, texts, lists, modules and "
        "classes; have the class make it from such"
    )
    return None


def _call(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Returns what the module makes of the example, in evaluation mode."""
    with torch.no_grad(), anatomy.evaluation(module):
        outcome = foreign.attempt(module, given)
    if outcome.error is not None:
        raise ModelError(f"the module does not run on example_inputs: {foreign.said(outcome.error)}")
    if not isinstance(outcome.value, torch.Tensor):
        raise ModelError(
            f"{type(module).__name__} returns {type(outcome.value).__name__}; a module that is wrapped returns one "
            "tensor: put it into one of your own that does"
        )
    return outcome.value


def _refuse_unlike(
    module: nn.Module, tree: dict[str, Any], classes: _Classes, given: torch.Tensor, before: torch.Tensor
) -> None:
    """Builds the module once more, and compares parts, state, and what it returns."""
    title = f"{type(module).__name__} cannot be wrapped: built again by its class, it is not the same"
    with torch.random.fork_rng([]):
        holder = nn.Module()
        holder.add_module(NAME, nn.Identity())
        entry = {"classes": [str(n) for n in range(len(classes.found))], "arguments": tree}
        kinds = {str(number): cls for number, cls in enumerate(classes.found)}
        built = foreign.attempt(assemble, holder, [NAME], entry, kinds)
    remedy = "; say with arguments={...} what its constructor was given, or put the change into the class"
    if built.error is not None:
        raise ModelError(f"{title}: {foreign.said(built.error)}{remedy}")
    again = holder.get_submodule(NAME)
    faults = [*_part_faults(module, again)]
    if not faults:
        again.to(next((p.dtype for p in module.parameters()), torch.float32))
        again.load_state_dict(copy.deepcopy(module.state_dict()))
        after = _call(again, given)
        if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-4, atol=1e-5, equal_nan=True):
            faults.append("with the same weights, it returns something else on example_inputs")
    refuse(ModelError, title + remedy, faults[:8])


def _part_faults(module: nn.Module, again: nn.Module) -> Iterator[str]:
    """Compares the modules inside, their plain attributes and settings, and the tensors by name and shape."""
    mine, theirs = dict(module.named_modules()), dict(again.named_modules())
    for name, part in mine.items():
        where = f"{NAME}.{name}" if name else NAME
        other = theirs.get(name)
        if other is None or type(other) is not type(part):
            yield f"{where} is {type(part).__name__}, and {type(other).__name__ if other is not None else 'nothing'}"
            continue
        if part.extra_repr() != other.extra_repr():
            yield f"{where} is {part.extra_repr()}, and {other.extra_repr()}"
        if "forward" in vars(part):
            yield f"{where} has a forward of its own, set on the instance"
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if hooks:
            yield f"{where} has hooks, which its class does not register"
        for key, value in vars(part).items():
            plain = isinstance(value, _PLAIN) and key != "training" and not key.startswith("_")
            if plain and vars(other).get(key) != value:
                yield f"{where}.{key} is {value!r}, and {vars(other).get(key)!r}"
    for name in theirs.keys() - mine.keys():
        yield f"{NAME}.{name} is nothing, and {type(theirs[name]).__name__}"
    shapes = [{key: tuple(t.shape) for key, t in each.state_dict().items()} for each in (module, again)]
    for key in sorted({**shapes[0], **shapes[1]}):
        if shapes[0].get(key) != shapes[1].get(key):
            yield f"{NAME}.{key} has shape {shapes[0].get(key)}, and {shapes[1].get(key)}"


def _record(module: nn.Module, tree: dict[str, Any], classes: _Classes) -> Edit:
    names = [f"{NAME}.{key}" for key in module.state_dict()]
    count = anatomy.count(module.parameters())
    return Edit(
        name=NAME,
        old_class="Identity",
        module_class=type(module),
        arguments=tree,
        supplied=(),
        tensors={name: name for name in names},
        dropped=(),
        frozen=(),
        parameters_before=count,
        parameters_after=count,
        probed=True,
        identical=True,
        bypass=False,
        operation="wrap",
        further=tuple(classes.found),
    )
