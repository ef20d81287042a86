"""From disk to memory: a base model as transformers gives it, or an artifact whose digests were verified first."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from solidify.artifact import manifest, trust
from solidify.artifact.manifest import Manifest
from solidify.artifact.tensors import digest_bytes
from solidify.errors import ArtifactError, RecipeError, refuse


@dataclass(frozen=True)
class BaseModel:
    """A pretrained model, its tokenizer (None where it has none) and where both came from."""

    model: PreTrainedModel
    tokenizer: Any
    origin: dict[str, Any]


def load_base(
    reference: str, *, revision: str | None = None, dtype: str | None = None, device: str = "cpu"
) -> BaseModel:
    """Loads a pretrained model from a hub id or a directory, with the head that its configuration names.

    With `device="meta"` nothing is read but the configuration.

    Raises:
        RecipeError: there is no such model, its class is not one of transformers', or not every tensor of its class
            was found in its files.
    """
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise RecipeError(f"base.dtype is {dtype!r}, which torch does not know; write float32, bfloat16 or float16")
    try:
        config = AutoConfig.from_pretrained(reference, revision=revision or "main")
        name = (config.architectures or [""])[0]
        head = getattr(transformers, name, None)
        if head is None:
            raise RecipeError(
                f"the base {reference!r} is a {name or 'model of no named class'}, which transformers lacks"
            )
        if device == "meta":
            with torch.device("meta"):
                model = head(config)
            model = model.to(getattr(torch, dtype) if dtype else config.dtype or torch.float32)
            info: dict[str, Any] = {}
        else:
            model, info = head.from_pretrained(
                reference, revision=revision or "main", dtype=dtype or "auto", output_loading_info=True
            )
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"the base {reference!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    refuse(
        RecipeError,
        f"the base {reference!r} is incomplete; its class would fill in random values",
        [f"{kind}: {', '.join(sorted(map(str, names))[:6])}" for kind, names in info.items() if names],
    )
    origin = {
        "model": reference,
        "revision": vars(config).get("_commit_hash") or revision,
        "class": name,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return BaseModel(model.eval(), _tokenizer(reference, revision), origin)


def _tokenizer(reference: str, revision: str | None, *, trust_remote_code: bool = False) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            reference, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError):
        return None  # many models have none, and no stage but training and generation needs it


def load_artifact(directory: str | Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Loads an artifact as the model it was, in evaluation mode.

    Code, configuration and every tensor are compared with the manifest before any of the code runs. `options` go to
    transformers' `from_pretrained` verbatim.

    Raises:
        ArtifactError: the directory is no artifact, something in it is not what was written, its code was not built
            on this machine and `trust_remote_code` is not given, or transformers would run other code than its own.
    """
    directory = Path(directory).resolve()
    record = manifest.read(directory, "artifact")
    refuse(ArtifactError, f"{directory} is not what was written", manifest.faults(directory, record))
    trust.require(record, directory, trust_remote_code)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    head = config["architectures"][0]
    auto = next(a for a, reference in config["auto_map"].items() if reference.endswith("." + head))
    model, info = getattr(transformers, auto).from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True, **options
    )
    faults = [f"{kind}: {', '.join(sorted(map(str, names))[:6])}" for kind, names in info.items() if names]
    refuse(ArtifactError, f"{directory} was not loaded completely", faults + _foreign_code(model, record))
    return model.eval()


def _foreign_code(model: PreTrainedModel, record: Manifest) -> list[str]:
    """Compares the source that really runs with the manifest: transformers prefers registered and cached classes."""
    faults = []
    edited = {edit["name"] for edit in record.edits}
    classes = {type(model)} | {type(model.get_submodule(name)) for name in edited if _holds(model, name)}
    for cls in classes:
        path = Path(inspect.getsourcefile(cls) or "")
        text = path.read_bytes() if path.is_file() else b""
        if record.code.get(path.name) != digest_bytes(text):
            faults.append(
                f"{cls.__name__} runs from {cls.__module__}, which is not the artifact's code; another class is "
                "registered or cached under its name: load it in a process of its own"
            )
    return faults


def _holds(model: PreTrainedModel, name: str) -> bool:
    return any(name == known for known, _ in model.named_modules())


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer that stands in an artifact.

    transformers reads the artifact's configuration class for it, which is code of the artifact.

    Raises:
        ArtifactError: there is none, or the artifact's code may not run.
    """
    directory = Path(directory).resolve()
    trust.require(manifest.read(directory, "artifact"), directory, trust_remote_code)
    tokenizer = _tokenizer(str(directory), None, trust_remote_code=True)
    if tokenizer is None:
        raise ArtifactError(f"{directory} holds no tokenizer; build it with tokenizer=...")
    return tokenizer
