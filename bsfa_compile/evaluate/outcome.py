"""What an evaluation found, as plain data: tables, pictures, the report and the JSON read it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bsfa_compile.evaluate.intervals import METHODS, Estimate


@dataclass(frozen=True, kw_only=True)
class TileMap:
    """What becomes of one head's tiles: 0 masked, 1 dropped, 2 kept; [q blocks][key tiles]."""

    site: str
    head: int
    tiles: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Documents of a genre under a rule, against dense; nats per token, over `tokens` in all."""

    genre: str
    tokens: int
    dense_nll: float
    delta_nll: Estimate
    kl: Estimate
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """A task's mean score, dense and under a rule, and the change in the same prompts."""

    task: str
    dense: Estimate
    sparse: Estimate
    change: Estimate


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rule at one length.

    dropped: fraction of the documents' candidate tiles. seconds: of a forward pass, with graphs
    run by `Evaluation.inner`, beside the eager dense model's. losses: all documents first.
    layer_errors: |sparse - dense| / |dense| of the output of each attention module, all being
    sparse, on the first document; empty if graphs run.
    """

    rule: str
    gate: str
    precision: str
    sink_tiles: int
    length: int
    dropped: float
    dense_seconds: float
    seconds: float
    losses: tuple[Loss, ...]
    scores: tuple[Score, ...] = ()
    layer_errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything a run found, and what it takes to repeat it.

    calibrated_on: documents that thresholds were chosen by. proofs: of what was searched for.
    """

    model: str
    device: str
    versions: dict[str, str]
    seed: int
    scored: int
    inner: str
    calibrated_on: tuple[str, ...]
    documents: dict[int, tuple[str, ...]]
    samples: int
    points: tuple[Point, ...]
    proofs: dict[str, str] = field(default_factory=dict)
    intervals: str = METHODS

    def to_json(self) -> str:
        """All fields as JSON text; an infinite end of an interval is null."""
        return json.dumps(finite(asdict(self)), indent=1) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON."""
        path.write_text(self.to_json(), "utf-8")


def finite(value: Any) -> Any:
    """Plain data with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
