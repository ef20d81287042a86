"""Imports what a verb needs, and leaves the screen to what solidify says."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
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
    # PEFT imports bitsandbytes, which says on some CPUs that a kernel from the hub is not there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when a verb imports it, which not all do

    from transformers import PreTrainedModel  # noqa: F401  # every verb needs it, some only later
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
