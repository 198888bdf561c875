"""Tiny models with random weights, built offline, whose attention is sharp enough to skip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 97
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,
}
_GROUPED = {**_SIZES, **_TOKENS, "num_key_value_heads": 2}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,  # no layer of experts: their kernels know no float64
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How to build a model, and what its attention sites are.

    sites: names in order. windows: the window of each site, None for none. causal: whether its
    attention is. generates: whether it has generate(). attention: "sdpa", or "eager" for written
    out. pads: whether it takes padding in float64. dense: sites that stay dense by design.
    """

    kind: str
    config: dict[str, Any]
    sites: tuple[str, ...]
    causal: bool = True
    windows: tuple[int | None, ...] = (None, None)
    generates: bool = True
    head: str = "AutoModelForCausalLM"
    attention: str = "sdpa"
    pads: bool = True
    dense: tuple[str, ...] = ()


def _layers(pattern: str, count: int = 2) -> tuple[str, ...]:
    return tuple(pattern.format(i) for i in range(count))


_LLAMA = _layers("model.layers.{}.self_attn")
_BERT = {k: v for k, v in _SIZES.items() if k != "head_dim"}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 1024,
    "initializer_range": 0.25,
    **_TOKENS,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "word_embed_proj_dim": 64,
    "init_std": 0.25,
    **_TOKENS,
}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.25,
    **_TOKENS,
}
_VIT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 4,
    "initializer_range": 0.25,
}
_LOCAL = {"sliding_window": 112, "head_dim": 16}
_GEMMA3 = {**_GROUPED, **_LOCAL, "layer_types": ["sliding_attention", "full_attention"]}

ZOO: dict[str, Entry] = {
    "llama": Entry(kind="llama", config=_GROUPED, sites=_LLAMA),
    "qwen2": Entry(kind="qwen2", config=_GROUPED, sites=_LLAMA),
    "qwen3": Entry(kind="qwen3", config={**_GROUPED, "head_dim": 16}, sites=_LLAMA),
    "mistral": Entry(
        kind="mistral", config={**_GROUPED, **_LOCAL}, sites=_LLAMA, windows=(112, 112)
    ),
    "phi3": Entry(kind="phi3", config={**_GROUPED, "sliding_window": None}, sites=_LLAMA),
    "gemma3": Entry(kind="gemma3_text", config=_GEMMA3, sites=_LLAMA, windows=(112, None)),
    "gemma2": Entry(
        kind="gemma2",
        config={**_GEMMA3, "attn_logit_softcapping": 20.0},
        sites=_LLAMA,
        windows=(112, None),
        attention="eager",
        pads=False,  # its softmax is float32: float64's lowest number gives NaN
    ),
    "gpt2_eager": Entry(
        kind="gpt2",
        config=_GPT2,
        sites=_layers("transformer.h.{}.attn"),
        attention="eager",
    ),
    "gpt2": Entry(kind="gpt2", config=_GPT2, sites=_layers("transformer.h.{}.attn")),
    "gpt_neox": Entry(
        kind="gpt_neox",
        config={**_SIZES, **_TOKENS},
        sites=_layers("gpt_neox.layers.{}.attention"),
    ),
    "opt": Entry(kind="opt", config=_OPT, sites=_layers("model.decoder.layers.{}.self_attn")),
    "falcon": Entry(
        kind="falcon",
        config={**_FALCON, "alibi": False},
        sites=_layers("transformer.h.{}.self_attention"),
    ),
    "falcon_alibi": Entry(
        kind="falcon",
        config={**_FALCON, "alibi": True},
        sites=(),
        dense=_layers("transformer.h.{}.self_attention"),
    ),
    "deepseek_v3": Entry(
        kind="deepseek_v3", config={**_SIZES, **_TOKENS, **_MLA, **_ROPE}, sites=_LLAMA
    ),
    "bert": Entry(
        kind="bert",
        config=_BERT,
        sites=_layers("encoder.layer.{}.attention.self"),
        causal=False,
        generates=False,
        head="AutoModel",
    ),
    "modernbert": Entry(
        kind="modernbert",
        config={
            **_SIZES,
            **_TOKENS,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 192,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        sites=_layers("layers.{}.attn"),
        windows=(None, 97),
        causal=False,
        generates=False,
        head="AutoModel",
    ),
    "vit": Entry(
        kind="vit",
        config=_VIT,
        sites=_layers("layers.{}.attention"),
        causal=False,
        generates=False,
        head="AutoModel",
        pads=False,
    ),
}


def build(name: str, *, layers: int | None = None) -> Any:
    """The model, in eval mode, the same weights every time."""
    entry = ZOO[name]
    config = dict(entry.config)
    if layers is not None:
        config["num_hidden_layers"] = layers
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(entry.kind, **config)
    kind = getattr(transformers, entry.head)
    return kind.from_config(made, attn_implementation=entry.attention).eval()


def inputs(name: str, length: int = 200, batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """A model input: tokens [batch, length] (no cache), or pixels for a vision model."""
    torch.manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 64, 64)}
    ids = torch.randint(3, VOCABULARY, (batch, length))
    given: dict[str, Any] = {"input_ids": ids}
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
    found: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return found
