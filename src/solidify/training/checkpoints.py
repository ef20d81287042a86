"""What a training checkpoint holds beside transformers' own files, and which checkpoint a run may go on from.

transformers writes what is trained, the optimizer, the schedule, random states and its own counters. The rest is here:
what loss terms remember, how the model's loss was found to be scaled, buffers that no file holds, the history.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from solidify.artifact import cards
from solidify.directory import manifest, ours
from solidify.errors import ObjectiveError
from solidify.system import disk, files, foreign
from solidify.upstream.transformers_training import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME
from solidify.weights.hashing import digest_large

NAME = ours.OBJECTIVE


def locate_checkpoint(directory: str | Path, step: int) -> Path:
    """Returns where transformers puts the checkpoint of a step."""
    return Path(directory) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def write(directory: Path, remembered: Mapping[str, Any]) -> None:
    """Writes what is remembered into a checkpoint, in one piece or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(dict(remembered), directory / f".{NAME}")
    disk.sync(directory / f".{NAME}")
    (directory / f".{NAME}").replace(directory / NAME)


def write_card(directory: Path, step: int, model: nn.Module) -> None:
    """Replaces the card that PEFT put into a checkpoint, if it did: that names the base by its path."""
    card = directory / manifest.CARD
    if card.is_file():
        config: Any = model.config
        standing = files.is_file(Path(str(config.name_or_path)) / manifest.NAME)
        origin = manifest.read(Path(config.name_or_path)).base.get("model") if standing else config.name_or_path
        card.write_text(cards.checkpoint_card(step, origin), encoding="utf-8")


def seal(directory: Path) -> None:
    """Lists a complete checkpoint's files by digest, once they would outlive a power cut; without it, none is whole.

    Raises:
        OSError: the disk became full.
    """
    disk.sync_tree(directory)
    listed = {p.relative_to(directory).as_posix(): digest_large(p) for p in directory.rglob("*") if p.is_file()}
    disk.write(directory / ours.LISTING, json.dumps({"files": listed}, indent=1) + "\n")
    disk.sync(directory.parent)


def read(directory: Path) -> dict[str, Any]:
    """Reads it again; no code in the file is run.

    Raises:
        ObjectiveError: the checkpoint was not written by a trainer of solidify, or is spoilt.
    """
    path = directory / NAME
    if not path.is_file():
        raise ObjectiveError(
            f"{directory} holds no {NAME}: a trainer of solidify did not write it, or did not finish it"
        )
    with foreign.calling(f"{path} is not what a trainer of solidify writes", ObjectiveError):
        remembered: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(remembered, dict) or "fingerprint" not in remembered:
            raise ObjectiveError(f"{path} does not say of which run it is: a trainer of solidify did not write it")
    return remembered


def is_foreign(directory: Path) -> bool:
    """Returns whether transformers' own trainer wrote a checkpoint, and nothing of ours is in it."""
    ours_in_it = any((directory / name).is_file() for name in (NAME, f".{NAME}", ours.LISTING))
    return files.is_file(directory / TRAINER_STATE_NAME) and not ours_in_it


def last(directory: str | Path, fingerprint: str, processes: int) -> Path | None:
    """Returns the newest whole checkpoint with this fingerprint, or None; a killed run may leave one in pieces."""
    found = [path for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if _is_whole(path, processes) and read(path)["fingerprint"] == fingerprint:
            return path
    return None


def _is_whole(path: Path, processes: int) -> bool:
    """The first process lists its files last; of the others there is a file each, an archive with its end."""
    if ours.checkpoint_faults(path, whole=True):
        return False
    try:
        files.document(path / TRAINER_STATE_NAME)
    except (OSError, ValueError):
        return False
    states = [f"rng_state_{n}.pth" for n in range(processes)] if processes > 1 else ["rng_state.pth"]
    return all(zipfile.is_zipfile(path / name) for name in (NAME, *states))


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the buffers that no file of the checkpoint holds, of modules that are trained."""
    held = set(model.state_dict())
    return {
        f"{path}.{key}" if path else key: buffer
        for path, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        for key, buffer in module.named_buffers(recurse=False)
        if (f"{path}.{key}" if path else key) not in held
    }
