"""The verbs that help to write a recipe: one to start from, and the schema that editors use."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solidify.builtin import names
from solidify.command.quiet import start_verb

if TYPE_CHECKING:
    from solidify.recipe.drafting import Asked, Drafting

_OFFERED = 12


def init(
    model: Annotated[str, typer.Argument(help="A hub id, a directory, an artifact, or builtin:NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
    replace: Annotated[
        str | None,
        typer.Option(
            "--replace", help="What to replace: a module name, * for numbers; none for LoRA on the base as it is."
        ),
    ] = None,
    with_: Annotated[
        str | None, typer.Option("--with", help="By what: file.py:Name, or package.module:Name; left out, a gate.py.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A file to train on; left out, builtin:pydoc.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of a hub id.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that the model brings.")
    ] = False,
) -> None:
    """Writes a commented recipe with a model's own module names, which `plan` accepts; asks on a terminal only."""
    names.refuse_unknown(model)
    with start_verb():
        from solidify.recipe import drafting
        from solidify.system import console

    asked = drafting.Asked(model, output, revision, dtype, trust_remote_code, replace, with_, data)
    _refuse_standing(asked.files)
    with console.stage(f"Reading {model}"):
        drafting_of = drafting.Drafting(asked)
    if sys.stdin.isatty() and sys.stderr.isatty():
        drafting_of.asked = _ask(drafting_of)
    with console.stage("Planning the recipe"):
        made = drafting_of.write()
    _write_files(made)
    for path in made:
        console.write(str(path))
    if drafting_of.untaught:
        console.words.print(f"the training is commented out, because {drafting_of.untaught}")
    console.words.print(f"Next: solidify plan {output}")


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file to write, instead of printing.", show_default=False)
    ] = None,
) -> None:
    """Prints the JSON schema of a recipe, which editors complete and check keys with."""
    from solidify.recipe.json_schema import json_schema
    from solidify.system import console

    if output is None:
        console.write_json(json_schema())
    else:
        _write_files({output: json.dumps(json_schema(), indent=1) + "\n"})


def _refuse_standing(paths: Sequence[Path]) -> None:
    """Raises RecipeError when one of the files to be written is there: nothing of the user's is replaced."""
    from solidify.errors import RecipeError, refuse

    faults = [f"{path} exists; name another file (--output), or move it" for path in paths if path.exists()]
    refuse(RecipeError, "nothing is written", faults)


def _write_files(made: dict[Path, str]) -> None:
    """Writes what belongs together, the recipe last: where it stands, what it names stands too."""
    from solidify.errors import RecipeError
    from solidify.system import disk

    _refuse_standing(list(made))
    try:
        for path, text in reversed(made.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.write(path, text)
    except OSError as error:
        raise RecipeError(f"{error.filename} cannot be written: {error.strerror}") from error


def _ask(drafting: Drafting) -> Asked:
    """Asks for what no option said, with what is suggested as the answer to an empty line."""
    from solidify.recipe.drafting import NONE
    from solidify.system import console

    asked: Asked = drafting.asked
    answers: dict[str, Any] = {}
    if asked.replace is None and (targets := drafting.targets()):
        for number, branch in enumerate(targets[:_OFFERED], 1):
            console.words.print(f"{number:3} {branch.name}  {branch.kind} x {branch.times}")
        suggested = console.printable(targets[0].name)
        words = "Which modules are replaced (a number, a name, or none)"
        answer = typer.prompt(words, default=suggested, err=True)
        chosen = int(answer) - 1 if answer.isdecimal() else -1
        answers["replace"] = targets[chosen].name if 0 <= chosen < len(targets) else answer
    if asked.module is None and NONE not in (asked.replace, answers.get("replace")):
        words = "By which class (file.py:Name, package.module:Name; empty: a gate.py is written)"
        answers["module"] = typer.prompt(words, default="", show_default=False, err=True) or None
    if asked.data is None:
        answers["data"] = typer.prompt("File to train on (empty: built in)", default="", show_default=False, err=True)
    return replace(asked, **{key: value for key, value in answers.items() if value})
