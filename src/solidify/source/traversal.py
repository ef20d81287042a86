"""The way through a user's files: from those that define classes to all that travels with them.

Goes in: names that are needed. Comes out, for each file: what its import statements bind, which spans of its text
change, which data it reads; and what is needed from outside, and every fault.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from solidify.source import extraction, flatten, payload
from solidify.source.extraction import Extract
from solidify.source.flatten import Binding, Edit, Import, Target
from solidify.source.imports import Fault, Library, Package, Resolved, circumstances
from solidify.source.ownership import locate, requirement
from solidify.source.payload import Payload
from solidify.source.syntax import SourceFile

# Calls that import by a name they are given; of these only a constant name can be read from the text.
_IMPORTING = {"import_module", "__import__"}
_LOADING = {"spec_from_file_location", "run_path", "run_module", "load_source", "SourceFileLoader"}


@dataclass(frozen=True)
class _Site:
    """An import statement that binds a package of the user's to a name; `dotted` for `import package.module`."""

    node: Import
    local: str
    dotted: str
    package: Package


@dataclass
class Walk:
    """The way through the files: what was found in each, and what is still to be looked at."""

    index: Library
    roots: set[SourceFile] = field(default_factory=set)
    queue: list[SourceFile] = field(default_factory=list)
    extracts: dict[SourceFile, Extract] = field(default_factory=dict)
    bindings: dict[SourceFile, dict[Import, list[Binding]]] = field(default_factory=dict)
    aliases: dict[SourceFile, dict[str, Target]] = field(default_factory=dict)
    edits: dict[SourceFile, list[Edit]] = field(default_factory=dict)
    unseen: dict[SourceFile, dict[Import, list[Binding] | None]] = field(default_factory=dict)  # that never run
    payloads: dict[SourceFile, Payload] = field(default_factory=dict)
    uses: dict[SourceFile, set[SourceFile]] = field(default_factory=dict)  # not those that may fail
    absent: list[tuple[SourceFile, str]] = field(default_factory=list)
    requirements: dict[str, str] = field(default_factory=dict)
    faults: dict[str, None] = field(default_factory=dict)

    def demand(self, target: Target, user: SourceFile | None = None, *, optional: bool = False) -> None:
        """Notes that a name (or a file) is needed."""
        source = target.source
        if source is None:
            return
        if user is not None and not optional:
            self.uses.setdefault(user, set()).add(source)
        fresh = source not in self.bindings
        if not source.whole and target.name is not None and target.name not in source.wanted:
            source.wanted.add(target.name)
            fresh = True
        if fresh and source not in self.queue:
            self.queue.append(source)

    def run(self) -> None:
        """Looks at files until nothing new is needed."""
        while self.queue:
            self.look(self.queue.pop(0))

    def statements(self, source: SourceFile) -> list[ast.stmt]:
        """Returns the statements of a file that travel."""
        return source.tree.body if source.whole else self.extracts[source].statements

    def look(self, source: SourceFile) -> None:
        """Looks at one file: what it imports, reads, and imports by name."""
        if not source.whole:
            self.extracts[source] = extraction.extract(source, source.wanted)
        self.bindings[source], self.edits[source], self.unseen[source] = {}, [], {}
        nodes = [node for statement in self.statements(source) for node in ast.walk(statement)]
        sites = [s for n in nodes if isinstance(n, Import) for s in self.look_at_import(source, n)]
        packages = {site.local: site.package for site in sites}
        found, faults = payload.gather(
            source, self.statements(source), lambda anchor: self.directory_of(source, anchor, packages)
        )
        self.faults |= dict.fromkeys(faults)
        if found is not None:
            self.payloads[source] = found
            self.edits[source] += found.edits
        for scope, local in {(source.owners[site.node], site.local): None for site in sites}:
            group = [s for s in sites if (source.owners[s.node], s.local) == (scope, local)]
            self.look_at_package(source, scope, group, found)
        for node in nodes:
            if isinstance(node, ast.Call):
                self.look_at_call(source, node)
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.modules":
                self.look_at_name(source, node, node.slice)
            elif isinstance(node, ast.Expr) and payload.changes_the_path(node):
                self.edits[source].append((*source.span(node), flatten.commented(source, node, "not needed here")))

    def look_at_import(self, source: SourceFile, node: Import) -> list[_Site]:
        """Resolves an import statement; returns what it binds to packages, which are looked at by their uses."""
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return []
        optional, never = circumstances(source, node)
        bindings: list[Binding] = []
        sites: list[_Site] = []
        for alias in node.names:
            local = alias.asname or alias.name.split(".")[0]
            if alias.name == "*":
                found: list[tuple[str, Resolved]] = self.star(source, node)
            else:
                found = [(local, self.index.alias(source, node, alias))]
            if not self.is_needed(source, node, local) and not self.is_always(source, found[0][1]):
                continue  # of what a needed statement imports, only the needed names
            for name, what in found:
                if isinstance(what, Package):
                    dotted = alias.name if isinstance(node, ast.Import) and not alias.asname else ""
                    sites.append(_Site(node, name, dotted, what))
                elif isinstance(what, Fault):
                    if never:
                        self.unseen[source][node] = None
                    elif not (what.absent and optional):
                        self.fault(source, node, what)
                    elif isinstance(node, ast.ImportFrom) and node.level:
                        text = f'raise ModuleNotFoundError("{what.reason}")'
                        self.edits[source].append((*source.span(node), text))
                    return []
                elif what.source is None and isinstance(node, ast.Import) and not alias.asname:
                    bindings.append(Binding(alias.name, Target(None, alias.name, None)))
                else:
                    bindings.append(Binding(name, what))
        if never:
            self.unseen[source][node] = None if sites else bindings
            return []
        for binding in bindings:
            self.demand(binding.target, source, optional=optional)
            self.require(source, binding.target)
        self.bindings[source][node] = bindings
        return sites

    def is_needed(self, source: SourceFile, node: Import, local: str) -> bool:
        """Whether a name that a travelling statement imports is needed itself."""
        if source.whole or local == "*" or node not in source.tree.body:
            return True
        return local in self.extracts[source].names

    def star(self, source: SourceFile, node: Import) -> list[tuple[str, Resolved]]:
        """Resolves `from module import *`: of a package, to the names that it stands for."""
        assert isinstance(node, ast.ImportFrom)
        module = self.index.absolute(source, node)
        if isinstance(module, Fault):
            return [("*", module)]
        what = self.index.module(module, source)
        if isinstance(what, Fault):
            return [("*", what)]
        if isinstance(what, Target):
            return [("*", Target(what.source, what.module, "*"))]
        names = self.index.public(module, source)
        return [(name, self.index.attribute(what.location, name, source)) for name in names]

    def is_always(self, source: SourceFile, what: Resolved) -> bool:
        """Whether an import is of something that is always there."""
        if not isinstance(what, Target) or what.source is not None:
            return False
        return locate(what.module, source, self.index.here).owner == "always"

    def look_at_package(
        self, source: SourceFile, scope: ast.AST, sites: Sequence[_Site], found: Payload | None
    ) -> None:
        """Replaces the uses of a package (`package.module.X`) by names that its import statements bind directly."""
        first = sites[0]
        if any(site.package != first.package for site in sites):
            self.fault(source, first.node, Fault(f"`{first.local}` stands for two different packages"))
        for site in sites:
            self.bindings[source].setdefault(site.node, [])
        anchors = found.anchor_nodes if found is not None else frozenset()
        travelling = {node for statement in self.statements(source) for node in ast.walk(statement)}
        for node, owner in source.owners.items():
            if not isinstance(node, ast.Name) or node.id != first.local or owner is not scope or node in anchors:
                continue
            never_read = node in source.annotations and "annotations" in source.futures
            if node in travelling and not never_read:
                self.replace_use(source, node, sites)

    def replace_use(self, source: SourceFile, name: ast.Name, sites: Sequence[_Site]) -> None:
        """Replaces one use of a package."""
        what: Resolved = sites[0].package
        node: ast.expr = name
        parts = [name.id]
        while isinstance(what, Package):
            holder = source.parents[node]
            if not isinstance(holder, ast.Attribute):
                reason = f"the package `{'.'.join(parts)}` is used as an object; import what is needed of it by name"
                return self.fault(source, node, Fault(reason), shown=False)
            node = holder
            parts.append(holder.attr)
            what = self.index.attribute(what.location, holder.attr, source)
        if isinstance(what, Fault):
            return self.fault(source, node, what)
        if what.name is not None and isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            reason = (
                f"`{'.'.join(parts)}` is assigned from outside its file, and the file is carried without its package"
            )
            return self.fault(source, node, Fault(reason), shown=False)
        start, end = source.span(node)
        if "".join(source.text.encode()[start:end].decode().split()) != ".".join(parts):
            reason = f"`{'.'.join(parts)}` inside an f-string cannot be replaced; assign it to a name first"
            return self.fault(source, node, Fault(reason), shown=False)
        bound, word, suffix = what, "_".join(parts), ""
        if what.source is not None and what.name is not None:  # looked up in its file when it is used, as it was before
            bound, suffix = Target(what.source, "", None), f".{what.name}"
            short = what.source.name.rpartition(".")[2]
            word = parts[0] if what.source.name == sites[0].package.location.name else f"{parts[0]}_{short}"
        alias = self.alias(source, word, bound, free=parts[0])
        self.edits[source].append((start, end, alias + suffix))
        dotted = [site.dotted if ".".join(parts).startswith(site.dotted) else "" for site in sites]
        for site, matched in zip(sites, dotted, strict=True):
            if len(matched) == max(map(len, dotted)):
                optional = circumstances(source, site.node)[0]
                if Binding(alias, bound) not in self.bindings[source][site.node]:
                    self.bindings[source][site.node].append(Binding(alias, bound))
                self.demand(what, source, optional=optional)
                self.require(source, what)
        return None

    def alias(self, source: SourceFile, word: str, target: Target, *, free: str) -> str:
        """Returns a name for `target` that nothing else in the file has (`free` is the package's own name)."""
        aliases = self.aliases.setdefault(source, {})
        while aliases.get(word, target) != target or (word in source.identifiers and word != free):
            word += "_"
        aliases[word] = target
        return word

    def look_at_call(self, source: SourceFile, node: ast.Call) -> None:
        """Judges a call that imports by name, or reads beside a package in a way that cannot be carried."""
        called = node.func
        last = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        if circumstances(source, node)[1]:
            return None
        if last in _LOADING:
            reason = f"`{last}` imports what is computed at run time; write an import statement"
            return self.fault(source, node, Fault(reason), shown=False)
        if re.fullmatch(r"pkgutil\.get_data|pkg_resources\.resource_\w+", ast.unparse(called)):
            reason = (
                f"`{ast.unparse(node)}` reads beside its package; name the file by `__file__` or importlib.resources"
            )
            return self.fault(source, node, Fault(reason), shown=False)
        if last in _IMPORTING and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if not isinstance(name, str) or name.startswith("."):
                reason = f"`{ast.unparse(node)}` imports what is computed at run time; write an import statement"
                return self.fault(source, node, Fault(reason), shown=False)
            self.look_at_name(source, node, node.args[0])
        return None

    def look_at_name(self, source: SourceFile, node: ast.expr, name: ast.expr) -> None:
        """Judges a module that is asked for by its name."""
        if not isinstance(name, ast.Constant) or not isinstance(name.value, str):
            return None
        what = self.index.module(name.value, source)
        if isinstance(what, Package) or (isinstance(what, Target) and what.source is not None):
            reason = f"`{ast.unparse(node)}` asks for your own file by its name; write an import statement"
            return self.fault(source, node, Fault(reason), shown=False)
        if isinstance(node, ast.Subscript):
            return None  # what is outside is asked for only if it is there
        if isinstance(what, Target):
            return self.require(source, what)
        return None if what.absent and circumstances(source, node)[0] else self.fault(source, node, what)

    def directory_of(
        self, source: SourceFile, anchor: ast.expr | None, packages: Mapping[str, Package]
    ) -> Path | str | None:
        """Returns the directory that an argument of importlib.resources stands for (see `payload.gather`)."""
        written = ast.unparse(anchor) if anchor is not None else "__package__"
        if written in ("__package__", "__name__", "__spec__.parent"):
            return source.path.parent if source.path is not None else None
        what: Resolved | None = None
        if isinstance(anchor, ast.Constant) and isinstance(anchor.value, str):
            what = self.index.module(anchor.value, source)
        elif isinstance(anchor, ast.Name | ast.Attribute):
            first, *rest = written.split(".")
            what = packages.get(first)
            for part in rest:
                what = self.index.attribute(what.location, part, source) if isinstance(what, Package) else what
        if isinstance(what, Package) and what.location.search:
            return Path(what.location.search[0])
        if isinstance(what, Fault):
            return what.reason
        outside = isinstance(what, Target) and what.source is None
        return (
            None
            if outside
            else (f"which package `{written}` is cannot be found out from the source; write `__package__` or its name")
        )

    def require(self, source: SourceFile, target: Target) -> None:
        """Notes the distribution of what is imported from outside."""
        if target.source is None and locate(target.module, source, self.index.here).owner == "installed":
            name, version = requirement(target.module, self.index.here)
            self.requirements[name] = version

    def fault(self, source: SourceFile, node: ast.stmt | ast.expr, fault: Fault, *, shown: bool = True) -> None:
        """Notes a fault; what is merely absent counts only where the file is needed in any case."""
        statement = f"`{ast.unparse(node).splitlines()[0]}`: " if shown else ""
        text = f"{source.name_line(node)}: {statement}{fault.reason}"
        if fault.absent:
            self.absent.append((source, text))
        else:
            self.faults[text] = None

    def finish(self) -> None:
        """Counts the absent against the files that are needed in any case, and the data against its limit."""
        needed, queue = set(self.roots), list(self.roots)
        while queue:
            fresh = self.uses.get(queue.pop(), set()) - needed
            needed |= fresh
            queue += fresh
        self.faults |= dict.fromkeys(text for source, text in self.absent if source in needed)
        size = sum(found.size for found in self.payloads.values())
        if size > payload.LIMIT:
            largest = max((p for found in self.payloads.values() for p in found.files.values()), key=_get_size)
            self.faults[
                f"the files that the modules read hold {size / 2**20:.1f} MB (most of it {largest.name}), and at most "
                f"{payload.LIMIT // 2**20} MB can be carried as text; keep what they hold as a persistent buffer"
            ] = None


def _get_size(path: Path) -> int:
    return path.stat().st_size
