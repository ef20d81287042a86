"""Solidify changes the architecture of a pretrained Hugging Face model and makes the result solid.

Names are loaded when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solidify import losses as losses
    from solidify.adapter.adapters import attach as attach
    from solidify.adapter.expert_factors import factor_experts as factor_experts
    from solidify.adapter.loading import load as load
    from solidify.adapter.storage import load_adapter as load_adapter
    from solidify.adapter.storage import save_adapter as save_adapter
    from solidify.artifact.pushing import push as push
    from solidify.artifact.solidify import Artifact as Artifact
    from solidify.building import build as build
    from solidify.checks.check import check as check
    from solidify.directory.adopting import adopt as adopt
    from solidify.directory.signing import sign as sign
    from solidify.directory.signing import verify as verify
    from solidify.directory.trust import trust as trust
    from solidify.edits import Surgery as Surgery
    from solidify.errors import AdapterError as AdapterError
    from solidify.errors import ArtifactError as ArtifactError
    from solidify.errors import CheckFailed as CheckFailed
    from solidify.errors import DataError as DataError
    from solidify.errors import HealingError as HealingError
    from solidify.errors import ModelError as ModelError
    from solidify.errors import ObjectiveError as ObjectiveError
    from solidify.errors import RecipeError as RecipeError
    from solidify.errors import SolidifyError as SolidifyError
    from solidify.errors import SurgeryError as SurgeryError
    from solidify.exporting.forms import Exported as Exported
    from solidify.exporting.forms import export as export
    from solidify.findings import Finding as Finding
    from solidify.findings import Report as Report
    from solidify.healing.align import align as align
    from solidify.healing.calibrating import score_experts as score_experts
    from solidify.healing.distilling import distill as distill
    from solidify.healing.learning import Alignment as Alignment
    from solidify.healing.placing import Budget as Budget
    from solidify.healing.placing import place as place
    from solidify.merging.export import merge as merge
    from solidify.objective.capture import Capture as Capture
    from solidify.objective.engine import ObjectiveEngine as ObjectiveEngine
    from solidify.objective.objective import Objective as Objective
    from solidify.objective.term import Term as Term
    from solidify.objective.weights import Constraint as Constraint
    from solidify.objective.weights import Schedule as Schedule
    from solidify.objective.window import windows as windows
    from solidify.on_ramps.patched import from_patched as from_patched
    from solidify.on_ramps.wrapping import wrap as wrap
    from solidify.recipe.dry_run import plan as plan
    from solidify.recipe.schema import Recipe as Recipe
    from solidify.recipe.stages import heal as heal
    from solidify.recipe.stages import run as run
    from solidify.surgery.depth import insert as insert
    from solidify.surgery.depth import remove as remove
    from solidify.surgery.edit_record import Edit as Edit
    from solidify.surgery.expert_clusters import cluster_experts as cluster_experts
    from solidify.surgery.expert_merging import merge_experts as merge_experts
    from solidify.surgery.experts import duplicate_experts as duplicate_experts
    from solidify.surgery.experts import rearrange_experts as rearrange_experts
    from solidify.surgery.heads import add as add
    from solidify.surgery.masks import mask as mask
    from solidify.surgery.replacing import replace as replace
    from solidify.surgery.replacing import share as share
    from solidify.surgery.vocabulary import add_tokens as add_tokens
    from solidify.training.distilling import ObjectiveDistillationTrainer as ObjectiveDistillationTrainer
    from solidify.training.preference import ObjectiveDPOTrainer as ObjectiveDPOTrainer
    from solidify.training.prefix.cached import cache_prefix as cache_prefix
    from solidify.training.reinforcing import ObjectiveGRPOTrainer as ObjectiveGRPOTrainer
    from solidify.training.rewarding import ObjectiveRewardTrainer as ObjectiveRewardTrainer
    from solidify.training.sft import ObjectiveSFTTrainer as ObjectiveSFTTrainer
    from solidify.training.teaching import ObjectiveGKDTrainer as ObjectiveGKDTrainer
    from solidify.training.trainer import ObjectiveTrainer as ObjectiveTrainer
    from solidify.training.unpaired import ObjectiveKTOTrainer as ObjectiveKTOTrainer

_WHERE = {
    "AdapterError": "errors",
    "Alignment": "healing.learning",
    "Artifact": "artifact.solidify",
    "ArtifactError": "errors",
    "Budget": "healing.placing",
    "Capture": "objective.capture",
    "CheckFailed": "errors",
    "Constraint": "objective.weights",
    "DataError": "errors",
    "Edit": "surgery.edit_record",
    "Exported": "exporting.forms",
    "Finding": "findings",
    "HealingError": "errors",
    "ModelError": "errors",
    "Objective": "objective.objective",
    "ObjectiveDPOTrainer": "training.preference",
    "ObjectiveDistillationTrainer": "training.distilling",
    "ObjectiveEngine": "objective.engine",
    "ObjectiveError": "errors",
    "ObjectiveGKDTrainer": "training.teaching",
    "ObjectiveGRPOTrainer": "training.reinforcing",
    "ObjectiveRewardTrainer": "training.rewarding",
    "ObjectiveKTOTrainer": "training.unpaired",
    "ObjectiveSFTTrainer": "training.sft",
    "ObjectiveTrainer": "training.trainer",
    "Recipe": "recipe.schema",
    "RecipeError": "errors",
    "Report": "findings",
    "Schedule": "objective.weights",
    "SolidifyError": "errors",
    "Surgery": "edits",
    "SurgeryError": "errors",
    "Term": "objective.term",
    "add": "surgery.heads",
    "add_tokens": "surgery.vocabulary",
    "adopt": "directory.adopting",
    "align": "healing.align",
    "attach": "adapter.adapters",
    "build": "building",
    "cache_prefix": "training.prefix.cached",
    "check": "checks.check",
    "cluster_experts": "surgery.expert_clusters",
    "distill": "healing.distilling",
    "duplicate_experts": "surgery.experts",
    "export": "exporting.forms",
    "factor_experts": "adapter.expert_factors",
    "from_patched": "on_ramps.patched",
    "heal": "recipe.stages",
    "insert": "surgery.depth",
    "load": "adapter.loading",
    "load_adapter": "adapter.storage",
    "mask": "surgery.masks",
    "merge": "merging.export",
    "merge_experts": "surgery.expert_merging",
    "place": "healing.placing",
    "plan": "recipe.dry_run",
    "push": "artifact.pushing",
    "rearrange_experts": "surgery.experts",
    "remove": "surgery.depth",
    "replace": "surgery.replacing",
    "run": "recipe.stages",
    "save_adapter": "adapter.storage",
    "score_experts": "healing.calibrating",
    "share": "surgery.replacing",
    "sign": "directory.signing",
    "trust": "directory.trust",
    "verify": "directory.signing",
    "windows": "objective.window",
    "wrap": "on_ramps.wrapping",
}

__all__ = sorted([*_WHERE, "losses"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("solidify")
    if name == "losses":
        return import_module("solidify.losses")
    if name not in _WHERE:
        raise AttributeError(f"module 'solidify' has no attribute {name!r}")
    collects = gc.isenabled()
    gc.disable()  # what is imported stays: to look through it for garbage meanwhile takes a fifth of the time
    try:
        return getattr(import_module(f"solidify.{_WHERE[name]}"), name)
    finally:
        if collects:
            gc.enable()


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
