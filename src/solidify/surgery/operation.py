"""What an operation is: a type that answers what a step takes, how it is done, and what its record means afterwards.

Reading a recipe needs no torch, so this file and the types import it where they use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from solidify.model.extent import Extent
    from solidify.surgery.edit_record import Edit
    from solidify.surgery.expert_scores import ExpertScores

Record = Mapping[str, Any]
RULE = "rule"  # pydantic's type of an error that `broken_rule` made


def broken_rule(words: str) -> PydanticCustomError:
    """Makes the error of a rule about several keys, whose words pydantic leaves as they are."""
    return PydanticCustomError(RULE, "{words}", {"words": words})


class Context(Protocol):
    """What a step needs beside the model: extent, tokenizer, classes by reference (`file.py:Name`), and files."""

    extent: Extent
    tokenizer: Any

    def module(self, reference: str) -> type[nn.Module]:
        """Returns the class; raises RecipeError for what is none."""

    def file(self, name: str) -> Path:
        """Returns the path of a file that stands beside the recipe."""

    def scores(self, model: PreTrainedModel, names: Sequence[str], by: str, rows: int) -> ExpertScores:
        """Scores the experts of MoE blocks on the first rows of the recipe's data."""


class Operation(BaseModel):
    """One kind of change. Its fields are what a step of a recipe gives; its class attributes say what a record means.

    A record is `Edit.document()`, as manifests hold it: `operation`, `name`, `settings`, `kept`, `new`, `dropped`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)

    asked: ClassVar[str] = ""  # the key of a recipe's step; empty for what another step's field asks for
    recorded: ClassVar[str]  # the name in records and in config.surgery
    puts: ClassVar[bool] = False  # a new module stands where one stood
    matched: ClassVar[bool] = False  # what it puts there can learn from what stood there
    spread: ClassVar[bool] = False  # one new module stands at several names
    adds: ClassVar[bool] = False  # a new module stands where nothing stood, and answers in the model's outputs
    shapes: ClassVar[bool] = False  # what stands there is of the old class, in another shape
    runs: ClassVar[bool] = False  # the model calls what stands there: of a bounded model, it is run alone
    folds: ClassVar[bool] = True  # alike records, one after the other, are one entry of config.surgery
    speaks: ClassVar[bool] = False  # it needs the tokenizer of the model
    builds: ClassVar[bool] = False  # what it carries builds modules by descriptions (`model/assembling.py`)
    switches: ClassVar[bool] = False  # with every new module switched off, the model is the one before

    @property
    def calibrates(self) -> bool:
        """Whether the step runs the model on the recipe's data before it changes it."""
        return False

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Changes the model in place, all or nothing, and returns one record per module.

        Raises:
            SurgeryError: the change does not fit the model, which is then as it was.
        """
        raise NotImplementedError(type(self).__name__)

    def references(self) -> list[str]:
        """Returns the classes that the step names."""
        return []

    def files(self) -> list[str]:
        """Returns the files that the step names."""
        return []

    @classmethod
    def follow(cls, edit: Record, now: dict[str, Record]) -> dict[str, Record]:
        """Returns the records by the names that their modules have after this edit; what is gone is left out."""
        if not (cls.puts or cls.adds):
            return now
        name = edit["name"]
        inside = [n for n in now if n == name or n.startswith(name + ".")]
        kept = {n for n in inside if n != name and _is_kept_inside(edit, n)}
        return {n: record for n, record in now.items() if n not in inside or n in kept}

    @classmethod
    def inspect(cls, module: nn.Module, edit: Record) -> tuple[str, list[str]]:
        """Looks at what stands at the record's name; returns what it is, and what is not as the record says."""
        return "", []

    @classmethod
    def carried(cls) -> Callable[..., list[str] | None] | None:
        """Returns the function that artifacts carry, unless `model/operations.py`, which they all carry, has it.

        It is called as `function(model, names, entry, classes)` with an entry of config.surgery, when the family's
        constructor has built `model`; its source is copied, so it uses its arguments, builtins and what it imports.
        """
        return None


def _is_kept_inside(edit: Record, name: str) -> bool:
    """Returns whether an earlier module still stands, under its name, within the one that an edit put around it."""
    return any(new == old and new.startswith(name + ".") for new, old in edit["kept"].items())
