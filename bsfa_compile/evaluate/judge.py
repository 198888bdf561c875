"""A model under one set of thresholds after another, beside dense: documents, tasks, seconds."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import bsfa_compile as bsfa
from bsfa_compile.errors import ThresholdsError
from bsfa_compile.evaluate.corpora import Piece
from bsfa_compile.evaluate.intervals import bootstrap, wilson
from bsfa_compile.evaluate.likelihood import Comparison, compare, tail_logits
from bsfa_compile.evaluate.models import LoadedModel
from bsfa_compile.evaluate.needles import retrieved
from bsfa_compile.evaluate.outcome import Loss, Score
from bsfa_compile.evaluate.tasks import TaskPrompt
from bsfa_compile.huggingface.observing import attends_eagerly
from bsfa_compile.state import state_of


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One document under a rule: how far it moved, and which hidden facts were found."""

    genre: str
    comparison: Comparison
    found: tuple[bool, ...]


class Judge:
    """Documents and task prompts of one length, and what the dense model makes of them.

    Made with the untouched model. The last `scored` tokens of each text are compared; the dense
    logits, documents x scored x vocabulary, wait in main memory. Prompts of a task that are
    equally long are answered `batch` at a time.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        documents: Sequence[Piece],
        prompts: Sequence[TaskPrompt],
        scored: int,
        batch: int = 1,
    ) -> None:
        self._loaded, self._documents, self._prompts = loaded, documents, prompts
        self._scored, self._batch = scored, batch
        self._dense, self._dense_found = [], []
        for piece in documents:
            logits = self._logits(piece)
            self._dense.append(self._text(logits, piece).cpu())
            self._dense_found.append(tuple(retrieved(logits, piece.prompt)))
        self._dense_scores = self._answer()
        self.dense_seconds = self.seconds()

    @property
    def dense_found(self) -> float:
        """Share of the facts hidden in the documents that the dense model finds."""
        return _share(self._dense_found)

    def documents(self) -> list[Judged]:
        """Every document through the model as it is now."""
        found = []
        for piece, dense in zip(self._documents, self._dense, strict=True):
            logits, stop = self._logits(piece), piece.prompt.text_stop
            targets = piece.input_ids[0, stop - self._scored : stop]
            comparison = compare(dense, self._text(logits, piece), targets)
            facts = tuple(retrieved(logits, piece.prompt))
            found.append(Judged(genre=piece.genre, comparison=comparison, found=facts))
        return found

    def scores(self) -> tuple[Score, ...]:
        """Every task prompt answered by the model as it is now: all, then task by task."""
        sparse = self._answer()
        named = list(dict.fromkeys(prompt.task for prompt in self._prompts))
        found = []
        for task in ("all", *named) if len(named) > 1 else named:
            mine = [n for n, prompt in enumerate(self._prompts) if task in ("all", prompt.task)]
            before, after = [self._dense_scores[n] for n in mine], [sparse[n] for n in mine]
            change = bootstrap([b - a for a, b in zip(before, after, strict=True)])
            found.append(
                Score(task=task, dense=wilson(before), sparse=wilson(after), change=change)
            )
        return tuple(found)

    def seconds(self) -> float:
        """Median seconds of a forward pass over the first document to its last token's logits."""
        ids, taken = self._documents[0].input_ids, []
        rounds = 4 if ids.device.type == "cuda" else 2
        for _ in range(rounds):
            _wait(ids.device)
            start = time.perf_counter()
            tail_logits(self._loaded.model, ids, 1)
            _wait(ids.device)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])  # the first warms up

    def _logits(self, piece: Piece) -> Tensor:
        last = self._scored + piece.prompt.questions
        return tail_logits(self._loaded.model, piece.input_ids, last)

    def _text(self, logits: Tensor, piece: Piece) -> Tensor:
        return logits[: len(logits) - piece.prompt.questions]

    def _answer(self) -> list[float]:
        model: Any = self._loaded.model
        scores = []
        for together in _batches(self._prompts, self._batch):
            settings = GenerationConfig(
                max_new_tokens=max(prompt.new_tokens for prompt in together),
                do_sample=False,
                pad_token_id=0,
                eos_token_id=model.generation_config.eos_token_id,
            )
            ids = torch.cat([prompt.input_ids for prompt in together]).to(model.device)
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
            for prompt, answer in zip(together, made[:, ids.shape[1] :].tolist(), strict=True):
                scores.append(prompt.score(self._loaded.decode(answer[: prompt.new_tokens])))
        return scores


def _batches(prompts: Sequence[TaskPrompt], most: int) -> Iterator[list[TaskPrompt]]:
    """Runs of at most so many prompts of one task and length."""
    for _, run in itertools.groupby(prompts, lambda one: (one.task, one.input_ids.shape)):
        rest = list(run)
        yield from (rest[n : n + most] for n in range(0, len(rest), most))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _share(found: Sequence[tuple[bool, ...]]) -> float:
    every = [fact for facts in found for fact in facts]
    return sum(every) / len(every) if every else 0.0


def facts_found(judged: Sequence[Judged]) -> float:
    """Share of the hidden facts that were found."""
    return _share([one.found for one in judged])


def losses(judged: Sequence[Judged]) -> tuple[Loss, ...]:
    """The loss over all documents, then genre by genre if there are several."""
    genres = list(dict.fromkeys(one.genre for one in judged))
    groups = [("all", list(judged))]
    if len(genres) > 1:
        groups += [(genre, [one for one in judged if one.genre == genre]) for genre in genres]
    else:
        groups = [(genres[0], list(judged))]
    return tuple(_loss(name, [one.comparison for one in group]) for name, group in groups)


def _loss(genre: str, found: Sequence[Comparison]) -> Loss:
    return Loss(
        genre=genre,
        tokens=sum(c.tokens for c in found),
        dense_nll=sum(c.dense_nll for c in found) / len(found),  # equally many tokens in each
        delta_nll=bootstrap([c.delta_nll for c in found]),
        kl=bootstrap([c.kl for c in found]),
        agreement=sum(c.agreement for c in found) / len(found),
    )


def use(model: nn.Module, thresholds: bsfa.Thresholds, inner: str) -> None:
    """Make the model follow thresholds to the letter; graphs that serve already are kept.

    inner: what runs the graphs; a model with attn_implementation="bsfa" needs none for "eager".
    """
    try:
        bsfa.retarget(model, thresholds)
    except ThresholdsError:
        traced = inner != "eager" or not attends_eagerly(model)
        bsfa.apply(model, thresholds, dense_if_faster=False, inner=inner, compile=traced)


def tiles(model: nn.Module) -> tuple[int, int]:
    """(dropped, candidates) since the thresholds were set, over all sites and heads."""
    state = state_of(model)
    held = [] if state is None else [state.buffers(name) for name in state.homes]
    counts = [pair[1].sum(dim=0).cpu() for pair in held if pair is not None]
    dropped, candidates = torch.stack(counts).sum(dim=0).tolist() if counts else (0, 0)
    return dropped, candidates
