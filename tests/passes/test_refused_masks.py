"""Masks that mean more than the operator knows: refused, with the reason, and left as they are."""

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
    H,
    Probe,
    by_tril,
    indices,
    sample_padding,
    tensors,
    traced,
)


def given_4d(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return mask


def alibi(q: Tensor, k: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125])[:, None, None]
    return slopes * (indices(k.shape[2])[None, :] - indices(q.shape[2])[:, None])


def causal_alibi(q: Tensor, k: Tensor) -> Tensor:
    return torch.where(by_tril(q, k), alibi(q, k), -INF)


def packed(q: Tensor, k: Tensor, segments: Tensor) -> Tensor:
    return (segments[:, None, :, None] == segments[:, None, None, :]) & by_tril(q, k)


def packed_by_positions(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    starts = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
    return packed(q, k, starts.cumsum(-1))


def packed_by_lengths(q: Tensor, k: Tensor, edges: Tensor) -> Tensor:
    rows = torch.searchsorted(edges, indices(q.shape[2]), right=True)
    return (rows[:, None] == rows[None, :]) & by_tril(q, k)


def chunks(q: Tensor, k: Tensor) -> Tensor:
    same = indices(q.shape[2])[:, None] // 4 == indices(k.shape[2])[None, :] // 4
    return same & by_tril(q, k)


def relative_bias(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    distance = (indices(k.shape[2])[None, :] - indices(q.shape[2])[:, None]).clamp(0, 5)
    return torch.nn.functional.embedding(distance, table).permute(2, 0, 1)[None]


def filled_through_another_view(q: Tensor, k: Tensor) -> Tensor:
    added = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
    seen = added[None].transpose(1, 2)  # a view made before the mask is filled
    added.masked_fill_(~by_tril(q, k), -INF)
    return seen.squeeze(0)


def prefix_lm(q: Tensor, k: Tensor) -> Tensor:
    return by_tril(q, k) | (indices(k.shape[2])[None, :] < 4)


def prefix_lm_data(q: Tensor, k: Tensor, prefix: Tensor) -> Tensor:
    return by_tril(q, k)[None, None] | prefix.bool()[:, None, None, :]


def dilated(q: Tensor, k: Tensor) -> Tensor:
    return (indices(q.shape[2])[:, None] - indices(k.shape[2])[None, :]) % 2 == 0


def strictly_causal(q: Tensor, k: Tensor) -> Tensor:
    return indices(k.shape[2])[None, :] < indices(q.shape[2])[:, None]


def future_only(q: Tensor, k: Tensor) -> Tensor:
    return indices(k.shape[2])[None, :] >= indices(q.shape[2])[:, None]


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
    rows = (indices(q.shape[2]) + start)[:, None]
    start.add_(2)
    return (indices(k.shape[2])[None, :] <= rows) & (indices(k.shape[2])[None, :] > rows - start)


def every_other_position(q: Tensor, k: Tensor) -> Tensor:
    return indices(k.shape[2])[None, :] <= torch.arange(0, 2 * q.shape[2], step=2)[:, None]


def positions_in_bytes(q: Tensor, k: Tensor) -> Tensor:
    return indices(k.shape[2])[None, :] <= indices(q.shape[2]).to(torch.uint8)[:, None]


def positions_in_bfloat16(q: Tensor, k: Tensor) -> Tensor:
    row = torch.arange(q.shape[2], dtype=torch.bfloat16)[:, None]
    return indices(k.shape[2])[None, :] <= row


def positions_given(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    return indices(k.shape[2])[None, None, None, :] <= positions[:, None, :, None]


def per_head(q: Tensor, k: Tensor) -> Tensor:
    return by_tril(q, k) & (torch.arange(q.shape[1]) > 0)[:, None, None] | by_tril(q, k)


def transposed_padding(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None, :].transpose(2, 3).expand(-1, -1, -1, k.shape[2])


def chosen_by_a_number(q: Tensor, k: Tensor, chosen: Tensor) -> Tensor:
    return by_tril(q, k) | chosen.bool()


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
    (prefix_lm_data, (sample_padding(),), "'or'"),
    (dilated, (), "not understood"),
    (strictly_causal, (), "before the first key"),
    (future_only, (), "old keys"),
    (padded_queries, (sample_padding(),), "input of the graph"),
    (transposed_padding, (sample_padding(),), "input of the graph"),
    (finite_padding, (sample_padding(),), "see nothing"),
    (mild_bias, (), "bias"),
    (written_in_place, (), "written in place"),
    (written_through_a_view, (), "written in place"),
    (start_overwritten_between, (torch.tensor(1),), ""),
    (every_other_position, (), "other than the positions"),
    (positions_in_bytes, (), "uint8"),
    (positions_in_bfloat16, (), "bfloat16"),
    (positions_given, (indices(LQ).expand(B, -1).contiguous(),), ""),
    (per_head, (), ""),
    (chosen_by_a_number, (torch.tensor(1),), "a number that only the run knows"),
]


@pytest.mark.parametrize("by", ["dynamo", "export"])
@pytest.mark.parametrize(("make", "more", "reason"), REFUSED)
def test_refused(make: Any, more: Any, reason: str, by: str) -> None:
    args = (*tensors(LQ), *more)
    wanted = Probe(make)(*(a.clone() for a in args))
    found, got = traced(make, args, by=by)
    assert found.reason is not None
    assert reason in found.reason
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
