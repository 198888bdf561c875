"""What tests of the kernels share."""

from __future__ import annotations

import pytest

from tests.kernels import emulated


@pytest.fixture(scope="session")
def emulator() -> None:
    """Skips where kernels cannot be emulated."""
    if (reason := emulated.lacking()) is not None:
        pytest.skip(reason)
