"""Attention written out as matmul, softmax, matmul: taken over where the operator can do it all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from bsfa_compile.ops import reference
from bsfa_compile.ops.tiles import Geometry
from bsfa_compile.passes.sites import find
from tests import toy
from tests.passes.test_sites import Attend, expanded, graph_of, interleaved

LENGTH = 80
SCALE = 8**-0.5


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def hidden(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)


def bias(q: Tensor, k: Tensor) -> Tensor:
    return torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype).masked_fill(hidden(q, k), -math.inf)


def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = expanded(k), expanded(v)
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE
    return torch.matmul(F.softmax(scores + bias(q, k), dim=-1), v)


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = interleaved(k), interleaved(v)
    scores = q @ k.transpose(-2, -1) / math.sqrt(8)
    scores = scores.masked_fill(hidden(q, k), -math.inf)
    return F.dropout(scores.softmax(dim=-1), 0.1, training=False) @ v


def filled_with_a_low_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = interleaved(k), interleaved(v)
    scores = (q * SCALE) @ k.transpose(-1, -2)
    shown = (~hidden(q, k))[None, None].int()
    scores = scores.masked_fill(shown == 0, -1e9)
    return torch.softmax(scores, dim=3).type_as(q) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = expanded(k), expanded(v)
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * SCALE / 9.0) * 9.0
    weights = F.softmax(scores.float() + bias(q, k).float(), dim=-1, dtype=torch.float64)
    return torch.matmul(weights.to(q.dtype), v)


def cap_of(attend: object) -> float | None:
    return 9.0 if attend is capped else None


@pytest.mark.parametrize("attend", [added, filled, filled_with_a_low_number, capped])
def test_written_out_attention_becomes_sparse(attend: Callable[..., Tensor]) -> None:
    module, x = Attend(attend), toy.sample(LENGTH)
    dense = toy.run(module, x)
    (site,) = find(graph_of(module, x))
    assert site.reason is None
    assert site.k is not None
    assert site.k.meta["example_value"].shape[1] == 2  # before the heads are repeated
    assert site.softcap == cap_of(attend)
    open_ = Thresholds(values={"(model)": torch.full((4, 1), -math.inf)}, **toy.BLOCKS)
    bsfa.apply(module, open_, fullgraph=True, **toy.EAGER)
    assert torch.allclose(toy.run(module, x), dense, atol=1e-5)
    values = torch.tensor([[-0.1], [-0.2], [-0.3], [-0.4]])
    bsfa.retarget(module, Thresholds(values={"(model)": values}, **toy.BLOCKS))
    got = toy.run(module, x)
    (rate,) = toy.skipped(module).values()
    wanted, wanted_rate = by_reference(module, x, values, cap_of(attend))
    assert torch.allclose(got, wanted)
    assert rate == pytest.approx(wanted_rate)
    assert wanted_rate > 0


def by_reference(
    module: Attend, x: Tensor, values: Tensor, softcap: float | None
) -> tuple[Tensor, float]:
    found: dict[str, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        g = Geometry(q_len=LENGTH, k_len=LENGTH, is_causal=True, **toy.BLOCKS)
        options: dict[str, Any] = {"scale": SCALE, "softcap": softcap}
        kept, every, least = (
            reference.tile_mask(q, k, bar, g, **options)
            for bar in (values.double(), values - math.inf, values + math.inf)
        )
        found["rate"] = int((every & ~kept).sum()) / int((every & ~least).sum())
        return reference.attention(q, k, v, kept, g, **options)[0]

    other = Attend(attend)
    other.load_state_dict(module.state_dict())
    return toy.run(other, x), found["rate"]


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q[:, :2] @ k.transpose(2, 3) + bias(q, k), dim=-1)
    return weights @ v + weights.sum()


def position_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None, :]
    scores = q[:, :2] @ k.transpose(2, 3) + distance.clamp(0, 5).to(q.dtype)
    return F.softmax(scores, dim=-1) @ v


def mask_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(torch.tanh(q[:, :2] @ k.transpose(2, 3) + bias(q, k)), dim=-1) @ v


def weights_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[:, :2] @ k.transpose(2, 3) + bias(q, k)
    return (F.softmax(scores, dim=-1) * 0.5) @ v


def overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    scores = q[:, :2] @ k.transpose(2, 3) + bias(q, k)
    k.zero_()
    return F.softmax(scores, dim=-1) @ v


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (weights_returned, "used elsewhere"),
        (position_bias, "'clamp'"),
        (mask_capped, "caps its mask"),
        (weights_scaled, "'mul'"),
        (overwritten, "overwritten"),
    ],
)
def test_other_forms_stay_dense_and_say_why(attend: Callable[..., Tensor], reason: str) -> None:
    module, x = Attend(attend), toy.sample(LENGTH)
    (site,) = find(graph_of(module, x))
    assert site.reason is not None
    assert reason in site.reason


def empty_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = (torch.arange(k.shape[2]) < 20)[None, None, None, :]
    scores = q[:, :2] @ k.transpose(2, 3) + bias(q, k)
    return F.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ v


def test_rows_that_see_nothing_are_zero_and_all_others_the_models() -> None:
    module, x = Attend(empty_rows), toy.sample(LENGTH)
    dense = toy.run(module, x)
    empty = dense.isnan().any(-1)
    assert empty.any() and not empty.all()
    calibration = bsfa.calibrate(module, x, **toy.BLOCKS, progress=False)
    assert calibration.dense == {}
    bsfa.apply(module, calibration.thresholds(bsfa.Budget(0.0)), **toy.EAGER)
    got = toy.run(module, x)
    assert torch.allclose(got[~empty], dense[~empty])
    assert got.isfinite().all()


class Router(nn.Module):
    """A softmax that is no attention."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = F.softmax(x @ x.transpose(1, 2), dim=-1)
        return chosen.max(dim=-1).values


def test_a_router_is_no_attention() -> None:
    assert find(graph_of(Router(), toy.sample(LENGTH))) == []


class HeadsFirst(nn.Module):
    """Attention over [heads * batch, length, head_dim]; mask: with scores of four axes."""

    def __init__(self, *, mask: bool) -> None:
        super().__init__()
        self.qkv, self.mask = nn.Linear(toy.WIDTH, 3 * toy.WIDTH), mask
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        shape = toy.HEADS, x.shape[0], x.shape[1]
        q, k, v = (
            y.unflatten(-1, (toy.HEADS, -1)).permute(2, 0, 1, 3).flatten(0, 1)
            for y in self.qkv(x).chunk(3, dim=-1)
        )
        scores = torch.bmm(3 * q, k.transpose(1, 2))
        if self.mask:
            hidden = torch.ones(shape[2], shape[2], dtype=torch.bool).triu(1)
            scores = scores.view(*shape, shape[2]).masked_fill(hidden, -math.inf).flatten(0, 1)
        out: Tensor = torch.bmm(scores.softmax(dim=-1), v).unflatten(0, shape[:2])
        return out.permute(1, 2, 0, 3).flatten(2)


def test_heads_before_the_batch_are_not_taken_for_it() -> None:
    model = HeadsFirst(mask=False)
    values = {"(model)": torch.full((1, 1), -0.1)}
    dense = [toy.run(model, toy.sample(LENGTH, batch)) for batch in (2, 3)]
    bsfa.apply(model, Thresholds(values=values, **toy.BLOCKS), **toy.EAGER)
    got = [toy.run(model, toy.sample(LENGTH, batch)) for batch in (2, 3)]
    assert toy.skipped(model)["(model)"]
    assert not torch.allclose(got[0], dense[0])
    bsfa.retarget(
        model, Thresholds(values={"(model)": torch.full((1, 1), -math.inf)}, **toy.BLOCKS)
    )
    for batch, wanted in zip((2, 3), dense, strict=True):
        assert torch.allclose(toy.run(model, toy.sample(LENGTH, batch)), wanted)
    assert bsfa.report(model).calls == {"sparse": 4}


def test_thresholds_for_other_heads_leave_a_call_dense() -> None:
    model, x = HeadsFirst(mask=True), toy.sample(LENGTH, batch=3)
    values = {"(model)": torch.full((2, 1), -0.1)}
    dense = toy.run(model, x)
    bsfa.apply(model, Thresholds(values=values, **toy.BLOCKS), **toy.EAGER)
    assert torch.equal(toy.run(model, x), dense)
    (site,) = bsfa.report(model).sites
    assert site.reason == "its thresholds are for 2 heads, and here it has 3"
