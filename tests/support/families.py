"""Tiny models of transformers' families: the family's own default configuration, made small.

`tiny` takes a model type and an Auto class; `targets` says what can be operated on. Sizes are shrunk by what a field is
called (`SIZES`), nested configurations like outer ones; of a layer pattern one layer of every kind is kept. What a
family needs beside that stands in `OVERRIDES`, and what cannot be built here, with the reason, in `LEFT_OUT`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from solidify.model import anatomy, probing

VOCABULARY = 128
MAX_LAYERS = 4

# A field whose name matches gets the value, or its own where that is smaller. The first match counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab(_size)?(_base|_per_layer_input)?|codebook_size|num_centroids|num_embeddings", VOCABULARY),
    (r".*(experts_per_tok(en)?|topk|top_k|moe_k)", 2),
    (r"n_group|num_expert_group|o_groups|.*n_?groups|mamba_ngroups", 2),
    (r"topk_group", 1),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"(moe_)?(num|n)_shared_experts", 1),
    (r"(qk_rope|qk_nope|index)_head_dim|rotary_dim", 8),
    (r".*head_?(dim|size)|d_kv|dim_head|d_head|kv_channels|mamba_d_head|head_dim_.*", 16),
    (r".*(attention_|num_|n_|mamba_|attn_)heads|n_head|.*_n_heads|n_mamba_heads|linear_num_.*_heads", 4),
    (r".*rank", 16),
    (r".*(state_size|d_state)", 8),
    (r".*chunk_size|.*chunk_length|block_size|index_block_size|.*window(_size|_len)?|.*local_attention", 8),
    (r"(.*_)?moe.*(intermediate_size|ffn_hidden_size)|expert_ffn_hidden_size|shared_.*intermediate_size", 32),
    (
        r".*intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|n_inner|ffn_hidden_size|d_inner|.*mlp_dim|feed_forward_size",
        96,
    ),
    (r"hidden_size_per_layer_input|codebook_dim|vector_quantization_hidden_dimension", 16),
    (r".*hidden_(size|dim)(_.*)?|(.*_)?d_model|n_embd|.*embedding_size|lru_width|embed_size|dim_model_base", 64),
    (r".*(hidden|input|output|projection|embed(ding)?|emb|proj|out|in)_(size|dim)|dim|.*_dim", 64),
    (r"max_position_embeddings|.*(positions|n_ctx|max_length|seq_len|context_length|position_embeddings)", 128),
    (r"max_img_size", 64),
    (r".*image_size|crop_size|input_size", 32),
    (r".*patch_size", 8),
    (r".*num_mel_bins|feature_size|input_feat_size", 16),
    (r"prompt_length|prompt_types|segment_types|prompt_mid_dim", 8),
    (r"num_buckets|.*_num_buckets", 32),
    (r"(output|base|latent|nemo_conv|aspp_out)_channels|.*_out_channel", 32),
)
LAYERS = (
    r"num_hidden_layers|n_layers?|num_layers|depth|(num_)?(en|de)coder_layers|num_blocks|conf_num_hidden_layers|"
    r"num_global_layers"
)

# Lists of widths of stages, which belong together: all are divided by what makes the largest small.
WIDTHS = r"hidden_sizes|embed_dims?|(conv|tdnn)_dim|.*_channels|base_attn_unit_dims"

# Fields that a configuration computes from others.
RECOMPUTED = ("id2label", "label2id", "out_features", "out_indices", "_out_features", "_out_indices", "stage_names")

# Fields that say how many layers, from the first, are of another kind than the rest.
THRESHOLDS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MROPE = {"text_config": {"rope_parameters": {"mrope_section": [4, 2, 2]}}}
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        "full_attention": None,
    },
}
_ZAMBA = {
    "attention_head_dim": 32,
    "attention_hidden_size": 128,
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

# Where names do not suffice: sizes that depend on each other, defaults that no model can be built from, layer kinds
# that are computed from periods, and special tokens without which a model cannot run.
OVERRIDES: dict[str, dict[str, Any]] = {
    "blip-2": {"image_token_index": 120},
    "instructblip": {"image_token_index": 120},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1]}}},
    "granitemoehybrid": {"mamba_n_heads": 8, **_HYBRID},
    "hrm_text": {"num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "mobilebert": {"true_hidden_size": 64, "intra_bottleneck_size": 64, "embedding_size": 32},
    "mobilevit": {"neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32]},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "train_size": [16, 16],
        "output_shape": [1, 4, 16, 16],
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "hash_seed": 0,  # without it the buckets are drawn anew at every call
    },
    "shieldgemma2": {"yes_token_index": 100, "no_token_index": 101},
    "t5": {"decoder_start_token_id": 0},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "n_mamba_heads": 2},
    "zamba2": {**_ZAMBA, "n_mamba_heads": 8, "hybrid_layer_ids": [1, 3]},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm4v", "glm46v", "glm_ocr", "glmga"), _MROPE),
}

# What a default configuration needs to accept itself.
STARTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
}

_TIMM = "its vision tower is a timm model; timm and Pillow are no dependency of ours"
_UNBUILDABLE = (
    "transformers 5.23 cannot build it from any configuration: it requires all layers to share the keys of another "
    "model's, and `kv_sharing_modes` refuses a model none of whose layers makes them"
)
# Model types of transformers' causal-LM mapping that have no row, and why.
LEFT_OUT: dict[str, str] = {
    "gemma3n": f"{_TIMM} (its text model has a row: gemma3n_text)",
    "gemma4_assistant": _UNBUILDABLE,
    "gemma4_unified_assistant": _UNBUILDABLE,
}

# Model types beside the causal language models, by the Auto class through which they are built.
HEADS: dict[str, str] = {
    "AutoModelForMaskedLM": "albert bart bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert "
    "electra ernie esm esmc eurobert flaubert fnet funnel gte ibert jina_embeddings_v3 layoutlm longformer luke mbart "
    "megatron-bert mobilebert modernbert modernvbert mpnet mra mvp neomme nomic_bert nystromformer perceiver rembert "
    "roberta roberta-prelayernorm roc_bert roformer squeezebert tapas ultrabert ultravbert xlm xlm-roberta "
    "xlm-roberta-xl xmod yoso",
    "AutoModelForSequenceClassification": "albert bart bert deberta deberta-v2 distilbert electra gpt2 llama "
    "modernbert qwen3 roberta t5",
    "AutoModelForTokenClassification": "bert deberta-v2 llama modernbert",
    "AutoModelForSeq2SeqLM": "audioflamingo3 bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt "
    "glmasr granite_speech granite_speech_plus led longt5 m2m_100 marian mbart mt5 musicflamingo mvp nllb-moe pegasus "
    "pegasus_x plbart prophetnet qwen2_audio qwen3_asr switch_transformers t5 t5gemma t5gemma2 umt5 voxtral",
    "AutoModelForImageClassification": "beit clip convnext convnextv2 data2vec-vision deit dinov2 "
    "dinov2_with_registers donut-swin focalnet hiera ijepa levit metaclip_2 mobilevit perceiver poolformer pvt pvt_v2 "
    "regnet resnet segformer shieldgemma2 siglip siglip2 swiftformer swin swinv2 vit vit_msn",
    "AutoModelForCTC": "data2vec-audio hubert lasr_ctc parakeet_ctc sew sew-d unispeech unispeech-sat wav2vec2 "
    "wav2vec2-bert wav2vec2-conformer wavlm",
    "AutoModelForSpeechSeq2Seq": "moonshine pop2piano speech_to_text speecht5 whisper",
    "AutoModelForAudioClassification": "audio-spectrogram-transformer hubert wav2vec2 whisper",
    "AutoModelForZeroShotImageClassification": "clip siglip",
    "AutoModelForImageTextToText": "aria aya_vision blip blip-2 cohere2_vision cohere_compass deepseek_vl evolla "
    "exaone4_5 florence2 fuyu gemma3 gemma4 git glm46v glm4v glm4v_moe glm_ocr got_ocr2 hyperclovax_vision_v2 "
    "idefics2 idefics3 inkling2 instructblip internvl kimi_k25 kosmos-2.5 lfm2_vl lighton_ocr llama4 llava llava_next "
    "llava_next_video llava_onevision mistral3 mllama nemotron_h_omni ovis2 paddleocr_vl paligemma pix2struct "
    "qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm video_llava vipllava "
    "vision-encoder-decoder",
}

FEED_FORWARD = (
    r"mlp(_block)?|ffn?|fc|feed_?forward(_network)?|(dense_?)?moe|block_sparse_moe|intermediate|dense_?relu_?dense"
)
FEED_FORWARD_CLASS = r"M(LP|lp)|FeedForward|FFN|MoE"
MIXER_CLASS = (
    r"Attention|Attn|Mixer|Mamba|DeltaNet|Recurrent|LSTM|SSM|ShortConv|Fourier|MLA|TimeMix|Conv|Pooling|"
    r"Modulation"
)
WHOLE_LAYER_CLASS = r"(Layer|Block|Model|Stack|Encoder|Decoder|Stage)$"
BETWEEN_TOWERS = r".*(projector|projection|connector|merger|aligner|adapter).*"


def cases() -> list[tuple[str, str]]:
    """Returns every model type that has a row, with its Auto class."""
    causal = [(name, "AutoModelForCausalLM") for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT]
    return causal + [(name, auto) for auto, names in HEADS.items() for name in names.split()]


def tiny(model_type: str, auto: str = "AutoModelForCausalLM", *, seed: int = 0) -> PreTrainedModel:
    """Builds the model that `auto` gives for a model type, tiny, in evaluation mode, with weights that differ."""
    config = tiny_config(model_type)
    head = head_of(config, auto)
    if not isinstance(config, head.config_class):
        parts = [getattr(config, name) for name in config.sub_configs]
        config = next((part for part in parts if isinstance(part, head.config_class)), config)
    torch.manual_seed(seed)
    model = head(config).eval()
    give_opinions(model)
    return model


def head_of(config: PreTrainedConfig, auto: str = "AutoModelForCausalLM") -> Any:
    """Returns the class that `auto` gives for a configuration."""
    head = getattr(transformers, auto)._model_mapping[type(config)]
    return head[0] if isinstance(head, tuple) else head


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Returns the shrunk configuration of a model type."""
    kind = CONFIG_MAPPING[model_type]
    return kind.from_dict(_merge(shrink(kind(**STARTS.get(model_type, {})).to_dict()), OVERRIDES.get(model_type, {})))


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Overlays nested values."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value
    return values


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a configuration with every size made small and one layer of every kind kept."""
    small = {}
    kept = _kept_layers(values)
    staged = "depths" in values
    for key, value in values.items():
        if key in RECOMPUTED or (staged and key == "hidden_size" and "embed_dim" in values):
            continue
        if key == "per_layer_config":
            small[key] = _per_layer(value, kept)
        elif isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            small[key] = shrink(value)
        elif isinstance(value, dict):
            inner = {k: _rope(v, values) if isinstance(v, dict) else v for k, v in value.items()}
            small[key] = _rope(inner, values)
        elif isinstance(value, list):
            small[key] = _list(key, value, values, kept)
        elif type(value) is int:
            small[key] = (_stage_size if staged else _size)(key, value, values, kept)
        else:
            small[key] = value
    return small


def _size(key: str, value: int, values: Mapping[str, Any], kept: list[int]) -> int:
    """Shrinks one number by what it is called."""
    if re.fullmatch(LAYERS, key):
        return min(value, len(kept))
    if key in THRESHOLDS:
        return sum(layer < value for layer in kept)
    if key == "num_kv_shared_layers" and value:
        return sum(layer >= (_layer_count(values) or 0) - value for layer in kept)
    if re.fullmatch(r".*_(id|index|idx)|.*token.*id", key):
        return _token(key, value)
    if re.fullmatch(r".*(kv_heads|key_value_heads|kv_n_heads)", key):
        heads = values.get(key.replace("key_value", "attention")) or values.get("num_attention_heads") or value
        return 1 if value == 1 else 4 if value == heads else 2
    if key == "head_dim" and value == values.get("qk_rope_head_dim"):
        return 8
    return next((min(value, size) for pattern, size in SIZES if re.fullmatch(pattern, key)), value)


def _stage_size(key: str, value: int, values: Mapping[str, Any], kept: list[int]) -> int:
    """Shrinks one number of a network with stages, each at half of the resolution of the one before."""
    heads = values.get("num_heads") or values.get("num_attention_heads") or [2]
    first = heads[0] if isinstance(heads, list) else heads
    sizes = {"image_size": 64, "window_size": 2, "embed_dim": 8 * max(2, first)}
    if key in sizes:
        return sizes[key]
    return value if key in ("patch_size", "num_layers") else _size(key, value, values, kept)


def _token(key: str, value: int) -> int:
    """Moves a special token into the small vocabulary: the usual ones to its start, others to its end."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return value if value < VOCABULARY else usual.get(key, VOCABULARY - 1 - sum(map(ord, key)) % 16)


def _rope(rope: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Makes sections and factors of rotary embeddings fit a head of 16."""
    result = dict(rope)
    if isinstance(rope.get("mrope_section"), list):
        total = round(8 * (rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0))
        others = len(rope["mrope_section"]) - 1
        part = total // (others + 1)
        result["mrope_section"] = [total - others * part] + [part] * others
    for key in ("long_factor", "short_factor"):
        if isinstance(rope.get(key), list):
            result[key] = rope[key][:8]
    if isinstance(rope.get("original_max_position_embeddings"), int):
        result["original_max_position_embeddings"] = 64
    return result


def _layer_count(values: Mapping[str, Any]) -> int | None:
    return next((v for k, v in values.items() if re.fullmatch(LAYERS, k) and isinstance(v, int)), None)


def _kept_layers(values: Mapping[str, Any]) -> list[int]:
    """Returns which layers stay: of every kind the first, at least two, at most MAX_LAYERS."""
    patterns = [v for k, v in values.items() if isinstance(v, list) and re.fullmatch(r"layers?_(block_)?types?", k)]
    count = _layer_count(values) or (len(patterns[0]) if patterns else 2)
    kinds: dict[Any, int] = {}
    for layer in range(count):
        kind: list[Any] = []
        for key, value in values.items():
            if isinstance(value, list) and len(value) == count:
                kind.append(repr(value[layer]))
            elif _is_index_list(key, value):
                kind.append(layer in value)
            elif key in THRESHOLDS and isinstance(value, int):
                kind.append(layer < value)
        kinds.setdefault(tuple(kind), layer)
    kept = sorted(kinds.values())[:MAX_LAYERS]
    rest = [layer for layer in range(count) if layer not in kept]
    return sorted(kept + rest[: max(0, 2 - len(kept))])


def _is_index_list(key: str, value: Any) -> bool:
    names = r".*(layers|layer_ids|idxs|indexes|indices)"
    return isinstance(value, list) and bool(re.fullmatch(names, key)) and all(type(i) is int for i in value)


def _list(key: str, value: list[Any], values: Mapping[str, Any], kept: list[int]) -> list[Any]:
    numbers = all(type(item) is int for item in value)
    if numbers and re.fullmatch(WIDTHS, key):
        factor = max(1, max(value) // 64)
        return [max(4, item // factor) for item in value]
    if key == "depths":
        return [min(item, 2) for item in value]
    if key == "image_size":
        return [64 if "depths" in values else 32] * len(value)
    if len(value) == _layer_count(values):
        value = [value[layer] for layer in kept]
        return [_size(key.removesuffix("_per_layer"), v, values, kept) for v in value] if numbers else value
    if _is_index_list(key, value):
        return [place for place, layer in enumerate(kept) if layer in value]
    if re.fullmatch(r".*token_id", key):
        return [_token(key, value[0])]
    return value


def _per_layer(value: Any, kept: list[int]) -> Any:
    if not isinstance(value, dict):
        return value
    places = {layer: place for place, layer in enumerate(kept)}
    return {str(places[int(k)]): shrink(dict(v)) for k, v in value.items() if int(k) in places}


@torch.no_grad()
def give_opinions(model: PreTrainedModel) -> None:
    """Scales matrices up to what keeps a signal's size, and makes constants differ, so that outputs tell apart."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
        if spread == 0:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
        elif parameter.ndim >= 2 and spread < (wanted := parameter.shape[-1] ** -0.5):
            parameter.mul_(wanted / spread)


def targets(model: PreTrainedModel) -> dict[str, str]:
    """Chooses, by structure, up to three modules that a forward pass calls and that do not overlap.

    The last layer's feed-forward, the first layer's mixer, and a linear layer: one between towers where there is one,
    else the last in a layer, else the last.
    """
    called = _called(model)
    layered = [name for name in called if any(part.isdigit() for part in name.split("."))]
    chosen: dict[str, str] = {}
    feed_forwards = _outermost(name for name in layered if _is_feed_forward(name, model.get_submodule(name)))
    if feed_forwards:
        chosen["feed_forward"] = feed_forwards[-1]
    mixers = _outermost(name for name in layered if _is_mixer(model.get_submodule(name)))
    mixers = [name for name in mixers if not _overlap(name, chosen.values())]
    if mixers:
        chosen["attention_or_mixer"] = mixers[0]
    linears = [name for name in called if _is_linear(model, name) and not _overlap(name, chosen.values())]
    between = [name for name in linears if name not in layered and re.fullmatch(BETWEEN_TOWERS, name)]
    if linears:
        chosen["projector"] = (between or [name for name in linears if name in layered] or linears)[-1]
    return chosen


def _called(model: PreTrainedModel) -> list[str]:
    """Returns the modules that a forward pass calls and that return a tensor, unless they stand at several places."""
    names = set()
    handles = []
    for name, module in model.named_modules():

        def note(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            if _has_tensor(output):
                names.add(name)

        handles.append(module.register_forward_hook(note))
    try:
        anatomy.run(model, probing.probe_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    everywhere = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False) if name]
    places = Counter(module for _, module in everywhere)
    return [name for name, module in everywhere if name in names and places[module] == 1]


def _has_tensor(output: Any) -> bool:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    return any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values)


def _outermost(names: Iterable[str]) -> list[str]:
    listed = list(names)
    return [name for name in listed if not any(name.startswith(other + ".") for other in listed)]


def _overlap(name: str, others: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in others)


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    if isinstance(module, nn.Linear) or re.search(WHOLE_LAYER_CLASS.replace("Layer|Block|", ""), kind):
        return False
    own = name.rsplit(".", 1)[-1]
    named = re.fullmatch(FEED_FORWARD, own, re.IGNORECASE) or re.search(FEED_FORWARD_CLASS, kind)
    return bool(named) and any(parameter.ndim >= 2 for parameter in module.parameters())


def _is_mixer(module: nn.Module) -> bool:
    kind = type(module).__name__
    named = re.search(MIXER_CLASS, kind) and not re.search(WHOLE_LAYER_CLASS, kind)
    return bool(named and list(module.children()) and any(p.ndim >= 2 for p in module.parameters()))


def _is_linear(model: PreTrainedModel, name: str) -> bool:
    module = model.get_submodule(name)
    ties = model.all_tied_weights_keys
    tied = {id(p) for key, p in model.named_parameters(remove_duplicate=False) if key in {*ties, *ties.values()}}
    return isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in tied
