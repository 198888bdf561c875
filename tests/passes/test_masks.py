"""The mask recogniser: what it understands shows what the mask shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.probe import (
    INF,
    LK,
    LQ,
    B,
    by_tril,
    indices,
    sample_padding,
    tensors,
    traced,
)


def by_comparison(q: Tensor, k: Tensor) -> Tensor:
    return indices(k.shape[2])[None, :] <= indices(q.shape[2])[:, None]


def by_inverted_triu(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2]).triu(diagonal=1).bool().logical_not()


def additive_triu(q: Tensor, k: Tensor) -> Tensor:
    return torch.triu(torch.full((q.shape[2], k.shape[2]), -INF), diagonal=1)


def of_nn_transformer(q: Tensor, k: Tensor) -> Tensor:
    mask = (torch.triu(torch.ones(q.shape[2], k.shape[2])) == 1).transpose(0, 1)
    return mask.float().masked_fill(mask == 0, -INF).masked_fill(mask == 1, 0.0)


def lowest_number(q: Tensor, k: Tensor) -> Tensor:
    seen = by_comparison(q, k)
    return torch.where(seen, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)[None, None]


def bottom_right(q: Tensor, k: Tensor) -> Tensor:
    offset = k.shape[2] - q.shape[2]
    return indices(k.shape[2])[None, :] <= indices(q.shape[2])[:, None] + offset


def bottom_right_tril(q: Tensor, k: Tensor) -> Tensor:
    ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return ones.tril(diagonal=k.shape[2] - q.shape[2])[None, None]


def window(q: Tensor, k: Tensor) -> Tensor:
    row, column = indices(q.shape[2])[:, None], indices(k.shape[2])[None, :]
    return (column <= row) & (column > row - 4)


def window_by_distance(q: Tensor, k: Tensor) -> Tensor:
    distance = indices(q.shape[2])[:, None] - indices(k.shape[2])[None, :]
    return torch.logical_and(distance >= 0, distance < 4)


def window_both_sides(q: Tensor, k: Tensor) -> Tensor:
    return (indices(q.shape[2])[:, None] - indices(k.shape[2])[None, :]).abs() <= 3


def padding_4d(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None, :]


def padding_expanded(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return (mask != 0).view(q.shape[0], 1, 1, -1).expand(-1, 1, q.shape[2], -1)


def padding_added(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(q.shape[2], k.shape[2]).masked_fill(~mask.bool()[:, None, None, :], -INF)


def causal_and_padding(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return by_tril(q, k)[None, None] & mask.to(torch.bool)[:, None, None, :]


def causal_and_padding_looked_up(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    rows = indices(q.shape[0])[:, None, None, None]
    column = indices(k.shape[2])[None, None, None, :]
    position = indices(q.shape[2])[None, None, :, None]
    return (column <= position) & mask.bool()[rows, column]


def two_additive(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return additive_triu(q, k)[None, None] + padding_added(q, k, mask)


def padding_inverted(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    hidden = ~mask.bool()  # as nn.MultiheadAttention takes it
    return by_tril(q, k)[None, None] & ~hidden[:, None, None, :]


def padding_equals_zero(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    hidden = (mask == 0)[:, None, None, :]
    return torch.zeros(q.shape[2], k.shape[2]).masked_fill(hidden, -INF)


def padding_filled_in_place(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    added = torch.zeros_like(mask, dtype=q.dtype)
    added.masked_fill_(mask == 0, -INF)
    return added.view(q.shape[0], 1, 1, -1).expand(-1, q.shape[1], q.shape[2], -1)


def filled_in_place(q: Tensor, k: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
    mask.masked_fill_(~by_tril(q, k), -INF)
    return mask.expand(q.shape[0], q.shape[1], -1, -1)  # alike in every head


def permuted(q: Tensor, k: Tensor) -> Tensor:
    return (
        (indices(k.shape[2])[:, None] <= indices(q.shape[2])[None, :])[None]
        .permute(0, 2, 1)
        .squeeze(0)
    )


def padding_of_floats(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None, :]


def padding_picked(q: Tensor, k: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return mask[rows].bool()[:, None, None, :]


def padding_longer(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    longer = torch.nn.functional.pad(mask.bool(), (2, 3))
    rows = indices(q.shape[0])[:, None, None, None]
    return longer[rows, (indices(k.shape[2]) + 2)[None, None, None, :]]


def start_in_a_tensor(q: Tensor, k: Tensor, start: Tensor) -> Tensor:
    return indices(k.shape[2])[None, :] <= (indices(q.shape[2]) + start)[:, None]


def start_overwritten_later(q: Tensor, k: Tensor, start: Tensor) -> Tensor:
    mask = indices(k.shape[2])[None, :] <= (indices(q.shape[2]) + start)[:, None]
    start.add_(q.shape[2])
    return mask


def padding_overwritten_later(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    shown = by_tril(q, k)[None, None] & mask.bool()[:, None, None, :]
    mask.zero_()
    return shown


def operands_by_name(q: Tensor, k: Tensor) -> Tensor:
    future = torch.triu(input=torch.ones(k.shape[2], q.shape[2]), diagonal=0)
    future = torch.eq(future.transpose(dim0=0, dim1=1), other=0)
    return torch.zeros(q.shape[2], k.shape[2]).masked_fill(mask=future, value=-INF)


def positions_by_name(q: Tensor, k: Tensor) -> Tensor:
    rows = torch.arange(4, end=q.shape[2] + 4)
    return torch.arange(start=0, end=k.shape[2])[None, :] <= rows[:, None]


def where_as_a_method(q: Tensor, k: Tensor) -> Tensor:
    nothing = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    return nothing.where(torch.ones_like(nothing).triu(1), True)  # it keeps what it is called on


def padding_over_a_half(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    hidden = ~(mask.float() > 0.5)[:, None, None, :]
    return torch.zeros(()).masked_fill(hidden, -INF)


def window_of_a_half(q: Tensor, k: Tensor) -> Tensor:
    distance = indices(k.shape[2])[None, :] - indices(q.shape[2])[:, None]
    return distance.abs() < 7 / 2


def far_keys_hidden(q: Tensor, k: Tensor) -> Tensor:
    distance = indices(k.shape[2])[None, :] - indices(q.shape[2])[:, None]
    return ~(distance.abs() >= 4)


def future_or_padding_hidden(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return ~(~by_tril(q, k) | (mask == 0)[:, None, None, :])


def never_hidden(q: Tensor, k: Tensor) -> Tensor:
    return torch.zeros(q.shape[2], k.shape[2]).masked_fill(by_tril(q, k).int() == 2, -INF)


def all_shown(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)


def no_bias(q: Tensor, k: Tensor) -> Tensor:
    return torch.zeros(1, 1, q.shape[2], k.shape[2])


CAUSAL: dict[str, Any] = {"is_causal": True, "window": None, "padding": False}
PADDED = {"is_causal": False, "window": None, "padding": True}
UNDERSTOOD = [
    (by_comparison, (), LQ, CAUSAL),
    (by_tril, (), LQ, CAUSAL),
    (by_inverted_triu, (), LQ, CAUSAL),
    (additive_triu, (), LQ, CAUSAL),
    (of_nn_transformer, (), LQ, CAUSAL),
    (lowest_number, (), LQ, CAUSAL),
    (bottom_right, (), 6, CAUSAL),
    (bottom_right_tril, (), 6, CAUSAL),
    (window, (), LQ, {**CAUSAL, "window": 4}),
    (window_by_distance, (), LQ, {**CAUSAL, "window": 4}),
    (window_both_sides, (), LQ, {"is_causal": False, "window": 4, "padding": False}),
    (padding_4d, (sample_padding(),), LQ, PADDED),
    (padding_expanded, (sample_padding(),), LQ, PADDED),
    (padding_added, (sample_padding(),), LQ, PADDED),
    (causal_and_padding, (sample_padding(),), LQ, {**CAUSAL, "padding": True}),
    (causal_and_padding_looked_up, (sample_padding(),), LQ, {**CAUSAL, "padding": True}),
    (two_additive, (sample_padding(),), LQ, {**CAUSAL, "padding": True}),
    (padding_inverted, (sample_padding(),), LQ, {**CAUSAL, "padding": True}),
    (padding_equals_zero, (sample_padding(),), LQ, PADDED),
    (padding_filled_in_place, (sample_padding(),), LQ, PADDED),
    (filled_in_place, (), LQ, CAUSAL),
    (permuted, (), LQ, CAUSAL),
    (padding_of_floats, (sample_padding() / 3,), LQ, PADDED),
    (padding_picked, (sample_padding(), torch.tensor([1, 0])), LQ, PADDED),
    (padding_longer, (sample_padding(),), LQ, PADDED),
    (start_in_a_tensor, (torch.tensor(4),), 6, CAUSAL),
    (start_overwritten_later, (torch.tensor(4),), 6, CAUSAL),
    (padding_overwritten_later, (sample_padding(),), LQ, {**CAUSAL, "padding": True}),
    (operands_by_name, (), LQ, CAUSAL),
    (positions_by_name, (), 6, CAUSAL),
    (where_as_a_method, (), LQ, CAUSAL),
    (padding_over_a_half, (sample_padding(),), LQ, PADDED),
    (window_of_a_half, (), LQ, {"is_causal": False, "window": 4, "padding": False}),
    (far_keys_hidden, (), LQ, {"is_causal": False, "window": 4, "padding": False}),
    (future_or_padding_hidden, (sample_padding(),), LQ, {**CAUSAL, "padding": True}),
    (never_hidden, (), LQ, {"is_causal": False, "window": None, "padding": False}),
    (all_shown, (), LQ, {"is_causal": False, "window": None, "padding": False}),
    (no_bias, (), LQ, {"is_causal": False, "window": None, "padding": False}),
]


@pytest.mark.parametrize("by", ["dynamo", "dynamic", "export"])
@pytest.mark.parametrize(("make", "more", "q_len", "expected"), UNDERSTOOD)
def test_understood(make: Any, more: Any, q_len: int, expected: dict[str, Any], by: str) -> None:
    args = (*tensors(q_len), *more)
    found, _ = traced(make, args, by=by)
    assert found.reason is None
    assert found.meaning is not None
    assert found.meaning.is_causal == expected["is_causal"]
    assert found.meaning.window == expected["window"]
    assert (found.meaning.key_padding is not None) == expected["padding"]
    shown = found.shown(q_len, LK, B)
    assert torch.equal(shown, found.wanted(q_len, LK, B))
