"""The private names of TRL are there, and mean what the package takes them for."""

from __future__ import annotations

import inspect
from typing import Any

import installed
import torch
from torch import nn
from trl import DistillationTrainer
from trl.models import utils

from solidify.upstream import trl as seams


def test_it_is_the_version_that_was_read() -> None:
    installed.same_minor("trl", seams.TESTED)


def test_the_distillation_trainer_has_these_names_and_goes_through_them() -> None:
    installed.same_parameters(DistillationTrainer, "_prepare_inputs", ("self", "generation_batch"))
    whole = inspect.getsource(DistillationTrainer)
    for line in (
        "self._forward_redirection = _ForwardRedirection()",
        "loss, entropy_sum, num_valid_tokens = self._forward_redirection(",
        "if self._step % generate_every == 0 or self._buffered_inputs is None:",
        "data_collator=identity",  # so a batch of prompts is a list
    ):
        assert line in whole, f"TRL's DistillationTrainer no longer says {line}: read upstream/trl.py again"


class Hooked(nn.Module):
    """Its hook adds to whatever it returns, as an added head does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda _module, _args, out: self._add(out))

    @staticmethod
    def _add(out: Any) -> Any:
        return (*out, "added") if isinstance(out, tuple) else {**out, "name": "added"}

    def forward(self) -> tuple[Any, ...]:
        return ("own",)


def test_a_hook_adds_nothing_to_what_a_redirected_method_returns() -> None:
    model, pair = Hooked(), (torch.ones(1), 2)
    installed.same_parameters(
        utils._ForwardRedirection, "__call__", ("self", "wrapper_module", "original_module", "method", "args", "kwargs")
    )
    assert utils._ForwardRedirection()(model, model, lambda: pair) == (*pair, "added")  # so it is in TRL
    assert seams._Redirection()(model, model, lambda: pair) == pair
    assert model() == ("own", "added")
