"""Thresholds that depend on position: three numbers per head that hold past the calibrated length.

The threshold of absolute q block i is a + b * log2(i + 1), -inf before the first block that drops.
A row deep in a long text spreads its mass over more tiles, so at one threshold it loses more: with
b each octave of positions loses what was asked for. (b = -ln 2 follows 1 / length, the rule of
TensorRT-LLM's skip softmax.) Columns count absolute positions, so one fit serves every length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bsfa_compile.calibrate.grid import COARSE_EDGES, GATES, UNIT, octave
from bsfa_compile.calibrate.predict import levels_at
from bsfa_compile.calibrate.solve import lost_levels
from bsfa_compile.calibrate.statistics import SiteStatistics

_HALVING = -math.log(2)  # nats per octave, where the data do not tell


def columns(curves: Tensor, count: int, gate: str) -> Tensor:
    """Curves [H, 3] = (a, b, first q block that drops) -> thresholds float32 [H, count]."""
    a, b, first = curves.to(torch.float64)[:, :, None].unbind(dim=1)
    block = torch.arange(count, dtype=torch.float64)
    values = (a + b * torch.log2(block + 1)).masked_fill(block < first, -math.inf)
    return (values.clamp_max(0.0) if gate == "relative" else values).to(torch.float32)


def fit(site: SiteStatistics, values: Tensor, gate: str) -> Tensor:
    """Curves float32 [H, 3] through solved thresholds [H, n].

    One threshold per head: the softmax mass that it loses on the calibration data is what every
    octave of positions may lose. A column per q block: the line through the columns.
    """
    made = _through_mass(site, values, gate) if values.shape[1] == 1 else _line(site, values)
    return made.to(torch.float32)


def _positions(site: SiteStatistics) -> Tensor:
    """log2(i + 1) of every q block reached: float64 [n]."""
    return torch.log2(torch.arange(1, len(site.reached) + 1, dtype=torch.float64))


def _regress(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares of y [H, n] on x [n]: (intercept, slope) [H]; slope NaN if unknown."""
    total = weight.sum(dim=1).clamp_min(1e-300)
    y = torch.where(weight > 0, y, 0.0)
    mean_x, mean_y = (weight * x).sum(dim=1) / total, (weight * y).sum(dim=1) / total
    off = x - mean_x[:, None]
    spread = (weight * off.square()).sum(dim=1)
    slope = (weight * off * y).sum(dim=1) / spread
    slope = torch.where(spread > 1e-9 * total, slope, math.nan)
    return mean_y - slope.nan_to_num(0.0) * mean_x, slope


def _line(site: SiteStatistics, values: Tensor) -> Tensor:
    finite = values.isfinite()
    weight = torch.where(finite, site.reached[: values.shape[1]].to(torch.float64), 0.0)
    a, b = _regress(_positions(site)[: values.shape[1]], values.to(torch.float64), weight)
    first = torch.where(finite.any(dim=1), finite.to(torch.int64).argmax(dim=1), 0)
    a = torch.where(weight.sum(dim=1) > 0, a, -math.inf)
    return torch.stack([a, b.nan_to_num(0.0), first.to(torch.float64)], dim=1)


def _through_mass(site: SiteStatistics, values: Tensor, gate: str) -> Tensor:
    heads, octaves = site.heads, len(site.octave_rows)
    dense = torch.tensor([-math.inf, 0.0, 0.0], dtype=torch.float64).expand(heads, 3)
    if octaves == 0:
        return dense
    eps = levels_at(lost_levels(site, gate), values)  # [H, 1]
    rows = site.octave_rows.to(torch.float64).clamp_min(1)
    mass = site.octave_mass[GATES.index(gate), :, :, :-1].cumsum(dim=2).to(torch.float64)
    lost = mass / (UNIT * rows[:, None])  # [H, octaves, edges], never falling
    edges = COARSE_EDGES.to(torch.float64)
    cap = torch.zeros(heads) if gate == "relative" else _highest(site, gate)
    at = (lost <= eps[:, :, None]).sum(dim=2) - 1
    low, high = at.clamp_min(0), (at + 1).clamp_max(len(edges) - 1)
    below, above = (lost.gather(2, i[:, :, None])[:, :, 0] for i in (low, high))
    part = ((eps - below) / (above - below).clamp_min(1e-300)).clamp(0, 1)
    found = (edges[low] + part * (edges[high] - edges[low])).masked_fill(at < 0, -math.inf)
    open_ = (found < cap[:, None]) & (at >= 0)  # the others could lose more than they may drop
    blocks = site.reached.to(torch.float64)
    owner = torch.tensor([octave(i) for i in range(len(blocks))])
    x = torch.zeros(octaves, dtype=torch.float64)
    count = x.clone().index_add_(0, owner, blocks).clamp_min(1)
    x = x.index_add_(0, owner, blocks * _positions(site)) / count
    a, b = _regress(x, found, torch.where(open_, site.octave_rows.to(torch.float64), 0.0))
    last = torch.where(open_, torch.arange(octaves), -1).amax(dim=1)
    # Fewer than two octaves say nothing of the slope: the cap holds to the last one, then 1/length.
    anchor = torch.where(last >= 0, found.gather(1, last.clamp_min(0)[:, None])[:, 0], cap.double())
    where = torch.where(last >= 0, x[last.clamp_min(0)], x[-1])
    known = b.isfinite() & (b <= 0)
    rising = b.isfinite() & (b > 0)
    flat = torch.where(open_, found, math.inf).amin(dim=1)
    a = torch.where(known, a, torch.where(rising, flat, anchor - _HALVING * where))
    b = torch.where(known, b, torch.where(rising, 0.0, _HALVING))
    a = _lowered(a, b, x, lost, rows, eps[:, 0], gate)
    made = torch.stack([a, b, torch.zeros_like(a)], dim=1)
    return torch.where((values == -math.inf), dense, made)


def _highest(site: SiteStatistics, gate: str) -> Tensor:
    """The first coarse edge [H] above every statistic seen."""
    full = site.octave_mass[GATES.index(gate)].sum(dim=1) > 0
    top = torch.where(full, torch.arange(full.shape[1]), 0).amax(dim=1)
    return COARSE_EDGES[top.clamp_max(len(COARSE_EDGES) - 1)]


def _lowered(
    a: Tensor, b: Tensor, x: Tensor, lost: Tensor, rows: Tensor, eps: Tensor, gate: str
) -> Tensor:
    """The intercept, lowered until the calibration data lose at most `eps` [H] altogether."""
    low, high = torch.full_like(a, 16.0), torch.zeros_like(a)  # how far to go down
    for step in range(24):
        down = (low + high) / 2 if step else high
        t = (a - down)[:, None] + b[:, None] * x
        t = t.clamp_max(0.0) if gate == "relative" else t
        index = torch.searchsorted(COARSE_EDGES.double(), t, right=True) - 1
        level = lost.gather(2, index.clamp_min(0)[:, :, None])[:, :, 0]
        level = torch.where(index >= 0, level, 0.0)
        good = (level * rows).sum(dim=1) / rows.sum() <= eps * (1 + 1e-9)
        if step == 0 and bool(good.all()):
            return a
        low, high = torch.where(good, down, low), torch.where(good, high, down)
    return a - low
