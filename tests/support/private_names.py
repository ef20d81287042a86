"""Finds where the package uses a private name of a library: one with a leading underscore, or a global that it sets;
and those without an underscore that no package on the way to them exports, which no documentation has either.

Names of ours are told apart by what the package itself defines: members of its classes, private functions and values of
its modules. What a class of a library has as well (`_buffers`) is never taken for ours on another object than `self`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

LIBRARIES = ("transformers", "peft", "trl", "accelerate", "torch", "safetensors", "huggingface_hub", "liger_kernel")
OBJECTS = (  # of the libraries, what the package holds in its hands
    "torch.nn.BatchNorm1d",
    "torch.nn.Parameter",
    "torch.nn.parallel.DistributedDataParallel",
    "transformers.LlamaForCausalLM",
    "transformers.LlamaConfig",
    "transformers.PreTrainedTokenizerFast",
    "transformers.AttentionInterface",
    "transformers.AutoModel",
    "transformers.Trainer",
    "transformers.models.auto.auto_factory._LazyAutoMapping",
    "peft.PeftModel",
    "peft.LoraConfig",
    "peft.LoraModel",
    "peft.tuners.lora.layer.LoraLayer",
    "peft.utils.other.ModulesToSaveWrapper",
    "trl.SFTTrainer",
    "trl.DPOTrainer",
    "trl.experimental.gkd.GKDTrainer",
    "accelerate.Accelerator",
    "accelerate.data_loader.DataLoaderShard",
)
PUBLIC = {  # private by their underscore alone
    "_fields": "Python's documentation promises it for named tuples",
    "_exit": "Python's documentation has it, in `os`",
}
DOCUMENTED = {  # though no package exports them
    "peft.tuners.tuners_utils.BaseTuner": "PEFT's reference, page `tuners`",
    "peft.tuners.tuners_utils.BaseTunerLayer": "likewise",
    "transformers.image_utils.load_image": "transformers' pages on images load them by it",
    **{
        f"transformers.{logging}.{name}": "transformers' page `logging`"
        for logging in ("logging", "utils.logging")
        for name in ("disable_progress_bar", "set_verbosity_error")
    },
}
_JUDGED = ("transformers", "peft", "trl", "accelerate", "liger_kernel")  # whose packages export what is public
_BY_NAME = ("getattr", "hasattr", "setattr", "delattr")


def private(name: str | None) -> bool:
    """Returns whether a name begins with one underscore."""
    return name is not None and name not in PUBLIC and re.match(r"_[^_]", name) is not None


def defined(trees: Sequence[ast.Module]) -> set[str]:
    """Returns the private names that some files define: in their modules, in classes, and on `self`."""
    found = {name for tree in trees for name in _names(tree.body)}
    for tree in trees:
        found |= {name for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for name in own_members(n)}
    return {name for name in found if private(name)}


def own_members(cls: ast.ClassDef) -> set[str]:
    """Returns what a class defines in its body or stores on `self`."""
    stored = (n for n in ast.walk(cls) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return {*_names(cls.body), *(n.attr for n in stored if _is_self(n.value))}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _names(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


@cache
def _tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def forget() -> None:
    """Lets go what was parsed."""
    _tree.cache_clear()


@cache
def written(cls: type) -> frozenset[str]:
    """Returns the private names that a class's own code defines."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    tree = _tree(file) if file.endswith(".py") else ast.Module([], [])
    classes = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    return frozenset(name for node in classes for name in own_members(node) if private(name))


def members(cls: type) -> frozenset[str]:
    """Returns the private names of a class itself: of its attributes, and of what its code stores on `self`."""
    return written(cls) | {name for name in vars(cls) if private(name)}


def _of_libraries(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]


@cache
def foreign() -> frozenset[str]:
    """Returns the private names of the classes in OBJECTS, and of all that they derive from."""
    classes = [getattr(importlib.import_module(m), name) for m, _, name in (path.rpartition(".") for path in OBJECTS)]
    return frozenset(name for cls in classes for base in _of_libraries(cls) for name in members(base))


def uses(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str]]:
    """Yields line and name of every private name of a library in a file."""
    imported = set(_imported(tree))
    inside: dict[int, set[str]] = {}
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        inside |= dict.fromkeys(map(id, ast.walk(cls)), own_members(cls))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [*module.split("."), *(part for alias in node.names for part in alias.name.split("."))]
            yield from ((node.lineno, name) for name in names if private(name))
        elif isinstance(node, ast.Attribute):
            known = ours - foreign() | (inside.get(id(node), set()) if _is_self(node.value) else set())
            if private(node.attr) and node.attr not in known:
                yield node.lineno, node.attr
            if not isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name) and node.value.id in imported:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and private(node.arg):
            yield node.value.lineno, str(node.arg)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in _BY_NAME and len(node.args) > 1:
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and private(name) and name not in ours:
                yield node.lineno, name
            if node.func.id in ("setattr", "delattr") and getattr(node.args[0], "id", "") in imported:  # type: ignore[attr-defined]
                yield node.lineno, f"{node.args[0].id}.{name}"  # type: ignore[attr-defined]
        elif isinstance(node, ast.Subscript) and _is_dictionary(node.value):
            name = getattr(node.slice, "value", None)
            if isinstance(name, str) and private(name) and name not in ours:
                yield node.lineno, name
        else:
            yield from _words(node)


def _is_dictionary(node: ast.expr) -> bool:
    """Returns whether something is an object's own dictionary: `vars(thing)` or `thing.__dict__`."""
    called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "vars"
    return called or (isinstance(node, ast.Attribute) and node.attr == "__dict__")


def undocumented(tree: ast.Module) -> set[str]:
    """Returns the names of libraries in a file that no package exports: imported, or reached through a module."""
    modules: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = [(alias.asname or alias.name.partition(".")[0], alias) for alias in node.names]
            modules |= {name: alias.name if alias.asname else name for name, alias in roots}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}"
                for alias in node.names
                if _is_module(f"{node.module}.{alias.name}")
            }
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module":
            found |= {
                str(each.value) for each in node.args if isinstance(each, ast.Constant) and "." in str(each.value)
            }
    for node in ast.walk(tree):
        root, _, rest = ast.unparse(node).partition(".") if isinstance(node, ast.Attribute) else ("", "", "")
        if root in modules and re.fullmatch(r"[\w.]+", rest):
            found.add(f"{modules[root]}.{rest}")
    return {name for name in found if name.partition(".")[0] in _JUDGED and not _is_exported(name)} - {*DOCUMENTED}


@cache
def _split(path: str) -> tuple[tuple[ModuleType, ...], str]:
    """Returns the modules on a way, and the name in the last of them, if there is one (members of it are left out)."""
    root, *parts = path.split(".")
    modules = [importlib.import_module(root)]
    for part in parts:
        found = getattr(modules[-1], part, None)
        if not inspect.ismodule(found):
            try:  # one that nobody has imported yet
                found = importlib.import_module(f"{modules[-1].__name__}.{part}")
            except ImportError:
                return tuple(modules), part
        modules.append(found)
    return tuple(modules), ""


def _is_module(path: str) -> bool:
    try:
        return path.partition(".")[0] in _JUDGED and not _split(path)[1]
    except ImportError:
        return False


def _is_exported(path: str) -> bool:
    """Returns whether a package on the way to a name has it too; what has an underscore is found by `uses`."""
    try:
        modules, name = _split(path)
    except ImportError:
        return False
    return not name or name.startswith("_") or any(hasattr(m, "__path__") and hasattr(m, name) for m in modules)


def _words(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields private names that are given as texts, as to `getattr`; those with gaps too."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in foreign():
        yield node.lineno, node.value
    if isinstance(node, ast.JoinedStr):
        parts = [re.escape(str(v.value)) if isinstance(v, ast.Constant) else r"\w+" for v in node.values]
        said = "".join(part for part in parts if part != r"\w+")
        if (
            parts[0].startswith("_")
            and said.strip("_")
            and any(re.fullmatch("".join(parts), name) for name in foreign())
        ):
            yield node.lineno, "".join(parts)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yields the names that a file has from libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias for alias in node.names if alias.name.partition(".")[0] in LIBRARIES)
            yield from (alias.asname or alias.name.partition(".")[0] for alias in names)


def overridden(cls: type, package: str) -> set[tuple[str, str]]:
    """Returns class and name where the code of a class, or of one behind it, defines what a library's class has too."""
    theirs = {name for base in _of_libraries(cls) for name in members(base)}
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == package]
    return {(f"{base.__module__}.{base.__name__}", name) for base in own for name in written(base) & theirs}
