"""The evaluation: calibrate or load thresholds, judge each beside dense at every length, write."""

from __future__ import annotations

import contextlib
import functools
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor

import bsfa_compile as bsfa
from bsfa_compile.calibrate import Target
from bsfa_compile.calibrate.thresholds import check
from bsfa_compile.errors import InputError
from bsfa_compile.evaluate import corpora, layers
from bsfa_compile.evaluate.corpora import CODE, EVALUATION, PROSE, Piece
from bsfa_compile.evaluate.judge import Judge, losses, tiles, use
from bsfa_compile.evaluate.likelihood import float32_head
from bsfa_compile.evaluate.models import LoadedModel, load
from bsfa_compile.evaluate.outcome import Evaluation, Point
from bsfa_compile.evaluate.targets import from_files
from bsfa_compile.evaluate.tasks import TASKS, TaskPrompt, build_task
from bsfa_compile.huggingface.observing import attends_eagerly
from bsfa_compile.ops.compiler import cache_dir

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate. documents: of each genre; samples: prompts of each task, `batch` of them
    answered at a time."""

    model: str | None
    thresholds: tuple[Path, ...] = ()
    targets: tuple[Target | bsfa.Quality, ...] = (bsfa.Budget(0.03),)
    lengths: tuple[int, ...] = (4096,)
    tasks: tuple[str, ...] = tuple(TASKS)
    documents: int = 4
    samples: int = 8
    batch: int = 1
    scored: int = 512
    text: tuple[Path, ...] = ()
    calibration_text: tuple[Path, ...] = ()
    seed: int = 0
    device: torch.device = CPU
    inner: str = "eager"

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise InputError(f"--tasks: no task {unknown[0]!r}; wanted some of {', '.join(TASKS)}")
        if not self.lengths or not 0 < self.scored < min(self.lengths):
            raise InputError(
                f"--scored must be at least 1 and less than every length, got {self.scored} of "
                f"{', '.join(map(str, self.lengths))}: pass a smaller --scored or longer inputs"
            )
        if self.inner not in torch._dynamo.list_backends(exclude_tags=()):
            raise InputError(f"--inner: no backend {self.inner!r}; wanted eager or inductor")


def run(
    settings: Settings, console: Console, keep: Callable[[Evaluation], object] | None = None
) -> tuple[Evaluation, LoadedModel]:
    """Evaluate; the model comes back under the last thresholds at the last length.

    keep: is given what was found so far after every rule and length.
    """
    loaded = load(settings.model, cache_dir() / "models", settings.device)
    if settings.inner == "eager":
        # Where transformers allows it: a traced model builds the Lq x Lk mask, gigabytes at 32k.
        with contextlib.suppress(ValueError):
            loaded.model.set_attn_implementation("bsfa")
    loaded.check_length(max(settings.lengths))
    with torch.no_grad(), float32_head(loaded.model):
        evaluation = evaluate(loaded, settings, console, keep)
    return evaluation, loaded


def evaluate(
    loaded: LoadedModel,
    settings: Settings,
    console: Console,
    keep: Callable[[Evaluation], object] | None = None,
) -> Evaluation:
    """Evaluate a loaded model; progress is printed to the console. keep: see `run`."""
    if not settings.targets and not settings.thresholds:
        raise InputError("nothing to evaluate: pass --targets or --thresholds")
    # What is wrong with files and texts is told before the long work.
    given = from_files(settings.thresholds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights differ is said where they are applied
        for thresholds in given.values():
            check(thresholds, loaded.model)
    lengths = dict.fromkeys(settings.lengths)
    drawn = {n: pieces(loaded, settings, EVALUATION, n, count=settings.documents) for n in lengths}
    questions = {n: prompts(loaded, settings, n) for n in lengths}
    rules, calibrated_on = _solved(loaded, settings, console) if settings.targets else ({}, [])
    rules |= given
    points, named = list[Point](), dict[int, tuple[str, ...]]()
    untraced = settings.inner == "eager" and attends_eagerly(loaded.model)
    known = dict.fromkeys(site for t in rules.values() for site in t.values)
    sites = [site for site in known if untraced and "#" not in site]

    def found() -> Evaluation:
        return Evaluation(
            model=loaded.title,
            device=device_name(settings.device),
            versions=versions(),
            seed=settings.seed,
            scored=settings.scored,
            inner=settings.inner,
            calibrated_on=tuple(f"{piece.genre}: {piece.name}" for piece in calibrated_on),
            proofs={name: str(t.proof) for name, t in rules.items() if t.proof is not None},
            documents=named,
            samples=settings.samples,
            points=tuple(points),
        )

    for length in settings.lengths:
        documents, asked = drawn[length], questions[length]
        named[length] = tuple(f"{piece.genre}: {piece.name}" for piece in documents)
        bsfa.revert(loaded.model)
        step = f"{length} tokens: dense, {len(documents)} documents, {len(asked)} prompts"
        console.print(step)
        with console.status(step):
            judge = Judge(loaded, documents, asked, settings.scored, settings.batch)
            first = functools.partial(loaded.model, **sample(documents[0].input_ids))
            dense = layers.outputs(loaded.model, sites, first)
        for name, thresholds in rules.items():
            console.print(f"{length} tokens: {name}")
            with console.status(f"{length} tokens: {name}"):
                use(loaded.model, thresholds, settings.inner)
                judged = judge.documents()
                dropped, candidates = tiles(loaded.model)
                point = Point(
                    rule=name,
                    gate=thresholds.gate,
                    precision=thresholds.precision,
                    sink_tiles=thresholds.sink_tiles,
                    length=length,
                    dropped=dropped / max(candidates, 1),
                    dense_seconds=judge.dense_seconds,
                    seconds=judge.seconds(),
                    losses=losses(judged),
                    scores=judge.scores(),
                    layer_errors=layers.errors(loaded.model, dense, first),
                )
            points.append(point)
            if keep is not None:
                keep(found())
    return found()


def _solved(
    loaded: LoadedModel, settings: Settings, console: Console
) -> tuple[dict[str, bsfa.Thresholds], list[Piece]]:
    """Rule name -> thresholds of every target, and the documents that they were chosen by.

    At the longest length: thresholds lose more on longer inputs than they were made on. A Quality
    is searched for on every second document of a genre, the others are calibrated on.
    """
    searched = any(isinstance(target, bsfa.Quality) for target in settings.targets)
    longest = max(settings.lengths)
    drawn = pieces(loaded, settings, corpora.CALIBRATION, longest, count=4 if searched else 2)
    genres = [[p for p in drawn if p.genre == g] for g in dict.fromkeys(p.genre for p in drawn)]
    own = [{"input_ids": piece.input_ids} for genre in genres for piece in genre[1::2]]
    if searched and not own:
        raise InputError(
            f"a Quality is searched for on texts of its own, and there is one of {longest} tokens "
            "only: give more with --calibration-text, or shorter --lengths"
        )
    apart = 2 if searched else 1
    data = [sample(piece.input_ids) for genre in genres for piece in genre[::apart]]
    console.print(f"calibrating on {len(data)} documents")
    calibration = bsfa.calibrate(loaded.model, data, progress=console.is_terminal)
    rules = {}
    for target in settings.targets:
        if isinstance(target, bsfa.Quality):
            console.print(f"searching for {target} on {len(own)} documents")
            goal = replace(target, scored=min(target.scored, longest - 1))
            found = bsfa.search(loaded.model, calibration, goal, own, progress=console.is_terminal)
            console.print(str(found.proof), highlight=False)
        else:
            found = calibration.thresholds(target)
        rules[repr(target)] = found
    return rules, drawn


def pieces(
    loaded: LoadedModel, settings: Settings, role: str, length: int, *, count: int, facts: int = 0
) -> list[Piece]:
    """Documents of a role on the device: the user's, else shipped prose and Python's sources."""
    given = settings.calibration_text if role == corpora.CALIBRATION else settings.text
    shipped = {genre: corpora.genre_texts(genre, role) for genre in (PROSE, CODE)}
    found = []
    for genre, sources in (corpora.user_texts(given) or shipped).items():
        found += corpora.pieces(
            genre,
            sources,
            encode=loaded.encode,
            length=length,
            count=count,
            prefix=loaded.prefix,
            facts=facts,
            seed=settings.seed,
        )
    return corpora.to_device(found, settings.device)


def prompts(loaded: LoadedModel, settings: Settings, length: int) -> list[TaskPrompt]:
    """The prompts of every task asked for; the same for the same seed."""
    texts = corpora.genre_texts(PROSE, EVALUATION)
    return [
        build_task(
            task,
            length,
            encode=loaded.encode,
            paragraphs=[paragraph for text in texts for paragraph in text.paragraphs],
            seed=settings.seed + n,
            prefix=loaded.prefix,
        )
        for task in settings.tasks
        for n in range(settings.samples)
    ]


def sample(input_ids: Tensor) -> dict[str, object]:
    """A calibration input: attention is watched, the output head need not run over all of it."""
    return {"input_ids": input_ids, "use_cache": False, "logits_to_keep": 1}


def versions() -> dict[str, str]:
    """What figures depend on; Python too, whose sources are documents."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The card's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
