"""The verbs about whose a directory is: what stands in it on purpose, whose code may run, who signed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solidify.command.quiet import start_verb

if TYPE_CHECKING:
    from rich.console import RenderableType

    from solidify.directory.adopting import Adopted
    from solidify.directory.manifest import Manifest
    from solidify.directory.signature import Signature

Chain = Annotated[
    list[Path] | None, typer.Option("--certificate-chain", help="Certificates in PEM, up to the root; repeatable.")
]


def adopt(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter or a merged model.")],
    files: Annotated[list[Path], typer.Argument(help="Names of files inside the directory.", show_default=False)],
) -> None:
    """Shows files that were put into a directory on purpose (or edited there), and lists them in its manifest."""
    with start_verb():
        from solidify.directory import adopting
        from solidify.system import console

    found = adopting.read(directory, files)
    console.print_all(_show_adopted(directory, found))
    adopting.keep(directory.resolve(), found)


def trust(
    directory: Annotated[Path, typer.Argument(help="An artifact that was built elsewhere; read its code first.")],
    forget: Annotated[bool, typer.Option("--forget", help="Ask again from now on.")] = False,
) -> None:
    """Lets an artifact's code, exactly as it stands, run on this machine from now on, without asking again."""
    with start_verb():
        from solidify.directory import trust as trusting
        from solidify.system import console

    record = trusting.trust(directory, forget=forget)
    console.print_all(_show_trusted(directory, record, forget=forget))


def sign(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter or a merged model.")],
    key: Annotated[Path, typer.Option("--key", help="A private key in PEM (P-256, P-384, P-521).", show_default=False)],
    certificate: Annotated[Path | None, typer.Option("--certificate", help="The key's certificate, in PEM.")] = None,
    certificate_chain: Chain = None,
) -> None:
    """Signs a directory, after comparing all of it with its manifest; the signature is written into it (model.sig)."""
    from solidify.directory import signing
    from solidify.system import console

    made = signing.sign(directory, key, certificate=certificate, certificate_chain=certificate_chain or ())
    console.print_all(_show_signed(directory, made, "is signed by"))


def verify(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter or a merged model.")],
    key: Annotated[Path | None, typer.Option("--key", help="The public key of who must have signed it.")] = None,
    certificate_chain: Chain = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The name that the certificate must have been issued to.")
    ] = None,
) -> None:
    """Says whether a directory is what somebody signed, every file of it; runs none of its code; exit code 1 if not."""
    from solidify.directory import signing
    from solidify.system import console

    found = signing.verify(directory, key, certificate_chain=certificate_chain or (), name=name)
    console.print_all(_show_signed(directory, found, "is as it was signed by"))


def _show_adopted(directory: Path, files: Sequence[Adopted]) -> Iterator[RenderableType]:
    """Shows what files hold, letter by letter, before they are listed, and what follows when they are."""
    from rich.text import Text

    from solidify.directory.manifest import SIGNATURE
    from solidify.system import console

    for file in files:
        how = "no text" if file.text is None else "as follows"
        if file.text is not None and len(file.text.encode()) < file.size:
            how = f"its first {len(file.text.encode())} bytes as follows"
        change = "" if file.before is None else " (listed with other contents until now)"
        yield console.line((f"{file.name}: {file.size} bytes, {how}{change}", "bold"))
        yield from (Text(f"  {_make_printable(line)}") for line in (file.text or "").splitlines())
        yield console.line((f"  blake3 {file.digest}", "dim"))
    if (directory / SIGNATURE).is_file():
        yield f"{SIGNATURE} signs the manifest as it was before, and does not hold any more; sign {directory} again"
    if any(file.name.endswith(".py") for file in files):
        yield "This is code: where the code of the directory was trusted, it runs from now on."


def _show_trusted(directory: Path, record: Manifest, *, forget: bool) -> Iterator[RenderableType]:
    """Shows which code was trusted, or is no more."""
    from solidify.system import console

    yield console.line(
        f"{directory}: its code {'asks again' if forget else 'runs here from now on, exactly as it stands'}"
    )
    yield from (console.line((f"  {name}  blake3 {digest}", "dim")) for name, digest in sorted(record.code.items()))


def _show_signed(directory: Path, found: Signature, how: str) -> Iterator[RenderableType]:
    """Shows whom a signature is by, and of how many files it is."""
    from solidify.system import console

    yield console.line(f"{directory} {how} {found.signer}: {len(found.files)} files")


def _make_printable(line: str) -> str:
    """Returns a line of a file with everything in it visible, whatever a terminal would make of it."""
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line)
