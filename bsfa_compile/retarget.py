"""The dial: other thresholds for an optimized model, in place, and its counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from bsfa_compile.calibrate.quality import Quality
from bsfa_compile.calibrate.solve import Target
from bsfa_compile.calibrate.thresholds import Thresholds, check
from bsfa_compile.errors import InputError, ThresholdsError
from bsfa_compile.passes.attach import to_bits
from bsfa_compile.passes.rewrite import Rule
from bsfa_compile.state import State, state_of

Model = TypeVar("Model", nn.Module, fx.GraphModule, ExportedProgram)


def retarget(model: Model, target: Target | Thresholds) -> Model:
    """Write the thresholds for another target into an optimized model; nothing is recompiled.

    The buffers are written where they are, so captured CUDA graphs follow too. Counters start
    again at zero. Raises ThresholdsError if the model was not optimized, if a target is given but
    the model has no calibration (it was made by `apply`), or if the gate, precision or tile shape
    of the thresholds differ from the compiled one's; InputError for another kind of target.
    """
    state = _optimized(model)
    solved = _solved(model, state, target)
    write(state, solved)
    state.thresholds = solved
    return model


@contextmanager
def retargeted(model: Model, target: Target | Thresholds) -> Iterator[Model]:
    """`retarget` for one request: inside, the model follows another target.

    Counters start at zero inside; afterwards thresholds and counters are those of before. Errors
    as of `retarget`.
    """
    state = _optimized(model)
    solved, before = _solved(model, state, target), state.thresholds
    counts = {name: counters.clone() for name, (_, counters) in _buffers(state).items()}
    write(state, solved)
    state.thresholds = solved
    try:
        yield model
    finally:
        write(state, before)
        state.thresholds = before
        with torch.no_grad():
            for name, (_, counters) in _buffers(state).items():
                counters.copy_(counts[name])


def reset_counters(model: nn.Module | fx.GraphModule | ExportedProgram) -> None:
    """Let the skip rates of `report` count from here on. Raises ThresholdsError, see `retarget`."""
    with torch.no_grad():
        for _, counters in _buffers(_optimized(model)).values():
            counters.zero_()


def write(state: State, solved: Thresholds) -> None:
    """Copy thresholds that fit a state into its buffers, and set its counters to zero."""
    held = _buffers(state)
    with torch.no_grad():
        for name, values in solved.values.items():
            if name in held:
                thresholds, counters = held[name]
                thresholds.copy_(to_bits(values, thresholds.shape[1], thresholds.device))
                counters.zero_()


def _buffers(state: State) -> dict[str, tuple[Tensor, Tensor]]:
    """(thresholds, counters) of every site that has them."""
    held = {name: state.buffers(name) for name in state.homes}
    return {name: pair for name, pair in held.items() if pair is not None}


def _optimized(model: nn.Module | fx.GraphModule | ExportedProgram) -> State:
    state = state_of(model)
    if state is None:
        raise ThresholdsError("the model was not optimized: call optimize or apply first")
    return state


def _solved(model: Model, state: State, target: Target | Thresholds) -> Thresholds:
    if isinstance(target, Thresholds):
        known = state.thresholds.fingerprint
        if known is None or target.fingerprint != known:
            check(target, model)
        solved = target
    elif not isinstance(target, Target | Quality):
        raise InputError(f"target must be Budget, TopK, Sparsity or Thresholds, got {target!r}")
    elif state.calibration is not None:
        rule, wide = state.rule, state.thresholds.values.values()
        if not wide:
            raise ThresholdsError("no attention of this model is sparse: report(model) tells why")
        fitted = next(iter(wide)).shape[1] * rule.block_q
        solved = state.calibration.thresholds(
            target,
            rule.gate,
            precision=rule.precision,
            max_length=None if state.thresholds.curves is None else fitted,
        )
    else:
        raise ThresholdsError(
            "the model was made from thresholds, without a calibration: retarget it with "
            "Thresholds, from Calibration.thresholds(target)"
        )
    _check_fits(solved, state)
    return solved


def _check_fits(solved: Thresholds, state: State) -> None:
    new, old = Rule.of(solved, dense_if_faster=state.rule.dense_if_faster), state.rule
    if new != old:
        raise ThresholdsError(
            f"these thresholds are for {new}, the compiled graphs have {old}: use apply, which "
            "compiles again"
        )
    if solved.values.keys() != state.thresholds.values.keys():
        raise ThresholdsError("these thresholds are for other sites than the model's: use apply")
    for name, values in solved.values.items():
        held = state.buffers(name)
        if held is not None and held[0].shape[1] < values.shape[1]:
            raise ThresholdsError(
                f"{name}: {values.shape[1]} columns of thresholds do not fit the {held[0].shape[1]}"
                " of the compiled graphs: use apply, which compiles again"
            )
