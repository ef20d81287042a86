"""What may be written where: nothing of the user's is ever replaced, deleted or written into."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from blake3 import blake3
from peft import LoraConfig, get_peft_model

import solidify
from solidify.directory import ours, writing
from solidify.errors import ArtifactError, SolidifyError
from solidify.findings import Finding, Report
from solidify.merging import export
from solidify.recipe import schema, stages
from solidify.system import disk
from solidify.training import checkpoints
from training import awake


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): blake3(path.read_bytes()).hexdigest() for path in files}


def small(directory: Path, seed: int = 0) -> Path:
    """Writes an artifact of a pico model."""
    model = pico.llama(seed=seed)
    edits = solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled, expect="LlamaMLP")
    return pico.artifact(model, edits, directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, as far as an output is concerned: an artifact, an adapter of it, and a report."""
    root = tmp_path_factory.mktemp("made") / "run"
    model = awake(small(root / "artifact"), lora={"r": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]})
    solidify.save_adapter(model, root / "adapter")
    report = Report(str(root))
    report.add("build", [Finding("a promise", True, "it holds")])
    report.write(root / "report.json", finished=True)
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_a_merge_never_replaces_what_holds_its_input(run: Path) -> None:
    before = contents(run)
    for output in (run, run / "adapter", run / "artifact", run / "artifact" / "merged", run.parent):
        with pytest.raises(ArtifactError, match="the output"):
            export.merge(run / "adapter", output, base=run / "artifact")
    assert contents(run) == before


def test_a_directory_that_only_holds_a_report_is_not_ours(tmp_path: Path) -> None:
    for name in ("report.json", "solidify.json"):
        for text in ("{}", json.dumps({"subject": "x", "stages": {}}), "no json"):
            out = tmp_path / f"{name}-{len(text)}"
            out.mkdir()
            (out / name).write_text(text)
            (out / "thesis.tex").write_text("years of work")
            for refuse in (writing.refuse_foreign, writing.refuse_foreign_run):
                with pytest.raises(ArtifactError, match="remove it first"):
                    refuse(out)
            with pytest.raises(ArtifactError), writing.staged(out) as staging:
                (staging / "x").write_text("x")
            assert (out / "thesis.tex").read_text() == "years of work"


def test_a_build_never_replaces_its_base(tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    before = contents(base)
    model = solidify.load(base)
    edits = solidify.replace(model, "model.layers.0.self_attn", pico.wrappers.Scaled)
    for output in (base, base / "new", tmp_path):
        with pytest.raises(ArtifactError, match="the output"):
            pico.artifact(model, edits, output)
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(ArtifactError, match="is an input of the command"):
        pico.artifact(model, edits, tmp_path / "link")
    assert contents(base) == before


def _note(directory: Path) -> None:
    (directory / "notes.md").write_text("mine")


def _note_below(directory: Path) -> None:
    (directory / "mine").mkdir()
    (directory / "mine" / "notes.md").write_text("mine")


def _card(directory: Path) -> None:
    (directory / "README.md").write_text("my own card")


def _weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    found, times = bytearray(path.read_bytes()), path.stat()
    found[-1] ^= 1
    path.unlink()
    path.write_bytes(found)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _link(directory: Path) -> None:
    (directory / "config.json").rename(directory.parent / "config.json")
    (directory / "config.json").symlink_to(directory.parent / "config.json")


def _repository(directory: Path) -> None:
    (directory / ".git").mkdir()


FOREIGN = [_note, _note_below, _card, _weights, _link, _repository]


@pytest.mark.parametrize("change", FOREIGN)
def test_an_artifact_is_replaced_only_while_it_is_wholly_ours(
    run: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The honest twin: an earlier result that nobody touched is replaced, which is said."""
    out = run / "artifact"
    with writing.staged(out) as staging:
        shutil.copytree(out, staging, dirs_exist_ok=True)
    assert "holds an earlier artifact" in capsys.readouterr().err.replace("\n", " ")
    change(out)
    before = contents(out)
    with pytest.raises(ArtifactError, match="the output"), writing.staged(out) as staging:
        (staging / "x").write_text("x")
    assert contents(out) == before
    with pytest.raises(ArtifactError, match="the output"):
        writing.refuse_foreign_run(run)


def test_what_is_put_there_meanwhile_is_kept(run: Path) -> None:
    out = run / "artifact"
    with pytest.raises(ArtifactError, match="notes"), writing.staged(out) as staging:
        (staging / "x").write_text("x")
        _note(out)
    assert (out / "notes.md").read_text() == "mine"
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["notes.md", "data/train.jsonl", "checkpoints/notes.md", "checkpoints/checkpoint-3/x"])
def test_a_run_goes_only_where_a_run_has_been(run: Path, name: str) -> None:
    writing.refuse_foreign_run(run)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("mine")
    with pytest.raises(ArtifactError, match="what solidify did not write"):
        writing.refuse_foreign_run(run)


def test_a_changed_report_is_the_users(run: Path) -> None:
    path = run / "report.json"
    path.write_text(path.read_text().replace("it holds", "it holds, I think"))
    with pytest.raises(ArtifactError, match="not the report that a run wrote"):
        writing.refuse_foreign_run(run)


def test_a_single_result_does_not_replace_a_whole_run(run: Path) -> None:
    with pytest.raises(ArtifactError, match="whole run"):
        writing.refuse_foreign(run)
    with pytest.raises(ArtifactError, match="a single model"):
        writing.refuse_foreign_run(run / "artifact")


def test_inputs_are_known_by_what_they_are(run: Path, tmp_path: Path) -> None:
    """By device and inode, through links, and by where the links in an input lead."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    shutil.copytree(run / "artifact", out)
    writing.refuse_foreign(out, [base])
    writing.refuse_foreign(tmp_path / "new", [base, tmp_path / "nothing", "no/such-model"])
    (base / "model.safetensors").symlink_to(out / "model.safetensors")
    with pytest.raises(ArtifactError, match="holds an input"):
        writing.refuse_foreign(out, [base])
    for path in (out / "config.json", out):
        with pytest.raises(ArtifactError, match="input of the command"):
            writing.refuse_foreign(out, [path])


def test_home_root_and_repositories_are_no_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, repository = tmp_path / "people" / "me", tmp_path / "work"
    home.mkdir(parents=True)
    (repository / ".git").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for place, word in (
        (home, "home"),
        (home.parent, "home"),
        (tmp_path / "people" / "me" / "x" / "..", "home"),
        (Path("/"), "root of the file system"),
        (repository, "repository"),
    ):
        for refuse in (writing.refuse_foreign, writing.refuse_foreign_run):
            with pytest.raises(ArtifactError, match=word):
                refuse(place)
    writing.refuse_foreign(repository / "build" / "x")
    writing.refuse_foreign(home / "x")


NAMES = ["../payload", "/etc/passwd", "a/../../b", "..", ".", "", "a\\b", "c:x", "~/x", "a//b", "./a", "a\nb", None, 3]


@pytest.mark.parametrize("name", NAMES)
def test_names_from_files_lead_nowhere_else(name: object) -> None:
    assert disk.name_fault(name)


def test_honest_names_pass() -> None:
    for name in ("config.json", "certificate/state.json", "1_Pooling/config.json", ".hidden", "a..b", "ünder.py"):
        assert disk.name_fault(name) is None


@pytest.mark.parametrize("kind", ["code", "files", "headers"])
@pytest.mark.parametrize("name", ["../payload", "link"])
def test_a_manifest_that_names_what_is_elsewhere_writes_nothing(run: Path, kind: str, name: str) -> None:
    """A base that lists `../payload` would have a merge write outside of its output."""
    from dataclasses import replace

    from solidify.directory import manifest

    (run / "payload").write_text("payload")
    record = manifest.read(run / "artifact")
    (run / "artifact" / "link").symlink_to(run / "payload")
    digest = blake3(b"payload").hexdigest()
    forged = manifest.asdict(replace(record, **{kind: {**getattr(record, kind), name: digest}}))
    text = manifest._format_text(forged, manifest.digest_values(forged))  # `write` refuses such names
    (run / "artifact" / manifest.NAME).write_text(text)
    before = contents(run)
    with pytest.raises(ArtifactError, match=r"not the name of a file inside|link is (a link|listed among)"):
        export.merge(run / "adapter", run / "out" / "merged", base=run / "artifact")
    assert contents(run) == before


def plain(directory: Path) -> tuple[Path, Path]:
    """A stock model in several files, and an adapter of plain PEFT for it."""
    model = pico.llama()
    model.save_pretrained(directory / "base", max_shard_size="20KB")
    model = get_peft_model(pico.llama(), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(0.1)
    model.save_pretrained(directory / "adapter")
    return directory / "base", directory / "adapter"


@pytest.mark.parametrize("name", ["../elsewhere/model.safetensors", "/tmp/model.safetensors", "sub/model.safetensors"])
def test_an_index_that_names_what_is_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    base, adapter = plain(tmp_path)
    index = base / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    file = sorted(set(document["weight_map"].values()))[0]
    (tmp_path / "elsewhere").mkdir()
    (base / "sub").mkdir()
    for place in ("elsewhere", "base/sub"):
        shutil.copy(base / file, tmp_path / place / "model.safetensors")
    document["weight_map"] = {key: name if value == file else value for key, value in document["weight_map"].items()}
    index.write_text(json.dumps(document))
    with pytest.raises(SolidifyError, match="name"):
        export.merge(adapter, tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


def test_weights_that_are_a_link_out_of_a_base_do_not_get_into_a_result(tmp_path: Path) -> None:
    """In one sentence; the honest twin is a link inside of it."""
    base, adapter = plain(tmp_path)
    file = sorted(base.glob("*.safetensors"))[0]
    file.rename(tmp_path / "secret.safetensors")
    file.symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(ArtifactError, match="a link that leads out of"):
        export.merge(adapter, tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()
    file.unlink()
    (tmp_path / "secret.safetensors").rename(base / "real.safetensors")
    file.symlink_to("real.safetensors")
    assert (export.merge(adapter, tmp_path / "merged", base=base).directory / file.name).is_file()


def test_the_name_of_a_data_file_is_no_pattern(tmp_path: Path) -> None:
    from solidify.training import data

    names = ["run[1].jsonl", "run1.jsonl", "a*.jsonl", "ab.jsonl", "q?.jsonl", "b{x,y}.jsonl", "[!a].jsonl"]
    for name in names:
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    for name in names:
        assert data.read(tmp_path / name, "text")["text"][:] == [name]


RECIPE = """
base: {{model: {base}}}
surgery:
  - {{replace: model.layers.0.self_attn.o_proj, expect: Linear, with: wrappers.py:Bottleneck, arguments: {{width: 4}}}}
"""


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Builds on a base by a recipe; no fresh process looks at it."""
    pico.unwitnessed(monkeypatch)
    (tmp_path / "recipes").mkdir()
    shutil.copy(pico.HERE / "user_modules" / "wrappers.py", tmp_path / "recipes")

    def work(base: str | Path, output: Path) -> Report:
        path = tmp_path / "recipes" / "recipe.yaml"
        path.write_text(RECIPE.format(base=base))
        return stages.build(schema.load(path), output)

    return work


def test_a_base_may_be_named_by_the_way_to_it(build: Callable[..., Report], tmp_path: Path) -> None:
    pico.llama().save_pretrained(tmp_path / "bases" / "x", max_shard_size="20KB")
    assert build("../bases/x", tmp_path / "out").passed


def test_a_base_of_pickled_weights_is_a_base(build: Callable[..., Report], tmp_path: Path) -> None:
    model, base = pico.llama(), tmp_path / "base"
    model.save_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    assert build(base, tmp_path / "out").passed


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_not_lost_without_a_word(build: Callable[..., Report], tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    pico.llama().save_pretrained(base)
    (base / name).write_text("{broken")
    with pytest.raises(ArtifactError, match=r"tokenizer of .* cannot be read"):
        build(base, tmp_path / "out")
    assert not (tmp_path / "out" / "artifact").exists()


def test_a_build_over_its_own_base_is_refused(build: Callable[..., Report], tmp_path: Path) -> None:
    base = small(tmp_path / "run" / "artifact")
    before = contents(base)
    with pytest.raises(ArtifactError, match="is an input of the command"):
        build(base, tmp_path / "run")
    assert contents(base) == before


def checkpoint(directory: Path, *, sealed: bool) -> Path:
    """What a trainer leaves: with a list of its files, or killed before it."""
    checkpoints.write(directory, {"fingerprint": "x", "numbers": torch.zeros(2)})
    (directory / "adapter_config.json").write_text("{}")
    if sealed:
        checkpoints.seal(directory)
    return directory


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a file by our name": lambda d: (d / "objective.pt").write_bytes(b"somebody's"),
    "an archive by our name": lambda d: torch.save({"weights": torch.zeros(2)}, d / "objective.pt"),
    "our name and a file of another program": lambda d: [
        (d / name).write_bytes(b"x") for name in ("objective.pt", "other.bin")
    ],
    "a draft by our name, and another file": lambda d: [
        (d / name).write_bytes(b"x") for name in (".objective.pt", "other.bin")
    ],
}
EDITED: dict[str, Callable[[Path], object]] = {
    "another file": lambda d: (d / "notes.txt").write_text("mine"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_of_another_program_is_not_ours(tmp_path: Path, kind: str) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    FOREIGN[kind](tmp_path / "checkpoint-1")
    with pytest.raises(ArtifactError):
        writing.refuse_foreign_checkpoints(tmp_path, tmp_path.with_name("run"))


@pytest.mark.parametrize("kind", EDITED)
def test_a_checkpoint_with_a_file_of_somebodys_is_not_replaced(tmp_path: Path, kind: str) -> None:
    EDITED[kind](checkpoint(tmp_path / "checkpoint-1", sealed=True))
    with pytest.raises(ArtifactError, match="checkpoint-1 holds"):
        writing.refuse_foreign_checkpoints(tmp_path, tmp_path.with_name("run"))


def test_checkpoints_of_ours_are_ours(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint-1", sealed=True)
    checkpoint(tmp_path / "checkpoint-2", sealed=False)
    (tmp_path / "checkpoint-3").mkdir()
    (checkpoint(tmp_path / "checkpoint-4", sealed=False) / "objective.pt").rename(
        tmp_path / "checkpoint-4" / ".objective.pt"
    )
    (tmp_path / "checkpoint-4" / "adapter_config.json").unlink()
    writing.refuse_foreign_checkpoints(tmp_path, tmp_path.with_name("run"))
    shutil.copytree(tmp_path, tmp_path.with_name("copied"))
    writing.refuse_foreign_checkpoints(tmp_path.with_name("copied"), tmp_path.with_name("run"))
    assert ours.checkpoint_faults(tmp_path / "checkpoint-1", whole=True) == []
    (tmp_path / "checkpoint-1" / "adapter_config.json").unlink()
    assert ours.checkpoint_faults(tmp_path / "checkpoint-1", whole=True)
