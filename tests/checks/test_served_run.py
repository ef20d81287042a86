"""How the tokens of a server are judged: fed with right ones, wrong ones, and such as rounding decides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from transformers import PreTrainedModel

from solidify.checks import served_run
from solidify.errors import SolidifyError

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]


def model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    made = pico.llama(dtype=dtype)
    with torch.no_grad():
        made.lm_head.weight.mul_(50)  # opinions
    return made


def answer(server: PreTrainedModel, count: int = 12) -> dict[str, Any]:
    """What an honest server of `server` says."""
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids, said = list(prompt), []
        for _ in range(count):
            with torch.no_grad():
                row = server(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            ids.append(int(row.argmax()))
            said.append(float(row.max()))
        tokens.append(ids[len(prompt) :])
        logprobs.append(said)
    return {"tokens": tokens, "logprobs": logprobs, "versions": {"server": "1", "torch": "2"}}


def judged(trained: PreTrainedModel, said: dict[str, Any]) -> Any:
    found = served_run.compare(trained, PROMPTS, said["tokens"], said["logprobs"])
    return found, served_run.judged(found, said)


def test_an_honest_server_is_proved() -> None:
    found, finding = judged(model(), answer(model()))
    assert (found.same, found.rounded, found.others) == (24, 0, 0)
    assert finding.passed
    assert finding.evidence.startswith(
        "server 1: 24 of 24 greedy tokens are transformers' own; log-probabilities differ"
    )
    assert found.logprob < 1e-4


def test_a_server_whose_head_was_drawn_anew_fails() -> None:
    other = model()
    torch.nn.init.normal_(other.lm_head.weight)
    found, finding = judged(model(), answer(other))
    assert found.others > 12
    assert finding.passed is False
    assert "are others, by up to" in finding.evidence


@pytest.mark.parametrize("whose", ["model", "server"])
def test_numbers_that_are_none_agree_with_nothing(whose: str) -> None:
    trained, said = model(), answer(model())
    if whose == "model":
        trained.lm_head.weight.data[said["tokens"][0][3]] = torch.nan
    else:
        said["logprobs"][0][3] = float("nan")
    assert judged(trained, said)[1].passed is False


def test_one_other_token_among_many_is_enough() -> None:
    said = answer(model())
    said["tokens"][1][-1] = (said["tokens"][1][-1] + 1) % 128
    found, finding = judged(model(), said)
    assert (found.same, found.others) == (23, 1)
    assert finding.passed is False


@pytest.mark.parametrize(("factor", "passed"), [(1 + 2**-7, True), (1.5, False)])
def test_only_what_rounding_decides_is_forgiven(factor: float, passed: bool) -> None:
    """A rival token's row of the head is that of a token that the server named: longer by a hair, or by half."""
    trained = model(torch.bfloat16)
    said = answer(trained)
    token = said["tokens"][0][0]
    rival = next(other for other in range(3, 128) if not any(other in row for row in said["tokens"]))
    with torch.no_grad():
        trained.lm_head.weight[rival] = trained.lm_head.weight[token] * factor
    found, finding = judged(trained, said)
    assert finding.passed is passed
    assert found.rounded if passed else found.others


def test_an_interpreter_without_a_server_is_refused(trash_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(SolidifyError, match=r"has no vLLM; docs/serving.md says"):
        served_run.served(trash_artifact, sys.executable)
    with pytest.raises(SolidifyError, match=r"nowhere cannot be run: .*; name a Python interpreter"):
        served_run.served(trash_artifact, tmp_path / "nowhere")


def test_the_last_words_of_a_server_are_its_error() -> None:
    log = "INFO ready\n[rank0]: Traceback\n[rank0]: AttributeError: 'Scaled' object has no attribute 'x'\nINFO bye\n"
    assert served_run._last_words(log) == "[rank0]: AttributeError: 'Scaled' object has no attribute 'x'"
    assert served_run._last_words("one\ntwo\n") == "two"
    assert served_run._last_words("") == "it said nothing"
