"""What prepares text, images and sound for a model: tokenizers and processors, of a base or an artifact.

transformers reads a configuration class for them, which may be code: an artifact is opened, all of it verified, first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME

from solidify.directory import manifest, packages, private, trust
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, ModelError, refuse
from solidify.system import console, files, foreign
from solidify.weights import checkpoint


@contextmanager
def open_artifact(directory: Path, trust_remote_code: bool, *, weights: bool = True) -> Iterator[tuple[Manifest, Path]]:
    """Yields an artifact's manifest and a private copy of its files, all verified; no code of it has run yet.

    While the block lasts, its weight files stay as they are, or ArtifactError says that they did not.
    """
    record = manifest.read(directory, "artifact")
    with checkpoint.steady([directory / name for name in record.headers]):
        faults = manifest.faults(directory, record, card=False, weights=weights)
        refuse(ArtifactError, f"{directory} is not what was written", faults)
        trust.require(record, directory, trust_remote_code)
        require_packages(record, directory, say=weights)
        with private.copy(directory, record) as own, trust.never_asking():
            yield record, own


def require_packages(record: Manifest, directory: Path, *, say: bool = True) -> None:
    """Refuses a model of which a required package is missing; of other major versions than it was made with, says so.

    Raises:
        ArtifactError: one is missing.
    """
    missing, other = packages.version_faults(record)
    refuse(ArtifactError, f"{directory} cannot be loaded", missing)
    for words in other if say else ():
        console.words.print(f"{directory}: {words}")


def read_tokenizer(reference: str, revision: str | None, *, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a model (a hub id, a directory); None where it has none.

    Raises:
        ModelError: it has one of another kind than transformers reads.
    """
    with foreign.calling(f"the tokenizer of {reference!r} cannot be loaded", ModelError), trust.never_asking():
        try:
            return AutoTokenizer.from_pretrained(
                reference, revision=revision or "main", trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, TypeError):  # TypeError: a family's own reader is given no file at all
            return None  # many models have none, and no stage but training and generation needs it


def tokenizer_in(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer that stands in a model's directory, an artifact's or not; None where there is none."""
    if manifest.kind(directory) == "artifact":
        with open_artifact(directory.resolve(), trust_remote_code, weights=False) as (_, own):
            found = read_tokenizer(str(own), None, trust_remote_code=True)
            private.point_back(found, own, directory.resolve())
            return found
    return read_tokenizer(str(directory), None, trust_remote_code=trust_remote_code)


def read_processor(reference: str, revision: str | None, *, trust_remote_code: bool, needed: bool) -> Any:
    """Returns what prepares images, sound or text with either for a model; None where that is the tokenizer alone.

    Raises:
        ModelError: there is one, it is needed, and it cannot be loaded (often a package that it needs is missing).
    """
    reason, brought = "transformers finds only a tokenizer", [PROCESSOR_NAME]
    with trust.never_asking():
        read = foreign.attempt(
            AutoProcessor.from_pretrained, reference, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if read.error is not None:
        reason = " ".join(str(read.error).split())
        brought = [PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME]  # the latter is also what an image processor is kept in
    elif not isinstance(read.value, PreTrainedTokenizerBase):
        return read.value
    brought = [name for name in brought if has_file(reference, name, revision)]
    if brought and needed:
        raise ModelError(
            f"{reference!r} has a {brought[0]} that cannot be loaded, so what it prepares inputs with would be lost: "
            f"{reason}"
        )
    return None


def has_file(reference: str, name: str, revision: str | None) -> bool:
    """Returns whether a model has a file; of one from the hub, whether it is in the cache by now."""
    if files.is_directory(reference):
        return files.is_file(Path(reference) / name)
    return isinstance(try_to_load_from_cache(reference, name, revision=revision or "main"), str)


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer that stands in an artifact.

    transformers reads the artifact's configuration class for it, which is code of the artifact.

    Raises:
        ArtifactError: there is none, a file is not what was written, or the artifact's code may not run.
    """
    tokenizer = tokenizer_in(_find_artifact(directory), trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ArtifactError(f"{directory} holds no tokenizer; build it with tokenizer=...")
    return tokenizer


def _find_artifact(directory: str | Path) -> Path:
    """Returns the directory of an artifact."""
    found = Path(directory).resolve()
    manifest.read(found, manifest.MODELS)
    return found


def load_processor(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Returns the processor that stands in an artifact (which holds the tokenizer), or else its tokenizer.

    Raises:
        ArtifactError: there is neither, a file is not what was written, or the artifact's code may not run.
        ModelError: a package that the processor is made of is not installed.
    """
    directory = _find_artifact(directory)
    if manifest.kind(directory) == "stock":
        processor = read_processor(str(directory), None, trust_remote_code=trust_remote_code, needed=True)
    else:
        with open_artifact(directory, trust_remote_code, weights=False) as (_, own):
            processor = read_processor(str(own), None, trust_remote_code=True, needed=True)
            private.point_back(processor, own, directory)
    return processor if processor is not None else load_tokenizer(directory, trust_remote_code=trust_remote_code)
