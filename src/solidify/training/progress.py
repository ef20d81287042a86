"""A progress bar for training: steps, loss, tokens or images per second."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from solidify.system import console


class TrainingBar(TrainerCallback):  # type: ignore[misc]
    """Shows one bar for the whole training on the first process; `unit` is what is read."""

    def __init__(self, unit: str = "tokens") -> None:
        self._unit = unit
        self._stack = ExitStack()
        self._advance: Any = None
        self._note = ""
        self._start = 0.0
        self._began_at = (0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
        if state.is_world_process_zero:
            self._start, self._began_at = time.monotonic(), (state.global_step, state.num_input_tokens_seen)
            self._advance = self._stack.enter_context(console.progress("Training", state.max_steps - state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves it by a step."""
        if self._advance is not None:
            elapsed = max(time.monotonic() - self._start, 1e-9)
            steps, seen = state.global_step - self._began_at[0], state.num_input_tokens_seen - self._began_at[1]
            rate = console.amount(float(f"{seen / elapsed:.3g}"))
            self._advance(f"{self._note}{steps / elapsed:.3g} steps/s, {rate} {self._unit}/s")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Notes the loss and its terms."""
        if logs and "loss" in logs:
            named = {key.removeprefix("term/"): value for key, value in logs.items() if key.startswith("term/")}
            terms = [f"{name} {value:.3g}" for name, value in named.items()]
            parts = f" ({', '.join(terms)})" if len(terms) > 1 else ""
            self._note = f"loss {logs['loss']:.3f}{parts}, "

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        self._stack.close()
