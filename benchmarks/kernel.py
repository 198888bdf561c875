"""The Hopper kernels against FA3 and SDPA at several skip rates: checks, times, writes one JSON.

    python benchmarks/kernel.py --lengths 16384 65536 --out results.json

Inputs are random normal with a planted sink: key 0 scores about 6.4 above the rest for every query.
One threshold for all heads is found by bisection on the gate. Or inputs and thresholds are a real
model's, kept by `benchmarks.quality --inputs`. "skipped" counts the tiles off the diagonal. Times
are medians over rounds in which all entries run in a new random order, since the card's power state
depends on what ran before. Everything a call does is in its time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsfa_compile.ops import library, sm90
from bsfa_compile.ops.call import Call, Gate
from bsfa_compile.ops.tiles import BLOCK_K, BLOCK_Q, Geometry

try:
    from fa3_fwd_interface import flash_attn_func
except ImportError:
    flash_attn_func = None

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
DEVICE_MS = 12.0  # device time that one entry gets in a round, at least one call


class Problem:
    """q, k, v [1, H, L, D] over [1, L, H, D] storage, and one causal call on them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, sink_tiles: int = 1) -> None:
        _, self.length, self.heads, self.d = q.shape
        length, d = self.length, self.d
        self.rows = q, k, v
        self.q, self.k, self.v = (x.transpose(1, 2) for x in self.rows)
        self.call = Call(
            geometry=Geometry(q_len=length, k_len=length, is_causal=True, sink_tiles=sink_tiles),
            q_start_tensor=None,
            key_padding_mask=None,
            scale=d**-0.5,
            softcap=None,
        )

    @classmethod
    def random(cls, length: int, d: int, heads: int, kv_heads: int, dtype: torch.dtype) -> Problem:
        q, k, v = (
            torch.randn(1, length, h, d, device="cuda", dtype=dtype)
            for h in (heads, kv_heads, kv_heads)
        )
        q[..., :8] = 2.0
        k[:, 0, :, :8] = 4.5 * math.sqrt(d / 128)
        return cls(q, k, v)

    def gate(self, threshold: float, rule: str, precision: str = "int8") -> Gate:
        t = torch.full((self.heads,), threshold, device="cuda")
        return Gate(thresholds=t, rule=rule, precision=precision)

    def skipped_by_head(self, gate: Gate) -> Tensor:
        """Share of the tiles off the diagonal that a gate drops, [H]."""
        counts = sm90.tile_mask(self.q, self.k, self.call, gate)[1]
        blocks = self.length // BLOCK_Q
        return counts[:, 0] / (blocks * (blocks - 1) // 2 * (BLOCK_Q // BLOCK_K))

    def skipped(self, gate: Gate) -> float:
        return float(self.skipped_by_head(gate).mean())

    def solve(self, target: float, rule: str, precision: str) -> Gate:
        low, high = (-4.0, 0.0) if rule == "relative" else (-2.0, 6.0)
        for _ in range(14):
            middle = (low + high) / 2
            above = self.skipped(self.gate(middle, rule, precision)) > target
            low, high = (low, middle) if above else (middle, high)
        return self.gate((low + high) / 2, rule, precision)

    def solve_apart(self, targets: Tensor, rule: str, precision: str) -> Gate:
        """The same with a target for each head, [H]."""
        gate = self.gate(0.0, rule, precision)
        low, high = (torch.full_like(gate.thresholds, x) for x in (-8.0, 8.0))
        for _ in range(16):
            gate.thresholds.copy_((low + high) / 2)
            above = self.skipped_by_head(gate) > targets
            high = torch.where(above, gate.thresholds, high)
            low = torch.where(above, low, gate.thresholds)
        return gate

    def sdpa(self) -> Tensor:
        """What torch picks, cuDNN first."""
        with sdpa_kernel(BACKENDS, set_priority=True):
            return torch.nn.functional.scaled_dot_product_attention(
                self.q, self.k, self.v, is_causal=True, enable_gqa=True
            )

    def fa3(self) -> Any:
        q, k, v = self.rows
        return flash_attn_func(q, k, v, softmax_scale=self.d**-0.5, causal=True)


def check(problem: Problem) -> None:
    """Dense output against float32 on the first 1024 rows of two heads."""
    n, groups = 1024, problem.heads // problem.k.shape[1]
    out = sm90.attention(problem.q, problem.k, problem.v, problem.call, None).out
    for h in (0, problem.heads - 1):
        q, k, v = (
            x[:, i, :n].double()
            for x, i in ((problem.q, h), (problem.k, h // groups), (problem.v, h // groups))
        )
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        error = float((out[:, h, :n].double() - exact).norm() / exact.norm())
        base = float((problem.sdpa()[:, h, :n].double() - exact).norm() / exact.norm())
        if not error <= 1.5 * base:
            raise SystemExit(f"wrong output: error {error:.2e}, SDPA's {base:.2e}")


def timed(entries: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds a call of each entry, one figure a round."""

    def burst(function: Callable[[], Any], calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        function()  # so that the queue is not empty when the clock starts
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / calls

    calls = {name: max(1, round(DEVICE_MS / burst(f, 2))) for name, f in entries.items()}
    times: dict[str, list[float]] = {name: [] for name in entries}
    order = list(entries)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(burst(entries[name], calls[name]))
    return times


def at_skip_rates(p: Problem, rule: str, precision: str, *, spread: bool) -> dict[str, Gate]:
    """A gate for each skip rate, by name."""
    label = rule if precision == "int8" else f"{rule} exact"
    found = {f"{label} 0%": p.gate(-math.inf, rule, precision)}
    for target in (0.25, 0.5, 0.75, 0.9):
        found[f"{label} {target:.0%}"] = p.solve(target, rule, precision)
    found[f"{label} all"] = p.gate(math.inf, rule, precision)
    if spread:  # 0 to 99 %, 75 % on average
        apart = 0.99 * torch.linspace(0, 1, p.heads, device="cuda") ** 0.32
        found[f"{label} 75% spread"] = p.solve_apart(apart, rule, precision)
    return found


def bench(problem: Problem, gates: dict[str, Gate], rounds: int) -> list[dict[str, Any]]:
    """One table: the dense lines, our dense kernel, then each gate, and one's decisions alone."""
    p = problem
    check(p)
    entries: dict[str, Callable[[], Any]] = {"SDPA": p.sdpa}
    if flash_attn_func is not None and p.q.dtype == torch.bfloat16:
        entries |= {"FA3": p.fa3, "FA3 again": p.fa3}
    entries["dense"] = lambda: sm90.attention(p.q, p.k, p.v, p.call, None)
    skips = dict.fromkeys(entries, 0.0)
    for name, gate in gates.items():
        skips[name] = skips[f"{name}, gate alone"] = p.skipped(gate)
        entries[name] = functools.partial(sm90.attention, p.q, p.k, p.v, p.call, gate)
        if not name.endswith(("0%", "25%", "all", "spread")):  # at 75 %, and a model's own
            entries[f"{name}, gate alone"] = functools.partial(
                sm90.tile_mask, p.q, p.k, p.call, gate
            )
    times = timed(entries, rounds)
    base = "FA3" if "FA3" in times else "SDPA"
    line = statistics.median(times[base] + times.get("FA3 again", []))
    work = 2 * p.length**2 * p.heads * p.d
    table = []
    for name, ms in times.items():
        median = statistics.median(ms)
        row = {
            "entry": name,
            "length": p.length,
            "d": p.d,
            "dtype": str(p.q.dtype),
            "skipped": round(skips[name], 4),
            "ms": round(median, 4),
            "least": round(min(ms), 4),
            "most": round(max(ms), 4),
            "tflops": round(work / median / 1e9),
            f"over {base}": round(line / median, 3),
        }
        table.append(row)
        print(
            f"{p.length:7} d{p.d:<4}{name:>25} skipped {skips[name]:5.1%} {median:8.3f} ms "
            f"({min(ms):.3f}-{max(ms):.3f}) {work / median / 1e9:6.0f} TFLOP/s "
            f"{line / median:5.2f}x {base}",
            flush=True,
        )
    return table


def host_times(bursts: int = 25, calls: int = 40) -> dict[str, float]:
    """Median microseconds of host time of one sparse call, of the kernels' family and of torch's
    operator. A burst is short, or the launch queue fills and the host waits for the device."""
    p = Problem.random(256, 128, 8, 2, torch.bfloat16)
    gate = p.gate(-1.0, "relative")
    mask = (None, None, 0, True, None, None, None)
    rule = (gate.rule, gate.precision, 1, BLOCK_Q, BLOCK_K, False)
    runs: dict[str, Callable[[], object]] = {
        "host_us": lambda: sm90.attention(p.q, p.k, p.v, p.call, gate),
        "operator_us": lambda: library.attention(p.q, p.k, p.v, gate.thresholds, *mask, *rule),
    }
    found = {}
    for name, run in runs.items():
        spent = []
        for _ in range(bursts):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            spent.append((time.perf_counter() - begin) / calls)
        found[name] = round(statistics.median(spent) * 1e6, 1)
    return found


def random_problems(options: argparse.Namespace) -> Iterator[tuple[Problem, dict[str, Gate]]]:
    """A problem for each length, and its gates by rule, precision and skip rate."""
    heads, kv_heads = options.heads
    for length in options.lengths:
        dtype = getattr(torch, options.dtype)
        problem = Problem.random(length, options.d, heads, kv_heads, dtype)
        gates: dict[str, Gate] = {}
        for rule, precision in itertools.product(options.rules, options.precisions):
            gates |= at_skip_rates(problem, rule, precision, spread=options.spread)
        yield problem, gates


def real_problems(path: Path) -> Iterator[tuple[Problem, dict[str, Gate]]]:
    """Every site that `benchmarks.quality --inputs` kept, and its gate in each precision."""
    kept = load_file(path, device="cuda")
    for site in dict.fromkeys(name.rpartition("/")[0] for name in kept):
        q, k, v = (kept[f"{site}/{part}"].transpose(1, 2).contiguous() for part in "qkv")
        gates = {
            f"{site} {precision}": Gate(
                thresholds=kept[f"{site}/{precision}"], rule="relative", precision=precision
            )
            for precision in ("int8", "exact")
            if f"{site}/{precision}" in kept
        }
        yield Problem(q, k, v, int(kept[f"{site}/sink_tiles"])), gates


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("Q", "KV"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rules", nargs="+", default=["relative"])
    parser.add_argument("--precisions", nargs="+", default=["int8"], help="int8, exact")
    parser.add_argument("--spread", action="store_true", help="also heads that differ")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--inputs", type=Path, help="queries, keys, values, thresholds of a model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    record: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "commit": output_of("git", "rev-parse", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
        **host_times(),
        "rows": [],
    }
    print(f"host time of a call {record['host_us']} us, as an operator {record['operator_us']} us")
    if options.inputs is not None:
        problems = real_problems(options.inputs)
    else:
        problems = random_problems(options)
    for problem, gates in problems:
        record["rows"] += bench(problem, gates, options.rounds)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
