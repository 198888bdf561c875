"""The tensors of attention that is written out, brought into the operator's layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bsfa_compile.passes import products
from bsfa_compile.passes.masks import Mask
from bsfa_compile.passes.nodes import op_name, positions, same, tensor, writers
from bsfa_compile.passes.products import Product, arranged, product, view

CASTS = ("to", "_to_copy", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous")
SHAPES = ("view", "reshape", "flatten", "unflatten", "unsafe_view")
aten = torch.ops.aten


@dataclass(kw_only=True)
class Written:
    """What was found: the last product's node `out`, q, k, v as [B, H, L, D], and what happens.

    softcap None: none. sinks [H]: one more logit per head in each row's denominator. reason: why
    it cannot be taken over.
    """

    out: fx.Node
    q: fx.Node | None = None
    k: fx.Node | None = None
    v: fx.Node | None = None
    scale: float = 1.0
    softcap: float | None = None
    sinks: fx.Node | None = None
    masks: list[Mask] = field(default_factory=list)
    reason: str | None = None


class Refused(Exception):
    """The reason why attention written out stays dense."""


def arrange(found: Written, scores: Product, weights_node: fx.Node, heads_seen: list[Any]) -> None:
    """Set q, k, v and the output of `found`, as [B, H, L, D].

    weights_node: what comes out of the softmax and into the last product. heads_seen: sizes of
    axis 1 wherever scores have four axes. Raises Refused.
    """
    last = product(found.out)
    if last is None or last.bias is not None or last.factor != 1.0:
        raise Refused(f"with {op_name(found.out)!r}")
    axes = products.of_scores(scores)
    if axes is None:
        raise Refused(f"with {op_name(scores.node)!r}, whose axes are not understood")
    weights, values = (last.left_axes, last.right_axes), (last.right, last.left)
    if last.left is not weights_node:
        weights, values = weights[::-1], values[::-1]
    (mine, theirs), v = weights, values[0]
    batch, key, inner = mine[:-2], mine[-1], set(theirs) - set(mine)
    fits = len(inner) == 1 and len(batch) in (1, 2) and set(theirs) == {*batch, key, *inner}
    d = "".join(inner)
    if not fits or set(last.axes) != {*batch, mine[-2], d} or v is weights_node:
        raise Refused(f"with {op_name(found.out)!r}, whose axes are not understood")
    for one in (scores, last):
        ranked = one.axes if one is scores else mine
        fake = tensor(one.node) if one is scores else tensor(weights_node)
        if len(ranked) == 4 and fake is not None:
            heads_seen.append(fake.shape[1])
    at, out = positions(found.out.graph), found.out
    left = frozenset(scores.left_axes)
    sides = [(scores.left, scores.left_axes), (scores.right, scores.right_axes)]
    if left != frozenset(axes[0] + axes[1]):
        sides.reverse()
    for node, _ in sides:
        if any(at[scores.node] < at[w] < at[out] for w in writers(node)):
            raise Refused("and its inputs are overwritten meanwhile")
    heads = _heads(sides[0][0], heads_seen)
    q, k = (
        arranged(node, given, axes[0] + wanted, scores.node)
        for (node, given), wanted in zip(sides, axes[1:], strict=True)
    )
    found.q, found.k = (_split(node, heads, scores.node) for node in (q, k))
    found.v = _split(arranged(v, theirs, batch + key + d, out), heads, out)
    found.out = _normal_output(out, last.axes, batch + mine[-2] + d, heads)


def _heads(q: fx.Node, seen: list[Any]) -> int:
    """How many heads a first axis of [B * H] is made of; 1 if nothing tells."""
    source = q
    while source.op in ("call_function", "call_method") and source.args:
        fake, before = tensor(source), tensor(source.args[0])
        if not seen and fake is not None and before is not None:
            last = before.dim() == 4 and fake.dim() == 3 and op_name(source) in SHAPES
            last = last and not _heads_first(source.args[0])
            if last and all(same(before.shape[i], fake.shape[i]) for i in (-1, -2)):
                seen.append(before.shape[1])
        inputs = source.all_input_nodes
        if op_name(source) not in (*CASTS, *SHAPES) or not inputs:
            break
        source = inputs[0]
    if len({str(h) for h in seen}) > 1 or not all(type(h) is int for h in seen):
        raise Refused("with heads that are not told apart")
    return int(seen[0]) if seen else 1


def _heads_first(node: object) -> bool:
    """Whether a node is [H, B, L, D]: of the first two axes, the first was behind the second."""
    while isinstance(node, fx.Node) and op_name(node) in (*CASTS, "clone"):
        node = node.args[0]
    if not isinstance(node, fx.Node) or op_name(node) != "permute":
        return False
    given: Any = node.args[1:]
    order = given[0] if isinstance(given[0], (list, tuple)) else given
    return bool(order[0] > order[1])


def _split(node: fx.Node, heads: int, at: fx.Node) -> fx.Node:
    """[B * H, L, D] -> [B, H, L, D]."""
    fake = tensor(node)
    if fake is None or fake.dim() == 4:
        return node
    with at.graph.inserting_before(at):
        return view(aten.unflatten.int, node, 0, (-1, heads))


def _normal_output(out: fx.Node, axes: str, wanted: str, heads: int) -> fx.Node:
    """A view [B, H, Lq, Dv] of the last product that all its readers now read, through another."""
    if axes == wanted and len(axes) == 4:
        return out
    readers = list(out.users)
    with out.graph.inserting_after(out):
        normal = out if axes == wanted else view(aten.permute.default, out, _order(axes, wanted))
    if len(axes) == 3:
        with out.graph.inserting_after(normal):
            normal = view(aten.unflatten.int, normal, 0, (-1, heads))
    back = normal
    if len(axes) == 3:
        with out.graph.inserting_after(normal):
            back = view(aten.flatten.using_ints, normal, 0, 1)
    if axes != wanted:
        with out.graph.inserting_after(back):
            back = view(aten.permute.default, back, _order(wanted, axes))
    for reader in readers:
        reader.replace_input_with(out, back)
    normal.meta |= {k: v for k, v in out.meta.items() if k not in ("example_value", "val")}
    return normal


def _order(axes: str, wanted: str) -> list[int]:
    return [axes.index(letter) for letter in wanted]
