"""Which calls the kernels turn down, and why: what can be said without a card."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bsfa_compile.ops import launch, sm80
from bsfa_compile.ops.call import Call, Gate
from bsfa_compile.ops.tiles import Geometry

CALL = Call(
    geometry=Geometry(q_len=64, k_len=64, is_causal=True),
    q_start_tensor=None,
    key_padding_mask=None,
    scale=0.1,
    softcap=None,
)
INT8 = Gate(thresholds=torch.zeros(2), rule="relative", precision="int8")


def tensor(d: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, 64, 2, d).to(dtype).transpose(1, 2)


def test_the_cpu_is_a_reason() -> None:
    _, reason = launch.find(tensor(), tensor(), tensor(), CALL, None)
    assert reason == "q is on cpu; the kernels run on CUDA"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": tensor(dtype=torch.float32)}, "bfloat16 or float16"),
        ({"k": tensor(dtype=torch.float16)}, "all alike"),
        ({"k": tensor(128)[..., ::2]}, "last dimension has stride 2"),
        ({"v": tensor(65)[..., 1:]}, "multiples of 16 bytes"),
        ({"q": tensor()[:, :, :0]}, "empty"),
        ({"call": dataclasses.replace(CALL, scale=-0.1)}, "positive scale"),
        (
            {"call": dataclasses.replace(CALL, geometry=Geometry(q_len=64, k_len=64, block_k=32))},
            "tiles, not 128 x 32",
        ),
        (
            {"call": dataclasses.replace(CALL, geometry=Geometry(q_len=64, k_len=2**30))},
            "positions beyond",
        ),
        ({"gate": INT8}, "int8"),
    ],
)
def test_reasons(changes: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"q": tensor(), "k": tensor(), "v": tensor()}
    given |= {"call": CALL, "gate": None} | changes
    reason = sm80.reason(**given)
    assert reason is not None
    assert words in reason
