"""What the zoo's entries are made of: sizes, configurations, names of sites."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 97
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One architecture.

    family: its place in the table. sites: names of the sparse sites in order. dense: sites that
    stay dense by design, and what their reason says. windows, causal: of all sites, for the
    reference; oracle: whether those tell all. takes: kind of input. generates: whether it has
    generate(). attention: "sdpa", or "eager" for written out. pads: whether it takes padding in
    float64. experts: a mixture of experts.
    repeats: how often each site is called. ci: whether every test run has it.
    """

    family: str
    kind: str
    config: dict[str, Any]
    sites: tuple[str, ...] = ()
    dense: dict[str, str] = field(default_factory=dict)
    causal: bool = True
    windows: tuple[int | None, ...] = ()
    oracle: bool = True
    takes: str = "text"
    generates: bool = True
    head: str = "AutoModelForCausalLM"
    attention: str = "sdpa"
    pads: bool = True
    experts: bool = False
    repeats: int = 1
    ci: bool = False


def layers(pattern: str, *numbers: int) -> tuple[str, ...]:
    """The pattern with 0 and 1, or with the numbers given."""
    return tuple(pattern.format(i) for i in numbers or (0, 1))


def because(reason: str, *sites: str) -> dict[str, str]:
    """Dense sites of one reason."""
    return dict.fromkeys(sites, reason)


LLAMA = layers("model.layers.{}.self_attn")
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 2}
HEADS16 = {**GROUPED, "head_dim": 16}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LOCAL = {"sliding_window": 112, "head_dim": 16}
MIXED = {**GROUPED, **LOCAL, "layer_types": ["sliding_attention", "full_attention"]}
MLA = {
    **SIZES,
    **TOKENS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MOE = {**HEADS16, **EXPERTS}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 32,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 1024,
    "initializer_range": 0.25,
    **TOKENS,
}
OPT = {**SIZES, **TOKENS, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.25}
FALCON = {k: v for k, v in {**SIZES, **TOKENS}.items() if k != "max_position_embeddings"}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 1024,
    "init_std": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
WHISPER = {
    **BART,
    "num_mel_bins": 16,
    "max_source_positions": 200,
    "max_target_positions": 256,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VIT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 4,
    "initializer_range": 0.25,
}
STRIDES = {"time_stride": 4, "frequency_stride": 4}
SWIN = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 8,
    "initializer_range": 0.25,
}
WAVES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "initializer_range": 0.25,
}


def decoder(family: str, kind: str, config: dict[str, Any] = HEADS16, **more: Any) -> Entry:
    """A causal language model with sites named as Llama's."""
    return Entry(family=family, kind=kind, config=config, **{"sites": LLAMA, **more})


def encoder(family: str, kind: str, config: dict[str, Any], *sites: str, **more: Any) -> Entry:
    """A model without causality and without generate()."""
    plain: dict[str, Any] = {"causal": False, "generates": False, "head": "AutoModel"}
    return Entry(family=family, kind=kind, config=config, sites=sites, **{**plain, **more})


def bert(kind: str, **more: Any) -> Entry:
    """An encoder with sites named as BERT's."""
    return encoder("encoder", kind, {**SIZES, **more}, *layers("encoder.layer.{}.attention.self"))


def vision(kind: str, pattern: str, **more: Any) -> Entry:
    """An image model of 256 patches."""
    sites = () if "dense" in more else layers(pattern)
    config = {**VIT, **more.pop("config", {})}
    family = more.pop("family", "vision")
    plain = {"takes": "image", "pads": False}
    return encoder(family, kind, config, *sites, **{**plain, **more})


def seq2seq(kind: str, **more: Any) -> Entry:
    """An encoder and a decoder with cross-attention."""
    parts = ("encoder.layers.{}.self_attn", "decoder.layers.{}.self_attn")
    names = [f"model.{part}" for part in (*parts, "decoder.layers.{}.encoder_attn")]
    sites = [n for i in (0, 1) for n in layers(names[0], i)]
    sites += [n for i in (0, 1) for part in names[1:] for n in layers(part, i)]
    plain: dict[str, Any] = {"takes": "texts", "head": "AutoModelForSeq2SeqLM", "oracle": False}
    return Entry(
        **{
            "family": "encoder-decoder",
            "kind": kind,
            "config": BART,
            "sites": tuple(sites),
            **plain,
            **more,
        }
    )
