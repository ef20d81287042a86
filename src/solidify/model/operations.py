"""Changes a network as its configuration says: the same code in memory, at surgery, and in every artifact.

Artifacts carry a copy of this file, so it depends on torch and transformers alone. An entry of `config.surgery` has
`operation`, `modules` (full names) and what that operation needs besides.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import output_capturing  # how outputs are recorded in transformers 5.23; there is no public way

NO_MARKS = ("_is_hf_initialized", "_is_buffer", "persistent")  # what loading and registering set on tensors


def operate(model: PreTrainedModel, classes: dict[str, type[nn.Module]], prefix: str | None = None) -> None:
    """Makes every change in order.

    With a `prefix`, only those whose names begin with it are made, to the model without its head, where names lack it.
    """
    part = model if prefix is None else model.base_model
    edits = model.config.surgery or []
    before = recorders(part) if any(edit.get("records") for edit in edits) else None
    inside: list[str] = []
    for edit in edits:
        names = [name.removeprefix(prefix or "") for name in edit["modules"] if name.startswith(prefix or "")]
        inside += OPERATIONS[edit["operation"]](part, names, {**edit, "prefix": prefix or ""}, classes) or []
        assign(model.config, edit.get("after", {}))
        set_attributes(model, edit.get("attributes", {}), prefix)
    if before is not None:
        record_again(part, before, inside)
    for settle in SETTLING:
        settle(model)
    withhold(model, {key for edit in edits for key, kept in (edit.get("declares") or {}).items() if not kept})


SETTLING: list[Any] = []  # what is done once all changes are made, by what an artifact carries behind this file


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


def set_attributes(model: PreTrainedModel, values: dict[str, Any], prefix: str | None = None) -> None:
    """Sets attributes of modules by full dotted names; a model without its head has none of the head's."""
    headless = prefix is not None and model.base_model is model
    for path, value in values.items():
        if headless and not path.startswith(str(prefix)):
            continue
        owner, _, key = (path.removeprefix(str(prefix)) if headless else path).rpartition(".")
        setattr(model.get_submodule(owner), key, value)


def replace(model: PreTrainedModel, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> list[str]:
    """Puts a new module in the place of each named one; returns the names."""
    for name in names:
        new = construct(model, name, classes[edit["class"]], edit["supplied"], edit["arguments"])
        put_module(model, name, new)
    return names


def put_module(model: PreTrainedModel, name: str, new: nn.Module) -> None:
    """Puts a module at a module name.

    What holds it is not initialised any more, because the family's code for that may know its old parts; unless it has
    buffers of its own, which that code may fill after loading.
    """
    stand_in(model.get_submodule(name), new)
    model.set_submodule(name, new, strict=True)
    holder = model.get_submodule(name.rpartition(".")[0])
    if not any(True for _ in holder.buffers(recurse=False)):
        holder._is_hf_initialized = True


def stand_in(old: nn.Module, new: nn.Module) -> None:
    """Hands on what is of the place: a declared mask, unless the old module still stands within the new one.

    A module that was put around a whole model answers for it where the model that holds it asks for these.
    """
    if not any(inner is old for inner in new.modules()):
        for hook in [hook for hook in old._forward_pre_hooks.values() if hasattr(hook, "solid_mask")]:
            new.register_forward_pre_hook(hook, with_kwargs=True)
    if isinstance(old, PreTrainedModel) and any(inner is old for inner in new.modules()):
        for key in ("config", "get_input_embeddings", "set_input_embeddings"):
            if not hasattr(new, key):
                vars(new)[key] = getattr(old, key)


def share(model: PreTrainedModel, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> list[str]:
    """Replaces all named modules by one new module, which is built for the first. Returns the names."""
    if names:
        new = construct(model, names[0], classes[edit["class"]], edit["supplied"], edit["arguments"])
        for name in names:
            put_module(model, name, new)
    return names


def shared_keys(model: nn.Module) -> dict[str, str]:
    """Maps the later names of a tensor that stands at several places, alone or with its module, to the first."""
    first: dict[int, str] = {}
    keys: dict[str, str] = {}
    for table in (model.named_parameters, model.named_buffers):
        for name, tensor in table(remove_duplicate=False):
            original = first.setdefault(id(tensor), name)
            if original != name:
                keys[name] = original
    return keys


def list_marks(tensor: torch.Tensor) -> dict[str, Any]:
    """Returns what is set on a parameter or buffer, as for an optimizer (`_no_weight_decay`)."""
    return {key: value for key, value in vars(tensor).items() if key not in NO_MARKS}


def read_marks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns what is set on a model's parameters and buffers, by their names: loading puts others in their places."""
    tables = (model.named_parameters, model.named_buffers)
    found = {name: list_marks(tensor) for table in tables for name, tensor in table(remove_duplicate=False)}
    return {name: marks for name, marks in found.items() if marks}


def set_marks(model: nn.Module, marks: dict[str, dict[str, Any]]) -> None:
    """Sets on a model's parameters and buffers what was set on those of these names, where they are still there."""
    for table in (model.named_parameters, model.named_buffers):
        for name, tensor in table(remove_duplicate=False):
            vars(tensor).update(marks.get(name, {}))


def rearrange(model: PreTrainedModel, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Gives lists of layers another order: `order` names, for each new index, the layer that comes there, again or not.

    A layer that comes again is copied. Numbers that say where a layer stands (`index`) become those of the new order.
    """
    for name in names:
        old = model.get_submodule(name)
        new = type(old)()
        for index, source in enumerate(edit["order"]):
            layer = twin(old[source]) if source in edit["order"][:index] else old[source]
            for path in edit["index"]:
                renumber(layer, path, index)
            new.append(layer)
        model.set_submodule(name, new, strict=True)


def twin(layer: nn.Module) -> nn.Module:
    """Copies a layer, but not the configuration that it shares with the whole model."""
    configs = [v for m in layer.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]
    return deepcopy(layer, {id(config): config for config in configs})


def renumber(layer: nn.Module, path: str, index: int) -> None:
    """Sets the number at a dotted path within a layer, where the layer has it."""
    owner, _, key = path.rpartition(".")
    holder = dict(layer.named_modules()).get(owner)
    if holder is not None and key in vars(holder):
        setattr(holder, key, index)


def recorders(model: PreTrainedModel) -> dict[str, tuple[nn.Module, list[Any]]]:
    """Returns what transformers records (hidden states, attentions, router logits): name -> module, and its hooks."""
    output_capturing.maybe_install_capturing_hooks(model)
    found = {name: (m, [h for h in m._forward_hooks.values() if _is_recorder(h)]) for name, m in model.named_modules()}
    return {name: recorded for name, recorded in found.items() if recorded[1]}


def forget(model: PreTrainedModel) -> None:
    """Takes the hooks away by which transformers records outputs; it installs them anew when it is first asked."""
    for module in model.modules():
        for number in [number for number, hook in module._forward_hooks.items() if _is_recorder(hook)]:
            del module._forward_hooks[number]
        if "_output_capturing_hooks_installed" in vars(module):
            module._output_capturing_hooks_installed = False


def record_again(model: PreTrainedModel, before: dict[str, tuple[nn.Module, list[Any]]], replaced: list[str]) -> bool:
    """Records at every module that stands where one was recorded `before`, and no longer inside of it.

    transformers records by class and name, once and for all. Within a `replaced` module it does so anew; a module that
    was recorded before and was kept there stays recorded. Returns whether that differs from what transformers does by
    itself; if not, it is left to do so when it is first asked.
    """
    forget(model)
    alone = _collect_recorded(model)
    modules = dict(model.named_modules())
    recorded: dict[str, set[Any]] = {}
    for name, (_, hooks) in before.items():
        if name in modules and not any(name.startswith(f"{outer_name}.") for outer_name in replaced):
            recorded[name] = {_find_output(hook) for hook in hooks}
            for hook in hooks:
                _record_at(modules[name], hook)
    kept = {id(module) for module in modules.values()}
    for name, (module, hooks) in before.items():
        outer = next((outer_name for outer_name in replaced if name.startswith(f"{outer_name}.")), None)
        if outer is None or id(module) not in kept:
            continue
        now = {_find_output(hook) for hook in module._forward_hooks.values() if _is_recorder(hook)}
        for hook in hooks:
            if _find_output(hook) not in now | recorded.get(outer, set()):
                module.register_forward_hook(hook)
    differs = _collect_recorded(model) != alone
    if not differs:
        forget(model)
    return differs


def _collect_recorded(model: PreTrainedModel) -> dict[str, set[Any]]:
    """Returns which outputs are recorded at which module."""
    return {name: {_find_output(hook) for hook in hooks} for name, (_, hooks) in recorders(model).items()}


def _record_at(module: nn.Module, hook: Any) -> None:
    """Has a module recorded by a hook, and nothing inside of it for the same output."""
    for inner in module.modules():
        for number, other in list(inner._forward_hooks.items()):
            if _is_recorder(other) and _find_output(other) == _find_output(hook):
                del inner._forward_hooks[number]
    module.register_forward_hook(hook)


def _is_recorder(hook: Any) -> bool:
    return bool(getattr(hook, "__module__", "") == output_capturing.__name__)


def _find_output(hook: Any) -> Any:
    """Returns which output a hook records."""
    names = hook.__code__.co_freevars
    return hook.__closure__[names.index("key")].cell_contents if "key" in names else None


def withhold(model: PreTrainedModel, lost: set[str]) -> None:
    """Has a model refuse what its changes say that they do not keep: a cache, outputs that are recorded no more.

    Without a cache it generates without one; assisted generation, which takes positions back, asks `_is_stateful`.
    """
    if "crop" in lost:
        model._is_stateful = True
    if "cache" in lost:
        for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            if hasattr(config, "use_cache"):
                config.use_cache = False
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.use_cache = False
    if not lost & {"cache", *RECORDED}:
        return
    for part in {id(part): part for part in (model, model.base_model)}.values():
        kept = [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, Withholding)]
        if kept:
            kept[0].lost |= lost
        else:
            part.register_forward_pre_hook(Withholding(lost), with_kwargs=True)


RECORDED = ("hidden_states", "attentions", "router_logits")


class Withholding:
    """Refuses calls that ask for what a model does not keep, which it would answer wrongly, or not fully."""

    def __init__(self, lost: set[str]) -> None:
        self.lost = set(lost)

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Looks at a call."""
        name = type(model).__name__
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        caches = any(given.get(key) is not None for key in ("past_key_values", "cache_params"))
        if "cache" in self.lost and (caches or given.get("use_cache")):
            raise ValueError(
                f"{name} keeps no cache (its surgery declares it): call it, or generate, with use_cache=False"
            )
        for key in RECORDED:
            flag = f"output_{key}"
            asked = given.get(flag)
            if key in self.lost and (getattr(model.config, flag, False) if asked is None else asked):
                raise ValueError(
                    f"{name} does not record all {key} (config.surgery names the modules that return none): call it "
                    f"without {flag}" + ("; a trainer needs router_aux_loss_coef=0.0" if key == "router_logits" else "")
                )


def add(model: PreTrainedModel, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Adds modules that read what others return; the model's outputs carry what they return, by name."""
    for name in names:
        head = construct(model, name, classes[edit["class"]], edit["supplied"], edit["arguments"])
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).add_module(child, head)
        if hasattr(head, "join"):  # it tells the model, or its configuration, what transformers must know of it
            head.join(model, name)
        many = not isinstance(edit["reads"], str)
        reads = [read.removeprefix(edit["prefix"]) for read in (edit["reads"] if many else [edit["reads"]])]
        Listener(model, name, reads, gathers=many)


class Heard(threading.local):
    """What a listener has heard of a pass that runs; each thread has its own, and so has every copy of a model."""

    waiting = False
    answer: Any = None
    outputs: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Heard":
        return Heard()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Heard, ()


class Listener:
    """Has the module `name` called with what the modules `reads` return, and its answer put into the model's outputs.

    All are found by their names in every pass: a trainer may replace them (by an adapter's), and a copy of the model
    has its own. What one module returns is passed on at once, what several return when the part that holds them has
    run, so that a layer that is computed again in the backward pass computes the same again.
    """

    def __init__(self, model: PreTrainedModel, name: str, reads: list[str], gathers: bool) -> None:
        self.model, self.name, self.reads, self.gathers = model, name, reads, gathers
        self.heard = Heard()
        model.register_forward_pre_hook(self.start)
        for part in {id(part): part for part in (model, model.base_model)}.values():
            part.register_forward_pre_hook(self.follow)
        self.follow()
        if gathers:
            inside = set(model.base_model.modules())
            part = model.base_model if all(standing_at(model, read) in inside for read in reads) else model
            part.register_forward_pre_hook(self.gather)
            part.register_forward_hook(self.finish)
        model.register_forward_hook(self.speak)

    def start(self, *_: Any) -> None:
        """Waits for an answer while the whole model runs (a trainer may run a part of it only)."""
        self.heard.waiting, self.heard.answer = True, None

    def follow(self, *_: Any) -> None:
        """Listens to what stands at `reads` now."""
        for module in [standing_at(self.model, read) for read in self.reads]:
            if self.read not in module._forward_hooks.values():
                module.register_forward_hook(self.read)

    def read(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Takes what a module returned, if it is one of those that stand there now."""
        found = [read for read in self.reads if module is standing_at(self.model, read)]
        if found and not self.gathers:
            self.ask([output])
        elif self.heard.outputs is not None:
            self.heard.outputs.update(dict.fromkeys(found, output))

    def gather(self, *_: Any) -> None:
        """Forgets what was heard before."""
        self.heard.outputs = {}

    def finish(self, *_: Any) -> None:
        """Asks the head, once all has run; not where nothing has (what it returns may be put in from outside)."""
        heard: dict[str, Any] = self.heard.outputs or {}
        self.heard.outputs = None
        silent = [read for read in self.reads if read not in heard]
        if heard and silent:
            raise ValueError(
                f"{self.name} reads what {', '.join(silent)} returns, which did not run in this pass: give the model "
                "what makes it run (input_ids, where embeddings are read)"
            )
        if heard:
            self.ask([heard[read] for read in self.reads])

    def ask(self, outputs: list[Any]) -> None:
        """Calls the head with what was returned, of a tuple with the first."""
        given = [output[0] if isinstance(output, (tuple, list)) else output for output in outputs]
        answer = standing_at(self.model, self.name)(*given)
        self.heard.answer = answer if self.heard.waiting else None

    def speak(self, _module: nn.Module, _args: Any, outputs: Any) -> Any:
        """Adds the answer to the outputs."""
        answer, self.heard.waiting, self.heard.answer = self.heard.answer, False, None
        if isinstance(outputs, tuple):
            return (*outputs, answer)
        outputs[self.name] = answer
        return outputs


def standing_at(model: nn.Module, name: str) -> nn.Module:
    """Returns what is called under a module name now, through what an adapter has put around the modules above it."""
    module = model
    for part in name.split("."):
        module = getattr(module, part)
    return module


OPERATIONS: dict[str, Any] = {"replace": replace, "share": share, "rearrange": rearrange, "add": add}


def construct(
    model: PreTrainedModel, name: str, module: type[nn.Module], supplied: list[str], arguments: dict[str, Any]
) -> Any:
    """Builds a module for the module `name`; `supplied` says which of its arguments come from the model."""
    sources = {"config": enclosing_config, "layer_idx": layer_index, "original": PreTrainedModel.get_submodule}
    return module(**{key: sources[key](model, name) for key in supplied}, **arguments)


def enclosing_config(model: PreTrainedModel, name: str) -> PreTrainedConfig:
    """Returns the configuration of the innermost `PreTrainedModel` that holds the module `name`."""
    config, module = model.config, model
    for part in name.split(".")[:-1]:
        module = module.get_submodule(part)
        config = module.config if isinstance(module, PreTrainedModel) else config
    return config


def layer_index(_model: PreTrainedModel, name: str) -> int | None:
    """Returns the first number in a dotted module name, which is the layer's index; None without one."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
