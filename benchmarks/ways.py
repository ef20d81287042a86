"""What `scale.py` measures: the commands of ours and of the plain ways, the rows of its table, and their bars."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHECKPOINT, PLAIN, OURS = (
    [sys.executable, str(Path(__file__).with_name(f"{name}.py"))] for name in ("checkpoint", "plain", "ours")
)
SOLIDIFY = [sys.executable, "-m", "solidify"]
SHA256 = ["-type", "f", "-exec", "sha256sum", "{}", "+"]
OLMOE = "transformers.models.olmoe.modeling_olmoe"


@dataclass(frozen=True)
class Bar:
    """The most that ours may take: a multiple of what a plain way takes, or bytes.

    `seconds` are those of the command as it is, `working` those without imports, on both sides.
    """

    quantity: Literal["seconds", "working", "resident"]
    limit: float
    against: str = ""


@dataclass(frozen=True)
class Row:
    """A part of the table: one way of ours, the plain ways beside it, and the bars (those of size full)."""

    title: str
    ours: str
    plain: tuple[str, ...]
    bars: tuple[Bar, ...] = ()


COPY, COPY_HUB = "cp -r of the base", "cp -r of the hub's layout"
REWRITE, REWRITE_HUB = "load and save of the base", "load and save of the hub's layout"
PEFT, PEFT_HUB = "PEFT's merge", "PEFT's merge, hub's layout"
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


@dataclass(frozen=True)
class Way:
    """A command, the directories that it reads, the one that it writes, and the modules that it needs for sure.

    `forgetful` gives it an empty cache of digests; `before` is a command that runs first and is not timed.
    """

    command: Sequence[str | Path]
    reads: Sequence[Path] = ()
    writes: Path | None = None
    imports: str = ""
    forgetful: bool = False
    before: Sequence[str | Path] = ()


@dataclass(frozen=True)
class Places:
    """Where everything stands: checkpoints, which can be kept, and what is made from them, which is not."""

    root: Path
    size: str

    def checkpoint(self, name: str) -> Path:
        """Returns the place of a generated checkpoint, `hub` or `fused`."""
        return self.root / (name if self.size == "full" else f"{self.size}_{name}")

    def made(self, name: str = "") -> Path:
        """Returns the place of something that is removed at the end."""
        return self.root / f"made_{self.size}" / name


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


def needed(rows: Sequence[Row], known: dict[str, Way]) -> dict[str, Way]:
    """Returns the ways that some rows compare, with those that they rest on."""
    names = {name for row in rows for name in (row.ours, *row.plain)}
    names |= {"merge"} if names & {"diff", "check"} else set()
    return {name: way for name, way in known.items() if name in names}
