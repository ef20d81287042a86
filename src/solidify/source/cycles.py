"""Files that import each other: which of them has to be imported first.

A circular import works in the order in which the project itself begins it, often through a package's `__init__` that
does not travel. That order is read from `sys.modules`, where modules stand as their imports began.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from solidify.source.flatten import Binding, Import
from solidify.source.imports import circumstances
from solidify.source.syntax import SourceFile

Circles = dict[SourceFile, frozenset[SourceFile]]


def circles(bindings: Mapping[SourceFile, Mapping[Import, Sequence[Binding]]]) -> Circles:
    """Returns, for each file that is part of a circular import, all that are."""
    edges = {source: _find_imported(source, bindings[source]) for source in bindings}
    reached = {source: _find_reachable(source, edges) for source in edges}
    return {
        source: frozenset({other for other in reached[source] if source in reached[other]} | {source})
        for source in edges
        if source in reached[source] and reached[source] != {source}
    }


def first(circle: frozenset[SourceFile]) -> SourceFile:
    """Returns the file of a circular import that is to be imported first."""
    order = {name: index for index, name in enumerate(sys.modules)}
    return max(circle, key=lambda source: (order.get(source.name, -1), source.name))


def _find_imported(source: SourceFile, bindings: Mapping[Import, Sequence[Binding]]) -> set[SourceFile]:
    """Returns the files that a file imports as soon as it is imported itself."""
    return {
        binding.target.source
        for node, bound in bindings.items()
        if node in source.at_once and not circumstances(source, node)[1]
        for binding in bound
        if binding.target.source is not None
    }


def _find_reachable(source: SourceFile, edges: Mapping[SourceFile, set[SourceFile]]) -> set[SourceFile]:
    reached: set[SourceFile] = set()
    queue = [source]
    while queue:
        fresh = edges.get(queue.pop(), set()) - reached
        reached |= fresh
        queue += fresh
    return reached
