"""One pass of a model, and what is seen of it: its output, what some modules return, its cache, what it records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .calling import caches_off, copy_tensors, takes
from .properties import RECORDS, Parts, Reading

OUTPUTS = ("logits", "last_hidden_state")  # what is looked at, the first that has a value for every position
CACHES = ("past_key_values", "cache_params", "state")


@dataclass
class Seen:
    """What one pass showed: what is watched, the caches that came back, and the shapes of what was recorded.

    `unmasked` says that a watched module was given None as its attention mask.
    """

    parts: Parts
    cache: dict[str, Any]
    recorded: dict[str, list[Any]]
    unmasked: bool = False


class _LeftError(Exception):
    """Ends a forward pass of which the rest is of no interest."""


class Watched:
    """A model, inputs that it takes (among them a stream of tokens (batch_size, sequence_length), if it has one), and
    where it is watched: at its outputs and at some modules (`at`); with `leave`, at these alone, after the last of
    which the rest is not run.

    `values` stand in the place of parameters of these names. In half precision rounding hides much; with `wide` the
    model is run with all its floating tensors in float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, torch.Tensor],
        *,
        values: Mapping[str, torch.Tensor] | None = None,
        at: Sequence[str] = (),
        leave: bool = False,
        wide: bool = False,
    ) -> None:
        self.model, self.inputs, self.at, self.leave = model, dict(inputs), list(at), leave
        self.values = dict(values or {})
        self.dtype = torch.float32 if wide else model.dtype
        if wide:
            own = {**dict(model.named_parameters()), **dict(model.named_buffers()), **self.values}
            self.values = {name: t.detach().float() if t.is_floating_point() else t for name, t in own.items()}
            self.inputs = {key: t.float() if t.is_floating_point() else t for key, t in self.inputs.items()}
        self.takes = takes(model)
        configs = [v for m in model.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]
        self.configs = list({id(config): config for config in configs}.values())
        self.stream = next((k for k in ("decoder_input_ids", "input_ids") if k in inputs), None)
        tokens = inputs[self.stream] if self.stream is not None else next(iter(inputs.values()))
        self.rows = int(tokens.shape[0])
        self.positions = int(tokens.shape[1]) if self.stream is not None else 0
        self.decoder = self.stream is not None and not model.config.is_encoder_decoder

    def list_lacking(self) -> list[str]:
        """Returns the properties that say nothing of this model: it reads no tokens, has no cache, or no padding.

        Pictures have none, unless a mask of their pixels says so.
        """
        pictures = self.stream is None and "pixel_values" in self.inputs
        padded = "pixel_mask" in self.takes or ("attention_mask" in self.takes and not pictures)
        found = ["causal"] if self.stream is None else []
        found += ["cache"] if self.stream is None or not self.takes & {*CACHES} else []
        return [*found, *(["padding"] if not padded else [])]

    def with_other_tokens(self, seed: int) -> Watched:
        """Watches the same model with the same tokens in another order."""
        assert self.stream is not None
        tokens = self.inputs[self.stream]
        order = torch.randperm(tokens.numel(), generator=torch.Generator().manual_seed(seed)).to(tokens.device)
        inputs = {**self.inputs, self.stream: tokens.flatten()[order].view(tokens.shape)}
        other = Watched(self.model, inputs, values=self.values, at=self.at, leave=self.leave)
        other.dtype = self.dtype
        return other

    def list_packs(self) -> list[tuple[bool, bool]]:
        """Returns in which ways the probes may be rows of one batch: with changed rows, and with a padded one."""
        if self.stream is None or any(t.shape[:1] != (self.rows,) for t in self.inputs.values()):
            return [(False, False)]
        text = set(self.inputs) <= {"input_ids", "attention_mask"} and self.decoder
        return [*([(True, True)] if text and "attention_mask" in self.takes else []), (True, False), (False, False)]

    def make_batch(self, packed: bool, padded: bool) -> dict[str, torch.Tensor]:
        """Makes the batch: rows as given; packed, also the first with another last token, and padded on the left."""
        if not packed or self.stream is None:
            return dict(self.inputs)
        order = [*range(self.rows), 0, *([0] if padded else [])]
        batch = {key: tensor[order].clone() for key, tensor in self.inputs.items()}
        tokens = batch[self.stream]
        tokens[self.rows, -1] = change_tokens(tokens[self.rows, -1])
        if padded:
            batch["attention_mask"] = torch.ones_like(tokens)
            batch["attention_mask"][-1, : self.pad] = 0
            tokens[-1, self.pad :] = self.inputs[self.stream][0, : self.positions - self.pad]
            if "position_ids" in self.takes:
                batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        elif "attention_mask" in batch and self.decoder:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        return batch

    @property
    def pad(self) -> int:
        """The number of positions that are padding in the padded row."""
        return max(1, self.positions // 4)

    def try_call(self, reading: Reading, label: str, inputs: Mapping[str, Any], **options: Any) -> Seen | None:
        """Calls the model; an error is noted under the probe's name, which then has no distance."""
        try:
            return self.call(inputs, **options)
        except Exception as error:
            reading.errors[label] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            reading.distances.pop(label, None)
            return None

    def call(
        self, inputs: Mapping[str, Any], *, rows: int | None = None, positions: int | None = None, **options: Any
    ) -> Seen:
        """Runs the model and returns what is watched of it, (batch_size, sequence_length, ...) where it has that."""
        caching = bool(options.get("use_cache"))
        if "use_cache" in self.takes:
            options.setdefault("use_cache", False)
        shape = (rows or len(next(iter(inputs.values()))), positions or self._count_positions(inputs))
        inner: list[Any] = []
        got: dict[str, torch.Tensor] = {}
        handles = [self.model.base_model.register_forward_hook(lambda _m, _a, output: inner.append(output))]
        masks: list[Any] = []
        for name in self.at:
            hook = self._make_hook(name, got, masks)
            handles.append(self.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        outputs: Any = {}
        with caches_off(() if caching else self.configs):
            try:
                arguments = {**copy_tensors(inputs), **options}
                outputs = self.model(**arguments)
            except _LeftError:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        views = {name: self._view_rows(tensor, shape) for name, tensor in got.items()}
        parts = {name: view for name, view in views.items() if view is not None}
        if not self.leave:
            tensors = [outputs.get(key) for key in OUTPUTS] if hasattr(outputs, "get") else []
            tensors += [t for value in (*inner[-1:], outputs) for t in _collect_tensors(value)]
            output = next((t for t in tensors if self._fits_stream(t, shape)), None)
            parts |= {"": output} if output is not None else {}
        caches = {key: outputs.get(key) for key in CACHES if hasattr(outputs, "get")}
        seen = Seen(parts, caches, {}, unmasked=any(mask is None for mask in masks))
        for key in RECORDS:
            if options.get(f"output_{key}"):
                seen.recorded |= _collect_shapes(outputs, key)
        return seen

    def _make_hook(self, name: str, got: dict[str, torch.Tensor], masks: list[Any]) -> Any:
        def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            """Keeps what the module returns first, and its mask, and ends the pass after the last."""
            if "attention_mask" in kwargs:
                masks.append(kwargs["attention_mask"])
            found = next((t for t in _collect_tensors(output) if t.is_floating_point()), None)
            if found is not None and name not in got:
                got[name] = found.clone()
            if self.leave and len(got) == len(self.at):
                raise _LeftError

        return hook

    def _view_rows(self, tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
        """Views a tensor as (batch_size, sequence_length, ...), also when both are flattened into one; else None."""
        if self.stream is None:
            return tensor if tensor.shape[:1] == shape[:1] else None
        if tensor.ndim >= 2 and tuple(tensor.shape[:2]) == shape:
            return tensor if tensor.ndim > 2 else tensor[..., None]
        if tensor.ndim >= 2 and tensor.shape[0] == shape[0] * shape[1]:
            return tensor.reshape(*shape, -1)
        return None

    def _count_positions(self, inputs: Mapping[str, Any]) -> int:
        return int(inputs[self.stream].shape[1]) if self.stream is not None else 0

    def _fits_stream(self, tensor: Any, shape: tuple[int, int]) -> bool:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
            return False
        return tensor.shape[0] == shape[0] if self.stream is None else tuple(tensor.shape[:2]) == shape


def change_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Returns other tokens."""
    return torch.where(tokens > 3, tokens - 1, tokens + 1)


def _collect_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [t for item in value for t in _collect_tensors(item)] if isinstance(value, (tuple, list)) else []


def _collect_shapes(outputs: Any, key: str) -> dict[str, list[Any]]:
    """Returns the shapes that outputs of a kind have, those of an encoder and a decoder too."""
    names = [name for name in outputs if name == key or name.endswith(f"_{key}")] if hasattr(outputs, "get") else []
    found: list[Any] = []
    for name in names:
        value = outputs[name]
        entries = value if isinstance(value, (tuple, list)) else [] if value is None else [value]
        found += [[list(t.shape) for t in _collect_tensors(entry)] for entry in entries]
    return {key: found}
