"""Facts hidden in a long text, and the questions about them at its end, in one sparse pass.

All questions stand in one prompt, each followed by its right answer, and a fact counts as found
if every token of its answer is the likeliest one given what stands before it: what greedy
decoding would write. One forward pass judges all the facts, and the questions themselves attend
sparsely (asking them of a cache that was built sparsely says little).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bsfa_compile.errors import InputError

CITIES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Dublin", "Prague", "Vienna", "Delhi", "Athens", "Quito"),
    *("Warsaw", "Havana", "Nairobi", "Seoul", "Ottawa", "Madrid"),
)
FACT = "The access code of the {city} office is"
QUESTION = "Question: What is the access code of the {city} office?\nAnswer: " + FACT

Encode = Callable[[str], list[int]]  # text to token ids, without special tokens


@dataclass(frozen=True, kw_only=True)
class Needle:
    """One fact: it starts at token `position`; its answer is the tokens [answer, stop)."""

    city: str
    code: str
    position: int
    answer: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class NeedlePrompt:
    """input_ids [1, L]: a text up to token `text_stop` with facts hidden in it, then questions."""

    input_ids: Tensor
    needles: tuple[Needle, ...]
    text_stop: int

    @property
    def questions(self) -> int:
        """Tokens of the questions and answers, at the end."""
        return self.input_ids.shape[1] - self.text_stop

    def to(self, device: torch.device) -> NeedlePrompt:
        """The same prompt with its tokens on a device."""
        return replace(self, input_ids=self.input_ids.to(device))


def build_needles(
    encode: Encode,
    paragraphs: Sequence[str],
    length: int,
    *,
    count: int = 8,
    seed: int = 0,
    prefix: Sequence[int] = (),
) -> NeedlePrompt:
    """Spread `count` facts evenly over `paragraphs` and ask for all of them, in another order.

    The prompt has exactly `length` tokens, `prefix` (such as the model's first token) included;
    facts stand between paragraphs. Raises InputError if the facts or the text do not suffice.
    """
    if not 0 < count <= len(CITIES):
        raise InputError(f"count: expected 1 to {len(CITIES)} facts, got {count}")
    rng = random.Random(seed)
    cities = rng.sample(CITIES, count)
    codes = [str(rng.randrange(10**4, 10**5)) for _ in cities]
    asked = rng.sample(range(count), count)
    values = [encode(f" {code}") for code in codes]
    facts = [
        [*encode(f"\n{FACT.format(city=city)}"), *value, *encode(".\n")]
        for city, value in zip(cities, values, strict=True)
    ]
    questions = [encode(f"\n{QUESTION.format(city=cities[n])}") for n in asked]
    tail = sum(len(q) + len(values[n]) for q, n in zip(questions, asked, strict=True))
    room = length - len(prefix) - sum(map(len, facts)) - tail
    if room < count:
        raise InputError(
            f"length: {count} facts and questions take {length - room} tokens, got {length}; "
            "ask for fewer facts or a longer prompt"
        )
    hay = Haystack(encode, paragraphs, room, prefix)
    positions = []
    for n, fact in enumerate(facts):
        hay.grow(room * (2 * n + 1) // (2 * count))  # the middle of the fact's share of the text
        positions.append(len(hay.ids))
        hay.ids += fact
    hay.grow(room)
    ids, text_stop = hay.ids, len(hay.ids)
    answers = {}
    for question, n in zip(questions, asked, strict=True):
        ids += question
        answers[n] = len(ids)
        ids += values[n]
    needles = tuple(
        Needle(
            city=cities[n],
            code=codes[n],
            position=positions[n],
            answer=answers[n],
            stop=answers[n] + len(values[n]),
        )
        for n in range(count)
    )
    return NeedlePrompt(input_ids=torch.tensor([ids]), needles=needles, text_stop=text_stop)


class Haystack:
    """A prompt that grows by whole paragraphs until `room` tokens of text stand in it."""

    def __init__(
        self, encode: Encode, paragraphs: Iterable[str], room: int, prefix: Sequence[int]
    ) -> None:
        self.ids = list(prefix)
        self._encode, self._paragraphs = encode, iter(paragraphs)
        self._room, self._text = room, 0

    def grow(self, goal: int) -> None:
        """Append paragraphs until `goal` tokens of text stand; the last one is cut at `room`."""
        while self._text < goal:
            paragraph = next(self._paragraphs, None)
            if paragraph is None:
                raise InputError(
                    f"paragraphs: the text has {self._text} tokens, {self._room} are wanted; "
                    "give more text or ask for a shorter prompt"
                )
            piece = self._encode(f"{paragraph}\n")[: self._room - self._text]
            self.ids += piece
            self._text += len(piece)


def retrieved(logits: Tensor, prompt: NeedlePrompt) -> list[bool]:
    """Whether each fact is found, from the logits [last, vocabulary] of the prompt's last tokens.

    Raises InputError if the logits do not reach back to the questions.
    """
    if len(logits) < prompt.questions:
        raise InputError(
            f"logits: the questions begin {prompt.questions} tokens from the end, "
            f"only the last {len(logits)} were scored"
        )
    offset = prompt.input_ids.shape[1] - len(logits)
    likeliest = logits.argmax(dim=-1).cpu()
    targets = prompt.input_ids[0].cpu()
    return [
        bool((likeliest[n.answer - offset : n.stop - offset] == targets[n.answer : n.stop]).all())
        for n in prompt.needles
    ]
