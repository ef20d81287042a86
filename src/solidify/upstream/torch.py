"""The private names of PyTorch that the package uses, each under a name of ours.

`TESTED` is the minor version that they were read and tried in; `tests/upstream/` compares each with the one installed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

TESTED = "2.13"

# Where a module keeps what is registered in it.
TABLES = ("_parameters", "_buffers", "_modules")


def leave_out_of_broadcast(model: nn.Module, names: Sequence[str]) -> None:
    """Lets DistributedDataParallel neither send nor watch some parameters; FSDP alone has a public argument for it."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]
