"""The demo's story: load, calibrate, judge two rules beside dense, continue a text, draw."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import bsfa_compile as bsfa
from bsfa_compile.demo.judge import (
    Judge,
    by_counting,
    counters,
    dropped_tiles,
    match_dropped,
    wanted_tiles,
)
from bsfa_compile.demo.outcome import Continuation, Outcome
from bsfa_compile.demo.picture import draw
from bsfa_compile.demo.table import show
from bsfa_compile.errors import InputError
from bsfa_compile.evaluate import build_needles, texts
from bsfa_compile.evaluate.models import LoadedModel, load
from bsfa_compile.evaluate.outcome import TileMap
from bsfa_compile.evaluate.tilemap import Caught, catching, kept_tiles, tile_map, typical_head
from bsfa_compile.ops.compiler import cache_dir

OURS, PAPER = "budget", "paper"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run. Every text is cut to `tokens`; the last `scored` of them are judged."""

    model: str | None
    tokens: int
    scored: int
    eps: float
    facts: int
    new_tokens: int
    calibration_texts: tuple[Path, ...]
    evaluation_texts: tuple[Path, ...]
    device: torch.device
    output: Path

    def __post_init__(self) -> None:
        if not 0 < self.scored < self.tokens:
            raise InputError(
                f"scored must be at least 1 and less than tokens, got {self.scored} of "
                f"{self.tokens}; pass a smaller --scored"
            )


class Clock:
    """Announces steps and remembers how long they took."""

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        with self._console.status(name):
            start = time.perf_counter()
            yield
            self.seconds[name] = time.perf_counter() - start
        self._console.print(f"{self.seconds[name]:6.1f} s  {name}", highlight=False)


def run(settings: Settings, console: Console) -> Outcome:
    """Run the demo, print its tables, write its picture and JSON into `settings.output`."""
    clock = Clock(console)
    with clock.step("load the model"):
        loaded = load(settings.model, cache_dir() / "models", settings.device)
    loaded.check_length(settings.tokens + settings.new_tokens)
    with torch.no_grad():
        outcome = _story(settings, loaded, clock)
    settings.output.mkdir(parents=True, exist_ok=True)
    draw(outcome, settings.output / "demo.png")
    outcome.save(settings.output / "demo.json")
    show(console, outcome)
    console.print(f"\nPicture and data: {settings.output}/demo.png, {settings.output}/demo.json")
    return outcome


def _story(settings: Settings, loaded: LoadedModel, clock: Clock) -> Outcome:
    model, device = loaded.model, settings.device
    calibration_texts = texts.documents(settings.calibration_texts, texts.CALIBRATION)
    evaluation_texts = texts.documents(settings.evaluation_texts, texts.EVALUATION)

    def tokens(text: texts.Document) -> Tensor:
        return text.tokens(loaded.encode, settings.tokens, loaded.prefix).to(device)

    # Attention is what is watched: the output head need not run over a whole calibration text.
    data = [
        {"input_ids": tokens(text), "use_cache": False, "logits_to_keep": 1}
        for text in calibration_texts
    ]
    prompts = [
        build_needles(
            loaded.encode,
            text.paragraphs,
            settings.tokens,
            count=settings.facts,
            seed=seed,
            prefix=loaded.prefix,
        ).to(device)
        for seed, text in enumerate(evaluation_texts)
    ]
    opening = tokens(evaluation_texts[0])[:, : settings.tokens // 2]
    with clock.step("calibrate"):
        calibration = bsfa.calibrate(model, data, progress=False)
        ours = calibration.thresholds(bsfa.Budget(settings.eps))

    with clock.step("dense: judge"):
        modules = [name for name in ours.values if "#" not in name]
        with catching(model, modules) as caught:
            judge = Judge(model, prompts, settings.scored)
    with clock.step("dense: continue a text"):
        dense_text = _generate(model, opening, settings.new_tokens)

    # Quality is of the rule, so the rule is forced; on its own the operator runs dense where that
    # is faster. Eager graphs: compiling every one with inductor would cost more than running it.
    with clock.step(f"{ours.target}: rewrite and judge"):
        bsfa.apply(model, ours, dense_if_faster=False, inner="eager")
        ours_measured = judge.measure(model)
        report = bsfa.report(model)
    with clock.step(f"{ours.target}: continue the text"):
        sparse_text = _generate(model, opening, settings.new_tokens)

    def dropped_by(thresholds: bsfa.Thresholds) -> int:
        bsfa.retarget(model, thresholds)
        judge.forward(model)
        return dropped_tiles(counters(model))

    with clock.step("paper's TopK(k): rewrite, find k, judge"):
        wanted = wanted_tiles(calibration, ours)
        some_k = calibration.thresholds(bsfa.TopK(by_counting(calibration, wanted)))
        bsfa.apply(model, some_k, dense_if_faster=False, inner="eager")
        paper = match_dropped(calibration, wanted, ours_measured.first, dropped_by)
        bsfa.retarget(model, paper)
        paper_measured = judge.measure(model)

    with clock.step("default settings: compile with inductor, run twice"):
        bsfa.apply(model, ours)
        first, second = judge.forward(model), judge.forward(model)
    return Outcome(
        model=loaded.title,
        device=_device_name(device),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        tokens=settings.tokens,
        scored=settings.scored,
        calibrated_on=[text.name for text in calibration_texts],
        evaluated_on=[text.name for text in evaluation_texts],
        rewritten=sum(site.rewritten for site in report.sites),
        left_dense={s.name: s.reason or "" for s in report.sites if not s.rewritten},
        dense_found=judge.dense_found,
        rules=[
            judge.rule(OURS, f"{ours.target}, gate relative", ours_measured),
            judge.rule(PAPER, f"{paper.target}, gate absolute", paper_measured),
        ],
        tile_maps=_tile_maps(caught(), {OURS: ours, PAPER: paper}),
        continuation=_continuation(loaded, opening, dense_text, sparse_text),
        forward_seconds={
            "dense, eager": judge.forward_seconds,
            "optimized, default settings": second,
            "compilation, once": first - second,
        },
        step_seconds=clock.seconds,
    )


def _generate(model: Any, ids: Tensor, new_tokens: int) -> list[int]:
    """Greedy continuation: the new token ids."""
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    new: list[int] = generated[0, ids.shape[1] :].tolist()
    return new


def _continuation(
    loaded: LoadedModel, ids: Tensor, dense: list[int], sparse: list[int]
) -> Continuation:
    same = [a == b for a, b in zip(dense, sparse, strict=True)]
    return Continuation(
        prompt_end=loaded.decode(ids[0, -24:].tolist()),
        dense=loaded.decode(dense),
        sparse=loaded.decode(sparse),
        same_tokens=same.index(False) if False in same else len(same),
        tokens=len(same),
    )


def _tile_maps(caught: Caught | None, rules: dict[str, bsfa.Thresholds]) -> dict[str, TileMap]:
    """The same head's tiles under each rule; none if no site could be caught."""
    if caught is None:
        return {}
    states = {name: kept_tiles(caught, thresholds) for name, thresholds in rules.items()}
    head = typical_head(states[OURS])
    return {name: tile_map(caught, found, head) for name, found in states.items()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
