"""The verbs that look at models and run none of their code: what one is made of, and how two differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solidify.builtin import names
from solidify.command.quiet import start_verb

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code of an artifact built elsewhere.")]


def inspect(
    model: Annotated[str, typer.Argument(help="A hub id, a directory, an artifact, or builtin:NAME.")],
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Shows the tree of a model's modules, repeated layers folded: sizes, FLOPs, and what can be a target."""
    names.refuse_unknown(model)
    with start_verb():
        from solidify.artifact import inspection
        from solidify.command import views
        from solidify.model.cost import cost
        from solidify.recipe import models
        from solidify.system import console

    loaded = models.skeleton(model, trust_remote_code=trust_remote_code)
    branches, total = inspection.tree(loaded), cost(loaded)
    name = type(loaded).__name__
    if as_json:
        console.write_json({"class": name, **total.document(), "modules": [branch.document() for branch in branches]})
        return
    console.print_all(views.inspection(name, branches, total))
    if getattr(loaded.config, "quantization_config", None) is not None:
        console.print_all(["Its files hold packed weights: shapes and sizes are those of the model before."])


def diff(
    a: Annotated[str, typer.Argument(help="A model or adapter directory, or builtin:NAME.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Shows what differs: configuration, code, modules, tensors, other files; runs none of their code."""
    for name in (a, b):
        names.refuse_unknown(name)
    with start_verb():
        from solidify.artifact import inspection
        from solidify.builtin import bases
        from solidify.command import views
        from solidify.system import console

    differences = inspection.diff(*(bases.directory(name) or Path(name) for name in (a, b)))
    if as_json:
        console.write_json(differences)
        return
    console.print_all(views.differences(differences))
