"""Loads a model directory in a process of its own and says whether it is what its certificate says.

Run as a script with the path of a request (JSON); prints the answer (JSON) as its last line. It does not import
solidify, and makes the packages that the request forbids impossible to import.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    """Answers the request whose path is the first argument."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name in request["forbid"]:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it now fails as if it were not installed
    warnings.simplefilter("ignore")

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    certificate = Path(request["directory"]) / request["certificate"]
    expected = json.loads((certificate / "state.json").read_text(encoding="utf-8"))
    torch.set_num_threads(expected["environment"]["threads"])
    heap = [torch.full((2**n,), 7e8) for n in range(8, 20) for _ in range(8)]
    del heap  # what is never filled now holds this and not a lucky zero

    answers = {auto: _load(request, auto, prefix, expected) for auto, prefix in request["auto_classes"].items()}
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    forbidden = [name for name in request["forbid"] if sys.modules.get(name) is not None]
    print(json.dumps({"environment": environment, "imported": forbidden, "loads": answers}))


def _load(request: dict[str, Any], auto: str, prefix: str, expected: dict[str, Any]) -> dict[str, Any]:
    """Loads through one Auto class and compares state and outputs; `prefix` is what its names lack."""
    import torch
    import transformers
    from safetensors.torch import load_file

    start = time.perf_counter()
    implementations = {k: v for k, v in expected["implementations"].items() if v is not None}
    try:
        model, info = getattr(transformers, auto).from_pretrained(
            request["directory"], trust_remote_code=True, output_loading_info=True, **implementations
        )
    except Exception as error:  # whatever stops a model from loading is the finding
        return {"error": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - start
    model = model.eval().to(expected["device"])
    state = {prefix + name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    attributes = {
        f"{prefix}{owner}.{key}": value
        for owner, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
    answer: dict[str, Any] = {
        "class": type(model).__name__,
        "seconds": seconds,
        "loading_info": {k: sorted(map(str, v)) for k, v in info.items() if v},
        "meta": sorted(n for n, t in {**state, **attributes}.items() if t.is_meta),
    }
    for kind, found in (("state", state), ("attributes", attributes)):
        known = {n: d for n, d in expected[kind].items() if n.startswith(prefix)}
        answer[kind] = {
            "absent": sorted(n for n in known if n not in found) if kind == "attributes" or not prefix else [],
            "additional": sorted(n for n in found if n not in expected[kind]),
            "different": sorted(n for n, t in found.items() if n in known and _digest(t) != known[n]),
            "equal": sum(1 for n, t in found.items() if n in known and not t.is_meta and _digest(t) == known[n]),
        }
    if answer["meta"]:
        return answer
    certificate = Path(request["directory"]) / request["certificate"]
    inputs, outputs = (
        load_file(certificate / "inputs.safetensors"),
        load_file(certificate / "outputs.safetensors"),
    )
    answer["outputs"] = {}
    for case in sorted({key.split("/")[0] for key in inputs}):
        wanted = outputs.get(f"{case}/{'hidden' if prefix else 'logits'}")
        if wanted is not None:
            arguments = {k.split("/")[1]: t.to(model.device) for k, t in inputs.items() if k.startswith(case + "/")}
            try:
                answer["outputs"][case] = _compare(_run(model, arguments).cpu(), wanted)
            except Exception as error:  # whatever stops it from running is the finding
                answer["error"] = f"{case}: {type(error).__name__}: {error}"
                return answer
    return answer


def _run(model: Any, inputs: dict[str, Any]) -> Any:
    import torch

    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = {**inputs, "use_cache": False}
    with torch.no_grad():
        outputs = model(**inputs)
    logits = outputs.get("logits")
    return outputs["last_hidden_state"] if logits is None else logits


def _compare(found: Any, wanted: Any) -> dict[str, Any]:
    import torch

    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return {"equal": False, "distance": None, "scale": None}
    distance = float((found.double() - wanted.double()).abs().max())
    scale = float(wanted.double().abs().max())
    return {"equal": torch.equal(found, wanted), "distance": distance, "scale": scale}


def _digest(tensor: Any) -> str:
    import torch

    if tensor.is_meta:
        return "meta"
    h = hashlib.new("sha256", f"{tensor.dtype}{list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    h.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return h.hexdigest()


if __name__ == "__main__":
    main()
