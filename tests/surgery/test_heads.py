from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import wrappers
from safetensors.torch import save_file
from transformers import AutoModel

import solidify
from solidify.errors import SurgeryError


def test_an_added_head_speaks_in_the_outputs_and_moves_nothing_else() -> None:
    model = pico.llama()
    tokens = pico.tokens()
    before = model(input_ids=tokens).logits
    edits = solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm")
    outputs = model(input_ids=tokens, output_hidden_states=True)
    assert torch.equal(outputs.logits, before)
    assert torch.equal(outputs["value_head"], model.value_head(outputs.hidden_states[-1]))
    assert outputs["value_head"].shape == tokens.shape
    assert edits[0].operation == "add"
    assert edits[0].identical
    outputs["value_head"].sum().backward()
    assert model.value_head.linear.weight.grad.abs().sum() > 0


def test_a_head_reads_a_layer_within() -> None:
    model = pico.llama()
    solidify.add(model, "early_exit", wrappers.ValueHead, reads="model.layers.0")
    outputs = model(input_ids=pico.tokens(), output_hidden_states=True)
    assert torch.equal(outputs["early_exit"], model.early_exit(outputs.hidden_states[1]))


def test_a_part_may_run_without_the_whole() -> None:
    """TRL runs the part without the head; the new head is called there too, and keeps nothing."""
    model = pico.llama()
    solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm")
    called = []
    model.value_head.register_forward_hook(lambda *_: called.append(1))
    assert "value_head" not in model.model(input_ids=pico.tokens())
    assert called == [1]


def test_a_tuple_is_answered_with_a_longer_tuple() -> None:
    model = pico.llama()
    plain = model(input_ids=pico.tokens(), return_dict=False)
    solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm")
    assert len(model(input_ids=pico.tokens(), return_dict=False)) == len(plain) + 1


@pytest.mark.parametrize(
    ("name", "module", "reads", "words"),
    [
        ("value_head", wrappers.ValueHead, "model.nrom", "not a module"),
        ("lm_head", wrappers.ValueHead, "model.norm", "is there already"),
        ("generate", wrappers.ValueHead, "model.norm", "is there already"),
        ("heads.first", wrappers.ValueHead, "model.norm", "there is no 'heads'"),
        ("value_head", wrappers.Scaled, "model.norm", "cannot be supplied where nothing stood before"),
        ("value_head", wrappers.ValueHead, "lm_head", "fails on what lm_head returns"),
        ("value_head", wrappers.Spoiler, "model.norm", "changes what it reads in place"),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_stays(name: str, module: type, reads: str, words: str) -> None:
    model = pico.llama()
    keys, tokens = list(model.state_dict()), pico.tokens()
    before = model(input_ids=tokens)
    with pytest.raises(SurgeryError, match=words):
        solidify.add(model, name, module, reads=reads)
    after = model(input_ids=tokens)
    assert list(model.state_dict()) == keys
    assert torch.equal(after.logits, before.logits)
    assert set(after) == set(before)


def test_initial_weights_are_loaded_strictly(tmp_path: Path) -> None:
    weights = {"linear.weight": torch.randn(1, 32), "linear.bias": torch.randn(1)}
    save_file(weights, tmp_path / "whole.safetensors")
    save_file({"linear.weight": weights["linear.weight"]}, tmp_path / "part.safetensors")
    model = pico.llama()
    with pytest.raises(SurgeryError, match=r"lack 'linear\.bias'"):
        solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm", weights=tmp_path / "part.safetensors")
    assert not hasattr(model, "value_head")
    solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm", weights=tmp_path / "whole.safetensors")
    assert torch.equal(model.value_head.linear.weight, weights["linear.weight"])


SEVERAL = ["model.norm", "model.embed_tokens", "model.layers.0"]


def fuse(model: Any, reads: Any = SEVERAL) -> list[solidify.Edit]:
    return solidify.add(model, "fused", wrappers.Fused, reads=reads, arguments={"count": len(reads)})


def test_a_head_reads_several_modules_in_the_order_asked_for() -> None:
    model = pico.llama()
    before = model(input_ids=pico.tokens()).logits
    edits = fuse(model)
    outputs = model(input_ids=pico.tokens(), output_hidden_states=True)
    embedded, first, last = outputs.hidden_states
    assert torch.equal(outputs.logits, before)
    assert torch.equal(outputs["fused"], model.fused(last, embedded, first))
    assert edits[0].settings == {"reads": SEVERAL}
    assert edits[0].identical


def test_several_are_read_where_one_stands_outside_the_backbone() -> None:
    model = pico.llama(vocab_size=32)
    fuse(model, ["model.embed_tokens", "lm_head"])
    tokens = pico.tokens(vocab_size=32)
    outputs = model(input_ids=tokens, output_hidden_states=True)
    assert torch.equal(outputs["fused"], model.fused(outputs.hidden_states[0], outputs.logits))
    called = []
    model.fused.register_forward_hook(lambda *_: called.append(1))
    model.model(input_ids=tokens)
    assert called == []


@pytest.mark.parametrize(
    ("reads", "words"),
    [
        ([], "is empty"),
        (["model.norm", "model.nrom"], r"'model\.nrom' is not a module"),
        (["model.norm", ""], "'' is not a module"),
        (["model.norm", "model.norm"], r"'model\.norm' is read twice"),
        (["model.norm", "lm_head"], r"fails on what model\.norm and lm_head return"),
    ],
)
def test_several_that_cannot_be_read_are_refused(reads: list[str], words: str) -> None:
    model = pico.llama()
    before = model(input_ids=pico.tokens())
    with pytest.raises(SurgeryError, match=words):
        fuse(model, reads)
    after = model(input_ids=pico.tokens())
    assert set(after) == set(before)
    assert torch.equal(after.logits, before.logits)


def test_what_looks_ahead_in_several_is_refused() -> None:
    class Ahead(wrappers.Fused):
        def forward(self, *hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(*(h.roll(-1, dims=1) for h in hidden_states))

    with pytest.raises(SurgeryError, match="looks ahead"):
        solidify.add(pico.llama(), "fused", Ahead, reads=SEVERAL, arguments={"count": 3})


def test_layers_that_are_computed_again_in_the_backward_pass_are_read_once() -> None:
    """A head that was called inside of a layer would leave other tensors behind than the layer computed again."""
    gradients = []
    for again in (False, True):
        model = pico.llama()
        fuse(model, ["model.layers.0", "model.layers.1"])
        if again:
            model.gradient_checkpointing_enable()
        model.train()
        outputs = model(input_ids=pico.tokens())
        (outputs["fused"].square().sum() + outputs.logits.sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_did_not_run_is_named() -> None:
    model = pico.llama()
    fuse(model)
    with pytest.raises(ValueError, match=r"fused reads what model\.embed_tokens returns, which did not run"):
        model(inputs_embeds=torch.randn(1, 3, 32))
    assert "fused" in model(input_ids=pico.tokens())


def test_a_copy_reads_its_own_modules() -> None:
    model = pico.llama()
    fuse(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    outputs = other(input_ids=pico.tokens(), output_hidden_states=True)
    embedded, first, last = outputs.hidden_states
    assert torch.equal(outputs["fused"], model.fused(last, embedded, first))


def test_several_are_read_in_an_artifact_and_through_an_adapter(tmp_path: Path) -> None:
    model = pico.llama()
    artifact = solidify.build(model, fuse(model), tmp_path / "artifact")
    assert all(finding.passed is not False for finding in artifact.findings)
    expected = model(input_ids=pico.tokens())["fused"]
    loaded = solidify.load(tmp_path / "artifact")
    assert torch.equal(loaded(input_ids=pico.tokens())["fused"], expected)
    lora = {"r": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    attached = solidify.attach(loaded, lora=lora, train=["fused"])
    assert torch.equal(attached(input_ids=pico.tokens())["fused"], expected)
    attached(input_ids=pico.tokens())["fused"].square().sum().backward()
    assert all(p.grad is not None for name, p in attached.named_parameters() if "fused" in name and p.requires_grad)
    backbone = AutoModel.from_pretrained(tmp_path / "artifact", trust_remote_code=True)
    assert "fused" not in backbone(input_ids=pico.tokens())


def add_head(model: Any, reads: Any) -> None:
    many = isinstance(reads, list)
    kind, arguments = (wrappers.Fused, {"count": len(reads)}) if many else (wrappers.ValueHead, {})
    solidify.add(model, "head", kind, reads=reads, arguments=arguments)


@pytest.mark.parametrize("reads", ["model.norm", ["model.layers.0", "model.norm"]])
def test_threads_that_share_a_model_hear_their_own_texts(reads: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = pico.llama()
    add_head(model, reads)
    texts = [pico.tokens(seed=seed) for seed in range(8)]
    with torch.no_grad():
        wanted = [model(input_ids=text)["head"] for text in texts]

    def ask(number: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(input_ids=texts[number % 8])["head"], wanted[number % 8])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(120)))


@pytest.mark.parametrize("reads", ["model.layers.0", ["model.layers.0", "model.norm"]])
def test_a_model_is_copied_after_a_pass_that_failed(reads: Any) -> None:
    model = pico.llama()
    add_head(model, reads)

    def fail(*_: Any) -> None:
        raise MemoryError

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(input_ids=pico.tokens())
    hook.remove()
    again = copy.deepcopy(model)
    assert torch.equal(again(input_ids=pico.tokens())["head"], model(input_ids=pico.tokens())["head"])
