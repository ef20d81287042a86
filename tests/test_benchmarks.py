"""The benchmarks' own tools: the checkpoints that they generate, and what they measure of a command."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HELD = 300 << 20
Import = Callable[[str], ModuleType]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Imports a file of benchmarks/ as its scripts do."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_both_layouts_of_a_generated_checkpoint_are_the_same_model(benchmark: Import, tmp_path: Path) -> None:
    generator = benchmark("checkpoint")
    for layout in ("hub", "memory"):
        generator.write(tmp_path / layout, size="tiny", layout=layout)
    found = {}
    for layout in ("hub", "memory"):
        model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / layout, output_loading_info=True)
        assert not any(loaded.values())
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            found[layout] = model(
                **AutoTokenizer.from_pretrained(tmp_path / layout)("Half", return_tensors="pt")
            ).logits
        assert len(list((tmp_path / layout).glob("*.safetensors"))) > 1
    assert torch.equal(*found.values())
    hub, memory = tensors(tmp_path / "hub"), tensors(tmp_path / "memory")
    assert memory.keys() == model.state_dict().keys()
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in hub
    gate = hub["model.layers.1.mlp.experts.7.gate_proj.weight"]
    assert torch.equal(memory["model.layers.1.mlp.experts.gate_up_proj"][7, : len(gate)], gate)


def test_no_two_generated_tensors_are_equal(benchmark: Import, tmp_path: Path) -> None:
    benchmark("checkpoint").write(tmp_path / "hub", size="tiny", layout="hub")
    values = [tensor.flatten().view(torch.int16).numpy().tobytes() for tensor in tensors(tmp_path / "hub").values()]
    assert len(set(values)) == len(values) > 50


def test_a_commands_memory_is_that_of_its_whole_tree_and_ratios_are_of_medians(benchmark: Import) -> None:
    processes, ways, tabulating = (benchmark(name) for name in ("processes", "ways", "tabulating"))
    allocate = f"import time; held = b'1' * {HELD}; time.sleep(0.3)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {allocate!r}], check=True)"
    big = processes.measure([sys.executable, "-c", child])
    little = processes.measure([sys.executable, "-c", "import time; time.sleep(0.1)"])
    assert HELD <= big.resident < HELD + (100 << 20)
    assert HELD <= big.private < HELD + (100 << 20)
    assert big.seconds > 0.3
    assert little.resident < HELD / 2
    row = ways.Row("", "little", ("big",), (ways.Bar("resident", 0.5, "big"), ways.Bar("seconds", 1e-6, "big")))
    known = {name: ways.Way([]) for name in ("big", "little")}
    results = tabulating.Results(known, {"big": [big], "little": [little] * 3})
    assert results.ratio(row, "big", "seconds") == little.seconds / big.seconds
    assert [bar["met"] for bar in results.judged(row)] == [True, False]


@pytest.mark.parametrize(
    ("table", "letters", "written"),
    [("scale", "f", {"merge"}), ("scale", "dg", {"merge"}), ("dense", "n", {"merge"}), ("dense", "ik", set())],
)
def test_what_a_way_reads_is_written_before(
    benchmark: Import, tmp_path: Path, table: str, letters: str, written: set[str]
) -> None:
    module, ways = benchmark(table), benchmark("ways")
    known, rows = module.ways(ways.Places(tmp_path, "tiny")), [module.ROWS[letter] for letter in letters]
    named = {name for row in rows for name in (row.ours, *row.plain)}
    assert set(ways.needed(rows, known)) == named | written


def test_a_command_that_fails_says_so(benchmark: Import) -> None:
    processes = benchmark("processes")
    with pytest.raises(processes.CommandFailed, match=r"exit code 3[^$]*no such luck"):
        processes.measure([sys.executable, "-c", "print('no such luck'); raise SystemExit(3)"])


def test_the_trials_page_says_what_was_measured(benchmark: Import) -> None:
    page = benchmark("trial_page")
    found, judged = page.read(), page.read(page.JUDGED)
    assert page.PAGE.read_text(encoding="utf-8") == page.write(found, judged)
    arms = page.arms(found, 0.75)
    assert all(
        len(values) == (5 if name.endswith("trained") else 1) for name, a in arms.items() for values in a.values()
    )
    assert all(abs(figures["kept"] - 0.75) < 0.002 for key, figures in found.items() if "kept 0.75" in key)


def test_a_verdict_is_as_the_figures_are(benchmark: Import) -> None:
    """Outside the interval where every seed says so, and not where seeds contradict one another."""
    page = benchmark("trial_page")

    def found(ours: list[float]) -> dict[str, dict[str, float]]:
        values = {"trash can": ours, "smaller top-k": [0.02, 0.021, 0.019]}
        return {
            f"trained; {arm}; kept 0.75; 100 steps; seed {seed}": {
                "kl": v,
                "loss": v,
                "agreement": v,
                "log_probability": v,
            }
            for arm, each in values.items()
            for seed, v in enumerate(each)
        }

    assert ", outside the interval" in page.verdict(found([0.01, 0.0112, 0.0095]), 0.75)
    assert ", not outside the interval" in page.verdict(found([0.01, 0.03, 0.019]), 0.75)
    lost = page.verdict(found([0.03, 0.0312, 0.0295]), 0.75)
    assert "0.0102 ± " in lost and " above that of" in lost and "51.17% more, outside the interval" in lost
    assert page.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-6)


def test_arms_keep_the_share_that_is_asked_for(benchmark: Import) -> None:
    trial = benchmark("trash_trial")
    scores = torch.randn(40, 4)
    for kept in (0.25, 0.5, 0.75):
        assert float((scores >= trial.threshold(scores, kept)).float().mean()) == pytest.approx(kept, abs=0.01)
    judge = benchmark("trash_judge")
    assert judge.area(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 1.0
    assert judge.area(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0.5


MEASURED: dict[str, Any] = {
    "machine": {"card": "one NVIDIA H100", "versions": {"torch": "2.13.0"}},
    "shape": "Llama",
    "rows": {
        "lora": {
            "missing": "",
            "plain": [{"seconds": s, "memory": 2e9, "loss": 3.0} for s in (0.1, 0.2, 0.9)],
            "ours": [{"seconds": s, "memory": 3e9, "loss": 3.5} for s in (0.3, 0.1, 0.2)],
        },
        "liger": {"missing": "liger_kernel is not installed", "plain": [], "ours": []},
    },
}


def test_the_table_of_the_gpu_has_medians_and_says_what_is_missing(benchmark: Import) -> None:
    gpu = benchmark("gpu")
    section = gpu.write_section(MEASURED)
    assert "On one NVIDIA H100, in bfloat16: Llama; medians of up to 3 processes" in section
    assert "| LoRA, transformers' Trainer | 200 | 200 | 1.000 | 2 | 3 | 1.500 |" in section
    assert "| LoRA with Liger's kernels | not measured: liger_kernel is not installed |" in section
    assert "differ by at most 0.5" in section and "With torch 2.13.0." in section
    page = gpu.write_page(f"before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n", MEASURED)
    assert page == f"before\n{gpu.BEGIN}\n\n{section}\n\n{gpu.END}\nafter\n"


def test_the_page_says_what_the_gpu_measured(benchmark: Import) -> None:
    gpu = benchmark("gpu")
    page = gpu.PAGE.read_text(encoding="utf-8")
    assert page == gpu.write_page(page, gpu.read_figures()), "python benchmarks/gpu.py writes both"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_nothing_is_measured(benchmark: Import, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert benchmark("gpu").main() == 2
    assert "there is no CUDA device to measure; --dry-run" in capsys.readouterr().err


def test_ways_take_turns_and_a_failure_is_a_row(benchmark: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which processes are started, in which order, is all that is tried here; the slow test starts them."""
    gpu, started = benchmark("gpu"), []

    def run(script: str, *words: Any) -> None:
        started.append(script)
        if "changed" in words and script == "gpu_ours.py":
            raise subprocess.CalledProcessError(1, script, stderr="Traceback\nValueError: no luck\n")
        if script == "gpu_plain.py" or words[0] == "train":
            Path(words[-1]).write_text(json.dumps({"seconds": 1.0, "memory": 1, "loss": 1.0}))

    monkeypatch.setattr(gpu, "_run", run)
    found = gpu.measure(["lora", "liger", "changed"], "tiny", 1)
    plain, ours = "gpu_plain.py", "gpu_ours.py"
    assert started[2:] == [plain, ours, plain, ours, ours, plain, plain, ours, ours, plain, plain, ours]
    assert found["changed"]["missing"] == "ours failed: ValueError: no luck" and len(found["lora"]["ours"]) == 5
    assert found["liger"]["missing"] in ("needs a GPU", "liger_kernel is not installed")


@pytest.mark.slow
def test_the_dry_run_trains_both_ways_and_writes_nothing() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--rows", "lora", "sft", "liger", "changed"]
    files = [BENCHMARKS / "gpu.json", BENCHMARKS.parent / "docs" / "benchmarks.md"]
    before = [path.exists() and path.read_bytes() for path in files]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| LoRA")]
    assert [len([c for c in row.split("|") if c.strip()]) for row in rows] == [7, 7, 2, 7]
    assert "not measured: needs a GPU" in rows[2]
    assert [path.exists() and path.read_bytes() for path in files] == before


@pytest.mark.slow
def test_what_a_cpu_can_do_of_the_tests_for_a_gpu_passes() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "tests/gpu"]
    more = {"SOLIDIFY_GPU_TESTS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent, env={**os.environ, **more}
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed, " in done.stdout and " failed" not in done.stdout
