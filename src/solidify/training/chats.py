"""Conversations and prompts with completions become tokens and labels, as TRL and transformers make them.

Which tokens of a conversation are the assistant's is told by the chat template's own marks (`{% generation %}`), by
TRL's variant of a known template that has them, or, of any other, by rendering the turns before and up to each one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template, maybe_convert_to_chatml

from solidify.errors import DataError
from solidify.system import foreign
from solidify.upstream.trl import common_prefix_length, has_generation_markers

_ROLES = {"human": "user", "gpt": "assistant"}  # as `conversations` of from and value call them
LossOn = Literal["all", "assistant", "last"]
Labelled = tuple[list[int], list[int]]  # tokens, and for each the token itself if it counts, else -100


@dataclass(frozen=True)
class Chat:
    """How conversations are read: the template that renders them, whether it marks what the assistant says itself,
    and on which turns the loss is."""

    tokenizer: Any
    template: str
    marked: bool
    loss_on: LossOn

    @property
    def way(self) -> str:
        """How the assistant's tokens are told, in words."""
        if self.loss_on == "all":
            return "every token counts"
        turns = "the assistant's last turn counts" if self.loss_on == "last" else "the assistant's turns count"
        told = "the chat template's own marks" if self.marked else "rendering the turns before each"
        return f"{turns}, told by {told}"


def open_chat(tokenizer: PreTrainedTokenizerBase, given: str | None, loss_on: LossOn) -> Chat:
    """Returns how a tokenizer's conversations are read; `given` is a template instead of its own.

    Raises:
        DataError: there is no template, or turns can be told apart neither by marks nor by rendering.
    """
    template: Any = given if given is not None else tokenizer.chat_template
    template = template.get("default") if isinstance(template, Mapping) else template
    if not template:
        raise DataError(
            "the rows are conversations, and the tokenizer has no chat template; give one with `chat_template` (a file "
            "beside the recipe, or the template itself)"
        )
    if loss_on == "all":
        return Chat(tokenizer, template, False, loss_on)
    if not has_generation_markers(template) and given is None:
        known = foreign.attempt(get_training_chat_template, tokenizer)  # an unknown template is an error there
        template = known.value if known.value is not None else template
    marked = has_generation_markers(template)
    if not marked and not tokenizer.is_fast:
        raise DataError(
            f"loss_on: {loss_on} needs to know which tokens are the assistant's, and neither does the chat template "
            "mark them ({% generation %}) nor does this tokenizer say from which letters its tokens come; give a "
            "`chat_template` with marks, or loss_on: all"
        )
    return Chat(tokenizer, template, marked, loss_on)


def from_messages(row: Mapping[str, Any], chat: Chat) -> Labelled:
    """Makes tokens and labels of a conversation (`messages`, or `conversations` of from and value).

    Raises:
        DataError: the template does not render it, or no token is the assistant's.
    """
    told = maybe_convert_to_chatml(dict(row))
    messages = [_without_nothing(message) for message in told["messages"]]
    if "messages" not in row:
        messages = [{**each, "role": _ROLES.get(each.get("role", ""), each.get("role"))} for each in messages]
    if chat.loss_on == "all":
        ids = _render(chat, messages, row)["input_ids"]
        return ids, list(ids)
    ids, mask = _mask_marked(chat, messages, row) if chat.marked else _mask_rendered(chat, messages, row)
    if 1 not in mask:
        raise DataError("it has no tokens of an assistant")
    if chat.loss_on == "last" and chat.marked:
        end = len(mask) - mask[::-1].index(1)
        start = end - next((n for n, bit in enumerate(reversed(mask[:end])) if not bit), end)
        mask = [int(start <= n < end) for n in range(len(mask))]
    return ids, [token if counts else -100 for token, counts in zip(ids, mask, strict=True)]


def from_prompt(row: Mapping[str, Any], chat: Chat | None, tokenizer: Any) -> Labelled:
    """Makes tokens and labels of `prompt` and `completion`, strings or lists of messages; the completion counts.

    As in TRL, a completion that is a string ends in the end token, and starts where the tokens of the prompt and of
    both together differ.

    Raises:
        DataError: a part is of another kind, or the template does not render it.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        end = tokenizer.eos_token or ""
        completion += "" if completion.endswith(end) else end
        before, ids = (list(tokenizer(text=text, verbose=False)["input_ids"]) for text in (prompt, prompt + completion))
    elif isinstance(prompt, list) and isinstance(completion, list) and chat is not None:
        asked, answered = ([_without_nothing(each) for each in part] for part in (prompt, completion))
        before = _render(chat, asked, row, add_generation_prompt=True)["input_ids"]
        ids = _render(chat, [*asked, *answered], row)["input_ids"]
    else:
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise DataError(f"prompt and completion are {kinds}, and must be two texts, or two lists of messages")
    start = common_prefix_length(before, ids)
    return ids, [-100] * start + ids[start:]


def _mask_marked(chat: Chat, messages: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    made = _render(chat, messages, row, return_assistant_tokens_mask=True)
    return made["input_ids"], list(made["assistant_masks"])


def _mask_rendered(chat: Chat, messages: Sequence[Any], row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Finds the assistant's tokens: each turn is what rendering up to it has more than its prompt has.

    Raises:
        DataError: the template renders earlier turns otherwise when later ones follow.
    """
    whole = _write(chat, messages, row)
    spans = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _write(chat, messages[:index], row, add_generation_prompt=True)
        until = _write(chat, messages[: index + 1], row)
        if not (until.startswith(before) and whole.startswith(until)):
            raise DataError(
                f"its turn {index} cannot be told from the others: the chat template has no marks ({{% generation %}}) "
                "and renders earlier turns otherwise when later ones follow; give a `chat_template` with marks, or "
                "loss_on: all"
            )
        spans.append((len(before), len(until)))
    spans = spans[-1:] if chat.loss_on == "last" else spans
    made = chat.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [int(any(start < b and a < end for start, end in spans)) for a, b in made["offset_mapping"]]
    return list(made["input_ids"]), mask


def _write(chat: Chat, messages: Sequence[Any], row: Mapping[str, Any], **more: Any) -> str:
    return str(_call(chat, messages, row, tokenize=False, **more)) if messages or more else ""


def _render(chat: Chat, messages: Sequence[Any], row: Mapping[str, Any], **more: Any) -> Any:
    made = _call(chat, messages, row, tokenize=True, return_dict=True, **more)
    return {name: list(made[name]) for name in ("input_ids", "assistant_masks") if name in made}


def _call(chat: Chat, messages: Sequence[Any], row: Mapping[str, Any], **more: Any) -> Any:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options = {"tools": tools, "chat_template": chat.template, **(row.get("chat_template_kwargs") or {}), **more}
    with foreign.calling("the chat template does not render it", DataError):
        return chat.tokenizer.apply_chat_template(list(messages), **options)


def _without_nothing(message: Any) -> dict[str, Any]:
    """Returns a message without the keys that other rows have: a table fills them with None."""
    if not isinstance(message, Mapping):
        raise DataError(f"a message is a mapping of role and content, and not {message!r}")
    return {key: value for key, value in message.items() if value is not None or key == "content"}
