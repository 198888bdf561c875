"""`bsfa recheck`: thresholds on a model that they may not have been made for."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

import bsfa_compile as bsfa
from bsfa_compile.calibrate.thresholds import check
from bsfa_compile.evaluate.corpora import EVALUATION
from bsfa_compile.evaluate.models import load
from bsfa_compile.evaluate.run import Settings, pieces, sample
from bsfa_compile.ops.compiler import cache_dir

_LENGTH = 4096  # of thresholds that do not say what they were calibrated on


def recheck_documents(
    model: str,
    thresholds: Path,
    *,
    length: int | None,
    documents: int,
    text: tuple[Path, ...],
    device: torch.device,
) -> bsfa.Recheck:
    """What thresholds (a file or folder) drop and lose on held-out documents of a model.

    Warns if the model has other weights than the calibrated one; raises ThresholdsError if it is
    another model, OSError if there are no thresholds.
    """
    given = bsfa.Thresholds.load(thresholds)
    tokens = length or max(given.lengths, default=_LENGTH)
    loaded = load(model, cache_dir() / "models", device)
    loaded.check_length(tokens)
    check(given, loaded.model)
    settings = Settings(model=model, lengths=(tokens,), scored=1, text=text, device=device)
    found = pieces(loaded, settings, EVALUATION, tokens, count=documents)
    data = [sample(piece.input_ids) for piece in found]
    return bsfa.recheck(loaded.model, data, given, progress=Console().is_terminal)
