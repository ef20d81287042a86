"""The environment that servers run in."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def servers() -> str:
    """The Python interpreter that has vLLM."""
    python = os.environ.get("SOLIDIFY_SERVERS", "")
    assert python, "SOLIDIFY_SERVERS names no interpreter that has vLLM: run `make test-servers`"
    return python
