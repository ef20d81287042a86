"""Modules that write to tensors of others: in their constructor, in `adopt`, or when they run."""

import torch
from torch import nn

REACHED = {}  # "model": the model that they reach into, as a script's global is


def scale(tensor):
    tensor.data.mul_(1.5)


def scale_in_place(tensor):
    with torch.no_grad():
        tensor.mul_(1.5)


class Wrapped(nn.Module):
    """Computes what the original does."""

    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, *args, **kwargs):
        return self.original(*args, **kwargs)


class InConstructor(Wrapped):
    def __init__(self, original):
        super().__init__(original)
        REACHED["write"]()


class InAdopt(Wrapped):
    def adopt(self, original):
        REACHED["write"]()


class Calibrated(Wrapped):
    """Looks at what the original's parts return, by hooks that it takes off, and asks for what stands elsewhere."""

    def adopt(self, original):
        seen = []
        handles = [part.register_forward_hook(lambda *args: seen.append(args[2])) for part in original.modules()]
        original(torch.randn(1, 3, original.gate_proj.in_features))
        for handle in handles:
            handle.remove()
        model = REACHED["model"]
        model.config.hidden_act = str(model.config.hidden_act)
        model.model.norm.variance_epsilon = float(model.model.norm.variance_epsilon)
        original.seen = len(seen)
        self.seen = len(seen)


class Sparse(nn.Module):
    """Holds a tensor that no weight file holds."""

    def __init__(self, buffer=False, device="cpu"):
        super().__init__()
        tensor = torch.eye(4, device="meta") if device == "meta" else torch.eye(4).to_sparse()
        self.register_buffer("kept", tensor) if buffer else self.register_parameter("kept", nn.Parameter(tensor))

    def forward(self, hidden_states):
        return hidden_states


class Numbered(Wrapped):
    """Counts, in its class, how many there are."""

    made = 0

    def __init__(self, original):
        super().__init__(original)
        type(self).made += 1
        Wrapped.latest = self.made


class InForward(Wrapped):
    def forward(self, *args, **kwargs):
        if "write" in REACHED:
            REACHED.pop("write")()
        return self.original(*args, **kwargs)


class LateInForward(Wrapped):
    """Writes to what it took over, once it has been looked at by itself."""

    def __init__(self, original):
        super().__init__(original)
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 8:
            REACHED["write"]()
        return self.original(*args, **kwargs)


class Head(nn.Module):
    """A new head."""

    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.hidden_size, 1)
        REACHED["write"]()

    def forward(self, hidden_states):
        return self.out(hidden_states)


class Joining(Head):
    """A head that tells the model of itself."""

    def join(self, model, name):
        model.joined = name


class OwnScaled(nn.Module):
    """Takes the original's weight over and scales it: what it changes is its own."""

    def __init__(self, original):
        super().__init__()
        self.weight = original.weight
        scale(self.weight)

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Counting(Wrapped):
    """Counts its calls in a buffer of another module."""

    def forward(self, *args, **kwargs):
        REACHED["counter"].seen += 1
        return self.original(*args, **kwargs)
