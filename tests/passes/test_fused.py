"""nn.MultiheadAttention and the nn.Transformer layers, which are single nodes under Dynamo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Calibration, Thresholds
from tests import toy

LENGTH = 96
SIZES: dict[str, Any] = {"nhead": toy.HEADS, "dim_feedforward": 32, "batch_first": True}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """One of torch's attention modules over x [B, L, WIDTH], with `options` for its call."""

    def __init__(self, inner: nn.Module, *, cross: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.cross, self.options = inner, cross, options
        self.double().eval()
        for name, parameter in self.named_parameters():
            if "in_proj" in name:
                nn.init.normal_(parameter)  # sharp attention

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        options = dict(self.options)
        if options.pop("causal", False):
            name = {"attn": "attn_mask", "src": "src_mask", "tgt": "tgt_mask"}[options.pop("mask")]
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            options[name] = mask
        if padding is not None:
            name = "key_padding_mask" if "need_weights" in options else "src_key_padding_mask"
            given = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)
            options[name] = given if "attn_mask" in options else padding  # of one dtype
        inputs = (x, x, x) if "need_weights" in options else (x, x) if self.cross else (x,)
        result = self.inner(*inputs, **options)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output


def attention(**more: Any) -> nn.Module:
    return nn.MultiheadAttention(toy.WIDTH, toy.HEADS, **{"batch_first": True, **more})


def layer(**more: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(toy.WIDTH, **SIZES, **more)


PLAIN: dict[str, Any] = {"need_weights": False}
CAUSAL: dict[str, Any] = {**PLAIN, "causal": True, "mask": "attn"}
MODELS: dict[str, tuple[Any, list[str], bool]] = {
    "plain": (lambda: Model(attention(), **PLAIN), ["inner"], False),
    "padded": (lambda: Model(attention(), **PLAIN), ["inner"], True),
    "no bias": (lambda: Model(attention(bias=False), **PLAIN), ["inner"], False),
    "sequence first": (lambda: Model(attention(batch_first=False), **PLAIN), ["inner"], False),
    "own sizes": (
        lambda: Model(attention(kdim=toy.WIDTH, vdim=toy.WIDTH), **PLAIN),
        ["inner"],
        False,
    ),
    "weights not used": (lambda: Model(attention(), need_weights=True), ["inner"], False),
    "mask": (lambda: Model(attention(), **CAUSAL), ["inner"], False),
    "mask and padding": (lambda: Model(attention(), **CAUSAL), ["inner"], True),
    "hint": (lambda: Model(attention(), **CAUSAL, is_causal=True), ["inner"], False),
    "layer": (lambda: Model(layer()), ["inner.self_attn"], False),
    "layer, norm first": (
        lambda: Model(layer(norm_first=True, activation="gelu"), causal=True, mask="src"),
        ["inner.self_attn"],
        False,
    ),
    "encoder": (
        lambda: Model(nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)),
        ["inner.layers.0.self_attn", "inner.layers.1.self_attn"],
        True,
    ),
    "decoder layer": (
        lambda: Model(
            nn.TransformerDecoderLayer(toy.WIDTH, **SIZES), cross=True, causal=True, mask="tgt"
        ),
        ["inner.self_attn", "inner.multihead_attn"],
        False,
    ),
}


def padding() -> Tensor:
    hidden = torch.zeros(2, LENGTH, dtype=torch.bool)
    hidden[0, 70:] = True
    return hidden


def calibrated(model: nn.Module, given: Any) -> Calibration:
    return bsfa.calibrate(model, given, **toy.BLOCKS, progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_fused_attention_is_opened(name: str) -> None:
    make, sites, padded = MODELS[name]
    batch_first = name != "sequence first"
    x = toy.sample(LENGTH, batch=2) if batch_first else toy.sample(2, batch=LENGTH)
    model, given = make(), (x, padding()) if padded else (x,)
    with torch.no_grad():
        dense = model(*given)
    calibration = calibrated(model, given)
    assert list(calibration.sites) == sites
    assert calibration.dense == {}
    rows = ~padding() if padded else slice(None)
    open_ = {site: torch.full((toy.HEADS, 1), -torch.inf) for site in sites}
    for thresholds in (
        Thresholds(values=open_, **toy.BLOCKS),
        calibration.thresholds(bsfa.Sparsity(0.3), "absolute"),
    ):
        torch._dynamo.reset()
        bsfa.apply(model, thresholds, fullgraph=True, **toy.EAGER)
        with torch.no_grad():
            got = model(*given)
        same = torch.allclose(got[rows], dense[rows])
        rates = toy.skipped(model)
        bsfa.revert(model)
        assert list(rates) == sites
        assert same == (thresholds.gate == "relative")
        assert same != any(rates.values())


def test_a_hint_that_torch_does_not_follow() -> None:
    """With weights asked for, `is_causal` stands for no mask: this one has a window."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = attention().double().eval()
            for parameter in self.inner.parameters():
                nn.init.normal_(parameter)

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[1])
            distance = places[None, :] - places[:, None]
            hidden = (distance > 0) | (distance < -60)
            out: Tensor = self.inner(x, x, x, attn_mask=hidden, is_causal=True)[0]
            return out

    model, x = Windowed(), toy.sample(LENGTH, batch=2)
    with torch.no_grad():
        dense = model(x)
        for value, same in ((-torch.inf, True), (-0.05, False)):
            values = {"inner": torch.full((toy.HEADS, 1), value)}
            bsfa.apply(model, Thresholds(values=values, **toy.BLOCKS), **toy.EAGER)
            assert torch.allclose(model(x), dense) == same
            assert (toy.skipped(model)["inner"] == 0) == same


def test_in_training_without_dropout_gradients_flow() -> None:
    model, x = Model(layer(dropout=0.0)), toy.sample(LENGTH)
    names = ["inner.self_attn"]
    bsfa.apply(model, toy.thresholds(names), fullgraph=True, **toy.EAGER)
    model.train()
    model(x).sum().backward()
    assert toy.skipped(model)["inner.self_attn"] is not None
    assert all(parameter.grad is not None for parameter in model.parameters())


class Weights(Model):
    """Uses the weights that attention returns."""

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y, weights = self.inner(x, x, x)
        output: Tensor = y + weights.mean()
        return output


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Weights(attention()), "need_weights=False"),
        (lambda: Model(attention(add_bias_kv=True), **PLAIN), "bias_k"),
        (lambda: Model(attention(add_zero_attn=True), **PLAIN), "add_zero_attn"),
    ],
)
def test_what_stays_closed_says_why(make: Any, reason: str) -> None:
    calibration = calibrated(make(), toy.sample(LENGTH))
    assert calibration.sites == {}
    (why,) = calibration.dense.values()
    assert reason in why


def test_the_fast_path_is_left_as_it_was() -> None:
    calibrated(Model(layer()), toy.sample(LENGTH))
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_backend_reaches_past_the_fast_path() -> None:
    model, x = Model(layer()), toy.sample(LENGTH)
    thresholds = toy.thresholds(["inner.self_attn"])
    options: Any = {"thresholds": thresholds, "inner": "eager", "dense_if_faster": False}
    compiled = torch.compile(model, backend="bsfa", options=options)
    with torch.no_grad():
        compiled(x)
    rate = toy.skipped(model)["inner.self_attn"]
    assert rate is not None and rate > 0
