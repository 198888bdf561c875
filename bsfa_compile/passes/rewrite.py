"""Replace understood attention by the block-sparse operator, or watch it for calibration.

    out = scaled_dot_product_attention(q, k_repeated, v_repeated, mask)
becomes, with the thresholds and counters of the site's module as inputs of the graph,
    out, lse, tile_mask, counts = bsfa.attention_v1(q, k, v, thresholds, padding, ...)
    counters.add_(counts)
and while calibrating
    bsfa.observe_v1(q, k, padding, ..., handle)
    out = scaled_dot_product_attention(q, k_repeated, v_repeated, mask)
    bsfa.verify_v1(out, q, k, v, [mask], padding, ..., handle)
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bsfa_compile.calibrate import observer, verify
from bsfa_compile.calibrate.thresholds import Thresholds
from bsfa_compile.ops import library
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q
from bsfa_compile.passes.emit import Emitter
from bsfa_compile.passes.masks import Fill, Mask, Scaled
from bsfa_compile.passes.nodes import erase_dead, op_name, tensor
from bsfa_compile.passes.sites import Site

aten = torch.ops.aten
_REGISTERED = (observer, verify)  # bsfa::observe_v1, bsfa::verify_v1, by being imported


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the operator judges tiles; constants of a compiled graph."""

    gate: str = "relative"
    precision: str = "auto"
    sink_tiles: int = 1
    block_q: int = BLOCK_Q
    block_k: int = BLOCK_K
    dense_if_faster: bool = True

    @classmethod
    def of(cls, thresholds: Thresholds, *, dense_if_faster: bool = True) -> Rule:
        """The rule that thresholds were made for."""
        return cls(
            gate=thresholds.gate,
            precision=thresholds.precision,
            sink_tiles=thresholds.sink_tiles,
            block_q=thresholds.block_q,
            block_k=thresholds.block_k,
            dense_if_faster=dense_if_faster,
        )

    @property
    def arguments(self) -> tuple[str, str, int, int, int, bool]:
        """Its fields as the operator takes them one after another."""
        tiles = self.block_q, self.block_k
        return self.gate, self.precision, self.sink_tiles, *tiles, self.dense_if_faster


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Nodes of a site's state: thresholds as int32 bits of float32 [H, n], counters int64 [H, 2].

    counters None: nothing is counted (inside a higher-order operator, which may not write).
    """

    thresholds: fx.Node
    counters: fx.Node | None


def _by_graph(sites: Sequence[Site]) -> Mapping[fx.Graph, list[Site]]:
    grouped = defaultdict(list)
    for site in sites:
        grouped[site.node.graph].append(site)
    return grouped


def rewrite(sites: Mapping[Site, Buffers], rule: Rule) -> None:
    """Replace the sites, all without a reason to stay dense, in place in their graphs."""
    made: dict[fx.Node, fx.Node] = {}
    for graph, group in _by_graph(list(sites)).items():
        emitter = Emitter(graph)
        dead: list[fx.Node] = []
        for site in group:
            # The queries of one attention may be the output of another.
            dead += [node for node in site.node.all_input_nodes if node not in made]
            made[site.node] = _replace(emitter, site, sites[site], rule, made)
        erase_dead(graph, dead)
        graph.lint()


def instrument(sites: Mapping[Site, fx.Node], rule: Rule) -> None:
    """Let bsfa::observe_v1 and verify_v1 see each site; nodes of handles int64 [2] by site."""
    for graph, group in _by_graph(list(sites)).items():
        emitter = Emitter(graph)
        for site in group:
            q, k, v = _inputs(emitter, site, {})
            mask = _mask(emitter, site)
            with graph.inserting_before(site.node):
                emitter.call(
                    torch.ops.bsfa.observe_v1.default,
                    q,
                    k,
                    *mask,
                    rule.sink_tiles,
                    rule.block_q,
                    rule.block_k,
                    sites[site],
                )
                shown = [_shown(emitter, given) for given in site.masks]
                sinks: list[fx.Node | None] = [*_sinks(emitter, site, q)] or [None]
            with graph.inserting_after(site.node):
                emitter.call(
                    torch.ops.bsfa.verify_v1.default,
                    site.node,
                    q,
                    k,
                    v,
                    shown,
                    *mask,
                    *sinks,
                    sites[site],
                )
        graph.lint()


def _replace(
    emitter: Emitter, site: Site, buffers: Buffers, rule: Rule, made: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """Insert the operator, take the old call out of the graph, return the new output."""
    old, graph = site.node, site.node.graph
    q, k, v = _inputs(emitter, site, made)
    mask = _mask(emitter, site)
    with graph.inserting_before(old):
        thresholds = emitter.call(aten.view.dtype, buffers.thresholds, torch.float32)
        call = emitter.call(
            library.attention,
            q,
            k,
            v,
            thresholds,
            *mask,
            *rule.arguments,
            *_sinks(emitter, site, q),
        )
        out = emitter.call(operator.getitem, call, 0)
        if buffers.counters is not None:
            counts = emitter.call(operator.getitem, call, 3)
            emitter.call(aten.add_.Tensor, buffers.counters, counts)
        if any(op_name(user) in ("view", "view_as", "as_strided") for user in old.users):
            # The model relies on strides of SDPA that the operator does not have.
            out = emitter.call(aten.clone.default, out, memory_format=torch.contiguous_format)
    told = {key: old.meta[key] for key in old.meta if key not in ("example_value", "val")}
    call.meta |= told
    out.meta |= told
    if "example_value" in old.meta:
        out.meta["example_value"] = old.meta["example_value"]
    old.replace_all_uses_with(out)
    graph.erase_node(old)
    return out


def _inputs(
    emitter: Emitter, site: Site, made: Mapping[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """q, k, v in the dtype of the result: under autocast SDPA casts them itself."""
    result = tensor(site.node)
    cast = []
    for old in (site.q, site.k, site.v):
        assert old is not None, "a site without a reason has q, k and v"
        node, fake = made.get(old, old), tensor(old)
        if fake is not None and result is not None and fake.dtype != result.dtype:
            with site.node.graph.inserting_before(site.node):
                node = emitter.call(aten.to.dtype, node, result.dtype)
        cast.append(node)
    return cast[0], cast[1], cast[2]


def _shown(emitter: Emitter, mask: Mask) -> fx.Node:
    """A mask as a tensor, bool (True shows) or additive."""
    if isinstance(mask, Scaled):
        return _shown(emitter, mask.mask)
    if isinstance(mask, Fill):
        condition = mask.condition
        return condition if mask.shows else emitter.call(aten.logical_not.default, condition)
    return mask


def _sinks(emitter: Emitter, site: Site, q: fx.Node) -> list[fx.Node]:
    """The sinks [H] as the operator's last argument, in the dtype of its sums; none if none."""
    queries = tensor(q) if tensor(q) is not None else tensor(site.q)
    if site.sinks is None or queries is None:
        return []
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    with site.node.graph.inserting_before(site.node):
        return [emitter.call(aten.to.dtype, site.sinks, wide)]


def _mask(emitter: Emitter, site: Site) -> Sequence[object]:
    """key_padding_mask, q_start_tensor, q_start, is_causal, window, softcap, scale."""
    meaning, q, k = site.meaning, site.q, site.k
    assert meaning is not None and q is not None and k is not None, "the site is understood"
    padding = emitter.key_padding(meaning, site.node, q, k)
    start, start_tensor = emitter.query_start(meaning, site.node)
    causal, window = meaning.is_causal, meaning.window
    return padding, start_tensor, start, causal, window, site.softcap, site.scale
