"""The certificate: inputs, expected outputs and digests of the whole state, and the fresh process that repeats them.

It stands in the artifact's directory `certificate/`, so that anybody can repeat it later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.artifact import calls, fresh, tensors
from solidify.behaviour import calling, probes, properties
from solidify.behaviour.values import noise
from solidify.behaviour.watching import Watched
from solidify.directory import packages
from solidify.errors import ArtifactError, refuse
from solidify.findings import Finding
from solidify.model import anatomy, probing
from solidify.model.extent import Extent
from solidify.model.probing import Inputs
from solidify.surgery import catalogue, control
from solidify.surgery.encoding import is_text
from solidify.system import files, foreign
from solidify.system.alone import Alone
from solidify.upstream.transformers import implementation
from solidify.weights import checkpoint, mapped

NAME = "certificate"
_RUNS = 4
CASES: dict[str, dict[str, Any]] = {
    "short": {"length": 12, "seed": 11},
    "padded": {"length": 12, "padded": True, "seed": 12},
    "long": {"batch_size": 1, "length": 40, "seed": 13},
}


def make_inputs(
    model: PreTrainedModel, *, run: Callable[[PreTrainedModel, Inputs], Any] = anatomy.run
) -> dict[str, Inputs]:
    """Makes up inputs for every case; `run` is as `probing.probe_inputs` has it.

    Raises:
        SurgeryError: as that.
    """
    return {case: probing.probe_inputs(model, **settings, run=run) for case, settings in CASES.items()}


def write(
    model: PreTrainedModel,
    directory: Path,
    stored: Mapping[str, str],
    edits: Sequence[Mapping[str, Any]],
    extent: Extent,
) -> None:
    """Records what `model`, as it stands in memory, computes and holds; realigns its matrices, values unchanged.

    `stored` holds the digests of the tensors in the directory, `edits` the records of all changes. A bounded model is
    not run: what is recorded of its outputs is what the first new module of each kind gives back, and of its state,
    beside the digests, samples.
    """
    target = directory / NAME
    target.mkdir()
    config = files.document(directory / "config.json")
    module_names = [name for edit in config["surgery"] for name in edit["modules"]]
    entries = checkpoint.read(directory).entries
    state = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    if not extent.whole:
        first = list(control.first_of_each_kind(model, _find_standing(model, config["surgery"])))
        entries = {
            name: e for name, e in entries.items() if any(name.startswith(f"{module_name}.") for module_name in first)
        }
        tensors.realign(entries, state)
        inputs, outputs, modules = calls.record(model, first)
    else:
        tensors.realign(entries, state)
        modules = []
        inputs, outputs = _whole_outputs(model)
    safetensors.torch.save_file(inputs, target / "inputs.safetensors")
    safetensors.torch.save_file(outputs, target / "outputs.safetensors")
    document: dict[str, Any] = {
        "prefix": "" if model.base_model is model else model.base_model_prefix + ".",
        "state": tensors.digests(state.items()) if extent.whole else _digest_tensors(state, stored),
        "samples": {} if extent.whole else _sample_tensors(model, state),
        "modules": modules,
        # Elsewhere a model may keep what it saw when it ran, and a large one does not run in the other process.
        "attributes": tensors.digests(_walk_attributes(model, torch.Tensor, ("",) if extent.whole else module_names)),
        "values": dict(_walk_attributes(model, (bool, int, float, str), module_names)),
        "device": model.device.type,
        "implementations": {
            f"{kind}_implementation": _find_implementations(model.config, kind) for kind in ("attn", "experts")
        },
        "environment": {
            "torch": torch.__version__,
            "transformers": packages.current_versions()["transformers"],
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
    }
    document["contract"], given = _measure_contract(model, config["surgery"], edits, extent)
    safetensors.torch.save_file(given, target / "contract.safetensors")
    broken = [f"{name} is {value!r}" for name, value in document["values"].items() if not is_text(str(value))]
    refuse(ArtifactError, "half a character (a lone surrogate) is no text, and no file holds it; change it", broken)
    (target / "state.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _measure_contract(
    model: PreTrainedModel, entries: Sequence[Mapping[str, Any]], edits: Sequence[Mapping[str, Any]], extent: Extent
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Measures how the model behaves, with noise in what the surgery made, as the fresh process will measure it again.

    Returns what is to be kept and how it is measured, and the inputs. What the changes declare is named; `control` is
    what the model before the changes showed.
    """
    declared = sorted({key for entry in entries for key, kept in entry.get("declares", {}).items() if not kept})
    first = list(control.first_of_each_kind(model, _find_standing(model, entries)))
    heads = [edit["name"] for edit in edits if catalogue.of(edit).adds]
    first += [name for name in heads if name not in first] if extent.whole else []
    made = {name for edit in edits for name in edit["new"]}
    state = (*model.named_parameters(), *model.named_buffers())
    if not extent.whole:  # of a bounded model no other module is run, and noise takes as much memory as what it is for
        made = anatomy.names_within(made, first)
    parameters = {name: tensor for name, tensor in state if name in made and tensor.is_floating_point()}
    before: dict[str, float] = {}
    for edit in edits:
        before |= {key: max(far, before.get(key, 0.0)) for key, far in edit.get("control", {}).items()}
    how = {
        "fresh": sorted(parameters),
        "at": first,
        "leave": not extent.whole,
        "wide": control.is_half(model) and extent.whole,
    }
    found: dict[str, Any] = {"declared": declared, "control": before, **how}
    if not (extent.whole or first):
        return {
            **found,
            "error": "a model of this size is not run as a whole, and none of the changes can be run alone",
        }, {}
    values = {name: noise(name, p) for name, p in parameters.items()}
    for seed in range(3):  # where a model's choices hang on rounding, others are taken
        inputs = probing.probe_inputs(model, seed=seed) if extent.whole else probing.few_inputs(model)
        watched = Watched(model, inputs, values=values, at=first, leave=not extent.whole, wide=bool(how["wide"]))
        with anatomy.sparing(model), calling.buffers_kept(model):
            outcome = foreign.attempt(probes.read, watched)
        if outcome.value is None:
            return {**found, "error": foreign.said(outcome.error) if outcome.error else "nothing was measured"}, {}
        reading = outcome.value
        dtype = reading.dtype
        if all(far <= properties.allowed(n, before.get(n, 0.0), dtype) for n, far in reading.distances.items()):
            break
    kept = {key: far for key, far in reading.distances.items() if key.partition("/")[0] not in declared}
    recorded = {key: shapes for key, shapes in reading.recorded.items() if key not in declared}
    given = {key: tensor.cpu().contiguous() for key, tensor in inputs.items()}
    document = {
        **found,
        "tried": [watched.rows, watched.positions],
        "unwatched": [name for name in heads if name not in reading.plain],
        "lacking": watched.list_lacking(),
        "packed": reading.packed,
        "padded": reading.padded,
        "way": reading.way,
        "distances": kept,
        "recorded": recorded,
        "unrecorded": {key: reading.errors[key] for key in properties.RECORDS if key in reading.errors},
    }
    return document, given


def _find_standing(model: PreTrainedModel, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of modules that were put there, as far as later changes left them."""
    names = {name for name, _ in model.named_modules()}
    wanted = [name for entry in entries if catalogue.of(entry).runs for name in entry["modules"]]
    return [name for name in dict.fromkeys(wanted) if name in names]


def _whole_outputs(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Runs every case; returns inputs and outputs by case."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for case, batch in sorted(make_inputs(model).items()):
        inputs |= {f"{case}/{key}": tensor.cpu().contiguous() for key, tensor in batch.items()}
        outputs[f"{case}/logits"] = _run_steady(model, batch)
        if model.base_model is not model:
            # The part without a head may ask for inputs that its head makes for it; then only its state is compared.
            hidden = foreign.attempt(_run_steady, model.base_model, batch).value
            if hidden is not None:
                outputs[f"{case}/hidden"] = hidden
    return inputs, outputs


def _run_steady(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns what the model gives twice in a row (or the last of a few runs): kernels may settle as they are used."""
    output = anatomy.run(model, batch)
    for _ in range(_RUNS - 1):
        before, output = output, anatomy.run(model, batch)
        if torch.equal(before, output):
            break
    return output.cpu().contiguous()


def _sample_tensors(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    samples = {}
    for name, tensor in state.items():
        samples[name] = tensors.sample(tensor)
        mapped.release([model])
    return samples


def _digest_tensors(state: Mapping[str, torch.Tensor], stored: Mapping[str, str]) -> dict[str, str]:
    """Returns the digests of a state whose tensors stand in files; of those that are not on disk, by reading them."""
    stored_digests = {id(tensor): stored[name] for name, tensor in state.items() if name in stored}
    return {name: stored_digests.get(id(tensor)) or tensors.digest(tensor) for name, tensor in state.items()}


def _find_implementations(config: PreTrainedConfig, kind: str) -> Any:
    """Returns which kernels a model uses, as `from_pretrained` takes it: one word, or one per part."""
    parts = {name: part for name in config.sub_configs if isinstance(part := getattr(config, name), PreTrainedConfig)}
    found = {"": implementation(config, kind), **{name: implementation(part, kind) for name, part in parts.items()}}
    named = {name: word for name, word in found.items() if word is not None}
    return next(iter(named.values()), None) if len(set(named.values())) < 2 else named


def _walk_attributes(
    model: PreTrainedModel, kind: Any, module_names: Sequence[str] = ("",)
) -> Iterator[tuple[str, Any]]:
    """Yields plain attributes of a kind, of the modules of some names; not what training and loading set."""
    for owner, module in model.named_modules():
        name = f"{owner}." if owner else ""
        if not any(name.startswith(f"{module_name}." if module_name else "") for module_name in module_names):
            continue
        for key, value in vars(module).items():
            if isinstance(value, kind) and key != "training" and not key.startswith("_"):
                yield name + key, value


def witness(directory: Path, process: Alone | None = None) -> list[Finding]:
    """Loads the artifact in a fresh process without solidify and peft, through every Auto class it names.

    `process` is one that was started before (`fresh.started`).

    Raises:
        ArtifactError: the directory has no certificate, or the process died.
    """
    return witness_all([directory], process)[directory]


def witness_all(directories: Sequence[Path], process: Alone | None = None) -> dict[Path, list[Finding]]:
    """Loads several artifacts, one after the other, in one fresh process; otherwise as `witness`."""
    resolved = {directory: str(directory.resolve()) for directory in directories}
    for directory in directories:
        if not (directory / NAME / "state.json").is_file():
            raise ArtifactError(f"{directory} has no {NAME}/state.json to compare with")
    room = str(Path(probes.__file__).parent)  # which the fresh process imports by its path
    request = {"directories": list(resolved.values()), "certificate": NAME, "behaviour": room}
    with ExitStack() as stack:
        answer = (process or stack.enter_context(fresh.started())).ask(request)
    imported = ", ".join(answer["imported"])
    alone = Finding(
        "loads without us", not imported, f"imported: {imported}" if imported else "solidify and peft not importable"
    )
    return {
        directory: [*_judge_all(directory, answer["directories"][key]), alone] for directory, key in resolved.items()
    }


def _judge_all(directory: Path, answer: dict[str, Any]) -> list[Finding]:
    document = files.document(directory / NAME / "state.json")
    expected = document["environment"]
    moved = ", ".join(f"{k} {expected[k]} -> {v}" for k, v in answer["environment"].items() if v != expected[k])
    findings = [finding for auto, load in answer["loads"].items() for finding in _judge_load(auto, load, moved)]
    behaved = next((load["behaviour"] for load in answer["loads"].values() if "behaviour" in load), None)
    return [*findings, *_judge_behaviour(document.get("contract"), behaved)]


def _judge_behaviour(contract: dict[str, Any] | None, found: dict[str, Any] | None) -> list[Finding]:
    """Turns what the fresh process measured of the contract into findings, one a property that says something of it."""
    if contract is None or found is None or "error" in {**contract, **found}:
        why = (contract or {}).get("error") or (found or {}).get("error") or "the certificate does not record it"
        return [Finding.unseen("behaviour kept", why)]
    dtype = torch.float32 if contract["wide"] else getattr(torch, found["dtype"])
    before = {key: contract["control"].get(key, 0.0) for key in contract["distances"]}
    kept = properties.Reading(before, contract["recorded"], dtype=dtype)
    measured = properties.Reading(found["distances"], found["recorded"], errors=found["errors"], dtype=dtype)
    faults = {fault.property: fault.words for fault in reversed(properties.faults(kept, measured))}
    findings = []
    for key, words in properties.PROPERTIES.items():
        if key in contract.get("lacking", ()) or not properties.asks(key, before.get(key, 0.0), dtype):
            continue
        parts = [name for name in contract["distances"] if properties.property_of(name) == key]
        if key in contract["declared"]:
            findings.append(Finding(f"behaviour: {key}", None, f"declared as not kept: {words}"))
        elif key in faults:
            findings.append(Finding(f"behaviour: {key}", False, faults[key]))
        elif key in contract.get("unrecorded", {}):
            findings.append(Finding(f"behaviour: {key}", None, f"not recorded: {contract['unrecorded'][key]}"))
        elif not parts and key not in contract["recorded"] and key in ("causal", "cache", "padding", "rows"):
            why = "the model before its changes could not be tried for it"
            findings.append(Finding.unseen(f"behaviour: {key}", why))
        elif parts or key in contract["recorded"]:
            far = max((found["distances"].get(name, 0.0) for name in parts), default=0.0)
            rows, positions = contract.get("tried", (0, 0))
            sizes = f"; tried with {rows} rows of {positions} tokens" if positions else ""
            findings.append(Finding(f"behaviour: {key}", True, f"{words} (off by {far:.1g}{sizes})"))
    why = "its outputs are not ordered by position"
    return [*findings, *(Finding.unseen(f"behaviour of {name}", why) for name in contract.get("unwatched", ()))]


def _judge_load(auto: str, load: dict[str, Any], moved: str) -> list[Finding]:
    """Turns what the fresh process saw through one Auto class into findings."""
    if "error" in load:
        return [Finding(f"reload ({auto})", False, load["error"])]
    if "same_as" in load:
        return [Finding(f"reload ({auto})", True, f"leads to the same class as {load['same_as']}")]
    faults = [f"{kind}: {', '.join(names[:4])}" for kind, names in load["loading_info"].items()]
    if load["meta"]:
        faults.append(f"never filled: {', '.join(load['meta'][:4])}")
    for kind in ("state", "attributes", "values"):
        for problem in ("absent", "additional", "different"):
            names = load[kind][problem]
            if names:
                faults.append(f"{len(names)} {kind} {problem}: {', '.join(names[:4])}")
    equal = load["state"]["equal"] + load["attributes"]["equal"]
    how = "bit-identical in samples of every tensor" if load["sampled"] else "bit-identical"
    held = None if load["sampled"] else True  # a sample is no proof of the whole
    state = Finding(
        f"state identical ({auto})",
        False if faults else held,
        "; ".join(faults) if faults else f"{equal} tensors {how}, loading info empty, {load['seconds']:.1f} s",
    )
    outputs = load.get("outputs", {})
    if not outputs:  # this class asks for inputs that the certificate does not hold
        return [state, Finding.unseen(f"outputs identical ({auto})", "it asks for inputs that the certificate lacks")]
    different = {case: o for case, o in outputs.items() if not o["equal"]}
    if not different:
        what = "modules, the first of each kind," if load["sampled"] else "cases"
        evidence = f"{len(outputs)} {what} bit-identical"
        if once := load.get("once"):
            evidence += (
                f" in fresh loads; an earlier pass ({once['case']}) differed by {once['by']:.1e}, later ones did not"
            )
            held = None  # all but one pass were; that is no proof
        return [state, Finding(f"outputs identical ({auto})", held, evidence)]
    worst = max(_measure_apart(each) for each in different.values())
    evidence = f"{', '.join(different)} differ, by {worst:.1e} of the largest output"
    # Elsewhere (another processor, thread count or version) kernels sum in another order; that far may it move.
    passed = None if moved and worst < 1e-3 else False  # within rounding, and yet not identical
    if moved:
        evidence += f"; the environment differs ({moved})"
    return [state, Finding(f"outputs identical ({auto})", passed, evidence)]


def _measure_apart(output: Mapping[str, Any]) -> float:
    """Returns how far an output is off, of its largest value; by inf, where it is of another shape or no number."""
    far = output["distance"] / max(output["scale"], 1e-12) if output["distance"] is not None else math.inf
    return far if math.isfinite(far) else math.inf
