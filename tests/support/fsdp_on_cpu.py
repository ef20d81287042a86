"""Runs `python -m solidify` with accelerate told that a CPU is an accelerator, so that it shards over gloo.

accelerate 1.15 shards over accelerators only; fully_shard itself, and all that transformers and solidify do around it,
works on a CPU. The two functions that are exchanged here say which device and which backend there is.
"""

from __future__ import annotations

import os

from accelerate import DistributedType, PartialState

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    from solidify.__main__ import main

    main()
