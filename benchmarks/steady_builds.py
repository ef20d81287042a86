"""How often an honest change in bfloat16 builds: a gate on every feed-forward of SmolLM2-135M, with the cores busy.

    python benchmarks/steady_builds.py --times 200 --layers 30 --busy 1

Every build is whole: certificate, fresh process, all Auto classes. `--layers` shortens the model (its first layers).
Prints how many were refused, and in how many one pass of the fresh process differed and fresh loads did not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gated_feed_forward import GatedFeedForward
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import solidify
from solidify.builtin import smollm2
from solidify.system import console

BUSY = "while True: sum(i * i for i in range(10000))"


def main() -> None:
    """Builds as often as asked, or until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--busy", type=int, default=1, help="processes that only compute, beside")
    parser.add_argument("--minutes", type=float, default=600)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(asked.busy)]
    try:
        with tempfile.TemporaryDirectory() as scratch, console.silence():
            build_often(asked, Path(scratch))
    finally:
        for process in beside:
            process.kill()


def build_often(asked: argparse.Namespace, scratch: Path) -> None:
    """Prints a line for what is not plain, and the counts at the end."""
    options = {"dtype": "bfloat16", "num_hidden_layers": asked.layers}
    model = AutoModelForCausalLM.from_pretrained(smollm2.directory(), **options).eval()
    edits = solidify.replace(model, "model.layers.*.mlp", GatedFeedForward, expect="LlamaMLP", count=asked.layers)
    done, refused, once, start = 0, 0, 0, time.monotonic()
    while done < asked.times and time.monotonic() - start < asked.minutes * 60:
        done += 1
        try:
            built = solidify.build(model, edits, scratch / "out")
        except solidify.ArtifactError as error:
            refused += 1
            print(f"build {done} was refused: {error}", flush=True)
            continue
        settled = [finding.evidence for finding in built.findings if "in fresh loads" in finding.evidence]
        once += bool(settled)
        for evidence in settled:
            print(f"build {done}: {evidence}", flush=True)
        if done % 10 == 0:
            print(f"{done - refused} of {done} built", flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{done - refused} of {done} built ({asked.layers} layers, {os.cpu_count()} cores, {minutes:.0f} minutes)")
    print(f"one pass differed, and fresh loads did not, in {once}")


if __name__ == "__main__":
    main()
