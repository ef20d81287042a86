"""Starts that PEFT takes out of the base's weights: the base keeps them, and what is trained is what is merged."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from adapter_kinds import STARTED, fit, outputs, same
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import solidify
from solidify.adapter import storage
from solidify.adapter.starts import StartedFactor
from solidify.errors import AdapterError
from solidify.modules.trashcan_moe import TrashCanMoE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of ties and transposed layers
Q, LAST = "model.layers.*.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": [Q, LAST]}
RANKS = {"rank_pattern": {LAST: 3}, "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5}}


def gpt2() -> Any:
    return pico.make("GPT2LMHeadModel", vocab_size=128, n_embd=32, n_layer=2, n_head=4, pad_token_id=1)


@dataclass(frozen=True)
class Case:
    """A model, what is declared on it, and each target's rank and scale, worked out here."""

    model: Callable[[], Any]
    lora: dict[str, Any]
    changed: str = "model.layers.*.mlp"
    by: type = pico.wrappers.Scaled
    train: tuple[str, ...] = ()
    scales: tuple[tuple[str, float], ...] = (("", 6 / 4),)  # by what a target's name holds; the last that fits


CASES = {
    "Llama": Case(pico.llama, LORA),
    "ranks and scales": Case(pico.llama, {**LORA, **RANKS}, scales=(("", 6 / 4), ("o_proj", 6 / 3), ("0.self", 5 / 4))),
    "rslora": Case(pico.llama, {**LORA, "use_rslora": True}, scales=(("", 6 / math.sqrt(4)),)),
    "rslora, ranks and scales": Case(
        pico.llama,
        {**LORA, **RANKS, "use_rslora": True},
        scales=(("", 6 / 2), ("o_proj", 6 / math.sqrt(3)), ("0.self", 5 / 2)),
    ),
    "GPT-2": Case(
        gpt2,
        {**LORA, "target_modules": ["transformer.h.*.attn.c_attn", "transformer.h.1.attn.c_proj"]},
        "transformer.h.*.mlp",
    ),
    "the head of a tied pair": Case(
        lambda: pico.llama(tie_word_embeddings=True),
        {**LORA, "target_modules": ["lm_head"], "ensure_weight_tying": False},
    ),
    "a trash can": Case(pico.olmoe, LORA, by=TrashCanMoE, train=("**.mlp.trash",)),
    "half precision": Case(lambda: pico.llama(dtype=torch.bfloat16), LORA),
}


def written(case: Case, directory: Path) -> Path:
    model = case.model()
    return pico.artifact(model, solidify.replace(model, case.changed, case.by), directory)


def layers(model: PeftModel) -> dict[str, Any]:
    """The layers of LoRA by the plain names of their targets."""
    found = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A") and m.lora_A}
    assert found and all(isinstance(m.lora_A["default"], StartedFactor) for m in found.values())
    return found


def wanted(model: PeftModel, base: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """W + s (B A - B0 A0) of each target in float64, from the numbers that are trained and the start."""
    found = {}
    for name, layer in layers(model).items():
        scale = [value for part, value in case.scales if part in name][-1]
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        delta = scale * (b.trained.double() @ a.trained.double() + b.start.double() @ a.start.double())
        turned = isinstance(layer.get_base_layer(), Conv1D)
        found[f"{name}.weight"] = base[f"{name}.weight"].double() + (delta.T if turned else delta).detach()
    return found


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two answers, relative to the tensor that it is in."""
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).norm() / b[key].norm()) for key in a if a[key].is_floating_point())


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def of_base(model: PeftModel) -> dict[str, torch.Tensor]:
    state = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
    return {name: tensor for name, tensor in state.items() if ".lora_" not in name}


@pytest.mark.parametrize("start", STARTED)
@pytest.mark.parametrize("case", ["Llama", "GPT-2", "half precision"])
def test_it_starts_as_the_base_which_keeps_its_bits(case: str, start: str) -> None:
    """The start is a rank-r part of the weights, by a decomposition in float64; at first it takes itself back."""
    model = CASES[case].model()
    before, plain = bits(model), outputs(model)
    attached = solidify.attach(model, lora={**CASES[case].lora, "init_lora_weights": start}).eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in of_base(attached).items())
    with attached.disable_adapter():
        assert same(outputs(attached), plain)
    off = distance(outputs(attached), plain)
    assert off < 1e-6
    for name, layer in layers(attached).items():
        a, b = (factors["default"].trained.detach().double() for factors in (layer.lora_A, layer.lora_B))
        weight = before[f"{name}.weight"].double()
        weight = weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight
        scale = 1.0 if start == "olora" else 6 / 4
        if start == "olora":
            columns, rows = torch.linalg.qr(weight)
            expected = columns[:, :4] @ rows[:4]
        elif start == "pissa":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            expected = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
        else:  # a few iterations find a part of the weights, and not the best
            columns, _ = torch.linalg.qr(b)
            expected = columns @ columns.T @ weight
        assert torch.linalg.matrix_rank(expected) == 4
        assert float((scale * b @ a - expected).norm() / expected.norm()) < 1e-4  # PEFT decomposes in float32


def test_pefts_own_start_is_the_same(tmp_path: Path) -> None:
    """And the model that PEFT alone trains computes the same."""
    for start in ("pissa", "olora"):
        lora = {**LORA, "target_modules": ["q_proj"], "init_lora_weights": start}
        theirs = get_peft_model(pico.llama(), LoraConfig(**lora))
        ours = solidify.attach(pico.llama(), lora={**lora, "target_modules": [Q]})
        for layer, other in zip(
            layers(ours).values(), (m for m in theirs.modules() if hasattr(m, "lora_A")), strict=True
        ):
            for key in ("lora_A", "lora_B"):
                assert torch.equal(getattr(layer, key)["default"].trained, getattr(other, key)["default"].weight)
        fit(theirs)
        fit(ours)
        assert distance(outputs(theirs), outputs(ours)) < 1e-4


@pytest.mark.parametrize(
    ("case", "start"), [*((case, "pissa") for case in CASES), ("Llama", "olora"), ("GPT-2", "olora")]
)
def test_what_is_trained_is_saved_loaded_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, start: str
) -> None:
    pico.unwitnessed(monkeypatch)
    asked = CASES[case]
    artifact = written(asked, tmp_path / "artifact")
    base = bits(solidify.load(artifact))
    plain = outputs(solidify.load(artifact))
    model = solidify.attach(
        solidify.load(artifact), lora={**asked.lora, "init_lora_weights": start}, train=list(asked.train)
    )
    kept = {name: tensor.clone() for name, tensor in model.named_buffers() if name.endswith(".start")}
    fit(model)
    assert kept and all(torch.equal(model.get_buffer(name), tensor) for name, tensor in kept.items())
    trained = outputs(model)
    assert not same(trained, plain)
    with model.disable_adapter():
        assert same(outputs(model), plain)
    solidify.save_adapter(model, tmp_path / "adapter")
    assert same(outputs(solidify.load(artifact, tmp_path / "adapter")), trained)
    stock = PeftModel.from_pretrained(solidify.load(artifact), tmp_path / "adapter").eval()
    assert same(outputs(stock), trained)
    config = stock.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (8, True)
    merged = solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    assert [f.name for f in merged.findings if not f.passed] == []
    found = bits(solidify.load(tmp_path / "merged"))
    half = 2**-8 if case == "half precision" else 1e-6
    for name, weight in wanted(model, base, asked).items():
        assert float((found[name].double() - weight).norm() / weight.norm()) < half, name
        assert not torch.equal(found[name], base[name])


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    artifact = written(CASES["a trash can"], tmp_path / "artifact")
    model = solidify.attach(solidify.load(artifact), lora={**LORA, "init_lora_weights": "pissa"})
    fit(model)
    solidify.save_adapter(model, tmp_path / "adapter")
    torch.save(outputs(model), tmp_path / "expected.pt")
    code = (
        "import sys, torch, pico, adapter_kinds, solidify\n"
        "model = solidify.load(sys.argv[1], sys.argv[2])\n"
        "found = adapter_kinds.outputs(model)\n"
        "sys.exit(0 if adapter_kinds.same(found, torch.load(sys.argv[3])) else 1)\n"
    )
    arguments = [str(artifact), str(tmp_path / "adapter"), str(tmp_path / "expected.pt")]
    paths = [str(Path(pico.__file__).parent), str(Path(solidify.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    assert subprocess.run([sys.executable, "-c", code, *arguments], check=False, env=environment).returncode == 0


def test_only_the_rank_that_was_asked_for_is_trained() -> None:
    """And decay of weights moves no start: it is no parameter."""
    model = solidify.attach(pico.llama(), lora={**LORA, "init_lora_weights": "pissa"})
    plain = solidify.attach(pico.llama(), lora=LORA)

    def sizes(of: PeftModel) -> list[torch.Size]:
        return [p.shape for p in of.parameters() if p.requires_grad]

    assert sizes(model) == sizes(plain)
    assert not any(name.endswith(".start") for name, _ in model.named_parameters())


def test_several_are_switched_merged_copied_and_deleted(wrapped_artifact: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": [Q]}
    base = outputs(solidify.load(wrapped_artifact))
    model = solidify.attach(solidify.load(wrapped_artifact), lora={**lora, "init_lora_weights": "pissa"}, name="one")
    fit(model)
    expected = {"one": outputs(model)}
    model = solidify.attach(model, lora={**lora, "init_lora_weights": "olora"}, name="two")
    assert distance(outputs(model.eval()), base) < 1e-6
    fit(model)
    expected["two"] = outputs(model)
    alone = solidify.attach(solidify.load(wrapped_artifact), lora={**lora, "init_lora_weights": "olora"})
    fit(alone)
    assert same(outputs(alone), expected["two"])  # the first adapter is no part of the second's start
    copied = deepcopy(model)
    for of in (model, copied):
        for name in ("one", "two", "one"):
            of.set_adapter(name)
            assert same(outputs(of), expected[name])
            with of.disable_adapter():
                assert same(outputs(of), base)
    model.merge_adapter()
    assert distance(outputs(model), expected["one"]) < 1e-5
    model.unmerge_adapter()
    assert same(outputs(model), expected["one"])
    for name in ("one", "two"):
        solidify.save_adapter(model, tmp_path / name, name=name)
        assert same(outputs(solidify.load(wrapped_artifact, tmp_path / name)), expected[name])
    model.delete_adapter("one")
    model.set_adapter("two")
    assert same(outputs(model), expected["two"])
    plain = model.merge_and_unload()
    assert not any(isinstance(module, StartedFactor) for module in plain.modules())
    gone = copied.unload()
    assert same(outputs(gone), base)


def test_a_reference_of_the_same_configuration_is_a_copy(wrapped_artifact: Path) -> None:
    """As TRL makes it: an adapter more, into which it copies parameters by name."""
    model = solidify.attach(solidify.load(wrapped_artifact), lora={"target_modules": [Q], "init_lora_weights": "pissa"})
    fit(model)
    expected = outputs(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    fit(model)
    assert not same(outputs(model), expected)
    model.set_adapter("ref")
    assert same(outputs(model), expected)


def test_pefts_own_files_go_on_where_they_were(tmp_path: Path) -> None:
    """What a trainer writes is plain LoRA of twice the rank; loaded into another start, that is this one's again."""
    model = solidify.attach(pico.llama(), lora={**LORA, "init_lora_weights": "pissa"})
    fit(model)
    model.save_pretrained(tmp_path / "checkpoint")
    state = load_file(tmp_path / "checkpoint" / storage.WEIGHTS)
    assert {tensor.shape[0] for key, tensor in state.items() if "lora_A" in key} == {8}
    stock = PeftModel.from_pretrained(pico.llama(), tmp_path / "checkpoint").eval()
    assert same(outputs(stock), outputs(model))
    torch.manual_seed(5)
    other = solidify.attach(pico.llama(), lora={**LORA, "init_lora_weights": "pissa_niter_1"})
    other.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    assert same(outputs(other.eval()), outputs(model))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A\.default\.trained"):
        small = solidify.attach(pico.llama(), lora={**LORA, "r": 2, "init_lora_weights": "pissa"})
        small.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)


@pytest.mark.parametrize("start", STARTED)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"target_modules": ["model.embed_tokens"]},
            "model.embed_tokens (Embedding) does not support the start {start!r}",
        ),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora and init_lora_weights={start!r} cannot be combined"),
        (
            {"target_modules": [], "target_parameters": ["model.layers.0.mlp.experts.down_proj"]},
            "target_parameters cannot be combined with init_lora_weights={start!r}",
        ),
        ({"r": 40}, "q_proj starts with 32 directions by {start!r}, which is less than its rank 40"),
    ],
)
def test_where_there_is_no_such_start_it_is_refused(given: dict[str, Any], words: str, start: str) -> None:
    model = pico.olmoe()
    before, names = bits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterError) as caught:
        solidify.attach(model, lora={"r": 4, "target_modules": [Q], **given, "init_lora_weights": start})
    assert words.format(start=start) in str(caught.value)
    assert names == [name for name, _ in model.named_modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_numbers_that_overflow_in_a_start_are_told() -> None:
    model = pico.llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(float("inf"))
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        solidify.attach(model, lora={**LORA, "init_lora_weights": "olora"})
