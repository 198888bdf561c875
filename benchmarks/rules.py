"""The rules that `benchmarks.gates` compares, and how each is solved to drop so many tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import bsfa_compile as bsfa
from bsfa_compile.calibrate.grid import EDGES, ZERO_EDGE
from bsfa_compile.calibrate.spread import Spread
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q
from bsfa_compile.search import spread_by

Solve = Callable[[bsfa.Calibration, float], bsfa.Thresholds]  # for so many tiles dropped


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a calibration must be made with."""

    sink_tiles: int = 1
    block_q: int = BLOCK_Q
    block_k: int = BLOCK_K

    @property
    def scores(self) -> int:
        """In a tile."""
        return self.block_q * self.block_k


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule and how its thresholds are found."""

    name: str
    solve: Solve
    setting: Setting = Setting()
    precision: str = "exact"


def candidates(calibration: bsfa.Calibration) -> int:
    """Candidate tiles of the calibration data over all sites and heads."""
    return sum(site.candidates * site.heads for site in calibration.sites.values())


def by_count(gate: str) -> Solve:
    """The k whose thresholds are predicted to drop nearest to the tiles wanted."""

    def solve(calibration: bsfa.Calibration, wanted: float) -> bsfa.Thresholds:
        total = candidates(calibration)
        sites = calibration.sites.values()
        most = max(1, *(min(site.max_k, site.mid_sums.shape[3]) for site in sites))

        def made(k: int) -> bsfa.Thresholds:
            return calibration.thresholds(bsfa.TopK(k), gate)

        def dropped(k: int) -> float:
            return (made(k).dropped or 0.0) * total

        low, high = 1, most
        while high - low > 1:
            k = (low + high) // 2
            low, high = (k, high) if dropped(k) > wanted else (low, k)
        return made(min(low, high, key=lambda k: abs(dropped(k) - wanted)))

    return solve


def by_mass(calibration: bsfa.Calibration, wanted: float) -> bsfa.Thresholds:
    """Equal lost mass in every head."""
    share = min(wanted / max(candidates(calibration), 1), 1.0)
    return calibration.thresholds(bsfa.Sparsity(share), "relative")


def one_for_all(calibration: bsfa.Calibration, wanted: float) -> bsfa.Thresholds:
    """The same threshold for every head, ln(lambda), at most 0."""
    some = calibration.thresholds(bsfa.Budget(0.0), "relative")

    def made(edge: int) -> bsfa.Thresholds:
        values = {name: torch.full_like(v, float(EDGES[edge])) for name, v in some.values.items()}
        return replace(some, values=values, target=f"ln(lambda) = {float(EDGES[edge]):.3f}")

    def dropped(edge: int) -> float:
        predicted = calibration.predict(made(edge))
        return sum(
            float(predicted[name].dropped.sum()) * site.candidates
            for name, site in calibration.sites.items()
        )

    low, high = 0, ZERO_EDGE
    while high - low > 1:
        edge = (low + high) // 2
        low, high = (edge, high) if dropped(edge) < wanted else (low, edge)
    return made(min(low, high, key=lambda edge: abs(dropped(edge) - wanted)))


def by_cost(model: Any, probe: dict[str, object], scored: int) -> Solve:
    """Lost mass spread over the heads by what each site's costs, as measured on a probe."""
    spreads: dict[int, Spread] = {}

    def solve(calibration: bsfa.Calibration, wanted: float) -> bsfa.Thresholds:
        spread = spreads.get(id(calibration))
        if spread is None:
            spread = spreads[id(calibration)] = spread_by(model, calibration, ((), probe), scored)
        values = spread.dropping(wanted)
        return calibration.told(calibration.wrapped(values, "relative", "exact", COST))

    return solve


BARE = Setting(sink_tiles=0)  # its candidates are all uncut tiles
COST = "by mass and cost"  # the spread of a Quality's search, which asks the model
ORACLE = "true mass"  # see oracle.py: no thresholds
RULES = (
    Rule(name="paper", solve=by_count("absolute"), setting=BARE),
    Rule(name="paper + sink", solve=by_count("absolute")),
    Rule(name="relative by count", solve=by_count("relative")),
    Rule(name="relative by mass", solve=by_mass),
    Rule(name="one lambda", solve=one_for_all),
    Rule(name="by mass, int8", solve=by_mass, precision="int8"),
    Rule(name="by mass, no sink, int8", solve=by_mass, setting=BARE, precision="int8"),
    Rule(name="by mass, no sink", solve=by_mass, setting=BARE),
    Rule(name="by count, no sink", solve=by_count("relative"), setting=BARE),
    Rule(name="one lambda, no sink", solve=one_for_all, setting=BARE),
    Rule(name="by mass, two sinks", solve=by_mass, setting=Setting(sink_tiles=2)),
    *(
        Rule(
            name=f"by mass, no sink, {block_q} x {block_k}",
            solve=by_mass,
            setting=Setting(sink_tiles=0, block_q=block_q, block_k=block_k),
        )
        for block_q, block_k in ((128, 128), (128, 32), (64, 128), (64, 64))
    ),
)
NAMES = (*(rule.name for rule in RULES), COST, ORACLE)
