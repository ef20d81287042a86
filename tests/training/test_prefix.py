from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contract
import numpy as np
import pico
import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.models.bert.modeling_bert import BertAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from trl import DistillationConfig, DPOConfig, GRPOConfig

import solidify
from solidify import losses
from solidify.directory import ours
from solidify.errors import ObjectiveError
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.objective.objective import Objective, Term
from solidify.training.distilling import DistillationRunner
from solidify.training.preference import ObjectiveDPOTrainer
from solidify.training.prefix import CachedPrefix, cache_prefix, find_prefixes
from solidify.training.prefix_store import Store
from solidify.training.prefix_training import setting_faults
from solidify.training.reinforcing import GRPORunner
from solidify.training.trainer import ObjectiveTrainer
from training import arguments, pairs

LORA = {"r": 4, "target_modules": ["model.layers.3.self_attn.q_proj"]}
BERT = {**pico.SIZES, "num_hidden_layers": 4, "intermediate_size": 48, "num_labels": 3}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def adapted(model: Any, **declared: Any) -> Any:
    model.config.use_cache = False
    return solidify.attach(model, **(declared or {"lora": LORA})).train()


def olmoe(**settings: Any) -> Any:
    return adapted(pico.olmoe(4, **settings))


def replaced() -> Any:
    model = pico.olmoe(4)
    solidify.replace(model, "model.layers.3.mlp", TrashCanMoE, expect="OlmoeSparseMoeBlock", count=1)
    return adapted(model, train=["model.layers.3.mlp.trash", "model.layers.3.mlp.gate"])


def whole_layers() -> Any:
    return adapted(pico.llama(num_hidden_layers=4), train=["model.layers.2", "model.layers.3", "lm_head"])


def bert() -> Any:
    return adapted(
        pico.make("BertForSequenceClassification", **BERT, **STILL), train=["bert.encoder.layer.3", "classifier"]
    )


WAYS: dict[str, tuple[Callable[[], Any], type[nn.Module], list[Any]]] = {
    "LoRA on the last layer": (olmoe, OlmoeAttention, [Term("model")]),
    "LoRA, and the base as reference": (olmoe, OlmoeAttention, [Term("model"), Term(losses.forward_kl, 0.5)]),
    "a replaced module": (replaced, OlmoeAttention, [Term("model"), Term(losses.weight_penalty, 0.1)]),
    "whole layers": (whole_layers, LlamaAttention, [Term("model")]),
    "a classifier": (bert, BertAttention, [Term("model")]),
}


def classes(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {**pico.collate(rows), "labels": torch.tensor([len(row["input_ids"]) % 3 for row in rows])}


def trainer(model: Any, directory: Path, *, terms: list[Any] | None = None, cached: bool = True, **more: Any) -> Any:
    """Three epochs of four micro-batches of two rows, two to a step; an evaluation after each epoch."""
    set_seed(0)
    settings = {
        "train_sampling_strategy": "sequential",
        "max_steps": 6,
        "learning_rate": 0.01,
        "eval_strategy": "epoch",
    }
    kind = classes if "BertFor" in type(model.get_base_model()).__name__ else pico.collate
    options = {key: more.pop(key) for key in ("data_collator", "train_dataset", "group_by") if key in more}
    return ObjectiveTrainer(
        model=model,
        args=arguments(directory, 2, 2, **{**settings, **more}),
        eval_dataset=pico.ragged(3, seed=5),
        objective=Objective(terms or [Term("model")]),
        cache_prefix=cached,
        **{"train_dataset": pico.ragged(8), "data_collator": kind, **options},
    )


class Calls:
    """Counts how often the layers below the last were run, by a hook on all modules: no class is changed."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: Any) -> None:
        self.count = 0

        def count(module: nn.Module, args: Any) -> None:
            self.count += isinstance(module, kind)

        patch.setitem(nn.modules.module._global_forward_pre_hooks, id(self), count)


class Counted(TrainerCallback):
    def __init__(self, calls: Calls) -> None:
        self.calls, self.by_epoch = calls, list[int]()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.by_epoch.append(self.calls.count)
        self.calls.count = 0


@pytest.mark.parametrize("way", WAYS)
def test_a_cached_prefix_changes_no_bit(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, kind, terms = WAYS[way]
    set_seed(0)
    plain = trainer(make(), tmp_path / "plain", terms=list(terms), cached=False)
    plain.train()
    set_seed(0)
    cached = trainer(make(), tmp_path / "cached", terms=list(terms))
    counted = Counted(Calls(monkeypatch, kind))
    cached.add_callback(counted)
    cached.train()
    for a, b in zip(plain.state.log_history, cached.state.log_history, strict=True):
        assert {k: v for k, v in a.items() if "runtime" not in k and "per_second" not in k} == {
            k: v for k, v in b.items() if "runtime" not in k and "per_second" not in k
        }
    expected, found = plain.model.state_dict(), cached.model.state_dict()
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # The last layers alone run from the second epoch on: four micro-batches (and four of the reference).
    layers = 2 if way == "whole layers" else 1
    passes = 8 if "reference" in way else 4
    evaluated = layers  # of the epoch before, whose batch came again
    # Computed again: the first batch of the epoch, the last one, the last one before the evaluation, and its own first.
    again = (7 if "reference" in way else 4) * (4 - layers)
    assert counted.by_epoch[2] == passes * layers + evaluated + again
    assert counted.by_epoch[0] > passes * 4
    assert not (tmp_path / "cached" / "prefix").exists()
    assert "forward" not in {key for module in cached.model.modules() for key in vars(module)}


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_what_is_kept_outlives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    plain = trainer(olmoe(), tmp_path / "plain", cached=False, **saving)
    plain.train()
    first = trainer(olmoe(), tmp_path / "cached", **saving)
    first.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    kept = tmp_path / "cached" / "prefix"
    assert len(list(kept.iterdir())) == 5  # four micro-batches, and the batch of the evaluation
    assert "forward" not in {key for module in first.model.modules() for key in vars(module)}
    resumed = trainer(olmoe(), tmp_path / "cached", **saving)
    calls = Calls(monkeypatch, OlmoeAttention)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cached" / "checkpoint-3"))
    # All four layers, twice, for the first batch of training and of evaluation; else the last one alone, in proofs too.
    # Computed again: the first batch that is read, in training and in evaluation, and the last of all.
    assert calls.count == 2 * 2 * 4 + 2 + 5 + 1 + 3 * 3
    expected, found = plain.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not kept.exists()


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [pico.collate(pico.ragged(3, seed=seed)) for seed in range(count)]


def losses_of(model: Any, directory: Path, *, rounds: int = 2, **more: Any) -> tuple[list[float], CachedPrefix]:
    """Runs two batches again and again, as a loop of one's own does."""
    found = []
    with cache_prefix(model, directory, keep=True) as cached:
        for _ in range(rounds):
            for batch in batches():
                loss = model(**batch, **more).loss
                loss.backward()
                found.append(float(loss.detach()))
    return found, cached


def test_a_loop_of_ones_own_reads_what_it_computed(tmp_path: Path) -> None:
    found, cached = losses_of(olmoe(), tmp_path)
    assert found[:2] == found[2:]
    assert (cached.computed, cached.read) == (2, 2)
    again, cached = losses_of(olmoe(), tmp_path, rounds=1)
    assert again == found[:2]
    assert (cached.computed, cached.read) == (1, 1)  # the first batch is computed, and compared with what is kept


def t5() -> Any:
    sizes = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    settings = {"dropout_rate": 0.0, "pad_token_id": 1, "decoder_start_token_id": 0, "use_cache": False}
    model = pico.make("T5ForConditionalGeneration", **sizes, **settings)
    return adapted(model, train=["decoder.block.1"])


def test_a_call_of_another_kind_may_leave_a_prefix_out(tmp_path: Path) -> None:
    """Generation in a training runs the encoder by itself, and gives the model what it returned."""
    model, (first, second) = t5(), batches()
    with cache_prefix(model, tmp_path) as cached:
        for batch in (first, second):
            model(**batch).loss.backward()
        assert (cached.computed, cached.read) == (4, 0)
        with torch.no_grad():
            encoded = model.get_base_model().encoder(first["input_ids"])
            given = {"encoder_outputs": encoded, "decoder_input_ids": first["input_ids"]}
            found = [model(**given).logits for _ in range(2)]
        assert (cached.computed, cached.read) == (5, 1)
        model(**first).loss.backward()
        assert (cached.computed, cached.read) == (5, 3)
    assert torch.equal(*found)
    assert torch.equal(found[0], model(**given).logits)


def test_spoilt_files_are_computed_again_and_false_ones_refused(tmp_path: Path) -> None:
    found, _ = losses_of(olmoe(), tmp_path)
    paths = sorted(tmp_path.iterdir())
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    again, cached = losses_of(olmoe(), tmp_path, rounds=1)
    assert again == found[:2]
    assert cached.computed == 2
    store = Store(tmp_path)
    keys = [path.name.removesuffix(ours.ACTIVATIONS) for path in paths]
    held = [store.get(key, torch.device("cpu")) for key in keys]
    for key, other in zip(keys, reversed(held), strict=True):
        assert other is not None
        store.put(key, other)
    with pytest.raises(ObjectiveError, match=r"is not what model\.layers returns here for the same batch"):
        losses_of(olmoe(), tmp_path)


def test_other_weights_other_batches(tmp_path: Path) -> None:
    _, cached = losses_of(olmoe(), tmp_path)
    model = olmoe()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.gate.weight[0, 0] += 1e-3
    _, other = losses_of(model, tmp_path, rounds=1)
    assert (cached.computed, other.computed, other.read) == (2, 2, 0)


def test_weights_that_are_written_to_are_noticed(tmp_path: Path) -> None:
    model = olmoe()
    with cache_prefix(model, tmp_path) as cached:
        before = [float(model(**batch).loss.detach()) for batch in batches()]
        with torch.no_grad():
            model.get_base_model().model.layers[1].mlp.gate.weight.mul_(-1)
        after = [float(model(**batch).loss.detach()) for batch in batches()]
        assert cached.read == 0
        assert cached.computed == 4
    assert before != after
    assert after == [float(model(**batch).loss.detach()) for batch in batches()]
    assert not tmp_path.exists()


def test_what_is_no_number_is_not_kept(tmp_path: Path) -> None:
    model = olmoe()
    embedding = model.get_base_model().get_input_embeddings()
    first = batches()[0]
    with torch.no_grad():
        before = embedding.weight.clone()
        embedding.weight[int(first["input_ids"][0, 0])] = float("nan")
    with cache_prefix(model, tmp_path, keep=True) as cached:
        model(**first)
        assert not list(tmp_path.iterdir())
        with torch.no_grad():
            embedding.weight.copy_(before)
        model(**first)
        assert cached.computed == 1


def random_numbers(model: Any) -> None:
    model.get_base_model().config.attention_dropout = 0.1
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.1


class Counting(nn.Module):
    """Counts its passes, as a module may that moves a buffer in training."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.register_buffer("passes", torch.zeros(()), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        result: torch.Tensor = self.original(hidden_states)
        return result


def count_passes(model: Any) -> None:
    layer = model.get_base_model().model.layers[0]
    layer.mlp = Counting(layer.mlp)


def ask(**asked: Any) -> Callable[[Any], None]:
    return lambda model: vars(model.get_base_model().config).update(asked)


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "attention that drops out": (random_numbers, "draws random numbers"),
    "a buffer that moves": (count_passes, "has attributes or buffers that change in every pass"),
    "router logits": (
        ask(output_router_logits=True),
        "returns another .*router_logits.*leave output_router_logits out",
    ),
    "a cache": (ask(use_cache=True), "is given a? ?DynamicCache.*set use_cache to false"),
    "a hook": (
        lambda model: model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: None),
        "model.layers.0.mlp has a hook that looks inside",
    ),
    "trained embeddings": (
        lambda model: model.get_base_model().get_input_embeddings().requires_grad_(True),
        "depends on what learns",
    ),
    "a first layer that learns": (
        lambda model: model.get_base_model().model.layers[0].input_layernorm.requires_grad_(True),
        "model.layers.0.input_layernorm.weight learns",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_cached_is_refused(fault: str, tmp_path: Path) -> None:
    spoil, said = REFUSED[fault]
    model = olmoe()
    spoil(model)
    with pytest.raises(ObjectiveError, match=f"cache_prefix: .*{said}"):
        losses_of(model, tmp_path)


def test_hidden_states_of_skipped_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"returns another hidden_states\.1, .*leave output_hidden_states out"):
        losses_of(olmoe(), tmp_path, output_hidden_states=True)


def test_a_layer_that_begins_to_learn_is_noticed(tmp_path: Path) -> None:
    model = olmoe()
    with cache_prefix(model, tmp_path):
        model(**batches()[0])
        model.get_base_model().model.layers[2].mlp.gate.requires_grad_(True)
        with pytest.raises(ObjectiveError, match=r"model\.layers\.2 learns by now"):
            model(**batches()[0])


def test_dropout_ends_a_prefix() -> None:
    model = adapted(pico.make("BertForSequenceClassification", **BERT), train=["classifier"])
    (found,) = find_prefixes(model)
    assert found.frozen == 0
    assert "drops out at random (p=0.1)" in found.reason


def test_terms_end_a_prefix_where_they_look(tmp_path: Path) -> None:
    looked = [Term("model"), Term(losses.load_balance, 0.1)]
    with pytest.raises(ObjectiveError, match="has a hook that looks inside"):
        trainer(olmoe(), tmp_path, terms=looked)
    looked = [Term("model"), Term(losses.load_balance, 0.1, arguments={"modules": "model.layers.3.mlp.gate"})]
    made = trainer(olmoe(), tmp_path, terms=looked)
    assert [prefix.frozen for prefix in find_prefixes(made.model)] == [3]


def test_shared_keys_of_gemma3n_are_refused(tmp_path: Path) -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=1,
        laurel_rank=4,
        layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = adapted(transformers.Gemma3nForCausalLM(config))
    with pytest.raises(ObjectiveError, match="the model does not run without its prefix: KeyError"):
        losses_of(model, tmp_path)


def dropping(rows: list[Any]) -> dict[str, torch.Tensor]:
    batch = pico.collate(rows)
    batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 5, batch["input_ids"])
    return batch


def stream() -> Iterator[Any]:
    yield from pico.ragged(8)


def iterable() -> Any:
    from datasets import IterableDataset

    return IterableDataset.from_generator(stream)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"train_sampling_strategy": "random"}, "set train_sampling_strategy: sequential"),
        ({"train_sampling_strategy": "random", "group_by": ["length"]}, "group_by puts other rows together"),
        ({"data_collator": dropping}, "dropping|function makes another batch of the same rows"),
        ({"train_dataset": iterable}, "the rows come as a stream"),
    ],
)
def test_settings_under_which_no_batch_comes_again_are_refused(more: Any, said: str, tmp_path: Path) -> None:
    given = {key: value() if value is iterable else value for key, value in more.items()}
    with pytest.raises(ObjectiveError, match=f"cache_prefix: .*{said}"):
        trainer(olmoe(), tmp_path, **given)
    trainer(olmoe(), tmp_path)


def drawing(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Draws as augmentations do; what it draws changes nothing here, so that the batch comes again."""
    draws()
    return pico.collate(rows)


def draws() -> tuple[float, float, float]:
    return float(torch.rand(1)), random.random(), np.random.rand()


def test_a_collator_that_is_tried_draws_no_numbers_of_the_training(tmp_path: Path) -> None:
    found = []
    for cached in (False, True):
        trainer(olmoe(), tmp_path, cached=cached, data_collator=drawing)
        found.append(draws())
    assert found[0] == found[1]


def test_activations_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(olmoe(), tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**28 + 1000})())
    with pytest.raises(ObjectiveError, match=r"of activations do not fit in .*prefix"):
        made.train()


@pytest.mark.parametrize(("lmbda", "written"), [(0.0, False), (0.5, True)])
def test_trainers_that_write_answers_are_refused(lmbda: float, written: bool, tmp_path: Path) -> None:
    from solidify.training.teaching import GKDRunner

    from trl.experimental.gkd import GKDConfig  # isort: skip

    def settings(kind: Any, **more: Any) -> Any:
        return arguments(tmp_path, 2, 1, kind=kind, train_sampling_strategy="sequential", **more)

    refused = ["what is trained on is written in training, so no batch comes again"]
    assert setting_faults(settings(GKDConfig, lmbda=lmbda), GKDRunner) == (refused if written else [])
    for kind, runner in ((GRPOConfig, GRPORunner), (DistillationConfig, DistillationRunner)):
        assert (
            setting_faults(settings(kind, num_generations=2) if kind is GRPOConfig else settings(kind), runner)
            == refused
        )


def test_preferences_and_their_reference_share_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preferring(name: str, *, cached: bool) -> Any:
        set_seed(0)
        settings = {
            "max_steps": 4,
            "learning_rate": 0.01,
            "router_aux_loss_coef": 0.0,
            "activation_checkpointing": False,
        }
        kind: Any = ObjectiveDPOTrainer
        return kind(
            olmoe(),
            args=arguments(tmp_path / name, 4, 1, kind=DPOConfig, train_sampling_strategy="sequential", **settings),
            train_dataset=pairs(),
            processing_class=contract.tokenizer(),
            objective=Objective([Term("model")]),
            cache_prefix=cached,
        )

    plain, cached = preferring("plain", cached=False), preferring("cached", cached=True)
    plain.train()
    counted = Counted(Calls(monkeypatch, OlmoeAttention))
    cached.add_callback(counted)
    cached.train()
    expected, found = plain.model.state_dict(), cached.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # The last layer alone, of the model and of its reference, for two batches; the first and the last are compared.
    assert counted.by_epoch[1] == 2 * 2 * (1 + 3)
