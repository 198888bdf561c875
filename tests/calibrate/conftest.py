"""The statistics as they are defined, in plain loops over ops/reference.py, and small inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from bsfa_compile.calibrate.measure import measure
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.ops import reference
from bsfa_compile.ops.tiles import Geometry, unpadded_tiles

GATES = ("relative", "absolute")


@dataclass
class Literal:
    """Every candidate tile of a call: (head, block, sample, statistics by gate, mass in rows)."""

    rows: int = 0
    tiles: list[tuple[int, int, int, dict[str, float], float]] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=dict)


def literal_statistics(
    q: Tensor,
    k: Tensor,
    g: Geometry,
    mask: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Literal:
    batch, heads = q.shape[:2]
    s = reference.scores(q, k, scale, softcap)
    seen = reference.visibility(g, mask, batch)
    votes = ~reference.padding_rows(g, mask, batch)
    p = torch.softmax(s.masked_fill(~seen[:, None], -math.inf), dim=-1).nan_to_num(0.0)
    bounds = unpadded_tiles(mask, batch, g.k_len, g.block_k)
    found = Literal()
    for b in range(batch):
        keys = None if mask is None else mask[b].nonzero()[:, 0]
        if int(votes[b].sum()) < 2 or (keys is not None and len(keys) == 0):
            continue
        found.rows += int(votes[b].sum())
        tile = math.lcm(g.block_q, g.block_k)
        shift = 0
        if keys is not None and g.is_causal:
            shift = int(keys[0]) // tile * tile // g.block_q
        for i in range(g.q_blocks):
            row0, row1 = g.rows(i)
            if not votes[b, row0:row1].any():
                continue
            block = g.first_block + i - shift
            found.reached[block] = found.reached.get(block, 0) + 1
            here = seen[b, row0:row1]
            columns = {j: slice(j * g.block_k, (j + 1) * g.block_k) for j in range(*g.tiles(i))}
            visible = [j for j, c in columns.items() if here[:, c].any()]
            order = reference.visiting_order(visible, bounds[b][0], g.sink_tiles)
            for h in range(heads):
                by_gate = {
                    gate: reference.tile_statistics(
                        s[b, h, row0:row1], here, votes[b, row0:row1], order, g.block_k, gate
                    )
                    for gate in GATES
                }
                for j in visible:
                    if not g.always_kept(i, j, *bounds[b]):
                        mass = p[b, h, row0:row1, columns[j]][votes[b, row0:row1]].sum()
                        values = {gate: by_gate[gate][j] for gate in GATES}
                        found.tiles.append((h, block, b, values, float(mass)))
    return found


def observed_statistics(
    q: Tensor,
    k: Tensor,
    g: Geometry,
    mask: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    max_k: int = 8,
) -> SiteStatistics:
    into = SiteStatistics(
        q.shape[1],
        block_q=g.block_q,
        block_k=g.block_k,
        sink_tiles=g.sink_tiles,
        max_k=max_k,
        device=q.device,
    )
    measure(q, k, g, key_padding_mask=mask, softcap=softcap, scale=scale, into=into)
    return into


def random_inputs(
    seed: int,
    shape: tuple[int, int, int, int, int] = (1, 4, 2, 96, 96),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """q [B, H, Lq, 8] and k [B, Hkv, Lk, 8] whose scores spread over about +-15 nats."""
    batch, heads, kv_heads, q_len, k_len = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return 1.5 * normal(batch, heads, q_len, 8), 1.5 * normal(batch, kv_heads, k_len, 8)


@pytest.fixture(scope="session")
def literal() -> Callable[..., Literal]:
    return literal_statistics


@pytest.fixture(scope="session")
def observed() -> Callable[..., SiteStatistics]:
    return observed_statistics


@pytest.fixture(scope="session")
def inputs() -> Callable[..., tuple[Tensor, Tensor]]:
    return random_inputs
