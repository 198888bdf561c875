"""Prefill of a Llama-3.1-8B-shaped model, end to end: bsfa.optimize beside what torch has.

Random weights, so only time counts: thresholds are solved for a skip rate by the absolute gate
(random attention is flat: the relative rule, capped at 0, has nothing to skip in it). Prints a row
when it is measured and writes all as JSON. Needs a CUDA card.

    python -m benchmarks.prefill --tokens 65536 --output prefill.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import time
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


def measure(run: Callable[[], object], rounds: int, limit: float) -> dict[str, float]:
    """Median, extremes and peak memory of up to `rounds` calls, none begun after `limit` seconds;
    `first` is the call before them, which compiles."""
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    torch.cuda.reset_peak_memory_stats()
    taken = [seconds(run)]
    while len(taken) < rounds and sum(taken) < limit:
        taken.append(seconds(run))
    return {
        "seconds": statistics.median(taken),
        "min": min(taken),
        "max": max(taken),
        "rounds": len(taken),
        "first": first,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


class Table:
    """The rows so far: printed as they come, and written."""

    def __init__(self, output: Path, facts: dict[str, object]) -> None:
        self.output, self.facts = output, facts
        self.rows: dict[str, dict[str, float]] = {}
        output.parent.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, row: dict[str, float]) -> None:
        """Its time is compared with the faster SDPA's, its memory with eager SDPA's."""
        self.rows[name] = row
        dense = [row["seconds"] for name, row in self.rows.items() if name.endswith("SDPA")]
        row["ratio"] = min(dense) / row["seconds"]
        row["memory"] = row["peak_gib"] / self.rows["eager SDPA"]["peak_gib"]
        print(
            f"{name:28s} {row['seconds']:8.3f} s ({row['min']:.3f}-{row['max']:.3f}) "
            f"{row['ratio']:5.2f}x  peak {row['peak_gib']:5.1f} GiB {row['memory']:.2f}x  "
            f"first call {row['first']:5.1f} s  skipped {row.get('skipped', 0.0):.3f}",
            flush=True,
        )
        self.output.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")


def thresholds_for(
    model: torch.nn.Module, calibration: Any, fraction: float, run: Callable[[], object]
) -> Any:
    """Thresholds that skip `fraction` of this input: it is longer than what calibration saw, so
    they are solved twice, the second time for as much more as the first fell short."""
    first = calibration.thresholds(bsfa.Sparsity(fraction), gate="absolute")
    bsfa.retarget(model, first)
    run()
    missing = fraction - (bsfa.report(model).skipped or 0.0)
    return calibration.thresholds(bsfa.Sparsity(min(fraction + missing, 0.999)), gate="absolute")


def main() -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--calibrate-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=8.0, help="seconds of a row's rounds")
    parser.add_argument("--skip", type=float, nargs="*", default=[0.75, 0.9])
    parser.add_argument("--compiled-sdpa", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "prefill.json")
    args = parser.parse_args()

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "tokens": args.tokens,
        "layers": args.layers,
    }
    table = Table(args.output, facts)
    model = llama(args.layers, args.tokens)
    ids = torch.randint(0, 128256, (1, args.tokens), device="cuda")
    sample = {"input_ids": ids[:, : args.calibrate_tokens], "use_cache": False}
    body: Callable[..., object] = model

    def run() -> object:
        return body(input_ids=ids, use_cache=False)

    with torch.no_grad():
        table.add("eager SDPA", measure(run, args.rounds, args.limit))
        if args.compiled_sdpa:
            compiled: Callable[..., object] = torch.compile(model)
            row = measure(lambda: compiled(input_ids=ids, use_cache=False), args.rounds, args.limit)
            table.add("torch.compile SDPA", row)
            del compiled
            torch._dynamo.reset()
        calibration = bsfa.calibrate(model, sample)
        start = calibration.thresholds(bsfa.Sparsity(0.5), gate="absolute")
        off = {name: torch.full_like(value, -torch.inf) for name, value in start.values.items()}
        bsfa.apply(model, dataclasses.replace(start, values=off))
        row = measure(run, args.rounds, args.limit)
        table.add(
            "rewritten, nothing skipped", {**row, "skipped": bsfa.report(model).skipped or 0.0}
        )
        for fraction in args.skip:
            bsfa.retarget(model, thresholds_for(model, calibration, fraction, run))
            row = measure(run, args.rounds, args.limit)
            skipped = bsfa.report(model).skipped or 0.0
            table.add(f"skip {fraction:.0%}", {**row, "skipped": skipped})
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
