"""What decides the output of frozen layers, as a digest: tensors and attributes, what they are given, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from solidify.artifact import tensors
from solidify.errors import ObjectiveError
from solidify.training.prefix.state import accelerator, describe_tensor, odd_kind
from solidify.training.prefix.told import SCALARS, Attributes
from solidify.upstream.torch import writes
from solidify.weights import hashing

_SMALL = 2**20  # bytes that are read in every pass
_DEEPEST = 8  # settings in settings that are looked into
_SETTINGS = (  # of PyTorch, which choose kernels, or their last bits; a version without one has None
    *("get_default_dtype", "get_default_device", "get_num_threads", "get_float32_matmul_precision"),
    *("are_deterministic_algorithms_enabled", "is_deterministic_algorithms_warn_only_enabled"),
    *("utils.deterministic.fill_uninitialized_memory", "backends.cpu.get_cpu_capability", "backends.fp32_precision"),
    *("backends.cuda.flash_sdp_enabled", "backends.cuda.mem_efficient_sdp_enabled"),
    *("backends.cuda.math_sdp_enabled", "backends.cuda.cudnn_sdp_enabled"),
    *("backends.cuda.fp16_bf16_reduction_math_sdp_allowed", "backends.cuda.matmul.fp32_precision"),
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_accumulation",
    *("backends.cudnn.enabled", "backends.cudnn.benchmark", "backends.cudnn.deterministic"),
    *("backends.cudnn.fp32_precision", "backends.cudnn.conv.fp32_precision", "backends.cudnn.rnn.fp32_precision"),
    *("backends.mkldnn.enabled", "backends.mkldnn.deterministic", "backends.mkldnn.fp32_precision"),
    *("backends.mkldnn.matmul.fp32_precision", "backends.mkldnn.conv.fp32_precision"),
    *("backends.mha.get_fastpath_enabled", "backends.opt_einsum.enabled", "backends.opt_einsum.strategy"),
    "backends.quantized.engine",
)
_UNREAD = ("num_items_in_batch",)  # transformers hands it down to layers, for the loss alone


class LayerDigests:
    """Digests of all tensors of some layers, which are read again only where they were exchanged or written to."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._known: dict[
            tuple[Any, ...], tuple[str, torch.Tensor]
        ] = {}  # with the tensor, so that no other has its place
        self._state: list[tuple[str, str]] = []
        self._loose: dict[int, tuple[str, torch.Tensor]] = {}  # large ones that are no parameter and no buffer
        self._attributes = Attributes(layers, self._digest_loose)

    def values(self) -> list[Any]:
        """Returns plain values that tell two states of the layers apart."""
        try:
            if not self._known:
                self._refuse_odd()
                self._read_all()
            digests = [self._digest(each) for layer in self._layers for each in (*layer.parameters(), *layer.buffers())]
        except (RuntimeError, NotImplementedError):
            self._refuse_odd()  # one of another kind was put in since
            raise
        return [self._state, digests, self._attributes.values()]

    def _refuse_odd(self) -> None:
        for number, layer in enumerate(self._layers):
            for path, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if odd := odd_kind(tensor):
                    raise ObjectiveError(
                        f"cache_prefix: {number}.{path} of the frozen layers is {odd}, of which nothing can be told; "
                        "leave cache_prefix out"
                    )

    def _read_all(self) -> None:
        """Reads all tensors, from their files where they stand there unchanged; quantised weights have more than
        parameters and buffers in their state."""
        held: dict[str, torch.Tensor] = {}
        for number, layer in enumerate(self._layers):
            named = {
                **layer.state_dict(keep_vars=True),
                **dict(layer.named_parameters()),
                **dict(layer.named_buffers()),
            }
            held |= {f"{number}.{key}": each for key, each in named.items() if isinstance(each, torch.Tensor)}
        found = tensors.digests_where_they_stand(held)
        self._state = sorted(found.items())
        self._known = {_stamp(tensor): (found[name], tensor.detach()) for name, tensor in held.items()}

    def refuse_written(self, name: str) -> None:
        """Reads all tensors whole, and compares them with what their digests were when they were last told apart.

        Raises:
            ObjectiveError: one was written to unnoticed (through `.data`, between the pages that are looked at).
        """
        held = [
            (f"{number}.{path}", tensor)
            for number, layer in enumerate(self._layers)
            for path, tensor in (*layer.named_parameters(), *layer.named_buffers())
            if not odd_kind(tensor)
        ]
        for path, tensor in (*held, *self._loose.values()):
            known = self._known.get(_stamp(tensor))
            if known is not None and known[0] != tensors.digest(tensor):
                raise ObjectiveError(
                    f"cache_prefix: {name}.{path} was written to through `.data`, which PyTorch does not count, since "
                    "what the frozen layers return was kept; write to the tensor itself (in torch.no_grad()), or leave "
                    "cache_prefix out"
                )

    def _digest_loose(self, tensor: torch.Tensor, where: str) -> str:
        """Returns the digest of a tensor that is no parameter and no buffer: small ones are read whole each time."""
        if tensor.nbytes <= _SMALL:
            return tensors.digest(tensor)
        self._loose[id(tensor)] = where, tensor
        return self._digest(tensor)

    def _digest(self, tensor: torch.Tensor) -> str:
        stamp = _stamp(tensor)
        if stamp not in self._known:
            self._known[stamp] = tensors.digest(tensor), tensor.detach()
        return self._known[stamp][0]


def _stamp(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns what changes when a tensor is exchanged, or written to; through `.data` no version counts it, so a few
    pages are looked at."""
    return tensor.data_ptr(), count_writes(tensor), tuple(tensor.shape), tensor.dtype, _glance(tensor)


def count_writes(tensor: torch.Tensor) -> int:
    """Returns how often a tensor was written to in place; 0 for one of inference mode, which counts nothing."""
    return 0 if tensor.is_inference() else writes(tensor)


def _glance(tensor: torch.Tensor) -> bytes:
    """Returns a digest of a tensor's pages at the beginning, at the end, and evenly between; small ones whole."""
    whole = tensor.detach()
    if not whole.is_contiguous():  # its numbers in the order of memory, where there are no gaps
        strides = whole.stride()
        whole = whole.permute(sorted(range(whole.ndim), key=lambda axis: -strides[axis]))
    flat = whole.reshape(-1)
    page = max(1, tensors.PAGE // max(1, flat.element_size()))
    last = flat.numel() - page
    if last > page * (tensors.SAMPLES - 1):
        starts = [last * number // (tensors.SAMPLES - 1) for number in range(tensors.SAMPLES)]
        flat = torch.cat([flat[start : start + page] for start in starts])
    return bytes.fromhex(tensors.digest(torch.view_as_real(flat) if flat.is_complex() else flat))


def has_history(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor learns, or was made of what does; a leaf that only asks for gradients was not."""
    return tensor.grad_fn is not None or (tensor.requires_grad and isinstance(tensor, nn.Parameter))


def flatten(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor in a structure of mappings, lists and tuples, with its path."""
    if isinstance(value, torch.Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from flatten(f"{name}.{key}" if name else str(key), each)
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from flatten(f"{name}.{number}" if name else str(number), each)


Known = dict[int, tuple[Any, torch.Tensor]]  # descriptions by identity, with the tensor, so that none has its place


def describe(value: Any, known: Known) -> Any:
    """Returns plain values that tell two structures apart; `known` receives what is said of each tensor, once.

    Raises:
        TypeError: something in it cannot be told.
    """
    if isinstance(value, torch.Tensor):
        if id(value) not in known and (odd := odd_kind(value)):
            raise TypeError(odd)
        if id(value) not in known:
            known[id(value)] = describe_tensor(value), value
        return known[id(value)][0]
    if isinstance(value, Mapping):
        return {str(key): describe(each, known) for key, each in value.items() if key not in _UNREAD}
    if isinstance(value, (list, tuple)):
        return [describe(each, known) for each in value]
    if isinstance(value, SCALARS):
        return repr(value)
    raise TypeError(type(value).__name__)


def surroundings(owner: nn.Module) -> list[Any]:
    """Returns what decides the last bits beside weights and inputs."""
    device = (accelerator() or torch.device("cpu")).type
    return [
        torch.__version__,
        transformers.__version__,
        [_read_setting(name) for name in _SETTINGS],
        [str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "" for kind in {device, "cpu"}],
        gradient_modes(),
        _tell_settings(getattr(owner, "config", None)),
    ]


def _read_setting(name: str) -> str:
    """Returns what PyTorch has under a name, or says when it is called; older names may refuse where a newer is set."""
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    try:
        return str(found() if callable(found) else found)
    except RuntimeError as error:
        return str(error)


def gradient_modes() -> tuple[bool, bool]:
    """Returns whether a graph is built, and whether inference mode is on: layers may ask for either."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def name_kind(modules: Sequence[nn.Module], args: Any, kwargs: Mapping[str, Any]) -> str:
    """Returns what kind of call one of the first of some modules is: modes, configurations and plain attributes of all
    of them, and what is given, with the values of all that are no tensors."""
    known = {key: value for key, value in kwargs.items() if key not in _UNREAD}
    given = [_tell_settings(args), _tell_settings(known), sorted(kwargs)]
    plain = [{key: repr(v) for key, v in vars(each).items() if isinstance(v, SCALARS)} for each in modules]
    configs = {id(config): config for each in modules if (config := getattr(each, "config", None)) is not None}
    return hashing.digest_values([gradient_modes(), given, plain, [_tell_settings(each) for each in configs.values()]])


def _tell_settings(value: Any, depth: int = 0) -> Any:
    """Returns plain words for the values in a configuration, or in arguments; those of tensors are not told."""
    if isinstance(value, SCALARS):
        return repr(value)
    if isinstance(value, Mapping):
        return [[repr(key), _tell_settings(each, depth + 1)] for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [_tell_settings(each, depth + 1) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(each) for each in value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, (torch.Tensor, type, nn.Module)) or depth == _DEEPEST or not hasattr(value, "__dict__"):
        return kind
    return [kind, _tell_settings(vars(value), depth + 1)]
