"""What calibration takes: an 8B-shaped model, 16 samples of 32k tokens, seconds and memory.

    python -m benchmarks.calibration --layers 32 --samples 16 --tokens 32768

Random weights, so only time and memory count. "added" is the peak above that of the same forward
passes without calibration. --attention sdpa calibrates through a trace of the model, as without
attn_implementation="bsfa". Then every target is solved, without the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

import bsfa_compile as bsfa
from benchmarks.prefill import llama
from benchmarks.quality import Record, calibrated
from bsfa_compile.calibrate import Target
from bsfa_compile.evaluate.run import device_name, versions


def solving(calibration: bsfa.Calibration, target: Target) -> dict[str, float]:
    """Seconds to solve a target, and the bytes of its thresholds on disk."""
    start = time.perf_counter()
    solved = calibration.thresholds(target)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "thresholds.safetensors")
        solved.save(path)
        return {"seconds": seconds, "bytes": path.stat().st_size, "dropped": solved.dropped or 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--attention", default="bsfa", choices=("bsfa", "sdpa"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/calibration.json"))
    given = parser.parse_args()
    device = torch.device("cuda")
    record = Record(given.out, Console(stderr=True))
    model = llama(given.layers, given.tokens, given.attention)
    record.add("about", {
        "device": device_name(device), "versions": versions(), "layers": given.layers,
        "tokens": given.tokens, "attention": given.attention,
        "weights_gib": torch.cuda.memory_allocated() / 2**30,
    })  # fmt: skip
    data = [
        {"input_ids": torch.randint(0, 100_000, (1, given.tokens), device=device),
         "use_cache": False}
        for _ in range(given.samples)
    ]  # fmt: skip
    with torch.no_grad():
        calibration, taken = calibrated(model, data, device)
    record.add("calibration", taken)
    for target in (bsfa.Budget(0.03), bsfa.Sparsity(0.8), bsfa.TopK(64)):
        record.add(repr(target), solving(calibration, target))


if __name__ == "__main__":
    main()
