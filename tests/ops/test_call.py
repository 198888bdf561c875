"""Calls without tensors of their own are kept: each is still what its arguments say."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bsfa_compile.ops.call import Call, make_call
from bsfa_compile.ops.tiles import Geometry

lengths, blocks = st.integers(1, 3), st.sampled_from([16, 32])
positive = st.sampled_from([None, 0.25, 1.0])


@given(
    geometry=st.builds(
        Geometry,
        q_len=lengths,
        k_len=lengths,
        q_start=st.integers(0, 1),
        is_causal=st.booleans(),
        window=st.sampled_from([None, 1, 2]),
        sink_tiles=st.integers(0, 1),
        block_q=blocks,
        block_k=blocks,
    ),
    scale=positive,
    softcap=positive,
    padded=st.booleans(),
    start_in_tensor=st.booleans(),
    sinks=st.sampled_from([None, torch.zeros(1)]),
)
def test_a_call_is_what_its_arguments_say(
    geometry: Geometry,
    scale: float | None,
    softcap: float | None,
    padded: bool,
    start_in_tensor: bool,
    sinks: Tensor | None,
) -> None:
    g = geometry
    q, k = torch.empty(1, 1, g.q_len, 4), torch.empty(1, 1, g.k_len, 4)
    padding = torch.ones(1, g.k_len, dtype=torch.bool) if padded else None
    start = (torch.tensor(g.q_start), 0) if start_in_tensor else (None, g.q_start)
    sizes = {"sink_tiles": g.sink_tiles, "block_q": g.block_q, "block_k": g.block_k}
    mask = (padding, *start, g.is_causal, g.window, softcap, scale)
    call = make_call(q, k, mask, sinks=sinks, **sizes)
    assert call.geometry == g
    assert call.scale == (0.5 if scale is None else scale)
    assert (call.softcap, call.q_start_tensor) == (softcap, None)
    assert call.key_padding_mask is padding
    assert call.sinks is sinks


def test_calls_that_differ_in_one_number() -> None:
    q = torch.empty(1, 1, 8, 4)
    base = (None, None, 0, True, 1, 1.0, 1.0)
    others = [(2, 1), (3, False), (4, 2), (4, None), (5, 2.0), (5, None), (6, 2.0), (6, None)]
    masks = [base, *((*base[:i], x, *base[i + 1 :]) for i, x in others)]
    tiles = [{"sink_tiles": 1, "block_q": 8, "block_k": 8}]
    tiles += [tiles[0] | {name: 4} for name in tiles[0]]
    found: list[Call] = []
    for mask, sizes in itertools.product(masks, tiles):
        found.append(make_call(q, q, mask, sinks=None, **sizes))
        assert make_call(q, q, mask, sinks=None, **sizes) == found[-1]
    assert len(set(found)) == len(masks) * len(tiles)
