"""The command line as its user sees it: exit codes, messages, JSON, and what is left on disk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import solidify
from solidify.__main__ import main
from solidify.errors import RecipeError
from training import awake

EXAMPLES = Path(__file__).parents[2] / "examples"
Solidify = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Solidify:
    """Runs a command in this process and returns exit code, stdout and stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["solidify", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def recipe(directory: Path, **changes: Any) -> Path:
    """Writes a copy of the example with a module and a loss of its own, with some keys changed."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("side_path.py", "side_path_loss.py"):
        shutil.copy(EXAMPLES / name, directory)
    document = yaml.safe_load((EXAMPLES / "side_path.yaml").read_text())
    for key, value in changes.items():
        place = document
        *parents, last = key.split("__")
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


BAD_INPUT = {
    "unknown recipe key": ({"surgery__0__widht": 3}, "surgery.0.widht: unknown key"),
    "target that hits nothing": ({"surgery__0__replace": "model.layer.*.mlp"}, "names no module; close to it"),
    "another class": ({"surgery__0__expect": "Conv1D"}, "but Conv1D was expected"),
    "another number": ({"surgery__0__count": 5}, "4 modules are hit, but 5 were expected"),
    "missing file": ({"surgery__0__with": "none.py:X"}, "none.py does not exist"),
    "class not found": ({"surgery__0__with": "side_path.py:SideWay"}, "defines no 'SideWay'"),
    "not a module": ({"surgery__0__with": "side_path_loss.py:near_one"}, "is not a class of torch.nn.Module"),
    "unknown argument": ({"surgery__0__arguments": {"with": 1}}, "takes no argument 'with'"),
    "missing weights": ({"surgery__0__weights": "none.pth"}, "none.pth does not exist"),
    "base that is not there": ({"base__model": "no/such-model"}, "the base 'no/such-model' cannot be loaded"),
    "unknown builtin": ({"base__model": "builtin:huge"}, "there is no 'builtin:huge'"),
    "LoRA that hits nothing": ({"adapter__lora__target_modules": ["q_proj"]}, "write **.q_proj to hit it everywhere"),
    "training what is not there": ({"adapter__train": ["**.skale"]}, "'**.skale' hits nothing"),
    "unknown loss": ({"objective__1__loss": "side_path_loss.py:far"}, "defines no 'far'"),
    "wrong loss argument": ({"objective__1__arguments": {"paramters": 1}}, "it has no parameter 'paramters'"),
    "weight of another kind": (
        {"objective__1__weight": {"shedule": {}}},
        "a weight must be a number, {schedule: ...} or",
    ),
    "weight that cannot be": (
        {"objective__1__weight": {"schedule": {"start": 0}}},
        "the weight's schedule does not fit",
    ),
    "teacher that nobody asks": ({"teacher": {"model": "builtin:tiny-olmoe"}}, "no term of the objective looks at it"),
    "teacher that is not there": (
        {"teacher": {"model": "no/such-model"}, "objective__0__loss": "solidify.losses:forward_kl"},
        "the base 'no/such-model' cannot be loaded",
    ),
    "kernels without an accelerator": ({"training__use_liger_kernel": True}, "Triton has no compiler for the device"),
    "missing data": ({"data__train": "none.jsonl"}, "none.jsonl does not exist"),
    "unknown training field": ({"training__max_step": 3}, "did you mean 'max_steps'?"),
    "training value of a wrong kind": ({"training__eval_strategy": "sometimes"}, "the training section does not fit"),
}


@pytest.mark.parametrize("fault", BAD_INPUT)
def test_bad_input_gets_one_message_exit_code_2_and_leaves_nothing(
    cli: Solidify, tiny_base: Path, tmp_path: Path, fault: str
) -> None:
    changes, words = BAD_INPUT[fault]
    path = recipe(tmp_path / "recipe", **changes)
    code, out, err = cli("run", path, "--output", tmp_path / "out")
    assert code == 2
    assert words in err
    assert err.count("solidify: ") == 1
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_a_base_whose_name_is_misspelt_is_looked_for_beside_the_recipe(cli: Solidify, tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe", base__model="neoxx")
    (path.parent / "neox").mkdir()
    code, _, err = cli("plan", path)
    assert code == 2
    assert f"nor is there a directory {path.parent / 'neoxx'} (close to it: neox)" in err


def test_a_base_that_is_found_but_not_loaded_is_not_looked_for(
    cli: Solidify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fault alone is told: a model of that name is in the hub's cache."""
    snapshot = tmp_path / "hub" / "models--neoxx" / "snapshots" / "0"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "unheard_of"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, _, err = cli("plan", recipe(tmp_path / "recipe", base__model="neoxx"))
    assert code == 2
    assert "unheard_of" in err
    assert "nor is there" not in err


def test_a_base_whose_name_no_directory_can_have_is_refused(cli: Solidify, tmp_path: Path) -> None:
    name = f"{'a' * 300}/b"
    with pytest.raises(RecipeError, match=r"the base 'a+/b' cannot be loaded"):
        solidify.plan(recipe(tmp_path / "recipe", base__model=name))


def test_weights_of_a_wrong_shape_are_refused(cli: Solidify, tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = recipe(tmp_path / "recipe", surgery__0__weights="w.safetensors")
    save_file({"down.weight": torch.zeros(3, 128)}, path.parent / "w.safetensors")
    code, _, err = cli("run", path, "--output", tmp_path / "out")
    assert code == 2
    assert "'down.weight' has shape [3, 128] in the weights, but SidePath needs [16, 128]" in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_ours_is_left_alone(cli: Solidify, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    code, _, err = cli("run", recipe(tmp_path / "recipe"), "--output", tmp_path / "out")
    assert code == 2
    assert "name another, or remove it first" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_results_have_a_place_where_nobody_names_one(
    cli: Solidify, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from solidify.recipe import stages

    asked: list[Path] = []
    monkeypatch.setattr(stages, "run", lambda _, directory, **__: asked.append(directory))
    code, _, err = cli("run", recipe(tmp_path / "recipe", output=None))
    assert (code, asked) == (0, [Path("build/recipe")])
    assert "Results go to build/recipe: neither --output nor the recipe's `output` says where" in err


@pytest.mark.parametrize("key", ["directory", "name"])
def test_what_a_recipe_gets_from_its_path_is_no_key_of_it(cli: Solidify, tmp_path: Path, key: str) -> None:
    path = recipe(tmp_path / "recipe", widht=3)
    path.write_text(f"{path.read_text()}{key}: x\n")
    code, _, err = cli("plan", path)
    assert code == 2 and f"{key}: unknown key" in err and "widht: unknown key" in err


def test_a_file_is_shown_and_listed_and_code_is_trusted_by_name(
    cli: Solidify, trash_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLIDIFY_HOME", str(tmp_path / "another machine"))
    directory = tmp_path / "artifact"
    shutil.copytree(trash_artifact, directory)
    (directory / "NOTES.md").write_text("mine [red]\x1b[31mx\n")
    for words in (["inspect"], ["generate", "--prompt", "x"], ["trust"], ["diff", directory]):
        code, out, err = cli(words[0], directory, *words[1:])
        assert (code, out) == (2, "")
        assert "NOTES.md is a file that the manifest does not list" in err.replace("\n", " ")
    assert cli("check", directory)[0] == 1
    code, out, _ = cli("adopt", directory, directory / "NOTES.md")
    assert code == 0
    assert "mine [red]\\x1b[31mx" in out
    code, _, err = cli("inspect", directory)
    assert code == 2
    assert "carries code that is not trusted on this machine" in err
    code, out, _ = cli("trust", directory)
    assert code == 0
    assert "trashcan_moe.py" in out
    assert cli("inspect", directory)[0] == 0
    assert cli("trust", directory, "--forget")[0] == 0
    assert cli("inspect", directory)[0] == 2


def test_an_adapter_is_checked_where_its_base_stands_now(cli: Solidify, trash_artifact: Path, tmp_path: Path) -> None:
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(trash_artifact, base)
    adapter = solidify.save_adapter(awake(base), tmp_path / "adapter")
    base.rename(moved)
    code, _, err = cli("check", adapter)
    assert code == 2
    assert "say where it is (--base)" in err
    (moved / "NOTES.md").write_text("mine")  # so that it ends before a fresh process is needed
    code, out, _ = cli("check", adapter, "--base", moved, "--json")
    assert code == 1
    verdicts = {finding["name"]: finding["verdict"] for finding in json.loads(out)["stages"]["adapter"]}
    assert verdicts["the base is the recorded one"] == "proved"
    assert verdicts["its base is intact"] == "failed"


def test_an_adapter_of_another_base_is_refused(
    cli: Solidify, trash_artifact: Path, wrapped_artifact: Path, tmp_path: Path
) -> None:
    adapter = solidify.save_adapter(awake(trash_artifact), tmp_path / "adapter")
    code, _, err = cli("merge", adapter, "--base", wrapped_artifact, "--output", tmp_path / "merged")
    assert code == 2
    assert "was trained on another base" in err
    assert not (tmp_path / "merged").exists()
    code, _, err = cli("generate", wrapped_artifact, "--adapter", adapter, "--prompt", "x")
    assert code == 2


@pytest.mark.parametrize(
    "words", [["run"], ["build", "none.yaml"], ["check", "none"], ["diff", "a", "b"], ["frobnicate"]]
)
def test_wrong_words_end_with_2(cli: Solidify, words: list[str]) -> None:
    code, _, err = cli(*words)
    assert code == 2
    assert err


def test_check_ends_with_1_when_a_promise_does_not_hold(
    cli: Solidify, trash_artifact: Path, copy_of: Callable[[Path], Path]
) -> None:
    directory = copy_of(trash_artifact)
    path = directory / "trashcan_moe.py"
    path.write_text(path.read_text() + "# a comment\n")
    code, out, words = cli("check", directory, "--json")
    assert code == 1
    document = json.loads(out)  # one document: what goes on is told on stderr
    assert words.index(f"… Comparing {directory.name} with its manifest") < words.index("✓ Comparing")
    assert document["passed"] is False
    assert "trashcan_moe.py is not the file that was written" in document["stages"]["artifact"][0]["evidence"]


def test_a_report_of_a_run_that_was_stopped_says_so_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from solidify.command.cli import _show_file
    from solidify.findings import Report

    Report("a run").write(tmp_path / "report.json", recipe={}, finished=False)
    assert next(iter(json.loads((tmp_path / "report.json").read_text()).items())) == ("finished", False)
    _show_file(tmp_path / "report.json")
    assert "not finished: the run was stopped" in capsys.readouterr().out


def test_inspect_folds_layers_and_speaks_json(cli: Solidify, tiny_base: Path, trash_artifact: Path) -> None:
    code, out, _ = cli("inspect", "builtin:tiny-olmoe", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["parameters"] == 2107520
    mlp = next(m for m in document["modules"] if m["name"] == "model.layers.*.mlp")
    assert (mlp["class"], mlp["times"]) == ("OlmoeSparseMoeBlock", 4)
    assert mlp["flops"] / document["flops_per_token"] == pytest.approx(0.505, abs=1e-3)
    code, out, _ = cli("inspect", trash_artifact)
    assert code == 0
    assert "│ │ │ mlp                        TrashCanMoE" in out
    assert "parameters, all float32; " in out


def test_plan_says_everything_and_writes_nothing(cli: Solidify, tiny_base: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe")
    before = sorted(p.name for p in path.parent.iterdir() if p.suffix != ".pyc" and p.name != "__pycache__")
    code, out, _ = cli("plan", path, "--json")
    document = json.loads(out)
    assert code == 0
    assert len(document["edits"]) == 4
    assert document["trainer"] == "ObjectiveSFTTrainer"
    assert document["objective"] == [
        {"name": "model", "reduction": "token_sum", "weight": 1.0, "reference": False},
        {"name": "near_one", "reduction": "constant", "weight": 0.1, "reference": False},
    ]
    assert len([name for name in document["trainable"] if name.startswith("lora ")]) == 8
    assert "full model.layers.3.self_attn.o_proj.scale" in document["trainable"]
    added = 4 * (2 * 16 * 128 + 1)
    assert document["after"]["parameters"] - document["before"]["parameters"] == added
    assert document["after"]["bytes"] - document["before"]["bytes"] == 4 * added
    assert document["after"]["flops_per_token"] - document["before"]["flops_per_token"] == 4 * 2 * 2 * 16 * 128
    assert document["trainable"]["lora model.layers.0.self_attn.o_proj.down"] == 4 * (128 + 16)
    assert document["trainable"]["full model.layers.3.self_attn.o_proj.scale"] == 1
    assert document["generated"] == ["configuration_solid_olmoe.py", "modeling_solid_olmoe.py"]
    assert document["files"]["side_path.py"] == (path.parent / "side_path.py").read_text()
    code, out, _ = cli("plan", path)
    assert "model.layers.*.self_attn.o_proj" in out
    assert "SidePath(width=16)" in out
    assert "4,612" in out  # what is trained, all together
    generated = document["files"]["modeling_solid_olmoe.py"]
    row = rf"modeling_solid_olmoe\.py +│ generated +│ +{len(generated.splitlines())} │"
    assert re.search(row, out) and generated not in out and "(--verbose shows what is generated)" in out
    assert generated in cli("plan", path, "--verbose")[1]  # shown before it is written
    after = sorted(p.name for p in path.parent.iterdir() if p.suffix != ".pyc" and p.name != "__pycache__")
    assert after == before


def test_plan_shows_every_operation(cli: Solidify, tiny_base: Path, tmp_path: Path) -> None:
    layer = "OlmoeDecoderLayer"
    side_path = {"expect": "Linear", "with": "side_path.py:SidePath", "shared": True}
    steps = [
        {"insert": "model.layers.1", "expect": layer, "zero": ["self_attn.o_proj", "mlp.experts.down_proj"]},
        {"remove": "model.layers.4", "expect": layer},
        {"replace": "model.layers.*.self_attn.o_proj", **side_path},
        {"add": "model.value", "with": "value.py:Value", "reads": "model.norm"},
    ]
    path = recipe(tmp_path / "recipe", surgery=steps, adapter=None, objective=None, data=None, training=None)
    (path.parent / "value.py").write_text(
        "from torch import nn\n\n\nclass Value(nn.Linear):\n"
        "    def __init__(self, config):\n        super().__init__(config.hidden_size, 1)\n"
    )
    code, out, err = cli("plan", path)
    assert code == 0, err
    assert "Tensors: 34 of the base's 47 kept, 13 dropped; 18 new" in out
    assert "+ model.layers.*.self_attn.o_proj.down.weight x 4 (0-3)" in out
    assert "- model.layers.3.mlp.gate.weight" in out
    assert "-180 kB (-2.1 %)" in out
    _, out, _ = cli("plan", path, "--json")
    operations = [edit["operation"] for edit in json.loads(out)["edits"]]
    assert operations == ["rearrange", "rearrange", "share", "share", "share", "share", "add"]


def test_plan_counts_what_peft_trains_in_every_form_of_lora(cli: Solidify, tiny_base: Path, tmp_path: Path) -> None:
    targets = ["model.layers.*.self_attn.q_proj"]
    lora = {"r": 2, "target_modules": targets, "use_dora": True, "init_lora_weights": "gaussian"}
    path = recipe(tmp_path / "recipe", adapter={"lora": lora, "train": ["model.norm"]})
    code, out, err = cli("plan", path, "--json")
    assert code == 0, err
    counts = json.loads(out)["trainable"]
    assert counts["lora model.layers.0.self_attn.q_proj"] == 2 * (128 + 128) + 128
    assert counts["full model.norm.weight"] == 128
    assert len(counts) == 5


def test_diff_names_every_difference(cli: Solidify, trash_artifact: Path, wrapped_artifact: Path) -> None:
    code, out, _ = cli("diff", trash_artifact, trash_artifact, "--json")
    assert code == 0
    assert set(json.loads(out)) == {"configuration", "code", "modules", "tensors", "figures", "files"}
    assert not any(json.loads(out).values())
    _, out, _ = cli("diff", trash_artifact, wrapped_artifact, "--json")
    document = json.loads(out)
    assert "wrappers.py" in [entry["name"] for entry in document["code"] if entry["change"] == "added"]
    code, out, _ = cli("diff", trash_artifact, wrapped_artifact)
    assert "modules: 4 differences" in out
    assert "~ model.layers.*.mlp: TrashCanMoE → Scaled x 2 (0-1)" in out
    assert "- model.layers.*.mlp.trash.bias: float32 [] x 2 (0-1)" in out
    assert "+ wrappers.py: +" in out


@pytest.fixture(scope="module")
def finished(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One whole run as a user starts it: a recipe with a module and a loss of its own, TRL's trainer, six steps."""
    directory = tmp_path_factory.mktemp("run")
    path = recipe(directory / "recipe", data={"train": "text.jsonl", "eval": "text.jsonl", "max_length": 64})
    texts = ["The value of a name is what it was bound to last.", "A list keeps the order in which it was filled."] * 16
    (path.parent / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, "-m", "solidify", "run", str(path), "--output", str(directory / "out")]
    command += ["--set", "training.max_steps=6", "--verbose"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return directory / "out", done


def test_a_run_leaves_all_it_promised(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    directory, done = finished
    assert done.returncode == 0, done.stderr
    assert {"artifact", "adapter", "merged", "report.json", "report.html"} <= {p.name for p in directory.iterdir()}
    report = json.loads((directory / "report.json").read_text())
    assert report["finished"] and report["passed"]
    assert list(report["stages"]) == ["surgery", "build", "train", "merge"]
    assert all(finding["passed"] is not False for findings in report["stages"].values() for finding in findings)
    assert report["recipe"]["training"]["max_steps"] == 6
    assert "Traceback" not in done.stderr
    assert "trainable set exact" in done.stdout
    page = (directory / "report.html").read_text()
    assert "<h2>train</h2>" in page and "<h2>samples</h2>" in page and "<figcaption>Learning rate</figcaption>" in page
    assert '<tr class="new" title="model.layers.*.self_attn.o_proj.down">' in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing beside it is needed


def test_what_is_refused_shows_nothing_of_an_earlier_run(
    cli: Solidify, finished: tuple[Path, subprocess.CompletedProcess[str]], tiny_base: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(finished[0], tmp_path / "out"))
    asked = recipe(tmp_path / "asked", base={"model": str(tiny_base)}, data={"train": "gone.jsonl"})
    code, out, err = cli("run", str(asked), "--output", str(output))
    assert code == 2 and "gone.jsonl" in err
    assert "proved" not in out + err
    code, out, err = cli("trust", str(output))
    assert code == 2 and f"is the output of a run, which has no solidify.json of its own: name {output}/artifact" in err


def test_every_result_loads_with_plain_transformers_where_we_cannot_be_imported(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    directory, _ = finished
    script = """
import sys
sys.modules["solidify"] = sys.modules["peft"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in ("artifact", "merged"):
    place = f"{sys.argv[1]}/{name}"
    model, info = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
    tokens = model.generate(**tokenizer("The", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4)
    print(type(model).__name__, tokenizer.decode(tokens[0]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SolidOlmoeForCausalLM The") == 2


def test_the_code_that_plan_shows_is_the_code_that_is_written(
    cli: Solidify, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    written = finished[0] / "artifact"
    _, out, _ = cli("plan", finished[0].parent / "recipe" / "recipe.yaml", "--json")
    planned = json.loads(out)
    assert planned["files"] == {path.name: path.read_text() for path in written.glob("*.py")}
    weights = sum(path.stat().st_size for path in written.glob("*.safetensors"))
    assert planned["after"]["bytes"] == pytest.approx(weights, rel=0.01)


def test_generate_with_and_without_the_adapter(
    cli: Solidify, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    directory, _ = finished
    words = ["--prompt", "The value of", "--max-new-tokens", "5"]
    code, plain, _ = cli("generate", directory / "artifact", *words)
    assert code == 0
    assert plain.startswith("The value of")
    _, attached, _ = cli("generate", directory / "artifact", "--adapter", directory / "adapter", *words)
    _, merged, _ = cli("generate", directory / "merged", *words)
    assert attached == merged


def test_resume_keeps_what_is_finished(
    cli: Solidify, finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(finished[0], tmp_path / "out"))
    path = Path(json.loads((finished[0] / "report.json").read_text())["subject"]).parent / "recipe" / "recipe.yaml"
    before = {name: (directory / name).stat().st_ino for name in ("artifact", "adapter", "merged")}
    code, _, err = cli("run", path, "--output", directory, "--set", "training.max_steps=6", "--resume")
    assert code == 0, err
    after = {name: (directory / name).stat().st_ino for name in ("artifact", "adapter", "merged")}
    assert after["artifact"] == before["artifact"]
    assert after["adapter"] == before["adapter"]
    assert after["merged"] == before["merged"]


@pytest.mark.slow
def test_a_local_base_in_bfloat16_goes_all_the_way(cli: Solidify, tiny_base: Path, tmp_path: Path) -> None:
    """Another family, from a directory beside the recipe, tied embeddings, half precision, the plain Trainer."""
    import pico
    import torch
    from transformers import AutoTokenizer

    settings = {**pico.SIZES, "vocab_size": 1024, "intermediate_size": 48, "num_key_value_heads": 2}
    base = pico.make("LlamaForCausalLM", dtype=torch.bfloat16, **settings, tie_word_embeddings=True)
    path = recipe(
        tmp_path / "recipe",
        base={"model": "base"},
        surgery__0__expect="Linear",
        surgery__0__count=2,
        adapter__train=["**.o_proj.scale", "model.norm"],
        training={"max_steps": 3, "logging_steps": 1, "bf16": True, "learning_rate": 0.01},
    )
    base.save_pretrained(path.parent / "base")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(path.parent / "base")
    code, _, err = cli("run", path, "--output", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["passed"]
    merged = solidify.load(tmp_path / "out" / "merged")
    assert type(merged).__name__ == "SolidLlamaForCausalLM"
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_the_version_is_told(cli: Solidify) -> None:
    code, out, _ = cli("--version")
    assert (code, out) == (0, "solidify 0.1.0\n")


@pytest.mark.slow
def test_a_block_expansion_trains_only_its_new_layers(cli: Solidify, tmp_path: Path) -> None:
    """The whole loop on a model of another depth: the start is the base's, and only the copies learn."""
    steps = ["--set", "training.max_steps=4", "--set", "training.logging_steps=2"]
    code, _, words = cli("run", EXAMPLES / "deeper.yaml", "--output", tmp_path / "out", *steps)
    assert code == 0, words
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {f["name"]: f for stage in report["stages"].values() for f in stage}
    assert found["start identical"]["evidence"] == "logits bit-identical to the base"
    assert found["unchanged tensors identical"]["passed"]
    assert found["trainable set exact"]["passed"]
    assert found["frozen tensors unchanged"]["passed"]
    config = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6


@pytest.mark.slow
def test_a_shortened_model_learns_from_the_whole_one(cli: Solidify, tmp_path: Path) -> None:
    """Distillation from a teacher of another size, a weight that fades, groups, and no logits of all positions."""
    code, shown, _ = cli("plan", EXAMPLES / "smaller.yaml")
    assert code == 0
    assert "schedule: start: 0.5, end: 0.0, length: 0.5" in shown and "learning_rate: 0.0001" in shown
    steps = ["--set", "training.max_steps=4", "--set", "training.logging_steps=1"]
    code, _, words = cli("run", EXAMPLES / "smaller.yaml", "--output", tmp_path / "out", *steps)
    assert code == 0, words
    assert "The objective in the first step" in words
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {f["name"]: f for stage in report["stages"].values() for f in stage}
    assert found["every term has a gradient"]["evidence"] == "3 terms with a gradient of their own"
    assert found["gradient does not depend on accumulation"]["passed"]
    history = report["measured"]["history"]
    assert [logs["weight/hidden_match"] for logs in history] == pytest.approx([0.5, 0, 0, 0])
    for logs in history:
        assert logs["term/chunked_distillation"] > 0.01
        assert logs["loss"] == pytest.approx(sum(v for k, v in logs.items() if k.startswith("weighted/")), rel=1e-6)
    saved = sorted((tmp_path / "out" / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    assert "term/hidden_match" in json.loads(saved[-1].read_text())["log_history"][0]
