"""What each expert of an MoE block gives to the block's output, found by running the block; no family is known by name.

Where a part of the block is called with states, the numbers of experts and their weights, as the experts of most
families are, that part is called again, each token with one expert of weight one; that its outputs, weighed, add up to
what the part returned is looked at first. Any other block runs with all experts but one set to zero, expert by expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import SurgeryError
from solidify.surgery import contract, expert_parts

_ROWS = 8192  # pairs of token and expert that are computed at a time


@dataclass
class _Seen:
    """One call of a part of a block with states (tokens, hidden_size), experts and weights (tokens, top_k)."""

    part: nn.Module
    args: list[Any]
    kwargs: dict[str, Any]
    places: dict[str, str | int]  # where among them `states`, `index` and `weights` stand
    output: torch.Tensor

    def given(self, role: str) -> torch.Tensor:
        """Returns the tensor that stands at a place."""
        place = self.places[role]
        return torch.as_tensor(self.kwargs[place] if isinstance(place, str) else self.args[place])

    def run(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Runs the part with other tensors at these places, without its hooks."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for role, tensor in tensors.items():
            place = self.places[role]
            if isinstance(place, str):
                kwargs[place] = tensor
            else:
                args[place] = tensor
        return contract.tensors_in(self.part.forward(*args, **kwargs))[0]


class BlockScorer:
    """Sums over the calls of one block: for each expert the norms of what it gave, and the tokens that it got.

    `mask` (batch_size, sequence_length), set before each call, says which positions are tokens; None: all are.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        """Finds the experts of a block.

        Raises:
            SurgeryError: the block has none.
        """
        self.name, self.block = name, model.get_submodule(name)
        self._plan = expert_parts.plan_block(model, name, [])
        self.size: int = self._plan["size"]
        if not self.size:
            raise SurgeryError(expert_parts.describe_missing(name, self.block))
        self.mask: torch.Tensor | None = None
        self.sums = torch.zeros(self.size, dtype=torch.float64)
        self.counts = torch.zeros(self.size, dtype=torch.int64)
        self.tokens = 0
        self._parts: list[_Seen] = []
        self._apart: bool | None = None  # whether experts are called apart from the block; found at the first call
        self._busy = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block lasts, every call of the MoE block is scored."""
        hooks = [
            part.register_forward_hook(self._note_part, with_kwargs=True)
            for part in self.block.modules()
            if part is not self.block
        ]
        hooks.append(self.block.register_forward_hook(self._score_call, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_part(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._busy:
            return
        found = _read_selection(part, args, kwargs, output)
        if found is not None:
            self._parts.append(found)

    def _score_call(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._busy:
            return
        self._busy, parts, self._parts = True, self._parts, []
        try:
            whole = contract.tensors_in(output)[0]
            # A block that skips slots calls its experts with a row a slot, and not one a token.
            by_token = len(parts) == 1 and len(parts[0].given("index")) == whole.numel() // whole.shape[-1]
            if self._apart is None and by_token:
                self._apart = _adds_up(parts[0], self.size)
            if self._apart and by_token:
                self._add_pairs(parts[0])
            else:
                self._add_alone(args, kwargs, whole)
        finally:
            self._busy = False

    def _add_pairs(self, seen: _Seen) -> None:
        """Adds the pairs of token and expert of one call."""
        index, weights = seen.given("index"), seen.given("weights")
        top_k = index.shape[1]
        tokens = self._find_tokens(len(index), index.device)
        # A router that skips gives a number all the same, with the weight 0.
        counted = tokens[:, None].expand_as(index) & (index < self.size) & (weights != 0)
        pairs = counted.reshape(-1).nonzero()[:, 0]
        self.tokens += int(tokens.sum())
        for some in torch.split(pairs, _ROWS):
            experts = index.reshape(-1)[some]
            norms = _run_pairs(seen, some // top_k, experts).double().norm(dim=-1)
            self._add(experts, norms * weights.reshape(-1)[some].double())

    def _add_alone(self, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        """Adds what the block returns with one expert, less what it returns with none."""
        own = expert_parts.expert_tensors(self.block, self._plan)
        none = {path: torch.zeros_like(tensor) for path, (tensor, _) in own.items()}
        rest = self._run_with(none, args, kwargs)
        counted = self._find_tokens(output.numel() // output.shape[-1], output.device)
        self.tokens += int(counted.sum())
        for expert in range(self.size):
            alone = {path: _leave_alone(tensor, number, expert) for path, (tensor, number) in own.items()}
            share = (self._run_with(alone, args, kwargs) - rest).double().reshape(-1, output.shape[-1])
            norms = share.norm(dim=-1)[counted]
            norms = norms[norms > 0]
            self._add(torch.full((len(norms),), expert), norms)

    def _run_with(self, tensors: dict[str, torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
        output = torch.func.functional_call(
            self.block, tensors, tuple(contract.copied(args)), contract.copied(kwargs), strict=False
        )
        return contract.tensors_in(output)[0]

    def _find_tokens(self, count: int, device: torch.device) -> torch.Tensor:
        """Returns which of the rows of a call are tokens, on its device."""
        if self.mask is None or self.mask.numel() != count:
            return torch.ones(count, dtype=torch.bool, device=device)
        return self.mask.reshape(-1).bool().to(device)

    def _add(self, experts: torch.Tensor, norms: torch.Tensor) -> None:
        self.sums.index_add_(0, experts.cpu(), norms.double().cpu())
        self.counts += torch.bincount(experts.cpu(), minlength=self.size)


def _read_selection(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Seen | None:
    """Returns the call of a part, if it was given states, numbers of experts and weights for them, one of each."""
    places: list[tuple[str | int, Any]] = [*enumerate(args), *kwargs.items()]
    given = {place: value for place, value in places if isinstance(value, torch.Tensor)}
    index = [
        place for place, tensor in given.items() if tensor.ndim == 2 and tensor.dtype in (torch.int64, torch.int32)
    ]
    if len(index) != 1:
        return None
    tokens, top_k = given[index[0]].shape
    floats = {place: t for place, t in given.items() if t.is_floating_point() and t.ndim == 2 and len(t) == tokens}
    outputs = contract.tensors_in(output)
    states = [p for p, t in floats.items() if outputs and t.shape == outputs[0].shape and t.shape[1] != top_k]
    weights = [place for place, tensor in floats.items() if tensor.shape[1] == top_k]
    if len(states) != 1 or len(weights) != 1:
        return None
    roles = {"states": states[0], "index": index[0], "weights": weights[0]}
    return _Seen(part, list(args), dict(kwargs), roles, outputs[0])


def _run_pairs(seen: _Seen, tokens: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Returns the outputs (pairs, hidden_size) of one expert for each of some tokens, unweighed."""
    weights = torch.ones(len(experts), 1, dtype=seen.given("weights").dtype, device=experts.device)
    return seen.run({"states": seen.given("states")[tokens], "index": experts[:, None], "weights": weights})


def _adds_up(seen: _Seen, size: int) -> bool:
    """Returns whether the experts' outputs for the first tokens, weighed, add up to what the part returned."""
    index, weights = seen.given("index")[:64], seen.given("weights")[:64]
    if bool((index >= size).any()):
        return False
    tokens = torch.arange(index.numel(), device=index.device) // index.shape[1]
    try:
        rows = _run_pairs(seen, tokens, index.reshape(-1)).double().view(*index.shape, -1)
    except (RuntimeError, ValueError, IndexError):
        return False
    found, expected = (rows * weights.double()[..., None]).sum(1), seen.output[:64].double()
    allowed = 5e-2 if seen.output.dtype in (torch.float16, torch.bfloat16) else 2e-5  # sums in another order
    return float((found - expected).abs().max()) <= allowed * float(expected.abs().max())


def _leave_alone(tensor: torch.Tensor, number: int | None, expert: int) -> torch.Tensor:
    """Returns a tensor with all experts but one set to zero; `number` is the one that it is of, None for a stack."""
    if number is not None:
        return tensor if number == expert else torch.zeros_like(tensor)
    alone = torch.zeros_like(tensor)
    alone[expert] = tensor[expert]
    return alone
