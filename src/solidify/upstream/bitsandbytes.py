"""What of bitsandbytes has no documentation and is used here: one attribute of its layers of four bits.

`TESTED` is the minor version that it was read and tried in. Nothing is imported: the layers are recognised by it.
"""

from __future__ import annotations

from torch import nn

TESTED = "0.50"
REPACKS = "support_avx512bf16_for_cpu"  # of `Linear4bit`, bitsandbytes/nn/modules.py


def keep_as_quantized(model: nn.Module) -> None:
    """Has layers of four bits keep the numbers that they were quantised to.

    On a CPU with AVX512-BF16 the first pass in evaluation packs a weight anew, in place, and rounds its scales to
    bfloat16: the model then computes something else than before, in training and on any other machine.
    """
    for module in model.modules():
        if getattr(module, REPACKS, False):
            setattr(module, REPACKS, False)
