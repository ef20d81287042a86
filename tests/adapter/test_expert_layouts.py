"""Each layout of experts' factors against its definition, written out in loops; ways there and back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from solidify.adapter import expert_layouts as layouts
from solidify.adapter.expert_layouts import Factors

EXPERTS, RANKS, WIDTHS, SEEDS = st.integers(2, 7), st.integers(1, 6), st.integers(2, 9), st.integers(0, 999)
SIZES = st.tuples(EXPERTS, RANKS, WIDTHS, WIDTHS, SEEDS)
LONG = st.integers(6, 9)  # two columns of few numbers may be alike by chance


def drawn(experts: int, rank: int, wide: int, tall: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices of all experts, in whatever order: (experts * rank, wide), (tall, experts * rank)."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(experts * rank, wide, generator=generator, dtype=torch.float64)
    return a, torch.randn(tall, experts * rank, generator=generator, dtype=torch.float64)


def defined(a: torch.Tensor, b: torch.Tensor, experts: int, column: str) -> np.ndarray:
    """The updates by their definition: `column` says where the column of expert e and rank k of B stands."""
    rank = len(a) // experts
    place = {"peft": lambda e, k: k * experts + e, "grouped": lambda e, k: e * rank + k}[column]
    out = np.zeros((experts, b.shape[0], a.shape[1]))
    for e in range(experts):
        for k in range(rank):
            out[e] += np.outer(b[:, place(e, k)].numpy(), a[e * rank + k].numpy())
    return out


def deltas(factors: Factors) -> np.ndarray:
    return np.stack([b.numpy() @ a.numpy() for a, b in zip(*factors, strict=True)])


@pytest.mark.parametrize("order", layouts.ORDERS)
@given(sizes=SIZES.filter(lambda sizes: len(set(sizes[:4])) == 4))
@settings(deadline=None, max_examples=60)
def test_an_order_is_its_definition_and_comes_back(order: str, sizes: tuple[int, int, int, int, int]) -> None:
    experts, rank, wide, tall, seed = sizes
    a, b = drawn(experts, rank, wide, tall, seed)
    factors = layouts.unpack(a, b, experts, order)
    assert factors.a.shape == (experts, rank, wide) and factors.b.shape == (experts, tall, rank)
    np.testing.assert_allclose(deltas(factors), defined(a, b, experts, order), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(layouts.pack(factors, order), (a, b), strict=True):
        assert torch.equal(mine, theirs) and mine.is_contiguous()


@given(sizes=st.tuples(EXPERTS, RANKS, LONG, LONG, SEEDS))
@settings(deadline=None, max_examples=60)
def test_one_order_read_as_the_other_is_wrong(sizes: tuple[int, int, int, int, int]) -> None:
    """The two have the same shapes: a wrong reading is off by the size of the update, and no shape tells of it."""
    experts, rank, wide, tall, seed = sizes
    a, b = drawn(experts, rank, wide, tall, seed)
    right, wrong = (deltas(layouts.unpack(a, b, experts, order)) for order in layouts.ORDERS)
    if rank == 1:
        assert np.array_equal(right, wrong)
    else:
        assert np.linalg.norm(right - wrong) > 0.1 * np.linalg.norm(right)


@given(sizes=SIZES)
@settings(deadline=None, max_examples=60)
def test_peft_until_0_19_0_is_the_transposed_update(sizes: tuple[int, int, int, int, int]) -> None:
    """Its A had the width of the outputs: einsum("o r e, e r i -> e i o") was added to (experts, out, in)."""
    experts, rank, wide, tall, seed = sizes
    a, b = drawn(experts, rank, wide, tall, seed)  # wide: the outputs, tall: the inputs
    expected = np.einsum("ore,eri->eio", b.numpy().reshape(tall, rank, experts), a.numpy().reshape(experts, rank, wide))
    turned = layouts.turn(layouts.unpack(a, b, experts))
    assert turned.a.shape == (experts, rank, tall) and turned.b.shape == (experts, wide, rank)
    np.testing.assert_allclose(deltas(turned), expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(layouts.pack(layouts.turn(turned)), (a, b), strict=True):
        assert torch.equal(mine, theirs)


@given(sizes=SIZES)
@settings(deadline=None, max_examples=40)
def test_lists_and_stacks_come_back(sizes: tuple[int, int, int, int, int]) -> None:
    experts, rank, wide, tall, seed = sizes
    factors = layouts.unpack(*drawn(experts, rank, wide, tall, seed), experts)
    again = layouts.from_list(layouts.to_list(factors))
    assert torch.equal(again.a, factors.a) and torch.equal(again.b, factors.b)
    stacked = layouts.from_stacked(factors.a, factors.b, experts)
    assert torch.equal(stacked.a, factors.a) and torch.equal(stacked.b, factors.b)
    shared = layouts.from_stacked(factors.a[:1], factors.b, experts)
    np.testing.assert_array_equal(deltas(shared), factors.b.numpy() @ factors.a[:1].numpy())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@given(sizes=SIZES)
@settings(deadline=None, max_examples=40)
def test_gate_and_up_become_one_and_part_again(
    interleaved: bool, shared: bool, sizes: tuple[int, int, int, int, int]
) -> None:
    experts, rank, wide, tall, seed = sizes
    gate = layouts.unpack(*drawn(experts, rank, wide, tall, seed), experts)
    up = layouts.unpack(*drawn(experts, rank, wide, tall, seed + 1), experts)
    up = Factors(gate.a.clone(), up.b) if shared else up
    fused = layouts.fuse(gate, up, interleaved=interleaved)
    assert fused.rank == (rank if shared else 2 * rank)
    expected = np.empty((experts, 2 * tall, wide))
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, tall), slice(tall, None))
    expected[:, first], expected[:, second] = deltas(gate), deltas(up)
    np.testing.assert_allclose(deltas(fused), expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(layouts.split(fused, interleaved=interleaved), (gate, up), strict=True):
        assert torch.equal(mine.a, theirs.a) and torch.equal(mine.b, theirs.b)


@given(sizes=SIZES)
@settings(deadline=None, max_examples=40)
def test_any_fused_update_parts_without_loss(sizes: tuple[int, int, int, int, int]) -> None:
    """One that was trained fused has one A for both: the parts share it, and fuse to the same bits."""
    experts, rank, wide, tall, seed = sizes
    fused = layouts.unpack(*drawn(experts, rank, wide, 2 * tall, seed), experts)
    gate, up = layouts.split(fused)
    np.testing.assert_allclose(np.concatenate([deltas(gate), deltas(up)], axis=1), deltas(fused), rtol=1e-12)
    again = layouts.fuse(gate, up)
    assert torch.equal(again.a, fused.a) and torch.equal(again.b, fused.b)


class Experts(nn.Module):
    """As transformers has them: (experts, out_features, in_features)."""

    def __init__(self, experts: int, tall: int, wide: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(experts, tall, wide))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ti,eoi->eto", x, self.up_proj)


def test_peft_s_order_is_that_of_the_installed_peft() -> None:
    """A canary: were PEFT's packing another one, this would say so before an adapter is read wrongly."""
    torch.manual_seed(0)
    experts, rank, wide, tall = 5, 3, 7, 11
    model = get_peft_model(
        nn.Sequential(Experts(experts, tall, wide)),
        LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=["0.up_proj"]),
    )
    a, b = drawn(experts, rank, wide, tall, 1)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.float(), b.float()
    expected = defined(a, b, experts, "peft")
    np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [((6, 4), (5, 6), "not those of 4 experts"), ((8, 4), (5, 6), "must be as many"), ((8,), (5, 8), "\\[8\\]")],
)
def test_factors_of_other_shapes_are_told(a: tuple[int, ...], b: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layouts.unpack(torch.zeros(a), torch.zeros(b), 4)
    with pytest.raises(ValueError, match="is none of peft, grouped"):
        layouts.unpack(torch.zeros(8, 4), torch.zeros(5, 8), 4, "rank_major")
    with pytest.raises(ValueError, match="stacked factors"):
        layouts.from_stacked(torch.zeros(2, 3, 4), torch.zeros(4, 5, 3), 4)
    with pytest.raises(ValueError, match="different shapes"):
        layouts.from_list([(torch.zeros(2, 4), torch.zeros(5, 2)), (torch.zeros(3, 4), torch.zeros(5, 3))])
