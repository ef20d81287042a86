"""Draft heads: what they start as, that drafting is what was trained, and that the text stays the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch
import zoo
from torch.nn import functional as F
from transformers import DynamicCache, StoppingCriteria

import solidify
import training
from solidify import losses
from solidify.errors import ObjectiveError, SurgeryError
from solidify.modules import draft_head
from solidify.modules.draft_head import DraftHead, Drafting, MultiTokenHead
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective, Term
from solidify.training.trainer import ObjectiveTrainer

READS = ["model.layers.0", "model.layers.1", "model.norm"]
HEADS = ["draft", "medusa"]
KINDS = ["linear_attention", "full_attention"]
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mlp_only_layers": [0, 1],
}


def with_heads(model: Any, norm: str = "model.norm", layers: str = "model.layers", **arguments: Any) -> Any:
    """Adds one head of each kind."""
    reads = [f"{layers}.0", f"{layers}.1", norm]
    solidify.add(model, "draft", DraftHead, reads=reads, arguments={"sources": 3, **arguments})
    solidify.add(model, "medusa", MultiTokenHead, reads=norm, arguments=arguments)
    return model


def head_of(model: Any, name: str) -> Drafting:
    found = model.get_submodule(name)
    assert isinstance(found, Drafting)
    return found


def random_layer(head: DraftHead) -> DraftHead:
    """Gives the projections that start at zero other values."""
    zoo.stir(head, ["o_proj.weight", "down_proj.weight"], scale=0.2)
    return head


def config(**settings: Any) -> Any:
    return SimpleNamespace(**{"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, **settings})


@pytest.mark.parametrize("name", HEADS)
def test_a_head_starts_by_saying_what_the_model_says(name: str) -> None:
    model = with_heads(zoo.model("llama"))
    outputs = model(**zoo.prompts(), output_hidden_states=True)
    embeddings = model.get_input_embeddings()(zoo.prompts()["input_ids"])
    unrolled = head_of(model, name).unroll(outputs[name], embeddings, zoo.prompts()["attention_mask"])
    assert len(unrolled) == head_of(model, name).drafts
    for states in unrolled:
        assert torch.equal(states, outputs.hidden_states[-1])
        assert torch.equal(model.lm_head(states), outputs.logits)


def test_the_medusa_head_is_its_formula_in_float64() -> None:
    head = MultiTokenHead(config(), drafts=2).double()
    zoo.stir(head, ["weight", "bias"])
    hidden = torch.randn(2, 5, 16, dtype=torch.float64)
    for index, block in enumerate(head.blocks):
        linear = hidden @ block.weight.T + block.bias
        assert torch.allclose(head(hidden)[:, :, index], hidden + linear / (1 + torch.exp(-linear)), rtol=1e-12)


def test_rotary_positions_are_transformers_own() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, positions = torch.randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    angles = positions[..., None] * 10000.0 ** (-torch.arange(4) / 4)
    angles = torch.cat([angles, angles], dim=-1)
    expected, _ = apply_rotary_pos_emb(query, query, angles.cos(), angles.sin())
    assert torch.allclose(draft_head.rotate(query, positions, 10000.0), expected, atol=1e-6)


def test_the_first_step_is_a_decoder_layer_without_a_look_ahead() -> None:
    """The first step at t sees features until t and embeddings until t + 1; the second one embedding more."""
    head = random_layer(DraftHead(config(), drafts=2)).double()
    features, embeddings = torch.randn(2, 1, 9, 16, dtype=torch.float64)
    before = head.unroll(features, embeddings)
    for at in range(9):
        changed = features.clone()
        changed[:, at] += 1
        for old, new in zip(before, head.unroll(changed, embeddings), strict=True):
            moved = (old - new).abs().sum(-1)[0] > 1e-12
            assert moved.tolist() == [t >= at for t in range(9)]
        changed = embeddings.clone()
        changed[:, at] += 1
        for step, (old, new) in enumerate(zip(before, head.unroll(features, changed), strict=True)):
            moved = (old - new).abs().sum(-1)[0] > 1e-12
            assert moved.tolist() == [t >= max(at - 1 - step, 0) and at > 0 for t in range(9)]


@pytest.mark.parametrize("padding", [0, 3])
def test_drafting_with_a_cache_is_what_was_unrolled(padding: int) -> None:
    """The tokens that are drafted are told, so that both see the same text."""
    head = random_layer(DraftHead(config(), drafts=3)).double()
    embed = torch.nn.Embedding(50, 16, dtype=torch.float64)
    tokens, features = torch.randint(0, 50, (1, 14)), torch.randn(1, 14, 16, dtype=torch.float64)
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[:, :padding] = 0
    unrolled = head.unroll(features, embed(tokens), mask)
    given: list[torch.Tensor] = []
    told: list[int] = []

    def speak(states: torch.Tensor) -> torch.Tensor:
        """Keeps the states that are spoken from, and says the text's own token."""
        given.append(states[:, -1])
        return F.one_hot(tokens[:, None, told.pop(0)], 50)

    model = SimpleNamespace(get_input_embeddings=lambda: embed, get_output_embeddings=lambda: speak)
    drafter = head.start(model, mask[:, :6])
    known = 0
    for until in (6, 7, 10):  # the prompt, then pieces of one and of three tokens
        told[:] = [until + 1, until + 2, until + 3]
        drafts = drafter(features[:, known:until], tokens[:, known + 1 : until + 1], 3)
        assert drafts.tolist() == tokens[:, until + 1 : until + 4].tolist()
        for step, states in enumerate(given):
            assert torch.allclose(states, unrolled[step][:, until - 1], rtol=1e-10)
        known, given[:] = until, []


def test_training_gives_every_parameter_a_gradient_and_what_is_read_one_if_asked_for() -> None:
    for detach in (True, False):
        model = with_heads(zoo.model("llama"), detach=detach)
        random_layer(model.draft)
        objective = Objective([Term(losses.draft, name=n, arguments={"module": n}) for n in HEADS])
        gradients = _step(model, objective)
        new = {n for n in gradients if n.startswith(("draft.", "medusa."))}
        assert all(bool(gradients[name].any()) for name in new)
        assert new == {n for n, _ in model.named_parameters() if n.startswith(("draft.", "medusa."))}
        trunk = gradients.get("model.layers.0.mlp.up_proj.weight")
        assert (trunk is None or not bool(trunk.any())) == detach


def _step(model: Any, objective: Objective) -> dict[str, torch.Tensor]:
    tokens = pico.tokens(2, 10)
    batch = {"input_ids": tokens, "labels": tokens}
    engine = ObjectiveEngine(objective, model)
    engine.begin([batch])
    engine.loss(batch).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_its_formula(name: str, soft: bool) -> None:
    """Also over padding on the left, labels that are masked, and chunks."""
    model = with_heads(zoo.model("llama", dtype=torch.float64), drafts=3)
    if name == "draft":
        random_layer(model.draft)
    else:
        zoo.stir(model.medusa, ["weight", "bias"])
    model.requires_grad_(False)
    ids = pico.tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 5] = -100
    outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    unrolled = head_of(model, name).unroll(outputs[name], model.get_input_embeddings()(ids), mask)
    expected = 0.0
    for step, states in enumerate(unrolled):
        said = model.lm_head(states).log_softmax(-1)
        for row in range(2):
            for t in range(11 - 2 - step):
                target = int(labels[row, t + 2 + step])
                if target == -100 or not mask[row, t]:
                    continue
                own = outputs.logits[row, t + 1 + step].softmax(-1)
                loss = -(own * said[row, t]).sum() if soft else -said[row, t, target]
                expected += 0.5**step * float(loss)
    term = losses.draft(name, decay=0.5, soft=soft, chunk=4)
    found = term(
        drafted={name: outputs[name]},
        model=model,
        inputs={"input_ids": ids},
        attention_mask=mask.bool(),
        hidden_states=outputs.hidden_states[-1],
        head=model.lm_head,
        labels=labels,
    )
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_the_gradient_does_not_depend_on_the_split(tmp_path: Path) -> None:
    found = []
    for size, steps in ((8, 1), (2, 4)):
        model = with_heads(zoo.model("llama", vocab_size=128))
        random_layer(model.draft)
        terms = lambda: [Term(losses.draft, name=n, arguments={"module": n}) for n in HEADS]  # noqa: E731
        found.append(training.step(model, tmp_path, size, steps, terms)[0])
    assert training.distance(*found) < 5e-6


def test_what_cannot_be_drafted_from_is_refused_before_the_training() -> None:
    model = with_heads(zoo.model("llama"))
    with pytest.raises(ObjectiveError, match=r"draft: model\.norm drafts nothing"):
        _step(model, Objective([Term(losses.draft, arguments={"module": "model.norm"})]))
    with pytest.raises(ObjectiveError, match="the model has none"):
        _step(model, Objective([Term(losses.draft, arguments={"module": "drafter"})]))
    term, hidden = losses.draft("draft"), torch.zeros(1, 4, 64)
    packed = {"input_ids": pico.tokens(1, 4), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    for inputs in (packed, {"inputs_embeds": hidden}):
        with pytest.raises(ObjectiveError, match="a row is one text"):
            term({"draft": hidden}, model, inputs, None, hidden, model.lm_head, pico.tokens(1, 4))


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (DraftHead, {"sources": 2}, "made for sources=2, but reads 3 modules"),
        (DraftHead, {"sources": 0}, "at least 1, but is 0"),
        (DraftHead, {"sources": 3, "drafts": 0}, "drafts must be at least 1"),
        (MultiTokenHead, {}, "takes 2 positional arguments but 4 were given"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(module: type, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SurgeryError, match=words):
        solidify.add(zoo.model("llama"), "draft", module, reads=READS, arguments=arguments)


FAMILIES = [(name, "transformer.ln_f" if name == "gpt2" else "model.norm") for name in zoo.FAMILIES]


class Five(StoppingCriteria):
    """Ends the rows that hold a token five times."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (input_ids == input_ids[:, -1:]).sum(-1) >= 5


@pytest.mark.parametrize(("family", "norm"), FAMILIES)
def test_the_text_is_the_greedy_text_token_by_token(family: str, norm: str) -> None:
    """With padding on the left, and sliding windows that are exceeded."""
    model = with_heads(zoo.model(family), norm, zoo.FAMILIES[family].layers)
    zoo.stir(model.draft, ["weight"], scale=0.05)
    both = zoo.prompts()
    for inputs in (both, {key: value[1:] for key, value in both.items()}):
        for name in HEADS:
            assert_greedy(model, name, **inputs)


def assert_greedy(model: Any, name: str, **options: Any) -> None:
    """Generates greedily with and without a head: the same text, in as few passes as tokens were accepted."""
    options = {"max_new_tokens": 24, "do_sample": False, **options}
    wanted = model.generate(**options)
    speculate = head_of(model, name).speculate
    told = model.generate(**options, custom_generate=speculate, return_dict_in_generate=True)
    assert torch.equal(told.sequences, wanted)
    assert 0 <= told.accepted <= told.drafted
    assert told.passes <= wanted.shape[1] - options["input_ids"].shape[1] - told.accepted
    if told.passes > 1:
        assert told.drafted > 0


@pytest.mark.parametrize("name", HEADS)
def test_the_text_ends_where_the_greedy_text_ends(name: str) -> None:
    """Rows that end early, processors that look at the text, criteria of the user's."""
    model = with_heads(zoo.model("llama"))
    inputs = zoo.prompts()
    last = model.generate(**inputs, max_new_tokens=7, do_sample=False)[1, -1].item()
    assert_greedy(model, name, **inputs, eos_token_id=last)
    assert_greedy(model, name, **inputs, eos_token_id=[last, 2], pad_token_id=5)
    assert_greedy(model, name, **inputs, repetition_penalty=1.3, min_new_tokens=9)
    assert_greedy(model, name, **inputs, stopping_criteria=[Five()])
    assert_greedy(model, name, **inputs, max_new_tokens=1)


def test_half_precision_stays_what_it_is() -> None:
    """Also while the head alone is trained in float32."""
    model = with_heads(zoo.model("llama", dtype=torch.bfloat16))
    random_layer(model.draft)
    for head in (model.draft, model.medusa):
        for dtype in (torch.bfloat16, torch.float32):
            head.to(dtype)
            outputs = model(**zoo.prompts())
            embeddings = model.get_input_embeddings()(zoo.prompts()["input_ids"])
            for name in HEADS:
                states = head_of(model, name).unroll(outputs[name], embeddings, zoo.prompts()["attention_mask"])
                assert {t.dtype for t in (outputs[name], *states)} == {torch.bfloat16}
                assert all(bool(t.isfinite().all()) for t in states)


def test_drafts_that_are_right_save_passes() -> None:
    """A text of one token is drafted rightly by a head at its start, so that every draft is accepted."""
    model = with_heads(pico.llama(), drafts=3)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for name in HEADS:
        told = model.generate(
            input_ids=pico.tokens(1, 4),
            max_new_tokens=16,
            min_new_tokens=16,
            eos_token_id=127,
            do_sample=False,
            custom_generate=head_of(model, name).speculate,
            return_dict_in_generate=True,
        )
        assert told.sequences[0, 4:].tolist() == [0] * 16
        assert (told.passes, told.drafted, told.accepted) == (5, 11, 11)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_sample": True}, "greedy text"),
        ({"num_beams": 2}, "greedy text"),
        ({"use_cache": False}, "a cache that grows"),
        ({"cache_implementation": "static"}, "cannot forget drafts"),
        ({"output_logits": True, "return_dict_in_generate": True}, "returns no logits"),
    ],
)
def test_what_is_not_greedy_generation_is_refused(options: dict[str, Any], words: str) -> None:
    model = with_heads(zoo.model("llama"))
    call = {"max_new_tokens": 4, "do_sample": False, "custom_generate": model.draft.speculate}
    with pytest.raises(ValueError, match=words):
        model.generate(**zoo.prompts(), **{**call, **options})


def test_what_the_loop_would_not_carry_on_is_refused() -> None:
    model = with_heads(zoo.model("llama"))
    config, kinds = model.generation_config, torch.zeros(2, 12, dtype=torch.long)
    config.do_sample, config.num_beams = False, 1
    for key in ("token_type_ids", "mm_token_type_ids", "inputs_embeds"):
        with pytest.raises(ValueError, match=f"it knows no {key}"):
            draft_head.refuse_other(model, config, {key: kinds, "use_cache": True, "past_key_values": DynamicCache()})
    cache = model(**zoo.prompts()).past_key_values
    with pytest.raises(ValueError, match="it begins with a whole text"):
        draft_head.refuse_other(model, config, {"use_cache": True, "past_key_values": cache})


def test_a_state_that_cannot_go_back_is_refused() -> None:
    """A recurrent layer keeps one state of all tokens so far, drafts among them."""
    settings = {**zoo.SIZES, **zoo.GROUPED, "intermediate_size": 96, "layer_types": KINDS, "num_experts": 0}
    model = with_heads(pico.make("Qwen3NextForCausalLM", **settings, **LINEAR))
    with pytest.raises(ValueError, match="states that cannot go back by some tokens"):
        model.generate(**zoo.prompts(), max_new_tokens=4, do_sample=False, custom_generate=model.draft.speculate)


def test_a_head_of_another_model_is_refused() -> None:
    model, other = with_heads(zoo.model("llama")), zoo.model("llama")
    with pytest.raises(ValueError, match="have nothing of this head"):
        other.generate(**zoo.prompts(), max_new_tokens=4, do_sample=False, custom_generate=model.draft.speculate)


def counting(rows: int, length: int = 32, *, seed: int = 0) -> torch.Tensor:
    """Texts that count: 40 numbers in a circle, each in one order."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (rows, 1), generator=generator)
    return 10 + (start + 7 * torch.arange(length)) % 40


@pytest.fixture(scope="module")
def counter() -> dict[str, torch.Tensor]:
    """The weights of a tiny Llama that has learnt to count."""
    model = zoo.model("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for number in range(60):
        batch = counting(8, seed=number)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def learn(model: Any, directory: Path, name: str, steps: int = 60, **arguments: Any) -> None:
    """Trains what has a gradient by the term on drafts."""
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in counting(64, seed=1)]
    ObjectiveTrainer(
        model=model,
        objective=Objective([Term(losses.draft, arguments={"module": name, **arguments})]),
        args=training.arguments(directory, 8, 1, max_steps=steps, learning_rate=5e-3),
        train_dataset=rows,
        data_collator=pico.collate,
    ).train()


def count_accepted(model: Any, name: str) -> tuple[int, int]:
    """Generates from two texts; returns how many tokens were accepted and in how many passes."""
    inputs: dict[str, Any] = {"input_ids": counting(2, 6, seed=9), "max_new_tokens": 24, "do_sample": False}
    wanted = model.generate(**inputs)
    told = model.generate(**inputs, custom_generate=head_of(model, name).speculate, return_dict_in_generate=True)
    assert torch.equal(told.sequences, wanted)
    return told.accepted, told.passes


@pytest.mark.parametrize(("name", "soft"), [("draft", False), ("draft", True), ("medusa", False)])
def test_a_trained_head_is_accepted_more_often(
    counter: dict[str, torch.Tensor], tmp_path: Path, name: str, soft: bool
) -> None:
    model = zoo.model("llama")
    model.load_state_dict(counter)
    with_heads(model)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.startswith(f"{name}."))
    before = count_accepted(model, name)
    learn(model, tmp_path, name, soft=soft)
    after = count_accepted(model.eval(), name)
    assert before == (0, 24)
    assert after[0] >= 12
    assert after[1] <= 12


FRESH = """
import json, sys
sys.modules["solidify"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
options = {"max_new_tokens": 24, "do_sample": False}
tokens = torch.tensor(json.loads(sys.argv[2]))
wanted = model.generate(input_ids=tokens, **options)
told = model.generate(
    input_ids=tokens, **options, custom_generate=model.draft.speculate, return_dict_in_generate=True
)
print(json.dumps([wanted.tolist(), told.sequences.tolist(), told.accepted]))
"""


@pytest.mark.slow
def test_a_draft_head_lives_its_whole_life(counter: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Built, reloaded, trained through an adapter, saved, merged; the merged model drafts in a process of its own."""
    model = zoo.model("llama")
    model.load_state_dict(counter)
    edits = solidify.add(model, "draft", DraftHead, reads=READS, arguments={"sources": 3})
    artifact = solidify.build(model, edits, tmp_path / "artifact")
    assert all(finding.passed is not False for finding in artifact.findings)
    lora = {"r": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    attached = solidify.attach(solidify.load(tmp_path / "artifact"), lora=lora, train=["draft"])
    learn(attached, tmp_path / "training", "draft")
    attached.eval()
    inputs: dict[str, Any] = {"input_ids": counting(2, 6, seed=9), "max_new_tokens": 24, "do_sample": False}
    wanted = attached.generate(**inputs)
    said = attached.generate(**inputs, custom_generate=attached.get_base_model().draft.speculate)
    assert torch.equal(said, wanted)
    solidify.save_adapter(attached, tmp_path / "adapter")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    tokens = json.dumps(inputs["input_ids"].tolist())
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path / "merged"), tokens]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    greedy, speculative, accepted = json.loads(done.stdout.splitlines()[-1])
    assert greedy == speculative == wanted.tolist()
    assert accepted >= 12
