"""The tree of a model, and what differs between two directories."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file

import solidify
from solidify.artifact import inspection
from solidify.artifact.inspection import Branch
from solidify.errors import ArtifactError
from solidify.model import anatomy
from solidify.model.cost import cost


def grown(model: Any) -> dict[tuple[str, str], Branch]:
    return {(branch.name, branch.where): branch for branch in inspection.tree(model)}


def test_equal_layers_are_one_branch_and_others_stand_apart() -> None:
    model = pico.llama(num_hidden_layers=5)
    solidify.replace(model, "model.layers.2.mlp", pico.wrappers.Scaled)
    branches = grown(model)
    assert branches["model.layers.*", "0-1, 3-4"].times == 4
    assert branches["model.layers.*.mlp", "0-1, 3-4"].kind == "LlamaMLP"
    assert branches["model.layers.2.mlp", ""].kind == "Scaled"
    scale = branches["model.layers.2.mlp.scale", ""]
    assert (scale.kind, scale.shape, scale.target) == ("parameter", (1,), False)
    assert branches["model.layers.2.mlp", ""].depth == scale.depth - 1 == 4


@pytest.mark.parametrize("model", [pico.llama(), pico.olmoe(3)], ids=["llama", "olmoe"])
def test_sizes_add_up(model: Any) -> None:
    branches, total = inspection.tree(model), cost(model)
    for outer in [None, *branches]:
        at = branches.index(outer) + 1 if outer else 0
        inside = []
        for branch in branches[at:]:
            if branch.depth <= (outer.depth if outer else 0):
                break
            if branch.depth == (outer.depth if outer else 0) + 1:
                inside.append(branch)
        if inside:
            whole = (outer.parameters, outer.bytes) if outer else (total.parameters, total.bytes)
            assert (sum(b.parameters for b in inside), sum(b.bytes for b in inside)) == whole
    assert sum(b.flops for b in branches if b.depth == 1) == total.flops_per_token


def test_a_folded_name_is_the_pattern_that_hits_all_of_its_places() -> None:
    model = pico.olmoe(3)
    names = [name for name, _ in model.named_modules()]
    for branch in inspection.tree(model):
        if branch.kind != "parameter":
            assert len(anatomy.match(branch.name, names)[branch.name]) == branch.times


def test_what_can_be_a_target_can_be_replaced_and_nothing_else() -> None:
    model = pico.olmoe()
    for branch in inspection.tree(model):
        if branch.target and branch.name.startswith("model.layers.*."):
            assert solidify.replace(pico.olmoe(), branch.name, Anything, count=branch.times)
    assert not grown(model)["model.layers", ""].target
    assert not grown(model)["model.layers.*.mlp.experts.down_proj", ""].target
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert not grown(model)["model.layers.*.mlp", ""].target  # one module at two places


class Anything(torch.nn.Module):
    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def test_a_tied_tensor_says_whose_it_is() -> None:
    branches = grown(pico.llama(tie_word_embeddings=True))
    assert branches["lm_head", ""].tied == "model.embed_tokens.weight"
    assert branches["model.embed_tokens", ""].tied == ""


def test_the_plain_values_are_complete() -> None:
    document = grown(pico.olmoe())["model.layers.*.mlp.gate", ""].document()
    json.dumps(document)
    assert document == {
        "name": "model.layers.*.mlp.gate",
        "class": "OlmoeTopKRouter",
        "where": "",
        "depth": 5,
        "times": 2,
        "parameters": 512,
        "bytes": 2048,
        "flops": 1024,
        "dtype": "float32",
        "shape": [8, 32],
        "target": True,
        "tied": "",
    }


def test_ranges_are_written_as_people_write_them() -> None:
    assert inspection.ranges(["0", "1", "2", "5", "10", "11"]) == "0-2, 5, 10-11"
    assert inspection.ranges(["7"]) == "7"


def write(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Writes a model directory whose code must never run."""
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "x", **config}))
    (directory / "modeling_x.py").write_text("raise SystemExit('this code was run')\n")
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(
        tmp_path / "a", {"x.0.w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([math.nan])}, rope={"t": 1}
    )


def test_a_directory_does_not_differ_from_its_copy(base: Path, copy_of: Callable[[Path], Path]) -> None:
    assert inspection.diff(base, copy_of(base)) == {section: [] for section in inspection.SECTIONS}


def test_a_value_deep_in_the_configuration_is_named(base: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b", {"n": torch.tensor([math.nan])}, rope={"t": 2, "s": None})
    entries = inspection.diff(base, other)["configuration"]
    assert entries == [
        {"change": "added", "name": "rope.s", "old": None, "new": None},
        {"change": "changed", "name": "rope.t", "old": 1, "new": 2},
    ]


def test_code_is_compared_line_by_line_and_not_run(base: Path, copy_of: Callable[[Path], Path]) -> None:
    other = copy_of(base)
    (other / "modeling_x.py").write_text("raise SystemExit('this other code was run')\n")
    (other / "more.py").write_text("x = 1\n")
    changed, added = inspection.diff(base, other)["code"]
    assert changed["text"].splitlines()[3:] == [
        "-raise SystemExit('this code was run')",
        "+raise SystemExit('this other code was run')",
    ]
    assert (added["change"], added["name"], added["text"].splitlines()[-1]) == ("added", "more.py", "+x = 1")


@pytest.mark.parametrize("chunk", [1, 4, 2**22])
def test_it_is_said_how_far_tensors_lie_apart(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    moved = torch.arange(6.0).reshape(2, 3)
    moved[1, 2] += 3
    moved[0, 0] -= 4
    (entry,) = inspection.diff(base, write(tmp_path / "b", {"x.0.w": moved, "n": torch.tensor([math.nan])}))["tensors"]
    assert (entry["change"], entry["name"], entry["max_abs"]) == ("changed", "x.0.w", 4.0)
    assert entry["relative"] == pytest.approx(5 / math.sqrt(55))


def test_other_dtypes_shapes_and_values_that_are_no_numbers(base: Path, tmp_path: Path) -> None:
    wide = torch.arange(6.0).reshape(3, 2)
    other = write(tmp_path / "b", {"x.0.w": wide, "n": torch.tensor([math.nan]).bfloat16(), "y": torch.ones(2)})
    number, shape, new = inspection.diff(base, other)["tensors"]
    assert (number["old_dtype"], number["new_dtype"]) == ("float32", "bfloat16")
    assert number["max_abs"] is None
    assert (shape["old_shape"], shape["new_shape"]) == ([2, 3], [3, 2])
    assert "max_abs" not in shape
    assert new == {"change": "added", "name": "y", "new_dtype": "float32", "new_shape": [2]}
    json.dumps(inspection.diff(base, other), allow_nan=False)


def test_other_files_are_compared_too(base: Path, copy_of: Callable[[Path], Path]) -> None:
    other = copy_of(base)
    (other / "tokenizer.json").write_text("{}")
    (other / "README.md").write_text("told apart by people")
    assert inspection.diff(base, other)["files"] == [{"change": "added", "name": "tokenizer.json"}]


def test_places_of_two_artifacts(trash_artifact: Path, wrapped_artifact: Path) -> None:
    found = inspection.diff(trash_artifact, wrapped_artifact)
    assert {"change": "changed", "name": "model.layers.0.mlp", "old": "TrashCanMoE", "new": "Scaled"} in found[
        "modules"
    ]
    assert not any(entry["name"].startswith("surgery") for entry in found["configuration"])
    gone = next(entry for entry in found["tensors"] if entry["name"] == "model.layers.0.mlp.trash.bias")
    assert gone["change"] == "removed"


def test_what_cannot_be_read_is_named(base: Path, tmp_path: Path, copy_of: Callable[[Path], Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"holds neither config\.json nor adapter_config\.json"):
        inspection.diff(base, tmp_path / "empty")
    other = copy_of(base)
    content = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        inspection.diff(base, other)
