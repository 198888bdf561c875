"""Synthetic long-context tasks in the manner of RULER (arXiv 2404.06654), made offline.

Every prompt is an instruction, a long body and, at its end, the question, all of it one prefill,
so that the question attends sparsely too. A model answers by greedy decoding; the score is the
share of the expected words in its answer. A prompt depends on task, length, seed and tokenizer
alone, and has exactly `length` tokens.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bsfa_compile.errors import InputError
from bsfa_compile.evaluate import corpora
from bsfa_compile.evaluate.needles import CITIES, FACT, Encode, Haystack


@dataclass(frozen=True, kw_only=True)
class TaskPrompt:
    """input_ids [1, L], and the words that a right answer holds, in at most `new_tokens` tokens."""

    task: str
    input_ids: Tensor
    answers: tuple[str, ...]
    new_tokens: int

    def score(self, answer: str) -> float:
        """Share of the expected words that the answer holds, case apart."""
        said = set(re.findall(r"\w+", answer.lower()))
        return sum(word.lower() in said for word in self.answers) / len(self.answers)


@dataclass(frozen=True, kw_only=True)
class _Maker:
    encode: Encode
    paragraphs: Sequence[str]
    prefix: Sequence[int]
    length: int
    rng: random.Random

    def codes(self, count: int) -> list[str]:
        """Different numbers of five digits."""
        return [str(code) for code in self.rng.sample(range(10**4, 10**5), count)]

    def text(self, opening: str, facts: Sequence[str], question: str) -> Tensor:
        """Facts at random places of a text, in this order; [1, length]."""
        encoded = [self.encode(fact) for fact in facts]
        tail = self.encode(question)
        start = [*self.prefix, *self.encode(opening)]
        room = self.length - len(start) - sum(map(len, encoded)) - len(tail)
        if room < self.length // 8:
            raise InputError(
                f"length: instruction, facts and question take {self.length - room} of "
                f"{self.length} tokens; ask for a longer prompt"
            )
        hay = Haystack(self.encode, self._endless(), room, start)
        for goal, fact in zip(sorted(self.rng.random() for _ in facts), encoded, strict=True):
            hay.grow(int(room * goal))
            hay.ids += fact
        hay.grow(room)
        return torch.tensor([hay.ids + tail])

    def _endless(self) -> Iterator[str]:
        """The paragraphs from a random one on, again and again."""
        first = self.rng.randrange(len(self.paragraphs))
        return itertools.islice(itertools.cycle(self.paragraphs), first, None)

    def words(self, opening: str, body: Callable[[int], str], question: str) -> Tensor:
        """As many entries as fit, or nearly, and a few empty lines: [1, length]."""
        tail = self.encode(question)
        room, low, high = self.length - len(tail), 40, self.length

        def made(entries: int) -> list[int]:
            return [*self.prefix, *self.encode(opening + body(entries))]

        head, each = made(low), 4.0  # tokens of an entry, at first by guess
        if len(head) > room:
            raise InputError(f"length: {self.length} tokens hold no list; ask for a longer prompt")
        while high - low > 1 and room - len(head) > 16:
            guess = low + int(0.998 * (room - len(head)) / each)
            guess = min(max(guess, low + 1), high - 1)
            ids = made(guess)
            each = max(1.0, (len(ids) - len(head)) / (guess - low))
            if len(ids) <= room:
                low, head = guess, ids
            else:
                high = guess
        filler = (self.encode("\n") * room)[: room - len(head)]
        return torch.tensor([head + filler + tail])


_Made = tuple[Tensor, Sequence[str]]
_SECRET = "Access codes are hidden in the text below. They are asked for at its end.\n\n"


def _facts(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"\n{FACT.format(city=city)} {code}.\n" for city, code in pairs]


def _needle(maker: _Maker) -> _Made:
    return _one_of(maker, 1)


def _needle_multikey(maker: _Maker) -> _Made:
    return _one_of(maker, 8)


def _one_of(maker: _Maker, count: int) -> _Made:
    pairs = list(zip(maker.rng.sample(CITIES, count), maker.codes(count), strict=True))
    city, code = maker.rng.choice(pairs)
    question = f"\nQuestion: What is the access code of the {city} office?\nAnswer: "
    return maker.text(_SECRET, _facts(pairs), question + FACT.format(city=city)), [code]


def _needle_multivalue(maker: _Maker) -> _Made:
    city, codes = maker.rng.choice(CITIES), maker.codes(4)
    question = (
        f"\nQuestion: What are the four access codes of the {city} office?\n"
        f"Answer: The four access codes of the {city} office are"
    )
    return maker.text(_SECRET, _facts([(city, code) for code in codes]), question), codes


def _needle_multiquery(maker: _Maker) -> _Made:
    pairs = list(zip(maker.rng.sample(CITIES, 8), maker.codes(8), strict=True))
    asked = maker.rng.sample(pairs, 4)
    names = ", ".join(city for city, _ in asked)
    question = (
        f"\nQuestion: What are the access codes of these four offices: {names}?\n"
        f"Answer: The access codes of {names} are, in this order,"
    )
    return maker.text(_SECRET, _facts(pairs), question), [code for _, code in asked]


def _variable_tracking(maker: _Maker) -> _Made:
    """Two chains of five variables, their assignments in a random order that keeps each chain's."""
    drawn = maker.rng.sample(list(itertools.product(string.ascii_uppercase, repeat=3)), 10)
    names = ["".join(letters) for letters in drawn]
    chains, values = [names[:5], names[5:]], maker.codes(2)
    held = [
        [value, *(f"VAR {name}" for name in c)] for value, c in zip(values, chains, strict=True)
    ]
    lines = [
        iter([f"\nVAR {name} = {value}\n" for name, value in zip(c, before, strict=False)])
        for c, before in zip(chains, held, strict=True)
    ]
    turns = maker.rng.sample([0] * 5 + [1] * 5, 10)
    opening = (
        "Variables are assigned in the text below, some to the value of another one. For example, "
        "after VAR AAA = 11111 and VAR BBB = VAR AAA, both AAA and BBB hold 11111.\n\n"
    )
    question = (
        f"\nQuestion: Which five variables hold the value {values[0]}?\n"
        f"Answer: The five variables that hold the value {values[0]} are"
    )
    return maker.text(opening, [next(lines[turn]) for turn in turns], question), chains[0]


@cache
def _vocabulary() -> tuple[str, ...]:
    """Words of the shipped texts, of four to eight small letters."""
    roles = (corpora.CALIBRATION, corpora.EVALUATION)
    texts = [text for role in roles for text in corpora.genre_texts(corpora.PROSE, role)]
    words = re.findall(r"\b[a-z]{4,8}\b", "\n".join(p for t in texts for p in t.paragraphs))
    return tuple(sorted(set(words)))


def _common_words(maker: _Maker) -> _Made:
    """Ten words make up a third of the list, up to 30 times each; the others are rare."""
    words = maker.rng.sample(_vocabulary(), len(_vocabulary()))
    common, others, order = words[:10], words[10:], maker.rng.random()

    def body(entries: int) -> str:
        often = max(2, min(30, entries // 30))
        left = entries - 10 * often
        rare = max(1, often // 10, math.ceil(left / len(others)))  # a long list needs more of each
        listed = common * max(often, 3 * rare) + others[: left // rare] * rare
        random.Random(order).shuffle(listed)
        return " ".join(f"{n}. {word}" for n, word in enumerate(listed, 1))

    opening = "Here is a list of words. A few come up more often than the others.\n\n"
    question = (
        "\n\nQuestion: Which ten words come up most often in the list?\n"
        "Answer: The ten words that come up most often in the list are:"
    )
    return maker.words(opening, body, question), common


def _frequent_words(maker: _Maker) -> _Made:
    """Coded words whose frequency falls with the square of their rank; the first three count."""
    letters = maker.rng.sample(list(itertools.product(string.ascii_lowercase, repeat=4)), 60)
    words, order = ["".join(word) for word in letters], maker.rng.random()
    shares = [1 / rank**2 for rank in range(1, len(words) + 1)]

    def body(entries: int) -> str:
        counts = [round(entries * share / sum(shares)) for share in shares]
        listed = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
        random.Random(order).shuffle(listed)
        return " ".join(listed)

    opening = "Here is a text of coded words. Find the ones that come up most often.\n\n"
    question = (
        "\n\nQuestion: Which three coded words come up most often in the text?\n"
        "Answer: The three coded words that come up most often are:"
    )
    return maker.words(opening, body, question), words[:3]


TASKS: dict[str, Callable[[_Maker], _Made]] = {
    "needle": _needle,
    "needle_multikey": _needle_multikey,
    "needle_multivalue": _needle_multivalue,
    "needle_multiquery": _needle_multiquery,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}


def build_task(
    task: str,
    length: int,
    *,
    encode: Encode,
    paragraphs: Sequence[str],
    seed: int = 0,
    prefix: Sequence[int] = (),
) -> TaskPrompt:
    """A prompt of a task of `TASKS`; `paragraphs` are what facts are hidden among.

    Raises InputError for an unknown task or a length that is too short for it.
    """
    if task not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    maker = _Maker(
        encode=encode,
        paragraphs=paragraphs,
        prefix=prefix,
        length=length,
        rng=random.Random(f"{task} {seed}"),
    )
    ids, answers = TASKS[task](maker)
    # Room for a few words around the answer and for other separators than commas.
    new_tokens = len(encode(" " + ", and ".join(answers))) + 2 * len(answers) + 8
    return TaskPrompt(task=task, input_ids=ids, answers=tuple(answers), new_tokens=new_tokens)
