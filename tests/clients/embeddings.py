"""Run by tests/test_minilm.py as a stranger: embeds sentences with every model, by hand and with its real client.

Arguments: a directory to write to, the sentences, the models by name (JSON each).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedModel


def embed(model: PreTrainedModel, directory: Path | str, sentences: Sequence[str]) -> torch.Tensor:
    """Returns (sentences, hidden_size): the mean over the last hidden states of each sentence's tokens, of length 1."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    """Writes what each model makes of the sentences."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    output, sentences, directories = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    found = {}
    for name, directory in directories.items():
        model = AutoModel.from_pretrained(directory, trust_remote_code=True)
        found[f"{name}/by hand"] = embed(model, directory, sentences)
        client = SentenceTransformer(directory, trust_remote_code=True, device="cpu")
        short = not isinstance(client[-1], Normalize)  # a directory that does not say so has no such last step
        found[f"{name}/client"] = client.encode(sentences, convert_to_tensor=True, normalize_embeddings=short)
    save_file(found, output / "embeddings.safetensors")
    try:
        import solidify  # noqa: F401
    except ImportError:
        return
    raise SystemExit("solidify could be imported")


if __name__ == "__main__":
    main()
