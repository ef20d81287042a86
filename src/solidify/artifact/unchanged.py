"""A model that comes to be built without an edit: what was done to it otherwise, and the way that leads on."""

from __future__ import annotations

from transformers import PreTrainedModel

from solidify.artifact import loading
from solidify.system import foreign

_SHOWN = 3


def words(model: PreTrainedModel) -> str:
    """Says why nothing can be built without an edit, and what to do with this model instead."""
    plain = foreign.attempt(loading.on_meta, type(model), model.config).value
    expected = {} if plain is None else {name: type(module) for name, module in plain.named_modules()}
    patched = [
        f"{type(module).__name__} at {name}"
        for name, module in model.named_modules()
        if plain is not None
        and type(module) is not expected.get(name)
        and all(expected.get(outer) is type(model.get_submodule(outer)) for outer in _list_outer(name))
    ]
    if patched:
        more = f" and {len(patched) - _SHOWN} more" if len(patched) > _SHOWN else ""
        return (
            f"there are none, but {', '.join(patched[:_SHOWN])}{more} that {type(model).__name__} does not put there; "
            "a change made by hand cannot be built again: load the base again, make the change by solidify.replace "
            "(insert, remove, add), and pass the edits that these return; or let solidify.from_patched(base, model) "
            "find what differs, and build that"
        )
    return (
        f"there are none, and all modules are those of a plain {type(model).__name__}; change it by solidify.replace "
        "(insert, remove, add) and pass the edits that these return. A model that was only trained or resized needs no "
        "artifact: save it and its tokenizer with save_pretrained; that directory is a base for solidify.build, attach "
        "and recipes as it is"
    )


def _list_outer(name: str) -> list[str]:
    """Returns the names of the modules that hold a module, the model itself first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts))]
