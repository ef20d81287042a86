"""Run as a script in a process of its own: loads an adapter, ours and plain PEFT's way, and writes what it found."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

gc.disable()  # what is imported stays: to look through it for garbage, again and again, takes a third of the time

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from transformers.utils import logging  # noqa: E402

from solidify.adapter import base_state, lookup, storage  # noqa: E402
from solidify.artifact import certificate, quantizing, stock  # noqa: E402
from solidify.checks import roundtrip, structure, trainable  # noqa: E402
from solidify.directory import manifest, trust  # noqa: E402
from solidify.errors import ModelError  # noqa: E402
from solidify.findings import Finding  # noqa: E402

gc.freeze()
gc.enable()


def find_inputs(base: Path, plain: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    """Returns what an artifact's certificate was made with; for a plain model, which has none, inputs made up anew."""
    if not (base / certificate.NAME).is_dir():
        return certificate.make_inputs(plain)
    stored = load_file(base / certificate.NAME / "inputs.safetensors")
    cases = sorted({key.split("/")[0] for key in stored})
    return {c: {k.split("/")[1]: t for k, t in stored.items() if k.startswith(c + "/")} for c in cases}


def main() -> None:
    """Answers the request on the standard input."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    request = json.loads(sys.stdin.read())
    base, directory = Path(request["base"]), Path(request["adapter"])
    record = stock.read(base)
    with trust.permitting(request["permitted"]):
        plain, other = stock.load(base), stock.load(base)
    inputs = find_inputs(base, plain)
    expected = roundtrip.outputs(plain, inputs)
    model = storage.load_adapter(plain, directory)
    with_adapter = roundtrip.outputs(model, inputs)
    again = PeftModel.from_pretrained(other, directory).eval()
    find = partial(lookup.find_inner, model)
    findings = [
        Finding("loads completely", True, "every tensor of the adapter was used once"),
        *([structure.structure(lookup.plain_model(model), record.edits, find)] if record.edits else []),
        trainable.frozen(model, base_state.with_digests(model, base, record)),
        *roundtrip.adapter_effect(model, expected, inputs),
        roundtrip.wrong_base_refused(model, manifest.read(directory, "adapter"), directory),
        replace(
            roundtrip.adapter_reload(with_adapter, roundtrip.outputs(again, inputs)), name="plain PEFT loads the same"
        ),
    ]
    with trust.permitting(request["permitted"]):
        findings += on_quantized(base, directory, inputs)
    if manifest.read(directory, "adapter").sha256 != request["manifest"]:
        words = "the adapter that was compared has been replaced by another since"
        findings = [Finding("loads completely", False, words)]
    answer = json.dumps({"findings": [finding.document() for finding in findings]})
    Path(request["answer"]).write_text(answer, encoding="utf-8")


def on_quantized(base: Path, directory: Path, inputs: Mapping[str, Mapping[str, torch.Tensor]]) -> list[Finding]:
    """Looks at an adapter on its base as it was quantised in training; nothing is said of one that was not."""
    recorded = manifest.read(directory, "adapter").base.get("quantization")
    if recorded is None:
        return []
    name = "on the base as it was trained (quantised)"
    try:
        config = quantizing.again(recorded)
        quantizing.require_library(config)
    except ModelError as error:
        return [Finding.unseen(name, str(error))]
    plain = stock.load(base, **quantizing.on_cpu(config))
    expected = roundtrip.outputs(plain, inputs)
    found = roundtrip.adapter_effect(storage.load_adapter(plain, directory), expected, inputs)
    return [replace(each, name=f"{each.name} ({quantizing.describe(config)})") for each in found]


if __name__ == "__main__":
    main()
    os._exit(0)  # whatever threads the code that was loaded has begun
