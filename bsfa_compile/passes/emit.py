"""Write into a graph what the operator needs of an understood mask: padding and query start."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from bsfa_compile.passes.masks import Meaning, Read
from bsfa_compile.passes.nodes import as_expr, is_one, same, symbol_nodes, tensor

Operand = int | fx.Node
aten = torch.ops.aten


def _terms(
    expression: sympy.Expr, held: Collection[sympy.Expr]
) -> list[tuple[int, sympy.Expr | None]] | None:
    """The expression as a sum of integer multiples of held expressions; None if it is none."""
    if expression in held:
        return [(1, expression)]
    terms: list[tuple[int, sympy.Expr | None]] = []
    for term in sympy.Add.make_args(sympy.expand(expression)):
        factor, rest = term.as_coeff_Mul()
        if not factor.is_Integer or (rest != 1 and rest not in held):
            return None
        terms.append((int(factor), None if rest == 1 else rest))
    return terms


def realisable(meaning: Meaning, site: fx.Node) -> bool:
    """Whether `Emitter` can compute all that the meaning needs before `site`."""
    held = symbol_nodes(site.graph, site)
    start = _terms(meaning.q_start, {*held, *(symbol for symbol, _ in meaning.scalars)})
    table = meaning.key_padding
    return start is not None and (table is None or _terms(table.offset, held) is not None)


class Emitter:
    """Inserts nodes into one graph, shared ones once however many sites use them.

    All are aten operators, so that the nodes may stand in Dynamo's, torch.export's and
    symbolic_trace's graphs alike. In an exported graph each gets the metadata that saving needs.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[object, ...], fx.Node] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call at the graph's insertion point."""
        node = self._graph.call_function(target, args, kwargs)
        inputs = node.all_input_nodes
        if inputs and all("val" in i.meta for i in inputs):
            known = [i.meta["val"] for i in inputs if isinstance(i.meta["val"], FakeTensor)]
            plain_args, plain_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            with known[0].fake_mode if known else nullcontext():
                node.meta["val"] = target(*plain_args, **plain_kwargs)
        return node

    def query_start(self, meaning: Meaning, site: fx.Node) -> tuple[Operand, fx.Node | None]:
        """(q_start, q_start_tensor int64 [] or None) for the operator."""
        scalars = {symbol: self._scalar(read) for symbol, read in meaning.scalars}
        start = self._sum(meaning.q_start, site, scalars)
        return (0, start) if scalars and isinstance(start, fx.Node) else (start, None)

    def span(
        self, meaning: Meaning, site: fx.Node, q: fx.Node, k: fx.Node
    ) -> tuple[Operand, Operand, Operand]:
        """(q_start, q_len, k_len) as integers; a start in a tensor counts as 0."""
        start = 0 if meaning.scalars else self._sum(meaning.q_start, site, {})
        with self._graph.inserting_before(site):
            return start, self._size(q, 2), self._size(k, 2)

    def key_padding(
        self, meaning: Meaning, site: fx.Node, q: fx.Node, k: fx.Node
    ) -> fx.Node | None:
        """bool [B, Lk], True where a key takes part; None if all do.

        A private copy, taken where the mask read it.
        """
        table, read = meaning.key_padding, meaning.padding_read
        fake, queries, keys = tensor(table.node if table else None), tensor(q), tensor(k)
        if table is None or read is None or fake is None or queries is None or keys is None:
            return None

        def copy() -> fx.Node:
            node = read.node
            if fake.dim() == 4:
                node = self.call(aten.select.int, self.call(aten.select.int, node, 1, 0), 1, 0)
            elif fake.dim() == 1:
                node = self.call(aten.unsqueeze.default, node, 0)
            if fake.dtype == torch.bool and not table.negated:
                return self.call(aten.clone.default, node)
            return self.call((aten.eq if table.negated else aten.ne).Scalar, node, 0)

        def fit() -> fx.Node:
            node = copied
            if not whole:
                start = self._sum(table.offset, site, {})
                stop = self._plus(start, self._size(k, 2))
                node = self.call(aten.slice.Tensor, node, 1, start, stop)
            return self.call(aten.expand.default, node, [self._size(q, 0), -1]) if repeat else node

        copied = self._once(("padding", read, table.negated), read.at, copy)
        whole = table.offset == 0 and same(fake.shape[-1], keys.shape[2])
        repeat = (fake.dim() == 1 or is_one(fake.shape[0])) and not is_one(queries.shape[0])
        if whole and not repeat:
            return copied
        return self._once(("fit", copied, table.offset, as_expr(keys.shape[2])), site, fit)

    def _scalar(self, read: Read) -> fx.Node:
        """A private copy int64 [] of an integer tensor, taken where the mask read it."""

        def make() -> fx.Node:
            flat = self.call(aten.reshape.default, read.node, [])
            return self.call(aten.clone.default, self.call(aten.to.dtype, flat, torch.int64))

        return self._once(("scalar", read), read.at, make)

    def _size(self, node: fx.Node, dim: int) -> Operand:
        fake = tensor(node)
        known = None if fake is None else fake.shape[dim]
        return known if type(known) is int else self.call(aten.sym_size.int, node, dim)

    def _sum(
        self, expression: sympy.Expr, site: fx.Node, scalars: Mapping[sympy.Dummy, fx.Node]
    ) -> Operand:
        """The value of an expression that is `realisable`, computed just before `site`."""
        held = {**symbol_nodes(self._graph, site), **scalars}
        total: Operand = 0
        with self._graph.inserting_before(site):
            # Plain numbers first: those are added up here, and a tensor joins last.
            terms = _terms(expression, held)
            assert terms is not None, "the expression is realisable"
            for factor, symbol in sorted(terms, key=lambda t: (t[1] is not None, t[1] in scalars)):
                part: Operand = factor if symbol is None else held[symbol]
                if symbol is not None and factor != 1:
                    times = aten.mul.Scalar if symbol in scalars else operator.mul
                    part = self.call(times, part, factor)
                total = self._plus(total, part, tensors=symbol in scalars)
        return total

    def _plus(self, a: Operand, b: Operand, *, tensors: bool = False) -> Operand:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0:
            return b
        if tensors:
            both = isinstance(a, fx.Node) and tensor(a) is not None
            return self.call(aten.add.Tensor if both else aten.add.Scalar, b, a)
        return self.call(operator.add, a, b)

    def _once(self, key: tuple[object, ...], at: fx.Node, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._made:
            with self._graph.inserting_before(at):
                self._made[key] = make()
        return self._made[key]
