"""Modules that keep state in the cache: generation is right for hybrids of old and new layers."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import stateful
import torch
import zoo
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

import solidify
from solidify.command import views
from solidify.model import cache_layers

FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "gpt2")
KINDS = (stateful.RunningSum, stateful.ShortConvolution, stateful.SummedAttention)


def change(name: str, cls: Any = stateful.RunningSum, where: str = "*", **options: Any) -> tuple[Any, Any]:
    """A tiny model with stateful modules in some of its two layers."""
    model, family = zoo.model(name, **options), zoo.FAMILIES[name]
    target = f"{family.layers}.{where}.{family.attention_name}"
    return model, solidify.replace(model, target, cls)


def beams(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    """Text by beam search over two rows, one padded on the left: beams are reordered in the cache."""
    asked = {"num_beams": 3, "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    return model.generate(**zoo.prompts(10), **asked, **options)


@pytest.mark.parametrize("where", ["0", "1", "*"])
@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_generates_with_the_cache_what_it_generates_without(name: str, cls: Any, where: str) -> None:
    model, _ = change(name, cls, where)
    zoo.assert_cache_changes_nothing(model)
    assert torch.equal(beams(model), beams(model, use_cache=False))


@pytest.mark.parametrize("where", ["0", "*"])
@pytest.mark.parametrize("cls", KINDS)
def test_a_static_cache_serves_too(cls: Any, where: str) -> None:
    model, _ = change("llama", cls, where)
    assert torch.equal(beams(model, cache_implementation="static"), beams(model, use_cache=False))


def test_a_static_cache_that_would_be_wrong_is_refused() -> None:
    model, _ = change("gemma3", stateful.SummedAttention, "1")
    with pytest.raises(ValueError, match="use a dynamic cache"):
        beams(model, cache_implementation="static")


@pytest.mark.parametrize(
    ("name", "cls", "where", "kinds"),
    [
        ("llama", stateful.RunningSum, "0", ["linear_attention", "full_attention"]),
        ("llama", stateful.RunningSum, "*", ["hybrid", "linear_attention"]),  # one must know the length
        ("llama", stateful.SummedAttention, "1", ["full_attention", "hybrid"]),
        ("mistral", stateful.ShortConvolution, "0", ["conv", "sliding_attention"]),
        ("mistral", stateful.SummedAttention, "1", ["sliding_attention", "hybrid_sliding"]),
        ("gemma3", stateful.RunningSum, "*", ["sliding_attention", "full_attention"]),  # the family reads the list
    ],
)
def test_the_configuration_names_the_layers_of_the_cache(name: str, cls: Any, where: str, kinds: list[str]) -> None:
    model, edits = change(name, cls, where)
    assert model.config.layer_types == kinds
    assert edits[0].settings["layer_type"] == cls.layer_type


def test_a_cache_made_from_the_configuration_is_right_from_the_start() -> None:
    model, _ = change("llama", where="0")
    cache = DynamicCache(config=model.config)
    assert [type(layer) for layer in cache.layers] == [LinearAttentionLayer, DynamicLayer]
    model(**zoo.prompts(6), past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [cache_layers.Counted, DynamicLayer]
    assert cache.get_seq_length() == cache.get_seq_length(1) == 6


def test_a_cache_without_a_configuration_gets_the_layer_at_the_first_call() -> None:
    model, _ = change("qwen3", where="1")
    inputs = zoo.prompts(6)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(**inputs).logits
        first = model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache).logits
        second = model(ids[:, 4:], attention_mask=mask, past_key_values=cache).logits
    assert torch.allclose(torch.cat([first, second], 1)[0], whole[0], atol=1e-5)
    assert isinstance(cache.layers[1], cache_layers.Counted)


def test_a_cache_that_another_model_filled_is_refused() -> None:
    model, _ = change("qwen3")
    cache = DynamicCache()
    zoo.model("qwen3")(**zoo.prompts(6), past_key_values=cache)
    with pytest.raises(ValueError, match="start with an empty cache"):
        model(**zoo.prompts(6), past_key_values=cache)


def test_no_position_is_taken_back_from_a_sum() -> None:
    model, edits = change("llama", where="0")
    assert edits[0].declares == {"crop": False}
    cache = DynamicCache(config=model.config)
    model(**zoo.prompts(6), past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match="none can be taken back"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(pico.tokens(1, 8, seed=3), prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_a_convolution_is_taken_back() -> None:
    model, edits = change("llama", stateful.ShortConvolution)
    assert edits[0].declares == {}
    ids = pico.tokens(1, 8, seed=3)
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **asked), model.generate(ids, **asked))


class Stale(stateful.RunningSum):
    """Forgets to read the state that was kept."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states, attention_mask)


class Hoarding(stateful.ShortConvolution):
    """Keeps a state in a kind of layer that transformers takes positions back from, and does not give it back."""

    sum: torch.Tensor

    layer_type = "full_attention"

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None:
            return hidden_states.cumsum(1), None
        state: torch.Tensor = self.sum if cache.get_seq_length(self.layer_idx) else 0 * hidden_states[:, :1]
        outputs = hidden_states.cumsum(1) + state[: len(hidden_states)]
        self.sum = outputs[:, -1:]
        cache.update(hidden_states[:, None], hidden_states[:, None], self.layer_idx)
        return outputs, None


def test_a_state_that_is_not_kept_is_refused_and_leaves_no_trace() -> None:
    model = zoo.model("llama")
    before = dict(vars(model.config))
    with pytest.raises(solidify.SurgeryError, match="keeps a cache"):
        solidify.replace(model, "model.layers.0.self_attn", Stale)
    assert dict(vars(model.config)) == before
    assert "create_masks_for_generate" not in vars(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_state_beside_the_cache_is_refused() -> None:
    with pytest.raises(solidify.SurgeryError, match="cache"):
        change("llama", Hoarding, "0")


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (type("Unknown", (stateful.RunningSum,), {"layer_type": "recurent"}), "no kind of cache layer"),
        (type("Numberless", (stateful.RunningSum,), {"__init__": lambda self, config: None}), "layer_idx"),
    ],
)
def test_a_declaration_that_cannot_be_kept_is_refused(cls: Any, words: str) -> None:
    if cls.__name__ == "Numberless":

        def init(self: Any, config: Any) -> None:
            stateful.RunningSum.__init__(self, config, 0)
            del self.layer_idx

        cls.__init__ = init
    with pytest.raises(solidify.SurgeryError, match=words):
        solidify.replace(zoo.model("llama"), "model.layers.*.self_attn", cls)


def test_rows_are_selected_and_repeated_with_their_states() -> None:
    for cls in (stateful.RunningSum, stateful.SummedAttention):
        model, _ = change("llama", cls, "0")
        cache = DynamicCache(config=model.config)
        model(**zoo.prompts(6), past_key_values=cache)
        state = cache.layers[0].recurrent_states[0].clone()
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.layers[0].recurrent_states[0], state.repeat_interleave(2, 0))
        cache.batch_select_indices(torch.tensor([3]))
        assert torch.equal(cache.layers[0].recurrent_states[0], state[1:])
        assert cache.layers[1].keys.shape[0] == 1
        cache.layers[0].offload()
        cache.layers[0].prefetch()
        assert cache.get_seq_length() == 6
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.get_recurrent_state(0) is None
        assert isinstance(cache.layers[0], LinearAttentionAndFullAttentionLayer) == (cls is stateful.SummedAttention)


def test_a_second_surgery_adds_to_what_an_artifact_keeps(tmp_path: Path) -> None:
    model, edits = change("llama", where="0", num_hidden_layers=3)
    model = solidify.load(pico.artifact(model, edits, tmp_path / "first"))
    more = solidify.replace(model, "model.layers.1.self_attn", stateful.SummedAttention)
    more += solidify.remove(model, "model.layers.2")
    expected = beams(model)
    model = solidify.load(pico.artifact(model, more, tmp_path / "second"))
    assert model.config.layer_types == ["linear_attention", "hybrid"]
    assert torch.equal(beams(model), expected)
    assert torch.equal(beams(model, use_cache=False), expected)


def test_the_decoder_of_two_stacks_keeps_state() -> None:
    sizes = {
        f"{stack}_{key}": value
        for stack in ("encoder", "decoder")
        for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    model = pico.make("BartForConditionalGeneration", vocab_size=128, d_model=32, decoder_start_token_id=2, **sizes)
    solidify.replace(model, "model.decoder.layers.0.self_attn", stateful.SummedAttention)
    assert torch.equal(beams(model), beams(model, use_cache=False))


def test_layers_that_are_removed_take_their_kind_along() -> None:
    model, _ = change("llama", where="0", num_hidden_layers=3)
    solidify.remove(model, "model.layers.1")
    assert model.config.layer_types == ["linear_attention", "full_attention"]
    zoo.assert_cache_changes_nothing(model)
    solidify.remove(model, "model.layers.0")
    assert model.config.layer_types == ["full_attention"]
    zoo.assert_cache_changes_nothing(model)


ALONE = """
import sys, torch
sys.modules["solidify"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = torch.load(sys.argv[2])
asked = dict(num_beams=3, max_new_tokens=7, min_new_tokens=7, do_sample=False)
print(model.generate(**inputs, **asked).tolist() == model.generate(**inputs, **asked, use_cache=False).tolist())
print(model.generate(**inputs, **asked).tolist(), model.config.layer_types)
"""


@pytest.mark.parametrize(("name", "where"), [("llama", "*"), ("gemma3", "0")])
def test_an_artifact_generates_right_without_us(name: str, where: str, tmp_path: Path) -> None:
    model, edits = change(name, where=where)
    artifact = pico.artifact(model, edits, tmp_path / "artifact")
    torch.save(zoo.prompts(10), tmp_path / "inputs")
    arguments = [sys.executable, "-c", ALONE, str(artifact), str(tmp_path / "inputs")]
    told = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == ["True", f"{beams(model).tolist()} {model.config.layer_types}"]
    card = (artifact / "README.md").read_text()
    assert "positions can be taken back" in card
    assert "State of their own in the cache: `" in card
    assert "transformers 5.23 or later" in card


@pytest.mark.slow
def test_the_whole_life_of_a_running_sum(tmp_path: Path) -> None:
    model, edits = change("llama", where="0")
    zoo.whole_life(model, edits, tmp_path, lora=["**.q_proj"], train=["**.inward"])


def test_a_plan_says_what_keeps_state() -> None:
    _, edits = change("llama")
    shown = views.plan({"edits": [edit.document() for edit in edits]})
    _, kept, lost = itertools.islice(shown, 3)
    assert "keeps state of its own in the cache (a linear_attention layer)" in str(kept)
    assert "crop is not kept, as declared" in str(lost)


def test_a_family_that_names_the_list_otherwise_keeps_it() -> None:
    """Falcon-H1's `layer_types` is a property of another name; its layers keep a state, which nothing overwrites."""
    sizes = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    settings = {**zoo.SIZES, **zoo.SPECIAL, **zoo.GROUPED, **zoo.FEED_FORWARD, **sizes, "mamba_chunk_size": 16}
    model = pico.make("FalconH1ForCausalLM", **settings)
    before = list(model.config.layer_types)
    with pytest.raises(solidify.SurgeryError, match="something else filled"):
        solidify.replace(model, "model.layers.0.self_attn", stateful.SummedAttention)
    assert list(model.config.layer_types) == before


def test_weights_that_are_declared_away_may_be_none_in_eager_attention() -> None:
    model = zoo.model("llama", attention="eager")
    with pytest.raises(solidify.SurgeryError, match="return the same structure"):
        solidify.replace(model, "model.layers.0.self_attn", stateful.RunningSum)
    solidify.replace(model, "model.layers.0.self_attn", stateful.RunningSum, declares={"attentions": False})
    zoo.assert_cache_changes_nothing(model)
    with pytest.raises(ValueError, match="does not record all attentions"):
        model(**zoo.prompts(), output_attentions=True)


def test_of_a_bounded_model_later_layers_of_the_cache_are_not_asked() -> None:
    """The model is left after the first module of a kind; what the cache has for later layers was never filled."""
    from solidify.model.extent import Extent
    from solidify.modules.linear_attention import LinearAttention, WindowAndSum

    class Keeping(WindowAndSum):
        """Takes nothing back."""

        def crop(self, tokens_to_remove: int) -> None:
            pass

    class Planted(LinearAttention):
        layer_type = Keeping

    bounded: dict[str, Any] = {"arguments": {"window": 4}, "extent": Extent(whole=False)}
    edits = solidify.replace(zoo.model("llama"), "model.layers.*.self_attn", LinearAttention, **bounded)
    assert "crop" not in edits[0].declares
    with pytest.raises(solidify.SurgeryError, match="gives something else than the whole"):
        solidify.replace(zoo.model("llama"), "model.layers.*.self_attn", Planted, **bounded)
