"""A controller that remembers, for the recipes of tests/system/test_processes.py (it can end its process)."""

from __future__ import annotations

import os
import signal

import torch


class Integral:
    """Moves every trash can's threshold by what it has summed up over all steps.

    Ends its process after the step that the environment names as `process:step`, as a power cut would.
    """

    def __init__(self, rate: float = 0.01) -> None:
        self.rate = rate
        self.total = torch.zeros(())
        self.steps: list[int] = []

    def statistics(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.sum().float()

    def after_step(self, model: torch.nn.Module, means: torch.Tensor, step: int, steps: int) -> None:
        self.total = self.total + means * step
        self.steps.append(step)
        for module in model.modules():
            if type(module).__name__ == "TrashCan" and module.weight.requires_grad:
                module.bias.clamp_(min=-2.0)  # wakes it
                module.bias += self.rate * torch.sin(self.total) * len(self.steps)
        if os.environ.get("END_AFTER") == f"{os.environ.get('RANK', '0')}:{step}":
            os.kill(os.getpid(), signal.SIGKILL)
