"""What is logged while a block runs: pytest's own way is off, as it puts two handlers on every logger in every test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def records(level: int = logging.WARNING) -> Iterator[list[logging.LogRecord]]:
    """Gives the list of what reaches the root logger, from a level on."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler(level)
    handler.emit = found.append  # type: ignore[method-assign]
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield found
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
