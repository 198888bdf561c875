"""The guard at calibration: attention that was misread stays dense, and the user hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.calibrate import verify
from bsfa_compile.passes import sites
from bsfa_compile.passes.masks import Meaning
from tests import toy


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Windowed(nn.Module):
    """Attention under a window of 24, SDPA or written out."""

    def __init__(self, *, written: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.written = nn.Linear(toy.WIDTH, 3 * toy.WIDTH), written

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(toy.heads, self.qkv(x).chunk(3, dim=-1))
        row, column = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]
        shown = (column <= row) & (column > row - 24)
        if self.written:
            y = (4 * q @ k.mT).masked_fill(~shown, -torch.inf).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(2 * q, 2 * k, v, shown)
        return y.transpose(1, 2).flatten(2)


def model(*, written: bool) -> nn.Module:
    return toy.Toy(1, attention=lambda: Windowed(written=written))


def misread(**changes: Any) -> Any:
    """`find`, but sites come with other fields; those of Meaning change the meaning."""

    def wrong(bare: Any, *args: Any, **options: Any) -> Any:
        site = understood(bare, *args, **options)
        fields = {k: v for k, v in changes.items() if k not in Meaning.__dataclass_fields__}
        inner = {k: v for k, v in changes.items() if k not in fields}
        assert site.meaning is not None
        return replace(site, meaning=replace(site.meaning, **inner), **fields)

    understood = sites._understood
    return mock.patch.object(sites, "_understood", wrong)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"window": 25}, "mask"),
        ({"is_causal": False, "window": None}, "mask"),
        ({"scale": 0.9}, "other numbers"),
    ],
)
def test_what_was_misread_stays_dense(written: bool, changes: dict[str, Any], why: str) -> None:
    module, x = model(written=written), toy.sample(80, batch=2)
    dense = toy.run(module, x)
    with misread(**changes), pytest.warns(UserWarning, match="misread"):
        calibration = bsfa.calibrate(module, x, **toy.BLOCKS, progress=False)
    assert calibration.sites == {}
    (reason,) = calibration.dense.values()
    assert why in reason
    torch._dynamo.reset()
    with misread(**changes), pytest.warns(UserWarning, match="misread"):
        bsfa.optimize(module, x, progress=False, **toy.EAGER)
    assert torch.equal(toy.run(module, x), dense)
    (site,) = bsfa.report(module).sites
    assert not site.rewritten
    assert why in (site.reason or "")


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_misreading(written: bool, dtype: torch.dtype) -> None:
    module, x = model(written=written).to(dtype), toy.sample(80, batch=2).to(dtype)
    calibration = bsfa.calibrate(module, x, **toy.BLOCKS, progress=False)
    assert calibration.dense == {}
    assert len(calibration.sites) == 1


class Padded(nn.Module):
    """Causal attention under padding, which gives rows that see nothing the mean of all values."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        length = x.shape[1]
        q = k = v = toy.heads(x)
        shown = real[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
        scores = (q @ k.mT / 8**0.5).masked_fill(~shown, torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v


def test_rows_that_see_nothing_are_not_compared() -> None:
    real = torch.ones(2, 80, dtype=torch.bool)
    real[0, :30] = False
    data = (toy.sample(80, batch=2), real)
    calibration = bsfa.calibrate(Padded(), data, **toy.BLOCKS, progress=False)
    assert calibration.dense == {}
    assert len(calibration.sites) == 1


class Layers(nn.Module):
    """Three attentions under one mask."""

    def forward(self, x: Tensor) -> Tensor:
        row, column = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]
        shown = column <= row
        for _ in range(3):
            q = toy.heads(x)
            y = F.scaled_dot_product_attention(q, q, q, attn_mask=shown)
            x = x + y.transpose(1, 2).flatten(2)
        return x


def test_outputs_are_compared_once_and_a_shared_mask_once_an_input() -> None:
    with (
        mock.patch.object(verify, "_error", wraps=verify._error) as compared,
        mock.patch.object(verify, "_Compared", wraps=verify._Compared) as masks,
    ):
        data = [toy.sample(80, seed=seed) for seed in range(4)]
        calibration = bsfa.calibrate(Layers(), data, **toy.BLOCKS, progress=False)
    assert len(calibration.sites) == 3 and calibration.dense == {}
    assert compared.call_count == 3
    assert masks.call_count == 4


def test_a_mask_that_is_misread_on_a_later_input_only_is_found() -> None:
    """The mask is checked on every input: here a window that the first input is too short for."""
    module, data = model(written=False), [toy.sample(n) for n in (20, 80)]
    with misread(window=None), pytest.warns(UserWarning, match="misread"):
        calibration = bsfa.calibrate(module, data, **toy.BLOCKS, progress=False)
    assert calibration.sites == {}
    assert "mask" in next(iter(calibration.dense.values()))
