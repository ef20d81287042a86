"""Fresh processes: as users have them, and as forks, which tests have (`forks.py`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forks
import pytest
from safetensors.torch import load_file, save_file

from solidify.artifact import certificate, fresh
from solidify.errors import ArtifactError
from solidify.system.alone import Alone

USUAL = {name: vars(Alone)[name] for name in forks.NAMES}  # read before any fixture replaces them


def findings(directory: Path) -> list[tuple[str, Any]]:
    return [(finding.name, finding.passed) for finding in certificate.witness(directory)]


def test_a_process_that_begins_anew_finds_what_a_fork_does(
    trash_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(trash_artifact, wrong)
    state = load_file(wrong / "model.safetensors")
    state[min(state)] += 1
    save_file(state, wrong / "model.safetensors", {"format": "pt"})
    in_forks = [findings(directory) for directory in (trash_artifact, wrong)]
    for name, method in USUAL.items():
        monkeypatch.setattr(Alone, name, method)
    assert [findings(directory) for directory in (trash_artifact, wrong)] == in_forks
    assert [all(passed is not False for _, passed in found) for found in in_forks] == [True, False]


@pytest.mark.parametrize("usual", [True, False], ids=["anew", "fork"])
def test_what_is_forbidden_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usual: bool) -> None:
    if usual:
        for name, method in USUAL.items():
            monkeypatch.setattr(Alone, name, method)
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nfor n in sys.argv[1:]:\n    sys.modules[n] = None\nimport peft\n")
    with Alone(script, fresh.FORBIDDEN) as process, pytest.raises(ArtifactError, match="import of peft halted"):
        process.ask({})


def test_a_process_that_began_early_is_had_by_who_asks_first(
    trash_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends with the block if nobody asked; what it finds is what any other finds."""
    for name, method in USUAL.items():
        monkeypatch.setattr(Alone, name, method)
    with fresh.begun(True):
        (early,) = fresh._begun
        with fresh.started() as first, fresh.started() as second:
            assert first is early is not second
            assert all(finding.passed is not False for finding in certificate.witness(trash_artifact, first))
        assert early._process.returncode is not None and not fresh._begun
    with fresh.begun(True):
        (unasked,) = fresh._begun
    assert unasked._process.returncode is not None and not fresh._begun
    with pytest.raises(RuntimeError), fresh.begun(True):
        (broken,) = fresh._begun
        raise RuntimeError
    assert broken._process.returncode is not None and not fresh._begun
    with fresh.begun(False):
        assert not fresh._begun


def test_it_begins_for_artifacts_alone(trash_artifact: Path, tmp_path: Path) -> None:
    """Whatever a manifest holds, it says no more than that."""
    assert fresh.is_artifact(trash_artifact) and not fresh.is_artifact(tmp_path)
    assert not fresh.is_on_artifact(trash_artifact, None) and not fresh.is_on_artifact(tmp_path, None)
    (tmp_path / "solidify.json").write_text(json.dumps({"kind": "adapter", "base": {"path": str(trash_artifact)}}))
    assert fresh.is_on_artifact(tmp_path, None) and not fresh.is_on_artifact(tmp_path, str(tmp_path))
    assert fresh.find_weights(tmp_path, None).samefile(trash_artifact)
    assert fresh.find_weights(tmp_path, str(tmp_path / "gone")) == tmp_path
    assert fresh.find_weights(trash_artifact, str(tmp_path)) == trash_artifact
    for text in ("[]", "{", '{"kind": ["artifact"]}', '{"base": "here"}', "\ud800", "[" * 100_000):
        (tmp_path / "solidify.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        assert not fresh.is_artifact(tmp_path) and not fresh.is_on_artifact(tmp_path, None)
    (tmp_path / "solidify.json").unlink()
    os.mkfifo(tmp_path / "solidify.json")  # who opened it would wait for a writer
    assert not fresh.is_artifact(tmp_path) and not fresh.is_on_artifact(tmp_path, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("import atexit; atexit.register(print, 'bye')", None),
        ("os.write(1, b'\\xff\\n'); os.write(2, b'\\xff\\n')", None),
        ("sys.stdout = None", None),
        ("if os.fork() == 0: time.sleep(60); os._exit(0)", None),
        ("sys.exit(0)", "ended with code 0 and no answer"),
        ("open(request['answer'], 'w').write('{'); os._exit(0)", "ended with code 0 and no answer"),
        ("os.kill(os.getpid(), 9)", "was ended by signal 9:\nit said nothing"),
        ("os.write(2, b'\\xff was it\\n'); os._exit(3)", "ended with code 3:\n\ufffd was it"),
    ],
)
def test_what_the_code_that_is_loaded_prints_or_leaves_behind_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: str | None
) -> None:
    for name, method in USUAL.items():
        monkeypatch.setattr(Alone, name, method)
    script = tmp_path / "script.py"
    answer = "open(request['answer'], 'w').write(json.dumps({'found': request['number']}))"
    lines = ["import json, os, sys, time", "request = json.loads(sys.stdin.read())", words, answer]
    script.write_text("\n".join(lines))
    begun = time.monotonic()
    with Alone(script) as process:
        if said is None:
            assert process.ask({"number": 7}) == {"found": 7}
        else:
            with pytest.raises(ArtifactError, match=said):
                process.ask({"number": 7})
    assert time.monotonic() - begun < 30


def test_an_isolated_process_begins_another(tmp_path: Path) -> None:
    """What PYTHONPATH names is not imported there either."""
    (tmp_path / "sitecustomize.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nopen(json.loads(sys.stdin.read())['answer'], 'w').write('{}')")
    code = "import sys; from pathlib import Path; from solidify.system.alone import Alone\n"
    code += f"with Alone(Path({str(script)!r})) as process: print(process.ask({{}}))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for flag, ran in (("-I", False), ("-P", True)):
        subprocess.run([sys.executable, flag, "-c", code], env=environment, check=True)
        assert (tmp_path / "ran").exists() is ran


def test_a_relative_path_of_modules_leads_where_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in USUAL.items():
        monkeypatch.setattr(Alone, name, method)
    (tmp_path / "deps").mkdir()
    (tmp_path / "deps" / "library_of_theirs.py").write_text("NUMBER = 7")
    script = tmp_path / "script.py"
    found = "{'found': library_of_theirs.NUMBER, 'home': os.environ['HF_HOME']}"
    words = f"open(request['answer'], 'w').write(json.dumps({found}))"
    script.write_text(f"import json, os, sys, library_of_theirs\nrequest = json.loads(sys.stdin.read())\n{words}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["deps", str(tmp_path / "elsewhere")]))
    monkeypatch.setenv("HF_HOME", "home")
    with Alone(script) as process:
        assert process.ask({}) == {"found": 7, "home": str(tmp_path / "home")}
    monkeypatch.chdir(tmp_path / "deps")
    for empty in (f"{os.pathsep}/elsewhere", f"/elsewhere{os.pathsep}"):  # as Python reads it: where one is
        monkeypatch.setenv("PYTHONPATH", empty)
        with Alone(script) as process:
            assert process.ask({})["found"] == 7
    monkeypatch.setenv("PYTHONPATH", "")
    with Alone(script) as process, pytest.raises(ArtifactError, match="No module named 'library_of_theirs'"):
        process.ask({})
