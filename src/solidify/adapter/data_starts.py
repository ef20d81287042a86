"""Starts of low-rank updates that are made from data: EVA, CorDA and LoRA-GA. PEFT computes them, before it attaches.

EVA looks at what the layers read, and gives each a rank and its A. CorDA looks at the same, LoRA-GA at the gradients of
the weights; both then start with an update that is not zero (`starts.py`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_eva_state_dict, preprocess_loraga
from torch import nn
from transformers.pytorch_utils import Conv1D

from solidify.adapter import lookup, patterns, readback, start_kinds, starts
from solidify.behaviour import calling
from solidify.errors import AdapterError, refuse
from solidify.system import console, foreign
from solidify.upstream.peft import preprocess_corda

Batch = Mapping[str, Any]
_PASSES, _LEAST = 50, 200  # after so many passes over the batches, but at least so many steps, EVA has not settled
_TITLE = "the adapter cannot start as declared"


@dataclass
class DataStart:
    """What was found of every target, by its name: EVA's A (rank, in), or what PEFT reads from the layer.

    `layer` maps names to the attribute that PEFT's start reads from a linear layer, and its value.
    """

    a: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: bool = True  # a layer's scale grows with the rank that EVA gives it
    layer: dict[str, tuple[str, Any]] = field(default_factory=dict)


def prepare(
    model: nn.Module, lora: Mapping[str, Any], targets: Sequence[str], start: str, batches: Iterable[Batch]
) -> DataStart:
    """Runs the model, with its adapters off, on batches of its inputs, and returns what the start is made from.

    The model is as it was afterwards. All batches are held in memory.

    Raises:
        AdapterError: there are no batches, the model does not run on them, a target is not called on them, or PEFT
            finds no start.
    """
    listed = None if isinstance(batches, (Mapping, torch.Tensor)) else list(batches)
    strange = batches if listed is None else next((each for each in listed if not isinstance(each, Mapping)), None)
    if listed is None or strange is not None:
        raise AdapterError(
            "LoRA: `batches` must be a list of mappings, each of what the model is called with (input_ids, ...), and "
            f"{'it is' if listed is None else 'it holds one'} of the type {type(strange).__name__}"
        )
    given = [dict(batch) for batch in listed]
    faults = [] if given else [f"LoRA: the start {start!r} is made from data, and `batches` is empty"]
    faults += [] if targets else [f"LoRA: the start {start!r} is made for layers; give `target_modules`"]
    refuse(AdapterError, _TITLE, faults)
    plain: Any = lookup.plain_model(model)
    given = [_move_batch(batch, next(plain.parameters()).device) for batch in given]
    paths = _find_paths(model, plain, targets)
    configuration = _build_probe(lora, paths, start)
    refuse(AdapterError, _TITLE, _find_rank_faults(plain, configuration, paths, start))
    with _left_as_it_was(model, plain):
        with foreign.calling("the model does not run on the first of `batches`", AdapterError):
            _refuse_idle(plain.eval(), paths, given[0])
        with foreign.calling(f"PEFT finds no start {start!r} on these batches", AdapterError):
            return _FINDERS[start](plain, configuration, paths, given)


@contextmanager
def _left_as_it_was(model: nn.Module, plain: nn.Module) -> Any:
    existing = lookup.peft_model(model)
    modes = calling.training_modes(plain.modules())
    noted = vars(plain).pop("peft_config", None)  # by it PEFT takes the plain model for one with adapters to look at
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(readback.buffers_kept(plain))
        if existing is not None:
            stack.enter_context(existing.disable_adapter())
        try:
            yield
        finally:
            calling.put_training_modes(modes)
            if noted is not None:
                plain.peft_config = noted


def _move_batch(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _find_paths(model: nn.Module, plain: nn.Module, targets: Sequence[str]) -> dict[str, str]:
    """Maps the paths at which the targets' own modules stand in the plain model to their names."""
    wanted = {id(lookup.owner(model, name)): name for name in targets}
    found = {path: wanted.pop(id(m)) for path, m in plain.named_modules() if id(m) in wanted}
    assert not wanted
    return found


def _build_probe(lora: Mapping[str, Any], paths: Mapping[str, str], start: str) -> LoraConfig:
    """Returns the configuration by which PEFT finds the modules at these paths, and their ranks."""
    names = list(paths.values())
    ranks = patterns.resolved(lora, names).get("rank_pattern", {})
    with foreign.calling(f"LoRA: {start}_config", AdapterError):
        return LoraConfig(
            r=lora.get("r", LoraConfig().r),
            target_modules="|".join(patterns.exactly(path).removeprefix(r"\A") for path in paths),
            rank_pattern={
                patterns.exactly(path): ranks[patterns.exactly(name)]
                for path, name in paths.items()
                if patterns.exactly(name) in ranks
            },
            init_lora_weights=start,
            **settings(lora, start),
        )


def _find_rank_faults(plain: nn.Module, probe: LoraConfig, paths: Mapping[str, str], start: str) -> Iterator[str]:
    """Yields which targets have fewer directions than a start takes for their rank."""
    for path, name in paths.items():
        module: Any = plain.get_submodule(path)
        rank = probe.rank_pattern.get(patterns.exactly(path), probe.r)
        conv = isinstance(module, Conv1D)
        sizes = tuple(module.weight.shape) if conv else (module.in_features, module.out_features)
        if start == "eva":
            need, has, remedy = round(rank * probe.eva_config.rho), sizes[0], "a lower r, or a lower rho in eva_config"
            what = f"EVA looks for {need} directions (the rank {rank} times eva_config's rho) in what {name} reads"
        elif start == "lora_ga":
            need, has, remedy = 2 * rank, min(sizes), "a lower r"
            what = f"LoRA-GA takes {need} directions (twice the rank {rank}) of the gradient of {name}"
        else:
            need, has, remedy = rank, min(sizes), "a lower r"
            what = f"CorDA takes {need} directions (the rank) of the weight of {name}"
        if need > has:
            yield f"LoRA: {what}, which has {has}; give {remedy} (or `rank_pattern` for this layer)"


def settings(lora: Mapping[str, Any], start: str) -> dict[str, Any]:
    """Returns the field of LoraConfig that belongs to a start, PEFT's own defaults where none is given."""
    if start not in start_kinds.SETTINGS:
        return {}
    key = f"{start}_config"
    return {key: lora.get(key) or start_kinds.SETTINGS[start]()}


def _refuse_idle(plain: Any, paths: Mapping[str, str], batch: Batch) -> None:
    """Runs one batch, and refuses targets that it does not call."""
    called: set[str] = set()
    hooks = [plain.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path)) for path in paths]
    try:
        with torch.no_grad():
            plain(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    idle = [f"LoRA: {name} is not called by the model on these batches" for p, name in paths.items() if p not in called]
    refuse(AdapterError, _TITLE, idle)


def _find_eva(plain: Any, probe: LoraConfig, paths: Mapping[str, str], batches: Sequence[Batch]) -> DataStart:
    words = "input_ids" in batches[0]
    need = max(round(rank * probe.eva_config.rho) for rank in (probe.r, *probe.rank_pattern.values()))
    enough = [batch for batch in batches if not words or _count_positions(batch, probe.eva_config) >= need]
    if not enough:
        raise AdapterError(
            f"LoRA: EVA needs batches of at least {need} tokens (the rank times eva_config's rho), and all of these "
            "are smaller; give more rows in a batch, or a lower rho"
        )
    if len(enough) < len(batches):
        console.words.print(f"EVA leaves out {len(batches) - len(enough)} batches of less than {need} tokens")
    with redirect_stdout(io.StringIO()):  # PEFT prints there what it skips
        found = get_eva_state_dict(
            plain,
            enough,
            peft_config=probe,
            forward_fn=_limited(max(_PASSES * len(enough), _LEAST)),
            **({} if words else {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}),
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    none = [name for path, name in paths.items() if not len(found[path])]
    refuse(
        AdapterError,
        _TITLE,
        [
            f"LoRA: EVA gives {name} no rank on these data; leave it out of target_modules, or give eva_config: "
            "{rho: 1.0}, by which every layer keeps its rank"
            for name in none
        ],
    )
    found = {name: found[path] for path, name in paths.items()}
    return DataStart(a=found, scales=probe.eva_config.adjust_scaling_factors)


def _count_positions(batch: Batch, settings: Any) -> int:
    """Returns of how many tokens EVA looks at what the layers read."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if settings.use_label_mask and "labels" in batch:
        mask = mask & (batch["labels"] != settings.label_mask_value)
    return int(mask.sum())


def _limited(steps: int) -> Callable[[Any, Batch], Any]:
    """Returns how EVA runs the model, which it does for ever where its components do not settle."""
    left = [steps]

    def run(model: Any, batch: Batch) -> Any:
        """Runs the model on a batch, so many times."""
        left[0] -= 1
        if left[0] < 0:
            raise AdapterError(
                f"LoRA: EVA has not settled after {steps} batches; give more rows, or a lower tau in eva_config"
            )
        return model(**batch)

    return run


def _find_corda(plain: Any, probe: LoraConfig, paths: Mapping[str, str], batches: Sequence[Batch]) -> DataStart:
    def run() -> None:
        """Runs the model, as PEFT asks for it."""
        for row in rows:
            plain(**row)

    rows = [row for batch in batches for row in _split_rows(batch)]
    if not rows:
        raise AdapterError("LoRA: the start 'corda' is made from data, and every row of `batches` is all padding")
    preprocess_corda(plain, probe, run_model=run)
    return DataStart(
        layer={name: ("eigens", vars(plain.get_submodule(path)).pop("eigens")) for path, name in paths.items()}
    )


def _split_rows(batch: Batch) -> Iterable[dict[str, Any]]:
    """Yields each row of a batch without its padding: CorDA's sums take one row, and all of its positions.

    A row that is all padding is left out.
    """
    size = max(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)
    mask = batch.get("attention_mask")
    for place in range(size):
        row = {
            key: value[place : place + 1]
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == size
            else value
            for key, value in batch.items()
            if key != "labels"
        }
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            kept = mask[place].bool()
            if not kept.any():
                continue
            row = {
                key: value[:, kept] if isinstance(value, torch.Tensor) and value.shape == (1, len(kept)) else value
                for key, value in row.items()
            }
        yield row


def _find_lora_ga(plain: Any, probe: LoraConfig, paths: Mapping[str, str], batches: Sequence[Batch]) -> DataStart:
    def run() -> None:
        """Runs the model, as PEFT asks for it."""
        for batch in batches:
            loss = plain(**_with_labels(batch)).loss
            if loss is None:
                raise AdapterError("LoRA: the start 'lora_ga' needs a loss; give `labels` in `batches`")
            loss.backward()

    with warnings.catch_warnings():  # of PEFT's hooks on the first layers, whose inputs need no gradient
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        preprocess_loraga(plain, probe, run)
    found: dict[str, tuple[str, Any]] = {}
    faults = []
    for path, name in paths.items():
        module = plain.get_submodule(path)
        gradient = vars(module).pop("_peft_loraga_grad", None)
        if gradient is None or not gradient.any():
            faults.append(f"LoRA: no gradient reaches {name} on these batches")
        else:
            found[name] = ("_peft_loraga_grad", gradient.T if isinstance(module, Conv1D) else gradient)
    refuse(AdapterError, _TITLE, faults)
    return DataStart(layer=found)


def _with_labels(batch: Batch) -> dict[str, Any]:
    if "labels" in batch or "input_ids" not in batch:
        return dict(batch)
    labels, mask = batch["input_ids"], batch.get("attention_mask")
    return {**batch, "labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}


_FINDERS = {"eva": _find_eva, "corda": _find_corda, "lora_ga": _find_lora_ga}


def ranked(configuration: LoraConfig, found: DataStart) -> LoraConfig:
    """Returns a configuration, changed in place, with the ranks that EVA chose, and the scales that it sets."""
    for name, a in found.a.items():
        key = patterns.exactly(name)
        before, rank = configuration.rank_pattern.get(key, configuration.r), len(a)
        if rank != before:
            configuration.rank_pattern = {**configuration.rank_pattern, key: rank}
        if rank != before and found.scales:
            alpha = configuration.alpha_pattern.get(key, configuration.lora_alpha)
            configuration.alpha_pattern = {**configuration.alpha_pattern, key: alpha * rank / before}
    return configuration


def put(model: PeftModel, adapter: str, found: DataStart) -> None:
    """Gives the factors A of a plain adapter, which was just attached with `ranked` ranks, their start in place."""
    for name, a in found.a.items():
        located = lookup.at(model, name)
        assert located is not None
        layer: Any = located.called
        with torch.no_grad():
            layer.lora_A[adapter].weight.copy_(a)


def declared_alike(model: PeftModel, lora: Mapping[str, Any] | None, adapter: str = "default") -> dict[str, Any] | None:
    """Returns a declaration of an adapter with the same tensors as this one has, that needs no data."""
    plain = start_kinds.without_start(lora)
    if lora is None or plain is None or start_kinds.fed(lora) is None:
        return dict(lora) if lora is not None else None
    if start_kinds.started(lora) is not None:
        return {**plain, "init_lora_weights": "olora"}  # whose factors have the same shapes
    layers = {name: layer for path, layer in starts.layers(model, adapter) for name in [lookup.canonical(model, path)]}
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    return {**plain, "rank_pattern": ranks, "alpha_pattern": {n: m.lora_alpha[adapter] for n, m in layers.items()}}
