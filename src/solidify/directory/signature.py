"""The signature of a directory, read: whom it names and what it lists. Who made it is not said here (`signing.py`).

It is a bundle as the package `model-signing` writes it: a statement with the SHA-256 of every file, the manifest among
them, and who signed that. It is read strictly, with no entry and no byte to spare, so that all readers see one and the
same thing: what was read, written once more as `model-signing` writes it, must be the very file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solidify.directory import manifest
from solidify.directory.manifest import NAME, SIGNATURE, Manifest, shown
from solidify.errors import ArtifactError
from solidify.system import files, foreign

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_STATEMENT = "application/vnd.in-toto+json"
_PREDICATE = "https://model_signing/signature/v1.0"
_MATERIAL = {"key": "publicKey", "certificate": "x509CertificateChain"}
_NAMED, _LONGEST = 6, 120  # names in one sentence, letters of one


@dataclass(frozen=True)
class Signature:
    """What a signature says, whether or not it holds.

    `kind` is `key` or `certificate`, and `fingerprint` the SHA-256 of that: of the public key in PEM, as `sha256sum`
    has it, or of the certificate in DER, as `openssl x509 -fingerprint -sha256` has it. `names` are those that a
    certificate is for, once it was verified. `files` maps names to their SHA-256.
    """

    kind: str
    fingerprint: str
    files: dict[str, str]
    names: tuple[str, ...] = ()
    certificate: bytes = field(default=b"", repr=False)
    content: bytes = field(default=b"", repr=False)

    @property
    def signer(self) -> str:
        """Who signed, as far as the signature says it."""
        names = f" of {', '.join(map(shown, self.names))}" if self.names else ""
        return f"the {self.kind} sha256:{self.fingerprint}{names}"


def read(directory: Path) -> Signature:
    """Reads the signature of a directory.

    Raises:
        ArtifactError: there is none, it is no plain file or a large one, or no signature by a key or a certificate.
    """
    path = directory / SIGNATURE
    if not manifest.is_plain(path):
        raise ArtifactError(f"{directory} has no signature ({SIGNATURE})")
    files.require_regular(path, largest=manifest.LARGEST_SIGNATURE)
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error


def parse(content: bytes) -> Signature:
    """Reads a signature from the bytes of its file.

    Raises:
        ArtifactError: it is none, or none by a key or a certificate.
    """
    try:
        return _parse_bundle(_read_plain(content, indent=None), content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        words = str(error) if type(error) is ValueError else foreign.said(error)
        raise ArtifactError(
            f"{SIGNATURE} is not a model signature made with a key or a certificate: {words[:200]}"
        ) from error


def _parse_bundle(document: Any, content: bytes) -> Signature:
    media, material, envelope = _get_exactly(document, "mediaType", "verificationMaterial", "dsseEnvelope")
    payload, form, signatures = _get_exactly(envelope, "payload", "payloadType", "signatures")
    if media != _BUNDLE or form != _STATEMENT or len(signatures) != 1:
        raise ValueError("it has another form")
    value, unused = _get_exactly(signatures[0], "sig", "keyid")
    listed = _collect_resources(_read_plain(_decode_plain(payload), indent=2))
    kind = "certificate" if "x509CertificateChain" in material else "key"
    by, entries = _get_exactly(material, _MATERIAL[kind], "tlogEntries")
    if not _decode_plain(value) or unused != "" or entries != []:
        raise ValueError("it was made by a service, and is verified with one")
    if kind == "key":
        return Signature(kind, _require_digest(*_get_exactly(by, "hint")), listed, content=content)
    first, *_ = [_decode_plain(*_get_exactly(each, "rawBytes")) for each in _get_exactly(by, "certificates")[0]]
    return Signature(kind, hashlib.sha256(first).hexdigest(), listed, certificate=first, content=content)


def _read_plain(content: bytes, *, indent: int | None) -> Any:
    """Reads JSON that is written in its one plain form: a bundle without spaces, a statement with them."""
    found = json.loads(content.decode("utf-8"), object_pairs_hook=_require_unique)
    if json.dumps(found, indent=indent, separators=(",", ":" if indent is None else ": ")).encode() != content:
        raise ValueError("it is not written as model-signing writes it: some bytes were changed, or added")
    return found


def _require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a mapping whose keys stand there once."""
    if len(found := dict(pairs)) != len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"it holds {twice[:40]!a} twice")
    return found


def _collect_resources(statement: Any) -> dict[str, str]:
    """Returns the SHA-256 of every file that a statement lists."""
    if statement["predicateType"] != _PREDICATE or statement["predicate"]["serialization"]["method"] != "files":
        raise ValueError("its statement has another form; sign with solidify, or with model-signing's own command")
    found: dict[str, str] = {}
    for each in statement["predicate"]["resources"]:
        algorithm, digest, name = _get_exactly(dict(sorted(each.items())), "algorithm", "digest", "name")
        if algorithm != "sha256":
            raise ValueError("it lists digests that are not SHA-256")
        if _require_text(name) in found:
            raise ValueError(f"it lists {name!a} twice")
        found[name] = _require_digest(digest)
    return found


def _get_exactly(document: Any, *keys: str) -> Sequence[Any]:
    """Returns the entries of a mapping that has these, in this order, and no others."""
    if not isinstance(document, dict) or tuple(document) != keys:
        found = ", ".join(map(ascii, document)) if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"where it should have {', '.join(keys)}, it has {found or 'nothing'}")
    return [document[key] for key in keys]


def _require_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{ascii(value)[:40]} stands where a string is expected")
    return value


def _require_digest(value: Any) -> str:
    if not re.fullmatch("[0-9a-f]{64}", _require_text(value)):
        raise ValueError(f"{value[:40]!a} stands where a SHA-256 is expected")
    return str(value)


def _decode_plain(value: Any) -> bytes:
    """Reads base64 in its one plain form: every other byte is another text."""
    found = base64.b64decode(_require_text(value), validate=True)
    if base64.b64encode(found).decode() != value:
        raise ValueError("its base64 was changed")
    return found


def faults(record: Manifest, found: Signature) -> list[str]:
    """Says in what a signature is not one of this directory's manifest and of all files that it lists.

    That is no proof that it is: whether it holds is not looked at, and no file is read. The manifest is the one that
    was read, whatever stands in the directory by now.
    """
    listed = {NAME, *record.listed()}
    result = []
    for names, words in ((listed - found.files.keys(), "does not list"), (found.files.keys() - listed, "lists also")):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            result.append(
                f"{SIGNATURE} {words} {', '.join(shown(name[:_LONGEST]) for name in sorted(names)[:_NAMED])}{more}"
            )
    signed = found.files.get(NAME)
    if signed is not None and record.sha256 != signed:
        result.append(f"{SIGNATURE} signs another {NAME} than the one here; sign again, or remove {SIGNATURE}")
    return result


def belongs(directory: Path, record: Manifest) -> bool:
    """Returns whether the signature in a directory is one of its manifest, whoever made it."""
    try:
        return not faults(record, read(directory))
    except ArtifactError:
        return False
