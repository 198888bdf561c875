"""Import the threshold files of the official BSFA implementation."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from bsfa_compile.calibrate.thresholds import Thresholds
from bsfa_compile.errors import ThresholdsError


def load_official(path: str | os.PathLike[str], k: int, sites: Sequence[str]) -> Thresholds:
    """Thresholds for `k` kept tiles per q block from an official "*.inference.pt" file.

    sites: names of the model's attention sites, one per layer and in the file's order, such as
    "model.layers.0.self_attn". The file holds "thresholds" [k values, layers, heads, q blocks] in
    scaled logits in natural-log units, "k_values", "q_block_size" and "k_block_size". It is read
    without unpickling code. The result is the paper's rule: gate absolute, no sink tile. Raises
    ThresholdsError for another file, an unknown k or another number of layers, OSError for a file
    that cannot be read.
    """
    with open(path, "rb"):  # so that a missing file is not reported as a damaged one
        pass
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, ValueError) as cause:
        # Not torch's own words, which advise to run the code.
        raise ThresholdsError(
            f"{path}: damaged, or not a file that torch.load reads without running code; wanted "
            "the .inference.pt of the official BSFA calibration"
        ) from cause
    wanted = ("thresholds", "k_values", "q_block_size", "k_block_size")
    missing = [name for name in wanted if not isinstance(content, dict) or name not in content]
    if missing:
        raise ThresholdsError(
            f"{path}: {', '.join(missing)} missing: this is no threshold file of the official BSFA "
            "calibration, which holds " + ", ".join(wanted)
        )
    values, ks = content["thresholds"], [int(value) for value in content["k_values"]]
    good = isinstance(values, Tensor) and values.dim() == 4 and values.is_floating_point()
    if not good or len(values) != len(ks) or values.numel() == 0:
        raise ThresholdsError(
            f"{path}: thresholds must be [{len(ks)} k values, layers, heads, q blocks], got "
            f"{list(values.shape) if isinstance(values, Tensor) else type(values).__name__}"
        )
    if k not in ks:
        raise ThresholdsError(f"{path}: k={k} is not in the file; it has {sorted(ks)}")
    layers = values[ks.index(k)].to(torch.float32)
    if len(layers) != len(sites):
        raise ThresholdsError(
            f"{path}: {len(layers)} layers, but {len(sites)} sites were named; name one per layer"
        )
    return Thresholds(
        values={name: layer.clone() for name, layer in zip(sites, layers, strict=True)},
        gate="absolute",
        sink_tiles=0,
        block_q=int(content["q_block_size"]),
        block_k=int(content["k_block_size"]),
        target=f"official BSFA, k={k}",
    )
