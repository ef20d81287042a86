"""Adapters and checkpoints of plain PEFT and transformers: loaded, trained on, saved, merged; what nothing tells."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import solidify
from solidify.errors import AdapterError

IDS = pico.tokens()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def arguments(directory: Path, steps: int, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(directory), max_steps=steps, save_steps=2, report_to="none", use_cpu=True, learning_rate=1e-2,
        per_device_train_batch_size=4, disable_tqdm=True, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and what transformers' own trainer leaves of an adapter (`out`) and of a whole training (`full`)."""
    directory = tmp_path_factory.mktemp("plain")
    pico.llama().save_pretrained(directory / "base")
    for name in ("out", "full"):
        model: Any = AutoModelForCausalLM.from_pretrained(directory / "base")
        if name == "out":
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
        rows: Any = pico.ragged()
        Trainer(model, arguments(directory / name, 2), train_dataset=rows, data_collator=pico.collate).train()
    return directory


def load_base(trained: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(trained / "base")


def test_a_checkpoint_is_loaded_and_the_unknown_is_said(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = solidify.load_adapter(load_base(trained), trained / "out" / "checkpoint-2")
    expected = PeftModel.from_pretrained(load_base(trained), trained / "out" / "checkpoint-2")
    assert torch.equal(logits(model), logits(expected))
    assert "whether it was trained on these weights was not looked at" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_it_is_trained_on_saved_checked_and_merged(trained: Path, tmp_path: Path) -> None:
    """Saved by us, on a plain base, the adapter knows its base from now on."""
    model = solidify.load_adapter(load_base(trained), trained / "out" / "checkpoint-2", trainable=True)
    before = logits(model)
    objective = solidify.Objective([solidify.Term("model")])
    rows: Any = pico.ragged()
    trainer = solidify.ObjectiveTrainer(
        model=model.train(), args=arguments(tmp_path / "on", 2), train_dataset=rows, data_collator=pico.collate,
        objective=objective,
    )  # fmt: skip
    trainer.train()
    attached = logits(model)
    assert not torch.equal(attached, before)
    solidify.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(solidify.load(trained / "base", adapter=tmp_path / "adapter")), attached)
    assert solidify.check(tmp_path / "adapter").passed
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), attached, rtol=0, atol=1e-5
    )


def test_saved_on_a_plain_base_it_refuses_another(trained: Path, tmp_path: Path) -> None:
    model = solidify.load_adapter(load_base(trained), trained / "out" / "checkpoint-2")
    solidify.save_adapter(model, tmp_path / "adapter")
    pico.llama(seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="the weights differ"):
        solidify.load(tmp_path / "other", adapter=tmp_path / "adapter")
    changed = load_base(trained)
    with torch.no_grad():
        changed.lm_head.weight.mul_(2)
    with pytest.raises(AdapterError, match=r"lm_head.weight has other values"):
        solidify.load_adapter(changed, tmp_path / "adapter")


def test_training_goes_on_from_another_trainers_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its optimizer and schedule: two steps of theirs and two of ours are four of theirs."""
    runs = {}
    for name, kind in (("theirs", Trainer), ("ours", solidify.ObjectiveTrainer)):
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
        model: Any = get_peft_model(load_base(trained), config)
        more: dict[str, Any] = {} if kind is Trainer else {"objective": solidify.Objective([solidify.Term("model")])}
        rows: Any = pico.ragged()
        trainer = kind(model, arguments(tmp_path / name, 4), train_dataset=rows, data_collator=pico.collate, **more)
        trainer.train(resume_from_checkpoint=str(trained / "out" / "checkpoint-2"))
        assert trainer.state.global_step == 4
        runs[name] = logits(model)
    torch.testing.assert_close(runs["ours"], runs["theirs"], rtol=0, atol=1e-5)
    assert "on which base and data it was trained was not looked at" in " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_of_an_adapter_is_merged(trained: Path, tmp_path: Path) -> None:
    solidify.merge(trained / "out" / "checkpoint-2", tmp_path / "merged", base=trained / "base")
    attached = logits(solidify.load_adapter(load_base(trained), trained / "out" / "checkpoint-2"))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), attached, rtol=0, atol=1e-5
    )


def test_a_checkpoint_of_a_whole_training_is_a_base(trained: Path, tmp_path: Path) -> None:
    """Nothing of the training travels into what is built on it."""
    model = AutoModelForCausalLM.from_pretrained(trained / "full" / "checkpoint-2")
    pico.artifact(model, solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled), tmp_path / "made")
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert not names & {"trainer_state.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"}


def test_what_does_not_fit_is_refused(trained: Path, tmp_path: Path) -> None:
    model = pico.llama(num_hidden_layers=1)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(AdapterError, match=r"does not fit the model(.|\n)*layers.1.*which the model does not have"):
        solidify.load_adapter(model, trained / "out" / "checkpoint-2")
    assert [name for name, _ in model.named_parameters()] == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterError, match="pickled adapters are not read"):
        solidify.load_adapter(load_base(trained), tmp_path / "empty")


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")
def test_further_modules_of_a_sentence_transformer_are_listed_by_a_merge(trained: Path, tmp_path: Path) -> None:
    """Their weight files have the name of the model's own, one directory below."""
    shutil.copytree(trained / "base", tmp_path / "base")
    (tmp_path / "base" / "2_Dense").mkdir()
    (tmp_path / "base" / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    save_file({"linear.weight": torch.ones(2, 2)}, tmp_path / "base" / "2_Dense" / "model.safetensors")
    solidify.merge(trained / "out" / "checkpoint-2", tmp_path / "merged", base=tmp_path / "base")
    assert (tmp_path / "merged" / "2_Dense" / "model.safetensors").is_file()
    assert solidify.check(tmp_path / "merged").passed
