"""Graphs the user traced: torch.fx.GraphModule (in place) and ExportedProgram (a new one).

Thresholds and counters are buffers of the graph module, or lifted buffers in the exported
program's signature, so an optimized program saves, loads and runs like any other.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from bsfa_compile.calibrate.data import device_of
from bsfa_compile.calibrate.observer import Observer
from bsfa_compile.errors import BsfaError
from bsfa_compile.ops import library
from bsfa_compile.ops.held import Band, Claim, encoded, held
from bsfa_compile.passes.attach import names, to_bits
from bsfa_compile.passes.claims import kept, of_buffers
from bsfa_compile.passes.emit import Emitter
from bsfa_compile.passes.lengths import Span, span_of
from bsfa_compile.passes.rewrite import Buffers, Rule, instrument, rewrite
from bsfa_compile.passes.shapes import annotate
from bsfa_compile.passes.sites import Site, find
from bsfa_compile.state import (
    Seen,
    State,
    forget,
    remember,
    site_name,
    state_of,
)

Traced = fx.GraphModule | ExportedProgram


def name_of(site: Site) -> str:
    """The site's name: its module's path, or the node's name if the graph knows no modules."""
    return site_name(site.path, site.ordinal) if site.path else site.node.name


def _copied(gm: fx.GraphModule, source: fx.Graph) -> fx.GraphModule:
    """The module with a copy of a graph; parameters and buffers are shared."""
    graph = fx.Graph()
    output = graph.graph_copy(source, {})
    graph.output(output)
    graph._codegen = copy.deepcopy(source._codegen)
    return fx.GraphModule(gm, graph)


def untouched(model: Traced) -> Traced:
    """The program as it was before it was optimized: a graph module in a copy of its own."""
    state = state_of(model)
    if isinstance(model, ExportedProgram):
        program = model if state is None else state.previous
        assert isinstance(program, ExportedProgram), "set when it was optimized"
        return program
    graph = model.graph if state is None else state.previous
    assert isinstance(graph, fx.Graph), "set when it was optimized"
    return _copied(model, graph)


@contextmanager
def watching(
    model: Traced, observer: Observer, rule: Rule, sample: tuple[tuple[Any, ...], dict[str, Any]]
) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """A copy of the program whose attention is observed, and the sites left out, with reasons."""
    original = untouched(model)
    if isinstance(original, ExportedProgram):
        gm = original.module()
        assert isinstance(gm, fx.GraphModule), "the module of an exported program"
    else:
        gm = original
        annotate(gm, sample)
    sites = find(gm, of_buffers(gm))
    good = [s for s in sites if s.reason is None and s.node.graph is gm.graph]
    handles = observer.open([name_of(s) for s in good])
    chosen = {}
    for i, site in enumerate(good):
        gm.register_buffer(names("observer", i), handles[name_of(site)], persistent=False)
        with gm.graph.inserting_before(site.node):
            chosen[site] = _attribute(gm, names("observer", i))
    instrument(chosen, rule)
    gm.recompile()
    dense = {name_of(s): s.reason or _NESTED for s in sites if s not in good}
    with torch.no_grad():
        yield gm, dense


_NESTED = "it is inside a sub-graph of a higher-order operator"


def _attribute(gm: fx.GraphModule, name: str) -> fx.Node:
    node = gm.graph.get_attr(name)
    example = next(iter(gm.graph.nodes)).meta.get("val")
    mode = example.fake_mode if isinstance(example, FakeTensor) else None
    buffer = gm.get_buffer(name)
    if mode is not None:
        node.meta["val"] = mode.from_tensor(buffer, static_shapes=True)
    return node


@torch.inference_mode(mode=False)
def apply(
    model: Traced, state: State, sample: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> Traced:
    """Rewrite a graph module in place, or make a new exported program."""
    if isinstance(model, ExportedProgram):
        return _apply_exported(model, state)
    state.previous = model.graph
    gm = _copied(model, model.graph)
    if sample is not None:
        annotate(gm, sample)
    device = device_of(model, torch.device("cpu"))

    def place(i: int, site: Site, values: Mapping[str, Tensor]) -> tuple[fx.Node, fx.Node]:
        nodes = []
        for kind, value in values.items():
            for module in (model, gm):
                module.register_buffer(names(kind, i), value, persistent=False)
            with gm.graph.inserting_before(site.node):
                nodes.append(_attribute(gm, names(kind, i)))
        return nodes[0], nodes[1]

    for i, name in enumerate(_rewrite(gm, state, device, place, of_buffers(gm))):
        state.homes[name] = (weakref.ref(model), names("thresholds", i), names("counters", i))
    for node in gm.graph.nodes:
        if sample is not None:
            node.meta.pop("val", None)
    model.graph = gm.graph
    model.recompile()
    remember(model, state)
    return model


def _rewrite(
    gm: fx.GraphModule,
    state: State,
    device: torch.device,
    place: Any,
    claims: Mapping[fx.Node, Claim],
) -> list[str]:
    """Rewrite the sites that have thresholds; their names, in the order of their buffers."""
    chosen: dict[Site, Buffers] = {}
    found = []
    emitter, spans = Emitter(gm.graph), set[Span]()
    for site in find(gm, claims):
        name = name_of(site)
        values = state.thresholds.values.get(name)
        reason = site.reason or state.unfit(name, site.heads)
        if reason is None and site.node.graph is not gm.graph:
            reason = _NESTED
        found.append((name, reason))
        if reason is None and values is not None:
            buffers = {
                "thresholds": to_bits(values, state.columns, device),
                "counters": torch.zeros(len(values), 2, dtype=torch.int64, device=device),
            }
            thresholds, counters = place(len(chosen), site, buffers)
            if span_of(site) not in spans:
                spans.add(span_of(site))
                thresholds = _told(emitter, site, thresholds)
            for node, claim in site.meaning.premises if site.meaning is not None else ():
                assert isinstance(claim, Band), "only buffers are assumed to be something"
                with gm.graph.inserting_before(site.node):
                    thresholds = emitter.call(held, thresholds, node, encoded(claim))
            chosen[site] = Buffers(thresholds=thresholds, counters=counters)
    state.sites = {name: Seen() for name in state.thresholds.values}
    state.record(found)
    rewrite(chosen, state.rule)
    return [name_of(site) for site in chosen]


def _told(emitter: Emitter, site: Site, thresholds: fx.Node) -> fx.Node:
    """The thresholds, after telling the state how long the inputs are."""
    meaning, q, k = site.meaning, site.q, site.k
    assert meaning is not None and q is not None and k is not None, "the site is understood"
    span = emitter.span(meaning, site.node, q, k)
    with site.node.graph.inserting_before(site.node):
        return emitter.call(library.met, thresholds, *span, meaning.is_causal, meaning.window)


def _apply_exported(program: ExportedProgram, state: State) -> ExportedProgram:
    gm = copy.deepcopy(program.graph_module)
    signature = copy.deepcopy(program.graph_signature)
    tensors = dict(program.state_dict)
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    lifted = [spec.kind in _LIFTED for spec in signature.input_specs]
    holders = [node for node in gm.graph.nodes if node.op == "placeholder"]

    def place(i: int, site: Site, values: Mapping[str, Tensor]) -> tuple[fx.Node, fx.Node]:
        nodes = []
        for kind, value in values.items():
            at = sum(lifted)
            before = (
                holders[at]
                if at < len(holders)
                else next(node for node in gm.graph.nodes if node.op != "placeholder")
            )
            with gm.graph.inserting_before(before):
                node = gm.graph.placeholder(f"b_{names(kind, i)}")
            node.meta["val"] = _mode_of(site.node).from_tensor(value, static_shapes=True)
            holders.insert(at, node)
            lifted.insert(at, True)
            signature.input_specs.insert(
                at,
                InputSpec(
                    kind=InputKind.BUFFER,
                    arg=TensorArgument(name=node.name),
                    target=names(kind, i),
                    persistent=True,
                ),
            )
            tensors[names(kind, i)] = value
            nodes.append(node)
        return nodes[0], nodes[1]

    kept_now = {**program.constants, **program.state_dict}
    written = set(signature.buffers_to_mutate.values())
    claims = {
        node: claim
        for node, spec in zip(holders, signature.input_specs, strict=True)
        if spec.kind is InputKind.BUFFER and spec.target not in written
        if (claim := kept(kept_now.get(str(spec.target)))) is not None
    }
    placed = _rewrite(gm, state, device, place, claims)
    for spec, node in zip(signature.output_specs, gm.graph.output_node().args[0], strict=True):
        if isinstance(spec.arg, TensorArgument):  # it may be an attention that was replaced
            spec.arg = TensorArgument(name=node.name)
    gm.recompile()
    made = program._update(gm, signature, state_dict=tensors)
    state.previous = program
    for i, name in enumerate(placed):
        state.homes[name] = (weakref.ref(made), names("thresholds", i), names("counters", i))
    remember(made, state)
    return made


_LIFTED = (InputKind.PARAMETER, InputKind.BUFFER)


def _mode_of(node: fx.Node) -> FakeTensorMode:
    value = node.meta["val"]
    assert isinstance(value, FakeTensor), "exported nodes carry fake tensors"
    return value.fake_mode


def undo(model: Traced, state: State | None) -> Traced:
    """The program as it was: a graph module in place, an exported program the original."""
    if state is None:
        if isinstance(model, ExportedProgram) and any("bsfa_" in name for name in model.state_dict):
            raise BsfaError(
                "this exported program was optimized in another process, which kept the original: "
                "load the original program instead"
            )
        return model
    forget(model)
    if isinstance(model, ExportedProgram):
        assert isinstance(state.previous, ExportedProgram), "set when it was optimized"
        return state.previous
    for name in [n for n in model._buffers if n.startswith("bsfa_")]:
        delattr(model, name)
    assert isinstance(state.previous, fx.Graph), "set when it was optimized"
    model.graph = state.previous
    model.recompile()
    return model
