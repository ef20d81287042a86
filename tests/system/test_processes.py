"""Real processes: killed and resumed, and several that train together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from solidify.directory import manifest
from solidify.errors import RecipeError
from solidify.recipe import schema, stages

TESTS = Path(__file__).parents[1] / "support"
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau"
STEPS = 8
TRAINING = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_steps": 3,
    "bf16": True,
    "use_cpu": True,
}
ADAPTER = {
    "lora": {"r": 4, "lora_dropout": 0.1, "target_modules": ["**.q_proj", "**.v_proj"]},
    "train": ["**.mlp.trash", "**.q_norm.weight", "model.norm"],
}
OBJECTIVE = [
    {"loss": "model"},
    {"loss": "solidify.losses:trash_budget", "weight": 0.5, "arguments": {"target": 0.5}},
    {"loss": "solidify.losses:trash_controller", "arguments": {"target": 0.5}},
    {"loss": "remembering.py:Integral"},
]


def write(directory: Path, tokenizer: Path, dtype: torch.dtype, **changes: Any) -> Path:
    """Writes a recipe with all it needs beside it; a base in half precision has an auxiliary loss of its own."""
    directory.mkdir(parents=True)
    # Its weight is small: a product of means over a micro-batch is not the same for every split.
    auxiliary = {"output_router_logits": dtype == torch.bfloat16, "router_aux_loss_coef": 2e-4}
    base = pico.olmoe(dtype=dtype, vocab_size=1024, **auxiliary)
    base.save_pretrained(directory / "base")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory / "base")
    shutil.copy(TESTS / "user_modules" / "remembering.py", directory)
    words = WORDS.split()
    texts = [" ".join(words[(i * k) % len(words)] for k in range(1, 4 + i)) for i in range(1, 15)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    document = {
        "base": {"model": "base"},
        "surgery": [
            {
                "replace": "model.layers.*.mlp",
                "expect": "OlmoeSparseMoeBlock",
                "with": "solidify.modules.trashcan_moe:TrashCanMoE",
            }
        ],
        "adapter": ADAPTER,
        "objective": OBJECTIVE,
        "data": {"train": "text.jsonl", "eval": "text.jsonl", "max_length": 24},
        "training": TRAINING,
        **changes,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return directory / "recipe.yaml"


def solidify(*words: Any, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, or in several that a launcher starts."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-m", *launcher, *(("solidify",) if not launcher else ()), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=300)


@pytest.fixture(scope="module")
def built(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe in half precision and its artifact."""
    directory = tmp_path_factory.mktemp("resume")
    path = write(directory / "recipe", tiny_base, torch.bfloat16)
    stages.build(schema.load(path), directory / "built")
    return path, directory / "built"


def test_a_killed_training_resumes_to_the_same_bits(
    built: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropout, shuffled data over three epochs, a schedule, moments, float32 copies, a controller and a term that
    remembers, an auxiliary loss whose weight is measured: all go on as if nothing had happened."""
    path, artifact = built
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        shutil.copytree(artifact, directory)
    stages.train(schema.load(path), whole)
    done = solidify("train", path, "--output", killed, END_AFTER="0:5")
    assert done.returncode == -signal.SIGKILL
    checkpoints = killed / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["checkpoint-3"]
    half = Path(shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-4"))
    (half / "trainer_state.json").write_text('{"epoch": ')  # as a kill while it was written leaves it
    done = solidify("train", path, "--output", killed, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-3" in done.stderr
    for place in ("checkpoints/checkpoint-6", "adapter"):  # in float32, and at the end in the model's own dtype
        expected, found = (load_file(d / place / "adapter_model.safetensors") for d in (whole, killed))
        assert set(expected) == set(found)
        for name, tensor in expected.items():
            in_base_dtype = "trained_buffers" in name or (place == "adapter" and "lora" not in name)
            assert tensor.dtype == found[name].dtype == (torch.bfloat16 if in_base_dtype else torch.float32)
            assert torch.equal(tensor, found[name]), (place, name)
    # A checkpoint holds what is trained and not the base, and a finished training is left alone.
    held = set(load_file(checkpoints / "checkpoint-6" / "adapter_model.safetensors"))
    buffers = {name for name in held if "trained_buffers" in name}
    assert {name.rpartition(".trash.")[2] for name in buffers} == {"bias", "kept", "worth"}
    assert held - buffers == {
        name.replace("base_model.model.model", "base_model.model.trained_parameters.model")
        if "q_norm" in name
        else name
        for name in found
    }
    before = (killed / "adapter").stat().st_ino
    capsys.readouterr()
    stages.train(schema.load(path), killed, resume=True)
    assert (killed / "adapter").stat().st_ino == before
    assert "Training" not in capsys.readouterr().err


# Plain gradient descent: two processes round sums in another order, and Adam would divide the rounding of a gradient
# that is nearly zero by itself.
DESCENT = {
    "max_steps": 3,
    "learning_rate": 0.05,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
}
TOLERANCE = 1e-5  # of the largest change: float32 has 1e-7, and a thousand products are summed in another order


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe in float32, run by one process with four sequences in a micro-batch."""
    directory = tmp_path_factory.mktemp("processes")
    adapter = {**ADAPTER, "lora": {**ADAPTER["lora"], "lora_dropout": 0.0}}
    changes = {"adapter": adapter, "training": DESCENT, "objective": [OBJECTIVE[0], OBJECTIVE[1], OBJECTIVE[3]]}
    path = write(directory / "recipe", tiny_base, torch.float32, **changes)
    stages.run(schema.load(path, sizes(4, 2)), directory / "one")
    return path, directory / "one"


def sizes(size: int, steps: int) -> list[str]:
    return [f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={steps}"]


def batch(size: int, steps: int) -> tuple[str, ...]:
    return tuple(word for override in sizes(size, steps) for word in ("--set", override))


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "solidify")
ACCELERATE = (  # starts processes through torchrun, GPUs or not; with --cpu it starts one
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"),
    *("--dynamo_backend=no", "--main_process_port=0", "-m", "solidify"),
)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param(ACCELERATE, id="accelerate launch", marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_what_one_makes(alone: tuple[Path, Path], tmp_path: Path, launcher: tuple[str, ...]) -> None:
    path, one = alone
    done = solidify("run", path, "--output", tmp_path, *batch(2, 2), launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trainable set exact") == 1  # one of them speaks
    report = json.loads((tmp_path / "report.json").read_text())
    found = {f["name"]: f for stage in report["stages"].values() for f in stage}
    assert report["finished"]
    assert all(f["passed"] for f in found.values() if f["passed"] is not None)
    assert "4x1 on each of 2 processes" in found["gradient does not depend on accumulation"]["evidence"]
    expected, two = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (one, tmp_path))
    assert set(expected) == set(two)
    before = load_file(one / "artifact" / "model.safetensors")
    moved = {n: t - before.get(n.removeprefix("base_model.model."), torch.zeros(())) for n, t in expected.items()}
    largest = max(float(t.abs().max()) for n, t in moved.items() if "lora_A" not in n)
    for name, tensor in expected.items():
        assert float((tensor - two[name]).abs().max()) < TOLERANCE * largest, name
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("ending", ["0:1", pytest.param("1:1", marks=pytest.mark.slow)])
def test_no_process_waits_for_one_that_is_gone(alone: tuple[Path, Path], tmp_path: Path, ending: str) -> None:
    path, one = alone
    shutil.copytree(one / "artifact", tmp_path / "artifact")
    done = solidify("train", path, "--output", tmp_path, *batch(2, 2), launcher=TORCHRUN, END_AFTER=ending)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr or "SIGKILL" in done.stderr
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
def test_a_failure_of_the_first_process_is_heard_by_the_others(alone: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "somebody's.txt").write_text("not ours")
    done = solidify("run", alone[0], "--output", tmp_path, launcher=TORCHRUN)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("solidify: ")]
    assert sorted("the first process stopped" in line for line in said) == [False, True], done.stderr[-3000:]
    assert all("solidify did not make" in line for line in said)


@pytest.mark.slow
def test_a_model_that_is_spread_over_processes_is_trained_saved_and_resumed(
    alone: tuple[Path, Path], tmp_path: Path
) -> None:
    """FSDP2 over gloo, with accelerate told that a CPU is an accelerator: tests/support/fsdp_on_cpu.py."""
    path, one = alone
    document = yaml.safe_load(path.read_text())
    document["adapter"]["train"] = ["**.mlp.trash", "model.norm"]
    spread = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["OlmoeDecoderLayer"]}, "use_cpu": False}
    adam = {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    document["training"] = {**document["training"], **spread, **adam}
    recipe_path = path.with_name("spread.yaml")
    recipe_path.write_text(yaml.safe_dump(document))
    launcher = (*TORCHRUN[:-2], str(TESTS / "fsdp_on_cpu.py"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        shutil.copytree(one / "artifact", directory / "artifact")
    done = solidify("train", recipe_path, "--output", whole, *batch(2, 2), launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4x1 on each of 2 processes" in done.stdout
    held = load_file(whole / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    done = solidify("train", recipe_path, "--output", killed, *batch(2, 2), launcher=launcher, END_AFTER="0:3")
    assert done.returncode != 0
    done = solidify("train", recipe_path, "--output", killed, "--resume", *batch(2, 2), launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Going on from" in done.stderr
    expected, found = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (whole, killed))
    assert set(expected) == set(found) == set(held)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fsdp": True}, "without them every process would silently hold the whole model"),
        ({"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}, "leave out cpu_ram_efficient_loading"),
    ],
)
def test_sharding_that_would_not_happen_is_refused(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "recipe", tiny_base, torch.float32, training={**DESCENT, **changes})
    with pytest.raises(RecipeError, match=words):
        stages.train(schema.load(path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["base", "healed"])
def test_processes_share_an_alignment_and_the_result_is_that_of_one(
    tiny_base: Path, tmp_path: Path, inputs: str
) -> None:
    """Two processes align a module each (one aligns both, where each learns behind the other); then both distil."""
    low_rank = {
        "replace": "model.layers.*.self_attn.o_proj",
        "expect": "Linear",
        "with": "solidify.modules.low_rank:LowRank",
        "arguments": {"rank": 4},
    }
    heal = {"align": {"max_steps": 4, "learning_rate": 1e-2, "inputs": inputs, "batch_size": 2}}
    path = write(tmp_path / "recipe", tiny_base, torch.float32, surgery=[low_rank], heal=heal)
    document = {
        k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in ("adapter", "objective", "training")
    }
    path.write_text(yaml.safe_dump(document))
    stages.run(schema.load(path), tmp_path / "one")
    done = solidify("run", path, "--output", tmp_path / "two", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(tmp_path / "two" / "heal")
    done = solidify("heal", path, "--output", tmp_path / "two", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (manifest.read(tmp_path / d / "heal" / "artifact").tensors for d in ("one", "two"))
    surgery = manifest.read(tmp_path / "one" / "artifact").tensors
    assert one == two and {name for name in one if one[name] != surgery[name]}
