from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from pico import wrappers
from transformers import AutoModelForCausalLM

import solidify
from solidify.artifact import certificate
from solidify.directory import manifest
from solidify.errors import ArtifactError
from solidify.model import anatomy, probing
from solidify.modules.trashcan_moe import TrashCanMoE


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.slow
def test_plain_transformers_loads_it_in_a_process_that_cannot_import_us(trash_artifact: Path) -> None:
    script = """
import json, sys
sys.modules["solidify"] = sys.modules["peft"] = None
import torch, transformers
transformers.logging.set_verbosity_error()
answer = {}
for auto in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
    kind = getattr(transformers, auto)
    extra = {} if auto == "AutoConfig" else {"output_loading_info": True}
    loaded = kind.from_pretrained(sys.argv[1], trust_remote_code=True, **extra)
    if extra:
        loaded, info = loaded
        answer[auto] = [type(loaded).__name__, {k: sorted(v) for k, v in info.items() if v}]
    else:
        answer[auto] = [type(loaded).__name__, loaded.model_type]
print(json.dumps(answer))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(trash_artifact)], capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["AutoModelForCausalLM"] == ["SolidOlmoeForCausalLM", {}]
    assert answer["AutoModel"] == ["SolidOlmoeModel", {}]
    assert answer["AutoConfig"][1].startswith("solid_olmoe_")


def test_what_the_fresh_process_found_is_returned(tmp_path: Path) -> None:
    model = pico.olmoe()
    edits = solidify.replace(model, "**.mlp", TrashCanMoE)
    artifact = solidify.build(model, edits, tmp_path / "out")
    behaviour = {
        "causal",
        "cache",
        "crop",
        "padding",
        "rows",
        "stateless",
        "deterministic",
        "hidden_states",
        "router_logits",
    }
    assert {finding.name for finding in artifact.findings} == {
        *(f"behaviour: {name}" for name in behaviour),
        "state identical (AutoModel)",
        "outputs identical (AutoModel)",
        "state identical (AutoModelForCausalLM)",
        "outputs identical (AutoModelForCausalLM)",
        "reload (AutoModelForDecision)",
        "loads without us",
    }
    assert all(finding.passed for finding in artifact.findings)
    assert artifact.manifest == manifest.read(tmp_path / "out")
    assert entries(tmp_path) == ["out"]


def test_the_directory_is_a_plain_model_directory(trash_artifact: Path) -> None:
    assert entries(trash_artifact) == [
        "README.md",
        "certificate",
        "config.json",
        "configuration_solid_olmoe.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_solid_olmoe.py",
        "operations.py",
        "solidify.json",
        "trashcan_moe.py",
    ]
    config = json.loads((trash_artifact / "config.json").read_text())
    assert config["surgery"] == [
        {
            "operation": "replace",
            "class": "TrashCanMoE",
            "supplied": ["original"],
            "arguments": {},
            "bypass": True,
            "modules": ["model.layers.0.mlp", "model.layers.1.mlp"],
        }
    ]
    record = manifest.read(trash_artifact)
    assert record.base["class"] == "OlmoeForCausalLM"
    assert len(record.tensors) == len(pico.olmoe().state_dict()) + 8
    assert record.versions["transformers"]


LLAMA = {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True}
GPT2 = {"vocab_size": 99, "n_embd": 36, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 99, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16}


@pytest.mark.parametrize(
    ("name", "settings", "target", "module"),
    [
        # Whole families are in tests/test_families.py.
        pytest.param("LlamaForCausalLM", LLAMA, "model.layers.*.self_attn", "Scaled", marks=pytest.mark.slow),
        ("GPT2LMHeadModel", GPT2, "transformer.h.*.mlp", "Scaled"),
        ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}, "**.DenseReluDense", "Scaled"),
        ("ViTForImageClassification", {**VIT, "patch_size": 4}, "classifier", "Bottleneck"),
    ],
    ids=["tied Llama attention", "GPT-2 of odd width", "T5 feed-forward", "ViT head"],
)
def test_other_families_reload_bit_identical(
    tmp_path: Path, name: str, settings: dict[str, object], target: str, module: str
) -> None:
    model = pico.make(name, **settings)
    edits = solidify.replace(model, target, getattr(wrappers, module))
    with torch.no_grad():
        for edit in edits:
            model.get_submodule(edit.name).scale.fill_(1.25)
    findings = solidify.build(model, edits, tmp_path / "out").findings
    assert all(finding.passed for finding in findings)
    # A model without tokens has no later ones, no cache and no padding: nothing is said of them.
    found = {finding.name for finding in findings}
    for kind in ("causal", "cache", "padding"):
        assert (f"behaviour: {kind}" in found) is not name.startswith("ViT")


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    model = pico.olmoe(dtype=torch.bfloat16)
    edits = solidify.replace(model, "**.mlp", TrashCanMoE)
    pico.artifact(model, edits, tmp_path / "out")
    loaded = solidify.load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    inputs = probing.probe_inputs(model)
    assert torch.equal(anatomy.run(loaded, inputs), anatomy.run(model, inputs))


def test_a_model_that_was_cast_after_loading_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = pico.olmoe().to(torch.bfloat16)
    edits = solidify.replace(model, "**.mlp", TrashCanMoE)
    with pytest.raises(ArtifactError, match=r"inv_freq is computed, not saved: was the model cast with .to\(dtype\)"):
        solidify.build(model, edits, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["buffer", "attribute"])
def test_state_that_a_reload_would_lose_is_refused_with_the_remedy(tmp_path: Path, how: str) -> None:
    model = pico.olmoe()
    edits = solidify.replace(model, "**.mlp", wrappers.Forgetful, arguments={"how": how})
    with pytest.raises(ArtifactError, match="does not reload as it was in memory") as caught:
        solidify.build(model, edits, tmp_path / "out")
    assert "a parameter or a persistent buffer" in str(caught.value)
    assert entries(tmp_path) == []


def test_what_is_not_ours_is_never_overwritten(tmp_path: Path) -> None:
    model = pico.olmoe()
    edits = solidify.replace(model, "**.mlp", TrashCanMoE)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("theirs", "file"):
        with pytest.raises(ArtifactError, match="name another, or remove it first"):
            solidify.build(model, edits, tmp_path / name)
    assert entries(tmp_path) == ["file", "theirs"]
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "years of work"


def test_an_earlier_result_of_ours_is_replaced_whole(trash_artifact: Path, copy_of: Callable[[Path], Path]) -> None:
    target = copy_of(trash_artifact)
    (target / "leftover.txt").write_text("old")
    model = pico.olmoe()
    edits = solidify.replace(model, "**.mlp", wrappers.Scaled)
    with pytest.raises(ArtifactError, match=r"leftover.txt is a file that the manifest does not list"):
        solidify.build(model, edits, target)
    assert (target / "leftover.txt").read_text() == "old"
    (target / "leftover.txt").unlink()
    solidify.build(model, edits, target)
    assert manifest.read(target).edits[0]["new_class"] == "Scaled"
    assert entries(target.parent) == ["copy"]


def test_edits_that_are_not_in_the_model_are_refused(tmp_path: Path) -> None:
    model, other = pico.olmoe(), pico.olmoe()
    edits = solidify.replace(other, "**.mlp", TrashCanMoE)
    with pytest.raises(ArtifactError, match="is OlmoeSparseMoeBlock, but the edit put TrashCanMoE there"):
        solidify.build(model, edits, tmp_path / "out")
    with pytest.raises(ArtifactError, match="there are none"):
        solidify.build(model, [], tmp_path / "out")
    assert entries(tmp_path) == []


def test_experts_keep_their_fast_implementation(trash_artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trash_artifact, trust_remote_code=True)
    assert model.config._experts_implementation == pico.olmoe().config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_the_witness_sees_every_kind_of_fault(trash_artifact: Path, copy_of: Callable[..., Path]) -> None:
    """Spoils copies of a good artifact, each in one way, and lets the fresh process look at each."""

    def findings(spoil: Callable[[Path], None], name: str) -> dict[str, bool | None]:
        directory = copy_of(trash_artifact, name)
        spoil(directory)
        return {finding.name: finding.passed for finding in certificate.witness(directory)}

    def change_forward(directory: Path) -> None:
        path = directory / "trashcan_moe.py"
        path.write_text(
            path.read_text().replace("keep = margin >= 0", "keep = margin >= 9e3; weights = weights * 1.01")
        )

    def import_us(directory: Path) -> None:
        path = directory / "modeling_solid_olmoe.py"
        path.write_text("import solidify\n" + path.read_text())

    def drop_a_tensor(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(directory / "model.safetensors")
        del state["model.layers.0.mlp.trash.bias"]
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    changed = findings(change_forward, "forward")
    assert changed["state identical (AutoModelForCausalLM)"] is True
    assert changed["outputs identical (AutoModelForCausalLM)"] is False
    assert findings(import_us, "imports")["reload (AutoModelForCausalLM)"] is False
    assert findings(drop_a_tensor, "tensor")["state identical (AutoModelForCausalLM)"] is False


@pytest.mark.parametrize(("distances", "passed"), [([1e-6, 1e-5], None), ([1e-6, math.nan], False)])
def test_on_another_machine_what_is_no_number_is_no_rounding(distances: list[float], passed: bool | None) -> None:
    outputs = {str(n): {"equal": False, "distance": far, "scale": 1.0} for n, far in enumerate(distances)}
    same = {"equal": 1, "absent": [], "additional": [], "different": []}
    state = {**dict.fromkeys(("state", "attributes", "values"), same), "loading_info": {}, "meta": [], "seconds": 0.1}
    load = {**state, "outputs": outputs, "sampled": False}
    findings = certificate._judge_load("AutoModel", load, "cpu AVX2 -> AVX512")
    assert [finding.passed for finding in findings if finding.name.startswith("outputs")] == [passed]


@pytest.mark.slow
def test_an_artifact_of_several_files_is_written_again_when_all_of_it_changed(tmp_path: Path) -> None:
    """Its index names files that are not there then."""
    from solidify.artifact.solidify import write_again

    pico.llama().save_pretrained(tmp_path / "base")
    surgery = solidify.Surgery(tmp_path / "base")
    surgery.add("head", pico.wrappers.ValueHead, reads="model.norm")
    source = surgery.build(tmp_path / "source").directory
    assert (source / "model.safetensors.index.json").is_file()
    model = solidify.load(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    made = write_again(model, source, tmp_path / "again", {"step": "heal"})
    assert all(finding.passed for finding in made.findings) and made.manifest.lineage[-1] == {"step": "heal"}
    again = solidify.load(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_what_is_written_again_generates_as_the_model_does(tmp_path: Path) -> None:
    """Settings that were changed in memory are written; of others the file stays as it is, byte for byte."""
    from solidify.artifact.solidify import write_again

    made = pico.llama()
    edits = solidify.replace(made, "model.layers.0.mlp", pico.wrappers.Scaled)
    source = pico.artifact(made, edits, tmp_path / "source")
    model = solidify.load(source)
    for number, name in enumerate(("same", "other")):
        if number:
            model.generation_config.max_new_tokens = 7
        write_again(model, source, tmp_path / name, {"step": "heal"})
    files = [(tmp_path / name / "generation_config.json").read_bytes() for name in ("source", "same", "other")]
    assert files[0] == files[1] != files[2]
    assert solidify.load(tmp_path / "other").generation_config.max_new_tokens == 7
    assert solidify.check(tmp_path / "other").passed
