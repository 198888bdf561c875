"""Spread a loss over layers and heads: the most tiles dropped for what each head costs.

The loss is taken as the sum over sites and heads of cost[site] * lost**POWER, `lost` being the
softmax mass that a head loses per query row. The costs come from a few probes of the model; lost
mass and tiles dropped at every threshold from the calibration's histograms. A price per tile
(Lagrange's multiplier) then decides every head by itself: the threshold that makes
cost * lost**POWER - price * tiles least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bsfa_compile.calibrate.grid import EDGES, GATES
from bsfa_compile.calibrate.solve import last_edges, lost_levels
from bsfa_compile.calibrate.statistics import SiteStatistics

# KL grows between linearly and with the square of lost mass: 4.1 times for 2.7 times the mass.
POWER = 1.5
_STEPS = 40  # of the bisection over the price, in powers of two


class Spread:
    """Thresholds of every site by the loss predicted.

    costs: site -> loss per lost**POWER of each of its heads. most: the largest loss there is.
    """

    def __init__(
        self, sites: Mapping[str, SiteStatistics], costs: Mapping[str, float], gate: str
    ) -> None:
        self._sites = sites
        self._loss: dict[str, Tensor] = {}
        self._tiles: dict[str, Tensor] = {}
        for name, site in sites.items():
            counts = site.counts[GATES.index(gate), :, :-1].cumsum(dim=1).to(torch.float64)
            loss = costs[name] * lost_levels(site, gate) ** POWER
            beyond = torch.arange(len(EDGES)) > last_edges(site, gate)[:, None]
            # Column 0 stands for dense: nothing lost, nothing dropped.
            pad = torch.nn.functional.pad
            self._loss[name] = pad(loss.masked_fill(beyond, math.inf), (1, 0))
            self._tiles[name] = pad(counts, (1, 0))
        self.most = self._at(math.inf)[0]

    def thresholds(self, loss: float) -> dict[str, Tensor]:
        """Thresholds float32 [H, 1] of every site that lose at most `loss`, as predicted."""
        if loss >= self.most:
            return self._values(math.inf)
        low, high = -200.0, 100.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._at(2**middle)[0] <= loss else (low, middle)
        return self._values(2**low)

    def dropping(self, tiles: float) -> dict[str, Tensor]:
        """Thresholds float32 [H, 1] of every site at the least loss for about so many tiles."""
        low, high = -200.0, 100.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            chosen = self._at(2**middle)[1].items()
            found = sum(float(self._tiles[n].gather(1, c[:, None]).sum()) for n, c in chosen)
            low, high = (middle, high) if found <= tiles else (low, middle)
        return self._values(2**low)

    def _at(self, price: float) -> tuple[float, dict[str, Tensor]]:
        """The loss predicted at a price per tile, and each head's column [H]."""
        total, chosen = 0.0, {}
        for name, loss in self._loss.items():
            if math.isinf(price):
                column = torch.where(loss.isfinite(), torch.arange(loss.shape[1]), 0).amax(dim=1)
            else:
                worth = (loss - price * self._tiles[name]).flip(1)  # of equals the highest
                column = loss.shape[1] - 1 - worth.argmin(dim=1)
            total += float(loss.gather(1, column[:, None]).sum())
            chosen[name] = column
        return total, chosen

    def _values(self, price: float) -> dict[str, Tensor]:
        edges = torch.cat([torch.tensor([-math.inf]), EDGES])
        return {name: edges[column][:, None] for name, column in self._at(price)[1].items()}


def costs(
    sites: Mapping[str, SiteStatistics],
    probes: Sequence[tuple[Mapping[str, Tensor], float]],
    gate: str,
) -> dict[str, float]:
    """What a site costs, from probes: the thresholds [H, 1] of some sites, and the loss measured
    with all others dense.

    Every site is in one probe. A probe within the noise of the measurement counts as a tenth of
    the median cost, so that no site is ever thought free.
    """
    found: dict[str, float] = {}
    for values, loss in probes:
        lost = 0.0
        for name, value in values.items():
            levels = torch.nn.functional.pad(lost_levels(sites[name], gate), (1, 0))
            column = (torch.searchsorted(EDGES, value) + 1).masked_fill(value == -math.inf, 0)
            lost += float((levels.gather(1, column) ** POWER).sum())
        found |= dict.fromkeys(values, loss / lost if lost > 0 else math.nan)
    known = sorted(cost for cost in found.values() if math.isfinite(cost) and cost > 0)
    median = known[len(known) // 2] if known else 1.0
    return {
        name: max(cost, median / 10) if math.isfinite(cost) else median
        for name, cost in found.items()
    }
