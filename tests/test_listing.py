"""Attention that Dynamo never traces is dense, and the report says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import bsfa_compile as bsfa
from bsfa_compile import listing, modules
from tests import toy


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Calls a module where no compiler looks.
untraced: Any = torch.compiler.disable(lambda module, *args, **more: module(*args, **more))


class Both(nn.Module):
    """An attention that is traced, one that is not, and torch's own that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seen, self.hidden = toy.Attention(), toy.Attention()
        self.fused = nn.MultiheadAttention(toy.WIDTH, 2, batch_first=True)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = x + untraced(self.hidden, x + self.seen(x))
        found: Tensor = untraced(self.fused, y, y, y, need_weights=False)[0]
        return found


def test_untraced_attention_is_reported() -> None:
    model, x = Both(), toy.sample(400)
    dense = toy.run(model, x)
    calibration = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False)
    assert list(calibration.sites) == ["seen"]
    assert calibration.dense == {"hidden": listing.OUTSIDE, "fused": listing.OUTSIDE}
    assert torch.equal(toy.run(model, x), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    bsfa.optimize(model, x, bsfa.Sparsity(0.4), gate="absolute", **toy.EAGER, progress=False)
    assert not torch.allclose(toy.run(model, x), dense)
    sites = {site.name: site for site in bsfa.report(model).sites}
    assert sites["seen"].rewritten and sites["seen"].skipped
    assert all(sites[name].reason == listing.OUTSIDE for name in ("hidden", "fused"))
    with pytest.raises(bsfa.UnsupportedError, match="never traced"):
        bsfa.calibrate(Both(), x, strict=True, progress=False)


def test_a_model_that_is_traced_whole_is_not_run_again() -> None:
    with mock.patch.object(modules, "untraced") as again:
        bsfa.calibrate(toy.Toy(), toy.sample(), **toy.BLOCKS, progress=False)
    again.assert_not_called()


def test_sites_are_named_as_in_graphs() -> None:
    model = toy.Toy(3)
    assert listing.attending(model, (toy.sample(),), {}) == toy.sites(3)
