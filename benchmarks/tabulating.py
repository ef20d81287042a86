"""Measures ways in turn, for several rounds, and tabulates ours beside the plain ones, for `scale.py` and `dense.py`.

Every command runs in a process of its own; the table shows the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from processes import Measurement, forget, measure, remember
from ways import Places, Row, Way, needed

from solidify.system import console


def run(
    places: Places, chosen: Mapping[str, Way], *, rounds: int, cold: bool, environment: Mapping[str, str]
) -> dict[str, list[Measurement]]:
    """Measures every way once a round; what a way wrote goes when no way right behind it reads it."""
    found: dict[str, list[Measurement]] = {name: [] for name in chosen}
    with console.progress("Measuring", rounds * len(chosen)) as advance:
        for _ in range(rounds):
            left: set[Path] = set()
            for name, way in chosen.items():
                for old in left - set(way.reads):
                    shutil.rmtree(old)
                left &= set(way.reads)
                if way.before:
                    call(environment, *way.before)
                (forget if cold else remember)(way.reads)
                with tempfile.TemporaryDirectory(dir=places.made()) as empty:
                    home = {"SOLIDIFY_HOME": empty} if way.forgetful else {}
                    taken = measure(way.command, imports=way.imports, environment={**environment, **home})
                found[name].append(taken)
                left |= {way.writes} if way.writes else set()
                advance(f"{name}: {taken.seconds:.1f} s, {taken.resident / 1e9:.2f} GB")
            for old in left:
                shutil.rmtree(old)
    return found


def call(environment: Mapping[str, str], *command: str | Path) -> None:
    """Runs a command that is not timed; ends where it fails."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


class Results:
    """The medians of all ways, and what the rows make of them."""

    def __init__(self, known: Mapping[str, Way], runs: Mapping[str, Sequence[Measurement]]) -> None:
        """Takes what `run` found."""
        self.runs, self.ways = runs, known
        self.medians = {name: _medians(found) for name, found in runs.items()}

    def ratio(self, row: Row, plain: str, quantity: str) -> float:
        """Returns what ours takes over what a plain way takes."""
        return self.medians[row.ours][quantity] / self.medians[plain][quantity]

    def judged(self, row: Row) -> list[dict[str, Any]]:
        """Returns every bar of a row with what was found, and whether it is met."""
        judged = []
        for bar in row.bars:
            ours = self.medians[row.ours][bar.quantity]
            value = ours / self.medians[bar.against][bar.quantity] if bar.against else ours
            judged.append({**asdict(bar), "value": value, "met": value <= bar.limit})
        return judged

    def document(self, row: Row) -> dict[str, Any]:
        """Returns a row as plain values."""
        quantities = ("seconds", "working", "flushed", "resident")
        ratios = {plain: {key: self.ratio(row, plain, key) for key in quantities} for plain in row.plain}
        return {"title": row.title, "ours": row.ours, "ratios": ratios, "bars": self.judged(row)}

    def documents(self) -> dict[str, Any]:
        """Returns every way as plain values."""
        return {
            name: {
                "command": [str(word) for word in self.ways[name].command],
                "imports": self.ways[name].imports,
                "medians": self.medians[name],
                "runs": [asdict(taken) for taken in found],
            }
            for name, found in self.runs.items()
        }

    def lines(self, letter: str, row: Row) -> list[list[str]]:
        """Returns a row as lines of the table: ours first, then each plain way with the ratios to it."""
        bars = {plain: [bar for bar in self.judged(row) if bar["against"] == plain] for plain in ("", *row.plain)}
        lines = [[letter, row.title, *self._figures(row.ours), "", "", _verdicts(bars[""])]]
        for plain, found in self.document(row)["ratios"].items():
            time = f"{found['seconds']:.2f} ({found['working']:.2f})"
            memory = f"{found['resident']:.2f}" if self.ways[plain].imports else ""
            lines.append(["", f"  {plain}", *self._figures(plain), time, memory, _verdicts(bars[plain])])
        return lines

    def _figures(self, name: str) -> list[str]:
        found = self.medians[name]
        time = f"{found['seconds']:.1f} ({found['working']:.1f})"
        return [time, f"{found['resident'] / 1e9:.2f} ({found['private'] / 1e9:.2f})"]


def _medians(runs: Sequence[Measurement]) -> dict[str, float]:
    """Returns the median of every quantity, and of the seconds `working`: those without imports."""
    documents = [{**asdict(taken), "working": taken.seconds - taken.imports} for taken in runs]
    return {key: statistics.median(document[key] for document in documents) for key in documents[0]}


def _verdicts(bars: Sequence[Mapping[str, Any]]) -> str:
    names = {"seconds": "time", "working": "(time)", "resident": "memory"}
    words = []
    for bar in bars:
        limit = f"{bar['limit']:g}" if bar["against"] else f"{bar['limit'] / 1e9:g} GB"
        verdict = f"{names[bar['quantity']]} ≤ {limit}: {'yes' if bar['met'] else 'NO'}"
        words.append(verdict)
    return "\n".join(words)


Prepare = Callable[[Places, Mapping[str, Way], Mapping[str, str]], None]


def tabulate(
    name: str,
    parser: argparse.ArgumentParser,
    known: Mapping[str, Row],
    ways_at: Callable[[Places], dict[str, Way]],
    prepared: Prepare,
) -> None:
    """Reads the command line (`--size` is the caller's), measures, prints the table, writes NAME_SIZE.json."""
    parser.add_argument("--rows", default="".join(known), help=f"letters of rows, of {''.join(known)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold", help="where inputs are read from")
    parser.add_argument("--keep", type=Path, help="where generated checkpoints are, or are put to be used again")
    given = parser.parse_args()
    rows = {letter: known[letter] for letter in given.rows}
    build = Path("build/benchmarks").resolve()
    build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=build) as scratch:
        places = Places(given.keep.resolve() if given.keep else Path(scratch), given.size)
        places.root.mkdir(parents=True, exist_ok=True)
        chosen = needed(list(rows.values()), ways_at(places))
        environment = {
            "SOLIDIFY_HOME": str(places.made("home")),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            with console.stage("Making checkpoints, an artifact and adapters"):
                prepared(places, chosen, environment)
            runs = run(places, chosen, rounds=given.rounds, cold=given.cache == "cold", environment=environment)
        finally:
            shutil.rmtree(places.made(), ignore_errors=True)
    show(name, given, rows, Results(chosen, runs), build)


def show(name: str, given: argparse.Namespace, rows: Mapping[str, Row], results: Results, build: Path) -> None:
    """Prints the table, and writes build/benchmarks/NAME_SIZE.json."""
    columns = ["", "ours, plain ways", "s (no imports)", "GB (private)", "time ratio", "memory ratio", "bar"]
    lines = [line for letter, row in rows.items() for line in results.lines(letter, row)]
    title = f"Size {given.size}, {given.cache} page cache, medians of {given.rounds}; ratios: ours / plain"
    console.results.print(console.table(title, columns, lines, numbers=range(2, 6), ruled=False))
    if given.size not in ("full", "half"):
        console.results.print("The bars are those of size full; here imports weigh more than weights.")
    document = {
        "size": given.size,
        "cache": given.cache,
        "rows": {letter: results.document(row) for letter, row in rows.items()},
        "ways": results.documents(),
    }
    (build / f"{name}_{given.size}.json").write_text(json.dumps(document, indent=1) + "\n")
