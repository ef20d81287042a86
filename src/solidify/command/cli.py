"""One command, one verb per stage. Heavy imports stand inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from solidify.artifact import fresh
from solidify.command import looking, publishing, starting, trusting, trying
from solidify.command.looking import AsJson, Trust
from solidify.command.quiet import start_verb as _start_verb
from solidify.weights import ahead


class _Interruptible(TyperGroup):
    """The command, which Ctrl-C ends with one line and the exit code that shells expect of it."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a verb; one that says more about its interruption has done so."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            from solidify.system import console

            console.message(f"interrupted; {str(error) or 'nothing half-written is left'}")
            raise typer.Exit(130) from error


app = typer.Typer(
    name="solidify",
    cls=_Interruptible,
    help="Change the architecture of a pretrained Hugging Face model, and prove that the result is solid.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Where results go, instead of the recipe's `output`; without either: build/RECIPE."
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the recipe: training.max_steps=10.")]
Base = Annotated[str | None, typer.Option("--base", help="Where the adapter's base is now, if it moved.")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy weight files that stay as they are; no hard links.")]
Layout = Annotated[
    str | None,
    typer.Option("--layout", help="How an adapter of others lays out experts, where nothing tells: peft, grouped."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show each proof, each generated file; else one line.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep finished stages and go on from the last checkpoint.")]


def _print_version(asked: bool) -> None:
    if asked:
        from solidify.system import console

        console.write(f"solidify {version('solidify')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Change the architecture of a pretrained Hugging Face model, and prove that the result is solid."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where results go.")] = Path("build/demo"),
) -> None:
    """The whole loop on an embedded tiny OLMoE, offline; ends with a table of what was proved."""
    with _start_verb():
        from solidify.demo import story

    story.tell(output)


app.command()(looking.inspect)
app.command()(starting.init)
app.command()(starting.schema)


@app.command()
def plan(recipe: RecipeFile, set_: Set = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Shows what a recipe would do: edits, the exact trainable set, costs, the code to be written. Writes nothing."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.command import views
        from solidify.recipe import dry_run

    planned = dry_run.plan(loaded).document()
    if as_json:
        _print_json(planned)
        return
    _print_results(views.plan(planned, verbose=verbose))


@app.command()
def data(
    recipe: RecipeFile,
    rows: Annotated[int, typer.Option("--rows", min=0, help="How many rows are shown.")] = 3,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Shows rows of a recipe's data as the model will read them: which tokens count for the loss, what is cut off."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.command import rows as rows_shown
        from solidify.recipe import showing

    shown = showing.show(loaded, rows)
    if as_json:
        _print_json(shown)
        return
    _print_results(rows_shown.tell(shown))


@app.command()
def run(
    context: typer.Context,
    recipe: RecipeFile,
    output: Output = None,
    set_: Set = None,
    resume: Resume = False,
    copy: Copy = False,
    verbose: Verbose = False,
) -> None:
    """Runs every stage that the recipe names: build, train, check, merge, report."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.errors import SolidifyError
        from solidify.recipe import build_stage, stages

    directory = build_stage.output_of(loaded, output)
    with _explain_resuming(context, directory):
        report = directory / "report.json"
        before = _read_stamp(report)
        try:
            stages.run(loaded, directory, resume=resume, link=not copy)
        except SolidifyError:
            if _read_stamp(report) != before:  # what this command found, not what an earlier one did
                _show_file(report, verbose)
            raise
        _show_file(report, verbose)


@app.command()
def build(
    context: typer.Context,
    recipe: RecipeFile,
    output: Output = None,
    set_: Set = None,
    copy: Copy = False,
    verbose: Verbose = False,
) -> None:
    """Does the surgery, and writes and verifies the artifact: OUTPUT/artifact."""
    loaded = _load_recipe(recipe, set_)
    with fresh.begun(bool(loaded.surgery)):
        with _start_verb():
            from solidify.recipe import build_stage

        directory = build_stage.output_of(loaded, output)
        with _explain_repeating(context):
            report = build_stage.build_alone(loaded, directory, link=not copy)
    _show_report(report.document(), verbose)
    report.require()


@app.command()
def train(
    context: typer.Context,
    recipe: RecipeFile,
    output: Output = None,
    set_: Set = None,
    resume: Resume = False,
    verbose: Verbose = False,
) -> None:
    """Trains an adapter on a built artifact: OUTPUT/artifact -> OUTPUT/adapter."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.recipe import build_stage, stages

    directory = build_stage.output_of(loaded, output)
    with _explain_resuming(context, directory):
        report = stages.train(loaded, directory, resume=resume)
    _show_report(report.document(), verbose)
    report.require()


@app.command()
def heal(
    context: typer.Context,
    recipe: RecipeFile,
    output: Output = None,
    set_: Set = None,
    resume: Resume = False,
    copy: Copy = False,
    share: Annotated[
        str | None,
        typer.Option("--share", help="Align this part of the modules alone, as 1/4; put together by a heal without."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Brings a built artifact back to its base, as the recipe's `heal` says: OUTPUT/artifact -> OUTPUT/heal."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.recipe import build_stage, healing, stages

    directory = build_stage.output_of(loaded, output)
    part = healing.read_share(share)
    with _explain_resuming(context, directory):
        report = stages.heal(loaded, directory, resume=resume, link=not copy, share=part)
    if part is None:
        _show_report(report.document(), verbose)
        report.require()


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter, or the output of a run.")],
    serve: Annotated[
        Path | None,
        typer.Option(
            "--serve", help="A Python interpreter that has vLLM: it serves the artifact, and the outputs are compared."
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="A public key: the signature must have been made with its private key.")
    ] = None,
    base: Base = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Runs every check that applies to a directory, in a fresh process; exit code 1 if one fails."""
    with fresh.begun(fresh.is_artifact(directory)), ahead.begun(fresh.find_weights(directory, base)):
        with _start_verb():
            from solidify.checks.check import check as check_directory

        report = check_directory(directory, base=base, trust_remote_code=trust_remote_code, serve=serve, key=key)
    if as_json:
        _print_json(report.document())
    else:
        _show_report(report.document(), verbose)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def merge(
    context: typer.Context,
    adapter: Annotated[Path, typer.Argument(help="A trained adapter, of solidify or of plain PEFT.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the new model goes.")],
    base: Base = None,
    copy: Copy = False,
    layout: Layout = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Merges an adapter into its base: a new artifact, or a stock model for plain PEFT, that loads without PEFT."""
    with fresh.begun(fresh.is_on_artifact(adapter, base)):
        with _start_verb():
            from solidify.findings import Report
            from solidify.merging import export
            from solidify.system import console

        with _explain_repeating(context), console.stage("Merging"):
            merged = export.merge(
                adapter, output, base=base, link=not copy, trust_remote_code=trust_remote_code, layout=layout
            )
    report = Report(str(output), {"merge": merged.findings})
    _show_report(report.document(), verbose)
    report.require()


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="An artifact, merged or not; or an adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the other form goes.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="stock: the plain model of the family; onnx; a dtype (bfloat16); nf4, int8: packed; of an adapter the "
            "layout of its experts: peft, grouped, lists, stacked.",
        ),
    ] = "stock",
    base: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Writes an artifact in a form that other programs read, and compares it with the artifact."""
    with _start_verb():
        from solidify.exporting import forms
        from solidify.findings import Report

    made = forms.export(directory, output, form, base=base, trust_remote_code=trust_remote_code)
    report = Report(str(output), {"export": made.findings})
    _show_report(report.document())
    report.require()


app.command()(looking.diff)

for _verb in (trusting.adopt, trusting.trust, trusting.sign, trusting.verify):
    app.command()(_verb)

app.command()(publishing.push)


app.command()(trying.generate)


@contextmanager
def _explain_resuming(context: typer.Context, directory: Path) -> Iterator[None]:
    """Has an interruption say what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        from solidify.directory import results

        again = _write_command(context, resume=True)
        raise KeyboardInterrupt(f"kept: {results.kept(directory)}; go on with: {again}") from error


@contextmanager
def _explain_repeating(context: typer.Context) -> Iterator[None]:
    """Has an interruption of what is done wholly or not at all say how to do it again."""
    try:
        yield
    except KeyboardInterrupt as error:
        again = _write_command(context)
        raise KeyboardInterrupt(f"nothing half-written is left; start it again with: {again}") from error


def _write_command(context: typer.Context, **changed: Any) -> str:
    """Writes the command line that a verb was called with, every argument and option of it, and what is `changed`."""
    arguments, options = [], []
    for parameter in context.command.params:
        name = str(parameter.name)
        value = changed.get(name, context.params.get(name))
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if parameter.param_type_name == "argument":
                arguments.append(str(each))
            elif each not in (None, False):
                options += [max(parameter.opts, key=len), *([] if each is True else [str(each)])]
    return shlex.join(["solidify", str(context.info_name), *arguments, *options])


def _load_recipe(path: Path, overrides: list[str] | None) -> Any:
    from solidify.recipe.schema import load
    from solidify.recipe.standing import refuse_missing

    loaded = load(path, overrides)
    refuse_missing(loaded)
    return loaded


def _print_json(document: Any) -> None:
    from solidify.system import console

    console.write_json(document)


def _print_results(shown: Iterable[Any]) -> None:
    from solidify.system import console

    console.print_all(shown)


def _read_stamp(path: Path) -> tuple[int, int] | None:
    found = path.stat() if path.is_file() else None
    return (found.st_ino, found.st_mtime_ns) if found is not None else None


def _show_file(path: Path, verbose: bool = False) -> None:
    from solidify.system import files

    if path.is_file():
        _show_report(files.document(path), verbose)


def _show_report(document: dict[str, Any], verbose: bool = False) -> None:
    """Shows a report's findings: each that is not proved, and those that are by stage, or one by one if `verbose`."""
    from solidify.command import views

    _print_results(views.report(document, verbose=verbose))
