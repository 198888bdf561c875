"""Small models for tests of the compiler passes: sharp attention, every shape of frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds
from tests.oracle import Oracle

WIDTH, HEADS = 16, 2
BLOCKS: dict[str, Any] = {"block_q": 16, "block_k": 8}
EAGER: dict[str, Any] = {"inner": "eager", "dense_if_faster": False}


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """[B, L, E] -> [B, H, L, E / H]."""
    split: Tensor = x.unflatten(-1, (count, -1))
    return split.transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention of x [B, L, WIDTH]. `broken`: a graph break before the attention."""

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = heads(q), heads(k), heads(v)
        if self.broken:
            torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(2 * q, 2 * k, v, is_causal=True)
        projected: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """x + attention(norm(x)). `broken`: a graph break before the attention module is called."""

    def __init__(self, attention: nn.Module, *, broken: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = attention
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.broken:
            torch._dynamo.graph_break()
        result: Tensor = x + self.attn(y)
        return result


class Toy(nn.Module):
    """A stack of blocks over x [B, L, WIDTH]; float64, so that decisions are never a matter of
    rounding."""

    def __init__(
        self,
        layers: int = 2,
        *,
        broken: bool = False,
        attention: Callable[[], nn.Module] = Attention,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(attention(), broken=broken) for _ in range(layers))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def sample(length: int = 96, batch: int = 1, seed: int = 1) -> Tensor:
    """x [B, L, WIDTH], float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def thresholds(names: list[str], *, columns: int = 1) -> Thresholds:
    """Other thresholds for every site and head: -0.05, -0.1, ... in nats."""
    values = {}
    for i, name in enumerate(names):
        base = -0.05 * (1 + i) - 0.01 * torch.arange(HEADS, dtype=torch.float32)
        values[name] = base[:, None].expand(-1, columns).clone()
    return Thresholds(values=values, **BLOCKS)


def sites(layers: int = 2) -> list[str]:
    """Names of the attention sites of a Toy."""
    return [f"layers.{i}.attn" for i in range(layers)]


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The output, without gradients."""
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def expected(model: nn.Module, given: Thresholds, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Output and skip rates by the reference, of a causal model that is not optimized."""
    oracle = Oracle(model, given, causal=True, windows=dict.fromkeys(given.values), padding=None)
    with oracle.running():
        output: Tensor = model(x)
    return output, {name: d / c for name, (d, c) in oracle.counts.items()}


def skipped(model: Any) -> dict[str, float | None]:
    """Achieved skip rates of the rewritten sites."""
    return {site.name: site.skipped for site in bsfa.report(model).sites if site.rewritten}


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that an optimization could leave behind, by module."""
    return {
        name: (
            sorted(vars(module)),
            sorted(module._buffers),
            sorted(module._non_persistent_buffers_set),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    }
