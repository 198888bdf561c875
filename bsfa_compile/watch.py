"""The Dynamo backend of calibration: graphs run as they are, and their attention is observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from bsfa_compile.calibrate.observer import Observer
from bsfa_compile.install import UNSEEN, Retrace, mark_of, module_id, name_of
from bsfa_compile.passes.attach import announcer, attach, erase, markers, names
from bsfa_compile.passes.claims import of_inputs
from bsfa_compile.passes.rewrite import Rule, instrument
from bsfa_compile.passes.sites import Site, find
from bsfa_compile.state import site_name


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

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
        marks = markers(gm)
        chosen: dict[Site, fx.Node] = {}
        found = find(gm, of_inputs(gm, example_inputs))
        if self._attach([s for s in found if s.reason is None and mark_of(marks, s) is None]):
            raise Retrace
        for site in found:
            mark = mark_of(marks, site)
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
            handles = self.observer.open([site_name(name, n) for n in new])
            kept |= {names("observer", n): handles[site_name(name, n)] for n in new}
            attach(module, kept, announcer(tuple((buffer, buffer) for buffer in kept)))
            self._calls[i] = calls
        return bool(grown)
