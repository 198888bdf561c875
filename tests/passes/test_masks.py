"""The mask recogniser: what it understands shows what the mask shows; the rest is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.probe import Probe, traced

B, H, LQ, LK, D = 2, 3, 10, 10, 4
INF = math.inf


def _range(n: int) -> Tensor:
    return torch.arange(n)


def by_comparison(q: Tensor, k: Tensor) -> Tensor:
    return _range(k.shape[2])[None, :] <= _range(q.shape[2])[:, None]


def by_tril(q: Tensor, k: Tensor) -> Tensor:
    return torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))


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
    return _range(k.shape[2])[None, :] <= _range(q.shape[2])[:, None] + offset


def bottom_right_tril(q: Tensor, k: Tensor) -> Tensor:
    ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return ones.tril(diagonal=k.shape[2] - q.shape[2])[None, None]


def window(q: Tensor, k: Tensor) -> Tensor:
    row, column = _range(q.shape[2])[:, None], _range(k.shape[2])[None, :]
    return (column <= row) & (column > row - 4)


def window_by_distance(q: Tensor, k: Tensor) -> Tensor:
    distance = _range(q.shape[2])[:, None] - _range(k.shape[2])[None, :]
    return torch.logical_and(distance >= 0, distance < 4)


def window_both_sides(q: Tensor, k: Tensor) -> Tensor:
    return (_range(q.shape[2])[:, None] - _range(k.shape[2])[None, :]).abs() <= 3


def padding_4d(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None, :]


def padding_expanded(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return (mask != 0).view(q.shape[0], 1, 1, -1).expand(-1, 1, q.shape[2], -1)


def padding_added(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(q.shape[2], k.shape[2]).masked_fill(~mask.bool()[:, None, None, :], -INF)


def causal_and_padding(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return by_tril(q, k)[None, None] & mask.to(torch.bool)[:, None, None, :]


def causal_and_padding_looked_up(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    rows = _range(q.shape[0])[:, None, None, None]
    column = _range(k.shape[2])[None, None, None, :]
    position = _range(q.shape[2])[None, None, :, None]
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
        (_range(k.shape[2])[:, None] <= _range(q.shape[2])[None, :])[None]
        .permute(0, 2, 1)
        .squeeze(0)
    )


def padding_longer(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    longer = torch.nn.functional.pad(mask.bool(), (2, 3))
    rows = _range(q.shape[0])[:, None, None, None]
    return longer[rows, (_range(k.shape[2]) + 2)[None, None, None, :]]


def start_in_a_tensor(q: Tensor, k: Tensor, start: Tensor) -> Tensor:
    return _range(k.shape[2])[None, :] <= (_range(q.shape[2]) + start)[:, None]


def start_overwritten_later(q: Tensor, k: Tensor, start: Tensor) -> Tensor:
    mask = _range(k.shape[2])[None, :] <= (_range(q.shape[2]) + start)[:, None]
    start.add_(q.shape[2])
    return mask


def padding_overwritten_later(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    shown = by_tril(q, k)[None, None] & mask.bool()[:, None, None, :]
    mask.zero_()
    return shown


def all_shown(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)


def no_bias(q: Tensor, k: Tensor) -> Tensor:
    return torch.zeros(1, 1, q.shape[2], k.shape[2])


def _padding() -> Tensor:
    mask = torch.ones(B, LK, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 7:] = 0
    return mask


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
    (padding_4d, (_padding(),), LQ, PADDED),
    (padding_expanded, (_padding(),), LQ, PADDED),
    (padding_added, (_padding(),), LQ, PADDED),
    (causal_and_padding, (_padding(),), LQ, {**CAUSAL, "padding": True}),
    (causal_and_padding_looked_up, (_padding(),), LQ, {**CAUSAL, "padding": True}),
    (two_additive, (_padding(),), LQ, {**CAUSAL, "padding": True}),
    (padding_inverted, (_padding(),), LQ, {**CAUSAL, "padding": True}),
    (padding_equals_zero, (_padding(),), LQ, PADDED),
    (padding_filled_in_place, (_padding(),), LQ, PADDED),
    (filled_in_place, (), LQ, CAUSAL),
    (permuted, (), LQ, CAUSAL),
    (padding_longer, (_padding(),), LQ, PADDED),
    (start_in_a_tensor, (torch.tensor(4),), 6, CAUSAL),
    (start_overwritten_later, (torch.tensor(4),), 6, CAUSAL),
    (padding_overwritten_later, (_padding(),), LQ, {**CAUSAL, "padding": True}),
    (all_shown, (), LQ, {"is_causal": False, "window": None, "padding": False}),
    (no_bias, (), LQ, {"is_causal": False, "window": None, "padding": False}),
]


def _tensors(q_len: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, q_len, D), torch.randn(B, H, LK, D)


@pytest.mark.parametrize("by", ["dynamo", "dynamic", "export"])
@pytest.mark.parametrize(("make", "more", "q_len", "expected"), UNDERSTOOD)
def test_understood(make: Any, more: Any, q_len: int, expected: dict[str, Any], by: str) -> None:
    args = (*_tensors(q_len), *more)
    found, _ = traced(make, args, by=by)
    assert found.reason is None
    assert found.meaning is not None
    assert found.meaning.is_causal == expected["is_causal"]
    assert found.meaning.window == expected["window"]
    assert (found.meaning.key_padding is not None) == expected["padding"]
    shown = found.shown(q_len, LK, B)
    assert torch.equal(shown, found.wanted(q_len, LK, B))


def given_4d(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return mask


def alibi(q: Tensor, k: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125])[:, None, None]
    return slopes * (_range(k.shape[2])[None, :] - _range(q.shape[2])[:, None])


def causal_alibi(q: Tensor, k: Tensor) -> Tensor:
    return torch.where(by_tril(q, k), alibi(q, k), -INF)


def packed(q: Tensor, k: Tensor, segments: Tensor) -> Tensor:
    return (segments[:, None, :, None] == segments[:, None, None, :]) & by_tril(q, k)


def packed_by_positions(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    starts = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
    return packed(q, k, starts.cumsum(-1))


def packed_by_lengths(q: Tensor, k: Tensor, edges: Tensor) -> Tensor:
    rows = torch.searchsorted(edges, _range(q.shape[2]), right=True)
    return (rows[:, None] == rows[None, :]) & by_tril(q, k)


def chunks(q: Tensor, k: Tensor) -> Tensor:
    same = _range(q.shape[2])[:, None] // 4 == _range(k.shape[2])[None, :] // 4
    return same & by_tril(q, k)


def relative_bias(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    distance = (_range(k.shape[2])[None, :] - _range(q.shape[2])[:, None]).clamp(0, 5)
    return torch.nn.functional.embedding(distance, table).permute(2, 0, 1)[None]


def filled_through_another_view(q: Tensor, k: Tensor) -> Tensor:
    added = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
    seen = added[None].transpose(1, 2)  # a view made before the mask is filled
    added.masked_fill_(~by_tril(q, k), -INF)
    return seen.squeeze(0)


def prefix_lm(q: Tensor, k: Tensor) -> Tensor:
    return by_tril(q, k) | (_range(k.shape[2])[None, :] < 4)


def prefix_lm_data(q: Tensor, k: Tensor, prefix: Tensor) -> Tensor:
    return by_tril(q, k)[None, None] | prefix.bool()[:, None, None, :]


def dilated(q: Tensor, k: Tensor) -> Tensor:
    return (_range(q.shape[2])[:, None] - _range(k.shape[2])[None, :]) % 2 == 0


def strictly_causal(q: Tensor, k: Tensor) -> Tensor:
    return _range(k.shape[2])[None, :] < _range(q.shape[2])[:, None]


def future_only(q: Tensor, k: Tensor) -> Tensor:
    return _range(k.shape[2])[None, :] >= _range(q.shape[2])[:, None]


def padded_queries(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return mask.bool()[:, None, :, None].expand(-1, -1, -1, k.shape[2])


def finite_padding(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    hidden = torch.where(mask.bool(), 0.0, torch.finfo(q.dtype).min)
    return hidden[:, None, None, :]


def mild_bias(q: Tensor, k: Tensor) -> Tensor:
    return torch.where(by_tril(q, k), 0.0, -5.0)


def written_in_place(q: Tensor, k: Tensor) -> Tensor:
    mask = by_tril(q, k)
    mask[:, 0] = False
    mask[0, 0] = True
    return mask


def written_through_a_view(q: Tensor, k: Tensor) -> Tensor:
    mask = torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))
    mask[None].transpose(1, 2)[0, 3].fill_(True)
    return mask


def start_overwritten_between(q: Tensor, k: Tensor, start: Tensor) -> Tensor:
    rows = (_range(q.shape[2]) + start)[:, None]
    start.add_(2)
    return (_range(k.shape[2])[None, :] <= rows) & (_range(k.shape[2])[None, :] > rows - start)


def positions_given(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    return _range(k.shape[2])[None, None, None, :] <= positions[:, None, :, None]


def per_head(q: Tensor, k: Tensor) -> Tensor:
    return by_tril(q, k) & (torch.arange(q.shape[1]) > 0)[:, None, None] | by_tril(q, k)


def transposed_padding(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None, :].transpose(2, 3).expand(-1, -1, -1, k.shape[2])


def _segments() -> Tensor:
    return torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [1] * 3])


def _random() -> Tensor:
    torch.manual_seed(3)
    return (torch.rand(B, 1, LQ, LK) > 0.4) | torch.eye(LQ, dtype=torch.bool)


REFUSED = [
    (given_4d, (_random(),), "input of the graph"),
    (given_4d, (_random()[0, 0],), "input of the graph"),
    (given_4d, (torch.randn(1, 1, LQ, LK),), "input of the graph"),
    (alibi, (), ""),
    (causal_alibi, (), ""),
    (packed, (_segments(),), "packed"),
    (packed_by_positions, (torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * B),), ""),
    (packed_by_lengths, (torch.tensor([0, 4, LQ]),), "packed"),
    (chunks, (), "chunks"),
    (relative_bias, (torch.randn(6, H),), "looked up"),
    (filled_through_another_view, (), "written in place"),
    (prefix_lm, (), "'or'"),
    (prefix_lm_data, (_padding(),), "'or'"),
    (dilated, (), "not understood"),
    (strictly_causal, (), "before the first key"),
    (future_only, (), "old keys"),
    (padded_queries, (_padding(),), "input of the graph"),
    (transposed_padding, (_padding(),), "input of the graph"),
    (finite_padding, (_padding(),), "see nothing"),
    (mild_bias, (), "bias"),
    (written_in_place, (), "written in place"),
    (written_through_a_view, (), "written in place"),
    (start_overwritten_between, (torch.tensor(1),), ""),
    (positions_given, (_range(LQ).expand(B, -1).contiguous(),), ""),
    (per_head, (), ""),
]


@pytest.mark.parametrize("by", ["dynamo", "export"])
@pytest.mark.parametrize(("make", "more", "reason"), REFUSED)
def test_refused(make: Any, more: Any, reason: str, by: str) -> None:
    args = (*_tensors(LQ), *more)
    wanted = Probe(make)(*(a.clone() for a in args))
    found, got = traced(make, args, by=by)
    assert found.reason is not None
    assert reason in found.reason
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
