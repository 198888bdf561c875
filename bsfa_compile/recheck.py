"""Do thresholds still do on a model what they promised? After fine-tuning, or on other data."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import fx, nn
from torch.export import ExportedProgram

from bsfa_compile.calibrate.thresholds import Thresholds, loaded
from bsfa_compile.calibrating import calibrate
from bsfa_compile.errors import ThresholdsError
from bsfa_compile.state import state_of


@dataclass(frozen=True, kw_only=True)
class Recheck:
    """What thresholds do on this model and data beside what was promised where they were made.

    dropped: fraction of candidate tiles; lost: mean softmax mass per query row and head; worst:
    the mass lost by the head that loses most. promised_dropped, promised_lost: None if unknown.
    """

    dropped: float
    lost: float
    worst: float
    promised_dropped: float | None
    promised_lost: float | None

    @property
    def holds(self) -> bool:
        """Whether no more mass is lost than promised, a tenth being within the noise of data."""
        return self.promised_lost is None or self.lost <= 1.1 * self.promised_lost + 1e-6

    def __str__(self) -> str:
        text = f"{self.dropped:.1%} of tiles skipped, {self.lost:.2%} of softmax mass lost"
        text += f" (worst head {self.worst:.2%})"
        if self.promised_lost is None or self.promised_dropped is None:
            return f"{text}; nothing was promised"
        told = "holds" if self.holds else "over a tenth more is lost than that, calibrate again"
        promised = f"{self.promised_dropped:.1%} and {self.promised_lost:.2%}"
        return f"{text}; promised {promised}: {told}"


def recheck(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    data: object,
    thresholds: Thresholds | str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
) -> Recheck:
    """Run a model dense on a little data and see what thresholds would drop and lose there.

    thresholds: also a path of saved ones; those the model was optimized with, if not given. One
    forward pass per input; the model is unchanged. Raises ThresholdsError if there are none, or
    none of the model's sites.
    """
    state = state_of(model)
    if thresholds is None and state is not None:
        thresholds = state.thresholds
    if thresholds is None:
        raise ThresholdsError("the model was not optimized: pass the thresholds to check")
    thresholds = loaded(thresholds)
    seen = calibrate(
        model,
        data,
        sink_tiles=thresholds.sink_tiles,
        block_q=thresholds.block_q,
        block_k=thresholds.block_k,
        max_k=0,
        progress=progress,
    )
    if not seen.sites.keys() & thresholds.values.keys():
        raise ThresholdsError(
            "none of the sites that the thresholds name was seen in this model: they are of "
            "another model"
        )
    told = seen.told(thresholds)
    worst = max(float(site.lost.max()) for site in seen.predict(thresholds).values())
    assert told.dropped is not None and told.lost is not None, "told fills them"
    return Recheck(
        dropped=told.dropped,
        lost=told.lost,
        worst=worst,
        promised_dropped=thresholds.dropped,
        promised_lost=thresholds.lost,
    )
