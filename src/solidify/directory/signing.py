"""Signatures: who stands for a directory, by a key or a certificate that lies here; nothing goes over a network.

The package `model-signing` (OpenSSF's; the extra `sign`) makes and verifies them, over the SHA-256 of every file and of
the manifest, so that whoever has that package alone can verify them too.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from solidify.directory import keys, manifest, ours, signature
from solidify.directory.manifest import LEFT_BY_TOOLS, LEFT_BY_TOOLS_IN, NAME, SIGNATURE, Manifest, shown
from solidify.directory.signature import Signature
from solidify.errors import ArtifactError, CheckFailed, refuse
from solidify.findings import Finding
from solidify.system import console, disk, foreign

SIGNED = "its signature holds"
_MISMATCH = re.compile(r"Hash mismatch for \\?'(.+?)\\?': Expected")  # in a list of Python's, as text
_LONGEST = 300  # letters of what a library says


def sign(
    directory: str | Path,
    key: str | Path,
    *,
    certificate: str | Path | None = None,
    certificate_chain: Sequence[str | Path] = (),
) -> Signature:
    """Signs the manifest of a directory and every file that it lists, after all of them were compared with it.

    The signature stands beside the manifest, in the place of an earlier one. `key` is a private key in PEM, on one of
    the curves P-256, P-384 and P-521; SOLIDIFY_KEY_PASSWORD opens one that is encrypted. With a `certificate` of that
    key, and the chain that leads to it, the signature carries them.

    Raises:
        ArtifactError: solidify did not write the directory, or it is not what its manifest says; the key or a
            certificate cannot be used; the package `model-signing` is not installed. Then nothing is written.
    """
    signing = _import_library().signing.Config()
    _let_sign(signing, Path(key), certificate, certificate_chain)
    directory = Path(directory).resolve()
    record = manifest.read(directory)
    _refuse_other(directory)
    _remove_drafts(directory)
    before = _collect_stamps(directory, record)
    with console.stage(f"Comparing {directory.name} with its manifest"):
        wrong = manifest.faults(directory, record, fresh=True)
        refuse(ArtifactError, f"{directory} is not signed: it is not what was written", wrong)
    with console.stage(f"Signing {directory.name}"), disk.temporary() as draft:
        with foreign.calling(f"{directory} cannot be signed", ArtifactError):
            signing.set_hashing_config(_configure_hashing()).sign(directory, draft / SIGNATURE)
        made = signature.parse((draft / SIGNATURE).read_bytes())
    wrong = signature.faults(record, made)
    if _collect_stamps(directory, record) != before:
        wrong.append("a file in it was changed meanwhile")
    refuse(ArtifactError, f"{directory} is not signed", wrong)
    _write_signature(directory, made.content)
    return made


def verify(
    directory: str | Path,
    key: str | Path | None = None,
    *,
    certificate_chain: Sequence[str | Path] = (),
    name: str | None = None,
) -> Signature:
    """Verifies the signature of a directory, with a public key in PEM, or with the certificates that one must lead to.

    The manifest and every file that it lists must be what was signed, and the directory must hold nothing else. `name`
    must be the certificate's common name, or one of its alternative names. None of the directory's code runs.

    Raises:
        CheckFailed: it is not signed, or not with that key or certificate, or something is not what was signed.
        ArtifactError: solidify did not write the directory; the key or a certificate cannot be used; the package
            `model-signing` is not installed.
    """
    require_usable(key, certificate_chain, name)
    directory = Path(directory).resolve()
    record = manifest.read(directory, closed=False)
    return verify_record(directory, record, key, certificate_chain=certificate_chain, name=name)


def verify_record(
    directory: Path,
    record: Manifest,
    key: str | Path | None = None,
    *,
    certificate_chain: Sequence[str | Path] = (),
    name: str | None = None,
) -> Signature:
    """Verifies the signature of a manifest that was read, so that whoever goes on with it goes on with what was signed.

    Otherwise as `verify`.

    Raises:
        CheckFailed: as `verify`, and where the signature is not of this very manifest.
        ArtifactError: as `verify`.
    """
    verifying = _import_library().verifying.Config()
    wanted = _let_verify(verifying, key, certificate_chain, name)
    wrong = manifest.faults(directory, record, weights=False)
    try:
        found = signature.read(directory)
        wrong += signature.faults(record, found)
        wrong += _by_another(found, wanted, None if key is None else Path(key))
    except ArtifactError as error:
        found, wrong = Signature("key", "", {}), [*wrong, str(error)]
    if not wrong:
        with console.stage(f"Verifying {directory.name}"):
            wrong = _find_differences(verifying, directory, found)
    if not wrong and found.kind == "certificate":
        found = replace(found, names=keys.names(found.certificate))
        fault = keys.purpose_fault(found.certificate)
        wrong = [fault] if fault is not None else []
        if name is not None and name not in found.names:
            wrong += [f"its certificate is for {', '.join(map(shown, found.names)) or 'nobody'}, and not for {name}"]
    refuse(CheckFailed, f"{directory} is not verified", wrong)
    return found


def require_usable(key: str | Path | None, chain: Sequence[str | Path] = (), name: str | None = None) -> None:
    """Raises ArtifactError when something could not be used to verify with: it, or the package, is not there or fit."""
    _let_verify(_import_library().verifying.Config(), key, chain, name)


def findings(directory: Path, record: Manifest, key: Path | None, *, intact: bool) -> list[Finding]:
    """Says whether a directory is signed and by whom; that it is, only of what was verified with a `key`.

    Without a key nothing is said of one that is not `intact` and not signed.
    """
    if key is not None:
        try:
            found = verify_record(directory, record, key)
        except CheckFailed as error:
            return [Finding(SIGNED, False, str(error))]
        return [Finding(SIGNED, True, f"{len(found.files)} files are as {found.signer} signed them")]
    if not os.path.lexists(directory / SIGNATURE):
        return [Finding.unseen(SIGNED, f"there is none to verify: no {SIGNATURE}")] if intact else []
    try:
        found = signature.read(directory)
    except ArtifactError as error:
        return [Finding(SIGNED, False, str(error))]
    if wrong := signature.faults(record, found):
        return [
            Finding(SIGNED, False, f"{'; '.join(wrong)} (it names {found.signer}); sign again, or remove {SIGNATURE}")
        ]
    option = "--key" if found.kind == "key" else "--certificate-chain"
    how = f"solidify verify {directory} {option} FILE"
    return [
        Finding.unseen(
            SIGNED, f"it names {found.signer}, but no key or certificate was given to compare it with: {how}"
        )
    ]


def _import_library() -> Any:
    logging.getLogger("model_signing").addHandler(logging.NullHandler())  # what it logs, it also raises
    try:
        return import_module("model_signing")
    except ImportError as error:
        raise ArtifactError(
            f"signatures need the package model-signing, which cannot be imported ({error}): "
            "pip install 'solidify[sign]'"
        ) from error


def _refuse_other(directory: Path) -> None:
    """Raises ArtifactError when a file that is not a signature has a signature's name, and would be lost."""
    if os.path.lexists(directory / SIGNATURE):
        try:
            signature.read(directory)
        except ArtifactError as error:
            raise ArtifactError(f"{directory} is not signed, since that would replace a file: {error}") from error


def _let_sign(signing: Any, key: Path, certificate: str | Path | None, chain: Sequence[str | Path]) -> None:
    """Gives a key to sign with to the library, once it was judged here."""
    password = keys.private(key)
    if certificate is None and chain:
        raise ArtifactError("a certificate chain needs the key's own certificate too: name it (--certificate)")
    if certificate is None:
        with foreign.calling(f"{key} cannot be used", ArtifactError):
            signing.use_elliptic_key_signer(private_key=key, password=password)
        return
    if password is not None:
        raise ArtifactError(f"{key} is encrypted, and model-signing cannot use an encrypted key with a certificate")
    for path in (certificate, *chain):
        keys.certificates(Path(path))
    with foreign.calling(f"{key} cannot be used with {certificate}", ArtifactError):
        signing.use_certificate_signer(private_key=key, signing_certificate=certificate, certificate_chain=chain)


def _let_verify(verifying: Any, key: str | Path | None, chain: Sequence[str | Path], name: str | None) -> str | None:
    """Gives what is verified with to the library, once it was judged here; returns the fingerprint of a key."""
    if (key is None) == (not chain):
        raise ArtifactError("name what to verify with: a public key (--key), or certificates (--certificate-chain)")
    if key is not None and name is not None:
        raise ArtifactError("a key names nobody; only certificates do (--certificate-chain)")
    verifying.set_ignore_unsigned_files(True)  # there are none: `manifest.strangers` refuses them, by every name
    if key is not None:
        fingerprint = keys.public(Path(key))
        with foreign.calling(f"{key} cannot be used", ArtifactError):
            verifying.use_elliptic_key_verifier(public_key=key)
        return fingerprint
    for path in chain:
        keys.certificates(Path(path))
    with foreign.calling(f"{', '.join(map(str, chain))} cannot be used", ArtifactError):
        verifying.use_certificate_verifier(certificate_chain=list(chain))
    return None


def _by_another(found: Signature, wanted: str | None, key: Path | None) -> list[str]:
    """Says when a signature names another than the one to verify with."""
    kind = "certificate" if wanted is None else "key"
    if found.kind != kind:
        option = "--certificate-chain" if found.kind == "certificate" else "--key"
        return [f"it was signed with a {found.kind}: verify it with {option}"]
    if wanted is not None and found.fingerprint != wanted:
        return [f"it was signed with {found.signer}, and {key} is sha256:{wanted}"]
    return []


def _find_differences(verifying: Any, directory: Path, found: Signature) -> list[str]:
    """Has the library compare every file with what was signed, and that with the key; returns what is wrong."""
    with disk.temporary() as draft, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls what is deprecated
        (draft / SIGNATURE).write_bytes(found.content)  # the bytes that were read here
        error = foreign.attempt(verifying.verify, directory, draft / SIGNATURE).error
    if error is None:
        return []
    if type(error).__name__ == "InvalidSignature":
        return [f"{SIGNATURE} was changed after it was signed, or was not signed with {found.signer} that it names"]
    if type(error).__name__ == "X509StoreContextError":
        return [f"{found.signer} does not lead to the given certificates: {error}"]
    if str(error).startswith("Signature mismatch"):
        names = [name for name in _MISMATCH.findall(str(error)) if name in found.files]
        return [f"{shown(name)} is not the file that was signed" for name in names] or [
            "its files are not the signed ones"
        ]
    return [f"it cannot be verified: {foreign.said(error)[:_LONGEST]}"]


def _configure_hashing() -> Any:
    """Returns how the library makes a list of all files: but of the signature, and of what may stand there unlisted."""
    config = _import_library().hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    return config.set_ignored_paths(paths=[SIGNATURE, *LEFT_BY_TOOLS, *LEFT_BY_TOOLS_IN], ignore_git_paths=False)


def _collect_stamps(directory: Path, record: Manifest) -> list[tuple[int, ...]]:
    """Returns what the system notes of every file; it sets the time of a change by itself."""
    found = [(directory / name).lstat() for name in (NAME, *record.listed())]
    return [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found]


def _write_signature(directory: Path, content: bytes) -> None:
    path = directory / SIGNATURE
    try:
        disk.write(path, content)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror}") from error


def _remove_drafts(directory: Path) -> None:
    """Removes drafts of manifests and signatures whose writers were killed; all else in a directory is signed."""
    for draft in (*directory.glob(f".{NAME}.*"), *directory.glob(f".{SIGNATURE}.*")):
        if ours.left(draft):
            with suppress(OSError):
                draft.unlink()
