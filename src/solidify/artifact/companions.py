"""Files that stand beside a model and are not its weights: which of them travel from a base, and which are left out.

A sentence-transformers base, for one, says in such files how its outputs are pooled and scaled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer

from solidify.artifact import vocabulary
from solidify.directory import manifest
from solidify.errors import ArtifactError, refuse
from solidify.findings import Finding
from solidify.system import disk, files, foreign
from solidify.upstream.transformers import commit
from solidify.weights import checkpoint

TRAVELS = "files of the base"
_WEIGHTS = (
    *(".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".safetensors", ".index.json"),
    *(".npz", ".ot", ".pkl", ".pickle", ".joblib", ".tflite", ".xml", ".mlmodel"),
)
_OURS = {manifest.NAME, manifest.CARD, "config.json", "generation_config.json"}
_ADAPTER = re.compile(r"adapter_(config\.json|model\..+)")
_TRAINING = re.compile(r"checkpoint-\d+|global_step\d+")
_STATE = ("trainer_state.json", "training_args.bin", "scaler.pt", "latest", "zero_to_fp32.py")  # of a training
_TOKENIZER = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|.+\.(spm|bpe)\.model|.+\.tiktoken"
    r"|(spiece|tokenizer|sentencepiece)\.model|chat_template\.(jinja|json)|additional_chat_templates/.+"
)
_PROCESSOR = re.compile(r"(pre)?processor_config\.json|video_preprocessor_config\.json")
_RIGHTS = ("license", "license_name", "license_link")  # as the hub calls them
_SHOWN = 6


@dataclass
class Carried:
    """Which files of a base travelled, and why others did not. What was written anew is in neither."""

    names: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def findings(self) -> list[Finding]:
        """Says what travelled and what did not; nothing where there was nothing but what is written anew."""
        if not self.names and not self.left:
            return []
        evidence = f"as they are: {_list_names(self.names)}" if self.names else "only files that are written again"
        if self.left:
            evidence += f"; left out: {_list_names([f'{name} ({reason})' for name, reason in self.left.items()])}"
        return [Finding(TRAVELS, None if self.left else True, evidence)]


def directory_of(config: Any) -> Path | None:
    """Returns where the files of a loaded model's base stand: its directory, or its snapshot in the hub's cache."""
    reference = str(config.name_or_path or "")
    if not reference:
        return None
    if files.is_directory(reference):
        return Path(reference) if files.is_file(Path(reference) / "config.json") else None
    try:
        found = try_to_load_from_cache(reference, "config.json", revision=commit(config))
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def has_tokenizer(base: Path) -> bool:
    """Returns whether a tokenizer stands among the files of a base."""
    return any(_TOKENIZER.fullmatch(path.name) for path in base.iterdir())


def has_processor(base: Path) -> bool:
    """Returns whether something that prepares images or sound stands among the files of a base."""
    return any(_PROCESSOR.fullmatch(path.name) for path in base.iterdir())


def origin(directory: Path) -> dict[str, Any]:
    """Returns what a plain model without a manifest is called: by its id where it stands in the hub's cache."""
    named = directory.parent.parent.name
    if directory.parent.name == "snapshots" and named.startswith("models--"):
        name = {"model": named.removeprefix("models--").replace("--", "/"), "revision": directory.name}
    else:
        name = {"model": str(directory)}
    return {**name, **rights_in(directory)}


def rights(config: Any) -> dict[str, Any]:
    """Returns what the card of a loaded model's base says of its licence, as `rights`; nothing where it is silent."""
    directory = directory_of(config)
    return rights_in(directory) if directory is not None else {}


def rights_in(directory: Path) -> dict[str, Any]:
    """Returns the same of a directory. What holds of a base's use holds of what is made of it."""
    read = foreign.attempt(files.text, directory / manifest.CARD, largest=files.LARGEST_RECIPE)
    parts = (read.value or "").split("---\n", 2)
    said = foreign.attempt(files.parse_yaml, parts[1]).value if len(parts) == 3 and not parts[0].strip() else None
    named = said if isinstance(said, dict) else {}
    found = {
        key: named[key] for key in _RIGHTS if isinstance(named.get(key), str) and not Path(named[key]).is_absolute()
    }
    return {"rights": found} if found else {}


def refuse_broken_tokenizer(base: Path) -> None:
    """Raises ArtifactError when files of a base's tokenizer are there and cannot be read: it would be lost unsaid."""
    faults = []
    for path in sorted(base.glob("*.json")):
        if not (_TOKENIZER.fullmatch(path.name) or _PROCESSOR.fullmatch(path.name)):
            continue
        read = foreign.attempt(lambda path: json.loads(files.text(path, largest=files.LARGEST_BESIDE)), path)
        if not read.failed and path.name == "tokenizer.json":
            read = foreign.attempt(Tokenizer.from_file, str(path))
        faults += [f"{path.name}: {read.error}"] if read.failed else []
    refuse(ArtifactError, f"the tokenizer of {base} cannot be read; repair it, or remove its files", faults)


def carry(base: Path, target: Path, preparing: Any = None) -> Carried:
    """Copies the files of a base into an artifact's directory, where they do not stand yet.

    Weights, code, the model card and the configuration are written anew; so are the files of `preparing`, a tokenizer
    or processor that was saved there already. Pickled or converted weights, hidden files, caches and adapters stay
    behind. No link that leads out of the base is followed.
    """
    carried = Carried()
    generated = set(manifest.read(base).code) if (base / manifest.NAME).is_file() else set()
    anew = [_TOKENIZER] if vocabulary.tokenizer_of(preparing) is not None else []
    anew += [_PROCESSOR] if preparing is not None and preparing is not vocabulary.tokenizer_of(preparing) else []
    for name, path in _walk_files(base, carried.left):
        if name in {*_OURS, *generated} or any(kind.fullmatch(name) for kind in anew) or (target / name).exists():
            continue
        if name.endswith(".py"):
            carried.left[name] = "code; what the model needs of it travels as the artifact's own"
        else:
            _copy_file(path, target, name, carried)
    return carried


def copy_all(base: Path, target: Path, *, card: bool = True) -> Carried:
    """Copies the files of a plain model that keeps its layout: code too, and the `card`; else as `carry`."""
    carried, own = Carried(), {manifest.NAME, *(() if card else (manifest.CARD,))}
    for name, path in _walk_files(base, carried.left):
        if name not in own:
            _copy_file(path, target, name, carried)
    return carried


def _copy_file(path: Path, target: Path, name: str, carried: Carried) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target / name)
    carried.names.append(name)


def _walk_files(base: Path, left: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Yields what may travel, by name; fills `left` with what does not, and why."""
    own = _own_weights(base)
    root, parts = disk.root(base), _module_directories(base)
    for here, directories, names in os.walk(base):
        for directory in sorted(directories):
            name = (Path(here) / directory).relative_to(base).as_posix()
            reason = _against_directory(Path(here) / directory)
            if reason is not None:
                directories.remove(directory)
                if reason:
                    left[f"{name}/"] = reason
        directories.sort()
        for file in sorted(names):
            path = Path(here) / file
            name = path.relative_to(base).as_posix()
            if name in own or file.startswith("."):
                continue
            reason = _explain_left(name, path, root, parts)
            if reason:
                left[name] = reason
            else:
                yield name, path


def _own_weights(base: Path) -> set[str]:
    """Returns the names of the weight files that are read, and of their index."""
    try:
        return {checkpoint.INDEX, *(path.name for path in checkpoint.weight_files(base))}
    except ArtifactError:
        return {checkpoint.INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"}


def _against_directory(path: Path) -> str | None:
    """Returns why nothing in a directory travels ("" where that needs no word); None if it may."""
    if path.name.startswith(".") or path.name in ("__pycache__", "certificate"):
        return ""
    if path.is_symlink():
        return "a link to a directory"
    return "a checkpoint of a training" if _TRAINING.fullmatch(path.name) else None


def _explain_left(name: str, path: Path, root: Path, parts: set[str]) -> str:
    """Returns why a file does not travel; "" if it does."""
    if not path.is_file():
        return "not a plain file"
    if root not in path.resolve().parents:
        return "a link that leads out of the base"
    if _ADAPTER.fullmatch(name):
        return "an adapter, which would be applied when the artifact is loaded"
    if name.lower() == manifest.SIGNATURE:
        return "a signature of the base, not of the new model"
    if name in _STATE:
        return "the state of a training"
    if name.endswith(_WEIGHTS):
        if PurePosixPath(name).parent.as_posix() in parts and name.endswith(".safetensors"):
            return ""  # a further module of a sentence-transformers model, with weights of its own
        return "weights of the base in another format, or of another program"
    return ""


def _module_directories(base: Path) -> set[str]:
    """Returns the directories of a sentence-transformers model's further modules."""
    try:
        modules = json.loads(files.text(base / "modules.json"))
        return {str(module["path"]) for module in modules if module["path"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _list_names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
