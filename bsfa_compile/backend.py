"""The torch.compile backend "bsfa": rewrites each Dynamo graph, then hands it to inductor.

torch.compile(model, backend="bsfa", options={"thresholds": Thresholds or path})
"""

from __future__ import annotations

import copy
import gc
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from torch._dynamo.backends import registry

from bsfa_compile.calibrate.thresholds import Thresholds, check
from bsfa_compile.errors import InputError
from bsfa_compile.install import UNSEEN, Retrace, install, mark_of, module_id, name_of
from bsfa_compile.ops.held import holds
from bsfa_compile.passes.attach import attached, erase, markers
from bsfa_compile.passes.claims import of_inputs
from bsfa_compile.passes.fused import FAST_PATH
from bsfa_compile.passes.lengths import measure
from bsfa_compile.passes.rewrite import Buffers, Rule, rewrite
from bsfa_compile.passes.sites import Site, find
from bsfa_compile.state import (
    State,
    forget,
    kind,
    known_modules,
    split_name,
    state_of,
)

# The name "bsfa" for torch.compile, also where the package is on the path but not installed. As
# what installing it would add, so that torch loads it by name once either way.
registry._BACKENDS.setdefault(
    "bsfa", EntryPoint("bsfa", "bsfa_compile.backend:bsfa", "torch_dynamo_backends")
)
Compiled = Callable[..., Any]


class Inner:
    """What compiles the rewritten graph: inductor, or a debugging backend of torch."""

    def __init__(
        self,
        name: str = "inductor",
        mode: str | None = None,
        options: Any = None,
        dynamic: Any = None,
    ) -> None:
        if name == "eager":
            self._compile: Callable[..., Compiled] = lambda gm, example_inputs: gm.forward
        elif name == "inductor":
            self._compile = torch._TorchCompileInductorWrapper(mode, options, dynamic)
        elif mode is None and not options:
            self._compile = lookup_backend(name)
        else:
            raise InputError(f"mode and options are inductor's, but the inner backend is {name!r}")

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Compiled:
        return self._compile(gm, example_inputs)


class Rewriter:
    """A Dynamo backend: makes a model's attention block-sparse by its state."""

    def __init__(self, state: State, inner: Inner) -> None:
        self.state, self.inner = state, inner

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Compiled:
        state, marks = self.state, markers(gm)
        chosen: dict[Site, Buffers] = {}
        found: list[tuple[str, str | None]] = []
        for site in find(gm, of_inputs(gm, example_inputs)):
            mark = mark_of(marks, site)
            name = name_of(site, state.names, mark is not None)
            lost = mark is None and (site.module == "" or name in state.thresholds.values)
            reason = site.reason or (UNSEEN if lost else state.unfit(name, site.heads))
            found.append((name, reason))
            if reason is None and mark is not None:
                thresholds, counters = mark.all_input_nodes
                inside = site.node.graph is not gm.graph
                chosen[site] = Buffers(thresholds=thresholds, counters=None if inside else counters)
        state.record(found)
        if marks and not found:
            state.warn_eager("an attention module")
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        premises = {p for site in chosen if site.meaning for p in site.meaning.premises}
        assumed = [(inputs.index(node), claim) for node, claim in premises]
        dense = _dense(gm) if assumed else None
        measured = measure(gm.graph, chosen)
        rewrite(chosen, state.rule)
        erase(gm, list(marks.values()))
        run, kinds = self.inner(gm, example_inputs), Counter(kind(reason) for _, reason in found)
        if not kinds:
            return run

        def counted(*args: Any) -> Any:
            if dense is not None and not all(holds(args[i], claim) for i, claim in assumed):
                state.changed([name for name, reason in found if kind(reason) != "decode"])
                return dense(*args)
            state.calls.update(kinds)
            for tokens, keys in measured(args):
                state.met(tokens, keys)
            return run(*args)

        return counted


def _dense(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is now, without markers, to be run where an assumption fails."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    erase(copied, [mark for (graph, *_), mark in markers(copied).items() if graph is copied.graph])
    return copied


def bsfa(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend "bsfa" of torch.compile: one Dynamo graph -> compiled code.

    options: "thresholds" (Thresholds or the path of saved ones; required), "strict" (bool),
    "dense_if_faster" (bool, default True), "inner" ("inductor", or a debugging backend such as
    "aot_eager"), "mode", and inductor's own options. The modules that the thresholds name are
    found in memory when their attention is first compiled. Raises InputError without thresholds
    and ThresholdsError if they do not fit the model.
    """
    given = dict(options or {})
    thresholds = given.pop("thresholds", None)
    if isinstance(thresholds, str | os.PathLike):
        thresholds = Thresholds.load(thresholds)
    if not isinstance(thresholds, Thresholds):
        raise InputError(
            'backend="bsfa" needs options={"thresholds": Thresholds or a path}, got '
            f"{type(thresholds).__name__}; bsfa_compile.calibrate(model, data).thresholds(target) "
            "makes them"
        )
    rule = Rule.of(thresholds, dense_if_faster=given.pop("dense_if_faster", True))
    fresh = State(thresholds=thresholds, rule=rule, strict=given.pop("strict", False))
    inner = Inner(given.pop("inner", "inductor"), given.pop("mode", mode), given or None)
    state = fresh
    for site in find(gm, of_inputs(gm, example_inputs)):
        module = _module(module_id(site)) if site.reason in (None, FAST_PATH) else None
        if site.reason == FAST_PATH and module is not None and any(map(attached, module.modules())):
            module = None
        known = state_of(module) if module is not None and attached(module) else None
        if known is not None and known.given.equal(thresholds):
            state = known
        elif module is not None and (root := _root(module, thresholds)) is not None:
            check(thresholds, root)
            if known is not None:
                warnings.warn(
                    "the model is compiled with other thresholds than before: they replace "
                    "those everywhere it was compiled",
                    stacklevel=2,
                )
                forget(root)
            install(root, fresh)
            raise Retrace
    return Rewriter(state, inner)(gm, example_inputs)


def _module(number: int | None) -> nn.Module | None:
    """A live module by its id."""
    if number is None:
        return None
    known = known_modules().get(number)
    return known or next((m for m in _modules_in_memory() if id(m) == number), None)


def _modules_in_memory() -> Iterator[nn.Module]:
    found = (m for m in gc.get_objects() if issubclass(type(m), nn.Module))
    return (m for m in found if "_modules" in vars(m))  # the others are being made


def _root(module: nn.Module, thresholds: Thresholds) -> nn.Module | None:
    """The smallest module in memory that has all sites of the thresholds, some in `module`."""
    paths = {split_name(name)[0] for name in thresholds.values}
    candidates, within = [], set(module.modules())
    for root in _modules_in_memory():
        inside = {name: m for name, m in root.named_modules() if name in paths}
        if len(inside) == len(paths) and not within.isdisjoint(inside.values()):
            candidates.append((sum(1 for _ in root.modules()), id(root), root))
    return min(candidates)[2] if candidates else None
