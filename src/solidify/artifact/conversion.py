"""A large base whose files have another layout than its memory is converted on disk, before it is mapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.errors import ModelError, refuse
from solidify.model import anatomy
from solidify.weights import checkpoint, layout, store
from solidify.weights.checkpoint import Checkpoint

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json"]


@dataclass(frozen=True)
class Scratch:
    """A directory for a while. `apart` names, of a model on the meta device, what will not stay in its files."""

    directory: Path
    apart: Callable[[PreTrainedModel], Iterable[str]]


def converted(
    reference: str, head: Any, config: PreTrainedConfig, dtype: str | None, options: dict[str, Any], scratch: Scratch
) -> str:
    """Returns from where to load a base so that its tensors are mapped: `reference`, or what it was converted to.

    Raises:
        ModelError: the base is incomplete.
        ArtifactError: a file of it is missing, truncated or not safetensors, or there is no room.
    """
    files = _find_checkpoint(reference, options)
    if files is None or files.nbytes < anatomy.LARGE or not issubclass(head, PreTrainedModel):
        return reference
    skeleton, info = _load_skeleton(head, config, dtype, files)
    refuse(
        ModelError,
        f"the base {reference!r} is incomplete; its class would fill in random values",
        [f"{kind}: {', '.join(sorted(map(str, names))[:6])}" for kind, names in info.items() if names],
    )
    found = layout.read(skeleton, files)
    if found.in_memory:
        return reference
    sources = found.tensor_sources(skeleton, files)
    target = scratch.directory / "base"
    target.mkdir()
    values = json.loads(skeleton.config.to_json_string(use_diff=True))
    (target / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if skeleton.can_generate():
        skeleton.generation_config.save_pretrained(target)
    with checkpoint.steady(files.files):
        store.write(target, sources, groups=[[name for name in scratch.apart(skeleton) if name in sources]])
    return str(target)


def _load_skeleton(
    head: Any, config: Any, dtype: str | None, files: Checkpoint
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Has transformers load tensors without values, so that it says what is missing and of which dtype all is."""
    state = {
        name: torch.empty(entry.shape.sizes, dtype=entry.shape.dtype, device="meta")
        for name, entry in files.entries.items()
    }
    floating = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    model, info = head.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=getattr(torch, dtype) if dtype else config.dtype or floating,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `info`
    )
    return model, info


def _find_checkpoint(reference: str, options: dict[str, Any]) -> Checkpoint | None:
    """Returns the files of a base, downloaded if they are not here; None where they are no safetensors."""
    directory = Path(reference)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(reference, revision=options["revision"], allow_patterns=_FILES))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise OSError(f"{reference} is not a directory, and cannot be loaded from the hub: {error}") from error
    if not any((directory / name).is_file() for name in (checkpoint.WEIGHTS, checkpoint.INDEX)):
        return None
    return checkpoint.read(directory)
