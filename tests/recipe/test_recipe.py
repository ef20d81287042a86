from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from solidify.errors import DataError, RecipeError
from solidify.recipe import schema

EXAMPLE = Path(__file__).parents[2] / "examples" / "trash_can.yaml"
MINIMAL = {
    "base": {"model": "some/model"},
    "surgery": [{"replace": "model.layers.*.mlp", "expect": "MLP", "with": "mine.py:Mine"}],
}


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def test_a_recipe_round_trips_through_yaml(tmp_path: Path) -> None:
    loaded = schema.load(EXAMPLE)
    again = schema.load(written(tmp_path, loaded.document()))
    assert again.document() == loaded.document()
    assert loaded.directory == EXAMPLE.parent


def test_a_recipe_knows_its_files_by_what_they_hold(tmp_path: Path) -> None:
    """And round-trips through YAML all the same."""
    document = {**MINIMAL, "surgery": [{**MINIMAL["surgery"][0], "weights": "w.safetensors"}]}  # type: ignore[dict-item]
    (tmp_path / "w.safetensors").write_bytes(b"one")
    first = schema.load(written(tmp_path, document)).document()
    assert schema.load(written(tmp_path, first)).document() == first
    (tmp_path / "w.safetensors").write_bytes(b"another")
    assert schema.load(written(tmp_path, document)).document() != first


def test_a_chat_template_is_a_file_beside_the_recipe_or_stands_in_it(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_bytes(b"{{ messages }}\r\n")
    loaded = {}
    for given in ("chat.jinja", "{{ messages }}\n", "none.jinja"):
        data = {"train": "rows.jsonl", "chat_template": given}
        loaded[given] = schema.load(written(tmp_path, {**MINIMAL, "data": data}))
    assert loaded["chat.jinja"].chat_template() == loaded["{{ messages }}\n"].chat_template() == "{{ messages }}\n"
    assert loaded["chat.jinja"].document() == loaded["{{ messages }}\n"].document()
    assert schema.load(written(tmp_path, loaded["chat.jinja"].document())).chat_template() == "{{ messages }}\n"
    assert loaded["none.jinja"].document()["data"]["chat_template"] == "none.jinja"
    with pytest.raises(DataError, match=r"none.jinja cannot be read, and 'none.jinja' is no template itself"):
        loaded["none.jinja"].chat_template()


def test_the_example_in_the_design_is_understood(tmp_path: Path) -> None:
    text = """
base: {model: allenai/OLMoE-1B-7B-0924, revision: main, dtype: bfloat16}
surgery:
  - replace: model.layers.*.mlp
    expect: OlmoeSparseMoeBlock
    count: 16
    with: trashcan.py:TrashCanMoE
    arguments: {}
    weights: null
adapter:
  lora: {r: 16, lora_alpha: 32, target_modules: [model.layers.*.self_attn.q_proj]}
  train: [model.layers.*.mlp.trash]
objective:
  - {loss: model}
  - {loss: solidify.losses:trash_budget, weight: 0.01, arguments: {target: 0.75}}
data: {train: data/train.jsonl, eval: data/eval.jsonl, text: text, max_length: 1024}
training: {learning_rate: 2.0e-4, max_steps: 1000}
output: build/olmoe-trashcan
"""
    loaded = schema.load(written(tmp_path, text))
    assert loaded.surgery[0].module == "trashcan.py:TrashCanMoE"  # type: ignore[attr-defined]
    assert loaded.objective[1].weight == 0.01
    assert loaded.training["learning_rate"] == 2e-4


@pytest.mark.parametrize(("text", "value"), [("2e-4", 2e-4), ("1E5", 1e5), (".5", 0.5), ("3", 3)])
def test_numbers_are_numbers(tmp_path: Path, text: str, value: object) -> None:
    """PyYAML reads YAML 1.1, in which 2e-4 is a string; transformers would then compare strings with numbers."""
    document = yaml.safe_dump({**MINIMAL, "adapter": {"train": "x"}, "data": {"train": "x.jsonl"}})
    loaded = schema.load(written(tmp_path, document + f"\ntraining: {{learning_rate: {text}}}\n"))
    assert loaded.training["learning_rate"] == value


def test_all_faults_are_listed_with_their_place_and_neighbours(tmp_path: Path) -> None:
    document = {
        "base": {"modle": "x"},
        "surgery": [{"replace": "a", "expct": "B", "with": "c.py:D", "count": 0}],
        "objektive": [],
        "data": {"train": "x", "max_length": "long"},
    }
    with pytest.raises(RecipeError) as caught:
        schema.load(written(tmp_path, document))
    message = str(caught.value)
    assert "base.modle: unknown key; did you mean 'model'? known here: model, revision, dtype" in message
    assert "base.model: this key is required" in message
    assert "surgery.0.expct: unknown key; did you mean 'expect'?" in message
    assert "surgery.0.expect: this key is required" in message
    assert "surgery.0.count" in message
    assert "objektive: unknown key; did you mean 'objective'?" in message
    assert "data.max_length" in message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"surgery": []}, "surgery"),
        ({"adapter": {}}, "an adapter needs something to train"),
        ({"adapter": {"train": "x"}}, "`adapter` needs something to be trained on: give `data`"),
        ({"training": {"max_steps": 1}}, "`training` needs an `adapter`"),
    ],
)
def test_sections_that_need_each_other_are_asked_for(tmp_path: Path, more: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        schema.load(written(tmp_path, {**MINIMAL, **more}))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"adapter": {}}, "an adapter needs something to train"),
        ({"heal": {}}, "give `place`, `align` or `distill`"),
        ({"surgery": [{"mask": "window"}]}, "the mask window needs 'window', a number of positions"),
    ],
)
def test_a_rule_about_several_keys_is_one_sentence_from_python_too(more: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        schema.Recipe.model_validate({"base": {"model": "x"}, "surgery": [{"remove": "x"}], **more})
    assert "Value error" not in str(caught.value)


BROKEN = {
    "base: {model: x}\ndata: train: a.txt\n": r"line 2, column 12: mapping values are not allowed here; write `key: ",
    "base:\n  model: x\n dtype: float32\n": r"line 3, column 2: expected .*\(begun in line 1\); .*indent with spaces",
    "base: [x\noutput: y\n": r"line 2, column 7: expected .* close brackets",
    "base: *x\n": r"line 1, column 7: the alias \*x is not read; write out what it stands for$",
}


def test_files_that_are_no_recipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        schema.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        schema.load(written(tmp_path, "base: {model: x"))
    for content, words in BROKEN.items():
        with pytest.raises(RecipeError, match=rf"recipe.yaml is not valid YAML: {words}") as caught:
            schema.load(written(tmp_path, content))
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="holds list, but a recipe is a mapping"):
        schema.load(written(tmp_path, "- a\n"))


def test_overrides_reach_any_key(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    loaded = schema.load(
        path, ["base.model=other", "surgery.0.count=3", "surgery.0.arguments.width=1e-2", "output=out"]
    )
    assert (loaded.base.model, loaded.surgery[0].count, loaded.output) == ("other", 3, "out")  # type: ignore[attr-defined]
    assert loaded.surgery[0].arguments == {"width": 0.01}  # type: ignore[attr-defined]


@pytest.mark.parametrize("override", ["output", "=3", "surgery.7.count=1", "base.model.deep=1", "base.modle=1"])
def test_overrides_that_point_nowhere_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        schema.load(written(tmp_path, MINIMAL), [override])


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    loaded = schema.load(written(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        loaded.output = "elsewhere"


def test_what_does_not_stand_there_is_told_before_slow_imports(tmp_path: Path) -> None:
    """All of it at once, and nothing of torch or transformers is imported."""
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "base": {"model": "builtin:olmoe"},
                "teacher": {"model": "./nowhere"},
                "surgery": [{"replace": "a", "with": "missing.py:Gate", "expect": "B", "weights": "w.safetensors"}],
                "adapter": {"train": ["a"]},
                "objective": [{"loss": "terms.py:mine"}],
                "data": {"train": "rows.jsonl", "eval": "builtin:pidoc"},
                "training": {"max_steps": 1},
            }
        )
    )
    script = (
        "import sys\nfrom solidify.command import cli\nfrom solidify.errors import RecipeError\n"
        "try:\n    cli._load_recipe('r.yaml', None)\nexcept RecipeError as error:\n    print('; '.join(error.faults))\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in (
        "base.model: there is no 'builtin:olmoe'; built in: builtin:tiny-olmoe",
        "teacher.model: the directory",
        "missing.py does not exist",
        "w.safetensors does not exist",
        "terms.py does not exist",
        "rows.jsonl does not exist",
        "data.eval: there is no 'builtin:pidoc'; built in: builtin:pydoc",
    ):
        assert words in done.stdout


def test_files_of_data_are_told_by_the_endings_that_are_read() -> None:
    from solidify.recipe import standing
    from solidify.training import sources

    assert set(standing.DATA) == set(sources.KINDS)
