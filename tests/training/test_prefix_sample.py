"""Of what `cache_prefix` reads a sample is computed again: what nobody foresaw ends the training, and disturbs none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from frozen import Around, batches, both, put, small, train
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback, set_seed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import solidify
from solidify.errors import ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.prefix.sample import Sample
from solidify.training.trainer import ObjectiveTrainer
from training import arguments

Change = Callable[[pytest.MonkeyPatch], None]
SAID = r"model\.layers \(its first 3 layers\) returns something else than what was read for the same batch.* since {}, "
SAID += "where both were last found equal.*: train without cache_prefix"


class OfEnvironment(Around):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * float(os.getenv("SOLIDIFY_TEST_BY", "1"))


def change_rotary(patch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.apply_rotary_pos_emb
    patch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda *args, **kwargs: [2 * part for part in own(*args, **kwargs)]
    )


def change_activation(patch: pytest.MonkeyPatch) -> None:
    own = functional.silu
    patch.setattr(functional, "silu", lambda *args, **kwargs: own(*args, **kwargs) * 3)


def change_attention(patch: pytest.MonkeyPatch) -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args: Any, **kwargs: Any) -> Any:
        found, weights = own(*args, **kwargs)
        return found * 3, weights

    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)


UNSEEN: dict[str, Change] = {
    "the environment": lambda patch: patch.setenv("SOLIDIFY_TEST_BY", "3"),
    "a function of transformers": change_rotary,
    "a function of PyTorch": change_activation,
    "an entry of a table of transformers": change_attention,
}
# Six steps over two batches: after the first, before the last epoch, and before the last step, which is no first one.
SINCE = {0: "the first batch", 2: "read 1", 4: "read 3"}


@pytest.mark.parametrize("after", SINCE)
@pytest.mark.parametrize("what", UNSEEN)
def test_what_changes_unseen_ends_the_training(what: str, after: int, tmp_path: Path) -> None:
    model = small(put(OfEnvironment, 0))
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ObjectiveError, match=SAID.format(SINCE[after])),
        solidify.cache_prefix(model, tmp_path / "kept", keep=True),
    ):
        train(model, lambda _: UNSEEN[what](patch), after)
    assert not (tmp_path / "kept").exists()


def test_what_does_not_change_is_found_equal(tmp_path: Path) -> None:
    plain, found, cached = both(tmp_path / "kept", put(OfEnvironment, 0))
    assert found == plain
    assert (cached.computed, cached.read, cached.compared) == (2, 4, 3)  # two first of an epoch, and the last


def test_a_change_after_the_last_read_of_a_block_is_told(tmp_path: Path) -> None:
    """Whether it came before that read, nobody knows by then."""
    model = small(put(OfEnvironment, 0))
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ObjectiveError, match="returns something else"),
        solidify.cache_prefix(model, tmp_path / "kept"),
    ):
        train(model, lambda _: UNSEEN["the environment"](patch), 5)


def test_one_read_in_many_is_chosen() -> None:
    for size, epochs, expected in ((1, 100, 10), (2, 3, 2), (10, 10, 8), (50, 10, 12), (1000, 3, 22)):
        sample = Sample()
        chosen = [sample.choose("a", str(number)) for _ in range(epochs - 1) for number in range(size)]
        assert chosen[0]
        assert sum(chosen) == expected
        assert sum(chosen) <= 8 + 0.035 * len(chosen)
    sample = Sample()
    assert [sample.choose(kind, "x") for kind in "ab"] == [True, True]


class Drawing(Around):
    """Draws random numbers, behind the prefix, and counts its passes."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean += 1
        return super().forward(hidden_states) * (1 + torch.rand(()) / 10 + self.calls / 100)


def test_a_comparison_disturbs_nothing(tmp_path: Path) -> None:
    plain, model = train(small(put(Drawing, 3))), small(put(Drawing, 3))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    torch.manual_seed(2)
    found, seen = [], list[Any]()
    data = batches(2)
    torch.manual_seed(2)
    model.model.layers[3].register_forward_hook(lambda *_: seen.append(1))
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        for step in range(6):
            loss = model(**data[step % 2]).loss
            loss.backward()
            count, grads = len(seen), [p.grad.clone() for p in model.model.layers[3].self_attn.parameters()]
            moved = model.model.layers[3].mlp.calls, float(model.model.layers[3].mlp.mean), torch.get_rng_state()
            model.eval()
            cached.compare_last()
            assert not model.training
            model.train()
            assert len(seen) == count
            assert all(
                torch.equal(a, b.grad) for a, b in zip(grads, model.model.layers[3].self_attn.parameters(), strict=True)
            )
            assert moved[:2] == (model.model.layers[3].mlp.calls, float(model.model.layers[3].mlp.mean))
            assert torch.equal(moved[2], torch.get_rng_state())
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
    assert found == plain
    assert (cached.read, cached.compared) == (4, 4)


def test_the_last_batch_runs_again_in_its_own_precision(tmp_path: Path) -> None:
    model = small()
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        for step in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                model(**batches(2)[step % 2]).loss.backward()
        with torch.inference_mode():
            cached.compare_last()
    assert (cached.read, cached.compared) == (4, 3)


def test_a_batch_whose_settings_are_gone_is_no_false_alarm_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        for step in range(6):
            with sdpa_kernel(SDPBackend.MATH):
                model(**batches(2)[step % 2]).loss.backward()
    assert (cached.computed, cached.read, cached.compared, cached.left_out) == (2, 4, 2, 1)
    assert "could not be computed again" in capsys.readouterr().err


def test_a_batch_whose_tensors_hold_the_next_one_is_compared(tmp_path: Path) -> None:
    model, given = small(put(OfEnvironment, 0)), batches(2)
    held = {key: tensor.clone() for key, tensor in given[0].items()}
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ObjectiveError, match="returns something else"),
        solidify.cache_prefix(model, tmp_path / "kept"),
    ):
        for step in range(6):
            patch.setenv("SOLIDIFY_TEST_BY", "3" if step == 5 else "1")
            for key, tensor in given[step % 2].items():
                held[key].copy_(tensor)
            model(**held).loss.backward()
        held["input_ids"].fill_(5)


def ask_for_a_cache(model: Any) -> None:
    model.config.use_cache = True


def look_inside(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def set_attribute(model: Any) -> None:
    model.model.layers[0].mlp.calls = 5


def let_all_learn(model: Any) -> None:
    model.requires_grad_(True)


@pytest.mark.parametrize("act", [ask_for_a_cache, look_inside, set_attribute, let_all_learn])
def test_what_is_done_openly_after_the_last_read_is_no_false_alarm(act: Callable[[Any], None], tmp_path: Path) -> None:
    plain, found, cached = both(tmp_path / "kept", put(OfEnvironment, 0), act, 5)
    assert found == plain
    assert (cached.computed, cached.read, cached.left_out) == (2, 4, 1)


class Act(TrainerCallback):
    """Changes the environment at an event of a trainer, once it has come a number of times."""

    def __init__(self, event: str, times: int) -> None:
        self.left = times
        setattr(self, event, self.act)

    def act(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if not self.left:
            os.environ["SOLIDIFY_TEST_BY"] = "3"


def trainer(directory: Path, *, cached: bool = True, act: Act | None = None) -> ObjectiveTrainer:
    """Three epochs of four micro-batches, two to a step; a checkpoint after each step, an evaluation after each epoch,
    of three batches."""
    set_seed(0)
    model = pico.llama(num_hidden_layers=4)
    model.config.use_cache = False
    put(OfEnvironment, 0)(model)
    adapted: Any = solidify.attach(model, lora={"r": 4, "target_modules": ["model.layers.3.self_attn.q_proj"]})
    settings = {"max_steps": 6, "learning_rate": 0.01, "eval_strategy": "epoch", "save_strategy": "steps"}
    made = ObjectiveTrainer(
        model=adapted,
        args=arguments(directory, 2, 2, train_sampling_strategy="sequential", save_steps=1, **settings),
        eval_dataset=pico.ragged(24, seed=5),
        train_dataset=pico.ragged(8),
        data_collator=pico.collate,
        objective=Objective([Term("model")]),
        cache_prefix=cached,
    )
    if act is not None:
        made.add_callback(act)
    return made


def figures(made: ObjectiveTrainer) -> list[float]:
    return [each[key] for each in made.state.log_history for key in ("loss", "eval_loss") if key in each]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLIDIFY_TEST_BY", "1")


@pytest.mark.usefixtures("environment")
def test_a_trainer_compares_and_says_how_much(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", cached=False)
    plain.train()
    for number, act in enumerate((None, Act("on_train_end", 1))):  # when all is read, a change does no harm
        made = trainer(tmp_path / str(number), act=act)
        made.train()
        assert figures(made) == figures(plain)
        expected, found = plain.model.state_dict(), made.model.state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert [finding.verdict for finding in made.prefix_findings] == ["measured"]
    assert os.environ["SOLIDIFY_TEST_BY"] == "3"
    assert made.prefix is None


@pytest.mark.usefixtures("environment")
def test_a_change_between_two_micro_batches_keeps_the_checkpoint_from_being_written(tmp_path: Path) -> None:
    made = trainer(tmp_path, act=Act("on_substep_end", 4))  # in step 4; its second micro-batch is no first one
    with pytest.raises(ObjectiveError, match=SAID.format("step 3")):
        made.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert made.prefix is None
    assert made.prefix_findings == []


@pytest.mark.usefixtures("environment")
def test_a_change_in_an_evaluation_keeps_its_figures_from_being_told(tmp_path: Path) -> None:
    made = trainer(tmp_path, act=Act("on_prediction_step", 4))  # after the first batch of the second evaluation
    with pytest.raises(ObjectiveError, match=SAID.format("step 4")):
        made.train()
    assert sum("eval_loss" in each for each in made.state.log_history) == 1


@pytest.mark.usefixtures("environment")
def test_a_change_in_the_last_step_is_seen(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=SAID.format("step 5")):
        trainer(tmp_path, act=Act("on_substep_end", 6)).train()


def both_ends(**more: Any) -> nn.Module:
    """A model with two prefixes, whose decoder is given what only its first layer returns (positions)."""
    sizes = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    settings = {"dropout_rate": 0.0, "pad_token_id": 1, "decoder_start_token_id": 0, "use_cache": False}
    model = pico.make("T5ForConditionalGeneration", **sizes, **settings, **more)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("decoder.block.2"))
    return model.train()


def test_two_prefixes_are_compared(tmp_path: Path) -> None:
    model = both_ends()
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        for step in range(6):
            model(**batches(2)[step % 2]).loss.backward()
    assert (cached.computed, cached.read, cached.compared) == (4, 8, 6)
