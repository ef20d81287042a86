"""What a change does on purpose: properties that it says it does not keep (`{cache: false}`)."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from solidify.behaviour.properties import PROPERTIES
from solidify.errors import SurgeryError, refuse

ATTRIBUTE = "declares"  # the class attribute by which a module says the same


def declared(module: Any, argument: Mapping[str, bool] | None) -> dict[str, bool]:
    """Returns what a module's class and an argument declare together, the argument first; only what is not kept.

    What looks ahead cannot be computed from a cache: `causal: false` declares `cache: false` too.

    Raises:
        SurgeryError: a name is no property of the contract, or a value is not true or false.
    """
    own = getattr(module, ATTRIBUTE, None) or {}
    faults: list[str] = []
    merged: dict[str, Any] = {}
    for source, values in ((f"{getattr(module, '__name__', module)}.{ATTRIBUTE}", own), (ATTRIBUTE, argument or {})):
        if not isinstance(values, Mapping):
            faults.append(f"{source} is {values!r}; write properties and false, as {{'cache': False}}")
            continue
        for key, value in values.items():
            if key not in PROPERTIES:
                close = get_close_matches(str(key), PROPERTIES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(PROPERTIES)}"
                faults.append(f"{source}: {key!r} is not a property that a change keeps; {hint}")
            elif not isinstance(value, bool):
                faults.append(f"{source}: {key} is {value!r}; it must be true (kept) or false (not kept)")
        merged |= values
    refuse(SurgeryError, "what the change declares does not fit", faults)
    if merged.get("causal") is False and "cache" not in merged:
        merged["cache"] = False
    return {key: False for key in PROPERTIES if merged.get(key) is False}
