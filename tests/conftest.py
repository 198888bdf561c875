"""Hypothesis profiles: dev (default), ci (more, always the same), soak (many, random)."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from bsfa_compile.ops import crossover

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile(
    "dev", deadline=None, max_examples=15, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile(
    "ci", deadline=None, max_examples=40, derandomize=True, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile(
    "soak", deadline=None, max_examples=2000, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True)
def _shipped_crossover(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense or sparse does not depend on what was measured on this machine."""
    monkeypatch.setattr(crossover, "_stored", dict)
