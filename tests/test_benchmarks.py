"""The benchmarks' own tools: the checkpoints that they generate, and what they measure of a command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

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
    processes, ways, scale = (benchmark(name) for name in ("processes", "ways", "scale"))
    allocate = f"import time; held = b'1' * {HELD}; time.sleep(0.3)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {allocate!r}], check=True)"
    big = processes.measure([sys.executable, "-c", child])
    little = processes.measure([sys.executable, "-c", "import time; time.sleep(0.1)"])
    assert HELD <= big.resident < HELD + (100 << 20)
    assert HELD <= big.private < HELD + (100 << 20)
    assert big.seconds > 0.3
    assert little.resident < HELD / 2
    row = ways.Row("", "little", ("big",), (ways.Bar("resident", 0.5, "big"), ways.Bar("seconds", 1e-6, "big")))
    results = scale.Results({name: ways.Way([]) for name in ("big", "little")}, {"big": [big], "little": [little] * 3})
    assert results.ratio(row, "big", "seconds") == little.seconds / big.seconds
    assert [bar["met"] for bar in results.judged(row)] == [True, False]


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
    assert page.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-6)


def test_arms_keep_the_share_that_is_asked_for(benchmark: Import) -> None:
    trial = benchmark("trash_trial")
    scores = torch.randn(40, 4)
    for kept in (0.25, 0.5, 0.75):
        assert float((scores >= trial.threshold(scores, kept)).float().mean()) == pytest.approx(kept, abs=0.01)
    judge = benchmark("trash_judge")
    assert judge.area(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 1.0
    assert judge.area(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0.5
