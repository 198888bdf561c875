"""Calibration: the statistics of every site, from which any target is solved without the model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from bsfa_compile.calibrate import files
from bsfa_compile.calibrate.fingerprint import Fingerprint
from bsfa_compile.calibrate.predict import Prediction, predict
from bsfa_compile.calibrate.solve import Sparsity, Target, TopK, solve
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.calibrate.thresholds import Thresholds
from bsfa_compile.errors import CalibrationError

_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
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

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths in tokens of the samples that any site saw, ascending."""
        return tuple(sorted(set().union(*(site.lengths for site in self.sites.values()))))

    def thresholds(
        self, target: Target, gate: str | None = None, *, precision: str = "auto"
    ) -> Thresholds:
        """Solve a target: gate "relative" unless TopK, the paper's, which is "absolute".

        Warns if a Sparsity is out of reach: the most that can be dropped is given then, see
        `Thresholds.dropped`. Raises CalibrationError if no site has statistics.
        """
        chosen = gate or ("absolute" if isinstance(target, TopK) else "relative")
        values = solve(self.sites, target, chosen)
        any_site = next(iter(self.sites.values()))
        solved = Thresholds(
            values=values,
            gate=chosen,
            precision=precision,
            sink_tiles=any_site.sink_tiles,
            block_q=any_site.block_q,
            block_k=any_site.block_k,
            fingerprint=self.fingerprint,
            lengths=self.lengths,
            target=repr(target),
        )
        dropped, lost = self._overall(self.predict(solved))
        if isinstance(target, Sparsity) and dropped < target.fraction * (1 - 1e-9):
            warnings.warn(
                f"{target}: thresholds of the {chosen} gate stay at or below their cap and drop "
                f"{dropped:.3f} of the candidate tiles at most; that is what they do now",
                stacklevel=2,
            )
        return replace(solved, dropped=dropped, lost=lost)

    def predict(self, thresholds: Thresholds) -> dict[str, Prediction]:
        """What thresholds do on the calibration data, for every site that both know.

        Exact for thresholds solved from this calibration for a Budget or a Sparsity.
        """
        return {
            name: predict(site, thresholds.values[name], thresholds.gate)
            for name, site in self.sites.items()
            if name in thresholds.values
        }

    def _overall(self, predictions: Mapping[str, Prediction]) -> tuple[float, float]:
        """Fraction of all candidate tiles dropped, and mean lost mass over sites and heads."""
        tiles = sum(site.candidates * site.heads for site in self.sites.values())
        dropped = sum(
            float(predictions[name].dropped.sum()) * site.candidates
            for name, site in self.sites.items()
        )
        lost = torch.cat([p.lost for p in predictions.values()])
        return dropped / max(tiles, 1), float(lost.mean())

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, replacing one that is there."""
        tensors: dict[str, torch.Tensor] = {}
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
    def _from(cls, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> Calibration:
        parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in content["sites"]}
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
