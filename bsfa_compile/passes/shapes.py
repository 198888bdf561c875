"""Fake values with symbolic sizes for a graph traced without any (torch.fx.symbolic_trace)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


class _Shapes(fx.Interpreter):
    """Gives every node a fake value whose sizes are symbols, from one sample of the inputs."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        # Equal sizes in one sample need not be equal in the next: no duck shaping.
        self.mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)

    def symbolic(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        dynamic = [DimDynamic.DYNAMIC] * value.dim()
        if value.dim() == 4:
            # [batch, heads, length, head_dim]: a model's heads and their size do not vary.
            dynamic[1] = dynamic[3] = DimDynamic.STATIC
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
            dynamic_sizes=dynamic
        )
        return self.mode.from_tensor(value, symbolic_context=context)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and not isinstance(result, FakeTensor):
            result = self.mode.from_tensor(result, static_shapes=True)
        if n.op != "output" and isinstance(result, Tensor | torch.SymInt | int | float | bool):
            n.meta["val"] = result
        return result


def annotate(gm: fx.GraphModule, sample: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Annotate the graph's nodes with fake values; of no effect if tracing did already."""
    if any("val" in node.meta or "example_value" in node.meta for node in gm.graph.nodes):
        return
    shapes = _Shapes(gm)
    args = [shapes.symbolic(a) for a in _positional(gm, *sample)]
    with shapes.mode, torch.no_grad():
        shapes.run(*args)


def _positional(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """A call's arguments in the order of the graph's placeholders."""
    given, rest = [], list(args)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if rest:
                given.append(rest.pop(0))
            elif str(node.target) in kwargs:
                given.append(kwargs[str(node.target)])
            elif node.args:
                given.append(node.args[0])
    return given
