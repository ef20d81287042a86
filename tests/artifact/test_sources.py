from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pico
import solidify
from pico import wrappers
from solidify import references
from solidify.artifact import sources
from solidify.errors import ArtifactError
from solidify.modules.trashcan_moe import TrashCanMoE

MODULE = """
import torch
from torch import nn
{imports}

class Wrapped(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states):
        return self.original(hidden_states)
"""


def compiled(directory: Path, imports: str = "", **others: str) -> sources.Sources:
    """Writes a module file with some import lines, operates with it, and compiles the sources."""
    (directory / "mine.py").write_text(MODULE.format(imports=imports))
    for name, text in others.items():
        (directory / f"{name}.py").write_text(text)
    model = pico.olmoe()
    module = references.resolve("mine.py:Wrapped", directory)
    return sources.compile_sources(model, solidify.replace(model, "model.layers.*.mlp", module))


def test_the_modelling_file_reads_like_a_hand_written_one() -> None:
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    code = sources.compile_sources(model, edits)
    text = code.files["modeling_solid_olmoe.py"]
    assert len(text.splitlines()) < 50
    assert all(len(line) < 125 for line in text.splitlines())
    assert "class SolidOlmoeForCausalLM(OlmoeForCausalLM):" in text
    imported = {
        node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert imported == {"transformers"}
    assert set(code.files) == {"modeling_solid_olmoe.py", "configuration_solid_olmoe.py", "trashcan_moe.py"}
    assert set(code.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_what_a_module_does_not_ask_for_is_not_in_the_file() -> None:
    model = pico.olmoe()
    text = sources.compile_sources(model, solidify.replace(model, "**.mlp", TrashCanMoE)).files[
        "modeling_solid_olmoe.py"
    ]
    assert "config_at" not in text
    assert "layer_at" not in text
    model = pico.olmoe()
    text = sources.compile_sources(model, solidify.replace(model, "**.mlp", wrappers.Numbered)).files[
        "modeling_solid_olmoe.py"
    ]
    assert "Numbered(config=config_at(model, name), layer_idx=layer_at(name), original=original, **arguments)" in text


def test_the_model_type_depends_on_code_and_surgery() -> None:
    def model_type(**arguments: object) -> str:
        model = pico.olmoe()
        return sources.compile_sources(model, solidify.replace(model, "**.mlp", TrashCanMoE, **arguments)).model_type

    assert model_type() == model_type()
    assert model_type() != model_type(arguments={"weighting": "softmax_all"})


def test_files_beside_the_module_travel_with_it(tmp_path: Path) -> None:
    code = compiled(
        tmp_path,
        "from .helper import twice",
        helper="from .deep import x\n\ndef twice(y):\n    return 2 * y\n",
        deep="x = 1\n",
    )
    assert {"mine.py", "helper.py", "deep.py"} <= set(code.files)


def test_installed_packages_are_recorded(tmp_path: Path) -> None:
    assert compiled(tmp_path, "import numpy\nimport math\nimport json").requirements.keys() == {"numpy"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("from . import helper", "line 4: `from . import helper` cannot be carried"),
        ("from .helper.deep import x", "cannot be carried"),
        ("from ..helper import x", "cannot be carried"),
        ("import helper", "`helper` stands beside it; import it relatively"),
        ("import solidify", "it imports solidify, without which the artifact must load"),
        ("if False:\n    import no_such_package", "`no_such_package` is not installed"),
    ],
)
def test_imports_that_cannot_travel_are_refused_with_their_line(
    tmp_path: Path, line: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helper.py").write_text("x = 1\n")
    text = MODULE.format(imports="if False:\n    " + line.replace("\n", "\n    "))
    (tmp_path / "mine.py").write_text(text)
    model = pico.olmoe()
    edits = solidify.replace(model, "**.mlp", references.resolve("mine.py:Wrapped", tmp_path))
    with pytest.raises(ArtifactError, match=r"mine\.py, line") as caught:
        sources.compile_sources(model, edits)
    assert words.split("`")[-1] in str(caught.value)


def test_classes_without_a_file_that_could_travel_are_refused(tmp_path: Path) -> None:
    class Local(wrappers.Scaled):
        pass

    made = type("Made", (wrappers.Scaled,), {})
    made.__module__ = "made_at_run_time"
    sys.modules["made_at_run_time"] = ModuleType("made_at_run_time")
    for module, words in ((Local, "inside a function"), (made, "has no source file"), (_main_class(), "__main__")):
        model = pico.olmoe()
        edits = solidify.replace(model, "**.mlp", module)
        with pytest.raises(ArtifactError, match=words):
            sources.compile_sources(model, edits)


def _main_class() -> type:
    cls = type("Typed", (wrappers.Scaled,), {})
    cls.__module__ = "__main__"
    return cls


def test_two_classes_or_files_of_one_name_are_refused(tmp_path: Path) -> None:
    modules = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(MODULE.format(imports=f"# {name}"))
        modules.append(references.resolve("mine.py:Wrapped", tmp_path / name))
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.0.mlp", modules[0])
    edits += solidify.replace(model, "model.layers.1.mlp", modules[1])
    with pytest.raises(ArtifactError, match="two different classes are called Wrapped"):
        sources.compile_sources(model, edits)


def test_a_head_that_is_not_transformers_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "head.py").write_text(
        "from transformers import OlmoeForCausalLM\n\nclass Mine(OlmoeForCausalLM):\n    pass\n"
    )
    spec = importlib.util.spec_from_file_location("head", tmp_path / "head.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Mine(pico.olmoe().config)
    with pytest.raises(ArtifactError, match="Mine is not a class of transformers"):
        sources.compile_sources(model, solidify.replace(model, "**.mlp", TrashCanMoE))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("LlamaForCausalLM", {**pico.SIZES, "intermediate_size": 48}, ["AutoModelForCausalLM"]),
        (
            "BertForMaskedLM",
            {**pico.SIZES, "intermediate_size": 48},
            ["AutoModelForMaskedLM", "AutoModelForPreTraining"],
        ),
        ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4}, ["AutoModelForCausalLM"]),
    ],
)
def test_the_auto_classes_are_those_that_map_to_the_models_class(
    name: str, settings: dict[str, object], expected: list[str]
) -> None:
    assert set(sources.auto_classes(pico.make(name, **settings))) & set(expected)
