"""The verb that hands results out: to the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solidify.command.quiet import start_verb

if TYPE_CHECKING:
    from solidify.artifact.pushing import Push


def push(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter or a merged model.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub: OWNER/NAME.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="For everybody; without it, a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show every file, and send nothing.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="Of an adapter: the id under which its base is on the hub.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")
    ] = False,
) -> None:
    """Uploads a directory to the hub, after comparing all of it with its manifest: its files and nothing else."""
    with start_verb():
        from solidify.artifact import pushing
        from solidify.system import console

    try:
        found = pushing.push(directory, repo, private=not public, dry_run=dry_run, base=base)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"nothing is committed to {repo}; start it again") from error
    if as_json:
        console.write_json(found.document())
        return
    for shown in _show(found, dry_run):
        console.results.print(shown)


def _show(found: Push, dry_run: bool) -> Iterator[Any]:
    """Shows every file with its size, what stays here, and what tells where somebody works."""
    from solidify.system import console

    rows = [(name, console.size(size)) for name, size in found.files.items()]
    rows.append((f"{len(found.files)} files", console.size(sum(found.files.values()))))
    yield console.table(found.repo, ("file", "size"), rows, numbers=(1,))
    for name, why in found.left.items():
        yield f"stays here: {name} ({why})"
    for name in found.removed:
        yield f"of an earlier push, removed there: {name}"
    for path in found.paths:
        yield f"names a path of this machine: {path}"
    seen = "private" if found.private else "public"
    yield f"Nothing was sent; it would be {seen}." if dry_run else f"{found.url} ({seen})"
