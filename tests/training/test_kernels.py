"""Liger's kernels: what the plain recipe does unnoticed, what is refused, and that gradients are the same.

Where there is no accelerator Triton interprets the kernels, in the same arithmetic. It must be told so before it is
first imported (TRITON_INTERPRET=1), so one test runs this file again in a process of its own. Without the package,
which is an extra, most of this is skipped.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import logged
import pico
import pytest
import torch
from pico import wrappers
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

import solidify
from solidify.errors import ObjectiveError
from solidify.objective.capture import Capture
from solidify.objective.objective import Objective, Term
from solidify.training import kernels
from solidify.training.trainer import ObjectiveTrainer
from training import Gradients, arguments, distance, in_order

ACCELERATOR = torch.accelerator.is_available()
DEVICE = "cuda" if ACCELERATOR else "cpu"
INSTALLED = is_liger_kernel_available() and importlib.util.find_spec("triton") is not None
TOLERANCE = 1e-5  # of the largest gradient, float32; 2e-7 was measured under the interpreter
SKIPPED = "runs in a process that interprets" if INSTALLED else "liger-kernel is not installed"
RUNNABLE = INSTALLED and (ACCELERATOR or os.environ.get("TRITON_INTERPRET") == "1")

SWITCHES = ("rms_norm", "swiglu", kernels.FUSED)
MODEL = Objective([Term("model")])


class GatedMLP(modeling_llama.LlamaMLP):
    """A user's MLP that is one of Llama's, and more."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.full((config.hidden_size,), 0.25))

    def adopt(self, original: nn.Module) -> None:
        self.load_state_dict(original.state_dict(), strict=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gate


class Squashed(nn.Module):
    """Needs its own output to compute its gradient, as tanh does."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.original(x))


class Passing(nn.Module):
    """Takes an MLP out."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class Strict(LlamaForCausalLM):
    """Takes no argument that it does not know."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def gate_energy(gates: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([output.square().mean() for output in gates.values()]).sum()


gate_energy.captures = {"gates": Capture("model.layers.*.mlp.gate_proj")}  # type: ignore[attr-defined]


def logit_size(logits: torch.Tensor) -> torch.Tensor:
    return logits.square().mean()


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Liger's patching module; whatever it swaps for the whole process is put back after the test."""
    if not RUNNABLE:
        pytest.skip(SKIPPED)
    from liger_kernel.transformers import monkey_patch

    spaces = [vars(space) for space in (modeling_llama, modeling_mixtral, nn, nn.functional)]
    kept = [dict(space) for space in spaces]
    if not ACCELERATOR:
        fill_the_interpreters_gaps(monkeypatch)
    yield monkey_patch
    for space, values in zip(spaces, kept, strict=True):
        space.update(values)


def fill_the_interpreters_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 interprets neither the methods of float arguments nor libdevice; both have plain equivalents."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if type(value) is float:
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    plain = {"rsqrt": lambda x: 1 / tl.sqrt(x), "tanh": lambda x: 2 * tl.sigmoid(2 * x) - 1}
    for module in [module for name, module in sys.modules.items() if name.startswith("liger_kernel.ops.")]:
        for name in plain.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, plain[name])
    assert isinstance(rms_norm._rms_norm_forward_kernel, interpreter.InterpretedFunction), "imported too early"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers whose middle MLP is wrapped."""
    if not RUNNABLE:
        pytest.skip(SKIPPED)
    directory = tmp_path_factory.mktemp("kernels") / "llama"
    model = pico.llama(num_hidden_layers=3)
    kernels.switch_on(model, {}, MODEL).off()
    pico.artifact(model, solidify.replace(model, "model.layers.1.mlp", wrappers.Scaled), directory)
    return directory


def llama(**settings: Any) -> nn.Module:
    return pico.llama(**settings).to(DEVICE).train()


def adapted(artifact: Path, **lora: Any) -> Any:
    """The artifact with an adapter on what is swapped and beside it, its values not at their start."""
    torch.manual_seed(1)
    fields = {"r": 4, "target_modules": ["**.q_proj", "**.gate_proj", "**.down_proj"], **lora}
    model = solidify.attach(solidify.load(artifact), lora=fields, train=["model.layers.1.mlp.scale", "model.norm"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(DEVICE)


def backward(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    batch = {key: value.to(DEVICE) for key, value in pico.collate(pico.ragged(4)).items()}
    (model(**batch).loss if loss is None else loss(model)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.skipif(RUNNABLE or not INSTALLED, reason="all of this runs here, or the package is missing")
def test_the_rest_of_this_file_with_interpreted_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout


def test_nothing_is_done_unless_it_is_asked_for(tmp_path: Path) -> None:
    asked = arguments(tmp_path, 2, 1)
    assert not asked.use_liger_kernel
    kernels.refuse_unusable(asked, nn.Linear(1, 1), MODEL)  # though nothing of it would do
    asked.use_liger_kernel = True
    with pytest.raises(ObjectiveError):
        kernels.refuse_unusable(asked, nn.Linear(1, 1), MODEL)


@pytest.mark.skipif(ACCELERATOR, reason="there is an accelerator")
def test_a_training_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"no compiler for the device of this training \(cpu\)"):
        kernels.refuse_unusable(arguments(tmp_path, 2, 1, use_liger_kernel=True), pico.llama(), MODEL)


@pytest.mark.skipif(INSTALLED, reason="the package is there")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="pip install liger-kernel"):
        kernels.refuse_unusable(arguments(tmp_path, 2, 1, use_liger_kernel=True), pico.llama(), MODEL)


def test_the_fused_loss_is_for_the_models_own_loss_alone(tmp_path: Path) -> None:
    asked = arguments(tmp_path, 2, 1, use_liger_kernel=True, liger_kernel_config={"swiglu": True})
    assert kernels.settings(asked, MODEL) == {"swiglu": True}
    with_a_term = Objective([Term("model"), Term(logit_size, 0.1)])
    assert kernels.settings(asked, with_a_term) == {"swiglu": True, kernels.FUSED: False}
    assert kernels.settings(arguments(tmp_path, 2, 1, SFTConfig, use_liger_kernel=True), MODEL) == {
        kernels.FUSED: False
    }


def test_a_fused_loss_that_hides_what_a_term_needs_is_refused(tmp_path: Path, liger: ModuleType) -> None:
    asked = arguments(tmp_path, 2, 1, use_liger_kernel=True, liger_kernel_config={kernels.FUSED: True})
    with pytest.raises(
        ObjectiveError, match=r"makes no logits and computes only the model's own loss.*also logit_size"
    ):
        kernels.refuse_unusable(asked, pico.llama(), Objective([Term("model"), Term(logit_size)]))


def test_transformers_is_told_to_keep_out(tmp_path: Path) -> None:
    asked = arguments(tmp_path, 2, 1, use_liger_kernel=True)
    mine = kernels.taken_over(asked)
    assert (asked.use_liger_kernel, mine.use_liger_kernel) == (True, False)
    assert isinstance(mine, TrainingArguments)


def test_the_plain_switch_does_nothing_for_an_artifact(artifact: Path, liger: ModuleType) -> None:
    model = solidify.load(artifact)
    with logged.records() as records:
        apply_liger_kernel(model, None)
    assert not records  # it says so at level info, which transformers and Liger do not show
    assert not any("forward" in vars(module) for module in model.modules())

    switched = kernels.switch_on(model, {}, MODEL)
    assert kernels.family(model) == "llama"
    assert switched.counts == {"SolidLlamaForCausalLM": 1, "LlamaRMSNorm": 7, "LlamaMLP": 2}
    assert switched.left["model.layers.1.mlp"] == "not of the base's class"
    told = switched.finding().evidence
    assert "7 LlamaRMSNorm, 2 LlamaMLP" in told
    assert "left: model.layers.*.mlp (not of the base's class)" in told


def test_the_plain_switch_reaches_every_other_model_of_the_process(liger: ModuleType) -> None:
    cross_entropy, rotate = nn.functional.cross_entropy, modeling_llama.apply_rotary_pos_emb
    liger._apply_liger_kernel_to_instance(model=llama(), cross_entropy=True, fused_linear_cross_entropy=False)
    assert nn.functional.cross_entropy is not cross_entropy
    assert modeling_llama.apply_rotary_pos_emb is not rotate
    assert type(pico.llama().model.norm).__name__ == "LigerRMSNorm"  # a reference, or a base loaded later


def test_ours_reaches_one_model_and_is_taken_back(liger: ModuleType) -> None:
    spaces = (modeling_llama, nn, nn.functional)
    before = [dict(vars(space)) for space in spaces]
    model, other = llama(), llama()
    own = [dict(vars(module)) for module in model.modules()]
    switched = kernels.switch_on(model, {}, MODEL)
    assert [dict(vars(space)) for space in spaces] == before
    assert not any("forward" in vars(module) for module in other.modules())
    assert switched.left["rope"] == "Liger swaps it for the whole process, not for one model"
    switched.off()
    assert [dict(vars(module)) for module in model.modules()] == own


def test_a_process_in_which_classes_were_swapped_is_refused(liger: ModuleType) -> None:
    liger._apply_liger_kernel_to_instance(model=llama())
    with pytest.raises(ObjectiveError, match="LigerRMSNorm, LigerSwiGLUMLP stand for llama's own classes"):
        kernels.switch_on(llama(), {}, MODEL)


def test_the_plain_switch_overwrites_a_module_of_the_user(liger: ModuleType) -> None:
    ids = pico.tokens().to(DEVICE)
    model = llama()
    solidify.replace(model, "model.layers.*.mlp", GatedMLP)
    model.train()
    plain, right = copy.deepcopy(model), model(input_ids=ids).logits
    with pytest.raises(ObjectiveError, match=r"liger_kernel_config.swiglu: .*nothing of the base's.*leave it out"):
        kernels.switch_on(model, {"swiglu": True}, MODEL)
    assert kernels.switch_on(model, {kernels.FUSED: False}, MODEL).counts == {"LlamaRMSNorm": 5}
    torch.testing.assert_close(model(input_ids=ids).logits, right)

    liger._apply_liger_kernel_to_instance(model=plain, fused_linear_cross_entropy=False)
    assert not torch.allclose(plain(input_ids=ids).logits, right, atol=1e-2)  # the gate is gone


def test_an_activation_inside_of_what_is_swapped_is_kept(liger: ModuleType) -> None:
    model = llama()
    edits = solidify.replace(model, "model.layers.0.mlp.act_fn", wrappers.Scaled)
    assert len(edits) == 1
    switched = kernels.switch_on(model, {}, MODEL)
    assert switched.left["model.layers.0.mlp"] == "surgery changed what it holds"
    assert switched.swapped["LlamaMLP"] == ["model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rms_nrom": True}, "rms_nrom: not switches of llama, and Liger would ignore them"),
        ({"rope": True}, r"liger_kernel_config.rope: Liger swaps it for the whole process"),
        ({"cross_entropy": True}, r"liger_kernel_config.cross_entropy: Liger swaps it for the whole process"),
        (dict.fromkeys(SWITCHES, False), "not one module of this model would run a kernel"),
    ],
)
def test_a_switch_that_does_nothing_or_too_much_is_refused(
    config: dict[str, bool], message: str, liger: ModuleType
) -> None:
    with pytest.raises(ObjectiveError, match=message):
        kernels.switch_on(pico.llama(), config, MODEL)


def test_the_plain_switch_ignores_a_misspelt_name(liger: ModuleType) -> None:
    model = llama()
    liger._apply_liger_kernel_to_instance(model=model, rms_nrom=False, fused_linear_cross_entropy=False)
    assert "forward" in vars(model.model.norm)


def test_experts_inside_of_the_users_module_are_not_swapped(liger: ModuleType) -> None:
    """The kernel reads the expert numbers that the family's router gives, and knows no others."""

    class Keeping(nn.Module):
        def __init__(self, original: nn.Module) -> None:
            super().__init__()
            self.gate, self.experts = original.gate, original.experts

    sizes = {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
    model = pico.make("MixtralForCausalLM", **sizes)
    assert kernels.switch_on(model, {"swiglu": True, "rms_norm": False}, MODEL).counts["MixtralExperts"] == 2

    model = pico.make("MixtralForCausalLM", **sizes)
    model.model.layers[0].mlp = Keeping(model.model.layers[0].mlp)
    model.model.layers[1].mlp = wrappers.PlainMLP(model.config)
    switched = kernels.switch_on(model, {}, MODEL)
    assert switched.counts == {"MixtralForCausalLM": 1, "MixtralRMSNorm": 5}
    assert switched.left["model.layers.0.mlp.experts"] == "inside of what surgery put in"

    with pytest.raises(AttributeError, match=r"PlainMLP.*experts"):
        liger._apply_liger_kernel_to_instance(model=model)


def test_another_head_has_no_fused_loss(liger: ModuleType) -> None:
    sizes = {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
    switched = kernels.switch_on(pico.make("LlamaForSequenceClassification", **sizes), {}, MODEL)
    assert switched.counts == {"LlamaRMSNorm": 5, "LlamaMLP": 2}
    assert switched.left[kernels.FUSED] == "a LlamaForSequenceClassification has no loss over a vocabulary"


@pytest.mark.skipif(not (ACCELERATOR and INSTALLED), reason="there is no accelerator, or no package")
def test_what_can_be_used_is_not_refused(artifact: Path, tmp_path: Path) -> None:
    kernels.refuse_unusable(arguments(tmp_path, 2, 1, use_cpu=False, use_liger_kernel=True), adapted(artifact), MODEL)


def test_a_family_without_kernels_is_named(liger: ModuleType) -> None:
    with pytest.raises(ObjectiveError, match="Liger has no kernels for the family olmoe; leave the line out"):
        kernels.switch_on(pico.olmoe(), {}, MODEL)


def test_switching_on_twice_is_refused(liger: ModuleType) -> None:
    model = llama()
    kernels.switch_on(model, {}, MODEL)
    with pytest.raises(ObjectiveError, match="it has a forward of its own already"):
        kernels.switch_on(model, {}, MODEL)


def test_evaluation_passes_an_argument_that_the_model_may_not_know(tmp_path: Path) -> None:
    """`prediction_step` adds skip_logits whenever the switch is set, whatever became of it."""
    examples = pico.ragged(2)
    model = Strict(pico.llama().config)
    asked = arguments(tmp_path, 2, 1, use_liger_kernel=True, per_device_eval_batch_size=2)
    plain = Trainer(model=model, args=asked, data_collator=pico.collate)
    with pytest.raises(TypeError, match="skip_logits"):
        plain.evaluate(examples)
    ours = Trainer(model=model, args=kernels.taken_over(asked), data_collator=pico.collate)
    assert ours.evaluate(examples)["eval_loss"] > 0


@pytest.mark.parametrize("switch", SWITCHES)
def test_gradients_are_the_same_with_each_kernel(switch: str, artifact: Path, liger: ModuleType) -> None:
    model = adapted(artifact).train()
    right = backward(model)
    switched = kernels.switch_on(model, {key: key == switch for key in SWITCHES}, MODEL)
    assert len(switched.counts) == 1
    ours = backward(model)
    assert ours.keys() == right.keys()
    assert distance(right, ours) < TOLERANCE


LOOKING = ([Term("model"), Term(gate_energy, 0.5), Term(logit_size, 0.1)], {"LlamaRMSNorm": 7})
ALONE = ([Term("model")], {"SolidLlamaForCausalLM": 1, "LlamaRMSNorm": 7, "LlamaMLP": 2})


@pytest.mark.parametrize(("terms", "counts"), [LOOKING, ALONE], ids=["a term looks into each MLP", "the model alone"])
def test_a_step_of_the_objective_is_the_same(
    terms: list[Term], counts: dict[str, int], artifact: Path, tmp_path: Path, liger: ModuleType
) -> None:
    def step(switched: bool) -> dict[str, torch.Tensor]:
        model, objective = adapted(artifact), Objective(terms)
        trainer = ObjectiveTrainer(
            model=model,
            args=arguments(tmp_path, 2, 2, use_cpu=not ACCELERATOR),
            train_dataset=pico.ragged(4),
            data_collator=pico.collate,
            objective=objective,
        )
        in_order(trainer)
        watch = Gradients(model)
        trainer.add_callback(watch)
        if switched:
            assert kernels.switch_on(model, kernels.settings(trainer.args, objective), objective).counts == counts
            trainer.engine.sanity.measures = False  # it retains the graph
        trainer.train()
        return watch.found

    assert distance(step(False), step(True)) < TOLERANCE


def test_the_plain_kernel_writes_over_an_output_that_the_users_module_needs(liger: ModuleType) -> None:
    """The kernel's backward pass leaves gradients where the outputs of gate_proj and up_proj were."""
    model = llama()
    solidify.replace(model, "model.layers.*.mlp.gate_proj", Squashed)
    model.train()
    plain, right = copy.deepcopy(model), backward(model)
    assert set(kernels.switch_on(model, {}, MODEL).counts) == {"LlamaForCausalLM", "LlamaRMSNorm"}
    assert distance(right, backward(model)) < TOLERANCE

    liger._apply_liger_kernel_to_instance(model=plain, rms_norm=False, rope=False, fused_linear_cross_entropy=False)
    wrong = backward(plain)
    gates = [name for name in right if "gate_proj" in name]
    assert distance({name: right[name] for name in gates}, wrong) > 0.01


def test_the_plain_norm_writes_over_the_gradient_of_a_residual(liger: ModuleType) -> None:
    """Where surgery took the MLP away, the sum hands the norm the very tensor that the residual still needs."""
    model = llama()
    solidify.replace(model, "model.layers.*.mlp", Passing)
    model.train()
    plain, right = copy.deepcopy(model), backward(model)
    kernels.switch_on(model, {kernels.FUSED: False}, MODEL)
    assert distance(right, backward(model)) < TOLERANCE

    liger._apply_liger_kernel_to_instance(model=plain, rope=False, swiglu=False, fused_linear_cross_entropy=False)
    assert distance(right, backward(plain)) > 0.01


def test_the_plain_fused_loss_drops_what_lora_adds_to_lm_head(liger: ModuleType) -> None:
    from peft import LoraConfig, get_peft_model

    def model() -> Any:
        torch.manual_seed(0)
        return get_peft_model(llama(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))

    assert len(backward(model())) == 2
    with pytest.raises(ObjectiveError, match=rf"{kernels.FUSED}: it reads lm_head.weight"):
        kernels.switch_on(model(), {kernels.FUSED: True}, MODEL)
    assert kernels.FUSED in kernels.switch_on(model(), {}, MODEL).left

    plain = model()
    liger._apply_liger_kernel_to_instance(model=plain.get_base_model())
    with pytest.raises(RuntimeError, match="does not require grad"):  # had it other targets, it would train those only
        backward(plain)


def test_a_graph_with_kernels_serves_one_backward_pass(liger: ModuleType) -> None:
    """The kernels write gradients where they kept what they need: a graph that is retained is spoilt."""
    model = llama(initializer_range=0.3)
    batch = {key: value.to(DEVICE) for key, value in pico.collate(pico.ragged(4)).items()}
    names, parameters = zip(*model.named_parameters(), strict=True)
    right = backward(model)
    for switch, serves in (("rms_norm", True), ("swiglu", False), (kernels.FUSED, False)):
        switched = kernels.switch_on(model, {key: key == switch for key in SWITCHES}, MODEL)
        loss = model(**batch).loss * 2
        first = [g.clone() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
        again = torch.autograd.grad(loss, parameters)
        assert distance(right, dict(zip(names, (g / 2 for g in first), strict=True))) < TOLERANCE
        assert (distance(right, dict(zip(names, (g / 2 for g in again), strict=True))) < TOLERANCE) is serves, switch
        switched.off()


def test_the_fused_loss_makes_no_logits(liger: ModuleType) -> None:
    model = llama()
    kernels.switch_on(model, {}, MODEL)
    ids = pico.tokens().to(DEVICE)
    assert model(input_ids=ids, labels=ids).logits is None


def test_a_kernel_with_another_activation_is_found_by_its_numbers(liger: ModuleType) -> None:
    batch = {key: value.to(DEVICE) for key, value in pico.collate(pico.ragged(4)).items()}
    good, other = llama(initializer_range=0.5), llama(initializer_range=0.5, hidden_act="gelu")

    def loss(model: nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: model(**batch).loss

    assert kernels.switch_on(good, {}, MODEL).verify(loss(good)).passed
    switched = kernels.switch_on(other, {}, MODEL)  # Liger asks no instance what its activation is
    with pytest.raises(ObjectiveError, match="do not compute what this model computes"):
        switched.verify(loss(other))


def test_what_is_trained_in_full_is_swapped_inside_of_its_wrapper(artifact: Path, liger: ModuleType) -> None:
    model = adapted(artifact)
    kernels.switch_on(model, {}, MODEL)
    norm = model.get_base_model().model.norm
    assert type(norm).__name__ == "ModulesToSaveWrapper"
    assert "forward" not in vars(norm)
    assert "forward" in vars(norm.modules_to_save.default)
    assert "forward" not in vars(norm.original_module)  # what stands for the base stays the base


def test_nothing_of_it_is_written(artifact: Path, tmp_path: Path, liger: ModuleType) -> None:
    model = adapted(artifact)
    solidify.save_adapter(model, tmp_path / "without")
    keys = list(model.state_dict())
    kernels.switch_on(model, {}, MODEL)
    assert list(model.state_dict()) == keys
    solidify.save_adapter(model, tmp_path / "with")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()

    # The artifact was built after kernels had been on, and loaded in a fresh process.
    written = [path for path in artifact.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"liger" in path.read_bytes().lower()]
