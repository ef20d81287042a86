"""Every start, field and kind of the installed PEFT, tried from attach to merge: docs/adapter_kinds.md is made of it.

PEFT's own lists are read from PEFT: the values that its code compares `init_lora_weights` with, LoraConfig's fields,
and PeftType.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import peft
import pico
import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora.layer import LoraLayer

import solidify
from solidify.adapter import kinds, lookup, start_kinds
from solidify.errors import AdapterError
from solidify.model import answers

Q = {"r": 4, "lora_alpha": 6, "target_modules": ["model.layers.*.self_attn.q_proj"]}
BIASED = {**Q, "target_modules": ["**.o_proj.down"]}
WORDS = {**Q, "target_modules": ["model.embed_tokens"]}
EXPERTS = {"r": 4, "lora_alpha": 6, "target_parameters": ["**.experts.gate_up_proj", "**.experts.down_proj"]}
PATTERNS = {
    **Q,
    "use_rslora": True,
    "rank_pattern": {"model.layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3},
}


@dataclass(frozen=True)
class Kind:
    """One row: what it is called, and what is attached."""

    name: str
    lora: Mapping[str, Any]
    train: tuple[str, ...] = ()


@dataclass
class Tried:
    """What came of a kind: a reason why it was refused, or the steps that were right."""

    refused: str = ""
    right: list[str] = field(default_factory=list)


STEPS = ("attach", "off is base", "save and load", "continue", "merge")

STARTED = ("pissa", "pissa_niter_4", "olora")  # what begins with an update, which stays beside the trained one
FED = ("eva", "corda", "lora_ga")  # what is made from data

OFFERED = (
    *(
        Kind(f"init_lora_weights={start!r}", {**Q, "init_lora_weights": start})
        for start in (*start_kinds.STARTS, *STARTED, *FED)
    ),
    Kind("use_dora", {**Q, "use_dora": True}),
    Kind("use_rslora", {**Q, "use_rslora": True}),
    Kind("lora_bias", {**BIASED, "lora_bias": True}),
    Kind("use_bdlora, A by blocks", {**Q, "use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}),
    Kind("use_bdlora, B by blocks", {**Q, "use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 2}}),
    Kind("lora_dropout", {**Q, "lora_dropout": 0.1}),
    Kind("alpha_pattern", {**Q, "alpha_pattern": {"model.layers.1.self_attn.q_proj": 3}}),
    Kind("rank_pattern", {**Q, "rank_pattern": {"model.layers.1.self_attn.q_proj": 2}}),
    Kind("use_dora, init_lora_weights='pissa'", {**Q, "use_dora": True, "init_lora_weights": "pissa"}),
    Kind(
        "use_rslora, rank_pattern, alpha_pattern, init_lora_weights='olora'", {**PATTERNS, "init_lora_weights": "olora"}
    ),
    Kind("target_parameters: stacked experts", EXPERTS),
    Kind("embeddings", WORDS),
    Kind("embeddings, use_dora", {**WORDS, "use_dora": True}),
    Kind("embeddings, init_lora_weights='mica'", {**WORDS, "init_lora_weights": "mica"}),
    Kind("modules and parameters in full (`train`)", {}, ("model.norm", "**.o_proj.scale", "lm_head")),
    Kind("all of these at once", {**Q, **EXPERTS, "use_rslora": True}, ("model.norm", "**.o_proj.scale")),
)

# A value for each field that is refused, as a user may write it.
VALUES: dict[str, Any] = {
    "alora_invocation_tokens": [5, 6],
    "use_qalora": True,
    "layer_replication": [[0, 1], [0, 2]],
    "megatron_config": {"tensor_model_parallel_size": 1},
    "runtime_config": {"ephemeral_gpu_offload": True},
}


def starts() -> set[str]:
    """Reads from PEFT's code, and from its type, with what words low-rank factors can start."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(LoraLayer)))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and "init_lora_weights" in ast.dump(node.left):
            found |= {c.value for c in node.comparators if isinstance(c, ast.Constant) and isinstance(c.value, str)}
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("init_lora_weights.startswith"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    typed = next(f.type for f in fields(LoraConfig) if f.name == "init_lora_weights")
    literal = ast.parse(str(typed), mode="eval")
    found |= {n.value for n in ast.walk(literal) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


def refused() -> list[tuple[str, str]]:
    """Attaches what is refused, one after the other, to one model: names and what is said."""
    model = pico.olmoe()
    cases = [(f"init_lora_weights={start!r}", {"init_lora_weights": start}) for start in start_kinds.REFUSED_STARTS]
    cases += [(f"init_lora_weights={start!r}, no `batches`", {"init_lora_weights": start}) for start in start_kinds.FED]
    cases += [(name, {name: VALUES.get(name, {"any": 1})}) for name in (*kinds.REFUSED_FIELDS, *start_kinds.OF_START)]
    cases += [(f"peft_type={kind!r}", {"peft_type": kind}) for kind in kinds.REFUSED_KINDS]
    found = []
    for name, given in cases:
        try:
            solidify.attach(model, lora={**Q, **given})
            said = "was attached"
        except AdapterError as error:
            said = str(error).removeprefix("the adapter cannot be attached as declared: ")
        found.append((name, said))
    assert not any(".lora_" in name or "base_layer" in name for name, _ in model.named_parameters())
    return found


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    """What starts that are made from data read: padded rows of different lengths, with labels."""
    return [pico.collate(pico.ragged(4, seed=seed)) for seed in range(count)]


def fit(model: PeftModel, steps: int = 3) -> None:
    """Trains a little, on the same batch."""
    torch.manual_seed(1)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    tokens = pico.tokens()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval()


def outputs(model: Any) -> dict[str, torch.Tensor]:
    """All that a model returns."""
    return answers.collect(model, {"tokens": {"input_ids": pico.tokens(seed=7)}}).tensors


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two answers are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def trainable(model: PeftModel) -> set[tuple[str, str]]:
    """Names what is trained, and how."""
    return {(kind, name) for kind, name, parameter in lookup.named_parameters(model) if parameter.requires_grad}


def tried(kind: Kind, artifact: Path, directory: Path, *, merge: bool = True) -> Tried:
    """Attaches, switches off, trains, saves, loads, goes on, merges; each step only after those before it."""
    base = solidify.load(artifact)
    plain, result = outputs(base), Tried()
    try:
        given = batches() if kind.lora.get("init_lora_weights") in FED else None
        model = solidify.attach(base, lora=dict(kind.lora) or None, train=list(kind.train), batches=given)
    except AdapterError as error:
        return Tried(refused=str(error))
    result.right.append("attach")
    asked = trainable(model)

    def off(of: PeftModel) -> bool:
        with of.disable_adapter():
            return same(outputs(of), plain)

    before = off(model)
    fit(model)
    if not (before and off(model) and not same(outputs(model), plain)):
        return result
    result.right.append("off is base")
    solidify.save_adapter(model, directory / "adapter")
    loaded = solidify.load(artifact, directory / "adapter")
    if not (same(outputs(loaded), outputs(model)) and off(loaded)):
        return result
    result.right.append("save and load")
    again = solidify.load_adapter(solidify.load(artifact), directory / "adapter", trainable=True)
    kept = {name: p.detach().clone() for name, p in again.named_parameters() if not p.requires_grad}
    same_set = trainable(again) == asked
    fit(again)
    solidify.save_adapter(again, directory / "further")
    further = solidify.load(artifact, directory / "further")
    unmoved = all(torch.equal(dict(again.named_parameters())[name], value) for name, value in kept.items())
    if not (
        same_set and unmoved and same(outputs(further), outputs(again)) and not same(outputs(again), outputs(model))
    ):
        return result
    result.right.append("continue")
    if merge and all(f.passed for f in solidify.merge(directory / "further", directory / "merged").findings):
        result.right.append("merge")
    return result


TEXT = """\
# Kinds of adapter

Made by `tests/adapter/test_kinds.py` (`make test-all`): every start, field and kind that peft {version} has is tried,
or refused when it is attached, by name and before anything is trained. What PEFT adds is refused until it is decided.

## Offered

*off is base*: switched off, before and after training, the model's outputs are the base's bit for bit. *save and load*:
outputs bit-identical. *continue*: loaded again to be trained, the same tensors are trained (of a start that was
kept frozen, that half too), and no others move.
*merge*: every check of `solidify merge` ([merge.md](merge.md)).

`pissa`, `pissa_niter_[number of iters]`, `olora`, `corda` and `lora_ga` begin with an update that is not zero, which
PEFT takes out of the base's weights. Here the base keeps them: the start stays beside what is trained, frozen and
negative, as the second half of an update of twice the rank. `eva`, `corda` and `lora_ga` are made from data, in Python
from `attach(..., batches=...)` ([adapters.md](adapters.md#how-an-update-starts)).

{offered}

## Refused

{refused}

An adapter of these kinds that another program trained is refused by `merge` in the same words. One that began
elsewhere with `pissa`, `olora`, `corda`, `lora_ga` or `loftq` is refused too: it stands on weights that its base does
not have. The start `eva` is over when training is, and the result is plain LoRA.

Refused by name on single layers, because PEFT's update does not do what the layer does, so that merged would not be
attached: embeddings with `max_norm`; convolutions with `groups`, `dilation` or a `padding_mode`; the projections inside
`nn.MultiheadAttention`, which are read and never called; `lora_bias` on a layer without bias; `use_bdlora` on anything
but `nn.Linear`; `orthogonal` and `mica` on convolutions; starts that are made from weights or data on anything but
linear layers, and all but `eva` on quantised ones; variants, dropout, biases and such starts on `target_parameters`;
two variants at once; and any layer with which the model does not run (some code reads attributes of a layer that PEFT's
layer lacks, as Whisper's does of its convolutions).

## Experts as others lay them out

Adapters of other trainers are read in their own layout of experts, or refused: [LoRA on experts](expert_lora.md).
"""


def page(found: Mapping[str, Tried]) -> str:
    """Writes docs/adapter_kinds.md."""
    offered = [f"| kind | {' | '.join(STEPS)} |", "|---|" + "---|" * len(STEPS)]
    for name, row in found.items():
        offered.append(f"| {name} | " + " | ".join("yes" if step in row.right else "**no**" for step in STEPS) + " |")
    refusals = ["| kind | what is said when it is attached |", "|---|---|", *refused_lines()]
    return TEXT.format(version=peft.__version__, offered="\n".join(offered), refused="\n".join(refusals))


def refused_lines() -> list[str]:
    """Returns the rows of the table of what is refused."""
    return [f"| {name} | {said.replace('|', chr(92) + '|')} |" for name, said in refused()]


def undecided() -> dict[str, set[str]]:
    """Compares PEFT's lists with what has been decided; each set holds what is not decided yet, or what is gone."""
    offered = (*start_kinds.STARTS, *start_kinds.STARTED, *start_kinds.FED)
    decided = {*start_kinds.REFUSED_STARTS, *(start for start in offered if isinstance(start, str))}
    found = {f.name for f in fields(LoraConfig)}
    return {
        "starts": starts() ^ decided,
        "fields": found ^ (kinds.FREE | kinds.REFUSED_FIELDS.keys() | start_kinds.OF_START.keys()),
        "kinds": {k.value for k in PeftType} ^ {*kinds.REFUSED_KINDS, "LORA"},
    }
