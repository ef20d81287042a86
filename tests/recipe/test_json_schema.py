"""The JSON schema that editors use says of every recipe what the parser says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import json_schemas
import pytest

from solidify.errors import RecipeError
from solidify.recipe import json_schema, schema
from solidify.recipe.json_schema import RULES, list_sections
from solidify.system import files

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
ODD = (None, True, "x", "3", "", 3, 0, -1, 0.5, [], {}, [1], ["x"], [""], {"a": 1})
SCHEMA = json_schema.json_schema()
MORE: dict[str, dict[str, Any]] = {
    "everything of surgery": {
        "base": {"model": "m", "revision": "r", "dtype": "float32", "trust_remote_code": True},
        "surgery": [
            {"replace": ["a", "b"], "expect": "C", "with": "f.py:X", "count": 2, "weights": "w.pth", "declares": {}},
            {"insert": "a", "expect": "C", "zero": ["b"], "count": 1},
            {"remove": "a", "expect": "C"},
            {"add": "a", "with": "f.py:X", "reads": ["b"], "arguments": {"a": 1}},
            {"rearrange_experts": "a", "expect": "C", "order": [0, 1], "experts_per_token": 1, "count": 1},
            {"rearrange_experts": "a", "expect": "C", "copies": 2},
            {"merge_experts": "a", "expect": "C", "clusters": [[0, 1], [2]], "experts_per_token": 1},
            {"mask": "window", "window": 8, "sinks": 0, "layers": ["a"], "expect": "C"},
            {"mask": "block_causal", "block": 2},
            {"mask": "causal"},
        ],
    },
    "chosen experts": {
        "base": {"model": "m"},
        "surgery": [
            {"rearrange_experts": ["a"], "expect": "C", "keep": 2, "by": "frequency", "rows": 4},
            {"merge_experts": "a", "expect": "C", "into": 2, "weights": "frequency", "rows": 8},
        ],
        "data": {"train": "x.jsonl"},
    },
    "everything of healing": {
        "base": {"model": "m"},
        "surgery": [{"replace": "a", "expect": "C", "with": "f.py:X"}],
        "heal": {
            "place": {"layers": 1, "length": 5, "method": "greedy"},
            "align": {"max_steps": 3, "match": "heads", "train": "a", "parameter_groups": [{"parameters": "a"}]},
            "distill": {"train": ["a"], "objective": [{"loss": "model"}], "training": {"max_steps": 1}},
        },
        "data": {"train": "x.jsonl"},
    },
    "a stream": {
        "base": {"model": "m", "quantization": "nf4"},
        "adapter": {"train": "a"},
        "trainer": "distill",
        "teacher": {"model": "t"},
        "data": {"train": [{"path": "x", "weight": 2.5, "split": "s"}, "y"], "streaming": True, "packing": False},
        "training": {"max_steps": 1},
    },
    "windows and rewards": {
        "base": {"model": "m", "quantization": {"load_in_4bit": True}},
        "adapter": {"lora": {"r": 1}},
        "trainer": "grpo",
        "rewards": ["f.py:reward"],
        "data": {"train": {"path": "x"}, "packing": True, "streaming": False, "group_by": []},
    },
    "a reference": {
        "base": {"model": "m"},
        "surgery": [{"add_tokens": ["<a>"]}],
        "adapter": {"train": "a"},
        "trainer": "dpo",
        "reference": {"model": "r"},
        "cache_prefix": True,
        "data": {"train": "x.jsonl", "streaming": False, "group_by": ["length"]},
    },
}


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in EXAMPLES:
        yield path.name, files.parse_yaml(path.read_text())
    for blocks in documents.ALL.values():
        for block in blocks:
            if block.language == "yaml" and isinstance(found := files.parse_yaml(block.text), dict):
                yield block.place, found

    yield from MORE.items()


def parsed(document: Any) -> bool:
    try:
        schema.judge(document, Path("recipe.yaml"))
    except RecipeError:
        return False
    return True


def spoilt(document: Any) -> Iterator[tuple[str, Any]]:
    """Yields the document with one thing changed, everywhere: gone, another value, an unknown key beside it."""

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        if path[-1:] and path[-1] in ("lora", "training", "arguments", "optimizer"):
            return  # others judge what is in there
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield from places(value[key], (*path, key))

    for path in places(document):
        for change in ("gone", "unknown key", "directory", "name", "module", *ODD):
            made = copy.deepcopy(document)
            holder: Any = {"": made}
            key: Any = ""
            for part in path:
                holder, key = holder[key], part
            if change in ("unknown key", "directory", "name", "module"):
                if not isinstance(holder[key], dict):
                    continue
                holder[key][change] = "a"
            elif change == "gone" and path:
                del holder[key]
            elif path:
                holder[key] = change
            yield f"{'.'.join(map(str, path))}: {change!r}", made


@pytest.mark.parametrize(
    ("name", "document"), list(recipes()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_schema_says_what_the_parser_says(name: str, document: dict[str, Any]) -> None:
    assert json_schemas.accepts(SCHEMA, document) == parsed(document), name


@pytest.mark.parametrize(
    "document",
    [
        *MORE.values(),
        *(files.parse_yaml(path.read_text()) for path in EXAMPLES if path.stem in ("side_path", "smaller")),
    ],
    ids=[*MORE, "side_path", "smaller"],
)
def test_the_schema_says_of_a_spoilt_recipe_what_the_parser_says(document: dict[str, Any]) -> None:
    assert json_schemas.accepts(SCHEMA, document) and parsed(document)
    differing, refused, count = [], 0, 0
    for change, made in spoilt(document):
        accepted = parsed(made)
        count, refused = count + 1, refused + (not accepted)
        if json_schemas.accepts(SCHEMA, made) != accepted:
            differing.append(f"{change}: the parser {'accepts' if accepted else 'refuses'} it")
    assert not differing, "\n".join(differing[:40])
    assert 0 < refused < count


def test_every_rule_between_keys_is_in_the_schema() -> None:
    ruled = {kind.__name__ for kind in list_sections(schema.Recipe) if kind.__pydantic_decorators__.model_validators}
    assert ruled == set(RULES)


@pytest.fixture(scope="module")
def many() -> list[tuple[Any, bool]]:
    """Returns spoilt recipes, and whether the schema accepts each."""
    full = files.parse_yaml(next(path for path in EXAMPLES if path.stem == "side_path").read_text())
    short = {**full, "training": {"max_steps": 1}, "surgery": full["surgery"][:1]}
    made = [each for document in (short, *MORE.values()) for _, each in spoilt(document)]
    return [(each, json_schemas.accepts(SCHEMA, each)) for each in made]


@pytest.mark.parametrize("rule", RULES)
def test_a_schema_without_a_rule_is_found_to_differ(rule: str, many: list[tuple[Any, bool]]) -> None:
    """What the test above would see if a rule were forgotten."""
    less = copy.deepcopy(SCHEMA)
    own = less if rule == "Recipe" else less["$defs"][rule]
    for key in RULES[rule]:
        del own[key]
    assert any(json_schemas.accepts(less, made) != accepted for made, accepted in many)
