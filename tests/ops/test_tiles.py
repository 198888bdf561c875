"""Geometry: one definition, written per tile, as runs, vectorised and on the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsfa_compile.ops.gate import candidates
from bsfa_compile.ops.reference import visibility
from bsfa_compile.ops.tiles import (
    Geometry,
    mask_rows,
    mask_words,
    pack,
    unpack,
    unpadded_tiles,
)
from bsfa_compile.ops.visible import nothing_dropped, unpadded_limits, visible_tiles
from tests.ops.cases import Case, cases, geometries


@given(geometries())
def test_rows_cover_every_query_once_by_absolute_block(g: Geometry) -> None:
    rows = [row for i in range(g.q_blocks) for row in range(*g.rows(i))]
    assert rows == list(range(g.q_len))
    for i in range(g.q_blocks):
        assert all((g.q_start + row) // g.block_q == g.first_block + i for row in range(*g.rows(i)))


@given(geometries())
def test_keys_and_tiles_are_what_the_mask_leaves(g: Geometry) -> None:
    seen = visibility(g, None, 1)[0]
    for i in range(g.q_blocks):
        block = seen[slice(*g.rows(i))]
        keys = block.any(dim=0).nonzero()[:, 0].tolist()
        assert keys == list(range(*g.keys(i)))
        assert sorted({key // g.block_k for key in keys}) == list(range(*g.tiles(i)))
        inside = g.visible(i) if keys else None
        if inside is not None:
            assert torch.equal(inside, block[:, slice(*g.keys(i))])
        elif keys:
            assert block[:, slice(*g.keys(i))].all()


@given(geometries())
def test_droppable_is_the_run_of_tiles_not_always_kept(g: Geometry) -> None:
    for i in range(g.q_blocks):
        wanted = [j for j in range(*g.tiles(i)) if not g.always_kept(i, j)]
        assert list(range(*g.droppable(i))) == wanted


@given(cases())
def test_candidates_equal_always_kept_tile_by_tile(case: Case) -> None:
    g, padding = case.geometry, case.key_padding_mask()
    bounds = unpadded_tiles(padding, case.batch, g.k_len, g.block_k)
    seen = visibility(g, padding, case.batch)
    for i in range(g.q_blocks):
        visible, droppable = candidates(g, i, bounds, padding)
        for b in range(case.batch):
            for j in range(*g.tiles(i)):
                keys = slice(j * g.block_k, (j + 1) * g.block_k)
                is_seen = bool(seen[b, slice(*g.rows(i)), keys].any())
                at = b if len(visible) > 1 else 0
                assert bool(visible[at, j - g.tiles(i)[0]]) == is_seen
                wanted = is_seen and not g.always_kept(i, j, *bounds[b])
                assert bool(droppable[at, j - g.tiles(i)[0]]) == wanted


@given(cases(), st.booleans())
def test_all_tiles_at_once_equal_candidates(case: Case, start_on_device: bool) -> None:
    g, padding, call = case.geometry, case.key_padding_mask(), case.call()
    bounds = unpadded_tiles(padding, case.batch, g.k_len, g.block_k)
    if start_on_device:
        start = torch.tensor(g.q_start)
        moved = case.moved(q_start=0).call()
        call = type(call)(**{**vars(moved), "q_start_tensor": start, "key_padding_mask": padding})
    visible, droppable = visible_tiles(call, case.batch, torch.device("cpu"))
    limits = unpadded_limits(call, case.batch, torch.device("cpu"))
    assert limits.expand(case.batch, 2).tolist() == [list(bound) for bound in bounds]
    for i in range(g.q_blocks):
        tiles = slice(*g.tiles(i))
        wanted = candidates(g, i, bounds, padding)
        assert torch.equal(
            visible[:, i, tiles].expand(case.batch, -1), wanted[0].expand(case.batch, -1)
        )
        assert torch.equal(
            droppable[:, i, tiles].expand(case.batch, -1), wanted[1].expand(case.batch, -1)
        )
        assert visible[:, i].sum() == visible[:, i, tiles].sum()
    words, counts = nothing_dropped(call, case.qkv()[0])
    everything = visible[:, None].expand(case.batch, case.heads, -1, -1)
    assert torch.equal(unpack(words, g.k_blocks), everything)
    total = int(droppable.expand(case.batch, -1, -1).sum())
    assert counts.tolist() == [[0, total]] * case.heads


@pytest.mark.parametrize("k_len", [1, 64, 65, 2047, 2048, 2049, 10_000])
@pytest.mark.parametrize("start", [0, 63, 5000, 9999])
@pytest.mark.parametrize("window", [None, 1, 300, 4096])
def test_words_of_one_query_far_into_a_cache(k_len: int, start: int, window: int | None) -> None:
    """The short way that decode takes."""
    g = Geometry(q_len=1, k_len=k_len, q_start=start, is_causal=True, window=window)
    case = Case(batch=2, geometry=g)
    words, counts = nothing_dropped(case.call(), case.qkv()[0])
    visible, droppable = visible_tiles(case.call(), 2, torch.device("cpu"))
    assert torch.equal(words, pack(visible[:, None]).expand_as(words))
    assert counts.tolist() == [[0, 2 * int(droppable.sum())]] * 2


@pytest.mark.parametrize("tiles", [0, 1, 31, 32, 33, 64, 100])
def test_packing_is_undone_by_unpacking(tiles: int) -> None:
    mask = torch.rand(2, 3, 4, tiles) < 0.5
    words = pack(mask)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, 4, mask_words(tiles, 1))
    assert torch.equal(unpack(words, tiles), mask)


def test_packing_puts_tile_0_in_bit_0() -> None:
    mask = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    mask[..., [0, 5, 31, 33]] = True
    assert pack(mask).tolist() == [[[[1 + 32 - 2**31, 2]]]]


@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from([8, 128]))
def test_mask_rows_suffice_wherever_the_queries_start(rows: int, start: int, block: int) -> None:
    touched = (start + rows - 1) // block - start // block + 1
    assert touched <= mask_rows(rows, block) <= touched + 1
