from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1] / "support"


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(trash_artifact: Path, tmp_path: Path) -> None:
    """Two gloo processes with two ragged micro-batches each, against one process with one batch."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for processes, size, steps in ((1, 8, 1), (2, 2, 2)):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"),
                *(str(TESTS / "two_processes.py"), str(trash_artifact), str(tmp_path), str(size), str(steps)),
            ],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 2))
    assert set(one) == set(two)
    scale = max(float(t.abs().max()) for n, t in one.items() if "/" not in n and n != "loss")
    for name in one:
        if "/" in name or name == "loss":
            # A divergence is a difference of log-probabilities of some 5, of which float32 has seven digits.
            assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-5, abs=1e-7), name
        else:
            assert float((one[name] - two[name]).abs().max()) < 5e-6 * scale, name
