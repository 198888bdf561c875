"""Measures the crossover of a device: sparse and dense attention in turns, at growing lengths.

Random inputs with a planted sink, a key that scores about +6 for every query as sinks do in
trained models, in the commonest shapes: without it no random data skips much.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops import library
from bsfa_compile.ops.crossover import NEVER, Crossover

_SINK, _SINK_DIMS = 6.0, 8
_STEPS = 10  # of the search for a threshold that skips as wanted
_GAIN = 1.05  # what sparse must gain on the CPU, where the sample takes time as well
_QUEUED = {"cpu": 1, "cuda": 8}  # calls without waiting between them, as a model makes them


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One shape and skip rate: fraction of all visible tiles skipped, and SDPA's time over ours."""

    tokens: int
    skipped: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class _Course:
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    skips: tuple[float, ...]


_COURSES = {
    "cpu": _Course(
        heads=8,
        kv_heads=2,
        width=64,
        dtype=torch.float32,
        lengths=(1024, 2048, 4096, 8192),
        skips=(0.5, 0.75, 0.9),
    ),
    # Where sparse attention gains least: few tiles skipped, but some.
    "cuda": _Course(
        heads=32,
        kv_heads=8,
        width=128,
        dtype=torch.bfloat16,
        lengths=(512, 1024, 2048, 4096, 8192, 16384),
        skips=(0.25,),
    ),
}


def measure(device: torch.device, *, rounds: int = 5) -> Iterator[Contest]:
    """Every contest of a device's course, the shortest first."""
    course = _COURSES[device.type]
    with torch.inference_mode():
        for tokens in course.lengths:
            q, k, v = _inputs(course, tokens, device)
            for skip in course.skips:
                threshold = _threshold(q, k, v, skip)
                _, skipped = _sparse(q, k, v, threshold)
                dense, sparse = _times(q, k, v, threshold, rounds)
                yield Contest(tokens=tokens, skipped=skipped, ratio=dense / sparse)


def decide(device: torch.device, contests: list[Contest]) -> Crossover:
    """The crossover that contests show: from `tokens` on, every length has a skip rate that wins.

    `skipped` is the least rate that wins at the longest length, on a line between those measured.
    """
    least = _GAIN if device.type == "cpu" else 1.0
    tokens = NEVER
    for length in sorted({c.tokens for c in contests}, reverse=True):
        if max(c.ratio for c in contests if c.tokens == length) < least:
            break
        tokens = length
    if device.type != "cpu" or tokens == NEVER:
        return Crossover(tokens=tokens)
    longest = max(c.tokens for c in contests)
    line = sorted((c.skipped, c.ratio) for c in contests if c.tokens == longest)
    skipped = line[0][0]
    for (low, slow), (high, fast) in itertools.pairwise(line):
        if slow < least <= fast:
            skipped = low + (high - low) * (least - slow) / (fast - slow)
    return Crossover(tokens=tokens, skipped=round(skipped, 3))


def _inputs(course: _Course, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, L, D], k, v [1, Hkv, L, D] with a planted sink at key 0."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, course.heads, tokens, course.width, generator=generator)
    k, v = torch.randn(2, 1, course.kv_heads, tokens, course.width, generator=generator).unbind(0)
    q[..., :_SINK_DIMS] = 2.0
    k[:, :, 0, :_SINK_DIMS] = _SINK / (2.0 * _SINK_DIMS * course.width**-0.5)
    q, k, v = (x.to(device, course.dtype) for x in (q, k, v))
    return q, k, v


def _sparse(q: Tensor, k: Tensor, v: Tensor, threshold: float) -> tuple[float, float]:
    """The fractions of droppable and of visible tiles that a threshold skips."""
    values = torch.full((q.shape[1], 1), threshold, device=q.device)
    rule = ("relative", "auto", 1, 128, 64, False)
    *_, counts = library.attention(q, k, v, values, None, None, 0, True, None, None, None, *rule)
    dropped, droppable = counts.sum(dim=0).tolist()
    rows = torch.arange(0, q.shape[2], 128)
    visible = int(((rows + 128).clamp(max=q.shape[2]) / 64).ceil().sum()) * q.shape[1]
    return dropped / max(droppable, 1), dropped / visible


def _threshold(q: Tensor, k: Tensor, v: Tensor, skip: float) -> float:
    """A threshold that skips about this fraction of the droppable tiles, by halving."""
    low, high = -12.0, 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _sparse(q, k, v, middle)[0] < skip else (low, middle)
    return low


def _times(q: Tensor, k: Tensor, v: Tensor, threshold: float, rounds: int) -> tuple[float, float]:
    """Median seconds of a call of SDPA and of the operator, in turns."""
    values = torch.full((q.shape[1], 1), threshold, device=q.device)
    rule = ("relative", "auto", 1, 128, 64, False)

    def dense() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def sparse() -> None:
        library.attention(q, k, v, values, None, None, 0, True, None, None, None, *rule)

    calls = _QUEUED[q.device.type]
    taken: dict[Callable[[], None], list[float]] = {dense: [], sparse: []}
    for turn in range(rounds + 1):
        for run in (dense, sparse) if turn % 2 else (sparse, dense):
            _wait(q.device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            _wait(q.device)
            if turn:  # the first turn warms up
                taken[run].append((time.perf_counter() - start) / calls)
    return statistics.median(taken[dense]), statistics.median(taken[sparse])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
