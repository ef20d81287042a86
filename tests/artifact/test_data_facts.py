"""A chat template reaches whoever loads the model, wherever the base keeps its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor
from words import MARKED, UNMARKED, tokenizer

from solidify.artifact.data_facts import DataFacts
from solidify.errors import ArtifactError

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
KEPT: dict[str, Any] = {
    "a file": UNMARKED,
    "several files": {"default": UNMARKED, "tool_use": MARKED},
    "an older file": {"chat_template.json": {"chat_template": UNMARKED}},
    "the processor's configuration": {"processor_config.json": {"chat_template": UNMARKED}},
    "no template": None,
}


def save_processor(directory: Path, held: Any) -> Any:
    layout = held if isinstance(held, dict) and "default" not in held else {}
    made = LlavaProcessor(CLIPImageProcessor(), tokenizer(None), patch_size=14, chat_template=None if layout else held)
    made.save_pretrained(directory)
    for name, more in layout.items():
        path = directory / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **more}))
    return AutoProcessor.from_pretrained(directory)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of transformers, which reads several templates
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("way", ["files", "memory"])
def test_a_processors_template_is_that_of_the_recipe(tmp_path: Path, kept: str, way: str) -> None:
    processor = save_processor(tmp_path / "base", KEPT[kept])
    target = tmp_path / "base"
    if way == "files":
        DataFacts(template=TEMPLATE).write(target, processor)
    else:
        DataFacts(template=TEMPLATE).put(pico.llama(), processor)
        target = tmp_path / "made"
        processor.save_pretrained(target)
    expected = {"default": TEMPLATE, "tool_use": MARKED} if kept == "several files" else TEMPLATE
    assert AutoProcessor.from_pretrained(target).chat_template == expected
    assert AutoTokenizer.from_pretrained(target).chat_template == expected


def test_a_template_whose_name_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    maker = tokenizer()
    maker.chat_template = {"default": MARKED, "../../x": UNMARKED}
    with pytest.raises(ArtifactError, match=r"'../../x' of the base has a name that no file can have"):
        DataFacts(template=TEMPLATE).write(tmp_path, maker)
    assert not list(tmp_path.iterdir())
