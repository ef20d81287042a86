"""Fields of LoraConfig whose keys name modules: our patterns, resolved to the exact names of the adapter's targets.

PEFT takes the keys of `rank_pattern` and `alpha_pattern` for regular expressions that a name may end in, and the first
that fits wins. Here a key is a name or a pattern as everywhere else; what hits no target, or what another key gives
another value, is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig

from solidify.model import anatomy

FIELDS = ("rank_pattern", "alpha_pattern")
_ALARMS = tuple(f"The following {field} keys did not match" for field in FIELDS)


def faults(lora: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    """Returns what is wrong with the patterns of a declaration, whose targets are known."""
    found = []
    for field in FIELDS:
        values = lora.get(field) or {}
        if not isinstance(values, Mapping):
            found.append(f"LoRA: {field} must map names or patterns to numbers, but is {values!r}")
            continue
        given: dict[str, tuple[str, Any]] = {}
        for pattern, names in anatomy.match([str(key) for key in values], targets).items():
            value = values[pattern]
            if not names:
                hint = anatomy.suggestions(pattern, targets)
                found.append(f"LoRA: {field}: {pattern!r} hits none of the targets; {hint}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                found.append(f"LoRA: {field}: {pattern!r} is given {value!r}; give it a number above 0")
            for name in names:
                other, before = given.setdefault(name, (pattern, value))
                if before != value:
                    found.append(
                        f"LoRA: {field}: {name} gets {before} by {other!r} and {value} by {pattern!r}; keep one of them"
                    )
    return found


def resolved(lora: Mapping[str, Any] | None, targets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the fields as PEFT takes them: regular expressions that are one whole name each."""
    result = {}
    for field in FIELDS:
        values: Mapping[str, Any] = (lora or {}).get(field) or {}
        hits = anatomy.match(list(values), targets)
        result[field] = {exactly(name): values[pattern] for pattern, names in hits.items() for name in names}
    return {field: values for field, values in result.items() if values}


def is_false_alarm(warning: str, modules: Sequence[str]) -> bool:
    """Returns whether PEFT (0.21.2) warns of patterns only because it looks for them among modules, not parameters."""
    return warning.startswith(_ALARMS) and not any(repr(exactly(name)) in warning for name in modules)


@contextmanager
def without_false_alarms(configuration: LoraConfig) -> Iterator[None]:
    """While PEFT puts an adapter on a model, its warnings of patterns for parameters are left out; all others are told.

    PEFT (0.21.2) looks for the keys of patterns among modules alone, and warns of those that parameters have.
    """
    parameters = [str(name) for name in configuration.target_parameters or ()]
    keys = [str(key) for field in FIELDS for key in getattr(configuration, field) or ()]
    others = [key for key in keys if not any(re.search(rf"(^|\.|\\A)({key})$", name) for name in parameters)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="The following .*_pattern keys did not match")
        yield
    for warning in caught:
        told = str(warning.message)
        if not told.startswith(_ALARMS) or any(repr(key) in told for key in others):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def exactly(name: str) -> str:
    """Returns an expression that only the whole name fits: PEFT (0.21.2) allows any beginning before it."""
    return r"\A" + re.escape(name)
