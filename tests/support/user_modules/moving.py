"""Modules whose buffers move in training, or that hand odd tensors on."""

import torch
from torch import nn


class Normed(nn.Module):
    """A feed-forward with a BatchNorm over all positions behind it."""

    def __init__(self, original, width=32):
        super().__init__()
        self.original = original
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        y = self.original(x)
        return y + self.norm(y.reshape(-1, y.shape[-1])).reshape(y.shape)


class Unscaled(nn.Module):
    """The same without parameters of its own beside what it wraps."""

    def __init__(self, original, width=32):
        super().__init__()
        self.original = original
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.gain = nn.Linear(width, width)

    def forward(self, x):
        y = self.original(x)
        return y + self.gain(self.norm(y.reshape(-1, y.shape[-1])).reshape(y.shape))


class Counted(nn.Module):
    """Counts the passes of training, and its output grows with them."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return self.original(x) * (1 + self.passes)


class Averaged(nn.Module):
    """Puts another tensor into its buffer with every step of training."""

    def __init__(self, original, width=32):
        super().__init__()
        self.original = original
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x):
        y = self.original(x)
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * y.detach().mean(dim=(0, 1))
        return y + self.mean


class Unsaved(nn.Module):
    """Keeps what moves in training where no file holds it."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.mean = None

    def forward(self, x):
        y = self.original(x)
        if self.training:
            self.mean = y.detach().mean(dim=(0, 1))
        return y if self.mean is None else y + self.mean


class Scored(nn.Module):
    """Has layers of the names that PEFT trains by itself in classifiers."""

    def __init__(self, original, width=32):
        super().__init__()
        self.original = original
        self.score = nn.Linear(width, width)
        self.classifier = nn.Linear(width, width)

    def forward(self, x):
        y = self.original(x)
        return y + 0.1 * self.classifier(torch.tanh(self.score(y)))


class Turned(nn.Module):
    """Hands a transposed tensor to a linear layer."""

    def __init__(self, original, width=32):
        super().__init__()
        self.original = original
        self.mix = nn.Linear(width, width)

    def forward(self, x):
        y = self.original(x)
        turned = y.transpose(-1, -2).contiguous().transpose(-1, -2)
        return y + 0.1 * self.mix(turned)
