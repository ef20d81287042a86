"""How long an MoE block takes when its trash can skips slots, against the stock block. `make bench` runs it."""

from __future__ import annotations

import copy
from functools import partial

import torch
from pairs import compare, write
from transformers import OlmoeConfig, OlmoeForCausalLM

from solidify.modules.trashcan_moe import TrashCanMoE

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 512, 512, 256, 32, 8


def main() -> None:
    """Times the block at several kept shares, without gradients."""
    config = OlmoeConfig(
        vocab_size=64,
        eos_token_id=0,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    torch.manual_seed(0)
    results = {}
    for implementation in ("grouped_mm", "eager"):
        model = OlmoeForCausalLM(config)
        model.set_experts_implementation(implementation)
        stock = model.model.layers[0].mlp
        with torch.no_grad():
            stock.gate.weight.normal_(0, 0.05)
        x = torch.randn(1, TOKENS, HIDDEN)
        ways = {f"stock OlmoeSparseMoeBlock, {implementation}": partial(run, stock, x)}
        for share in (1.0, 0.75, 0.5, 0.25):
            can = TrashCanMoE(copy.copy(stock))
            if share < 1:
                with torch.no_grad():
                    tokens = x.reshape(-1, HIDDEN)
                    logits, _, index = can.gate(tokens)
                    can.trash.bias += torch.quantile(can.trash(tokens, logits, index), 1 - share)
            ways[f"TrashCanMoE, {share:.0%} of the slots kept"] = partial(run, can, x)
        results[implementation] = compare(f"An MoE block, {TOKENS} tokens, {implementation}", ways)
    write("trash_can", results)


def run(block: torch.nn.Module, x: torch.Tensor) -> None:
    """Runs a block a few times."""
    with torch.no_grad():
        for _ in range(5):
            block(x)


if __name__ == "__main__":
    main()
