"""Changes a network as its configuration says: the same code in memory, at surgery, and in every artifact.

Artifacts carry a copy of this file, so it depends on torch and transformers alone. An entry of `config.surgery` has
`operation`, `modules` (full names) and what that operation needs besides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def operate(model: PreTrainedModel, classes: dict[str, type[nn.Module]], prefix: str | None = None) -> None:
    """Makes every change in order.

    With a `prefix`, only those whose names begin with it are made, to the model without its head, where names lack it.
    """
    part = model if prefix is None else model.base_model
    for edit in model.config.surgery or []:
        names = [name.removeprefix(prefix or "") for name in edit["modules"] if name.startswith(prefix or "")]
        OPERATIONS[edit["operation"]](part, names, {**edit, "prefix": prefix or ""}, classes)


@contextmanager
def unchanged(model: Any, config: PreTrainedConfig, base: type[PreTrainedConfig]) -> Iterator[None]:
    """Makes the configuration, in place, what it was before all changes, while the base's constructor builds `model`.

    That constructor may look its parts up by the configuration's class, or insist on it; the configuration's own class
    comes back afterwards. The changes that follow set what they change of its values (`after`) themselves, each as it
    met it at surgery.
    """
    own = config.__class__
    for edit in reversed(config.surgery or []):
        assign(config, edit.get("before", {}))
    config.__class__ = base
    vars(model)["config_class"] = base
    try:
        yield
    finally:
        config.__class__ = own
        del vars(model)["config_class"]


def assign(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """Sets values by dotted keys (`text_config.num_hidden_layers`), without a copy of the configuration."""
    for path, value in values.items():
        *parents, key = path.split(".")
        owner = config
        for part in parents:
            owner = getattr(owner, part)
        setattr(owner, key, value)


def replace(model: PreTrainedModel, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Puts a new module in the place of each named one."""
    for name in names:
        new = construct(model, name, classes[edit["class"]], edit["supplied"], edit["arguments"])
        place(model, name, new)


def place(model: PreTrainedModel, name: str, new: nn.Module) -> None:
    """Puts a module at a place.

    What holds it is not initialised any more, because the family's code for that may know its old parts; unless it has
    buffers of its own, which that code may fill after loading.
    """
    model.set_submodule(name, new, strict=True)
    holder = model.get_submodule(name.rpartition(".")[0])
    if not any(True for _ in holder.buffers(recurse=False)):
        holder._is_hf_initialized = True


def share(model: PreTrainedModel, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Puts one new module in the places of all named ones; it is built for the first."""
    if names:
        new = construct(model, names[0], classes[edit["class"]], edit["supplied"], edit["arguments"])
        for name in names:
            place(model, name, new)


def shared_keys(model: PreTrainedModel) -> dict[str, str]:
    """Maps every tensor name of a module that stands at several places, in its later ones, to its name in the first."""
    first: dict[int, str] = {}
    keys: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        original = first.setdefault(id(module), name)
        if original != name:
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            keys |= {f"{name}.{key}": f"{original}.{key}" for key, _ in own}
    return keys


def rearrange(model: PreTrainedModel, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Gives lists of layers another order: `order` names, for each new place, the layer that comes there, again or not.

    A layer that comes again is copied. Numbers that say where a layer stands (`index`) become those of the new places.
    """
    for name in names:
        old = model.get_submodule(name)
        new = type(old)()
        for place, source in enumerate(edit["order"]):
            layer = twin(old[source]) if source in edit["order"][:place] else old[source]
            for path in edit["index"]:
                renumber(layer, path, place)
            new.append(layer)
        model.set_submodule(name, new, strict=True)
    assign(model.config, edit["after"])


def twin(layer: nn.Module) -> nn.Module:
    """Copies a layer, but not the configuration that it shares with the whole model."""
    configs = [v for m in layer.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]
    return deepcopy(layer, {id(config): config for config in configs})


def renumber(layer: nn.Module, path: str, place: int) -> None:
    """Sets the number at a dotted path within a layer, where the layer has it."""
    owner, _, key = path.rpartition(".")
    holder = dict(layer.named_modules()).get(owner)
    if holder is not None and key in vars(holder):
        setattr(holder, key, place)


def add(model: PreTrainedModel, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Adds modules that read what another module returns; the model's outputs carry what they return, by name."""
    for name in names:
        head = construct(model, name, classes[edit["class"]], edit["supplied"], edit["arguments"])
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).add_module(child, head)
        listen(model, name, edit["reads"].removeprefix(edit["prefix"]), head)


def listen(model: PreTrainedModel, name: str, reads: str, head: nn.Module) -> None:
    """Has a head called with what the module `reads` returns, and its answer put into the model's outputs."""
    answers: dict[str, Any] = {}

    def start(*_: Any) -> None:
        """Waits for an answer while the whole model runs (a trainer may run a part of it only)."""
        answers[name] = None

    def read(_module: nn.Module, _args: Any, output: Any) -> None:
        """Asks the head."""
        answer = head(output[0] if isinstance(output, (tuple, list)) else output)
        if name in answers:
            answers[name] = answer

    def speak(_module: nn.Module, _args: Any, outputs: Any) -> Any:
        """Adds the answer to the outputs."""
        answer = answers.pop(name)
        if isinstance(outputs, tuple):
            return (*outputs, answer)
        outputs[name] = answer
        return outputs

    model.register_forward_pre_hook(start)
    model.get_submodule(reads).register_forward_hook(read)
    model.register_forward_hook(speak)


OPERATIONS = {"replace": replace, "share": share, "rearrange": rearrange, "add": add}


def construct(
    model: PreTrainedModel, name: str, module: type[nn.Module], supplied: list[str], arguments: dict[str, Any]
) -> Any:
    """Builds a module for the place `name`; `supplied` says which of its arguments come from the model."""
    supply = {"config": enclosing_config, "layer_idx": layer_index, "original": PreTrainedModel.get_submodule}
    return module(**{key: supply[key](model, name) for key in supplied}, **arguments)


def enclosing_config(model: PreTrainedModel, name: str) -> PreTrainedConfig:
    """Returns the configuration of the innermost `PreTrainedModel` that holds the place `name`."""
    config, module = model.config, model
    for part in name.split(".")[:-1]:
        module = module.get_submodule(part)
        config = module.config if isinstance(module, PreTrainedModel) else config
    return config


def layer_index(_model: PreTrainedModel, name: str) -> int | None:
    """Returns the first number in a dotted module name, which is the layer's index; None without one."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
