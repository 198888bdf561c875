"""Any combination of masks is understood as exactly what it shows, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.probe import traced

BATCH, QUERIES, KEYS = 2, 7, 9
Make = Callable[[Tensor, Tensor, Tensor], Tensor]


def _row(q: Tensor, offset: int) -> Tensor:
    return torch.arange(q.shape[2])[:, None] + offset


def _column(k: Tensor) -> Tensor:
    return torch.arange(k.shape[2])[None, :]


COMPARE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
}


def positions(name: str, offset: int) -> Make:
    return lambda q, k, pad: COMPARE[name](_column(k), _row(q, offset))


def triangle(lower: bool, diagonal: int) -> Make:
    def make(q: Tensor, k: Tensor, pad: Tensor) -> Tensor:
        ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        return ones.tril(diagonal) if lower else ones.triu(diagonal)

    return make


def distance(limit: int) -> Make:
    return lambda q, k, pad: (_row(q, 0) - _column(k)).abs() <= limit


def padding(spelling: int) -> Make:
    def make(q: Tensor, k: Tensor, pad: Tensor) -> Tensor:
        real = (pad.bool(), pad != 0, ~(pad == 0), (pad == 0).logical_not())[spelling]
        return real[:, None, None, :]

    return make


def both(a: Make, b: Make) -> Make:
    return lambda q, k, pad: a(q, k, pad) & b(q, k, pad)


def either(a: Make, b: Make) -> Make:
    return lambda q, k, pad: a(q, k, pad) | b(q, k, pad)


def inverted(a: Make) -> Make:
    return lambda q, k, pad: ~a(q, k, pad)


def twice_filled(a: Make, b: Make) -> Make:
    def make(q: Tensor, k: Tensor, pad: Tensor) -> Tensor:
        first = torch.zeros(BATCH, 1, q.shape[2], k.shape[2], dtype=q.dtype)
        first = first.masked_fill(~a(q, k, pad), -torch.inf)
        first.masked_fill_(~b(q, k, pad), -torch.inf)
        return first == 0

    return make


leaves = st.one_of(
    st.builds(positions, st.sampled_from(sorted(COMPARE)), st.integers(-2, 4)),
    st.builds(triangle, st.booleans(), st.integers(-2, 4)),
    st.builds(distance, st.integers(0, 5)),
    st.builds(padding, st.integers(0, 3)),
)
masks = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(both, inner, inner),
        st.builds(both, inner, inner),
        st.builds(either, inner, inner),
        st.builds(twice_filled, inner, inner),
        st.builds(inverted, inner),
    ),
    max_leaves=4,
)


@given(masks, st.lists(st.booleans(), min_size=BATCH * KEYS, max_size=BATCH * KEYS))
def test_what_is_understood_is_what_is_shown(make: Make, real: list[bool]) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(BATCH, 2, QUERIES, 4), torch.randn(BATCH, 2, KEYS, 4)
    pad = torch.tensor(real).view(BATCH, KEYS).long()
    found: Any = traced(make, (q, k, pad))[0]
    if found.reason is None:
        shown = found.shown(QUERIES, KEYS, BATCH)
        assert torch.equal(shown, found.wanted(QUERIES, KEYS, BATCH))
