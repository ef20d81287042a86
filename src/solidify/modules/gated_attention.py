"""Attention with a gate on its output: every head, or every number of it, is let through by what its token says.

    y = softmax(Q K^T) V        (batch_size, sequence_length, heads * head_dim), as in the original
    g = 2 * sigmoid(x W)        W is (hidden_size, heads) per head, (hidden_size, heads * head_dim) per element
    output = (y * g) W_o        the original's own output projection

The gate stands between attention and output projection, where it was found to help most (Gated Attention for Large
Language Models, arXiv 2505.06708; a head that can close its gate needs no attention sink). There it is `sigmoid(x W)`.
Here it is twice that: with W = 0 it is exactly one in every dtype, so that the model starts as the original bit for
bit, and its slope is 1/2, the steepest there is, so that W learns from the first step (a bias that rounds the sigmoid
to one would leave no gradient). For the published form put the 2 into W_o.

The original's own forward runs, with a gate before its output projection; so whatever the family does beside (rotary
positions, norms of queries and keys, windows, its cache) stays as it is, and all of its modules keep their names.

This file needs torch only and is copied into artifacts as it stands.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense")  # what families call the projection after the heads
HEAD_SIZES = ("v_head_dim", "head_dim", "head_size")


class GatedAttention(nn.Module):
    """Takes over an attention with all its modules and adds `output_gate`, a linear layer without bias.

    `per` is `head` (one gate a head) or `element` (one for each number before the output projection). An attention
    without an output projection of its own, or, per head, without a size of heads, is refused.

    While `bypass` is True the gate is one, and the module computes what the original computed, bit for bit.
    """

    def __init__(self, original: nn.Module, per: str = "head") -> None:
        super().__init__()
        if per not in ("head", "element"):
            raise ValueError(f"per must be head or element, but is {per!r}")
        if hasattr(original, "output_gate"):
            raise ValueError(f"{type(original).__name__} has an output_gate already; a second would multiply the first")
        take_over(self, original)
        self.gated_kind = type(original)
        self.gated_inner = Inner(original)
        self.gated_output = find_output(original)
        width, hidden_size = sizes(original.get_submodule(self.gated_output))
        self.gated_width = find_head_size(original, width) if per == "head" else 1
        self.output_gate = nn.Linear(hidden_size, width // self.gated_width, bias=False)
        nn.init.zeros_(self.output_gate.weight)
        self.bypass = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Maps (batch_size, sequence_length, hidden_size) to what the original returns."""
        view = as_original(self, self.gated_kind, self.gated_inner)
        if not self.bypass:
            project = self.get_submodule(self.gated_output)
            vars(view)[self.gated_output] = lambda heads: project(heads * self.gate(hidden_states, heads))
        return self.gated_kind.forward(view, hidden_states, *args, **kwargs)

    def gate(self, hidden_states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Returns the gate, between 0 and 2, of every number in `heads`, in its shape and dtype."""
        gate = 2 * torch.sigmoid(self.output_gate(hidden_states))
        return gate.repeat_interleave(self.gated_width, dim=-1).to(heads.dtype)


def find_output(original: nn.Module) -> str:
    """Returns the name of the projection that follows the heads."""
    name = next((name for name, _ in original.named_children() if name in OUTPUTS), None)
    if name is None:
        found = ", ".join(name for name, _ in original.named_children()) or "no modules"
        raise ValueError(
            f"GatedAttention needs an attention with an output projection ({', '.join(OUTPUTS)}), but "
            f"{type(original).__name__} consists of: {found}"
        )
    return name


def sizes(projection: nn.Module) -> tuple[int, int]:
    """Returns how many numbers a linear layer takes and returns; transformers' Conv1D keeps its matrix transposed."""
    rows, columns = projection.get_parameter("weight").shape
    return (columns, rows) if isinstance(projection, nn.Linear) else (rows, columns)


def find_head_size(original: nn.Module, width: int) -> int:
    """Returns how many numbers of the output projection's input belong to one head."""
    size = next((value for key in HEAD_SIZES if isinstance(value := getattr(original, key, None), int)), None)
    if not size or width % size:
        raise ValueError(
            f"a gate per head needs the size of a head ({', '.join(HEAD_SIZES)}) that divides the {width} numbers "
            f"before the output projection, but {type(original).__name__} has {size}; use per: element"
        )
    return size


class Inner(nn.Module):
    """Holds the `bypass` of the module that was taken over, if it has one, beside that of the new one."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.bypass = bool(getattr(original, "bypass", False))


def take_over(module: nn.Module, original: nn.Module, without: Collection[str] = ()) -> None:
    """Gives a module what the original has, `without` some modules: under their own names, and its plain attributes."""
    saved = original.state_dict(keep_vars=True)
    for name, value in vars(original).items():
        if name not in (*vars(nn.Module()), "forward", "bypass"):  # torch's tables, a dispatcher's wrap, and `Inner`'s
            setattr(module, name, value)
    for name, child in original.named_children():
        if name not in without:
            module.add_module(name, child)
    for name, parameter in original.named_parameters(recurse=False):
        module.register_parameter(name, parameter)
    for name, buffer in original.named_buffers(recurse=False):
        module.register_buffer(name, buffer, persistent=name in saved)


def as_original(module: nn.Module, kind: type[nn.Module], inner: nn.Module) -> nn.Module:
    """Returns the module seen as one of the original's class: a shallow copy, whose attributes may be set for one call.

    It is made for every call, because adapters replace modules by name after this one was built.
    """
    view = object.__new__(kind)
    vars(view).update(vars(module))
    vars(view)["bypass"] = vars(inner)["bypass"]
    return view
