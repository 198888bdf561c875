"""Judge a model against dense attention on the evaluation texts, and match two rules' drop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import bsfa_compile as bsfa
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.demo.outcome import Rule
from bsfa_compile.evaluate import (
    Comparison,
    NeedlePrompt,
    compare,
    pool,
    retrieved,
    tail_logits,
)

TRIES = 3  # measured values of k, each a forward pass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A rule over the evaluation texts.

    counts: site -> int64 [H, 2], (dropped, candidates). first: tiles dropped in the first text.
    """

    comparison: Comparison
    found: int
    counts: dict[str, Tensor]
    first: int


class Judge:
    """Evaluation texts with facts hidden in them, and what the dense model makes of them.

    The last `scored` tokens of each text are compared, and the questions behind it answered, in
    one forward pass.
    """

    def __init__(self, model: Any, prompts: Sequence[NeedlePrompt], scored: int) -> None:
        self._prompts, self._scored = prompts, scored
        self._last = scored + max(prompt.questions for prompt in prompts)
        self._dense = []
        self.dense_found, self.forward_seconds = 0, math.inf
        for prompt in prompts:
            start = time.perf_counter()
            logits = self._logits(model, prompt)
            self.dense_found += sum(retrieved(logits, prompt))
            self.forward_seconds = min(self.forward_seconds, time.perf_counter() - start)
            self._dense.append(self._text(logits, prompt))

    @property
    def facts(self) -> int:
        """How many facts are hidden in all texts."""
        return sum(len(prompt.needles) for prompt in self._prompts)

    def measure(self, model: nn.Module) -> Measured:
        """The optimized model against dense, over all texts; its counters start at zero."""
        comparisons, found, first = [], 0, 0
        for prompt, dense in zip(self._prompts, self._dense, strict=True):
            logits = self._logits(model, prompt)
            first = first or dropped_tiles(counters(model))
            found += sum(retrieved(logits, prompt))
            targets = prompt.input_ids[0, prompt.text_stop - self._scored : prompt.text_stop]
            comparisons.append(compare(dense, self._text(logits, prompt), targets))
        counts = {name: held.cpu().clone() for name, held in counters(model).items()}
        pooled = pool(comparisons)
        return Measured(comparison=pooled, found=found, counts=counts, first=first)

    def forward(self, model: nn.Module) -> float:
        """Run the first text alone; the seconds it took."""
        start = time.perf_counter()
        retrieved(self._logits(model, self._prompts[0]), self._prompts[0])  # waits for a GPU
        return time.perf_counter() - start

    def _logits(self, model: Any, prompt: NeedlePrompt) -> Tensor:
        return tail_logits(model, prompt.input_ids, self._last)

    def _text(self, logits: Tensor, prompt: NeedlePrompt) -> Tensor:
        """Of the logits of a prompt's tail, those that predict the scored tokens of its text."""
        stop = len(logits) - prompt.questions
        return logits[stop - self._scored : stop].clone()

    def rule(self, name: str, description: str, measured: Measured) -> Rule:
        """What was measured of a rule, in fractions of its candidate tiles."""
        whole = {site: held[:, 1].clamp_min(1) for site, held in measured.counts.items()}
        return Rule(
            name=name,
            description=description,
            dropped=dropped_tiles(measured.counts)
            / sum(int(held.sum()) for held in whole.values()),
            kept={
                site: (1 - held[:, 0] / whole[site]).tolist()
                for site, held in measured.counts.items()
            },
            comparison=measured.comparison,
            found=measured.found,
            facts=self.facts,
        )


def counters(model: nn.Module) -> dict[str, Tensor]:
    """The counters int64 [H, 2] of an optimized model's sites, in the model's order."""
    return {
        name.replace(".bsfa_counters_0", "").replace(".bsfa_counters_", "#"): buffer
        for name, buffer in model.named_buffers()
        if "bsfa_counters_" in name
    }


def dropped_tiles(counts: Mapping[str, Tensor]) -> int:
    """Tiles dropped over all sites and heads."""
    return sum(int(held[:, 0].sum()) for held in counts.values())


def wanted_tiles(calibration: bsfa.Calibration, solved: bsfa.Thresholds) -> float:
    """Tiles that thresholds, solved from a calibration, drop on its data."""
    tiles = sum(site.candidates * site.heads for site in calibration.sites.values())
    return (solved.dropped or 0.0) * tiles


def match_dropped(
    paper: bsfa.Calibration,
    wanted: float,
    goal: int,
    dropped_by: Callable[[bsfa.Thresholds], int],
) -> bsfa.Thresholds:
    """The paper's thresholds with the k that drops `goal` tiles, as `dropped_by` measures.

    The first k is the one that would drop `wanted` tiles of the calibration data if each q block
    kept k candidates; thresholds, which are means, keep more or fewer, so two secant steps follow.
    """
    tried: dict[int, int] = {}
    k, most = by_counting(paper, wanted), max(site.max_k for site in paper.sites.values())
    while k not in tried and len(tried) < TRIES:
        tried[k] = dropped_by(paper.thresholds(bsfa.TopK(k)))
        *before, last = tried
        step = 1 if tried[k] > goal else -1
        if before and tried[last] != tried[before[-1]]:
            slope = (tried[last] - tried[before[-1]]) / (last - before[-1])
            step = round((goal - tried[last]) / slope)
        k = min(max(k + step, 1), most)
    return paper.thresholds(bsfa.TopK(min(tried, key=lambda k: abs(tried[k] - goal))))


def by_counting(paper: bsfa.Calibration, wanted: float) -> int:
    """The k at which about `wanted` tiles are left over if each q block keeps k candidates."""

    def too_many(k: int) -> float:
        return sum(_left(site, k) * site.heads for site in paper.sites.values()) - wanted

    low, high = 1, max(site.max_k for site in paper.sites.values())
    while high - low > 1:
        k = (low + high) // 2
        low, high = (k, high) if too_many(k) > 0 else (low, k)
    return min(low, high, key=lambda k: abs(too_many(k)))


def _left(site: SiteStatistics, k: int) -> float:
    """Tiles per head that are left over when every q block keeps k candidates."""
    return float((site.block_candidates - k * site.reached).clamp_min(0).sum())
