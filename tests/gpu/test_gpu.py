"""What needs a device: a step in every precision and with every kernel, beside plain transformers, PEFT, bitsandbytes.

`make gpu` runs these. `SOLIDIFY_GPU_TESTS=cpu python -m pytest -m gpu -W default tests/gpu` tries what of it a CPU can.

Each step is compared with the same step by hand, in float32 on a CPU. How far off rounding may lead is not known before
a device was seen, so the plain Trainer under the same settings says it: ours is at most twice as far from it,
or within `FLOORS`, with room for what a CPU shows: float32 2e-7 and bfloat16 5e-3 of the largest gradient, as the plain
Trainer; all terms, split two ways, 3e-7 and 2e-3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer
from words import tokenizer

import solidify
from solidify.artifact import loading, stock
from solidify.behaviour import calling
from solidify.modules import gated_delta_net
from solidify.objective.objective import Term
from solidify.training.trainer import ObjectiveTrainer
from training import awake, distance, everything, step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRIED = os.environ.get("SOLIDIFY_GPU_TESTS") == "cpu"
needs_device = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: there are no such kernels for a CPU")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not TRIED, reason="needs a CUDA device: run `make gpu` where there is one"),
]
SUPPORT = Path(pico.__file__).parent
SIZES = {"hidden_size": 64, "intermediate_size": 128, "eos_token_id": 0}  # 4-bit packing needs multiples of 64
FLOORS = {"float32": 1e-5, "bf16": 3e-2, "fp16": 1e-2}
LORA = {"r": 4, "target_modules": ["**.q_proj", "**.v_proj"]}
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu") / "base"
    pico.llama(**SIZES).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def artifact(base: Path) -> Path:
    """A changed Llama that computes what its base does: every MLP has a scale of one around it."""
    read = loading.load_base(str(base))
    edits = solidify.replace(read.model, "model.layers.*.mlp", pico.wrappers.Scaled)
    return pico.artifact(read.model, edits, base.parent / "artifact", tokenizer=read.tokenizer)


@pytest.mark.parametrize("masked", [True, False])
def test_experts_are_scored_on_the_device(masked: bool) -> None:
    model, ids = pico.olmoe(), pico.tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    batch = {"input_ids": ids, **({"attention_mask": mask} if masked else {})}
    expected = solidify.score_experts(model, "**.mlp", [batch])
    found = solidify.score_experts(model.to(DEVICE), "**.mlp", [{key: each.to(DEVICE) for key, each in batch.items()}])
    assert found.counts == expected.counts and found.tokens == expected.tokens
    for name, scores in expected.scores.items():
        assert torch.allclose(torch.tensor(found.scores[name]), torch.tensor(scores), rtol=1e-3)


def plain(base: Path, **options: Any) -> Any:
    """The script's model: transformers' own, and PEFT's LoRA."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return fill(get_peft_model(AutoModelForCausalLM.from_pretrained(base, **options), config))


def ours(artifact: Path, **options: Any) -> Any:
    return fill(solidify.attach(solidify.load(artifact, **options), lora=LORA))


def fill(model: Any) -> Any:
    """Gives LoRA the same numbers whoever made it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def lora_of(found: Gradients) -> Gradients:
    """LoRA's gradients by the names of the base's modules, in float32 on the CPU."""
    return {name: gradient.float().cpu() for name, gradient in found.items() if "lora_" in name}


@pytest.fixture(scope="module")
def reference(base: Path) -> Gradients:
    """The step by hand: all rows at once, in float32 on a CPU."""
    model = plain(base, dtype=torch.float32).train()
    model(**pico.collate(pico.ragged(8))).loss.backward()
    return lora_of({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def take(model: Any, kind: type, directory: Path, size: int, steps: int, **settings: Any) -> Gradients:
    """Takes a step with a trainer on the device."""
    terms: Callable[[], list[Term]] | None = (lambda: [Term("model")]) if kind is ObjectiveTrainer else None
    found, _ = step(model, directory, size, steps, terms, trainer_class=kind, use_cpu=DEVICE == "cpu", **settings)
    return lora_of(found)


SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True, "max_grad_norm": 1e9},  # which divides gradients by their scale, and cuts none
    "compiled, bf16": {"torch_compile": True, "bf16": True},
}


def test_random_numbers_of_the_device_are_given_back() -> None:
    torch.ones(1, device=DEVICE)  # it is in use
    with calling.chance_kept():
        inside = torch.rand(4, device=DEVICE)
        calling.set_seed(3)
    assert torch.equal(torch.rand(4, device=DEVICE), inside)


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_device) if "fp16" in n else n for n in SETTINGS])
def test_a_step_is_as_near_to_float32_as_the_plain_trainers(
    name: str, base: Path, artifact: Path, reference: Gradients, tmp_path: Path
) -> None:
    settings, floor = SETTINGS[name], FLOORS[name.rpartition(" ")[2]]
    far = distance(reference, take(plain(base), Trainer, tmp_path / "plain", 8, 1, **settings))
    for size, steps in ((8, 1), (2, 4)):
        found = take(ours(artifact), ObjectiveTrainer, tmp_path / f"{size}", size, steps, **settings)
        assert set(found) == set(reference)
        assert distance(reference, found) <= max(2 * far, floor), (size, steps, far)


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_all_terms_have_one_gradient_whatever_the_split(name: str, tmp_path: Path) -> None:
    """With a reference (the adapter off), statistics of the whole step, and the user's own terms."""
    settings, trash = {**SETTINGS[name], "use_cpu": DEVICE == "cpu"}, make_trash(tmp_path)
    taken = []
    for size, steps in ((8, 1), (2, 4)):
        found, _ = step(awake(trash), tmp_path / str(size), size, steps, everything, **settings)
        taken.append({name: gradient.float().cpu() for name, gradient in found.items()})
    assert set(taken[0]) == set(taken[1])
    assert distance(*taken) <= FLOORS[name]


def make_trash(directory: Path) -> Path:
    from solidify.modules.trashcan_moe import TrashCanMoE

    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    return pico.artifact(model, edits, directory / "trash")


def test_a_quantised_step_is_that_of_bitsandbytes_and_peft(base: Path, tmp_path: Path) -> None:
    """The same packed weights, called by the same code: bit for bit."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    placed = {"device_map": {"": DEVICE}}
    stock.build(loading.load_base(str(base)), tmp_path / "stock")
    theirs = plain(base, dtype=torch.float32, quantization_config=config, **placed)
    mine = ours(tmp_path / "stock", quantization="nf4", **placed)
    batch = {key: value.to(DEVICE) for key, value in pico.collate(pico.ragged(4)).items()}
    with torch.no_grad():
        assert torch.equal(theirs.train()(**batch).logits, mine.train()(**batch).logits)
    expected = take(theirs, Trainer, tmp_path / "theirs", 8, 1)
    assert distance(expected, take(mine, ObjectiveTrainer, tmp_path / "mine", 8, 1)) <= 1e-6


@needs_device
def test_a_step_with_ligers_kernels_is_as_near_as_the_plain_trainers(
    base: Path, artifact: Path, reference: Gradients, tmp_path: Path
) -> None:
    """On the artifact, which the plain Trainer leaves as it is; the plain one on the base."""
    pytest.importorskip("liger_kernel")
    found = take(ours(artifact), ObjectiveTrainer, tmp_path / "ours", 8, 1, use_liger_kernel=True)
    # The plain one last: it swaps classes for the whole process.
    far = distance(reference, take(plain(base), Trainer, tmp_path / "plain", 8, 1, use_liger_kernel=True))
    assert distance(reference, found) <= max(2 * far, FLOORS["float32"])


@needs_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flas_kernel_reads_what_the_formula_does(dtype: torch.dtype) -> None:
    """In float32 on a CPU, by our own chunks; fla multiplies in TF32 at best, which is 1e-3, bfloat16 2e-2."""
    if gated_delta_net.find_kernel("chunk_gated_delta_rule") is None:
        pytest.skip("flash-linear-attention is not installed")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 100, 2, 32, generator=generator) for _ in range(3))
    decay, beta = -torch.rand(2, 100, 2, generator=generator), torch.rand(2, 100, 2, generator=generator)
    wanted, state = gated_delta_net.apply_delta_rule(q, k, v, decay, beta)
    moved = [tensor.to(DEVICE, dtype) for tensor in (q, k, v)]
    found, held = gated_delta_net.apply_delta_rule(moved[0], moved[1], moved[2], decay.to(DEVICE), beta.to(DEVICE))
    most = 3e-3 if dtype == torch.float32 else 3e-2
    for mine, other in ((found, wanted), (held, state)):
        assert float((mine.float().cpu() - other).norm() / other.norm()) <= most


def write_recipe(directory: Path, base: Path, **training: Any) -> Path:
    rows = [json.dumps({"text": f"a b c {'d ' * n}"}) for n in range(1, 17)]
    directory.mkdir(exist_ok=True)
    (directory / "rows.jsonl").write_text("\n".join(rows))
    wrappers = SUPPORT / "user_modules" / "wrappers.py"
    document = {
        "base": {"model": str(base)},
        "surgery": [{"replace": "model.layers.*.mlp", "expect": "LlamaMLP", "with": f"{wrappers}:Scaled"}],
        "adapter": {"lora": LORA, "train": ["model.norm"]},  # a module: fsdp shards no single parameter
        "data": {"train": "rows.jsonl", "max_length": 16},
        "training": {
            "max_steps": 3,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "optim": "adamw_torch",
            "use_cpu": DEVICE == "cpu",
            **training,
        },
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(document))
    return directory / "recipe.yaml"


def run(recipe: Path, output: Path, *launcher: str) -> None:
    command = [sys.executable, "-m", *(launcher or ("solidify",)), "run", str(recipe), "--output", str(output)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=100 if DEVICE == "cuda" else 900,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_sharded_training_on_one_device_ends_where_a_whole_one_does(base: Path, tmp_path: Path) -> None:
    """FSDP2 of one process: every parameter is gathered for use and its gradient scattered, by a share that is all."""
    shard = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}, "use_cpu": False}
    run(write_recipe(tmp_path / "one", base), tmp_path / "whole")
    script = "solidify" if DEVICE == "cuda" else str(SUPPORT / "fsdp_on_cpu.py")
    launched = ("torch.distributed.run", "--nproc-per-node=1", "--standalone")
    module = ("-m",) if DEVICE == "cuda" else ()
    run(write_recipe(tmp_path / "other", base, **shard), tmp_path / "sharded", *launched, *module, script)
    whole, sharded = (load_file(tmp_path / d / "adapter" / "adapter_model.safetensors") for d in ("whole", "sharded"))
    assert set(whole) == set(sharded)
    # Three steps of Adam, each of at most the learning rate: a gradient near zero may have either sign.
    assert all(torch.allclose(whole[name], sharded[name], rtol=1e-3, atol=1e-4) for name in whole)


def test_a_run_on_the_device_proves_what_it_proves_on_a_cpu(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(write_recipe(tmp_path / "recipe", base, bf16=True), output)
    assert solidify.check(output).passed
    model = solidify.load(output / "merged").to(DEVICE)
    ids = pico.tokens().to(DEVICE)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == (2, ids.shape[1] + 8)
