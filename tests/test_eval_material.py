"""What `bsfa eval` asks and how sure it is: documents, tasks, intervals."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsfa_compile.errors import InputError
from bsfa_compile.evaluate import corpora
from bsfa_compile.evaluate.intervals import bootstrap, wilson
from bsfa_compile.evaluate.tasks import TASKS, build_task

unit = st.floats(0, 1)
PARAGRAPHS = [f"The {n}th sentence of a plain text about nothing in particular." for n in range(50)]


def encode(text: str) -> list[int]:
    """One token per character."""
    return [ord(c) for c in text]


def decode(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids[0].tolist()))


def test_wilson_by_hand() -> None:
    # 8 of 10: the textbook's interval.
    found = wilson([1.0] * 8 + [0.0] * 2)
    assert (found.mean, found.n) == (0.8, 10)
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    assert wilson([1.0] * 4).low == pytest.approx(4 / (4 + 1.96**2), abs=1e-4)
    with pytest.raises(InputError, match="between 0 and 1"):
        wilson([1.5])


@given(scores=st.lists(unit, min_size=1, max_size=30))
def test_wilson_holds_the_mean_and_shrinks_with_samples(scores: list[float]) -> None:
    once, often = wilson(scores), wilson(scores * 4)
    assert 0 <= once.low <= once.mean <= once.high <= 1
    assert often.high - often.low < once.high - once.low


@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=12), shift=st.floats(-5, 5))
def test_bootstrap_lies_within_the_values_and_moves_with_them(
    values: list[float], shift: float
) -> None:
    found = bootstrap(values)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    moved = bootstrap([value + shift for value in values])
    assert moved.low == pytest.approx(found.low + shift, abs=1e-6)


def test_bootstrap_is_about_two_standard_errors_and_one_value_tells_nothing() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    found = bootstrap(values)
    assert found.high - found.low == pytest.approx(4 * 1 / 20, rel=0.1)
    assert bootstrap([3.0]).low == -math.inf
    with pytest.raises(InputError, match="at least one"):
        bootstrap([])


def test_no_document_shares_text_with_another() -> None:
    calibration = corpora.genre_texts(corpora.CODE, corpora.CALIBRATION)
    evaluation = corpora.genre_texts(corpora.CODE, corpora.EVALUATION)
    assert len(evaluation) > 8
    assert not {t.name for t in calibration} & {t.name for t in evaluation}
    found = corpora.pieces(
        "prose",
        corpora.genre_texts(corpora.PROSE, corpora.EVALUATION),
        encode=encode,
        length=20_000,
        count=99,
        prefix=[1],
    )
    assert len(found) >= 8
    assert all(piece.input_ids.shape == (1, 20_000) for piece in found)
    assert all(int(piece.input_ids[0, 0]) == 1 for piece in found)
    paragraphs = [p for piece in found for p in decode(piece.input_ids).split("\n") if len(p) > 99]
    assert len(paragraphs) == len(set(paragraphs)) > 100
    assert [piece.name.split(" ")[0] for piece in found[:2]] == ["northanger", "persuasion"]


def test_code_keeps_its_blank_lines_and_facts_can_be_hidden_in_it() -> None:
    texts = corpora.genre_texts(corpora.CODE, corpora.EVALUATION)
    (piece,) = corpora.pieces("code", texts, encode=encode, length=9000, count=1, facts=2)
    text = decode(piece.input_ids)
    assert len(text) == 9000
    assert "\n\n" in text
    assert text.count("The access code of the") == 2 + 2  # told, answered
    assert len(piece.prompt.needles) == 2


def test_short_texts_are_joined_and_too_short_ones_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name * 600}\n" * 1)
    (tmp_path / "c.py").write_text("x = 1\n\n\ny = 2\n")
    given = corpora.user_texts([tmp_path / name for name in ("a.txt", "b.txt", "c.py")])
    assert list(given) == ["prose", "code"]
    (joined,) = corpora.pieces("prose", given["prose"], encode=encode, length=1000, count=4)
    assert joined.name == "a+b 0"
    with pytest.raises(InputError, match="shorter than 2000 tokens"):
        corpora.pieces("prose", given["prose"], encode=encode, length=2000, count=1)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_fits_and_its_text_tells_the_answer(task: str) -> None:
    prompt = build_task(task, 5000, encode=encode, paragraphs=PARAGRAPHS, seed=3, prefix=[1])
    text = decode(prompt.input_ids)
    assert len(text) == 5000
    assert text[0] == "\x01"
    body, question = text.rsplit("Question:", maxsplit=1)
    assert prompt.score(" and ".join(prompt.answers).upper()) == 1.0
    assert prompt.score(f"it is {prompt.answers[0]}.") == pytest.approx(1 / len(prompt.answers))
    assert prompt.score(f"{prompt.answers[0]}9 x{prompt.answers[0]}") == 0.0
    assert prompt.new_tokens > len(" ".join(prompt.answers))
    assert not any(answer in question for answer in prompt.answers)
    assert all(answer in body for answer in prompt.answers)
    if task.startswith("needle"):
        facts = re.findall(r"\nThe access code of the (\w+) office is (\d+)\.\n", body)
        asked = [code for city, code in facts if city in question]
        assert sorted(asked) == sorted(prompt.answers)
        assert len(facts) == {"needle": 1, "needle_multivalue": 4}.get(task, 8)
    elif task == "variable_tracking":
        held: dict[str, str] = {}
        lines = re.findall(r"\nVAR (\w+) = (?:VAR )?(\w+)\n", body)
        assert len(lines) == 10
        for name, value in lines:
            held[name] = held.get(value, value)
        value = re.findall(r"value (\d+)", question)[0]
        assert sorted(n for n, v in held.items() if v == value) == sorted(prompt.answers)
    else:
        words = re.findall(r"\b[a-z]{4,8}\b", body.split("\n\n", maxsplit=1)[1])
        ranked = sorted(set(words), key=words.count, reverse=True)
        top = len(prompt.answers)
        assert set(ranked[:top]) == set(prompt.answers)
        assert words.count(ranked[top - 1]) > words.count(ranked[top])


def test_tasks_repeat_with_the_seed_alone() -> None:
    def ids(seed: int) -> list[int]:
        made = build_task("needle", 3000, encode=encode, paragraphs=PARAGRAPHS, seed=seed)
        found: list[int] = made.input_ids[0].tolist()
        return found

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)


def test_tasks_that_do_not_fit_are_refused() -> None:
    for task in ("needle_multikey", "common_words"):
        with pytest.raises(InputError, match="ask for a longer prompt"):
            build_task(task, 400, encode=encode, paragraphs=PARAGRAPHS)
    with pytest.raises(InputError, match="must be one of needle"):
        build_task("riddle", 4000, encode=encode, paragraphs=PARAGRAPHS)
