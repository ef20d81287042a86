"""The private names of TRL are there, and mean what the package takes them for."""

from __future__ import annotations

import inspect
from typing import Any

import installed
import torch
from torch import nn
from trl import DistillationTrainer, GRPOTrainer, KTOTrainer
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


def test_the_policy_trainer_has_these_names_and_goes_through_them() -> None:
    installed.same_parameters(GRPOTrainer, "_prepare_inputs", ("self", "generation_batch"))
    whole = inspect.getsource(GRPOTrainer)
    for line in (
        "if self._step % generate_every == 0 or self._buffered_inputs is None:",
        "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]",
        "self._step += 1",
        "data_collator=identity",
        'elif self.loss_type in ["cispo", "dapo", "vespo"]:',  # these are divided by all tokens of the step
    ):
        assert line in whole, f"TRL's GRPOTrainer no longer says {line}: read upstream/trl.py again"


def test_the_sampler_of_prompts_draws_each_epoch_from_a_generator_of_its_own() -> None:
    """With `set_epoch`, ReplayedSampler would no longer be needed."""
    sampler = seams.RepeatSampler(range(8), 2, batch_size=4, repeat_count=2, seed=5)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        order = torch.randperm(8, generator=generator).tolist()
        expected = [row for half in (order[:4], order[4:]) for _ in range(2) for row in half for _ in range(2)]
        assert list(sampler) == expected
    assert not hasattr(sampler, "set_epoch")


def test_the_trainer_of_single_answers_takes_its_divergence_from_one_method() -> None:
    installed.same_parameters(KTOTrainer, "_compute_kl_logps", ("self", "model", "batch"))
    whole = inspect.getsource(KTOTrainer._compute_loss)
    for line in (
        "KL_logps = self._compute_kl_logps(model, batch)",
        "ref_KL_logps = self._compute_kl_logps(self.model, batch)",
        'ref_KL_logps = batch["ref_KL_logps"]',
        "kl = (KL_logps - ref_KL_logps).mean().detach()",
    ):
        assert line in whole, f"TRL's KTOTrainer no longer says {line}: read upstream/trl.py again"
    assert whole.index("with torch.no_grad(), disable_gradient") < whole.index("ref_KL_logps = self._compute_kl_logps")


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
