"""Where block-sparse attention overtakes dense on a device: measured there, or else shipped.

`python -m bsfa_compile crossover` measures (`race.py`) and stores by the device's name, beside the
built kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import tempfile
import warnings
from pathlib import Path

import torch

from bsfa_compile.ops.compiler import cache_dir

FILE_NAME = "crossover.json"
NEVER = 2**40  # tokens: no call is that long


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crossover:
    """Calls of fewer than `tokens` queries or keys run dense.

    skipped: on the CPU, where a sample of the scores tells, so do heads that skip a smaller
    fraction of their visible tiles. On CUDA nothing can be read without waiting for the device:
    `tokens` is where sparse holds its own even if it skips little.
    """

    tokens: int
    skipped: float = 0.0


# By the device's name, else its type. The CPU's: two cores of an AMD EPYC, float32, 2026-11-23, by
# the command. CUDA's: on an H100, same day, by the command, at 22 to 24 % skipped a queue of sparse
# calls reads .86 x SDPA at 4k tokens, 1.00 at 8k and 1.11 at 16k; waited for one by one (an earlier
# version) .79 at 4k and .93 at 8k, for the time of the launches.
SHIPPED = {
    "cpu": Crossover(tokens=4096, skipped=0.69),
    "cuda": Crossover(tokens=8192),
}


@functools.cache
def of(device: torch.device) -> Crossover:
    """What holds for a device: what was measured on its like, else what is shipped."""
    known, name = {**SHIPPED, **_stored()}, device_name(device)
    return known.get(name) or known.get(device.type) or SHIPPED["cuda"]


def device_name(device: torch.device) -> str:
    """The card's or the processor's name; "cpu" if the system does not tell it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or device.type
    names = [row.split(":", 1)[1].strip() for row in text.splitlines() if "model name" in row]
    return next(iter(names), platform.processor() or device.type)


def _stored() -> dict[str, Crossover]:
    path = cache_dir() / FILE_NAME
    try:
        found = json.loads(path.read_text())
        return {name: Crossover(**fields) for name, fields in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not used, it cannot be read ({error}): delete it", stacklevel=3)
        return {}


def store(device: torch.device, found: Crossover) -> Path:
    """Keep what was measured on a device; the file it is in."""
    path = cache_dir() / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {**_stored(), device_name(device): found}
    content = {name: dataclasses.asdict(value) for name, value in table.items()}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(content, indent=1) + "\n")
    os.replace(file.name, path)
    of.cache_clear()
    return path
