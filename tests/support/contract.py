"""The scaling contract as a table: every term in every trainer and case, against one big batch in float64.

`right` is the gradient of the objective {own loss, term} over the whole window, computed at once from the definitions;
`ours` takes the same optimizer step through the library, `plain` as a script does: the trainer's own loss plus the
term of the micro-batch at hand, added in `compute_loss`. Errors are ‖g - g*‖ / ‖g*‖.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pico
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from trl import DistillationConfig, DistillationTrainer, DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import solidify
from solidify import losses
from solidify.adapter import lookup
from solidify.adapter.adapters import switched_off
from solidify.model import anatomy
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.objective.capture import capture
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective
from solidify.objective.term import Term
from solidify.objective.weights import make
from solidify.training.distilling import ObjectiveDistillationTrainer
from solidify.training.preference import ObjectiveDPOTrainer
from solidify.training.sft import ObjectiveSFTTrainer
from solidify.training.trainer import ObjectiveTrainer
from training import Gradients, arguments, in_order

Gradient = dict[str, torch.Tensor]
ROWS = 8
Q = "model.layers.*.self_attn.q_proj"


@dataclass(frozen=True)
class Case:
    """How a window of eight sequences is split, and how the model is trained."""

    size: int
    lengths: str = "ragged"
    full: bool = False
    checkpointing: bool = False
    ranks: int = 1

    @property
    def steps(self) -> int:
        return ROWS // self.size // self.ranks


CASES = {
    "1 x 8": Case(8),
    "4 x 2, even": Case(2, "even"),
    "4 x 2": Case(2),
    "8 x 1": Case(1),
    "one is empty": Case(1, "empty"),
    "checkpointing": Case(2, checkpointing=True),
    "no PEFT": Case(2, full=True),
}
SPREAD = Case(2, ranks=2)


def named(name: str, **options: Any) -> Callable[[Case], Term]:
    """Makes the term anew for each use; a LoRA update is named by its target, a parameter by itself."""

    def make_term(case: Case) -> Term:
        places = {"parameters": Q + ".weight" if case.full else Q} if "parameters" in options else {}
        return Term(getattr(losses, name), name=name, arguments={**options, **places})

    return make_term


TERMS: dict[str, Callable[[Case], Term]] = {
    "next_token": named("next_token", chunk=7),
    "forward_kl": named("forward_kl"),
    "reverse_kl": named("reverse_kl", temperature=2.0),
    "jensen_shannon": named("jensen_shannon", beta=0.3),
    "hidden_match": named("hidden_match", layers="model.layers.*"),
    "output_entropy": named("output_entropy"),
    "activation_sparsity": named("activation_sparsity", modules="model.layers.*.mlp"),
    "load_balance": named("load_balance"),
    "router_z": named("router_z"),
    "router_entropy": named("router_entropy"),
    "router_mutual_information": named("router_mutual_information"),
    "kept_share": named("kept_share"),
    "trash_budget": named("trash_budget", target=0.3),
    "beta_prior": named("beta_prior", target=0.3),
    "weight_penalty, l2": named("weight_penalty"),
    "weight_penalty, l1": named("weight_penalty", norm="l1"),
    "group_lasso": named("group_lasso"),
    "orthogonality": named("orthogonality", parameters=Q),
    "spectral": named("spectral", parameters=Q),
    "l2_sp": named("l2_sp"),
}


def model(case: Case) -> Any:
    """A pico OLMoE with trash cans that are awake, in float64; its adapter is not at its start."""
    base = reference()
    solidify.replace(base, "model.layers.*.mlp", TrashCanMoE)
    torch.manual_seed(1)
    made = base
    if not case.full:
        made = solidify.attach(base, lora={"r": 4, "target_modules": [Q]}, train=["model.layers.*.mlp.trash"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and (not case.full or "trash" in name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for place in lookup.modules(made):
            if type(place.inner).__name__ == "TrashCan":
                place.inner.bias.fill_(-2.0)
    return made.train()


def examples(case: Case) -> list[dict[str, list[int]]]:
    if case.lengths == "even":
        return [{"input_ids": row, "labels": row} for row in pico.tokens(ROWS, 12).tolist()]
    rows = pico.ragged(ROWS)
    if case.lengths == "empty":
        rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    return rows


def reference() -> Any:
    """The base, which also distils where the model is trained in place, and so cannot be switched off."""
    base = pico.olmoe(dtype=torch.float64)
    base.set_experts_implementation("eager")  # no grouped product exists in float64
    return base


@cache
def weight(name: str) -> float:
    """A weight with which the term's gradient is as long as the model's."""
    case = CASES["1 x 8"]
    subject, batch = model(case), pico.collate(examples(case))
    alone = gradient(subject, value(TERMS[name](case), subject, batch, case))
    return length(gradient(subject, cross_entropy(subject, batch))) / length(alone)


@dataclass(frozen=True)
class Way:
    """A trainer, or a loop: its batches and its own loss; `script` says by which recipe it is compared."""

    name: str
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    own: Callable[[nn.Module, Mapping[str, torch.Tensor], Case], torch.Tensor]
    script: str


def objective(name: str, case: Case) -> Objective:
    term = TERMS[name](case)
    term.weight = make(weight(name))
    return Objective([Term("model"), term], reference=reference() if case.full and term.asks_reference else None)


# By the definitions.


def forward(subject: nn.Module, batch: Mapping[str, torch.Tensor], **more: Any) -> Any:
    return subject(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **more)


def cross_entropy(subject: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits = forward(subject, batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def value(term: Term, subject: nn.Module, batch: Mapping[str, torch.Tensor], case: Case) -> torch.Tensor:
    """The term on one batch, as its declaration says: nothing here is the library's but the term and the hooks."""
    with capture(subject, term.captures) as seen:
        out = forward(subject, batch, output_hidden_states=True)
    head = lookup.plain_model(subject).lm_head
    supply: dict[str, Any] = {
        "model": subject,
        "inputs": batch,
        "labels": batch["labels"],
        "attention_mask": batch["attention_mask"],
        "mask": batch["attention_mask"].reshape(-1),
        "logits": out.logits,
        "hidden_states": out.hidden_states[-1],
        "head": head,
        **seen,
    }
    if term.asks_reference:
        there = reference() if case.full else subject
        off = switched_off(there)
        with torch.no_grad(), anatomy.evaluation(there), off, capture(there, term.reference_captures) as more:
            supply["reference_logits"] = forward(there, batch).logits
        supply |= more
    found = term.function(**{key: supply[key] for key in term.asks}, **term.arguments)
    if term.reduction == "statistic":
        return term.subject.value(found / batch["attention_mask"].sum())
    tokens = (batch["labels"][:, 1:] != -100).sum()
    return found / tokens if term.reduction == "token_sum" else found


def gradient(subject: nn.Module, loss: torch.Tensor) -> Gradient:
    trained = {n: p for n, p in subject.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def length(g: Gradient) -> float:
    return float(torch.stack([each.double().square().sum() for each in g.values()]).sum().sqrt())


def error(found: Gradient, expected: Gradient) -> float:
    assert set(expected) <= set(found), set(expected) - set(found)
    return length({n: found[n].double() - g for n, g in expected.items()}) / length(expected)


@cache
def right(way: str, name: str, case: Case) -> Gradient:
    """The gradient of the whole window, in one batch. `checkpointing` changes nothing of it."""
    if case.checkpointing or case.ranks > 1:
        return right(way, name, replace(case, checkpointing=False, ranks=1))
    subject, batch = model(case), WAYS[way].collate(rows_of(way, case))
    loss = WAYS[way].own(subject, batch, case) + weight(name) * value(TERMS[name](case), subject, batch, case)
    return gradient(subject, loss)


def next_token(subject: nn.Module, batch: Mapping[str, torch.Tensor], case: Case) -> torch.Tensor:
    return cross_entropy(subject, batch)


def preference(subject: nn.Module, batch: Mapping[str, torch.Tensor], case: Case) -> torch.Tensor:
    """-log σ(0.1 [log π(chosen)/π₀(chosen) - log π(rejected)/π₀(rejected)]), mean over pairs."""

    def scores(of: nn.Module) -> torch.Tensor:
        each = forward(of, batch).logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (each * (batch["labels"][:, 1:] != -100)).sum(-1)

    ours = scores(subject)
    base = ours.detach()  # the reference is the model as it is before the step; so TRL takes it of a PeftModel, too
    chosen, rejected = (ours - base).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def divergence(subject: nn.Module, batch: Mapping[str, torch.Tensor], case: Case) -> torch.Tensor:
    """The Jensen-Shannon divergence from the teacher, mean over target tokens."""
    where = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        p = forward(teacher(), batch).logits[:, :-1][where].softmax(-1)
    q = forward(subject, batch).logits[:, :-1][where].softmax(-1)
    middle = (p + q) / 2
    return ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)).mean() / 2


@cache
def teacher() -> Any:
    return pico.llama(dtype=torch.float64, initializer_range=0.3, seed=7)


def rows_of(way: str, case: Case) -> list[dict[str, Any]]:
    """The window's rows: sequences, or pairs of answers to one prompt."""
    rows = examples(case)
    if way == "GKDTrainer":
        return [{**row, "prompt": len(row["input_ids"]) // 3} for row in rows]
    if way == "DistillationTrainer":
        if case.lengths == "empty":
            return []  # an answer has at least one token
        cuts = [max(1, len(row["input_ids"]) // 3) for row in rows]
        return [{"prompt": r["input_ids"][:n], "answer": r["input_ids"][n:]} for r, n in zip(rows, cuts, strict=True)]
    if way != "DPOTrainer":
        return rows
    if case.lengths == "empty":
        return []  # an answer has at least one token
    others = pico.ragged(ROWS, seed=4) if case.lengths == "ragged" else examples(replace(case, lengths="even"))[::-1]
    return [
        {"prompt_ids": a["input_ids"][:3], "chosen_ids": a["input_ids"][3:], "rejected_ids": b["input_ids"][2:]}
        for a, b in zip(rows, others, strict=True)
    ]


def of_pairs(rows: list[Any]) -> dict[str, torch.Tensor]:
    """TRL's batch: all chosen answers, then all rejected ones; the labels that terms see are the answers."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=1)(rows)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)}


def of_prompts(rows: list[Any]) -> dict[str, torch.Tensor]:
    """TRL's batch for distillation: rows, and their prompts padded on the left."""
    prompts = [row["input_ids"][: row["prompt"]] for row in rows]
    width = max(map(len, prompts))
    return {
        **pico.collate([{key: row[key] for key in ("input_ids", "labels")} for row in rows]),
        "prompts": torch.tensor([[1] * (width - len(ids)) + ids for ids in prompts]),
        "prompt_attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


def of_answers(rows: list[Any]) -> dict[str, torch.Tensor]:
    """TRL's batch once prompts are answered, and both joined as the model takes them."""

    def padded(part: str, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(row[part]) for row in rows)
        fill = [[1] * (width - len(row[part])) for row in rows]
        mask = [[0] * len(f) + [1] * (width - len(f)) for f in fill]
        ids = [f + row[part] if left else row[part] + f for row, f in zip(rows, fill, strict=True)]
        return torch.tensor(ids), torch.tensor(mask if left else [each[::-1] for each in mask])

    (prompts, prompt_mask), (answers, answer_mask) = padded("prompt", left=True), padded("answer", left=False)
    parts = {"prompt_ids": prompts, "prompt_mask": prompt_mask}
    return joined({**parts, "completion_ids": answers, "completion_mask": answer_mask})


def joined(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    answered = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return {**batch, "input_ids": ids, "attention_mask": attended, "labels": ids.masked_fill(answered == 0, -100)}


WAYS = {
    way.name: way
    for way in (
        Way("Trainer", pico.collate, next_token, "`super().compute_loss(...) + λ term(micro-batch)`"),
        Way("SFTTrainer", pico.collate, next_token, "`super().compute_loss(...) + λ term(micro-batch)`"),
        Way("DPOTrainer", of_pairs, preference, "`super().compute_loss(...) + λ term(micro-batch)`"),
        Way("GKDTrainer", of_prompts, divergence, "`super().compute_loss(...) + λ term(micro-batch)`"),
        Way("DistillationTrainer", of_answers, divergence, "`super().compute_loss(...) + λ term(micro-batch)`"),
        Way("plain loop", pico.collate, next_token, "`(model(**batch).loss + λ term(micro-batch)) / steps`"),
        Way("Lightning", pico.collate, next_token, "the same sum, with `accumulate_grad_batches`"),
    )
}


# By a script.


def added(kind: type, name: str, case: Case) -> type:
    """The trainer's own loss and the term of the micro-batch."""

    class Script(kind):  # type: ignore[misc, valid-type]
        def compute_loss(self, subject: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(subject, dict(inputs), *args, **kwargs)
            seen = dict(inputs)
            if "prompt_ids" in seen:
                seen = joined(seen)
            elif "completion_mask" in seen:
                seen["labels"] = seen["input_ids"].masked_fill(seen["completion_mask"] == 0, -100)
            inside = subject.module if isinstance(subject, nn.parallel.DistributedDataParallel) else subject
            return loss + weight(name) * value(TERMS[name](case), inside, seen, case)

    return Script


WORDS = {"prompt": "w3", "chosen": " w4", "rejected": " w5"}


def options(way: str, case: Case, subject: Any) -> tuple[type, dict[str, Any], dict[str, Any]]:
    """The kind of arguments, their values, and what else a trainer takes."""
    values: dict[str, Any] = {}
    if case.checkpointing:
        values = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    if way == "Trainer":
        return TrainingArguments, values, {}
    values = {"activation_checkpointing": False, **values}
    if way == "DistillationTrainer":
        values |= {"beta": 0.5, "shuffle_dataset": False}
        return DistillationConfig, values, {"processing_class": tokenizer(), "teacher_model": teacher()}
    values |= {"router_aux_loss_coef": 0.0}
    more = {"processing_class": tokenizer()}
    if way == "SFTTrainer":
        return SFTConfig, {**values, "dataset_kwargs": {"skip_prepare_dataset": True}}, more
    if way == "DPOTrainer":
        return DPOConfig, values, {**more, "ref_model": deepcopy(subject) if case.full else None}
    from trl.experimental.gkd import GKDConfig

    return GKDConfig, {**values, "lmbda": 0.0, "temperature": 1.0}, {**more, "teacher_model": teacher()}


def trained(kind: type, way: str, case: Case, directory: Path, subject: Any, **more: Any) -> Gradient:
    """The gradient of one optimizer step of a trainer."""
    configuration, values, others = options(way, case, subject)
    rows: Any = rows_of(way, case)
    if way not in ("DPOTrainer", "DistillationTrainer"):
        others["data_collator"] = WAYS[way].collate
    given = rows
    if way == "DistillationTrainer":
        given = [{"prompt": " ".join(f"w{t}" for t in row["prompt"])} for row in rows]
    trainer = kind(
        model=subject,
        args=arguments(directory, case.size, case.steps, kind=configuration, **values),
        train_dataset=rows if way == "Trainer" else Dataset.from_list([WORDS] if way == "DPOTrainer" else given),
        **others,
        **more,
    )
    if way == "DPOTrainer":  # which prepares words itself
        trainer.train_dataset = Dataset.from_list(rows)
    if way == "DistillationTrainer":  # the student says what it is known to say; TRL has an order of its own
        answers = {tuple(row["prompt"]): row["answer"] for row in rows}
        trainer._generate_single_turn = lambda prompts, *rest: [answers[tuple(ids)] for ids in prompts]
    else:
        in_order(trainer)
    watch = Gradients(subject)
    trainer.add_callback(watch)
    trainer.train()
    return watch.found


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, 128)}}
    made = Tokenizer(WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def batches(case: Case) -> list[dict[str, torch.Tensor]]:
    rows = examples(case)
    return [pico.collate(rows[i : i + case.size]) for i in range(0, ROWS, case.size)]


def prepared(case: Case) -> Any:
    subject = model(case)
    if case.checkpointing:
        lookup.plain_model(subject).activation_checkpointing_enable({"use_reentrant": False})
    return subject


def found_gradients(subject: nn.Module) -> Gradient:
    return {n: p.grad.clone() for n, p in subject.named_parameters() if p.grad is not None}


def loop(name: str, case: Case, ours: bool) -> Gradient:
    """A plain loop: with the engine, or dividing every micro-batch's loss by their number."""
    subject = prepared(case)
    if ours:
        engine = ObjectiveEngine(objective(name, case), subject, steps=1)
        engine.begin(batches(case))
        for batch in batches(case):
            engine.loss(batch).backward()
        engine.end()
        engine.close()
    else:
        for batch in batches(case):
            loss = subject(**batch).loss + weight(name) * value(TERMS[name](case), subject, batch, case)
            (loss / case.steps).backward()
    return found_gradients(subject)


def in_lightning(name: str, case: Case, ours: bool, directory: Path) -> Gradient:
    """A LightningModule: with the engine and manual optimization, or with accumulate_grad_batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = not ours
                self.subject = prepared(case)
                if ours:
                    self.engine = ObjectiveEngine(objective(name, case), self.subject, steps=1)

            def training_step(self, given: Any, index: int) -> Any:
                if not ours:
                    own = self.subject(**given).loss
                    return own + weight(name) * value(TERMS[name](case), self.subject, given, case)
                self.engine.begin(given)
                for batch in given:
                    self.manual_backward(self.engine.loss(batch))
                self.found = found_gradients(self.subject)
                self.optimizers().step()
                self.engine.end()
                return None

            def on_before_optimizer_step(self, optimizer: Any) -> None:
                self.found = found_gradients(self.subject)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD([p for p in self.subject.parameters() if p.requires_grad], lr=0.0)

        module = Module()
        micro = batches(case)
        data = torch.utils.data.DataLoader([micro] if ours else micro, batch_size=None)
        lightning.Trainer(
            max_steps=1,
            accumulate_grad_batches=1 if ours else case.steps,
            accelerator="cpu",
            precision="64-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
        ).fit(module, data)
    return module.found


def kinds(way: str) -> tuple[type, type]:
    """The trainer as it is, and ours."""
    if way == "GKDTrainer":
        from trl.experimental.gkd import GKDTrainer

        from solidify.training.teaching import ObjectiveGKDTrainer

        return GKDTrainer, ObjectiveGKDTrainer
    return {
        "Trainer": (Trainer, ObjectiveTrainer),
        "SFTTrainer": (SFTTrainer, ObjectiveSFTTrainer),
        "DPOTrainer": (DPOTrainer, ObjectiveDPOTrainer),
        "DistillationTrainer": (DistillationTrainer, ObjectiveDistillationTrainer),
    }[way]


def found(way: str, name: str, case: Case, directory: Path, *, ours: bool) -> Gradient:
    """One optimizer step, of the library or of a script."""
    if way == "plain loop":
        return loop(name, case, ours)
    if way == "Lightning":
        return in_lightning(name, case, ours, directory)
    script, library = kinds(way)
    subject = model(case)
    if ours:
        return trained(library, way, case, directory, subject, objective=objective(name, case))
    return trained(added(script, name, case), way, case, directory, subject)


def errors(way: str, name: str, case: Case, directory: Path) -> tuple[float, float]:
    """Ours, and the script's."""
    expected = right(way, name, case)
    ours, script = (found(way, name, case, directory, ours=which) for which in (True, False))
    return error(ours, expected), error(script, expected)


def main(directory: Path, ways: Sequence[str], names: Sequence[str]) -> None:
    """Run by torchrun: takes the steps in all processes, and writes the errors of the first."""
    lines = []
    for way in ways:
        for name in names:
            both = errors(way, name, SPREAD, directory)
            lines.append({"way": way, "term": name, "errors": both})
    if int(os.environ["RANK"]) == 0:
        (directory / "spread.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(";"), sys.argv[3].split(";"))
