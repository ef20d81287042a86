"""Keys and certificates that people name: judged before they are used, each fault in one sentence.

`cryptography`, which comes with the extra `sign`, reads them; what is printed of a private key is its path.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from solidify.errors import ArtifactError
from solidify.system import files, foreign

PASSWORD = "SOLIDIFY_KEY_PASSWORD"  # opens an encrypted private key
LARGEST = 2**20  # bytes of a file of keys or certificates
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}  # that model-signing signs with


def private(path: Path) -> bytes | None:
    """Judges a private key to sign with, and returns the password that opens it, if it is encrypted.

    Raises:
        ArtifactError: it is no private key in PEM, is encrypted and not opened, or not on one of the curves.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read_key(path, "private key", wrong=("PUBLIC KEY", "CERTIFICATE"))
    opened, password = foreign.attempt(load_pem_private_key, content, None), None
    if isinstance(opened.error, TypeError):  # so it says that a password is wanted
        password = os.environ.get(PASSWORD, "").encode()
        if not password:
            raise ArtifactError(f"{path} is encrypted; put its password into the environment variable {PASSWORD}")
        opened = foreign.attempt(load_pem_private_key, content, password)
        if opened.error is not None:
            raise ArtifactError(f"{path} is encrypted, and {PASSWORD} does not open it") from opened.error
    if opened.error is not None:
        raise ArtifactError(f"{path} holds no private key in PEM that can be read") from opened.error
    _require_curve(path, opened.value)
    return password


def public(path: Path) -> str:
    """Judges a public key to verify with, and returns its fingerprint, as `sha256sum` has it.

    Raises:
        ArtifactError: it is no public key in PEM, or not on one of the curves.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    opened = foreign.attempt(load_pem_public_key, _read_key(path, "public key", wrong=("PRIVATE KEY", "CERTIFICATE")))
    if opened.value is None:
        raise ArtifactError(f"{path} holds no public key in PEM that can be read") from opened.error
    _require_curve(path, opened.value)
    pem = opened.value.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def certificates(path: Path) -> None:
    """Judges a file of certificates.

    Raises:
        ArtifactError: it holds none in PEM.
    """
    from cryptography.x509 import load_pem_x509_certificates

    opened = foreign.attempt(load_pem_x509_certificates, _read_key(path, "certificate", wrong=("PRIVATE KEY",)))
    if not opened.value:
        raise ArtifactError(f"{path} holds no certificate in PEM that can be read") from opened.error


def names(der: bytes) -> tuple[str, ...]:
    """Returns whom a certificate is for: the common names, then the alternative ones."""
    from cryptography import x509

    def read() -> list[str]:
        """Reads both kinds of names, in their order."""
        held = x509.load_der_x509_certificate(der)
        found = [str(each.value) for each in held.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        for extension in held.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                kinds = (x509.RFC822Name, x509.DNSName, x509.UniformResourceIdentifier)
                found += [each.value for each in extension.value if isinstance(each, kinds)]
        return found

    with foreign.calling("the certificate cannot be read", ArtifactError):
        return tuple(dict.fromkeys(read()))


def purpose_fault(der: bytes) -> str | None:
    """Returns why a certificate is not one to sign with: it names what it is for, and that is something else."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID as For

    with foreign.calling("the certificate cannot be read", ArtifactError):
        held = x509.load_der_x509_certificate(der).extensions
        purposes = [extension.value for extension in held if isinstance(extension.value, x509.ExtendedKeyUsage)]
        named = [each for purpose in purposes for each in purpose]
    if not named or {For.CODE_SIGNING, For.ANY_EXTENDED_KEY_USAGE} & set(named):
        return None
    usages = ", ".join(each.dotted_string for each in named)
    return f"its certificate is only for other uses (extended key usage {usages}), and not for signing code"


def _read_key(path: Path, what: str, wrong: tuple[str, ...]) -> bytes:
    files.require_regular(path, largest=LARGEST)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    for other in wrong:
        if f"{other}-----".encode() in content:
            raise ArtifactError(f"{path} is a {other.lower()}, and a {what} is needed here")
    return content


def _require_curve(path: Path, key: Any) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _CURVES:
        found = f"on the curve {curve}" if curve else f"of the kind {type(key).__name__}"
        raise ArtifactError(f"{path} is a key {found}; model-signing takes one on {', '.join(_CURVES.values())}")
