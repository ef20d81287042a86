"""How an artifact is loaded quantised, by transformers and the library that it asks: what is quantised, and what not.

What surgery made new, what is trained in full, and what transformers itself leaves out (the head, tied weights, parts
that stay in float32) keep their dtype. The files stay as they are: a model is quantised each time that it is loaded.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig, HfQuantizer

from solidify.artifact import tensors
from solidify.errors import ArtifactError, ModelError, refuse
from solidify.model import anatomy, quantized, weight_reads
from solidify.model.cost import cost
from solidify.surgery import ledger
from solidify.system import foreign
from solidify.upstream.bitsandbytes import keep_as_quantized
from solidify.upstream.torch import own_parameters
from solidify.weights import hashing

Asked = str | Mapping[str, Any]

WORDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
READ = "read by another module"
_SKIPS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # what libraries call it
_DIGESTS = "_quantized_digests"  # attribute of a loaded model: what each packed parameter was when it was loaded
_BLOCK, _OUTER = 64, 256  # numbers under one scale, and scales under one of theirs: bitsandbytes' 4 bits (QLoRA)
_NOTHING = (
    "no weight is quantised: nothing of the base that is not left out is of a kind that the library quantises "
    "(bitsandbytes takes nn.Linear and Conv1D, torchao nn.Linear)"
)
_MISSING = "pip install 'solidify[quantized]' brings bitsandbytes, pip install torchao brings torchao"


def configure(asked: Asked, dtype: torch.dtype) -> Any:
    """Makes transformers' configuration of a word (`nf4`, `int8`) or of that configuration's own fields.

    Products are computed in `dtype` where a word is given; fields are taken as they are.

    Raises:
        ModelError: the word or a field is not known, the library is not installed, or its weights cannot be quantised
            on loading (they are made from data beforehand).
    """
    if isinstance(asked, str):
        if asked not in WORDS:
            raise ModelError(
                f"the quantization is {asked!r}; write {' or '.join(WORDS)}, or the fields of a quantization config of "
                "transformers, as a mapping"
            )
        computed = {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")} if asked == "nf4" else {}
        asked = {**WORDS[asked], **computed}
    with foreign.calling("the quantization is not as transformers takes it", ModelError, remedy=_MISSING):
        config = AutoQuantizationConfig.from_dict(dict(asked))
    _refuse_unknown(asked, config)
    require_library(config)
    if next((field for field in _SKIPS if hasattr(config, field)), None) is None:
        raise ModelError(
            f"{type(config).__name__} cannot leave modules out, and new modules are never quantised; choose another"
        )
    return config


def require_library(config: Any) -> None:
    """Refuses a configuration whose library is not installed here, or does not run.

    Raises:
        ModelError: it is so.
    """
    made = foreign.attempt(AutoHfQuantizer.from_config, config, pre_quantized=False)
    if made.value is None:
        assert made.error is not None
        raise ModelError(
            f"a model cannot be quantised as {describe(config)} while it is loaded; write {' or '.join(WORDS)}, or "
            f"another quantization config of transformers ({foreign.said(made.error)})"
        ) from made.error
    checked = foreign.attempt(made.value.validate_environment, device_map=None)
    if checked.error is not None:
        raise ModelError(
            f"the quantization {describe(config)} cannot be done here: {foreign.said(checked.error)}; {_MISSING}"
        ) from checked.error


def _refuse_unknown(asked: Mapping[str, Any], config: Any) -> None:
    """Refuses fields that a configuration does not have: transformers passes over them."""
    known = {name for name in inspect.signature(type(config).__init__).parameters if name not in ("self", "kwargs")}
    known |= {"quant_method", *(key for key in config.to_dict() if key.startswith("_"))}
    faults = []
    for key in asked:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            listed = ", ".join(sorted(name for name in known if not name.startswith("_")))
            hint = f"did you mean {close[0]!r}?" if close else f"known: {listed}"
            faults.append(f"{key!r} is not a field of {type(config).__name__}; {hint}")
    refuse(ModelError, "the quantization is not as transformers takes it", faults)


def describe(config: Any) -> str:
    """Names a configuration in a word: `nf4`, `int8`, or the library and its kind."""
    if isinstance(config, BitsAndBytesConfig):
        word = str(config.quantization_method())
        return word.replace("llm_int8", "int8")
    kind = getattr(config, "quant_type", None)
    method = getattr(config.quant_method, "value", config.quant_method)
    return f"{method} {type(kind).__name__}" if kind is not None else str(method)


def record(config: Any) -> str:
    """Writes a configuration as JSON, for a manifest; `again` makes it of that."""
    return json.dumps(config.to_dict(), default=str, sort_keys=True)


def again(record: str) -> Any:
    """Makes the configuration that was recorded, complete as it was.

    Raises:
        ModelError: transformers does not take it (any more), or the library is not installed.
    """
    with foreign.calling("the recorded quantization is not as transformers takes it", ModelError):
        return AutoQuantizationConfig.from_dict(json.loads(record))


def refuse_contradictory(asked: Asked | None, keep: str | Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuses arguments of loading that do not go together.

    Raises:
        ModelError: they do not.
    """
    if asked is not None and "quantization_config" in options:
        raise ModelError("give `quantization`, or transformers' own `quantization_config`, which is taken as it is")
    if asked is None and keep:
        raise ModelError("`keep` says what is not quantised; say by `quantization` how the rest is")


def asked_dtype(options: Mapping[str, Any]) -> torch.dtype | None:
    """Returns the dtype that a model is loaded in; None where the artifact's own stays."""
    asked = options.get("dtype")
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    return found if isinstance(found, torch.dtype) else None


def resolve(
    asked: Asked,
    skeleton: PreTrainedModel,
    edits: Sequence[Mapping[str, Any]],
    keep: str | Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Any:
    """Makes the configuration with which an artifact is loaded: what must not be quantised is in its list.

    `skeleton` is the artifact's model on the meta device, and `keep` names modules and parameters, or patterns of them.

    Raises:
        ModelError: as `configure`; or a pattern of `keep` hits nothing.
    """
    config = configure(asked, dtype or skeleton.dtype)
    field = next(field for field in _SKIPS if hasattr(config, field))
    own = list(getattr(config, field) or [])
    # Where a list is given, transformers leaves out no more than that, not even the head.
    usual = HfQuantizer.get_modules_to_not_convert(skeleton)
    setattr(config, field, sorted({*own, *usual, *_list_modules(skeleton, plain(skeleton, edits, keep))}))
    return config


def plain(
    skeleton: PreTrainedModel, edits: Sequence[Mapping[str, Any]], keep: str | Sequence[str] = ()
) -> dict[str, str]:
    """Maps the parameters that must keep their dtype to why: new, read by others than their layer, or asked for.

    Raises:
        ModelError: a pattern of `keep` hits nothing.
    """
    names = [name for name, _ in skeleton.named_parameters(remove_duplicate=False)]
    read = {f"{layer}.{key}" for layer in weight_reads.read_by_others(skeleton) for key in ("weight", "bias")}
    found = {name: READ for name in names if name in read}
    found |= dict.fromkeys(ledger.new_tensors(names, list(edits)), "new")
    faults = []
    for pattern in [keep] if isinstance(keep, str) else keep:
        hits = anatomy.match_within(pattern, names)
        found |= {name: "trained, or kept as asked" for name in hits if name not in found}
        if not hits:
            faults.append(f"{pattern!r} hits nothing; {anatomy.suggestions(pattern, names)}")
    refuse(ModelError, "what is to be kept out of quantisation is not in the model", faults)
    return found


def _list_modules(skeleton: nn.Module, names: Iterable[str]) -> list[str]:
    """Names the modules that hold the named parameters and no others: a name leaves out all that is below it."""
    wanted = set(names)
    held = {name.rpartition(".")[0] for name in wanted}
    return [
        name
        for name, module in skeleton.named_modules(remove_duplicate=False)
        if name in held and all(f"{name}.{key}" in wanted for key, _ in module.named_parameters())
    ]


def as_loaded(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the options with which an artifact becomes quantised as a model is, and on its device.

    Libraries quantise otherwise, in last bits, on another device, and bitsandbytes chooses an accelerator by itself.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return {}
    devices = {str(parameter.device) for parameter in model.parameters()}
    placed = {"device_map": {"": devices.pop()}} if len(devices) == 1 else {}
    return {"quantization_config": copy.deepcopy(config), **placed}


def on_cpu(config: Any) -> dict[str, Any]:
    """Returns the options with which an artifact is loaded quantised beside models on the CPU."""
    return {"quantization_config": copy.deepcopy(config), "device_map": {"": "cpu"}}


def note(model: PreTrainedModel, kept: Iterable[str], where: Any) -> None:
    """Remembers what each packed parameter of a model is, which was just loaded from verified files.

    Raises:
        ArtifactError: nothing was quantised, or something that must not be.
    """
    packed = dict(packed_parameters(model))
    faults = [f"{name} was quantised, and must not be" for name in kept if name in packed]
    if not packed:
        faults = [_NOTHING]
    refuse(ArtifactError, f"{where} was not quantised as asked", faults)
    remember(model)


def remember(model: nn.Module) -> None:
    """Remembers what each packed parameter of a model is now, and has it stay so."""
    keep_as_quantized(model)
    vars(model)[_DIGESTS] = {name: digest(module, name) for name, module in packed_parameters(model)}
    _say_once()


def remembered(model: nn.Module) -> dict[str, str] | None:
    """Returns the digests of a model's packed parameters when it was loaded; None where nobody took them."""
    found: dict[str, str] | None = vars(model).get(_DIGESTS)
    return found


def packed_parameters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the packed parameters of a plain model by name, each with the module that holds it."""
    if not quantized.is_quantized(model):
        return []
    return [
        (f"{name}.{key}" if name else key, module)
        for name, module in model.named_modules()
        for key, parameter in own_parameters(module).items()
        if parameter is not None and quantized.is_packed(parameter)
    ]


def digest(module: nn.Module, name: str) -> str:
    """Returns the digest of a packed parameter: of all that it consists of."""
    held = quantized.parts(module, name.rpartition(".")[2])
    return hashing.digest_values({key: tensors.digest(tensor) for key, tensor in sorted(held.items())})


class _Once(logging.Filter):
    """Lets each sentence through once: bitsandbytes says in every product that it computes in float16."""

    said: set[str] = set()  # noqa: RUF012  # of the process, whichever filter looks

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a sentence is new."""
        new = record.getMessage() not in self.said
        self.said.add(record.getMessage())
        return new


def _say_once() -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(each, _Once) for each in logger.filters):
        logger.addFilter(_Once())


@dataclass(frozen=True)
class Forecast:
    """What a quantised load of an artifact would be: bytes in memory, and which parameters are packed.

    `full` is the memory without quantisation. `left` maps what keeps its dtype, beside norms and embeddings, to why:
    `new`, `read by another module`, `trained, or kept as asked`, `left out by transformers`, or `not a linear layer`
    (stacks of experts in one parameter).
    """

    word: str
    memory: int
    full: int
    packed: tuple[str, ...]
    left: dict[str, str]

    def document(self) -> dict[str, Any]:
        """Returns the forecast as plain values."""
        return {
            "quantization": self.word,
            "memory": self.memory,
            "memory_unquantized": self.full,
            "quantized": list(self.packed),
            "kept_out": self.left,
        }


def forecast(
    asked: Asked,
    skeleton: PreTrainedModel,
    edits: Sequence[Mapping[str, Any]],
    keep: str | Sequence[str] = (),
) -> Forecast:
    """Says what `resolve` leads to in a training, by what transformers itself would do with a model on the meta device.

    Raises:
        ModelError: as `resolve`; or nothing would be quantised, or nothing can be trained on it.
    """
    config, kept = resolve(asked, skeleton, edits, keep), plain(skeleton, edits, keep)
    trial = copy.deepcopy(skeleton)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    if not quantizer.is_trainable:
        raise ModelError(
            f"transformers trains nothing on weights quantised as {describe(config)}; write {' or '.join(WORDS)}"
        )
    with foreign.calling("the model cannot be quantised like that", ModelError):
        quantizer.preprocess_model(model=trial, dtype=skeleton.dtype, device_map={"": "cpu"}, checkpoint_files=None)
        packed = [n for n, _ in trial.named_parameters() if quantizer.param_needs_quantization(trial, n)]
    if not packed:
        raise ModelError(_NOTHING)
    left, memory = dict[str, str](), (full := cost(skeleton).memory)
    for name, parameter in skeleton.named_parameters():
        if name in packed:
            memory += _measure_packed(config, quantizer, parameter) - parameter.nbytes
        elif parameter.ndim >= 2 and not _is_embedding(skeleton, name):
            usual = "not a linear layer" if parameter.ndim > 2 else "left out by transformers"
            left[name] = kept.get(name, usual)
    return Forecast(describe(config), memory, full, tuple(packed), left)


def _is_embedding(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def _measure_packed(config: Any, quantizer: Any, parameter: torch.Tensor) -> int:
    """Returns the bytes of a parameter once it is packed, with its scales."""
    count = parameter.numel()
    if not isinstance(config, BitsAndBytesConfig):
        return int(count * (quantizer.quantized_element_size or parameter.element_size()))
    if config.load_in_8bit:
        return count + 4 * parameter.shape[0] + 1
    blocks = -(-count // _BLOCK)
    scales = blocks + 4 * -(-blocks // _OUTER) + 4 * _OUTER if config.bnb_4bit_use_double_quant else 4 * blocks
    return -(-count // 2) + scales + 4 * 16


def refuse_quantized(config: Any, reference: str) -> None:
    """Refuses a base whose files are quantised: what surgery keeps must be the base's own numbers.

    Raises:
        ModelError: they are; the message says what to do.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        parts = (getattr(config, name, None) for name in config.sub_configs)
        found = next((q for part in parts if (q := getattr(part, "quantization_config", None)) is not None), None)
    if found is None:
        return
    values = dict(found) if isinstance(found, Mapping) else found.to_dict()
    method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
    raise ModelError(
        f"the base {reference!r} is stored quantised ({method}), and surgery keeps a base's weights bit for bit; name "
        "the model that it was made from, and write base.quantization to train on it quantised. If there is none any "
        f"more, dequantise it first: {_REMEDIES.get(str(method), _REMEDY)}"
    )


_SAVED = ".save_pretrained(directory, save_original_format=False)"  # by default transformers writes the packed format
_REMEDY = f"AutoModelForCausalLM.from_pretrained(...).dequantize(){_SAVED}, where transformers can"
_ON_LOADING = "AutoModelForCausalLM.from_pretrained(..., quantization_config={config}(dequantize=True)){saved}"
_REMEDIES = {
    "mxfp4": _ON_LOADING.format(config="Mxfp4Config", saved=_SAVED),
    "fp8": _ON_LOADING.format(config="FineGrainedFP8Config", saved=_SAVED),
    "compressed-tensors": _ON_LOADING.format(config="CompressedTensorsConfig", saved=_SAVED),
    "gptq": "its numbers were fitted to data, and transformers does not give them back; look for the original",
    "awq": "its numbers were fitted to data, and transformers does not give them back; look for the original",
}
