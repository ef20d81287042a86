"""Judges a value by a JSON schema, as far as the recipe's own goes; a keyword that it does not know is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, Any] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
}
_SAYS_NOTHING = {"$defs", "$schema", "title", "description", "default", "examples", "discriminator", "then", "markdown"}


def accepts(schema: Mapping[str, Any], value: Any, root: Mapping[str, Any] | None = None) -> bool:
    """Returns whether a value is as a schema says."""
    root = schema if root is None else root
    return all(_judge(key, asked, value, schema, root) for key, asked in schema.items() if key not in _SAYS_NOTHING)


def _judge(key: str, asked: Any, value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    def judge(each: Any, within: Any = value) -> bool:
        return each if isinstance(each, bool) else accepts(each, within, root)

    is_number = _TYPES["number"](value)
    match key:
        case "$ref":
            return judge(root["$defs"][asked.removeprefix("#/$defs/")])
        case "type":
            return any(_TYPES[kind](value) for kind in ([asked] if isinstance(asked, str) else asked))
        case "enum":
            return any(type(value) is type(each) and value == each for each in asked)
        case "const":
            return type(value) is type(asked) and bool(value == asked)
        case "anyOf":
            return any(map(judge, asked))
        case "allOf":
            return all(map(judge, asked))
        case "oneOf":
            return sum(map(judge, asked)) == 1
        case "not":
            return not judge(asked)
        case "if":
            return not judge(asked) or judge(schema.get("then", True))
        case "minimum":
            return not is_number or value >= asked
        case "exclusiveMinimum":
            return not is_number or value > asked
        case "maximum":
            return not is_number or value <= asked
        case "minLength":
            return not isinstance(value, str) or len(value) >= asked
        case "pattern":
            return not isinstance(value, str) or re.search(asked, value) is not None
        case "minItems":
            return not isinstance(value, list) or len(value) >= asked
        case "maxItems":
            return not isinstance(value, list) or len(value) <= asked
        case "items":
            return not isinstance(value, list) or all(judge(asked, each) for each in value)
        case "required":
            return not isinstance(value, dict) or set(asked) <= set(value)
        case "properties":
            return not isinstance(value, dict) or all(
                judge(asked[name], value[name]) for name in asked if name in value
            )
        case "additionalProperties":
            known = schema.get("properties", {})
            return not isinstance(value, dict) or all(judge(asked, value[name]) for name in value if name not in known)
    raise NotImplementedError(f"the keyword {key} of JSON schema is not known here")
