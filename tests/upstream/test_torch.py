"""The private names of PyTorch are there, and mean what the package takes them for."""

from __future__ import annotations

import installed
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from solidify.upstream import torch as seams


def test_it_is_the_version_that_was_read() -> None:
    installed.same_minor("torch", seams.TESTED)


def test_a_module_keeps_what_is_registered_in_these_tables() -> None:
    module = nn.BatchNorm1d(2)
    module.add_module("child", nn.ReLU())
    held = {key: set(installed.attribute(module, key)) for key in seams.TABLES}
    children = {name for name, _ in module.named_children()}
    parameters, buffers = ({n for n, _ in named} for named in (module.named_parameters(), module.named_buffers()))
    assert held == {"_parameters": parameters, "_buffers": buffers, "_modules": children}


def test_parameters_are_left_out_of_the_broadcast() -> None:
    installed.same_parameters(
        DistributedDataParallel,
        "_set_params_and_buffers_to_ignore_for_model",
        ("module", "params_and_buffers_to_ignore"),
    )
    model = nn.Linear(2, 2)
    seams.leave_out_of_broadcast(model, ["weight"])
    assert model._ddp_params_and_buffers_to_ignore == ["weight"]
    assert torch.distributed.is_available()
