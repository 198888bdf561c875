"""The public function: what it refuses, and that it passes on what it is given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.errors import BsfaError, InputError
from bsfa_compile.ops.attention import block_sparse_attention
from bsfa_compile.ops.tiles import Geometry
from tests.ops.cases import Case, assert_close

Q, K = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 30, 8)
META = torch.device("meta")

WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "q no tensor": ({"q": [1]}, ["q is list", "tensor"]),
    "q of 3 dimensions": ({"q": Q[0]}, ["q has shape [4, 20, 8]", "4 dimensions", "unsqueeze"]),
    "v of 5 dimensions": ({"v": K[None]}, ["v has shape [1, 2, 2, 30, 8]"]),
    "integers": ({"q": Q.int()}, ["q has dtype torch.int32", "float32", "Convert"]),
    "two dtypes": ({"k": K.half()}, ["k is torch.float16", "q is torch.float32", "k.to(q)"]),
    "two devices": ({"k": K.to(META)}, ["k is torch.float32 on meta", "on cpu"]),
    "two batch sizes": ({"q": Q[:1]}, ["[1, 4, 20, 8]", "[2, 2, 30, 8]", "one batch size"]),
    "k and v lengths": ({"v": K[:, :, :29]}, ["[2, 2, 29, 8]", "alike"]),
    "k and v heads": ({"v": K[:, :1]}, ["[2, 1, 30, 8]", "alike"]),
    "head dims": ({"q": Q[..., :7]}, ["[2, 4, 20, 7]", "same head_dim"]),
    "head dim 0": ({"q": Q[..., :0], "k": K[..., :0]}, ["at least 1"]),
    "head counts": ({"q": Q[:, :3]}, ["3 query heads over 2 key heads", "multiple"]),
    "no key heads": ({"k": K[:, :0], "v": K[:, :0]}, ["4 query heads over 0 key heads"]),
    "thresholds a number": ({"thresholds": -1.0}, ["thresholds are float", "torch.full((4,), t)"]),
    "thresholds integers": ({"thresholds": torch.zeros(4).int()}, ["torch.int32", "float32"]),
    "thresholds for 2 heads": ({"thresholds": torch.zeros(2)}, ["[2]", "[heads] = [4]"]),
    "thresholds transposed": ({"thresholds": torch.zeros(3, 4)}, ["[3, 4]", "[4, n >= 1]"]),
    "no threshold": ({"thresholds": torch.zeros(4, 0)}, ["[4, 0]", "n >= 1"]),
    "0-d thresholds": ({"thresholds": torch.tensor(0.0)}, ["[]", "[heads] = [4]"]),
    "thresholds elsewhere": ({"thresholds": torch.zeros(4, device=META)}, ["on meta", "on cpu"]),
    "window 0": ({"window": 0}, ["window is 0", "at least 1"]),
    "window a float": ({"window": 3.0}, ["window is 3.0 (float)", "int"]),
    "negative start": ({"q_start": -1}, ["q_start is -1", "at least 0"]),
    "start a float": ({"q_start": 1.0}, ["q_start is 1.0 (float)", "int"]),
    "start a bool": ({"q_start": True}, ["q_start is True (bool)"]),
    "start per batch row": ({"q_start": torch.zeros(2).long()}, ["[2]", "0-d int64"]),
    "start a float tensor": ({"q_start": torch.tensor(0.0)}, ["torch.float32", "0-d int64"]),
    "padding of integers": ({"key_padding_mask": torch.ones(2, 30).int()}, ["int32", ".bool()"]),
    "padding a list": ({"key_padding_mask": [True]}, ["is list", "bool tensor"]),
    "padding for q": (
        {"key_padding_mask": torch.ones(2, 20).bool()},
        ["[2, 20]", "[batch, k_len] = [2, 30]"],
    ),
    "a full mask": ({"key_padding_mask": torch.ones(2, 1, 20, 30).bool()}, ["[2, 1, 20, 30]"]),
    "padding elsewhere": (
        {"key_padding_mask": torch.ones(2, 30, device=META).bool()},
        ["on meta", "cpu"],
    ),
    "softcap 0": ({"softcap": 0.0}, ["softcap is 0.0", "positive", "no cap"]),
    "softcap endless": ({"softcap": math.inf}, ["softcap is inf", "finite"]),
    "negative scale": ({"scale": -1.0}, ["scale is -1.0", "positive", "0.35"]),
    "scale NaN": ({"scale": math.nan}, ["scale is nan"]),
    "scale a string": ({"scale": "1"}, ["scale is '1'"]),
    "gate": ({"gate": "max"}, ["gate is 'max'", "'relative', 'absolute'"]),
    "precision": ({"precision": "fp8"}, ["precision is 'fp8'", "'auto', 'exact', 'int8'"]),
    "sinks": ({"sink_tiles": -1}, ["sink_tiles is -1", "at least 0"]),
    "tile rows": ({"block_q": 0}, ["block_q is 0", "at least 1"]),
    "tile keys": ({"block_k": 6.0}, ["block_k is 6.0"]),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_refused_and_named(change: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        block_sparse_attention(**{"q": Q, "k": K, "v": K, **change})
    assert isinstance(caught.value, BsfaError) and isinstance(caught.value, ValueError)
    for words in said:
        assert words in str(caught.value)


def test_defaults_are_dense_attention_over_everything() -> None:
    wanted = F.scaled_dot_product_attention(Q, K, K, enable_gqa=True)
    assert_close(block_sparse_attention(Q, K, K), wanted)


def sparse_case() -> tuple[Case, Tensor, Tensor, Tensor, Tensor]:
    geometry = Geometry(q_len=20, k_len=30, q_start=10, is_causal=True, block_q=8, block_k=4)
    case = Case(batch=2, kv_heads=2, geometry=geometry)
    q, k, v = case.qkv()
    thresholds = case.thresholds(q, k)
    assert thresholds is not None
    return case, q, k, v, thresholds


@pytest.mark.parametrize(
    "start", [10, torch.tensor(10), torch.tensor(10, dtype=torch.int32)], ids=str
)
@pytest.mark.parametrize("gate", ["relative", "absolute"])
def test_arguments_reach_the_operator(start: int | Tensor, gate: str) -> None:
    case, q, k, v, _ = sparse_case()
    case = Case(**{**vars(case), "rule": gate}).moved(sink_tiles=2, window=25)
    case = Case(**{**vars(case), "softcap": 3.0, "padding": 0.8})
    thresholds = case.thresholds(q, k)
    assert thresholds is not None
    wanted, lse, kept = case.reference(q, k, v, thresholds)
    found = block_sparse_attention(
        q,
        k,
        v,
        thresholds,
        is_causal=True,
        q_start=start,
        window=25,
        key_padding_mask=case.key_padding_mask(),
        softcap=3.0,
        scale=case.scale,
        gate=gate,
        precision="exact",
        sink_tiles=2,
        return_lse=True,
        block_q=8,
        block_k=4,
    )
    everything = case.reference(q, k, v, torch.full((4,), -math.inf))[2]
    assert kept.sum() < everything.sum()
    assert_close(found[0], wanted)
    assert_close(found[1], lse)


def test_one_threshold_a_head_equals_a_row_of_them() -> None:
    _, q, k, v, thresholds = sparse_case()

    def run(limits: Tensor | None) -> Tensor:
        return block_sparse_attention(
            q, k, v, limits, is_causal=True, q_start=10, block_q=8, block_k=4
        )

    alone, in_rows = run(thresholds), run(thresholds[:, None].expand(-1, 3))
    doubles, dense = run(thresholds.double()), run(None)
    assert not torch.equal(alone, dense)
    assert torch.equal(alone, in_rows) and torch.equal(alone, doubles)


def test_a_nan_threshold_keeps_its_tiles() -> None:
    case, q, k, v, thresholds = sparse_case()
    kept = case.run(q, k, v, thresholds)[2]
    thresholds[0] = math.nan
    all_of_head_0 = case.run(q, k, v, thresholds)[2]
    assert torch.equal(all_of_head_0[:, 1:], kept[:, 1:])
    everything = case.run(q, k, v, torch.full((4,), -math.inf))[2]
    assert torch.equal(all_of_head_0[:, 0], everything[:, 0])
    assert kept[:, 0].sum() < everything[:, 0].sum()
