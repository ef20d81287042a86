"""Imports what a verb needs, and leaves the screen to what solidify says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def start_verb() -> Iterator[None]:
    """Imports what a verb needs, and leaves the screen to what solidify says.

    That is: no chatter and no notes to developers from the libraries below it. What is imported stays, so nothing is
    gained by looking through it for garbage, again and again meanwhile and once more at the end: a second or two.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        _quiet_libraries()
        yield
        _keep_what_is_there()
    finally:
        if collects:
            gc.enable()


@cache
def _keep_what_is_there() -> None:
    gc.freeze()  # once in a process: later there are models, which shall be found when they are garbage


def _quiet_libraries() -> None:
    import warnings

    import datasets
    from transformers import PreTrainedModel  # noqa: F401  # every verb needs it, some only later
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
