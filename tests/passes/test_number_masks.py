"""Padding masks that a model computes with as numbers, `(1 - mask) * min`: taken for 0 and 1."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Calibration, Thresholds
from tests import toy


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Padded(nn.Module):
    """Two heads of attention under a padding mask, by `extend`."""

    def __init__(self, extend: Callable[..., Tensor], *, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(toy.WIDTH, 3 * toy.WIDTH)
        self.extend, self.causal = extend, causal
        self.double().eval()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = toy.heads(q), toy.heads(k), toy.heads(v)
        s = (3 * q @ (3 * k).transpose(-2, -1)) / q.shape[-1] ** 0.5
        if self.causal:
            n = x.shape[1]
            s = s.masked_fill(torch.ones(n, n).tril() == 0, torch.finfo(x.dtype).min)
        s = s + self.extend(mask, x.dtype)
        out: Tensor = F.softmax(s, dim=-1) @ v
        return out.transpose(1, 2).flatten(2)


def bert(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


def older_bert(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return (1.0 - mask.unsqueeze(1).unsqueeze(2).to(dtype=dtype)) * -10000.0


def of_integers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return (1 - mask[:, None, None, :]) * torch.finfo(torch.float32).min


def expanded(mask: Tensor, dtype: torch.dtype) -> Tensor:
    wide = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1).to(dtype)
    inverted = 1.0 - wide
    return inverted.masked_fill(inverted.to(torch.bool), torch.finfo(dtype).min)


def compared(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where((mask == 1)[:, None, None, :], 0.0, torch.finfo(torch.float32).min)


def extended(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """As transformers once made the masks of decoders."""
    batch, n = mask.shape
    places = torch.arange(n)
    causal = places[None, None, :].repeat(batch, n, 1) <= places[None, :, None]
    both = causal[:, None, :, :].to(mask.dtype) * mask[:, None, None, :]
    return (1.0 - both.to(dtype)) * torch.finfo(dtype).min


def understood(module: Padded, x: Tensor, mask: Tensor) -> tuple[Tensor, Calibration]:
    """The output before, which it still is with nothing dropped; the module is left so."""
    before = module(x, mask)
    calibration = bsfa.calibrate(module, (x, mask), **toy.BLOCKS, progress=False)
    assert calibration.dense == {}
    bsfa.apply(module, calibration.thresholds(bsfa.Sparsity(0.0)), **toy.EAGER)
    assert torch.allclose(module(x, mask), before)
    return before, calibration


def test_a_product_of_masks_hides_what_either_hides() -> None:
    module, x, mask = Padded(extended, causal=False), toy.sample(130, 2), padding()
    with torch.no_grad():
        before, calibration = understood(module, x, mask)
        values = {name: torch.full((2, 1), -0.5) for name in calibration.sites}
        thresholds = Thresholds(values=values, **toy.BLOCKS)
        bsfa.apply(module, thresholds, **toy.EAGER)
        assert not torch.allclose(module(x, mask), before)
    assert all((rate or 0) > 0 for rate in toy.skipped(module).values())


def padding() -> Tensor:
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[0, 80:] = 0
    return mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("extend", [bert, older_bert, of_integers, expanded, compared])
def test_padding_masks_computed_as_numbers(extend: Any, causal: bool) -> None:
    module, x, mask = Padded(extend, causal=causal), toy.sample(130, 2), padding()
    with torch.no_grad():
        before, _ = understood(module, x, mask)
        assert [site.rewritten for site in bsfa.report(module).sites] == [True]
        odd = padding()
        odd[1, 7] = 2
        for other in (odd, torch.zeros_like(mask), mask * 3):
            plain = Padded(extend, causal=causal)(x, other)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = module(x, other)
            assert torch.allclose(got, plain, equal_nan=True)
        assert torch.allclose(module(x, mask), before)
    assert dict(bsfa.report(module).calls) == {"sparse": 2, "dense": 3}


def test_a_padding_mask_of_other_numbers_is_told() -> None:
    module, x = Padded(bert, causal=False), toy.sample(130, 2)
    with torch.no_grad():
        bsfa.optimize(module, (x, padding()), bsfa.Sparsity(0.1), progress=False, **toy.EAGER)
        module(x, padding())
        assert all((rate or 0) > 0 for rate in toy.skipped(module).values())
        with pytest.warns(UserWarning, match="not of 0 and 1"):
            module(x, padding() * 2)
    strict = Padded(bert, causal=False)
    calibration = bsfa.calibrate(strict, (x, padding()), **toy.BLOCKS, progress=False)
    solved = calibration.thresholds(bsfa.Sparsity(0.1))
    bsfa.apply(strict, solved, strict=True, **toy.EAGER)
    with torch.no_grad():
        strict(x, padding())
        with pytest.raises(bsfa.UnsupportedError, match="not of 0 and 1"):
            strict(x, padding() * 2)
