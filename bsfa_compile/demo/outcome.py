"""What a run of the demo found, as plain data: the table, the picture and the JSON read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bsfa_compile.evaluate import Comparison
from bsfa_compile.evaluate.outcome import TileMap


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule over the evaluation texts.

    dropped: share of the tiles that no mask edge cuts. kept: site -> the rest, per head. found:
    hidden facts found, of `facts`.
    """

    name: str
    description: str
    dropped: float
    kept: dict[str, list[float]]
    comparison: Comparison
    found: int
    facts: int


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Greedy continuation of an evaluation text by the dense and by the optimized model."""

    prompt_end: str
    dense: str
    sparse: str
    same_tokens: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything a run found. Seconds are this machine's."""

    model: str
    device: str
    torch: str
    threads: int
    tokens: int
    scored: int
    calibrated_on: list[str]
    evaluated_on: list[str]
    rewritten: int
    left_dense: dict[str, str]
    dense_found: int
    rules: list[Rule]
    tile_maps: dict[str, TileMap]
    continuation: Continuation
    forward_seconds: dict[str, float]
    step_seconds: dict[str, float]

    def save(self, path: Path) -> None:
        """Write the outcome as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
