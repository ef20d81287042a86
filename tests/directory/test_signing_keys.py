"""Whose signature it is: keys and certificates that cannot be used are refused, and those that fit say who signed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID as For
from model_signing import verifying
from signatures import SIGNED, Copy, Pair, pem, solid

import solidify
from solidify.directory import manifest, signature
from solidify.errors import ArtifactError, CheckFailed

pytestmark = pytest.mark.usefixtures("offline")


BAD: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "none": (lambda d: d / "none", "does not exist", "does not exist"),
    "a directory": (lambda d: d, "is a directory", "is a directory"),
    "a pipe": (lambda d: fifo(d / "pipe"), "is a pipe", "is a pipe"),
    "a device": (lambda d: Path("/dev/zero"), "is a device", "is a device"),
    "huge": (lambda d: huge(d / "huge"), "at most 1048576 are read", "at most 1048576 are read"),
    "empty": (lambda d: written(d / "empty", b""), "no private key in PEM", "no public key in PEM"),
    "no PEM": (lambda d: written(d / "text", b"\x00\xff" * 9), "no private key in PEM", "no public key in PEM"),
    "RSA": (lambda d: rsa_of(d), "is a key of the kind RSA", "is a private key, and a public key is needed"),
    "RSA, public": (lambda d: rsa_of(d, True), "is a public key, and a private key is needed", "of the kind RSA"),
    "Ed25519": (lambda d: pem(ed25519.Ed25519PrivateKey.generate(), d / "ed"), "of the kind Ed25519", "private key"),
    "another curve": (lambda d: pem(ec.generate_private_key(ec.SECP256K1()), d / "k"), "secp256k1", "private key"),
    "its public one": (lambda d: pem(ec.generate_private_key(ec.SECP256K1()).public_key(), d / "p"), "public", "256k1"),
}


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def huge(path: Path) -> Path:
    path.touch()
    os.truncate(path, 2**40)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def rsa_of(directory: Path, public: bool = False) -> Path:
    key = rsa.generate_private_key(65537, 1024)
    return pem(key.public_key() if public else key, directory / "rsa")


@pytest.mark.parametrize("case", BAD)
def test_a_key_that_cannot_be_used_is_refused_in_one_sentence(
    signed: Path, copy_of: Copy, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy_of(signed)
    before = (directory / manifest.SIGNATURE).read_bytes()
    make, to_sign, to_verify = BAD[case]
    key = make(tmp_path)
    for verb, words in (("sign", to_sign), ("verify", to_verify), ("check", to_verify)):
        assert solid(verb, directory, "--key", key) == 2
        said = capsys.readouterr()
        assert said.err.startswith("solidify: ") and said.err.count("\n") == 1, said.err
        assert words in said.err
        assert "Traceback" not in said.err and said.out == ""
    assert (directory / manifest.SIGNATURE).read_bytes() == before


def test_an_encrypted_key_is_opened_by_the_environment(
    trash_artifact: Path, copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ec.generate_private_key(ec.SECP521R1())
    locked, public = pem(key, tmp_path / "locked.pem", b"secret"), pem(key.public_key(), tmp_path / "locked.pub")
    directory = copy_of(trash_artifact)
    with pytest.raises(ArtifactError, match="is encrypted; put its password into the environment variable SOLIDIFY_K"):
        solidify.sign(directory, locked)
    monkeypatch.setenv("SOLIDIFY_KEY_PASSWORD", "wrong")
    with pytest.raises(ArtifactError, match="SOLIDIFY_KEY_PASSWORD does not open it"):
        solidify.sign(directory, locked)
    monkeypatch.setenv("SOLIDIFY_KEY_PASSWORD", "secret")
    solidify.sign(directory, locked)
    solidify.verify(directory, public)


def test_without_the_package_there_is_one_sentence(
    signed: Path, mine: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for words in (["sign", signed, "--key", mine.private], ["verify", signed, "--key", mine.public]):
        assert solid(*words) == 2
        assert capsys.readouterr().err.endswith("pip install 'solidify[sign]'\n")
    record = manifest.read(signed)
    assert signature.belongs(signed, record)  # who does not ask needs no package


@dataclass(frozen=True)
class Office:
    """A root, and the certificate of a key, which the root signed."""

    root: Path
    certificate: Path
    key: Path


def certified(
    directory: Path, name: str, *, usage: bool = True, purposes: tuple[x509.ObjectIdentifier, ...] = ()
) -> Office:
    above, below = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def made(subject: str, key: Any, ca: bool) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named(f"root of {name}"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=9))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(usage, False, not usage, *[False] * 2, ca, *[False] * 3), critical=True)  # type: ignore[call-arg]
        )
        if not ca:
            mail = x509.SubjectAlternativeName([x509.RFC822Name(f"{name}@example.org")])
            builder = builder.add_extension(mail, critical=False)
        if not ca and purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        return builder.sign(above, hashes.SHA256())

    directory.mkdir()
    paths = Office(directory / "root.pem", directory / "certificate.pem", pem(below, directory / "key.pem"))
    paths.root.write_bytes(made(f"root of {name}", above, True).public_bytes(serialization.Encoding.PEM))
    paths.certificate.write_bytes(made(name, below, False).public_bytes(serialization.Encoding.PEM))
    return paths


@pytest.fixture(scope="module")
def office(home: Path) -> Office:
    return certified(home / "office", "ada")


@pytest.fixture(scope="module")
def certificated(trash_artifact: Path, office: Office, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(shutil.copytree(trash_artifact, tmp_path_factory.mktemp("certificated") / "artifact"))
    solidify.sign(directory, office.key, certificate=office.certificate, certificate_chain=[office.root])
    return directory


def test_a_certificate_says_who_signed(certificated: Path, office: Office) -> None:
    for name in (None, "ada", "ada@example.org"):
        found = solidify.verify(certificated, certificate_chain=[office.root], name=name)
        assert found.names == ("ada", "ada@example.org")
    assert found.signer.endswith(" of ada, ada@example.org")
    config = verifying.Config().use_certificate_verifier(certificate_chain=[office.root])
    config.verify(certificated, certificated / manifest.SIGNATURE)
    (finding,) = [each for each in checked(certificated) if each.name == SIGNED]
    assert "it names the certificate sha256:" in finding.evidence and finding.verdict == "not looked at"


def checked(directory: Path) -> Iterator[solidify.Finding]:
    from solidify.directory import signing

    yield from signing.findings(directory, manifest.read(directory), None, intact=True)


def test_another_name_root_or_use_of_a_certificate_is_refused(
    certificated: Path, office: Office, mine: Pair, copy_of: Copy, tmp_path: Path
) -> None:
    with pytest.raises(CheckFailed, match=r"its certificate is for ada, ada@example\.org, and not for eve"):
        solidify.verify(certificated, certificate_chain=[office.root], name="eve")
    stranger = certified(tmp_path / "stranger", "ada")
    with pytest.raises(CheckFailed, match="does not lead to the given certificates"):
        solidify.verify(certificated, certificate_chain=[stranger.root])
    with pytest.raises(CheckFailed, match="was signed with a certificate: verify it with --certificate-chain"):
        solidify.verify(certificated, mine.public)
    useless = certified(tmp_path / "useless", "ada", usage=False)
    directory = copy_of(certificated)
    solidify.sign(directory, useless.key, certificate=useless.certificate, certificate_chain=[useless.root])
    with pytest.raises(CheckFailed, match="cannot be used for signing"):
        solidify.verify(directory, certificate_chain=[useless.root])


@pytest.mark.parametrize("more", [(), (For.CODE_SIGNING,)], ids=["servers alone", "code too"])
def test_a_certificate_for_servers_is_none_to_sign_with(
    trash_artifact: Path, copy_of: Copy, tmp_path: Path, more: tuple[x509.ObjectIdentifier, ...]
) -> None:
    holder = certified(tmp_path / "server", "ada", purposes=(For.SERVER_AUTH, *more))
    directory = copy_of(trash_artifact)
    solidify.sign(directory, holder.key, certificate=holder.certificate, certificate_chain=[holder.root])
    if more:
        assert solidify.verify(directory, certificate_chain=[holder.root]).names[0] == "ada"
        return
    with pytest.raises(CheckFailed, match=r"only for other uses .*, and not for signing code"):
        solidify.verify(directory, certificate_chain=[holder.root])


def test_certificates_that_do_not_fit_are_refused_before_anything_is_written(
    trash_artifact: Path, office: Office, mine: Pair, copy_of: Copy
) -> None:
    directory = copy_of(trash_artifact)
    with pytest.raises(ArtifactError, match=r"cannot be used with .*does not match"):
        solidify.sign(directory, mine.private, certificate=office.certificate)
    with pytest.raises(ArtifactError, match="holds no certificate in PEM"):
        solidify.sign(directory, mine.private, certificate=mine.public)
    with pytest.raises(ArtifactError, match="a certificate chain needs the key's own certificate"):
        solidify.sign(directory, mine.private, certificate_chain=[office.root])
    with pytest.raises(ArtifactError, match="a key names nobody"):
        solidify.verify(directory, mine.public, name="ada")
    assert not (directory / manifest.SIGNATURE).exists()
