"""Which adapters can stand on one model: what one trains in full, another may not train a part of."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from solidify.adapter import lookup, tokens
from solidify.errors import AdapterError, refuse
from solidify.upstream.peft import layer_adapters


def refuse_overlaps(
    model: PeftModel, lora: Sequence[str], modules: Sequence[str], single: Sequence[str], rows: Sequence[str] = ()
) -> None:
    """Refuses a further adapter that trains a part of what another trains in full, or the other way round.

    PEFT copies a module that is trained in full with all that stands in it, other adapters' updates too, and finds
    nothing inside any more. `lora` names targets, `modules` are trained in full, `single` are parameters, and of `rows`
    rows are.

    Raises:
        AdapterError: two adapters overlap like that; all faults together.
    """
    faults = []
    for adapter in model.peft_config:
        theirs = lookup.full_modules(model, adapter)
        inside = [*lora, *modules, *single, *rows]
        faults += [
            f"{name} lies in {outer}, which adapter {adapter!r} trains in full"
            for outer in sorted(theirs)
            for name in inside
            if name.startswith(outer + ".") or (name == outer and name in (*lora, *rows))
        ]
        alone = tokens.trained(model, adapter)
        faults += [
            f"of {name} adapter {adapter!r} trains single rows"
            for name in [*lora, *modules, *(each.removesuffix(".weight") for each in single)]
            if name in alone
        ]
        held = lookup.trained_parameters(model)
        parts = [*targets(model, adapter), *theirs, *(held.names(adapter) if held is not None else ())]
        faults += [
            f"{outer} would be trained in full, and adapter {adapter!r} trains {name} in it"
            for outer in modules
            for name in dict.fromkeys(parts)
            if name.startswith(outer + ".") or (name == outer and name not in theirs)
        ]
    refuse(
        AdapterError,
        "the adapters cannot stand on one model (let both train the same modules, or load each on a model of its own)",
        faults,
    )


def targets(model: PeftModel, adapter: str) -> list[str]:
    """Names the targets of an adapter's low-rank updates."""
    return sorted(
        {
            name
            for path, module in model.named_modules()
            if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)
            if adapter in layer_adapters(module)
            for name in [lookup.canonical(model, path)]
        }
    )
