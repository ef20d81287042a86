"""Heads that draft the next tokens of a text, and greedy generation that uses them: the same text in fewer passes.

Added to a causal model (`solidify.add`), a head reads hidden states that the model computes anyway. In the model's
forward pass it returns *features*, position by position; what comes after them happens in training (`unroll`) and in
generation (`speculate`) alone. With `h_t` the model's last hidden state at token `x_t`, which predicts `x_{t+1}`:

- `MultiTokenHead` predicts `x_{t+2}, ..., x_{t+1+drafts}` from `h_t` at once (Medusa, arXiv 2401.10774, section 2.1.1):
      p_i = OutputHead(h_t + SiLU(W_i h_t + b_i)),   i = 1, ..., drafts
  with the model's own output head for all of them. W and b start at zero: each head starts by saying `x_{t+1}`.
- `DraftHead` predicts one token after another with one decoder layer of its own (EAGLE, arXiv 2401.15077; EAGLE-3,
  arXiv 2503.01840, section 3). With hidden states of several layers (l, m, h), the embedding e of the token that
  follows, and what the layer itself returned where the model has not been yet:
      g_t = W [l_t; m_t; h_t],   a_{t,0} = Layer([e_{t+1}; g_t]),   a_{t,s} = Layer([e_{t+1+s}; a_{t,s-1}])
      p(x_{t+2+s}) = OutputHead(a_{t,s})
  With one hidden state and one step, this has the form of DeepSeek-V3's multi-token prediction (arXiv 2412.19437,
  equations 21 to 25, depth one). W starts by passing on what is read last, and the layer by adding nothing: reading the
  final norm last, the head starts with the model's own prediction for `x_{t+1}`.

Training unrolls the steps over every position, as generation does (EAGLE-3's "training-time test"): `unroll` returns
hidden states for the model's output head (the loss term `solidify.losses:draft`). In generation the model verifies the
drafts (arXiv 2211.17192, greedily): `model.generate(..., custom_generate=model.draft.speculate)` is the text that
`model.generate(...)` is, token by token, as far as a model computes several tokens at once as it does one by one. This
file needs torch and transformers only and is copied into artifacts as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput


@dataclass
class Speculated(ModelOutput):  # type: ignore[misc]
    """What `speculate` returns with `return_dict_in_generate=True`.

    `sequences` (batch_size, length) is the text. Of `drafted` tokens a row that the model looked at, `accepted` are in
    the text: all rows go on together, by the fewest. The model was run `passes` times.
    """

    sequences: torch.Tensor | None = None
    drafted: int | None = None
    accepted: int | None = None
    passes: int | None = None


class Drafting(nn.Module):
    """What heads share: greedy generation in which the model verifies what the head drafts.

    `drafts` is how many tokens are drafted at a time. With `detach`, what is read gets no gradient from the head.
    """

    def __init__(self, drafts: int, detach: bool) -> None:
        super().__init__()
        if drafts < 1:
            raise ValueError(f"drafts must be at least 1, but is {drafts}")
        self.drafts, self.detach = drafts, detach

    def unroll(self, features: Any, embeddings: Any, attention_mask: Any = None) -> list[torch.Tensor]:
        """Returns, for each step s, hidden states (batch_size, sequence_length, hidden_size) that predict `x_{t+2+s}`.

        `features` is what `forward` returned, `embeddings` those of the text (batch_size, sequence_length,
        hidden_size). A row is one text: where it is padded, `attention_mask` (batch_size, sequence_length) says so.
        """
        raise NotImplementedError

    def start(self, model: Any, attention_mask: torch.Tensor | None) -> Any:
        """Returns what drafts for one text: called with new features (batch_size, n, ...), the tokens that follow each
        of their positions (batch_size, n), and how many to draft, it returns these (batch_size, count)."""
        raise NotImplementedError

    @torch.no_grad()
    def speculate(self, model: Any, input_ids: torch.Tensor, **given: Any) -> torch.Tensor | Speculated:
        """Generates greedily: `model.generate(..., custom_generate=head.speculate)`; rows may be padded on the left.

        With `return_dict_in_generate=True` it says what was accepted (`Speculated`). transformers hands no streamer on.

        Raises:
            ValueError: something is asked for that is not greedy generation of a decoder with a cache of all positions.
        """
        config = given.pop("generation_config")
        judge = Judge(given.pop("logits_processor"), given.pop("stopping_criteria"), config, input_ids)
        refuse_other(model, config, given)
        text = Text(model, input_ids, given)
        drafter, drafts = self.start(model, text.mask), input_ids[:, :0]
        drafted, accepted, passes = 0, 0, 0
        while True:
            outputs = text.read(drafts)
            new = judge.accept(text.tokens, outputs.logits, drafts)
            passes, drafted = passes + 1, drafted + drafts.shape[1]
            accepted += min(new.shape[1] - 1, drafts.shape[1])
            seen = text.keep(new, drafts.shape[1])
            if judge.done:
                break
            features, following = answer_of(self, model, outputs)[:, :seen], text.tokens[:, -seen:]
            count = min(self.drafts, config.max_length - text.tokens.shape[1] - 1)
            drafts = drafter(features, following, count) if count > 0 else drafts[:, :0]
        told = Speculated(sequences=text.tokens, drafted=drafted, accepted=accepted, passes=passes)
        return told if config.return_dict_in_generate else text.tokens


class MultiTokenHead(Drafting):
    """Predicts several tokens at once from the model's last hidden state; reads one module, `model.norm`.

    Called with (batch_size, sequence_length, hidden_size), it returns (batch_size, sequence_length, drafts,
    hidden_size), a hidden state for each token.
    """

    def __init__(self, config: Any, drafts: int = 3, detach: bool = True) -> None:
        super().__init__(drafts, detach)
        size = config.hidden_size
        self.blocks = nn.ModuleList(nn.Linear(size, size) for _ in range(drafts))
        for parameter in self.blocks.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns a hidden state for each token that is predicted."""
        given = hidden_states.detach() if self.detach else hidden_states
        wide = given.to(next(self.blocks.parameters()).dtype)
        return torch.stack([given + F.silu(block(wide)).to(given.dtype) for block in self.blocks], dim=-2)

    def unroll(self, features: Any, embeddings: Any, attention_mask: Any = None) -> list[torch.Tensor]:
        """Returns the hidden states of each step, which need no embeddings."""
        return list(features.unbind(-2))

    def start(self, model: Any, attention_mask: torch.Tensor | None) -> Any:
        """Returns what drafts: the likeliest token of each head at the last position."""
        speak = model.get_output_embeddings()
        return lambda features, _tokens, count: speak(features[:, -1, :count]).argmax(-1)


class DraftHead(Drafting):
    """Predicts one token after another from hidden states of several layers and the embedding of the next token.

    It reads `sources` modules, all of the model's width (layers, the final norm last), and returns `g` (batch_size,
    sequence_length, hidden_size). The decoder layer has the model's numbers of heads, rotary positions, and the model's
    intermediate size (four times its width where it names none) unless another is given.
    """

    def __init__(
        self,
        config: Any,
        sources: int = 1,
        drafts: int = 4,
        intermediate_size: int | None = None,
        rope_theta: float = 10000.0,
        detach: bool = True,
    ) -> None:
        super().__init__(drafts, detach)
        if sources < 1:
            raise ValueError(f"sources says how many modules are read, at least 1, but is {sources}")
        size, heads, self.sources = config.hidden_size, config.num_attention_heads, sources
        width = intermediate_size or getattr(config, "intermediate_size", None) or 4 * size
        self.fuse = nn.Linear(sources * size, size, bias=False)
        self.layer = DraftLayer(size, heads, getattr(config, "num_key_value_heads", None) or heads, width, rope_theta)
        with torch.no_grad():
            self.fuse.weight.zero_()[:, -size:].copy_(torch.eye(size))

    def forward(self, *hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states (batch_size, sequence_length, hidden_size) of what is read, fused."""
        if len(hidden_states) != self.sources:
            raise ValueError(f"DraftHead was made for sources={self.sources}, but reads {len(hidden_states)} modules")
        given = torch.cat([h.to(hidden_states[-1].device) for h in hidden_states], dim=-1)
        given = given.detach() if self.detach else given
        fused: torch.Tensor = self.fuse(given.to(self.fuse.weight.dtype)).to(given.dtype)
        return fused

    def unroll(self, features: Any, embeddings: Any, attention_mask: Any = None) -> list[torch.Tensor]:
        """Returns the hidden states of each step: at step s, position t also sees its own earlier steps."""
        length = features.shape[1]
        mask = torch.ones_like(features[..., 0], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        alone = torch.eye(length, dtype=torch.bool, device=features.device).expand(len(mask), 1, -1, -1)
        seen, positions = causal(mask, length), count_positions(mask)
        embeddings = embeddings.detach() if self.detach else embeddings
        past, states, found = None, features, list[torch.Tensor]()
        for step in range(self.drafts):
            ahead = F.pad(embeddings[:, step + 1 :], (0, 0, 0, min(step + 1, length)))
            visible = torch.cat([seen, *([alone] * step)], dim=-1)
            states, past = self.layer(states, ahead, positions + step, visible, past)
            found.append(states)
        return found

    def start(self, model: Any, attention_mask: torch.Tensor | None) -> Any:
        """Returns what drafts, with a cache of the layer's own."""
        return Drafter(self.layer, model, attention_mask)


class Drafter:
    """Drafts for one text: keeps the layer's keys and values of all positions where the model has been."""

    def __init__(self, layer: DraftLayer, model: Any, attention_mask: torch.Tensor | None) -> None:
        self.layer, self.mask, self.past = layer, attention_mask, None
        self.embed, self.speak = model.get_input_embeddings(), model.get_output_embeddings()

    def __call__(self, features: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """Reads new features, keeps what they leave behind, and drafts from the last."""
        new = features.shape[1]
        known = 0 if self.past is None else self.past[0].shape[-2]
        mask = features.new_ones(len(features), known + new, dtype=torch.bool)
        if self.mask is not None:  # of the prompt, which the model has read as a whole
            mask[:, : self.mask.shape[1]] = self.mask.bool()
        positions = count_positions(mask)[:, known:]
        states, self.past = self.layer(features, self.embed(tokens), positions, causal(mask, new), self.past)
        drafted, past = [self.speak(states[:, -1:]).argmax(-1)], self.past
        while len(drafted) < count:
            mask, positions = F.pad(mask, (0, 1), value=True), positions[:, -1:] + 1
            states, past = self.layer(states[:, -1:], self.embed(drafted[-1]), positions, mask[:, None, None], past)
            drafted.append(self.speak(states).argmax(-1))
        return torch.cat(drafted, dim=1)


class DraftLayer(nn.Module):
    """A decoder layer that attends by what the embedding and the hidden state say together (EAGLE-3).

    Both are normalised, side by side they make queries, keys and values; the residual stream is the hidden state. The
    projections back into it, `o_proj` and `down_proj`, start at zero.
    """

    def __init__(self, hidden_size: int, heads: int, shared: int, intermediate_size: int, rope_theta: float) -> None:
        super().__init__()
        if hidden_size % heads or heads % shared or hidden_size // heads % 2:
            raise ValueError(
                f"hidden_size ({hidden_size}) must be a multiple of twice num_attention_heads ({heads}), which must be "
                f"a multiple of num_key_value_heads ({shared})"
            )
        self.head_dim, self.groups, self.rope_theta = hidden_size // heads, heads // shared, rope_theta
        self.embedding_norm, self.hidden_norm = nn.RMSNorm(hidden_size, eps=1e-6), nn.RMSNorm(hidden_size, eps=1e-6)
        self.q_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(2 * hidden_size, shared * self.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * hidden_size, shared * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.post_attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, states: Any, embeddings: Any, positions: Any, mask: Any, past: Any) -> tuple[Any, Any]:
        """Maps hidden states and embeddings (batch_size, n, hidden_size) to hidden states, and returns keys and values.

        `positions` is (batch_size, n), `mask` (batch_size, 1, n, keys), True where a key is seen; `past` holds keys and
        values (batch_size, key_value_heads, keys - n, head_dim) that come first.
        """
        hidden_states = states.to(self.hidden_norm.weight.dtype)
        given = torch.cat([self.embedding_norm(embeddings.to(hidden_states)), self.hidden_norm(hidden_states)], dim=-1)
        query, key, value = (self._split_heads(p(given)) for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key = (rotate(t, positions, self.rope_theta) for t in (query, key))
        if past is not None:
            key, value = torch.cat([past[0], key], dim=-2), torch.cat([past[1], value], dim=-2)
        keys, values = (t.repeat_interleave(self.groups, dim=1) for t in (key, value))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        hidden_states = hidden_states + self.o_proj(attended.transpose(1, 2).flatten(2))
        inner = self.post_attention_norm(hidden_states)
        hidden_states = hidden_states + self.down_proj(F.silu(self.gate_proj(inner)) * self.up_proj(inner))
        return hidden_states.to(states.dtype), (key, value)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)


def rotate(states: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Turns (batch_size, heads, n, head_dim) by rotary angles of positions (batch_size, n) (arXiv 2104.09864)."""
    half = states.shape[-1] // 2
    rates = theta ** (-torch.arange(half, device=states.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * rates
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal(mask: torch.Tensor, queries: int) -> torch.Tensor:
    """Returns what the last `queries` of all positions see: themselves, and what comes before and is in `mask`."""
    length = mask.shape[1]
    at = torch.arange(length, device=mask.device)
    query, key = at[-queries:, None], at[None]
    return ((key <= query) & mask[:, None, None]) | (key == query)


def count_positions(mask: torch.Tensor) -> torch.Tensor:
    """Returns the position of each token in its text, which begins after padding on the left."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Text:
    """The text so far, what the model keeps of it, and how the model is called with more."""

    def __init__(self, model: Any, tokens: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        self.model, self.tokens, self.begun = model, tokens, False
        given = dict(model_kwargs)
        self.cache, self.mask = given.pop("past_key_values"), given.pop("attention_mask", None)
        self.positions, self.others = given.pop("position_ids", None), given
        self.cache.activate_past_recording()

    def read(self, drafts: torch.Tensor) -> Any:
        """Runs the model on what it has not seen: the prompt, later the last token; and on drafts after it."""
        mask, positions = self._grow(drafts.shape[1])
        inputs = self.model.prepare_inputs_for_generation(
            torch.cat([self.tokens, drafts], dim=1),
            next_sequence_length=drafts.shape[1] + 1 if self.begun else None,
            is_first_iteration=not self.begun,
            past_key_values=self.cache,
            attention_mask=mask,
            position_ids=positions,
            **self.others,
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = drafts.shape[1] + 1
        return self.model(**inputs, return_dict=True)

    def keep(self, new: torch.Tensor, drafted: int) -> int:
        """Adds tokens, forgets drafts that are not among them; returns how many positions the model has newly seen."""
        if not self.cache.is_croppable:
            raise ValueError("speculate: the model's cache keeps states that cannot go back by some tokens")
        seen = new.shape[1] if self.begun else self.tokens.shape[1] + new.shape[1] - 1
        self.cache.crop(min(new.shape[1] - 1, drafted) - drafted)
        self.mask, self.positions = self._grow(new.shape[1])
        self.tokens, self.begun = torch.cat([self.tokens, new], dim=1), True
        return seen

    def _grow(self, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the mask and the positions with some tokens more."""
        mask, positions = self.mask, self.positions
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), count)], dim=-1)
        if positions is not None:
            ahead = torch.arange(1, count + 1, device=positions.device).expand(*positions.shape[:-1], -1)
            positions = torch.cat([positions, positions[..., -1:] + ahead], dim=-1)
        return mask, positions


class Judge:
    """Says token by token how greedy generation goes on, and stops where drafts go another way or the text ends."""

    def __init__(self, processor: Any, criteria: Any, config: Any, tokens: torch.Tensor) -> None:
        self.processor, self.criteria = processor, criteria
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        pad = config.pad_token_id if config.pad_token_id is not None else ends[0]
        self.pad = pad if any(hasattr(criterion, "eos_token_id") for criterion in criteria) else None
        self.finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return bool(self.finished.all())

    def accept(self, tokens: torch.Tensor, logits: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        """Returns the next tokens (batch_size, n): drafts that the model would have chosen, and one after them."""
        start, count = tokens.shape[1], drafts.shape[1]
        logits = logits[:, -count - 1 :].to(device=tokens.device, dtype=torch.float32, copy=True)
        for place in range(count + 1):
            chosen = self.processor(tokens, logits[:, place]).argmax(-1)
            over = self.finished if self.pad is not None else torch.zeros_like(self.finished)
            chosen = chosen if self.pad is None else chosen.masked_fill(over, self.pad)
            tokens = torch.cat([tokens, chosen[:, None]], dim=-1)
            self.finished = self.finished | self.criteria(tokens, None)
            if self.done or place == count or not bool(((chosen == drafts[:, place]) | over).all()):
                break
        return tokens[:, start:]


def refuse_other(model: Any, config: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuses what is not greedy generation of a decoder with a cache of all positions.

    Raises:
        ValueError: it is not; all reasons are given.
    """
    cache = model_kwargs.get("past_key_values")
    told = [key for key in ("scores", "logits", "hidden_states", "attentions") if getattr(config, f"output_{key}")]
    others = [key for key in model_kwargs if key == "inputs_embeds" or key.endswith("token_type_ids")]
    given = [key for key in others if model_kwargs[key] is not None]
    faults = {
        "it drafts for greedy text (do_sample=False, num_beams=1)": config.do_sample or config.num_beams != 1,
        "it drafts for decoders alone": model.config.is_encoder_decoder,
        "it needs a cache that grows (use_cache=True)": cache is None or not model_kwargs.get("use_cache"),
        "a cache of fixed size cannot forget drafts": getattr(cache, "is_compileable", False),
        "it begins with a whole text, not with the cache of one": cache is not None and cache.get_seq_length() > 0,
        f"it returns no {', '.join(told)}": told,
        f"it knows no {', '.join(given)}": given,
    }
    if any(faults.values()):
        raise ValueError(f"speculate cannot generate as asked: {'; '.join(f for f, found in faults.items() if found)}")


def answer_of(head: nn.Module, model: nn.Module, outputs: Any) -> torch.Tensor:
    """Returns what a head said in the model's outputs: under its name, which an adapter's wrapper may have made longer.

    Raises:
        ValueError: there is nothing of it, because the head was not added as one (`solidify.add`).
    """
    name = next((name for name, module in model.named_modules() if module is head), "")
    key = next((key for key in outputs if f"{name}.".startswith(f"{key}.")), None)
    if key is None:
        raise ValueError(f"the outputs of {type(model).__name__} have nothing of this head: add it with `solidify.add`")
    found: torch.Tensor = outputs[key]
    return found
