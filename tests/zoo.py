"""Tiny models with random weights, built offline, whose attention is sharp enough to skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.zoo_decoders import DECODERS
from tests.zoo_encoders import ENCODERS
from tests.zoo_models import GROUPED, VOCABULARY, Entry

__all__ = ["GROUPED", "VOCABULARY", "ZOO", "Entry", "build", "inputs", "left_padded", "output"]
ZOO: dict[str, Entry] = {**DECODERS, **ENCODERS}
PIXELS = (2, 3, 64, 64)


def build(name: str, *, layers: int | None = None, **changes: Any) -> Any:
    """The model, in eval mode, the same weights every time; changes: of its configuration."""
    entry = ZOO[name]
    config = {**entry.config, **changes}
    if layers is not None:
        config["num_hidden_layers"] = layers
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(entry.kind, **config)
    options = {"attn_implementation": entry.attention}
    if entry.experts:  # the default for experts knows no float64
        options["experts_implementation"] = "batched_mm"
    kind = getattr(transformers, entry.head)
    return kind.from_config(made, **options).eval()


def inputs(name: str, length: int = 200, batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """A model input, without a cache: tokens [batch, length], pixels, sound, or two of them."""
    torch.manual_seed(seed)
    kind, given = ZOO[name].takes, dict[str, Any]()
    if kind in ("text", "texts", "both"):
        given["input_ids"] = torch.randint(3, VOCABULARY, (batch, length))
    if kind in ("image", "both"):
        given["pixel_values"] = torch.randn(batch, *PIXELS[1:])
    if kind == "waves":
        given["input_values"] = torch.randn(batch, 10 * length)
    if kind == "frames":
        given["input_values"] = torch.randn(batch, 128, 32)
    if kind == "features":
        given["input_features"] = torch.randn(batch, length, 16)
    if kind == "speech":
        given["input_features"] = torch.randn(batch, 16, 2 * length)
    if kind in ("texts", "speech"):
        given["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, length - 50))
    return {**given, "use_cache": False} if ZOO[name].generates else given


def left_padded(given: dict[str, Any], cuts: tuple[int, ...]) -> dict[str, Any]:
    """The input with `cuts[b]` tokens of padding at the left of row b."""
    mask = torch.ones_like(given["input_ids"])
    ids = given["input_ids"].clone()
    for row, cut in enumerate(cuts):
        mask[row, :cut] = 0
        ids[row, :cut] = 0
    return {**given, "input_ids": ids, "attention_mask": mask}


def output(model: Callable[..., Any], given: dict[str, Any]) -> Tensor:
    """Logits, or the last hidden state."""
    with torch.no_grad():
        result = model(**given)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        found = getattr(result, name, None)
        if isinstance(found, Tensor):
            return found
    raise AssertionError(f"no tensor to compare in {type(result).__name__}")
