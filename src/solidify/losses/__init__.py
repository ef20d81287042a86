"""Ready-made loss terms: the names that recipes use (`solidify.losses:trash_budget`) and Python too (`Term(...)`).

Each says what is supplied to it by the names of its parameters (see `solidify.objective.objective`). `docs/losses.md`
has them all in one table.
"""

from solidify.losses.anchors import EWC as ewc
from solidify.losses.anchors import L2SP as l2_sp
from solidify.losses.anchors import fisher_diagonal as fisher_diagonal
from solidify.losses.chunking import chunked as chunked
from solidify.losses.compute import TRASH as TRASH
from solidify.losses.compute import BetaPrior as beta_prior
from solidify.losses.compute import KeptShare as kept_share
from solidify.losses.compute import TrashBudget as trash_budget
from solidify.losses.compute import TrashController as trash_controller
from solidify.losses.distillation import ChunkedDistillation as chunked_distillation
from solidify.losses.distillation import ForwardKL as forward_kl
from solidify.losses.distillation import JensenShannon as jensen_shannon
from solidify.losses.distillation import JensenShannonContinuous as jensen_shannon_continuous
from solidify.losses.distillation import ReverseKL as reverse_kl
from solidify.losses.hidden import ActivationSparsity as activation_sparsity
from solidify.losses.hidden import HiddenMatch as hidden_match
from solidify.losses.penalties import GroupLasso as group_lasso
from solidify.losses.penalties import Orthogonality as orthogonality
from solidify.losses.penalties import Spectral as spectral
from solidify.losses.penalties import WeightPenalty as weight_penalty
from solidify.losses.prediction import Draft as draft
from solidify.losses.prediction import NextToken as next_token
from solidify.losses.prediction import OutputEntropy as output_entropy
from solidify.losses.preference import DPO as dpo
from solidify.losses.ramps import Ramp as ramp
from solidify.losses.routers import ROUTERS as ROUTERS
from solidify.losses.routers import LoadBalance as load_balance
from solidify.losses.routers import RouterEntropy as router_entropy
from solidify.losses.routers import RouterMutualInformation as router_mutual_information
from solidify.losses.routers import RouterZ as router_z
from solidify.losses.teacher import CachedKL as cached_kl
from solidify.losses.teacher import teacher_columns as teacher_columns
from solidify.losses.teacher import with_teacher_columns as with_teacher_columns

__all__ = [
    "ROUTERS",
    "TRASH",
    "activation_sparsity",
    "beta_prior",
    "cached_kl",
    "chunked",
    "chunked_distillation",
    "dpo",
    "draft",
    "ewc",
    "fisher_diagonal",
    "forward_kl",
    "group_lasso",
    "hidden_match",
    "jensen_shannon",
    "jensen_shannon_continuous",
    "kept_share",
    "l2_sp",
    "load_balance",
    "next_token",
    "orthogonality",
    "output_entropy",
    "ramp",
    "reverse_kl",
    "router_entropy",
    "router_mutual_information",
    "router_z",
    "spectral",
    "teacher_columns",
    "trash_budget",
    "trash_controller",
    "weight_penalty",
    "with_teacher_columns",
]
