"""What `inspect`, `plan`, `diff` and reports show: tables and coloured texts made from what those found out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from solidify.artifact.inspection import Branch, ranges
from solidify.behaviour.properties import PROPERTIES
from solidify.findings import PROVED, VERDICTS, Finding, fold, label_of, tell
from solidify.model import anatomy
from solidify.model.cost import Cost
from solidify.surgery import catalogue
from solidify.system import console

_MARKS = {"removed": ("-", "red"), "added": ("+", "green"), "changed": ("~", "yellow")}
_NAMED = 120  # characters of the names of what was proved, on one line
_COSTS = {
    "parameters": ("parameters", console.amount),
    "bytes": ("on disk", console.size),
    "memory": ("in memory, loaded", console.size),
    "flops_per_token": ("matrix FLOPs per {unit}", console.amount),
}


def _join_names(names: Sequence[str]) -> str:
    """Writes names of promises one after the other, what several of them begin with once."""
    groups: dict[str, list[str]] = {}
    for name in names:
        first, _, rest = name.rstrip(")").partition(": " if ": " in name else " (")
        groups.setdefault(first, []).extend([rest] if rest else [])
    return "; ".join(f"{first} ({', '.join(rest)})" if rest else first for first, rest in groups.items())


def inspection(name: str, branches: Sequence[Branch], total: Cost) -> Iterator[RenderableType]:
    """Shows the tree of a model."""
    dtypes = {branch.dtype for branch in branches if branch.dtype}
    rows = [
        (
            _write_label(branch),
            _write_kind(branch),
            str(branch.times) if branch.times > 1 else "",
            console.amount(branch.parameters) if branch.parameters else "-",
            console.share(branch.parameters, total.parameters),
            console.size(branch.bytes) if branch.bytes else "-",
            console.share(branch.flops, total.flops_per_token),
            "●" if branch.target else "",
            *([branch.dtype] if len(dtypes) > 1 else []),
        )
        for branch in branches
    ]
    columns = ["module", "class", "x", "parameters", "share", "bytes", "FLOPs", "●"]
    columns += ["dtype"] if len(dtypes) > 1 else []
    yield console.table(name, columns, rows, numbers=(2, 3, 4, 5, 6), ruled=False)
    same = f", all {dtypes.pop()}" if len(dtypes) == 1 else ""
    yield (
        f"{total.parameters:,} parameters{same}; {console.size(total.bytes)} on disk, {console.size(total.memory)} in "
        f"memory; {total.flops_per_token:,} matrix FLOPs per {total.unit}"
    )
    yield from _show_uncertain(total.document())
    hint = f"● `replace` may name it: its full name, with * for numbers. x: how many. FLOPs: share per {total.unit}."
    yield console.line((hint, "dim"))


def _write_label(branch: Branch) -> Text:
    """Writes the last part of a name, indented, with the numbers that a `*` stands for."""
    last = branch.name.rpartition(".")[2]
    label = Text("│ " * (branch.depth - 1), style="dim")
    label.append(
        console.printable(last), style="bold not dim" if last == "*" else "dim" if not branch.parameters else "not dim"
    )
    if last == "*" and branch.where:
        label.append(f" ({branch.where})", style="cyan not dim")
    return label


def _write_kind(branch: Branch) -> Text:
    sizes = " x ".join(map(str, branch.shape))
    kind = Text("" if branch.kind == "parameter" else branch.kind)
    if sizes:
        kind.append(f"{' ' if kind else ''}[{sizes}]", style="cyan")
    if branch.tied:
        kind.append(f" = {branch.tied}", style="yellow")
    return kind


def plan(document: Mapping[str, Any], *, verbose: bool = False) -> Iterator[RenderableType]:
    """Shows what a recipe would do, from the plain values of a plan; the code that it writes only if `verbose`."""
    if document["edits"]:
        yield _show_surgery(document["edits"])
    else:
        yield "Surgery: none. The base is trained as it stands, and OUTPUT/artifact is that base.\n"
    yield from _show_declared(document["edits"])
    yield from _tensor_sums(document["tensors"])
    if "data" in document:
        yield _write_data(document["data"])
    if "heal" in document:
        yield from _show_healing(document["heal"])
    if document["trainable"]:
        yield _show_trained(document["trainable"], document["after"]["parameters"])
        yield f"Trainer: {document['trainer']}\n"
        yield _show_objective(document["objective"])
        yield from _show_groups(document["groups"])
    if (prefix := document.get("prefix")) is not None:
        layers = ", ".join(prefix["layers"])
        yield f"Computed once for each batch: {layers}; about {console.size(prefix['bytes'])} on disk while it trains\n"
    before, after = document["before"], document["after"]
    rows = [
        (label, show(before[key]), show(after[key]), _write_difference(before[key], after[key], show))
        for key, (label, show) in _name_costs(after["unit"])
    ]
    yield console.table("Cost", ("", "before", "after", "difference"), rows, numbers=(1, 2, 3))
    yield from _show_uncertain(after)
    if "quantization" in document:
        yield from _show_quantization(document["quantization"])
    needs = ", ".join(f"{name} {version}" for name, version in document["requirements"].items())
    yield f"Needs torch and transformers{', and ' + needs if needs else ', nothing else'}.\n"
    for note in document.get("notes", ()):
        yield console.line((f"{note}\n", "yellow"))
    if document["files"]:
        yield from _show_files(document["files"], document["generated"], verbose)


def _show_quantization(planned: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Shows what the artifact takes when it is trained quantised, and what keeps its dtype."""
    yield (
        f"Trained as {planned['quantization']}: {console.size(planned['memory'])} in memory instead of "
        f"{console.size(planned['memory_unquantized'])}; {len(planned['quantized'])} weights are quantised"
    )
    reasons: dict[str, list[str]] = {}
    for name, why in planned["kept_out"].items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        yield console.line((f"  not quantised, {why}: {', '.join(anatomy.fold(names))}", "dim"))
    yield ""


def _write_data(read: Mapping[str, Any]) -> str:
    """Says how the rows of the data are read."""
    details = [read[key] for key in ("loss",) if key in read]
    details += [f"about {read['tokens']:,} tokens in all"] if "tokens" in read else []
    details += [f"at most {read['max_length']:,} tokens"] if "max_length" in read else []
    details += ["packed into windows"] if read.get("packing") else []
    details += ["with images"] if read.get("images") else []
    more = f" ({'; '.join(details)})" if details else ""
    return f"Data: {read['format']}{more}\n"


def _show_healing(planned: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Shows what each stage of healing would take."""
    rows = []
    if (place := planned.get("place")) is not None:
        kinds = ("layers", "cache_bytes", "flops")
        budget = next(f"{key} {place[key]:,}" for key in kinds if key in place)
        rows.append(("place", f"{place['candidates']} candidates, {budget}, by the {place['method']} choice"))
    if (align := planned.get("align")) is not None:
        how = "layer by layer" if align["stream"] else "the whole base in memory"
        disk = f", {console.size(align['disk'])} of activations on disk" if align["disk"] else ""
        rows.append(
            (
                "align",
                f"{align['modules']} modules, {console.amount(align['parameters'])} numbers learn, at most "
                f"{align['tokens']:,} tokens each; {how}, at most {console.size(align['memory'])} in memory{disk}",
            )
        )
    if (distill := planned.get("distill")) is not None:
        trained = len(distill["trained"]) + len(distill["lora"])
        rows.append(("distill", f"{', '.join(distill['objective'])}; {trained} modules or parameters are trained"))
    yield console.table("Healing", ("stage", "what it takes"), rows)


def _show_uncertain(cost: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Says of which experts it is not known how many a token uses."""
    if cost["uncertain"]:
        names = ", ".join(f"{_write_pattern(each)}{_write_times(each)}" for each in _fold_names(cost["uncertain"]))
        yield f"FLOPs are an upper bound: nothing says how many of {names} a {cost['unit']} uses; all are counted."


def _name_costs(unit: str) -> list[tuple[str, tuple[str, Any]]]:
    return [(key, (label.format(unit=unit), show)) for key, (label, show) in _COSTS.items()]


def _write_difference(before: float, after: float, show: Any) -> str:
    if before == after:
        return "-"
    return f"{'+' if after > before else '-'}{show(abs(after - before))} ({console.share(after - before, before)})"


def _show_surgery(edits: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Shows the changes, equal ones folded."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for edit in edits:
        described = catalogue.of(edit).builds  # then they are a whole tree
        arguments = "" if described else ", ".join(f"{key}={value!r}" for key, value in edit["arguments"].items())
        becomes = f"{edit['new_class']}({arguments})" if arguments else edit["new_class"]
        key = (edit["operation"], anatomy.fold([edit["name"]])[0], edit["old_class"], becomes)
        groups.setdefault(key, []).append(edit)
    rows = []
    for (operation, _, old, new), each in groups.items():
        grown = sum(edit["parameters_after"] - edit["parameters_before"] for edit in each)
        names = [edit["name"] for edit in each]
        change = f"{grown:+,}" if grown else "-"
        rows.append((operation, _write_pattern(names), old, new, _write_numbers(names), change))
    columns = ("operation", "module", "was", "becomes", "x", "parameters")
    return console.table("Surgery", columns, rows, numbers=(4, 5))


def _show_declared(edits: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Says which properties the changes do not keep on purpose, what follows, and what keeps state of its own."""
    kept: dict[str, list[str]] = {}
    for edit in edits:
        if (kind := edit.get("settings", {}).get("layer_type")) is not None:
            kept.setdefault(kind, []).append(edit["name"])
    for kind, names in kept.items():
        yield f"{_write_pattern(names)}: keeps state of its own in the cache (a {kind} layer)."
    lost: dict[str, list[str]] = {}
    for edit in edits:
        for key in (key for key, kept in edit.get("declares", {}).items() if not kept):
            lost.setdefault(key, []).append(edit["name"])
    for key, names in lost.items():
        what = f"{_write_pattern(names)}: {key} is not kept, as declared ({PROPERTIES[key]})"
        yield what + (". It generates without a cache." if key == "cache" else ".")


def _tensor_sums(tensors: Mapping[str, Sequence[str]]) -> Iterator[RenderableType]:
    """Says what becomes of the base's tensors, and names those that are new or go."""
    kept, new, dropped = (len(tensors[key]) for key in ("kept", "new", "dropped"))
    yield f"Tensors: {kept} of the base's {kept + dropped} kept, {dropped} dropped; {new} new"
    if tensors.get("unknown"):
        count = len(tensors["unknown"])
        yield f"  Not known before it is built: whether {count} more are new, or copies of those listed as dropped"
    for mark, key in (("added", "new"), ("removed", "dropped"), ("changed", "unknown")):
        for names in _fold_names(tensors.get(key, [])):
            yield console.line("  ", _MARKS[mark], f" {_write_pattern(names)}{_write_times(names)}")
    yield ""


def _show_trained(trainable: Mapping[str, int], parameters: int) -> RenderableType:
    """Shows the trainable set, repeated layers folded, with the share of the model's parameters."""
    rows = []
    for how, word in (("lora", "LoRA"), ("tokens", "rows"), ("full", "in full")):
        counts = {name.partition(" ")[2]: count for name, count in trainable.items() if name.startswith(f"{how} ")}
        for names in _fold_names(counts):
            number = sum(counts[name] for name in names)
            rows.append(
                (word, _write_pattern(names), _write_numbers(names), f"{number:,}", console.share(number, parameters))
            )
    total = sum(trainable.values())
    made = console.table("Trained", ("how", "what", "x", "parameters", "of the model"), rows, numbers=(2, 3, 4))
    made.add_section()
    made.add_row("all", f"{len(trainable)} names", "", f"{total:,}", console.share(total, parameters), style="bold")
    return made


def _show_objective(terms: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Shows the terms: what kind of quantity each is, and its weight."""
    rows = [
        (term["name"], term["reduction"], _write_short(term["weight"]), "yes" if term["reference"] else "")
        for term in terms
    ]
    return console.table("Objective", ("term", "reduction", "weight", "looks at the reference"), rows)


def _show_groups(groups: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Shows the parameter groups, if there are any."""
    if groups:
        rows = [
            (_write_short(group["parameters"]), _write_short({k: v for k, v in group.items() if k != "parameters"}))
            for group in groups
        ]
        yield console.table("Parameter groups", ("parameters", "settings"), rows)


def _write_short(value: Any) -> str:
    """Writes a value of a recipe in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_write_short(each)}" for key, each in value.items() if each != {})
    return ", ".join(map(_write_short, value)) if isinstance(value, (list, tuple)) else str(value)


def _fold_names(names: Iterable[str]) -> list[list[str]]:
    """Groups names that differ in numbers only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(anatomy.fold([name])[0], []).append(name)
    return list(groups.values())


def _write_pattern(names: Sequence[str]) -> str:
    """Writes one name as it is, several that differ in numbers with `*`."""
    return names[0] if len(names) == 1 else anatomy.fold(names)[0]


def _write_numbers(names: Sequence[str]) -> str:
    """Says how many names there are and, where each has one number, which."""
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in names]
    if len(names) > 1 and all(len(each) == 1 for each in numbers):
        return f"{len(names)} ({ranges([each[0] for each in numbers])})"
    return str(len(names))


def _show_files(files: Mapping[str, str], generated: Sequence[str], verbose: bool) -> Iterator[RenderableType]:
    """Lists the code of the artifact; if `verbose`, shows what of it solidify writes."""
    rows = [
        (name, "generated" if name in generated else "copied", str(len(text.splitlines())), _count_bytes(text))
        for name, text in files.items()
    ]
    yield console.table("Code of the artifact", ("file", "", "lines", "bytes"), rows, numbers=(2, 3))
    if not verbose:
        yield console.line(("(--verbose shows what is generated)", "dim"))
    for name in sorted(generated if verbose else (), key=lambda name: not name.startswith("modeling")):
        yield console.line((f"\n{name}", "bold"))
        yield console.source(files[name], "python")


def _count_bytes(text: str) -> str:
    return f"{len(text.encode()):,}"


def differences(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[RenderableType]:
    """Shows what differs between two directories, section by section."""
    show = {"configuration": _show_values, "code": _show_code, "modules": _show_modules, "tensors": _show_tensors}
    show |= {"figures": _show_figures, "files": _show_others}
    for section, entries in found.items():
        counted = f"{len(entries)} difference{'s' if len(entries) > 1 else ''}" if entries else "the same"
        yield console.line((section, "bold"), f": {counted}")
        yield from show[section](entries)


def _show_values(entries: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    for entry in entries:
        sides = [repr(entry[side]) for side in ("old", "new")]
        written = {"changed": " → ".join(sides), "removed": sides[0], "added": sides[1]}[entry["change"]]
        yield console.line("  ", _MARKS[entry["change"]], f" {entry['name']}: {written}")


def _show_code(entries: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Shows the changed lines; of a file that only one side has, their number."""
    for entry in entries:
        lines = entry["text"].splitlines()
        more, less = (sum(1 for line in lines[2:] if line.startswith(mark)) for mark in "+-")
        yield console.line("  ", _MARKS[entry["change"]], f" {entry['name']}: +{more} -{less} lines")
        if entry["change"] == "changed":
            yield console.source("\n".join(lines[2:]), "diff", indent=6)


def _show_modules(entries: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        written = " → ".join(entry[side] for side in ("old", "new") if entry[side])
        groups.setdefault((entry["change"], anatomy.fold([entry["name"]])[0], written), []).append(entry["name"])
    for (change, _, written), names in groups.items():
        yield console.line("  ", _MARKS[change], f" {_write_pattern(names)}: {written}{_write_times(names)}")


def _show_tensors(entries: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for entry in entries:
        sides = [f"{entry[f'{s}_dtype']} {entry[f'{s}_shape']}" for s in ("old", "new") if f"{s}_dtype" in entry]
        written = " → ".join(dict.fromkeys(sides))
        groups.setdefault((entry["change"], anatomy.fold([entry["name"]])[0], written), []).append(entry)
    for (change, _, written), each in groups.items():
        names, apart = [entry["name"] for entry in each], ""
        if "max_abs" in each[0]:
            largest, relative = (max(_read_number(entry[key]) for entry in each) for key in ("max_abs", "relative"))
            apart = f", differs by up to {largest:.2g} (relative norm {relative:.2g})"
        yield console.line("  ", _MARKS[change], f" {_write_pattern(names)}: {written}{_write_times(names)}{apart}")


def _read_number(value: float | None) -> float:
    return float("inf") if value is None else value


def _show_figures(entries: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    for entry in entries:
        sides = [f"{entry[side]:,}" for side in ("old", "new") if entry[side] is not None]
        yield console.line("  ", _MARKS[entry["change"]], f" {entry['name']}: {' → '.join(sides)}")


def _show_others(entries: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    yield from (console.line("  ", _MARKS[entry["change"]], f" {entry['name']}") for entry in entries)


def _write_times(names: Sequence[str]) -> str:
    return f" x {_write_numbers(names)}" if len(names) > 1 else ""


def report(document: Mapping[str, Any], *, verbose: bool) -> Iterator[RenderableType]:
    """Shows findings as a table, from the plain values of a report; what was proved is a line for each stage.

    What failed, what was measured and what was not looked at have lines of their own always; `verbose`, all have.
    """
    stages = {stage: [Finding.of(each) for each in listed] for stage, listed in document["stages"].items()}
    rows = [row for stage, found in stages.items() for row in _make_rows(stage, found, verbose)]
    yield console.table(document["subject"], ("stage", "promise", "verdict", "evidence"), rows)
    verdicts = [each.verdict for found in stages.values() for each in found]
    folded = "" if verbose or len(rows) == len(verdicts) else " (--verbose shows each proof)"
    yield tell({word: verdicts.count(word) for word in VERDICTS}) + folded
    if document.get("finished") is False:
        yield "not finished: the run was stopped before its last stage"
    for key, value in document["measured"].items():
        if isinstance(value, float):
            yield f"{key}: {value:.4f}"


def _make_rows(stage: str, found: Sequence[Finding], verbose: bool) -> Iterator[tuple[str | Text, ...]]:
    """Makes the rows of a stage; several that are proved are one, which counts them and names the first."""
    proved = [each.name for each in found if each.verdict == PROVED]
    folds = not verbose and len(proved) > 1
    if folds:
        names = textwrap.shorten(_join_names(proved), _NAMED, placeholder=" …")
        yield stage, f"{len(proved)} promises", console.line(label_of(PROVED)), names
    for each in found if verbose else fold(found):
        if not folds or each.verdict != PROVED:
            yield stage, each.name, console.line(label_of(each.verdict)), each.evidence
