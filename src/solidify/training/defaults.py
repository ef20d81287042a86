"""Defaults of a training that follow its length, so that a run of one step is as whole as one of a thousand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter

from solidify.system import foreign

LOGS = 0.01  # of all steps: a training is logged a hundred times, and a short one in every step
EVALUATIONS = 0.1


def following(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe's training section with what it leaves open, as transformers understands it.

    Logs and evaluations come in shares of the training. A warmup in shares leaves at least one step with a learning
    rate above zero: transformers rounds up, and a training of one step would train nothing.
    """
    values = dict(given)
    if values.get("logging_strategy", "steps") == "steps":
        values.setdefault("logging_steps", LOGS)
    if str(values.get("eval_strategy", "no")) == "steps":
        values.setdefault("eval_steps", EVALUATIONS)
    steps, warmup = values.get("max_steps"), values.get("warmup_steps")
    if isinstance(steps, int) and steps > 0 and isinstance(warmup, float) and 0 < warmup < 1:
        whole = math.ceil(steps * warmup)
        values["warmup_steps"] = warmup if whole < steps else steps - 1
    return values


def faults(given: Mapping[str, Any], *, held_out: bool, moved: bool = False) -> list[str]:
    """Says which of a training section's fields leave nothing to do, or ask for evaluation data when there is none.

    `moved` says that some of what is trained has a learning rate of its own.
    """
    rate = given.get("learning_rate")
    found = []
    if isinstance(rate, (int, float)) and not isinstance(rate, bool) and not rate > 0 and not (rate == 0 and moved):
        found = [f"training.learning_rate is {rate}, so nothing would be learnt; give it a number above 0"]
    return [*found, *_find_unheld(given, held_out)]


_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "save_steps": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
}


def of_another_kind(given: Mapping[str, Any], kinds: Sequence[type]) -> list[str]:
    """Says which fields hold something that is not of their kind, or a number that no training can have.

    `kinds` are the classes whose fields they may be, and what those are declared to hold decides.
    """
    hints = {key: hint for kind in reversed(kinds) for key, hint in get_type_hints(kind).items()}
    found = []
    for key, value in given.items():
        allowed = {*(get_args(hints[key]) or (hints[key],))} - {type(None)} if key in hints else set()
        if not allowed or value is None:
            continue
        if not allowed <= {int, float, bool}:  # what is switched on or off becomes words in transformers
            found += (
                [f"training.{key} is {value!r}, and not {_name_declared(hints[key])}"]
                if _is_strange(hints[key], value)
                else []
            )
            continue
        read = foreign.attempt(TypeAdapter(hints[key]).validate_python, value)
        broken = isinstance(value, float) and float not in allowed
        if read.failed or broken or (isinstance(value, bool) and bool not in allowed):
            words = {int: "a whole number", float: "a number", bool: "true or false"}
            found.append(f"training.{key} is {value!r}, and not {' or '.join(words[k] for k in words if k in allowed)}")
        elif key in _AT_LEAST and isinstance(read.value, (int, float)) and not read.value >= _AT_LEAST[key]:
            found.append(f"training.{key} is {value!r}; give it at least {_AT_LEAST[key]}")
    steps, epochs = given.get("max_steps", -1), given.get("num_train_epochs", 3)
    if not found and isinstance(steps, int) and (steps == 0 or steps < -1):
        found.append(
            f"training.max_steps is {steps}; give it a number above 0, or leave it out and give num_train_epochs"
        )
    if not found and steps == -1 and isinstance(epochs, (int, float)) and not epochs > 0:
        found.append(f"training.num_train_epochs is {epochs}; give it a number above 0")
    return found


def _is_strange(hint: Any, value: Any) -> bool:
    """Returns whether a value is not what a field is declared to hold; what cannot be told is not strange."""
    if isinstance(value, bool):
        return False
    adapter = foreign.attempt(TypeAdapter, hint, config=ConfigDict(arbitrary_types_allowed=True)).value
    return adapter is not None and foreign.attempt(adapter.validate_python, value).failed


def _name_declared(hint: Any) -> str:
    united = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    parts = [part for part in united if part is not type(None)]
    return " or ".join(str(part) if get_args(part) else str(getattr(part, "__name__", part)) for part in parts)


def _find_unheld(given: Mapping[str, Any], held_out: bool) -> list[str]:
    if held_out:
        return []
    strategy = str(given.get("eval_strategy", "no"))
    asking = [f"eval_strategy: {strategy}"] if strategy != "no" else []
    asking += [f"{key}: true" for key in ("load_best_model_at_end", "eval_on_start") if given.get(key)]
    return [f"training.{each} needs data to evaluate on; give `data.eval`, or leave it out" for each in asking]
