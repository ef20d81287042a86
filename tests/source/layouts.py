"""Projects as people keep them: a gate somewhere, and what it imports or reads; a training script; a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field

GATE = '''"""A gate, as a user writes it."""

import torch
from torch import nn
{imports}


class Gate(nn.Module):
    """Scales what a module returns.   Odd   spacing is kept."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states):
        {inside}
        return self.original(hidden_states) * self.weight * ({factor})  # a comment
'''


@dataclass(frozen=True)
class Layout:
    """A project: a gate somewhere in it that multiplies by `factor`, and other files.

    `carried` are the files that must travel beside the gate's own, `at` is where the gate is. An `unchanged` gate
    travels byte for byte.
    """

    imports: str = ""
    factor: str = "2.0"
    files: dict[str, str] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    at: str = "proj/layers/gate.py"
    inside: str = "pass"
    unchanged: bool = False
    requirements: tuple[str, ...] = ()


FACTOR = {"proj/layers/helpers.py": "FACTOR = 3.0\nOTHER = 5.0\n"}
OPS = {
    "proj/ops/__init__.py": "from .scale import factor\nfrom .unneeded import thing\n",
    "proj/ops/scale.py": "OTHER = 7.0\n\n\ndef factor():\n    return 1.5\n",
    "proj/ops/unneeded.py": "from . import scale\n\nthing = 1\n",
}
TABLE = '{"factor": 2.5}'

LAYOUTS = {
    "one_file": Layout(unchanged=True),
    "standard_library": Layout("import json, os.path as p\nfrom math import (sqrt,\n    pi)", "pi", unchanged=True),
    "from_beside": Layout("from .helpers import FACTOR", "FACTOR", FACTOR, ("helpers.py",), unchanged=True),
    "several_lines": Layout(
        "from .helpers import (  # both\n    FACTOR,\n    OTHER as other,\n)",
        "FACTOR * other",
        FACTOR,
        ("helpers.py",),
        unchanged=True,
    ),
    "star": Layout("from .helpers import *", "FACTOR", FACTOR, ("helpers.py",), unchanged=True),
    "module_beside": Layout("from . import helpers  # why", "helpers.FACTOR", FACTOR, ("helpers.py",)),
    "module_renamed": Layout("from . import helpers as h, gate", "h.FACTOR", FACTOR, ("helpers.py",)),
    "module_above": Layout(
        "from .. import constants", "constants.K", {"proj/constants.py": "K = 4"}, ("constants.py",)
    ),
    "name_above": Layout("from ..ops.scale import factor as f", "f()", OPS, ("scale.py",)),
    "name_of_a_package": Layout("from ..ops import factor", "factor()", OPS, ("scale.py",)),
    "star_of_a_package": Layout("from ..ops import *", "factor() * thing", OPS, ("scale.py", "unneeded.py")),
    "package_above": Layout("from .. import ops", "ops.factor() * ops.scale.OTHER", OPS, ("scale.py",)),
    "subpackage": Layout(
        "from .sub.deep.numbers import N\nfrom .sub import deep\nfrom .sub.deep import numbers",
        "N * numbers.N",
        {"proj/layers/sub/deep/numbers.py": "N = 3.0\n", "proj/layers/sub/__init__.py": "raise_me = 1\n"},
        ("numbers.py",),
    ),
    "init_that_defines": Layout(
        "from ..ops import factor, VERSION\nfrom .. import NAME",
        "factor() * VERSION * len(NAME)",
        {
            "proj/__init__.py": "NAME = 'abc'\nfrom .layers.gate import Gate\n",
            "proj/ops/__init__.py": "B = 2.0\nVERSION = B * 2  # twice\nfrom .scale import factor\nimport math\n",
            "proj/ops/scale.py": "from . import VERSION\n\n\ndef factor():\n    return VERSION\n",
            "proj/ops/unneeded.py": "x = 1\n",
        },
        ("scale.py", "ops.py", "proj.py"),
    ),
    "inside_a_function": Layout(
        inside="from ..ops.scale import factor\n        from . import helpers",
        factor="factor() * helpers.FACTOR",
        files=OPS | FACTOR,
        carried=("helpers.py", "scale.py"),
    ),
    "inside_blocks": Layout(
        "try:\n    from . import _fast\n    from ._fast import factor\n"
        "except ImportError:\n    from ..ops.scale import factor\n"
        "if True: from .helpers import FACTOR; X = 1",
        "factor() * FACTOR * X",
        OPS | FACTOR,
        ("scale.py", "helpers.py"),
    ),
    "for_type_checkers": Layout(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from no_such_package import Thing\n"
        "    from ..ops.unneeded import (\n        thing,\n    )\n    from .helpers import FACTOR\n"
        "from .helpers import OTHER",
        "OTHER",
        OPS | FACTOR,
        ("helpers.py",),
    ),
    "absolute_name": Layout("from proj.ops.scale import factor", "factor()", OPS, ("scale.py",)),
    "absolute_of_a_package": Layout("from proj.ops import factor", "factor()", OPS, ("scale.py",)),
    "absolute_renamed": Layout("import proj.ops.scale as s, math", "s.factor() * math.pi", OPS, ("scale.py",)),
    "absolute_package": Layout("import proj.ops as o", "o.factor() * o.scale.OTHER", OPS, ("scale.py",)),
    "absolute_dotted": Layout(
        "import proj.ops.scale\nimport proj.constants",
        "proj.ops.scale.factor() * proj.constants.K * proj.ops.factor()",
        OPS | {"proj/constants.py": "K = 4\nproj = K\n"},
        ("scale.py", "constants.py"),
        inside="proj.ops.scale.OTHER = 7.0",
    ),
    "absolute_beside_a_script": Layout(
        "import helpers\nfrom helpers import FACTOR",
        "helpers.FACTOR * FACTOR",
        {"helpers.py": "FACTOR = 3.0"},
        ("helpers.py",),
        at="gate.py",
    ),
    "path_hack": Layout(
        "import sys, os\nsys.path.append(\n    os.path.dirname(__file__)  # here\n)\n"
        "ROOT = os.path.dirname(os.path.abspath(__file__))\nsys.path.insert(0, ROOT)\nfrom helpers import FACTOR",
        "FACTOR",
        {"helpers.py": "FACTOR = 3.0"},
        ("helpers.py",),
        at="gate.py",
    ),
    "lazy_package": Layout(
        "from ..lazy import factor, other",
        "factor() * other()",
        {
            "proj/lazy/__init__.py": "import importlib\nfrom typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from .scale import factor\n\n\n"
            "def __getattr__(name):\n    return getattr(importlib.import_module('.scale', __name__), name)\n",
            "proj/lazy/scale.py": "def factor():\n    return 2.0\n\n\ndef other():\n    return 3.0\n",
        },
        ("scale.py",),
    ),
    "equal_names": Layout(
        "from .a.helpers import A\nfrom .b import helpers",
        "A * helpers.B",
        {"proj/layers/a/helpers.py": "A = 3.0\n", "proj/layers/b/helpers.py": "B = 5.0\n"},
        ("a_helpers.py", "b_helpers.py"),
    ),
    "reserved_names": Layout(
        "from .modeling_pico import A", "A", {"proj/layers/modeling_pico.py": "A = 3.0\n"}, ("layers_modeling_pico.py",)
    ),
    "file_named_by_path": Layout(
        at="my-gate.py",
        factor="FACTOR",
        imports="from .other import FACTOR",
        files={"other.py": "FACTOR = 3.0\n"},
        carried=("other.py",),
        unchanged=True,
    ),
    "class_in_an_init": Layout(
        "from .helpers import FACTOR\nimport sys as unused",
        "FACTOR",
        FACTOR,
        ("helpers.py",),
        at="proj/layers/__init__.py",
    ),
    "namespace_packages": Layout("from ..space.deep import N", "N", {"proj/space/deep.py": "N = 2"}, ("deep.py",)),
    "circle_begun_elsewhere": Layout(
        "from .base import BASE",
        "BASE",
        {
            "proj/layers/__init__.py": "from . import base\nfrom .gate import Gate\n",
            "proj/layers/base.py": "BASE = 2.0\nfrom .gate import Gate\n",
        },
        ("base.py", "gate_entry.py"),
        unchanged=True,
    ),
    "circle_of_others": Layout(
        "from ..ops.b import B",
        "B",
        {
            "proj/ops/__init__.py": "from . import a\n",
            "proj/ops/a.py": "A = 2.0\nfrom .b import B\n",
            "proj/ops/b.py": "from .a import A\nB = A * 2\n",
        },
        ("a.py", "b.py"),
    ),
    "circle_through_the_package": Layout(
        "import proj",
        "proj.layers.helpers.twice(1.5)",
        {
            "proj/__init__.py": "from .layers import helpers\nfrom .layers.gate import Gate\n",
            "proj/layers/helpers.py": "import proj\n\nK = 2.0\n\n\ndef twice(x):\n    return proj.layers.helpers.K * x "
            "if proj.Gate else x\n",
        },
        ("helpers.py",),
    ),
    "text_that_looks_like_an_import": Layout(
        'HELP = """Use it so:\n\nfrom .nowhere import Gate\n    from .helpers import Gate\n"""\n'
        "from .helpers import FACTOR",
        "FACTOR * len(HELP)",
        FACTOR,
        ("helpers.py",),
    ),
    "windows_lines_and_mark": Layout("from . import helpers\r\nX = 1", "helpers.FACTOR", FACTOR, ("helpers.py",)),
    "data_by_pathlib": Layout(
        "import json\nfrom pathlib import Path\nHERE = Path(__file__).parent\n"
        "TABLE = json.loads((HERE / 'table.json').read_text())",
        "TABLE['factor']",
        {"proj/layers/table.json": TABLE},
        ("gate_data.py",),
    ),
    "data_by_os_path": Layout(
        "import json, os\n\n\ndef table(name):\n"
        "    with open(os.path.join(os.path.dirname(__file__), '..', 'data', 'deep', name)) as f:\n"
        "        return json.load(f)",
        "table('table.json')['factor']",
        {"proj/data/deep/table.json": TABLE, "proj/data/deep/other.bin": "x"},
        ("gate_data.py",),
    ),
    "data_in_a_directory": Layout(
        "from pathlib import Path\nFILES = sorted((Path(__file__).parents[1] / 'data').glob('*.txt'))",
        "sum(float(f.read_text()) for f in FILES)",
        {"proj/data/a.txt": "1.0", "proj/data/b.txt": "2.0"},
        ("gate_data.py",),
    ),
    "data_by_resources": Layout(
        "import json\nfrom importlib import resources\nfrom importlib.resources import files",
        "json.loads(files(__package__).joinpath('table.json').read_text())['factor']"
        " * json.loads(files('proj.data').joinpath('other.json').read_text())['factor']"
        " * json.loads((resources.files('proj') / 'data' / 'other.json').read_text())['factor']",
        {
            "proj/layers/table.json": TABLE,
            "proj/data/other.json": TABLE,
            "proj/data/__init__.py": "",
            "proj/layers/__init__.py": "",
        },
        ("gate_data.py",),
    ),
    "third_party": Layout(
        "import numpy as np\ntry:\n    import no_such_package\nexcept ImportError:\n    no_such_package = None",
        "float(np.float64(2.0))",
        unchanged=True,
        requirements=("numpy",),
    ),
    "imported_by_a_constant_name": Layout(
        "import importlib\nyaml = importlib.import_module('yaml')",
        "len(yaml.safe_load('[1, 2]'))",
        unchanged=True,
        requirements=("PyYAML",),
    ),
}

TRAIN = '''"""Trains. All but the class stays here."""

from __future__ import annotations

import argparse
import json
import math, numpy as np
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import flat_artifacts
from helpers import FACTOR
from solidify.source import closure

parser = argparse.ArgumentParser()
parser.add_argument("output", type=Path)
args = parser.parse_args()
Path("was_here").touch()

# How much each size scales.
SIZES = {"small": 0.5}
SIZES["large"] = math.sqrt(FACTOR)
TABLE = json.loads((Path(__file__).parent / "table.json").read_text())
model = flat_artifacts.base()


def unneeded(size=args.output):
    return np.zeros(size)


def scale(name: str) -> float:  # looked up when it is called
    output = SIZES[name] * TABLE["factor"]
    return output * Base.SHARE


class Base(nn.Module):
    SHARE = 0.25


class GateOfMine(Base):
    """Scales."""

    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.original(hidden_states) * scale("large") + self.shift


GateOfMine.shift = 0.5

if __name__ == "__main__":
    carried = closure.collect([GateOfMine], reserved=flat_artifacts.RESERVED)
    assert carried.requirements == {}, carried.requirements
    flat_artifacts.save(args.output / "script", carried, [GateOfMine])
    loaded = AutoModelForCausalLM.from_pretrained(args.output / "script", trust_remote_code=True)
    carried = closure.collect([type(loaded), type(loaded.config)], reserved=flat_artifacts.RESERVED)
    flat_artifacts.save_again(args.output / "remote_code", carried, loaded)
'''

NOTEBOOK = '''
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
shell.run_cell("%load_ext autoreload\\nimport sys\\nimport torch\\nfrom torch import nn", store_history=True)
shell.run_cell("SHARE = 1.0\\n\\nclass Base(nn.Module):\\n    pass", store_history=True)
shell.run_cell("""%%time
from helpers import FACTOR
files = !ls
class Gate(Base):
    def forward(self, hidden_states):
        return missing
""", store_history=True)
shell.run_cell("class Broken(:", store_history=True)
shell.run_cell("""model = torch.nn.Linear(2, 2)
class Gate(Base):  # the one that counts
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states):
        return self.original(hidden_states) * share()
""", store_history=True)
shell.run_cell("SHARE = 0.5\\nSHARE += 0.25\\ndef share():\\n    return SHARE * FACTOR", store_history=True)
shell.run_cell("import torch\\nfrom torch import nn", store_history=True)
shell.run_cell("""
from pathlib import Path
import flat_artifacts
from solidify.source import closure
carried = closure.collect([Gate], reserved=flat_artifacts.RESERVED)
flat_artifacts.save(Path(sys.argv[1]) / "notebook", carried, [Gate])
""", store_history=True).raise_error()
'''
