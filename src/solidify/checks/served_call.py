"""Runs a model as the transformers backends of vLLM and SGLang run it, and records what reaches the attention.

Both build the part without its head, name an attention function of their own in the configuration, and call it with
one row of tokens, their positions and a keyword argument of their own (`attention_instances`), which must come out at
that function. Here the function lets every position see itself alone: whatever still mixes positions then does so by
itself, and a server, which keeps the past of its own attention only, would not know of it. Seen in vLLM's
`vllm/model_executor/models/transformers/base.py` and SGLang's `python/sglang/srt/models/transformers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from solidify.checks import stand_ins
from solidify.model import anatomy
from solidify.system import foreign
from solidify.upstream.transformers import attention, set_attention, withdraw_attention

KEYWORD = "attention_instances"
NAME = "solidify_served_call"
_TRIES = 3  # with stand-ins: whose weight is read past it keeps its numbers in the next
_LENGTHS = (13, 17, 19, 23, 29, 31, 37)

Hook = Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]
Reading = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Arrival:
    """One call of the attention function: by which module, for which layer, and whether the keyword came along.

    `heads` are the numbers of heads of the queries and of the keys, and the size of a head.
    """

    module: str
    layer_idx: Any
    passed: bool
    heads: tuple[int, int, int]


@dataclass
class Observed:
    """What was seen. `refused` is the error of the call, `runs_without` whether it works without the keyword.

    `causal` is None where the model cannot be called at all. `received` names the modules that were given the keyword,
    `mixers` those that mix positions by themselves (inner ones first), and `experts` says for modules of that name with
    how many positional arguments they were called. `called` names every module that was called as one. `stood_in` is
    the number of linear layers that computed with other numbers than their own.
    """

    refused: str = ""
    runs_without: bool = False
    causal: bool | None = None
    arrivals: list[Arrival] = field(default_factory=list)
    received: set[str] = field(default_factory=set)
    mixers: list[str] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    stood_in: int = 0


def observe(backbone: PreTrainedModel) -> Observed:
    """Calls a model without its head as it is, and as a server does; the model is unchanged.

    Of a large model a few rows alone of linear layers are read (`stand_ins.py`), unless it does not run like that.
    """
    kept: set[nn.Module] = set()
    for _ in range(_TRIES if anatomy.size(backbone) >= anatomy.LARGE else 0):
        try:
            with stand_ins.standing_in(backbone, kept) as made:
                seen = _observe_calls(backbone, made.reading)
        except stand_ins.OtherNumbersError as error:
            if not error.layers:
                break
            kept |= {*error.layers}
        else:
            seen.stood_in = made.count
            if not (seen.refused and made.count):
                return seen
            break
    return _observe_calls(backbone, nullcontext)


def _observe_calls(backbone: PreTrainedModel, reading: Reading) -> Observed:
    seen = Observed()
    inputs = _make_inputs(backbone, _choose_length(backbone))
    with torch.no_grad(), anatomy.evaluation(backbone), anatomy.sparing(backbone):
        alone = foreign.attempt(_find_mixers, backbone, inputs, -1, Observed(), reading)
        if alone.error is not None:
            seen.refused = foreign.said(alone.error)
            return seen
        seen.causal = not alone.value
        with _isolate_positions(backbone, seen):
            middle = inputs["input_ids"].shape[1] // 2
            served = foreign.attempt(_find_mixers, backbone, {**inputs, KEYWORD: seen}, middle, seen, reading)
            seen.mixers = served.value or []
            if served.error is not None:
                seen.refused = foreign.said(served.error)
                seen.runs_without = not foreign.attempt(backbone, **inputs).failed
                seen.arrivals.clear()
                seen.called.clear()
    return seen


def _find_mixers(
    backbone: PreTrainedModel, inputs: Mapping[str, Any], position: int, seen: Observed, reading: Reading
) -> list[str]:
    """Changes the token at one position and names the modules that let it reach the output at other positions."""
    names = {module: name for name, module in backbone.named_modules()}
    first: dict[tuple[str, int], Any] = {}
    found: list[str] = []
    ids = inputs["input_ids"]
    with _hook_modules(names, _make_keeper(first, seen), reading):
        backbone(**inputs)
    changed = ids.clone()
    changed[0, position] = next(token for token in ids[0] if token != ids[0, position])
    other_positions = [index for index in range(ids.shape[1]) if index != position % ids.shape[1]]
    arrived = len(seen.arrivals)
    with _hook_modules(names, _make_comparison(first, found, other_positions), reading):
        backbone(**{**inputs, "input_ids": changed})
    del seen.arrivals[arrived:]
    return found


def _choose_length(backbone: PreTrainedModel) -> int:
    """Returns a number of positions that is no size of a parameter: so tensors tell which axis runs along them."""
    sizes = {size for parameter in backbone.parameters() for size in parameter.shape}
    return next((length for length in _LENGTHS if length not in sizes), _LENGTHS[-1])


def _make_inputs(backbone: PreTrainedModel, length: int) -> dict[str, Any]:
    """Makes one row of ordinary tokens and their positions."""
    return {
        "input_ids": torch.tensor([ordinary(backbone, length)], device=backbone.device),
        "position_ids": torch.arange(length, device=backbone.device)[None],
        "use_cache": False,
        "return_dict": False,
    }


def ordinary(backbone: PreTrainedModel, length: int) -> list[int]:
    """Draws tokens to which the configuration gives no meaning; always the same for one length."""
    text = backbone.config.get_text_config()
    special = {v for c in (backbone.config, text) for k, v in vars(c).items() if "token" in k and isinstance(v, int)}
    tokens = [token for token in range(int(text.vocab_size)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    return [tokens[index] for index in torch.randint(len(tokens), (length,), generator=generator).tolist()]


@contextmanager
def _isolate_positions(backbone: PreTrainedModel, seen: Observed) -> Iterator[None]:
    """Makes the model use, while the block lasts, an attention in which every position sees itself alone."""
    names = {module: name for name, module in backbone.named_modules()}

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
    ) -> Any:
        """Notes who called, and lets each position see only itself."""
        seen.arrivals.append(
            Arrival(
                names.get(module, "?"),
                vars(module).get("layer_idx"),
                options.get(KEYWORD) is seen,
                (query.shape[1], key.shape[1], query.shape[-1]),
            )
        )
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return value.transpose(1, 2).contiguous(), None

    text = backbone.config.get_text_config()
    before = attention(text)
    AttentionInterface.register(NAME, attend)
    set_attention(text, NAME)
    try:
        yield
    finally:
        set_attention(text, before)
        withdraw_attention(NAME)


@contextmanager
def _hook_modules(names: Mapping[nn.Module, str], hook: Hook, reading: Reading) -> Iterator[None]:
    """Calls `hook` after every module with its name, arguments and output; what it returns becomes the output.

    `reading` lets it read values where stand-ins would refuse that.
    """

    def bind(name: str) -> Any:
        """Makes the hook of the module of one name."""

        def call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            """Calls it; what it reads is no business of the model's."""
            with reading():
                return hook(name, args, kwargs, output)

        return call

    handles = [m.register_forward_hook(bind(name), with_kwargs=True) for m, name in names.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_keeper(first: dict[tuple[str, int], Any], seen: Observed) -> Hook:
    """Makes a hook that keeps what every module is given and returns."""
    times: dict[str, int] = {}

    def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Notes what a module was given and what it returned."""
        seen.called.add(name)
        if kwargs.get(KEYWORD) is seen:
            seen.received.add(name)
        if name.rpartition(".")[2] == "experts":
            seen.experts[name] = len(args)
        call = (name, times.setdefault(name, 0))
        times[name] += 1
        first[call] = ([t.clone() for t in _list_tensors((args, kwargs))], [t.clone() for t in _list_tensors(output)])

    return keep


def _make_comparison(first: Mapping[tuple[str, int], Any], found: list[str], other_positions: list[int]) -> Hook:
    """Makes a hook that finds modules whose output at other positions moved although their input there did not.

    What moved, if only by rounding, is put back: so rounding does not add up, and a mixer does not hide the next.
    """
    times: dict[str, int] = {}

    def compare(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Compares a module's call with the same call of the first run."""
        call = (name, times.setdefault(name, 0))
        times[name] += 1
        given, returned = first.get(call, ([], []))
        now, out = _list_tensors((args, kwargs)), _list_tensors(output)
        if [t.shape for t in given + returned] != [t.shape for t in now + out]:
            return output
        if any(_has_moved(a, b, other_positions) for a, b in zip(given, now, strict=True)):
            return output
        if any(_has_moved(a, b, other_positions) for a, b in zip(returned, out, strict=True)):
            found.append(name)
        before = iter(returned)
        return _map_tensors(output, lambda tensor: _put_back(next(before), tensor, other_positions))

    return compare


def _find_axis(tensor: torch.Tensor, other_positions: list[int]) -> int | None:
    """Returns the one axis that runs along the positions."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size == len(other_positions) + 1]
    return axes[0] if len(axes) == 1 else None


def _has_moved(before: torch.Tensor, after: torch.Tensor, other_positions: list[int]) -> bool:
    """Returns whether a tensor differs at the other positions by more than rounding.

    Each position is judged by its own size, and by the mean of its values beside the largest: one position, or a few
    values at every position, may be a thousand times as large as the rest (arXiv 2402.17762).
    """
    axis = _find_axis(before, other_positions)
    if axis is None:
        return False
    index = torch.tensor(other_positions, device=before.device)
    a, b = (tensor.index_select(axis, index).movedim(axis, 0).flatten(1) for tensor in (before, after))
    if torch.equal(a, b):
        return False
    if not a.is_floating_point() or not a.numel():
        return True
    # Within one module kernels may sum in another order; to look ahead or back moves more than that.
    share, (a, b) = max(1e-4, 4 * torch.finfo(a.dtype).eps), (a.float(), b.float())
    same = (a == b) | (a.isnan() & b.isnan())
    off, size = (a - b).abs().where(~same, 0.0), a.where(a.isfinite(), 0.0).abs()  # (positions, values)
    near = [measure(off) <= share * measure(size).clamp(min=1e-6) for measure in (_take_largest, _take_mean)]
    return not all(bool(each.all()) for each in near)


def _take_largest(values: torch.Tensor) -> torch.Tensor:
    return values.amax(dim=1)


def _take_mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean(dim=1)


def _put_back(before: torch.Tensor, after: torch.Tensor, other_positions: list[int]) -> torch.Tensor:
    axis = _find_axis(before, other_positions)
    if axis is None:
        return after
    index = torch.tensor(other_positions, device=before.device)
    return after.index_copy(axis, index, before.index_select(axis, index))


def _list_tensors(value: Any) -> list[torch.Tensor]:
    """Lists the tensors in nested arguments or outputs, in order."""
    found: list[torch.Tensor] = []
    _map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return type(value)(**{key: _map_tensors(item, change) for key, item in value.items()})
    return value
