"""Every MoE family of transformers and what can be done to its experts: the table of docs/experts.md is made of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import experts
import families
import torch
from transformers import PreTrainedConfig, PreTrainedModel

import solidify
from solidify.errors import HealingError, SurgeryError
from solidify.model import anatomy, probing
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.surgery import expert_change, expert_parts

EXPERTS = 8
# Families whose default configuration has no experts, or one.
WITH_EXPERTS: Mapping[str, Mapping[str, Any]] = {
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
}
QUICK = ("olmoe", "deepseek_v3", "dbrx")


def listed() -> Iterator[tuple[str, str]]:
    """Yields every model type with experts, once, and its Auto class."""
    seen = set[str]()
    for model_type, auto in families.cases():
        if model_type not in seen and _has_experts(families.tiny_config(model_type), model_type):
            seen.add(model_type)
            yield model_type, auto


def build(model_type: str, auto: str) -> PreTrainedModel:
    """Returns a tiny model with eight experts in each block."""
    config = families.tiny_config(model_type)
    for part in _parts(config):
        for key, value in list(vars(part).items()):
            if value == 4 and key.endswith((*experts.COUNTS, "moe_num_experts")):
                setattr(part, key, EXPERTS)
    for key, value in WITH_EXPERTS.get(model_type, {}).items():
        setattr(config, key, value)
    head = families.head_of(config, auto)
    if not isinstance(config, head.config_class):
        config = next(part for part in _parts(config) if isinstance(part, head.config_class))
    torch.manual_seed(0)
    model: PreTrainedModel = head(config).eval()
    families.give_opinions(model)
    experts.fill_tables(model, EXPERTS)
    return model


def blocks(model: PreTrainedModel) -> list[str]:
    """The modules that hold experts and a router, whatever their form, and are called (JetMoE's attentions are not)."""
    found = _called(model, experts.blocks(model))
    if not found:
        parts = {name: {key for key, _ in module.named_children()} for name, module in model.named_modules()}
        found = [n for n, p in parts.items() if n and "experts" in p and p & {"gate", "router"}]
    if not found:
        found = [
            n
            for n, m in model.named_modules()
            if re.search("MoE|Moe(?!.*Layer)|Sparse", type(m).__name__) and ".layers." in n
        ]
    return [n for n in found if not any(n.startswith(f"{other}.") for other in found)]


def _called(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    seen: list[str] = []
    hooks = [model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name)) for name in names]
    anatomy.run(model, probing.probe_inputs(model))
    for hook in hooks:
        hook.remove()
    return [name for name in names if name in seen]


def row(model_type: str, auto: str) -> dict[str, str]:
    """Tries every operation on a family, each on a model of its own: operation -> "" or what was refused."""
    return {name: _attempt(operate, model_type, auto) for name, operate in OPERATIONS.items()}


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Writes the rows, with the refusals as numbered sentences below."""
    sentences = list(dict.fromkeys(cell for each in rows.values() for cell in each.values() if cell))
    lines = [line(model_type, cells, sentences) for model_type, cells in rows.items()]
    head = [f"| family | {' | '.join(OPERATIONS)} |", f"|---|{'---|' * len(OPERATIONS)}"]
    notes = [f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1)]
    return "\n".join([*head, *lines, "", "Refused, and what is said:", "", *notes])


def line(model_type: str, cells: Mapping[str, str], sentences: Sequence[str]) -> str:
    """Writes one row."""
    words = [f"no ({sentences.index(cell) + 1})" if cell else "yes" for cell in cells.values()]
    return f"| {model_type} | {' | '.join(words)} |"


def _attempt(operate: Callable[[PreTrainedModel, list[str]], None], model_type: str, auto: str) -> str:
    model = build(model_type, auto)
    names = blocks(model)
    assert names, f"{model_type}: no block with experts was found"
    try:
        operate(model, names)
    except (SurgeryError, HealingError) as error:
        return _without_names(error.faults[0], names, model)
    return ""


def _without_names(sentence: str, names: Sequence[str], model: PreTrainedModel) -> str:
    """Leaves out what differs between families that are refused for one reason."""
    for name in sorted(names, key=len, reverse=True):
        sentence = sentence.replace(name, "BLOCK")
    sentence = re.sub(r"\b\d\.\d+e[+-]\d+|\b\d\.\d{2,}", "x", sentence).removeprefix("BLOCK: ")
    classes = {type(module).__name__ for module in model.modules()}
    sentence = re.sub(r"\b[A-Z]\w+\b", lambda found: "CLASS" if found[0] in classes else found[0], sentence)
    return sentence.replace("\n", " ")


def _same(model: PreTrainedModel, before: Any, inputs: Mapping[str, torch.Tensor]) -> None:
    after = anatomy.run(model, inputs)
    assert float((after - before).abs().max()) < 5e-5 * float(before.abs().max())


def _score(model: PreTrainedModel, names: list[str]) -> None:
    scores = solidify.score_experts(model, names, [probing.probe_inputs(model)])
    assert set(scores.scores) == set(names) and all(sum(counts) > 0 for counts in scores.counts.values())


def _prune(model: PreTrainedModel, names: list[str]) -> None:
    orders = {}
    for name, order in expert_change.present_orders(model, names).items():
        groups = expert_parts.count_groups(model, name)
        width = len(order) // groups
        orders[name] = [e for e in order if e % width < max(1, width // 2)]
    solidify.rearrange_experts(model, names, orders)
    assert torch.isfinite(anatomy.run(model, probing.probe_inputs(model))).all()
    for name, order in orders.items():
        assert expert_parts.plan_block(model, name, [])["size"] == len(order)


def _reorder(model: PreTrainedModel, names: list[str]) -> None:
    inputs = probing.probe_inputs(model)
    before = anatomy.run(model, inputs)
    orders = {name: order[::-1] for name, order in expert_change.present_orders(model, names).items()}
    solidify.rearrange_experts(model, names, orders)
    _same(model, before, inputs)


def _merge(model: PreTrainedModel, names: list[str]) -> None:
    solidify.merge_experts(model, names, solidify.cluster_experts(model, names, EXPERTS // 2))
    assert torch.isfinite(anatomy.run(model, probing.probe_inputs(model))).all()


def _duplicate(model: PreTrainedModel, names: list[str]) -> None:
    inputs = probing.probe_inputs(model)
    before = anatomy.run(model, inputs)
    solidify.duplicate_experts(model, names, 2)
    _same(model, before, inputs)


def _choose(model: PreTrainedModel, names: list[str]) -> None:
    number = next(iter(expert_change.present_choices(model, names).values())) + 1
    solidify.rearrange_experts(model, names, experts_per_token=number)
    assert set(expert_change.present_choices(model, names).values()) == {number}


def _trash(model: PreTrainedModel, names: list[str]) -> None:
    inputs = probing.probe_inputs(model)
    before = anatomy.run(model, inputs)
    solidify.replace(model, names, TrashCanMoE)
    assert torch.equal(anatomy.run(model, inputs), before)


OPERATIONS: Mapping[str, Callable[[PreTrainedModel, list[str]], None]] = {
    "score": _score,
    "prune": _prune,
    "reorder": _reorder,
    "merge": _merge,
    "duplicate": _duplicate,
    "experts a token": _choose,
    "trash can": _trash,
}


def _has_experts(config: PreTrainedConfig, model_type: str) -> bool:
    counts = [
        value
        for part in _parts(config)
        for key, value in vars(part).items()
        if key.endswith(experts.COUNTS) and type(value) is int
    ]
    return model_type in WITH_EXPERTS or any(count > 1 for count in counts)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)
