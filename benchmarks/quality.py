"""A loss that is accepted -> what it saves, on a real model at full length, on unseen documents.

    python -m benchmarks.quality --model qwen --length 32768 --nll 0.01

Three sets of texts: thresholds are calibrated on the first, searched for on the second, and judged
on the third, which nothing was chosen by; prose and code in each. Other targets (--targets) are
judged beside. With --found-at 4096, thresholds are calibrated and searched for at that length and
judged at --length, as solved and as fitted over positions (calibrate/fit.py). Seconds and memory of
the calibration are above the same forward passes without it. --inputs keeps queries, keys and
values of the first, middle and last site on a judged document, with its thresholds, for
`benchmarks/kernel.py --inputs`. The model runs without torch.compile. JSON is written after every
step.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

import bsfa_compile as bsfa
from bsfa_compile.evaluate import corpora
from bsfa_compile.evaluate.corpora import Piece
from bsfa_compile.evaluate.judge import Judge, losses, tiles, use
from bsfa_compile.evaluate.likelihood import float32_head
from bsfa_compile.evaluate.models import LoadedModel, load
from bsfa_compile.evaluate.outcome import finite
from bsfa_compile.evaluate.run import Settings, device_name, pieces, sample, versions
from bsfa_compile.evaluate.targets import parse_targets
from bsfa_compile.ops.compiler import cache_dir
from bsfa_compile.ops.tiles import Geometry
from bsfa_compile.search import search


class Record:
    """What was found so far, on disk after every step."""

    def __init__(self, path: Path, console: Console) -> None:
        self._path, self._console, self._found = path, console, dict[str, Any]()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, value: Any) -> None:
        self._found[name] = finite(value)
        self._path.write_text(json.dumps(self._found, indent=1) + "\n", "utf-8")
        self._console.print(f"{name}: {json.dumps(self._found[name])[:600]}", markup=False)


def measured(device: torch.device, run: Callable[[], Any]) -> tuple[Any, float, float]:
    """(what `run` gives, its seconds, peak GiB on the card while it ran)."""
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = run()
    if on_card:
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_card else 0.0
    return result, time.perf_counter() - start, peak


def calibrated(
    model: Any, data: Sequence[Mapping[str, Any]], device: torch.device, sink_tiles: int = 1
) -> tuple[bsfa.Calibration, dict[str, float]]:
    """The calibration, and what it took beside the same passes without it."""

    def plain() -> None:
        for one in data:
            model(**one)

    model(**data[0])  # warms up
    _, dense_seconds, dense_peak = measured(device, plain)
    calibration, seconds, peak = measured(
        device, lambda: bsfa.calibrate(model, data, sink_tiles=sink_tiles, progress=False)
    )
    taken = {"samples": len(data), "dense_seconds": dense_seconds, "seconds": seconds}
    return calibration, {**taken, "dense_peak_gib": dense_peak, "added_gib": peak - dense_peak}


def judged(
    judge: Judge, loaded: LoadedModel, thresholds: bsfa.Thresholds, documents: int, length: int
) -> dict[str, Any]:
    """What thresholds drop and lose on the documents nobody saw."""
    use(loaded.model, thresholds, "eager")
    comparisons = judge.documents()
    dropped, candidates = tiles(loaded.model)
    heads = sum(len(values) for values in thresholds.values.values())
    whole = [
        heads * documents * sum(stop - first for first, stop in map(g.droppable, range(g.q_blocks)))
        for g in (
            Geometry(q_len=length, k_len=length, is_causal=True, sink_tiles=sinks)
            for sinks in (thresholds.sink_tiles, 0)
        )
    ]
    return {
        "dropped": dropped / max(candidates, 1),
        # Windows have other tiles: told for models without them only.
        "dropped_off_diagonal": dropped / max(whole[1], 1) if candidates == whole[0] else None,
        "dense_seconds": judge.dense_seconds,
        "seconds": judge.seconds(),
        "losses": [asdict(loss) for loss in losses(comparisons)],
        "by_document": [asdict(one.comparison) | {"genre": one.genre} for one in comparisons],
        "promised_dropped": thresholds.dropped,
        "promised_lost": thresholds.lost,
        "proof": None if thresholds.proof is None else asdict(thresholds.proof),
    }


class _Calls(TorchFunctionMode):
    """Keeps query, key and value of every attention call whose number is wanted."""

    def __init__(self, wanted: Sequence[int]) -> None:
        super().__init__()
        self._wanted, self._count = set(wanted), 0
        self.kept: dict[int, tuple[Tensor, ...]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            if self._count in self._wanted:
                self.kept[self._count] = args[:3]
            self._count += 1
        return func(*args, **(kwargs or {}))


def keep_inputs(
    loaded: LoadedModel, piece: Piece, solved: Mapping[str, bsfa.Thresholds], path: Path
) -> list[str]:
    """Write q [1, H, L, D], k, v of three sites and their thresholds [H, n] by precision; which."""
    names = list(next(iter(solved.values())).values)
    wanted = sorted({0, len(names) // 2, len(names) - 1})
    bsfa.revert(loaded.model)
    with _Calls(wanted) as calls:
        loaded.model(**sample(piece.input_ids))
    content = {}
    for n in wanted:
        for part, value in zip("qkv", calls.kept[n], strict=True):
            content[f"{names[n]}/{part}"] = value.contiguous()
        for precision, thresholds in solved.items():
            content[f"{names[n]}/{precision}"] = thresholds.values[names[n]].contiguous()
            content[f"{names[n]}/sink_tiles"] = torch.tensor(thresholds.sink_tiles)
    save_file(content, path)
    return [names[n] for n in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="qwen, qwen-1.5b, gemma, a folder or a hub name")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--found-at", type=int, help="tokens to calibrate on; default: --length")
    parser.add_argument("--nll", type=float, default=0.01, help="nats per token accepted")
    parser.add_argument("--sink-tiles", type=int, default=1)
    parser.add_argument("--targets", default="", help="to judge beside, such as budget=0.03")
    parser.add_argument(
        "--documents",
        type=int,
        nargs=3,
        default=(4, 4, 6),
        metavar="N",
        help="of each genre and use",
    )
    parser.add_argument("--calibration-text", type=Path, nargs="*", default=())
    parser.add_argument("--search-text", type=Path, nargs="*", default=(), required=True)
    parser.add_argument("--text", type=Path, nargs="*", default=(), help="to judge on")
    parser.add_argument("--search-scored", type=int, default=2048, help="last tokens of a document")
    parser.add_argument("--scored", type=int, default=1024, help="last tokens of a judged document")
    parser.add_argument("--trials", type=int, default=8, help="settings searched at most")
    parser.add_argument("--precisions", nargs="+", default=["auto"], help="auto, int8, exact")
    parser.add_argument("--inputs", type=Path, help="where three sites' q, k and v go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    given = parser.parse_args()
    device, length = torch.device(given.device), given.length
    found_at = given.found_at or length
    record = Record(given.out, Console(stderr=True))
    loaded = load(given.model, cache_dir() / "models", device)
    loaded.model.set_attn_implementation("bsfa")

    def documents(role: int, text: Sequence[Path], tokens: int) -> list[Piece]:
        settings = Settings(
            model=given.model, lengths=(tokens,), scored=1, text=tuple(text), device=device
        )
        return pieces(loaded, settings, corpora.EVALUATION, tokens, count=given.documents[role])

    sets = [
        documents(0, given.calibration_text, found_at),
        documents(1, given.search_text, found_at),
        documents(2, given.text, length),
    ]
    record.add("about", {
        "model": loaded.title, "device": device_name(device), "versions": versions(),
        "length": length, "found_at": found_at, "sink_tiles": given.sink_tiles,
        "scored": given.scored, "searched_scored": given.search_scored,
        "documents": [[f"{p.genre}: {p.name}" for p in part] for part in sets],
    })  # fmt: skip
    with torch.no_grad(), float32_head(loaded.model):
        data = [sample(piece.input_ids) for piece in sets[0]]
        calibration, taken = calibrated(loaded.model, data, device, given.sink_tiles)
        record.add("calibration", taken)
        target = bsfa.Quality(nll=given.nll, scored=given.search_scored)
        held_out = [{"input_ids": piece.input_ids} for piece in sets[1]]
        judge = Judge(loaded, sets[2], (), given.scored)

        def judge_all(name: str, thresholds: bsfa.Thresholds, **more: float) -> None:
            found = judged(judge, loaded, thresholds, len(sets[2]), length)
            record.add(name, {**more, **found})
            if found_at < length:
                fitted = replace(calibration.fitted(thresholds, length), proof=None)
                found = judged(judge, loaded, calibration.told(fitted), len(sets[2]), length)
                record.add(f"{name} fitted", found)

        for other in parse_targets(given.targets):
            judge_all(repr(other), calibration.thresholds(other))
            bsfa.revert(loaded.model)
        solved = {}
        for precision in given.precisions:
            find = functools.partial(
                search, loaded.model, calibration, target, held_out,
                precision=precision, trials=given.trials, progress=False,
            )  # fmt: skip
            thresholds, seconds, _ = measured(device, find)
            solved[precision] = thresholds
            thresholds.save(given.out.with_suffix(f".{precision}.safetensors"))
            judge_all(f"{target} {precision}", thresholds, search_seconds=seconds)
            bsfa.revert(loaded.model)
        if given.inputs is not None:
            record.add("inputs", keep_inputs(loaded, sets[2][0], solved, given.inputs))


if __name__ == "__main__":
    main()
