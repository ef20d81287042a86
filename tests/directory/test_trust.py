"""Whose code runs: what was built or trusted here, and only the bytes that were digested."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers

import solidify
from solidify.artifact import certificate, loading
from solidify.directory import manifest, private, trust
from solidify.errors import ArtifactError
from solidify.recipe import references
from solidify.system import disk
from solidify.weights.hashing import digest_bytes
from training import awake

Copy = Callable[..., Path]


def rewritten(directory: Path, name: str, text: str) -> Path:
    """Changes a file and its entry in the manifest, as somebody does who publishes an artifact of his own."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    record = manifest.read(directory, closed=False)
    kind = "code" if name.endswith(".py") else "files"
    replace(record, **{kind: {**getattr(record, kind), name: digest_bytes(text.encode())}}).write(directory)
    return directory


def with_setting(directory: Path, name: str, **settings: Any) -> Path:
    path = directory / name
    found = json.loads(path.read_text()) if path.is_file() else {}
    return rewritten(directory, name, json.dumps({**found, **settings}))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing was built."""
    monkeypatch.setenv("SOLIDIFY_HOME", str(tmp_path / "another machine"))


OTHERS = {
    "configuration": lambda d: with_setting(d, "config.json", hidden_act="gelu"),
    "generation": lambda d: with_setting(d, "generation_config.json", temperature=0.5),
    "tokenizer": lambda d: with_setting(d, "tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
    "processor": lambda d: with_setting(d, "processor_config.json", processor_class="LlavaProcessor"),
    "template": lambda d: rewritten(d, "chat_template.jinja", "{{ messages }}"),
    "custom generation": lambda d: rewritten(d, "custom_generate/generate.py", "raise SystemExit('it ran')"),
    "certificate": lambda d: rewritten(d, "certificate/state.json", "{}"),
    "code": lambda d: rewritten(d, "trashcan_moe.py", (d / "trashcan_moe.py").read_text() + "\n# changed\n"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_known_code_with_anything_else_that_decides_what_runs_asks_again(
    trash_artifact: Path, copy_of: Copy, other: str
) -> None:
    directory = OTHERS[other](copy_of(trash_artifact))
    for read in (solidify.load, loading.load_tokenizer, loading.load_processor, loading.tokenizer_in):
        with pytest.raises(ArtifactError, match="carries code that is not trusted on this machine"):
            read(directory)
    with pytest.raises(ArtifactError, match="carries code that is not trusted on this machine"):
        solidify.check(directory)


def test_a_copy_and_an_edited_card_do_not_ask_again(trash_artifact: Path, copy_of: Copy) -> None:
    directory = copy_of(trash_artifact)
    (directory / "README.md").write_text("# Mine\n")
    assert solidify.load(directory) is not None


LEADS = {
    "another repository": ("config.json", {"auto_map": {"AutoConfig": "owner/name--configuration.Config"}}),
    "another directory": ("config.json", {"auto_map": {"AutoConfig": "/tmp/payload--payload.Config"}}),
    "a path": ("config.json", {"auto_map": {"AutoConfig": "../payload.Config"}}),
    "a part of a path": ("config.json", {"auto_map": {"AutoConfig": "sub/payload.Config"}}),
    "a file that is not there": ("config.json", {"auto_map": {"AutoConfig": "payload.Config"}}),
    "a part of the configuration": ("config.json", {"text_config": {"auto_map": {"AutoModel": "a--b.C"}}}),
    "a pipeline": ("config.json", {"custom_pipelines": {"x": {"impl": "owner/name--pipe.Pipe"}}}),
    "kernels": ("config.json", {"attn_implementation": "owner/kernel"}),
    "a tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["owner/name--t.T", None]}}),
    "a processor": ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "o/n--i.I"}}}),
    "images": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": {"torchvision": "o/n--i.I"}}}),
    "generation": ("generation_config.json", {"auto_map": {"AutoConfig": "owner/name--c.C"}}),
    "any JSON": ("anything.json", {"auto_map": {"AutoConfig": "owner/name--c.C"}}),
    "the certificate": ("certificate/state.json", {"implementations": {"attn_implementation": "owner/kernel"}}),
    "an adapter": ("adapter_config.json", {"base_model_name_or_path": "owner/name"}),
}


@pytest.mark.parametrize("lead", LEADS)
def test_what_leads_elsewhere_is_refused_whatever_is_allowed(trash_artifact: Path, copy_of: Copy, lead: str) -> None:
    name, settings = LEADS[lead]
    directory = with_setting(copy_of(trash_artifact), name, **settings)
    trust.remember(manifest.read(directory))
    for read in (solidify.load, loading.load_tokenizer, loading.load_processor, loading.load_base):
        with pytest.raises(ArtifactError, match="would run code that is not its own"):
            read(str(directory), trust_remote_code=True)
    with pytest.raises(ArtifactError, match="would run code that is not its own"):
        solidify.trust(directory)
    report = solidify.check(directory, trust_remote_code=True)
    assert [finding.name for finding in report.failed] == ["nothing was changed since it was written"]
    assert "leads to" in report.failed[0].evidence or "puts an adapter on it" in report.failed[0].evidence


def test_a_key_that_is_written_in_escapes_is_read_too(trash_artifact: Path, copy_of: Copy) -> None:
    directory = rewritten(copy_of(trash_artifact), "x.json", '{"a": [{"auto\\u005fmap": {"AutoConfig": "o/n--c.C"}}]}')
    with pytest.raises(ArtifactError, match=r"auto_map in x.json leads to"):
        solidify.load(directory, trust_remote_code=True)


def test_an_auto_map_may_lead_to_the_artifacts_own_files(trash_artifact: Path) -> None:
    assert trust.leads(trash_artifact, manifest.read(trash_artifact)) == []


@pytest.mark.slow
def test_a_permission_is_for_one_command(trash_artifact: Path, copy_of: Copy, tmp_path: Path, elsewhere: None) -> None:
    """Neither a load, nor a merge, nor a build of what came from elsewhere lets it run a second time."""
    foreign = copy_of(trash_artifact)
    model = awake_with_permission(foreign)
    solidify.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="solidify trust"):
        solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged", trust_remote_code=True)
    again = solidify.load(foreign, trust_remote_code=True)
    edits = solidify.replace(again, "lm_head", pico.wrappers.Scaled)
    solidify.build(again, edits, tmp_path / "built")
    for directory in (foreign, tmp_path / "merged", tmp_path / "built"):
        with pytest.raises(ArtifactError, match="carries code that is not trusted on this machine"):
            solidify.load(directory)
        assert solidify.load(directory, trust_remote_code=True) is not None


def awake_with_permission(directory: Path) -> Any:
    loaded = solidify.load(directory, trust_remote_code=True)
    model = solidify.attach(loaded, lora={"r": 4, "target_modules": ["**.q_proj"]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 if parameter.requires_grad else 0)
    return model


@pytest.mark.slow
def test_trust_for_good_is_said_by_name(trash_artifact: Path, copy_of: Copy, tmp_path: Path, elsewhere: None) -> None:
    directory = copy_of(trash_artifact)
    solidify.trust(directory)
    solidify.save_adapter(awake(directory), tmp_path / "adapter")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    assert solidify.load(tmp_path / "merged") is not None  # what is made here of what is trusted here
    solidify.trust(directory, forget=True)
    with pytest.raises(ArtifactError, match="carries code that is not trusted on this machine"):
        solidify.load(directory)
    (directory / "trashcan_moe.py").write_text("x = 1\n")
    with pytest.raises(ArtifactError, match="is not what was written"):
        solidify.trust(directory)


_numbers = count()


def fresh(copy_of: Copy, source: Path) -> Path:
    """Copies an artifact to a name of which this process holds no module yet: transformers imports what is there."""
    return copy_of(source, f"fresh{next(_numbers)}")


MOMENTS = {"after the digests": (trust, "require"), "after the copy": (loading, "_load_model")}
SWAPPED = ("trashcan_moe.py", "modeling_solid_olmoe.py", "config.json")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", SWAPPED)
def test_a_file_that_is_swapped_between_digest_and_import_does_not_run(
    trash_artifact: Path, copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, name: str
) -> None:
    directory, witness = fresh(copy_of, trash_artifact), tmp_path / "ran"
    place, function = MOMENTS[moment]
    honest = getattr(place, function)

    def swap(*args: Any, **options: Any) -> Any:
        path = directory / name
        if name.endswith(".py"):
            path.write_text(path.read_text() + f"\nopen({str(witness)!r}, 'w').close()\n")
        else:
            payload(tmp_path / "elsewhere", witness)
            lead = {"AutoConfig": f"{tmp_path / 'elsewhere'}--payload.Config"}
            path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": lead}))
        return honest(*args, **options)

    monkeypatch.setattr(place, function, swap)
    if moment == "after the copy":
        assert type(solidify.load(directory)).__name__ == "SolidOlmoeForCausalLM"  # from what was digested
    else:
        with pytest.raises(ArtifactError, match=f"{name} is not the file that was written"):
            solidify.load(directory)
    assert not witness.exists()


def payload(directory: Path, witness: Path) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "payload.py").write_text(f"open({str(witness)!r}, 'w').close()\n")


def test_the_swap_that_is_tried_does_run_where_nothing_is_held(
    trash_artifact: Path, copy_of: Copy, tmp_path: Path
) -> None:
    """The twin: transformers by itself imports what stands there."""
    directory, witness = fresh(copy_of, trash_artifact), tmp_path / "ran"
    path = directory / "trashcan_moe.py"
    path.write_text(path.read_text() + f"\nopen({str(witness)!r}, 'w').close()\n")
    transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert witness.exists()


@contextmanager
def swapping(path: Path, other: bytes) -> Iterator[None]:
    """Puts other bytes, and the file's own again, in the place of a file for as long as the block lasts."""
    own, over, draft = path.read_bytes(), threading.Event(), path.parent.parent / f"next-{path.parent.name}"

    def swap() -> None:
        while not over.is_set():
            for content in (other, own):
                draft.write_bytes(content)
                draft.replace(path)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_files_that_are_swapped_all_the_time_never_run(trash_artifact: Path, copy_of: Copy, tmp_path: Path) -> None:
    witness, outcomes = tmp_path / "ran", set()
    for _ in range(12):
        path = fresh(copy_of, trash_artifact) / "trashcan_moe.py"
        evil = path.read_bytes() + f"\nopen({str(witness)!r}, 'w').close()\n".encode()
        with swapping(path, evil):
            try:
                outcomes.add(type(solidify.load(path.parent)).__name__)
            except ArtifactError as error:
                assert "is not the file that was written" in str(error)
                outcomes.add("refused")
    assert not witness.exists()
    assert outcomes <= {"refused", "SolidOlmoeForCausalLM"}


def test_a_directory_that_is_swapped_after_it_was_allowed_does_not_run(
    trash_artifact: Path, copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: None
) -> None:
    """Another artifact, whole in itself, takes the place of the one that was asked about."""
    directory, other, witness = fresh(copy_of, trash_artifact), fresh(copy_of, trash_artifact), tmp_path / "ran"
    code = (other / "trashcan_moe.py").read_text()
    rewritten(other, "trashcan_moe.py", code + f"\nopen({str(witness)!r}, 'w').close()\n")
    assert not manifest.faults(other, manifest.read(other))

    def swap(*_: Any) -> list[Any]:
        directory.rename(tmp_path / "away")
        other.rename(directory)
        return []

    monkeypatch.setattr(certificate, "witness", swap)
    report = solidify.check(directory, trust_remote_code=True)
    assert not witness.exists()
    assert all("carries code" in finding.evidence for finding in report.findings if "rules of" in finding.name)


def test_a_tokenizer_of_ones_own_is_code_of_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "spelling.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class SpellingTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    kind = references.resolve("spelling.py:SpellingTokenizer", tmp_path)
    kind.register_for_auto_class("AutoTokenizer")
    tokenizer = kind(tokenizer_object=word_tokenizer().backend_tokenizer, unk_token="<unk>", pad_token="<unk>")
    model = pico.llama()
    edits = solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    directory = pico.artifact(model, edits, tmp_path / "artifact", tokenizer=tokenizer)
    assert "spelling.py" in manifest.read(directory).code
    assert type(loading.load_tokenizer(directory)).__name__ == "SpellingTokenizer"
    (directory / "spelling.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(ArtifactError, match=r"spelling.py is not the file that was written"):
        loading.load_tokenizer(directory)


def test_code_that_came_with_a_tokenizer_asks_again(tmp_path: Path) -> None:
    model = pico.llama()
    strange = type("StrangeTokenizer", (), {"__module__": "transformers_modules.a.b"})()
    processor = type("Processor", (), {})()
    assert trust.strange_classes(model) == []
    assert trust.strange_classes(model, strange) == ["StrangeTokenizer"]
    assert trust.strange_classes(model, processor) == []
    processor.tokenizer = strange
    assert trust.strange_classes(model, processor) == ["StrangeTokenizer"]


def test_weights_that_are_swapped_while_they_are_loaded_are_noticed(
    trash_artifact: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(trash_artifact)
    honest = loading._load_model

    def swap(*args: Any) -> Any:
        content = (directory / "model.safetensors").read_bytes()
        (directory / "other").write_bytes(content)
        (directory / "other").replace(directory / "model.safetensors")
        return honest(*args)

    monkeypatch.setattr(loading, "_load_model", swap)
    with pytest.raises(ArtifactError, match=r"model.safetensors was written to while it was read"):
        solidify.load(directory)


LOAD = """
import sys, solidify
for _ in range(8):
    print(type(solidify.load(sys.argv[1])).__name__)
"""


@pytest.mark.slow
def test_two_processes_load_at_once(trash_artifact: Path, copy_of: Copy) -> None:
    directory = copy_of(trash_artifact)
    command = [sys.executable, "-c", LOAD, str(directory)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.split() == ["SolidOlmoeForCausalLM"] * 8


def test_the_copy_is_private_holds_what_is_listed_and_goes(trash_artifact: Path, copy_of: Copy) -> None:
    directory = copy_of(trash_artifact)
    (directory / ".gitattributes").write_text("x")
    record = manifest.read(directory)
    with private.copy(directory, record) as own:
        assert own.parent.stat().st_mode & 0o777 == 0o700
        assert own.name == directory.name
        found = {path.relative_to(own).as_posix() for path in own.rglob("*") if path.is_file()}
        assert found == {*record.listed(), manifest.NAME}
        assert (own / "model.safetensors").resolve() == directory / "model.safetensors"
    assert not own.parent.exists()


def test_nothing_names_the_copy_afterwards(trash_artifact: Path, tmp_path: Path) -> None:
    model = pico.llama()
    edits = solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    tokenizer = word_tokenizer()
    directory = pico.artifact(model, edits, tmp_path / "artifact", tokenizer=tokenizer)
    loaded, read = solidify.load(directory), loading.load_tokenizer(directory)
    assert loaded.config._name_or_path == loaded.name_or_path == str(directory)
    assert read.name_or_path == str(directory)
    read.save_pretrained(tmp_path / "saved")
    assert read("a b").input_ids == tokenizer("a b").input_ids
    for thing in (read.init_kwargs, vars(loaded.config), vars(loaded.generation_config)):
        assert f"{disk.PREFIX}{os.getpid()}-" not in str(thing)
    for path in (tmp_path / "saved").iterdir():
        assert f"{disk.PREFIX}{os.getpid()}-".encode() not in path.read_bytes()


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def test_every_row_of_the_threat_model_names_its_test() -> None:
    text = (Path(__file__).parents[2] / "docs" / "trust.md").read_text()
    rows = [line for line in text.split("## The threat model")[1].split("\n## ")[0].splitlines() if line[:1] == "|"][2:]
    assert len(rows) >= 15
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+` \|$", row)] == []


def test_a_card_names_a_base_and_not_where_it_stands(tmp_path: Path) -> None:
    pico.llama().save_pretrained(tmp_path / "secret" / "base")
    model = loading.load_base(str(tmp_path / "secret" / "base")).model
    edits = solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    card = (pico.artifact(model, edits, tmp_path / "artifact") / "README.md").read_text()
    assert "Base model: `base`" in card
    assert "secret" not in card
    assert "base_model:" not in card
    assert manifest.public_name("owner/name") == "owner/name"
