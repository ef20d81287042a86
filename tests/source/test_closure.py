from __future__ import annotations

import importlib.util
import json
import linecache
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers.dynamic_module_utils import get_relative_imports
from transformers.models.llama.modeling_llama import LlamaMLP

from solidify import losses
from solidify.errors import ArtifactError
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.recipe import references
from solidify.source import closure, ownership

sys.path.insert(0, str(Path(__file__).parent))

import flat_artifacts
from layouts import GATE, LAYOUTS, NOTEBOOK, TABLE, TRAIN, Layout

HERE = Path(__file__).parent


def write(project: Path, layout: Layout) -> None:
    gate = GATE.format(imports=layout.imports, factor=layout.factor, inside=layout.inside)
    if "\r" in gate:
        gate = "\ufeff" + gate.replace("\r", "").replace("\n", "\r\n")
    for name, text in {**layout.files, layout.at: gate}.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(text.encode())


def gate_of(project: Path, layout: Layout) -> type:
    """Imports the gate as a user would: by its module's name, or by the path of a file that is no module."""
    if "-" in layout.at:
        return references.resolve(f"{layout.at}:Gate", project)
    sys.path.insert(0, str(project))
    try:
        name = layout.at.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return importlib.import_module(name).Gate
    finally:
        sys.path.remove(str(project))


def forget(directory: Path) -> None:
    """Makes the projects under a directory unknown again, so that each may use the same names."""
    inside = f"{directory}{os.sep}"
    places = {n: [vars(m).get("__file__"), *vars(m).get("__path__", ())] for n, m in list(sys.modules.items())}
    for name, paths in places.items():
        if any(str(path).startswith(inside) for path in paths):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not Path(entry).is_relative_to(directory)]


@pytest.fixture(autouse=True)
def projects_are_forgotten(tmp_path: Path) -> Iterator[None]:
    yield
    forget(tmp_path)


@dataclass
class Built:
    """What was collected for each layout, and what a fresh process found on loading it ("" where all was well)."""

    closures: dict[str, closure.Closure | ArtifactError] = field(default_factory=dict)
    gates: dict[str, str] = field(default_factory=dict)  # the name of the gate's own file
    entries: dict[str, str] = field(default_factory=dict)  # that of the one it is imported from
    texts: dict[str, bytes] = field(default_factory=dict)  # and its text before
    loaded: dict[str, str] = field(default_factory=dict)
    directory: Path = Path()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Collects every layout, a script's, a notebook's and remote code's class, and loads them in one fresh process."""
    directory = tmp_path_factory.mktemp("layouts")
    output = directory / "artifacts"
    found = Built(directory=output)
    with start(directory / "script", TRAIN, output) as script, start(directory / "notebook", NOTEBOOK, output) as cells:
        collect_layouts(directory, found)
        for process in (script, cells):
            text = process.communicate(timeout=120)[0]
            assert process.returncode == 0, text
    done = subprocess.run(
        [sys.executable, str(HERE / "flat_artifacts.py"), *map(str, sorted(output.iterdir()))],
        env={**os.environ, "HF_MODULES_CACHE": str(directory / "modules")},
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(done.stdout.splitlines()[-1])
    found.loaded = {Path(path).name: answer for path, answer in answers.items()}
    return found


def collect_layouts(directory: Path, found: Built) -> None:
    """Writes every layout as a project, and collects and saves its gate."""
    for name, layout in LAYOUTS.items():
        project = directory / "projects" / name
        write(project, layout)
        cls = gate_of(project, layout)
        try:
            collected = closure.collect([cls], reserved=flat_artifacts.RESERVED)
            found.gates[name] = next(file for file, text in collected.files.items() if "class Gate(" in text)
            found.entries[name] = collected.modules[cls].removeprefix(".") + ".py"
            found.texts[name] = (project / layout.at).read_bytes()
            flat_artifacts.save(found.directory / name, collected, [cls])
            found.closures[name] = collected
        except ArtifactError as error:
            found.closures[name] = error
        forget(directory)


def start(directory: Path, script: str, output: Path) -> subprocess.Popen[str]:
    """Starts a script in a directory of its own, with a module and a table beside it."""
    directory.mkdir(parents=True)
    (directory / "helpers.py").write_text("FACTOR = 4.0\n")
    (directory / "table.json").write_text(TABLE)
    (directory / "train.py").write_text(script)
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "IPYTHONDIR": str(directory),
        "HF_MODULES_CACHE": str(directory / "modules"),
    }
    return subprocess.Popen(
        [sys.executable, "train.py", str(output)],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_in_a_fresh_process_with_equal_logits(built: Built, name: str) -> None:
    layout, found = LAYOUTS[name], built.closures[name]
    assert isinstance(found, closure.Closure), found
    assert built.loaded[name] == ""
    assert set(found.files) - {built.gates[name]} == set(layout.carried)
    assert set(found.requirements) == set(layout.requirements)
    if layout.unchanged:
        assert found.files[built.gates[name]].encode() == built.texts[name]
    assert "Odd   spacing is kept." in found.files[built.gates[name]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers_follows_exactly_the_files_that_travel(built: Built, name: str) -> None:
    files = set(built.closures[name].files)
    followed = {f"{stem}.py" for file in files for stem in get_relative_imports(built.directory / name / file)}
    assert followed | {built.entries[name]} == files


def test_of_a_script_only_what_the_class_needs_travels(built: Built) -> None:
    assert built.loaded["script"] == ""
    files = {path.name: path.read_text() for path in (built.directory / "script").glob("*.py")}
    assert files.keys() - flat_artifacts.RESERVED == {"gate_of_mine.py", "gate_of_mine_data.py", "helpers.py"}
    text = files["gate_of_mine.py"]
    for kept in ("# How much each size scales.\n", "import math\n", "  # looked up when it is called", "import Tensor"):
        assert kept in text
    for left in ("argparse", "numpy", "parser", "was_here", "unneeded(", "solidify.source", "model =", "__main__"):
        assert left not in text


def test_of_a_notebook_the_latest_definition_travels(built: Built) -> None:
    assert built.loaded["notebook"] == ""
    text = (built.directory / "notebook" / "gate.py").read_text()
    assert "# the one that counts" in text
    assert text.count("class Gate") == text.count("SHARE = ") == text.count("SHARE += ") == 1
    assert "model" not in text
    assert text.index("import nn") < text.index("class Base") < text.index("class Gate")


def test_remote_code_is_carried_under_names_of_its_own(built: Built) -> None:
    assert built.loaded["remote_code"] == ""
    files = {path.name for path in (built.directory / "remote_code").glob("*.py")}
    assert files - {*flat_artifacts.RESERVED, "gate_of_mine.py", "helpers.py"} == {
        "gate_of_mine_data.py",
        "script_modeling_pico.py",
        "script_configuration_pico.py",
    }


def project(directory: Path, files: dict[str, str], *, name: str = "proj.gate") -> type:
    """Writes files under `directory` and imports the class Gate of a module among them."""
    for file, text in files.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(text)
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    return importlib.import_module(name).Gate


def gate(imports: str = "", factor: str = "1.0", inside: str = "pass") -> str:
    return GATE.format(imports=imports, factor=factor, inside=inside)


def test_classes_of_torch_and_transformers_are_imported_from_where_they_are() -> None:
    found = closure.collect([LlamaMLP, nn.Linear])
    assert found.files == found.requirements == {}
    assert found.modules == {
        LlamaMLP: "transformers.models.llama.modeling_llama",
        nn.Linear: "torch.nn.modules.linear",
    }


def test_our_own_modules_travel_like_a_users(tmp_path: Path) -> None:
    text = gate("from solidify.modules.trashcan_moe import TrashCan, TrashCanMoE", "TrashCan is not None")
    mine = project(tmp_path, {"proj/gate.py": text})
    found = closure.collect([TrashCanMoE, mine])
    assert found.modules == {TrashCanMoE: ".trashcan_moe", mine: ".gate"}
    assert "from .trashcan_moe import TrashCan, TrashCanMoE" in found.files["gate.py"]
    assert found.files["trashcan_moe.py"] == Path(sys.modules[TrashCanMoE.__module__].__file__).read_text()


def test_classes_of_one_name_come_from_files_of_two_names(tmp_path: Path) -> None:
    files = {
        "proj/a/gate.py": gate("from . import gate as me"),
        "proj/b/gate.py": gate(factor="3.0"),
        "gate.py": gate(),
    }
    names = ("proj.a.gate", "proj.b.gate", "gate")
    first, second, third = (project(tmp_path, files, name=name) for name in names)
    found = closure.collect([first, second, third])
    assert found.modules == {first: ".a_gate", second: ".b_gate", third: ".gate"}
    assert "from . import a_gate as me" in found.files["a_gate.py"]


def test_a_package_of_an_installed_class_is_carried_and_of_others_required(tmp_path: Path) -> None:
    """One that is installed in a directory of its own, as `pip install --target` does."""
    for name in ("layers", "ops"):
        information = tmp_path / f"my_{name}-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: my-{name}\nVersion: 1.2\n")
        (information / "RECORD").write_text(f"{name}_of_mine/__init__.py,,\n")
    files = {
        "layers_of_mine/__init__.py": "",
        "layers_of_mine/gate.py": gate("from layers_of_mine.scale import S\nfrom ops_of_mine import T", "S * T"),
        "layers_of_mine/scale.py": "S = 2.0\n",
        "ops_of_mine/__init__.py": "T = 3.0\n",
    }
    cls = project(tmp_path, files, name="layers_of_mine.gate")
    found = closure.collect([cls])
    assert set(found.files) == {"gate.py", "scale.py"}
    assert found.requirements == {"my-ops": "1.2"}


@pytest.mark.parametrize("origin", ["index", "archive", "conda", "directory"])
def test_an_installed_class_that_cannot_be_carried_is_required(tmp_path: Path, origin: str) -> None:
    """Where others can install its package by name; one that was installed from a directory is refused, as a file."""
    information = tmp_path / "my_blocks-1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-blocks\nVersion: 1.2\n")
    (information / "RECORD").write_text("blocks_of_mine/__init__.py,,\n")
    (information / "INSTALLER").write_text("conda" if origin == "conda" else "pip")
    if origin != "index":
        kind = "archive_info" if origin == "archive" else "dir_info"
        (information / "direct_url.json").write_text(json.dumps({"url": "file:///somewhere", kind: {}}))
    files = {
        "blocks_of_mine/__init__.py": "",
        "blocks_of_mine/gate.py": gate("import importlib\nM = importlib.import_module('ma' + 'th')", "M.pi"),
    }
    cls = project(tmp_path, files, name="blocks_of_mine.gate")
    if origin == "directory":
        with pytest.raises(ArtifactError, match="imports what is computed at run time"):
            closure.collect([cls])
        return
    found = closure.collect([cls])
    assert (found.files, found.modules) == ({}, {cls: "blocks_of_mine.gate"})
    assert found.requirements == {"my-blocks": "1.2"}


@pytest.mark.parametrize("fault", ["nothing", "no metadata", "no name", "no text", "another directory", "no origin"])
def test_what_an_interrupted_installation_left_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A broken distribution provides nothing, and hides no other."""
    for name in ("broken", "whole"):
        information = tmp_path / f"their_{name}-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: their-{name}\nVersion: 1.2\n")
        (information / "RECORD").write_text(f"their_{name}/__init__.py,,\n")
        (tmp_path / f"their_{name}").mkdir()
        (tmp_path / f"their_{name}" / "__init__.py").write_text("")
    information = tmp_path / "their_broken-1.2.dist-info"
    if fault == "no metadata":
        (information / "METADATA").unlink()
    elif fault == "no name":
        (information / "METADATA").write_text("Metadata-Version: 2.1\n")
    elif fault == "no text":
        (information / "RECORD").write_bytes(b"\xff")
    elif fault == "no origin":
        (information / "direct_url.json").write_text("")
    elif fault == "another directory":  # as pip leaves it
        information.rename(tmp_path / "~heir_broken-1.2.dist-info")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path, None])
    here = ownership.surroundings(())
    assert ownership.requirement("their_whole", here) == ("their-whole", "1.2")
    assert ("their_broken" in here.distributions) is (fault in ("nothing", "another directory", "no origin"))
    assert ownership.is_published("their_broken", here) is (fault in ("nothing", "another directory"))
    for name in ("their_broken", "their_whole", "peft"):
        owner = ownership.judge(name, importlib.util.find_spec(name), here).owner
        assert owner == ("installed" if name in here.distributions else "own")


@pytest.mark.parametrize("record", ["theirs/__init__.py,,many\n", "", None])
def test_of_two_that_provide_a_module_one_may_list_its_files_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str | None
) -> None:
    for name in ("broken", "whole"):
        information = tmp_path / f"their_{name}-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: their-{name}\nVersion: 1.2\n")
        (information / "top_level.txt").write_text("theirs\n")
        if (content := "theirs/__init__.py,,\n" if name == "whole" else record) is not None:
            (information / "RECORD").write_text(content)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert ownership.requirement("theirs", ownership.surroundings(())) == ("their-whole", "1.2")


def test_what_an_optional_file_needs_is_optional(tmp_path: Path) -> None:
    text = gate("try:\n    from .fast import F\nexcept (ImportError, OSError):\n    F = 1.0", "F")
    found = closure.collect([project(tmp_path, {"proj/gate.py": text, "proj/fast.py": "import no_such_kernel\nF = 2"})])
    assert set(found.files) == {"gate.py", "fast.py"}
    assert found.requirements == {}


def test_cells_that_only_python_keeps_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `ipykernel` without IPython's history, or at Python 3.13's own prompt: the line cache has them."""
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    for number, cell in enumerate(("from torch import nn\nK = 2", "class Gate(nn.Module):\n    k = K\n")):
        name = f"/somewhere/ipykernel_1/{number}.py"
        monkeypatch.setitem(linecache.cache, name, (len(cell), None, cell.splitlines(keepends=True), name))
        exec(compile(cell, name, "exec"), vars(main))
    found = closure.collect([main.Gate])
    assert found.modules == {main.Gate: ".gate"}
    assert "from torch import nn\nK = 2\n\n\nclass Gate" in found.files["gate.py"]


REFUSED = {
    "solidify": ("import solidify", {}, "gate.py, line 5: `import solidify`: it imports solidify, without which"),
    "solidify_inside": ("", {}, "gate.py, line 17: `import solidify.losses`: it imports"),
    "missing": (
        "if False:\n    import no_such",
        {},
        "gate.py, line 6: `import no_such`: `no_such` is not installed (install",
    ),
    "missing_file": (
        "if False:\n    from .none import x",
        {},
        "gate.py, line 6: `from .none import x`: there is no module",
    ),
    "missing_name": ("if False:\n    from .sub import x", {"sub/__init__.py": ""}, "the package `proj.sub` has no `x`"),
    "above_the_top": ("if False:\n    from ...x import y", {}, "line 6: `from ...x import y`: it goes beyond the top"),
    "computed": (
        "import importlib\nNAME = 'math'\nM = importlib.import_module(NAME)",
        {},
        "line 7: `importlib.import_module(NAME)` imports what is computed at run time",
    ),
    "computed_relative": (
        "from importlib import import_module\nM = import_module('.h', __package__)",
        {"h.py": ""},
        "line 6: `import_module('.h', __package__)` imports what is computed",
    ),
    "built_in": (
        "M = __import__('math'.upper().lower())",
        {},
        "line 5: `__import__('math'.upper().lower())` imports what",
    ),
    "by_path": (
        "import importlib.util\nS = importlib.util.spec_from_file_location('x', '/x.py')",
        {},
        "line 6: `spec_from_file_location` imports what is computed",
    ),
    "own_by_name": (
        "M = __import__('proj.h')",
        {"h.py": ""},
        "line 5: `__import__('proj.h')` asks for your own file by its name",
    ),
    "package_object": (
        "from . import sub\nX = list(vars(sub))",
        {"sub/__init__.py": ""},
        "line 6: the package `sub` is used as",
    ),
    "assigned_to_a_package": (
        "from . import sub\nsub.X = 1",
        {"sub/__init__.py": "X = 0"},
        "line 6: `sub.X` is assigned",
    ),
    "file_without_data": (
        "import os\nHERE = os.path.dirname(__file__)",
        {},
        "line 6: `HERE = os.path.dirname(__file__)` looks",
    ),
    "old_resources": (
        "import pkgutil\nT = pkgutil.get_data(__package__, 'h.txt')",
        {"h.txt": "1"},
        "line 6: `pkgutil.get_data(__package__, 'h.txt')` reads beside its package",
    ),
    "not_utf8": (
        "if False:\n    from . import latin",
        {"latin.py": "# \n# caf\xe9\n"},
        "latin.py, line 2, is not UTF-8",
    ),
    "no_python": (
        "if False:\n    from . import broken",
        {"broken.py": "x = 1\nclass (:\n"},
        "broken.py, line 2, is not Python",
    ),
    "compiled_data": (
        "from pathlib import Path\nP = Path(__file__).parent / 'ops.so'",
        {"ops.so": ""},
        "it loads ops.so, which is compiled",
    ),
    "bytecode": (
        "if False:\n    from . import only",
        {"only.pyc": ""},
        "only.pyc), and only Python source can be carried",
    ),
    "extension": (
        "try:\n    from . import fast\nexcept ImportError:\n    fast = None",
        {f"fast{EXTENSION_SUFFIXES[0]}": ""},
        "is compiled",
    ),
    "raw_string": (
        'R = r"""\nfrom .nowhere import x\n"""',
        {},
        "gate.py: the string with `from .nowhere import x` reads like",
    ),
    "two_packages": (
        "try:\n    from . import a as p\nexcept ImportError:\n    from . import b as p\nX = p.X",
        {"a/__init__.py": "X = 1", "b/__init__.py": "X = 2"},
        "line 6: `from . import a as p`: `p` stands for two different",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_travel_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    imports, files, words = REFUSED[name]
    inside = "import solidify.losses" if name == "solidify_inside" else "pass"
    others = {f"proj/{file}": text for file, text in files.items()}
    for file, text in others.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(text.encode("latin-1"))
    cls = project(tmp_path, {"proj/gate.py": gate(imports, inside=inside)})
    with pytest.raises(ArtifactError) as caught:
        closure.collect([cls])
    assert words in str(caught.value)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    text = gate("if False:\n    import no_such, solidify\n    from .h import x\n    from .none import y")
    cls = project(tmp_path, {"proj/gate.py": text, "proj/h.py": "if False:\n    import not_there\nx = 1\n"})
    with pytest.raises(ArtifactError, match=r"(?s)the modules' source cannot travel.*") as caught:
        closure.collect([cls, lambda: None])
    for words in ("gate.py, line 6", "solidify", "h.py, line 2", "gate.py, line 8", "a lambda is not a class"):
        assert words in str(caught.value)


def test_too_much_data_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "proj").mkdir()
    (tmp_path / "proj" / "table.bin").write_bytes(b"\0" * (4 * 2**20 + 1))
    cls = project(tmp_path, {"proj/gate.py": gate("from pathlib import Path\nT = Path(__file__).parent / 'table.bin'")})
    with pytest.raises(ArtifactError, match=r"4\.0 MB \(most of it table\.bin\).*as a persistent buffer"):
        closure.collect([cls])


def test_what_is_no_class_of_a_file_is_refused(tmp_path: Path) -> None:
    text = gate(
        "def make():\n    class Local(nn.Module):\n        pass\n    return Local\n\n\n"
        "Made = type('Made', (nn.Module,), {})\nLocal = make()\nexec('class Typed(nn.Module): pass')\n"
        "class Outer:\n    class Inner(nn.Module):\n        pass\n\n\n"
        "class Twice(nn.Module):\n    pass\n\n\nfirst = Twice\nclass Twice(nn.Module):\n    pass\n"
    )
    module = sys.modules[project(tmp_path, {"proj/gate.py": text}).__module__]
    nowhere = type("Nowhere", (nn.Module,), {"__module__": "made_at_run_time"})
    for thing, words in (
        (lambda x: x, r"test_closure\.py, line \d+: a lambda is not a class"),
        (gate, r"test_closure\.py, line \d+: the function gate is not a class"),
        (nn.Linear(1, 1), "is not a class"),
        (module.Local, r"gate\.py, line 6: Local is defined inside a function \(make\.<locals>\.Local\)"),
        (module.Made, r"gate\.py, line 11: Made was made at run time: the file has no `class Made`"),
        (module.Typed, r"gate\.py, line 13: Typed was made at run time"),
        (module.Outer.Inner, r"gate\.py, line 15: Inner is defined inside a class"),
        (module.first, r"gate\.py, line 19: the name Twice stands for something else now"),
        (nowhere, r"Nowhere has no source file \(module made_at_run_time\)"),
        (type("Linear", (nn.Linear,), {"__module__": "torch.nn"}), "was made at run time"),
        (losses.trash_budget, "belongs to solidify"),
    ):
        with pytest.raises(ArtifactError, match=words):
            closure.collect([thing])


REGISTRY = """
import torch
from torch import nn
from solidify.source import closure, ownership

REGISTRY = {}


def register(name):
    def wrap(cls):
        REGISTRY[name] = cls
        return cls

    return wrap


@register("inner")
class Inner(nn.Module):
    pass


class Unregistered(nn.Module):
    pass


class Gate(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.inner = REGISTRY["inner"]()


text = closure.collect([Gate]).files["gate.py"]
"""


def test_what_fills_a_registry_of_a_script_travels_with_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(REGISTRY)
    text = runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")["text"]
    assert "class Inner" in text
    assert "Unregistered" not in text
    assert "solidify.source" not in text


def test_a_script_that_is_run_as_a_module_imports_from_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from torch import nn\nfrom .helpers import K\nfrom solidify.source import closure\n\n\n"
    text += "class Gate(nn.Module):\n    k = K\n\n\nfound = closure.collect([Gate])\n"
    for name, content in {"__init__": "", "train": text, "helpers": "K = 1\n"}.items():
        (tmp_path / "trained").mkdir(exist_ok=True)
        (tmp_path / "trained" / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = runpy.run_module("trained.train", run_name="__main__", alter_sys=True)["found"]
    assert set(found.files) == {"gate.py", "helpers.py"}


SCRIPT = """
import json, os, sys
import torch
from torch import nn
from transformers import AutoConfig
{lines}

class Gate(nn.Module):
    def forward(self, x):
        return x * {factor}

from solidify.source import closure, ownership
closure.collect([Gate])
"""

REFUSED_IN_SCRIPTS = {
    "model": (
        "model = nn.Linear(2, 2)\nWIDTH = model.in_features",
        "WIDTH",
        "line 6: WIDTH needs `model = nn.Linear(2, 2)`, a Linear with weights of its own",
    ),
    "file": (
        "from pathlib import Path\nTABLE = json.loads(Path('table.json').read_text())",
        "TABLE['x']",
        "line 7: Gate needs `TABLE = json.loads(Path('table.json').read_text())`, and `read_text` would run again",
    ),
    "loaded": (
        "def read():\n    return SHARE\nSHARE = torch.load('x.pt')",
        "read()",
        "line 8: read needs `SHARE = torch.load('x.pt')`, and `load` would run again",
    ),
    "arguments": ("SIZE = float((sys.argv + ['1', '1'])[1])", "SIZE", "`sys.argv` would run again"),
    "environment": ("SIZE = float(os.environ.get('SIZE', 1))", "SIZE", "`os.environ` would run again"),
    "guard": (
        "if __name__ == '__main__':\n    SIZE = 3.0",
        "SIZE",
        "line 6: Gate needs `if __name__ == '__main__':`, which",
    ),
    "put_there": ("globals()['SIZE'] = 3.0", "SIZE", "line 10: Gate needs `SIZE`, which no statement of it binds"),
}


@pytest.mark.parametrize("name", REFUSED_IN_SCRIPTS)
def test_what_a_script_would_have_to_run_again_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, factor, words = REFUSED_IN_SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "table.json").write_text('{"x": 2.0}')
    torch.save(1.0, tmp_path / "x.pt")
    (tmp_path / "train.py").write_text(SCRIPT.format(lines=lines, factor=factor))
    with pytest.raises(ArtifactError) as caught:
        runpy.run_path("train.py", run_name="__main__")
    assert words in str(caught.value)
    assert "train.py, line" in str(caught.value)
