"""The structure of the package is a promise like any other."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import private_names
import pytest
import slow
from torch import nn

import solidify
from solidify.upstream import torch as torch_names
from solidify.upstream import transformers as transformers_names

PACKAGE = Path(solidify.__file__).parent
ROOMS = (
    "upstream",
    "system",
    "weights",
    "directory",
    "behaviour",
    "model",
    "surgery",
    "source",
    "artifact",
    "adapter",
    "merging",
    "exporting",
    "objective",
    "modules",
    "losses",
    "training",
    "healing",
    "checks",
    "builtin",
    "on_ramps",
    "recipe",
    "demo",
    "command",
)
TOP_BELOW = {"errors", "findings"}  # known to every room
BENEATH_FINDINGS = {"upstream", "system"}  # but these: findings.py stands on the latter
TOP_ABOVE = {"edits", "building"}  # what functions of the package are: `build`, `wrap`, ...
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted(p.parent.relative_to(PACKAGE).as_posix() for p in FILES if p.name == "__init__.py")[1:]  # rooms, too
# What is copied into artifacts, or runs in a process without solidify, and so cannot import `upstream`.
ALONE = {
    *(
        PACKAGE / name
        for name in ("model/operations.py", "model/assembling.py", "model/cache_layers.py", "artifact/witness.py")
    ),
    *(PACKAGE / "behaviour").glob("*.py"),
    PACKAGE / "surgery" / "masking.py",
    PACKAGE / "exporting" / "compared_alone.py",
    *(PACKAGE / "modules").glob("*.py"),
    PACKAGE / "checks" / "vllm_alone.py",
}


@cache
def trees() -> dict[Path, ast.Module]:
    """Parses every file, once it is asked for: the process that only collects tests needs none."""
    return {path: ast.parse(path.read_text()) for path in FILES}


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """Lets the trees go: millions of objects, which every trainer that later tests begin would have looked through."""
    yield
    trees.cache_clear()
    private_names.forget()


@cache
def ours() -> set[str]:
    """Names what is private of ours."""
    return private_names.defined(list(trees().values()))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def module_names() -> set[str]:
    return {name_of(path) for path in FILES}


def is_ours(node: ast.ImportFrom) -> bool:
    return bool(node.level) or (node.module or "").partition(".")[0] == "solidify"


def imports(path: Path, *, lazily: bool = False) -> set[str]:
    """Returns the modules of the package that a file imports at module level (or anywhere)."""
    names, tree = module_names(), trees()[path]
    nodes = ast.walk(tree) if lazily else (n for n in tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add(f"{name_of(path.parents[node.level - 1])}.{node.module}")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("solidify"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in names else node.module)
    return found


def test_the_import_graph_has_no_cycle() -> None:
    graph = {name_of(path): imports(path, lazily=True) for path in FILES if path.name != "__init__.py"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_left(path: Path) -> None:
    """A room imports itself, rooms to its left, and the lower spine; nobody imports the package or a room itself."""
    parts = path.relative_to(PACKAGE).parts
    if path.name == "__init__.py" and len(parts) == 1:
        return
    used = imports(path, lazily=True)
    assert "solidify" not in used
    assert not used & {f"solidify.{room.replace('/', '.')}" for room in FOLDERS if room != "losses"}  # a catalogue
    if parts[0] in ROOMS:
        below = {"errors"} if parts[0] in BENEATH_FINDINGS else TOP_BELOW
        allowed = {*ROOMS[: ROOMS.index(parts[0]) + 1], *below}
        assert {name.split(".")[1] for name in used} <= allowed, used
    if parts[0] == "modules":
        assert not used
    if parts[0] == "behaviour":  # it also runs without the package, by its path: its files name one another relatively
        assert {name.rpartition(".")[0] for name in used} <= {"solidify.behaviour"}
        assert all(n.level == 1 for n in ast.walk(trees()[path]) if isinstance(n, ast.ImportFrom) and is_ours(n))
    else:
        assert not any(n.level for n in ast.walk(trees()[path]) if isinstance(n, ast.ImportFrom))


def test_at_most_six_files_stand_at_the_top() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", *TOP_BELOW, *TOP_ABOVE}


def test_the_recipe_is_known_to_its_room_the_command_line_and_the_demo_alone() -> None:
    knowing = {name_of(path) for path in FILES if "solidify.recipe.schema" in imports(path, lazily=True)}
    others = {name for name in knowing if not name.startswith("solidify.recipe.")}
    assert others == {f"solidify{part}" for part in ("", ".building", ".command.cli", ".demo.story")}


@pytest.mark.parametrize("room", FOLDERS)
def test_a_rooms_init_is_a_docstring_only(room: str) -> None:
    if room == "losses":  # the catalogue of names that recipes use
        return
    body = ast.parse((PACKAGE / room / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_public_thing_says_what_it_is(path: Path) -> None:
    tree = trees()[path]
    assert ast.get_docstring(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {inner for function in functions for inner in ast.walk(function) if inner is not function}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node not in inside:
            assert ast.get_docstring(node), f"{path.name}: {node.name}"
    for function in functions:
        assert function.end_lineno - function.lineno < 80, f"{path.name}: {function.name} is too long"


def test_all_names_are_there_and_no_others() -> None:
    assert solidify.__all__ == sorted(solidify.__all__)
    for name in solidify.__all__:
        assert getattr(solidify, name) is not None
    typed = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in typed.body if isinstance(n, ast.If))
    declared = {alias.asname for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert declared == set(solidify.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'solid'"):
        _ = solidify.solid


PLAIN = ("building", "adapter.loading", "recipe.build_stage", "recipe.dry_run", "checks.check", "exporting.forms")


def test_the_light_parts_stay_light() -> None:
    """Reading a recipe and answering --help need no torch."""
    names = "('torch', 'transformers')"
    script = f"import sys, solidify.recipe.schema, solidify.command.cli; print(*(m in sys.modules for m in {names}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_verbs_import_nothing_that_they_do_not_need() -> None:
    """PEFT brings accelerate, and bitsandbytes half of torch's compiler: a second or two, for adapters alone.

    TRL brings wandb and datasets, and datasets pandas: as long, for training alone.
    """
    names = ["trl", "datasets", "wandb", "pandas", "transformers.trainer"]
    plain, merge = (", ".join(f"solidify.{name}" for name in used) for used in (PLAIN, ["merging.export"]))
    script = f"""
import sys
from solidify.command.quiet import start_verb
with start_verb():
    import {plain}
    without = "peft" in sys.modules
    import {merge}
print(without, "peft" in sys.modules, *(m for m in {names} if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"] and done.stderr == ""


def test_cases_that_are_kept_quick_are_there() -> None:
    for test, cases in slow.KEPT.items():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), test
        assert cases == () or all(cases), test


def test_a_case_that_is_kept_quick_and_is_gone_is_told() -> None:
    """Of tests that were collected; `conftest.py` ends the run with what is told."""
    test = "adapter/test_saving.py::test_heads_and_modules_of_the_same_names_come_back"
    cases = [(test, "LlamaForSequenceClassification"), ("test_faults.py::test_x", "y")]
    assert slow.find_missed(cases) == [f"{test}[LlamaForCausal"]
    assert slow.find_missed([*cases, (test, "LlamaForCausalLM")]) == []


def test_help_names_every_verb() -> None:
    done = subprocess.run([sys.executable, "-m", "solidify", "--help"], capture_output=True, text=True, check=True)
    for verb in ("demo", "inspect", "plan", "run", "build", "train", "check", "merge", "diff", "generate"):
        assert verb in done.stdout


def test_the_demos_recipe_is_the_example() -> None:
    example = PACKAGE.parents[1] / "examples" / "trash_can.yaml"
    assert (PACKAGE / "demo" / "trash_can.yaml").read_text() == example.read_text()


def drawn_tree() -> dict[str, str]:
    """Returns the tree of docs/architecture.md: each file by its path, with what is said of it, in order."""
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in (PACKAGE.parents[1] / "docs" / "architecture.md").read_text().split("```text")[1].splitlines():
        if entry := re.fullmatch(r"((?:│   |    )*)[├└]── ([\w.]+/?) +(\S.*)", line):
            indent, name, words = entry.groups()
            folders = folders[: len(indent) // 4]
            found["".join([*folders, name])] = words
            if name.endswith("/"):
                folders.append(name)
    return found


def test_the_tree_in_the_documents_has_every_file_once_with_its_words() -> None:
    drawn = drawn_tree()
    files = {path.relative_to(PACKAGE).as_posix() for path in FILES if path.name not in ("__init__.py", "__main__.py")}
    assert {name for name in drawn if not name.endswith("/")} == files
    folders = [name[:-1] for name in drawn if name.endswith("/")]
    assert tuple(name for name in folders if "/" not in name) == ROOMS
    assert sorted(folders) == FOLDERS
    assert len(set(drawn.values())) == len(drawn), "two files are told by the same words"


def test_signatures_stay_small() -> None:
    for name in solidify.__all__:
        thing = getattr(solidify, name)
        if inspect.isfunction(thing):
            # What the contract fixes for `replace` is seven; what it declares, and the model's extent, are two more.
            own = set(inspect.signature(thing).parameters) - {"declares", "extent"}
            assert len(own) <= 7, name


def test_no_room_hides_a_public_name() -> None:
    """Once imported, a room is an attribute of the package: `solidify.merge` would be the room, not the function."""
    assert not {*ROOMS, *TOP_BELOW, *TOP_ABOVE} & ({*solidify.__all__} - {"losses"})


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "upstream" and p not in ALONE], ids=name_of)
def test_private_names_of_libraries_stand_in_upstream(path: Path) -> None:
    found = [f"line {line}: {name}" for line, name in private_names.uses(trees()[path], ours())]
    assert not found, f"{name_of(path)} uses private names of a library; name them in upstream/: {found}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "upstream" and p not in ALONE], ids=name_of)
def test_undocumented_names_of_libraries_stand_in_upstream(path: Path) -> None:
    found = private_names.undocumented(trees()[path])
    assert not found, f"{name_of(path)} uses names that no package exports; name them in upstream/: {sorted(found)}"


def test_what_stands_alone_names_the_undocumented_that_upstream_lists() -> None:
    used = set[str]().union(*(private_names.undocumented(trees()[path]) for path in ALONE))
    listed = {f"transformers.{name}" for name in transformers_names.STANDING_ALONE_UNDOCUMENTED}
    assert used == listed, used ^ listed


def test_no_class_overrides_a_private_name_outside_upstream() -> None:
    """Nor hides one by accident: what a class of ours and its library's base both call `_x` is one attribute."""
    found = set()
    for path in FILES:
        if path.parent.name in ("upstream", "modules") or path in ALONE or path.stem in ("__main__", "adapter_alone"):
            continue
        module = importlib.import_module(name_of(path))
        classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        found |= {each for cls in classes for each in private_names.overridden(cls, "solidify")}
    assert not {(cls, name) for cls, name in found if not cls.startswith("solidify.upstream.")}


def test_what_stands_alone_names_what_upstream_lists() -> None:
    listed = {**transformers_names.STANDING_ALONE, **torch_names.STANDING_ALONE}
    used = {
        name for path in ALONE for _, name in private_names.uses(trees()[path], private_names.defined([trees()[path]]))
    }
    for template in (PACKAGE / "artifact" / "templates").glob("*.py.jinja"):
        used |= {word for word in re.findall(r"\b_\w+", template.read_text()) if word in private_names.foreign()}
    assert used == set(listed), used ^ set(listed)


@pytest.mark.parametrize(
    "line",
    [
        "from torch._dynamo import OptimizedModule",
        "from transformers.models.auto.auto_factory import _BaseAutoModelClass",
        "model.config._attn_implementation = 'eager'",
        "getattr(config, '_commit_hash', None)",
        "vars(part).get(f'_{kind}_implementation_internal')",
        "module._buffers.clear()",
        "trainer.save_model(path, _internal_call=True)",
        "from transformers import dynamic_module_utils\ndynamic_module_utils.TIME_OUT_REMOTE_CODE = 0",
        "class Ours:\n    def f(self):\n        return super()._save(self._output)",
        "vars(module)['_unknown_to_us'] = 1",
        "module.__dict__['_unknown_to_us']",
        "from transformers import dynamic_module_utils\nsetattr(dynamic_module_utils, 'TIME_OUT_REMOTE_CODE', 0)",
    ],
)
def test_a_private_name_of_a_library_is_found(line: str) -> None:
    assert list(private_names.uses(ast.parse(line), {"_buffers", "_output"}))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from transformers.cache_utils import LinearAttentionLayer", "transformers.cache_utils.LinearAttentionLayer"),
        (
            "from transformers import cache_utils\ncache_utils.get_layer_types_and_kwargs(config)",
            "transformers.cache_utils.get_layer_types_and_kwargs",
        ),
        (
            "import transformers\ntransformers.trainer_utils.rotate_checkpoints()",
            "transformers.trainer_utils.rotate_checkpoints",
        ),
        (
            "import transformers.trainer_utils as other\nother.rotate_checkpoints()",
            "transformers.trainer_utils.rotate_checkpoints",
        ),
        ("from peft.utils.constants import DUMMY_TARGET_MODULES", "peft.utils.constants.DUMMY_TARGET_MODULES"),
        ("def f():\n    from accelerate.data_loader import DataLoaderShard", "accelerate.data_loader.DataLoaderShard"),
        ("importlib.import_module('trl.import_utils.is_vllm_available')", "trl.import_utils.is_vllm_available"),
    ],
)
def test_an_undocumented_name_is_found(line: str, name: str) -> None:
    assert private_names.undocumented(ast.parse(line)) == {name}


@pytest.mark.parametrize(
    "line",
    [
        "from transformers import PreTrainedModel, cache_utils\ncache_utils.DynamicCache.crop",
        "import transformers\ntransformers.Trainer.train",
        "from transformers.cache_utils import DynamicCache",
        "from peft.tuners.tuners_utils import BaseTunerLayer\nfrom peft.tuners.lora import LoraLayer",
        "from trl.experimental.gkd import GKDTrainer\nGKDTrainer.train",
        "from solidify.upstream.transformers import rotate_checkpoints",
        "import torch\ntorch.nn.modules.module.register_module_forward_hook",
    ],
)
def test_documented_names_are_left_alone(line: str) -> None:
    assert not private_names.undocumented(ast.parse(line))


def test_names_of_ours_are_told_apart() -> None:
    ours = "class Ours:\n    def __init__(self):\n        self._buffers = _made\n_made = Ours()\n_made._text(f'_{x}')"
    assert not list(private_names.uses(ast.parse(ours), {"_text"}))


class _Overriding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._buffers = {}

    def _load_from_state_dict(self, *args: object) -> None:
        self._mine = args


def test_an_overridden_private_name_is_found() -> None:
    found = private_names.overridden(_Overriding, __name__.partition(".")[0])
    assert {name for _, name in found} == {"_buffers", "_load_from_state_dict"}
