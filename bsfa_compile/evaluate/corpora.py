"""Documents to calibrate on and, apart from them, documents to judge on: prose and code.

Prose is what the demo ships. Code is Python's own standard library, as installed: its larger
top-level modules in the order of their names, by turns to calibrate and to judge on. The same
Python gives the same documents.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bsfa_compile.errors import InputError
from bsfa_compile.evaluate import texts
from bsfa_compile.evaluate.needles import Encode, NeedlePrompt, build_needles

PROSE, CODE = "prose", "code"
CALIBRATION, EVALUATION = "calibration", "evaluation"
_SHIPPED = {CALIBRATION: texts.CALIBRATION, EVALUATION: texts.EVALUATION}
_LEAST = 20_000  # bytes of a module that is taken


@dataclass(frozen=True, kw_only=True)
class Piece:
    """`length` tokens of a text; `prompt` has them, with facts and questions if there are any."""

    name: str
    genre: str
    prompt: NeedlePrompt

    @property
    def input_ids(self) -> Tensor:
        """[1, length]."""
        return self.prompt.input_ids


def genre_texts(genre: str, role: str) -> list[texts.Document]:
    """The texts of a genre for a role; no text has both roles."""
    if genre == PROSE:
        return [texts.shipped(name) for name in _SHIPPED[role]]
    first = 0 if role == CALIBRATION else 1
    return [_module(path) for path in _modules()[first::2]]


@cache
def _modules() -> tuple[Path, ...]:
    folder = Path(sysconfig.get_path("stdlib"))
    return tuple(p for p in sorted(folder.glob("*.py")) if p.stat().st_size >= _LEAST)


def _module(path: Path) -> texts.Document:
    """A source file; its paragraphs are its blank-line-separated blocks, whose lines are kept."""
    blocks = path.read_text("utf-8").split("\n\n")
    return texts.Document(name=path.stem, paragraphs=tuple(f"{b}\n" for b in blocks if b.strip()))


def user_texts(paths: Sequence[Path]) -> dict[str, list[texts.Document]]:
    """The user's files as genres, by suffix: .py is code, and so on; all else is prose."""
    found: dict[str, list[texts.Document]] = {}
    for path in paths:
        suffix = path.suffix.lower().lstrip(".")
        genre = PROSE if suffix in ("", "txt", "md", "rst") else CODE if suffix == "py" else suffix
        document = _module(path) if genre == CODE else texts.read(path)
        found.setdefault(genre, []).append(document)
    return found


def pieces(
    genre: str,
    sources: Sequence[texts.Document],
    *,
    encode: Encode,
    length: int,
    count: int,
    prefix: Sequence[int] = (),
    facts: int = 0,
    seed: int = 0,
) -> list[Piece]:
    """At most `count` documents of exactly `length` tokens, no paragraph in two of them.

    Texts take turns; each gives as many documents as it is long, and what one lacks is made up
    by the next ones. With `facts`, so many are hidden in each, see `build_needles`. Raises
    InputError if all texts together are shorter than one document.
    """
    found: list[Piece] = []
    for names, paragraphs in itertools.islice(_cut(sources, encode, length), count):
        if facts:
            prompt = build_needles(
                encode, paragraphs, length, count=facts, seed=seed + len(found), prefix=prefix
            )
        else:
            whole = texts.Document(name="", paragraphs=paragraphs)
            ids = whole.tokens(encode, length, prefix)
            prompt = NeedlePrompt(input_ids=ids, needles=(), text_stop=length)
        found.append(Piece(name=f"{'+'.join(names)} {len(found)}", genre=genre, prompt=prompt))
    if not found:
        raise InputError(
            f"{genre}: the texts {', '.join(text.name for text in sources)} are shorter than "
            f"{length} tokens together; ask for fewer tokens or give more text"
        )
    return found


def _cut(
    sources: Sequence[texts.Document], encode: Encode, length: int
) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """Runs of whole paragraphs of at least `length` tokens: (names of the texts, paragraphs).

    The first run of every text comes first, then the second ones; then what is left over, joined.
    """
    rest: list[tuple[str, str, int]] = []
    turns = [_runs(source, encode, length, rest) for source in sources]
    for row in itertools.zip_longest(*turns):
        yield from (run for run in row if run is not None)
    size, first = 0, 0
    for n, (_, _, tokens) in enumerate(rest):
        size += tokens
        if size >= length:
            part = rest[first : n + 1]
            yield list(dict.fromkeys(name for name, _, _ in part)), tuple(p for _, p, _ in part)
            size, first = 0, n + 1


def _runs(
    source: texts.Document, encode: Encode, length: int, rest: list[tuple[str, str, int]]
) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """The runs of one text; what is left over goes to `rest` as (text, paragraph, tokens)."""
    run: list[tuple[str, str, int]] = []
    for paragraph in source.paragraphs:
        run.append((source.name, paragraph, len(encode(f"{paragraph}\n"))))
        if sum(tokens for _, _, tokens in run) >= length:
            yield [source.name], tuple(p for _, p, _ in run)
            run = []
    rest += run


def to_device(found: Sequence[Piece], device: torch.device) -> list[Piece]:
    """The same documents with their tokens on a device."""
    return [Piece(name=p.name, genre=p.genre, prompt=p.prompt.to(device)) for p in found]
