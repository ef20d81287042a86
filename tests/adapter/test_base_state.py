"""Is the model in memory the artifact that it came from, when an adapter is attached, loaded and saved?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import solidify
from solidify.adapter import base_state, reading
from solidify.errors import AdapterError
from solidify.weights import mapped

Q = "model.layers.*.self_attn.q_proj"
LORA: dict[str, Any] = {"r": 2, "target_modules": [Q]}


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama with scaled feed-forwards."""
    directory = tmp_path_factory.mktemp("artifacts") / "scaled"
    model = pico.llama()
    pico.artifact(model, solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled), directory)
    return directory


def noise(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def one_number(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.original.down_proj.weight[3, 5] += 1e-6


def through_data(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data * 1.5


def data_in_place(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0].neg_()


def resized(model: Any) -> None:
    model.resize_token_embeddings(132)


def swapped(model: Any) -> None:
    model.model.layers[0].mlp.original.act_fn = nn.GELU()


def initialised(model: Any) -> None:
    nn.init.normal_(model.lm_head.weight)


def setting(model: Any) -> None:
    model.config.rms_norm_eps = 0.1


def added(model: Any) -> None:
    model.model.layers[0].register_parameter("extra", nn.Parameter(torch.ones(1)))


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "one number": (one_number, "model.layers.1.mlp.original.down_proj.weight has other values"),
    "through data": (through_data, "model.norm.weight has other values"),
    "data in place": (data_in_place, "model.layers.0.self_attn.k_proj.weight has other values"),
    "resized": (resized, r"shape \[132, 32\] in the model and \[128, 32\] in the artifact"),
    "swapped": (swapped, "model.layers.0.mlp.original.act_fn is GELU in the model and SiLU"),
    "initialised": (initialised, "lm_head.weight has other values"),
    "setting": (setting, "config.rms_norm_eps is 0.1"),
    "added": (added, "model.layers.0.extra is not in the artifact"),
}


def by_solidify(directory: Path) -> Any:
    return solidify.load(directory)


def by_transformers(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()


@pytest.mark.parametrize("load", [by_solidify, by_transformers])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused_before_it_is_trained(artifact: Path, change: str, load: Any) -> None:
    model = load(artifact)
    apply, words = CHANGES[change]
    apply(model)
    with pytest.raises(AdapterError, match=words) as caught:
        solidify.attach(model, lora=LORA)
    assert "solidify.merge" in str(caught.value)
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("load", [by_solidify, by_transformers])
def test_a_model_as_it_was_loaded_is_attached_saved_and_loaded(artifact: Path, tmp_path: Path, load: Any) -> None:
    model = noise(solidify.attach(load(artifact), lora=LORA, train=["model.norm", "**.mlp.scale"]))
    solidify.save_adapter(model, tmp_path / "adapter")
    again = solidify.load_adapter(load(artifact), tmp_path / "adapter")
    tokens = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("change", ["one number", "through data", "data in place", "swapped", "setting"])
def test_a_base_that_changes_after_attach_is_refused_when_the_adapter_is_saved(
    artifact: Path, tmp_path: Path, change: str
) -> None:
    model = noise(solidify.attach(solidify.load(artifact), lora=LORA))
    apply, words = CHANGES[change]
    apply(model.get_base_model())
    with pytest.raises(AdapterError, match=words):
        solidify.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_is_not_loaded_on_a_changed_base(artifact: Path, tmp_path: Path) -> None:
    solidify.save_adapter(noise(solidify.attach(solidify.load(artifact), lora=LORA)), tmp_path / "adapter")
    model = solidify.load(artifact)
    one_number(model)
    with pytest.raises(AdapterError, match="has other values"):
        solidify.load_adapter(model, tmp_path / "adapter")


def test_an_adapter_that_was_merged_in_memory_makes_another_base(artifact: Path, tmp_path: Path) -> None:
    first = noise(solidify.attach(solidify.load(artifact), lora=LORA, train=["**.mlp.scale"]))
    merged = first.merge_and_unload()
    with pytest.raises(AdapterError, match=r"q_proj.weight has other values(.|\n)*mlp.scale"):
        solidify.attach(merged, lora={"r": 2, "target_modules": ["**.v_proj"]})


def test_an_artifact_that_was_replaced_since_it_was_loaded_is_named(
    artifact: Path, copy_of: Callable[..., Path], tmp_path: Path
) -> None:
    place = copy_of(artifact, "artifact")
    model = solidify.load(place)
    shutil.rmtree(place)
    other = pico.llama(seed=5)
    pico.artifact(other, solidify.replace(other, "model.layers.*.mlp", pico.wrappers.Scaled), place)
    with pytest.raises(AdapterError, match=r"was replaced by another since the model was loaded(.|\n)*weights"):
        solidify.attach(model, lora=LORA)
    again = noise(solidify.attach(solidify.load(place), lora=LORA))
    shutil.rmtree(place)
    shutil.copytree(artifact, place)
    with pytest.raises(AdapterError, match="was replaced by another since the model was loaded"):
        solidify.save_adapter(again, tmp_path / "adapter")


def test_a_base_in_another_dtype_is_the_artifact_cast(artifact: Path, tmp_path: Path) -> None:
    model = solidify.attach(solidify.load(artifact, dtype=torch.bfloat16), lora=LORA)
    solidify.save_adapter(noise(model), tmp_path / "adapter")
    spoilt = solidify.load(artifact, dtype=torch.bfloat16)
    with torch.no_grad():
        spoilt.model.norm.weight[0] += 0.5
    with pytest.raises(AdapterError, match=r"model.norm.weight has other values"):
        solidify.attach(spoilt, lora=LORA)


def test_what_trainers_set_is_no_other_base(artifact: Path, tmp_path: Path) -> None:
    model = solidify.load(artifact)
    model.config.use_cache = False
    peft_model = noise(solidify.attach(model, lora=LORA))
    model.config.pad_token_id, model.config.attention_dropout, model.config.output_hidden_states = 5, 0.1, True
    saved = solidify.save_adapter(peft_model, tmp_path / "adapter")
    again = solidify.load_adapter(solidify.load(artifact), saved)
    tokens = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, peft_model.eval()(tokens).logits)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama that classifies sequences, with scaled feed-forwards."""
    directory = tmp_path_factory.mktemp("classifier") / "scaled"
    sizes = {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0}
    model = pico.make("LlamaForSequenceClassification", **sizes)
    pico.artifact(model, solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled), directory)
    return directory


def padding(config: Any) -> None:
    config.pad_token_id = 2


def permuted(config: Any) -> None:
    config.id2label = dict(zip(config.id2label, reversed(config.id2label.values()), strict=True))
    config.label2id = {label: number for number, label in config.id2label.items()}


def another_loss(config: Any) -> None:
    config.problem_type = "regression"


def another_start(config: Any) -> None:
    config.decoder_start_token_id = 5


SETTINGS: list[tuple[Callable[[Any], None], str]] = [
    (padding, "config.pad_token_id is 2 in the model and 0 in the artifact"),
    (permuted, "config.id2label.0 is 'LABEL_2' in the model and 'LABEL_0' in the artifact"),
    (permuted, "config.label2id.LABEL_0 is 2 in the model and 0 in the artifact"),
    (another_loss, "config.problem_type is 'regression' in the model and None in the artifact"),
    (another_start, "config.decoder_start_token_id is 5 in the model and None in the artifact"),
]


@pytest.mark.parametrize(("change", "said"), SETTINGS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_setting_that_outputs_labels_or_the_loss_follow_is_refused(
    classifier: Path, tmp_path: Path, change: Callable[[Any], None], said: str, when: str
) -> None:
    model = solidify.load(classifier)
    if when == "after":
        peft_model = solidify.attach(model, lora=LORA)
    change(model.config)
    with pytest.raises(AdapterError, match=said):
        if when == "before":
            solidify.attach(model, lora=LORA)
        else:
            solidify.save_adapter(peft_model, tmp_path / "adapter")


def test_what_a_classifier_s_loss_writes_down_itself_is_no_other_base(classifier: Path, tmp_path: Path) -> None:
    peft_model = noise(solidify.attach(solidify.load(classifier), lora=LORA))
    permuted(peft_model.config), permuted(peft_model.config)
    peft_model(input_ids=pico.tokens(), labels=torch.tensor([0] * len(pico.tokens()))).loss.backward()
    assert peft_model.config.problem_type == "single_label_classification"
    solidify.save_adapter(peft_model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("head", "read"),
    [
        ("GPT2ForSequenceClassification", {"pad_token_id"}),
        ("LlamaForCausalLM", set()),
        ("GPT2LMHeadModel", set()),
        ("BertForSequenceClassification", set()),
        ("BartForSequenceClassification", {"pad_token_id", "eos_token_id"}),
        ("T5ForConditionalGeneration", {"pad_token_id"}),
    ],
)
def test_whose_outputs_follow_a_token_s_id_is_read_in_the_code(head: str, read: set[str]) -> None:
    import transformers

    kind = getattr(transformers, head)
    with torch.device("meta"):
        model = kind(kind.config_class())
    assert reading.settings_read(model, {"pad_token_id", "eos_token_id", "bos_token_id"}) == read


def test_the_backbone_alone_is_named(artifact: Path) -> None:
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(artifact, trust_remote_code=True)
    with pytest.raises(AdapterError, match="and the artifact's is Solid"):
        solidify.attach(backbone, lora={"r": 2, "target_modules": ["**.q_proj"]})


def test_what_is_still_mapped_is_not_read_again(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests of a file are known, and the system says that no page of it was written to."""
    from solidify.artifact import tensors

    model = solidify.load(artifact)
    if not mapped.file_regions(model.state_dict()):
        pytest.skip("this system does not tell what is mapped")
    read: list[int] = []
    digest = tensors.digest
    monkeypatch.setattr(tensors, "digest", lambda t: (read.append(t.nbytes), digest(t))[1])
    base = base_state.require(model)
    base_state.refuse_changed(model, base)
    assert sum(read) == 0
    one_number(model)
    with pytest.raises(AdapterError):
        base_state.refuse_changed(model, base)
    assert sum(read) > 0


def test_a_page_that_was_written_to_and_swapped_out_is_the_processes_own() -> None:
    """As Linux' documentation of `pagemap` has the bits: 63 in memory, 62 swapped out, 61 of a file."""
    unread, of_file, own, swapped = 0, 1 << 63 | 1 << 61, 1 << 63, 1 << 62
    for entries, wanted in (((unread, of_file), False), ((of_file, own), True), ((unread, swapped), True)):
        assert bool(mapped._list_own(b"".join(entry.to_bytes(8, "little") for entry in entries)).any()) is wanted


def test_what_is_written_in_one_tensor_of_a_file_leaves_the_others_a_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(64, 1024) for name in "abc"}, path)
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in "abc"}
    assert set(mapped.file_regions(state)) == {"a", "b", "c"}
    state["b"][32, 5] += 1
    regions = mapped.file_regions(state)
    assert set(regions) == {"a", "c"}
    for name, (where, offset) in regions.items():
        assert where == path and path.read_bytes()[offset:][: state[name].nbytes] == state[name].numpy().tobytes()


def test_a_model_with_weight_norm_is_its_artifact(tmp_path: Path) -> None:
    """torch makes a class of its own for every parametrized module."""
    model = families.tiny("wav2vec2", "AutoModelForCTC")
    place = "wav2vec2.encoder.layers.0.feed_forward"
    pico.artifact(model, solidify.replace(model, place, pico.wrappers.Scaled), tmp_path / "artifact")
    loaded = solidify.load(tmp_path / "artifact")
    convolution = loaded.wav2vec2.encoder.pos_conv_embed.conv
    assert type(convolution).__name__ == "ParametrizedConv1d"
    adapted = solidify.attach(loaded, lora={"r": 2, "target_modules": ["**.q_proj"]})
    with torch.no_grad():
        convolution.parametrizations.weight.original1.add_(0.1)
    with pytest.raises(AdapterError, match=r"pos_conv_embed\.conv\.parametrizations\.weight\.original1"):
        solidify.attach(adapted, lora={"r": 2, "target_modules": ["**.v_proj"]}, name="other")
