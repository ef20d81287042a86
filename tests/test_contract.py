"""The scaling contract, term by term, trainer by trainer, case by case: docs/contract.md is made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import contract
import pytest
from contract import CASES, TERMS, WAYS
from noise import LIGHTNING

import solidify

EXACT = 1e-6  # transformers and TRL compute their losses in float32
ANSWERED = ("DPOTrainer", "DistillationTrainer")  # an answer has at least one token
PAGE = Path(solidify.__file__).parents[2] / "docs" / "contract.md"
pytestmark = [pytest.mark.filterwarnings(line) for line in LIGHTNING]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ours_is_exact_where_the_script_is_not(way: str, tmp_path: Path) -> None:
    ours, script = contract.errors(way, "load_balance", CASES["8 x 1"], tmp_path)
    assert ours < EXACT
    assert script > 0.1


def spread(directory: Path, ways: Sequence[str], names: Sequence[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """The errors with two processes, averaged gradients and all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    given = [contract.__file__, str(directory), ";".join(ways), ";".join(names)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, *given], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((directory / "spread.json").read_text())
    return {(line["way"], line["term"]): tuple(line["errors"]) for line in found}


@pytest.mark.slow
def test_every_term_in_every_trainer_and_the_page_that_says_so(tmp_path: Path) -> None:
    trainers = [way for way in WAYS if way.endswith("Trainer")]
    apart = spread(tmp_path, trainers, list(TERMS))
    found: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for way in WAYS:
        for term in TERMS:
            row = {
                name: contract.errors(way, term, case, tmp_path)
                for name, case in CASES.items()
                if not (
                    way in ("DPOTrainer", "DistillationTrainer") and case.lengths == "empty"
                )  # an answer has at least one token
            }
            if (way, term) in apart:
                row["two processes"] = apart[way, term]
            found.setdefault(way, {})[term] = row
    PAGE.write_text(page(found), encoding="utf-8")
    worst = {
        f"{way}, {term}, {case}": ours
        for way, rows in found.items()
        for term, row in rows.items()
        for case, (ours, _) in row.items()
        if not ours < EXACT
    }
    assert not worst


def page(found: dict[str, dict[str, dict[str, tuple[float, float]]]]) -> str:
    """Writes the table."""
    words = [
        "# The scaling contract, measured",
        "",
        "Made by `tests/test_contract.py` (`make test-all`); how it is meant says [objective.md](objective.md).",
        "",
        "Each cell is ours / the script's error: `‖g - g*‖ / ‖g*‖` of the gradient of one optimizer step on eight",
        "sequences with the objective {the trainer's own loss, the term}, where `g*` is computed from the definitions",
        "in one batch in float64. The term's weight makes its gradient as long as the model's. The model is a tiny",
        "OLMoE with trash cans and an adapter (LoRA and modules in full); *no PEFT* trains all of it in place. Lengths",
        "are ragged but for *even*. What is left of ours, 1e-7, is what transformers and TRL compute in float32.",
    ]
    for way, rows in found.items():
        cases = list(dict.fromkeys(case for row in rows.values() for case in row))
        words += ["", f"## {way}", "", f"The script: {WAYS[way].script}.", ""]
        words += ["| term | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
        for term, row in rows.items():
            cells = [f"{row[c][0]:.0e} / {row[c][1]:.2g}" if c in row else "" for c in cases]
            words.append(f"| {term} | " + " | ".join(cells) + " |")
    return "\n".join(words) + "\n"
