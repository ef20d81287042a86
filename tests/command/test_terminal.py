"""What reaches the person at the keyboard: names of strangers as they are, one sentence for what goes wrong."""

from __future__ import annotations

import ast
import importlib.abc
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pico
import pytest
import tokenizers
import torch
import yaml
from rich.text import Text
from transformers import PreTrainedTokenizerFast

import solidify
from solidify import findings
from solidify.adapter import configured
from solidify.artifact import inspection, loading
from solidify.command import cli
from solidify.directory import manifest, trust
from solidify.directory.manifest import Manifest
from solidify.errors import AdapterError, ArtifactError, ModelError, RecipeError, SolidifyError
from solidify.merging import inputs
from solidify.recipe import schema
from solidify.surgery import replacing
from solidify.system import console, files
from test_fuzz import GOOD, run

EVIL = "[/red][bold]a\x1b[31m\x1b]0;title\x07\x9b2J\u202e:bug:\r"
SHOWN = r"[/red][bold]a\x1b[31m\x1b]0;title\x07\x9b2J\u202e:bug:\r"
# What their parents read as JSON.
CHILDREN = {"checks/adapter_alone.py", "checks/vllm_alone.py", "artifact/witness.py", "exporting/compared_alone.py"}
LONG = "n" * 5000


def steers(text: str) -> list[str]:
    return [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs")]


def says(words: str, *command: str, code: int = 2) -> str:
    ended, told = run(*command)
    assert ended == code and words in told, told[-2000:]
    assert "Traceback" not in told and "an unexpected error" not in told and not steers(told), told[-2000:]
    return told


@pytest.mark.parametrize(("pause", "lines"), [(0, 3), (30, 0)])
def test_a_file_is_told_how_far_long_work_is(
    pause: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_PAUSE", pause)
    with console.progress("Reading", 3) as advance:
        for number in range(3):
            advance(f"loss {number}")
    told = capsys.readouterr().err
    assert told.count("… Reading: ") == lines
    assert not lines or "… Reading: 2 of 3, loss 1\n" in told
    with console.bytes_progress("Writing", 3 * 2**28) as advance:
        for _ in range(3):
            advance(2**28)
    told = capsys.readouterr().err
    assert told.count("… Writing: ") == lines
    assert not lines or "… Writing: 537 MB of 805 MB\n" in told


def test_a_terminal_sees_the_bar_move_and_gets_no_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_PAUSE", 0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes what it writes to for a terminal
    monkeypatch.setattr(console, "words", type(console.words)(stderr=True))
    assert console.words.is_terminal
    with console.progress("Reading", 2) as advance:
        advance()
    assert "… Reading" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["words", "results"])
def test_nothing_that_is_printed_steers_the_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    to = getattr(console, name)
    to.print(EVIL, soft_wrap=True)
    to.print(console.line(EVIL, (EVIL, "red")), soft_wrap=True)
    to.print(console.table(EVIL, (EVIL,), [(EVIL,), (Text(f"b{EVIL}"),)]))
    to.print(console.source(EVIL, "python"), soft_wrap=True)
    with console.stage(EVIL), console.progress(EVIL, 2) as advance:
        advance(EVIL)
    console.message(EVIL)
    console.write(EVIL)
    told = "".join(capsys.readouterr())
    assert not steers(told), told
    assert told.count(SHOWN) >= 8, told
    to.print(Text(f"from a Text {EVIL}"), soft_wrap=True)
    to.print(Path(EVIL), soft_wrap=True)
    assert not steers("".join(capsys.readouterr()))


def test_what_is_coloured_on_purpose_is() -> None:
    told = {word: console.line(findings.label_of(word)) for word in findings.VERDICTS}
    assert [text.plain for text in told.values()].count("FAILED") == 1
    assert str(told[findings.FAILED].spans[0].style) == "red" and str(told[findings.PROVED].spans[0].style) == "green"
    assert console.line(findings.label_of("[red]odd")).plain == "[red]odd"


def test_words_of_people_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    words = "ünï\u00a0é 人\t👩\u200d🔬 [x]"
    console.write(words)
    console.results.print(words, soft_wrap=True)
    out = capsys.readouterr().out
    assert out.startswith(f"{words}\n") and "👩\u200d🔬 [x]" in out.splitlines()[1]


def test_json_is_escaped_as_json_is(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"a\x9b": [EVIL, "é人\U0001f600", "\U000e0001"]}
    console.write_json(document)
    out = capsys.readouterr().out
    assert json.loads(out) == document and not steers(out) and "é人\U0001f600" in out


def test_all_that_is_printed_passes_through_the_console() -> None:
    root = Path(solidify.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name in CHILDREN or name == "console.py":
            continue
        found += [f"{name}:{line}" for line in printing(path.read_text())]
    assert [place.partition(":")[0] for place in found] == ["__main__.py"], found  # Ctrl-C before there is a console


def printing(text: str) -> list[int]:
    """Lines of a module that print, or make a console, by themselves."""
    found = []
    for node in ast.walk(ast.parse(text)):
        call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if call in ("print", "Console", "rich.print", "pprint") or call.endswith((".stdout.write", ".stderr.write")):
            found.append(node.lineno)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("line", ["print(x)", "sys.stdout.write(x)", "Console().print(x)"])
def test_a_print_of_its_own_is_found(line: str) -> None:
    assert printing(line) == [1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a plain base, an adapter of plain PEFT for it, and an artifact with a tokenizer."""
    root = tmp_path_factory.mktemp("terminal")
    words = {"a": 3, "b": 4, "<unk>": 0, "<s>": 2, "<pad>": 1}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", eos_token="<s>")
    model = pico.llama(max_position_embeddings=64)
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    adapted = peft.get_peft_model(pico.llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor)
    adapted.save_pretrained(root / "plain")
    edits = replacing.replace(model, "**.mlp", pico.wrappers.Scaled)
    pico.artifact(model, edits, root / "artifact", tokenizer=tokenizer)
    return root


def copied(place: Path, tmp_path: Path, name: str = "artifact", to: str = "copy") -> Path:
    shutil.copytree(place / name, tmp_path / to)
    return tmp_path / to


def rewritten(directory: Path, **changes: Any) -> Path:
    """Changes the manifest of an artifact as a stranger would, with right digests."""
    record = replace(manifest.read(directory), **changes)
    record.write(directory)
    if record.kind == "artifact":
        trust.remember(record)
    return directory


def spoilt(directory: Path, name: str, **values: Any) -> Path:
    """Changes a JSON file of an artifact (None takes a key away), and lists it so."""
    document = {**json.loads((directory / name).read_text()), **values}
    text = json.dumps({key: value for key, value in document.items() if value is not None})
    (directory / name).write_text(text)
    listed = manifest.read(directory).files | {name: manifest.digest_file(directory / name)}
    return rewritten(directory, files=listed)


def test_names_of_directories_are_shown_as_they_are(place: Path, tmp_path: Path) -> None:
    odd = copied(place, tmp_path, to="[/red]\x1b[31m")
    told = says(r"[/red]\x1b[31m: its code runs here", "trust", str(odd), code=0)
    assert "wrappers" in told or ".py" in told
    says(r"[/red]\x1b[31m: its code asks again", "trust", "--forget", str(odd), code=0)


def test_a_report_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    finding = {"name": "[/red]", "passed": False, "evidence": "the tensor [/red]\x1b[2J is missing"}
    cli._show_report({"subject": "[/red]\x1b", "stages": {"check": [finding]}, "measured": {}})
    out = capsys.readouterr().out
    assert "[/red]\\x1b" in out and "\\x1b[2J is missing" in " ".join(out.split()) and not steers(out)


def test_diff_shows_classes_of_strangers_as_they_are(place: Path, tmp_path: Path) -> None:
    edits = [{**edit, "new_class": EVIL} for edit in manifest.read(place / "artifact").edits]
    odd = rewritten(copied(place, tmp_path), edits=edits)
    says(r"a\x1b[31m", "diff", str(place / "artifact"), str(odd), code=0)


def test_a_merge_into_a_name_with_markup_ends_well(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "[/red]"
    words = ("merge", str(place / "plain"), "--base", str(place / "base"), "--output", str(output))
    says("[/red]", *words, code=0)
    record = replace(manifest.read(output), versions={"solidify": "\x1b[31m1"})
    record.write(output)
    says(r"\x1b[31m1", *words, code=0)  # the line may break before it


def test_an_interruption_before_the_first_import_is_done_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "solidify.command.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "solidify.command.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert run("--version") == (130, "solidify: interrupted; nothing half-written is left\n")


def started(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    solid = f"{sys.executable} -m solidify"
    return subprocess.run(
        ["bash", "-c", command.replace("solidify", solid, 1)], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("solidify --version >&-", 0, ""),
        ("solidify --version 2>&-", 0, ""),
        ("solidify trust . >&- 2>&- <&-", 2, ""),
        ("solidify trust . 2>/dev/full", 2, ""),
        ("solidify --version >/dev/full", 2, "stdout cannot be written to: No space left on device"),
        ("mkdir gone && cd gone && rmdir ../gone && solidify trust x", 2, "was started in is gone"),
    ],
)
def test_odd_surroundings_end_in_a_sentence(tmp_path: Path, command: str, code: int, words: str) -> None:
    done = started(command, tmp_path)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "an unexpected error" not in done.stderr, done.stderr


def test_results_on_a_full_disk_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        try:
            console.results.file = full
            with pytest.raises(SolidifyError, match="stdout cannot be written to: No space left"):
                console.results.print("x")
        finally:
            console.results.file = None  # type: ignore[assignment]
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


ODD_FIELDS = [
    {"layers_pattern": 5},
    {"layers_pattern": True},
    {"layers_pattern": [5]},
    {"target_modules": 5},
    {"target_modules": [["q"]]},
    {"modules_to_save": {"a": 1}},
    {"exclude_modules": 1.5},
    {"target_parameters": True},
    {"rank_pattern": [1]},
    {"alpha_pattern": "x"},
    {"base_model_name_or_path": 5},
    {"revision": {}},
    {"peft_type": ["LORA"]},
]


@pytest.mark.parametrize("odd", ODD_FIELDS, ids=str)
def test_an_odd_field_of_an_adapter_is_named(place: Path, tmp_path: Path, odd: dict[str, Any]) -> None:
    directory = copied(place, tmp_path, "plain")
    assert configured.read(directory).r == 2
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    with pytest.raises(AdapterError, match=next(iter(odd))):
        configured.read(directory)


@pytest.mark.parametrize("name", [LONG, "a/" * 3000, "\x00", "a\x00b"])
def test_a_name_that_no_file_can_have_is_no_file(name: str) -> None:
    assert not files.is_directory(name) and not files.is_file(name)
    with pytest.raises(AdapterError, match="neither a model directory nor in the hub's cache"):
        inputs.find_plain_base(name, None, Path("adapter"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load_base(name)
    with pytest.raises(ArtifactError, match="cannot be written to"):
        solidify.merge("adapter", name)
    with pytest.raises(ArtifactError, match=r"does not exist|holds neither"):
        inspection.diff(Path(name), Path(name))


@pytest.mark.parametrize("verb", ["inspect", "trust", "check", "plan", "adopt", "diff", "generate"])
def test_a_long_name_is_told_by_every_verb(tmp_path: Path, verb: str) -> None:
    more = {
        "adopt": ["x"],
        "diff": [LONG],
        "generate": ["--prompt", "a"],
    }
    says("n" * 100, verb, LONG, *more.get(verb, []))


def test_a_name_that_is_not_utf_8_is_refused(place: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"out\xff")
    says("not text in UTF-8", "merge", str(place / "plain"), "--output", odd)
    says("not text in UTF-8", "generate", str(place / "artifact"), "--prompt", odd)
    with pytest.raises(ArtifactError, match="not text in UTF-8"):
        solidify.merge(place / "plain", tmp_path / odd, base=place / "base")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "output": "x"}).replace("output: x", r'output: "\uD800"'))
    with pytest.raises(RecipeError, match="half a character"):
        schema.load(path)
    (tmp_path / "config.json").write_text('{"a": ["\\ud800"]}')
    with pytest.raises(ArtifactError, match="half a character"):
        files.document(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"a": ["\\ud83d\\ude00"]}')
    assert files.document(tmp_path / "config.json") == {"a": ["\U0001f600"]}


GOOD_TRAINED: dict[str, Any] = {"lora": ["a"], "full": [], "parameters": [], "buffers": []}


@pytest.mark.parametrize(
    ("trained", "base", "words"),
    [
        ({}, {}, "`trained.lora` is not a list of names"),
        ({**GOOD_TRAINED, "parameters": None}, {}, "`trained.parameters` is not a list of names"),
        ({**GOOD_TRAINED, "parameters": {"a": 1}}, {}, "`trained.parameters` is not a list of names"),
        ({**GOOD_TRAINED, "buffers": [{}]}, {}, "`trained.buffers` is not a list of names"),
        (GOOD_TRAINED, {"path": 5}, "`base.path` is not a string"),
        (GOOD_TRAINED, {"relative": None}, "`base.relative` is not a string"),
    ],
)
def test_an_adapter_says_what_it_trains(tmp_path: Path, trained: Any, base: Any, words: str) -> None:
    Manifest(kind="adapter", base={"path": "x"}, trained=GOOD_TRAINED).write(tmp_path)
    assert manifest.read(tmp_path).trained == GOOD_TRAINED
    Manifest(kind="adapter", base={"path": "x", **base}, trained=trained).write(tmp_path)
    with pytest.raises(ArtifactError, match=words):
        manifest.read(tmp_path)


def test_an_edit_says_what_was_done(tmp_path: Path) -> None:
    Manifest(kind="stock", base={}, edits=[{"name": "a", "operation": 5, "new_class": "B"}]).write(tmp_path)
    with pytest.raises(ArtifactError, match="the edit 0 does not say"):
        manifest.read(tmp_path)


def generates(directory: Path, *more: str, words: str = "", code: int = 2, prompt: str = "a b") -> None:
    says(words, "generate", str(directory), "--prompt", prompt, *more, code=code)


def test_a_prompt_is_continued_or_refused(place: Path) -> None:
    generates(place / "artifact", "--max-new-tokens", "62", code=0)
    generates(place / "artifact", "--max-new-tokens", "63", words="ask for at most 62")
    generates(place / "artifact", "--max-new-tokens", str(10**30), words="ask for at most 62")
    generates(place / "artifact", prompt="", words="the prompt holds no token")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"vocab_size": None}),
        ("config.json", {"vocab_size": float("nan")}),
        ("config.json", {"surgery": [{"modules": [None]}]}),
        ("config.json", {"surgery": 5}),
        ("config.json", {"architectures": []}),
        ("generation_config.json", {"output_hidden_states": "x", "return_dict_in_generate": 5}),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
    ],
)
def test_an_odd_value_in_an_artifact_is_told(place: Path, tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    generates(spoilt(copied(place, tmp_path), name, **values), words="solidify: ")


def planned(place: Path, tmp_path: Path, **base: Any) -> Path:
    document = {
        "base": {"model": str(place / "base"), **base},
        "surgery": [{"replace": "**.mlp", "expect": "LlamaMLP", "with": "wrappers.py:Scaled"}],
    }
    shutil.copy(Path(pico.__file__).parent / "user_modules" / "wrappers.py", tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("dtype", ["complex64", "int8", "bool", "Tensor", "nn", ""])
def test_a_dtype_is_a_floating_point(place: Path, tmp_path: Path, dtype: str) -> None:
    says("write float32, bfloat16 or float16", "plan", str(planned(place, tmp_path, dtype=dtype)))


def test_a_plan_names_what_is_odd(place: Path, tmp_path: Path) -> None:
    says("does not exist", "plan", str(tmp_path / "none"))
    assert "Surgery" in says("", "plan", str(planned(place, tmp_path)), code=0)
    says(LONG[:100], "plan", str(planned(place, tmp_path, model=LONG)))
    says("is empty", "plan", str(planned(place, tmp_path, model="")))
    odd = copied(place, tmp_path, "base")
    path = odd / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": 5}))
    says("the tokenizer of", "plan", str(planned(place, tmp_path, model=str(odd))))


@pytest.mark.parametrize("values", [{"eos_token_id": "x"}, {"output_hidden_states": 5}, {"eos_token_id": {"a": 1}}])
def test_odd_settings_of_a_base_for_generation_end_in_a_sentence(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    pico.unwitnessed(monkeypatch)
    odd = copied(place, tmp_path, "base")
    (odd / "generation_config.json").write_text(json.dumps(values))
    code, told = run("build", str(planned(place, tmp_path, model=str(odd))), "--output", str(tmp_path / "out"))
    assert code in (0, 2) and "an unexpected error" not in told, told[-2000:]


def test_a_home_that_is_a_file_is_told(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SOLIDIFY_HOME", str(tmp_path / "file"))
    says("SOLIDIFY_HOME", "trust", "--forget", str(place / "artifact"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HF_HOME", "HF_MODULES_CACHE"])
def test_a_cache_of_the_hub_that_is_a_file_is_told(place: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    done = started(f"{name}=$PWD/file solidify generate {place}/artifact --prompt a", tmp_path)
    assert done.returncode == 2 and "file" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "an unexpected error" not in done.stderr, done.stderr


def test_inspect_says_what_it_takes(place: Path, tmp_path: Path) -> None:
    says("the name of the model is empty", "inspect", "")
    Manifest(kind="adapter", base={"path": "x"}, trained=GOOD_TRAINED).write(tmp_path)
    says("is an adapter, not a model; name a hub id", "inspect", str(tmp_path))


@pytest.mark.slow
def test_who_reads_one_line_ends_nothing_in_a_failure(trash_artifact: Path) -> None:
    """A closed pipe is no failed check; with `| head -1` the exit code is that of the command."""
    command = f"{sys.executable} -m solidify inspect {trash_artifact} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    for _ in range(2):
        assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0


def test_a_base_that_holds_an_adapter_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    pico.llama().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    for device in ("cpu", "meta"):
        with pytest.raises(ModelError, match=r"holds an adapter too .*merge that first"):
            loading.load_base(str(tmp_path), device=device)


def test_what_was_proved_is_shown_in_one_row_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """What failed, was measured or not looked at stands by itself."""
    proved = [f"behaviour: {name}" for name in ("causal", "cache")] + ["reload (AutoModel)", "merged equals attached"]
    found = [findings.Finding(name, True, f"{name} holds") for name in proved]
    found += [
        findings.Finding("nearer", None, "KL 0.1"),
        findings.Finding("exact", False, "differs"),
        findings.Finding.unseen("longer", "no rows"),
    ]
    document = {"subject": "x", "stages": {s: [f.document() for f in found] for s in ("build", "heal")}, "measured": {}}
    cli._show_report(document)
    shown = capsys.readouterr().out
    healing = shown[shown.index("│ heal") :]
    assert "4 promises" in healing and "behaviour (causal, cache); reload (AutoModel); merged equals" in healing
    assert healing.count("│ heal ") == 4 and shown.count("│ build ") == 4
    assert all(words in healing for words in ("KL 0.1", "differs", "no rows")) and "cache holds" not in healing
    assert "8 proved, 2 failed, 2 measured, 2 not looked at" in shown
