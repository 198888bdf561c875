"""What calibration remembers of one attention site: mergeable, exact, independent of order.

Everything is an integer: counts, softmax mass in units of 2^-24 rows, midpoints in units of 2^-24
nats. Sums of integers do not depend on their order, so neither does anything solved from them.
Statistics and thresholds are scaled logits in natural-log units.

Histograms are over the bins of `grid.py`: what they predict for the calibration data of a threshold
on one of its edges is not an estimate.

Size: 98 KB per head for the histograms, 6 KB per head and octave, and 40 * n * K bytes per head
for the midpoints, n the q blocks reached and K = min(max_k, most candidates in a block - 1). 14
heads at 4k tokens take 3 MB; 32 heads at 32k tokens with max_k = 128 take 46 MB, 5 MB of them
with max_k = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bsfa_compile.calibrate.grid import BINS, COARSE, COARSE_EDGES, UNIT, edges_on, octave
from bsfa_compile.errors import CalibrationError

_LIMIT = 2.0**20  # nats; a midpoint further out counts as this

_PLAIN = (
    *("mid_sums", "mid_votes", "mid_low", "mid_high"),
    *("octave_rows", "reached", "block_candidates"),
)
_STORED = {"fine": ("counts", "mass"), "octave": ("octave_mass",)}  # as (index, values) on disk
_HISTOGRAMS = tuple(name for names in _STORED.values() for name in names)
_MERGE = {"mid_low": torch.minimum, "mid_high": torch.maximum}  # the others add up


class SiteStatistics:
    """Statistics of one site; axis 0 of the tensors is the gate (`GATES`).

    counts, mass [2, H, BINS] int64: candidate tiles, and their softmax mass, by statistic.
    mid_sums [2, H, n, K] int64, mid_votes [2, H, n, K] int32: at [..., b, k - 1] the sum over
    samples of the midpoint of the k-th and (k+1)-th largest statistic among the candidates of
    absolute q block b, and how many samples had one. mid_low, mid_high float32, likewise: the
    smallest and the largest of them, inf and -inf without any.
    octave_mass [2, H, octaves, bins] int64: mass by octave on the coarse edges; octave_rows
    [octaves] int64: query rows.
    reached [n] int64: samples that reach the block; block_candidates [n] int64: its candidates.
    rows: query rows (the same for every head); samples: batch rows; lengths: their lengths;
    refused: batch rows left out because their queries or keys were not finite.
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
        self.mid_low = zeros(2, heads, 0, 0, dtype=torch.float32)
        self.mid_high = self.mid_low.clone()
        self.octave_mass = zeros(2, heads, 0, len(COARSE_EDGES) + 1)
        self.octave_rows, self.reached, self.block_candidates = zeros(0), zeros(0), zeros(0)
        self.rows = 0
        self.refused = 0
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
        return {name: getattr(self, name) for name in (*_HISTOGRAMS, *_PLAIN)}

    def add_sample(
        self, *, length: int, rows: Mapping[int, int], blocks: Mapping[int, int]
    ) -> None:
        """Count one batch row; by q block, `rows` are its query rows, `blocks` its candidates."""
        self.samples += 1
        self.rows += sum(rows.values())
        self.lengths.add(length)
        if blocks:
            self._grow(max(blocks) + 1, min(self.max_k, max(blocks.values()) - 1))
            index = torch.tensor(list(blocks), device=self.reached.device)
            found = torch.tensor(list(blocks.values()), device=self.reached.device)
            self.reached[index] += 1
            self.block_candidates[index] += found
            by_octave: dict[int, int] = {}
            for block, count in rows.items():
                by_octave[octave(block)] = by_octave.get(octave(block), 0) + count
            for number, count in by_octave.items():
                self.octave_rows[number] += count

    def add_tiles(self, block: int, statistic: Tensor, mass: Tensor) -> None:
        """Count the candidates of one sample and q block.

        statistic [2, H, C]: per gate; mass [H, C]: softmax mass in rows. The sample must have
        been announced by `add_sample`, which makes room for the block.
        """
        self.add_blocks(block, statistic[:, :, None], mass[:, None])

    def add_blocks(self, first: int, statistic: Tensor, mass: Tensor) -> None:
        """Count the candidates of one sample in the q blocks from `first` on, without waiting.

        statistic [2, H, Q, C]: per gate, -inf where a tile is no candidate; mass [H, Q, C]:
        softmax mass in rows, negative where a tile is no candidate.
        """
        x = statistic.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        index = torch.bucketize(x, edges_on(x.device, x.dtype), right=True)
        # Rounded up, so that the mass predicted is never below the mass lost.
        units = mass.to(torch.float64).mul(UNIT).ceil().to(torch.int64).clamp_min_(0)
        units = units.expand_as(index).flatten(2)
        counted = (mass >= 0).to(torch.int64).expand_as(index).flatten(2)
        self.counts.scatter_add_(2, index.flatten(2), counted)
        self.mass.scatter_add_(2, index.flatten(2), units)
        numbers = torch.arange(first + 1, first + 1 + x.shape[2], device=x.device)
        octaves = torch.frexp(numbers.to(torch.float32)).exponent[:, None] - 1  # see `octave`
        coarse = (index + COARSE - 1) // COARSE + octaves * (len(COARSE_EDGES) + 1)
        self.octave_mass.view(*x.shape[:2], -1).scatter_add_(2, coarse.flatten(2), units)
        blocks, ks = slice(first, first + x.shape[2]), min(self.mid_sums.shape[3], x.shape[3] - 1)
        if ks > 0:
            largest = x.topk(ks + 1, dim=3).values.to(torch.float64)
            middle = (largest[..., :-1] + largest[..., 1:]) / 2
            finite = middle.isfinite()
            middle = torch.where(finite, middle.clamp(-_LIMIT, _LIMIT), 0.0)
            self.mid_sums[:, :, blocks, :ks] += (middle * UNIT).round().to(torch.int64)
            self.mid_votes[:, :, blocks, :ks] += finite.to(torch.int32)
            low, high = self.mid_low[:, :, blocks, :ks], self.mid_high[:, :, blocks, :ks]
            low.copy_(torch.where(finite, low.minimum(middle.float()), low))
            high.copy_(torch.where(finite, high.maximum(middle.float()), high))

    def _grow(self, blocks: int, ks: int) -> None:
        more_blocks = max(0, blocks - len(self.reached))
        more_ks = max(0, ks - self.mid_sums.shape[3])
        if more_blocks or more_ks:
            pad = torch.nn.functional.pad
            self.mid_sums = pad(self.mid_sums, (0, more_ks, 0, more_blocks))
            self.mid_votes = pad(self.mid_votes, (0, more_ks, 0, more_blocks))
            self.mid_low = pad(self.mid_low, (0, more_ks, 0, more_blocks), value=torch.inf)
            self.mid_high = pad(self.mid_high, (0, more_ks, 0, more_blocks), value=-torch.inf)
            self.reached = pad(self.reached, (0, more_blocks))
            self.block_candidates = pad(self.block_candidates, (0, more_blocks))
            more = octave(len(self.reached) - 1) + 1 - len(self.octave_rows)
            self.octave_mass = pad(self.octave_mass, (0, 0, 0, more))
            self.octave_rows = pad(self.octave_rows, (0, more))

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
            part = mine[tuple(slice(n) for n in value.shape)]
            part.copy_(_MERGE.get(name, torch.add)(part, value.to(mine.device)))
        total.rows += other.rows
        total.refused += other.refused
        total.samples += other.samples
        total.lengths |= other.lengths
        return total

    def to(self, device: torch.device | str) -> SiteStatistics:
        """A copy on `device`."""
        copy = SiteStatistics(**self.config, device=device)
        for name, value in self._tensors.items():
            setattr(copy, name, value.to(device, copy=True))
        copy.rows, copy.samples, copy.lengths = self.rows, self.samples, set(self.lengths)
        copy.refused = self.refused
        return copy

    def equal(self, other: SiteStatistics) -> bool:
        """Whether every number is the same."""
        scalars = ("config", "rows", "samples", "refused", "lengths")
        return all(getattr(self, n) == getattr(other, n) for n in scalars) and all(
            torch.equal(value.cpu(), other._tensors[n].cpu()) for n, value in self._tensors.items()
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `from_state` makes an equal object.

        Histograms are nearly empty and are stored as (index, count, mass) of their full bins.
        """
        tensors = {name: getattr(self, name).cpu() for name in _PLAIN}
        for name, parts in _STORED.items():
            flat = [getattr(self, part).flatten() for part in parts]
            index = flat[0].nonzero()[:, 0]
            tensors[f"{name}_bins"] = index.to("cpu", torch.int32)
            tensors |= {part: of[index].cpu() for part, of in zip(parts, flat, strict=True)}
        names = ("rows", "samples", "refused")
        plain: dict[str, Any] = {name: getattr(self, name) for name in names}
        return tensors, {**self.config, **plain, "lengths": sorted(self.lengths), "bins": BINS}

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
        for name in _PLAIN:
            setattr(made, name, tensors[name].clone())
        made.octave_mass = torch.nn.functional.pad(
            made.octave_mass, (0, 0, 0, len(made.octave_rows))
        )
        for name, parts in _STORED.items():
            index = tensors[f"{name}_bins"].to(torch.int64)
            for part in parts:
                getattr(made, part).view(-1)[index] = tensors[part]
        for name in ("rows", "samples", "refused"):
            setattr(made, name, int(plain[name]))
        made.lengths = set(plain["lengths"])
        return made
