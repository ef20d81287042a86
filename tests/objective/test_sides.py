"""Terms on modules of an encoder-decoder: each is a mean over the tokens of the side on which its modules run."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch

from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.capture import Capture, capture
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective, Term

SIZES = {"vocab_size": 128, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0}
IDS = {"pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
FEED_FORWARD = "decoder.block.*.layer.2.DenseReluDense"
KEYS = "decoder.block.*.layer.1.EncDecAttention.k"


def t5(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return pico.make("T5ForConditionalGeneration", **SIZES, **IDS).train()


def batch(targets: int = 5) -> dict[str, torch.Tensor]:
    """Both sides are five wide by default, and padded differently."""
    ids = torch.arange(2, 12).reshape(2, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[9, 10, 11, 12, 0, 7, 8], [13, 14, 0, -100, -100, -100, -100]])[:, :targets].contiguous()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_hand(model: Any, given: dict[str, torch.Tensor], modules: str, keep: torch.Tensor) -> float:
    with torch.no_grad(), capture(model, {"seen": Capture(modules=modules)}) as seen:
        model(**given)
    values = [value.double().abs().mean(-1)[keep].sum() / keep.sum() for value in seen["seen"].values()]
    return float(torch.stack(values).mean())


def measured(model: Any, term: Term, batches: list[dict[str, torch.Tensor]], reference: Any = None) -> float:
    engine = ObjectiveEngine(Objective([term], reference=reference), model)
    engine.begin(batches)
    total = sum(float(engine.loss(given).detach()) for given in batches)
    engine.close()
    return total


@pytest.mark.parametrize("targets", [5, 7, 1])
@pytest.mark.parametrize(
    ("modules", "decoded"), [(FEED_FORWARD, True), (KEYS, False), ("encoder.block.*.layer.1.DenseReluDense", False)]
)
def test_a_module_is_averaged_over_the_tokens_that_it_runs_along(modules: str, decoded: bool, targets: int) -> None:
    model, given = t5(), batch(targets)
    keep = given["labels"] != -100 if decoded else given["attention_mask"].bool()
    term = Term(losses.activation_sparsity, arguments={"modules": modules})
    assert measured(model, term, [given]) == pytest.approx(by_hand(model, given, modules, keep), rel=1e-5)
    rows = [{key: value[n : n + 1] for key, value in given.items()} for n in range(2)]
    term = Term(losses.activation_sparsity, arguments={"modules": modules})
    assert measured(model, term, rows) == pytest.approx(by_hand(model, given, modules, keep), rel=1e-5)


def test_a_decoders_own_mask_goes_before_its_labels() -> None:
    model, given = t5(), batch()
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    given["decoder_attention_mask"] = keep
    term = Term(losses.activation_sparsity, arguments={"modules": FEED_FORWARD})
    assert measured(model, term, [given]) == pytest.approx(by_hand(model, given, FEED_FORWARD, keep.bool()), rel=1e-5)


def test_hidden_states_are_matched_over_the_decoders_tokens() -> None:
    model, teacher, given = t5(), t5(1).eval(), batch()
    with torch.no_grad(), capture(model, {"h": Capture(modules=FEED_FORWARD)}) as ours:
        model(**given)
    with torch.no_grad(), capture(teacher, {"h": Capture(modules=FEED_FORWARD)}) as theirs:
        teacher(**given)
    keep, distances = given["labels"] != -100, []
    for name, value in ours["h"].items():
        ours_, theirs_ = value.double()[keep], theirs["h"][name].double()[keep]
        distances.append(((ours_ - theirs_).square().sum(-1) / (theirs_.square().sum(-1) + 1e-6)).mean())
    term = Term(losses.hidden_match, arguments={"layers": FEED_FORWARD})
    assert measured(model, term, [given], teacher) == pytest.approx(float(torch.stack(distances).mean()), rel=1e-5)


def test_one_term_on_both_sides_is_refused() -> None:
    term = Term(losses.activation_sparsity, arguments={"modules": [FEED_FORWARD, KEYS]})
    with pytest.raises(ObjectiveError, match=r"along the decoder .* and along the encoder .* one term for each"):
        measured(t5(), term, [batch()])


class Squares:
    """A user's statistic that is not linear: it needs the means of the window first."""

    def __init__(self) -> None:
        self.captures = {"seen": Capture(modules=FEED_FORWARD)}

    def statistics(self, seen: Any, mask: torch.Tensor) -> torch.Tensor:
        return torch.stack([v.flatten(0, 1)[mask].abs().mean(-1).sum() for v in seen.values()])

    def value(self, means: torch.Tensor) -> torch.Tensor:
        return means.square().mean()


def test_a_users_statistic_is_the_same_whatever_the_split() -> None:
    model, given = t5(), batch()
    rows = [{key: value[n : n + 1] for key, value in given.items()} for n in range(2)]
    assert measured(model, Term(Squares), rows) == pytest.approx(measured(model, Term(Squares), [given]), rel=1e-5)
