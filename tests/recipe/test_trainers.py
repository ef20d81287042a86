"""Every trainer that a recipe may name: what it refuses in plan, and what a run of it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from transformers import AutoTokenizer, TrainerCallback

import solidify
from solidify.errors import DataError, ObjectiveError, RecipeError, SolidifyError
from solidify.findings import Report
from solidify.recipe import dry_run, kinds, schema, sections, stages, trainers

USER = Path(pico.__file__).parent / "user_modules"
WORDS = (
    "A list is",
    "A set is",
    "A dict maps",
    "A tuple holds",
    "A loop runs",
    "A class is",
    "A module has",
    "A file is",
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"prompt": w, "chosen": f" a thing of {n} values.", "rejected": " bad"} for n, w in enumerate(WORDS)],
    "answers": [{"prompt": w, "completion": f" has {n} values.", "label": n % 2 == 0} for n, w in enumerate(WORDS)],
    "prompts": [{"prompt": w, "answer": str(n)} for n, w in enumerate(WORDS)],
    "chats": [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": f"{n} values"}]}
        for n, w in enumerate(WORDS)
    ],
    "texts": [{"text": f"{w} a thing of {n} values"} for n, w in enumerate(WORDS)],
    "classes": [{"text": w, "label": n % 2} for n, w in enumerate(WORDS)],
}
REWARDS = """
def brevity(completion_ids, answer, **kwargs):
    # By the tokens too: a base may write answers of one length alone, and then nothing is to be learned.
    return [-float(len(set(ids))) + sum(ids) % 7 / 7 for ids in completion_ids]


def forgetful(completions):
    return [0.0 for _ in completions]


BEST = 1.0
"""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TEACHER = {"teacher": {"model": "builtin:tiny-olmoe"}}
# By trainer: the rows, fields of `training`, and sections of the recipe.
ASKED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "auto": ("texts", {}, {}),
    "sft": ("texts", {}, {}),
    "dpo": ("pairs", {"beta": 0.2}, {}),
    "kto": ("answers", {}, {}),
    "reward": ("pairs", {}, {}),
    "distill": ("prompts", {"max_completion_length": 4, "beta": 0.5}, TEACHER),
    "gkd": ("chats", {"max_new_tokens": 4, "lmbda": 0.5}, TEACHER),
    "grpo": (
        "prompts",
        {"max_completion_length": 4, "num_generations": 2, "beta": 0.1},
        {"rewards": ["rewards.py:brevity"]},
    ),
    "classification": ("classes", {}, {}),
}
TRLS = ("sft", "dpo", "kto", "reward", "distill", "gkd", "grpo")


def a_judge(directory: Path, base: Path, labels: int) -> Path:
    """A Llama that scores texts, with the tiny OLMoE's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    sizes = {**pico.SIZES, "vocab_size": 1024, "intermediate_size": 48, "num_key_value_heads": 2}
    sizes |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    target = directory / f"judge-{labels}"
    pico.make("LlamaForSequenceClassification", **sizes, num_labels=labels).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def written(directory: Path, base: Path, trainer: str, /, **changes: Any) -> schema.Recipe:
    """Writes a recipe for a trainer, with all that it names, and reads it."""
    for name, rows in ROWS.items():
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "rewards.py").write_text(REWARDS)
    rows, training, sections = ASKED[trainer]
    target, expect = "model.layers.*.mlp", "OlmoeSparseMoeBlock"
    if trainer in ("reward", "classification"):
        base, expect = a_judge(directory, base, 1 if trainer == "reward" else 2), "LlamaMLP"
    file = changes.pop("rows", rows)
    document = {
        "base": {"model": str(base)},
        "trainer": trainer,
        "surgery": [{"replace": target, "expect": expect, "with": f"{USER}/wrappers.py:Scaled"}],
        "adapter": {
            "lora": {"r": 2, "target_modules": ["model.layers.*.self_attn.q_proj"]},
            "train": ["model.layers.*.mlp.scale"],
        },
        "objective": [{"loss": "model"}, {"loss": "solidify.losses:weight_penalty", "weight": 0.1}],
        "data": {"train": f"{file}.jsonl", "eval": f"{file}.jsonl", "max_length": 32, **changes.pop("data", {})},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            **({"bf16": False} if trainer in TRLS else {}),
            **training,
            **(changes.pop("training", None) or {}),
        },
        **sections,
        **changes,
    }
    if trainer == "gkd":
        document["data"]["chat_template"] = TEMPLATE
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return schema.load(path)


@pytest.mark.parametrize("trainer", ASKED)
def test_a_plan_says_which_trainer_and_what_its_rows_are(tiny_base: Path, tmp_path: Path, trainer: str) -> None:
    plan = dry_run.plan(written(tmp_path, tiny_base, trainer))
    names = {
        "auto": ("ObjectiveTrainer", "text"),
        "sft": ("ObjectiveSFTTrainer", "text"),
        "dpo": ("ObjectiveDPOTrainer", "preference"),
        "kto": ("ObjectiveKTOTrainer", "unpaired_preference"),
        "reward": ("ObjectiveRewardTrainer", "preference"),
        "distill": ("ObjectiveDistillationTrainer", "prompts"),
        "gkd": ("ObjectiveGKDTrainer", "messages"),
        "grpo": ("ObjectiveGRPOTrainer", "prompts"),
        "classification": ("ObjectiveTrainer", "classification"),
    }
    assert plan.data is not None
    assert (plan.trainer, plan.data["format"]) == names[trainer]
    assert not (tmp_path / "nowhere").exists()


def test_healing_that_reads_rows_of_preference_is_what_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    heal = {"align": {"max_steps": 1}}
    for trainer, form in (("dpo", "preference"), ("distill", "prompts")):
        with pytest.raises(
            RecipeError, match=rf"heal: healing reads the rows .* cannot learn from {form}.*; heal in a"
        ):
            dry_run.plan(written(tmp_path, tiny_base, trainer, heal=heal))
    assert dry_run.plan(written(tmp_path, tiny_base, "sft", heal=heal)).heal is not None


REFUSED: dict[str, tuple[str, dict[str, Any], type[SolidifyError], str]] = {
    "a field of another trainer": (
        *("dpo", {"training": {"num_generations": 2}}, RecipeError),
        r"training.num_generations is not a field of DPOConfig \(trainer: dpo\); it is one of trainer: grpo",
    ),
    "a misspelt field": ("dpo", {"training": {"betta": 0.1}}, RecipeError, r"did you mean 'beta'\?"),
    "rows of another kind": (
        *("dpo", {"rows": "texts"}, DataError),
        r"data.train has the columns text, but trainer: dpo learns from preference \(chosen, rejected\): which of two",
    ),
    "prompts that are not there": (
        *("grpo", {"rows": "texts"}, DataError),
        r"has the columns text, but trainer: grpo learns from prompts \(prompt\)",
    ),
    "another format": ("kto", {"data": {"format": "text"}}, RecipeError, "data.format is text, but trainer: kto"),
    "packing": ("dpo", {"data": {"packing": True}}, RecipeError, "which trainer: dpo has none of"),
    "images": ("dpo", {"data": {"image": "picture"}}, RecipeError, "trainer: dpo reads text alone in a recipe"),
    "no template": ("distill", {"rows": "chats"}, DataError, "has the columns messages, but trainer: distill"),
    "a head without a score": (
        *("reward", {"base": {"model": "builtin:tiny-olmoe"}}, DataError),
        "trainer: reward teaches a model that gives a text one score, and OlmoeForCausalLM gives none",
    ),
    "a head that classifies nothing": (
        *("classification", {"base": {"model": "builtin:tiny-olmoe"}}, DataError),
        "trainer: classification teaches heads that classify texts, tokens or images, and OlmoeForCausalLM is none",
    ),
    "a reward that is no function": (
        *("grpo", {"rewards": ["rewards.py:BEST"]}, RecipeError),
        "rewards.py:BEST is of type float; a reward is a function",
    ),
    "a reward that takes too little": (
        *("grpo", {"rewards": ["rewards.py:forgetful"]}, RecipeError),
        r"rewards.py:forgetful cannot be called \(.*\): by name it is given prompts, completions, .*answer",
    ),
    "a reward that is not there": ("grpo", {"rewards": ["rewards.py:none"]}, RecipeError, "defines no 'none'"),
    "a loss that depends on the split": (
        *("dpo", {"training": {"loss_type": ["aot"]}}, ObjectiveError),
        "ObjectiveDPOTrainer cannot train like this: .*'aot' sorts the pairs",
    ),
    "an auxiliary loss": (
        *("grpo", {"training": {"router_aux_loss_coef": 0.01}}, ObjectiveError),
        "router_aux_loss_coef is 0.01: TRL adds the auxiliary loss of each micro-batch by itself",
    ),
    "a batch of one for KTO": (
        *("kto", {"training": {"per_device_train_batch_size": 1}}, ObjectiveError),
        "KTO's divergence needs the answers of other rows of a batch",
    ),
    "an evaluation that does not fit": (
        *("grpo", {"training": {"per_device_eval_batch_size": 3}}, ObjectiveError),
        "per_device_eval_batch_size is 3, in which prompts with 2 answers each do not fit evenly",
    ),
    "labels for a score": (
        "reward",
        {"objective": [{"loss": "model"}, {"loss": "solidify.losses:output_entropy"}]},
        ObjectiveError,
        "the term output_entropy asks for labels, but a reward model predicts no tokens",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_in_plan(tiny_base: Path, tmp_path: Path, what: str) -> None:
    trainer, changes, kind, words = REFUSED[what]
    if changes.get("base"):
        changes = {
            **changes,
            "surgery": [
                {"replace": "model.layers.*.mlp", "expect": "OlmoeSparseMoeBlock", "with": f"{USER}/wrappers.py:Scaled"}
            ],
        }
    with pytest.raises(kind, match=words):
        dry_run.plan(written(tmp_path, tiny_base, trainer, **changes))


INVALID: dict[str, tuple[str, dict[str, Any], str]] = {
    "no teacher": ("distill", {"teacher": None}, "`trainer: distill` learns from a second model"),
    "no rewards": ("grpo", {"rewards": None}, "`trainer: grpo` raises what reward functions return"),
    "rewards for nobody": ("dpo", {"rewards": ["rewards.py:brevity"]}, "`rewards` are what `trainer: grpo` raises"),
    "a reference for nobody": (
        *("sft", {"reference": {"model": "builtin:tiny-olmoe"}}),
        "`reference` is what dpo and kto compare with, but the trainer is 'sft'",
    ),
    "nothing to train": (
        "dpo",
        {"adapter": None, "heal": {"align": {}}},
        "needs an `adapter` that says what is trained",
    ),
    "an unknown trainer": ("dpo", {"trainer": "ppo"}, "trainer: .*'grpo'"),
}


@pytest.mark.parametrize("what", INVALID)
def test_a_recipe_that_contradicts_itself_is_refused_when_it_is_read(
    tiny_base: Path, tmp_path: Path, what: str
) -> None:
    trainer, changes, words = INVALID[what]
    with pytest.raises(RecipeError, match=words):
        written(tmp_path, tiny_base, trainer, **changes)


def test_rows_that_another_trainer_reads_name_it(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="such rows are read by trainer: dpo or kto or reward"):
        dry_run.plan(written(tmp_path, tiny_base, "auto", rows="pairs"))


def test_conversations_need_a_template(tiny_base: Path, tmp_path: Path) -> None:
    made = written(tmp_path, tiny_base, "gkd")
    assert made.data is not None
    plain = made.model_copy(update={"data": made.data.model_copy(update={"chat_template": None})})
    with pytest.raises(DataError, match="the rows are conversations, and the tokenizer has no chat template"):
        dry_run.plan(plain)


class Gradients(TrainerCallback):
    """Keeps the largest numbers of each step's gradients."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.found: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.found += [float(p.grad.norm()) for _, p in sorted(self.model.named_parameters()) if p.grad is not None]


@pytest.mark.parametrize("trainer", ["sft", "dpo", "kto", "reward", "distill", "grpo"])
def test_the_model_term_alone_is_trls_own_trainer(tiny_base: Path, tmp_path: Path, trainer: str) -> None:
    """Three steps on the same rows, by a recipe's trainer and by TRL's of the same settings."""
    settings = {"max_steps": 3, "activation_checkpointing": False, "logging_steps": 1}
    recipe = written(tmp_path, tiny_base, trainer, objective=[{"loss": "model"}], training=settings)
    kind = kinds.find(recipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base.model)

    def taken(make: Callable[[Any], Any]) -> tuple[list[float], list[float]]:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        auto = AutoModelForSequenceClassification if trainer == "reward" else AutoModelForCausalLM
        torch.manual_seed(1)
        model = solidify.attach(auto.from_pretrained(recipe.base.model), lora={"r": 2, "target_modules": ["**.q_proj"]})
        made = make(model)
        watch = Gradients(model)
        made.add_callback(watch)
        made.train()
        return watch.found, [log["loss"] for log in made.state.log_history if "loss" in log]

    def plain(model: Any) -> Any:
        rows = kinds.read_rows(kind, recipe) if kind.takes_rows else trainers.datasets.read_texts(recipe)
        more: dict[str, Any] = {}
        if trainer == "distill":
            from transformers import AutoModelForCausalLM

            more = {"teacher_model": AutoModelForCausalLM.from_pretrained(tiny_base)}
        elif trainer == "grpo":
            more = {"reward_funcs": kinds.find_rewards(recipe)}
        trls = next(each for each in kind.trainer.__mro__ if each.__module__.startswith("trl."))
        arguments = trainers.training_arguments(recipe, tmp_path / "plain")
        return trls(model=model, args=arguments, train_dataset=rows[0], processing_class=tokenizer, **more)

    ours = taken(lambda model: trainers.make_trainer(recipe, tmp_path / "ours", model, tokenizer)[0])
    theirs = taken(plain)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5, abs=1e-7) and len(ours[1]) == 3
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3, abs=1e-6) and any(ours[0])


def test_partners_are_those_that_the_recipe_names(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    recipe = written(
        tmp_path, tiny_base, "dpo", reference={"model": "builtin:tiny-olmoe"}, objective=[{"loss": "model"}]
    )
    model = solidify.attach(AutoModelForCausalLM.from_pretrained(tiny_base), lora={"target_modules": ["**.q_proj"]})
    trainer, _ = trainers.make_trainer(recipe, tmp_path, model, tokenizer)
    assert trainer.ref_model is not None and "ref" not in model.peft_config
    other = pico.olmoe()
    other.save_pretrained(tmp_path / "other")
    for trainer_name, partner in (("dpo", "reference"), ("distill", "teacher")):
        with pytest.raises(ObjectiveError, match="vocabulary has 1024 tokens and the reference's 128"):
            dry_run.plan(written(tmp_path, tiny_base, trainer_name, **{partner: {"model": "other"}}))


def ran(recipe: schema.Recipe, directory: Path, **more: Any) -> Report:
    report = stages.run(recipe, directory, **more)
    assert not report.failed
    return report


# One by one they take too long: one is run each time, and the blocks of docs/trainers.md are.
FAST = ("dpo",)


@pytest.mark.parametrize("trainer", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in ASKED])
def test_a_run_ends_with_a_report_and_is_not_repeated(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    pico.unwitnessed(monkeypatch)
    recipe = written(tmp_path, tiny_base, trainer, training={"save_strategy": "steps", "save_steps": 1})
    report = ran(recipe, tmp_path / "out")
    history = report.measured["history"]
    assert len(history) == 2 and {"term/model", "term/weight_penalty"} <= set(history[0])
    split = next(f for f in report.findings if f.name == "gradient does not depend on accumulation")
    assert split.verdict == ("not looked at" if trainer in ("distill", "gkd", "grpo") else "proved")
    own = ("heldout_loss_artifact", "heldout_loss_trained")
    if trainer in ("auto", "sft", "classification", "reward"):
        assert all(report.measured[name] > 0 for name in own)
    added = {"dpo": "rewards/margins", "kto": "kl", "reward": "accuracy", "grpo": "reward", "distill": "entropy"}
    if trainer in added:  # what TRL says of it, in training and of the held-out rows
        assert added[trainer] in history[-1] and f"eval_{added[trainer]}" in report.measured
    for part in ("artifact", "adapter", "merged"):
        assert (tmp_path / "out" / part / "solidify.json").is_file()
    before = (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    ran(recipe, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two steps is done, the adapter is gone: the second step is that of an uninterrupted run."""
    from safetensors.torch import load_file

    pico.unwitnessed(monkeypatch)
    recipe = written(tmp_path, tiny_base, "kto", training={"save_strategy": "steps", "save_steps": 1})
    ran(recipe, tmp_path / "out")
    whole = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    import shutil

    for part in ("adapter", "merged", "checkpoints/checkpoint-2"):
        shutil.rmtree(tmp_path / "out" / part)
    report = ran(recipe, tmp_path / "out", resume=True)
    resumed = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(report.measured["history"]) == 2
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_rows_that_are_too_long_are_counted(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification

    recipe = written(tmp_path, tiny_base, "reward")
    long = {"prompt": "A list", "chosen": " is a list" * 40, "rejected": " no"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in [*ROWS["pairs"], long]))
    model = AutoModelForSequenceClassification.from_pretrained(recipe.base.model)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base.model)
    adapted = solidify.attach(model, lora={"r": 2, "target_modules": ["**.q_proj"]})
    recipe = recipe.model_copy(update={"objective": [sections.Term(loss="model")]})
    _, examples = trainers.make_trainer(recipe, tmp_path, adapted, tokenizer)
    assert len(examples) == 8
    assert "1 of 9 rows are longer than max_length and left out" in "".join(capsys.readouterr())
    (tmp_path / "pairs.jsonl").write_text(json.dumps(long))
    with pytest.raises(DataError, match="1 of 1 rows are longer than max_length and left out, so nothing is left"):
        trainers.make_trainer(recipe, tmp_path, adapted, tokenizer)
