"""What an objective cannot do on a model is found on the meta device, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pico
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.capture import Capture
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective, Term
from solidify.objective.rehearsal import rehearse
from training import LORA


class OwnMoE(nn.Module):
    """Experts and a router that transformers knows nothing of."""

    def __init__(self, original: nn.Module, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(32, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(experts))
        self.router.top_k = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        return sum(w[..., None] * expert(x) for w, expert in zip(weights.unbind(-1), self.experts, strict=True))


def meta(kind: str = "llama", **declared: Any) -> Any:
    with torch.device("meta"):
        model = pico.make(
            "LlamaForCausalLM", **pico.SIZES, intermediate_size=48, num_key_value_heads=2
        ) if kind == "llama" else pico.make(
            "OlmoeForCausalLM", **pico.SIZES, **pico.EXPERTS, intermediate_size=16
        )  # fmt: skip
    if kind == "own":
        for layer in model.model.layers:
            with torch.device("meta"):
                layer.mlp = OwnMoE(layer.mlp)
    return solidify.attach(model, **(declared or {"lora": LORA}))


def attempt(term: Term, model: Any = None, reference: Any = None, steps: int = 3) -> None:
    model, calls = model if model is not None else meta(), []
    handle = model.register_forward_hook(lambda *_: calls.append(term.name))
    try:
        rehearse(Objective([term], reference=reference), model, steps=steps)
    finally:
        handle.remove()
    assert calls, "the model was not run"


LAYERS = ["model.layers.0", "model.layers.1"]
FITTING: list[tuple[Any, dict[str, Any]]] = [
    (losses.next_token, {}),
    (losses.output_entropy, {}),
    (losses.forward_kl, {"temperature": 2.0}),
    (losses.reverse_kl, {}),
    (losses.jensen_shannon, {"beta": 0.3}),
    (losses.chunked_distillation, {}),
    (losses.hidden_match, {"layers": "model.layers.*"}),
    (losses.hidden_match, {"layers": LAYERS, "cosine": 0.1}),
    (losses.hidden_match, {"layers": LAYERS, "reference_layers": LAYERS[::-1]}),
    (losses.activation_sparsity, {"modules": "model.layers.*.mlp.act_fn"}),
    (losses.activation_sparsity, {"modules": LAYERS, "kind": "hoyer"}),
    (losses.weight_penalty, {}),
    (losses.weight_penalty, {"parameters": "**.q_proj.weight"}),
    (losses.group_lasso, {"groups": "tensors"}),
    (losses.orthogonality, {}),
    (losses.spectral, {}),
    (losses.l2_sp, {}),
    (losses.dpo, {}),
]


@pytest.mark.parametrize(("loss", "settings"), FITTING, ids=lambda value: getattr(value, "__name__", ""))
def test_what_fits_passes(loss: Any, settings: dict[str, Any]) -> None:
    attempt(Term(loss, arguments=settings), reference=meta().get_base_model())


ROUTER_TERMS = [losses.load_balance, losses.router_z, losses.router_entropy, losses.router_mutual_information]


@pytest.mark.parametrize("loss", ROUTER_TERMS)
def test_routers_of_the_users_own_are_named_or_refused(loss: Any) -> None:
    with pytest.raises(ObjectiveError, match=r"records? router_logits, but the model has none; name the modules"):
        attempt(Term(loss), meta("own"))
    named = Term(loss, arguments={"routers": "model.layers.*.mlp.router"})
    attempt(named, meta("own"))
    attempt(Term(loss), meta("olmoe"))
    with pytest.raises(ObjectiveError, match=r"looks into model.layers.\*.mlp.gate, but the model has none"):
        attempt(Term(loss, arguments={"routers": "model.layers.*.mlp.gate"}), meta("own"))


@pytest.mark.parametrize("loss", ROUTER_TERMS)
def test_a_term_on_named_routers_is_computed(loss: Any) -> None:
    model = pico.llama()
    for layer in model.model.layers:
        layer.mlp = OwnMoE(layer.mlp)
    term = Term(loss, arguments={"routers": ["model.layers.0.mlp.router", "model.layers.1.mlp.router"]})
    value = ObjectiveEngine(Objective([term]), model).loss(pico.collate(pico.ragged(3)))
    value.backward()
    assert bool(model.model.layers[0].mlp.router.weight.grad.any())


BROKEN: list[tuple[Any, dict[str, Any], str]] = [
    (losses.next_token, {"chunk": 0}, "chunk must be a whole number of at least 1"),
    (losses.next_token, {"chunk": "many"}, "chunk must be a whole number of at least 1"),
    (losses.next_token, {"label_smoothing": "a"}, "label_smoothing must be a finite number"),
    (losses.chunked_distillation, {"chunk": -1}, "chunk must be a whole number"),
    (losses.chunked_distillation, {"divergence": "mse"}, "divergence must be one of"),
    (losses.forward_kl, {"temperature": 0}, "temperature must be above 0"),
    (losses.forward_kl, {"temperature": "hot"}, "temperature must be a finite number"),
    (losses.jensen_shannon, {"beta": 1.5}, "beta must be from 0 to 1"),
    (losses.hidden_match, {"layers": 3}, "by one pattern or a list of them, but not by 3"),
    (losses.hidden_match, {"layers": []}, "by one pattern or a list of them"),
    (losses.hidden_match, {"layers": ["model.layers.0", "model.layers.9"]}, "looks into model.layers.9, but"),
    (
        losses.hidden_match,
        {"layers": "model.layers.*", "reference_layers": "model.layers.0"},
        "2 layers of the model, 1",
    ),
    (losses.hidden_match, {"layers": "model.layers.*", "pairs": {"model.layers.0": "model.layers.0"}}, "do not agree"),
    (losses.hidden_match, {"layers": "model.layers.*", "pairs": ["model.layers.0"]}, "pairs must map names to names"),
    (losses.hidden_match, {"layers": "model.layers.*", "cosine": "yes"}, "cosine must be a finite number"),
    (
        losses.hidden_match,
        {"layers": "model.layers.*", "reference_layers": "**.mlp.up_proj"},
        "is 32 wide and the refer",
    ),
    (losses.activation_sparsity, {"modules": "model.layers.*.gate_tap"}, "but the model has none"),
    (losses.activation_sparsity, {"modules": "model.layers.*", "threshold": None}, "threshold must be a finite number"),
    (losses.activation_sparsity, {"modules": "model.layers.*", "kind": "l3"}, "kind must be one of"),
    (losses.weight_penalty, {"parameters": "**.nowhere"}, "names no parameter"),
    (losses.weight_penalty, {"parameters": 3}, "the term WeightPenalty: TypeError"),
    (losses.group_lasso, {"groups": "experts"}, "has no dimension of experts"),
    (losses.orthogonality, {"parameters": "model.norm.weight"}, "is a vector"),
    (losses.spectral, {"start": 0}, "start must be a whole number"),
    (losses.l2_sp, {"parameters": "model.norm.weight"}, "none of the parameters is trained"),
    (losses.ewc, {"fisher": "nowhere.safetensors"}, "cannot be read as safetensors"),
    (losses.trash_budget, {"target": 0.5}, "looks into TrashCan, but the model has none"),
    (losses.trash_budget, {"target": "much"}, "target must be a finite number"),
    (losses.kept_share, {"temperature": 0}, "temperature must be above 0"),
    (losses.trash_controller, {"target": 0.5, "momentum": 2}, "momentum must be from 0 to 1"),
    (losses.load_balance, {"null_experts": 1.5}, "null_experts must be a whole number of at least 0"),
    (losses.router_entropy, {"direction": "up"}, "direction must be sharpen or spread"),
    (losses.dpo, {"beta": 0}, "beta must be above 0"),
    (losses.cached_kl, {}, "the batch lacks columns"),
    (losses.next_token, {"unknown": 1}, "cannot be built"),
]


@pytest.mark.parametrize(("loss", "settings", "words"), BROKEN, ids=[f"{b[0].__name__}-{b[1]}" for b in BROKEN])
def test_what_does_not_fit_is_refused_without_weights(loss: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        attempt(Term(loss, arguments=settings), reference=meta().get_base_model())


def test_more_null_experts_than_experts_are_refused() -> None:
    term = Term(losses.load_balance, arguments={"null_experts": 4, "routers": "**.mlp.router"})
    with pytest.raises(ObjectiveError, match="none would be real"):
        attempt(term, meta("own"))


def test_a_fisher_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"other.weight": torch.ones(2)}, tmp_path / "f.safetensors")
    with pytest.raises(ObjectiveError, match="belongs to another model"):
        attempt(Term(losses.ewc, arguments={"fisher": str(tmp_path / "f.safetensors")}))


class Wrong:
    captures: ClassVar[dict[str, Capture]] = {"seen": Capture(modules="model.layers.*", element=0)}

    def __call__(self, seen: Mapping[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        return torch.stack([value.flatten(0, 1)[mask].square().mean(-1) for value in seen.values()])


class Picky(Wrong):
    def __call__(self, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert all(bool((value >= 0).all()) for value in seen.values())  # made-up values cannot know
        return torch.stack([value.mean() for value in seen.values()]).sum()


def test_a_users_term_is_judged_by_what_it_returns_and_not_by_made_up_values() -> None:
    with pytest.raises(ObjectiveError, match=r"Wrong returned a tensor of shape \[2, 16\], not a scalar"):
        attempt(Term(Wrong))
    attempt(Term(Picky))


def test_a_schedule_in_shares_needs_the_number_of_steps() -> None:
    weight = {"schedule": {"start": 0.0, "end": 1.0, "length": 0.5}}
    attempt(Term(losses.weight_penalty, weight))
    with pytest.raises(ObjectiveError, match="the number of steps is unknown"):
        attempt(Term(losses.weight_penalty, weight), steps=0)


def test_a_frozen_trash_can_that_shall_move_is_found(trash_artifact: Path) -> None:
    from solidify.artifact import loading

    controller = Term(losses.trash_controller, arguments={"target": 0.5})
    objective = [Term("model"), controller]
    for train, fits in ((["**.mlp.trash"], True), ([], False)):
        model = loading.load_base(str(trash_artifact), device="meta", trust_remote_code=True).model
        peft_model = solidify.attach(model, lora=LORA, train=train)
        if fits:
            rehearse(Objective(objective), peft_model, steps=3)
            continue
        with pytest.raises(ObjectiveError, match="that module is frozen"):
            rehearse(Objective(objective), peft_model, steps=3)


T5 = {"vocab_size": 128, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
DECODER = "decoder.block.*.layer.2.DenseReluDense"
CROSS = "decoder.block.*.layer.1.EncDecAttention.k"


def encoder_decoder() -> Any:
    with torch.device("meta"):
        model = pico.make("T5ForConditionalGeneration", **T5, decoder_start_token_id=0)
    return solidify.attach(model, lora={"r": 2, "target_modules": ["decoder.block.*.layer.0.SelfAttention.q"]})


@pytest.mark.parametrize("modules", [DECODER, CROSS, "encoder.block.*.layer.1.DenseReluDense"])
def test_what_fits_an_encoder_decoder_passes(modules: str) -> None:
    attempt(Term(losses.activation_sparsity, arguments={"modules": modules}), encoder_decoder())
    matching = Term(losses.hidden_match, arguments={"layers": modules})
    attempt(matching, encoder_decoder(), encoder_decoder().get_base_model())
    for loss in (losses.next_token, losses.output_entropy):
        attempt(Term(loss), encoder_decoder())


def test_what_an_encoder_decoder_would_refuse_in_training_is_refused() -> None:
    whole = Term(losses.activation_sparsity, arguments={"modules": "decoder.block.*.layer.0.SelfAttention"})
    attempt(whole, encoder_decoder())  # element 0 of what it returns
    with pytest.raises(ObjectiveError, match="one term for each"):
        attempt(Term(losses.activation_sparsity, arguments={"modules": [DECODER, CROSS]}), encoder_decoder())
    with pytest.raises(ObjectiveError, match="wide and the reference's"):
        attempt(
            Term(
                losses.hidden_match,
                arguments={"layers": DECODER, "reference_layers": "decoder.block.*.layer.2.DenseReluDense.wi"},
            ),
            encoder_decoder(),
            encoder_decoder().get_base_model(),
        )
