"""Replacements that keep or break the conditions of the servers' transformers backends."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class InterfaceAttention(nn.Module):
    """Attention without positions, by the interface, with all keyword arguments: as the documents ask."""

    def __init__(self, original, config, layer_idx):
        super().__init__()
        self.q_proj, self.k_proj = original.q_proj, original.k_proj
        self.v_proj, self.o_proj = original.v_proj, original.o_proj
        self.head_dim = original.head_dim
        self.scaling = original.scaling
        self.num_key_value_groups = original.num_key_value_groups
        self.config = config
        self.layer_idx = self.place = layer_idx

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        query, key, value = self.project(hidden_states, past_key_values)
        attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed = attention(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)[0]
        return self.o_proj(mixed.reshape((*hidden_states.shape[:-1], -1))), None

    def project(self, hidden_states, past_key_values):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.place)
        return query, key, value


class OwnAttention(InterfaceAttention):
    """Computes attention itself, whatever the configuration says."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        query, key, value = self.project(hidden_states, past_key_values)
        if attention_mask is None:
            lengths = query.shape[2], key.shape[2]
            attention_mask = torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0])
        mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, enable_gqa=True).transpose(1, 2)
        return self.o_proj(mixed.flatten(-2)), None


class DeafAttention(InterfaceAttention):
    """Uses the interface, but keeps the keyword arguments to itself."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        query, key, value = self.project(hidden_states, past_key_values)
        attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed = attention(self, query, key, value, attention_mask, scaling=self.scaling)[0]
        return self.o_proj(mixed.flatten(-2)), None


class ClosedAttention(DeafAttention):
    """Takes what it knows and nothing else."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
    ):
        return super().forward(hidden_states, attention_mask, past_key_values)


class UnknownKernelError(Exception):
    """An error of the user's own, as libraries have them."""


class ChoosyAttention(InterfaceAttention):
    """Knows two kernels by name, and says of any other that it does not, in its own way."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise UnknownKernelError(f"no kernel called {self.config._attn_implementation}")
        return super().forward(hidden_states, attention_mask, **kwargs)


class HidingAttention(InterfaceAttention):
    """Calls the attention function where nobody looks for it, with a number that it works out on the way."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return self.attend(hidden_states, attention_mask, kwargs), None

    def attend(self, hidden_states, attention_mask, kwargs):
        return super().forward(hidden_states, attention_mask, **kwargs)[0]


class RepeatingAttention(InterfaceAttention):
    """Gives the attention function as many keys as queries, whatever the configuration says."""

    def __init__(self, original, config, layer_idx):
        super().__init__(original, config, layer_idx)
        self.repeats, self.num_key_value_groups = self.num_key_value_groups, 1

    def project(self, hidden_states, past_key_values):
        query, key, value = super().project(hidden_states, past_key_values)
        return [query, *(t.repeat_interleave(self.repeats, dim=1) for t in (key, value))]


class HeldAttention(nn.Module):
    """Holds the attention that it replaces, and reads its parts instead of calling it."""

    def __init__(self, original, config, layer_idx):
        super().__init__()
        self.original = original
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = original.scaling
        self.num_key_value_groups = original.num_key_value_groups

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.original.head_dim)
        parts = (self.original.q_proj, self.original.k_proj, self.original.v_proj)
        query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in parts)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed = attention(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)[0]
        return self.original.o_proj(mixed.reshape((*hidden_states.shape[:-1], -1))), None


class NumberlessAttention(InterfaceAttention):
    """Does not say which layer it is."""

    def __init__(self, original, config, layer_idx):
        super().__init__(original, config, layer_idx)
        del self.layer_idx


class Shift(nn.Module):
    """A feed-forward that also sees the position before: causal, but no server keeps that position for it."""

    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states):
        return self.original(hidden_states + F.pad(hidden_states, (0, 0, 1, 0))[:, :-1])


class Misnamed(nn.Module):
    """Says of itself that it is not causal, although the model is."""

    is_causal: bool

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.is_causal = False

    def forward(self, hidden_states):
        return self.original(hidden_states)


class Norms(nn.ModuleList):
    """A second list among the parts of the base model."""

    def __init__(self, original):
        super().__init__([original])

    def forward(self, hidden_states):
        return self[0](hidden_states)


class Twice(nn.Module):
    """Holds one matrix under two names."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.again = original

    def forward(self, hidden_states):
        return self.original(hidden_states)


class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 8)
        self.down = nn.Linear(8, config.hidden_size)

    def forward(self, tokens):
        return self.down(torch.relu(self.up(tokens)))


class Pool(nn.ModuleList):
    """Experts as the documents ask: a list that is called with tokens, indices and weights."""

    def __init__(self, config, number):
        super().__init__(Expert(config) for _ in range(number))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        outputs = torch.zeros_like(hidden_states)
        for place, expert in enumerate(self):
            weight = (top_k_weights * (top_k_index == place)).sum(-1, keepdim=True)
            outputs = outputs + weight.to(outputs.dtype) * expert(hidden_states)
        return outputs


class PooledMoE(nn.Module):
    """An MoE block with experts of its own, kept in `experts` or, with another `name`, elsewhere."""

    def __init__(self, original, config, name="experts", number=None):
        super().__init__()
        self.gate = original.gate
        self.name = name
        self.add_module(name, Pool(config, number or config.num_experts))

    def forward(self, hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(tokens)
        return self.mix(self.get_submodule(self.name), tokens, index, weights).reshape(hidden_states.shape)

    def mix(self, experts, tokens, index, weights):
        return experts(tokens, index, weights)


class KeywordMoE(PooledMoE):
    """Calls its experts by keywords."""

    def mix(self, experts, tokens, index, weights):
        return experts(tokens, top_k_index=index, top_k_weights=weights)


class LoopingMoE(PooledMoE):
    """Goes through its experts itself, so that no server can put its own in their place."""

    def mix(self, experts, tokens, index, weights):
        return Pool.forward(experts, tokens, index, weights)


class FlatExperts(nn.Module):
    """Experts in a matrix that is not stacked by expert, called with two arguments."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.num_experts * config.hidden_size, config.hidden_size) / 32)

    def forward(self, hidden_states, top_k_index):
        experts = self.weight.view(-1, hidden_states.shape[-1], hidden_states.shape[-1])
        return torch.einsum("th,tkhd->td", hidden_states, experts[top_k_index])


class FlatMoE(nn.Module):
    def __init__(self, original, config):
        super().__init__()
        self.gate = original.gate
        self.experts = FlatExperts(config)

    def forward(self, hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, _, index = self.gate(tokens)
        return self.experts(tokens, index).reshape(hidden_states.shape)
