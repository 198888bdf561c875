"""A compiled model on a card: inductor, CUDA graphs, counters, new thresholds without new code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds

pytestmark = pytest.mark.gpu
WIDTH, HEADS, LENGTH = 256, 2, 1024


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """Causal attention and a residual. A bias makes all queries agree on the keys they prefer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        with torch.no_grad():
            self.qkv.bias[:WIDTH] = 3.0

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(3 * q, 3 * k, v, is_causal=True)
        return x + y.transpose(1, 2).flatten(2)


def build() -> tuple[nn.Sequential, Tensor, list[str]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(3))).to("cuda", torch.bfloat16).eval()
    x = torch.randn(1, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16)
    return model, x, [str(i) for i in range(3)]


def thresholds(names: list[str], first: float) -> Thresholds:
    values = {n: torch.full((HEADS, 1), first * (i + 1)) for i, n in enumerate(names)}
    return Thresholds(values=values, precision="exact")


def run(model: nn.Module, x: Tensor, times: int = 1) -> tuple[Tensor, list[float | None]]:
    with torch.no_grad():
        for _ in range(times):
            output = model(x).clone()
    return output, [site.skipped for site in bsfa.report(model).sites]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_modes_of_inductor_agree_with_the_graph_run_eagerly(mode: str | None) -> None:
    model, x, names = build()
    options: dict[str, Any] = {"dense_if_faster": False, "fullgraph": True}
    found = {}
    for first in (-0.5, -0.1):
        bsfa.apply(model, thresholds(names, first), inner="eager", **options)
        found[first] = run(model, x)
        bsfa.revert(model)
    assert all(rate is not None and rate > 0 for rate in found[-0.1][1])
    bsfa.apply(model, thresholds(names, -0.5), mode=mode, **options)
    run(model, x, times=3)
    counters.clear()
    for first in (-0.1, -0.5):
        bsfa.retarget(model, thresholds(names, first))
        output, rates = run(model, x, times=4)  # replays of a CUDA graph count, too
        wanted, wanted_rates = found[first]
        assert rates == pytest.approx(wanted_rates, abs=0.05)  # bfloat16 rounds elsewhere
        assert float((output - wanted).abs().mean()) < 0.01
    assert counters["stats"]["unique_graphs"] == 0
    if mode is not None:
        assert counters["inductor"]["cudagraph_skips"] == 0
