"""Every verb that takes a directory, on every kind of directory: it works, or says in one sentence what to do."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import solidify
from solidify.__main__ import main
from solidify.directory import manifest, packages, trust
from solidify.errors import ArtifactError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["solidify", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return command


def adapted(model: Any, directory: Path) -> Path:
    peft_model = solidify.attach(model, lora={"r": 2, "target_modules": ["**.q_proj"]})
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return solidify.save_adapter(peft_model.eval(), directory)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'solidify[quantized]'")
    root = tmp_path_factory.mktemp("kinds")
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(128)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2", unk_token="w3")
    pico.llama(eos_token_id=2).save_pretrained(root / "base")
    words.save_pretrained(root / "base")
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    edits = solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    artifact = pico.artifact(model, edits, root / "run" / "artifact", tokenizer=words)
    adapter = adapted(solidify.load(artifact), root / "run" / "adapter")
    merged = solidify.merge(adapted(AutoModelForCausalLM.from_pretrained(root / "base"), root / "plain"), root / "ours")
    return {
        "artifact": artifact,
        "packed artifact": solidify.export(artifact, root / "packed", "int8").directory,
        "stock": root / "base",
        "packed stock": solidify.export(merged.directory, root / "packed-stock", "int8").directory,
        "adapter": adapter,
        "run": root / "run",
    }


PACKED = r"the weights of .* are packed \(bitsandbytes\), and what was rounded is lost; export the model that it was"
NOT_OURS = "was not made by solidify; `solidify init .* --replace none` writes a recipe that takes it as its base"
RUN = "is the output of a run, which has no solidify.json of its own: name .*artifact or .*adapter"
ADAPTER = "is an adapter, not a model; name a hub id"
# By verb and kind, what it says where it does not work.
TABLE: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "inspect": ((), {"adapter": ADAPTER, "run": RUN}),
    "generate": (("--prompt", "w5 w6", "--max-new-tokens", "2"), {"adapter": ADAPTER, "run": RUN}),
    "diff": ((), {"run": RUN}),
    "trust": (
        (),
        {
            "stock": NOT_OURS,
            "packed stock": "carries no code that could be trusted: it loads as it is",
            "adapter": "is an adapter, but an artifact or a model of stock layout was expected: name the directory",
            "run": RUN,
        },
    ),
    "export": (
        ("--as", "float32"),
        {
            "artifact": "is in float32 already",
            "packed artifact": PACKED,
            "packed stock": PACKED,
            "stock": NOT_OURS,
            "adapter": "is an adapter, which cannot be exported as 'float32'; there are peft, ",
            "run": RUN,
        },
    ),
    "merge": (
        (),
        {
            "artifact": "is an artifact, but an adapter was expected: name the directory of one",
            "packed artifact": "is a model of stock layout, but an adapter was expected: name the directory of one",
            "packed stock": "is a model of stock layout, but an adapter was expected: name the directory of one",
            "stock": NOT_OURS,
            "run": RUN,
        },
    ),
}


@pytest.mark.parametrize("verb", TABLE)
def test_each_kind_works_or_says_what_to_do(kinds: dict[str, Path], tmp_path: Path, run: Run, verb: str) -> None:
    options, refused = TABLE[verb]
    for kind, directory in kinds.items():
        words = [directory, directory] if verb == "diff" else [directory]
        output = ("--output", tmp_path / kind) if verb in ("export", "merge") else ()
        code, out, err = run(verb, *words, *options, *output)
        last = err.strip().splitlines()[-1] if err.strip() else ""
        if kind in refused:
            assert (kind, code) == (kind, 2) and re.search(refused[kind], last), (kind, err)
        else:
            assert (kind, code) == (kind, 0), err
            assert out or verb == "merge"


def test_the_form_of_an_artifact_is_trusted_where_that_was_made(kinds: dict[str, Path]) -> None:
    """On the machine that wrote it; elsewhere the sentence names what its user has, and `trust` is for good."""
    packed = kinds["packed artifact"]
    record = manifest.read(packed)
    assert record.code and trust.known(record)
    solidify.load(packed)
    trust.trust(packed, forget=True)
    with pytest.raises(ArtifactError, match=r"--trust-remote-code.*solidify trust") as caught:
        solidify.load(packed)
    assert "base.trust_remote_code" not in str(caught.value)
    trust.trust(packed)
    solidify.load(packed)


def test_what_may_run_once_alone_makes_no_form_that_may_run_always(
    kinds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: list[manifest.Manifest] = []
    monkeypatch.setattr(trust, "remember", remembered.append)
    monkeypatch.setattr(trust, "known", lambda record: False)
    solidify.export(kinds["artifact"], tmp_path / "half", "bfloat16", trust_remote_code=True)
    assert not remembered


def test_built_in_names_are_compared_and_wrong_ones_told_at_once(kinds: dict[str, Path], run: Run) -> None:
    code, out, _ = run("diff", "builtin:tiny-olmoe", "builtin:tiny-olmoe")
    assert code == 0 and "the same" in out
    for verb in ("inspect", "diff", "generate", "init"):
        given = ["builtin:olmoe"] * (2 if verb == "diff" else 1)
        code, _, err = run(verb, *given)
        assert code == 2 and "there is no 'builtin:olmoe'; built in: builtin:tiny-olmoe, builtin:smollm2-135m" in err


@pytest.mark.parametrize("kind", ["artifact", "packed artifact"])
def test_required_packages_are_compared_when_it_is_loaded(
    kinds: dict[str, Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(kinds[kind], tmp_path / "copy"))
    record = manifest.read(copied)
    wanted = {"numpy": "0.9.1", "safetensors": packages.current_versions()["safetensors"]}
    replace(record, requirements=wanted).write(copied)
    solidify.load(copied)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "it was made with numpy 0.9.1, and" in said and "pip install numpy==0.9.1" in said
    assert "safetensors" not in said
    if kind == "artifact":
        found = next(
            each for each in solidify.check(copied).findings if each.name.startswith("packages that it requires")
        )
        assert found.verdict == "measured" and "numpy 0.9.1" in found.evidence
    replace(record, requirements={"no-such-package": "1.0"}).write(copied)
    with pytest.raises(ArtifactError, match=r"it needs no-such-package 1\.0: pip install no-such-package"):
        solidify.load(copied)
