"""Serves one directory by vLLM: run by an interpreter that has vLLM and need not have us.

    python vllm_alone.py REQUEST ANSWER

REQUEST is a JSON file with `directory`, `dtype`, `prompts` (lists of token ids), `count` (new tokens of each), `length`
(the longest text) and `compiled`. ANSWER is written as JSON: `tokens` by prompt, chosen greedily, `logprobs` beside
them, `seconds` until the engine stood and the `versions` that ran.

The engine is the one behind `vllm serve DIR --model-impl transformers --trust-remote-code`.
"""

import json
import os
import sys
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any


def main(request_file: str, answer_file: str) -> None:
    """Generates greedily for every prompt and writes what was generated."""
    import torch
    import transformers
    from vllm import LLM, SamplingParams

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    started = time.monotonic()
    engine = LLM(
        request["directory"],
        model_impl="transformers",
        trust_remote_code=True,
        dtype=request["dtype"],
        skip_tokenizer_init=True,
        max_model_len=request["length"],
        max_num_seqs=len(request["prompts"]),
        enforce_eager=not request["compiled"],
        seed=0,
    )
    seconds = time.monotonic() - started
    parameters = SamplingParams(
        temperature=0, max_tokens=request["count"], ignore_eos=True, detokenize=False, logprobs=1
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], parameters, use_tqdm=False)
    best = [output.outputs[0] for output in outputs]
    (package,) = set(packages_distributions()["vllm"])
    answer = {
        "tokens": [list(each.token_ids) for each in best],
        "logprobs": [_list_logprobs(each) for each in best],
        "seconds": seconds,
        "versions": {
            package: version(package),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


def _list_logprobs(output: Any) -> list[float]:
    return [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]


if __name__ == "__main__":
    # One process, and no more memory for the past than a few short texts need: both only where nothing else is said.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main(*sys.argv[1:])
