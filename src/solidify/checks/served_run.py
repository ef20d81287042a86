"""Serves an artifact by a server that is installed elsewhere, and compares what it says with transformers.

The server runs in a process of its own, by the interpreter that the user names (vLLM needs an environment of its own).
Its tokens are judged one by one: after the same text transformers must choose the same token. Where it chooses another,
that is a failure, unless the two are so close that rounding decides; how much rounding does is measured on this model,
by running it in the next wider type.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from solidify.artifact import loading
from solidify.checks import served_call
from solidify.directory import manifest, private, trust
from solidify.errors import ArtifactError, SolidifyError
from solidify.findings import Finding
from solidify.model import anatomy
from solidify.system import disk

NAME = "served by vLLM"
LENGTHS = (5, 17, 33)  # of the prompts, in tokens
COUNT = 24  # new tokens of each
PATIENCE = 1800  # seconds
_ALONE = Path(__file__).with_name("vllm_alone.py")
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
_HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # they say where we are, not where the server is


@dataclass(frozen=True)
class Compared:
    """How a server's tokens compare: those that transformers chooses, too, those that rounding decides, the others.

    `logprob` is the largest difference of the log-probabilities that both give the server's tokens, `margin` the
    largest by which transformers prefers another token among `others`, in logits.
    """

    same: int
    rounded: int
    others: int
    logprob: float
    margin: float


def served(directory: Path, python: str | Path, *, compiled: bool = True) -> Finding:
    """Serves the artifact by the vLLM that the interpreter `python` has: proved or failed, with what was compared.

    The artifact's code runs in this process and in the server's: the caller has asked whether it may. What is no
    causal language model is not run.

    Raises:
        SolidifyError: the interpreter cannot be run, or has no vLLM.
    """
    _require_vllm(python)
    record = manifest.read(directory, "artifact")
    model = loading.load_artifact(directory)
    if not model.can_generate() or model.config.is_encoder_decoder:
        return Finding.unseen(NAME, "only decoder-only models that generate are compared token by token")
    prompts = [served_call.ordinary(model.base_model, length) for length in LENGTHS]
    try:
        trust.require(record, directory, False)
        with private.copy(directory, record) as own:
            answer = run(own, python, prompts, dtype=model.dtype, compiled=compiled)
    except ArtifactError as error:
        return Finding(NAME, False, str(error))
    return judged(compare(model, prompts, answer["tokens"], answer["logprobs"]), answer)


def judged(found: Compared, answer: dict[str, Any]) -> Finding:
    """Says what the comparison shows, and what was run."""
    total = found.same + found.rounded + found.others
    what = " with ".join(f"{name} {number}" for name, number in answer["versions"].items() if name != "torch")
    evidence = f"{what}: {found.same} of {total} greedy tokens are transformers' own"
    if found.rounded:
        evidence += f", {found.rounded} more are as near as rounding"
    if found.others:
        evidence += f"; {found.others} are others, by up to {found.margin:.1e} in the logits"
    evidence += f"; log-probabilities differ by at most {found.logprob:.1e}"
    return Finding(NAME, not found.others and math.isfinite(found.logprob), evidence)


def run(
    directory: Path, python: str | Path, prompts: Sequence[Sequence[int]], *, dtype: torch.dtype, compiled: bool
) -> dict[str, Any]:
    """Returns what vLLM generates in a process of its own, see `vllm_alone.py`.

    Raises:
        ArtifactError: the server did not serve it; its last words are in the message.
    """
    request = {
        "directory": str(directory),
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": [list(prompt) for prompt in prompts],
        "count": COUNT,
        "length": max(LENGTHS) + COUNT,
        "compiled": compiled,
    }
    with disk.temporary() as scratch:
        asked, answered, log = (scratch / name for name in ("request.json", "answer.json", "log.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if key not in _HIDDEN} | {"HF_HUB_OFFLINE": "1"}
        command = [str(python), str(_ALONE), str(asked), str(answered)]
        try:
            with log.open("wb") as output:
                subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=scratch, timeout=PATIENCE
                )
        except subprocess.TimeoutExpired as error:
            raise ArtifactError(f"vLLM had not answered after {PATIENCE} seconds") from error
        if not answered.is_file():
            words = _last_words(log.read_text(encoding="utf-8", errors="replace"))
            raise ArtifactError(f"vLLM did not serve it: {words}")
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return answer


def _require_vllm(python: str | Path) -> None:
    """Finds out whether an interpreter has vLLM."""
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([str(python), "-I", "-c", question], capture_output=True)
    except OSError as error:
        raise SolidifyError(f"{python} cannot be run: {error}; name a Python interpreter that has vLLM") from error
    if done.returncode:
        raise SolidifyError(f"{python} has no vLLM; docs/serving.md says how an environment of its own is made")


def _last_words(log: str) -> str:
    """Returns the last line of a log that names an error; without one, the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].removeprefix("[rank0]").strip(": ").endswith("Error")]
    named = [line for line in lines if "Error: " in line]
    return (errors or named or lines or ["it said nothing"])[-1]


def compare(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
) -> Compared:
    """Compares the tokens that a server generated, each after the text before it, with those of `model`.

    `logprobs` are the server's log-probabilities of its tokens. The model is run in evaluation, without a cache.
    """
    logits = _compute_logits(model, prompts, tokens)
    chosen = torch.tensor([token for row in tokens for token in row])
    said = torch.tensor([value for row in logprobs for value in row])
    mine = logits.gather(-1, chosen[:, None]).squeeze(-1)
    margins = logits.amax(-1) - mine
    logprob = float((logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1) - said).abs().max())
    apart = margins[~(margins <= 0)]  # also those that are NaN
    if not apart.numel():
        return Compared(len(chosen), 0, 0, logprob, 0.0)
    noise = _measure_rounding(model, prompts, tokens, logits)
    others = apart[~(apart <= 2 * noise)]  # each side is off by up to that much
    return Compared(
        len(chosen) - apart.numel(),
        apart.numel() - others.numel(),
        others.numel(),
        logprob,
        float(others.max()) if others.numel() else 0.0,
    )


def _compute_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Returns the logits (new tokens of all texts, vocabulary) that each new token was chosen from."""
    rows = []
    with torch.no_grad(), anatomy.evaluation(model):
        for prompt, new in zip(prompts, tokens, strict=True):
            ids = torch.tensor([[*prompt, *new]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            rows.append(logits[len(prompt) - 1 : -1].double().cpu())
    return torch.cat(rows)


def _measure_rounding(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    logits: torch.Tensor,
) -> float:
    """Returns by how much the logits move when the same tensors are computed with in the next wider type."""
    wide = deepcopy(model).to(_WIDER[model.dtype])
    return float((_compute_logits(wide, prompts, tokens) - logits).abs().max())
