"""What tests of weights share."""

from __future__ import annotations

import pytest

from solidify.weights import format


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that were read to be digested, as they are."""
    found: list[str] = []
    digest = format.Entry.digest

    def noted(entry: format.Entry, **given: bool) -> str:
        found.append(entry.name)
        return digest(entry, **given)

    monkeypatch.setattr(format.Entry, "digest", noted)
    return found
