"""Masks that transformers is spared to build: they show what its own would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    create_causal_mask,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

import bsfa_compile  # noqa: F401  (registers attn_implementation="bsfa")
from bsfa_compile.huggingface.masks import LazyMask, make_mask, understood
from tests import zoo

limits = st.integers(1, 40)


@settings(max_examples=40)
@given(data=st.data())
def test_a_lazy_mask_shows_what_sdpa_shows(data: st.DataObject) -> None:
    q_length, past = data.draw(limits) + 1, data.draw(st.integers(0, 40))
    kv_offset = data.draw(st.integers(0, past))
    kv_length = past - kv_offset + q_length + data.draw(st.integers(0, 9))
    window = data.draw(limits)
    function = data.draw(
        st.sampled_from(
            [
                causal_mask_function,
                sliding_window_causal_mask_function(window),
                sliding_window_bidirectional_mask_function(window),
                and_masks(causal_mask_function, sliding_window_causal_mask_function(window)),
            ]
        )
    )
    padding = None
    if data.draw(st.booleans()):
        torch.manual_seed(data.draw(st.integers(0, 99)))
        padding = torch.rand(2, kv_offset + kv_length) < 0.8
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": past,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding,
        "allow_is_causal_skip": False,
    }
    wanted = sdpa_mask(**arguments)
    found = make_mask(**arguments)
    assert isinstance(found, LazyMask) and found.structure is not None
    assert torch.equal(found & found, wanted)
    assert torch.equal(_shown(found, wanted.shape), wanted)


def _shown(mask: LazyMask, shape: torch.Size) -> Tensor:
    """The mask that the operator makes of a structure."""
    s = mask.structure
    assert s is not None
    p = s.q_start + torch.arange(shape[2])[:, None]
    key = torch.arange(shape[3])[None, :]
    shown = torch.ones(shape[2], shape[3], dtype=torch.bool)
    if s.is_causal:
        shown &= key <= p
    if s.window is not None:
        shown &= key > p - s.window
        if not s.is_causal:
            shown &= key < p + s.window
    full = shown.expand(shape).clone()
    return full if s.key_padding is None else full & s.key_padding[:, None, None, :]


def test_functions_that_are_more_than_limits_are_not_understood() -> None:
    table = torch.zeros(1, 9)
    others: list[Any] = [
        or_masks(causal_mask_function, causal_mask_function),
        and_masks(causal_mask_function, lambda b, h, q, k: table[b, q] == table[b, k]),
        lambda b, h, q, k: k <= 3,
        lambda b, h, q, k: (k // 8) == (q // 8),
        lambda b, h, q, k: k <= 2 * q,
        lambda b, h, q, k: q >= 1,
    ]
    assert [understood(function) for function in others] == [None] * len(others)


def _left(length: int) -> Tensor:
    return torch.arange(length).expand(2, -1) >= torch.tensor([[0], [3]])


def test_writing_into_a_lazy_mask_ends_its_structure() -> None:
    model = zoo.build("llama")
    model.set_attn_implementation("bsfa")
    mask = create_causal_mask(model.config, torch.zeros(2, 8, 4), _left(8), None)
    assert isinstance(mask, LazyMask)
    assert mask.contiguous() is mask
    mask.logical_not_()
    assert mask.structure is None
    assert mask.dense()[1, 0, 0].all()


@pytest.mark.parametrize("inference", [False, True])
def test_writing_into_a_view_of_a_lazy_mask_ends_its_structure(inference: bool) -> None:
    model = zoo.build("llama")
    model.set_attn_implementation("bsfa")
    with torch.inference_mode(inference):
        mask = create_causal_mask(model.config, torch.zeros(2, 8, 4), _left(8), None)
        assert isinstance(mask, LazyMask) and not mask[..., 4:].all()
        assert mask.structure is not None  # it was only looked at
        mask[..., :5] = False
    assert mask.structure is None
    assert not mask.dense()[..., :5].any()


def test_a_lazy_mask_moves_to_another_device_unmade() -> None:
    """As accelerate moves it between layers on several devices; "meta" stands for another card."""
    model = zoo.build("llama")
    model.set_attn_implementation("bsfa")
    mask = create_causal_mask(model.config, torch.zeros(2, 8, 4), _left(8), None)
    assert isinstance(mask, LazyMask) and mask.structure is not None
    there = mask.to("meta", non_blocking=True)
    assert isinstance(there, LazyMask) and there.structure is not None
    assert there.device.type == "meta" and there.shape == mask.shape
    padding = there.structure.key_padding
    assert padding is not None and padding.device.type == "meta"
    assert there.structure == replace(mask.structure, key_padding=padding)
    assert there.dense().device.type == "meta"
    assert not isinstance(mask.to(torch.float32), LazyMask)
    mask.logical_not_()
    assert not isinstance(mask.to("meta"), LazyMask)
