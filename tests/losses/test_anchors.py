"""Terms that hold parameters near their first values, against the merged model's real distance from its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file

import solidify
from solidify import losses
from solidify.adapter import lookup
from solidify.errors import ObjectiveError
from solidify.objective.objective import Term
from training import LORA

FULL = "model.layers.*.mlp.gate_proj"


def moved(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def distances(model: Any, base: Any) -> dict[str, torch.Tensor]:
    """Differences of the merged model from its base, in float64, by name: no code of ours is in between."""
    merged = model.merge_and_unload() if lookup.peft_model(model) is not None else model
    before = dict(base.named_parameters())
    return {n: p.detach().double() - before[n].detach().double() for n, p in merged.named_parameters()}


def attached(**declared: Any) -> Any:
    torch.manual_seed(0)
    return moved(solidify.attach(pico.llama(), **declared))


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": {"r": 4, "lora_alpha": 12, "target_modules": ["**.q_proj", "**.down_proj"]}},
    "rank-stabilised LoRA": {"lora": {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": ["**.q_proj"]}},
    "copies": {"train": [FULL]},
    "single parameters": {"train": ["model.layers.*.mlp.up_proj.weight", "model.norm.weight"]},
    "all": {"lora": LORA, "train": [FULL, "model.norm.weight"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_l2_sp_is_the_distance_of_the_merged_model_from_its_base(kind: str) -> None:
    model = attached(**ADAPTERS[kind])
    loss = losses.l2_sp()(model)
    loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and bool(gradient.any()) for gradient in trained.values())
    assert loss.item() == pytest.approx(
        sum(float(d.square().sum()) for d in distances(model, pico.llama()).values()) / 2, rel=1e-4
    )


def test_l2_sp_starts_at_zero_and_names_choose() -> None:
    torch.manual_seed(0)
    model = solidify.attach(pico.llama(), **ADAPTERS["all"])
    assert losses.l2_sp()(model).item() == 0
    model = attached(**ADAPTERS["all"])
    one = losses.l2_sp("model.layers.0.self_attn.q_proj")(model)
    delta = distances(model, pico.llama())["model.layers.0.self_attn.q_proj.weight"]
    assert one.item() == pytest.approx(float(delta.square().sum()) / 2, rel=1e-5)
    with pytest.raises(ObjectiveError, match="none of the parameters is trained"):
        losses.l2_sp("lm_head.weight")(attached(**ADAPTERS["copies"]))


def test_l2_sp_of_lora_on_experts_is_the_distance_of_the_merged_experts() -> None:
    torch.manual_seed(0)
    lora = {"r": 2, "lora_alpha": 6, "target_parameters": ["**.experts.gate_up_proj", "**.experts.down_proj"]}
    model = moved(solidify.attach(pico.olmoe(), lora=lora))
    loss = losses.l2_sp()(model)
    expected = sum(float(d.square().sum()) for d in distances(model, pico.olmoe()).values()) / 2
    assert expected > 0.01
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_without_peft_the_first_values_are_remembered_and_survive_a_checkpoint() -> None:
    model = pico.llama().requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    term = Term(losses.l2_sp)
    assert term.subject(model).item() == 0
    moved(model)
    expected = sum(float(d.square().sum()) for d in distances(model, pico.llama()).values()) / 2
    assert term.subject(model).item() == pytest.approx(expected, rel=1e-5)
    again = Term(losses.l2_sp)
    again.load_state_dict(term.state_dict())
    assert again.subject(model).item() == term.subject(model).item()
    assert set(term.subject.before) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_updates_of_another_kind_are_refused() -> None:
    model = solidify.attach(pico.llama(), lora={"r": 4, "use_dora": True, "target_modules": ["**.q_proj"]})
    with pytest.raises(ObjectiveError, match="supports one LoRA"):
        losses.l2_sp()(model)


def fisher_file(path: Path, names: list[str], model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    values = {n: torch.rand(model.get_parameter(n).shape, generator=generator) for n in names}
    save_file(values, path)
    return values


@pytest.mark.parametrize("kind", ADAPTERS)
def test_ewc_weighs_the_distance_of_the_merged_model_by_the_fisher(kind: str, tmp_path: Path) -> None:
    base = pico.llama()
    names = [n for n, _ in base.named_parameters() if "layers.0" in n or n == "model.norm.weight"]
    fisher = fisher_file(tmp_path / "fisher.safetensors", names, base)
    model = attached(**ADAPTERS[kind])
    loss = losses.ewc(str(tmp_path / "fisher.safetensors"))(model)
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    delta = distances(model, base)
    expected = sum(float((fisher[n].double() * delta[n].square()).sum()) for n in names) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_fisher_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    save_file({"model.layers.9.mlp.up_proj.weight": torch.rand(3)}, path)
    model = attached(**ADAPTERS["copies"])
    with pytest.raises(ObjectiveError, match=r"belongs to another model; this one has no parameter: model.layers.9"):
        losses.ewc(path)(model)
    save_file({"lm_head.weight": torch.rand(128, 32)}, path)
    with pytest.raises(ObjectiveError, match="names none of the parameters that are trained"):
        losses.ewc(path)(model)
    save_file({"model.layers.0.mlp.gate_proj.weight": torch.rand(3)}, path)
    with pytest.raises(ObjectiveError, match=r"has shape \[48, 32\], and .* in the Fisher"):
        losses.ewc(path)(model)


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_the_fisher_is_of_single_sequences(labels: str) -> None:
    model = pico.llama().double().train()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    batches = [pico.collate(pico.ragged(6)[:3]), pico.collate(pico.ragged(6)[3:])]
    names = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    found = losses.fisher_diagonal(model, batches, names, labels=labels, seed=5)
    assert set(found) == set(names)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    generator = torch.Generator().manual_seed(5)
    expected = {name: 0.0 for name in names}
    model.eval()
    for example in pico.ragged(6):  # one by one, without padding
        ids, wanted = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)[wanted[:, 1:] != -100]
        target = wanted[:, 1:][wanted[:, 1:] != -100]
        if labels == "sampled":
            target = torch.multinomial(log_p.detach().exp(), 1, generator=generator)[:, 0]
        likelihood = sum(row[word] for row, word in zip(log_p, target.tolist(), strict=True))
        for name, gradient in zip(
            names, torch.autograd.grad(likelihood, [model.get_parameter(n) for n in names]), strict=True
        ):
            expected[name] = expected[name] + gradient.square() / 6
    for name in names:
        assert torch.allclose(found[name].double(), expected[name], rtol=1e-4, atol=1e-6 * float(expected[name].max()))  # type: ignore[attr-defined]


def test_sampled_and_given_labels_agree_where_the_model_is_right_on_average() -> None:
    """On labels drawn from the model, the empirical Fisher is the Fisher; on others it is not."""
    torch.manual_seed(0)
    model = pico.llama(vocab_size=16, num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    ids = pico.tokens(200, 2, vocab_size=16)
    with torch.no_grad():
        p = model(input_ids=ids).logits[:, 0].softmax(-1)
    drawn = torch.cat([ids[:, :1], torch.multinomial(p, 1)], dim=1)
    other = torch.cat([ids[:, :1], torch.randint(0, 16, (200, 1))], dim=1)
    name = "lm_head.weight"

    def total(labels: torch.Tensor, kind: str) -> float:
        batch = {"input_ids": ids, "labels": labels}
        return float(losses.fisher_diagonal(model, [batch], name, labels=kind)[name].sum())

    true = total(drawn, "sampled")
    assert total(drawn, "data") == pytest.approx(true, rel=0.25)
    assert total(other, "data") > 1.3 * true


def test_a_fisher_of_nothing_is_refused() -> None:
    model = pico.llama()
    batch = pico.collate(pico.ragged(2))
    with pytest.raises(ObjectiveError, match="'sampled' or 'data'"):
        losses.fisher_diagonal(model, [batch], labels="both")
    batch["labels"].fill_(-100)
    with pytest.raises(ObjectiveError, match="no row of the batches has a target"):
        losses.fisher_diagonal(model, [batch])
