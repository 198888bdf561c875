"""Run a model dense, and then under one set of thresholds after another, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from bsfa_compile import modules, traced
from bsfa_compile.calibrate.data import Call, device_of, move
from bsfa_compile.calibrate.thresholds import Thresholds
from bsfa_compile.passes.rewrite import Rule
from bsfa_compile.retarget import write
from bsfa_compile.state import State

Model = nn.Module | fx.GraphModule | ExportedProgram


class Trial:
    """A model on trial; made by `trying`. The rule is followed also where dense is faster."""

    def __init__(self, model: Model, stack: ExitStack) -> None:
        self._stack = stack
        self._state: State | None = None
        self._original: traced.Traced | None = None
        self._made: traced.Traced | None = None  # kept alive: its state only refers to it
        if isinstance(model, ExportedProgram):
            self._original = original = traced.untouched(model)
            assert isinstance(original, ExportedProgram), "of the same kind"
            self._dense: nn.Module = original.module()
        elif isinstance(model, fx.GraphModule):
            self._original = copy = traced.untouched(model)
            assert isinstance(copy, fx.GraphModule), "of the same kind"
            self._dense = copy
        else:
            self._dense = model
        self._program = self._dense

    @property
    def forward(self) -> Any:
        """The model's forward, for its signature."""
        return self._dense.forward

    def run(self, call: Call) -> Any:
        """The output of the model, dense until the first `set`."""
        args, kwargs = move(call, device_of(self._dense))
        with torch.no_grad():
            return self._program(*args, **kwargs)

    def set(self, thresholds: Thresholds, example: Call) -> None:
        """Follow these thresholds from here on; counters start at zero."""
        if self._state is None:
            self._state = self._install(thresholds, example)
        else:
            write(self._state, thresholds)

    def skipped(self) -> float:
        """Fraction of the candidate tiles that the runs since the last `set` skipped."""
        assert self._state is not None, "thresholds are set"
        held = [self._state.buffers(name) for name in self._state.homes]
        counts = [pair[1].sum(dim=0).cpu() for pair in held if pair is not None]
        dropped, tiles = torch.stack(counts).sum(dim=0).tolist() if counts else (0, 0)
        return dropped / tiles if tiles else 0.0

    def _install(self, thresholds: Thresholds, example: Call) -> State:
        rule = Rule.of(thresholds, dense_if_faster=False)
        # What is tried is judged on these inputs, however long.
        state = State(thresholds=thresholds, rule=rule, beyond=True)
        if self._original is None:
            self._stack.enter_context(modules.trying(self._dense, state))
        else:
            moved = move(example, device_of(self._dense))
            self._made = made = traced.apply(self._original, state, moved)
            self._program = made.module() if isinstance(made, ExportedProgram) else made
        return state


@contextmanager
def trying(model: Model) -> Iterator[Trial]:
    """Inside, the model is on trial; afterwards it is as it was, also if something was raised."""
    with ExitStack() as stack:
        if not isinstance(model, traced.Traced):
            stack.enter_context(modules.borrowed(modules.plain(model)))
        yield Trial(model, stack)


def dense_values(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Thresholds that drop nothing, in the shapes of others."""
    return {name: torch.full_like(value, -torch.inf) for name, value in values.items()}
