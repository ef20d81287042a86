"""Build, merge, load, diff and digests of a large model with experts against the plain ways.

`make bench` and `make bench-full` run it. What each row measures stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import yaml
from checkpoint import CONFIGS
from tabulating import call, tabulate
from ways import CHECKPOINT, COPY, OURS, PEFT, PLAIN, SOLIDIFY, Bar, Places, Row, Way

SHA256 = ["-type", "f", "-exec", "sha256sum", "{}", "+"]
OLMOE = "transformers.models.olmoe.modeling_olmoe"
COPY_HUB = "cp -r of the hub's layout"
REWRITE, REWRITE_HUB = "load and save of the base", "load and save of the hub's layout"
PEFT_HUB = "PEFT's merge, hub's layout"
LOAD, LOAD_HUB = "load of the base", "load of the hub's layout"
BOUNDED = Bar("resident", 1.5e9)
ROWS = {
    "a": Row("build, digests known", "build", (COPY, REWRITE), (Bar("seconds", 0.15, COPY), BOUNDED)),
    "b": Row("build, all digested", "build, nothing known", (COPY, REWRITE), (Bar("seconds", 0.6, COPY), BOUNDED)),
    "c": Row(
        "build from the hub's layout",
        "build from the hub's layout",
        (COPY_HUB, REWRITE_HUB),
        (Bar("seconds", 1.3, COPY_HUB), Bar("seconds", 0.5, REWRITE_HUB), BOUNDED),
    ),
    "d": Row(
        "merge of a LoRA",
        "merge",
        (COPY, PEFT, PEFT_HUB),
        (Bar("seconds", 1.3, COPY), Bar("seconds", 0.4, PEFT_HUB), BOUNDED),
    ),
    "e": Row(
        "load of the artifact",
        "load of the artifact",
        (LOAD_HUB, LOAD),
        (Bar("working", 0.15, LOAD_HUB), Bar("resident", 0.1, LOAD_HUB)),
    ),
    "f": Row("diff of artifact and merged", "diff", ("sha256sum of both",), (BOUNDED,)),
    "g": Row("digests of the artifact", "digests", ("sha256sum of it", "solidify check, all of it"), (BOUNDED,)),
}


def ways(places: Places) -> dict[str, Way]:
    """Returns every command that can be measured; one that reads what another wrote stands right behind it."""
    hub, fused = places.checkpoint("hub"), places.checkpoint("fused")
    artifact, adapter, tuned = (places.made(name) for name in ("base/artifact", "adapter", "plain_adapter"))
    output, merged = places.made("output"), places.made("merged")
    plain, peft = OLMOE, f"peft,{OLMOE}"
    build, load = (f"solidify.command.cli,solidify.{name},{OLMOE}" for name in ("building", "merging.export"))
    diff = "solidify.command.cli,solidify.command.views,solidify.artifact.inspection"

    def builds(recipe: str) -> list[str | Path]:
        return [*SOLIDIFY, "build", places.made(f"{recipe}.yaml"), "--output", output]

    return {
        COPY: Way(["cp", "-r", fused, output], [fused], output),
        REWRITE: Way([*PLAIN, "rewrite", fused, output], [fused], output, plain),
        # The row is about known digests, whatever ran before it.
        "build": Way(builds("fused"), [fused], output, build, before=[*OURS, "note", fused]),
        "build, nothing known": Way(builds("fused"), [fused], output, build, forgetful=True),
        COPY_HUB: Way(["cp", "-r", hub, output], [hub], output),
        REWRITE_HUB: Way([*PLAIN, "rewrite", hub, output], [hub], output, plain),
        "build from the hub's layout": Way(builds("hub"), [hub], output, build, forgetful=True),
        PEFT: Way([*PLAIN, "merge", fused, tuned, output], [fused, tuned], output, peft),
        PEFT_HUB: Way([*PLAIN, "merge", hub, tuned, output], [hub, tuned], output, peft),
        LOAD_HUB: Way([*PLAIN, "load", hub], [hub], None, plain),
        LOAD: Way([*PLAIN, "load", fused], [fused], None, plain),
        "load of the artifact": Way([*OURS, "load", artifact], [artifact], None, load),
        "sha256sum of it": Way(["find", artifact, *SHA256], [artifact]),
        "digests": Way([*OURS, "digests", artifact], [artifact], None, "solidify.directory.manifest"),
        "solidify check, all of it": Way([*SOLIDIFY, "check", artifact], [artifact], None, load),
        "merge": Way([*SOLIDIFY, "merge", adapter, "--output", merged], [artifact, adapter], merged, load),
        "sha256sum of both": Way(["find", artifact, merged, *SHA256], [artifact, merged]),
        "diff": Way([*SOLIDIFY, "diff", artifact, merged], [artifact, merged], None, diff),
    }


def prepare(places: Places, chosen: Mapping[str, Way], environment: Mapping[str, str]) -> None:
    """Makes what the ways start from, without timing it."""
    ready = partial(call, environment)
    for layout, name in (("memory", "fused"), ("hub", "hub")):
        ready(*CHECKPOINT, places.checkpoint(name), "--size", places.size, "--layout", layout)
    shutil.rmtree(places.made(), ignore_errors=True)
    places.made().mkdir()
    for name in ("fused", "hub"):
        replacement = {
            "replace": "model.layers.*.mlp",
            "expect": "OlmoeSparseMoeBlock",
            "count": CONFIGS[places.size]["num_hidden_layers"],
            "with": "solidify.modules.trashcan_moe:TrashCanMoE",
        }
        recipe = {"base": {"model": str(places.checkpoint(name))}, "surgery": [replacement]}
        places.made(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    ready(*SOLIDIFY, "build", places.made("fused.yaml"), "--output", places.made("base"))
    if "merge" in chosen:
        ready(*OURS, "adapter", places.made("base/artifact"), places.made("adapter"))
    if chosen.keys() & {PEFT, PEFT_HUB}:
        ready(*PLAIN, "adapter", places.checkpoint("fused"), places.made("plain_adapter"))


def main() -> None:
    """Measures models with experts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=CONFIGS, default="small", help="full: 13.8 GB, takes 70 GB of disk")
    tabulate("scale", parser, ROWS, ways, prepare)


if __name__ == "__main__":
    main()
