"""The trash can on trial: ways to skip routed experts of an MoE model, at equal kept slots, with intervals over seeds.

`python benchmarks/trash_trial.py` runs it on the embedded OLMoE; on the real one, with a GPU if there is one:
`--base allenai/OLMoE-1B-7B-0125 --dtype bfloat16 --train FILE.txt --eval FILE.txt --steps N --output FILE.json`. Every
trained arm has the same LoRA, the same objective (the text, and half the divergence from the base), the same rows in
the same order. Thresholds are set on the held-out inputs, without their targets, so that all arms keep the same share
of slots. Results go to docs/trash_trial.json as they come, and what stands there is not repeated; docs/trash_trial.md
is made from it (`trial_page.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

DOCS = Path(__file__).parents[1] / "docs"
LENGTH, ROWS = 128, 16
LEARNING_RATE = 1e-3


@dataclass
class Slots:
    """What an arm sees of one router's call: `log_p`, `weights` and `index` (tokens, top_k), `x` (tokens, hidden)."""

    layer: int
    x: torch.Tensor
    logits: torch.Tensor
    log_p: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor


Score = Callable[["Arm", Slots], torch.Tensor]  # (tokens, top_k): slots are skipped from the lowest up


@dataclass
class Arm:
    """One way to skip slots: those whose score is below a threshold, one for all layers or one a layer."""

    name: str
    score: Score
    trained: bool = False
    per_layer: bool = False
    learns: bool = False  # a vector a layer moves the threshold by token (the trash can's `u`)
    mixed: bool = False  # in training a step keeps one of several shares (MoE-PHDS, arXiv 2509.23012)
    staged: bool = False  # first what routes alone, then LoRA beside it (two stages, as ZEDA's)
    pruned: float = 0.0  # of the experts, by REAP's score
    thresholds: dict[int, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def by_rank(arm: Arm, slots: Slots) -> torch.Tensor:
    """A smaller top-k for every token."""
    return -torch.arange(slots.index.shape[-1], device=slots.x.device).float().expand_as(slots.log_p)


def by_chance(arm: Arm, slots: Slots) -> torch.Tensor:
    """Any slot as well as another."""
    seed = int(slots.index.sum()) % 2**31
    return torch.rand(slots.log_p.shape, generator=torch.Generator().manual_seed(seed)).to(slots.x.device)


def by_ratio(arm: Arm, slots: Slots) -> torch.Tensor:
    """A slot's weight relative to the token's largest (NAEE's dynamic skipping, arXiv 2402.14800)."""
    return slots.log_p - slots.log_p[:, :1]


def by_probability(arm: Arm, slots: Slots) -> torch.Tensor:
    """The trash can: log-probability, less the learned odds of the token."""
    found = slots.log_p
    if arm.learns:
        found = found - (slots.x.float() @ arm.facts["u"][slots.layer])[:, None]
    return found


def by_contribution(arm: Arm, slots: Slots) -> torch.Tensor:
    """The trash can with what each expert returns: log of weight times the mean norm of the expert's output."""
    return by_probability(arm, slots) + arm.facts["log_norm"][slots.layer][slots.index]


def by_group(arm: Arm, slots: Slots) -> torch.Tensor:
    """Zero experts as columns of the router (ZEDA, AdaMoE): a slot is kept while it beats the best zero expert."""
    zero = (slots.x.float() @ arm.facts["zero"][slots.layer].T).logsumexp(-1, keepdim=True)
    return slots.logits.float().gather(-1, slots.index) - zero


ARMS = [
    Arm("random skip", by_chance),
    Arm("smaller top-k", by_rank),
    Arm("NAEE: weight against the largest", by_ratio),
    Arm("trash can, a threshold a layer", by_probability, per_layer=True),
    Arm("trash can, one threshold", by_probability),
    Arm("trash can, by contribution", by_contribution),
    Arm("REAP: a quarter of the experts pruned, and a smaller top-k", by_rank, trained=True, pruned=0.25),
    Arm("smaller top-k", by_rank, trained=True),
    Arm("mixed top-k (MoE-PHDS)", by_rank, trained=True, mixed=True),
    Arm("NAEE: weight against the largest", by_ratio, trained=True),
    Arm("zero experts, two stages (ZEDA)", by_group, trained=True, staged=True),
    Arm("trash can, a threshold a layer", by_probability, trained=True, per_layer=True, learns=True),
    Arm("trash can, by contribution", by_contribution, trained=True, learns=True),
]


class Trial:
    """A base, text, and how arms are run, trained and measured."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        where, self.train_text, self.eval_text = _locate(asked)
        self.tokenizer = AutoTokenizer.from_pretrained(where)
        self.base = AutoModelForCausalLM.from_pretrained(where, dtype=asked.dtype).to(self.device).eval()
        self.base.requires_grad_(False)
        self.train, self.held_out = self._rows(self.train_text), self._rows(self.eval_text)[: asked.held_out]
        self.top_k = int(self.base.config.num_experts_per_tok)
        self.steps, self.kept = asked.steps, asked.kept
        with torch.no_grad():
            self.theirs = [self.base(input_ids=rows).logits.float() for rows in self.held_out.split(8)]
        self.prompts = self.held_out[:32, :32]
        self.norms, self.saliency = self._watch_experts()
        self.continued = self._continue(self.base)

    def _rows(self, texts: list[str]) -> torch.Tensor:
        ids = [t for text in texts for t in self.tokenizer(text, verbose=False).input_ids]
        return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH).to(self.device)

    def _continue(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.generate(  # type: ignore[operator]
                input_ids=self.prompts, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return found[:, self.prompts.shape[1] :]

    def _watch_experts(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns by layer and expert the mean norm of what it returns, and REAP's score (arXiv 2510.13999): the mean
        over its tokens of weight times norm."""
        norms, scores = [], []
        for block in blocks(self.base):
            count = block.experts.down_proj.shape[0]
            sums, weighted, seen = torch.zeros(count), torch.zeros(count), torch.zeros(count)

            def watch(module: Any, args: Any, n=sums, w=weighted, s=seen) -> None:
                x, index, weights = args
                if len(x) != len(index):
                    return
                for expert in range(len(n)):
                    token, slot = (index == expert).nonzero(as_tuple=True)
                    if len(token):
                        ones = torch.ones(len(token), 1, device=x.device, dtype=weights.dtype)
                        given = x[token], torch.full((len(token), 1), expert, device=x.device), ones
                        size = type(module).forward(module, *given).float().norm(dim=-1)
                        n[expert] += float(size.sum())
                        w[expert] += float((size * weights[token, slot]).sum())
                        s[expert] += len(token)

            hook = block.experts.register_forward_pre_hook(watch)
            with torch.no_grad():
                for rows in self.train[:64].split(8):
                    self.base(input_ids=rows)
            hook.remove()
            norms.append((sums / seen.clamp(min=1)).clamp(min=1e-6).to(self.device))
            scores.append((weighted / seen.clamp(min=1)).to(self.device))
        return norms, scores

    def prepare(self, arm: Arm, seed: int) -> Arm:
        """Returns an arm with the numbers that it starts with."""
        arm = copy.deepcopy(arm)
        generator = torch.Generator().manual_seed(seed)
        hidden = self.base.config.hidden_size
        arm.facts["log_norm"] = [norm.log() - norm.log().mean() for norm in self.norms]
        arm.facts["u"] = [torch.zeros(hidden, device=self.device, requires_grad=arm.learns) for _ in self.norms]
        arm.facts["zero"] = [
            (torch.randn(self.top_k, hidden, generator=generator) * 0.02).to(self.device).requires_grad_(arm.staged)
            for _ in self.norms
        ]
        arm.facts["pruned"] = [score.argsort()[: int(arm.pruned * len(score))] for score in self.saliency]
        return arm

    @contextlib.contextmanager
    def running(self, model: nn.Module, arm: Arm, *, soft: bool = False, kept: float | None = None) -> Iterator[dict]:
        """While the block lasts, slots are skipped; yields what was seen. With `kept` each call keeps that share by
        itself, with `soft` the scores have a gradient (straight through)."""
        seen: dict[str, Any] = {"scores": {}, "kept": [], "gap": []}

        def at(layer: int) -> Callable[..., Any]:
            def hook(module: Any, args: Any, output: Any) -> Any:
                logits, weights, index = output
                if len(gone := arm.facts["pruned"][layer]):
                    logits = logits.index_fill(-1, gone, -1e4)
                    weights, index = F.softmax(logits, dtype=torch.float32, dim=-1).topk(module.top_k, dim=-1)
                    weights = weights.to(logits.dtype)
                log_p = F.log_softmax(logits.float(), -1).gather(-1, index)
                x = args[0].reshape(-1, args[0].shape[-1])
                score = arm.score(arm, Slots(layer, x, logits, log_p, weights, index))
                seen["scores"].setdefault(layer, []).append(score.detach())
                limit = arm.thresholds.get(layer, -math.inf) if kept is None else threshold(score.detach(), kept)
                margin = score - limit
                keep = (margin >= 0).to(weights.dtype)
                seen["kept"].append(keep.detach())
                if soft and score.requires_grad:
                    gate = torch.sigmoid(margin.clamp(-20, 20)).to(weights.dtype)
                    seen["gap"].append((gate.mean() - self.kept) ** 2)
                    keep = keep + gate - gate.detach()
                return logits, weights * keep, index

            return hook

        hooks = [block.gate.register_forward_hook(at(n)) for n, block in enumerate(blocks(model))]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def calibrate(self, model: nn.Module, arm: Arm) -> None:
        """Sets the thresholds so that the share is kept on the held-out inputs; layers feed one another, so twice."""
        for _ in range(3):
            with torch.no_grad(), self.running(model, arm) as seen:
                for rows in self.held_out.split(8):
                    model(input_ids=rows)
            scores = {layer: torch.cat(found) for layer, found in seen["scores"].items()}
            whole = threshold(torch.cat(list(scores.values())), self.kept)
            arm.thresholds = {n: threshold(s, self.kept) if arm.per_layer else whole for n, s in scores.items()}

    def learn(self, arm: Arm, seed: int) -> nn.Module:
        """Trains LoRA, and what the arm learns itself, with the arm at work."""
        torch.manual_seed(seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(self.base), lora)
        own = [t for key in ("u", "zero") for t in arm.facts[key] if t.requires_grad]
        adapter = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [{"params": adapter, "lr": LEARNING_RATE}, {"params": own, "lr": LEARNING_RATE / 10}], weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: 0.5 + 0.5 * math.cos(math.pi * n / self.steps)
        )
        order = torch.Generator().manual_seed(seed)
        for step in range(self.steps):
            rows = self.train[torch.randint(len(self.train), (ROWS,), generator=order)]
            kept = self.kept
            if arm.mixed and step < self.steps * 2 // 3:  # then the short curriculum at the share that is wanted
                low = max(1, round(self.kept * self.top_k) - 1)
                kept = int(torch.randint(low, self.top_k + 1, (), generator=order)) / self.top_k
            frozen = arm.staged and step < self.steps // 2
            with self.running(model, arm, soft=True, kept=kept) as seen:
                logits = model(input_ids=rows).logits.float()
                with torch.no_grad():
                    theirs = self.base(input_ids=rows).logits.float()
                loss = divergence(theirs, logits)
                if not arm.staged:  # ZEDA learns from the original alone
                    loss = 0.5 * loss + F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
                elif seen["gap"]:
                    loss = loss + 0.1 * torch.stack(seen["gap"]).mean()  # the zero experts of a layer as one group
            loss.backward()
            if frozen:
                for parameter in adapter:
                    parameter.grad = None
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return model.eval()

    def measure(self, model: nn.Module, arm: Arm) -> dict[str, Any]:
        """Returns share, loss and divergence on held-out text, and how a continuation fares."""
        loss = apart = 0.0
        with torch.no_grad(), self.running(model, arm) as seen:
            for rows, theirs in zip(self.held_out.split(8), self.theirs, strict=True):
                logits = model(input_ids=rows).logits.float()
                loss += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
                apart += float(divergence(theirs, logits)) * rows.shape[0]
        kept = torch.cat([k.flatten() for k in seen["kept"]])
        with self.running(model, arm):
            said = self._continue(model)
        with torch.no_grad():
            whole = torch.cat([self.prompts, said], 1)
            logits = self.base(input_ids=whole).logits.float()[:, self.prompts.shape[1] - 1 : -1]
            liked = -F.cross_entropy(logits.flatten(0, 1), said.flatten())
        return {
            "kept": float(kept.float().mean()),
            "loss": loss / (len(self.held_out) * (LENGTH - 1)),
            "kl": apart / len(self.held_out),
            "agreement": float((said == self.continued).float().mean()),
            "log_probability": float(liked),
        }

    def kept_by_kind(self, model: nn.Module, arm: Arm) -> dict[str, float]:
        """Returns the kept share by class of token, and by quarter of the base's own uncertainty."""
        with torch.no_grad(), self.running(model, arm) as seen:
            for rows in self.held_out.split(8):
                model(input_ids=rows)
        layers = len(self.norms)
        per_batch = [torch.stack(seen["kept"][n : n + layers]) for n in range(0, len(seen["kept"]), layers)]
        share = torch.cat([k.float().mean((0, 2)) for k in per_batch])
        words = [self.tokenizer.decode([t]) for t in self.held_out.flatten().tolist()]
        found: dict[str, list[float]] = {}
        for word, value in zip(words, share.tolist(), strict=True):
            found.setdefault(kind_of(word), []).append(value)
        entropy = torch.cat([-(t.softmax(-1) * t.log_softmax(-1)).sum(-1).flatten() for t in self.theirs])
        for number, part in enumerate(entropy.argsort().chunk(4)):
            found[f"uncertainty, quarter {number + 1}"] = share[part.to(share.device)].tolist()
        return {key: statistics.mean(values) for key, values in sorted(found.items()) if len(values) >= 50}


def kind_of(word: str) -> str:
    """Names the class of a token by its text."""
    if not word.strip():
        return "white space"
    if word.strip().isdigit():
        return "digits"
    if word.strip().isalpha():
        return "a word or its beginning" if word[0] == " " else "inside a word"
    return "punctuation"


def threshold(scores: torch.Tensor, kept: float) -> float:
    """Returns the score from which on a share of the slots is kept."""
    flat = scores.flatten().float()
    place = min(len(flat) - 1, round((1 - kept) * len(flat)))
    return float(flat.sort().values[place])


def divergence(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Returns KL(base || model), the mean over all positions, in nats."""
    return F.kl_div(
        ours.log_softmax(-1).flatten(0, 1),
        theirs.log_softmax(-1).flatten(0, 1),
        None,
        None,
        "batchmean",
        log_target=True,
    )


def blocks(model: nn.Module) -> list[Any]:
    """Returns the MoE blocks, in order."""
    return [module for module in model.modules() if {"gate", "experts"} <= set(dict(module.named_children()))]


def _locate(asked: argparse.Namespace) -> tuple[str, list[str], list[str]]:
    if asked.base is not None:
        return asked.base, [Path(asked.train).read_text()], [Path(asked.eval).read_text()]
    from solidify.builtin import corpus, tiny_olmoe

    return str(tiny_olmoe.directory()), list(corpus.texts("train")), list(corpus.texts("heldout"))


def main() -> None:
    """Runs what is not there yet, and writes the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base")
    parser.add_argument("--train")
    parser.add_argument("--eval")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kept", type=float, default=0.75)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--output", type=Path, default=DOCS / "trash_trial.json")
    asked = parser.parse_args()
    trial = Trial(asked)
    found: dict[str, Any] = json.loads(asked.output.read_text()) if asked.output.is_file() else {}
    for arm in ARMS:
        for seed in range(asked.seeds if arm.trained else 1):
            how = "trained" if arm.trained else "as it is"
            key = f"{how}; {arm.name}; kept {asked.kept}; {asked.steps} steps; seed {seed}"
            if key in found:
                continue
            start = time.perf_counter()
            ready = trial.prepare(arm, seed)
            model = trial.learn(ready, seed) if arm.trained else trial.base
            trial.calibrate(model, ready)
            found[key] = trial.measure(model, ready)
            if seed == 0 and "trash" in arm.name:
                found[key]["by kind"] = trial.kept_by_kind(model, ready)
            asked.output.write_text(json.dumps(found, indent=1) + "\n")
            figures = {name: round(value, 5) for name, value in found[key].items() if isinstance(value, float)}
            print(f"{key}: {figures} ({time.perf_counter() - start:.0f} s)", flush=True)
    whole = trial.prepare(ARMS[1], 0)
    found["base"] = trial.measure(trial.base, whole)
    asked.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
