"""What a tensor that helps to build an attention mask can be known to be, whatever its size.

Axes count from the right: keys are axis -1, queries -2, batch -4. No value depends on an axis of
size 1, so broadcasting never changes what a value says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import sympy
from torch import fx

KEY, QUERY, BATCH = -1, -2, -4
EITHER = "the attention mask joins two masks by 'or'"

Scalar: TypeAlias = Any  # bool, int, float, or a sympy expression in integer symbols


@dataclass(frozen=True)
class Num:
    """The same number everywhere; a sympy expression if it is known by its symbols only."""

    value: Scalar


@dataclass(frozen=True)
class Index:
    """The position along one axis, plus an offset."""

    axis: int
    offset: sympy.Expr


@dataclass(frozen=True)
class Distance:
    """sign * (key - query) + offset, or its absolute value."""

    sign: int
    offset: sympy.Expr
    absolute: bool = False


@dataclass(frozen=True)
class Table:
    """Entries of a tensor [rows, columns] that only the run knows: node[row axis, column axis].

    `row` None: the same for all rows. `boolean`: whether each entry has become `entry != 0`.
    `why`: why its entries are not understood. `negated`: the bool entries are `entry == 0`.
    """

    node: fx.Node
    row: int | None
    column: int
    offset: sympy.Expr
    boolean: bool
    why: str = field(compare=False)
    negated: bool = False


@dataclass(frozen=True)
class Bound:
    """key - query <= limit if `upper`, else key - query >= limit."""

    upper: bool
    limit: sympy.Expr


Atom = Bound | Table


@dataclass(frozen=True)
class Select:
    """`on` where every atom holds, `off` elsewhere."""

    atoms: frozenset[Atom]
    on: Scalar
    off: Scalar


@dataclass(frozen=True)
class Opaque:
    """Not understood, and why."""

    reason: str


Value = Num | Index | Distance | Table | Select | Opaque


def number(value: Scalar) -> Scalar:
    """Sympy's constants as Python numbers."""
    if isinstance(value, sympy.Integer):
        return int(value)
    if isinstance(value, sympy.logic.boolalg.BooleanAtom):
        return bool(value)
    return value


def at_most(a: Scalar, b: Scalar) -> bool:
    """Whether a <= b, both known."""
    return known(a) and known(b) and bool(number(a) <= number(b))


def known(value: Scalar) -> bool:
    """Whether a number is known, not only its symbols."""
    return not isinstance(number(value), sympy.Expr)


def axes(value: Value) -> set[int]:
    """The axes along which a value may change."""
    if isinstance(value, Index):
        return {value.axis}
    if isinstance(value, Distance | Bound):
        return {KEY, QUERY}
    if isinstance(value, Table):
        return {value.column} if value.row is None else {value.row, value.column}
    if isinstance(value, Select):
        return set().union(
            *({KEY, QUERY} if isinstance(a, Bound) else axes(a) for a in value.atoms)
        )
    return set()


def moved(value: Value, to: dict[int, int]) -> Value:
    """The value after its axes were moved; `to` lacks axes that disappeared."""
    if any(axis not in to for axis in axes(value)):
        return Opaque("an attention mask is indexed in a way that is not understood")
    if isinstance(value, Index):
        return replace(value, axis=to[value.axis])
    if isinstance(value, Table):
        row = None if value.row is None else to[value.row]
        return replace(value, row=row, column=to[value.column])
    if _bounded(value) and {to[KEY], to[QUERY]} != {KEY, QUERY}:
        return Opaque("an attention mask is reshaped")
    if isinstance(value, Distance) and to[KEY] != KEY:
        return replace(value, sign=-value.sign)
    if isinstance(value, Select):
        return replace(value, atoms=frozenset(_moved_atom(a, to) for a in value.atoms))
    return value


def _bounded(value: Value) -> bool:
    """Whether the value says something of key - query, which only axes -1 and -2 can be."""
    if isinstance(value, Select):
        return any(isinstance(atom, Bound) for atom in value.atoms)
    return isinstance(value, Distance)


def _moved_atom(atom: Atom, to: dict[int, int]) -> Atom:
    if isinstance(atom, Table):
        row = None if atom.row is None else to[atom.row]
        return replace(atom, row=row, column=to[atom.column])
    return atom if to[KEY] == KEY else Bound(not atom.upper, -atom.limit)


def as_select(value: Value) -> Value:
    """A table of bools as a mask; anything else unchanged."""
    if isinstance(value, Table) and value.boolean:
        return Select(frozenset([value]), True, False)
    return value


def cast(value: Value, kind: str) -> Value:
    """The value converted to "bool", "int" or "float"."""
    if isinstance(value, Table):
        if kind == "bool" or not value.boolean:
            return replace(value, boolean=value.boolean or kind == "bool")
        value = as_select(value)
    if isinstance(value, Num):
        if kind == "bool" and not known(value.value):
            return Opaque("an attention mask depends on a number that only the run knows")
        return Num(_convert(value.value, kind))
    if isinstance(value, Select):
        return replace(value, on=_convert(value.on, kind), off=_convert(value.off, kind))
    if isinstance(value, Index | Distance) and kind == "bool":
        return Opaque("an attention mask tests positions for zero")
    return value


def _convert(value: Scalar, kind: str) -> Scalar:
    value = number(value)
    if isinstance(value, sympy.Expr):
        return value
    if kind == "bool":
        return bool(value)
    if kind == "float":
        return float(value)
    return int(value) if math.isfinite(value) else value


def upright(value: Value) -> Value:
    """A mask with `on` as what is shown (True, or 0 to be added), if it can be turned round."""
    if not isinstance(value, Select):
        return value
    added = not isinstance(value.off, bool) and value.off == 0 and value.on != 0
    if added or (value.on is False and value.off is True):
        atoms = complement(value.atoms)
        return value if atoms is None else Select(atoms, value.off, value.on)
    return value


def complement(atoms: frozenset[Atom]) -> frozenset[Atom] | None:
    """Atoms that hold exactly where not all of `atoms` do, if they can be said."""
    if len(atoms) == 1:
        (atom,) = atoms
        if isinstance(atom, Bound):
            step = 1 if atom.upper else -1
            return frozenset([Bound(not atom.upper, atom.limit + step)])
        if atom.boolean:
            return frozenset([replace(atom, negated=not atom.negated)])
    return None


def compare(name: str, a: Value, b: Value) -> Value:
    """a < b, a <= b, a > b or a >= b: "lt", "le", "gt", "ge"; positions are integers."""
    if name in ("gt", "ge"):
        name, a, b = {"gt": "lt", "ge": "le"}[name], b, a
    strict = 1 if name == "lt" else 0
    if isinstance(a, Num) and isinstance(b, Num):
        if known(a.value) and known(b.value):
            return Num(bool(a.value < b.value if strict else a.value <= b.value))
        answer = number(sympy.Le(a.value + strict, b.value))
        return Num(answer) if isinstance(answer, bool) else Opaque("a mask depends on lengths")
    if isinstance(a, Index) and isinstance(b, Index) and {a.axis, b.axis} == {KEY, QUERY}:
        # a + strict <= b, with a or b the key
        limit = b.offset - a.offset - strict
        return _bounds(Bound(True, limit) if a.axis == KEY else Bound(False, -limit))
    if isinstance(a, Distance) and isinstance(b, Num):
        limit = _most(b.value, strict)
        if not a.absolute:
            limit -= a.offset
            return _bounds(Bound(True, limit) if a.sign > 0 else Bound(False, -limit))
        # |key - query + c| <= limit
        return _bounds(Bound(True, limit - a.offset), Bound(False, -limit - a.offset))
    if isinstance(a, Num) and isinstance(b, Distance):
        if b.absolute:  # not the other way round
            inside = compare("le" if strict else "lt", b, a)
            return replace(inside, on=False, off=True) if isinstance(inside, Select) else inside
        flipped = replace(b, sign=-b.sign, offset=-b.offset)
        return compare(name, flipped, Num(-a.value))
    if isinstance(a, Num) and isinstance(b, Index) and at_most(a.value + strict, b.offset):
        return Num(True)
    return Opaque("a mask compares values other than the positions of key and query")


def _most(limit: Scalar, strict: int) -> sympy.Expr:
    """The largest integer that is at most `limit`, or less than it if `strict`."""
    if isinstance(limit, float) and math.isfinite(limit):
        return sympy.Integer(math.ceil(limit) - 1 if strict else math.floor(limit))
    return sympy.sympify(limit) - strict


def _bounds(*atoms: Bound) -> Select:
    return Select(frozenset(atoms), True, False)
