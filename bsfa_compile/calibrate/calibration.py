"""Calibration: the statistics of every site, from which any target is solved without the model."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bsfa_compile.calibrate import files
from bsfa_compile.calibrate.fingerprint import Fingerprint
from bsfa_compile.calibrate.fit import fit
from bsfa_compile.calibrate.grid import GATES
from bsfa_compile.calibrate.predict import Prediction, predict
from bsfa_compile.calibrate.quality import Quality
from bsfa_compile.calibrate.solve import Sparsity, Target, TopK, solve
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.calibrate.thresholds import PRECISIONS, Thresholds
from bsfa_compile.errors import CalibrationError, InputError

_VERSION = 2


def check_request(
    target: Target | Quality, gate: str, precision: str = "auto", max_length: int | None = None
) -> None:
    """Raise InputError for what no thresholds can be made for, before any work is done for them."""
    if not isinstance(target, Target | Quality):
        raise InputError(
            "target must be Budget, TopK, Sparsity or Quality, such as Budget(0.03), got "
            f"{target!r}"
        )
    if gate not in GATES:
        raise InputError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if max_length is not None and not (isinstance(max_length, int) and max_length >= 1):
        raise InputError(f"max_length must be an integer of at least 1 token, got {max_length!r}")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Calibration:
    """What was seen of a model.

    sites: statistics by site, in the model's order. samples: model inputs seen. uncalled: sites
    that were observed but never ran. dense: sites that were not observed, and why. Raises
    CalibrationError if the sites differ in tile shape or sink tiles.
    """

    sites: Mapping[str, SiteStatistics]
    samples: int = 0
    uncalled: tuple[str, ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        shapes = {(s.block_q, s.block_k, s.sink_tiles) for s in self.sites.values()}
        if len(shapes) > 1:
            raise CalibrationError(
                "all sites must be calibrated with one (block_q, block_k, sink_tiles), got "
                f"{sorted(shapes)}"
            )

    def __repr__(self) -> str:
        seen = ", ".join(map(str, self.lengths))
        return (
            f"Calibration({len(self.sites)} sites, {self.samples} samples, lengths {seen or 'none'}"
            f"; {len(self.dense)} sites dense)"
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths in tokens of the samples that any site saw, ascending."""
        return tuple(sorted(set().union(*(site.lengths for site in self.sites.values()))))

    def thresholds(
        self,
        target: Target | Quality,
        gate: str | None = None,
        *,
        precision: str = "auto",
        max_length: int | None = None,
    ) -> Thresholds:
        """Solve a target: gate "relative" unless TopK, the paper's, which is "absolute".

        max_length: fit the thresholds over positions (calibrate/fit.py), for inputs of up to so
        many tokens, which may be longer than those calibrated on; without it a threshold, or the
        last one of TopK, holds at every position.

        Warns if a Sparsity is out of reach: the most that can be dropped is given then, see
        `Thresholds.dropped`. Raises InputError for a wrong argument, CalibrationError if no site
        has statistics, and for a Quality, which needs the model: `search` finds its thresholds.
        """
        chosen = gate or ("absolute" if isinstance(target, TopK) else "relative")
        check_request(target, chosen, precision, max_length)
        if isinstance(target, Quality):
            raise CalibrationError(
                f"{target} is a loss of the whole model, which statistics alone do not know: use "
                "search(model, calibration, target, held_out)"
            )
        values = solve(self.sites, target, chosen)
        solved = self.wrapped(values, chosen, precision, repr(target))
        solved = self.told(solved if max_length is None else self.fitted(solved, max_length))
        dropped = solved.dropped or 0.0
        if isinstance(target, Sparsity) and dropped < target.fraction * (1 - 1e-9):
            warnings.warn(
                f"{target}: thresholds of the {chosen} gate stay at or below their cap and drop "
                f"{dropped:.3f} of the candidate tiles at most; that is what they do now",
                stacklevel=2,
            )
        return solved

    def wrapped(
        self, values: Mapping[str, Tensor], gate: str, precision: str, target: str
    ) -> Thresholds:
        """Thresholds of these values, as made from this calibration."""
        any_site = next(iter(self.sites.values()))
        return Thresholds(
            values=values,
            gate=gate,
            precision=precision,
            sink_tiles=any_site.sink_tiles,
            block_q=any_site.block_q,
            block_k=any_site.block_k,
            fingerprint=self.fingerprint,
            lengths=self.lengths,
            target=target,
        )

    def fitted(self, solved: Thresholds, max_length: int) -> Thresholds:
        """Solved thresholds as a fit over positions, for inputs of up to `max_length` tokens."""
        curves = {
            name: fit(self.sites[name], values, solved.gate)
            for name, values in solved.values.items()
        }
        return replace(solved, curves=curves).reaching(max_length)

    def told(self, thresholds: Thresholds) -> Thresholds:
        """The same with `dropped` and `lost` as predicted on the calibration data."""
        predictions = self.predict(thresholds)
        tiles = sum(site.candidates * site.heads for site in self.sites.values())
        dropped = sum(
            float(predictions[name].dropped.sum()) * site.candidates
            for name, site in self.sites.items()
            if name in predictions
        )
        lost = torch.cat([p.lost for p in predictions.values()])
        return replace(thresholds, dropped=dropped / max(tiles, 1), lost=float(lost.mean()))

    def predict(self, thresholds: Thresholds) -> dict[str, Prediction]:
        """What thresholds do on the calibration data, for every site that both know.

        Exact for thresholds solved from this calibration for a Budget or a Sparsity.
        """
        return {
            name: predict(site, thresholds.values[name], thresholds.gate)
            for name, site in self.sites.items()
            if name in thresholds.values
        }

    def merge(self, other: Calibration) -> Calibration:
        """Both calibrations together, exactly as if made in one go, in any order.

        Raises CalibrationError if they are of different models or were made differently.
        """
        if self.fingerprint != other.fingerprint:
            raise CalibrationError(
                "these calibrations are of different models (their fingerprints differ): "
                "merge calibrations of one model only"
            )
        sites = dict(self.sites)
        for name, site in other.sites.items():
            sites[name] = sites[name].merge(site) if name in sites else site
        never = dict.fromkeys((*self.uncalled, *other.uncalled))
        return Calibration(
            sites=sites,
            samples=self.samples + other.samples,
            uncalled=tuple(name for name in never if name not in sites),
            dense={**other.dense, **self.dense},
            fingerprint=self.fingerprint,
        )

    def gathered(self, group: dist.ProcessGroup | None = None) -> Calibration:
        """The calibrations of all ranks merged, on every rank; a collective of torch.distributed.

        group: None is the default group. Site by site, so that a rank holds its own statistics
        and those of one site of the others. Raises CalibrationError as `merge` does.
        """
        alone = replace(self, sites={})
        others: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(others, (alone, list(self.sites)), group)
        merged, names = alone, dict.fromkeys(name for _, known in others for name in known)
        for rank, (other, _) in enumerate(others):
            merged = merged.merge(other) if rank else other
        sites = {}
        for name in names:
            site = self.sites.get(name)
            states: list[Any] = [None] * len(others)
            dist.all_gather_object(states, None if site is None else site.state(), group)
            found = [SiteStatistics.from_state(*state) for state in states if state is not None]
            sites[name] = functools.reduce(SiteStatistics.merge, found)
        uncalled = tuple(name for name in merged.uncalled if name not in sites)
        return replace(merged, sites=sites, uncalled=uncalled)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, replacing one that is there."""
        tensors: dict[str, Tensor] = {}
        plain = {}
        for name, site in self.sites.items():
            parts, plain[name] = site.state()
            tensors |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
        content = {
            "sites": plain,
            "samples": self.samples,
            "uncalled": list(self.uncalled),
            "dense": dict(self.dense),
            "fingerprint": None if self.fingerprint is None else asdict(self.fingerprint),
        }
        files.save(path, "calibration", _VERSION, tensors, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Inverse of `save`, exactly.

        Raises CalibrationError for a damaged or foreign file or another format version, and
        OSError for one that cannot be read.
        """
        tensors, content = files.load(path, "calibration", _VERSION, CalibrationError)
        try:
            return cls._from(tensors, content)
        except (KeyError, TypeError) as cause:
            raise CalibrationError(f"{path}: a field is missing or unknown: {cause}") from cause

    @classmethod
    def _from(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Calibration:
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in content["sites"]}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            parts[name][part] = tensor
        print_ = content["fingerprint"]
        return cls(
            sites={
                name: SiteStatistics.from_state(parts[name], plain)
                for name, plain in content["sites"].items()
            },
            samples=content["samples"],
            uncalled=tuple(content["uncalled"]),
            dense=content["dense"],
            fingerprint=None if print_ is None else Fingerprint(**print_),
        )
