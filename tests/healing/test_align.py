"""Each new module learns from what it replaced, whole or streamed, alone or beside others, with the same bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import healing_modules
import pico
import pytest
import torch

import solidify
from solidify.errors import HealingError
from solidify.healing import measuring
from solidify.healing.align import align
from solidify.healing.learning import Alignment, Learner

SETTINGS = Alignment(max_steps=12, learning_rate=1e-2)


def batches(model: torch.nn.Module, count: int = 5, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, model.config.vocab_size, (2, 10 + number % 2), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def padding() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.zeros(2, 5).long()}


@cache
def _changed() -> tuple[torch.nn.Module, torch.nn.Module, list]:
    base = pico.llama(num_hidden_layers=3)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    edits = solidify.replace(model, "model.layers.*.mlp", healing_modules.Narrow)
    return base, model, edits + solidify.replace(model, "model.layers.1.self_attn", healing_modules.Turned)


def changed() -> tuple[torch.nn.Module, torch.nn.Module, list]:
    base, model, edits = _changed()
    return base, copy.deepcopy(model), edits


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_what_is_new_learns_and_nothing_else_moves() -> None:
    base, model, edits = changed()
    before = state(model)
    results = align(model, base, batches(base), edits=edits, settings=SETTINGS)
    new = {name for edit in edits for name, origin in edit.tensors.items() if origin is None}
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert moved == new
    assert [r.name for r in results] == sorted(
        (edit.name for edit in edits), key=lambda n: (n.split(".")[2], "mlp" in n)
    )
    assert all(r.after < r.before and r.steps == 12 for r in results)


@pytest.mark.parametrize("match", ["output", "block", "heads"])
@pytest.mark.parametrize("inputs", ["base", "healed"])
def test_streamed_equals_whole(tmp_path: Path, match: str, inputs: str) -> None:
    base, model, edits = changed()
    if match == "heads":
        edits = edits[-1:]
        match = "output"  # of a module that wraps its attention, whose projection is not its own child
    other = copy.deepcopy(model)
    settings = Alignment(max_steps=6, learning_rate=1e-2, match=match, inputs=inputs)
    whole = align(model, base, batches(base), edits=edits, settings=replace(settings, stream=False))
    streamed = align(
        other, base, batches(base), edits=edits, settings=replace(settings, stream=True), directory=tmp_path
    )
    assert_equal(state(model), state(other))
    assert sorted((r.name, r.before, r.after, tuple(r.errors)) for r in whole) == sorted(
        (r.name, r.before, r.after, tuple(r.errors)) for r in streamed
    )


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 2.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 12,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_streamed_equals_whole_where_positions_depend_on_what_was_seen(tmp_path: Path, kind: str) -> None:
    """A rotary embedding that grows computes otherwise after a longer row; every batch is run as if it were the first.

    Rows are longer than the original length, and shorter ones follow them.
    """
    sizes = {"max_position_embeddings": 12, "head_dim": 8, "rope_parameters": ROPES[kind]}
    base, model, edits = changed_by("model.layers.*.self_attn", healing_modules.Turned, pico.llama(**sizes))
    made = [{"input_ids": pico.tokens(2, length, seed=length)} for length in (20, 9, 30, 14)]
    before = {name: buffer.clone() for name, buffer in base.named_buffers()}
    settings, other = Alignment(max_steps=6, learning_rate=1e-2), copy.deepcopy(model)
    whole = align(model, base, made, edits=edits, settings=replace(settings, stream=False))
    found = align(other, base, made, edits=edits, settings=replace(settings, stream=True), directory=tmp_path)
    assert_equal(state(model), state(other))
    assert [r.errors for r in whole] == [r.errors for r in found]
    assert_equal(before, dict(base.named_buffers()))
    assert measuring.distance(model, base, made).kl == pytest.approx(measuring.distance(model, base, made[::-1]).kl)


def test_a_changed_model_that_hands_on_more_than_its_output_is_not_streamed(tmp_path: Path) -> None:
    base, model, edits = changed_by("model.layers.*.self_attn", healing_modules.Leaving)
    settings = Alignment(max_steps=2, inputs="healed", stream=True)
    assert align(copy.deepcopy(model), base, batches(base), edits=edits, settings=settings, directory=tmp_path)
    for layer in model.model.layers:
        layer.self_attn.sharing = True
    with pytest.raises(
        HealingError, match=r"the changed model cannot be streamed .*stream=False: model\.layers\.1 reads something"
    ):
        align(model, base, batches(base), edits=edits, settings=settings, directory=tmp_path)


def test_rows_that_begin_with_padding_are_aligned(tmp_path: Path) -> None:
    base, model, edits = changed()
    padded = [{key: tensor.flip(1) for key, tensor in batch.items()} for batch in batches(base)]
    for batch in padded:
        batch["attention_mask"][0, :9] = 0
        batch["attention_mask"][1] = 0
    assert align(model, base, padded, edits=edits, settings=replace(SETTINGS, stream=True), directory=tmp_path)


def test_a_result_does_not_depend_on_who_else_learns() -> None:
    base, model, edits = changed()
    alone = copy.deepcopy(model)
    align(model, base, batches(base), edits=edits, settings=SETTINGS)
    align(alone, base, batches(base), edits=edits[1:2], settings=SETTINGS)
    name = edits[1].name
    ours, theirs = ({k: v for k, v in state(m).items() if k.startswith(name)} for m in (model, alone))
    assert_equal(ours, theirs)


def test_shares_are_put_together(tmp_path: Path) -> None:
    base, model, edits = changed()
    start = state(model)
    whole = copy.deepcopy(model)
    align(whole, base, batches(base), edits=edits, settings=SETTINGS)
    for number in range(2):
        done = align(
            model, base, batches(base), edits=edits, settings=replace(SETTINGS, share=(number, 2)), directory=tmp_path
        )
        assert len(done) == 2
        assert_equal(state(model), start)
    joined = align(model, base, batches(base), edits=edits, settings=SETTINGS, directory=tmp_path)
    assert_equal(state(model), state(whole))
    assert len(joined) == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda b, m, e: align(m, m, batches(b), edits=e), "the base is the changed model itself"),
        (lambda b, m, e: align(b, m, batches(b), edits=e), "are the two swapped"),
        (lambda b, m, e: align(m, pico.llama(num_hidden_layers=2), batches(b), edits=e), "is it another base"),
        (
            lambda b, m, e: align(m, pico.llama(num_hidden_layers=3, seed=5), batches(b), edits=e),
            "this is another base",
        ),
        (lambda b, m, e: align(m, b, ["text"], edits=e), "is of type str; each is a dictionary of tensors"),
        (lambda b, m, e: align(m, b, iter(batches(b)), edits=e), "write list"),
        (lambda b, m, e: align(m, b, [{"input_ids": [1, 2]}], edits=e), "which must be a tensor"),
        (lambda b, m, e: align(m, b, [{"input_ids": torch.ones(3).long()}], edits=e), "needs input_ids"),
        (lambda b, m, e: align(m, b, [*batches(b, 1), padding()], edits=e), "number 1 has no token: it is empty, or"),
        (lambda b, m, e: align(m, b, batches(b), edits=e, held_out=[padding()]), "held_out: number 0 has no token"),
        (lambda b, m, e: align(m, b, batches(b), edits=["model.layers.1.mlp"]), "one is of type str"),
        (lambda b, m, e: align(m, b, batches(b), edits=e, settings={"max_steps": 2}), "is of type dict"),
        (lambda b, m, e: align("x", b, batches(b), edits=e), "the changed model is one in memory"),
        (lambda b, m, e: align(m, b, batches(b), edits=e, settings=Alignment(share=(4, 4))), "share is this process's"),
        (lambda b, m, e: align(m, b, batches(b), edits=e, settings=Alignment(train="**.down")), "a tuple of patterns"),
        (lambda b, m, e: align(m, b, batches(b), edits=e, settings=Alignment(learning_rate="1")), "is a number"),
    ],
)
def test_a_wrong_argument_is_named_and_the_model_stays(wrong: Any, words: str) -> None:
    base, model, edits = changed()
    before = state(model)
    with pytest.raises(HealingError, match=words):
        wrong(base, model, edits)
    assert_equal(state(model), before)


def changed_by(target: str, module: Any, base: Any = None, **arguments: Any) -> tuple[Any, Any, list]:
    base = base if base is not None else pico.llama(num_hidden_layers=2)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    return base, model, solidify.replace(model, target, module, arguments=arguments)


def test_a_family_that_writes_into_what_a_module_returns_does_not_spoil_the_target() -> None:
    """Falcon adds attention to what its feed-forward returned, in place."""
    falcon = pico.make("FalconForCausalLM", **{**pico.SIZES, "parallel_attn": True, "new_decoder_architecture": False})
    base, model, edits = changed_by("transformer.h.*.mlp", healing_modules.Narrow, falcon)
    seen = {edit.name: [] for edit in edits}
    hooks = [
        base.get_submodule(name).register_forward_hook(
            lambda _m, given, output, name=name: seen[name].append((given[0].double(), output.double()))
        )
        for name in seen
    ]
    with torch.no_grad():
        for batch in batches(base, 2):
            base(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    wanted = {}
    for name, calls in seen.items():
        new, far, size = copy.deepcopy(model.get_submodule(name)).double(), 0.0, 0.0
        for batch, (given, output) in zip(batches(base, 2), calls, strict=True):
            kept = batch["attention_mask"].bool()
            far += float((new(given).detach() - output)[kept].square().sum())
            size += float(output[kept].square().sum())
        wanted[name] = far / size
    found = align(model, base, batches(base, 2), edits=edits, settings=Alignment(max_steps=1))
    assert {unit.name: unit.before for unit in found} == pytest.approx(wanted, rel=1e-4)


def test_a_parameter_with_two_names_within_a_module_learns() -> None:
    base, model, edits = changed_by("model.layers.0.mlp", healing_modules.Tied)
    before = state(model)
    align(model, base, batches(base), edits=edits, settings=SETTINGS)
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert {"model.layers.0.mlp.a.weight", "model.layers.0.mlp.b.weight"} <= moved
    assert model.model.layers[0].mlp.a.weight is model.model.layers[0].mlp.b.weight


@pytest.mark.parametrize(
    ("target", "module", "words"),
    [
        ("model.layers.*.mlp", healing_modules.Shared, "is also a parameter of model.layers.0.mlp"),
        ("model.layers.0.mlp", healing_modules.Unsaved, "moves in training and is not saved"),
    ],
)
def test_what_cannot_learn_by_itself_is_refused(target: str, module: Any, words: str) -> None:
    base, model, edits = changed_by(target, module)
    before = state(model)
    with pytest.raises(HealingError, match=words):
        align(model, base, batches(base), edits=edits, settings=SETTINGS)
    assert_equal(state(model), before)


def test_a_module_within_another_that_learns_is_refused() -> None:
    base, model, edits = changed_by("model.layers.0.mlp.down_proj", healing_modules.Wrapped)
    edits += solidify.replace(model, "model.layers.0.mlp", healing_modules.Keeping)
    settings = Alignment(max_steps=1, train=("model.layers.0.mlp",))
    with pytest.raises(HealingError, match=r"down_proj stands within model\.layers\.0\.mlp, and both learn"):
        align(model, base, batches(base), edits=edits, settings=settings)


def test_a_module_that_the_base_calls_several_times_is_refused() -> None:
    sizes = {**pico.SIZES, "intermediate_size": 32, "num_hidden_layers": 2, "embedding_size": 8}
    base = pico.make("AlbertModel", **sizes)
    name = "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    base, model, edits = changed_by(name, healing_modules.Wrapped, base)
    with pytest.raises(HealingError, match="is called 2 times in one pass"):
        align(model, base, batches(base), edits=edits, settings=SETTINGS)


def test_results_of_another_module_are_not_taken(tmp_path: Path) -> None:
    """An argument that is no tensor, and numbers that a sample of a tensor does not see, make it another work."""
    errors = set()
    for scale in (1.0, 30.0):
        base, model, edits = changed_by("model.layers.0.mlp", healing_modules.Narrow, scale=scale)
        found = align(model, base, batches(base), edits=edits, settings=SETTINGS, directory=tmp_path)
        errors.add(found[0].before)
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight[3, 7] *= -3
    base, model, edits = changed_by("model.layers.0.mlp", healing_modules.Narrow, base, scale=30.0)
    errors.add(align(model, base, batches(base), edits=edits, settings=SETTINGS, directory=tmp_path)[0].before)
    assert len(errors) == 3


def test_what_somebody_else_wrote_stays(tmp_path: Path) -> None:
    base, model, edits = changed_by("model.layers.0.mlp", healing_modules.Narrow)
    (tmp_path / "model.layers.0.mlp.json").write_text("mine")
    with pytest.raises(HealingError, match="is not of an alignment"):
        align(model, base, batches(base), edits=edits, settings=SETTINGS, directory=tmp_path)
    assert (tmp_path / "model.layers.0.mlp.json").read_text() == "mine"


@pytest.mark.parametrize(
    "settings",
    [
        {"optim_args": {"lr": 1.0}},
        {"optim_args": {"beta": 1.0}},
        {"lr_scheduler_type": "bogus"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"optim": "LBFGS"},
        {"optim": "SparseAdam"},
        {"max_steps": 2.5},
        {"warmup_steps": -1},
    ],
)
def test_settings_that_would_fail_at_a_step_are_refused(settings: dict[str, Any]) -> None:
    assert Alignment(**settings).faults()
    assert not Alignment().faults()


def test_an_interrupted_stream_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model, edits = changed()
    start, whole = state(model), copy.deepcopy(model)
    settings = replace(SETTINGS, stream=True)
    align(whole, base, batches(base), edits=edits, settings=settings, directory=tmp_path / "whole")
    step, calls = Learner.step, 0

    def failing(self: Learner, *args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:  # in the middle of the second layer
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(Learner, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        align(model, base, batches(base), edits=edits, settings=settings, directory=tmp_path / "cut")
    assert_equal(state(model), start)
    calls = 100
    align(model, base, batches(base), edits=edits, settings=settings, directory=tmp_path / "cut")
    assert calls == 100 + 3 * SETTINGS.max_steps  # the first layer's module is not trained again
    assert_equal(state(model), state(whole))


def test_half_precision_learns_in_float32_and_stays_half() -> None:
    base, model, edits = changed()
    base, model = copy.deepcopy(base).bfloat16(), model.bfloat16()
    results = align(model, base, batches(base), edits=edits, settings=SETTINGS)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert all(result.after < result.before for result in results)


def test_what_is_wrong_is_said_at_once() -> None:
    base, model, edits = changed()
    with pytest.raises(HealingError, match="match is one of output, heads, mixing, block") as caught:
        align(model, base, [], edits=edits, settings=Alignment(match="all", optim="Adamm", max_steps=0))
    assert len(caught.value.faults) == 4
    with pytest.raises(HealingError, match=r"train: '\*\*\.nothing' names nothing that learns"):
        align(model, base, batches(base), edits=edits, settings=Alignment(train=("**.nothing", "**.mlp", "**.turn")))
    with pytest.raises(HealingError, match="has no output projection that is known here"):
        align(model, base, batches(base), edits=edits, settings=Alignment(match="heads"))
    with pytest.raises(HealingError, match="lower the learning rate"):
        align(model, base, batches(base), edits=edits, settings=Alignment(learning_rate=1e30, optim="SGD"))
