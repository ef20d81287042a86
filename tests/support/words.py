"""A tokenizer of words that is made in memory, chat templates for it, and conversations."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|> ' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + ' <end>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
FORGETFUL = "{% for m in messages %}{% if loop.last or m.role == 'user' %}" + UNMARKED[27:].replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)
WORDS = ["<pad>", "<end>", "<mask>", "<unk>", "<cls>", "<sep>", "<|user|>", "<|assistant|>", "<|system|>"]
LETTERS = [chr(n) for n in range(97, 123)]
CHATS = [
    [("user", "a b c"), ("assistant", "d e")],
    [("system", "x"), ("user", "a b"), ("assistant", "d"), ("user", "f g h"), ("assistant", "i j k")],
    [("user", "l"), ("assistant", "m n o p q r s t u v w x y z")],
]


def tokenizer(template: str | None = MARKED, *, wrapped: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of words; words of two letters become two tokens."""
    pieces = [*WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    inner = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if wrapped:
        inner.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", 4), ("<sep>", 5)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        mask_token="<mask>",
        unk_token="<unk>",
        cls_token="<cls>",
        sep_token="<sep>",
    )
    made.add_special_tokens({"additional_special_tokens": WORDS[6:]})
    made.chat_template = template
    return made
