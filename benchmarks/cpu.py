"""Times the CPU path against torch's SDPA: checks numbers first, then interleaved rounds.

    python -m benchmarks.cpu --lengths 4096 8192 16384 --rounds 5

The data plants a sink: key 0 scores about +6 for every query, as attention sinks do in trained
models. Thresholds are the quantile of each head's statistics that skips the wanted fraction of
the droppable tiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bsfa_compile.ops import gate as gating
from bsfa_compile.ops.attention import block_sparse_attention
from bsfa_compile.ops.crossover import device_name
from bsfa_compile.ops.library import attention
from bsfa_compile.ops.tiles import Geometry, unpack

SINK_SCORE = 6.0
SINK_DIMS = 8
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table; times in milliseconds, ratio = SDPA's median / ours."""

    tokens: int
    dtype: str
    wanted_skip: float
    achieved_skip: float
    dispatched: bool
    sdpa_ms: float
    ours_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    max_error: float


def make_inputs(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, L, D], k, v [1, Hkv, L, D] with a planted sink at key 0."""
    torch.manual_seed(0)
    q = torch.randn(1, heads, tokens, dim)
    k, v = torch.randn(2, 1, kv_heads, tokens, dim).unbind(0)
    q[..., :SINK_DIMS] = 2.0
    k[:, :, 0, :SINK_DIMS] = SINK_SCORE / (2.0 * SINK_DIMS * dim**-0.5)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def tile_statistics(q: Tensor, k: Tensor, geometry: Geometry) -> Tensor:
    """The relative gate's statistic of every droppable tile: [H, tiles]."""
    found = []
    bounds = [(0, geometry.k_blocks)]
    for i in range(geometry.q_blocks):
        d0, d1 = geometry.droppable(i)
        if d0 == d1:
            continue
        s = gating.block_scores(
            q, k, geometry, i, key_padding_mask=None, scale=q.shape[-1] ** -0.5, softcap=None
        )
        row_max = gating.tile_row_max(s, geometry.block_k)
        value = gating.block_statistic(
            row_max, geometry, i, gate="relative", bounds=bounds, votes=None
        )
        first = geometry.tiles(i)[0]
        found.append(value[0, :, d0 - first : d1 - first])
    return torch.cat(found, dim=1)


def check(q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor, geometry: Geometry) -> float:
    """Largest error of ours against float64 over the kept tiles, on the last q block of head 0."""
    config = (None, None, 0, True, None, None, None, "relative", "exact", 1, 128, 64, False)
    out, _, words, _ = attention(q, k, v, thresholds, *config)
    last = (geometry.q_len - 1) // geometry.block_q
    row0, row1 = geometry.rows(last)
    kept = unpack(words, geometry.k_blocks)[0, 0, last].repeat_interleave(geometry.block_k)
    s = (q[0, 0, row0:row1].double() @ k[0, 0].double().T) * q.shape[-1] ** -0.5
    seen = torch.arange(geometry.k_len) <= torch.arange(row0, row1)[:, None]
    s = s.masked_fill(~(seen & kept[: geometry.k_len]), -torch.inf)
    wanted = s.softmax(dim=-1) @ v[0, 0].double()
    return float((out[0, 0, row0:row1].double() - wanted).abs().max())


def measure(args: argparse.Namespace, tokens: int, dtype: torch.dtype) -> list[Line]:
    """All skip rates at one length, timed in interleaved rounds."""
    q, k, v = make_inputs(tokens, args.heads, args.kv_heads, args.dim, dtype)
    geometry = Geometry(q_len=tokens, k_len=tokens, is_causal=True)
    found = tile_statistics(q, k, geometry)
    thresholds = {
        skip: torch.quantile(found, skip, dim=1) if skip else torch.full((args.heads,), -1e30)
        for skip in args.skips
    }
    errors = {skip: check(q, k, v, t, geometry) for skip, t in thresholds.items()}
    achieved = {s: float((found < t[:, None]).float().mean()) for s, t in thresholds.items()}
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    wrong = {skip: error for skip, error in errors.items() if not error < limit}
    if wrong:
        raise SystemExit(f"wrong numbers at {tokens} tokens: {wrong}")

    def sdpa() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def ours(skip: float, dispatched: bool) -> None:
        block_sparse_attention(
            q, k, v, thresholds[skip], is_causal=True, dense_if_faster=dispatched
        )

    contests = [(skip, dispatched) for skip in args.skips for dispatched in (False, True)]
    dense: dict[tuple[float, bool], list[float]] = {c: [] for c in contests}
    sparse: dict[tuple[float, bool], list[float]] = {c: [] for c in contests}
    with torch.inference_mode():
        sdpa()
        for _ in range(args.rounds):
            for contest in contests:
                start = time.perf_counter()
                sdpa()
                middle = time.perf_counter()
                ours(*contest)
                stop = time.perf_counter()
                dense[contest].append((middle - start) * 1e3)
                sparse[contest].append((stop - middle) * 1e3)
    lines = []
    for contest in contests:
        ratios = [a / b for a, b in zip(dense[contest], sparse[contest], strict=True)]
        lines.append(
            Line(
                tokens=tokens,
                dtype=str(dtype).removeprefix("torch."),
                wanted_skip=contest[0],
                achieved_skip=achieved[contest[0]],
                dispatched=contest[1],
                sdpa_ms=statistics.median(dense[contest]),
                ours_ms=statistics.median(sparse[contest]),
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
                max_error=errors[contest[0]],
            )
        )
    return lines


def main() -> None:
    """Measure, print a table, write benchmarks/results/cpu_<date>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--skips", type=float, nargs="+", default=[0.0, 0.5, 0.75, 0.9])
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--name", default=f"cpu_{date.today().isoformat()}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("tokens dtype     skip  by dispatch  SDPA ms   ours ms   ratio [low, high]   max error")
    lines = []
    for tokens in args.lengths:
        for dtype in args.dtypes:
            for line in measure(args, tokens, getattr(torch, dtype)):
                lines.append(line)
                print(
                    f"{line.tokens:6d} {line.dtype:9s} {line.achieved_skip:.2f}  "
                    f"{'yes' if line.dispatched else 'no':11s} {line.sdpa_ms:8.1f}  "
                    f"{line.ours_ms:8.1f}  {line.ratio:5.2f} [{line.ratio_low:.2f}, "
                    f"{line.ratio_high:.2f}]   {line.max_error:.1e}",
                    flush=True,
                )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {
        "cpu": device_name(torch.device("cpu")),
        "threads": args.threads,
        "torch": torch.__version__,
        "commit": commit,
        "heads": [args.heads, args.kv_heads],
        "head_dim": args.dim,
        "rounds": args.rounds,
        "lines": [asdict(line) for line in lines],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{args.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
