"""What is uploaded is what a manifest lists, all of it and nothing else; tried on a stand-in for the hub."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub
import pico
import pytest
import torch
import yaml
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM

import solidify
from solidify.__main__ import main
from solidify.artifact import loading, stock
from solidify.directory import manifest
from solidify.errors import ArtifactError
from solidify.findings import Finding


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub.Hub]:
    with hub.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "right")
        yield running


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pushed")
    pico.llama().save_pretrained(root / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "base")
    edits = solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled)
    return pico.artifact(model, edits, root / "artifact")


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def adapter(artifact: Path) -> Path:
    model = solidify.load(artifact)
    peft_model = solidify.attach(model, lora={"r": 2, "target_modules": ["**.q_proj"]}, train=["**.scale"])
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    return solidify.save_adapter(
        peft_model,
        artifact.parent / "adapter",
        recipe={"base": {"model": str(artifact)}, "data": {"train": "owner/chats", "eval": "rows.jsonl"}},
        measured={"heldout_loss_trained": 2.0},
    )


def command(*words: Any) -> int:
    sys.argv = ["solidify", *map(str, words)]
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_an_artifact_comes_down_as_it_was(server: hub.Hub, artifact: Path, tmp_path: Path) -> None:
    found = solidify.push(artifact, "owner/solid")
    repository = server.repositories["owner/solid"]
    assert repository.private and found.url.startswith(server.url) and len(repository.commits) == 1
    record = manifest.read(artifact)
    assert set(repository.files) - {".gitattributes"} == {manifest.NAME, *record.listed()} == set(found.files)
    assert all((artifact / name).read_bytes() == repository.files[name] for name in record.listed())
    down = Path(snapshot_download("owner/solid", local_dir=tmp_path / "down"))
    assert manifest.faults(down, manifest.read(down)) == []
    tokens = pico.tokens()
    assert torch.equal(solidify.load(down)(tokens).logits, solidify.load(artifact)(tokens).logits)


def test_a_dry_run_shows_every_file_and_sends_nothing(
    server: hub.Hub, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / ".git").mkdir()
    assert command("push", copied, "owner/solid", "--dry-run") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in manifest.read(copied).listed())
    assert "stays here: .git (left by tools)" in out and "Nothing was sent; it would be private" in out
    assert server.requests == []
    assert command("push", copied, "owner/solid", "--dry-run", "--public", "--json") == 0
    assert json.loads(capsys.readouterr().out)["private"] is False


def test_an_adapter_names_its_base_by_its_id(server: hub.Hub, artifact: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="--base OWNER/NAME"):
        solidify.push(adapter, "owner/adapter")
    found = solidify.push(adapter, "owner/adapter", base="owner/solid")
    files = server.repositories["owner/adapter"].files
    assert found.paths == []
    assert not [name for name, content in files.items() if str(artifact.parent).encode() in content]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/solid"
    down = Path(snapshot_download("owner/adapter", local_dir=tmp_path / "down"))
    ours, theirs = (solidify.load(artifact, adapter=each) for each in (adapter, down))
    assert torch.equal(ours(pico.tokens()).logits, theirs(pico.tokens()).logits)
    card = yaml.safe_load((down / "README.md").read_text().split("---")[1])
    assert card == {
        "library_name": "peft", "base_model": "owner/solid", "pipeline_tag": "text-generation",
        "tags": ["solidify", "lora"], "datasets": ["owner/chats"], "metrics": ["perplexity"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["artifact", "stock", "merged stock"])
def test_a_manifest_tells_nobody_where_it_was_made(
    server: hub.Hub, artifact: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is here keeps where base and data stand: a run that goes on compares the recipe, word by word."""
    base, made = artifact.parent / "base", tmp_path / "made"
    recipe: dict[str, Any] = {
        "base": {"model": str(base)},
        "data": {"train": [{"path": str(tmp_path / "data" / "rows.jsonl")}, "../more.jsonl", "~/rest.jsonl"]},
        "objective": [{"loss": f"{tmp_path}/terms.py:term", "arguments": {"prefix": "/no_think"}}],
    }
    if kind == "artifact":
        model = AutoModelForCausalLM.from_pretrained(base)
        pico.artifact(model, solidify.replace(model, "**.mlp", pico.wrappers.Scaled), made, recipe=recipe)
        wrong = Finding("start identical", False, f"{base} differs by 1/2").document()
        replace(manifest.read(made), failed=[wrong]).write(made)
    else:
        stock.build(loading.load_base(str(base)), tmp_path / "plain", recipe=recipe)
        made = tmp_path / "plain"
    if kind == "merged stock":
        peft_model = solidify.attach(solidify.load(made), lora={"r": 2, "target_modules": ["**.q_proj"]})
        torch.nn.init.ones_(next(p for n, p in peft_model.named_parameters() if "lora_B" in n))
        solidify.save_adapter(peft_model, tmp_path / "adapter", recipe=recipe)
        made = solidify.merge(tmp_path / "adapter", tmp_path / "made").directory
    before = (made / manifest.NAME).read_bytes()
    assert str(base).encode() in before
    found = solidify.push(made, "owner/solid")
    files = server.repositories["owner/solid"].files
    assert found.paths == []
    for place in (artifact.parent, tmp_path):
        assert not [name for name, content in files.items() if str(place).encode() in content]
    assert (made / manifest.NAME).read_bytes() == before
    down = manifest.read(Path(snapshot_download("owner/solid", local_dir=tmp_path / "down")))
    assert manifest.faults(tmp_path / "down", down) == [] and down.digest() == manifest.read(made).digest()
    assert down.base["model"] == "base" and down.lineage[0]["model"] == "base"
    assert [each["evidence"] for each in down.failed] == ["base differs by 1/2"][: len(down.failed)]
    assert bool(down.failed) == (kind == "artifact")
    assert down.recipe is not None
    assert down.recipe["data"]["train"] == [{"path": "rows.jsonl"}, "more.jsonl", "rest.jsonl"]
    assert down.recipe["objective"] == [{"loss": "terms.py:term", "arguments": {"prefix": "/no_think"}}]


def test_what_is_signed_is_not_written_anew(server: hub.Hub, copied: Path) -> None:
    (copied / manifest.SIGNATURE).write_text("{}")
    with pytest.raises(
        ArtifactError, match=r"signed, and its manifest names a path of this machine \(base\.model is /"
    ):
        solidify.push(copied, "owner/solid", dry_run=True)


def test_cards_name_no_path_of_this_machine(
    artifact: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    solidify.merge(adapter, tmp_path / "merged")
    for directory in (artifact, adapter, tmp_path / "merged"):
        card = (directory / "README.md").read_text()
        assert str(artifact.parent) not in card and str(tmp_path) not in card, card
        values = yaml.safe_load(card.split("---")[1])
        assert values["pipeline_tag"] == "text-generation" and "base_model" not in values
    assert values["datasets"] == ["owner/chats"] and "heldout loss trained | 2 (perplexity 7.389)" in card


def test_what_is_not_as_it_was_written_is_not_sent(server: hub.Hub, copied: Path, tmp_path: Path) -> None:
    (copied / "README.md").write_text("# Mine\n")
    with pytest.raises(ArtifactError, match="solidify adopt"):
        solidify.push(copied, "owner/solid")
    solidify.adopt(copied, ["README.md"])
    solidify.push(copied, "owner/solid")
    assert server.repositories["owner/solid"].files["README.md"] == b"# Mine\n"
    (copied / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"notes\.txt is a file that the manifest does not list"):
        solidify.push(copied, "owner/other")
    (tmp_path / "run").mkdir()
    shutil.move(copied, tmp_path / "run" / "artifact")
    with pytest.raises(ArtifactError, match="is the output of a run"):
        solidify.push(tmp_path / "run", "owner/other")
    assert set(server.repositories) == {"owner/solid"}


def test_a_second_push_leaves_nothing_of_the_first(server: hub.Hub, copied: Path) -> None:
    (copied / "notes.txt").write_text("x")
    solidify.adopt(copied, ["notes.txt"])
    solidify.push(copied, "owner/solid")
    (copied / "notes.txt").unlink()
    shutil.rmtree(copied)
    fresh = pico.artifact(model := pico.llama(), solidify.replace(model, "**.mlp", pico.wrappers.Scaled), copied)
    found = solidify.push(fresh, "owner/solid")
    assert found.removed == ["notes.txt"]
    assert "notes.txt" not in server.repositories["owner/solid"].files


def test_a_repository_of_others_is_left_alone(server: hub.Hub, artifact: Path) -> None:
    server.repositories["owner/theirs"] = hub.Repository(True, {"thesis.tex": b"x"})
    with pytest.raises(ArtifactError, match=r"holds files that are not of an earlier push.*thesis\.tex"):
        solidify.push(artifact, "owner/theirs")
    server.repositories["owner/open"] = hub.Repository(False)
    with pytest.raises(ArtifactError, match="is public; say so"):
        solidify.push(artifact, "owner/open")
    solidify.push(artifact, "owner/open", private=False)
    assert set(server.repositories["owner/theirs"].files) == {"thesis.tex"}


@pytest.mark.parametrize(
    ("repo", "words"),
    [("solid", "write OWNER/NAME"), ("owner/a b", "is no name of a repository"), ("a/b/c", "is no name of a reposit")],
)
def test_an_odd_name_is_refused(server: hub.Hub, artifact: Path, repo: str, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        solidify.push(artifact, repo)
    assert server.requests == []


def test_who_may_not_write_is_told(
    server: hub.Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert command("push", artifact, "owner/solid") == 2
    err = capsys.readouterr().err
    assert "owner/solid cannot be written to" in err and "hf auth login" in err and "Traceback" not in err
    assert server.repositories == {}
