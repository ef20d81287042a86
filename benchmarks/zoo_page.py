"""The gallery of `solidify.modules`: what each module is, how it is tried on a base, and the page of all of them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REAL, TINY = "builtin:smollm2-135m", "builtin:tiny-olmoe"
TWO, FOUR, SIX = (6, 12), (6, 12, 18, 24), ("llama", "mistral", "qwen3", "gemma3", "olmoe", "gpt2")


@dataclass(frozen=True)
class Trial:
    """How a module is tried: the targets with what is each one's own, arguments, what learns and how long.

    Without `steps` nothing is aligned: the module starts as what it replaces.
    """

    targets: Mapping[str, Mapping[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    learning_rate: float = 0.0
    train: tuple[str, ...] = ()
    base: str = REAL


@dataclass(frozen=True)
class Entry:
    """A row of the gallery."""

    name: str
    file: str
    what: str
    papers: tuple[str, ...]
    replaces: str
    exact: str
    families: Sequence[str]
    recipes: tuple[str, ...]
    trial: Trial

    def load(self) -> Any:
        """Returns the class."""
        return getattr(importlib.import_module(f"solidify.modules.{self.file}"), self.name)


def at(pattern: str, numbers: Sequence[int] = TWO) -> dict[str, dict[str, Any]]:
    """Returns the targets of some layers."""
    return {f"model.layers.{number}.{pattern}": {} for number in numbers}


GALLERY = (
    Entry(
        "GatedAttention",
        "gated_attention",
        "a gate on what every head, or every number, of attention returns",
        ("2505.06708",),
        "attention",
        "start, bit for bit (the gate is one)",
        SIX,
        ("gated_attention.yaml",),
        Trial(at("self_attn", FOUR)),
    ),
    Entry(
        "LinearAttention",
        "linear_attention",
        "softmax within a window, a learned sum of all that is older",
        ("2410.10254", "2402.04347"),
        "attention",
        "a window of at least the text's length",
        ("llama", "qwen3", "gemma3", "olmoe", "mistral"),
        ("linear.yaml", "linear_attention.yaml"),
        Trial(at("self_attn", FOUR), {"window": 32}, 40, 3e-2),
    ),
    Entry(
        "GatedDeltaNet",
        "gated_delta_net",
        "one matrix a head that forgets by a gate and is corrected by the delta rule",
        ("2412.06464", "2406.06484"),
        "attention",
        "transformers' Qwen3-Next layer, with its weights; no start computes what attention did",
        ("llama", "qwen3", "gemma3", "olmoe", "mistral"),
        ("gated_delta_net.yaml",),
        Trial(at("self_attn"), {}, 30, 2e-3, ("**.self_attn",)),
    ),
    Entry(
        "WindowAttention",
        "window_attention",
        "a token sees the last of its text, and the first few",
        ("2309.17453", "2512.10411"),
        "attention",
        "window and sinks of at least the text's length",
        SIX,
        ("window_attention.yaml",),
        Trial(at("self_attn"), {"window": 16, "sinks": 4}, 30, 5e-4, ("**.self_attn",)),
    ),
    Entry(
        "LatentAttention",
        "latent_attention",
        "keys and values of all heads from one short vector a token",
        ("2502.07864", "2502.14837"),
        "attention",
        "full rank, up to rounding",
        SIX,
        ("latent_attention.yaml",),
        Trial(at("self_attn"), {"rank": 96}, 30, 1e-3),
    ),
    Entry(
        "UpcycledExperts",
        "upcycled_experts",
        "an MoE block of copies of a dense feed-forward",
        ("2212.05055", "2502.19261"),
        "feed-forward",
        "start of equal copies (`drop: 0`, `noise: 0`), up to rounding",
        ("llama", "qwen3", "gemma3", "gpt2"),
        ("upcycled.yaml",),
        Trial(at("mlp"), {"num_experts": 4, "top_k": 2, "drop": 0.5}, 30, 1e-3),
    ),
    Entry(
        "BitLinear",
        "bit_linear",
        "ternary weights, trained through the rounding",
        ("2402.17764", "2510.13998"),
        "linear layer",
        "`strength: 0`, bit for bit",
        ("llama", "qwen3", "gemma3", "gpt2"),
        ("bit_linear.yaml",),
        Trial(at("mlp.down_proj"), {"norm": False, "activation_bits": None}, 30, 1e-3, ("**.down_proj",)),
    ),
    Entry(
        "MemoryLayer",
        "memory_layer",
        "many values beside a feed-forward, of which a token finds a few by product keys",
        ("1907.05242", "2412.09764"),
        "feed-forward",
        "start, bit for bit",
        ("llama", "qwen3", "gemma3", "gpt2", "olmoe"),
        ("memory.yaml",),
        Trial(at("mlp"), {"num_keys": 64, "top_k": 8, "heads": 2, "key_size": 64}),
    ),
    Entry(
        "DynamicTanh",
        "dynamic_tanh",
        "a squashed scale that needs no statistics of a token",
        ("2503.10622",),
        "norm",
        "`taper: 0`, bit for bit",
        ("llama", "qwen3", "gemma3", "gpt2", "olmoe"),
        ("dynamic_tanh.yaml",),
        Trial(
            {
                f"model.layers.{number}.post_attention_layernorm": {"input_rms": size}
                for number, size in ((12, 6.1), (18, 8.5), (24, 17.8))
            },
            {"taper": 1.0},
            30,
            1e-2,
        ),
    ),
    Entry(
        "LowRank",
        "low_rank",
        "a linear layer as two thin ones",
        ("2403.07378",),
        "linear layer",
        "full rank, up to rounding",
        SIX,
        ("low_rank.yaml",),
        Trial(at("self_attn.o_proj"), {"share": 0.5}, 30, 1e-3),
    ),
    Entry(
        "TrashCanMoE",
        "trashcan_moe",
        "a learned threshold that skips routed experts not worth their cost",
        ("2406.13233", "2410.07348", "2509.01322"),
        "MoE block",
        "start, bit for bit (nothing is skipped)",
        ("olmoe", "qwen3_moe", "mixtral", "flex_olmo"),
        ("trash_can.yaml",),
        Trial({"model.layers.*.mlp": {}}, base=TINY),
    ),
)

TEXT = """\
# The zoo

Made by `python benchmarks/zoo.py`, which measures what docs/zoo.json does not have yet; a test holds this page to that
file. Each module is one file on torch (and transformers) that is copied into artifacts, with its equations in its
docstring.

## What there is

*Exact at*: where it computes what the module that it replaces does, or what another implementation of it does, held by
its tests. *Families*: those in which its tests try it.

{modules}

## What healing recovers

KL from the base in nats a token, over 2,040 tokens of held-out text of Python's documentation in rows of 256, in
float32: after surgery, and after `align` ([heal](heal.md)) with batches of 4 x 256 tokens. Recovered is the share of it
that is gone. A module that starts as what it replaces has nothing to recover; its KL is that of rounding. The base is
SmolLM2-135M (`builtin:smollm2-135m`) but where a row names another. One run of each, with few layers and steps and
settings that were not searched for: what is reached says what these do, not what the module can.

{figures}
"""


def write_page(figures: Mapping[str, Any]) -> str:
    """Writes docs/zoo.md."""
    modules = [
        "| module | in the place of | what it is | papers | exact at | families | recipes |",
        "|---|" + "---|" * 6,
    ]
    measured = ["| module | where, how | learned | KL after surgery | after align | recovered | tokens |"]
    measured.append("|---|---|---|---:|---:|---:|---:|")
    for entry in GALLERY:
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in entry.papers)
        recipes = ", ".join(f"`examples/{recipe}`" for recipe in entry.recipes)
        families = ", ".join(entry.families)
        modules.append(
            f"| `{entry.name}` | {entry.replaces} | {entry.what} | {papers} | {entry.exact} | {families} | {recipes} |"
        )
        cells = (_say_trial(entry.trial), *_say_figures(entry.trial, figures.get(entry.name)))
        measured.append(f"| `{entry.name}` | {' | '.join(cells)} |")
    return TEXT.format(modules="\n".join(modules), figures="\n".join(measured))


def _say_trial(trial: Trial) -> str:
    """Says where a module was put and with which arguments."""
    numbers = [part for target in trial.targets for part in target.split(".") if part.isdigit()]
    where = f"layers {', '.join(numbers)}" if numbers else "all layers"
    name = next(iter(trial.targets)).partition("layers.")[2].partition(".")[2]
    own = {key: [more[key] for more in trial.targets.values()] for more in trial.targets.values() for key in more}
    given = [f"`{key}: {json.dumps(value)}`" for key, value in {**trial.arguments, **own}.items()]
    base = "" if trial.base == REAL else f" of `{trial.base}`"
    return ", ".join([f"`{name}`, {where}{base}", *given])


def _say_figures(trial: Trial, found: Mapping[str, Any] | None) -> list[str]:
    learned = "all of it" if trial.train else "what is new"
    words = f"{learned}, {trial.steps} steps at {trial.learning_rate:g}" if trial.steps else "nothing"
    if found is None:
        return [words, "not measured yet", "", "", ""]
    if not trial.steps:
        return [words, f"{found['kl_surgery']:.2g}", "exact at start: nothing to recover", "", ""]
    recovered = f"{found['recovered']:.0%}"
    return [words, f"{found['kl_surgery']:.3g}", f"{found['kl_align']:.3g}", recovered, f"{found['tokens']:,}"]
