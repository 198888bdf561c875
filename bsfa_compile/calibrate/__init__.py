"""Calibration: watch attention, remember integers, solve thresholds for any target."""

from bsfa_compile.calibrate.calibration import Calibration
from bsfa_compile.calibrate.data import Samples, device_of, move, samples
from bsfa_compile.calibrate.fingerprint import Fingerprint, fingerprint
from bsfa_compile.calibrate.observer import Observer
from bsfa_compile.calibrate.official import load_official
from bsfa_compile.calibrate.predict import Prediction
from bsfa_compile.calibrate.quality import Proof, Quality
from bsfa_compile.calibrate.skip_softmax import load_skip_softmax, skip_softmax_config
from bsfa_compile.calibrate.solve import Budget, Sparsity, Target, TopK
from bsfa_compile.calibrate.statistics import SiteStatistics
from bsfa_compile.calibrate.thresholds import Thresholds, check

__all__ = [
    "Budget",
    "Calibration",
    "Fingerprint",
    "Observer",
    "Prediction",
    "Proof",
    "Quality",
    "Samples",
    "SiteStatistics",
    "Sparsity",
    "Target",
    "Thresholds",
    "TopK",
    "check",
    "device_of",
    "fingerprint",
    "load_official",
    "load_skip_softmax",
    "move",
    "samples",
    "skip_softmax_config",
]
