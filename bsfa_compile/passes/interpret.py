"""Abstract interpretation: what each node of the subgraph that builds a mask is, by `domain`.

One small rule per operation (rules_index, rules_logic); the same rules serve Dynamo's,
torch.export's and symbolic_trace's graphs. What has no rule is opaque, unless it is a small table
or a scalar that the operator can read at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bsfa_compile.ops.held import Band, Claim, Padding
from bsfa_compile.passes import domain
from bsfa_compile.passes.claims import claim_of, from_module, value_of
from bsfa_compile.passes.domain import (
    KEY,
    Distance,
    Index,
    Num,
    Opaque,
    Select,
    Table,
    Value,
)
from bsfa_compile.passes.nodes import as_expr, is_one, mutated, plain_name, settled, tensor, value

Rule = Callable[["Interpreter", fx.Node], Value]
RULES: dict[str, Rule] = {}
_WIDE = (torch.int32, torch.int64, torch.float32, torch.float64)  # exact at every position
KEPT = "the attention mask is a table of the model that is no band, or that is written to"
LEARNED = "the attention mask is a bias that the model learned"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule for the operations of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """An argument of a call, however it was passed."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


class Interpreter:
    """Evaluates nodes of one graph; remembers what it visited, the scalars it met, and what it
    assumed of the graph's inputs (`premises`).
    """

    def __init__(self) -> None:
        self.values: dict[fx.Node, Value] = {}
        self.scalars: dict[sympy.Dummy, fx.Node] = {}
        self.premises: dict[fx.Node, Claim] = {}
        self._shape_env: ShapeEnv | None = None
        self._may_guard = False

    def run(self, node: object) -> Value:
        """What an argument of an operation is: a node or a plain number."""
        if isinstance(node, bool | int | float):
            return Num(node)
        if not isinstance(node, fx.Node):
            return Opaque("an attention mask is built from something that is no tensor")
        if node not in self.values:
            self.values[node] = Opaque("an attention mask refers to itself")
            self.values[node] = self._settle(node, self._apply(node))
        return self.values[node]

    def _apply(self, node: fx.Node) -> Value:
        known_value = value(node)
        if isinstance(known_value, bool | int | float):
            return Num(known_value)
        if isinstance(known_value, torch.SymInt):
            self._shape_env = known_value.node.shape_env
            self._may_guard = "example_value" in node.meta
            return Num(as_expr(known_value))
        if tensor(node) is None:
            return Opaque("the graph does not know the shape of the attention mask")
        if node.op in ("placeholder", "get_attr"):
            claim = claim_of(node)
            if isinstance(claim, Band):
                self.premises[node] = claim
                return value_of(claim)
            learned = isinstance(known_value, torch.nn.Parameter)
            if learned:
                return Opaque(LEARNED)
            return Opaque(
                KEPT if from_module(node) else "the attention mask is an input of the graph"
            )
        if mutated(node) and not settled(node):
            return Opaque("the attention mask is written in place")
        name = plain_name(node)
        if name not in RULES:
            return Opaque(f"the attention mask is built with {name!r}, which is not understood")
        return RULES[name](self, node)

    def nonnegative(self, expression: sympy.Expr) -> bool:
        """Whether an integer is >= 0; a scalar that only the run knows is trusted to be.

        Such a scalar is a cache's length or another position counted from 0. If symbolic sizes do
        not tell, Dynamo's sizes of now do, under a guard: other sizes will be traced anew.
        """
        expression = expression.subs({symbol: 0 for symbol in self.scalars})
        if isinstance(expression, sympy.Integer):
            return bool(expression >= 0)
        if self._shape_env is None:
            return False
        if self._shape_env.bound_sympy(expression).lower >= 0:
            return True
        return self._may_guard and bool(self._shape_env.evaluate_expr(sympy.Ge(expression, 0)))

    def zero_or_one(self, value: Value) -> Value:
        """A table of integers of which that may be assumed, as a mask of ones; else unchanged."""
        if isinstance(value, Table) and not value.boolean and self.padding(value):
            return Select(frozenset([replace(value, boolean=True)]), 1, 0)
        return value

    def padding(self, table: Table) -> bool:
        """Whether it may be assumed that a table is 0 and 1 and shows some key in each row."""
        claim = claim_of(table.node)
        if not isinstance(claim, Padding):
            return False
        self.premises[table.node] = claim
        return True

    def _settle(self, node: fx.Node, result: Value) -> Value:
        """Cast to the node's dtype, forget axes of size 1, take what is left as data."""
        fake = tensor(node)
        if fake is None:
            return result
        if isinstance(result, Opaque):
            result = self._data(node, fake, result)
        floating = fake.is_floating_point()
        boolean = fake.dtype == torch.bool
        result = domain.cast(result, "bool" if boolean else "float" if floating else "int")
        if isinstance(result, Select) and result.on == result.off:
            return Num(result.on)
        if isinstance(result, Index | Distance) and fake.dtype not in _WIDE:
            return Opaque(f"the attention mask counts positions in {fake.dtype}")
        if isinstance(result, Index) and is_one(fake.shape[result.axis]):
            return Num(result.offset)
        if any(is_one(fake.shape[axis]) for axis in domain.axes(result)):
            return Opaque("the attention mask is a single row or column")
        return result

    def _data(self, node: fx.Node, fake: torch.Tensor, opaque: Opaque) -> Value:
        """A scalar or a small table whose values only the run knows."""
        if fake.is_floating_point():
            return opaque
        if fake.dtype != torch.bool and all(is_one(n) for n in fake.shape):
            symbol = sympy.Dummy(node.name, integer=True)
            self.scalars[symbol] = node
            return Num(symbol)
        shape = fake.shape
        flat = fake.dim() in (1, 2) or (fake.dim() == 4 and is_one(shape[1]) and is_one(shape[2]))
        if not flat or is_one(shape[-1]):
            return opaque
        row = None if fake.dim() == 1 or is_one(shape[0]) else -fake.dim()
        boolean = fake.dtype == torch.bool
        return Table(node, row, KEY, sympy.Integer(0), boolean, opaque.reason)
