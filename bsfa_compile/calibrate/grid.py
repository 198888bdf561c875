"""Where thresholds may stand: the bins of the histograms, and octaves of positions.

A threshold may stand on any edge of `EDGES`. Bin `i` of a histogram holds the tiles whose
statistic x has EDGES[i - 1] <= x < EDGES[i], so a threshold on edge `i` drops exactly the bins
0..i: what a histogram predicts for the calibration data is not an estimate. The last bin holds
what no threshold of the grid drops, +inf and NaN included.

Positions count in octaves of q blocks: octave o holds the blocks 2^o - 1 to 2^(o+1) - 2. Their
masses are kept on every `COARSE`-th edge, for thresholds that depend on position.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

GATES = ("relative", "absolute")
UNIT = 2**24  # fixed point: units per row of softmax mass, and per nat of a midpoint
_PER_OCTAVE = 128


def _edges() -> Tensor:
    """Histogram edges in nats: 1/64 apart up to 4, then 128 per octave up to 4096, both signs.

    Every edge is a short binary fraction, the same in float32 on any machine.
    """
    positive = [torch.arange(_PER_OCTAVE + 1, dtype=torch.float64) / 64]
    for octave in range(1, 12):
        step = 2.0**octave / _PER_OCTAVE
        positive.append(2.0**octave + torch.arange(1, _PER_OCTAVE + 1) * step)
    half = torch.cat(positive).to(torch.float32)
    return torch.cat([-half[1:].flip(0), half])


EDGES = _edges()
ZERO_EDGE = len(EDGES) // 2  # EDGES[ZERO_EDGE] == 0
BINS = len(EDGES) + 1
COARSE = 8
COARSE_EDGES = EDGES[::COARSE]


@functools.cache
def edges_on(device: torch.device, dtype: torch.dtype) -> Tensor:
    """`EDGES` where they are needed: a copy would wait for the device."""
    return EDGES.to(device=device, dtype=dtype)


def octave(block: int) -> int:
    """The octave of an absolute q block: 0, 1, 1, 2, 2, 2, 2, 3, ..."""
    return (block + 1).bit_length() - 1
