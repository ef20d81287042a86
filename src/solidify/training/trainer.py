"""What every trainer with an objective shares, one override of each seam; and transformers' Trainer with it.

The engine (`objective/engine.py`) makes the loss; here it meets what a Trainer does: fetching, logging, checkpoints,
half precision. In evaluation only the model's own loss counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from solidify.adapter import lookup, starts
from solidify.adapter.adapters import trained_state
from solidify.errors import AdapterError, ObjectiveError, refuse
from solidify.model import anatomy
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.memory import Stateful
from solidify.objective.objective import Objective
from solidify.objective.runner import Scaling
from solidify.objective.sanity import Sanity
from solidify.system import console
from solidify.training import batching, checkpoints, kernels
from solidify.training.groups import Groups, ParameterGroup
from solidify.training.prefix import in_trainer
from solidify.training.prefix.cached import CachedPrefix
from solidify.training.runner import TrainerRunner
from solidify.upstream.torch import leave_out_of_broadcast
from solidify.upstream.transformers import TrainerSeams, output_directory, write_model
from solidify.upstream.transformers_training import rotate_checkpoints
from solidify.upstream.trl import RepeatSampler

_HALF = (torch.bfloat16, torch.float16)


class ObjectiveMixin(TrainerSeams):
    """What all trainers with an objective share; it stands before a Trainer among the bases, with `runner_of` set.

    `parameter_groups`, `group_by` and `cache_prefix` are as in a recipe. Evaluation reads its rows in their order.

    `loss_is_scaled_for_ga` is transformers' own switch: the loss is already scaled. `fingerprint` is written into
    checkpoints, to tell later whose they are. `engine.sanity` holds what was found of every term in the first step.
    """

    loss_is_scaled_for_ga = True
    fingerprint = ""
    runner_of: type[TrainerRunner] = TrainerRunner

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        parameter_groups: Sequence[ParameterGroup | Mapping[str, Any]] = (),
        group_by: Sequence[str] = (),
        cache_prefix: bool = False,
        **kwargs: Any,
    ) -> None:
        given = kwargs["model"] if "model" in kwargs else args[0] if args else None
        with trainable_as_declared(given):
            super().__init__(*args, **kwargs)
        self.objective = objective
        self.runner = self.runner_of(self)
        self._sums: dict[str, float] = {}
        self._steps_since_log = 0
        self.history: list[dict[str, float]] = []
        self._fetched: list[Any] = []
        self._ready: list[Any] = []
        self._refuse_unusable()
        self.kernels: kernels.Switched | None = None
        self.kernel_findings: list[Any] = []
        if self.args.use_liger_kernel:
            self.kernels = kernels.switch_on(self.model, kernels.settings(self.args, objective), objective)
            self.args = kernels.taken_over(self.args)
        self.engine = ObjectiveEngine(objective, self.model, runner=self.runner)
        self.engine.sanity.measures = self._keeps_graphs()
        # Each process loaded the same file: sent to the others, its weights would be written over a mapping of it, and
        # so be copied into memory.
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        leave_out_of_broadcast(self.model, frozen)
        self._narrow = widen(self.model)
        self.add_callback(_Steps(self))
        self.group_by = tuple(group_by)
        batching.refuse_ungroupable(self, self.group_by)
        self.add_callback(batching.AtEpochs())
        self.groups = Groups(self, parameter_groups)
        self.add_callback(self.groups)
        self.cache_prefix = cache_prefix
        self.prefix: CachedPrefix | None = None  # while it trains
        self.prefix_findings: list[Any] = []
        if cache_prefix:
            in_trainer.refuse_uncacheable(self)

    args: TrainingArguments
    model: Any
    optimizer: Any
    add_callback: Callable[[TrainerCallback], None]
    accelerator: Any
    state: TrainerState

    def _refuse_unusable(self) -> None:
        kernels.refuse_unusable(self.args, self.model, self.objective)
        if self.args.label_smoothing_factor:
            raise ObjectiveError("label smoothing replaces the model's own loss; write it as a term instead")
        if self.args.n_gpu > 1:
            raise ObjectiveError(
                f"this process would spread each batch over {self.args.n_gpu} devices (DataParallel), where terms "
                "cannot look inside the copies; start one process per device with torchrun or `accelerate launch`"
            )
        if self.objective.captures and self._is_reentrant():
            raise ObjectiveError(
                "a term looks inside the model, but reentrant activation checkpointing cuts the graph there; set "
                "activation_checkpointing_kwargs: {use_reentrant: false}"
            )
        if self.args.fsdp and (holder := lookup.trained_parameters(self.model)) is not None:
            names = ", ".join(dict.fromkeys(name for adapter in holder.trained for name in holder.names(adapter)))
            raise AdapterError(f"fsdp shards modules, but {names} are trained as single parameters; name their modules")
        if self.args.fsdp and starts.has_any(self.model):
            raise AdapterError(
                "fsdp shards what is trained, but not the start that stands frozen beside it (pissa, olora); leave "
                "init_lora_weights out, or train without fsdp"
            )
        refuse_half_precision(self.args, self.model)
        refuse(ObjectiveError, f"{type(self).__name__} cannot train like this", self.runner.faults())

    def _is_reentrant(self) -> bool:
        checkpointing = self.args.activation_checkpointing_kwargs or {}
        return bool(self.args.activation_checkpointing and checkpointing.get("use_reentrant"))

    def _keeps_graphs(self) -> bool:
        """Whether the gradient of one term can be taken by itself; some graphs are used up by one pass."""
        used_up = self.kernels is not None or self.args.torch_compile or self._is_reentrant()
        return not (used_up or self.is_deepspeed_enabled)  # type: ignore[attr-defined]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Has transformers make the optimizer, and splits its groups."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        trained = self.model if model is None else model
        if made:
            self.groups.split(optimizer, trained)
        self.groups.refuse_uncovered(optimizer, trained)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; with `cache_prefix` frozen layers at the beginning are computed once for each batch."""
        with in_trainer.caching(self):
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def train_sampler(self, train_dataset: Any = None) -> Any:
        """Returns the sampler that groups, or the trainer's own, which any epoch can be read from."""
        if self.group_by:
            return batching.sampler(self, self.group_by)
        own = super().train_sampler(train_dataset)
        return batching.ReplayedSampler(own) if isinstance(own, RepeatSampler) else own

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetches one step's micro-batches, and keeps them until the first of them is to be trained on."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self._fetched, self._ready = list(batches), []
        return batches, items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Opens the step with its first micro-batch; then as the trainer does."""
        opened = self.open_step(model, inputs)
        last = not self._ready and self.state.global_step + 1 == self.state.max_steps
        with in_trainer.comparing(self, last=last):
            step: torch.Tensor = super().training_step(model, opened, num_items_in_batch)  # type: ignore[misc]
        return step

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates; what was read of frozen layers is compared before any figure is told."""
        found = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        in_trainer.compare_last(self)
        return found

    def open_step(self, model: nn.Module, inputs: Any) -> Any:
        """Returns the next micro-batch as it is trained on. With a step's first, all are completed and counted.

        That is as late as this because a resumed training takes back its random numbers only after the fetching.
        """
        if self._fetched:
            fetched, self._fetched = self._fetched, []
            self._ready = self.runner.complete(model, fetched)
            self.engine.begin(self._ready)
        return self._ready.pop(0) if self._ready else inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the scaled objective in training, the trainer's own loss otherwise."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if self.kernels is not None and not self.kernel_findings:
            own = super().compute_loss  # type: ignore[misc]
            half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            dtype = half or anatomy.main_dtype(self.model) or torch.float32
            verified = self.kernels.verify(lambda: own(model, dict(inputs), False, num_items_in_batch), dtype)
            self.kernel_findings = [self.kernels.finding(), verified]
        self.runner.model, self.runner.items = model, num_items_in_batch
        return self.engine.loss(inputs, outputs=return_outputs)

    def settle(self) -> None:
        """Gives what was trained in float32 under autocast the dtype of the model it belongs to."""
        if self.kernels is not None:
            self.kernels.off()
        for tensor, dtype in self._narrow:
            tensor.data = tensor.data.to(dtype)
        self._narrow = []

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds every term's mean per step since the last log, as it is (`term/name`) and weighted (`weighted/name`).

        With the learning rate, also that of every declared group in the last step.
        """
        if "learning_rate" in logs:
            logs |= self.groups.rates
        trained = "loss" in logs and self._steps_since_log > 0
        if trained:
            logs.update({key: value / self._steps_since_log for key, value in self._sums.items()})
            self._sums, self._steps_since_log = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
        if trained:  # with what the trainer has added
            figures = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
            self.history.append({**figures, "step": self.state.global_step})

    def write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes what transformers does not know of first, and drops older ones when this one is surely on the disk.

        Before, what was read of frozen layers is compared.
        """
        in_trainer.compare_last(self)
        if self.args.should_save:
            target = checkpoints.locate_checkpoint(output_directory(self, trial), self.state.global_step)
            checkpoints.write(target, self._collect_state())
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super().write_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            checkpoints.write_card(target, self.state.global_step, lookup.plain_model(self.model))
            checkpoints.seal(target)
            rotate_checkpoints(
                output_dir=str(target.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, but gathers only what is trained where it would gather the whole base."""
        peft_model = lookup.peft_model(self.model)
        if not self.is_fsdp_enabled or peft_model is None:  # type: ignore[attr-defined]
            super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
            return
        write_model(self, output_dir, trained_state(peft_model))

    def _collect_state(self) -> dict[str, Any]:
        scaling = self.runner.scaling
        return {
            "fingerprint": self.fingerprint,
            "scaling": (scaling.divides, scaling.aux_weight) if scaling is not None else None,
            "history": self.history,
            "engine": self.engine.state_dict(),
            "callbacks": {type(callback).__name__: callback.state_dict() for callback in self._stateful_callbacks()},
            "buffers": checkpoints.buffers(self.model),
        }

    def _stateful_callbacks(self) -> list[Any]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, Stateful)]  # type: ignore[attr-defined]

    def load_progress(self, checkpoint: str | None) -> None:
        """Takes back all that is not in the model, which transformers has loaded by now."""
        super().load_progress(checkpoint)
        if checkpoint is None:
            return
        self.runner.go_on()
        if checkpoints.is_foreign(Path(checkpoint)):
            console.words.print(
                f"{checkpoint} was written by another trainer: weights, optimizer and schedule go on from it; on which "
                "base and data it was trained was not looked at, and loss terms remember nothing"
            )
            return
        remembered = checkpoints.read(Path(checkpoint))
        self.runner.scaling = Scaling(*remembered["scaling"]) if remembered["scaling"] is not None else None
        self.history = remembered["history"]
        self.engine.load_state_dict(remembered["engine"])
        for callback in self._stateful_callbacks():
            if type(callback).__name__ in remembered["callbacks"]:
                callback.load_state_dict(remembered["callbacks"][type(callback).__name__])
        held = dict(self.model.named_buffers())
        for path, buffer in remembered["buffers"].items():
            held[path].copy_(buffer)

    def forget_window(self) -> None:
        """Drops what was counted for a step that was computed but not taken."""
        self._fetched, self._ready = [], []
        self.engine.forget()

    def after_step(self) -> dict[str, float]:
        """Ends a step: terms act, weights move. Returns its numbers, which are added up until the next log."""
        window = self.engine.window
        counted = self.runner.counts_tokens or self.args.include_num_input_tokens_seen != "no"
        if window is not None and not counted:
            self.state.num_input_tokens_seen += int(window.attended_tokens)
        self.engine.step = self.state.global_step - 1
        numbers = self.engine.end()
        self._steps_since_log += 1
        for name, value in numbers.items():
            if name != "loss":  # the trainer's own
                self._sums[name] = self._sums.get(name, 0.0) + value
        return numbers


class _Steps(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: ObjectiveMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says how many steps there will be."""
        self.trainer.engine.steps = state.max_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the step, shows what was found in the first one, and has the last one logged."""
        numbers = self.trainer.after_step()
        if state.global_step == 1 and state.is_world_process_zero:
            console.words.print(sanity_table(self.trainer.engine.sanity, numbers))
        last = state.global_step >= state.max_steps or control.should_training_stop
        if last and args.logging_strategy != "no":
            control.should_log = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Brings back the model's dtype, and names the terms that taught nothing; compares what was read last."""
        in_trainer.compare_last(self.trainer)
        self.trainer.settle()
        for name in self.trainer.engine.sanity.silent if state.is_world_process_zero else ():
            console.words.print(f"The term {name} never had a gradient: it has changed nothing.")


def sanity_table(sanity: Sanity, numbers: Mapping[str, float]) -> Any:
    """Shows the terms of the first step: value, weighted, and the norm of each one's gradient in a micro-batch."""
    largest = max((row.gradient for row in sanity.rows if row.gradient is not None), default=0.0) or 1.0
    rows = []
    for row in sanity.rows:
        norm, share = "not measured", ""
        if row.gradient is not None:
            norm, share = "none yet", ""
            if sanity.reached.get(row.name):
                norm, share = f"{row.gradient:.2e}", f"{row.gradient / largest:.1%}"
        values = (f"{numbers[f'{kind}/{row.name}']:.4g}" for kind in ("term", "weighted"))
        rows.append((row.name, *values, norm, share))
    columns = ("term", "value", "weighted", "gradient norm", "of the largest")
    return console.table("The objective in the first step", columns, rows, numbers=(1, 2, 3, 4))


class ObjectiveTrainer(ObjectiveMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer, trained on an `Objective`; all other arguments are Trainer's."""


def refuse_half_precision(arguments: TrainingArguments, model: nn.Module) -> None:
    """Raises ObjectiveError when something would be trained in half precision, which autocast alone keeps in float32.

    `model` may be on the meta device.
    """
    half = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype in _HALF]
    if half and not (arguments.bf16 or arguments.fp16):
        raise ObjectiveError(
            f"{len(half)} tensors would be trained in half precision ({half[0]}), where small updates are "
            "lost to rounding; set bf16: true, and they are kept in float32 while they train"
        )


@contextmanager
def trainable_as_declared(model: Any) -> Iterator[None]:
    """When the block ends, what is trained has the dtype and the values that it had before.

    On a quantised model TRL's trainers (1.16) round all that is trained to bfloat16, the modules in full too: an
    adapter would then start from other values, and be another one once it is loaded.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    before = [(parameter, parameter.data) for parameter in trained]
    yield
    for parameter, data in before:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


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
