"""Versions of packages: those that something was made with, and those that a model requires."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from solidify.directory.manifest import Manifest, shown

PACKAGES = ("solidify", "torch", "transformers", "peft", "safetensors")


def current_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that an artifact depends on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def version_faults(record: Manifest) -> tuple[list[str], list[str]]:
    """Compares the packages that a model requires with those installed here: what is missing, and what may not fit.

    Packages keep what they promise within a major version.
    """
    missing, other = [], []
    for name, wanted in record.requirements.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(f"it needs {shown(name)} {shown(wanted)}: pip install {shown(name)}")
            continue
        if found.partition(".")[0] != wanted.partition(".")[0]:
            other.append(
                f"it was made with {shown(name)} {shown(wanted)}, and {found} is installed here, whose code may "
                f"compute something else: pip install {shown(name)}=={shown(wanted)}"
            )
    return missing, other
