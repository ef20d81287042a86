"""Commands that are compared: those of ours and the plain ways, rows of a table, and their bars."""

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
COPY, PEFT = "cp -r of the base", "PEFT's merge"  # plain ways of both models


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


def needed(rows: Sequence[Row], known: dict[str, Way]) -> dict[str, Way]:
    """Returns the ways that some rows compare, with those that write what they read."""
    names = {name for row in rows for name in (row.ours, *row.plain)}
    read = {path for name in names for path in known[name].reads}
    return {name: way for name, way in known.items() if name in names or way.writes in read}
