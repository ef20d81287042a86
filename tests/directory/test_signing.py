"""Signed directories: faults are refused, honest twins pass, and who has `model-signing` alone sees the same."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, signing, verifying
from signatures import SIGNED, Copy, Pair, hashes_of, solid

import solidify
from solidify.directory import manifest, signature, writing
from solidify.errors import ArtifactError, CheckFailed
from solidify.weights.hashing import digest_bytes
from training import awake

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def plain(mine: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model that was merged: few files, none of them code."""
    directory = tmp_path_factory.mktemp("plain") / "stock"
    pico.llama().save_pretrained(directory)
    weights = directory / "model.safetensors"
    names = {path.name: digest_bytes(path.read_bytes()) for path in directory.glob("*.json")}
    manifest.Manifest(
        kind="stock",
        base={},
        files=names,
        tensors=manifest.digest_cache.digests([weights]),
        headers={weights.name: manifest.format.header_digest(weights)},
    ).write(directory)
    solidify.sign(directory, mine.private)
    return directory


def agrees(directory: Path, public: Path) -> bool:
    """Says whether somebody who has `model-signing` alone accepts a directory, as its own command asks."""
    skipped = hashing.Config().set_ignored_paths(paths=[manifest.SIGNATURE], ignore_git_paths=True)
    config = verifying.Config().use_elliptic_key_verifier(public_key=public).set_hashing_config(skipped)
    try:
        config.verify(directory, directory / manifest.SIGNATURE)
    except ValueError:
        return False
    return True


def test_what_was_signed_is_verified_by_us_and_by_who_has_model_signing_alone(
    signed: Path, mine: Pair, copy_of: Copy
) -> None:
    directory = copy_of(signed, "elsewhere, under another name")
    found = solidify.verify(directory, mine.public)
    assert found.files.keys() == {manifest.NAME, *manifest.read(directory).listed()}
    assert found.fingerprint == hashes_of(mine.public)
    assert agrees(directory, mine.public)
    assert solidify.load(directory) is not None  # a signature is no stranger to any reader
    (directory / ".cache" / "huggingface").mkdir(parents=True)
    (directory / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert solidify.verify(directory, mine.public) == found
    assert agrees(directory, mine.public)


def test_the_command_of_model_signing_accepts_it(signed: Path, mine: Pair) -> None:
    words = ["verify", "key", signed, "--signature", signed / manifest.SIGNATURE, "--public_key", mine.public]
    done = subprocess.run([sys.executable, "-m", "model_signing", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr


def test_what_the_command_of_model_signing_signed_by_itself_is_verified(
    trash_artifact: Path, mine: Pair, copy_of: Copy
) -> None:
    directory = copy_of(trash_artifact)
    words = ["sign", "key", directory, "--signature", directory / manifest.SIGNATURE, "--private_key", mine.private]
    done = subprocess.run([sys.executable, "-m", "model_signing", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    solidify.verify(directory, mine.public)


def test_what_the_library_of_model_signing_signed_is_verified(
    trash_artifact: Path, mine: Pair, other: Pair, copy_of: Copy
) -> None:
    directory = copy_of(trash_artifact)
    skipped = hashing.Config().set_ignored_paths(paths=[manifest.SIGNATURE], ignore_git_paths=True)
    config = signing.Config().use_elliptic_key_signer(private_key=mine.private).set_hashing_config(skipped)
    config.sign(directory, directory / manifest.SIGNATURE)
    solidify.verify(directory, mine.public)
    with pytest.raises(CheckFailed, match="it was signed with the key"):
        solidify.verify(directory, other.public)


def test_one_changed_byte_of_any_file_is_refused(signed: Path, mine: Pair, copy_of: Copy) -> None:
    directory = copy_of(signed)
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > 9
    for path in files:
        content = path.read_bytes()
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises((CheckFailed, ArtifactError)):
            solidify.verify(directory, mine.public)
        path.write_bytes(content)
    solidify.verify(directory, mine.public)


def test_one_changed_byte_of_the_signature_is_refused(plain: Path, mine: Pair, copy_of: Copy) -> None:
    """Every byte of what is no payload, and of the payload the first, some, and the last."""
    directory = copy_of(plain)
    path = directory / manifest.SIGNATURE
    content = path.read_bytes()
    start, length = content.index(b'"payload":"') + 11, len(json.loads(content)["dsseEnvelope"]["payload"])
    inside = {start, start + length - 1, start + length - 2, start + length - 3, *range(start, start + length, 997)}
    for place in sorted({*range(len(content))} - {*range(start, start + length)} | inside):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckFailed):
            solidify.verify(directory, mine.public)
    path.write_bytes(content)
    solidify.verify(directory, mine.public)


def moved(directory: Path, old: str, new: str) -> None:
    (directory / old).rename(directory / new)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another name": (lambda d: moved(d, "trashcan_moe.py", "trashcan.py"), "trashcan_moe.py is missing"),
    "a name for the signature": (lambda d: moved(d, "model.sig", "other.sig"), "has no signature"),
    "an added file": (lambda d: (d / "more.txt").write_text("x"), "more.txt is a file that the manifest does not list"),
    "a missing file": (lambda d: (d / "README.md").unlink(), "README.md is missing"),
    "an edited card": (lambda d: (d / "README.md").write_text("x"), "README.md is not the file that was written"),
    "no signature": (lambda d: (d / "model.sig").unlink(), "has no signature"),
    "a link for the signature": (lambda d: linked(d / "model.sig"), "model.sig is a link"),
    "a pipe for the signature": (lambda d: (moved(d, "model.sig", "x"), os.mkfifo(d / "model.sig")), "a pipe"),
    "a large signature": (lambda d: os.truncate(d / "model.sig", 2**24 + 1), "no signature holds more than 16777216"),
    "no JSON": (lambda d: (d / "model.sig").write_text("{"), "is not a model signature"),
    "deep JSON": (lambda d: (d / "model.sig").write_text("[" * 100_000), "is not a model signature"),
    "other JSON": (lambda d: (d / "model.sig").write_text("[1]"), "is not a model signature"),
    "an adopted file": (lambda d: adopted(d), "signs another solidify.json"),
    "a forged manifest": (lambda d: forged(d), "signs another solidify.json"),
    "other weights": (lambda d: spoilt(d), "model.safetensors is not the file"),
}


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


def adopted(directory: Path) -> None:
    (directory / "NOTES.md").write_text("x")
    solidify.adopt(directory, ["NOTES.md"])


def forged(directory: Path) -> None:
    """Changes code, and the manifest with it."""
    with (directory / "trashcan_moe.py").open("a") as file:
        file.write("# mine\n")
    solidify.adopt(directory, ["trashcan_moe.py"])


def spoilt(directory: Path) -> None:
    """Changes the last byte of the weights: the manifest, whose digests are of tensors, is as it was signed."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_it_was_signed_is_refused(signed: Path, mine: Pair, copy_of: Copy, fault: str) -> None:
    directory = copy_of(signed, "artifact")
    spoil, words = FAULTS[fault]
    spoil(directory)
    with pytest.raises(CheckFailed, match=words):
        solidify.verify(directory, mine.public)
    if "link" not in fault and "pipe" not in fault and "no JSON" not in fault:
        assert not (directory / manifest.SIGNATURE).exists() or not outsider(directory, mine)


def outsider(directory: Path, mine: Pair) -> bool:
    with contextlib.suppress(Exception):
        return agrees(directory, mine.public)
    return False


def test_another_key_is_refused(signed: Path, mine: Pair, other: Pair, copy_of: Copy) -> None:
    with pytest.raises(CheckFailed, match=f"it was signed with the key sha256:{hashes_of(mine.public)}"):
        solidify.verify(signed, other.public)
    directory = copy_of(signed)
    solidify.sign(directory, other.private)  # takes the place of the first
    solidify.verify(directory, other.public)
    with pytest.raises(CheckFailed, match="it was signed with the key"):
        solidify.verify(directory, mine.public)


def test_a_signature_that_names_a_key_which_did_not_make_it_is_refused(
    signed: Path, mine: Pair, other: Pair, copy_of: Copy
) -> None:
    directory = copy_of(signed)
    solidify.sign(directory, other.private)
    path = directory / manifest.SIGNATURE
    path.write_text(path.read_text().replace(hashes_of(other.public), hashes_of(mine.public)))
    with pytest.raises(CheckFailed, match="was changed after it was signed, or was not signed with the key"):
        solidify.verify(directory, mine.public)


def test_a_signature_that_leaves_files_out_is_refused(trash_artifact: Path, mine: Pair, copy_of: Copy) -> None:
    """Another tool can sign less than all; it is valid, and no signature of this directory."""
    directory = copy_of(trash_artifact)
    skipped = hashing.Config().set_ignored_paths(paths=[manifest.SIGNATURE, "model.safetensors"])
    config = signing.Config().use_elliptic_key_signer(private_key=mine.private).set_hashing_config(skipped)
    config.sign(directory, directory / manifest.SIGNATURE)
    verifying.Config().use_elliptic_key_verifier(public_key=mine.public).verify(
        directory, directory / manifest.SIGNATURE
    )
    with pytest.raises(CheckFailed, match=r"does not list model\.safetensors"):
        solidify.verify(directory, mine.public)


def put(bundle: dict[str, Any], path: Path) -> None:
    """Writes a signature as model-signing writes its JSON."""
    path.write_text(json.dumps(bundle, separators=(",", ":")))


LOOSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "two statements": lambda b: b.update(dsse_envelope=b["dsseEnvelope"]),
    "an unknown entry": lambda b: b.update(more=1),
    "no name of a key": lambda b: b["verificationMaterial"]["publicKey"].update(hint=None),
    "another log": lambda b: b["verificationMaterial"].update(tlogEntries=[{}]),
    "a name for the signature": lambda b: b["dsseEnvelope"]["signatures"][0].update(keyid="x"),
    "two signatures": lambda b: b["dsseEnvelope"]["signatures"].extend(b["dsseEnvelope"]["signatures"]),
    "another form": lambda b: b["dsseEnvelope"].update(payloadType="text/plain"),
}


@pytest.mark.parametrize("loose", LOOSE)
def test_a_signature_with_an_entry_to_spare_is_refused(plain: Path, mine: Pair, copy_of: Copy, loose: str) -> None:
    """Two readers must not see two things in it."""
    directory = copy_of(plain)
    path = directory / manifest.SIGNATURE
    bundle = json.loads(path.read_text())
    put(bundle, path)
    solidify.verify(directory, mine.public)
    LOOSE[loose](bundle)
    put(bundle, path)
    with pytest.raises(CheckFailed, match="is not a model signature"):
        solidify.verify(directory, mine.public)


UNREAD: dict[str, Callable[[bytes], bytes]] = {
    "a line more": lambda b: b + b"\n",
    "a space before": lambda b: b" " + b,
    "a space inside": lambda b: b.replace(b":", b": ", 1),
    "a mark of bytes": lambda b: b"\xef\xbb\xbf" + b,
    "another encoding": lambda b: b.decode().encode("utf-16"),
    "a letter in escapes": lambda b: b.replace(b'"mediaType"', b'"mediaTyp\\u0065"', 1),
    "a sign in escapes": lambda b: b.replace(b"application/vnd", b"application\\/vnd", 1),
    "another envelope before": lambda b: b.replace(b"{", b'{"dsseEnvelope":{"payload":"ZXZpbA=="},', 1),
    "another payload before": lambda b: b.replace(b'{"payload"', b'{"payload":"ZXZpbA==","payload"', 1),
    "another hint before": lambda b: b.replace(b'{"hint"', b'{"hint":"x","hint"', 1),
    "the same envelope twice": lambda b: b[:-1] + b[b.index(b',"dsseEnvelope"') :],
    "its entries in another order": lambda b: json.dumps(
        dict(reversed(json.loads(b).items())), separators=(",", ":")
    ).encode(),
    "entries inside in another order": lambda b: (
        b.replace(b'"signatures"', b'"payloadType":"x","signatures"', 1)
        .replace(b'"payloadType":"application/vnd.in-toto+json",', b"", 1)
        .replace(b'"payloadType":"x"', b'"payloadType":"application/vnd.in-toto+json"', 1)
        .replace(b'"sig":', b'"keyid":"","sig":', 1)
        .replace(b',"keyid":""}', b"}", 1)
    ),
}


@pytest.mark.parametrize("unread", UNREAD)
def test_a_signature_with_a_byte_that_nobody_reads_is_refused(
    plain: Path, mine: Pair, copy_of: Copy, unread: str
) -> None:
    """Its JSON says the same, or the same to some; there is one way to write it."""
    directory = copy_of(plain)
    path = directory / manifest.SIGNATURE
    content = path.read_bytes()
    path.write_bytes(UNREAD[unread](content))
    assert path.read_bytes() != content
    with pytest.raises(CheckFailed, match="is not a model signature"):
        solidify.verify(directory, mine.public)
    path.write_bytes(content)
    solidify.verify(directory, mine.public)


STATED: dict[str, Callable[[str], str]] = {
    "another subject before": lambda s: s.replace("{", '{\n  "subject": [],', 1),
    "another list before": lambda s: s.replace('"resources"', '"resources": [],\n    "resources"', 1),
    "a letter in escapes": lambda s: s.replace('"solidify.json"', '"solidify.jso\\u006e"', 1),
    "no spaces": lambda s: json.dumps(json.loads(s)),
    "a line more": lambda s: s + "\n",
}


@pytest.mark.parametrize("stated", STATED)
def test_a_statement_that_two_readers_may_read_in_two_ways_is_refused(
    plain: Path, mine: Pair, copy_of: Copy, stated: str
) -> None:
    """Even if who has the key signed it: the signature is made anew over the other bytes, and holds."""
    directory = copy_of(plain)
    path = directory / manifest.SIGNATURE
    for change, words in ((lambda s: s, None), (STATED[stated], "is not a model signature")):
        bundle = json.loads(path.read_text())
        envelope = bundle["dsseEnvelope"]
        text = change(base64.b64decode(envelope["payload"]).decode()).encode()
        before = f"DSSEv1 {len(envelope['payloadType'])} {envelope['payloadType']} {len(text)} ".encode()
        key: Any = serialization.load_pem_private_key(mine.private.read_bytes(), None)
        envelope["payload"] = base64.b64encode(text).decode()
        envelope["signatures"][0]["sig"] = base64.b64encode(key.sign(before + text, ec.ECDSA(hashes.SHA256()))).decode()
        put(bundle, path)
        with pytest.raises(CheckFailed, match=words) if words else contextlib.nullcontext():
            solidify.verify(directory, mine.public)


def test_a_directory_that_is_not_what_was_written_is_not_signed(
    trash_artifact: Path, mine: Pair, copy_of: Copy
) -> None:
    for name, spoil in {
        "weights": spoilt,
        "card": lambda d: (d / "README.md").write_text("x"),
        "more": lambda d: (d / "more.txt").write_text("x"),
        "missing": lambda d: (d / "config.json").unlink(),
    }.items():
        directory = copy_of(trash_artifact, name)
        spoil(directory)
        with pytest.raises(ArtifactError, match="is not what was written"):
            solidify.sign(directory, mine.private)
        assert not (directory / manifest.SIGNATURE).exists(), name


def test_a_file_that_is_changed_while_it_is_signed_is_noticed(
    trash_artifact: Path, mine: Pair, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(trash_artifact)
    compared = manifest.faults

    def and_then(*arguments: Any, **more: Any) -> list[str]:
        found = compared(*arguments, **more)
        spoilt(directory)
        return found

    monkeypatch.setattr(manifest, "faults", and_then)
    with pytest.raises(ArtifactError, match="a file in it was changed meanwhile"):
        solidify.sign(directory, mine.private)
    assert not (directory / manifest.SIGNATURE).exists()


def test_what_stands_in_the_place_of_a_signature_is_not_lost(trash_artifact: Path, mine: Pair, copy_of: Copy) -> None:
    directory = copy_of(trash_artifact)
    (directory / manifest.SIGNATURE).write_text("my own notes")
    with pytest.raises(ArtifactError, match="that would replace a file"):
        solidify.sign(directory, mine.private)
    with pytest.raises(ArtifactError, match="is not listed by its manifest"):
        writing.refuse_foreign(directory)
    assert (directory / manifest.SIGNATURE).read_text() == "my own notes"


def test_a_signed_directory_is_still_ours_to_replace(signed: Path, copy_of: Copy) -> None:
    directory = copy_of(signed)
    writing.refuse_foreign(directory)
    adopted(directory)  # the signature is of what stood there before: somebody's own by now
    with pytest.raises(ArtifactError, match=r"model\.sig is not listed by its manifest"):
        writing.refuse_foreign(directory)


def test_what_a_killed_process_left_of_a_signature_is_swept(trash_artifact: Path, mine: Pair, copy_of: Copy) -> None:
    directory = copy_of(trash_artifact)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = directory / f".{manifest.SIGNATURE}.partial-{gone.stdout.strip()}"
    left.write_text("half")
    assert solidify.load(directory) is not None
    solidify.sign(directory, mine.private)
    assert not left.exists()
    assert agrees(directory, mine.public)


def test_who_adopts_a_file_is_told_that_the_signature_ends(
    signed: Path, mine: Pair, copy_of: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy_of(signed)
    (directory / "helper.py").write_text("x = 1\n")
    assert solid("adopt", directory, "helper.py") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "does not hold any more; sign" in told and "This is code" in told
    with pytest.raises(CheckFailed, match="sign again, or remove"):
        solidify.verify(directory, mine.public)


def test_a_signature_is_listed_by_no_manifest(signed: Path, copy_of: Copy) -> None:
    directory = copy_of(signed)
    with pytest.raises(ArtifactError, match="is the name of a signature"):
        solidify.adopt(directory, [manifest.SIGNATURE])
    record = manifest.read(directory)
    for name in ("model.sig", "MODEL.sig"):
        with pytest.raises(ArtifactError, match="is the name of a signature"):
            replace(record, files={**record.files, name: "0" * 64}).write(directory)


def test_an_adapter_and_the_parts_of_a_run_are_signed(trash_artifact: Path, mine: Pair, copy_of: Copy) -> None:
    directory = copy_of(trash_artifact, "out/artifact").parent
    solidify.save_adapter(awake(directory / "artifact"), directory / "adapter")
    with pytest.raises(ArtifactError, match=r"is the output of a run.*out/artifact or .*out/adapter"):
        solidify.sign(directory, mine.private)
    for part in ("artifact", "adapter"):
        solidify.sign(directory / part, mine.private)
        solidify.verify(directory / part, mine.public)
    assert solidify.load(directory / "artifact", directory / "adapter") is not None


def test_a_signature_of_a_base_does_not_travel(signed: Path, tmp_path: Path) -> None:
    model = pico.olmoe()
    model.save_pretrained(tmp_path / "base")
    shutil.copy(signed / manifest.SIGNATURE, tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    edits = solidify.replace(model, "lm_head", pico.wrappers.Scaled)
    directory = pico.artifact(model, edits, tmp_path / "artifact")
    assert not (directory / manifest.SIGNATURE).exists()


CHECKED: dict[str, tuple[Callable[[Path], object], bool, str | None, str]] = {
    "unsigned": (lambda d: (d / "model.sig").unlink(), False, "not looked at", "there is none to verify"),
    "signed": (lambda d: None, False, "not looked at", "it names the key sha256:"),
    "signed, with the key": (lambda d: None, True, "proved", "files are as the key sha256:"),
    "unsigned, with a key": (lambda d: (d / "model.sig").unlink(), True, "failed", "has no signature"),
    "of another manifest": (adopted, False, "failed", "signs another solidify.json"),
    "none at all": (lambda d: (d / "model.sig").write_text("x"), False, "failed", "is not a model signature"),
}


@pytest.mark.parametrize("case", CHECKED)
def test_check_says_whose_signature_is_there_and_proves_only_what_it_verified(
    plain: Path, mine: Pair, copy_of: Copy, case: str
) -> None:
    directory = copy_of(plain)
    spoil, with_key, verdict, words = CHECKED[case]
    spoil(directory)
    report = solidify.check(directory, key=mine.public if with_key else None)
    (found,) = [each for each in report.findings if each.name == SIGNED]
    assert found.verdict == verdict
    assert words in found.evidence
    assert report.passed == (verdict != "failed")


def test_no_code_of_a_directory_runs_whose_signature_does_not_hold(signed: Path, other: Pair) -> None:
    report = solidify.check(signed, key=other.public)
    assert [each.name for each in report.findings] == ["nothing was changed since it was written", SIGNED]
    assert not report.passed


def twins(signed: Path, copy_of: Copy) -> tuple[Path, Path, Path]:
    """Returns a signed directory, one like it whose code writes a file, and where that file would stand."""
    good, evil = copy_of(signed, "artifact"), copy_of(signed, "evil")
    canary = good.parent / "canary"
    code = evil / "trashcan_moe.py"
    code.write_text(f"open({str(canary)!r}, 'a').write('x')\n{code.read_text()}")
    solidify.adopt(evil, [code.name])
    return good, evil, canary


def exchange(one: Path, other: Path) -> None:
    one.rename(one.parent / "between")
    other.rename(one)
    (one.parent / "between").rename(other)


def test_what_check_runs_is_what_it_verified(
    signed: Path, mine: Pair, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signed directory stands there while its signature is looked at, and another before and after."""
    from solidify.directory import signing

    good, evil, canary = twins(signed, copy_of)
    looked = signing.findings

    def findings(*arguments: Any, **more: Any) -> list[solidify.Finding]:
        exchange(good, evil)
        try:
            return looked(*arguments, **more)
        finally:
            exchange(good, evil)

    monkeypatch.setattr(signing, "findings", findings)
    exchange(good, evil)
    report = solidify.check(good, key=mine.public, trust_remote_code=True)
    assert not canary.exists()
    assert [each.name for each in report.failed] == [SIGNED]
    assert f"signs another {manifest.NAME}" in report.failed[0].evidence


@pytest.mark.slow
def test_what_check_verified_and_then_is_exchanged_does_not_run(
    signed: Path, mine: Pair, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from solidify.directory import signing

    good, evil, canary = twins(signed, copy_of)
    looked = signing.findings

    def findings(*arguments: Any, **more: Any) -> list[solidify.Finding]:
        try:
            return looked(*arguments, **more)
        finally:
            exchange(good, evil)

    monkeypatch.setattr(signing, "findings", findings)
    with pytest.raises(ArtifactError, match="is not what was written"):
        solidify.check(good, key=mine.public, trust_remote_code=True)
    assert not canary.exists()
    monkeypatch.undo()
    exchange(good, evil)
    assert solidify.check(good, key=mine.public, trust_remote_code=True).passed


def test_check_reads_weights_once_without_a_key(signed: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature is looked at without a pass over the weights, which the manifest already takes."""
    directory = copy_of(signed)
    spoilt(directory)
    assert signature.belongs(directory, manifest.read(directory))  # says nothing of weights, and reads none
    report = solidify.check(directory)
    assert [each.name for each in report.findings] == ["nothing was changed since it was written", SIGNED]
    assert [each.verdict for each in report.findings] == ["failed", "not looked at"]


def test_the_command_says_who_signed_and_ends_in_one_where_it_does_not_hold(
    trash_artifact: Path, mine: Pair, other: Pair, copy_of: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy_of(trash_artifact)
    assert solid("sign", directory, "--key", mine.private) == 0
    assert f"is signed by the key sha256:{hashes_of(mine.public)}" in capsys.readouterr().out
    assert solid("verify", directory, "--key", mine.public) == 0
    assert f"is as it was signed by the key sha256:{hashes_of(mine.public)}" in capsys.readouterr().out
    assert solid("verify", directory, "--key", other.public) == 1
    assert solid("verify", directory) == 2
    assert solid("verify", directory.parent / "none", "--key", mine.public) == 2
    assert "is not verified" in capsys.readouterr().err


def test_a_statement_that_was_exchanged_is_refused(signed: Path, mine: Pair, copy_of: Copy) -> None:
    """A statement of a changed manifest, under the signature of the true one."""
    directory = copy_of(signed)
    adopted(directory)
    path = directory / manifest.SIGNATURE
    bundle = json.loads(path.read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    listed = {"solidify.json": directory / "solidify.json", "NOTES.md": directory / "NOTES.md"}
    kept = [each for each in statement["predicate"]["resources"] if each["name"] not in listed]
    new = [{"name": name, "algorithm": "sha256", "digest": hashes_of(file)} for name, file in listed.items()]
    statement["predicate"]["resources"] = sorted([*kept, *new], key=lambda each: each["name"])
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement, indent=2).encode()).decode()
    put(bundle, path)
    assert signature.belongs(directory, manifest.read(directory))  # it looks right, and is not
    with pytest.raises(CheckFailed, match="was changed after it was signed"):
        solidify.verify(directory, mine.public)
