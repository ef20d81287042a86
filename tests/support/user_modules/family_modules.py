"""Modules that fit any family: a wrapper that passes everything through, and a replacement of a linear layer."""

import torch
from torch import nn


def first_changed(output, change):
    """Returns `output` with its first floating tensor changed, whatever it is nested in."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, dict):
        key = next(k for k, v in output.items() if torch.is_tensor(v) and v.is_floating_point())
        output[key] = change(output[key])
        return output
    place = next(i for i, v in enumerate(output) if torch.is_tensor(v) and v.is_floating_point())
    values = (*output[:place], change(output[place]), *output[place + 1 :])
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


class Gained(nn.Module):
    """Wraps any module and scales the first tensor that it returns; starts as the identity.

    What it lacks it takes from the original, because some models read an attribute of a module beside calling it.
    """

    def __init__(self, original, scale=1.0):
        super().__init__()
        self.original = original
        self.scale = scale
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        output = self.original(*args, **kwargs)
        return first_changed(output, lambda tensor: tensor * (1 + self.scale * self.gain))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class LowRank(nn.Module):
    """Stands for a linear layer: a product of two thin ones, with nothing of the old one kept but its sizes."""

    def __init__(self, original, rank=4):
        super().__init__()
        transposed = not isinstance(original, nn.Linear)  # transformers' Conv1D keeps (in, out)
        rows, columns = original.weight.shape
        inside, outside = (rows, columns) if transposed else (columns, rows)
        self.down = nn.Linear(inside, rank, bias=False)
        self.up = nn.Linear(rank, outside, bias=original.bias is not None)

    @property
    def weight(self):
        """The matrix that it stands for; models read its dtype."""
        return self.up.weight @ self.down.weight

    def forward(self, hidden_states):
        return self.up(self.down(hidden_states))
