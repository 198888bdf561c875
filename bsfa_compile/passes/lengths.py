"""How long the inputs of a graph's attention are, from the graph's arguments: no tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from bsfa_compile.ops.tiles import reached
from bsfa_compile.passes.nodes import as_expr, tensor, value
from bsfa_compile.passes.sites import Site


@dataclass(frozen=True, kw_only=True)
class Span:
    """The sizes of an attention call, in a graph's symbols."""

    q_start: sympy.Expr
    q_len: sympy.Expr
    k_len: sympy.Expr
    is_causal: bool
    window: int | None

    @property
    def sizes(self) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
        """q_start, q_len, k_len."""
        return self.q_start, self.q_len, self.k_len

    @property
    def symbols(self) -> set[sympy.Basic]:
        """What its sizes depend on."""
        return set().union(*(size.free_symbols for size in self.sizes))


def span_of(site: Site) -> Span:
    """The span of a site without a reason to stay dense. A start in a tensor counts as 0: reading
    it would wait for the device."""
    meaning, q, k = site.meaning, tensor(site.q), tensor(site.k)
    assert meaning is not None and q is not None and k is not None, "the site is understood"
    unread = {symbol: sympy.Integer(0) for symbol, _ in meaning.scalars}
    return Span(
        q_start=meaning.q_start.xreplace(unread),
        q_len=as_expr(q.shape[2]),
        k_len=as_expr(k.shape[2]),
        is_causal=meaning.is_causal,
        window=meaning.window,
    )


def measure(
    graph: fx.Graph, sites: Iterable[Site]
) -> Callable[[Sequence[Any]], Iterator[tuple[int, int]]]:
    """A function from a graph's arguments to what its sites reach, each distinct span once.

    A span in symbols that no argument tells is left out.
    """
    sources = _sources(graph)
    spans = [s for s in dict.fromkeys(map(span_of, sites)) if s.symbols <= sources.keys()]
    needed = set().union(*(span.symbols for span in spans))
    sources = {symbol: source for symbol, source in sources.items() if symbol in needed}

    def measured(args: Sequence[Any]) -> Iterator[tuple[int, int]]:
        known = {
            symbol: sympy.Integer(args[i] if dim is None else args[i].shape[dim])
            for symbol, (i, dim) in sources.items()
        }
        for span in spans:
            start, q_len, k_len = (int(size.xreplace(known)) for size in span.sizes)
            yield reached(start, q_len, k_len, span.is_causal, span.window)

    return measured


def _sources(graph: fx.Graph) -> dict[sympy.Basic, tuple[int, int | None]]:
    """Symbol -> (number of the argument, its axis, None for an integer)."""
    found: dict[sympy.Basic, tuple[int, int | None]] = {}
    for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        known = value(node)
        sizes: Iterable[tuple[int | None, object]] = ()
        if isinstance(known, torch.SymInt):
            sizes = [(None, known)]
        elif isinstance(known, Tensor):
            sizes = enumerate(known.shape)
        for dim, size in sizes:
            expression = as_expr(size)
            if expression.is_Symbol:
                found.setdefault(expression, (i, dim))
    return found
