"""Custom models as the common hand-made recipe writes them: subclasses that put a module in place themselves."""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedConfig, PreTrainedModel


class PlainMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.hidden_size)
        self.down = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.down(torch.relu(self.up(hidden_states)))


class TrashConfig(OlmoeConfig):
    model_type = "plain-trash-olmoe"


class TrashModel(OlmoeForCausalLM):
    """Layer 0 gets a new MLP, layer 1 keeps its experts."""

    config_class = TrashConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp = PlainMLP(config)
        self.post_init()


class LoadsInConstructor(TrashModel):
    """The seed's `torch.load` from an environment variable inside `__init__`."""

    def __init__(self, config):
        OlmoeForCausalLM.__init__(self, config)
        self.model.layers[0].mlp = PlainMLP(config)
        self.model.layers[0].mlp.load_state_dict(torch.load(os.environ["CUSTOM_MODULE_WEIGHTS_PATH"]))
        self.post_init()


class Forgetful(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original
        self.register_buffer("table", torch.arange(32) / 32 + 0.5, persistent=False)
        self.number = torch.arange(32) / 32 + 0.5

    def forward(self, hidden_states):
        return self.original(hidden_states) * self.table


class ForgetfulModel(OlmoeForCausalLM):
    config_class = TrashConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp = Forgetful(self.model.layers[0].mlp)
        self.post_init()


class Gated(nn.Module):
    """Declares a parameter at 0.5."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.gate = nn.Parameter(torch.full((32,), 0.5))

    def forward(self, hidden_states):
        return self.original(hidden_states) * self.gate


class GatedModel(OlmoeForCausalLM):
    config_class = OlmoeConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp.register_parameter("trash_bias", nn.Parameter(torch.full((32,), 0.5)))
        self.post_init()


class SameNames(nn.Module):
    """A new module whose router has, by chance, the old one's name and shape."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.out = nn.Linear(config.num_experts, config.hidden_size)

    def forward(self, hidden_states):
        return self.out(self.gate(hidden_states))


class SameNamesModel(OlmoeForCausalLM):
    config_class = OlmoeConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp = SameNames(config)
        self.post_init()


class BareConfig(PreTrainedConfig):
    model_type = "plain-bare"
    hidden_size: int = 32
    vocab_size: int = 128


class BareModel(PreTrainedModel):
    """The seed's example: a PreTrainedModel that returns a dict of logits."""

    config_class = BareConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.internal_linear_1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return {"logits": self.lm_head(self.internal_linear_1(self.embeddings(input_ids)))}
