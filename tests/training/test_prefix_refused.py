"""Models, settings and trainers in which frozen layers cannot be computed once are refused, with the reason."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
import transformers
from frozen import batches, small, train
from frozen_trainer import BERT, adapted, losses_of, olmoe, trainer
from torch import nn
from trl import DistillationConfig, GRPOConfig

from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.objective import Term
from solidify.training.distilling import DistillationRunner
from solidify.training.prefix.cached import cache_prefix, find_prefixes
from solidify.training.prefix.in_trainer import setting_faults
from solidify.training.reinforcing import GRPORunner
from training import arguments


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
        model(**batches(2)[0])
        model.get_base_model().model.layers[2].mlp.gate.requires_grad_(True)
        with pytest.raises(ObjectiveError, match=r"model\.layers\.2 learns by now"):
            model(**batches(2)[0])


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


def test_activation_checkpointing_is_named(tmp_path: Path) -> None:
    model = small()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with (
        pytest.raises(
            ObjectiveError, match=r"model\.layers\.0 builds a graph, .* set activation_checkpointing .* false"
        ),
        cache_prefix(model, tmp_path / "kept"),
    ):
        train(model)
