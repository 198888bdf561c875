"""Thresholds: one number per head (or per head and q block) of every site, as data on disk."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bsfa_compile.calibrate import files
from bsfa_compile.calibrate.fingerprint import Fingerprint, Model, fingerprint, unwrap
from bsfa_compile.calibrate.fit import columns
from bsfa_compile.calibrate.grid import GATES
from bsfa_compile.calibrate.quality import Proof
from bsfa_compile.errors import InputError, ThresholdsError
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q

FILE_NAME = "bsfa_thresholds.safetensors"  # beside the weights of a checkpoint
ROOT = "(model)"  # the site name of attention in the forward of the model itself
PRECISIONS = ("auto", "exact", "int8")
_VERSION = 2


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Thresholds:
    """Thresholds of a model, in scaled logits in natural-log units.

    values: site -> float32 [H, n] on the CPU, column = absolute q block, the last one holds for
    all later blocks. lengths: the lengths calibrated on, ascending. target: what was asked for.
    dropped, lost: predicted fraction of candidate tiles dropped over the model, and mean softmax
    mass lost per query row and head; None if unknown. proof: what a Quality target came to on
    held-out inputs. curves: site -> float32 [H, 3], if the columns follow a fit over positions
    (calibrate/fit.py); only the fit is stored then. Raises ThresholdsError for bad values.
    """

    values: Mapping[str, Tensor]
    gate: str = "relative"
    precision: str = "auto"
    sink_tiles: int = 1
    block_q: int = BLOCK_Q
    block_k: int = BLOCK_K
    fingerprint: Fingerprint | None = None
    lengths: tuple[int, ...] = ()
    target: str = ""
    dropped: float | None = None
    lost: float | None = None
    proof: Proof | None = None
    curves: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ThresholdsError(f"gate must be one of {', '.join(GATES)}, got {self.gate!r}")
        if self.precision not in PRECISIONS:
            raise ThresholdsError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.sink_tiles < 0 or self.block_q < 1 or self.block_k < 1:
            raise ThresholdsError(
                "sink_tiles must be at least 0, block_q and block_k at least 1, got "
                f"{self.sink_tiles}, {self.block_q}, {self.block_k}"
            )
        for name, value in self.values.items():
            given = isinstance(value, Tensor)
            good = given and value.dtype == torch.float32 and value.dim() == 2 and value.numel() > 0
            if not good or bool(value.isnan().any()):
                raise ThresholdsError(
                    f"thresholds of {name!r} must be float32 [heads, q blocks] without NaN, got "
                    + (f"{value.dtype} {list(value.shape)}" if given else type(value).__name__)
                )
        plain = {name: value.detach().cpu() for name, value in self.values.items()}
        object.__setattr__(self, "values", plain)

    @functools.cached_property
    def reach(self) -> int | None:
        """Tokens of the longest input that these were made for: a fit's columns, else the longest
        calibrated on. None if unknown, or if nothing is dropped at any length."""
        if all(bool((value == -math.inf).all()) for value in self.values.values()):
            return None
        if self.curves is not None:
            return next(iter(self.values.values())).shape[1] * self.block_q
        return max(self.lengths, default=None)

    def reaching(self, length: int) -> Thresholds:
        """The same fit for inputs of up to `length` tokens. Raises ThresholdsError without one."""
        if self.curves is None:
            raise ThresholdsError(
                "these thresholds were not fitted over positions: solve them with "
                "Calibration.thresholds(target, max_length=...)"
            )
        count = max(1, math.ceil(length / self.block_q))
        values = {n: columns(curve, count, self.gate) for n, curve in self.curves.items()}
        return replace(self, values=values)

    def equal(self, other: Thresholds) -> bool:
        """Whether every field is the same, thresholds to the bit."""
        return self._content() == other._content() and all(
            torch.equal(value, other.values[name]) for name, value in self.values.items()
        )

    def __repr__(self) -> str:
        done = "" if self.dropped is None else f", {self.dropped:.1%} of tiles dropped"
        lost = "" if self.lost is None else f", {self.lost:.2%} of softmax mass lost"
        return (
            f"Thresholds({len(self.values)} sites, {self.target or 'target unknown'}, gate "
            f"{self.gate}{done}{lost})"
        )

    def _content(self) -> dict[str, object]:
        plain: dict[str, object] = {
            name: getattr(self, name)
            for name in ("gate", "precision", "sink_tiles", "block_q", "block_k", "target")
        }
        plain |= {"dropped": self.dropped, "lost": self.lost}
        plain["proof"] = None if self.proof is None else asdict(self.proof)
        plain["fingerprint"] = None if self.fingerprint is None else asdict(self.fingerprint)
        wide = next(iter(self.values.values())).shape[1] if self.values else 0
        plain["fitted_columns"] = None if self.curves is None else wide
        return plain | {"lengths": list(self.lengths), "sites": list(self.values)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, replacing one that is there; into a folder, as FILE_NAME."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        files.save(path, "thresholds", _VERSION, self.curves or self.values, self._content())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Thresholds:
        """Inverse of `save`, to the bit. Of a folder, the file FILE_NAME in it is read.

        What an older release did not write yet has its default. Raises ThresholdsError for a
        damaged or foreign file or another format version, and OSError for one that cannot be read.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        tensors, content = files.load(path, "thresholds", _VERSION, ThresholdsError)
        try:
            sites, wide = content.pop("sites"), content.pop("fitted_columns")
            print_, proof = content.pop("fingerprint", None), content.pop("proof", None)
            stored = {name: tensors[name] for name in sites}
            gate = content["gate"]
            fitted = {} if wide is None else {n: columns(v, wide, gate) for n, v in stored.items()}
            return cls(
                values=fitted or stored,
                curves=None if wide is None else stored,
                fingerprint=None if print_ is None else Fingerprint(**print_),
                lengths=tuple(content.pop("lengths", ())),
                proof=None if proof is None else Proof(**proof),
                **content,
            )
        except (KeyError, TypeError) as cause:
            raise ThresholdsError(f"{path}: a field is missing or unknown: {cause}") from cause


def loaded(thresholds: object) -> Thresholds:
    """Thresholds, or those at a path. Raises InputError for anything else, and as `load` does."""
    if isinstance(thresholds, Thresholds):
        return thresholds
    if isinstance(thresholds, str | os.PathLike):
        return Thresholds.load(thresholds)
    raise InputError(
        f"thresholds must be Thresholds or a path of saved ones, got {type(thresholds).__name__}; "
        "Calibration.thresholds(target) makes them"
    )


def check(thresholds: Thresholds, model: Model, *, sites: Mapping[str, int] | None = None) -> None:
    """Refuse thresholds of another model. Site names are module names, "#n" appended.

    sites: the sites found in the model, name -> heads; without it only module names are looked
    at. Raises ThresholdsError naming sites that are missing, unknown or of another head count,
    or if the structure differs. The same structure with other weights is only warned of.
    """
    problems = _site_problems(thresholds, model, sites)
    seen = None if thresholds.fingerprint is None else fingerprint(model)
    made = thresholds.fingerprint
    same = seen is None or made is None or seen.structure == made.structure
    if problems or not same:
        if not same:
            problems.append("module tree or parameter shapes differ from the calibrated model's")
        raise ThresholdsError(
            "these thresholds do not fit the model: " + "; ".join(problems) + ". Calibrate this "
            "model, or load the thresholds made for it"
        )
    if seen is not None and made is not None and seen.weights != made.weights:
        warnings.warn(
            "the model has the structure but not the weights (or dtype) that these thresholds "
            "were calibrated on, as after fine-tuning: bsfa_compile.recheck(model, data, "
            "thresholds) tells in a few forward passes whether they still hold",
            stacklevel=2,
        )


def _site_problems(
    thresholds: Thresholds, model: Model, sites: Mapping[str, int] | None
) -> list[str]:
    values = thresholds.values
    problems = []
    if sites is not None:
        extra = [name for name in values if name not in sites]
        missing = [name for name in sites if name not in values]
        heads = [
            f"{name} has {sites[name]} heads, its thresholds {len(value)}"
            for name, value in values.items()
            if name in sites and sites[name] != len(value)
        ]
        if missing:
            problems.append(f"no thresholds for {_some(missing)}")
        if heads:
            problems.append(f"head counts differ: {_some(heads)}")
    elif isinstance(model, nn.Module) and not isinstance(model, torch.fx.GraphModule):
        modules = {name or ROOT for name, _ in unwrap(model).named_modules()}
        extra = [name for name in values if name.split("#")[0] not in modules]
    else:
        extra = []
    if extra:
        problems.append(f"the model has no site {_some(extra)}")
    return problems


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
