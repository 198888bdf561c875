"""Calibrated block-sparse attention for any traced PyTorch model."""

from bsfa_compile.calibrate import (
    Budget,
    Calibration,
    Quality,
    Sparsity,
    Thresholds,
    TopK,
    load_official,
    load_skip_softmax,
    skip_softmax_config,
)
from bsfa_compile.calibrating import calibrate
from bsfa_compile.canary import Canary, Drift
from bsfa_compile.errors import (
    BsfaError,
    CalibrationError,
    InputError,
    ThresholdsError,
    UnsupportedError,
)
from bsfa_compile.huggingface import register_when_imported
from bsfa_compile.ops.attention import block_sparse_attention
from bsfa_compile.optimize import apply, optimize, revert
from bsfa_compile.recheck import Recheck, recheck
from bsfa_compile.report import Report, report
from bsfa_compile.retarget import reset_counters, retarget, retargeted
from bsfa_compile.search import search

__all__ = [
    "BsfaError",
    "Budget",
    "Calibration",
    "CalibrationError",
    "Canary",
    "Drift",
    "InputError",
    "Quality",
    "Recheck",
    "Report",
    "Sparsity",
    "Thresholds",
    "ThresholdsError",
    "TopK",
    "UnsupportedError",
    "apply",
    "block_sparse_attention",
    "calibrate",
    "load_official",
    "load_skip_softmax",
    "optimize",
    "recheck",
    "report",
    "reset_counters",
    "retarget",
    "retargeted",
    "revert",
    "search",
    "skip_softmax_config",
]

register_when_imported()
