"""Prefill of a Llama-3.1-8B-shaped model, end to end: bsfa.optimize beside what torch has.

Random weights, so only time counts: thresholds are solved for a skip rate by the absolute gate
(random attention is flat: the relative rule, capped at 0, has nothing to skip in it). Prints a
table and writes JSON to benchmarks/results/. Needs a CUDA card; --layers 32 is the real model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, LlamaConfig

import bsfa_compile as bsfa

RESULTS = Path(__file__).parent / "results"


def llama(layers: int, tokens: int, attention: str = "sdpa") -> torch.nn.Module:
    """Llama-3.1-8B's body with random weights, bf16, on the card."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=max(tokens, 131072),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: torch.nn.Module = AutoModel.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def seconds(run: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median, spread and peak memory of each entry, in shuffled order every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float] = {}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            torch.cuda.reset_peak_memory_stats()
            times[name].append(seconds(runs[name]))
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    return {
        name: {
            "seconds": statistics.median(t),
            "min": min(t),
            "max": max(t),
            "peak_gib": peaks[name],
        }
        for name, t in times.items()
    }


def sparse_entry(model: torch.nn.Module, ids: torch.Tensor, target: Any) -> Callable[[], object]:
    bsfa.retarget(model, target)
    body: Callable[..., object] = model
    return lambda: body(input_ids=ids, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--calibrate-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", type=float, nargs="*", default=[0.75, 0.9])
    parser.add_argument("--compiled-sdpa", action="store_true", help="also torch.compile + SDPA")
    parser.add_argument("--output", type=Path, default=RESULTS / "prefill.json")
    args = parser.parse_args()

    model = llama(args.layers, args.tokens)
    ids = torch.randint(0, 128256, (1, args.tokens), device="cuda")
    sample = {"input_ids": ids[:, : args.calibrate_tokens], "use_cache": False}
    table: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        run_model: Callable[..., object] = model
        dense: dict[str, Callable[[], object]] = {
            "eager SDPA": lambda: run_model(input_ids=ids, use_cache=False)
        }
        if args.compiled_sdpa:
            compiled: Callable[..., object] = torch.compile(model)
            dense["torch.compile SDPA"] = lambda: compiled(input_ids=ids, use_cache=False)
        for run in dense.values():
            run()
        table |= measure(dense, args.rounds)
        calibration = bsfa.calibrate(model, sample)
        start = calibration.thresholds(bsfa.Sparsity(0.5), gate="absolute")
        off = {name: torch.full_like(value, -torch.inf) for name, value in start.values.items()}
        targets: dict[str, Any] = {
            "rewritten, nothing skipped": dataclasses.replace(start, values=off)
        }
        for fraction in args.skip:
            targets[f"skip {fraction:.0%}"] = calibration.thresholds(
                bsfa.Sparsity(fraction), gate="absolute"
            )
        bsfa.apply(model, start)
        run_model(input_ids=ids, use_cache=False)  # compiles
        for name, thresholds in targets.items():
            sparse = sparse_entry(model, ids, thresholds)
            sparse()
            entry = measure({name: sparse}, args.rounds)[name]
            entry["skipped"] = bsfa.report(model).skipped or 0.0
            table[name] = entry

    base = min(table[name]["seconds"] for name in dense)
    for name, row in table.items():
        row["ratio"] = base / row["seconds"]
        print(
            f"{name:28s} {row['seconds']:8.3f} s  {row['ratio']:5.2f}x  "
            f"peak {row['peak_gib']:6.1f} GiB  skipped {row.get('skipped', 0.0):.3f}"
        )
    card = torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "tokens": args.tokens,
        "layers": args.layers,
        "rows": table,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
