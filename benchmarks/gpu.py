"""What a training costs on a GPU, beside the script of transformers, PEFT and TRL on the same shapes; for `make gpu`.

Each way is a process of its own, and they take turns; a figure is the median of its processes, which are as many as the
time allows. Writes benchmarks/gpu.json and the part of docs/benchmarks.md that is made of it. `--dry-run` does the same
with tiny shapes, on a CPU where there is no GPU, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_work import DEVICE, ROWS, SHAPES, Row

HERE = Path(__file__).parent
FIGURES, PAGE = HERE / "gpu.json", HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/gpu.py -->", "<!-- end of what benchmarks/gpu.py makes -->"
WAYS = ("plain", "ours")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "liger-kernel")
MOST_ROUNDS = 5
_KEPT = 300  # characters of what a process that failed says


def find_missing(row: Row) -> str:
    """Says why a row cannot be measured here; nothing where it can be."""
    if row.on_device and DEVICE != "cuda":
        return "needs a GPU"
    return f"{row.needs} is not installed" if row.needs and importlib.util.find_spec(row.needs) is None else ""


def measure(names: Sequence[str], size: str, minutes: float) -> dict[str, Any]:
    """Runs both ways of every row in turn, once, and again while there is time for another round.

    Returns, by row, the runs of each way, or why there are none.
    """
    started, found = time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as scratch:
        base, made, result = (Path(scratch) / name for name in ("base", "made", "result.json"))
        _run("gpu_work.py", base, size)
        _run("gpu_ours.py", "build", base, made)
        commands = {"plain": ("gpu_plain.py", base), "ours": ("gpu_ours.py", "train", made)}
        for number in range(MOST_ROUNDS):
            begun = time.monotonic()
            for name in names:
                row = found.setdefault(name, {"missing": find_missing(ROWS[name]), "plain": [], "ours": []})
                for way in WAYS[:: -1 if number % 2 else 1]:
                    if not row["missing"]:
                        row["missing"] = _take(row[way], way, *commands[way], size, name, result)
            now = time.monotonic()
            if now - started + (now - begun) > 60 * minutes:
                break
    return found


def _take(runs: list[dict[str, Any]], *command: Any) -> str:
    """Runs one way once, and notes what it took; returns why it failed."""
    way, *words = command
    try:
        _run(*words)
    except subprocess.CalledProcessError as error:
        lines = [line for line in str(error.stderr).splitlines() if line.strip()]
        return f"{way} failed: {lines[-1][:_KEPT] if lines else error.returncode}"
    runs.append(json.loads(Path(words[-1]).read_text(encoding="utf-8")))
    return ""


def _run(script: str, *words: Any) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / script), *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


def describe_machine() -> dict[str, Any]:
    """Returns the card's name and memory, and the versions."""
    found: dict[str, Any] = {"card": "a CPU", "versions": {n: version(n) for n in PACKAGES if _is_installed(n)}}
    if DEVICE == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"card": f"one {card.name}", "memory": card.total_memory, "cuda": torch.version.cuda}
    return found


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def write_table(figures: Mapping[str, Any]) -> str:
    """Writes the rows: medians of both ways, and what ours takes of the other."""
    lines = ["| | plain, ms a step | ours | ratio | plain, GB | ours | ratio |", "|---|---:|---:|---:|---:|---:|---:|"]
    for name, row in figures["rows"].items():
        if row["missing"] or not all(row[way] for way in WAYS):
            lines.append(f"| {ROWS[name].title} | not measured: {row['missing']} | | | | | |")
            continue
        cells = []
        for key, unit in (("seconds", 1e3), ("memory", 1e-9)):
            plain, ours = (statistics.median(run[key] for run in row[way]) for way in WAYS)
            cells += [f"{plain * unit:.4g}", f"{ours * unit:.4g}", f"{ours / plain:.3f}"]
        lines.append(f"| {ROWS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_section(figures: Mapping[str, Any] | None) -> str:
    """Writes the part of the page that is made of the figures."""
    if figures is None:
        return "Not measured yet: who has a device runs `make gpu`."
    runs = max((len(row["ours"]) for row in figures["rows"].values()), default=0)
    versions = ", ".join(f"{name} {number}" for name, number in figures["machine"]["versions"].items())
    losses = [
        abs(statistics.median(r["loss"] for r in row["ours"]) - statistics.median(r["loss"] for r in row["plain"]))
        for row in figures["rows"].values()
        if all(row[way] for way in WAYS)
    ]
    apart = f" The mean losses of both differ by at most {max(losses):.1g}." if losses else ""
    return (
        f"On {figures['machine']['card']}, in bfloat16: {figures['shape']}; medians of up to {runs} processes each. "
        f"Memory is the most that tensors held on the device.{apart}\n\n{write_table(figures)}\n\nWith {versions}."
    )


def write_page(page: str, figures: Mapping[str, Any] | None) -> str:
    """Returns the page with its part made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{write_section(figures)}\n\n{END}{rest.split(END)[1]}"


def read_figures() -> dict[str, Any] | None:
    """Returns what was measured last; None where nothing was."""
    found: dict[str, Any] | None = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else None
    return found


def main() -> int:
    """Measures, prints the table, and writes it; returns an exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, also on a CPU; nothing is written")
    parser.add_argument("--minutes", type=float, default=4, help="no round begins that would end later")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    given = parser.parse_args()
    if DEVICE != "cuda" and not given.dry_run:
        print("there is no CUDA device to measure; --dry-run tries the scripts without one", file=sys.stderr)
        return 2
    size, minutes = ("tiny", 0) if given.dry_run else ("full", given.minutes)
    rows = measure(given.rows, size, minutes)
    figures = {"machine": describe_machine(), "shape": str(SHAPES[size]), "rows": rows}
    print(write_section(figures))
    failed = [f"{name}: {row['missing']}" for name, row in rows.items() if " failed: " in row["missing"]]
    if not given.dry_run:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
