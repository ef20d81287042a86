"""Multi-token prediction in transformers' layout: trained here, run by transformers' own `use_mtp`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import zoo
from pico import wrappers
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import solidify
import training
from solidify import losses
from solidify.errors import SurgeryError
from solidify.modules.mtp_head import MtpHead
from solidify.objective.objective import Objective, Term
from solidify.training.trainer import ObjectiveTrainer

FAMILIES = ["llama", "mistral", "qwen3", "olmoe", "gemma3"]


def with_head(model: Any, depth: int = 1, **arguments: Any) -> list[solidify.Edit]:
    return solidify.add(model, "mtp", MtpHead, reads="model.norm", arguments={"depth": depth, **arguments})


def unroll(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    features = model(input_ids=ids, attention_mask=mask)["mtp"]
    found: list[torch.Tensor] = model.mtp.unroll(features, model.get_input_embeddings()(ids), mask)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_what_transformers_drafts_with(family: str) -> None:
    """The first depth's last position, and the second's over the token that the first has drafted."""
    for depth in (1, 2):
        model = zoo.model(family)
        with_head(model, depth)
        zoo.stir(model.mtp, ["weight"], scale=0.02)
        ids = pico.tokens(1, 10)
        states = model(input_ids=ids)["mtp"]
        theirs = MtpModel(model, depth).eval()
        theirs.layers.load_state_dict(model.mtp.layers.state_dict())
        drafted, logits, _ = theirs(
            input_ids=ids[:, 1:],
            last_hidden_states=states[:, :-1],
            attention_mask=None,
            position_ids=torch.arange(1, 10)[None],
            mtp_cache=MtpCache(config=model.config.get_mtp_config()),
        )
        known = torch.cat([ids, drafted], dim=1)
        unrolled = model.mtp.unroll(
            torch.cat([states, states[:, : drafted.shape[1]]], dim=1), model.get_input_embeddings()(known)
        )
        for index in range(depth):
            ours = model.lm_head(unrolled[index])[:, 8].detach()
            scale = float(ours.abs().max())
            assert float((ours - logits[:, index].detach()).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_changes_nothing(family: str) -> None:
    model = zoo.model(family)
    with_head(model, 2)
    ids, mask = pico.tokens(1, 9), torch.ones(1, 12, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), ids], dim=1)
    with torch.no_grad():
        pairs = list(zip(unroll(model, ids), unroll(model, padded, mask), strict=True))
    for short, long in pairs:
        assert torch.allclose(long[:, 3:], short, atol=1e-4 * float(short.abs().max()))


def test_it_starts_as_the_models_last_layer() -> None:
    model = zoo.model("qwen3")
    with_head(model, 2)
    for depth in model.mtp.layers:
        last = model.model.layers[-1].state_dict()
        assert all(torch.equal(tensor, last[name]) for name, tensor in depth.mtp_block.state_dict().items())
        assert torch.equal(depth.post_norm.weight, model.model.norm.weight)
        hidden, other = torch.randn(1, 3, 64), torch.randn(1, 3, 64)
        assert torch.equal(depth.eh_proj(torch.cat([other, hidden], dim=-1)), hidden)
    assert model.config.num_mtp_layers == 2
    assert model.config.mtp_layer_types == ["full_attention"] * 2


@pytest.mark.parametrize(
    ("family", "name", "reads", "arguments", "words"),
    [
        ("llama", "draft", "model.norm", {}, "under the name 'mtp', but it is added as 'draft'"),
        ("llama", "mtp", "model.norm", {"depth": 0}, "depth must be at least 1"),
        ("gpt2", "mtp", "transformer.ln_f", {}, "no decoder layers with RMS norms for GPT2Config"),
    ],
)
def test_what_transformers_would_not_find_is_refused(
    family: str, name: str, reads: str, arguments: dict[str, Any], words: str
) -> None:
    model = zoo.model(family)
    before = model.config.to_dict()
    with pytest.raises(SurgeryError, match=words):
        solidify.add(model, name, MtpHead, reads=reads, arguments=arguments)
    assert model.config.to_dict() == before
    assert not hasattr(model, name)


def test_a_last_layer_that_was_changed_before_is_refused() -> None:
    model = zoo.model("llama")
    solidify.replace(model, "model.layers.1.mlp", wrappers.Scaled)
    before = model.config.to_dict()
    with pytest.raises(SurgeryError, match="add the head before changing it"):
        with_head(model)
    assert model.config.to_dict() == before


def test_it_can_be_planned_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = zoo.pico.llama()
    edits = with_head(model)
    assert set(edits[0].tensors) == {name for name in model.state_dict() if name.startswith("mtp.")}


def counting(rows: int, length: int = 32, *, seed: int = 0) -> torch.Tensor:
    """Texts that count: 40 numbers in a circle, each in one order."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (rows, 1), generator=generator)
    return 10 + (start + 7 * torch.arange(length)) % 40


def teach(model: Any, directory: Path, terms: list[Term], steps: int) -> None:
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in counting(64, seed=1)]
    ObjectiveTrainer(
        model=model,
        objective=Objective(terms),
        args=training.arguments(directory, 8, 1, max_steps=steps, learning_rate=3e-3),
        train_dataset=rows,
        data_collator=pico.collate,
    ).train()
    model.eval()


def count_passes(model: Any) -> tuple[int, int]:
    """Generates greedily without the head and with it: the same text; returns both numbers of passes."""
    passes: list[int] = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    told, counts = [], []
    given = {"input_ids": counting(1, 6, seed=9), "max_new_tokens": 24, "do_sample": False}
    model.generation_config.eos_token_id = None
    for options in ({}, {"use_mtp": True}):
        told.append(model.generate(**given, **options))
        counts.append(len(passes))
        passes.clear()
    handle.remove()
    assert torch.equal(*told)
    return counts[0], counts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_generation_reads_the_artifact(family: str, tmp_path: Path) -> None:
    model = zoo.model(family)
    edits = with_head(model)
    loaded = solidify.load(pico.artifact(model, edits, tmp_path / "artifact"))
    plain, drafted = count_passes(loaded)
    assert drafted <= plain == 24


FRESH = """
import json, sys
sys.modules["solidify"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
passes = []
model.register_forward_hook(lambda *_: passes.append(1))
options = {"input_ids": torch.tensor(json.loads(sys.argv[2])), "max_new_tokens": 24, "do_sample": False}
wanted = model.generate(**options)
passes.clear()
told = model.generate(**options, use_mtp=True)
print(json.dumps([wanted.tolist(), told.tolist(), len(passes)]))
"""


@pytest.mark.slow
def test_a_head_lives_its_whole_life(tmp_path: Path) -> None:
    """Built, trained through an adapter, merged; in a process of its own transformers drafts with what was learnt."""
    model = zoo.model("llama")
    teach(model.train(), tmp_path / "base", [Term("model")], 60)
    edits = with_head(model)
    artifact = solidify.build(model, edits, tmp_path / "artifact")
    assert all(finding.passed is not False for finding in artifact.findings)
    loaded = solidify.load(tmp_path / "artifact")
    assert count_passes(loaded)[1] >= 20
    attached = solidify.attach(loaded, train=["mtp"])
    teach(attached, tmp_path / "training", [Term(losses.draft, arguments={"module": "mtp"})], 60)
    solidify.save_adapter(attached, tmp_path / "adapter")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    tokens = json.dumps(counting(1, 6, seed=9).tolist())
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path / "merged"), tokens]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    greedy, drafted, passes = json.loads(done.stdout.splitlines()[-1])
    assert greedy == drafted
    assert passes <= 15


def test_a_gradient_reaches_every_parameter() -> None:
    model = zoo.model("llama")
    with_head(model, 2)
    zoo.stir(model.mtp, ["weight"], scale=0.02)
    ids = pico.tokens(2, 8)
    sum(states.square().sum() * (n + 1) for n, states in enumerate(unroll(model, ids))).backward()
    assert all(bool(p.grad.any()) for p in model.mtp.parameters())
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
