"""What calibration remembers of one attention site: mergeable, exact, independent of order.

Everything is an integer: counts, softmax mass in units of 2^-24 rows, midpoints in units of 2^-24
nats. Sums of integers do not depend on their order, so neither does anything solved from them.
Statistics and thresholds are scaled logits in natural-log units.

A threshold may stand on any edge of `EDGES`. Bin `i` of a histogram holds the tiles whose
statistic x has EDGES[i - 1] <= x < EDGES[i], so a threshold on edge `i` drops exactly the bins
0..i: what a histogram predicts for the calibration data is not an estimate. The last bin holds
what no threshold of the grid drops, +inf and NaN included.

Size: 98 KB per head for the histograms and 24 * n * K bytes per head for the midpoints, n the q
blocks reached and K = min(max_k, most candidates in a block - 1). 14 heads at 4k tokens take
2 MB; 32 heads at 32k tokens with max_k = 128 take 28 MB, 3 MB of them with max_k = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bsfa_compile.errors import CalibrationError

GATES = ("relative", "absolute")
UNIT = 2**24  # fixed point: units per row of softmax mass, and per nat of a midpoint
_LIMIT = 2.0**20  # nats; a midpoint further out counts as this
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


class SiteStatistics:
    """Statistics of one site; axis 0 of the tensors is the gate (`GATES`).

    counts, mass [2, H, BINS] int64: candidate tiles, and their softmax mass, by statistic.
    mid_sums [2, H, n, K] int64, mid_votes [2, H, n, K] int32: at [..., b, k - 1] the sum over
    samples of the midpoint of the k-th and (k+1)-th largest statistic among the candidates of
    absolute q block b, and how many samples had one.
    reached [n] int64: samples that reach the block; block_candidates [n] int64: its candidates.
    rows: query rows (the same for every head); samples: batch rows; lengths: their lengths.
    """

    def __init__(
        self,
        heads: int,
        *,
        block_q: int,
        block_k: int,
        sink_tiles: int,
        max_k: int = 128,
        device: torch.device | str = "cpu",
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.heads = heads
        self.block_q, self.block_k, self.sink_tiles = block_q, block_k, sink_tiles
        self.max_k = max_k
        self.counts, self.mass = zeros(2, heads, BINS), zeros(2, heads, BINS)
        self.mid_sums = zeros(2, heads, 0, 0)
        self.mid_votes = zeros(2, heads, 0, 0, dtype=torch.int32)
        self.reached, self.block_candidates = zeros(0), zeros(0)
        self.rows = 0
        self.samples = 0
        self.lengths: set[int] = set()

    @property
    def config(self) -> dict[str, int]:
        """What two statistics must share to be merged."""
        names = ("heads", "block_q", "block_k", "sink_tiles", "max_k")
        return {name: getattr(self, name) for name in names}

    @property
    def candidates(self) -> int:
        """Candidate tiles per head (visible and not always kept), the same for every head."""
        return int(self.block_candidates.sum())

    @property
    def _tensors(self) -> dict[str, Tensor]:
        names = ("counts", "mass", "mid_sums", "mid_votes", "reached", "block_candidates")
        return {name: getattr(self, name) for name in names}

    def add_sample(self, *, length: int, rows: int, blocks: Mapping[int, int]) -> None:
        """Count one batch row of `rows` query rows; `blocks` maps q blocks to candidates."""
        self.samples += 1
        self.rows += rows
        self.lengths.add(length)
        if blocks:
            self._grow(max(blocks) + 1, min(self.max_k, max(blocks.values()) - 1))
            index = torch.tensor(list(blocks), device=self.reached.device)
            found = torch.tensor(list(blocks.values()), device=self.reached.device)
            self.reached[index] += 1
            self.block_candidates[index] += found

    def add_tiles(self, block: int, statistic: Tensor, mass: Tensor) -> None:
        """Count the candidates of one sample and q block.

        statistic [2, H, C]: per gate; mass [H, C]: softmax mass in rows. The sample must have
        been announced by `add_sample`, which makes room for the block.
        """
        flat = statistic.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        edges = EDGES.to(device=flat.device, dtype=flat.dtype)
        index = torch.bucketize(flat, edges, right=True)
        # Rounded up, so that the mass predicted is never below the mass lost.
        units = mass.to(torch.float64).mul(UNIT).ceil().to(torch.int64).expand_as(index)
        self.counts.scatter_add_(2, index, torch.ones_like(index))
        self.mass.scatter_add_(2, index, units)
        ks = min(self.max_k, flat.shape[2] - 1)
        if ks > 0:
            largest = flat.topk(ks + 1, dim=2).values.to(torch.float64)
            middle = (largest[..., :-1] + largest[..., 1:]) / 2
            finite = middle.isfinite()
            middle = torch.where(finite, middle.clamp(-_LIMIT, _LIMIT), 0.0)
            self.mid_sums[:, :, block, :ks] += (middle * UNIT).round().to(torch.int64)
            self.mid_votes[:, :, block, :ks] += finite.to(torch.int32)

    def _grow(self, blocks: int, ks: int) -> None:
        more_blocks = max(0, blocks - len(self.reached))
        more_ks = max(0, ks - self.mid_sums.shape[3])
        if more_blocks or more_ks:
            pad = torch.nn.functional.pad
            self.mid_sums = pad(self.mid_sums, (0, more_ks, 0, more_blocks))
            self.mid_votes = pad(self.mid_votes, (0, more_ks, 0, more_blocks))
            self.reached = pad(self.reached, (0, more_blocks))
            self.block_candidates = pad(self.block_candidates, (0, more_blocks))

    def merge(self, other: SiteStatistics) -> SiteStatistics:
        """Statistics of both sets of samples together; neither operand changes.

        Raises CalibrationError if heads, tile shape, sink tiles or max_k differ.
        """
        differing = [n for n, value in self.config.items() if value != other.config[n]]
        if differing:
            raise CalibrationError(
                f"statistics differ in {', '.join(differing)}: {self.config} against "
                f"{other.config}; merge calibrations made with the same settings"
            )
        total = self.to(self.counts.device)
        total._grow(len(other.reached), other.mid_sums.shape[3])
        for name, value in other._tensors.items():
            mine = getattr(total, name)
            mine[tuple(slice(n) for n in value.shape)] += value.to(mine.device)
        total.rows += other.rows
        total.samples += other.samples
        total.lengths |= other.lengths
        return total

    def to(self, device: torch.device | str) -> SiteStatistics:
        """A copy on `device`."""
        copy = SiteStatistics(**self.config, device=device)
        for name, value in self._tensors.items():
            setattr(copy, name, value.to(device, copy=True))
        copy.rows, copy.samples, copy.lengths = self.rows, self.samples, set(self.lengths)
        return copy

    def equal(self, other: SiteStatistics) -> bool:
        """Whether every number is the same."""
        scalars = ("config", "rows", "samples", "lengths")
        return all(getattr(self, n) == getattr(other, n) for n in scalars) and all(
            torch.equal(value.cpu(), other._tensors[n].cpu()) for n, value in self._tensors.items()
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `from_state` makes an equal object.

        Histograms are nearly empty and are stored as (index, count, mass) of their full bins.
        """
        index = self.counts.flatten().nonzero()[:, 0]
        tensors = {n: t.cpu() for n, t in self._tensors.items() if n not in ("counts", "mass")}
        tensors["bins"] = index.to("cpu", torch.int32)
        tensors["bin_counts"] = self.counts.flatten()[index].cpu()
        tensors["bin_mass"] = self.mass.flatten()[index].cpu()
        plain = {"rows": self.rows, "samples": self.samples, "lengths": sorted(self.lengths)}
        return tensors, {**self.config, **plain, "bins": BINS}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> SiteStatistics:
        """Inverse of `state`. Raises CalibrationError if the histogram grid is another one."""
        if plain["bins"] != BINS:
            raise CalibrationError(
                f"the histograms have {plain['bins']} bins, this version uses {BINS}; "
                "calibrate again"
            )
        made = cls(
            plain["heads"],
            block_q=plain["block_q"],
            block_k=plain["block_k"],
            sink_tiles=plain["sink_tiles"],
            max_k=plain["max_k"],
        )
        index = tensors["bins"].to(torch.int64)
        made.counts.view(-1)[index] = tensors["bin_counts"]
        made.mass.view(-1)[index] = tensors["bin_mass"]
        for name in ("mid_sums", "mid_votes", "reached", "block_candidates"):
            setattr(made, name, tensors[name].clone())
        made.rows, made.samples = int(plain["rows"]), int(plain["samples"])
        made.lengths = set(plain["lengths"])
        return made
