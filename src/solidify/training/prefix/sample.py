"""Which of the reads of frozen layers are computed again, how a call is held to be run again, and when none is found.

What the code of frozen layers may read never ends, so digests do not know all of it: a sample of what is read is
computed plainly in its place, and compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from solidify.behaviour.calling import put_training_modes, training_modes
from solidify.training.prefix.key import gradient_modes
from solidify.training.prefix.state import accelerator, odd_kind

# One of 97 reads costs 1 per cent of the passes that are spared. A prime, so that with any number of batches in an
# epoch another batch is compared each time.
EVERY = 97
EPOCHS = 8  # whose first reads are all compared
APART = 48  # reads since the last comparison, from which on later epochs' first reads are: so they cost 2 per cent
_CHANGES = 16  # states of the layers, none of which came again, until nothing is kept any more


@dataclass
class _Counted:
    """Reads of one kind of call: the first of an epoch, how many epochs and reads there were, and how many since one
    was compared."""

    first: str = ""
    epochs: int = 0
    reads: int = 0
    since: int = 0


@dataclass
class Sample:
    """Chooses reads of one prefix: one in `EVERY`, the first of each of `EPOCHS` epochs, and of later epochs the first
    if `APART` reads have passed since one was chosen."""

    _kinds: dict[str, _Counted] = field(default_factory=dict)

    def choose(self, kind: str, key: str) -> bool:
        """Counts a read of a kind of call, and returns whether it is to be compared.

        An epoch begins where the first key that was read comes again.
        """
        found = self._kinds.setdefault(kind, _Counted())
        found.first = found.first or key
        begins = found.first == key
        chosen = found.reads % EVERY == 0 or (begins and (found.epochs < EPOCHS or found.since >= APART))
        found.epochs, found.reads = found.epochs + begins, found.reads + 1
        found.since = 1 if chosen else found.since + 1
        return chosen

    def note_miss(self, kind: str) -> None:
        """Notes a pass that found nothing: the layers may be others now, and the first key of an epoch another."""
        if kind in self._kinds:
            self._kinds[kind].first = ""


class Misses:
    """Passes that found nothing since the last that did: states of the layers, and batches that came again."""

    def __init__(self) -> None:
        self._states: set[str] = set()
        self._given: set[str] = set()
        self._again = 0

    def note(self, hit: bool, state: str, given: str) -> bool:
        """Notes a pass; returns whether layers change so often that nothing will ever be found."""
        if hit:
            self._states, self._again = set(), 0
        else:
            self._states.add(state)
            self._again += given in self._given
        self._given.add(given)
        return len(self._states) >= _CHANGES or self._again > max(_CHANGES, len(self._given))


class HeldCall:
    """One call of a model, with the modes and the precision in which it was run.

    What it was given is copied: a loop may write the next batch into the same tensors.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._run, self._args, self._kwargs = run, _copy_given(args), _copy_given(kwargs)
        self._training = training_modes(model.modules())
        self._graph, self._inference = gradient_modes()
        kinds = dict.fromkeys([(accelerator() or torch.device("cpu")).type, "cpu"])
        self._precision = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self.passes = 0  # through prefixes, of which each ends once
        self.reads = 0  # that were not compared

    @contextmanager
    def surrounded(self) -> Iterator[tuple[Callable[..., Any], Any, Any]]:
        """Yields the call, its arguments and its named arguments, in the modes in which it was run."""
        now = training_modes(module for module, _ in self._training)
        with ExitStack() as stack:
            stack.callback(put_training_modes, now)
            put_training_modes(self._training)
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._graph))
            for kind, enabled, dtype in self._precision:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield self._run, self._args, self._kwargs


def _copy_given(value: Any) -> Any:
    """Copies the tensors in arguments; what is in an object of another kind stays."""
    if isinstance(value, torch.Tensor):
        return value if odd_kind(value) else value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(map(_copy_given, value))
    return {key: _copy_given(each) for key, each in value.items()} if type(value) is dict else value
