"""Import and export `sparse_attention_config` of ModelOpt and TensorRT-LLM (skip softmax).

It keeps one rule for a whole model: a tile is skipped if every row's largest score in it stays
under the running maximum by more than -ln(a * exp(b * S) / L), S the sparsity asked for and L the
tokens of the input. That is the relative gate with one threshold, ln(a) + b * S - ln(L), in
scaled logits in natural-log units. Their kernels keep no sink tile and visit tiles in another
order, so achieved sparsities differ somewhat.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from bsfa_compile.calibrate.calibration import Calibration
from bsfa_compile.calibrate.grid import EDGES, GATES, ZERO_EDGE
from bsfa_compile.calibrate.thresholds import Thresholds
from bsfa_compile.errors import CalibrationError, InputError, ThresholdsError

KEY = "sparse_attention_config"
FORMULA = "a * exp(b * target_sparsity)"
_ALGORITHMS = ("softmax_skip", "skip_softmax")
_LEAST, _POINTS = 0.05, 10  # sparsities fitted: from here up to the most there is


def load_skip_softmax(
    config: Mapping[str, Any] | str | os.PathLike[str],
    sites: Mapping[str, int],
    *,
    sparsity: float,
    length: int,
) -> Thresholds:
    """Thresholds of a checkpoint calibrated by ModelOpt, for its prefill phase.

    config: the checkpoint's config.json, as a path (of the file or its folder) or read; or the
    `sparse_attention_config` in it. sites: attention sites of the model, name -> heads; those that
    the config ignores stay dense. sparsity: the target asked for, 0 to 1. length: tokens of the
    inputs to come. Raises ThresholdsError for a config of another kind, InputError for a bad
    sparsity or length, OSError for a file that cannot be read.
    """
    if not (isinstance(sparsity, Real) and 0 <= sparsity <= 1):
        raise InputError(f"sparsity must be a number from 0 to 1, got {sparsity!r}")
    if not (isinstance(length, int) and length >= 1):
        raise InputError(f"length must be an integer of at least 1 token, got {length!r}")
    if not isinstance(sites, Mapping):
        raise InputError(f"sites must map names to heads, got {type(sites).__name__}")
    found = _read(config)
    groups = found.get("config_groups") or {"": found}
    ours = [g for g in groups.values() if _algorithm(g) in (None, *_ALGORITHMS)]
    scale = next((g["threshold_scale_factor"] for g in (found, *ours) if _has_scale(g)), None)
    if not ours or scale is None:
        kinds = sorted({str(_algorithm(group)) for group in groups.values()})
        raise ThresholdsError(
            f"{KEY}: no skip-softmax group with a threshold_scale_factor; it has {', '.join(kinds)}"
        )
    factor = _factor(scale, sparsity)
    # Only so that a skipped tile never holds a row's maximum, as in every relative threshold.
    threshold = min(math.log(factor / length), 0.0) if factor > 0 else -math.inf
    ignored = [pattern for group in ours for pattern in group.get("ignore", ())]
    values = {
        name: torch.full((heads, 1), threshold)
        for name, heads in sites.items()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
    }
    return Thresholds(
        values=values,
        sink_tiles=0,
        lengths=(length,),
        target=f"skip softmax, sparsity {sparsity}, length {length}",
    )


def skip_softmax_config(calibration: Calibration, *, targets: tuple[str, ...] = ()) -> Any:
    """A calibration as `sparse_attention_config`, to be put into a checkpoint's config.json.

    One threshold for the whole model is fitted to ln(a) + b * S - ln(L) over sparsities S from
    0.05 to the most that thresholds <= 0 reach, at the mean length L calibrated on. targets: class
    names of the attention modules, for information. Raises CalibrationError if nothing can be
    dropped.
    """
    relative = GATES.index("relative")
    sites = calibration.sites.values()
    counts = sum(site.counts[relative].sum(dim=0) for site in sites)
    total = sum(site.candidates * site.heads for site in sites)
    if not isinstance(counts, torch.Tensor) or total == 0:
        raise CalibrationError("no tile could be dropped on the calibration data: nothing to fit")
    reached = counts.cumsum(dim=0)[: ZERO_EDGE + 1].to(torch.float64) / total
    most = float(reached[-1])
    if most <= _LEAST:
        raise CalibrationError(
            f"thresholds up to 0 drop {most:.1%} of the tiles, at least {_LEAST:.0%} are wanted to "
            "fit a formula: calibrate on longer inputs"
        )
    asked = torch.linspace(_LEAST, most, _POINTS, dtype=torch.float64)
    edge = torch.searchsorted(reached, asked).clamp_max(ZERO_EDGE)
    length = sum(calibration.lengths) / len(calibration.lengths)
    logs = EDGES[edge].to(torch.float64) + math.log(length)
    off = asked - asked.mean()
    b = float((off * logs).sum() / off.square().sum())
    a = math.exp(float(logs.mean()) - b * float(asked.mean()))
    return {
        "config_groups": {"group_0": {"sparse_algo": _ALGORITHMS[0], "targets": list(targets)}},
        "threshold_scale_factor": {"formula": FORMULA, "prefill": {"a": a, "b": b}},
        "producer": {"name": "bsfa_compile"},
    }


def _read(config: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    content: Any = config
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as cause:
            raise ThresholdsError(f"{path}: not JSON, or damaged ({cause})") from cause
        if not isinstance(content, Mapping) or KEY not in content:
            raise ThresholdsError(f"{path}: no {KEY!r} in it: the checkpoint was not calibrated")
    found = content.get(KEY, content) if isinstance(content, Mapping) else content
    if not isinstance(found, Mapping):
        raise ThresholdsError(f"{KEY} must be a mapping, got {type(found).__name__}")
    return found


def _algorithm(group: Mapping[str, Any]) -> Any:
    return group.get("sparse_algo", group.get("algorithm"))


def _has_scale(group: Mapping[str, Any]) -> bool:
    return "threshold_scale_factor" in group


def _factor(scale: Any, sparsity: float) -> float:
    """The factor that, divided by the length, is the threshold of the exponential."""
    formula = scale.get("formula", FORMULA) if isinstance(scale, Mapping) else FORMULA
    if "".join(str(formula).split()) != "".join(FORMULA.split()):
        raise ThresholdsError(
            f"threshold_scale_factor has the formula {formula!r}; known is {FORMULA!r}"
        )
    phase = scale.get("prefill", scale.get("coefficients")) if isinstance(scale, Mapping) else scale
    given = [phase.get("a"), phase.get("b")] if isinstance(phase, Mapping) else [phase]
    numbers = [float(n) for n in given if isinstance(n, Real) and not isinstance(n, bool)]
    good = len(numbers) == len(given) and all(map(math.isfinite, numbers))
    if not good or numbers[0] < 0:
        raise ThresholdsError(
            "threshold_scale_factor: wanted a number >= 0 or prefill coefficients a >= 0 and b, "
            f"got {scale!r}"
        )
    return numbers[0] * math.exp(numbers[1] * sparsity) if len(numbers) == 2 else numbers[0]
