"""Calibrated block-sparse attention for any traced PyTorch model."""

from bsfa_compile.calibrate import Budget, Calibration, Sparsity, Thresholds, TopK
from bsfa_compile.errors import (
    BsfaError,
    CalibrationError,
    InputError,
    ThresholdsError,
    UnsupportedError,
)
from bsfa_compile.ops.attention import block_sparse_attention
from bsfa_compile.optimize import apply, calibrate, optimize, retarget, revert
from bsfa_compile.report import Report, report

__all__ = [
    "BsfaError",
    "Budget",
    "Calibration",
    "CalibrationError",
    "InputError",
    "Report",
    "Sparsity",
    "Thresholds",
    "ThresholdsError",
    "TopK",
    "UnsupportedError",
    "apply",
    "block_sparse_attention",
    "calibrate",
    "optimize",
    "report",
    "retarget",
    "revert",
]
