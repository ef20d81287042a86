"""What is merged: an adapter and its base, found, and verified before any code of theirs runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from solidify.adapter import configured, storage
from solidify.artifact import stock
from solidify.directory import manifest, trust
from solidify.directory.manifest import Manifest
from solidify.errors import AdapterError, ArtifactError, refuse
from solidify.system import disk, files
from solidify.weights import checkpoint, format


@dataclass(frozen=True)
class Sources:
    """What is merged. `record` and `base_record` are the manifests, None for what solidify did not make."""

    adapter: Path
    record: Manifest | None
    base: Path
    base_record: Manifest | None


def read(adapter: Path, base: str | Path | None, trust_remote_code: bool) -> Sources:
    """Reads and verifies an adapter of ours, and all of its base but the tensors, before any code runs.

    Raises:
        AdapterError: the adapter was changed, or its base is not found.
        ArtifactError: the base was changed, or its code may not run.
    """
    record = manifest.read(adapter, "adapter", closed=False)
    where = Path(base).resolve() if base is not None else storage.find_base(record, adapter)
    base_record = stock.read(where)
    refuse(AdapterError, f"{adapter} is not what was written", manifest.faults(adapter, record, card=False))
    if not stock.is_plain(where):
        faults = manifest.faults(where, base_record, card=False, weights=False)  # these are compared when they pass
        refuse(ArtifactError, f"{where} is not what was written", faults)
    trust.require(base_record, where, trust_remote_code)
    return Sources(adapter, record, where, base_record)


def read_plain(adapter: Path, base: str | Path | None) -> Sources:
    """Finds a plain PEFT adapter and the plain model that it belongs to.

    Raises:
        AdapterError: the adapter is of a kind that is not read, or its base is not found, or is no plain model.
        ArtifactError: the base was changed, is quantised, or holds an adapter.
    """
    # First its kind: other kinds have other files, and need none of LoRA's.
    configuration = configured.read(adapter, marked=True)
    if not (adapter / storage.WEIGHTS).is_file():
        raise AdapterError(f"{adapter} holds no {storage.WEIGHTS}; pickled adapters are not read")
    format.read_header(adapter / storage.WEIGHTS)  # refuses what is not whole, as `checkpoint.read` does below
    where = find_plain_base(base or configuration.base_model_name_or_path, configuration.revision, adapter)
    if disk.leads_out(where, "config.json"):
        raise ArtifactError(
            f"config.json of the base {where} is a link that leads out of the base; put the file itself there"
        )
    checkpoint.read(where)
    record = manifest.read(where) if (where / manifest.NAME).is_file() else None
    if record is not None:
        faults = manifest.faults(where, record, card=False, weights=False)
        refuse(ArtifactError, f"{where} is not what was written", faults)
    if record is not None and record.kind != "stock":
        raise AdapterError(
            f"{adapter} was not saved by solidify, so nothing tells that it was trained on the {record.kind} {where}; "
            "load both and save it with solidify.save_adapter, or name a plain model (--base)"
        )
    if (where / manifest.ADAPTER_CONFIG).is_file():
        raise ArtifactError(
            f"{where} holds an adapter too, which would be applied when it is loaded; remove that first"
        )
    config = files.document(where / "config.json")
    if config.get("quantization_config"):
        raise ArtifactError(f"{where} is quantized; merge into the model that it was made from")
    return Sources(adapter, None, where, record)


def find_plain_base(reference: str | Path | None, revision: str | None, adapter: Path) -> Path:
    """Returns the directory of a plain model: one that is named, or of a hub id in the hub's cache.

    Raises:
        AdapterError: it is in neither.
    """
    if not reference:
        raise AdapterError(f"{adapter} does not name its base; say where it is (--base)")
    if files.is_file(Path(reference) / "config.json"):
        return Path(reference).resolve()
    try:
        return Path(snapshot_download(str(reference), revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AdapterError(
            f"the base of {adapter} is {str(reference)[:200]!r}, which is neither a model directory nor in the hub's "
            "cache; say where it is (--base)"
        ) from error
