"""A recipe without surgery: the base itself is trained, merged and checked, and stays a plain model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import solidify
from solidify.adapter import adapters, data_starts
from solidify.checks import structure
from solidify.command import cli, views
from solidify.directory import manifest, trust
from solidify.errors import AdapterError, ArtifactError, RecipeError
from solidify.recipe import build_stage, schema
from solidify.weights import hashing


def save_base(directory: Path, model: Any) -> Path:
    model.save_pretrained(directory)
    words = {word: index for index, word in enumerate(["</s>", "<pad>", *(f"w{n}" for n in range(100))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)
    return directory


def write_recipe(directory: Path, base: Path, /, **changes: Any) -> Path:
    lines = [json.dumps({"text": f"w{n} w{n + 1} w{n + 2} w{n + 3} w{n + 5}"}) for n in range(20)]
    (directory / "lines.jsonl").write_text("\n".join(lines))
    document = {
        "base": {"model": str(base)},
        "adapter": {"lora": {"r": 2, "target_modules": ["model.layers.*.self_attn.q_proj"]}, "train": ["model.norm"]},
        "data": {"train": "lines.jsonl", "max_length": 16},
        "training": {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4},
        "output": str(directory / "run"),
        **changes,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A Llama, and an OLMoE whose files have the hub's layout: one tensor for each expert."""
    found = {}
    for name, model in (("llama", pico.llama(eos_token_id=0)), ("olmoe", pico.olmoe())):
        directory = tmp_path_factory.mktemp(name)
        report = solidify.run(write_recipe(directory, save_base(directory / "base", model)))
        assert report.passed
        found[name] = directory
    return found


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_it_runs_and_stays_a_plain_model(runs: Mapping[str, Path], name: str) -> None:
    run = runs[name] / "run"
    ids = pico.tokens(vocab_size=100)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()  # no remote code
    plain = AutoModelForCausalLM.from_pretrained(run / "artifact").eval()
    with torch.no_grad():
        before = plain(ids).logits
        attached = PeftModel.from_pretrained(plain, run / "adapter").eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, attached, rtol=0, atol=1e-4)
        assert not torch.equal(attached, before)
    base, made = (sorted(p.name for p in (runs[name] / part).iterdir()) for part in ("base", "run/artifact"))
    assert made == sorted([*base, "README.md", "solidify.json"])


@pytest.mark.parametrize("part", ["artifact", "adapter", "merged"])
def test_its_cards_say_what_it_is_and_name_no_path(runs: Mapping[str, Path], part: str) -> None:
    card = (runs["olmoe"] / "run" / part / "README.md").read_text()
    assert str(runs["olmoe"]) not in card
    values = yaml.safe_load(card.split("---")[1])
    tags = {"library_name": "peft", "tags": ["solidify", "lora"]}
    expected = tags if part == "adapter" else {"library_name": "transformers", "tags": ["solidify"]}
    assert values == {"pipeline_tag": "text-generation", **expected}
    words = {
        "artifact": "nothing was trained",
        "adapter": "LoRA adapter of Olmoe",
        "merged": "another model than its base",
    }
    assert words[part] in card
    for stock in {"artifact", "merged"} - {part}:
        assert words[stock] not in card


@pytest.mark.slow
def test_all_of_it_is_checked(runs: Mapping[str, Path]) -> None:
    report = solidify.check(runs["olmoe"] / "run")
    assert report.passed, report.failure()
    names = {finding.name for finding in report.findings}
    assert {"plain PEFT loads the same", "wrong base refused", "frozen tensors unchanged"} <= names


def test_plan_says_that_nothing_is_changed(runs: Mapping[str, Path]) -> None:
    planned = solidify.plan(runs["llama"] / "recipe.yaml")
    out = StringIO()
    for each in views.plan(planned.document()):
        Console(file=out, width=160).print(each)
    assert "Surgery: none" in out.getvalue()
    assert planned.edits == [] and sum(planned.trainable.values()) > 0 and not planned.files


def test_a_finished_run_is_not_repeated(runs: Mapping[str, Path]) -> None:
    before = (runs["llama"] / "run" / "adapter" / "solidify.json").stat().st_mtime_ns
    assert solidify.run(runs["llama"] / "recipe.yaml", resume=True).passed
    assert (runs["llama"] / "run" / "adapter" / "solidify.json").stat().st_mtime_ns == before


def test_another_base_is_refused(runs: Mapping[str, Path], tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", pico.llama(eos_token_id=0, seed=5))
    solidify.build(write_recipe(tmp_path, other))
    with pytest.raises(AdapterError, match="the weights differ"):
        solidify.load(tmp_path / "run" / "artifact", adapter=runs["llama"] / "run" / "adapter")
    for base in (tmp_path / "run" / "artifact", other):  # as an artifact of kind `stock`, and as it stood
        words = ["generate", str(base), "-p", "w1 w2", "--adapter", str(runs["llama"] / "run" / "adapter")]
        with pytest.raises(AdapterError, match="the weights differ"):
            cli.app(words, standalone_mode=False)
    right = ["generate", str(runs["llama"] / "run" / "artifact"), *words[2:]]
    assert not cli.app(right, standalone_mode=False)


def test_another_dtype_is_written_as_it_is_loaded(runs: Mapping[str, Path], tmp_path: Path) -> None:
    base = runs["olmoe"] / "base"
    lora = {"lora": {"r": 2, "target_modules": ["model.layers.*.self_attn.q_proj"]}}
    solidify.build(write_recipe(tmp_path, base, base={"model": str(base), "dtype": "bfloat16"}, adapter=lora))
    assert solidify.load(tmp_path / "run" / "artifact").dtype == torch.bfloat16


@pytest.mark.slow
def test_an_artifact_is_trained_as_it_stands(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base", pico.llama(eos_token_id=0)))
    edits = solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled)
    pico.artifact(model, edits, tmp_path / "built")
    report = solidify.build(write_recipe(tmp_path, tmp_path / "built"))
    assert all(finding.passed is not False for finding in report.findings)
    digests = [json.loads((tmp_path / d / "solidify.json").read_text()) for d in ("built", "run/artifact")]
    assert digests[0]["tensors"] == digests[1]["tensors"] and digests[0]["code"] == digests[1]["code"]


def test_an_artifact_that_does_not_reload_is_not_copied(tmp_path: Path) -> None:
    """What it says that it computes is not what it computes: no training stands on it."""
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base", pico.llama(eos_token_id=0)))
    edits = solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled)
    built = pico.artifact(model, edits, tmp_path / "built")
    expected = built / "certificate" / "outputs.safetensors"
    save_file({name: -tensor for name, tensor in load_file(expected).items()}, expected)
    record = manifest.read(built, "artifact")
    listed = {**record.files, "certificate/outputs.safetensors": hashing.digest_file(expected)}
    changed = replace(record, files=listed)
    changed.write(built)
    trust.remember(changed)
    with pytest.raises(ArtifactError, match=r"does not reload as it was in memory:\s.*outputs identical"):
        build_stage.build(schema.load(write_recipe(tmp_path, built)), tmp_path / "run")
    assert not (tmp_path / "run" / "artifact").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": None, "training": {}}, "nothing is to be done: give `surgery`, an `adapter`, or both"),
        ({"heal": {"align": {}}}, "`heal` brings a changed model back to its base: give `surgery`"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        schema.load(write_recipe(tmp_path, tmp_path, **changes))


@pytest.mark.slow
def test_a_plain_base_is_quantised_while_it_is_trained(tmp_path: Path) -> None:
    """The base stays what it is; that the merged model is not quite the trained one is measured, not proved."""
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base", pico.llama(eos_token_id=0, hidden_size=64, intermediate_size=128))
    lora = {"r": 2, "target_modules": ["model.layers.*.self_attn.q_proj"]}
    report = solidify.run(
        write_recipe(tmp_path, base, base={"model": str(base), "quantization": "nf4"}, adapter={"lora": lora})
    )
    found = {finding.name: finding.verdict for finding in report.findings}
    measured = [name for name, verdict in found.items() if verdict == "measured" and "against trained" in name]
    assert len(measured) == 2 and report.passed
    packed = solidify.load(tmp_path / "run" / "artifact", tmp_path / "run" / "adapter", quantization="nf4")
    assert any(type(parameter).__name__ == "Params4bit" for parameter in packed.parameters())
    assert any("nf4" in finding.name for finding in solidify.check(tmp_path / "run").findings)


@pytest.mark.parametrize("rows", [102, 104])
def test_tokens_that_get_the_rows_which_a_base_has_to_spare_start_as_promised(tmp_path: Path, rows: int) -> None:
    """The tokenizer knows 102 ids. What spare rows computed before is no promise; what all others compute is one."""
    base = save_base(tmp_path / "base", pico.llama(eos_token_id=0, vocab_size=rows))
    added = {"surgery": [{"add_tokens": ["<a>", "<b>"]}], "adapter": None, "training": {}}
    recipe = write_recipe(tmp_path, base, **added)
    report = build_stage.build_alone(schema.load(recipe), tmp_path / "out")
    found = next(finding for finding in report.findings if finding.name == "start identical")
    assert found.verdict == "proved" and "of 2 new tokens apart" in found.evidence, found.evidence


def test_a_head_that_lost_an_old_token_does_not_start_as_promised() -> None:
    before = {"plain": torch.randn(2, 5, 104)}
    after = {"plain": before["plain"].clone()}
    after["plain"][..., 102:] += 1
    assert structure.start(before, after, promised=True, added={102, 103}).verdict == "proved"
    after["plain"][..., 7] += 1
    assert structure.start(before, after, promised=True, added={102, 103}).verdict == "failed"


STARTED: dict[str, Any] = {"r": 2, "target_modules": ["model.layers.*.self_attn.q_proj", "**.down_proj"]}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", ["eva", "lora_ga", "corda", "pissa_niter_4"])
def test_a_run_with_another_start_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, start: str) -> None:
    """Starts that are made from data read the first rows of `data.train`."""
    base = save_base(tmp_path / "base", pico.llama(eos_token_id=0, vocab_size=102))
    lora = {**STARTED, "init_lora_weights": start, **({"eva_config": {"rho": 1.0}} if start == "eva" else {})}
    training = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    recipe = write_recipe(tmp_path, base, adapter={"lora": lora}, training=training)
    assert solidify.plan(recipe).trainable
    report = solidify.run(recipe)
    assert report.passed
    run = tmp_path / "run"
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {len(tensor) for key, tensor in whole.items() if "lora_A" in key} == {2 if start == "eva" else 4}
    for part in ("adapter", "merged", "checkpoints/checkpoint-4"):
        shutil.rmtree(run / part)
    assert (run / "checkpoints" / "checkpoint-2").is_dir()
    again = solidify.run(recipe, resume=True)
    assert again.passed
    found = load_file(run / "adapter" / "adapter_model.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_trainer_that_makes_tokens_itself_does_not_feed_a_start(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", pico.llama(eos_token_id=0, vocab_size=102))
    recipe = write_recipe(tmp_path, base, adapter={"lora": {**STARTED, "init_lora_weights": "eva"}}, trainer="dpo")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "w1", "chosen": "w2", "rejected": "w3"}\n' * 8)
    with pytest.raises(
        RecipeError, match=r"the start 'eva' reads rows of data\.train as the model does, and trainer: dpo"
    ):
        solidify.plan(recipe)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", ["eva", "lora_ga", "pissa"])
def test_a_model_on_another_device_is_brought_back_without_data(start: str) -> None:
    """As `training.release_model` does: what was trained is copied into an adapter with the same tensors."""
    lora = {**STARTED, "init_lora_weights": start, **({"eva_config": {"rho": 1.2}} if start == "eva" else {})}
    rows = [{"input_ids": pico.tokens(seed=seed)} for seed in range(3)] if start != "pissa" else None
    trained = solidify.attach(pico.llama(), lora=lora, batches=rows)
    state = adapters.trained_state(trained)
    again = solidify.attach(pico.llama(), lora=data_starts.declared_alike(trained, lora))
    here = dict([*again.named_parameters(), *again.named_buffers()])
    assert {name: tensor.shape for name, tensor in state.items()} == {name: here[name].shape for name in state}
    with torch.no_grad():
        for name, tensor in state.items():
            here[name].copy_(tensor)
    ids = pico.tokens(seed=9)
    assert torch.equal(again.eval()(ids).logits, trained.eval()(ids).logits)
