"""Continues a text, to try a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from solidify.errors import ArtifactError, DataError
from solidify.system import foreign

MOST = 2**20  # tokens, where a model does not say how many positions it has


Messages = list[dict[str, str]]


def continued(model: nn.Module, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Returns a prompt and up to `new_tokens` tokens that a model adds to it, each the likeliest.

    Raises:
        DataError: the prompt holds no token, or prompt and new tokens are more than the model has positions for.
        ArtifactError: the model or its tokenizer fails, on odd settings for generation, for example.
    """
    with foreign.calling("the prompt cannot be read by the model's tokenizer", ArtifactError):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    return _decode(tokenizer, _generate(model, inputs, new_tokens))


def replied(model: nn.Module, tokenizer: Any, messages: Messages, new_tokens: int) -> str:
    """Returns the answer to the last of some messages, which pass through the tokenizer's chat template.

    Raises:
        DataError: the tokenizer has no chat template; and as `continued`.
        ArtifactError: as `continued`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the model's tokenizer has no chat template, so there is no chat; give a text (--prompt) alone")
    with foreign.calling("the messages cannot be put into the model's chat template", ArtifactError):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        inputs.pop("token_type_ids", None)
    length = inputs["input_ids"].shape[-1]
    return _decode(tokenizer, _generate(model, inputs, new_tokens)[length:]).strip()


def _generate(model: nn.Module, inputs: Any, new_tokens: int) -> torch.Tensor:
    """Returns the tokens of the one row of a batch, with those that the model adds."""
    length = inputs["input_ids"].shape[-1]
    if not length:
        raise DataError("the prompt holds no token; give a text to continue (--prompt)")
    limit = _count_positions(model)
    if length + new_tokens > limit:
        raise DataError(
            f"{length} tokens of the prompt and {new_tokens} new ones are more than the {limit} that are possible "
            f"here; ask for at most {max(limit - length, 0)} (--max-new-tokens)"
        )
    generator: Any = model
    if not generator.can_generate():
        raise ArtifactError(f"{type(generator).__name__} does not write text: its head is of another kind")
    remedy = "its generation_config.json or config.json may hold invalid values"
    with foreign.calling("the model does not generate", ArtifactError, remedy=remedy), torch.no_grad():
        made: torch.Tensor = generator.generate(
            **inputs.to(generator.device), max_new_tokens=new_tokens, do_sample=False
        )
        return made[0]


def _decode(tokenizer: Any, tokens: torch.Tensor) -> str:
    with foreign.calling("what the model wrote cannot be read by its tokenizer", ArtifactError):
        return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _count_positions(model: nn.Module) -> int:
    """Returns for how many tokens a model was made."""
    config: Any = model.config
    with foreign.calling("the model's configuration cannot be read", ArtifactError):
        found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(found, MOST) if isinstance(found, int) and found > 0 else MOST
