"""What checks return: findings, and a report that gathers them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solidify.errors import CheckFailed


@dataclass(frozen=True)
class Finding:
    """One promise, whether it holds (None: it was only measured), and the evidence in half a sentence."""

    name: str
    passed: bool | None
    evidence: str

    def document(self) -> dict[str, Any]:
        """Returns the finding as plain values."""
        return {"name": self.name, "passed": self.passed, "evidence": self.evidence}


@dataclass
class Report:
    """Findings by stage, in order, and the numbers that were measured beside them."""

    subject: str
    stages: dict[str, list[Finding]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def add(self, stage: str, findings: Iterable[Finding]) -> None:
        """Appends findings to a stage."""
        self.stages.setdefault(stage, []).extend(findings)

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
        """Whether something was checked and nothing failed."""
        return not self.failed and any(finding.passed for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        return {
            "subject": self.subject,
            "passed": self.passed,
            "stages": {stage: [f.document() for f in found] for stage, found in self.stages.items()},
            "measured": self.measured,
        }

    def write(self, path: Path, **more: Any) -> None:
        """Writes the report as JSON, with further entries."""
        text = json.dumps({**self.document(), **more}, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")

    def require(self) -> None:
        """Raises CheckFailed when a finding failed or nothing was checked."""
        if self.passed:
            return
        lines = [f"{finding.name}: {finding.evidence}" for finding in self.failed] or ["nothing was checked"]
        raise CheckFailed("a check failed:\n" + "\n".join(f"  - {line}" for line in lines))
