"""Memory grows with the length, not with its square; K and V are never repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bsfa_compile.ops import chunked, cpu, dense
from bsfa_compile.ops.call import Call, Gate, Result
from bsfa_compile.ops.chunked_backward import attention_backward
from bsfa_compile.ops.tiles import Geometry

HEADS, WIDTH = 4, 8


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation inside returned."""

    def __init__(self) -> None:
        initialise: Any = super().__init__
        initialise()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return result


def make(tokens: int, padded: bool) -> tuple[Tensor, Tensor, Call, Gate]:
    torch.manual_seed(0)
    q = 3 * torch.randn(1, HEADS, tokens, WIDTH)
    k = torch.randn(1, 1, tokens, WIDTH)
    padding = torch.arange(tokens)[None] >= 10 if padded else None
    call = Call(
        geometry=Geometry(q_len=tokens, k_len=tokens, is_causal=True),
        q_start_tensor=None,
        key_padding_mask=padding,
        scale=WIDTH**-0.5,
        softcap=None,
    )
    return q, k, call, Gate(thresholds=torch.zeros(HEADS), rule="relative", precision="exact")


def by_cpu(q: Tensor, k: Tensor, call: Call, gate: Gate) -> Result:
    return cpu.attention(q, k, k, call, gate)


def by_chunks(q: Tensor, k: Tensor, call: Call, gate: Gate) -> Result:
    return chunked.attention(q, k, k, call, gate=gate)


def by_fused_kernels(q: Tensor, k: Tensor, call: Call, gate: Gate) -> Result:
    return dense.attention(q, k, k, call)


@pytest.mark.parametrize("path", [by_cpu, by_chunks, by_fused_kernels])
@pytest.mark.parametrize("padded", [False, True])
def test_no_tensor_grows_with_the_square_of_the_length(
    path: Callable[[Tensor, Tensor, Call, Gate], Result], padded: bool
) -> None:
    largest, dropped = {}, {}
    for tokens in (4096, 8192):
        q, k, call, gate = make(tokens, padded)
        with Largest() as seen:
            result = path(q, k, call, gate)
        largest[tokens] = seen.elements
        dropped[tokens] = int(result.counts[:, 0].sum())
    assert largest[8192] < 8192 * 8192 * HEADS / 4 / 8
    assert largest[8192] <= 2.1 * largest[4096]
    assert (dropped[4096] > 0) == (path is not by_fused_kernels)


def test_cpu_scores_stay_in_one_small_buffer() -> None:
    q, k, call, gate = make(8192, padded=False)
    with Largest() as seen:
        cpu.attention(q, k, k, call, gate)
    assert seen.elements <= 2 * max(2**20, q.numel())


def test_gradients_take_memory_that_grows_with_the_length() -> None:
    largest = {}
    for tokens in (1024, 2048):
        q, k, call, gate = make(tokens, padded=False)
        gate = gate._replace(thresholds=torch.full((HEADS,), 2.0))
        result = cpu.attention(q, k, k, call, gate)
        assert int(result.counts[:, 0].sum()) > 0
        with Largest() as seen:
            attention_backward(
                result.out, result.lse, q, k, k, result.out, result.lse, result.tile_mask, call
            )
        largest[tokens] = seen.elements
    assert largest[2048] <= 2.1 * largest[1024]
