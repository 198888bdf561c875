"""Decoding speed of an optimized model beside torch.compile alone: python -m benchmarks.decode

The prompt is prefilled, then single tokens are decoded over a dynamic or static cache. Both models
have the same random weights; they take turns, and the median of the turns' ratios counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Thresholds

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
}
HEADS = {"tiny": (4, 2), "0.5b": (14, 2)}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Tokens per second, all turns; ratio: median of ours over torch.compile's, turn by turn."""

    path: str
    ours: list[float]
    compiled: list[float]
    ratio: float
    sparse_calls: int


def build(shape: str) -> Any:
    """A Qwen2-shaped model with random weights, the same every time."""
    torch.manual_seed(0)
    heads, kv_heads = HEADS[shape]
    config = transformers.Qwen2Config(
        vocab_size=4096,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        **SHAPES[shape],
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def thresholds(shape: str) -> Thresholds:
    """Some for every site; decoding does not look at them."""
    heads, _ = HEADS[shape]
    names = [f"model.layers.{i}.self_attn" for i in range(SHAPES[shape]["num_hidden_layers"])]
    return Thresholds(values={name: torch.full((heads, 1), -8.0) for name in names})


def decode(model: Any, prompt: int, count: int, device: str) -> float:
    """Tokens per second of `count` decoding steps after a prompt."""
    ids = torch.arange(prompt, device=device)[None] % 4000
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
        if device == "cuda":
            torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def measure(path: str, options: argparse.Namespace) -> Measured:
    """Both models take turns; path "graph" compiles ours too, "door" compares eager with eager."""
    device, models = options.device, {}
    for name in ("compiled", "ours"):
        model = build(options.shape).to(device)
        if name == "ours" and path == "door":
            model.set_attn_implementation("bsfa")
            bsfa.apply(model, thresholds(options.shape), compile=False)
        elif name == "ours":
            bsfa.apply(model, thresholds(options.shape))
        elif path == "graph":
            model.compile()
        models[name] = model
        for _ in range(2):  # compiles
            decode(model, options.prompt, 4, device)
    turns: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.turns):
        for name in sorted(models, reverse=bool(turn % 2)):
            turns[name].append(decode(models[name], options.prompt, options.tokens, device))
    ratios = [ours / other for ours, other in zip(turns["ours"], turns["compiled"], strict=True)]
    return Measured(
        path=path,
        **turns,
        ratio=statistics.median(ratios),
        sparse_calls=bsfa.report(models["ours"]).calls.get("sparse", 0),
    )


def main() -> None:
    """Measure both paths, print them, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="overflow|Online softmax")
    found = []
    for path in ("graph", "door"):
        found.append(measure(path, options))
        ours, other = (statistics.median(x) for x in (found[-1].ours, found[-1].compiled))
        against = "torch.compile" if path == "graph" else "eager SDPA"
        print(f"{path:6} {ours:8.1f} tokens/s, {against} {other:8.1f}: {found[-1].ratio:.3f}")
    if options.json is not None:
        card = options.device == "cuda" and torch.cuda.get_device_name()
        about = {
            "device": card or platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "shape": options.shape,
            "prompt": options.prompt,
            "tokens": options.tokens,
        }
        content = {**about, "measured": [asdict(m) for m in found]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
