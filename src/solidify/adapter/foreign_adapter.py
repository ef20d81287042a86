"""An adapter that plain PEFT wrote, alone or in a trainer's checkpoint: what its files say, and what they do not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from torch import nn

from solidify.adapter import configured
from solidify.directory import manifest
from solidify.directory.manifest import Manifest
from solidify.errors import AdapterError
from solidify.system import files
from solidify.weights import format

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(?P<name>.+)\.(lora_(embedding_)?[AB]|lora_magnitude_vector)(\.weight)?")
_ROWS = re.compile(r"base_model\.model\.(?P<name>.+?)(\.token_adapter)?\.trainable_tokens_delta")


def is_one(directory: Path) -> bool:
    """Returns whether a directory holds an adapter of PEFT's, and no manifest of ours."""
    return not files.is_file(directory / manifest.NAME) and files.is_file(directory / CONFIG_NAME)


def describe(directory: Path) -> Manifest:
    """Returns what a manifest would say of it, as far as its file of tensors tells.

    Raises:
        AdapterError: its tensors are pickled, or in a layout that is not PEFT's.
    """
    weights = require_weights(directory)
    header = format.read_header(weights)
    configured.refuse_marked(weights)
    return Manifest(kind="adapter", base={}, trained=_list_trained(header))


def _list_trained(header: Iterable[str]) -> dict[str, list[str]]:
    """Names what a file of tensors trains, by the keys of its tensors."""
    lora = {found["name"] for key in header if (found := _FACTOR.fullmatch(key))}
    rows = {found["name"] for key in header if (found := _ROWS.fullmatch(key))}
    full = [key.removeprefix(_PREFIX) for key in header if not (_FACTOR.fullmatch(key) or _ROWS.fullmatch(key))]
    return {
        "lora": sorted(lora),
        "full": sorted(full),
        "parameters": [],
        **({"tokens": sorted(rows)} if rows else {}),
    }


def list_apart(directory: Path) -> list[str]:
    """Names the parameters of linear layers that such an adapter replaces, or changes themselves, in any layout.

    Raises:
        AdapterError: its tensors are pickled, or its configuration cannot be read.
    """
    trained = _list_trained(format.read_header(require_weights(directory)))
    words = configured.document(directory).get("target_parameters")
    ends = tuple(f".{word}" for word in words) if isinstance(words, list) else ()
    updated = [f"{name}.{own}" for name in trained["lora"] for own in ("weight", "bias")]
    return [*trained["full"], *(name for name in updated if ends and f".{name}".endswith(ends))]


def require_weights(directory: Path) -> Path:
    """Returns the file of an adapter's tensors.

    Raises:
        AdapterError: there is none that is read.
    """
    weights: Path = directory / configured.WEIGHTS
    if not files.is_file(weights):
        raise AdapterError(f"{directory} holds no {configured.WEIGHTS}; pickled adapters are not read")
    return weights


def unverified(directory: Path, model: nn.Module) -> str:
    """Says what nothing tells of such an adapter, and what its configuration names instead."""
    named = files.document(directory / CONFIG_NAME, AdapterError).get("base_model_name_or_path")
    config: Any = model.config
    here = str(config.name_or_path or "")
    words = f"{directory} was not saved by solidify: whether it was trained on these weights was not looked at"
    if named and here and Path(str(named)).name != Path(here).name:
        return f"{words}, and its configuration names another base ({named}, this is {here})"
    return f"{words}; its configuration names {named or 'no base'}"
