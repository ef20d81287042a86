"""Which adapters can stand on one model: each has a name, and what one trains in full, another trains no part of."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from solidify.adapter import lookup, tokens
from solidify.errors import AdapterError, refuse
from solidify.upstream.peft import layer_adapters, wrapped_adapters


def refuse_taken(model: nn.Module, name: str) -> None:
    """Refuses a model that cannot take an adapter of this name.

    Raises:
        AdapterError: it has one of that name, or it is the plain model inside a PeftModel, which knows the adapters.
    """
    existing = lookup.peft_model(model)
    if existing is None:
        if held := _find_held(model):
            raise AdapterError(
                f"the model is the plain one inside a PeftModel (of the adapter {', '.join(map(repr, sorted(held)))}), "
                "which alone knows what stands on it; give the PeftModel that `attach` or `load_adapter` returned"
            )
    elif name in existing.peft_config:
        raise AdapterError(f"the model already has an adapter {name!r}; give the new one another name")


def _find_held(model: nn.Module) -> set[str]:
    """Names the adapters of which a module of a model has a part."""
    found: set[str] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            found |= {*layer_adapters(module)}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found |= {*wrapped_adapters(module)}
    return found


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
