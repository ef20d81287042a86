"""An artifact that is loaded quantised: trained, saved, loaded and merged, with what is new kept out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import solidify
from solidify.adapter import base_state
from solidify.adapter import plan as planning
from solidify.artifact import loading, quantizing
from solidify.checks import adapter_alone, trainable
from solidify.directory import manifest
from solidify.errors import AdapterError, ArtifactError, ModelError, SurgeryError
from solidify.model.cost import cost
from solidify.modules.gated_attention import GatedAttention
from solidify.upstream.bitsandbytes import keep_as_quantized

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'solidify[quantized]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),  # it computes in float16, whatever it is given
]

LORA = {"r": 4, "target_modules": ["model.layers.*.self_attn.q_proj", "model.layers.*.mlp.up_proj"]}
GATE = "model.layers.*.self_attn.output_gate"
SKIP = "model.layers.0.self_attn.output_gate.weight"


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with gates in its attention: the gates are new, all else of it is the base's."""
    model = pico.llama(hidden_size=64, intermediate_size=128)
    edits = solidify.replace(model, "model.layers.*.self_attn", GatedAttention)
    return pico.artifact(model, edits, tmp_path_factory.mktemp("quantized") / "gated")


def trained(model: Any, **options: Any) -> Any:
    """Attaches, and takes two steps."""
    attached = solidify.attach(model, **{"lora": LORA, "train": [GATE], **options})
    optimizer = torch.optim.AdamW([p for p in attached.parameters() if p.requires_grad], lr=1e-2)
    ids = pico.tokens()
    for _ in range(2):
        attached(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return attached.eval()


def logits(model: Any) -> torch.Tensor:
    """Also of a model that transformers loaded by itself, on a CPU on which bitsandbytes packs weights anew."""
    keep_as_quantized(model)
    with torch.no_grad():
        found: torch.Tensor = model(pico.tokens()).logits
    return found


@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_what_surgery_made_new_and_the_head_are_not_quantised(gated: Path, word: str) -> None:
    model = solidify.load(gated, quantization=word)
    packed = {name for name, _ in quantizing.packed_parameters(model)}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear - packed == {"lm_head.weight", SKIP, SKIP.replace("layers.0", "layers.1")}
    assert len(packed) == 14
    plain = solidify.load(gated)
    assert torch.equal(model.get_parameter(SKIP), plain.get_parameter(SKIP))
    distance = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < distance < (0.3 if word == "nf4" else 0.03)


@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_what_is_planned_is_the_memory_that_it_takes(gated: Path, word: str) -> None:
    edits = manifest.read(gated).edits
    skeleton = loading.load_base(str(gated), device="meta").model
    planned = quantizing.forecast(word, skeleton, edits)
    model = solidify.load(gated, quantization=word)
    assert planned.memory == cost(model).memory
    assert planned.full == cost(solidify.load(gated)).memory
    assert set(planned.packed) == {name for name, _ in quantizing.packed_parameters(model)}
    assert planned.left == {
        SKIP: "new",
        SKIP.replace("layers.0", "layers.1"): "new",
        "lm_head.weight": "left out by transformers",
    }
    assert cost(model).parameters == cost(skeleton).parameters
    assert cost(model).flops_per_token == cost(skeleton).flops_per_token


def test_an_adapter_of_a_quantised_base_is_loaded_on_both_and_merged(
    gated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    attached = trained(solidify.load(gated, quantization="nf4"))
    off = logits(solidify.load(gated, quantization="nf4"))
    with attached.disable_adapter():
        assert torch.equal(logits(attached), off)
    adapter = solidify.save_adapter(attached, tmp_path / "adapter")
    assert '"bnb_4bit_quant_type": "nf4"' in manifest.read(adapter).base["quantization"]
    assert torch.equal(logits(solidify.load(gated, adapter, quantization="nf4")), logits(attached))
    plain = solidify.load(gated, adapter)
    merged = solidify.merge(adapter, tmp_path / "merged")
    verdicts = {finding.name: finding.verdict for finding in merged.findings}
    assert verdicts["merged equals attached"] == "proved"
    assert verdicts["merged against trained (quantised base)"] == "measured"
    assert verdicts["merged, quantised the same way, against trained"] == "measured"
    close = torch.allclose(logits(solidify.load(tmp_path / "merged")), logits(plain), atol=1e-5)
    assert close
    assert not torch.equal(logits(plain), logits(attached))


def test_the_error_of_a_merge_is_the_one_that_is_measured(
    gated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    attached = trained(solidify.load(gated, quantization="int8"))
    adapter = solidify.save_adapter(attached, tmp_path / "adapter")
    found = solidify.merge(adapter, tmp_path / "merged").findings
    evidence = next(f.evidence for f in found if f.name == "merged against trained (quantised base)")
    said = float(evidence.rpartition(" by ")[2].split()[0])
    apart = logits(attached) - logits(solidify.load(tmp_path / "merged"))
    assert said / 5 < float(apart.norm() / logits(attached).norm()) < said * 5


def test_a_merge_without_the_library_says_that_nothing_was_measured(
    gated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    adapter = solidify.save_adapter(trained(solidify.load(gated, quantization="nf4")), tmp_path / "adapter")

    def absent(config: Any) -> None:
        raise ModelError("bitsandbytes is not installed")

    monkeypatch.setattr(quantizing, "require_library", absent)
    found = solidify.merge(adapter, tmp_path / "merged").findings
    finding = next(f for f in found if f.name == "merged against trained (quantised base)")
    assert finding.verdict == "not looked at"
    assert "bitsandbytes is not installed" in finding.evidence


@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_a_packed_weight_that_was_changed_is_found(gated: Path, word: str) -> None:
    model = solidify.load(gated, quantization=word)
    logits(model)  # bitsandbytes moves scales from the weight to the layer in the first pass
    assert not any(base_state.packed_faults(model).values())
    projection = model.get_submodule("model.layers.1.mlp.down_proj")
    projection.weight.data[0, 0] = projection.weight.data[0, 0] + 1
    with pytest.raises(AdapterError, match=r"model.layers.1.mlp.down_proj.weight is not what the artifact's was"):
        solidify.attach(model, lora=LORA)


def test_a_scale_beside_a_packed_weight_belongs_to_it(gated: Path) -> None:
    model = solidify.load(gated, quantization="nf4")
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.quant_state.absmax[0] += 1
    with pytest.raises(AdapterError, match=r"model.layers.0.mlp.up_proj.weight is not what the artifact's was"):
        solidify.attach(model, lora=LORA)


def test_a_weight_that_moves_in_training_is_found(gated: Path) -> None:
    attached = solidify.attach(solidify.load(gated, quantization="nf4"), lora=LORA)
    record = manifest.read(gated)
    finding = trainable.frozen(attached, record)
    assert finding.passed and "14 quantised ones" in finding.evidence
    inner: Any = attached.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    inner.weight.data[3, 0] = inner.weight.data[3, 0] + 1
    finding = trainable.frozen(attached, record)
    assert finding.passed is False and "model.layers.0.mlp.up_proj.weight changed" in finding.evidence


@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_what_is_refused_leaves_the_quantised_model_as_it_was(
    gated: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = solidify.load(gated, quantization=word)
    before, names = logits(model), {name for name, _ in model.named_parameters()}
    monkeypatch.setattr(planning, "compare", lambda *_: ["said so"])
    with pytest.raises(AdapterError, match="said so"):
        solidify.attach(model, lora=LORA, train=[GATE])
    assert torch.equal(logits(model), before)
    assert {name for name, _ in model.named_parameters()} == names
    assert not any(base_state.packed_faults(model).values())


@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_a_copy_is_as_quantised(gated: Path, word: str) -> None:
    model = solidify.load(gated, quantization=word)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    assert not any(base_state.packed_faults(copied).values())


def test_what_is_trained_in_full_is_kept_out(gated: Path, tmp_path: Path) -> None:
    whole = "model.layers.1.mlp.down_proj"
    with pytest.raises(AdapterError, match=rf"keep='{whole}'"):
        solidify.attach(solidify.load(gated, quantization="nf4"), train=[whole])
    model = solidify.load(gated, quantization="nf4", keep=[whole])
    assert isinstance(model.get_submodule(whole), nn.Linear)
    attached = trained(model, train=[whole])
    adapter = solidify.save_adapter(attached, tmp_path / "adapter")
    again = solidify.load(gated, adapter, quantization="nf4")  # knows itself what the adapter trains
    assert torch.equal(logits(again), logits(attached))


@pytest.mark.parametrize("marked", [False, True])
def test_an_adapter_of_plain_peft_is_loaded_on_a_quantised_base(tmp_path: Path, marked: bool) -> None:
    """Its files tell what it trains in full, and which weights it changes themselves: those are not packed."""
    pico.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    asked = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["k_proj.weight"],
        modules_to_save=["down_proj"],
        trainable_token_indices=[5, 6],
    )
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), asked)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 4)
    plain.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", **({"lora_B_layout": "rank_major"} if marked else {})})
    model = solidify.load(tmp_path / "base", adapter=tmp_path / "adapter", quantization="nf4")
    packed = {name for name, _ in quantizing.packed_parameters(model.get_base_model())}
    assert len(packed) == 2 * 5, "of seven projections a layer: not k_proj, and not down_proj"
    assert not [name for name in packed if "k_proj" in name or "down_proj" in name]
    distance = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < distance < 0.3


def test_a_model_that_transformers_quantised_alone_is_compared_with_its_artifact(gated: Path) -> None:
    import transformers

    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            gated, quantization_config=copy.deepcopy(config), trust_remote_code=True
        )

    model = load()
    with pytest.raises(AdapterError, match=r"output_gate.weight is quantised"):
        solidify.attach(model, train=[GATE])
    assert solidify.attach(model, lora=LORA).peft_config
    spoilt = load()
    weight = spoilt.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data[0, 0] = weight.data[0, 0] + 1
    with pytest.raises(AdapterError, match=r"is not what the artifact's was quantised to"):
        solidify.attach(spoilt, lora=LORA)


def test_stacks_of_experts_are_said_to_stay(tmp_path: Path) -> None:
    model = pico.olmoe(dtype=torch.bfloat16)
    edits = solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled)
    artifact = pico.artifact(model, edits, tmp_path / "artifact")
    planned = quantizing.forecast("nf4", model.to("meta"), [edit.document() for edit in edits])
    stacks = [name for name, why in planned.left.items() if why == "not a linear layer"]
    assert len(stacks) == 4 and all(".experts." in name for name in stacks)
    loaded = solidify.load(artifact, quantization="nf4")
    assert planned.memory == cost(loaded).memory
    experts = ["model.layers.*.mlp.inner.experts.down_proj"]
    if not any("mlp.inner.experts" in name for name in stacks):
        experts = [name for name in stacks if name.endswith("down_proj")]
    attached = trained(loaded, lora={"r": 2, "target_parameters": experts}, train=())
    adapter = solidify.save_adapter(attached, tmp_path / "adapter")
    assert torch.equal(logits(solidify.load(artifact, adapter, quantization="nf4")), logits(attached))


def test_layers_that_keep_their_weights_turned_are_quantised_too(tmp_path: Path) -> None:
    """GPT-2's are Conv1D; its head is tied to the embedding."""
    model = pico.make("GPT2LMHeadModel", vocab_size=128, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    edits = solidify.replace(model, "transformer.h.*.mlp", pico.wrappers.Scaled)
    artifact = pico.artifact(model, edits, tmp_path / "artifact")
    loaded = solidify.load(artifact, quantization="nf4")
    assert len(quantizing.packed_parameters(loaded)) == 4
    attached = trained(loaded, lora={"r": 2, "target_modules": ["transformer.h.*.attn.c_attn"]}, train=())
    adapter = solidify.save_adapter(attached, tmp_path / "adapter")
    assert torch.equal(logits(solidify.load(artifact, adapter, quantization="nf4")), logits(attached))


def test_a_plain_model_that_is_quantised_takes_an_adapter(tmp_path: Path) -> None:
    import transformers

    pico.llama().save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    before = logits(model)
    attached = trained(model, train=["lm_head"])
    assert not torch.equal(logits(attached), before)
    with attached.disable_adapter():
        assert torch.equal(logits(attached), before)
    saved = solidify.save_adapter(attached, tmp_path / "adapter")
    again = solidify.load(tmp_path / "base", saved, quantization_config=config)
    assert torch.equal(logits(again), logits(attached))


def test_what_peft_casts_to_float32_comes_back_where_it_is_loaded_in_float32(tmp_path: Path) -> None:
    from peft import prepare_model_for_kbit_training

    model = pico.llama(dtype=torch.bfloat16)
    artifact = pico.artifact(model, solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled), tmp_path / "a")
    prepared = prepare_model_for_kbit_training(solidify.load(artifact, quantization="nf4"), False)
    attached = trained(prepared, lora={"r": 2, "target_modules": ["model.layers.*.self_attn.q_proj"]}, train=())
    saved = solidify.save_adapter(attached, tmp_path / "adapter")
    config = quantizing.again(manifest.read(saved).base["quantization"])
    again = solidify.load(artifact, saved, quantization_config=config, dtype=torch.float32)
    assert torch.equal(logits(again), logits(attached))


def test_torchao_quantises_too(gated: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs torchao")
    asked = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2}}}
    asked["quant_type"]["default"]["_data"] = {}  # type: ignore[index]
    planned = quantizing.forecast(asked, loading.load_base(str(gated), device="meta").model, manifest.read(gated).edits)
    model = solidify.load(gated, quantization=asked)
    assert {name for name, _ in quantizing.packed_parameters(model)} == set(planned.packed)
    assert planned.memory == pytest.approx(cost(model).memory, rel=0.1)
    attached = trained(model)
    adapter = solidify.save_adapter(attached, tmp_path / "adapter")
    assert torch.equal(logits(solidify.load(gated, adapter, quantization=asked)), logits(attached))
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    weight.qdata[0, 0] += 1
    assert base_state.packed_faults(attached)["model.layers.1.mlp.down_proj.weight"]
    four = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_version": 2}}}
    four["quant_type"]["default"]["_data"] = {"group_size": 32}  # type: ignore[index]
    with pytest.raises(ModelError, match="trains nothing on weights quantised as torchao Int4WeightOnlyConfig"):
        quantizing.forecast(four, loading.load_base(str(gated), device="meta").model, manifest.read(gated).edits)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("nf5", "write nf4 or int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "did you mean 'bnb_4bit_quant_type'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "only one can be used"),
        ({"bits": 4}, "quant_method"),
        ({"quant_method": "mystery"}, "mystery"),
        ({"quant_method": "gptq", "bits": 4}, "cannot be quantised as gptq while it is loaded; write nf4 or int8"),
        ({"quant_method": "torchao"}, "quant_type|torchao"),
    ],
)
def test_what_cannot_be_done_on_loading_is_refused(gated: Path, asked: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        solidify.load(gated, quantization=asked)


def test_arguments_that_do_not_go_together_are_refused(gated: Path) -> None:
    with pytest.raises(ModelError, match="hits nothing"):
        solidify.load(gated, quantization="nf4", keep="model.layers.*.nothing")
    with pytest.raises(ModelError, match="say by `quantization`"):
        solidify.load(gated, keep="lm_head")
    with pytest.raises(ModelError, match="taken as it is"):
        solidify.load(gated, quantization="nf4", quantization_config=quantizing.configure("nf4", torch.float32))
    with pytest.raises(ArtifactError, match="no weight is quantised"):
        solidify.load(gated, quantization="nf4", keep="model")
    dora = {**LORA, "use_dora": True}
    with pytest.raises(AdapterError, match="use_dora does not go with 8-bit"):
        solidify.attach(solidify.load(gated, quantization="int8"), lora=dora)


def test_an_adapter_is_checked_on_its_base_as_it_was_quantised(gated: Path, tmp_path: Path) -> None:
    inputs = {"short": {"input_ids": pico.tokens()}}
    adapter = solidify.save_adapter(trained(solidify.load(gated, quantization="nf4")), tmp_path / "adapter")
    found = adapter_alone.on_quantized(gated, adapter, inputs)
    assert [(f.name, f.verdict) for f in found] == [
        ("adapter has an effect (nf4)", "proved"),
        ("adapter off is the base (nf4)", "proved"),
    ]
    plain = solidify.save_adapter(trained(solidify.load(gated)), tmp_path / "plain")
    assert adapter_alone.on_quantized(gated, plain, inputs) == []


def test_surgery_on_a_quantised_model_is_refused(gated: Path) -> None:
    model = solidify.load(gated, quantization="nf4")
    for change in (
        lambda: solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled),
        lambda: solidify.insert(model, ["model.layers.0"]),
        lambda: solidify.remove(model, ["model.layers.0"]),
    ):
        with pytest.raises(SurgeryError, match=r"the model is quantised \(bitsandbytes\).*solidify.load"):
            change()


def test_a_base_that_is_stored_quantised_is_refused_with_what_to_do(tmp_path: Path) -> None:
    import transformers

    pico.llama(hidden_size=64).save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    for call in (
        lambda: loading.load_base(str(tmp_path / "packed")),
        lambda: loading.load_base(str(tmp_path / "packed"), device="meta"),
        lambda: solidify.Surgery(tmp_path / "packed"),
    ):
        with pytest.raises(ModelError, match=r"stored quantised \(bitsandbytes\).*base.quantization.*dequantize\(\)"):
            call()
    answers = loading.load_base(str(tmp_path / "packed"), quantized=True).model  # as a teacher
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dequantize()
    again.save_pretrained(tmp_path / "again", save_original_format=False)  # the remedy that is named
    found = loading.load_base(str(tmp_path / "again")).model
    assert torch.allclose(logits(found), logits(answers), atol=1e-4)


def test_a_base_in_fp8_is_refused_and_its_remedy_works(tmp_path: Path) -> None:
    import transformers

    pico.llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "proj" in name]:
        scale = tensors[name].float().abs().max() / 448  # the largest number in e4m3
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.expand(-(-tensors[name].shape[0] // 32), -(-tensors[name].shape[1] // 32))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    config = tmp_path / "fp8" / "config.json"
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantization}))
    with pytest.raises(ModelError, match=r"stored quantised \(fp8\).*FineGrainedFP8Config\(dequantize=True\)"):
        loading.load_base(str(tmp_path / "fp8"))
    full = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    full.save_pretrained(tmp_path / "full", save_original_format=False)
    assert torch.equal(logits(loading.load_base(str(tmp_path / "full")).model), logits(full))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_weights_is_refused_where_they_are_packed(gated: Path, start: str) -> None:
    model = solidify.load(gated, quantization="nf4")
    with pytest.raises(AdapterError, match=f"the start '{start}' is made from a layer's weights, and those of .*quant"):
        solidify.attach(model, lora={**LORA, "init_lora_weights": start})
    solidify.attach(solidify.load(gated), lora={**LORA, "init_lora_weights": start})


def test_evas_start_leaves_packed_weights_alone(gated: Path, tmp_path: Path) -> None:
    lora = {**LORA, "init_lora_weights": "eva", "eva_config": {"rho": 1.0}}
    rows = [{"input_ids": pico.tokens(seed=seed)} for seed in range(4)]
    off = logits(solidify.load(gated, quantization="nf4"))
    attached = solidify.attach(solidify.load(gated, quantization="nf4"), lora=lora, batches=rows)
    assert torch.equal(logits(attached.eval()), off)
    started = {name: p.detach().clone() for name, p in attached.named_parameters() if "lora_A" in name}
    plain = solidify.attach(solidify.load(gated), lora=lora, batches=rows)
    for name, parameter in plain.named_parameters():  # from what the layers read, which packing hardly changes
        if "lora_A" in name:
            assert float((parameter.detach() @ started[name].T).diagonal().abs().min()) > 0.5
    solidify.save_adapter(attached, tmp_path / "adapter")
    assert torch.equal(logits(solidify.load(gated, tmp_path / "adapter", quantization="nf4")), off)
