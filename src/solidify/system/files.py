"""The one place through which files that others wrote are read as text: regular files, bounded, in one sentence if not.

What a file may hold is bounded too: a YAML alias can stand for more than memory holds, and nesting for more than the
stack does.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from solidify.errors import ArtifactError, SolidifyError

LARGEST = 2**28  # bytes of a JSON file; an index of a hundred thousand tensors has 10 MB, a tokenizer up to 40
LARGEST_BESIDE = 2**30  # bytes of any file that stands beside weights
LARGEST_RECIPE = 2**20
DEEPEST = 32  # sections within sections of a recipe

_HALF = re.compile("[\ud800-\udfff]")
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def require_regular(path: Path, kind: type[SolidifyError] = ArtifactError, *, largest: int | None = None) -> None:
    """Makes sure that a path leads to a regular file; nothing is opened.

    Raises:
        SolidifyError: `kind`: nothing is there, it is a pipe, a device or a directory, or larger than `largest` bytes.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise kind(f"{path} does not exist") from error
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a zero byte in a name
        words = error.strerror if isinstance(error, OSError) else str(error)
        raise kind(f"{str(path)[:200]!r} cannot be read: {words}") from error
    if not stat.S_ISREG(found.st_mode):
        raise kind(f"{path} is {_KINDS.get(stat.S_IFMT(found.st_mode), 'a device')} and not a file")
    if largest is not None and found.st_size > largest:
        raise kind(
            f"{path} holds {found.st_size} bytes, and at most {largest} are read; it is not the file that is expected "
            "here"
        )


def is_directory(path: str | Path) -> bool:
    """Returns whether a directory stands at a path; also no name that no file could have is one."""
    return _is_standing(path, Path.is_dir)


def is_file(path: str | Path) -> bool:
    """Returns whether a regular file stands at a path; also no name that no file could have is one."""
    return _is_standing(path, Path.is_file)


def _is_standing(path: str | Path, asked: Callable[[Path], bool]) -> bool:
    try:
        return asked(Path(path))
    except (OSError, ValueError):  # too long, not in UTF-8, or behind a door that is closed
        return False


def is_text(value: Any) -> bool:
    """Returns whether every word in some plain values is text: JSON and YAML can write halves of characters."""
    if isinstance(value, dict):
        return all(is_text(key) and is_text(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(is_text, value))
    return not isinstance(value, str) or not _HALF.search(value)


def content(path: Path, kind: type[SolidifyError] = ArtifactError, *, largest: int = LARGEST_BESIDE) -> bytes:
    """Reads a file as it is.

    Raises:
        SolidifyError: `kind`, as `require_regular`, or it cannot be read, or grew meanwhile.
    """
    require_regular(path, kind, largest=largest)
    try:
        with path.open("rb") as file:
            found = file.read(largest + 1)
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror}") from error
    if len(found) > largest:
        raise kind(
            f"{path} holds more than the {largest} bytes that are read; it is not the file that is expected here"
        )
    return found


def text(path: Path, kind: type[SolidifyError] = ArtifactError, *, largest: int = LARGEST) -> str:
    """Reads a text file in UTF-8.

    Raises:
        SolidifyError: `kind`, as `require_regular`, or it cannot be read, or is not UTF-8.
    """
    try:
        return content(path, kind, largest=largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not text in UTF-8: the byte at offset {error.start} is not valid") from error


def document(path: Path, kind: type[SolidifyError] = ArtifactError, *, largest: int = LARGEST) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        SolidifyError: `kind`, as `text`, or it is not JSON, is nested too deeply, or holds something else.
    """
    try:
        read = text(path, kind, largest=largest)
        found = json.loads(read)
    except (ValueError, RecursionError) as error:
        if isinstance(error, SolidifyError):
            raise
        words = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise kind(f"{path} is not the JSON that it should be: {words}") from error
    if not isinstance(found, dict):
        raise kind(f"{path} holds {type(found).__name__}, and not an object with fields")
    if "\\ud" in read.lower() and not is_text(found):
        raise kind(f"{path} holds half a character (\\ud…), which is not text; write it in UTF-8")
    return found


def parse_yaml(content: str) -> Any:
    """Reads YAML into plain values: no aliases, no tags, no key twice, keys that are words, bounded nesting.

    Raises:
        yaml.YAMLError: it is not YAML, or not of that kind.
    """
    try:
        return yaml.load(content, _Loader)
    except (ValueError, OverflowError, RecursionError) as error:  # of a number of five thousand digits, for example
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def say_yaml(error: yaml.YAMLError) -> str:
    """Returns where in a text YAML ends to be that, and what is wrong there, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    words = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    if isinstance(error, _Refusal):
        return words
    begun = "" if error.context_mark is None else f" (begun in line {error.context_mark.line + 1})"
    return (
        f"{words}{begun}; write `key: value`, indent with spaces alike, close brackets and quotes, and "
        "quote text that holds `: ` or ` #`"
    )


class _Refusal(yaml.constructor.ConstructorError):
    """What is YAML and not read all the same; its words say what to do."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: `2e-4` is a float. (PyYAML reads YAML 1.1, where it is a string.) A date is a string."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes a node, unless it is an alias or lies too deep."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _make_refusal(
                f"the alias *{event.anchor} is not read; write out what it stands for", event.start_mark
            )
        if self._depth >= DEEPEST:
            raise _make_refusal(f"it is nested more than {DEEPEST} deep", event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Makes a mapping of a node whose keys are words, each of them once."""
        seen: set[str] = set()
        for key, _ in node.value:
            word = key.value if isinstance(key, yaml.ScalarNode) else None
            if word is None or key.tag != "tag:yaml.org,2002:str":
                raise _make_refusal(
                    f"the key {word if word is not None else 'here'} is not a string; quote it", key.start_mark
                )
            if word in seen:
                raise _make_refusal(f"the key {word!r} appears twice", key.start_mark)
            seen.add(word)
        return super().construct_mapping(node, deep=deep)


def _make_refusal(words: str, mark: Any) -> yaml.YAMLError:
    return _Refusal(None, None, words, mark)


_WITHOUT = ("float", "timestamp", "merge", "value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _WITHOUT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN
}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by dotted keys (`text_config.num_hidden_layers`); tuples become lists, as in JSON."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flatten(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return result
