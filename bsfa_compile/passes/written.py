"""Attention written out: product, scale, softcap, mask, softmax, dropout, product.

Anchored at the softmax. Upwards to the product of queries and keys, downwards to the product with
the values; every step must be one of those that the operator computes itself.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from bsfa_compile.passes import columns, products
from bsfa_compile.passes.arrange import CASTS, SHAPES, Refused, Written, arrange
from bsfa_compile.passes.domain import Num, known, number
from bsfa_compile.passes.interpret import Interpreter
from bsfa_compile.passes.masks import Fill, Scaled
from bsfa_compile.passes.nodes import (
    mutated,
    op_name,
    plain_name,
    same,
    settled,
    tensor,
    value,
    words,
)
from bsfa_compile.passes.products import Product, product

SOFTMAX = ("softmax", "safe_softmax")
ANCHORS = (*SOFTMAX, "log_softmax", "exp")  # a softmax, or what people make one of
# What may stand between softmax and product; not all of it is understood.
_BETWEEN = frozenset((*CASTS, *SHAPES)) | words(
    "add clamp div dropout exp expand getattr getitem masked_fill mul nan_to_num permute slice sub"
    " transpose truediv"
)


def attends(node: fx.Node) -> bool:
    """Whether a node is one of `ANCHORS` and stands between two products."""
    name = op_name(node)
    if name == "exp" and all(op_name(user) != "sum" for user in node.users):
        return False  # by hand, a softmax divides by the sum
    return name in ANCHORS and _product_below(node) is not None and _has_product_above(node, 14)


def match(softmax: fx.Node) -> Written | None:
    """The attention around a softmax node; None if it is no attention (a router, a loss).

    May add views of q, k, v and of the output to the graph, which compute the same.
    """
    out = _product_below(softmax)
    if out is None or not attends(softmax):
        return None
    if op_name(softmax) not in SOFTMAX:
        return Written(out=out, reason=f"attention is written out with {op_name(softmax)!r}")
    walk = _Walk(Written(out=out))
    try:
        walk.down(softmax)
        walk.up(softmax)
        arrange(walk.found, *walk.ends(), walk.heads)
    except Refused as refused:
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
        run = Interpreter()
        found = run.run(node)
        plain = isinstance(found, Num) and known(found.value) and not run.premises
        held = number(found.value) if isinstance(found, Num) and plain else None
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
            raise Refused("with a softmax over another axis")
        node = softmax
        while True:
            users = _users(node)
            if len(users) != 1:
                raise Refused("and its weights are used elsewhere")
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
                    raise Refused("and attention dropout is active")
            elif name in ("getitem", "slice") and columns.without_last_column(user):
                self.dropped_column = True
            elif not (name in CASTS or (name in SHAPES and self._shaped(user))):
                raise Refused(f"with {name!r} after its softmax")
            node = user
        self.weights = node

    def up(self, softmax: fx.Node) -> None:
        """From the softmax to the product of queries and keys."""
        found, factor, sink = self.found, 1.0, None
        node: object = softmax.args[0]
        while isinstance(node, fx.Node) and plain_name(node) not in products.NAMES:
            name, a = plain_name(node), node.args[0] if node.args else None
            b = node.args[1] if len(node.args) > 1 else None
            plain = name in (*CASTS, "cat") or not node.kwargs
            if (mutated(node) and not settled(node)) or not plain:
                raise Refused(f"with {op_name(node)!r}")
            times = _number(b)
            if name in CASTS or (name in SHAPES and self._shaped(node)):
                node = a
            elif name in ("mul", "div", "truediv") and times is not None:
                factor *= times if name == "mul" else 1 / times
                node = a
            elif name == "mul" and _number(a) is not None:
                factor *= _number(a) or 0.0
                node = b
            elif name == "tanh" and found.softcap is None:
                found.softcap, factor, node = factor, 1.0, a
            elif (
                name == "sub"
                and (factor, found.softcap, sink) == (1.0, None, None)  # the softmax is next
                and columns.is_row_maximum(b, a)
            ):
                node = a
            elif name in ("mul", "div", "truediv"):
                raise Refused("and scales its scores by a tensor")
            elif found.softcap is not None and name in ("add", "cat", "masked_fill", "where"):
                raise Refused("and caps its mask")
            elif name == "cat" and factor == 1.0 and self.dropped_column and sink is None:
                parts = columns.two_parts(node)
                if parts is None:
                    raise Refused("with 'cat' before its softmax")
                node, sink = parts
            elif name == "add" and isinstance(a, fx.Node) and isinstance(b, fx.Node):
                node, mask = (a, b) if _has_product_above(a, 8) else (b, a)
                self._mask(mask, factor)
            elif name == "masked_fill":
                if not isinstance(b, fx.Node) or len(node.args) < 3:
                    raise Refused("with a mask that is a constant")
                self._mask(Fill(condition=b, value=node.args[2]), factor)
                node = a
            elif name == "where" and isinstance(a, fx.Node) and len(node.args) > 2:
                node = self._where(a, b, node.args[2], factor)
            else:
                raise Refused(f"with {name!r} before its softmax")
        if not isinstance(node, fx.Node) or (scores := product(node)) is None:
            raise Refused("without a product of queries and keys that is understood")
        if self.dropped_column and sink is None:
            raise Refused("and its last column is left out")
        if scores.bias is not None:
            if found.softcap is not None:
                raise Refused("and caps its mask")
            self._mask(scores.bias, factor)
        self.scores, factor = scores, factor * scores.factor
        found.scale = factor * (found.softcap or 1.0)
        if found.scale <= 0 or (found.softcap is not None and found.softcap <= 0):
            raise Refused("with a negative scale")
        found.sinks = None if sink is None else columns.one_per_head(sink)
        if sink is not None and found.sinks is None:
            raise Refused("with a column of scores that is no number per head")

    def _mask(self, mask: fx.Node | Fill, factor: float) -> None:
        self.found.masks.append(mask if factor == 1.0 else Scaled(mask=mask, factor=factor))

    def _where(self, condition: fx.Node, yes: object, no: object, factor: float) -> object:
        shows = isinstance(yes, fx.Node) and _has_product_above(yes, 8)
        scores, filling = (yes, no) if shows else (no, yes)
        self._mask(Fill(condition=condition, value=filling, shows=shows), factor)
        return scores

    def ends(self) -> tuple[Product, fx.Node]:
        """The product that makes the scores, and the weights that the last product takes."""
        assert self.scores is not None and self.weights is not None, "both ways were walked"
        return self.scores, self.weights
