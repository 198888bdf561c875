"""Matrix products by whatever name (matmul, bmm, baddbmm, einsum), with a letter for each axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bsfa_compile.passes.nodes import op_name, plain_name, tensor

NAMES = ("matmul", "bmm", "baddbmm", "einsum")
aten = torch.ops.aten
_MATRICES = {3: ("aij", "ajk", "aik"), 4: ("abij", "abjk", "abik")}


@dataclass(frozen=True, kw_only=True)
class Product:
    """factor * left x right + bias, summed over the one letter that is in both and not in `axes`.

    left_axes, right_axes, axes: a letter for each axis of left, right and the result.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    axes: str
    factor: float = 1.0
    bias: fx.Node | None = None


def product(node: fx.Node) -> Product | None:
    """What a node multiplies; None if it is not two factors of batched matrices."""
    name = plain_name(node)
    if len(node.args) < 2:
        return None
    first, *rest = node.args
    bias, factor = None, 1.0
    if name == "einsum":
        factors = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        parsed = _einsum(first, factors)
        if parsed is None:
            return None
        (left, right), letters = factors, parsed
    else:
        if name == "baddbmm":
            beta, alpha = (node.kwargs.get(key, 1) for key in ("beta", "alpha"))
            if beta not in (0, 1) or not isinstance(alpha, int | float):
                return None
            bias = first if beta == 1 and isinstance(first, fx.Node) else None
            first, *rest = rest
            factor = float(alpha)
        if len(rest) != 1 or tensor(first) is None or tensor(rest[0]) is None:
            return None
        left, right = first, rest[0]
        ranks = {t.dim() for t in (tensor(left), tensor(right)) if t is not None}
        if len(ranks) > 1 or not ranks <= _MATRICES.keys():
            return None
        letters = _MATRICES[ranks.pop()]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    return Product(
        node=node,
        left=left,
        right=right,
        left_axes=letters[0],
        right_axes=letters[1],
        axes=letters[2],
        factor=factor,
        bias=bias,
    )


def _einsum(equation: object, operands: Sequence[Any]) -> tuple[str, str, str] | None:
    """The letters of two factors and the result, an ellipsis written out."""
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    terms, result = equation.replace(" ", "").split("->")
    parts = [*terms.split(","), result]
    ranks = [None if (fake := tensor(o)) is None else fake.dim() for o in operands]
    if len(parts) != 3 or None in ranks:
        return None
    hidden = {r - len(p) + 3 for p, r in zip(parts, ranks, strict=False) if r and "..." in p}
    if len(hidden) > 1:
        return None
    dots = "0123"[: hidden.pop()] if hidden else ""
    left, right, axes = (part.replace("...", dots) for part in parts)
    if any(len(set(part)) < len(part) for part in (left, right, axes)):
        return None
    return left, right, axes


def of_scores(found: Product) -> tuple[str, str, str] | None:
    """(batch letters, query letter + inner letter, key letter + inner letter) of scores.

    None if they are no scores [*batch, queries, keys] of queries and keys.
    """
    batch, query, key = found.axes[:-2], found.axes[-2], found.axes[-1]
    inner = set(found.left_axes) & set(found.right_axes) - set(found.axes)
    if len(inner) != 1 or len(batch) not in (1, 2):
        return None
    (d,) = inner
    factors = {frozenset(found.left_axes), frozenset(found.right_axes)}
    wanted = {frozenset((*batch, query, d)), frozenset((*batch, key, d))}
    return (batch, query + d, key + d) if factors == wanted else None


def arranged(node: fx.Node, axes: str, wanted: str, at: fx.Node) -> fx.Node:
    """A view of `node` with its axes in the wanted order, inserted before `at` if it needs one."""
    if axes == wanted:
        return node
    turned = axes[:-2] + axes[:-3:-1]
    if turned == wanted and (source := _transposed(node)) is not None:
        return source
    order = [axes.index(letter) for letter in wanted]
    with at.graph.inserting_before(at):
        return view(aten.permute.default, node, order)


def _transposed(node: fx.Node) -> fx.Node | None:
    """What a node is the transpose of, in its last two axes."""
    fake, source = tensor(node), node.args[0] if node.args else None
    if fake is None or not isinstance(source, fx.Node) or tensor(source) is None:
        return None
    name, given = op_name(node), node.args[1:]
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = tuple(given[0])
    dims = [d % fake.dim() for d in given if isinstance(d, int)]
    last = [fake.dim() - 2, fake.dim() - 1]
    if name in ("transpose", "swapaxes") and sorted(dims) == last:
        return source
    if name == "permute" and dims == [*range(fake.dim() - 2), last[1], last[0]]:
        return source
    return None


def view(target: Callable[..., Any], source: fx.Node, *args: Any) -> fx.Node:
    """Insert a call of an aten operator on a node, with what tracing would know of it."""
    node = source.graph.call_function(target, (source, *args))
    for key in ("example_value", "val"):
        if key in source.meta:
            node.meta[key] = target(source.meta[key], *args)
    return node
