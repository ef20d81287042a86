"""`solidify.wrap`: a module of plain torch (or timm, or torchvision) becomes a model of transformers.

What its class is made with is read off the module, or given, and tried: the module is built again, and must be the same
in its parts and in what it returns. Where that is not to be known, it is built part by part. The artifact builds it so
too; it carries the classes' source, or requires the package that they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.behaviour import calling
from solidify.errors import ModelError, refuse
from solidify.model import anatomy
from solidify.model.operations import shared_keys
from solidify.modules import wrapped_module
from solidify.on_ramps import unfit
from solidify.surgery.comparing import held_faults, part_faults
from solidify.surgery.constructing import frozen
from solidify.surgery.describing import WRAPPING, assemble, describe
from solidify.surgery.dissecting import dissect, keep_tensors, unsaved_tensors
from solidify.surgery.edit_record import Edit
from solidify.surgery.encoding import Classes
from solidify.system import foreign
from solidify.upstream.torch import own_buffers, unsaved_buffers
from solidify.weights.format import same_bits

NAME = "module"  # where it stands in the model
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
    of one name says which. A constructor's arguments are read off the module's attributes. Where those do not make the
    same, it is recorded part by part: classes, shapes of tensors, attributes; tensors that its state leaves out are
    saved then, and become buffers, in place. A parameter at several names stays one (a tie). `arguments` says what its
    constructor was given instead; classes are allowed, and for a `nn.Sequential` they are given by the child's name.
    `problem_type` says which loss labels have, as transformers' classifiers do (left out, it follows from the labels).

    `solidify.build(model, edits, directory)` writes it, with or without edits. Surgery names what is inside `module.`.

    Raises:
        ModelError: the module takes several inputs or returns no tensor, or, built again by its constructor and part by
            part, it is not the same (hooks, functions without a name); or tensors are views of one memory, have no
            shape yet, are parametrized, or stand among the attributes again. All reasons together.
    """
    if isinstance(module, PreTrainedModel):
        raise ModelError(f"{type(module).__name__} is a model of transformers already; use it as it is")
    refuse(ModelError, f"{type(module).__name__} cannot be wrapped", unfit.find_faults(module, NAME))
    if not any(parameter.is_floating_point() for parameter in module.parameters()):
        raise ModelError(
            f"{type(module).__name__} has no parameters of real numbers, and a model of transformers has some"
        )
    name, given = _read_example(example_inputs)
    with _laid_out(module):
        before = _call(module, given)
        refuse(ModelError, f"{type(module).__name__} cannot be wrapped", _find_counting(module, given))
        tree, classes, note = _describe(module, given, before, arguments)
    config = wrapped_module.WrappedConfig(
        example_inputs=_describe_input(name, given, anatomy.main_dtype(module)),
        num_labels=before.shape[-1] if before.ndim == 2 else 1,
        problem_type=problem_type,
        tie_word_embeddings=False,  # ties are found in the module; there are no embeddings for PEFT to ask for
        dtype=anatomy.main_dtype(module),
    )
    kind = _KINDS[name]
    config.auto_map = {auto: f"wrapped_module.{kind.__name__}" for auto in dict.fromkeys(("AutoModel", _AUTOS[name]))}
    model: Any = kind(config)
    model.module = module
    model.all_tied_weights_keys = shared_keys(model)
    vars(model)[WRAPPING] = _record(module, tree, classes, note)
    found: PreTrainedModel = model.eval()
    return found


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
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.ndim == 2


def _describe_input(name: str, given: torch.Tensor, weights: torch.dtype | None) -> dict[str, Any]:
    whole = not given.is_floating_point() and not given.is_complex()
    return {
        "name": name,
        "shape": list(given.shape[1:]),
        "dtype": str(given.dtype).removeprefix("torch."),
        "below": int(given.max()) + 1 if whole and given.numel() else None,
        "weights": str(weights).removeprefix("torch."),  # most of them: in another dtype, the model takes that one
    }


def _call(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Returns what the module makes of a copy of the example, in evaluation mode; its buffers are put back."""
    with torch.no_grad(), anatomy.evaluation(module), calling.buffers_kept(module):
        outcome = foreign.attempt(module, given.clone())
    if outcome.error is not None:
        raise ModelError(f"the module does not run on example_inputs: {foreign.said(outcome.error)}")
    if not isinstance(outcome.value, torch.Tensor):
        raise ModelError(
            f"{type(module).__name__} returns {type(outcome.value).__name__}; a module that is wrapped returns one "
            "tensor: put it into one of your own that does"
        )
    return outcome.value


@contextmanager
def _laid_out(module: nn.Module) -> Iterator[None]:
    """Has the tensors of a state lie in memory as a file brings them back, row by row, where the block does not raise.

    Torch multiplies a transposed matrix in another order, and rounds otherwise; and it chooses a convolution by strides
    of axes of length one too, by which a tensor is contiguous either way.
    """
    buffers = [
        held for part in module.modules() for k, held in own_buffers(part).items() if k not in unsaved_buffers(part)
    ]
    held = [each for each in (*module.parameters(), *buffers) if each is not None and each.layout is torch.strided]
    tensors = [each for each in held if each.stride() != torch.empty(each.shape, device="meta").stride()]
    moved = [(tensor, tensor.data) for tensor in tensors]
    for tensor, data in moved:
        tensor.data = data.clone(memory_format=torch.contiguous_format)
    try:
        yield
    except BaseException:
        for tensor, data in moved:
            tensor.data = data
        raise


def _find_counting(module: nn.Module, given: torch.Tensor) -> list[str]:
    """Names what another call in evaluation changes and no artifact brings back; it is put back."""
    parts = {f"{NAME}.{name}".rstrip("."): part for name, part in module.named_modules()}
    numbers = {name: _read_numbers(part) for name, part in parts.items()}
    parameters = {f"{NAME}.{key}": (p, p.detach().clone()) for key, p in module.named_parameters()}
    _call(module, given)
    counted = [
        (part, key, before, f"{name}.{key}")
        for name, part in parts.items()
        for key, before in numbers[name].items()
        if not foreign.attempt(lambda now, then: bool(now == then), vars(part).get(key), before).value
    ]
    written = [(p, before, key) for key, (p, before) in parameters.items() if not same_bits(p.detach(), before)]
    for part, key, number, _ in counted:
        vars(part)[key] = number
    for parameter, values, _ in written:
        parameter.data.copy_(values)
    return [
        f"{name} changes whenever the module is called in evaluation; keep it in a buffer (register_buffer), which "
        "comes back as it was"
        for name in (*(where for *_, where in counted), *(key for *_, key in written))
    ]


def _read_numbers(part: nn.Module) -> dict[str, Any]:
    held = vars(part).items()
    return {k: v for k, v in held if type(v) in (bool, int, float, str) and not k.startswith("_") and v == v}


def _describe(
    module: nn.Module, given: torch.Tensor, before: torch.Tensor, arguments: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Classes, str]:
    """Says how the module is made again: by its constructor, or else part by part, and then why so."""
    kind = type(module).__name__
    classes = Classes()
    tree = describe(NAME, module, arguments, classes)
    faults = classes.faults or _unlike(module, tree, classes, given, before)
    unsaved = unsaved_tensors(module)
    if not faults and not unsaved:
        return tree, classes, ""
    if arguments is not None and faults:
        told = "made by its class with the arguments that were told, it is not the same"
        refuse(ModelError, f"{kind} cannot be wrapped: {told}", faults[:8])
    classes = Classes(exact=True)
    with anatomy.evaluation(module):
        module.train().eval()  # what is kept from one call to the next in evaluation alone is let go
        tree = dissect(NAME, module, classes)
    unlike = classes.faults
    if not unlike:
        undo = keep_tensors(module)
        unlike = [*unfit.find_unstorable(module, NAME)] or _unlike(module, tree, classes, given, before)
        if unlike:
            undo()
    lost = [f"{NAME}.{key} is a tensor that its state does not hold" for key in unsaved]
    said = (faults or lost)[0].partition("; say")[0]
    refuse(ModelError, f"{kind} cannot be wrapped, neither by its constructor ({said}) nor part by part", unlike[:8])
    return tree, classes, f"It is built part by part, and not by its constructor: {said}"


def _unlike(
    module: nn.Module, tree: dict[str, Any], classes: Classes, given: torch.Tensor, before: torch.Tensor
) -> list[str]:
    """Builds the module once more, and returns where its parts, or what it returns, are not the same."""
    for device in ("meta", "cpu"):  # models are loaded on the first, where a constructor can compute no number
        built = foreign.attempt(_build_again, tree, classes, device, anatomy.main_dtype(module))
        if built.value is None:
            where = " (on the meta device, on which models are loaded)" if device == "meta" else ""
            return [f"{foreign.said(built.error)}{where}" if built.error is not None else "nothing is built"]
    assert built.value is not None
    again: nn.Module = built.value
    if faults := [*part_faults(module, again, NAME), *_dtype_faults(module, again)]:
        return faults
    _take_state(again, module)
    uncalled = held_faults(module, again, NAME)
    after = foreign.attempt(_call, again, given)
    called = held_faults(module, again, NAME)  # the module was called, and may remember it, or was made to forget
    if faults := [words for key, words in called.items() if key in uncalled]:
        return faults
    if after.value is None:
        return [foreign.said(after.error)] if after.error is not None else []
    if before.shape != after.value.shape or not torch.allclose(before, after.value, 1e-4, 1e-5, equal_nan=True):
        return ["with the same weights, it returns something else on example_inputs"]
    return []


def _dtype_faults(module: nn.Module, again: nn.Module) -> list[str]:
    """Names the tensors of real numbers that are built in another dtype, to which loading would cast them."""
    mine, theirs = (
        {**dict(each.named_parameters(remove_duplicate=False)), **dict(each.named_buffers(remove_duplicate=False))}
        for each in (module, again)
    )
    return [
        f"{NAME}.{key} is {tensor.dtype}, and {theirs[key].dtype}"
        for key, tensor in mine.items()
        if key in theirs and tensor.is_floating_point() and tensor.dtype != theirs[key].dtype
    ]


def _build_again(tree: dict[str, Any], classes: Classes, device: str, dtype: torch.dtype | None) -> nn.Module:
    """Builds a module as a description says, as loading does in a dtype; random numbers go on as if it had not been."""
    holder = nn.Module()
    holder.add_module(NAME, nn.Identity())
    entry = {"classes": [str(n) for n in range(len(classes.found))], "arguments": tree}
    with calling.chance_kept(), torch.device(device), _default_dtype(dtype):
        assemble(holder, [NAME], entry, {str(number): cls for number, cls in enumerate(classes.found)})
    return holder.get_submodule(NAME)


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Makes real numbers in a dtype while the block lasts, if it is one that torch makes them in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype in (torch.float64, torch.bfloat16, torch.float16) else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _take_state(again: nn.Module, module: nn.Module) -> None:
    """Gives a module the values that another's state holds, as loading does: not by what its class makes of a state."""
    held = {**dict(again.named_parameters(remove_duplicate=False)), **dict(again.named_buffers(remove_duplicate=False))}
    for key, tensor in module.state_dict().items():
        if key in held:
            held[key].data = tensor.clone()


def _record(module: nn.Module, tree: dict[str, Any], classes: Classes, note: str) -> Edit:
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
        frozen=frozen(module),
        parameters_before=count,
        parameters_after=count,
        probed=True,
        identical=True,
        bypass=False,
        operation="wrap",
        settings={"note": note} if note else {},
        further=tuple(classes.found),
    )
