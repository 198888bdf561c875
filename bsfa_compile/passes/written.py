"""Attention written out: matmul, scale, softcap, mask, softmax, dropout, matmul.

Anchored at the softmax. Upwards to the product of queries and keys, downwards to the product with
the values; every step must be one of those that the operator computes itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from bsfa_compile.passes.masks import Fill
from bsfa_compile.passes.nodes import mutated, op_name, positions, tensor, value, writers

_CASTS = ("to", "_to_copy", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous")
_PRODUCTS = ("matmul", "bmm")
# What may stand between softmax and product; not all of it is understood.
_BETWEEN = ("add", "div", "dropout", "getitem", "masked_fill", "mul", "reshape", "slice", "view")
_OTHER_PRODUCTS = ("einsum", "baddbmm", "addbmm")


@dataclass(kw_only=True)
class Written:
    """What was found: the last product `out`, q, k, v nodes, and what happens to the scores.

    softcap None: none. reason: why it cannot be taken over.
    """

    out: fx.Node
    q: fx.Node | None = None
    k: fx.Node | None = None
    v: fx.Node | None = None
    scale: float = 1.0
    softcap: float | None = None
    masks: list[fx.Node | Fill] = field(default_factory=list)
    reason: str | None = None


def match(softmax: fx.Node) -> Written | None:
    """The attention around a softmax node; None if it is no attention (a router, a loss)."""
    out = _product_below(softmax)
    if out is None or not _has_product_above(softmax, 12):
        return None
    found = Written(out=out)
    found.reason = _below(softmax, found) or _above(softmax, found)
    return found


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.args if isinstance(a, fx.Node)]


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if op_name(user) != "_assert_tensor_metadata"]


def _product_below(node: fx.Node, steps: int = 6) -> fx.Node | None:
    """The product whose left factor descends from the node, over a few steps."""
    for user in _users(node) if steps else []:
        name, inputs = op_name(user), _inputs(user)
        if name in (*_PRODUCTS, *_OTHER_PRODUCTS) and node in inputs[:1]:
            return user
        if name in (*_CASTS, *_BETWEEN):
            found = _product_below(user, steps - 1)
            if found is not None:
                return found
    return None


def _has_product_above(node: fx.Node, steps: int) -> bool:
    if op_name(node) in (*_PRODUCTS, *_OTHER_PRODUCTS):
        return True
    return steps > 0 and any(
        _has_product_above(source, steps - 1)
        for source in node.all_input_nodes[:2]
        if source.op in ("call_function", "call_method")
    )


def _below(softmax: fx.Node, found: Written) -> str | None:
    scores = tensor(softmax)
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if scores is None or dim not in (-1, scores.dim() - 1):
        return "attention is written out with a softmax over another axis"
    node = softmax
    while node is not found.out:
        users = _users(node)
        if len(users) != 1:
            return "attention is written out and its weights are used elsewhere"
        (user,) = users
        name = op_name(user)
        if name == "dropout":
            p, training = (
                user.args[i] if len(user.args) > i else user.kwargs.get(key, default)
                for i, key, default in ((1, "p", 0.5), (2, "training", True))
            )
            if p not in (0, 0.0) and training is not False:
                return "attention dropout is active"
        elif user is not found.out and name not in _CASTS:
            return f"attention is written out with {name!r} after its softmax"
        node = user
    if op_name(found.out) not in _PRODUCTS:
        return f"attention is written out with {op_name(found.out)!r}"
    values = found.out.args[1]
    found.v = values if isinstance(values, fx.Node) else None
    return None


def _above(softmax: fx.Node, found: Written) -> str | None:
    node, factor = softmax.args[0], 1.0
    while isinstance(node, fx.Node) and op_name(node) not in _PRODUCTS:
        name, a = op_name(node), node.args[0] if node.args else None
        plain = name in _CASTS or not node.kwargs  # alpha=, rounding_mode=, ...
        if mutated(node) or name in _OTHER_PRODUCTS or not plain:
            return f"attention is written out with {name!r}"
        b = node.args[1] if len(node.args) > 1 else None
        number = _number(b)
        if name in _CASTS:
            node = a
        elif name in ("mul", "div", "truediv") and number is not None:
            factor *= number if name == "mul" else 1 / number
            node = a
        elif name == "mul" and _number(a) is not None:
            factor *= _number(a) or 0.0
            node = b
        elif name == "tanh" and found.softcap is None:
            found.softcap, factor, node = factor, 1.0, a
        elif factor != 1.0 or found.softcap is not None:
            return "attention is written out and scales its mask"
        elif name == "add" and isinstance(a, fx.Node) and isinstance(b, fx.Node):
            scores, mask = (a, b) if _has_product_above(a, 8) else (b, a)
            found.masks.append(mask)
            node = scores
        elif name == "masked_fill" and isinstance(b, fx.Node) and len(node.args) > 2:
            found.masks.append(Fill(condition=b, value=node.args[2]))
            node = a
        else:
            return f"attention is written out with {name!r} before its softmax"
    if not isinstance(node, fx.Node):
        return "attention is written out without a product of queries and keys"
    found.scale = factor * (found.softcap or 1.0)
    if found.scale <= 0 or (found.softcap is not None and found.softcap <= 0):
        return "attention is written out with a negative scale"
    return _queries_and_keys(node, found) or _unchanged(node, found)


def _number(node: object) -> float | None:
    known = value(node)
    return float(known) if isinstance(known, int | float) and known != 0 else None


def _queries_and_keys(product: fx.Node, found: Written) -> str | None:
    q, turned = product.args[:2]
    if isinstance(q, fx.Node) and isinstance(turned, fx.Node):
        fake = tensor(turned)
        last = None if fake is None else {fake.dim() - 1, fake.dim() - 2}
        if op_name(turned) == "transpose" and fake is not None:
            dims = {d % fake.dim() for d in turned.args[1:3] if isinstance(d, int)}
            if dims == last and isinstance(turned.args[0], fx.Node):
                found.q, found.k = q, turned.args[0]
                return None
    return "attention is written out with keys that are not simply transposed"


def _unchanged(product: fx.Node, found: Written) -> str | None:
    """Whether q and k, when the last product runs, are what they were when they were multiplied."""
    at = positions(found.out.graph)
    for node in (found.q, found.k):
        if node is not None and any(at[product] < at[w] < at[found.out] for w in writers(node)):
            return "attention is written out and its inputs are overwritten meanwhile"
    return None
