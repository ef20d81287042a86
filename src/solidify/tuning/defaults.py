"""Defaults of a training that follow its length, so that a run of one step is as whole as one of a thousand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
        found = [f"training.learning_rate is {rate}, with which nothing is learnt; give it a number above 0"]
    return [*found, *_unheld(given, held_out)]


def _unheld(given: Mapping[str, Any], held_out: bool) -> list[str]:
    if held_out:
        return []
    strategy = str(given.get("eval_strategy", "no"))
    asking = [f"eval_strategy: {strategy}"] if strategy != "no" else []
    asking += [f"{key}: true" for key in ("load_best_model_at_end", "eval_on_start") if given.get(key)]
    return [f"training.{each} needs data to evaluate on; give `data.eval`, or leave it out" for each in asking]
