"""Starts that PEFT makes from data: what they are made from, what they leave alone, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from adapter_kinds import FED, batches, fit, outputs, same
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from transformers.pytorch_utils import Conv1D

import solidify
from solidify.adapter import lookup
from solidify.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Q, LAST = "model.layers.*.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": [Q, LAST]}
EVEN = {"eva_config": {"rho": 1.0}}


def gpt2() -> Any:
    return pico.make("GPT2LMHeadModel", vocab_size=128, n_embd=32, n_layer=2, n_head=4, pad_token_id=1)


MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "Llama": (pico.llama, [Q, LAST]),
    "GPT-2": (gpt2, ["transformer.h.*.attn.c_attn", "transformer.h.1.attn.c_proj"]),
}


def declared(start: str, **more: Any) -> dict[str, Any]:
    return {**LORA, "init_lora_weights": start, **(EVEN if start == "eva" else {}), **more}


def layers(model: PeftModel) -> dict[str, Any]:
    return {name: m for name, m in model.get_base_model().named_modules() if getattr(m, "lora_A", None)}


def factors(layer: Any, name: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    """What is trained, of a layer that keeps its start and of a plain one."""
    pair = (layer.lora_A[name], layer.lora_B[name])
    a, b = (getattr(factor, "trained", factor.weight).detach().double() for factor in pair)
    return a, b


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def distance(a: Any, b: Any) -> float:
    return max(float((a[key] - b[key]).norm() / b[key].norm()) for key in a if a[key].is_floating_point())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("start", FED)
def test_it_starts_as_the_base_which_keeps_its_bits(start: str, kind: str) -> None:
    make, targets = MODELS[kind]
    model = make().train()  # it comes back in its mode
    before, plain, flags = bits(model), outputs(model), [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    attached = solidify.attach(model, lora=declared(start, target_modules=targets), batches=batches())
    assert flags and attached.training
    found = {name.replace(".base_layer", ""): tensor for name, tensor in attached.get_base_model().state_dict().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    own = [vars(m) for _, m in lookup.owners(attached)]
    assert not any(key in values for values in own for key in ("eigens", "rank", "_peft_loraga_grad"))
    assert all(p.grad is None for p in attached.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for _, m in lookup.owners(attached))
    with attached.disable_adapter():
        assert same(outputs(attached), plain)
    off = distance(outputs(attached), plain)
    assert off == 0 if start == "eva" else off < 1e-5
    assert len(state) == len(torch.get_rng_state())


@pytest.mark.parametrize("kind", MODELS)
def test_evas_start_is_pefts(kind: str) -> None:
    make, targets = MODELS[kind]
    ours = solidify.attach(make(), lora=declared("eva", target_modules=targets), batches=batches())
    names = list(layers(ours))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    theirs = get_peft_model(make(), config)
    initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    for name, layer in layers(theirs).items():
        a, b = factors(layers(ours)[name])
        assert torch.equal(a, layer.lora_A["default"].weight.detach().double())
        assert not b.any()


@pytest.mark.parametrize("adjusted", [True, False])
def test_eva_gives_ranks_to_the_layers_that_were_named(tmp_path: Path, adjusted: bool) -> None:
    """By the variance that they explain; what is named is trained, and the ranks are those of PEFT."""
    eva = {"rho": 1.5, "adjust_scaling_factors": adjusted}
    model = solidify.attach(
        pico.llama(), lora={**LORA, "init_lora_weights": "eva", "eva_config": eva}, batches=batches()
    )
    theirs = get_peft_model(
        pico.llama(),
        LoraConfig(
            r=4, lora_alpha=6, target_modules=list(layers(model)), init_lora_weights="eva", eva_config=EvaConfig(**eva)
        ),
    )
    initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    ranks = {name: len(factors(layer)[0]) for name, layer in layers(model).items()}
    assert ranks == {name: len(factors(layer)[0]) for name, layer in layers(theirs).items()}
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 12
    for name, layer in layers(theirs).items():
        assert layers(model)[name].scaling["default"] == layer.scaling["default"]
    fit(model)
    model.save_pretrained(tmp_path / "plain")
    again = PeftModel.from_pretrained(pico.llama(), tmp_path / "plain").eval()
    assert same(outputs(again), outputs(model))


@pytest.mark.parametrize("kind", MODELS)
def test_cordas_start_is_pefts_on_rows_without_padding(kind: str) -> None:
    make, targets = MODELS[kind]
    ours = solidify.attach(make(), lora=declared("corda", target_modules=targets), batches=batches())
    model = make()
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=list(layers(ours)), init_lora_weights="corda", corda_config=CordaConfig()
    )

    def run() -> None:
        for seed in range(4):
            for row in pico.ragged(4, seed=seed):
                model(input_ids=torch.tensor([row["input_ids"]]))

    preprocess_corda(model, config, run_model=run)
    for name, layer in layers(get_peft_model(model, config)).items():
        for mine, other in zip(factors(layers(ours)[name]), factors(layer), strict=True):
            assert float((mine - other).norm() / other.norm()) < 1e-3  # with padding and without, sums round otherwise


@pytest.mark.parametrize("kind", MODELS)
def test_lora_gas_start_is_that_of_the_gradient(kind: str) -> None:
    """The singular vectors of the mean gradient, in float64: the first for A, the next for B (`ArB2r`)."""
    make, targets = MODELS[kind]
    lora = declared("lora_ga", r=8, target_modules=targets)
    ours = solidify.attach(make(), lora=lora, batches=batches())
    model = make().double().train()
    for batch in batches():
        model(**batch).loss.backward()
    for name, layer in layers(ours).items():
        module = model.get_submodule(name)
        gradient = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        a, b = factors(layer)
        assert float((a @ right[:8].T).diagonal().abs().min()) > 0.99
        b = b / b.norm(dim=0)
        assert float((b.T @ left[:, 8:16]).diagonal().abs().min()) > 0.99, values


@pytest.mark.parametrize("start", FED)
def test_what_is_trained_is_saved_loaded_and_merged(
    trash_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    pico.unwitnessed(monkeypatch)
    plain = outputs(solidify.load(trash_artifact))
    model = solidify.attach(
        solidify.load(trash_artifact), lora=declared(start), train=["**.mlp.trash"], batches=iter(batches())
    )
    fit(model)
    with model.disable_adapter():
        assert same(outputs(model), plain)
    solidify.save_adapter(model, tmp_path / "adapter")
    assert same(outputs(solidify.load(trash_artifact, tmp_path / "adapter")), outputs(model))
    stock = PeftModel.from_pretrained(solidify.load(trash_artifact), tmp_path / "adapter").eval()
    assert same(outputs(stock), outputs(model))
    assert stock.peft_config["default"].init_lora_weights is True
    found = solidify.merge(tmp_path / "adapter", tmp_path / "merged").findings
    assert [finding.name for finding in found if not finding.passed] == []


@pytest.mark.parametrize("start", FED)
def test_a_second_adapter_starts_as_if_it_were_alone(start: str) -> None:
    torch.manual_seed(1)
    alone = solidify.attach(pico.llama(), lora=declared(start, r=8), batches=batches())
    first = solidify.attach(pico.llama(), lora={"r": 2, "target_modules": [Q, "**.up_proj"]}, train=["model.norm"])
    fit(first)
    expected = outputs(first)
    torch.manual_seed(1)
    both = solidify.attach(first, lora=declared(start, r=8), name="second", batches=batches())
    for name, layer in layers(alone).items():
        for mine, other in zip(factors(layers(both)[name], "second"), factors(layer), strict=True):
            assert float((mine.abs() - other.abs()).norm()) <= 1e-3 * float(other.norm())
    both.set_adapter("default")
    assert same(outputs(both), expected)


def many(length: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": pico.tokens(1, length, seed=seed)} for seed in range(4)]


def padded(*rows: int) -> dict[str, torch.Tensor]:
    """A batch of which some of two rows are all padding."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[list(rows)] = 0
    return {"input_ids": pico.tokens(2), "attention_mask": mask}


def test_corda_leaves_out_a_row_that_is_all_padding() -> None:
    rows = [padded(1)], [{key: value[:1] for key, value in padded(1).items()}]
    one, other = (solidify.attach(pico.llama(), lora=declared("corda"), batches=each) for each in rows)
    pairs = zip(layers(one).values(), layers(other).values(), strict=True)
    assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*map(factors, pair), strict=True))


@pytest.mark.parametrize("rank", [{"r": 16}, {"r": 40, "rank_pattern": {Q: 16, LAST: 16}}])
def test_the_largest_rank_that_lora_ga_can_start_with_is_taken(rank: dict[str, Any]) -> None:
    attached = solidify.attach(pico.llama(), lora={**declared("lora_ga"), **rank}, batches=batches())
    assert {len(factors(layer)[0]) for layer in layers(attached).values()} == {16}


@pytest.mark.parametrize(
    ("start", "given", "data", "words"),
    [
        ("eva", {}, None, "the start 'eva' is made from data; give attach `batches`"),
        ("lora_ga", {}, None, "the start 'lora_ga' is made from data; give attach `batches`"),
        (True, {}, batches, "`batches` are for the starts that are made from data (eva, corda, lora_ga)"),
        ("corda", {}, list, "the start 'corda' is made from data, and `batches` is empty"),
        ("eva", {}, lambda: batches()[0], "is called with (input_ids, ...), and it is of the type dict"),
        (
            "eva",
            {},
            lambda: [pico.tokens()],
            "(input_ids, ...), and it holds one of the type Tensor",
        ),
        ("eva", {}, lambda: many(3), "EVA needs batches of at least 4 tokens"),
        ("eva", {"r": 1, "eva_config": {"rho": 3.0}}, batches, "no rank on these data; leave it out of target_modules"),
        ("eva", {"eva_config": {"tau": 1.0, "rho": 1.0}}, batches, "EVA has not settled after 200 batches"),
        ("eva", {"eva_config": {"rhu": 1.0}}, batches, "LoRA: eva_config has no 'rhu'; it has rho, tau,"),
        ("corda", {"corda_config": {"cache_file": "x.pt"}}, batches, "corda_config: cache_file is not read here"),
        ("corda", {"corda_config": 3}, batches, "corda_config must be a mapping of CordaConfig's fields, not 3"),
        ("eva", {"target_modules": ["model.embed_tokens"]}, batches, "(Embedding) does not support the start 'eva'"),
        ("eva", {"use_bdlora": {"nblocks": 2}}, batches, "use_bdlora and init_lora_weights='eva' cannot be combined"),
        ("pissa", {"eva_config": {"rho": 1.0}}, None, "eva_config belongs to the start 'eva'"),
        ("corda", {"r": 33}, batches, "CorDA takes 33 directions (the rank) of the weight of model.layers.0.self_"),
        ("lora_ga", {"r": 17}, batches, "LoRA-GA takes 34 directions (twice the rank 17) of the gradient of model."),
        (
            "eva",
            {"r": 17, "eva_config": {"rho": 2.0}},
            batches,
            "EVA looks for 34 directions (the rank 17 times eva_config's rho) in what model.layers.0.self_attn.q_proj "
            "reads, which has 32; give a lower r, or a lower rho in eva_config",
        ),
        ("corda", {}, lambda: [padded(0, 1)], "the start 'corda' is made from data, and every row of `batches` is all"),
        (
            "lora_ga",
            {},
            lambda: [{"input_ids": pico.tokens(), "labels": pico.tokens() * 0 - 100}],
            "no gradient reaches model.layers",
        ),
        ("lora_ga", {"lora_ga_config": {"direction": "up"}}, batches, "PEFT cannot start by 'lora_ga'"),
        (
            "corda",
            {},
            lambda: [{"words": pico.tokens()}],
            "the model does not run on the first of `batches`: ValueError",
        ),
    ],
)
def test_what_cannot_be_started_is_refused_and_leaves_no_trace(
    start: Any, given: dict[str, Any], data: Callable[[], Any] | None, words: str
) -> None:
    model = pico.llama()
    before, names = bits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterError) as caught:
        solidify.attach(model, lora={**declared(start), **given}, batches=data() if data is not None else None)
    assert words in str(caught.value)
    assert names == [name for name, _ in model.named_modules()] and not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Idle(nn.Module):
    """A wrapper with a layer that nothing calls."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.inner, self.spare = original, nn.Linear(32, 32)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("start", FED)
def test_a_layer_that_is_never_called_has_no_start(start: str) -> None:
    model = pico.llama()
    model.model.layers[0].mlp = Idle(model.model.layers[0].mlp)
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp\.spare is not called by the model on these batches"):
        solidify.attach(model, lora=declared(start, target_modules=["**.spare", Q]), batches=batches())
