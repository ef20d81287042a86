"""Settings of PyTorch that may choose other kernels: with `cache_prefix` a change is computed anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen import Around, put, small, train

import solidify

MKLDNN: Any = torch.backends.mkldnn


class OfSettings(Around):
    """Depends on settings of PyTorch."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        settings = (
            torch.get_default_dtype() == torch.float64,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            *(each() for each in (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.math_sdp_enabled)),
            torch.backends.cudnn.deterministic,
            torch.backends.mha.get_fastpath_enabled(),
            MKLDNN.matmul.fp32_precision == "bf16",
        )
        return super().forward(hidden_states) * (1 + sum(2**place * bool(on) for place, on in enumerate(settings)))


SETTINGS: dict[str, Callable[[], Any]] = {
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "deterministic algorithms, as a warning": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "flash attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "attention by mathematics": lambda: torch.backends.cuda.enable_math_sdp(False),
    "deterministic convolutions": lambda: setattr(torch.backends.cudnn, "deterministic", True),
    "precision, by its newer name": lambda: setattr(MKLDNN.matmul, "fp32_precision", "bf16"),
    "the fast path of attention": lambda: torch.backends.mha.set_fastpath_enabled(False),
}


@pytest.fixture
def settings() -> Any:
    def put_back() -> None:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_math_sdp(True)
        torch.backends.cudnn.deterministic = False
        torch.backends.mha.set_fastpath_enabled(True)
        MKLDNN.matmul.fp32_precision = "none"

    yield put_back
    put_back()


@pytest.mark.parametrize("what", SETTINGS)
def test_a_setting_of_pytorch_is_told(what: str, tmp_path: Path, settings: Callable[[], None]) -> None:
    plain = train(small(put(OfSettings, 0)), lambda _: SETTINGS[what]())
    settings()
    unchanged, model = train(small(put(OfSettings, 0))), small(put(OfSettings, 0))
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        found = train(model, lambda _: SETTINGS[what]())
    assert found == plain != unchanged
    assert (cached.computed, cached.read) == (4, 2)
