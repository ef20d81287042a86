"""Traps of a term added by hand: gradients of one optimizer step against one big batch in float64.

Every function that begins with `error_of` takes the step as the plain recipe takes it, with the real trainer, and
returns ‖g - g*‖ / ‖g*‖, where g* is the gradient of the whole window computed at once. `table` gathers them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import lightning
import pico
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from solidify.objective.objective import Objective, Term
from solidify.training.sft import ObjectiveSFTTrainer
from solidify.training.trainer import ObjectiveTrainer
from training import Gradients, arguments, in_order

pytestmark = pytest.mark.slow

Gradient = dict[str, torch.Tensor]
Examples = Sequence[dict[str, list[int]]]
EXACT = 1e-6  # TRL computes parts of its losses in float32
# lightning 2.6 still asks torch's pytree by its old name, and advises on how to load data.
LIGHTNING = (
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers",
)
WINDOW = 8  # sequences in one optimizer step


def student() -> Any:
    return pico.llama(dtype=torch.float64, initializer_range=0.3)


def teacher() -> Any:
    return pico.llama(dtype=torch.float64, initializer_range=0.3, seed=1)


def examples(lengths: str) -> Examples:
    """`even`: every token of sequences of one length is a target; `ragged`: as in real data."""
    if lengths == "ragged":
        return pico.ragged(WINDOW)
    return [{"input_ids": row, "labels": row} for row in pico.tokens(WINDOW, 12).tolist()]


# The objective: a mean over target tokens, and a term, which has the same size of gradient.


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def penalty(model: nn.Module) -> torch.Tensor:
    """Of weights: it depends on no data."""
    return torch.stack([p.square().sum() for p in model.parameters()]).sum() / 2


def confidence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A mean over target tokens: the negative entropy of what is predicted."""
    log_p = logits[:, :-1][labels[:, 1:] != -100].log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1).mean()


def term(kind: str, model: nn.Module, batch: Any, logits: torch.Tensor | None = None) -> torch.Tensor | float:
    if kind == "none":
        return 0.0
    if kind == "penalty":
        return weight(kind) * penalty(model)
    if logits is None:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return weight(kind) * confidence(logits, batch["labels"])


@lru_cache
def weight(kind: str) -> float:
    """Returns the weight with which a term's gradient is as long as the cross entropy's."""
    model, batch = student(), pico.collate(list(examples("ragged")))
    logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    alone = penalty(model) if kind == "penalty" else confidence(logits, batch["labels"])
    return length(gradient(model, cross_entropy(model, batch))) / length(gradient(model, alone))


def gradient(model: nn.Module, loss: torch.Tensor) -> Gradient:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def length(g: Gradient) -> float:
    return float(torch.stack([each.double().square().sum() for each in g.values()]).sum().sqrt())


def error(found: Gradient, right: Gradient) -> float:
    assert set(right) <= set(found)
    return length({name: found[name].double() - right[name] for name in right}) / length(right)


def at_once(kind: str, rows: Examples) -> Gradient:
    """The gradient of the whole window, in one batch."""
    model, batch = student(), pico.collate(list(rows))
    return gradient(model, cross_entropy(model, batch) + term(kind, model, batch))


# Recipes: what users write.


def own_forward(base: type) -> type:
    """The loss of the model's own forward, and the term."""

    class Recipe(base):  # type: ignore[misc, valid-type]
        kind = "none"

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            loss = outputs.loss + term(self.kind, model, inputs, outputs.logits)
            return (loss, outputs) if return_outputs else loss

    return Recipe


def added(base: type, divided_by: Callable[[Any], int] = lambda trainer: 1) -> type:
    """The trainer's own loss, and the term; `divided_by` is what some recipes correct it by."""

    class Recipe(base):  # type: ignore[misc, valid-type]
        kind = "none"

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, dict(inputs), *args, **kwargs)
            return loss + term(self.kind, model, inputs) / divided_by(self)

    return Recipe


def of_arguments(trainer: Any) -> int:
    steps: int = trainer.args.gradient_accumulation_steps
    return steps


def last_step(trainer: Trainer) -> Gradient:
    """Trains, and returns the gradient of the last step."""
    in_order(trainer)
    watch = Gradients(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    return watch.found


def tokenizer() -> PreTrainedTokenizerFast:
    """Words `t0` to `t127`."""
    model = Tokenizer(WordLevel({f"t{i}": i for i in range(128)}, unk_token="t2"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="t1", eos_token="t0", unk_token="t2")


def trl_options(kind: type, directory: Path, size: int, steps: int, **more: Any) -> dict[str, Any]:
    values = {"dataset_kwargs": {"skip_prepare_dataset": True}} if kind is not DPOConfig else {}
    values |= {"activation_checkpointing": False, "learning_rate": 0.0, "max_length": None, **more}
    return {"args": arguments(directory, size, steps, kind, **values), "processing_class": tokenizer()}


def error_of_trainer(recipe: type, kind: str, lengths: str, steps: int, directory: Path, **options: Any) -> float:
    """A Trainer, or one of TRL's that takes the same data, on `steps` micro-batches."""
    recipe.kind = kind  # type: ignore[attr-defined]
    rows = list(examples(lengths))
    if issubclass(recipe, SFTTrainer):
        options |= trl_options(SFTConfig, directory, WINDOW // steps, steps, router_aux_loss_coef=0.0)
        data: Any = Dataset.from_list(rows)
    else:
        options |= {"args": arguments(directory, WINDOW // steps, steps)}
        data = rows
    trainer = recipe(model=student(), train_dataset=data, data_collator=pico.collate, **options)
    return error(last_step(trainer), at_once(kind, rows))


def error_of_ours(recipe: type, kind: str, lengths: str, steps: int, directory: Path) -> float:
    """Our trainers, with the term declared."""
    terms = {"none": [], "penalty": [penalty], "confidence": [confidence]}[kind]
    objective = Objective([Term("model"), *(Term(each, weight(kind)) for each in terms)])  # type: ignore[attr-defined]
    return error_of_trainer(recipe, kind, lengths, steps, directory, objective=objective)


def error_of_a_loss_function(lengths: str, steps: int, directory: Path) -> float:
    """A `compute_loss_func` that returns the mean, as a loss function usually does."""

    def mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return error_of_trainer(added(Trainer), "none", lengths, steps, directory, compute_loss_func=mean)


def error_of_a_short_window(recipe: type, directory: Path) -> float:
    """Six micro-batches, four to a step: the second step has two."""
    recipe.kind = "penalty"  # type: ignore[attr-defined]
    rows = list(examples("ragged"))[:6]
    values = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}
    trainer = recipe(
        model=student(),
        args=arguments(directory, 1, 4, **values),
        train_dataset=rows,
        data_collator=pico.collate,
    )
    return error(last_step(trainer), at_once("penalty", rows[4:]))


def error_of_gkd(steps: int, directory: Path, *, temperature: float = 1.0, on_policy: bool = False) -> float:
    """TRL's GKDTrainer, against the mean divergence over all tokens that it trained on, at its temperature."""
    trained_on: list[dict[str, torch.Tensor]] = []

    class Watched(GKDTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            trained_on.append({key: inputs[key].clone() for key in ("input_ids", "attention_mask", "labels")})
            return super().compute_loss(model, inputs, *args, **kwargs)

    def with_prompts(rows: Any) -> dict[str, torch.Tensor]:
        batch = pico.collate(rows)
        prompts = batch["input_ids"][:, :2]
        return {**batch, "prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}

    more = {"lmbda": float(on_policy), "temperature": temperature, "beta": 0.5, "max_new_tokens": 6}
    trainer = Watched(
        model=student(),
        teacher_model=teacher(),
        train_dataset=Dataset.from_list(list(examples("ragged"))),
        data_collator=with_prompts,
        **trl_options(GKDConfig, directory, WINDOW // steps, steps, **more, router_aux_loss_coef=0.0),
    )
    trainer.generation_config.eos_token_id = list(range(64, 128))  # so that lengths differ
    found = last_step(trainer)

    model, reference, total, tokens = student(), teacher(), torch.zeros((), dtype=torch.float64), 0
    for batch in trained_on:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        targets = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            theirs = reference(**inputs).logits[:, :-1][targets]
        ours = model(**inputs).logits[:, :-1][targets]
        total = total + jensen_shannon((ours / temperature).log_softmax(-1), (theirs / temperature).log_softmax(-1))
        tokens += int(targets.sum())
    return error(found, gradient(model, total / tokens))


def jensen_shannon(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q), summed over rows (arXiv 2306.13649, equation 1, β = ½)."""
    m = ((log_q.exp() + log_p.exp()) / 2).log()
    return ((log_p.exp() * (log_p - m)).sum() + (log_q.exp() * (log_q - m)).sum()) / 2


def error_of_dpo(loss: str, pairs: int, size: int, steps: int, directory: Path, recipe: Any = None) -> float:
    """TRL's DPOTrainer on so many pairs, against the mean over all of them (`sft`: over all chosen tokens)."""
    parts = (("prompt", 0, 2), ("chosen", 2, -2), ("rejected", -2, None))
    every = [each["input_ids"] for each in pico.ragged(pairs, seed=5)]
    rows = [{key: words(ids[start:stop]) for key, start, stop in parts} for ids in every]
    assert all(row["chosen"] for row in rows)
    kind = recipe or added(DPOTrainer)
    kind.kind = "penalty" if recipe else "none"
    trainer = kind(
        model=student(),
        ref_model=teacher(),
        train_dataset=Dataset.from_list(rows),
        **trl_options(DPOConfig, directory, size, steps, loss_type=[loss]),
    )
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    found = last_step(trainer)

    model, reference, losses, tokens = student(), teacher(), [], []
    for batch in batches:  # one pair each: the chosen, then the rejected
        with torch.no_grad():
            theirs = log_probabilities(reference, batch)
        ours = log_probabilities(model, batch)
        margin = (ours - theirs).sum(-1)
        losses.append(-F.logsigmoid(0.1 * (margin[0] - margin[1])) if loss == "sigmoid" else -ours[0].sum())
        tokens.append(1 if loss == "sigmoid" else int(batch["completion_mask"][0].sum()))
    total = torch.stack(losses).sum() / sum(tokens)
    return error(found, gradient(model, total + term(kind.kind, model, None)))


def words(ids: Sequence[int]) -> str:
    return "".join(f" t{i}" for i in ids)


def log_probabilities(model: nn.Module, batch: Any) -> torch.Tensor:
    """Of each completion's tokens, zero elsewhere: (2, sequence_length - 1)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return each * batch["completion_mask"][:, 1:]


class LightningRecipe(lightning.LightningModule):
    """The training step that every tutorial shows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model, self.kind = student().train(), kind
        self.found: Gradient = {}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        outputs = self.model(**batch)
        loss: torch.Tensor = outputs.loss + term(self.kind, self.model, batch, outputs.logits)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def error_of_lightning(kind: str, rows: Examples, steps: int, last: int | None = None) -> float:
    """PyTorch Lightning with `accumulate_grad_batches`; `last` is how many micro-batches the last step has."""
    module = LightningRecipe(kind)
    size = WINDOW // steps if last is None else 1
    loader = torch.utils.data.DataLoader(list(rows), batch_size=size, collate_fn=pico.collate)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", barebones=True, accumulate_grad_batches=steps)
    trainer.fit(module, loader)
    return error(module.found, at_once(kind, rows if last is None else rows[-last:]))


def plain() -> dict[str, type]:
    """What users write, by name."""
    return {
        "Trainer, model(**inputs).loss": own_forward(Trainer),
        "Trainer, super().compute_loss": added(Trainer),
        "Trainer, term / accumulation": added(Trainer, of_arguments),
        "SFTTrainer, super().compute_loss": added(SFTTrainer),
    }


def table(directory: Path) -> dict[tuple[str, str], float]:
    """Returns every error by recipe and case."""
    found: dict[tuple[str, str], float] = {}
    trainers = plain()
    for lengths in ("even", "ragged"):
        for steps in (1, 4, 8):
            for kind in ("none", "penalty", "confidence"):
                case = f"{lengths}, {steps} micro-batches, {kind}"
                for name, recipe in trainers.items():
                    found[name, case] = error_of_trainer(recipe, kind, lengths, steps, directory)
                for ours in (ObjectiveTrainer, ObjectiveSFTTrainer):
                    found[ours.__name__, case] = error_of_ours(ours, kind, lengths, steps, directory)
                found["Lightning", case] = error_of_lightning(kind, examples(lengths), steps)
            found["Trainer, compute_loss_func", f"{lengths}, {steps} micro-batches, none"] = error_of_a_loss_function(
                lengths, steps, directory
            )
    for name in ("Trainer, super().compute_loss", "Trainer, term / accumulation"):
        found[name, "a short last window, penalty"] = error_of_a_short_window(trainers[name], directory)
    found["Lightning", "a short last window, none"] = error_of_lightning("none", examples("ragged")[:6], 4, last=2)
    for temperature in (1.0, 2.0, 4.0):
        found["GKDTrainer", f"temperature {temperature}"] = error_of_gkd(4, directory, temperature=temperature)
    for steps in (1, 4):
        found["GKDTrainer", f"on policy, {steps} micro-batches"] = error_of_gkd(steps, directory, on_policy=True)
    for loss in ("sigmoid", "sft"):
        for pairs, size, steps in ((8, 8, 1), (8, 2, 4), (7, 2, 4), (5, 4, 2)):
            found["DPOTrainer", f"{loss}, {pairs} pairs in {steps}"] = error_of_dpo(loss, pairs, size, steps, directory)
    found["DPOTrainer, super().compute_loss", "penalty, 4 micro-batches"] = error_of_dpo(
        "sigmoid", 8, 2, 4, directory, added(DPOTrainer)
    )
    return found


@pytest.mark.parametrize(("kind", "steps"), [("none", 1), ("none", 4), ("none", 8), ("penalty", 4), ("confidence", 4)])
def test_the_loss_of_the_models_forward_is_multiplied_by_the_accumulation(
    kind: str, steps: int, tmp_path: Path
) -> None:
    assert error_of_trainer(own_forward(Trainer), kind, "even", steps, tmp_path) == pytest.approx(steps - 1, abs=1e-5)
    assert error_of_ours(ObjectiveTrainer, kind, "ragged", steps, tmp_path) < EXACT


def test_a_loss_function_that_returns_a_mean_is_multiplied(tmp_path: Path) -> None:
    assert error_of_a_loss_function("ragged", 1, tmp_path) < EXACT
    assert error_of_a_loss_function("even", 4, tmp_path) == pytest.approx(3, abs=1e-5)


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_a_term_beside_a_right_loss_is_multiplied(base: type, tmp_path: Path) -> None:
    assert error_of_trainer(added(base), "none", "ragged", 4, tmp_path) < EXACT
    assert error_of_trainer(added(base), "confidence", "ragged", 1, tmp_path) < EXACT
    for kind in ("penalty", "confidence"):
        assert error_of_trainer(added(base), kind, "even", 4, tmp_path) > 2
    assert error_of_ours(ObjectiveSFTTrainer, "confidence", "ragged", 4, tmp_path) < EXACT


def test_dividing_by_the_accumulation_is_right_for_weights_and_full_windows_alone(tmp_path: Path) -> None:
    recipe = added(Trainer, of_arguments)
    assert error_of_trainer(recipe, "penalty", "ragged", 4, tmp_path) < EXACT
    assert error_of_trainer(recipe, "confidence", "even", 4, tmp_path) < EXACT
    assert error_of_trainer(recipe, "confidence", "ragged", 4, tmp_path) > 0.05  # a mean of means
    assert error_of_a_short_window(recipe, tmp_path) > 0.1  # half of the term
    assert error_of_a_short_window(added(Trainer), tmp_path) > 0.1  # twice


@pytest.mark.filterwarnings(*LIGHTNING)
@pytest.mark.parametrize("kind", ["none", "penalty", "confidence"])
def test_lightning_takes_a_mean_of_means(kind: str) -> None:
    assert error_of_lightning(kind, examples("even"), 4) < EXACT
    assert error_of_lightning(kind, examples("ragged"), 1) < EXACT
    assert error_of_lightning(kind, examples("ragged"), 4) > 0.1


@pytest.mark.filterwarnings(*LIGHTNING)
def test_lightning_divides_a_short_last_window_by_the_full_number(tmp_path: Path) -> None:
    even = examples("even")[:6]
    assert error_of_lightning("none", even, 2, last=2) < EXACT
    assert error_of_lightning("none", even, 4, last=2) == pytest.approx(0.5, abs=1e-5)


def test_trls_distillation_ignores_its_temperature(tmp_path: Path) -> None:
    assert error_of_gkd(4, tmp_path, temperature=1.0) < EXACT
    assert error_of_gkd(4, tmp_path, temperature=2.0) > 1


@pytest.mark.parametrize("steps", [1, 4])
def test_trls_distillation_divides_what_it_generated_by_what_it_was_given(steps: int, tmp_path: Path) -> None:
    assert error_of_gkd(steps, tmp_path, on_policy=True) > 0.3


def test_trls_preference_loss_weighs_micro_batches_alike(tmp_path: Path) -> None:
    assert error_of_dpo("sigmoid", 8, 2, 4, tmp_path) < EXACT
    assert error_of_dpo("sigmoid", 7, 2, 4, tmp_path) > 0.1  # the last pair counts twice
    assert error_of_dpo("sft", 8, 8, 1, tmp_path) < EXACT
    assert error_of_dpo("sft", 8, 2, 4, tmp_path) > 0.1  # a token mean by micro-batch


def test_what_is_wrong_in_one_trainer_is_right_in_another(tmp_path: Path) -> None:
    """DPOTrainer divides the whole loss by the accumulation, so the very line that SFTTrainer multiplies is right."""
    assert error_of_dpo("sigmoid", 8, 2, 4, tmp_path, added(DPOTrainer)) < EXACT
    assert error_of_trainer(added(SFTTrainer), "penalty", "even", 4, tmp_path) > 2


@pytest.mark.filterwarnings(*LIGHTNING)
def test_the_table(tmp_path: Path) -> None:
    found = table(tmp_path)
    ours = {case: each for (recipe, case), each in found.items() if recipe.startswith("Objective")}
    assert max(ours.values()) < EXACT
    for recipe in plain():
        assert max(each for (name, _), each in found.items() if name == recipe) > 0.1
