"""What vLLM and SGLang put in the place of a model's modules: rules read in their sources.

Both build the model and then replace modules by their own, going by classes, names and the source of `forward`. What a
module does beside that is lost without a word, or the server does not start. Read in vLLM 0.32.0
(`vllm/model_executor/models/transformers/`) and in SGLang at 0465eebc (`python/sglang/srt/models/transformers.py`).
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from solidify.checks.rule import SGLANG, VLLM, Rule, full, listed
from solidify.checks.served_call import Observed
from solidify.surgery import masking
from solidify.upstream.transformers import HINTS, modules_in_float32, passed_over_keys

SILU = ("silu", "swish")
_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of heads, in vLLM's attention for CPUs
_LOST_BY_SGLANG = (".attn.bias", ".attn.masked_bias", ".masked_bias")  # any tensor whose name holds one of these
_LOST_BY_VLLM = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def rules(model: PreTrainedModel, seen: Observed) -> list[Rule]:
    """Returns the rules about what is replaced, for a model and what was seen when it was called."""
    return [
        _judge_linear(model),
        _judge_called(model, seen),
        _named_norms(model),
        _judge_embeddings(model),
        _judge_alike(model),
        _judge_dispatch(model, seen),
        _judge_heads(model, seen),
        _judge_activation(model),
        _judge_types(model),
        _judge_names(model),
        _judge_masks(model),
    ]


def hints(model: PreTrainedModel, backbone: PreTrainedModel) -> Rule:
    """Judges what `backbone`, built from the configuration alone, says of tensors of `model`: vLLM leaves those out."""
    keys: Iterable[str] = passed_over_keys(backbone)
    faults = []
    for hint in sorted(keys):
        lost = [name for name in model.state_dict() if re.search(hint, name)]
        if lost:
            faults.append(f"{hint!r} names {', '.join(lost[:2])}{f' and {len(lost) - 2} more' * (len(lost) > 2)}")
    return Rule(
        "no hint for loading names a tensor",
        faults,
        f"{HINTS} of {type(backbone).__name__} names none",
        "vLLM does not load such tensors and leaves them at random values; build the artifact again, its part without "
        "a head was built with such hints",
        (VLLM,),
    )


def _judge_linear(model: PreTrainedModel) -> Rule:
    own = [n for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear) and _does_more(m)]
    return Rule(
        "linear layers are only that",
        [
            f"{name} inherits from nn.Linear, and the servers replace it by a plain linear layer"
            for name in listed(model, own)
        ],
        "no class that inherits from nn.Linear has a forward of its own",
        "Inherit from nn.Module and hold an nn.Linear",
    )


def _does_more(module: nn.Linear) -> bool:
    return type(module).forward is not nn.Linear.forward


def _judge_called(model: PreTrainedModel, seen: Observed) -> Rule:
    called = {_drop_later_numbers(name) for name in seen.called}
    modules = dict(model.base_model.named_modules()) if called else {}
    idle = [
        name for name, module in modules.items() if _drop_later_numbers(name) not in called and _may_be_fused(module)
    ]
    return Rule(
        "what holds linear layers is called",
        [f"{listed_name} is not called, but read by other modules" for listed_name in listed(model, idle)],
        "every linear layer, and every module of several, is called as a module",
        "Call it: the servers pack, split or fuse what it holds, and only its own forward knows of that",
    )


def _drop_later_numbers(name: str) -> str:
    """Returns a name without its numbers after the first: of experts within a layer some are called, not all."""
    first = re.match(r"\D*\d+", name)
    start = first.group() if first else ""
    return start + re.sub(r"\d+", "*", name[len(start) :])


def _may_be_fused(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or sum(isinstance(child, nn.Linear) for child in module.children()) > 1


def _named_norms(model: PreTrainedModel) -> Rule:
    own = [
        name
        for name, module in model.base_model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and not type(module).__module__.startswith("transformers.models.")
    ]
    return Rule(
        "what is called RMSNorm is one",
        [f"{listed_name} is replaced because of its class's name" for listed_name in listed(model, own)],
        "every class of that name is transformers' own",
        "Rename the class, unless it computes `weight * x / sqrt(mean(x²) + eps)` and no more",
        (SGLANG,),
    )


def _judge_embeddings(model: PreTrainedModel) -> Rule:
    module = model.base_model.get_input_embeddings()
    own = not isinstance(module, nn.Embedding)
    return Rule(
        "the input embeddings are a table",
        [f"they are {type(module).__name__}, and are replaced by a table"] if own else [],
        type(module).__name__,
        "Serve it with vLLM, which looks for the table within",
        (SGLANG,),
    )


def _judge_alike(model: PreTrainedModel) -> Rule:
    """vLLM decides once for a class, by the first module in order, what of it to fuse."""
    first: dict[tuple[type, tuple[str, ...]], nn.Module] = {}
    faults: list[str] = []
    for name, module in model.base_model.named_modules():
        children = dict(module.named_children())
        like = first.setdefault((type(module), tuple(children)), module)
        linear = [key for key, child in like.named_children() if isinstance(child, nn.Linear)]
        if len(linear) < 2:
            continue
        faults += [f"{name}.{key}".lstrip(".") for key in linear if not isinstance(children[key], nn.Linear)]
    return Rule(
        "layers of one class are alike",
        [
            f"{listed_name} is not an nn.Linear, but is one in the first {_name_kind(model, listed_name)}"
            for listed_name in listed(model, faults)
        ],
        "what is a linear layer in the first module of a class is one in all of them",
        "vLLM fuses them in all modules of the class and does not start; change the first layer in the same way",
        (VLLM,),
    )


def _name_kind(model: PreTrainedModel, name: str) -> str:
    holder = re.sub(r"\.[^.]*$", "", name.split(" ")[0]).replace("*", "0")
    return type(dict(model.named_modules()).get(holder, model)).__name__


def _judge_dispatch(model: PreTrainedModel, seen: Observed) -> Rule:
    modules = dict(model.base_model.named_modules())
    faults: dict[str, list[str]] = {}
    for arrival in seen.arrivals:
        if (module := modules.get(arrival.module)) is not None and (fault := _explain_unreadable(module)):
            faults.setdefault(fault, []).append(arrival.module)
    return Rule(
        "forward itself calls the attention function",
        [f"{name} {fault}" for fault, names in faults.items() for name in listed(model, names)],
        "once, in every module that attends",
        "vLLM reads the source of forward: write `attention = ALL_ATTENTION_FUNCTIONS[...]` and "
        "`attention(self, ..., scaling=self.scaling)` there, once",
        (VLLM,),
    )


def _judge_heads(model: PreTrainedModel, seen: Observed) -> Rule:
    """Both keep a cache of the shape that the configuration states, whatever arrives."""
    values = model.config.get_text_config()
    queries = int(values.num_attention_heads)
    keys, size = int(values.to_dict().get("num_key_value_heads") or queries), _head_size(model)
    odd: dict[tuple[int, int, int], list[str]] = {}
    for arrival in seen.arrivals:
        if arrival.heads != (queries, keys, size):
            odd.setdefault(arrival.heads, []).append(arrival.module)
    return Rule(
        "heads are those of the configuration",
        [
            f"{name} attends with {q} heads of queries, {k} of keys, of {width}, not {queries}, {keys}, of {size}"
            for (q, k, width), names in odd.items()
            for name in listed(model, names)
        ],
        f"{queries} of queries and {keys} of keys, of {size}",
        "Give the attention function what num_attention_heads, num_key_value_heads and head_dim state",
    )


def head_size(model: PreTrainedModel) -> Rule:
    """Judges the size of the heads: a limit of one backend, not of the server."""
    size = _head_size(model)
    return Rule(
        "size of heads on CPUs",
        [] if size in _SIZES else [f"it is {size}"],
        str(size),
        f"vLLM's attention for CPUs has sizes {', '.join(map(str, _SIZES))}",
        (VLLM,),
    )


def _head_size(model: PreTrainedModel) -> int:
    values = model.config.get_text_config()
    return int(values.to_dict().get("head_dim") or values.hidden_size // values.num_attention_heads)


def _explain_unreadable(module: nn.Module) -> str:
    """Returns what keeps vLLM from finding the call of the attention function in the source of a module's forward."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward))))
    except (OSError, SyntaxError, TypeError):
        return "has no source that can be read"
    nodes = list(ast.walk(tree))
    assigned = [n for n in nodes if isinstance(n, (ast.Assign, ast.AnnAssign)) and _looks_up(n.value)]
    targets = [t for n in assigned for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names]
    if len(calls) != 1:
        return f"calls it {len(calls)} times in its own forward"
    for keyword in calls[0].keywords:
        if keyword.arg == "scaling" and not isinstance(_read_value(keyword.value, module), (int, float)):
            return f"passes scaling={ast.unparse(keyword.value)}, which is not a number that the module holds"
    return ""


def _looks_up(node: ast.expr | None) -> bool:
    node = node.func if isinstance(node, ast.Call) else node
    return (
        isinstance(node, (ast.Attribute, ast.Subscript))
        and isinstance(node.value, ast.Name)
        and node.value.id == "ALL_ATTENTION_FUNCTIONS"
    )


def _read_value(node: ast.expr, module: nn.Module) -> object:
    if isinstance(node, ast.Constant):
        return node.value
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return getattr(module, node.attr, None) if own and isinstance(node, ast.Attribute) else None


def _judge_activation(model: PreTrainedModel) -> Rule:
    blocks = [n for n, m in model.base_model.named_modules() if n.rpartition(".")[2] == "experts" and _is_replaced(m)]
    values = model.config.get_text_config().to_dict()
    named = values.get("hidden_act") or values.get("hidden_activation") or values.get("activation")
    odd = bool(blocks) and named not in SILU and "GptOss" not in (model.config.architectures or [""])[0]
    own = [
        n for n in blocks if not type(model.base_model.get_submodule(n)).__module__.startswith("transformers.models.")
    ]
    return Rule(
        "experts are gated by silu",
        [f"the configuration names {named!r}, the servers' kernel computes silu"] * odd
        + [f"{name} is of a class of its own, of which only the tensors are used" for name in listed(model, own)],
        f"{len(blocks)} blocks of experts" if blocks else "there are no experts to replace",
        "Serve it with transformers, or rename `experts`, the attribute that holds them",
    )


def _is_replaced(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return isinstance(module, nn.ModuleList) or bool(parameters and all(p.ndim == 3 for p in parameters))


def _judge_types(model: PreTrainedModel) -> Rule:
    strict = modules_in_float32(model.base_model)
    own = model.dtype
    odd = [
        name
        for name, parameter in model.base_model.named_parameters()
        if parameter.dtype is not own and parameter.is_floating_point() and not any(part in name for part in strict)
    ]
    return Rule(
        "one type for all parameters",
        [f"{listed_name} is not {str(own).removeprefix('torch.')}" for listed_name in listed(model, odd)],
        str(own).removeprefix("torch."),
        "vLLM gives every parameter the type that it serves in: `--dtype float32` keeps them all wide",
        (VLLM,),
    )


def _judge_names(model: PreTrainedModel) -> Rule:
    faults: list[str] = []
    servers: Sequence[str] = ()
    for server, parts in ((SGLANG, _LOST_BY_SGLANG), (VLLM, _LOST_BY_VLLM)):
        lost = [name for name in model.base_model.state_dict() if any(part in full(model, name) for part in parts)]
        if lost:
            faults += [f"{server} leaves {listed_name} out" for listed_name in listed(model, lost)]
            servers = (*servers, server)
    return Rule(
        "no tensor has a name that is left out",
        faults,
        f"none of {len(model.state_dict())}",
        "Rename it",
        tuple(servers) or (VLLM, SGLANG),
    )


def _judge_masks(model: PreTrainedModel) -> Rule:
    given = [name for name, module in model.base_model.named_modules() if masking.find_masks(module)]
    return Rule(
        "attention has the mask that servers give it",
        [
            f"{listed_name} has a declared mask, and the servers compute their own"
            for listed_name in listed(model, given)
        ],
        "no attention has a declared mask",
        "Serve it with transformers",
    )
