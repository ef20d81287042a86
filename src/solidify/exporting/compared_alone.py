"""Run as a script in a process of its own: loads an artifact and another form of it, and writes in what they differ.

An artifact is loaded quantised, or in another dtype, where the request says how.

It does not import solidify, and makes the packages that its arguments name impossible to import.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

OUTPUTS = ("logits", "logits_per_image", "last_hidden_state")  # what is compared: the first of these that there is


def main() -> None:
    """Answers the request on the standard input."""
    for name in sys.argv[1:]:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it now fails as if it were not installed
    warnings.simplefilter("ignore")
    import transformers

    request = json.loads(sys.stdin.read())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": request["dtype"]} if "dtype" in request else {}
    if "quantization" in request:
        from transformers.quantizers import AutoQuantizationConfig

        config = AutoQuantizationConfig.from_dict(json.loads(request["quantization"]))
        options = {"quantization_config": config, "device_map": {"": "cpu"}}
    artifact: Any = getattr(transformers, request["auto"]).from_pretrained(
        request["artifact"], trust_remote_code=True, **options
    )
    placed = {"device_map": options["device_map"]} if "device_map" in options else {}
    code = {"trust_remote_code": True} if request.get("code") else {}
    stock, info = getattr(transformers, request["head"]).from_pretrained(
        request["stock"], output_loading_info=True, **placed, **code
    )
    for module in (*artifact.modules(), *stock.modules()):
        if getattr(module, request.get("repacks", ""), False):  # an evaluation on a CPU would round scales anew
            setattr(module, request["repacks"], False)
    faults = [f"{kind}: {', '.join(sorted(map(str, names))[:4])}" for kind, names in info.items() if names]
    found, wrong = compare_state(artifact.eval(), stock.eval())
    outputs: dict[str, float] = {}
    said = ""
    try:
        outputs = {} if request["inputs"] is None else compare_outputs(artifact, stock, request["inputs"])
    except Exception as error:  # of a model's own code: it is an answer
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    answer = json.dumps({"faults": faults + wrong, "tensors": found, "outputs": outputs, "error": said})
    Path(request["answer"]).write_text(answer, encoding="utf-8")


def compare_state(artifact: Any, stock: Any) -> tuple[int, list[str]]:
    """Compares every parameter and buffer, and scales beside them; returns how many there are, and what differs."""
    import torch

    mine, theirs = (
        {
            name: tensor
            for table in (m.state_dict().items(), m.named_parameters(remove_duplicate=False), m.named_buffers())
            for name, tensor in table
            if isinstance(tensor, torch.Tensor)
        }
        for m in (artifact, stock)
    )
    faults = [f"{name} is in one of them only" for name in sorted(set(mine) ^ set(theirs))]
    faults += [
        f"{name} differs"
        for name, tensor in mine.items()
        if name in theirs and (tensor.dtype != theirs[name].dtype or not torch.equal(tensor, theirs[name]))
    ]
    return len(mine), faults


def compare_outputs(artifact: Any, stock: Any, path: str) -> dict[str, float]:
    """Runs both on every case of a certificate; returns how far the outputs are apart, 0.0 for the same bits."""
    import safetensors.torch
    import torch

    stored = safetensors.torch.load_file(path)
    apart = {}
    for case in sorted({key.split("/")[0] for key in stored}):
        own = {key.split("/")[1]: tensor for key, tensor in stored.items() if key.startswith(case + "/")}
        batch = {key: t.to(stock.dtype) if t.is_floating_point() else t for key, t in own.items()}
        with torch.no_grad():
            both = [next(out[k] for k in OUTPUTS if k in out) for out in (m(**batch) for m in (artifact, stock))]
        same = torch.equal(*both)
        apart[case] = 0.0 if same else max(float((both[0].double() - both[1].double()).abs().max()), 5e-324)
    return apart


if __name__ == "__main__":
    main()
    os._exit(0)  # whatever threads the code that was loaded has begun
