"""The certificate: inputs, expected outputs and digests of the whole state, and the fresh process that repeats them.

It stands in the artifact's directory `certificate/`, so that anybody can repeat it later.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel

from solidify.artifact import manifest, tensors
from solidify.errors import ArtifactError
from solidify.findings import Finding
from solidify.model import anatomy

NAME = "certificate"
FORBIDDEN = ("solidify", "peft")
CASES: dict[str, dict[str, Any]] = {
    "short": {"length": 12, "seed": 11},
    "padded": {"length": 12, "padded": True, "seed": 12},
    "long": {"batch_size": 1, "length": 40, "seed": 13},
}


def write(model: PreTrainedModel, directory: Path) -> None:
    """Records what `model`, as it stands in memory, computes and holds; realigns its matrices, values unchanged."""
    tensors.realign(model)
    target = directory / NAME
    target.mkdir()
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for case, settings in CASES.items():
        batch = anatomy.probe_inputs(model, **settings)
        inputs |= {f"{case}/{key}": tensor.cpu().contiguous() for key, tensor in batch.items()}
        outputs[f"{case}/logits"] = anatomy.run(model, batch).cpu().contiguous()
        if model.base_model is not model and not model.config.is_encoder_decoder:
            outputs[f"{case}/hidden"] = anatomy.run(model.base_model, batch).cpu().contiguous()
    safetensors.torch.save_file(inputs, target / "inputs.safetensors")
    safetensors.torch.save_file(outputs, target / "outputs.safetensors")
    document = {
        "state": tensors.digests((*model.named_parameters(), *model.named_buffers())),
        "attributes": tensors.digests(
            (f"{owner}.{key}", value)
            for owner, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        ),
        "device": model.device.type,
        "implementations": {
            "attn_implementation": model.config._attn_implementation,
            "experts_implementation": model.config._experts_implementation,
        },
        "environment": {
            "torch": torch.__version__,
            "transformers": manifest.current_versions()["transformers"],
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
    }
    (target / "state.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def witness(directory: Path) -> list[Finding]:
    """Loads the artifact in a fresh process without solidify and peft, through every Auto class it names.

    Raises:
        ArtifactError: the directory has no certificate, or the process died.
    """
    directory = directory.resolve()
    if not (directory / NAME / "state.json").is_file():
        raise ArtifactError(f"{directory} has no {NAME}/state.json to compare with")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    prefixes = _prefixes(directory, config["auto_map"])
    request = {
        "directory": str(directory),
        "certificate": NAME,
        "forbid": FORBIDDEN,
        "auto_classes": prefixes,
    }
    answer = run_alone(Path(__file__).with_name("witness.py"), request)
    expected = json.loads((directory / NAME / "state.json").read_text(encoding="utf-8"))["environment"]
    same = answer["environment"] == expected
    moved = ", ".join(f"{k} {expected[k]} -> {v}" for k, v in answer["environment"].items() if v != expected[k])
    findings = []
    for auto, load in answer["loads"].items():
        findings += _judge(auto, load, moved if not same else "")
    imported = ", ".join(answer["imported"])
    findings.append(
        Finding(
            "loads without us",
            not imported,
            f"imported: {imported}" if imported else "solidify and peft not importable",
        )
    )
    return findings


def _prefixes(directory: Path, auto_map: dict[str, str]) -> dict[str, str]:
    """Returns the Auto classes to load through, each with the prefix that its tensor names lack."""
    heads = {auto: reference for auto, reference in auto_map.items() if auto != "AutoConfig"}
    result = {}
    for auto, reference in heads.items():
        alone = auto == "AutoModel" and any(other != reference for other in heads.values())
        result[auto] = _backbone_prefix(directory, reference) if alone else ""
    return result


def _backbone_prefix(directory: Path, reference: str) -> str:
    """Reads from the generated file which prefix the backbone strips: it stands in its call of `operate`."""
    module, _, name = reference.rpartition(".")
    body = (directory / f"{module}.py").read_text(encoding="utf-8").split(f"class {name}(")[1]
    return body.split('operate(self, "')[1].split('"')[0]


def _judge(auto: str, load: dict[str, Any], moved: str) -> list[Finding]:
    """Turns what the fresh process saw through one Auto class into findings."""
    if "error" in load:
        return [Finding(f"reload ({auto})", False, load["error"])]
    faults = [f"{kind}: {', '.join(names[:4])}" for kind, names in load["loading_info"].items()]
    if load["meta"]:
        faults.append(f"never filled: {', '.join(load['meta'][:4])}")
    for kind in ("state", "attributes"):
        for problem in ("absent", "additional", "different"):
            names = load[kind][problem]
            if names:
                faults.append(f"{len(names)} {kind} {problem}: {', '.join(names[:4])}")
    equal = load["state"]["equal"] + load["attributes"]["equal"]
    state = Finding(
        f"state identical ({auto})",
        not faults,
        "; ".join(faults) if faults else f"{equal} tensors bit-identical, loading info empty, {load['seconds']:.1f} s",
    )
    outputs = load.get("outputs", {})
    if not outputs:
        return [state]
    different = {case: o for case, o in outputs.items() if not o["equal"]}
    if not different:
        return [state, Finding(f"outputs identical ({auto})", True, f"{len(outputs)} cases bit-identical")]
    worst = max(
        (o["distance"] / max(o["scale"], 1e-12) if o["distance"] is not None else float("inf"))
        for o in different.values()
    )
    evidence = f"{', '.join(different)} differ, by {worst:.1e} of the largest output"
    # Elsewhere (another processor, thread count or version) kernels sum in another order; that far may it move.
    passed = bool(moved) and worst < 1e-3
    if moved:
        evidence += f"; the environment is another ({moved})"
    return [state, Finding(f"outputs identical ({auto})", passed, evidence)]


def run_alone(script: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Runs a script in a fresh Python process, with a code cache of its own, and returns the JSON it prints last.

    Raises:
        ArtifactError: the process ended with an error; its last words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="solidify-") as scratch:
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(path)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=scratch,
            check=False,
        )
    if done.returncode:
        words = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise ArtifactError(f"the fresh process ended with code {done.returncode}:\n{words}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
