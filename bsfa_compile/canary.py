"""A canary: every so often a call runs dense beside sparse, and the drift is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from bsfa_compile.calibrate.quality import Meter
from bsfa_compile.errors import InputError
from bsfa_compile.modules import COMPILED
from bsfa_compile.retarget import retargeted
from bsfa_compile.state import state_of
from bsfa_compile.trial import dense_values


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One sampled call: its number from 0, and |sparse - dense| / |dense| of the model's output."""

    call: int
    error: float


class Canary:
    """Watches an optimized nn.Module while it is open, or in a `with`; `drifts` is what it saw.

    every: the call numbers that are sampled, 0, every, 2 * every, ... told: called with each
    Drift, to log it or to retarget. A sampled call costs a dense forward more. Its dense twin gets
    copies of what is not a tensor, key-value caches among them, as they were before the call, and
    runs through the compiled graphs with thresholds of -inf: nothing is recompiled, and the
    counters do not see it. Raises InputError for another kind of model or a bad number.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 100, told: Callable[[Drift], None] | None = None
    ) -> None:
        state = state_of(model)
        inner = vars(model).get(COMPILED) if isinstance(model, nn.Module) else None
        if state is None or inner is None:
            raise InputError(
                f"a canary watches an optimized nn.Module, got {type(model).__name__}; call "
                "optimize or apply first (traced graphs cannot be watched)"
            )
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise InputError(f"every must be an integer of at least 1, got {every!r}")
        self.drifts: list[Drift] = []
        self._model, self._state, self._inner = model, state, inner
        self._every, self._told, self._calls = every, told, 0
        setattr(model, COMPILED, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        number, self._calls = self._calls, self._calls + 1
        if number % self._every:
            return self._inner(*args, **kwargs)
        again = _copied((args, kwargs))
        output = self._inner(*args, **kwargs)
        meter, solved = Meter("error", 1), self._state.thresholds
        nothing = replace(solved, values=dense_values(solved.values), curves=None)
        with torch.no_grad(), retargeted(self._model, nothing):
            dense = meter.reference(self._inner(*again[0], **again[1]), again)
        loss = meter.pool([meter.losses(output, dense)])
        self.drifts.append(Drift(call=number, error=loss.mean))
        if self._told is not None:
            self._told(self.drifts[-1])
        return output

    def close(self) -> None:
        """Stop watching; closing twice is fine."""
        if vars(self._model).get(COMPILED) == self._call:
            setattr(self._model, COMPILED, self._inner)

    def __enter__(self) -> Canary:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _copied(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The call with everything but its tensors copied: a cache grows in place."""
    args, kwargs = call
    shared: dict[int, Any] = {
        id(value): value
        for value in (*args, *kwargs.values())
        if isinstance(value, torch.Tensor | nn.Module)
    }
    return copy.deepcopy(args, shared), copy.deepcopy(kwargs, shared)
