"""What checks return: findings, and a report that gathers them.

A finding has one of four verdicts. `proved`: the promise was looked at and holds. `failed`: it does not. `measured`:
something was looked at, but it is no proof of the promise (a figure, a sample, the first module of each kind, a rule
that was read). `not looked at`: nothing was, and the evidence says why. What was not looked at is never called proved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from solidify.errors import CheckFailed
from solidify.system import disk, files, markup

_OF_CLASS = re.compile(r"(.+) \(Auto\w+\)")
PROVED, FAILED, MEASURED, NOT_LOOKED_AT = VERDICTS = ("proved", "failed", "measured", "not looked at")
_LABELS = {PROVED: ("proved", "green"), FAILED: ("FAILED", "red"), NOT_LOOKED_AT: ("not looked at", "dim")}


@dataclass(frozen=True)
class Finding:
    """One promise, whether it holds (None: that is not known), and the evidence in half a sentence.

    Of what is not known, `looked` says whether anything was looked at (`measured`) or nothing (`not looked at`).

    Raises:
        ValueError: something that was not looked at is said to hold, or not to.
    """

    name: str
    passed: bool | None
    evidence: str
    looked: bool = True

    def __post_init__(self) -> None:
        """Refuses a judgement of what was not looked at."""
        if not self.looked and self.passed is not None:
            raise ValueError(f"{self.name}: what was not looked at neither holds nor fails")

    @classmethod
    def unseen(cls, name: str, why: str) -> Finding:
        """Makes the finding of a promise that was not looked at; the evidence is `why`."""
        return cls(name, None, why, looked=False)

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.passed is None:
            return MEASURED if self.looked else NOT_LOOKED_AT
        return PROVED if self.passed else FAILED

    def document(self) -> dict[str, Any]:
        """Returns the finding as plain values."""
        return {"name": self.name, "passed": self.passed, "verdict": self.verdict, "evidence": self.evidence}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Finding:
        """Makes a finding of its document again; one without a verdict (of an older report) was looked at."""
        looked = document.get("verdict") != NOT_LOOKED_AT
        return cls(document["name"], document["passed"], document["evidence"], looked)


def fold(findings: Iterable[Finding]) -> list[Finding]:
    """Makes one finding of those that differ in the Auto class that is named last, in the order of the first of each.

    The evidence is that of the first; a failure stays by itself.
    """
    groups: dict[tuple[str, str], list[Finding]] = {}
    for number, finding in enumerate(findings):
        found = _OF_CLASS.fullmatch(finding.name)
        alone = found is None or finding.passed is False
        key = (str(number), "") if alone or found is None else (found[1], finding.verdict)
        groups.setdefault(key, []).append(finding)
    return [
        group[0] if len(group) == 1 else replace(group[0], name=f"{name} ({len(group)} Auto classes)")
        for (name, _), group in groups.items()
    ]


@dataclass(repr=False)
class Report:
    """Findings by stage, in order, and the numbers that were measured beside them."""

    subject: str
    stages: dict[str, list[Finding]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def add(self, stage: str, findings: Iterable[Finding]) -> None:
        """Appends findings to a stage."""
        self.stages.setdefault(stage, []).extend(findings)

    def carry(self, stage: str, findings: Iterable[Finding]) -> None:
        """Appends what was found of an earlier stage, unless the report holds it."""
        new = [finding for finding in findings if finding not in self.findings]
        if new:
            self.add(stage, new)

    @property
    def findings(self) -> list[Finding]:
        """All findings of all stages."""
        return [finding for findings in self.stages.values() for finding in findings]

    @property
    def failed(self) -> list[Finding]:
        """The findings that failed."""
        return [finding for finding in self.findings if finding.passed is False]

    @property
    def passed(self) -> bool:
        """Whether something was proved and nothing failed."""
        return not self.failed and any(finding.passed for finding in self.findings)

    @property
    def verdicts(self) -> dict[str, int]:
        """How many findings have each verdict."""
        found = [finding.verdict for finding in self.findings]
        return {verdict: found.count(verdict) for verdict in VERDICTS}

    @property
    def told(self) -> dict[str, str]:
        """How many findings of each stage have each verdict, in words."""
        return {stage: tell(Report("", {stage: found}).verdicts) for stage, found in self.stages.items()}

    def __repr__(self) -> str:
        return f"Report({self.subject}: {tell(self.verdicts)})"

    def _repr_html_(self) -> str:
        rows = [(stage, f.name, f.verdict, f.evidence) for stage, found in self.stages.items() for f in found]
        return markup.table(self.subject, ("stage", "promise", "verdict", "evidence"), rows, tell(self.verdicts))

    def document(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        return {
            "subject": self.subject,
            "passed": self.passed,
            "verdicts": self.verdicts,
            "stages": {stage: [f.document() for f in found] for stage, found in self.stages.items()},
            "measured": self.measured,
        }

    def write(self, path: Path, **more: Any) -> None:
        """Writes the report as JSON, whole, with further entries; whether what it is about is `finished` stands first.

        Its last entry is its own digest.
        """
        first = {"finished": more.pop("finished")} if "finished" in more else {}
        document = {**first, **self.document(), **more}
        text = json.dumps({**document, "digest": _digest_document(document)}, indent=1, ensure_ascii=False) + "\n"
        disk.write(path, text)

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """Returns what a report's file holds.

        Raises:
            OSError: there is none.
            ValueError: it is no report, or not as it was written.
        """
        document = files.document(path)
        if not {"subject", "stages", "digest"} <= set(document):
            raise ValueError(f"{path} is not a report of solidify")
        if document.pop("digest") != _digest_document(document):
            raise ValueError(f"{path} is not the report that was written (its digest differs)")
        return document

    def require(self) -> None:
        """Raises CheckFailed when a finding failed or nothing was proved."""
        if not self.passed:
            raise CheckFailed(self.failure(), [f"{finding.name}: {finding.evidence}" for finding in self.failed])

    def failure(self) -> str:
        """Says which findings failed, a line each."""
        lines = [f"{finding.name}: {finding.evidence}" for finding in self.failed] or ["nothing was checked"]
        return "a check failed:\n" + "\n".join(f"  - {line}" for line in lines)


def _digest_document(document: Mapping[str, Any]) -> str:
    return blake3(json.dumps(document, sort_keys=True).encode()).hexdigest()


def tell(counts: Mapping[str, int]) -> str:
    """Writes how many findings have each verdict: `31 proved, 2 measured, 1 not looked at`."""
    counted = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    return ", ".join(counted) or "nothing was looked at"


def label_of(verdict: str) -> str | tuple[str, str]:
    """Returns how a verdict is shown on a line of the console: its words, with their colour where it has one."""
    return _LABELS.get(verdict, verdict)
