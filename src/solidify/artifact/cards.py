"""Model cards: README.md of artifacts, plain models, adapters and checkpoints, with the fields that the hub reads.

A card names a base by its id of the hub, and never by where it stands on this machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from solidify.artifact import autos, companions, sources
from solidify.behaviour.properties import PROPERTIES
from solidify.directory import manifest
from solidify.directory.manifest import Manifest
from solidify.model import anatomy
from solidify.system import files

TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModel": "feature-extraction",
}
_READS_TEXT = ("text-generation", "text2text-generation", "fill-mask", "image-text-to-text")  # a loss has a perplexity
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow", ".py", ".gz", ".zst")
TRAINED = "training"  # the step of a lineage that says on what, and with what result


def on_hub(name: Any) -> bool:
    """Returns whether a name is an id of the hub, as far as can be seen: no path, and nothing that stands here."""
    return (
        isinstance(name, str)
        and _ON_HUB.fullmatch(name) is not None
        and not name.endswith(_FILES)
        and not files.is_directory(name)
        and not files.is_file(name)
    )


def training_step(recipe: Mapping[str, Any] | None, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what a lineage says of a training: its data on the hub, and the numbers that were measured."""
    names = [part for part in _walk_texts((recipe or {}).get("data", {})) if "/" in part and on_hub(part)]
    numbers = {key: value for key, value in (measured or {}).items() if isinstance(value, (int, float))}
    return {"step": TRAINED, "datasets": sorted(set(names)), "measured": numbers}


def _walk_texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for each in inner for text in _walk_texts(each)]


def artifact_card(model: PreTrainedModel, staging: Path, draft: Manifest) -> str:
    """Writes an artifact's card: how to load it, what was changed, what it does not keep of its base's behaviour."""
    auto = autos.own_class(staging)
    declared = {key for edit in draft.edits for key, kept in edit.get("declares", {}).items() if not kept}
    lost = {key: words for key, words in PROPERTIES.items() if key in declared}
    parameters = anatomy.count(model.parameters())
    values = {
        "manifest": draft,
        "public_name": manifest.public_name,
        "parameters": parameters,
        "auto": auto,
        "lost": lost,
    }
    values["tokenizer"] = companions.has_tokenizer(staging)
    values["metadata"] = metadata("transformers", ["solidify", "custom_code"], draft.base, auto, draft)
    values["measured"] = _list_measured(draft.lineage, auto)
    kept = {edit["name"]: kind for edit in draft.edits if (kind := edit.get("settings", {}).get("layer_type"))}
    return sources.render("README.md.jinja", stateful=bool(kept), kept=kept, **values)


def stock_card(directory: Path, draft: Manifest, parameters: int) -> str:
    """Writes the card of a plain model, a base as it stands or one that was trained and merged: what it is, and of what
    it was made."""
    auto, merges = autos.auto_class(directory), [step for step in draft.lineage if step["step"] == "merge"]
    prepared = "AutoProcessor" if companions.has_processor(directory) else "AutoTokenizer"
    origin, last = draft.base.get("model"), merges[-1].get("trained", {}) if merges else {}
    return sources.render(
        "stock.md.jinja",
        metadata=metadata("transformers", ["solidify"], draft.base, auto, draft),
        head=next(iter(files.document(directory / "config.json").get("architectures") or [auto])),
        merged=bool(merges),
        origin=manifest.public_name(origin) if isinstance(origin, str) else "unknown",
        revision=draft.base.get("revision"),
        dtype=draft.base.get("dtype"),
        parameters=parameters,
        auto=auto,
        preparing=prepared if companions.has_tokenizer(directory) or prepared == "AutoProcessor" else "",
        code=", trust_remote_code=True" if any(directory.glob("*.py")) else "",
        trained={key: fold_names(last.get(key, [])) for key in ("lora", "full")},
        measured=_list_measured(draft.lineage, auto),
        lineage=draft.lineage,
        public_name=manifest.public_name,
        versions=draft.versions,
    )


def adapter_card(record: Manifest, configuration: Mapping[str, Any], base: Manifest, auto: str, model: str = "") -> str:
    """Writes an adapter's card: what it belongs to, what it trains, how to load it.

    `model` is the id under which its base is on the hub, where it is known.
    """
    origin = base.base.get("model")
    kind = str(configuration.get("peft_type") or "LORA")
    return sources.render(
        "adapter.md.jinja",
        metadata=metadata("peft", ["solidify", kind.lower()], {**base.base, "model": model or origin}, auto, record),
        kind=kind.replace("LORA", "LoRA"),
        model=model,
        origin=manifest.public_name(origin) if isinstance(origin, str) else "unknown",
        head=base.base.get("class", "model"),
        changed=base.kind == "artifact" and "class" in base.base,
        code=bool(base.code) or base.kind == "artifact",
        auto=auto,
        trained={key: fold_names(record.trained.get(key, [])) for key in ("lora", "full")},
        settings={key: configuration[key] for key in ("r", "lora_alpha", "lora_dropout") if key in configuration},
        measured=_list_measured(record.lineage, auto),
        versions=record.versions,
    )


def checkpoint_card(step: int, origin: Any) -> str:
    """Writes the card of a checkpoint of a training, in place of PEFT's, which names the base by where it stands."""
    name = manifest.public_name(origin) if isinstance(origin, str) and origin else "unknown"
    values = {"library_name": "peft", "tags": ["solidify", "checkpoint"]}
    return sources.render("checkpoint.md.jinja", metadata=_write_yaml(values), step=step, origin=name)


def metadata(library: str, tags: Sequence[str], origin: Mapping[str, Any], auto: str, record: Manifest) -> str:
    """Writes the fields that the hub reads of a card, as YAML; what is not known is left out.

    Of the base, `origin` says its `model`, and as `rights` what its own card says of its licence.
    """
    steps = [step for step in record.lineage if step.get("step") == TRAINED or step.get("datasets")]
    datasets = sorted({name for step in steps for name in step.get("datasets", [])})
    numbers, task = _find_numbers(record.lineage), TASKS.get(auto)
    metrics = {"perplexity": "loss" if task in _READS_TEXT else None, "accuracy": "accuracy"}
    values: dict[str, Any] = {
        "library_name": library,
        "base_model": origin.get("model") if on_hub(origin.get("model")) else None,
        **origin.get("rights", {}),
        "pipeline_tag": task,
        "tags": list(tags),
        "datasets": datasets,
        "metrics": [name for name, word in metrics.items() if word and any(word in number for number in numbers)],
    }
    return _write_yaml({key: value for key, value in values.items() if value})


def _write_yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None).strip()


def _find_numbers(lineage: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures that the steps of a lineage have measured; of healing, those after its last stage."""
    found: dict[str, float] = {}
    for step in lineage:
        measured = step.get("measured", {})
        for healed in measured.get("stages", [])[-1:]:
            found |= {"KL_from_the_base": healed["kl"], "recovered_share_of_it": healed["recovered"]}
        numbers = {k: v for k, v in measured.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        found |= {} if step.get("step") == "heal" else numbers
    return found


def _list_measured(lineage: Sequence[Mapping[str, Any]], auto: str) -> list[tuple[str, str]]:
    """Returns what the last training measured, in words; a loss with its perplexity, where it is one of tokens."""
    rows, of_text = [], TASKS.get(auto) in _READS_TEXT
    for key, value in _find_numbers(lineage).items():
        more = f" (perplexity {math.exp(value):.4g})" if of_text and "loss" in key and value < 50 else ""
        rows.append((key.replace("_", " "), f"{value:.4g}{more}"))
    return rows


def fold_names(names: Sequence[str]) -> list[tuple[str, int]]:
    """Returns names in which numbers are `*`, and how many names each stands for."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = anatomy.fold([name])[0]
        counts[pattern] = counts.get(pattern, 0) + 1
    return list(counts.items())
