"""GPU tests skip, with the reason, where there is no card that can run the kernels."""

from __future__ import annotations

import pytest
import torch


def _why_not(marker: str) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA card"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability} is below 8.0"
    if marker == "sm90" and capability != (9, 0):
        return f"compute capability {capability} is not Hopper's 9.0"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in ("gpu", "sm90"):
            if item.get_closest_marker(marker) and (reason := _why_not(marker)):
                item.add_marker(pytest.mark.skip(reason=reason))
