"""Rows with labels become examples: of texts, pairs of texts, words, images, and texts made of others.

Classes are numbers, or names that the model's configuration (or `names`) lists in order. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from solidify.errors import DataError
from solidify.training import numbering

Names = Sequence[str] | None
Example = dict[str, Any]


def number_of(label: Any, config: Any, names: Names) -> int:
    """Returns the number of a class.

    Raises:
        DataError: there is no such class.
    """
    known = list(names) if names is not None else [str(config.id2label[n]) for n in sorted(config.id2label)]
    nameless = names is None and numbering.is_nameless(config)
    if isinstance(label, str):
        if label in known:
            return known.index(label)
        raise DataError(
            f"its label is {label!r}, and the classes are {', '.join(known[:20])}; "
            + ("say with `labels` what each class is called, in their order" if nameless else "call it one of these")
        )
    if isinstance(label, bool) or (isinstance(label, int) and 0 <= label < config.num_labels):
        return int(label)
    raise DataError(f"its label is {label!r}, and the model has the classes 0 to {config.num_labels - 1}")


def find_faults(config: Any, names: Names) -> list[str]:
    """Says why a head with this configuration cannot learn classes of these names."""
    if names is None:
        return []
    twice = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if twice:
        return [f"`labels` names {', '.join(map(repr, twice))} twice; each class has a name of its own"]
    if len(names) != config.num_labels:
        return [f"`labels` names {len(names)} classes, and the model has {config.num_labels}"]
    own = [str(config.id2label[number]) for number in sorted(config.id2label)]
    apart = [n for n, (said, known) in enumerate(zip(names, own, strict=True)) if known not in (said, f"LABEL_{n}")]
    if not apart:
        return []
    number, listed = apart[0], ", ".join(own[:20])
    return [
        f"`labels` says that class {number} is {names[number]!r}, and the base's configuration (id2label) that it is "
        f"{own[number]!r}; leave `labels` out, as the base's classes are {listed}, or, for others, give a base whose "
        "configuration has these names"
    ]


def label_of(form: str, label: Any, config: Any, names: Names) -> Any:
    """Returns what the model's own loss takes for a label of a text: a number, or a list of floats.

    Raises:
        DataError: it is none.
    """
    if form == "classification":
        return number_of(label, config, names)
    if form == "regression":
        if isinstance(label, (int, float)) and not isinstance(label, bool):
            return float(label)
        raise DataError(f"its label is {label!r}, and must be a number")
    if not isinstance(label, (list, tuple)):
        raise DataError(f"its label is {label!r}, and must be a list: of names, or of a 0 or 1 for each class")
    if not any(isinstance(each, str) for each in label) and len(label) == config.num_labels:
        if {float(each) for each in label} <= {0.0, 1.0}:
            return [float(each) for each in label]
        raise DataError(f"its label is {label!r}, and must hold a 0 or 1 for each of {config.num_labels} classes")
    if label and not any(isinstance(each, str) for each in label):
        raise DataError(f"its label holds {len(label)} numbers, and the model has {config.num_labels} classes")
    held = {number_of(each, config, names) for each in label}
    return [float(n in held) for n in range(config.num_labels)]


def of_text(
    form: str, row: Mapping[str, Any], tokenizer: Any, config: Any, names: Names, cut: Mapping[str, Any]
) -> Example:
    """Makes an example of `text` (with `text_pair` where the row has one) and `label`.

    `cut` is what the tokenizer is told of truncation, here and below.
    """
    texts = [row["text"], row["text_pair"]] if row.get("text_pair") is not None else [row["text"]]
    return {**tokenizer(*texts, verbose=False, **cut), "labels": label_of(form, row["label"], config, names)}


def of_words(row: Mapping[str, Any], tokenizer: Any, config: Any, names: Names, cut: Mapping[str, Any]) -> Example:
    """Makes an example of words and their tags: a word's first token has its tag, all others -100;
    so has a word whose tag is -100, by which data sets leave words out.

    Raises:
        DataError: there are more or fewer tags than words.
    """
    words, tags = row["words"] if row.get("words") is not None else row["tokens"], row["tags"]
    if len(words) != len(tags):
        raise DataError(f"it has {len(words)} words and {len(tags)} tags")
    if not tokenizer.is_fast:
        raise DataError("tags need to know which tokens a word became, which the base's slow tokenizer does not say")
    made = tokenizer(list(words), is_split_into_words=True, verbose=False, **cut)
    numbers = [-100 if type(tag) is int and tag == -100 else number_of(tag, config, names) for tag in tags]
    labels, before = [], None
    for index in made.word_ids():
        labels.append(-100 if index is None or index == before else numbers[index])
        before = index
    return {**made, "labels": labels}


def of_pair(row: Mapping[str, Any], tokenizer: Any, cut: Mapping[str, Any]) -> Example:
    """Makes an example of `source` and `target`: what the encoder reads, and what the decoder learns to write."""
    made = tokenizer(row["source"], verbose=False, **cut)
    return {**made, "labels": tokenizer(text_target=row["target"], verbose=False, **cut)["input_ids"]}
