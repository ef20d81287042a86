"""The engine outside of any trainer: a plain loop, a LightningModule, torch.compile; and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective import internals
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective
from solidify.objective.term import Term
from solidify.objective.weights import Constraint
from solidify.objective.window import windows
from training import LORA, awake, distance, entropy, everything, step

LABELLED = ("AutoModelForCausalLM", "AutoModelForMaskedLM")
TOLERANCE = 5e-6  # float32 sums in another order


def penalty(model: nn.Module) -> torch.Tensor:
    return sum(p.float().square().sum() for p in model.parameters() if p.requires_grad)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain_loop(
    model: nn.Module, terms: Callable[[], Sequence[Term]], size: int, examples: Sequence[Any] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float], ObjectiveEngine]:
    """One optimizer step of a loop that anyone could write."""
    engine = ObjectiveEngine(Objective(terms()), model, steps=1)
    model.train()
    loader = DataLoader(list(examples or pico.ragged(8)), batch_size=size, collate_fn=pico.collate)
    for window in windows(loader, 8 // size):
        engine.begin(window)
        for batch in window:
            engine.loss(batch).backward()
        logs = engine.end()
    engine.close()
    return gradients(model), logs, engine


def test_a_plain_loop_has_the_trainers_gradients(trash_artifact: Path, tmp_path: Path) -> None:
    theirs, trainer = step(awake(trash_artifact), tmp_path, 4, 2, everything)
    for size in (8, 4, 1):
        ours, logs, _ = plain_loop(awake(trash_artifact), everything, size)
        assert distance(theirs, ours) < TOLERANCE
        for key, value in logs.items():
            assert value == pytest.approx(trainer.history[-1][key], rel=1e-5, abs=1e-7), key


def test_what_a_plain_loop_usually_does_is_off(trash_artifact: Path) -> None:
    """The usual loop divides each micro-batch's loss by their number; tokens of short rows then count more."""
    whole, _, _ = plain_loop(awake(trash_artifact), lambda: [Term("model")], 8)
    model = awake(trash_artifact)
    model.train()
    for row in pico.ragged(8):
        (model(**pico.collate([row])).loss / 8).backward()
    assert distance(whole, gradients(model)) > 0.02


class Unshifted(LlamaForCausalLM):
    """A user's own loss, of labels that stand where they are predicted."""

    def forward(self, input_ids: Any = None, labels: Any = None, **more: Any) -> Any:  # type: ignore[override]
        outputs = super().forward(input_ids=input_ids, **more)
        if labels is not None:
            outputs.loss = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


def made(family: str) -> Any:
    return Unshifted(pico.llama().config) if family == "own" else families.tiny(family)


@pytest.mark.parametrize("family", ["gpt2", "openai-gpt", "ctrl", "xlnet", "llama", "bart", "own"])
def test_a_family_is_counted_as_its_own_loss_counts(family: str) -> None:
    """Some name no loss, shift all the same, or do not: the gradient is that of one batch, for any split."""
    model = made(family)
    labels = torch.full((2, 8), -100)
    labels[:, 0] = 5
    alone = model.eval()(input_ids=torch.randint(3, 20, (2, 8)), labels=labels).loss
    assert internals.shifts_labels(model) == bool(torch.isnan(alone) or alone == 0)  # no label is left to predict
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in key or isinstance(module, nn.Dropout)):
                setattr(module, key, 0.0)
    rows = [
        {"input_ids": [4, 9, 7, 5], "labels": [4, 9, 7, 5]},
        {"input_ids": list(range(3, 12)), "labels": [-100, *range(4, 12)]},
    ]
    found = []
    for size in (2, 1):
        model.zero_grad()
        engine = ObjectiveEngine(Objective([Term("model")]), model.double(), steps=1)
        model.train()
        for window in windows(DataLoader(rows, batch_size=size, collate_fn=pico.collate), 2 // size):
            engine.begin(window)
            for batch in window:
                engine.loss(batch).backward()
            engine.end()
        engine.close()
        found.append(gradients(model))
    assert distance(*found) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("family", "auto"), [case for case in families.cases() if case[1] in LABELLED])
def test_every_family_shifts_as_is_said(family: str, auto: str) -> None:
    """One label at the first position: a loss that shifts has none left."""
    model = families.tiny(family, auto).eval()
    ids = torch.randint(3, 20, (2, 8))
    try:
        loss = model(input_ids=ids, labels=torch.full_like(ids, -100).index_copy(1, torch.tensor([0]), ids[:, :1])).loss
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        pytest.skip(f"it asks for more: {str(error)[:80]}")
    if loss is None:
        pytest.skip("it computes no loss")
    assert internals.shifts_labels(model) == bool(torch.isnan(loss) or loss == 0)


def test_empty_micro_batches_count_nothing_in_a_plain_loop(trash_artifact: Path) -> None:
    examples = pico.ragged(8)
    examples[3]["labels"] = [-100] * len(examples[3]["labels"])
    whole, first, _ = plain_loop(awake(trash_artifact), everything, 8, examples)
    split, second, _ = plain_loop(awake(trash_artifact), everything, 1, examples)
    assert distance(whole, split) < TOLERANCE
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def test_a_lightning_module_has_the_same_gradients(trash_artifact: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lightning's own imports
        import lightning

    class Module(lightning.LightningModule):
        automatic_optimization = False  # the engine knows the window; Lightning would divide by the number of batches

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.engine = ObjectiveEngine(Objective(everything()), model, steps=1)

        def training_step(self, window: list[Any], index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.engine.begin(window)
            for batch in window:
                self.manual_backward(self.engine.loss(batch))
            self.found = gradients(self.model)
            optimizer.step()
            self.log_dict(self.engine.end())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)

    theirs, _ = step(awake(trash_artifact), tmp_path, 4, 2, everything)
    module = Module(awake(trash_artifact))
    micro = [pico.collate(pico.ragged(8)[i : i + 2]) for i in range(0, 8, 2)]
    loader = DataLoader([micro], batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning notes the number of workers, and that there is no logger
        lightning.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(module, loader)
    assert distance(theirs, module.found) < TOLERANCE


def test_a_lightning_training_goes_on_from_its_checkpoint(trash_artifact: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning

    class Module(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.model = awake(trash_artifact)
            held = Term(losses.kept_share, Constraint(0.4, "equal", rate=0.1), name="kept")
            self.engine = ObjectiveEngine(Objective([Term("model"), held]), self.model, steps=4)

        def training_step(self, window: list[Any], index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.engine.begin(window)
            for batch in window:
                self.manual_backward(self.engine.loss(batch))
            optimizer.step()
            self.log_dict(self.engine.end())

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["objective"] = self.engine.state_dict()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.engine.load_state_dict(checkpoint["objective"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

    # The same window in every step: cut within an epoch, Lightning reads a plain loader from its beginning again.
    micro = [pico.collate(pico.ragged(8)[i : i + 2]) for i in range(0, 8, 2)] * 4

    def fit(steps: int, checkpoint: Path | None = None) -> tuple[Module, Any]:
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        loader = DataLoader(list(windows(micro, 4)), batch_size=None)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return module, trainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, _ = fit(4)
        _, cut = fit(2)
        cut.save_checkpoint(tmp_path / "cut.ckpt")
        again, _ = fit(4, tmp_path / "cut.ckpt")
    ours, theirs = (vars(module.engine.objective.terms[1].weight) for module in (again, whole))
    assert ours == theirs and ours["multiplier"] != 0
    assert again.engine.step == 4
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_same_gradients(trash_artifact: Path, tmp_path: Path, backend: str) -> None:
    torch._dynamo.reset()
    terms = lambda: [Term("model"), Term(losses.load_balance), Term(losses.router_z, 0.1)]  # noqa: E731
    plain, _ = step(awake(trash_artifact), tmp_path, 4, 2, terms)
    compiled, trainer = step(
        awake(trash_artifact), tmp_path, 4, 2, terms, torch_compile=True, torch_compile_backend=backend
    )
    assert distance(plain, {name.removeprefix("_orig_mod."): g for name, g in compiled.items()}) < TOLERANCE
    assert {row.gradient for row in trainer.engine.sanity.rows} == {None}  # a compiled graph is used up at once
    torch._dynamo.reset()


def test_the_first_step_says_what_each_term_is(trash_artifact: Path, tmp_path: Path) -> None:
    _, trainer = step(awake(trash_artifact), tmp_path, 8, 1, everything)
    sanity, logs = trainer.engine.sanity, trainer.history[-1]
    assert [row.name for row in sanity.rows] == [term.name for term in trainer.objective.terms]
    for row in sanity.rows:  # one micro-batch is the whole window
        assert row.value == pytest.approx(logs[f"term/{row.name}"], rel=1e-6)
        assert row.weighted == pytest.approx(logs[f"weighted/{row.name}"], rel=1e-6)
    alone, _, _ = plain_loop(awake(trash_artifact), lambda: [Term(losses.weight_penalty, 0.1)], 8)
    norm = torch.cat([g.flatten() for g in alone.values()]).norm()
    assert next(r for r in sanity.rows if r.name == "WeightPenalty").gradient == pytest.approx(float(norm), rel=1e-5)
    assert sanity.silent == []


def test_a_term_without_a_gradient_yet_is_looked_at_again(trash_artifact: Path) -> None:
    model = solidify.attach(solidify.load(trash_artifact), lora=LORA)
    engine = ObjectiveEngine(Objective([Term("model"), Term(losses.forward_kl)]), model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batch = pico.collate(pico.ragged(4))
    for number in range(3):
        engine.begin([batch])
        engine.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.end()
        # At the start the model is the base: the divergence and its gradient are zero.
        assert engine.sanity.silent == (["ForwardKL"] if number == 0 else [])


def detached(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return entropy(logits.detach(), labels)


def broken(logits: torch.Tensor) -> torch.Tensor:
    return (logits - logits.max()).log().mean()


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (lambda: [Term("model"), Term(detached)], "detached does not depend on anything that is trained"),
        (lambda: [Term("model"), Term(broken)], r"not finite in step 1: broken is (-inf|nan)"),
    ],
)
def test_terms_that_teach_nothing_are_refused(trash_artifact: Path, terms: Any, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        plain_loop(awake(trash_artifact), terms, 4)


def test_a_term_may_be_logged_only(trash_artifact: Path) -> None:
    _, logs, _ = plain_loop(awake(trash_artifact), lambda: [Term("model"), Term(detached, 0.0)], 4)
    assert logs["term/detached"] > 4
    assert logs["weighted/detached"] == 0


def test_a_batch_without_labels_has_no_loss_of_the_models(trash_artifact: Path) -> None:
    engine = ObjectiveEngine(Objective([Term("model")]), awake(trash_artifact))
    with pytest.raises(ObjectiveError, match="has no labels, so there is no loss"):
        engine.loss({"input_ids": pico.tokens()})


def test_a_statistic_of_each_micro_batch_depends_on_the_split_and_needs_no_second_pass(trash_artifact: Path) -> None:
    def terms(statistics: str) -> Callable[[], list[Term]]:
        return lambda: [Term("model", 0.0), Term(losses.load_balance, statistics=statistics)]

    whole, _, _ = plain_loop(awake(trash_artifact), terms("micro_batch"), 8)
    split, _, _ = plain_loop(awake(trash_artifact), terms("micro_batch"), 1)
    assert distance(whole, split) > 1e-3
    assert not any(term.needs_prepass for term in terms("micro_batch")())
    with pytest.raises(ObjectiveError, match="'window' or 'micro_batch'"):
        Term(losses.load_balance, statistics="global")


def test_labels_that_are_all_masked_are_told_before_the_first_step() -> None:
    engine = ObjectiveEngine(Objective([Term("model")]), pico.olmoe())
    batch = {"input_ids": torch.randint(3, 60, (2, 8)), "labels": torch.full((2, 8), -100)}
    with pytest.raises(ObjectiveError, match=r"every label is -100 \(masked\), so there is nothing to learn from"):
        engine.begin([batch, batch])
    engine.begin([batch, {**batch, "labels": batch["input_ids"]}])
