"""One command, one verb per stage. Heavy imports stand inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


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
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Where results go, instead of the recipe's `output`.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the recipe: training.max_steps=10.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code of an artifact built elsewhere.")]
Base = Annotated[str | None, typer.Option("--base", help="Where the adapter's base is now, if it moved.")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy weight files that stay as they are; no hard links.")]
Chain = Annotated[
    list[Path] | None, typer.Option("--certificate-chain", help="Certificates in PEM, up to the root; repeatable.")
]
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


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A hub id, a directory, an artifact, or builtin:NAME.")],
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Shows the tree of a model's modules, repeated layers folded: sizes, FLOPs, and what can be a target."""
    with _start_verb():
        from solidify.artifact import inspection
        from solidify.command import views
        from solidify.model.cost import cost
        from solidify.recipe import models

    loaded = models.skeleton(model, trust_remote_code=trust_remote_code)
    branches, total = inspection.tree(loaded), cost(loaded)
    name = type(loaded).__name__
    if as_json:
        _print_json({"class": name, **total.document(), "modules": [branch.document() for branch in branches]})
        return
    _print_results(views.inspection(name, branches, total))


@app.command()
def plan(recipe: RecipeFile, set_: Set = None, as_json: AsJson = False) -> None:
    """Shows what a recipe would do: edits, the exact trainable set, costs, the code to be written. Writes nothing."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.command import views
        from solidify.recipe import dry_run

    planned = dry_run.plan(loaded).document()
    if as_json:
        _print_json(planned)
        return
    _print_results(views.plan(planned))


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
    recipe: RecipeFile, output: Output = None, set_: Set = None, resume: Resume = False, copy: Copy = False
) -> None:
    """Runs every stage that the recipe names: build, train, check, merge, report."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.errors import SolidifyError
        from solidify.recipe import stages

    directory = stages.output_of(loaded, output)
    with _explain_resuming(directory, "run", recipe, output, set_):
        report = directory / "report.json"
        before = _read_stamp(report)
        try:
            stages.run(loaded, directory, resume=resume, link=not copy)
        except SolidifyError:
            if _read_stamp(report) != before:  # what this command found, not what an earlier one did
                _show_file(report)
            raise
        _show_file(report)


@app.command()
def build(recipe: RecipeFile, output: Output = None, set_: Set = None, copy: Copy = False) -> None:
    """Does the surgery, and writes and verifies the artifact: OUTPUT/artifact."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.recipe import stages

    report = stages.build_alone(loaded, stages.output_of(loaded, output), link=not copy)
    _show_report(report.document())
    report.require()


@app.command()
def train(recipe: RecipeFile, output: Output = None, set_: Set = None, resume: Resume = False) -> None:
    """Trains an adapter on a built artifact: OUTPUT/artifact -> OUTPUT/adapter."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.recipe import stages

    directory = stages.output_of(loaded, output)
    with _explain_resuming(directory, "train", recipe, output, set_):
        report = stages.train(loaded, directory, resume=resume)
    _show_report(report.document())
    report.require()


@app.command()
def heal(
    recipe: RecipeFile,
    output: Output = None,
    set_: Set = None,
    resume: Resume = False,
    copy: Copy = False,
    share: Annotated[
        str | None,
        typer.Option("--share", help="Align this part of the modules alone, as 1/4; put together by a heal without."),
    ] = None,
) -> None:
    """Brings a built artifact back to its base, as the recipe's `heal` says: OUTPUT/artifact -> OUTPUT/heal."""
    loaded = _load_recipe(recipe, set_)
    with _start_verb():
        from solidify.recipe import healing, stages

    directory = stages.output_of(loaded, output)
    part = healing.read_share(share)
    with _explain_resuming(directory, "heal", recipe, output, set_):
        report = stages.heal(loaded, directory, resume=resume, link=not copy, share=part)
    if part is None:
        _show_report(report.document())
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
) -> None:
    """Runs every check that applies to a directory, in a fresh process; exit code 1 if one fails."""
    with _start_verb():
        from solidify.checks.check import check as check_directory

    report = check_directory(directory, base=base, trust_remote_code=trust_remote_code, serve=serve, key=key)
    if as_json:
        _print_json(report.document())
    else:
        _show_report(report.document())
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="A trained adapter, of solidify or of plain PEFT.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the new model goes.")],
    base: Base = None,
    copy: Copy = False,
    trust_remote_code: Trust = False,
) -> None:
    """Merges an adapter into its base: a new artifact, or a stock model for plain PEFT, that loads without PEFT."""
    with _start_verb():
        from solidify.merging import export
        from solidify.system import console

    with console.stage("Merging"):
        merged = export.merge(adapter, output, base=base, link=not copy, trust_remote_code=trust_remote_code)
    _show_report({"subject": str(output), "stages": {"merge": [f.document() for f in merged.findings]}, "measured": {}})


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A model or adapter directory.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Shows what differs: configuration, code, modules, tensors, other files; runs none of their code."""
    with _start_verb():
        from solidify.artifact import inspection
        from solidify.command import views

    differences = inspection.diff(a, b)
    if as_json:
        _print_json(differences)
        return
    _print_results(views.differences(differences))


@app.command()
def adopt(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter or a merged model.")],
    files: Annotated[list[Path], typer.Argument(help="Names of files inside the directory.", show_default=False)],
) -> None:
    """Shows files that were put into a directory on purpose (or edited there), and lists them in its manifest."""
    with _start_verb():
        from solidify.command import views
        from solidify.directory import adopting

    found = adopting.read(directory, files)
    _print_results(views.adopted(directory, found))
    adopting.keep(directory.resolve(), found)


@app.command()
def trust(
    directory: Annotated[Path, typer.Argument(help="An artifact that was built elsewhere; read its code first.")],
    forget: Annotated[bool, typer.Option("--forget", help="Ask again from now on.")] = False,
) -> None:
    """Lets an artifact's code, exactly as it stands, run on this machine from now on, without asking again."""
    with _start_verb():
        from solidify.command import views
        from solidify.directory import trust as trusting

    record = trusting.trust(directory, forget=forget)
    _print_results(views.trusted(directory, record, forget=forget))


@app.command()
def sign(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter or a merged model.")],
    key: Annotated[Path, typer.Option("--key", help="A private key in PEM (P-256, P-384, P-521).", show_default=False)],
    certificate: Annotated[Path | None, typer.Option("--certificate", help="The key's certificate, in PEM.")] = None,
    certificate_chain: Chain = None,
) -> None:
    """Signs a directory, after comparing all of it with its manifest; the signature is written into it (model.sig)."""
    from solidify.command import views
    from solidify.directory import signing

    made = signing.sign(directory, key, certificate=certificate, certificate_chain=certificate_chain or ())
    _print_results(views.signed(directory, made, "is signed by"))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter or a merged model.")],
    key: Annotated[Path | None, typer.Option("--key", help="The public key of who must have signed it.")] = None,
    certificate_chain: Chain = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The name that the certificate must have been issued to.")
    ] = None,
) -> None:
    """Says whether a directory is what somebody signed, every file of it; runs none of its code; exit code 1 if not."""
    from solidify.command import views
    from solidify.directory import signing

    found = signing.verify(directory, key, certificate_chain=certificate_chain or (), name=name)
    _print_results(views.signed(directory, found, "is as it was signed by"))


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(help="An artifact.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="An adapter to put on it.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="The largest number of tokens to write.")
    ] = 64,
    trust_remote_code: Trust = False,
) -> None:
    """Continues a text greedily, to try the result."""
    with _start_verb():
        from solidify.adapter.storage import load
        from solidify.artifact.loading import load_tokenizer
        from solidify.command import generation
        from solidify.system import console

    model = load(directory, adapter, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    console.write(generation.continued(model, tokenizer, prompt, max_new_tokens))


@contextmanager
def _explain_resuming(
    directory: Path, verb: str, recipe: Path, output: Path | None, overrides: list[str] | None
) -> Iterator[None]:
    """Has an interruption say what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        from solidify.directory import results

        words = ["solidify", verb, str(recipe), *(["--output", str(output)] if output is not None else [])]
        words += [word for override in overrides or [] for word in ("--set", override)]
        raise KeyboardInterrupt(
            f"kept: {results.kept(directory)}; go on with: {shlex.join([*words, '--resume'])}"
        ) from error


@contextmanager
def _start_verb() -> Iterator[None]:
    """Imports what a verb needs, and leaves the screen to what solidify says.

    That is: no chatter and no notes to developers from the libraries below it. What is imported stays, so nothing is
    gained by looking through it for garbage, again and again meanwhile and once more at the end: a second or two.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        _quiet_libraries()
        yield
        _keep_what_is_there()
    finally:
        if collects:
            gc.enable()


@cache
def _keep_what_is_there() -> None:
    gc.freeze()  # once in a process: later there are models, which shall be found when they are garbage


def _quiet_libraries() -> None:
    import warnings

    import datasets
    from transformers import PreTrainedModel  # noqa: F401  # every verb needs it, some only later
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _load_recipe(path: Path, overrides: list[str] | None) -> Any:
    from solidify.recipe.schema import load

    return load(path, overrides)


def _print_json(document: Any) -> None:
    from solidify.system import console

    console.write_json(document)


def _print_results(shown: Iterable[Any]) -> None:
    from rich.text import Text

    from solidify.system import console

    for each in shown:
        console.results.print(each, soft_wrap=isinstance(each, (str, Text)))


def _read_stamp(path: Path) -> tuple[int, int] | None:
    found = path.stat() if path.is_file() else None
    return (found.st_ino, found.st_mtime_ns) if found is not None else None


def _show_file(path: Path) -> None:
    from solidify.system import files

    if path.is_file():
        _show_report(files.document(path))


def _show_report(document: dict[str, Any]) -> None:
    """Shows a report's findings as a table."""
    from solidify import findings
    from solidify.system import console

    found = [(stage, findings.Finding.of(each)) for stage, listed in document["stages"].items() for each in listed]
    rows = [(stage, each.name, console.verdict(each.verdict), each.evidence) for stage, each in found]
    console.results.print(console.table(document["subject"], ("stage", "promise", "verdict", "evidence"), rows))
    verdicts = [each.verdict for _, each in found]
    console.results.print(findings.tell({word: verdicts.count(word) for word in findings.VERDICTS}))
    if document.get("finished") is False:
        console.results.print("not finished: the run was stopped before its last stage")
    for key, value in document["measured"].items():
        if isinstance(value, float):
            console.results.print(f"{key}: {value:.4f}")
