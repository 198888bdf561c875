"""Rules for what makes, moves and looks up positions: arange, views, indexing, diff, cumsum."""

from __future__ import annotations

from dataclasses import replace

import sympy
from torch import fx

from bsfa_compile.passes import domain
from bsfa_compile.passes.domain import (
    BATCH,
    KEY,
    QUERY,
    Bound,
    Index,
    Num,
    Opaque,
    Select,
    Table,
    Value,
    moved,
)
from bsfa_compile.passes.interpret import Interpreter, argument, rule
from bsfa_compile.passes.nodes import is_one, plain_name, same, tensor

_GIVEN = "the attention mask depends on the positions given"


@rule("arange")
def _arange(run: Interpreter, node: fx.Node) -> Value:
    ends = len(node.args) == 1 and "end" not in node.kwargs  # arange(end)
    start = Num(0) if ends else run.run(argument(node, 0, "start", 0))
    if not isinstance(start, Num) or argument(node, 2, "step", 1) != 1:
        return Opaque("the attention mask uses an arange with a step")
    return Index(-1, sympy.sympify(start.value))


@rule("ones", "ones_like", "new_ones")
def _ones(run: Interpreter, node: fx.Node) -> Value:
    return Num(1)


@rule("zeros", "zeros_like", "new_zeros")
def _zeros(run: Interpreter, node: fx.Node) -> Value:
    return Num(0)


@rule("tensor", "as_tensor")
def _tensor(run: Interpreter, node: fx.Node) -> Value:
    return run.run(argument(node, 0, "data"))


@rule("full", "full_like", "new_full", "scalar_tensor", "fill")
def _full(run: Interpreter, node: fx.Node) -> Value:
    place = {"scalar_tensor": 0, "full": 1, "full_like": 1, "fill": 1, "new_full": 2}[
        plain_name(node)
    ]
    filled = run.run(argument(node, place, "fill_value"))
    return filled if isinstance(filled, Num) else Opaque("the attention mask is filled with data")


@rule("to", "_to_copy", "type", "type_as", "bool", "int", "long")
@rule("half", "bfloat16", "float", "double")
@rule("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "expand", "expand_as")
def _same(run: Interpreter, node: fx.Node) -> Value:
    return run.run(node.args[0])


@rule("unsqueeze", "squeeze", "view", "reshape")
def _reshape(run: Interpreter, node: fx.Node) -> Value:
    old, new = tensor(node.args[0]), tensor(node)
    if old is None or new is None:
        return Opaque("the graph does not know the shape of the attention mask")
    # Only axes of size 1 may come and go.
    before = [i - old.dim() for i in range(old.dim()) if not is_one(old.shape[i])]
    after = [i - new.dim() for i in range(new.dim()) if not is_one(new.shape[i])]
    kept = len(before) == len(after) and all(
        same(old.shape[a], new.shape[b]) for a, b in zip(before, after, strict=True)
    )
    found = run.run(node.args[0])
    if not kept:
        return found if isinstance(found, Opaque) else Opaque("the attention mask is reshaped")
    return moved(found, dict(zip(before, after, strict=True)))


@rule("transpose", "permute")
def _transpose(run: Interpreter, node: fx.Node) -> Value:
    fake, given = tensor(node), node.args[1:]
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = tuple(given[0])
    if fake is None or not all(isinstance(dim, int) for dim in given):
        return Opaque("the attention mask is transposed")
    rank = fake.dim()
    order = [dim % rank for dim in given if isinstance(dim, int)]
    if plain_name(node) == "transpose":
        (a, b), order = order, list(range(rank))
        order[a], order[b] = b, a
    return moved(run.run(node.args[0]), {old - rank: i - rank for i, old in enumerate(order)})


@rule("cat", "interpolate", "pad", "stack")
def _parts(run: Interpreter, node: fx.Node) -> Value:
    parts = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
    found = [run.run(part) for part in parts]
    otherwise = Opaque("the attention mask is put together from parts")
    return next((part for part in found if isinstance(part, Opaque)), otherwise)


@rule("matmul", "einsum", "bmm", "linear")
def _product(run: Interpreter, node: fx.Node) -> Value:
    return Opaque("the attention mask is a bias computed from queries or keys")


@rule("embedding", "gather")
def _embedding(run: Interpreter, node: fx.Node) -> Value:
    return Opaque("the attention mask is a bias looked up in a table, by relative position")


@rule("repeat")
def _repeat(run: Interpreter, node: fx.Node) -> Value:
    times = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    result = run.run(node.args[0])
    if any(-axis > len(times) or times[axis] != 1 for axis in domain.axes(result)):
        return Opaque("the attention mask is repeated")
    return result


@rule("slice")
def _slice(run: Interpreter, node: fx.Node) -> Value:
    fake = tensor(node)
    if fake is None:
        return Opaque("the graph does not know the shape of the attention mask")
    dim = argument(node, 1, "dim", 0)
    start, step = argument(node, 2, "start", 0), argument(node, 4, "step", 1)
    axis = dim - fake.dim() * (dim >= 0) if isinstance(dim, int) else 0
    return _cut(run, run.run(node.args[0]), axis, start, step)


def _cut(run: Interpreter, source: Value, axis: int, start: object, step: object) -> Value:
    """The part [start:] of an axis; where it stops changes nothing."""
    if axis not in domain.axes(source) or (start in (None, 0) and step in (None, 1)):
        return source
    first = run.run(start)
    if step in (None, 1) and isinstance(first, Num):
        begin = sympy.sympify(first.value)
        if run.nonnegative(begin) and not begin.free_symbols & run.scalars.keys():
            if isinstance(source, Index):
                return Index(axis, source.offset + begin)
            if isinstance(source, Select):
                move = begin if axis == QUERY else -begin
                bounds = [a for a in source.atoms if isinstance(a, Bound)]
                if len(bounds) == len(source.atoms):
                    shifted = frozenset(Bound(a.upper, a.limit + move) for a in bounds)
                    return replace(source, atoms=shifted)
    return Opaque("the attention mask is a part of a larger one")


@rule("getitem", "index")
def _getitem(run: Interpreter, node: fx.Node) -> Value:
    fake, source = tensor(node.args[0]), node.args[0]
    if fake is None:
        return Opaque("the graph does not know the shape of the attention mask")
    picks = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    if picks and all(isinstance(p, fx.Node) and tensor(p) is not None for p in picks):
        return _gather(run, source, [run.run(p) for p in picks])
    result = run.run(source)
    if Ellipsis in picks:
        at = list(picks).index(Ellipsis)
        missing = fake.dim() - sum(p is not None for p in picks) + 1
        picks = [*picks[:at], *[slice(None)] * missing, *picks[at + 1 :]]
    picks = [*picks, *[slice(None)] * (fake.dim() - sum(p is not None for p in picks))]
    to, axis, place = {}, -fake.dim(), -sum(type(pick) is not int for pick in picks)
    for pick in picks:
        if type(pick) is int:  # its axis disappears
            axis += 1
            continue
        if pick is not None:
            if not isinstance(pick, slice):
                return Opaque("the attention mask is indexed by numbers")
            result = _cut(run, result, axis, pick.start, pick.step)
            to[axis] = place
            axis += 1
        place += 1
    return moved(result, to)


@rule("select")
def _select(run: Interpreter, node: fx.Node) -> Value:
    fake, dim = tensor(node.args[0]), argument(node, 1, "dim")
    if fake is None or not isinstance(dim, int):
        return Opaque("the attention mask is indexed by numbers")
    left = [axis for axis in range(-fake.dim(), 0) if axis % fake.dim() != dim % fake.dim()]
    return moved(run.run(node.args[0]), {axis: i - len(left) for i, axis in enumerate(left)})


def _gather(run: Interpreter, source: object, picks: list[Value]) -> Value:
    """source[batch index, position]: a table or positions looked up along an axis."""
    table, fake = run.run(source), tensor(source)
    if isinstance(table, Num | Opaque):
        return table
    if fake is None or fake.dim() != len(picks):
        return Opaque("the attention mask looks positions up")
    rows, columns = [Num(0), *picks][-2:]
    if not isinstance(columns, Index) or not isinstance(table, Index | Table):
        return Opaque("the attention mask looks positions up")
    if not run.nonnegative(columns.offset):
        return Opaque("the attention mask may look up negative positions")
    if isinstance(table, Index):
        if table.axis == KEY:
            return Index(columns.axis, table.offset + columns.offset)
        return Opaque("the attention mask looks positions up")
    if table.column != KEY:
        return Opaque("the attention mask looks positions up")
    if table.row is not None and rows != Index(BATCH, sympy.Integer(0)):
        return Opaque("the attention mask looks rows up")
    row = None if table.row is None else BATCH
    offset = table.offset + columns.offset
    return replace(table, row=row, column=columns.axis, offset=offset)


@rule("diff")
def _diff(run: Interpreter, node: fx.Node) -> Value:
    order, dim = argument(node, 1, "n", 1), argument(node, 2, "dim", -1)
    before = run.run(argument(node, 3, "prepend"))
    source, fake = run.run(node.args[0]), tensor(node)
    after = argument(node, 4, "append")
    plain = order == 1 and after is None and fake is not None and dim in (-1, fake.dim() - 1)
    if plain and isinstance(source, Index) and source.axis == -1 and isinstance(before, Num):
        step = sympy.expand(source.offset - before.value)
        return Num(1) if step == 1 else Opaque(_GIVEN)
    return source if isinstance(source, Opaque) else Opaque(_GIVEN)


@rule("cumsum")
def _cumsum(run: Interpreter, node: fx.Node) -> Value:
    source = run.run(node.args[0])
    if isinstance(source, Num) and source.value in (0, False):
        return Num(0)
    return source if isinstance(source, Opaque) else Opaque("the attention mask counts up")
