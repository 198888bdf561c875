"""What an attention mask means to the operator: causal, query start, window, key padding.

A mask is understood or it is not: `recognise` answers a Meaning that shows exactly the scores the
mask shows, or the reason why it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
from torch import fx

from bsfa_compile.ops.held import Claim
from bsfa_compile.passes import rules_index, rules_logic
from bsfa_compile.passes.domain import (
    BATCH,
    EITHER,
    KEY,
    Atom,
    Bound,
    Num,
    Opaque,
    Select,
    Table,
    Value,
    as_select,
    complement,
    known,
    number,
    upright,
)
from bsfa_compile.passes.interpret import Interpreter
from bsfa_compile.passes.nodes import (
    aliases,
    as_expr,
    is_one,
    positions,
    same,
    settled,
    tensor,
    writers,
)

RULES = (rules_index, rules_logic)  # what `Interpreter` understands, by being imported
_ZERO = sympy.Integer(0)
# A finite number this low in an additive mask hides a score as -inf does: float16 can hold it,
# and no score reaches it. (Only where every query sees some key; else -inf is asked for.)
HIDDEN = -10000.0


@dataclass(frozen=True, kw_only=True)
class Read:
    """A tensor of the graph that the operator reads, as it is just before node `at` runs.

    Later the model may overwrite it: a static cache counts up its length before it attends.
    """

    node: fx.Node
    at: fx.Node


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """Query row r stands at position q_start + r and sees key c if

    c <= q_start + r (is_causal), q_start + r - window < c (window), key_padding[b, c].

    q_start: an expression in the graph's symbolic sizes and in the symbols of `scalars`.
    key_padding: a bool or integer table of the graph, read from column `offset` on.
    premises: inputs of the graph and what this assumes of each.
    """

    is_causal: bool = False
    q_start: sympy.Expr = _ZERO
    window: int | None = None
    key_padding: Table | None = None
    scalars: tuple[tuple[sympy.Dummy, Read], ...] = ()
    padding_read: Read | None = None
    premises: tuple[tuple[fx.Node, Claim], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fill:
    """scores.masked_fill(condition, value): a mask that is not added but filled in.

    shows: the scores stay where the condition holds, not where it does not.
    """

    condition: fx.Node
    value: object
    shows: bool = False


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A mask that is multiplied by a positive number before the softmax."""

    mask: fx.Node | Fill
    factor: float


Mask = fx.Node | Fill | Scaled


def recognise(masks: Sequence[Mask], site: fx.Node, q_len: object, k_len: object) -> Meaning | str:
    """The meaning of all `masks` of the attention node `site` together; a reason if unknown.

    A node is a mask that attn_mask of SDPA could be. q_len, k_len: sizes (int or SymInt) of the
    attention's query and key axes.
    """
    run = Interpreter()
    total: Value = Num(0.0)
    for mask in masks:
        found = upright(as_select(_value(run, mask)))
        total = found if len(masks) == 1 else rules_logic.added(total, found)
        if isinstance(total, Opaque):
            return total.reason
    nodes = [_node(mask) for mask in masks]
    if isinstance(total, Num) and known(total.value):
        shows = total.value is True or (not isinstance(total.value, bool) and total.value == 0)
        if not shows:
            return "the attention mask is one number everywhere"
        return _with_reads(Meaning(), run, nodes, site)
    if isinstance(total, Table):
        return total.why
    if not isinstance(total, Select):
        return "the attention mask is a bias that depends on positions or data"
    for node in nodes:
        if (why := _wrong_shape(node, q_len, k_len)) is not None:
            return why
    meaning = _meaning(total, run, as_expr(q_len) - as_expr(k_len))
    return meaning if isinstance(meaning, str) else _with_reads(meaning, run, nodes, site)


def _node(mask: Mask) -> fx.Node:
    """The node that has the shape of the scores."""
    if isinstance(mask, Scaled):
        return _node(mask.mask)
    return mask.condition if isinstance(mask, Fill) else mask


def _value(run: Interpreter, mask: Mask) -> Value:
    if isinstance(mask, Scaled):
        return rules_logic.times(_value(run, mask.mask), mask.factor)
    if isinstance(mask, fx.Node):
        return run.run(mask)
    fill = mask
    where, filling = run.run(fill.condition), run.run(fill.value)
    inside, outside = (Num(0.0), filling) if fill.shows else (filling, Num(0.0))
    return rules_logic.choose(where, inside, outside)


def _wrong_shape(mask: fx.Node, q_len: object, k_len: object) -> str | None:
    fake = tensor(mask)
    if fake is None:
        return "the graph does not know the shape of the attention mask"
    if fake.dim() not in (2, 3, 4):
        return f"the attention mask has {fake.dim()} axes"
    rows = same(fake.shape[-2], q_len) or is_one(fake.shape[-2])
    if not same(fake.shape[-1], k_len) or not rows:
        return "the attention mask does not have the shape of the scores"
    return None


def _meaning(found: Select, run: Interpreter, beyond: sympy.Expr) -> Meaning | str:
    """beyond: how many more queries than keys there are."""
    atoms: frozenset[Atom] | None = found.atoms
    shown, hidden = found.on, found.off
    if shown is False:
        atoms, shown, hidden = complement(found.atoms), hidden, shown
    if atoms is None:
        return EITHER
    additive = not isinstance(shown, bool)
    if additive and (shown != 0 or not known(hidden) or not hidden <= HIDDEN):
        return "the attention mask is a bias, not only hidden or shown"
    if not additive and (shown, hidden) != (True, False):
        return "the attention mask is the same everywhere"
    meaning = _limits([a for a in atoms if isinstance(a, Bound)], run)
    tables = [a for a in atoms if isinstance(a, Table)]
    if isinstance(meaning, str) or not (additive or tables):
        return meaning
    if len(tables) > 1:
        return "the attention mask joins several padding masks"
    if additive and hidden != -math.inf:
        # A row that sees nothing would get the mean of all values, not zero. If each query's own
        # key is there, only queries that are padding themselves see nothing.
        outside = number(sympy.expand(meaning.q_start + beyond))
        own_key = meaning.is_causal and known(outside) and outside <= 0
        plain = not meaning.is_causal and meaning.window is None and not tables[1:]
        some = plain and all(_shows_some(table, run) for table in tables)
        if not own_key and not some and (tables or meaning.window is not None):
            return "the attention mask adds finite numbers where rows may see nothing"
    if not tables:
        return meaning
    (table,) = tables
    if table.column != KEY or table.row not in (None, BATCH):
        return table.why
    if not run.nonnegative(table.offset):
        return "the padding mask may be read at negative positions"
    return replace(meaning, key_padding=table)


def _shows_some(table: Table, run: Interpreter) -> bool:
    """Whether each row of a padding mask shows some key, by what may be assumed of it."""
    return not table.negated and table.offset == 0 and run.padding(table)


def _limits(bounds: list[Bound], run: Interpreter) -> Meaning | str:
    """Causality and window from the bounds on key - query."""
    uppers = _distinct([b.limit for b in bounds if b.upper])
    lowers = _distinct([b.limit for b in bounds if not b.upper])
    if any(len(e) > 1 and not all(x.is_Integer for x in e) for e in (uppers, lowers)):
        return "the attention mask has several edges whose order is not known"
    if not uppers and not lowers:
        return Meaning()
    if not uppers:
        return "the attention mask hides old keys but no future ones"
    upper, width = min(uppers), None
    if lowers:
        lower = max(lowers)
        width = number(sympy.expand(upper - lower + 1))
        if not isinstance(width, int) or width < 1:
            return "the attention mask has a window of unknown width"
        if sympy.expand(upper + lower) == 0 and width > 1:
            return Meaning(window=(width + 1) // 2)
    if not run.nonnegative(upper):
        return "the attention mask may place queries before the first key"
    return Meaning(is_causal=True, q_start=upper, window=width)


def _distinct(limits: list[sympy.Expr]) -> list[sympy.Expr]:
    return list(dict.fromkeys(sympy.expand(limit) for limit in limits))


def _with_reads(
    meaning: Meaning, run: Interpreter, masks: Sequence[fx.Node], site: fx.Node
) -> Meaning | str:
    """Refuse masks written in place; note where the tensors that the operator reads are read."""
    at = positions(site.graph)
    scalars = {s: n for s, n in run.scalars.items() if meaning.q_start.has(s)}
    table = meaning.key_padding
    leaves = [*scalars.values(), *([table.node] if table is not None else [])]
    families = {leaf: aliases(leaf) for leaf in leaves}
    data = set().union(*families.values())
    for node in run.values:
        computed = node.op in ("call_function", "call_method") and tensor(node) is not None
        if computed and node not in data and not all(settled(w) for w in writers(node)):
            return "the attention mask is written in place"
    reads = {}
    for leaf, family in families.items():
        later = [n for n in run.values if at[leaf] < at[n]]
        readers = [n for n in later if any(i in family for i in n.all_input_nodes)]
        if not family.isdisjoint(masks) or not readers:
            readers.append(site)
        first, last = min(readers, key=at.__getitem__), max(readers, key=at.__getitem__)
        if any(at[first] <= at[w] < at[last] for w in writers(leaf)):
            return "the attention mask reads a tensor that is overwritten meanwhile"
        reads[leaf] = Read(node=leaf, at=first)
    return replace(
        meaning,
        scalars=tuple((symbol, reads[node]) for symbol, node in scalars.items()),
        padding_read=reads[table.node] if table is not None else None,
        premises=tuple(run.premises.items()),
    )
