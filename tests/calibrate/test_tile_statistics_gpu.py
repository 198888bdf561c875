"""The calibration kernel measures what plain torch operations measure, tile by tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bsfa_compile.calibrate.grid import EDGES
from bsfa_compile.calibrate.measure import measure
from bsfa_compile.calibrate.solve import Budget, TopK, solve
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.ops import tile_statistics
from bsfa_compile.ops.tiles import Geometry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a CUDA card of compute capability 8.0 or newer",
    ),
]

BF16, F16 = torch.bfloat16, torch.float16


class _Recorded(SiteStatistics):
    """Keeps the statistic [2, H, C] and the mass [H, C] of every q block's candidates."""

    def add_blocks(self, first: int, statistic: Tensor, mass: Tensor) -> None:
        super().add_blocks(first, statistic, mass)
        for n in range(mass.shape[1]):
            counted = mass[0, n] >= 0
            if counted.any():
                self.seen.append((first + n, statistic[:, :, n, counted], mass[:, n, counted]))

    seen: list[tuple[int, Tensor, Tensor]]


def _observed(
    q: Tensor, k: Tensor, g: Geometry, mask: Tensor | None, softcap: float | None
) -> _Recorded:
    into = _Recorded(
        q.shape[1], block_q=128, block_k=64, sink_tiles=g.sink_tiles, max_k=16, device=q.device
    )
    into.seen = []
    scale = q.shape[3] ** -0.5
    measure(q, k, g, key_padding_mask=mask, softcap=softcap, scale=scale, into=into)
    return into


def _inputs(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Transposed views, as models give them; scores spread over about +-10 nats."""
    batch, heads, kv, lq, lk, d = shape
    made = torch.Generator("cuda").manual_seed(lq + lk + d)
    q = torch.randn(batch, lq, heads, d, device="cuda", generator=made) * 2.5
    k = torch.randn(batch, lk, kv, d, device="cuda", generator=made)
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)


_CASES: list[tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = [
    ((1, 4, 4, 1024, 1024, 128), BF16, {"is_causal": True}),
    ((1, 8, 1, 1000, 1000, 128), BF16, {"is_causal": True}),
    ((2, 4, 2, 777, 777, 64), BF16, {"is_causal": True}),
    ((1, 6, 2, 1333, 1333, 96), F16, {"is_causal": True, "sink_tiles": 2}),
    ((1, 2, 1, 900, 900, 256), BF16, {"is_causal": True}),
    ((1, 2, 2, 700, 700, 192), F16, {"is_causal": True, "sink_tiles": 0}),
    ((1, 2, 1, 640, 900, 80), BF16, {}),
    ((1, 4, 2, 515, 1111, 128), F16, {}),
    ((1, 4, 2, 1500, 1500, 128), BF16, {"is_causal": True, "window": 700}),
    ((1, 4, 2, 1200, 1200, 64), BF16, {"window": 500}),
    ((1, 4, 2, 300, 1300, 128), BF16, {"is_causal": True, "q_start": 1000}),
    ((1, 4, 2, 450, 1301, 128), BF16, {"is_causal": True, "q_start": 777}),
    ((2, 4, 2, 1000, 1000, 128), BF16, {"is_causal": True, "left": 333}),
    ((2, 4, 1, 600, 900, 64), F16, {"left": 70, "hole": True}),
    ((2, 4, 2, 1000, 1000, 128), BF16, {"is_causal": True, "left": 200, "hole": True}),
    ((1, 4, 2, 1024, 1024, 128), BF16, {"is_causal": True, "softcap": 8.0}),
    ((1, 32, 8, 5000, 5000, 128), BF16, {"is_causal": True}),
]


@pytest.mark.parametrize(("shape", "dtype", "config"), _CASES)
def test_every_tile(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    config: dict[str, Any],
) -> None:
    config = dict(config)
    left, hole, softcap = (
        config.pop("left", 0),
        config.pop("hole", False),
        config.pop("softcap", None),
    )
    q, k = _inputs(*shape, dtype=dtype)
    mask = None
    if left or hole:
        mask = torch.ones(shape[0], shape[4], dtype=torch.bool, device="cuda")
        mask[-1, :left] = False
        if hole:
            mask[:, 400:530] = False
    g = Geometry(q_len=shape[3], k_len=shape[4], **config)
    calls: list[tuple[int, int]] = []
    kernel = tile_statistics.measure

    def watched(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(args[3])
        return kernel(*args)

    monkeypatch.setattr(tile_statistics, "measure", watched)
    got = _observed(q, k, g, mask, softcap)
    ran = len(calls)
    assert ran, "the kernel did not run"
    monkeypatch.setattr(tile_statistics, "reason", lambda *args: "not now")
    want = _observed(q, k, g, mask, softcap)
    assert want.candidates > 0 and len(calls) == ran

    assert (got.rows, got.samples, got.lengths) == (want.rows, want.samples, want.lengths)
    assert torch.equal(got.reached, want.reached)
    assert torch.equal(got.block_candidates, want.block_candidates)
    assert [block for block, *_ in got.seen] == [block for block, *_ in want.seen]
    for (_, statistic, mass), (_, wanted, wanted_mass) in zip(got.seen, want.seen, strict=True):
        torch.testing.assert_close(statistic, wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(mass, wanted_mass, rtol=1e-3, atol=1e-6)

    for gate in ("relative", "absolute"):
        mine, theirs = (solve({"a": s.to("cpu")}, Budget(0.05), gate)["a"] for s in (got, want))
        assert (
            torch.searchsorted(EDGES, mine) - torch.searchsorted(EDGES, theirs)
        ).abs().max() <= 1
        mine, theirs = (solve({"a": s.to("cpu")}, TopK(2), gate)["a"] for s in (got, want))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_scores_that_overflow_count_as_the_definition_says() -> None:
    """Row sums and maxima far outside the exponential's range, and infinite scores."""
    q, k = _inputs(1, 2, 1, 640, 640, 64, dtype=BF16)
    g = Geometry(q_len=640, k_len=640, is_causal=True)
    shifted = torch.cat([k[..., :1] * 0 - 120.0, k[..., 1:]], dim=3)
    steady = torch.cat([q[..., :1] * 0 + 16.0, q[..., 1:]], dim=3)
    low = _observed(steady, shifted, g, None, None)  # every score is below -200
    assert low.candidates > 0
    lost = low.mass[0].sum(dim=1).double() / 2**24
    assert bool((lost > 1).all()) and bool((lost < 640).all())
    k = k.clone()
    k[0, 0, 100] = 3e38
    high = _observed(q, k, g, None, None)
    assert bool((high.counts[:, :, -1] > 0).all()) and bool((high.mass >= 0).all())
