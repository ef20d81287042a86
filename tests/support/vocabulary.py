"""What the documents call by name: commands and options, Python names and their parameters, keys of recipes, modules.

Each function takes a text and returns what it names and is not there, as sentences; nothing where all is well.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import pydantic
import typer
from documents import ROOT

import solidify
from solidify import losses
from solidify.command.cli import app
from solidify.recipe import schema

SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
NAME = re.compile(r"(?<![\w./-])solidify((?:\.\w+)+)(?::(\w+))?")
FILES = (".py", ".json", ".md")
# Options that the documents name by themselves, and whose they are.
OTHERS = {
    "--cache": "benchmarks/scale.py",
    "--enforce-eager": "vLLM",
    "--keep": "benchmarks/scale.py",
    "--num_processes": "accelerate launch",
    "--public_key": "model_signing",
    "--signature": "model_signing",
    "--size": "benchmarks/scale.py",
}


def options() -> dict[str, set[str]]:
    """Returns the options of every verb of the command, and of the command itself under an empty name."""
    whole: Any = typer.main.get_command(app)
    commands = {"": whole, **whole.commands}
    return {name: {"--help", *(o for each in command.params for o in each.opts)} for name, command in commands.items()}


def wrong_commands(lines: Iterator[str] | list[str]) -> list[str]:
    """Judges command lines: of ours verbs and options, of our scripts options, make's targets, bare options."""
    known, wrong = options(), []
    for line in lines:
        words = [word.strip("[].") for word in shlex.split(line.replace("'", ""), comments=True)]
        named = [word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]
        ours = [place for place, word in enumerate(words) if word == "solidify"]
        if script := next((word for word in words if word.startswith("benchmarks/")), None):
            source = _read_script(ROOT / script)
            wrong += [f"{script} has no option {name}" for name in named if f'"{name}"' not in source]
        elif ours and len(words) > ours[0] + 1:
            verb = words[ours[0] + 1] if not words[ours[0] + 1].startswith("--") else ""
            behind = [word.partition("=")[0] for word in words[ours[0] :] if word.startswith("--")]
            wrong += [f"solidify has no verb {verb!r}"] if verb not in known else []
            wrong += [f"solidify {verb} has no option {name}" for name in behind if name not in known.get(verb, behind)]
        elif words[:1] == ["make"]:
            wrong += [f"make has no target {word}" for word in words[1:] if "=" not in word and word not in targets()]
        elif words and words[0].startswith("--"):
            everywhere = {*OTHERS, *(option for verb in known.values() for option in verb)}
            wrong += [f"no verb of solidify has an option {name}" for name in named if name not in everywhere]
    return wrong


def _read_script(path: Path) -> str:
    """Returns the text of a script, and of the files beside it that it imports: options may stand there."""
    text = path.read_text(encoding="utf-8")
    beside = (path.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE))
    return "\n".join([text, *(each.read_text(encoding="utf-8") for each in beside if each.is_file())])


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def spans(text: str) -> list[str]:
    """Returns the code within sentences."""
    return SPAN.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def wrong_options(text: str) -> list[str]:
    """Judges commands and options within sentences."""
    return wrong_commands([span for span in spans(text) if span.startswith(("solidify ", "--", "make "))])


def wrong_names(text: str) -> list[str]:
    """Judges dotted names, references `package.module:Name`, and attributes of public classes."""
    wrong = []
    for path, member in NAME.findall(text):
        if path.endswith(FILES):
            continue
        try:
            found = _resolve(f"solidify{path}")
            if member:
                getattr(found, member)
        except (AttributeError, ImportError):
            wrong.append(f"there is no solidify{path}{':' if member else ''}{member}")
    for span in spans(text):
        named = re.fullmatch(r"([A-Z]\w+)\.(\w+)", span)
        if named and named[1] in solidify.__all__ and not _has(getattr(solidify, named[1]), named[2]):
            wrong.append(f"{named[1]} has no {named[2]}")
        if (term := re.fullmatch(r"losses\.(\w+)", span)) and not hasattr(losses, term[1]):
            wrong.append(f"there is no loss {term[1]}")
    return wrong


def _resolve(name: str) -> Any:
    """Returns what a dotted name leads to: modules, then attributes."""
    found: Any = solidify
    path = "solidify"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


def _has(thing: Any, name: str) -> bool:
    fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    return hasattr(thing, name) or name in fields


def wrong_calls(code: str) -> list[str]:
    """Judges the keyword arguments of calls of public functions and classes; what is no Python has none."""
    try:
        tree = ast.parse(code.strip())
    except SyntaxError:
        return []
    wrong = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        if name not in solidify.__all__ or not (
            owner is None or (isinstance(owner, ast.Name) and owner.id == "solidify")
        ):
            continue
        parameters = inspect.signature(getattr(solidify, name)).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            given = [keyword.arg for keyword in call.keywords if keyword.arg]
            wrong += [f"{name} has no parameter {each!r}" for each in given if each not in parameters]
    return wrong


def wrong_keys(text: str) -> list[str]:
    """Judges keys of a recipe within sentences: `data.image`, `training.fsdp`."""
    from trl import DistillationConfig, DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

    wrong = []
    known = {name: set(section.model_fields) for name, section in sections().items()}
    kinds = (SFTConfig, DPOConfig, KTOConfig, RewardConfig, GRPOConfig, DistillationConfig)
    known["training"] = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for span in spans(text):
        named = re.fullmatch(r"(\w+)\.(\w+)", span)
        if named and named[1] in known and named[2] not in known[named[1]]:
            wrong.append(f"a recipe's section {named[1]} has no key {named[2]}")
    return wrong


def sections() -> dict[str, type[pydantic.BaseModel]]:
    """Returns the sections of a recipe that are no lists."""
    found = {}
    for name, field in schema.Recipe.model_fields.items():
        if str(field.annotation).startswith("list"):
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if inspect.isclass(kind) and issubclass(kind, pydantic.BaseModel):
                found[name] = kind
    return found


def wrong_links(text: str, directory: Path) -> list[str]:
    """Judges links, pictures and HTML's references to files, and to headings within them; code has none."""
    wrong = []
    prose = SPAN.sub("", _without_blocks(text))
    for target, heading in [*_LINK.findall(prose), *_REFERENCE.findall(prose), *_HTML.findall(prose)]:
        file = directory / target if target else None
        if file is not None and not file.exists():
            wrong.append(f"there is no {target}")
        elif heading and heading not in headings(documents.text_of(file) if file else text):
            wrong.append(f"there is no heading {target}#{heading}")
    return wrong


_TARGET = r"(?![a-z+]+:)([^)#\s\"<>]*)(?:#([^)\s\"<>]+))?"  # not what has a scheme
_LINK = re.compile(r"\]\(<?" + _TARGET)
_REFERENCE = re.compile(r"^\[[^\]]+\]:\s+" + _TARGET, re.MULTILINE)
_HTML = re.compile(r"\b(?:href|src)=\"" + _TARGET)


def headings(text: str) -> set[str]:
    """Returns the headings as addresses, as GitHub makes them: the second of one name ends in -1."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#+ (.*)$", _without_blocks(text), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        address = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found[address] = found.get(address, -1) + 1
    return {address + (f"-{number}" if number else "") for address, last in found.items() for number in range(last + 1)}


def _without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


STACK = ("accelerate", "datasets", "huggingface_hub", "pandas", "peft", "torch", "transformers", "trl")
_OPTIONAL = rb"import_module|find_spec|import_optional_dependency|_available|__import__"


def importers(names: set[str]) -> dict[str, list[str]]:
    """Returns which files of the stack import a top-level module of one of these names, if only where it is there."""
    any_name = b"(" + b"|".join(name.encode() for name in sorted(names)) + b")"
    statement = re.compile(
        rb"^\s*(?:import " + any_name + rb"\b(?=[\s.,]*(?:as |$|\.|,|#))|from " + any_name + rb"(?:\.\w+)* import)|"
        rb"(?:" + _OPTIONAL + rb")\(\s*[\"']" + any_name + rb"[\"'.]",
        re.MULTILINE,
    )
    found: dict[str, list[str]] = {}
    for package in STACK:
        specification = importlib.util.find_spec(package)
        for path in sorted(Path(specification.origin).parent.rglob("*.py")):
            source = path.read_bytes()
            if not any(name.encode() in source for name in names):
                continue
            for match in statement.finditer(source):
                name = next(group for group in match.groups() if group).decode()
                found.setdefault(name, []).append(f"{package}/{path.name}")
    return found
