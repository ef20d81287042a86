"""A large model is built without being run or read as a whole; here tiny ones are taken for large."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import solidify
from solidify.artifact import certificate, conversion, fresh, loading
from solidify.directory import manifest
from solidify.errors import ArtifactError, SolidifyError
from solidify.findings import Finding
from solidify.model import anatomy
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.recipe import stages
from solidify.recipe.schema import load as load_recipe
from solidify.surgery import contract
from solidify.system.alone import Alone
from solidify.weights import checkpoint, digest_cache, format, mapped, spilling, store

WRAP = {
    "replace": "model.layers.*.mlp",
    "expect": "OlmoeSparseMoeBlock",
    "with": f"{pico.HERE}/user_modules/wrappers.py:Scaled",
}
TRASH = {
    "replace": "model.layers.*.mlp",
    "expect": "OlmoeSparseMoeBlock",
    "with": "solidify.modules.trashcan_moe:TrashCanMoE",
}
LOW_RANK = {
    "replace": "model.layers.*.self_attn.q_proj",
    "expect": "Linear",
    "with": f"{pico.HERE}/user_modules/adopting.py:LowRank",
}
INSERT = {
    "insert": "model.layers.1",
    "expect": "OlmoeDecoderLayer",
    "zero": ["self_attn.o_proj", "mlp.experts.down_proj"],
}
STEPS = {"additive": TRASH, "renaming": WRAP, "dropping": LOW_RANK, "deeper": INSERT}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every model a large one, and every new tensor worth a file."""
    monkeypatch.setattr(anatomy, "LARGE", 0)
    monkeypatch.setattr(spilling, "_SMALL", 0)


@pytest.fixture
def unwitnessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the fresh process out, where it is not the point."""
    pico.unwitnessed(monkeypatch)


@pytest.fixture(params=["hub", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base in two files, with a tensor for each expert or as it stands in memory."""
    return make_base(tmp_path / "base", request.param)


def make_base(directory: Path, layout: str) -> Path:
    """Saves a tiny OLMoE in one of two layouts, in several files."""
    model = pico.olmoe()
    model.save_pretrained(directory, max_shard_size="60KB")
    if layout == "memory":
        for file in [*directory.glob("*.safetensors"), directory / checkpoint.INDEX]:
            file.unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "SHARD_SIZE", 60_000)
            store.store(model.state_dict(), directory)
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def recipe(base: Path, step: dict[str, Any], **more: Any) -> Any:
    path = base.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": {"model": str(base), **more}, "surgery": [step]}))
    return load_recipe(path)


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.iterdir() if p.is_file()}


_BOTH = [("hub", "additive"), ("hub", "deeper"), ("memory", "renaming"), ("memory", "dropping")]
_OTHERS = [(layout, kind) for layout in ("hub", "memory") for kind in STEPS if (layout, kind) not in _BOTH]


@pytest.mark.parametrize(
    ("layout", "kind"), [*_BOTH, *(pytest.param(*case, marks=pytest.mark.slow) for case in _OTHERS)]
)
def test_it_is_the_artifact_that_is_built_in_memory(
    layout: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", layout)
    before = content(base)
    asked = recipe(base, STEPS[kind])
    with pytest.MonkeyPatch.context() as patch:
        pico.unwitnessed(patch)
        stages.build(asked, tmp_path / "small")
    monkeypatch.setattr(anatomy, "LARGE", 0)
    monkeypatch.setattr(spilling, "_SMALL", 0)
    report = stages.build(asked, tmp_path / "large")
    assert report.passed, report.failed
    small, big = (manifest.read(tmp_path / name / "artifact") for name in ("small", "large"))
    assert small.tensors == big.tensors
    assert small.code == big.code
    # How a large model behaves is measured at its modules, and not at its outputs.
    told = [{**edit, "probed": True, "control": {}} for edit in big.edits]
    assert [{**edit, "control": {}} for edit in small.edits] == told
    assert content(base) == before
    assert sorted(p.name for p in (tmp_path / "large").iterdir()) == ["artifact"]
    monkeypatch.undo()
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "artifact", trust_remote_code=True).eval()
        for name in ("small", "large")
    )
    tokens = pico.tokens()
    with torch.no_grad():
        # The files may begin their tensors at other places, and kernels then round otherwise.
        torch.testing.assert_close(one(tokens).logits, other(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "large"])
def test_files_that_stay_as_they_are_are_linked(
    tmp_path: Path, size: str, unwitnessed: None, request: pytest.FixtureRequest
) -> None:
    base = make_base(tmp_path / "base", "memory")
    if size == "large":
        request.getfixturevalue("large")
    stages.build(recipe(base, TRASH), tmp_path / "linked")
    stages.build(recipe(base, TRASH), tmp_path / "copied", link=False)
    originals = {path.stat().st_ino for path in base.glob("*.safetensors")}
    linked = {path.stat().st_ino for path in (tmp_path / "linked" / "artifact").glob("*.safetensors")}
    copied = {path.stat().st_ino for path in (tmp_path / "copied" / "artifact").glob("*.safetensors")}
    assert originals < linked and not originals & copied
    records = [manifest.read(tmp_path / name / "artifact") for name in ("linked", "copied")]
    assert records[0].tensors == records[1].tensors
    # An attention that is replaced leaves its old tensors behind: the files that hold them are never linked.
    stages.build(recipe(base, LOW_RANK), tmp_path / "dropped")
    target = tmp_path / "dropped" / "artifact"
    superseded = {name for name in checkpoint.read(base).entries if ".q_proj." in name}
    for path in target.glob("*.safetensors"):
        assert not superseded & set(format.read_header(path))
    clean = [p for p in base.glob("*.safetensors") if not superseded & set(format.read_header(p))]
    assert {p.stat().st_ino for p in clean} <= {p.stat().st_ino for p in target.glob("*.safetensors")}


def test_no_whole_pass_is_made(
    base: Path, large: None, unwitnessed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last norm is behind all layers: nothing ever reaches it."""
    ended: list[str] = []
    run = anatomy.run

    def noted(model: PreTrainedModel, inputs: Any) -> Any:
        handle = model.get_submodule("model.norm").register_forward_hook(lambda *_: ended.append("end"))
        try:
            return run(model, inputs)
        finally:
            handle.remove()

    monkeypatch.setattr(anatomy, "run", noted)
    stages.build(recipe(base, TRASH), tmp_path / "large")
    assert not ended
    monkeypatch.setattr(anatomy, "LARGE", 2**29)
    stages.build(recipe(base, TRASH), tmp_path / "small")
    assert ended


def test_python_has_the_memory_of_a_recipe(base: Path, large: None, unwitnessed: None, tmp_path: Path) -> None:
    """Base and new tensors are parts of files, by both ways: nothing that is large is the process's own."""
    surgery = solidify.Surgery(base)
    surgery.replace("model.layers.*.mlp", TrashCanMoE, expect="OlmoeSparseMoeBlock")
    state = surgery.model.state_dict(keep_vars=True)
    assert {name for name in state if state[name].numel()} <= set(mapped.file_regions(state))
    artifact = surgery.build(tmp_path / "python")
    stages.build(recipe(base, TRASH), tmp_path / "recipe")
    by_recipe = manifest.read(tmp_path / "recipe" / "artifact")
    assert artifact.manifest.tensors == by_recipe.tensors
    assert artifact.manifest.base["model"] == str(base)
    kept = [path for path in mapped.file_regions(state).values()]
    del surgery, state
    gc.collect()
    assert not any(Path(region[0]).exists() for region in kept if base not in Path(region[0]).parents)


@pytest.mark.slow
def test_its_certificate_says_what_was_compared(large: None, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "hub")
    report = stages.build(recipe(base, TRASH), tmp_path)
    said = {finding.name: finding.evidence for finding in report.findings}
    assert "samples of every tensor" in said["state identical (AutoModelForCausalLM)"]
    assert "1 modules, the first of each kind, bit-identical" in said["outputs identical (AutoModelForCausalLM)"]
    state = json.loads((tmp_path / "artifact" / certificate.NAME / "state.json").read_text())
    assert [call["name"] for call in state["modules"]] == ["model.layers.0.mlp"]
    assert set(state["samples"]) == set(state["state"])


def spoil_middle(directory: Path) -> None:
    """Changes one value of a tensor, where a sample looks."""
    for path in checkpoint.weight_files(directory):
        header = format.read_header(path)
        if (entry := header.get("model.layers.1.self_attn.o_proj.weight")) is not None:
            with path.open("r+b") as file:
                file.seek(entry.start)
                byte = file.read(1)
                file.seek(entry.start)
                file.write(bytes([byte[0] ^ 1]))


def spoil_output(directory: Path) -> None:
    path = directory / certificate.NAME / "outputs.safetensors"
    outputs = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(outputs, path)


def spoil_code(directory: Path) -> None:
    """Has the new module fail when it is called."""
    path = directory / "trashcan_moe.py"
    path.write_text(path.read_text().replace("    def forward(self, ", "    def forward(self, needed_now, ", 1))


def drop(directory: Path) -> None:
    path = checkpoint.weight_files(directory)[-1]
    state = load_file(path)
    state.pop(next(iter(state)))
    save_file(state, path, metadata={"format": "pt"})


FAULTS: dict[Callable[[Path], None], str] = {
    spoil_middle: "state different",
    spoil_output: "differ, by",
    spoil_code: "model.layers.0.mlp differ",
    drop: "missing_keys",
}


@pytest.mark.slow
def test_its_witness_sees_faults(large: None, unwitnessed: None, tmp_path: Path) -> None:
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.mlp", pico_trash())
    artifact = solidify.build(model, edits, tmp_path / "artifact")
    places = {}
    for fault, words in FAULTS.items():
        places[words] = tmp_path / fault.__name__
        shutil.copytree(artifact.directory, places[words])
        fault(places[words])
    with Alone(fresh.WITNESS, fresh.FORBIDDEN) as process:
        answers = certificate.witness_all([artifact.directory, *places.values()], process)
    # Of a large model samples are compared, which prove nothing of the whole.
    assert {finding.verdict for finding in answers[artifact.directory]} == {"proved", "measured"}
    for words, place in places.items():
        failed = [f"{f.name}: {f.evidence}" for f in answers[place] if f.passed is False]
        assert any(words in line for line in failed), (place.name, failed)


def pico_trash() -> Any:
    from solidify.modules.trashcan_moe import TrashCanMoE

    return TrashCanMoE


def test_what_adopt_writes_into_the_original_is_not_lost(
    base: Path, large: None, unwitnessed: None, tmp_path: Path
) -> None:
    """It changes memory that is mapped from the base; the base stays, and the check says that its tensors changed."""
    before = content(base)
    step = {**WRAP, "with": f"{pico.HERE}/user_modules/adopting.py:Scribbling", "declares": {"gradient": False}}
    report = stages.build(recipe(base, step), tmp_path / "out")
    assert content(base) == before
    (finding,) = [f for f in report.findings if f.name == "unchanged tensors identical"]
    assert finding.passed is False and "gate_up_proj changed" in finding.evidence.replace("original.", "")
    record = manifest.read(tmp_path / "out" / "artifact")
    entries = checkpoint.read(tmp_path / "out" / "artifact").entries
    (name,) = [n for n in entries if n.endswith("0.mlp.original.experts.gate_up_proj")]
    assert float(entries[name].read().abs().max()) == 0.0
    assert digest_cache.digests(checkpoint.weight_files(tmp_path / "out" / "artifact"), fresh=True) == record.tensors


def test_an_incomplete_base_is_refused_before_anything_is_written(
    base: Path, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoint.weight_files(base)[-1]
    state = load_file(file)
    gone = state.pop(next(iter(state)))
    assert gone.numel()
    save_file(state, file, metadata={"format": "pt"})
    index = base / checkpoint.INDEX
    document = json.loads(index.read_text())
    document["weight_map"] = {n: f for n, f in document["weight_map"].items() if f != file.name or n in state}
    index.write_text(json.dumps(document))
    with pytest.raises(SolidifyError, match="incomplete"):
        stages.build(recipe(base, TRASH), tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_there_must_be_room(base: Path, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = type(shutil.disk_usage(tmp_path))(10**9, 10**9, 10**3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(ArtifactError, match=r"1 kB of free space, and .*B are needed; make room"):
        stages.build(recipe(base, WRAP), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_a_hub_id_is_found_in_the_cache(
    base: Path, large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's own library lays it out: a snapshot of links into a store."""
    hub = tmp_path / "hub" / "models--someone--olmoe"
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    for number, path in enumerate(sorted(base.iterdir())):
        blob = hub / "blobs" / f"{number:064x}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    blobs = {path.stat().st_ino for path in (hub / "blobs").iterdir()}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    files = conversion._find_checkpoint("someone/olmoe", {"revision": "main"})
    assert files is not None and len(files.entries) == len(checkpoint.read(base).entries)
    assert {path.stat().st_ino for path in files.files} <= blobs
    assert loading._find_commit("someone/olmoe", None) == "a" * 40
    assert loading._find_commit(str(base), None) is None


def test_only_the_first_of_each_kind_is_called(large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.olmoe(layers=4)
    probed: list[str] = []
    compare = contract.compare

    def noted(name: str, *rest: Any, **more: Any) -> Any:
        probed.append(name)
        return compare(name, *rest, **more)

    monkeypatch.setattr(contract, "compare", noted)
    edits = solidify.replace(model, "model.layers.*.mlp", pico_trash())
    assert set(probed) == {"model.layers.0.mlp"}
    assert [edit.probed for edit in edits] == [True, False, False, False]
    assert all(edit.bypass for edit in edits)


@pytest.mark.slow
def test_findings_of_small_models_are_those_of_the_whole(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "hub")
    report = stages.build(recipe(base, TRASH), tmp_path)
    (outputs,) = [f for f in report.findings if f.name == "outputs identical (AutoModelForCausalLM)"]
    assert outputs == Finding(outputs.name, True, "3 cases bit-identical")
