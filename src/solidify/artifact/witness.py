"""Loads model directories in a process of its own and says whether each is what its certificate says.

Run as a script: reads a request (JSON) from its standard input and writes the answer (JSON) into the file named
there. It does not import solidify, and makes the packages that its arguments name impossible to import.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import mmap
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

PAGE = 4096  # bytes that one sample looks at
SAMPLES = 5
_PR_SET_PDEATHSIG = 1
_WILLNEED = 3  # MADV_WILLNEED, on Linux and elsewhere
REPEATS = 2  # fresh loads that must agree where the first did not
OUTPUTS = ("logits", "logits_per_image", "last_hidden_state")  # what is compared: the first of these that there is


def main() -> None:
    """Answers the request on the standard input; the arguments are the names of what must not be imported."""
    _end_with_parent()
    forbidden = sys.argv[1:]
    for name in forbidden:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it now fails as if it were not installed
    warnings.simplefilter("ignore")

    gc.disable()
    import transformers
    from transformers import PreTrainedModel  # noqa: F401  # what takes its time is done before the request is there

    gc.freeze()  # what is imported stays: to look through it for garbage, again and again, took a third of the time
    gc.enable()
    asked = sys.stdin.read()
    if not asked:
        return  # who would have asked is gone
    request = json.loads(asked)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    behaviour = _import_files(Path(request["behaviour"]))
    answers = {d: _check_directory(Path(d) / request["certificate"], behaviour) for d in request["directories"]}
    imported = [name for name in forbidden if sys.modules.get(name) is not None]
    answer = json.dumps({"imported": imported, "directories": answers})
    Path(request["answer"]).write_text(answer, encoding="utf-8")


def _end_with_parent() -> None:
    """Has Linux end this process with the thread that started it; elsewhere it ends when it has answered."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _import_files(directory: Path) -> Any:
    """Imports the files of one directory by its path, as a package of their own that is called as the directory is."""
    spec = importlib.util.spec_from_file_location(
        directory.name, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    for file in sorted(directory.glob("[!_]*.py")):
        importlib.import_module(f"{spec.name}.{file.stem}")
    return package


def _check_directory(certificate: Path, behaviour: Any) -> dict[str, Any]:
    """Loads one directory through every Auto class that its configuration names."""
    import torch
    import transformers

    expected = json.loads((certificate / "state.json").read_text(encoding="utf-8"))
    config = json.loads((certificate.parent / "config.json").read_text(encoding="utf-8"))
    torch.set_num_threads(expected["environment"]["threads"])
    heap = [torch.full((2**n,), 7e8) for n in range(8, 20) for _ in range(8)]
    del heap  # what is never filled now holds this and not a lucky zero
    loads: dict[str, Any] = {}
    first: dict[str, str] = {}
    for auto, reference in config["auto_map"].items():
        if auto != "AutoConfig" and reference in first:
            loads[auto] = _same_class(certificate.parent, auto, first[reference])
        elif auto != "AutoConfig":
            first[reference] = auto
            forgiving = not any("once" in load for load in loads.values())
            loads[auto] = _load_steadily(certificate, config, auto, expected, behaviour, forgiving=forgiving)
            gc.collect()  # a model is a cycle, and holds what it mapped
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    return {"environment": environment, "loads": loads}


def _same_class(directory: Path, auto: str, other: str) -> dict[str, Any]:
    """Builds the model without weights through one Auto class and looks whether it is what another one builds."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
    kinds = []
    for name in (auto, other):
        try:
            with torch.device("meta"):
                model = getattr(transformers, name).from_config(config, trust_remote_code=True)
        except Exception as error:  # whatever stops a model from being built is the finding
            return {"error": f"{type(error).__name__}: {error}"}
        kinds.append(f"{type(model).__module__}.{type(model).__name__}")
    return {"same_as": other} if kinds[0] == kinds[1] else {"error": f"builds {kinds[0]}, and {other} {kinds[1]}"}


def _load_steadily(
    certificate: Path, config: dict[str, Any], auto: str, expected: dict[str, Any], behaviour: Any, *, forgiving: bool
) -> dict[str, Any]:
    """Loads and compares as `_check_auto`; if a single pass differs, loads anew, to see whether the model does that.

    Kernel libraries settle on their way when they are first used, and the first pass of a process was seen to differ in
    its last bits from all others. If fresh loads in the same process are bit-identical throughout, `once` says which
    case differed and how far. What differs by itself (an alignment, a buffer, chance) differs again; a process in which
    a second pass differs is not `forgiving`.
    """
    answer = _check_auto(certificate, config, auto, expected, behaviour)
    different = {name: case for name, case in answer.get("outputs", {}).items() if not case["equal"]}
    if not forgiving or len(different) != 1 or not all(_is_finite(case["distance"]) for case in different.values()):
        return answer
    for _ in range(REPEATS):
        gc.collect()
        again = _check_auto(certificate, config, auto, expected, behaviour)
        if "error" in again or not all(case["equal"] for case in again.get("outputs", {}).values()):
            return answer
    (name, case), *_ = different.items()
    again["once"] = {"case": name, "by": case["distance"] / max(case["scale"], 1e-12)}
    return again


def _check_auto(
    certificate: Path, config: dict[str, Any], auto: str, expected: dict[str, Any], behaviour: Any
) -> dict[str, Any]:
    """Loads through one Auto class, compares state and outputs, and measures how the whole model behaves."""
    import transformers

    start = time.perf_counter()
    implementations = {k: v for k, v in expected["implementations"].items() if v is not None}
    try:
        model, info = getattr(transformers, auto).from_pretrained(
            certificate.parent, trust_remote_code=True, output_loading_info=True, **implementations
        )
    except Exception as error:  # whatever stops a model from loading is the finding
        return {"error": f"{type(error).__name__}: {error}"}
    answer: dict[str, Any] = {"class": type(model).__name__, "seconds": time.perf_counter() - start}
    model = model.eval().to(expected["device"])
    whole = type(model).__name__ in config["architectures"]
    backbone = model.base_model is model
    own = "" if whole or backbone else model.base_model_prefix + "."
    theirs = "" if whole else expected["prefix"]

    def known_as(name: str) -> str | None:
        """Returns the name that a tensor has in the certificate; None for what belongs to a head of another kind."""
        return theirs + name.removeprefix(own) if name.startswith(own) else None

    module_names = [name for edit in config["surgery"] for name in edit["modules"]]
    _switch_caches_off(model)
    found = _collect_state(model, known_as, module_names)
    answer["meta"] = sorted(n for kind in found.values() for n, value in kind.items() if getattr(value, "is_meta", 0))
    wanted = {kind: {n: v for n, v in expected[kind].items() if n.startswith(theirs)} for kind in found}
    answer["loading_info"] = {}
    for kind, names in info.items():
        # A head of another kind brings tensors that the artifact cannot have; nothing else may be missing.
        strict = [
            str(n) for n in names if whole or backbone or kind != "missing_keys" or known_as(n) in wanted["state"]
        ]
        if strict:
            answer["loading_info"][kind] = sorted(strict)
    if not answer["meta"]:  # some models keep state of what they ran, so they run first, as they did in memory
        answer |= _compare_outputs(certificate, model, "hidden" if theirs else "logits", whole, behaviour)
        answer.setdefault("outputs", {}).update(_call_modules(certificate, model, expected["modules"], own, theirs))
        found = _collect_state(model, known_as, module_names)
    answer["sampled"] = bool(expected["samples"])
    if answer["sampled"]:
        wanted["state"] = {name: expected["samples"][name] for name in wanted["state"]}
        found["attributes"] = {
            n: t for n, t in found["attributes"].items() if n.startswith(tuple(p + "." for p in module_names))
        }
        _announce_pages(found["state"].values())
    for kind, values in found.items():
        digest = _digest_pages if kind == "state" and answer["sampled"] else _digest_tensor
        answer[kind] = _compare_state(values, wanted[kind], digest, additional=whole or backbone)
    if whole and not answer["meta"] and "distances" in expected.get("contract", {}):
        answer["behaviour"] = _measure_contract(certificate, model, expected["contract"], behaviour)
    return answer


def _measure_contract(certificate: Path, model: Any, contract: dict[str, Any], behaviour: Any) -> dict[str, Any]:
    """Measures the properties of the contract as they were measured in memory."""
    from safetensors.torch import load_file

    held = load_file(certificate / "contract.safetensors")
    inputs = {key: tensor.clone().to(model.device) for key, tensor in held.items()}  # a copy is aligned
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: behaviour.values.noise(name, parameters[name]) for name in contract["fresh"]}
    options = {key: contract[key] for key in ("at", "leave", "wide")}
    asked = behaviour.properties.Reading(contract["distances"], packed=contract["packed"], padded=contract["padded"])
    asked.way = tuple(contract["way"])
    try:
        with behaviour.calling.buffers_kept(model):
            found = behaviour.probes.read(behaviour.watching.Watched(model, inputs, values=values, **options), asked)
    except Exception as error:  # whatever stops it from running is the finding
        return {"error": f"{type(error).__name__}: {error}"}
    dtype = str(model.dtype).removeprefix("torch.")
    return {"distances": found.distances, "recorded": found.recorded, "errors": found.errors, "dtype": dtype}


def _switch_caches_off(model: Any) -> None:
    """Makes sure that no part of the model keeps what it saw, whatever its own default is."""
    from transformers import PreTrainedConfig

    for module in model.modules():
        for config in [v for v in vars(module).values() if isinstance(v, PreTrainedConfig)]:
            if getattr(config, "use_cache", False):
                config.use_cache = False


def _collect_state(model: Any, known_as: Any, module_names: list[str]) -> dict[str, dict[str, Any]]:
    """Collects tensors by the names of the certificate: parameters and buffers, plain attributes that are tensors, and
    the plain numbers and words of the modules that the surgery made."""
    import torch

    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    state = {known_as(name): tensor for name, tensor in tensors}
    state.pop(None, None)
    attributes, values = {}, {}
    for owner, module in model.named_modules():
        name = known_as(f"{owner}." if owner else "")
        if name is None:
            continue
        made = any(name.startswith(module_name + ".") for module_name in module_names)
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                attributes[name + key] = value
            elif made and key != "training" and not key.startswith("_") and isinstance(value, (bool, int, float, str)):
                values[name + key] = value
    return {"state": state, "attributes": attributes, "values": values}


def _compare_state(found: dict[str, Any], wanted: dict[str, Any], digest: Any, *, additional: bool) -> dict[str, Any]:
    equal = {name for name, value in found.items() if name in wanted and _is_same(digest(value), wanted[name])}
    return {
        "absent": sorted(name for name in wanted if name not in found),
        "additional": sorted(name for name in found if name not in wanted) if additional else [],
        "different": sorted(name for name in found if name in wanted and name not in equal),
        "equal": len(equal),
    }


def _is_same(value: Any, other: Any) -> bool:
    return bool(value == other) or (value != value and other != other)  # not a number


def _compare_outputs(certificate: Path, model: Any, kind: str, whole: bool, behaviour: Any) -> dict[str, Any]:
    """Runs the certificate's cases through the model, or through its part without a head, and compares."""
    from safetensors.torch import load_file

    inputs, outputs = (load_file(certificate / f"{name}.safetensors") for name in ("inputs", "outputs"))
    answer = {}
    for case in sorted({key.split("/")[0] for key in inputs}):  # in memory they ran in this order too
        wanted = outputs.get(f"{case}/{kind}")
        if wanted is not None:
            own = {k.split("/")[1]: t for k, t in inputs.items() if k.startswith(case + "/")}
            arguments = {key: tensor.clone().to(model.device) for key, tensor in own.items()}  # a copy is aligned
            try:
                answer[case] = _compare_tensors(
                    _run_model(model if whole else model.base_model, arguments, behaviour).cpu(), wanted
                )
            except Exception as error:  # whatever stops it from running is the finding
                return {"outputs": answer, "error": f"{case}: {type(error).__name__}: {error}"}
    return {"outputs": answer}


def _call_modules(
    certificate: Path, model: Any, modules: list[dict[str, Any]], own: str, theirs: str
) -> dict[str, dict[str, Any]]:
    """Calls single modules with what they were given at the time of the certificate, and compares what they return."""
    import torch
    from safetensors.torch import load_file

    inputs, outputs = (load_file(certificate / f"{name}.safetensors") for name in ("inputs", "outputs"))
    answer = {}
    for call in modules:
        if not call["name"].startswith(theirs):
            continue
        module = model.get_submodule(own + call["name"].removeprefix(theirs))
        args, kwargs = (_make_value(call[key], inputs, model.device) for key in ("args", "kwargs"))
        wanted = [tensor for key, tensor in outputs.items() if key.rpartition("/")[0] == call["name"]]
        try:
            with torch.no_grad():
                returned = _tensors_in(module(*args, **kwargs))
        except Exception as error:  # whatever stops it from running is the finding
            return {call["name"]: {"equal": False, "distance": None, "scale": None, "error": str(error)}}
        pairs = [_compare_tensors(t.cpu(), w) for t, w in zip(returned, wanted, strict=False)]
        if len(returned) != len(wanted):
            pairs.insert(0, {"equal": False, "distance": None, "scale": None})
        answer[call["name"]] = next((pair for pair in pairs if not pair["equal"]), pairs[0])
    return answer


def _make_value(value: dict[str, Any], inputs: dict[str, Any], device: Any) -> Any:
    """Makes a value of its description."""
    ((kind, content),) = value.items()
    if kind == "tensor":
        return inputs[content].clone().to(device)  # a copy is aligned, and what is mapped need not be
    if kind == "dict":
        return {key: _make_value(item, inputs, device) for key, item in content.items()}
    if kind in ("tuple", "list"):
        items = [_make_value(item, inputs, device) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


def _tensors_in(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for item in value for t in _tensors_in(item)] if isinstance(value, (tuple, list)) else []


def _digest_pages(tensor: Any) -> Any:
    """Digests dtype and shape, and pages spread evenly over the bytes, both ends included."""
    import torch
    from blake3 import blake3

    if tensor.is_meta:
        return "meta"
    hasher = blake3(f"{tensor.dtype}{list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat = flat.view(torch.uint8).numpy() if flat.numel() else flat.numpy()
    for begin in _list_samples(len(flat)):
        hasher.update(flat[begin : begin + PAGE].data if len(flat) else b"")
    return hasher.hexdigest()


def _list_samples(size: int) -> list[int]:
    last = max(0, size - PAGE)
    return [last * number // (SAMPLES - 1) for number in range(SAMPLES)]


def _announce_pages(tensors: Any) -> None:
    """Has the disk fetch all that `_digest_pages` will look at at once; where a system cannot, it does nothing."""
    with suppress(OSError, AttributeError, TypeError):
        advise = ctypes.CDLL(None).madvise
        for tensor in (t for t in tensors if t.device.type == "cpu" and t.is_contiguous() and t.nbytes):
            for address in (tensor.data_ptr() + begin for begin in _list_samples(tensor.nbytes)):
                before = address % mmap.PAGESIZE
                advise(ctypes.c_void_p(address - before), ctypes.c_size_t(before + PAGE), _WILLNEED)


def _run_model(model: Any, inputs: dict[str, Any], behaviour: Any) -> Any:
    import torch

    if "use_cache" in behaviour.calling.takes(model):
        inputs = {**inputs, "use_cache": False}
    with torch.no_grad(), behaviour.calling.buffers_kept(model):
        outputs = model(**inputs)
    return next(outputs[key] for key in OUTPUTS if isinstance(outputs.get(key), torch.Tensor))


def _compare_tensors(found: Any, wanted: Any) -> dict[str, Any]:
    import torch

    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return {"equal": False, "distance": None, "scale": None}
    distance = float((found.double() - wanted.double()).abs().max())
    scale = float(wanted.double().abs().max())
    return {"equal": torch.equal(found, wanted), "distance": distance, "scale": scale}


def _is_finite(distance: float | None) -> bool:
    return distance is not None and abs(distance) < float("inf")


def _digest_tensor(tensor: Any) -> Any:
    import torch

    if not isinstance(tensor, torch.Tensor):
        return tensor
    if tensor.is_meta:
        return "meta"
    from blake3 import blake3

    hasher = blake3(f"{tensor.dtype}{list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return hasher.hexdigest()


if __name__ == "__main__":
    main()
    os._exit(0)  # whatever threads the code that was loaded has begun
