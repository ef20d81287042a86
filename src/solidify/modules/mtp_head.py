"""Multi-token prediction in transformers' own layout: `model.generate(use_mtp=True)` drafts with it, without our code.

DeepSeek-V3 (arXiv 2412.19437, equations 21 to 25), in the form and under the names of transformers' `MtpLayer`: each
depth k = 0, 1, ... combines the hidden state of the depth before it (the model's last one first) with the embedding of
the token that stands k + 1 later, and predicts the token after that through the model's own output head:

    h_i^{k+1} = PostNorm(Layer_k(W_k [ENorm(e_{i+k+1}); HNorm(h_i^k)])),   p(x_{i+k+2}) = OutputHead(h_i^{k+1})

`Layer_k` is a decoder layer of the model's own family. It starts as the model's last layer, PostNorm as its final norm,
and W passes HNorm(h) on, so that the head starts near the model's own prediction for `x_{i+1}`.

Add it under the name `mtp`, reading the final norm: `solidify.add(model, "mtp", MtpHead, reads="model.norm")`. In the
model's pass it returns what it reads. `unroll` is for training (the loss term `solidify.losses:draft`). To generate,
transformers (5.23; a single text) loads the depths once more from the directory that the model was loaded from.

This file needs torch and transformers only and is copied into artifacts as it stands.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING
from transformers.masking_utils import create_causal_mask

NAME = "mtp"  # transformers takes this prefix off the tensors' names


class MtpDepth(nn.Module):
    """One depth, under the names of transformers' `MtpLayer`."""

    def __init__(self, config: Any, layer: type[nn.Module], norm: type[nn.Module], index: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.enorm = norm(size, eps=config.rms_norm_eps)
        self.hnorm = norm(size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.mtp_block = layer(config, index)
        self.post_norm = norm(size, eps=config.rms_norm_eps)
        with torch.no_grad():
            self.eh_proj.weight.zero_()[:, size:].copy_(torch.eye(size))

    def forward(self, hidden_states: torch.Tensor, embeddings: torch.Tensor, **given: Any) -> torch.Tensor:
        """Maps hidden states and embeddings (batch_size, sequence_length, hidden_size) to hidden states."""
        both = torch.cat([self.enorm(embeddings), self.hnorm(hidden_states)], dim=-1)
        states = self.mtp_block(self.eh_proj(both), past_key_values=None, **given)
        normed: torch.Tensor = self.post_norm(states[0] if isinstance(states, tuple) else states)
        return normed


class MtpHead(nn.Module):
    """Holds `depth` depths, and tells transformers of them; returns what it reads, without its graph if `detach`.

    Families with decoder layers called by position embeddings and RMS norms are taken (Llama, Mistral, Qwen3, OLMoE,
    Gemma 3, ...), and of those only what transformers' own MTP could build from the configuration; others are refused.
    """

    def __init__(self, config: Any, depth: int = 1, detach: bool = True) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, but is {depth}")
        if not hasattr(config, "get_mtp_config"):
            raise ValueError("MtpHead needs a transformers that knows `use_mtp`, as 5.23 does: upgrade it")
        self.detach, self._config = detach, configured(deepcopy(config), depth).get_mtp_config()
        family = next((MODEL_MAPPING[kind] for kind in type(config).__mro__ if kind in MODEL_MAPPING), None)
        if not isinstance(family, type) or not hasattr(config, "rms_norm_eps"):
            raise ValueError(f"MtpHead knows no decoder layers with RMS norms for {type(config).__name__}")
        with torch.device("meta"):
            backbone: Any = family(self._config)
        if not hasattr(backbone, "layers") or not hasattr(backbone, "rotary_emb"):
            raise ValueError(f"MtpHead needs `layers` and `rotary_emb`, which {family.__name__} does not have")
        self._rotary, layer = type(backbone.rotary_emb), backbone.layers[-1]
        norm = next(type(module) for name, module in layer.named_modules() if "norm" in name)
        self.layers = nn.ModuleList(MtpDepth(self._config, type(layer), norm, index) for index in range(depth))

    def join(self, model: Any, name: str) -> None:
        """Starts as the model's last layer and final norm; tells the model how transformers finds the head.

        Raises:
            ValueError: it has another name than `mtp`, or the last layer was changed before.
        """
        if name != NAME:
            raise ValueError(f"transformers looks for the head under the name {NAME!r}, but it is added as {name!r}")
        backbone = model.get_decoder()
        depths: Any = self.layers
        pairs = [(depth.mtp_block, backbone.layers[-1]) for depth in depths]
        for part, source in pairs + [(depth.post_norm, backbone.norm) for depth in depths]:
            state = source.state_dict()
            if {k: t.shape for k, t in state.items()} != {k: t.shape for k, t in part.state_dict().items()}:
                raise ValueError("the model's last layer is not its family's any more: add the head before changing it")
            if all(not tensor.is_meta for tensor in state.values()):
                part.load_state_dict(state)
        configured(model.config.get_text_config(decoder=True), len(self.layers))
        model._keys_to_ignore_on_load_unexpected = [rf"^{NAME}\."]  # where transformers' MtpModel reads its pattern

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns what it is given."""
        return hidden_states.detach() if self.detach else hidden_states

    def unroll(self, features: Any, embeddings: Any, attention_mask: Any = None) -> list[torch.Tensor]:
        """Returns, for each depth k, hidden states (batch_size, sequence_length, hidden_size) for `x_{i+k+2}`."""
        length, states, found = features.shape[1], features, list[torch.Tensor]()
        mask = torch.ones_like(features[..., 0], dtype=torch.long) if attention_mask is None else attention_mask.long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        seen = create_causal_mask(
            config=self._config,
            inputs_embeds=features,
            attention_mask=mask,
            past_key_values=None,
            position_ids=positions,
        )
        with torch.device(features.device):
            rotary = self._rotary(self._config)
        typed = self._config.nested_rope_parameter_keys(self._config.rope_parameters)
        embeddings = embeddings.detach() if self.detach else embeddings
        for index, depth in enumerate(self.layers):
            ahead, at = F.pad(embeddings[:, index + 1 :], (0, 0, 0, min(index + 1, length))), positions + index + 1
            kind = {"layer_type": self._config.layer_types[index]} if typed else {}
            turned = rotary(features, position_ids=at, **kind)
            states = depth(states, ahead, attention_mask=seen, position_embeddings=turned, position_ids=at)
            found.append(states)
        return found


def configured(config: Any, depth: int) -> Any:
    """Tells a text configuration, in place, how many depths there are, and of which types; returns it."""
    config.num_mtp_layers = depth
    if getattr(config, "layer_types", None) is not None:
        config.mtp_layer_types = ["full_attention"] * depth
    if getattr(config, "mlp_layer_types", None) is not None:
        config.mtp_mlp_layer_types = [config.mlp_layer_types[-1]] * depth
    return config
