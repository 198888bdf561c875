"""The same on graphs: a torch.export.ExportedProgram and a torch.fx.GraphModule."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import bsfa_compile as bsfa


class TwoStreams(nn.Module):
    """Causal self-attention, then attention to a context, over [batch, heads, length, dim]."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(8 * x, x, x, is_causal=True)
        return nn.functional.scaled_dot_product_attention(8 * y, context, context)


def inputs() -> tuple[Tensor, Tensor]:
    """A sequence whose neighbours are alike, so that attention is local, and its first half."""
    walk = torch.randn(1, 4, 1024, 32).cumsum(dim=2)
    x = nn.functional.layer_norm(walk, [32])
    return x, x[:, :, :512].clone()


def main() -> list[bsfa.Report]:
    """Optimize both kinds of graph and run them; their reports."""
    torch.manual_seed(0)
    data = [inputs(), inputs()]
    exported = bsfa.optimize(
        torch.export.export(TwoStreams(), inputs()), data, bsfa.Budget(0.1), dense_if_faster=False
    )
    exported.module()(*inputs())
    traced = bsfa.optimize(
        fx.symbolic_trace(TwoStreams()), data, bsfa.Budget(0.1), dense_if_faster=False
    )
    traced(*inputs())
    reports = [bsfa.report(exported), bsfa.report(traced)]
    print(*reports, sep="\n")
    return reports


if __name__ == "__main__":
    main()
