"""Times functions in turn, several rounds, so that a machine whose speed drifts does not favour one; prints ratios."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def compare(title: str, ways: dict[str, Callable[[], object]], *, rounds: int = 7) -> dict[str, float]:
    """Runs every way once a round after a warm-up; returns and prints each one's median ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for place in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if place:
                times[name].append(time.perf_counter() - start)
    first = next(iter(ways))
    ratios = {
        name: statistics.median(t / base for t, base in zip(found, times[first], strict=True))
        for name, found in times.items()
    }
    print(f"\n{title} (median of {rounds} pairs; the first is {statistics.median(times[first]) * 1e3:.1f} ms)")
    for name, ratio in ratios.items():
        spread = sorted(t / base for t, base in zip(times[name], times[first], strict=True))
        print(f"  {ratio:6.3f}  [{spread[0]:.3f} .. {spread[-1]:.3f}]  {name}")
    return ratios


def write(name: str, results: dict[str, dict[str, float]]) -> None:
    """Writes the ratios to build/benchmarks/<name>.json."""
    directory = Path("build/benchmarks")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
