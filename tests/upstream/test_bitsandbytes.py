"""bitsandbytes packs weights anew on some CPUs, and leaves that where it is told to."""

from __future__ import annotations

import inspect

import installed
import torch
from bitsandbytes import nn as layers

from solidify.upstream import bitsandbytes as seams


def test_it_is_the_version_that_was_read() -> None:
    installed.same_minor("bitsandbytes", seams.TESTED)


def test_one_attribute_decides_whether_a_weight_is_packed_anew() -> None:
    assert f"self.{seams.REPACKS} = has_avx512bf16()" in inspect.getsource(layers.Linear4bit.__init__)
    forward = inspect.getsource(layers.Linear4bit.forward)
    assert f"and self.{seams.REPACKS}" in forward
    assert forward.count("_convert_weight_packed_for_cpu(") == 1


def test_a_pass_in_evaluation_leaves_a_weight_as_it_is() -> None:
    """Also on a CPU that could do it otherwise, and pretended on one that could not."""
    layer = layers.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer.to("cpu").eval()
    setattr(layer, seams.REPACKS, True)
    seams.keep_as_quantized(torch.nn.Sequential(layer))
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer(torch.randn(2, 64))
    assert torch.equal(layer.weight.data, before)
