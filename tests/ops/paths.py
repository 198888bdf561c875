"""The implementations of the operator, each as a function of the same call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from bsfa_compile.ops import chunked, cpu, cpu_heads
from bsfa_compile.ops.call import Call, Gate, Result

Path = Callable[[Tensor, Tensor, Tensor, Call, Gate | None], Result]


@contextmanager
def small_pieces() -> Iterator[None]:
    """One tile and one kv head at a time, as in long calls."""
    with (
        mock.patch.object(cpu_heads, "SCORES_AT_ONCE", 1),
        mock.patch.object(cpu, "HEADS_AT_ONCE", 1),
        mock.patch.object(chunked, "SCORES_AT_ONCE", 1),
    ):
        yield


def on_cpu_in_pieces(q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None) -> Result:
    with small_pieces():
        return cpu.attention(q, k, v, call, gate)


def on_cpu_with_rows_split(
    q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None
) -> Result:
    """The rows of a head dealt out among threads."""

    def split(heads: int, rows: int) -> int:
        return next(parts for parts in (4, 2, 1) if rows % parts == 0)

    with mock.patch.object(cpu_heads, "_row_split", split):
        return cpu.attention(q, k, v, call, gate)


def chunks(q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None) -> Result:
    return chunked.attention(q, k, v, call, gate=gate)


def chunks_with_start_on_device(
    q: Tensor, k: Tensor, v: Tensor, call: Call, gate: Gate | None
) -> Result:
    start = torch.tensor(call.geometry.q_start)
    moved = replace(call, geometry=replace(call.geometry, q_start=0), q_start_tensor=start)
    with small_pieces():
        return chunked.attention(q, k, v, moved, gate=gate)


PATHS: list[Path] = [
    cpu.attention,
    on_cpu_in_pieces,
    on_cpu_with_rows_split,
    chunks,
    chunks_with_start_on_device,
]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
