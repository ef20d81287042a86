"""Tensor by tensor on disk gives, bit for bit, what PEFT merges in memory; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from solidify.errors import AdapterError, ArtifactError
from solidify.findings import Finding
from solidify.merging import agreement, mathematics, read_back, rewriting, sums
from solidify.merging.rewriting import Prepared, Rewritten
from solidify.model import anatomy
from solidify.model.answers import collect
from solidify.weights import checkpoint, format

Q = ["q_proj", "v_proj"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of adapters of these kinds

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": Q},
    "rsLoRA, by pattern": {"target_modules": Q, "use_rslora": True, "rank_pattern": {"layers.0.*q_proj": 2}},
    "DoRA": {"target_modules": Q, "use_dora": True},
    "fused experts": {"target_modules": [], "target_parameters": EXPERTS},
    "one of two fused": {"target_modules": Q, "target_parameters": EXPERTS[1:]},
    "modules in full": {"target_modules": Q, "modules_to_save": ["lm_head", "mlp.gate", "mlp.experts"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "DoRA on embeddings": {"target_modules": ["embed_tokens"], "use_dora": True},
}


def save_in_memory_layout(model: PreTrainedModel, directory: Path, files: int = 2) -> None:
    """Writes a model's state as it stands in memory, in several files."""
    model.save_pretrained(directory)
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()
    tied = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    shares = [dict(list(state.items())[start::files]) for start in range(files)]
    for name, share in zip(checkpoint.file_names(files), shares, strict=True):
        save_file({key: tensor.contiguous() for key, tensor in share.items()}, directory / name, {"format": "pt"})
    shapes = zip(checkpoint.file_names(files), shares, strict=True)
    checkpoint.write_index(directory, {n: {k: format.Shape.of(t) for k, t in s.items()} for n, s in shapes})


def perturbed(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def save_adapter(base: Path, directory: Path, **settings: Any) -> Path:
    """Trains nothing, but gives everything that would be trained random values, and saves as PEFT does."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base)
    configuration = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
    perturbed(get_peft_model(model, configuration)).save_pretrained(directory)
    return directory


def in_memory(base: Path, adapter: Path) -> PreTrainedModel:
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    return attached.merge_and_unload(safe_merge=True)


def prepare(base: Path, adapter: Path) -> Prepared:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return rewriting.prepare(skeleton, base, adapter)


def merge(base: Path, adapter: Path, output: Path, **options: Any) -> Rewritten:
    """Merges on disk, without any of the checks that follow."""
    prepared = options.pop("prepared", None) or prepare(base, adapter)
    output.mkdir()
    (output / "config.json").write_text((base / "config.json").read_text())
    return rewriting.rewrite(prepared, output, **{"expected": {}, "link": True, **options})


def reloaded(directory: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], Path]:
    """A pico OLMoE in the layout of the hub (a tensor per expert) and in that of memory, in two dtypes."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = pico.olmoe(dtype=dtype)
        for layout in ("hub", "memory"):
            found[layout, dtype] = tmp_path_factory.mktemp("bases") / layout
        model.save_pretrained(found["hub", dtype], max_shard_size="20KB")
        save_in_memory_layout(model, found["memory", dtype])
    return found


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Splits experts, as is done with those of true size."""
    monkeypatch.setattr(mathematics, "_BLOCK", 1)
    yield


@pytest.mark.usefixtures("in_small_parts")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["hub", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identical_to_peft_in_memory(
    bases: dict[Any, Path], tmp_path: Path, kind: str, layout: str, dtype: torch.dtype
) -> None:
    base = bases[layout, dtype]
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    wanted = in_memory(base, adapter).state_dict()
    prepared = prepare(base, adapter)
    made = merge(base, adapter, tmp_path / "merged", prepared=prepared)
    found = reloaded(tmp_path / "merged").state_dict()
    assert {name for name in wanted if not torch.equal(wanted[name], found[name])} == set()
    assert set(prepared.merger.used.values()) == {1}
    assert set(prepared.merger.used) == set(load_file(adapter / "adapter_model.safetensors"))
    before, after = checkpoint.read(base).entries, checkpoint.read(tmp_path / "merged").entries
    assert {(n, e.shape, e.file.name) for n, e in before.items()} == {
        (n, e.shape, e.file.name) for n, e in after.items()
    }
    changed = {name for name in before if before[name].digest() != after[name].digest()}
    assert changed == set(made.changed)
    assert made.digests == {name: entry.digest() for name, entry in after.items()}


@pytest.mark.parametrize("experts", [2, 3, 5, 8])
def test_a_part_of_the_experts_is_merged_as_all_of_them(experts: int) -> None:
    """Of a size at which matrix kernels are chosen as they are for true ones; with the numbers that PEFT gives."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.stack = nn.Parameter(torch.randn(8, 256, 512).bfloat16())
    layer = ParamWrapper(holder, "default", "stack", LoraConfig(r=16, target_parameters=["stack"]), r=16, lora_alpha=16)
    layer.lora_A["default"].float()
    layer.lora_B["default"].float()
    nn.init.normal_(layer.lora_B["default"].weight)
    base, a, b = holder.stack.detach(), layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    parts = {"A": (layer.lora_A["default"], "weight"), "B": (layer.lora_B["default"], "weight")}
    change = mathematics.Change("stack", ("A", "B"), layer)

    def merged(rows: range | None) -> torch.Tensor:
        merger = mathematics.Merger({}, {"stack": change}, parts)
        merger._read_tensor = {"A": a, "B": b}.__getitem__  # type: ignore[method-assign, assignment]
        return merger.merged(change, base if rows is None else base[rows.start : rows.stop], rows, 8)

    assert torch.equal(merged(range(experts)), merged(None)[:experts])


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_some_rows_of_a_large_matrix_are_merged_as_all_of_them(kind: str) -> None:
    torch.manual_seed(0)
    configuration = LoraConfig(r=16, target_modules=["0"], use_dora=kind == "DoRA")
    model = get_peft_model(nn.Sequential(nn.Linear(512, 4096, bias=False).bfloat16()), configuration)
    (layer,) = (m for m in model.modules() if isinstance(m, mathematics.Linear))
    nn.init.normal_(layer.lora_B["default"].weight)
    base = layer.get_base_layer().weight.detach()
    parts = {n: (layer.get_submodule(n), "weight") for n in ("lora_A.default", "lora_B.default")}
    if kind == "DoRA":
        parts["m"] = (layer.lora_magnitude_vector["default"], "weight")
    change = mathematics.Change("0.weight", tuple(parts), layer)
    values = {key: getattr(*place).detach() for key, place in parts.items()}

    def merged(rows: range | None) -> torch.Tensor:
        merger = mathematics.Merger({}, {"0.weight": change}, parts)
        merger._read_tensor = values.__getitem__  # type: ignore[method-assign, assignment]
        return merger.merged(change, base if rows is None else base[rows.start : rows.stop], rows, 4096)

    whole = merged(None)
    for begin in range(0, 4096, 1024):
        assert torch.equal(merged(range(begin, begin + 1024)), whole[begin : begin + 1024])


def test_tied_embeddings(tmp_path: Path) -> None:
    """Alike, they stay one; apart, they part. PEFT merges a tied update twice, or one update into both."""
    base = tmp_path / "base"
    pico.llama(tie_word_embeddings=True).save_pretrained(base)

    def case(name: str, **settings: Any) -> tuple[PreTrainedModel, Rewritten]:
        adapter = save_adapter(base, tmp_path / name, **settings)
        made = merge(base, adapter, tmp_path / f"{name} merged")
        config = json.loads((base / "config.json").read_text())
        config["tie_word_embeddings"] = not made.untied
        (tmp_path / f"{name} merged" / "config.json").write_text(json.dumps(config))
        merged = reloaded(tmp_path / f"{name} merged")
        attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        x = {"x": {"input_ids": pico.tokens()}}
        weights = agreement.chosen(sums.effective(attached, "default"), list(made.given + made.added))
        answers, plain = collect(attached, x), AutoModelForCausalLM.from_pretrained(base).eval()
        finding = agreement.merged_equals_attached(answers, merged, plain, x, weights)
        assert finding.passed, f"{name}: {finding.evidence}"
        return merged, made

    both = case("tied update", target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert not both[1].untied
    copies = case("tied copies", target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert not copies[1].untied
    for merged, made in (both, copies):
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert not made.added
    for name, settings in {
        "one update": {"target_modules": ["embed_tokens"]},
        "two updates": {"target_modules": ["embed_tokens", "lm_head"]},
        "one copy": {"target_modules": Q, "modules_to_save": ["lm_head"]},
        "the other copy": {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
    }.items():
        merged, made = case(name, **settings)
        assert made.untied
        assert made.added == ["lm_head.weight"]
        assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_biases(tmp_path: Path) -> None:
    """Of LoRA itself, of its targets, and of everything; and a layer norm that is trained whole."""
    base = tmp_path / "base"
    pico.make("GPT2LMHeadModel", n_embd=32, n_head=4, n_layer=2, vocab_size=64, n_positions=32).save_pretrained(base)
    for place, settings in enumerate(
        (
            {"target_modules": ["c_attn"], "lora_bias": True},
            {"target_modules": ["c_attn"], "bias": "lora_only"},
            {"target_modules": ["c_attn"], "bias": "all"},
            {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "modules_to_save": ["ln_f"]},
        )
    ):
        adapter = save_adapter(base, tmp_path / f"adapter {place}", fan_in_fan_out=True, **settings)
        made = merge(base, adapter, tmp_path / f"merged {place}")
        wanted, found = in_memory(base, adapter).state_dict(), reloaded(tmp_path / f"merged {place}").state_dict()
        assert {name for name in wanted if not torch.equal(wanted[name], found[name])} == set()
        assert any(name.endswith("bias") for name in made.changed)


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Names and layouts of their own: experts one by one under other names; fused, transposed, interleaved, with biases;
    # a head that is trained whole, under a prefix.
    "MixtralForCausalLM": (
        {"intermediate_size": 16, "num_local_experts": 4, "num_key_value_heads": 2},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "GptOssForCausalLM": (
        {"intermediate_size": 16, "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "BertForSequenceClassification": (
        {"intermediate_size": 32},
        {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.usefixtures("in_small_parts")
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings, lora = FAMILIES[name]
    base = tmp_path / "base"
    pico.make(name, **{**pico.SIZES, **settings}).save_pretrained(base, max_shard_size="40KB")
    if name.startswith("Bert"):
        monkeypatch.setitem(globals(), "AutoModelForCausalLM", AutoModelForSequenceClassification)
    adapter = save_adapter(base, tmp_path / "adapter", **lora)
    made = merge(base, adapter, tmp_path / "merged")
    wanted, found = in_memory(base, adapter).state_dict(), reloaded(tmp_path / "merged").state_dict()
    assert {name for name in wanted if not torch.equal(wanted[name], found[name])} == set()
    assert set(checkpoint.read(base).entries) == set(made.digests)


def spoil(adapter: Path, change: Any) -> None:
    """Changes the tensors of an adapter."""
    state = load_file(adapter / "adapter_model.safetensors")
    change(state)
    save_file(state, adapter / "adapter_model.safetensors", {"format": "pt"})


def test_every_tensor_of_the_adapter_has_one_place(bases: dict[Any, Path], tmp_path: Path) -> None:
    base = bases["memory", torch.float32]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(label: str, change: Any) -> str:
        adapter = save_adapter(base, tmp_path / label, target_modules=Q, modules_to_save=["lm_head"])
        spoil(adapter, change)
        with pytest.raises(AdapterError) as caught:
            merge(base, adapter, tmp_path / f"{label} merged")
        return str(caught.value)

    stray = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    words = refused("stray", lambda state: state.update({stray: state[name].clone(), "x": state.pop(name)}))
    assert f"the file holds {stray}, which the model does not have" in words
    assert "the file holds x, which the model" in words
    assert f"the file lacks {name}" in words
    words = refused("shape", lambda state: state.update({name: state[name][:2].clone()}))
    assert f"{name} has shape [2, 32] in the file and [4, 32] in the model" in words
    twice = "base_model.model.lm_head.original_module.weight"
    words = refused("twice", lambda state: state.update({twice: state["base_model.model.lm_head.weight"].clone()}))
    assert "both give lm_head.weight" in words


def test_a_tensor_that_is_used_twice_or_never_is_found(bases: dict[Any, Path], tmp_path: Path) -> None:
    """Two changes that share a tensor, and one that goes missing after it was planned."""
    base = bases["memory", torch.float32]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=Q, modules_to_save=["lm_head"])
    prepared = prepare(base, adapter)
    changes = prepared.merger.changes
    key = changes["lm_head.weight"].keys[0]
    changes["model.embed_tokens.weight"] = mathematics.Change("model.embed_tokens.weight", (key,))
    gone = changes.pop("model.layers.1.self_attn.v_proj.weight")
    with pytest.raises(AdapterError) as caught:
        merge(base, adapter, tmp_path / "merged", prepared=prepared)
    assert f"{key} was used 2 times and not once" in str(caught.value)
    assert all(f"{key} was used 0 times" in str(caught.value) for key in gone.keys)


def test_what_is_not_finite_is_refused_all_together(bases: dict[Any, Path], tmp_path: Path) -> None:
    base = bases["hub", torch.float32]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=Q, modules_to_save=["lm_head"])
    broken = [f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_B.weight" for n in (0, 1)]
    broken.append("base_model.model.lm_head.weight")

    def change(state: dict[str, torch.Tensor]) -> None:
        for key, value in zip(broken, (float("nan"), float("inf"), float("-inf")), strict=True):
            state[key].view(-1)[3] = value

    spoil(adapter, change)
    with pytest.raises(AdapterError, match="the adapter is not finite") as caught:
        merge(base, adapter, tmp_path / "merged")
    assert all(f"{key} holds NaN or infinity" in str(caught.value) for key in broken)


def test_a_sum_that_overflows_is_refused(tmp_path: Path) -> None:
    """The adapter is finite, the merged weight is not; PEFT's own word for it is NaN."""
    base = tmp_path / "base"
    save_in_memory_layout(pico.olmoe(dtype=torch.float16), base)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=Q)

    def change(state: dict[str, torch.Tensor]) -> None:
        for key in state:
            if "layers.1" in key:
                state[key].fill_(1e4)

    spoil(adapter, change)
    with pytest.raises(AdapterError) as caught:
        merge(base, adapter, tmp_path / "merged")
    for name in ("q_proj", "v_proj"):
        assert f"model.layers.1.self_attn.{name}.weight would hold NaN or infinity" in str(caught.value)
    assert "layers.0" not in str(caught.value)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_base_that_is_not_the_known_one_is_found(bases: dict[Any, Path], tmp_path: Path, name: str) -> None:
    """A tensor that is kept, and one that is merged."""
    base = bases["memory", torch.float32]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=Q)
    expected = {key: entry.digest() for key, entry in checkpoint.read(base).entries.items()}
    merge(base, adapter, tmp_path / "merged", expected=expected)
    with pytest.raises(ArtifactError, match=rf"the tensor {name} is not the one that was written"):
        merge(base, adapter, tmp_path / "other", expected={**expected, name: "0" * 64})


def test_a_file_that_no_change_touches_is_the_same_file(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_in_memory_layout(pico.olmoe(), base, files=40)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["layers.0.self_attn.q_proj"])
    made = merge(base, adapter, tmp_path / "linked")
    assert len(made.kept) == len(made.files) - 1
    assert all(path.samefile(base / path.name) for path in made.kept)
    copied = merge(base, adapter, tmp_path / "copied", link=False)
    assert copied.digests == made.digests
    for path in copied.files:
        assert path.stat().st_nlink == 1
        assert path.read_bytes() == (tmp_path / "linked" / path.name).read_bytes()


LAYERS = ["rsLoRA, by pattern", "DoRA", "fused experts", "embeddings", "DoRA on embeddings", "modules in full"]


def read_again(base: Path, adapter: Path, output: Path) -> read_back.Comparison:
    """Merges on disk, and reads back what was written."""
    prepared = prepare(base, adapter)
    merge(base, adapter, output, prepared=prepared)
    found = read_back.compare(prepared, adapter, output)
    assert set(found.found) == set(prepared.merger.changes)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["hub", "memory"])
def test_what_was_written_is_read_back(bases: dict[Any, Path], tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    for place, kind in enumerate(LAYERS):
        adapter = save_adapter(bases[layout, dtype], tmp_path / str(place), **KINDS[kind])
        found = read_again(bases[layout, dtype], adapter, tmp_path / f"{place} merged")
        assert found.finding(list(found.found)).verdict == "proved", (kind, found)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "DoRA on embeddings"])  # which needs all rows
def test_of_large_weights_some_rows_are_read_back(
    bases: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is measured and not proved; what is a little too strong, turned or left out is seen."""
    monkeypatch.setattr(read_back, "_WHOLE", 16)
    monkeypatch.setattr(read_back, "_SAMPLED", 512)
    monkeypatch.setattr(mathematics, "_BLOCK", 2**11)
    base = bases["hub", torch.float32]
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])

    def judge(place: str, spoil: Any) -> Finding:
        with monkeypatch.context() as patch:
            for method in ("merged", "pieces"):
                patch.setattr(mathematics.Merger, method, spoil(getattr(mathematics.Merger, method)))
            found = read_again(base, adapter, tmp_path / place)
        return found.finding(list(found.found))

    def spoiled(change: Any) -> Any:
        """Makes a merge that writes what `change` makes of the right part of a tensor, and of the base's."""

        def spoil(honest: Any) -> Any:
            def wrong(self: Any, what: Any, plain: Any, *rest: Any) -> Any:
                made = honest(self, what, plain, *rest)
                if isinstance(made, torch.Tensor):
                    return change(made, plain.to(made.dtype)).contiguous()
                return (change(piece, torch.zeros_like(piece)).contiguous() for piece in made)

            return wrong

        return spoil

    right = judge("right", spoiled(lambda made, plain: made))
    assert right.verdict == "measured" and "at some rows" in right.evidence, right
    assert judge("strong", spoiled(lambda made, plain: plain + 1.01 * (made - plain))).verdict == "failed"
    assert judge("turned", spoiled(lambda made, plain: made.flip(-1))).verdict == "failed"
    assert judge("left out", spoiled(lambda made, plain: plain)).verdict == "failed"


@pytest.mark.parametrize("fault", ["nothing", "factors", "rows", "writing"])
def test_a_merge_that_reads_or_writes_wrongly_is_seen(
    bases: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """What is read back is none of what the merge read: not even the adapter."""
    base = bases["hub", torch.float32]
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS["fused experts"])
    monkeypatch.setattr(mathematics, "_BLOCK", 2**11)
    read, take = mathematics.Merger._read_factors, mathematics._take_rows
    written = rewriting.Unit.written

    def moved(self: Any, layer: Any, keys: Any) -> dict[str, torch.Tensor]:
        return {key: t.roll(1, 0) if "lora_B" in key else t for key, t in read(self, layer, keys).items()}

    with monkeypatch.context() as patch:
        if fault == "factors":
            patch.setattr(mathematics.Merger, "_read_factors", moved)
        elif fault == "rows":
            patch.setattr(mathematics, "_take_rows", lambda *given: take(*given).flip(0))
        elif fault == "writing":
            patch.setattr(rewriting.Unit, "written", lambda *given: {k: 0.5 * t for k, t in written(*given).items()})
        found = read_again(base, adapter, tmp_path / "merged")
    assert found.finding(list(found.found)).verdict == ("proved" if fault == "nothing" else "failed")


def test_a_zero_of_another_sign_is_not_what_was_trained(bases: dict[Any, Path], tmp_path: Path) -> None:
    base = bases["hub", torch.float32]
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS["modules in full"])
    given = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in given if "lm_head" in key)
    given[key][0, 0] = 0.0
    save_file(given, adapter / "adapter_model.safetensors", {"format": "pt"})
    prepared = prepare(base, adapter)
    made = merge(base, adapter, tmp_path / "merged", prepared=prepared)
    changed = list(prepared.merger.changes)
    assert read_back.compare(prepared, adapter, tmp_path / "merged").finding(changed).passed is True
    file = next(path for path in made.files if "lm_head.weight" in load_file(path))
    state = load_file(file)
    state["lm_head.weight"][0, 0] = -0.0
    save_file(state, file, {"format": "pt"})
    assert read_back.compare(prepared, adapter, tmp_path / "merged").finding(changed).passed is False


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_of_a_few_large_experts_each_is_read_back_in_each_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int
) -> None:
    """One that was left as it was is seen, be it the last, and be it the first half of a fused tensor alone."""
    monkeypatch.setattr(read_back, "_WHOLE", 0)
    monkeypatch.setattr(read_back, "_SAMPLED", 1)
    base = tmp_path / "base"
    pico.olmoe(1, num_experts=experts, num_experts_per_tok=1).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS["fused experts"])
    prepared = prepare(base, adapter)
    made = merge(base, adapter, tmp_path / "merged", prepared=prepared)
    (file,) = made.files
    right, plain = load_file(file), load_file(base / file.name)
    assert read_back.compare(prepared, adapter, tmp_path / "merged").finding(made.changed).passed is None
    assert len(made.changed) == 3 * experts
    for name in made.changed:
        save_file({**right, name: plain[name]}, file, {"format": "pt"})
        assert read_back.compare(prepared, adapter, tmp_path / "merged").finding(made.changed).passed is False, name


@pytest.mark.parametrize("wrong", [False, True])
def test_rows_of_many_tokens_are_read_once(
    bases: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    """However many parts of a large embedding are compared; another order of the rows is seen."""
    monkeypatch.setattr(read_back, "_WHOLE", 16)
    base, ids = bases["hub", torch.float32], [9, 2, 30, 31, 7]
    tokens = {"target_modules": Q, "trainable_token_indices": {"embed_tokens": ids}}
    adapter = save_adapter(base, tmp_path / "adapter", **tokens)
    read: list[str] = []
    given = read_back._Reading._read_given

    def noted(self: Any, key: str, part: Any) -> torch.Tensor:
        read.append(key)
        return given(self, key, part)

    monkeypatch.setattr(read_back._Reading, "_read_given", noted)
    if wrong:
        merged = mathematics.Merger._with_rows
        monkeypatch.setattr(
            mathematics.Merger, "_with_rows", lambda self, change, ids, *rest: merged(self, change, ids[::-1], *rest)
        )
    found = read_again(base, adapter, tmp_path / "merged")
    assert len([key for key in read if "token" in key]) == 1
    assert found.finding(list(found.found)).verdict == ("failed" if wrong else "measured")


def test_a_row_of_zeros_has_no_direction(bases: dict[Any, Path], tmp_path: Path) -> None:
    """DoRA gives it the direction of the update."""
    model = in_float32(bases, tmp_path, use_dora=True)
    layer = next(m for m in model.modules() if isinstance(m, mathematics.Linear))
    with torch.no_grad():
        layer.get_base_layer().weight[3] = 0
    expected = sums.weight(layer, "default")
    layer.merge(safe_merge=True)
    assert sums.fault("q", sums.off_by(expected, layer.get_base_layer().weight.detach())) == []


def test_of_a_large_bias_a_part_is_what_the_whole_has_there(bases: dict[Any, Path], tmp_path: Path) -> None:
    layer = next(m for m in in_float32(bases, tmp_path).modules() if isinstance(m, mathematics.Linear))
    layer.get_base_layer().bias = nn.Parameter(torch.randn(layer.out_features))
    layer.lora_B["default"].bias = nn.Parameter(torch.randn(layer.out_features))
    whole, own = sums.bias(layer, "default"), layer.get_base_layer().bias.detach()
    for part in (slice(0, 1), slice(5, 9)):
        assert torch.equal(sums.bias(layer, "default", own[part], part).wanted, whole.wanted[part])


def test_a_small_row_of_a_weight_is_judged_by_its_own_roundings(bases: dict[Any, Path], tmp_path: Path) -> None:
    """It may be no other, though its numbers are far below the mean of the weight."""
    for dtype, size in ((torch.float32, 1e-7), (torch.bfloat16, 1e-3)):
        layer = next(m for m in in_float32(bases, tmp_path / str(dtype)).modules() if isinstance(m, mathematics.Linear))
        with torch.no_grad():
            layer.get_base_layer().weight[5] *= size
            layer.get_base_layer().to(dtype)
            layer.lora_B["default"].weight[5] *= size
        expected = sums.weight(layer, "default")
        right = (expected.without + (expected.wanted - expected.without).to(dtype)).to(dtype)
        assert sums.fault("q", sums.off_by(expected, right)) == []
        for other in (torch.zeros_like(right[5]), -right[5], expected.without[5].to(dtype)):
            wrong = right.clone()
            wrong[5] = other
            assert sums.fault("q", sums.off_by(expected, wrong)), (dtype, other)


def in_float32(bases: dict[Any, Path], tmp_path: Path, **settings: Any) -> PeftModel:
    base = bases["hub", torch.float32]
    adapter = save_adapter(base, tmp_path / "plain", target_modules=Q, **settings)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_adapters_that_cannot_be_merged_here_are_told(bases: dict[Any, Path], tmp_path: Path) -> None:
    base = bases["memory", torch.float32]
    for place, (settings, words) in enumerate(
        (
            (
                {"target_modules": Q, "init_lora_weights": "pissa"},
                "init_lora_weights='pissa' is not supported: it subtracts its starting values from the base's weights",
            ),
        )
    ):
        adapter = save_adapter(base, tmp_path / str(place), **settings)
        with pytest.raises(AdapterError, match=words):
            prepare(base, adapter)


def test_the_merged_model_computes_what_the_attached_one_does(bases: dict[Any, Path], tmp_path: Path) -> None:
    base = bases["hub", torch.float32]
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS["fused experts"])
    merge(base, adapter, tmp_path / "merged")
    x = {"input_ids": pico.tokens()}
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert torch.allclose(anatomy.run(reloaded(tmp_path / "merged"), x), anatomy.run(attached, x), atol=1e-5)
