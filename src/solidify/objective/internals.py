"""Where an observation's hidden states, its head and its reference come from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.adapter import lookup
from solidify.adapter.adapters import switched_off
from solidify.behaviour import calling
from solidify.errors import ObjectiveError, refuse
from solidify.model import anatomy
from solidify.objective.capture import Capture, Recorder
from solidify.objective.objective import Objective
from solidify.objective.observation import MakesLogits, ReferenceObservation
from solidify.upstream.transformers_training import LOSS_MAPPING, ForCausalLMLoss

DECODER = ("", "decoder")  # how the keys begin under which the decoder's output is captured

_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")  # what a decoder reads, as transformers calls it
_KEEP = "logits_to_keep"  # how transformers' causal models are told for how many positions to build logits


class Head:
    """Makes logits (n, vocab_size) of rows (n, hidden_size) that the decoder returned, by the model's own forward pass.

    The decoder is replaced by one that returns the rows, so whatever the model does around its head (a bias, a scale, a
    soft cap, LoRA) is done here too.
    """

    def __init__(
        self, model: nn.Module, decoder: nn.Module, output: Any, recorder: Recorder[Any] | None = None
    ) -> None:
        plain: Any = lookup.plain_model(model)
        self._plain = plain
        self._kind = type(output)
        self._recorder = recorder
        embeddings = plain.get_output_embeddings()
        self._decoder = decoder
        self._dtypes = {parameter.dtype for parameter in embeddings.parameters()} if embeddings is not None else set()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Maps hidden states (n, hidden_size) to logits (n, vocab_size)."""
        given = self._kind(last_hidden_state=rows[None])
        if encodes_and_decodes(self._plain):
            asked = {"encoder_outputs": given}  # so that no encoder runs
        else:
            asked = {"input_ids": torch.zeros(1, len(rows), dtype=torch.long, device=rows.device)}
        with (
            _return_output(self._decoder, given),
            self._match_autocast(rows),
            self._recorder.paused() if self._recorder else nullcontext(),
        ):
            logits: torch.Tensor = self._plain.forward(**asked).logits
        return logits[0]

    def _match_autocast(self, rows: torch.Tensor) -> AbstractContextManager[Any]:
        """A pass under autocast leaves rows in half precision for a head in float32, or the other way round."""
        mixed = {rows.dtype, *self._dtypes}
        half = next((dtype for dtype in mixed if dtype in (torch.bfloat16, torch.float16)), None)
        return torch.autocast(rows.device.type, half) if half is not None and len(mixed) > 1 else nullcontext()


@contextmanager
def _return_output(module: nn.Module, output: Any) -> Iterator[None]:
    """Lets a module return `output` for as long as the block lasts."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def decoders_of(model: nn.Module) -> list[nn.Module]:
    """Returns what may end where a model's head begins, the outermost first.

    That is the model's `base_model`; some heads (OPT) call a part of it, their `get_decoder()`, directly.

    Raises:
        ObjectiveError: the model has no such part.
    """
    plain = lookup.plain_model(model)
    found: list[nn.Module] = []
    if isinstance(plain, PreTrainedModel):
        found = [part for part in (plain.base_model, plain.get_decoder()) if part is not None and part is not plain]
    if not found:
        raise ObjectiveError(
            f"a term asks for hidden_states, but {type(plain).__name__} has no decoder apart from its head; capture "
            "the module that returns them"
        )
    return list(dict.fromkeys(found))


def decoder_captures(model: nn.Module) -> dict[Any, Capture]:
    """Returns what captures the decoder's output: `decoder_output` finds it in what was seen."""
    names = {id(located.inner): located.name for located in lookup.modules(model)}
    return {(*DECODER, n): Capture(modules=names[id(part)]) for n, part in enumerate(decoders_of(model))}


def decoder_output(model: nn.Module, seen: Mapping[Any, Any]) -> tuple[nn.Module, Any] | None:
    """Returns the outermost decoder that ran, and what it returned; None where none was looked at."""
    parts = [(part, seen.get((*DECODER, n))) for n, part in enumerate(decoders_of(model))] if is_seen(seen) else []
    return next(((part, next(iter(outputs.values()))) for part, outputs in parts if outputs), None)


def is_seen(seen: Mapping[Any, Any]) -> bool:
    """Returns whether the decoder was looked at."""
    return any(is_decoder(key) for key in seen)


def is_decoder(key: Any) -> bool:
    """Returns whether a key of what was seen means the decoder, and not a term's word."""
    return isinstance(key, tuple) and key[: len(DECODER)] == DECODER


def without_loss(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns inputs with which a model computes no loss of its own: without labels.

    An encoder-decoder makes what its decoder reads of the labels: it is made here, by the model's own method; of a
    family that has none (Whisper), the labels stay, and what it returns beside its outputs is not used.
    """
    plain: Any = lookup.plain_model(model)
    kept = {key: value for key, value in inputs.items() if key != "labels"}
    labels = inputs.get("labels")
    if not encodes_and_decodes(plain) or labels is None or any(kept.get(key) is not None for key in _DECODED):
        return kept
    make = getattr(plain, "prepare_decoder_input_ids_from_labels", None)
    return {**kept, "decoder_input_ids": make(labels=labels)} if make is not None else {**kept, "labels": labels}


def without_logits(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns inputs with which a model builds logits of one position only, where it can be told so, and no loss."""
    plain: Any = lookup.plain_model(model)
    kept = without_loss(model, inputs)
    return {**kept, _KEEP: 1} if _KEEP in calling.takes(plain) else kept


def encodes_and_decodes(model: nn.Module) -> bool:
    """Returns whether a decoder of the model reads what an encoder of it made of the inputs."""
    return bool(getattr(getattr(lookup.plain_model(model), "config", None), "is_encoder_decoder", False))


def shifts_labels(model: nn.Module) -> bool:
    """Returns whether a position's label stands at the next one, as in decoders, and not where it is predicted.

    A model that names a causal loss (`loss_type`), or none (GPT-2, whose default that is), shifts where its class calls
    `loss_function`; those that compute theirs themselves (BART's decoder, XLNet) do not.
    """
    plain = lookup.plain_model(model)
    named = LOSS_MAPPING.get(getattr(plain, "loss_type", None), ForCausalLMLoss)
    return named is ForCausalLMLoss and not encodes_and_decodes(plain) and _calls_loss_function(type(plain))


def _calls_loss_function(kind: type[nn.Module]) -> bool:
    """Reads a class's forward; one that is not transformers' may shift by hand, and one without source is believed."""
    family = next((cls for cls in kind.__mro__ if "forward" in vars(cls)), kind)
    try:
        source = inspect.getsource(vars(family)["forward"])
    except (KeyError, OSError, TypeError):
        return True
    by_hand = not family.__module__.startswith("transformers.") and ("shift" in source or "[..., 1:]" in source)
    return by_hand or "loss_function" in source or "loss" not in source


class Reference:
    """The unmodified base (the change switched off where that is exact), or the objective's second model."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        self._objective = objective
        self._own = objective.reference is None
        self.model: nn.Module = model if objective.reference is None else objective.reference
        wanted: dict[Any, Capture] = dict(objective.reference_captures)
        if objective.asks_for("reference_hidden_states", "reference_head"):
            wanted |= decoder_captures(self.model)
        if self._own:
            refuse_inexact_bypass(model)
        elif objective.reference is not None:
            if objective.asks_for("reference_logits", "reference_head"):
                refuse_other_vocabulary(model, objective.reference)
            objective.reference.requires_grad_(False)
        self._wanted = wanted

    def run(self, inputs: Mapping[str, Any], recorder: Recorder[Any]) -> ReferenceObservation:
        """Runs the reference once and returns what terms may see of it; `recorder` is the trained model's."""
        device = next((value.device for value in inputs.values() if isinstance(value, torch.Tensor)), None)
        if not self._own and device not in (None, next(self.model.parameters()).device):
            self.model.to(device)
        logits_asked = self._objective.asks_for("reference_logits")
        given = (without_loss if logits_asked else without_logits)(self.model, inputs)
        with torch.no_grad(), anatomy.evaluation(self.model), recorder.paused(), self._switch_off():
            own: Recorder[Any] = Recorder(self.model, self._wanted)  # what stands at a name may differ, switched off
            try:
                with own.recording() as seen:
                    output = self.model(**given)
            finally:
                own.remove()
        part, states = decoder_output(self.model, seen) or (None, None)
        return ReferenceObservation(
            captured={key: value for key, value in seen.items() if not is_decoder(key)},
            logits=output.logits if logits_asked else None,
            hidden_states=states[0] if states is not None else None,
            head=self._make_quiet(Head(self.model, part, states)) if part is not None else None,
        )

    def _make_quiet(self, head: Head) -> MakesLogits:
        def call(rows: torch.Tensor) -> torch.Tensor:
            """Makes the reference's logits, without a graph."""
            with torch.no_grad(), anatomy.evaluation(self.model), self._switch_off():
                return head(rows)

        return call

    @contextmanager
    def _switch_off(self) -> Iterator[None]:
        if not self._own:
            yield
            return
        with switched_off(self.model):
            yield


def refuse_inexact_bypass(model: nn.Module) -> None:
    """Raises ObjectiveError unless switching the change off gives exactly the base model."""
    surgery = getattr(lookup.plain_model(model).config, "surgery", None) or []
    names = sorted({edit.get("class", "the layers") for edit in surgery if not edit.get("bypass")})
    refuse(
        ObjectiveError,
        "the base model cannot be had by switching the change off; pass the base as Objective(..., reference=model)",
        [f"switching {name} off is not exact (it has no exact `bypass`)" for name in names],
    )


def refuse_other_vocabulary(model: nn.Module, reference: nn.Module) -> None:
    """Raises ObjectiveError if both say how large their vocabularies are, and they differ."""
    ours, theirs = _read_vocabulary(model), _read_vocabulary(reference)
    if ours is not None and theirs is not None and ours != theirs:
        raise ObjectiveError(
            f"the model's vocabulary has {ours} tokens and the reference's {theirs}, and a term compares what both say "
            "next; take a reference with the model's tokenizer"
        )


def _read_vocabulary(model: nn.Module) -> int | None:
    configuration: Any = getattr(lookup.plain_model(model), "config", None)
    text = configuration.get_text_config() if isinstance(configuration, PreTrainedConfig) else None
    return getattr(text, "vocab_size", None)
