"""The tests that a correct trash can must pass, in the order of the numbers in their names.

Reference: a top-k over N real columns and m copies of one trash column, written out; and the original block itself.
"""

from __future__ import annotations

import copy
from pathlib import Path

import families
import pico
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import solidify
from solidify.model import anatomy, probing
from solidify.modules.trashcan_moe import ASLEEP, WEIGHTINGS, TrashCan, TrashCanMoE, measure_worth

HIDDEN, EXPERTS, TOP_K, INNER = 32, 8, 2, 16


def block(*, normalised: bool = False, dtype: torch.dtype = torch.float32, implementation: str = "grouped_mm"):
    """Returns an OLMoE block with opinionated routing."""
    model = pico.olmoe(1, dtype=dtype, norm_topk_prob=normalised)
    model.set_experts_implementation(implementation)
    return model.model.layers[0].mlp


def states(batch: int = 2, length: int = 50, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tie(moe: torch.nn.Module) -> None:
    """Makes half of the experts tie with the other half, bit for bit."""
    with torch.no_grad():
        moe.gate.weight[EXPERTS // 2 :] = moe.gate.weight[: EXPERTS // 2]


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weighting", ["base", "softmax_all"])
def test_1_asleep_it_is_the_original_bit_for_bit_with_gradients(
    implementation: str, dtype: torch.dtype, tied: bool, weighting: str
) -> None:
    original = block(dtype=dtype, implementation=implementation)
    if tied:
        tie(original)
    can = TrashCanMoE(copy.deepcopy(original), weighting=weighting)
    can.experts.config = original.experts.config
    x, y = states(dtype=dtype).requires_grad_(), states(dtype=dtype).requires_grad_()
    expected, found = original(x), can(y)
    assert torch.equal(found, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    expected.backward(direction)
    found.backward(direction)
    assert torch.equal(x.grad, y.grad)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter.grad, can.get_parameter(name).grad), name
    assert not can.trash.weight.grad.any()


@pytest.mark.parametrize("weighting", ["topk_norm", "real_norm"])
def test_1_the_normalising_weightings_are_exact_on_a_normalising_router(weighting: str) -> None:
    original = block(normalised=True)
    expected = original(states())
    assert torch.equal(TrashCanMoE(original, weighting=weighting)(states()), expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_2_when_all_is_trashed_the_output_is_zero_and_no_expert_runs(weighting: str) -> None:
    can = TrashCanMoE(block(), weighting=weighting, threshold=1e4)
    rows = record_rows(can)
    assert not can(states()).any()
    assert sum(rows) == 0


def record_rows(can: TrashCanMoE) -> list[int]:
    rows: list[int] = []
    can.experts.register_forward_pre_hook(lambda module, args: rows.append(args[1].numel()))
    return rows


def test_3_the_experts_compute_exactly_the_kept_slots() -> None:
    can = TrashCanMoE(block(implementation="eager"), threshold=-2.0)
    kept = int((margins(can, states()) >= 0).sum())
    assert 0 < kept < states()[..., 0].numel() * TOP_K
    rows = record_rows(can)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        can(states())
    assert sum(rows) == kept
    tokens = states()[..., 0].numel()
    router, threshold = 2 * tokens * HIDDEN * EXPERTS, 2 * tokens * HIDDEN
    assert counter.get_total_flops() == 6 * HIDDEN * INNER * kept + router + threshold


def margins(can: TrashCanMoE, hidden: torch.Tensor) -> torch.Tensor:
    tokens = hidden.reshape(-1, HIDDEN)
    logits, _, index = can.gate(tokens)
    return can.trash(tokens, logits, index)


def test_3_raising_the_threshold_never_keeps_more() -> None:
    can = TrashCanMoE(block())
    before = margins(can, states()) >= 0
    for threshold in (-6.0, -4.0, -3.0, -2.0, -1.0, -0.5, 0.1):
        can.trash.bias.fill_(threshold)
        now = margins(can, states()) >= 0
        assert not (now & ~before).any()
        before = now
    assert not before.any()


def reference(can: TrashCanMoE, hidden: torch.Tensor, copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes by a top-k over real columns and copies of the trash's logit; returns output and kept slots."""
    tokens = hidden.reshape(-1, HIDDEN)
    logits = F.linear(tokens, can.gate.weight).double()
    z = tokens.double() @ can.trash.weight.double() + can.trash.bias.double()
    trash = (torch.logsumexp(logits, -1) + z)[:, None].expand(-1, copies)
    columns = torch.cat([logits, trash], dim=-1)
    chosen = columns.topk(TOP_K, dim=-1).indices
    probabilities = F.softmax(logits, dim=-1)
    output = torch.zeros(tokens.shape, dtype=torch.float64)
    kept = torch.zeros(len(tokens), dtype=torch.long)
    for token, row in enumerate(chosen):
        for expert in row[row < EXPERTS]:
            gate, up = (tokens[token].double() @ can.experts.gate_up_proj[expert].double().T).chunk(2)
            inner = F.silu(gate) * up
            output[token] += probabilities[token, expert] * (inner @ can.experts.down_proj[expert].double().T)
            kept[token] += 1
    return output.view(hidden.shape), kept


@pytest.mark.parametrize("copies", [TOP_K, TOP_K + 5])
def test_4_it_keeps_what_a_wide_top_k_with_a_shared_trash_column_keeps(copies: int) -> None:
    can = TrashCanMoE(block(), threshold=-2.0)
    with torch.no_grad():
        can.trash.weight.normal_(0, 0.2)
        output, kept = reference(can, states(), copies)
        assert torch.equal((margins(can, states()) >= 0).sum(-1), kept)
        assert 0 < int(kept.sum()) < kept.numel() * TOP_K
        assert torch.allclose(can(states()).double(), output, atol=1e-5)


def test_4_the_order_of_the_experts_does_not_matter() -> None:
    original = block()
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(2))
    shuffled = copy.deepcopy(original)
    shuffled.experts.config = original.experts.config
    with torch.no_grad():
        shuffled.gate.weight.copy_(original.gate.weight[order])
        shuffled.experts.gate_up_proj.copy_(original.experts.gate_up_proj[order])
        shuffled.experts.down_proj.copy_(original.experts.down_proj[order])
        first = TrashCanMoE(original, threshold=-2.0)(states())
        second = TrashCanMoE(shuffled, threshold=-2.0)(states())
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("weighting", ["softmax_all", "topk_norm"])
def test_5_the_gradient_of_the_threshold_matches_finite_differences(weighting: str) -> None:
    can = TrashCanMoE(block(normalised=weighting == "topk_norm"), weighting=weighting, threshold=-2.0).double()
    can.experts.config._experts_implementation_internal = "eager"
    x = states(dtype=torch.float64)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(shift: float) -> torch.Tensor:
        can.trash.weight.data[3] = shift
        return (can(x) * direction).sum()

    loss(0.0).backward()
    keep = margins(can, x) >= 0
    step = 2e-3  # the threshold is computed in float32, so a smaller step would measure its rounding
    with torch.no_grad():
        difference = (loss(step) - loss(-step)) / (2 * step)
    assert torch.equal(margins(can, x) >= 0, keep)
    assert abs(float(can.trash.weight.grad[3])) > 1e-6
    assert torch.allclose(can.trash.weight.grad[3], difference, rtol=1e-3)


def test_5_the_straight_through_estimate_reaches_the_threshold_and_real_norm_does_not() -> None:
    gradients = {}
    for weighting in ("base", "real_norm"):
        can = TrashCanMoE(block(normalised=True), weighting=weighting, threshold=-2.0)
        can(states()).square().sum().backward()
        gradients[weighting] = float(can.trash.weight.grad.abs().max()) if can.trash.weight.grad is not None else 0.0
    assert gradients["base"] > 1e-4
    assert gradients["real_norm"] == 0.0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("threshold", [-2.0, ASLEEP])
def test_5_without_gradients_the_bits_are_the_same(weighting: str, threshold: float) -> None:
    can = TrashCanMoE(block(normalised=True), weighting=weighting, threshold=threshold).eval()
    with torch.enable_grad():
        wanted = can(states())
    with torch.no_grad():
        assert torch.equal(can(states()), wanted)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("hidden", ["many", "one", "none", "one expert"])
def test_6_weights_sum_as_they_should_and_nothing_is_nan(weighting: str, hidden: str) -> None:
    can = TrashCanMoE(block(normalised=True), weighting=weighting, threshold=-1.0)
    x = {"many": states(), "one": states(1, 1), "none": states(1, 1)[:, :0], "one expert": states()}[hidden]
    if hidden == "one expert":
        with torch.no_grad():
            can.gate.weight[1:] = -can.gate.weight[:1] * 50
    tokens = x.reshape(-1, HIDDEN)
    logits, base_weights, index = can.gate(tokens)
    margin = can.trash(tokens, logits, index)
    keep = margin >= 0
    weights = can._weigh(base_weights, margin, keep, logits, index)
    total = (weights * keep).sum(-1)
    assert torch.isfinite(can(x)).all()
    if weighting == "real_norm":
        assert torch.allclose(total, keep.any(-1).float())
    if weighting == "topk_norm":
        probabilities = F.softmax(logits, -1).gather(-1, index)
        z = tokens @ can.trash.weight + can.trash.bias
        trashed = (~keep).sum(-1) * z.exp()
        kept = (probabilities * keep).sum(-1)
        assert torch.allclose(total, kept / (kept + trashed).clamp(min=1e-30), atol=1e-6)
    if weighting == "base":
        assert torch.equal(weights * keep, base_weights * keep)


def test_8_no_state_moves_in_a_forward_pass() -> None:
    can = TrashCanMoE(block(), threshold=-2.0).train()
    before = {name: tensor.clone() for name, tensor in can.state_dict().items()}
    can(states()).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in can.state_dict().items())


def awake(layers: int = 2, **settings: object) -> torch.nn.Module:
    model = pico.olmoe(layers, **settings)
    solidify.replace(model, "model.layers.*.mlp", TrashCanMoE, arguments={"threshold": -2.0})
    return model


def test_10_cached_decoding_equals_the_full_forward() -> None:
    model = awake()
    prompt = pico.tokens(1, 10)
    cached = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=True)
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_10_a_token_does_not_depend_on_what_else_is_in_the_batch() -> None:
    model = awake()
    rows = pico.tokens(4, 12)
    with torch.no_grad():
        together = model(input_ids=rows).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


def test_router_logits_are_still_recorded_real_columns_only() -> None:
    model = awake()
    output = model(input_ids=pico.tokens(), labels=pico.tokens(), output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(24, EXPERTS)] * 2
    assert output.aux_loss.requires_grad


def test_only_new_keys_appear_in_the_checkpoint() -> None:
    before = set(pico.olmoe().state_dict())
    added = set(awake().state_dict()) - before
    assert before <= set(awake().state_dict())
    assert {name.rpartition("mlp.")[2] for name in added} == {"trash.weight", "trash.bias", "trash.kept", "trash.worth"}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen3MoeForCausalLM", {**pico.EXPERTS, "moe_intermediate_size": 16, "head_dim": 8}),
        ("MixtralForCausalLM", {"num_local_experts": 4, "intermediate_size": 48, "num_key_value_heads": 2}),
        ("FlexOlmoForCausalLM", {**pico.EXPERTS, "intermediate_size": 16, "num_key_value_heads": 2}),
    ],
)
def test_siblings_with_the_same_contract_take_it(family: str, settings: dict[str, object]) -> None:
    model = pico.make(family, **{**pico.SIZES, **settings})
    inputs = probing.probe_inputs(model)
    before = anatomy.run(model, inputs)
    edits = solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    assert all(edit.bypass and edit.identical for edit in edits)
    assert torch.equal(anatomy.run(model, inputs), before)
    for layer in model.model.layers:
        layer.mlp.trash.bias.fill_(-1.2)
    assert not torch.equal(anatomy.run(model, inputs), before)


def test_blocks_of_another_make_are_refused() -> None:
    model = families.tiny("llama4_text")
    with pytest.raises(solidify.SurgeryError, match="a router that returns logits, weights and indices, and Llama4Rou"):
        solidify.replace(model, "model.layers.*.feed_forward", TrashCanMoE)
    with pytest.raises(solidify.SurgeryError, match="consists of: gate_proj, up_proj, down_proj, act_fn"):
        solidify.replace(pico.llama(), "model.layers.*.mlp", TrashCanMoE)


@pytest.mark.parametrize("arguments", [{"weighting": "soft"}, {"threshold": float("-inf")}])
def test_bad_arguments_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TrashCanMoE(block(), **arguments)


def test_the_sleeping_threshold_survives_half_precision() -> None:
    can = TrashCan(8, EXPERTS).bfloat16()
    margin = can(torch.randn(4, 8), torch.randn(4, EXPERTS), torch.zeros(4, TOP_K, dtype=torch.long))
    assert float(can.bias) < ASLEEP / 2
    assert (margin > 1000).all()


def test_compiled_it_is_the_same_function() -> None:
    can = TrashCanMoE(block(), threshold=-2.0)
    with torch.no_grad():
        compiled = torch.compile(can, backend="eager")(states())
        assert torch.allclose(compiled, can(states()), atol=1e-6)


SHARED = ("qwen2_moe", "deepseek_v3", "ernie4_5_moe")  # of the last two the router is a sigmoid, and has a scaling


def shared_block(family: str) -> torch.nn.Module:
    model = families.tiny(family)
    return next(module for module in model.modules() if "experts" in dict(module.named_children()))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", SHARED)
def test_beside_shared_experts_only_routed_ones_are_skipped(name: str, weighting: str) -> None:
    """Asleep it is the block bit for bit, with its scalings; with all trashed the shared part is left."""
    block = shared_block(name)
    x = torch.randn(1, 12, block.gate.weight.shape[-1])
    expected = block(x)
    can = TrashCanMoE(copy.deepcopy(block), weighting=weighting)
    assert torch.equal(can(x), expected)
    can.trash.bias.fill_(1e4)
    rest = next(child for child in (getattr(block, n, None) for n in ("shared_expert", "shared_experts")) if child)(x)
    if hasattr(block, "shared_expert_gate"):
        rest = torch.sigmoid(block.shared_expert_gate(x)) * rest
    assert torch.allclose(can(x), rest, atol=1e-6) and not torch.allclose(rest, expected, atol=1e-3)
    rows = record_rows(can)
    logits, weights, index = block.gate(x[0])
    can.trash.bias.copy_(logits.log_softmax(-1).gather(-1, index).median())
    keep = can.trash(x[0], logits, index) >= 0
    assert 0 < keep.sum() < keep.numel()
    found = can(x)
    assert sum(rows) == keep.sum()
    loop = rest[0].clone()
    chosen = can._weigh(weights, can.trash(x[0], logits, index), keep, logits, index)
    for token, slot in keep.nonzero().tolist():
        loop[token] += block.experts(
            x[0, token][None], index[token, slot][None, None], chosen[token, slot][None, None]
        )[0]
    assert torch.allclose(found[0], loop, atol=1e-5)


@pytest.mark.parametrize("weighting", ["topk_norm", "real_norm"])
def test_kept_slots_share_what_the_router_gives_all(weighting: str) -> None:
    """Of a sigmoid router with a scaling, too: the sum of a token's weights stays, apart from what the trash takes."""
    can = TrashCanMoE(shared_block("deepseek_v3"), weighting=weighting, threshold=-2.0)
    x = torch.randn(40, can.gate.weight.shape[-1])
    logits, weights, index = can.gate(x)
    scaling = weights.sum(-1)
    margin = can.trash(x, logits, index)
    keep = margin >= 0
    found = (can._weigh(weights, margin, keep, logits, index) * keep).sum(-1)
    if weighting == "topk_norm":
        slot = logits.log_softmax(-1).gather(-1, index).argmax(-1, keepdim=True)
        unit = weights.gather(-1, slot) / logits.softmax(-1).gather(-1, index).gather(-1, slot)
        trash = (~keep).sum(-1) * torch.exp(torch.tensor(-2.0)) * unit[:, 0]
        kept = (weights * keep).sum(-1)
        assert torch.allclose(found, scaling * kept / (kept + trash).clamp(min=1e-30), atol=1e-4)
    else:
        assert torch.allclose(found, scaling * keep.any(-1).float(), atol=1e-5)


def test_an_adapter_on_a_part_of_the_block_is_heard(tmp_path: Path) -> None:
    """PEFT puts a module of its own where a child stood: the block's forward must call that one."""
    model = families.tiny("qwen2_moe")
    names = [name for name, module in model.named_modules() if "experts" in dict(module.named_children())]
    edits = solidify.replace(model, names, TrashCanMoE, arguments={"threshold": -2.0})
    artifact = solidify.build(model, edits, tmp_path / "artifact")
    loaded = solidify.load(artifact.directory)
    tuned = solidify.attach(
        loaded,
        lora={"r": 2, "target_modules": ["**.shared_expert.up_proj"]},
        train=["**.trash", "**.shared_expert_gate"],
    )
    inputs = {"input_ids": torch.randint(3, model.config.vocab_size, (2, 12))}
    before = anatomy.run(model, inputs)
    assert torch.equal(anatomy.run(tuned, inputs), before)
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    reached = {n for n, p in tuned.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("shared_expert.up_proj.lora_B", "trash", "shared_expert_gate"):
        assert any(part in name for name in reached), part
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "shared_expert_gate" in name:
                parameter.add_(0.5) if parameter.requires_grad else None
    assert not torch.equal(anatomy.run(tuned, inputs), before)


def test_worth_is_the_mean_norm_of_what_an_expert_returns() -> None:
    """Against a loop in float64; asleep nothing changes, awake the slots that add least are skipped."""
    model = pico.olmoe(1)
    rows = [{"input_ids": pico.tokens(3, 20)}, {"input_ids": pico.tokens(2, 11)}]
    solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    before = anatomy.run(model, rows[0])
    can = model.model.layers[0].mlp
    seen: list[torch.Tensor] = []
    hook = can.gate.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    found = measure_worth(model, rows)["model.layers.0.mlp"]
    hook.remove()
    assert torch.equal(anatomy.run(model, rows[0]), before)
    x = torch.cat(seen).double()
    logits = x @ can.gate.weight.double().T
    index = logits.topk(TOP_K, dim=-1).indices
    norms: dict[int, list[float]] = {}
    for token in range(len(x)):
        for expert in index[token].tolist():
            gate, up = (can.experts.gate_up_proj[expert].double() @ x[token]).chunk(2)
            returned = can.experts.down_proj[expert].double() @ (F.silu(gate) * up)
            norms.setdefault(expert, []).append(float(returned.detach().norm()))
    expected = {expert: torch.tensor(values, dtype=torch.float64).mean().log() for expert, values in norms.items()}
    mean = torch.stack(list(expected.values())).mean()
    for expert in range(EXPERTS):
        wanted = float(expected[expert] - mean) if expert in expected else 0.0
        assert float(found[expert]) == pytest.approx(wanted, abs=1e-5)
    tokens = states(1, 30)[0]
    logits, _, index = can.gate(tokens)
    margin = can.trash(tokens, logits, index)
    wanted_margin = logits.log_softmax(-1).gather(-1, index) + found[index] - can.trash.bias
    assert torch.allclose(margin, wanted_margin) and found.abs().max() > 0.01


def test_worth_needs_a_trash_can_and_text() -> None:
    for model, rows in ((pico.olmoe(1), [{"input_ids": pico.tokens()}]), (awake(1), [])):
        with pytest.raises(ValueError, match="needs a model with a TrashCanMoE, and at least one batch"):
            measure_worth(model, rows)


@pytest.mark.slow
def test_every_family_with_such_a_block_takes_it() -> None:
    """Of transformers' families with a router and experts in one block, those that are refused are these."""
    refused, taken, seen = [], [], set[str]()
    for model_type, auto in families.cases():
        if model_type in seen:
            continue
        model = families.tiny(model_type, auto)
        parts = {name: dict(module.named_children()) for name, module in model.named_modules()}
        names = [name for name, p in parts.items() if "experts" in p and {"gate", "router"} & set(p)]
        if not names:
            continue
        seen.add(model_type)
        inputs = probing.probe_inputs(model)
        before = anatomy.run(model, inputs)
        try:
            solidify.replace(model, names, TrashCanMoE)
        except solidify.SurgeryError as error:
            refused.append(model_type)
            assert "TrashCanMoE needs a router" in str(error) or "TrashCanMoE reads" in str(error)
            continue
        taken.append(model_type)
        assert torch.equal(anatomy.run(model, inputs), before), model_type
        for name in names:
            model.get_submodule(name).trash.bias.fill_(1e4)
        assert not torch.equal(anatomy.run(model, inputs), before), model_type
    assert len(taken) >= 50 and {"deepseek_v3", "qwen2_moe", "ernie4_5_moe", "glm4_moe"} <= set(taken)
    assert sorted(refused) == REFUSED


REFUSED = ["dbrx", "inkling_text", "llama4", "llama4_text", "switch_transformers", "zaya"]


def test_worth_is_counted_in_float32_and_in_an_artifacts_own_class(tmp_path: Path) -> None:
    """In bfloat16 a count stops at 256, and an artifact's class is another than this one."""
    rows = [{"input_ids": pico.tokens(4, 500, seed=seed)} for seed in range(2)]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = pico.olmoe(1, dtype=dtype)
        solidify.replace(model, "model.layers.0.mlp", TrashCanMoE)
        found[dtype] = measure_worth(model, rows)["model.layers.0.mlp"].float()
    assert torch.allclose(found[torch.bfloat16], found[torch.float32], atol=5e-3)
    model = pico.olmoe(1)
    edits = solidify.replace(model, "model.layers.0.mlp", TrashCanMoE)
    pico.artifact(model, edits, tmp_path / "artifact")
    loaded = measure_worth(solidify.load(tmp_path / "artifact"), rows)["model.layers.0.mlp"]
    assert torch.allclose(loaded, found[torch.float32], atol=1e-5)


def test_experts_are_scored_by_token_where_slots_are_skipped() -> None:
    model = awake(2)
    for layer in model.model.layers:
        layer.mlp.trash.bias.fill_(-1.9)
    scores = solidify.score_experts(model, "model.layers.*.mlp", ({"input_ids": pico.tokens(2, 12)} for _ in range(2)))
    assert scores.tokens == 48
