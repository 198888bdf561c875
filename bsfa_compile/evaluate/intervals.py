"""95 % confidence intervals: Wilson's for scores, a bootstrap over documents for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bsfa_compile.errors import InputError

Z = 1.959963984540054  # two-sided 95 %
RESAMPLES = 10_000
METHODS = (
    f"95 % intervals: scores by Wilson's, a sample being one trial; NLL, KL and changes of scores "
    f"by the percentile bootstrap over documents or samples, {RESAMPLES} resamples"
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over `n` units and its interval [low, high]; the whole line if one unit tells none."""

    mean: float
    low: float
    high: float
    n: int


def wilson(scores: Sequence[float]) -> Estimate:
    """Mean of scores in [0, 1] with Wilson's interval (Wilson 1927, without correction).

    A score between 0 and 1 counts as that part of a success: no wider spread is possible at the
    same mean, so the interval is never too short for it. Raises InputError without scores.
    """
    n = len(scores)
    if n == 0 or not all(0 <= score <= 1 for score in scores):
        raise InputError(f"wilson: expected scores between 0 and 1, at least one, got {scores!r}")
    p = sum(scores) / n
    centre = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
    scale = 1 + Z * Z / n
    low, high = (centre - half) / scale, (centre + half) / scale
    return Estimate(mean=p, low=max(0.0, min(low, p)), high=min(1.0, max(high, p)), n=n)


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean of independent units with the percentile bootstrap's interval; the same for a seed.

    One unit tells nothing of the spread: its interval is infinite. Raises InputError without any.
    """
    if len(values) == 0:
        raise InputError("bootstrap: expected at least one value, got none")
    held = np.asarray(values, dtype=np.float64)
    mean = float(held.mean())
    if len(held) == 1:
        return Estimate(mean=mean, low=-math.inf, high=math.inf, n=1)
    drawn = np.random.default_rng(seed).integers(len(held), size=(RESAMPLES, len(held)))
    low, high = np.percentile(held[drawn].mean(axis=1), [2.5, 97.5])
    return Estimate(mean=mean, low=float(low), high=float(high), n=len(held))
