"""What may be assumed of a graph's inputs: masks that a model keeps, padding masks of 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
from torch import Tensor, fx

from bsfa_compile.ops.held import Band, Claim, Padding, band, is_padding, readable
from bsfa_compile.passes.domain import Bound, Num, Select, Value
from bsfa_compile.passes.nodes import writers

_KEY = "bsfa_claim"


def mark(claims: Mapping[fx.Node, Claim]) -> None:
    """Note on the nodes what may be assumed of them; not if the graph itself writes to them."""
    for node, claim in claims.items():
        if not any(writers(node)):
            node.meta[_KEY] = claim


def claim_of(node: fx.Node) -> Claim | None:
    """What may be assumed of a node's tensor."""
    found: Claim | None = node.meta.get(_KEY)
    return found


def kept(tensor: object) -> Band | None:
    """What a tensor says that a model keeps; None for one that it learns, or that is no band."""
    return band(tensor) if readable(tensor) and isinstance(tensor, Tensor) else None


def from_module(node: fx.Node) -> bool:
    """Whether a graph reads a node's tensor from a module."""
    source = getattr(node, "_dynamo_source", None)
    origin = getattr(getattr(source, "guard_source", None), "name", "")
    return node.op == "get_attr" or origin.endswith("NN_MODULE")


def of_inputs(gm: fx.GraphModule, inputs: Sequence[object]) -> dict[fx.Node, Claim]:
    """Claims on the placeholders of Dynamo's graph, by the tensors that it is compiled with."""
    found: dict[fx.Node, Claim] = {}
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, tensor in zip(nodes, inputs, strict=True):
        claim = kept(tensor) if from_module(node) else None
        if claim is not None:
            found[node] = claim
        elif readable(tensor) and isinstance(tensor, Tensor) and is_padding(tensor):
            found[node] = Padding()
    return found


def of_buffers(gm: fx.GraphModule) -> dict[fx.Node, Claim]:
    """Claims on the buffers that a traced graph reads and nowhere writes to."""
    read: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            read.setdefault(str(node.target), []).append(node)
    found: dict[fx.Node, Claim] = {}
    for name, tensor in gm.named_buffers():
        nodes = read.get(name, [])
        if nodes and not any(any(writers(node)) for node in nodes):
            claim = kept(tensor)
            found |= {} if claim is None else dict.fromkeys(nodes, claim)
    return found


def value_of(claim: Band) -> Value:
    """A band as the interpreter's value."""
    bounds = [
        Bound(upper, sympy.Integer(limit))
        for upper, limit in ((True, claim.upper), (False, claim.lower))
        if limit is not None
    ]
    return Select(frozenset(bounds), claim.on, claim.off) if bounds else Num(claim.on)
