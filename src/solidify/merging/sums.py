"""What merged weights must be, `W + s·B A` and its relatives, computed here and not by PEFT, and whether they are.

Every element may be off by what rounding does to it, and all of them together may not lean: roundings point anywhere,
and a wrong scale, a forgotten layer or another order points along the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from solidify.adapter import lookup, tokens
from solidify.findings import Finding
from solidify.upstream.peft import BlockDiagonalLinear
from solidify.upstream.torch import own_buffers, own_parameters

SUM = "merged weights are the sum"
# Elements up to which a tensor is computed in float64; beyond, float32 keeps it within three times its own size.
_EXACT = 2**24
_SINGLE = torch.finfo(torch.float32).eps  # PEFT computes updates in float32, whatever the base is stored in
_RARE = math.log(2e9)  # of a billion right tensors, one leans further than is allowed
_EVERY = slice(None)


@dataclass(frozen=True)
class Weight:
    """What a merged weight must be (`wanted`), and what it would be without the update (`without`), in its shape.

    `slack` is how far float32 may be off in computing the update, before it is rounded to what the base is stored in:
    a sum of r products, and the scale, by `(r + 2) / 2` units of `|B| |A|` (Higham, Accuracy and Stability of Numerical
    Algorithms, eq. 3.5).
    """

    wanted: torch.Tensor
    without: torch.Tensor
    slack: torch.Tensor | float = 0.0


@dataclass(frozen=True)
class Off:
    """How far merged weights are off: by shares of what roundings may come to (`roundings`), and along their update.

    `power` sums the squares of the update, and `along` the products of it and the differences. `variance` is that of
    `along` if only roundings differ, and `most` the largest product that they can come to.
    """

    roundings: float
    along: float = 0.0
    power: float = 0.0
    variance: float = 0.0
    most: float = 0.0

    @property
    def lean(self) -> float:
        """The share of the update that the differences add up to (0.01: it is one percent too strong)."""
        return self.along / self.power if self.power and math.isfinite(self.roundings) else 0.0

    @property
    def allowed(self) -> float:
        """What roundings of this many elements may lean, by Bernstein's inequality.

        The scale itself is one float32 number, whose rounding all elements share.
        """
        if not self.power:
            return math.inf
        return (math.sqrt(2 * _RARE * self.variance) + 2 / 3 * _RARE * self.most) / self.power + _SINGLE

    @classmethod
    def of_all(cls, found: Sequence[Off]) -> Off:
        """Returns how far several parts are off together."""
        along, power, variance = (sum(getattr(off, key) for off in found) for key in ("along", "power", "variance"))
        roundings = math.nan if any(math.isnan(off.roundings) for off in found) else max(off.roundings for off in found)
        return cls(roundings, along, power, variance, max(off.most for off in found))


def weight(
    layer: LoraLayer, adapter: str, base: torch.Tensor | None = None, part: slice = _EVERY, rows: slice = _EVERY
) -> Weight:
    """Computes what a layer's weight must become, or some of it.

    `part` is of the first axis, as the tensor is stored, and `rows` are rows of the output within a stack of experts.
    `base` holds the base's values of the part; without it, they are the layer's own. With DoRA rows must be whole.
    `W + s·B A`, by expert where they stack; with DoRA `m · (W + s·B A) / ‖W + s·B A‖`, by rows of the output.
    """
    module, scale = layer.get_base_layer(), float(layer.scaling[adapter])
    single = abs(scale) * (layer.r[adapter] + 2) / 2 * _SINGLE
    own = getattr(module, layer.parameter_name) if isinstance(layer, ParamWrapper) else module.weight
    plain, axis = own[part] if base is None else base, row_axis(layer)
    if isinstance(layer, ParamWrapper) and own.ndim == 3:
        plain = _convert_tensor(taken := rows_at(plain, axis, rows), taken)
        update, size = _multiply_stacked(layer, adapter, taken, part, rows, len(own))
        return Weight(plain + scale * update, plain, single * size)
    turned = axis == 1
    a, b = _flatten_factors(layer, adapter, plain)
    a, b = (a[:, part], b) if turned else (a, b[part])
    plain = _convert_tensor(plain.T if turned else plain, plain)  # (out_features, in_features, *kernel)
    wanted = plain + scale * (b @ a).reshape(plain.shape)  # (out_features, in_features, *kernel)
    found = Weight(wanted, plain, single * (b.abs() @ a.abs()).reshape(plain.shape))
    if layer.use_dora.get(adapter):
        magnitude = _convert_tensor(layer.lora_magnitude_vector[adapter].weight, plain).flatten()
        found = _with_magnitude(found, magnitude if turned else magnitude[part])
    return Weight(*(x.T for x in (found.wanted, found.without, found.slack))) if turned else found  # type: ignore[union-attr]


def row_axis(layer: LoraLayer) -> int:
    """Returns along which axis of a layer's weight the rows of its output stand."""
    base = layer.get_base_layer()
    if not isinstance(layer, ParamWrapper):
        return int(isinstance(base, (Conv1D, nn.Embedding)))
    stacked = getattr(base, layer.parameter_name).ndim == 3
    # A stack of experts that keeps (experts, inputs, outputs) says so to PEFT by an attribute of its own.
    return int(stacked) + int(stacked and getattr(base, "is_transposed", False))


def rows_at(tensor: torch.Tensor, axis: int, rows: slice) -> torch.Tensor:
    """Returns some rows of a tensor, which stand along an axis."""
    return tensor[(*[slice(None)] * axis, rows)]


def _with_magnitude(found: Weight, magnitude: torch.Tensor) -> Weight:
    """Scales rows to a magnitude; a norm of n squares, a quotient and a product are rounded, evenly to both sides."""
    across = [-1, *[1] * (found.wanted.ndim - 1)]  # (out_features, 1, ...)
    by = magnitude.reshape(across) / _compute_norms(found.wanted)
    before = magnitude.reshape(across) * found.without / _compute_norms(found.without)
    wanted, without = by * found.wanted, before.nan_to_num(nan=0.0)  # a row of zeros has no direction
    roundings = 1.5 + math.sqrt(found.wanted[0].numel()) / 4
    return Weight(wanted, without, by.abs() * found.slack + roundings * _SINGLE * wanted.abs())


def bias(layer: LoraLayer, adapter: str, base: torch.Tensor | None = None, part: slice = _EVERY) -> Weight:
    """Computes what (a part of) the bias of a layer must become whose update has one too.

    `base` holds the base's values there; without it, they are the layer's own.
    """
    own = layer.get_base_layer().bias[part] if base is None else base
    plain, update = _convert_tensor(own, own), _convert_tensor(layer.lora_B[adapter].bias[part], own)
    return Weight(plain + float(layer.scaling[adapter]) * update, plain)


def _flatten_factors(layer: LoraLayer, adapter: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A (r, in) and B (out, r), all that a kernel covers flattened."""
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return _convert_tensor(a, like), _convert_tensor(b, like)  # (rank, words), (width, rank)
    factors = [layer.lora_A[adapter], layer.lora_B[adapter]]
    a, b = (f.weight_as_blockdiagonal_matrix() if isinstance(f, BlockDiagonalLinear) else f.weight for f in factors)
    a = _convert_tensor(a, like).flatten(1)  # (rank, in_features * kernel)
    b = _convert_tensor(b, like).flatten(1)  # (out_features, rank)
    return a, b


def _multiply_stacked(
    layer: ParamWrapper, adapter: str, like: torch.Tensor, part: slice, rows: slice, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `B A` and `|B| |A|` of some experts, at some rows: A stands by experts first, B by experts last."""
    a, b = _convert_tensor(layer.lora_A[adapter].weight, like), _convert_tensor(layer.lora_B[adapter].weight, like)
    a = a.reshape(experts, -1, a.shape[-1])[part]  # (experts, rank, in_features)
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)[part, rows]  # (experts, out_features, rank)
    update, size = b @ a, b.abs() @ a.abs()  # (experts, out_features, in_features)
    return (update.mT, size.mT) if row_axis(layer) == 2 else (update, size)  # turned: (experts, inputs, outputs)


def _compute_norms(rows: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1)  # (rows,)
    return lengths.reshape(-1, *[1] * (rows.ndim - 1))  # (rows, 1, ...)


def _convert_tensor(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64 if like.numel() <= _EXACT else torch.float32)


def ulp(expected: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Returns one unit in the last place of each element: of the largest that is rounded, the result and its summands.

    Where products nearly cancel inside the update, `Weight.slack` says how far float32 may be off.
    """
    summands = (expected.wanted, expected.without, expected.wanted - expected.without)
    size = torch.stack([x.abs() for x in summands]).amax(dim=0)  # the weight's shape
    limits = torch.finfo(dtype)  # below `tiny` numbers stand one fixed step apart
    return (limits.eps * size).clamp(min=max(limits.eps * limits.tiny, torch.finfo(torch.float32).tiny))


def off_by(expected: Weight, found: torch.Tensor) -> Off:
    """Returns how far a merged weight is from what it must be.

    Each element: PEFT rounds the update and the sum, each by at most half a unit. All together: what is right and
    rounded once differs from what was rounded twice where a sum lies near the middle of two numbers, by one unit with
    a probability of the first rounding over a unit, evenly to both sides.
    """
    one = ulp(expected, found.dtype)
    error = found.to(expected.wanted.dtype) - expected.wanted
    allowed = one + expected.slack
    if expected.wanted.dtype == torch.float32:  # then what is expected is no more exact than what PEFT computes
        allowed = allowed + expected.slack + one / 2
    update = (expected.wanted - expected.without).double()
    roundings = float((error.abs() / allowed).max()) if error.numel() else 0.0
    if not math.isfinite(roundings):
        return Off(roundings)
    twice = (found.double() - expected.wanted.to(found.dtype).double()) * update
    first = torch.finfo(found.dtype).eps * update.abs() / 4
    variance = update.square() * (one * first + torch.as_tensor(expected.slack).square())
    most = float((allowed * update.abs()).max()) if error.numel() else 0.0
    return Off(roundings, float(twice.sum()), float(update.square().sum()), float(variance.sum()), most)


def effective(model: PeftModel, adapter: str) -> dict[str, Callable[[], Weight]]:
    """Maps each name of the plain model to what its tensor is with the adapter on: computed when it is asked for.

    Tensors without a low-rank update are what runs: the base's own, or the adapter's version of them.
    """
    found: dict[str, Callable[[], Weight]] = {}
    for located in lookup.modules(model):
        for key, tensor in (*own_parameters(located.inner).items(), *own_buffers(located.inner).items()):
            if tensor is not None:
                found[f"{located.name}.{key}" if located.name else key] = partial(Weight, tensor, tensor)
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.scaling:
            continue
        name = lookup.canonical(model, path)
        attribute = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        found[f"{name}.{attribute}"] = partial(weight, layer, adapter)
        if layer.lora_bias.get(adapter):
            found[f"{name}.bias"] = partial(bias, layer, adapter)
    for path, rows in tokens.layers(model):
        if adapter in rows.token_indices:
            found[f"{lookup.canonical(model, path)}.weight"] = partial(_with_rows, rows, adapter)
    return found


def _with_rows(layer: TrainableTokensLayer, adapter: str) -> Weight:
    """Returns a weight with the rows that an adapter trains."""
    merged = layer.get_merged_weights([adapter]).detach()
    return Weight(merged, merged)


def compare(
    attached: Mapping[str, Callable[[], Weight]], merged: Mapping[str, torch.Tensor], changed: Sequence[str]
) -> Finding:
    """Compares every changed tensor of a merged model with what base and adapter add up to.

    A tensor that is trained in full must be the adapter's, rounded to the dtype that it is stored in.
    """
    faults, leaned = [], 0.0
    for name in changed:
        if name not in attached or name not in merged:
            faults.append(f"{name} is not in {'the merged' if name in attached else 'the attached'} model")
            continue
        faults += fault(name, off := _measure_off(attached[name](), merged[name]))
        leaned = max(leaned, abs(off.lean))
    evidence = (
        f"all {len(changed)} are W + s·B·A, computed here and rounded; none leans by more than {leaned:.0e} of it"
    )
    if not changed:
        return Finding.unseen(SUM, "no tensor was changed")
    return Finding(SUM, not faults, "; ".join(faults[:4]) or evidence)


def _measure_off(expected: Weight, found: torch.Tensor) -> Off:
    if expected.wanted.shape != found.shape or not found.is_floating_point():
        alike = expected.wanted.shape == found.shape and torch.equal(expected.wanted, found)
        return Off(0.0 if alike else math.inf)
    if expected.wanted is expected.without:
        alike = torch.equal(expected.wanted.to(found.dtype), found)
        return Off(0.0 if alike else math.inf)
    return off_by(expected, found)


def fault(name: str, off: Off) -> list[str]:
    """Says what is wrong with a merged weight; nothing when roundings explain it."""
    if not off.roundings <= 1:
        return [f"{name} is off by {off.roundings:.1f} times what rounding explains"]
    if not abs(off.lean) <= off.allowed:
        return [f"{name} has its update {1 + off.lean:.4f} times (allowed 1 ± {off.allowed:.1e})"]
    return []
