"""The kernels' tile geometry, compiled for the host, says what ops/tiles.py says."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess

import pytest

from bsfa_compile.ops.compiler import SOURCES
from bsfa_compile.ops.tiles import Geometry

FIELDS = (
    *("first_row", "row_begin", "row_end", "block_low", "key_begin", "key_end"),
    *("tile_begin", "tile_end", "sink_end", "drop_begin", "drop_end", "clear_begin", "clear_end"),
)
HOST = """
#define __device__
#define __forceinline__ inline
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
%s
extern "C" void geometry(int b, int s, int q, int k, int c, int w, int n, int f, int e, int* to) {
  const Geometry g = make_geometry(b, s, q, k, c, w, n, f, e);
  __builtin_memcpy(to, &g, sizeof g);
}
extern "C" unsigned long long bits(int tile, int lo, int hi) { return range_bits(tile, lo, hi); }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("geometry")
    header = (SOURCES / "include" / "geometry.cuh").read_text()
    (folder / "g.cpp").write_text(HOST % header)
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "g.cpp", "-o", "g.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "g.so"))
    library.bits.restype = ctypes.c_ulonglong
    return library


def device_geometry(
    host: ctypes.CDLL, g: Geometry, block: int, bounds: tuple[int, int]
) -> dict[str, int]:
    out = (ctypes.c_int * len(FIELDS))()
    host.geometry(
        block, g.q_start, g.q_len, g.k_len, g.is_causal, g.window or 0, g.sink_tiles, *bounds, out
    )
    return dict(zip(FIELDS, out, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_blocks_agree(host: ctypes.CDLL, seed: int) -> None:
    rng = random.Random(seed)
    droppable = 0
    for _ in range(150):
        g = Geometry(
            q_len=rng.randint(1, 500),
            k_len=rng.randint(1, 700),
            q_start=rng.choice((0, rng.randint(0, 600))),
            is_causal=rng.random() < 0.6,
            window=rng.choice((None, rng.randint(1, 400))),
            sink_tiles=rng.randint(0, 3),
        )
        bounds = (0, g.k_blocks)
        if rng.random() < 0.5:
            first = rng.randint(0, g.k_blocks)
            bounds = (first, rng.randint(first, g.k_blocks))
        for i in range(g.q_blocks):
            found = device_geometry(host, g, i, bounds)
            begin, end = g.rows(i)
            assert (found["row_begin"], max(found["row_end"], found["row_begin"])) == (begin, end)
            if begin == end:
                continue
            tiles = [j for j in range(*g.tiles(i)) if bounds[0] <= j < bounds[1]]
            assert list(range(found["tile_begin"], found["tile_end"])) == tiles
            for j in tiles:
                may_drop = found["drop_begin"] <= j < found["drop_end"]
                assert may_drop != g.always_kept(i, j, *bounds), (g, i, j, bounds)
                assert (j < found["sink_end"]) == (j < bounds[0] + g.sink_tiles)
                droppable += may_drop
            seen = g.visible(i)
            low, high = g.keys(i)
            for j in tiles:
                keys = range(max(low, j * 64), min(high, j * 64 + 64))
                whole = len(keys) == 64 and (
                    seen is None or bool(seen[:, keys[0] - low : keys[-1] + 1 - low].all())
                )
                if found["clear_begin"] <= j < found["clear_end"]:
                    assert whole, (g, i, j)
    assert droppable > 100


def test_range_bits(host: ctypes.CDLL) -> None:
    rng = random.Random(0)
    for _ in range(500):
        tile, lo, hi = rng.randint(0, 5), rng.randint(0, 400), rng.randint(0, 400)
        expected = sum(1 << c for c in range(64) if lo <= tile * 64 + c < hi)
        assert host.bits(tile, lo, hi) == expected
