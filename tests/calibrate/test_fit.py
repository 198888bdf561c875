"""Thresholds over positions: calibrated on short inputs, they lose as little on long ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bsfa_compile.calibrate import Budget, Calibration, Thresholds, TopK
from bsfa_compile.calibrate.fit import columns
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.errors import InputError, ThresholdsError
from bsfa_compile.ops import reference
from bsfa_compile.ops.tiles import Geometry

HEADS, SHORT, LONG = 2, 512, 2048


def geometry(length: int) -> Geometry:
    return Geometry(q_len=length, k_len=length, is_causal=True, block_q=16, block_k=8)


def sample(seed: int, length: int) -> tuple[Tensor, Tensor]:
    """Independent scores, a little sink: mass spreads over more and more keys."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, HEADS, length, 8, generator=generator)
    k = torch.randn(1, 1, length, 8, generator=generator)
    return q * 0.6, k


@pytest.fixture(scope="module", name="calibration")
def make_calibration(observed: Callable[..., SiteStatistics]) -> Calibration:
    first, second = (observed(*sample(seed, SHORT), geometry(SHORT)) for seed in (1, 2))
    return Calibration(sites={"a": first.merge(second)}, samples=2)


def loss(values: Tensor, gate: str) -> tuple[float, float]:
    """Mass lost per row in the last quarter of a long input, and fraction of tiles dropped."""
    q, k = sample(9, LONG)
    q0 = LONG * 3 // 4
    g = replace(geometry(LONG), q_len=LONG - q0, q_start=q0)
    q = q[:, :, q0:]
    kept = reference.tile_mask(q, k, values, g, scale=1.0, gate=gate)
    seen = reference.visibility(g, None, 1)[0]
    tiles = seen.unflatten(0, (-1, 16)).unflatten(2, (-1, 8)).any(dim=3).any(dim=1)
    away = tiles & ~kept[0, :, : len(tiles)]
    s = reference.scores(q, k, 1.0)[0].masked_fill(~seen, -math.inf)
    p = torch.softmax(s, dim=-1).unflatten(1, (-1, 16)).unflatten(3, (-1, 8)).sum(dim=(2, 4))
    rows = HEADS * (LONG - q0)
    return float((p * away).sum()) / rows, float(away.sum() / tiles.sum() / HEADS)


def test_a_budget_holds_at_four_times_the_length(calibration: Calibration) -> None:
    eps = 0.05
    plain = calibration.thresholds(Budget(eps))
    fitted = calibration.thresholds(Budget(eps), max_length=LONG)
    assert plain.values["a"].shape == (HEADS, 1) and fitted.values["a"].shape == (HEADS, LONG // 16)
    lost, dropped = loss(plain.values["a"], "relative")
    again, fewer = loss(fitted.values["a"], "relative")
    assert lost > 4 * eps, "the data must need the fit"
    assert 0.1 * eps < again < eps
    assert 0 < fewer < dropped
    assert fitted.lost is not None and fitted.lost <= eps * 1.01
    assert (fitted.values["a"] <= 0).all() and (fitted.values["a"].diff(dim=1) <= 0).all()


def test_top_k_goes_on_as_it_began(calibration: Calibration) -> None:
    """The k-th largest of ever more independent tiles rises: its last column keeps too many."""
    plain = calibration.thresholds(TopK(8))
    fitted = calibration.thresholds(TopK(8), max_length=LONG)
    _, few = loss(plain.values["a"], "absolute")
    _, more = loss(fitted.values["a"], "absolute")
    tiles = LONG * 7 / 8 / 8  # mean visible tiles of the rows judged
    assert (1 - few) * tiles > 2.5 * (1 - more) * tiles > 0
    assert (fitted.values["a"][:, 0] == -math.inf).all()  # too few tiles there, as in the data
    assert not (plain.values["a"][:, 2] != -math.inf).any()
    assert 4 < (1 - more) * tiles < 24


def test_a_fit_is_small_on_disk_and_reaches_any_length(
    calibration: Calibration, tmp_path: Path
) -> None:
    made = calibration.thresholds(Budget(0.05), max_length=2**20)
    made.save(tmp_path / "t")
    assert (tmp_path / "t").stat().st_size < 4096
    again = Thresholds.load(tmp_path / "t")
    assert again.equal(made) and again.curves is not None
    short = again.reaching(SHORT)
    assert torch.equal(short.values["a"], made.values["a"][:, : SHORT // 16])
    with pytest.raises(ThresholdsError, match="max_length"):
        calibration.thresholds(Budget(0.05)).reaching(SHORT)
    with pytest.raises(InputError, match="max_length"):
        calibration.thresholds(Budget(0.05), max_length=0)


def test_heads_without_a_say_stay_dense() -> None:
    empty = SiteStatistics(2, block_q=16, block_k=8, sink_tiles=1)
    made = Calibration(sites={"a": empty}).thresholds(Budget(0.1), max_length=640)
    assert (made.values["a"] == -math.inf).all() and made.values["a"].shape == (2, 40)
    curve = torch.tensor([[-1.0, -0.5, 2.0]])
    assert columns(curve, 4, "relative").tolist()[0][:2] == [-math.inf, -math.inf]
    assert columns(curve, 4, "absolute")[0, 3] == -2.0
