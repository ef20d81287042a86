"""Somebody who has an artifact, transformers, PEFT and TRL, but not solidify: processes in which it cannot be imported.

As a script it is such a process: it loads model directories, some with an adapter, and writes what they hold and
compute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def environment(scratch: Path) -> dict[str, str]:
    """Returns an environment in which `import solidify` fails; what the Hugging Face libraries keep is in `scratch`."""
    without = scratch / "without"
    without.mkdir(exist_ok=True)
    (without / "solidify.py").write_text("raise ImportError('solidify is not installed here')\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(without), "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "home")}


def command(name: str) -> str:
    """Returns the path of a command that a package of this environment installed."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def run(arguments: list[str], scratch: Path) -> str:
    """Runs a command as a stranger and returns its output; fails with its last words."""
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=environment(scratch), cwd=scratch, check=False, timeout=300
    )
    assert done.returncode == 0, f"{arguments[0]} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return done.stdout


def load(jobs: dict[str, dict[str, Any]], input_ids: torch.Tensor, scratch: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Loads directories (and adapters) in one fresh process.

    A job is `{"directory": ..., "adapter": ... or None}`. The answer has, by job, its whole state under the tensors'
    names, `logits`, and `aligned`: the logits once every tensor stands at an aligned address.
    """
    save_file({"input_ids": input_ids}, scratch / "inputs.safetensors")
    request = {"jobs": jobs, "threads": torch.get_num_threads()}
    run([sys.executable, "-P", __file__, str(scratch), json.dumps(request)], scratch)
    return {name: load_file(scratch / f"{name}.safetensors") for name in jobs}


def aligned(model: torch.nn.Module) -> torch.nn.Module:
    """Copies every tensor in place to an address of the allocator's; mapped ones stand where their file has them.

    A matrix at an odd address may be multiplied by another kernel, which sums in another order.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def main() -> None:
    """Answers the request of `load`."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    scratch, request = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(request["threads"])
    input_ids = load_file(scratch / "inputs.safetensors")["input_ids"]
    for name, job in request["jobs"].items():
        if job.get("adapter"):
            model = AutoPeftModelForCausalLM.from_pretrained(job["adapter"], trust_remote_code=True)
        else:
            model = AutoModelForCausalLM.from_pretrained(job["directory"], trust_remote_code=True)
        answer = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with torch.no_grad():
            answer["logits"] = model(input_ids=input_ids).logits
            answer["aligned"] = aligned(model)(input_ids=input_ids).logits
        save_file(answer, scratch / f"{name}.safetensors")
    try:
        import solidify  # noqa: F401
    except ImportError:
        return
    raise SystemExit("solidify could be imported")


if __name__ == "__main__":
    main()
