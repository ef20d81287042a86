"""The verbs about whose a directory is: what stands in it on purpose, whose code may run, who signed it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solidify.command.quiet import start_verb

Chain = Annotated[
    list[Path] | None, typer.Option("--certificate-chain", help="Certificates in PEM, up to the root; repeatable.")
]


def adopt(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter or a merged model.")],
    files: Annotated[list[Path], typer.Argument(help="Names of files inside the directory.", show_default=False)],
) -> None:
    """Shows files that were put into a directory on purpose (or edited there), and lists them in its manifest."""
    with start_verb():
        from solidify.command import views
        from solidify.directory import adopting
        from solidify.system import console

    found = adopting.read(directory, files)
    console.print_all(views.adopted(directory, found))
    adopting.keep(directory.resolve(), found)


def trust(
    directory: Annotated[Path, typer.Argument(help="An artifact that was built elsewhere; read its code first.")],
    forget: Annotated[bool, typer.Option("--forget", help="Ask again from now on.")] = False,
) -> None:
    """Lets an artifact's code, exactly as it stands, run on this machine from now on, without asking again."""
    with start_verb():
        from solidify.command import views
        from solidify.directory import trust as trusting
        from solidify.system import console

    record = trusting.trust(directory, forget=forget)
    console.print_all(views.trusted(directory, record, forget=forget))


def sign(
    directory: Annotated[Path, typer.Argument(help="An artifact, an adapter or a merged model.")],
    key: Annotated[Path, typer.Option("--key", help="A private key in PEM (P-256, P-384, P-521).", show_default=False)],
    certificate: Annotated[Path | None, typer.Option("--certificate", help="The key's certificate, in PEM.")] = None,
    certificate_chain: Chain = None,
) -> None:
    """Signs a directory, after comparing all of it with its manifest; the signature is written into it (model.sig)."""
    from solidify.command import views
    from solidify.directory import signing
    from solidify.system import console

    made = signing.sign(directory, key, certificate=certificate, certificate_chain=certificate_chain or ())
    console.print_all(views.signed(directory, made, "is signed by"))


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
    from solidify.system import console

    found = signing.verify(directory, key, certificate_chain=certificate_chain or (), name=name)
    console.print_all(views.signed(directory, found, "is as it was signed by"))
