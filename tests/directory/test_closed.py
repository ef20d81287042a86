"""A directory with what its manifest does not list is refused by every reader, before anything of it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import opened_files
import pico
import pytest

import solidify
from solidify.artifact import inspection, loading
from solidify.directory import manifest
from solidify.errors import SolidifyError
from solidify.recipe import models, stages
from solidify.recipe import schema as recipes
from solidify.weights.hashing import digest_bytes
from training import awake

Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def adapter(trash_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return solidify.save_adapter(awake(trash_artifact), tmp_path_factory.mktemp("adapter") / "adapter")


STRANGERS: dict[str, Callable[[Path], object]] = {
    "custom generation": lambda d: written(d / "custom_generate" / "generate.py", "raise SystemExit('it ran')"),
    "a processor": lambda d: written(d / "processor_config.json", '{"auto_map": {"AutoProcessor": "x.Y"}}'),
    "a tokenizer": lambda d: written(d / "tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'),
    "an adapter": lambda d: written(d / "adapter_config.json", '{"base_model_name_or_path": "elsewhere"}'),
    "a template": lambda d: written(d / "chat_template.jinja", "{{ messages }}"),
    "an index": lambda d: written(d / "model.safetensors.index.json", '{"weight_map": {}}'),
    "weights": lambda d: written(d / "pytorch_model.bin", "pickled"),
    "compiled code": lambda d: written(d / "__pycache__" / "trashcan_moe.cpython-311.pyc", "x"),
    "a hidden file": lambda d: written(d / ".env", "X=1"),
    "a name like a draft's": lambda d: written(d / ".model.sig.partial", "x"),
    "a name like another draft's": lambda d: written(d / ".solidify.json.anything", "x"),
    "an empty directory": lambda d: (d / "additional_chat_templates").mkdir(),
    "a link": lambda d: (d / "note.txt").symlink_to(d / "README.md"),
    "a link for a file": lambda d: linked(d / "trashcan_moe.py"),
    "a link for a directory": lambda d: linked(d / "certificate"),
    "a pipe": lambda d: os.mkfifo(d / "fifo"),
    "a pipe for a file": lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")),
    "another case": lambda d: (d / "trashcan_moe.py").rename(d / "TrashCan_moe.py"),
    "a missing file": lambda d: (d / "generation_config.json").unlink(),
    "a missing card": lambda d: (d / "README.md").unlink(),
}
READERS: dict[str, Callable[[Path, Path, Path], object]] = {
    "load": lambda d, _, __: solidify.load(d, trust_remote_code=True),
    "load_tokenizer": lambda d, _, __: loading.load_tokenizer(d, trust_remote_code=True),
    "load_processor": lambda d, _, __: loading.load_processor(d, trust_remote_code=True),
    "tokenizer_in": lambda d, _, __: loading.tokenizer_in(d, trust_remote_code=True),
    "inspect": lambda d, _, __: models.skeleton(str(d), trust_remote_code=True),
    "base": lambda d, _, __: loading.load_base(str(d), trust_remote_code=True),
    "plan": lambda d, _, tmp: solidify.plan(recipe_of(d, tmp)),
    "diff": lambda d, _, __: inspection.diff(d, d),
    "merge": lambda d, adapter, tmp: solidify.merge(adapter, tmp / "merged", base=d, trust_remote_code=True),
    "train": lambda d, _, tmp: stages.train(recipe_of(d, tmp), d.parent),
    "trust": lambda d, _, __: solidify.trust(d),
}


def written(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / f"moved-{path.name}")
    path.symlink_to(path.parent.parent / f"moved-{path.name}")


def recipe_of(base: Path, tmp: Path) -> recipes.Recipe:
    (tmp / "recipe.yaml").write_text(
        f"base: {{model: {base}, trust_remote_code: true}}\n"
        "surgery:\n"
        f"  - {{replace: lm_head, expect: Linear, with: '{pico.wrappers.__file__}:Scaled'}}\n"
        "adapter: {lora: {target_modules: ['**.q_proj']}}\n"
        "data: {train: 'builtin:pydoc'}\n"
        "objective: [{loss: model}]\n"
    )
    return recipes.load(tmp / "recipe.yaml")


@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_is_not_listed_refuses_the_directory_in_every_reader(
    trash_artifact: Path, adapter: Path, copy_of: Copy, tmp_path: Path, stranger: str
) -> None:
    directory = copy_of(trash_artifact, "artifact")
    STRANGERS[stranger](directory)
    for reader, read in READERS.items():
        with opened_files.opened(tmp_path) as names, pytest.raises(SolidifyError, match="is not what was written"):
            read(directory, adapter, tmp_path)
        assert {*names} <= {manifest.NAME, "recipe.yaml"}, reader  # that of a reader stands beside the directory
    report = solidify.check(directory, trust_remote_code=True)
    assert [finding.name for finding in report.failed] == ["nothing was changed since it was written"]
    assert len(report.findings) == 1


def test_what_is_opened_is_seen(trash_artifact: Path, copy_of: Copy, tmp_path: Path) -> None:
    directory = copy_of(trash_artifact, "artifact")
    linked(directory / "trashcan_moe.py")
    with opened_files.opened(tmp_path) as names:
        solidify.load(trash_artifact)
        for path in ("config.json", "trashcan_moe.py", "certificate/inputs.safetensors"):
            (directory / path).read_bytes()
    assert names == ["config.json", "moved-trashcan_moe.py", "inputs.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "trashcan_moe.py", "generation_config.json", manifest.NAME])
def test_a_file_without_end_is_not_read(trash_artifact: Path, adapter: Path, copy_of: Copy, name: str) -> None:
    """A file may claim any size on a disk that has none of it: reading it would not end."""
    directory = copy_of(trash_artifact)
    os.truncate(directory / name, 2**40)
    for read in (lambda: solidify.load(directory, trust_remote_code=True), lambda: inspection.diff(directory, adapter)):
        with pytest.raises(SolidifyError, match=r"holds \d+ bytes, and at most \d+ are read"):
            read()
    if name == manifest.NAME:
        return
    report = solidify.check(directory, trust_remote_code=True)
    assert [finding.name for finding in report.failed] == ["nothing was changed since it was written"]
    assert "at most" in report.failed[0].evidence


def test_the_honest_directory_is_read_by_every_reader(trash_artifact: Path, copy_of: Copy) -> None:
    directory = copy_of(trash_artifact)
    assert manifest.faults(directory, manifest.read(directory)) == []
    assert models.skeleton(str(directory)) is not None
    assert not any(inspection.diff(directory, trash_artifact).values())


def test_what_tools_leave_is_no_stranger(trash_artifact: Path, copy_of: Copy) -> None:
    """Version control and the hub's client leave files that nothing opens; they are not in what transformers reads."""
    directory = copy_of(trash_artifact)
    for name in (
        ".git/HEAD",
        ".gitattributes",
        ".model.sig.partial-12",
        ".cache/huggingface/download/config.json.metadata",
    ):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("x")
    assert solidify.load(directory) is not None
    (directory / ".cache" / "other").mkdir()
    with pytest.raises(SolidifyError, match=r"\.cache/other is a directory that the manifest does not list"):
        solidify.load(directory)


def test_an_attached_model_stands_for_a_directory_without_strangers(trash_artifact: Path, copy_of: Copy) -> None:
    directory = copy_of(trash_artifact)
    model = solidify.load(directory)
    STRANGERS["custom generation"](directory)
    with pytest.raises(SolidifyError, match="custom_generate is a directory that the manifest does not list"):
        solidify.attach(model, lora={"target_modules": ["**.q_proj"]})


@pytest.mark.parametrize("stranger", ["notes.txt", "CARD.md", "model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_closed_too(trash_artifact: Path, adapter: Path, copy_of: Copy, stranger: str) -> None:
    directory = copy_of(adapter, "spoilt")
    (directory / stranger).write_text("x")
    with pytest.raises(SolidifyError, match=f"{stranger} is a file that the manifest does not list"):
        solidify.load(trash_artifact, directory)
    with pytest.raises(SolidifyError, match=f"{stranger} is a file that the manifest does not list"):
        solidify.merge(directory, directory.parent / "merged", base=trash_artifact)
    assert not solidify.check(directory).passed


def test_a_stock_model_is_closed_too(tmp_path: Path) -> None:
    pico.llama().save_pretrained(tmp_path / "stock")
    names = {path.name: digest_bytes(path.read_bytes()) for path in (tmp_path / "stock").glob("*.json")}
    weights = tmp_path / "stock" / "model.safetensors"
    record = manifest.Manifest(
        kind="stock",
        base={},
        files=names,
        tensors=manifest.digest_cache.digests([weights]),
        headers={weights.name: manifest.format.header_digest(weights)},
    )
    record.write(tmp_path / "stock")
    assert loading.load_base(str(tmp_path / "stock"), device="meta") is not None
    assert solidify.check(tmp_path / "stock").passed
    (tmp_path / "stock" / "adapter_config.json").write_text("{}")
    with pytest.raises(SolidifyError, match=r"adapter_config.json is a file that the manifest does not list"):
        loading.load_base(str(tmp_path / "stock"), device="meta")
    assert not solidify.check(tmp_path / "stock").passed


NAMES = {
    "../payload": "not the name of a file inside",
    "/etc/passwd": "not the name of a file inside",
    "a/../../b": "not the name of a file inside",
    "a//b": "not the name of a file inside",
    "./a": "not the name of a file inside",
    "..\\b": "not the name of a file inside",
    "C:\\b": "not the name of a file inside",
    "\x1b[31mred": "not the name of a file inside",
    "CONFIG.json": "only in upper and lower case",
    "solidify.json": "is listed twice",
    "trashcan_moe.py": "is listed twice",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_manifest_stay_inside(trash_artifact: Path, copy_of: Copy, name: str) -> None:
    directory = copy_of(trash_artifact)
    forged(directory, files={name: "0" * 64})
    with pytest.raises(SolidifyError, match=NAMES[name]) as caught:
        manifest.read(directory)
    assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)


def forged(directory: Path, **more: dict[str, str]) -> None:
    """Writes a manifest as somebody would who knows how they are written, but not by `Manifest.write`."""
    record = manifest.read(directory)
    changed = replace(record, **{key: {**getattr(record, key), **value} for key, value in more.items()})
    document = manifest.asdict(changed)
    (directory / manifest.NAME).write_text(manifest._format_text(document, manifest.digest_values(document)))


def test_weights_are_those_that_the_manifest_names(trash_artifact: Path, copy_of: Copy) -> None:
    """An index that is listed may not lead to files that are not."""
    directory = copy_of(trash_artifact)
    index = {"weight_map": dict.fromkeys(manifest.read(directory).tensors, "../copy/model.safetensors")}
    text = json.dumps(index)
    (directory / "model.safetensors.index.json").write_text(text)
    record = manifest.read(directory, closed=False)
    replace(record, files={**record.files, "model.safetensors.index.json": digest_bytes(text.encode())}).write(
        directory
    )
    with pytest.raises(SolidifyError, match="leads out of the directory"):
        solidify.load(directory, trust_remote_code=True)


def test_a_file_is_listed_on_purpose(trash_artifact: Path, copy_of: Copy) -> None:
    directory = copy_of(trash_artifact)
    (directory / "NOTES.md").write_text("mine\n")
    with pytest.raises(SolidifyError, match="solidify adopt"):
        solidify.load(directory)
    (adopted,) = solidify.adopt(directory, ["NOTES.md"])
    assert (adopted.name, adopted.text, adopted.before) == ("NOTES.md", "mine\n", None)
    assert solidify.load(directory) is not None  # built here, and trusted as before
    assert manifest.read(directory).lineage[-1]["step"] == "adopt"
    (directory / "NOTES.md").write_text("changed\n")
    with pytest.raises(SolidifyError, match=r"NOTES.md is not the file that was written"):
        solidify.load(directory)
    (again,) = solidify.adopt(directory, [directory / "NOTES.md"])
    assert again.before == adopted.digest


def test_an_adopted_file_does_not_make_code_of_others_trusted(
    trash_artifact: Path, copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLIDIFY_HOME", str(tmp_path / "another machine"))
    directory = copy_of(trash_artifact)
    (directory / "NOTES.md").write_text("mine\n")
    solidify.adopt(directory, ["NOTES.md"])
    with pytest.raises(SolidifyError, match="carries code that is not trusted on this machine"):
        solidify.load(directory)


NEW_WEIGHTS = ("model-00002.safetensors", "More.SafeTensors", "adapter_model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize(
    "name", ["../outside.txt", "link.txt", "solidify.json", "model.safetensors", "none", "certificate", *NEW_WEIGHTS]
)
def test_what_cannot_be_listed_is_named_and_nothing_changes(trash_artifact: Path, copy_of: Copy, name: str) -> None:
    directory = copy_of(trash_artifact)
    (directory.parent / "outside.txt").write_text("x")
    (directory / "link.txt").symlink_to(directory.parent / "outside.txt")
    for weights in NEW_WEIGHTS:
        (directory / weights).write_text("x")
    before = (directory / manifest.NAME).read_bytes()
    with pytest.raises(
        SolidifyError, match="has the name of a weight file" if name in NEW_WEIGHTS else "is not changed"
    ):
        solidify.adopt(directory, [name])
    assert (directory / manifest.NAME).read_bytes() == before
