"""Operands passed by name, put where every rule looks for them."""

from __future__ import annotations

import torch
from torch import fx

from bsfa_compile.passes.nodes import PURE, plain_name, words

# Names of operands, in order; of all other operations here they are "input other".
_OPERANDS = {
    "baddbmm": "input batch1 batch2",
    "bmm": "input mat2",
    "cat": "tensors dim",
    "masked_fill": "input mask value",
    "repeat": "input repeats",
    "repeat_interleave": "input repeats dim",
    "stack": "tensors dim",
    "transpose": "input dim0 dim1",
    "where": "condition input other",
}
_ORDERED = PURE | words("cos exp floor_divide gather log pow sin stack")


def by_position(graph: fx.Graph) -> None:
    """Let operations take by position the operands that were passed by name."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or plain_name(node) not in _ORDERED:
            continue
        if node.op == "call_method" and node.target == "where" and len(node.args) == 3:
            kept, condition, other = node.args
            node.op, node.target = "call_function", torch.where
            node.args = (condition, kept, other)
        args, kwargs = list(node.args), dict(node.kwargs)
        for name in _OPERANDS.get(plain_name(node), "input other").split()[len(args) :]:
            if name not in kwargs:
                break
            args.append(kwargs.pop(name))
        node.args, node.kwargs = tuple(args), kwargs
