"""Thresholds and the statistics of a site -> what they drop and lose on the calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa_compile.calibrate.grid import EDGES, GATES
from bsfa_compile.calibrate.solve import lost_levels
from bsfa_compile.calibrate.statistics import SiteStatistics


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """For one site: `dropped` [H], the fraction of candidate tiles; `lost` [H], the softmax mass
    per query row. `exact`: true of the calibration data to the tile; else an estimate, made from
    the histogram over all q blocks and, inside a bin, by interpolation.
    """

    dropped: Tensor
    lost: Tensor
    exact: bool


def predict(site: SiteStatistics, values: Tensor, gate: str) -> Prediction:
    """What thresholds `values` [H, n] (natural-log scaled logits) do on the calibration data."""
    counts = site.counts[GATES.index(gate), :, :-1].cumsum(dim=1).to(torch.float64)
    dropped = counts / max(site.candidates, 1)
    lost = lost_levels(site, gate)
    blocks = len(site.block_candidates)
    column = torch.arange(blocks).clamp_max(values.shape[1] - 1)
    share = torch.zeros(values.shape[1], dtype=torch.float64)
    share.index_add_(0, column, site.block_candidates.to(torch.float64) / max(site.candidates, 1))
    finite_or_dense = torch.isin(values, EDGES) | (values == -torch.inf)
    return Prediction(
        dropped=(levels_at(dropped, values) * share).sum(dim=1),
        lost=(levels_at(lost, values) * share).sum(dim=1),
        exact=bool(finite_or_dense.all()) and bool((values == values[:, :1]).all()),
    )


def levels_at(levels: Tensor, values: Tensor) -> Tensor:
    """Levels [H, len(EDGES)] at thresholds [H, n], linear between two edges: [H, n]."""
    above = torch.searchsorted(EDGES, values.contiguous())
    high = above.clamp_max(len(EDGES) - 1)
    low = (high - 1).clamp_min(0)
    # An infinite threshold drops what the end of the grid drops, or nothing.
    bounded = values.clamp(float(EDGES[0]), float(EDGES[-1])).to(torch.float64)
    width = (EDGES[high] - EDGES[low]).to(torch.float64)
    part = torch.where(high > low, (bounded - EDGES[low]) / width, 1.0)
    at_low, at_high = levels.gather(1, low), levels.gather(1, high)
    between = at_low + (at_high - at_low) * part
    between = torch.where(bounded == EDGES[high], at_high, between)
    return torch.where(values < EDGES[0], 0.0, between)
