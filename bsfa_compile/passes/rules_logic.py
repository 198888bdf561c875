"""Rules for what computes with positions and joins conditions: arithmetic, comparison, logic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy
import torch
from torch import fx

from bsfa_compile.passes import domain
from bsfa_compile.passes.domain import (
    EITHER,
    KEY,
    QUERY,
    Bound,
    Distance,
    Index,
    Num,
    Opaque,
    Select,
    Table,
    Value,
    as_select,
    known,
    number,
)
from bsfa_compile.passes.interpret import Interpreter, argument, rule
from bsfa_compile.passes.nodes import plain_name, tensor


@rule("add", "sub", "rsub")
def _add(run: Interpreter, node: fx.Node) -> Value:
    if node.kwargs.get("alpha", 1) != 1:
        return Opaque("the attention mask is scaled while adding")
    a, b = (run.zero_or_one(run.run(x)) for x in node.args[:2])
    if plain_name(node) == "rsub":
        a, b = b, a
    sign = 1 if plain_name(node) == "add" else -1
    if isinstance(a, Num) and isinstance(b, Num):
        return Num(a.value + sign * b.value)
    if isinstance(a, Index) and isinstance(b, Num):
        return Index(a.axis, a.offset + sign * sympy.sympify(b.value))
    if isinstance(a, Num) and isinstance(b, Index) and sign > 0:
        return Index(b.axis, b.offset + sympy.sympify(a.value))
    if (
        isinstance(a, Index)
        and isinstance(b, Index)
        and sign < 0
        and a.axis + b.axis == KEY + QUERY
    ):
        return Distance(1 if a.axis == KEY else -1, a.offset - b.offset)
    if isinstance(a, Distance) and isinstance(b, Num) and not a.absolute:
        return Distance(a.sign, a.offset + sign * sympy.sympify(b.value))
    return added(a, b) if sign > 0 else _arithmetic(a, b, lambda x, y: x - y)


def added(a: Value, b: Value) -> Value:
    """The sum of two numbers or masks: hidden where either hides.

    Where both hide, only the weaker of their numbers is promised.
    """
    a, b = domain.upright(as_select(a)), domain.upright(as_select(b))
    if _hides(a) and _hides(b) and isinstance(a, Select) and isinstance(b, Select):
        return Select(a.atoms | b.atoms, a.on, max(a.off, b.off))
    return _arithmetic(a, b, lambda x, y: x + y)


def _hides(a: Value) -> bool:
    """Whether it is a mask to be added: 0 where it shows, a negative number where it hides."""
    return isinstance(a, Select) and a.on == 0 and known(a.off) and bool(a.off < 0)


@rule("mul")
def _mul(run: Interpreter, node: fx.Node) -> Value:
    a, b = (as_select(run.zero_or_one(run.run(x))) for x in node.args[:2])
    masks = [x for x in (a, b) if isinstance(x, Select) and (x.on, x.off) == (1, 0)]
    if len(masks) == 2:
        return Select(masks[0].atoms | masks[1].atoms, 1, 0)
    return _arithmetic(a, b, lambda x, y: x * y)


def times(a: Value, factor: float) -> Value:
    """A number or mask to be added, multiplied."""
    return _arithmetic(a, Num(factor), lambda x, y: x * y)


def _arithmetic(a: Value, b: Value, apply: Callable[..., domain.Scalar]) -> Value:
    a, b = as_select(a), as_select(b)
    if isinstance(a, Num) and isinstance(b, Num):
        return Num(apply(a.value, b.value))
    if isinstance(a, Select) and isinstance(b, Num):
        return Select(a.atoms, apply(a.on, b.value), apply(a.off, b.value))
    if isinstance(a, Num) and isinstance(b, Select):
        return Select(b.atoms, apply(a.value, b.on), apply(a.value, b.off))
    return first_opaque(a, b, "the attention mask is a bias that depends on data")


def first_opaque(a: Value, b: Value, otherwise: str) -> Opaque:
    """The reason an argument already has, else this one."""
    return next((x for x in (a, b) if isinstance(x, Opaque)), Opaque(otherwise))


@rule("floordiv", "floor_divide")
def _floordiv(run: Interpreter, node: fx.Node) -> Value:
    a = run.run(node.args[0])
    return first_opaque(a, a, "the attention mask is block-diagonal: chunks of positions")


@rule("div", "truediv", "pow", "exp", "log", "cos", "sin")
def _computed(run: Interpreter, node: fx.Node) -> Value:
    a = run.run(node.args[0])
    return first_opaque(a, a, "the attention mask is a bias computed from positions or data")


@rule("abs")
def _abs(run: Interpreter, node: fx.Node) -> Value:
    a = run.run(node.args[0])
    if isinstance(a, Distance) and not a.absolute:
        return Distance(1, a.offset * a.sign, absolute=True)
    return first_opaque(a, a, "the attention mask takes an absolute value")


@rule("neg")
def _neg(run: Interpreter, node: fx.Node) -> Value:
    a = run.run(node.args[0])
    if isinstance(a, Distance) and not a.absolute:
        return Distance(-a.sign, -a.offset)
    return _arithmetic(a, Num(-1), lambda x, y: x * y)


@rule("eq", "ne")
def _equal(run: Interpreter, node: fx.Node) -> Value:
    a, b = run.run(node.args[0]), run.run(node.args[1])
    wanted = plain_name(node) == "eq"
    if isinstance(a, Num):
        a, b = b, a
    if isinstance(a, Table) and not a.boolean and isinstance(b, Num) and b.value == 0:
        return domain.upright(Select(frozenset([replace(a, boolean=True)]), not wanted, wanted))
    a = as_select(run.zero_or_one(a) if isinstance(b, Num) else a)
    if isinstance(b, Num) and known(b.value):
        if isinstance(a, Num) and known(a.value):
            return Num((number(a.value) == number(b.value)) == wanted)
        if isinstance(a, Select):
            return Select(a.atoms, (a.on == b.value) == wanted, (a.off == b.value) == wanted)
    if isinstance(a, Table) and isinstance(b, Table) and {a.column, b.column} == {KEY, QUERY}:
        return Opaque("the attention mask is block-diagonal: packed sequences")
    return first_opaque(a, b, "the attention mask tests data for equality")


@rule("le", "lt", "ge", "gt")
def _compare(run: Interpreter, node: fx.Node) -> Value:
    a, b = run.run(node.args[0]), run.run(node.args[1])
    a, b = as_select(run.zero_or_one(a) if isinstance(b, Num) else a), as_select(b)
    if isinstance(a, Select) and isinstance(b, Num):
        on = domain.compare(plain_name(node), Num(a.on), b)
        off = domain.compare(plain_name(node), Num(a.off), b)
        if isinstance(on, Num) and isinstance(off, Num):
            return Select(a.atoms, on.value, off.value)
    if isinstance(a, Opaque) or isinstance(b, Opaque):
        return first_opaque(a, b, "")
    return domain.compare(plain_name(node), a, b)


@rule("and", "bitwise_and", "logical_and")
def _and(run: Interpreter, node: fx.Node) -> Value:
    return _both(*_conditions(run, node))


@rule("or", "bitwise_or", "logical_or")
def _or(run: Interpreter, node: fx.Node) -> Value:
    return _not(_both(*map(_not, _conditions(run, node))))


@rule("invert", "not", "logical_not", "bitwise_not")
def _invert(run: Interpreter, node: fx.Node) -> Value:
    (a,) = _conditions(run, node)
    return _not(a)


def _conditions(run: Interpreter, node: fx.Node) -> list[Value]:
    """The operands as bools."""
    fake, found = tensor(node), [run.run(x) for x in node.args]
    if fake is None or fake.dtype != torch.bool:
        return [Opaque("the attention mask joins integers bit by bit")] * len(found)
    return [as_select(domain.cast(value, "bool")) for value in found]


def _both(a: Value, b: Value) -> Value:
    a, b = domain.upright(a), domain.upright(b)
    if isinstance(a, Num):
        a, b = b, a
    if isinstance(b, Num):
        return a if b.value else b
    if isinstance(a, Select) and isinstance(b, Select) and a.on is b.on is True:
        return Select(a.atoms | b.atoms, True, False)
    return first_opaque(a, b, EITHER)


def _not(a: Value) -> Value:
    if isinstance(a, Num):
        return Num(not a.value)
    if isinstance(a, Select):
        return Select(a.atoms, not a.on, not a.off)
    return first_opaque(a, a, "the attention mask inverts data")


@rule("where")
def _where(run: Interpreter, node: fx.Node) -> Value:
    if len(node.args) < 3:
        return Opaque("the attention mask uses where without values")
    return choose(*(run.run(a) for a in node.args[:3]))


@rule("masked_fill")
def _masked_fill(run: Interpreter, node: fx.Node) -> Value:
    source, where, filling = (run.run(a) for a in node.args[:3])
    return choose(where, filling, source)


def choose(where: Value, yes: Value, no: Value) -> Value:
    """`yes` where the condition holds, else `no`."""
    where, yes, no = as_select(where), as_select(yes), as_select(no)
    if isinstance(where, Num) and isinstance(where.value, bool):
        return yes if where.value else no
    if isinstance(where, Select) and isinstance(where.on, bool):
        if not where.on:
            yes, no = no, yes
        inside, outside = _part(yes, where.atoms, "on"), _part(no, where.atoms, "off")
        if inside is not None and outside is not None:
            return Select(where.atoms, inside, outside)
        if isinstance(yes, Select) and isinstance(no, Num) and yes.off == no.value:
            return Select(where.atoms | yes.atoms, yes.on, yes.off)
        if isinstance(yes, Num) and isinstance(no, Select) and yes.value == no.off:
            shown = domain.complement(where.atoms)
            if shown is not None:
                return Select(shown | no.atoms, no.on, no.off)
    otherwise = first_opaque(where, where, "the attention mask is a bias that depends on data")
    return first_opaque(yes, no, otherwise.reason)


def _part(value: Value, atoms: frozenset[domain.Atom], where: str) -> domain.Scalar | None:
    """The one number that a value is where all of `atoms` hold ("on") or not all ("off")."""
    if isinstance(value, Num):
        return value.value
    if isinstance(value, Select) and value.atoms == atoms:
        return value.on if where == "on" else value.off
    return None


@rule("tril", "triu")
def _triangle(run: Interpreter, node: fx.Node) -> Value:
    source, diagonal = run.run(node.args[0]), run.run(argument(node, 1, "diagonal", 0))
    if isinstance(source, Num) and isinstance(diagonal, Num):
        inside = Bound(plain_name(node) == "tril", sympy.sympify(diagonal.value))
        return Select(frozenset([inside]), source.value, 0)
    return first_opaque(source, diagonal, "the attention mask is a triangle of data")
