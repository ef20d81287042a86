"""Modules as users write them: one file, torch only."""

import torch
from torch import nn


class Scaled(nn.Module):
    """Wraps any module; a bare parameter scales what it returns. Starts as the identity."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, *args, **kwargs):
        output = self.original(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] * self.scale, *output[1:])
        return output * self.scale


class Bottleneck(nn.Module):
    """A linear layer with a bottleneck beside it, and a bare parameter; can be bypassed."""

    def __init__(self, original, width=8):
        super().__init__()
        self.weight = original.weight
        self.down = nn.Linear(original.in_features, width)
        self.up = nn.Linear(width, original.out_features)
        self.scale = nn.Parameter(torch.ones(1))
        self.bypass = False

    def forward(self, x):
        y = nn.functional.linear(x, self.weight)
        return y if self.bypass else y + self.scale * self.up(torch.tanh(self.down(x)))


class PlainMLP(nn.Module):
    """A replacement in the seeds' sense: built from the configuration alone."""

    def __init__(self, config, factor=1):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, factor * config.hidden_size)
        self.down = nn.Linear(factor * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.down(torch.relu(self.up(hidden_states)))


class Numbered(nn.Module):
    """Asks for everything that is supplied."""

    def __init__(self, config, layer_idx, original, extra=0):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.layer_idx = layer_idx
        self.extra = extra
        self.original = original

    def forward(self, hidden_states):
        return self.original(hidden_states)


class Adopter(nn.Module):
    """Takes a weight over from what it replaces, once."""

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.out = nn.Linear(config.num_experts, config.hidden_size)

    def adopt(self, original):
        self.router.weight.copy_(original.gate.weight)

    def forward(self, hidden_states):
        return self.out(torch.softmax(self.router(hidden_states), dim=-1))


class Mixing(nn.Module):
    """Looks ahead, but only once its gate is open."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states):
        return self.original(hidden_states) + self.gate * hidden_states.mean(dim=1, keepdim=True)


class ReturnsTuple(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states):
        return self.original(hidden_states), None


class WrongShape(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, hidden_states):
        return self.out(hidden_states)


class Upcasts(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states):
        return self.original(hidden_states).double()


class TakesNothing(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self):
        return None


class Forgetful(nn.Module):
    """Keeps what its constructor computes where a reload does not bring it back."""

    def __init__(self, original, how="buffer"):
        super().__init__()
        self.original = original
        if how == "buffer":
            self.register_buffer("table", torch.arange(32) / 32 + 0.5, persistent=False)
        elif how == "attribute":
            self.table = torch.arange(32) / 32 + 0.5
        else:
            self.register_buffer("table", torch.arange(32) / 32 + 0.5)

    def forward(self, hidden_states):
        return self.original(hidden_states) * self.table.to(hidden_states.dtype)


class PartlyFrozen(nn.Module):
    """Freezes one of its own layers on purpose."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.fixed = nn.Linear(32, 4)
        self.fixed.requires_grad_(False)
        self.free = nn.Linear(4, 32)
        for parameter in original.parameters():
            parameter.requires_grad_(False)

    def forward(self, hidden_states):
        return self.original(hidden_states) + self.free(self.fixed(hidden_states))


class Saturated(nn.Module):
    """A gate so far open that its gradient is exactly zero."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.gate = nn.Parameter(torch.full((8,), 200.0))

    def forward(self, hidden_states):
        return self.original(hidden_states) * torch.sigmoid(self.gate).mean()


class RouterlessMoE(nn.Module):
    """Replaces an MoE block by something without a router."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, 16)
        self.up_proj = nn.Linear(config.hidden_size, 16)
        self.down_proj = nn.Linear(16, config.hidden_size)

    def forward(self, hidden_states):
        return self.down_proj(torch.sigmoid(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MixingFeedForward(nn.Module):
    """Mixes positions where that is no fault."""

    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states):
        output = self.original(hidden_states)
        return output + output.mean(dim=1, keepdim=True)


class FalseBypass(nn.Module):
    """Says that it can be bypassed, and cannot."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.bypass = False

    def forward(self, x):
        return self.original(x) * (0.5 if self.bypass else 1.0)


class SameNames(nn.Module):
    """Has, by chance, a weight of the name and shape that the old router's weight had."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.out = nn.Linear(config.num_experts, config.hidden_size)

    def forward(self, hidden_states):
        return self.out(self.gate(hidden_states))


class Dropping(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.out(self.drop(hidden_states))


class FreshMoE(nn.Module):
    """An MoE block with a router of its own, of the model's router class."""

    def __init__(self, original, config):
        super().__init__()
        self.gate = type(original.gate)(config)
        nn.init.normal_(self.gate.weight)
        self.experts = original.experts

    def forward(self, hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(tokens)
        return self.experts(tokens, index, weights).reshape(hidden_states.shape)


class ValueHead(nn.Module):
    """One number per position, from hidden states."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_states):
        return self.linear(hidden_states).squeeze(-1)


class Fused(nn.Module):
    """One state per position, from several."""

    def __init__(self, config, count):
        super().__init__()
        self.linear = nn.Linear(count * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, *hidden_states):
        return self.linear(torch.cat(hidden_states, dim=-1))


class Spoiler(nn.Module):
    """Changes what it reads."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_states):
        hidden_states.mul_(2)
        return self.linear(hidden_states)


class RowScore(nn.Module):
    """A number for a row, and none for its positions."""

    def __init__(self, config):
        super().__init__()
        self.out = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_states):
        return self.out(hidden_states.mean(1))


class Functional(nn.Module):
    """Linear layers that are never called: their weights are read, and used in a function."""

    def __init__(self, features, classes):
        super().__init__()
        self.features, self.classes = features, classes
        self.layers = nn.ModuleList([nn.Linear(features, classes), nn.Linear(classes, classes)])

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.linear(x, layer.weight, layer.bias)
        return x
