"""Columns that written-out attention adds to its scores: sinks, and what belongs to them."""

from __future__ import annotations

from torch import fx

from bsfa_compile.passes.nodes import is_one, op_name, same, tensor

_VIEWS = ("getitem", "reshape", "to", "unsqueeze", "view")


def without_last_column(node: fx.Node) -> bool:
    """Whether a node is x[..., :-1]."""
    old, new = tensor(node.args[0]), tensor(node)
    if old is None or new is None or old.dim() != new.dim():
        return False
    if op_name(node) == "slice":
        cut: tuple[object, ...] = node.args[1:]
        return cut in ((-1, 0, -1), (old.dim() - 1, 0, -1))
    picks = node.args[1] if isinstance(node.args[1], tuple) else ()
    return (
        picks[-1:] == (slice(None, -1, None),)
        and all(pick is Ellipsis or pick == slice(None) for pick in picks[:-1])
        and (Ellipsis in picks or len(picks) == old.dim())
    )


def is_row_maximum(node: object, scores: object) -> bool:
    """Whether a node is the maximum of each row of `scores`: no softmax feels it subtracted."""
    if isinstance(node, fx.Node) and op_name(node) == "detach":
        node = node.args[0]
    if not isinstance(node, fx.Node) or tensor(node) is None:
        return False
    if op_name(node) == "getattr" or op_name(node) == "getitem":
        if node.args[1] not in (0, "values") or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    dim, keep = (
        node.args[i] if len(node.args) > i else node.kwargs.get(key)
        for i, key in ((1, "dim"), (2, "keepdim"))
    )
    last = dim in (-1, [-1], (-1,))
    return op_name(node) in ("max", "amax") and node.args[:1] == (scores,) and last and keep is True


def two_parts(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(scores [B, H, Lq, Lk], column [B, H, Lq, 1]) of cat([scores, column], -1)."""
    parts = node.args[0]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in (-1, 3):
        return None
    scores, column = parts
    fake = tensor(column)
    if not isinstance(scores, fx.Node) or not isinstance(column, fx.Node) or fake is None:
        return None
    return (scores, column) if fake.dim() == 4 and is_one(fake.shape[-1]) else None


def one_per_head(column: fx.Node) -> fx.Node | None:
    """The tensor [H] that a column [B, H, Lq, 1] repeats."""
    fake, node = tensor(column), column
    while op_name(node) in ("expand", "expand_as", "to") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    base = tensor(node)
    if fake is None or base is None or base.dim() != 4 or not same(base.shape[1], fake.shape[1]):
        return None
    if not all(is_one(base.shape[axis]) for axis in (0, 2, 3)):
        return None
    # With one long axis no view changes the order.
    while op_name(node) in _VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        base = tensor(node)
        if base is not None and base.dim() == 1:
            return node
    return None
