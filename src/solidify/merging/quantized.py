"""How far a merged model is from what was trained, where that was an adapter on a quantised base.

The adapter learned beside the errors of the packed weights, and the merge is made onto the weights that these were made
of. So merged and trained model differ by what quantisation does: that is measured on inputs, and never called a proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from solidify.artifact import quantizing
from solidify.errors import ModelError, SolidifyError
from solidify.findings import Finding
from solidify.model import answers, probing
from solidify.system import foreign

NAME = "merged against trained (quantised base)"
AGAIN = "merged, quantised the same way, against trained"


def findings(
    quantization: str,
    inputs: Mapping[str, probing.Inputs],
    merged: PreTrainedModel,
    attach: Callable[[Any], PeftModel],
    load: Callable[[Any], PreTrainedModel],
) -> list[Finding]:
    """Runs the model that was trained, the merged one, and the merged one quantised, and says how far apart they are.

    `quantization` is what the adapter recorded. `attach` loads base and adapter, and `load` the merged model, with a
    quantization config of transformers.
    """
    try:
        config = quantizing.again(quantization)
        quantizing.require_library(config)
    except ModelError as error:
        return [Finding.unseen(name, str(error)) for name in (NAME, AGAIN)]
    word = quantizing.describe(config)
    try:
        with foreign.calling(f"the base cannot be loaded as {word}", ModelError):
            trained = answers.collect(attach(config), inputs).tensors
    except SolidifyError as error:
        return [Finding.unseen(name, str(error)) for name in (NAME, AGAIN)]
    found = [_measure(NAME, word, trained, answers.collect(merged, inputs).tensors)]
    del merged
    try:
        with foreign.calling(f"the merged model cannot be loaded as {word}", ModelError):
            packed = answers.collect(load(quantizing.again(quantization)), inputs).tensors
    except SolidifyError as error:
        return [*found, Finding.unseen(AGAIN, str(error))]
    return [*found, _measure(AGAIN, word, trained, packed)]


def not_looked_at(why: str) -> list[Finding]:
    """Says that neither was measured, and why."""
    return [Finding.unseen(name, why) for name in (NAME, AGAIN)]


def _measure(name: str, word: str, trained: answers.Answers, found: answers.Answers) -> Finding:
    off = {key: answers.distance(tensor, found[key]) for key, tensor in trained.items() if key in found}
    if not off:
        return Finding.unseen(name, "the two return no output of the same name")
    worst = max(off, key=lambda key: off[key])
    return Finding(
        name,
        None,
        f"trained on {word} weights, merged onto the unquantised ones: of {len(off)} outputs {worst} differs most, by "
        f"{off[worst]:.1e} of its size"
        if name == NAME
        else f"as {word}: of {len(off)} outputs {worst} differs most, by {off[worst]:.1e} of its size",
    )
