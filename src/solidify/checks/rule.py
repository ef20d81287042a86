"""A rule that was read in a server's documents or sources: what speaks against it, and the names that it speaks of.

A rule never proves anything: no server was run for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from solidify.findings import Finding
from solidify.model import anatomy

VLLM, SGLANG = "vLLM", "SGLang"
_SHOWN = 3


@dataclass(frozen=True)
class Rule:
    """One condition: what speaks against it, what shows that it holds, what to do, and which servers ask for it."""

    name: str
    faults: Sequence[str]
    holds: str
    remedy: str
    servers: tuple[str, ...] = (VLLM, SGLANG)

    def finding(self) -> Finding:
        """Returns what was read, neither proved nor failed."""
        if not self.faults:
            return Finding(f"serving: {self.name}", None, f"rule, met; not run: {self.holds}")
        more = f" and {len(self.faults) - _SHOWN} more" if len(self.faults) > _SHOWN else ""
        said = f"{'; '.join(self.faults[:_SHOWN])}{more}. {self.remedy}"
        return Finding(f"serving: {self.name}", None, f"rule, not met; not run: {said}")


def prefix(model: PreTrainedModel) -> str:
    """Returns what names have more in the whole model than in its part without a head."""
    return "" if model.base_model is model else model.base_model_prefix + "."


def full(model: PreTrainedModel, name: str) -> str:
    """Returns the name in the whole model of a module of its part without a head."""
    return (prefix(model) + name).removesuffix(".") or "the model"


def listed(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Returns full names; those that differ in numbers only become one, with their number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(anatomy.fold([full(model, name)])[0], []).append(full(model, name))
    return [each[0] if len(each) == 1 else f"{folded} ({len(each)} times)" for folded, each in groups.items()]
