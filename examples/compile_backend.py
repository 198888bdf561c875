"""Thresholds as a file, and the same rewrite as a torch.compile backend."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import bsfa_compile as bsfa


class Attention(nn.Module):
    """Causal self-attention over [batch, length, width]; queries and keys share a projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.project(x).chunk(2, dim=-1)
        )
        y = nn.functional.scaled_dot_product_attention(8 * q, q, v, is_causal=True)
        update: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return x + update


def drifting(length: int, width: int) -> Tensor:
    """A sequence whose neighbours are alike [1, length, width], so that attention is local."""
    walk = torch.randn(1, length, width).cumsum(dim=1)
    return nn.functional.layer_norm(walk, [width])


def main() -> tuple[Tensor, Tensor]:
    """Calibrate once, save, and compile with the saved thresholds: (dense, sparse) outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(128, 4), Attention(128, 4)).eval()
    calibration = bsfa.calibrate(model, [drifting(1024, 128) for _ in range(2)])
    x = drifting(1024, 128)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, "thresholds.safetensors")
        calibration.thresholds(bsfa.Budget(0.1)).save(path)
        print(f"thresholds: {path.stat().st_size} bytes")
        dense = model(x)
        compiled = torch.compile(
            model,
            backend="bsfa",
            options={"thresholds": str(path), "dense_if_faster": False},
        )
        sparse: Tensor = compiled(x)
    print(bsfa.report(model))
    print(f"largest change of an output: {(sparse - dense).abs().max():.4f}")
    return dense, sparse


if __name__ == "__main__":
    main()
