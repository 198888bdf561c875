"""Attention that tracing did not show, found by running a model once without it.

Dynamo leaves out code under torch.compiler.disable and code that it cannot trace at all; what
attends there would be missing from the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

from bsfa_compile.passes.fused import MULTI_HEAD
from bsfa_compile.passes.sites import SDPA
from bsfa_compile.state import site_name

OUTSIDE = "its code is never traced: torch.compiler.disable, or code that Dynamo cannot trace"


class _Calls(TorchFunctionMode):
    """Notes the sites that attend, by the module whose forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[list[Any]] = []  # [name, attention calls so far], innermost last
        self.sites: dict[str, None] = {}

    def enter(self, name: str, *_: object) -> None:
        """A module's forward begins."""
        self.running.append([name, 0])

    def leave(self, *_: object) -> None:
        """The innermost module's forward ends."""
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func in SDPA or func is MULTI_HEAD) and self.running:
            name, calls = self.running[-1]
            self.sites[site_name(name, calls)] = None
            self.running[-1][1] += 1
        return func(*args, **(kwargs or {}))


def attending(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """Names of the sites that call SDPA in a forward pass, in the order of execution."""
    calls = _Calls()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(partial(calls.enter, name))
            leave = module.register_forward_hook(calls.leave, always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(calls)
        model(*args, **kwargs)
    return list(calls.sites)


@contextmanager
def breaks() -> Iterator[list[str]]:
    """Why graphs broke inside: empty until it is left, and if everything was traced."""
    found: list[str] = []
    before = counters["graph_break"].copy()
    yield found
    found += (counters["graph_break"] - before).keys()
