"""transformers' Trainer and TRL's SFTTrainer with an objective: one override of each seam, the same for both.

The model's own loss is scaled as the trainer scales it; all other terms as `objective.py` derives. In evaluation only
the model's own loss counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from solidify.adapter import standing
from solidify.adapter.adapters import switched_off, trained_state
from solidify.errors import AdapterError, ObjectiveError
from solidify.model import anatomy
from solidify.objective.capture import capture
from solidify.objective.memory import Stateful
from solidify.objective.objective import Counts, Objective, Window
from solidify.tuning import checkpoints

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Batch:
    """What is known of a micro-batch: Trainer's number of items in the window, its own counts, the window's."""

    items: torch.Tensor | int | None
    counts: Counts
    window: Window


class _ObjectiveMixin:
    """What both trainers share.

    `loss_is_scaled_for_ga` is transformers' own switch: the loss is already scaled. `fingerprint` is written into
    checkpoints, to tell later whose they are.
    """

    loss_is_scaled_for_ga = True
    fingerprint = ""

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._window: Window | None = None
        self._unmeasured: list[dict[str, Any]] = []
        self._parts: dict[str, list[float]] = {}
        self._steps_since_log = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._aux_weight = 0.0
        self._model_divides: bool | None = None
        self.history: list[dict[str, float]] = []
        self._refuse_unusable()
        # Each process loaded the same file: sent to the others, its weights would be written over a mapping of it, and
        # so be copied into memory.
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)  # type: ignore[no-untyped-call]
        self._narrow = widen(self.model)
        self.add_callback(_AfterStep(self))  # type: ignore[attr-defined]

    args: TrainingArguments
    model: Any
    accelerator: Any
    state: TrainerState
    label_names: list[str]

    def _refuse_unusable(self) -> None:
        if self.args.label_smoothing_factor:
            raise ObjectiveError("label smoothing replaces the model's own loss; write it as a term instead")
        checkpointing = self.args.activation_checkpointing_kwargs or {}
        if self.objective.captures and self.args.activation_checkpointing and checkpointing.get("use_reentrant"):
            raise ObjectiveError(
                "a term looks inside the model, but reentrant activation checkpointing cuts the graph there; set "
                "activation_checkpointing_kwargs: {use_reentrant: false}"
            )
        for spec in self.objective.captures.values():
            spec.find(self.model)
        if self.args.fsdp and (holder := standing.trained_parameters(self.model)) is not None:
            names = ", ".join(dict.fromkeys(name for adapter in holder.trained for name in holder.names(adapter)))
            raise AdapterError(f"fsdp shards modules, but {names} are trained as single parameters; name their modules")
        autocast = self.args.bf16 or self.args.fp16
        half = [n for n, p in self.model.named_parameters() if p.requires_grad and p.dtype in _HALF]
        if half and not autocast:
            raise ObjectiveError(
                f"{len(half)} tensors would be trained in half precision ({half[0]}), where small updates are "
                "lost to rounding; set bf16: true, and they are kept in float32 while they train"
            )
        if self.objective.asks_for("reference_logits") and self.objective.reference is None:
            refuse_inexact_bypass(self.model)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetches one step's micro-batches, counts them, and keeps them where a term needs their means first.

        The means are taken when the step begins: a resumed training restores its random numbers after the fetching.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if batches:
            self._window = self._measure(batches)
            if (len(batches) > 1 or self._window.ranks > 1) and any(t.needs_prepass for t in self.objective.terms):
                self._unmeasured = batches
        return batches, items

    def _counts(self, batch: dict[str, Any]) -> Counts:
        labels = batch.get("labels")
        main = next((batch[k] for k in ("input_ids", "inputs_embeds", "pixel_values") if k in batch), labels)
        if main is None:
            raise ObjectiveError(f"the batch holds no inputs that could be counted, only: {', '.join(batch)}")
        shifted = labels[..., 1:] if labels is not None and self._loss_shifts_labels else labels
        mask = batch.get("attention_mask")
        tokens = main.shape[0] * (main.shape[1] if main.ndim > 1 else 1)
        return Counts(
            float((shifted != -100).sum()) if shifted is not None else float(tokens),
            float(mask.sum()) if mask is not None and mask.ndim == 2 else float(tokens),
            float(main.shape[0]),
        )

    _loss_shifts_labels: bool

    def _measure(self, batches: list[dict[str, Any]]) -> Window:
        counts = [self._counts(batch) for batch in batches]
        local = torch.tensor(
            [[c.target_tokens, c.attended_tokens, c.sequences] for c in counts],
            dtype=torch.float64 if self.args.device.type != "mps" else torch.float32,
            device=self.args.device,
        ).sum(0)
        target, attended, sequences = self._over_ranks(local).tolist()
        return Window(len(batches), target, attended, sequences, self.accelerator.num_processes)

    def _over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        total: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        return total

    def _prepass(self, batches: list[dict[str, Any]], window: Window) -> None:
        """Takes the window's means without a graph, on the same random numbers that the real pass will draw."""
        terms = [term for term in self.objective.terms if term.needs_prepass]
        sums: dict[str, torch.Tensor] = {}
        self.model.train()
        with torch.random.fork_rng(), torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            for batch in batches:
                inputs = self._prepare_inputs(batch)  # type: ignore[attr-defined]
                with capture(self.model, self.objective.captures) as captured:
                    self.model(**{k: v for k, v in inputs.items() if k != "labels"})
                supply = self._supply(inputs, captured, None)
                for term in terms:
                    value = term.call(supply).detach()
                    sums[term.name] = sums[term.name] + value if term.name in sums else value
        for name, total in sums.items():
            window.means[name] = self._over_ranks(total) / max(window.attended_tokens, 1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the scaled objective in training, the model's own loss otherwise."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        inputs = dict(inputs)
        counts = self._counts(inputs)
        window = self._window or Window(1, counts.target_tokens, counts.attended_tokens, counts.sequences)
        if self._unmeasured:
            batches, self._unmeasured = self._unmeasured, []
            self._prepass(batches, window)
        wants_outputs = return_outputs or self.objective.asks_for("outputs", "logits")
        if self._model_divides is None and counts.target_tokens and "labels" in inputs:
            self._model_divides, self._aux_weight = _how_the_model_scales(self, inputs, counts)
        with capture(model, self.objective.captures) as captured:
            loss, outputs = self._model_loss(model, inputs, wants_outputs, Batch(num_items_in_batch, counts, window))
        supply = self._supply(inputs, captured, outputs)
        total = torch.zeros((), device=loss.device)
        for term in self.objective.terms:
            part = term.part(supply, counts, window, loss)
            if part is not None:
                total = total + part.loss
                sums = self._parts.setdefault(term.name, [0.0, 0.0])
                sums[0] += part.value
                sums[1] += part.weighted
            if term.acts:
                value = term.call(supply).detach()
                self._sums[term.name] = self._sums[term.name] + value if term.name in self._sums else value
        return (total, outputs) if return_outputs else total

    def _model_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        wants_outputs: bool,
        batch: Batch,
    ) -> tuple[torch.Tensor, Any]:
        raise NotImplementedError

    def _supply(
        self, inputs: dict[str, Any], captured: dict[tuple[str, str], dict[str, Any]], outputs: Any
    ) -> dict[Any, Any]:
        """Gathers what terms may ask for; the reference runs only when one does."""
        mask = inputs.get("attention_mask")
        tokens = inputs.get("input_ids", inputs.get("labels"))
        if mask is None or mask.ndim != 2:
            mask = torch.ones_like(tokens) if tokens is not None else None
        supply: dict[Any, Any] = {
            "model": self.model,
            "inputs": inputs,
            "labels": inputs.get("labels"),
            "attention_mask": inputs.get("attention_mask"),
            "mask": mask.reshape(-1) if mask is not None else None,
            "outputs": outputs,
            "logits": outputs["logits"] if outputs is not None and "logits" in outputs else None,
            **captured,
        }
        if outputs is not None and self.objective.asks_for("reference_logits"):
            supply["reference_logits"] = self._reference_logits(inputs)
        return supply

    def _reference_logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        model = self.objective.reference or self.model
        plain = {k: v for k, v in inputs.items() if k not in ("labels", "num_items_in_batch")}
        with torch.no_grad(), anatomy.evaluation(model):
            if self.objective.reference is not None:
                logits = model(**plain).logits
            else:
                with switched_off(model):
                    logits = model(**plain).logits
        result: torch.Tensor = logits
        return result

    def settle(self) -> None:
        """Gives what was trained in float32 under autocast the dtype of the model it belongs to."""
        for tensor, dtype in self._narrow:
            tensor.data = tensor.data.to(dtype)
        self._narrow = []

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds every term's mean per step since the last log, as it is (`term/name`) and weighted (`weighted/name`)."""
        if "loss" in logs and self._steps_since_log:
            for name, (value, weighted) in self._parts.items():
                pair = torch.tensor([value, weighted], dtype=torch.float32, device=self.args.device)
                pair = self._over_ranks(pair) / self.accelerator.num_processes / self._steps_since_log
                logs[f"term/{name}"], logs[f"weighted/{name}"] = pair.tolist()
            self._parts, self._steps_since_log = {}, 0
            self.history.append(dict(logs))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes what transformers does not know of first: it writes its counters last and then drops older ones."""
        if self.args.should_save:
            target = checkpoints.place(self._get_output_dir(trial=trial), self.state.global_step)  # type: ignore[attr-defined]
            checkpoints.write(target, self._remembered())
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as transformers does, but gathers only what is trained where it would gather the whole base."""
        peft_model = standing.peft_model(self.model)
        if not self.is_fsdp_enabled or peft_model is None:  # type: ignore[attr-defined]
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        self._save(output_dir, state_dict=trained_state(peft_model))  # type: ignore[attr-defined]

    def _remembered(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "scaling": (self._model_divides, self._aux_weight),
            "history": self.history,
            "terms": {term.name: term.state_dict() for term in self.objective.terms},
            "callbacks": {type(callback).__name__: callback.state_dict() for callback in self._stateful_callbacks()},
            "buffers": checkpoints.buffers(self.model),
        }

    def _stateful_callbacks(self) -> list[Any]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, Stateful)]  # type: ignore[attr-defined]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Takes back all that is not in the model, which transformers has loaded by now."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        remembered = checkpoints.read(Path(checkpoint))
        self._model_divides, self._aux_weight = remembered["scaling"]
        self.history = remembered["history"]
        for term in self.objective.terms:
            term.load_state_dict(remembered["terms"].get(term.name, {}))
        for callback in self._stateful_callbacks():
            if type(callback).__name__ in remembered["callbacks"]:
                callback.load_state_dict(remembered["callbacks"][type(callback).__name__])
        held = dict(self.model.named_buffers())
        for path, buffer in remembered["buffers"].items():
            held[path].copy_(buffer)

    def forget_window(self) -> None:
        """Drops what was counted for a step that was computed but not taken."""
        self._window, self._unmeasured, self._parts, self._sums = None, [], {}, {}

    def after_step(self) -> None:
        """Lets terms act on the finished step's means."""
        self._steps_since_log += 1
        window, self._window = self._window, None
        sums, self._sums = self._sums, {}
        if window is not None and self.args.include_num_input_tokens_seen == "no":  # else transformers counts them
            self.state.num_input_tokens_seen += int(window.attended_tokens)
        for term in self.objective.terms:
            if term.acts and term.name in sums and window is not None:
                means = self._over_ranks(sums[term.name]) / max(window.attended_tokens, 1)
                term.subject.after_step(self.model, means, self.state.global_step, self.state.max_steps)


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: _ObjectiveMixin) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Lets terms act."""
        self.trainer.after_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Brings back the model's dtype."""
        self.trainer.settle()


class ObjectiveTrainer(_ObjectiveMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer, trained on an `Objective`; all other arguments are Trainer's."""

    def _model_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        wants_outputs: bool,
        batch: Batch,
    ) -> tuple[torch.Tensor, Any]:
        if "labels" not in inputs and not self.objective.has_model_term:
            outputs = model(**inputs)
            return outputs["logits"].new_zeros(()), outputs
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, batch.items)
        divided = bool(self._model_divides) and batch.items is not None
        counts, window = batch.counts, batch.window
        if not divided:
            return loss * window.ranks * counts.target_tokens / max(window.target_tokens, 1), outputs
        if self._aux_weight:
            share = window.ranks * counts.attended_tokens / max(window.attended_tokens, 1)
            already = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss + (share - already) * self._aux_weight * outputs["aux_loss"]
        return loss, outputs


def _how_the_model_scales(trainer: Any, inputs: dict[str, Any], counts: Counts) -> tuple[bool, float]:
    """Measures whether the model's loss is divided by `num_items_in_batch`, and with what weight it adds an aux loss.

    A model that accepts the argument but ignores it returns a mean; an auxiliary loss inside the model is not divided
    at all. Both would silently be multiplied by the number of accumulation steps.

    Raises:
        ObjectiveError: a part of the loss is not divided, and the model does not say which.
    """
    if not trainer.model_accepts_loss_kwargs:
        return False, 0.0
    model, n = trainer.model, torch.tensor(counts.target_tokens, device=trainer.args.device)
    with torch.no_grad(), anatomy.evaluation(model), trainer.compute_loss_context_manager():
        second = float(model(**inputs, num_items_in_batch=2 * n)["loss"])  # its logits are dropped before the next
        once = model(**inputs, num_items_in_batch=n)
    first = float(once["loss"])
    if abs(first - second) <= 1e-6 * abs(first):
        return False, 0.0
    rest = 2 * second - first
    if abs(rest) <= 1e-5 * abs(first):
        return True, 0.0
    aux = once.get("aux_loss")
    if aux is None or not float(aux):
        raise ObjectiveError(
            f"{rest:.4g} of the model's own loss of {first:.4g} does not depend on the number of tokens and is not its "
            "aux_loss; such a part would be multiplied by the accumulation steps: switch it off and add it as a term"
        )
    return True, rest / float(aux)


class ObjectiveSFTTrainer(_ObjectiveMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer, trained on an `Objective`; all other arguments are SFTTrainer's.

    TRL computes the loss without ever building the logits. When a term asks for them, the model's own forward runs
    instead (once), and TRL's entropy and token accuracy are not logged.
    """

    def _model_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        wants_outputs: bool,
        batch: Batch,
    ) -> tuple[torch.Tensor, Any]:
        if not wants_outputs:
            return SFTTrainer.compute_loss(self, model, inputs, False, batch.items), None
        if isinstance(self.args, SFTConfig) and self.args.loss_type != "nll":
            raise ObjectiveError(
                f"a term asks for logits, which TRL's loss_type={self.args.loss_type!r} does not build"
            )
        return ObjectiveTrainer._model_loss(self, model, {**inputs, "use_cache": False}, wants_outputs, batch)


def widen(model: nn.Module) -> list[tuple[torch.Tensor, torch.dtype]]:
    """Puts trainable half-precision parameters, and the buffers beside them, into float32; returns what they were."""
    changed: list[tuple[torch.Tensor, torch.dtype]] = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(p.requires_grad and p.dtype in _HALF for p in own):
            for tensor in (*(p for p in own if p.requires_grad), *module.buffers(recurse=False)):
                if tensor.dtype in _HALF:
                    changed.append((tensor, tensor.dtype))
                    tensor.data = tensor.data.float()
    return changed


def refuse_inexact_bypass(model: nn.Module) -> None:
    """Raises ObjectiveError unless switching the change off gives exactly the base model."""
    surgery = getattr(standing.plain_model(model).config, "surgery", None) or []
    names = [edit.get("class", "the layers") for edit in surgery if not edit.get("bypass")]
    if names:
        raise ObjectiveError(
            f"the base model cannot be had by switching {', '.join(sorted(set(names)))} off (no exact `bypass`); "
            "pass the base as Objective(..., reference=model)"
        )
