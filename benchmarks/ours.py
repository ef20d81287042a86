"""The parts of ours that the command line does not offer by themselves, each in a process of its own.

python benchmarks/ours.py load ARTIFACT
python benchmarks/ours.py first ARTIFACT                 # loads it, digests compared, and makes one token
python benchmarks/ours.py digests ARTIFACT                # every digest of the manifest, and nothing else
python benchmarks/ours.py note MODEL                      # computes and keeps digests, as a first build does
python benchmarks/ours.py adapter ARTIFACT OUTPUT         # a random LoRA for `solidify merge`
python benchmarks/ours.py scales ARTIFACT OUTPUT          # one on q, k and v; the scales beside o are trained in full
"""

from __future__ import annotations

import sys
from pathlib import Path

import solidify


def load(artifact: str) -> None:
    """Loads an artifact, its digests compared first."""
    solidify.load(artifact)


def first(artifact: str) -> None:
    """Loads an artifact, its digests compared, and makes one token."""
    from plain import make_token

    make_token(solidify.load(artifact))


def digests(artifact: str) -> None:
    """Compares an artifact with its manifest."""
    from solidify.directory import manifest

    faults = manifest.faults(Path(artifact), manifest.read(Path(artifact)))
    if faults:
        sys.exit("\n".join(faults))


def note(model: str) -> None:
    """Computes the digests of a model that are not known, and keeps them."""
    from solidify.weights import digest_cache

    digest_cache.digests(sorted(Path(model).glob("*.safetensors")))


def adapter(artifact: str, output: str) -> None:
    """Saves a LoRA of random numbers on all attention projections."""
    from plain import LORA, randomize

    projections = [f"model.layers.*.self_attn.{name}" for name in LORA["target_modules"]]
    tuned = solidify.attach(solidify.load(artifact), lora={**LORA, "target_modules": projections})
    randomize(tuned)
    solidify.save_adapter(tuned, output)


def scales(artifact: str, output: str) -> None:
    """Saves a LoRA of random numbers on q, k and v, with the scales of `output_scales.py` trained in full."""
    from plain import LORA, randomize

    projections = [f"model.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    model = solidify.load(artifact)
    tuned = solidify.attach(
        model, lora={**LORA, "target_modules": projections}, train="model.layers.*.self_attn.o_proj.scale"
    )
    randomize(tuned)
    solidify.save_adapter(tuned, output)


if __name__ == "__main__":
    _, verb, *given = sys.argv
    {"load": load, "first": first, "digests": digests, "note": note, "adapter": adapter, "scales": scales}[verb](*given)
