"""Merging on disk, from end to end: artifacts with their promises, stock models in their own layout."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from memory_merge import merge_in_memory
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import solidify
from solidify.__main__ import main
from solidify.adapter import expert_files
from solidify.artifact import companions, inspection
from solidify.directory import manifest
from solidify.errors import AdapterError, ArtifactError
from solidify.merging import export, mathematics
from solidify.model import anatomy
from solidify.weights import checkpoint
from training import awake

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of adapters of these kinds

EVERYTHING: dict[str, Any] = {
    "lora": {
        "r": 2,
        "target_modules": ["model.layers.*.self_attn.q_proj", "**.o_proj.down"],
        "target_parameters": ["**.experts.gate_up_proj"],
    },
    "train": ["**.o_proj.scale", "model.norm", "**.o_proj.down.bias", "lm_head"],
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    return anatomy.run(model, {"input_ids": pico.tokens()})


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def everything(wrapped_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with every way of training in it."""
    torch.manual_seed(1)
    model = solidify.attach(solidify.load(wrapped_artifact), **EVERYTHING)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return solidify.save_adapter(model.eval(), tmp_path_factory.mktemp("adapters") / "everything")


@pytest.mark.slow
def test_an_artifact_is_merged_with_all_its_promises(wrapped_artifact: Path, everything: Path, tmp_path: Path) -> None:
    before = {**contents(wrapped_artifact), **contents(everything)}
    merged = solidify.merge(everything, tmp_path / "merged")
    assert {**contents(wrapped_artifact), **contents(everything)} == before
    found = {finding.name: finding for finding in merged.findings}
    assert all(finding.passed for finding in merged.findings)
    names = {"merged equals attached", "merged weights are the sum", "only what was trained changed"}
    assert names <= set(found)
    count = len(load_file(everything / "adapter_model.safetensors"))
    assert f"{count} tensors of the adapter used once each" in found["only what was trained changed"].evidence
    ledger = merged.manifest.lineage[-1]["ledger"]
    assert ledger["adapter tensors used"] == count
    assert ledger["tensors changed"] + ledger["tensors kept"] == len(merged.manifest.tensors)
    in_memory = merge_in_memory(solidify.load(wrapped_artifact, everything)).state_dict()
    on_disk = solidify.load(tmp_path / "merged").state_dict()
    assert {name for name in in_memory if not torch.equal(in_memory[name], on_disk[name])} == set()
    changed = {n for n, d in merged.manifest.tensors.items() if manifest.read(wrapped_artifact).tensors[n] != d}
    assert len(changed) == ledger["tensors changed"]


def test_a_large_artifact_is_not_run(
    wrapped_artifact: Path, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are compared, outputs are not, and base and adapter are never in memory as a whole."""
    monkeypatch.setattr(anatomy, "LARGE", 1)
    monkeypatch.setattr(export.storage, "load_adapter", lambda *args, **options: pytest.fail("loaded as a whole"))
    merged = solidify.merge(everything, tmp_path / "merged")
    verdicts = {finding.name: finding.verdict for finding in merged.findings}
    assert verdicts.pop("merged equals attached") == "not looked at"
    assert verdicts.pop("merged weights are the sum") == verdicts["only what was trained changed"] == "proved"
    assert "failed" not in verdicts.values()


@pytest.mark.parametrize("what", ["model.norm.weight", "lm_head.weight"])
def test_what_a_large_artifact_holds_of_what_was_trained_in_full_is_read_back(
    wrapped_artifact: Path, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A merge that writes something else there is refused, by the tensor's name."""
    monkeypatch.setattr(anatomy, "LARGE", 1)
    honest = mathematics.Merger.pieces

    def wrong(self: Any, change: Any, shape: Any) -> Iterator[torch.Tensor]:
        for made in honest(self, change, shape):
            yield torch.nextafter(made, made + 1) if change.name == what else made

    monkeypatch.setattr(mathematics.Merger, "pieces", wrong)
    with pytest.raises(ArtifactError, match=f"{what} is off by inf"):
        solidify.merge(everything, tmp_path / "merged")


@pytest.mark.parametrize("moved", [None, 3, 4])
def test_rows_of_a_large_model_that_were_trained_alone_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int | None
) -> None:
    """A row that was trained, or one beside it, is another: refused."""
    model = pico.llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    adapted = solidify.attach(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        lora={"trainable_token_indices": {"model.embed_tokens": [3, 5]}},
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapter = solidify.save_adapter(adapted.eval(), tmp_path / "adapter")
    monkeypatch.setattr(anatomy, "LARGE", 1)
    honest = mathematics.Merger.merged

    def wrong(self: Any, change: Any, *rest: Any) -> torch.Tensor:
        made = honest(self, change, *rest)
        if moved is not None:
            made[moved] *= 1.5
        return made

    monkeypatch.setattr(mathematics.Merger, "merged", wrong)
    if moved is None:
        found = {finding.name: finding.verdict for finding in solidify.merge(adapter, tmp_path / "merged").findings}
        assert found["merged weights are the sum"] == "proved"
        return
    with pytest.raises(ArtifactError, match=r"model\.embed_tokens\.weight is off by inf"):
        solidify.merge(adapter, tmp_path / "merged")


def test_a_base_with_one_other_byte_is_refused(
    wrapped_artifact: Path, copy_of: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tensor that is kept and of one that is merged; the base is not read as a whole first."""
    monkeypatch.setattr(anatomy, "LARGE", 1)
    base = copy_of(wrapped_artifact)
    adapter = solidify.save_adapter(
        awake(base, lora={"r": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]}), tmp_path / "adapter"
    )
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        path = base / "model.safetensors"
        place, content = checkpoint.read(base).entries[name].start, path.read_bytes()
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ArtifactError, match=f"the tensor {name} is not the one that was written"):
            solidify.merge(adapter, tmp_path / "merged")
        path.write_bytes(content)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "copy"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain OLMoE in the hub's layout, in several files, with a tokenizer's file and weights of another format."""
    directory = tmp_path_factory.mktemp("stock") / "base"
    pico.olmoe().save_pretrained(directory, max_shard_size="30KB")
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "original").mkdir()
    (directory / "original" / "notes.txt").write_text("x")
    (directory / "pytorch_model.bin").write_bytes(b"the base")
    return directory


def plain_adapter(base: Path, directory: Path, **settings: Any) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    configuration = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings})
    attached = get_peft_model(model, configuration)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    attached.save_pretrained(directory)
    return directory


STOCK: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA and a module in full": {"use_dora": True, "modules_to_save": ["lm_head"]},
    "fused experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


@pytest.mark.parametrize("kind", STOCK)
def test_a_stock_model_stays_one(stock: Path, tmp_path: Path, kind: str) -> None:
    """Its keys, its files, its configuration; and what PEFT and transformers make of the two in memory."""
    adapter = plain_adapter(stock, tmp_path / "adapter", **STOCK[kind])
    before = {**contents(stock), **contents(adapter)}
    merged = solidify.merge(adapter, tmp_path / "merged", base=stock)
    assert {**contents(stock), **contents(adapter)} == before
    assert merged.manifest.kind == "stock"
    granted = {companions.TRAVELS, expert_files.FINDING}  # PEFT marks its own layout by nothing
    assert all(finding.passed for finding in merged.findings if finding.name not in granted)
    left = next(finding for finding in merged.findings if finding.name == companions.TRAVELS)
    assert "pytorch_model.bin" in left.evidence
    ours, theirs = checkpoint.read(tmp_path / "merged").entries, checkpoint.read(stock).entries
    assert {(n, e.shape, e.file.name) for n, e in ours.items()} == {
        (n, e.shape, e.file.name) for n, e in theirs.items()
    }
    names = {str(p.relative_to(stock)) for p in stock.rglob("*") if p.is_file()}
    there = {str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged").rglob("*") if p.is_file()}
    assert there == (names - {"pytorch_model.bin"}) | {manifest.NAME, manifest.CARD}
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (stock / name).read_bytes()
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stock), adapter).eval().merge_and_unload()
    peft.save_pretrained(tmp_path / "by PEFT")
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "by PEFT").eval())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert (logits(model.eval()) - wanted).square().mean().sqrt() <= 1e-5 * wanted.square().mean().sqrt()
    assert solidify.check(tmp_path / "merged").passed
    assert {entry["name"] for entry in inspection.diff(stock, tmp_path / "merged")["tensors"]} == {
        name for name in ours if merged.manifest.tensors[name] != theirs[name].digest()
    }
    assert solidify.merge(adapter, tmp_path / "merged", base=stock).manifest.tensors == merged.manifest.tensors


def test_a_stock_model_that_was_changed_is_found(stock: Path, tmp_path: Path) -> None:
    merged = solidify.merge(plain_adapter(stock, tmp_path / "adapter"), tmp_path / "merged", base=stock)
    assert "2 tensors changed" in next(f for f in merged.findings if f.name.startswith("only what")).evidence
    path = sorted((tmp_path / "merged").glob("*.safetensors"))[0]
    content = path.read_bytes()
    path.unlink()  # it may be a link to the base's
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not solidify.check(tmp_path / "merged").passed


def test_files_that_stay_are_linked_or_copied(stock: Path, tmp_path: Path) -> None:
    adapter = plain_adapter(stock, tmp_path / "adapter", target_modules=["layers.0.self_attn.q_proj"])
    linked = solidify.merge(adapter, tmp_path / "linked", base=stock)
    copied = solidify.merge(adapter, tmp_path / "copied", base=stock, link=False)
    same = [p.name for p in stock.glob("*.safetensors") if p.samefile(tmp_path / "linked" / p.name)]
    assert len(same) == len(list(stock.glob("*.safetensors"))) - 1
    assert linked.manifest.lineage[-1]["ledger"]["files kept"] == len(same)
    assert not any(p.samefile(tmp_path / "copied" / p.name) for p in stock.glob("*.safetensors"))
    assert copied.manifest.tensors == linked.manifest.tensors


def test_there_must_be_room_before_anything_is_written(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = plain_adapter(stock, tmp_path / "adapter", target_modules=["layers.0.self_attn.q_proj"])
    free = type(shutil.disk_usage(tmp_path))(10**9, 10**9, 10**3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with monkeypatch.context() as patch:
        patch.setattr("solidify.weights.format.write_file", lambda *_: pytest.fail("written"))
        with pytest.raises(ArtifactError, match=r"1 kB of free space, and .*B are needed; make room"):
            solidify.merge(adapter, tmp_path / "merged", base=stock)
    assert not (tmp_path / "merged").exists()


def test_a_stock_base_is_found_where_the_adapter_says(
    stock: Path, wrapped_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory, the hub's cache, or a sentence."""
    cache = tmp_path / "models--someone--something/snapshots/1"
    monkeypatch.setattr("solidify.merging.inputs.snapshot_download", lambda name, **options: str(cache))
    adapter = plain_adapter(stock, tmp_path / "adapter")
    solidify.merge(adapter, tmp_path / "one")

    def named(base: str | None) -> None:
        values = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": base}))

    named("someone/something")
    cache.mkdir(parents=True)
    shutil.copytree(stock, cache.parent.parent / "blobs")
    for path in (cache.parent.parent / "blobs").iterdir():  # as the cache does: links into a store
        if path.is_file():
            (cache / path.name).symlink_to(path)
    solidify.merge(adapter, tmp_path / "two")
    assert manifest.read(tmp_path / "one").tensors == manifest.read(tmp_path / "two").tensors
    assert not any(path.is_symlink() for path in (tmp_path / "two").iterdir())
    (cache.parent.parent / "blobs").rename(tmp_path / "elsewhere")
    for path in cache.iterdir():
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere" / path.name)
    with pytest.raises(ArtifactError, match=r"config\.json of the base .* is a link that leads out of the base"):
        solidify.merge(adapter, tmp_path / "three")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AdapterError, match="neither a model directory nor in the hub's cache; say where it is"):
        solidify.merge(adapter, tmp_path / "three")
    named(None)
    with pytest.raises(AdapterError, match="does not name its base; say where it is"):
        solidify.merge(adapter, tmp_path / "three")
    with pytest.raises(AdapterError, match="was not saved by solidify, so nothing tells"):
        solidify.merge(adapter, tmp_path / "three", base=wrapped_artifact)
    assert not (tmp_path / "three").exists()


def test_what_a_stock_merge_refuses(stock: Path, tmp_path: Path) -> None:
    """One message, and nothing left behind."""
    adapter = plain_adapter(stock, tmp_path / "adapter")

    def refused(words: str, adapter: Path = adapter, base: Path = stock, output: Path = tmp_path / "out") -> None:
        before = sorted(os.listdir(tmp_path))
        with pytest.raises((AdapterError, ArtifactError), match=words):
            solidify.merge(adapter, output, base=base)
        assert sorted(os.listdir(tmp_path)) == before

    refused("lies in an input of the merge", output=stock / "merged")
    quantized = Path(shutil.copytree(stock, tmp_path / "quantized"))
    config = json.loads((stock / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    refused("is quantized; merge into the model that it was made from", base=quantized)
    adapted = Path(shutil.copytree(stock, tmp_path / "adapted"))
    shutil.copyfile(adapter / "adapter_config.json", adapted / "adapter_config.json")
    refused("holds an adapter too", base=adapted)
    other = tmp_path / "other"
    pico.olmoe(layers=1).save_pretrained(other)
    refused("which the model does not have", base=other)
    state = load_file(adapter / "adapter_model.safetensors")
    next(value for key, value in state.items() if "lora_B" in key).view(-1)[0] = float("nan")
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    save_file(state, broken / "adapter_model.safetensors", {"format": "pt"})
    refused("the adapter is not finite", adapter=broken)
    (broken / "adapter_model.safetensors").unlink()
    refused("pickled adapters are not read", adapter=broken)


def one_percent(delta: torch.Tensor) -> torch.Tensor:
    return 1.01 * delta


def turned(delta: torch.Tensor) -> torch.Tensor:
    return delta.T if delta.ndim == 2 else delta


def left_out(delta: torch.Tensor) -> torch.Tensor:
    return 0 * delta if delta.ndim == 2 else delta


def swapped(delta: torch.Tensor) -> torch.Tensor:
    return delta[[1, 0, *range(2, len(delta))]] if delta.ndim == 3 else delta


@pytest.mark.parametrize(
    ("dtype", "fault"),
    [
        *((torch.float32, fault) for fault in (one_percent, turned, left_out, swapped)),
        (torch.bfloat16, one_percent),
        *(pytest.param(torch.bfloat16, fault, marks=pytest.mark.slow) for fault in (turned, left_out, swapped)),
    ],
)
def test_a_merge_that_is_wrong_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fault: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """PEFT's merge is disturbed, its forward is not: the sums tell, and in float32 the outputs too."""
    from peft.tuners.lora.layer import Linear, ParamWrapper

    base = tmp_path / "base"
    pico.olmoe(dtype=dtype).save_pretrained(base)
    adapter = plain_adapter(base, tmp_path / "adapter", target_parameters=["mlp.experts.down_proj"])
    findings = solidify.merge(adapter, tmp_path / "right", base=base).findings
    assert all(finding.passed for finding in findings if finding.name != expert_files.FINDING)
    for kind in (Linear, ParamWrapper):
        right = kind.get_delta_weight
        monkeypatch.setattr(kind, "get_delta_weight", lambda self, name, right=right: fault(right(self, name)))
    with pytest.raises(ArtifactError, match=r"merged weights are the sum: .* (is off by|has its update)") as caught:
        solidify.merge(adapter, tmp_path / "merged", base=base)
    if dtype == torch.float32:
        assert "merged equals attached: short/logits differs by" in str(caught.value)
    assert not (tmp_path / "merged").exists()


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3},
        {"target_modules": ["convolution"]},
        "logits: ",
    ),
    "T5ForConditionalGeneration": (
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
        {"target_modules": ["q", "wo"]},
        "logits, encoder_last_hidden_state: ",
    ),
    "Wav2Vec2ForCTC": (
        {
            "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 32, "conv_dim": [16] * 3, "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 2],
            "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        },
        {"target_modules": ["q_proj"]},
        "logits: ",
    ),
    "ViTMAEForPreTraining": (  # draws which patches it masks, in evaluation too
        {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
            "image_size": 32, "patch_size": 8, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16,
        },
        {"target_modules": ["query", "q_proj"]},
        "loss, logits, mask, ids_restore: ",
    ),
    "BertForQuestionAnswering": (
        {**pico.SIZES, "intermediate_size": 32},
        {"target_modules": ["query"], "modules_to_save": ["qa_outputs"]},
        "start_logits, end_logits: ",
    ),
    "PatchTSTForPrediction": (
        {
            "num_input_channels": 2, "context_length": 32, "patch_length": 4, "patch_stride": 4, "d_model": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16, "prediction_length": 4,
        },
        {"target_modules": ["q_proj"]},
        "SurgeryError: PatchTSTForPrediction takes 'past_values'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_every_kind_are_merged(tmp_path: Path, name: str) -> None:
    """Without embeddings, with two halves, with other outputs than logits, with inputs that nobody can make up."""
    sizes, lora, words = FAMILIES[name]
    model = pico.make(name, **sizes)
    model.save_pretrained(tmp_path / "base")
    attached = get_peft_model(model, LoraConfig(**{"r": 4, **lora}))
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    attached.save_pretrained(tmp_path / "adapter")
    merged = solidify.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    found = {finding.name: finding for finding in merged.findings}
    assert found["merged weights are the sum"].passed
    assert found["merged equals attached"].evidence.startswith(words)
    assert not [finding for finding in merged.findings if finding.passed is False]


def test_embeddings_that_were_trained_apart_part(tmp_path: Path) -> None:
    base = tmp_path / "base"
    pico.llama(tie_word_embeddings=True).save_pretrained(base)
    adapter = plain_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merged = solidify.merge(adapter, tmp_path / "merged", base=base)
    assert "new, because they were trained apart: lm_head.weight" in merged.findings[0].evidence
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert torch.allclose(logits(model), logits(wanted), atol=1e-5)


def test_the_command(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Findings as a table; what is wrong ends in one message and exit code 2."""
    adapter = plain_adapter(stock, tmp_path / "adapter", target_modules=["layers.0.self_attn.q_proj"])

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["solidify", "merge", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    code, out, _ = run(adapter, "--base", stock, "--output", tmp_path / "merged", "--copy")
    assert code == 0
    assert "merged equals attached" in out and "layout is the base's" in out
    assert not any(path.samefile(stock / path.name) for path in (tmp_path / "merged").glob("*.safetensors"))
    code, _, err = run(adapter, "--base", tmp_path / "nowhere", "--output", tmp_path / "other")
    assert code == 2
    assert err.count("solidify: ") == 1 and "neither a model directory nor in the hub's cache" in err
    assert not (tmp_path / "other").exists()
