"""`report.html`: what a run did, on one page that needs nothing beside it, on a phone too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from solidify.adapter import lookup
from solidify.artifact import autos, companions, sources
from solidify.artifact.inspection import Branch
from solidify.directory import manifest, packages
from solidify.findings import PROVED, Report, fold
from solidify.healing import plots
from solidify.recipe import charts, datasets
from solidify.recipe.dry_run import Plan
from solidify.recipe.schema import Recipe
from solidify.system import console, foreign, processes

_COSTS = {
    "parameters": ("parameters", console.amount),
    "bytes": ("on disk", console.size),
    "memory": ("in memory, loaded", console.size),
    "flops_per_token": ("matrix FLOPs per {unit}", console.amount),
}
_PROMPT_TOKENS, _NEW_TOKENS, _LARGEST = 16, 32, 2**31  # of a sample; bytes of a model that is asked for one
_SAMPLES = 2


def write(recipe: Recipe, directory: Path, report: Report) -> str:
    """Returns the page of a run."""
    measured = report.measured
    return sources.render(
        "report.html.jinja",
        report=report,
        recipe=recipe.document(),
        versions=packages.current_versions(),
        plots=plots.of(measured),
        curves=charts.of_history(measured.get("history") or []),
        costs=_list_costs(measured.get("model")),
        tree=_compare_trees(measured.get("model")),
        samples=measured.get("samples") or [],
        unproved=[(s, each) for s, found in report.stages.items() for each in fold(found) if each.verdict != PROVED],
        results=_list_results(directory),
    )


def describe(planned: Plan) -> dict[str, Any]:
    """Returns what the page shows of the models before and after, from a plan: costs and trees of modules."""
    trees = {when: [_list_branch(each) for each in branches] for when, branches in planned.modules.items()}
    trained = sum(planned.trainable.values())
    return {"before": planned.before, "after": planned.after, "trees": trees, "trained": trained}


def _list_branch(branch: Branch) -> list[Any]:
    where = f" ({branch.where})" if branch.where else ""
    return [branch.name, branch.kind, f"{branch.times}{where}", branch.parameters]


def _list_costs(model: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    if not model:
        return []
    before, after = model["before"], model["after"]
    return [
        (label.format(unit=after["unit"]), show(before[key]), show(after[key]), _write_change(before[key], after[key]))
        for key, (label, show) in _COSTS.items()
        if key != "flops_per_token" or after["unit"] != "position"  # of convolutions, which are not counted
    ]


def _write_change(before: float, after: float) -> str:
    if before == after:
        return "the same"
    return f"{'+' if after > before else '−'}{console.share(abs(after - before), before)}"  # noqa: RUF001


def _compare_trees(model: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the rows of both trees in one, in order: what is only before, only after, or in both.

    Equal layers are one row, so a change of some regroups the rest: a module that stood there before is not new.
    """
    if not model or not model.get("trees"):
        return []
    before, after = ({tuple(row[:3]): row[3] for row in model["trees"][when]} for when in ("before", "after"))
    known, standing = {_each(row, size) for row, size in before.items()}, {row[:2] for row in after}
    alone = [Counter(row[:2] for row in tree) for tree in (before, after)]
    former = {row[:2]: row[2] for row in before}

    def make_later(row: tuple[Any, ...]) -> dict[str, Any]:
        """Makes a row of the tree after, of modules that stand otherwise, or not at all, in the one before."""
        if _each(row, after[row]) not in known:
            return _make_row(row, "new", after[row])
        only = all(count[row[:2]] == 1 for count in alone)
        return _make_row((*row[:2], f"{former[row[:2]]} → {row[2]}" if only else row[2]), "", after[row])

    names, rows, seen = list(after), list[dict[str, Any]](), 0
    for row, parameters in before.items():
        if row in after:
            upto = names.index(row)
            rows += [make_later(new) for new in names[seen:upto] if new not in before]
            seen = max(seen, upto + 1)
            rows.append(_make_row(row, "", parameters, after[row]))
        elif row[:2] not in standing:
            rows.append(_make_row(row, "gone", parameters))
    return rows + [make_later(new) for new in names[seen:] if new not in before]


def _each(row: tuple[Any, ...], parameters: int) -> tuple[Any, ...]:
    """Returns the name and class of a row, and the parameters of one of its modules."""
    return (*row[:2], parameters / int(row[2].split()[0]))


def _make_row(row: tuple[Any, ...], change: str, *parameters: int) -> dict[str, Any]:
    """Makes a row; of what is in both trees the parameters before and after, where they differ."""
    name, kind, times = row
    amounts = list(dict.fromkeys(console.amount(number) if number else "" for number in parameters))
    return {
        "depth": name.count("."),
        "name": name.rpartition(".")[2],
        "full": name,
        "kind": kind,
        "times": "" if times == "1" else times,
        "parameters": " → ".join(amounts),
        "change": change,
    }


def _list_results(directory: Path) -> list[dict[str, Any]]:
    """Returns the models of a run that can be loaded, the one to use first, and how."""
    found = []
    for name in ("merged", "heal/merged", "heal/artifact", "artifact"):
        where = directory / name
        if (where / manifest.NAME).is_file():
            auto = autos.auto_class(where)
            writes = auto == "AutoModelForCausalLM" and companions.has_tokenizer(where)
            chats = writes and (where / "chat_template.jinja").is_file()
            found.append({"name": str(where), "auto": auto, "generates": writes, "chats": chats})
    return found


def take_samples(recipe: Recipe, processor: Any, model: Any) -> list[dict[str, str]]:
    """Has a trained model go on from the starts of some held-out texts, without its adapter and with it, greedily.

    Returns nothing of a model that does not write, is too large to be asked, or fails at it: samples are shown, and
    prove nothing.
    """
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    size = sum(parameter.nbytes for parameter in model.parameters())
    writes = isinstance(tokenizer, PreTrainedTokenizerBase) and model.can_generate()
    if not writes or size > _LARGEST or processes.is_spread(model):
        return []
    training = model.training
    made = foreign.attempt(_sample, recipe, tokenizer, model.eval(), processor)
    model.train(training)
    return made.value or []


def _sample(recipe: Recipe, tokenizer: Any, model: Any, processor: Any) -> list[dict[str, str]]:
    training, held_out = datasets.make_examples(recipe, processor, lookup.plain_model(model))
    examples = held_out if held_out is not None else training
    samples = []
    for number in range(min(_SAMPLES, len(examples))):
        ids = list(examples[number]["input_ids"])[:_PROMPT_TOKENS]
        sample = {"prompt": _tidy(tokenizer.decode(ids, skip_special_tokens=True))}
        with model.disable_adapter():
            sample["before"] = _go_on(model, tokenizer, ids)
        sample["after"] = _go_on(model, tokenizer, ids)
        samples.append(sample)
    return samples


def _go_on(model: Any, tokenizer: Any, ids: Sequence[int]) -> str:
    tokens = torch.tensor([ids], device=model.device)
    settings = {"max_new_tokens": _NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        made = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)
    return _tidy(tokenizer.decode(made[0][len(ids) :], skip_special_tokens=True))


def _tidy(text: str) -> str:
    """Returns a text without empty lines, of which a model that is hardly trained writes nothing but."""
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) or "(nothing but space)"
