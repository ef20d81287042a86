"""Ready-made loss terms: the names that recipes use (`solidify.losses:trash_budget`) and Python too (`Term(...)`).

Each says what is supplied to it by the names of its parameters (see `solidify.objective.objective`).
"""

from solidify.losses.compute import TRASH as TRASH
from solidify.losses.compute import TrashBudget as trash_budget
from solidify.losses.compute import TrashController as trash_controller
from solidify.losses.distillation import KLToBase as kl_to_base
from solidify.losses.penalties import WeightPenalty as weight_penalty
from solidify.losses.routers import ROUTERS as ROUTERS
from solidify.losses.routers import LoadBalance as load_balance
from solidify.losses.routers import RouterZ as router_z

__all__ = [
    "ROUTERS",
    "TRASH",
    "kl_to_base",
    "load_balance",
    "router_z",
    "trash_budget",
    "trash_controller",
    "weight_penalty",
]
