"""The zoo's encoders and encoder-decoders: text, images, sound."""

from __future__ import annotations

from typing import Any

from transformers.models.dinov2 import modeling_dinov2

from tests.zoo_models import (
    SIZES,
    STRIDES,
    SWIN,
    T5,
    TOKENS,
    VIT,
    WAVES,
    WHISPER,
    Entry,
    because,
    bert,
    encoder,
    layers,
    seq2seq,
    vision,
)

LOOKED_UP = "looked up in a table"
T5_DENSE = because(
    LOOKED_UP,
    *layers("encoder.block.{}.layer.0.SelfAttention"),
    *layers("decoder.block.{}.layer.0.SelfAttention"),
)
T5_SITES = layers("decoder.block.{}.layer.1.EncDecAttention")
# transformers 5.17 has a module more around it.
DINOV2 = "encoder.layer.{}.attention" + ".attention" * hasattr(
    modeling_dinov2, "Dinov2SelfAttention"
)


def t5(kind: str, **more: Any) -> Entry:
    """Relative biases in self-attention, none in cross-attention."""
    return seq2seq(kind, config=T5, sites=T5_SITES, dense=T5_DENSE, **more)


ENCODERS: dict[str, Entry] = {
    "bert": encoder("encoder", "bert", SIZES, *layers("encoder.layer.{}.attention.self"), ci=True),
    "roberta": bert("roberta", pad_token_id=0),
    "electra": bert("electra"),
    "esm": bert("esm", position_embedding_type="rotary", pad_token_id=0, mask_token_id=3),
    "albert": encoder(
        "encoder",
        "albert",
        {**SIZES, "embedding_size": 32},
        "encoder.albert_layer_groups.0.albert_layers.0.attention",
        repeats=2,
    ),
    "distilbert": encoder(
        "encoder",
        "distilbert",
        {**SIZES, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
        *layers("transformer.layer.{}.attention"),
    ),
    "modernbert": encoder(
        "encoder",
        "modernbert",
        {
            **SIZES,
            **TOKENS,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 192,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        *layers("layers.{}.attn"),
        windows=(None, 97),
        ci=True,
    ),
    "mpnet": encoder(
        "encoder, relative bias",
        "mpnet",
        SIZES,
        dense=because(LOOKED_UP, *layers("encoder.layer.{}.attention.attn")),
        attention="eager",
    ),
    "deberta_v2": encoder(
        "encoder, relative bias",
        "deberta-v2",
        {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        dense=because(LOOKED_UP, *layers("encoder.layer.{}.attention.self")),
        attention="eager",
    ),
    "t5": t5("t5", ci=True),
    "mt5": t5("mt5"),
    "bart": seq2seq("bart"),
    "mbart": seq2seq("mbart"),
    "pegasus": seq2seq("pegasus"),
    "m2m_100": seq2seq("m2m_100"),
    "whisper": seq2seq(
        "whisper",
        family="speech",
        config=WHISPER,
        takes="speech",
        head="AutoModelForSpeechSeq2Seq",
        pads=False,
        ci=True,
    ),
    "wav2vec2": encoder(
        "speech",
        "wav2vec2",
        WAVES,
        *layers("encoder.layers.{}.attention"),
        takes="waves",
        pads=False,
    ),
    "hubert": encoder(
        "speech",
        "hubert",
        WAVES,
        *layers("encoder.layers.{}.attention"),
        takes="waves",
        pads=False,
    ),
    "wav2vec2_bert": encoder(
        "speech",
        "wav2vec2-bert",
        {
            **WAVES,
            "feature_projection_input_dim": 16,
            "position_embeddings_type": "relative",
        },
        dense=because("queries or keys", *layers("encoder.layers.{}.self_attn")),
        takes="features",
        pads=False,
    ),
    "spectrogram": encoder(
        "sound",
        "audio-spectrogram-transformer",
        {**VIT, "num_mel_bins": 32, "max_length": 128, **STRIDES},
        *layers("layers.{}.attention"),
        takes="frames",
        pads=False,
    ),
    "vit": vision("vit", "layers.{}.attention", ci=True),
    "deit": vision("deit", "layers.{}.attention"),
    "dinov2": vision("dinov2", DINOV2),
    "dinov3": vision("dinov3_vit", "model.layer.{}.attention"),
    "ijepa": vision("ijepa", "layers.{}.attention"),
    "beit": vision(
        "beit",
        "",
        config={"use_relative_position_bias": True},
        dense=because("learned", *layers("layers.{}.attention")),
        family="vision, relative bias",
    ),
    "swin": encoder(
        "vision, relative bias",
        "swin",
        SWIN,
        dense=because(
            "learned",
            *(f"encoder.layers.{i}.blocks.{j}.attention" for i in (0, 1) for j in (0, 1)),
        ),
        takes="image",
        pads=False,
    ),
    "clip": encoder(
        "vision and text",
        "clip",
        {
            "text_config": {**SIZES, "eos_token_id": 2},
            "vision_config": VIT,
            "projection_dim": 32,
        },
        *layers("text_model.encoder.layers.{}.self_attn"),
        *layers("vision_model.encoder.layers.{}.self_attn"),
        takes="both",
        pads=False,
        oracle=False,
    ),
    "siglip": encoder(
        "vision and text",
        "siglip",
        {"text_config": SIZES, "vision_config": VIT},
        *layers("text_model.encoder.layers.{}.self_attn"),
        *layers("vision_model.encoder.layers.{}.self_attn"),
        dense=because("single query row", "vision_model.head.attention"),
        takes="both",
        oracle=False,
        pads=False,
    ),
}
