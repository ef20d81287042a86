"""How much of a model is looked at, and where what is made for it waits: one value, chosen by size, or given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from solidify.model import anatomy, probing
from solidify.model.probing import Inputs
from solidify.weights import spilling


@dataclass(frozen=True)
class Extent:
    """`whole`: everything is run, copied and compared. Otherwise bounded: memory holds about one module at a time.

    Of a bounded model the first module of each kind is run, every tensor is digested where it stands in its file, and
    samples of its values are compared after a reload. New tensors go to files in `spill` at once (None: they stay in
    memory). What a finding says of a bounded model is `measured` and not `proved`, where it looked at a sample.
    """

    whole: bool
    spill: Path | None = None

    @classmethod
    def of(cls, module: nn.Module, spill: Path | None = None) -> Extent:
        """Chooses by the bytes of the parameters: bounded from `anatomy.LARGE` on."""
        return cls(anatomy.size(module) < anatomy.LARGE, spill)

    @classmethod
    def given(cls, extent: Extent | None, model: nn.Module) -> Extent:
        """Returns what was handed down; else chooses, with a directory that is removed when a bounded model goes."""
        if extent is not None:
            return extent
        found = cls.of(model)
        return found if found.whole or anatomy.is_meta(model) else cls(False, spilling.directory_for(model))

    def inputs(self, model: PreTrainedModel) -> Inputs:
        """Makes inputs to try the model with; few tokens for a bounded one.

        Raises:
            SurgeryError: no inputs can be made up that the model accepts.
        """
        return probing.probe_inputs(model) if self.whole else probing.few_inputs(model)

    def sample(self, names: Sequence[str], first: Sequence[str]) -> tuple[str, ...]:
        """Returns which modules are run: all of the names, or the `first` of each kind."""
        return tuple(names if self.whole else first)

    def __str__(self) -> str:
        if self.whole:
            return "whole: every module is run, every tensor compared"
        return "bounded: the first module of each kind is run, every tensor digested, samples compared after a reload"
