"""Declared masks: what a change of one position moves is exactly what the mask allows, or the mask is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
import zoo
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

import solidify
from solidify.behaviour.properties import PROPERTIES
from solidify.checks import structure
from solidify.command import views
from solidify.errors import SurgeryError
from solidify.model import anatomy
from solidify.surgery import influence, masking

KINDS: dict[str, dict[str, int]] = {
    "causal": {},
    "bidirectional": {},
    "block_causal": {"block": 3},
    "window": {"window": 3, "sinks": 2},
}
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "olmoe")
ONE = {"gemma3": {"layer_types": ["full_attention"]}}
LENGTH = 12


def padded(padding: int, length: int = LENGTH) -> torch.Tensor:
    """An attention mask of two rows, the second padded on the left."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :padding] = 0
    return mask


def meant(kind: str, mask: torch.Tensor, *, width: int | None = None, **numbers: int) -> torch.Tensor:
    """Which position of each row sees which, in one layer; `width` is a window of the layer's own, without sinks."""
    found = torch.zeros(*mask.shape, mask.shape[1], dtype=torch.bool)
    for row, real in enumerate(mask.tolist()):
        start = real.index(1)
        for i in range(start, len(real)):
            for j in range(start, len(real)):
                a, b = i - start, j - start
                sees = {
                    "causal": b <= a,
                    "bidirectional": True,
                    "block_causal": b // numbers.get("block", 1) <= a // numbers.get("block", 1),
                    "window": b <= a
                    and (a - b < numbers.get("window", 0) or (width is None and b < numbers.get("sinks", 0))),
                }[kind]
                found[row, i, j] = sees and (width is None or abs(a - b) < width)
    return found


def composed(*layers: torch.Tensor) -> torch.Tensor:
    """What layers see one after the other, each beside what a position is already."""
    reach = torch.eye(layers[0].shape[-1], dtype=torch.bool).expand_as(layers[0])
    for layer in layers:
        own = layer | torch.eye(layer.shape[-1], dtype=torch.bool)
        reach = (own.double() @ reach.double()) > 0
    return reach


@torch.no_grad()
def moved(model: Any, mask: torch.Tensor) -> torch.Tensor:
    """By row, at [i, j]: whether a change of the embedding at j moves the output at i."""
    rows, length = mask.shape
    inputs = torch.randn(rows, length, 64, generator=torch.Generator().manual_seed(3), dtype=model.dtype)
    plain = model(inputs_embeds=inputs, attention_mask=mask).logits
    floor = 1e-10 if model.dtype == torch.float64 else 2e-5 * float(plain.std())
    found = torch.zeros(rows, length, length, dtype=torch.bool)
    for j in range(length):
        changed = inputs.clone()
        changed[:, j] += torch.linspace(-1, 1, 64)
        found[:, :, j] = (model(inputs_embeds=changed, attention_mask=mask).logits - plain).abs().amax(-1) > floor
    return found & mask.bool()[:, :, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_moves_exactly_what_the_mask_lets_see_it(name: str, kind: str) -> None:
    """One layer is the mask itself, two are its composition; a padded position moves nothing that is real."""
    one = zoo.model(name, dtype=torch.float64, num_hidden_layers=1, **ONE.get(name, {}))
    two = zoo.model(name, attention="eager")
    for model in (one, two):
        edits = solidify.mask(model, kind, **KINDS[kind])
        assert [edit.operation for edit in edits] == ["mask"] * model.config.num_hidden_layers
        assert all(edit.probed and not edit.dropped and None not in edit.tensors.values() for edit in edits)
    for padding in (0, 4):
        mask = padded(padding)
        layer = meant(kind, mask, **KINDS[kind])
        assert torch.equal(moved(one, mask), layer | torch.eye(LENGTH, dtype=torch.bool) & mask.bool()[:, :, None])
        slid = meant(kind, mask, width=8, **KINDS[kind]) if name == "gemma3" else layer
        assert torch.equal(moved(two, mask), composed(slid, layer) & mask.bool()[:, :, None])


def test_what_looks_ahead_declares_it_and_is_generated_from_without_a_cache() -> None:
    for kind in KINDS:
        model = zoo.model("qwen3")
        edits = solidify.mask(model, kind, **KINDS[kind])
        ahead = kind in ("bidirectional", "block_causal")
        assert all(edit.declares == ({"causal": False, "cache": False} if ahead else {}) for edit in edits)
        assert model.config.use_cache is model.generation_config.use_cache is (not ahead)
        assert getattr(model.config, "is_causal", True) is (kind != "bidirectional")
        if ahead:
            text = model.generate(**zoo.prompts(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
            assert text.shape == (2, 15)
            with pytest.raises(ValueError, match="keeps no cache"):
                model(**zoo.prompts(), use_cache=True)
        else:
            zoo.assert_cache_changes_nothing(model)


def test_single_layers_may_have_a_mask_of_their_own() -> None:
    model = zoo.model("llama", dtype=torch.float64)
    surgery = solidify.Surgery(model)
    surgery.mask("bidirectional", "model.layers.1")
    surgery.mask("window", "model.layers.0.self_attn", window=2)
    assert getattr(model.config, "is_causal", True) is True
    for padding in (0, 4):
        mask = padded(padding)
        expected = composed(meant("window", mask, window=2), meant("bidirectional", mask))
        assert torch.equal(moved(model, mask), expected & mask.bool()[:, :, None])
    assert [edit.name for edit in surgery.edits] == ["model.layers.1.self_attn", "model.layers.0.self_attn"]


def test_a_later_mask_takes_the_place_of_an_earlier_one() -> None:
    model = zoo.model("llama", dtype=torch.float64)
    mask = padded(3)
    for kind in ("window", "bidirectional", "block_causal", "bidirectional", "causal", "window"):
        solidify.mask(model, kind, **KINDS[kind])
        layer = meant(kind, mask, **KINDS[kind])
        assert torch.equal(moved(model, mask), composed(layer, layer) & mask.bool()[:, :, None]), kind


def test_a_mask_stays_when_its_attention_is_replaced_or_its_layer_moved() -> None:
    model = zoo.model("llama", dtype=torch.float64)
    solidify.mask(model, "block_causal", block=3)
    solidify.insert(model, "model.layers.0")
    solidify.remove(model, "model.layers.2")
    solidify.replace(model, "**.self_attn", Deaf, arguments={"deaf": False})
    layer = meant("block_causal", padded(4), block=3)
    assert torch.equal(moved(model, padded(4)), composed(layer, layer) & padded(4).bool()[:, :, None])


@pytest.mark.parametrize("kind", ["block_causal", "window"])
@torch.no_grad()
def test_packed_texts_do_not_see_each_other(kind: str) -> None:
    model = zoo.model("llama")
    solidify.mask(model, kind, **KINDS[kind])
    ids = zoo.prompts(20)["input_ids"][:1]
    places = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
    alone = [model(input_ids=part).logits for part in (ids[:, :8], ids[:, 8:])]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-4)


class Deaf(LlamaAttention):
    """Does not listen to its mask, unless it is told to."""

    def __init__(self, config: Any, layer_idx: int, original: nn.Module, deaf: bool = True) -> None:
        super().__init__(config, layer_idx)
        self.deaf = deaf

    def adopt(self, original: nn.Module) -> None:
        """Takes the weights over."""
        self.load_state_dict(original.state_dict())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attends."""
        if self.deaf:
            kwargs["attention_mask"] = None
        return super().forward(*args, **kwargs)


def state_of(model: PreTrainedModel) -> Any:
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    return model.config.to_dict(), model.generation_config.to_dict(), hooks, model(**zoo.prompts()).logits.tolist()


@pytest.mark.parametrize("name", ["gpt_neo", "mamba2", "jamba"])
def test_a_family_that_does_not_obey_is_refused_and_put_back(name: str) -> None:
    model = families.tiny(name)
    before = state_of(model)
    said = {"gpt_neo": "a change at position 1 does not move position 0", "mamba2": "has no attention that takes"}
    for kind in ("bidirectional", "block_causal"):
        with pytest.raises(SurgeryError, match=said.get(name, "have no attention that takes a mask; name the layers")):
            solidify.mask(model, kind, **KINDS[kind])
    assert state_of(model) == before


def test_a_module_that_ignores_its_mask_is_refused_and_its_twin_is_not() -> None:
    for kind in ("bidirectional", "block_causal", "window"):
        model = zoo.model("llama")
        solidify.replace(
            model, "model.layers.1.self_attn", Deaf, declares={"padding": False, "causal": False, "cache": False}
        )
        before = state_of(model)
        with pytest.raises(SurgeryError, match=r"layers.1.self_attn \(Deaf\): a change at position .* move"):
            solidify.mask(model, kind, **KINDS[kind])
        assert state_of(model) == before
        solidify.mask(model, kind, "model.layers.0", **KINDS[kind])


def test_a_mask_that_is_off_by_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = masking.set_masks

    def wrong(model: Any, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
        more = {key: edit[key] + 1 for key in ("block", "window") if edit[key] is not None}
        right(model, names, {**edit, **more}, classes)

    monkeypatch.setattr(masking, "set_masks", wrong)
    for kind, said in (("block_causal", "moves"), ("window", "moves")):
        with pytest.raises(SurgeryError, match=rf"a change at position \d+ {said} position"):
            solidify.mask(zoo.model("llama"), kind, **KINDS[kind])


def test_what_mixes_positions_beside_the_attentions_is_refused() -> None:
    ahead = "otherwise than through its layers even without the mask: a change at position 1 moves position 0"
    for turned, words in ((False, "the whole model: a change at position 0 moves position"), (True, ahead)):
        model = zoo.model("llama")
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda _m, args, turned=turned: (args[0].flip(1).cumsum(1).flip(1) if turned else args[0].cumsum(1),)
        )
        with pytest.raises(SurgeryError, match=words):
            solidify.mask(model, "window", window=2)


def test_a_mask_that_holds_a_bias_says_nothing_of_positions_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model("llama", attention="eager")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"] - 0.5}),
            with_kwargs=True,
        )
    with pytest.raises(SurgeryError, match="add to the scores by their mask"):
        solidify.mask(model, "block_causal", block=3)
    solidify.mask(model, "window", window=3)


def test_attention_without_a_mask_of_queries_and_keys_is_refused_when_it_is_called() -> None:
    model = zoo.model("llama")
    solidify.mask(model, "window", window=3)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="needs attention by 'sdpa' or 'eager'"):
        model.model.layers[0].self_attn(torch.randn(1, 4, 64), position_embeddings=None, attention_mask=None)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("sideways", {}, "there is no mask 'sideways'; there are causal, bidirectional"),
        ("window", {}, "the mask window needs 'window'"),
        ("block_causal", {"block": 0}, "'block' is 0, but is a whole number of at least 1"),
        ("causal", {"window": 3, "sinks": 1}, "'window' is no number of the mask causal"),
        ("window", {"window": True}, "'window' is True"),
        ("causal", {"target": "model.layers.9"}, "names no module"),
        ("causal", {"target": "model.layers.0.mlp"}, "is and holds no attention"),
        ("causal", {"expect": "GPT2Attention"}, "is LlamaAttention, but GPT2Attention was expected"),
    ],
)
def test_what_does_not_fit_is_said(kind: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SurgeryError, match=said):
        solidify.mask(zoo.model("llama"), kind, **options)


def test_a_wide_mask_keeps_the_model_bit_for_bit() -> None:
    model = zoo.model("gpt2")
    before = model(**zoo.prompts(16)).logits
    solidify.mask(model, "window", window=14, sinks=2)
    assert torch.equal(model(**zoo.prompts(16)).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_wide_and_stays_what_it_is(dtype: torch.dtype) -> None:
    model = zoo.model("llama", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    solidify.mask(model, "block_causal", block=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_of_a_large_model_the_first_attention_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(anatomy, "LARGE", 0)
    model = zoo.model("llama")
    artifact = solidify.build(model, solidify.mask(model, "block_causal", block=4), tmp_path / "artifact")
    assert not [finding for finding in artifact.findings if finding.passed is False]
    deaf = zoo.model("llama")
    for layer in deaf.model.layers:
        layer.self_attn.forward = lambda hidden_states, attention_mask=None, **_: (hidden_states.cumsum(1), None)
    with pytest.raises(SurgeryError, match="does not obey"):
        solidify.mask(deaf, "block_causal", block=4)


def test_compositions_count_steps() -> None:
    layer = torch.diag(torch.ones(influence.LENGTH - 1), -1).bool()
    every, two = influence.compose([layer] * 4)
    assert every.tril(-5).any() == two.tril(-3).any() == False  # noqa: E712
    assert every.diagonal(-4).all() and two.diagonal(-2).all()


FRESH = """
import json, sys
sys.modules["solidify"] = sys.modules["peft"] = None
import torch, transformers
for directory in sys.argv[1:]:
    found = []
    for auto in ("AutoModelForCausalLM", "AutoModel"):
        model = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True).double()
        ids = torch.arange(10, 20).repeat(11, 1)
        ids[range(10), range(10)] = 99
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        found.append(((states[:10] - states[10]).abs().amax(-1) > 1e-9).T.tolist())
    assert found[0] == found[1]
    text = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    told = text.generate(torch.arange(10, 20)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    print(json.dumps({"moved": found[0], "cache": text.config.use_cache, "told": told.tolist()}))
"""


@pytest.mark.slow
def test_artifacts_obey_in_a_fresh_process_and_go_on(tmp_path: Path) -> None:
    """Two by the carried function, one by the configuration; one of them is operated on again after it was loaded."""
    made = {}
    for name, kind in (("llama", "bidirectional"), ("gemma3", "block_causal"), ("gpt2", "window")):
        model = zoo.model(name)
        made[kind] = model, pico.artifact(model, solidify.mask(model, kind, **KINDS[kind]), tmp_path / kind)
    again = solidify.load(made["bidirectional"][1])
    made["causal"] = again, pico.artifact(again, solidify.mask(again, "causal"), tmp_path / "causal")
    command = [sys.executable, "-c", FRESH, *(str(directory) for _, directory in made.values())]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    for (kind, (model, directory)), line in zip(made.items(), lines, strict=True):
        answer = json.loads(line)
        mask = torch.ones(1, 10, dtype=torch.long)
        layer = meant(kind, mask, **KINDS[kind])
        slid = meant(kind, mask, width=8, **KINDS[kind]) if kind == "block_causal" else layer
        assert torch.equal(torch.tensor([answer["moved"]]), composed(slid, layer)), kind
        ids = torch.arange(10, 20)[None]
        told = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert told.tolist() == answer["told"]
        assert answer["cache"] is (kind == "window")
        loaded = solidify.load(directory)
        assert torch.equal(loaded(**zoo.prompts()).logits, model(**zoo.prompts()).logits)
        assert structure.structure(loaded, json.loads((directory / "solidify.json").read_text())["edits"][-2:]).passed


def test_build_witnesses_it_and_the_card_says_what_is_declared(tmp_path: Path) -> None:
    model = zoo.model("llama")
    surgery = solidify.Surgery(model)
    surgery.mask("block_causal", block=32)
    artifact = surgery.build(tmp_path / "artifact")
    assert not [finding for finding in artifact.findings if finding.passed is False]
    card = (artifact.directory / "README.md").read_text()
    assert "mask block_causal, block 32" in card
    assert "`causal`: no position sees a later one" in card and "It generates without a cache, and refuses one" in card
    entry = json.loads((artifact.directory / "config.json").read_text())["surgery"]
    assert len(entry) == 1 and entry[0]["block"] == 32 and len(entry[0]["modules"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bidirectional", "block_causal"])
def test_lora_trains_on_it_also_with_checkpointing_and_is_merged(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    model = zoo.model("llama")
    artifact = pico.artifact(model, solidify.mask(model, kind, **KINDS[kind]), tmp_path / "artifact")
    ids = pico.tokens(2, LENGTH, seed=7)
    labels = torch.where(torch.arange(LENGTH) % 3 == 0, ids, -100)  # as in masked next-token prediction
    losses = []
    for checkpointing in (False, True):
        attached = solidify.attach(
            solidify.load(artifact), lora={"r": 4, "target_modules": ["model.layers.*.self_attn.q_proj"]}
        )
        attached.train()
        if checkpointing:
            attached.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW([p for p in attached.parameters() if p.requires_grad], lr=0.02)
        torch.manual_seed(0)
        for _ in range(4):
            optimizer.zero_grad()
            loss = attached(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3] < losses[0] and losses[7] < losses[4]
    attached.eval()
    solidify.save_adapter(attached, tmp_path / "adapter")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    merged = solidify.load(tmp_path / "merged").double()
    layer = meant(kind, padded(4), **KINDS[kind])
    assert torch.equal(moved(merged, padded(4)), composed(layer, layer) & padded(4).bool()[:, :, None])


def test_a_window_lives_a_whole_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.unwitnessed(monkeypatch)
    model = zoo.model("llama")
    edits = solidify.mask(model, "window", window=4, sinks=2)
    zoo.whole_life(model, edits, tmp_path, lora=["model.layers.*.self_attn.q_proj"])


STEPS = """
base: {model: base}
surgery:
  - mask: bidirectional
  - {mask: block_causal, block: 32}
  - {mask: window, window: 64, sinks: 4, layers: model.layers.1, expect: LlamaAttention}
"""


def test_a_recipe_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.unwitnessed(monkeypatch)
    zoo.model("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(STEPS)
    plan = solidify.plan(tmp_path / "recipe.yaml")
    assert [edit.arguments for edit in plan.edits[::2]] == [
        {"mask": "bidirectional"},
        {"mask": "block_causal", "block": 32},
        {"mask": "window", "window": 64, "sinks": 4},
    ]
    declared = list(views._show_declared([edit.document() for edit in plan.edits]))
    assert any("causal is not kept, as declared" in str(line) for line in declared)
    artifact = solidify.build(tmp_path / "recipe.yaml", directory=tmp_path / "out")
    model = solidify.load(artifact.directory)
    assert model.config.use_cache is False and model.config.is_causal is True


def test_what_a_recipe_says_wrongly_is_said(tmp_path: Path) -> None:
    steps = ("{mask: window}", "{mask: causal, block: 3}", "{mask: sideways}", "{mask: causal, sink: 3}")
    for step, said in zip(
        steps,
        ("needs 'window'", "no number of the mask causal", "Input should be 'causal'", "known here: mask"),
        strict=True,
    ):
        (tmp_path / "recipe.yaml").write_text(f"base: {{model: base}}\nsurgery:\n  - {step}\n")
        with pytest.raises(solidify.RecipeError, match=said):
            solidify.plan(tmp_path / "recipe.yaml")


class Around(nn.Module):
    """Every position gets the mean of all real ones, or of all, if it does not obey."""

    def __init__(self, config: Any, obeys: bool = True) -> None:
        super().__init__()
        self.out, self.obeys = nn.Linear(config.hidden_size, config.hidden_size), obeys

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **_: Any) -> Any:
        """Mixes."""
        real = hidden_states.new_ones(hidden_states.shape[:2])
        if self.obeys and attention_mask is not None:
            real = (attention_mask[:, 0, -1] == (True if attention_mask.dtype == torch.bool else 0)).to(real)
        mean = (hidden_states * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
        return self.out(mean.expand_as(hidden_states)), None


def test_padding_on_the_left_is_tried_of_what_looks_ahead() -> None:
    """A longer text is no measure of it, because its end shows in the rest."""
    declares = {"causal": False}
    solidify.replace(zoo.model("llama"), "**.layers.0.self_attn", Around, declares=declares)
    with pytest.raises(SurgeryError, match="padding reaches what is not padding"):
        solidify.replace(
            zoo.model("llama"), "**.layers.0.self_attn", Around, declares=declares, arguments={"obeys": False}
        )
    assert PROPERTIES["padding"]


@pytest.mark.parametrize("kind", ["causal", "block_causal", "window"])
def test_a_mask_is_obeyed_under_eager_where_the_family_gives_none(kind: str) -> None:
    """An encoder gives its attentions no mask for texts of one length, and eager attention adds what it is given."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = pico.make("BertForMaskedLM", **sizes, intermediate_size=48, initializer_range=0.3)
    solidify.mask(model, kind, **KINDS[kind])
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 100
    found = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found[implementation] = model(ids).logits
            moved = (model(other).logits - found[implementation]).abs().amax((0, 2))
        seen = 9 if kind == "block_causal" else 11  # the last block is seen by its own positions
        assert moved[:seen].max() == 0 and moved[seen:].max() > 1e-6, implementation
    assert torch.allclose(found["sdpa"], found["eager"], atol=1e-5)


def test_blocks_are_counted_through_a_gap_in_the_text() -> None:
    """A padded prompt with more after it is one text: what follows the gap begins no second one."""
    model = pico.llama(num_hidden_layers=1, dtype=torch.float64)
    solidify.mask(model, "block_causal", block=4)
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[0, 3:6] = 0
    embedded = model.get_input_embeddings()(torch.randint(3, 60, (1, 14), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        before = model(inputs_embeds=embedded, attention_mask=mask).logits
        for j in (0, 1, 2, *range(6, 14)):
            changed = embedded.clone()
            changed[0, j] += 1.0
            moved = (model(inputs_embeds=changed, attention_mask=mask).logits - before).abs().amax(-1)[0] > 1e-12
            for i in (0, 1, 2, *range(6, 14)):
                assert bool(moved[i]) == (j // 4 <= i // 4), (i, j)


def test_blocks_that_chunks_of_a_text_would_cut_are_refused() -> None:
    sizes = {
        **pico.SIZES,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "intermediate_size_mlp": 32,
        "head_dim": 8,
    }
    more = {"num_local_experts": 2, "attention_chunk_size": 32, "layer_types": ["chunked_attention", "full_attention"]}
    model = pico.make("Llama4ForCausalLM", **sizes, **more)
    with pytest.raises(SurgeryError, match="sees chunks of 32 positions, which blocks of 5 do not fill"):
        solidify.mask(model, "block_causal", block=5)
