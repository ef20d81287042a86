"""One prefix in a running model: what is done where its layers, and what holds their list, are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from solidify.adapter import lookup
from solidify.behaviour.calling import RandomStates, random_states
from solidify.errors import ObjectiveError
from solidify.system import console
from solidify.training.prefix.key import Known, LayerDigests, count_writes, describe, flatten, has_history, surroundings
from solidify.training.prefix.sample import Misses, Sample
from solidify.training.prefix.state import name_moved, odd_kind
from solidify.training.prefix.store import Kept, Returned, Store
from solidify.training.prefix.told import hook_fault
from solidify.weights import format, hashing

_WHOLE = 256  # passes that are read until all tensors are read whole again
_GRAPH = (
    "builds a graph, because the embeddings ask for gradients (activation checkpointing has them do so); set "
    "activation_checkpointing (gradient_checkpointing) to false: what is read needs no activations"
)
PLAIN, TRIAL, TWICE, USED, AGAIN = "plain", "trial", "twice", "used", "again"


class Compared(BaseException):
    """Ends a pass through the model that is run again, once what it was run for is compared."""


@dataclass
class Run:
    """What all prefixes of a model share: the way in which it runs, random states at its beginning, counts of passes.

    Ways: `PLAIN`; `TRIAL`: plainly, and what layers return is kept; `TWICE`: likewise, and compared with what the trial
    kept; `USED`: from what is kept; `AGAIN`: plainly, and compared with what was read, until `until` passes ended.

    `kind` is the kind of the call, where what is read of it is sampled, and `every` says that all of it is compared.
    `place` says in words where the training is, and `agreed` where it was when what was read was last compared.
    """

    store: Store
    way: str = PLAIN
    random: RandomStates = field(default_factory=random_states)
    computed: int = 0
    read: int = 0
    compared: int = 0
    kind: str = ""
    every: bool = False
    unseen: int = 0  # reads of this call that were not compared
    ended: int = 0  # passes of this call that came to the last layer
    until: int = 0
    place: Callable[[], str] | None = None
    agreed: str = ""

    def begin(self, way: str, kind: str) -> None:
        """Begins a call of the model."""
        self.way, self.kind, self.random, self.unseen, self.ended = way, kind, random_states(), 0, 0

    def tell_place(self) -> str:
        """Returns where the training is: a step of its trainer, or how much was read."""
        return f"read {self.read}" if self.place is None else self.place()


@dataclass
class _Pass:
    """One call of what holds the layers: what it was given, and where it is."""

    given: Any
    next: int = 0
    last: torch.Tensor | None = None
    writes: int = 0  # to that, when it was returned
    key: str = ""
    asked: bool = False  # whether the first layer was given what asks for gradients
    layers: Any = None
    kept: Kept | None = None
    sampled: Kept | None = None  # what is kept, where the layers are run all the same, and compared with it
    known: Known = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)  # digests of what each layer is given beside hidden states


class Stack:
    """The layers of one prefix, and what holds their list."""

    def __init__(self, run: Run, model: nn.Module, name: str, frozen: int) -> None:
        located, holder = lookup.at(model, name), lookup.at(model, name.rpartition(".")[0])
        assert located is not None and holder is not None
        self.run, self.name, self.owner = run, name, holder.inner
        listed: Any = located.inner
        self.layers: list[nn.Module] = list(listed)[:frozen]
        self.begin_run(taken=False)
        self._forms: dict[int, Returned] = {}
        self._pass: _Pass | None = None
        self.tried: dict[str, Kept] = {}  # what a trial kept
        self.stopped, self._said = False, False
        self._misses, self._sample = Misses(), Sample()
        self._digests = LayerDigests(self.layers)

    def begin_run(self, *, taken: bool) -> None:
        """Forgets what the last run of the model found; `taken` says whether layers may be skipped in this one."""
        self.taken, self.called, self.hit, self.refused = taken, False, False, False
        self.faults: list[str] = []

    def around(self, own: Any) -> Callable[..., Any]:
        """Returns a forward of what holds the layers, as it is called from within the model's own."""
        return lambda *args, **kwargs: self.run_owner(own, args, kwargs)

    def run_owner(self, own: Any, args: Any, kwargs: Any) -> Any:
        """Begins a pass through the layers, and ends it."""
        if self.run.way is PLAIN or not self.taken or (self.stopped and self.run.way is not AGAIN):
            return own(*args, **kwargs)
        if not self._is_in_place():
            return own(*args, **kwargs)
        now = self._pass = _Pass(None)
        self.called, self.hit = True, False
        now.given = self._describe(f"what holds {self.name}", (args, kwargs), now.known)
        try:
            output = own(*args, **kwargs)
        finally:
            self._pass = None
        if now.kept is not None and now.next < len(self.layers):
            raise ObjectiveError(
                f"cache_prefix: a pass left out {self.name}.{now.next} and what follows it, which are skipped, so what "
                "they return was not read; leave cache_prefix out"
            )
        return output

    def _is_in_place(self) -> bool:
        """Returns whether the list still begins with the layers; says once that it does not."""
        listed: Any = getattr(self.owner, self.name.rpartition(".")[2])
        same = [*map(id, self.layers)] == [*map(id, listed)][: len(self.layers)]
        if not same and not self._said:
            self._said = True
            console.words.print(
                f"cache_prefix: {self.name} holds other layers than when cache_prefix began, and is run plainly "
                "as long as it does"
            )
        return same

    def make_step(self, number: int) -> Callable[..., Any]:
        """Returns what is done where a layer is called."""

        def step(own: Any, args: Any, kwargs: Any) -> Any:
            """Runs the layer, or hands on what it is given, or what it returned for this batch."""
            now = self._pass
            if now is None or self.faults:
                return own(*args, **kwargs)
            hidden = args[0] if args else kwargs.get("hidden_states")
            self._look(now, number, hidden, (args, kwargs))
            if number == 0 and not self.faults:
                self._begin(now, (args, kwargs))
            if not self.faults:
                self._compare_arguments(now, number, args, kwargs)
            if now.kept is not None and not self.faults:
                output = self._skip(now, number, hidden)
            else:
                written = self._count_given(number, hidden, (args, kwargs))
                output = own(*args, **kwargs)
                if not self.faults and any(count_writes(tensor) != count for tensor, count in written):
                    self._refuse_writing(now, number)
                if not self.faults:
                    self._note(now, number, output)
            now.next, now.last = number + 1, output[0] if isinstance(output, tuple) and output else output
            now.writes = count_writes(now.last) if isinstance(now.last, torch.Tensor) else 0
            if number == len(self.layers) - 1:
                self._end_pass()
            return output

        return step

    def _look(self, now: _Pass, number: int, hidden: Any, given: Any) -> None:
        """Finds what forbids skipping a layer: its place, and what it is given."""
        fault = ""
        if not isinstance(hidden, torch.Tensor) or number != now.next or (number and hidden is not now.last):
            fault = "is not called once, in its place, with what the layer before it returned"
        elif number and count_writes(hidden) != now.writes:
            fault = "is given what the layer before it returned, and what was written to in between"
        elif any(has_history(tensor) for _, tensor in flatten("", given)):
            fault = "is given something that depends on what learns (trained embeddings, for one)"
        elif any(parameter.requires_grad for parameter in self.layers[number].parameters()):
            fault = "learns by now"
        else:
            fault = next((each for each in map(hook_fault, self.layers[number].modules()) if each), "")
        if fault and self.run.way is AGAIN:
            self.faults.append(fault)  # what may be seen ends no training behind its last read
        elif fault:
            self._fault(fault, number)

    def _count_given(self, number: int, hidden: Any, given: Any) -> list[tuple[torch.Tensor, int]]:
        """Returns what a layer is given and others may read too, and how often each was written to."""
        own = hidden if number else None  # which the layer before it returned
        return [(tensor, count_writes(tensor)) for _, tensor in flatten("", given) if tensor is not own]

    def _refuse_writing(self, now: _Pass, number: int) -> None:
        """Keeps nothing of a pass in which a layer wrote into what others may read; refuses one that was kept."""
        if self.run.way is USED and now.sampled is None:
            now.key = ""
        else:
            self._fault("writes into what it is given (a mask, positions), which other layers may read", number)

    def _begin(self, now: _Pass, given: Any) -> None:
        """Finds the key, and what is kept under it."""
        described = self._describe(f"{self.name}.0", given, now.known)
        if self.faults:
            return
        now.asked = any(tensor.requires_grad for _, tensor in flatten("", given))
        now.layers = self._digests.values()
        place = [self.name, len(self.layers), surroundings(self.owner)]
        asked = [tensor.requires_grad for _, tensor in flatten("", given)]
        state, came = hashing.digest_values([place, now.layers]), hashing.digest_values([now.given, described, asked])
        now.key = hashing.digest_values([state, came])
        device = next((tensor.device for _, tensor in flatten("", given)), torch.device("cpu"))
        if self.run.way is AGAIN:
            now.sampled, now.key = self.run.store.get(now.key, device), ""
        if self.run.way is not USED:
            return
        now.kept = self.run.store.get(now.key, device)
        self.hit = now.kept is not None and all(number in self._forms for number in range(len(self.layers)))
        now.kept = now.kept if self.hit else None
        self.run.read += self.hit
        if self.hit and self.run.read % _WHOLE == 0:
            self.refuse_written()
        if self._misses.note(self.hit, state, came):
            self._stop_keeping(now)
        if self.run.kind:
            self._choose(now)

    def _choose(self, now: _Pass) -> None:
        """Has the layers run all the same, where what is read of this pass is to be compared."""
        if not self.hit:
            self._sample.note_miss(self.run.kind)
        elif self._sample.choose(self.run.kind, now.key) or self.run.every:
            now.sampled, now.kept = now.kept, None
        else:
            self.run.unseen += 1

    def _end_pass(self) -> None:
        self.run.ended += 1
        if self.run.way is AGAIN and self.run.ended == self.run.until:
            raise Compared

    def _stop_keeping(self, now: _Pass) -> None:
        """Keeps nothing of this pass and of later ones, and says so."""
        self.stopped, now.key = True, ""
        console.words.print(
            f"cache_prefix: nothing of {self.name} is kept any more: the frozen layers (an attribute, a buffer, or a "
            "setting of theirs) change so often that no pass finds what an earlier one left"
        )

    def refuse_written(self) -> None:
        """Raises ObjectiveError where a tensor of the layers was written to unnoticed; what is kept is removed then."""
        try:
            self._digests.refuse_written(self.name)
        except ObjectiveError:
            self._remove_kept()
            raise

    def _compare_arguments(self, now: _Pass, number: int, args: Any, kwargs: Any) -> None:
        """Notes what a layer is given beside hidden states (masks, positions), or compares it with what is kept."""
        given = args[1:] if args else {key: value for key, value in kwargs.items() if key != "hidden_states"}
        described = self._describe(f"{self.name}.{number}", (given, kwargs if args else {}), now.known)
        now.arguments.append(hashing.digest_values(described))
        kept = now.kept or now.sampled
        if kept is not None and kept.arguments[number : number + 1] != now.arguments[number:]:
            raise ObjectiveError(
                f"cache_prefix: {self.name}.{number} is given other arguments (a mask, or rotary positions) than when "
                "the same batch was computed, so what is kept of it is not what the layers would return"
            )

    def _skip(self, now: _Pass, number: int, hidden: torch.Tensor) -> Any:
        assert now.kept is not None
        if number < len(self.layers) - 1:
            return self._forms[number].passing(hidden)
        returned = now.kept.returned
        if torch.is_grad_enabled() and hidden.requires_grad:  # a leaf, for activation checkpointing
            returned.parts[0].requires_grad_()  # type: ignore[union-attr]
        return returned.output()

    def _note(self, now: _Pass, number: int, output: Any) -> None:
        """Notes the form of an output; keeps that of the last layer."""
        returned = Returned.of(output)
        if returned is None:
            self._fault(f"returns {_name_output(output)}, which is no plain tensor and no tuple of them", number)
            return
        if any(has_history(part) for part in returned.tensors()):
            self._fault(
                _GRAPH if now.asked else "returns something that depends on what learns, which is no part of it", number
            )
            return
        empty = tuple(None if part is None else torch.empty(0) for part in returned.parts)
        self._forms[number] = Returned(empty, returned.alone)
        for part in returned.tensors()[0 if returned.alone else 1 :]:
            now.known[id(part)] = repr(None), part  # which is what it is where the layer is skipped
        if number < len(self.layers) - 1 or not (now.key or now.sampled):
            return
        if now.layers != self._digests.values():
            self._fault("or one before it has attributes or buffers that change in every pass", number)
            return
        if moved := name_moved(self.run.random, random_states()):
            self._fault(f"or one before it draws random numbers of {moved} (dropout, for one)", number)
        elif now.sampled is not None:
            self._compare_sampled(now.sampled, returned)
        elif any(tensor.isnan().any() for tensor in returned.tensors() if tensor.is_floating_point()):
            self.refused = True
        else:
            self._keep(now.key, Kept(returned, now.arguments))

    def _keep(self, key: str, found: Kept) -> None:
        returned = found.returned
        if self.run.way is TWICE:
            self._compare_trials(key, found)
            return
        known = None
        if self.run.way is TRIAL:
            self.tried, known = {key: found}, self.run.store.get(key, returned.tensors()[0].device)
        if known is not None and not (known.returned.equals(returned) and known.arguments == found.arguments):
            raise ObjectiveError(
                f"cache_prefix: what is kept in {self.run.store.directory} is not what {self.name} returns here for "
                "the same batch; remove that directory"
            )
        if known is None:
            self.run.store.put(key, found)
        self.run.computed += 1

    def _compare_trials(self, key: str, found: Kept) -> None:
        """Compares what two plain passes over one batch return; another key is told where the passes are compared."""
        before = self.tried.get(key)
        if before is not None and not before.returned.equals(found.returned):
            self.run.store.drop(key)
            raise ObjectiveError(
                f"cache_prefix: {self.name} returns something else when one batch is run twice from the same random "
                "states (it draws random numbers of its own, or counts its passes), so nothing of it can be kept"
            )

    def _compare_sampled(self, read: Kept, returned: Returned) -> None:
        """Compares what was read with what the layers return; what is kept is removed where the two differ.

        Raises:
            ObjectiveError: they differ.
        """
        if read.returned.equals(returned):
            self.run.compared, self.run.agreed = self.run.compared + 1, self.run.tell_place()
            return
        self.refuse_written()  # which would be why
        self._remove_kept()
        raise ObjectiveError(
            f"cache_prefix: {self.name} (its first {len(self.layers)} layers) returns something else than what was "
            "read for the same batch, so something was changed unseen that these layers depend on (a function of a "
            "library, the environment, a file); what was trained or evaluated since "
            f"{self.run.agreed or 'the first batch'}, where both were last found equal, may rest on stale activations: "
            "train without cache_prefix"
        )

    def _remove_kept(self) -> None:
        self.run.store.forget()
        self.run.store.remove()

    def _fault(self, what: str, number: int) -> None:
        """Notes a fault of the trial; later, raises it.

        Raises:
            ObjectiveError: a pass that was proved to be cacheable is so no more.
        """
        fault = f"{self.name}.{number} {what}"
        if self.run.way is not TRIAL:
            raise ObjectiveError(f"cache_prefix: {fault}")
        self.faults.append(fault)

    def _describe(self, where: str, value: Any, known: Known) -> Any:
        try:
            return describe(value, known)
        except TypeError as error:
            fault = f"{where} is given {error}, of which nothing can be told before it is used"
            fault += "; set use_cache to false" if str(error).endswith("Cache") else ""
            if self.run.way not in (TRIAL, AGAIN):
                raise ObjectiveError(f"cache_prefix: {fault}") from error
            self.faults.append(fault)
            return None


def _name_output(output: Any) -> str:
    """Returns what kind of thing a layer returned, for a sentence."""
    for part in output if isinstance(output, tuple) else (output,):
        if type(part) is torch.Tensor:
            what = odd_kind(part) or (f"a tensor of {part.dtype}" if part.dtype not in format.DTYPES.values() else "")
        else:
            what = type(part).__name__ if part is not None else ""
        if what:
            return what
    return type(output).__name__
