"""Honest modules and planted faults: ways in which a change does not keep how the model behaves."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def out0(o, f):
    return (f(o[0]), *o[1:]) if isinstance(o, tuple) else f(o)


class Base(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.inner = original
        self.scale = nn.Parameter(torch.ones(1))


# honest
class Scaled(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x * self.scale)


class Gated(nn.Module):
    def __init__(self, original, config):
        super().__init__()
        self.inner = original
        self.gate = nn.Linear(config.hidden_size, 1)

    def forward(self, x):
        return self.inner(x) * torch.sigmoid(self.gate(x))


class Zero(nn.Module):
    def __init__(self, original, config):
        super().__init__()
        self.inner = original
        self.down = nn.Linear(config.hidden_size, 4, bias=False)
        self.up = nn.Linear(4, config.hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.inner(x) + self.up(torch.tanh(self.down(x)))


class Dense(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.a = nn.Linear(config.hidden_size, 24)
        self.b = nn.Linear(24, config.hidden_size)

    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class Dropped(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: F.dropout(x, 0.3, self.training))


class Float32Gate(nn.Module):
    def __init__(self, original, config):
        super().__init__()
        self.inner = original
        self.gate = nn.Linear(config.hidden_size, 1, dtype=torch.float32)

    def forward(self, x):
        return self.inner(x) * torch.sigmoid(self.gate(x.float())).to(x.dtype)


class Buffered(Base):
    def __init__(self, original):
        super().__init__(original)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, *a, **k):
        if self.training:
            self.seen += 1
        return out0(self.inner(*a, **k), lambda x: x * self.scale)


# planted
class TokenShift(nn.Module):
    def __init__(self, original, config):
        super().__init__()
        self.inner = original
        self.mix = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x):
        return self.inner(x + self.mix * F.pad(x, (0, 0, 1, 0))[:, :-1])


class RunningMean(nn.Module):
    def __init__(self, original, config):
        super().__init__()
        self.o = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, *a, **k):
        n = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)[None, :, None]
        return self.o(hidden_states.cumsum(1) / n), None


class NoMask(Base):
    def forward(self, *a, **k):
        k["attention_mask"] = None
        return self.inner(*a, **k)


class Bidirectional(Base):
    def __init__(self, original):
        super().__init__(original)
        self.inner.is_causal = False

    def forward(self, *a, **k):
        k["attention_mask"] = None
        return self.inner(*a, **k)


class LateBidirectional(Base):
    def forward(self, *a, **k):
        self.inner.is_causal = False
        k["attention_mask"] = None
        return self.inner(*a, **k)


class MaskAsGiven(Base):
    """hands the mask on as it is, and never says `is_causal`: without a mask it sees all"""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **k):
        inner, heads = self.inner, lambda x: x.unflatten(-1, (-1, self.inner.head_dim))
        query, key, value = (heads(each(hidden_states)) for each in (inner.q_proj, inner.k_proj, inner.v_proj))
        if hasattr(inner, "q_norm"):
            query, key = inner.q_norm(query), inner.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, inner.layer_idx)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, enable_gqa=True)
        return inner.o_proj(mixed.transpose(1, 2).flatten(2)), None


class BatchMean(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x + 0.1 * self.scale * x.mean((0,), keepdim=True))


class Counter(Base):
    def __init__(self, original):
        super().__init__(original)
        self.n = 0

    def forward(self, *a, **k):
        self.n += 1
        return out0(self.inner(*a, **k), lambda x: x * (1 + 0.01 * self.n))


class Ema(Base):
    def __init__(self, original):
        super().__init__(original)
        self.register_buffer("m", torch.zeros(1))

    def forward(self, *a, **k):
        o = self.inner(*a, **k)
        x = o[0] if isinstance(o, tuple) else o
        self.m.mul_(0.99).add_(0.01 * x.detach().abs().mean())
        return out0(o, lambda x: x + self.m)


class Noisy(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x + 0.01 * torch.randn_like(x))


class Reseeding(Base):
    """gives every call, and all that comes after it, the same random numbers"""

    def forward(self, *a, **k):
        torch.manual_seed(0)
        random.seed(0)
        return out0(self.inner(*a, **k), lambda x: x * self.scale)


class PyNoisy(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x * (1 + 0.01 * random.random()))


class NumpyNoisy(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x * (1 + 0.01 * float(np.random.rand())))


class NumpyReseeding(Base):
    """gives all that comes after it the same random numbers of NumPy"""

    def forward(self, *a, **k):
        np.random.seed(0)
        return out0(self.inner(*a, **k), lambda x: x * self.scale)


class NumpySteady(Base):
    """draws after it has seeded: the same number in every call, and what others draw is moved"""

    def forward(self, *a, **k):
        np.random.seed(0)
        return out0(self.inner(*a, **k), lambda x: x * (1 + 0.01 * float(np.random.rand())))


class Always(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: F.dropout(x, 0.1, True))


class Detached(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x.detach() * self.scale)


class InPlace(Base):
    def forward(self, x, *a, **k):
        x.mul_(1.1)
        return out0(self.inner(x, *a, **k), lambda y: y)


class Rewriting(Base):
    """writes in place into what a gradient needs, what stands there already"""

    def forward(self, *a, **k):
        def gate(x):
            x = x * self.scale
            y = x * x.sigmoid()
            x.mul_(1.0)
            return y

        return out0(self.inner(*a, **k), gate)


class OwnCache(Base):
    """keeps keys itself, not in the cache"""

    def __init__(self, original):
        super().__init__(original)
        self.past = None

    def forward(self, x):
        if self.training:
            return self.inner(x)
        if self.past is not None and x.shape[1] == 1 and self.past.shape[0] == x.shape[0]:
            self.past = torch.cat([self.past, x], 1)
        else:
            self.past = x
        return self.inner(x) + 0.2 * self.scale * self.past.cumsum(1)[:, -x.shape[1] :]


class Asserting(Base):
    def forward(self, *a, **k):
        assert k.get("use_cache") is None and False


class NumberOfTokens(Base):
    """position by arange of what it is given"""

    def forward(self, x):
        return self.inner(x) * (1 + 0.1 * self.scale * torch.arange(x.shape[1])[None, :, None])


class ConfigWriter(nn.Module):
    def __init__(self, original, config):
        super().__init__()
        self.inner = original
        config.rms_norm_eps = 7.0
        raise RuntimeError("late")


class Float32Out(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x.float() * self.scale.float())


class SeqNorm(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x / (1 + self.scale * x.cumsum(1).abs().mean(-1, keepdim=True)))


class ChunkPool(Base):
    def forward(self, *a, **k):
        def f(x):
            t = x.shape[1]
            pad = (-t) % 4
            y = F.pad(x, (0, 0, 0, pad)).view(x.shape[0], -1, 4, x.shape[-1]).mean(2).repeat_interleave(4, 1)[:, :t]
            return x + 0.1 * self.scale * y

        return out0(self.inner(*a, **k), f)


class MeanOverAll(Base):
    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x / (1 + self.scale * x.abs().mean()))


# Faults that others planted, in families of other kinds.
class Shift(Base):
    """Adds a fifth of the position before."""

    def forward(self, x, *a, **k):
        y = self.inner(x, *a, **k)
        return y + 0.2 * self.scale * F.pad(x, (0, 0, 1, 0))[:, :-1]


class NoMaskAtAll(Base):
    """Drops the attention mask, wherever it is given."""

    def forward(self, *a, **k):
        if "attention_mask" in k:
            k["attention_mask"] = None
        else:
            a = (a[0], None, *a[2:])
        return out0(self.inner(*a, **k), lambda x: x * self.scale)


class CumulatedRows(Base):
    """A row sees the rows before it."""

    def forward(self, *a, **k):
        return out0(self.inner(*a, **k), lambda x: x * self.scale + 0.1 * (x.cumsum(0) - x))


class MemoMask(Base):
    """Keeps a mask by its shape."""

    def __init__(self, original):
        super().__init__(original)
        self.kept = {}

    def forward(self, *a, **k):
        mask = k.get("attention_mask")
        if mask is not None:
            k["attention_mask"] = self.kept.setdefault(tuple(mask.shape), mask)
        return out0(self.inner(*a, **k), lambda x: x * self.scale)


class Plain(nn.Module):
    """Has no parameters of its own, and gives what the original gives where it is called once."""

    def __init__(self, original):
        super().__init__()
        self.inner = original


class PlainNoCache(Plain):
    def forward(self, *a, **k):
        k["past_key_values"] = None
        return self.inner(*a, **k)


class PlainStep(Plain):
    def forward(self, x):
        return self.inner(x) * (2 if x.shape[1] == 1 else 1)


class PlainSame(Plain):
    def forward(self, *a, **k):
        return self.inner(*a, **k)


class ZeroBufferShift(Plain):
    """A shift that a buffer of zeros hides."""

    def __init__(self, original, config):
        super().__init__(original)
        self.register_buffer("mix", torch.zeros(config.hidden_size))

    def forward(self, x):
        return self.inner(x + self.mix * F.pad(x, (0, 0, 1, 0))[:, :-1])


class HalfDetached(Base):
    def forward(self, x):
        return self.inner(torch.cat([x[:, :1], x[:, 1:].detach()], 1)) * self.scale


class ForgetsSteps(Base):
    """What a single step leaves behind in the cache is lost: the step itself is right, the ones after it are not."""

    def __init__(self, original, config, layer_idx):
        super().__init__(original)
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        output = self.inner(hidden_states, *args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and hidden_states.shape[1] == 1:
            layer = past_key_values.layers[self.layer_idx]
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            layer.keys[:, :, -1] = 0
            layer.values[:, :, -1] = 0
        return output


class RemembersPlaces(Base):
    """Rotary embeddings of a single token are kept by the number of rows: the token after it stands where it stood."""

    def __init__(self, original):
        super().__init__(original)
        self.places = {}

    def forward(self, hidden_states, *args, position_embeddings=None, **kwargs):
        if hidden_states.shape[1] == 1:
            position_embeddings = self.places.setdefault(len(hidden_states), position_embeddings)
        return self.inner(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)


class OneToken(Base):
    """A fast path for a single token that is not what the slow one computes."""

    def forward(self, hidden_states):
        return self.inner(hidden_states) * (2 if hidden_states.shape[0] * hidden_states.shape[1] == 1 else 1)


class Seldom(Base):
    """Drops what it computes once in fifty calls."""

    def forward(self, hidden_states):
        if torch.rand(()) < 0.02:
            return torch.zeros_like(hidden_states)
        return self.inner(hidden_states)


class CrossDetached(Base):
    """Lets no gradient through to the encoder."""

    def forward(self, hidden_states, key_value_states=None, **kwargs):
        given = None if key_value_states is None else key_value_states.detach()
        return self.inner(hidden_states, key_value_states=given, **kwargs)


class Tallies(Base):
    """Counts tokens in a buffer, and masks with one of zeros and ones, as nanoGPT does."""

    def __init__(self, original):
        super().__init__(original)
        self.register_buffer("tokens", torch.zeros(()))
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)))

    def forward(self, hidden_states):
        self.tokens += hidden_states.shape[0] * hidden_states.shape[1]
        return self.inner(hidden_states) * (self.mask[-1] == 1).float().mean().to(hidden_states.dtype)


class Saturated(Base):
    """At some positions all features stand at a bound: nothing that is given there counts, and no gradient is lost."""

    def forward(self, x):
        output = self.inner(x) * self.scale
        return torch.where(x[..., :1] > 0, output.clamp(-1e-6, 1e-6), output)


class Skipped(Base):
    """Leaves out the tokens that a router does not choose (mixture of depths)."""

    def forward(self, x):
        return self.inner(x) * self.scale * (x[..., :1] > 0)


# Each of these is seen by one pass of the probes alone.
class ShortPiece(Base):
    """Wrong for a piece that is shorter than the whole, and longer than what comes over a cache."""

    def forward(self, x):
        return self.inner(x) * self.scale * (2 if 2 < x.shape[1] < 8 else 1)


class SecondPiece(Base):
    """Wrong for two tokens of several rows."""

    def forward(self, x):
        return self.inner(x) * self.scale * (2 if x.shape[1] == 2 and len(x) > 1 else 1)


class SeveralSteps(Base):
    """Wrong at single steps of several rows."""

    def forward(self, x):
        return self.inner(x) * self.scale * (2 if x.shape[1] == 1 and len(x) > 1 else 1)


class SecondStep(Base):
    """Wrong at a single step of one row that follows another such."""

    def __init__(self, original):
        super().__init__(original)
        self.before = None

    def forward(self, x):
        now = tuple(x.shape[:2])
        wrong, self.before = self.before == now == (1, 1), now
        return self.inner(x) * self.scale * (2 if wrong else 1)


class OneRow(Base):
    """Wrong for one row of several tokens."""

    def forward(self, x):
        return self.inner(x) * self.scale * (2 if len(x) == 1 and x.shape[1] > 1 else 1)


class MemoContents(Base):
    """Keeps what several rows were given first, by their shape: the same shape with other contents goes wrong."""

    def __init__(self, original):
        super().__init__(original)
        self.kept = {}

    def forward(self, x):
        several = len(x) > 1 and x.shape[1] > 8
        kept = self.kept.setdefault((x.shape, x.dtype), x.detach().clone()) if several else x
        return self.inner(x) * self.scale + 0.1 * kept


class PeekingAlone(nn.Module):
    """An attention that sees all positions where it is given no mask, as of a row that is not padded."""

    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states, *args, attention_mask=None, **kwargs):
        output = self.original(hidden_states, *args, attention_mask=attention_mask, **kwargs)
        if attention_mask is None and hidden_states.shape[1] > 1:
            output = (output[0] + hidden_states.mean(1, keepdim=True), *output[1:])
        return output
