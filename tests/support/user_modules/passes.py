"""Feed-forwards that give something else in the fresh process of a build, by fault or as kernels do."""

import sys

import torch
from torch import nn

WATCHED = sys.modules.get("solidify", "") is None  # an import of it is made impossible there
CALLS = []


class Wrapper(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original
        self.called = []

    def forward(self, hidden_states):
        output = self.original(hidden_states)
        if WATCHED and self.off():
            output = output * (1 + 2**-10)
        CALLS.append(0)
        self.called.append(0)
        return output


class FirstOfProcess(Wrapper):
    """As a kernel library that settles when it is first used: off in the first pass of the process alone."""

    def off(self):
        return len(CALLS) < 2


class Twice(Wrapper):
    """Off in two of the passes that the process makes."""

    def off(self):
        return len(CALLS) < 4


class FirstOfEach(Wrapper):
    """Off in the first pass of every model that is loaded."""

    def off(self):
        return not self.called


class Chance(Wrapper):
    def off(self):
        return bool(torch.rand(()) < 0.5)


class Other(Wrapper):
    def off(self):
        return True
