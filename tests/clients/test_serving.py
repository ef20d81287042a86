"""`transformers serve` serves an artifact over HTTP, and answers what `generate` writes."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from clients import strangers

CHAT = [{"role": "system", "content": "you are a fox"}, {"role": "user", "content": "where is the dog?"}]
PATIENCE = 90  # seconds until the server must answer


class Server(NamedTuple):
    """Where it listens, and what it writes."""

    url: str
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in a process of its own, which loads models as they are asked for."""
    scratch = tmp_path_factory.mktemp("serving")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [strangers.command("transformers"), "serve", "--trust-remote-code", "--device", "cpu"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    server = Server(f"http://127.0.0.1:{port}", scratch / "log.txt")
    with server.log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=strangers.environment(scratch), cwd=scratch
        )
        try:
            wait(server, process)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait(server: Server, process: subprocess.Popen[Any]) -> None:
    """Waits until the server answers; fails with its last words when it ended or does not answer in time."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server does not answer (exit code {process.poll()}):\n{server.log.read_text()[-3000:]}")


def ask(server: Server, **fields: Any) -> str:
    """Sends a chat request and returns the body of the answer."""
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        data=json.dumps({"messages": CHAT, "max_tokens": 12, "temperature": 0, **fields}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error}:\n{server.log.read_text()[-3000:]}")


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def test_a_chat_is_answered_with_what_generate_writes(
    server: Server, artifact: Path, stranger: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = json.loads(ask(server, model=str(artifact)))
    wanted = greedy(stranger(artifact), tokenizer)
    assert wanted
    assert answer["choices"][0]["message"]["content"] == wanted
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 12


def test_a_streamed_answer_is_the_same_in_parts(
    server: Server, artifact: Path, stranger: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    body = ask(server, model=str(artifact), stream=True)
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: {")]
    parts = [choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"]]
    assert len(parts) > 2
    assert "".join(parts) == greedy(stranger(artifact), tokenizer)
