"""Build, merge and check of a dense model of the shape of Llama-3.1-8B against `cp -r` and PEFT, as `scale.py` does.

`python benchmarks/dense.py --size half --rounds 3` takes half of its layers (9.1 GB) and 37 GB of disk. What each row
measures stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml
from checkpoint import DENSE
from tabulating import call, tabulate
from ways import CHECKPOINT, COPY, OURS, PEFT, PLAIN, SOLIDIFY, Bar, Places, Row, Way

LLAMA = "transformers.models.llama.modeling_llama"
BOUNDED = Bar("resident", 1.3e9)
READ = "cat of the merged model"
FIRST = "first token of the base"
ROWS = {
    "i": Row("build with renames, digests known", "build", (COPY,), (Bar("seconds", 1.15, COPY), BOUNDED)),
    "j": Row(
        "build with renames, nothing known", "build, nothing known", (COPY,), (Bar("seconds", 1.4, COPY), BOUNDED)
    ),
    "k": Row("build without renames, digests known", "build in place", (COPY,), (BOUNDED,)),
    "l": Row(
        "merge onto the artifact",
        "merge",
        (COPY, PEFT),
        (Bar("seconds", 1.25, COPY), Bar("seconds", 0.7, PEFT), BOUNDED),
    ),
    "m": Row(
        "merge onto the plain base",
        "merge, plain",
        (COPY, PEFT),
        (Bar("seconds", 1.25, COPY), Bar("seconds", 0.7, PEFT), BOUNDED),
    ),
    "n": Row("check of the merged model", "check", (READ,), (Bar("seconds", 1.1, READ), BOUNDED)),
    "o": Row("load and first token", "first token", (FIRST,)),
}


def ways(places: Places) -> dict[str, Way]:
    """Returns every command that can be measured; one that reads what another wrote stands right behind it."""
    base, artifact = places.checkpoint("dense"), places.made("base/artifact")
    adapter, tuned = places.made("adapter"), places.made("plain_adapter")
    output, merged = places.made("output"), places.made("merged")
    build, load = (f"solidify.command.cli,solidify.{name},{LLAMA}" for name in ("building", "merging.export"))

    def builds(recipe: str) -> list[str | Path]:
        return [*SOLIDIFY, "build", places.made(f"{recipe}.yaml"), "--output", output]

    note = [*OURS, "note", base]
    return {
        COPY: Way(["cp", "-r", base, output], [base], output),
        "build": Way(builds("renamed"), [base], output, build, before=note),
        "build, nothing known": Way(builds("renamed"), [base], output, build, forgetful=True),
        "build in place": Way(builds("in_place"), [base], output, build, before=note),
        PEFT: Way([*PLAIN, "merge", base, tuned, output], [base, tuned], output, f"peft,{LLAMA}"),
        "merge, plain": Way([*SOLIDIFY, "merge", tuned, "--output", output], [base, tuned], output, load),
        "merge": Way([*SOLIDIFY, "merge", adapter, "--output", merged], [artifact, adapter], merged, load),
        READ: Way(["sh", "-c", 'cat "$0"/*.safetensors > /dev/null', merged], [merged]),
        "check": Way([*SOLIDIFY, "check", merged], [merged], None, load),
        FIRST: Way([*PLAIN, "first", base], [base], None, LLAMA),
        "first token": Way([*OURS, "first", artifact], [artifact], None, load),
    }


def prepare(places: Places, chosen: Mapping[str, Way], environment: Mapping[str, str]) -> None:
    """Makes what the ways start from, without timing it."""
    base = places.checkpoint("dense")
    call(environment, *CHECKPOINT, base, "--size", places.size, "--layout", "dense")
    shutil.rmtree(places.made(), ignore_errors=True)
    places.made().mkdir()
    for recipe, kind in (("renamed", "Scaled"), ("in_place", "ScaledInPlace")):
        replacement = {
            "replace": "model.layers.*.self_attn.o_proj",
            "expect": "Linear",
            "count": DENSE[places.size]["num_hidden_layers"],
            "with": f"{Path(__file__).with_name('output_scales.py')}:{kind}",
        }
        document = {"base": {"model": str(base)}, "surgery": [replacement]}
        places.made(f"{recipe}.yaml").write_text(yaml.safe_dump(document))
    if chosen.keys() & {"merge", "first token"}:
        call(environment, *SOLIDIFY, "build", places.made("renamed.yaml"), "--output", places.made("base"))
        call(environment, *OURS, "scales", places.made("base/artifact"), places.made("adapter"))
    if chosen.keys() & {PEFT, "merge, plain"}:
        call(environment, *PLAIN, "adapter", base, places.made("plain_adapter"))


def main() -> None:
    """Measures a dense model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=DENSE, default="small", help="half: 9.1 GB, takes 37 GB of disk; full: 16 GB")
    tabulate("dense", parser, ROWS, ways, prepare)


if __name__ == "__main__":
    main()
