"""What healing recovers of each module of `solidify.modules` on a real base, and the page that says so.

`python benchmarks/zoo.py [MODULE ...]` puts each module into the real base as its trial says, aligns it, and measures
how far the model is from its base before and after. Each result goes to docs/zoo.json as soon as it is there, and one
that stands there of the same trial is not measured again. docs/zoo.md is made from it and from `zoo_page.py`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo_page import GALLERY, Entry, write_page

DOCS = Path(__file__).parents[1] / "docs"
FIGURES, PAGE = DOCS / "zoo.json", DOCS / "zoo.md"
ROWS, LENGTH, HELD_OUT = 4, 256, 8


def make_rows(tokenizer: Any, split: str, count: int) -> torch.Tensor:
    """Returns rows of text without padding (count, LENGTH), the first of a split of Python's documentation."""
    from solidify.builtin import corpus

    ids = [token for text in corpus.texts(split) for token in tokenizer(text, verbose=False).input_ids]
    return torch.tensor(ids[: count * LENGTH]).view(-1, LENGTH)[:count]


def measure(entry: Entry) -> dict[str, Any]:
    """Replaces, aligns and measures; returns what the page says of it."""
    import solidify
    from solidify.builtin import bases
    from solidify.healing.measuring import distances

    trial, directory = entry.trial, bases.directory(entry.trial.base)
    assert directory is not None
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    held_out = [{"input_ids": rows} for rows in make_rows(tokenizer, "heldout", HELD_OUT).split(ROWS)]
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    edits = [
        edit
        for target, more in trial.targets.items()
        for edit in solidify.replace(model, target, entry.load(), arguments={**trial.arguments, **more})
    ]
    found: dict[str, Any] = {"trial": describe(entry)}
    models = {"surgery": model}
    if trial.steps:
        models = {"surgery": copy.deepcopy(model), "align": model}
        batches = [{"input_ids": part} for part in make_rows(tokenizer, "train", trial.steps * ROWS).split(ROWS)]
        settings = solidify.Alignment(
            max_steps=trial.steps, learning_rate=trial.learning_rate, train=trial.train, stream=False
        )
        started = time.perf_counter()
        units = solidify.align(model, base, batches, edits=edits, settings=settings, held_out=held_out[:1])
        found |= {
            "tokens": sum(batch["input_ids"].numel() for batch in batches),
            "seconds": round(time.perf_counter() - started),
            "errors": {unit.name: [unit.before, unit.after] for unit in units},
        }
    apart = distances(models, base, held_out)
    found |= {f"kl_{stage}": each.kl for stage, each in apart.items()}
    found["loss_base"] = apart["surgery"].base_loss
    if "align" in apart:
        found["recovered"] = apart["align"].recovered(apart["surgery"])
    return found


def describe(entry: Entry) -> dict[str, Any]:
    """Returns a trial as it stands in the file of figures."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(entry.trial)))
    return values


def read_figures() -> dict[str, Any]:
    """Returns what was measured so far, by module."""
    found: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    return found


def write_figures(figures: Mapping[str, Any]) -> None:
    """Writes figures and page, in the order of the gallery; the file of figures is never half written."""
    ordered = {entry.name: figures[entry.name] for entry in GALLERY if entry.name in figures}
    partial = FIGURES.with_suffix(".partial")
    partial.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, FIGURES)
    PAGE.write_text(write_page(ordered), encoding="utf-8")


def main() -> None:
    """Measures what is asked for and not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = [entry.name for entry in GALLERY]
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"one of {', '.join(known)}; left out, all")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    given = parser.parse_args()
    if unknown := set(given.modules) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    for entry in GALLERY:
        figures = read_figures()
        asked = not given.page and (not given.modules or entry.name in given.modules)
        if asked and figures.get(entry.name, {}).get("trial") != describe(entry):
            found = measure(entry)
            write_figures(read_figures() | {entry.name: found})
            print(entry.name, {key: value for key, value in found.items() if key != "trial"}, flush=True)
    write_figures(read_figures())


if __name__ == "__main__":
    main()
