"""Which number each class has: decided once, from what the recipe, the base or the training rows say, for all rows.

A data set may number its classes (an image folder does, and many of the hub), and two of them number the same classes
otherwise. So between rows names decide, never the numbers of a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from solidify.errors import DataError

Names = tuple[str, ...]
COLUMNS = ("label", "tags")  # of rows, where a class is named or numbered


def decide(rows: Any, config: Any, given: Sequence[str] | None = None) -> Names | None:
    """Returns the names of the classes by their number, as many as a head has outputs; None where rows hold numbers.

    They are those that are `given`; else those of the model's configuration, as far as it has any; else those of the
    training `rows`, in the order in which these number them.
    """
    if given is not None:
        return tuple(given)
    if not is_nameless(config):
        return tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    own = names_of(rows)
    if own is None:
        return None
    rest = (f"LABEL_{number}" for number in range(len(own), config.num_labels))
    return (*own[: config.num_labels], *rest)


def is_nameless(config: Any) -> bool:
    """Returns whether a configuration says of no class what it is called."""
    return all(name == f"LABEL_{number}" for number, name in config.id2label.items())


def names_of(rows: Any) -> Names | None:
    """Returns the names by which rows number their classes; None where they do not."""
    kinds = (_class_kind((rows.features or {}).get(column)) for column in COLUMNS)
    return next((tuple(kind.names) for kind in kinds if kind is not None), None)


def spelled_by(rows: Any, known: Names | None) -> Names | None:
    """Returns the names that stand for the numbers in some rows; None where these are the numbers of the model.

    Raises:
        DataError: the rows name their classes, and nothing says which number each name has.
    """
    own = names_of(rows)
    if own is not None and known is None:
        raise DataError(
            f"the rows name their classes ({', '.join(own[:20])}), and those of training have numbers alone; say with "
            "`labels` what each number is called, in their order"
        )
    return own


def spell(label: Any, names: Names | None) -> Any:
    """Returns the name of a label (or of a list of them) that is a number of `names`; any other as it is."""
    if names is None:
        return label
    if isinstance(label, list):
        return [spell(each, names) for each in label]
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return names[label]
    return label  # -1 of a data set is no class, and Python would count it from the end


def unite(parts: Sequence[Any]) -> list[Any]:
    """Returns sources of rows whose columns number the same classes alike: those of the first source in its order,
    then what each further one adds."""
    united = list(parts)
    for column in parts[0].features or {}:
        kinds = [_class_kind((part.features or {}).get(column)) for part in united]
        if all(kind is not None for kind in kinds):
            names = tuple(dict.fromkeys(name for kind in kinds if kind is not None for name in kind.names))
            united = [_renumber(part, column, names) for part in united]
    return united


def _class_kind(feature: Any) -> datasets.ClassLabel | None:
    """Returns how a column numbers classes, one in a row or several."""
    kind = feature.feature if isinstance(feature, datasets.List) else feature
    return kind if isinstance(kind, datasets.ClassLabel) else None


def _renumber(rows: Any, column: str, names: Names) -> Any:
    """Gives the classes in a column their numbers in `names`."""
    feature = rows.features[column]
    own = _class_kind(feature)
    if own is None or tuple(own.names) == names:
        return rows
    places = [names.index(name) for name in own.names]
    kind = datasets.ClassLabel(names=list(names))
    kind = datasets.List(kind) if isinstance(feature, datasets.List) else kind
    if isinstance(rows, datasets.IterableDataset):
        features = datasets.Features({**rows.features, column: kind})
        return rows.map(_place_row, fn_kwargs={"column": column, "places": places}, features=features)
    found = [_place(label, places) for label in rows[column]]
    return rows.remove_columns([column]).add_column(column, found, feature=kind)


def _place_row(row: dict[str, Any], *, column: str, places: list[int]) -> dict[str, Any]:
    return {column: _place(row[column], places)}


def _place(label: Any, places: Sequence[int]) -> Any:
    if isinstance(label, list):
        return [_place(each, places) for each in label]
    return places[label] if label is not None and 0 <= label < len(places) else label
