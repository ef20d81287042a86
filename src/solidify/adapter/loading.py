"""`solidify.load`: an artifact, with an adapter or without. Without one, PEFT is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from solidify.artifact import loading, quantizing

if TYPE_CHECKING:
    from peft import PeftModel


def load(
    directory: str | Path,
    adapter: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    quantization: quantizing.Asked | None = None,
    keep: str | Sequence[str] = (),
    layout: str | None = None,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """Loads an artifact, and an adapter on it when one is named; digests are verified before any code runs.

    With `quantization` (`nf4`, `int8`, or the fields of one of transformers' quantization configs) the base's linear
    layers are quantised as they are loaded. What surgery made new, the head, what the adapter trains in full and what
    `keep` names stay in their dtype. An adapter is loaded on a quantised base and on one that is not, however it was
    trained.

    With an adapter, the directory may hold a plain model that has no manifest: it is compared with what the adapter
    says of its base. `layout` is that of the adapter's experts, as in `load_adapter`.

    Raises:
        ArtifactError, AdapterError: as `load_artifact` and `load_adapter`.
        ModelError: the artifact cannot be quantised as asked.
    """
    asked: dict[str, Any] = {"trust_remote_code": trust_remote_code, "quantization": quantization, "keep": keep}
    if adapter is None:
        return loading.load_artifact(directory, **asked, **options)
    from solidify.adapter import storage  # which imports PEFT, and that takes as long as torch does

    return storage.load_with_adapter(directory, adapter, layout=layout, **asked, **options)
