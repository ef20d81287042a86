"""Operations on every family of transformers: what is built must reload bit-identical in a process without us.

About twenty families run by default, all of them in the slow test, which writes docs/families.md. Many artifacts
share one fresh process.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import families
import pico  # noqa: F401 (puts the user's modules on the path)
import pytest
import torch
from family_modules import Gained, LowRank
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import solidify
from solidify.artifact import certificate
from solidify.artifact.solidify import assemble
from solidify.behaviour import probes, watching
from solidify.findings import Finding
from solidify.model import anatomy, probing

COLUMNS = ("feed_forward", "attention_or_mixer", "projector")
REPRESENTATIVE = (
    ("olmoe", "AutoModelForCausalLM"),
    ("llama", "AutoModelForCausalLM"),
    ("qwen3", "AutoModelForCausalLM"),
    ("qwen3_moe", "AutoModelForCausalLM"),
    ("mixtral", "AutoModelForCausalLM"),
    ("gemma3_text", "AutoModelForCausalLM"),
    ("gpt2", "AutoModelForCausalLM"),
    ("mamba2", "AutoModelForCausalLM"),
    ("jamba", "AutoModelForCausalLM"),
    ("falcon_h1", "AutoModelForCausalLM"),
    ("deepseek_v3", "AutoModelForCausalLM"),
    ("gpt_neox", "AutoModelForCausalLM"),
    ("bert", "AutoModelForMaskedLM"),
    ("camembert", "AutoModelForMaskedLM"),
    ("modernbert", "AutoModelForMaskedLM"),
    ("deberta-v2", "AutoModelForSequenceClassification"),
    ("llama", "AutoModelForTokenClassification"),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("bart", "AutoModelForSeq2SeqLM"),
    ("vit", "AutoModelForImageClassification"),
    ("siglip", "AutoModelForImageClassification"),
    ("whisper", "AutoModelForSpeechSeq2Seq"),
    ("llava", "AutoModelForImageTextToText"),
    ("qwen2_vl", "AutoModelForImageTextToText"),
)

# Why a family has no module for a column, by the class of what it has instead.
WITHOUT = {
    "feed_forward": "none: its linear layers stand in the layer itself, or it has only mixers",
    "attention_or_mixer": "none: its layers hold no module that mixes positions by itself",
    "projector": "none: no linear layer outside the two others",
}


SHARED = "its blocks share weights between layers; a wrap of one of the modules is refused, with the names"
NO_INPUTS = "the probe cannot make up what it takes"
KNOWN = {
    "zamba": SHARED,
    "zamba2": SHARED,
    "perceiver": NO_INPUTS + " (images as the inputs of a text model's name)",
    "siglip2": NO_INPUTS + " (patches with their spatial shapes)",
    "instructblip": NO_INPUTS + " (a second stream of tokens)",
    "pix2struct": NO_INPUTS + " (flattened patches with their rows and columns)",
    "blip-2": NO_INPUTS + " (image tokens before the text)",
    "inkling2": "its text model reads the hub's layout and converts ours, which is in memory's, once more",
    "lighton_ocr": "plain transformers cannot load its own AutoModel either: the part without a head has no prefix",
}


OPERATIONS = [column.replace("_", " ") for column in COLUMNS]
HEADINGS = ("family", "head", *OPERATIONS, "Auto classes", "verdict", "generate", "LoRA by PEFT", "depth")
EQUAL = "with a cache as without"

# Families in which a layer's kind follows from its number, or layers share what they compute: refused, model unchanged.
DEPTH_REFUSED = {
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "jamba",
    "longcat_flash",
    "mllama",
    "prophetnet",  # made with three layers instead of two, its own n-gram stream sees later positions
    "qwen4_exp",
    "qwen4_exp_text",
    "zamba",
    "zamba2",
}


@dataclass
class Case:
    """One family: what was done, and what the fresh process found. `fault` says what stopped it before."""

    model_type: str
    auto: str
    head: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    autos: list[str] = field(default_factory=list)
    fault: str = ""
    directory: Path | None = None
    findings: list[Finding] = field(default_factory=list)
    generates: str = "not a language model: not tried"
    trains: str = "no linear layer was replaced"
    depth: str = "not a language model: not tried"
    deeper: Path | None = None

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        told = [self.fault] if self.fault else []
        return told + [f"{f.name}: {f.evidence}" for f in self.findings if f.passed is False]


def operate(case: Case, directory: Path) -> None:
    """Builds the family's model, wraps two modules, replaces a third by one of low rank, and writes the artifact."""
    model = families.tiny(case.model_type, case.auto)
    case.head = type(model).__name__
    places = families.targets(model)
    case.cells = {column: WITHOUT[column] for column in COLUMNS if column not in places}
    before = anatomy.run(model, probing.probe_inputs(model))
    generates = told_of_generation(model) if case.auto == "AutoModelForCausalLM" else ""
    torch.manual_seed(1)
    edits = []
    for column, name in places.items():
        wraps = column != "projector"
        settings = {"arguments": {"scale": 0.5}} if wraps else {}
        edits += solidify.replace(model, name, Gained if wraps else LowRank, count=1, **settings)
        case.cells[column] = f"{'wrapped' if wraps else 'replaced'} {edits[-1].old_class}"
        if wraps:
            torch.nn.init.constant_(model.get_submodule(name).gain, 0.5)
    after = anatomy.run(model, probing.probe_inputs(model))
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    assemble(model, edits, directory)
    named = json.loads((directory / "config.json").read_text(encoding="utf-8"))["auto_map"]
    case.autos = [auto for auto in named if auto != "AutoConfig"]
    case.directory = directory
    if case.auto == "AutoModelForCausalLM":
        told = told_of_generation(model)
        case.generates = told if told in (generates, EQUAL) else f"NO: {told}, on the base: {generates}"
    if "projector" in places:
        case.trains = told_of_lora(model, places["projector"])


def told_of_generation(model: PreTrainedModel) -> str:
    """Generates greedily with a cache and without, and says whether the tokens agree."""
    if not model.can_generate():
        return "it cannot, nor can the base"
    inputs = {key: tensor for key, tensor in probing.probe_inputs(model).items() if key != "mm_token_type_ids"}
    if probes.read(watching.Watched(model, inputs)).distances.get("causal", 1.0) > 1e-4:
        return "not causal as it is configured, so a cache could not agree"
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    try:
        said = [model.generate(**inputs, use_cache=use_cache, **options) for use_cache in (True, False)]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        return f"fails as on the base ({type(error).__name__})"
    return EQUAL if torch.equal(*said) else "differs as on the base"


def told_of_lora(model: PreTrainedModel, name: str) -> str:
    """Puts plain PEFT's LoRA on the new module's own layers and takes a step; says whether it moved the output."""
    inputs = probing.probe_inputs(model)
    before = anatomy.run(model, inputs)
    peft_model = get_peft_model(
        model, LoraConfig(target_modules=[f"{name}.down", f"{name}.up"], init_lora_weights=False)
    )
    trained = {n for n, p in peft_model.named_parameters() if p.requires_grad}
    assert len(trained) == 4, trained
    if torch.equal(anatomy.run(model, inputs), before):
        return "NO: it does not move the output" if _is_heard(model, name) else "not tried: the probe's output lacks it"
    with peft_model.disable_adapter():
        off = anatomy.run(model, inputs)
    # PEFT's wrapper casts and copies what goes in, so kernels may sum in another order: some units in the last place.
    distance = float((off - before).abs().max() / before.abs().max())
    if distance > 1e-5:
        return f"NO: off, it differs by {distance:.1e}"
    return "moves it; off: as before" if distance == 0 else "moves it; off: within rounding"


def _is_heard(model: PreTrainedModel, name: str) -> bool:
    """Returns whether anything that the module could return reaches the model's output."""
    inputs = probing.probe_inputs(model)
    before = anatomy.run(model, inputs)
    handle = model.get_submodule(name).register_forward_hook(lambda _module, _args, output: 1000 * output + 1)
    heard = not torch.equal(anatomy.run(model, inputs), before)
    handle.remove()
    return heard


def deepen(case: Case, directory: Path) -> None:
    """Copies the last layer of the longest stack, removes the original, copies the first; writes the artifact."""
    model = families.tiny(case.model_type, case.auto)
    stacks = {
        name: anatomy.count(module.parameters())
        for name, module in model.named_modules()
        if type(module) is torch.nn.ModuleList and len(module) > 1 and not any(p.isdigit() for p in name.split("."))
    }
    name = max(stacks, key=lambda name: stacks[name])
    size = len(model.get_submodule(name))
    edits = solidify.insert(model, f"{name}.{size - 1}")
    edits += solidify.remove(model, f"{name}.{size}")
    edits += solidify.insert(model, f"{name}.0")
    assemble(model, edits, directory)
    case.deeper = directory


def attempt_depth(listed: Collection[Case], root: Path) -> None:
    """Changes the depth of every language model; a refusal is told in its own words."""
    tried = [case for case in listed if case.auto == "AutoModelForCausalLM"]
    for case in tried:
        try:
            deepen(case, root / f"{case.model_type}-depth")
        except solidify.SolidifyError as error:
            case.depth = "refused: " + " ".join(str(error).split())[:160].replace("|", "\\|")
    written = {case.deeper: case for case in tried if case.deeper is not None}
    for directory, findings in certificate.witness_all(list(written)).items():
        faults = [f"{f.name}: {f.evidence}" for f in findings if f.passed is False]
        written[directory].depth = f"NO: {faults[0][:160]}" if faults else "bit-identical"


def attempt(listed: Collection[Case], root: Path) -> None:
    """Operates on every family and lets one fresh process load what was written.

    On one thread: for models this small a second one costs more than it saves, the more so where cores are shared.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for case in listed:
        try:
            operate(case, root / f"{case.model_type}-{case.auto}")
        except Exception as error:  # whatever stops one family is reported as its fault, and stops no other
            case.fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
    torch.set_num_threads(threads)
    witness(listed)


def witness(listed: Iterable[Case]) -> None:
    """Lets one fresh process load what was written."""
    written = {case.directory: case for case in listed if case.directory is not None}
    for directory, findings in certificate.witness_all(list(written)).items():
        written[directory].findings = findings


@pytest.fixture(scope="module")
def witnessed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Case]:
    """The representative families, all loaded by one fresh process."""
    found = {(model_type, auto): Case(model_type, auto) for model_type, auto in REPRESENTATIVE}
    attempt(found.values(), tmp_path_factory.mktemp("families"))
    return found


@pytest.mark.parametrize(("model_type", "auto"), REPRESENTATIVE)
def test_an_edited_family_reloads_bit_identical(
    model_type: str, auto: str, witnessed: Mapping[tuple[str, str], Case]
) -> None:
    case = witnessed[model_type, auto]
    assert case.faults == []
    told = {finding.name for finding in case.findings}
    assert auto in case.autos
    assert all(any(name.endswith(f"({offered})") for name in told) for offered in case.autos)
    assert any(finding.passed and finding.name.startswith("outputs identical") for finding in case.findings)


def test_every_causal_language_model_has_a_row_or_a_reason() -> None:
    rows = {name for name, auto in families.cases() if auto == "AutoModelForCausalLM"}
    assert rows | set(families.LEFT_OUT) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not rows & set(families.LEFT_OUT)
    assert len(families.cases()) - len(rows) >= 40


@pytest.mark.parametrize("model_type", families.LEFT_OUT)
def test_what_is_left_out_cannot_be_built(model_type: str) -> None:
    with pytest.raises((ImportError, ValueError), match=r"timm|layer types producing a cache"):
        families.tiny(model_type)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch, on Lasr's convolutions
def test_every_family_reloads_bit_identical(tmp_path: Path) -> None:
    """Writes the table whether or not all pass, so that a failure stands in it with its reason."""
    listed = [Case(model_type, auto) for model_type, auto in families.cases()]
    attempt(listed, tmp_path)
    attempt_depth(listed, tmp_path)
    Path(__file__).parents[1].joinpath("docs", "families.md").write_text(table(listed), encoding="utf-8")
    failed = {case.model_type: case.faults for case in listed if case.faults}
    assert failed.keys() == KNOWN.keys(), {name: failed.get(name) for name in failed.keys() ^ KNOWN.keys()}
    assert {case.model_type for case in listed if case.depth.startswith("refused")} == DEPTH_REFUSED
    told = {case.model_type: [case.depth, case.generates, case.trains] for case in listed}
    assert not {name: words for name, words in told.items() if any(word.startswith("NO") for word in words)}


def table(listed: list[Case]) -> str:
    """Returns the matrix as Markdown: a row for each family and head, and the reasons for what is left out."""
    passed = sum(not case.faults for case in listed)
    tried = sum(case.auto == "AutoModelForCausalLM" for case in listed)
    deeper = sum(case.depth == "bit-identical" for case in listed)
    lines = [
        "# Families",
        "",
        "Every model type of transformers' causal-LM mapping, and others by other heads, each as a tiny model with",
        "real operations: a wrapped feed-forward, a wrapped attention or mixer, and a linear layer replaced by one of",
        "low rank, in one artifact. The verdict is that of a fresh process without solidify and peft: every tensor",
        "and every output bit-identical, loading info empty, through every Auto class named. Written by",
        "`make test-all`.",
        "",
        "Clients: `generate` greedily with and without a cache; plain PEFT's LoRA on the layers of the low-rank",
        "module, on and off.",
        "",
        f"{passed} of {len(listed)} pass. The last column is a second artifact, of another depth: {deeper} of {tried}",
        "language models are bit-identical, the others are refused with the model unchanged.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---" * len(HEADINGS) + "|",
    ]
    for case in listed:
        cells = [case.cells.get(column, "not reached") for column in COLUMNS]
        fault = " ".join("; ".join(case.faults).split())[:300].replace("|", "\\|")
        verdict = "no: " + KNOWN.get(case.model_type, fault) if case.faults else "bit-identical"
        told = [case.generates, case.trains, case.depth]
        autos = ", ".join(auto.removeprefix("AutoModelFor") for auto in case.autos) or "none"
        lines.append(f"| {' | '.join([case.model_type, case.head or case.auto, *cells, autos, verdict, *told])} |")
    lines += ["", "Left out:", ""]
    lines += [f"* {name}: {reason}." for name, reason in families.LEFT_OUT.items()]
    return "\n".join(lines) + "\n"
