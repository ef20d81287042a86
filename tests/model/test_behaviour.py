"""A replacement keeps how the model behaves, or it is refused: planted faults and honest twins in four families."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import behaving
import families
import numpy as np
import pico
import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import solidify
from solidify.behaviour import calling, probes, properties, values, watching
from solidify.errors import SurgeryError
from solidify.model import probing

ROTARY = {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.1}
LEARNED = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
FAMILIES: dict[str, tuple[str, dict[str, object], str, str]] = {
    "Llama": ("LlamaForCausalLM", ROTARY, "model.layers.*.mlp", "model.layers.*.self_attn"),
    "Qwen3": ("Qwen3ForCausalLM", {**ROTARY, "head_dim": 8}, "model.layers.*.mlp", "model.layers.*.self_attn"),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        {**ROTARY, "head_dim": 8, "sliding_window": 8},
        "model.layers.*.mlp",
        "model.layers.*.self_attn",
    ),
    "GPT-2": ("GPT2LMHeadModel", {**LEARNED, "pad_token_id": 1}, "transformer.h.*.mlp", "transformer.h.*.attn"),
}
HONEST = ("Scaled", "Gated", "Zero", "Dense", "Dropped", "Float32Gate", "Buffered")
HONEST_ATTENTION = ("Scaled", "Dropped", "Buffered")
# Planted in the feed-forward, and the word by which the refusal must name the property.
PLANTED = {
    "TokenShift": "cache",
    "OwnCache": "cache",
    "NumberOfTokens": "cache",
    "SeqNorm": "cache",
    "ChunkPool": "looks ahead",
    "BatchMean": "other rows",
    "MeanOverAll": "other rows",
    "Counter": "earlier calls",
    "Ema": "earlier calls",
    "Noisy": "random numbers",
    "PyNoisy": "random numbers",
    "Reseeding": "random numbers",
    "NumpyNoisy": "random numbers",
    "NumpyReseeding": "random numbers",
    "NumpySteady": "random numbers",
    "Always": "random numbers",
    "Detached": "gradient",
    "InPlace": "writes into",
    "Asserting": "AssertionError",
}
PLANTED_ATTENTION = {
    "RunningMean": "cache",
    "NoMask": "padding",
    "Bidirectional": "looks ahead",
    "LateBidirectional": "looks ahead",
    "BatchMean": "other rows",
    "Counter": "earlier calls",
    "Noisy": "random numbers",
    "Rewriting": "gradient",
}


def made(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, str, str]:
    head, settings, feed_forward, attention = FAMILIES[family]
    return pico.make(head, dtype=dtype, **settings), feed_forward, attention


def judged(model: PreTrainedModel, place: str, name: str) -> str:
    """Replaces, and returns the refusal, or nothing; a refused model is what it was."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    inputs = probing.probe_inputs(model)
    output = model(**inputs).logits
    try:
        solidify.replace(model, place, getattr(behaving, name))
    except SurgeryError as error:
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert model.config.to_dict() == config
        assert torch.equal(model(**inputs).logits, output)
        return str(error)
    return ""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_feed_forward_is_taken(family: str, name: str) -> None:
    model, place, _ = made(family)
    assert judged(model, place, name) == ""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HONEST_ATTENTION)
def test_an_honest_attention_is_taken(family: str, name: str) -> None:
    model, _, place = made(family)
    assert judged(model, place, name) == ""


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_in_a_feed_forward_is_named(family: str, name: str) -> None:
    model, place, _ = made(family)
    assert PLANTED[name] in judged(model, place, name)


@pytest.mark.parametrize("name", PLANTED_ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_in_an_attention_is_named(family: str, name: str) -> None:
    model, _, place = made(family)
    assert PLANTED_ATTENTION[name] in judged(model, place, name)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("declares", [{}, {"rows": False}, {"rows": False, "padding": False, "cache": False}])
def test_no_mask_means_causal_and_the_cause_is_said_first(family: str, declares: dict[str, bool]) -> None:
    """In a batch with padding there is a mask; a row alone has none, and there alone it sees ahead."""
    model, _, place = made(family)
    with pytest.raises(SurgeryError) as caught:
        solidify.replace(model, place, behaving.MaskAsGiven, declares=declares)
    causal, *others = caught.value.faults
    assert "looks ahead" in causal and "its attention_mask was None there, and no mask means causal" in causal
    assert [other.partition(" depends")[0] for other in others] == ([] if declares else ["through MaskAsGiven a row"])
    assert all("mend causal first" in other and "declare" not in other for other in others)


def test_all_that_is_off_is_said_at_once_and_what_may_come_of_it_last() -> None:
    model, place, _ = made("Llama")
    with pytest.raises(SurgeryError) as caught:
        solidify.replace(model, place, behaving.ChunkPool)
    causal, *others = caught.value.faults
    assert "looks ahead" in causal and "attention_mask" not in causal
    assert [other.partition(",")[0] for other in others[:1]] == ["the model keeps a cache"]
    assert others[1].startswith("padding reaches") and len(others) == 2
    assert all("mend causal first" in other and "declare" not in other for other in others)
    with pytest.raises(SurgeryError) as caught:
        solidify.replace(model, place, behaving.Noisy)
    chance, *others = caught.value.faults
    assert "random numbers" in chance and others
    assert all("mend deterministic first" in other and "declare" not in other for other in others)


@pytest.mark.parametrize("name", [*HONEST, *(n for n in PLANTED if n != "Asserting"), "Float32Out"])
def test_half_precision_hides_nothing(name: str) -> None:
    model, place, _ = made("Llama", torch.bfloat16)
    said = judged(model, place, name)
    assert said == "" if name in HONEST else PLANTED.get(name, "float32") in said


ELSEWHERE = {
    "BERT": ("bert", "AutoModelForMaskedLM", "bert.encoder.layer.*.attention"),
    "ViT": ("vit", "AutoModelForImageClassification", "vit.layers.*"),
    "Mamba": ("mamba", "AutoModelForCausalLM", "backbone.layers.*.mixer"),
    "Qwen3 attention": ("qwen3", "AutoModelForCausalLM", "model.layers.*.self_attn"),
    "Qwen3": ("qwen3", "AutoModelForCausalLM", "model.layers.*.mlp"),
    "Moshi": ("moshi", "AutoModelForCausalLM", "model.layers.*.mlp"),
    "BART": ("bart", "AutoModelForSeq2SeqLM", "model.decoder.layers.*.encoder_attn"),
}


@pytest.mark.parametrize(
    ("family", "name", "word"),
    [
        ("BERT", "NoMaskAtAll", "padding"),
        ("BERT", "Scaled", ""),
        ("ViT", "CumulatedRows", "other rows"),
        ("ViT", "Scaled", ""),
        ("Mamba", "Shift", "over the cache"),
        ("Mamba", "PlainSame", ""),
        ("Qwen3 attention", "MemoMask", "other rows"),  # by which it is found: the mask of another row is used
        ("Qwen3 attention", "PlainNoCache", "cache"),
        ("Qwen3 attention", "PlainSame", ""),
        ("Qwen3", "PlainStep", "cache"),
        ("Qwen3", "ZeroBufferShift", "cache"),
        ("Qwen3", "HalfDetached", "gradient"),
        ("Qwen3", "PlainSame", ""),
        ("Qwen3 attention", "ForgetsSteps", "a later single step"),
        ("Qwen3 attention", "RemembersPlaces", "a later single step"),
        ("Qwen3", "OneToken", "a later single step"),
        ("Qwen3", "ShortPiece", "a first piece"),
        ("Qwen3", "SecondPiece", "a second piece"),
        ("Qwen3", "SeveralSteps", "something else over it"),
        ("Qwen3", "SecondStep", "a later single step"),
        ("Qwen3", "OneRow", "a row alone"),
        ("Qwen3", "MemoContents", "other rows"),
        ("Moshi", "PlainSame", ""),  # whose own later steps are wrong
        ("Qwen3", "Seldom", "random numbers in evaluation"),
        ("BART", "CrossDetached", "no gradient reaches"),
        ("BART", "Scaled", ""),
        ("Qwen3", "Tallies", ""),
        ("Qwen3", "Saturated", ""),
        ("Qwen3", "Skipped", ""),
    ],
)
def test_faults_and_twins_in_other_families(family: str, name: str, word: str) -> None:
    kind, auto, place = ELSEWHERE[family]
    model = families.tiny(kind, auto)
    try:
        solidify.replace(model, place, getattr(behaving, name))
    except SurgeryError as error:
        assert word, str(error)
        assert word in str(error)
    else:
        assert not word


def test_a_declared_lack_of_a_cache_is_obeyed_however_a_cache_is_given() -> None:
    model, _, place = made("Llama")
    solidify.replace(model, place, behaving.RunningMean, declares={"cache": False, "padding": False})
    ids, cache = pico.tokens(1, 6), DynamicCache()
    for call in (
        lambda: model(ids, None, None, cache),
        lambda: model.model(ids, past_key_values=cache),
        lambda: model(ids, use_cache=True),
    ):
        with pytest.raises(ValueError, match="keeps no cache"):
            call()
    assert model(ids).past_key_values is None


def test_what_is_meant_is_declared_recorded_and_obeyed(tmp_path: Path) -> None:
    model, _, place = made("Llama")
    meant = {"cache": False, "padding": False}
    edits = solidify.replace(model, place, behaving.RunningMean, declares=meant)
    assert edits[0].declares == meant
    artifact = solidify.build(model, edits, tmp_path / "artifact")
    assert {f.name: f.passed for f in artifact.findings}["behaviour: cache"] is None
    again = solidify.load(tmp_path / "artifact")
    assert again.config.surgery[0]["declares"] == meant
    ids = pico.tokens(1, 6)
    options = {"max_new_tokens": 5, "do_sample": False}
    for each in (model, again):
        wanted = each.generate(ids, use_cache=False, **options)
        assert torch.equal(each.generate(ids, **options), wanted)
        with pytest.raises(ValueError, match="keeps no cache"):
            each.generate(ids, use_cache=True, **options)


def test_a_class_may_declare_what_it_does() -> None:
    class Mean(behaving.RunningMean):
        declares = {"cache": False, "padding": False}  # noqa: RUF012

    model, _, place = made("Llama")
    assert solidify.replace(model, place, Mean)[0].declares == {"cache": False, "padding": False}


@pytest.mark.parametrize(
    ("declares", "said"),
    [({"cach": False}, "did you mean 'cache'"), ({"cache": "no"}, "true (kept) or false"), (["cache"], "properties")],
)
def test_a_declaration_that_does_not_fit_is_refused(declares: object, said: str) -> None:
    model, place, _ = made("Llama")
    with pytest.raises(SurgeryError, match="declare") as caught:
        solidify.replace(model, place, behaving.Scaled, declares=declares)
    assert said in str(caught.value)


def test_a_layer_of_ones_own_is_recorded_where_the_old_one_was(tmp_path: Path) -> None:
    model, _, _ = made("Llama")
    ids = pico.tokens()
    before = model(ids, output_hidden_states=True).hidden_states
    edits = solidify.replace(model, "model.layers.*", behaving.Scaled, expect="LlamaDecoderLayer", count=2)
    pico.artifact(model, edits, tmp_path / "artifact")
    again = solidify.load(tmp_path / "artifact")
    with torch.no_grad():
        for each in (model, again):
            each.model.layers[0].scale.fill_(3.0)
            states = each(ids, output_hidden_states=True).hidden_states
            assert len(states) == len(before)
            assert torch.equal(states[1], before[1] * 3)  # what the wrapper returned, not what is inside of it


def test_router_logits_that_are_gone_are_refused_when_they_are_asked_for(tmp_path: Path) -> None:
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.1.mlp", pico.wrappers.PlainMLP)
    assert edits[0].declares == {"router_logits": False}
    pico.artifact(model, edits, tmp_path / "artifact")
    for each in (model, solidify.load(tmp_path / "artifact")):
        each(pico.tokens())
        with pytest.raises(ValueError, match="does not record all router_logits"):
            each(pico.tokens(), output_router_logits=True)


def test_the_contract_is_repeated_in_a_fresh_process_and_fails_there(tmp_path: Path) -> None:
    """A module that behaves in the process that built it, and not in another."""
    (tmp_path / "late.py").write_text(
        "import sys\n"
        "from torch import nn\n"
        "class Late(nn.Module):\n"
        "    def __init__(self, original):\n"
        "        super().__init__()\n"
        "        self.inner = original\n"
        "    def forward(self, x):\n"
        "        if sys.modules.get('solidify') is None and x.shape[1] == 1:\n"
        "            return self.inner(x) * 1.5\n"
        "        return self.inner(x)\n"
    )
    import importlib.util

    spec = importlib.util.spec_from_file_location("late", tmp_path / "late.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["late"] = module
    spec.loader.exec_module(module)
    model, place, _ = made("Llama")
    edits = solidify.replace(model, place, module.Late)
    with pytest.raises(solidify.ArtifactError, match="behaviour: cache"):
        solidify.build(model, edits, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reading_of_an_unchanged_model_is_rounding(family: str) -> None:
    model, _, _ = made(family)
    reading = probes.read(watching.Watched(model, probing.probe_inputs(model)))
    wanted = {"causal", "padding", "cache/prefill", "cache/reordered", "cache/crop", "rows", "stateless"}
    assert wanted <= set(reading.distances)
    assert max(reading.distances.values()) < 1e-5


def test_probing_leaves_nothing_behind_in_shared_modules_and_buffers() -> None:
    model, _, _ = made("Llama")
    places = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
    edits = solidify.share(model, places, pico.wrappers.Bottleneck, arguments={"width": 4})
    model.model.norm.register_buffer("seen", torch.zeros(1))
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    noisy = {name: values.noise(name, parameters[name]) for edit in edits for name in edit.tensors}
    for wide in (False, True):
        probes.read(watching.Watched(model, probing.probe_inputs(model), values=noisy, wide=wide))
    after = model.state_dict(keep_vars=True)
    assert {name: id(tensor) for name, tensor in after.items()} == {name: known for name, (known, _) in before.items()}
    assert all(torch.equal(tensor, before[name][1]) for name, tensor in after.items())


def test_a_distance_is_the_largest_of_any_position_in_float64() -> None:
    found, wanted = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    by_position = (found.double() - wanted.double()).square().mean(-1).sqrt().max()
    expected = float(by_position / wanted.double().square().mean().sqrt())
    assert abs(properties.distance(found, wanted) - expected) < 1e-6
    assert properties.distance(wanted, wanted) == 0.0
    assert properties.distance(wanted[:1], wanted) == properties.FAILED


def added(make: Callable[[], nn.Module]) -> type[nn.Module]:
    """Makes a head of a function of its own layer."""

    class Head(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.inner = make()
            self.out = nn.Linear(config.hidden_size, 1)

        def forward(self, x):
            return self.out(self.inner(x))

    return Head


def draws() -> tuple[float, float, float]:
    return float(torch.rand(1)), random.random(), np.random.rand()


def test_random_numbers_of_every_kind_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with calling.chance_kept():
        inside = draws()
        calling.set_seed(3)
    assert draws() == inside
    monkeypatch.delitem(sys.modules, "numpy.random")
    assert calling.random_states().numpy is None and "numpy.random" not in sys.modules  # nothing is imported for it


def test_an_added_head_behaves_as_what_it_reads() -> None:
    model, _, _ = made("Llama")
    honest, drawing = added(nn.Identity), added(lambda: behaving.Noisy(nn.Identity()))
    with pytest.raises(SurgeryError, match="random numbers"):
        solidify.add(model, "value", drawing, reads="model.norm")
    assert "value" not in dict(model.named_children())
    solidify.add(model, "value", honest, reads="model.norm")
    assert model(pico.tokens())["value"].shape == (2, 12, 1)


class Centred(nn.Module):
    """Takes off a share of the mean over the rows of its batch; the share is a number, or a buffer of zero."""

    def __init__(self, share: float | None) -> None:
        super().__init__()
        if share is None:
            self.register_buffer("share", torch.zeros(()))
        else:
            self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.share * x.mean(0, keepdim=True)


@pytest.mark.parametrize("share", [0.02, None], ids=["below what bfloat16 shows", "a buffer that starts at zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_added_head_is_looked_at_as_closely_as_a_replacement(share: float | None, dtype: torch.dtype) -> None:
    model = made("Llama")[0].to(dtype)
    with pytest.raises(SurgeryError, match="a row depends on the other rows"):
        solidify.add(model, "value", added(lambda: Centred(share)), reads="model.norm")
    solidify.add(model, "value", added(lambda: Centred(0.0)), reads="model.norm")


def test_what_is_counted_of_probes_is_not_in_the_module() -> None:
    model = pico.llama()
    solidify.replace(model, "model.layers.*.mlp", behaving.Tallies)
    assert {float(layer.mlp.tokens) for layer in model.model.layers} == {0.0}


def test_a_forward_that_takes_more_words_than_keywords_is_called_as_it_takes() -> None:
    class Counted(type(pico.llama())):
        def forward(self, input_ids=None, attention_mask=None, *rest):
            return super().forward(input_ids, attention_mask)

    class Handed(type(pico.llama())):
        def forward(self, input_ids=None, **rest):
            return super().forward(input_ids, **rest)

    plain = pico.llama()
    assert calling.takes(Counted(plain.config)) == {"input_ids", "attention_mask", "rest"}
    assert {"past_key_values", "use_cache"} <= calling.takes(Handed(plain.config))


APPLIES = {
    "llama": ("AutoModelForCausalLM", "model.layers.*.mlp", {"causal", "cache", "crop", "padding"}),
    "bert": ("AutoModelForSequenceClassification", "bert.encoder.layer.*.intermediate", {"padding"}),
    "vit": ("AutoModelForImageClassification", "vit.layers.*.mlp", set[str]()),
}


@pytest.mark.parametrize("family", APPLIES)
def test_a_property_that_says_nothing_of_a_model_is_no_finding(family: str, tmp_path: Path) -> None:
    """An encoder has no cache and looks ahead, a picture has no padding: nothing is left out, and nothing is proved."""
    head, target, applies = APPLIES[family]
    model = families.tiny(family, head)
    edits = solidify.replace(model, target, behaving.Scaled)
    found = {f.name: f for f in solidify.build(model, edits, tmp_path / "out").findings if "behaviour: " in f.name}
    always = {"rows", "stateless", "deterministic", "hidden_states"}
    assert {name.removeprefix("behaviour: ") for name in found} == applies | always
    assert {finding.verdict for finding in found.values()} == {"proved"}


@pytest.mark.parametrize("shape", ["token", "row"])
def test_a_head_without_features_is_watched_or_said_not_to_be(shape: str, tmp_path: Path) -> None:
    class Score(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.out = nn.Linear(config.hidden_size, 1)

        def forward(self, x):
            noisy = self.out(x + torch.randn_like(x)).squeeze(-1)
            return noisy if shape == "token" else noisy.mean(-1, keepdim=True)

    model = pico.llama()
    if shape == "token":
        with pytest.raises(SurgeryError, match="random numbers"):
            solidify.add(model, "score_head", Score, reads="model.norm")
        return
    edits = solidify.add(model, "score_head", wrapped(), reads="model.norm")
    found = {f.name: f.verdict for f in solidify.build(model, edits, tmp_path / "out").findings}
    assert found["behaviour of score_head"] == "not looked at"


def wrapped() -> type:
    """A head of the user's own file that gives a number for a row."""
    return pico.wrappers.RowScore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_holds_nan_is_named_before_anything_is_changed(dtype: torch.dtype) -> None:
    model = pico.llama().to(dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[1, 2] = float("nan")
    words = r"returns NaN before anything is changed: model\.layers\.0\.mlp\.down_proj\.weight holds NaN"
    changes: list[Callable[[], object]] = [
        lambda: solidify.replace(model, "**.o_proj", pico.wrappers.Scaled),
        lambda: solidify.insert(model, "model.layers.1"),
        lambda: solidify.remove(model, "model.layers.1"),
    ]
    for change in changes:
        with pytest.raises(SurgeryError, match=words):
            change()


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e15, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 7), (2, 4, 3, 8)])
def test_the_distance_is_that_of_float64(scale: float, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    wanted = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    found = (wanted.double() + torch.randn(shape, generator=generator, dtype=torch.float64) * scale * 0.05).to(dtype)
    off, whole = found.double() - wanted.double(), wanted.double()
    rows = (off.flatten(2) if off.ndim > 2 else off).square().mean(-1).sqrt()
    assert properties.distance(found, wanted) == pytest.approx(
        float(rows.max() / whole.square().mean().sqrt()), rel=1e-4
    )


def test_a_small_difference_in_float64_is_seen() -> None:
    wanted = torch.randn(2, 4, 8, dtype=torch.float64)
    assert 1e-10 < properties.distance(wanted * (1 + 1e-9), wanted) < 1e-8
    assert properties.distance(wanted * float("nan"), wanted) == properties.FAILED


class _NaNInHalf(nn.Module):
    """An attention that returns NaN in half precision."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = original, nn.Parameter(torch.ones(1))

    def forward(self, *args: object, **kwargs: object) -> object:
        first, *rest = self.inner(*args, **kwargs)
        return (first * self.scale * (float("nan") if first.dtype == torch.bfloat16 else 1.0), *rest)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_masks_of_the_lowest_number_do_not_hide_half_precision(kernel: str) -> None:
    """An eager mask holds the lowest float32, which bfloat16 would round to infinity, and a padded row to NaN."""
    model = pico.llama(attn_implementation=kernel)
    with pytest.raises(SurgeryError, match="bfloat16"):
        solidify.replace(model, "model.layers.*.self_attn", _NaNInHalf)
    solidify.replace(model, "model.layers.*.self_attn", behaving.Scaled)


def test_what_sees_ahead_in_a_row_alone_before_is_no_fault_of_a_later_change() -> None:
    model = pico.llama()
    declared = dict.fromkeys(("causal", "rows", "cache", "padding"), False)
    solidify.replace(model, "model.layers.*.self_attn", behaving.PeekingAlone, declares=declared)
    assert solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled)
