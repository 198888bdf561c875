"""Attention written out: product, scale, softcap, mask, softmax, dropout, product.

Anchored at the softmax. Upwards to the product of queries and keys, downwards to the product with
the values; every step must be one of those that the operator computes itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bsfa_compile.passes import columns, products
from bsfa_compile.passes.domain import Num, known, number
from bsfa_compile.passes.interpret import Interpreter, argument
from bsfa_compile.passes.masks import Fill
from bsfa_compile.passes.nodes import (
    mutated,
    op_name,
    plain_name,
    positions,
    same,
    settled,
    tensor,
    value,
    writers,
)
from bsfa_compile.passes.products import Product, arranged, product, view

SOFTMAX = ("softmax", "safe_softmax")
_CASTS = ("to", "_to_copy", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous")
_SHAPES = ("view", "reshape", "flatten", "unflatten", "unsafe_view")
# What may stand between softmax and product; not all of it is understood.
_BETWEEN = (*_CASTS, *_SHAPES, "add", "div", "dropout", "getitem", "masked_fill", "mul", "slice")
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
    masks: list[fx.Node | Fill] = field(default_factory=list)
    reason: str | None = None


class _Refused(Exception):
    """The reason why attention written out stays dense."""


def match(softmax: fx.Node) -> Written | None:
    """The attention around a softmax node; None if it is no attention (a router, a loss).

    May add views of q, k, v and of the output to the graph, which compute the same.
    """
    out = _product_below(softmax)
    if out is None or not _has_product_above(softmax, 14):
        return None
    walk = _Walk(Written(out=out))
    try:
        walk.down(softmax)
        walk.up(softmax)
        walk.arrange()
    except _Refused as refused:
        walk.found.reason = f"attention is written out {refused}"
    return walk.found


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if op_name(user) != "_assert_tensor_metadata"]


def _product_below(node: fx.Node, steps: int = 7) -> fx.Node | None:
    """The product that a factor of descends from the node, over a few steps."""
    for user in _users(node) if steps else []:
        name = plain_name(user)
        if name in products.NAMES:
            return user
        if name in _BETWEEN and (found := _product_below(user, steps - 1)) is not None:
            return found
    return None


def _has_product_above(node: fx.Node, steps: int) -> bool:
    if plain_name(node) in products.NAMES:
        return True
    if plain_name(node) in SOFTMAX and steps < 14:
        return False
    sources = node.all_input_nodes[: 3 if op_name(node) == "where" else 2]
    return steps > 0 and any(
        _has_product_above(source, steps - 1)
        for source in sources
        if source.op in ("call_function", "call_method")
    )


def _number(node: object) -> float | None:
    """A number other than 0, also as a tensor that holds nothing else."""
    held, fake = value(node), tensor(node)
    if fake is not None and fake.dim() == 0:
        found = Interpreter().run(node)
        held = number(found.value) if isinstance(found, Num) and known(found.value) else None
    return float(held) if isinstance(held, int | float) and held != 0 else None


def _last_axis(node: fx.Node) -> bool:
    fake = tensor(node.args[0])
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return fake is not None and fake.dim() in (3, 4) and dim in (-1, fake.dim() - 1)


class _Walk:
    """The way from the softmax down to `out` and up to the scores."""

    def __init__(self, found: Written) -> None:
        self.found = found
        self.heads: list[Any] = []  # sizes of axis 1 wherever scores have four axes
        self.weights: fx.Node | None = None
        self.scores: Product | None = None
        self.dropped_column = False

    def _shaped(self, node: fx.Node) -> bool:
        """Note a node of scores; whether its last two axes are those of its input."""
        old, new = tensor(node.args[0]), tensor(node)
        if old is None or new is None or new.dim() not in (3, 4):
            return False
        if new.dim() == 4:
            self.heads.append(new.shape[1])
        if old.dim() == 4:
            self.heads.append(old.shape[1])
        return all(same(old.shape[axis], new.shape[axis]) for axis in (-1, -2))

    def down(self, softmax: fx.Node) -> None:
        """From the softmax to the product with the values."""
        if not _last_axis(softmax):
            raise _Refused("with a softmax over another axis")
        node = softmax
        while True:
            users = _users(node)
            if len(users) != 1:
                raise _Refused("and its weights are used elsewhere")
            (user,) = users
            name = plain_name(user)
            if user is self.found.out:
                break
            if name == "dropout":
                p, training = (
                    user.args[i] if len(user.args) > i else user.kwargs.get(key, default)
                    for i, key, default in ((1, "p", 0.5), (2, "training", True))
                )
                if p not in (0, 0.0) and training is not False:
                    raise _Refused("and attention dropout is active")
            elif name in ("getitem", "slice") and columns.without_last_column(user):
                self.dropped_column = True
            elif not (name in _CASTS or (name in _SHAPES and self._shaped(user))):
                raise _Refused(f"with {name!r} after its softmax")
            node = user
        self.weights = node

    def up(self, softmax: fx.Node) -> None:
        """From the softmax to the product of queries and keys."""
        found, factor, sink = self.found, 1.0, None
        node: object = softmax.args[0]
        while isinstance(node, fx.Node) and plain_name(node) not in products.NAMES:
            name, a = plain_name(node), node.args[0] if node.args else None
            b = node.args[1] if len(node.args) > 1 else None
            plain = name in (*_CASTS, "cat", "masked_fill") or not node.kwargs
            if (mutated(node) and not settled(node)) or not plain:
                raise _Refused(f"with {op_name(node)!r}")
            times = _number(b)
            if name in _CASTS or (name in _SHAPES and self._shaped(node)):
                node = a
            elif name in ("mul", "div", "truediv") and times is not None:
                factor *= times if name == "mul" else 1 / times
                node = a
            elif name == "mul" and _number(a) is not None:
                factor *= _number(a) or 0.0
                node = b
            elif name == "tanh" and found.softcap is None:
                found.softcap, factor, node = factor, 1.0, a
            elif name == "sub" and factor == 1.0 and columns.is_row_maximum(b, a):
                node = a
            elif factor != 1.0 or found.softcap is not None:
                raise _Refused("and scales its mask")
            elif name == "cat" and self.dropped_column and sink is None:
                parts = columns.two_parts(node)
                if parts is None:
                    raise _Refused("with 'cat' before its softmax")
                node, sink = parts
            elif name == "add" and isinstance(a, fx.Node) and isinstance(b, fx.Node):
                node, mask = (a, b) if _has_product_above(a, 8) else (b, a)
                found.masks.append(mask)
            elif name == "masked_fill":
                condition, filling = (
                    argument(node, i, key) for i, key in ((1, "mask"), (2, "value"))
                )
                if not isinstance(condition, fx.Node):
                    raise _Refused("with a mask that is a constant")
                found.masks.append(Fill(condition=condition, value=filling))
                node = a
            elif name == "where" and isinstance(a, fx.Node) and len(node.args) > 2:
                node = self._where(a, b, node.args[2])
            else:
                raise _Refused(f"with {name!r} before its softmax")
        if not isinstance(node, fx.Node) or (scores := product(node)) is None:
            raise _Refused("without a product of queries and keys that is understood")
        if self.dropped_column and sink is None:
            raise _Refused("and its last column is left out")
        if scores.bias is not None:
            if factor != 1.0 or found.softcap is not None:
                raise _Refused("and scales its mask")
            found.masks.append(scores.bias)
        self.scores, factor = scores, factor * scores.factor
        found.scale = factor * (found.softcap or 1.0)
        if found.scale <= 0 or (found.softcap is not None and found.softcap <= 0):
            raise _Refused("with a negative scale")
        found.sinks = None if sink is None else columns.one_per_head(sink)
        if sink is not None and found.sinks is None:
            raise _Refused("with a column of scores that is no number per head")

    def _where(self, condition: fx.Node, yes: object, no: object) -> object:
        shows = isinstance(yes, fx.Node) and _has_product_above(yes, 8)
        scores, filling = (yes, no) if shows else (no, yes)
        self.found.masks.append(Fill(condition=condition, value=filling, shows=shows))
        return scores

    def arrange(self) -> None:
        """q, k, v and the output as [B, H, L, D]."""
        found, scores, last = self.found, self.scores, product(self.found.out)
        if last is None or scores is None or last.bias is not None or last.factor != 1.0:
            raise _Refused(f"with {op_name(found.out)!r}")
        axes = products.of_scores(scores)
        if axes is None:
            raise _Refused(f"with {op_name(scores.node)!r}, whose axes are not understood")
        weights, values = (last.left_axes, last.right_axes), (last.right, last.left)
        if last.left is not self.weights:
            weights, values = weights[::-1], values[::-1]
        (mine, theirs), v = weights, values[0]
        batch, key, inner = mine[:-2], mine[-1], set(theirs) - set(mine)
        fits = len(inner) == 1 and len(batch) in (1, 2) and set(theirs) == {*batch, key, *inner}
        d = "".join(inner)
        if not fits or set(last.axes) != {*batch, mine[-2], d} or v is self.weights:
            raise _Refused(f"with {op_name(found.out)!r}, whose axes are not understood")
        for one in (scores, last):
            ranked = one.axes if one is scores else mine
            fake = tensor(one.node) if one is scores else tensor(self.weights)
            if len(ranked) == 4 and fake is not None:
                self.heads.append(fake.shape[1])
        at, out = positions(found.out.graph), found.out
        left = frozenset(scores.left_axes)
        sides = [(scores.left, scores.left_axes), (scores.right, scores.right_axes)]
        if left != frozenset(axes[0] + axes[1]):
            sides.reverse()
        for node, _ in sides:
            if any(at[scores.node] < at[w] < at[out] for w in writers(node)):
                raise _Refused("and its inputs are overwritten meanwhile")
        heads = self._heads(sides[0][0])
        q, k = (
            arranged(node, given, axes[0] + wanted, scores.node)
            for (node, given), wanted in zip(sides, axes[1:], strict=True)
        )
        found.q, found.k = (_split(node, heads, scores.node) for node in (q, k))
        found.v = _split(arranged(v, theirs, batch + key + d, out), heads, out)
        found.out = _normal_output(out, last.axes, batch + mine[-2] + d, heads)

    def _heads(self, q: fx.Node) -> int:
        """How many heads a first axis of [B * H] is made of; 1 if nothing tells."""
        source = q
        while source.op in ("call_function", "call_method") and source.args:
            fake, before = tensor(source), tensor(source.args[0])
            if not self.heads and fake is not None and before is not None:
                last = before.dim() == 4 and fake.dim() == 3 and op_name(source) in _SHAPES
                if last and all(same(before.shape[i], fake.shape[i]) for i in (-1, -2)):
                    self.heads.append(before.shape[1])
            if op_name(source) not in (*_CASTS, *_SHAPES):
                break
            (source,) = source.all_input_nodes[:1]
        if len({str(h) for h in self.heads}) > 1 or not all(type(h) is int for h in self.heads):
            raise _Refused("with heads that are not told apart")
        return int(self.heads[0]) if self.heads else 1


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
