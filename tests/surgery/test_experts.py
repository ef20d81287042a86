"""Experts chosen, repeated and reordered: what the block computes then, in which families, and what is refused."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import experts
import families
import numpy as np
import pico
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import solidify
from solidify.checks import structure
from solidify.errors import ArtifactError, SurgeryError
from solidify.model import anatomy, assembling, operations
from solidify.surgery import catalogue, expert_groups, expert_proof

BLOCK = "OlmoeSparseMoeBlock"


def logits(model: PreTrainedModel) -> torch.Tensor:
    return solidify_run(model, pico.tokens(rows=3))


def solidify_run(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=ids).logits)


def block_by_hand(
    state: dict[str, torch.Tensor], states: torch.Tensor, chosen: int, experts: list[int]
) -> torch.Tensor:
    """What an OLMoE block computes in float64 (Muennighoff et al. 2409.02060), of some of its experts; loops alone."""
    router = state["gate.weight"].double()[experts]
    gated, down = state["experts.gate_up_proj"].double()[experts], state["experts.down_proj"].double()[experts]
    out = torch.zeros_like(states, dtype=torch.float64)
    for row, token in enumerate(states.double()):
        weights = torch.softmax(router @ token, dim=-1)
        for place in torch.topk(weights, chosen).indices.tolist():
            gate, up = (gated[place] @ token).chunk(2)
            out[row] += weights[place] * (down[place] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("order", [[5, 2, 0], [7, 6, 5, 4, 3, 2, 1, 0], [1, 1, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 0]])
def test_a_block_computes_what_its_new_experts_compute(order: list[int]) -> None:
    model = pico.olmoe()
    before = {key: tensor.clone() for key, tensor in model.model.layers[1].mlp.state_dict().items()}
    states = torch.randn(11, model.config.hidden_size)
    edits = solidify.rearrange_experts(model, "**.mlp", order, expect=BLOCK, count=2)
    block = model.model.layers[1].mlp
    with torch.no_grad():
        found = block(states[None])
    found = (found[0] if isinstance(found, tuple) else found)[0]
    expected = block_by_hand(before, states, model.config.num_experts_per_tok, order)
    assert float((found.double() - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert model.config.num_experts == len(order)
    assert [edit.name for edit in edits] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_another_order_alone_computes_the_same() -> None:
    model = pico.olmoe()
    before = logits(model)
    solidify.rearrange_experts(model, "**.mlp", [7, 6, 5, 4, 3, 2, 1, 0])
    assert float((logits(model) - before).abs().max()) < 1e-5


def test_the_order_that_stands_changes_no_tensor() -> None:
    model = pico.olmoe()
    before = logits(model)
    edits = solidify.rearrange_experts(model, "**.mlp", range(8))
    assert torch.equal(logits(model), before)
    assert all(edit.identical and not edit.dropped for edit in edits)


OFTEN = ("qwen2_moe", "gpt_oss", "ernie4_5_moe")  # a form of experts each
SELDOM = (
    "jetmoe",
    "mixtral",
    "deepseek_v2",
    "granitemoe",
    "phimoe",
    "lfm2_moe",
    "glm4_moe",
    "llama4_text",
    "afmoe",
    "jamba",
)


@pytest.mark.parametrize("family", [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)])
def test_families_with_experts_of_every_form(family: str) -> None:
    """Stacks and lists, routers with biases and corrections, shared experts beside them."""
    model = families.tiny(family)
    names = [n for n, m in model.named_modules() if n.endswith(("mlp", "moe", "feed_forward")) and has_experts(m)]
    before = logits(model)
    solidify.rearrange_experts(model, names, [2, 3, 0, 1])
    assert float((logits(model) - before).abs().max()) < 2e-5 * float(before.abs().max())
    solidify.rearrange_experts(model, names, [3, 0, 1])
    assert torch.isfinite(logits(model)).all()


def has_experts(module: torch.nn.Module) -> bool:
    return any(parameter.ndim == 3 for parameter in module.parameters())


def test_a_router_that_knows_experts_by_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that it does not say: it chooses among them all the same."""
    model = families.tiny("deepseek_v3")
    monkeypatch.setattr(expert_groups, "find_groups", lambda *_: None)
    before = logits(model)
    with pytest.raises(SurgeryError, match=r"only renumbered, the output moves by .* or another part that knows"):
        solidify.rearrange_experts(model, "model.layers.1.mlp", [3, 2, 1])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("family", "block", "sentence"),
    [
        (
            "dbrx",
            "transformer.blocks.0.ffn",
            r"its 4 experts below each other .*\(experts.mlp.w1: 4 times 96 rows\)",
        ),
        ("switch_transformers", "encoder.block.1.layer.1.mlp", r"keeps its experts in a dictionary of modules"),
    ],
)
def test_experts_of_another_form_are_refused_by_name(family: str, block: str, sentence: str) -> None:
    model = families.tiny(family, "AutoModelForSeq2SeqLM" if "switch" in family else "AutoModelForCausalLM")
    with pytest.raises(SurgeryError, match=sentence):
        solidify.rearrange_experts(model, block, [0, 1])


class Plain(nn.Module):
    """A top-2 MoE with a list of experts; what stands `beside` them has as many parts, and is no expert's."""

    def __init__(self, config: Any, beside: str = "", layer_idx: int = 0):
        super().__init__()
        width = config.hidden_size
        self.num_experts, self.top_k, self.beside, self.layer_idx = 8, 2, beside, layer_idx
        self.router = nn.Linear(width, 8, bias=False)
        self.experts = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(8)])
        self.register_buffer("ids", torch.arange(8), persistent=beside == "ids")
        if beside == "list":
            self.others = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(8)])
        if beside == "slots":
            self.keys, self.values = nn.Parameter(torch.randn(8, width)), nn.Parameter(torch.randn(8, width))
        if beside != "ids":
            del self.ids
        if beside == "count":
            self.num_experts_per_tok, self.n_shared_experts = 8, 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.router(x), -1)
        top = torch.topk(weights, self.top_k, -1)
        weights = torch.zeros_like(weights).scatter(-1, top.indices, top.values)
        numbers = self.ids.tolist() if self.beside == "ids" else range(len(self.experts))
        out = sum(weights[..., n : n + 1] * self.experts[n](x) for n in numbers)
        if self.beside == "list":
            out = out + sum(other(x) for other in self.others)
        if self.beside == "slots":
            out = out + torch.softmax(x @ self.keys.T, -1) @ self.values
        if self.beside == "later" and self.layer_idx == 1:
            out = out + self.experts[0](x)
        return torch.as_tensor(out)


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ("list", "which of others and router.weight, experts belong to the experts cannot be told"),
        ("slots", "which of keys, values and router.weight, experts belong to the experts cannot be told"),
        ("ids", "which of ids and router.weight, experts belong to the experts cannot be told"),
        ("later", "model.layers.1.mlp: when its experts are only renumbered, the output moves"),
    ],
)
def test_what_has_as_many_rows_and_is_no_experts_is_refused(beside: str, words: str) -> None:
    """A set of other things may change places too, by itself; and each block is tried, not the first alone."""
    model = pico.olmoe()
    solidify.replace(model, "**.mlp", Plain, arguments={"beside": beside}, declares={"router_logits": False})
    before = logits(model)
    with pytest.raises(SurgeryError, match=words):
        solidify.rearrange_experts(model, "**.mlp", [5, 2, 0])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("beside", "order"), [("", [5, 2, 0]), ("count", [5, 2, 0, 1, 3, 4, 6, 7, 7, 5, 2])])
def test_a_block_of_the_users_own_keeps_what_is_not_about_the_number(beside: str, order: list[int]) -> None:
    model = pico.olmoe()
    solidify.replace(model, "**.mlp", Plain, arguments={"beside": beside}, declares={"router_logits": False})
    block = model.model.layers[1].mlp
    router = block.router.weight.detach().double()
    experts = [expert.weight.detach().double() for expert in block.experts]
    solidify.rearrange_experts(model, "**.mlp", order)
    x = torch.randn(7, model.config.hidden_size)
    weights = torch.softmax(x.double() @ router[order].T, -1)
    values, chosen = weights.topk(2, -1)
    mixed = [
        sum(value * (experts[order[int(n)]] @ row) for value, n in zip(*each, strict=True))
        for row, *each in zip(x.double(), values, chosen, strict=True)
    ]
    expected = torch.stack([torch.as_tensor(each) for each in mixed])
    assert float((block(x).detach().double() - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert (block.num_experts, getattr(block, "num_experts_per_tok", 8)) == (len(order), 8)


def test_in_half_precision_the_proof_is_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loud shared expert would hide what its routed ones do in bfloat16; here of a router with silent groups."""
    monkeypatch.setattr(expert_groups, "find_groups", lambda *_: None)
    model = families.tiny("deepseek_v3").to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.shared_experts.down_proj.weight.mul_(40)
    with pytest.raises(SurgeryError, match="when its experts are only renumbered"):
        solidify.rearrange_experts(model, "model.layers.1.mlp", [1, 2, 3, 0])


def test_experts_that_compute_no_number_are_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that is NaN is no small one."""
    model = pico.olmoe()
    monkeypatch.setattr(expert_proof._Renumbering, "_renumber", lambda *_: float("nan"))
    with pytest.raises(SurgeryError, match="when its experts are only renumbered, the output moves by nan"):
        solidify.rearrange_experts(model, "**.mlp", [0, 1, 2, 3])


def test_tied_experts_are_not_parted() -> None:
    model = pico.olmoe()
    model.model.layers[1].mlp.gate.weight = model.model.layers[0].mlp.gate.weight
    with pytest.raises(
        SurgeryError, match=r"layers\.0.*, .*layers\.1.* are one tensor, which the new order would split"
    ):
        solidify.rearrange_experts(model, "**.mlp", [5, 2, 0])


def test_other_experts_of_the_same_configuration_keep_their_number() -> None:
    """JetMoE's attention has experts too, counted by the same entry."""
    model = families.tiny("jetmoe")
    solidify.rearrange_experts(model, "**.mlp", [3, 0, 1])
    assert model.config.num_local_experts == 4 and torch.isfinite(logits(model)).all()


def test_a_part_that_the_shapes_do_not_show_is_found_out() -> None:
    """A block that knows its experts by number: each token of an even id gets expert 0 once more."""
    model = pico.olmoe()
    block = model.model.layers[0].mlp
    block.register_forward_hook(lambda m, a, out: out + a[0] @ m.experts.down_proj[0] @ m.experts.down_proj[0].T)
    with pytest.raises(SurgeryError, match=r"layers\.0\.mlp: when its experts are only renumbered"):
        solidify.rearrange_experts(model, "**.mlp", [1, 0, 2, 3])


@pytest.mark.parametrize(
    ("target", "order", "words"),
    [
        ("**.self_attn", [0], "has no experts, .*; name an MoE block"),
        ("**.mlp", [0, 8], "has no expert 8: it has 8, from 0 to 7"),
        ("**.mlp", [0, -1], "has no expert -1"),
        ("**.mlp", [True, 2], "by their numbers, as in .5, 2, 0., but holds True"),
        ("**.mlp", "012", "but it is '012'"),
        ("**.mlp", {0: [1, 2]}, "but it is {0"),
        ("**.mlp", {1, 2}, "but it is {1, 2}"),
        ("**.mlp", None, "nothing is asked for"),
        ("**.mlp", torch.tensor(3), "but it is 3"),
        ("**.mlp", torch.tensor([True, False, True]), "but holds True"),
        ("**.mlp", torch.tensor([3.0, 1.0]), r"but holds 3\.0"),
        ("**.mlp", torch.tensor([[1, 2], [3, 4]]), r"but holds \[1, 2\]"),
        ("**.mlp.experts", [0, 1, 2], "router lies outside: name the block that holds both"),
        ("**.mlp", [3], "gives each token 2 experts, but the order has 1"),
        ("**.nothing", [0, 1], "names no module"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_moves(target: str, order: list[int], words: str) -> None:
    model = pico.olmoe()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError, match=words):
        solidify.rearrange_experts(model, target, order)
    assert model.config.num_experts == 8
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


ROUTED = ("olmoe", "mixtral", "qwen2_moe", "gpt_oss")


@pytest.mark.parametrize("family", ROUTED)
def test_the_router_loss_is_that_of_the_experts_that_are_left(family: str) -> None:
    """The head balances the load by a number of its own."""
    model = families.tiny(family)
    names = [n for n, m in model.named_modules() if n.endswith("mlp") and has_experts(m)]
    solidify.rearrange_experts(model, names, [3, 0, 1])
    ids = torch.randint(3, 20, (2, 9))
    outputs = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert torch.isfinite(outputs.loss) and {each.shape[-1] for each in outputs.router_logits} == {3}
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(input_ids=ids, output_router_logits=True).aux_loss, outputs.aux_loss)


def test_a_base_that_records_its_router_by_default_is_pruned_too(tmp_path: Path) -> None:
    model = pico.olmoe(output_router_logits=True)
    solidify.rearrange_experts(model, "**.mlp", [1, 2, 5, 0])
    ids = pico.tokens()
    assert torch.isfinite(model(input_ids=ids, labels=ids).aux_loss)


@pytest.mark.slow
def test_blocks_may_keep_different_experts(tmp_path: Path) -> None:
    """A call for each; once all have as many, what counts them says so."""
    model = pico.olmoe()
    surgery = solidify.Surgery(model)
    surgery.rearrange_experts("model.layers.0.mlp", [1, 2, 5, 0])
    assert (model.config.num_experts, model.num_experts) == (8, 8)
    mixed = {finding.name: finding for finding in surgery.build(tmp_path / "mixed").findings}[
        "behaviour: router_logits"
    ]
    assert mixed.verdict == "measured" and "not recorded: RuntimeError" in mixed.evidence
    surgery.rearrange_experts("model.layers.1.mlp", [7, 6, 0, 3])
    assert (model.config.num_experts, model.num_experts) == (4, 4)
    artifact = surgery.build(tmp_path / "artifact")
    loaded = solidify.load(artifact.directory)
    assert (loaded.config.num_experts, loaded.num_experts) == (4, 4)
    assert "behaviour: router_logits" in {finding.name for finding in artifact.findings if finding.passed}
    assert "order=[7, 6, 0, 3]" in repr(surgery.edits[1])
    assert "order [7, 6, 0, 3]" in (artifact.directory / "README.md").read_text()


def test_a_head_that_still_counts_the_old_experts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "set_attributes", lambda *_: None)
    model = pico.olmoe()
    with pytest.raises(SurgeryError, match="output_router_logits=True: RuntimeError"):
        solidify.rearrange_experts(model, "**.mlp", [1, 2, 3])
    assert model.config.num_experts == 8


def test_numbers_of_any_library_are_numbers() -> None:
    for order in (np.array([1, 2, 3]), torch.tensor([1, 2, 3])):
        model = pico.olmoe()
        (first, _) = solidify.rearrange_experts(model, "**.mlp", order)
        assert first.settings["order"] == [1, 2, 3] and json.dumps(first.document())


def test_of_a_large_model_the_first_block_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "LARGE", 0)
    model = pico.olmoe()
    artifact = solidify.build(model, solidify.rearrange_experts(model, "**.mlp", [1, 2, 0]), tmp_path / "artifact")
    found = {finding.name: finding.verdict for finding in artifact.findings}
    assert found["outputs identical (AutoModelForCausalLM)"] == "measured"  # one of two blocks is no proof of both
    assert "behaviour: stateless" in found
    contract = json.loads((artifact.directory / "certificate" / "state.json").read_text())["contract"]
    assert contract["at"] == ["model.layers.0.mlp"]  # noise stands in no other: it takes as much memory as all of them
    assert contract["fresh"] and all(name.startswith("model.layers.0.mlp.") for name in contract["fresh"])


@pytest.mark.slow
def test_an_artifact_of_it_loads_anywhere_and_goes_on(tmp_path: Path) -> None:
    """One block of two, then all, then layers in another order: read by plain transformers in a fresh process."""
    model = pico.olmoe(layers=3)
    surgery = solidify.Surgery(model)
    surgery.rearrange_experts("model.layers.1.mlp", [4, 0, 0, 7, 2])
    assert model.config.num_experts == 8
    surgery.remove("model.layers.0")
    surgery.replace("model.layers.*.self_attn.o_proj", pico.wrappers.Bottleneck, arguments={"width": 4})
    artifact = surgery.build(tmp_path / "artifact")
    assert all(finding.passed is not False for finding in artifact.findings)
    entry = json.loads((tmp_path / "artifact" / "config.json").read_text())["surgery"][0]
    assert (entry["operation"], entry["order"], entry["after"]) == ("rearrange_experts", [4, 0, 0, 7, 2], {})
    code = f"""
import sys
sys.modules["solidify"] = sys.modules["peft"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(artifact.directory)!r}, trust_remote_code=True)
torch.save(model(torch.arange(12)[None]).logits.detach(), {str(tmp_path / "logits.pt")!r})
print([layer.mlp.experts.num_experts for layer in model.model.layers])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[5, 8]"
    assert torch.equal(torch.load(tmp_path / "logits.pt"), solidify_run(model, torch.arange(12)[None]))


@pytest.mark.slow
def test_a_recipe_prunes_and_its_result_is_a_stock_model(tmp_path: Path) -> None:
    """The tensors and the configuration are those of the family: its own class loads them."""
    pico.olmoe().save_pretrained(tmp_path / "base")
    step = f"{{rearrange_experts: model.layers.*.mlp, expect: {BLOCK}, order: [5, 2, 0], count: 2}}"
    (tmp_path / "recipe.yaml").write_text(f"base: {{model: base}}\nsurgery:\n  - {step}\n")
    solidify.plan(tmp_path / "recipe.yaml")
    artifact = solidify.build(tmp_path / "recipe.yaml", directory=tmp_path / "out")
    model = solidify.load(artifact.directory)
    written = json.loads((artifact.directory / "config.json").read_text())
    assert written["num_experts"] == model.config.num_experts == 3
    config = type(pico.olmoe().config)(**{**pico.olmoe().config.to_dict(), "num_experts": written["num_experts"]})
    stock = AutoModelForCausalLM.from_config(config)
    stock.load_state_dict(model.state_dict())
    assert torch.equal(logits(stock), logits(model))


def test_the_structure_check_looks_at_every_block() -> None:
    model = pico.olmoe()
    records = [edit.document() for edit in solidify.rearrange_experts(model, "**.mlp", [1, 2, 3])]
    finding = structure.structure(model, records)
    assert finding.passed
    assert "model.layers.0.mlp has 3 experts" in finding.evidence
    model.model.layers[1].mlp.gate.weight = torch.nn.Parameter(torch.randn(4, model.config.hidden_size))
    finding = structure.structure(model, records)
    assert not finding.passed
    assert "model.layers.1.mlp gate.weight has 4 experts, not 3" in finding.evidence


def test_a_record_of_an_unknown_operation_is_refused_by_name() -> None:
    with pytest.raises(ArtifactError, match="'transplant', which this version does not know"):
        catalogue.of({"operation": "transplant", "name": "model.layers.0"})


@pytest.mark.parametrize("operation", [o for o in catalogue.OPERATIONS if o.carried() is not None])
def test_what_artifacts_carry_of_an_operation_stands_alone(operation: type[catalogue.Operation]) -> None:
    """The function uses its arguments, builtins, what it imports from torch and transformers itself, and functions of
    model/operations.py, which artifacts carry beside it, as they do model/assembling.py of those that build modules."""
    function = operation.carried()
    assert function is not None
    files = [operations, *([assembling] if operation.builds else [])]
    beside = {name for file in files for name, value in vars(file).items() if inspect.getmodule(value) is file}
    names = set(function.__code__.co_names) & set(function.__globals__) - beside
    tree = ast.parse(inspect.getsource(function))
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert not names, f"{function.__name__} uses {names} of its file, which artifacts do not carry"
    assert {name.partition(".")[0] for name in imported} <= {"torch", "transformers", *sys.stdlib_module_names}


def test_what_builds_modules_in_artifacts_stands_on_torch_alone() -> None:
    tree = ast.parse(inspect.getsource(assembling))
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert {name.partition(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}


KEEPING = ("olmoe", "qwen2_moe", "gpt_oss")  # softmax before the choice, divided by its sum, after the choice
ALSO = ("mixtral", "granitemoe", "glm4_moe", "deepseek_v2", "lfm2_moe")


@pytest.mark.parametrize("family", [*KEEPING, *(pytest.param(name, marks=pytest.mark.slow) for name in ALSO)])
@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_all_experts_keep_what_the_model_computes(family: str, copies: int) -> None:
    model = families.tiny(family)
    names, before = experts.blocks(model), logits(model)
    chosen = model.config.num_experts_per_tok
    edits = solidify.duplicate_experts(model, names, copies)
    assert float((logits(model) - before).abs().max()) < 2e-6 * float(before.abs().max())
    assert model.config.num_experts_per_tok == copies * chosen
    assert all(len(edit.settings["order"]) == 4 * copies for edit in edits)
    assert edits[0].arguments["experts_per_token"] == copies * chosen
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("family", ["dots1", "llama4_text"])
def test_routers_whose_weights_would_add_up_to_more_keep_their_experts(family: str) -> None:
    model = families.tiny(family)
    before = logits(model)
    with pytest.raises(SurgeryError, match="with 2 copies of each expert the model's output moves by"):
        solidify.duplicate_experts(model, experts.blocks(model))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("number", [1, 3, 8])
def test_another_number_of_experts_a_token_is_what_the_family_computes_with_it(number: int) -> None:
    model = pico.olmoe()
    edits = solidify.rearrange_experts(model, "**.mlp", experts_per_token=number)
    twin = type(model)(type(model.config)(**{**pico.olmoe().config.to_dict(), "num_experts_per_tok": number}))
    twin.load_state_dict(model.state_dict())
    assert model.config.num_experts_per_tok == number and torch.equal(logits(twin.eval()), logits(model))
    assert not any(edit.dropped for edit in edits) and edits[0].arguments["experts_per_token"] == number
    finding = structure.structure(model, [edit.document() for edit in edits])
    assert finding.passed
    model.model.layers[0].mlp.gate.top_k = 9
    assert f"gate.top_k is 9, not {number}" in structure.structure(model, [e.document() for e in edits]).evidence


def test_blocks_may_give_a_token_different_numbers_of_experts() -> None:
    model = pico.olmoe()
    solidify.rearrange_experts(model, "model.layers.0.mlp", experts_per_token=1)
    assert model.config.num_experts_per_tok == 2 and model.model.layers[0].mlp.gate.top_k == 1
    solidify.rearrange_experts(model, "model.layers.1.mlp", range(4), experts_per_token=1)
    assert model.config.num_experts_per_tok == 1 and model.config.num_experts == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts_per_token": 9}, "gives each token 9 experts, but the order has 8"),
        ({"experts_per_token": 0}, "experts_per_token is a whole number of at least 1, but 0 was given"),
        ({"experts_per_token": True}, "but True was given"),
        ({"order": {"model.layers.0.mlp": [0, 1]}}, r"there is no order for model\.layers\.1\.mlp"),
        (
            {"order": {"model.layers.0.mlp": [0, 1], "model.layers.1.mlp": [0, 1], "other": [1]}},
            "there is an order for 'other', which is none of the blocks",
        ),
    ],
)
def test_numbers_and_orders_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    model = pico.olmoe()
    before = logits(model)
    with pytest.raises(SurgeryError, match=words):
        solidify.rearrange_experts(model, "**.mlp", **change)
    assert torch.equal(logits(model), before) and model.config.num_experts_per_tok == 2


def test_a_number_of_copies_that_is_none_is_refused() -> None:
    with pytest.raises(SurgeryError, match="copies is a whole number of at least 2, but 1 was given"):
        solidify.duplicate_experts(pico.olmoe(), "**.mlp", 1)


@pytest.mark.slow
def test_copies_and_numbers_are_made_again_in_an_artifact(tmp_path: Path) -> None:
    surgery = solidify.Surgery(pico.olmoe())
    surgery.duplicate_experts("**.mlp")
    surgery.rearrange_experts("model.layers.1.mlp", experts_per_token=3)
    artifact = surgery.build(tmp_path / "artifact")
    loaded = solidify.load(artifact.directory)
    assert [layer.mlp.gate.top_k for layer in loaded.model.layers] == [4, 3]
    assert torch.equal(logits(loaded), logits(surgery.model))


def test_dense_layers_among_the_blocks_are_named_with_patterns_that_work() -> None:
    """DeepSeek-V3 begins with dense layers."""
    changes = {"num_hidden_layers": 13, "first_k_dense_replace": 1}
    model = experts.tiny("deepseek_v3", 8, changes=changes)
    words = r"model.layers.0.mlp \(.*MLP\) has no experts.* name those alone"
    with pytest.raises(SurgeryError, match=words) as refused:
        solidify.rearrange_experts(model, "**.mlp", experts_per_token=1)
    told = re.findall(r"'([^']+)'", str(refused.value).partition("name those alone")[2])
    assert told == ["model.layers.1*.mlp", *(f"model.layers.{n}.mlp" for n in range(2, 10))]
    edits = solidify.rearrange_experts(model, told, experts_per_token=1)
    assert sorted(edit.name for edit in edits) == sorted(f"model.layers.{n}.mlp" for n in range(1, 13))
