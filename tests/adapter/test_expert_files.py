"""Adapters in each layout of experts, loaded and merged: the model is its base plus the definition's update."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import solidify
from solidify.__main__ import main
from solidify.adapter import lookup
from solidify.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANK, ALPHA = 3, 5
Deltas = dict[str, torch.Tensor]  # by the parameter's name; (experts, out_features, in_features)
GROUPED = "grouped_by_expert"
UNSLOTH = {"lora_B_layout": GROUPED}


def olmoe() -> PreTrainedModel:
    return pico.olmoe(num_experts=7, intermediate_size=20)


def mixtral() -> PreTrainedModel:
    values = {**pico.SIZES, "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 5}
    return pico.make("MixtralForCausalLM", **values, num_experts_per_tok=2)


def square() -> PreTrainedModel:
    """As OLMoE-1B-7B, gate and up together are square; here the down projection is too, since it gets no update."""
    return pico.olmoe(num_experts=7, intermediate_size=16)


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], str, dict[str, str]]] = {
    "olmoe": (olmoe, "mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "mixtral": (mixtral, "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
}


def written(model: PreTrainedModel, directory: Path, state: dict[str, torch.Tensor], **fields: Any) -> Path:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, **fields}
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, directory / WEIGHTS, {"format": "pt"})
    return directory


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, int, int]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 3}


def fused(
    model: PreTrainedModel, column: Callable[[int, int, int], int], turned: bool = False, only: str = ""
) -> tuple[dict[str, torch.Tensor], Deltas]:
    """The tensors of a fused adapter, and its updates by definition; `column(e, k, experts)` places B's columns."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, torch.Tensor] = {}
    deltas: Deltas = {}
    names = [name for name in shapes(model) if only in name]
    for name in names:
        experts, tall, wide = shapes(model)[name]
        tall, wide = (wide, tall) if turned else (tall, wide)
        a = torch.randn(experts * RANK, wide, generator=generator)
        b = torch.randn(tall, experts * RANK, generator=generator) / 8
        delta = torch.zeros(experts, tall, wide, dtype=torch.float64)
        for e in range(experts):
            for k in range(RANK):
                delta[e] += torch.outer(b[:, column(e, k, experts)].double(), a[e * RANK + k].double())
        owner, _, attribute = name.rpartition(".")
        inner = ".base_layer" if attribute == "gate_up_proj" and not only else ""
        state |= {f"base_model.model.{owner}{inner}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
        deltas[name] = delta.mT * (ALPHA / RANK) if turned else delta * (ALPHA / RANK)
    return state, deltas


def rank_major(expert: int, place: int, experts: int) -> int:
    return place * experts + expert


def by_expert(expert: int, place: int, experts: int) -> int:
    return expert * RANK + place


TARGETS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def projections(model: PreTrainedModel, scale: float) -> tuple[dict[tuple[str, str, int], torch.Tensor], Deltas]:
    """The factors of every projection of every expert, and the updates that they are by definition."""
    generator = torch.Generator().manual_seed(2)
    factors: dict[tuple[str, str, int], torch.Tensor] = {}
    deltas: Deltas = {}
    for name, (experts, tall, wide) in shapes(model).items():
        owner, _, attribute = name.rpartition(".")
        parts = ["gate", "up"] if attribute == "gate_up_proj" else ["down"]
        tall //= len(parts)
        found = []
        for part in parts:
            updates = []
            for e in range(experts):
                a, b = torch.randn(RANK, wide, generator=generator), torch.randn(tall, RANK, generator=generator) / 8
                factors[owner, part, e] = torch.cat([a.flatten(), b.flatten()])
                factors[owner, f"{part}A", e], factors[owner, f"{part}B", e] = a, b
                updates.append(scale * b.double() @ a.double())
                del factors[owner, part, e]
            found.append(torch.stack(updates))
        deltas[name] = torch.cat(found, dim=1)
    return factors, deltas


def moved(model: PreTrainedModel, deltas: Deltas) -> PreTrainedModel:
    """The model that the definition means, in float64."""
    model = model.double()
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta)
    return model


def outputs(model: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    lookup.plain_model(model).set_experts_implementation("eager")  # the others take no float64
    with torch.no_grad():
        return model.to(dtype)(pico.tokens()).logits


def assert_is_defined(
    make: Callable[[], PreTrainedModel], adapter: Path, deltas: Deltas, *, merged: bool = False, **how: Any
) -> None:
    """Loaded (and merged), an adapter is the base plus the definition's updates; and the updates matter."""
    expected, plain = outputs(moved(make(), deltas)), outputs(make())
    found = outputs(solidify.load_adapter(make(), adapter, **how))
    assert (plain - expected).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    if merged:
        assert_merges(make, adapter, deltas, **how)


def assert_merges(make: Callable[[], PreTrainedModel], adapter: Path, deltas: Deltas, **how: Any) -> None:
    base = adapter.with_name(f"{adapter.name} base")
    make().save_pretrained(base)
    out = adapter.with_name(f"{adapter.name} merged")
    merged = solidify.merge(adapter, out, base=base, **how)
    assert all(finding.passed is not False for finding in merged.findings)
    assert [f for f in merged.findings if f.name == "layout of the experts"]
    again = AutoModelForCausalLM.from_pretrained(out)
    for name, delta in deltas.items():
        wanted = make().get_parameter(name).double() + delta
        torch.testing.assert_close(again.get_parameter(name).double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_unsloth_is_its_definition(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Marked as unsloth-zoo marks it, of the whole and of each parameter; the experts' number is not the rank."""
    make = FAMILIES[family][0]
    state, deltas = fused(make(), by_expert)
    names = {"gate_up_proj": {**UNSLOTH, "num_experts": 7}, "down_proj": {**UNSLOTH, "num_experts": 7}}
    details = {"lora_A_layout": "grouped_by_expert", "parameters": names}
    adapter = written(make(), tmp_path / "a", state, **TARGETS, **UNSLOTH, unsloth_fused_expert_lora=details)
    assert_is_defined(make, adapter, deltas, merged=True)
    assert "grouped by expert, as unsloth-zoo trained it" in " ".join(capsys.readouterr().err.split())


def test_the_order_of_unsloth_is_read_where_it_is_said(tmp_path: Path) -> None:
    state, deltas = fused(olmoe(), by_expert)
    adapter = written(olmoe(), tmp_path / "a", state, **TARGETS, base_model_name_or_path="unsloth/olmoe")
    with pytest.raises(AdapterError, match=r"comes from Unsloth .its base is unsloth/olmoe. and carries no mark"):
        solidify.load_adapter(olmoe(), adapter)
    assert_is_defined(olmoe, adapter, deltas, layout="grouped")


def test_the_command_asks_for_the_layout_and_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, deltas = fused(olmoe(), by_expert)
    adapter = written(olmoe(), tmp_path / "a", state, **TARGETS, base_model_name_or_path="unsloth/olmoe")
    olmoe().save_pretrained(tmp_path / "base")
    words = ["merge", str(adapter), "--base", str(tmp_path / "base"), "--output", str(tmp_path / "out")]

    def run(*more: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["solidify", *words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, " ".join(capsys.readouterr().err.split())

    code, told = run()
    assert code == 2
    assert "say which it is (--layout grouped or --layout peft" in told
    assert run("--layout", "grouped")[0] in (0, None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, delta in deltas.items():
        wanted = olmoe().get_parameter(name).double() + delta
        torch.testing.assert_close(again.get_parameter(name).double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("fields", "card", "words"),
    [
        ({"auto_mapping": {"unsloth_fixed": True}}, "", "says unsloth_fixed"),
        ({}, "---\ntags:\n- unsloth\n---\n", "README.md names it"),
        ({"base_model_name_or_path": "/home/me/unsloth/olmoe"}, "", "its base is /home/me/unsloth/olmoe"),
    ],
)
def test_what_comes_from_unsloth_unmarked_is_refused(
    tmp_path: Path, fields: dict[str, Any], card: str, words: str
) -> None:
    """By any trace; PEFT's own order is read when that is what is said."""
    state, deltas = fused(olmoe(), rank_major)
    adapter = written(olmoe(), tmp_path / "a", state, **TARGETS, **fields)
    (adapter / "README.md").write_text(card)
    with pytest.raises(AdapterError, match=words):
        solidify.load_adapter(olmoe(), adapter)
    expected = outputs(moved(olmoe(), deltas))
    found = outputs(solidify.load_adapter(olmoe(), adapter, layout="peft"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_mark_in_the_header_is_obeyed(tmp_path: Path) -> None:
    state, deltas = fused(olmoe(), by_expert)
    adapter = written(olmoe(), tmp_path / "a", state, **TARGETS)
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, {"format": "pt", **UNSLOTH})
    found = outputs(solidify.load_adapter(olmoe(), adapter))
    torch.testing.assert_close(found, outputs(moved(olmoe(), deltas)), rtol=0, atol=1e-9)


def of_parameters(mark: Any) -> dict[str, Any]:
    single = {name: {"lora_B_layout": mark} for name in ("gate_up_proj", "down_proj")}
    return {"unsloth_fused_expert_lora": {"parameters": single}}


EMPTY = (None, "", False)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"is_3d_lora_weight": True},
        *({"lora_B_layout": mark} for mark in ("rank_major", "peft", *EMPTY)),
        *(of_parameters(mark) for mark in ("rank_major", "peft", *EMPTY)),
        {"lora_B_layout": None, "lora_A_layout": "grouped_by_expert"},
    ],
)
def test_peft_s_own_layout_is_read_as_it_stands(
    tmp_path: Path, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Unmarked, with marks that are empty, marked so by Unsloth, by PEFT's name, and by vLLM's word for it."""
    state, deltas = fused(mixtral(), rank_major)
    assert_is_defined(mixtral, written(mixtral(), tmp_path / "a", state, **TARGETS, **fields), deltas)
    assert "its experts have PEFT's fused layout" in " ".join(capsys.readouterr().err.split())


def test_in_and_out_were_exchanged_until_peft_0_19_0(tmp_path: Path) -> None:
    """The shapes tell, where some are not square; otherwise the version does, and without it nothing."""
    state, deltas = fused(mixtral(), rank_major, turned=True)
    adapter = written(mixtral(), tmp_path / "a", state, **TARGETS, peft_version="0.18.1")
    assert_is_defined(mixtral, adapter, deltas)
    state, deltas = fused(square(), rank_major, turned=True, only="gate_up_proj")
    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    adapter = written(square(), tmp_path / "b", state, **targets, peft_version="0.19.0")
    assert_is_defined(square, adapter, deltas)
    again, deltas = fused(square(), rank_major, only="gate_up_proj")
    adapter = written(square(), tmp_path / "now", again, **targets, peft_version="0.19.1")
    assert_is_defined(square, adapter, deltas)
    adapter = written(square(), tmp_path / "c", state, **targets)
    with pytest.raises(AdapterError, match=r"its experts are square .gate_up_proj: .32, 32.. and its .* no `peft_vers"):
        solidify.load_adapter(square(), adapter)


def test_an_empty_mark_is_none(tmp_path: Path) -> None:
    """What stands elsewhere, or is said, counts beside it; and without either the order is not known."""
    state, deltas = fused(olmoe(), by_expert)
    expected = outputs(moved(olmoe(), deltas))
    for number, mark in enumerate(EMPTY):
        for place, fields in (("a", {"lora_B_layout": mark}), ("b", of_parameters(mark))):
            adapter = written(olmoe(), tmp_path / f"{place}{number}", state, **TARGETS, **fields)
            found = outputs(solidify.load_adapter(olmoe(), adapter, layout="grouped"))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
            config = json.loads((adapter / CONFIG).read_text())
            (adapter / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "unsloth/x"}))
            with pytest.raises(AdapterError, match="the order of its experts is not known: it comes from Unsloth"):
                solidify.load_adapter(olmoe(), adapter)
            save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, {"format": "pt", **UNSLOTH})
            found = outputs(solidify.load_adapter(olmoe(), adapter))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_one_by_one_are_their_definition(tmp_path: Path, family: str, rslora: bool) -> None:
    """As PEFT wrote them in transformers 4: names of that time, a linear layer for each, and dropout."""
    make, block, names = FAMILIES[family]
    factors, deltas = projections(make(), ALPHA / (math.sqrt(RANK) if rslora else RANK))
    state = {
        f"base_model.model.{owner.replace('mlp', block)}.{e}.{names[part[:-1]]}.lora_{part[-1]}.weight": tensor
        for (owner, part, e), tensor in factors.items()
    }
    query = make().model.layers[1].self_attn.q_proj.weight
    a, b = torch.randn(RANK, query.shape[1]), torch.randn(query.shape[0], RANK) / 8
    attention = "base_model.model.model.layers.1.self_attn.q_proj"
    state |= {f"{attention}.lora_A.weight": a, f"{attention}.lora_B.weight": b}
    router = f"base_model.model.model.layers.0.{block}.gate"
    gate = make().model.layers[0].mlp.gate.weight
    c, d = torch.randn(RANK, gate.shape[1]), torch.randn(gate.shape[0], RANK) / 8
    state |= {f"{router}.lora_A.weight": c, f"{router}.lora_B.weight": d}
    scale = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    deltas["model.layers.1.self_attn.q_proj.weight"] = scale * b.double() @ a.double()
    deltas["model.layers.0.mlp.gate.weight"] = scale * d.double() @ c.double()
    fields = {"target_modules": ["q_proj", "gate", *names.values()], "lora_dropout": 0.1, "use_rslora": rslora}
    assert_is_defined(make, written(make(), tmp_path / "a", state, **fields), deltas, merged=family == "mixtral")


def test_stacked_experts_may_share_a_factor(tmp_path: Path) -> None:
    """As vLLM stacks them: w1, w2 and w3 of three axes, the first of size 1 where all experts share the factor."""
    factors, deltas = projections(olmoe(), ALPHA / RANK)
    words, state = {"gate": "w1", "up": "w3", "down": "w2"}, {}
    for name, (experts, _, _) in shapes(olmoe()).items():
        owner, _, attribute = name.rpartition(".")
        for part in ["gate", "up"] if attribute == "gate_up_proj" else ["down"]:
            a = torch.stack([factors[owner, f"{part}A", e] for e in range(experts)])
            b = torch.stack([factors[owner, f"{part}B", e] for e in range(experts)])
            if part == "down":
                b = b[:1]
                deltas[name] = ALPHA / RANK * b.double() @ a.double()
            state |= {f"base_model.model.{owner}.{words[part]}.lora_{x}.weight": t for x, t in (("A", a), ("B", b))}
    adapter = written(olmoe(), tmp_path / "a", state, target_modules=["experts"])
    assert_is_defined(olmoe, adapter, deltas)


def test_one_projection_alone_is_read(tmp_path: Path) -> None:
    """Which PEFT refuses: `Cannot convert PEFT target(s) gate_proj without also targeting up_proj`."""
    factors, deltas = projections(olmoe(), ALPHA / RANK)
    state = {
        f"base_model.model.{owner}.{e}.gate_proj.lora_{part[-1]}.weight": tensor
        for (owner, part, e), tensor in factors.items()
        if part.startswith("gate")
    }
    deltas = {name: delta for name, delta in deltas.items() if name.endswith("gate_up_proj")}
    for delta in deltas.values():
        delta[:, delta.shape[1] // 2 :] = 0
    assert_is_defined(olmoe, written(olmoe(), tmp_path / "a", state, target_modules=["gate_proj"]), deltas)


def lists(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], **fields: Any) -> Path:
    factors, _ = projections(olmoe(), 1)
    state = {
        f"base_model.model.{owner}.{e}.{part[:-1]}_proj.lora_{part[-1]}.weight": tensor
        for (owner, part, e), tensor in factors.items()
    }
    change(state)
    return written(olmoe(), directory, state, **{"target_modules": ["gate_proj", "up_proj", "down_proj"], **fields})


FIRST = "base_model.model.model.layers.0.mlp.experts"
REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "an expert is missing": (
        lambda path: lists(path, lambda state: state.pop(f"{FIRST}.3.up_proj.lora_B.weight")),
        {},
        "experts has 7 experts, and of their up projections the adapter has no lora_B .1 tensors, .* expert 3",
    ),
    "experts of different ranks": (
        lambda path: lists(path, lambda s: s.update({f"{FIRST}.3.up_proj.lora_A.weight": torch.zeros(4, 32)})),
        {},
        "the experts' factors have different shapes",
    ),
    "experts of different alphas": (
        lambda path: lists(path, lambda _: None, alpha_pattern={"experts.2.up_proj": 7}),
        {},
        "experts of .* have different alphas",
    ),
    "gate and up of different scales": (
        lambda path: lists(path, lambda _: None, alpha_pattern={"up_proj": 7}),
        {},
        "gate and up of .* have different scales",
    ),
    "DoRA": (lambda path: lists(path, lambda _: None, use_dora=True), {}, "its experts have use_dora, which fused"),
    "another layout is said": (
        lambda path: lists(path, lambda _: None),
        {"layout": "grouped"},
        "its experts are one by one, .*, and the layout is said to be grouped",
    ),
    "a layout that nobody knows": (lambda path: lists(path, lambda _: None), {"layout": "x"}, "take one of peft, grou"),
    "a mark that nobody knows": (
        lambda path: written(olmoe(), path, fused(olmoe(), rank_major)[0], **TARGETS, lora_B_layout="by_rank"),
        {},
        "in the order of another trainer .lora_B_layout: 'by_rank'",
    ),
    "a mark in an unknown place": (
        lambda path: written(olmoe(), path, fused(olmoe(), rank_major)[0], **TARGETS, my_lora_B_layout=GROUPED),
        {},
        "in the order of another trainer .my_lora_B_layout: 'grouped_by_expert'",
    ),
    "a mark of a parameter that is not there": (
        lambda path: written(
            olmoe(),
            path,
            fused(olmoe(), rank_major)[0],
            **TARGETS,
            unsloth_fused_expert_lora={"parameters": {"up_proj": UNSLOTH}},
        ),
        {},
        "it marks the order of parameters of which it holds no update .*up_proj.lora_B_layout",
    ),
    "a mark, and another is said": (
        lambda path: written(olmoe(), path, fused(olmoe(), rank_major)[0], **TARGETS, **UNSLOTH),
        {"layout": "peft"},
        "it marks the layout of its experts as grouped, and the layout is said to be peft",
    ),
    "fused, and lists are said": (
        lambda path: written(olmoe(), path, fused(olmoe(), rank_major)[0], **TARGETS),
        {"layout": "lists"},
        "its experts are fused, and the layout is said to be lists",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_right_reading_is_refused(tmp_path: Path, name: str) -> None:
    make, how, words = REFUSED[name]
    adapter, model = make(tmp_path / "a"), olmoe()
    with pytest.raises(AdapterError, match=words):
        solidify.load_adapter(model, adapter, **how)
    olmoe().save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=words):
        solidify.merge(adapter, tmp_path / "out", base=tmp_path / "base", **how)
    assert not (tmp_path / "out").exists()
    torch.testing.assert_close(outputs(model), outputs(olmoe()), rtol=0, atol=0)


def test_without_experts_no_layout_is_said(tmp_path: Path) -> None:
    get_peft_model(olmoe(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    solidify.load_adapter(olmoe(), tmp_path)
    with pytest.raises(AdapterError, match=r"it holds no experts that have a layout .grouped."):
        solidify.load_adapter(olmoe(), tmp_path, layout="grouped")
