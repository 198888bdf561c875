"""Key and value heads that a model repeats for grouped queries: find them before the copy."""

from __future__ import annotations

from torch import fx

from bsfa_compile.passes.nodes import op_name, positions, same, tensor, writers


def unrepeated(node: fx.Node, site: fx.Node) -> fx.Node:
    """The tensor [B, Hkv, L, D] that `node` [B, H, L, D] repeats head by head, else `node`.

    Understands expand-and-reshape and repeat_interleave. Only if the source still holds the same
    numbers when the attention node `site` runs.
    """
    source = _source(node)
    if source is None:
        return node
    at = positions(site.graph)
    if any(at[node] <= at[w] < at[site] for w in writers(source)):
        return node
    return source


def _source(node: fx.Node) -> fx.Node | None:
    result = tensor(node)
    if result is None or result.dim() != 4 or node.op not in ("call_function", "call_method"):
        return None
    if op_name(node) == "repeat_interleave":
        return _interleaved(node)
    folded = _skip_copies(node)
    if folded is None or op_name(folded) not in ("reshape", "view", "flatten", "unsafe_view"):
        return None
    expanded = _skip_copies(folded.args[0])
    if expanded is None or op_name(expanded) != "expand":
        return None
    inserted = expanded.args[0]
    if not isinstance(inserted, fx.Node) or not _inserts_axis(inserted):
        return None
    source = inserted.args[0]
    base, wide, one = tensor(source), tensor(expanded), tensor(inserted)
    if base is None or wide is None or one is None or not isinstance(source, fx.Node):
        return None
    batch, heads, length, width = base.shape
    if wide.dim() != 5 or result.dtype != base.dtype:
        return None
    times = wide.shape[2]
    fits = _shape_is(one, (batch, heads, 1, length, width))
    fits = fits and _shape_is(wide, (batch, heads, times, length, width))
    return source if fits and _shape_is(result, (batch, heads * times, length, width)) else None


def _interleaved(node: fx.Node) -> fx.Node | None:
    """repeat_interleave(x, n, dim=1)."""
    source, result = node.args[0], tensor(node)
    times = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    base = tensor(source)
    if base is None or result is None or not isinstance(times, int) or dim not in (1, -3):
        return None
    batch, heads, length, width = base.shape
    fits = _shape_is(result, (batch, heads * times, length, width))
    return source if fits and isinstance(source, fx.Node) else None


def _skip_copies(node: object) -> fx.Node | None:
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        if op_name(node) not in ("clone", "contiguous"):
            return node
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _inserts_axis(node: fx.Node) -> bool:
    """Whether the node only adds axes of size 1, by what it is called (shapes tell the rest)."""
    base = tensor(node.args[0]) if node.args else None
    if node.op not in ("call_function", "call_method") or base is None or base.dim() != 4:
        return False
    if op_name(node) == "getitem":
        picks = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(p is None or p is Ellipsis or p == slice(None) for p in picks)
    return op_name(node) in ("unsqueeze", "view", "reshape")


def _shape_is(found: object, wanted: tuple[object, ...]) -> bool:
    shape = getattr(found, "shape", ())
    return len(shape) == len(wanted) and all(same(a, b) for a, b in zip(shape, wanted, strict=True))
