"""The torch.compile backend "bsfa": rewrites each Dynamo graph, then hands it to inductor.

torch.compile(model, backend="bsfa", options={"thresholds": Thresholds or path})
"""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from torch._dynamo.backends import registry
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis

from bsfa_compile.calibrate.observer import Observer
from bsfa_compile.calibrate.thresholds import Thresholds, check
from bsfa_compile.errors import InputError
from bsfa_compile.passes.attach import (
    announcer,
    attach,
    attached,
    device_of,
    erase,
    markers,
    names,
    to_bits,
)
from bsfa_compile.passes.rewrite import Buffers, Rule, instrument, rewrite
from bsfa_compile.passes.sites import Site, find
from bsfa_compile.state import (
    Seen,
    State,
    forget,
    known_modules,
    ran_eager,
    remember,
    site_name,
    split_name,
    state_of,
)

# The name "bsfa" for torch.compile, also where the package is on the path but not installed. As
# what installing it would add, so that torch loads it by name once either way.
registry._BACKENDS.setdefault(
    "bsfa", EntryPoint("bsfa", "bsfa_compile.backend:bsfa", "torch_dynamo_backends")
)
UNSEEN = (
    "a graph break separates the call of its module from its attention, so its thresholds do not "
    "reach the graph"
)
UNCALIBRATED = "it has no thresholds: calibration never reached it as a supported site"
Compiled = Callable[..., Any]


class Retrace(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """Tells Dynamo to trace the frame again, now that modules announce their buffers.

    Dynamo lets the first base pass through the backend call and forgets its speculations for the
    second, as it must: the hooks change the path that is traced.
    """


def module_id(site: Site) -> int | None:
    """id() of the site's module: Dynamo's stack keys are ids, "@n" appended for repeated calls."""
    digits = site.module.partition("@")[0]
    return int(digits) if digits.isdigit() else None


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
        for site in find(gm):
            mark = _mark(marks, site)
            name = name_of(site, state.names, mark is not None)
            reason = site.reason
            if reason is None and name not in state.thresholds.values:
                reason = UNSEEN if site.module == "" else UNCALIBRATED
            elif reason is None and mark is None:
                reason = UNSEEN
            found.append((name, reason))
            if reason is None and mark is not None:
                thresholds, counters = mark.all_input_nodes
                counted = site.node.graph is gm.graph
                chosen[site] = Buffers(
                    thresholds=thresholds, counters=counters if counted else None
                )
        state.record(found)
        if marks and not found:
            state.warn_eager("an attention module")
        rewrite(chosen, state.rule)
        erase(gm, list(marks.values()))
        return self.inner(gm, example_inputs)


class Watcher:
    """A Dynamo backend for calibration: runs graphs as they are and observes their attention.

    modules: the model's modules by id; a module whose attention is met for the first time gets a
    handle, and so do all modules of its class, which may share its graph; then Dynamo traces anew.
    """

    def __init__(self, model: nn.Module, observer: Observer, rule: Rule) -> None:
        self.observer, self.rule = observer, rule
        self.modules = {id(m): (name, m) for name, m in model.named_modules()}
        self.names = {number: name for number, (name, _) in self.modules.items()}
        self.root = id(model)
        self.sparse: set[str] = set()
        self.dense: dict[str, str] = {}
        self._calls: dict[int, int] = {}
        self._default = device_of(model, torch.device("cpu"))

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Compiled:
        marks = markers(gm)
        chosen: dict[Site, fx.Node] = {}
        found = find(gm)
        if self._attach([s for s in found if s.reason is None and _mark(marks, s) is None]):
            raise Retrace
        for site in found:
            mark = _mark(marks, site)
            name = name_of(site, self.names, mark is not None)
            if site.reason is None and mark is not None:
                (chosen[site],) = mark.all_input_nodes
                self.sparse.add(name)
            else:
                self.dense.setdefault(name, site.reason or UNSEEN)
        instrument(chosen, self.rule)
        erase(gm, list(marks.values()))
        return gm.forward

    def _attach(self, sites: Sequence[Site]) -> bool:
        """Give handles to the modules of unmarked sites; whether that was new."""
        wanted: dict[int, int] = {}
        for site in sites:
            number = self.root if site.module == "" else module_id(site)
            if number in self.modules:
                kind = type(self.modules[number][1])
                same = [i for i, (_, m) in self.modules.items() if type(m) is kind]
                for i in [number] if number == self.root else same:
                    wanted[i] = max(wanted.get(i, 0), site.ordinal + 1)
        grown = {i: wanted[i] for i in self.modules if wanted.get(i, 0) > self._calls.get(i, 0)}
        for i, calls in grown.items():
            name, module = self.modules[i]
            old = range(self._calls.get(i, 0))
            kept = {names("observer", n): getattr(module, names("observer", n)) for n in old}
            new = [n for n in range(calls) if n not in old]
            handles = self.observer.open(
                [site_name(name, n) for n in new], device=device_of(module, self._default)
            )
            kept |= {names("observer", n): handles[site_name(name, n)] for n in new}
            attach(module, kept, announcer(tuple((buffer, buffer) for buffer in kept)))
            self._calls[i] = calls
        return bool(grown)


def _mark(marks: Mapping[tuple[fx.Graph, str, int], fx.Node], site: Site) -> fx.Node | None:
    return marks.get((site.node.graph, site.module, site.ordinal))


def name_of(site: Site, known: Mapping[int, str], marked: bool) -> str:
    """The site's name in the model's words, else in the graph's.

    Attention outside any module of the graph is in the model's own forward if it is marked, and
    in the forward of some module that the graph does not tell if not.
    """
    number = module_id(site)
    if number is not None and number in known:
        return site_name(known[number], site.ordinal)
    if site.module == "" and not marked:
        return site.node.name
    return site_name(site.path, site.ordinal)


@torch.inference_mode(mode=False)
def install(model: nn.Module, state: State) -> None:
    """Put thresholds, counters and the announcing hook on the modules of a model."""
    modules = dict(model.named_modules())
    columns = max([v.shape[1] for v in state.thresholds.values.values()], default=1)
    if state.calibration is not None:
        sites = state.calibration.sites.values()
        columns = max([columns, *(len(site.reached) for site in sites)])
    by_module: dict[str, list[int]] = {}
    for name in state.thresholds.values:
        module_name, ordinal = split_name(name)
        by_module.setdefault(module_name, []).append(ordinal)
    default = device_of(model, torch.device("cpu"))
    state.names = {id(m): name for name, m in modules.items()}
    for module_name, ordinals in by_module.items():
        module = modules[module_name]
        device, buffers = device_of(module, default), {}
        for n in range(max(ordinals) + 1):
            name = site_name(module_name, n)
            values = state.thresholds.values.get(name)
            if values is None:
                values = torch.full((1, 1), -torch.inf)
            thresholds, counters = names("thresholds", n), names("counters", n)
            buffers[thresholds] = to_bits(values, columns, device)
            buffers[counters] = torch.zeros(len(values), 2, dtype=torch.int64, device=device)
            if name in state.thresholds.values:
                state.homes[name] = (weakref.ref(module), thresholds, counters)
                state.sites.setdefault(name, Seen())
        pairs = tuple(
            (names("thresholds", n), names("counters", n)) for n in range(max(ordinals) + 1)
        )
        attach(module, buffers, announcer(pairs, ran_eager))
    remember(model, state)


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
    for site in find(gm):
        module = None if site.reason else _module(module_id(site))
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
    known = known_modules()
    if number is None or number in known:
        return known.get(number or 0)
    return next((m for m in _modules_in_memory() if id(m) == number), None)


def _modules_in_memory() -> Iterator[nn.Module]:
    return (m for m in gc.get_objects() if issubclass(type(m), nn.Module))


def _root(module: nn.Module, thresholds: Thresholds) -> nn.Module | None:
    """The smallest module in memory that has all the sites of the thresholds, `module` one."""
    paths = {split_name(name)[0] for name in thresholds.values}
    candidates = []
    for root in _modules_in_memory():
        inside = {name: m for name, m in root.named_modules() if name in paths}
        if len(inside) == len(paths) and any(m is module for m in inside.values()):
            candidates.append((sum(1 for _ in root.modules()), id(root), root))
    return min(candidates)[2] if candidates else None
