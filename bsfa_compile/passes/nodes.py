"""Reading FX nodes: what a node calls, what it is known to be, what it overwrites."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import sympy
import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

_ASSERT = torch.ops.aten._assert_tensor_metadata.default


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


# Operations whose result may share storage with their first argument.
VIEWS = words(
    "alias bfloat16 bool chunk contiguous detach diagonal double expand expand_as flatten float"
    " getitem half int lift_fresh_copy long mT movedim narrow permute reshape select slice split"
    " squeeze swapaxes t to transpose type type_as unbind unflatten unsqueeze view view_as"
)
# Operations on tensors without side effects: what is left of a replaced attention may be deleted.
PURE = VIEWS | words(
    "_assert_tensor_metadata _to_copy abs add amax and arange baddbmm bitwise_and bitwise_not"
    " bitwise_or bmm cat clone cumsum diff div dropout einsum eq fill full full_like ge gt index"
    " invert le logical_and logical_not logical_or lt masked_fill matmul max mul ne neg new_full"
    " new_ones new_zeros ones ones_like or pad repeat repeat_interleave rsub safe_softmax"
    " scalar_tensor softmax sub tanh tril triu truediv where zeros zeros_like"
)
_INPLACE_OPERATORS = words(
    "setitem delitem iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv"
    " ixor"
)


def op_name(node: fx.Node) -> str:
    """The operation's bare name, one for all IRs: "le" for torch.le, x.le, operator.le, aten.le."""
    target = node.target
    if isinstance(target, str):
        name = target
    elif isinstance(target, OpOverload):
        name = target._schema.name.split("::")[-1]
    else:
        name = str(getattr(target, "__name__", target))
    if name in ("_to_copy", "_assert_tensor_metadata"):
        return name
    return name.strip("_") if not mutated(node) else name


def plain_name(node: fx.Node) -> str:
    """`op_name` without regard to whether the operation works in place: "add" for add_ and iadd."""
    name = op_name(node)
    if name in _INPLACE_OPERATORS and name.startswith("i"):
        return name[1:]
    return name if name.startswith("_") else name.rstrip("_")


def rebind(graph: fx.Graph) -> None:
    """Let what reads a computed tensor after an in-place operation on it read that one's result.

    They are the same tensor; after this the operation's result says what the tensor holds.
    """
    for node in graph.nodes:
        written = mutated(node)
        if not written or node.args[:1] != (written[0],) or tensor(node) is None:
            continue
        source = written[0]
        if source.op not in ("call_function", "call_method") or len(source.users) == 1:
            continue
        for user in [u for u in source.users if node < u]:
            user.replace_input_with(source, node)


def settled(node: fx.Node) -> bool:
    """Whether an operation that works in place may be read as if it did not.

    Its target is a fresh tensor that nothing reads afterwards (`rebind` sees to it).
    """
    target = node.args[0] if node.args else None
    if mutated(node) != [target] or not isinstance(target, fx.Node) or tensor(node) is None:
        return False
    computed = target.op in ("call_function", "call_method")
    fresh = op_name(target) not in VIEWS and (not mutated(target) or settled(target))
    later = [u for u in target.users if u is not node and (not u < node or _may_alias(u))]
    return computed and fresh and all(user.target is _ASSERT for user in later)


def transformed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that a transform of torch.func (vmap, grad, jvp) runs."""
    found, depth = set(), 0
    for node in graph.nodes:
        name = op_name(node)
        depth += name.endswith("increment_nesting") - name.endswith("decrement_nesting")
        if depth > 0:
            found.add(node)
    return found


def value(node: object) -> object:
    """What tracing knows of a node's result: a fake tensor, a SymInt, a number; None if nothing."""
    if not isinstance(node, fx.Node):
        return node
    for key in ("example_value", "val"):
        if key in node.meta:
            return node.meta[key]
    return None


def tensor(node: object) -> Tensor | None:
    """The fake tensor that stands for a node's result, None if it is none or unknown."""
    known = value(node)
    return known if isinstance(known, Tensor) else None


def mutated(node: fx.Node) -> list[fx.Node]:
    """The argument nodes whose tensors this node overwrites."""
    target = node.target
    first = [a for a in node.args[:1] if isinstance(a, fx.Node)]
    if node.op == "call_method":
        name = str(target)
        dunder = name.strip("_") in _INPLACE_OPERATORS and name.startswith("__")
        return first if dunder or (name.endswith("_") and not name.endswith("__")) else []
    if node.op != "call_function":
        return []
    if isinstance(target, HigherOrderOperator):
        return list(node.all_input_nodes)
    if isinstance(target, OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, OpOverload):
        written = []
        for i, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                found = given if isinstance(given, (list, tuple)) else [given]
                written += [a for a in found if isinstance(a, fx.Node)]
        return written
    name = str(getattr(target, "__name__", ""))
    if getattr(operator, name, None) is target:
        return first if name in _INPLACE_OPERATORS else []
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return [out]
    return first if name.endswith("_") or node.kwargs.get("inplace") is True else []


def aliases(node: fx.Node) -> set[fx.Node]:
    """Every node whose result may share storage with this node's result, itself included."""
    base = node
    while base.op in ("call_method", "call_function") and base.args and _may_alias(base):
        source = base.args[0]
        if not isinstance(source, fx.Node):
            break
        base = source
    found, todo = {base}, [base]
    while todo:
        for user in todo.pop().users:
            if user not in found and user.args and user.args[0] in found and _may_alias(user):
                found.add(user)
                todo.append(user)
    return found


def _may_alias(node: fx.Node) -> bool:
    return op_name(node) in VIEWS or bool(mutated(node))


def writers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that overwrite this node's storage, through whatever view."""
    family = aliases(node)
    seen = set()
    for member in family:
        for user in member.users:
            if user not in seen and any(a in family for a in mutated(user)):
                seen.add(user)
                yield user


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Each node's place in the order of execution."""
    return {node: i for i, node in enumerate(graph.nodes)}


def symbol_nodes(graph: fx.Graph, stop: fx.Node) -> dict[sympy.Expr, fx.Node]:
    """For each symbolic integer computed before `stop`, the first node that holds it."""
    found: dict[sympy.Expr, fx.Node] = {}
    for node in graph.nodes:
        if node is stop:
            break
        known = value(node)
        if isinstance(known, torch.SymInt):
            found.setdefault(known.node.expr, node)
    return found


def same(a: object, b: object) -> bool:
    """Whether two sizes (int or SymInt) are known to be equal without adding a guard."""
    return bool(as_expr(a) == as_expr(b))


def is_one(size: object) -> bool:
    """Whether a size is known to be 1 (a symbolic size never is) without adding a guard."""
    return bool(as_expr(size) == 1)


def as_expr(size: object) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


def erase_dead(graph: fx.Graph, roots: Iterable[fx.Node]) -> None:
    """Delete nodes that nothing uses any more, walking up from `roots`.

    Only operations known to be pure go: FX takes every in-place method for pure, so
    `Graph.eliminate_dead_code` would delete the writes to a KV cache.
    """
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node._erased or node.op not in ("call_function", "call_method"):
            continue
        for user in list(node.users):
            if op_name(user) == "_assert_tensor_metadata" and not user.users:
                graph.erase_node(user)
        if node.users or (mutated(node) and not settled(node)) or plain_name(node) not in PURE:
            continue
        inputs = list(node.all_input_nodes)
        graph.erase_node(node)
        todo += inputs
