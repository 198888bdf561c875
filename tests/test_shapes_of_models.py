"""Attention wherever models put it: twice in a module, shared, at the root, checkpointed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from tests import toy


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class TwoCalls(nn.Module):
    """Two attention calls in one module, the second over the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(toy.WIDTH, 3 * toy.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(toy.heads, self.qkv(x).chunk(3, dim=-1))
        q = F.scaled_dot_product_attention(3 * q, 3 * k, v, is_causal=True)
        y = F.scaled_dot_product_attention(q, 3 * k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


def test_two_calls_in_one_module_have_names_and_thresholds_of_their_own() -> None:
    model, x = toy.Toy(2, attention=TwoCalls), toy.sample()
    calibration = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False)
    names = [f"layers.{i}.attn{n}" for i in (0, 1) for n in ("", "#1")]
    assert list(calibration.sites) == names
    dense = toy.run(model, x)
    thresholds = toy.thresholds(names)
    only_first = {
        name: v if name == names[0] else torch.full_like(v, -math.inf)
        for name, v in thresholds.values.items()
    }
    bsfa.apply(model, Thresholds(values=only_first, **toy.BLOCKS), **toy.EAGER)
    got, rates = toy.run(model, x), toy.skipped(model)
    assert not torch.allclose(got, dense)
    assert [rate is not None and rate > 0 for rate in rates.values()] == [True, *[False] * 3]


class Shared(nn.Module):
    """One attention module called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = toy.Attention()
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attn(self.attn(x))
        return result


def test_a_module_called_twice_is_one_site() -> None:
    model, x = Shared(), toy.sample()
    thresholds = toy.thresholds(["attn"])
    wanted, rates = toy.expected(model, thresholds, x)
    assert list(bsfa.calibrate(model, x, progress=False).sites) == ["attn"]
    bsfa.apply(model, thresholds, **toy.EAGER)
    assert torch.allclose(toy.run(model, x), wanted)
    assert toy.skipped(model) == pytest.approx(rates)


def test_a_layer_that_is_in_a_list_twice_is_one_site() -> None:
    model, x = toy.Toy(layers=3), toy.sample()
    model.layers.append(model.layers[0])
    thresholds = toy.thresholds(toy.sites(3))
    wanted, rates = toy.expected(model, thresholds, x)
    calibration = bsfa.calibrate(model, x, progress=False)
    assert list(calibration.sites) == toy.sites(3)
    assert calibration.uncalled == ()
    bsfa.apply(model, thresholds, **toy.EAGER)
    assert torch.allclose(toy.run(model, x), wanted)
    assert toy.skipped(model) == pytest.approx(rates)
    assert len(bsfa.report(model).sites) == 3


def test_an_attention_module_alone_can_be_optimized() -> None:
    torch.manual_seed(0)
    model, x = toy.Attention().double().eval(), toy.sample()
    dense = toy.run(model, x)
    calibration = bsfa.calibrate(model, x, **toy.BLOCKS, progress=False)
    assert len(calibration.sites) == 1
    bsfa.apply(model, calibration.thresholds(bsfa.Budget(0.2)), **toy.EAGER)
    assert not torch.equal(toy.run(model, x), dense)
    (rate,) = toy.skipped(model).values()
    assert rate is not None and rate > 0


class Checkpointed(nn.Module):
    """An attention module under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy.Attention()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
        return result


def test_checkpointed_attention_is_sparse_with_its_own_thresholds() -> None:
    model, x = toy.Toy(2, attention=Checkpointed), toy.sample()
    names = [f"{name}.inner" for name in toy.sites()]
    thresholds = toy.thresholds(names)
    wanted, _ = toy.expected(model, thresholds, x)
    dense = toy.run(model, x)
    assert list(bsfa.calibrate(model, x, progress=False).sites) == names
    bsfa.apply(model, thresholds, **toy.EAGER)
    got = toy.run(model, x)
    assert torch.allclose(got, wanted)
    assert not torch.allclose(got, dense)


class Nested(nn.Module):
    """An attention module whose layers share one sub-graph by the user's wish."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy.Attention()

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def test_regions_that_share_a_sub_graph_keep_their_own_thresholds() -> None:
    model, x = toy.Toy(3, attention=Nested), toy.sample()
    names = [f"{name}.inner" for name in toy.sites(3)]
    thresholds = toy.thresholds(names)
    wanted, _ = toy.expected(model, thresholds, x)
    assert list(bsfa.calibrate(model, x, progress=False).sites) == names
    bsfa.apply(model, thresholds, **{**toy.EAGER, "inner": "aot_eager"})
    assert torch.allclose(toy.run(model, x), wanted)
    assert all(site.rewritten for site in bsfa.report(model).sites)


class Fused(nn.Module):
    """nn.MultiheadAttention, whose attention Dynamo does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(toy.WIDTH, toy.HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return result


class Dropping(toy.Attention):
    """Attention dropout that is active in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(toy.heads, self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [(Dropping, "dropout"), (Fused, None), (toy.Attention, None)],
)
def test_strict_lists_every_reason(attention: Any, reason: str | None) -> None:
    model, x = toy.Toy(2, attention=attention), toy.sample()
    if reason is None:
        bsfa.optimize(model, x, strict=True, **toy.EAGER, progress=False)
        return
    with pytest.raises(bsfa.UnsupportedError, match=reason) as caught:
        bsfa.optimize(model, x, strict=True, **toy.EAGER, progress=False)
    assert all(name in str(caught.value) for name in toy.sites())
    assert not any("bsfa_" in name for name, _ in model.named_buffers())
    with pytest.warns(UserWarning, match=reason):
        bsfa.optimize(model, x, **toy.EAGER, progress=False)
    report = bsfa.report(model)
    assert len(report.sites) == 2
    assert all(not s.rewritten and reason in (s.reason or "") for s in report.sites)


class Sometimes(nn.Module):
    """The second branch runs for long inputs only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.rarely = toy.Attention(), toy.Attention()
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.always(x)
        if x.shape[1] > 100:
            y = y + self.rarely(x)
        return y


def test_sites_that_the_data_never_reach_are_reported() -> None:
    model = Sometimes()
    with pytest.warns(UserWarning, match="no tile"):
        bsfa.optimize(model, toy.sample(90), **toy.EAGER, progress=False)
    reasons = {site.name: site.reason for site in bsfa.report(model).sites}
    assert reasons["always"] is None
    assert "never called" in (reasons["rarely"] or "")
    dense = toy.run(Sometimes(), toy.sample(120))
    assert torch.allclose(toy.run(model, toy.sample(120)), dense)
    reasons = {site.name: site.reason for site in bsfa.report(model).sites}
    assert "calibration never reached it" in (reasons["rarely"] or "")
