"""On a card the observer sees what the CPU sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bsfa_compile.calibrate.grid import UNIT
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.ops.tiles import Geometry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [{"is_causal": True}, {"window": 70}, {}])
def test_the_card_agrees_with_the_cpu(
    observed: Callable[..., SiteStatistics],
    inputs: Callable[..., tuple[Tensor, Tensor]],
    config: dict[str, Any],
    padded: bool,
) -> None:
    q, k = inputs(0, (2, 4, 2, 200, 200), torch.float64)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, :50] = False
    g = Geometry(q_len=200, k_len=200, block_q=32, block_k=16, **config)
    here = observed(q, k, g, mask if padded else None)
    there = observed(q.cuda(), k.cuda(), g, mask.cuda() if padded else None).to("cpu")
    assert here.candidates > 0 and torch.equal(here.counts, there.counts)
    assert torch.equal(here.mid_votes, there.mid_votes)
    assert ((here.mid_sums - there.mid_sums).abs() <= here.mid_votes + 1).all()
    assert ((here.mass - there.mass).abs() <= here.counts).all()
    assert here.mass.sum() > UNIT
