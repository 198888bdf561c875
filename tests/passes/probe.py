"""One attention call under a mask that a test builds: how it is traced, what is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bsfa_compile.ops import reference
from bsfa_compile.ops.tiles import Geometry
from bsfa_compile.passes.emit import Emitter
from bsfa_compile.passes.masks import Meaning
from bsfa_compile.passes.sites import Site, find

MakeMask = Callable[..., Tensor]


class Probe(nn.Module):
    """attention(q, k, k) under make(q, k, *more)."""

    def __init__(self, make: MakeMask) -> None:
        super().__init__()
        self.make = make

    def forward(self, q: Tensor, k: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, attn_mask=self.make(q, k, *more))


@dataclass
class Found:
    """What the recogniser said, and what mask, padding and query start were in the run."""

    reason: str | None
    meaning: Meaning | None
    mask: Tensor
    padding: Tensor | None
    q_start: int

    def shown(self, q_len: int, k_len: int, batch: int) -> Tensor:
        """bool [B, Lq, Lk]: what the operator will show."""
        assert self.meaning is not None
        geometry = Geometry(
            q_len=q_len,
            k_len=k_len,
            q_start=self.q_start,
            is_causal=self.meaning.is_causal,
            window=self.meaning.window,
        )
        return reference.visibility(geometry, self.padding, batch)

    def wanted(self, q_len: int, k_len: int, batch: int) -> Tensor:
        """bool [B, Lq, Lk]: what the mask itself shows."""
        shows = self.mask if self.mask.dtype == torch.bool else self.mask == 0
        shows = shows[:, :1] if shows.dim() == 4 else shows[None, None]
        return shows.expand(batch, 1, q_len, k_len)[:, 0]


def _recording(gm: fx.GraphModule, site: Site) -> fx.GraphModule:
    """The graph with the mask, the padding and the start of the site as its outputs."""
    mapping: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.graph_copy(gm.graph, mapping)
    other = fx.GraphModule(gm, graph)
    graph.output(None)
    (copy,) = find(other)
    node = copy.node
    outputs: list[Any] = [node.kwargs.get("attn_mask", node.args[3:4] or [None])]
    padding = start = tensor = None
    if copy.meaning is not None and copy.q is not None and copy.k is not None:
        emitter = Emitter(graph)
        padding = emitter.key_padding(copy.meaning, node, copy.q, copy.k)
        start, tensor = emitter.query_start(copy.meaning, node)
    mask = outputs[0][0] if isinstance(outputs[0], (list, tuple)) else outputs[0]
    (last,) = (n for n in graph.nodes if n.op == "output")
    last.args = ((mask, padding, start if tensor is None else tensor),)
    other.recompile()
    return other


def _watch(gm: fx.GraphModule) -> Callable[..., Found]:
    """Look at the graph now; what is returned tells the numbers of a run."""
    (site,) = find(gm)
    recording = _recording(gm, site)

    def run(*args: Any) -> Found:
        mask, padding, start = recording(*args)
        return Found(site.reason, site.meaning, mask, padding, int(start or 0))

    return run


def traced(make: MakeMask, args: tuple[Tensor, ...], *, by: str = "dynamo") -> tuple[Found, Tensor]:
    """What is found in the graph that `by` makes, and the output.

    by: "dynamo", "dynamic" (the lengths are symbols) or "export".
    """
    module, found = Probe(make).eval(), []
    if by == "export":
        program = torch.export.export(module, args).module()
        assert isinstance(program, fx.GraphModule)
        found.append(_watch(program)(*(a.clone() for a in args)))
        return found[0], program(*(a.clone() for a in args))

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        watch = _watch(gm)

        def run(*inputs: Any) -> Any:
            # A copy runs first: the graph may overwrite its inputs.
            found.append(watch(*(i.clone() if isinstance(i, Tensor) else i for i in inputs)))
            return gm.forward(*inputs)

        return run

    torch._dynamo.reset()
    copies = tuple(a.clone() for a in args)
    if by == "dynamic":
        for tensor in copies:
            if tensor.dim() > 1:
                torch._dynamo.mark_dynamic(tensor, 2 if tensor.dim() == 4 else 1)
    output = torch.compile(module, backend=backend, fullgraph=True)(*copies)
    return found[0], output


B, H, LQ, LK, D = 2, 3, 10, 10, 4
INF = math.inf


def indices(n: int) -> Tensor:
    return torch.arange(n)


def by_tril(q: Tensor, k: Tensor) -> Tensor:
    return torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))


def sample_padding() -> Tensor:
    mask = torch.ones(B, LK, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 7:] = 0
    return mask


def tensors(q_len: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, q_len, D), torch.randn(B, H, LK, D)
