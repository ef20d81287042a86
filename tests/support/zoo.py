"""What the tests of `solidify.modules` share: tiny families, and the whole life of a changed model.

`model("llama")` is a fresh random model with weights that have opinions; `FAMILIES` says where things stand in it.
`whole_life` takes a changed model through build, reload, generation, a step of training, saving and merging.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pico
import torch
from torch import nn
from transformers import PreTrainedModel

import solidify
from solidify.recipe import schema

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
FEED_FORWARD = {"intermediate_size": 96, "max_position_embeddings": 128}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 0}


@dataclass(frozen=True)
class Family:
    """A causal family: transformers' head, its settings, and the patterns of what can be replaced."""

    head: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    attention_name: str = "self_attn"
    output_name: str = "o_proj"

    @property
    def attention(self) -> str:
        """The pattern of all attentions."""
        return f"{self.layers}.*.{self.attention_name}"

    @property
    def feed_forward(self) -> str:
        """The pattern of all feed-forwards."""
        return f"{self.layers}.*.mlp"

    @property
    def output(self) -> str:
        """The pattern of all output projections."""
        return f"{self.attention}.{self.output_name}"


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {**GROUPED, **FEED_FORWARD}),
    "mistral": Family("MistralForCausalLM", {**GROUPED, **FEED_FORWARD, "sliding_window": 8}),
    "qwen3": Family("Qwen3ForCausalLM", {**GROUPED, **FEED_FORWARD}),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        {
            **GROUPED,
            **FEED_FORWARD,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {
            "num_key_value_heads": 2,
            **FEED_FORWARD,
            "intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "clip_qkv": 1.5,
        },
    ),
    "gpt2": Family("GPT2LMHeadModel", {"n_positions": 128}, "transformer.h", "attn", "c_proj"),
}


def model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> PreTrainedModel:
    """Builds a tiny random model of a family in evaluation mode; `attention` is `eager` or `sdpa`."""
    family = FAMILIES[name]
    values: dict[str, Any] = {**SIZES, **SPECIAL, **family.settings, **settings}
    if attention is not None:
        values["attn_implementation"] = attention
    made = pico.make(family.head, seed=seed, dtype=dtype, **values)
    if dtype == torch.float64 and "num_experts" in values:
        made.set_experts_implementation("eager")  # grouped products know no float64
    _give_opinions(made)
    return made


def models(*names: str, **settings: Any) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yields a model of every family (or of those named) with its name."""
    for name in names or FAMILIES:
        yield name, model(name, **settings)


@torch.no_grad()
def _give_opinions(made: PreTrainedModel) -> None:
    """Scales matrices up to what keeps a signal's size, and makes constants differ, so that outputs tell apart."""
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        spread = float(parameter.std())
        if spread == 0:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
        elif parameter.ndim >= 2 and spread < (wanted := parameter.shape[-1] ** -0.5):
            parameter.mul_(wanted / spread)


@torch.no_grad()
def stir(module: nn.Module, names: Sequence[str], *, scale: float = 0.3, seed: int = 2) -> None:
    """Adds noise to the parameters whose names end in one of `names`: away from an exact start."""
    generator = torch.Generator().manual_seed(seed)
    stirred = [p for name, p in module.named_parameters() if name.endswith(tuple(names))]
    assert stirred, f"no parameter is called {names}"
    for parameter in stirred:
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def prompts(length: int = 12) -> dict[str, torch.Tensor]:
    """Two rows of tokens, the second padded on the left."""
    ids = pico.tokens(2, length, seed=5)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_cache_changes_nothing(made: Any, *, count: int = 8) -> None:
    """Generates greedily with the cache and without it, also with left padding: the same text, the same scores."""
    told = []
    for use_cache in (True, False):
        told.append(
            made.generate(
                **prompts(),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    assert torch.equal(told[0].sequences, told[1].sequences)
    scores = [torch.stack(text.logits) for text in told]
    scale = float(scores[1].abs().max())
    assert float((scores[0] - scores[1]).abs().max()) < 1e-4 * scale


def assert_example_plans(name: str, module_class: str, count: int) -> None:
    """Plans a recipe of `examples/` (its base is the fixture `tiny_base`): it makes so many modules of that class."""
    found = solidify.plan(schema.load(EXAMPLES / f"{name}.yaml"))
    assert [edit.new_class for edit in found.edits] == [module_class] * count


def whole_life(
    changed: PreTrainedModel,
    edits: Sequence[solidify.Edit],
    directory: Path,
    *,
    lora: Sequence[str],
    train: Sequence[str] = (),
) -> None:
    """Takes a changed model through its life, and asserts at every step; `lora` and `train` as for `attach`.

    Built and reloaded in a process without solidify; reloaded here from the artifact's own code, bit for bit; greedy
    text with the cache as without; a step of training that moves what is declared (and reaches all of `train`), saved,
    merged, and the merged model is what the attached one was, in logits and in text.
    """
    expected = _logits(changed)
    artifact, adapter, merged = directory / "artifact", directory / "adapter", directory / "merged"
    solidify.build(changed, edits, artifact)
    loaded = solidify.load(artifact)
    assert torch.equal(_logits(loaded), expected)
    assert_cache_changes_nothing(loaded)

    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(lora)}
    attached = solidify.attach(loaded, lora=settings, train=list(train))
    _train_a_step(attached)
    trained = _logits(attached)
    assert not torch.allclose(trained, expected, rtol=1e-3, atol=1e-4)
    solidify.save_adapter(attached, adapter)
    solidify.merge(adapter, merged)
    whole = solidify.load(merged)
    assert torch.allclose(_logits(whole), trained, rtol=1e-4, atol=1e-4 * float(trained.abs().max()))
    assert_cache_changes_nothing(whole)


@torch.no_grad()
def _logits(made: Any) -> torch.Tensor:
    made.eval()
    return made(**prompts(16)).logits


def _train_a_step(attached: Any) -> None:
    ids = pico.tokens(2, 16, seed=7)
    attached.train()
    learned = {name: p for name, p in attached.named_parameters() if p.requires_grad}
    attached(input_ids=ids, labels=ids).loss.backward()
    still = [n for n, p in learned.items() if "lora_A" not in n and (p.grad is None or not bool(p.grad.any()))]
    assert not still, f"no gradient reaches {still}"
    torch.optim.SGD(learned.values(), lr=0.5).step()
    attached.eval()
