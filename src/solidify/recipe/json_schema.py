"""The recipe as a JSON schema, for editors: made of the types that read it, so that both accept the same.

What types cannot say (a section that needs another) stands in `RULES`, in words of JSON schema, by the section whose
validator says it in Python; a test looks that each has its rule. One difference is left: `3.0` is a whole number to
JSON schema, and none to a recipe.
"""

from __future__ import annotations

import inspect
from typing import Any, get_args

from pydantic import BaseModel

from solidify.recipe.schema import Recipe
from solidify.recipe.sections import COMPARED, TAUGHT, Trainer

NAMED = tuple(name for name in get_args(Trainer) if name != "auto")
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _holds(key: str, *, empty: bool = False) -> dict[str, Any]:
    """Says that a key is there, and not null; unless `empty` may be, that it holds something."""
    nothing: list[Any] = [None] if empty else [None, "", [], {}]
    return {"required": [key], "properties": {key: {"not": {"enum": nothing}}}}


def _needs(key: str, others: str, *, empty: bool = False) -> dict[str, Any]:
    """Says that whoever has one key has another."""
    return {"if": _holds(key, empty=empty), "then": _holds(others, empty=True)}


def _goes(key: str, mask: str) -> dict[str, Any]:
    """Says which mask a key goes with."""
    return {"if": _holds(key, empty=True), "then": {"properties": {"mask": {"const": mask}}}}


def _is(key: str, *values: Any) -> dict[str, Any]:
    """Says that a key is there and has one of some values."""
    return {"required": [key], "properties": {key: {"enum": list(values)}}}


def _within(key: str, rule: dict[str, Any]) -> dict[str, Any]:
    """Says that a section is there and keeps a rule."""
    return {"required": [key], "properties": {key: {"type": "object", **rule}}}


def _never_both(key: str, other: str) -> dict[str, Any]:
    """Says that of two keys one is not there."""
    return {"not": {"allOf": [_holds(key, empty=True), _holds(other, empty=True)]}}


_CALIBRATED = {
    "anyOf": [
        _holds("keep", empty=True),
        {"allOf": [_holds("merge_experts", empty=True), _is("weights", "frequency")]},
    ]
}
_BUDGETS = ("layers", "cache_bytes", "flops")
RULES: dict[str, dict[str, Any]] = {
    "Adapter": {"anyOf": [_holds("lora", empty=True), _holds("train")]},
    "Place": {"oneOf": [_holds(key, empty=True) for key in _BUDGETS]},
    "Heal": {"anyOf": [_holds(key, empty=True) for key in ("place", "align", "distill")]},
    "Mask": {
        "allOf": [
            *(
                {"if": {"properties": {"mask": {"const": kind}}}, "then": _holds(key, empty=True)}
                for kind, key in (("block_causal", "block"), ("window", "window"))
            ),
            *(_goes(key, kind) for key, kind in (("block", "block_causal"), ("window", "window"), ("sinks", "window"))),
        ]
    },
    "RearrangeExperts": {
        "anyOf": [_holds(key, empty=True) for key in ("order", "keep", "copies", "experts_per_token")],
        "allOf": [
            *(
                _never_both(*keys)
                for keys in (
                    ("order", "keep"),
                    ("order", "copies"),
                    ("keep", "copies"),
                    ("copies", "experts_per_token"),
                )
            ),
            *({"if": {"required": [key]}, "then": _holds("keep", empty=True)} for key in ("by", "rows")),
        ],
    },
    "MergeExperts": {
        "oneOf": [_holds("clusters", empty=True), _holds("into", empty=True)],
        "allOf": [{"if": {"required": ["rows"]}, "then": _is("weights", "frequency")}],
    },
    "Base": {
        "allOf": [
            {"properties": {"quantization": {"anyOf": [{"enum": ["nf4", "int8", None]}, {"type": "object"}]}}},
        ]
    },
    "Data": {
        "allOf": [
            {"if": _is("packing", True), "then": {"not": {"anyOf": [_holds("group_by"), _is("streaming", True)]}}},
            {"if": _is("streaming", True), "then": {"not": _holds("group_by")}},
        ]
    },
    "Recipe": {
        "anyOf": [_holds("surgery"), _holds("adapter", empty=True)],
        "allOf": [
            {"if": _holds("heal", empty=True), "then": _holds("surgery")},
            {
                "if": _within("base", _holds("quantization", empty=True)),
                "then": {"anyOf": [_holds("adapter", empty=True), _within("heal", _holds("distill", empty=True))]},
            },
            {"not": _within("teacher", _holds("quantization", empty=True))},
            {"if": _within("data", _is("streaming", True)), "then": {"not": _holds("heal", empty=True)}},
            {
                "if": {"allOf": [_within("data", _is("streaming", True)), _holds("adapter", empty=True)]},
                "then": _within("training", _within("max_steps", {"type": "integer", "exclusiveMinimum": 0})),
            },
            {
                "if": {"anyOf": [_is("trainer", *NAMED), _holds("rewards"), _holds("reference", empty=True)]},
                "then": _holds("adapter", empty=True),
            },
            {"if": _is("trainer", *TAUGHT), "then": _holds("teacher", empty=True)},
            {"if": _is("trainer", "grpo"), "then": _holds("rewards")},
            {"if": _holds("rewards"), "then": _is("trainer", "grpo")},
            {"if": _holds("reference", empty=True), "then": _is("trainer", *COMPARED)},
            *(_needs(key, "data", empty=True) for key in ("adapter", "heal")),
            {
                "if": {"not": _holds("data", empty=True)},
                "then": {"properties": {"surgery": {"items": {"not": _CALIBRATED}}}},
            },
            _needs("teacher", "adapter", empty=True),
            *(_needs(key, "adapter") for key in ("training", "parameter_groups")),
            {"if": _is("cache_prefix", True), "then": _holds("adapter", empty=True)},
        ],
    },
}


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe."""
    schema = Recipe.model_json_schema(by_alias=True)
    sections = {Recipe.__name__: schema, **schema.get("$defs", {})}
    for section in list_sections(Recipe):
        own = sections[section.__name__]
        for key in [name for name, field in section.model_fields.items() if field.exclude]:
            own["properties"].pop(key, None)
        own |= RULES.get(section.__name__, {})
    for own in sections.values():
        own["description"] = inspect.cleandoc(own.get("description", "")).partition("\n\n")[0]
    schema["$schema"] = DIALECT
    return schema


def list_sections(section: type[BaseModel]) -> list[type[BaseModel]]:
    """Returns a section, those within it, and the operations of surgery: every type that a recipe is made of."""
    found, waiting = dict[type[BaseModel], None](), [section]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found[each] = None
            waiting += [kind for field in each.model_fields.values() for kind in _list_types(field.annotation)]
    return list(found)


def _list_types(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _list_types(part)]
