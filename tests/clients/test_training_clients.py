"""Plain Trainer, plain PEFT and plain TRL train an artifact as they train any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import training
from clients import strangers

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TEXTS = ["the quick brown fox", "a lazy dog and there it is", "where the other one was", "over the moon"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=pico.tokens()).logits


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_bit_for_bit_those_without(
    artifact: Path, stranger: Callable[..., PreTrainedModel], tmp_path: Path, reentrant: bool
) -> None:
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    wanted, _ = training.step(stranger(artifact), tmp_path / "plain", 4, 1, None, trainer_class=Trainer)
    model = stranger(artifact)
    found, _ = training.step(model, tmp_path / "saving", 4, 1, None, trainer_class=Trainer, **options)
    assert model.is_activation_checkpointing
    assert set(found) == set(wanted) == {name for name, _ in model.named_parameters()}
    assert training.distance(wanted, found) == 0.0


@pytest.fixture(scope="module")
def trained(
    moe: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """By case: what a trained model computed before it was saved, and what a stranger's fresh process loaded."""
    scratch = tmp_path_factory.mktemp("trained")
    wanted, jobs = {}, {}
    for name, directory in (("moe", moe), ("dense", dense)):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        model = get_peft_model(model, LoraConfig(**LORA, modules_to_save=["mlp"], init_lora_weights=False))
        training.step(model, scratch / "lora", 4, 1, None, trainer_class=Trainer)
        model.save_pretrained(scratch / name / "adapter")
        wanted[f"{name}, adapter"] = logits(model)
        jobs[f"{name}, adapter"] = {"adapter": str(scratch / name / "adapter")}
        merged = model.merge_and_unload()
        merged.save_pretrained(scratch / name / "merged")
        wanted[f"{name}, merged"] = logits(merged)
        jobs[f"{name}, merged"] = {"directory": str(scratch / name / "merged")}
        for kind, adapter in (("whole", None), ("adapted", LoraConfig(**LORA))):
            trainer = supervised(directory, scratch / name / "run", adapter)
            trainer.train()
            trainer.save_model(str(scratch / name / kind))
            wanted[f"{name}, {kind}"] = logits(trainer.model)
            key = "adapter" if adapter else "directory"
            jobs[f"{name}, {kind}"] = {key: str(scratch / name / kind)}
    found = strangers.load(jobs, pico.tokens(), scratch)
    return {name: (wanted[name], found[name]) for name in jobs}


def arguments(output: Path, kind: type, **more: Any) -> Any:
    """Returns two steps with the artifact's path as the model, as TRL's command line would have it."""
    options = {"trust_remote_code": True, "dtype": "float32"}
    own = {"max_steps": 2, "learning_rate": 1e-2, "model_init_kwargs": options, "remove_unused_columns": True}
    return training.arguments(output, 2, 1, kind, **own, **more)


def supervised(directory: Path, output: Path, adapter: LoraConfig | None) -> SFTTrainer:
    data = Dataset.from_list([{"text": text} for text in TEXTS])
    return SFTTrainer(model=str(directory), args=arguments(output, SFTConfig), train_dataset=data, peft_config=adapter)


@pytest.mark.parametrize("kind", ["adapter", "merged", "whole", "adapted"])
@pytest.mark.parametrize("name", ["moe", "dense"])
def test_what_was_trained_is_loaded_by_a_stranger(
    trained: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]],
    request: pytest.FixtureRequest,
    stranger: Callable[..., PreTrainedModel],
    name: str,
    kind: str,
) -> None:
    """Adapters of plain PEFT (LoRA and a module trained whole), merged; TRL's result, whole and with LoRA.

    Bit for bit where the tensors stand at aligned addresses, which plain `save_pretrained` does not see to.
    """
    wanted, found = trained[f"{name}, {kind}"]
    assert torch.equal(found["aligned"], wanted)
    assert not torch.equal(wanted, logits(stranger(request.getfixturevalue(name))))


def test_an_adapter_goes_onto_a_model_that_is_loaded_already(
    artifact: Path, stranger: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = get_peft_model(stranger(artifact), LoraConfig(**LORA, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    base = stranger(artifact)
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), before)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before)
    assert torch.equal(logits(loaded.unload()), before)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "adapted"])
def test_supervised_fine_tuning_learns_and_moves_only_what_it_trains(
    artifact: Path, tmp_path: Path, adapter: dict[str, Any] | None
) -> None:
    trainer = supervised(artifact, tmp_path, LoraConfig(**adapter) if adapter else None)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    first = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < first
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert trainable == ({name for name in before if ".lora_" in name} if adapter else set(before))
    assert moved == trainable


# TRL 1.16 switches checkpointing off for its copy of the model by transformers' old names.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(enable|disable)` is deprecated:FutureWarning")
def test_preference_optimisation_learns_against_a_copy_of_the_model(artifact: Path, tmp_path: Path) -> None:
    pair = {"prompt": "the fox", "chosen": " jumps over", "rejected": " is lazy"}
    trainer = DPOTrainer(
        model=str(artifact), args=arguments(tmp_path, DPOConfig), train_dataset=Dataset.from_list([pair] * 4)
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == 0 < margins[1]
