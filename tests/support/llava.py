"""A LLaVA of tiny configuration with its processor, and rows of images and of text alone, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pico
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
SIDE, PATCH = 28, 14
IMAGE_TOKENS = (SIDE // PATCH) ** 2
PROJECTOR = "model.multi_modal_projector"
QUERIES = "model.language_model.layers.*.self_attn.q_proj"


def processor() -> LlavaProcessor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["text"] for row in texts(12)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        # Of the image processors, those that work on PIL and numpy need no torchvision.
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def model(prepared: LlavaProcessor) -> Any:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
    )
    text = LlamaConfig(
        **{**pico.SIZES, "vocab_size": len(prepared.tokenizer), "pad_token_id": 0},
        intermediate_size=48,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return pico.make(
        "LlavaForConditionalGeneration",
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=prepared.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def base(directory: Path) -> Path:
    """Writes model and processor."""
    prepared = processor()
    model(prepared).save_pretrained(directory)
    prepared.save_pretrained(directory)
    return directory


def texts(count: int) -> list[dict[str, Any]]:
    """Rows: every third has no image, and lengths differ."""
    rows = []
    for place in range(count):
        color = list(COLORS)[place % 3 if place % 2 else (place + 1) % 3]
        tail = f"Number {place}, a {color} square" + " of one color" * (place % 4) + "."
        if place % 3 == 2:
            rows.append({"text": f"USER: Name a color. ASSISTANT: {tail}", "image": None})
        else:
            rows.append({"text": f"USER: <image> What is this? ASSISTANT: {tail}", "image": f"{color}_{place}.png"})
    return rows


def data(directory: Path, count: int = 24, name: str = "rows.jsonl") -> Path:
    """Writes rows and the images that they name (plain colors with some noise, of different sizes)."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = texts(count)
    generator = numpy.random.default_rng(0)
    for place, row in enumerate(rows):
        if row["image"]:
            shape = (30 + place, 44 - place % 7, 3)
            pixels = COLORS[row["image"].split("_")[0]] + generator.integers(-25, 25, shape)
            Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8)).save(directory / row["image"])
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def image(color: str = "red") -> Image.Image:
    return Image.new("RGB", (40, 33), COLORS[color])


def awake(peft_model: torch.nn.Module) -> torch.nn.Module:
    """Moves what is trained away from its start, so that no gradient is zero by construction."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return peft_model
