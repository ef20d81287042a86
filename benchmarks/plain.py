"""The plain ways that ours are compared with: transformers and PEFT as their documentation shows them.

python benchmarks/plain.py load MODEL
python benchmarks/plain.py first MODEL                   # loads it, and makes one token
python benchmarks/plain.py rewrite MODEL OUTPUT           # load and save: what any surgery in a script does at least
python benchmarks/plain.py adapter MODEL OUTPUT           # a random LoRA for `merge`
python benchmarks/plain.py merge MODEL ADAPTER OUTPUT
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def load(model: str) -> None:
    """Loads a model."""
    AutoModelForCausalLM.from_pretrained(model)


def first(model: str) -> None:
    """Loads a model and makes one token."""
    make_token(AutoModelForCausalLM.from_pretrained(model))


def make_token(model: PreTrainedModel) -> None:
    """Makes the first token after a short prompt."""
    model.generate(torch.arange(2, 18)[None], max_new_tokens=1, do_sample=False, eos_token_id=None)


def rewrite(model: str, output: str) -> None:
    """Loads a model and saves it."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


def adapter(model: str, output: str) -> None:
    """Saves a LoRA of random numbers."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**LORA))
    randomize(tuned)
    tuned.save_pretrained(output)


def merge(model: str, adapter: str, output: str) -> None:
    """Merges a LoRA into its base and saves the result."""
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    tuned.merge_and_unload().save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


def randomize(tuned: torch.nn.Module) -> None:
    """Gives the B matrices of a LoRA, which start at zero, random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


if __name__ == "__main__":
    _, verb, *given = sys.argv
    {"load": load, "first": first, "rewrite": rewrite, "adapter": adapter, "merge": merge}[verb](*given)
