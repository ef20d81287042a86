"""What routers of many families chose is read right, and terms on it are their formulas in float64.

The reference for "chosen experts" is what the block's experts were really called with.
"""

from __future__ import annotations

import math
from typing import Any

import families
import pico
import pytest
import torch

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.losses import routing
from solidify.objective.capture import Capture, capture
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective, Term

MASK = torch.tensor([1] * 15 + [0] * 5)

# What the weights of the family's routers are as a function of their logits; None where they are not returned.
SCORES = {
    "olmoe": "softmax",
    "mixtral": "softmax",
    "qwen3_moe": "softmax",
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid",
    "deepseek_v4": "sqrt_softplus",
    "gpt_oss": "softmax",
    "granitemoe": "softmax",
    "jamba": "softmax",
    "phimoe": None,  # sparsemixer: neither
    "dbrx": None,
    "ernie4_5_moe": "softmax",
    "longcat_flash": "softmax",
    "glm4_moe": "sigmoid",
    "lfm2_moe": "sigmoid",
    "minimax_m2": "sigmoid",
    "flex_olmo": "softmax",
}


def run(model: Any, rows: int = 2, length: int = 7) -> tuple[dict[str, Any], dict[str, list[torch.Tensor]]]:
    """Returns what routers returned, and tensors that experts were called with, by name."""
    called: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts":

            def keep(_module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                called[name] = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]

            module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), capture(model, {"router": Capture(records="router_logits")}) as captured:
        model(input_ids=pico.tokens(rows, length))
    return captured["router"], called


@pytest.mark.parametrize("family", SCORES)
def test_the_chosen_experts_are_those_that_the_block_ran(family: str) -> None:
    model = families.tiny(family)
    outputs, called = run(model)
    found = dict(routing.read_all(outputs, torch.ones(14), model))
    assert found.keys() == outputs.keys()
    compared = 0
    for name, read in found.items():
        block = name.rpartition(".")[0]
        given = next(tensors for path, tensors in called.items() if path.startswith(block))
        index = next(t for t in given if not t.is_floating_point())
        assert torch.equal(read.index.sort(-1).values, index.reshape(read.index.shape).sort(-1).values)
        assert (read.logits.softmax(-1) - 1 / read.logits.shape[-1]).abs().max() > 1e-3  # it has opinions
        compared += 1
    assert compared
    assert routing.scores_of(found.values()) == SCORES[family]


def test_llama4s_router_returns_its_logits_second_and_zero_for_all_but_the_chosen() -> None:
    model = families.tiny("llama4_text")
    outputs, _ = run(model)
    found = dict(routing.read_all(outputs, torch.ones(14), model))
    for name, read in found.items():
        scores, logits = outputs[name]
        assert torch.equal(read.logits, logits)
        assert torch.equal(read.index, logits.topk(1).indices)
        assert torch.allclose(read.weights, logits.gather(1, read.index).sigmoid())
        assert torch.equal(scores != 0, torch.zeros_like(scores).scatter(1, read.index, 1.0).bool())
    assert routing.scores_of(found.values()) == "sigmoid"


def test_switch_marks_experts_and_its_decoder_has_other_positions() -> None:
    model = families.tiny("switch_transformers", "AutoModelForSeq2SeqLM")
    with torch.no_grad(), capture(model, {"router": Capture(records="router_logits")}) as captured:
        model(input_ids=pico.tokens(2, 7), decoder_input_ids=pico.tokens(2, 5))
    encoder = {name: output for name, output in captured["router"].items() if name.startswith("encoder")}
    for _, read in routing.read_all(encoder, torch.ones(14), model):
        kept = read.counted[:, 0]
        assert kept.any()
        assert torch.equal(read.index[kept, 0], read.logits[kept].argmax(-1))
    with pytest.raises(ObjectiveError, match=r"returned logits \[2, 5, 4\] for 14 positions"):
        list(routing.read_all(captured["router"], torch.ones(14), model))


def test_gemma4_records_probabilities() -> None:
    from transformers import Gemma4ForCausalLM

    config = families.tiny_config("gemma4_text")
    more = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    for key, wanted in more.items():
        setattr(config, key, wanted)
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(config).eval()
    outputs, _ = run(model)
    for name, read in routing.read_all(outputs, torch.ones(14), model):
        assert read.normal
        assert torch.allclose(read.probabilities("softmax"), outputs[name][0], atol=1e-6)
        assert torch.equal(read.index, outputs[name][2])
    with pytest.raises(ObjectiveError, match="returns probabilities; it has no logits"):
        losses.router_z().statistics(outputs, torch.ones(14), model)


def test_jetmoes_attention_router_counts_once() -> None:
    model = families.tiny("jetmoe")
    outputs, _ = run(model)
    assert len(outputs) == 6
    found = dict(routing.read_all(outputs, torch.ones(14), model))
    assert len(found) == 4
    for read in found.values():
        assert torch.equal(read.index, read.logits.topk(2).indices)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="returned no logits at index 0"):
        routing.read("gate", torch.arange(8).reshape(2, 4), 2)
    with pytest.raises(ObjectiveError, match="says how many experts"):
        routing.read("gate", torch.randn(2, 4), 2)
    with pytest.raises(ObjectiveError, match="for 3 positions"):
        routing.read("gate", (torch.randn(2, 4),), 3)
    with pytest.raises(ObjectiveError, match="different numbers of columns"):
        outputs = {f"{n}.gate": (torch.randn(3, n), *torch.randn(3, n).topk(2)) for n in (4, 6)}
        losses.load_balance().statistics(outputs, {}, torch.ones(3))
    with pytest.raises(ObjectiveError, match="scores must be one of"):
        losses.router_entropy(scores="relu")


@pytest.mark.parametrize("scores", routing.SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_scaled_weights_still_tell_their_scores(scores: str, dtype: torch.dtype) -> None:
    logits = 2 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    read = routing.Routing(logits, torch.zeros(0))
    weights, index = read.probabilities(scores).topk(3)
    weights = 2.5 * weights / weights.sum(-1, keepdim=True)
    assert routing.scores_of([routing.Routing(logits, index, weights.to(dtype))]) == scores
    noise = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) + 0.1
    assert routing.scores_of([routing.Routing(logits, index, noise)]) is None


def outputs(seed: int = 0, experts: int = 8, scores: str = "softmax") -> dict[str, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for i in range(3):
        logits = 2 * torch.randn(20, experts, generator=generator, dtype=torch.float64)
        weights, index = routing.Routing(logits, logits).probabilities(scores).topk(2)
        result[f"model.layers.{i}.mlp.gate"] = (logits, weights, index)
    return result


def probabilities(logits: torch.Tensor, scores: str) -> list[list[float]]:
    rows = []
    for row in logits[:15].tolist():
        each = {
            "softmax": [math.exp(x) for x in row],
            "sigmoid": [1 / (1 + math.exp(-x)) for x in row],
            "sqrt_softplus": [math.sqrt(math.log1p(math.exp(x))) for x in row],
        }[scores]
        rows.append([x / sum(each) for x in each])
    return rows


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p)


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def value(term: Any, **supply: Any) -> torch.Tensor:
    return term.value(term.statistics(mask=MASK, **supply) / 15)


class Mixture(torch.nn.Module):
    """A block of the user's own: a plain linear layer routes, so transformers records nothing."""

    routers: Any = "router"

    def __init__(self, original: Any, top_k: int = 3) -> None:
        super().__init__()
        self.router = torch.nn.Linear(32, 6, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(6))
        self.top_k = top_k

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        chosen = self.router(hidden_states).softmax(-1).topk(self.top_k)
        weights = hidden_states.new_zeros(*hidden_states.shape[:-1], 6).scatter(-1, chosen.indices, chosen.values)
        return sum(weights[..., i, None] * expert(hidden_states) for i, expert in enumerate(self.experts))


class Undeclared(Mixture):
    routers = None


class Misnamed(Mixture):
    routers = ("gate",)


def with_block(kind: type, *, adapted: bool = False) -> Any:
    torch.manual_seed(0)
    model = pico.olmoe()
    solidify.replace(model, "model.layers.*.mlp", kind)
    return solidify.attach(model, lora={"r": 2, "target_modules": ["**.router"]}) if adapted else model


def balance(model: Any, **arguments: Any) -> float:
    """Returns the load balance of a batch, as the engine computes it."""
    engine = ObjectiveEngine(Objective([Term(losses.load_balance, arguments=arguments)]), model)
    loss = engine.loss({"input_ids": pico.tokens()})
    assert loss.requires_grad
    engine.close()
    return float(loss.detach())


def test_a_block_without_recorded_routers_is_balanced_by_name_and_by_declaration() -> None:
    undeclared, declared = with_block(Undeclared), with_block(Mixture)
    with capture(declared, {"router": Capture(modules="**.router")}) as seen:
        declared(input_ids=pico.tokens())
    expected = 0.0
    for logits in seen["router"].values():
        p, top = logits.flatten(0, -2).softmax(-1), logits.flatten(0, -2).topk(3).indices
        shares = top.flatten().bincount(minlength=6) / top.numel()
        expected += float(6 * (shares * p.mean(0)).sum().detach()) / 2
    assert balance(declared) == pytest.approx(expected, rel=1e-5)
    for word in ("modules", "routers"):
        assert balance(undeclared, **{word: "**.router"}) == pytest.approx(expected, rel=1e-5)
    assert balance(with_block(Mixture, adapted=True)) == pytest.approx(expected, rel=1e-5)


def test_a_router_that_nobody_names_is_refused_with_both_ways() -> None:
    with pytest.raises(
        ObjectiveError, match=r"`modules` in the term's arguments, or an attribute `routers` of the class"
    ):
        balance(with_block(Undeclared))
    with pytest.raises(ObjectiveError, match=r"Misnamed declares routers = \('gate',\), but there is no .*mlp.gate"):
        balance(with_block(Misnamed))
    for term in (losses.load_balance, losses.router_z, losses.router_entropy, losses.router_mutual_information):
        assert term(modules="**.router").captures["router"].modules == "**.router"
        with pytest.raises(ObjectiveError, match="`routers` is the older name of `modules`"):
            term(routers="a", modules="b")


@pytest.mark.parametrize("scores", routing.SCORES)
def test_entropy_balance_and_information_are_their_formulas_for_the_scores_that_weights_show(scores: str) -> None:
    router = outputs(scores=scores)
    sharp, balance, information = 0.0, 0.0, 0.0
    for logits, _, index in router.values():
        p = probabilities(logits, scores)
        sharp += sum(map(entropy, p)) / 15 / 3
        information += (entropy(mean(p)) - sum(map(entropy, p)) / 15) / 3
        shares = torch.bincount(index[:15].flatten(), minlength=8).tolist()
        balance += 8 * sum(f / 30 * q for f, q in zip(shares, mean(p), strict=True)) / 3
    assert value(losses.router_entropy(), router=router).item() == pytest.approx(sharp, rel=1e-10)
    assert value(losses.router_entropy("spread"), router=router).item() == pytest.approx(-sharp, rel=1e-10)
    assert value(losses.router_mutual_information(), router=router).item() == pytest.approx(-information, rel=1e-10)
    assert value(losses.load_balance(), router=router, trash={}).item() == pytest.approx(balance, rel=1e-10)
    said = losses.router_entropy(scores="softmax" if scores != "softmax" else "sigmoid")
    assert value(said, router=router).item() != pytest.approx(sharp, rel=1e-3)


def test_mutual_information_is_zero_for_routers_without_opinions_and_log_n_at_its_best() -> None:
    term = losses.router_mutual_information(scores="softmax")
    one = torch.full((15, 4), -40.0)
    one[range(15), [i % 5 % 4 for i in range(15)]] = 0.0
    even = torch.full((16, 4), -40.0)
    even[range(16), [i % 4 for i in range(16)]] = 0.0

    def of(logits: torch.Tensor) -> float:
        mask = torch.ones(len(logits))
        return term.value(term.statistics({"gate": (logits, *logits.topk(1))}, mask) / len(logits)).item()

    assert of(torch.zeros(15, 4)) == pytest.approx(0.0, abs=1e-6)
    assert of(even) == pytest.approx(-math.log(4), rel=1e-6)
    assert of(even) < of(one) < 0
    assert of(one.roll(1, -1)) == pytest.approx(of(one), rel=1e-6)  # no expert is special


@pytest.mark.parametrize(
    "make",
    [
        losses.load_balance,
        losses.router_z,
        losses.router_entropy,
        lambda: losses.router_entropy("spread"),
        losses.router_mutual_information,
    ],
)
def test_gradients_are_those_of_finite_differences_and_leave_padding_alone(make: Any) -> None:
    term = make()
    name, (logits, weights, index) = next(iter(outputs().items()))
    more = {"trash": {}} if isinstance(term, losses.load_balance) else {}

    def of(some: torch.Tensor) -> torch.Tensor:
        return value(term, router={name: (some, weights, index)}, **more)

    logits.requires_grad_()
    assert torch.autograd.gradcheck(of, (logits,), fast_mode=True)
    (gradient,) = torch.autograd.grad(of(logits), logits)
    assert gradient[:15].abs().sum() > 1e-3
    assert not gradient[15:].any()
    with torch.no_grad():
        assert of(logits - 0.1 * gradient) < of(logits)


def test_sharpening_sharpens_and_spreading_spreads() -> None:
    for direction, sign in (("sharpen", -1), ("spread", 1)):
        logits = outputs()["model.layers.0.mlp.gate"][0].requires_grad_()
        term = losses.router_entropy(direction, scores="softmax")
        (gradient,) = torch.autograd.grad(value(term, router={"gate": (logits, *logits.topk(2))}), logits)
        before, after = (torch.special.entr((logits - s * gradient).softmax(-1))[:15].sum() for s in (0.0, 1.0))
        assert sign * (after - before) > 0


def test_null_experts_count_with_their_mean_load() -> None:
    """AdaMoE: how tokens fall among null experts does not matter, that many go to them does."""
    router = outputs(experts=6)
    expected = 0.0
    for logits, _, index in router.values():
        load = torch.bincount(index[:15].flatten(), minlength=6).double()
        load[4:] = load[4:].mean()
        p = torch.tensor(mean(probabilities(logits, "softmax")))
        expected += float(6 * (load / 30 * p).sum()) / 3
    term = losses.load_balance(null_experts=2, scores="softmax")
    assert value(term, router=router, trash={}).item() == pytest.approx(expected, rel=1e-6)
    swapped = {n: (a, w, torch.where(i == 5, 4, torch.where(i == 4, 5, i))) for n, (a, w, i) in router.items()}
    assert value(term, router=swapped, trash={}).item() == pytest.approx(expected, rel=1e-6)
    plain = losses.load_balance(scores="softmax")
    assert value(plain, router=swapped, trash={}).item() != pytest.approx(value(plain, router=router, trash={}).item())
    with pytest.raises(ObjectiveError, match="none would be real"):
        losses.load_balance(null_experts=6).statistics(router, {}, MASK)
    with pytest.raises(ObjectiveError, match="null_experts must be a whole number"):
        losses.load_balance(null_experts=-1)


def test_longcats_zero_experts_are_null_experts() -> None:
    model = families.tiny("longcat_flash")
    found, _ = run(model)
    term = losses.load_balance(null_experts=4)
    sums = term.statistics(found, {}, torch.ones(14), model)
    assert sums.shape == (2, 2, 8)
    assert sums[:, 0].sum(-1).tolist() == [28, 28]
    assert 0.2 < term.value(sums / 14).item() < 4


def test_half_precision_routers_are_judged_in_float32() -> None:
    model = pico.olmoe(dtype=torch.bfloat16)
    found, _ = run(model)
    wide = {name: (logits.double(), weights, index) for name, (logits, weights, index) in found.items()}
    for term, more in ((losses.load_balance(), {"trash": {}}), (losses.router_z(), {}), (losses.router_entropy(), {})):
        mask = torch.ones(14)
        ours = term.value(term.statistics(router=found, mask=mask, model=model, **more) / 14)
        exact = term.value(term.statistics(router=wide, mask=mask, model=model, **more) / 14)
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(exact.item(), rel=1e-5)


def test_what_kind_of_quantity_they_are() -> None:
    assert Term(losses.router_mutual_information).needs_prepass
    assert not Term(losses.router_entropy).needs_prepass
    assert Term(losses.load_balance).needs_prepass
    with pytest.raises(ObjectiveError, match="direction must be sharpen or spread"):
        losses.router_entropy("up")


def test_the_scores_that_were_shown_are_remembered() -> None:
    term = Term(losses.router_entropy)
    term.subject.statistics(outputs(scores="sigmoid"), MASK)
    assert term.subject.scores == "sigmoid"
    again = Term(losses.router_entropy)
    again.load_state_dict(term.state_dict())
    assert again.subject.scores == "sigmoid"
