"""A frozen prefix: layers that learn nothing are computed once for each batch, and read from disk when it recurs.

The first layers of a list in which nothing learns return the same numbers in every epoch for the same batch. Here they
are kept (`store.py`) under a digest of all that decides them, and the layers are skipped when the batch comes
again: all but the last hand on what they are given, and the last returns what it returned. All else of the model runs
as it does. The first batch is run plainly twice, and without the layers: all outputs must have the same bits. Of what
is read later a sample is computed again (`sample.py`): what differs ends the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from solidify.adapter import lookup
from solidify.errors import ObjectiveError, refuse
from solidify.objective.capture import unseen
from solidify.system import console, foreign
from solidify.training.prefix.key import flatten, name_kind
from solidify.training.prefix.sample import HeldCall
from solidify.training.prefix.stack import AGAIN, PLAIN, TRIAL, TWICE, USED, Compared, Run, Stack
from solidify.training.prefix.state import State
from solidify.training.prefix.store import Store
from solidify.training.prefix.told import BEFORE, hook_fault
from solidify.upstream.torch import is_dropout
from solidify.weights.format import same_bits

_WHY = {
    "router_logits": "routers of layers that are skipped return nothing; leave output_router_logits out",
    "aux_loss": "routers of layers that are skipped return nothing; leave output_router_logits out",
    "hidden_states": "hidden states of layers that are skipped are asked for; leave output_hidden_states out",
    "attentions": "attentions of layers that are skipped are asked for; leave output_attentions out",
}
_KINDS = 32  # of calls that are run both ways
_OTHERWISE = "layers behind the prefix read something of it beside its output"


@dataclass(frozen=True)
class Prefix:
    """The first `frozen` of a list's `total` layers, in which nothing learns; `reason` says what ends it."""

    name: str
    frozen: int
    total: int
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.frozen} of {self.total} layers of {self.name}"


def find_prefixes(model: nn.Module, captured: Sequence[str] = ()) -> list[Prefix]:
    """Returns of every outermost list of layers how many at its beginning learn nothing and are not looked into.

    `captured` are names of modules that terms look at; hooks that stand on modules already are found by themselves. The
    model may be on the meta device.
    """
    found: list[Prefix] = []
    learning = _name_learning(model)
    for located in lookup.modules(model):
        inside = any(located.name.startswith(f"{prefix.name}.") for prefix in found)
        if not isinstance(located.inner, nn.ModuleList) or inside or not len(located.inner):
            continue
        reasons = (
            _end_prefix(f"{located.name}.{n}", layer, learning, captured) for n, layer in enumerate(located.inner)
        )
        frozen, reason = next(((n, why) for n, why in enumerate(reasons) if why), (len(located.inner), ""))
        found.append(Prefix(located.name, frozen, len(located.inner), reason))
    return found


def refuse_none(found: Sequence[Prefix]) -> list[Prefix]:
    """Returns the prefixes that have layers.

    Raises:
        ObjectiveError: none has.
    """
    usable = [prefix for prefix in found if prefix.frozen]
    if not usable:
        reasons = "; ".join(prefix.reason for prefix in found) or "the model has no list of layers"
        raise ObjectiveError(f"cache_prefix: there is no frozen layer to be computed once: {reasons}")
    return usable


def _name_learning(model: nn.Module) -> set[str]:
    """Returns whose parameters are trained, by names of the plain model, whatever holds their trained versions."""
    adapted = lookup.peft_model(model)
    if adapted is None:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for _, name, parameter in lookup.named_parameters(adapted) if parameter.requires_grad}


def _end_prefix(name: str, layer: nn.Module, learning: set[str], captured: Sequence[str]) -> str:
    """Returns why a layer is in no prefix; empty where it may be."""
    inside = [each for each in sorted(learning) if f"{each}.".startswith(f"{name}.")]
    inside += [f"{name}.{each}" for each, parameter in layer.named_parameters() if parameter.requires_grad]
    if inside:
        return f"{inside[0]} learns"
    seen = [each for each in captured if f"{each}.".startswith(f"{name}.")]
    if seen:
        return f"a term looks at {seen[0]}"
    for path, module in layer.named_modules():
        full = f"{name}.{path}" if path else name
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return f"{full} is adapted by PEFT"
        if is_dropout(module) and module.p:
            return f"{full} drops out at random (p={module.p})"
        if fault := hook_fault(module):
            return f"{full} {fault}"
    return ""


@contextmanager
def cache_prefix(model: nn.Module, directory: str | Path, *, keep: bool = False) -> Iterator[CachedPrefix]:
    """While the block lasts, computes frozen layers at the beginning of a model once for each batch; in place.

    `model` may be wrapped by PEFT, with its adapter attached. What the layers return is kept in a `directory` of its
    own, which is removed at the end, unless the block ends by an error, or `keep` says otherwise (then the next block
    finds it), or another training uses it. A batch recurs where the same rows come together, in a batch of the same
    shape.

    The first batch that is trained on is run plainly twice, and from what is kept; until then, and for calls of another
    kind until their first batch was (an evaluation), nothing is kept. A sample of the batches that are read
    (`sample.py`), and at the end of the block the last one, are computed all the same, and compared.

    Raises:
        ObjectiveError: no layer can be skipped, or there is anything else in the directory, or skipping changes the
            model's outputs, or the layers were changed unnoticed, or return something else than what was read; it says
            why.
    """
    usable = refuse_none(find_prefixes(model))
    store = Store(Path(directory))
    cached = CachedPrefix(model, usable, store)
    store.hold()
    cached.install()
    try:
        yield cached
        cached.compare_last()
        cached.refuse_written()
    except BaseException:
        with suppress(ObjectiveError):  # the error at hand is told; what was kept under a false key is gone
            cached.refuse_written()
        raise
    else:
        if not keep:
            store.remove()
    finally:
        cached.uninstall()
        store.release()


class _Forward:
    """What stands in the place of a module's forward; a deep copy of the module, or what is read from a pickle of it,
    has the forward that the module had before. A shallow copy has this one, as it has the module's parameters."""

    def __init__(self, module: nn.Module, before: Any, own: Any, call: Callable[..., Any]) -> None:
        update_wrapper(self, own)
        self._module, self._call = module, call
        vars(self)[BEFORE] = before  # which is what the module's attributes are told to be

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module's own forward, or not."""
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Says what a copy is made of: the method of the copied module, or what its attribute was."""
        before = vars(self)[BEFORE]
        return (getattr, (self._module, "forward")) if before is None else (partial, (before,))


class CachedPrefix:
    """A model whose frozen layers are skipped, those of its `prefixes`."""

    def __init__(self, model: nn.Module, prefixes: Sequence[Prefix], store: Store) -> None:
        self.model, self.prefixes = lookup.plain_model(model), list(prefixes)
        self.run = Run(store)
        self._stacks = [Stack(self.run, model, prefix.name, prefix.frozen) for prefix in prefixes]
        self._proved: dict[str, list[Stack]] = {}
        self._held: dict[str, HeldCall] = {}  # the last call of each kind, where what it read is not compared
        self.left_out = 0  # last batches that could not be compared
        self._plain_said = False
        self._forwards: list[tuple[nn.Module, Any, Any]] = []

    @property
    def computed(self) -> int:
        """How many passes through a prefix were computed and kept."""
        return self.run.computed

    @property
    def read(self) -> int:
        """How many were read instead, those that were compared among them."""
        return self.run.read

    @property
    def compared(self) -> int:
        """How many of those that were read were computed all the same, or again, and had the same bits."""
        return self.run.compared

    def install(self) -> None:
        """Puts its own forward before those of the model, the modules that hold the layers, and the layers."""
        self._put_forward(self.model, self._run_model)
        for stack in self._stacks:
            if stack.owner is not self.model:
                self._put_forward(stack.owner, stack.run_owner)
            for number, layer in enumerate(stack.layers):
                self._put_forward(layer, stack.make_step(number))

    def place_in(self, place: Callable[[], str]) -> None:
        """Takes what says in words where the training is, for what is told of the last comparison."""
        self.run.place = place

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Has all that is read in the block computed all the same, and compared."""
        self.run.every = True
        try:
            yield
        finally:
            self.run.every = False

    def compare_last(self) -> None:
        """Runs the last batch of each kind of call that was read again, up to the end of its prefixes, and compares.

        Random states, buffers and attributes are what they were afterwards. A batch is left out, which is said, where
        the layers are others by now in what is looked at (a setting, an attribute, a hook).

        Raises:
            ObjectiveError: the layers return something else than what was read.
        """
        calls, self._held = self._held, {}
        for kind, call in calls.items():
            before, wanted = State(self.model), self.run.compared + call.reads
            words = "cache_prefix: the last batch that was read does not run again"
            with call.surrounded() as (run, args, kwargs), unseen(), foreign.calling(words, ObjectiveError):
                if self._name_kind(args, kwargs) == kind:
                    self.run.until = call.passes
                    with suppress(Compared):
                        self._run_as(AGAIN, self._proved[kind], run, args, kwargs)
            before.put_back()
            if self.run.compared < wanted:
                self._note_left_out()

    def _note_left_out(self) -> None:
        self.left_out += 1
        if self.left_out == 1:
            console.words.print(
                "cache_prefix: a last batch that was read could not be computed again: settings, layers or what is "
                "kept are others by now; whether something unseen had changed since "
                f"{self.run.agreed or 'the first batch'} is not known"
            )

    def refuse_written(self) -> None:
        """Raises ObjectiveError where a tensor of the skipped layers was written to unnoticed; reads all of them."""
        for stack in self._stacks:
            stack.refuse_written()

    def uninstall(self) -> None:
        """Takes them off; where something else was put around one in between, that stays, and does nothing."""
        self.run.way = PLAIN
        self._proved, self._held = {}, {}
        for module, before, ours in reversed(self._forwards):
            if vars(module).get("forward") is ours:
                del module.forward
                vars(module).update({"forward": before} if before is not None else {})
        self._stacks, self._forwards = [], []

    def _put_forward(self, module: nn.Module, step: Callable[..., Any]) -> None:
        before, own = vars(module).get("forward"), module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            return step(own, args, kwargs) if self._stacks else own(*args, **kwargs)

        forward = vars(module)["forward"] = _Forward(module, before, own, call)
        self._forwards.append((module, before, forward))

    def _run_model(self, own: Any, args: Any, kwargs: Any) -> Any:
        """Runs the whole model: the first call of a kind both ways, later ones from what is kept."""
        run = own
        for stack in self._stacks:  # the model holds the layers itself
            if stack.owner is self.model:
                run = stack.around(run)
        if self.run.way is not PLAIN:
            return run(*args, **kwargs)
        kind = self._name_kind(args, kwargs)
        if kind in self._proved:
            return self._run_used(kind, run, args, kwargs)
        if not self._proved and not (self.model.training and torch.is_grad_enabled()):
            return run(*args, **kwargs)
        if len(self._proved) >= _KINDS:
            self._say_plain()
            return run(*args, **kwargs)
        return self._prove(kind, run, args, kwargs)

    def _name_kind(self, args: Any, kwargs: Any) -> str:
        return name_kind([self.model, *(stack.owner for stack in self._stacks)], args, kwargs)

    def _say_plain(self) -> None:
        if not self._plain_said:
            self._plain_said = True
            console.words.print(
                f"cache_prefix: {_KINDS} kinds of call were compared, and others run plainly: an attribute or a "
                "setting of the model, or an argument that is no tensor, changes again and again"
            )

    def _run_used(self, kind: str, run: Any, args: Any, kwargs: Any) -> Any:
        """Runs a call from what is kept, and holds it where what it read is not compared."""
        call, read = HeldCall(self.model, run, args, kwargs), self.run.read
        output = self._run_as(USED, self._proved[kind], run, args, kwargs, kind=kind)
        if self.run.read > read:
            self._held.pop(kind, None)
        if self.run.unseen:
            call.passes, call.reads, self._held[kind] = self.run.ended, self.run.unseen, call
        return output

    def _run_as(self, way: str, stacks: Sequence[Stack], run: Any, args: Any, kwargs: Any, kind: str = "") -> Any:
        for stack in self._stacks:
            stack.begin_run(taken=stack in stacks)
        self.run.begin(way, kind)
        try:
            return run(*args, **kwargs)
        finally:
            self.run.way = PLAIN

    def _prove(self, kind: str, run: Any, args: Any, kwargs: Any) -> Any:
        """Runs a batch plainly, again plainly, and from what that leaves; returns the first outputs.

        Raises:
            ObjectiveError: the layers return something else the second time, or the model without them does; or, of
                the first kind of call, nothing can be kept.
        """
        before = State(self.model)
        plain = self._run_as(TRIAL, self._stacks, run, args, kwargs)
        if any(stack.refused for stack in self._stacks):
            return plain  # this batch is not kept (it has a NaN): the next one tells
        usable = [stack for stack in self._stacks if stack.called and not stack.faults]
        if not usable and not self._proved:
            faults = [fault for stack in self._stacks for fault in stack.faults[:1] or [f"{stack.name} is not called"]]
            refuse(ObjectiveError, "cache_prefix: no layer can be computed once", faults)
        if usable:
            after, read = State(self.model), self.run.read
            before.put_back()
            with unseen(), foreign.calling("cache_prefix: one batch does not run twice", ObjectiveError):
                self._run_as(TWICE, usable, run, args, kwargs)
            before.put_back()
            words = "cache_prefix: the model does not run without its prefix"
            with unseen(), foreign.calling(words, ObjectiveError, remedy=_OTHERWISE):
                again = self._run_as(USED, usable, run, args, kwargs)
            after.put_back()
            self.run.read = read
            self._compare(plain, again, usable)
        self._proved[kind] = usable
        return plain

    def _compare(self, plain: Any, again: Any, usable: Sequence[Stack]) -> None:
        missed = [stack.name for stack in usable if not stack.hit]
        if missed:
            raise ObjectiveError(
                f"cache_prefix: the prefix of {', '.join(missed)} is not called alike twice for one batch (one of its "
                "attributes or buffers changes in every pass), so nothing of it can be kept"
            )
        one, other = dict(flatten("", plain)), dict(flatten("", again))
        differing = [
            key for key in {**one, **other} if not (key in one and key in other and same_bits(one[key], other[key]))
        ]
        if differing:
            names = ", ".join(differing[:4])
            why = next((why for key, why in _WHY.items() if any(each.split(".")[0] == key for each in differing)), "")
            raise ObjectiveError(
                f"cache_prefix: without the prefix the model returns another {names} for the first batch: "
                f"{why or _OTHERWISE}"
            )
