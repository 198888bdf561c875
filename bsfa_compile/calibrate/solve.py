"""Statistics and a target -> thresholds: what the user asks for, as a number per head.

Thresholds are scaled logits in natural-log units. For the relative gate none is above 0, so that
a tile that holds a row's maximum is never dropped. A head without a single candidate tile has
shown nothing and stays dense (-inf).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from bsfa_compile.calibrate.grid import BINS, EDGES, GATES, UNIT, ZERO_EDGE
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.errors import CalibrationError, InputError

_TRIM = 4  # votes from which on the smallest and the largest do not count


def _fraction(name: str, value: float) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and 0 <= value <= 1):
        raise InputError(f"{name} must be a number from 0 to 1, got {value!r}")


@dataclass(frozen=True)
class Budget:
    """At most `eps` of the softmax mass is lost per query row, on average, in every head."""

    eps: float

    def __post_init__(self) -> None:
        _fraction("Budget.eps", self.eps)


@dataclass(frozen=True)
class TopK:
    """About `k` of the candidate tiles are kept per query block (the paper's target).

    The threshold is the mean over samples, from four samples on without the smallest and largest.
    """

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise InputError(f"TopK.k must be an integer of at least 1, got {self.k!r}")


@dataclass(frozen=True)
class Sparsity:
    """`fraction` of all candidate tiles of the model is dropped, at equal lost mass per head."""

    fraction: float

    def __post_init__(self) -> None:
        _fraction("Sparsity.fraction", self.fraction)


Target = Budget | TopK | Sparsity


def solve(sites: Mapping[str, SiteStatistics], target: Target, gate: str) -> dict[str, Tensor]:
    """Thresholds [H, n] float32 of every site: n = 1, or the q blocks seen for TopK.

    Raises InputError for an unknown gate or target, CalibrationError if there are no statistics
    or TopK asks for more than was remembered.
    """
    if gate not in GATES:
        raise InputError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if not isinstance(target, Budget | TopK | Sparsity):
        raise InputError(f"target must be Budget, TopK or Sparsity, got {target!r}")
    if not sites:
        raise CalibrationError("no attention was observed: there is nothing to solve")
    if isinstance(target, TopK):
        return {name: _top_k(name, site, target.k, gate) for name, site in sites.items()}
    if isinstance(target, Budget):
        return {name: _budget(site, target.eps, gate) for name, site in sites.items()}
    return _sparsity(sites, target.fraction, gate)


def lost_levels(site: SiteStatistics, gate: str) -> Tensor:
    """Mass lost per query row with the threshold on each edge: float64 [H, len(EDGES)]."""
    lost = site.mass[GATES.index(gate), :, :-1].cumsum(dim=1)
    return lost.to(torch.float64) / (UNIT * max(site.rows, 1))


def last_edges(site: SiteStatistics, gate: str) -> Tensor:
    """The highest edge each head may use, int64 [H]; -1 for a head without candidates.

    Relative: the edge at 0. Absolute: the first edge above every statistic seen; going higher
    would drop no more here and anything elsewhere.
    """
    full = site.counts[GATES.index(gate)] > 0
    top = torch.where(full, torch.arange(BINS), -1).amax(dim=1)
    if gate == "relative":
        return torch.where(top >= 0, ZERO_EDGE, -1)
    return top.clamp_max(len(EDGES) - 1)


def _at_edges(index: Tensor) -> Tensor:
    """Thresholds [H, 1] on the edges `index` [H]; -inf for -1."""
    return torch.where(index >= 0, EDGES[index.clamp_min(0)], -math.inf)[:, None]


def _budget(site: SiteStatistics, eps: float, gate: str) -> Tensor:
    allowed = (lost_levels(site, gate) <= eps).sum(dim=1) - 1  # levels never fall
    return _at_edges(torch.minimum(allowed, last_edges(site, gate)))


def _sparsity(sites: Mapping[str, SiteStatistics], fraction: float, gate: str) -> dict[str, Tensor]:
    """Drop the bins of all heads in the order of the lost mass that they lead to."""
    levels, bins, owners, counts = [], [], [], []
    heads = 0
    for site in sites.values():
        found = site.counts[GATES.index(gate)]
        usable = torch.arange(BINS) <= last_edges(site, gate)[:, None]
        head, bin_ = ((found > 0) & usable).nonzero(as_tuple=True)
        levels.append(lost_levels(site, gate)[head, bin_])
        bins.append(bin_)
        owners.append(head + heads)
        counts.append(found[head, bin_])
        heads += site.heads
    bin_, owner = torch.cat(bins), torch.cat(owners)
    order = bin_.argsort(stable=True)  # among equal levels a head's lower bins come first
    order = order[torch.cat(levels)[order].argsort(stable=True)]
    total = sum(site.candidates * site.heads for site in sites.values())
    needed = math.ceil(fraction * total * (1 - 1e-12))
    dropped = torch.cat(counts)[order].cumsum(dim=0)
    taken = order[: int((dropped < needed).sum()) + 1] if needed > 0 else order[:0]
    last = torch.full((heads,), -1).scatter_reduce(0, owner[taken], bin_[taken], "amax")
    solved, start = {}, 0
    for name, site in sites.items():
        mine = last[start : start + site.heads]
        solved[name] = _at_edges(_up_to_next(site, gate, mine))
        start += site.heads
    return solved


def _up_to_next(site: SiteStatistics, gate: str, index: Tensor) -> Tensor:
    """Move edges [H] up as far as they drop no further tile; -1 stays."""
    full = site.counts[GATES.index(gate)] > 0
    later = full & (torch.arange(BINS) > index[:, None])
    following = torch.where(later, torch.arange(BINS), BINS).amin(dim=1)
    moved = torch.minimum(following - 1, last_edges(site, gate))
    return torch.where(index >= 0, moved, -1)


def _top_k(name: str, site: SiteStatistics, k: int, gate: str) -> Tensor:
    """The paper's thresholds [H, n]: the mean midpoint per head and q block."""
    if k > site.max_k:
        raise CalibrationError(
            f"TopK({k}): the calibration of {name!r} remembers k up to {site.max_k}; ask for a "
            f"smaller k or calibrate again with max_k={k}"
        )
    g = GATES.index(gate)
    blocks = len(site.reached)
    if blocks == 0:
        return torch.full((site.heads, 1), -math.inf)
    if k > site.mid_sums.shape[3]:  # no block ever had more than k candidates
        return torch.full((site.heads, blocks), -math.inf)
    votes = site.mid_votes[g, :, :, k - 1]
    total = site.mid_sums[g, :, :, k - 1].to(torch.float64) / UNIT
    ends = (site.mid_low + site.mid_high)[g, :, :, k - 1].to(torch.float64)
    # So that one odd sample does not move the mean: the smallest and the largest are left out.
    trimmed = votes >= _TRIM
    mean = torch.where(trimmed, (total - ends) / (votes - 2), total / votes)
    values = torch.where(votes > 0, mean, -math.inf)
    reached = torch.where(site.reached > 0, torch.arange(blocks), -1)
    nearest = reached.cummax(dim=0).values
    values = torch.where(nearest >= 0, values[:, nearest.clamp_min(0)], -math.inf)
    return (values.clamp_max(0.0) if gate == "relative" else values).to(torch.float32)
