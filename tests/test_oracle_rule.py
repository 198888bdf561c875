"""The oracle of benchmarks/gates.py: true softmax masses, and what is dropped by them."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.oracle import attending, tile_masses
from bsfa_compile.ops.call import Call
from bsfa_compile.ops.tiles import Geometry
from tests import zoo


@pytest.mark.parametrize("window", [None, 200])
def test_masses_are_the_softmax_summed_over_tiles(window: int | None) -> None:
    torch.manual_seed(0)
    length = 450
    q, k = torch.randn(1, 4, length, 16), torch.randn(1, 2, length, 16)
    g = Geometry(q_len=length, k_len=length, is_causal=True, window=window, sink_tiles=1)
    call = Call(geometry=g, q_start_tensor=None, key_padding_mask=None, scale=0.25, softcap=None)
    mass = tile_masses(q, k, call)
    rows, keys = torch.arange(length)[:, None], torch.arange(length)
    seen = (keys <= rows) & (keys > rows - (window or length))
    scores = q[0] @ k[0].repeat_interleave(2, dim=0).transpose(1, 2) * 0.25
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    found = 0
    for i in range(g.q_blocks):
        first, stop = g.droppable(i)
        for j in range(g.k_blocks):
            if first <= j < stop:
                tile = weights[:, i * 128 : (i + 1) * 128, j * 64 : (j + 1) * 64]
                torch.testing.assert_close(mass[:, i, j], tile.sum(dim=(1, 2)))
                found += 1
            else:
                assert bool((mass[:, i, j] == -1).all())
    assert found > 0


def test_the_oracle_drops_what_is_asked_and_nothing_is_dense() -> None:
    model = zoo.build("llama").double()
    given = {**zoo.inputs("llama", 700, batch=1), "use_cache": False}
    dense = zoo.output(model, given)
    tiles = 2 * 4 * sum(2 * i - 1 for i in range(1, 6))  # of 2 layers, 4 heads, 6 q blocks
    with attending(model, [functools.partial(model, **given)]) as oracle, torch.no_grad():
        oracle.solve(0)
        assert torch.allclose(zoo.output(model, given), dense, atol=1e-6)
        assert int(oracle.dropped) == 0
        oracle.solve(tiles / 2)
        assert not torch.allclose(zoo.output(model, given), dense, atol=1e-6)
        assert abs(int(oracle.dropped) - tiles / 2) < tiles / 20
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(zoo.output(model, given), dense)
