"""A dense feed-forward becomes an MoE block of copies of itself: sparse upcycling (arXiv 2212.05055).

A new router chooses `top_k` of `num_experts` copies for each token and weighs them by its softmax, renormalised over
those chosen. With p = softmax(x R^T) over all experts and S the `top_k` largest of p:

    y = sum over i in S of w_i FFN_i(x),    w_i = p_i / sum over j in S of p_j

The weights sum to one, so that any k of equal copies give the original's output, up to rounding: tokens are grouped by
expert, and matrix products of other shapes and sums of k terms round otherwise (about 1e-7 in float32, 1e-15 in
float64, relative). A router with one expert to choose (`top_k=1`) always has the weight 1: it learns from losses on
routers alone, not from the model's own. With equal copies too the model's loss says nothing to the router; it begins to
once the experts, each of which sees other tokens, have moved apart.

What parts the copies from the start is an argument: `noise` adds to every weight normal noise of that share of its
matrix's standard deviation. `drop` is drop-upcycling (arXiv 2502.19261): in every expert a random share of the
intermediate size is made anew, in all its matrices, from the mean and the standard deviation of the weights that it
replaces. Both, and the router (normal, `router_std`), are drawn from `seed` and the layer's number.

The block has the form of transformers' MoE blocks, a router `gate` that returns logits, weights and indices, and
`experts` called with (hidden_states, indices, weights): losses on routers read it (in a dense family by name:
`modules: model.layers.*.mlp.gate`), and a trash can may take its place.

Shapes: router (num_experts, hidden_size); experts, under the names of the original's projections, (num_experts,
out_features, in_features), their biases `<name>_bias` (num_experts, out_features).

This file needs torch and transformers only and is copied into artifacts as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# How families name the projections of a feed-forward, those into the intermediate size first, and what they compute:
# gated act(a x) * (b x), fused the same with [a; b] in one matrix, plain act(a x); then the last one.
FORMS = (
    ("gated", ("gate_proj", "up_proj", "down_proj")),
    ("gated", ("w1", "w3", "w2")),
    ("fused", ("gate_up_proj", "down_proj")),
    ("plain", ("c_fc", "c_proj")),
    ("plain", ("fc1", "fc2")),
    ("plain", ("fc_in", "fc_out")),
    ("plain", ("dense_h_to_4h", "dense_4h_to_h")),
    ("plain", ("up_proj", "down_proj")),
)
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "activation_function")


class UpcycledRouter(nn.Module):
    """Chooses `top_k` of `num_experts` experts for each token. `weight` is (num_experts, hidden_size)."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits (tokens, num_experts), weights that sum to one and indices (tokens, top_k)."""
        logits = F.linear(hidden_states, self.weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights, index = F.softmax(logits, dtype=wide, dim=-1).topk(self.top_k, dim=-1)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), index


class ExpertStack(nn.Module):
    """Copies of a feed-forward, stacked: one parameter (num_experts, out_features, in_features) for each projection."""

    def __init__(self, original: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.kind, self.names = find_form(original)
        activation = next(name for name in ACTIVATIONS if hasattr(original, name))
        self.act_fn: Callable[[torch.Tensor], torch.Tensor] = getattr(original, activation)
        for name in self.names:
            weight, bias = read_projection(original, name)
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *weight.shape, dtype=weight.dtype)))
            more = nn.Parameter(torch.empty(num_experts, *bias.shape, dtype=bias.dtype)) if bias is not None else None
            self.register_parameter(f"{name}_bias", more)

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns, for (tokens, hidden_size), the experts at `index` weighed by `weights` (tokens, top_k), summed."""
        stacks = {name: (getattr(self, name), getattr(self, f"{name}_bias")) for name in self.names}
        if torch.compiler.is_compiling() or hidden_states.is_meta:  # shapes must not depend on data
            return self._run_all(stacks, hidden_states, index, weights)
        top_k = index.shape[-1]
        slots = index.reshape(-1)
        order = slots.argsort(stable=True)
        counts = slots.bincount(minlength=self.num_experts).tolist()
        pieces = torch.split(hidden_states[order // top_k], counts)
        computed = [self._run_one(stacks, expert, piece) for expert, piece in enumerate(pieces) if len(piece)]
        if not computed:
            return hidden_states * 0.0
        together = torch.cat(computed)
        outputs = together.new_zeros(together.shape).index_copy(0, order, together)
        return (outputs.view(-1, top_k, outputs.shape[-1]) * weights[..., None]).sum(dim=1)

    def _run_one(
        self, stacks: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]], expert: int, states: torch.Tensor
    ) -> torch.Tensor:
        def project(name: str, given: torch.Tensor) -> torch.Tensor:
            weight, bias = stacks[name]
            return F.linear(given, weight[expert], bias[expert] if bias is not None else None)

        *first, last = self.names
        if self.kind == "gated":
            inner = self.act_fn(project(first[0], states)) * project(first[1], states)
        elif self.kind == "fused":
            gate, up = project(first[0], states).chunk(2, dim=-1)
            inner = self.act_fn(gate) * up
        else:
            inner = self.act_fn(project(first[0], states))
        return project(last, inner)

    def _run_all(
        self,
        stacks: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]],
        hidden_states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Runs every expert on every token; those that were not chosen are weighed by zero."""
        shares = weights.new_zeros(*index.shape[:-1], self.num_experts).scatter(-1, index, weights)
        outputs = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            outputs = outputs + self._run_one(stacks, expert, hidden_states) * shares[:, expert, None]
        return outputs


class UpcycledExperts(nn.Module):
    """An MoE block whose experts start as copies of the feed-forward that it replaces.

    Gated feed-forwards (`gate_proj`, `up_proj`, `down_proj`; also as one `gate_up_proj`) and plain ones with two
    projections (GPT-2, GPT-NeoX, Phi) are taken; `FORMS` lists the names.

    Raises:
        ValueError: the original is no such feed-forward, or computes something else than its names say; or an argument
            is out of its range.
    """

    def __init__(
        self,
        original: nn.Module,
        layer_idx: int,
        num_experts: int = 4,
        top_k: int = 2,
        noise: float = 0.0,
        drop: float = 0.0,
        router_std: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be from 1 to num_experts ({num_experts}), but is {top_k}")
        if noise < 0 or router_std <= 0 or not 0 <= drop <= 1:
            raise ValueError(
                "noise must not be negative, router_std must be above 0 and drop from 0 to 1, but they are "
                f"{noise}, {router_std} and {drop}"
            )
        self.num_experts, self.top_k = num_experts, top_k
        self.noise, self.drop, self.router_std = noise, drop, router_std
        self.seed = seed + 1_000_003 * layer_idx
        self.experts = ExpertStack(original, num_experts)
        weight, _ = read_projection(original, self.experts.names[0])
        self.gate = UpcycledRouter(weight.shape[-1], num_experts, top_k, weight.dtype)
        dropout = getattr(original, "dropout", None)
        self.dropout = dropout if isinstance(dropout, nn.Dropout) else nn.Identity()

    def adopt(self, original: nn.Module) -> None:
        """Copies the original into every expert, and draws the router and what is to part the copies."""
        generator = torch.Generator().manual_seed(self.seed)
        for name in self.experts.names:
            for key, value in zip((name, f"{name}_bias"), read_projection(original, name), strict=True):
                if value is not None:
                    self.experts.get_parameter(key).copy_(value)
        if not self.gate.weight.is_meta:
            self._refuse_another_formula(original)
            _fill_normal(self.gate.weight, 0.0, self.router_std, generator)
            self._drop_columns(generator)
            self._add_noise(generator)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (batch_size, sequence_length, hidden_size) to the same shape."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(tokens)
        outputs: torch.Tensor = self.dropout(self.experts(tokens, index, weights))
        return outputs.reshape(hidden_states.shape)

    def _refuse_another_formula(self, original: nn.Module) -> None:
        """Compares an expert with the original on random numbers: equal names do not make equal formulas."""
        stack, generator = self.experts, torch.Generator().manual_seed(self.seed)
        weight = self.gate.weight
        states = torch.randn(8, weight.shape[-1], generator=generator).to(weight)
        stacks = {name: (stack.get_parameter(name), getattr(stack, f"{name}_bias")) for name in stack.names}
        training = original.training
        original.eval()
        try:
            expected = original(states[None])
        except Exception as error:
            raise ValueError(f"{type(original).__name__} is not called as a feed-forward: {error}") from error
        finally:
            original.train(training)
        found = stack._run_one(stacks, 0, states)
        if not isinstance(expected, torch.Tensor) or expected[0].shape != found.shape:
            raise ValueError(f"{type(original).__name__} does not return one tensor of the shape that it is given")
        difference, size = (expected[0] - found).double().norm(), expected.double().norm()
        allowed = max(1e-4, 20 * torch.finfo(weight.dtype).eps) * max(float(size), 1e-9)
        if bool(size.isfinite()) and not float(difference) <= allowed:
            raise ValueError(
                f"{type(original).__name__} has the parts of a {stack.kind} feed-forward "
                f"({', '.join(stack.names)}), but computes something else"
            )

    def _drop_columns(self, generator: torch.Generator) -> None:
        """Makes a share of the intermediate size anew in every expert, out of the statistics of what it replaces."""
        *first, last = self.experts.names
        size = self.experts.get_parameter(last).shape[-1]
        count = round(self.drop * size)
        if not count:
            return
        for expert in range(self.num_experts):
            chosen = torch.randperm(size, generator=generator)[:count]
            for name in first:
                for rows in (chosen, chosen + size)[: 2 if self.experts.kind == "fused" else 1]:
                    _draw_again(self.experts.get_parameter(name)[expert], rows, 0, generator)
            _draw_again(self.experts.get_parameter(last)[expert], chosen, 1, generator)

    def _add_noise(self, generator: torch.Generator) -> None:
        if self.noise:
            for name in self.experts.names:
                for weight in self.experts.get_parameter(name):
                    drawn = torch.empty(weight.shape)
                    drawn.normal_(0.0, self.noise * float(weight.float().std()), generator=generator)
                    weight.add_(drawn.to(weight))


def find_form(original: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Returns what a feed-forward computes (`gated`, `fused` or `plain`) and the names of its projections.

    Raises:
        ValueError: it is none that is known here.
    """
    linears = {name for name, child in original.named_children() if isinstance(child, (nn.Linear, Conv1D))}
    form = next(((kind, names) for kind, names in FORMS if set(names) == linears), None)
    others = {name for name, child in original.named_children() if any(True for _ in child.parameters())} - linears
    direct = [name for name, _ in original.named_parameters(recurse=False)]
    if form is None or others or direct or not any(hasattr(original, name) for name in ACTIVATIONS):
        parts = [f"{name} ({type(child).__name__})" for name, child in original.named_children()] + direct
        raise ValueError(
            "UpcycledExperts takes the place of a dense feed-forward, an activation and the projections "
            f"{'; or '.join(', '.join(names) for _, names in FORMS)}; but {type(original).__name__} consists of: "
            f"{', '.join(parts) or 'no modules'}"
        )
    return form


def read_projection(original: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns a projection's weight as (out_features, in_features), and its bias if it has one."""
    projection = original.get_submodule(name)
    weight, bias = projection.get_parameter("weight"), projection._parameters.get("bias")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"{name} is quantised ({type(projection).__name__}); upcycle the model before it is quantised")
    return (weight.mT if isinstance(projection, Conv1D) else weight), bias


def _fill_normal(tensor: torch.Tensor, mean: float, std: float, generator: torch.Generator) -> None:
    tensor.copy_(torch.empty(tensor.shape).normal_(mean, std, generator=generator))


def _draw_again(weight: torch.Tensor, chosen: torch.Tensor, dim: int, generator: torch.Generator) -> None:
    """Draws the chosen rows (`dim=0`) or columns of a matrix from the mean and standard deviation that they have."""
    chosen = chosen.to(weight.device)
    before = weight.index_select(dim, chosen).float()
    drawn = torch.empty(before.shape)
    drawn.normal_(float(before.mean()), float(before.std()), generator=generator)
    weight.index_copy_(dim, chosen, drawn.to(weight))
