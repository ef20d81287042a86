"""From a recipe to models: what it starts from, what it learns from, what its surgery makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel

from solidify.artifact import companions, loading, sources, vocabulary
from solidify.artifact.conversion import Scratch
from solidify.artifact.loading import BaseModel
from solidify.builtin import bases
from solidify.directory import manifest, results
from solidify.errors import ModelError, RecipeError, raised_as
from solidify.model.extent import Extent
from solidify.recipe import references
from solidify.recipe.schema import Recipe
from solidify.recipe.sections import Base
from solidify.source import closure
from solidify.surgery import ledger
from solidify.surgery.edit_record import Edit
from solidify.surgery.expert_scores import ExpertScores
from solidify.system import console, files, foreign
from solidify.weights import hashing


def load_base(recipe: Recipe, device: str = "cpu", scratch: Path | None = None) -> BaseModel:
    """Loads the model that a recipe starts from: built in, local or from the hub.

    In `scratch`, a large one is converted to the layout in memory; what the surgery renames or drops is kept apart.
    """
    where = Scratch(scratch, lambda model: _not_kept(recipe, model)) if scratch is not None else None
    return _load_model(recipe, recipe.base, device, where)


def _load_model(recipe: Recipe, source: Base, device: str = "cpu", scratch: Scratch | None = None) -> BaseModel:
    with raised_as(RecipeError, of=ModelError):
        return _read_model(recipe, source, device, scratch)


@contextmanager
def _looked_for(local: Path) -> Iterator[None]:
    """Says where a directory was looked for, and what stands close to it, when nothing of that name is found."""
    try:
        yield
    except ModelError as error:
        missing = isinstance(error.__cause__, (OSError, HFValidationError)) and not files.is_directory(local)
        if not missing or not files.is_directory(local.parent):
            raise
        beside = foreign.attempt(lambda: [path.name for path in local.parent.iterdir() if files.is_directory(path)])
        close = get_close_matches(local.name, beside.value or (), n=2)
        told = f" (close to it: {', '.join(close)})" if close else ""
        raise ModelError(f"{error}; nor is there a directory {local}{told}") from error


def _read_model(recipe: Recipe, source: Base, device: str, scratch: Scratch | None) -> BaseModel:
    name = source.model
    if (built_in := bases.directory(name)) is not None:
        loaded = loading.load_base(str(built_in), dtype=source.dtype, device=device)
        return replace(loaded, origin={**loaded.origin, "model": name})
    local = recipe.directory / name
    with _looked_for(local):
        loaded = loading.load_base(
            str(local) if name and files.is_directory(local) else name,
            revision=source.revision,
            dtype=source.dtype,
            device=device,
            trust_remote_code=source.trust_remote_code,
            scratch=scratch,
            quantized=source is recipe.teacher,  # which only answers
        )
    if loaded.tokenizer is None and (standing := companions.directory_of(loaded.model.config)) is not None:
        companions.refuse_broken_tokenizer(standing)
    return loaded


def load_teacher(recipe: Recipe, device: str = "cpu") -> PreTrainedModel | None:
    """Loads the model that a recipe learns from, if it names one."""
    return _load_model(recipe, recipe.teacher, device).model if recipe.teacher is not None else None


def quantization(recipe: Recipe) -> dict[str, Any]:
    """Returns how the artifact of a recipe is loaded to be trained: what an adapter changes itself is not quantised."""
    if recipe.base.quantization is None or recipe.adapter is None:
        return {}
    train, lora = recipe.adapter.train, recipe.adapter.lora or {}
    asked = lora.get("target_parameters") or []
    keep = [*([train] if isinstance(train, str) else train), *([asked] if isinstance(asked, str) else asked)]
    return {"quantization": recipe.base.quantization, "keep": keep}


def load_reference(recipe: Recipe, device: str = "cpu") -> PreTrainedModel | None:
    """Loads the model that a recipe's trainer compares with, if it names one."""
    return _load_model(recipe, recipe.reference, device).model if recipe.reference is not None else None


def _not_kept(recipe: Recipe, model: PreTrainedModel) -> list[str]:
    """Names the tensors of a model (on the meta device) that the surgery renames or drops."""
    names = list(model.state_dict())
    preparing = None
    if any(step.speaks for step in recipe.surgery):
        standing = _load_model(recipe, recipe.base, "meta")
        preparing = standing.processor or standing.tokenizer
    origins, _ = ledger.origins(names, [edit.document() for edit in operate(recipe, model, preparing=preparing)])
    return [name for name in names if origins.get(name) != name]


def operate(
    recipe: Recipe, model: PreTrainedModel, extent: Extent | None = None, *, preparing: Any = None
) -> list[Edit]:
    """Applies the surgery of a recipe to a model, one edit after the other; to `preparing`, its tokenizer, as well.

    That may be a processor, which holds one.
    """
    context = _Beside(recipe, Extent.given(extent, model), preparing)
    return [edit for step in recipe.surgery for edit in step.apply(model, context)]


def is_built(recipe: Recipe, artifact: Path) -> bool:
    """Returns whether an artifact is whole, of this recipe, and of its modules' code as that stands now."""
    if not results.is_made_by(artifact, results.built_by(recipe.document()), manifest.MODELS):
        return False
    if other := carries_other_code(recipe, artifact):
        console.words.print(f"{artifact} was built of other code than the recipe's modules are now: it is built anew")
    return not other


def carries_other_code(recipe: Recipe, artifact: Path) -> bool:
    """Returns whether an artifact carries other code of the user's than the recipe's modules are made of now.

    Raises:
        SolidifyError: there is no such base, module or artifact any more.
    """
    if not recipe.surgery:
        return False
    base = load_base(recipe, device="meta")
    edits = operate(recipe, base.model, preparing=base.processor or base.tokenizer)
    made = sources.compile_sources(base.model, edits)
    generated = {sources.OPERATIONS, *(f"{reference.rpartition('.')[0]}.py" for reference in made.auto_map.values())}
    own = {name: text for name, text in made.files.items() if name not in generated}
    record = manifest.read(artifact)
    return any(record.code.get(name) != hashing.digest_bytes(text.encode()) for name, text in own.items())


def digest_code(recipe: Recipe) -> str:
    """Returns the digest of the user's code that the modules of a recipe's surgery are made of, as it stands now.

    Raises:
        RecipeError: there is no such module.
        ArtifactError: its source cannot be carried.
    """
    names = sorted({name for step in recipe.surgery for name in step.references()})
    return hashing.digest_values(closure.collect([resolve_module(recipe, name) for name in names]).files)


def resolve_module(recipe: Recipe, reference: str) -> type[torch.nn.Module]:
    """Returns the class of a module that a recipe's surgery names.

    Raises:
        RecipeError: there is none, or it is no module.
    """
    module = references.resolve(reference, recipe.directory)
    if not (isinstance(module, type) and issubclass(module, torch.nn.Module)):
        raise RecipeError(f"surgery: {reference} is not a class of torch.nn.Module")
    return module


class _Beside:
    """What the steps of a recipe need beside the model (`operation.Context`)."""

    def __init__(self, recipe: Recipe, extent: Extent, preparing: Any) -> None:
        self.directory, self.extent, self.tokenizer = recipe.directory, extent, vocabulary.tokenizer_of(preparing)
        self._recipe, self._preparing = recipe, preparing

    def module(self, reference: str) -> type[torch.nn.Module]:
        """Returns the class that a reference names."""
        return resolve_module(self._recipe, reference)

    def file(self, name: str) -> Path:
        """Returns a file beside the recipe."""
        return self.directory / name

    def scores(self, model: PreTrainedModel, names: Sequence[str], by: str, rows: int) -> ExpertScores:
        """Scores the experts of blocks on the recipe's data."""
        from solidify.recipe import calibration  # with all that reads data

        return calibration.score_experts(self._recipe, self._preparing, model, names, by, rows)


def skeleton(reference: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns a model on the meta device: of a base, or of an artifact (whose digests and code are then judged).

    One whose files are quantised has the shapes that it had before.
    """
    name = bases.directory(reference) or reference
    return loading.load_base(str(name), device="meta", trust_remote_code=trust_remote_code, quantized=True).model
