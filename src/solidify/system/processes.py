"""Several processes, one per device, as torchrun and `accelerate launch` start them: who does what, and who waits.

The first process builds, writes and speaks. The others wait for it, however long that takes, and hear whether it went
well: none waits for one that has failed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from solidify.errors import SolidifyError
from solidify.system import console

Result = TypeVar("Result")
PATIENCE = timedelta(days=7)  # a build or a merge at full size may take longer than a collective's half hour


def count() -> int:
    """Returns how many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Returns whether this process is the one that writes and speaks."""
    return rank() == 0


def rank() -> int:
    """Returns this process's number among them, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def free_memory() -> int:
    """Returns the bytes of memory that are free or hold what can be read again; where nobody says, those of a GB."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return 2**30


def join() -> None:
    """Meets the other processes, unless accelerate has done so, and leaves the screen to the first one."""
    if count() == 1:
        return
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    _make_channel()
    console.words.quiet = console.results.quiet = not is_first()


@cache
def _make_channel() -> Any:
    """Makes a group for words, apart from the group for gradients: on the CPU, and patient."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def on_first(work: Callable[[], Result]) -> Result:
    """Runs `work` in the first process while the others wait; all return its result, which is copied to the others.

    Raises:
        SolidifyError: what `work` raised, in every process; or the first process is gone.
    """
    if count() == 1:
        return work()
    said: list[Any] = [None]
    result, failure = None, None
    if is_first():
        try:
            result = work()
        except SolidifyError as error:
            failure = error
        said = [(result, (type(failure), str(failure)) if failure else None)]
    _run_exchange(lambda: dist.broadcast_object_list(said, src=0, group=_make_channel()))
    if failure is not None:
        raise failure
    if said[0][1] is not None:
        kind, words = said[0][1]
        raise kind(f"the first process stopped: {words}")
    received: Result = result if is_first() else said[0][0]  # type: ignore[assignment]
    return received


def meet() -> None:
    """Waits until all processes are here.

    Raises:
        SolidifyError: one of them is gone.
    """
    if count() > 1:
        _gather_values(None)


def in_turn(work: Callable[[], Result]) -> Result:
    """Runs `work`, which meets no other process, first in one, then in one on each machine, then in the rest.

    What the first writes into a cache the others find there whole.

    Raises:
        SolidifyError: what `work` raised here, or the news that it failed elsewhere.
    """
    if count() == 1:
        return work()
    mine = 0 if is_first() else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    results: list[Result] = []
    for turn in range(3):
        failure = None
        if turn == mine:
            try:
                results.append(work())
            except SolidifyError as error:
                failure = error
        failures = _gather_values(str(failure) if failure else None)
        if failure is not None:
            raise failure
        broken = [f"process {number} stopped: {words}" for number, words in enumerate(failures) if words is not None]
        if broken:
            raise SolidifyError("; ".join(broken))
    return results[0]


def _gather_values(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * count()
    _run_exchange(lambda: dist.all_gather_object(gathered, value, group=_make_channel()))
    return gathered


def _run_exchange(exchange: Callable[[], Any]) -> None:
    try:
        exchange()
    except RuntimeError as error:  # so gloo says that the connection is closed
        raise SolidifyError("another process ended before its work was done; its own message says why") from error


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor as it is, or, where it is spread over the processes, all of it: then all must ask together."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: torch.Tensor = tensor.full_tensor()
    return gathered


def is_spread(model: torch.nn.Module) -> bool:
    """Returns whether the parameters of a model are spread over the processes (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
